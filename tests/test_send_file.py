"""Answers that stand in a file: the system sends them, past the loop, and nobody sees a difference.

On uvloop, which is what serves: elsewhere they are read and sent like any other.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

import gateway.api.door
from gateway.api.door import EXCHANGE, ASGIApp, Door, Receive, Scope, Send, deliver
from gateway.loop import LOOP
from gateway.ports import FileBody, OpenFile
from gateway.relay.flights import Head
from gateway.server import server
from tests.raw import RawClient

PICTURE = os.urandom(2_700_000)
LARGE = os.urandom(24_000_000)

pytestmark = pytest.mark.skipif(LOOP is asyncio.new_event_loop, reason="uvloop is not here")


@dataclass
class Answers:
    """An ASGI application whose answers are a part of a file, behind its first ten bytes."""

    path: Path
    size: int
    waits: bool = False
    doors: list[Door] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        door = Door(scope, receive, send)
        self.doors.append(door)
        door.ignore_body(announced=False)
        await deliver("req_1", Head(200, (), self.size, self.body), door)
        door.stop_watching()
        self.over.set()

    def body(self) -> FileBody:
        file = OpenFile(os.open(self.path, os.O_RDONLY))
        return FileBody(file, 10, 10 + self.size, waits=self.waits)


@dataclass
class Sent:
    """Counts what ``os.sendfile`` has sent."""

    calls: int = 0
    size: int = 0


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    seen, sendfile = Sent(), os.sendfile

    def counted(out: int, source: int, offset: int, count: int) -> int:
        seen.calls += 1
        taken = sendfile(out, source, offset, count)
        seen.size += taken
        return taken

    monkeypatch.setattr(os, "sendfile", counted)
    return seen


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def within_a_minute() -> None:
        async with asyncio.timeout(60):
            await story()

    with asyncio.Runner(loop_factory=LOOP) as runner:
        runner.run(within_a_minute())


def file_of(content: bytes, folder: Path) -> Path:
    path = folder / "kept"
    path.write_bytes(b"0123456789" + content)
    return path


@asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[int]:
    one = server(app)
    one.config.load()
    kind = cast(Any, one.config.http_protocol_class)
    listener = await asyncio.get_running_loop().create_server(
        lambda: kind(config=one.config, server_state=one.server_state, app_state={}),
        "127.0.0.1",
        0,
    )
    async with listener:
        yield listener.sockets[0].getsockname()[1]


def slow_socket(port: int) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.setblocking(False)
    client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    return client


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("content", [PICTURE, LARGE])
def test_every_byte_comes_and_the_connection_lasts(
    tmp_path: Path, sent: Sent, content: bytes, *, waits: bool
) -> None:
    async def story() -> None:
        app = Answers(file_of(content, tmp_path), len(content), waits)
        async with serving(app) as port, RawClient.to(port) as client:
            for _ in range(2):
                await client.head("/", method="GET")
                answer = await client.answer()
                assert answer.body == content
        assert [door.bytes_out for door in app.doors] == [len(content)] * 2
        assert all(door.delivered for door in app.doors)

    run(story)
    assert sent.size > len(content)  # of two answers: most of each


def test_answers_that_were_asked_for_at_once_come_one_after_the_other(
    tmp_path: Path, sent: Sent
) -> None:
    async def story() -> None:
        app = Answers(file_of(PICTURE, tmp_path), len(PICTURE), waits=True)
        async with serving(app) as port, RawClient.to(port) as client:
            await client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" * 3)
            for _ in range(3):
                assert (await client.answer()).body == PICTURE

    run(story)
    assert sent.calls


def test_a_client_that_takes_little_at_a_time_gets_all_of_it(tmp_path: Path, sent: Sent) -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        app = Answers(file_of(LARGE, tmp_path), len(LARGE))
        async with serving(app) as port:
            client, got = slow_socket(port), bytearray()
            while len(got) < len(LARGE) or not got.endswith(LARGE[-100:]):
                got += await loop.sock_recv(client, 1 << 20)
            client.close()
        assert got.partition(b"\r\n\r\n")[2] == LARGE

    run(story)
    assert sent.size > 0


@pytest.mark.parametrize("waits", [False, True])
def test_a_client_that_leaves_has_not_got_it(tmp_path: Path, sent: Sent, *, waits: bool) -> None:
    async def story() -> None:
        app = Answers(file_of(LARGE, tmp_path), len(LARGE), waits)
        async with serving(app) as port:
            client = slow_socket(port)
            await asyncio.get_running_loop().sock_recv(client, 100)
            client.close()
            await app.over.wait()
        [door] = app.doors
        assert door.gone == "response"
        assert 0 < door.bytes_out < len(LARGE)

    run(story)
    assert sent.calls


def test_a_client_that_takes_nothing_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.api.door, "STALL_SECONDS", 0.3)

    async def story() -> None:
        app = Answers(file_of(LARGE, tmp_path), len(LARGE))
        async with serving(app) as port:
            client = slow_socket(port)
            await app.over.wait()
            client.close()
        [door] = app.doors
        assert door.gone == "stalled"
        assert door.bytes_out < len(LARGE)

    run(story)


def test_where_the_system_cannot_send_a_file_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> int:
        raise OSError("not of this file system")

    monkeypatch.setattr(os, "sendfile", refuse)

    async def story() -> None:
        app = Answers(file_of(PICTURE, tmp_path), len(PICTURE))
        async with serving(app) as port, RawClient.to(port) as client:
            await client.head("/", method="GET")
            assert (await client.answer()).body == PICTURE

    run(story)


def test_a_file_that_ends_early_breaks_the_answer_off(tmp_path: Path) -> None:
    async def story() -> None:
        app = Answers(file_of(PICTURE, tmp_path), len(PICTURE) + 5)
        async with serving(app) as port, RawClient.to(port) as client:
            await client.head("/", method="GET")
            with pytest.raises((asyncio.IncompleteReadError, OSError)):
                await client.answer()
        assert [door.gone for door in app.doors] == ["broken"]

    run(story)


class Told:
    """A transport, and with how many calls it was told to write."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.pieces: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self.pieces.append(1)
        self._transport.write(data)

    def writelines(self, pieces: Sequence[bytes]) -> None:
        self.pieces.append(len(pieces))
        self._transport.writelines(pieces)


def test_a_large_body_that_is_there_leaves_with_its_head() -> None:
    told: list[Told] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        cycle = scope[EXCHANGE]
        told.append(Told(cycle._wire))
        cycle._wire = told[0]
        length = (b"content-length", str(len(PICTURE)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        halves = (PICTURE[:1_000_000], PICTURE[1_000_000:])
        await send({"type": "http.response.body", "pieces": halves})

    async def story() -> None:
        async with serving(app) as port, RawClient.to(port) as client:
            await client.head("/", method="GET")
            assert (await client.answer()).body == PICTURE

    run(story)
    assert told[0].pieces == [3]
