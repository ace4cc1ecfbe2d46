"""What can befall a file: crashes, strangers, full disks, damage, and other processes."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import random
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from gateway.domain.books import Adjustment, Correction
from gateway.domain.call import Operation, Usage
from gateway.domain.errors import LedgerUnavailable
from gateway.domain.ledger import (
    Balance,
    Basis,
    Claim,
    Claimed,
    Denied,
    Entry,
    Event,
    Held,
    Line,
    Outcome,
    Replay,
    Settlement,
    State,
    UserUsage,
)
from gateway.domain.owned import Anchor, Owned, OwnedKind
from gateway.domain.quota import Limit, Scope, Unit, Window, period
from gateway.domain.team import Key, Team
from gateway.ports import NotKnown, StoreError
from gateway.stores import sqlite_file
from gateway.stores.memory_ledger import MemoryStore
from gateway.stores.sqlite import SQLiteStore
from gateway.stores.sqlite_books import (
    BY_USER,
    BY_USER_HALVED,
    BY_USER_SIGNED,
    ROUTED,
    TEAMS,
    UNRESOLVED,
)
from gateway.stores.sqlite_file import DatabaseFile, filesystem_of
from gateway.stores.sqlite_ownership import PAGES
from tests.contract import stores
from tests.valkey import eventually

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
ROOT = Path(__file__).parents[2]
BUSY_SECONDS = 0.2


def claim(rid: str, bound: int = 10, amount: int | None = None, key: str | None = None) -> Claim:
    accounts = tuple(
        Line(Limit(scope, owner, Unit.MONEY, window, amount), period(window, NOON))
        for scope, owner in ((Scope.KEY, "k1"), (Scope.TEAM, "growth"))
        for window in (Window.DAY, Window.MONTH)
    )
    return Claim(
        rid,
        "growth",
        "k1",
        "flare",
        Operation.GENERATION,
        "openai",
        1,
        bound,
        accounts,
        NOON,
        NOON + timedelta(seconds=660),
        idempotency_key=key,
    )


def settled(rid: str, cost: int) -> Settlement:
    return Settlement(
        rid, Event.SETTLE, Outcome.DELIVERED, Basis.USAGE, cost, Usage(image_out=9), 1
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "gateway.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SQLiteStore]:
    opened = SQLiteStore.open(path, busy_seconds=BUSY_SECONDS)
    yield opened
    await opened.aclose()


def audit(path: Path) -> None:
    """Adds the file up anew, from the holds and from the journal, and compares (I1, I2, I3)."""
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        balances = {row[0]: row[1:] for row in db.execute("SELECT * FROM balance")}
        holds = db.execute(
            "SELECT j.value, sum(h.cost), sum(iif(h.state = 'H', h.bound, 0))"
            "  FROM hold h, json_each(h.accounts) j GROUP BY j.value"
        )
        assert {row[0]: row[1:] for row in holds} == balances
        journal = db.execute(
            "SELECT a.value, sum(j.posted), sum(j.pending)"
            "  FROM journal j JOIN hold h USING (rid), json_each(h.accounts) a GROUP BY a.value"
        )
        assert {row[0]: row[1:] for row in journal} == balances
        counted = db.execute(
            "SELECT day, team, key_id, model, count(*), sum(cost),"
            "       sum(state = 'X'), sum(iif(state = 'X', cost, 0))"
            "  FROM hold WHERE state IN ('P', 'X') GROUP BY day, team, key_id, model"
        ).fetchall()
        rolled_up = db.execute(
            "SELECT day, team, key_id, model, requests - cached_requests, cost,"
            "       unresolved, unresolved_cost FROM usage_daily WHERE requests > cached_requests"
        ).fetchall()
        assert sorted(counted) == sorted(rolled_up)
        doubled = "SELECT rid FROM journal GROUP BY rid, kind HAVING count(*) > 1"
        assert db.execute(doubled).fetchall() == []


# The file


async def test_the_file_is_made_private_and_kept(path: Path) -> None:
    store = SQLiteStore.open(path)
    await store.ledger.reserve(claim("a"))
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    await store.aclose()
    assert sorted(file.name for file in path.parent.iterdir()) == ["gateway.db", "gateway.db.lock"]
    again = SQLiteStore.open(path)
    assert await again.ledger.open_holds() == 1
    await again.aclose()


async def test_a_path_with_odd_characters(tmp_path: Path) -> None:
    path = tmp_path / "a b?c#d%20é" / "gate way.db"
    store = SQLiteStore.open(path)
    await store.ledger.reserve(claim("a"))
    await store.aclose()
    audit(path)


async def test_the_settings_that_make_it_durable(store: SQLiteStore) -> None:
    def read(db: sqlite3.Connection) -> list[object]:
        names = ("journal_mode", "synchronous", "wal_autocheckpoint", "foreign_keys")
        return [db.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    assert await store._writer.submit(read) == ["wal", 2, 0, 1]


async def test_closing_twice_and_using_it_afterwards(path: Path) -> None:
    store = SQLiteStore.open(path)
    await store.ledger.aclose()
    await store.aclose()
    with pytest.raises(LedgerUnavailable):
        await store.ledger.reserve(claim("a"))
    with pytest.raises(LedgerUnavailable):
        await store.ledger.open_holds()
    with pytest.raises(LedgerUnavailable):
        await store.directory.ping()


async def test_closing_writes_the_replays_that_nobody_waits_for(path: Path) -> None:
    store = SQLiteStore.open(path)
    for number in range(300):
        hit = Replay(f"r{number}", "growth", "k1", "flare", Operation.EDIT, 2, 5, NOON)
        await store.ledger.replay(hit)
    await store.aclose()
    again = SQLiteStore.open(path)
    (row,) = await again.ledger.usage()
    await again.aclose()
    assert (row.requests, row.cached_requests, row.images, row.avoided) == (300, 300, 600, 1500)


async def test_the_journal_is_append_only(store: SQLiteStore, path: Path) -> None:
    await store.ledger.reserve(claim("a"))
    with closing(sqlite3.connect(path)) as db:
        for sql in ("UPDATE journal SET pending = 0", "DELETE FROM journal"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                db.execute(sql)


async def test_the_journal_goes_only_with_what_may_be_forgotten(
    store: SQLiteStore, path: Path
) -> None:
    for rid in ("held", "posted", "old"):
        await store.ledger.reserve(claim(rid))
    await store.ledger.settle(settled("posted", 3))
    await store.ledger.settle(settled("old", 3))
    await store.books.adjust(
        Adjustment("a", "growth", "flare", "2026-11-22", 1, (), "drift", "ann", NOON)
    )
    assert await store.upkeep.forget(NOON + timedelta(days=1), limit=1) == 1
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        left = {rid for (rid,) in db.execute("SELECT rid FROM hold WHERE state = 'P'")}
        assert len(left) == 1
        for rid in ("held", "a"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                db.execute("DELETE FROM journal WHERE rid = ?", (rid,))
        with pytest.raises(sqlite3.IntegrityError, match="only grows"):
            db.execute("UPDATE retention SET before = before - 1")


async def test_books_made_before_corrections_are_brought_up_to_date(path: Path) -> None:
    """A file of the first release: its journal is made anew, with its rows in their order."""
    path.parent.mkdir()
    first = resources.files("gateway.stores").joinpath("migrations", "sqlite", "0001_initial.sql")
    with closing(sqlite3.connect(path)) as db:
        db.executescript(first.read_text(encoding="utf-8") + "PRAGMA user_version = 1;")
        db.execute(
            "INSERT INTO hold (rid, state, bound, cost, accounts, team, key_id, model, operation,"
            " upstream, images, price_id, fingerprint, worker, at, day, lease_ends)"
            " VALUES ('r', 'X', 9, 9, '[\"a\"]', 't', 'k', 'm', 'edit',"
            " 'u', 1, '', '', '', 0, '2026-11-22', 1)"
        )
        db.execute("INSERT INTO balance VALUES ('a', 9, 0)")
        db.execute(
            "INSERT INTO usage_daily"
            " VALUES ('2026-11-22', 't', 'k', 'm', 1, 0, 0, 0, 0, 0, 0, 9, 0, 1, 9, 0)"
        )
        db.executemany(
            "INSERT INTO journal (at, rid, kind, pending, posted) VALUES (?, 'r', ?, ?, ?)",
            [(1, "H", 9, 0), (None, "X", -9, 9)],
        )
        db.execute("INSERT INTO team VALUES ('t', '[]', '{}', 1, 0)")
        db.commit()
    store = SQLiteStore.open(path)
    assert [line.kind for line in await store.books.journal("r")] == ["H", "X"]
    assert [team.time_zone for team in await store.directory.teams()] == ["UTC"]
    await store.books.correct(Correction("c", "r", 4, "found", "ann", NOON))
    assert [(line.seq, line.kind) for line in await store.books.journal("r")] == [
        (1, "H"),
        (2, "X"),
        (3, "A"),
    ]
    assert await store.books.audit() == []
    await store.aclose()


async def test_an_audit_keeps_nobody_waiting(store: SQLiteStore) -> None:
    """It reads over a connection of its own: keys are looked up meanwhile."""
    started, go_on = threading.Event(), threading.Event()

    def stand_still(db: sqlite3.Connection) -> None:
        started.set()
        go_on.wait(30)

    standing = asyncio.create_task(store._long_reader.run(stand_still))
    await asyncio.to_thread(started.wait, 30)
    assert await store.directory.find_key(b"digest") is None
    assert isinstance(await store.ledger.reserve(claim("r")), Held)
    go_on.set()
    await standing


async def test_the_log_stays_small(store: SQLiteStore, path: Path) -> None:
    for _ in range(12):
        await asyncio.gather(
            *(store.directory.create_team(Team(f"{random.random()}" * 2000)) for _ in range(24))
        )
    assert path.stat().st_size > 8 * 1024 * 1024
    assert Path(f"{path}-wal").stat().st_size < 6 * 1024 * 1024


# Refused at the start


@pytest.mark.parametrize("size", [0, 1, 100, 4096, 20_000, 40_001])
async def test_a_truncated_file(path: Path, size: int) -> None:
    store = SQLiteStore.open(path)
    for number in range(50):
        await store.ledger.reserve(claim(f"r{number}"))
    await store.aclose()
    os.truncate(path, size)
    with pytest.raises(StoreError, match=r"gateway\.db"):
        SQLiteStore.open(path)
    assert path.stat().st_size == size


async def test_a_page_of_rubbish(path: Path) -> None:
    store = SQLiteStore.open(path)
    await store.ledger.reserve(claim("a"))
    await store.aclose()
    with path.open("r+b") as file:
        file.seek(3 * 4096)
        file.write(b"\xff" * 4096)
    with pytest.raises(StoreError, match="cannot be used"):
        SQLiteStore.open(path)


async def test_a_newer_schema(path: Path) -> None:
    await SQLiteStore.open(path).aclose()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="newer release"):
        SQLiteStore.open(path)


def test_another_programs_database_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (a)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="not a database of this gateway"):
        SQLiteStore.open(path)
    assert path.read_bytes() == before


def test_a_deleted_file_whose_log_is_left(path: Path) -> None:
    path.parent.mkdir()
    Path(f"{path}-wal").write_bytes(b"what was spent")
    with pytest.raises(StoreError, match="deleted or moved"):
        SQLiteStore.open(path)
    assert not path.exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(
        StoreError,
        match=r"data/gateway\.db cannot be opened: .*/data: Not a dir.*storage\.database$",
    ):
        SQLiteStore.open(tmp_path / "data" / "gateway.db")


def test_a_folder_of_somebody_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(file: DatabaseFile) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(file.path.parent))

    monkeypatch.setattr(DatabaseFile, "open_lock", refused)
    with pytest.raises(StoreError) as caught:
        SQLiteStore.open(path)
    assert str(caught.value) == (
        f"{path} cannot be opened: this user may not write {path.parent}. Give it that right, or "
        "change storage.database"
    )


async def test_a_crash_while_the_file_was_made(path: Path) -> None:
    path.parent.mkdir()
    for suffix in (".new", ".new-wal", ".new-shm"):
        Path(f"{path}{suffix}").write_bytes(b"half made")
    store = SQLiteStore.open(path)
    await store.ledger.reserve(claim("a"))
    await store.aclose()
    audit(path)


def test_network_file_systems_are_told_apart() -> None:
    mounts = (
        "/dev/vda / ext4 rw 0 0\n"
        "nas:/data /srv/da\\040ta nfs4 rw 0 0\n"
        "tmpfs /srv/da\\040ta/fast tmpfs rw 0 0\n"
        "//nas/x /srv/share cifs rw 0 0\n"
    )
    kinds = {
        "/srv": "ext4",
        "/srv/da ta": "nfs4",
        "/srv/da ta/gateway": "nfs4",
        "/srv/da ta/fast/x": "tmpfs",
        "/srv/share": "cifs",
        "/srv/shared": "ext4",
    }
    assert {folder: filesystem_of(Path(folder), mounts) for folder in kinds} == kinds


# Writing fails


@contextmanager
def stranger(path: Path) -> Iterator[None]:
    """Another program that holds SQLite's own lock and knows nothing of ours."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        yield
        db.execute("ROLLBACK")


@contextmanager
def frozen_neighbour(path: Path) -> Iterator[None]:
    """Another process of ours that stands still while it has its turn."""
    with Path(f"{path}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


async def test_locked_by_a_stranger(store: SQLiteStore, path: Path) -> None:
    await store.ledger.reserve(claim("a"))
    with stranger(path):
        started = time.monotonic()
        with pytest.raises(LedgerUnavailable) as caught:
            await store.ledger.reserve(claim("b"))
        assert BUSY_SECONDS <= time.monotonic() - started < 3 * BUSY_SECONDS + 1
        assert caught.value.retry_after_seconds == 5
        assert "nothing was started" in str(caught.value)
        # Reading does not wait for writing.
        assert await store.ledger.open_holds() == 1
    assert isinstance(await store.ledger.reserve(claim("b")), Held)
    assert (await store.ledger.settle(settled("a", 3))).state is State.POSTED


async def test_every_waiter_is_told_when_a_commit_fails(store: SQLiteStore, path: Path) -> None:
    with stranger(path):
        answers = await asyncio.gather(
            *(store.ledger.reserve(claim(f"r{number}")) for number in range(100)),
            return_exceptions=True,
        )
    assert all(isinstance(answer, LedgerUnavailable) for answer in answers)
    assert await store.ledger.open_holds() == 0


async def test_another_process_that_stands_still_with_the_lock(
    store: SQLiteStore, path: Path
) -> None:
    with frozen_neighbour(path):
        answers = await asyncio.gather(
            store.ledger.reserve(claim("a")),
            store.ledger.reserve(claim("b")),
            return_exceptions=True,
        )
        assert [type(answer) for answer in answers] == [LedgerUnavailable] * 2
    # Nobody waits for the two any more: they are not held behind everybody's back.
    assert isinstance(await store.ledger.reserve(claim("c")), Held)
    assert await store.ledger.open_holds() == 1


async def test_a_full_disk(store: SQLiteStore, path: Path) -> None:
    def fill(db: sqlite3.Connection) -> None:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages + 1}")

    await store.ledger.reserve(claim("a"))
    await store._writer.submit(fill)
    done = [
        await asyncio.gather(
            *(store.ledger.reserve(claim(f"{batch}-{number}")) for number in range(20)),
            return_exceptions=True,
        )
        for batch in range(10)
    ]
    held = sum(isinstance(answer, Held) for batch in done for answer in batch)
    assert 0 < sum(isinstance(one, LedgerUnavailable) for batch in done for one in batch) < 200
    assert await store.ledger.open_holds() == held + 1
    await store._writer.submit(lambda db: db.execute("PRAGMA max_page_count = 1000000").fetchone())
    assert isinstance(await store.ledger.reserve(claim("9-0")), Held)
    await store.aclose()
    audit(path)


async def test_a_commit_that_cannot_be_written(store: SQLiteStore, path: Path) -> None:
    """The operating system refuses the log's next byte: the failure is in COMMIT itself."""
    await store.ledger.reserve(claim("a"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path(f"{path}-wal").stat().st_size, hard))
    try:
        for rid in ("b", "c"):
            with pytest.raises(LedgerUnavailable):
                await store.ledger.reserve(claim(rid))
        with pytest.raises(LedgerUnavailable):
            await store.ledger.settle(settled("a", 3))
        await store.ledger.replay(
            Replay("hit", "growth", "k1", "flare", Operation.EDIT, 1, 5, NOON)
        )
        with pytest.raises(LedgerUnavailable):
            await store.directory.create_team(Team("growth"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert await store.ledger.open_holds() == 1
    assert isinstance(await store.ledger.reserve(claim("b")), Held)
    assert (await store.ledger.settle(settled("a", 3))).balances == (Balance(3, 10),) * 4
    await store.aclose()
    audit(path)


async def test_a_file_that_was_taken_away(store: SQLiteStore, path: Path) -> None:
    await store.ledger.ping()
    path.rename(path.with_name("elsewhere.db"))
    with pytest.raises(LedgerUnavailable):
        await store.ledger.ping()
    with pytest.raises(LedgerUnavailable):
        await store.ledger.reserve(claim("a"))
    path.with_name("elsewhere.db").rename(path)
    assert isinstance(await store.ledger.reserve(claim("a")), Held)


async def test_a_bad_operation_does_not_sink_the_batch(store: SQLiteStore, path: Path) -> None:
    """2**63 does not fit a column: that call alone fails, and leaves nothing half done."""
    calls = [claim(f"r{number}", 2**63 if number == 5 else 10) for number in range(20)]
    answers = await asyncio.gather(
        *(store.ledger.reserve(call) for call in calls), return_exceptions=True
    )
    assert [type(answer).__name__ for answer in answers] == [
        "OverflowError" if number == 5 else "Held" for number in range(20)
    ]
    await store.aclose()
    audit(path)


@asynccontextmanager
async def one_batch(store: SQLiteStore, path: Path) -> AsyncIterator[None]:
    """What is asked for meanwhile is decided in one transaction."""
    with frozen_neighbour(path):
        first = asyncio.create_task(store.ledger.reserve(claim("first")))
        await asyncio.sleep(0)
        await eventually(lambda: not store._writer._queue)  # the writer waits for its turn with it
        yield
    await first


async def test_a_batch_is_read_and_written_by_a_few_statements(
    store: SQLiteStore, path: Path
) -> None:
    for number in range(16):
        await store.ledger.reserve(claim(f"old-{number}"))
    said: list[str] = []
    await store._writer.submit(lambda db: db.set_trace_callback(said.append))
    async with one_batch(store, path):
        tasks = [
            *(asyncio.create_task(store.ledger.reserve(claim(f"r{n}"))) for n in range(16)),
            *(asyncio.create_task(store.ledger.settle(settled(f"old-{n}", 5))) for n in range(16)),
        ]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    await store._writer.submit(lambda db: db.set_trace_callback(None))
    # For what a trigger does the statement that fired it is told again.
    said = [sql for sql, _ in groupby(said)]
    begun = [number for number, sql in enumerate(said) if sql.startswith("BEGIN")]
    assert len(begun) == 3, "the first, the batch, and the end of the trace"
    assert said[begun[2] - 1] == "COMMIT"
    assert begun[2] - begun[1] < 15


async def test_what_the_database_refuses_of_one_call_harms_no_other(
    store: SQLiteStore, path: Path
) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute(
            "CREATE TRIGGER refused BEFORE INSERT ON hold WHEN new.rid = 'r5'"
            " BEGIN SELECT RAISE(ABORT, 'not this one'); END"
        )
    async with one_batch(store, path):
        tasks = [asyncio.create_task(store.ledger.reserve(claim(f"r{n}"))) for n in range(20)]
        await asyncio.sleep(0)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer).__name__ for answer in answers] == [
        "IntegrityError" if number == 5 else "Held" for number in range(20)
    ]
    assert await store.ledger.balances(claim("a").lines) == [Balance(0, 200)] * 4
    await store.aclose()
    audit(path)


async def test_a_call_sees_what_was_decided_before_it_in_its_batch(
    store: SQLiteStore, path: Path
) -> None:
    """Its key has moved on, its balance is free again: all before anything is written."""
    void = Settlement("a", Event.VOID, Outcome.REFUSED, Basis.NONE)
    async with one_batch(store, path):
        answers = asyncio.gather(
            store.ledger.reserve(claim("a", 10, 20, key="i")),
            store.ledger.reserve(claim("denied", 10, 20)),
            store.ledger.settle(void),
            store.ledger.reserve(claim("b", 10, 20, key="i")),
            store.ledger.reserve(claim("c", 10, 20, key="i")),
        )
        ends = asyncio.gather(
            store.ledger.settle(settled("b", 7)), store.ledger.reserve(claim("b", 10, 20))
        )
        await asyncio.sleep(0)
    a, denied, voided, b, c = await answers
    posted, again = await ends
    assert a == Held("a", (Balance(0, 20),) * 4)
    assert isinstance(denied, Denied)
    assert voided.state is State.VOIDED
    assert b == Held("b", (Balance(0, 20),) * 4)
    assert c == Claimed("b", State.HELD, same_fingerprint=True)
    assert (posted.state, posted.balances) == (State.POSTED, (Balance(7, 10),) * 4)
    assert again == Held("b", (Balance(7, 10),) * 4, duplicate=True)
    assert [line.kind for line in await store.books.journal("a")] == ["H", "V"]
    assert [line.kind for line in await store.books.journal("b")] == ["H", "P"]
    assert await store.books.audit() == []
    await store.aclose()
    audit(path)


async def test_a_sum_that_leaves_64_bits_is_refused_not_rounded(
    store: SQLiteStore, path: Path
) -> None:
    await store.ledger.reserve(claim("a", 2**63 - 1))
    with pytest.raises(OverflowError):
        await store.ledger.reserve(claim("b", 1))
    assert await store.ledger.balances(claim("a").lines) == [Balance(0, 2**63 - 1)] * 4
    await store.aclose()
    audit(path)


async def test_an_operation_that_fails_half_way_leaves_nothing(
    store: SQLiteStore, path: Path
) -> None:
    await store.ledger.reserve(claim("void", key="i"))
    await store.ledger.settle(Settlement("void", Event.VOID, Outcome.REFUSED, Basis.NONE))
    with pytest.raises(OverflowError):  # after the key has moved
        await store.ledger.reserve(claim("a", 2**63, key="i"))
    await store.ledger.reserve(claim("b"))
    await store.ledger.reserve(claim("c"))
    await store.ledger.settle(settled("b", 2**63 - 1))
    with pytest.raises(OverflowError):  # after the hold is read
        await store.ledger.settle(settled("c", 1))
    assert await store.ledger.open_holds() == 1
    await store.aclose()
    audit(path)
    with closing(sqlite3.connect(path)) as db:
        keys = db.execute("SELECT rid FROM hold WHERE idempotency_key = 'i'").fetchall()
    assert keys == [("void",)]


async def test_a_transaction_that_breaks_half_way_leaves_nothing(store: SQLiteStore) -> None:
    def broken(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO balance (account) VALUES ('half')")
        raise sqlite3.OperationalError("disk I/O error")

    answers = await asyncio.gather(
        store.ledger.reserve(claim("a")), store._writer.submit(broken), return_exceptions=True
    )
    assert isinstance(answers[1], LedgerUnavailable)
    assert isinstance(await store.ledger.reserve(claim("b")), Held)
    held = 1 + isinstance(answers[0], Held)
    assert await store.ledger.balances(claim("a").lines) == [Balance(0, held * 10)] * 4
    count = "SELECT count(*) FROM balance WHERE account = 'half'"
    assert await store._writer.submit(lambda db: db.execute(count).fetchone()) == (0,)


async def test_a_queue_that_is_full(store: SQLiteStore, path: Path) -> None:
    store._writer._room = 3
    with frozen_neighbour(path):
        first = asyncio.create_task(store.ledger.reserve(claim("first")))
        await asyncio.sleep(0.05)
        rest = [asyncio.create_task(store.ledger.reserve(claim(f"{n}"))) for n in range(5)]
        await asyncio.sleep(0.05)
        assert [task.done() for task in rest] == [False] * 3 + [True] * 2
        await store.ledger.replay(
            Replay("hit", "growth", "k1", "flare", Operation.EDIT, 1, 5, NOON)
        )
    answers = await asyncio.gather(first, *rest, return_exceptions=True)
    assert [type(answer) for answer in answers] == [Held] * 4 + [LedgerUnavailable] * 2


# Several processes


SPEND = """
import asyncio, sys
from pathlib import Path
from tests.stores.test_sqlite import spend
asyncio.run(spend(Path(sys.argv[1]), sys.argv[2]))
"""

STORM = """
import asyncio, sys
from pathlib import Path
from tests.stores.test_sqlite import storm
asyncio.run(storm(Path(sys.argv[1]), sys.argv[2]))
"""


def start(script: str, path: Path, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(path), name],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


async def spend(path: Path, name: str) -> None:
    """In a process of its own: 25 tasks, 100 calls of 10 against a budget of 1000 for all."""
    store = SQLiteStore.open(path)

    async def one(number: int) -> Counter[str]:
        done: Counter[str] = Counter()
        for turn in range(4):
            answer = await store.ledger.reserve(claim(f"{name}-{number}-{turn}", 10, 1000))
            done[type(answer).__name__] += 1
        return done

    done = sum(await asyncio.gather(*(one(number) for number in range(25))), Counter[str]())
    await store.aclose()
    print(done["Held"], done["Denied"])


async def test_four_processes_cannot_overspend(path: Path) -> None:
    """They also make the file, all at once."""
    processes = [start(SPEND, path, f"p{number}") for number in range(4)]
    results = []
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        results.append([int(word) for word in out.split()])
    assert sum(held for held, _ in results) == 100
    assert sum(denied for _, denied in results) == 300
    audit(path)


async def storm(path: Path, name: str) -> None:
    """In a process of its own, until it is killed: writes down what the ledger acknowledged."""
    store = SQLiteStore.open(path)
    said = os.open(path.with_name(name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def one(number: int) -> None:
        for turn in range(10_000):
            rid = f"{name}-{number}-{turn}"
            await store.ledger.reserve(claim(rid))
            os.write(said, f"reserved {rid}\n".encode())
            if turn % 5 == 4:
                continue
            event = (Event.SETTLE, Event.SETTLE, Event.VOID, Event.EXPIRE)[turn % 5]
            end = Settlement(rid, event, Outcome.DELIVERED, Basis.USAGE, turn % 7, images=1)
            await store.ledger.settle(end)
            os.write(said, f"{event} {rid}\n".encode())

    await asyncio.gather(*(one(number) for number in range(16)))


def killed_storms(path: Path, names: str) -> dict[str, str]:
    """Runs a storm for each name at once and kills them all; the last word on each rid."""
    processes = [start(STORM, path, name) for name in names]
    said = [path.with_name(name) for name in names]
    deadline = time.monotonic() + 30
    while not all(file.exists() and file.stat().st_size for file in said):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.random() * 0.5)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate(timeout=30)
    lines = [line for file in said for line in file.read_text().splitlines()]
    return {rid: word for word, rid in (line.split(" ") for line in lines)}


async def test_kill_9_loses_nothing_that_was_acknowledged(path: Path) -> None:
    """Two processes on one file, killed in the middle of it, four times over."""
    acknowledged: dict[str, str] = {}
    for names in ("ab", "cd", "ef", "gh"):
        acknowledged |= killed_storms(path, names)
    assert len(acknowledged) > 200
    # Opening it is the recovery.
    store = SQLiteStore.open(path)
    open_before = await store.ledger.open_holds()
    with closing(sqlite3.connect(path)) as db:
        states = dict(db.execute("SELECT rid, state FROM hold").fetchall())
    closed = {"settle": "P", "void": "V", "expire": "X"}
    for rid, word in acknowledged.items():
        if word == "reserved":
            assert rid in states  # its end may be there too, and only the word of it lost
        else:
            assert states[rid] == closed[word], rid
    entries = await store.ledger.sweep(NOON + timedelta(days=1), limit=10**6)
    assert len(entries) == open_before
    assert await store.ledger.open_holds() == 0
    await store.aclose()
    audit(path)


COMMAND = """
import asyncio, sys
from pathlib import Path
from tests.stores.test_sqlite import command
asyncio.run(command(Path(sys.argv[1]), sys.argv[2]))
"""


async def command(path: Path, name: str) -> None:
    """In a process of its own: what ``gateway key create`` does."""
    store = SQLiteStore.open(path)
    await store.directory.create_team(Team(name))
    await store.directory.create_key(Key("k_new", name), b"digest")
    await store.aclose()


async def test_a_command_beside_a_serving_gateway(store: SQLiteStore, path: Path) -> None:
    async def serve() -> int:
        done = 0
        while not finished.is_set():
            await store.ledger.reserve(claim(f"r{done}"))
            done += 1
        return done

    finished = asyncio.Event()
    serving = asyncio.create_task(serve())
    process = start(COMMAND, path, "growth")
    await asyncio.to_thread(process.communicate, timeout=60)
    finished.set()
    assert process.returncode == 0
    assert await serving > 0
    assert await store.directory.find_key(b"digest") == (Team("growth"), Key("k_new", "growth"))


async def test_two_stores_in_one_process_share_a_budget(path: Path) -> None:
    stores = [SQLiteStore.open(path) for _ in range(2)]
    answers = await asyncio.gather(
        *(stores[n % 2].ledger.reserve(claim(f"r{n}", 10, 100)) for n in range(60))
    )
    assert sum(isinstance(answer, Held) for answer in answers) == 10
    assert sum(isinstance(answer, Denied) for answer in answers) == 50
    for store in stores:
        await store.aclose()
    audit(path)


def test_a_loop_that_ends_within_a_turn_leaves_the_writer_to_the_next_one(path: Path) -> None:
    """The writer is rung at the end of the turn in which it was asked."""
    store = SQLiteStore.open(path)
    loop = asyncio.new_event_loop()
    asking = store.ledger.reserve(stores.claim("a"))

    async def ask() -> None:
        asking.send(None)
        loop.stop()

    task = loop.create_task(ask())
    loop.run_forever()
    assert task.done()
    asking.close()
    loop.close()

    async def ask_again() -> None:
        async with asyncio.timeout(5):
            assert isinstance(await store.ledger.reserve(stores.claim("b")), Held)
        await store.aclose()

    asyncio.run(ask_again())


async def test_what_a_writer_knows_is_not_read_again(store: SQLiteStore) -> None:
    await store.ledger.reserve(claim("known"))
    said: list[str] = []
    await store._writer.submit(lambda db: db.set_trace_callback(said.append))
    await store.ledger.reserve(claim("first"))  # another operation was before it
    begun = len(said)
    await store.ledger.reserve(claim("second"))
    posted = await store.ledger.settle(settled("first", 7))
    assert posted.balances == (Balance(7, 20),) * 4
    assert [sql for sql in said[:begun] if "FROM balance" in sql or "WHERE account" in sql]
    read = [sql for sql in said[begun:] if sql.lstrip().startswith("SELECT")]
    assert read == []
    await store._writer.submit(lambda db: db.set_trace_callback(None))


async def test_what_a_writer_knows_is_forgotten_when_another_writes(path: Path) -> None:
    """The same calls, of two stores in turn, and of one in memory: all answer the same."""
    chosen = random.Random(7)
    both, memory = [SQLiteStore.open(path) for _ in range(2)], MemoryStore().ledger
    for _ in range(400):
        rid = f"r{chosen.randrange(40)}"
        ledger = chosen.choice(both).ledger
        act = chosen.random()
        if act < 0.55:
            asked = claim(rid, chosen.randrange(1, 20), 150, key=chosen.choice([None, rid, "key"]))
            assert await ledger.reserve(asked) == await memory.reserve(asked)
        elif act < 0.9:
            event = chosen.choice(list(Event))
            ending = replace(settled(rid, chosen.randrange(3)), event=event)
            assert await answer_of(ledger.settle(ending)) == await answer_of(memory.settle(ending))
        else:
            late = NOON + timedelta(hours=1)
            swept = {entry.rid for entry in await ledger.sweep(late, limit=5)}
            assert swept == {entry.rid for entry in await memory.sweep(late, limit=5)}
    assert await both[0].books.audit() == []
    for store in both:
        await store.aclose()
    audit(path)


async def answer_of(asked: Awaitable[Entry]) -> Entry | None:
    """None where the reservation is not known."""
    try:
        return await asked
    except NotKnown:
        return None


async def test_a_call_that_is_held_is_not_refused_when_it_is_repeated(path: Path) -> None:
    """However full its budget is now, and whoever has reserved it."""
    first, second = (SQLiteStore.open(path) for _ in range(2))
    held = await first.ledger.reserve(claim("r", 10, 10))
    assert isinstance(held, Held)
    assert await second.ledger.reserve(claim("r", 10, 10)) == replace(held, duplicate=True)
    assert isinstance(await second.ledger.reserve(claim("other", 10, 10)), Denied)
    assert await second.ledger.reserve(claim("r", 10, 20)) == replace(held, duplicate=True)
    ended = await second.ledger.settle(settled("r", 10))
    assert ended.balances == (Balance(10, 0),) * 4
    again = await first.ledger.reserve(claim("r", 10, 10))
    assert again == Held("r", (Balance(10, 0),) * 4, duplicate=True)
    for store in (first, second):
        await store.aclose()
    audit(path)


async def test_a_key_that_another_store_has_reserved_is_seen_at_once(path: Path) -> None:
    first, second = (SQLiteStore.open(path) for _ in range(2))
    for number in range(20):
        rid = f"r{number}"
        assert await second.ledger.claimed("growth", rid, "f", NOON) is None
        await first.ledger.reserve(claim(rid, key=rid))
        known = await second.ledger.claimed("growth", rid, "other", NOON)
        assert known == Claimed(rid, State.HELD, same_fingerprint=False)
    for store in (first, second):
        await store.aclose()


async def test_a_file_of_the_release_before_users(path: Path) -> None:
    """Its calls named nobody; they go on, and the next ones may."""
    path.parent.mkdir()
    folder = resources.files("gateway.stores").joinpath("migrations", "sqlite")
    before = [folder.joinpath(name) for name in ("0001_initial.sql", "0002_books.sql")]
    with closing(sqlite3.connect(path)) as db:
        for file in before:
            db.executescript(file.read_text(encoding="utf-8"))
        db.execute("PRAGMA user_version = 2")
        db.execute(
            "INSERT INTO hold (rid, state, bound, cost, accounts, team, key_id, model, operation,"
            " upstream, images, price_id, fingerprint, worker, at, day, lease_ends)"
            " VALUES ('old', 'H', 9, 0, '[\"a\"]', 'growth', 'k', 'm', 'edit',"
            " 'u', 1, '', '', '', 0, '2026-11-22', 1)"
        )
        db.execute("INSERT INTO balance VALUES ('a', 0, 9)")
        db.execute("INSERT INTO journal (rid, kind, pending, posted) VALUES ('old', 'H', 9, 0)")
        db.commit()
    store = SQLiteStore.open(path)
    await store.ledger.settle(stores.settled("old", 4))
    await store.ledger.reserve(replace(stores.claim("new"), user="u_1"))
    await store.ledger.settle(stores.settled("new", 5))
    assert [(one.user, one.cost) for one in await store.books.usage_by_user()] == [
        ("", 4),
        ("u_1", 5),
    ]
    assert await store.books.audit() == []
    await store.aclose()


@pytest.mark.parametrize("sql", [BY_USER, BY_USER_SIGNED, BY_USER_HALVED])
async def test_usage_by_user_goes_along_an_index(path: Path, sql: str) -> None:
    await SQLiteStore.open(path).aclose()
    with closing(sqlite3.connect(path)) as db:
        asked = {"team": "growth", "wholes": '{"2026-11": 1}', "halves": '{"2026-10": 1}'}
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", asked)]
        teams = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {TEAMS}", ("{}",))]
    assert any("(period=? AND team=?)" in step for step in plan), plan
    assert sum("(period=?" in step for step in teams) == 2, teams
    assert not any("SCAN usage_by_user" in step for step in (*plan, *teams)), (plan, teams)


async def test_questions_about_a_large_ledger_go_along_an_index(path: Path) -> None:
    """Of none of these may the answer take longer because there are more calls."""
    await SQLiteStore.open(path).aclose()
    asked = {"after": "", "limit": 100, "doubtful": '["no_usage"]'}
    with closing(sqlite3.connect(path)) as db:

        def plan(sql: str, asked: Any) -> str:
            return " ".join(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", asked))

        assert "USING INDEX hold_asking (rid>?)" in plan(UNRESOLVED, asked)
        # Not even the calls themselves are read.
        assert "USING COVERING INDEX hold_spent (day=?)" in plan(ROUTED, ("2026-11-22",))


async def test_what_was_bought_before_users_were_added_up(path: Path) -> None:
    """Calls that are there are their users'; of those that were forgotten nobody knows whose they
    were. A process of the release before, which has the file open, goes on: what it settles counts
    as well."""
    make_ledger_of_release_3(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        store = SQLiteStore.open(path)
        old.execute("UPDATE hold SET state = 'P', cost = 7, outcome = 'delivered' WHERE rid = 'h'")
        found = await store.books.usage_by_user(None, "2026-11-01", "2026-11-30")
        assert found == [
            UserUsage("growth", "", 2, 0, 5, 0),
            UserUsage("growth", "u_ann", 3, 5, 20, 1),
        ]
        assert await store.books.usage_by_user(None, "2026-11-22", "2026-11-22") == found
        assert await store.books.usage_by_user(None, "2026-11-16", "2026-11-30") == found
        await store.aclose()


def make_ledger_of_release_3(path: Path) -> None:
    """Of one day: Ann's posted, expired and held calls, two that were forgotten, an answer from the
    cache, and an adjustment."""
    path.parent.mkdir()
    names = ("0001_initial.sql", "0002_books.sql", "0003_owned.sql")
    folder = resources.files("gateway.stores").joinpath("migrations", "sqlite")
    hold = (
        "INSERT INTO hold (rid, state, bound, cost, accounts, team, key_id, model, operation,"
        " upstream, images, price_id, fingerprint, worker, at, day, lease_ends, outcome, end_user)"
        " VALUES (?, ?, 9, ?, '[]', 'growth', 'k', 'm', 'edit', 'u', ?, '', '', '', 0,"
        " '2026-11-22', 1, ?, 'u_ann')"
    )
    with closing(sqlite3.connect(path)) as db:
        for name in names:
            db.executescript(folder.joinpath(name).read_text(encoding="utf-8"))
        db.execute("PRAGMA user_version = 3")
        db.execute(hold, ("p", "P", 4, 3, "delivered"))
        db.execute(hold, ("x", "X", 9, 3, "unknown"))
        db.execute(hold, ("h", "H", 0, 2, None))
        db.execute(
            "INSERT INTO usage_daily VALUES ('2026-11-22', 'growth', 'k', 'm', 5, 8, 1, 0, 0, 0, 0,"
            " 28, 3, 1, 9, 0)"
        )
        db.execute(
            "INSERT INTO adjustment VALUES ('a', 0, NULL, 'growth', '', 'm', '2026-11-22', '[]',"
            " 10, 'r', 'me')"
        )
        db.commit()


async def test_a_large_file_is_opened_without_looking_through_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SQLiteStore.open(path)
    for number in range(50):
        await store.ledger.reserve(stores.claim(f"r{number}"))
    await store.aclose()
    with path.open("r+b") as file:
        # A page in the middle: nothing that is read at the start is there.
        file.seek(path.stat().st_size - 4096)
        file.write(b"\xff" * 4096)
    with pytest.raises(StoreError, match="cannot be used"):
        SQLiteStore.open(path)
    monkeypatch.setattr(sqlite_file, "CHECKED_BYTES", 8192)
    await SQLiteStore.open(path).aclose()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4096)
    with pytest.raises(StoreError, match="cannot be used"):
        SQLiteStore.open(path)


async def test_a_page_of_ids_goes_along_an_index(path: Path) -> None:
    await SQLiteStore.open(path).aclose()
    asked = {"team": "t", "kind": "file", "now": 1, "purpose": "", "id": "x", "created": 1}
    with closing(sqlite3.connect(path)) as db:
        for page in PAGES.values():
            rows = db.execute(f"EXPLAIN QUERY PLAN {page}", {**asked, "limit": 2})
            [step] = [row[3] for row in rows]
            assert "USING INDEX owned_page (team=? AND kind=?" in step


async def test_nothing_is_remembered_of_a_file_that_was_disowned(path: Path) -> None:
    store = SQLiteStore.open(path)
    await store.ownership.record([file_named("my diary.png")])
    assert await store.ownership.disown("growth", "file-1")
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT id, detail FROM owned").fetchall() == [("file-1", "{}")]
    await store.aclose()


def file_named(name: str) -> Owned:
    detail = {"purpose": "vision", "filename": name}
    anchor = Anchor("openai", "")
    return Owned("file-1", OwnedKind.FILE, "growth", "k1", anchor, NOON, detail=detail)
