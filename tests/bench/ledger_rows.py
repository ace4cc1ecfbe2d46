# ruff: noqa: S608 - every part of these statements is ours
"""A ledger of any size, made by the database itself: the rows that N settled calls leave behind.

200 teams, 1,000 keys, 10 models and 20,000 end users over 90 days, a few of each doing most of it.
One call in 200 was voided, one in 1,000 is unresolved, one in 5 had a guessed bound, one in 2,000
asks for a look; those of the last day may have an idempotency key. The same N gives the same rows
in both databases, and `gateway ledger verify` finds that they add up.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from gateway.domain.quota import MONEY_WINDOWS, Scope, period
from gateway.stores.postgres_link import connect
from gateway.stores.postgres_schema import count_users
from gateway.stores.rows import micros
from gateway.stores.schema import half_months, migrations
from gateway.stores.sqlite_backup import USER_USAGE_SO_FAR

DAYS = 90
FIRST = date(2026, 8, 25)
"""The first day; the last is 2026-11-22."""
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
"""Behind all of them: when the calls that are measured are made."""
TEAMS, KEYS, MODELS, USERS_OF_TEAM = 200, 1000, 10, 100
DAY_MICROS = 86_400_000_000
BOUND = 211_000_000

Execute = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Dialect:
    """What the two databases say differently. ``{n}`` is how many calls."""

    series: str
    word: str
    """Of ``{x}``, 32 bits, as eight hexadecimal digits."""
    scratch: str
    accounts: str
    """The accounts of a JSON list in ``accounts``, as ``one.value``."""
    integer: str
    order: str
    """Of the rows of ``hold``: where they lie. SQLite's lie by rid, PostgreSQL's as they came."""


SQLITE = Dialect(
    series="WITH RECURSIVE series (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM series"
    " WHERE n < {n}) SELECT n FROM series",
    word="printf('%08x', {x})",
    scratch="CREATE TEMP TABLE",
    accounts="json_each(sums.accounts)",
    integer="{x}",
    order="a",
)
POSTGRES = Dialect(
    series="SELECT n FROM generate_series(1::bigint, {n}) AS series (n)",
    word="lpad(to_hex(({x})::bigint), 8, '0')",
    scratch="CREATE TEMP TABLE",
    accounts="json_array_elements_text(sums.accounts::json)",
    integer="({x})::bigint",
    order="n",
)

_SECONDARY_SQLITE = """
SELECT name, sql FROM sqlite_schema
 WHERE type = 'index' AND tbl_name IN ('hold', 'journal') AND sql IS NOT NULL
"""
_SECONDARY_POSTGRES = """
SELECT indexname, indexdef FROM pg_indexes
 WHERE schemaname = 'public' AND tablename IN ('hold', 'journal') AND indexname NOT LIKE '%_pkey'
"""


def fill_sqlite(path: Path, calls: int) -> None:
    """Into a file that has the newest schema and no rows. Nothing else may have it open."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = OFF")
        # A log of all of it would be written, and then copied.
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("PRAGMA cache_size = -2000000")
        db.execute("PRAGMA temp_store = MEMORY")
        indexes = db.execute(_SECONDARY_SQLITE).fetchall()
        db.execute("BEGIN")
        _fill(SQLITE, db.execute, indexes, calls)
        for statement in migrations("sqlite")[USER_USAGE_SO_FAR - 1].split(";"):
            db.execute(statement)
        db.execute(half_months())
        db.execute("COMMIT")
        db.execute("ANALYZE")
        db.execute("PRAGMA journal_mode = WAL")


def fill_postgres(url: str, calls: int) -> None:
    """Into a database that has the newest schema and no rows."""
    with connect(url, patient=True) as link:

        def execute(sql: str) -> object:
            return link.execute(sql.encode())

        execute("SET synchronous_commit = off")
        execute("SET work_mem = '512MB'")
        execute("SET maintenance_work_mem = '1GB'")
        indexes = link.execute(_SECONDARY_POSTGRES).fetchall()
        execute("BEGIN")
        _fill(POSTGRES, execute, indexes, calls)
        execute("ANALYZE hold")
        count_users(link)
        execute("SELECT setval(pg_get_serial_sequence('journal', 'seq'), 2 * " + f"{calls} + 1)")
        execute("COMMIT")
        execute("VACUUM (ANALYZE, FREEZE)")
        execute("CHECKPOINT")


def _fill(speak: Dialect, execute: Execute, indexes: Sequence[Any], calls: int) -> None:
    for name, _ in indexes:
        execute(f"DROP INDEX {name}")
    _days(speak, execute)
    if calls:
        for statement in _statements(speak, calls):
            execute(statement)
    for _, definition in indexes:
        execute(definition)


def _days(speak: Dialect, execute: Execute) -> None:
    """The labels of each day, which no database can be asked for in the gateway's words."""
    execute(
        f"{speak.scratch} labels (d INTEGER PRIMARY KEY, day TEXT, starts BIGINT, team TEXT,"
        " key_id TEXT)"
    )
    for number in range(DAYS):
        day = FIRST + timedelta(days=number)
        noon = datetime(day.year, day.month, day.day, 12, tzinfo=UTC)
        labels = [period(window, noon).label for window in MONEY_WINDOWS]
        team, key = (
            ", ".join(json.dumps(f"{scope}:@|{label}") for label in labels)
            for scope in (Scope.TEAM, Scope.KEY)
        )
        starts = micros(noon) - DAY_MICROS // 2
        execute(f"INSERT INTO labels VALUES ({number}, '{day}', {starts}, '{team}', '{key}')")


def _statements(speak: Dialect, calls: int) -> list[str]:
    def word(x: str) -> str:
        return speak.word.format(x=x)

    # Each multiplier gives numbers that have nothing to do with those of the others; the first one
    # is odd, so that no two calls have the same. What is sorted is narrow: only the numbers.
    usage = json.dumps(
        {
            "outcome": "delivered",
            "basis": "usage",
            "images": 1,
            "usage": {
                "text_in": 60, "image_in": 0, "cached_text_in": 0, "cached_image_in": 0,
                "text_out": 0, "image_out": 4160, "svg": None,
            },
        }
    )  # fmt: skip
    unknown = json.dumps({"outcome": "unknown", "basis": "estimated", "images": 0})
    refused = json.dumps({"outcome": "refused", "basis": "none", "images": 0})
    raw = f"""
    SELECT n, n * 2654435761 % 4294967296 AS a, n * 40503 % 4294967291 AS b,
           n * 48271 % 2147483647 AS c, n * 69621 % 2147483647 AS h,
           n * 16807 % 2147483647 AS i, n * 950706376 % 2147483647 AS j,
           (n - 1) * {DAYS} / {calls} AS d
      FROM ({speak.series.format(n=calls)}) AS numbered
    """
    chosen = f"""
    SELECT n, a, b, c, d, h, i, j, h % 1000 * (h % 1000) / 1000 AS k,
           CASE WHEN i % 200 = 0 THEN 'V' WHEN i % 1000 = 1 THEN 'X' ELSE 'P' END AS state,
           j % {USERS_OF_TEAM} * (j % {USERS_OF_TEAM}) / {USERS_OF_TEAM} AS u
      FROM ({raw}) AS raw
    """
    model = f"'model-' || ((k + CASE WHEN c % 10 < 7 THEN 0 WHEN c % 10 < 9 THEN 3 ELSE 7 END)\
 % {MODELS})"
    hold = f"""
    INSERT INTO hold (rid, state, bound, cost, accounts, team, key_id, model, operation, upstream,
           images, price_id, fingerprint, idempotency_key, worker, at, day, lease_ends, outcome,
           basis, flags, end_user)
    SELECT 'req_' || {word("a")} || {word("b")} || {word("c")}, state, {BOUND},
           CASE state WHEN 'P' THEN 40000000 + j % 100000000 WHEN 'X' THEN {BOUND} ELSE 0 END,
           '[' || replace(labels.team, '@', 'team-' || (k % {TEAMS})) || ', '
               || replace(labels.key_id, '@', 'key_' || {word("k")}) || ']',
           'team-' || (k % {TEAMS}), 'key_' || {word("k")}, {model}, 'generation', 'openai',
           1, 'openai/gpt-image-2@2026-04-01',
           {" || ".join(word(x) for x in "acbijhab")},
           CASE WHEN d = {DAYS - 1} AND i % 5 = 0 THEN 'idempotent-' || n END,
           'gateway-7f9c/1/0a1b2c3d',
           starts + ((n - 1) * {DAYS} % {calls}) * ({DAY_MICROS} / {calls}), day,
           starts + ((n - 1) * {DAYS} % {calls}) * ({DAY_MICROS} / {calls}) + 660000000,
           CASE state WHEN 'P' THEN 'delivered' WHEN 'X' THEN 'unknown' ELSE 'refused' END,
           CASE state WHEN 'P' THEN 'usage' WHEN 'X' THEN 'estimated' ELSE 'none' END,
           CASE WHEN state = 'V' THEN '[]' WHEN h % 2000 = 7 THEN '["no_usage"]'
                WHEN h % 5 = 0 THEN '["soft"]' ELSE '[]' END,
           CASE WHEN j % 10 = 0 THEN ''
                ELSE 'u_' || {word("k % " + str(TEAMS))} || {word("u")} || '0123' END
      FROM (SELECT * FROM ({chosen}) AS chosen ORDER BY {speak.order}) AS sorted
      JOIN labels USING (d)
    """
    journal = f"""
    INSERT INTO journal (seq, at, rid, kind, pending, posted, detail)
    SELECT 2 * n - 1 + step,
           starts + ((n - 1) * {DAYS} % {calls}) * ({DAY_MICROS} / {calls}) + step * 20000000,
           'req_' || {word("a")} || {word("b")} || {word("c")},
           CASE step WHEN 0 THEN 'H' ELSE state END,
           CASE step WHEN 0 THEN {BOUND} ELSE -{BOUND} END,
           CASE WHEN step = 0 THEN 0 WHEN state = 'P' THEN 40000000 + j % 100000000
                WHEN state = 'X' THEN {BOUND} ELSE 0 END,
           CASE WHEN step = 0 THEN '{{}}' WHEN state = 'P' THEN '{usage}'
                WHEN state = 'X' THEN '{unknown}' ELSE '{refused}' END
      FROM ({chosen}) AS chosen JOIN labels USING (d),
           (SELECT 0 AS step UNION ALL SELECT 1) AS steps
    """
    daily = """
    INSERT INTO usage_daily
    SELECT day, team, key_id, model, count(*), sum(CASE state WHEN 'P' THEN 1 ELSE 0 END), 0,
           60 * sum(CASE state WHEN 'P' THEN 1 ELSE 0 END), 0, 0,
           4160 * sum(CASE state WHEN 'P' THEN 1 ELSE 0 END), sum(cost), 0,
           sum(CASE state WHEN 'X' THEN 1 ELSE 0 END),
           sum(CASE state WHEN 'X' THEN cost ELSE 0 END),
           sum(CASE flags WHEN '["no_usage"]' THEN 1 ELSE 0 END)
      FROM hold WHERE state IN ('P', 'X') GROUP BY day, team, key_id, model
    """
    posted = speak.integer.format(x="sum(cost)")
    balance = f"""
    INSERT INTO balance (account, posted)
    SELECT one.value, {posted}
      FROM (SELECT accounts, sum(cost) AS cost FROM hold GROUP BY accounts) AS sums,
           {speak.accounts} AS one (value)
     GROUP BY one.value
    """
    if speak is SQLITE:
        balance = balance.replace(" AS one (value)", " AS one")
    return [hold, journal, daily, balance]
