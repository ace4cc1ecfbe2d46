"""A call on its way to the outside, in a task of its own that no client can cancel.

Clients *watch* a flight. If all of them leave, it goes on: what is being bought is read to its
end, booked, and kept for whoever comes back for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from types import TracebackType
from typing import Any, TypeAlias

from gateway.domain.errors import ClientGone, GatewayError
from gateway.domain.receipt import Receipt
from gateway.domain.record import record
from gateway.domain.trace import TraceContext
from gateway.ports import FlightNotice
from gateway.relay.chunks import once
from gateway.relay.doubts import Closed
from gateway.relay.meter import error_event
from gateway.relay.moment import Moment

log = logging.getLogger(__name__)

Headers: TypeAlias = tuple[tuple[str, str], ...]


@record
class Head:
    """The beginning of an answer, once it may be sent. ``length`` is None for a stream.

    ``body`` of a stream is called at most once, of anything else as often as it is to be read;
    ``close`` is called once, read or not.
    """

    status: int
    headers: Headers
    length: int | None
    body: Callable[[], AsyncIterator[bytes]]
    close: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, status: int, headers: Headers, content: bytes) -> Head:
        """An answer whose bytes are known."""
        return cls(status, headers, len(content), lambda: once(content))


@record
class Shown:
    """An answer that any number of clients may have. ``length`` is None for a stream.

    ``headers`` are of the answer, whoever reads it; ``own`` are for whom it was bought. ``body``
    of a stream may be called once a reader, else more often; each reader has called ``share``
    before, and ``close`` at its end.
    """

    status: int
    headers: Headers
    own: Headers
    length: int | None
    body: Callable[[], AsyncIterator[bytes]]
    share: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None

    def head(self, more: Headers) -> Head:
        """The answer for one who has a share, under headers of their own too. Those say what is
        true of this request: what it cost is not what the answer had cost."""
        own = dict(more)
        shared = [pair for pair in self.headers if pair[0] not in own]
        return Head(self.status, (*shared, *more), self.length, self.body, self.close)


class Client:
    """Whether the client is still there; told by the door, read by the flight."""

    __slots__ = ("_acts", "_away", "_last_acts", "closed", "gone")

    def __init__(self, closed: Moment | asyncio.Event | None = None) -> None:
        """``closed`` is set when its connection ends, which may be after all was said."""
        self.closed = closed
        self.gone = Moment()
        self._away = False
        # Tuples: most clients stand for minutes with one act in each, or none.
        self._acts: tuple[Callable[[], None], ...] = ()
        self._last_acts: tuple[Callable[[], object], ...] = ()

    @property
    def away(self) -> bool:
        """It has left or hung up."""
        return self._away

    def hang_up(self) -> None:
        """It has closed its sending half. Nobody can say whether it still reads: it is answered,
        but who comes back with the same call is taken for it."""
        self._away = True
        acts, self._acts = self._acts, ()
        for act in reversed(acts):
            act()

    def leave(self) -> None:
        self.gone.set()
        self.hang_up()
        acts, self._last_acts = self._last_acts, ()
        for act in reversed(acts):
            act()

    def when_gone(self, act: Callable[[], object]) -> None:
        """Has ``act`` done when the client has surely left; at once where it has."""
        if self.gone.is_set():
            act()
        else:
            self._last_acts += (act,)

    def when_away(self, act: Callable[[], None]) -> None:
        """Has ``act`` done when the client leaves or hangs up; at once where it has."""
        if self._away:
            act()
        else:
            self._acts += (act,)


class Seat:
    """One client's place among those who wait for a flight, given up once."""

    __slots__ = ("_closed", "_leave", "_left", "_lost", "_rid")

    def __init__(
        self,
        leave: Callable[[str, Closed | None, bool], None],
        rid: str,
        closed: Closed | None = None,
        lost: Callable[[str], None] = lambda rid: None,
    ) -> None:
        """``leave`` hears of the end: of which flight, when the client's connection ends where that
        can be told, and whether it was ``delivered``; ``lost`` of a client that has surely left,
        whether or not its place was given up before."""
        self._leave = leave
        self._lost = lost
        self._rid = rid
        self._closed = closed
        self._left = False

    def leave(self, *, delivered: bool) -> None:
        """It has the whole answer (``delivered``), or does not wait for it any more."""
        if not self._left:
            self._left = True
            self._leave(self._rid, self._closed, delivered)

    def tell(self, delivered: bool) -> None:
        self.leave(delivered=delivered)

    def lose(self) -> None:
        """Its client has surely left."""
        self._lost(self._rid)

    def abandon(self) -> None:
        """It does not wait for it any more."""
        self.leave(delivered=False)


class Watch:
    """One client's look at a flight: what it shows, or the error that it ends in."""

    __slots__ = ("_error", "_flight", "_given_up", "_shown", "_waiter")

    def __init__(self, flight: Flight) -> None:
        self._flight: Flight | None = flight
        self._shown: Shown | None = None
        self._error: BaseException | None = None
        self._given_up = False
        self._waiter: asyncio.Future[None] | None = None

    def show(self, shown: Shown) -> None:
        if not self._given_up and self._shown is None and self._error is None:
            shown.share()
            self._shown = shown
            self._wake()

    def refuse(self, error: BaseException) -> None:
        if self._shown is None and self._error is None:
            self._error = error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def shown(self, client: Client, patience_seconds: float | None = None) -> Shown:
        """What there is to be read, with a share of it. Waits as long as the client does.

        Raises the flight's error, ``ClientGone``, and ``TimeoutError`` when the patience is over;
        then, and where it is cancelled, this watch has ended.
        """
        if self._shown is None and self._error is None:
            # One future for all of it: a task that waits for the client's end costs as much as ten
            # of these.
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = None
            if patience_seconds is not None:
                timer = loop.call_later(patience_seconds, self._wake)
            client.gone.then(self._wake)
            try:
                await self._waiter
            except asyncio.CancelledError:
                self.give_up()
                raise
            finally:
                client.gone.forget(self._wake)
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        if self._error is not None:
            raise self._error
        if self._shown is not None:
            return self._shown
        stage = "upstream" if self._flight is None else self._flight.stage
        self.give_up()
        if client.gone.is_set():
            raise ClientGone(stage)
        raise TimeoutError

    def give_up(self) -> None:
        """Nobody looks any more."""
        self._given_up = True
        if self._shown is not None:
            self._shown.close()

    def let_go(self) -> None:
        """The flight has told all that it will. While each knew the other, a call that was over
        was garbage that only the collector finds: 100 objects."""
        self._flight = None


class StreamEnd:
    """``instead`` is what a stream that has begun says in the end, where it could not be said as it
    came. Both the flight and the stream that it shows know this, and the stream not the flight:
    each call would else be garbage that only the collector finds (75 objects)."""

    __slots__ = ("instead",)

    def __init__(self) -> None:
        self.instead: Callable[[], AsyncIterator[bytes]] | None = None


class Flight:
    """One running call: what it shows when there is something, its receipt when all is over."""

    __slots__ = (
        "_error", "_shown", "_task", "_watches", "admitted", "awaited", "begun", "client",
        "closed", "deserted", "end", "ends_at", "error_event", "joinable", "keeping", "notice",
        "over", "own", "partials", "rid", "say", "seat", "stage", "tells", "trace",
    )  # fmt: skip

    def __init__(self, notice: FlightNotice, client: Client) -> None:
        self.notice = notice
        self.rid = notice.rid
        self.client = client
        self.partials = 0
        """Partial pictures that were seen so far."""
        self.say: Callable[[], Headers] = tuple
        """Says the headers that are known so far, for an error that ends it."""
        self.stage = "upstream"
        """Where it is, for a client that leaves."""
        self.deserted = Moment()
        """Nobody waits for it any more: it ends, unless it has been sent."""
        self.begun = False
        """It is, or was, sent."""
        self.joinable = False
        """What it ends with is there for a retry: it may have been bought."""
        self.awaited = True
        """Whether it needs somebody who waits: one who asks later for its result does not."""
        self.tells = False
        """Somebody wants to be told of its end."""
        self.admitted = Moment()
        """Set when its money is held and it is about to be sent, and when it is over."""
        self.over = Moment()
        """Set when no more of its answer will come."""
        self.ends_at: int | None = None
        """Where the end of its stream begins. Other processes have that from the results alone:
        what is passed on and the end are never the same events twice."""
        self.keeping: asyncio.Task[None] | None = None
        """Puts its answer away, once there is one."""
        self.end: StreamEnd | None = None
        """That of its stream, once it has one."""
        self.error_event: Callable[[GatewayError], bytes] = error_event
        """How its stream says an error, once it has begun."""
        self.seat: Seat | None = None
        """That of the client it was launched for, once others may join it."""
        self.trace: TraceContext | None = None
        """The span of the request that it was launched for, where requests are traced."""
        self._watches: list[Watch] = []
        self._shown: Shown | None = None
        self._error: BaseException | None = None
        self.closed = False
        """What it showed has been put away: it is to be looked for among the results."""
        self._task: asyncio.Task[Receipt] | None = None
        self.own = self.watch()

    @property
    def stream(self) -> bool:
        return self.notice.stream

    @property
    def said(self) -> Headers:
        """The headers that are known so far."""
        return self.say()

    @said.setter
    def said(self, headers: Headers) -> None:
        self.say = lambda: headers

    def start(self, run: Coroutine[Any, Any, Receipt]) -> asyncio.Task[Receipt]:
        """``run`` never raises for what can go wrong with a call: it answers and returns."""
        self._task = asyncio.get_running_loop().create_task(run, name=self.rid)
        return self._task

    def ended(self, task: asyncio.Task[Receipt]) -> None:
        """Its task is done: whoever still waits for something waits no longer."""
        error = None if task.cancelled() else task.exception()
        if self._shown is None and self._error is None:
            self.refuse(error or asyncio.CancelledError())
        self.admitted.set()
        self.over.set()

    def watch(self) -> Watch:
        """One more who looks; right until the flight is closed."""
        if self.closed:
            raise RuntimeError("a flight that is closed shows nothing")
        watch = Watch(self)
        if self._shown is not None:
            watch.show(self._shown)
        elif self._error is not None:
            watch.refuse(self._error)
        else:
            self._watches.append(watch)
        return watch

    def leave(self, delivered: bool) -> None:
        """The client that it was launched for has the whole answer (``delivered``), or does not
        wait for it any more."""
        if self.seat is not None:
            self.seat.leave(delivered=delivered)

    def show(self, shown: Shown) -> None:
        """Lets everybody who watches have the answer. What keeps its bytes until the flight is
        closed is the caller's business."""
        if self._shown is None and self._error is None:
            self._shown = shown
            for watch in self._watches:
                watch.show(shown)
                watch.let_go()
            self._watches.clear()

    def refuse(self, error: BaseException) -> None:
        """Lets everybody who watches have an error in place of an answer."""
        if not self.answered:
            self._error = error
            for watch in self._watches:
                watch.refuse(error)
                watch.let_go()
            self._watches.clear()

    @property
    def error(self) -> BaseException | None:
        """What it has ended in, in place of an answer."""
        return self._error

    @property
    def answered(self) -> bool:
        return self._shown is not None or self._error is not None

    async def receipt(self) -> Receipt:
        """Waits for the end, without being able to bring it about."""
        if self._task is None:
            raise RuntimeError("a flight has a receipt after it has started")
        if self._task.done():
            return self._task.result()
        return await asyncio.shield(self._task)


class UntilDraining:
    """A block that ends with ``TimeoutError`` when the process begins to end: an
    ``asyncio.timeout`` whose time is unknown, for a third of what that costs. ``under_way`` are
    the blocks that are to be broken off; ``now``: the process ends already."""

    __slots__ = ("_broken", "_cancelling", "_now", "_task", "_under_way")

    def __init__(self, under_way: set[UntilDraining], *, now: bool) -> None:
        self._under_way = under_way
        self._now = now
        self._task: asyncio.Task[Any] | None = None
        self._cancelling = 0
        self._broken = False

    def break_off(self) -> None:
        if self._task is not None:
            self._broken = True
            self._task.cancel()

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("only a task can be broken off")
        self._task, self._cancelling = task, task.cancelling()
        if self._now:
            # What needs no waiting is done all the same.
            asyncio.get_running_loop().call_soon(self.break_off)
        else:
            self._under_way.add(self)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._under_way.discard(self)
        task, self._task = self._task, None
        if self._broken and task is not None:
            # Who is cancelled by somebody else, too, stays cancelled.
            alone = task.uncancel() <= self._cancelling
            if alone and kind is asyncio.CancelledError:
                raise TimeoutError from error


class Flights:
    """Every flight of this process: the strong references, and the count for the drain."""

    def __init__(self) -> None:
        self._running: dict[asyncio.Task[Receipt], Flight] = {}
        self._when_ended = self._ended  # once, and not bound for each flight
        self._errands: set[asyncio.Task[None]] = set()
        self._open: dict[str, Flight] = {}
        self._durable: set[asyncio.Task[None]] = set()
        self.draining = False
        """Whether the process ends: what flies goes on, nothing new is launched."""
        self._until_draining: set[UntilDraining] = set()

    @property
    def count(self) -> int:
        return len(self._running)

    def begin_draining(self) -> None:
        """From now on the process ends."""
        self.draining = True
        for one in self._until_draining:
            one.break_off()
        self._until_draining.clear()

    def until_draining(self) -> UntilDraining:
        """Breaks the block off with ``TimeoutError`` where the process ends meanwhile."""
        return UntilDraining(self._until_draining, now=self.draining)

    def find(self, rid: str) -> Flight | None:
        """A flight that can still be watched here."""
        return self._open.get(rid)

    def launch(
        self,
        notice: FlightNotice,
        client: Client,
        run: Callable[[Flight], Coroutine[Any, Any, Receipt]],
    ) -> Flight:
        """Starts ``run`` in a task that belongs to this process, not to the client. The flight is
        to be closed by ``close``."""
        flight = Flight(notice, client)
        self._open[flight.rid] = flight
        task = flight.start(run(flight))
        self._running[task] = flight
        task.add_done_callback(self._when_ended)
        return flight

    def _ended(self, task: asyncio.Task[Receipt]) -> None:
        self._running.pop(task).ended(task)

    def close(self, flight: Flight) -> None:
        """It is over, and what it showed has been put away."""
        flight.closed = True
        self._open.pop(flight.rid, None)

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
