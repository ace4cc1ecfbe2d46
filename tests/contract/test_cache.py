"""What every cache promises: in memory, on disk, in Redis, and one in front of another."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gateway.domain.call import SvgUsage, Usage
from gateway.ports import Cache, Cached, CachedMeta, CacheEntry, FileBody, Form, Parts
from gateway.stores.blobs import DiskCache
from gateway.stores.cachemeta import decode, encode
from gateway.stores.memory import MemoryCache
from gateway.stores.redis_cache import RedisCache
from gateway.stores.redis_link import Client, connect
from gateway.stores.tiered import TieredCache
from tests.clock import StillClock
from tests.redis_servers import Cluster
from tests.valkey import Valkey, eventually, pieces

MIB = 1024 * 1024
KEY = hashlib.sha256(b"a call").hexdigest()
OTHER = hashlib.sha256(b"another call").hexdigest()
RESULT = "req_0123456789abcdef01234567"
QUARTER_HOUR, DAY = 15 * 60.0, 24 * 3600.0


@dataclass(frozen=True)
class Bench:
    cache: Cache
    advance: Callable[[float], Awaitable[None]]


@pytest.fixture(params=["memory", "disk", "redis", "cluster", "memory+disk", "memory+redis"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    clock = StillClock()
    admins: list[Client] = []

    async def advance(seconds: float) -> None:
        clock.advance(seconds)
        for admin in admins:
            await _hurry(admin, seconds)

    def make(kind: str) -> Cache:
        if kind == "memory":
            return MemoryCache(clock, max_bytes=64 * MIB, max_entry_bytes=16 * MIB, max_files=8)
        if kind == "disk":
            return DiskCache(tmp_path / "blobs", clock, max_bytes=64 * MIB)
        server: Valkey | Cluster = request.getfixturevalue(
            "cluster" if kind == "cluster" else "valkey"
        )
        nodes = server.masters if isinstance(server, Cluster) else [server]
        admins.extend(connect(node.url, timeout=5.0) for node in nodes)
        return RedisCache(connect(server.url, timeout=5.0), clock, deadline_seconds=5.0)

    tiers = [make(kind) for kind in request.param.split("+")]
    for admin in admins:
        await admin.execute_command("FLUSHALL")
    cache = tiers[0] if len(tiers) == 1 else TieredCache(tiers[0], tiers[1])
    yield Bench(cache, advance)
    await cache.aclose()
    for admin in admins:
        await admin.aclose()


async def _hurry(admin: Client, seconds: float) -> None:
    """Takes ``seconds`` from the time that every key has left."""
    for key in await admin.execute_command("KEYS", "*"):
        left = await admin.execute_command("PTTL", key)
        assert left > 0, f"{key} has no time to live"
        await admin.execute_command("PEXPIRE", key, max(0, left - round(seconds * 1000)))


def meta_of(data: bytes) -> CachedMeta:
    return CachedMeta(
        stored_at=datetime(2026, 11, 22, 12, tzinfo=UTC),
        cost=41_000_000,
        images=1,
        model_served="gpt-image-2.5-flare",
        upstream="openai",
        size_bytes=len(data),
        streamable=True,
        usage=Usage(1, 2, 1, 0, 5, 6, SvgUsage("gpt-x", 7, 8)),
        size="1024x1024",
        quality="high",
        price_id="p1",
    )


async def keep(cache: Cache, key: str, data: bytes, ttl: float = 60, size: int = 100_000) -> None:
    await cache.put(key, meta_of(data), pieces(data, size), ttl)


async def content(cached: Cached | None) -> bytes | None:
    if cached is None:
        return None
    return b"".join([chunk async for chunk in cached.chunks()])


async def test_what_was_put_is_got_byte_for_byte(bench: Bench) -> None:
    assert await bench.cache.get(KEY) is None
    data = os.urandom(3 * MIB + 17)
    await keep(bench.cache, KEY, data)
    for _ in range(2):
        cached = await bench.cache.get(KEY)
        assert cached is not None
        assert cached.meta == meta_of(data)
        assert await content(cached) == data
        assert await content(cached) == data
    assert await bench.cache.get(OTHER) is None


async def test_what_is_put_at_once_is_as_if_it_was_put(bench: Bench) -> None:
    data = os.urandom(1000)
    entry = CacheEntry(KEY, meta_of(data), 60)
    done = bench.cache.put_at_once(entry, Parts([data[:10], data[10:]]))
    assert await content(await bench.cache.get(KEY)) == (data if done else None)


async def test_tiers_take_at_once_what_the_back_never_takes(tmp_path: Path) -> None:
    clock, data = StillClock(), b"x" * 1000
    entry = CacheEntry(KEY, meta_of(data), 60)
    for most, done in ((999, True), (10_000, False)):
        disk = DiskCache(tmp_path / str(most), clock, max_bytes=most)
        cache = TieredCache(MemoryCache(clock, max_bytes=MIB, max_entry_bytes=MIB), disk)
        assert cache.put_at_once(entry, Parts([data])) is done
        assert await content(await cache.get(KEY)) == (data if done else None)


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 2 * MIB])
async def test_sizes_at_the_edges(bench: Bench, size: int) -> None:
    data = os.urandom(size)
    await keep(bench.cache, KEY, data, size=300_000)
    assert await content(await bench.cache.get(KEY)) == data


async def test_an_entry_ends_with_its_time(bench: Bench) -> None:
    await keep(bench.cache, KEY, b"short", ttl=10)
    await keep(bench.cache, OTHER, b"long", ttl=100)
    await bench.advance(9)
    assert await content(await bench.cache.get(KEY)) == b"short"
    await bench.advance(1.5)
    assert await bench.cache.get(KEY) is None
    assert await content(await bench.cache.get(OTHER)) == b"long"
    await keep(bench.cache, KEY, b"no time", ttl=0)
    assert await bench.cache.get(KEY) is None


async def test_a_part_is_never_seen(bench: Bench) -> None:
    data = os.urandom(3 * MIB)
    for stored in (None, b"an older answer"):
        if stored is not None:
            await keep(bench.cache, KEY, stored)
        go, half = asyncio.Event(), asyncio.Event()

        async def slowly(
            go: asyncio.Event = go, half: asyncio.Event = half
        ) -> AsyncIterator[bytes]:
            yield data[: 2 * MIB]
            half.set()
            await go.wait()
            yield data[2 * MIB :]

        put = asyncio.create_task(bench.cache.put(KEY, meta_of(data), slowly(), 60))
        await half.wait()
        assert await content(await bench.cache.get(KEY)) == stored
        go.set()
        await put
        assert await content(await bench.cache.get(KEY)) == data
        await bench.cache.delete(KEY)


class Cut(Exception):
    pass


async def test_a_stream_that_breaks_leaves_nothing(bench: Bench) -> None:
    data = os.urandom(3 * MIB)

    async def breaking() -> AsyncIterator[bytes]:
        yield data[: 2 * MIB]
        raise Cut

    with pytest.raises(Cut):
        await bench.cache.put(KEY, meta_of(data), breaking(), 60)
    assert await bench.cache.get(KEY) is None


@pytest.mark.parametrize("change", [-1, 1], ids=["short", "long"])
async def test_an_answer_that_is_not_as_long_as_it_says_is_not_kept(
    bench: Bench, change: int
) -> None:
    data = os.urandom(2 * MIB)
    meta = dataclasses.replace(meta_of(data), size_bytes=len(data) - change)
    await bench.cache.put(KEY, meta, pieces(data, 100_000), 60)
    assert await bench.cache.get(KEY) is None


async def test_a_cancelled_put_leaves_nothing(bench: Bench) -> None:
    data = os.urandom(3 * MIB)
    half = asyncio.Event()

    async def hanging() -> AsyncIterator[bytes]:
        yield data[: 2 * MIB]
        half.set()
        await asyncio.Event().wait()

    put = asyncio.create_task(bench.cache.put(KEY, meta_of(data), hanging(), 60))
    await half.wait()
    put.cancel()
    with pytest.raises(asyncio.CancelledError):
        await put
    assert await bench.cache.get(KEY) is None
    await keep(bench.cache, KEY, data)
    assert await content(await bench.cache.get(KEY)) == data


async def test_the_last_put_wins(bench: Bench) -> None:
    await keep(bench.cache, KEY, os.urandom(2 * MIB))
    await keep(bench.cache, KEY, b"newer")
    assert await content(await bench.cache.get(KEY)) == b"newer"


async def test_delete(bench: Bench) -> None:
    await keep(bench.cache, KEY, b"gone")
    await keep(bench.cache, OTHER, b"stays")
    await bench.cache.delete(KEY)
    await bench.cache.delete(KEY)
    assert await bench.cache.get(KEY) is None
    assert await content(await bench.cache.get(OTHER)) == b"stays"


async def test_an_entry_being_read_survives_its_end(bench: Bench) -> None:
    data = os.urandom(3 * MIB)
    await keep(bench.cache, KEY, data)
    cached = await bench.cache.get(KEY)
    assert cached is not None
    stream = cached.chunks()
    got = [await anext(stream)]
    await bench.cache.delete(KEY)
    got += [chunk async for chunk in stream]
    assert b"".join(got) == data
    assert await content(cached) == data


async def test_gets_and_puts_of_one_key_at_once_never_mix(bench: Bench) -> None:
    answers = [bytes([i]) * (MIB + 1000 * i) for i in range(1, 5)]

    async def put(data: bytes) -> None:
        for _ in range(5):
            await keep(bench.cache, KEY, data, size=200_000)

    async def get() -> int:
        hits = 0
        for _ in range(25):
            cached = await bench.cache.get(KEY)
            data = await content(cached)
            if data is not None:
                assert cached is not None
                assert cached.meta.size_bytes == len(data)
                assert data in answers
                hits += 1
            await asyncio.sleep(0)
        return hits

    results = await asyncio.gather(*(put(data) for data in answers), get(), get())
    assert await content(await bench.cache.get(KEY)) in answers
    assert results[-1] is not None


async def test_streams_that_are_not_read_to_their_end_leave_nothing_open(bench: Bench) -> None:
    await keep(bench.cache, KEY, os.urandom(2 * MIB))
    await bench.cache.get(KEY)
    await bench.cache.get(KEY)  # what is asked for again is kept in a file of its own, in memory
    before = _open_files()
    for _ in range(20):
        cached = await bench.cache.get(KEY)
        assert cached is not None
        never_begun = cached.chunks()
        abandoned = cached.chunks()
        await anext(abandoned)
        del cached, never_begun, abandoned
    # The loop closes an abandoned generator, and a thread lets go of a file, a little later.
    await eventually(lambda: _open_files() <= before)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def result_of(data: bytes, **changes: object) -> CachedMeta:
    made = dataclasses.replace(
        meta_of(data),
        team="growth",
        operation="generation",
        form=Form.EVENTS,
        headers=(("x-cost-usd", "0.041"), ("x-cost-usd", "again"), ("x-gateway-attempts", "1")),
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


REFUSAL = b'{"error":{"message":"The upstream broke.","type":"server_error"}}'


@pytest.mark.parametrize("key", [RESULT, f"growth:{RESULT}", f"my_team-2:{RESULT}"])
@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (b"event: x\ndata: {}\n\n", {}),
        (REFUSAL, {"status": 502, "form": Form.JSON, "cost": 0, "images": 0}),
        (b"", {"same_as": "req_76543210fedcba9876543210", "headers": ()}),
    ],
    ids=["a stream", "an error", "the same as another"],
)
async def test_a_result_comes_back_with_all_it_says(
    bench: Bench, key: str, data: bytes, changes: dict[str, object]
) -> None:
    meta = result_of(data, **changes)
    await bench.cache.put(key, meta, pieces(data, 10), QUARTER_HOUR)
    cached = await bench.cache.get(key)
    assert cached is not None
    assert cached.meta == meta
    assert await content(cached) == data
    assert await bench.cache.get("req_000000000000000000000000") is None


async def test_each_result_has_a_time_of_its_own(bench: Bench) -> None:
    """A quarter of an hour, or a day where it was bought under an idempotency key."""
    keyed = RESULT.replace("0", "f")
    await bench.cache.put(RESULT, result_of(b"short"), pieces(b"short", 10), QUARTER_HOUR)
    await bench.cache.put(keyed, result_of(b"long"), pieces(b"long", 10), DAY)
    await bench.advance(QUARTER_HOUR - 1)
    assert await content(await bench.cache.get(RESULT)) == b"short"
    await bench.advance(2)
    assert await bench.cache.get(RESULT) is None
    # What is put later looks for what has expired: not for this.
    await keep(bench.cache, OTHER, b"another")
    assert await content(await bench.cache.get(keyed)) == b"long"
    await bench.advance(DAY - QUARTER_HOUR - 3)
    assert await content(await bench.cache.get(keyed)) == b"long"
    await bench.advance(3)
    assert await bench.cache.get(keyed) is None


@pytest.mark.parametrize("kind", ["disk", "redis"])
async def test_the_largest_result_is_kept_and_a_larger_one_is_not(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    most, clock = 256 * MIB, StillClock()
    part = os.urandom(MIB)
    cache: Cache
    if kind == "disk":
        cache = DiskCache(tmp_path, clock, max_bytes=1024 * MIB, max_entry_bytes=most)
    else:
        server: Valkey = request.getfixturevalue("valkey")
        client = connect(server.url, timeout=30.0)
        await client.execute_command("FLUSHALL")
        cache = RedisCache(
            client,
            clock,
            max_entry_bytes=most,
            deadline_seconds=30.0,
            data_seconds=60.0,
            prefix="gwr",
        )

    async def parts(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield part
        if count * MIB > most:
            raise AssertionError("it is refused by its size, before it is read")

    for count, kept in ((220, True), (257, False)):
        meta = dataclasses.replace(result_of(b""), size_bytes=count * MIB)
        key = f"{RESULT[:-3]}{count}"
        await cache.put(key, meta, parts(count), QUARTER_HOUR)
        cached = await cache.get(key)
        assert (cached is not None) == kept
        if cached is not None:
            whole, again = hashlib.sha256(), hashlib.sha256(part * count)
            async for chunk in cached.chunks():
                whole.update(chunk)
            assert whole.digest() == again.digest()
        await cache.delete(key)
    await cache.aclose()


async def test_two_caches_in_one_redis_do_not_see_each_other(admin: Client, valkey: Valkey) -> None:
    clock = StillClock()
    cache = RedisCache(connect(valkey.url, timeout=5.0), clock)
    results = RedisCache(connect(valkey.url, timeout=5.0), clock, prefix="gwr")
    await keep(cache, KEY, b"a cached answer")
    await keep(results, KEY, b"a result")
    assert await content(await cache.get(KEY)) == b"a cached answer"
    assert await content(await results.get(KEY)) == b"a result"
    names = {name.decode() for name in await admin.execute_command("KEYS", "*")}
    assert names == {f"gwc:{{{KEY}}}", f"gwr:{{{KEY}}}"}
    await results.delete(KEY)
    assert await content(await cache.get(KEY)) == b"a cached answer"
    await results.ping()
    for one in (cache, results):
        await one.aclose()


async def test_it_answers_a_ping(bench: Bench) -> None:
    await bench.cache.ping()


def test_the_meta_comes_back_as_it_was() -> None:
    meta = meta_of(b"data")
    assert decode(encode(meta, {"mine": 1}))[0] == meta
    assert decode(encode(meta, {"mine": 1}))[1]["mine"] == 1
    bare = CachedMeta(meta.stored_at, 0, 0, "m", "u", 0)
    assert decode(encode(bare, {}))[0] == bare
    result = result_of(REFUSAL, status=502, same_as=RESULT)
    assert decode(encode(result, {}))[0] == result


def test_what_an_earlier_version_wrote_is_read() -> None:
    document = json.loads(encode(meta_of(b"data"), {}))
    for name in ("team", "operation", "status", "form", "headers", "same_as"):
        del document["meta"][name]
    assert decode(json.dumps(document).encode())[0] == meta_of(b"data")


def test_what_a_later_version_adds_is_ignored() -> None:
    text = encode(meta_of(b"data"), {}).decode()
    later = text.replace('"cost"', '"colour":"red","cost"').replace('"svg":{', '"svg":{"x":1,')
    assert decode(later.encode())[0] == meta_of(b"data")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"v":2,"meta":{}}',
        b'{"v":1,"meta":[]}',
        b'{"v":1,"meta":{"stored_at":1}}',
        encode(meta_of(b""), {}).replace(b"+00:00", b""),
        encode(meta_of(b""), {}).replace(b"41000000", b'"x"'),
        encode(meta_of(b""), {}).replace(b'"form":"json"', b'"form":"scroll"'),
        encode(meta_of(b""), {}).replace(b'"headers":[]', b'"headers":[["x-cache"]]'),
        encode(meta_of(b""), {}).replace(b'"headers":[]', b'"headers":7'),
        b"\xff",
    ],
)
def test_what_is_not_an_entry_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode(data)


async def test_memory_lets_the_least_recently_used_go() -> None:
    clock = StillClock()
    cache = MemoryCache(clock, max_bytes=300, max_entry_bytes=200)
    for key in ("a", "b", "c"):
        await keep(cache, key, key.encode() * 100)
    assert cache.bytes_held == 300
    assert await content(await cache.get("a")) == b"a" * 100
    await keep(cache, "d", b"d" * 100)
    assert [key for key in "abcd" if await cache.get(key)] == ["a", "c", "d"]
    await keep(cache, "e", b"e" * 200)
    assert cache.bytes_held == 300
    assert [key for key in "abcde" if await cache.get(key)] == ["d", "e"]
    await keep(cache, "f", b"f" * 201)
    assert await cache.get("f") is None
    clock.advance(61)
    assert await cache.get("d") is None
    assert cache.bytes_held == 200
    await cache.delete("e")
    assert (cache.bytes_held, len(cache)) == (0, 0)


async def test_memory_keeps_the_chunks_themselves() -> None:
    cache = MemoryCache(StillClock(), max_bytes=MIB, max_entry_bytes=MIB)
    chunks = [os.urandom(1000) for _ in range(3)]

    async def stream() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    await cache.put("key", meta_of(b"".join(chunks)), stream(), 60)
    cached = await cache.get("key")
    assert cached is not None
    kept = [chunk async for chunk in cached.chunks()]
    assert all(mine is given for mine, given in zip(kept, chunks, strict=True))
    # Who is asked for again is held as what is sent.
    for _ in range(2):
        again = await cache.get("key")
        assert again is not None
        sent = [chunk async for chunk in again.chunks()]
        assert sent == [b"".join(chunks)]
    assert cache.bytes_held == 3000
    last = await cache.get("key")
    assert last is not None
    assert await anext(last.chunks()) is sent[0]


async def test_memory_holds_in_a_file_what_is_asked_for_again() -> None:
    """It is sent from there; the file is gone with the entry, but for those who still read it."""
    cache = MemoryCache(StillClock(), max_bytes=MIB, max_entry_bytes=MIB, max_files=2)
    before = _open_files()
    pictures = {key: os.urandom(200_000) for key in ("a", "b", "c")}
    for key, picture in pictures.items():
        await keep(cache, key, picture)
        for _ in range(3):
            assert await content(await cache.get(key)) == picture
    assert _open_files() == before + 2
    assert cache.bytes_held == 600_000
    cached = await cache.get("a")
    assert cached is not None
    body = cached.chunks()
    assert isinstance(body, FileBody)
    del cached
    await cache.delete("a")
    assert b"".join([chunk async for chunk in body]) == pictures["a"]
    del body
    assert _open_files() == before + 1
    assert await content(await cache.get("c")) == pictures["c"]
    assert _open_files() == before + 2
    await cache.aclose()
    assert _open_files() == before


async def test_memory_holds_as_it_is_where_the_system_has_no_such_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> int:
        raise OSError("not here")

    monkeypatch.setattr(os, "memfd_create", refuse)
    cache = MemoryCache(StillClock(), max_bytes=MIB, max_entry_bytes=MIB, max_files=2)
    picture = os.urandom(200_000)
    await keep(cache, KEY, picture)
    for _ in range(3):
        assert await content(await cache.get(KEY)) == picture


async def test_tiers_copy_forward_only_what_is_small_and_no_longer_than_it_lives() -> None:
    clock = StillClock()
    front = MemoryCache(clock, max_bytes=MIB, max_entry_bytes=MIB)
    back = MemoryCache(clock, max_bytes=MIB, max_entry_bytes=MIB)
    cache = TieredCache(front, back, copy_max_bytes=1000, copy_seconds=30)
    await keep(back, "small", b"s" * 1000, ttl=100)
    await keep(back, "large", b"l" * 1001, ttl=100)
    await keep(back, "brief", b"b" * 10, ttl=5)
    for key in ("small", "large", "brief"):
        assert await cache.get(key) is not None
    assert [key for key in ("small", "large", "brief") if await front.get(key)] == [
        "small",
        "brief",
    ]
    clock.advance(6)
    assert await cache.get("brief") is None
    clock.advance(25)
    assert await front.get("small") is None
    assert await content(await cache.get("small")) == b"s" * 1000


async def test_tiers_keep_at_the_back_what_the_front_will_not() -> None:
    clock = StillClock()
    front = MemoryCache(clock, max_bytes=100, max_entry_bytes=100)
    back = MemoryCache(clock, max_bytes=MIB, max_entry_bytes=MIB)
    cache = TieredCache(front, back)
    data = os.urandom(50_000)
    await keep(cache, "key", data, size=1000)
    assert await front.get("key") is None
    assert await content(await cache.get("key")) == data


async def test_tiers_hold_no_more_than_a_chunk_or_two() -> None:
    """The source is asked for the next chunk only when both tiers have taken one."""
    clock = StillClock()
    given = 0

    class Slow(MemoryCache):
        async def put(
            self, key: str, meta: CachedMeta, chunks: AsyncIterator[bytes], ttl_seconds: float
        ) -> bool:
            taken = 0
            async for _ in chunks:
                taken += 1
                for _ in range(10):
                    await asyncio.sleep(0)
                ahead.append(given - taken)
            return False

    async def stream() -> AsyncIterator[bytes]:
        nonlocal given
        for _ in range(50):
            given += 1
            yield b"x" * 100

    ahead: list[int] = []
    slow = Slow(clock, max_bytes=MIB, max_entry_bytes=MIB)
    front = MemoryCache(clock, max_bytes=MIB, max_entry_bytes=MIB)
    await TieredCache(front, slow).put("key", meta_of(b"x" * 5000), stream(), 60)
    assert max(ahead) <= 3
    assert front.bytes_held == 5000
