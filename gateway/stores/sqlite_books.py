"""The books on SQLite: look-ups, corrections, adjustments, and the audit."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence

from gateway.domain.books import Adjustment, Correction, Discrepancy, Hold, JournalLine
from gateway.domain.ledger import By, Entry, UsageRow, UserUsage
from gateway.domain.money import Money
from gateway.domain.periods import cover
from gateway.domain.transition import (
    CORRECTED,
    DOUBTFUL,
    Counts,
    Move,
    by_model,
    corrected,
    corrected_part,
    correction_counts,
)
from gateway.ports import NotKnown
from gateway.stores.audit import (
    AUDIT_HALVES,
    AUDIT_JOURNAL,
    AUDIT_MONTHS,
    AUDIT_USAGE,
    AUDIT_USERS,
    discrepancies,
)
from gateway.stores.rows import (
    ADJUSTMENT_COLUMNS,
    HOLD_COLUMNS,
    JOURNAL_COLUMNS,
    adjustment_detail,
    adjustment_of,
    adjustment_row,
    compare_booked,
    correction_detail,
    hold_of,
    journal_line_of,
    micros,
    routed_of,
    usage_by_sql,
)
from gateway.stores.sqlite_file import Reader, Writer
from gateway.stores.sqlite_rows import (
    booked,
    count,
    entry_of,
    exists,
    move_balances,
    write_journal,
)


class SQLiteBooks:
    """``Books`` on SQLite. ``long_reader`` is for what reads everything."""

    def __init__(self, writer: Writer, reader: Reader, long_reader: Reader) -> None:
        self._writer = writer
        self._reader = reader
        self._long_reader = long_reader

    async def find(self, rid: str) -> Hold | None:
        row = await self._reader.run(lambda db: db.execute(_HOLD, (rid,)).fetchone())
        return None if row is None else hold_of(row)

    async def journal(self, rid: str) -> list[JournalLine]:
        rows = await self._reader.run(lambda db: db.execute(_JOURNAL, (rid,)).fetchall())
        return [journal_line_of(row) for row in rows]

    async def unresolved(self, limit: int = 100, after: str = "") -> list[Hold]:
        asked = {"after": after, "limit": limit, "doubtful": json.dumps(sorted(DOUBTFUL))}
        rows = await self._reader.run(lambda db: db.execute(UNRESOLVED, asked).fetchall())
        return [hold_of(row) for row in rows]

    async def oldest_hold(self) -> Hold | None:
        row = await self._reader.run(lambda db: db.execute(_OLDEST).fetchone())
        return None if row is None else hold_of(row)

    async def correct(self, correction: Correction) -> Entry:
        if correction.cost < 0:
            raise ValueError("a cost is never negative")
        return await self._writer.submit(lambda db: _correct(db, correction))

    async def adjustment(self, adjustment_id: str) -> Adjustment | None:
        row = await self._reader.run(lambda db: db.execute(_FIND, (adjustment_id,)).fetchone())
        return None if row is None else adjustment_of(row)

    async def adjust(self, adjustment: Adjustment) -> bool:
        return await self._writer.submit(lambda db: _adjust(db, adjustment))

    async def adjust_all(
        self, adjustments: Sequence[Adjustment], seen: Mapping[tuple[str, str], Money]
    ) -> list[str]:
        def adjust(db: sqlite3.Connection) -> list[str]:
            days = json.dumps(sorted({day for day, _ in seen}))
            booked = {(day, model): cost for day, model, cost in db.execute(_BOOKED, (days,))}
            compare_booked(seen, booked)
            return [one.id for one in adjustments if _adjust(db, one)]

        return await self._writer.submit(adjust)

    async def routed(self, day: str) -> list[tuple[str, UsageRow]]:
        rows = await self._long_reader.run(lambda db: db.execute(ROUTED, (day,)).fetchall())
        return [routed_of(day, row) for row in rows]

    async def usage_by_user(
        self, team: str | None = None, since: str | None = None, until: str | None = None
    ) -> list[UserUsage]:
        return await self._long_reader.run(lambda db: _usage_by_user(db, team, since, until))

    async def usage_by(
        self,
        by: By,
        team: str | None = None,
        since: str | None = None,
        until: str | None = None,
    ) -> list[UsageRow]:
        asked = {"team": team, "since": since, "until": until}
        rows = await self._long_reader.run(lambda db: db.execute(_BY[by], asked).fetchall())
        return [UsageRow(*row) for row in rows]

    async def audit(self) -> list[Discrepancy]:
        return await self._long_reader.run(lambda db: audit_sums(db, AUDIT_HALVES))


_HOLD = f"SELECT {HOLD_COLUMNS} FROM hold WHERE rid = ?"  # noqa: S608 - names of columns

# The condition is that of the index hold_open.
_OLDEST = f"""
SELECT {HOLD_COLUMNS} FROM hold WHERE state = 'H' ORDER BY lease_ends LIMIT 1
"""  # noqa: S608 - names of columns

_JOURNAL = f"SELECT {JOURNAL_COLUMNS} FROM journal WHERE rid = ? ORDER BY seq"  # noqa: S608

# The first condition is that of the index hold_asking.
UNRESOLVED = f"""
SELECT {HOLD_COLUMNS}
  FROM hold
 WHERE (state = 'X' OR flags NOT IN ('[]', '["soft"]')) AND rid > :after
   AND (state = 'X' OR state = 'P' AND EXISTS (
        SELECT 1 FROM json_each(hold.flags) AS flag
         WHERE flag.value IN (SELECT value FROM json_each(:doubtful))))
 ORDER BY rid LIMIT :limit
"""  # noqa: S608 - names of columns

_ADJUSTMENT = """
INSERT INTO adjustment (id, at, rid, team, key_id, model, day, accounts, amount, reason, actor)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""

_APPLIED = "SELECT 1 FROM adjustment WHERE id = ?"

_FIND = f"SELECT {ADJUSTMENT_COLUMNS} FROM adjustment WHERE id = ? AND rid IS NULL"  # noqa: S608

# Along hold_spent alone: no call itself is read.
ROUTED = """
WITH closed AS (
    SELECT upstream, team, key_id, model, drawn_model, count(*) AS requests,
           sum(iif(operation = 'response', 0, images)) AS images,
           sum(cost - drawn_cost) AS cost,
           sum(drawn_images) AS drawn_images, sum(drawn_cost) AS drawn_cost
      FROM hold WHERE day = ? AND state IN ('P', 'X')
     GROUP BY upstream, team, key_id, model, drawn_model
)
SELECT upstream, team, key_id, model, sum(requests), sum(images), sum(cost) FROM (
       SELECT upstream, team, key_id, model, requests, images, cost FROM closed
        UNION ALL
       SELECT upstream, team, key_id, drawn_model, 0, drawn_images, drawn_cost
         FROM closed WHERE drawn_model <> ''
       ) GROUP BY upstream, team, key_id, model
"""

# Each by itself, so that each is found at its end of the index.
_KNOWN = """
SELECT (SELECT min(period) FROM usage_by_user), (SELECT max(period) FROM usage_by_user)
"""

# In each period the next team and the next: as many look-ups as there are of both, and no scan.
TEAMS = """
WITH RECURSIVE asked (period) AS (SELECT key FROM json_each(?)), named (period, team) AS (
    SELECT period, (SELECT min(team) FROM usage_by_user WHERE period = asked.period) FROM asked
     UNION ALL
    SELECT period, (SELECT min(team) FROM usage_by_user AS one
                     WHERE one.period = named.period AND one.team > named.team)
      FROM named WHERE team IS NOT NULL
)
SELECT DISTINCT team FROM named WHERE team IS NOT NULL ORDER BY team
"""

# Of one team: its rows are few enough to be sorted by user where they are, those of all teams
# together take twice as long. Nothing is multiplied where nothing is subtracted.
_BY_USER = """
SELECT :team, end_user, sum({sign}requests), sum({sign}images), sum({sign}cost),
       sum({sign}unresolved)
  FROM (SELECT key AS period, value AS sign FROM json_each(:wholes)) AS asked
 CROSS JOIN usage_by_user USING (period)
 WHERE team = :team
 GROUP BY end_user HAVING sum({sign}requests) <> 0 OR sum({sign}cost) <> 0
 ORDER BY end_user
"""
BY_USER, BY_USER_SIGNED = (_BY_USER.format(sign=sign) for sign in ("", "sign * "))

# With half months, which are few rows: read by themselves, for each more column that is sorted of
# all rows costs more.
BY_USER_HALVED = """
SELECT :team, end_user, sum(requests), sum(images), sum(cost), sum(unresolved) FROM (
       SELECT end_user, sign * requests AS requests, sign * images AS images, sign * cost AS cost,
              sign * unresolved AS unresolved
         FROM (SELECT key AS period, value AS sign FROM json_each(:wholes)) AS asked
        CROSS JOIN usage_by_user USING (period) WHERE team = :team
        UNION ALL
       SELECT end_user, sign * half_requests, sign * half_images, sign * half_cost,
              sign * half_unresolved
         FROM (SELECT key AS period, value AS sign FROM json_each(:halves)) AS asked
        CROSS JOIN usage_by_user USING (period) WHERE team = :team
       ) GROUP BY end_user HAVING sum(requests) <> 0 OR sum(cost) <> 0
 ORDER BY end_user
"""

_BY = {by: usage_by_sql(by, ":{}".format, str, in_order=True) for by in By}

_BOOKED = """
SELECT day, model, sum(cost) FROM usage_daily
 WHERE day IN (SELECT value FROM json_each(?)) GROUP BY day, model
"""

# Holds with the same accounts are added up before their accounts are taken apart: there are few
# such lists, one for each key and day.
_AUDIT_BALANCES = """
WITH held (accounts, posted, pending) AS (
    SELECT accounts, sum(cost), sum(iif(state = 'H', bound, 0)) FROM hold GROUP BY accounts
     UNION ALL
    SELECT accounts, amount, 0 FROM adjustment WHERE rid IS NULL
), parts (account, posted, pending, kept_posted, kept_pending) AS (
    SELECT one.value, held.posted, held.pending, 0, 0
      FROM held, json_each(held.accounts) AS one
     UNION ALL
    SELECT account, posted, 0, 0, 0 FROM rolled_up WHERE account <> ''
     UNION ALL
    SELECT account, 0, 0, posted, pending FROM balance
)
SELECT account, sum(kept_posted), sum(posted), sum(kept_pending), sum(pending)
  FROM parts
 GROUP BY account
HAVING sum(kept_posted) <> sum(posted) OR sum(kept_pending) <> sum(pending)
 ORDER BY account
"""


def _correct(db: sqlite3.Connection, correction: Correction) -> Entry:
    hold = booked(db, correction.rid)
    if hold is None:
        raise NotKnown(
            f"there is no reservation {correction.rid}, or it was forgotten: "
            "what it cost can only be adjusted, for its team and day"
        )
    if exists(db, _APPLIED, correction.id):
        return entry_of(db, hold, Move(hold.state, hold.cost, applied=False))
    flags = json.loads(hold.flags)
    doubtful = not DOUBTFUL.isdisjoint(flags)
    move = corrected(hold.state, hold.cost, correction.cost, doubtful)
    if move.applied:
        # Outcome and basis stay what the gateway saw; the journal says who knew better.
        drawn = corrected_part(hold.drawn, hold.cost, move.cost)
        db.execute(
            "UPDATE hold SET state = ?, cost = ?, flags = '[]', drawn_cost = ? WHERE rid = ?",
            (move.state.value, move.cost, 0 if drawn is None else drawn.cost, hold.rid),
        )
        move_balances(db, hold.accounts, move.pending, move.posted)
        gained = correction_counts(hold.state, hold.cost, flags, correction)
        gains = by_model(hold.model, gained, drawn, hold.drawn)
        count(db, hold.day, hold.team, hold.key_id, gains)
        db.execute(
            _ADJUSTMENT,
            (
                correction.id,
                micros(correction.at),
                hold.rid,
                hold.team,
                hold.key_id,
                hold.model,
                hold.day,
                hold.accounts,
                move.posted,
                correction.reason,
                correction.actor,
            ),
        )
        write_journal(
            db,
            correction.at,
            hold.rid,
            CORRECTED,
            pending=move.pending,
            posted=move.posted,
            detail=correction_detail(correction, hold.cost, drawn),
        )
    return entry_of(db, hold, move)


def _adjust(db: sqlite3.Connection, adjustment: Adjustment) -> bool:
    if exists(db, _APPLIED, adjustment.id):
        return False
    accounts = json.dumps(list(dict.fromkeys(adjustment.accounts)))
    db.execute(_ADJUSTMENT, adjustment_row(adjustment, accounts))
    db.execute(
        "INSERT INTO balance (account, posted) SELECT value, ? FROM json_each(?) WHERE true"
        " ON CONFLICT DO UPDATE SET posted = posted + excluded.posted",
        (adjustment.amount, accounts),
    )
    gains = [(adjustment.model, Counts(cost=adjustment.amount))]
    count(db, adjustment.day, adjustment.team, "", gains)
    write_journal(
        db,
        adjustment.at,
        adjustment.id,
        CORRECTED,
        posted=adjustment.amount,
        detail=adjustment_detail(adjustment),
    )
    return True


def _usage_by_user(
    db: sqlite3.Connection, team: str | None, since: str | None, until: str | None
) -> list[UserUsage]:
    db.execute("BEGIN")  # one snapshot for all teams
    try:
        first, last = db.execute(_KNOWN).fetchone()
        periods = cover(since, until, (first, last) if first else None)
        wholes = {name: times.whole for name, times in periods.items() if times.whole}
        halves = {name: times.half for name, times in periods.items() if times.half}
        by_user = BY_USER_SIGNED if min(wholes.values(), default=1) < 0 else BY_USER
        asked = {"wholes": json.dumps(wholes), "halves": json.dumps(halves)}
        known = (json.dumps(periods),)
        teams = [(team,)] if team is not None else db.execute(TEAMS, known).fetchall()
        return [
            UserUsage(*row)
            for (name,) in teams
            for row in db.execute(BY_USER_HALVED if halves else by_user, {"team": name, **asked})
        ]
    finally:
        db.execute("ROLLBACK")


def audit_sums(db: sqlite3.Connection, halves: str = "") -> list[Discrepancy]:
    """``Books.audit`` of a file with these tables, in one snapshot; ``halves`` is what asks for
    half months, where there are any."""
    db.execute("BEGIN")  # one snapshot for all sums
    try:
        return discrepancies(
            db.execute(AUDIT_USAGE).fetchone(),
            db.execute(_AUDIT_BALANCES).fetchall(),
            db.execute(AUDIT_JOURNAL).fetchall(),
            db.execute(AUDIT_USERS).fetchall(),
            db.execute(AUDIT_MONTHS).fetchall(),
            db.execute(halves).fetchall(),
        )
    finally:
        db.execute("ROLLBACK")
