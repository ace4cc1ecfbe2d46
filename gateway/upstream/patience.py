"""A deadline that the event loop's own lateness does not use up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

LOOKS = 8


class Patience:
    """As ``asyncio.timeout``: raises ``TimeoutError`` after ``seconds``, once the loop has turned
    ``LOOKS`` times in them.

    A connection needs three turns of the loop from when the peer has taken it until the task that
    asked for it goes on. Where two thousand requests come at once a turn takes seconds: by the
    clock alone it is then too late for what the kernel had made in a millisecond. What is ``done``
    at the end is waited for a turn longer.
    """

    def __init__(self, seconds: float, done: Callable[[], bool]) -> None:
        self._loop = asyncio.get_running_loop()
        self._each = max(seconds, 0) / LOOKS
        self._left = LOOKS
        self._done = done
        self._bound = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> None:
        await self._bound.__aenter__()
        self._wait()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._bound.__aexit__(kind, error, trace)

    def _wait(self) -> None:
        self._timer = self._loop.call_later(self._each, self._look)

    def _look(self) -> None:
        self._left -= 1
        if self._left > 0:
            self._wait()
        elif not self._done():
            self._timer = None
            self._bound.reschedule(self._loop.time())
