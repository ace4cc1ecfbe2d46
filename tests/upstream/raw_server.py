"""A server whose every byte a test decides: one script for each connection."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress


class Peer:
    """The server's end of one connection. ``number`` counts from 1 in order of arrival."""

    def __init__(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.number = number
        self.reader = reader
        self.writer = writer

    async def head(self) -> bytes:
        return await self.reader.readuntil(b"\r\n\r\n")

    async def request(self) -> tuple[bytes, bytes]:
        """One request, whole: head and body."""
        head = await self.head()
        found = re.search(rb"content-length: (\d+)", head.lower())
        return head, await self.reader.readexactly(int(found[1]) if found else 0)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self, body: bytes, *headers: str, status: str = "200 OK") -> None:
        lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers, "", ""]
        await self.send("\r\n".join(lines).encode() + body)

    def reset(self) -> None:
        """RST, not FIN."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def gone(self) -> None:
        """Returns when the client has closed."""
        with suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


class RawServer:
    def __init__(self) -> None:
        self.port = 0
        self.peers: list[Peer] = []

    @property
    def accepted(self) -> int:
        return len(self.peers)


Script = Callable[[Peer], Awaitable[None]]


@asynccontextmanager
async def raw_server(
    script: Script,
    tls: ssl.SSLContext | None = None,
    receive_buffer: int | None = None,
    port: int = 0,
) -> AsyncIterator[RawServer]:
    """Listens on loopback. A script that fails, other than by the client's leaving, fails the
    test when the block ends; one that still runs is cancelled."""
    server = RawServer()
    tasks: list[asyncio.Task[None]] = []

    async def run(peer: Peer) -> None:
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
                await script(peer)
        finally:
            peer.writer.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(len(server.peers) + 1, reader, writer)
        server.peers.append(peer)
        tasks.append(asyncio.ensure_future(run(peer)))

    listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    if receive_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    listening = await asyncio.start_server(connected, sock=listener, ssl=tls, limit=1 << 20)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listening.close()
        for task in tasks:
            if not task.done():
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for peer in server.peers:
            peer.writer.transport.abort()
        await listening.wait_closed()
        for result in results:
            if isinstance(result, Exception):
                raise result


async def hello(peer: Peer) -> None:
    """Answers every request with ``hello``."""
    while True:
        await peer.request()
        await peer.reply(b"hello")
