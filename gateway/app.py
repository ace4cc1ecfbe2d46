"""The composition root: settings become stores, upstreams and a pipeline, and those an ASGI app.

Nothing here decides anything; it only says who keeps which promise of ``ports.py``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version

from fastapi import FastAPI

from gateway.api import errors as api_errors
from gateway.api.health import Readiness, health_routes, metrics_routes
from gateway.api.middleware import RequestId
from gateway.api.models import router as model_routes
from gateway.api.relayed import ASGIApp, Receive, RelayedRoutes, Scope, Send
from gateway.assembly import (
    CannotServe,
    UpstreamNews,
    account_keys,
    declared_keys,
    make_account,
    make_cache,
    make_folder,
    make_gate,
    message_id,
    open_notifier,
    open_store,
    owned_twice,
    passes_urls,
    price_book,
    read_peppers,
    read_rules,
    refuse,
    unpriced_models,
    without_redis,
)
from gateway.domain.call import Inquiry, Operation
from gateway.domain.errors import GatewayError
from gateway.domain.money import NANOS_PER_DOLLAR
from gateway.domain.notices import money_lines
from gateway.domain.price import FACTOR_ONE
from gateway.domain.quota import Scope as Owner
from gateway.domain.team import Team
from gateway.housekeeping import Housekeeping, Pace
from gateway.ports import (
    Clock,
    Directory,
    Ledger,
    StoreError,
    Telemetry,
)
from gateway.relay.admission import Admission
from gateway.relay.attempts import Attempts
from gateway.relay.body import Room
from gateway.relay.budget import BudgetView
from gateway.relay.estimate import Estimates, Observed
from gateway.relay.factors import Factors
from gateway.relay.flights import Flights
from gateway.relay.health import Health
from gateway.relay.keyring import KeyRing
from gateway.relay.pipeline import Pipeline
from gateway.relay.plan import CachePolicy, Planner
from gateway.relay.purchase import Purchases
from gateway.reload import needs_restart, swapped
from gateway.reports.budgets import BudgetWatch
from gateway.sandbox.server import serve_sandbox
from gateway.settings import ConfigError, Kind, Settings
from gateway.stores.redis_gate import RedisGate
from gateway.stores.redis_link import Server as RedisServer
from gateway.stores.redis_link import StoreAway
from gateway.stores.safe import SettlementSafe
from gateway.telemetry.log import RequestLog
from gateway.telemetry.metrics import Metrics
from gateway.upstream import openai
from gateway.upstream.account import Account

log = logging.getLogger(__name__)

DISTRIBUTION = "image-gateway"
PING_SECONDS = 2.0
LOOK_SECONDS = 1.0
LAST_SECONDS = 5.0
"""What still runs when the doors are closed has this long; the server drained before."""
WATCH_SECONDS = 15.0
RELAYED = {f"/v1{endpoint.path}": endpoint for endpoint in (*Operation, *Inquiry)}


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway that is open: its doors, and what the commands look at."""

    app: ASGIApp
    metrics_app: ASGIApp
    ledger: Ledger
    directory: Directory
    flights: Flights
    metrics: Metrics
    budget_watch: BudgetWatch
    factors: Factors
    reload: Callable[[Callable[[], Awaitable[Settings]]], Awaitable[bool]]
    """Takes over what may change while it runs, all of it or nothing; whether it did."""


@asynccontextmanager
async def open_gateway(
    settings: Settings,
    clock: Clock,
    telemetry: Sequence[Telemetry] = (),
) -> AsyncIterator[Gateway]:
    """Opens the stores, starts the housekeeping and the watch over the budgets; closes all of it
    in the opposite order.

    Raises ``StoreError`` and ``PriceFileError`` for what cannot be opened, ``CannotServe`` for a
    model without a price and for a team or key that both the file and the directory have.
    """
    async with AsyncExitStack() as stack:
        metrics = Metrics(version(DISTRIBUTION))
        prices = price_book(settings)
        refuse(settings, unpriced_models(settings, prices, clock.now().date()))
        store = open_store(settings)
        stack.push_async_callback(store.aclose)
        peppers = read_peppers(settings)
        declared = await declared_keys(settings, peppers, store.directory)
        refuse(settings, await owned_twice(settings, peppers, store.directory))
        accounts: dict[str, Account] = {}
        for name, configured in settings.upstreams.items():
            base_url = configured.base_url
            if configured.kind is Kind.SANDBOX:
                base_url = (await stack.enter_async_context(serve_sandbox(clock))).base_url
            upstream = make_account(configured, base_url)
            stack.push_async_callback(upstream.aclose)
            accounts[name] = upstream
        redis = RedisServer()
        gate = make_gate(settings, clock, metrics, redis)
        stack.push_async_callback(gate.aclose)
        cache, shared_cache = make_cache(settings, clock, metrics, redis)
        stack.push_async_callback(cache.aclose)

        policy = CachePolicy(
            settings.cache.enabled,
            settings.cache.scope.value,
            settings.cache.ttl.total_seconds(),
            settings.cache.max_entry_bytes,
        )
        passing = {name for name, one in settings.upstreams.items() if passes_urls(one)}
        flights = Flights()

        def tell_ratio(model: str, ratio: float) -> None:
            metrics.observe("gateway_bound_ratio", ratio, model=model)

        factors = Factors(store.upkeep, flights, settings.catalogue, tell_ratio)
        await factors.refresh()
        health = Health(
            clock.monotonic, random.Random(), UpstreamNews(metrics), settings.lease_seconds
        )
        planner = Planner(
            settings.catalogue,
            accounts,
            prices,
            cache,
            policy,
            frozenset(passing),
            factors.of,
            health.usable,
        )
        keyring = KeyRing(peppers, declared, store.directory, clock)
        reloading = _Reloading(settings, keyring, accounts, health, store.directory, metrics)
        spools = settings.storage.blobs / "spool"
        make_folder(spools, settings.storage.blobs)
        part = settings.server.workers
        room = Room(
            settings.server.buffer_bytes // part, settings.server.spool_bytes // part, spools
        )
        worker = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"
        safe = SettlementSafe.open(settings.ledger.spool, worker)
        stack.push_async_callback(safe.aclose)
        stack.push_async_callback(flights.drain, LAST_SECONDS)
        lease = timedelta(seconds=settings.lease_seconds)
        budgets = BudgetView(store.ledger, clock)
        observed = Observed()
        purchases = Purchases(
            ledger=store.ledger,
            safe=safe,
            cache=cache,
            policy=policy,
            attempts=Attempts(
                openai.request,
                store.ledger,
                health,
                clock,
                settings.relay.attempts,
                patience_seconds=settings.patience_seconds,
            ),
            room=room,
            flights=flights,
            clock=clock,
            budgets=budgets,
            factors=factors,
            keep=settings.ledger.keep,
        )
        pipeline = Pipeline(
            keyring=keyring,
            planner=planner,
            admission=Admission(gate, store.ledger, lease, worker, budgets),
            purchases=purchases,
            estimates=Estimates(planner, budgets, observed, clock),
            budgets=budgets,
            ledger=store.ledger,
            rules=read_rules(settings, bool(passing)),
            room=room,
            flights=flights,
            clock=clock,
            log_prompts=settings.relay.log_prompts,
        )
        housekeeping = Housekeeping(
            store=store,
            recover=purchases.recover,
            report=lambda seconds: metrics.set("gateway_ledger_oldest_hold_seconds", seconds),
            clock=clock,
            worker=worker,
            keep=settings.ledger.keep,
            pace=Pace(sweep=settings.ledger.sweep_seconds),
        )
        stack.push_async_callback(_cancel, asyncio.create_task(housekeeping.run()))
        metrics.watch("gateway_inflight_requests", lambda: flights.count)
        metrics.watch("gateway_settlements_waiting", lambda: purchases.waiting)
        metrics.watch("gateway_inflight_bytes", lambda: room.memory_used, where="memory")
        metrics.watch("gateway_inflight_bytes", lambda: room.disk_used, where="disk")
        if metrics.shared:
            stack.push_async_callback(_cancel, asyncio.create_task(_look_for_ever(metrics)))

        notifier = open_notifier(
            settings,
            clock,
            lambda outcome: metrics.add("gateway_webhook_total", outcome=outcome),
        )
        if notifier is not None:
            stack.push_async_callback(notifier.aclose)
        budget_watch = BudgetWatch(
            ledger=store.ledger,
            upkeep=store.upkeep,
            directory=store.directory,
            declared=lambda: keyring.declared,
            clock=clock,
            warn_percent=settings.notify.budget_percent,
            notifier=notifier,
            message_id=lambda name: message_id(peppers, name),
            counted=lambda team, mark: metrics.add(
                "gateway_budget_notices_total", team=metrics.team(team), mark=mark
            ),
        )
        watching = asyncio.create_task(budget_watch.run(WATCH_SECONDS))
        stack.push_async_callback(_cancel, watching)
        stack.push_async_callback(_cancel, asyncio.create_task(factors.stay_fresh()))

        async def look() -> Readiness:
            stores = {
                "ledger": await _answers(store.ledger.ping),
                "directory": await _answers(store.directory.ping),
            }
            degraded: dict[str, str] = {}
            if isinstance(gate, RedisGate):
                stores["redis"] = await _answers(gate.ping)
                if gate.trouble is not None:
                    degraded["redis"] = f"{gate.trouble}: {without_redis(settings)}"
            metrics.set("gateway_gate_degraded", 1 if degraded else 0)
            if shared_cache is not None:
                stores["cache"] = await _answers(shared_cache.ping)
                if not stores["cache"]:
                    degraded["cache"] = "answers are kept by this process alone"
            metrics.dependencies(stores)
            return Readiness(stores["ledger"] and stores["directory"], degraded, stores)

        async def exposition() -> bytes:
            await look()
            for (upstream, model), factor in factors.by_label().items():
                metrics.set(
                    "gateway_bound_factor", factor / FACTOR_ONE, upstream=upstream, model=model
                )
            metrics.set("gateway_clock_skew_seconds", store.clock_skew_seconds)
            await _look_at_money(
                store.ledger, store.directory, keyring.declared.teams, clock, metrics
            )
            return metrics.exposition()

        listeners: tuple[Telemetry, ...] = (
            RequestLog(),
            metrics,
            observed,
            budget_watch,
            *telemetry,
        )
        rest = _plain_app()
        rest.include_router(health_routes(look))
        rest.include_router(model_routes(keyring, planner, clock))
        monitor = _plain_app()
        monitor.include_router(metrics_routes(exposition))
        if settings.server.metrics_port is None:
            rest.include_router(metrics_routes(exposition))
        yield Gateway(
            _Router(RelayedRoutes(pipeline, listeners, clock), RequestId(rest)),
            RequestId(monitor),
            store.ledger,
            store.directory,
            flights,
            metrics,
            budget_watch,
            factors,
            reloading.reload,
        )


class _Reloading:
    """What may change while the gateway runs: keys of upstreams, peppers, and teams of the file."""

    def __init__(
        self,
        settings: Settings,
        keyring: KeyRing,
        accounts: Mapping[str, Account],
        health: Health,
        directory: Directory,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._keyring = keyring
        self._accounts = accounts
        self._health = health
        self._directory = directory
        self._metrics = metrics
        self._turn = asyncio.Lock()
        metrics.set("gateway_config_reload_failed", 0)

    async def reload(self, read: Callable[[], Awaitable[Settings]]) -> bool:
        async with self._turn:
            try:
                await self._take_over(await read())
            except (ConfigError, CannotServe, StoreError, GatewayError) as error:
                for line in str(error).splitlines():
                    log.error("the configuration is not read again", extra={"error": line})
                applied = False
            except Exception:
                # Whatever it is: the gateway goes on as it was.
                log.exception("the configuration is not read again")
                applied = False
            else:
                applied = True
            self._metrics.set("gateway_config_reload_failed", 0 if applied else 1)
            self._metrics.add(
                "gateway_config_reloads_total", outcome="applied" if applied else "refused"
            )
            return applied

    async def _take_over(self, found: Settings) -> None:
        """Everything that can fail comes first; then all is swapped without a break."""
        settings = swapped(self._settings, found)
        peppers = read_peppers(settings)
        refuse(found, await owned_twice(settings, peppers, self._directory))
        declared = await declared_keys(settings, peppers, self._directory)
        news = needs_restart(self._settings, found)
        self._keyring.replace(peppers, declared)
        for name, account in self._accounts.items():
            account.replace_keys(account_keys(settings.upstreams[name]))
            self._health.keep(name, (one.id for one in account.credentials))
        self._settings = settings
        log.info(
            "the configuration was read again",
            extra={"teams": len(declared.teams), "keys": len(declared.keys)},
        )
        for name in news:
            log.warning("a setting needs a restart", extra={"setting": name})


class _Router:
    """Sends the relayed paths to their own door and everything else to FastAPI."""

    def __init__(self, relayed: RelayedRoutes, rest: ASGIApp) -> None:
        self._relayed = relayed
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = RELAYED.get(scope["path"]) if scope["type"] == "http" else None
        if operation is None:
            await self._rest(scope, receive, send)
        else:
            await self._relayed.handle(operation, scope, receive, send)


def _plain_app() -> FastAPI:
    app = FastAPI(
        title="image-gateway",
        version=version(DISTRIBUTION),
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    api_errors.install(app)
    return app


async def _answers(ping: Callable[[], Awaitable[None]]) -> bool:
    """Whether a store answers, and in time."""
    try:
        async with asyncio.timeout(PING_SECONDS):
            await ping()
    except (GatewayError, StoreAway, OSError) as error:
        log.warning("a store does not answer", extra={"error": str(error)})
        return False
    return True


async def _look_for_ever(metrics: Metrics) -> None:
    """What this worker has of its own, written down for the one that is asked."""
    while True:
        metrics.look()
        await asyncio.sleep(LOOK_SECONDS)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def _look_at_money(
    ledger: Ledger,
    directory: Directory,
    declared: Mapping[str, Team],
    clock: Clock,
    metrics: Metrics,
) -> None:
    """Sets the gauges of open holds, unresolved dollars, and budgets of teams that may spend."""
    try:
        teams = [*declared.values(), *await directory.teams()]
        lines = [
            line
            for team in teams
            if not team.disabled
            for line in money_lines(team.limits.of(Owner.TEAM, team.id), clock.now(), team.zone)
        ]
        metrics.budgets(zip(lines, await ledger.balances(lines), strict=True))
        metrics.set("gateway_ledger_open_holds", await ledger.open_holds())
        unresolved = await ledger.unresolved() / NANOS_PER_DOLLAR
        metrics.set("gateway_ledger_unresolved_usd", unresolved)
    except GatewayError as error:
        log.warning("the ledger cannot be read for the metrics", extra={"error": str(error)})
