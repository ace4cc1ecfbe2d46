"""The books of a PostgreSQL database, read at one instant for a backup, and written from one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg

from gateway.ports import StoreError
from gateway.stores.backup import BATCH, TABLES, Backup, Row, Table
from gateway.stores.postgres_link import Link, connect_at_start, place, said_of
from gateway.stores.postgres_schema import count_users, refuse_other
from gateway.stores.schema import half_months, migrations

_SNAPSHOT = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_NEXT_LINE = """
SELECT setval(pg_get_serial_sequence('journal', 'seq'), coalesce(max(seq), 1), max(seq) IS NOT NULL)
  FROM journal
"""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    link: Link
    schema: int
    kind: str = "PostgreSQL"

    def batches(self, table: Table) -> Iterator[Sequence[Row]]:
        # The server keeps the rows that were not asked for yet.
        with self.link.cursor(name=f"backup_{table.name}") as cursor:
            cursor.execute(table.select.encode())
            while batch := cursor.fetchmany(BATCH):
                yield batch


@contextmanager
def postgres_snapshot(url: str) -> Iterator[_Snapshot]:
    """A database as it is now, for as long as it takes; whoever writes it goes on. Raises
    ``StoreError``."""
    try:
        with connect_at_start(url, read_only=True, patient=True) as link:
            refuse_other(link, url)
            link.execute(_SNAPSHOT)
            yield _Snapshot(link, len(migrations("postgres")))
    except psycopg.Error as error:
        raise StoreError(f"{place(url)} cannot be read: {said_of(error, url)}") from None


def restore_postgres(url: str, backup: Backup) -> None:
    """Writes a backup into a database that has the newest schema and nothing else, in one
    transaction. Raises ``StoreError``."""
    try:
        with connect_at_start(url, patient=True) as link:
            refuse_other(link, url)
            with link.transaction():
                _refuse_used(link, url)
                for table in TABLES:
                    _copy(link, table, backup)
                if backup.lacks_users:
                    count_users(link)
                link.execute(half_months().encode())
                # The next line of the journal comes behind those that were restored.
                link.execute(_NEXT_LINE)
    except psycopg.Error as error:
        raise StoreError(
            f"nothing was restored: {place(url)} cannot be written: {said_of(error, url)}"
        ) from None


def _copy(link: Link, table: Table, backup: Backup) -> None:
    if table.replaced:
        link.execute(f"DELETE FROM {table.name}".encode())  # noqa: S608 - a name of ours
    into = f"COPY {table.name} ({table.names}) FROM STDIN"
    with link.cursor() as cursor, cursor.copy(into.encode()) as copy:
        for batch in backup.batches(table):
            for row in batch:
                copy.write_row(row)


def _refuse_used(link: Link, url: str) -> None:
    names = ", ".join(table.name for table in TABLES)
    link.execute(f"LOCK TABLE {names} IN SHARE ROW EXCLUSIVE MODE".encode())
    for table in TABLES:
        found = link.execute(f"SELECT 1 FROM {table.name} LIMIT 1".encode())  # noqa: S608
        if not table.replaced and found.fetchone() is not None:
            raise StoreError(
                f"{place(url)} is in use: its table {table.name} is not empty. Nothing was "
                "restored. Make a new database (createdb), name it in storage.database, and run "
                "`gateway db upgrade`"
            )
