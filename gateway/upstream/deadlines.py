"""When exchanges end that take too long: one timer for all of them.

A timer of its own takes 600 bytes for each call that waits for its picture, and is set and
cancelled twice for each.
"""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

LEAST_SECONDS = 0.01
"""Between two looks at everything that waits."""


class Expiring(Protocol):
    """What has a ``deadline``, by the event loop's clock, which may be put off meanwhile."""

    deadline: float

    def expire(self) -> None:
        """It is past; called once, and not in the call that ``watch`` is made in."""


class Deadlines:
    """Tells each that is watched when its deadline is past, ``LEAST_SECONDS`` late at most.

    The timer stands at the earliest deadline of when it was set, also where that one is over by
    then: it is a look at all that wait, and in ten minutes there is one.
    """

    def __init__(self) -> None:
        self._watched: set[Expiring] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._looks_at = math.inf

    def watch(self, one: Expiring) -> None:
        self._watched.add(one)
        if one.deadline < self._looks_at:
            self._look_at(one.deadline)

    def forget(self, one: Expiring) -> None:
        """It has ended in time. May be repeated."""
        self._watched.discard(one)

    def close(self) -> None:
        """Nothing is told any more."""
        self._watched.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _look_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._looks_at = when
        self._timer = asyncio.get_running_loop().call_at(when, self._look)

    def _look(self) -> None:
        self._timer, self._looks_at = None, math.inf
        now = asyncio.get_running_loop().time()
        for one in [one for one in self._watched if one.deadline <= now]:
            self._watched.discard(one)
            one.expire()
        if self._watched:
            soonest = min(one.deadline for one in self._watched)
            self._look_at(max(soonest, now + LEAST_SECONDS))
