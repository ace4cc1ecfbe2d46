"""The ASGI app: an API as strict as OpenAI's, that draws real pictures for nothing.

Any non-empty key will do. What is stored under one is not there for another, as between OpenAI's
projects (``red@1`` and ``red@2`` are keys of one project). A request is read whole, written into
the journal, met by its rule, checked, drawn, billed, and answered, in this order. ``ROUTES`` are
the endpoints; besides, only with control=True and without a key: POST, DELETE /sandbox/rules and
GET /sandbox/journal.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from starlette.types import Receive, Scope, Send

from gateway.domain.call import Json
from gateway.ports import Clock
from gateway.sandbox import costs
from gateway.sandbox.azure import no_access
from gateway.sandbox.checks import check_provenance, moderate
from gateway.sandbox.exchange import AZURE, Exchange, Sandbox
from gateway.sandbox.files import create_file, delete_file, file_content, get_file, list_files
from gateway.sandbox.images import edits, generations
from gateway.sandbox.journal import Journal
from gateway.sandbox.models import listed
from gateway.sandbox.refusals import Refused
from gateway.sandbox.responses import (
    cancel_response,
    create_response,
    delete_response,
    get_response,
    list_input_items,
)
from gateway.sandbox.rules import Rules, rule_from_json
from gateway.sandbox.wire import ConnectionCut

Handler: TypeAlias = Callable[[Exchange, bytes, str], Awaitable[None]]
"""Answers a request: its body, and the id in its path (empty where it has none)."""


class Route(NamedTuple):
    """``*`` stands for one segment of the path, the id."""

    method: str
    path: str
    handler: Handler

    def fits(self, path: str) -> re.Match[str] | None:
        return re.fullmatch(re.escape(self.path).replace(r"\*", "([^/]+)"), path)


async def _models(exchange: Exchange, body: bytes, name: str) -> None:
    """Its rules match its path and the key."""
    if await exchange.met():
        return
    rows: list[Json] = [row.as_json() for row in listed(exchange.sandbox.clock.now())]
    await exchange.json(200, {"object": "list", "data": rows})


async def _model(exchange: Exchange, body: bytes, name: str) -> None:
    rows = listed(exchange.sandbox.clock.now())
    row = next((row for row in rows if row.id == name), None)
    if row is None:
        raise Refused(
            f"The model '{name}' does not exist",
            code="model_not_found",
            param="model",
            status=404,
        )
    await exchange.json(200, row.as_json())


async def _costs(exchange: Exchange, body: bytes, name: str) -> None:
    """What was billed, a day a bucket."""
    if await exchange.met():
        return
    if not costs.may_read(exchange.record.header("authorization") or ""):
        raise Refused(
            "You have insufficient permissions for this operation. Missing scopes: "
            "api.usage.read. Check that you have the correct role in your organization.",
            code=None,
            status=401,
        )
    sandbox = exchange.sandbox
    asked = costs.read_query(exchange.record.query, sandbox.clock.now())
    await exchange.json(200, costs.page(asked, sandbox.journal.costs, exchange.rule.drift_percent))


ROUTES = (
    Route("POST", "/v1/images/generations", generations),
    Route("POST", "/v1/images/edits", edits),
    Route("POST", "/openai/deployments/*/images/generations", generations),
    Route("POST", "/openai/deployments/*/images/edits", edits),
    Route("POST", "/v1/files", create_file),
    Route("GET", "/v1/files", list_files),
    Route("GET", "/v1/files/*", get_file),
    Route("DELETE", "/v1/files/*", delete_file),
    Route("GET", "/v1/files/*/content", file_content),
    Route("POST", "/v1/responses", create_response),
    Route("GET", "/v1/responses/*", get_response),
    Route("DELETE", "/v1/responses/*", delete_response),
    Route("POST", "/v1/responses/*/cancel", cancel_response),
    Route("GET", "/v1/responses/*/input_items", list_input_items),
    Route("POST", "/v1/moderations", moderate),
    Route("POST", "/v1/content_provenance_checks", check_provenance),
    Route("GET", "/v1/models", _models),
    Route("GET", "/v1/models/*", _model),
    Route("GET", costs.PATH, _costs),
)


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
        exchange = Exchange(self.state.sandbox, next(self._numbers), scope, receive, send)
        try:
            await _answer(exchange)
        except ConnectionCut:
            if not exchange.wire.closes:
                raise


async def _answer(exchange: Exchange) -> None:
    sandbox, record = exchange.sandbox, exchange.record
    try:
        body = await exchange.body()
        if sandbox.control and record.path.startswith("/sandbox/"):
            await _control(exchange, body)
            return
        await asyncio.to_thread(record.take_body, body, sandbox.journal.body_bytes)
        sandbox.journal.add(record)
        _authenticate(exchange)
        handler, name = _route(record.method, record.path)
        await handler(exchange, body, name)
    except Refused as refused:
        await exchange.json(refused.status, {"error": refused.error})


def _authenticate(exchange: Exchange) -> None:
    if not exchange.key and exchange.record.path.startswith(AZURE):
        raise no_access()
    if not exchange.key:
        raise Refused(
            "You didn't provide an API key. You need to provide your API key in an "
            "Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY).",
            code="invalid_api_key",
            status=401,
        )


def _route(method: str, path: str) -> tuple[Handler, str]:
    """The endpoint's handler and the id in the path; Azure's v1 paths are OpenAI's below
    ``/openai``. Raises ``Refused``."""
    plain = path.removeprefix("/openai") if path.startswith(f"{AZURE}v1/") else path
    fitting = [(route, found) for route in ROUTES if (found := route.fits(plain)) is not None]
    for route, found in fitting:
        if route.method == method:
            return route.handler, "".join(found.groups())
    if fitting:
        raise Refused(
            f"Not allowed to {method} on {path}.", code="method_not_supported", status=405
        )
    raise Refused(f"Invalid URL ({method} {path})", code="unknown_url", status=404)


async def _control(exchange: Exchange, body: bytes) -> None:
    sandbox, asked = exchange.sandbox, (exchange.record.method, exchange.record.path)
    if asked == ("POST", "/sandbox/rules"):
        try:
            sandbox.rules.add(rule_from_json(json.loads(body)))
        except ValueError as error:
            raise Refused(str(error), code="invalid_rule") from None
        await exchange.json(201, {"rules": len(sandbox.rules)})
    elif asked == ("DELETE", "/sandbox/rules"):
        sandbox.rules.clear()
        await exchange.json(200, {"rules": 0})
    elif asked == ("GET", "/sandbox/journal"):
        records: list[Json] = [record.as_json() for record in sandbox.journal]
        totals: dict[str, Json] = {
            "received": sandbox.journal.received,
            "billed_requests": sandbox.journal.billed_requests,
            "billed_images": sandbox.journal.billed_images,
        }
        await exchange.json(200, {**totals, "records": records})
    else:
        raise Refused(f"Invalid URL ({asked[0]} {asked[1]})", code="unknown_url", status=404)


async def _lifespan(receive: Receive, send: Send) -> None:
    """There is nothing to start and nothing to stop; the server asks all the same."""
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        else:
            await send({"type": "lifespan.shutdown.complete"})
            return
