"""Days and months that were added up: of which of them a stretch of days is the sum.

A month's sum is kept beside those of its days, and with it that of its first half, days 1 to 15.
So a long stretch is few rows: whole and half months, and at its ends the days that are missing, or
less the days that are too many, whichever are fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, timedelta
from typing import Final, NamedTuple

FIRST, LAST = "0001-01-01", "9999-12-31"
HALF_DAYS: Final = 15


class Times(NamedTuple):
    """How many times the sums of a period count: all of it, and, of a month, its first half."""

    whole: int
    half: int = 0


ONCE: Final = Times(1)


def cover(since: str | None, until: str | None, known: tuple[str, str] | None) -> dict[str, Times]:
    """What to add (1) and to subtract (-1) for the days from ``since`` to ``until``, both
    inclusive, None for without end; ``2026-11`` is a month, ``2026-11-22`` a day.

    ``known`` is the first and the last period that there is anything of; None: of none. Beyond
    them nothing has to be asked for.
    """
    if known is None:
        return {}
    first = date.fromisoformat(max(since or FIRST, known[0][:7] + "-01"))
    last = min(
        date.fromisoformat(until or LAST),
        _end_of_month(date.fromisoformat(known[1][:7] + "-01")),
    )
    found: dict[str, Times] = {}
    year, month = first.year, first.month
    while (year, month) <= (last.year, last.month):
        length = _end_of_month(date(year, month, 1)).day
        same = (year, month)
        begin = first.day if same == (first.year, first.month) else 1
        end = last.day if same == (last.year, last.month) else length
        name = f"{year:04}-{month:02}"
        cheapest = min(_covers(name, range(begin, end + 1), length, known[1]), key=_expense)
        found |= cheapest
        year, month = (year + 1, 1) if month == 12 else (year, month + 1)
    return found


def _covers(name: str, inside: range, length: int, latest: str) -> Iterator[dict[str, Times]]:
    """All ways to add up the days of a month that are ``inside``. Of those behind ``latest`` there
    is nothing, so they need not be asked for."""
    halves = range(1, HALF_DAYS + 1), range(HALF_DAYS + 1, length + 1)
    for kept, times in (
        (range(0), None),
        (range(1, length + 1), ONCE),
        (halves[0], Times(0, 1)),
        (halves[1], Times(1, -1)),
    ):
        found = {} if times is None else {name: times}
        for number in range(1, length + 1):
            count = (number in inside) - (number in kept)
            day = f"{name}-{number:02}"
            if count and day <= latest:
                found[day] = Times(count)
        yield found


def _expense(found: dict[str, Times]) -> tuple[int, int, int]:
    """Rows for each user, where half of a month costs about one more; of as many without, and those
    of which the fewest are subtracted."""
    halves = sum(times.half != 0 for times in found.values())
    return len(found) + halves, halves, sum(min(times) < 0 for times in found.values())


def _end_of_month(day: date) -> date:
    following = day.replace(day=1) + timedelta(days=31)
    return following.replace(day=1) - timedelta(days=1)
