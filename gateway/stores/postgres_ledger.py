"""The ledger on PostgreSQL: what many replicas share."""

from __future__ import annotations

import logging
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
from gateway.stores.postgres_link import Link
from gateway.stores.postgres_page import Page
from gateway.stores.postgres_writer import Reader, Transaction, Writer, alone, with_page
from gateway.stores.rows import MICROSECOND, USAGE_COLUMNS, micros

_log = logging.getLogger(__name__)

PING = "SELECT pg_is_in_recovery(), (SELECT account FROM balance LIMIT 1)"

_SPARE = 1000
"""How many lapsed holds a sweep looks at beyond its limit: others may be at the first of them."""

_HOLDER = "SELECT rid, state, fingerprint, at FROM hold WHERE team = %s AND idempotency_key = %s"

_BALANCES = "SELECT account, posted, pending FROM balance WHERE account = ANY(%s::text[])"

_USAGE = f"""
SELECT {USAGE_COLUMNS}
  FROM usage_daily
 WHERE (requests > 0 OR images <> 0 OR cost <> 0)  -- if all its calls were voided it is nothing
   AND day BETWEEN coalesce(%(since)s::text, '') AND coalesce(%(until)s::text, '9999-12-31')
   AND (%(team)s::text IS NULL OR team = %(team)s)
 ORDER BY day, team, key_id, model
"""  # noqa: S608 - names of columns

_CLEAR_KEYS = """
UPDATE hold SET idempotency_key = NULL WHERE rid IN (
       SELECT rid FROM hold WHERE idempotency_key IS NOT NULL AND at < %s
        ORDER BY at LIMIT 1000 FOR UPDATE SKIP LOCKED)
"""

# Each candidate is taken by a lock that no other sweep waits for. Its row is locked later, after
# its accounts, as everywhere.
_OVER = """
WITH over AS MATERIALIZED (
    SELECT rid, bound FROM hold
     WHERE state = 'H'
       AND (lease_ends < %(now)s
            OR worker IN (SELECT id FROM worker WHERE beat_at < %(silent_before)s::bigint))
     ORDER BY lease_ends, rid LIMIT %(looked_at)s
)
SELECT rid, bound FROM over
 WHERE pg_try_advisory_xact_lock(hashtextextended('sweep ' || rid, 0)) LIMIT %(limit)s
"""


class PostgresLedger:
    """``Ledger`` on PostgreSQL."""

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
        lease = (claim.lease_ends - claim.at) // MICROSECOND
        needs = needs_of(claim)

        def decide(page: Page, transaction: Transaction) -> Held | Denied | Claimed:
            return page.reserve(claim, needs.accounts, transaction.instant(claim.at) + lease)

        return await self._writer.decide(needs, decide, droppable=True)

    async def claimed(
        self, team: str, idempotency_key: str, fingerprint: str, at: datetime
    ) -> Claimed | None:
        found = await self._reader.run(
            lambda link: link.execute(_HOLDER, (team, idempotency_key)).fetchone()
        )
        if found is None:
            return None
        rid, state, same, reserved = found[0], State(found[1]), found[2] == fingerprint, found[3]
        if reserved < micros(at - KEY_LIFETIME) or yields_key(state, same):
            return None
        return Claimed(rid, state, same)

    async def reroute(self, reroute: Reroute) -> Held | Denied:
        if reroute.bound < 0:
            raise ValueError("a bound is never negative")
        accounts = tuple(dict.fromkeys(line.account for line in reroute.lines))
        return await self._writer.decide(
            Needs(accounts, (reroute.rid,)), lambda page, _: page.reroute(reroute), droppable=True
        )

    async def settle(self, settlement: Settlement) -> Entry:
        if settlement.cost < 0:
            raise ValueError("a cost is never negative")
        at = None if settlement.at is None else micros(settlement.at)
        entry = await self._writer.decide(
            Needs(rids=(settlement.rid,)), lambda page, _: page.settle(settlement, at)
        )
        if not entry.applied and contradicts(
            entry.state, settlement.event, entry.cost, settlement.cost
        ):
            self._on_conflict(entry, settlement)
        return entry

    async def replay(self, replay: Replay) -> None:
        row = (usage_day(replay.at), replay.team, replay.key_id)
        self._writer.post(lambda page, _: page.count(*row, replay_by_model(replay)), replay.rid)

    async def sweep(
        self, now: datetime, limit: int = 100, silent_before: datetime | None = None
    ) -> list[Entry]:
        silence = None if silent_before is None else (now - silent_before) // MICROSECOND
        lifetime = KEY_LIFETIME // MICROSECOND

        def clear(transaction: Transaction) -> None:
            transaction.link.execute(_CLEAR_KEYS, (transaction.instant(now) - lifetime,))

        over: dict[str, Money] = {}

        def choose(transaction: Transaction) -> list[Needs]:
            instant = transaction.instant(now)
            asked = {
                "now": instant,
                "silent_before": None if silence is None else instant - silence,
                "looked_at": limit + _SPARE,
                "limit": limit,
            }
            over.clear()
            over.update(transaction.link.execute(_OVER, asked).fetchall())
            return [Needs(rids=tuple(over))]

        def expire(page: Page, transaction: Transaction) -> list[Entry]:
            entries = []
            for rid, bound in over.items():
                try:
                    entry = page.settle(expiry(rid, bound), transaction.instant(now))
                except OverflowError:
                    # One hold that cannot be booked must not keep the others standing.
                    _log.exception("the hold %s cannot be expired", rid)
                else:
                    if entry.applied:
                        entries.append(entry)
            return entries

        await self._writer.run(alone(clear))
        return await self._writer.run(with_page(choose, expire))

    async def balances(self, lines: Sequence[Line]) -> list[Balance]:
        accounts = [line.account for line in lines]

        def read(link: Link) -> list[Balance]:
            found = {
                account: Balance(posted, pending)
                for account, posted, pending in link.execute(_BALANCES, (accounts,))
            }
            return [found.get(account, Balance()) for account in accounts]

        return await self._reader.run(read)

    async def usage(
        self, since: str | None = None, until: str | None = None, team: str | None = None
    ) -> list[UsageRow]:
        asked = {"since": since, "until": until, "team": team}
        rows = await self._reader.run(lambda link: link.execute(_USAGE, asked).fetchall())
        return [UsageRow(*row) for row in rows]

    async def open_holds(self) -> int:
        return await self._reader.run(
            lambda link: link.number("SELECT count(*) FROM hold WHERE state = 'H'")
        )

    async def unresolved(self) -> Money:
        return await self._reader.run(
            lambda link: link.number("SELECT coalesce(sum(cost), 0) FROM hold WHERE state = 'X'")
        )

    async def ping(self) -> None:
        """Raises ``LedgerUnavailable`` when the database cannot be read, or is a standby now."""
        await self._reader.ping(PING)

    async def aclose(self) -> None:
        """Closes the whole store, its other views too: they are one database."""
        await self._close()
