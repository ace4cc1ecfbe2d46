"""How a write is waited for: a queue, one thread a process that works it off, and futures.

It knows nothing of databases. Whoever has one says in ``work`` how a batch becomes durable, and
hands each operation its result or its error; its waiter, on whatever loop, hears of it then.

A task that is cancelled while its operation is queued does not take the operation back. One that
is *droppable* is skipped where the writer still can.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

from gateway.domain.errors import LedgerUnavailable
from gateway.threads import give_way

BATCH = 128
QUEUE = 10_000
"""Operations that may wait for the writer. More are refused: it is far behind, or stuck."""
CLOSE_SECONDS = 10.0

T = TypeVar("T")
_log = logging.getLogger(__name__)


def unavailable() -> LedgerUnavailable:
    return LedgerUnavailable(
        "The ledger cannot be written at the moment, so nothing was started. "
        "Try again in a few seconds.",
        retry_after_seconds=5,
    )


def unreadable() -> LedgerUnavailable:
    return LedgerUnavailable(
        "The ledger cannot be read at the moment. Try again in a few seconds.",
        retry_after_seconds=5,
    )


class Operation(Generic[T]):
    """One piece of work for the writer, and then its result or its error.

    ``rid`` names it in the log where nobody waits for it (``awaited`` is False). One that is
    ``droppable`` is skipped when its waiter has gone before its turn.
    """

    __slots__ = ("deadline", "droppable", "error", "future", "loop", "result", "rid")

    def __init__(self, *, awaited: bool = True, droppable: bool = False, rid: str = "") -> None:
        self.droppable = droppable
        self.rid = rid
        self.result: tuple[T] | None = None
        self.error: Exception | None = None
        loop = self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] | None = loop.create_future() if awaited else None
        self.deadline = 0.0

    @property
    def abandoned(self) -> bool:
        """Whether its waiter has gone, or was told that it has waited in vain."""
        return self.droppable and self.future is not None and self.future.done()

    def succeed(self, result: T) -> None:
        self.result, self.error = (result,), None

    def fail(self, error: Exception) -> None:
        self.result, self.error = None, error


class _Waiters:
    """Those of one loop who wait for the writer, in the order they came, and one timer for all of
    them: a timeout for each costs more than the rest of its way through the loop (12 us)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, patience_seconds: float) -> None:
        self.loop = loop
        self._patience_seconds = patience_seconds
        self._waiting: deque[Operation[Any]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, operation: Operation[Any]) -> None:
        operation.deadline = self.loop.time() + self._patience_seconds
        waiting = self._waiting
        while waiting and ((future := waiting[0].future) is None or future.done()):
            waiting.popleft()
        waiting.append(operation)
        if self._timer is None:
            self._timer = self.loop.call_at(operation.deadline, self._look)

    def _forget_answered(self) -> None:
        waiting = self._waiting
        while waiting and (waiting[0].future is None or waiting[0].future.done()):
            waiting.popleft()

    def _look(self) -> None:
        now = self.loop.time()
        self._forget_answered()
        while self._waiting and self._waiting[0].deadline <= now:
            future = self._waiting.popleft().future
            if future is not None:
                _log.warning("the ledger's writer does not answer in time")
                future.set_exception(unavailable())
            self._forget_answered()
        self._timer = None
        if self._waiting:
            self._timer = self.loop.call_at(self._waiting[0].deadline, self._look)


O = TypeVar("O", bound="Operation[Any]")  # noqa: E741


class WriterThread(ABC, Generic[O]):
    """The one thread of this process that writes to a database, and its queue.

    ``patience_seconds`` is how long a caller waits. What it asked for may still come after that:
    everything can be repeated. A subclass calls ``start`` once it is made.
    """

    def __init__(self, patience_seconds: float) -> None:
        self._patience_seconds = patience_seconds
        self._closed = False
        self._queue: deque[O | None] = deque()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_asleep = False
        """Whether the thread may be waiting for the bell, and nobody is about to ring it."""
        self._ringing: asyncio.AbstractEventLoop | None = None
        """The loop at whose turn's end somebody is."""
        self._room = QUEUE
        self._waiters: _Waiters | None = None
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)

    @abstractmethod
    def work(self, batch: Sequence[O]) -> None:
        """In the thread: makes a batch durable, and calls ``deliver`` for all of it. Never
        raises."""

    @abstractmethod
    def end(self) -> None:
        """In the thread, as its last: closes the connection."""

    def start(self) -> None:
        self._thread.start()

    async def aclose(self) -> None:
        """Works off what is queued, then ends. Repeating it is harmless."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._stop)

    def _asked(self, operation: O) -> asyncio.Future[Any]:
        """What an operation is answered: ``LedgerUnavailable`` where that is too late. Raises it at
        once where it cannot be queued."""
        self._enqueue(operation)
        waiters = self._waiters
        if waiters is None or waiters.loop is not operation.loop:
            waiters = self._waiters = _Waiters(operation.loop, self._patience_seconds)
        waiters.add(operation)
        assert operation.future is not None
        return operation.future

    def _leave(self, operation: O) -> None:
        """Queues what nobody waits for."""
        try:
            self._enqueue(operation)
        except LedgerUnavailable:
            _log.error(
                "replay %s is not counted: the writer's queue is full or closed", operation.rid
            )

    def _enqueue(self, operation: O) -> None:
        if self._closed or len(self._queue) >= self._room:
            raise unavailable()
        self._queue.append(operation)
        if self._is_asleep:
            # At the end of the loop's turn: before that the thread would be woken in vain, for want
            # of the GIL; and then it finds all that came in this turn, not the first of it alone.
            self._is_asleep = False
            self._ringing = operation.loop
            operation.loop.call_soon(self._ring)
        elif self._ringing is not None and self._ringing is not operation.loop:
            self._ring()  # that loop may have ended before its turn did

    def _ring(self) -> None:
        self._ringing = None
        self._bell.put(None)

    def _stop(self) -> None:
        self._queue.append(None)
        self._bell.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            _log.error("the ledger's writer is stuck: its thread is given up")

    def _run(self) -> None:
        give_way()
        going_on = True
        while going_on:
            batch, going_on = self._take()
            if batch:
                self.work(batch)
        self.end()

    def _take(self) -> tuple[list[O], bool]:
        """What has queued, at least one and at most a batch; and whether to go on after it."""
        queued = self._queue
        while not queued:
            self._is_asleep = True
            # Whoever came before that was said has not rung. Rung for nothing, it looks again.
            if not queued:
                self._bell.get()
            self._is_asleep = False
        batch: list[O] = []
        while queued and len(batch) < BATCH:
            operation = queued.popleft()
            if operation is None:
                return batch, False
            batch.append(operation)
        return batch, True


def deliver(batch: Iterable[Operation[Any]]) -> None:
    """From the writer's thread: one wake-up for each loop that waits."""
    loops: dict[asyncio.AbstractEventLoop, list[Operation[Any]]] = {}
    for operation in batch:
        if operation.future is not None:
            loops.setdefault(operation.loop, []).append(operation)
        elif operation.result is None:
            _log.error("replay %s is not counted: %r", operation.rid, operation.error)
    for loop, operations in loops.items():
        try:
            loop.call_soon_threadsafe(_deliver_here, operations)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            _log.warning("%d results of the ledger came too late", len(operations))


def _deliver_here(operations: Iterable[Operation[Any]]) -> None:
    for operation in operations:
        future = operation.future
        if future is None or future.done():
            continue  # nobody wants it any more
        if operation.result is not None:
            future.set_result(operation.result[0])
        else:
            future.set_exception(operation.error or unavailable())
