"""One client's connection: uvicorn's protocol, and what it does not do.

It answers clients that close their sending half, it lets a client that is still uploading read why
it was refused, it refuses what is no HTTP in the shape of every other error, it drops one that
takes nothing any more, and it says so when there is no room for it. It tells who answers when the
client leaves, so that nobody has to wait for that, and it writes an answer with a third of
uvicorn's calls.
"""

from __future__ import annotations

import asyncio
import os
import re
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, cast

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.protocols.utils import get_remote_addr

from gateway.api.door import (
    ABORT,
    CLOSED,
    EXCHANGE,
    HUNG_UP,
    UNSENT,
    ASGIApp,
    Exchange,
    Leaving,
    Message,
    Scope,
)
from gateway.api.errors import no_http, no_room
from gateway.ports import FileBody, Lent, OpenFile
from gateway.relay.arrival import Watch
from gateway.relay.buffers import Buffers
from gateway.relay.moment import Moment

ACCEPTED_AT_ONCE = 16
"""Of connections in one turn of the loop: each is counted before the next turn."""
LINGER_SECONDS = 10.0
LINGER_BYTES = 256 * 1024 * 1024
"""How much of a refused upload is read and thrown away, so that the refusal arrives."""
TURNED_AWAY = 16
"""How many connections without a place may be open, to hear that there is none."""
UPLOAD_HIGH_WATER = 256 * 1024
"""Bytes of a request's body that may wait before the socket is no longer read: one read of the
loop's may bring so many, and to stop and go for each costs two system calls."""
UNASKED_HIGH_WATER = 64 * 1024
"""And before anybody has asked for it: most of a large one is then read into one buffer."""
MOST_PIPELINED = 128
"""Requests that wait behind the one that is answered. 256 KB, which are read at once, may hold
14,000, of 1.1 KB each once they are parsed."""
KEPT_URL_BYTES = 256
LENT_BYTES = 1024 * 1024
"""The buffer that a large body is read into, again and again."""
LENT_FROM_BYTES = 512 * 1024
"""What is left of a body is read so where it is so much."""
ALIGNED_BYTES = 64 * 1024
"""Pieces end where so many bytes of the body do: a file takes whole pages faster."""
GATHER_SECONDS = 0.05
"""What has come of a large body waits so long for more, until the buffer is full."""
HELD_BYTES = 64 * 1024
"""A body of so much may be a file."""

_HEAD = re.compile(
    rb"HTTP/1\.1 [^\r\n]*\r\n"
    rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+: [^\x00-\x08\x0a-\x1f\x7f]*\r\n)*+"
)
REQUEST = "request"
"""The name of every request's task: one of its own takes 64 bytes."""
_ASGI = MappingProxyType({"version": "3.0", "spec_version": "2.3"})
_PRINTABLE = bytes(range(0x20, 0x7F))
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9a-z]+")


async def _raising(error: Exception) -> None:
    raise error


class _Lingering:
    """A transport whose ``close`` waits for a client that is still sending.

    Closing a socket with unread bytes resets it, and the reset overtakes the answer: the client
    would see a broken connection, and send the same upload again.
    """

    __slots__ = ("_connection", "_transport")

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport = transport
        self._connection: Connection | None = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        connection = self._connection
        if connection is None or self._transport.is_closing() or not connection.lingers():
            self._transport.close()

    def let_go(self) -> None:
        """The connection has ended."""
        self._connection = None


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
    """How many connections a server may have; those beyond it are turned away.

    ``changed`` hears when it has become full, and when there is room again. It may have the server
    stop to accept (``is_shut``): what was accepted in that turn of the loop is still let in.
    """

    def __init__(self, limit: int | None, refused: Callable[[], None]) -> None:
        self.limit = limit
        self.refused = refused
        self.changed: Callable[[], None] = lambda: None
        self.is_full = False
        self.is_shut = False
        self.buffers = Buffers(LENT_BYTES)
        self._away: OrderedDict[asyncio.Transport, None] = OrderedDict()

    def lets_in(self, others: int) -> bool:
        """Whether there is room for a connection beside so many others."""
        if self.limit is None:
            return True
        if others + 1 >= self.limit and not self.is_full:
            self.is_full = True
            self.changed()
        return others < self.limit + (ACCEPTED_AT_ONCE if self.is_shut else 0)

    def count(self, connections: int) -> None:
        """So many are left."""
        # A little later than at the first: to begin to accept costs as much as ten connections.
        if self.is_full and self.limit and connections < self.limit - self.limit // 32:
            self.is_full = False
            self.changed()

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
        self.buffers.close()
        for transport in self._away:
            transport.abort()


class Cycle(RequestResponseCycle):
    """One request and its answer. The ASGI messages are uvicorn's; a head is checked as a whole
    instead of header by header, and pieces of an upload are handed on as they came: uvicorn adds
    each to a buffer and copies that again (four copies of a 20 MB upload; here it is two)."""

    scope: Any
    message_event: Any
    """Said here, and not by ``cast``, which is a call where it stands."""

    def __init__(self, connection: Connection, scope: Scope, *, keep_alive: bool) -> None:
        # As uvicorn's own, which takes a call with eleven names, and holds a buffer for a body and
        # a log of accesses that nobody uses here.
        self.scope: Scope | None = scope
        self.transport = connection.transport
        self.flow = connection.flow
        self.logger = connection.logger
        self.default_headers = connection.server_state.default_headers
        self.message_event = Moment()
        self.disconnected = False
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = connection.expect_100_continue
        self.more_body = True
        self.response_started = False
        self.response_complete = False
        self.chunked_encoding = None
        self.expected_content_length = 0
        self.hung_up = Moment()
        self._connection = connection
        self._wire = connection.wire
        self._pieces: Sequence[bytes] = ()
        self._waiting_bytes = 0
        self._body_bytes = 0
        self._is_asked = False
        self._lendable = 0
        """Bytes of a body that may be lent, as announced; none once it is asked for."""
        self._inlet: Inlet | None = None
        self._read_into: bytearray | None = None
        """What was read into, once all is read."""
        self._watch: Watch | None = None
        self._held_head = b""
        self._client: Leaving | None = None
        self._headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        self._is_head = scope["method"] == "HEAD"
        scope[HUNG_UP] = self.hung_up
        exchange: Exchange = self
        scope[EXCHANGE] = exchange
        if connection.holds_what_it_writes:
            scope[UNSENT] = connection.wire.get_write_buffer_size

    def begin(self, app: ASGIApp) -> None:
        """Has it answered, in a task. uvicorn's own has a coroutine round the app that looks at how
        it ends: 250 bytes for as long as a picture takes. Here the task is looked at when it is
        done. Nor is the scope kept: it is the app's, for as long as that wants it."""
        scope, self.scope = cast(Scope, self.scope), None
        try:
            work = app(scope, self.receive, self.send)
        except Exception as error:  # noqa: BLE001 - it is logged where the task's end is seen
            work = _raising(error)
        connection = self._connection
        task = connection.loop.create_task(cast(Coroutine[Any, Any, None], work), name=REQUEST)
        connection.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """uvicorn says and does what is to be done about an app that did not answer."""
        tasks = self._connection.tasks
        tasks.discard(task)
        failed = task.cancelled() or task.exception() is not None
        if failed or not (self.response_complete or self.disconnected):

            async def again(*_: object) -> None:
                task.result()

            looking = self._connection.loop.create_task(self.run_asgi(cast(Any, again)))
            tasks.add(looking)
            looking.add_done_callback(tasks.discard)

    def watch(self, client: Leaving) -> None:
        """Has ``client`` told when its connection ends before the answer does, and when it closes
        its sending half; at once where that has happened. Its body is read, and nobody looks at
        what was lent of it."""
        self._client = client
        if self._read_into is not None:
            self._connection.take_back(self._read_into)
            self._read_into = None
        self._connection.tell_of_the_end(self)
        # The last piece of a body may have paused it, and an end that is not read is not seen.
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self.hung_up.is_set():
            client.hang_up()
        if self.disconnected:
            client.leave()

    def unwatch(self) -> None:
        """Ends that."""
        self._client = None
        if self in self._connection.watching:
            self._connection.watching.remove(self)

    def lose(self) -> None:
        """The connection has ended."""
        if not self.response_complete:
            self.disconnected = True
            if self._client is not None:
                self._client.leave()
        self.message_event.set()

    def hang_up(self) -> None:
        """The client has closed its sending half."""
        self.keep_alive = False
        self.hung_up.set()
        if self._client is not None:
            self._client.hang_up()

    def is_stalled(self) -> bool:
        """Whether the next message has to wait until the client takes more."""
        return self.flow.write_paused and not self.disconnected

    def lend(self) -> None:
        """``receive`` may give ``Lent`` pieces, each good until the next is asked for. Only the
        rest of a body of known length, and of some size, is read so, and not before the first
        piece is asked for: nothing is read in for who is refused."""
        headers, self._headers = self._headers, ()
        if self.more_body:
            said = dict(headers)
            if b"transfer-encoding" not in said and b"upgrade" not in said:
                self._lendable = int(said.get(b"content-length", b"0"))

    def show_to(self, watch: Watch) -> None:
        """Shows what is lent to ``watch``, in parts, as they come."""
        self._watch = watch

    def _let_in(self) -> None:
        left, self._lendable = self._lendable - self._body_bytes, 0
        if left >= LENT_FROM_BYTES:
            self._inlet = self._connection.let_in(self, self._body_bytes, left)

    def whole_body(self) -> bytes | None:
        """All of the body, where it came with its head and nobody has asked for any of it; None:
        it is to be received."""
        if (
            self.more_body
            or self.disconnected
            or self.response_complete
            or self.waiting_for_100_continue
            or self._inlet is not None
        ):
            return None
        pieces, self._pieces, self._waiting_bytes = self._pieces, (), 0
        self.message_event = Moment()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def arrived(self) -> None:
        """There is something in the inlet, or all of the body is there."""
        if not self.response_complete:
            self.message_event.set()

    def take(self, piece: bytes) -> None:
        """A piece of the request's body."""
        size = len(piece)
        self._body_bytes += size
        if isinstance(self._pieces, list):
            self._pieces.append(piece)
        else:
            self._pieces = [piece]
        self._waiting_bytes += size
        if self._waiting_bytes > (UPLOAD_HIGH_WATER if self._is_asked else UNASKED_HIGH_WATER):
            self.flow.pause_reading()
        self.message_event.set()

    def drop_body(self) -> None:
        """What came of it and nobody will read: the rest of this waits for the collector."""
        self._pieces = ()
        self._waiting_bytes = 0
        self._read_into = None
        if self._inlet is not None:
            self._inlet.forget_refusal()
            self._inlet = None

    async def receive(self) -> Any:
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self._wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waiting_for_100_continue = False
        self._is_asked = True
        if not self.disconnected and not self.response_complete:
            if self._lendable:
                self._let_in()
            elif self._inlet is not None:
                self._inlet.take_back()
            if self._inlet is not None and self._watch is not None and not self._pieces:
                self._inlet.show_to(self._watch)  # what came before it has been seen
                if self._inlet.is_refused:
                    raise self._inlet.refusal()
            if self.flow.read_paused and (self._inlet is None or not self._inlet.is_full):
                self.flow.resume_reading()
            await self.message_event.wait()
            self.message_event = Moment()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        if self._inlet is not None and not self._pieces:
            if self._inlet.is_refused:
                raise self._inlet.refusal()
            return self._lent(self._inlet)
        pieces, self._pieces, self._waiting_bytes = self._pieces, (), 0
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        inlet = self._inlet
        if inlet is not None and inlet.has_some:
            self.message_event.set()
        more = self.more_body or inlet is not None
        return {"type": "http.request", "body": body, "more_body": more}

    def _lent(self, inlet: Inlet) -> Any:
        lent = inlet.lend()
        if self.more_body:
            self.flow.pause_reading()
        else:
            self._inlet = None  # its buffer is not needed while the picture is painted
            self._read_into = lent.buffer
        return {"type": "http.request", "body": lent, "more_body": self.more_body}

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

    def answer(
        self, status: int, headers: Sequence[tuple[str, str]], pieces: Sequence[bytes]
    ) -> bool:
        """Writes a whole answer, with its length among the headers, to a client that waits for
        nothing else. False: nothing was done; it is for ``send``, with all that may be odd."""
        names = tuple([name for name, _ in headers])
        text = "\r\n".join(map(": ".join, headers))
        if (
            self.response_started
            or self.disconnected
            or not self.keep_alive
            or self._is_head
            or self.flow.write_paused
            or self._wire.get_write_buffer_size()
            or not _are_plain(names)
            or not text.isascii()
        ):
            return False
        lines = text.encode("ascii")
        # A value with a line end in it would be a header of somebody else's.
        if lines.translate(None, _PRINTABLE) != b"\r\n" * (len(headers) - 1):
            return False
        self.response_started = True
        self.waiting_for_100_continue = False
        dates = b"".join([b"%b: %b\r\n" % header for header in self.default_headers])
        head = b"".join((STATUS_LINE[status], dates, lines, b"\r\n\r\n"))
        self._wire.writelines((head, *pieces))
        self._complete()
        return True

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
        bodiless = self._is_head or status in (204, 304)
        if self.chunked_encoding is None and not bodiless:
            self.chunked_encoding = True
            written += 1
            lines.append(b"transfer-encoding: chunked\r\n")
        head = b"".join(lines)
        # Counted too: a value with a line end in it would be a header of somebody else's.
        if head.count(b"\n") != 1 + written or not _HEAD.fullmatch(head):
            raise RuntimeError("a header of the answer cannot be written as HTTP")
        head += b"\r\n"
        if self.expected_content_length >= HELD_BYTES and self._connection.holds_what_it_writes:
            # uvloop writes at the end of a turn of the loop, and a file cannot be sent before.
            self._held_head = head
            self._connection.loop.call_soon(self._write_held_head)
        else:
            self._wire.write(head)

    def _write_held_head(self) -> None:
        if self._held_head:
            head, self._held_head = self._held_head, b""
            if not self._wire.is_closing():
                self._wire.write(head)

    async def send_file(self, body: FileBody) -> int:
        """Has the system send the rest of a file itself, as far as the socket takes it at once;
        how many bytes that was. 0 where it cannot: what is written then, waits or tells why."""
        size = body.end - body.at
        if not self._may_bypass(size):
            return 0
        try:
            out = self._wire.get_extra_info("socket").fileno()
            if self._held_head:
                self._held_head = self._held_head[os.write(out, self._held_head) :]
            if self._held_head:
                return 0
            if body.waits:
                # A descriptor of its own: the connection may end before the disk answers.
                own = OpenFile(os.dup(out))
                sent = await self._connection.loop.run_in_executor(None, _send_file, own, body)
            else:
                sent = os.sendfile(out, body.file.fd, body.at, size)
        except OSError:
            return 0
        except asyncio.CancelledError:
            # Nobody knows how far it got.
            self._wire.abort()
            raise
        body.at += sent
        self.expected_content_length -= sent
        return sent

    def _may_bypass(self, size: int) -> bool:
        """Whether so many bytes of the body may go to the socket now, past the transport: nothing
        waits before them."""
        return (
            self.response_started
            and not self.response_complete
            and not self.disconnected
            and not self.chunked_encoding
            and size <= self.expected_content_length
            and not self._is_head
            and not self._wire.is_closing()
            and self._wire.get_write_buffer_size() == 0
        )

    def _write_body(self, pieces: Sequence[bytes], *, more: bool) -> None:
        size = sum(map(len, pieces))
        if self._is_head:
            self._write_held_head()
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
                # Together: a packet less, and a client that is woken once.
                head, self._held_head = self._held_head, b""
                self._wire.writelines((head, *pieces) if head else pieces)
        if not more:
            if self.expected_content_length != 0:
                raise RuntimeError("the answer is shorter than its Content-Length")
            self._complete()

    def _complete(self) -> None:
        self.response_complete = True
        if self in self._connection.watching:
            self._connection.watching.remove(self)
        if self._pieces or self._inlet is not None or self._read_into is not None:
            self.drop_body()
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self._connection.on_response_complete()


class Inlet(asyncio.BufferedProtocol):
    """Reads the rest of a body of known length, in the place of its connection, and not a byte
    that is behind it. The parser would copy each piece, and the loop make new bytes of each read:
    nine tenths of what it takes to get 20 MB in is the page faults of that. What comes is shown at
    once, and handed out once the buffer is full, or nothing more has come for a moment."""

    def __init__(self, connection: Connection, cycle: Cycle, at: int, left: int) -> None:
        """For ``left`` bytes of the body, which are behind the first ``at``."""
        self._connection = connection
        self._cycle = cycle
        self._at = at
        self._left = left
        self._first = self._shown = self._filled = at % ALIGNED_BYTES
        self._buffer = connection.buffer_of(min(LENT_BYTES, self._first + left))
        self._is_lent = False
        self._waits: asyncio.TimerHandle | None = None
        self._watch: Watch | None = None
        self.is_refused = False
        """The one who watches has raised something; it is shown nothing any more."""
        self._refusal: Exception | None = None

    def lend(self) -> Lent:
        """What has come; nothing is read before that is taken back."""
        self._is_lent = True
        lent = Lent(self._buffer, self._filled - self._first, self._first)
        self._at += lent.size
        if self._left == 0:
            # uvloop holds on to the protocol before: not to its buffer.
            self._buffer = bytearray()
        return lent

    @property
    def has_some(self) -> bool:
        return self._filled > self._first

    @property
    def is_full(self) -> bool:
        return self._filled == len(self._buffer)

    def take_back(self) -> None:
        if self._is_lent:
            self._is_lent = False
            self._first = self._shown = self._filled = self._at % ALIGNED_BYTES

    def show_to(self, watch: Watch) -> None:
        """Shows what has come and what comes, where it is received: it is still in the CPU's
        cache then."""
        if self._watch is None and not self.is_refused:
            self._watch = watch
            self._show()

    def _show(self) -> None:
        if self._watch is None or self._shown == self._filled:
            return
        part = Lent(self._buffer, self._filled - self._shown, self._shown)
        self._shown = self._filled
        try:
            self._watch(part)
        except Exception as error:  # noqa: BLE001 - it is raised where the piece was asked for
            self.is_refused, self._refusal, self._watch = True, error, None

    def refusal(self) -> Exception:
        """What was raised, once: what knows it is in its traceback, and a circle of the two would
        keep the buffer for the collector."""
        try:
            return self._refusal or RuntimeError("a refused body is not asked for again")
        finally:
            self.forget_refusal()

    def forget_refusal(self) -> None:
        self._refusal = None

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._cycle.response_complete:
            self._first = self._filled = 0  # nobody wants it any more
        return memoryview(self._buffer)[self._filled : self._filled + self._left]

    def buffer_updated(self, nbytes: int) -> None:
        self._left -= nbytes
        self._filled += nbytes
        if self._cycle.response_complete:
            self._connection.count_unwanted(nbytes)
        else:
            self._show()
            if self.is_full:
                self._connection.flow.pause_reading()
            elif self._left and not self.is_refused:
                if self._waits is None:
                    self._waits = self._connection.loop.call_later(GATHER_SECONDS, self._tell)
                return
        if self._left == 0:
            self._connection.let_out()
        self._tell()

    def _tell(self) -> None:
        if self._waits is not None:
            self._waits.cancel()
            self._waits = None
        self._cycle.arrived()

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()

    def eof_received(self) -> bool | None:
        return self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)


def _holds_what_it_writes(transport: asyncio.Transport) -> bool:
    uvloops = type(transport).__module__.startswith("uvloop")
    return uvloops and transport.get_extra_info("sslcontext") is None


@lru_cache(maxsize=256)
def _parsed(url: bytes) -> tuple[str, bytes, bytes]:
    """A request line's path, that as it came, and its query. Clients ask for the same few."""
    parsed = httptools.parse_url(url)
    path = parsed.path.decode("ascii")
    return urllib.parse.unquote(path) if "%" in path else path, parsed.path, parsed.query or b""


@lru_cache(maxsize=256)
def _are_plain(names: tuple[str, ...]) -> bool:
    """Whether headers of these names are written as they are, and say nothing of how the answer
    is: those of an answer are one of a few lists."""
    framing = ("transfer-encoding", "connection")
    return all(_NAME.fullmatch(name) and name not in framing for name in names)


def _send_file(out: OpenFile, body: FileBody) -> int:
    """In a thread: both files are open as long as it runs."""
    return os.sendfile(out.fd, body.file.fd, body.at, body.end - body.at)


def _tokens(value: bytes) -> list[bytes]:
    return [token.lower().strip() for token in value.split(b",")]


class Connection(HttpToolsProtocol):
    """One client's connection."""

    # Beside uvicorn's 28 attributes: with more than 30 each connection has a dictionary of its own.
    __slots__ = (
        "_closed",
        "_idle_since",
        "_in_request",
        "_is_deaf",
        "_lingers",
        "_turned_away",
        "_unwanted_bytes",
        "holds_what_it_writes",
        "watching",
        "wire",
    )
    _door: Door | None = None
    cycle: Any
    """The last ``Cycle``, if any."""
    parser: Any
    """None between two requests."""
    pipeline: Any
    """A tuple of ``Cycle``, the first to be answered first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Few clients pipeline: a deque takes 760 bytes, and a list 60.
        self.pipeline = ()
        self._closed = Moment()
        self._turned_away = False
        self._unwanted_bytes = 0
        self._lingers: asyncio.TimerHandle | None = None
        self._idle_since: float | None = None
        self._in_request = False
        """The parser has seen the beginning of a request, and not its end."""
        self._is_deaf = False
        """What came behind the last request was none: nothing more is read as one."""
        self.watching: list[Cycle] = []
        """Requests that hear of the client's end: whose answerers want to, and the one that is
        answered while others wait behind it."""
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
        if door is not None and not door.lets_in(len(self.connections)):
            self._turned_away = True
            door.turn_away(transport)
            return
        self.connections.add(self)
        self.transport = cast(asyncio.Transport, _Lingering(transport, self))
        self.flow = Flow(self.transport)
        self.client = get_remote_addr(transport)
        self.scheme = "http"

    def on_message_begin(self) -> None:
        """As uvicorn's, which begins a scope of its own here."""
        self._in_request = True
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_headers_complete(self) -> None:
        """As uvicorn's, which has no place to say of which class a cycle is. Neither websockets
        nor a limit of its own to concurrency are configured here."""
        if len(self.pipeline) >= MOST_PIPELINED:
            self.wire.abort()
            return
        version = self.parser.get_http_version()
        # A stranger's may have 64 KB, and none of ours has so many: it is not remembered.
        parsed = _parsed if len(self.url) <= KEPT_URL_BYTES else _parsed.__wrapped__
        path, raw_path, query = parsed(self.url)
        scope: Scope = {
            "type": "http",
            "asgi": _ASGI,
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": self.root_path,
            "headers": self.headers,
            "method": self.parser.get_method().decode("ascii"),
            "path": self.root_path + path,
            "raw_path": self.root_path.encode("ascii") + raw_path if self.root_path else raw_path,
            "query_string": query,
            CLOSED: self._closed,
            ABORT: self.wire.abort,
        }
        self.headers = []  # the scope's, for as long as those are wanted; trailers nobody reads
        before: Cycle | None = self.cycle
        keep_alive = version != "1.0" and self.parser.should_keep_alive()
        cycle = Cycle(self, scope, keep_alive=keep_alive)
        self.cycle = cycle
        if before is None or before.response_complete:
            cycle.begin(self.app)
        else:
            self.flow.pause_reading()
            if not self.pipeline:
                # It is answered now, and uvicorn tells the last one alone of the connection's end.
                self.tell_of_the_end(before)
            self.pipeline += (cycle,)

    def on_body(self, body: bytes) -> None:
        cycle: Cycle = self.cycle
        if not cycle.response_complete:
            cycle.take(body)

    def on_message_complete(self) -> None:
        """As uvicorn's, without its upgrades."""
        self._in_request = False
        cycle = cast(Cycle, self.cycle)
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()

    def tell_of_the_end(self, cycle: Cycle) -> None:
        """Of the client's, where it comes before that of the answer."""
        if cycle not in self.watching:
            self.watching.append(cycle)

    def let_in(self, cycle: Cycle, at: int, left: int) -> Inlet | None:
        """Reads the rest of a request's body past the parser; None where it is not this that
        arrives."""
        if cycle is not self.cycle or self._lingers is not None or self.transport.is_closing():
            return None
        inlet = Inlet(self, cycle, at, left)
        self.wire.set_protocol(inlet)
        self.flow.resume_reading()
        return inlet

    def buffer_of(self, size: int) -> bytearray:
        """One that was used before, if any."""
        return bytearray(size) if self._door is None else self._door.buffers.take(size)

    def take_back(self, buffer: bytearray) -> None:
        if self._door is not None:
            self._door.buffers.give_back(buffer)

    def let_out(self) -> None:
        """All of that body is read: what comes is another request, for another parser."""
        self.parser = None
        self.wire.set_protocol(self)
        self.on_message_complete()

    def on_response_complete(self) -> None:
        """As uvicorn's, with one timer for the whole connection: it looks at when the last answer
        ended, instead of being made and cancelled for each (8 us a request on asyncio)."""
        self.server_state.total_requests += 1
        if self.wire.is_closing():
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self.pipeline:
            first, *rest = self.pipeline
            self.pipeline = tuple(rest)
            if rest:
                self.tell_of_the_end(first)
            first.begin(self.app)
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

    def lingers(self) -> bool:
        """Whether the end waits: the answer is complete, the request is not."""
        cycle: Cycle | None = self.cycle
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
        """As uvicorn's, where nothing is ever upgraded."""
        if self._lingers is not None or self._turned_away or self._is_deaf:
            self.count_unwanted(len(data))
            return
        self._idle_since = None
        if self.parser is None:
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            message = "Invalid HTTP request received."
            self.logger.warning(message)
            if not self._answers_what_is_whole():
                self.send_400_response(message)
        except httptools.HttpParserUpgrade:
            self._unsupported_upgrade_warning()
        if not self._in_request:
            # Between two requests it knows nothing, and a client that waits for its picture has
            # no need of it: 900 bytes, for 2 us a request.
            self.parser = None

    def _answers_what_is_whole(self) -> bool:
        """Whether a request was whole before what is no HTTP, and is not answered yet: its answer,
        which nothing is written into, is the connection's last."""
        cycle: Cycle | None = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False
        cycle.keep_alive = False
        self._is_deaf = True
        return True

    def count_unwanted(self, size: int) -> None:
        """Of a request that was refused, or of a connection that has no place."""
        self._unwanted_bytes += size
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
        if self._door is not None:
            self._door.count(len(self.connections))
        if self.cycle is not None:
            self.cycle.drop_body()
        # A request that is still answered knows its connection, and ends. Were it known in turn,
        # 4 KB of each connection that was closed would wait for the collector.
        self.cycle = self.timeout_keep_alive_task = self._lingers = None
        cast(Any, self.transport).let_go()

    def send_400_response(self, msg: str) -> None:
        """For bytes that no parser takes. uvicorn's own says it in plain text."""
        self._in_request = True  # nor is another one asked
        self.transport.write(no_http())
        self.transport.close()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """A client that has sent all it wants may still read. It cannot be told from one that has
        left until something is written, so it is noted, and answered."""
        cycle: Cycle | None = self.cycle
        if self._turned_away or cycle is None or cycle.response_complete or cycle.more_body:
            self._closed.set()
            self.wire.close()
            return None
        cycle.hang_up()
        return True
