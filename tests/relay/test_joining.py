"""What who comes late is shown of a flight in another process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.domain.call import Operation
from gateway.domain.errors import ResultExpired
from gateway.domain.ledger import Basis, Event, Outcome, Settlement
from gateway.domain.team import Caller, Key, Team
from gateway.ports import CachedMeta, FlightNotice, FlightSeen
from gateway.relay import joining
from gateway.relay.body import Room, Spool
from gateway.relay.desk import ResultDesk
from gateway.relay.flights import Client, Flight, Flights
from gateway.relay.joining import KEEPING_SECONDS, Joining
from gateway.relay.results import ResultPolicy, Results
from gateway.stores.blobs import DiskCache
from gateway.stores.memory_board import MemoryBoard
from gateway.stores.memory_ledger import MemoryStore
from tests.clock import StillClock
from tests.contract.stores import claim
from tests.valkey import eventually

PARTIAL = b"event: partial\n\n"
COMPLETED = b"event: completed\n\n"
PICTURE = b'{"created": 1, "data": []}'
MIB = 1024 * 1024


class Asked(MemoryBoard):
    """A board that counts how often a flight's process has looked whether it is to pass on."""

    looks = 0

    def wanted(self, rid: str) -> bool:
        self.looks += 1
        return super().wanted(rid)


async def picture() -> AsyncIterator[bytes]:
    yield PICTURE


class Late(MemoryBoard):
    """A board on which a flight ends just before it is looked at, its answer kept."""

    def __init__(self, clock: StillClock, results: Results | None) -> None:
        super().__init__(clock, ttl_seconds=900)
        self._results = results
        self._at = clock.now()

    async def look(self, rid: str) -> FlightSeen | None:
        if self._results is not None:
            meta = CachedMeta(
                stored_at=self._at, cost=10, images=1, model_served="m", upstream="openai",
                size_bytes=len(PICTURE), team="growth", operation="generation",
            )  # fmt: skip
            await self._results.keep(rid, meta, picture(), idempotent=False)
        await self.end(rid, joinable=True)
        return await super().look(rid)


def notice_of(clock: StillClock) -> FlightNotice:
    at = clock.now()
    return FlightNotice("req_1", "mark", "growth", "k1", "generation", "model", True, at)


@pytest.mark.parametrize("is_kept", [True, False])
async def test_what_is_put_away_between_two_looks_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_kept: bool
) -> None:
    """The results are asked first, then the board, which says that it is over: it is not lost."""
    monkeypatch.setattr(joining, "POLL_SECONDS", 0.01)
    # The clock stands still: nobody waits longer for what is being put away.
    monkeypatch.setattr(joining, "KEEPING_SECONDS", 0.0)
    clock, flights, store = StillClock(), Flights(), MemoryStore()
    results = Results(DiskCache(tmp_path, clock, max_bytes=MIB), ResultPolicy())
    board = Late(clock, results if is_kept else None)
    await board.announce(replace(notice_of(clock), stream=False))
    await store.ledger.reserve(claim("req_1"))
    settled = Settlement("req_1", Event.SETTLE, Outcome.DELIVERED, Basis.USAGE, cost=10)
    await store.ledger.settle(replace(settled, at=clock.now()))
    passing = Joining(
        flights=flights,
        board=board,
        results=results,
        ledger=store.ledger,
        books=store.books,
        clock=clock,
        keep_alive_seconds=15,
        shared=True,
    )
    follows = passing.follow(
        "req_1", "growth", operation=Operation.GENERATION, stream=False, client=Client()
    )
    if is_kept:
        found = await follows
        assert b"".join([chunk async for chunk in found.body()]) == PICTURE
    else:
        with pytest.raises(ResultExpired, match="paid for"):
            await follows


@pytest.mark.parametrize("is_kept", [True, False])
async def test_the_desk_looks_again_before_it_says_that_a_result_is_gone(
    tmp_path: Path, is_kept: bool
) -> None:
    clock, store = StillClock(), MemoryStore()
    results = Results(DiskCache(tmp_path, clock, max_bytes=MIB), ResultPolicy())
    board = Late(clock, results if is_kept else None)
    await store.ledger.reserve(claim("req_1"))
    settled = Settlement("req_1", Event.SETTLE, Outcome.DELIVERED, Basis.USAGE, cost=10)
    await store.ledger.settle(replace(settled, at=clock.now()))
    clock.advance(KEEPING_SECONDS + 1)
    flights = Flights()
    passing = Joining(
        flights=flights,
        board=board,
        results=results,
        ledger=store.ledger,
        books=store.books,
        clock=clock,
        keep_alive_seconds=15,
        shared=True,
    )
    desk = ResultDesk(
        results=results,
        flights=flights,
        board=board,
        books=store.books,
        joining=passing,
        clock=clock,
        policy=ResultPolicy(),
    )
    fetches = desk.fetch(Caller(Team("growth"), Key("k1", "growth")), "req_1", 0.0, Client())
    if is_kept:
        head = (await fetches).head
        assert head.status == 200
        assert b"".join([chunk async for chunk in head.body()]) == PICTURE
    else:
        with pytest.raises(ResultExpired, match="paid for"):
            await fetches


async def test_the_end_of_a_stream_is_not_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept by then, and whoever watches would else have it twice."""
    monkeypatch.setattr(joining, "PASS_ON_SECONDS", 0.01)
    clock = StillClock()
    board, flights, store = Asked(clock, ttl_seconds=900), Flights(), MemoryStore()
    passing = Joining(
        flights=flights,
        board=board,
        results=Results(None, ResultPolicy()),
        ledger=store.ledger,
        books=store.books,
        clock=clock,
        keep_alive_seconds=15,
        shared=True,
    )
    flight = Flight(notice_of(clock), Client())
    spool = Spool(Room(10_000, 10_000, tmp_path))
    await passing.announce(flight)
    passing.begun(flight, spool)
    await board.want_events("req_1")
    await spool.write(PARTIAL)
    spool.publish()
    looked = board.looks
    await eventually(lambda: board.looks > looked + 1)
    assert await board.events("req_1", 0) == PARTIAL
    await spool.write(COMPLETED)
    flight.ends_at = spool.published
    spool.publish()
    looked = board.looks
    await eventually(lambda: board.looks > looked + 1)
    assert await board.events("req_1", 0) == PARTIAL
    flight.over.set()
    spool.finish()
    spool.close()
    async with asyncio.timeout(10):
        await flights.idle()
