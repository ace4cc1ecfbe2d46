"""The door of results, on a real socket, before a desk that answers as the test says."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import httpx
import pytest

from gateway.api.door import Receive, Scope, Send
from gateway.api.results import ResultRoutes
from gateway.domain import keys
from gateway.domain.errors import (
    ClientGone,
    GatewayError,
    IdempotentResultExpired,
    LedgerUnavailable,
    ResultExpired,
    UpstreamUnknown,
)
from gateway.domain.team import Caller, Declared, Key, Team
from gateway.relay.flights import Client, Head
from gateway.relay.keyring import KeyRing
from gateway.relay.running import RESULTS, Fetched, Running, no_result, running_head
from gateway.server import listen, server
from gateway.stores.memory_ledger import MemoryStore
from tests.running import KEY, OTHER_KEY, TODAY, TestClock
from tests.valkey import eventually

RID = "req_0123456789abcdef01234567"
MINE = f"{RESULTS}{RID}"
TTL, KEYED_TTL = timedelta(minutes=15), timedelta(hours=24)
RUNNING = Running(RID, "generation", "team-art", TODAY, 3.0)
PICTURE = b'{"data":[{"b64_json":"' + b"A" * 300_000 + b'"}]}'


@dataclass
class Desk:
    """Has one result, of team growth."""

    answer: Head | Exception | None = None
    landed: asyncio.Event | None = None
    """Set when the call has ended."""
    asked: list[tuple[str, str, float]] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    closed: int = 0
    delivered: list[bool] = field(default_factory=list)

    async def fetch(self, caller: Caller, rid: str, wait_seconds: float, client: Client) -> Fetched:
        self.asked.append((caller.team.id, rid, wait_seconds))
        if (caller.team.id, rid) != ("growth", RID):
            raise no_result(rid, TTL, KEYED_TTL)
        if self.landed is not None and not await self._lands(wait_seconds, client):
            return Fetched(running_head(RUNNING), self._done)
        if isinstance(self.answer, Exception):
            raise self.answer
        return Fetched(self.answer or self.ready(200, PICTURE), self._done)

    def _done(self, delivered: bool) -> None:
        self.delivered.append(delivered)

    async def _lands(self, wait_seconds: float, client: Client) -> bool:
        assert self.landed is not None
        either = [asyncio.create_task(one.wait()) for one in (self.landed, client.gone)]
        try:
            await asyncio.wait(either, timeout=wait_seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in either:
                task.cancel()
        if client.gone.is_set():
            self.left.set()
            raise ClientGone("upstream")
        return self.landed.is_set()

    def ready(self, status: int, content: bytes, streamed: bool = False) -> Head:
        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(content), 100_000):
                yield content[start : start + 100_000]

        headers = (("content-type", "application/json"), ("x-request-id", RID))
        return Head(status, headers, None if streamed else len(content), chunks, self._close)

    def _close(self) -> None:
        self.closed += 1


@dataclass
class Door:
    origin: str
    desk: Desk
    counted: list[str]

    def http(self, key: str | None = KEY) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(base_url=self.origin, headers=headers, verify=False, timeout=30)

    async def get(self, path: str = MINE, key: str | None = KEY, **headers: str) -> httpx.Response:
        async with self.http(key) as http:
            return await http.get(path, headers=headers)


@asynccontextmanager
async def open_door() -> AsyncIterator[Door]:
    peppers = keys.Peppers(b"p" * 32, ())
    teams = {name: Team(id=name) for name in ("growth", "design")}
    known = {
        peppers.digests(secret)[0]: (teams[name], Key(id=f"k-{name}", team=name))
        for secret, name in ((KEY, "growth"), (OTHER_KEY, "design"))
    }
    clock, counted, desk = TestClock(), list[str](), Desk()
    keyring = KeyRing(peppers, Declared(teams, known), MemoryStore().directory, clock)
    routes = ResultRoutes(keyring, desk, ttl=TTL, idempotent_ttl=KEYED_TTL, counted=counted.append)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await routes.handle(scope, receive, send)

    with listen("127.0.0.1", 0) as listening:
        running = server(app, drain_seconds=1)
        serving = asyncio.create_task(running.serve([listening]))
        try:
            yield Door(f"http://127.0.0.1:{listening.getsockname()[1]}", desk, counted)
        finally:
            running.should_exit = True
            await serving


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with open_door() as made:
        yield made


async def test_what_was_kept_comes_byte_for_byte(door: Door) -> None:
    answer = await door.get()
    assert (answer.status_code, answer.content) == (200, PICTURE)
    assert answer.headers["x-request-id"] == RID
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-length"] == str(len(PICTURE))
    assert door.desk.asked == [("growth", RID, 0.0)]
    assert (door.counted, door.desk.closed) == (["ready"], 1)


async def test_a_kept_stream_and_a_kept_error(door: Door) -> None:
    door.desk.answer = door.desk.ready(200, b"event: x\ndata: {}\n\n", streamed=True)
    answer = await door.get()
    assert (answer.content, answer.headers["cache-control"]) == (
        b"event: x\ndata: {}\n\n",
        "no-cache",
    )
    door.desk.answer = door.desk.ready(502, b'{"error":{}}')
    answer = await door.get()
    assert (answer.status_code, answer.content) == (502, b'{"error":{}}')
    assert door.counted == ["ready", "ready"]


async def test_one_connection_serves_many_questions(door: Door) -> None:
    async with door.http() as http:
        for _ in range(3):
            assert (await http.get(MINE)).status_code == 200
            assert (await http.get(f"{RESULTS}nothing")).status_code == 404
        # A body is not read, so the connection is not used again; nothing else comes of it.
        answer = await http.request("GET", MINE, content=b"x" * 1_000_000)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert (await http.get(MINE)).status_code == 200


async def test_a_call_that_runs_is_told_of_at_once(door: Door) -> None:
    door.desk.landed = asyncio.Event()
    answer = await door.get()
    assert answer.status_code == 202
    assert answer.json()["status"] == "in_progress"
    assert (answer.headers["location"], answer.headers["retry-after"]) == (MINE, "2")
    assert door.counted == ["running"]


async def test_an_answer_may_be_waited_for(door: Door) -> None:
    door.desk.landed = asyncio.Event()
    waiting = asyncio.create_task(door.get(prefer="wait=300"))
    await eventually(lambda: bool(door.desk.asked))
    assert not waiting.done()
    door.desk.landed.set()
    answer = await waiting
    assert (answer.status_code, answer.content) == (200, PICTURE)
    assert door.desk.asked == [("growth", RID, 60.0)]


async def test_whoever_waits_may_leave(door: Door) -> None:
    door.desk.landed = asyncio.Event()
    _, port = door.origin.rsplit(":", 1)
    _, writer = await asyncio.open_connection("127.0.0.1", int(port))
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wish = f"GET {MINE} HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {KEY}\r\nprefer: wait=60\r\n"
    writer.write(f"{wish}\r\n".encode())
    await eventually(lambda: bool(door.desk.asked))
    # Reset: one that only closes its sending half may still read, and is waited for.
    writer.transport.abort()
    await eventually(door.desk.left.is_set)
    door.desk.landed.set()
    assert (await door.get()).status_code == 200
    assert door.counted == ["ready"]


NOBODYS = "req_ffffffffffffffffffffffff"


async def test_what_is_anothers_looks_like_what_is_nobodys(door: Door) -> None:
    """Byte for byte but for the id that was asked for, and in the headers."""
    foreign = await door.get(key=OTHER_KEY)
    unknown = await door.get(f"{RESULTS}{NOBODYS}", key=OTHER_KEY)
    assert foreign.status_code == unknown.status_code == 404
    assert foreign.text == unknown.text.replace(NOBODYS, RID)
    same = {"date", "x-request-id"}
    assert {name: value for name, value in foreign.headers.items() if name not in same} == {
        name: value for name, value in unknown.headers.items() if name not in same
    }
    error = foreign.json()["error"]
    assert (error["code"], error["type"]) == ("result_not_found", "invalid_request_error")
    assert error["message"].startswith(f"No result {RID} of your team. Results are kept for 15 min")
    assert foreign.headers["x-should-retry"] == "false"
    assert door.counted == ["unknown", "unknown"]


@pytest.mark.parametrize(
    "id_",
    [
        "",
        "x",
        "req_",
        RID.upper(),
        RID + "0",
        RID[:-1],
        RID + "/",
        RID + "%0a",
        "..%2f..%2fetc%2fpasswd",
        "req_%EF%BC%90" + RID[5:],
        "%ff%00%22",
        "a" * 5000,
    ],
)
async def test_what_is_no_id_is_unknown(door: Door, id_: str) -> None:
    answer = await door.get(f"{RESULTS}{id_}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "result_not_found"
    assert len(answer.content) < 1000
    assert (door.desk.asked, door.counted) == ([], ["unknown"])


@pytest.mark.parametrize("key", [None, "nobodys-key-0123456789abcdef"])
@pytest.mark.parametrize("path", [MINE, f"{RESULTS}nothing"])
async def test_nobody_is_told_anything(door: Door, key: str | None, path: str) -> None:
    answer = await door.get(path, key=key)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (door.desk.asked, door.counted) == ([], [])


@pytest.mark.parametrize(
    ("error", "status", "retry", "outcome"),
    [
        (ResultExpired("It is kept no longer."), 410, "false", "gone"),
        (IdempotentResultExpired("It is kept no longer."), 410, "false", "gone"),
        (UpstreamUnknown("Nobody knows."), 502, "false", "unknown_outcome"),
        (LedgerUnavailable("Not now."), 503, None, "failed"),
        (RuntimeError("a mistake of ours"), 500, None, "failed"),
    ],
)
async def test_errors_are_answers(
    door: Door, error: Exception, status: int, retry: str | None, outcome: str
) -> None:
    door.desk.answer = error
    answer = await door.get()
    assert answer.status_code == status
    assert answer.headers.get("x-should-retry") == retry
    assert answer.headers["x-request-id"] not in ("", RID)
    if isinstance(error, GatewayError):
        assert answer.json()["error"]["message"] == str(error)
    assert "a mistake of ours" not in answer.text
    assert door.counted == [outcome]


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT", "OPTIONS", "HEAD"])
async def test_other_methods(door: Door, method: str) -> None:
    async with door.http() as http:
        answer = await http.request(method, MINE)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")
    if method != "HEAD":
        assert json.loads(answer.content)["error"]["code"] == "method_not_allowed"
    assert door.counted == []


async def test_whoever_waits_when_the_gateway_ends_may_ask_again() -> None:
    async with open_door() as door:
        door.desk.landed = asyncio.Event()
        waiting = asyncio.create_task(door.get(prefer="wait=60"))
        await eventually(lambda: bool(door.desk.asked))
    answer = await waiting
    assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "true")
    assert answer.json()["error"]["code"] == "shutting_down"
