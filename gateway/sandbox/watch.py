"""Waiting without polling, from any thread or event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

Waiter: TypeAlias = "tuple[Callable[[], bool], asyncio.AbstractEventLoop, asyncio.Future[None]]"


class Watch:
    """State that one side changes and the other waits for. A subclass changes itself while it
    holds ``self._lock`` and then calls ``_changed``."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._waiters: list[Waiter] = []

    def wait_until(self, true: Callable[[], bool], timeout_seconds: float = 10) -> None:
        """Blocks the calling thread until ``true()``. Raises ``TimeoutError``."""
        with self._lock:
            if not self._lock.wait_for(true, timeout_seconds):
                raise TimeoutError(f"nothing of the kind within {timeout_seconds} s")

    async def until(self, true: Callable[[], bool]) -> None:
        """Waits in the running loop until ``true()``."""
        loop = asyncio.get_running_loop()
        waiter: Waiter = (true, loop, loop.create_future())
        with self._lock:
            if true():
                return
            self._waiters.append(waiter)
        try:
            await waiter[2]
        finally:
            with self._lock:
                self._waiters = [other for other in self._waiters if other is not waiter]

    def _changed(self) -> None:
        with self._lock:
            self._lock.notify_all()
            for true, loop, future in self._waiters:
                if true():
                    # A loop that was closed meanwhile has nobody left to wake.
                    with suppress(RuntimeError):
                        loop.call_soon_threadsafe(_wake, future)


class Gate(Watch):
    """Holds requests until a test opens it: ``Rule(wait_for=gate)``, then ``gate.set()``."""

    def __init__(self) -> None:
        super().__init__()
        self._open = False
        self._arrivals = 0

    @property
    def arrivals(self) -> int:
        """How many requests have come to the gate, since it was made."""
        return self._arrivals

    def is_set(self) -> bool:
        return self._open

    def set(self) -> None:
        """Opens it for good, for those that wait and those that will come."""
        with self._lock:
            self._open = True
        self._changed()

    async def wait(self) -> None:
        """Arrives, and stays until it is open."""
        with self._lock:
            self._arrivals += 1
        self._changed()
        await self.until(self.is_set)

    async def arrived(self, count: int = 1) -> None:
        """Waits until ``count`` requests have come to the gate."""
        await self.until(lambda: self._arrivals >= count)

    def wait_arrived(self, count: int = 1, timeout_seconds: float = 10) -> None:
        """As ``arrived``, for a test without a loop. Raises ``TimeoutError``."""
        self.wait_until(lambda: self._arrivals >= count, timeout_seconds)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
