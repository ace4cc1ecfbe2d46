"""Seconds in which the loop of a test had its turns, for tests that say how long something waits:
what a busy machine takes from the whole process is nobody's wait.

::

    async with awake() as clock:
        began = clock.time()
        await gate.take(...)
        assert clock.time() - began < 0.75
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

TICK_SECONDS = 0.01


class Awake:
    """A clock that stands while the loop is late: a turn that takes longer than a tick counts as
    one tick."""

    def __init__(self) -> None:
        self._late = 0.0
        self._due = time.monotonic() + TICK_SECONDS

    def time(self) -> float:
        """In seconds, from any beginning."""
        now = time.monotonic()
        return now - self._late - max(0.0, now - self._due)

    async def tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            self._late += max(0.0, now - self._due)
            self._due = now + TICK_SECONDS


@asynccontextmanager
async def awake() -> AsyncIterator[Awake]:
    clock = Awake()
    ticking = asyncio.create_task(clock.tick())
    try:
        yield clock
    finally:
        ticking.cancel()
