"""Something that happens once, for whoever waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Moment:
    """An event that is set once and never cleared; where nobody waits, that costs nothing.

    A call in flight has a dozen of them. An ``asyncio.Event`` takes 850 bytes, most of them a deque
    for those who may wait; this takes 50 until somebody does. ``then`` waits without a task.
    """

    __slots__ = ("_acts", "_happened")

    def __init__(self) -> None:
        self._happened = False
        self._acts: list[Callable[[], object]] | None = None

    def is_set(self) -> bool:
        return self._happened

    def set(self) -> None:
        if self._happened:
            return
        self._happened = True
        acts, self._acts = self._acts, None
        for act in acts or ():
            act()

    def then(self, act: Callable[[], object]) -> None:
        """Has ``act`` done when it happens; at once where it has."""
        if self._happened:
            act()
        elif self._acts is None:
            self._acts = [act]
        else:
            self._acts.append(act)

    def forget(self, act: Callable[[], object]) -> None:
        """Takes ``then`` back; nothing happens where it is too late for that."""
        if self._acts is not None and act in self._acts:
            self._acts.remove(act)

    async def wait(self) -> None:
        if self._happened:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        self.then(wake)
        try:
            await waiter
        finally:
            self.forget(wake)
