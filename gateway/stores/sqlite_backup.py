"""The books of an SQLite file, read at one instant for a backup, and written from one."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gateway.ports import StoreError
from gateway.stores.backup import TABLES, Backup, Row, Table, sqlite_batches
from gateway.stores.schema import half_months, migrations, sqlite_versions
from gateway.stores.sqlite_file import APPLICATION_ID, BUSY_SECONDS, DatabaseFile, one_number

USER_USAGE_SO_FAR = 5
"""The file that adds the sums of users up."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    db: sqlite3.Connection
    schema: int
    kind: str = "SQLite"

    def batches(self, table: Table) -> Iterator[Sequence[Row]]:
        return sqlite_batches(self.db, table)


@contextmanager
def sqlite_snapshot(path: Path) -> Iterator[_Snapshot]:
    """A database file as it is now, for as long as it takes; whoever writes it goes on, and its
    log grows meanwhile. Raises ``StoreError``."""
    found = sqlite_versions(path)
    if not path.exists():
        raise StoreError(f"there is no database {path}")
    if found.upgrade_needed or found.too_new:
        raise StoreError(
            f"{path} has schema {found.database}, this program knows {found.program}: "
            + ("use the newer release" if found.too_new else "run `gateway db upgrade`")
        )
    uri = f"{path.absolute().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as db:
            if one_number(db, "PRAGMA application_id") != APPLICATION_ID:
                raise StoreError(f"{path} is not a database of this gateway")
            db.execute("BEGIN")
            yield _Snapshot(db, found.database)
    except sqlite3.Error as error:
        raise StoreError(f"{path} cannot be read: {error}") from error


def restore_sqlite(path: Path, backup: Backup) -> None:
    """Writes a backup into a file that has the newest schema and nothing else, in one transaction
    and in turn with every gateway. Raises ``StoreError``."""
    file = DatabaseFile(path.resolve(), BUSY_SECONDS)
    file.open_lock()
    try:
        with file.locked(), closing(file.connect()) as db:
            db.execute("BEGIN IMMEDIATE")
            _refuse_used(db, path)
            for table in TABLES:
                if table.replaced:
                    db.execute(f"DELETE FROM {table.name}")  # noqa: S608 - a name of ours
                for batch in backup.batches(table):
                    db.executemany(table.insert, batch)
            if backup.lacks_users:
                for statement in migrations("sqlite")[USER_USAGE_SO_FAR - 1].split(";"):
                    db.execute(statement)
            db.execute(half_months())
            db.execute("COMMIT")
    except sqlite3.Error as error:
        raise StoreError(f"nothing was restored: {path} cannot be written: {error}") from error
    finally:
        file.close()


def _refuse_used(db: sqlite3.Connection, path: Path) -> None:
    for table in TABLES:
        rows = f"SELECT EXISTS (SELECT 1 FROM {table.name})"  # noqa: S608 - a name of ours
        if not table.replaced and one_number(db, rows):
            raise StoreError(
                f"{path} is in use: its table {table.name} is not empty. Nothing was restored. "
                "Name a new file in storage.database, or move this one away with its -wal"
            )
