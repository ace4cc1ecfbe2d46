"""What is passed on without being bought: no team shuts it for the others, and no body that never
ends holds anything."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

import gateway.app
from gateway.relay.passing import MOST_AT_ONCE, MOST_OF_A_TEAM, Passing
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from tests.e2e.test_endings import soon
from tests.e2e.test_responses import SETTINGS, drawn
from tests.running import KEY, OTHER_KEY, GatewayUnderTest, Start

MANY = {"teams": {"growth": {"keys": [KEY], "limits": {"requests_per_minute": 100_000}}}}
JUDGED = {"input": "A lighthouse"}


@asynccontextmanager
async def half_sent(
    gateway: GatewayUnderTest, path: str, body: bytes = b"{"
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A request whose body has begun, and says that it has 1000 bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    head = (
        f"POST /v1{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    )
    writer.write(head.encode() + body)
    try:
        yield reader, writer
    finally:
        writer.close()


def taken_in(gateway: GatewayUnderTest) -> int:
    """How many bodies are arriving now."""
    return len(gateway.gateway.flights._until_draining)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.app, "Passing", functools.partial(Passing, idle_seconds=0.5))


async def test_uploads_that_never_end_shut_nothing(start: Start) -> None:
    async with start(MANY) as running, running.http(OTHER_KEY) as http, running.http() as own:
        uploads = [half_sent(running, "/moderations") for _ in range(MOST_AT_ONCE)]
        for upload in uploads:
            await upload.__aenter__()
        await soon(lambda: taken_in(running) == MOST_AT_ONCE, "all of them are arriving")
        for client in (http, own):
            assert (await client.post("/moderations", json=JUDGED)).status_code == 200
            assert (await client.get("/files")).status_code == 200
            assert (await client.get("/responses/resp_x")).status_code == 404
        for upload in uploads:
            await upload.__aexit__(None, None, None)
        await running.told.until(MOST_AT_ONCE + 6)


async def test_no_team_has_all_the_places(start: Start, sandbox: SandboxServer) -> None:
    held = Gate()
    sandbox.rules.add(Rule(path="/moderations", times=MOST_OF_A_TEAM, wait_for=held))
    async with start(MANY) as running, running.http(OTHER_KEY) as http, running.http() as own:
        asked = [
            asyncio.create_task(own.post("/moderations", json=JUDGED))
            for _ in range(MOST_OF_A_TEAM)
        ]
        await soon(lambda: len(sandbox.journal) == MOST_OF_A_TEAM, "all of them are upstream")
        refused = await own.post("/moderations", json=JUDGED)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert f"at most {MOST_OF_A_TEAM} requests of a team" in refused.text
        assert refused.headers["retry-after"] == "1"
        assert (await http.post("/moderations", json=JUDGED)).status_code == 200
        held.set()
        assert {(await one).status_code for one in asked} == {200}
        # A place is free again as soon as its answer is delivered.
        await running.told.until(MOST_OF_A_TEAM + 2)
        assert (await own.post("/moderations", json=JUDGED)).status_code == 200


@pytest.mark.usefixtures("impatient")
async def test_a_body_that_stops_coming_is_given_up(start: Start, sandbox: SandboxServer) -> None:
    async with start(SETTINGS) as running, running.sdk() as sdk:
        made = await drawn(sdk)
        sent = len(sandbox.journal)
        before = len(await running.told.until(1))
        paths = ("/moderations", f"/responses/{made.id}/cancel")
        for count, path in enumerate(paths, start=before + 1):
            async with half_sent(running, path) as (reader, _), asyncio.timeout(20):
                answer = (await reader.read()).decode()
            head, _, body = answer.partition("\r\n\r\n")
            assert head.startswith("HTTP/1.1 408 "), answer
            assert "connection: close" in head.lower()
            assert "x-should-retry: true" in head
            assert '"code":"upload_stalled"' in body
            told = await running.told.until(count)
            assert told[-1][0].reason == "upload_stalled"
        assert len(sandbox.journal) == sent


async def test_a_body_that_comes_slowly_is_waited_for(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes longer in all than it may stand still."""
    monkeypatch.setattr(gateway.app, "Passing", functools.partial(Passing, idle_seconds=1.5))
    async with start() as running:
        body = b'{"input":"a' + b" " * 987 + b'"}'
        async with half_sent(running, "/moderations", body[:1]) as (reader, writer):
            for at in range(1, 1000, 250):
                await asyncio.sleep(0.4)
                writer.write(body[at : at + 250])
                await writer.drain()
            async with asyncio.timeout(20):
                assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")


async def test_a_cancellation_whose_body_never_ends_holds_no_shutdown_up(start: Start) -> None:
    async with start(SETTINGS) as running:
        async with running.sdk() as sdk:
            made = await drawn(sdk)
        async with half_sent(running, f"/responses/{made.id}/cancel") as (reader, _):
            await soon(lambda: taken_in(running) == 1, "it is arriving")
            running.gateway.flights.begin_draining()
            async with asyncio.timeout(20):
                answer = await reader.readline()
            assert answer.startswith(b"HTTP/1.1 503 ")
