"""A cache that all replicas share, in Redis 7+ or Valkey.

It never raises for a Redis that is away: it misses.
"""

from __future__ import annotations

import asyncio
import secrets
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

from gateway.ports import Cached, CachedMeta, CacheEntry, Clock, Parts
from gateway.stores.cachemeta import decode, encode
from gateway.stores.kept import Kept
from gateway.stores.redis_batch import SMALL_BYTES
from gateway.stores.redis_link import GATE_SECONDS, Client, Link, Reason, Script, Server, StoreAway
from gateway.stores.redis_wire import IN_BLOCKS

DATA_SECONDS = 2.0
"""What all pieces of an answer that is read may take, unless it is told otherwise; each has the
deadline of a look-up."""
PIECE_BYTES = 256 * 1024
"""Small enough for its deadline on a slow line, with all that are under way at once."""
PIECES_AT_ONCE = 16
"""That are asked for in one command: each costs a round trip's 100 us and more."""
PREFIX = "gwc"
STAGING_MS = 60_000
MAX_HELD_BYTES = 1024 * 1024 * 1024
"""Of answers that slow clients are still reading, each a copy; beyond it, misses."""

_PIECE = Script.load("cache_piece.lua")
_KEEP = Script.load("cache_keep.lua")
_KEEP_BOTH = Script.load("cache_keep_both.lua")


class RedisCache:
    """Answers in one hash each: ``meta``, and pieces of up to 256 KiB named ``<generation>:<i>``.

    A put goes to a staging key and is renamed at the end, so that a part is never seen; one of a
    single piece is one command. Pieces carry their put's generation, so that a get that straddles
    two puts misses and never mixes them. A get fetches everything before it answers, because a
    failure in the middle would cut an answer whose headers have left: ``max_entry_bytes`` bounds
    that memory. What several ask for at once, or somebody is still being sent, is fetched once: who
    comes then only looks whether it is still what is kept (its generation).

    Each entry has a hash tag of its own: a cluster spreads them over its nodes, and one script
    moves a whole entry. ``server`` is shared with whoever else uses the same Redis. Owns
    ``client`` and closes it. ``prefix`` begins its keys: two caches in one Redis differ in it.
    ``data_seconds`` is what a get may take in all.
    """

    def __init__(
        self,
        client: Client,
        clock: Clock,
        *,
        max_entry_bytes: int = 32 * 1024 * 1024,
        piece_bytes: int = PIECE_BYTES,
        deadline_seconds: float = GATE_SECONDS,
        data_seconds: float = DATA_SECONDS,
        prefix: str = PREFIX,
        puts_at_once: int = 16,
        server: Server | None = None,
        on_error: Callable[[Reason, BaseException], None] | None = None,
        beside: RedisCache | None = None,
    ) -> None:
        """Further puts wait: each that runs holds a part of its answer in memory. A small body
        that is also kept in ``beside`` is put there at the same time."""
        self._beside = beside
        self._link = Link(client, server or Server(), on_error=on_error)
        self._clock = clock
        self._max_entry_bytes = max_entry_bytes
        self._piece_bytes = piece_bytes
        self._deadline = deadline_seconds
        self._data_seconds = data_seconds
        self._prefix = prefix
        self._seed, self._count = secrets.token_hex(8), count()
        self._held = 0
        self._apart = False
        self._fetching: dict[str, asyncio.Task[_Pieces | None]] = {}
        self._fetched: weakref.WeakValueDictionary[str, _Pieces] = weakref.WeakValueDictionary()
        """By generation: what is in memory, as long as somebody has it."""
        self._puts = asyncio.Semaphore(puts_at_once)

    @property
    def degraded(self) -> bool:
        return self._link.breaker(self._probe).failing

    async def get(self, key: str) -> Cached | None:
        try:
            header = await self._read(key, "meta")
            if header is None:
                return None
            meta, document = decode(header)
            generation, count = str(document["put"]), int(document["pieces"])
            answer = await self._answer(key, generation, count, meta.size_bytes)
            left = float(document["expires"]) - self._clock.now().timestamp()
        except (StoreAway, ValueError, KeyError, TypeError, TimeoutError):
            return None
        if answer is None or left <= 0:
            return None
        return Kept(meta, answer.iterate, left)

    async def _answer(self, key: str, generation: str, count: int, size: int) -> _Pieces | None:
        """The content of one put; None where it is not there whole, or there is no room. Raises
        ``StoreAway`` and ``TimeoutError``."""
        name = f"{key}:{generation}"
        answer = self._fetched.get(name)
        if answer is not None:
            return answer
        fetching = self._fetching.get(name)
        if fetching is None:
            if self._held + size > MAX_HELD_BYTES:
                return None
            # A task: who asked first may leave, and others wait for it too.
            fetching = asyncio.create_task(self._fetch(key, generation, count, size))
            self._fetching[name] = fetching
            fetching.add_done_callback(partial(self._has_fetched, name))
        return await asyncio.shield(fetching)

    def _has_fetched(self, name: str, fetching: asyncio.Task[_Pieces | None]) -> None:
        del self._fetching[name]
        if not fetching.cancelled():
            fetching.exception()  # All who asked may have left.

    async def _fetch(self, key: str, generation: str, count: int, size: int) -> _Pieces | None:
        # One deadline over all pieces: a slow Redis must lose against asking again.
        async with asyncio.timeout(self._data_seconds):
            pieces = await self._pieces(key, generation, count)
        if pieces is None or sum(map(len, pieces)) != size:
            return None
        answer = _Pieces(pieces)
        self._held += size
        weakref.finalize(answer, self._let_go, size)
        self._fetched[f"{key}:{generation}"] = answer
        return answer

    def _let_go(self, size_bytes: int) -> None:
        self._held -= size_bytes

    async def put(
        self, key: str, meta: CachedMeta, chunks: AsyncIterator[bytes], ttl_seconds: float
    ) -> bool:
        if ttl_seconds <= 0 or meta.size_bytes > self._max_entry_bytes:
            return False
        if isinstance(chunks, Parts):
            if chunks.made is self:
                return True
            other, entry = self._beside, chunks.beside
            if other is not None and entry is not None and entry.meta.size_bytes <= SMALL_BYTES:
                mine = Parts(chunks.parts)
                if self._goes_with(other, entry, meta, mine):
                    if await self._put_both(key, meta, mine, ttl_seconds, other, entry):
                        chunks.made = other
                        return True
                    if not self._apart:
                        return False
                kept, chunks.made = await asyncio.gather(
                    self.put(key, meta, mine, ttl_seconds), other.put_as_beside(entry, chunks)
                )
                return kept
        async with self._puts:
            return await self._put(key, meta, chunks, ttl_seconds)

    async def put_as_beside(self, entry: CacheEntry, body: Parts) -> RedisCache | None:
        """``put``; this cache where it did keep it."""
        again = Parts(body.parts)
        return self if await self.put(entry.key, entry.meta, again, entry.ttl_seconds) else None

    def _goes_with(
        self, other: RedisCache, entry: CacheEntry, meta: CachedMeta, body: Parts
    ) -> bool:
        """Whether one script can put an answer here and there: a cluster's keys are apart."""
        return (
            self._link.client is other._link.client
            and self._link.has_all_keys
            and not self._apart
            and entry.ttl_seconds > 0
            and 0 < sum(map(len, body.parts)) == entry.meta.size_bytes == meta.size_bytes
            and entry.meta.size_bytes <= other._max_entry_bytes
        )

    async def _put_both(
        self,
        key: str,
        meta: CachedMeta,
        body: Parts,
        ttl_seconds: float,
        other: RedisCache,
        entry: CacheEntry,
    ) -> bool:
        if self._link.breaker(self._name(key)).open:
            return False
        generation = self._generation()
        keys = self._name(key), other._name(entry.key)
        args = (
            f"{generation}:0",
            b"".join(body.parts),
            *self._header(meta, generation, 1, ttl_seconds),
            *self._header(entry.meta, generation, 1, entry.ttl_seconds),
        )
        try:
            async with self._puts:
                await self._run(_KEEP_BOTH, keys, *args)
        except StoreAway as error:
            # One that is a cluster behind a single address: each by itself from now on.
            self._apart |= error.reason is Reason.CLUSTER
            return False
        return True

    def _header(
        self, meta: CachedMeta, generation: str, pieces: int, ttl_seconds: float
    ) -> tuple[bytes, int]:
        """What an entry says of itself, and the milliseconds that it lives."""
        expires = self._clock.now().timestamp() + ttl_seconds
        header = encode(meta, {"put": generation, "pieces": pieces, "expires": expires})
        return header, round(ttl_seconds * 1000)

    def _generation(self) -> str:
        """A name of one put, that no other one of any process has."""
        return f"{self._seed}{next(self._count):x}"

    def put_at_once(self, entry: CacheEntry, body: Parts) -> bool:
        return False

    async def _put(
        self, key: str, meta: CachedMeta, chunks: AsyncIterator[bytes], ttl_seconds: float
    ) -> bool:
        if self._link.breaker(self._name(key)).open:
            return False
        generation = self._generation()
        staging = f"{self._name(key)}:{generation}"
        try:
            pieces, last, size = await self._stage(staging, generation, chunks)
            if size == meta.size_bytes:
                rest = (f"{generation}:{pieces}", last) if last else ()
                header = self._header(meta, generation, pieces + bool(last), ttl_seconds)
                await self._run(_KEEP, (staging, self._name(key)), *header, *rest)
                return True
        except StoreAway:
            # Whatever was staged ends by its own time to live.
            return False
        except BaseException:
            await self._forget(staging)
            raise
        await self._forget(staging)
        return False

    async def holds(self, key: str) -> bool:
        header = await self._read(key, "meta")
        if header is None:
            return False
        _, document = decode(header)
        return float(document["expires"]) > self._clock.now().timestamp()

    async def delete(self, key: str) -> None:
        await self._forget(self._name(key))

    async def ping(self) -> None:
        """Raises ``StoreAway``."""
        await self._link.ping(self._probe)

    async def aclose(self) -> None:
        # Each has its deadline.
        await asyncio.gather(*self._fetching.values(), return_exceptions=True)
        await self._link.aclose()

    @property
    def _probe(self) -> str:
        return f"{self._prefix}:probe"

    def _name(self, key: str) -> str:
        # The hash tag keeps an entry and its staging key on one node of a cluster.
        return f"{self._prefix}:{{{key}}}"

    async def _read(self, key: str, field: str) -> bytes | None:
        name = self._name(key)
        found: bytes | None = await self._link.ask(name, self._deadline, "HGET", name, field)
        return found

    async def _pieces(self, key: str, generation: str, count: int) -> tuple[bytes, ...] | None:
        found: list[bytes] = []
        name = self._name(key)
        for first in range(0, count, PIECES_AT_ONCE):
            numbers = range(first, min(first + PIECES_AT_ONCE, count))
            command = partial(
                self._link.client.execute_command,
                "HMGET",
                name,
                *(f"{generation}:{i}" for i in numbers),
                **IN_BLOCKS,
            )
            # So many pieces may take so many times as long as one.
            some: list[bytes | list[bytes] | None] = await self._link.call(
                name, command, self._deadline * len(numbers)
            )
            for piece in some:
                if piece is None:
                    return None
                found += (piece,) if isinstance(piece, bytes) else piece
        return tuple(found)

    async def _stage(
        self, staging: str, generation: str, chunks: AsyncIterator[bytes]
    ) -> tuple[int, tuple[bytes | memoryview, ...], int]:
        """How many pieces were stored, the blocks of the last one, which goes with the meta, and
        how many bytes came (-1: more than are kept)."""
        piece: list[bytes | memoryview] = []
        pieces = size = held = 0
        async for chunk in chunks:
            size += len(chunk)
            if size > self._max_entry_bytes:
                return pieces, (), -1
            piece.append(chunk)
            held += len(chunk)
            while held > self._piece_bytes:
                # Cut within its last block: nothing is copied.
                last = memoryview(piece.pop())
                cut = len(last) - (held - self._piece_bytes)
                piece.append(last[:cut])
                field = f"{generation}:{pieces}"
                await self._run(_PIECE, (staging,), field, tuple(piece), STAGING_MS)
                piece, held = [last[cut:]], held - self._piece_bytes
                pieces += 1
        return pieces, tuple(piece), size

    async def _run(self, script: Script, keys: Sequence[str], *args: object) -> None:
        await self._link.run(keys[0], self._deadline, script, keys, args)

    async def _forget(self, name: str) -> None:
        try:
            await self._link.ask(name, self._deadline, "UNLINK", name)
        except StoreAway:
            return


@dataclass(frozen=True, slots=True, weakref_slot=True)
class _Pieces:
    pieces: tuple[bytes, ...]

    def iterate(self) -> Parts:
        return Parts(self.pieces)
