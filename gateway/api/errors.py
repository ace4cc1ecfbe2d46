"""Errors of the other routes in the same shape as those of the relayed ones."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from gateway.api.door import new_request_id
from gateway.domain.errors import GatewayError, Internal, InvalidRequest, NotServed, Overloaded
from gateway.relay.headers import error_head


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
    status = error.status_code if isinstance(error, HTTPException) else 500
    known = {
        404: f"This gateway does not serve {request.url.path}. It answers "
        "/v1/images/generations, /v1/images/edits, /v1/images/estimate, /v1/images/results/{id} "
        "and /v1/models.",
        405: f"{request.url.path} does not take {request.method}.",
    }
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(status, "invalid_request")
    message = known.get(status, "The request could not be read.")
    return await _answer(NotServed(message, status=status, code=code), request)


async def _crash(request: Request, error: Exception) -> Response:
    return await _answer(Internal("The gateway failed in a way it should not."), request)


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
