"""A cluster and a master under sentinels that lose the server which counts."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from redis.exceptions import RedisError

from gateway.domain.quota import Demand, Grant, Limit, Refusal, Scope, Unit, Window
from gateway.ports import CachedMeta
from gateway.stores.redis_cache import RedisCache
from gateway.stores.redis_gate import RedisGate
from gateway.stores.redis_link import Server, connect
from gateway.stores.redis_patience import MOST_SECONDS
from tests.awake import Awake
from tests.clock import StillClock
from tests.redis_servers import Cluster, Sentinelled, run_cluster, run_sentinels, say
from tests.valkey import Valkey, eventually, pieces

ONE = Demand(requests=1, images=1, slots=1)
PLENTY = Limit(Scope.TEAM, "t", Unit.REQUESTS, Window.MINUTE, 1_000_000)
PROBE = "gw:{default}:probe"
WAIT_SECONDS = 0.75
"""What a call may wait: 0.32 s, and some for a busy machine."""


def check(waits: list[float]) -> None:
    """Nine of ten waited no longer, however busy the machine; and none for longer than the link
    allows where it is the process that has no turn."""
    assert sorted(waits)[len(waits) * 9 // 10] < WAIT_SECONDS
    assert max(waits) < MOST_SECONDS + WAIT_SECONDS


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with run_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def sentinels() -> Iterator[Sentinelled]:
    with run_sentinels() as running:
        yield running


def gate_at(url: str) -> RedisGate:
    return RedisGate(connect(url), StillClock())


async def ask_until_whole(
    gate: RedisGate, clock: Awake, seconds: float = 60.0
) -> tuple[list[float], Counter[bool]]:
    """Calls, 20 at a time, until the shared gate has answered all of the last: the waits of each,
    and how many were degraded and not."""
    waits: list[float] = []
    kinds: Counter[bool] = Counter()
    ends = time.monotonic() + seconds

    async def ask() -> bool:
        began = clock.time()
        answer = await gate.take(os.urandom(8).hex(), [PLENTY], ONE)
        waits.append(clock.time() - began)
        assert isinstance(answer, Grant)
        kinds[answer.degraded] += 1
        return answer.degraded

    while any(await asyncio.gather(*(ask() for _ in range(20)))) or not kinds[True]:
        assert time.monotonic() < ends, f"not whole again: {kinds}"
        await asyncio.sleep(0.02)
    return waits, kinds


@pytest.mark.parametrize("fault", ["kill", "freeze"])
async def test_a_cluster_loses_the_master_that_counts(
    cluster: Cluster, awake: Awake, fault: str
) -> None:
    gate = gate_at(cluster.url)
    # Connecting to a cluster may take longer than a call may wait.
    await eventually(lambda: met(gate))
    few = Limit(Scope.TEAM, f"few-{fault}", Unit.IMAGES, Window.MINUTE, 20)
    answers = await asyncio.gather(*(gate.take(f"{fault}-{i}", [few], ONE) for i in range(200)))
    assert Counter(type(answer) for answer in answers) == {Grant: 20, Refusal: 180}

    lost, before = cluster.master_of(PROBE), cluster.epoch
    with lose(lost, fault):
        waits, kinds = await ask_until_whole(gate, awake)
    print(f"\ncluster, {fault}: {kinds[True]} calls degraded, longest {max(waits) * 1000:.0f} ms")
    check(waits)
    assert not gate.degraded
    await gate.aclose()
    cluster.settle()
    assert cluster.epoch > before


def clients(node: Valkey) -> set[bytes]:
    """The ids of those that are connected, beside the one that asks."""
    said: bytes = say(node.port, "CLIENT", "LIST", "TYPE", "NORMAL")
    lines = said.splitlines()
    return {line.split()[0] for line in lines if b"cmd=client|list" not in line}


async def test_a_client_that_has_lost_a_node_closes_all_that_it_has_open(cluster: Cluster) -> None:
    """After an error redis-py has its nodes looked for anew, and until then it closes nothing."""
    lost, *others = cluster.masters
    keys = {cluster.master_of(f"k{number}").port: f"k{number}" for number in range(50)}
    before = [clients(node) for node in others]
    client = connect(cluster.url, timeout=0.2)
    for node in others:
        await client.execute_command("EXISTS", keys[node.port])
    assert all(clients(node) - seen for node, seen in zip(others, before, strict=True))
    with lose(lost, "freeze"), pytest.raises(RedisError):
        await client.execute_command("EXISTS", keys[lost.port])
    await client.aclose()
    await eventually(
        lambda: not any(clients(node) - seen for node, seen in zip(others, before, strict=True))
    )
    cluster.settle()


async def met(gate: RedisGate) -> bool:
    answer = await gate.take(os.urandom(8).hex(), [PLENTY], ONE)
    return isinstance(answer, Grant) and not answer.degraded


@contextlib.contextmanager
def lose(server: Valkey, fault: str) -> Iterator[None]:
    getattr(server, fault)()
    try:
        yield
    finally:
        server.thaw() if fault == "freeze" else server.restart()


@pytest.mark.parametrize("fault", ["kill", "freeze"])
async def test_sentinels_choose_another_master(
    sentinels: Sentinelled, awake: Awake, fault: str
) -> None:
    gate = gate_at(sentinels.url)
    await eventually(lambda: met(gate))
    lost, before = sentinels.master, sentinels.epoch
    with lose(lost, fault):
        waits, kinds = await ask_until_whole(gate, awake)
    print(f"\nsentinel, {fault}: {kinds[True]} calls degraded, longest {max(waits) * 1000:.0f} ms")
    check(waits)
    assert not gate.degraded
    await gate.aclose()
    sentinels.settle()
    assert sentinels.epoch > before


async def test_no_sentinel_is_forgotten_by_many_that_ask_at_once(sentinels: Sentinelled) -> None:
    """With the first one down each call goes on to the second, all at once."""
    together: Any = connect(sentinels.url)
    client = together._client  # each command by itself: each looks for the master
    known = {*map(id, client._sentinel.sentinels)}
    with lose(sentinels.sentinels[0], "kill"):
        await asyncio.gather(*(client.execute_command("PING") for _ in range(20)))
    assert {*map(id, client._sentinel.sentinels)} == known
    assert len(known) == 3
    await client.aclose()
    sentinels.settle()


async def test_a_cache_is_spread_over_a_cluster_and_misses_what_is_away(cluster: Cluster) -> None:
    cluster.empty()
    cache = RedisCache(connect(cluster.url, timeout=1.0), StillClock(), server=Server())
    data = os.urandom(1_000_000)
    meta = CachedMeta(datetime(2026, 11, 22, tzinfo=UTC), 1, 1, "m", "u", len(data))
    keys = [hashlib.sha256(bytes([i])).hexdigest() for i in range(24)]

    async def kept() -> bool:
        await cache.put(keys[0], meta, pieces(data, 100_000), 600)
        return await cache.get(keys[0]) is not None

    await eventually(kept)
    for key in keys:
        await cache.put(key, meta, pieces(data, 100_000), 600)
    held = [say(node.port, "DBSIZE") for node in cluster.masters]
    assert sum(held) == 24
    assert all(count >= 2 for count in held)

    before = cluster.epoch
    with lose(cluster.masters[1], "kill"):
        waits, found = [], 0
        for key in keys:
            began = time.monotonic()
            found += await cache.get(key) is not None
            waits.append(time.monotonic() - began)
        print(f"\ncache on a cluster: {found} of 24 found, longest {max(waits) * 1000:.0f} ms")
        check(waits)
        assert found < 24

        async def nearly_all_found() -> bool:
            # The replica follows without being waited for.
            got = [await cache.get(key) is not None for key in keys]
            return sum(got) >= 20

        await eventually(nearly_all_found, 20)
    await cache.aclose()
    cluster.settle()
    assert cluster.epoch > before
