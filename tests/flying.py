"""A gateway whose flights can be watched from a test: who waits for each, as events, not by time.

::

    async with fly() as house:
        ...
        await house.watched_by(0)        # its only client has left
        await house.settled(purchases=1)
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from PIL import Image

import gateway.app
import gateway.assembly_stores
from gateway.domain.ledger import UsageRow
from gateway.ports import Clock, FlightNotice, Store
from gateway.sandbox.rules import Rule
from gateway.sandbox.watch import Gate
from gateway.settings import Settings
from gateway.stores.memory_board import MemoryBoard
from tests.processes import bill
from tests.running import MODEL, GatewayUnderTest, Start

ASKED: dict[str, Any] = {
    "model": MODEL,
    "prompt": "A lighthouse",
    "quality": "low",
    "size": "1024x1024",
}
COST, BOUND, PARTIAL = 5_895_000, 6_100_000, 3_000_000
"""What that costs, what is held for it, and what each of its partial pictures costs beside."""
FRESH = {"cache-control": "no-cache"}
GENERATIONS = "/images/generations"
PICTURE_BYTES = 4000
WAIT_SECONDS = 30
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


class SeenBoard(MemoryBoard):
    """The board of one process, and an event whenever it is told something."""

    def __init__(self, clock: Clock, *, ttl_seconds: float) -> None:
        super().__init__(clock, ttl_seconds=ttl_seconds)
        self.flights: list[str] = []
        self.joined: list[str] = []
        """The flights that were joined, in order."""
        self.ended: list[str] = []
        self._news = asyncio.Event()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def announce(self, notice: FlightNotice) -> None:
        await super().announce(notice)
        self.flights.append(notice.rid)
        self._tell()

    async def join(
        self, fingerprint: str, key_id: str, *, orphans_only: bool
    ) -> FlightNotice | None:
        found = await super().join(fingerprint, key_id, orphans_only=orphans_only)
        if found is not None:
            self.joined.append(found.rid)
            self._tell()
        return found

    def leave_at_once(self, rid: str, *, delivered: bool) -> bool:
        left = super().leave_at_once(rid, delivered=delivered)
        self._tell()
        return left

    def progress_at_once(self, rid: str, partials: int) -> bool:
        seen = super().progress_at_once(rid, partials)
        self._tell()
        return seen

    def end_at_once(self, rid: str, *, joinable: bool) -> bool:
        ended = super().end_at_once(rid, joinable=joinable)
        self.ended.append(rid)
        self._tell()
        return ended

    def watchers(self, rid: str) -> int:
        flight = self.flight(rid)
        return 0 if flight is None else flight.watchers

    def partials(self, rid: str) -> int:
        flight = self.flight(rid)
        return 0 if flight is None else flight.partials

    async def until(self, true: Callable[[], bool]) -> None:
        """Waits for something that the board is told."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not true():
                await self._news.wait()


@dataclass
class House:
    """A gateway under test, and what is inside it."""

    gateway: GatewayUnderTest
    board: SeenBoard
    store: Store

    def rule(self, **changes: Any) -> None:
        """What the upstream does from now on; pictures need no drawing."""
        self.gateway.sandbox.rules.clear()
        self.gateway.sandbox.rules.add(Rule(**{"payload_bytes": PICTURE_BYTES, **changes}))

    def hold_back(self, **changes: Any) -> Gate:
        """Pictures that are not made before the gate is opened."""
        gate = Gate()
        self.rule(wait_for=gate, **changes)
        return gate

    @property
    def purchases(self) -> int:
        return len(self.gateway.sandbox.journal)

    async def flying(self, count: int = 1) -> list[str]:
        """The ids of the flights, once there are ``count``."""
        await self.board.until(lambda: len(self.board.flights) >= count)
        return self.board.flights

    async def watched_by(self, count: int, flight: int = 0) -> None:
        """Waits until a flight has so many clients."""
        await self.flying(flight + 1)
        rid = self.board.flights[flight]
        await self.board.until(lambda: self.board.watchers(rid) == count)

    async def joins(self, count: int) -> None:
        await self.board.until(lambda: len(self.board.joined) >= count)

    async def over(self, count: int = 1) -> None:
        """Waits until so many flights have ended, and what they ended with is kept."""
        await self.board.until(lambda: len(self.board.ended) >= count)

    async def settled(
        self, *, purchases: int, cached: int | None = None, cost: int | None = None
    ) -> UsageRow:
        """All that was bought is booked, once, at what the upstream bills; nothing else is. The
        sum of the usage."""
        await self.gateway.gateway.flights.idle()
        if cached is not None:
            await self._counted(cached)
        journal = self.gateway.sandbox.journal
        assert journal.billed_requests == purchases
        assert await self.gateway.gateway.ledger.open_holds() == 0
        assert await self.store.books.audit() == []
        rows = await self.gateway.usage()
        spent = sum(row.cost for row in rows)
        billed = sum(bill(record) for record in journal.billed) if cost is None else cost
        assert spent == billed
        row = UsageRow(
            "", "", "", "",
            requests=sum(row.requests for row in rows),
            cached_requests=sum(row.cached_requests for row in rows),
            cost=spent,
            avoided=sum(row.avoided for row in rows),
            unresolved=sum(row.unresolved for row in rows),
        )  # fmt: skip
        assert row.requests == purchases + row.cached_requests
        if cached is not None:
            assert row.cached_requests == cached
        return row

    async def _counted(self, cached: int) -> None:
        """Waits until so many answers that cost nothing are booked: each is when its client has
        it, behind whatever the ledger writes for those who wait."""
        while True:
            told = len(self.gateway.told.requests)
            assert await self.store.ledger.sweep(LONG_AGO) == []
            if sum(row.cached_requests for row in await self.gateway.usage()) >= cached:
                return
            await self.gateway.told.until(told + 1)


@dataclass
class _Inside:
    boards: list[SeenBoard] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)


Fly = Callable[..., contextlib.AbstractAsyncContextManager[House]]
"""Opens a house, with changes to its configuration."""


def flier(monkeypatch: pytest.MonkeyPatch, start: Start) -> Fly:
    """Opens gateways of which the inside can be seen."""
    inside = _Inside()
    open_store = gateway.assembly_stores.open_store

    def opening(settings: Settings) -> Store:
        inside.stores.append(open_store(settings))
        return inside.stores[-1]

    def board(
        settings: Settings, clock: Clock, *_: object, ttl_seconds: float, **__: object
    ) -> SeenBoard:
        inside.boards.append(SeenBoard(clock, ttl_seconds=ttl_seconds))
        return inside.boards[-1]

    monkeypatch.setattr(gateway.app, "open_store", opening)
    monkeypatch.setattr(gateway.app, "make_board", board)

    @contextlib.asynccontextmanager
    async def fly(changes: Mapping[str, Any] | None = None) -> AsyncIterator[House]:
        async with start(changes) as running:
            house = House(running, inside.boards[-1], inside.stores[-1])
            house.rule()
            yield house

    return fly


def a_picture(size_bytes: int) -> bytes:
    """A real PNG of about so many bytes."""
    side = int((size_bytes / 3) ** 0.5) + 1
    out = io.BytesIO()
    Image.effect_noise((side, side), 90).convert("RGB").save(out, "PNG", compress_level=0)
    return out.getvalue()
