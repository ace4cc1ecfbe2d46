"""What a running stream shows to watchers in other processes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway.ports import FlightNotice
from gateway.relay import joining
from gateway.relay.body import Room, Spool
from gateway.relay.flights import Client, Flight, Flights
from gateway.relay.joining import Joining
from gateway.relay.results import ResultPolicy, Results
from gateway.stores.memory_board import MemoryBoard
from gateway.stores.memory_ledger import MemoryStore
from tests.clock import StillClock
from tests.valkey import eventually

PARTIAL = b"event: partial\n\n"
COMPLETED = b"event: completed\n\n"


class Asked(MemoryBoard):
    """A board that counts how often a flight's process has looked whether it is to pass on."""

    looks = 0

    def wanted(self, rid: str) -> bool:
        self.looks += 1
        return super().wanted(rid)


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
    at = clock.now()
    notice = FlightNotice("req_1", "mark", "growth", "k1", "generation", "model", True, at)
    flight = Flight(notice, Client())
    spool = Spool(Room(10_000, 10_000, tmp_path))
    await passing.announce(flight, spool)
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
