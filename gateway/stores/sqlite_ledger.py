"""The ledger on SQLite: holds, balances, the journal and the daily roll-up, in one transaction."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
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
from gateway.stores.rows import (
    USAGE_COLUMNS,
    claim_row,
    detail_of,
    micros,
    part_row,
    reroute_detail,
)
from gateway.stores.sqlite_file import Reader, Writer, one_number
from gateway.stores.sqlite_rows import (
    PING,
    balances_of,
    booked,
    count,
    entry_of,
    move_balances,
    write_journal,
)

_log = logging.getLogger(__name__)


class SQLiteLedger:
    """``Ledger`` on SQLite. Each write is one operation of the writer's next transaction."""

    def __init__(
        self,
        writer: Writer,
        reader: Reader,
        on_conflict: OnConflict,
        close: Callable[[], Awaitable[None]],
    ) -> None:
        self._writer = writer
        self._reader = reader
        self._on_conflict = on_conflict
        self._close = close

    async def reserve(self, claim: Claim) -> Held | Denied | Claimed:
        if claim.bound < 0:
            raise ValueError("a bound is never negative")
        return await self._writer.submit(lambda db: _reserve(db, claim), droppable=True)

    async def claimed(
        self, team: str, idempotency_key: str, fingerprint: str, at: datetime
    ) -> Claimed | None:
        def read(db: sqlite3.Connection) -> Claimed | None:
            holder = _holder_of_key(db, team, idempotency_key, fingerprint, at)
            return holder if isinstance(holder, Claimed) else None

        return await self._reader.run(read)

    async def reroute(self, reroute: Reroute) -> Held | Denied:
        if reroute.bound < 0:
            raise ValueError("a bound is never negative")
        return await self._writer.submit(lambda db: _reroute(db, reroute), droppable=True)

    async def settle(self, settlement: Settlement) -> Entry:
        if settlement.cost < 0:
            raise ValueError("a cost is never negative")
        entry = await self._writer.submit(lambda db: _settle(db, settlement, settlement.at))
        if not entry.applied and contradicts(
            entry.state, settlement.event, entry.cost, settlement.cost
        ):
            self._on_conflict(entry, settlement)
        return entry

    async def replay(self, replay: Replay) -> None:
        row = (usage_day(replay.at), replay.team, replay.key_id)
        self._writer.post(lambda db: count(db, *row, replay_by_model(replay)), replay.rid)

    async def sweep(
        self, now: datetime, limit: int = 100, silent_before: datetime | None = None
    ) -> list[Entry]:
        return await self._writer.submit(lambda db: _sweep(db, now, limit, silent_before))

    async def balances(self, lines: Sequence[Line]) -> list[Balance]:
        accounts = [line.account for line in lines]

        def read(db: sqlite3.Connection) -> list[Balance]:
            found = balances_of(db, accounts)
            return [found[account] for account in accounts]

        return await self._reader.run(read)

    async def usage(
        self, since: str | None = None, until: str | None = None, team: str | None = None
    ) -> list[UsageRow]:
        asked = {"since": since, "until": until, "team": team}
        rows = await self._reader.run(lambda db: db.execute(_USAGE, asked).fetchall())
        return [UsageRow(*row) for row in rows]

    async def open_holds(self) -> int:
        return await self._reader.run(
            lambda db: one_number(db, "SELECT count(*) FROM hold WHERE state = 'H'")
        )

    async def unresolved(self) -> Money:
        return await self._reader.run(
            lambda db: one_number(db, "SELECT coalesce(sum(cost), 0) FROM hold WHERE state = 'X'")
        )

    async def ping(self) -> None:
        """Raises ``LedgerUnavailable`` when the file cannot be read, or is no longer there."""
        await self._reader.ping(PING)

    async def aclose(self) -> None:
        """Closes the whole store, its other views too: they are one file."""
        await self._close()


_USAGE = f"""
SELECT {USAGE_COLUMNS}
  FROM usage_daily
 WHERE (requests > 0 OR images <> 0 OR cost <> 0)  -- if all its calls were voided it is nothing
   AND day BETWEEN coalesce(:since, '') AND coalesce(:until, '9999-12-31')
   AND (:team IS NULL OR team = :team)
 ORDER BY day, team, key_id, model
"""  # noqa: S608 - names of columns

_INSERT_HOLD = """
INSERT INTO hold (rid, state, bound, accounts, team, key_id, model, operation, upstream, images,
       price_id, fingerprint, idempotency_key, worker, at, day, lease_ends, end_user)
VALUES (?, 'H', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""

_OVER = """
SELECT rid, bound FROM hold
 WHERE state = 'H'
   AND (lease_ends < :now OR worker IN (SELECT id FROM worker WHERE beat_at < :silent_before))
 ORDER BY lease_ends, rid LIMIT :limit
"""


def _reserve(db: sqlite3.Connection, claim: Claim) -> Held | Denied | Claimed:
    known = db.execute("SELECT accounts FROM hold WHERE rid = ?", (claim.rid,)).fetchone()
    if known is not None:
        held = balances_of(db, json.loads(known[0]))
        return Held(claim.rid, tuple(held.values()), duplicate=True)
    holder = None
    if claim.idempotency_key is not None:
        asked = (claim.team, claim.idempotency_key, claim.fingerprint, claim.at)
        holder = _holder_of_key(db, *asked, claim.repeat_unknown)
        if isinstance(holder, Claimed):
            return holder
    found = balances_of(db, (line.account for line in claim.lines))
    denied = no_room(claim.lines, found, claim.bound)
    if denied is not None:
        return denied
    if holder is not None:
        db.execute("UPDATE hold SET idempotency_key = NULL WHERE rid = ?", (holder,))
    accounts = json.dumps(list(found))
    db.execute(
        "INSERT INTO balance (account, pending) SELECT value, ? FROM json_each(?) WHERE true"
        " ON CONFLICT DO UPDATE SET pending = pending + excluded.pending",
        (claim.bound, accounts),
    )
    db.execute(_INSERT_HOLD, claim_row(claim, accounts, micros(claim.lease_ends)))
    write_journal(db, claim.at, claim.rid, State.HELD.value, pending=claim.bound)
    return Held(
        claim.rid,
        tuple(
            Balance(found[line.account].posted, found[line.account].pending + claim.bound)
            for line in claim.lines
        ),
    )


def _holder_of_key(
    db: sqlite3.Connection,
    team: str,
    idempotency_key: str,
    fingerprint: str,
    at: datetime,
    repeat_unknown: bool = False,
) -> Claimed | str | None:
    """Who has an idempotency key at that time: a call that keeps it, or the rid of one that
    ``yields_key``, or has outlived it after a day."""
    found = db.execute(
        "SELECT rid, state, fingerprint, at FROM hold WHERE team = ? AND idempotency_key = ?",
        (team, idempotency_key),
    ).fetchone()
    if found is None:
        return None
    rid, state, same, reserved = str(found[0]), State(found[1]), found[2] == fingerprint, found[3]
    if reserved < micros(at - KEY_LIFETIME) or yields_key(state, same, repeat_unknown):
        return rid
    return Claimed(rid, state, same)


def _reroute(db: sqlite3.Connection, reroute: Reroute) -> Held | Denied:
    hold = booked(db, reroute.rid)
    bump = None
    if hold is not None:
        bump = rerouted(hold.state, hold.bound, hold.route, reroute)
    if hold is None or bump is None:
        raise NotKnown(f"no reservation {reroute.rid} is held, that could go elsewhere")
    accounts = [line.account for line in reroute.lines]
    before = balances_of(db, accounts)
    denied = no_room_elsewhere(reroute, bump, json.loads(hold.accounts), before)
    if denied is not None:
        return denied
    if bump.applied:
        db.execute(
            "UPDATE hold SET model = ?, upstream = ?, price_id = ?, bound = ? WHERE rid = ?",
            (*reroute.route, bump.bound, hold.rid),
        )
        move_balances(db, hold.accounts, bump.pending, posted=0)
        write_journal(
            db,
            reroute.at,
            hold.rid,
            REROUTED,
            pending=bump.pending,
            detail=reroute_detail(reroute, hold.route),
        )
    after = balances_of(db, accounts)
    return Held(hold.rid, tuple(after[account] for account in accounts), duplicate=not bump.applied)


def _settle(db: sqlite3.Connection, settlement: Settlement, at: datetime | None) -> Entry:
    """Applies one event. ``at`` is for the journal."""
    hold = booked(db, settlement.rid)
    if hold is None:
        if settlement.event is Event.SETTLE:
            raise NotKnown(f"no reservation {settlement.rid} to settle")
        return Entry(settlement.rid, State.VOIDED, bound=0, cost=0, applied=False)
    move = transition(hold.state, settlement.event, hold.bound, hold.cost, settlement.cost)
    if move.applied:
        drawn = settled_part(move, settlement)
        db.execute(
            "UPDATE hold SET state = ?, cost = ?, outcome = ?, basis = ?, flags = ?,"
            "       drawn_model = ?, drawn_images = ?, drawn_cost = ? WHERE rid = ?",
            (
                move.state.value,
                move.cost,
                settlement.outcome.value,
                settlement.basis.value,
                json.dumps(settlement.flags),
                *part_row(drawn),
                hold.rid,
            ),
        )
        move_balances(db, hold.accounts, move.pending, move.posted)
        flags = json.loads(hold.flags)
        gained = correction(hold.state, hold.cost, flags, move, settlement)
        count(db, hold.day, hold.team, hold.key_id, by_model(hold.model, gained, drawn))
        write_journal(
            db,
            at,
            hold.rid,
            move.state.value,
            pending=move.pending,
            posted=move.posted,
            detail=detail_of(settlement),
        )
    return entry_of(db, hold, move)


def _sweep(
    db: sqlite3.Connection, now: datetime, limit: int, silent_before: datetime | None
) -> list[Entry]:
    db.execute(
        "UPDATE hold SET idempotency_key = NULL WHERE rid IN (SELECT rid FROM hold"
        " WHERE idempotency_key IS NOT NULL AND at < ? ORDER BY at LIMIT 1000)",
        (micros(now - KEY_LIFETIME),),
    )
    silent = None if silent_before is None else micros(silent_before)
    over = db.execute(
        _OVER, {"now": micros(now), "silent_before": silent, "limit": limit}
    ).fetchall()
    entries = []
    for rid, bound in over:
        db.execute("SAVEPOINT expiry")
        try:
            entries.append(_settle(db, expiry(rid, bound), at=now))
        except (sqlite3.IntegrityError, OverflowError):
            # One hold that cannot be booked must not keep the others standing.
            db.execute("ROLLBACK TO expiry")
            _log.exception("the hold %s cannot be expired", rid)
        db.execute("RELEASE expiry")
    return entries
