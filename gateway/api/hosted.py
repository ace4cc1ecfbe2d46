"""`GET /v1/images/hosted/{name}`: a picture by its signed url, for whoever holds it. Raw ASGI like
the relayed routes: a picture is as large as an answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from gateway.api.door import (
    Receive,
    Scope,
    Send,
    ask_again,
    crashed,
    deliver,
    new_request_id,
    opened_to_read,
)
from gateway.api.ranges import Unsatisfiable, names, part_of, still
from gateway.domain.errors import GatewayError, NotServed
from gateway.relay import replay
from gateway.relay.chunks import nothing
from gateway.relay.flights import Head
from gateway.relay.headers import Headers, error_head
from gateway.relay.hosting import HOSTED, HostedPicture

log = logging.getLogger(__name__)

METHODS = "GET, HEAD, OPTIONS"
ANYBODY: Headers = (
    ("access-control-allow-origin", "*"),
    ("cross-origin-resource-policy", "cross-origin"),
)
"""The url is the permission: any page that has it may show the picture."""
TO_ANYBODY: Headers = (
    *ANYBODY,
    (
        "access-control-expose-headers",
        "accept-ranges, content-disposition, content-length, content-range, etag",
    ),
)
PREFLIGHT: Headers = (
    *ANYBODY,
    ("access-control-allow-methods", METHODS),
    ("access-control-allow-headers", "*"),
    ("access-control-max-age", "86400"),
)
HARMLESS: Headers = (
    ("x-content-type-options", "nosniff"),
    # An SVG is a document: it must neither run nor load anything under this gateway's origin.
    ("content-security-policy", "default-src 'none'; style-src 'unsafe-inline'; sandbox"),
)


class Pictures(Protocol):
    """Who has the pictures."""

    async def find(self, name: str, query: str) -> HostedPicture:
        """Raises ``NotServed`` for whatever a url does not open, ``Overloaded``."""


class HostedRoutes:
    """Answers for the hosted pictures; one coroutine a request."""

    def __init__(
        self,
        pictures: Pictures,
        *,
        counted: Callable[[str], None] = lambda outcome: None,
        sent: Callable[[int], None] = lambda count: None,
    ) -> None:
        """``counted`` hears ``served``, ``not_found`` or ``unavailable`` of each question, and
        ``sent`` how many bytes left."""
        self._pictures = pictures
        self._counted = counted
        self._sent = sent

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """From the request line to the last byte; the name is what follows ``HOSTED`` in the
        path. Every answer has a request id of its own."""
        own = new_request_id()
        door, headers = opened_to_read(scope, receive, send)
        try:
            head = await self._answer(own, scope, headers)
            try:
                await deliver(own, head, door)
            finally:
                self._sent(door.bytes_out)
        except asyncio.CancelledError:
            # It ends here: whatever is raised, the server takes for a crash.
            await door.give_up(own, error_head(ask_again("picture"), own, ANYBODY))
        finally:
            door.stop_watching()

    async def _answer(self, own: str, scope: Scope, headers: Mapping[str, str]) -> Head:
        method = scope["method"]
        if method == "OPTIONS":
            return Head(204, (*PREFLIGHT, ("x-request-id", own)), None, nothing)
        if method not in ("GET", "HEAD"):
            refused = NotServed(
                f"{HOSTED}{{name}} takes {METHODS}, not {method}.",
                status=405,
                code="method_not_allowed",
            )
            return error_head(refused, own, (*ANYBODY, ("allow", METHODS)))
        name = str(scope["path"]).removeprefix(HOSTED)
        try:
            found = await self._pictures.find(name, scope["query_string"].decode("latin-1"))
        except GatewayError as error:
            self._counted("not_found" if isinstance(error, NotServed) else "unavailable")
            return error_head(error, own, (*ANYBODY, ("cache-control", "no-store")))
        except Exception:
            log.exception("the question for a picture crashed", extra={"request_id": own})
            self._counted("unavailable")
            return error_head(crashed(), own, ANYBODY)
        self._counted("served")
        return _shown(own, found, headers, whole=method == "HEAD")


def _shown(own: str, found: HostedPicture, asked: Mapping[str, str], *, whole: bool) -> Head:
    """A picture, or the part of it that is wanted; ``whole``: its head alone."""
    # A name is never given to other bytes.
    tag, size = f'"{found.name}"', found.size_bytes
    said: Headers = (
        ("x-request-id", own),
        ("etag", tag),
        ("cache-control", f"private, max-age={found.left_seconds}, immutable"),
        *TO_ANYBODY,
        *HARMLESS,
    )
    if names(asked.get("if-none-match", ""), tag):
        return Head(304, said, None, nothing)
    said = (
        *said,
        ("content-type", found.media_type),
        ("content-disposition", f'inline; filename="{found.name}"'),
        ("accept-ranges", "bytes"),
    )
    if whole:
        return Head(200, said, size, nothing)
    part = None
    if still(asked.get("if-range"), tag):
        try:
            part = part_of(asked.get("range", ""), size)
        except Unsatisfiable:
            beyond = NotServed(
                f"The picture has {size} bytes, and the range begins behind them.",
                status=416,
                code="range_not_satisfiable",
            )
            return error_head(beyond, own, (*TO_ANYBODY, ("content-range", f"bytes */{size}")))
    if part is None:
        return Head(200, said, size, found.chunks)
    ranged = f"bytes {part.start}-{part.end - 1}/{size}"
    return Head(
        206,
        (*said, ("content-range", ranged)),
        part.end - part.start,
        lambda: replay.pieces((part,), found.chunks()),
    )
