"""The schema of a PostgreSQL database: its version, and how it is brought up to date.

Each numbered file is applied in one transaction, by one process at a time. The files only ever
add: programs that run already go on with a newer schema, so an upgrade comes before the new
release. What is refused is to *start* a release on a schema that it does not know.

What takes long in a large database, an index or a sum of all calls, is made before its file is
applied, in steps that keep nobody waiting. All of them can be repeated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Final

import psycopg

from gateway.ports import StoreError
from gateway.stores.postgres_link import Link, connect_at_start, place, said_of
from gateway.stores.schema import Versions, migrations

_LOCK = 0x67747779
"""``gtwy``: whose turn it is to change the schema."""
_DDL_LOCK_SECONDS = 1
"""How long a change waits for the tables; everybody else waits behind it."""
_DDL_TRIES = 60
_VERSION_TABLE = """
CREATE TABLE IF NOT EXISTS schema_version (
    version    INTEGER     NOT NULL PRIMARY KEY,
    applied_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
)
"""


_INDEXES = {
    "hold_day": "hold (day)",
    "hold_asking": """hold (rid) WHERE state = 'X' OR flags NOT IN ('[]', '["soft"]')""",
}
_HALF_MADE = """
SELECT 1 FROM pg_index WHERE indexrelid = to_regclass(%s) AND NOT indisvalid
"""
# Without a parameter: else the transaction keeps a snapshot, and an index waits for that.
_MY_TURN = f"SELECT pg_try_advisory_xact_lock({_LOCK + 1})"
_TURN_SECONDS = 0.2
# Whoever has a closed call has a row of daily usage.
_DAYS = "SELECT DISTINCT day FROM usage_daily ORDER BY day"
_COUNT_DAY = ("SELECT count_users_of_day(%s)", "SELECT count_forgotten_of_day(%s)")
_COUNT_MONTH = "SELECT count_users_of_month(%s)"


def versions(url: str) -> Versions:
    """Raises ``StoreError`` where the database cannot be reached."""
    link = connect_at_start(url, read_only=True)
    with link:
        return schema_of(link)


def schema_of(link: Link) -> Versions:
    return Versions(_version(link), len(migrations("postgres")))


def upgrade(url: str) -> Versions:
    """Applies what the database has not seen; returns what it had before.

    Harmless where nothing is missing, and where somebody else does the same. Raises
    ``StoreError``; every file that was applied before stays.
    """
    files = migrations("postgres")
    link = connect_at_start(url, patient=True)
    with link:
        try:
            before = None
            while (database := _version(link)) < len(files):
                if database + 1 in _BEFORE:
                    _prepare(link, url, database + 1)
                if _step_patiently(link, files, database) and before is None:
                    before = database
        except psycopg.Error as error:
            raise StoreError(
                f"{place(url)} is not upgraded: {said_of(error, url)}. Nothing is half done; "
                "mend this and run `gateway db upgrade` again"
            ) from None
    found = Versions(database if before is None else before, len(files))
    refuse_newer(found, url)
    return found


def refuse_other(link: Link, url: str) -> None:
    """Raises ``StoreError`` unless the schema is the one that this program knows."""
    found = schema_of(link)
    refuse_newer(found, url)
    if found.upgrade_needed:
        raise StoreError(
            f"{place(url)} has schema {found.database}, this program needs {found.program}: run "
            "`gateway db upgrade`"
        )


def refuse_newer(found: Versions, url: str) -> None:
    if found.too_new:
        raise StoreError(
            f"{place(url)} has schema {found.database}, this program knows {found.program}: it was "
            "upgraded by a newer release. Use that one, or restore a backup made before the upgrade"
        )


def count_users(link: Link) -> None:
    """Makes the sums of users, of all days that there are: each of them in a transaction of its
    own, unless one is open."""
    days = [str(day) for (day,) in link.execute(_DAYS).fetchall()]
    for day in days:
        for statement in _COUNT_DAY:
            link.execute(statement, (day,))
    count_months(link)


def count_months(link: Link) -> None:
    """Of their days the sums of all months, and of half months: as ``count_users``."""
    days = link.execute(_DAYS).fetchall()
    for month in sorted({str(day)[:7] for (day,) in days}):
        link.execute(_COUNT_MONTH, (month,))


def _prepare(link: Link, url: str, file: int) -> None:
    """Two at once would each add everything. Turns are asked for again and again: an index that is
    made while others go on waits for whoever waits for a lock."""
    with connect_at_start(url, patient=True) as turn:
        while not _prepared_in_turn(link, turn, file):
            threading.Event().wait(_TURN_SECONDS)


def _prepared_in_turn(link: Link, turn: Link, file: int) -> bool:
    with turn.transaction():
        if turn.execute(_MY_TURN.encode()).fetchone() != (True,):
            return False
        if _version(link) < file:
            _BEFORE[file](link)
    return True


def _user_usage(link: Link) -> None:
    _make_indexes(link)
    count_users(link)


def _make_indexes(link: Link) -> None:
    for name, what in _INDEXES.items():
        # One that was broken off is there, and of no use.
        if link.execute(_HALF_MADE, (name,)).fetchone() is not None:
            link.execute(f"DROP INDEX {name}".encode())
        link.execute(f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {name} ON {what}".encode())


def _step_patiently(link: Link, files: list[str], database: int) -> bool:
    """As ``_step``. Calls wait behind whoever waits for a table: where a backup or a report is
    being read, it is tried for a second, and again a second later."""
    for _ in range(_DDL_TRIES - 1):
        try:
            return _step(link, files, database)
        except psycopg.errors.LockNotAvailable:
            threading.Event().wait(_DDL_LOCK_SECONDS)
    return _step(link, files, database)


def _step(link: Link, files: list[str], database: int) -> bool:
    """Applies the file behind version ``database``. False where somebody else has."""
    with link.transaction():
        link.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        link.execute("SELECT set_config('lock_timeout', %s, true)", (f"{_DDL_LOCK_SECONDS}s",))
        link.execute(_VERSION_TABLE)
        version = _version(link)
        if version != database:
            return False
        # Without parameters, so that it may be many statements.
        link.execute(files[version].encode())
        link.execute("INSERT INTO schema_version (version) VALUES (%s)", (version + 1,))
    return True


def _version(link: Link) -> int:
    there = link.execute("SELECT to_regclass('schema_version') IS NOT NULL").fetchone()
    if there != (True,):
        return 0
    found = link.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchone()
    return int(found[0]) if found else 0


_BEFORE: Final[Mapping[int, Callable[[Link], None]]] = {4: _user_usage, 6: count_months}
"""By the number of a file, what is made before it is applied."""
