"""The relayed routes, as raw ASGI: bytes in, bytes out, and a line in the log at the end.

A framework's request and response objects cost more here than everything else together
(performance.md 2), and Starlette's streaming loses the settlement when a client leaves.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from gateway.api import auth
from gateway.api.door import (
    DEPLOYMENT,
    Door,
    Receive,
    Scope,
    Send,
    crashed,
    deliver,
    headers_of,
)
from gateway.api.ids import RequestIds
from gateway.api.listeners import Listeners
from gateway.api.prefer import NO_WISHES, PREFERRING, preferences
from gateway.domain.call import Inquiry, Operation
from gateway.domain.errors import ClientGone, GatewayError, InvalidRequest, NotServed, Overloaded
from gateway.domain.receipt import Receipt
from gateway.domain.trace import Trace
from gateway.domain.user import USER_HEADERS
from gateway.ports import Clock, Telemetry
from gateway.relay import headers as answers
from gateway.relay.arrival import Answer, Arrival
from gateway.relay.drain import shutting_down
from gateway.relay.pipeline import Pipeline
from gateway.relay.plan import CacheWish

log = logging.getLogger(__name__)

IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,253}[\x21-\x7e])?")
MAX_AGE = re.compile(r"max-age\s*=\s*\"?(\d{1,9})\"?")


class RelayedRoutes:
    """Answers the operations of images; one coroutine a request. ``sample`` is as in
    ``Listeners``."""

    def __init__(
        self,
        pipeline: Pipeline,
        telemetry: Sequence[Telemetry],
        clock: Clock,
        sample: float | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._listeners = Listeners(telemetry, clock, sample)
        self._clock = clock
        self._ids = RequestIds(clock)

    async def handle(
        self, operation: Operation | Inquiry, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """From the request line to the log line."""
        started = self._clock.monotonic()
        rid = self._ids.new()
        trace = self._listeners.trace(scope)
        door = Door(scope, receive, send)
        try:
            try:
                arrival = _arrival(rid, operation, scope, door, started, trace)
                # The call has what it needs of them, and lasts for minutes: a kilobyte.
                scope["headers"] = ()
                del scope, receive, send
                answer = await self._pipeline.answer(arrival)
                if answer.gone:
                    door.left_at(answer.gone)
            except GatewayError as error:
                answer = _refused(rid, operation, error, trace=trace)
            except Exception:
                log.exception("a request crashed", extra={"request_id": rid})
                answer = _refused(rid, operation, crashed(), trace=trace)
            try:
                await deliver(rid, answer.head, door)
            finally:
                answer.head.close()
                answer.done(door.delivered)
            # Their end is that of the flight, which the client may not have waited for.
            seconds = self._clock.monotonic() - started
            receipt = await answer.receipt()
            if door.gone == "upstream" and receipt.reason == ClientGone.reason:
                # The flight saw it in time: nothing was sent.
                door.gone = "reserved"
            self._listeners.finished(receipt, door, seconds)
        except asyncio.CancelledError:
            # The server's patience is over; the flight goes on as long as the process does.
            log.warning("a request was given up at the end", extra={"request_id": rid})
            # It ends here: whatever is raised, the server takes for a crash.
            await door.give_up(rid, answers.error_head(_given_up(rid, door), rid))
        finally:
            door.stop_watching()


def _arrival(
    rid: str,
    operation: Operation | Inquiry,
    scope: Scope,
    door: Door,
    started: float,
    trace: Trace | None,
) -> Arrival:
    """What the request line and the headers say. Raises ``NotServed`` for another method, and
    ``InvalidRequest`` for an idempotency key of another form."""
    if scope["method"] != "POST":
        raise NotServed(
            f"/v1{operation.path} takes POST, not {scope['method']}.",
            status=405,
            code="method_not_allowed",
        )
    headers = headers_of(scope)
    wishes = NO_WISHES
    if not PREFERRING.isdisjoint(headers):
        wishes = preferences(scope["headers"])
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
    tries = headers.get("x-stainless-retry-count", "0")
    hints: dict[str, str] = {}
    for name in USER_HEADERS:
        if name in headers:
            hints[name] = headers[name]
    return Arrival(
        rid=rid,
        operation=operation,
        secret=auth.secret(headers),
        content_type=content_type,
        content_encoding=headers.get("content-encoding"),
        content_length=int(length) if length.isdecimal() else None,
        wish=cache_wish(headers["cache-control"]) if "cache-control" in headers else _NO_WISH,
        idempotency_key=key,
        body=door.lent_body(),
        client=door.client,
        at=started,
        retried=tries.strip("0") != "",
        asynchronous=wishes.respond_async,
        trace=trace,
        user_hints=hints or NO_HINTS,
        deployment=scope.get(DEPLOYMENT),
    )


NO_HINTS: Mapping[str, str] = MappingProxyType({})
_NO_WISH = CacheWish(read=True, write=True, max_age=None)


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
    rid: str,
    operation: Operation | Inquiry,
    error: GatewayError,
    *,
    trace: Trace | None,
) -> Answer:
    receipt = Receipt(
        rid,
        operation.value,
        error.status,
        reason=error.reason,
        fault=error.fault,
        code=error.code,
        trace=trace,
    )

    async def known() -> Receipt:
        return receipt

    more = (("allow", "POST"),) if error.status == 405 else ()
    return Answer(answers.error_head(error, rid, more), known)


def _given_up(rid: str, door: Door) -> GatewayError:
    """What was not even read may be sent elsewhere; what may have been bought an SDK must not buy
    again."""
    if not door.body_read:
        return shutting_down()
    return Overloaded(
        "The gateway is shutting down and could not wait for this answer. If a picture "
        f"was bought it stays on the books. Request id: {rid}.",
        code="shutting_down",
        should_retry=False,
    )
