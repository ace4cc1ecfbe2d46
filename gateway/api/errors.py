"""Errors of the other routes in the same shape as those of the relayed ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from gateway.api.door import ASKED_PATH, crashed, new_request_id
from gateway.domain.errors import GatewayError, Internal, InvalidRequest, NotServed, Overloaded
from gateway.relay.headers import error_head

MAX_PATH = 200
"""Characters of a path that an error repeats."""
SERVED = (
    "/v1/images/generations, /v1/images/edits, /v1/images/estimate, /v1/images/results/{id}, "
    "/v1/models, /v1/responses, /v1/files, /v1/moderations and /v1/content_provenance_checks"
)
NOT_HERE: Mapping[str, str] = MappingProxyType(
    {
        "assistants": "assistants",
        "audio": "audio",
        "batches": "batches",
        "chat": "chat completions",
        "completions": "completions",
        "containers": "containers",
        "conversations": "conversations",
        "embeddings": "embeddings",
        "evals": "evals",
        "fine_tuning": "fine-tuning",
        "organization": "an organization's administration",
        "realtime": "realtime sessions",
        "threads": "threads",
        "uploads": "uploads",
        "vector_stores": "vector stores",
        "videos": "videos",
    }
)
"""What OpenAI has and this gateway has not: what follows ``/v1/`` -> what it is called."""

_VARIATIONS = re.compile(r"/(?:openai(?:/v1|/deployments/[^/]+)?|v1)/images/variations/*")
_FAMILY = re.compile(r"/(?:openai/(?:v1/|deployments/[^/]+/)?|v1/)([a-z_]+)(?:/.*)?", re.DOTALL)


def not_served(path: str) -> NotServed:
    """Why nothing is answered at a path, as its client wrote it."""
    if _VARIATIONS.fullmatch(path):
        return NotServed(
            "OpenAI has retired /v1/images/variations, so nothing is sent there. "
            "/v1/images/edits takes a picture and a prompt.",
            code="endpoint_retired",
        )
    family = _FAMILY.fullmatch(path)
    if family is not None and family[1] in NOT_HERE:
        why = f"This gateway serves images only, not {NOT_HERE[family[1]]}"
    else:
        why = "This gateway does not serve this path"
    hint = "" if path.startswith(("/v1/", "/openai/")) else " Base urls end in /v1."
    return NotServed(f"{why}: {path[:MAX_PATH]}. It answers {SERVED}.{hint}")


def install(app: FastAPI) -> None:
    """Every answer that is not a success is JSON in OpenAI's shape, never HTML."""
    app.add_exception_handler(GatewayError, _gateway_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _crash)


async def _answer(error: GatewayError, request: Request) -> Response:
    rid = str(request.scope.get("state", {}).get("request_id") or new_request_id())
    head = error_head(error, rid)
    return Response(error.content, head.status, dict(head.headers))


async def _gateway_error(request: Request, error: Exception) -> Response:
    return await _answer(
        error if isinstance(error, GatewayError) else Internal(str(error)), request
    )


async def _http_error(request: Request, error: Exception) -> Response:
    path = request.scope.get(ASKED_PATH, request.url.path)
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 404:
        return await _answer(not_served(path), request)
    allow = (error.headers or {}).get("Allow", "") if isinstance(error, HTTPException) else ""
    if status == 405:
        takes = f"{path[:MAX_PATH]} takes {allow}, not {request.method}."
        said = NotServed(takes, status=405, code="method_not_allowed")
        said.headers = (("allow", allow),)
        return await _answer(said, request)
    unread = InvalidRequest("The request could not be read.", status=status, code="bad_framing")
    return await _answer(unread, request)


async def _crash(request: Request, error: Exception) -> Response:
    return await _answer(crashed(), request)


def no_http() -> bytes:
    """The whole answer to bytes that are no request."""
    error = InvalidRequest(
        "The bytes that came are not a valid HTTP/1.1 request.", code="bad_framing", close=True
    )
    return _raw(error, "Bad Request")


def no_room() -> bytes:
    """The whole answer to a connection that is one too many."""
    error = Overloaded(
        "The gateway has as many connections as it takes. Nothing was bought; try again.",
        should_retry=True,
        retry_after_seconds=1,
        close=True,
    )
    return _raw(error, "Service Unavailable")


def _raw(error: GatewayError, phrase: str) -> bytes:
    head = error_head(error, new_request_id())
    lines = [f"{name}: {value}" for name, value in head.headers]
    lines = [f"HTTP/1.1 {head.status} {phrase}", *lines, f"content-length: {head.length}"]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + error.content
