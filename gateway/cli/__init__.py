"""The command `gateway`."""

from __future__ import annotations

import errno
from typing import Any

import click

from gateway.cli.check import check
from gateway.cli.common import EXIT_FAILED, fail
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


class Commands(click.Group):
    """What is printed may go to a disk that is full: one sentence says so, not a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            fail(
                f"{error.filename or 'what was asked for'} cannot be written: {error.strerror}",
                EXIT_FAILED,
            )


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
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
