"""The ledger and the directory in this process's memory: for tests.

Nothing survives the process, so nothing here is durable; in all else they keep the promises of
their ports. Every method gives way to other tasks once before it touches anything, because a
store that never awaits hides what cancellation and concurrency do to its callers. After that it
runs to its end without a break, which is its lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

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
    Settlement,
    State,
    UsageRow,
)
from gateway.domain.money import Money
from gateway.domain.team import Key, Team
from gateway.domain.transition import (
    KEY_LIFETIME,
    Counts,
    OnConflict,
    contradicts,
    correction,
    counted_replay,
    expiry,
    ignore_conflict,
    transition,
    usage_day,
)
from gateway.ports import AlreadyExists, NotKnown

NOTHING = Balance()


@dataclass(slots=True)
class _Hold:
    """A claim and where it has got to. ``accounts`` are those of its lines, each once."""

    claim: Claim
    accounts: tuple[str, ...]
    state: State = State.HELD
    cost: Money = 0
    flags: tuple[str, ...] = ()


class MemoryLedger:
    """``Ledger`` without durability. ``on_conflict`` hears of a repeat with another amount."""

    def __init__(self, on_conflict: OnConflict = ignore_conflict) -> None:
        self._on_conflict = on_conflict
        self._holds: dict[str, _Hold] = {}
        self._keys: dict[tuple[str, str], str] = {}
        """(team, idempotency key) to the rid it stands for."""
        self._balances: dict[str, Balance] = {}
        self._usage: dict[tuple[str, str, str, str], Counts] = {}

    async def reserve(self, claim: Claim) -> Held | Denied | Claimed:
        if claim.bound < 0:
            raise ValueError("a bound is never negative")
        await asyncio.sleep(0)
        known = self._holds.get(claim.rid)
        if known is not None:
            return Held(claim.rid, self._read(known.accounts), duplicate=True)
        holder = self._holder_of_key(claim)
        if holder is not None:
            same = holder.claim.fingerprint == claim.fingerprint
            if holder.state is not State.VOIDED or not same:
                return Claimed(holder.claim.rid, holder.state, same)
        for line in claim.lines:
            balance = self._balances.get(line.account, NOTHING)
            amount = line.limit.amount
            if amount is not None and balance.used + claim.bound > amount:
                return Denied(line, balance)
        hold = _Hold(claim, tuple(dict.fromkeys(line.account for line in claim.lines)))
        self._holds[claim.rid] = hold
        if claim.idempotency_key is not None:
            self._keys[claim.team, claim.idempotency_key] = claim.rid
        self._add(hold.accounts, pending=claim.bound, posted=0)
        return Held(claim.rid, self._read(line.account for line in claim.lines))

    async def settle(self, settlement: Settlement) -> Entry:
        if settlement.cost < 0:
            raise ValueError("a cost is never negative")
        await asyncio.sleep(0)
        hold = self._holds.get(settlement.rid)
        if hold is None:
            if settlement.event is Event.SETTLE:
                raise NotKnown(f"no reservation {settlement.rid} to settle")
            return Entry(settlement.rid, State.VOIDED, bound=0, cost=0, applied=False)
        entry = self._apply(hold, settlement)
        if not entry.applied and contradicts(
            entry.state, settlement.event, entry.cost, settlement.cost
        ):
            self._on_conflict(entry, settlement)
        return entry

    async def replay(self, replay: Replay) -> None:
        await asyncio.sleep(0)
        row = (usage_day(replay.at), replay.team, replay.key_id, replay.model)
        self._count(row, counted_replay(replay))

    async def sweep(self, now: datetime, limit: int = 100) -> list[Entry]:
        await asyncio.sleep(0)
        stale = [
            key for key, rid in self._keys.items() if self._holds[rid].claim.at < now - KEY_LIFETIME
        ]
        for key in stale:
            del self._keys[key]
        over = (
            hold
            for hold in self._holds.values()
            if hold.state is State.HELD and hold.claim.lease_ends < now
        )
        oldest = sorted(over, key=lambda hold: (hold.claim.lease_ends, hold.claim.rid))[:limit]
        return [self._apply(hold, expiry(hold.claim.rid, hold.claim.bound)) for hold in oldest]

    async def balances(self, lines: Sequence[Line]) -> list[Balance]:
        await asyncio.sleep(0)
        return list(self._read(line.account for line in lines))

    async def usage(self, since: str | None = None, until: str | None = None) -> list[UsageRow]:
        await asyncio.sleep(0)
        return [
            UsageRow(*row, *counts)
            for row, counts in sorted(self._usage.items())
            if counts.requests > 0
            and (since is None or row[0] >= since)
            and (until is None or row[0] <= until)
        ]

    async def open_holds(self) -> int:
        await asyncio.sleep(0)
        return sum(hold.state is State.HELD for hold in self._holds.values())

    async def unresolved(self) -> Money:
        await asyncio.sleep(0)
        return sum(hold.cost for hold in self._holds.values() if hold.state is State.EXPIRED)

    async def ping(self) -> None:
        await asyncio.sleep(0)

    async def aclose(self) -> None:
        await asyncio.sleep(0)

    def _holder_of_key(self, claim: Claim) -> _Hold | None:
        """The hold that the claim's idempotency key stands for, unless that is too long ago."""
        if claim.idempotency_key is None:
            return None
        rid = self._keys.get((claim.team, claim.idempotency_key))
        if rid is None or self._holds[rid].claim.at < claim.at - KEY_LIFETIME:
            return None
        return self._holds[rid]

    def _apply(self, hold: _Hold, settlement: Settlement) -> Entry:
        claim = hold.claim
        move = transition(hold.state, settlement.event, claim.bound, hold.cost, settlement.cost)
        if move.applied:
            row = (usage_day(claim.at), claim.team, claim.key_id, claim.model)
            self._count(row, correction(hold.state, hold.cost, hold.flags, move, settlement))
            self._add(hold.accounts, move.pending, move.posted)
            hold.state, hold.cost, hold.flags = move.state, move.cost, settlement.flags
        return Entry(
            claim.rid, move.state, claim.bound, move.cost, move.applied, self._read(hold.accounts)
        )

    def _read(self, accounts: Iterable[str]) -> tuple[Balance, ...]:
        return tuple(self._balances.get(account, NOTHING) for account in accounts)

    def _add(self, accounts: Iterable[str], pending: Money, posted: Money) -> None:
        for account in accounts:
            before = self._balances.get(account, NOTHING)
            self._balances[account] = Balance(before.posted + posted, before.pending + pending)

    def _count(self, row: tuple[str, str, str, str], counts: Counts) -> None:
        self._usage[row] = self._usage.get(row, Counts()).plus(counts)


class MemoryDirectory:
    """``Directory`` without durability."""

    def __init__(self) -> None:
        self._teams: dict[str, Team] = {}
        self._keys: dict[str, Key] = {}
        self._digests: dict[bytes, str] = {}

    async def find_key(self, digest: bytes) -> tuple[Team, Key] | None:
        await asyncio.sleep(0)
        key_id = self._digests.get(digest)
        if key_id is None:
            return None
        key = self._keys[key_id]
        return self._teams[key.team], key

    async def teams(self) -> list[Team]:
        await asyncio.sleep(0)
        return sorted(self._teams.values(), key=lambda team: team.id)

    async def keys(self, team: str | None = None) -> list[Key]:
        await asyncio.sleep(0)
        found = (key for key in self._keys.values() if team is None or key.team == team)
        return sorted(found, key=lambda key: (key.team, key.id))

    async def create_team(self, team: Team) -> None:
        await asyncio.sleep(0)
        if team.id in self._teams:
            raise AlreadyExists(f"there is a team {team.id} already")
        self._teams[team.id] = replace(team, declared=False)

    async def update_team(self, team: Team) -> None:
        await asyncio.sleep(0)
        if team.id not in self._teams:
            raise NotKnown(f"there is no team {team.id}")
        self._teams[team.id] = replace(team, declared=False)

    async def create_key(self, key: Key, digest: bytes) -> None:
        await asyncio.sleep(0)
        if key.team not in self._teams:
            raise NotKnown(f"there is no team {key.team}")
        if key.id in self._keys or digest in self._digests:
            raise AlreadyExists(f"there is a key {key.id} already, or one with this secret")
        self._keys[key.id] = replace(key, declared=False)
        self._digests[digest] = key.id

    async def revoke_key(self, key_id: str, at: datetime) -> Key:
        await asyncio.sleep(0)
        key = self._keys.get(key_id)
        if key is None:
            raise NotKnown(f"there is no key {key_id}")
        if key.revoked is None:
            key = self._keys[key_id] = replace(key, revoked=at)
        return key

    async def ping(self) -> None:
        await asyncio.sleep(0)
