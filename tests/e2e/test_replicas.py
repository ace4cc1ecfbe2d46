"""Several replicas: a picture that was paid for is reached from each of them, and bought once.

Real `gateway serve` processes on one PostgreSQL and one Valkey, and a balancer in front of them
that gives the retry of an SDK to another replica than its first try (money.md 8.3, 8.4;
reliability.md row 92 and T14).
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from gateway.sandbox.journal import Journal
from gateway.sandbox.rules import Drip, Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from tests.e2e.test_edits import png
from tests.e2e.test_node import NODE, SCRIPTS, TOOLS
from tests.postgres import Postgres
from tests.processes import bill
from tests.replicas import GENERATIONS, asked, replicas, sdk_of, watchers
from tests.running import KEY, MODEL, OTHER_KEY, TestClock
from tests.sizes import size
from tests.valkey import Valkey, eventually, run_valkey

PATIENCE_SECONDS = 1.5
PICTURE_SECONDS = 5.0
RUNS_OF_NODE = size(9, 30)
LEASE_SECONDS = 15.0
"""Of the board: a process that is silent for so long is dead to the others."""
RETRY = {"x-stainless-retry-count": "1"}


@pytest.fixture
def sandbox() -> Iterator[SandboxServer]:
    with SandboxServer(TestClock(), journal=Journal(records=100_000)) as running:
        yield running


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with run_valkey() as server:
        yield server


async def ask(sdk: AsyncOpenAI, number: int) -> tuple[str, str]:
    """One call in one of the three forms: its ``x-cache``, and its picture."""
    form = ("json", "edit", "stream")[number % 3]
    prompt = f"picture {form} {number}"
    if form == "stream":
        streamed = await sdk.images.with_raw_response.generate(
            **asked(prompt), stream=True, partial_images=1
        )
        events = [event async for event in streamed.parse()]
        kinds = [event.type for event in events]
        # Of a stream that is over the completed event is kept, without what came before it.
        assert kinds[-1] == "image_generation.completed"
        assert set(kinds[:-1]) <= {"image_generation.partial_image"}
        return streamed.headers["x-cache"], events[-1].b64_json
    if form == "edit":
        answer = await sdk.images.with_raw_response.edit(
            **asked(prompt), image=("a.png", png(), "image/png")
        )
    else:
        answer = await sdk.images.with_raw_response.generate(**asked(prompt))
    data = answer.parse().data
    assert data
    return answer.headers["x-cache"], data[0].b64_json or ""


async def node(base_url: str, folder: Path, *, runs: int, timeout_seconds: float) -> Any:
    """What Node's SDK got."""
    (folder / "a.png").write_bytes(png())
    process = await asyncio.create_subprocess_exec(
        str(NODE),
        str(SCRIPTS / "impatient.mjs"),
        env={
            "PATH": os.environ.get("PATH", ""),
            "OPENAI_BASE_URL": base_url,
            "OPENAI_API_KEY": KEY,
            "NODE_TOOLS": str(TOOLS),
            "MODEL": MODEL,
            "PROMPT": "picture node",
            "PICTURE": str(folder / "a.png"),
            "TIMEOUT_MS": str(round(timeout_seconds * 1000)),
            "RUNS": str(runs),
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(100):
        said, complaints = await process.communicate()
    assert process.returncode == 0, complaints.decode()
    return json.loads(said)


def has_node() -> bool:
    return NODE is not None and (TOOLS / "node_modules" / "openai").is_dir()


# The SDKs' retries


async def test_a_patience_of_1_5_seconds_and_a_picture_of_5(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey
) -> None:
    """One purchase, one charge, the user gets it, whichever form it was asked for in."""
    sandbox.rules.add(Rule(delay_seconds=PICTURE_SECONDS, payload_bytes=4000))
    async with (
        replicas(tmp_path, sandbox, postgres, valkey) as both,
        both.balancer() as balancer,
        sdk_of(balancer.base_url, timeout=PATIENCE_SECONDS, max_retries=8) as sdk,
    ):
        answers = await asyncio.gather(*(ask(sdk, number) for number in range(3)))
        assert [cache for cache, _ in answers] == ["join"] * 3
        assert len({picture for _, picture in answers}) == 3
        assert {one.port for one in both.all} == set(balancer.went)
        await both.check(3)
        joins = [both.metric(place, "gateway_flight_joins_total") for place in (0, 1)]
        # The tries that were not the last left as they had come: each was a join too.
        assert sum(joins) >= 3
        assert both.metric(0, "gateway_flight_unjoined_retries_total") == 0
        assert both.metric(1, "gateway_flight_unjoined_retries_total") == 0
        orphans = sum(both.metric(place, "gateway_orphaned_results_total") for place in (0, 1))
        assert orphans == 3


@pytest.mark.node
@pytest.mark.skipif(not has_node(), reason="no Node.js, or no openai package")
async def test_node_with_a_patience_of_1_5_seconds_and_a_picture_of_5(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey
) -> None:
    sandbox.rules.add(Rule(delay_seconds=PICTURE_SECONDS, payload_bytes=4000))
    async with (
        replicas(tmp_path, sandbox, postgres, valkey) as both,
        both.balancer() as balancer,
    ):
        said = await node(balancer.base_url, tmp_path, runs=3, timeout_seconds=PATIENCE_SECONDS)
        assert [answer["cache"] for answer in said["answers"]] == ["join"] * 3
        assert len({answer["b64"] for answer in said["answers"]}) == 3
        assert said["answers"][2]["types"][-1] == "image_generation.completed"
        assert said["attempts"] > 3
        await both.check(3)


async def test_many_impatient_calls_are_as_many_purchases(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey
) -> None:
    sandbox.rules.add(Rule(delay_seconds=4, payload_bytes=4000))
    # A busy machine has to have announced each call before its client has lost patience.
    runs, at_once = size(24, 100), asyncio.Semaphore(size(8, 25))
    async with (
        replicas(tmp_path, sandbox, postgres, valkey) as both,
        both.balancer() as balancer,
        sdk_of(balancer.base_url, timeout=1.2, max_retries=10) as sdk,
    ):

        async def one(number: int) -> tuple[str, str]:
            async with at_once:
                return await ask(sdk, number)

        began = time.monotonic()
        answers = await asyncio.gather(*(one(number) for number in range(runs)))
        print(
            f"\n{runs} calls in {time.monotonic() - began:.1f} s, "
            f"{len(balancer.went)} connections, "
            f"{sum(cache == 'join' for cache, _ in answers)} joined"
        )
        assert len({picture for _, picture in answers}) == runs
        assert {cache for cache, _ in answers} == {"join"}
        await both.check(runs)


@pytest.mark.node
@pytest.mark.skipif(not has_node(), reason="no Node.js, or no openai package")
async def test_many_impatient_calls_of_node(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey
) -> None:
    sandbox.rules.add(Rule(delay_seconds=4, payload_bytes=4000))
    async with (
        replicas(tmp_path, sandbox, postgres, valkey) as both,
        both.balancer() as balancer,
    ):
        said = await node(balancer.base_url, tmp_path, runs=RUNS_OF_NODE, timeout_seconds=1.2)
        assert len({answer["b64"] for answer in said["answers"]}) == RUNS_OF_NODE
        await both.check(RUNS_OF_NODE)


async def test_a_late_joiner_of_a_stream_gets_what_was_seen_elsewhere(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey
) -> None:
    """It comes to the other replica, after the first partial picture and before the second."""
    # Each event is some 4.2 kB: begun at once, ended 2 s later.
    sandbox.rules.add(Rule(payload_bytes=4000, drip=Drip(3000, 2.0)))
    body = asked("picture", stream=True, partial_images=2)
    async with (
        replicas(tmp_path, sandbox, postgres, valkey) as both,
        both.http(0) as first,
        sdk_of(both.all[1].base_url, timeout=30, max_retries=0) as sdk,
    ):
        async with first.stream("POST", GENERATIONS, json=body) as answer:
            heard, pieces = b"", answer.aiter_bytes()
            async for chunk in pieces:
                heard += chunk
                if b"\n\n" in heard:
                    break
            assert b"partial_image" in heard
            rid = answer.headers["x-request-id"]
            seen = time.monotonic()
            late = await sdk.images.with_raw_response.generate(
                **asked("picture"), stream=True, partial_images=2, extra_headers=RETRY
            )
            events = []
            async for event in late.parse():
                events.append((event.type, time.monotonic() - seen))
            whole = heard + b"".join([chunk async for chunk in pieces])
        assert late.headers["x-cache"] == "join"
        kinds = [kind.rpartition(".")[2] for kind, _ in events]
        assert kinds == ["partial_image", "partial_image", "completed"]
        # What was seen came before what was still to be made.
        assert events[2][1] - events[0][1] > 1
        assert whole.count(b"event:") == 3
        assert rid != late.headers["x-request-id"]
        await both.check(1)


# Idempotency-Key


async def test_twenty_at_once_under_one_key_are_one_purchase(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey
) -> None:
    gate = Gate()
    sandbox.rules.add(Rule(wait_for=gate, payload_bytes=4000))
    named = {"idempotency-key": "twenty"}
    async with (
        replicas(tmp_path, sandbox, postgres, valkey) as both,
        both.http(0) as one,
        both.http(1) as other,
    ):
        calls = [
            asyncio.ensure_future(
                (one, other)[number % 2].post(GENERATIONS, json=asked("key"), headers=named)
            )
            for number in range(20)
        ]
        async with asyncio.timeout(30):
            await gate.arrived()
        gate.set()
        answers = await asyncio.gather(*calls)
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        assert [answer.headers["x-cache"] for answer in answers].count("off") == 1
        costs = [answer.headers["x-cost-usd"] for answer in answers]
        assert costs.count("0") == 19
        [bought] = [answer for answer in answers if answer.headers["x-cache"] == "off"]
        here = answers.index(bought) % 2
        again = await (one, other)[1 - here].post(GENERATIONS, json=asked("key"), headers=named)
        assert again.content == bought.content
        assert again.headers["idempotent-replayed"] == "true"
        assert (again.headers["x-cache"], again.headers["x-cost-usd"]) == ("hit", "0")
        changed = await other.post(GENERATIONS, json=asked("else"), headers=named)
        assert changed.status_code == 422
        await both.check(1)


async def test_a_key_that_is_held_here_is_joined_from_there(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey
) -> None:
    gate = Gate()
    sandbox.rules.add(Rule(wait_for=gate, payload_bytes=4000))
    named = {"idempotency-key": "held"}
    async with (
        replicas(tmp_path, sandbox, postgres, valkey) as both,
        both.http(0) as one,
        both.http(1) as other,
    ):
        first = asyncio.ensure_future(one.post(GENERATIONS, json=asked("key"), headers=named))
        async with asyncio.timeout(30):
            await gate.arrived()
        second = asyncio.ensure_future(other.post(GENERATIONS, json=asked("key"), headers=named))
        await asyncio.wait({second}, timeout=1)
        assert not second.done()
        gate.set()
        bought, joined = await first, await second
        assert (bought.status_code, joined.status_code) == (200, 200)
        assert joined.headers["x-cache"] == "join"
        assert joined.content == bought.content
        await both.check(1)


# Results


async def test_a_result_is_had_from_the_other_replica(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey
) -> None:
    gate = Gate()
    sandbox.rules.add(Rule(wait_for=gate, payload_bytes=4000))
    wanted = {"prefer": "respond-async"}
    async with (
        replicas(tmp_path, sandbox, postgres, valkey) as both,
        both.http(0) as one,
        both.http(1) as other,
        both.http(1, OTHER_KEY) as stranger,
    ):
        began = await one.post(GENERATIONS, json=asked("later"), headers=wanted)
        assert began.status_code == 202
        rid = began.json()["id"]
        async with asyncio.timeout(30):
            await gate.arrived()
        where = f"/images/results/{rid}"
        running = await other.get(where)
        assert running.status_code == 202
        assert running.json()["status"] == "in_progress"
        assert set(running.json()["progress"]) == {"partial_images", "seconds"}
        assert (await stranger.get(where)).status_code == 404
        waits = asyncio.ensure_future(other.get(where, headers={"prefer": "wait=30"}))
        gate.set()
        ready = await waits
        assert ready.status_code == 200
        assert ready.json() == (await one.get(where)).json()
        assert base64.b64decode(ready.json()["data"][0]["b64_json"])
        assert (await stranger.get(where)).status_code == 404
        await both.check(1)


# The leader dies (row 92)


async def test_the_leader_dies_and_its_followers_are_told_so(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey
) -> None:
    gate = Gate()
    sandbox.rules.add(Rule(prompt="leader", wait_for=gate, payload_bytes=4000, times=2))
    sandbox.rules.add(Rule(payload_bytes=4000))
    ledger = {"lease_seconds": 25, "sweep_seconds": 0.5}
    async with (
        replicas(tmp_path, sandbox, postgres, valkey, ledger=ledger) as both,
        both.http(0) as one,
        both.http(1) as other,
    ):
        names = ["leader followed", "leader alone"]
        lost = [asyncio.ensure_future(one.post(GENERATIONS, json=asked(name))) for name in names]
        async with asyncio.timeout(30):
            await gate.arrived(2)
        follower = asyncio.ensure_future(
            other.post(GENERATIONS, json=asked("leader followed"), headers=RETRY)
        )
        await eventually(lambda: sum(watchers(valkey, hold.rid) for hold in both.holds()) == 3)
        both.all[0].kill()
        killed = time.monotonic()
        refused = await follower
        print(f"\ntold {time.monotonic() - killed:.1f} s after the kill")
        for call in lost:
            with pytest.raises(httpx.TransportError):
                await call
        # One that comes after the death, with nobody there who was told.
        late = await other.post(GENERATIONS, json=asked("leader alone"), headers=RETRY)
        for answer in (refused, late):
            assert answer.status_code == 502
            assert answer.json()["error"]["code"] == "upstream_outcome_unknown"
            assert answer.headers["x-should-retry"] == "false"
        assert len(sandbox.journal) == 2
        # Told once: who sends it anew wants another one.
        for name in names:
            anew = await other.post(GENERATIONS, json=asked(name))
            assert (anew.status_code, anew.headers["x-cache"]) == (200, "off")
        gate.set()
        await eventually(lambda: all(hold.state != "H" for hold in both.holds()), 50)
        holds = both.holds()
        assert sorted(hold.state for hold in holds) == ["P", "P", "X", "X"]
        assert all(hold.cost == hold.bound > 0 for hold in holds if hold.state == "X")
        both.verify()


async def test_the_leader_of_a_stream_dies_between_two_of_its_pictures(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey
) -> None:
    """Who follows at another replica keeps what came, and is told how it ended."""
    sandbox.rules.add(Rule(payload_bytes=4000, drip=Drip(3000, 3.0)))
    ledger = {"lease_seconds": 25, "sweep_seconds": 0.5}
    async with (
        replicas(tmp_path, sandbox, postgres, valkey, ledger=ledger) as both,
        both.http(0) as one,
        both.http(1) as other,
    ):
        body = asked("cut", stream=True, partial_images=2)
        lost = asyncio.ensure_future(one.post(GENERATIONS, json=body))
        async with asyncio.timeout(30):
            await sandbox.journal.until(lambda: len(sandbox.journal) == 1)
        async with other.stream("POST", GENERATIONS, json=body, headers=RETRY) as answer:
            assert (answer.status_code, answer.headers["x-cache"]) == (200, "join")
            heard, pieces = b"", answer.aiter_bytes()
            async for chunk in pieces:
                heard += chunk
                if b"\n\n" in heard:
                    break
            assert b"partial_image" in heard
            both.all[0].kill()
            heard += b"".join([chunk async for chunk in pieces])
        await asyncio.gather(lost, return_exceptions=True)
        assert heard.count(b"event: image_generation.partial_image") == 1
        last = heard.rstrip().rpartition(b"data: ")[2]
        assert json.loads(last)["error"]["code"] == "upstream_outcome_unknown"
        assert len(sandbox.journal) == 1
        await eventually(lambda: all(hold.state == "X" for hold in both.holds()), 40)
        both.verify()


@pytest.mark.parametrize("named", [False, True], ids=["retry", "key"])
async def test_where_the_owner_wants_it_a_follower_buys_again_once(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey, named: bool
) -> None:
    gate, again = Gate(), Gate()
    sandbox.rules.add(Rule(wait_for=gate, payload_bytes=4000, times=1))
    sandbox.rules.add(Rule(wait_for=again, payload_bytes=4000))
    ledger = {"lease_seconds": 25, "sweep_seconds": 0.5}
    key = {"idempotency-key": "once"} if named else {}
    async with (
        replicas(
            *(tmp_path, sandbox, postgres, valkey),
            ledger=ledger, relay={"on_unknown": "repeat"},
        ) as both,
        both.http(0) as one,
        both.http(1) as other,
    ):  # fmt: skip
        lost = asyncio.ensure_future(one.post(GENERATIONS, json=asked("leader"), headers=key))
        async with asyncio.timeout(30):
            await gate.arrived()
        [first] = both.holds()
        followers = [
            asyncio.ensure_future(
                other.post(GENERATIONS, json=asked("leader"), headers={**key, **RETRY})
            )
            for _ in range(4)
        ]
        if not named:
            await eventually(lambda: watchers(valkey, first.rid) == 5)
        both.all[0].kill()
        with pytest.raises(httpx.TransportError):
            await lost
        async with asyncio.timeout(LEASE_SECONDS + 15):
            await again.arrived()
        # It is joined like any other.
        late = asyncio.ensure_future(
            other.post(GENERATIONS, json=asked("leader"), headers={**key, **RETRY})
        )
        await asyncio.wait({late}, timeout=1)
        assert not late.done()
        again.set()
        gate.set()
        answers = await asyncio.gather(*followers)
        joined = await late
        assert joined.headers["x-cache"] == "join"
        bought = [one for one in answers if one.headers.get("x-cache") == "off"]
        assert len(bought) == 1
        assert bought[0].status_code == 200
        assert joined.content == bought[0].content
        for answer in answers:
            assert answer.status_code in (200, 502)
        await eventually(lambda: both.metric(1, "gateway_flight_takeovers_total") == 1)
        assert both.metric(1, "gateway_flight_unjoined_retries_total") == 0
        assert len(sandbox.journal) == 2
        await eventually(lambda: all(hold.state != "H" for hold in both.holds()), 50)
        lost_hold, kept_hold = both.holds()
        assert lost_hold.rid == first.rid
        assert (lost_hold.state, lost_hold.cost) == ("X", first.bound)
        assert (kept_hold.state, kept_hold.cost) == ("P", bill(list(sandbox.journal)[1]))
        both.verify()


async def test_a_leader_that_stood_still_for_longer_than_its_lease(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey
) -> None:
    """It is taken for dead, and bought again. When it goes on it settles what it has bought, and
    its answer is nobody else's."""
    gate = Gate()
    sandbox.rules.add(Rule(wait_for=gate, payload_bytes=4000, times=1))
    sandbox.rules.add(Rule(payload_bytes=4000))
    async with (
        replicas(
            *(tmp_path, sandbox, postgres, valkey),
            ledger={"lease_seconds": 60, "sweep_seconds": 0.5}, relay={"on_unknown": "repeat"},
        ) as both,
        both.http(0) as one,
        both.http(1) as other,
    ):  # fmt: skip
        named = {"idempotency-key": "stood-still"}
        first = asyncio.ensure_future(one.post(GENERATIONS, json=asked("still"), headers=named))
        async with asyncio.timeout(30):
            await gate.arrived()
        [held] = both.holds()
        os.kill(both.all[0].pid, signal.SIGSTOP)
        try:
            second = await other.post(GENERATIONS, json=asked("still"), headers={**named, **RETRY})
            assert (second.status_code, second.headers["x-cache"]) == (200, "off")
            gate.set()
            states = {hold.rid: hold.state for hold in both.holds()}
            assert states == {held.rid: "X", second.headers["x-request-id"]: "P"}
        finally:
            os.kill(both.all[0].pid, signal.SIGCONT)
        bought = await first
        assert bought.status_code == 200
        assert bought.content != second.content
        # The later one is what the key stands for, at both of them.
        for http in (one, other):
            again = await http.post(GENERATIONS, json=asked("still"), headers=named)
            assert again.content == second.content
            assert again.headers["idempotent-replayed"] == "true"
            mine = await http.get(f"/images/results/{held.rid}")
            assert mine.content == bought.content
        # The truth came late, and stands in for the bound.
        await both.check(2)
        assert {hold.state for hold in both.holds()} == {"P"}


# Redis goes away


async def test_without_redis_a_retry_finds_what_flies_in_its_own_process(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey
) -> None:
    gate = Gate()
    sandbox.rules.add(Rule(wait_for=gate, payload_bytes=4000))
    async with (
        replicas(tmp_path, sandbox, postgres, valkey) as both,
        both.http(0) as one,
        both.http(1) as other,
    ):
        first = asyncio.ensure_future(one.post(GENERATIONS, json=asked("away")))
        async with asyncio.timeout(30):
            await gate.arrived()
        [held] = both.holds()
        valkey.kill()
        here = asyncio.ensure_future(one.post(GENERATIONS, json=asked("away"), headers=RETRY))
        there = asyncio.ensure_future(other.post(GENERATIONS, json=asked("away"), headers=RETRY))
        async with asyncio.timeout(30):
            await gate.arrived(2)
        await asyncio.wait({here}, timeout=1)
        assert len(sandbox.journal) == 2
        valkey.restart()
        # Both processes tell the new Redis what they fly, and retries are led to it again.
        await eventually(lambda: watchers(valkey, held.rid) >= 1, 30)
        late = asyncio.ensure_future(other.post(GENERATIONS, json=asked("away"), headers=RETRY))
        await asyncio.wait({late}, timeout=1)
        assert gate.arrivals == 2
        gate.set()
        answers = await asyncio.gather(first, here, there, late)
        assert {answer.status_code for answer in answers} == {200}
        caches = [answer.headers["x-cache"] for answer in answers]
        assert caches == ["off", "join", "off", "join"]
        assert answers[0].content == answers[1].content
        assert answers[0].content != answers[2].content
        await eventually(lambda: both.metric(1, "gateway_flight_unjoined_retries_total") == 1)
        assert both.metric(0, "gateway_flight_unjoined_retries_total") == 0
        assert both.metric(0, "gateway_flight_joins_total") == 1
        await both.check(2)
