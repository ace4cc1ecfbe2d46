"""A call on its way to the outside, in a task of its own that no client can cancel.

The client *watches* its flight. If the client leaves, the flight goes on: what is being bought is
read to its end, booked, and kept in the cache for whoever asks next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from gateway.domain.errors import ClientGone, GatewayError
from gateway.domain.receipt import Receipt

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of an answer, once it may be sent. ``length`` is None for a stream.

    ``body`` is called at most once; ``close`` is called once, read or not.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    length: int | None
    body: Callable[[], AsyncIterator[bytes]]
    close: Callable[[], None] = lambda: None


class Client:
    """Whether the client is still there; told by the door, read by the flight."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    def leave(self) -> None:
        self.gone.set()


class Flight:
    """One running call: its head when there is one, its receipt when all is over."""

    def __init__(self, rid: str, client: Client) -> None:
        self.rid = rid
        self.client = client
        self.said: tuple[tuple[str, str], ...] = ()
        """The headers that are known so far, for an error that ends it."""
        self.stage = "upstream"
        """Where it is, for a client that leaves."""
        self._head: asyncio.Future[Head] = asyncio.get_running_loop().create_future()
        self._abandoned = False
        self._task: asyncio.Task[Receipt] | None = None

    def start(self, run: Coroutine[Any, Any, Receipt]) -> asyncio.Task[Receipt]:
        """``run`` never raises for what can go wrong with a call: it answers and returns."""
        self._task = asyncio.get_running_loop().create_task(run, name=f"flight {self.rid}")
        self._task.add_done_callback(self._ended)
        return self._task

    def _ended(self, task: asyncio.Task[Receipt]) -> None:
        if not self._head.done():
            error = None if task.cancelled() else task.exception()
            self._head.set_exception(error or asyncio.CancelledError())
            self._head.exception()

    def answer(self, head: Head) -> None:
        """Lets the client have the beginning of the answer."""
        if self._abandoned or self._head.done():
            head.close()
        else:
            self._head.set_result(head)

    def refuse(self, error: GatewayError) -> None:
        """Lets the client have an error in place of an answer."""
        if not self._head.done():
            self._head.set_exception(error)
            # A client that left never asks: that is no fault to be reported.
            self._head.exception()

    @property
    def answered(self) -> bool:
        return self._head.done()

    async def head(self) -> Head:
        """Waits as long as the client does. Raises the flight's error, or ``ClientGone``."""
        gone = asyncio.ensure_future(self.client.gone.wait())
        try:
            either: set[asyncio.Future[Any]] = {self._head, gone}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._abandoned = True
            raise
        finally:
            gone.cancel()
        if self._head.done():
            return self._head.result()
        self._abandoned = True
        raise ClientGone(self.stage)

    async def receipt(self) -> Receipt:
        """Waits for the end, without being able to bring it about."""
        if self._task is None:
            raise RuntimeError("a flight has a receipt after it has started")
        return await asyncio.shield(self._task)


class Flights:
    """Every flight of this process: the strong references, and the count for the drain."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Receipt]] = set()
        self._errands: set[asyncio.Task[None]] = set()
        self._durable: set[asyncio.Task[None]] = set()
        self.draining = False
        """Whether the process ends: what flies goes on, nothing new is launched."""

    @property
    def count(self) -> int:
        return len(self._running)

    def launch(
        self, rid: str, client: Client, run: Callable[[Flight], Coroutine[Any, Any, Receipt]]
    ) -> Flight:
        """Starts ``run`` in a task that belongs to this process, not to the client."""
        flight = Flight(rid, client)
        task = flight.start(run(flight))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return flight

    def errand(
        self, work: Coroutine[Any, Any, None], *, durable: bool = False
    ) -> asyncio.Task[None]:
        """Work that nobody waits for, but that belongs to this process until it is done.

        ``durable``: it is on disk too and the next process goes on with it, so this one may end.
        """
        task = asyncio.get_running_loop().create_task(work)
        self._errands.add(task)
        if durable:
            self._durable.add(task)
            task.add_done_callback(self._durable.discard)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._errands.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an errand failed", exc_info=error)

    async def within(self, seconds: float, work: Coroutine[Any, Any, None]) -> None:
        """Waits for a piece of work, but not longer than ``seconds``; it then goes on alone."""
        await asyncio.wait({self.errand(work)}, timeout=seconds)

    async def landed(self) -> None:
        """Waits for the flights that are under way now, not for those that come."""
        if tasks := set(self._running):
            await asyncio.wait(tasks)

    async def idle(self) -> None:
        """Waits until nothing flies and every errand is done but the durable ones."""
        while tasks := {*self._running, *(self._errands - self._durable)}:
            await asyncio.wait(tasks)

    async def drain(self, seconds: float) -> None:
        """Waits until every flight and errand has ended; after ``seconds`` they are given up, and
        what they held expires at its bound."""
        tasks: set[asyncio.Task[Any]] = {*self._running, *self._errands}
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while tasks and loop.time() < until:
            await asyncio.wait(tasks, timeout=until - loop.time())
            tasks = {*self._running, *self._errands}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
