"""The ledger is timed as its callers wait for it, also where it fails them."""

from __future__ import annotations

import pytest

from gateway.domain.errors import LedgerUnavailable
from gateway.domain.ledger import Basis, Entry, Event, Outcome, Settlement
from gateway.ports import NotKnown
from gateway.stores.memory_ledger import MemoryStore
from gateway.telemetry.timed import TimedLedger
from tests.clock import StillClock


async def test_a_transaction_is_timed_however_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, clock, took = MemoryStore().ledger, StillClock(), list[tuple[str, float]]()
    timed = TimedLedger(ledger, clock, lambda name, seconds: took.append((name, seconds)))
    settlement = Settlement("req_1", Event.SETTLE, Outcome.DELIVERED, Basis.USAGE, 5, images=1)
    with pytest.raises(NotKnown):
        await timed.settle(settlement)

    async def slow(settlement: Settlement) -> Entry:
        clock.advance(2.5)
        raise LedgerUnavailable("It is away.")

    monkeypatch.setattr(ledger, "settle", slow)
    with pytest.raises(LedgerUnavailable):
        await timed.settle(settlement)
    assert await timed.open_holds() == 0
    await timed.ping()
    assert took == [("settle", 0.0), ("settle", 2.5)]
