"""`gateway check`: is this configuration right, before anything is served with it?"""

from __future__ import annotations

from pathlib import Path

import click

from gateway.app import price_book
from gateway.cli.common import EXIT_CONFIG, check_prices, config_option, fail, load_settings, warn
from gateway.clock import SystemClock
from gateway.domain.route import Unpriced
from gateway.settings import Settings


@click.command()
@config_option
def check(config: Path | None) -> None:
    """Check the configuration and the prices; print every mistake with its place.

    Ends with 0 when it would serve, with 2 when not. Nothing is opened and nothing is sent.
    """
    settings = load_settings(config)
    check_prices(settings)
    warn(settings)
    mistakes = unpriced_models(settings)
    if mistakes:
        fail("\n".join(f"{settings.file}: {mistake}" for mistake in mistakes), EXIT_CONFIG)
    models, teams = len(settings.catalogue.models), len(settings.teams)
    behind = " and any other behind '*'" if settings.catalogue.wildcard else ""
    click.echo(f"{settings.file}: ok ({models} models{behind}, {teams} teams)")


def unpriced_models(settings: Settings) -> list[str]:
    """What is configured but has no price: refused, unless the operator allows it."""
    book, today = price_book(settings), SystemClock().now().date()
    found = []
    for model in settings.catalogue.models.values():
        upstream = settings.upstreams[model.target.upstream]
        prices = book.of(upstream.name, upstream.prices, today)
        if prices.find(model.target.model) is None and model.unpriced is Unpriced.REFUSE:
            found.append(
                f"models.{model.name}: {model.target.model} has no price at {upstream.name}. Add "
                "a row under prices.rows, or set unpriced: allow"
            )
    return found
