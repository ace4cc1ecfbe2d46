"""Stores of one process: a gate and a cache that need nothing from outside.

Neither awaits anything, so each call is atomic in the event loop.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TypeAlias

from gateway.domain.quota import Demand, Grant, Limit, Refusal, Scope, Standing, Unit, Window
from gateway.ports import Cached, CachedMeta, CacheEntry, Clock, FileBody, OpenFile, Parts
from gateway.stores.kept import Kept

MINUTE_US = 60_000_000
SLOT_WAIT_SECONDS = 1.0
"""What a full set of slots answers: nobody knows when a running call will end."""
REMEMBER_US = 60_000_000
"""How long a call's id is known at least, so that taking it again takes nothing."""
PRUNE_US = 1_000_000
SEND_BYTES = 4 * 1024 * 1024
"""How much of a kept answer is handed over at once: a picture whole, a large one in some pieces."""
FILE_BYTES = 128 * 1024
MAX_FILE_BYTES = 16 * 1024 * 1024
"""Between these an answer that is asked for again is sent by the system from where it stands: of
2.7 MB that takes 200 us, and 450 where they are copied to the socket."""

SHARE_WAIT_SECONDS = 5.0
"""What is asked for more pictures at once than this process may let in by itself is told."""

MAX_KEPT = 1_000
"""Keys whose limits are remembered as they are counted."""

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


_WANTED: dict[Unit, Callable[[Demand], int]] = {
    Unit.REQUESTS: attrgetter("requests"),
    Unit.IMAGES: attrgetter("images"),
    Unit.SLOTS: attrgetter("slots"),
}


class _Kept:
    """One limit as this gate counts it: worked out once for all calls of its owner.

    Its level is how many slots are taken, or by how many microseconds the TAT of a rate is ahead
    of now; ``each`` is what one unit adds to it, and ``whole`` what fits."""

    __slots__ = ("account", "amount", "counted", "each", "is_slots", "limit", "wanted", "whole")

    def __init__(self, limit: Limit, processes: int) -> None:
        self.limit = limit
        self.is_slots = limit.unit is Unit.SLOTS
        self.wanted = _WANTED[limit.unit]
        self.account: _Account = (limit.scope, limit.owner, limit.unit)
        self.amount = share(limit.amount or 0, processes)
        self.counted = limit if self.amount == limit.amount else replace(limit, amount=self.amount)
        self.each = interval_us(self.amount) if self.amount and not self.is_slots else 1
        self.whole = self.amount * self.each

    def wait_us(self, level: int, wanted: int) -> float:
        """How long has to wait what does not fit."""
        if wanted > (self.limit.amount or 0):
            return float("inf")
        if wanted > self.amount:
            return SHARE_WAIT_SECONDS * 1e6
        if self.is_slots:
            return SLOT_WAIT_SECONDS * 1e6
        return float(level + wanted * self.each - self.whole)

    def standing(self, level: int) -> Standing:
        # As ``standing``, of what is worked out already: all three of a call in 2 us, not in 9.
        left = (self.whole - level) // self.each
        wait = (SLOT_WAIT_SECONDS if level else 0.0) if self.is_slots else level / 1e6
        return Standing(self.counted, left if left > 0 else 0, wait)


_After: TypeAlias = tuple[_Kept, int, int]
"""A limit, what is wanted of it, and its level with that."""


@dataclass(slots=True)
class _Taken:
    """What one call has taken of which limits, and whether it still has its slots."""

    until_us: int
    kept: tuple[_Kept, ...]
    demand: Demand
    holds: bool


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
        self._held: dict[_Account, int] = {}
        """How many slots are taken."""
        self._taken: OrderedDict[str, _Taken] = OrderedDict()
        self._kept: dict[int, tuple[Sequence[Limit], tuple[_Kept, ...]]] = {}
        """By the id of the limits: those of one key are one object for all its calls."""
        self._next_prune_us = 0
        self._next_accounts_us = 0

    def __contains__(self, rid: object) -> bool:
        """Has this call taken something here (within the last minute, or slots still held)?"""
        return rid in self._taken

    def __len__(self) -> int:
        """How many things are remembered: accounts and calls."""
        return len(self._tats) + len(self._held) + len(self._taken)

    async def take(self, rid: str, limits: Sequence[Limit], demand: Demand) -> Grant | Refusal:
        checked(demand)
        now = self._now_us()
        if now >= self._next_prune_us:
            self._prune(now)
        mine = self._kept_of(limits)
        is_new = rid not in self._taken
        after: list[_After] = []
        worst, tightest = 0.0, None
        held, tats = self._held, self._tats
        for one in mine:
            if one.is_slots:
                level = held.get(one.account, 0)
            else:
                level = max(0, tats.get(one.account, now) - now)
            wanted = one.wanted(demand) if is_new else 0
            new_level = level + wanted * one.each
            if wanted and new_level > one.whole:
                wait = one.wait_us(level, wanted)
                if wait > worst:
                    worst, tightest = wait, one
            after.append((one, wanted, new_level))
        if tightest is not None:
            return _refusal(tightest, worst)
        if is_new:
            holds = self._apply(after, now)
            self._taken[rid] = _Taken(now + REMEMBER_US, mine, demand, holds)
        return Grant(tuple([one.standing(level) for one, _, level in after]))

    async def release(self, rid: str, limits: Sequence[Limit]) -> None:
        self.release_at_once(rid)

    def release_at_once(self, rid: str) -> bool:
        taken = self._taken.get(rid)
        if taken is not None:
            self._free(taken)
        return True

    async def undo(self, rid: str, limits: Sequence[Limit], demand: Demand) -> None:
        taken = self._taken.pop(rid, None)
        if taken is None:
            return
        self._free(taken)
        now = self._now_us()
        for one in taken.kept:
            cost = one.wanted(taken.demand) * one.each
            if one.is_slots or cost == 0:
                continue
            tat = self._tats.get(one.account, now) - cost
            if tat > now:
                self._tats[one.account] = tat
            else:
                self._tats.pop(one.account, None)

    async def ping(self) -> None:
        return

    async def aclose(self) -> None:
        return

    def _now_us(self) -> int:
        return round(self._clock.monotonic() * 1e6)

    def _kept_of(self, limits: Sequence[Limit]) -> tuple[_Kept, ...]:
        """The limits that this gate answers for. They are remembered where they cannot change."""
        known = self._kept.get(id(limits))
        if known is not None and known[0] is limits:
            return known[1]
        kept = tuple([_Kept(limit, self._processes) for limit in gated(limits)])
        if isinstance(limits, tuple):
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[id(limits)] = limits, kept
        return kept

    def _apply(self, after: list[_After], now: int) -> bool:
        """Whether slots are among what is taken."""
        holds = False
        for one, wanted, level in after:
            if not wanted:
                continue
            if one.is_slots:
                self._held[one.account] = level
                holds = True
            else:
                self._tats[one.account] = now + level
        return holds

    def _free(self, taken: _Taken) -> None:
        if not taken.holds:
            return
        taken.holds = False
        for one in taken.kept:
            if one.is_slots:
                left = self._held[one.account] - taken.demand.slots
                if left:
                    self._held[one.account] = left
                else:
                    del self._held[one.account]

    def _prune(self, now: int) -> None:
        """Forgets what no longer says anything: old calls that hold no slot, whole accounts."""
        self._next_prune_us = now + PRUNE_US
        while self._taken:
            rid, taken = next(iter(self._taken.items()))
            if taken.until_us > now:
                break
            del self._taken[rid]
            if taken.holds:
                # Still running: looked at again in a minute, behind the younger ones.
                taken.until_us = now + REMEMBER_US
                self._taken[rid] = taken
        if now >= self._next_accounts_us:
            self._next_accounts_us = now + MINUTE_US
            for account in [account for account, tat in self._tats.items() if tat <= now]:
                del self._tats[account]


def _refusal(one: _Kept, wait_us: float) -> Refusal:
    whole = one.limit.amount or 0
    return Refusal(
        one.limit,
        None if wait_us == float("inf") else wait_us / 1e6,
        one.amount if one.amount < whole else None,
    )


@dataclass(slots=True)
class _Entry:
    """An answer: its chunks, or, once it is asked for again, perhaps a file in memory instead."""

    meta: CachedMeta
    chunks: tuple[bytes, ...]
    size: int
    expires: float
    asked: bool = False
    file: OpenFile | None = None

    def join(self, *, in_file: bool) -> None:
        if in_file and FILE_BYTES <= self.size <= MAX_FILE_BYTES:
            self.file = _file_of(self.chunks)
        if self.file is not None:
            self.chunks = ()
        elif len(self.chunks) > self.size // SEND_BYTES + 1:
            self.chunks = _joined(self.chunks)

    def iterate(self) -> Parts | FileBody:
        if self.file is not None:
            return FileBody(self.file, 0, self.size, waits=False)
        return Parts(self.chunks)


class MemoryCache:
    """Answers in memory, least recently used out first. Chunks are kept as they came.

    ``max_bytes`` bounds the sum of all contents, those still arriving too, ``max_entry_bytes`` one
    of them: what finds no room is quietly not kept. So many answers at once as ``max_files`` says
    may take a file descriptor each.
    """

    def __init__(
        self, clock: Clock, *, max_bytes: int, max_entry_bytes: int, max_files: int = 0
    ) -> None:
        self._clock = clock
        self._max_bytes = max_bytes
        self._max_entry_bytes = min(max_entry_bytes, max_bytes)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = 0
        self._taking = 0
        self._max_files = max_files
        self._files = 0

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
        if entry.asked and entry.file is None:
            # What is asked for twice is asked for again: it is sent by one call, not by 45.
            entry.join(in_file=self._files < self._max_files)
            self._files += entry.file is not None
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

    def put_at_once(self, entry: CacheEntry, body: Parts) -> bool:
        if entry.ttl_seconds > 0 and entry.meta.size_bytes <= self._max_entry_bytes:
            self._keep(entry.key, entry.meta, tuple(body.parts), entry.ttl_seconds)
        return True

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
        self._bytes = self._files = 0

    def _make_room(self) -> None:
        while self._entries and self._bytes + self._taking > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry.size
            self._files -= entry.file is not None


def _file_of(chunks: Sequence[bytes]) -> OpenFile | None:
    """The same bytes in a file that is nowhere but in memory, and is seen by nobody else; None
    where the system has none to give."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        file = OpenFile(os.memfd_create("kept", os.MFD_CLOEXEC))
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(file.fd, rest) :]
    except OSError:
        return None
    return file


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
