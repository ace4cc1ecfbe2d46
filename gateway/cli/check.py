"""`gateway check`: is this configuration right, before anything is served with it?"""

from __future__ import annotations

from pathlib import Path

import click

from gateway.assembly import price_book, unpriced_models
from gateway.cli.common import EXIT_CONFIG, config_option, fail, failures, load_settings, warn
from gateway.clock import SystemClock


@click.command()
@config_option
def check(config: Path | None) -> None:
    """Check the configuration and the prices; print every mistake with its place.

    Ends with 0 when it would serve, with 2 when not. Nothing is opened and nothing is sent.
    """
    settings = load_settings(config)
    with failures():
        book = price_book(settings)
    warn(settings)
    if mistakes := unpriced_models(settings, book, SystemClock().now().date()):
        fail("\n".join(f"{settings.file}: {mistake}" for mistake in mistakes), EXIT_CONFIG)
    models, teams = len(settings.catalogue.models), len(settings.teams)
    behind = " and any other behind '*'" if settings.catalogue.wildcard else ""
    click.echo(f"{settings.file}: ok ({models} models{behind}, {teams} teams)")
