"""Responses whose process is not alone, or does not live to see their end: joined from another
replica, drained, killed; and one whose owner could not be written down at first."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gateway.domain.errors import LedgerUnavailable
from gateway.domain.owned import Owned
from gateway.sandbox.rules import Drip, Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from gateway.stores.sqlite_ownership import SQLiteOwnership
from tests.e2e.test_responses import MODELS, SETTINGS, TEXT, TOOL, costs, drawn, events_of
from tests.postgres import Postgres
from tests.processes import Books, GatewayProcess
from tests.redis_servers import say
from tests.replicas import replicas, watchers
from tests.running import KEY, Start, config_of
from tests.valkey import Valkey, eventually, run_valkey

ASKED: dict[str, Any] = {"model": TEXT, "input": "a cat", "tools": [TOOL]}
RETRY = {"x-stainless-retry-count": "1"}


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with run_valkey() as running:
        yield running


def most_watched(valkey: Valkey) -> int:
    """How many wait for the flight that most wait for."""
    keys = say(valkey.port, "KEYS", "gw:{default}:fl:*")
    rids = [key.decode().rpartition(":")[2] for key in keys]
    return max((watchers(valkey, rid) for rid in rids), default=0)


# From another replica


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
async def test_a_stream_is_joined_from_another_replica(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey, cut: bool
) -> None:
    """Every event as it was seen where it flies, and its end: the last event, or a flat error."""
    rule = Rule(path="/responses", payload_bytes=8000, drip=Drip(1000, 0.15))
    if cut:
        rule = replace(rule, drip=Drip(400, 0.4), cut_after_bytes=6000)
    sandbox.rules.add(rule)
    # Of its own: what another test has left on the board is the same call, too.
    asked = {**ASKED, "stream": True, "input": f"a cat, {'cut' if cut else 'whole'}"}
    async with (
        replicas(tmp_path, sandbox, postgres, valkey, models=MODELS) as both,
        both.http(0) as first,
        both.http(1) as other,
    ):
        async with first.stream("POST", "/responses", json=asked) as answer:
            heard, pieces = b"", answer.aiter_bytes()
            async for chunk in pieces:
                heard += chunk
                if b"\n\n" in heard:
                    break
            late = asyncio.create_task(other.post("/responses", json=asked, headers=RETRY))
            heard += b"".join([chunk async for chunk in pieces])
        joined = await late
        assert (joined.status_code, joined.headers["x-cache"]) == (200, "join")
        own, theirs = events_of(heard.decode()), events_of(joined.text)
        assert [one["type"] for one in theirs] == [one["type"] for one in own]
        assert theirs[:-1] == own[:-1]
        last = theirs[-1]
        if cut:
            assert set(last) == {"type", "code", "message", "param", "sequence_number"}
            assert (last["type"], last["code"]) == ("error", own[-1]["code"])
            assert last["message"] == own[-1]["message"]
        else:
            assert last == own[-1]
            assert last["type"] == "response.completed"
        assert len(sandbox.journal) == 1
        [hold] = await both.settled()
        booked = ("X", hold.bound) if cut else ("P", costs(last["response"]))
        assert (hold.state, hold.cost) == booked
        both.verify()


async def test_what_was_cut_is_a_plain_error_to_who_joins_from_elsewhere(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres, valkey: Valkey
) -> None:
    held = Gate()
    sandbox.rules.add(Rule(path="/responses", wait_for=held, cut_after_bytes=300))
    async with (
        replicas(tmp_path, sandbox, postgres, valkey, models=MODELS) as both,
        both.http(0) as first,
        both.http(1) as other,
    ):
        asking = asyncio.create_task(first.post("/responses", json=ASKED))
        await held.arrived()
        late = asyncio.create_task(other.post("/responses", json=ASKED, headers=RETRY))
        await eventually(lambda: most_watched(valkey) == 2)
        held.set()
        one, two = await asyncio.gather(asking, late)
        assert (one.status_code, two.status_code) == (502, 502)
        assert one.content == two.content
        assert len(sandbox.journal) == 1


# Whose it is


async def test_an_answer_does_not_wait_for_its_owner_to_be_written_down(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is paid for: it is handed over, and can be asked for again once the store is back."""
    record, away = SQLiteOwnership.record, asyncio.Event()
    away.set()
    tries = []

    async def faulty(self: SQLiteOwnership, owned: list[Owned]) -> None:
        tries.append(len(owned))
        if away.is_set():
            raise LedgerUnavailable("The disk is full.")
        await record(self, owned)

    monkeypatch.setattr(SQLiteOwnership, "record", faulty)
    async with start(SETTINGS) as gateway, gateway.sdk() as sdk:
        made = await drawn(sdk)
        assert made.status == "completed"
        assert len(tries) >= 3
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.retrieve(made.id)
        away.clear()

        async def is_known() -> bool:
            try:
                return (await sdk.responses.retrieve(made.id)).id == made.id
            except openai.NotFoundError:
                return False

        await eventually(is_known)
        wrote, drew = await gateway.usage()
        assert (wrote.requests, wrote.unresolved) == (1, 0)
        assert (drew.requests, drew.images, drew.unresolved) == (0, 1, 0)


# In the background


def config(folder: Path, sandbox: SandboxServer, **ledger: float) -> Path:
    pepper = {"pepper": "pepper-0123456789abcdef-0123456789"}
    changes = {**SETTINGS, "ledger": ledger, "storage": pepper}
    return config_of(folder, sandbox.base_url, changes)


async def in_the_background(process: GatewayProcess) -> dict[str, Any]:
    await asyncio.to_thread(process.wait_ready)
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(verify=False, timeout=30, headers=headers) as http:
        answer = await http.post(
            process.base_url + "/responses", json={**ASKED, "background": True}
        )
    queued: dict[str, Any] = answer.json()
    assert (answer.status_code, queued["status"]) == (200, "queued"), answer.text
    return queued


async def test_a_process_that_ends_waits_for_what_it_has_in_the_background(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    held = Gate()
    sandbox.rules.add(Rule(times=1, path="/responses", wait_for=held))
    with GatewayProcess(config(tmp_path, sandbox)) as process:
        await in_the_background(process)
        process.terminate()
        await eventually(lambda: process.drains() or process.refuses(), 30)
        assert process.running
        assert Books.read(tmp_path / "data" / "gateway.db").open
        held.set()
        assert await asyncio.to_thread(process.wait) == 0
    books = Books.read(tmp_path / "data" / "gateway.db")
    books.check()
    [hold] = books.holds.values()
    [*_, shown] = [one for one in sandbox.journal if one.method == "GET"]
    assert (hold.state, hold.outcome) == ("P", "delivered")
    assert 0 < hold.cost < hold.bound
    assert shown.path.startswith("/v1/responses/resp_")


async def test_a_process_that_is_killed_leaves_what_it_had_in_the_background_at_its_bound(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    held = Gate()
    sandbox.rules.add(Rule(times=1, path="/responses", wait_for=held))
    path = config(tmp_path, sandbox, lease_seconds=1.0, sweep_seconds=0.2)
    database = tmp_path / "data" / "gateway.db"
    with GatewayProcess(path) as first:
        queued = await in_the_background(first)
        first.kill()
    held.set()
    with GatewayProcess(path) as second:
        await asyncio.to_thread(second.wait_ready)
        await eventually(lambda: not Books.read(database).open, 30)
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(verify=False, timeout=30, headers=headers) as http:

            async def is_had() -> bool:
                found = await http.get(f"{second.base_url}/responses/{queued['id']}")
                assert found.status_code == 200
                return bool(found.json()["status"] == "completed")

            # It is still its team's: what was made can be had, once the upstream has made it.
            await eventually(is_had)
    books = Books.read(database)
    books.check()
    [hold] = books.holds.values()
    assert (hold.state, hold.cost) == ("X", hold.bound)
