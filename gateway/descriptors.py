"""File descriptors: how many there may be, and how they are shared out.

A connection takes one, and another one while its large request is on disk; a call that flies takes
two: its connection upstream and its answer's file. It may outlive its client. Whoever counts the
other way, and lets connections in until the system refuses, finds that the ledger was refused too.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass

LEDGER = 32
"""Kept for the ledger and the other stores, whatever comes."""
AT_THE_DOOR = 32
"""For connections that were just accepted, or are being told that there is no room."""
KEPT_ANSWERS = 128
"""For answers kept in memory, at most; of few descriptors a sixteenth."""
FOLDERS = ("/proc/self/fd", "/dev/fd")


@dataclass(frozen=True, slots=True)
class Shares:
    """The most connections, the most calls in flight of those that were wanted, and the most of
    any."""

    connections: int
    in_flight: int
    spare_in_flight: int


def limit() -> int:
    """The soft limit of this process."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def opened() -> int:
    """How many are open now; 0 where the system does not say."""
    for folder in FOLDERS:
        try:
            return len(os.listdir(folder))
        except OSError:
            continue
    return 0


def kept_answers(limit: int) -> int:
    """For how many answers kept in memory there is one."""
    return KEPT_ANSWERS if limit == resource.RLIM_INFINITY else min(KEPT_ANSWERS, limit // 16)


def shares(limit: int, opened: int, connections: int, in_flight: int) -> Shares:
    """What of the wanted numbers fits into ``limit`` beside those that are open, at least 1."""
    if limit == resource.RLIM_INFINITY:
        return Shares(connections, in_flight, 2**31)
    room = max(0, limit - opened - LEDGER - AT_THE_DOOR - kept_answers(limit))
    # Half for the doors, half for what flies; what one side does not want the other may have.
    doors = max(room // 4, room // 2 - in_flight)
    connections = max(1, min(connections, doors))
    spare = max(1, room // 2 - connections)
    return Shares(connections, min(in_flight, spare), spare)
