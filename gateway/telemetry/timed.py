"""The ledger, timed as those who wait for it see it: a batched writer's queue is part of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from gateway.domain.ledger import (
    Balance,
    Claim,
    Claimed,
    Denied,
    Entry,
    Held,
    Line,
    Replay,
    Reroute,
    Settlement,
    UsageRow,
)
from gateway.domain.money import Money
from gateway.ports import Clock, Ledger

TIMED = ("reserve", "reroute", "settle")
"""The transactions of a call."""


class TimedLedger(Ledger):
    """The port ``Ledger``, as ``ledger`` keeps it. ``took`` hears of each transaction of a call,
    ``reserve``, ``reroute`` or ``settle``, how many seconds it took, also where it failed;
    ``settled`` of what each settlement led to."""

    def __init__(
        self,
        ledger: Ledger,
        clock: Clock,
        took: Callable[[str, float], None],
        settled: Callable[[Entry], None] = lambda entry: None,
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._took = took
        self._settled = settled

    async def reserve(self, claim: Claim) -> Held | Denied | Claimed:
        began = self._clock.monotonic()
        try:
            return await self._ledger.reserve(claim)
        finally:
            self._took("reserve", self._clock.monotonic() - began)

    async def reroute(self, reroute: Reroute) -> Held | Denied:
        began = self._clock.monotonic()
        try:
            return await self._ledger.reroute(reroute)
        finally:
            self._took("reroute", self._clock.monotonic() - began)

    async def settle(self, settlement: Settlement) -> Entry:
        began = self._clock.monotonic()
        try:
            entry = await self._ledger.settle(settlement)
        finally:
            self._took("settle", self._clock.monotonic() - began)
        self._settled(entry)
        return entry

    async def claimed(
        self, team: str, idempotency_key: str, fingerprint: str, at: datetime
    ) -> Claimed | None:
        return await self._ledger.claimed(team, idempotency_key, fingerprint, at)

    async def replay(self, replay: Replay) -> None:
        await self._ledger.replay(replay)

    async def sweep(
        self, now: datetime, limit: int = 100, silent_before: datetime | None = None
    ) -> list[Entry]:
        return await self._ledger.sweep(now, limit, silent_before)

    async def balances(self, lines: Sequence[Line]) -> list[Balance]:
        return await self._ledger.balances(lines)

    async def usage(
        self, since: str | None = None, until: str | None = None, team: str | None = None
    ) -> list[UsageRow]:
        return await self._ledger.usage(since, until, team)

    async def open_holds(self) -> int:
        return await self._ledger.open_holds()

    async def unresolved(self) -> Money:
        return await self._ledger.unresolved()

    async def ping(self) -> None:
        await self._ledger.ping()

    async def aclose(self) -> None:
        await self._ledger.aclose()
