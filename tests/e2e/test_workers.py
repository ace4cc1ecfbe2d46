"""`gateway serve --workers N`: one socket, one set of limits, and one ending for all of them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.sandbox.journal import Journal
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from gateway.supervisor import METRICS_FOLDER, METRICS_PREFIX, _metrics_folder, _pause
from tests.e2e.test_processes import (
    BUDGET,
    LEASE_SECONDS,
    SHORT,
    Answered,
    all_ended,
    check_against,
    configured,
    database,
)
from tests.processes import Books, GatewayProcess, run, wait_until
from tests.running import KEY, MODEL, TestClock
from tests.valkey import Valkey, eventually, run_valkey


@pytest.fixture
def sandbox() -> Iterator[SandboxServer]:
    with SandboxServer(TestClock(), journal=Journal(records=100_000)) as running:
        running.rules.add(Rule(prompt="quick", payload_bytes=400))
        yield running


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with run_valkey() as server:
        yield server


def with_workers(
    folder: Path, sandbox: SandboxServer, valkey: Valkey, workers: int, **changes: Any
) -> Path:
    fixed = {"host": "127.0.0.1", "watch_seconds": 0}
    server = {**fixed, "workers": workers, **changes.pop("server", {})}
    storage = {"redis": valkey.url, **changes.pop("storage", {})}
    return configured(
        folder, sandbox, server=server, storage=storage, **{"ledger": SHORT, **changes}
    )


def children(process: GatewayProcess) -> list[int]:
    with suppress(FileNotFoundError):
        return [
            int(pid)
            for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
    return []


def lives(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def beating(config: Path) -> set[str]:
    """The workers that the ledger knows."""
    with closing(sqlite3.connect(f"{database(config).as_uri()}?mode=ro", uri=True)) as db:
        return {name for (name,) in db.execute("SELECT id FROM worker")}


def served(config: Path) -> set[str]:
    """The workers that have reserved something."""
    with closing(sqlite3.connect(f"{database(config).as_uri()}?mode=ro", uri=True)) as db:
        return {name for (name,) in db.execute("SELECT DISTINCT worker FROM hold")}


def wait_for_all(config: Path, process: GatewayProcess, workers: int) -> None:
    process.wait_ready()
    wait_until(lambda: len(beating(config)) >= workers, "every worker serves", 60)
    assert len(children(process)) == workers


def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(
        headers={"authorization": f"Bearer {KEY}"},
        timeout=60,
        limits=httpx.Limits(max_keepalive_connections=0),
        verify=False,
    )


async def test_one_of_four_is_killed_under_load(
    tmp_path: Path, sandbox: SandboxServer, valkey: Valkey
) -> None:
    """It takes its own calls with it and nothing else, and another one comes in its place."""
    config = with_workers(tmp_path, sandbox, valkey, 4)
    answered, statuses = Answered(), dict[int | None, int]()
    over = asyncio.Event()
    making = Gate()
    sandbox.rules.add(Rule(prompt="making", wait_for=making, payload_bytes=400))

    async def load(number: int, http: httpx.AsyncClient) -> None:
        sent = 0
        while not over.is_set():
            name = f"quick-{number}-{sent}"
            status = await answered.call(http, process.base_url, name, stream=sent % 4 == 3)
            statuses[status] = statuses.get(status, 0) + 1
            sent += 1

    with GatewayProcess(config) as process:
        await asyncio.to_thread(wait_for_all, config, process, 4)
        before = children(process)
        assert all(os.getpgid(pid) == pid for pid in before), "Ctrl-C would reach them twice"
        async with client() as http:
            running = [asyncio.ensure_future(load(number, http)) for number in range(6)]
            victim = before[1]
            await asyncio.to_thread(
                wait_until, lambda: len(answered.costs) > 20, "the load has begun"
            )
            os.kill(victim, signal.SIGKILL)
            await asyncio.to_thread(
                wait_until,
                lambda: len(beating(config)) == 5 and len(children(process)) == 4,
                "another one has come",
                60,
            )
            count = len(answered.costs)
            await asyncio.to_thread(
                wait_until, lambda: len(answered.costs) > count + 20, "the load goes on"
            )
            over.set()
            await asyncio.gather(*running)
            # What a dead worker has counted is still counted, and any worker tells all of it.
            # One of each of the six may have been told, and killed before it was counted; the last
            # ones are counted when they are over, which is after their clients have the answer.
            metrics: dict[str, float] = {}

            def counted() -> float:
                metrics.update(process.metrics())
                return sum(
                    value
                    for name, value in metrics.items()
                    if name.startswith("gateway_requests_total") and 'status="2xx"' in name
                )

            await asyncio.to_thread(
                wait_until, lambda: counted() >= statuses[200] - 6, "they are counted"
            )
            assert counted() <= statuses[200] + statuses.get(None, 0)
            assert metrics["gateway_workers"] == 4, "the dead one is not among them"
            assert metrics["gateway_memory_bytes"] > 4 * 20_000_000
            assert metrics["gateway_cpu_seconds_total"] > 1
            [line] = [one for one in process.log if one["event"].startswith("a worker has ended")]
            assert (line["pid"], line["code"]) == (victim, -signal.SIGKILL)
            # And then they end together, after what they have begun.
            calls = [
                asyncio.ensure_future(answered.call(http, process.base_url, f"making-{number}"))
                for number in range(12)
            ]
            async with asyncio.timeout(30):
                await making.arrived(12)
            process.terminate()
            await asyncio.to_thread(wait_until, process.drains, "nothing new is taken")
            assert process.running
            making.set()
            assert await asyncio.gather(*calls) == [200] * 12
        assert await asyncio.to_thread(process.wait) == 0
        assert "Traceback" not in process.stderr
    assert statuses.keys() <= {200, None}, statuses
    # At most what one worker had in hand.
    assert statuses.get(None, 0) <= 6
    books = Books.read(database(config))
    assert len(books.open) <= 6
    with GatewayProcess(config, "--workers", "1") as process:
        process.wait_ready()
        await asyncio.to_thread(
            wait_until, lambda: all_ended(config), "every hold ended", LEASE_SECONDS + 15
        )
    check_against(Books.read(database(config)), sandbox, answered)


async def test_limits_are_those_of_all_workers_together(
    tmp_path: Path, sandbox: SandboxServer, valkey: Valkey
) -> None:
    limit = 6
    limits = {"limits": {"images_per_minute": limit}}
    config = with_workers(tmp_path, sandbox, valkey, 3, teams={"growth": {**BUDGET, **limits}})
    answered = Answered()
    with GatewayProcess(config) as process:
        await asyncio.to_thread(wait_for_all, config, process, 3)
        async with client() as http:
            began = time.monotonic()
            statuses = await asyncio.gather(
                *(answered.call(http, process.base_url, f"quick-{n}") for n in range(60))
            )
            most = limit + int((time.monotonic() - began) * limit / 60)
        assert set(statuses) == {200, 429}
        assert limit <= statuses.count(200) <= most
        assert len(Books.read(database(config)).of("P")) == statuses.count(200)
        process.terminate()
        assert await asyncio.to_thread(process.wait) == 0


async def test_each_worker_is_asked_for_the_metrics_of_all(
    tmp_path: Path, sandbox: SandboxServer, valkey: Valkey
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = with_workers(tmp_path, sandbox, valkey, 3, server={"metrics_port": port}, ledger={})
    making, answered = Gate(), Answered()
    sandbox.rules.add(Rule(prompt="making", wait_for=making, payload_bytes=400))

    async def metrics(http: httpx.AsyncClient) -> dict[str, float]:
        text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
        samples = [line.rpartition(" ") for line in text.splitlines() if line[:1] not in ("#", "")]
        assert len({name for name, _, _ in samples}) == len(samples), "each sample once"
        assert "pid=" not in text
        return {name: float(value) for name, _, value in samples}

    with GatewayProcess(config) as process:
        await asyncio.to_thread(wait_for_all, config, process, 3)
        async with client() as http:
            calls: list[asyncio.Future[int | None]] = []
            # Which worker takes a connection is the system's choice.
            while len(calls) < 24 or (len(served(config)) < 2 and len(calls) < 96):
                call = answered.call(http, process.base_url, f"making-{len(calls)}")
                calls.append(asyncio.ensure_future(call))
                async with asyncio.timeout(30):
                    await making.arrived(len(calls))
            count = len(calls)
            assert len(served(config)) > 1, "one worker had all of them"

            async def everyone_counts() -> bool:
                told = [await metrics(http) for _ in range(6)]
                return all(
                    (one["gateway_inflight_requests"], one["gateway_ledger_open_holds"])
                    == (count, count)
                    for one in told
                )

            await eventually(everyone_counts, 30)
            making.set()
            assert await asyncio.gather(*calls) == [200] * count
            where = 'cache="off",endpoint="generation",model="gpt-image-2.5-flare"'
            name = f'gateway_requests_total{{{where},status="2xx",team="growth"}}'
            told: list[dict[str, float]] = []

            async def all_are_counted() -> bool:
                # A call is counted when it is over: its client has the answer before.
                told[:] = [await metrics(http) for _ in range(6)]
                return [one.get(name) for one in told] == [count] * 6

            await eventually(all_are_counted)
        [build] = {name for one in told for name in one if name.startswith("gateway_build_info")}
        assert [one[build] for one in told] == [1] * 6
        budget = 'gateway_budget_limit_usd{owner="growth",scope="team",window="day"}'
        assert [one[budget] for one in told] == [1000] * 6
        assert [one["gateway_settlements_waiting"] for one in told] == [0] * 6
        process.terminate()
        assert await asyncio.to_thread(process.wait) == 0


def test_workers_whose_supervisor_is_killed_end_by_themselves(
    tmp_path: Path, sandbox: SandboxServer, valkey: Valkey
) -> None:
    config = with_workers(tmp_path, sandbox, valkey, 2)
    with GatewayProcess(config) as process:
        wait_for_all(config, process, 2)
        workers = children(process)
        environment = Path(f"/proc/{workers[0]}/environ").read_bytes().decode()
        [folder] = re.findall(f"{METRICS_FOLDER}=([^\0]+)", environment)
        with GatewayProcess(config) as neighbour:
            neighbour.wait_ready()
            assert list(Path(folder).iterdir()), "what is in use is left alone"
            neighbour.terminate()
            assert neighbour.wait() == 0
        process.kill()
        wait_until(lambda: not any(lives(pid) for pid in workers), "they are gone", 15)
        assert process.refuses()
    with GatewayProcess(config) as next_one:
        next_one.wait_ready()
        assert not Path(folder).exists(), "nothing is left in the folder for temporary files"
        next_one.terminate()
        assert next_one.wait() == 0


def test_each_start_has_a_new_folder_for_its_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another start has counted is nobody's any more; what a neighbour counts is his."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f"{METRICS_PREFIX}left"
    left.mkdir()
    (left / "counter_1.db").write_bytes(bytes(100))
    with _metrics_folder() as first:
        assert not left.exists()
        (first / "counter_2.db").write_bytes(bytes(100))
        with _metrics_folder() as second:
            assert second != first
            assert list(second.iterdir()) == []
            assert [file.name for file in first.iterdir()] == ["counter_2.db"]
    assert list(tmp_path.iterdir()) == []


async def test_a_second_signal_does_not_wait(
    tmp_path: Path, sandbox: SandboxServer, valkey: Valkey
) -> None:
    config = with_workers(tmp_path, sandbox, valkey, 2)
    gate, answered = Gate(), Answered()
    sandbox.rules.add(Rule(prompt="making", wait_for=gate, payload_bytes=400))
    with GatewayProcess(config) as process:
        await asyncio.to_thread(wait_for_all, config, process, 2)
        workers = children(process)
        async with client() as http:
            calls = [
                asyncio.ensure_future(answered.call(http, process.base_url, f"making-{number}"))
                for number in range(5)
            ]
            async with asyncio.timeout(30):
                await gate.arrived(5)
            process.terminate()
            await asyncio.to_thread(wait_until, process.drains, "nothing new is taken")
            process.terminate()
            assert await asyncio.to_thread(process.wait) == 128 + signal.SIGTERM
            assert await asyncio.gather(*calls) == [None] * 5
        assert not any(lives(pid) for pid in workers)
        assert "Traceback" not in process.stderr
    gate.set()


def test_without_redis_there_is_one_process_and_it_says_why(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    config = configured(tmp_path, sandbox, server={"host": "127.0.0.1", "workers": 4})
    for arguments in ((), ("--workers", "4")):
        with GatewayProcess(config, *arguments) as process:
            process.wait_ready()
            assert children(process) == []
            assert (
                "gateway: server.workers is 4, but limits are shared only through storage.redis: "
                "running 1\ngateway: serving on "
            ) in process.stderr
            process.terminate()
            assert process.wait() == 0


def test_a_start_that_is_refused_is_refused_once(
    tmp_path: Path, sandbox: SandboxServer, valkey: Valkey
) -> None:
    config = with_workers(tmp_path, sandbox, valkey, 3, models={"mystery": {"upstream": "openai"}})
    ended = run("serve", "--config", str(config))
    assert ended.returncode == 2
    assert ended.stderr.count("mystery has no price") == 1


def test_a_worker_that_dies_at_once_three_times_ends_all(
    tmp_path: Path, sandbox: SandboxServer, valkey: Valkey
) -> None:
    config = with_workers(tmp_path, sandbox, valkey, 3)
    database(config).parent.mkdir()
    database(config).write_bytes(b"not a database, but long enough to look like one")
    ended = run("serve", "--config", str(config))
    assert ended.returncode == 1
    assert ended.stderr.count(f"{database(config)} cannot be used") == 3
    assert "a worker cannot be started: the gateway ends" in ended.stderr


def test_a_worker_that_cannot_be_started_ends_none_of_those_that_serve(
    tmp_path: Path, sandbox: SandboxServer, valkey: Valkey
) -> None:
    config = with_workers(tmp_path, sandbox, valkey, 2)
    whole = config.read_text()
    with GatewayProcess(config) as process:
        wait_for_all(config, process, 2)
        [first, second] = children(process)
        config.write_text("nonsense: 1")
        os.kill(first, signal.SIGKILL)
        wait_until(
            lambda: "it is tried again, others serve" in process.stderr, "it has died thrice", 60
        )
        assert process.is_ready()
        assert second in children(process)
        known = len(beating(config))
        config.write_text(whole)
        wait_until(lambda: len(beating(config)) > known, "another one serves", 60)
        assert len(children(process)) == 2
        process.terminate()
        assert process.wait() == 0


def test_pauses_between_starts_have_an_end() -> None:
    pauses = [_pause(deaths) for deaths in (0, 1, 2, 3, 7, 8, 5000)]
    assert pauses == [0, 0.5, 1, 2, 30, 30, 30]


def test_a_worker_that_is_told_to_end_is_replaced(
    tmp_path: Path, sandbox: SandboxServer, valkey: Valkey
) -> None:
    config = with_workers(tmp_path, sandbox, valkey, 2)
    with ExitStack() as stack:
        process = stack.enter_context(GatewayProcess(config))
        wait_for_all(config, process, 2)
        [first, second] = children(process)
        os.kill(first, signal.SIGTERM)
        wait_until(
            lambda: len(children(process)) == 2 and first not in children(process),
            "another one has come",
            60,
        )
        assert second in children(process)
        assert process.is_ready()
        process.terminate()
        assert process.wait() == 0
        assert MODEL not in process.stderr
