"""The upkeep on PostgreSQL: heartbeats, retention, notices, and raised bounds.

Beats and leases are judged by the server's clock; what the callers' clocks say is only measured
against it.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

from gateway.domain.transition import DOUBTFUL, WORKER_MEMORY
from gateway.stores.postgres_writer import Reader, Transaction, Writer, alone
from gateway.stores.rows import MICROSECOND, micros

_BEAT = """
INSERT INTO worker AS kept (id, beat_at) VALUES (%s, %s)
ON CONFLICT (id) DO UPDATE SET beat_at = greatest(kept.beat_at, excluded.beat_at)
"""

_FORGET_WORKERS = """
DELETE FROM worker WHERE id IN (
       SELECT id FROM worker
        WHERE beat_at < %s AND NOT EXISTS
              (SELECT 1 FROM hold WHERE hold.state = 'H' AND hold.worker = worker.id)
          FOR UPDATE SKIP LOCKED)
"""

_FORGET_WRITERS = """
DELETE FROM writer WHERE id IN (SELECT id FROM writer WHERE at < %s FOR UPDATE SKIP LOCKED)
"""

_CLAIM = """
INSERT INTO notice AS kept (account, mark, claimed_at) VALUES (%s, %s, %s)
ON CONFLICT (account, mark) DO UPDATE SET claimed_at = excluded.claimed_at
 WHERE kept.sent_at IS NULL AND kept.claimed_at <= %s
"""

_SENT = """
INSERT INTO notice AS kept (account, mark, claimed_at, sent_at) VALUES (%s, %s, %s, %s)
ON CONFLICT (account, mark) DO UPDATE SET sent_at = coalesce(kept.sent_at, excluded.sent_at)
"""

_RAISE = """
INSERT INTO bound_factor AS kept (upstream, model, millionths) VALUES (%s, %s, %s)
ON CONFLICT (upstream, model)
   DO UPDATE SET millionths = greatest(kept.millionths, excluded.millionths)
RETURNING millionths
"""

# A hold that still has its idempotency key is the record of it: a sweep clears it after a day. One
# whose cost may be wrong waits for somebody.
_FORGOTTEN = """
SELECT rid FROM hold
 WHERE state IN ('P', 'V') AND at < %(before)s AND idempotency_key IS NULL
   AND (state = 'V' OR flags = '[]' OR NOT EXISTS (
        SELECT 1 FROM json_array_elements_text(flags::json) AS flag
         WHERE flag = ANY(%(doubtful)s::text[])))
 ORDER BY at, rid LIMIT %(limit)s FOR UPDATE SKIP LOCKED
"""

_RETAIN = """
INSERT INTO retention AS kept (one, before) VALUES (1, %s)
ON CONFLICT (one) DO UPDATE SET before = greatest(kept.before, excluded.before)
"""

# The row without an account is the sum of all, for the usage of all days.
_ROLL_UP = """
WITH forgotten (accounts, cost) AS (
    SELECT accounts, cost FROM hold WHERE rid = ANY(%s::text[])
), parts (account, cost) AS (
    SELECT one COLLATE "C", cost
      FROM forgotten, json_array_elements_text(forgotten.accounts::json) AS one
     UNION ALL
    SELECT '', cost FROM forgotten
)
INSERT INTO rolled_up AS kept (account, posted, holds)
SELECT account, sum(cost), count(*) FROM parts GROUP BY account ORDER BY account
ON CONFLICT (account) DO UPDATE
       SET posted = kept.posted + excluded.posted, holds = kept.holds + excluded.holds
"""


class PostgresUpkeep:
    """``Upkeep`` on PostgreSQL."""

    def __init__(self, writer: Writer, reader: Reader) -> None:
        self._writer = writer
        self._reader = reader
        self.clock_skew_seconds = 0.0
        """By how much this process's clock is ahead of the server's, as of the last beat."""

    async def beat(self, worker: str, now: datetime) -> None:
        memory = WORKER_MEMORY // MICROSECOND

        def write(transaction: Transaction) -> int:
            instant = transaction.instant(now)
            transaction.link.execute(_BEAT, (worker, instant))
            transaction.link.execute(_FORGET_WORKERS, (instant - memory,))
            transaction.link.execute(_FORGET_WRITERS, (transaction.now - memory,))
            return transaction.now

        loop = asyncio.get_running_loop()
        asked = loop.time()
        server = await self._writer.run(alone(write))
        # The server looked at its clock somewhere between the question and the answer.
        under_way = (loop.time() - asked) / 2
        self.clock_skew_seconds = (micros(now) - server) / 1e6 + under_way

    async def forget(self, before: datetime, limit: int = 1000) -> int:
        def write(transaction: Transaction) -> int:
            link, oldest = transaction.link, micros(before)
            asked = {"before": oldest, "limit": limit, "doubtful": sorted(DOUBTFUL)}
            rids = [rid for (rid,) in link.execute(_FORGOTTEN, asked)]
            if rids:
                link.execute(_RETAIN, (oldest,))
                link.execute(_ROLL_UP, (rids,))
                # The journal first: its trigger looks at the hold.
                link.execute("DELETE FROM journal WHERE rid = ANY(%s::text[])", (rids,))
                link.execute("DELETE FROM hold WHERE rid = ANY(%s::text[])", (rids,))
            return len(rids)

        return await self._writer.run(alone(write))

    async def claim_notice(
        self, account: str, mark: str, now: datetime, lease_seconds: float
    ) -> bool:
        lease = timedelta(seconds=lease_seconds) // MICROSECOND

        def write(transaction: Transaction) -> bool:
            instant = transaction.instant(now)
            claimed = transaction.link.execute(_CLAIM, (account, mark, instant, instant - lease))
            return claimed.rowcount > 0

        return await self._writer.run(alone(write))

    async def notice_sent(self, account: str, mark: str, now: datetime) -> None:
        def write(transaction: Transaction) -> None:
            instant = transaction.instant(now)
            transaction.link.execute(_SENT, (account, mark, instant, instant))

        await self._writer.run(alone(write))

    async def factors(self) -> dict[tuple[str, str], int]:
        rows = await self._reader.run(
            lambda link: link.execute(
                "SELECT upstream, model, millionths FROM bound_factor"
            ).fetchall()
        )
        return {(upstream, model): millionths for upstream, model, millionths in rows}

    async def raise_factor(self, upstream: str, model: str, millionths: int) -> int:
        return await self._writer.run(
            alone(
                lambda transaction: transaction.link.number(_RAISE, (upstream, model, millionths))
            )
        )

    async def reset_factor(self, upstream: str, model: str) -> bool:
        def write(transaction: Transaction) -> bool:
            deleted = transaction.link.execute(
                "DELETE FROM bound_factor WHERE upstream = %s AND model = %s", (upstream, model)
            )
            return deleted.rowcount > 0

        return await self._writer.run(alone(write))
