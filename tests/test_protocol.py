"""One client's connection, without a socket: what it reads, and whom it tells of its end."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest

from gateway import protocol
from gateway.api.door import UNSENT, Door, Receive, Scope, Send, deliver
from gateway.domain.errors import ClientGone, InvalidRequest
from gateway.ports import Lent
from gateway.protocol import (
    LENT_BYTES,
    MOST_PIPELINED,
    UPLOAD_HIGH_WATER,
    Connection,
    Inlet,
)
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

    def get_write_buffer_size(self) -> int:
        return 0

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


@pytest.mark.parametrize("before", [2, 3])
async def test_a_client_that_leaves_is_gone_for_the_request_before_its_last_one_too(
    before: int,
) -> None:
    story = Story()
    story.connection.data_received(before * (head_of(1) + b"x"))
    story.go_on.set()
    while story.wire.written.count(b"\r\n\r\nok") < before - 2:  # noqa: ASYNC110 - a turn at a time
        await asyncio.sleep(0)
    written, story.read = story.wire.written, asyncio.Event()
    story.connection.connection_lost(None)  # the last body but one was not asked for yet
    ended = await asyncio.gather(*story.connection.tasks, return_exceptions=True)
    assert {one.stage for one in ended if isinstance(one, ClientGone)} == {"upload"}
    assert (story.read.is_set(), story.wire.written) == (False, written)


async def test_no_request_that_was_answered_waits_for_the_end_of_its_connection() -> None:
    story = Story()
    story.go_on.set()
    story.connection.data_received(3 * (head_of(1) + b"x"))
    while tasks := list(story.connection.tasks):
        await asyncio.gather(*tasks)
    assert story.wire.written.count(b"\r\n\r\nok") == 3
    assert not story.connection.watching


async def test_no_more_requests_than_some_wait_in_one_connection() -> None:
    story = Story()
    story.connection.data_received((1 + MOST_PIPELINED) * (head_of(1) + b"x"))
    assert (len(story.connection.pipeline), story.wire.closed) == (MOST_PIPELINED, False)
    story.connection.data_received(head_of(1) + b"x")
    assert (len(story.connection.pipeline), story.wire.closed) == (MOST_PIPELINED, True)
    story.connection.connection_lost(None)
    await asyncio.gather(*story.connection.tasks, return_exceptions=True)
    assert (story.read.is_set(), story.wire.written) == (False, b"")


@pytest.mark.parametrize("requests", [1, 2])
async def test_noise_behind_a_request_is_not_heard_in_its_answer(requests: int) -> None:
    story = Story()
    story.connection.data_received(requests * (head_of(1) + b"x"))
    story.connection.data_received(b"\x00 no HTTP")
    story.connection.data_received(head_of(1) + b"x")
    await story.read.wait()
    assert story.wire.written == b""
    story.go_on.set()
    while tasks := list(story.connection.tasks):
        await asyncio.gather(*tasks)
    written = story.wire.written
    assert written.count(b"\r\n\r\nok") == written.count(b"HTTP/1.1 200") == requests
    assert (written.count(b"connection: close"), story.wire.closed) == (1, True)


async def test_noise_inside_a_request_is_refused_at_once() -> None:
    story = Story()
    story.connection.data_received(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nx")
    assert story.wire.written.startswith(b"HTTP/1.1 400")
    assert story.wire.closed
    story.connection.connection_lost(None)
    await story.end()


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
    assert not cycle._pieces


async def test_what_was_uploaded_is_dropped_with_its_connection() -> None:
    story = Story()
    story.connection.data_received(head_of(100_000) + b"x" * 50_000)
    cycle = cast(Any, story.connection.cycle)
    assert cycle._pieces
    story.connection.connection_lost(None)
    assert not cycle._pieces
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


class Whole:
    """Answers with one head, as the relayed routes do, and remembers what its ``send`` was told."""

    def __init__(self, head: Head, *, before: bool = False) -> None:
        self.head = head
        self.before = before
        self.heard: list[str] = []
        self.delivered = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def hears(message: Any) -> None:
            self.heard.append(message["type"])
            await send(message)

        door = Door(scope, receive, hears if self.before else send)
        async for _ in door.body():
            pass
        await deliver("req_1", self.head, door)
        self.delivered = door.delivered
        door.stop_watching()


def whole_head(*headers: tuple[str, str], status: int = 200) -> Head:
    return Head.of(status, (("content-type", "text/plain"), *headers), b"ok")


async def answered(whole: Whole, request: bytes = head_of(1) + b"x") -> tuple[Story, bytes]:
    story = Story()
    story.connection.app = whole
    story.connection.data_received(request)
    await asyncio.gather(*story.connection.tasks)
    return story, story.wire.written


async def test_a_small_answer_is_written_whole_as_message_by_message() -> None:
    head = whole_head(("x-cost-usd", "0.1"))
    _, at_once = await answered(Whole(head))
    heard = Whole(head, before=True)
    _, step_by_step = await answered(heard)
    assert len(heard.heard) == 3
    assert at_once == step_by_step
    assert at_once.endswith(b"x-cost-usd: 0.1\r\ncontent-length: 2\r\n\r\nok")


async def test_who_comes_between_hears_of_every_answer() -> None:
    """As the middleware for pages of other origins does, which adds headers of its own."""
    whole = Whole(whole_head(), before=True)
    await answered(whole)
    assert whole.heard[0] == "http.response.start"


@pytest.mark.parametrize(
    ("header", "status", "request_", "end"),
    [
        (("connection", "close"), 200, b"", b"\r\n\r\nok"),
        (("x-a", "b\r\nset-cookie: evil=1"), 200, b"", b"\r\n\r\nok"),
        (("x-a", "b\nevil: 1"), 200, b"", b"\r\n\r\nok"),
        (("x-a", "evil\x00"), 200, b"", b"\r\n\r\nok"),
        (("x-a", "evil \u00e9"), 200, b"", b"\r\n\r\nok"),
        (("X-A", "b"), 200, b"", b"\r\n\r\nok"),
        (("x-a", "b"), 200, b"HEAD /v1/x HTTP/1.1\r\nhost: a\r\n\r\n", b"\r\n\r\n"),
        (("x-a", "b"), 200, b"GET /v1/x HTTP/1.0\r\nhost: a\r\n\r\n", b"\r\n\r\nok"),
    ],
)
async def test_what_is_odd_of_an_answer_is_written_step_by_step(
    header: tuple[str, str], status: int, request_: bytes, end: bytes
) -> None:
    whole, other = (Whole(whole_head(header, status=status), before=b) for b in (False, True))
    request = request_ or head_of(1) + b"x"
    story, written = await answered(whole, request)
    other_story, step_by_step = await answered(other, request)
    assert (written, story.wire.closed) == (step_by_step, other_story.wire.closed)
    assert written.endswith(end)
    assert b"evil" not in written
    assert whole.delivered


async def test_a_small_answer_waits_behind_what_a_client_has_not_taken() -> None:
    story = Story()
    whole = Whole(whole_head())
    story.connection.app = whole
    story.connection.data_received(head_of(1) + b"x")
    story.connection.pause_writing()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert story.wire.written == b""
    story.connection.resume_writing()
    await asyncio.gather(*story.connection.tasks)
    assert story.wire.written.endswith(b"\r\n\r\nok")


TURNS = 100_000


async def until(condition: Callable[[], object]) -> None:
    for _ in range(TURNS):
        if condition():
            return
        await asyncio.sleep(0)
    raise TimeoutError("it does not come to that")


class Switching(Wire):
    """A wire whose protocol reads what a client sends, as loops do it."""

    def __init__(self) -> None:
        super().__init__()
        self.protocol: Any = None
        self.ended = False

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def write_eof(self) -> None:
        self.ended = True

    def is_reading(self) -> bool:
        return self.reading and not self.closed

    async def bring(self, content: bytes, piece_bytes: int) -> None:
        """Brings it, as far as it is read."""
        at = 0
        while at < len(content) and not self.closed:
            await until(self.is_reading)
            piece = content[at : at + piece_bytes]
            if isinstance(self.protocol, asyncio.BufferedProtocol):
                buffer = cast(memoryview, self.protocol.get_buffer(-1))
                piece = piece[: len(buffer)]
                buffer[: len(piece)] = piece
                self.protocol.buffer_updated(len(piece))
            else:
                self.protocol.data_received(piece)
            at += len(piece)
            await asyncio.sleep(0)


class Lender(Story):
    """Takes large bodies in by lent pieces, and answers each with its length; ``slowly`` it looks
    at a piece for some turns of the loop before it copies it."""

    def __init__(self, *, slowly: int = 0, most: int | None = None) -> None:
        super().__init__()
        self.slowly = slowly
        self.most = most
        self.lent = 0
        self.bodies: list[bytes] = []
        self.failed: list[Exception] = []
        self.wire = self.switching = Switching()
        self.switching.protocol = self.connection
        self.connection.connection_made(cast(asyncio.Transport, self.wire))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        door = self.door = Door(scope, receive, send)
        whole = b""
        try:
            body = door.lent_body()
            scope["headers"] = ()  # as those let go of them who have read them
            async for piece in body:
                for _ in range(self.slowly):
                    await asyncio.sleep(0)
                whole += bytes(piece)
                self.lent += isinstance(piece, Lent)
                if self.most is not None and len(whole) > self.most:
                    break
        except ClientGone as gone:
            self.failed.append(gone)
            return
        self.bodies.append(whole)
        said = b"%d\n" % len(whole)
        await door.send_head(Head(200, (), len(said), lambda: iter_of(said)))
        await door.send_chunk(said)
        await door.finish()
        door.stop_watching()


@pytest.mark.parametrize("slowly", [0, 3])
@pytest.mark.parametrize("piece_bytes", [50_000, 300_000, 1_000_000])
async def test_a_large_body_is_lent_and_what_is_behind_it_is_another_request(
    slowly: int, piece_bytes: int
) -> None:
    story, body = Lender(slowly=slowly), random.Random(1).randbytes(3_000_001)
    first, second = head_of(len(body)) + body, head_of(3) + b"abc"
    await story.switching.bring(first + first + second, piece_bytes)
    await until(lambda: len(story.bodies) == 3)
    await story.end()
    assert story.bodies == [body, body, b"abc"]
    assert story.lent >= 2
    assert story.switching.protocol is story.connection
    assert story.wire.written.count(b"200 OK") == 3


async def test_a_lent_piece_is_not_written_over_before_the_next_is_asked_for() -> None:
    story = Lender()
    pieces: list[tuple[Any, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async for piece in Door(scope, receive, send).lent_body():
            before = bytes(piece)
            for _ in range(20):
                await asyncio.sleep(0)
            pieces.append((piece, before))
            assert bytes(piece) == before
        await asyncio.Event().wait()

    story.connection.app = app
    body = random.Random(2).randbytes(4 * LENT_BYTES)
    await story.switching.bring(head_of(len(body)) + body, 100_000)
    await until(lambda: sum(len(before) for _, before in pieces) == len(body))
    assert b"".join(before for _, before in pieces) == body
    for task in story.connection.tasks:
        task.cancel()
    await story.end()


async def test_the_buffer_of_a_body_is_the_next_ones() -> None:
    story = Lender()
    seen: list[int] = []
    answered: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        door = Door(scope, receive, send)
        async for piece in door.lent_body():
            if isinstance(piece, Lent):
                seen.append(id(piece.buffer))
        await door.send_head(Head(200, (), 2, lambda: iter_of(b"ok")))
        await door.send_chunk(b"ok")
        await door.finish()
        answered.append(b"ok")

    story.connection.app = app
    kept = cast(Any, story.connection)._door.buffers
    body = b"x" * (2 * LENT_BYTES)
    for number in (1, 2):
        await story.switching.bring(head_of(len(body)) + body, 300_000)
        await until(lambda number=number: len(answered) == number)  # type: ignore[misc]
        assert len(kept._kept) == 1
    assert len(set(seen)) == 1
    await story.end()


@pytest.mark.parametrize("ends", ["answered", "lost"])
async def test_a_buffer_that_may_still_be_looked_at_is_nobody_elses(ends: str) -> None:
    """The last piece was not asked on from: it is dropped with the answer, or the connection."""
    story = Lender()
    held: list[Lent] = []
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        door = Door(scope, receive, send)
        body = door.lent_body()
        left = LENT_BYTES * 2
        while left:
            piece = await anext(aiter(body))
            left -= len(piece)
        assert isinstance(piece, Lent)
        held.append(piece)
        await go_on.wait()
        if ends == "answered":
            await door.send_head(Head(200, (), 2, lambda: iter_of(b"ok")))
            await door.send_chunk(b"ok")
            await door.finish()

    story.connection.app = app
    kept = cast(Any, story.connection)._door.buffers
    body = b"x" * (2 * LENT_BYTES)
    await story.switching.bring(head_of(len(body)) + body, 300_000)
    await until(lambda: held)
    cycle = cast(Any, story.connection.cycle)
    assert (kept._kept, cycle._read_into is held[0].buffer) == ([], True)
    if ends == "lost":
        story.connection.connection_lost(None)
    go_on.set()
    await story.end()
    assert (kept._kept, cycle._read_into) == ([], None)


@pytest.mark.parametrize("left", [1, 60_000, LENT_BYTES - 1, LENT_BYTES, LENT_BYTES + 1])
@pytest.mark.parametrize("waits", [0, 50])
async def test_a_large_body_may_wait_between_its_first_bytes_and_the_rest(
    left: int, waits: int
) -> None:
    """Before its first piece, as for a key that a store is asked for, or behind it."""
    bodies: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        whole = b""
        for _ in range(waits):
            await asyncio.sleep(0)
        async for piece in Door(scope, receive, send).lent_body():
            whole += bytes(piece)
            for _ in range(waits):
                await asyncio.sleep(0)
        bodies.append(whole)
        await asyncio.Event().wait()

    story = Lender()
    story.connection.app = app
    body = random.Random(3).randbytes(LENT_BYTES + left)
    request = head_of(len(body)) + body
    first = len(request) - LENT_BYTES
    await story.switching.bring(request[:first], first)
    await story.switching.bring(request[first:], LENT_BYTES)
    await until(lambda: bodies)
    assert bodies == [body]
    for task in story.connection.tasks:
        task.cancel()
    await story.end()


class Watched(Lender):
    """Has the body shown as it comes, and refuses it where it is told to."""

    def __init__(self, *, refused_at: int = -1, slowly: int = 0) -> None:
        super().__init__(slowly=slowly)
        self.refused_at = refused_at
        self.shown = b""
        self.sizes: list[int] = []

    def watch(self, piece: bytes | Lent) -> None:
        self.shown += bytes(piece)
        if 0 <= self.refused_at < len(self.shown):
            raise InvalidRequest("no", code="x", reason="invalid_param")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        door = self.door = Door(scope, receive, send)
        body = door.lent_body()
        body.show_to(self.watch)
        whole = b""
        try:
            async for piece in body:
                for _ in range(self.slowly):
                    await asyncio.sleep(0)
                whole += bytes(piece)
                self.sizes.append(len(whole))
                assert self.shown == whole
        except InvalidRequest as refusal:
            self.failed.append(refusal)
            return
        self.bodies.append(whole)
        await asyncio.Event().wait()

    async def stop(self) -> None:
        for task in self.connection.tasks:
            task.cancel()
        await self.end()


@pytest.mark.parametrize("slowly", [0, 3])
@pytest.mark.parametrize("first", [0, 1, 65_536, 200_001])
@pytest.mark.parametrize("piece_bytes", [50_001, 300_000, 2_000_000])
async def test_a_large_body_is_shown_once_and_in_its_order(
    monkeypatch: pytest.MonkeyPatch, piece_bytes: int, first: int, slowly: int
) -> None:
    """Each piece before it is handed out, and nothing is shown while one is."""
    monkeypatch.setattr(protocol, "GATHER_SECONDS", 60.0)
    story, body = Watched(slowly=slowly), random.Random(4).randbytes(4 * LENT_BYTES + 5)
    head = head_of(len(body))
    await story.switching.bring(head + body[:first], len(head) + first)
    await story.switching.bring(body[first:], piece_bytes)
    await until(lambda: story.bodies)
    await story.stop()
    assert story.bodies == [body]
    lent = [size for size in story.sizes[:-1] if size > first]
    assert sum(size % 65_536 == 0 for size in lent) >= 3


@pytest.mark.parametrize("refused_at", [0, 100_000, LENT_BYTES + 100_000])
async def test_what_is_refused_as_it_is_shown_is_refused_where_it_is_asked_for(
    refused_at: int,
) -> None:
    story, body = Watched(refused_at=refused_at), b"x" * (4 * LENT_BYTES)
    bringing = asyncio.create_task(story.switching.bring(head_of(len(body)) + body, 65_536))
    await until(lambda: story.failed)
    assert refused_at < len(story.shown) <= refused_at + 65_536
    bringing.cancel()
    await story.stop()
    assert story.bodies == []


async def test_what_has_come_of_a_lent_body_does_not_wait_for_all_that_fits() -> None:
    story, body = Watched(), b"x" * (3 * LENT_BYTES)
    await story.switching.bring((head_of(len(body)) + body)[: LENT_BYTES + 300_000], 65_536)
    await until(lambda: story.sizes and story.sizes[-1] > LENT_BYTES)
    rest = body[len(story.shown) :]
    await story.switching.bring(rest, 65_536)
    await until(lambda: story.bodies)
    await story.stop()
    assert story.bodies == [body]


async def test_the_buffer_of_a_lent_body_goes_with_its_last_piece() -> None:
    """uvloop holds on to a protocol that was replaced, for as long as the connection lives."""
    story, body = Lender(), b"x" * (3 * LENT_BYTES)
    inlets: list[Inlet] = []

    def set_protocol(protocol: Any) -> None:
        story.switching.protocol = protocol
        if isinstance(protocol, Inlet):
            inlets.append(protocol)

    story.switching.set_protocol = set_protocol  # type: ignore[method-assign]
    await story.switching.bring(head_of(len(body)) + body, 65_536)
    await until(lambda: story.bodies)
    await story.end()
    [inlet] = inlets
    assert len(inlet._buffer) == 0


async def test_a_lent_body_that_nobody_takes_is_not_read_on() -> None:
    story, body = Lender(slowly=2 * TURNS), b"x" * (8 * LENT_BYTES)
    bringing = asyncio.create_task(story.switching.bring(head_of(len(body)) + body, 65_536))
    for _ in range(1_000):
        await asyncio.sleep(0)
    assert not story.wire.reading
    assert not bringing.done()
    bringing.cancel()
    for task in story.connection.tasks:
        task.cancel()
    await story.end()


async def test_a_client_that_leaves_in_a_lent_body_is_gone() -> None:
    story, body = Lender(), b"x" * (4 * LENT_BYTES)
    await story.switching.bring((head_of(len(body)) + body)[: 2 * LENT_BYTES], 65_536)
    assert isinstance(story.switching.protocol, Inlet)
    cycle = cast(Any, story.connection.cycle)
    story.switching.protocol.connection_lost(None)
    await story.end()
    assert len(story.failed) == 1
    assert cycle._inlet is None


async def test_the_rest_of_a_lent_body_that_is_refused_is_read_and_thrown_away() -> None:
    story, body = Lender(most=LENT_BYTES), b"x" * (8 * LENT_BYTES)
    await story.switching.bring(head_of(len(body)) + body, 65_536)
    await story.end()
    assert b"connection: close" in story.wire.written
    assert story.wire.written.count(b"200 OK") == 1
    assert (story.switching.ended, story.wire.closed) == (True, False)
    assert story.switching.protocol is story.connection
    story.connection.connection_lost(None)


@pytest.mark.parametrize("header", [b"transfer-encoding: chunked", b"upgrade: h2c"])
async def test_a_body_that_only_the_parser_understands_is_not_lent(header: bytes) -> None:
    story, body = Lender(), b"x" * LENT_BYTES * 2
    if header.startswith(b"transfer"):
        request = b"POST / HTTP/1.1\r\nhost: a\r\n%b\r\n\r\n" % header
        request += b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        request = head_of(len(body)).replace(b"host: a", b"host: a\r\n" + header) + body
    await story.switching.bring(request, 65_536)
    await until(lambda: story.bodies)
    await story.end()
    assert (story.bodies, story.lent) == ([body], 0)


async def test_what_came_while_the_first_bytes_were_looked_at_is_refused_at_once() -> None:
    """The client sends no more then: nothing else would wake the one who asks."""
    story, body = Watched(refused_at=100_000, slowly=200), b"x" * (3 * LENT_BYTES)
    head = head_of(len(body))
    await story.switching.bring(head + body[:50_000], len(head) + 50_000)
    await story.switching.bring(body[:100_000], 50_000)
    await until(lambda: story.failed)
    assert len(story.shown) == 150_000
    await story.stop()


async def test_a_connection_that_has_ended_leaves_nothing_to_the_collector() -> None:
    story = Story()
    connection = story.connection
    connection.app = Answerer((b"content-length", b"2"))
    gc.disable()
    try:
        connection.data_received(head_of(2) + b"xx")
        await asyncio.gather(*connection.tasks)
        connection.connection_lost(None)
        left = [weakref.ref(one) for one in (connection, connection.flow)]
        del connection, story.connection
        assert [one() for one in left] == [None, None]
    finally:
        gc.enable()


class Raising:
    """An application that is no coroutine, and fails before it makes one."""

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("no door")


async def test_an_application_that_fails_before_it_begins_is_answered_for() -> None:
    story = Story()
    story.connection.app = cast(Any, Raising())
    story.connection.data_received(head_of(2) + b"xx")
    while story.connection.tasks:
        await asyncio.gather(*story.connection.tasks, return_exceptions=True)
    assert story.wire.written.startswith(b"HTTP/1.1 500 ")
    assert story.wire.closed
