"""One request's two directions at the raw ASGI level, for every door that does not use FastAPI."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from typing import Any, Protocol, TypeAlias, cast

from gateway.domain.errors import ClientGone, Internal, Overloaded
from gateway.domain.header_lists import by_name, encoded
from gateway.ports import FileBody, Growing, Lent, Parts
from gateway.relay.arrival import Incoming, Watch
from gateway.relay.flights import Client, Head
from gateway.relay.moment import Moment

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger(__name__)

PIECES_BYTES = 8 * 1024 * 1024
"""So much of a body is handed over at once: a picture whole, what is larger in some parts."""
STALL_SECONDS = 120.0
"""A client that takes nothing for so long has its connection dropped; its result is kept."""
STALL_BYTES = 48 * 1024
"""What is next to nothing: less than this in that time, of what it still has to take."""
SMALL_BYTES = 32 * 1024
"""An answer of so much is handed over whole, head and body: the system takes it at once."""
CHUNK_BYTES = 256 * 1024
"""At most so much goes at once to a server that copies what a client does not take yet."""
NO_CONTENT = (204, 304)
"""Answers that end with their head, and say no length."""
HUNG_UP = "gateway.hung_up"
"""In the scope: a ``Moment``: the client has closed its sending half."""
CLOSED = "gateway.closed"
"""In the scope: a ``Moment``: the client has closed the connection, or it broke."""
EXCHANGE = "gateway.exchange"
"""In the scope: an ``Exchange``, where the server is our own."""
UNSENT = "gateway.unsent"
"""In the scope: how many bytes of the answer the client has still to take. A server that says so
takes the pieces of a body that is in memory at once, under ``pieces`` of a message, and holds them
as they are until they are sent: by one system call for a picture, not by 45."""
ABORT = "gateway.abort"
"""In the scope: drops the connection at once, with whatever is still to be sent."""

ASKED_PATH = "gateway.asked_path"
"""In the scope: the path as the client wrote it, where it spelled it otherwise."""
DEPLOYMENT = "gateway.deployment"
"""In the scope: the model that the path names, as Azure's do."""


class Leaving(Protocol):
    """Who is told of a client's end."""

    def leave(self) -> None:
        """Its connection has ended."""

    def hang_up(self) -> None:
        """It has closed its sending half."""


class Exchange(Protocol):
    """What a server of our own does beside ASGI's messages. Any other is asked all the time
    whether the client is there, by two tasks a request, and each message to it has a timeout."""

    async def send(self, message: Message, /) -> None:
        """ASGI's."""

    def watch(self, client: Leaving, /) -> None:
        """Tells ``client`` when it leaves before it has its answer, and when it hangs up."""

    def unwatch(self) -> None:
        """Ends that; harmless where there was nothing to end."""

    def is_stalled(self) -> bool:
        """Whether a message would have to wait now, because the client takes nothing."""

    def lend(self) -> None:
        """Pieces of this body may be ``Lent``."""

    def show_to(self, watch: Watch, /) -> None:
        """Shows every ``Lent`` piece to ``watch`` in parts, as they come, before it is handed out.
        What that raises is raised where the piece is asked for."""

    def whole_body(self) -> bytes | None:
        """All of the body, where it is here already and nobody has asked for any of it; None: it
        is to be received."""

    def answer(
        self, status: int, headers: Sequence[tuple[str, str]], pieces: Sequence[bytes], /
    ) -> bool:
        """Instead of three messages to ``send``, where nobody put another before: writes a whole
        answer and returns True, or False where it did nothing because that takes more. It takes a
        third of the time."""

    async def send_file(self, body: FileBody, /) -> int:
        """Where there is ``UNSENT``: has the system send a ``FileBody`` itself, as far as the
        client's socket takes it at once; how many bytes that was. ``body.at`` is behind them
        then."""


def new_request_id() -> str:
    """``req_`` and 96 random bits: the name of a request everywhere, in the ledger too."""
    return f"req_{secrets.token_hex(12)}"


class Door:
    """One request's two directions, and whether the client still stands there."""

    __slots__ = (
        "_abort",
        "_exchange",
        "_finished",
        "_hung_up",
        "_send",
        "_unsent",
        "_watching",
        "address",
        "body_read",
        "bytes_out",
        "client",
        "gone",
        "receive",
        "status",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.address: tuple[str, int] | None = scope.get("client")
        """Where the client is; behind a trusted proxy, where that one says."""
        self._hung_up: Moment | None = scope.get(HUNG_UP)
        self._abort: Callable[[], None] | None = scope.get(ABORT)
        self._exchange: Exchange | None = scope.get(EXCHANGE)
        self._unsent: Callable[[], int] | None = scope.get(UNSENT)
        self.receive = receive
        self._send = send
        self._watching: asyncio.Task[None] | None = None
        self.client = Client(scope.get(CLOSED))
        self.body_read = False
        self.status = 0
        self.bytes_out = 0
        self.gone = ""
        self._finished = False

    @property
    def delivered(self) -> bool:
        """Whether all of the answer has left for a client that was still there."""
        return self._finished and not self.gone

    def body(self) -> AsyncIterator[bytes]:
        """The request's body as it comes. Raises ``ClientGone``."""
        return cast(AsyncIterator[bytes], _Body(self))

    def lent_body(self) -> Incoming:
        """As ``body``, for who is done with each piece before it asks for the next."""
        if self._exchange is not None:
            self._exchange.lend()
        return _Body(self)

    def ignore_body(self, announced: bool) -> None:
        """Instead of reading it: watches for the client's end at once. ``announced``: there is a
        body all the same, so the connection ends with the answer."""
        self.body_is_read()
        self.body_read = not announced

    def whole_body(self) -> bytes | None:
        """As ``Exchange.whole_body``."""
        return None if self._exchange is None else self._exchange.whole_body()

    def show_to(self, watch: Watch) -> None:
        """As ``Exchange.show_to``."""
        if self._exchange is not None:
            self._exchange.show_to(watch)

    def body_is_read(self) -> None:
        """From now on it is watched whether the client leaves."""
        self.body_read = True
        if self._exchange is not None:
            self._exchange.watch(self.client)
        else:
            self._watching = asyncio.create_task(self._watch_for_the_end())

    async def _watch_for_the_end(self) -> None:
        hang_up = None
        if self._hung_up is not None:
            hang_up = asyncio.create_task(self._watch_for_hanging_up(self._hung_up))
        try:
            while (await self.receive())["type"] != "http.disconnect":
                pass
            self.client.leave()
        finally:
            if hang_up is not None:
                hang_up.cancel()

    async def _watch_for_hanging_up(self, hung_up: Moment) -> None:
        await hung_up.wait()
        self.client.hang_up()

    def stop_watching(self) -> None:
        if self._exchange is not None:
            self._exchange.unwatch()
        elif self._watching is not None:
            self._watching.cancel()

    def left_at(self, stage: str) -> None:
        self.gone = self.gone or stage

    def send_at_once(self, head: Head, body: Parts) -> bool:
        """Sends a small answer, whole, to a client that waits for it. False: nothing was done, it
        is to be sent step by step."""
        exchange = self._exchange
        if exchange is None or self.gone or self.client.away or not self.body_read:
            return False
        size = sum(map(len, body.parts))
        if size != head.length or size > SMALL_BYTES or head.status in NO_CONTENT:
            return False
        headers = (*head.headers, ("content-length", str(size)))
        if self._send != exchange.send or not exchange.answer(head.status, headers, body.parts):
            return False
        self.status, self.bytes_out, self._finished = head.status, size, True
        return True

    async def send_head(self, head: Head) -> None:
        if self.gone:
            raise ClientGone(self.gone)
        if self._hung_up is not None and self._hung_up.is_set():
            # Nobody can say whether it still reads: it is counted as gone, and answered.
            self.left_at("upstream")
        self.status = head.status
        headers = encoded(head.headers)
        if not self.body_read and all(name != b"connection" for name, _ in headers):
            # What is still being sent is not wanted: the connection ends with this answer.
            headers.append((b"connection", b"close"))
        if head.length is not None:
            headers.append((b"content-length", str(head.length).encode("ascii")))
        elif head.status not in NO_CONTENT:
            # The second one is for nginx, which would else keep events until a buffer is full.
            headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await self._put({"type": "http.response.start", "status": head.status, "headers": headers})

    async def send_chunk(self, chunk: bytes) -> None:
        await self._put({"type": "http.response.body", "body": chunk, "more_body": True})
        self.bytes_out += len(chunk)

    async def send_body(self, body: AsyncIterator[bytes]) -> None:
        """All of a body, as far as the client takes it."""
        exchange = self._exchange
        if isinstance(body, FileBody) and exchange is not None and self._unsent is not None:
            await self._send_from_file(body, exchange)
        if self._unsent is None or not isinstance(body, Parts | Growing):
            async for chunk in body:
                for start in range(0, len(chunk), CHUNK_BYTES):
                    await self.send_chunk(chunk[start : start + CHUNK_BYTES])
        elif isinstance(body, Parts):
            for pieces, size in _together(body.parts):
                await self._send_pieces(pieces, size)
        else:
            async for group in body.groups:
                await self._send_pieces(group, sum(map(len, group)))

    async def _send_pieces(self, pieces: Sequence[bytes], size: int) -> None:
        """To a server that holds them as they are until they are sent."""
        await self._put({"type": "http.response.body", "pieces": pieces, "more_body": True})
        self.bytes_out += size

    async def _send_from_file(self, body: FileBody, exchange: Exchange) -> None:
        """What the client does not take at once is read and sent like any other body, which waits
        for it; then the system is asked again."""
        while body.at < body.end:
            if self.client.gone.is_set():
                raise ClientGone("response")
            sent = await exchange.send_file(body)
            self.bytes_out += sent
            if not sent:
                # That the connection is broken is heard of in the loop's next turn.
                await asyncio.sleep(0)
                if self.client.gone.is_set():
                    raise ClientGone("response")
            if body.at < body.end:
                await self.send_chunk(await body.read(CHUNK_BYTES))

    async def give_up(self, rid: str, last: Head) -> None:
        """The last word where the server waits no longer, if nothing was said yet. An answer that
        is half sent is broken off."""
        if self.status != 0 or self.gone:
            if not self._finished:
                await self.abort()
            return
        await deliver(rid, last, self)

    async def abort(self) -> None:
        """Drops the connection: the answer ends short of its length, so that it looks broken."""
        if self._abort is not None:
            self._abort()
            await asyncio.sleep(0)

    async def finish(self) -> None:
        if self._hung_up is not None and self._hung_up.is_set():
            self.left_at("response")
        await self._put({"type": "http.response.body", "body": b"", "more_body": False})
        self._finished = True

    async def _put(self, message: Message) -> None:
        """Raises ``ClientGone`` when the client has left or takes nothing any more."""
        if self.client.gone.is_set():
            raise ClientGone("response")
        try:
            if self._exchange is None or self._exchange.is_stalled():
                await self._send_when_taken(message)
            else:
                await self._send(message)
        except TimeoutError:
            self._forget_unsent()
            await self.abort()
            raise ClientGone("stalled") from None
        except OSError:
            raise ClientGone("response") from None
        if self._unsent is not None and self.client.gone.is_set():
            # It left while this waited, and up to a whole picture before it was not sent yet: the
            # server says nothing of it, and drops that.
            self._forget_unsent()
            raise ClientGone("response")

    def _forget_unsent(self) -> None:
        if self._unsent is not None:
            self.bytes_out = max(0, self.bytes_out - self._unsent())

    async def _send_when_taken(self, message: Message) -> None:
        """Raises ``TimeoutError`` when the client has taken next to nothing for so long."""
        while True:
            unsent = self._unsent() if self._unsent is not None else 0
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    return await self._send(message)
            except TimeoutError:
                # A message that waits has not been taken: it can be sent again.
                least = min(STALL_BYTES, unsent // 2)
                if self._unsent is None or self._unsent() > unsent - least:
                    raise


class _Body:
    """A request's body as it comes, ``Lent`` only where that was said. No generator: the loop keeps
    a list of those, which takes as long as reading a small body."""

    __slots__ = ("_door", "_more", "_watch")

    def __init__(self, door: Door) -> None:
        self._door = door
        self._watch: Watch | None = None
        self._more = True

    def show_to(self, watch: Watch) -> None:
        self._watch = watch
        self._door.show_to(watch)

    def whole(self) -> bytes | None:
        """All of it, where that is here already; asked before anything else."""
        body = self._door.whole_body()
        if body is not None:
            self._more = False
            self._door.body_is_read()
        return body

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes | Lent:
        """Raises ``ClientGone``."""
        while self._more:
            message = await self._door.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone("upload")
            self._more = message.get("more_body", False)
            piece: bytes | Lent = message.get("body", b"")
            if piece:
                if self._watch is not None and isinstance(piece, bytes):
                    self._watch(piece)
                return piece
        self._door.body_is_read()
        raise StopAsyncIteration


def _together(parts: Sequence[bytes]) -> Iterator[tuple[Sequence[bytes], int]]:
    """The parts, as many at a time as are handed over at once, and their size in bytes."""
    size = sum(map(len, parts))
    if size <= PIECES_BYTES:
        yield parts, size
        return
    pieces: list[bytes] = []
    size = 0
    for part in parts:
        pieces.append(part)
        size += len(part)
        if size >= PIECES_BYTES:
            yield pieces, size
            pieces, size = [], 0
    if pieces:
        yield pieces, size


def opened_to_read(scope: Scope, receive: Receive, send: Send) -> tuple[Door, Mapping[str, str]]:
    """The door of a question that has no body, and its headers, names in lower case."""
    door, headers = Door(scope, receive, send), headers_of(scope)
    door.ignore_body(announces_body(headers))
    return door, headers


def headers_of(scope: Scope) -> dict[str, str]:
    """A request's headers, names in lower case."""
    return by_name(scope["headers"])  # ASGI has their names in lower case


def announces_body(headers: Mapping[str, str]) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def crashed() -> Internal:
    """What is said of a defect; the log has the rest."""
    return Internal("The gateway failed in a way it should not.")


def ask_again(what: str) -> Overloaded:
    """The last word on a question that costs nothing; another process may have ``what``."""
    return Overloaded(
        f"The gateway is shutting down. Ask again for this {what}.",
        code="shutting_down",
        should_retry=True,
        retry_after_seconds=2,
    )


async def deliver(rid: str, head: Head, door: Door) -> None:
    """Sends an answer as far as the client takes it; how far that was is the door's ``gone``."""
    try:
        body = head.body() if head.length is not None else None
        if isinstance(body, Parts) and door.send_at_once(head, body):
            return
        await door.send_head(head)
        body = body or head.body()
        try:
            await door.send_body(body)
        finally:
            if isinstance(body, AsyncGenerator | Growing):
                await body.aclose()
        await door.finish()
    except ClientGone as gone:
        door.left_at(gone.stage)
    except Exception:
        # The status has left, so the only honest end is a broken connection.
        log.exception("an answer broke off", extra={"request_id": rid})
        door.left_at("broken")
        await door.abort()
