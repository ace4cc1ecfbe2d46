"""A gate that all replicas share, in Redis 7+ or Valkey.

While Redis is away it answers from this process, or lets nothing in, as the owner chose.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from gateway.domain.errors import GateUnavailable
from gateway.domain.quota import Demand, Grant, Limit, Refusal, Unit
from gateway.ports import Clock
from gateway.stores.memory import MemoryGate, checked, gated, standing
from gateway.stores.redis_link import (
    CLOSE_SECONDS,
    GATE_SECONDS,
    PROBE,
    Client,
    Errand,
    Link,
    Reason,
    Script,
    Server,
    StoreAway,
    StoreRefused,
    eviction_policy,
)

T = TypeVar("T")

REMEMBER_MS = 60_000
"""How long a call's marker lives: longer than any retry of a lost reply."""

RETRY_SECONDS = 5.0
"""What a call is told that is denied because Redis is away."""
RELEASED_TOGETHER = 100
"""Calls whose slots one script call gives back."""
MAX_OWED = 10_000
"""Calls that are still to be given back; leases end the rest."""

_Command = Callable[[], Awaitable[object]]

_TAKE = Script.load("gate.lua")
_UNDO = Script.load("gate_undo.lua")
_RELEASE = Script.load("gate_release.lua")
_BEAT = Script.load("gate_beat.lua")


class GateListener:
    """Hears of what happens to a gate; this one lets it pass."""

    def waited(self, seconds: float) -> None:
        """A take has been answered, by Redis or without it."""

    def failed(self, reason: Reason, error: BaseException) -> None:
        """A command got no answer, or was refused."""

    def back(self) -> None:
        """Redis counts again."""

    def restarted(self) -> None:
        """Redis has forgotten what it counted: limits begin anew."""

    def evicts(self, policy: str) -> None:
        """Redis may drop what it counts when it is full."""


class RedisGate:
    """The gate that all replicas share, and what holds while Redis is away.

    Time is Redis's own. A slot is leased for ``lease_seconds`` and renewed by one task every
    ``beat_seconds``, so those of a killed process come free by themselves, and those that Redis
    forgot come back. ``processes`` count apart while Redis is away: a stand-in lets in this one's
    share of each limit, or nothing is let in where ``deny`` is set. A call that the stand-in let
    in stays there; what it holds is not known to Redis. A call is counted in one place: where
    nobody knows whether Redis took it, it is given back there as soon as Redis answers.

    ``account`` is the hash tag of every key: one cluster slot, one script. ``server`` is shared
    with whoever else uses the same Redis. ``offset`` (seconds added to Redis's clock) is for
    tests. ``errand`` starts what nobody waits for, but the end of the process. Owns ``client`` and
    closes it.
    """

    def __init__(
        self,
        client: Client,
        clock: Clock,
        *,
        server: Server | None = None,
        processes: int = 1,
        deny: bool = False,
        account: str = "default",
        lease_seconds: float = 15.0,
        beat_seconds: float = 5.0,
        deadline_seconds: float = GATE_SECONDS,
        listener: GateListener | None = None,
        errand: Errand = asyncio.create_task,
        offset: Callable[[], float] | None = None,
    ) -> None:
        self._prefix = f"gw:{{{account}}}:"
        self._probe_key = self._prefix + "probe"
        self._server = server or Server()
        self._listener = listener or GateListener()
        self._link = Link(client, self._server, on_error=self._listener.failed, small=True)
        self._server.listen(self._back)
        self._clock = clock
        self._local = MemoryGate(clock, processes=processes)
        self._deny = deny
        self._lease_us = round(lease_seconds * 1e6)
        self._beat_seconds = beat_seconds
        self._deadline = deadline_seconds
        self._offset = offset
        self._live: dict[str, tuple[str, ...]] = {}
        self._owed: dict[str, _Command] = {}
        self._errand = errand
        self._posted: dict[str, tuple[str, ...]] = {}
        """Slots that are about to be given back, by nobody who waits."""
        self._releasers: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._heart: asyncio.Task[None] | None = None
        self._errands: set[asyncio.Task[None]] = set()
        self._refused: Reason | None = None
        self._since: int | None = None
        self._met = False

    @property
    def degraded(self) -> bool:
        """The local gate answers now, or would."""
        return self.trouble is not None

    @property
    def trouble(self) -> Reason | None:
        """Why Redis does not count now."""
        return self._refused or self._link.breaker(self._probe_key).reason

    def greet(self) -> None:
        """Looks for Redis before the first call does, without waiting for it."""
        self._soon(self._greet())

    async def take(self, rid: str, limits: Sequence[Limit], demand: Demand) -> Grant | Refusal:
        """A caller that is cancelled meanwhile leaves at most one slot behind, for one lease."""
        checked(demand)
        mine = gated(limits)
        if not mine:
            return Grant()
        if rid in self._local:
            return await self._stand_in(rid, mine, demand)
        began = self._clock.monotonic()
        try:
            return await self._take(rid, mine, demand)
        finally:
            self._listener.waited(self._clock.monotonic() - began)

    async def release(self, rid: str, limits: Sequence[Limit]) -> None:
        self._live.pop(rid, None)
        if rid in self._local:
            await self._local.release(rid, limits)
            return
        slots = self._slots(gated(limits))
        if slots:
            await self._give_back(rid, self._released(slots, [rid] * len(slots)))

    def release_at_once(self, rid: str) -> bool:
        if rid in self._local:
            return self._local.release_at_once(rid)
        slots = self._live.pop(rid, None)
        if slots is None:
            return False
        self._posted[rid] = slots
        if len(self._posted) == 1:
            task = self._errand(self._release_posted())
            self._releasers.add(task)
            task.add_done_callback(self._releasers.discard)
        return True

    async def undo(self, rid: str, limits: Sequence[Limit], demand: Demand) -> None:
        self._live.pop(rid, None)
        if rid in self._local:
            await self._local.undo(rid, limits, demand)
            return
        mine = gated(limits)
        if mine:
            await self._give_back(rid, self._undone(rid, mine, demand))

    async def ping(self) -> None:
        """Raises ``StoreAway``. Where it answers and would count nothing, ``trouble`` says so."""
        try:
            await self._link.ping(self._probe_key)
        except StoreRefused as error:
            self._refuse(error.reason)
            raise
        try:
            await self._probe()
        except StoreRefused as error:
            self._refuse(error.reason)
        self._meet()

    async def aclose(self) -> None:
        """What is still held here comes free when its lease ends."""
        if self._releasers:
            # Nobody else has waited for them.
            await asyncio.wait(self._releasers, timeout=CLOSE_SECONDS)
        own = (self._heart, *self._releasers)
        tasks = [*self._errands, *(task for task in own if task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._live.clear()
        self._owed.clear()
        await self._link.aclose()

    async def _take(self, rid: str, mine: Sequence[Limit], demand: Demand) -> Grant | Refusal:
        keys = [self._marker(rid), self._prefix + "since", *(self._key(limit) for limit in mine)]
        args = (rid, self._offset_us(), self._lease_us, REMEMBER_MS, *_described(mine, demand))
        try:
            reply = await self._run(_TAKE, keys, args)
        except StoreAway as error:
            if isinstance(error, StoreRefused):
                self._refuse(error.reason)
            if error.asked:
                self._owe(rid, self._undone(rid, mine, demand))
            return await self._stand_in(rid, mine, demand)
        self._served()
        self._look_at(reply[1])
        if reply[0] == 0:
            return Refusal(mine[reply[2] - 1], None if reply[3] < 0 else reply[3] / 1e6)
        slots = self._slots(mine)
        if slots and demand.slots:
            self._live[rid] = slots
            self._keep_beating()
        levels = zip(mine, reply[2:], strict=True)
        return Grant(tuple(standing(limit, level, limit.amount or 0) for limit, level in levels))

    async def _stand_in(self, rid: str, limits: Sequence[Limit], demand: Demand) -> Grant | Refusal:
        if self._deny:
            raise GateUnavailable(
                "The gateway cannot look at its limits just now, and lets nothing in without. "
                "Nothing was bought; try again in a few seconds.",
                retry_after_seconds=RETRY_SECONDS,
            )
        answer = await self._local.take(rid, limits, demand)
        return answer if isinstance(answer, Refusal) else Grant(answer.standings, degraded=True)

    async def _run(self, script: Script, keys: Sequence[str], args: Sequence[object]) -> Any:
        return await self._link.run(self._probe_key, self._deadline, script, keys, args)

    def _refuse(self, reason: Reason) -> None:
        """It answers, but counts nothing: that is looked at by each call, and by a task."""
        if self._refused is None:
            self._soon(self._ask_again())
        self._refused = reason

    def _served(self) -> None:
        self._meet()
        if self._refused is not None:
            self._refused = None
            self._back()

    async def _ask_again(self) -> None:
        while self._refused is not None:
            await asyncio.sleep(self._server.pause)
            try:
                await self._probe()
            except StoreAway:
                continue
            self._served()

    def _back(self) -> None:
        """Redis answers again: it hears at once of what ended, and of what still runs."""
        if self._owed or self._live:
            self._keep_beating()
        self._wake.set()
        if not self.degraded:
            self._listener.back()

    def _look_at(self, since: int) -> None:
        if self._since is not None and since != self._since:
            self._wake.set()
            self._listener.restarted()
        self._since = since

    async def _probe(self) -> None:
        await self._run(PROBE, [self._probe_key], (REMEMBER_MS,))

    def _meet(self) -> None:
        if not self._met:
            self._met = True
            self._soon(self._look_at_policy())

    async def _greet(self) -> None:
        with suppress(StoreAway):
            await self.ping()

    async def _look_at_policy(self) -> None:
        try:
            look = partial(eviction_policy, self._link.client)
            policy = await self._link.call(self._probe_key, look, self._deadline)
        except StoreAway:
            return
        if policy not in (None, "noeviction"):
            self._listener.evicts(policy)

    def _released(self, slots: Sequence[str], rids: Sequence[str]) -> _Command:
        return partial(self._run, _RELEASE, slots, rids)

    def _undone(self, rid: str, limits: Sequence[Limit], demand: Demand) -> _Command:
        keys = [self._marker(rid), *(self._key(limit) for limit in limits)]
        args = (rid, self._offset_us(), *_described(limits, demand))
        return partial(self._run, _UNDO, keys, args)

    async def _give_back(self, rid: str, command: _Command) -> None:
        """Not worth an error: it is done when Redis is back, or the lease ends by itself."""
        if not await self._done(command):
            self._owe(rid, command)

    async def _release_posted(self) -> None:
        """What ends at one moment is one script call. Who ends while it is under way has one of
        their own: a slot that comes free late is one that somebody is refused."""
        while self._posted:
            some = dict(islice(self._posted.items(), RELEASED_TOGETHER))
            for rid in some:
                del self._posted[rid]
            pairs = [(key, rid) for rid, keys in some.items() for key in keys]
            if not await self._done(self._released(*zip(*pairs, strict=True))):
                for rid, keys in some.items():
                    self._owe(rid, self._released(keys, [rid] * len(keys)))

    def _owe(self, rid: str, command: _Command) -> None:
        if len(self._owed) < MAX_OWED:
            self._owed[rid] = command
            self._keep_beating()

    async def _done(self, command: _Command) -> bool:
        try:
            await command()
        except StoreAway:
            return False
        return True

    def _soon(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    def _keep_beating(self) -> None:
        if self._heart is None:
            self._heart = asyncio.create_task(self._beats())

    async def _beats(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._beat_seconds):
                    await self._wake.wait()
            self._wake.clear()
            await self._pay()
            pairs = [(key, rid) for rid, keys in self._live.items() for key in keys]
            for batch in _batches(pairs, 500):
                await self._beat(batch)

    async def _pay(self) -> None:
        if self._owed:
            # A take that comes after its undo would stay.
            await self._link.settled()
        for rid in list(self._owed):
            command = self._owed.pop(rid)
            if not await self._done(command):
                self._owed.setdefault(rid, command)
                return

    async def _beat(self, pairs: Sequence[tuple[str, str]]) -> None:
        # While Redis is down this returns at once: the lease outlasts two missed beats.
        keys, rids = [key for key, _ in pairs], [rid for _, rid in pairs]
        args = (self._offset_us(), self._lease_us, *rids)
        if not await self._done(partial(self._run, _BEAT, keys, args)):
            # It may yet be carried out, behind any release.
            await self._link.settled()
        # Released while the beat was under way: Redis may have seen the beat last.
        late = [(key, rid) for key, rid in pairs if rid not in self._live]
        if late:
            slots, ended = [key for key, _ in late], [rid for _, rid in late]
            if not await self._done(self._released(slots, ended)):
                # What is owed already frees the slot too.
                for rid in {*ended} - self._owed.keys():
                    mine = [key for key, each in late if each == rid]
                    self._owe(rid, self._released(mine, [rid] * len(mine)))

    def _marker(self, rid: str) -> str:
        return f"{self._prefix}rid:{rid}"

    def _key(self, limit: Limit) -> str:
        if limit.unit is Unit.SLOTS:
            return f"{self._prefix}cc:{limit.scope}:{limit.owner}"
        rate = "rpm" if limit.unit is Unit.REQUESTS else "ipm"
        return f"{self._prefix}rl:{limit.scope}:{limit.owner}:{rate}"

    def _slots(self, limits: Sequence[Limit]) -> tuple[str, ...]:
        return tuple(self._key(limit) for limit in limits if limit.unit is Unit.SLOTS)

    def _offset_us(self) -> int:
        return round(self._offset() * 1e6) if self._offset is not None else 0


def _described(limits: Sequence[Limit], demand: Demand) -> Iterator[str | int]:
    for limit in limits:
        yield "s" if limit.unit is Unit.SLOTS else "r"
        yield limit.amount or 0
        yield demand.of(limit.unit)


def _batches(pairs: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    rest = iter(pairs)
    while batch := list(islice(rest, size)):
        yield batch
