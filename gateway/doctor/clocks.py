"""Whether this machine and those that it speaks with agree on the time.

Budgets end at midnight, leases and idle slots by the clock of whoever looks: seconds matter.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime

from gateway.doctor.finding import Finding, Topic

MOST_SECONDS = 1.0


def compared(
    whose: str,
    theirs: datetime,
    ours: datetime,
    round_trip_seconds: float,
    grain_seconds: float = 0,
) -> Finding:
    """``theirs`` was read during a round trip that ended at ``ours``; it is cut to whole
    ``grain_seconds``."""
    topic = Topic("clock", f"against {whose}")
    middle = theirs + timedelta(seconds=grain_seconds / 2)
    off = (ours - middle).total_seconds() - round_trip_seconds / 2
    unsure = round_trip_seconds / 2 + grain_seconds / 2
    if abs(off) <= MOST_SECONDS + unsure:
        return topic.ok(f"equal, as far as can be seen (within {max(unsure, 0.01):.2f} s)")
    word = "ahead of" if off > 0 else "behind"
    return topic.warn(
        f"this machine is {abs(off):.1f} s {word} it",
        "keep both machines in time with NTP: timedatectl set-ntp true, or chrony",
    )


def date_of(header: str) -> datetime | None:
    """The time of an HTTP Date header."""
    try:
        found = parsedate_to_datetime(header)
    except ValueError:
        return None
    return found if found.tzinfo is not None else None
