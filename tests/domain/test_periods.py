"""Stretches of days as sums of days and months, against the days themselves."""

from __future__ import annotations

from collections import Counter
from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.periods import cover

DAYS = st.dates(date(2023, 12, 15), date(2025, 3, 15))


def days_of(found: dict[str, int]) -> Counter[str]:
    """What a cover adds up to, day by day."""
    sums = Counter[str]()
    for period, sign in found.items():
        first = date.fromisoformat(period if len(period) == 10 else f"{period}-01")
        day = first
        while day == first or (len(period) == 7 and day.month == first.month):
            sums[day.isoformat()] += sign
            day += timedelta(days=1)
    return sums


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
    assert sum(len(period) == 10 for period in found) <= 2 * 15


@pytest.mark.parametrize(
    ("since", "until", "wanted"),
    [
        (None, None, {"2026-10": 1, "2026-11": 1}),
        ("2026-11-01", None, {"2026-11": 1}),
        ("2026-10-30", "2026-11-22", {"2026-10-30": 1, "2026-10-31": 1, "2026-11": 1}),
        ("2026-10-03", "2026-10-31", {"2026-10": 1, "2026-10-01": -1, "2026-10-02": -1}),
        ("2026-10-05", "2026-10-05", {"2026-10-05": 1}),
        ("2027-01-01", None, {}),
        (None, "2026-09-30", {}),
    ],
)
def test_a_stretch_is_few_periods(
    since: str | None, until: str | None, wanted: dict[str, int]
) -> None:
    assert cover(since, until, ("2026-10", "2026-11-22")) == wanted


def test_of_nothing_nothing_is_asked() -> None:
    assert cover("2026-10-05", None, None) == {}
