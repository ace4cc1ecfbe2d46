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
from typing import Any, TypeAlias

from gateway.domain.errors import ClientGone, Internal, Overloaded
from gateway.domain.header_lists import decoded, encoded
from gateway.ports import Parts
from gateway.relay.flights import Client, Head
from gateway.relay.moment import Moment

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Watch: TypeAlias = Callable[[Callable[[], None], Callable[[], None]], Callable[[], object]]

log = logging.getLogger(__name__)

PIECES_BYTES = 8 * 1024 * 1024
"""So much of a body is handed over at once: a picture whole, what is larger in some parts."""
STALL_SECONDS = 120.0
"""A client that takes nothing for so long has its connection dropped; its result is kept."""
STALL_BYTES = 48 * 1024
"""What is next to nothing: less than this in that time, of what it still has to take."""
CHUNK_BYTES = 256 * 1024
"""At most so much goes at once to a server that copies what a client does not take yet."""
NO_CONTENT = (204, 304)
"""Answers that end with their head, and say no length."""
HUNG_UP = "gateway.hung_up"
"""In the scope: a ``Moment``: the client has closed its sending half."""
CLOSED = "gateway.closed"
"""In the scope: a ``Moment``: the client has closed the connection, or it broke."""
WATCH = "gateway.watch"
"""In the scope: ``watch(left, away)`` calls ``left`` when the client leaves before it has its
answer and ``away`` when it hangs up, and returns what ends that. A server without it is asked all
the time, by two tasks a request."""
STALLED = "gateway.stalled"
"""In the scope: whether a message would have to wait now, because the client takes nothing. Where
it is not said, each may (an ``asyncio.timeout`` for each of three messages: 40 us a request)."""
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


def new_request_id() -> str:
    """``req_`` and 96 random bits: the name of a request everywhere, in the ledger too."""
    return f"req_{secrets.token_hex(12)}"


class Door:
    """One request's two directions, and whether the client still stands there."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._hung_up: Moment | None = scope.get(HUNG_UP)
        self._abort: Callable[[], None] | None = scope.get(ABORT)
        self._watch_by_server: Watch | None = scope.get(WATCH)
        self._unsent: Callable[[], int] | None = scope.get(UNSENT)
        self._may_stall: Callable[[], bool] = scope.get(STALLED, _perhaps)
        self._receive = receive
        self._send = send
        self._stop_watching: Callable[[], object] | None = None
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

    async def body(self) -> AsyncGenerator[bytes, None]:
        """The request's body as it comes. Raises ``ClientGone``."""
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone("upload")
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body", False):
                break
        self.body_read = True
        self._watch()

    def ignore_body(self, announced: bool) -> None:
        """Instead of reading it: watches for the client's end at once. ``announced``: there is a
        body all the same, so the connection ends with the answer."""
        self.body_read = not announced
        self._watch()

    def _watch(self) -> None:
        if self._watch_by_server is not None:
            self._stop_watching = self._watch_by_server(self.client.leave, self.client.hang_up)
        else:
            self._stop_watching = asyncio.create_task(self._watch_for_the_end()).cancel

    async def _watch_for_the_end(self) -> None:
        hang_up = None
        if self._hung_up is not None:
            hang_up = asyncio.create_task(self._watch_for_hanging_up(self._hung_up))
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            self.client.leave()
        finally:
            if hang_up is not None:
                hang_up.cancel()

    async def _watch_for_hanging_up(self, hung_up: Moment) -> None:
        await hung_up.wait()
        self.client.hang_up()

    def stop_watching(self) -> None:
        if self._stop_watching is not None:
            self._stop_watching()

    def left_at(self, stage: str) -> None:
        self.gone = self.gone or stage

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
        if self._unsent is None or not isinstance(body, Parts):
            async for chunk in body:
                for start in range(0, len(chunk), CHUNK_BYTES):
                    await self.send_chunk(chunk[start : start + CHUNK_BYTES])
            return
        for pieces, size in _together(body.parts):
            await self._put({"type": "http.response.body", "pieces": pieces, "more_body": True})
            self.bytes_out += size

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
            if self._may_stall():
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


def _perhaps() -> bool:
    return True


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
    return dict(decoded(scope["headers"]))  # ASGI has their names in lower case


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
        await door.send_head(head)
        body = head.body()
        try:
            await door.send_body(body)
        finally:
            if isinstance(body, AsyncGenerator):
                await body.aclose()
        await door.finish()
    except ClientGone as gone:
        door.left_at(gone.stage)
    except Exception:
        # The status has left, so the only honest end is a broken connection.
        log.exception("an answer broke off", extra={"request_id": rid})
        door.left_at("broken")
        await door.abort()
