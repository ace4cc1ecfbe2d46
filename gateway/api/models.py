"""`GET /v1/models`: what the key may use, and when a provider stops serving it. One model is
described under the name that it is asked for, an alias of `compat:` too; those are not listed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, time

from fastapi import APIRouter, Request

from gateway.api import auth
from gateway.domain.errors import ModelNotFound, ModelRetired, TeamFault
from gateway.domain.route import Model
from gateway.ports import Clock
from gateway.relay.keyring import KeyRing
from gateway.relay.plan import Planner


def router(keyring: KeyRing, planner_now: Callable[[], Planner], clock: Clock) -> APIRouter:
    """``planner_now`` is asked at each request: the configuration may have been read again."""
    routes = APIRouter()

    def describe(planner: Planner, model: Model, name: str) -> dict[str, object]:
        now = clock.now()
        row = planner.row(model, now)
        end = planner.retirements.end(model, now.date())
        released = datetime.combine(row.valid_from, time(), UTC) if row else None
        return {
            "id": name,
            "object": "model",
            "created": int(released.timestamp()) if released else 0,
            "owned_by": row.provider if row else model.target.upstream,
            "shutdown_date": end.isoformat() if end else None,
        }

    @routes.get("/v1/models")
    async def list_models(request: Request) -> dict[str, object]:
        caller = await keyring.identify(auth.secret(request.headers))
        planner = planner_now()
        data = [
            describe(planner, model, model.name) for model in planner.models(caller, clock.now())
        ]
        return {"object": "list", "data": data}

    @routes.get("/v1/models/{name:path}")
    async def one_model(name: str, request: Request) -> dict[str, object]:
        caller = await keyring.identify(auth.secret(request.headers))
        try:
            planner = planner_now()
            now = clock.now()
            model = planner.named(caller, name, now)
        except (ModelNotFound, ModelRetired):
            raise
        except TeamFault:
            # A model that this key may not use looks like one that is not there (contract 3).
            raise ModelNotFound(
                f"No model {name}. GET /v1/models lists yours.", param="model"
            ) from None
        retired = planner.retirements.over(caller, model, now.date())
        if retired is not None:
            raise retired
        return describe(planner, model, name)

    return routes
