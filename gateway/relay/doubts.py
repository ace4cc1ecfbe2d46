"""Answers that were sent in whole, but may not have been read: whether nobody comes back for them.

One timer looks after all of them. A task and ten timers for each was half of all that the event
loop had to do for a small request.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

TICKS, TICK_SECONDS = 10, 0.05
"""Who still has its connection open so long after its answer has read it. Only time in which this
process could have heard of its end counts: a tick is a tick, however long it took."""
RETRY_SECONDS = 5.0
"""How long after giving up an SDK sends its next try: half a second, then one, then two."""


class Closed(Protocol):
    """Whether a connection has ended: an event."""

    def is_set(self) -> bool: ...


class _Doubt(NamedTuple):
    """``due`` is a number of ticks, and then, once its connection has ended, the loop's seconds."""

    due: float
    rid: str
    closed: Closed


class Doubts:
    """Each ends by itself: ``ended`` hears of its request, and nobody is led to that any more."""

    def __init__(self, ended: Callable[[str], None]) -> None:
        self._ended = ended
        self._ticks = 0
        self._open: deque[_Doubt] = deque()
        """Who may still read its answer, the first to be believed first."""
        self._gone: deque[_Doubt] = deque()
        """Who may send its next try."""
        self._timer: asyncio.TimerHandle | None = None

    def add(self, rid: str, closed: Closed) -> None:
        """A client has been sent all of its answer. ``closed``: whether its connection ended."""
        if not self._open and self._timer is not None:
            # It may be seconds away: those who are gone are waited for in one go.
            self._timer.cancel()
            self._timer = None
        # The tick that is under way is not a whole one.
        self._open.append(_Doubt(self._ticks + TICKS + 1, rid, closed))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)

    def close(self) -> list[str]:
        """Ends them all: returns the requests that were still in doubt."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        left = [one.rid for one in (*self._open, *self._gone)]
        self._open.clear()
        self._gone.clear()
        return left

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._ticks += 1
        while self._open and self._open[0].due <= self._ticks:
            one = self._open.popleft()
            if one.closed.is_set():
                self._gone.append(one._replace(due=now + RETRY_SECONDS))
            else:
                self._ended(one.rid)
        while self._gone and self._gone[0].due <= now:
            self._ended(self._gone.popleft().rid)
        pause = TICK_SECONDS if self._open or not self._gone else self._gone[0].due - now
        going_on = self._open or self._gone
        self._timer = loop.call_later(pause, self._tick) if going_on else None
