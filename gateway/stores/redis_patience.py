"""How long is waited for one Redis: one timer for all who do, and turns to ask."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

TICK_SECONDS = 0.05
MOST_SECONDS = 1.5
"""What a call may wait while others are answered: there is too much to ask, or too little of this
machine."""
LEAST_TICK_SECONDS = 0.001


class GaveUp(Exception):
    """Nobody waits for an answer any more: the server has been ``silent`` for too long, or is known
    to be ``down``, or it took too long all the same."""

    def __init__(self, *, silent: bool = False, down: bool = False) -> None:
        super().__init__()
        self.silent = silent
        self.down = down


class Wait:
    """One wait for ``answer``: until its server has been silent for ``seconds``, towards all. One
    that is ``undaunted`` goes on while the server is down."""

    __slots__ = ("_answers", "_at", "_silence", "answer", "seconds", "undaunted", "waited")

    def __init__(
        self,
        answer: asyncio.Future[Any],
        seconds: float,
        at: float,
        answers: int,
        waited: float = 0.0,
        *,
        undaunted: bool = False,
    ) -> None:
        """``waited`` is what it has waited before, for its turn."""
        self.answer = answer
        self.seconds = seconds
        self.waited = waited
        self.undaunted = undaunted
        self._at = at
        self._answers = answers
        self._silence = 0.0

    def look(self, now: float, answers: int) -> float:
        """How long it may go on at the most, before it is looked at again; 0: it is over."""
        passed = min(TICK_SECONDS, now - self._at)
        self._at = now
        self.waited += passed
        self._silence = 0.0 if answers != self._answers else self._silence + passed
        self._answers = answers
        left = self.seconds - self._silence
        if left > 0 and self.waited < MOST_SECONDS:
            return left
        if not self.answer.done():
            self.answer.set_exception(GaveUp(silent=left <= 0))
        return 0.0


class Waits:
    """All who wait for one server.

    Whether a server is away is a property of the server, not of a call: in a busy process an
    answer is often late, and none would be faster from a gate of its own. Only time in which this
    process could have heard an answer counts: one that is stalled finds every deadline over before
    it has looked at its sockets, so a tick counts as a tick, however long it took.
    """

    def __init__(self) -> None:
        self.answers = 0
        """Signs of life."""
        self._waits: set[Wait] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def begin(
        self,
        answer: asyncio.Future[Any],
        seconds: float,
        waited: float = 0.0,
        *,
        undaunted: bool = False,
    ) -> Wait:
        """From now on ``answer`` may end by ``GaveUp``. Whoever began it ends it."""
        loop = answer.get_loop()
        now = loop.time()
        wait = Wait(answer, seconds, now, self.answers, waited, undaunted=undaunted)
        self._waits.add(wait)
        if self._timer is None:
            self._look_in(loop, now, min(TICK_SECONDS, seconds))
        elif now + seconds < self._due:
            self._timer.cancel()
            self._look_in(loop, now, seconds)
        return wait

    def end(self, wait: Wait) -> None:
        self._waits.discard(wait)

    def give_up(self) -> None:
        """The server is down."""
        for wait in self._waits:
            if not wait.undaunted and not wait.answer.done():
                wait.answer.set_exception(GaveUp(down=True))

    def _look_in(self, loop: asyncio.AbstractEventLoop, now: float, seconds: float) -> None:
        # It is left to run when nobody waits any more: the next one who does comes soon.
        self._due = now + seconds
        self._timer = loop.call_later(seconds, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now, soonest = loop.time(), TICK_SECONDS
        for wait in self._waits:
            left = wait.look(now, self.answers)
            if left:
                soonest = min(soonest, left)
        if self._waits:
            self._look_in(loop, now, max(LEAST_TICK_SECONDS, soonest))


class Turns:
    """So many at once; the others wait, the first first."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: deque[asyncio.Future[None]] = deque()

    def take(self) -> bool:
        """A place, if one is free."""
        if not self._free:
            return False
        self._free -= 1
        return True

    def queue(self) -> asyncio.Future[None]:
        """Done when a place is given: whoever waited gives it back, also where it then left."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        return turn

    def give(self) -> None:
        """A place comes free."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
