"""One client's connection, without a socket: what it reads, and whom it tells of its end."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from gateway.api.door import UNSENT, Door, Receive, Scope, Send, deliver
from gateway.protocol import UPLOAD_HIGH_WATER, Connection
from gateway.relay.flights import Head
from gateway.server import server


class Wire:
    """A transport that only remembers."""

    def __init__(self) -> None:
        self.reading = True
        self.closed = False
        self.written = b""

    def get_extra_info(self, name: str) -> None:
        return None

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def write(self, data: bytes) -> None:
        self.written += data

    def writelines(self, pieces: tuple[bytes, ...]) -> None:
        self.written += b"".join(pieces)

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True


class Story:
    """Takes a body in, and answers when it is told to."""

    def __init__(self, *headers: tuple[str, str], length: int | None = 2) -> None:
        self.head = Head(200, headers, length, lambda: iter_of(b"ok"))
        self.read = asyncio.Event()
        self.go_on = asyncio.Event()
        self.body = b""
        self.door: Door | None = None
        self.wire = Wire()
        config = server(self).config
        config.load()
        kind = cast(Any, config.http_protocol_class)
        self.connection: Connection = kind(
            config=config, server_state=server(self).server_state, app_state={}
        )
        self.connection.connection_made(cast(asyncio.Transport, self.wire))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.door = Door(scope, receive, send)
        self.body = b"".join([piece async for piece in self.door.body()])
        self.read.set()
        await self.go_on.wait()
        await self.door.send_head(self.head)
        await self.door.send_chunk(b"ok")
        await self.door.finish()
        self.door.stop_watching()

    async def end(self) -> None:
        self.go_on.set()
        await asyncio.gather(*self.connection.tasks, return_exceptions=True)


async def iter_of(content: bytes) -> Any:
    yield content


def head_of(length: int) -> bytes:
    return b"POST /v1/x HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % length


async def test_a_connection_that_the_last_piece_paused_is_read_on_for_its_end() -> None:
    story, body = Story(), b"x" * (UPLOAD_HIGH_WATER + 1)
    story.connection.data_received(head_of(len(body)))
    await asyncio.sleep(0)  # it waits for the body
    story.connection.data_received(body)
    assert not story.wire.reading
    await story.read.wait()
    assert (story.body == body, story.wire.reading) == (True, True)
    assert story.door is not None
    story.connection.connection_lost(None)
    assert story.door.client.gone.is_set()
    await story.end()


async def test_a_client_that_hangs_up_is_away_but_answered() -> None:
    story = Story()
    story.connection.data_received(head_of(1) + b"x")
    await story.read.wait()
    assert story.connection.eof_received() is True
    assert story.door is not None
    assert (story.door.client.away, story.door.client.gone.is_set()) == (True, False)
    await story.end()
    assert story.wire.written.endswith(b"\r\n\r\nok")
    assert b"connection: close\r\n" in story.wire.written


async def test_nobody_has_left_whose_answer_is_whole() -> None:
    story = Story()
    story.connection.data_received(head_of(1) + b"x")
    await story.read.wait()
    await story.end()
    story.connection.connection_lost(None)
    assert story.door is not None
    assert not story.door.client.gone.is_set()
    assert not story.connection.watching


async def test_an_answer_of_no_known_length_is_chunked() -> None:
    story = Story(length=None)
    story.connection.data_received(head_of(1) + b"x")
    await story.read.wait()
    await story.end()
    assert b"transfer-encoding: chunked\r\n" in story.wire.written
    assert story.wire.written.endswith(b"\r\n\r\n2\r\nok\r\n0\r\n\r\n")


@pytest.mark.parametrize("length", [1, 3])
async def test_an_answer_is_as_long_as_it_says(length: int) -> None:
    story = Story(length=length)
    story.connection.data_received(head_of(1) + b"x")
    await story.read.wait()
    await story.end()
    assert story.wire.closed


class Answerer:
    """An ASGI application that answers with one head."""

    def __init__(self, *headers: tuple[bytes, bytes]) -> None:
        self.headers = list(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        await send({"type": "http.response.body", "body": b"ok", "more_body": False})


@pytest.mark.parametrize(
    "header",
    [
        (b"x-a", b"b\r\nset-cookie: evil=1"),
        (b"x-a", b"b\nset-cookie: evil=1"),
        (b"x-a: b\r\nx-b", b"c"),
        (b"x-a", b"b\r\ntransfer-encoding: chunked"),
    ],
)
async def test_a_header_with_a_line_end_is_not_written(header: tuple[bytes, bytes]) -> None:
    story = Story()
    story.connection.app = Answerer((b"content-length", b"2"), header)
    story.connection.data_received(head_of(0))
    await asyncio.gather(*story.connection.tasks, return_exceptions=True)
    assert b"evil" not in story.wire.written
    assert b"200 OK" not in story.wire.written


async def test_what_nobody_will_read_of_a_body_is_dropped() -> None:
    story = Story()
    story.connection.app = Answerer((b"content-length", b"2"))
    story.connection.data_received(head_of(100_000) + b"x" * 50_000)
    cycle = cast(Any, story.connection.cycle)
    assert cycle._pieces
    await asyncio.gather(*story.connection.tasks, return_exceptions=True)
    assert story.wire.written.startswith(b"HTTP/1.1 200 OK")
    assert cycle._pieces == []


async def test_what_was_uploaded_is_dropped_with_its_connection() -> None:
    story = Story()
    story.connection.data_received(head_of(100_000) + b"x" * 50_000)
    cycle = cast(Any, story.connection.cycle)
    assert cycle._pieces
    story.connection.connection_lost(None)
    assert cycle._pieces == []
    await asyncio.gather(*story.connection.tasks, return_exceptions=True)


async def test_a_client_that_leaves_while_its_answer_waits_has_not_got_it() -> None:
    """A server says nothing of what it drops (uvicorn's ``send`` returns)."""
    sent: list[str] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message["type"])
        if message["type"] == "http.response.body" and not message.get("more_body"):
            door.client.leave()

    door = Door({"type": "http", "headers": [], UNSENT: lambda: 0}, receive, send)
    head = Head(200, (), 2, lambda: iter_of(b"ok"))
    await deliver("req_1", head, door)
    assert sent[-1] == "http.response.body"
    assert door.gone == "response"
    assert not door.delivered
