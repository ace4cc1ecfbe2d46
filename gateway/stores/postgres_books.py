"""The books on PostgreSQL: look-ups, corrections, adjustments, and the audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.domain.books import Adjustment, Correction, Discrepancy, Hold, JournalLine
from gateway.domain.ledger import By, Entry, UsageRow, UserUsage
from gateway.domain.money import Money
from gateway.domain.periods import ONCE, cover
from gateway.domain.transition import DOUBTFUL
from gateway.stores.audit import (
    AUDIT_HALVES,
    AUDIT_JOURNAL,
    AUDIT_MONTHS,
    AUDIT_USAGE,
    AUDIT_USERS,
    discrepancies,
)
from gateway.stores.page import Needs
from gateway.stores.postgres_link import Link
from gateway.stores.postgres_page import Page
from gateway.stores.postgres_writer import Reader, Transaction, Writer, with_page
from gateway.stores.rows import (
    ADJUSTMENT_COLUMNS,
    HOLD_COLUMNS,
    JOURNAL_COLUMNS,
    USER_SUMS,
    adjustment_of,
    compare_booked,
    hold_of,
    journal_line_of,
    routed_of,
    usage_by_sql,
)

_HOLD = f"SELECT {HOLD_COLUMNS} FROM hold WHERE rid = %s"  # noqa: S608 - names of columns

_JOURNAL = f"SELECT {JOURNAL_COLUMNS} FROM journal WHERE rid = %s ORDER BY seq"  # noqa: S608

# The first condition is that of the index hold_asking.
_UNRESOLVED = f"""
SELECT {HOLD_COLUMNS}
  FROM hold
 WHERE (state = 'X' OR flags NOT IN ('[]', '["soft"]')) AND rid > %(after)s
   AND (state = 'X' OR state = 'P' AND EXISTS (
        SELECT 1 FROM json_array_elements_text(flags::json) AS flag
         WHERE flag = ANY(%(doubtful)s::text[])))
 ORDER BY rid LIMIT %(limit)s
"""  # noqa: S608 - names of columns

_OLDEST = f"SELECT {HOLD_COLUMNS} FROM hold WHERE state = 'H' ORDER BY lease_ends LIMIT 1"  # noqa: S608

_APPLIED = "SELECT count(*) FROM adjustment WHERE id = %s"

_FIND = f"SELECT {ADJUSTMENT_COLUMNS} FROM adjustment WHERE id = %s AND rid IS NULL"  # noqa: S608

# Whoever compares the books with a bill, one after the other: the next one compares with what the
# one before has booked. Nobody waits for this lock who has another.
_TURN = "SELECT pg_advisory_xact_lock(hashtextextended('adjust_all', 0))"

# Added up as they are read: to keep the calls of a day for both parts fills a file with them.
_ROUTED = """
WITH closed AS (
    SELECT upstream, team, key_id, model, drawn_model, count(*) AS requests,
           sum(CASE operation WHEN 'response' THEN 0 ELSE images END) AS images,
           sum(cost - drawn_cost) AS cost,
           sum(drawn_images) AS drawn_images, sum(drawn_cost) AS drawn_cost
      FROM hold WHERE day = %s AND state IN ('P', 'X')
     GROUP BY upstream, team, key_id, model, drawn_model
)
SELECT upstream, team, key_id, model, sum(requests), sum(images), sum(cost) FROM (
       SELECT upstream, team, key_id, model, requests, images, cost FROM closed
        UNION ALL
       SELECT upstream, team, key_id, drawn_model, 0, drawn_images, drawn_cost
         FROM closed WHERE drawn_model <> ''
       ) AS part GROUP BY upstream, team, key_id, model
"""

# Each by itself, so that each is found at its end of the index.
_KNOWN = """
SELECT (SELECT min(period) FROM usage_by_user), (SELECT max(period) FROM usage_by_user)
"""

# By period and then team, as the rows are sorted; one without a team is for all, some teams at a
# time: the sums of all users at once do not fit into a processor's cache, which takes a quarter
# longer. Every team is in one part, whatever the months say: the last one has no end, which is a
# look-up of its own (a comparison of rows costs a tenth more), and one of one team ends before
# whatever else begins with its name. OFFSET 0: each period is looked up by itself. A join of both
# reads the whole table, and sorts what it finds (the planner takes each day's users for others),
# which is two to three times as slow. Nothing is multiplied where nothing is subtracted or halved.
_BY_USER = """
WITH numbered (team, number) AS (
    SELECT team, row_number() OVER (ORDER BY team) FROM (
           SELECT DISTINCT team FROM usage_by_user
            WHERE period = ANY(%(months)s::text[]) AND %(team)s::text IS NULL) AS named
), part (first, next) AS MATERIALIZED (
    SELECT first, coalesce(lead(first) OVER (ORDER BY first), %(team)s::text || chr(1)) FROM (
           SELECT coalesce(%(team)s::text, '') AS first
            UNION ALL SELECT team FROM numbered WHERE number %% 16 = 0) AS one
)
SELECT sums.* FROM part CROSS JOIN LATERAL (
       SELECT team, end_user, {requests}::bigint, {images}::bigint, {cost}::bigint,
              {unresolved}::bigint
         FROM unnest(%(periods)s::text[], %(wholes)s::bigint[], %(halves)s::bigint[])
              AS asked (period, whole, half)
         CROSS JOIN LATERAL (
              SELECT * FROM usage_by_user
               WHERE period = asked.period AND team >= part.first AND team < part.next
               UNION ALL
              SELECT * FROM usage_by_user
               WHERE period = asked.period AND team >= part.first AND part.next IS NULL
              OFFSET 0) AS one
        GROUP BY team, end_user HAVING {requests} <> 0 OR {cost} <> 0
       OFFSET 0) AS sums
 ORDER BY team, end_user
"""
BY_USER, BY_USER_SIGNED = (
    _BY_USER.format(**{name: f"sum({times.format(name)})" for name in USER_SUMS})
    for times in ("{0}", "whole * {0} + coalesce(half * half_{0}, 0)")
)

_BY = {
    by: usage_by_sql(by, "%({})s::text".format, "({})::bigint".format, in_order=False) for by in By
}

_BOOKED = """
SELECT day, model, sum(cost) FROM usage_daily WHERE day = ANY(%s::text[]) GROUP BY day, model
"""

# Holds with the same accounts are added up before their accounts are taken apart: there are few
# such lists, one for each key and day.
_AUDIT_BALANCES = """
WITH held (accounts, posted, pending) AS (
    SELECT accounts, sum(cost), sum(CASE state WHEN 'H' THEN bound ELSE 0 END)
      FROM hold GROUP BY accounts
     UNION ALL
    SELECT accounts, amount, 0 FROM adjustment WHERE rid IS NULL
), parts (account, posted, pending, kept_posted, kept_pending) AS (
    SELECT one COLLATE "C", held.posted, held.pending, 0, 0
      FROM held, json_array_elements_text(held.accounts::json) AS one
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

_SNAPSHOT = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"


class PostgresBooks:
    """``Books`` on PostgreSQL."""

    def __init__(self, writer: Writer, reader: Reader) -> None:
        self._writer = writer
        self._reader = reader

    async def find(self, rid: str) -> Hold | None:
        row = await self._reader.run(lambda link: link.execute(_HOLD, (rid,)).fetchone())
        return None if row is None else hold_of(row)

    async def journal(self, rid: str) -> list[JournalLine]:
        rows = await self._reader.run(lambda link: link.execute(_JOURNAL, (rid,)).fetchall())
        return [journal_line_of(row) for row in rows]

    async def unresolved(self, limit: int = 100, after: str = "") -> list[Hold]:
        asked = {"after": after, "limit": limit, "doubtful": sorted(DOUBTFUL)}
        rows = await self._reader.run(lambda link: link.execute(_UNRESOLVED, asked).fetchall())
        return [hold_of(row) for row in rows]

    async def oldest_hold(self) -> Hold | None:
        row = await self._reader.run(lambda link: link.execute(_OLDEST).fetchone())
        return None if row is None else hold_of(row)

    async def correct(self, correction: Correction) -> Entry:
        if correction.cost < 0:
            raise ValueError("a cost is never negative")

        def correct(page: Page, transaction: Transaction) -> Entry:
            return page.correct(correction, _applied(transaction, correction.id))

        needs = [Needs(rids=(correction.rid,))]
        return await self._writer.run(with_page(lambda _: needs, correct))

    async def adjustment(self, adjustment_id: str) -> Adjustment | None:
        row = await self._reader.run(lambda link: link.execute(_FIND, (adjustment_id,)).fetchone())
        return None if row is None else adjustment_of(row)

    async def adjust(self, adjustment: Adjustment) -> bool:
        def adjust(page: Page, transaction: Transaction) -> bool:
            return bool(_adjust(page, transaction, [adjustment]))

        needs = [Needs(accounts=adjustment.accounts)]
        return await self._writer.run(with_page(lambda _: needs, adjust))

    async def adjust_all(
        self, adjustments: Sequence[Adjustment], seen: Mapping[tuple[str, str], Money]
    ) -> list[str]:
        def take_turn(transaction: Transaction) -> list[Needs]:
            transaction.link.execute(_TURN)
            return [Needs(accounts=one.accounts) for one in adjustments]

        def adjust(page: Page, transaction: Transaction) -> list[str]:
            days = sorted({day for day, _ in seen})
            rows = transaction.link.execute(_BOOKED, (days,)).fetchall()
            compare_booked(seen, {(day, model): int(cost) for day, model, cost in rows})
            return _adjust(page, transaction, adjustments)

        return await self._writer.run(with_page(take_turn, adjust))

    async def routed(self, day: str) -> list[tuple[str, UsageRow]]:
        rows = await self._reader.run_long(lambda link: link.execute(_ROUTED, (day,)).fetchall())
        return [routed_of(day, row) for row in rows]

    async def usage_by_user(
        self, team: str | None = None, since: str | None = None, until: str | None = None
    ) -> list[UserUsage]:
        def read(link: Link) -> list[UserUsage]:
            first, last = link.execute(_KNOWN).fetchall()[0]
            periods = cover(since, until, (first, last) if first else None)
            asked = {
                "team": team,
                "periods": list(periods),
                "wholes": [times.whole for times in periods.values()],
                "halves": [times.half for times in periods.values()],
                "months": sorted({period[:7] for period in periods}),
            }
            by_user = BY_USER if set(periods.values()) <= {ONCE} else BY_USER_SIGNED
            return [UserUsage(*row) for row in link.execute(by_user, asked).fetchall()]

        return await self._reader.run_long(read)

    async def usage_by(
        self,
        by: By,
        team: str | None = None,
        since: str | None = None,
        until: str | None = None,
    ) -> list[UsageRow]:
        asked = {"team": team, "since": since, "until": until}
        rows = await self._reader.run_long(lambda link: link.execute(_BY[by], asked).fetchall())
        return [UsageRow(*row) for row in rows]

    async def audit(self) -> list[Discrepancy]:
        """Over a connection of its own, for as long as it takes."""
        return await self._reader.run_long(_audit)


def _adjust(page: Page, transaction: Transaction, adjustments: Sequence[Adjustment]) -> list[str]:
    """The ids of those that were not applied before, each once."""
    new = {one.id: one for one in adjustments if not _applied(transaction, one.id)}
    for adjustment in new.values():
        page.adjust(adjustment)
    return list(new)


def _applied(transaction: Transaction, adjustment: str) -> bool:
    """Whether this id was applied. Of two at once, the second finds its row taken and begins
    anew."""
    return transaction.link.number(_APPLIED, (adjustment,)) > 0


def _audit(link: Link) -> list[Discrepancy]:
    link.execute(_SNAPSHOT)
    (usage,) = link.execute(AUDIT_USAGE).fetchall()
    balances = link.execute(_AUDIT_BALANCES).fetchall()
    journal = link.execute(AUDIT_JOURNAL).fetchall()
    users = link.execute(AUDIT_USERS).fetchall()
    months = link.execute(AUDIT_MONTHS).fetchall()
    halves = link.execute(AUDIT_HALVES).fetchall()
    link.execute("ROLLBACK")
    return discrepancies(usage, balances, journal, users, months, halves)
