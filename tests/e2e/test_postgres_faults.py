"""T13: PostgreSQL fails under load. Nothing is let in that could not be booked, what was bought is
delivered, and behind the fault every cent is where it belongs."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.sandbox.journal import Journal
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from gateway.stores.sqlite_ledger import SQLiteLedger
from tests.e2e.test_lost_replies import stores_of
from tests.faults import ledger_of
from tests.postgres import Postgres, run_postgres
from tests.processes import bill
from tests.running import KEY, MODEL, GatewayUnderTest, TestClock, run_gateway
from tests.torture.verdict import Notes, judge
from tests.valkey import eventually

IN_FLIGHT, MEANWHILE, AFTERWARDS = 60, 20, 20
FROZEN_SECONDS, REFUSED_SECONDS = 10.0, 5.0
REFUSAL_SECONDS = 4.5
"""A budgeted call is refused within it: 3 s are the ledger's patience, 0.25 s that for what is left
of the budget, and the rest is for a busy machine."""
RECOVERY_SECONDS = 10.0
SCRAPE_SECONDS = 4.5
"""2 s for who answers, and 2 s for the money of a ledger that does."""
BUDGET_DOLLARS = 1000


@pytest.fixture
def sandbox(clock: TestClock) -> Iterator[SandboxServer]:
    with SandboxServer(clock, journal=Journal(records=10_000, body_bytes=0)) as running:
        yield running


@pytest.fixture
def server() -> Iterator[Postgres]:
    with run_postgres() as running:
        yield running


def kill(server: Postgres) -> tuple[float, Callable[[], None]]:
    """kill -9 of all of it, and a start that has to recover."""
    server.kill()
    return 0.0, server.restart


def freeze(server: Postgres) -> tuple[float, Callable[[], None]]:
    server.freeze()
    return FROZEN_SECONDS, server.thaw


def refuse(server: Postgres) -> tuple[float, Callable[[], None]]:
    """Nobody listens there."""
    server.kill()
    return REFUSED_SECONDS, server.restart


class Clients:
    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.notes = Notes()

    async def ask(self, name: str) -> tuple[httpx.Response, float]:
        """The answer, and the seconds it took."""
        began = time.monotonic()
        body = {"model": MODEL, "prompt": name, "quality": "low", "size": "1024x1024"}
        answer = await self._http.post(
            "/images/generations", json=body, headers={"idempotency-key": name}
        )
        if answer.status_code == 200:
            assert answer.json()["data"][0]["b64_json"]
            self.notes.charged[name] = round(float(answer.headers["x-cost-usd"]) * 10**9)
        return answer, time.monotonic() - began

    def many(self, what: str, count: int) -> asyncio.Task[list[tuple[httpx.Response, float]]]:
        async def all_of_them() -> list[tuple[httpx.Response, float]]:
            return await asyncio.gather(*(self.ask(f"{what}-{number}") for number in range(count)))

        return asyncio.create_task(all_of_them())


@pytest.mark.parametrize("fault", [kill, freeze, refuse], ids=lambda fault: fault.__name__)
async def test_postgresql_fails_with_pictures_in_flight(
    tmp_path: Path,
    sandbox: SandboxServer,
    clock: TestClock,
    server: Postgres,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Postgres], tuple[float, Callable[[], None]]],
) -> None:
    stores = stores_of(monkeypatch)
    database = server.fresh_database()
    changes: dict[str, Any] = {
        "storage": {"database": database, "pepper": "pepper-0123456789abcdef-0123456789"},
        "cache": {"enabled": False},
        "teams": {"growth": {"keys": [KEY], "budget": {"day": BUDGET_DOLLARS}}},
    }
    making = Gate()
    sandbox.rules.add(Rule(prompt="flying", wait_for=making, payload_bytes=400))
    sandbox.rules.add(Rule(payload_bytes=400))
    async with (
        run_gateway(tmp_path, sandbox, changes, clock) as gateway,
        gateway.http(limits=httpx.Limits(max_connections=200), timeout=60) as http,
    ):
        clients, began = Clients(http), time.monotonic()
        flying = clients.many("flying", IN_FLIGHT)
        async with asyncio.timeout(30):
            await making.arrived(IN_FLIGHT)

        seconds, mend = await asyncio.to_thread(fault, server)
        broken = time.monotonic()
        try:
            refusals = await clients.many("meanwhile", MEANWHILE)
            slowest = max(took for _, took in refusals)
            for answer, took in refusals:
                assert (answer.status_code, answer.json()["error"]["code"]) == (
                    503,
                    "ledger_unavailable",
                )
                assert answer.headers.get("x-should-retry") != "false", "a retry may help"
                assert int(answer.headers["retry-after"]) > 0
                assert took < REFUSAL_SECONDS
            assert len(sandbox.journal) == IN_FLIGHT, "nothing was sent that is not held"
            making.set()
            released = time.monotonic()
            # The upstream answers while nobody can book it.
            await eventually(lambda: sandbox.journal.billed_requests == IN_FLIGHT)
            if fault is not freeze:
                # A dead server is noticed at once: nobody's picture waits for it.
                await flying
                waiting = (await gateway.metrics())["gateway_settlements_waiting"]
                assert waiting >= IN_FLIGHT
            await asyncio.sleep(max(0.0, broken + seconds - time.monotonic()))
        finally:
            await asyncio.to_thread(mend)
        mended = time.monotonic()

        async def served() -> bool:
            answer, _ = await clients.ask(f"probe-{time.monotonic_ns()}")
            assert answer.status_code in (200, 503)
            return answer.status_code == 200

        await eventually(served, RECOVERY_SECONDS)
        recovered = time.monotonic() - mended
        delivered = await flying
        longest = max(took for _, took in delivered) - (released - began)
        assert [answer.status_code for answer, _ in delivered] == [200] * IN_FLIGHT
        for answer, _ in await clients.many("afterwards", AFTERWARDS):
            assert answer.status_code == 200

        async def all_posted() -> bool:
            return (await gateway.metrics())["gateway_settlements_waiting"] == 0

        await eventually(all_posted, 30)
        posted = time.monotonic() - mended
        unposted = sum(
            receipt.status == 200 and not receipt.posted for receipt, _ in gateway.told.requests
        )
        print(
            f"\n{fault.__name__}: refused within {slowest:.2f} s, pictures came within"
            f" {longest:.1f} s, used again after {recovered:.2f} s;"
            f" {unposted} settlements waited, the last for {posted:.1f} s more"
        )
        # A frozen one is waited for, three times 3 s: it may be back in time.
        assert unposted == IN_FLIGHT or fault is freeze
        await check_money(gateway, clients, database)
        assert await stores[0].books.audit() == []
    assert list((tmp_path / "data" / "settlements").iterdir()) == []


async def check_money(gateway: GatewayUnderTest, clients: Clients, database: str) -> None:
    books = ledger_of(database)
    billed = [(str(one.fields["prompt"]), bill(one)) for one in gateway.sandbox.journal.billed]
    budgets = {account: BUDGET_DOLLARS * 10**9 for account in books.balances if "|d|" in account}
    assert budgets
    verdict = judge(books, clients.notes, billed, budgets)
    assert verdict.clean, verdict.details
    states = Counter(hold.state for hold in books.holds)
    assert states["P"] == len(billed) == len(clients.notes.charged)
    assert states["X"] == 0
    assert books.daily_cost == sum(cost for _, cost in billed)
    rows = await gateway.usage()
    assert (sum(row.cost for row in rows), sum(row.requests for row in rows)) == (
        books.daily_cost,
        len(billed),
    )


async def test_a_frozen_ledger_does_not_look_like_a_gateway_that_is_gone(
    tmp_path: Path, sandbox: SandboxServer, server: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """A scrape has 10 s."""
    changes: dict[str, Any] = {
        "storage": {
            "database": server.fresh_database(),
            "pepper": "pepper-0123456789abcdef-0123456789",
        }
    }
    async with run_gateway(tmp_path, sandbox, changes) as gateway:
        assert (await gateway.metrics())['gateway_dependency_up{name="ledger"}'] == 1
        server.freeze()
        try:
            began = time.monotonic()
            seen = await gateway.metrics()
            took = time.monotonic() - began
        finally:
            server.thaw()
        print(f"\nscraped in {took:.1f} s while the ledger is frozen")
        assert took < SCRAPE_SECONDS
        assert seen['gateway_dependency_up{name="ledger"}'] == 0
        assert seen['gateway_dependency_up{name="directory"}'] == 0
        assert "gateway_ledger_open_holds" in seen
        told = [one.__dict__ for one in caplog.records if one.msg == "a store does not answer"]
        assert [(one["store"], one["setting"]) for one in told[:2]] == [
            ("ledger", "storage.database"),
            ("directory", "storage.database"),
        ]
        assert all(one["error"] for one in told)


async def test_a_ledger_that_hangs_behind_its_ping_is_not_waited_for(
    tmp_path: Path, sandbox: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(self: SQLiteLedger) -> int:
        await asyncio.Event().wait()
        return 0

    monkeypatch.setattr(SQLiteLedger, "unresolved", hang)
    async with run_gateway(tmp_path, sandbox) as gateway:
        began = time.monotonic()
        seen = await gateway.metrics()
        assert time.monotonic() - began < SCRAPE_SECONDS
        assert seen['gateway_dependency_up{name="ledger"}'] == 1
        assert seen["gateway_ledger_open_holds"] == 0
