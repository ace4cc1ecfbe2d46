"""One SQLite file, open: the store of a gateway on one machine.

Each write is one operation of the writer's next transaction (``sqlite_file``), each read goes
over a connection of its own. A reservation that nobody waits for any more is skipped where the
writer still can; otherwise it stands until the sweep ends it.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from gateway.domain.transition import OnConflict, ignore_conflict
from gateway.stores.sqlite_books import SQLiteBooks
from gateway.stores.sqlite_directory import SQLiteDirectory
from gateway.stores.sqlite_file import BUSY_SECONDS, Reader, Writer, one_number, open_database
from gateway.stores.sqlite_ledger import SQLiteLedger
from gateway.stores.sqlite_ownership import SQLiteOwnership
from gateway.stores.sqlite_read import read_only
from gateway.stores.sqlite_upkeep import SQLiteUpkeep


class SQLiteStore:
    """``Store`` on one database file: its parts are views of it."""

    def __init__(self, writer: Writer, reader: Reader, on_conflict: OnConflict) -> None:
        self._writer = writer
        self._reader = reader
        # What adds up everything must not keep the look-up of a key waiting.
        self._long_reader = reader.beside()
        self.ledger = SQLiteLedger(writer, reader, on_conflict, self.aclose)
        self.books = SQLiteBooks(writer, reader, self._long_reader)
        self.upkeep = SQLiteUpkeep(writer, reader)
        self.directory = SQLiteDirectory(writer, reader)
        self.ownership = SQLiteOwnership(writer, reader)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        on_conflict: OnConflict = ignore_conflict,
        busy_seconds: float = BUSY_SECONDS,
    ) -> SQLiteStore:
        """Opens the file, makes it (0600) where there is none, and brings its schema up to date.

        Blocks for as long as a check of the file takes; call it before serving. ``on_conflict``
        is called on the event loop for a repeated settlement that names another amount.
        ``busy_seconds`` is how long a lock of another program is waited for. Raises
        ``StoreError`` for a file that is corrupt, newer than this program, not ours, gone while
        its journal is still there, or on a network file system.
        """
        writer, reader = open_database(path, busy_seconds)
        return cls(writer, reader, on_conflict)

    @property
    def clock_skew_seconds(self) -> float:
        return 0.0

    async def aclose(self) -> None:
        """Commits what is queued and closes the file. Repeating it is harmless."""
        await self._long_reader.aclose()
        await self._reader.aclose()
        await self._writer.aclose()


# A file of an earlier release has no such table before it is brought up to date.
_HAS_DECLARED = "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = 'declared_key'"


def keys_in(path: Path) -> int:
    """How many keys a database file knows by a digest: those of its directory, and those that the
    configuration declares; 0 where there is no such file yet.

    Raises ``StoreError``.
    """
    if not path.exists():
        return 0
    return read_only(path, _count_keys)


def _count_keys(db: sqlite3.Connection, _: bool) -> int:
    known = one_number(db, "SELECT count(*) FROM key")
    if one_number(db, _HAS_DECLARED):
        known += one_number(db, "SELECT count(DISTINCT id) FROM declared_key")
    return known
