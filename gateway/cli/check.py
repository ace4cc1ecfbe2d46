"""`gateway check`: is this configuration right, before anything is served with it?"""

from __future__ import annotations

from pathlib import Path

import click

from gateway.cli.common import config_option, load_settings, require_servable


@click.command()
@config_option
def check(config: Path | None) -> None:
    """Check the configuration and the prices; print every mistake with its place.

    Ends with 0 when it would serve, with 2 when not. Nothing is opened and nothing is sent.
    """
    settings = load_settings(config)
    require_servable(settings)
    models, teams = len(settings.catalogue.models), len(settings.teams)
    behind = " and any other behind '*'" if settings.catalogue.wildcard else ""
    click.echo(f"{settings.file}: ok ({models} models{behind}, {teams} teams)")
