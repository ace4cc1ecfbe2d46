"""Who may fly now: so many calls in this process, so many at each upstream, a short, fair queue.

A *lane* is a number of places and those who wait for one. Every call takes a place in the lane of
its upstream, then one in that of the process; where another attempt goes elsewhere, the first moves
along. Within a lane teams take turns (start-time fair
queueing): each team's head carries a tag, the least tag goes next, and the team's next head is
tagged ``1 / weight`` later. So a team with a hundred waiting cannot keep out one with a single
call, and weights of two and one share the places two to one. A team that was away begins at the
tag that is served now: nobody saves up turns.

The queue has an end, and its places are shared too: where it is full, the team that waits the most,
for its weight, gives one up for a team that waits less; of its own upstreams, the one that it waits
for the most.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from gateway.domain.errors import ClientGone, Overloaded
from gateway.domain.record import record
from gateway.ports import Clock
from gateway.relay.moment import Moment

MEASURED = 64
"""How many places that came free are remembered for the rate."""
MIN_WAIT_SECONDS = 1.0
MAX_WAIT_SECONDS = 60.0
"""SDKs ignore a longer `retry-after`."""


class _Waiter:
    """One wait for a place. It ends when it is ``given`` one, or when it is ``out``: it left, or
    gave its place in the queue up."""

    __slots__ = ("_woken", "given", "out")

    def __init__(self) -> None:
        self.given = False
        self.out = False
        self._woken: asyncio.Future[None] | None = None

    async def woken(self) -> None:
        """Until it ends, or is to look around."""
        self._woken = asyncio.get_running_loop().create_future()
        await self._woken

    def wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)


@dataclass(slots=True)
class _Team:
    """Those of a team that wait in a lane, the first first, and the tag of the first."""

    start: float = 0.0
    weight: int = 1
    waiting: OrderedDict[_Waiter, None] = field(default_factory=OrderedDict)
    queued: bool = False
    """Whether the heap has it, perhaps without anybody who still waits."""


class _Lane:
    """``limit`` places. Taking, leaving and handing on cost O(log teams)."""

    def __init__(self, limit: int, clock: Clock, served: Callable[[_Waiter], None]) -> None:
        """``served`` hears of each wait that ends with a place."""
        self.limit = limit
        self.taken = 0
        self.waiting = 0
        self._clock = clock
        self._served = served
        self._now = 0.0
        """The virtual time: the tag that was served last."""
        self._heap: list[tuple[float, int, str]] = []
        self._order = count()
        self._teams: dict[str, _Team] = {}
        self._full_since = clock.monotonic()
        self._freed: deque[float] = deque(maxlen=MEASURED)

    @property
    def has_room(self) -> bool:
        return self.taken < self.limit

    def take(self) -> bool:
        """A place, if one is free."""
        if self.taken >= self.limit:
            return False
        self.taken += 1
        if self.taken == self.limit:
            self._full_since = self._clock.monotonic()
            self._freed.clear()
        return True

    def join(self, name: str, weight: int) -> _Waiter:
        """A wait for a place."""
        team = self._teams.setdefault(name, _Team())
        team.weight = weight
        if not team.waiting:
            team.start = max(team.start, self._now)
        waiter = _Waiter()
        team.waiting[waiter] = None
        self.waiting += 1
        self._queue(name, team)
        return waiter

    def leave(self, name: str, waiter: _Waiter) -> None:
        """Ends a wait, which is then out. What it had been given goes to the next."""
        if waiter.out:
            return
        if waiter.given:
            self._release()
            return
        waiter.out = True
        waiter.wake()
        del self._teams[name].waiting[waiter]
        self.waiting -= 1
        self._rest()

    def limit_to(self, limit: int) -> None:
        """Another limit, from now on."""
        self.limit = limit
        if self.taken >= limit:
            self._full_since = self._clock.monotonic()
            self._freed.clear()
        self.hand_on()

    def give(self) -> None:
        """A place comes free. How fast they do matters from when all are taken."""
        if self.taken >= self.limit or self._teams:
            self._freed.append(self._clock.monotonic())
            self._release()
        else:
            self.taken -= 1

    def _release(self) -> None:
        self.taken -= 1
        self.hand_on()

    def hand_on(self) -> None:
        """Gives what is free to those who wait."""
        while self.has_room and self.waiting:
            self._serve()
        self._rest()

    def wait_seconds(self, ahead: int, otherwise: float) -> float:
        """When one behind ``ahead`` others has a place: as many must come free before, at the rate
        at which they did since the lane was full. ``otherwise`` where none has yet."""
        freed, now = self._freed, self._clock.monotonic()
        since = freed[0] if len(freed) == MEASURED else self._full_since
        counted = len(freed) - 1 if len(freed) == MEASURED else len(freed)
        seconds = otherwise
        if counted:
            seconds = (ahead + 1) * max(0.0, now - since) / counted
        return min(MAX_WAIT_SECONDS, max(MIN_WAIT_SECONDS, seconds))

    def _serve(self) -> None:
        start, _, name = heappop(self._heap)
        team = self._teams[name]
        team.queued = False
        if not team.waiting:
            # All of them have left: that costs the team no turn.
            return
        if team.start != start:
            # It was empty meanwhile and has begun anew, later.
            self._queue(name, team)
            return
        waiter, _ = team.waiting.popitem(last=False)
        self.waiting -= 1
        self.taken += 1
        self._now = start
        team.start = start + 1 / team.weight
        if team.waiting:
            self._queue(name, team)
        waiter.given = True
        waiter.wake()
        self._served(waiter)

    def _queue(self, name: str, team: _Team) -> None:
        if not team.queued:
            team.queued = True
            heappush(self._heap, (team.start, next(self._order), name))

    def _rest(self) -> None:
        """Without anybody who waits there is nothing to be fair about: tags begin anew."""
        if not self.waiting and self._teams:
            self._heap, self._teams, self._now = [], {}, 0.0


class Place:
    """A turn: a place in the process, and one at ``upstream``. Whoever has it calls ``leave``."""

    __slots__ = ("_flying", "_lanes", "_process", "upstream")

    def __init__(
        self, process: _Lane, lanes: Mapping[str, _Lane], flying: dict[str, int], upstream: str
    ) -> None:
        self._process = process
        self._lanes = lanes
        self._flying = flying
        self.upstream = upstream
        self._flying[upstream] += 1

    def move(self, upstream: str) -> bool:
        """Takes a place at another upstream for the one it has, without waiting; whether there
        was one. Nothing changes where there was none."""
        if upstream == self.upstream:
            return True
        if not self._lanes[upstream].take():
            return False
        self._flying[self.upstream] -= 1
        self._lanes[self.upstream].give()
        self.upstream = upstream
        self._flying[upstream] += 1
        return True

    def leave(self) -> None:
        """The turn is over."""
        self._process.give()
        self._flying[self.upstream] -= 1
        self._lanes[self.upstream].give()


@record
class _Call:
    """Who wants a place, and where."""

    team: str
    weight: int
    upstream: str

    @property
    def crowd(self) -> tuple[str, str]:
        """Those it waits among."""
        return self.team, self.upstream


class _Queue:
    """Who waits in this process, in whichever lane."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[_Waiter, tuple[_Call, _Lane]] = {}
        self._crowds: dict[tuple[str, str], OrderedDict[_Waiter, _Call]] = {}

    @property
    def length(self) -> int:
        return len(self._waiting)

    def has_room(self, newcomer: _Call) -> bool:
        """Whether one more may wait. Where there are too many, the newest of those who take up the
        most has to go for it, unless it would be one of them itself."""
        if self.length < self._limit:
            return True
        most = self._most(newcomer)
        if most == newcomer.crowd:
            return False
        waiter = next(reversed(self._crowds[most]))
        _, lane = self._waiting[waiter]
        self.leave(waiter)
        lane.leave(most[0], waiter)
        return True

    def _most(self, newcomer: _Call) -> tuple[str, str]:
        """The team that waits the most for its weight, and the upstream that it waits for the most.
        Where teams are equal, it is the one at the upstream that most wait for."""
        each = Counter({crowd: len(waiting) for crowd, waiting in self._crowds.items()})
        each[newcomer.crowd] += 1
        of_team, of_upstream = Counter[str](), Counter[str]()
        for (team, upstream), calls in each.items():
            of_team[team] += calls
            of_upstream[upstream] += calls
        newest = [next(reversed(waiting.values())) for waiting in self._crowds.values()]
        weights = {call.team: call.weight for call in (*newest, newcomer)}
        return max(
            each,
            key=lambda crowd: (
                of_team[crowd[0]] / weights[crowd[0]],
                each[crowd],
                of_upstream[crowd[1]],
                crowd == newcomer.crowd,
            ),
        )

    def join(self, call: _Call, waiter: _Waiter, lane: _Lane) -> None:
        self._waiting[waiter] = call, lane
        self._crowds.setdefault(call.crowd, OrderedDict())[waiter] = call

    def leave(self, waiter: _Waiter) -> None:
        """Its wait is over, however it ended. Nothing happens where it has left already."""
        if waiter not in self._waiting:
            return
        call, _ = self._waiting.pop(waiter)
        crowd = self._crowds[call.crowd]
        del crowd[waiter]
        if not crowd:
            del self._crowds[call.crowd]


class Turnstile:
    """The places of one process, and those at each of its upstreams."""

    def __init__(
        self,
        limit: int,
        *,
        per_upstream: Mapping[str, int],
        queue: int,
        patience_seconds: float,
        clock: Clock,
        waited: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """``queue`` is how many may wait in this process, teams having their shares of it, and
        ``patience_seconds`` how long each. ``waited`` hears of every call how long it did, those
        that gave up or left too."""
        self._clock = clock
        self._queue = _Queue(queue)
        self._patience_seconds = patience_seconds
        self._waited = waited
        self._process = self._lane(limit)
        self._lanes = {name: self._lane(most) for name, most in per_upstream.items()}
        self._flying = dict.fromkeys(per_upstream, 0)

    def _lane(self, limit: int) -> _Lane:
        return _Lane(limit, self._clock, self._queue.leave)

    @property
    def waiting(self) -> int:
        return self._queue.length

    def flying(self, upstream: str) -> int:
        """How many calls have a turn at an upstream."""
        return self._flying.get(upstream, 0)

    def replace(self, per_upstream: Mapping[str, int]) -> None:
        """Other limits, from now on. What flies beyond one stays; an upstream that is gone has the
        limit that it had until nobody knows it any more."""
        for name, most in per_upstream.items():
            if name in self._lanes:
                self._lanes[name].limit_to(most)
            else:
                self._lanes[name] = self._lane(most)
                self._flying[name] = 0

    def enter_at_once(self, upstreams: Sequence[str]) -> Place | None:
        """``enter``, where that has to wait for nobody; None, and nothing done, where it has."""
        process = self._process
        if process.taken >= process.limit:
            return None
        for upstream in upstreams:
            if self._lanes[upstream].take():
                process.take()
                self._waited(0.0)
                return Place(process, self._lanes, self._flying, upstream)
        return None

    async def enter(self, team: str, weight: int, upstreams: Sequence[str], gone: Moment) -> Place:
        """A place in the process and at the first of ``upstreams`` that has one. Where all of them
        are full it waits for one at the first.

        Raises ``Overloaded`` where it took too long or too many wait, also later, when this is one
        of the team that waits the most; ``ClientGone`` once ``gone`` is set. Nothing is then held.
        """
        place = self.enter_at_once(upstreams)
        if place is not None:
            return place
        upstream = next((one for one in upstreams if self._lanes[one].has_room), upstreams[0])
        await self._queue_up(self._lanes[upstream], _Call(team, weight, upstream), gone)
        return Place(self._process, self._lanes, self._flying, upstream)

    async def _queue_up(self, lane: _Lane, call: _Call, gone: Moment) -> None:
        began = self._clock.monotonic()
        until = asyncio.get_running_loop().time() + self._patience_seconds
        try:
            await self._enter(lane, call, gone, until)
            try:
                await self._enter(self._process, call, gone, until)
            except BaseException:
                lane.give()
                raise
        finally:
            self._waited(self._clock.monotonic() - began)

    async def _enter(self, lane: _Lane, call: _Call, gone: Moment, until: float) -> None:
        if lane.take():
            return
        if not self._queue.has_room(call):
            raise self._overloaded(lane, lane.waiting)
        waiter = lane.join(call.team, call.weight)
        self._queue.join(call, waiter, lane)
        patience = asyncio.get_running_loop().call_at(until, waiter.wake)
        gone.then(waiter.wake)
        keeps = False
        try:
            if not gone.is_set():
                await waiter.woken()
            if gone.is_set():
                raise ClientGone("queued")
            if waiter.out:
                # Its place in the queue was given to a team that waits less.
                raise self._overloaded(lane, lane.waiting)
            if not waiter.given:
                raise self._overloaded(lane, lane.waiting - 1)
            keeps = True
        finally:
            patience.cancel()
            gone.forget(waiter.wake)
            self._queue.leave(waiter)
            if not keeps:
                lane.leave(call.team, waiter)

    def _overloaded(self, lane: _Lane, ahead: int) -> Overloaded:
        where = "" if lane is self._process else " with this model's upstream"
        return Overloaded(
            f"The gateway has as many requests under way{where} as it takes, and others wait. "
            "Nothing was bought; try again.",
            should_retry=True,
            retry_after_seconds=lane.wait_seconds(ahead, self._patience_seconds),
        )
