"""The study of a growing ledger, of a size that takes a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.stores.postgres import PostgresStore
from gateway.stores.sqlite import SQLiteStore
from tests.bench.growth_ledger import Measured, grow_postgres, grow_sqlite, table
from tests.bench.ledger_rows import fill_postgres, fill_sqlite
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
    assert "usage --by user, all, ms" in table(results)
