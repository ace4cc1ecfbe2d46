"""A shared board of flights whose Redis dies, freezes, forgets, fills up or loses its answers, and
whose processes die."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from gateway.clock import SystemClock
from gateway.ports import FlightNotice
from gateway.stores.redis_board import RedisBoard
from gateway.stores.redis_link import Client, Reason, Server, connect
from tests.awake import Awake
from tests.redis_servers import run_cluster
from tests.valkey import LossyWire, Valkey, eventually

MIB = 1024 * 1024
AT = datetime(2026, 11, 22, tzinfo=UTC)
PROBE = "gw:{default}:probe"


def board_at(url: str, worker: str = "w", **options: Any) -> RedisBoard:
    usual: dict[str, Any] = {"server": Server(pause=0.1), "beat_seconds": 0.1, "ttl_seconds": 900.0}
    return RedisBoard(connect(url), SystemClock(), worker=worker, **usual | options)


@pytest.fixture
async def boards(valkey: Valkey) -> AsyncIterator[tuple[RedisBoard, RedisBoard]]:
    """Those of two processes."""
    pair = board_at(valkey.url, "one"), board_at(valkey.url, "two")
    yield pair
    for board in pair:
        await board.aclose()


Pair = tuple[RedisBoard, RedisBoard]


def notice(rid: str, fingerprint: str = "f") -> FlightNotice:
    return FlightNotice(rid, fingerprint, "growth", "k", "generation", "flare", False, AT)


async def joined(board: RedisBoard, *, orphans_only: bool = False) -> str | None:
    found = await board.join("f", "k", orphans_only=orphans_only)
    return found.rid if found is not None else None


async def is_seen(board: RedisBoard, rid: str, **expected: object) -> bool:
    seen = await board.look(rid)
    return seen is not None and all(
        getattr(seen, name) == value for name, value in expected.items()
    )


async def keys(admin: Client, pattern: str = "*") -> list[bytes]:
    found: list[bytes] = await admin.execute_command("KEYS", pattern)
    return sorted(found)


async def flights_left(admin: Client) -> list[bytes]:
    """Flights that are more than a mark that they are over, and what they would be found by."""
    found = await keys(admin, "gw:{default}:sf:*")
    for key in await keys(admin, "gw:{default}:fl:*"):
        if await admin.execute_command("HLEN", key) > 1:
            found.append(key)
    return found


async def test_killed_it_goes_on_with_its_own_flights_and_tells_of_them_later(
    valkey: Valkey, boards: Pair
) -> None:
    here, there = boards
    for rid in ("landed", "orphan", "delivered"):
        await here.announce(notice(rid))
    valkey.kill()
    await here.end("landed", joinable=True)
    await here.leave("landed", delivered=False)
    await here.leave("orphan", delivered=False)
    await here.end("delivered", joinable=True)
    await here.leave("delivered", delivered=True)
    await here.announce(notice("meanwhile"))
    assert here.degraded
    # Another process's flights are not known now, one's own are.
    assert await joined(there) is None
    assert [await joined(here) for _ in range(3)] == ["landed", "orphan", "landed"]
    assert not await here.take_over("foreign")
    assert await there.look("orphan") is None
    assert await is_seen(here, "orphan", ended=False, alive=True, watchers=1)
    assert await is_seen(here, "landed", ended=True, watchers=2)
    valkey.restart()
    await eventually(lambda: not here.degraded)
    await eventually(lambda: is_seen(there, "meanwhile", alive=True, watchers=1))
    await eventually(lambda: is_seen(there, "landed", ended=True, watchers=2))
    await eventually(lambda: is_seen(there, "orphan", alive=True, watchers=1))
    assert await there.look("delivered") is None
    await here.leave("orphan", delivered=False)
    assert await joined(there, orphans_only=True) == "orphan"


@pytest.mark.parametrize("at_once", [1, 50])
async def test_frozen_it_costs_one_short_wait_in_all(
    valkey: Valkey, awake: Awake, at_once: int
) -> None:
    board = board_at(valkey.url, server=Server())
    waits: list[float] = []

    async def life(rid: str) -> None:
        began = awake.time()
        await board.join(rid, "k", orphans_only=True)
        await board.announce(notice(rid, rid))
        await board.add_events(rid, 0, b"x" * MIB)
        await board.end(rid, joinable=True)
        await board.leave(rid, delivered=True)
        waits.append(awake.time() - began)

    await life("warm")
    valkey.freeze()
    waits.clear()
    for start in range(0, 200, at_once):
        await asyncio.gather(*(life(f"r{start + i}") for i in range(at_once)))
    slow = [wait for wait in waits if wait > 0.15]
    print(f"\nfrozen: {len(slow)} of 200 waited, the longest {max(waits) * 1000:.0f} ms")
    assert max(waits) < 0.75
    assert len(slow) <= at_once
    valkey.thaw()
    # What had an end is not remembered for longer than Redis has to be told of it.
    await eventually(lambda: not board.beating)
    await board.aclose()


async def test_frozen_for_longer_than_a_lease_nobody_is_called_dead(valkey: Valkey) -> None:
    """Who flies finds Redis again somewhat later than who looks."""
    here = board_at(valkey.url, "a", lease_seconds=0.5, server=Server(pause=0.7))
    there = board_at(valkey.url, "b", lease_seconds=0.5, server=Server(pause=0.05), beat_seconds=1)
    for rid in ("a", "b"):
        await here.announce(notice(rid))
    assert await joined(there) == "a"
    valkey.freeze()
    began = time.monotonic()
    while time.monotonic() - began < 2.0:
        # A watcher from elsewhere sees it as it was.
        assert await is_seen(there, "a", ended=False, alive=True)
        await asyncio.sleep(0.05)
    valkey.thaw()
    await eventually(lambda: not there.degraded)
    while here.degraded:
        for rid in ("a", "b"):
            assert await is_seen(there, rid, ended=False, alive=True)
        assert await joined(there, orphans_only=True) is None
        await asyncio.sleep(0.02)
    await eventually(lambda: is_seen(there, "a", alive=True, watchers=2))
    await eventually(lambda: is_seen(there, "b", alive=True, watchers=1))
    await here.aclose()
    await there.aclose()


async def away_and_back(valkey: Valkey, board: RedisBoard) -> None:
    valkey.freeze()
    await board.look("anything")
    assert board.degraded
    valkey.thaw()
    await eventually(lambda: not board.degraded)


async def test_just_after_redis_was_away_the_silent_are_given_time(valkey: Valkey) -> None:
    dead = board_at(valkey.url, "dead")
    there = board_at(valkey.url, "there", beat_seconds=1.0, offset=lambda: 16.0)
    await dead.announce(notice("a"))
    await dead.aclose()
    assert await is_seen(there, "a", alive=False, watchers=0)
    await away_and_back(valkey, there)
    assert await is_seen(there, "a", alive=True, watchers=1)
    assert await joined(there, orphans_only=True) is None
    await eventually(lambda: is_seen(there, "a", alive=False, watchers=0))
    assert await joined(there, orphans_only=True) == "a"
    await there.aclose()


async def test_what_a_failover_lost_of_an_end_is_told_again(valkey: Valkey, admin: Client) -> None:
    board = board_at(valkey.url)
    key = "gw:{default}:fl:a"
    await board.announce(notice("a"))
    before = await admin.execute_command("DUMP", key)
    await board.end("a", joinable=True)
    await board.leave("a", delivered=True)
    await admin.execute_command("RESTORE", key, 0, before, "REPLACE")
    assert await is_seen(board, "a", ended=False)
    await away_and_back(valkey, board)

    async def over() -> bool:
        return await board.look("a") is None

    await eventually(over)
    assert await flights_left(admin) == []
    await board.aclose()


async def test_flushed_what_runs_and_is_watched_comes_back(
    valkey: Valkey, admin: Client, boards: Pair
) -> None:
    here, there = boards
    for rid in ("a", "b"):
        await here.announce(notice(rid))
    assert await joined(there) == "a"
    await here.leave("b", delivered=False)
    await there.want_events("a")
    await here.progress("a", 3)
    await admin.execute_command("FLUSHALL")
    # Whoever watches is not told that there is nothing.
    assert await is_seen(there, "a", ended=False, alive=True)
    await eventually(lambda: is_seen(there, "a", alive=True, watchers=2, partials=3))
    await eventually(lambda: is_seen(there, "b", alive=True, watchers=0))
    await eventually(lambda: here.wanted("a"))
    assert await joined(there, orphans_only=True) == "b"
    for board, rid in ((here, "a"), (there, "a"), (there, "b")):
        await board.leave(rid, delivered=True)
    for rid in ("a", "b"):
        await here.end(rid, joinable=True)
    assert await flights_left(admin) == []


async def test_restarted_what_waits_to_be_handed_over_comes_back(
    valkey: Valkey, boards: Pair
) -> None:
    here, there = boards
    await here.announce(notice("a"))
    await here.end("a", joinable=True)
    await here.leave("a", delivered=False)
    await here.announce(notice("b"))
    await here.end("b", joinable=True)
    await here.leave("b", delivered=True)
    await eventually(lambda: not here.beating)
    valkey.restart()
    # Whatever it says next, it hears that Redis has forgotten everything.
    assert await here.join("g", "k", orphans_only=True) is None
    await eventually(lambda: is_seen(there, "a", ended=True))
    assert await there.look("b") is None
    assert await joined(there, orphans_only=True) == "a"
    assert await joined(there, orphans_only=True) is None
    await there.leave("a", delivered=False)
    valkey.restart()
    assert await joined(here, orphans_only=True) == "a"


async def test_an_answer_that_is_lost_counts_nobody_twice(valkey: Valkey, admin: Client) -> None:
    there = board_at(valkey.url)
    async with LossyWire(valkey.port) as wire:
        here = board_at(wire.url)

        async def losing(work: Any) -> Any:
            lost = wire.lost
            wire.lose(1)
            answer = await work
            assert wire.lost == lost + 1
            return answer

        # Beats would lose their own.
        here._keep_beating = lambda: None  # type: ignore[method-assign]
        await losing(here.announce(notice("a")))
        assert await is_seen(there, "a", watchers=1)
        assert await losing(joined(here)) == "a"
        assert await is_seen(there, "a", watchers=2)
        await losing(here.leave("a", delivered=False))
        assert await is_seen(there, "a", watchers=1)
        assert await losing(here.take_over("a"))
        assert not await here.take_over("a")
        await losing(here.add_events("a", 0, b"events"))
        assert await losing(here.events("a", 0)) == b"events"
        await losing(here.end("a", joinable=True))
        await losing(here.leave("a", delivered=True))
        for rid in ("b", "c"):
            await here.announce(notice(rid))
            await here.leave(rid, delivered=False)
        assert await losing(joined(here, orphans_only=True)) == "b"
        assert await is_seen(there, "c", watchers=0)
        for rid in ("b", "c"):
            await here.leave(rid, delivered=True)
            await here.end(rid, joinable=True)
        assert await there.look("a") is None
        assert await flights_left(admin) == []
        assert not here.degraded
        await here.aclose()
    await there.aclose()


async def test_on_a_lossy_wire_every_flight_ends(valkey: Valkey, admin: Client) -> None:
    chance = random.Random(4)
    there = board_at(valkey.url, lease_seconds=0.5)
    async with LossyWire(valkey.port) as wire:
        here = board_at(wire.url, server=Server(pause=0.02), lease_seconds=0.5)

        async def life(rid: str) -> None:
            await here.announce(notice(rid))
            found = await joined(here)
            await asyncio.sleep(chance.random() / 20)
            await here.leave(rid, delivered=chance.random() < 0.8)
            await here.end(rid, joinable=chance.random() < 0.8)
            if found is not None:
                await asyncio.sleep(chance.random() / 20)
                await here.leave(found, delivered=True)

        async def none_watched(board: RedisBoard) -> bool:
            seen = [await board.look(f"r{i}") for i in range(100)]
            return all(each is None or (each.ended and not each.watchers) for each in seen)

        wire.lose_some(0.2)
        for start in range(0, 100, 20):
            await asyncio.gather(*(life(f"r{start + i}") for i in range(20)))
        wire.lose_some(0)
        assert wire.lost > 20
        await eventually(lambda: not here.beating)
        # Who was counted by an answer that was lost is not counted any more.
        await eventually(lambda: none_watched(there))
        # Those that nobody took, and no others, are still found: each by one, and then by nobody.
        left = [await joined(there, orphans_only=True) for _ in range(100)]
        found = [rid for rid in left if rid is not None]
        assert len(found) == len(set(found)) < 60
        for rid in found:
            assert await is_seen(there, rid, ended=True, watchers=1)
            await there.leave(rid, delivered=True)
        assert await joined(there) is None
        await here.aclose()
    await there.aclose()
    assert await keys(admin, "gw:{default}:sf:*") == []


async def test_the_flight_of_a_dead_process_is_found_dead_and_unwatched(valkey: Valkey) -> None:
    ahead = 0.0
    dead = board_at(valkey.url, "dead")
    there = board_at(valkey.url, "there", offset=lambda: ahead)
    await dead.announce(notice("a"))
    # As a killed process, it says nothing any more.
    await dead.aclose()
    assert await is_seen(there, "a", ended=False, alive=True, watchers=1)
    assert await joined(there, orphans_only=True) is None
    ahead = 16.0
    assert await is_seen(there, "a", ended=False, alive=False, watchers=0)
    assert await joined(there, orphans_only=True) == "a"
    assert await joined(there, orphans_only=True) is None
    assert [await there.take_over("a") for _ in range(3)] == [True, False, False]
    await there.leave("a", delivered=True)
    assert await joined(there) is None
    await there.aclose()


async def test_watchers_of_a_dead_process_count_no_more(valkey: Valkey) -> None:
    ahead = 0.0
    here = board_at(valkey.url, "here", offset=lambda: ahead)
    dead = board_at(valkey.url, "dead")
    await here.announce(notice("a"))
    assert await joined(dead) == "a"
    await dead.aclose()
    assert await is_seen(here, "a", watchers=2)
    ahead = 16.0
    await eventually(lambda: is_seen(here, "a", alive=True, watchers=1))
    await here.leave("a", delivered=False)
    assert await joined(here, orphans_only=True) == "a"
    await here.aclose()


async def test_what_is_over_is_not_raised_again(valkey: Valkey, admin: Client) -> None:
    """As an announcement that a frozen Redis carries out when all is over."""
    here, late = board_at(valkey.url), board_at(valkey.url)
    await here.announce(notice("a"))
    await here.end("a", joinable=True)
    await here.leave("a", delivered=True)
    await late.announce(notice("a"))
    assert await flights_left(admin) == []
    assert await joined(here) is None
    await here.aclose()
    await late.aclose()


async def test_nothing_is_said_while_nothing_runs(valkey: Valkey, admin: Client) -> None:
    board = board_at(valkey.url, beat_seconds=0.02)

    async def evals() -> int:
        said = await admin.execute_command("INFO", "commandstats")
        return sum(
            about["calls"] for name, about in said.items() if name.startswith("cmdstat_eval")
        )

    await board.announce(notice("a"))
    before = await evals()

    async def beats() -> bool:
        return await evals() > before + 3

    await eventually(beats)
    await board.end("a", joinable=True)
    assert board.beating
    await board.leave("a", delivered=True)
    await eventually(lambda: not board.beating)
    before = await evals()
    await asyncio.sleep(0.2)
    assert await evals() == before
    # An orphan that landed needs no beat either.
    await board.announce(notice("b"))
    await board.end("b", joinable=True)
    await board.leave("b", delivered=False)
    await eventually(lambda: not board.beating)
    assert await joined(board, orphans_only=True) == "b"
    assert board.beating
    await board.aclose()


async def test_what_ends_at_one_moment_is_told_in_one_call(valkey: Valkey, admin: Client) -> None:
    board = board_at(valkey.url, beat_seconds=60.0)
    rids = [f"r{number}" for number in range(30)]
    await asyncio.gather(*(board.announce(notice(rid, rid)) for rid in rids))
    await admin.execute_command("CONFIG", "RESETSTAT")
    for rid in rids:
        assert board.end_at_once(rid, joinable=True)
        assert board.leave_at_once(rid, delivered=rid != "r7")
    # Closing waits for it.
    await board.aclose()
    said = await admin.execute_command("INFO", "commandstats")
    assert said["cmdstat_evalsha"]["calls"] == 1
    assert await keys(admin, "gw:{default}:sf:*") == [b"gw:{default}:sf:r7:k"]
    assert len(await flights_left(admin)) == 2


async def test_what_is_posted_while_redis_is_away_is_told_later(valkey: Valkey) -> None:
    here, there = board_at(valkey.url, "one"), board_at(valkey.url, "two")
    for rid in ("landed", "delivered"):
        await here.announce(notice(rid))
    valkey.kill()
    for rid in ("landed", "delivered"):
        assert here.end_at_once(rid, joinable=True)
        assert here.leave_at_once(rid, delivered=rid == "delivered")
    assert not here.leave_at_once("nobody", delivered=True)
    await eventually(lambda: here.degraded)
    assert await joined(here, orphans_only=True) == "landed"
    await here.leave("landed", delivered=False)
    valkey.restart()
    await eventually(lambda: is_seen(there, "landed", ended=True, watchers=0))
    assert await there.look("delivered") is None
    await here.aclose()
    await there.aclose()


async def test_what_redis_has_lost_of_a_flight_is_told_anew(valkey: Valkey, admin: Client) -> None:
    """Its notice too, which is else told once."""
    here, there = board_at(valkey.url, beat_seconds=60.0), board_at(valkey.url)
    for rid in ("lost", "stays"):
        await here.announce(notice(rid, rid))
    # Nothing tells of it, as after an eviction.
    await admin.execute_command("DEL", "gw:{default}:fl:lost", "gw:{default}:sf:lost:k")
    for rid in ("lost", "stays"):
        assert here.end_at_once(rid, joinable=True)
        assert here.leave_at_once(rid, delivered=False)
    await eventually(lambda: is_seen(there, "lost", ended=True, watchers=0))
    assert await is_seen(there, "stays", ended=True, watchers=0)
    found = await there.join("lost", "k", orphans_only=True)
    assert found == notice("lost", "lost")
    await here.aclose()
    await there.aclose()


async def test_a_redis_that_has_lost_everything_is_told_of_many_flights_in_few_calls(
    valkey: Valkey, admin: Client
) -> None:
    """Else the leases of the first ones told end while the last ones are."""
    board = board_at(valkey.url)
    rids = [f"r{number}" for number in range(200)]
    await asyncio.gather(*(board.announce(notice(rid, rid)) for rid in rids))
    await admin.execute_command("FLUSHALL")
    await admin.execute_command("CONFIG", "RESETSTAT")

    async def all_are_told() -> bool:
        return len(await keys(admin, "gw:{default}:fl:*")) == len(rids)

    await eventually(all_are_told)
    said = await admin.execute_command("INFO", "commandstats")
    assert said["cmdstat_evalsha"]["calls"] < 30
    await board.aclose()


async def test_the_announcement_of_a_small_call_is_its_first_beat(
    valkey: Valkey, admin: Client
) -> None:
    board = board_at(valkey.url, beat_seconds=0.6)

    async def beat(rid: str) -> int:
        return int(await admin.execute_command("HGET", f"gw:{{default}}:fl:{rid}", "beat"))

    stream = replace(notice("stream", "s"), stream=True)
    await board.announce(notice("small"))
    await board.announce(stream)
    announced = {rid: await beat(rid) for rid in ("small", "stream")}

    async def is_beaten(rid: str) -> bool:
        return await beat(rid) > announced[rid]

    await eventually(lambda: is_beaten("stream"))
    assert not await is_beaten("small")
    await eventually(lambda: is_beaten("small"))
    await board.aclose()


async def test_many_flights_while_redis_is_away_leave_nothing_behind(valkey: Valkey) -> None:
    board = board_at(valkey.url)
    valkey.kill()
    for i in range(500):
        await board.announce(notice(f"r{i}"))
        await board.end(f"r{i}", joinable=i % 2 == 0)
        await board.leave(f"r{i}", delivered=i % 2 == 0)
    await eventually(lambda: not board.beating)
    await board.aclose()


async def test_full_it_still_knows_of_flights_and_takes_no_events(
    valkey: Valkey, admin: Client
) -> None:
    reasons: list[Reason] = []
    board = board_at(valkey.url, on_error=lambda reason, _: reasons.append(reason))
    await admin.execute_command("SET", "ballast", b"x" * 2 * MIB)
    await admin.execute_command("CONFIG", "SET", "maxmemory-policy", "noeviction")
    await admin.execute_command("CONFIG", "SET", "maxmemory", "1mb")
    await board.announce(notice("a"))
    await board.leave("a", delivered=False)
    assert await joined(board, orphans_only=True) == "a"
    await board.end("a", joinable=True)
    assert await board.take_over("a")
    assert reasons == []
    await board.add_events("a", 0, b"x" * MIB)
    assert reasons == [Reason.OOM]
    assert await board.events("a", 0) == b""
    await board.leave("a", delivered=True)
    assert await flights_left(admin) == []
    await board.aclose()


async def test_forgotten_scripts_are_sent_again(valkey: Valkey, admin: Client) -> None:
    board = board_at(valkey.url)
    for i in range(3):
        await admin.execute_command("SCRIPT", "FLUSH")
        await board.announce(notice(f"r{i}"))
        await admin.execute_command("SCRIPT", "FLUSH")
        assert await is_seen(board, f"r{i}", alive=True, watchers=1)
    assert not board.degraded
    await board.aclose()


async def test_callers_that_leave_are_not_counted_for_long(valkey: Valkey) -> None:
    board = board_at(valkey.url, lease_seconds=0.5)
    rids = [f"r{i}" for i in range(200)]
    for i, rid in enumerate(rids):
        await board.announce(notice(rid))
        leave = asyncio.create_task(board.leave(rid, delivered=True))
        join = asyncio.create_task(joined(board))
        for _ in range(i % 20):
            await asyncio.sleep(0)
        for task in (leave, join):
            task.cancel()
        _, found = await asyncio.gather(leave, join, return_exceptions=True)
        if isinstance(found, str):
            await board.leave(found, delivered=True)
        if leave.cancelled():
            await board.leave(rid, delivered=True)
        await board.end(rid, joinable=False)

    async def unwatched() -> bool:
        seen = [await board.look(rid) for rid in rids]
        return all(each is None or not each.watchers for each in seen)

    await eventually(unwatched)
    await eventually(lambda: not board.beating)
    assert await joined(board) is None
    # No connection was lost for good.
    await asyncio.gather(*(board.announce(notice(f"s{i}")) for i in range(100)))
    assert not board.degraded
    await board.aclose()


async def test_everything_in_redis_has_an_end(valkey: Valkey, admin: Client, boards: Pair) -> None:
    here, there = boards
    for rid in ("a", "b", "c"):
        await here.announce(notice(rid))
    await joined(there)
    await here.end("b", joinable=True)
    await here.end("c", joinable=False)
    await here.leave("c", delivered=False)
    await here.add_events("a", 0, os.urandom(1000))
    await there.want_events("a")
    await eventually(lambda: here.wanted("a"))
    left = {key: await admin.execute_command("PTTL", key) for key in await keys(admin)}
    assert left.pop(b"gw:{default}:board") == -1
    assert len(left) == 6
    assert all(0 < ms <= 2_000_000 for ms in left.values()), left
    assert 60_000 < left[b"gw:{default}:ev:a"] <= 120_000
    assert left[b"gw:{default}:fl:a"] > 900_000
    assert left[b"gw:{default}:fl:c"] <= 60_000


async def test_a_notice_that_cannot_be_read_is_none(valkey: Valkey, admin: Client) -> None:
    board = board_at(valkey.url)
    await board.announce(notice("a"))
    await admin.execute_command("HSET", "gw:{default}:fl:a", "notice", '{"rid": "a"}')
    other = board_at(valkey.url)
    assert await other.look("a") is None
    assert await joined(other) is None
    await board.aclose()
    await other.aclose()


@pytest.mark.parametrize("fault", ["kill", "freeze"])
async def test_a_cluster_loses_the_master_that_has_the_board(awake: Awake, fault: str) -> None:
    with run_cluster() as cluster:
        here, there = board_at(cluster.url, "one"), board_at(cluster.url, "two")
        await here.announce(notice("met"))
        await eventually(lambda: is_seen(there, "met", alive=True))
        for i in range(20):
            await here.announce(notice(f"r{i}", f"f{i}"))
        lost = cluster.master_of(PROBE)
        getattr(lost, fault)()
        waits = []
        for i in range(10):
            began = awake.time()
            await here.end(f"r{i}", joinable=True)
            await here.leave(f"r{i}", delivered=i % 2 == 0)
            waits.append(awake.time() - began)
        print(f"\ncluster, {fault}: the longest wait {max(waits) * 1000:.0f} ms")
        assert max(waits) < 0.75
        await eventually(lambda: not here.degraded and not there.degraded, 30)

        async def right() -> bool:
            seen = [await there.look(f"r{i}") for i in range(20)]
            kinds = Counter(
                None if each is None else (each.ended, each.alive, each.watchers) for each in seen
            )
            return kinds == {None: 5, (True, False, 0): 5, (False, True, 1): 10}

        await eventually(right, 30)
        assert await there.join("f1", "k", orphans_only=True) == notice("r1", "f1")
        if fault == "freeze":
            lost.thaw()
        await here.aclose()
        await there.aclose()
