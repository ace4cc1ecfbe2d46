"""One client's connection: uvicorn's protocol, and what it does not do.

It answers clients that close their sending half, it lets a client that is still uploading read why
it was refused, it refuses what is no HTTP in the shape of every other error, it drops one that
takes nothing any more, and it says so when there is no room for it. It tells who answers when the
client leaves, so that nobody has to wait for that, and it writes an answer with a third of
uvicorn's calls.
"""

from __future__ import annotations

import asyncio
import re
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, cast

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.protocols.utils import get_remote_addr

from gateway.api.door import ABORT, CLOSED, HUNG_UP, STALLED, UNSENT, WATCH, Message, Scope
from gateway.api.errors import no_http, no_room
from gateway.relay.moment import Moment

LINGER_SECONDS = 10.0
LINGER_BYTES = 256 * 1024 * 1024
"""How much of a refused upload is read and thrown away, so that the refusal arrives."""
TURNED_AWAY = 16
"""How many connections without a place may be open, to hear that there is none."""
UPLOAD_HIGH_WATER = 256 * 1024
"""Bytes of a request's body that may wait before the socket is no longer read: one read of the
loop's may bring so many, and to stop and go for each costs two system calls."""

_HEAD = re.compile(
    rb"HTTP/1\.1 [^\r\n]*\r\n"
    rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+: [^\x00-\x08\x0a-\x1f\x7f]*\r\n)*+"
)


class _Lingering:
    """A transport whose ``close`` waits for a client that is still sending.

    Closing a socket with unread bytes resets it, and the reset overtakes the answer: the client
    would see a broken connection, and send the same upload again.
    """

    def __init__(self, transport: asyncio.Transport, linger: Callable[[], bool]) -> None:
        self._transport = transport
        self._linger = linger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        if self._transport.is_closing() or not self._linger():
            self._transport.close()


class Flow(FlowControl):
    """uvicorn's, without an ``asyncio.Event`` for a client that hardly ever makes anybody wait."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.read_paused = False
        self.write_paused = False
        self._writable: Moment | None = None

    async def drain(self) -> None:
        if self._writable is not None:
            await self._writable.wait()

    def pause_writing(self) -> None:
        if not self.write_paused:
            self.write_paused = True
            self._writable = Moment()

    def resume_writing(self) -> None:
        if self._writable is not None:
            self.write_paused = False
            self._writable.set()
            self._writable = None


class Door:
    """How many connections a server may have; those beyond it are turned away."""

    def __init__(self, limit: int | None, refused: Callable[[], None]) -> None:
        self.limit = limit
        self.refused = refused
        self._away: OrderedDict[asyncio.Transport, None] = OrderedDict()

    def turn_away(self, transport: asyncio.Transport) -> None:
        """Tells a connection that there is no room. It may stay until it has read that, or until
        too many others are told the same."""
        self.refused()
        self._away[transport] = None
        transport.write(no_room())
        transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_SECONDS, transport.close)
        if len(self._away) > TURNED_AWAY:
            oldest, _ = self._away.popitem(last=False)
            oldest.abort()

    def left(self, transport: asyncio.Transport) -> None:
        self._away.pop(transport, None)

    def close(self) -> None:
        for transport in self._away:
            transport.abort()


class Cycle(RequestResponseCycle):
    """One request and its answer. The ASGI messages are uvicorn's; a head is checked as a whole
    instead of header by header, and pieces of an upload are handed on as they came: uvicorn adds
    each to a buffer and copies that again (four copies of a 20 MB upload; here it is two)."""

    def __init__(self, connection: Connection, scope: Scope, *, keep_alive: bool) -> None:
        super().__init__(
            scope=cast(Any, scope),
            transport=connection.transport,
            flow=connection.flow,
            logger=connection.logger,
            access_logger=connection.access_logger,
            access_log=False,
            default_headers=connection.server_state.default_headers,
            message_event=cast(Any, Moment()),
            expect_100_continue=connection.expect_100_continue,
            keep_alive=keep_alive,
            on_response=connection.on_response_complete,
        )
        self.hung_up = Moment()
        self._connection = connection
        self._wire = connection.wire
        self._pieces: list[bytes] = []
        self._waiting_bytes = 0
        self._left: Callable[[], None] | None = None
        self._away: Callable[[], None] | None = None
        scope[HUNG_UP] = self.hung_up
        scope[WATCH] = self.watch
        scope[STALLED] = self.is_stalled
        if connection.holds_what_it_writes:
            scope[UNSENT] = connection.wire.get_write_buffer_size

    def watch(self, left: Callable[[], None], away: Callable[[], None]) -> Callable[[], None]:
        """Has ``left`` called when the client's connection ends before the answer does, and
        ``away`` when it closes its sending half; at once where that has happened. Returns what
        ends this."""
        self._left, self._away = left, away
        self._connection.watching.append(self)
        # The last piece of a body may have paused it, and an end that is not read is not seen.
        self.flow.resume_reading()
        if self.hung_up.is_set():
            away()
        if self.disconnected:
            left()
        return self._unwatch

    def _unwatch(self) -> None:
        self._left = self._away = None
        if self in self._connection.watching:
            self._connection.watching.remove(self)

    def lose(self) -> None:
        """The connection has ended."""
        if not self.response_complete:
            self.disconnected = True
            if self._left is not None:
                self._left()
        self.message_event.set()

    def hang_up(self) -> None:
        """The client has closed its sending half."""
        self.keep_alive = False
        self.hung_up.set()
        if self._away is not None:
            self._away()

    def is_stalled(self) -> bool:
        """Whether the next message has to wait until the client takes more."""
        return self.flow.write_paused and not self.disconnected

    def take(self, piece: bytes) -> None:
        """A piece of the request's body."""
        self._pieces.append(piece)
        self._waiting_bytes += len(piece)
        if self._waiting_bytes > UPLOAD_HIGH_WATER:
            self.flow.pause_reading()
        self.message_event.set()

    def drop_body(self) -> None:
        """What came of it and nobody will read: the rest of this waits for the collector."""
        self._pieces = []
        self._waiting_bytes = 0

    async def receive(self) -> Any:
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self._wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waiting_for_100_continue = False
        if not self.disconnected and not self.response_complete:
            self.flow.resume_reading()
            await self.message_event.wait()
            self.message_event = cast(Any, Moment())
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        pieces, self._pieces, self._waiting_bytes = self._pieces, [], 0
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: Any) -> None:
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if self.response_complete:
            raise RuntimeError(f"{message['type']} behind the end of the answer")
        wanted = "http.response.body" if self.response_started else "http.response.start"
        if message["type"] != wanted:
            raise RuntimeError(f"{message['type']} where {wanted} was expected")
        if self.response_started:
            pieces = message.get("pieces") or (message.get("body", b""),)
            self._write_body(pieces, more=message.get("more_body", False))
        else:
            self._write_head(message)

    def _write_head(self, message: Message) -> None:
        self.response_started = True
        self.waiting_for_100_continue = False
        status: int = message["status"]
        lines = [STATUS_LINE[status]]
        closes = False
        headers = (*self.default_headers, *message.get("headers", ()))
        names = b"".join([name for name, _ in headers])
        if names != names.lower():
            # ASGI wants them in lower case, and so nearly everybody writes them.
            headers = tuple((name.lower(), value) for name, value in headers)
        for name, value in headers:
            if name == b"content-length" and self.chunked_encoding is None:
                self.expected_content_length = int(value)
                self.chunked_encoding = False
            elif name == b"transfer-encoding" and value.lower() == b"chunked":
                self.expected_content_length = 0
                self.chunked_encoding = True
            elif name == b"connection" and b"close" in _tokens(value):
                self.keep_alive = False
                closes = True
            lines += (name, b": ", value, b"\r\n")
        written = len(headers)
        if not self.keep_alive and not closes:
            written += 1
            lines.append(b"connection: close\r\n")
        bodiless = self.scope["method"] == "HEAD" or status in (204, 304)
        if self.chunked_encoding is None and not bodiless:
            self.chunked_encoding = True
            written += 1
            lines.append(b"transfer-encoding: chunked\r\n")
        head = b"".join(lines)
        # Counted too: a value with a line end in it would be a header of somebody else's.
        if head.count(b"\n") != 1 + written or not _HEAD.fullmatch(head):
            raise RuntimeError("a header of the answer cannot be written as HTTP")
        self._wire.write(head + b"\r\n")

    def _write_body(self, pieces: Sequence[bytes], *, more: bool) -> None:
        size = sum(map(len, pieces))
        if self.scope["method"] == "HEAD":
            self.expected_content_length = 0
        elif self.chunked_encoding:
            if size:
                self._wire.writelines((b"%x\r\n" % size, *pieces, b"\r\n"))
            if not more:
                self._wire.write(b"0\r\n\r\n")
        else:
            self.expected_content_length -= size
            if self.expected_content_length < 0:
                raise RuntimeError("the answer is longer than its Content-Length")
            if size:
                self._wire.writelines(pieces)
        if not more:
            if self.expected_content_length != 0:
                raise RuntimeError("the answer is shorter than its Content-Length")
            self.response_complete = True
            self.drop_body()
            self.message_event.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()


def _holds_what_it_writes(transport: asyncio.Transport) -> bool:
    uvloops = type(transport).__module__.startswith("uvloop")
    return uvloops and transport.get_extra_info("sslcontext") is None


def _tokens(value: bytes) -> list[bytes]:
    return [token.lower().strip() for token in value.split(b",")]


class Connection(HttpToolsProtocol):
    """One client's connection."""

    # Beside uvicorn's 28 attributes: with more than 30 each connection has a dictionary of its own.
    __slots__ = (
        "_closed",
        "_idle_since",
        "_lingers",
        "_turned_away",
        "_unwanted_bytes",
        "holds_what_it_writes",
        "watching",
        "wire",
    )
    _door: Door | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pipeline = cast(Any, [])  # a deque takes 760 bytes, and few clients pipeline
        self._closed = Moment()
        self._turned_away = False
        self._unwanted_bytes = 0
        self._lingers: asyncio.TimerHandle | None = None
        self._idle_since: float | None = None
        self.watching: list[Cycle] = []
        """Requests whose answerers want to hear of the client's end: several, where it
        pipelines."""
        self.wire: asyncio.Transport
        """The socket's own transport; ``transport`` is what may linger."""
        self.holds_what_it_writes: bool
        """Whether pieces that are written wait as they are, uncopied, until the client takes them.
        asyncio joins what it is given into a buffer of its own, and TLS encrypts all of it at
        once."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn's, which also asks the system for the socket's own address."""
        self.wire = transport
        self.holds_what_it_writes = _holds_what_it_writes(transport)
        door = self._door
        if door is not None and door.limit is not None and len(self.connections) >= door.limit:
            self._turned_away = True
            door.turn_away(transport)
            return
        self.connections.add(self)
        self.transport = cast(asyncio.Transport, _Lingering(transport, self._linger))
        self.flow = Flow(self.transport)
        self.client = get_remote_addr(transport)
        self.scheme = "http"

    def on_headers_complete(self) -> None:
        """As uvicorn's, which has no place to say of which class a cycle is. Neither websockets
        nor a limit of its own to concurrency are configured here."""
        version = self.parser.get_http_version()
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        scope = cast(Scope, self.scope)
        scope["method"] = self.parser.get_method().decode("ascii")
        scope["http_version"] = version
        scope["path"] = self.root_path + (urllib.parse.unquote(path) if "%" in path else path)
        scope["raw_path"] = self.root_path.encode("ascii") + url.path
        scope["query_string"] = url.query or b""
        scope[CLOSED] = self._closed
        scope[ABORT] = self.wire.abort
        before = cast(Cycle | None, self.cycle)
        keep_alive = version != "1.0" and self.parser.should_keep_alive()
        cycle = Cycle(self, scope, keep_alive=keep_alive)
        self.cycle = cycle
        if before is None or before.response_complete:
            self._start_asgi_task(cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.insert(0, (cycle, self.app))

    def on_body(self, body: bytes) -> None:
        cycle = cast(Cycle, self.cycle)
        if not cycle.response_complete:
            cycle.take(body)

    def on_response_complete(self) -> None:
        """As uvicorn's, with one timer for the whole connection: it looks at when the last answer
        ended, instead of being made and cancelled for each (8 us a request on asyncio)."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._time_idleness(self.timeout_keep_alive)

    def _time_idleness(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            seconds, self.timeout_keep_alive_handler
        )

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def _linger(self) -> bool:
        """Whether the end waits: the answer is complete, the request is not."""
        cycle = cast(Cycle | None, self.cycle)
        if cycle is None or not cycle.response_complete or not cycle.more_body:
            return False
        if self._lingers is None:
            self._lingers = self.loop.call_later(LINGER_SECONDS, self.wire.close)
            self.wire.write_eof()
            self.wire.resume_reading()
        return True

    def _unsupported_upgrade_warning(self) -> None:
        """An upgrade is not made; anybody may ask for one, so it is not worth a line."""

    def timeout_keep_alive_handler(self) -> None:
        """An idle connection is closed; one that does not even take the end of its last answer is
        dropped, since closing would wait for it."""
        self.timeout_keep_alive_task = None
        if self._idle_since is None:
            return  # it is busy, and timed again behind its answer
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._time_idleness(left)
        elif self.wire.get_write_buffer_size():
            self.wire.abort()
        else:
            super().timeout_keep_alive_handler()

    def shutdown(self) -> None:
        if self._lingers is None:
            super().shutdown()
        else:
            self.wire.close()

    def data_received(self, data: bytes) -> None:
        if self._lingers is None and not self._turned_away:
            super().data_received(data)
            return
        self._unwanted_bytes += len(data)
        if self._unwanted_bytes > LINGER_BYTES:
            self.wire.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed.set()
        if self._turned_away:
            if self._door is not None:
                self._door.left(self.wire)
            return
        for timer in (self._lingers, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()
        for cycle in list(self.watching):
            cycle.lose()
        super().connection_lost(exc)
        if self.cycle is not None:
            cast(Cycle, self.cycle).drop_body()

    def send_400_response(self, msg: str) -> None:
        """For bytes that no parser takes. uvicorn's own says it in plain text."""
        self.transport.write(no_http())
        self.transport.close()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """A client that has sent all it wants may still read. It cannot be told from one that has
        left until something is written, so it is noted, and answered."""
        cycle = cast(Cycle | None, self.cycle)
        if self._turned_away or cycle is None or cycle.response_complete or cycle.more_body:
            self._closed.set()
            self.wire.close()
            return None
        cycle.hang_up()
        return True
