"""Stretches of days as sums of days and months, against the days themselves."""

from __future__ import annotations

from collections import Counter
from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.periods import ONCE, Times, cover

DAYS = st.dates(date(2023, 12, 15), date(2025, 3, 15))


def days_of(found: dict[str, Times]) -> Counter[str]:
    """What a cover adds up to, day by day."""
    sums = Counter[str]()
    for period, (whole, half) in found.items():
        first = date.fromisoformat(period if len(period) == 10 else f"{period}-01")
        day = first
        while day == first or (len(period) == 7 and day.month == first.month):
            sums[day.isoformat()] += whole + half * (day.day <= 15)
            day += timedelta(days=1)
    return sums


def less(*days: str) -> dict[str, Times]:
    return dict.fromkeys(days, Times(-1))


@given(since=st.none() | DAYS, until=st.none() | DAYS, known=st.lists(DAYS, min_size=1))
def test_a_cover_is_its_days(since: date | None, until: date | None, known: list[date]) -> None:
    """Of the days that there is anything of, each counts once where it is inside, and else not."""
    first, last = f"{min(known):%Y-%m}", max(known).isoformat()
    begin = None if since is None else since.isoformat()
    end = None if until is None else until.isoformat()
    found = cover(begin, end, (first, last))
    sums = days_of(found)
    for day in {one.isoformat() for one in known}:
        assert sums[day] == ((begin or "") <= day <= (end or "9")), (day, found)
    assert sum(len(period) == 10 for period in found) <= 2 * 9


@pytest.mark.parametrize(
    ("since", "until", "wanted"),
    [
        (None, None, {"2026-10": ONCE, "2026-11": ONCE}),
        ("2026-11-01", None, {"2026-11": ONCE}),
        ("2026-10-30", "2026-11-22", {"2026-10-30": ONCE, "2026-10-31": ONCE, "2026-11": ONCE}),
        ("2026-10-03", None, {"2026-10": ONCE, "2026-11": ONCE} | less("2026-10-01", "2026-10-02")),
        ("2026-10-05", "2026-10-05", {"2026-10-05": ONCE}),
        ("2026-10-16", "2026-11-15", {"2026-10": Times(1, -1), "2026-11": Times(0, 1)}),
        ("2026-11-03", "2026-11-15", {"2026-11": Times(0, 1)} | less("2026-11-01", "2026-11-02")),
        ("2026-10-15", "2026-10-31", {"2026-10": Times(1, -1), "2026-10-15": ONCE}),
        # A row less with half of the month is no gain.
        (
            "2026-10-09",
            "2026-10-31",
            {"2026-10": ONCE} | less(*(f"2026-10-0{day}" for day in range(1, 9))),
        ),
        # Behind the last day there is nothing to add, and nothing to subtract.
        ("2026-11-22", "2026-11-30", {"2026-11-22": ONCE}),
        ("2026-11-01", "2026-11-25", {"2026-11": ONCE}),
        ("2026-11-16", "2026-11-23", {"2026-11": Times(1, -1)}),
        ("2026-11-25", None, {}),
        ("2027-01-01", None, {}),
        (None, "2026-09-30", {}),
    ],
)
def test_a_stretch_is_few_periods(
    since: str | None, until: str | None, wanted: dict[str, Times]
) -> None:
    assert cover(since, until, ("2026-10", "2026-11-22")) == wanted


@pytest.mark.parametrize(("year", "month"), [(2025, 2), (2024, 2), (2025, 4), (2025, 5)])
def test_of_a_month_few_days_are_read(year: int, month: int) -> None:
    """At one end of a stretch that goes on no more than nine, or eight and the month."""
    first = date(year, month, 1)
    days = [
        first + timedelta(days=n) for n in range(31) if (first + timedelta(days=n)).day == n + 1
    ]
    known = ("2023-01", "2026-01-01")
    for day in map(date.isoformat, days):
        assert len(cover(days[0].isoformat(), day, known)) <= 9
        assert len(cover(day, days[-1].isoformat(), known)) <= 9


def test_of_nothing_nothing_is_asked() -> None:
    assert cover("2026-10-05", None, None) == {}
