"""Stores of one process: a gate and a cache that need nothing from outside.

Neither awaits anything, so each call is atomic in the event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from gateway.domain.quota import Demand, Grant, Limit, Refusal, Scope, Standing, Unit, Window
from gateway.ports import Cached, CachedMeta, Clock, Parts
from gateway.stores.kept import Kept

MINUTE_US = 60_000_000
SLOT_WAIT_SECONDS = 1.0
"""What a full set of slots answers: nobody knows when a running call will end."""
REMEMBER_US = 60_000_000
"""How long a call's id is known, so that taking it again takes nothing."""
SEND_BYTES = 4 * 1024 * 1024
"""How much of a kept answer is handed over at once: a picture whole, a large one in some pieces."""

SHARE_WAIT_SECONDS = 5.0
"""What is asked for more pictures at once than this process may let in by itself is told."""

_Account = tuple[Scope, str, Unit]


def gated(limits: Sequence[Limit]) -> tuple[Limit, ...]:
    """The limits that a gate answers for: with an amount, on slots or on a rate a minute."""
    return tuple(
        limit
        for limit in limits
        if limit.amount is not None
        and (
            limit.unit is Unit.SLOTS
            or (limit.unit in (Unit.REQUESTS, Unit.IMAGES) and limit.window is Window.MINUTE)
        )
    )


def interval_us(amount: int) -> int:
    """Microseconds between two units at ``amount`` (> 0) a minute, rounded up to stay exact."""
    return -(-MINUTE_US // amount)


def checked(demand: Demand) -> Demand:
    """Raises ``ValueError`` for more than one slot: a call runs once."""
    if demand.slots not in (0, 1) or demand.requests < 0 or demand.images < 0:
        raise ValueError(f"a gate cannot hold {demand}")
    return demand


def share(amount: int, processes: int) -> int:
    """What one of so many processes may let in by itself: all of them never more than ``amount``,
    except that each lets in one where there are more processes than that."""
    return max(1, amount // processes) if amount else 0


def standing(limit: Limit, level: int, amount: int) -> Standing:
    """``level`` is the slots in use, or the microseconds by which a rate's TAT is ahead of now;
    ``amount`` what this gate lets in of the limit."""
    if amount != limit.amount:
        limit = replace(limit, amount=amount)
    if limit.unit is Unit.SLOTS:
        return Standing(limit, max(0, amount - level), SLOT_WAIT_SECONDS if level else 0.0)
    if amount == 0:
        return Standing(limit, 0, 0.0)
    each = interval_us(amount)
    return Standing(limit, max(0, amount * each - level) // each, level / 1e6)


@dataclass(slots=True)
class _Taken:
    """What one call holds: rates as (account, microseconds of its TAT), and slots."""

    until_us: int
    rates: list[tuple[_Account, int]] = field(default_factory=list)
    slots: list[_Account] = field(default_factory=list)


class MemoryGate:
    """The gate of one process. Slots need no lease here: they end with the process.

    It lets in its ``share`` of each limit where ``processes`` of them count apart. A demand over
    the share, but not over the limit, has to wait until one gate counts for all again.
    Memory is bounded by the calls of the last minute and by the owners seen in it.
    """

    def __init__(self, clock: Clock, *, processes: int = 1) -> None:
        self._clock = clock
        self._processes = processes
        self._tats: dict[_Account, int] = {}
        self._holders: dict[_Account, set[str]] = {}
        self._taken: OrderedDict[str, _Taken] = OrderedDict()
        self._next_prune_us = 0

    def __contains__(self, rid: object) -> bool:
        """Has this call taken something here (within the last minute, or slots still held)?"""
        return rid in self._taken

    def __len__(self) -> int:
        """How many things are remembered: accounts and calls."""
        return len(self._tats) + len(self._holders) + len(self._taken)

    async def take(self, rid: str, limits: Sequence[Limit], demand: Demand) -> Grant | Refusal:
        checked(demand)
        now = self._now_us()
        self._prune(now)
        mine = gated(limits)
        if rid in self._taken:
            return Grant(tuple(self._standing(limit, now) for limit in mine))
        waits = [(self._wait_us(limit, demand.of(limit.unit), now), limit) for limit in mine]
        worst = max((wait for wait, _ in waits), default=0.0)
        if worst > 0:
            limit = next(limit for wait, limit in waits if wait == worst)
            part = share(limit.amount or 0, self._processes)
            return Refusal(
                limit,
                None if worst == float("inf") else worst / 1e6,
                part if part < (limit.amount or 0) else None,
            )
        self._apply(rid, mine, demand, now)
        return Grant(tuple(self._standing(limit, now) for limit in mine))

    async def release(self, rid: str, limits: Sequence[Limit]) -> None:
        taken = self._taken.get(rid)
        if taken is not None:
            self._free(rid, taken)

    async def undo(self, rid: str, limits: Sequence[Limit], demand: Demand) -> None:
        taken = self._taken.pop(rid, None)
        if taken is None:
            return
        self._free(rid, taken)
        now = self._now_us()
        for account, cost in taken.rates:
            tat = self._tats.get(account, now) - cost
            if tat > now:
                self._tats[account] = tat
            else:
                self._tats.pop(account, None)

    async def ping(self) -> None:
        return

    async def aclose(self) -> None:
        return

    def _now_us(self) -> int:
        return round(self._clock.monotonic() * 1e6)

    def _amount(self, limit: Limit) -> int:
        return share(limit.amount or 0, self._processes)

    def _tat(self, limit: Limit, now: int) -> int:
        return max(self._tats.get(_account(limit), now), now)

    def _wait_us(self, limit: Limit, demand: int, now: int) -> float:
        amount = self._amount(limit)
        if demand == 0:
            return 0.0
        if demand > (limit.amount or 0):
            return float("inf")
        if demand > amount:
            return SHARE_WAIT_SECONDS * 1e6
        if limit.unit is Unit.SLOTS:
            held = len(self._holders.get(_account(limit), ()))
            return SLOT_WAIT_SECONDS * 1e6 if held + demand > amount else 0.0
        each = interval_us(amount)
        return float(max(0, self._tat(limit, now) + demand * each - now - amount * each))

    def _apply(self, rid: str, limits: Sequence[Limit], demand: Demand, now: int) -> None:
        taken = _Taken(now + REMEMBER_US)
        for limit in limits:
            wanted = demand.of(limit.unit)
            if wanted == 0:
                continue
            account = _account(limit)
            if limit.unit is Unit.SLOTS:
                self._holders.setdefault(account, set()).add(rid)
                taken.slots.append(account)
            else:
                cost = wanted * interval_us(self._amount(limit))
                self._tats[account] = self._tat(limit, now) + cost
                taken.rates.append((account, cost))
        self._taken[rid] = taken

    def _standing(self, limit: Limit, now: int) -> Standing:
        if limit.unit is Unit.SLOTS:
            held = len(self._holders.get(_account(limit), ()))
            return standing(limit, held, self._amount(limit))
        return standing(limit, self._tat(limit, now) - now, self._amount(limit))

    def _free(self, rid: str, taken: _Taken) -> None:
        for account in taken.slots:
            holders = self._holders.get(account)
            if holders is not None:
                holders.discard(rid)
                if not holders:
                    del self._holders[account]
        taken.slots.clear()

    def _prune(self, now: int) -> None:
        """Forgets what no longer says anything: old calls that hold no slot, whole accounts."""
        while self._taken:
            rid, taken = next(iter(self._taken.items()))
            if taken.until_us > now:
                break
            del self._taken[rid]
            if taken.slots:
                # Still running: looked at again in a minute, behind the younger ones.
                taken.until_us = now + REMEMBER_US
                self._taken[rid] = taken
        if now >= self._next_prune_us:
            self._next_prune_us = now + MINUTE_US
            for account in [account for account, tat in self._tats.items() if tat <= now]:
                del self._tats[account]


def _account(limit: Limit) -> _Account:
    return (limit.scope, limit.owner, limit.unit)


@dataclass(slots=True)
class _Entry:
    meta: CachedMeta
    chunks: tuple[bytes, ...]
    size: int
    expires: float
    asked: bool = False

    def join(self) -> None:
        if len(self.chunks) > self.size // SEND_BYTES + 1:
            self.chunks = _joined(self.chunks)

    def iterate(self) -> Parts:
        return Parts(self.chunks)


class MemoryCache:
    """Answers in memory, least recently used out first. Chunks are kept as they came.

    ``max_bytes`` bounds the sum of all contents, those still arriving too, ``max_entry_bytes`` one
    of them: what finds no room is quietly not kept.
    """

    def __init__(self, clock: Clock, *, max_bytes: int, max_entry_bytes: int) -> None:
        self._clock = clock
        self._max_bytes = max_bytes
        self._max_entry_bytes = min(max_entry_bytes, max_bytes)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = 0
        self._taking = 0

    @property
    def bytes_held(self) -> int:
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)

    async def get(self, key: str) -> Cached | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        left = entry.expires - self._clock.monotonic()
        if left <= 0:
            self._drop(key)
            return None
        if entry.asked:
            # What is asked for twice is asked for again: joined, it is sent by one call, not 45.
            entry.join()
        entry.asked = True
        self._entries.move_to_end(key)
        return Kept(entry.meta, entry.iterate, left)

    async def put(
        self, key: str, meta: CachedMeta, chunks: AsyncIterator[bytes], ttl_seconds: float
    ) -> bool:
        if ttl_seconds <= 0 or meta.size_bytes > self._max_entry_bytes:
            return False
        if isinstance(chunks, Parts):
            return self._keep(key, meta, tuple(chunks.parts), ttl_seconds)
        if self._taking + meta.size_bytes > self._max_bytes:
            return False
        # Counted before it is taken, so that answers still arriving are within the bound too.
        self._taking += meta.size_bytes
        try:
            self._make_room()
            taken = await _whole(chunks, meta.size_bytes)
        finally:
            self._taking -= meta.size_bytes
        return taken is not None and self._keep(key, meta, taken, ttl_seconds)

    def _keep(
        self, key: str, meta: CachedMeta, chunks: tuple[bytes, ...], ttl_seconds: float
    ) -> bool:
        """Holds the very chunks that are given."""
        if sum(map(len, chunks)) != meta.size_bytes:
            return False
        self._drop(key)
        expires = self._clock.monotonic() + ttl_seconds
        self._entries[key] = _Entry(meta, chunks, meta.size_bytes, expires)
        self._bytes += meta.size_bytes
        self._make_room()
        return key in self._entries

    async def holds(self, key: str) -> bool:
        return await self.get(key) is not None

    async def delete(self, key: str) -> None:
        self._drop(key)

    async def ping(self) -> None:
        return

    async def aclose(self) -> None:
        self._entries.clear()
        self._bytes = 0

    def _make_room(self) -> None:
        while self._entries and self._bytes + self._taking > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry.size


def _joined(chunks: Sequence[bytes]) -> tuple[bytes, ...]:
    """The same bytes in pieces of about ``SEND_BYTES``, at least, but for the last one."""
    joined: list[bytes] = []
    waiting: list[bytes] = []
    waiting_bytes = 0
    for chunk in chunks:
        waiting.append(chunk)
        waiting_bytes += len(chunk)
        if waiting_bytes >= SEND_BYTES:
            joined.append(b"".join(waiting))
            waiting, waiting_bytes = [], 0
    return (*joined, b"".join(waiting)) if waiting else tuple(joined)


async def _whole(chunks: AsyncIterator[bytes], size: int) -> tuple[bytes, ...] | None:
    """The chunks, where they are ``size`` bytes in all."""
    taken: list[bytes] = []
    left = size
    async for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            return None
        taken.append(chunk)
    return tuple(taken) if left == 0 else None
