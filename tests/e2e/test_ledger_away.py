"""The ledger is away when a call is settled: its ending waits on disk, and no cent is lost.

Real processes, a database that a stranger has locked for longer than the gateway waits, and the
file in which the settlements are kept meanwhile (money.md 6a).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

import gateway.app
import gateway.relay.purchase
from gateway.domain.ledger import Basis, Event, Outcome, Settlement
from gateway.sandbox.journal import Journal
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from gateway.stores.safe import SettlementSafe
from gateway.stores.sqlite_ledger import SQLiteLedger
from tests.e2e.test_endings import impatient
from tests.e2e.test_processes import (
    LEASE_SECONDS,
    SHORT,
    Answered,
    all_ended,
    check_against,
    configured,
    database,
)
from tests.processes import Books, GatewayProcess, run, wait_until
from tests.running import KEY, MODEL, Start, TestClock
from tests.valkey import eventually

LONG = {"sweep_seconds": 0.2}
"""No lease ends in these tests."""


@pytest.fixture
def sandbox() -> Iterator[SandboxServer]:
    with SandboxServer(TestClock(), journal=Journal(records=100_000)) as running:
        yield running


def kept(config: Path) -> list[dict[str, Any]]:
    """The lines of every file of settlements."""
    folder = config.parent / "data" / "settlements"
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


@contextmanager
def locked(config: Path) -> Iterator[None]:
    """A stranger has the database for himself."""
    with closing(sqlite3.connect(database(config), isolation_level=None)) as stranger:
        stranger.execute("BEGIN EXCLUSIVE")
        yield
        stranger.execute("ROLLBACK")


class Story:
    """Calls that are held in the upstream until the database is locked."""

    def __init__(self, sandbox: SandboxServer, calls: int = 3) -> None:
        self.answered = Answered()
        self.names = [f"call-{number}" for number in range(calls)]
        self._gate = Gate()
        sandbox.rules.add(Rule(wait_for=self._gate, payload_bytes=400))

    async def begin(self, process: GatewayProcess) -> list[asyncio.Task[int | None]]:
        async def one(number: int, name: str) -> int | None:
            headers = {"authorization": f"Bearer {KEY}"}
            async with httpx.AsyncClient(headers=headers, timeout=60, verify=False) as http:
                return await self.answered.call(
                    http, process.base_url, name, stream=number % 3 == 2
                )

        calls = [asyncio.create_task(one(number, name)) for number, name in enumerate(self.names)]
        async with asyncio.timeout(30):
            await self._gate.arrived(len(self.names))
        return calls

    def go_on(self) -> None:
        self._gate.set()


def posted(config: Path, count: int) -> bool:
    return len(Books.read(database(config)).of("P")) == count


async def until(true: Any, what: str, seconds: float = 60) -> None:
    await asyncio.to_thread(wait_until, true, what, seconds)


@pytest.mark.parametrize("killed", [False, True], ids=["it lives on", "kill -9"])
async def test_what_cannot_be_settled_waits_on_disk(
    tmp_path: Path, sandbox: SandboxServer, killed: bool
) -> None:
    config = configured(tmp_path, sandbox, LONG)
    story = Story(sandbox)
    with GatewayProcess(config) as process:
        process.wait_ready()
        calls = await story.begin(process)
        with locked(config):
            story.go_on()
            assert await asyncio.gather(*calls) == [200] * 3, "everybody gets what was bought"
            lines = {line["rid"]: line for line in kept(config)}
            books = Books.read(database(config))
            assert lines.keys() == {hold.rid for hold in books.open}, "and every hold stands"
            costs = {
                hold.rid: story.answered.costs[str(hold.idempotency_key)] for hold in books.open
            }
            assert {rid: line["cost"] for rid, line in lines.items()} == costs
            metrics = await asyncio.to_thread(process.metrics)
            assert metrics["gateway_settlements_waiting"] == 3
            assert metrics["gateway_ledger_unposted_total"] == 3
            said = [one for one in process.log if "it is kept on disk" in one["event"]]
            assert {one["request_id"] for one in said} == lines.keys()
            if killed:
                process.kill()
        if not killed:
            await until(lambda: posted(config, 3), "all is booked")
            await until(lambda: kept(config) == [], "nothing waits")
            metrics = await asyncio.to_thread(process.metrics)
            assert metrics["gateway_settlements_waiting"] == 0
            process.terminate()
            assert await asyncio.to_thread(process.wait) == 0
    if killed:
        assert len(Books.read(database(config)).open) == 3
        with GatewayProcess(config) as second:
            second.wait_ready()
            await until(lambda: posted(config, 3), "all is booked")
            await until(lambda: kept(config) == [], "nothing waits")
            assert sum("left behind" in one["event"] for one in second.log) == 3
    books = Books.read(database(config))
    check_against(books, sandbox, story.answered)
    # It was settled when it ended, not when the ledger was back.
    with closing(sqlite3.connect(database(config))) as db:
        at = dict(db.execute("SELECT rid, at FROM journal WHERE kind = 'P'"))
    assert {rid: line["at"] for rid, line in lines.items()} == {
        rid: _iso(micros) for rid, micros in at.items()
    }
    assert list((tmp_path / "data" / "settlements").iterdir()) == []


def _iso(micros: int) -> str:
    with closing(sqlite3.connect(":memory:")) as db:
        [(text,)] = db.execute(
            "SELECT strftime('%Y-%m-%dT%H:%M:%S', ?, 'unixepoch')", (micros // 10**6,)
        )
    fraction = f".{micros % 10**6:06}" if micros % 10**6 else ""
    return f"{text}{fraction}+00:00"


async def test_it_is_exact_where_the_sweep_was_first_too(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    """The process dies with settlements on disk, and their holds have expired when it comes back:
    a neighbour that does not see its disk has swept them."""
    config = configured(tmp_path, sandbox)
    story = Story(sandbox)
    elsewhere = tmp_path / "another-disk"
    with GatewayProcess(config) as process:
        process.wait_ready()
        calls = await story.begin(process)
        with locked(config):
            story.go_on()
            assert await asyncio.gather(*calls) == [200] * 3
            process.kill()
        (tmp_path / "data" / "settlements").rename(elsewhere)
    with GatewayProcess(config) as neighbour:
        neighbour.wait_ready()
        await until(lambda: all_ended(config), "every hold ended", LEASE_SECONDS + 15)
        assert len(Books.read(database(config)).of("X")) == 3
        # And a running process takes over what turns up on its disk.
        for path in elsewhere.iterdir():
            path.rename(tmp_path / "data" / "settlements" / path.name)
        await until(lambda: posted(config, 3), "all is booked")
        await until(lambda: kept(config) == [], "nothing waits")
    check_against(Books.read(database(config)), sandbox, story.answered)
    said = run("usage", "--config", str(config), "--json")
    assert json.loads(said.stdout)["total"]["unresolved"] == 0


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"NOT TESTED, a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(OSError, match="No space"), (folder / "ballast").open("wb", 0) as file:  # noqa: PT012
            while True:
                file.write(bytes(65536))
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("killed", [False, True], ids=["it lives on", "kill -9"])
async def test_a_full_disk_takes_nothing_from_the_client(
    tmp_path: Path, sandbox: SandboxServer, killed: bool
) -> None:
    """Then it is in memory alone: exact while the process lives, and the bound where it dies."""
    config = configured(tmp_path, sandbox, LONG)
    story = Story(sandbox)
    with full_disk(tmp_path / "data" / "settlements"):
        with GatewayProcess(config) as process:
            process.wait_ready()
            calls = await story.begin(process)
            with locked(config):
                story.go_on()
                assert await asyncio.gather(*calls) == [200] * 3
                assert kept(config) == []
                said = [one for one in process.log if "in memory alone" in one["event"]]
                assert len(said) == 3
                assert {one["error"] for one in said} == {"[Errno 28] No space left on device"}
                metrics = await asyncio.to_thread(process.metrics)
                assert metrics["gateway_settlements_waiting"] == 3
                if killed:
                    process.kill()
            if not killed:
                await until(lambda: posted(config, 3), "all is booked")
                process.terminate()
                assert await asyncio.to_thread(process.wait) == 0
        if killed:
            assert len(Books.read(database(config)).open) == 3, "the holds stand"
        else:
            check_against(Books.read(database(config)), sandbox, story.answered)


async def test_a_worker_that_was_frozen_corrects_what_others_thought_of_it(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    config = configured(tmp_path, sandbox, SHORT)
    story = Story(sandbox)
    with GatewayProcess(config) as frozen, GatewayProcess(config) as other:
        frozen.wait_ready()
        other.wait_ready()
        calls = await story.begin(frozen)
        os.kill(frozen.pid, signal.SIGSTOP)
        await until(lambda: all_ended(config), "every hold ended", LEASE_SECONDS + 15)
        books = Books.read(database(config))
        assert len(books.of("X")) == 3
        books.check()
        story.go_on()
        os.kill(frozen.pid, signal.SIGCONT)
        assert await asyncio.gather(*calls) == [200] * 3
        assert posted(config, 3), "an answer goes out after its settlement"
    check_against(Books.read(database(config)), sandbox, story.answered)


async def test_a_drain_leaves_what_it_cannot_settle_on_disk(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    """SIGTERM while the ledger is away ends with 0, and the next start posts what waits."""
    config = configured(tmp_path, sandbox, LONG)
    story = Story(sandbox, 1)
    with GatewayProcess(config) as process:
        process.wait_ready()
        calls = await story.begin(process)
        with locked(config):
            story.go_on()
            assert await asyncio.gather(*calls) == [200]
            process.terminate()
            assert await asyncio.to_thread(process.wait) == 0
            assert [one["level"] for one in process.log if "next start" in one["event"]] == [
                "warning"
            ]
            assert len(kept(config)) == 1
    with GatewayProcess(config) as second:
        second.wait_ready()
        await until(lambda: posted(config, 1), "all is booked")
        await until(lambda: kept(config) == [], "nothing waits")
    check_against(Books.read(database(config)), sandbox, story.answered)


async def test_a_disk_that_hangs_is_not_waited_for(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hangs = asyncio.Event()

    async def never(*_: object) -> None:
        hangs.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(SettlementSafe, "keep", never)
    monkeypatch.setattr(gateway.relay.purchase, "SAFE_SECONDS", 0.05)
    gate = Gate()
    with impatient(monkeypatch):
        async with start({"ledger": LONG}) as running, running.sdk() as sdk:
            running.sandbox.rules.add(Rule(wait_for=gate, payload_bytes=400))
            call = asyncio.ensure_future(sdk.images.generate(model=MODEL, prompt="A lighthouse"))
            async with asyncio.timeout(30):
                await gate.arrived()
            with locked(running.config):
                gate.set()
                answer = await call
                assert answer.data
                assert hangs.is_set()
                assert "in memory alone; its hold stands" in caplog.text
                metrics = await running.metrics()
                assert metrics["gateway_settlements_waiting"] == 1
            await eventually(lambda: posted(running.config, 1))
            [receipt] = [one for one, _ in running.told.requests]
            [hold] = Books.read(database(running.config)).holds.values()
            assert (hold.cost, receipt.posted) == (receipt.cost, False)


async def test_a_settlement_of_another_database_stays_where_it_is(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Or of an older copy of this one: nothing is guessed, and nothing is thrown away."""
    folder = tmp_path / "data" / "settlements"
    stranger = SettlementSafe.open(folder, "stranger")
    await stranger.keep(
        Settlement("req_unheard_of", Event.SETTLE, Outcome.DELIVERED, Basis.USAGE, 7, images=1)
    )
    await stranger.aclose()
    async with start({"ledger": LONG}) as running:
        await eventually(lambda: "has no reservation for a settlement" in caplog.text)
        assert (await running.metrics())["gateway_settlements_waiting"] == 1
    assert [line["rid"] for line in kept(running.config)] == ["req_unheard_of"]


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
async def test_a_ledger_that_has_lost_the_reservation_takes_no_picture(
    start: Start, sandbox: SandboxServer, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A failover, or a backup that was restored: the picture is there, and what it cost is kept."""
    gate = Gate()
    sandbox.rules.add(Rule(payload_bytes=400, wait_for=gate))
    asked = {"model": MODEL, "prompt": "A x", "quality": "low", "size": "1024x1024"}
    async with start({"ledger": LONG}) as running, running.http() as http:
        call = asyncio.ensure_future(
            http.post("/images/generations", json={**asked, "stream": stream})
        )
        async with asyncio.timeout(30):
            await gate.arrived()
        with closing(sqlite3.connect(database(running.config))) as stranger, stranger:
            stranger.execute("UPDATE hold SET rid = 'gone'")
        gate.set()
        answer = await call
        assert answer.status_code == 200
        assert "b64_json" in answer.text
        assert "error" not in answer.text
        [receipt] = [one for one, _ in await running.told.until(1)]
        assert (receipt.images, receipt.outcome, receipt.posted) == (1, Outcome.DELIVERED, False)
        assert "the ledger refuses a settlement" in caplog.text
        await eventually(lambda: "has no reservation for a settlement" in caplog.text)
        assert (await running.metrics())["gateway_settlements_waiting"] == 1
        assert [line["cost"] for line in kept(running.config)] == [receipt.cost]


async def test_an_end_before_the_ledger_has_answered_forgets_nothing(
    start: Start, sandbox: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def never(*_: object) -> None:
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(SQLiteLedger, "settle", never)
    monkeypatch.setattr(gateway.app, "LAST_SECONDS", 0.05)
    sandbox.rules.add(Rule(payload_bytes=400))
    async with start({"ledger": LONG}) as running, running.sdk() as sdk:
        call = asyncio.ensure_future(sdk.images.generate(model=MODEL, prompt="A lighthouse"))
        async with asyncio.timeout(30):
            await asked.wait()
        call.cancel()
        await asyncio.wait([call])
    [line] = kept(running.config)
    assert (line["event"], line["cost"] > 0) == ("settle", True)


@pytest.mark.parametrize(("days", "waiting"), [(31, 0), (29, 1)])
async def test_a_settlement_of_a_forgotten_call_leaves_the_disk(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture, days: int, waiting: int
) -> None:
    """Its hold was closed and is older than ledger.keep: there is nothing to look at any more."""
    stranger = SettlementSafe.open(tmp_path / "data" / "settlements", "stranger")
    at = TestClock().now() - timedelta(days=days)
    old = Settlement("req_old", Event.SETTLE, Outcome.DELIVERED, Basis.USAGE, 7, at=at)
    await stranger.keep(old)
    await stranger.aclose()
    said = "has no reservation for a settlement" if waiting else "the ledger has forgotten"
    async with start({"ledger": {**LONG, "keep": "30d"}}) as running:
        await eventually(lambda: said in caplog.text)
        await eventually(lambda: len(kept(running.config)) == waiting)
        assert (await running.metrics())["gateway_settlements_waiting"] == waiting
