"""The schema of a PostgreSQL database: its version, and how it is brought up to date.

Each numbered file is applied in one transaction, by one process at a time. The files only ever
add: programs that run already go on with a newer schema, so an upgrade comes before the new
release. What is refused is to *start* a release on a schema that it does not know.
"""

from __future__ import annotations

import psycopg

from gateway.ports import StoreError
from gateway.stores.postgres_link import Link, connect_at_start, place, said_of
from gateway.stores.schema import Versions, migrations

_LOCK = 0x67747779
"""``gtwy``: whose turn it is to change the schema."""
_DDL_LOCK_SECONDS = 10
"""How long a change waits for the tables; everybody else waits behind it."""
_VERSION_TABLE = """
CREATE TABLE IF NOT EXISTS schema_version (
    version    INTEGER     NOT NULL PRIMARY KEY,
    applied_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
)
"""


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
            before = _step(link, files)
            database = before
            while database < len(files):
                database = _step(link, files) + 1
        except psycopg.Error as error:
            raise StoreError(
                f"{place(url)} is not upgraded: {said_of(error, url)}. Nothing is half done; "
                "mend this and run `gateway db upgrade` again"
            ) from None
    found = Versions(before, len(files))
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


def _step(link: Link, files: list[str]) -> int:
    """Applies the next file, if there is one; returns the version before it."""
    with link.transaction():
        link.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        link.execute("SELECT set_config('lock_timeout', %s, true)", (f"{_DDL_LOCK_SECONDS}s",))
        link.execute(_VERSION_TABLE)
        version = _version(link)
        if version < len(files):
            # Without parameters, so that it may be many statements.
            link.execute(files[version].encode())
            link.execute("INSERT INTO schema_version (version) VALUES (%s)", (version + 1,))
    return version


def _version(link: Link) -> int:
    there = link.execute("SELECT to_regclass('schema_version') IS NOT NULL").fetchone()
    if there != (True,):
        return 0
    found = link.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchone()
    return int(found[0]) if found else 0
