"""The parts as the settings say: where results are kept, and who hears of them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from gateway.assembly import CannotServe, open_result_news
from gateway.assembly_stores import RESULT_MAX_BYTES, make_results
from gateway.ports import Cache, CachedMeta
from gateway.relay.news import Finished
from gateway.secret import Secret
from gateway.settings import Settings, load
from gateway.stores.blobs import DiskCache
from gateway.stores.redis_cache import RedisCache
from gateway.stores.redis_link import Server, connect
from gateway.telemetry.metrics import Metrics
from tests.clock import StillClock
from tests.inbox import SECRET, inbox
from tests.running import TODAY
from tests.valkey import Valkey, eventually, pieces, run_valkey

RID = "req_0123456789abcdef01234567"


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with run_valkey() as server:
        yield server


def settings(folder: Path, text: str) -> Settings:
    path = folder / "gateway.yaml"
    path.write_text(
        'upstreams: {sandbox: {kind: sandbox}}\nmodels: {"*": {upstream: sandbox}}\n' + text
    )
    return load(path, {})


def made(folder: Path, text: str, metrics: Metrics) -> Cache | None:
    return make_results(settings(folder, text), StillClock(), metrics, Server())


async def keep(cache: Cache, key: str, data: bytes, ttl: float = 900) -> None:
    meta = CachedMeta(TODAY, 1, 1, "m", "u", len(data), team="growth", operation="generation")
    await cache.put(key, meta, pieces(data, 100_000), ttl)


def value(metrics: Metrics, name: str) -> float:
    lines = generate_latest(metrics.registry).decode().splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0)


async def test_results_can_be_off(tmp_path: Path) -> None:
    assert made(tmp_path, "results: {enabled: false}", Metrics("1")) is None


async def test_results_on_disk_are_beside_the_cache_and_counted(tmp_path: Path) -> None:
    metrics = Metrics("1")
    cache = made(tmp_path, "results: {max_bytes: 1MiB}", metrics)
    assert isinstance(cache, DiskCache)
    for i in range(3):
        await keep(cache, f"{RID[:-1]}{i}", bytes(400_000))
    found = [path for path in (tmp_path / "data/blobs/results").rglob("req_*") if path.is_file()]
    assert sorted(path.name[-1] for path in found) == ["1", "2"]
    held = sum(path.stat().st_size for path in found)
    assert value(metrics, 'gateway_results_bytes{where="disk"}') == held
    await cache.aclose()


async def test_a_disk_that_fails_is_counted(tmp_path: Path) -> None:
    metrics = Metrics("1")
    (tmp_path / "data" / "blobs").mkdir(parents=True)
    (tmp_path / "data" / "blobs" / "results").write_text("in the way")
    cache = made(tmp_path, "", metrics)
    assert cache is not None
    await keep(cache, RID, b"lost")
    assert value(metrics, 'gateway_results_errors_total{operation="store"}') >= 1
    await cache.aclose()


@pytest.mark.parametrize("section", ["storage", "cache"])
async def test_results_in_redis_have_keys_of_their_own(
    tmp_path: Path, valkey: Valkey, section: str
) -> None:
    client = connect(valkey.url, timeout=5.0)
    await client.execute_command("FLUSHALL")
    cache = made(tmp_path, f"{section}: {{redis: '{valkey.url}'}}", Metrics("1"))
    assert isinstance(cache, RedisCache)
    await keep(cache, RID, b"a result")
    assert await client.execute_command("KEYS", "*") == [f"gwr:{{{RID}}}".encode()]
    left = await client.execute_command("PTTL", f"gwr:{{{RID}}}")
    assert 890_000 < left <= 900_000
    await cache.ping()
    await cache.aclose()
    await client.aclose()


@pytest.mark.parametrize("where", ["disk", "redis"])
async def test_five_hundred_at_once_are_all_kept(
    tmp_path: Path, valkey: Valkey, where: str
) -> None:
    """As at a SIGTERM with as many under way: none is lost, and few wait in memory."""
    redis = f"storage: {{redis: '{valkey.url}'}}\n" if where == "redis" else ""
    metrics = Metrics("1")
    cache = made(tmp_path, redis, metrics)
    assert cache is not None
    part = hashlib.sha256(b"x").digest() * 3200
    data = part * 5
    begun = ended = most = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal begun, ended, most
        begun += 1
        most = max(most, begun - ended)
        for _ in range(5):
            await asyncio.sleep(0)
            yield part
        ended += 1

    async def put(i: int) -> None:
        meta = CachedMeta(TODAY, 1, 1, "m", "u", len(data))
        await cache.put(f"req_{i:024x}", meta, chunks(), 900)

    await asyncio.gather(*(put(i) for i in range(500)))
    assert most <= 16
    for i in range(500):
        cached = await cache.get(f"req_{i:024x}")
        assert cached is not None, i
        assert b"".join([chunk async for chunk in cached.chunks()]) == data
    assert value(metrics, 'gateway_results_errors_total{operation="store"}') == 0
    await cache.aclose()


async def test_what_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    cache = made(tmp_path, "", Metrics("1"))
    assert cache is not None
    meta = CachedMeta(TODAY, 1, 1, "m", "u", RESULT_MAX_BYTES + 1)
    touched = False

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal touched
        touched = True
        yield b""

    await cache.put(RID, meta, chunks(), 900)
    assert not touched
    assert await cache.get(RID) is None
    await cache.aclose()


async def test_who_hears_of_results(tmp_path: Path) -> None:
    async with inbox(500, 204) as box:
        metrics = Metrics("1")
        webhook = f"{{webhook: '{box.url}', secret: {SECRET}}}"
        news = open_result_news(settings(tmp_path, f"results: {webhook}"), StillClock(), metrics)
        assert news is not None
        in_time = TODAY + timedelta(minutes=15)
        news.tell(Finished(RID, "growth", "edit", "m", 200, "", 1, 5, TODAY, in_time))
        assert value(metrics, "gateway_result_news_waiting") == 1
        posts = await box.until(2)
        assert all(post.is_signed for post in posts)
        await eventually(lambda: news.waiting == 0)
        assert value(metrics, 'gateway_result_news_total{outcome="delivered"}') == 1
        await news.aclose()


@pytest.mark.parametrize(
    "text", ["", "results: {enabled: false, webhook: 'https://h.example.com/x'}"]
)
async def test_nobody_hears_of_results(tmp_path: Path, text: str) -> None:
    assert open_result_news(settings(tmp_path, text), StillClock(), Metrics("1")) is None


async def test_an_address_that_is_none_is_named(tmp_path: Path) -> None:
    read = settings(tmp_path, "")
    broken = replace(read, results=replace(read.results, webhook=Secret("https://a..b/token-5f2c")))
    with pytest.raises(CannotServe, match=r"results\.webhook: ") as raised:
        open_result_news(broken, StillClock(), Metrics("1"))
    assert "token-5f2c" not in str(raised.value)
