"""The slots of one origin: which connections are idle, and who waits for one.

A slot is the right to have one connection. A call owns its slot from ``take`` to ``give``; an idle
connection owns the slot it sits in. Nothing here awaits but the wait for a slot, so a cancelled
call gives back what it has in one place.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from gateway.upstream.connection import Connection
from gateway.upstream.wire import NotSent, Reason


class Pool:
    """At most ``max_connections`` connections to one origin, each idle at most ``idle_seconds``.

    Every operation costs the same however many connections there are. The connection used last
    is used next: the others may then grow old and close. Waiters are served in their order.
    """

    def __init__(self, max_connections: int, idle_seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._max = max_connections
        self._idle_seconds = idle_seconds
        self._slots = 0
        self._idle: OrderedDict[Connection, float] = OrderedDict()
        self._waiters: OrderedDict[asyncio.Future[Connection | None], None] = OrderedDict()
        self._sweep: asyncio.TimerHandle | None = None

    @property
    def slots(self) -> int:
        """How many are owned, by calls and by idle connections."""
        return self._slots

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    async def take(self, wait_seconds: float) -> Connection | None:
        """A slot, with the connection in it, or None where the caller has to make one.

        Raises ``NotSent`` (pool) after ``wait_seconds``.
        """
        oldest = self._loop.time() - self._idle_seconds
        while self._idle:
            connection, since = self._idle.popitem()
            if since > oldest and connection.is_fresh():
                return connection
            connection.abort()
            self._slots -= 1
        if self._slots < self._max:
            self._slots += 1
            return None
        waiter: asyncio.Future[Connection | None] = self._loop.create_future()
        self._waiters[waiter] = None
        timer = self._loop.call_later(wait_seconds, self._give_up, waiter)
        try:
            handed = await waiter
        except asyncio.CancelledError:
            # The slot may have been handed over in the same turn of the loop.
            if not waiter.cancelled() and waiter.exception() is None:
                self.give(waiter.result())
            raise
        finally:
            timer.cancel()
            self._waiters.pop(waiter, None)
        if handed is not None and not handed.is_fresh():
            handed.abort()
            return None
        return handed

    def give(self, connection: Connection | None) -> None:
        """Ends the ownership of a slot; the connection in it may be used again."""
        if connection is not None and connection.closed:
            connection = None
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_result(connection)
                return
        if connection is None:
            self._slots -= 1
            return
        self._idle[connection] = self._loop.time()
        if self._sweep is None:
            self._sweep = self._loop.call_later(self._idle_seconds, self._close_old)

    def forget(self, connection: Connection) -> None:
        """A connection is closed. Frees its slot if it was idle; else its owner does that."""
        if self._idle.pop(connection, None) is not None:
            self.give(None)

    def close(self) -> None:
        """Closes what is idle."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        for connection in list(self._idle):
            connection.abort()
            self.forget(connection)

    def _give_up(self, waiter: asyncio.Future[Connection | None]) -> None:
        if not waiter.done():
            waiter.set_exception(NotSent(Reason.POOL, "every connection is busy"))

    def _close_old(self) -> None:
        self._sweep = None
        now = self._loop.time()
        while self._idle:
            connection, since = next(iter(self._idle.items()))
            if since + self._idle_seconds > now:
                self._sweep = self._loop.call_at(since + self._idle_seconds, self._close_old)
                return
            connection.abort()
            self.forget(connection)
