"""The relayed routes, as raw ASGI: bytes in, bytes out, and a line in the log at the end.

A framework's request and response objects cost more here than everything else together
(performance.md 2), and Starlette's streaming loses the settlement when a client leaves.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeAlias

from gateway.api import auth
from gateway.domain.call import Inquiry, Operation
from gateway.domain.errors import (
    ClientGone,
    GatewayError,
    Internal,
    InvalidRequest,
    NotServed,
    Overloaded,
)
from gateway.domain.receipt import Delivery, Receipt
from gateway.ports import Clock, Telemetry
from gateway.relay import headers as answers
from gateway.relay.flights import Client, Head
from gateway.relay.pipeline import Answer, Arrival, Pipeline
from gateway.relay.plan import CacheWish

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger(__name__)

STALL_SECONDS = 120.0
"""A client that takes nothing for so long has its connection dropped; its result is kept."""
HUNG_UP = "gateway.hung_up"
"""In the scope: an event that is set when the client has closed its sending half."""
ABORT = "gateway.abort"
"""In the scope: drops the connection at once, with whatever is still to be sent."""
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,253}[\x21-\x7e])?")
MAX_AGE = re.compile(r"max-age\s*=\s*\"?(\d{1,9})\"?")


def new_request_id() -> str:
    """``req_`` and 96 random bits: the name of a request everywhere, in the ledger too."""
    return f"req_{secrets.token_hex(12)}"


class RelayedRoutes:
    """Answers the operations of images; one coroutine a request."""

    def __init__(self, pipeline: Pipeline, telemetry: Sequence[Telemetry], clock: Clock) -> None:
        self._pipeline = pipeline
        self._telemetry = tuple(telemetry)
        self._clock = clock

    async def handle(
        self, operation: Operation | Inquiry, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """From the request line to the log line."""
        started = self._clock.monotonic()
        rid = new_request_id()
        door = _Door(scope, receive, send)
        try:
            answer = await self._answer(rid, operation, scope, door, started)
            try:
                await self._deliver(rid, answer.head, door)
            finally:
                answer.head.close()
            await self._close_books(answer, door, started)
        except asyncio.CancelledError:
            # The server's patience is over; the flight goes on as long as the process does.
            log.warning("a request was given up at the end", extra={"request_id": rid})
            with suppress(ClientGone):
                await door.give_up(rid)
            raise
        finally:
            door.stop_watching()

    async def _deliver(self, rid: str, head: Head, door: _Door) -> None:
        try:
            await door.send_head(head)
            async with aclosing(_chunks(head)) as chunks:
                async for chunk in chunks:
                    await door.send_chunk(chunk)
            await door.finish()
        except ClientGone as gone:
            door.left_at(gone.stage)
        except Exception:
            # The status has left, so the only honest end is a broken connection.
            log.exception("an answer broke off", extra={"request_id": rid})
            door.left_at("broken")
            await door.abort()

    async def _answer(
        self,
        rid: str,
        operation: Operation | Inquiry,
        scope: Scope,
        door: _Door,
        started: float,
    ) -> Answer:
        if scope["method"] != "POST":
            return _refused(
                rid,
                operation,
                NotServed(
                    f"{operation.path} takes POST, not {scope['method']}.",
                    status=405,
                    code="method_not_allowed",
                ),
                (("allow", "POST"),),
            )
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        try:
            arrival = _arrival(rid, operation, headers, door, started)
            answer = await self._pipeline.answer(arrival)
        except GatewayError as error:
            return _refused(rid, operation, error)
        except Exception:
            log.exception("a request crashed", extra={"request_id": rid})
            return _refused(rid, operation, Internal("The gateway failed in a way it should not."))
        if answer.gone:
            door.left_at(answer.gone)
        return answer

    async def _close_books(self, answer: Answer, door: _Door, started: float) -> None:
        """Waits for the end of the flight, which the client may not have, and tells of it."""
        seconds = self._clock.monotonic() - started
        receipt = await answer.receipt()
        if door.gone == "upstream" and receipt.reason == ClientGone.reason:
            # The flight saw it in time: nothing was sent.
            door.gone = "reserved"
        delivery = Delivery(door.status, door.bytes_out, seconds, door.gone)
        for listener in self._telemetry:
            listener.finished(receipt, delivery)


class _Door:
    """One request's two directions, and whether the client still stands there."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._hung_up: asyncio.Event | None = scope.get(HUNG_UP)
        self._abort: Callable[[], None] | None = scope.get(ABORT)
        self._receive = receive
        self._send = send
        self._watch: asyncio.Task[None] | None = None
        self.client = Client()
        self.body_read = False
        self.status = 0
        self.bytes_out = 0
        self.gone = ""

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
        self._watch = asyncio.create_task(self._watch_for_the_end())

    async def _watch_for_the_end(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.client.leave()

    def stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.cancel()

    def left_at(self, stage: str) -> None:
        self.gone = self.gone or stage

    async def send_head(self, head: Head) -> None:
        if self.gone:
            raise ClientGone(self.gone)
        if self._hung_up is not None and self._hung_up.is_set():
            # Nobody can say whether it still reads: it is counted as gone, and answered.
            self.left_at("upstream")
        self.status = head.status
        headers = [
            (name.encode("ascii"), value.encode("ascii"))
            for name, value in head.headers
            if value.isascii() and value.isprintable()
        ]
        if not self.body_read and all(name != b"connection" for name, _ in headers):
            # What is still being sent is not wanted: the connection ends with this answer.
            headers.append((b"connection", b"close"))
        if head.length is not None:
            headers.append((b"content-length", str(head.length).encode("ascii")))
        else:
            # The second one is for nginx and its kin: they may hold events in buffers otherwise.
            headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await self._put({"type": "http.response.start", "status": head.status, "headers": headers})

    async def send_chunk(self, chunk: bytes) -> None:
        await self._put({"type": "http.response.body", "body": chunk, "more_body": True})
        self.bytes_out += len(chunk)

    async def give_up(self, rid: str) -> None:
        """The last word where nothing was said yet: an SDK must not buy the same again."""
        if self.status == 0 and not self.gone:
            head = answers.error_head(
                Overloaded(
                    "The gateway is shutting down and could not wait for this answer. If a picture "
                    f"was bought it stays on the books. Request id: {rid}.",
                    code="shutting_down",
                    should_retry=False,
                ),
                rid,
            )
            await self.send_head(head)
            async for chunk in head.body():
                await self.send_chunk(chunk)
            await self.finish()

    async def abort(self) -> None:
        """Drops the connection: the answer ends short of its length, so that it looks broken."""
        if self._abort is not None:
            self._abort()
            await asyncio.sleep(0)

    async def finish(self) -> None:
        if self._hung_up is not None and self._hung_up.is_set():
            self.left_at("response")
        await self._put({"type": "http.response.body", "body": b"", "more_body": False})

    async def _put(self, message: Message) -> None:
        """Raises ``ClientGone`` when the client has left or takes nothing any more."""
        if self.client.gone.is_set():
            raise ClientGone("response")
        try:
            async with asyncio.timeout(STALL_SECONDS):
                await self._send(message)
        except TimeoutError:
            await self.abort()
            raise ClientGone("stalled") from None
        except OSError:
            raise ClientGone("response") from None


async def _chunks(head: Head) -> AsyncGenerator[bytes, None]:
    """The body; its source ends with it, wherever the client has left it."""
    body = head.body()
    try:
        async for chunk in body:
            yield chunk
    finally:
        if isinstance(body, AsyncGenerator):
            await body.aclose()


def _arrival(
    rid: str,
    operation: Operation | Inquiry,
    headers: Mapping[str, str],
    door: _Door,
    started: float,
) -> Arrival:
    """What the headers say. Raises ``InvalidRequest`` for an idempotency key of another form."""
    key = headers.get("idempotency-key")
    if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequest(
            "An Idempotency-Key is 1 to 255 printable ASCII characters.",
            code="invalid_idempotency_key",
            param="Idempotency-Key",
        )
    content_type = headers.get("content-type", "")
    if not content_type.isascii() or not content_type.isprintable():
        raise InvalidRequest(
            "The Content-Type has characters that a header may not have.",
            code="bad_header",
            param="Content-Type",
            reason="bad_header",
        )
    length = headers.get("content-length", "")
    return Arrival(
        rid=rid,
        operation=operation,
        secret=auth.secret(headers),
        content_type=content_type,
        content_encoding=headers.get("content-encoding"),
        content_length=int(length) if length.isdecimal() else None,
        wish=cache_wish(headers.get("cache-control", "")),
        idempotency_key=key,
        body=door.body(),
        client=door.client,
        at=started,
    )


def cache_wish(cache_control: str) -> CacheWish:
    """What a request's ``Cache-Control`` asks of the result cache."""
    said = cache_control.lower()
    names = {part.strip() for part in said.split(",")}
    age = MAX_AGE.search(said)
    return CacheWish(
        read=not names & {"no-cache", "no-store"},
        write="no-store" not in names,
        max_age=int(age[1]) if age else None,
    )


def _refused(
    rid: str, operation: Operation | Inquiry, error: GatewayError, more: answers.Headers = ()
) -> Answer:
    receipt = Receipt(rid, operation.value, error.status, reason=error.reason, code=error.code)

    async def known() -> Receipt:
        return receipt

    return Answer(answers.error_head(error, rid, more), known)
