"""150 pictures of 2 MB (500 in a soak) in flight while Redis is killed, and while it stands still:
each arrives as it was made, and the money is exact (reliability.md 4.3)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from gateway.sandbox.journal import Journal
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from tests.e2e.test_processes import configured, database
from tests.processes import Books, GatewayProcess, bill, wait_until
from tests.replicas import GENERATIONS, asked
from tests.running import KEY, TestClock
from tests.sizes import size
from tests.valkey import Valkey, run_valkey

IN_FLIGHT = size(150, 500)
PICTURE_BYTES = 2 * 1024 * 1024
BUFFER_BYTES = 64 * 1024 * 1024
AWAY_SECONDS = size(4.0, 10.0)
MIB = 1024 * 1024


@pytest.fixture
def sandbox() -> Iterator[SandboxServer]:
    with SandboxServer(TestClock(), journal=Journal(records=100_000)) as running:
        yield running


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with run_valkey() as server:
        yield server


def rss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def peak_bytes(pid: int) -> int:
    """The most that it ever had in memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


Noticed = Callable[[], Awaitable[object]]
"""Waits until the gateway has noticed that Redis is away: a busy one may not ask it for seconds."""


async def kill(valkey: Valkey, noticed: Noticed) -> None:
    await asyncio.to_thread(valkey.kill)
    await asyncio.sleep(AWAY_SECONDS / 2)
    await noticed()
    await asyncio.to_thread(valkey.restart)


async def freeze(valkey: Valkey, noticed: Noticed) -> None:
    valkey.freeze()
    await asyncio.sleep(AWAY_SECONDS)
    await noticed()
    valkey.thaw()


def errors_of_redis(process: GatewayProcess) -> float:
    names = ("gateway_gate_errors_total", "gateway_flight_board_errors", "gateway_results_errors")
    return sum(value for name, value in process.metrics().items() if name.startswith(names))


class Taken:
    """What one client got, without keeping it."""

    def __init__(self) -> None:
        self.pictures: set[str] = set()
        self.costs: list[int] = []
        self.seconds: list[float] = []

    async def one(self, http: httpx.AsyncClient, name: str, opened: Callable[[], float]) -> None:
        async with http.stream("POST", GENERATIONS, json=asked(name)) as answer:
            assert answer.status_code == 200, await answer.aread()
            body = b"".join([chunk async for chunk in answer.aiter_raw()])
        self.seconds.append(time.monotonic() - opened())
        assert len(body) == int(answer.headers["content-length"])
        picture = json.loads(body)["data"][0]["b64_json"]
        assert len(picture) == PICTURE_BYTES
        # As the sandbox makes it: a start with a number of its own, and the rest is filled up.
        assert picture.rstrip("A") + "A" * (PICTURE_BYTES - len(picture.rstrip("A"))) == picture
        self.pictures.add(hashlib.sha256(picture.encode()).hexdigest())
        assert answer.headers["x-cost-basis"] == "usage"
        self.costs.append(round(float(answer.headers["x-cost-usd"]) * 10**9))


@pytest.mark.parametrize("fault", [kill, freeze], ids=lambda fault: fault.__name__)
async def test_every_picture_arrives_as_it_was_made(
    tmp_path: Path,
    sandbox: SandboxServer,
    valkey: Valkey,
    fault: Callable[[Valkey, Noticed], Awaitable[None]],
) -> None:
    gate, taken = Gate(), Taken()
    sandbox.rules.add(Rule(wait_for=gate, payload_bytes=PICTURE_BYTES))
    config = configured(
        tmp_path,
        sandbox,
        {},
        server={"host": "127.0.0.1", "watch_seconds": 0, "buffer_bytes": BUFFER_BYTES},
        storage={"redis": valkey.url},
    )
    limits = httpx.Limits(max_connections=IN_FLIGHT)
    with GatewayProcess(config) as process:
        await asyncio.to_thread(process.wait_ready)
        idle = rss_bytes(process.pid)
        async with httpx.AsyncClient(
            base_url=process.base_url, headers={"authorization": f"Bearer {KEY}"}, timeout=100,
            verify=False, limits=limits,
        ) as http:  # fmt: skip
            opened = [0.0]
            calls = [
                asyncio.ensure_future(taken.one(http, f"big {number}", lambda: opened[0]))
                for number in range(IN_FLIGHT)
            ]
            async with asyncio.timeout(60):
                await gate.arrived(IN_FLIGHT)
            opened[0] = time.monotonic()
            gate.set()
            # In the middle of it: some are answered, most are under way.
            await asyncio.to_thread(
                wait_until, lambda: len(taken.pictures) >= IN_FLIGHT // 20, "some have come", 60
            )
            before = len(taken.pictures)
            await fault(
                valkey,
                lambda: asyncio.to_thread(
                    wait_until, lambda: errors_of_redis(process) > 0, "it is noticed", 60
                ),
            )
            after = len(taken.pictures)
            await asyncio.gather(*calls)
        peak = peak_bytes(process.pid)
        taken.seconds.sort()
        print(
            f"\n{fault.__name__}: {before} had come before, {after} when Redis was back; "
            f"the median after {taken.seconds[IN_FLIGHT // 2]:.1f} s, "
            f"the last after {taken.seconds[-1]:.1f} s; "
            f"{idle // MIB} MiB idle, {peak // MIB} MiB at the most"
        )
        assert before < IN_FLIGHT, "all of it was over before anything went wrong"
        assert len(taken.pictures) == IN_FLIGHT
        # In flight are 300 MiB, or 1 GiB. Beside what is allowed each connection has its buffers.
        assert peak - idle < BUFFER_BYTES + IN_FLIGHT * MIB // 2
        process.terminate()
        assert await asyncio.to_thread(process.wait) == 0
        assert "Traceback" not in process.stderr
    books = Books.read(database(config))
    books.check()
    assert books.open == []
    assert len(books.of("P")) == IN_FLIGHT
    billed = sorted(bill(record) for record in sandbox.journal.billed)
    assert sorted(hold.cost for hold in books.of("P")) == billed == sorted(taken.costs)
