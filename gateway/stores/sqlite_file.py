"""One SQLite file: how it is opened, checked and migrated, and how it is written and read.

It knows nothing of money; what is kept in the file is ``sqlite``'s. How a write becomes durable::

    any task ──► queue ──► the writer: one thread a process ──► futures, after COMMIT
                           takes what has queued (at most 128)
                           flock(<db>.lock)  BEGIN IMMEDIATE
                             calls on money: read, decided, written together (sqlite_page)
                             other work: SAVEPOINT, one piece of it, RELEASE
                           COMMIT (fsync)    checkpoint when the WAL is large

Several processes may use the file at once: a serving gateway, its other workers, a command. They
take turns by a blocking ``flock``, which is fair and wakes at once, where SQLite's own busy
handler polls: with it the slowest of a hundred reservations took 17 ms instead of 1.4 s
(money.md 2). A program that knows nothing of that lock is waited for by SQLite's busy timeout.

A task that is cancelled while its operation is queued does not take the operation back. One that
is *droppable* is skipped where the writer still can.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from gateway.ports import StoreError
from gateway.stores.page import NOTHING, Needs, Page
from gateway.stores.sqlite_page import Asked, Known, book, decide_known, is_of_one_call
from gateway.stores.writing import Operation, T, WriterThread, deliver, unavailable, unreadable

WAL_BYTES = 4 * 1024 * 1024
BUSY_SECONDS = 2.0
STATEMENTS = 256
"""Prepared ones that a connection remembers: there are a dozen for each table that is written."""
CHECKED_BYTES = 256 * 1024 * 1024
"""A larger file is not looked through when it is opened: of 6 GB that takes most of a minute.
SQLite itself refuses one that was cut off."""
APPLICATION_ID = 0x67747779
"""``gtwy``, as 0001_initial.sql writes it into the file's header."""
NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "fuse.sshfs", "fuse.glusterfs"}
)

_log = logging.getLogger(__name__)


def open_database(path: Path, busy_seconds: float) -> tuple[Writer, Reader]:
    """Makes the file (0600) where there is none, and brings its schema up to date.

    Blocks for as long as a check of the file takes. Raises ``StoreError`` for a file that is
    corrupt, newer than this program, not ours, gone while its journal is still there, or on a
    network file system.
    """
    if sqlite3.sqlite_version_info < (3, 37):
        raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old: 3.37 is needed")
    path = path.resolve()
    file = DatabaseFile(path, busy_seconds)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_network(path.parent)
        file.open_lock()
        with file.locked():
            if not path.exists():
                file.create()
            connection = file.check_and_migrate()
        try:
            reader = Reader(file)
        except BaseException:
            connection.close()
            raise
        return Writer(file, connection), reader
    except StoreError:
        file.close()
        raise
    except PermissionError as error:
        file.close()
        raise StoreError(
            f"{path} cannot be opened: this user may not write {error.filename}. Give it that "
            "right, or change storage.database"
        ) from error
    except (OSError, sqlite3.Error) as error:
        file.close()
        # A file in the place of the folder: it is there, and is none.
        in_the_way = isinstance(error, FileExistsError)
        why = "Not a directory" if in_the_way else getattr(error, "strerror", None) or error
        where = getattr(error, "filename", None) or path.parent
        raise StoreError(
            f"{path} cannot be opened: {where}: {why}. Look at that folder and its disk, or change "
            "storage.database"
        ) from error


def one_number(db: sqlite3.Connection, sql: str) -> int:
    """The one whole number that a query answers."""
    return int(db.execute(sql).fetchone()[0])


class DatabaseFile:
    """The database file, the lock file beside it, and how they are opened."""

    def __init__(self, path: Path, busy_seconds: float) -> None:
        self.path = path
        self.busy_seconds = busy_seconds
        self._wal = path.with_name(path.name + "-wal")
        # Looked at in every transaction: a ``Path`` is four times as slow to ask.
        self._name, self._wal_name = os.fspath(self.path), os.fspath(self._wal)
        self._lock: int | None = None
        self._identity = (0, 0)

    def open_lock(self) -> None:
        lock = self.path.with_name(self.path.name + ".lock")
        self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """This process's turn among those that write here; waits for it without end."""
        if self._lock is None:
            raise OSError("the lock file is closed")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def create(self) -> None:
        """Makes the file elsewhere and moves it into place whole: so an existing file that is
        empty or half made was damaged, and is never taken for a new one."""
        for leftover in (self._wal, self.path.with_name(self.path.name + "-shm")):
            if leftover.exists():
                raise StoreError(
                    f"{self.path} is gone but {leftover.name} is still there: the database was "
                    "deleted or moved. Put it back, or move the leftovers away to start anew."
                )
        fresh = self.path.with_name(self.path.name + ".new")
        for crashed in (fresh, Path(f"{fresh}-wal"), Path(f"{fresh}-shm")):
            crashed.unlink(missing_ok=True)
        os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with closing(_connect(fresh, self.busy_seconds)) as connection:
            _migrate(connection, fresh)
        fresh.rename(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def check_and_migrate(self) -> sqlite3.Connection:
        """A connection to a file that was looked through, if it is not large, and is up to date."""
        status = self.path.stat()
        self._identity = (status.st_dev, status.st_ino)
        if status.st_size == 0:
            raise self._damaged("it is empty")
        try:
            connection = self.connect()
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error
        try:
            if status.st_size <= CHECKED_BYTES:
                (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                if found != "ok":
                    raise self._damaged(str(found))
            _migrate(connection, self.path)
        except sqlite3.DatabaseError as error:
            connection.close()
            raise self._damaged(str(error)) from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _damaged(self, what: str) -> StoreError:
        return StoreError(
            f"{self.path} cannot be used ({what}). Nothing was changed. If it is damaged, "
            "restore it from a backup; if another program has it open, close that."
        )

    def connect(self) -> sqlite3.Connection:
        """Raises ``StoreError`` for another program's database, before anything is changed."""
        return _connect(self.path, self.busy_seconds, ours=True)

    def still_there(self) -> None:
        """Raises ``OSError`` when the file we have open is not the one at the path any more:
        what is written to it would be lost with the last process."""
        status = os.stat(self._name)
        if (status.st_dev, status.st_ino) != self._identity:
            raise OSError(f"{self.path} was replaced while it was in use")

    def wal_is_large(self) -> bool:
        return os.stat(self._wal_name).st_size > WAL_BYTES


def _connect(path: Path, busy_seconds: float, ours: bool = False) -> sqlite3.Connection:
    # isolation_level None: this file says itself where a transaction begins and ends.
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=rw",
        uri=True,
        timeout=busy_seconds,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=STATEMENTS,
    )
    try:
        if ours and one_number(connection, "PRAGMA application_id") != APPLICATION_ID:
            raise StoreError(f"{path} is not a database of this gateway.")
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreError(f"{path} cannot have a write-ahead log here ({mode}).")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        # A log that starts again is cut to this, so that its size says how full it is.
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        connection.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Applies the numbered files that the database has not seen, each in one transaction."""
    folder = resources.files("gateway.stores").joinpath("migrations", "sqlite")
    files = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".sql")),
        key=lambda file: file.name,
    )
    seen = one_number(connection, "PRAGMA user_version")
    if seen > len(files):
        raise StoreError(
            f"{path} has schema {seen}, this program knows {len(files)}: it was written by a newer "
            "release. Use that one, or restore a backup made before the upgrade."
        )
    for number, file in enumerate(files[seen:], start=seen + 1):
        sql = file.read_text(encoding="utf-8")
        try:
            connection.executescript(
                f"BEGIN IMMEDIATE;\n{sql}\nPRAGMA user_version = {number};\nCOMMIT;"
            )
        except sqlite3.Error:
            if connection.in_transaction:
                connection.rollback()
            raise


def _refuse_network(folder: Path) -> None:
    """WAL needs memory that all its users share, which a network file system has not."""
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return
    kind = filesystem_of(folder.resolve(), mounts)
    if kind in NETWORK_FILESYSTEMS:
        raise StoreError(
            f"{folder} is on a network file system ({kind}), where SQLite loses data. "
            "Use a local disk, or postgresql:// for several machines."
        )


def filesystem_of(folder: Path, mounts: str) -> str:
    """The type of the file system that ``folder`` (absolute, resolved) is on.

    ``mounts`` is the text of ``/proc/mounts``; the deepest mount point wins, of two the later.
    """
    best, kind = -1, ""
    for line in mounts.splitlines():
        _, raw_point, line_kind, *_ = line.split(" ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), raw_point))
        if folder.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), line_kind
    return kind


class _Operation(Operation[T]):
    """Either a call that is ``asked`` together with others, or ``work`` that has the writer's
    transaction for itself. ``committed``: nothing may say any more that it is not in the ledger."""

    __slots__ = ("asked", "committed", "work")

    def __init__(
        self,
        work: Callable[[sqlite3.Connection], T] | None = None,
        asked: Asked | None = None,
        *,
        awaited: bool = True,
        droppable: bool = False,
        rid: str = "",
    ) -> None:
        super().__init__(awaited=awaited, droppable=droppable, rid=rid)
        self.work = work
        self.asked = asked
        self.committed = False

    def hear(self, answer: Any) -> None:
        if isinstance(answer, Exception):
            self.fail(answer)
        else:
            self.succeed(answer)


def _work(connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], Any]) -> Any:
    """Works inside a savepoint, so that a bad operation does not sink the batch; its result, or
    what it raised.

    Raises what makes the whole transaction doubtful: a full disk, a lock, a damaged file.
    """
    connection.execute("SAVEPOINT operation")
    try:
        answer = work(connection)
    except Exception as error:
        if not is_of_one_call(error):
            raise
        connection.execute("ROLLBACK TO operation")
        answer = error
    connection.execute("RELEASE operation")
    return answer


def _run(connection: sqlite3.Connection, batch: Sequence[_Operation[Any]], known: Known) -> None:
    """Each operation hears its answer, in their order. Raises as ``_work``."""
    asked = [operation.asked for operation in batch if operation.asked is not None]
    if len(asked) == len(batch):
        _hear(batch, _book(connection, asked, known))
        return
    known.forget()
    for operation in batch:
        if operation.work is not None:
            operation.hear(_work(connection, operation.work))
        elif operation.asked is not None:
            _hear([operation], book(connection, [operation.asked]))


def _book(connection: sqlite3.Connection, asked: Sequence[Asked], known: Known) -> list[Any]:
    """As ``book``, for what is alone in its transaction. A savepoint would copy every page that
    is changed, so it is only made where something did go wrong."""
    try:
        return decide_known(connection, asked, known)
    except Exception as error:
        known.forget()
        if not is_of_one_call(error):
            raise
    connection.execute("ROLLBACK")
    connection.execute("BEGIN IMMEDIATE")
    return book(connection, asked)


def _hear(batch: Sequence[_Operation[Any]], answers: Sequence[Any]) -> None:
    for operation, answer in zip(batch, answers, strict=True):
        operation.hear(answer)


class Writer(WriterThread[_Operation[Any]]):
    """The one thread of this process that writes to the file."""

    def __init__(self, file: DatabaseFile, connection: sqlite3.Connection) -> None:
        # Longer than one batch that waits in vain, and the batch before it, can take.
        super().__init__(patience_seconds=2 * file.busy_seconds + 1)
        self._file = file
        self._connection: sqlite3.Connection | None = connection
        self._known = Known()
        self.start()

    async def submit(
        self, work: Callable[[sqlite3.Connection], T], *, droppable: bool = False
    ) -> T:
        """Runs ``work`` in the next transaction; returns its result once that is durable.

        Raises what ``work`` raises, and ``LedgerUnavailable`` when the commit failed or is not
        done in time (where it may still come: every operation can be repeated).
        """
        result: T = await self._asked(_Operation(work, droppable=droppable))
        return result

    def decide(
        self, needs: Needs, decide: Callable[[Page], T], *, droppable: bool = False
    ) -> asyncio.Future[T]:
        """Decides in the next transaction, on a page with others; what is awaited returns and
        raises as ``submit``. Raises ``LedgerUnavailable`` where it cannot be queued."""
        # Not _Operation[T](...): that goes through ``typing`` for each of them, 3 us.
        operation: _Operation[T] = _Operation(asked=Asked(needs, decide), droppable=droppable)
        return self._asked(operation)

    def post(self, decide: Callable[[Page], object], rid: str) -> None:
        """Decides in the next transaction; nobody waits, and a failure is only logged."""
        self._leave(_Operation(asked=Asked(NOTHING, decide), awaited=False, rid=rid))

    def work(self, batch: Sequence[_Operation[Any]]) -> None:
        try:
            self._commit(batch)
        except (sqlite3.Error, OSError, StoreError) as error:
            _log.warning("%d operations are not in the ledger: %s", len(batch), error)
            self._give_up(batch, error)
        except Exception as error:  # noqa: BLE001 - the thread outlives whatever it was
            _log.error("%d operations are not in the ledger", len(batch), exc_info=error)
            self._give_up(batch, error)

    def end(self) -> None:
        if self._connection is not None:
            # The last one to close the file moves its log into it: that too in turn.
            with self._file.locked():
                self._connection.close()
        self._file.close()

    def _commit(self, batch: Sequence[_Operation[Any]]) -> None:
        with self._file.locked():
            wanted = [operation for operation in batch if not operation.abandoned]
            if not wanted:
                return
            self._file.still_there()
            if self._connection is None:
                self._connection = self._file.connect()
            self._connection.execute("BEGIN IMMEDIATE")
            _run(self._connection, wanted, self._known)
            self._connection.execute("COMMIT")
            # From here on nothing that goes wrong may say that it is not in the ledger.
            for operation in wanted:
                operation.committed = True
            deliver(wanted)
            self._checkpoint(self._connection)

    def _checkpoint(self, connection: sqlite3.Connection) -> None:
        """Moves a large log into the database. Under the lock: no other process may restart the
        log meanwhile (the WAL-reset race). What is committed stays so if this fails."""
        try:
            if self._file.wal_is_large():
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except (sqlite3.Error, OSError) as error:
            _log.warning("the ledger's log was not moved into the database: %s", error)

    def _give_up(self, batch: Sequence[_Operation[Any]], error: Exception) -> None:
        """Leaves no half transaction behind, and tells every waiter."""
        self._known.forget()
        try:
            if self._connection is not None and self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            # A connection that cannot even roll back is no longer of use: closing it does.
            if self._connection is not None:
                self._connection.close()
                self._connection = None
        failed = [operation for operation in batch if not operation.committed]
        for operation in failed:
            refusal = unavailable()
            refusal.__cause__ = error
            operation.fail(refusal)
        deliver(failed)


class Reader:
    """A second connection in a thread of its own: reads never wait for the writer."""

    def __init__(self, file: DatabaseFile) -> None:
        self._file = file
        self._connection = file.connect()
        self._connection.execute("PRAGMA query_only = ON")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ledger-reader")
        self._closed = False

    def beside(self) -> Reader:
        """Another reader of the same file: what it reads keeps nobody here waiting."""
        return Reader(self._file)

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Raises ``LedgerUnavailable`` when the file cannot be read."""
        if self._closed:
            raise unreadable()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, work, self._connection)
        except (sqlite3.Error, OSError) as error:
            raise unreadable() from error

    async def ping(self, sql: str) -> None:
        """Raises ``LedgerUnavailable`` when ``sql`` has no answer, or the file is not there."""

        def read(db: sqlite3.Connection) -> None:
            self._file.still_there()
            db.execute(sql).fetchone()

        await self.run(read)

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._pool.shutdown)
            self._connection.close()
