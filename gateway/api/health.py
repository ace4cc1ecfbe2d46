"""`/healthz`, `/readyz` and `/metrics`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

PROBES = ("GET", "HEAD")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether traffic should come here: every store's state, and what is degraded and why.
    ``draining``: the process ends, and nobody asked the stores."""

    ready: bool
    degraded: Mapping[str, str]
    stores: Mapping[str, bool]
    draining: bool = False


def health_routes(look: Callable[[], Awaitable[Readiness]]) -> APIRouter:
    routes = APIRouter()

    @routes.api_route("/healthz", methods=[*PROBES])
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @routes.api_route("/readyz", methods=[*PROBES])
    async def readyz() -> JSONResponse:
        state = await look()
        words = "degraded" if state.degraded else "ready"
        content = {
            "status": words if state.ready else "draining" if state.draining else "not ready",
            "stores": {name: "up" if up else "down" for name, up in state.stores.items()},
            "degraded": dict(state.degraded),
        }
        return JSONResponse(content, 200 if state.ready else 503)

    return routes


def metrics_routes(exposition: Callable[[], Awaitable[bytes]]) -> APIRouter:
    routes = APIRouter()

    @routes.api_route("/metrics", methods=[*PROBES])
    async def metrics() -> Response:
        return Response(await exposition(), media_type=CONTENT_TYPE)

    return routes
