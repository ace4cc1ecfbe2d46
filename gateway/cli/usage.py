"""`gateway usage`: what was bought, by whom, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import click

from gateway.cli.common import (
    config_option,
    json_option,
    keys_of_the_file,
    load_settings,
    print_json,
    print_table,
    with_store,
)
from gateway.domain.ledger import UsageRow, UserUsage
from gateway.domain.money import exact_dollars
from gateway.ports import Store
from gateway.reports.usage import usage_report, user_report

DAY = click.DateTime(["%Y-%m-%d"])


@click.command()
@click.option("--since", type=DAY, help="The first day (UTC).")
@click.option("--until", type=DAY, help="The last day (UTC).")
@click.option("--team", "team", help="Only this team's.")
@click.option(
    "--by",
    type=click.Choice(["team", "user"]),
    default="team",
    show_default=True,
    help="By day, team, key and model, or by team and end user.",
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
    End users are hashes (`u_...`), as in the log. By user, answers from the cache, adjustments, and
    calls older than ledger.keep are not counted.
    """
    if since is not None and until is not None and until < since:
        raise click.UsageError("--until is before --since")
    settings = load_settings(config, of_ones_own=True)
    if by == "user":
        _by_user(
            with_store(
                settings,
                lambda store: store.books.usage_by_user(team, _day(since), _day(until)),
            ),
            as_json=as_json,
        )
        return

    async def read(store: Store) -> tuple[list[UsageRow], dict[str, str]]:
        rows = await store.ledger.usage(_day(since), _day(until))
        keys = (*await store.directory.keys(), *await keys_of_the_file(settings, store))
        return rows, {key.id: key.name for key in keys}

    rows, names = with_store(settings, read)
    rows = [row for row in rows if team is None or row.team == team]
    if as_json:
        print_json(usage_report(rows, names))
        return
    named = [
        (row.day, row.team, names.get(row.key_id) or row.key_id, row.model, *_figures([row]))
        for row in rows
    ]
    head = ("DAY", "TEAM", "KEY", "MODEL", "REQUESTS", "CACHED", "IMAGES", "COST", "AVOIDED")
    print_table((*head, "UNRESOLVED"), [*named, ("total", "", "", "", *_figures(rows))])


def _by_user(rows: Sequence[UserUsage], *, as_json: bool) -> None:
    if as_json:
        print_json(user_report(rows))
        return
    head = ("TEAM", "USER", "REQUESTS", "IMAGES", "COST", "UNRESOLVED")
    named = [(row.team, row.user or "(nobody named)", *_user_figures([row])) for row in rows]
    print_table(head, [*named, ("total", "", *_user_figures(rows))])
    click.echo(
        "Not counted by user: answers from the cache, adjustments, calls older than ledger.keep."
    )


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
