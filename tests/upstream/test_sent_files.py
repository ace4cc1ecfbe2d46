"""What of a request stands in a file is sent to an upstream by the system, and comes to the same:
on the loop that serves (``TEST_LOOP=uvloop``) and on asyncio's."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import trustme

from gateway.domain.call import Edit, Span
from gateway.ports import Lent, LentFile, Parts
from gateway.relay import body as spools
from gateway.relay.body import Room, Spool, edited, edited_length
from gateway.upstream.connection import Connection
from gateway.upstream.transport import HttpxWire, SocketTransport
from gateway.upstream.wire import Lost, Reason, WireRequest
from tests.upstream.calls import QUICK, ask, client_tls, fails, post, server_tls, slots
from tests.upstream.raw_server import Peer, hello, raw_server

MB = 1024 * 1024
CONTENT = random.Random(5).randbytes(9 * MB + 1)


@pytest.fixture
async def transport() -> AsyncIterator[SocketTransport]:
    made = SocketTransport(max_connections=10)
    yield made
    await made.aclose()


@pytest.fixture
async def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Spool]:
    """Too large for its file to be kept for the next one."""
    monkeypatch.setattr(spools, "KEPT_FILE_BYTES", 0)
    made = Spool(Room(MB, 100 * MB, tmp_path), 0)
    await made.write(CONTENT)
    yield made
    made.close()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes the system sent, each time it was told to."""
    counts: list[int] = []
    send = Connection.send_file

    def counted(self: Connection, piece: LentFile, skip: int) -> int:
        counts.append(send(self, piece, skip))
        return counts[-1]

    monkeypatch.setattr(Connection, "send_file", counted)
    return counts


def of_file(port: int, spool: Spool, edits: tuple[Edit, ...] = ()) -> WireRequest:
    content = edited(spool, edits)
    assert not isinstance(content, Parts)
    asked = post(port, length=edited_length(spool.length, edits))
    return replace(asked, body=content)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def slowly(bodies: list[bytes]) -> Callable[[Peer], Awaitable[None]]:
    """Takes each body a little at a time."""

    async def script(peer: Peer) -> None:
        while True:
            head = await peer.head()
            left = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            whole = bytearray()
            while len(whole) < left:
                whole += await peer.reader.read(min(50_000, left - len(whole)))
                await asyncio.sleep(0)
            bodies.append(bytes(whole))
            await peer.reply(b"thanks")

    return script


async def test_it_arrives_as_it_was_edited(
    transport: SocketTransport, spool: Spool, sent: list[int]
) -> None:
    edits = (
        Edit(Span(100, 105), b"model"),
        Edit(Span(5 * MB, 5 * MB), b"more"),
        Edit(Span(len(CONTENT) - 70_000, len(CONTENT)), b"end"),
    )
    wanted = b"".join(
        (CONTENT[:100], b"model", CONTENT[105 : 5 * MB], b"more", CONTENT[5 * MB : -70_000], b"end")
    )
    bodies: list[bytes] = []
    async with raw_server(slowly(bodies), receive_buffer=65536) as server:
        for change in ((), edits, ()):
            assert await ask(transport, of_file(server.port, spool, change)) == (200, b"thanks")
        assert server.accepted == 1
    assert bodies == [CONTENT, wanted, CONTENT]
    # What is before the first edit, and what is left of the last piece, may be too little for it.
    assert sum(sent) > 3 * len(CONTENT) - 300_000


async def test_through_tls_it_is_read(spool: Spool, sent: list[int]) -> None:
    authority = trustme.CA()
    transport = SocketTransport(tls=client_tls(authority))
    bodies: list[bytes] = []
    tls = server_tls(authority, "localhost")
    async with raw_server(slowly(bodies), tls=tls, receive_buffer=65536) as server:
        asked = of_file(server.port, spool)
        secure = replace(asked, origin=asked.origin._replace(tls=True, host="localhost"))
        assert await ask(transport, secure) == (200, b"thanks")
    await transport.aclose()
    assert (bodies, sent) == ([CONTENT], [])


async def test_through_httpx_it_is_read(
    transport: SocketTransport, spool: Spool, sent: list[int]
) -> None:
    bodies: list[bytes] = []
    async with raw_server(slowly(bodies)) as server:
        exchange = await HttpxWire(transport).exchange(of_file(server.port, spool))
        assert await exchange.read() == b"thanks"
        await exchange.aclose()
    assert (bodies, sent) == ([CONTENT], [])


@pytest.mark.parametrize("fault", ["it would wait for the disk", "no NOWAIT", "EINVAL", "later"])
async def test_where_the_system_does_not_send_it_is_read(
    transport: SocketTransport, spool: Spool, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Because it must not wait here, or refuses, at once or in the middle."""
    calls = 0
    send = Connection.send_file

    def refuse(self: Connection, piece: LentFile, skip: int) -> int:
        nonlocal calls
        calls += 1
        if fault == "later" and calls < 4:
            return os.sendfile(self._descriptor, piece.fd, piece.at + skip, 100_001)
        if fault == "later" and calls > 8:
            return send(self, piece, skip)
        raise OSError(errno.EINVAL, "not with this file")

    monkeypatch.setattr(Connection, "send_file", refuse)
    if fault == "no NOWAIT":
        monkeypatch.setattr(spools, "_NOWAIT", None)
    elif fault == "it would wait for the disk":
        monkeypatch.setattr(spools._FilePiece, "is_at_hand", lambda piece: False)
    bodies: list[bytes] = []
    async with raw_server(slowly(bodies), receive_buffer=65536) as server:
        assert await ask(transport, of_file(server.port, spool)) == (200, b"thanks")
    assert bodies == [CONTENT]
    assert (calls > 0) == (fault in ("EINVAL", "later"))


async def test_an_early_answer_stops_it(transport: SocketTransport, spool: Spool) -> None:
    """And what is half sent is the end of its connection."""

    async def script(peer: Peer) -> None:
        if peer.number > 1:
            await hello(peer)
        await peer.head()
        await peer.reply(b"too large", status="413 Content Too Large")
        await asyncio.Event().wait()  # reads no more, and does not close

    before = descriptors()
    async with raw_server(script, receive_buffer=65536) as server:
        asked = of_file(server.port, spool)
        body = asked.body
        assert isinstance(body, AsyncIterator)
        assert await ask(transport, asked) == (413, b"too large")
        assert slots(transport) == (0, 0)
        assert await ask(transport, post(server.port)) == (200, b"hello")
        assert server.accepted == 2
    await transport.aclose()
    assert descriptors() <= before + 1  # the server's peers end a turn later


async def test_an_upstream_that_takes_no_more(transport: SocketTransport, spool: Spool) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await asyncio.Event().wait()

    async with raw_server(script, receive_buffer=4096) as server:
        asked = replace(of_file(server.port, spool), timeouts=replace(QUICK, write=0.05))
        assert await fails(transport, asked) is Reason.WRITE_TIMEOUT


async def test_cancelled_while_it_waits_for_room(
    transport: SocketTransport, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, left = asyncio.Event(), asyncio.Event()
    watched = Connection.watched_descriptor

    def watching(self: Connection) -> int:
        waits.set()
        return watched(self)

    async def script(peer: Peer) -> None:
        await peer.head()
        await waits.wait()
        await asyncio.sleep(0)
        task.cancel()
        await peer.gone()  # which takes that the socket is closed, and no copy of it open
        left.set()

    monkeypatch.setattr(Connection, "watched_descriptor", watching)
    async with raw_server(script, receive_buffer=65536) as server:
        task = asyncio.create_task(ask(transport, of_file(server.port, spool)))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert slots(transport) == (0, 0)
        await left.wait()


async def test_a_reset_while_it_is_sent(transport: SocketTransport, spool: Spool) -> None:
    for keep in (1, 70_000, MB):

        async def script(peer: Peer, keep: int = keep) -> None:
            await peer.reader.readexactly(keep)
            peer.reset()

        async with raw_server(script, receive_buffer=65536) as server:
            reason = await fails(transport, of_file(server.port, spool))
            assert reason in (Reason.WRITE, Reason.DISCONNECT)


async def test_a_file_that_cannot_be_read_is_not_begun(
    transport: SocketTransport, spool: Spool
) -> None:
    received: list[bytes] = []
    left = asyncio.Event()

    async def script(peer: Peer) -> None:
        received.append(await peer.reader.read(1))
        left.set()

    assert spool._file is not None
    os.truncate(spool._file.fd, 1_000)
    async with raw_server(script) as server:
        with pytest.raises(OSError, match="shorter"):
            await transport.exchange(of_file(server.port, spool))
        assert slots(transport) == (0, 0)
        await left.wait()
    assert received == [b""]


async def test_a_file_that_is_shorter_in_the_end_is_lost(
    transport: SocketTransport, spool: Spool
) -> None:
    assert spool._file is not None
    os.truncate(spool._file.fd, 8 * MB + 5)
    async with raw_server(slowly([])) as server:
        with pytest.raises(Lost) as caught:
            await ask(transport, of_file(server.port, spool))
        assert caught.value.reason is Reason.WRITE
        assert isinstance(caught.value.__cause__, OSError)
        assert slots(transport) == (0, 0)


async def test_a_piece_is_fetched_into_one_buffer(spool: Spool) -> None:
    buffers: set[int] = set()
    whole = b""
    content = spool.lent_slice(0, spool.length)
    async with aclosing(content):
        async for piece in content:
            assert isinstance(piece, Lent)
            assert isinstance(piece, LentFile)
            assert piece.is_at_hand()
            await piece.fetch()
            await piece.fetch()
            buffers.add(id(piece.buffer))
            whole += bytes(piece)
    assert whole == CONTENT
    assert len(buffers) == 1


async def test_without_a_free_descriptor_the_transport_waits_with_its_own(
    transport: SocketTransport, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(connection: Connection) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(Connection, "watched_descriptor", none)
    bodies: list[bytes] = []
    async with raw_server(slowly(bodies), receive_buffer=65536) as server:
        assert await ask(transport, of_file(server.port, spool)) == (200, b"thanks")
    assert bodies == [CONTENT]


async def test_after_a_reset_nothing_more_is_written(
    transport: SocketTransport, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of it when a piece is sent, the transport in a later turn of the loop."""
    fetched: list[LentFile] = []
    fetch = spools._FilePiece.fetch

    def breaks(connection: Connection, piece: LentFile, skip: int) -> int:
        assert connection._transport is not None
        connection._transport.abort()
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    async def counted(piece: spools._FilePiece) -> None:
        fetched.append(piece)
        await fetch(piece)

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.gone()

    monkeypatch.setattr(Connection, "send_file", breaks)
    monkeypatch.setattr(spools._FilePiece, "fetch", counted)
    async with raw_server(script) as server:
        assert await fails(transport, of_file(server.port, spool)) is Reason.WRITE
    assert len(fetched) <= 1
