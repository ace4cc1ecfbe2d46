"""A backup of either database, restored into either: every row, or nothing."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from gateway.domain.books import Adjustment, Correction
from gateway.domain.call import Operation
from gateway.domain.ledger import Part, Replay
from gateway.domain.owned import Anchor, Owned, OwnedKind
from gateway.domain.team import Key, Limits, Team
from gateway.domain.transition import OnConflict, ignore_conflict
from gateway.ports import Store, StoreError
from gateway.stores.backup import TABLES, Snapshot, open_backup, write_backup
from gateway.stores.postgres import PostgresStore
from gateway.stores.postgres_backup import postgres_snapshot, restore_postgres
from gateway.stores.rows import USER_SUMS
from gateway.stores.sqlite import SQLiteStore
from gateway.stores.sqlite_backup import restore_sqlite, sqlite_snapshot
from tests.contract.stores import LEASE, NOON, claim, elsewhere, expired, server, settled, voided

KINDS = ("sqlite", "postgres")
Rows = dict[str, list[tuple[Any, ...]]]


class Database:
    """An empty database of one kind, and what the commands do with it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.path = folder / "gateway.db"
        self.url = server().fresh_database() if kind == "postgres" else ""
        if kind == "sqlite":
            folder.mkdir(exist_ok=True)

    def open(self, on_conflict: OnConflict = ignore_conflict) -> Store:
        if self.kind == "sqlite":
            return SQLiteStore.open(self.path, on_conflict=on_conflict)
        return PostgresStore.open(self.url, on_conflict=on_conflict, caller_time=True)

    async def make(self) -> None:
        store = self.open()
        await store.aclose()

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        if self.kind == "sqlite":
            return sqlite_snapshot(self.path)
        return postgres_snapshot(self.url)

    def backup(self, path: Path) -> int:
        """How many sums do not add up."""
        with self.snapshot() as found:
            return len(write_backup(path, found, NOON)[1])

    def restore(self, path: Path) -> None:
        with open_backup(path) as found:
            if self.kind == "sqlite":
                restore_sqlite(self.path, found)
            else:
                restore_postgres(self.url, found)

    def rows(self) -> Rows:
        """Every row, read by somebody who knows nothing of the gateway's code."""
        if self.kind == "sqlite":
            with closing(sqlite3.connect(self.path)) as db:
                return {one.name: db.execute(one.select).fetchall() for one in TABLES}
        with psycopg.connect(self.url) as link:
            return {one.name: link.execute(one.select.encode()).fetchall() for one in TABLES}

    def run(self, sql: str) -> None:
        if self.kind == "sqlite":
            with closing(sqlite3.connect(self.path, isolation_level=None)) as db:
                db.execute(sql)
        else:
            with psycopg.connect(self.url, autocommit=True) as link:
                link.execute(sql.encode())


Make = Callable[[str], Database]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    made: list[Database] = []

    def database(kind: str) -> Database:
        made.append(Database(kind, tmp_path / f"database-{len(made)}"))
        return made[-1]

    return database


async def fill(store: Store) -> None:
    """Something of everything."""
    ledger, books, upkeep, directory = store.ledger, store.books, store.upkeep, store.directory
    for number in range(6):
        await ledger.reserve(claim(f"r{number}", 10 + number, key=f"key-{number} é \U0001f5bc"))
    for rid in ("r0", "r4"):
        await ledger.reroute(elsewhere(rid, 20, model="blaze"))
    await ledger.settle(replace(settled("r0", 7), drawn=Part("drawer", 1, 6)))
    await ledger.settle(voided("r1"))
    await ledger.settle(expired("r2"))
    await ledger.settle(settled("r3", 9, "no_usage"))
    await books.correct(Correction("c1", "r3", 5, "on the bill", "ops", NOON))
    accounts = tuple(one.account for one in claim("any").lines)
    await books.adjust(
        Adjustment("a1", "growth", "flare", "2026-11-22", -3, accounts, "drift", "ops", NOON)
    )
    old = NOON - timedelta(days=500)
    await ledger.reserve(claim("old", 10, at=old))
    await ledger.settle(settled("old", 4))
    assert await upkeep.forget(NOON - timedelta(days=400)) == 1
    await ledger.replay(Replay("hit", "growth", "k1", "flare", Operation.EDIT, 1, 11, NOON))
    await upkeep.beat("w1", NOON)
    assert await upkeep.claim_notice("team:growth|m|2026-11", "budget:80", NOON, 90)
    await upkeep.notice_sent("team:growth|m|2026-11", "budget:80", NOON)
    assert await upkeep.claim_notice("team:growth|m|2026-11", "budget:100", NOON, 90)
    await upkeep.raise_factor("openai", "flare", 1_250_000)
    await directory.create_team(
        Team("art", limits=Limits(budget_day=2**62), time_zone="Asia/Tokyo")
    )
    await directory.create_key(Key("k_art", "art", "ci", created=NOON, pepper="01ab"), b"\x00\xff")
    await directory.create_key(Key("k_two", "art", models=frozenset({"flare"})), b"\x01")
    await directory.declared_id([b"\xfe", b"\x02"], "k_declared")
    anchor, photo = Anchor("openai", "00ff"), {"purpose": "vision", "filename": "\x00 é \U0001f5bc"}
    await store.ownership.record(
        [
            Owned("file-1", OwnedKind.FILE, "art", "k_art", anchor, NOON, None, 2**40, photo),
            Owned("resp_1", OwnedKind.RESPONSE, "art", "k_art", anchor, NOON, NOON + LEASE),
        ]
    )


@pytest.mark.parametrize("first", KINDS)
async def test_there_and_back_every_row_is_the_same(make: Make, tmp_path: Path, first: str) -> None:
    """Also the way from one machine to many, and back."""
    second = next(kind for kind in KINDS if kind != first)
    source, middle, last = make(first), make(second), make(first)
    store = source.open()
    await fill(store)
    await store.aclose()
    rows = source.rows()
    assert all(rows.values()), [name for name, found in rows.items() if not found]
    assert source.backup(tmp_path / "one") == 0
    for number, database in enumerate((middle, last)):
        await database.make()
        database.restore(tmp_path / ("one", "two")[number])
        assert database.rows() == rows
        assert database.backup(tmp_path / ("two", "three")[number]) == 0
    store = middle.open()
    try:
        assert await store.books.audit() == []
        assert await store.ledger.open_holds() == 2
        found = await store.books.find("r4")
        assert found is not None
        assert (found.model, found.upstream, found.bound) == ("blaze", "azure", 20)
        assert [line.kind for line in await store.books.journal("r4")] == ["H", "B"]
        # Life goes on: what runs is settled, and the journal goes on behind what was restored.
        await store.ledger.settle(settled("r4", 3))
        await store.ledger.reserve(claim("new"))
        seq = [line.seq for rid in ("r4", "new") for line in await store.books.journal(rid)]
        assert sorted(seq)[-2:] == seq[-2:]
        assert seq[-2] > max(line[0] for line in rows["journal"])
        assert await store.books.audit() == []
    finally:
        await store.aclose()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_backup_says_what_it_is(make: Make, tmp_path: Path, kind: str) -> None:
    source = make(kind)
    store = source.open()
    await fill(store)
    await store.aclose()
    path = tmp_path / "backup"
    source.backup(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in tmp_path.glob("backup*")] == ["backup"]
    with open_backup(path) as found:
        assert found.contents.kind == {"sqlite": "SQLite", "postgres": "PostgreSQL"}[kind]
        assert found.contents.created == NOON
        assert found.contents.open_holds == 2
        assert found.contents.rows == {name: len(rows) for name, rows in source.rows().items()}


async def test_what_is_written_meanwhile_is_not_in_it(make: Make, tmp_path: Path) -> None:
    for kind in KINDS:
        source = make(kind)
        store = source.open()
        await fill(store)
        before = source.rows()
        with source.snapshot() as found:
            first = next(iter(found.batches(TABLES[0])))
            # The writer does not wait for the backup, nor the backup for the writer.
            await store.ledger.settle(settled("r4", 3))
            await store.ledger.reserve(claim("new", 12))
            assert [tuple(row) for row in first] == before["balance"]
            assert write_backup(tmp_path / kind, found, NOON)[1] == []
        await store.aclose()
        target = make(kind)
        await target.make()
        target.restore(tmp_path / kind)
        assert target.rows() == before


@pytest.mark.parametrize("kind", KINDS)
async def test_books_that_do_not_add_up_are_kept(make: Make, tmp_path: Path, kind: str) -> None:
    source = make(kind)
    store = source.open()
    await fill(store)
    await store.aclose()
    source.run("UPDATE balance SET posted = posted + 1 WHERE account = 'team:growth|d|2026-11-22'")
    assert source.backup(tmp_path / "backup") == 1
    target = make(kind)
    await target.make()
    target.restore(tmp_path / "backup")
    assert target.rows() == source.rows()


SPOILED = {
    "another amount": "UPDATE hold SET cost = cost + 1 WHERE rid = 'r0'",
    "a row that is gone": "DELETE FROM journal WHERE seq = 1",
    "a row too many": "INSERT INTO team SELECT 'b', models, limits, 1, 0, 'UTC' FROM team",
    "bytes": "UPDATE key SET digest = x'02' WHERE id = 'k_two'",
    "the last table": "UPDATE owned SET team = 'growth' WHERE id = 'file-1'",
    "no checksum": "DELETE FROM backup_part WHERE name = 'key'",
    "no head": "DELETE FROM backup",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", SPOILED)
async def test_a_damaged_backup_restores_nothing(
    make: Make, tmp_path: Path, kind: str, how: str
) -> None:
    source, target = make("sqlite"), make(kind)
    store = source.open()
    await fill(store)
    await store.aclose()
    source.backup(tmp_path / "backup")
    with closing(sqlite3.connect(tmp_path / "backup", isolation_level=None)) as db:
        db.execute(SPOILED[how])
    await target.make()
    with pytest.raises(StoreError, match="is damaged"):
        target.restore(tmp_path / "backup")
    assert not any(target.rows().values())


async def test_a_torn_file_restores_nothing(make: Make, tmp_path: Path) -> None:
    source, target = make("sqlite"), make("sqlite")
    store = source.open()
    await fill(store)
    await store.aclose()
    path = tmp_path / "backup"
    source.backup(path)
    whole = path.read_bytes()
    await target.make()
    for content in (
        whole[: len(whole) // 2],
        whole[:8192] + bytes(8192) + whole[16384:],
        b"",
        b"x",
    ):
        path.write_bytes(content)
        with pytest.raises(StoreError):
            target.restore(path)
        assert not any(target.rows().values())


async def test_only_a_backup_is_restored(make: Make, tmp_path: Path) -> None:
    target = make("sqlite")
    await target.make()
    with pytest.raises(StoreError, match="is not a backup"):
        target.restore(target.path)
    with pytest.raises(StoreError, match="there is no file"):
        target.restore(tmp_path / "nowhere")
    target.backup(tmp_path / "backup")
    with closing(sqlite3.connect(tmp_path / "backup", isolation_level=None)) as db:
        db.execute("UPDATE backup SET format = format + 1")
    with pytest.raises(StoreError, match="newer release"):
        target.restore(tmp_path / "backup")
    with pytest.raises(StoreError, match="is not a database of this gateway"):
        SQLiteStore.open(tmp_path / "backup")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_database_in_use_is_left_alone(make: Make, tmp_path: Path, kind: str) -> None:
    source = make("sqlite")
    store = source.open()
    await fill(store)
    await store.aclose()
    source.backup(tmp_path / "backup")
    for used in ("a team", "a call"):
        target = make(kind)
        store = target.open()
        if used == "a team":
            await store.directory.create_team(Team("design"))
        else:
            await store.ledger.reserve(claim("theirs"))
        await store.aclose()
        before = target.rows()
        with pytest.raises(StoreError, match="is in use"):
            target.restore(tmp_path / "backup")
        assert target.rows() == before
    # One that a gateway was only started on is as good as new.
    target = make(kind)
    store = target.open()
    await store.directory.declared_id([b"\xfe"], "k_fresh")
    await store.upkeep.beat("w9", NOON)
    await store.aclose()
    target.restore(tmp_path / "backup")
    assert target.rows() == source.rows()


async def test_a_backup_that_fails_leaves_the_last_one(make: Make, tmp_path: Path) -> None:
    source = make("sqlite")
    await source.make()
    path = tmp_path / "backup"
    path.write_text("the last one")

    class Breaking:
        kind, schema = "SQLite", 1

        def batches(self, table: object) -> Iterator[list[tuple[Any, ...]]]:
            yield [("account", 1, 2)]
            raise StoreError("the server is gone")

    with pytest.raises(StoreError, match="the server is gone"):
        write_backup(path, Breaking(), NOON)
    assert path.read_text() == "the last one"
    assert [one.name for one in tmp_path.glob("backup*")] == ["backup"]


@pytest.mark.parametrize("kind", KINDS)
async def test_no_table_and_no_column_is_forgotten(make: Make, kind: str) -> None:
    """A migration that adds one has to say whether a backup needs it."""
    database = make(kind)
    await database.make()
    if kind == "sqlite":
        with closing(sqlite3.connect(database.path)) as db:
            found = db.execute(
                "SELECT t.name, c.name FROM pragma_table_list AS t, pragma_table_info(t.name) AS c"
                " WHERE t.schema = 'main' AND t.name NOT LIKE 'sqlite_%'"
            ).fetchall()
    else:
        with psycopg.connect(database.url) as link:
            found = link.execute(
                "SELECT table_name, column_name FROM information_schema.columns"
                " WHERE table_schema = 'public'"
            ).fetchall()
    kept = {(table.name, name) for table in TABLES for name, _ in table.columns}
    # Half months are added up again.
    halves = {("usage_by_user", f"half_{name}") for name in USER_SUMS}
    left = {table for table, _ in set(found) - kept - halves}
    assert kept | halves <= set(found)
    assert left <= {"worker", "writer", "schema_version"}


def test_a_backup_needs_a_database_of_this_release(make: Make) -> None:
    database = make("sqlite")
    with pytest.raises(StoreError, match="there is no database"), database.snapshot():
        pass
    with closing(sqlite3.connect(database.path)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="use the newer release"), database.snapshot():
        pass
    nowhere, empty = server().url("nowhere"), server().empty_database()
    with pytest.raises(StoreError, match="cannot be used"), postgres_snapshot(nowhere):
        pass
    with pytest.raises(StoreError, match="gateway db upgrade"), postgres_snapshot(empty):
        pass


def test_the_tables_are_in_an_order_that_their_keys_allow() -> None:
    names = [table.name for table in TABLES]
    assert names.index("team") < names.index("key")


@pytest.mark.parametrize("kind", KINDS)
async def test_half_months_are_those_of_the_days_that_are_restored(
    make: Make, tmp_path: Path, kind: str
) -> None:
    source, target = make(kind), make(kind)
    store = source.open()
    await fill(store)
    source.run(
        "UPDATE usage_by_user SET half_cost = half_cost + 1"
        " WHERE period = '2025-07' AND half_cost IS NOT NULL"
    )
    [found] = await store.books.audit()
    assert (found.what, found.kept, found.summed) == (
        "cost of 2025-07 growth , days 1 to 15, and these days",
        5,
        4,
    )
    await store.aclose()
    # Which a backup has not seen.
    assert source.backup(tmp_path / "backup") == 0
    await target.make()
    target.restore(tmp_path / "backup")
    restored = target.open()
    assert await restored.books.audit() == []
    [early] = await restored.books.usage_by_user("growth", "2025-07-01", "2025-07-15")
    assert (early.requests, early.cost) == (1, 4)
    await restored.aclose()


def as_of_format_1(path: Path) -> None:
    """Makes a backup into what the release before ownership and users wrote."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for table in ("owned", "usage_by_user"):
            db.execute(f"DROP TABLE {table}")
            db.execute("DELETE FROM backup_part WHERE name = ?", (table,))
        for column in ("end_user", "drawn_model", "drawn_images", "drawn_cost"):
            db.execute(f"ALTER TABLE hold DROP COLUMN {column}")
        rows = db.execute("SELECT * FROM hold ORDER BY rid").fetchall()
        lines = "".join(json.dumps(list(row)) + "\n" for row in rows)
        db.execute(
            "UPDATE backup_part SET sha256 = ? WHERE name = 'hold'",
            (hashlib.sha256(lines.encode()).hexdigest(),),
        )
        db.execute("UPDATE backup SET format = 1, schema = 2")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_backup_of_the_release_before_is_restored(
    make: Make, tmp_path: Path, kind: str
) -> None:
    source, target = make("sqlite"), make(kind)
    store = source.open()
    await fill(store)
    await store.aclose()
    source.backup(tmp_path / "backup")
    as_of_format_1(tmp_path / "backup")
    await target.make()
    target.restore(tmp_path / "backup")
    expected = source.rows()
    expected["owned"] = []
    expected["hold"] = [(*row[:-4], "", "", 0, 0) for row in expected["hold"]]
    # Their users are gone with their names; what they bought is not.
    users = [row for row in expected.pop("usage_by_user") if any(row[3:])]
    found = target.rows()
    nobodys = found.pop("usage_by_user")
    assert {row[2] for row in nobodys} == {""}
    assert sum(row[5] for row in nobodys) == sum(row[5] for row in users) > 0
    assert found == expected
    # And it is whole: one that lacks more than that release did is not.
    with closing(sqlite3.connect(tmp_path / "backup", isolation_level=None)) as db:
        db.execute("UPDATE hold SET images = images + 1 WHERE rid = 'r0'")
    spoiled = make(kind)
    await spoiled.make()
    with pytest.raises(StoreError, match="is damaged"):
        spoiled.restore(tmp_path / "backup")
