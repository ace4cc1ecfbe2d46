"""The socket transport against a server scripted byte by byte."""

from __future__ import annotations

import asyncio
import random
import re
import socket
import ssl
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from typing import TypeVar

import httpx
import pytest
import trustme

import gateway.upstream.resolution
from gateway.ports import Lent
from gateway.upstream.connection import PIECE_BYTES, SocketExchange, encode_head
from gateway.upstream.transport import SocketTransport
from gateway.upstream.wire import Exchange, Lost, NotSent, Origin, Reason, Timeouts, WireRequest
from tests.upstream.calls import (
    QUICK,
    ask,
    client_tls,
    fails,
    pieces,
    post,
    read_all,
    server_tls,
    slots,
    until,
)
from tests.upstream.raw_server import Peer, hello, raw_server
from tests.valkey import eventually

MB = 1024 * 1024
_T = TypeVar("_T")


@pytest.fixture
async def transport() -> AsyncIterator[SocketTransport]:
    made = SocketTransport(max_connections=10)
    yield made
    await made.aclose()


def scripted(*answers: bytes, close: bool = True) -> Callable[[Peer], Awaitable[None]]:
    """Reads a request, sends the answers, and closes (or waits for the client to)."""

    async def script(peer: Peer) -> None:
        await peer.request()
        for answer in answers:
            await peer.send(answer)
        if not close:
            await peer.gone()

    return script


# Answers


async def test_a_connection_is_used_again(transport: SocketTransport) -> None:
    async with raw_server(hello) as server:
        for _ in range(5):
            assert await ask(transport, post(server.port)) == (200, b"hello")
        assert server.accepted == 1
        assert slots(transport) == (1, 1)


async def test_the_request_arrives_as_it_was_made(transport: SocketTransport) -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def script(peer: Peer) -> None:
        seen.append(await peer.request())
        await peer.reply(b"", "X-Two: 1", "x-two: 2", status="204 No Content")

    async with raw_server(script) as server:
        body = [b"a" * 10, b"", b"b" * 200_000, b"c"]
        exchange = await transport.exchange(post(server.port, body, headers=(("a-b", "ü c"),)))
        assert exchange.status == 204
        assert await read_all(exchange) == b""
        assert [value for name, value in exchange.headers if name == b"x-two"] == [b"1", b"2"]
    head, got = seen[0]
    assert head == (
        b"POST /v1/images/generations HTTP/1.1\r\nhost: test\r\ncontent-length: 200011\r\n"
        b"a-b: \xfc c\r\n\r\n"
    )
    assert got == b"".join(body)


async def test_chunked_with_trailers_and_interim_answers(transport: SocketTransport) -> None:
    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            answer = (
                b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"4;ext=1\r\nwiki\r\n5\r\npedia\r\n0\r\nx-trailer: 1\r\n\r\n"
            )
            for index in range(len(answer)):
                await peer.send(answer[index : index + 1])

    async with raw_server(script) as server:
        for _ in range(2):
            exchange = await transport.exchange(post(server.port))
            assert exchange.headers == [(b"transfer-encoding", b"chunked")]
            assert await read_all(exchange) == b"wikipedia"
        assert server.accepted == 1


async def test_a_body_until_close(transport: SocketTransport) -> None:
    script = scripted(b"HTTP/1.1 200 OK\r\n\r\n", b"one ", b"two")
    async with raw_server(script) as server:
        assert await ask(transport, post(server.port)) == (200, b"one two")
        assert slots(transport) == (0, 0)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok!",
    ],
    ids=["close", "HTTP/1.0", "a second answer", "garbage behind"],
)
async def test_a_connection_that_is_not_kept(transport: SocketTransport, answer: bytes) -> None:
    async with raw_server(scripted(answer, close=False)) as server:
        for _ in range(2):
            assert await ask(transport, post(server.port)) == (200, b"ok")
            assert slots(transport) == (0, 0)
        assert server.accepted == 2


async def test_a_connection_is_not_kept_where_garbage_comes_behind_a_whole_piece(
    transport: SocketTransport,
) -> None:
    begun = asyncio.Event()
    end = b"\r\n0\r\n\r\n"
    size = PIECE_BYTES - len(b"ffff\r\n") - len(end)

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        await begun.wait()
        # By one read, of which what is good is all that is parsed at once.
        await peer.send(b"%x\r\n" % size + b"x" * size + end + b"!")
        await peer.request()

    async with raw_server(script) as server:
        for _ in range(2):
            begun.clear()
            exchange = await transport.exchange(post(server.port))
            begun.set()
            assert await read_all(exchange) == b"first" + b"x" * size
            assert slots(transport) == (0, 0)
        assert server.accepted == 2


async def test_a_redirect_is_an_answer(transport: SocketTransport) -> None:
    answer = b"HTTP/1.1 307 T\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n"
    async with raw_server(scripted(answer, close=False)) as server:
        assert await ask(transport, post(server.port)) == (307, b"")


# Answers that are none


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", Reason.DISCONNECT),
        (b"HTTP/1.1 200 OK\r\nconte", Reason.DISCONNECT),
        (b"HTTP/1.1 100 Continue\r\n\r\n", Reason.DISCONNECT),
        (b"SSH-2.0-OpenSSH\r\n", Reason.PROTOCOL),
        (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", Reason.PROTOCOL),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", Reason.PROTOCOL),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
            Reason.PROTOCOL,
        ),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nx", Reason.PROTOCOL),
        (b"HTTP/1.1 200 OK\r\na: " + b"x" * 70_000 + b"\r\n\r\n", Reason.PROTOCOL),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000 + b"\r\n", Reason.PROTOCOL),
        (b"HTTP/1.1 102 Processing\r\na: 012345678901234\r\n\r\n" * 4_000, Reason.PROTOCOL),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort", Reason.TRUNCATED),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel", Reason.TRUNCATED),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n", Reason.TRUNCATED),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", Reason.PROTOCOL),
    ],
    ids=[
        "nothing",
        "part of a header",
        "interim only",
        "not HTTP",
        "upgrade",
        "two lengths",
        "length and chunked",
        "unknown transfer encoding",
        "long header",
        "many headers",
        "many interim answers",
        "short",
        "chunk cut",
        "last chunk missing",
        "bad chunk",
    ],
)
async def test_what_is_not_an_answer(
    transport: SocketTransport, answer: bytes, reason: Reason
) -> None:
    async with raw_server(scripted(answer)) as server:
        assert await fails(transport, post(server.port)) is reason


async def test_a_chunk_extension_without_end(transport: SocketTransport) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5;")
        while True:
            await peer.send(b"x" * 1000)

    async with raw_server(script) as server:
        assert await fails(transport, post(server.port)) is Reason.PROTOCOL


@pytest.mark.parametrize("framing", ["sized", "chunked", "until close"])
async def test_an_answer_that_is_too_large(framing: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        if framing == "sized":
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10000000000\r\n\r\n")
            await peer.gone()  # refused by its announcement
            return
        chunked = framing == "chunked"
        header = b"transfer-encoding: chunked\r\n" if chunked else b""
        await peer.send(b"HTTP/1.1 200 OK\r\n" + header + b"\r\n")
        while True:
            await peer.send(b"3e8\r\n" + b"x" * 1000 + b"\r\n" if chunked else b"x" * 1000)

    transport = SocketTransport(max_response_bytes=100_000)
    async with raw_server(script) as server:
        assert await fails(transport, post(server.port)) is Reason.TOO_LARGE
    await transport.aclose()


# Breaks


async def test_a_reset_while_the_request_is_sent(transport: SocketTransport) -> None:
    length = 8 * MB
    for index in range(8):
        keep = 1 + index * length // 9

        async def script(peer: Peer, keep: int = keep) -> None:
            await peer.reader.readexactly(keep)
            peer.reset()

        async with raw_server(script, receive_buffer=65536) as server:
            body = [b"x" * 65536] * (length // 65536)
            reason = await fails(transport, post(server.port, body))
            # The kernel may have taken the whole body by then: a busy machine's, some 6 MB of it.
            assert reason is Reason.WRITE or (index > 1 and reason is Reason.DISCONNECT)


async def test_a_reset_after_the_request(transport: SocketTransport) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.reset()

    async with raw_server(script) as server:
        assert await fails(transport, post(server.port)) is Reason.DISCONNECT


async def test_a_connection_closed_while_idle_is_not_used(transport: SocketTransport) -> None:
    closed = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.reply(b"bye")
        if peer.number == 1:
            peer.writer.close()
            await peer.writer.wait_closed()
            closed.set()
        else:
            await peer.gone()

    async with raw_server(script) as server:
        assert await ask(transport, post(server.port)) == (200, b"bye")
        await closed.wait()
        assert await ask(transport, post(server.port)) == (200, b"bye")
        assert server.accepted == 2


async def test_a_close_that_the_loop_has_not_seen(transport: SocketTransport) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.reply(b"bye")
        await peer.gone()

    async with raw_server(script) as server:
        assert await ask(transport, post(server.port)) == (200, b"bye")
        raw = server.peers[0].writer.get_extra_info("socket")
        stolen = socket.socket(fileno=socket.dup(raw.fileno()))  # the loop does not run here
        stolen.shutdown(socket.SHUT_WR)
        stolen.close()
        assert await ask(transport, post(server.port)) == (200, b"bye")
        assert server.accepted == 2


async def test_closed_as_a_used_connection_is_written_to(transport: SocketTransport) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.reply(b"one")
        await peer.head()
        peer.writer.close()

    async with raw_server(script) as server:
        assert await ask(transport, post(server.port)) == (200, b"one")
        assert await fails(transport, post(server.port)) is Reason.DISCONNECT
        assert server.accepted == 1  # nothing was sent again


async def test_what_nobody_asked_for_closes_an_idle_connection(transport: SocketTransport) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.reply(b"ok")
        await peer.send(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
        await peer.gone()
        gone.set()

    gone = asyncio.Event()
    async with raw_server(script) as server:
        assert await ask(transport, post(server.port)) == (200, b"ok")
        await gone.wait()
        assert slots(transport)[1] == 0


async def test_idle_connections_are_closed_in_time() -> None:
    gone = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.reply(b"ok")
        await peer.gone()
        gone.set()

    transport = SocketTransport(idle_seconds=0.01)
    async with raw_server(script) as server:
        assert await ask(transport, post(server.port)) == (200, b"ok")
        await gone.wait()
        assert slots(transport) == (0, 0)
    await transport.aclose()


# Deadlines


async def test_no_headers(transport: SocketTransport) -> None:
    async with raw_server(scripted(close=False)) as server:
        request = post(server.port, timeouts=replace(QUICK, first_byte=0.05))
        assert await fails(transport, request) is Reason.READ_TIMEOUT
        request = post(server.port, timeouts=replace(QUICK, total=0.05))
        assert await fails(transport, request) is Reason.READ_TIMEOUT


async def test_a_body_that_stops(transport: SocketTransport) -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello"
    async with raw_server(scripted(answer, close=False)) as server:
        request = post(server.port, timeouts=replace(QUICK, first_byte=0.05, total=0.1))
        exchange = await transport.exchange(request)
        assert await exchange.read() == b"hello"
        with pytest.raises(Lost) as caught:
            await exchange.read()
        assert caught.value.reason is Reason.BODY_TIMEOUT
        assert slots(transport) == (0, 0)


async def test_a_body_that_drips(transport: SocketTransport) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await peer.send(b".")
            await asyncio.sleep(0.005)

    async with raw_server(script) as server:
        request = post(server.port, timeouts=replace(QUICK, total=0.1))
        assert await fails(transport, request) is Reason.BODY_TIMEOUT


async def test_an_answer_that_nobody_reads_ends_with_its_deadline(
    transport: SocketTransport,
) -> None:
    left = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        await peer.gone()
        left.set()

    async with raw_server(script) as server:
        exchange = await transport.exchange(post(server.port, timeouts=replace(QUICK, total=0.05)))
        await left.wait()
        assert slots(transport) == (0, 0)
        with pytest.raises(Lost):
            await exchange.read()


async def test_an_upstream_that_takes_no_more(transport: SocketTransport) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await asyncio.Event().wait()

    async with raw_server(script, receive_buffer=4096) as server:
        body = [b"x" * 65536] * 400
        request = post(server.port, body, timeouts=replace(QUICK, write=0.05))
        assert await fails(transport, request) is Reason.WRITE_TIMEOUT


# Before anything is sent


async def test_a_closed_port(transport: SocketTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(NotSent, match="refused") as caught:
        await ask(transport, post(port))
    assert caught.value.reason is Reason.CONNECT
    assert slots(transport) == (0, 0)


async def test_a_name_that_is_not_known(
    transport: SocketTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unknown(*args: object, **kwargs: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", unknown)
    with pytest.raises(NotSent) as caught:
        await ask(transport, post(1, host="no-such-host.invalid"))
    assert caught.value.reason is Reason.DNS


async def test_an_address_that_is_never_an_upstream_is_not_even_connected_to(
    transport: SocketTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(peer: Peer) -> None:
        raise AssertionError("nobody comes here")

    loopback = ip_address("127.0.0.1")
    monkeypatch.setattr(
        gateway.upstream.resolution, "is_never_an_upstream", lambda address: address == loopback
    )
    async with raw_server(script) as server:
        with pytest.raises(NotSent) as caught:
            await ask(transport, post(server.port))
        assert server.accepted == 0
    assert caught.value.reason is Reason.CONNECT
    assert "metadata service" in str(caught.value)
    assert slots(transport) == (0, 0)


async def test_a_name_is_asked_for_once_by_many_connections(
    transport: SocketTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    async def resolver(host: str, port: int, **kwargs: object) -> list[tuple[object, ...]]:
        asked.append(host)
        await asyncio.sleep(0)
        nobody, somebody = ("127.0.0.2", port), ("127.0.0.1", port)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", each) for each in (nobody, somebody)]

    closing = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"
    async with raw_server(scripted(closing)) as server:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolver)
        request = partial(post, server.port, host="upstream.invalid")
        answers = await asyncio.gather(*(ask(transport, request()) for _ in range(5)))
        assert answers == [(200, b"ok")] * 5
        assert asked == ["upstream.invalid"]
    for _ in range(2):
        with pytest.raises(NotSent, match="refused"):
            await ask(transport, request())
    assert asked == ["upstream.invalid"] * 2, "who finds nobody there lets the next one ask anew"


async def test_a_connection_is_not_late_because_the_loop_was(transport: SocketTransport) -> None:
    """It stands still for longer than the deadline, again and again, while the kernel connects."""
    async with raw_server(hello) as server:
        request = post(server.port, timeouts=replace(QUICK, connect=0.02))
        asked = asyncio.create_task(ask(transport, request))
        for _ in range(4):
            await asyncio.sleep(0)
            busy_until = time.perf_counter() + 0.03
            while time.perf_counter() < busy_until:
                pass
        assert await asked == (200, b"hello")


async def test_no_connection_in_time(
    transport: SocketTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def black_hole(*args: object, **kwargs: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", black_hole)
    with pytest.raises(NotSent) as caught:
        await ask(transport, post(9, timeouts=replace(QUICK, connect=0.02)))
    assert caught.value.reason is Reason.CONNECT_TIMEOUT
    assert slots(transport) == (0, 0)


async def test_a_body_that_cannot_be_begun_sends_nothing(transport: SocketTransport) -> None:
    async def unreadable() -> AsyncIterator[bytes]:
        if not received:
            raise OSError("disk")
        yield b""

    received: list[bytes] = []
    left = asyncio.Event()

    async def script(peer: Peer) -> None:
        received.append(await peer.reader.read(1))
        left.set()

    async with raw_server(script) as server:
        with pytest.raises(OSError, match="disk"):
            await transport.exchange(replace(post(server.port), body=unreadable()))
        assert slots(transport) == (0, 0)
        await left.wait()
    assert b"".join(received) == b""


@pytest.mark.parametrize(
    ("body", "length"), [([b"x" * 10, b"x" * 10], 25), ([b"x" * 10, b"x" * 10], 15)]
)
async def test_a_body_that_is_not_as_long_as_announced(
    transport: SocketTransport, body: list[bytes], length: int
) -> None:
    async with raw_server(hello) as server:
        assert await fails(transport, post(server.port, body, length=length)) is Reason.WRITE


async def test_a_body_that_breaks(transport: SocketTransport) -> None:
    async def breaking() -> AsyncIterator[bytes]:
        yield b"x" * 100
        raise OSError("disk")

    async with raw_server(hello) as server:
        request = replace(post(server.port, length=200), body=breaking())
        assert await fails(transport, request) is Reason.WRITE


@pytest.mark.parametrize(
    ("headers", "target"),
    [
        ((("x", "a\r\nb: c"),), "/"),
        ((("x", "a\0"),), "/"),
        ((("x y", "a"),), "/"),
        ((("", "a"),), "/"),
        ((("x", "日"),), "/"),
        ((), "/a b"),
        ((), "/a\r\nb"),
        ((), "a"),
    ],
)
def test_heads_that_cannot_be_written(headers: tuple[tuple[str, str], ...], target: str) -> None:
    origin = Origin(False, "h", 80)
    request = WireRequest("POST", origin, target, headers, None, 0, Timeouts())
    with pytest.raises(ValueError):
        encode_head(request)


def test_authorities() -> None:
    assert Origin(True, "a.test", 443).authority == "a.test"
    assert Origin(False, "a.test", 443).authority == "a.test:443"
    assert Origin(False, "::1", 80).authority == "[::1]"


# The pool


async def test_the_connection_used_last_is_used_next() -> None:
    gate = asyncio.Event()
    served: list[int] = []

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            served.append(peer.number)
            await gate.wait()
            await peer.reply(b"ok")

    transport = SocketTransport(max_connections=10)
    async with raw_server(script) as server:
        tasks = [asyncio.create_task(ask(transport, post(server.port))) for _ in range(3)]
        await until(lambda: len(served) == 3)
        gate.set()
        await asyncio.gather(*tasks)
        for _ in range(4):
            await ask(transport, post(server.port))
        assert len(set(served[3:])) == 1
        assert slots(transport) == (3, 3)
    await transport.aclose()
    assert slots(transport) == (0, 0)


async def test_waiters_are_served_in_order_and_the_late_are_refused() -> None:
    gate = asyncio.Event()
    seen: list[bytes] = []

    async def script(peer: Peer) -> None:
        while True:
            _, body = await peer.request()
            seen.append(body)
            await gate.wait()
            await peer.reply(b"ok")

    transport = SocketTransport(max_connections=1)
    async with raw_server(script) as server:
        tasks = [
            asyncio.create_task(ask(transport, post(server.port, b"%d" % index)))
            for index in range(5)
        ]
        await until(lambda: bool(seen))
        with pytest.raises(NotSent) as caught:
            await ask(transport, post(server.port, timeouts=replace(QUICK, pool=0.02)))
        assert caught.value.reason is Reason.POOL
        gate.set()
        await asyncio.gather(*tasks)
        assert seen == [b"0", b"1", b"2", b"3", b"4"]
        assert slots(transport) == (1, 1)
    await transport.aclose()


async def test_a_slot_handed_to_a_cancelled_waiter_goes_on() -> None:
    async with raw_server(hello) as server:
        transport = SocketTransport(max_connections=1)
        exchange = await transport.exchange(post(server.port))
        ((pool, *_),) = transport._homes.values()
        connection = await asyncio.wait_for(_after(exchange.read(), pool.take(1)), 5)
        assert connection is not None
        first = asyncio.create_task(pool.take(5))
        second = asyncio.create_task(pool.take(5))
        await until(lambda: pool.waiting == 2)
        pool.give(connection)  # to the first, who is cancelled before it wakes
        first.cancel()
        assert await second is connection
        assert first.cancelled()
        pool.give(connection)
        assert slots(transport) == (1, 1)
        await transport.aclose()


async def _after(before: Awaitable[object], then: Awaitable[_T]) -> _T:
    await before
    return await then


async def test_a_storm_of_cancellations_leaks_no_slot() -> None:
    """httpx's own pool is dead after this (money.md 8.2)."""
    chance = random.Random(38)

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            for part in (b"HTTP/1.1 200 OK\r\n", b"content-length: 6\r\n\r\n", b"abc", b"def"):
                await asyncio.sleep(0)
                await peer.send(part)

    async def call(transport: SocketTransport, port: int) -> None:
        exchange = await transport.exchange(post(port, [b"x" * 100] * 3))
        try:
            await read_all(exchange)
        finally:
            await exchange.aclose()

    transport = SocketTransport(max_connections=10)
    async with raw_server(script) as server:
        finished = 0
        for _ in range(100):
            tasks = [asyncio.create_task(call(transport, server.port)) for _ in range(38)]
            for task in chance.sample(tasks, len(tasks)):
                for _ in range(chance.choice((0, 0, 0, 1, 2, 3))):
                    await asyncio.sleep(0)
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            finished += results.count(None)
            assert all(isinstance(r, asyncio.CancelledError) for r in results if r is not None)
        owned, idle = slots(transport)
        assert owned == idle
        answers = [ask(transport, post(server.port)) for _ in range(10)]
        assert await asyncio.gather(*answers) == [(200, b"abcdef")] * 10
        assert slots(transport) == (10, 10)
        assert 0 < finished < 3_800
    await transport.aclose()
    assert slots(transport) == (0, 0)


async def test_cancellation_closes_the_socket(transport: SocketTransport) -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        asked.set()
        await peer.gone()
        left.set()

    async with raw_server(script) as server:
        task = asyncio.create_task(ask(transport, post(server.port)))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert slots(transport) == (0, 0)
        await left.wait()


async def test_an_ended_exchange_cannot_touch_its_connection(transport: SocketTransport) -> None:
    async with raw_server(hello) as server:
        old = await transport.exchange(post(server.port))
        assert await old.read() == b"hello"
        new = await transport.exchange(post(server.port))
        await old.aclose()
        assert await old.read() == b""
        assert await read_all(new) == b"hello"
        assert server.accepted == 1


async def test_a_closed_transport_breaks_what_runs_and_sends_no_more() -> None:
    asked = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        asked.set()
        await peer.gone()

    transport = SocketTransport()
    async with raw_server(script) as server:
        task = asyncio.create_task(ask(transport, post(server.port)))
        await asked.wait()
        await transport.aclose()
        with pytest.raises(Lost):
            await task
        with pytest.raises(NotSent):
            await ask(transport, post(server.port))


# Flow


async def test_an_early_answer_stops_the_upload(transport: SocketTransport) -> None:
    made = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal made
        while True:
            made += 1
            yield b"x" * 65536

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.reply(b"too large", status="413 Content Too Large")
        await asyncio.Event().wait()  # reads no more, and does not close

    async with raw_server(script, receive_buffer=65536) as server:
        request = replace(post(server.port, length=1 << 40), body=endless())
        assert await ask(transport, request) == (413, b"too large")
        assert made * 65536 < 20 * MB
        assert slots(transport) == (0, 0)


async def test_a_connection_with_half_a_request_is_never_used_again(
    transport: SocketTransport,
) -> None:
    """An answer that comes while the first piece is still being written: what is left of it would
    be the beginning of the next team's request."""
    answered = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        if peer.number > 1:
            await peer.reply(b"hello")
            return
        await peer.send(b"HTTP/1.1 429 Slow Down\r\ncontent-length: 5\r\n\r\n")
        await answered.wait()
        reading = asyncio.create_task(peer.reader.read())
        # Only where nothing waits to be written could the connection look free.
        await eventually(lambda: written(exchange))
        await peer.send(b"later")
        await reading

    def written(exchange: Exchange) -> bool:
        assert isinstance(exchange, SocketExchange)
        connection = exchange._connection
        return connection is None or connection.transport.get_write_buffer_size() == 0

    async def body() -> AsyncIterator[bytes]:
        yield b"x" * (8 * MB)

    async with raw_server(script, receive_buffer=65536) as server:
        request = replace(post(server.port, length=8 * MB), body=body())
        exchange = await transport.exchange(request)
        assert exchange.status == 429
        answered.set()
        assert await read_all(exchange) == b"later"
        assert await ask(transport, post(server.port)) == (200, b"hello")
        assert server.accepted == 2


async def test_an_upload_waits_for_the_upstream(transport: SocketTransport) -> None:
    made = 0
    full, go_on = asyncio.Event(), asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        nonlocal made
        for _ in range(20):
            made += 1
            yield b"x" * MB

    async def script(peer: Peer) -> None:
        await full.wait()
        assert made < 20
        go_on.set()
        head = await peer.head()
        assert b"content-length: 20971520" in head
        for _ in range(320):
            await peer.reader.readexactly(65536)
        await peer.reply(b"thanks")

    async with raw_server(script, receive_buffer=65536) as server:
        request = replace(post(server.port, length=20 * MB), body=body())
        tracemalloc.start()
        task = asyncio.create_task(ask(transport, request))
        await _until_still(lambda: made)
        (connection,) = transport._connections
        assert connection.write_paused
        held = connection.transport.get_write_buffer_size()
        assert held <= 2 * 65536
        full.set()
        await go_on.wait()
        assert await task == (200, b"thanks")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 6 * MB  # among it the test's own server, which keeps up to 2 MB


async def test_a_slow_consumer_pauses_the_upstream(transport: SocketTransport) -> None:
    sent = 0

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (20 * MB))
        piece = b"x" * 65536
        for _ in range(20 * MB // 65536):
            await peer.send(piece)
            sent += len(piece)
        await peer.gone()

    async with raw_server(script) as server:
        exchange = await transport.exchange(post(server.port))
        await _until_still(lambda: sent)
        assert 0 < sent < 20 * MB
        assert exchange._queued <= 2 * 256 * 1024  # type: ignore[attr-defined]
        tracemalloc.start()
        size = 0
        while chunk := await exchange.read():
            size += len(chunk)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert size == 20 * MB
        assert peak < 3 * MB
        assert slots(transport) == (1, 1)


async def _until_still(count: Callable[[], int]) -> None:
    """Returns once a counter has stopped, for many turns of the loop and some time."""
    seen, still = -1, 0
    while still < 20:
        await asyncio.sleep(0.005)
        still = still + 1 if count() == seen else 0
        seen = count()


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


async def test_tls(authority: trustme.CA) -> None:
    async def script(peer: Peer) -> None:
        for _ in range(2):
            _, body = await peer.request()
            await peer.reply(body)
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort")

    transport = SocketTransport(tls=client_tls(authority))
    big = b"x" * (3 * MB)
    async with raw_server(script, tls=server_tls(authority, "localhost")) as server:
        for body in (b"small", big):
            request = post(server.port, body, host="localhost", tls=True)
            assert await ask(transport, request) == (200, body)
        assert server.accepted == 1
        with pytest.raises(Lost) as caught:
            await ask(transport, post(server.port, host="localhost", tls=True))
        assert caught.value.reason is Reason.TRUNCATED
        assert slots(transport) == (0, 0)
    await transport.aclose()


@pytest.mark.parametrize("tls", [False, True])
async def test_a_lent_piece_has_left_before_the_next_is_asked_for(
    authority: trustme.CA, tls: bool
) -> None:
    sent = random.Random(3).randbytes(9 * MB + 1)
    buffer = bytearray(MB)

    async def body() -> AsyncIterator[bytes | Lent]:
        yield b"{"
        for at in range(0, len(sent), MB):
            piece = sent[at : at + MB]
            buffer[:] = bytes(MB)  # what is still to be sent of the last one would be zeros
            buffer[: len(piece)] = piece
            yield Lent(buffer, len(piece))
        buffer[:] = bytes(MB)
        yield b"}"

    async def script(peer: Peer) -> None:
        await peer.head()
        got = b""
        while len(got) < len(sent) + 2:
            got += await peer.reader.read(50_000)
            await asyncio.sleep(0)
        assert got == b"{" + sent + b"}"
        await peer.reply(b"thanks")

    transport = SocketTransport(tls=client_tls(authority))
    served = server_tls(authority, "localhost") if tls else None
    async with raw_server(script, tls=served, receive_buffer=65536) as server:
        asked = post(server.port, length=len(sent) + 2, host="localhost", tls=tls)
        assert await ask(transport, replace(asked, body=body())) == (200, b"thanks")
    await transport.aclose()


@pytest.mark.parametrize("fault", ["wrong name", "unknown authority", "no TLS"])
async def test_tls_that_cannot_be_trusted(authority: trustme.CA, fault: str) -> None:
    name = "elsewhere.test" if fault == "wrong name" else "localhost"
    trusted = trustme.CA() if fault == "unknown authority" else authority
    tls = None if fault == "no TLS" else server_tls(authority, name)

    async def script(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    transport = SocketTransport(tls=client_tls(trusted))
    async with raw_server(script, tls=tls) as server:
        with pytest.raises(NotSent) as caught:
            await ask(transport, post(server.port, host="localhost", tls=True))
        assert caught.value.reason is Reason.TLS
        assert isinstance(caught.value.__cause__, ssl.SSLError)
        assert slots(transport) == (0, 0)
    await transport.aclose()


# httpx above it


async def test_a_client_of_httpx() -> None:
    seen: list[bytes] = []

    async def script(peer: Peer) -> None:
        while True:
            head, _ = await peer.request()
            seen.append(head)
            await peer.reply(b'{"ok": true}', "content-type: application/json")

    async with (
        raw_server(script) as server,
        httpx.AsyncClient(transport=SocketTransport()) as client,
    ):
        url = f"http://127.0.0.1:{server.port}"
        assert (await client.get(f"{url}/a?b=c")).json() == {"ok": True}
        assert (await client.post(f"{url}/b", json={"x": 1})).json() == {"ok": True}
        upload = await client.post(
            url, content=pieces([b"x", b"y"]), headers={"content-length": "2"}
        )
        assert upload.status_code == 200
        async with client.stream("GET", url) as response:
            assert response.status_code == 200
        with pytest.raises(httpx.LocalProtocolError):
            await client.post(url, content=pieces([b"x"]))
        with pytest.raises(httpx.LocalProtocolError):
            await client.head(url)
        with pytest.raises(httpx.UnsupportedProtocol):
            await client.get("ftp://127.0.0.1/")
    assert seen[0].startswith(b"GET /a?b=c HTTP/1.1\r\n")
    assert re.search(rb"\r\nhost: 127.0.0.1:\d+\r\n", seen[0], re.IGNORECASE)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", httpx.RemoteProtocolError),
        (b"nonsense\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort", httpx.RemoteProtocolError),
        (None, httpx.ReadTimeout),
    ],
)
async def test_errors_of_httpx(answer: bytes | None, kind: type[Exception]) -> None:
    script = scripted(answer) if answer is not None else scripted(close=False)
    async with (
        raw_server(script) as server,
        httpx.AsyncClient(
            transport=SocketTransport(), timeout=httpx.Timeout(5, read=0.1)
        ) as client,
    ):
        with pytest.raises(kind):
            await client.get(f"http://127.0.0.1:{server.port}/")


async def test_errors_of_httpx_before_anything_is_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with httpx.AsyncClient(transport=SocketTransport()) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://127.0.0.1:{port}/")
    async with (
        raw_server(scripted(close=False)) as server,
        httpx.AsyncClient(
            transport=SocketTransport(max_connections=1), timeout=httpx.Timeout(5, pool=0.05)
        ) as client,
    ):
        url = f"http://127.0.0.1:{server.port}/"
        first = asyncio.create_task(client.get(url))
        await until(lambda: server.accepted == 1)
        with pytest.raises(httpx.PoolTimeout):
            await client.get(url)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
