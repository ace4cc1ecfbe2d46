"""Pages of other origins, where the operator lets them in: Starlette's middleware, which is pure
ASGI, around every door, refusals and raw routes too.

Without credentials: keys are in headers that a page sets itself, never in cookies. A preflight is
refused in the shape of every other error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from gateway.api.door import ASGIApp, Receive, Scope, Send, new_request_id
from gateway.domain.errors import NotServed
from gateway.relay.headers import error_head

METHODS = ("DELETE", "GET", "HEAD", "POST")
HEADERS = frozenset(
    {
        "accept",
        "accept-language",
        "api-key",
        "authorization",
        "cache-control",
        "content-language",
        "content-type",
        "idempotency-key",
        "if-none-match",
        "prefer",
        "range",
        "traceparent",
        "tracestate",
        "user-agent",
    }
)
"""What a page may send, and ``ADDED``: by the SDKs and Open WebUI."""
ADDED = re.compile(r"(?:x-stainless|x-openwebui-user|openai)-[a-z0-9-]+")
EXPOSED = (
    "age",
    "idempotent-replayed",
    "location",
    "openai-processing-ms",
    "openai-version",
    "preference-applied",
    "retry-after",
    "retry-after-ms",
    "sunset",
    "x-budget-remaining-usd",
    "x-budget-reset",
    "x-cache",
    "x-cost-basis",
    "x-cost-bound-usd",
    "x-cost-usd",
    "x-gateway-attempts",
    "x-gateway-changed",
    "x-gateway-upstream",
    "x-gateway-warning",
    "x-model-served",
    "x-ratelimit-limit-images",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-images",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-images",
    "x-ratelimit-reset-requests",
    "x-request-id",
    "x-should-retry",
    "x-upstream-request-id",
)
"""What a page may read of an answer: all that the gateway says (lessons.md 4)."""
OPEN_TO_ALL = "/v1/images/hosted/"
"""What is below says itself who may have it."""


class Cors(CORSMiddleware):
    """Lets pages of ``origins`` in: exact ones, or ``*`` for all."""

    def __init__(self, app: ASGIApp, origins: Sequence[str], max_age: timedelta) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            # Which ones is judged below, for the SDKs have more than can be listed.
            allow_headers=["*"],
            # From the internet into a private network: only for who is named.
            allow_private_network="*" not in origins,
            expose_headers=EXPOSED,
            max_age=int(max_age.total_seconds()),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(OPEN_TO_ALL):
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        asked = request_headers.get("access-control-request-headers", "").lower().split(",")
        foreign = [name for one in asked if (name := one.strip()) and not _allowed(name)]
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400 and not foreign:
            return Response(status_code=204, headers=_kept(answer))
        what = f"the header {foreign[0][:64]}" if foreign else bytes(answer.body).decode().lower()
        error = NotServed(
            f"A page of {request_headers['origin'][:200]} may not ask for this: {what}. The "
            "gateway's operator decides, with server.cors.",
            status=400,
            code="cors_refused",
        )
        head = error_head(error, new_request_id())
        return Response(error.content, head.status, {**_kept(answer), **dict(head.headers)})


def _allowed(name: str) -> bool:
    return name in HEADERS or ADDED.fullmatch(name) is not None


def _kept(answer: Response) -> dict[str, str]:
    """Its headers but for those of its body."""
    return {
        name: value
        for name, value in answer.headers.items()
        if name not in ("content-type", "content-length")
    }
