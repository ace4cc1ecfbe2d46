"""The stores that the contract suites of ``Ledger``, ``Books``, ``Upkeep``, ``Directory`` and
``Ownership`` run against, and what the suites say to them. A new store joins with one factory
in ``BACKENDS``.
"""

from __future__ import annotations

import atexit
import contextlib
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import psycopg

from gateway.domain.call import Operation, Usage
from gateway.domain.ledger import (
    Basis,
    Claim,
    Event,
    Line,
    Outcome,
    Reroute,
    Settlement,
    State,
)
from gateway.domain.quota import Limit, Scope, Unit, Window, period
from gateway.domain.transition import OnConflict
from gateway.ports import Ledger, Store
from gateway.stores.memory_ledger import MemoryStore
from gateway.stores.postgres import PostgresStore
from gateway.stores.sqlite import SQLiteStore
from tests.postgres import Postgres, run_postgres

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
LEASE = timedelta(seconds=660)
H, P, V, X = State.HELD, State.POSTED, State.VOIDED, State.EXPIRED


def memory(folder: Path, on_conflict: OnConflict) -> Store:
    return MemoryStore(on_conflict)


def sqlite(folder: Path, on_conflict: OnConflict) -> Store:
    return SQLiteStore.open(folder / "gateway.db", on_conflict=on_conflict)


@cache
def server() -> Postgres:
    """One server for all suites of this process, never mistreated."""
    running = contextlib.ExitStack()
    atexit.register(running.close)
    return running.enter_context(run_postgres())


def postgres(folder: Path, on_conflict: OnConflict) -> Store:
    url = server().fresh_database()
    (folder / "url").write_text(url)
    return PostgresStore.open(url, on_conflict=on_conflict, caller_time=True)


BACKENDS: dict[str, Callable[[Path, OnConflict], Store]] = {
    "memory": memory,
    "sqlite": sqlite,
    "postgres": postgres,
}
"""A factory for each store, given a folder of its own."""


def spoil_sqlite(folder: Path, sql: str) -> None:
    with closing(sqlite3.connect(folder / "gateway.db", isolation_level=None)) as db:
        db.execute("DROP TRIGGER IF EXISTS journal_is_never_deleted")
        db.execute(sql)


def spoil_postgres(folder: Path, sql: str) -> None:
    with psycopg.connect((folder / "url").read_text(), autocommit=True) as db:
        db.execute("DROP TRIGGER IF EXISTS journal_is_never_changed ON journal")
        db.execute(sql.encode())


SPOILERS: dict[str, Callable[[Path, str], None]] = {
    "sqlite": spoil_sqlite,
    "postgres": spoil_postgres,
}
"""How a statement that damages the books is run behind the back of a store that has SQL."""


def lines(
    team_day: int | None = None,
    team_month: int | None = None,
    key_day: int | None = None,
    at: datetime = NOON,
    team: str = "growth",
) -> tuple[Line, ...]:
    """Four accounts of a call: key and team, day and month."""
    amounts = (
        (Scope.KEY, "k1", Window.DAY, key_day),
        (Scope.KEY, "k1", Window.MONTH, None),
        (Scope.TEAM, team, Window.DAY, team_day),
        (Scope.TEAM, team, Window.MONTH, team_month),
    )
    return tuple(
        Line(Limit(scope, owner, Unit.MONEY, window, amount), period(window, at))
        for scope, owner, window, amount in amounts
    )


ACCOUNTS = tuple(line.account for line in lines())
"""Of a call that names no others."""


def claim(
    rid: str,
    bound: int = 10,
    *,
    limits: tuple[Line, ...] | None = None,
    at: datetime = NOON,
    key: str | None = None,
    fingerprint: str = "f",
    model: str = "flare",
    team: str = "growth",
    worker: str = "w1",
) -> Claim:
    return Claim(
        rid=rid,
        team=team,
        key_id="k1",
        model=model,
        operation=Operation.GENERATION,
        upstream="openai",
        images=1,
        bound=bound,
        lines=lines(at=at, team=team) if limits is None else limits,
        at=at,
        lease_ends=at + LEASE,
        price_id="p1",
        fingerprint=fingerprint,
        idempotency_key=key,
        worker=worker,
    )


def elsewhere(
    rid: str,
    bound: int = 10,
    *,
    limits: tuple[Line, ...] | None = None,
    at: datetime = NOON,
    model: str = "flare",
    upstream: str = "azure",
    price_id: str = "p2",
) -> Reroute:
    return Reroute(
        rid, model, upstream, price_id, bound, lines(at=at) if limits is None else limits, at
    )


def settled(rid: str, cost: int, *flags: str, images: int = 1) -> Settlement:
    usage = Usage(text_in=2, image_in=3, cached_text_in=1, text_out=5, image_out=7)
    return Settlement(rid, Event.SETTLE, Outcome.DELIVERED, Basis.USAGE, cost, usage, images, flags)


def voided(rid: str) -> Settlement:
    return Settlement(rid, Event.VOID, Outcome.REFUSED, Basis.NONE)


def expired(rid: str, *flags: str) -> Settlement:
    return Settlement(rid, Event.EXPIRE, Outcome.UNKNOWN, Basis.ESTIMATED, flags=flags)


async def written(ledger: Ledger) -> None:
    """Returns once everything queued before is written: replays are not waited for."""
    await ledger.sweep(datetime(2000, 1, 1, tzinfo=UTC))
