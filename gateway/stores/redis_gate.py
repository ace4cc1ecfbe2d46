"""A gate that all replicas share, in Redis 7+ or Valkey.

It never raises for a Redis that is away: it answers from this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TypeVar

from gateway.domain.quota import Demand, Grant, Limit, Refusal, Unit
from gateway.ports import Clock
from gateway.stores.memory import MemoryGate, checked, gated, standing
from gateway.stores.redis_link import GATE_SECONDS, Client, Link, Script, StoreAway, StoreRefused

T = TypeVar("T")

REMEMBER_MS = 60_000
"""How long a call's marker lives: longer than any retry of a lost reply."""

_TAKE = Script.load("gate.lua")
_UNDO = Script.load("gate_undo.lua")
_RELEASE = Script.load("gate_release.lua")
_BEAT = Script.load("gate_beat.lua")


class RedisGate:
    """The gate that all replicas share, with a local one that stands in while Redis is away.

    Time is Redis's own. A slot is leased for ``lease_seconds`` and renewed by one task every
    ``beat_seconds``, so those of a killed process come free by themselves. A call that was let in
    by the stand-in stays there; what it holds is not known to Redis.

    ``account`` is the hash tag of every key: one cluster slot, one script. ``offset`` (seconds
    added to Redis's clock) is for tests. Owns ``client`` and closes it.
    """

    def __init__(
        self,
        client: Client,
        clock: Clock,
        *,
        account: str = "default",
        lease_seconds: float = 15.0,
        beat_seconds: float = 5.0,
        deadline_seconds: float = GATE_SECONDS,
        pause_seconds: float = 1.0,
        on_error: Callable[[BaseException], None] | None = None,
        offset: Callable[[], float] | None = None,
    ) -> None:
        self._prefix = f"gw:{{{account}}}:"
        self._link = Link(
            client, probe=self._prefix + "probe", pause=pause_seconds, on_error=on_error
        )
        self._local = MemoryGate(clock)
        self._lease_us = round(lease_seconds * 1e6)
        self._beat_seconds = beat_seconds
        self._deadline = deadline_seconds
        self._offset = offset
        self._live: dict[str, tuple[str, ...]] = {}
        self._heart: asyncio.Task[None] | None = None
        self._refused = False

    @property
    def degraded(self) -> bool:
        """The local gate answers now, or would."""
        return self._link.failing or self._refused

    async def take(self, rid: str, limits: Sequence[Limit], demand: Demand) -> Grant | Refusal:
        """A caller that is cancelled meanwhile leaves at most one slot behind, for one lease."""
        checked(demand)
        mine = gated(limits)
        if not mine:
            return Grant()
        if rid in self._local:
            return await self._stand_in(rid, mine, demand)
        keys = [self._marker(rid), *(self._key(limit) for limit in mine)]
        args = (rid, self._offset_us(), self._lease_us, REMEMBER_MS, *_described(mine, demand))
        try:
            reply = await self._link.call(
                partial(_TAKE.run, self._link.client, keys, *args), self._deadline
            )
        except StoreAway as error:
            self._refused = isinstance(error, StoreRefused)
            return await self._stand_in(rid, mine, demand)
        self._refused = False
        if reply[0] == 0:
            return Refusal(mine[reply[1] - 1], None if reply[2] < 0 else reply[2] / 1e6)
        slots = self._slots(mine)
        if slots and demand.slots:
            self._live[rid] = slots
            if self._heart is None:
                self._heart = asyncio.create_task(self._beats())
        levels = zip(mine, reply[1:], strict=True)
        return Grant(tuple(standing(limit, level) for limit, level in levels))

    async def release(self, rid: str, limits: Sequence[Limit]) -> None:
        self._live.pop(rid, None)
        if rid in self._local:
            await self._local.release(rid, limits)
            return
        slots = self._slots(gated(limits))
        if slots:
            await self._quietly(
                partial(_RELEASE.run, self._link.client, slots, *[rid] * len(slots))
            )

    async def undo(self, rid: str, limits: Sequence[Limit], demand: Demand) -> None:
        self._live.pop(rid, None)
        if rid in self._local:
            await self._local.undo(rid, limits, demand)
            return
        mine = gated(limits)
        if mine:
            keys = [self._marker(rid), *(self._key(limit) for limit in mine)]
            args = (rid, self._offset_us(), *_described(mine, demand))
            await self._quietly(partial(_UNDO.run, self._link.client, keys, *args))

    async def ping(self) -> None:
        """Raises ``StoreAway``."""
        await self._link.ping()

    async def aclose(self) -> None:
        """What is still held here comes free when its lease ends."""
        if self._heart is not None:
            self._heart.cancel()
            await asyncio.gather(self._heart, return_exceptions=True)
        self._live.clear()
        await self._link.aclose()

    async def _stand_in(self, rid: str, limits: Sequence[Limit], demand: Demand) -> Grant | Refusal:
        answer = await self._local.take(rid, limits, demand)
        return answer if isinstance(answer, Refusal) else Grant(answer.standings, degraded=True)

    async def _quietly(self, command: Callable[[], Awaitable[object]]) -> None:
        """Giving back is not worth an error: leases end, and rates refill, by themselves."""
        try:
            await self._link.call(command, self._deadline)
        except StoreAway:
            return

    async def _beats(self) -> None:
        while True:
            await asyncio.sleep(self._beat_seconds)
            pairs = [(key, rid) for rid, keys in self._live.items() for key in keys]
            for batch in _batches(pairs, 500):
                await self._beat(batch)

    async def _beat(self, pairs: Sequence[tuple[str, str]]) -> None:
        # While Redis is down this returns at once: the lease outlasts two missed beats.
        keys, rids = [key for key, _ in pairs], [rid for _, rid in pairs]
        args = (self._offset_us(), self._lease_us, *rids)
        await self._quietly(partial(_BEAT.run, self._link.client, keys, *args))
        # Released while the beat was under way: Redis may have seen the beat last.
        late = [(key, rid) for key, rid in pairs if rid not in self._live]
        if late:
            args = tuple(rid for _, rid in late)
            await self._quietly(
                partial(_RELEASE.run, self._link.client, [key for key, _ in late], *args)
            )

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
