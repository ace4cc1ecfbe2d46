"""The study of a growing ledger, of a size that takes a moment."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from gateway.stores.postgres import PostgresStore
from gateway.stores.sqlite import SQLiteStore
from tests.bench.growth_ledger import Measured, grow_postgres, grow_sqlite, read, write
from tests.bench.ledger_page import text
from tests.bench.ledger_rows import fill_postgres, fill_sqlite
from tests.bench.results import rounded
from tests.contract.stores import server

CALLS = 2000


async def test_both_databases_are_filled_alike(tmp_path: Path) -> None:
    path, url = tmp_path / "ledger.db", server().fresh_database()
    await SQLiteStore.open(path).aclose()
    fill_sqlite(path, CALLS)
    fill_postgres(url, CALLS)
    one, other = SQLiteStore.open(path), PostgresStore.open(url)
    rows = await one.ledger.usage()
    assert sum(row.requests for row in rows) == CALLS - CALLS // 200
    assert rows == await other.ledger.usage()
    assert await one.books.usage_by_user() == await other.books.usage_by_user()
    for store in (one, other):
        assert await store.books.audit() == []
        await store.aclose()


@pytest.mark.parametrize("calls", [0, CALLS])
async def test_a_small_ledger_is_measured(tmp_path: Path, calls: int) -> None:
    """What was measured left books that add up: ``measure`` sees to it itself."""
    results = [
        await grow_sqlite(tmp_path, calls, 0.02),
        await grow_postgres(server().fresh_database(), calls, 0.02),
    ]
    for one in results:
        assert isinstance(one, Measured)
        assert (one.retention["calls_forgotten"] > 0) == (calls > 0)
    assert "\n| usage --by user, all | " in text(results)
    write({"date": "today"}, results, tmp_path / "ledger.json")
    machine, again = read(tmp_path / "ledger.json")
    assert machine == {"date": "today"}
    assert [asdict(one) for one in again] == [rounded(asdict(one)) for one in results]


def test_what_takes_longer_than_it_may_is_said() -> None:
    slow = Measured("sqlite", 5_000_000, questions_ms={"usage, a day": 150.0, "usage, all": 1234.5})
    assert text([slow]).endswith("- SQLite, 5,000,000 calls: usage, all: 1,234 ms")
    assert text([Measured("sqlite", 0)]).endswith("more than 200 ms: none.")


def test_what_was_not_measured_is_not_said_to_be_nothing() -> None:
    one = Measured("sqlite", 10, pairs={"usage_rows": 1000, "bytes": 5_900_000.0})
    other = Measured("postgres", 10, retention={"calls_forgotten": 0, "batch_ms": 0.0})
    said = text([one, other])
    assert "| size, MB | 5.90 | – |" in said
    assert "| rows of usage, all days | 1,000 | – |" in said
    assert "| calls deleted | – | 0 |" in said
    assert "| a batch of 100 calls, ms | – | – |" in said
