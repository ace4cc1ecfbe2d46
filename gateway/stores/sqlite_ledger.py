"""The ledger on SQLite: holds, balances, the journal and the daily roll-up, in one transaction."""

from __future__ import annotations

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
    OnConflict,
    contradicts,
    expiry,
    replay_by_model,
    usage_day,
    yields_key,
)
from gateway.stores.page import Needs, needs_of
from gateway.stores.rows import (
    USAGE_COLUMNS,
    micros,
)
from gateway.stores.sqlite_file import Reader, Writer, one_number
from gateway.stores.sqlite_page import Asked, book
from gateway.stores.sqlite_rows import (
    PING,
    balances_of,
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
        needs, lease_ends = needs_of(claim), micros(claim.lease_ends)
        return await self._writer.decide(
            needs, lambda page: page.reserve(claim, needs.accounts, lease_ends), droppable=True
        )

    async def claimed(
        self, team: str, idempotency_key: str, fingerprint: str, at: datetime
    ) -> Claimed | None:
        return await self._reader.run(
            lambda db: _holder_of_key(db, team, idempotency_key, fingerprint, at)
        )

    async def reroute(self, reroute: Reroute) -> Held | Denied:
        if reroute.bound < 0:
            raise ValueError("a bound is never negative")
        needs = Needs(tuple(line.account for line in reroute.lines), (reroute.rid,))
        return await self._writer.decide(needs, lambda page: page.reroute(reroute), droppable=True)

    async def settle(self, settlement: Settlement) -> Entry:
        if settlement.cost < 0:
            raise ValueError("a cost is never negative")
        at = None if settlement.at is None else micros(settlement.at)
        entry = await self._writer.decide(
            Needs(rids=(settlement.rid,)), lambda page: page.settle(settlement, at)
        )
        if not entry.applied and contradicts(
            entry.state, settlement.event, entry.cost, settlement.cost
        ):
            self._on_conflict(entry, settlement)
        return entry

    async def replay(self, replay: Replay) -> None:
        row = (usage_day(replay.at), replay.team, replay.key_id)
        self._writer.post(lambda page: page.count(*row, replay_by_model(replay)), replay.rid)

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

_OVER = """
SELECT rid, bound FROM hold
 WHERE state = 'H'
   AND (lease_ends < :now OR worker IN (SELECT id FROM worker WHERE beat_at < :silent_before))
 ORDER BY lease_ends, rid LIMIT :limit
"""


def _holder_of_key(
    db: sqlite3.Connection, team: str, idempotency_key: str, fingerprint: str, at: datetime
) -> Claimed | None:
    found = db.execute(
        "SELECT rid, state, fingerprint, at FROM hold WHERE team = ? AND idempotency_key = ?",
        (team, idempotency_key),
    ).fetchone()
    if found is None:
        return None
    rid, state, same, reserved = found[0], State(found[1]), found[2] == fingerprint, found[3]
    if reserved < micros(at - KEY_LIFETIME) or yields_key(state, same):
        return None
    return Claimed(rid, state, same)


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
    at = micros(now)

    def ended(rid: str, bound: Money) -> Asked:
        return Asked(Needs(rids=(rid,)), lambda page: page.settle(expiry(rid, bound), at))

    entries = []
    for (rid, _), answer in zip(over, book(db, [ended(*one) for one in over]), strict=True):
        if isinstance(answer, Exception):
            # One hold that cannot be booked must not keep the others standing.
            _log.error("the hold %s cannot be expired", rid, exc_info=answer)
        else:
            entries.append(answer)
    return entries
