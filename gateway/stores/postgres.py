"""One PostgreSQL database, open: the store of many replicas.

Each process has two connections: every write goes through its writer (``postgres_writer``), every
read over its reader's. What a transaction decides is in ``postgres_page``.
"""

from __future__ import annotations

from gateway.domain.transition import OnConflict, ignore_conflict
from gateway.stores.postgres_books import PostgresBooks
from gateway.stores.postgres_directory import PostgresDirectory
from gateway.stores.postgres_ledger import PostgresLedger
from gateway.stores.postgres_link import connect_at_start
from gateway.stores.postgres_ownership import PostgresOwnership
from gateway.stores.postgres_schema import refuse_other
from gateway.stores.postgres_upkeep import PostgresUpkeep
from gateway.stores.postgres_writer import Reader, Writer


class PostgresStore:
    """``Store`` on PostgreSQL: its parts are views of one database."""

    def __init__(self, writer: Writer, reader: Reader, on_conflict: OnConflict) -> None:
        self._writer = writer
        self._reader = reader
        self.ledger = PostgresLedger(writer, reader, on_conflict, self.aclose)
        self.books = PostgresBooks(writer, reader)
        self.upkeep = PostgresUpkeep(writer, reader)
        self.directory = PostgresDirectory(writer, reader)
        self.ownership = PostgresOwnership(writer, reader)

    @classmethod
    def open(
        cls, url: str, *, on_conflict: OnConflict = ignore_conflict, caller_time: bool = False
    ) -> PostgresStore:
        """Connects, and checks the version of the schema.

        Blocks for a few seconds at most; call it before serving. ``on_conflict`` is called on the
        event loop for a repeated settlement that names another amount. With ``caller_time`` the
        instants that callers name decide about leases, and not the server's clock. Raises
        ``StoreError`` for a server that does not answer or is too old, and for a schema that is
        not the one that this program knows.
        """
        reader = connect_at_start(url, read_only=True)
        try:
            refuse_other(reader, url)
            writer = connect_at_start(url)
        except BaseException:
            reader.close()
            raise
        return cls(Writer(url, writer, caller_time), Reader(url, reader), on_conflict)

    @property
    def clock_skew_seconds(self) -> float:
        """By how much this process's clock is ahead of the server's, as of the last beat."""
        return self.upkeep.clock_skew_seconds

    async def aclose(self) -> None:
        """Commits what is queued and closes both connections. Repeating it is harmless."""
        await self._reader.aclose()
        await self._writer.aclose()
