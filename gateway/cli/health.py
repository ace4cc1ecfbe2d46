"""`gateway health`: is the gateway that runs here well?"""

from __future__ import annotations

import os
from pathlib import Path

import click

from gateway.cli.common import EXIT_FAILED, config_option, fail
from gateway.healthcheck import TIMEOUT_SECONDS, ask, own_url


@click.command(short_help="Ask the gateway on this machine whether it lives.")
@click.option("--ready", is_flag=True, help="Whether it should get traffic (/readyz).")
@click.option("--url", help="Ask here, instead of where the configuration says on this machine.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 600),
    default=TIMEOUT_SECONDS,
    show_default=True,
    help="Seconds to wait for an answer.",
)
@config_option
def health(ready: bool, url: str | None, timeout: float, config: Path | None) -> None:
    """Ask the gateway that runs on this machine whether it lives (/healthz).

    Prints one line. Ends with 0 when it does, with 1 when not. A gateway that has no room for one
    more connection lives. The address is that of server.metrics_port or server.port, whatever else
    is wrong in the configuration; where `gateway serve` was given another one, say it with --url.
    """
    try:
        found = ask(url or own_url(config, os.environ), ready=ready, timeout_seconds=timeout)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--url") from None
    if not found.well:
        fail(found.said, EXIT_FAILED)
    click.echo(found.said)
