"""Periods are local days and months, wherever midnight is; and demands in every unit."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.domain.quota import Demand, Period, Unit, Window, period

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
        # Half an hour of summer time.
        ("Australia/Lord_Howe", "2026-10-03T15:30", "d|2026-10-04", "2026-10-04T13:00"),
    ],
)
def test_days(zone: str, instant: str, label: str, ends: str) -> None:
    found = period(Window.DAY, at(instant), ZoneInfo(zone))
    assert found == Period(Window.DAY, label, at(ends))
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


@settings(max_examples=1500, deadline=None)
@given(
    zone=st.sampled_from(ZONES),
    instant=st.integers(0, 66 * 366 * 86_400).map(lambda after: at("2024-01-01") + after * SECOND),
    window=st.sampled_from([Window.DAY, Window.MONTH]),
)
def test_a_label_is_the_local_date_until_it_ends(
    zone: str, instant: datetime, window: Window
) -> None:
    there = ZoneInfo(zone)
    found = period(window, instant, there)
    local = instant.astimezone(there)
    form = "d|%Y-%m-%d" if window is Window.DAY else "m|%Y-%m"
    assert found.label == local.strftime(form)
    assert instant < found.ends
    last, following = period(window, found.ends - SECOND, there), period(window, found.ends, there)
    assert last == found
    assert following.label > found.label
    assert following.ends > found.ends
    longest = timedelta(hours=25) if window is Window.DAY else timedelta(days=31, hours=1)
    assert found.ends - instant <= longest


def test_a_year_of_days_has_no_gap_in_any_zone() -> None:
    for zone in ZONES:
        there, days = ZoneInfo(zone), []
        instant = at("2026-01-01T12:00")
        while instant < at("2027-01-01T12:00"):
            found = period(Window.DAY, instant, there)
            assert instant < found.ends, zone
            days.append(found.label)
            instant = found.ends
        assert days == sorted(set(days)), zone
        assert len(days) in (365, 366, 367), zone


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
