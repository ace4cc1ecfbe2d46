"""The doors, put together: who answers at which path, and on which port."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version

from fastapi import FastAPI

from gateway.api import errors as api_errors
from gateway.api.cors import Cors
from gateway.api.door import ASGIApp
from gateway.api.health import Readiness, health_routes, metrics_routes
from gateway.api.hosted import HostedRoutes
from gateway.api.middleware import RequestId
from gateway.api.models import router as model_routes
from gateway.api.passed import PassedRoutes, Passes
from gateway.api.relayed import RelayedRoutes
from gateway.api.results import ResultDesk, ResultRoutes
from gateway.api.routes import Router, relayed_doors, under
from gateway.ports import Clock, Telemetry
from gateway.relay.hosting import HOSTED, Hosting
from gateway.relay.keyring import KeyRing
from gateway.relay.pipeline import Pipeline
from gateway.relay.plan import Planner
from gateway.relay.running import RESULTS
from gateway.settings import Settings
from gateway.telemetry.metrics import Metrics

DISTRIBUTION = "image-gateway"


def client_doors(
    settings: Settings,
    clock: Clock,
    metrics: Metrics,
    listeners: Sequence[Telemetry],
    *,
    keyring: KeyRing,
    planner: Callable[[], Planner],
    pipeline: Pipeline,
    passes: Sequence[Passes],
    desk: ResultDesk,
    hosting: Hosting | None,
    look: Callable[[], Awaitable[Readiness]],
    exposition: Callable[[], Awaitable[bytes]],
) -> ASGIApp:
    """What stands on ``server.port``. ``planner`` is the one of now; ``look`` and ``exposition``
    are as for ``monitor_doors``."""
    sample = None if settings.tracing.otlp is None else settings.tracing.sample
    relayed = RelayedRoutes(pipeline, listeners, clock, sample)
    passed = PassedRoutes(passes, listeners, clock, sample)
    results = ResultRoutes(
        keyring,
        desk,
        ttl=settings.results.ttl,
        idempotent_ttl=settings.results.idempotent_ttl,
        counted=lambda outcome: metrics.add("gateway_results_total", outcome=outcome),
    )
    doors = [
        *relayed_doors(relayed),
        (passed.takes, passed.handle),
        (under(RESULTS), results.handle),
    ]
    if hosting is not None:
        hosted = HostedRoutes(
            hosting,
            counted=lambda outcome: metrics.add("gateway_hosted_total", outcome=outcome),
            sent=lambda count: metrics.add("gateway_hosted_sent_bytes_total", count),
        )
        doors.append((under(HOSTED), hosted.handle))
    rest = _plain_app()
    rest.include_router(health_routes(look))
    rest.include_router(model_routes(keyring, planner, clock))
    if settings.server.metrics_port is None:
        rest.include_router(metrics_routes(exposition))
    router = Router(doors, RequestId(rest))
    cors = settings.server.cors
    return Cors(router, cors.origins, cors.max_age) if cors.origins else router


def monitor_doors(
    look: Callable[[], Awaitable[Readiness]], exposition: Callable[[], Awaitable[bytes]]
) -> ASGIApp:
    """What stands on ``server.metrics_port``: whether the gateway is ready, and its metrics."""
    monitor = _plain_app()
    monitor.include_router(health_routes(look))
    monitor.include_router(metrics_routes(exposition))
    return RequestId(monitor)


def _plain_app() -> FastAPI:
    app = FastAPI(
        title="image-gateway",
        version=version(DISTRIBUTION),
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        # It would send what it likes, texts of exceptions too, to whatever the environment names.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    api_errors.install(app)
    return app
