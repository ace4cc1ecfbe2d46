"""The command `gateway`."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
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

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class Commands(click.Group):
    """What is printed, help too, may go to a disk that is full: one sentence says so, not a
    traceback. A pipe that nobody reads any more ends a command without a word, which click sees to.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            return super().main(*args, **extra)
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise
            with contextlib.suppress(OSError, ValueError):
                # What is left in its buffer would be tried once more, and complained of, at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
