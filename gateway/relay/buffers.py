"""Buffers that nobody uses at the moment, for a few seconds: each page of a new one is mapped and
cleared by the system, which takes three times as long as to read into it."""

from __future__ import annotations

import asyncio

MOST = 4
KEPT_SECONDS = 5.0
"""So long after the last one was given back they are kept."""


class Buffers:
    """Of one size each. Who gives one back does not look at it again."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: list[bytearray] = []
        self._timer: asyncio.TimerHandle | None = None
        self._used_at = 0.0

    def take(self, size: int) -> bytearray:
        """One of at least so many bytes, of no more than need be where it is new."""
        if self._kept and size <= self._size:
            return self._kept.pop()
        return bytearray(size)

    def give_back(self, buffer: bytearray) -> None:
        if len(buffer) != self._size or len(self._kept) >= MOST:
            return
        loop = asyncio.get_running_loop()
        self._kept.append(buffer)
        self._used_at = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(KEPT_SECONDS, self._look)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        left = self._used_at + KEPT_SECONDS - loop.time()
        if left > 0:
            self._timer = loop.call_later(left, self._look)
        else:
            self._kept = []
            self._timer = None

    def close(self) -> None:
        """May be repeated."""
        self._kept = []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
