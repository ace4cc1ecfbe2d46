"""Sees that the event loop is blocked, and says by what.

A task stamps the loop four times a second; a thread, which a blocked loop cannot stop, looks at
the stamp. While the loop is blocked nothing of this process answers, `/healthz` neither: whoever
probes it (Kubernetes' liveness, a load balancer) sees that by itself after its own time-out.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from gateway.ports import Clock

log = logging.getLogger(__name__)

STAMP_SECONDS = 0.25
BLOCKED_SECONDS = 1.0
DEAD_SECONDS = 30.0
"""From here on a probe of liveness should have failed."""


class Watchdog:
    """Of the loop that runs now. ``observe`` hears by how many seconds each stamp was late."""

    def __init__(self, clock: Clock, observe: Callable[[float], None]) -> None:
        self._clock = clock
        self._observe = observe
        self._stamp = clock.monotonic()
        self._over = threading.Event()
        self._watched = threading.get_ident()

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Watches while the block runs."""
        thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
        stamping = asyncio.create_task(self._stamp_for_ever())
        thread.start()
        try:
            yield
        finally:
            stamping.cancel()
            self._over.set()
            await asyncio.to_thread(thread.join)

    async def _stamp_for_ever(self) -> None:
        while True:
            self._stamp = before = self._clock.monotonic()
            await asyncio.sleep(STAMP_SECONDS)
            late = self._clock.monotonic() - before - STAMP_SECONDS
            self._observe(late)
            if late > BLOCKED_SECONDS:
                log.warning("the event loop goes on", extra={"blocked_seconds": round(late, 3)})

    def _look(self) -> None:
        """In the thread. Each blockage is told once, and once more when it is past all patience."""
        told, dead = 0.0, 0.0
        while not self._over.wait(STAMP_SECONDS):
            stamp = self._stamp
            blocked = self._clock.monotonic() - stamp - STAMP_SECONDS
            if blocked > BLOCKED_SECONDS and told != stamp:
                told = stamp
                self._tell("the event loop is blocked", logging.WARNING, blocked)
            if blocked > DEAD_SECONDS and dead != stamp:
                dead = stamp
                self._tell("the event loop is blocked for good", logging.CRITICAL, blocked)

    def _tell(self, event: str, level: int, blocked: float) -> None:
        frame = sys._current_frames().get(self._watched)
        # Places in the code alone: what variables hold may be secret.
        stack = traceback.extract_stack(frame) if frame is not None else ()
        where = [f"{one.filename}:{one.lineno} {one.name}" for one in stack]
        log.log(level, event, extra={"blocked_seconds": round(blocked, 3), "stack": where})
