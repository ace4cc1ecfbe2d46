"""What the ledger costs when it has 0 to 5 million calls: `make bench STUDY=ledger`.

Each size is filled by the database itself (``ledger_rows``), opened as a gateway opens it, and
asked through the store, its writer and its readers: so a time is what a request or a command waits
for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from gateway.domain.call import Operation, Usage
from gateway.domain.ledger import Basis, By, Claim, Event, Held, Line, Outcome, Settlement
from gateway.domain.quota import MONEY_WINDOWS, Limit, Scope, Unit, period
from gateway.housekeeping import FORGET_BATCH
from gateway.ports import Store
from gateway.reports.focus import as_csv, focus_rows
from gateway.stores.postgres import PostgresStore
from gateway.stores.postgres_link import connect
from gateway.stores.sqlite import SQLiteStore
from tests.bench.ledger_rows import BOUND, DAYS, FIRST, NOON, fill_postgres, fill_sqlite
from tests.bench.results import rounded
from tests.bench.rounds import say
from tests.postgres import run_postgres

SIZES = (0, 10_000, 100_000, 1_000_000, 5_000_000)
QUICK_SIZES = (0, 10_000)
LIMIT_MS = 200.0
"""What a question about usage may take (issue 7)."""
LAST = FIRST + timedelta(days=DAYS - 1)
FLIGHT = 64
PATIENCE_MS = 3000.0
"""How long one question may be asked again and again."""


@dataclass(slots=True)
class Measured:
    """One ledger of one size. Times are milliseconds, a question's is the median of its rounds."""

    store: str
    calls: int
    fill_seconds: float = 0.0
    open_ms: float = 0.0
    audit_seconds: float = 0.0
    questions_ms: dict[str, float] = field(default_factory=dict)
    cpu_ms: dict[str, float] = field(default_factory=dict)
    """Of it, this process's CPU: all of it for SQLite, what is made of the rows for PostgreSQL."""
    rows: dict[str, int] = field(default_factory=dict)
    """How many rows a question was answered with."""
    pairs: dict[str, float] = field(default_factory=dict)
    """Reservations and settlements: alone, and 64 at a time."""
    retention: dict[str, float] = field(default_factory=dict)

    @property
    def slow(self) -> list[str]:
        """The questions about usage that take longer than they may."""
        return [name for name, ms in self.questions_ms.items() if ms > LIMIT_MS]


def claim(number: int, lease_seconds: float = 660) -> Claim:
    """A call of one of the keys, behind all that were filled in. It has eight accounts, as every
    call through the gateway has."""
    key = number * 7919 % 1000
    team, key_id = f"team-{key % 200}", f"key_{key:08x}"
    lines = tuple(
        Line(Limit(scope, owner, Unit.MONEY, window, None), period(window, NOON))
        for scope, owner in ((Scope.TEAM, team), (Scope.KEY, key_id))
        for window in MONEY_WINDOWS
    )
    return Claim(
        rid=f"req_bench_{number:014}",
        team=team,
        key_id=key_id,
        model=f"model-{key % 10}",
        operation=Operation.GENERATION,
        upstream="openai",
        images=1,
        bound=BOUND,
        lines=lines,
        at=NOON,
        lease_ends=NOON + timedelta(seconds=lease_seconds),
        price_id="openai/gpt-image-2@2026-04-01",
        fingerprint="f" * 64,
        worker="bench/1/00000000",
        user=f"u_{key % 200:08x}{number % 100:08x}0123",
    )


def settlement(made: Claim) -> Settlement:
    usage = Usage(text_in=60, image_out=4160)
    return Settlement(
        made.rid, Event.SETTLE, Outcome.DELIVERED, Basis.USAGE, 124_800_000, usage, 1, at=NOON
    )


class Caller:
    """Makes calls, each with a number of its own, and remembers how long each part took."""

    def __init__(self, store: Store) -> None:
        self._ledger = store.ledger
        self._number = 0
        self.reserved_ms: list[float] = []
        self.settled_ms: list[float] = []

    async def reserve(self, lease_seconds: float = 660) -> Claim:
        self._number += 1
        made = claim(self._number, lease_seconds)
        begun = time.perf_counter()
        assert isinstance(await self._ledger.reserve(made), Held)
        self.reserved_ms.append((time.perf_counter() - begun) * 1000)
        return made

    async def settle(self, made: Claim) -> None:
        begun = time.perf_counter()
        await self._ledger.settle(settlement(made))
        self.settled_ms.append((time.perf_counter() - begun) * 1000)

    async def pair(self) -> None:
        await self.settle(await self.reserve())

    def forget_times(self) -> None:
        self.reserved_ms.clear()
        self.settled_ms.clear()


async def measure_pairs(caller: Caller, pairs: int) -> dict[str, float]:
    """One after the other, then 64 at a time. CPU is that of this process."""
    for _ in range(20):
        await caller.pair()
    caller.forget_times()
    for _ in range(pairs):
        await caller.pair()
    found = {
        "reserve_ms": statistics.median(caller.reserved_ms),
        "reserve_p99_ms": percentile(caller.reserved_ms, 99),
        "settle_ms": statistics.median(caller.settled_ms),
        "settle_p99_ms": percentile(caller.settled_ms, 99),
    }

    async def work(turns: int) -> None:
        for _ in range(turns):
            await caller.pair()

    turns = max(1, 10 * pairs // FLIGHT)
    before, begun = time.process_time(), time.perf_counter()
    await asyncio.gather(*(work(turns) for _ in range(FLIGHT)))
    seconds, done = time.perf_counter() - begun, turns * FLIGHT
    found["pairs_per_second"] = done / seconds
    found["process_cpu_us"] = (time.process_time() - before) / done * 1e6
    return found


def questions(store: Store) -> dict[str, Callable[[], Awaitable[Any]]]:
    """What commands, the Admin API and the housekeeping ask; every one but the listing of all rows
    of all days has to be answered in ``LIMIT_MS``."""
    ledger, books = store.ledger, store.books
    first, last = FIRST.isoformat(), LAST.isoformat()
    month = ("2026-10-01", "2026-10-31")
    thirty = ((LAST - timedelta(days=29)).isoformat(), last)
    # Neither end is the end of a month. Of half months the sums are kept; far from their ends, the
    # most has to be added up by days.
    crooked = ("2026-08-29", "2026-11-16")
    halves = ("2026-09-16", "2026-11-15")
    far = ("2026-09-08", "2026-11-07")
    asked: dict[str, Callable[[], Awaitable[Any]]] = {
        "usage, a day": lambda: ledger.usage(last, last),
        "usage, a team's 90 days": lambda: ledger.usage(first, last, "team-7"),
    }
    for by in By:
        asked[f"usage --by {by}, all"] = partial(books.usage_by, by)
        asked[f"usage --by {by}, a month"] = partial(books.usage_by, by, None, *month)
        asked[f"usage --by {by}, a team"] = partial(books.usage_by, by, "team-7")
    for name, days in (
        ("a month", month),
        ("30 days", thirty),
        ("80 crooked days", crooked),
        ("two half months around a whole one", halves),
        ("from an 8th to a 7th", far),
        ("a day", (last, last)),
    ):
        asked[f"usage --by user, {name}"] = partial(books.usage_by_user, None, *days)
    asked["usage --by user, all"] = books.usage_by_user
    asked["usage --by user, a team"] = lambda: books.usage_by_user("team-7")
    made = claim(1)
    asked |= {
        "budgets of a call": lambda: ledger.balances(made.lines),
        "a call": lambda: books.find("req_" + "0" * 24),
        "a call's journal": lambda: books.journal("req_" + "0" * 24),
        "an idempotency key": lambda: ledger.claimed("team-7", "absent", "f", NOON),
        "unresolved, 100 calls": lambda: books.unresolved(100),
        "unresolved, dollars": ledger.unresolved,
        "running calls": ledger.open_holds,
        "the oldest running call": books.oldest_hold,
        "routed, a day": lambda: books.routed(last),
        "sweep, nothing due": lambda: ledger.sweep(NOON),
    }
    return asked


async def ask(question: Callable[[], Awaitable[Any]], rounds: int) -> tuple[float, float, int]:
    """The medians of all and of this process's CPU in milliseconds, and how many rows. The first
    time is not counted, unless there is no time for another."""
    times: list[float] = []
    cpu: list[float] = []
    while len(times) <= rounds and sum(times) < PATIENCE_MS:
        begun, worked = time.perf_counter(), time.process_time()
        answer = await question()
        times.append((time.perf_counter() - begun) * 1000)
        cpu.append((time.process_time() - worked) * 1000)
    rows = len(answer) if isinstance(answer, list) else 1
    return statistics.median(times[1:] or times), statistics.median(cpu[1:] or cpu), rows


async def measure_listing(store: Store) -> dict[str, float]:
    """What is as long as the books are: every row of usage, and a month of FOCUS as CSV."""
    begun = time.perf_counter()
    rows = await store.ledger.usage()
    listed = time.perf_counter() - begun
    begun = time.perf_counter()
    month = await store.ledger.usage("2026-10-01", "2026-10-31")
    as_csv(focus_rows(month, "bench", {}, lambda _: None))
    exported = time.perf_counter() - begun
    return {
        "usage_rows": len(rows),
        "usage_rows_per_second": len(rows) / listed,
        "focus_rows": len(month),
        "focus_seconds": exported,
        "focus_rows_per_second": len(month) / exported,
    }


async def measure_retention(store: Store, caller: Caller, seconds: float) -> dict[str, float]:
    """50 calls a second, alone and then beside the deletion of the first month."""
    before = NOON - timedelta(days=60)
    alone = await under_load(caller, seconds)
    forgotten = 0
    batches: list[float] = []
    load = asyncio.create_task(under_load(caller, seconds))
    begun = time.perf_counter()
    while not load.done():
        one = time.perf_counter()
        done = await store.upkeep.forget(before, FORGET_BATCH)
        if not done:
            break
        forgotten += done
        taken = time.perf_counter() - one
        batches.append(taken * 1000)
        # As the housekeeping does.
        await asyncio.sleep(taken)
    lasted = time.perf_counter() - begun
    beside = await load
    return {
        "calls_forgotten": forgotten,
        "calls_per_second": forgotten / lasted,
        "batch_ms": statistics.median(batches) if batches else 0.0,
        "batch_p99_ms": percentile(batches, 99),
        "reserve_p50_ms": percentile(alone, 50),
        "reserve_p99_ms": percentile(alone, 99),
        "beside_p50_ms": percentile(beside, 50),
        "beside_p99_ms": percentile(beside, 99),
    }


async def under_load(caller: Caller, seconds: float, per_second: int = 50) -> list[float]:
    """How long each reservation took, of calls that come whether the last one is done or not."""
    caller.forget_times()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    async with asyncio.TaskGroup() as calls:
        for number in range(int(seconds * per_second)):
            await asyncio.sleep(begun + number / per_second - loop.time())
            calls.create_task(caller.pair())
    return list(caller.reserved_ms)


async def measure(store: Store, found: Measured, effort: float) -> Measured:
    """``effort`` 1 is for numbers to be published; a test needs less."""
    caller = Caller(store)
    found.pairs = await measure_pairs(caller, max(5, int(300 * effort)))
    # Idempotency keys that are older than a day; a sweep clears a thousand of them.
    for _ in range(found.calls // DAYS // 5000 + 1):
        await store.ledger.sweep(NOON)
    for name, question in questions(store).items():
        ms, cpu_ms, rows = await ask(question, max(1, int(7 * effort)))
        found.questions_ms[name], found.cpu_ms[name], found.rows[name] = ms, cpu_ms, rows
    for _ in range(100):
        await caller.reserve(lease_seconds=-1)
    begun = time.perf_counter()
    assert len(await store.ledger.sweep(NOON)) == 100
    found.questions_ms["sweep, 100 due"] = (time.perf_counter() - begun) * 1000
    found.pairs |= await measure_listing(store)
    found.retention = await measure_retention(store, caller, 20 * effort)
    begun = time.perf_counter()
    assert await store.books.audit() == []
    found.audit_seconds = time.perf_counter() - begun
    return found


def percentile(times: Sequence[float], percent: int) -> float:
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else 0.0


async def opened(open_store: Callable[[], Store], found: Measured, effort: float) -> Measured:
    begun = time.perf_counter()
    store = open_store()
    found.open_ms = (time.perf_counter() - begun) * 1000
    try:
        return await measure(store, found, effort)
    finally:
        await store.aclose()


async def grow_sqlite(folder: Path, calls: int, effort: float = 1.0) -> Measured:
    path = folder / f"ledger-{calls}.db"
    await SQLiteStore.open(path).aclose()
    begun = time.perf_counter()
    fill_sqlite(path, calls)
    found = Measured("sqlite", calls, time.perf_counter() - begun)
    await opened(lambda: SQLiteStore.open(path), found, effort)
    found.pairs["bytes"] = path.stat().st_size
    path.unlink()
    return found


async def grow_postgres(url: str, calls: int, effort: float = 1.0) -> Measured:
    begun = time.perf_counter()
    fill_postgres(url, calls)
    found = Measured("postgres", calls, time.perf_counter() - begun)
    await opened(lambda: PostgresStore.open(url, caller_time=True), found, effort)
    with connect(url) as link:
        found.pairs["bytes"] = link.number("SELECT pg_database_size(current_database())")
    return found


def run(sizes: Sequence[int]) -> list[Measured]:
    """Every size, in both databases."""
    with tempfile.TemporaryDirectory(prefix="ledger-") as folder:
        return asyncio.run(_grow(sizes, Path(folder)))


async def _grow(sizes: Sequence[int], folder: Path) -> list[Measured]:
    results = []
    for calls in sizes:
        results.append(await grow_sqlite(folder, calls))
        say(f"ledger: {calls:,} calls in SQLite")
        # A server for each size: nothing of the last one is left on the disk.
        with run_postgres(durable=True) as server:
            results.append(await grow_postgres(server.fresh_database(), calls))
        say(f"ledger: {calls:,} calls in PostgreSQL")
    return results


def write(machine: Mapping[str, str], results: Sequence[Measured], path: Path) -> None:
    said = {"machine": machine, "ledgers": [dataclasses.asdict(one) for one in results]}
    path.write_text(json.dumps(rounded(said), indent=1) + "\n")


def read(path: Path) -> tuple[Mapping[str, str], list[Measured]]:
    """Raises ``KeyError`` and ``TypeError`` for what ``write`` has not written."""
    said = json.loads(path.read_text())
    return said["machine"], [Measured(**one) for one in said["ledgers"]]
