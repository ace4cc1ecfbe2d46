"""The command `gateway`."""

from __future__ import annotations

import click

from gateway.cli.check import check
from gateway.cli.db import db
from gateway.cli.demo import demo
from gateway.cli.doctor import doctor
from gateway.cli.export import export
from gateway.cli.health import health
from gateway.cli.keys import key
from gateway.cli.ledger import ledger
from gateway.cli.reconcile import reconcile
from gateway.cli.sandbox import sandbox
from gateway.cli.serve import serve
from gateway.cli.teams import team
from gateway.cli.usage import usage


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="image-gateway", prog_name="gateway")
def main() -> None:
    """A gateway for images that speaks OpenAI: team keys, exact money, cached results."""


for _command in (
    serve,
    check,
    doctor,
    health,
    demo,
    sandbox,
    team,
    key,
    usage,
    ledger,
    reconcile,
    export,
    db,
):
    main.add_command(_command)
