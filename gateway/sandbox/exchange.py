"""One request and its answer: what every endpoint needs, and where a rule breaks it."""

from __future__ import annotations

import asyncio
import gzip
import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from http import HTTPStatus
from typing import NamedTuple

from starlette.types import Receive, Scope, Send

from gateway.domain.call import Json
from gateway.ports import Clock
from gateway.sandbox.archive import StoredResponse, item_bytes, response_bytes
from gateway.sandbox.forms import Form, Malformed, StoredFile, read_json, read_multipart
from gateway.sandbox.journal import Journal, Record
from gateway.sandbox.refusals import Refused, unreadable, unsupported
from gateway.sandbox.rules import Rule, Rules, Unset
from gateway.sandbox.shelf import Shelf
from gateway.sandbox.watch import Gate
from gateway.sandbox.wire import ConnectionCut, Wire

JSON = "application/json"
MULTIPART = "multipart/form-data"
AZURE = "/openai/"
"""How Azure's paths begin."""
MAX_BODY_BYTES = 900 * 1024 * 1024
"""Sixteen images of 50 MB and some (contract 2.4)."""
MAX_KEPT_BYTES = 1024 * 1024 * 1024

EDGE_STATUSES = frozenset({502, 504, *range(520, 525)})
EDGE_PAGE = (
    "<!DOCTYPE html>\n<html><head><title>api.openai.com | {status}</title></head>\n"
    "<body><center><h1>{status} {reason}</h1></center><hr><center>cloudflare</center></body>"
    "</html>\n"
)
SERVER_ERROR: dict[str, Json] = {
    "message": "The server had an error while processing your request. Sorry about that!",
    "type": "server_error",
    "param": None,
    "code": "server_error",
}


@dataclass(frozen=True, slots=True)
class Sandbox:
    """What a test may look at and change while the sandbox runs."""

    clock: Clock
    rules: Rules = field(default_factory=Rules)
    journal: Journal = field(default_factory=Journal)
    latency_seconds: float = 0
    control: bool = False
    closing: Gate = field(default_factory=Gate)
    files: Shelf[StoredFile] = field(
        default_factory=lambda: Shelf(lambda file: len(file.content), MAX_KEPT_BYTES)
    )
    responses: Shelf[StoredResponse] = field(
        default_factory=lambda: Shelf(response_bytes, MAX_KEPT_BYTES)
    )
    items: Shelf[dict[str, Json]] = field(default_factory=lambda: Shelf(item_bytes, MAX_KEPT_BYTES))

    def close(self) -> None:
        """Ends every pause and every held request, from any thread."""
        self.closing.set()


class Moment(Enum):
    """What an event of a stream is to a rule."""

    STEP = "step"
    PARTIAL = "partial"
    LAST = "last"


class Beat(NamedTuple):
    """An event of a stream; its bytes are made when it is sent."""

    moment: Moment
    make: Callable[[], bytes]


class Exchange:
    """A request on its way. ``rule`` and ``wire`` change when ``met`` has found its rule."""

    def __init__(
        self, sandbox: Sandbox, number: int, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self.sandbox = sandbox
        self._scope, self._receive, self._send = scope, receive, send
        self._started_at = sandbox.clock.monotonic()
        self.rule = Rule()
        self.record = Record(
            number=number,
            request_id=f"req_{secrets.token_hex(16)}",
            received_at=sandbox.clock.now(),
            method=scope["method"],
            path=scope["path"],
            query=scope["query_string"].decode("latin-1"),
            headers=tuple(
                (name.decode("latin-1").lower(), value.decode("latin-1"))
                for name, value in scope["headers"]
            ),
        )
        self.wire = self._new_wire()

    async def body(self) -> bytes:
        """The whole body. Raises ``Refused`` when it is too large, ``ConnectionCut`` when the
        client left before its end."""
        chunks: list[bytes] = []
        total = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ConnectionCut
            chunks.append(message.get("body", b""))
            total += len(chunks[-1])
            if total > MAX_BODY_BYTES:
                raise Refused("The request is too large.", code="request_too_large", status=413)
            if not message.get("more_body", False):
                return b"".join(chunks)

    @property
    def key(self) -> str:
        """The caller's; Azure's paths take it in a header of their own too. Empty: none."""
        scheme, _, token = (self.record.header("authorization") or "").partition(" ")
        if scheme.lower() == "bearer" and token.strip():
            return token.strip()
        azure = self.record.path.startswith(AZURE)
        return (self.record.header("api-key") or "").strip() if azure else ""

    @property
    def project(self) -> str:
        """Whose files and responses these are: a key's own, but ``red@1`` and ``red@2`` are two
        keys of one project."""
        return self.key.partition("@")[0]

    @property
    def created(self) -> int:
        """Now, in seconds since 1970."""
        return int(self.sandbox.clock.now().timestamp())

    def stored(self, file_id: str) -> StoredFile | None:
        """A file of the caller's that has not expired."""
        found = self.sandbox.files.get(self.project, file_id)
        if found is None or (found.expires is not None and found.expires <= self.created):
            return None
        return found

    async def form(self, body: bytes, *kinds: str) -> tuple[Form, Refused | None]:
        """What the body says, noted in the journal, and why it says nothing: a rule may still
        want to answer first. ``kinds`` are the media types taken, OpenAI's own word first."""
        form, trouble = await asyncio.to_thread(self._form, body, kinds)
        self.record.fields = form.fields
        self.record.files = tuple(upload.part for upload in form.uploads)
        return form, trouble

    def _form(self, body: bytes, kinds: tuple[str, ...]) -> tuple[Form, Refused | None]:
        kind = self.record.header("content-type") or ""
        essence = kind.partition(";")[0].strip().lower()
        if essence not in kinds:
            return Form({}), unsupported(essence, kinds[0])
        try:
            if essence == JSON:
                return read_json(body, self.stored), None
            return read_multipart(kind, body), None
        except Malformed:
            return Form({}), unreadable(essence)

    async def met(self, model: str = "", prompt: str = "", *, lingers: bool = True) -> bool:
        """Takes the request's rule and does what it says before anything is worked on. True where
        the rule has answered in place of the API."""
        self.rule = self.sandbox.rules.take(
            self.record.path, model, prompt, self.key, self.record.method
        )
        self.wire = self._new_wire()
        if lingers or self.rule.refuses:
            await self.linger()
        if self.rule.refuses:
            await self._fault()
        return self.rule.refuses

    async def linger(self) -> None:
        """The rule's gate and delay."""
        if self.rule.wait_for is not None and self.rule.wait_after is None:
            await self.wire.hold(self.rule.wait_for)
        await self.wire.pause(self.rule.delay_seconds)

    @staticmethod
    def dump(value: Mapping[str, Json]) -> bytes:
        return json.dumps(value).encode()

    async def json(self, status: int, value: Mapping[str, Json]) -> None:
        """An answer of no work, which a rule does not spoil."""
        headers = self.headers("application/json", {})
        await self.wire.answer(status, headers, json.dumps(value).encode())

    async def whole(
        self,
        body: bytes,
        content_type: str = "application/json",
        extra: Mapping[str, str] | None = None,
        status: int = 200,
    ) -> None:
        """An answer that was worked for, sent as it is or spoilt."""
        rule = self.rule
        if rule.cut_before_headers:
            await self.wire.cut()
        headers = dict(extra or {})
        if rule.error_in_200:
            body, headers = json.dumps({"error": SERVER_ERROR}).encode(), {}
        elif rule.html_200:
            body, content_type, headers = _edge_page(200), "text/html; charset=UTF-8", {}
        elif rule.empty_body:
            body, headers = b"", {}
        elif rule.gzip:
            body = await asyncio.to_thread(gzip.compress, body, 1)
            headers["content-encoding"] = "gzip"
        await self.wire.answer(status, self.headers(content_type, headers), body)

    async def stream(
        self, beats: Iterable[Beat], error_event: Callable[[Mapping[str, Json], int], bytes]
    ) -> None:
        """Events as they are, or broken off. Rules count partial images and ends, not steps. An
        error event is made from OpenAI's error and how many events went before it."""
        rule, wire = self.rule, self.wire
        if rule.cut_before_headers or rule.error_in_200 or rule.html_200:
            await self.whole(b"")
            return
        events = "text/event-stream; charset=utf-8"
        await wire.start(200, self.headers(events, {"cache-control": "no-cache"}))
        pieces = [] if rule.empty_body or rule.empty_data else list(beats)
        latency = self.sandbox.latency_seconds / max(1, len(pieces))
        sent = 0
        for number, piece in enumerate(pieces):
            await wire.pause(latency)
            if piece.moment is Moment.STEP:
                await wire.write(await asyncio.to_thread(piece.make))
                continue
            last = piece.moment is Moment.LAST
            held = rule.wait_after is not None and (last or sent >= rule.wait_after)
            if held and rule.wait_for is not None and not rule.wait_for.is_set():
                await wire.hold(rule.wait_for)
            if rule.sse_cut_after is not None and (last or sent >= rule.sse_cut_after):
                await wire.cut()
            if rule.sse_error_after is not None and (last or sent >= rule.sse_error_after):
                await wire.write(error_event(SERVER_ERROR, number))
                break
            if last and rule.sse_garbage:
                await wire.write(b"data: {this is no JSON\n\n")
            elif not (last and rule.sse_no_completed):
                await wire.write(await asyncio.to_thread(piece.make))
            sent += 1
        if rule.done_marker:
            await wire.write(b"data: [DONE]\n\n")
        await wire.end()

    async def _fault(self) -> None:
        """Answers as the rule says, in place of the API."""
        rule = self.rule
        status = rule.status if rule.status is not None else 307
        self.bill(0, None)
        if rule.cut_before_headers:
            await self.wire.cut()
        headers = {"location": rule.redirect} if rule.redirect is not None else {}
        kind = "application/json"
        if not isinstance(rule.body, Unset):
            body = rule.body if isinstance(rule.body, bytes) else json.dumps(rule.body).encode()
            kind = kind if not isinstance(rule.body, bytes) else "text/plain"
        elif rule.redirect is not None:
            body = b""
        elif status in EDGE_STATUSES:
            body, kind = _edge_page(status), "text/html; charset=UTF-8"
            headers |= {"server": "cloudflare"}
        else:
            body = json.dumps({"error": _default_error(status)}).encode()
        await self.wire.answer(status, self.headers(kind, headers), body)

    def bill(
        self,
        images: int,
        usage: Json,
        items: Iterable[tuple[str, int]] = (),
        tool_usage: Json = None,
    ) -> None:
        """Puts the request on the sandbox's own bill, unless the rule says that it is not."""
        if self.rule.counts:
            now = self.sandbox.clock.now()
            self.sandbox.journal.bill(self.record, now, images, usage, items, tool_usage)

    def _new_wire(self) -> Wire:
        return Wire(
            self._scope,
            self._receive,
            self._send,
            self.rule,
            self.sandbox.closing,
            lambda status: self.sandbox.journal.answer(self.record, status),
        )

    def headers(self, content_type: str, extra: Mapping[str, str]) -> list[tuple[str, str]]:
        """What OpenAI sends (contract 4.5), with what a gateway must not pass on: the owner's
        organisation, the shared account's limits, a cookie. A rule's own go over all."""
        took = self.sandbox.clock.monotonic() - self._started_at
        headers = {
            "content-type": self.rule.content_type or content_type,
            "x-request-id": self.record.request_id,
            "openai-processing-ms": str(int(took * 1000)),
            "openai-version": "2020-10-01",
            "openai-organization": "org-sandbox",
            "openai-project": "proj_sandbox",
            "x-ratelimit-limit-requests": "500",
            "x-ratelimit-remaining-requests": "499",
            "x-ratelimit-reset-requests": "120ms",
            "x-ratelimit-limit-tokens": "800000",
            "x-ratelimit-remaining-tokens": "799990",
            "x-ratelimit-reset-tokens": "0s",
            "x-ratelimit-limit-input-images": "250",
            "x-ratelimit-remaining-input-images": "250",
            "x-ratelimit-reset-input-images": "0s",
            "set-cookie": "__cf_bm=sandbox; path=/; HttpOnly; Secure; SameSite=None",
            "strict-transport-security": "max-age=31536000; includeSubDomains; preload",
            "alt-svc": 'h3=":443"; ma=86400',
            "cf-ray": f"{self.record.number:016x}-FRA",
            **extra,
        }
        headers |= {name.lower(): value for name, value in self.rule.headers.items()}
        return list(headers.items())


def _edge_page(status: int) -> bytes:
    """What a provider's edge says when its own upstream is ill: HTML, not JSON."""
    reason = HTTPStatus(status).phrase if status in list(HTTPStatus) else "Unknown Error"
    return EDGE_PAGE.format(status=status, reason=reason).encode()


def _default_error(status: int) -> dict[str, Json]:
    """OpenAI's own words for a status (contract 4.2)."""
    match status:
        case 401:
            message = "Incorrect API key provided: sk-sandb********. You can find your API key at "
            message += "https://platform.openai.com/account/api-keys."
            return _error(message, "invalid_request_error", "invalid_api_key")
        case 429:
            message = "Rate limit reached for images in organization org-sandbox on images per min"
            return _error(f"{message}. Please try again in 1s.", "requests", "rate_limit_exceeded")
        case 503:
            message = "The engine is currently overloaded, please try again later"
            return _error(message, "server_error", "overloaded")
        case _ if status >= 500:
            return SERVER_ERROR
        case _:
            return _error("The sandbox was told to refuse.", "invalid_request_error", None)


def _error(message: str, type_: str, code: str | None) -> dict[str, Json]:
    return {"message": message, "type": type_, "param": None, "code": code}
