"""What is said where a correction leaves a team with less than nothing spent: its budgets have that
much more room than they say, which is hardly meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import click

from gateway.domain.ledger import Line
from gateway.domain.money import Money, exact_dollars
from gateway.domain.quota import Limit, Period, Scope, Unit, Window
from gateway.ports import Store

_WINDOWS: Mapping[str, tuple[Window, str]] = {
    "d": (Window.DAY, "on"),
    "w": (Window.WEEK, "in"),
    "m": (Window.MONTH, "in"),
    "t": (Window.TOTAL, "in"),
}
"""The first letter of a period's label -> the window, and the word before its name."""


async def below_zero(store: Store, team: str, accounts: Iterable[str]) -> list[tuple[str, Money]]:
    """The periods of a team in which less than nothing is spent. Of ``accounts`` only its own are
    looked at."""
    mine = f"{Scope.TEAM}:{team}|"
    labels = [account.removeprefix(mine) for account in accounts if account.startswith(mine)]
    lines = [_line(team, label) for label in labels]
    balances = await store.ledger.balances(lines)
    return [
        (label, balance.posted)
        for label, balance in zip(labels, balances, strict=True)
        if balance.posted < 0
    ]


def warn_below_zero(team: str, found: Sequence[tuple[str, Money]]) -> None:
    """One line on standard error; nothing where nothing was found."""
    if not found:
        return
    said = ", ".join(f"{exact_dollars(spent)} {_named(label)}" for label, spent in found)
    click.echo(
        f"warning: team {team} has spent less than nothing now: {said}. Its budgets, hard ones "
        "too, have that much more room than their amounts. If it was not meant, adjust it back.",
        err=True,
    )


def _line(team: str, label: str) -> Line:
    window = _WINDOWS[label[:1]][0]
    return Line(Limit(Scope.TEAM, team, Unit.MONEY, window, None), Period(window, label, None))


def _named(label: str) -> str:
    """``d|2026-11-22`` -> ``on 2026-11-22``."""
    name = label.partition("|")[2]
    return "in all" if name == "all" else f"{_WINDOWS[label[:1]][1]} {name}"
