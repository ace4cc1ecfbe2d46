"""Large answers of a Redis, in blocks as they come off the socket.

redis-py's reader copies each byte of a bulk string four times, into allocations that the system
has to map and clear anew each time: 2.7 MB in pieces of 256 KiB cost 3 ms and more of this process.
Here each byte is copied once, from a buffer that stays in the processor's cache.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from redis._parsers import _AsyncRESP2Parser
from redis._parsers.socket import SERVER_CLOSED_CONNECTION_ERROR
from redis.client import NEVER_DECODE
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse

IN_BLOCKS: Final = {NEVER_DECODE: True}
"""Options of a command whose answer is an array of bulk strings: each is a list of blocks where it
came over a ``BlockParser``, and ``bytes`` where redis-py's own parser read it."""
RECEIVE_BYTES = 256 * 1024
BLOCK_BYTES = 60 * 1024
"""Below what the allocator maps anew for each allocation (``cli/serve.py``)."""
MOST_LINE_BYTES = 32
"""Of ``*<count>`` and ``$<length>``."""

Bulk = list[bytes] | None


class BlockParser(_AsyncRESP2Parser):
    """redis-py's parser, which reads an answer that is asked for ``IN_BLOCKS`` in blocks.

    Everything else, errors among it, is read by redis-py. It stands between the transport and
    redis-py's stream, so TCP, TLS and Unix sockets are the same to it. ``received`` is where all
    connections of one client receive: nothing stays there beyond one call of the event loop.
    """

    __slots__ = ("_received", "_wire")

    def __init__(self, received: memoryview, socket_read_size: int) -> None:
        super().__init__(socket_read_size)
        self._received = received
        self._wire: _Wire | None = None

    def on_connect(self, connection: Any) -> None:
        super().on_connect(connection)  # type: ignore[no-untyped-call]
        transport = connection._writer.transport
        self._wire = _Wire(transport.get_protocol(), connection._reader, self._received)
        transport.set_protocol(self._wire)

    async def read_response(self, disable_decoding: bool = False) -> Any:
        if disable_decoding and self._wire is not None and self._connected:
            blocks = await self._wire.array()
            if blocks is not None:
                return blocks
        return await super().read_response(disable_decoding)


class _Wire(asyncio.BufferedProtocol):
    """What comes goes on to redis-py's stream, except an array that is waited for."""

    def __init__(self, inner: Any, stream: asyncio.StreamReader, received: memoryview) -> None:
        self._inner = inner
        self._stream = stream
        self._received = received
        self._array: _Array | None = None

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._received

    def buffer_updated(self, nbytes: int) -> None:
        came = self._received[:nbytes]
        rest = came if self._array is None else self._array.feed(came)
        if rest:
            self._stream.feed_data(rest)

    def eof_received(self) -> bool | None:
        self._broke()
        answer: bool | None = self._inner.eof_received()
        return answer

    def connection_lost(self, error: Exception | None) -> None:
        self._broke()
        self._inner.connection_lost(error)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    async def array(self) -> list[Bulk] | None:
        """None: what comes is no array, and is left to the stream. Raises redis-py's errors."""
        array = _Array()
        # What came while the command was still being sent. redis-py looks at it so too: there is
        # no public way.
        early: bytearray = self._stream._buffer  # type: ignore[attr-defined]
        if early and early[0] != ord("*"):
            return None
        if early:
            rest = array.feed(memoryview(await self._stream.read(len(early))))
            if rest:
                self._stream.feed_data(rest)
        if not array.done.done():
            self._array = array
            if self._stream.at_eof() or self._stream.exception() is not None:
                self._broke()
        try:
            return await array.done
        finally:
            self._array = None

    def _broke(self) -> None:
        if self._array is not None:
            self._array.fail(RedisConnectionError(SERVER_CLOSED_CONNECTION_ERROR))


class _Array:
    """One answer on its way. Memory is taken for what has come, not for what was announced."""

    def __init__(self) -> None:
        self.done: asyncio.Future[list[Bulk] | None] = asyncio.get_running_loop().create_future()
        self._line = bytearray()
        self._bulks: list[Bulk] = []
        self._count = -1
        self._blocks: list[bytes] = []
        self._left = 0
        """Bytes of a bulk string that are still to come, the line's end after it included."""

    def feed(self, came: memoryview) -> memoryview | bytes:
        """What of it is not this array's."""
        at, end = 0, len(came)
        while at < end and not self.done.done():
            at = self._bulk(came, at, end) if self._left else self._header(came, at, end)
            if at < 0:
                # No array: all that came so far is the stream's.
                self.done.set_result(None)
                return bytes(came)
            if len(self._bulks) == self._count and not self._left and not self.done.done():
                self.done.set_result(self._bulks)
        return came[at:]

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def _bulk(self, came: memoryview, at: int, end: int) -> int:
        stop = min(end, at + self._left - 2)
        for start in range(at, stop, BLOCK_BYTES):
            self._blocks.append(bytes(came[start : min(start + BLOCK_BYTES, stop)]))
        after = min(end, at + self._left)
        self._left -= after - at
        if not self._left:
            self._bulks.append(self._blocks)
            self._blocks = []
        return after

    def _header(self, came: memoryview, at: int, end: int) -> int:
        """Where the line ends, or all there is; -1 where this is no array."""
        if self._count < 0 and not self._line and came[at] != ord("*"):
            return -1
        some = bytes(came[at : at + MOST_LINE_BYTES])
        stop = some.find(b"\n") + 1
        self._line += some[:stop] if stop else some
        if stop:
            line = bytes(self._line)
            self._line.clear()
            self._begin(line)
        elif len(self._line) >= MOST_LINE_BYTES:
            self._refuse(bytes(self._line))
        return at + (stop or len(some))

    def _begin(self, line: bytes) -> None:
        kind, number = line[:1], line[1:-2]
        expected = b"*" if self._count < 0 else b"$"
        if kind != expected or not (number.isdigit() or number == b"-1"):
            self._refuse(line)
        elif kind == b"*":
            self._count = max(0, int(number))
        elif number == b"-1":
            self._bulks.append(None)
        else:
            self._left = int(number) + 2

    def _refuse(self, line: bytes) -> None:
        self.fail(InvalidResponse(f"Protocol Error: {line!r}"))


def receiver() -> memoryview:
    """Where the connections of one client receive."""
    return memoryview(bytearray(RECEIVE_BYTES))
