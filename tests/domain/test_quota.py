"""Periods are local days, weeks and months, wherever midnight is; and demands in every unit."""

from __future__ import annotations

from bisect import bisect_right
from datetime import UTC, datetime, time, timedelta
from functools import cache
from random import Random
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.domain.quota import Demand, Period, Unit, Window, period, zone_of

ZONES = sorted(available_timezones() - {"localtime", "Factory"})
SECOND = timedelta(seconds=1)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("zone", "instant", "label", "ends"),
    [
        ("UTC", "2026-11-22T12:00", "d|2026-11-22", "2026-11-23T00:00"),
        ("UTC", "2026-11-22T00:00", "d|2026-11-22", "2026-11-23T00:00"),
        ("UTC", "2026-11-22T23:59:59.999999", "d|2026-11-22", "2026-11-23T00:00"),
        ("Asia/Tokyo", "2026-11-22T14:59:59", "d|2026-11-22", "2026-11-22T15:00"),
        ("Asia/Tokyo", "2026-11-22T15:00", "d|2026-11-23", "2026-11-23T15:00"),
        ("Asia/Kathmandu", "2026-11-22T18:15", "d|2026-11-23", "2026-11-23T18:15"),
        ("America/New_York", "2026-11-22T04:59:59", "d|2026-11-21", "2026-11-22T05:00"),
        # Days of 23 and of 25 hours.
        ("Europe/Berlin", "2026-03-29T12:00", "d|2026-03-29", "2026-03-29T22:00"),
        ("Europe/Berlin", "2026-10-25T00:30", "d|2026-10-25", "2026-10-25T23:00"),
        # No midnight: the clocks go from 23:59:59 to 01:00, and the day begins there.
        ("America/Santiago", "2026-09-06T03:59:59", "d|2026-09-05", "2026-09-06T04:00"),
        ("America/Santiago", "2026-09-06T04:00", "d|2026-09-06", "2026-09-07T03:00"),
        ("Africa/Cairo", "2026-04-23T21:59:59", "d|2026-04-23", "2026-04-23T22:00"),
        ("Africa/Cairo", "2026-04-23T22:00", "d|2026-04-24", "2026-04-24T21:00"),
        ("Asia/Beirut", "2026-03-28T21:59:59", "d|2026-03-28", "2026-03-28T22:00"),
        ("Asia/Beirut", "2026-03-28T22:00", "d|2026-03-29", "2026-03-29T21:00"),
        # The hour before midnight twice: one day, until the second has passed.
        ("America/Santiago", "2026-04-05T02:30", "d|2026-04-04", "2026-04-05T04:00"),
        ("America/Santiago", "2026-04-05T03:30", "d|2026-04-04", "2026-04-05T04:00"),
        ("Africa/Cairo", "2026-10-29T20:30", "d|2026-10-29", "2026-10-29T22:00"),
        ("Africa/Cairo", "2026-10-29T21:30", "d|2026-10-29", "2026-10-29T22:00"),
        # The hour after midnight twice: the day begins with the first.
        ("America/Havana", "2026-11-01T03:59:59", "d|2026-10-31", "2026-11-01T04:00"),
        ("America/Havana", "2026-11-01T04:30", "d|2026-11-01", "2026-11-02T05:00"),
        ("America/Havana", "2026-11-01T05:30", "d|2026-11-01", "2026-11-02T05:00"),
        # A whole day that never was.
        ("Pacific/Apia", "2011-12-30T09:59:59", "d|2011-12-29", "2011-12-30T10:00"),
        ("Pacific/Apia", "2011-12-30T10:00", "d|2011-12-31", "2011-12-31T10:00"),
        ("Pacific/Kwajalein", "1993-08-21T11:59:59", "d|1993-08-20", "1993-08-21T12:00"),
        ("Pacific/Kwajalein", "1993-08-21T12:00", "d|1993-08-22", "1993-08-22T12:00"),
        # Half an hour of summer time.
        ("Australia/Lord_Howe", "2026-10-03T15:30", "d|2026-10-04", "2026-10-04T13:00"),
    ],
)
def test_days(zone: str, instant: str, label: str, ends: str) -> None:
    found = period(Window.DAY, at(instant), ZoneInfo(zone))
    assert found == Period(Window.DAY, label, at(ends))
    assert found.ends is not None
    assert found.ends.tzinfo is UTC


@pytest.mark.parametrize(
    ("zone", "instant", "label", "ends"),
    [
        ("UTC", "2026-11-01T00:00", "m|2026-11", "2026-12-01T00:00"),
        ("UTC", "2026-11-30T23:59:59.999999", "m|2026-11", "2026-12-01T00:00"),
        ("UTC", "2026-12-31T23:59:59", "m|2026-12", "2027-01-01T00:00"),
        ("UTC", "2028-02-29T12:00", "m|2028-02", "2028-03-01T00:00"),
        ("UTC", "2027-02-28T23:59:59", "m|2027-02", "2027-03-01T00:00"),
        ("Asia/Tokyo", "2026-12-31T15:00", "m|2027-01", "2027-01-31T15:00"),
        ("America/Los_Angeles", "2027-01-01T07:59", "m|2026-12", "2027-01-01T08:00"),
        # The month ends in another offset than it began in.
        ("Europe/Berlin", "2026-03-15T00:00", "m|2026-03", "2026-03-31T22:00"),
        ("Europe/Berlin", "2026-10-15T00:00", "m|2026-10", "2026-10-31T23:00"),
        ("Pacific/Kiritimati", "2026-11-30T10:00", "m|2026-12", "2026-12-31T10:00"),
    ],
)
def test_months(zone: str, instant: str, label: str, ends: str) -> None:
    assert period(Window.MONTH, at(instant), ZoneInfo(zone)) == Period(
        Window.MONTH, label, at(ends)
    )


def test_a_period_is_in_utc_unless_a_zone_is_given() -> None:
    tokyo = at("2026-11-22T16:00").astimezone(ZoneInfo("Asia/Tokyo"))
    assert period(Window.DAY, tokyo).label == "d|2026-11-22"


@pytest.mark.parametrize(
    ("zone", "instant", "label", "ends"),
    [
        ("UTC", "2026-11-22T23:59:59.999999", "w|2026-W47", "2026-11-23T00:00"),
        ("UTC", "2026-11-23T00:00", "w|2026-W48", "2026-11-30T00:00"),
        # The year of a week is that of its Thursday (ISO 8601).
        ("UTC", "2026-12-31T12:00", "w|2026-W53", "2027-01-04T00:00"),
        ("UTC", "2027-01-01T12:00", "w|2026-W53", "2027-01-04T00:00"),
        ("UTC", "2027-01-03T23:59:59", "w|2026-W53", "2027-01-04T00:00"),
        ("UTC", "2027-01-04T00:00", "w|2027-W01", "2027-01-11T00:00"),
        ("UTC", "2024-12-30T00:00", "w|2025-W01", "2025-01-06T00:00"),
        ("Pacific/Kiritimati", "2027-01-03T09:59:59", "w|2026-W53", "2027-01-03T10:00"),
        ("Pacific/Kiritimati", "2027-01-03T10:00", "w|2027-W01", "2027-01-10T10:00"),
        # Weeks of 167 and of 169 hours.
        ("Europe/Berlin", "2026-03-23T00:00", "w|2026-W13", "2026-03-29T22:00"),
        ("Europe/Berlin", "2026-10-19T00:00", "w|2026-W43", "2026-10-25T23:00"),
    ],
)
def test_weeks(zone: str, instant: str, label: str, ends: str) -> None:
    assert period(Window.WEEK, at(instant), ZoneInfo(zone)) == Period(Window.WEEK, label, at(ends))


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Apia", "America/Santiago"])
def test_what_was_ever_spent_is_one_period_without_an_end(zone: str) -> None:
    for instant in ("1999-01-01T00:00", "2026-11-22T12:00", "2100-12-31T23:59:59"):
        found = period(Window.TOTAL, at(instant), ZoneInfo(zone))
        assert found == Period(Window.TOTAL, "t|all", None)


FIRST, LAST = at("2025-12-29T00:00"), at("2028-03-13T00:00")
"""805 days: 2026 and 2027 whole, and the ISO years around them."""
FORMS = {Window.DAY: "d|%Y-%m-%d", Window.WEEK: "w|%G-W%V", Window.MONTH: "m|%Y-%m"}

Offsets = tuple[tuple[datetime, timedelta], ...]
"""What the clocks of a zone do: from which instant on they are how far from UTC."""


@cache
def offsets_of(zone: str) -> Offsets:
    """Found by looking every six hours, and then closer."""
    there = ZoneInfo(zone)

    def offset(instant: datetime) -> timedelta:
        found = instant.astimezone(there).utcoffset()
        assert found is not None
        return found

    found = [(FIRST, offset(FIRST))]
    instant = FIRST
    while instant < LAST:
        before, after = instant, instant + timedelta(hours=6)
        if offset(after) != found[-1][1]:
            while after - before > SECOND:
                middle = before + (after - before) // (2 * SECOND) * SECOND
                if offset(middle) == found[-1][1]:
                    before = middle
                else:
                    after = middle
            found.append((after, offset(after)))
        instant += timedelta(hours=6)
    return tuple(found)


@cache
def begins_of(offsets: Offsets, window: Window) -> tuple[list[datetime], list[str]]:
    """When each period begins, and its label: by adding up the hours of the offsets, without a
    question to ``zoneinfo``."""
    begins: list[datetime] = []
    labels: list[str] = []
    for (start, offset), end in zip(offsets, [one for one, _ in offsets[1:]] + [LAST], strict=True):
        instant = start
        while instant < end:
            local = (instant + offset).replace(tzinfo=None)
            label = local.strftime(FORMS[window])
            if not labels or labels[-1] != label:
                begins.append(instant)
                labels.append(label)
            midnight = datetime.combine(local.date() + timedelta(days=1), time(), tzinfo=UTC)
            instant = midnight - offset
    return begins, labels


def check(zone: str, window: Window, instant: datetime) -> None:
    """One look, against the reference."""
    begins, labels = begins_of(offsets_of(zone), window)
    index = bisect_right(begins, instant) - 1
    if index + 1 < len(begins):
        found = period(window, instant, ZoneInfo(zone))
        assert found == Period(window, labels[index], begins[index + 1]), (zone, instant)


def test_labels_never_come_back_in_any_zone() -> None:
    for offsets in {offsets_of(zone) for zone in ZONES}:
        for window in FORMS:
            _, labels = begins_of(offsets, window)
            assert labels == sorted(set(labels))
    assert len(ZONES) > 400


def test_every_period_of_two_years_in_every_zone() -> None:
    """T17. No gap, no overlap, no label but the local date's, to the second.

    Zones whose clocks do the same are checked at each period's both edges once; each zone by its
    own name around every change of its clocks, at the years' edges, and at random.
    """
    random = Random(20261122)
    seconds = (LAST - FIRST) // SECOND
    done: set[Offsets] = set()
    for zone in ZONES:
        offsets = offsets_of(zone)
        around = [change for change, _ in offsets[1:]]
        around += [at("2027-01-01T00:00") - offsets[0][1], at("2027-01-04T00:00") - offsets[0][1]]
        instants = [FIRST + random.randrange(seconds) * SECOND for _ in range(12)]
        for change in around:
            hours = (timedelta(), timedelta(hours=1), timedelta(hours=24), timedelta(hours=-24))
            instants += [change + hour + step * SECOND for hour in hours for step in (-1, 0, 1)]
        for window in FORMS:
            edges = begins_of(offsets, window)[0] if offsets not in done else []
            instants_of = instants + [begin + step * SECOND for begin in edges for step in (-1, 0)]
            for instant in instants_of:
                if instant >= FIRST:
                    check(zone, window, instant)
        done.add(offsets)
    assert len(done) > 30


@settings(max_examples=1000, deadline=None)
@given(
    zone=st.sampled_from(ZONES),
    instant=st.integers(0, 66 * 366 * 86_400).map(lambda after: at("2024-01-01") + after * SECOND),
    window=st.sampled_from(sorted(FORMS)),
)
def test_a_label_is_the_local_date_until_it_ends(
    zone: str, instant: datetime, window: Window
) -> None:
    there = ZoneInfo(zone)
    found = period(window, instant, there)
    assert found.label == instant.astimezone(there).strftime(FORMS[window])
    assert found.ends is not None
    assert instant < found.ends
    last, following = period(window, found.ends - SECOND, there), period(window, found.ends, there)
    assert last == found
    assert following.ends is not None
    assert following.label > found.label
    assert following.ends > found.ends


@pytest.mark.parametrize("name", ["Nowhere/Atall", "", "../etc/passwd", "Europe", "\0"])
def test_a_zone_that_is_not_there_counts_as_utc(name: str) -> None:
    assert zone_of(name) is UTC
    assert zone_of("Europe/Berlin") == ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize("window", [Window.NOW, Window.MINUTE])
def test_money_has_no_shorter_window_than_a_day(window: Window) -> None:
    with pytest.raises(ValueError, match="not a window of money"):
        period(window, at("2026-11-22T12:00"))


def test_a_demand_answers_for_every_unit() -> None:
    demand = Demand(requests=1, images=4, slots=1, money=7)
    assert {unit: demand.of(unit) for unit in Unit} == {
        Unit.REQUESTS: 1,
        Unit.IMAGES: 4,
        Unit.SLOTS: 1,
        Unit.MONEY: 7,
    }
