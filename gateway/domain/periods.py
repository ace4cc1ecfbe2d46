"""Days and months that were added up: of which of them a stretch of days is the sum.

A month's sum is kept beside those of its days, so a long stretch is few rows: whole months, and at
its ends the days inside, or a whole month less the days outside, whichever are fewer.
"""

from __future__ import annotations

from datetime import date, timedelta

FIRST, LAST = "0001-01-01", "9999-12-31"


def cover(since: str | None, until: str | None, known: tuple[str, str] | None) -> dict[str, int]:
    """Which periods to add (1) or to subtract (-1) for the days from ``since`` to ``until``, both
    inclusive, None for without end; ``2026-11`` is a month, ``2026-11-22`` a day.

    ``known`` is the first and the last period that there is anything of; None: of none. Beyond
    them nothing has to be asked for.
    """
    if known is None:
        return {}
    begins, ends = max(since or FIRST, known[0][:7] + "-01"), until or LAST
    first = date.fromisoformat(begins)
    if ends >= known[1]:
        # Where nothing comes after it, the rest of a month adds nothing to it.
        last = _end_of_month(date.fromisoformat(f"{known[1][:7]}-01"))
    else:
        last = date.fromisoformat(ends)
    found: dict[str, int] = {}
    year, month = first.year, first.month
    while (year, month) <= (last.year, last.month):
        length = _end_of_month(date(year, month, 1)).day
        same = (year, month)
        begin = first.day if same == (first.year, first.month) else 1
        end = last.day if same == (last.year, last.month) else length
        inside = range(begin, end + 1)
        name = f"{year:04}-{month:02}"
        if len(inside) <= length // 2:
            found |= {f"{name}-{day:02}": 1 for day in inside}
        else:
            found[name] = 1
            found |= {f"{name}-{day:02}": -1 for day in range(1, length + 1) if day not in inside}
        year, month = (year + 1, 1) if month == 12 else (year, month + 1)
    return found


def _end_of_month(day: date) -> date:
    following = day.replace(day=1) + timedelta(days=31)
    return following.replace(day=1) - timedelta(days=1)
