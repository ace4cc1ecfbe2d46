"""The end of a replica while others go on: nobody who uses an SDK sees it (reliability.md row 75,
T10)."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI

from gateway.sandbox.journal import Journal
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from tests.balancer import Balancer
from tests.postgres import Postgres
from tests.processes import wait_until
from tests.replicas import GENERATIONS, Replicas, asked, replicas, sdk_of, watchers
from tests.running import TestClock
from tests.valkey import Valkey, eventually, run_valkey

LOOK_SECONDS = 0.5


@pytest.fixture
def sandbox() -> Iterator[SandboxServer]:
    with SandboxServer(TestClock(), journal=Journal(records=100_000)) as running:
        yield running


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with run_valkey() as server:
        yield server


@asynccontextmanager
async def watching(all_of_them: Replicas) -> AsyncIterator[Balancer]:
    """A balancer as it is in life: it looks at ``/readyz`` twice a second, and gives nobody to a
    replica that was not ready when it looked. What it gave before it looked is not its business."""
    ready = {one.port: one.port for one in all_of_them.all}

    async def look(http: httpx.AsyncClient) -> None:
        while True:
            for one in all_of_them.all:
                with suppress(LookupError):
                    port = one.port
                    try:
                        status = (await http.get(f"http://127.0.0.1:{port}/readyz")).status_code
                    except httpx.TransportError:
                        status = 0
                    if status == 200:
                        ready[port] = port
                    else:
                        ready.pop(port, None)
            for port in ready.keys() - ports_of(all_of_them):
                ready.pop(port)
            await asyncio.sleep(LOOK_SECONDS)

    async with (
        httpx.AsyncClient(verify=False, timeout=5) as http,
        Balancer(lambda: list(ready)) as balancer,
    ):
        looking = asyncio.create_task(look(http))
        try:
            yield balancer
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)


async def used(balancer: Balancer, port: int) -> None:
    await eventually(lambda: port in balancer.went, 30)


def ports_of(them: Replicas) -> set[int]:
    ports = set()
    for one in them.all:
        with suppress(LookupError):
            ports.add(one.port)
    return ports


async def picture(sdk: AsyncOpenAI, name: str, *, stream: bool) -> str:
    """One call; its picture."""
    if stream:
        events = [
            event
            async for event in await sdk.images.generate(
                **asked(name), stream=True, partial_images=1
            )
        ]
        assert events[-1].type == "image_generation.completed"
        return str(events[-1].b64_json)
    data = (await sdk.images.generate(**asked(name))).data
    assert data
    return data[0].b64_json or ""


async def test_500_in_flight_end_here_while_what_is_new_goes_elsewhere(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey
) -> None:
    count, new, gate = 500, 60, Gate()
    sandbox.rules.add(Rule(prompt="new", payload_bytes=400))
    sandbox.rules.add(Rule(wait_for=gate, payload_bytes=400))
    async with (
        replicas(tmp_path, sandbox, postgres, valkey) as both,
        # It never looks, so it gives every other call to the one that ends.
        both.balancer() as balancer,
        sdk_of(both.all[0].base_url, timeout=100, max_retries=0) as here,
        sdk_of(balancer.base_url, timeout=60, max_retries=5) as anywhere,
    ):
        running = [
            asyncio.ensure_future(picture(here, f"running {number}", stream=number % 5 == 4))
            for number in range(count)
        ]
        async with asyncio.timeout(60):
            await gate.arrived(count)
        leaving = both.all[0]
        leaving.terminate()
        await asyncio.to_thread(wait_until, leaving.drains, "it says that it drains")
        fresh = await asyncio.gather(
            *(picture(anywhere, f"new {number}", stream=number % 5 == 4) for number in range(new))
        )
        assert len(set(fresh)) == new
        assert leaving.port in balancer.went
        assert leaving.running
        began = time.monotonic()
        gate.set()
        pictures = await asyncio.gather(*running)
        assert len(set(pictures)) == count
        assert await asyncio.to_thread(leaving.wait) == 0
        print(f"\n{count} answered and gone {time.monotonic() - began:.1f} s after the pictures")
        await both.check(count + new)
        assert {hold.state for hold in both.holds()} == {"P"}


async def test_a_rolling_restart_is_seen_by_nobody(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey
) -> None:
    clients, over = 20, asyncio.Event()
    sandbox.rules.add(Rule(delay_seconds=0.4, payload_bytes=4000))
    pictures: list[str] = []
    slowest = 0.0
    async with (
        replicas(tmp_path, sandbox, postgres, valkey, 3) as three,
        watching(three) as balancer,
        # As they come: two retries.
        sdk_of(balancer.base_url, timeout=60) as staying,
        sdk_of(balancer.base_url, timeout=60, keep_alive=False) as moving,
    ):

        async def use(number: int) -> None:
            nonlocal slowest
            sent, sdk = 0, (staying, moving)[number % 2]
            while not over.is_set():
                began = time.monotonic()
                name = f"rolling {number} {sent}"
                pictures.append(await picture(sdk, name, stream=sent % 4 == 3))
                slowest = max(slowest, time.monotonic() - began)
                sent += 1

        using = [asyncio.ensure_future(use(number)) for number in range(clients)]

        async def more(count: int) -> None:
            until = len(pictures) + count
            await eventually(lambda: len(pictures) >= until, 30)

        for place, process in enumerate(list(three.all)):
            await more(clients)
            process.terminate()
            assert await asyncio.to_thread(process.wait) == 0
            assert "Traceback" not in process.stderr
            await three.start(place)
            await used(balancer, three.all[place].port)
        over.set()
        await asyncio.gather(*using)
        print(f"\n{len(pictures)} pictures through three restarts, the slowest {slowest:.1f} s")
        assert len(set(pictures)) == len(pictures)
        await three.check(len(pictures))
        states = Counter(hold.state for hold in three.holds())
        assert states["H"] == states["X"] == 0


async def test_what_nobody_waits_for_is_finished_and_had_from_another_replica(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey
) -> None:
    gate = Gate()
    sandbox.rules.add(Rule(wait_for=gate, payload_bytes=4000))
    async with (
        replicas(tmp_path, sandbox, postgres, valkey) as both,
        both.http(0) as leaving,
        both.http(1) as other,
    ):
        for name, stream in (("orphan json", False), ("orphan stream", True)):
            call = asyncio.ensure_future(leaving.post(GENERATIONS, json=asked(name, stream=stream)))
            async with asyncio.timeout(30):
                await gate.arrived(1 + stream)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        rids = [hold.rid for hold in both.holds()]
        process = both.all[0]
        process.terminate()
        await asyncio.to_thread(wait_until, process.drains, "it says that it drains")
        # Who comes back meanwhile is led to its flight, at either of them.
        here = asyncio.ensure_future(leaving.post(GENERATIONS, json=asked("orphan json")))
        await asyncio.gather(here, return_exceptions=True)
        assert here.result().status_code == 503
        there = asyncio.ensure_future(other.post(GENERATIONS, json=asked("orphan json")))
        await eventually(lambda: sum(watchers(valkey, rid) for rid in rids) == 1)
        assert process.running
        gate.set()
        assert await asyncio.to_thread(process.wait) == 0
        joined = await there
        assert (joined.status_code, joined.headers["x-cache"]) == (200, "join")
        kept = [await other.get(f"/images/results/{rid}") for rid in rids]
        assert [answer.status_code for answer in kept] == [200, 200]
        assert kept[0].content == joined.content
        await both.check(2)


async def test_a_second_sigterm_leaves_the_holds_to_the_others(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey
) -> None:
    gate = Gate()
    sandbox.rules.add(Rule(wait_for=gate, payload_bytes=4000))
    ledger = {"lease_seconds": 2, "sweep_seconds": 0.5}
    async with (
        replicas(tmp_path, sandbox, postgres, valkey, ledger=ledger) as both,
        both.http(0) as leaving,
        both.http(1) as other,
    ):
        calls = [
            asyncio.ensure_future(leaving.post(GENERATIONS, json=asked(f"twice {number}")))
            for number in range(5)
        ]
        async with asyncio.timeout(30):
            await gate.arrived(5)
        process = both.all[0]
        process.terminate()
        await asyncio.to_thread(wait_until, process.drains, "it says that it drains")
        process.terminate()
        assert await asyncio.to_thread(process.wait) == 128 + signal.SIGTERM
        for call in calls:
            with pytest.raises(httpx.TransportError):
                await call
        holds = await both.settled()
        assert [hold.state for hold in holds] == ["X"] * 5
        assert all(hold.cost == hold.bound for hold in holds)
        await asyncio.to_thread(both.verify)
        gone = await other.get(f"/images/results/{holds[0].rid}", headers={"prefer": "wait=30"})
        assert gone.status_code == 502
        assert gone.json()["error"]["code"] == "upstream_outcome_unknown"
        gate.set()
