"""One HTTP/1.1 connection, and the exchange that runs on it.

``Connection`` is the socket's side (asyncio calls it), ``SocketExchange`` the request's side (the
parser and the caller call it). They know each other only while an exchange runs: one that has
ended can no longer touch the connection, which may already serve somebody else.

Deadlines are timers that break the exchange, not cancellations: a cancelled task is then always
the caller's doing.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import chain
from typing import cast

import httptools

from gateway.ports import Lent, LentFile, Take
from gateway.upstream.deadlines import Deadlines
from gateway.upstream.wire import Lost, Reason, WireRequest

MAX_HEAD_BYTES = 64 * 1024
PIECE_BYTES = 60 * 1024
"""What is kept of a body is in pieces of at most so much, below the 64 KB from which `gateway
serve` has malloc map new pages: 16 page faults for an answer of 2.7 MB, instead of 250 to 650, and
30 % of its CPU."""
READ_BYTES = 4 * PIECE_BYTES
"""Read at a time, into one buffer of all connections of a transport: what is read is copied before
the next read. asyncio would take 256 KB for each read, of each of hundreds of answers that land at
once, and leave holes where it gives most of it back; a buffer of each connection's own costs its
size for each call that waits."""
READ_HIGH_WATER = 64 * 1024
"""Bytes of body kept for a slow consumer before the socket is no longer read."""
FILE_BYTES = 64 * 1024
"""From so many bytes on a piece that stands in a file is sent by the system."""
TURN_BYTES = 2 * 1024 * 1024
"""A peer that is fast enough takes no more than so much in one turn of the loop."""
WRITE_PIECE = 64 * 1024
"""A longer piece is cut: the socket's buffer would hold all of what it cannot send."""
KEEPALIVE_IDLE_SECONDS = 60
"""A picture takes minutes of silence; middleboxes forget a silent connection earlier."""

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_FORBIDDEN = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_LINES = re.compile(r"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]++: [^\x00-\x08\x0a-\x1f\x7f]*+\r\n)*+")
_TARGET = re.compile(r"/[!-~]*")


def encode_head(request: WireRequest) -> bytes:
    """The request line and the headers. Raises ``ValueError``, which never shows a value."""
    return written_head(request.method, request.target, request.headers) + b"\r\n"


def written_head(method: str, target: str, headers: Sequence[tuple[str, str]]) -> bytes:
    """As ``encode_head``, without the empty line at the end."""
    if not _TARGET.fullmatch(target) or not _TOKEN.fullmatch(method):
        raise ValueError("the request line cannot be written as HTTP/1.1")
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers])
    names = "".join([name for name, _ in headers])
    # All at once, and one by one only where something is wrong: a third of the time. As many lines
    # as headers: no value holds another header.
    good = _LINES.fullmatch(lines) and _TOKEN.fullmatch(names)
    if not good or lines.count("\n") != len(headers):
        for name, value in headers:
            if not _TOKEN.fullmatch(name) or _FORBIDDEN.search(value):
                raise ValueError(f"the header {name!r} cannot be written as HTTP/1.1")
    try:
        return f"{method} {target} HTTP/1.1\r\n{lines}".encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError("a header holds characters outside Latin-1") from None


class Connection(asyncio.BufferedProtocol):
    """One socket, read into ``buffer``, which others read into as well. ``on_closed`` is called
    once, when it is closed for whatever reason."""

    __slots__ = (
        "_buffer",
        "_descriptor",
        "_is_plain",
        "_on_closed",
        "_transport",
        "closed",
        "exchange",
        "write_paused",
    )

    def __init__(self, buffer: memoryview, on_closed: Callable[[Connection], None]) -> None:
        self._buffer = buffer
        self._on_closed = on_closed
        self._descriptor = -1
        self._is_plain = False
        self._transport: asyncio.Transport | None = None
        self.exchange: SocketExchange | None = None
        self.closed = False
        self.write_paused = False

    @property
    def transport(self) -> asyncio.Transport:
        assert self._transport is not None, "connected before use"
        return self._transport

    @property
    def is_made(self) -> bool:
        """Whether there is a peer, whose certificate is good where it has one."""
        return self._transport is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have asyncio's methods, and are no subclass of its class.
        self._transport = connected = cast(asyncio.Transport, transport)
        if self.closed:  # given up while it was being made
            connected.abort()
            return
        # What the socket does not take at once is waited for: a lent piece is then done with. At 0
        # asyncio's TLS would pause for nothing, and does not hold less than all of a piece.
        self._is_plain = transport.get_extra_info("sslcontext") is None
        connected.set_write_buffer_limits(high=0 if self._is_plain else 1)
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):  # not on macOS
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS)
        self._descriptor = raw.fileno()

    def get_buffer(self, sizehint: int) -> memoryview:
        """All of the buffer for a body, which is cut into pieces here."""
        if self.exchange is not None and self.exchange.status:
            return self._buffer
        return self._buffer[:PIECE_BYTES]

    def buffer_updated(self, nbytes: int) -> None:
        if self.exchange is None:
            self.abort()  # nobody asked: a late 408, or the rest of something worse
        else:
            self.exchange.receive(self._buffer[:nbytes])

    def eof_received(self) -> None:
        if self.exchange is not None:
            self.exchange.end_of_stream()
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._transport = None
        if self.exchange is not None:
            self.exchange.connection_lost(exc)
        self._on_closed(self)

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.exchange is not None:
            self.exchange.writable()

    def is_fresh(self) -> bool:
        """Whether a request may go out here: open, and nothing has come since the last answer.

        The event loop may not have seen yet that the peer closed, so the socket itself is asked:
        a paid request lost on a stale connection would have to be booked as bought.
        """
        if self.closed:
            return False
        poll = select.poll()  # for each look: 0.3 us, and 300 bytes less in each that waits
        poll.register(self._descriptor, select.POLLIN)
        return not poll.poll(0)

    def may_send_file(self, piece: LentFile) -> bool:
        """Whether the system may send it now, past the transport: nothing waits before it, and it
        would not wait for a disk."""
        return (
            self._is_plain
            and piece.size >= FILE_BYTES
            and not self.is_ending
            and piece.is_at_hand()
        )

    def send_file(self, piece: LentFile, skip: int) -> int:
        """Has the system send what is behind the first ``skip`` bytes, as far as the socket takes
        it; how many bytes that was. Raises ``OSError``, ``BlockingIOError`` where it takes none."""
        if self.is_ending:
            raise ConnectionResetError  # its descriptor may be another's by now
        return os.sendfile(self._descriptor, piece.fd, piece.at + skip, piece.size - skip)

    @property
    def is_ending(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._transport is None or self._transport.is_closing()

    @property
    def waits_to_write(self) -> bool:
        """Whether the transport has something that the socket has not taken."""
        return self._transport is None or self._transport.get_write_buffer_size() > 0

    def watched_descriptor(self) -> int:
        """The socket once more, for who watches it himself: loops refuse a transport's own."""
        return os.dup(self._descriptor)

    def abort(self) -> None:
        """Closes at once, without waiting for the peer. May be repeated."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()


class SocketExchange:
    """One request and its answer on one connection: the port ``Exchange``.

    ``let_go`` is called once: with the connection when that can serve again.
    """

    __slots__ = (
        "_announced",
        "_at_once",
        "_chunks",
        "_complete",
        "_connection",
        "_deadlines",
        "_error",
        "_extra",
        "_head_bytes",
        "_interim",
        "_keep_alive",
        "_let_go",
        "_loop",
        "_max_body_bytes",
        "_parser",
        "_paused",
        "_queued",
        "_reader",
        "_received",
        "_sending",
        "_silent_bytes",
        "_status",
        "_take",
        "_taker_failed",
        "_total_at",
        "_until_close",
        "_writer",
        "deadline",
        "headers",
        "is_in_sized_body",
    )

    def __init__(
        self,
        connection: Connection,
        let_go: Callable[[Connection | None], None],
        max_body_bytes: int,
        deadlines: Deadlines,
        first_byte_at: float,
        total_at: float,
    ) -> None:
        """What is ``_at`` is an instant of the event loop's clock."""
        self._loop = asyncio.get_running_loop()
        self._connection: Connection | None = connection
        self._let_go = let_go
        self._max_body_bytes = max_body_bytes
        self._total_at = total_at
        # Made with the first bytes of the answer: who waits for that has no need of it (900 bytes).
        self._parser: httptools.HttpResponseParser | None = None
        self.headers: list[tuple[bytes, bytes]]
        """Made with the parser."""
        self._status = 0
        self._chunks: deque[bytes] | tuple[()] = ()
        self._queued = 0
        self._received = 0
        self._announced = 0
        self._head_bytes = 0
        self._silent_bytes = 0
        self._at_once = 0
        self._interim = False
        self._keep_alive = False
        self._until_close = False
        self._sending = True
        self._paused = False
        self._complete = False
        self._extra = False
        self._error: Lost | None = None
        self.is_in_sized_body = False
        """What comes next is body for sure: it needs no parser."""
        self._take: Callable[[bytes], bool] | None = None
        self._taker_failed: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self.deadline = min(first_byte_at, total_at)
        self._deadlines = deadlines
        deadlines.watch(self)
        connection.exchange = self

    # The caller's side.

    @property
    def status(self) -> int:
        """0 before the final headers."""
        return self._status

    async def send(
        self,
        head: bytes,
        first: bytes | Lent,
        rest: AsyncIterator[bytes | Lent] | None,
        length: int,
        write_seconds: float,
    ) -> None:
        """Writes the request. Stops early, without an error, when the answer comes first.

        ``first`` is the body's first piece, already read. A lent piece has left before the next is
        asked for. Raises ``Lost``.
        """
        left = length - len(first)
        if isinstance(first, bytes) and len(first) <= WRITE_PIECE:
            self._write(head + first)  # one packet for a small request
        else:
            self._write(head)
            await self._write_all(first, write_seconds)
            if self._is_answered:
                # Perhaps not all of it has left: this connection must not be used again.
                return
        if rest is not None:
            async for chunk in rest:
                left -= len(chunk)
                if left < 0:
                    break
                await self._write_all(chunk, write_seconds)
                if self._is_answered:
                    return
        if left:
            raise self._fail(Reason.WRITE, "the request's body is not as long as announced")
        self._sending = False

    def news(self) -> asyncio.Future[None] | None:
        """What is to be awaited until there may be final headers; None where there are. No
        coroutine: it would be one more that waits for each picture. Raises ``Lost``."""
        if self._status:
            self._reader = None
            return None
        if self._error is not None:
            raise self._error
        self._reader = self._loop.create_future()
        return self._reader

    async def read(self, take: Take | None = None) -> bytes:
        while True:
            while not self._chunks:
                if self._error is not None:
                    raise self._error
                if self._complete:
                    return b""
                await self._wait_for_reader(take)
            chunk = self._next_chunk()
            if take is None or not take(chunk):
                return chunk

    def _next_chunk(self) -> bytes:
        assert isinstance(self._chunks, deque), "on_body makes it"
        chunk = self._chunks.popleft()
        self._queued -= len(chunk)
        if self._paused and self._queued <= READ_HIGH_WATER // 2 and self._connection is not None:
            self._paused = False
            self._connection.transport.resume_reading()
        return chunk

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        """As ``aclose``: drops the connection if the exchange still has it."""
        if self._connection is not None:
            self._fail(Reason.TRUNCATED, "the exchange was closed before its end")
        self._chunks = ()
        self._queued = 0

    # The connection's side.

    def receive(self, data: memoryview) -> None:
        """``data`` is the caller's again when this returns: the parser copies what it hands on."""
        if self.is_in_sized_body:
            self._receive_sized(data)
            return
        # The parser makes one piece of what it is given.
        for start in range(0, len(data), PIECE_BYTES):
            end = start + PIECE_BYTES
            self._parse(data[start:end], more=end < len(data))
            if self._connection is None:
                return

    def _parse(self, data: memoryview, *, more: bool) -> None:
        """``more``: something has come behind it."""
        parser = self._parser
        if parser is None:
            parser = self._parser = httptools.HttpResponseParser(self)
            self.headers = []
        before = self._received
        try:
            parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self._complete:
                self._fail(Reason.PROTOCOL, "the answer is not valid HTTP/1.1", error)
                return
            self._extra = True  # something behind a whole answer: deliver it, trust no further
        if max(self._received, self._announced) > self._max_body_bytes:
            self._fail(Reason.TOO_LARGE, "the answer is too large")
            return
        if self._complete:
            self._extra = self._extra or more
            self._end()
            return
        # Headers, trailers and chunk extensions that never end are kept by the parser, unseen.
        self._silent_bytes = self._silent_bytes + len(data) if self._received == before else 0
        if self._silent_bytes > MAX_HEAD_BYTES:
            self._fail(Reason.PROTOCOL, "the answer's headers are too large")
            return
        self.is_in_sized_body = self._status != 0 and self._received < self._announced
        self._hold_back()

    def end_of_stream(self) -> None:
        if self._until_close:
            self._complete = True
            self._end()
        else:
            self.connection_lost(None)

    def connection_lost(self, cause: Exception | None) -> None:
        if self._status:
            self._fail(Reason.TRUNCATED, "the connection ended before the answer did", cause)
        elif self._sending:
            self._fail(Reason.WRITE, "the connection broke while the request was sent", cause)
        else:
            self._fail(Reason.DISCONNECT, "the connection ended before an answer came", cause)

    def writable(self) -> None:
        if self._writer is not None:
            _wake(self._writer)

    # The parser's side. What is raised here comes out of feed_data as HttpParserCallbackError.

    def on_message_begin(self) -> None:
        if self._complete:
            raise ValueError("a second answer to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        # Counted when the head is whole, and until then as what came without being body: one call
        # a header instead of five.
        if not self._status:
            self.headers.append((name, value))
        else:  # a trailer
            self._count_head(((name, value),))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        self._count_head(self.headers)
        if status < 200:
            if status == 101:
                raise ValueError("switched to a protocol that nobody asked for")
            self._interim = True
            self.headers.clear()
            return
        sized = False
        headers = self.headers = [(name.lower(), value) for name, value in self.headers]
        for name, value in headers:
            if name == b"content-length":
                sized = True
                self._announced = int(value)  # digits, says the parser
            elif name == b"transfer-encoding":
                if value.strip().lower() != b"chunked":
                    raise ValueError("an unknown transfer encoding")
                sized = True
        self._until_close = not sized and status not in (204, 304)
        self._keep_alive = self._parser.should_keep_alive()
        self._status = status
        self.deadline = self._total_at
        self._wake()

    def on_body(self, body: bytes) -> None:
        self._received += len(body)
        if self._take is not None and self._is_taken(body):
            return
        self._queued += len(body)
        if isinstance(self._chunks, deque):
            self._chunks.append(body)
        else:
            self._chunks = deque((body,))
        if self._reader is not None:
            _wake(self._reader)

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
        else:
            self._complete = True

    # Inside.

    def _receive_sized(self, data: memoryview) -> None:
        """A body of known length, as it comes: of 45 pieces the parser has seen the first."""
        left = self._announced - self._received
        if len(data) > left:
            self._extra = True  # something behind a whole answer: trust no further
            data = data[:left]
        for start in range(0, len(data), PIECE_BYTES):
            self.on_body(bytes(data[start : start + PIECE_BYTES]))
        if self._received == self._announced:
            self._complete = True
            self._end()
        else:
            self._hold_back()

    def _hold_back(self) -> None:
        if self._queued > READ_HIGH_WATER and not self._paused:
            assert self._connection is not None
            self._paused = True
            self._connection.transport.pause_reading()

    def _is_taken(self, piece: bytes) -> bool:
        """Hands a piece over where it is received: an answer of 45 pieces wakes its task once, not
        20 times. What goes wrong there is raised where it was asked for."""
        assert self._take is not None
        try:
            if self._take(piece):
                return True
        except Exception as error:  # noqa: BLE001 - it is raised where the piece was asked for
            self._taker_failed = error
        self._take = None  # what comes behind a piece that was not taken has to wait behind it
        return False

    @property
    def _is_answered(self) -> bool:
        return self._status != 0

    def _write(self, data: bytes | memoryview) -> None:
        if self._connection is not None:
            self._connection.transport.write(data)

    async def _write_all(self, chunk: bytes | Lent, write_seconds: float) -> None:
        if not isinstance(chunk, bytes):
            await self._drain(write_seconds)
            sent = 0
            if isinstance(chunk, LentFile):
                sent = await self._send_file(chunk, write_seconds)
                if sent == chunk.size or self._is_answered:
                    return
                await chunk.fetch()
            if not self._is_answered:
                self._write(chunk.view[sent:])
                await self._drain(write_seconds)
            return
        view = memoryview(chunk)
        for start in range(0, len(chunk), WRITE_PIECE):
            await self._drain(write_seconds)
            if self._is_answered:
                return
            self._write(view[start : start + WRITE_PIECE])

    async def _send_file(self, piece: LentFile, write_seconds: float) -> int:
        """Has the system send it; how many bytes of it. What is left is to be written: the
        transport finds out what is wrong, and says so. Raises ``Lost``."""
        sent = 0
        connection = self._connection
        if connection is None or connection.waits_to_write or not connection.may_send_file(piece):
            return 0
        while sent < piece.size and not self._is_answered:
            if self._error is not None:
                raise self._error
            try:
                count = connection.send_file(piece, sent)
            except BlockingIOError:
                try:
                    descriptor = connection.watched_descriptor()
                except OSError:  # none is left: the transport waits with its own
                    break
                await self._wait_for_room(descriptor, write_seconds)
            except OSError:
                break
            else:
                if count == 0:  # the file is shorter than it was
                    break
                sent += count
                self._at_once += count
        if self._at_once >= TURN_BYTES:
            self._at_once = 0
            await asyncio.sleep(0)
        return sent

    async def _wait_for_room(self, descriptor: int, write_seconds: float) -> None:
        self._at_once = 0
        try:
            self._loop.add_writer(descriptor, self.writable)
            try:
                await self._wait_for_writer(write_seconds)
            finally:
                self._loop.remove_writer(descriptor)
        finally:
            os.close(descriptor)

    async def _drain(self, write_seconds: float) -> None:
        """Waits until the socket takes more, or the answer is here. Raises ``Lost``."""
        while True:
            if self._is_answered:
                return
            if self._error is not None:
                raise self._error
            connection = self._connection
            if connection is None or not (connection.write_paused or connection.is_ending):
                return
            # A transport that could not write ends in a later turn; until then it takes anything.
            await self._wait_for_writer(write_seconds)

    async def _wait_for_writer(self, write_seconds: float) -> None:
        self._writer = self._loop.create_future()
        timer = self._loop.call_later(write_seconds, self._write_expired)
        try:
            await self._writer
        finally:
            timer.cancel()
            self._writer = None

    async def _wait_for_reader(self, take: Take | None = None) -> None:
        assert self._reader is None, "one reader at a time"
        self._reader = self._loop.create_future()
        self._take = take
        try:
            await self._reader
        finally:
            self._reader = self._take = None
        if self._taker_failed is not None:
            raise self._taker_failed

    def _write_expired(self) -> None:
        self._fail(Reason.WRITE_TIMEOUT, "the upstream stopped taking the request")

    def expire(self) -> None:
        """Its deadline is past."""
        if self._status:
            self._fail(Reason.BODY_TIMEOUT, "the answer was not whole in time")
        else:
            self._fail(Reason.READ_TIMEOUT, "no answer came in time")

    def _end(self) -> None:
        """The answer is whole: the connection is free before the caller has read it all."""
        connection = self._connection
        assert connection is not None
        reusable = (
            self._keep_alive
            and not self._until_close
            and not self._extra
            and not self._sending
            and connection.transport.get_write_buffer_size() == 0
        )
        if self._paused:
            self._paused = False
            connection.transport.resume_reading()
        self._leave(reusable)

    def _fail(self, reason: Reason, message: str, cause: BaseException | None = None) -> Lost:
        error = Lost(reason, message)
        error.__cause__ = cause
        if self._connection is not None:
            self._error = error
            self._leave(reusable=False)
        return error

    def _leave(self, reusable: bool) -> None:
        connection = self._connection
        assert connection is not None
        self._connection = None
        self._parser = None  # it and this object hold each other
        self._deadlines.forget(self)
        connection.exchange = None
        if not reusable:
            connection.abort()
        self._let_go(connection if reusable else None)
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None:
            _wake(self._reader)
        if self._writer is not None:
            _wake(self._writer)

    def _count_head(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._head_bytes += 4 * len(headers) + sum(map(len, chain.from_iterable(headers)))
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("headers too large")


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
