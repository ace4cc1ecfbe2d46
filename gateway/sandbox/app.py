"""The ASGI app: an images API as strict as OpenAI's, that draws real pictures for nothing.

::

    POST /v1/images/generations    GET /v1/models         everything else under /v1: 404
    POST /v1/images/edits          GET /v1/models/{id}
    GET  /v1/organization/costs    with a key that starts with sk-admin

    POST, DELETE /sandbox/rules    GET /sandbox/journal   only with control=True, without a key

Any non-empty bearer token is a key. A request is read whole, written into the journal, met by its
rule, checked, drawn, billed, and answered, in this order.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.types import Receive, Scope, Send

from gateway.domain.call import Json, Operation
from gateway.ports import Clock
from gateway.sandbox import costs
from gateway.sandbox.answer import Purchase, error_event
from gateway.sandbox.forms import Form, Malformed, read_json, read_multipart
from gateway.sandbox.journal import Journal, Record
from gateway.sandbox.models import find, served
from gateway.sandbox.rules import Rule, Rules, Unset, rule_from_json
from gateway.sandbox.validate import Refused, check
from gateway.sandbox.watch import Gate
from gateway.sandbox.wire import ConnectionCut, Wire

OPERATIONS = {f"/v1{operation.path}": operation for operation in Operation}
MAX_BODY_BYTES = 900 * 1024 * 1024
"""Sixteen images of 50 MB and some (contract 2.4)."""

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

    def close(self) -> None:
        """Ends every pause and every held request, from any thread."""
        self.closing.set()


@dataclass(frozen=True, slots=True)
class State:
    sandbox: Sandbox


def create_sandbox(
    clock: Clock,
    *,
    rules: Rules | None = None,
    journal: Journal | None = None,
    latency_seconds: float = 0,
    control: bool = False,
) -> SandboxApp:
    """The app; its ``state.sandbox`` holds the rules and the journal.

    ``latency_seconds`` is how long a picture takes at least, in real time; ``clock`` decides which
    models have been retired. ``journal=Journal(records=0)`` for a sandbox that runs for months.
    """
    sandbox = Sandbox(
        clock,
        rules if rules is not None else Rules(),
        journal if journal is not None else Journal(),
        latency_seconds,
        control,
    )
    return SandboxApp(sandbox)


class SandboxApp:
    """An ASGI app; make it with ``create_sandbox``."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.state = State(sandbox)
        self._numbers = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        exchange = _Exchange(self.state.sandbox, next(self._numbers), scope, receive, send)
        try:
            await exchange.run()
        except ConnectionCut:
            if not exchange.wire.closes:
                raise


class _Exchange:
    """One request and its answer."""

    def __init__(
        self, sandbox: Sandbox, number: int, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._sandbox = sandbox
        self._scope, self._receive, self._send = scope, receive, send
        self._started_at = sandbox.clock.monotonic()
        self._rule = Rule()
        self._record = Record(
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

    async def run(self) -> None:
        try:
            body = await self._body()
            if self._sandbox.control and self._record.path.startswith("/sandbox/"):
                await self._control(body)
                return
            await asyncio.to_thread(self._record.take_body, body, self._sandbox.journal.body_bytes)
            self._sandbox.journal.add(self._record)
            self._authenticate()
            await self._dispatch(body)
        except Refused as refused:
            await self._json(refused.status, {"error": refused.error})

    async def _body(self) -> bytes:
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

    def _authenticate(self) -> None:
        scheme, _, token = (self._record.header("authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Refused(
                "You didn't provide an API key. You need to provide your API key in an "
                "Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY).",
                code="invalid_api_key",
                status=401,
            )

    async def _dispatch(self, body: bytes) -> None:
        method, path = self._record.method, self._record.path
        operation = OPERATIONS.get(path)
        if operation is not None and method == "POST":
            await self._images(operation, body)
        elif operation is not None:
            raise Refused(
                f"Not allowed to {method} on {path}.", code="method_not_supported", status=405
            )
        elif path == "/v1/models" and method == "GET":
            await self._models()
        elif path.startswith("/v1/models/") and method == "GET":
            await self._model(path.removeprefix("/v1/models/"))
        elif path == costs.PATH and method == "GET":
            await self._costs()
        else:
            raise Refused(f"Invalid URL ({method} {path})", code="unknown_url", status=404)

    async def _models(self) -> None:
        """Its rules match its path and the key."""
        token = (self._record.header("authorization") or "").partition(" ")[2]
        self._rule = self._sandbox.rules.take(self._record.path, "", "", token)
        self.wire = self._new_wire()
        await self._linger()
        if self._rule.refuses:
            await self._fault()
            return
        rows: list[Json] = [row.as_json() for row in served(self._sandbox.clock.now())]
        await self._json(200, {"object": "list", "data": rows})

    async def _model(self, name: str) -> None:
        row = find(name, self._sandbox.clock.now())
        if row is None:
            raise Refused(
                f"The model '{name}' does not exist",
                code="model_not_found",
                param="model",
                status=404,
            )
        await self._json(200, row.as_json())

    async def _costs(self) -> None:
        """What was billed, a day a bucket. Its rules match its path alone."""
        self._rule = self._sandbox.rules.take(self._record.path, "", "")
        self.wire = self._new_wire()
        await self._linger()
        if self._rule.refuses:
            await self._fault()
            return
        if not costs.may_read(self._record.header("authorization") or ""):
            raise Refused(
                "You have insufficient permissions for this operation. Missing scopes: "
                "api.usage.read. Check that you have the correct role in your organization.",
                code=None,
                status=401,
            )
        asked = costs.read_query(self._record.query, self._sandbox.clock.now())
        billed = self._sandbox.journal.costs
        await self._json(200, costs.page(asked, billed, self._rule.drift_percent))

    async def _images(self, operation: Operation, body: bytes) -> None:
        form, trouble = await asyncio.to_thread(self._read, operation, body)
        self._record.fields = form.fields
        self._record.files = tuple(upload.part for upload in form.uploads)
        model, prompt = form.fields.get("model"), form.fields.get("prompt")
        self._rule = self._sandbox.rules.take(
            self._record.path,
            model if isinstance(model, str) else "",
            prompt if isinstance(prompt, str) else "",
            (self._record.header("authorization") or "").partition(" ")[2],
        )
        self.wire = self._new_wire()
        if self._rule.refuses:
            await self._linger()
            await self._fault()
            return
        if trouble is not None:
            raise trouble
        now = self._sandbox.clock.now()
        order = await asyncio.to_thread(check, operation, form, now, self._record.request_id)
        purchase = Purchase(order, self._rule, self._record.number, int(now.timestamp()))
        await self._linger()
        if order.stream and not self._rule.json_for_stream:
            await self._stream(purchase)
        else:
            await self._whole(purchase)

    def _read(self, operation: Operation, body: bytes) -> tuple[Form, Refused | None]:
        """The form, and why there is none: a rule may still want to answer first."""
        kind = self._record.header("content-type") or ""
        essence = kind.partition(";")[0].strip().lower()
        try:
            if essence == "application/json":
                return read_json(body), None
            if essence == "multipart/form-data" and operation is Operation.EDIT:
                return read_multipart(kind, body), None
        except Malformed:
            what = "JSON body" if essence == "application/json" else "multipart form"
            message = f"We could not parse the {what} of your request."
            return Form({}), Refused(message, code=None)
        return Form({}), Refused(
            f"Unsupported content type: '{essence}'. This API method only accepts "
            "'application/json' requests, but you specified the header 'Content-Type: "
            f"{essence}'. Please try again with a supported content type.",
            code="unsupported_content_type",
        )

    async def _linger(self) -> None:
        """What a rule does before anything is worked on."""
        if self._rule.wait_for is not None and self._rule.wait_after is None:
            await self.wire.hold(self._rule.wait_for)
        await self.wire.pause(self._rule.delay_seconds)

    async def _fault(self) -> None:
        """Answers as the rule says, in place of the API."""
        rule = self._rule
        status = rule.status if rule.status is not None else 307
        if rule.counts:
            self._bill(0, None)
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
        await self.wire.answer(status, self._headers(kind, headers), body)

    async def _whole(self, purchase: Purchase) -> None:
        """A JSON answer: worked for, billed, then sent or spoilt."""
        rule = self._rule
        await self.wire.pause(self._sandbox.latency_seconds)
        body = await asyncio.to_thread(purchase.json)
        if rule.counts:
            self._bill(purchase.pictures, purchase.usage(), purchase.order.model.id)
        if rule.cut_before_headers:
            await self.wire.cut()
        kind, extra = "application/json", {"content-encoding": "gzip"} if rule.gzip else {}
        if rule.error_in_200:
            body, extra = json.dumps({"error": SERVER_ERROR}).encode(), {}
        elif rule.html_200:
            body, kind, extra = _edge_page(200), "text/html; charset=UTF-8", {}
        elif rule.empty_body:
            body, extra = b"", {}
        await self.wire.answer(200, self._headers(kind, extra), body)

    async def _stream(self, purchase: Purchase) -> None:
        """A stream of events. It is billed when its work starts: a cut changes nothing."""
        rule, wire = self._rule, self.wire
        if rule.counts:
            self._bill(purchase.pictures, purchase.stream_usage(), purchase.order.model.id)
        if rule.cut_before_headers:
            await wire.cut()
        if rule.error_in_200 or rule.html_200:
            page = (
                _edge_page(200) if rule.html_200 else json.dumps({"error": SERVER_ERROR}).encode()
            )
            kind = "text/html; charset=UTF-8" if rule.html_200 else "application/json"
            await wire.answer(200, self._headers(kind, {}), page)
            return
        events = "text/event-stream; charset=utf-8"
        await wire.start(200, self._headers(events, {"cache-control": "no-cache"}))
        pieces = [] if rule.empty_body or rule.empty_data else list(purchase.pieces())
        latency = self._sandbox.latency_seconds / max(1, len(pieces))
        for sent, piece in enumerate(pieces):
            await wire.pause(latency)
            last = piece.partial is None
            held = rule.wait_after is not None and (last or sent >= rule.wait_after)
            if held and rule.wait_for is not None and not rule.wait_for.is_set():
                await wire.hold(rule.wait_for)
            if rule.sse_cut_after is not None and (last or sent >= rule.sse_cut_after):
                await wire.cut()
            if rule.sse_error_after is not None and (last or sent >= rule.sse_error_after):
                await wire.write(error_event(SERVER_ERROR))
                break
            if last and rule.sse_garbage:
                await wire.write(b"data: {this is no JSON\n\n")
            elif not (last and rule.sse_no_completed):
                await wire.write(await asyncio.to_thread(purchase.event, piece))
        if rule.done_marker:
            await wire.write(b"data: [DONE]\n\n")
        await wire.end()

    async def _control(self, body: bytes) -> None:
        sandbox, asked = self._sandbox, (self._record.method, self._record.path)
        if asked == ("POST", "/sandbox/rules"):
            try:
                sandbox.rules.add(rule_from_json(json.loads(body)))
            except ValueError as error:
                raise Refused(str(error), code="invalid_rule") from None
            await self._json(201, {"rules": len(sandbox.rules)})
        elif asked == ("DELETE", "/sandbox/rules"):
            sandbox.rules.clear()
            await self._json(200, {"rules": 0})
        elif asked == ("GET", "/sandbox/journal"):
            records: list[Json] = [record.as_json() for record in sandbox.journal]
            totals: dict[str, Json] = {
                "received": sandbox.journal.received,
                "billed_requests": sandbox.journal.billed_requests,
                "billed_images": sandbox.journal.billed_images,
            }
            await self._json(200, {**totals, "records": records})
        else:
            raise Refused(f"Invalid URL ({asked[0]} {asked[1]})", code="unknown_url", status=404)

    def _bill(self, images: int, usage: Json, model: str = "") -> None:
        items = costs.line_items(model, usage)
        self._sandbox.journal.bill(self._record, self._sandbox.clock.now(), images, usage, items)

    def _new_wire(self) -> Wire:
        return Wire(
            self._scope,
            self._receive,
            self._send,
            self._rule,
            self._sandbox.closing,
            lambda status: self._sandbox.journal.answer(self._record, status),
        )

    async def _json(self, status: int, value: dict[str, Json]) -> None:
        headers = self._headers("application/json", {})
        await self.wire.answer(status, headers, json.dumps(value).encode())

    def _headers(self, content_type: str, extra: dict[str, str]) -> list[tuple[str, str]]:
        """What OpenAI sends (contract 4.5), with what a gateway must not pass on: the owner's
        organisation, the shared account's limits, a cookie. A rule's own go over all."""
        took = self._sandbox.clock.monotonic() - self._started_at
        headers = {
            "content-type": self._rule.content_type or content_type,
            "x-request-id": self._record.request_id,
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
            "cf-ray": f"{self._record.number:016x}-FRA",
            **extra,
        }
        headers |= {name.lower(): value for name, value in self._rule.headers.items()}
        return list(headers.items())


async def _lifespan(receive: Receive, send: Send) -> None:
    """There is nothing to start and nothing to stop; the server asks all the same."""
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        else:
            await send({"type": "lifespan.shutdown.complete"})
            return


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
