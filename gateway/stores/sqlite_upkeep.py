"""The upkeep on SQLite: heartbeats, retention, notices, and raised bounds."""

from __future__ import annotations

import json
import sqlite3
from datetime import datetime, timedelta

from gateway.domain.transition import DOUBTFUL, WORKER_MEMORY
from gateway.stores.rows import micros
from gateway.stores.sqlite_file import Reader, Writer


class SQLiteUpkeep:
    """``Upkeep`` on SQLite."""

    def __init__(self, writer: Writer, reader: Reader) -> None:
        self._writer = writer
        self._reader = reader

    async def beat(self, worker: str, now: datetime) -> None:
        def write(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT INTO worker (id, beat_at) VALUES (?, ?)"
                " ON CONFLICT DO UPDATE SET beat_at = max(beat_at, excluded.beat_at)",
                (worker, micros(now)),
            )
            db.execute(
                "DELETE FROM worker WHERE beat_at < ? AND NOT EXISTS"
                " (SELECT 1 FROM hold WHERE hold.state = 'H' AND hold.worker = worker.id)",
                (micros(now - WORKER_MEMORY),),
            )

        await self._writer.submit(write)

    async def forget(self, before: datetime, limit: int = 1000) -> int:
        return await self._writer.submit(lambda db: _forget(db, micros(before), limit))

    async def claim_notice(
        self, account: str, mark: str, now: datetime, lease_seconds: float
    ) -> bool:
        over = micros(now - timedelta(seconds=lease_seconds))

        def write(db: sqlite3.Connection) -> bool:
            claimed = db.execute(
                "INSERT INTO notice (account, mark, claimed_at) VALUES (?, ?, ?)"
                " ON CONFLICT DO UPDATE SET claimed_at = excluded.claimed_at"
                " WHERE sent_at IS NULL AND claimed_at <= ?",
                (account, mark, micros(now), over),
            )
            return claimed.rowcount > 0

        return await self._writer.submit(write)

    async def notice_sent(self, account: str, mark: str, now: datetime) -> None:
        def write(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT INTO notice (account, mark, claimed_at, sent_at) VALUES (?, ?, ?, ?)"
                " ON CONFLICT DO UPDATE SET sent_at = coalesce(sent_at, excluded.sent_at)",
                (account, mark, micros(now), micros(now)),
            )

        await self._writer.submit(write)

    async def factors(self) -> dict[tuple[str, str], int]:
        rows = await self._reader.run(
            lambda db: db.execute("SELECT upstream, model, millionths FROM bound_factor").fetchall()
        )
        return {(upstream, model): millionths for upstream, model, millionths in rows}

    async def raise_factor(self, upstream: str, model: str, millionths: int) -> int:
        def write(db: sqlite3.Connection) -> int:
            db.execute(
                "INSERT INTO bound_factor (upstream, model, millionths) VALUES (?, ?, ?)"
                " ON CONFLICT DO UPDATE SET millionths = max(millionths, excluded.millionths)",
                (upstream, model, millionths),
            )
            (raised,) = db.execute(
                "SELECT millionths FROM bound_factor WHERE upstream = ? AND model = ?",
                (upstream, model),
            ).fetchone()
            return int(raised)

        return await self._writer.submit(write)

    async def reset_factor(self, upstream: str, model: str) -> bool:
        def write(db: sqlite3.Connection) -> bool:
            deleted = db.execute(
                "DELETE FROM bound_factor WHERE upstream = ? AND model = ?", (upstream, model)
            )
            return deleted.rowcount > 0

        return await self._writer.submit(write)


# A hold that still has its idempotency key is the record of it: a sweep clears it after a day. One
# whose cost may be wrong waits for somebody.
_FORGOTTEN = """
SELECT rid FROM hold
 WHERE state IN ('P', 'V') AND at < :before AND idempotency_key IS NULL
   AND (state = 'V' OR flags = '[]' OR NOT EXISTS (
        SELECT 1 FROM json_each(hold.flags) AS flag
         WHERE flag.value IN (SELECT value FROM json_each(:doubtful))))
 ORDER BY at, rid LIMIT :limit
"""

# The row without an account is the sum of all, for the usage of all days.
_ROLL_UP = """
WITH forgotten (accounts, cost) AS (
    SELECT accounts, cost FROM hold WHERE rid IN (SELECT value FROM json_each(?))
), parts (account, cost) AS (
    SELECT one.value, cost FROM forgotten, json_each(forgotten.accounts) AS one
     UNION ALL
    SELECT '', cost FROM forgotten
)
INSERT INTO rolled_up (account, posted, holds)
SELECT account, sum(cost), count(*) FROM parts WHERE true GROUP BY account
ON CONFLICT DO UPDATE SET posted = posted + excluded.posted, holds = holds + excluded.holds
"""


def _forget(db: sqlite3.Connection, before: int, limit: int) -> int:
    """``before`` is in microseconds."""
    asked = {"before": before, "limit": limit, "doubtful": json.dumps(sorted(DOUBTFUL))}
    rids = [rid for (rid,) in db.execute(_FORGOTTEN, asked)]
    if not rids:
        return 0
    forgotten = (json.dumps(rids),)
    db.execute(
        "INSERT INTO retention (one, before) VALUES (1, ?)"
        " ON CONFLICT DO UPDATE SET before = max(before, excluded.before)",
        (before,),
    )
    db.execute(_ROLL_UP, forgotten)
    # The journal first: its trigger looks at the hold.
    db.execute("DELETE FROM journal WHERE rid IN (SELECT value FROM json_each(?))", forgotten)
    db.execute("DELETE FROM hold WHERE rid IN (SELECT value FROM json_each(?))", forgotten)
    return len(rids)
