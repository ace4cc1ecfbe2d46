"""`gateway check`: is this configuration right, before anything is served with it?"""

from __future__ import annotations

from pathlib import Path

import click

from gateway.assembly import price_book, retired_names
from gateway.cli.common import config_option, failures, load_settings, require_servable
from gateway.clock import SystemClock
from gateway.doctor.finding import counted


@click.command(short_help="Check the configuration and the prices.")
@config_option
def check(config: Path | None) -> None:
    """Check the configuration and the prices; print every mistake with its place.

    Ends with 0 when it would serve, with 2 when not. Nothing is opened and nothing is sent. Names
    that lead to a model which its provider has shut down are warned of.
    """
    settings = load_settings(config)
    require_servable(settings)
    with failures():
        book = price_book(settings)
    for mistake in retired_names(settings, book, SystemClock().now().date()):
        click.echo(f"warning: {settings.file}: {mistake}", err=True)
    models = counted(len(settings.catalogue.models), "model")
    teams = counted(len(settings.teams), "team")
    behind = " and any other behind '*'" if settings.catalogue.wildcard else ""
    click.echo(f"{settings.file}: ok ({models}{behind}, {teams})")
