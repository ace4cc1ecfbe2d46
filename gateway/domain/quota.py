"""A limit is a bounded account. A call states its demand once, in every unit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple
from zoneinfo import ZoneInfo

from gateway.domain.money import Money
from gateway.domain.record import record


class Unit(StrEnum):
    REQUESTS = "requests"
    IMAGES = "images"
    SLOTS = "slots"
    MONEY = "money"


class Window(StrEnum):
    """Over what an account adds up. NOW is what runs at this moment."""

    NOW = "now"
    MINUTE = "minute"
    DAY = "day"
    WEEK = "week"
    """From Monday to Sunday (ISO 8601)."""
    MONTH = "month"
    TOTAL = "total"
    """Without end: what was ever spent."""


MONEY_WINDOWS = (Window.DAY, Window.WEEK, Window.MONTH, Window.TOTAL)
"""Every account of money that an owner has, whether limited or not."""


class Scope(StrEnum):
    TEAM = "team"
    KEY = "key"
    USER = "user"
    """An end user of a team: ``growth/u_0123...``."""


@dataclass(frozen=True, slots=True)
class Limit:
    """At most ``amount`` of ``unit`` in ``window`` for one owner; None is counted, not limited.

    ``soft`` is an amount of money that may be passed: it only makes somebody hear of it.
    """

    scope: Scope
    owner: str
    unit: Unit
    window: Window
    amount: int | None
    soft: int | None = None


@record
class Demand:
    """What one call needs, in every unit. Money is the bound, in nano-dollars."""

    requests: int = 1
    images: int = 0
    slots: int = 1
    money: Money = 0

    def of(self, unit: Unit) -> int:
        if unit is Unit.REQUESTS:
            return self.requests
        if unit is Unit.IMAGES:
            return self.images
        return self.slots if unit is Unit.SLOTS else self.money


class Standing(NamedTuple):
    """A limit after a look at it: how much is left, and in how long it is whole again. Its amount
    is what was counted against: a process's share, where each counts apart."""

    limit: Limit
    remaining: int
    reset_seconds: float


@record
class Grant:
    """The gate let the call in. ``degraded`` is set when a local gate stood in for the shared."""

    standings: tuple[Standing, ...] = ()
    degraded: bool = False


@record
class Refusal:
    """The gate refused, and took nothing. ``wait_seconds`` None: it can never fit (n > limit).

    ``share`` is what this gate lets in of the limit, where that is less than all of it.
    """

    limit: Limit
    wait_seconds: float | None
    share: int | None = None

    @property
    def counted(self) -> Limit:
        """The limit as it was counted."""
        return self.limit if self.share is None else replace(self.limit, amount=self.share)


@dataclass(frozen=True, slots=True)
class Period:
    """One window of money: a label that is part of the account's name, and its end (UTC), None
    where it has none.

    Nothing is ever reset: a new period is a new label (money.md 6b).
    """

    window: Window
    label: str
    ends: datetime | None


def period(window: Window, instant: datetime, zone: tzinfo = UTC) -> Period:
    """The window of money that ``instant`` (aware) falls in, as people in ``zone`` count it.

    Labels are ``d|2026-11-22``, ``w|2026-W47``, ``m|2026-11`` and ``t|all``.
    """
    return _period_of(window, instant.astimezone(zone).date(), zone)


@lru_cache(maxsize=1024)
def _period_of(window: Window, day: date, zone: tzinfo) -> Period:
    """Kept, as a day has many calls and each asks for several windows: 0.1 us against 5."""
    if window is Window.DAY:
        return Period(window, f"d|{day.isoformat()}", _midnight(day + timedelta(days=1), zone))
    if window is Window.WEEK:
        year, week, weekday = day.isocalendar()
        monday = day + timedelta(days=8 - weekday)
        return Period(window, f"w|{year}-W{week:02}", _midnight(monday, zone))
    if window is Window.MONTH:
        following = date(day.year + day.month // 12, day.month % 12 + 1, 1)
        return Period(window, f"m|{day:%Y-%m}", _midnight(following, zone))
    if window is Window.TOTAL:
        return Period(window, "t|all", None)
    raise ValueError(f"{window} is not a window of money")


def _midnight(day: date, zone: tzinfo) -> datetime:
    """When ``day`` begins. Where there is no midnight, the clocks skip it and the day begins at the
    skip; where there are two, with the first (PEP 495, fold 0)."""
    return datetime.combine(day, time(), tzinfo=zone).astimezone(UTC)


@lru_cache(maxsize=1024)
def zone_of(name: str) -> tzinfo:
    """The zone with this IANA name. Whoever sets a name checks it; one that this machine's zones do
    not have all the same (a restored database, an older release) counts as UTC."""
    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError):
        return UTC
