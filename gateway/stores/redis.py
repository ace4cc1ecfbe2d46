"""Stores that all replicas share, in Redis 7+ or Valkey: a gate and a cache.

Neither ever raises for a Redis that is away: the gate answers from this process, the cache misses.
What that costs is bounded by ``Link``: a few short deadlines, then nothing until Redis is back.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.resources
import secrets
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster, Sentinel
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    MasterDownError,
    NoScriptError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from gateway.domain.quota import Demand, Grant, Limit, Refusal, Unit
from gateway.ports import Cached, CachedMeta, Clock
from gateway.stores.cachemeta import decode, encode
from gateway.stores.kept import Kept
from gateway.stores.memory import MemoryGate, checked, gated, standing

T = TypeVar("T")

GATE_SECONDS = 0.3
"""What a call may wait for the gate, and a look-up for the cache."""
DATA_SECONDS = 2.0
"""What one piece of an answer, or all pieces of one that is read, may take."""
LATE_SECONDS = 0.02
GRACE_SECONDS = 0.1
REMEMBER_MS = 60_000
"""How long a call's marker lives: longer than any retry of a lost reply."""
PIECE_BYTES = 1024 * 1024
STAGING_MS = 60_000


class Client(Protocol):
    """The two methods of redis-py's clients, single or cluster, that the stores use."""

    async def execute_command(self, *args: Any, **options: Any) -> Any: ...

    async def aclose(self) -> None: ...


def connect(url: str, *, max_connections: int = 32, timeout: float = 0.25) -> Client:
    """A client with bounded patience; nothing is connected before the first command.

    ``url`` is ``redis://``, ``rediss://``, ``unix://``, ``redis+cluster://`` or
    ``redis+sentinel://[user:password@]host:port[,host:port...]/name[/db]``. ``timeout`` is in
    seconds, for a connect, and for one reply. Raises ``ValueError`` for any other url.
    """
    options: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        # READONLY: the master we knew was demoted; a new connection looks its name up again.
        "retry": Retry(NoBackoff(), 1, (RedisConnectionError, RedisTimeoutError, ReadOnlyError)),
        # RESP3 brings only push messages here, and one more exchange on each connect.
        "protocol": 2,
        "decode_responses": False,
        "driver_info": None,
    }
    scheme = urlsplit(url).scheme
    if scheme == "redis+cluster":
        plain = "redis" + url[len(scheme) :]
        cluster: Client = RedisCluster.from_url(plain, max_connections=max_connections, **options)
        return cluster
    if scheme == "redis+sentinel":
        return _by_sentinel(url, max_connections=max_connections, **options)
    pool = BlockingConnectionPool.from_url(
        url, max_connections=max_connections, **options | {"timeout": timeout}
    )
    single: Client = Redis.from_pool(pool)
    return single


def _by_sentinel(url: str, **options: Any) -> Client:
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    name, _, db = parts.path.strip("/").partition("/")
    if not hosts or not name or (db and not db.isdecimal()):
        raise ValueError("redis+sentinel://host:port[,host:port...]/name[/db] is what is expected")
    user, _, password = credentials.partition(":")
    brief = ("socket_timeout", "socket_connect_timeout", "retry", "protocol")
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        [_host_port(host) for host in hosts.split(",")],
        username=unquote(user) or None,
        password=unquote(password) or None,
        db=int(db or 0),
        sentinel_kwargs={name: options[name] for name in brief},
        **options,
    )
    return _Sentinelled(sentinel, sentinel.master_for(name))


def _host_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    return (host, int(port)) if colon else (text, 26379)


class _Sentinelled:
    """A master's client, together with those of the sentinels, which redis-py leaves open."""

    def __init__(self, sentinel: Any, master: Client) -> None:
        self._sentinel = sentinel
        self._master = master

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        return await self._master.execute_command(*args, **options)

    async def aclose(self) -> None:
        await self._master.aclose()
        for client in self._sentinel.sentinels:
            await client.aclose()


@dataclass(frozen=True, slots=True)
class Script:
    """Lua that Redis keeps by its digest."""

    text: str
    digest: str

    @classmethod
    def load(cls, name: str) -> Script:
        text = (importlib.resources.files("gateway.stores") / name).read_text(encoding="utf-8")
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())

    async def run(self, client: Client, keys: Sequence[str], *args: object) -> Any:
        try:
            return await client.execute_command("EVALSHA", self.digest, len(keys), *keys, *args)
        except NoScriptError:
            return await client.execute_command("EVAL", self.text, len(keys), *keys, *args)


_TAKE = Script.load("gate.lua")
_UNDO = Script.load("gate_undo.lua")
_RELEASE = Script.load("gate_release.lua")
_BEAT = Script.load("gate_beat.lua")
_PIECE = Script.load("cache_piece.lua")
_KEEP = Script.load("cache_keep.lua")


class StoreAway(Exception):
    """Redis gave no answer in time, or could not be reached, or was not asked: it is down."""


class StoreRefused(StoreAway):
    """Redis answered, but will not serve this: out of memory, read only, no permission."""


class Link:
    """Commands to one Redis, each under a deadline, and none while it is known to be down.

    Three failures in a row and it is down: from then on a call fails at once, and a probe every
    ``pause`` seconds, not a caller, finds out when it is back.

    A command is never cancelled, only no longer waited for: redis-py loses a pool's connection
    for good when a cancellation meets its release. The socket's own time-out ends it.
    """

    def __init__(
        self,
        client: Client,
        *,
        probe: str,
        failures: int = 3,
        pause: float = 1.0,
        in_flight: int = 16,
        on_error: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.client = client
        self._probe_key = probe
        self._allowed = failures
        self._pause = pause
        self._on_error = on_error
        self._failures = 0
        self._places = asyncio.Semaphore(in_flight)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._prober: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def failing(self) -> bool:
        """The last command got no answer."""
        return self._failures > 0

    @property
    def down(self) -> bool:
        return self._failures >= self._allowed

    async def call(self, command: Callable[[], Awaitable[T]], seconds: float) -> T:
        """Raises ``StoreAway``. ``seconds`` begin when the command's turn has come."""
        async with self._places:
            # Asked only now: those that queued behind the failures need not repeat them.
            if self.down:
                raise StoreAway("it is down")
            return await self.attempt(command, seconds)

    async def attempt(self, command: Callable[[], Awaitable[T]], seconds: float) -> T:
        """As ``call``, even while it is down, and without waiting for a turn."""
        if self._closed:
            raise StoreAway("it is closed")
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        task = asyncio.create_task(_translated(command))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        await asyncio.wait({task}, timeout=seconds)
        if not task.done() and loop.time() > ends + LATE_SECONDS:
            # This process was stalled, not Redis: the answer may lie in the socket already.
            await asyncio.wait({task}, timeout=GRACE_SECONDS)
        if not task.done():
            self._failed(TimeoutError(f"no answer in {seconds} s"))
            raise StoreAway("no answer in time")
        if task.cancelled():
            raise StoreAway("it was closed")
        error = task.exception()
        if error is None:
            self._failures = 0
            return task.result()
        if isinstance(error, StoreRefused):
            self._failures = 0
            self._tell(error.__cause__ or error)
        else:
            self._failed(error.__cause__ or error)
        raise error

    async def aclose(self) -> None:
        """Closes the client too."""
        self._closed = True
        tasks = [*self._tasks, *([self._prober] if self._prober else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.client.aclose()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Looked at, so that an error nobody waited for is not reported as forgotten.
            task.exception()

    def _failed(self, error: BaseException) -> None:
        self._tell(error)
        self._failures += 1
        if self._prober is None and not self._closed:
            self._prober = asyncio.create_task(self._probe())

    def _tell(self, error: BaseException) -> None:
        if self._on_error is not None:
            self._on_error(error)

    async def _probe(self) -> None:
        try:
            while self.failing:
                await asyncio.sleep(self._pause)
                try:
                    await self.attempt(self._ask, GATE_SECONDS)
                except StoreRefused:
                    return
                except StoreAway:
                    continue
        finally:
            self._prober = None

    async def _ask(self) -> Any:
        # With a key, so that a cluster's client asks the node that our own keys live on.
        return await self.client.execute_command("EXISTS", self._probe_key)

    async def ping(self) -> None:
        """Raises ``StoreAway``; also brings a Redis that is back into use at once."""
        await self.attempt(self._ask, GATE_SECONDS)


async def _translated(command: Callable[[], Awaitable[T]]) -> T:
    """The command's answer, or why there is none as a ``StoreAway``."""
    try:
        return await command()
    except (ClusterDownError, MasterDownError) as error:
        raise StoreAway(type(error).__name__) from error
    except ResponseError as error:
        raise StoreRefused(type(error).__name__) from error
    except (RedisError, RedisClusterException, OSError) as error:
        raise StoreAway(type(error).__name__) from error
    except Exception as error:
        # Whatever the client trips over is its trouble, not the caller's: it is asked again later.
        raise StoreAway(type(error).__name__) from error


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


MAX_HELD_BYTES = 1024 * 1024 * 1024
"""Of answers that slow clients are still reading, each a copy; beyond it, misses."""


class RedisCache:
    """Answers in one hash each: ``meta``, and pieces of up to 1 MiB named ``<generation>:<i>``.

    A put goes to a staging key and is renamed at the end, so that a part is never seen; pieces
    carry their put's generation, so that a get that straddles two puts misses and never mixes
    them. A get fetches everything before it answers, because a failure in the middle would cut
    an answer whose headers have left: ``max_entry_bytes`` bounds that memory.

    Owns ``client`` and closes it; give it a patient one: ``connect(url, timeout=2.0)``.
    """

    def __init__(
        self,
        client: Client,
        clock: Clock,
        *,
        max_entry_bytes: int = 32 * 1024 * 1024,
        piece_bytes: int = PIECE_BYTES,
        deadline_seconds: float = GATE_SECONDS,
        pause_seconds: float = 1.0,
        on_error: Callable[[BaseException], None] | None = None,
    ) -> None:
        self._link = Link(client, probe="gwc:probe", pause=pause_seconds, on_error=on_error)
        self._clock = clock
        self._max_entry_bytes = max_entry_bytes
        self._piece_bytes = piece_bytes
        self._deadline = deadline_seconds
        self._held = 0

    @property
    def degraded(self) -> bool:
        return self._link.failing

    async def get(self, key: str) -> Cached | None:
        try:
            header = await self._link.call(partial(self._read, key, "meta"), self._deadline)
            if header is None:
                return None
            meta, document = decode(header)
            if self._held + meta.size_bytes > MAX_HELD_BYTES:
                return None
            # One deadline over all pieces: a slow Redis must lose against asking again.
            pieces = await self._link.call(
                partial(self._pieces, key, str(document["put"]), int(document["pieces"])),
                DATA_SECONDS,
            )
        except (StoreAway, ValueError, KeyError, TypeError):
            return None
        left = float(document["expires"]) - self._clock.now().timestamp()
        if pieces is None or sum(map(len, pieces)) != meta.size_bytes or left <= 0:
            return None
        answer = _Pieces(pieces)
        self._held += meta.size_bytes
        weakref.finalize(answer, self._let_go, meta.size_bytes)
        return Kept(meta, answer.iterate, left)

    def _let_go(self, size_bytes: int) -> None:
        self._held -= size_bytes

    async def put(
        self, key: str, meta: CachedMeta, chunks: AsyncIterator[bytes], ttl_seconds: float
    ) -> None:
        if ttl_seconds <= 0 or meta.size_bytes > self._max_entry_bytes or self._link.down:
            return
        generation = secrets.token_hex(8)
        staging = f"{_name(key)}:{generation}"
        try:
            pieces, size = await self._stage(staging, generation, chunks)
            if size == meta.size_bytes:
                expires = self._clock.now().timestamp() + ttl_seconds
                header = encode(meta, {"put": generation, "pieces": pieces, "expires": expires})
                await self._run(_KEEP, (staging, _name(key)), header, round(ttl_seconds * 1000))
                return
        except StoreAway:
            # Whatever was staged ends by its own time to live.
            return
        except BaseException:
            await self._forget(staging)
            raise
        await self._forget(staging)

    async def delete(self, key: str) -> None:
        await self._forget(_name(key))

    async def ping(self) -> None:
        """Raises ``StoreAway``."""
        await self._link.ping()

    async def aclose(self) -> None:
        await self._link.aclose()

    async def _read(self, key: str, field: str) -> bytes | None:
        found: bytes | None = await self._link.client.execute_command("HGET", _name(key), field)
        return found

    async def _pieces(self, key: str, generation: str, count: int) -> tuple[bytes, ...] | None:
        found: list[bytes] = []
        for i in range(count):
            piece = await self._read(key, f"{generation}:{i}")
            if piece is None:
                return None
            found.append(piece)
        return tuple(found)

    async def _stage(
        self, staging: str, generation: str, chunks: AsyncIterator[bytes]
    ) -> tuple[int, int]:
        """How many pieces were stored, and how many bytes came (-1: more than are kept)."""
        buffer = bytearray()
        pieces = size = 0
        async for chunk in chunks:
            size += len(chunk)
            if size > self._max_entry_bytes:
                return pieces, -1
            buffer += chunk
            while len(buffer) >= self._piece_bytes:
                await self._store(staging, f"{generation}:{pieces}", buffer)
                pieces += 1
        if buffer:
            await self._store(staging, f"{generation}:{pieces}", buffer)
            pieces += 1
        return pieces, size

    async def _store(self, staging: str, field: str, buffer: bytearray) -> None:
        """Moves one piece from the front of ``buffer`` to Redis."""
        piece = bytes(memoryview(buffer)[: self._piece_bytes])
        del buffer[: self._piece_bytes]
        await self._run(_PIECE, (staging,), field, piece, STAGING_MS)

    async def _run(self, script: Script, keys: Sequence[str], *args: object) -> None:
        await self._link.call(partial(script.run, self._link.client, keys, *args), DATA_SECONDS)

    async def _forget(self, name: str) -> None:
        try:
            await self._link.call(
                partial(self._link.client.execute_command, "UNLINK", name), self._deadline
            )
        except StoreAway:
            return


@dataclass(frozen=True, slots=True, weakref_slot=True)
class _Pieces:
    pieces: tuple[bytes, ...]

    async def iterate(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece


def _name(key: str) -> str:
    # The hash tag keeps an entry and its staging key on one node of a cluster.
    return f"gwc:{{{key}}}"
