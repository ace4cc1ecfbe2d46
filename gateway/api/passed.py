"""The routes that buy nothing, as raw ASGI: what they are forwarded as, is in ``relay/``.

One table says which path and method is answered by which handler (``relay/passing.py``); every
request there ends with a receipt, as those that cost money do.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from gateway.api import auth
from gateway.api.door import (
    Door,
    Receive,
    Scope,
    Send,
    announces_body,
    crashed,
    deliver,
    headers_of,
    new_request_id,
)
from gateway.api.listeners import Listeners
from gateway.domain.call import Passage
from gateway.domain.errors import ClientGone, GatewayError, NotServed, Overloaded
from gateway.domain.receipt import Receipt
from gateway.domain.trace import Trace
from gateway.ports import Clock, Telemetry
from gateway.relay import headers as answers
from gateway.relay.arrival import failed
from gateway.relay.checks import Checks
from gateway.relay.chunks import nothing
from gateway.relay.files import Files
from gateway.relay.flights import Head
from gateway.relay.lookups import Lookups
from gateway.relay.passing import Handler, Visit

log = logging.getLogger(__name__)

BODIES = frozenset({"POST", "PUT", "PATCH"})


@dataclass(frozen=True, slots=True)
class Passes:
    """One path, and who answers it by method. ``path`` is below ``/v1``; each ``{}`` in it is a
    name, which the handler finds in ``Visit.names``."""

    path: str
    passage: Passage
    handlers: Mapping[str, Handler]

    @property
    def pattern(self) -> re.Pattern[str]:
        return re.compile("/v1" + "([^/]+)".join(re.escape(part) for part in self.path.split("{}")))


def passes_of(files: Files, checks: Checks, lookups: Lookups) -> list[Passes]:
    """Every path that is passed on."""
    return [
        Passes("/files", Passage.FILE, {"GET": files.page, "POST": files.upload}),
        Passes("/files/{}", Passage.FILE, {"GET": files.show, "DELETE": files.delete}),
        Passes("/files/{}/content", Passage.FILE, {"GET": files.content}),
        Passes(
            "/responses/{}",
            Passage.RESPONSE_LOOKUP,
            {"GET": lookups.show, "DELETE": lookups.delete},
        ),
        Passes("/responses/{}/cancel", Passage.RESPONSE_LOOKUP, {"POST": lookups.cancel}),
        Passes("/responses/{}/input_items", Passage.RESPONSE_LOOKUP, {"GET": lookups.items}),
        Passes("/moderations", Passage.MODERATION, {"POST": checks.moderate}),
        Passes("/content_provenance_checks", Passage.PROVENANCE, {"POST": checks.trace_origin}),
    ]


class PassedRoutes:
    """Answers what is in its table; one coroutine a request. ``sample`` is as in
    ``Listeners``."""

    def __init__(
        self,
        table: Iterable[Passes],
        telemetry: Sequence[Telemetry],
        clock: Clock,
        sample: float | None = None,
    ) -> None:
        self._table = tuple((one.pattern, one) for one in table)
        self._listeners = Listeners(telemetry, clock, sample)
        self._clock = clock

    def takes(self, path: str) -> bool:
        """Whether a path is in the table."""
        return any(pattern.fullmatch(path) for pattern, _ in self._table)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """From the request line to the log line."""
        started = self._clock.monotonic()
        rid = new_request_id()
        door = Door(scope, receive, send)
        pattern, passes = next(
            (pattern, one) for pattern, one in self._table if pattern.fullmatch(scope["path"])
        )
        found = pattern.fullmatch(scope["path"])
        names = found.groups() if found else ()
        trace = self._listeners.trace(scope)
        visit = _visit(rid, passes.passage, names, scope, door, started, trace)
        announced = announces_body(visit.headers)
        if not announced or scope["method"] not in BODIES:
            visit.body = nothing()
            door.ignore_body(announced)
        async with AsyncExitStack() as stack:
            visit.stack = stack
            try:
                head = await self._answer(visit, passes)
                if visit.receipt.reason == ClientGone.reason:
                    door.left_at("upload")
                try:
                    await deliver(rid, head, door)
                finally:
                    head.close()
                seconds = self._clock.monotonic() - started
                self._listeners.finished(visit.receipt, door, seconds)
            except asyncio.CancelledError:
                log.warning("a request was given up at the end", extra={"request_id": rid})
                # It ends here: whatever is raised, the server takes for a crash.
                await door.give_up(rid, answers.error_head(_given_up(), rid))
            finally:
                door.stop_watching()

    async def _answer(self, visit: Visit, passes: Passes) -> Head:
        handler = passes.handlers.get(visit.method)
        try:
            if handler is None:
                raise _not_allowed(passes, visit.method)
            visit.receipt = replace(visit.receipt, method=visit.method)
            head = await handler(visit)
            visit.receipt = replace(visit.receipt, status=head.status)
            return head
        except ClientGone as gone:
            visit.receipt = failed(visit.receipt, gone)
            head = answers.error_head(gone, visit.rid)
        except GatewayError as error:
            visit.receipt = failed(visit.receipt, error)
            allow = (("allow", ", ".join(sorted(passes.handlers))),) if handler is None else ()
            head = answers.error_head(error, visit.rid, (*visit.said, *allow))
        except Exception:
            log.exception("a request crashed", extra={"request_id": visit.rid})
            fault = crashed()
            visit.receipt = failed(visit.receipt, fault)
            head = answers.error_head(fault, visit.rid, visit.said)
        return head


def _visit(
    rid: str,
    passage: Passage,
    names: tuple[str, ...],
    scope: Scope,
    door: Door,
    started: float,
    trace: Trace | None,
) -> Visit:
    headers = headers_of(scope)
    return Visit(
        rid=rid,
        passage=passage,
        method=scope["method"],
        names=names,
        query=bytes(scope.get("query_string", b"")).decode("latin-1"),
        headers=headers,
        secret=auth.secret(headers),
        body=door.body(),
        client=door.client,
        at=started,
        receipt=Receipt(
            rid,
            passage.value,
            0,
            retried=headers.get("x-stainless-retry-count", "0").strip("0") != "",
            trace=trace,
        ),
    )


def _not_allowed(passes: Passes, method: str) -> NotServed:
    path = "/v1" + passes.path.replace("{}", "{id}")
    return NotServed(
        f"{path} takes {' and '.join(sorted(passes.handlers))}, not {method}.",
        status=405,
        code="method_not_allowed",
    )


def _given_up() -> Overloaded:
    return Overloaded(
        "The gateway is shutting down and could not wait for this answer. Nothing was bought; see "
        "what became of it, and ask again.",
        code="shutting_down",
        should_retry=False,
    )
