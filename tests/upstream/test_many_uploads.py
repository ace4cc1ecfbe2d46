"""Many uploads at once, whose files and buffers go from one to the next: whatever fails meanwhile,
each upstream gets the bytes of who called it. On the loop that serves (``TEST_LOOP=uvloop``) and on
asyncio's."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trustme

from gateway.domain.call import Edit, Span
from gateway.ports import Lent, LentFile, Parts
from gateway.relay import body as spools
from gateway.relay import scratch
from gateway.relay.body import LENT_BYTES, Room, Spool, edited, edited_length
from gateway.relay.buffers import Buffers
from gateway.upstream.connection import Connection
from gateway.upstream.transport import SocketTransport
from gateway.upstream.wire import Exchange, Timeouts, WireError
from tests.upstream.calls import client_tls, post, read_all, server_tls
from tests.upstream.raw_server import Peer, hello, raw_server

MB = 1024 * 1024
UPLOADS, AT_ONCE = 80, 10
KEPT = 2 * MB
"""Larger files are sent by the system, and are not kept."""
PATIENCE = Timeouts(pool=30, connect=30, write=2, first_byte=2, total=30)
"""Of who calls: an upstream that takes nothing goes on a little later."""
STALL_SECONDS = 2.3


def content_of(number: int) -> bytes:
    noise = random.Random(number)
    return noise.randbytes(noise.choice((100_000, MB, MB + 7, noise.randrange(MB, 3 * MB))))


class Upstream:
    """Sees that all it gets, as far as it reads, is what one sent who says that it is ``number``;
    and answers, is slow, stops to read, answers early or resets, as it comes."""

    def __init__(self) -> None:
        self.chance = random.Random(1)
        self.whole: dict[int, int] = {}
        self.wrong: list[int] = []

    async def _read(self, peer: Peer, number: int, wanted: memoryview, upto: int, at: int) -> int:
        while at < upto:
            piece = await peer.reader.read(min(self.chance.randrange(1, 200_000), upto - at))
            if piece != wanted[at : at + len(piece)]:
                self.wrong.append(number)
            if not piece:
                break
            at += len(piece)
            await asyncio.sleep(self.chance.choice((0, 0, 0.003)))
        return at

    async def __call__(self, peer: Peer) -> None:
        while True:
            head = await peer.head()
            fields = dict(line.split(b": ", 1) for line in head[:-4].split(b"\r\n")[1:])
            number, left = int(fields[b"number"]), int(fields[b"content-length"])
            wanted = memoryview(b"model" + content_of(number)[5:] + b"end")
            kind, at = self.chance.random(), 0
            ends = self.chance.randrange(left) if kind < 0.5 else left

            read = partial(self._read, peer, number, wanted)
            at = await read(ends, at)
            if at == left:
                self.whole[number] = self.whole.get(number, 0) + 1
                await peer.reply(b"%d" % number, *(("connection: close",) if kind > 0.9 else ()))
            elif kind < 0.15:
                with suppress(AttributeError):  # it has left already
                    peer.reset()
                return
            elif kind < 0.3:  # half of its answer is here before it reads on
                reply = b"%d" % number
                await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(reply))
                await asyncio.sleep(0.03)
                at = await read(min(left, at + 100_000), at) if self.chance.random() < 0.5 else at
                await peer.send(reply)
                await read(left, at)
                return
            else:  # it takes nothing for as long as anybody waits, and then what has left
                await asyncio.sleep(STALL_SECONDS)
                await read(left, at)
                return


@pytest.fixture
async def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Room]:
    for module in (spools, scratch):
        monkeypatch.setattr(module, "KEPT_FILE_BYTES", KEPT)
    connected = Connection.connection_made

    def with_little_room(self: Connection, transport: asyncio.BaseTransport) -> None:
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        connected(self, transport)

    monkeypatch.setattr(Connection, "connection_made", with_little_room)
    made = Room(0, 1000 * MB, tmp_path)
    yield made
    made.close()
    assert (made.memory_used, made.disk_used) == (0, 0)


def open_files(folder: Path) -> int:
    links = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return sum(str(folder) in link for link in links)


async def upload(room: Room, buffers: Buffers, number: int) -> Spool:
    """Read into buffers that the next one is read into."""
    content, spool = content_of(number), Spool(room, 0, for_request=True)
    buffer, first = buffers.take(MB), random.Random(number).randrange(100)
    try:
        await spool.write(content[:first])
        for at in range(first, len(content), MB - 100):
            piece = content[at : at + MB - 100]
            buffer[100 : 100 + len(piece)] = piece
            await spool.write(Lent(buffer, len(piece), 100))
    except BaseException:
        spool.close()
        raise
    buffers.give_back(buffer)
    return spool


async def follow(spool: Spool, content: bytes) -> None:
    """Reads it as well, at the same time, in both ways; or leaves in the middle."""
    at = 0
    async with aclosing(spool.lent_slice(0, spool.length)) as pieces:
        async for piece in pieces:
            if isinstance(piece, LentFile):
                await piece.fetch()
            await asyncio.sleep(0.001)
            assert bytes(piece) == content[at : at + len(piece)]
            at += len(piece)
            if at > len(content) // 2 and at % 3:
                break


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_each_upstream_gets_what_its_client_sent(
    room: Room, tls: bool, tmp_path: Path
) -> None:
    authority, upstream, buffers = trustme.CA(), Upstream(), Buffers(MB)
    transport = SocketTransport(max_connections=2 * AT_ONCE, tls=client_tls(authority))
    chance, places = random.Random(2), asyncio.Semaphore(AT_ONCE)
    ended: list[str] = []

    async def call(number: int, port: int) -> None:
        async with places:
            try:
                async with asyncio.timeout(0.004 if chance.random() < 0.1 else None):
                    spool = await upload(room, buffers, number)
            except TimeoutError:
                ended.append("left")
                return
            content = content_of(number)
            others = [asyncio.create_task(follow(spool, content)) for _ in range(number % 3)]
            edits = (
                Edit(Span(0, 5), b"model"),
                Edit(Span(len(content), len(content)), b"end"),
            )
            for _ in range(3):
                body = edited(spool, edits)
                assert not isinstance(body, Parts)
                length = edited_length(len(content), edits)
                asked = post(port, length=length, headers=(("number", str(number)),))
                asked = replace(asked, body=body, timeouts=PATIENCE)
                if tls:
                    asked = replace(asked, origin=asked.origin._replace(tls=True, host="localhost"))
                patience = 0.05 if chance.random() < 0.1 else None
                try:
                    async with asyncio.timeout(patience):
                        async with aclosing(body):  # what is not sent yet may still be sent
                            exchange = await transport.exchange(asked)
                        assert await read_all(exchange) == b"%d" % number
                except (WireError, TimeoutError) as error:
                    ended.append(type(error).__name__)
                else:
                    ended.append("answered")
                    break
            await asyncio.gather(*others)
            spool.close()

    secured = server_tls(authority, "localhost") if tls else None
    async with raw_server(upstream, tls=secured, receive_buffer=65536) as server:
        async with asyncio.TaskGroup() as group:
            for number in range(UPLOADS):
                group.create_task(call(number, server.port))
        await transport.aclose()
    assert upstream.wrong == []
    # How many, depends on how fast this machine is.
    assert ended.count("answered") > UPLOADS // 4
    assert len(set(ended)) >= 2, set(ended)
    assert len(upstream.whole) > UPLOADS // 4
    assert (room.memory_used, room.disk_used) == (0, 0)
    buffers.close()
    room.close()
    assert open_files(tmp_path) == 0


async def test_what_waits_in_a_transport_is_not_read_over(room: Room) -> None:
    """An upstream that answers before it has read: a piece is half sent, and nobody waits for it
    any more. The next upload has another buffer."""
    content, others, got = b"a" * (2 * MB - 5), b"b" * (2 * MB - 5), bytearray()
    go_on = asyncio.Event()

    async def early(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
        await go_on.wait()
        while len(got) < LENT_BYTES and (piece := await peer.reader.read(65536)):
            got.extend(piece)
        await peer.send(b"ok")

    async def sent(transport: SocketTransport, port: int, content: bytes) -> Exchange:
        spool = Spool(room, 0, for_request=True)
        await spool.write(content)
        body = edited(spool, ())
        assert not isinstance(body, Parts)
        async with aclosing(body):
            asked = post(port, length=len(content))
            exchange = await transport.exchange(replace(asked, body=body))
        spool.close()
        return exchange

    transport = SocketTransport(max_connections=5)
    async with (
        raw_server(early, receive_buffer=4096) as first,
        raw_server(hello) as second,
    ):
        held = await sent(transport, first.port, content)
        for _ in range(5):
            assert await read_all(await sent(transport, second.port, others)) == b"hello"
        go_on.set()
        assert await read_all(held) == b"ok"
        await transport.aclose()
    assert len(got) >= LENT_BYTES
    assert set(got) == {ord("a")}


async def test_a_call_that_waits_for_its_picture_keeps_no_buffer(room: Room) -> None:
    """Its body was sent, and stays on the disk in case it has to be sent again."""
    held, content = [], bytes(2 * MB)
    tracemalloc.start()
    try:
        for _ in range(10):
            spool = Spool(room, 0, for_request=True)
            await spool.write(content)
            held.append(spool)
            async with aclosing(spool.lent_slice(0, spool.length)) as pieces:
                async for piece in pieces:
                    assert isinstance(piece, LentFile)
                    await piece.fetch()
        assert tracemalloc.get_traced_memory()[0] < MB
    finally:
        tracemalloc.stop()
    for spool in held:
        spool.close()
