"""The two connections of a process to PostgreSQL, each in a thread of its own.

How a write becomes durable::

    any task ──► queue ──► the writer: one thread a process ──► futures, after COMMIT
                           takes what has queued (at most 128)
                           BEGIN lock | write COMMIT               (two round trips; one more
                           where the accounts of a hold are not known)

Calls on money share a transaction and a ``Page``; whatever else is written has one of its own
(an *errand*). When a transaction fails because of what one call asked for, its calls are sent in
halves, and these in halves, so that only that call fails.

A transaction that the server, the network or a race broke is sent again, over another connection,
at most three times. Each one leaves its number in a row of its writer. Where the answer to a COMMIT
was lost, the server's process that had it is ended before anything else begins, however much later
that is; then that row says whether it happened. So nothing is done twice, whether it has a rid or
not, after a crash or a failover too, and nothing comes late. (The server's own number of a
transaction, ``pg_xact_status``, may be another's after a crash.)

A process that is ended while its COMMIT waits for a synchronous standby commits all the same, and
its row is seen, though no standby has it. Hence that it happened is believed only once a later
commit of this writer was answered: standbys get the log in its order. Where that one is not
answered either, what was asked for is ``LedgerUnavailable``, and may have happened.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString, TypeAlias

import psycopg

from gateway.domain.errors import LedgerUnavailable
from gateway.ports import NotKnown
from gateway.stores.page import NOTHING, Needs, Outdated
from gateway.stores.postgres_link import (
    Link,
    ServerSilent,
    connect,
    is_of_no_use,
    is_transient,
    said_of,
)
from gateway.stores.postgres_page import Known, Learnt, Page
from gateway.stores.rows import micros
from gateway.stores.writing import Operation, T, WriterThread, deliver, unavailable, unreadable

ATTEMPTS = 4
"""The first, and three repeats."""
PAUSE_SECONDS = 0.1
PATIENCE_SECONDS = 3.0
"""How long a caller waits. What it asked for may still come: everything can be repeated."""
ENDING_LOOKS = 20

_log = logging.getLogger(__name__)

_BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
_NOW = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
_NUMBER = """
INSERT INTO writer (id, last, at) VALUES (%s, %s, %s)
ON CONFLICT (id) DO UPDATE SET last = excluded.last, at = excluded.at
"""
# It writes nothing new: only its COMMIT counts, which waits for the standbys as any other.
_CONFIRM = "UPDATE writer SET at = at WHERE id = %s AND last = %s"
_LEAVE = "DELETE FROM writer WHERE id = %s"
_END = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE pid = %s AND backend_start = %s::timestamptz
"""


class _Lost(Exception):
    """A COMMIT was sent and not answered. ``transaction`` is what became of it, or not."""

    def __init__(self, transaction: Transaction) -> None:
        super().__init__("the answer to a COMMIT was lost")
        self.transaction = transaction


class _Unconfirmed(Exception):
    """A transaction happened on this server, and no standby says in time that it has it."""


@dataclass(slots=True)
class Transaction:
    """One transaction of a writer, and its number there.

    ``now`` is the server's clock as it began, in microseconds. ``caller_time``: the callers'
    clocks are believed instead.
    """

    link: Link
    writer: str
    number: int
    caller_time: bool = False
    now: int = 0
    ending: bool = False
    """COMMIT was sent."""
    result: Any = None

    def instant(self, at: datetime) -> int:
        """The instant that leases are judged by, in microseconds: the server's, or the caller's."""
        return micros(at) if self.caller_time else self.now

    def run(self, work: Callable[[Transaction], T]) -> T:
        """Raises ``psycopg.Error`` and ``_Lost``, and whatever ``work`` raises."""
        try:
            return work(self)
        except psycopg.Error as error:
            if self.ending and (self.link.closed or self.link.broken):
                raise _Lost(self) from error
            raise

    def begin(self, learn: Callable[[], T]) -> T:
        """``learn`` is asked in the same round trip."""
        with self.link.pipeline():
            self.link.execute(_BEGIN)
            now = self.link.execute(_NOW)
            learnt = learn()
        (self.now,) = now.fetchone() or (0,)
        return learnt

    def commit(self, result: object, last: Callable[[Link], None]) -> None:
        """``last`` are the final statements, in the same round trip."""
        self.result = result
        with self.link.pipeline():
            last(self.link)
            self.link.execute(_NUMBER, (self.writer, self.number, self.now))
            self.ending = True
            self.link.execute("COMMIT")


Errand: TypeAlias = Callable[[Transaction], T]
Decision: TypeAlias = Callable[[Page, Transaction], T]


def alone(work: Callable[[Transaction], T]) -> Errand[T]:
    """An errand: ``work`` in a transaction of its own."""

    def run(transaction: Transaction) -> T:
        transaction.begin(lambda: None)
        result = work(transaction)
        transaction.commit(result, lambda link: None)
        return result

    return run


def with_page(
    needs: Callable[[Transaction], list[Needs]], work: Callable[[Page, Transaction], T]
) -> Errand[T]:
    """An errand that decides about a page: ``needs`` may ask the database what to lock."""

    def run(transaction: Transaction) -> T:
        transaction.begin(lambda: None)
        asked = needs(transaction)
        with transaction.link.pipeline():
            learnt = Page.learn(transaction.link, asked, Known())
        page = Page.lock(transaction.link, learnt)
        result = work(page, transaction)
        transaction.commit(result, page.write)
        return result

    return run


class _Operation(Operation[T]):
    """Either ``decide`` on a page of which it ``needs`` some rows, or an ``errand``."""

    __slots__ = ("decide", "errand", "needs")

    def __init__(
        self,
        *,
        needs: Needs = NOTHING,
        decide: Decision[T] | None = None,
        errand: Errand[T] | None = None,
        awaited: bool = True,
        droppable: bool = False,
        rid: str = "",
    ) -> None:
        super().__init__(awaited=awaited, droppable=droppable, rid=rid)
        self.needs = needs
        self.decide = decide
        self.errand = errand

    def run(self, page: Page, transaction: Transaction) -> None:
        self.result = self.error = None
        if self.decide is None or self.abandoned:
            return
        try:
            self.succeed(self.decide(page, transaction))
        except Outdated:
            raise
        except Exception as error:  # noqa: BLE001 - its waiter hears of it
            self.fail(error)


class Writer(WriterThread[_Operation[Any]]):
    """The one thread of this process that writes, and its connection."""

    def __init__(self, url: str, link: Link, caller_time: bool) -> None:
        super().__init__(PATIENCE_SECONDS)
        self._url = url
        self._caller_time = caller_time
        self._link: Link | None = link
        self._id = secrets.token_hex(8)
        self._transactions = 0
        self._known = Known()
        self._hanging: tuple[int, str] | None = None
        """The server's process whose COMMIT was not answered. It may still come, or keep locks."""
        self._pause = threading.Event()
        self.start()

    def decide(
        self, needs: Needs, decide: Decision[T], *, droppable: bool = False
    ) -> asyncio.Future[T]:
        """Decides in the next transaction; the result, to be awaited, once that is durable.

        Raises what ``decide`` raises, and ``LedgerUnavailable`` when the commit failed or is not
        done in time (where it may still come: every call can be repeated).
        """
        operation: _Operation[T] = _Operation(needs=needs, decide=decide, droppable=droppable)
        return self._asked(operation)

    async def run(self, errand: Errand[T]) -> T:
        """Runs an errand; raises as ``decide``."""
        result: T = await self._asked(_Operation(errand=errand))
        return result

    def post(self, decide: Decision[object], rid: str) -> None:
        """Decides in the next transaction; nobody waits, and a failure is only logged."""
        self._leave(_Operation(decide=decide, awaited=False, rid=rid))

    def work(self, batch: Sequence[_Operation[Any]]) -> None:
        bookings = [operation for operation in batch if operation.errand is None]
        if bookings:
            self._book(bookings)
        for operation in batch:
            if operation.errand is not None:
                self._run_errand(operation, operation.errand)

    def end(self) -> None:
        if self._link is not None:
            with suppress(psycopg.Error):
                self._link.execute(_LEAVE, (self._id,))
        self._drop()

    def _book(self, batch: list[_Operation[Any]]) -> None:
        try:
            wanted = self._attempt(lambda transaction: _book(batch, transaction, self._known))
            deliver(wanted)
        except LedgerUnavailable:
            for operation in batch:
                operation.fail(unavailable())
            deliver(batch)
        except Exception as error:  # noqa: BLE001 - the thread outlives whatever it was
            if len(batch) == 1:
                batch[0].fail(error)
                deliver(batch)
                return
            # Something that one of them asked for. The others must not suffer.
            half = len(batch) // 2
            self._book(batch[:half])
            self._book(batch[half:])

    def _run_errand(self, operation: _Operation[Any], errand: Errand[Any]) -> None:
        try:
            operation.succeed(self._attempt(errand))
        except Exception as error:  # noqa: BLE001 - its waiter hears of it
            operation.fail(error)
        deliver([operation])

    def _attempt(self, work: Errand[T]) -> T:
        """Runs a transaction, and again where something broke it. Raises ``LedgerUnavailable``,
        and what ``work`` itself is guilty of."""
        lost: Transaction | None = None
        outdated, pause_seconds = False, 0.0
        for attempt in range(1, ATTEMPTS + 1):
            self._pause.wait(pause_seconds)
            pause_seconds = attempt * PAUSE_SECONDS
            try:
                link = self._connected()
                if lost is not None:
                    if self._happened(link, lost):
                        result: T = lost.result
                        return result
                    lost = None
                self._transactions += 1
                return Transaction(link, self._id, self._transactions, self._caller_time).run(work)
            except _Lost as error:
                lost = error.transaction
                self._hanging = lost.link.process
                self._broken(error)
            except _Unconfirmed as error:
                self._broken(error)
                break
            except Outdated as error:
                # Nothing failed, where it happens once: what was remembered is forgotten now.
                self._broken(error, quietly=not outdated)
                outdated, pause_seconds = True, pause_seconds if outdated else 0.0
            except psycopg.Error as error:
                self._broken(error)
                if not is_transient(error):
                    raise
            except BaseException as error:
                self._broken(error)
                raise
        raise unavailable()

    def _connected(self) -> Link:
        """The connection, over which a transaction may begin: nothing before it can still come."""
        if self._link is None:
            self._link = connect(self._url)
        if self._hanging is not None:
            self._end(self._link, self._hanging)
            self._hanging = None
        return self._link

    def _end(self, link: Link, process: tuple[int, str]) -> None:
        """Ends a process of the server whose connection is gone: it may not have noticed."""
        for _ in range(ENDING_LOOKS):
            if not link.execute(_END, process).fetchall():
                return
            self._pause.wait(PAUSE_SECONDS)
        raise psycopg.OperationalError("a transaction before this one has not ended yet")

    def _happened(self, link: Link, lost: Transaction) -> bool:
        """Whether a transaction was committed, once its process has ended.

        Raises ``_Unconfirmed`` where that would be lost with this server.
        """
        # This COMMIT may hang as that one did, with the lock of the writer's row.
        self._hanging = link.process
        try:
            confirmed = link.execute(_CONFIRM, (self._id, lost.number)).rowcount
        except ServerSilent:
            raise _Unconfirmed("no synchronous standby confirms what was committed") from None
        self._hanging = None
        return confirmed > 0

    def _broken(self, error: BaseException, *, quietly: bool = False) -> None:
        """Leaves no half transaction behind, and no connection that is of no use."""
        self._known.forget()
        if not quietly and not isinstance(error, NotKnown):
            _log.warning("a transaction of the ledger failed: %s", said_of(error, self._url))
        if self._link is None:
            return
        if isinstance(error, (psycopg.Error, _Lost, _Unconfirmed)):
            # After an error in a pipeline, psycopg believes in prepared statements that the server
            # has skipped.
            self._drop()
            return
        try:
            self._link.execute("ROLLBACK")
        except psycopg.Error:
            self._drop()

    def _drop(self) -> None:
        if self._link is not None:
            with suppress(psycopg.Error):
                self._link.close()
            self._link = None


def _book(
    batch: list[_Operation[Any]], transaction: Transaction, known: Known
) -> list[_Operation[Any]]:
    """Decides about all that are still wanted, in one transaction; returns them."""
    wanted = [operation for operation in batch if not operation.abandoned]
    if not wanted:
        return wanted
    link, needs = transaction.link, [operation.needs for operation in wanted]
    if known.unknown(needs):
        page = Page.lock(link, transaction.begin(lambda: Page.learn(link, needs, known)))
    else:
        # A round trip less: there is nothing to learn.
        page = Page.locked(
            transaction.begin(lambda: Page.begin_locking(link, Learnt(needs, known, None)))
        )
    for operation in wanted:
        operation.run(page, transaction)
    transaction.commit(wanted, page.write)
    known.committed(page)
    return wanted


class Reader:
    """A second connection in a thread of its own: reads never wait for the writer."""

    def __init__(self, url: str, link: Link) -> None:
        self._url = url
        self._link: Link | None = link
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ledger-reader")
        self._closed = False

    async def run(self, read: Callable[[Link], T]) -> T:
        """Raises ``LedgerUnavailable`` when the database cannot be read in time."""
        return await self._submit(lambda: self._read(read), PATIENCE_SECONDS)

    async def run_long(self, read: Callable[[Link], T]) -> T:
        """As ``run``, over a connection of its own, for as long as it takes."""

        def work() -> T:
            with connect(self._url, read_only=True, patient=True) as link:
                return read(link)

        try:
            return await asyncio.to_thread(work)
        except psycopg.Error as error:
            raise self._unreadable(error) from None

    async def ping(self, sql: LiteralString) -> None:
        """Raises ``LedgerUnavailable`` when ``sql`` has no answer, or the server is a standby."""

        def read(link: Link) -> None:
            answer = link.execute(sql).fetchone()
            if answer is None or answer[0]:
                link.close()
                raise psycopg.OperationalError("the server has become a standby")

        await self.run(read)

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._pool.shutdown)
            self._drop()

    async def _submit(self, work: Callable[[], T], seconds: float) -> T:
        if self._closed:
            raise unreadable()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(seconds):
                return await loop.run_in_executor(self._pool, work)
        except TimeoutError:
            raise unreadable() from None
        except psycopg.Error as error:
            raise self._unreadable(error) from None

    def _read(self, read: Callable[[Link], T]) -> T:
        """Once more over a new connection, where the old one had broken meanwhile."""
        fresh = self._link is None
        try:
            return self._read_once(read)
        except psycopg.Error:
            if fresh or self._link is not None:
                raise
            return self._read_once(read)

    def _read_once(self, read: Callable[[Link], T]) -> T:
        if self._link is None:
            self._link = connect(self._url, read_only=True)
        try:
            return read(self._link)
        except psycopg.Error as error:
            if is_of_no_use(self._link, error):
                self._drop()
            raise

    def _drop(self) -> None:
        if self._link is not None:
            with suppress(psycopg.Error):
                self._link.close()
            self._link = None

    def _unreadable(self, error: psycopg.Error) -> LedgerUnavailable:
        _log.warning("the ledger cannot be read: %s", said_of(error, self._url))
        return unreadable()
