"""`gateway usage`: what was bought, by whom, and what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import click

from gateway.cli.common import (
    Day,
    config_option,
    json_option,
    keys_of_the_file,
    load_settings,
    no_team,
    print_json,
    print_table,
    with_store,
)
from gateway.domain.ledger import By, UsageRow, UserUsage
from gateway.domain.money import exact_dollars
from gateway.ports import Store
from gateway.reports.usage import usage_report, user_report
from gateway.settings import Settings

DAY = Day()
ROWS = "rows"
USER = "user"
HEADS = {
    ROWS: ("DAY", "TEAM", "KEY", "MODEL"),
    By.DAY: ("DAY",),
    By.MONTH: ("MONTH",),
    By.TEAM: ("TEAM",),
    By.KEY: ("TEAM", "KEY"),
    By.MODEL: ("MODEL",),
}
"""What a row is named by."""


@click.command(short_help="Show requests, images, tokens and dollars.")
@click.option("--since", type=DAY, help="The first day (UTC).")
@click.option("--until", type=DAY, help="The last day (UTC).")
@click.option("--team", "team", help="Only this team's.")
@click.option(
    "--by",
    type=click.Choice([ROWS, *(by.value for by in By), USER]),
    default=ROWS,
    show_default=True,
    help="Added up by one thing; else a row for each day, team, key and model.",
)
@json_option
@config_option
def usage(
    since: datetime | None,
    until: datetime | None,
    team: str | None,
    by: str,
    as_json: bool,
    config: Path | None,
) -> None:
    """Show requests, images, tokens and dollars by day, team, key and model.

    Dollars are exact. `unresolved` counts calls whose outcome is unknown; they cost their bound.
    End users are hashes (`u_...`), as in the log. By user, answers from the cache and adjustments
    are not counted.
    """
    if since is not None and until is not None and until < since:
        raise click.UsageError("--until is before --since")
    settings = load_settings(config, of_ones_own=True)

    async def read_users(store: Store) -> Sequence[UserUsage]:
        rows = await store.books.usage_by_user(team, _day(since), _day(until))
        await _require(team, rows, settings, store)
        return rows

    if by == USER:
        _by_user(with_store(settings, read_users), as_json=as_json)
        return

    async def read(store: Store) -> tuple[list[UsageRow], dict[str, str]]:
        if by == ROWS:
            rows = await store.ledger.usage(_day(since), _day(until), team)
        else:
            rows = await store.books.usage_by(By(by), team, _day(since), _day(until))
        await _require(team, rows, settings, store)
        keys = (*await store.directory.keys(), *await keys_of_the_file(settings, store))
        return rows, {key.id: key.name for key in keys}

    rows, names = with_store(settings, read)
    if as_json:
        print_json(usage_report(rows, names))
        return
    named = {
        "DAY": [row.day for row in rows],
        "MONTH": [row.day for row in rows],
        "TEAM": [row.team for row in rows],
        "KEY": key_names(rows, names),
        "MODEL": [row.model for row in rows],
    }
    shown = {head: named[head] for head in HEADS[by]}
    figures = ("REQUESTS", "CACHED", "IMAGES", "COST", "AVOIDED", "UNRESOLVED")
    body = [(*whose, *_figures([row])) for *whose, row in zip(*shown.values(), rows, strict=True)]
    total = ("total", *[""] * (len(shown) - 1), *_figures(rows))
    print_table((*shown, *figures), [*body, total])


def key_names(rows: Sequence[UsageRow], names: Mapping[str, str]) -> list[str]:
    """The name of each row's key, with its id where another of that team is called the same."""
    ids = {(row.team, row.key_id) for row in rows}
    often = Counter((team, names.get(key, "")) for team, key in ids)

    def said(row: UsageRow) -> str:
        name = names.get(row.key_id, "")
        if not name:
            return row.key_id
        return name if often[row.team, name] == 1 else f"{name} ({row.key_id})"

    return [said(row) for row in rows]


async def _require(
    team: str | None, rows: Sequence[object], settings: Settings, store: Store
) -> None:
    """A team that is misspelt has no rows either. One that is gone may have some."""
    if team is None or rows or team in settings.teams:
        return
    if any(one.id == team for one in await store.directory.teams()):
        return
    if not await store.books.usage_by(By.TEAM, team, None, None):
        raise await no_team(store, settings, team, ", and no usage of one")


def _by_user(rows: Sequence[UserUsage], *, as_json: bool) -> None:
    if as_json:
        print_json(user_report(rows))
        return
    head = ("TEAM", "USER", "REQUESTS", "IMAGES", "COST", "UNRESOLVED")
    named = [(row.team, row.user or "(nobody named)", *_user_figures([row])) for row in rows]
    print_table(head, [*named, ("total", "", *_user_figures(rows))])
    click.echo("Not counted by user: answers from the cache, adjustments.")


def _user_figures(rows: Sequence[UserUsage]) -> tuple[str, ...]:
    return (
        str(sum(row.requests for row in rows)),
        str(sum(row.images for row in rows)),
        exact_dollars(sum(row.cost for row in rows)),
        str(sum(row.unresolved for row in rows)),
    )


def _figures(rows: Sequence[UsageRow]) -> tuple[str, ...]:
    return (
        str(sum(row.requests for row in rows)),
        str(sum(row.cached_requests for row in rows)),
        str(sum(row.images for row in rows)),
        exact_dollars(sum(row.cost for row in rows)),
        exact_dollars(sum(row.avoided for row in rows)),
        str(sum(row.unresolved for row in rows)),
    )


def _day(value: datetime | None) -> str | None:
    return None if value is None else f"{value:%Y-%m-%d}"
