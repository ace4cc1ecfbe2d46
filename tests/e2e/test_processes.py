"""Real processes that are told to end, and processes that are not asked.

What must hold (money.md 1, 6a): an acknowledged charge is never lost and never doubled, every hold
ends within its lease and a sweep, and the ledger is never under the upstream's own bill.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sqlite3
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, InternalServerError

from gateway.sandbox.journal import Journal
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from tests.processes import Books, GatewayProcess, bill, run, wait_until
from tests.running import KEY, MODEL, TestClock, config_of

LEASE_SECONDS = 1.0
SWEEP_SECONDS = 0.2
PAYLOAD = Rule(payload_bytes=400)
BUDGET = {"budget": {"day": 1000, "month": 10_000}}
SHORT = {"lease_seconds": LEASE_SECONDS, "sweep_seconds": SWEEP_SECONDS}
LONG_LEASE_SECONDS = 600.0
LONG = {"lease_seconds": LONG_LEASE_SECONDS, "sweep_seconds": SWEEP_SECONDS}
"""No lease ends before ``end_leases``, however busy the machine is."""


@pytest.fixture
def sandbox() -> Iterator[SandboxServer]:
    """The upstream, in this process: it outlives every gateway, and keeps its own books."""
    with SandboxServer(TestClock(), journal=Journal(records=100_000)) as running:
        yield running


def configured(
    folder: Path, sandbox: SandboxServer, ledger: Mapping[str, Any] = SHORT, **changes: Any
) -> Path:
    return config_of(
        folder,
        sandbox.base_url,
        {
            "server": {"host": "127.0.0.1", "watch_seconds": 0},
            "ledger": dict(ledger),
            "cache": {"enabled": False},
            "teams": {"growth": BUDGET},
            **changes,
        },
    )


def database(config: Path) -> Path:
    return config.parent / "data" / "gateway.db"


@dataclass
class Answered:
    """What clients were told: the name of each call that was answered whole, and its cost."""

    costs: dict[str, int] = field(default_factory=dict)
    broken: int = 0

    async def call(
        self, http: httpx.AsyncClient, url: str, name: str, *, stream: bool = False
    ) -> int | None:
        """One call. Its name is its prompt and its idempotency key, so that both books know it."""
        body: dict[str, object] = {
            "model": MODEL,
            "prompt": name,
            "quality": "low",
            "size": "1024x1024",
            "stream": stream,
            "partial_images": int(stream),
        }
        try:
            answer = await http.post(
                f"{url}/images/generations", json=body, headers={"idempotency-key": name}
            )
        except httpx.TransportError:
            self.broken += 1
            return None
        if answer.status_code == 200 and not stream:
            assert answer.headers["x-cost-basis"] == "usage"
            assert answer.json()["data"][0]["b64_json"]
            assert name not in self.costs
            self.costs[name] = round(float(answer.headers["x-cost-usd"]) * 10**9)
        elif answer.status_code == 200 and ".completed" in answer.text:
            assert name not in self.costs
            last = answer.text.rstrip().rpartition("data: ")[2]
            usage = json.loads(last)["usage"]
            given = usage["input_tokens_details"]
            assert given["image_tokens"] == 0
            self.costs[name] = 5_000 * given["text_tokens"] + 30_000 * usage["output_tokens"]
        return answer.status_code


def check_against(books: Books, sandbox: SandboxServer, answered: Answered) -> None:
    """Nothing acknowledged is lost or doubled, and for no call is the ledger under the bill."""
    books.check()
    assert books.open == []
    assert books.pending == 0
    named = {hold.idempotency_key: hold for hold in books.holds.values()}
    assert len(named) == len(books.holds)
    for name, cost in answered.costs.items():
        assert (named[name].state, named[name].cost) == ("P", cost), name
    billed: dict[str, int] = {}
    for record in sandbox.journal.billed:
        name = str(record.fields["prompt"])
        assert name not in billed, "one call, bought twice"
        billed[name] = bill(record)
    assert [name for name, cost in billed.items() if named[name].cost < cost] == []
    assert answered.costs.keys() <= billed.keys()
    for hold in books.holds.values():
        # A process that died knows nothing: it is the bound, never 0.
        assert hold.state in ("P", "X")
        assert hold.state == "P" or hold.cost == hold.bound > 0


def all_ended(config: Path) -> bool:
    return not Books.read(database(config)).open


def end_leases(config: Path) -> None:
    """Of what is open, each of which has the lease of ``LONG``."""
    with closing(sqlite3.connect(database(config), timeout=30)) as db:
        leases = db.execute("SELECT (lease_ends - at) / 1e6 FROM hold WHERE state = 'H'").fetchall()
        for (seconds,) in leases:
            # A hold waits for its turn between the two.
            assert seconds == pytest.approx(LONG_LEASE_SECONDS, abs=30)
        db.execute("UPDATE hold SET lease_ends = at WHERE state = 'H'")
        db.commit()


async def test_a_killed_process_loses_no_charge_and_leaves_no_hold(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    """3 calls answered, 12 with the upstream, 8 whose settlement waits for a locked database."""
    config = configured(tmp_path, sandbox, LONG)
    answered, making, settling = Answered(), Gate(), Gate()
    sandbox.rules.add(Rule(prompt="making", wait_for=making, payload_bytes=400))
    sandbox.rules.add(Rule(prompt="settling", wait_for=settling, payload_bytes=400))
    sandbox.rules.add(PAYLOAD)
    with GatewayProcess(config) as first:
        first.wait_ready()
        async with httpx.AsyncClient(
            headers={"authorization": f"Bearer {KEY}"}, timeout=60, verify=False
        ) as http:
            for number in range(3):
                assert await answered.call(http, first.base_url, f"whole-{number}") == 200
            names = [f"making-{number}" for number in range(12)]
            names += [f"settling-{number}" for number in range(8)]
            calls = [
                asyncio.ensure_future(
                    answered.call(http, first.base_url, name, stream=bool(place % 3 == 2))
                )
                for place, name in enumerate(names)
            ]
            async with asyncio.timeout(30):
                await making.arrived(12)
                await settling.arrived(8)
            before = Books.read(database(config))
            before.check()
            assert len(before.open) == 20
            with closing(sqlite3.connect(database(config), isolation_level=None)) as stranger:
                stranger.execute("BEGIN IMMEDIATE")
                settling.set()
                async with asyncio.timeout(30):
                    await sandbox.journal.until(
                        lambda: sum(record.status == 200 for record in sandbox.journal) == 11
                    )
                first.kill()
                stranger.execute("ROLLBACK")
            assert await asyncio.gather(*calls) == [None] * 20
            assert answered.broken == 20
    making.set()
    with GatewayProcess(config) as second:
        second.wait_ready()
        after = Books.read(database(config))
        after.check()
        assert len(after.open) == 20, "nothing ends before its lease"
        end_leases(config)
        wait_until(lambda: all_ended(config), "every hold ended")
        books = Books.read(database(config))
        assert len(books.of("X")) == 20
        assert len(books.of("P")) == 3
        check_against(books, sandbox, answered)
        said = run("usage", "--config", str(config), "--json")
        assert said.returncode == 0, said.stderr
        total = json.loads(said.stdout)["total"]
        assert (total["requests"], total["unresolved"]) == (23, 20)
        assert round(float(total["cost_usd"]) * 10**9) == books.spent
        unresolved = sum(hold.bound for hold in books.of("X"))
        assert round(float(total["unresolved_usd"]) * 10**9) == unresolved
        metrics = second.metrics()
        assert metrics["gateway_ledger_open_holds"] == 0
        assert round(metrics["gateway_ledger_unresolved_usd"] * 10**9) == unresolved
        expiries = [line for line in second.log if "a hold expired" in line["event"]]
        assert {line["request_id"] for line in expiries} == {hold.rid for hold in books.of("X")}
        second.terminate()
        assert second.wait() == 0


async def test_a_sweep_by_a_neighbour_ends_the_holds_of_the_dead(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    """Two processes, one database: the one that lives ends what the other one left."""
    config = configured(tmp_path, sandbox)
    making, answered = Gate(), Answered()
    sandbox.rules.add(Rule(prompt="making", wait_for=making, payload_bytes=400))
    sandbox.rules.add(PAYLOAD)
    with GatewayProcess(config) as one, GatewayProcess(config) as other:
        one.wait_ready()
        other.wait_ready()
        async with httpx.AsyncClient(
            headers={"authorization": f"Bearer {KEY}"}, timeout=60, verify=False
        ) as http:
            call = asyncio.ensure_future(answered.call(http, one.base_url, "making"))
            async with asyncio.timeout(30):
                await making.arrived()
            one.kill()
            assert await call is None
            assert await answered.call(http, other.base_url, "whole") == 200
            await asyncio.to_thread(wait_until, lambda: all_ended(config), "the hold ended")
            with closing(sqlite3.connect(database(config))) as db:
                expiries = db.execute(
                    "SELECT journal.at, lease_ends FROM journal JOIN hold USING (rid)"
                    " WHERE kind = 'X'"
                ).fetchall()
            assert expiries
            assert all(at >= lease_ends for at, lease_ends in expiries), "not before its lease"
            making.set()
            async with asyncio.timeout(30):
                await sandbox.journal.until(lambda: sandbox.journal.billed_requests == 2)
        check_against(Books.read(database(config)), sandbox, answered)


async def test_a_storm_with_kills_at_random_moments(
    tmp_path: Path, sandbox: SandboxServer, record_property: Any
) -> None:
    """Two processes under load; one of them is killed, again and again, and another one starts."""
    kills, clients, seed = 10, 4, 20261122
    dice = random.Random(seed)
    config = configured(tmp_path, sandbox)
    sandbox.rules.add(PAYLOAD)
    answered, statuses = Answered(), dict[int | None, int]()
    over = asyncio.Event()
    running = [GatewayProcess(config), GatewayProcess(config)]
    everyone = list(running)

    async def client(number: int, http: httpx.AsyncClient) -> None:
        sent = 0
        while not over.is_set():
            process = running[(number + sent) % len(running)]
            status = await answered.call(
                http, process.base_url, f"storm-{number}-{sent}", stream=sent % 4 == 3
            )
            statuses[status] = statuses.get(status, 0) + 1
            sent += 1
            if status is None:
                await asyncio.sleep(0.02)  # refused: its process is gone, and soon replaced

    try:
        for process in running:
            process.wait_ready()
        async with httpx.AsyncClient(
            headers={"authorization": f"Bearer {KEY}"}, timeout=60, verify=False
        ) as http:
            working = [asyncio.ensure_future(client(number, http)) for number in range(clients)]
            for _ in range(kills):
                fresh = GatewayProcess(config)
                everyone.append(fresh)
                await asyncio.to_thread(fresh.wait_ready)
                await asyncio.sleep(dice.uniform(0, 0.2))
                victim = dice.randrange(len(running))
                dead, running[victim] = running[victim], fresh
                dead.kill()
            over.set()
            await asyncio.gather(*working)
        await asyncio.to_thread(
            wait_until, lambda: all_ended(config), "every hold ended", LEASE_SECONDS + 15
        )
        books = Books.read(database(config))
        check_against(books, sandbox, answered)
        assert list((tmp_path / "data" / "blobs" / "spool").iterdir()) == []
        for process in running:
            process.terminate()
        assert [process.wait() for process in running] == [0, 0]
        for process in everyone:
            assert [line for line in process.log if line["level"] == "error"] == []
    finally:
        for process in everyone:
            process.__exit__(None, None, None)
    assert statuses.keys() <= {200, None}, statuses
    # The storm was one: many calls were answered, and some were lost to a kill.
    assert len(answered.costs) > 50
    assert answered.broken > 0
    for what, count in {
        "kills": kills,
        "answered": len(answered.costs),
        "broken": answered.broken,
        "expired": len(books.of("X")),
        "booked unheard": len(books.of("P")) - len(answered.costs),
    }.items():
        record_property(what, count)
        print(what, count)


async def test_sigterm_answers_what_is_running_and_ends_with_0(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    config = configured(tmp_path, sandbox, {})
    gate, answered = Gate(), Answered()
    sandbox.rules.add(Rule(wait_for=gate, payload_bytes=400))
    with GatewayProcess(config) as process:
        process.wait_ready()
        async with httpx.AsyncClient(
            headers={"authorization": f"Bearer {KEY}"},
            timeout=60,
            limits=httpx.Limits(),
            verify=False,
        ) as http:
            calls = [
                asyncio.ensure_future(
                    answered.call(http, process.base_url, f"call-{number}", stream=number % 5 == 4)
                )
                for number in range(50)
            ]
            async with asyncio.timeout(30):
                await gate.arrived(50)
            process.terminate()
            await asyncio.to_thread(wait_until, process.drains, "nothing new is taken")
            assert process.running
            gate.set()
            assert await asyncio.gather(*calls) == [200] * 50
        assert await asyncio.to_thread(process.wait) == 0
        assert "Traceback" not in process.stderr
    books = Books.read(database(config))
    assert len(books.of("P")) == 50
    check_against(books, sandbox, answered)


async def test_started_as_a_person_would_it_leaves_nothing_running(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    """Not forked, as the others are: with the interpreter's own beginning and end."""
    config = configured(tmp_path, sandbox, {})
    sandbox.rules.add(Rule(payload_bytes=400))
    answered = Answered()
    # In a session of its own, so that whoever is left can be found.
    with GatewayProcess(config, before=os.setsid) as process:
        process.wait_ready()
        async with httpx.AsyncClient(
            headers={"authorization": f"Bearer {KEY}"}, timeout=60, verify=False
        ) as http:
            assert await answered.call(http, process.base_url, "call", stream=False) == 200
        os.killpg(process.pid, 0)
        process.terminate()
        assert await asyncio.to_thread(process.wait) == 0
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
        assert "Traceback" not in process.stderr
    books = Books.read(database(config))
    assert len(books.of("P")) == 1
    check_against(books, sandbox, answered)


async def test_sigterm_waits_for_calls_whose_client_has_left(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    config = configured(tmp_path, sandbox, {})
    gate = Gate()
    sandbox.rules.add(Rule(wait_for=gate, payload_bytes=400))
    with GatewayProcess(config) as process:
        process.wait_ready()
        async with httpx.AsyncClient(
            headers={"authorization": f"Bearer {KEY}"}, verify=False
        ) as http:
            call = asyncio.ensure_future(Answered().call(http, process.base_url, "left"))
            async with asyncio.timeout(30):
                await gate.arrived()
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        process.terminate()
        await asyncio.to_thread(wait_until, process.drains, "nothing new is taken")
        assert process.running
        gate.set()
        assert await asyncio.to_thread(process.wait) == 0
    books = Books.read(database(config))
    check_against(books, sandbox, Answered())
    assert len(books.of("P")) == 1


async def test_a_second_sigterm_does_not_wait(tmp_path: Path, sandbox: SandboxServer) -> None:
    config = configured(tmp_path, sandbox)
    gate, answered = Gate(), Answered()
    sandbox.rules.add(Rule(wait_for=gate, payload_bytes=400))
    with GatewayProcess(config) as process:
        process.wait_ready()
        async with httpx.AsyncClient(
            headers={"authorization": f"Bearer {KEY}"}, timeout=60, verify=False
        ) as http:
            calls = [
                asyncio.ensure_future(answered.call(http, process.base_url, f"call-{number}"))
                for number in range(5)
            ]
            async with asyncio.timeout(30):
                await gate.arrived(5)
            process.terminate()
            await asyncio.to_thread(wait_until, process.drains, "nothing new is taken")
            process.terminate()
            assert await asyncio.to_thread(process.wait) != 0
            assert await asyncio.gather(*calls) == [None] * 5
        assert "Traceback" not in process.stderr
    gate.set()
    with GatewayProcess(config) as process:
        process.wait_ready()
        wait_until(lambda: all_ended(config), "every hold ended", LEASE_SECONDS + 10)
    books = Books.read(database(config))
    check_against(books, sandbox, answered)
    assert len(books.of("X")) == 5


async def test_a_drain_that_takes_too_long_ends_and_no_client_buys_again(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    """After drain_seconds the calls are given up: a clear error, and later their bound."""
    config = configured(tmp_path, sandbox, server={"host": "127.0.0.1", "drain_seconds": 0.5})
    gate = Gate()
    sandbox.rules.add(Rule(wait_for=gate, payload_bytes=400))
    with GatewayProcess(config) as process:
        process.wait_ready()
        async with AsyncOpenAI(base_url=process.base_url, api_key=KEY, max_retries=2) as sdk:
            call = asyncio.ensure_future(
                sdk.images.generate(
                    model=MODEL, prompt="held", extra_headers={"idempotency-key": "held"}
                )
            )
            async with asyncio.timeout(30):
                await gate.arrived()
            process.terminate()
            with pytest.raises(InternalServerError) as raised:
                await call
        assert raised.value.status_code == 503
        assert raised.value.response.headers["x-should-retry"] == "false"
        assert raised.value.response.headers["x-request-id"] in raised.value.message
        assert await asyncio.to_thread(process.wait) == 0
        assert "Traceback" not in process.stderr
    gate.set()
    with GatewayProcess(config) as process:
        process.wait_ready()
        wait_until(lambda: all_ended(config), "every hold ended", LEASE_SECONDS + 10)
    books = Books.read(database(config))
    check_against(books, sandbox, Answered())
    [hold] = books.of("X")
    assert hold.rid == raised.value.response.headers["x-request-id"]


BROKEN_FILES = {
    "server:\n  port: 0\n   host: [\n": ":3:",
    "server:\n  port: 0\n  port: 1\n": ":3:",
    "server: {port: 0}\nteamz: {}\n": ":2:1: teamz",
    "server:\n  port: many\n": ":2:",
}


def test_a_broken_file_is_refused_with_its_line(tmp_path: Path) -> None:
    def refused(number: int, text: str) -> tuple[int, str]:
        config = tmp_path / f"{number}.yaml"
        config.write_text(text)
        ended = run("serve", "--config", str(config))
        [line] = ended.stderr.splitlines()
        return ended.returncode, line

    with ThreadPoolExecutor(4) as at_once:
        ended = list(at_once.map(refused, range(4), BROKEN_FILES))
    for number, (place, (code, line)) in enumerate(zip(BROKEN_FILES.values(), ended, strict=True)):
        assert code == 2
        assert line.startswith(f"{tmp_path}/{number}.yaml{place}"), line


def refusal(config: Path, *arguments: str) -> str:
    """The only line, beside warnings, of a start that is refused with 1."""
    ended = run("serve", "--config", str(config), *arguments)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    [line] = [line for line in ended.stderr.splitlines() if not line.startswith("warning: ")]
    return line


def test_a_start_is_refused_in_one_line(tmp_path: Path, sandbox: SandboxServer) -> None:
    """Root may write everywhere, so a file stands in for a folder that cannot be written."""
    healthy = configured(tmp_path, sandbox)
    with GatewayProcess(healthy) as process:
        process.wait_ready()
        process.terminate()
        assert process.wait() == 0
    whole = database(healthy).read_bytes()
    damaged = {
        "text.db": b"no database at all\n" * 400,
        "cut.db": whole[: len(whole) // 2],
        "empty.db": b"",
    }

    def refused(name: str, storage: Mapping[str, str], *arguments: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "file").write_text("in the way")
        if name in damaged:
            (folder / name).write_bytes(damaged[name])
        return refusal(configured(folder, sandbox, storage=storage), *arguments)

    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        ThreadPoolExecutor(3) as at_once,
    ):
        port = taken.getsockname()[1]
        bad = {
            name: at_once.submit(refused, name, {"database": f"sqlite:///{name}"})
            for name in damaged
        }
        no_folder = at_once.submit(refused, "folder", {"database": "sqlite:///file/gateway.db"})
        no_blobs = at_once.submit(refused, "blobs", {"blobs": "file"})
        no_port = at_once.submit(refused, "port", {}, "--port", str(port))
    for name, said in bad.items():
        path = tmp_path / name / name
        assert said.result().startswith(f"{path} cannot be used (")
        assert "restore it from a backup" in said.result()
        assert path.read_bytes() == damaged[name], "nothing is made anew"
    assert f"{tmp_path}/folder/file/gateway.db cannot be opened" in no_folder.result()
    assert no_blobs.result().startswith(f"storage.blobs {tmp_path}/blobs/file cannot be written")
    assert f"port {port} of 127.0.0.1 is taken" in no_port.result()
