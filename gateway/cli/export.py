"""`gateway export`: the books in the forms that other systems read."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click

from gateway.cli.common import (
    Day,
    config_option,
    failures,
    keys_of_the_file,
    load_settings,
    require_folder,
    with_store,
)
from gateway.clock import SystemClock
from gateway.domain.ledger import UsageRow
from gateway.ports import Store
from gateway.reports.focus import Provider, as_csv, as_json, focus_rows

DAY = Day()


@click.group()
def export() -> None:
    """Write the books in the forms that other systems read."""


@export.command()
@click.option("--from", "first", type=DAY, help="The first day (UTC). Default: of this month.")
@click.option("--to", "last", type=DAY, help="The last day (UTC), included. Default: today.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["csv", "json"]),
    default="csv",
    show_default=True,
    help="JSON has the same columns; dollars are text in both.",
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Default: printed.")
@click.option(
    "--billing-account",
    default="image-gateway",
    show_default=True,
    help="BillingAccountId: what you call the account that pays.",
)
@config_option
def focus(
    first: datetime | None,
    last: datetime | None,
    form: str,
    out: Path | None,
    billing_account: str,
    config: Path | None,
) -> None:
    """Write what each team, key and model cost on each day, as FOCUS 1.2.

    FOCUS is the FinOps Open Cost and Usage Specification. The sum of BilledCost is what the ledger
    posted, to the nano-dollar. Providers are those that serve the models today; of a model that
    several serve, all of them, joined by +.
    """
    today = SystemClock().now().date()
    since = first.date() if first else today.replace(day=1)
    until = last.date() if last else max(today, since)
    if until < since:
        raise click.UsageError("--to is before --from")
    if out is not None:
        require_folder(out)
    settings = load_settings(config, of_ones_own=True)

    async def read(store: Store) -> tuple[list[UsageRow], dict[str, str]]:
        rows = await store.ledger.usage(since.isoformat(), until.isoformat())
        keys = (*await store.directory.keys(), *await keys_of_the_file(settings, store))
        return rows, {key.id: key.name for key in keys}

    rows, names = with_store(settings, read)

    def provider_of(model: str) -> Provider | None:
        found = settings.catalogue.find(model)
        if found is None:
            return None
        upstreams = [settings.upstreams[target.upstream] for target in found.targets]
        # The books have no upstream in a day's sums: of several, all are named.
        names = dict.fromkeys(upstream.name for upstream in upstreams)
        prices = dict.fromkeys(upstream.prices for upstream in upstreams)
        return Provider("+".join(names), "+".join(prices))

    made = focus_rows(rows, billing_account, names, provider_of)
    text = as_csv(made) if form == "csv" else as_json(made)
    if out is None:
        click.echo(text, nl=False)
        return
    with failures():
        out.write_bytes(text.encode())
    click.echo(f"{len(made)} rows written to {out}", err=True)
