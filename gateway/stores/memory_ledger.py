"""A store in this process's memory, for tests: its ledger, and all its views together.

Nothing survives the process, so nothing here is durable; in all else it keeps the promises of its
ports.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from gateway.domain.call import Usage
from gateway.domain.ledger import (
    Balance,
    Claim,
    Claimed,
    Denied,
    Entry,
    Event,
    Held,
    Line,
    Replay,
    Reroute,
    Settlement,
    State,
    UsageRow,
)
from gateway.domain.money import Money
from gateway.domain.transition import (
    KEY_LIFETIME,
    REROUTED,
    OnConflict,
    by_model,
    contradicts,
    correction,
    expiry,
    ignore_conflict,
    no_room,
    no_room_elsewhere,
    replay_by_model,
    rerouted,
    settled_part,
    transition,
    usage_day,
    yields_key,
)
from gateway.ports import NotKnown
from gateway.stores.memory_books import MemoryBooks, MemoryUpkeep
from gateway.stores.memory_directory import MemoryDirectory
from gateway.stores.memory_ownership import MemoryOwnership
from gateway.stores.memory_rows import MemoryHold, MemoryRows
from gateway.stores.rows import detail_of, reroute_detail


class MemoryStore:
    """``Store`` without durability. ``on_conflict`` hears of a repeat with another amount."""

    def __init__(self, on_conflict: OnConflict = ignore_conflict) -> None:
        self.rows = MemoryRows()
        self.ledger = MemoryLedger(self.rows, on_conflict)
        self.books = MemoryBooks(self.rows)
        self.upkeep = MemoryUpkeep(self.rows)
        self.directory = MemoryDirectory()
        self.ownership = MemoryOwnership(self.rows)

    @property
    def clock_skew_seconds(self) -> float:
        return 0.0

    async def aclose(self) -> None:
        await asyncio.sleep(0)


class MemoryLedger:
    """``Ledger`` without durability."""

    def __init__(self, rows: MemoryRows, on_conflict: OnConflict) -> None:
        self._rows = rows
        self._on_conflict = on_conflict

    async def reserve(self, claim: Claim) -> Held | Denied | Claimed:
        if claim.bound < 0:
            raise ValueError("a bound is never negative")
        await asyncio.sleep(0)
        known = self._rows.holds.get(claim.rid)
        if known is not None:
            return Held(claim.rid, self._rows.read(known.accounts), duplicate=True)
        if claim.idempotency_key is not None:
            key = (claim.team, claim.idempotency_key)
            claimed = self._claimed(key, claim.fingerprint, claim.at, claim.repeat_unknown)
            if claimed is not None:
                return claimed
        denied = no_room(claim.lines, self._balances(claim.lines), claim.bound)
        if denied is not None:
            return denied
        hold = MemoryHold(claim, tuple(dict.fromkeys(line.account for line in claim.lines)))
        self._rows.holds[claim.rid] = hold
        if claim.idempotency_key is not None:
            self._rows.keys[claim.team, claim.idempotency_key] = claim.rid
        self._rows.add(hold.accounts, pending=claim.bound, posted=0)
        self._rows.write_journal(claim.at, claim.rid, State.HELD.value, pending=claim.bound)
        return Held(claim.rid, self._rows.read(line.account for line in claim.lines))

    async def claimed(
        self, team: str, idempotency_key: str, fingerprint: str, at: datetime
    ) -> Claimed | None:
        await asyncio.sleep(0)
        return self._claimed((team, idempotency_key), fingerprint, at)

    async def reroute(self, reroute: Reroute) -> Held | Denied:
        if reroute.bound < 0:
            raise ValueError("a bound is never negative")
        await asyncio.sleep(0)
        rid = reroute.rid
        hold = self._rows.holds.get(rid)
        bump = None
        if hold is not None:
            bump = rerouted(hold.state, hold.claim.bound, hold.route, reroute)
        if hold is None or bump is None:
            raise NotKnown(f"no reservation {rid} is held, that could go elsewhere")
        balances = self._balances(reroute.lines)
        denied = no_room_elsewhere(reroute, bump, hold.accounts, balances)
        if denied is not None:
            return denied
        if bump.applied:
            detail = json.loads(reroute_detail(reroute, hold.route))
            hold.go(reroute.route, bump.bound)
            self._rows.add(hold.accounts, bump.pending, posted=0)
            self._rows.write_journal(reroute.at, rid, REROUTED, pending=bump.pending, detail=detail)
        after = self._rows.read(line.account for line in reroute.lines)
        return Held(rid, after, duplicate=not bump.applied)

    async def settle(self, settlement: Settlement) -> Entry:
        if settlement.cost < 0:
            raise ValueError("a cost is never negative")
        await asyncio.sleep(0)
        hold = self._rows.holds.get(settlement.rid)
        if hold is None:
            if settlement.event is Event.SETTLE:
                raise NotKnown(f"no reservation {settlement.rid} to settle")
            return Entry(settlement.rid, State.VOIDED, bound=0, cost=0, applied=False)
        entry = self._apply(hold, settlement, settlement.at)
        if not entry.applied and contradicts(
            entry.state, settlement.event, entry.cost, settlement.cost
        ):
            self._on_conflict(entry, settlement)
        return entry

    async def replay(self, replay: Replay) -> None:
        await asyncio.sleep(0)
        day = usage_day(replay.at)
        self._rows.count(day, replay.team, replay.key_id, replay_by_model(replay))

    async def sweep(
        self, now: datetime, limit: int = 100, silent_before: datetime | None = None
    ) -> list[Entry]:
        await asyncio.sleep(0)
        stale = [
            key
            for key, rid in self._rows.keys.items()
            if self._rows.holds[rid].claim.at < now - KEY_LIFETIME
        ]
        for key in stale:
            del self._rows.keys[key]
        dead = {
            worker
            for worker, beat_at in self._rows.workers.items()
            if silent_before is not None and beat_at < silent_before
        }
        over = (
            hold
            for hold in self._rows.holds.values()
            if hold.state is State.HELD
            and (hold.claim.lease_ends < now or hold.claim.worker in dead)
        )
        oldest = sorted(over, key=lambda hold: (hold.claim.lease_ends, hold.claim.rid))[:limit]
        return [self._apply(hold, expiry(hold.claim.rid, hold.claim.bound), now) for hold in oldest]

    async def balances(self, lines: Sequence[Line]) -> list[Balance]:
        await asyncio.sleep(0)
        return list(self._rows.read(line.account for line in lines))

    async def usage(
        self, since: str | None = None, until: str | None = None, team: str | None = None
    ) -> list[UsageRow]:
        await asyncio.sleep(0)
        return [
            UsageRow(*row, *counts)
            for row, counts in sorted(self._rows.usage.items())
            if (counts.requests > 0 or counts.images != 0 or counts.cost != 0)
            and (since is None or row[0] >= since)
            and (until is None or row[0] <= until)
            and (team is None or row[1] == team)
        ]

    async def open_holds(self) -> int:
        await asyncio.sleep(0)
        return sum(hold.state is State.HELD for hold in self._rows.holds.values())

    async def unresolved(self) -> Money:
        await asyncio.sleep(0)
        return sum(hold.cost for hold in self._rows.holds.values() if hold.state is State.EXPIRED)

    async def ping(self) -> None:
        await asyncio.sleep(0)

    async def aclose(self) -> None:
        await asyncio.sleep(0)

    def _balances(self, lines: Sequence[Line]) -> dict[str, Balance]:
        accounts = [line.account for line in lines]
        return dict(zip(accounts, self._rows.read(accounts), strict=True))

    def _claimed(
        self, key: tuple[str, str], fingerprint: str, at: datetime, repeat_unknown: bool = False
    ) -> Claimed | None:
        """Whose an idempotency key (of a team) is, unless that is too long ago, or it yields."""
        rid = self._rows.keys.get(key)
        if rid is None or self._rows.holds[rid].claim.at < at - KEY_LIFETIME:
            return None
        holder = self._rows.holds[rid]
        same = holder.claim.fingerprint == fingerprint
        if yields_key(holder.state, same, repeat_unknown):
            return None
        return Claimed(rid, holder.state, same)

    def _apply(self, hold: MemoryHold, settlement: Settlement, at: datetime | None) -> Entry:
        claim = hold.claim
        move = transition(hold.state, settlement.event, claim.bound, hold.cost, settlement.cost)
        if move.applied:
            gained = correction(hold.state, hold.cost, hold.flags, move, settlement)
            drawn = settled_part(move, settlement)
            gains = by_model(claim.model, gained, drawn)
            self._rows.count(hold.day, claim.team, claim.key_id, gains)
            self._rows.add(hold.accounts, move.pending, move.posted)
            self._rows.write_journal(
                at,
                claim.rid,
                move.state.value,
                pending=move.pending,
                posted=move.posted,
                detail=json.loads(detail_of(settlement)),
            )
            hold.state, hold.cost, hold.flags = move.state, move.cost, settlement.flags
            hold.outcome, hold.basis = settlement.outcome, settlement.basis
            hold.drawn = None if drawn is None else replace(drawn, usage=Usage())
        return self._rows.entry_of(hold, move)
