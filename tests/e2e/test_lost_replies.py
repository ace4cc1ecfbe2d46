"""T6: a wire loses 30 % of the answers of Redis, or of PostgreSQL. Money is exact all the same, and
so is what the gate has counted: nothing that is sent again counts twice.

(A counter that a client's own retries add to had 60 % too much: money.md 4.)
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

import gateway.app
import gateway.assembly_stores
import gateway.stores.postgres_writer
from gateway.ports import Store
from gateway.sandbox.journal import Journal
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.settings import Settings
from gateway.stores.redis_gate import RedisGate
from gateway.stores.redis_link import Server
from tests.faults import ledger_of
from tests.postgres import Postgres, losing_wire
from tests.processes import bill
from tests.redis_servers import say
from tests.running import KEY, MODEL, GatewayUnderTest, TestClock, run_gateway
from tests.sizes import size
from tests.torture.verdict import Ledger, Notes, judge
from tests.valkey import LossyWire, Valkey, eventually, run_valkey

pytestmark = pytest.mark.timeout(size(120, 900))
SHARE = 0.3
REDIS_REQUESTS, REDIS_CLIENTS = size(600, 2000), 24
SQL_REQUESTS, SQL_CLIENTS = size(500, 2000), 32
TRIES = 60
"""Of one call, under one idempotency key, until it has its picture."""
BUDGET_DOLLARS = 1000
AMOUNT = 4000
"""Images a minute, in units of 15 ms: more than are asked for."""
UNIT_US = 60_000_000 // AMOUNT
PICTURES, SLOTS = "gw:{default}:rl:team:growth:ipm", "gw:{default}:cc:team:growth"
TEAM: dict[str, Any] = {
    "keys": [KEY],
    "budget": {"day": BUDGET_DOLLARS},
    "limits": {"images_per_minute": AMOUNT, "concurrent_requests": 500},
}


@pytest.fixture
def sandbox(clock: TestClock) -> Iterator[SandboxServer]:
    with SandboxServer(clock, journal=Journal(records=10_000, body_bytes=0)) as running:
        running.rules.add(Rule(payload_bytes=400))
        yield running


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with run_valkey() as server:
        yield server


def stores_of(monkeypatch: pytest.MonkeyPatch) -> list[Store]:
    """The stores that gateways open from now on."""
    opened: list[Store] = []
    open_store = gateway.assembly_stores.open_store

    def opening(settings: Settings) -> Store:
        opened.append(open_store(settings))
        return opened[-1]

    monkeypatch.setattr(gateway.app, "open_store", opening)
    return opened


class Crowd:
    """Clients that ask until they have their pictures, each picture under one idempotency key."""

    def __init__(self, gateway: GatewayUnderTest) -> None:
        self._gateway = gateway
        self.notes = Notes()
        self.answers: Counter[str] = Counter()

    async def ask(self, requests: int, clients: int, first: int = 0) -> None:
        left = iter(range(first, first + requests))

        async def client(http: httpx.AsyncClient) -> None:
            for number in left:
                await self._until_it_came(http, f"lost-{number}")

        async with (
            self._gateway.http(limits=httpx.Limits(max_connections=clients)) as http,
            asyncio.TaskGroup() as everybody,
        ):
            for _ in range(clients):
                everybody.create_task(client(http))

    async def _until_it_came(self, http: httpx.AsyncClient, name: str) -> None:
        body = {"model": MODEL, "prompt": name, "quality": "low", "size": "1024x1024"}
        for _ in range(TRIES):
            answer = await http.post(
                "/images/generations", json=body, headers={"idempotency-key": name}
            )
            if answer.status_code == 200:
                self.answers["200"] += 1
                assert answer.json()["data"][0]["b64_json"]
                cost = round(float(answer.headers["x-cost-usd"]) * 10**9)
                assert self.notes.charged.setdefault(name, cost) == cost
                return
            error = answer.json()["error"]
            self.answers[error["code"]] += 1
            assert error["code"] == "ledger_unavailable", error
            assert answer.headers.get("x-should-retry") != "false"
            await asyncio.sleep(0.05)
        raise AssertionError(f"{name} never came: {dict(self.answers)}")


async def check_money(
    gateway: GatewayUnderTest, crowd: Crowd, stores: list[Store], database: Path | str
) -> Ledger:
    """Every cent that was acknowledged is booked once, and that is the upstream's bill."""
    await gateway.gateway.flights.drain(20)
    books = ledger_of(database)
    billed = [(str(one.fields["prompt"]), bill(one)) for one in gateway.sandbox.journal.billed]
    budgets = {account: BUDGET_DOLLARS * 10**9 for account in books.balances if "|d|" in account}
    assert budgets
    verdict = judge(books, crowd.notes, billed, budgets)
    assert verdict.clean, verdict.details
    states = Counter(hold.state for hold in books.holds)
    assert states["X"] == states["H"] == 0, "no answer of the upstream was lost"
    assert states["P"] == len(billed) == len(crowd.notes.charged)
    assert sum(hold.cost for hold in books.holds) == sum(cost for _, cost in billed)
    assert books.daily_cost == sum(crowd.notes.charged.values())
    assert await stores[0].books.audit() == []
    metrics = await gateway.metrics()
    assert metrics["gateway_settlements_waiting"] == 0
    return books


async def test_lost_answers_of_redis_count_nothing_twice(
    tmp_path: Path,
    sandbox: SandboxServer,
    clock: TestClock,
    valkey: Valkey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Time stands still for Redis's scripts here, so what they have counted is exact at the end."""
    stores = stores_of(monkeypatch)
    start = time.time()

    class StillGate(RedisGate):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, offset=lambda: start - time.time(), beat_seconds=0.2, **named)

    monkeypatch.setattr(gateway.assembly_stores, "RedisGate", StillGate)
    monkeypatch.setattr(gateway.app, "RedisServer", partial(Server, pause=0.05))
    # As much was counted before as leaves room for these: a count of little is soon forgotten, for
    # Redis ends its keys in real time.
    before = round(start * 1e6) + 59_000_000 - REDIS_REQUESTS * UNIT_US
    say(valkey.port, "SET", PICTURES, before, "PX", 600_000)
    async with LossyWire(valkey.port) as wire:
        changes = {
            "storage": {"redis": wire.url},
            "cache": {"enabled": False},
            "teams": {"growth": TEAM},
        }
        async with run_gateway(tmp_path, sandbox, changes, clock) as running:
            crowd = Crowd(running)
            began = time.monotonic()
            wire.lose_some(SHARE)
            await crowd.ask(REDIS_REQUESTS, REDIS_CLIENTS)
            wire.lose_some(0)
            seconds = time.monotonic() - began
            told = await running.told.until(REDIS_REQUESTS)
            degraded = Counter(receipt.degraded for receipt, _ in told)
            print(
                f"\n{REDIS_REQUESTS} pictures in {seconds:.0f} s, {wire.lost} answers of Redis"
                f" lost, {degraded[True]} let in without it"
            )
            assert crowd.answers == {"200": REDIS_REQUESTS}, "Redis never costs a picture"
            assert wire.lost > REDIS_REQUESTS * SHARE
            assert degraded[False] > REDIS_REQUESTS / 2
            await check_money(running, crowd, stores, tmp_path / "data" / "gateway.db")

            def counted() -> int:
                return (int(say(valkey.port, "GET", PICTURES)) - before) // UNIT_US

            def slots() -> int:
                return int(say(valkey.port, "ZCARD", SLOTS))

            # Time stands still, so no lease ends: every slot was given back.
            with contextlib.suppress(AssertionError):
                await eventually(lambda: (counted(), slots()) == (degraded[False], 0))
            assert (counted(), slots()) == (degraded[False], 0)
            assert (int(say(valkey.port, "GET", PICTURES)) - before) % UNIT_US == 0


async def test_lost_answers_of_postgresql_book_nothing_twice(
    tmp_path: Path,
    sandbox: SandboxServer,
    clock: TestClock,
    postgres: Postgres,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stores = stores_of(monkeypatch)
    # In real life 0.1 s, and 0.2, and 0.3: what is waited for here is only a connection.
    monkeypatch.setattr(gateway.stores.postgres_writer, "PAUSE_SECONDS", 0.01)
    database = postgres.fresh_database()
    name = database.rpartition("/")[2]
    with losing_wire(postgres.port) as wire:
        changes = {
            "storage": {
                "database": postgres.url(name, wire.port),
                "pepper": "pepper-0123456789abcdef-0123456789",
            },
            "cache": {"enabled": False},
            "teams": {"growth": TEAM},
        }
        async with run_gateway(tmp_path, sandbox, changes, clock) as running:
            crowd = Crowd(running)
            began = time.monotonic()
            wire.lose_some(SHARE)
            await crowd.ask(SQL_REQUESTS, SQL_CLIENTS)
            wire.lose_some(0)
            seconds = time.monotonic() - began
            unposted = sum(
                receipt.status == 200 and not receipt.posted for receipt, _ in running.told.requests
            )
            print(
                f"\n{SQL_REQUESTS} pictures in {seconds:.0f} s, {wire.cut} of {wire.answers}"
                f" answers of PostgreSQL lost; {unposted} were settled behind their answer;"
                f" {dict(crowd.answers)}"
            )
            assert crowd.answers["200"] == SQL_REQUESTS
            assert wire.cut > wire.answers * SHARE / 2
            assert wire.commits_cut > 20
            books = await check_money(running, crowd, stores, database)
            rows = await running.usage()
            assert sum(row.requests for row in rows) == SQL_REQUESTS
            assert sum(row.cost for row in rows) == books.daily_cost
