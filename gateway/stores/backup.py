"""A backup of the books: one file that both databases are written to and read from.

It is an SQLite file of its own kind: the tables that matter, with the columns that both databases
have in common (``rows``), and beside them what each should be. Rows pass in batches, so that memory
stays flat. A file that is there is whole: it is made elsewhere, synced, and moved into place.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from gateway.domain.books import Discrepancy
from gateway.ports import StoreError
from gateway.stores.rows import instant, micros
from gateway.stores.sqlite_books import audit_sums
from gateway.stores.sqlite_file import one_number

FORMAT = 3
"""Of the tables below. Another one for every change of them; those before it are read too."""
APPLICATION_ID = 0x67746277
"""``gtbw``: no gateway takes it for its database, and ``gateway db restore`` takes nothing else."""
_APPLICATION_AT, _HEADER_BYTES = 68, 72
"""Where SQLite keeps that number, and how much of a file has to be read for it."""
BATCH = 1000
USERS_SINCE = 3
"""The first format that has the sums of users."""

Row: TypeAlias = Sequence[Any]


@dataclass(frozen=True, slots=True)
class Table:
    """One table of the books. ``columns`` is each column's name and type in SQLite; its rows are
    in the order of its primary key, which is the first ``key`` of them."""

    name: str
    columns: tuple[tuple[str, str], ...]
    key: int = 1
    replaced: bool = False
    """What an empty database may have of it gives way to the backup's."""
    since: int = 1
    """The first format that has it."""
    later: tuple[tuple[int, Any], ...] = ()
    """Of its last columns, in their order: the first format that has each, and what it is in the
    formats before."""

    @property
    def names(self) -> str:
        return ", ".join(name for name, _ in self.columns)

    @property
    def order(self) -> str:
        return ", ".join(name for name, _ in self.columns[: self.key])

    @property
    def select(self) -> str:
        """All its rows, in order."""
        return f"SELECT {self.names} FROM {self.name} ORDER BY {self.order}"  # noqa: S608

    @property
    def insert(self) -> str:
        """One row, in SQLite's words."""
        marks = ", ".join("?" * len(self.columns))
        return f"INSERT INTO {self.name} ({self.names}) VALUES ({marks})"  # noqa: S608

    def as_of(self, form: int) -> tuple[Table, Row]:
        """The table as a format has it, and what its rows lack at their ends."""
        missing = [default for since, default in self.later if since > form]
        there = self.columns[: len(self.columns) - len(missing)]
        return replace(self, columns=there, later=()), missing

    @property
    def create(self) -> str:
        columns = ", ".join(f"{name} {kind}" for name, kind in self.columns)
        return (
            f"CREATE TABLE {self.name} ({columns}, PRIMARY KEY ({self.order}))"
            " STRICT, WITHOUT ROWID"
        )


def _table(
    name: str,
    columns: str,
    key: int = 1,
    *,
    replaced: bool = False,
    since: int = 1,
    later: tuple[tuple[int, Any], ...] = (),
) -> Table:
    """``columns`` are words: a name that ends in ``#`` is a number, in ``%`` bytes."""
    kinds = {"#": "INTEGER", "%": "BLOB"}
    parts = [(word.rstrip("#%"), kinds.get(word[-1], "TEXT")) for word in columns.split()]
    return Table(name, tuple(parts), key, replaced, since, later)


TABLES = (
    _table("balance", "account posted# pending#"),
    _table(
        "hold",
        "rid state bound# cost# accounts team key_id model operation upstream images# price_id"
        " fingerprint idempotency_key worker at# day lease_ends# outcome basis flags"
        " end_user drawn_model drawn_images# drawn_cost#",
        later=((2, ""), (2, ""), (2, 0), (2, 0)),
    ),
    _table("journal", "seq# at# rid kind pending# posted# detail"),
    _table(
        "usage_daily",
        "day team key_id model requests# images# cached_requests# text_in# image_in# text_out#"
        " image_out# cost# avoided# unresolved# unresolved_cost# flagged#",
        4,
    ),
    _table("adjustment", "id at# rid team key_id model day accounts amount# reason actor"),
    _table("rolled_up", "account posted# holds#"),
    _table(
        "usage_by_user",
        "period team end_user requests# images# cost# unresolved#",
        3,
        since=USERS_SINCE,
    ),
    _table("retention", "one# before#", replaced=True),
    _table("notice", "account mark claimed_at# sent_at#", 2, replaced=True),
    _table("bound_factor", "upstream model millionths#", 2, replaced=True),
    _table("declared_key", "digest% id", replaced=True),
    _table("team", "id models limits cache_enabled# disabled# time_zone"),
    _table(
        "key",
        "id digest% team name models limits created# expires# disabled# revoked# pepper",
    ),
    _table(
        "owned",
        "id kind team key_id upstream mark created# expires# size_bytes# purpose detail",
        since=2,
    ),
)
"""What a backup has, a team before its keys. Who runs calls (``worker``) and what one process did
last (``writer``) are of no use elsewhere."""


class Snapshot(Protocol):
    """A database at one instant."""

    @property
    def kind(self) -> str:
        """``SQLite`` or ``PostgreSQL``."""

    @property
    def schema(self) -> int: ...

    def batches(self, table: Table) -> Iterator[Sequence[Row]]: ...


@dataclass(frozen=True, slots=True)
class Contents:
    """What a backup says of itself. ``rows`` is how many each table has."""

    kind: str
    schema: int
    created: datetime
    rows: Mapping[str, int]
    open_holds: int


def write_backup(
    path: Path, snapshot: Snapshot, created: datetime
) -> tuple[Contents, list[Discrepancy]]:
    """Writes a snapshot to a file (0600), whole or not at all; says what is in it, and where its
    books do not add up. Raises ``OSError``, ``StoreError``."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        # Of a name that nobody has said.
        raise StoreError(
            f"{path} cannot be written ({error.strerror or error}): let this user write to "
            f"{path.parent}, or name another file"
        ) from error
    try:
        with closing(_connect(part, "rw")) as db:
            # Nobody reads it before it is whole, and half of it is thrown away.
            db.execute("PRAGMA journal_mode = OFF")
            db.execute("PRAGMA synchronous = OFF")
            contents = _fill(db, snapshot, created)
            discrepancies = audit_sums(db)
        _sync(part)
        part.rename(path)
        _sync(path.parent)
    except sqlite3.Error as error:
        part.unlink(missing_ok=True)
        raise StoreError(f"{path} cannot be written: {error}") from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return contents, discrepancies


def _fill(db: sqlite3.Connection, snapshot: Snapshot, created: datetime) -> Contents:
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute("BEGIN")
    db.execute(_HEAD)
    db.execute(_PARTS)
    rows = {}
    for table in TABLES:
        db.execute(table.create)
        checksum = _Checksum()
        for batch in snapshot.batches(table):
            db.executemany(table.insert, batch)
            checksum.add(batch)
        rows[table.name] = checksum.rows
        db.execute(_ADD_PART, (table.name, checksum.rows, checksum.value))
    db.execute(_ADD_HEAD, (FORMAT, snapshot.kind, snapshot.schema, micros(created)))
    db.execute("COMMIT")
    return Contents(snapshot.kind, snapshot.schema, created, rows, one_number(db, _OPEN))


class Backup:
    """A backup file, open. Its rows are checked while they are read."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        """Raises ``StoreError`` for one that this program cannot read."""
        self._path = path
        self._db = db
        if one_number(db, "PRAGMA application_id") != APPLICATION_ID:
            raise StoreError(f"{path} is not a backup of a gateway's books")
        heads = db.execute("SELECT format, source, schema, created FROM backup").fetchall()
        found = {
            name: (count, value)
            for name, count, value in db.execute("SELECT name, rows, sha256 FROM backup_part")
        }
        if len(heads) != 1:
            raise self._damaged("it does not say what it is")
        [(form, kind, schema, created)] = heads
        if form > FORMAT:
            raise StoreError(
                f"{path} has format {form}, this program knows {FORMAT}: it was made by a newer "
                "release. Use that one"
            )
        if set(found) != {table.name for table in TABLES if table.since <= form}:
            raise self._damaged("tables are missing")
        self._format: int = form
        self.lacks_users = form < USERS_SINCE
        """Whoever restores it adds the sums of users up."""
        self._parts: Mapping[str, tuple[int, str]] = found
        rows = {name: count for name, (count, _) in found.items()}
        open_holds = one_number(db, _OPEN)
        self.contents = Contents(kind, schema, instant(created), rows, open_holds)

    def batches(self, table: Table) -> Iterator[Sequence[Row]]:
        """All rows of a table, with what a format before this one did not have. Raises
        ``StoreError`` behind the last one where they are not those that were written: whoever has
        taken them gives them back."""
        if table.since > self._format:
            return
        written, missing = table.as_of(self._format)
        checksum = _Checksum()
        try:
            for batch in _batches(self._db, written, checksum):
                yield [(*row, *missing) for row in batch] if missing else batch
        except sqlite3.Error as error:
            raise self._damaged(str(error)) from error
        if (checksum.rows, checksum.value) != self._parts[table.name]:
            raise self._damaged(f"the rows of {table.name} are not those that were written")

    def _damaged(self, why: str) -> StoreError:
        return StoreError(f"{self._path} is damaged ({why}). Nothing was restored; use another one")


def may_be_replaced(path: Path) -> bool:
    """Whether a file is a backup, or has nothing in it: anything else is somebody's, the pepper or
    the log of the database perhaps. Raises ``OSError``."""
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    return not head or head[_APPLICATION_AT:] == APPLICATION_ID.to_bytes(4, "big")


@contextmanager
def open_backup(path: Path) -> Iterator[Backup]:
    """Raises ``StoreError`` for a file that is no backup, or one that this program cannot read."""
    if not path.is_file():
        raise StoreError(f"there is no file {path}")
    try:
        with closing(_connect(path, "ro")) as db:
            try:
                backup = Backup(path, db)
            except sqlite3.Error as error:
                raise StoreError(f"{path} cannot be read as a backup: {error}") from error
            yield backup
    except sqlite3.Error as error:
        raise StoreError(f"{path} cannot be restored: {error}") from error


def sqlite_batches(db: sqlite3.Connection, table: Table) -> Iterator[Sequence[Row]]:
    """All rows of a table in SQLite."""
    return _batches(db, table, _Checksum())


def _batches(db: sqlite3.Connection, table: Table, checksum: _Checksum) -> Iterator[Sequence[Row]]:
    with closing(db.execute(table.select)) as cursor:
        while batch := cursor.fetchmany(BATCH):
            checksum.add(batch)
            yield batch


class _Checksum:
    """How many rows there were, and what they said, in their order."""

    def __init__(self) -> None:
        self._sum = hashlib.sha256()
        self.rows = 0

    def add(self, batch: Sequence[Row]) -> None:
        for row in batch:
            line = [value.hex() if isinstance(value, bytes) else value for value in row]
            self._sum.update(json.dumps(line).encode() + b"\n")
        self.rows += len(batch)

    @property
    def value(self) -> str:
        return self._sum.hexdigest()


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, isolation_level=None)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_OPEN = "SELECT count(*) FROM hold WHERE state = 'H'"
_HEAD = """
CREATE TABLE backup (
    format  INTEGER NOT NULL PRIMARY KEY,
    source  TEXT    NOT NULL,   -- the kind of database
    schema  INTEGER NOT NULL,   -- its number there
    created INTEGER NOT NULL    -- microseconds since 1970-01-01 UTC
) STRICT
"""
_PARTS = """
CREATE TABLE backup_part (
    name   TEXT    NOT NULL PRIMARY KEY,
    rows   INTEGER NOT NULL,
    sha256 TEXT    NOT NULL     -- of its rows as JSON lines, in the order of its primary key
) STRICT
"""
_ADD_HEAD = "INSERT INTO backup (format, source, schema, created) VALUES (?, ?, ?, ?)"
_ADD_PART = "INSERT INTO backup_part (name, rows, sha256) VALUES (?, ?, ?)"
