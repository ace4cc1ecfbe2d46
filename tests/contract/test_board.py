"""What every board of flights promises: one process's own, and the one that all replicas share."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest

from gateway.ports import FlightBoard, FlightNotice
from gateway.stores.memory_board import MAX_EVENT_BYTES, MemoryBoard
from gateway.stores.redis_board import RedisBoard
from gateway.stores.redis_link import connect
from tests.clock import StillClock
from tests.redis_servers import Cluster
from tests.valkey import Valkey, eventually

TTL = 900.0
PIECE = 256 * 1024


@dataclass(frozen=True)
class Bench:
    """``there`` is the board of another process, where there are others."""

    here: FlightBoard
    there: FlightBoard
    advance: Callable[[float], None]
    clock: StillClock


@pytest.fixture(params=["memory", "redis", "cluster"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    clock = StillClock()
    if request.param == "memory":
        board = MemoryBoard(clock, ttl_seconds=TTL)
        yield Bench(board, board, clock.advance, clock)
        await board.aclose()
        return
    server: Valkey | Cluster = request.getfixturevalue(
        "valkey" if request.param == "redis" else "cluster"
    )
    if isinstance(server, Cluster):
        server.empty()
    else:
        client = connect(server.url, timeout=5.0)
        await client.execute_command("FLUSHALL")
        await client.aclose()
    boards = [
        RedisBoard(
            connect(server.url, timeout=5.0),
            clock,
            worker=f"w{i}",
            ttl_seconds=TTL,
            beat_seconds=0.05,
            deadline_seconds=5.0,
            offset=lambda: clock.monotonic() - 1000,
        )
        for i in range(2)
    ]
    yield Bench(boards[0], boards[1], clock.advance, clock)
    for shared in boards:
        # Nothing here may have been answered by the stand-in.
        assert not shared.degraded
        await shared.aclose()


def notice_of(
    bench: Bench, rid: str, fingerprint: str = "f", key_id: str = "k", stream: bool = False
) -> FlightNotice:
    now = bench.clock.now()
    return FlightNotice(rid, fingerprint, "growth", key_id, "generation", "flare", stream, now)


async def fly(bench: Bench, *rids: str, board: FlightBoard | None = None) -> None:
    for rid in rids:
        await (board or bench.here).announce(notice_of(bench, rid))


async def joined(
    board: FlightBoard, fingerprint: str = "f", key_id: str = "k", *, orphans_only: bool = False
) -> str | None:
    notice = await board.join(fingerprint, key_id, orphans_only=orphans_only)
    return notice.rid if notice is not None else None


async def watchers(board: FlightBoard, rid: str) -> int:
    seen = await board.look(rid)
    assert seen is not None
    return seen.watchers


async def test_a_flight_is_seen_from_everywhere(bench: Bench) -> None:
    notice = notice_of(bench, "a", stream=True)
    await bench.here.announce(notice)
    for board in (bench.here, bench.there):
        seen = await board.look("a")
        assert seen is not None
        assert (seen.notice, seen.ended, seen.alive) == (notice, False, True)
        assert (seen.watchers, seen.partials) == (1, 0)
        assert await board.look("never") is None
    assert notice.at.tzinfo is not None


async def test_a_watched_flight_is_joined_by_a_retry_alone(bench: Bench) -> None:
    await fly(bench, "a")
    assert await joined(bench.there, orphans_only=True) is None
    assert await joined(bench.there) == "a"
    assert await watchers(bench.here, "a") == 2
    for other in (("g", "k"), ("f", "k2")):
        assert await joined(bench.there, *other) is None


async def test_an_orphan_is_joined_by_anybody_and_then_watched(bench: Bench) -> None:
    await fly(bench, "a")
    await bench.here.leave("a", delivered=False)
    assert await watchers(bench.there, "a") == 0
    assert await joined(bench.there, orphans_only=True) == "a"
    assert await watchers(bench.here, "a") == 1
    assert await joined(bench.there, orphans_only=True) is None
    await bench.there.leave("a", delivered=False)
    assert await joined(bench.here, orphans_only=True) == "a"


async def test_orphans_come_first_and_of_several_the_oldest(bench: Bench) -> None:
    for rid in ("a", "b", "c", "d"):
        await fly(bench, rid)
        bench.advance(1)
    await bench.here.leave("c", delivered=False)
    await bench.here.leave("b", delivered=False)
    assert [await joined(bench.there) for _ in range(3)] == ["b", "c", "a"]
    await bench.here.end("d", joinable=True)
    await bench.here.leave("d", delivered=False)
    assert await joined(bench.there) == "d"


async def test_what_ended_and_was_not_handed_over_is_found_for_its_time(bench: Bench) -> None:
    await fly(bench, "a")
    bench.advance(600)
    await bench.here.end("a", joinable=True)
    await bench.here.leave("a", delivered=False)
    seen = await bench.there.look("a")
    assert seen is not None
    assert (seen.ended, seen.alive, seen.watchers) == (True, False, 0)
    bench.advance(TTL - 1)
    assert await joined(bench.there, orphans_only=True) == "a"
    await bench.there.leave("a", delivered=False)
    bench.advance(2)
    assert await joined(bench.there) is None


async def test_one_that_is_being_handed_over_is_found_by_a_retry(bench: Bench) -> None:
    await fly(bench, "a")
    await bench.here.end("a", joinable=True)
    assert await joined(bench.there, orphans_only=True) is None
    assert await joined(bench.there) == "a"


@pytest.mark.parametrize("order", ["end first", "leave first"])
async def test_what_was_handed_over_is_forgotten(bench: Bench, order: str) -> None:
    await fly(bench, "a")
    if order == "end first":
        await bench.here.end("a", joinable=True)
    await bench.here.leave("a", delivered=True)
    assert await joined(bench.there) is None
    if order == "leave first":
        assert await watchers(bench.there, "a") == 0
        await bench.here.end("a", joinable=True)
    assert await bench.there.look("a") is None
    assert await joined(bench.there) is None
    await fly(bench, "b")
    assert await joined(bench.there) == "b"


async def test_what_was_not_billed_is_not_joined_but_shown_to_who_watches(bench: Bench) -> None:
    await fly(bench, "a")
    assert await joined(bench.there) == "a"
    await bench.here.end("a", joinable=False)
    await bench.here.leave("a", delivered=False)
    assert await joined(bench.there) is None
    seen = await bench.there.look("a")
    assert seen is not None
    assert (seen.ended, seen.watchers) == (True, 1)
    await bench.there.leave("a", delivered=False)
    assert await bench.there.look("a") is None


async def test_delivered_to_another_process_it_is_over_everywhere(bench: Bench) -> None:
    await fly(bench, "a")
    await bench.here.leave("a", delivered=False)
    assert await joined(bench.there) == "a"
    await bench.here.end("a", joinable=True)
    await bench.there.leave("a", delivered=True)
    assert await bench.here.look("a") is None
    assert await joined(bench.here) is None


async def test_whoever_has_the_answer_without_having_joined_says_so(bench: Bench) -> None:
    await fly(bench, "a")
    await bench.here.end("a", joinable=True)
    await bench.here.leave("a", delivered=False)
    await bench.there.leave("a", delivered=True)
    assert await joined(bench.here) is None
    await bench.there.leave("never", delivered=True)
    assert await bench.there.look("never") is None


async def test_a_running_one_is_joined_until_it_is_fifteen_minutes_old(bench: Bench) -> None:
    await fly(bench, "a")
    await bench.here.leave("a", delivered=False)
    bench.advance(899)
    assert await joined(bench.there) == "a"
    await bench.there.leave("a", delivered=False)
    bench.advance(2)
    assert await joined(bench.there) is None
    # What comes of it in the end is found again.
    await bench.here.end("a", joinable=True)
    assert await joined(bench.there) == "a"


@pytest.mark.parametrize("ended", [False, True], ids=["running", "ended"])
async def test_many_at_once_find_as_many_orphans_as_there_are(bench: Bench, ended: bool) -> None:
    rids = [f"r{i:02}" for i in range(20)]
    for rid in rids:
        await fly(bench, rid)
        if ended:
            await bench.here.end(rid, joinable=True)
        await bench.here.leave(rid, delivered=False)
    boards = (bench.here, bench.there)
    found = await asyncio.gather(
        *(joined(boards[i % 2], orphans_only=True) for i in range(len(rids) + 30))
    )
    assert Counter(found) == Counter([*rids, *[None] * 30])
    for rid in rids:
        assert await watchers(bench.here, rid) == 1


async def test_retries_at_once_take_the_orphans_before_they_share(bench: Bench) -> None:
    for rid in ("a", "b"):
        await fly(bench, rid)
        await bench.here.leave(rid, delivered=False)
        bench.advance(1)
    found = await asyncio.gather(*(joined(bench.there) for _ in range(3)))
    assert Counter(found) == {"a": 2, "b": 1}


async def test_watchers_are_never_less_than_none(bench: Bench) -> None:
    await fly(bench, "a")
    for _ in range(3):
        await bench.here.leave("a", delivered=False)
    assert await watchers(bench.there, "a") == 0
    assert await joined(bench.there) == "a"
    assert await watchers(bench.there, "a") == 1


async def test_saying_it_twice_changes_nothing(bench: Bench) -> None:
    await fly(bench, "a", "a")
    assert await watchers(bench.there, "a") == 1
    await bench.here.end("a", joinable=True)
    await bench.here.end("a", joinable=False)
    await fly(bench, "a")
    await bench.here.leave("a", delivered=False)
    assert await joined(bench.there) == "a"
    seen = await bench.here.look("a")
    assert seen is not None
    assert seen.ended
    await bench.here.end("never", joinable=True)
    assert await bench.here.look("never") is None


async def test_partials_are_counted_up(bench: Bench) -> None:
    await fly(bench, "a")
    await bench.here.progress("a", 2)
    await bench.here.progress("a", 1)
    await bench.here.progress("never", 1)

    async def two() -> bool:
        seen = await bench.there.look("a")
        return seen is not None and seen.partials == 2

    await eventually(two)


async def test_one_flight_is_taken_over_once(bench: Bench) -> None:
    await fly(bench, "a", "b")
    boards = (bench.here, bench.there)
    answers = await asyncio.gather(*(boards[i % 2].take_over("a") for i in range(20)))
    assert Counter(answers) == {True: 1, False: 19}
    assert await bench.there.take_over("b")
    assert not await bench.here.take_over("b")
    assert not await bench.here.take_over("never")


async def test_events_are_wanted_once_somebody_says_so(bench: Bench) -> None:
    await fly(bench, "a", "b")
    assert not bench.here.wanted("a")
    await bench.there.want_events("a")
    await bench.there.want_events("never")
    await eventually(lambda: bench.here.wanted("a"))
    assert not bench.here.wanted("b")
    assert not bench.here.wanted("never")
    await bench.here.leave("a", delivered=False)
    await bench.here.end("a", joinable=False)
    assert not bench.here.wanted("a")


async def test_events_are_read_as_far_as_they_are_there(bench: Bench) -> None:
    data = os.urandom(5 * PIECE + 17)
    assert await bench.there.events("a", 0) == b""
    await bench.here.add_events("a", 0, data[:1000])
    assert await bench.there.events("a", 0) == data[:1000]
    assert await bench.there.events("a", 400) == data[400:1000]
    assert await bench.there.events("a", 1000) == b""
    assert await bench.there.events("a", 5000) == b""
    await bench.here.add_events("a", 2000, data[2000:])
    # There is a gap before it.
    assert await bench.there.events("a", 0) == data[:1000]
    assert await bench.there.events("a", 1999) == b""
    await bench.here.add_events("a", 1000, data[1000:2000])
    got = b""
    while more := await bench.there.events("a", len(got)):
        assert len(more) < 8 * PIECE
        got += more
    assert got == data
    assert await bench.there.events("b", 0) == b""


async def test_events_added_twice_are_there_once(bench: Bench) -> None:
    data = os.urandom(3000)
    for content in (data[:2000], data[:2000], data[:100], b"", data[:3000]):
        await bench.here.add_events("a", 0, content)
    await bench.here.add_events("a", 1500, data[1500:2500])
    assert await bench.there.events("a", 0) == data
    assert await bench.there.events("a", 1500) in (data[1500:2500], data[1500:])


async def test_the_memory_board_forgets_what_says_nothing_any_more() -> None:
    clock = StillClock()
    board = MemoryBoard(clock, ttl_seconds=TTL)
    bench = Bench(board, board, clock.advance, clock)
    for i in range(100):
        await fly(bench, f"delivered{i}", f"free{i}")
        await board.end(f"delivered{i}", joinable=True)
        await board.leave(f"delivered{i}", delivered=True)
        await board.leave(f"free{i}", delivered=False)
        await board.end(f"free{i}", joinable=False)
        await board.add_events(f"delivered{i}", 0, b"x")
    assert len(board) == 100
    clock.advance(121)
    assert await board.events("delivered0", 0) == b""
    assert len(board) == 0
    await fly(bench, "watched", "left")
    for rid in ("watched", "left"):
        await board.end(rid, joinable=True)
    await board.leave("left", delivered=False)
    clock.advance(TTL + 1)
    assert await joined(board) is None
    assert "left" not in board
    # Who still takes it may look, and then it is gone too.
    assert await watchers(board, "watched") == 1
    await board.leave("watched", delivered=False)
    assert len(board) == 0


async def test_the_memory_board_keeps_the_youngest_of_too_many() -> None:
    clock = StillClock()
    board = MemoryBoard(clock, ttl_seconds=TTL, max_flights=3)
    bench = Bench(board, board, clock.advance, clock)
    for i in range(10):
        await fly(bench, f"r{i}")
        await board.leave(f"r{i}", delivered=False)
    for i in range(9):
        await board.end(f"r{i}", joinable=True)
    assert [rid for rid in (f"r{i}" for i in range(10)) if rid in board] == ["r6", "r7", "r8", "r9"]
    assert [await joined(board) for _ in range(2)] == ["r6", "r7"]


async def test_a_stream_is_kept_up_to_a_bound() -> None:
    board = MemoryBoard(StillClock(), ttl_seconds=TTL)
    block = bytes(MAX_EVENT_BYTES // 4)
    for i in range(5):
        await board.add_events("a", i * len(block), block)
    assert len(await board.events("a", 3 * len(block))) == len(block)
    assert await board.events("a", 4 * len(block)) == b""
