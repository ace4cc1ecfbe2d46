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
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version

from gateway.api.door import ASGIApp
from gateway.api.passed import passes_of
from gateway.assembly import (
    UpstreamNews,
    check_rules,
    declared_keys,
    file_rules,
    message_id,
    open_notifier,
    open_result_news,
    open_tracing,
    owned_twice,
    passes_urls,
    patience_of,
    price_book,
    read_peppers,
    read_rules,
    refuse,
    tell_prices,
    unpriced_models,
)
from gateway.assembly_stores import (
    make_board,
    make_cache,
    make_folder,
    make_gate,
    make_hosting,
    make_results,
    open_store,
    stored_in,
    without_redis,
)
from gateway.descriptors import limit as fd_limit
from gateway.descriptors import opened as fds_open
from gateway.descriptors import shares
from gateway.domain.keys import derived
from gateway.doors import DISTRIBUTION, client_doors, monitor_doors
from gateway.housekeeping import Housekeeping, Pace
from gateway.machine import Disks, cpu_seconds, memory_bytes
from gateway.ports import (
    Clock,
    Directory,
    Ledger,
    Telemetry,
)
from gateway.relay.admission import Admission
from gateway.relay.attempts import Attempts
from gateway.relay.background import Background
from gateway.relay.body import Room
from gateway.relay.budget import BudgetView
from gateway.relay.checks import Checks
from gateway.relay.comebacks import Comebacks
from gateway.relay.desk import ResultDesk
from gateway.relay.drain import Drain
from gateway.relay.estimate import Estimates, Observed
from gateway.relay.factors import Factors
from gateway.relay.files import Files
from gateway.relay.flights import Flights
from gateway.relay.forwarding import Forwarding
from gateway.relay.health import Health
from gateway.relay.joining import Joining
from gateway.relay.keeping import Keeper
from gateway.relay.keyring import KeyRing
from gateway.relay.lookups import Lookups
from gateway.relay.owning import Owning
from gateway.relay.passing import Passing
from gateway.relay.pipeline import Pipeline
from gateway.relay.purchase import Purchases
from gateway.relay.references import References
from gateway.relay.results import ResultPolicy, Results
from gateway.relay.turnstile import Turnstile
from gateway.relay.users import Users
from gateway.reload import Reloaded
from gateway.reports.budgets import BudgetWatch
from gateway.reports.owners import Owners, Spenders
from gateway.settings import Settings
from gateway.stores.redis_gate import RedisGate
from gateway.stores.redis_link import Server as RedisServer
from gateway.stores.safe import SettlementSafe
from gateway.swap import Parts, Swap, Upstreams, cache_policy, make_planner, places
from gateway.telemetry.log import RequestLog
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.timed import TIMED, TimedLedger
from gateway.upstream import openai
from gateway.vitals import Vitals
from gateway.watchdog import Watchdog

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
LAST_SECONDS = 5.0
"""What still runs when the doors are closed has this long; the server drained before."""
WATCH_SECONDS = 15.0
MAX_CONNECTIONS = 10_000
"""Where server.max_connections says nothing, and the file descriptors are enough."""


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
    drain: Drain
    max_connections: int
    """What the file descriptors of this process are enough for, or less if so configured."""
    connection_refused: Callable[[], None]
    """Hears of each connection beyond them."""
    reload: Callable[[Callable[[], Awaitable[Settings]]], Awaitable[Reloaded]]
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
        spans = open_tracing(settings, metrics)
        if spans is not None:
            stack.push_async_callback(spans.aclose)
        prices = price_book(settings)
        refuse(settings, unpriced_models(settings, prices, clock.now().date()))
        tell_prices(metrics, settings, prices, clock.now().date())
        store = open_store(settings)
        stack.push_async_callback(store.aclose)
        took = {
            operation: metrics.observer("gateway_ledger_seconds", operation=operation)
            for operation in TIMED
        }
        spenders = Spenders()
        ledger = TimedLedger(
            store.ledger,
            clock,
            lambda operation, seconds: took[operation](seconds),
            spenders.heard,
        )
        peppers = read_peppers(settings)
        declared = await declared_keys(settings, peppers, store.directory)
        refuse(settings, await owned_twice(settings, peppers, store.directory))
        flights = Flights()
        health = Health(clock.monotonic, random.Random(), UpstreamNews(metrics))
        marks = derived(peppers, "marks of upstream keys")
        upstreams = Upstreams(clock, flights, health, metrics, marks)
        stack.push_async_callback(upstreams.aclose)
        upstreams.take_over(await upstreams.prepare(settings.upstreams), settings.upstreams)
        redis = RedisServer()
        gate = make_gate(settings, clock, metrics, redis, flights.errand)
        stack.push_async_callback(gate.aclose)
        cache, shared_cache = make_cache(settings, clock, metrics, redis)
        stack.push_async_callback(cache.aclose)

        def tell_ratio(model: str, ratio: float) -> None:
            metrics.observe("gateway_bound_ratio", ratio, model=model)

        factors = Factors(store.upkeep, flights, settings.catalogue, tell_ratio)
        await factors.refresh()
        planner = make_planner(settings, upstreams.accounts, prices, cache, factors, health)
        keyring = KeyRing(peppers, declared, store.directory, clock)
        users = Users(peppers, settings.users.policy)
        spools = settings.storage.blobs / "spool"
        make_folder(spools, settings.storage.blobs)
        part = settings.server.workers
        room = Room(
            settings.server.buffer_bytes // part, settings.server.spool_bytes // part, spools
        )
        stack.callback(room.close)
        worker = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"
        safe = SettlementSafe.open(settings.ledger.spool, worker)
        stack.push_async_callback(safe.aclose)
        stack.push_async_callback(flights.drain, LAST_SECONDS)
        lease = timedelta(seconds=settings.lease_seconds)
        budgets = BudgetView(store.ledger, clock)
        observed = Observed()
        kept = make_results(settings, clock, metrics, redis, cache)
        if kept is not None:
            stack.push_async_callback(kept.aclose)
        hosting = make_hosting(settings, clock, metrics, redis, lambda: keyring.peppers)
        if hosting is not None:
            stack.push_async_callback(hosting[1].aclose)
        result_policy = ResultPolicy(settings.results.ttl, settings.results.idempotent_ttl)
        results = Results(kept, result_policy)
        board = make_board(
            settings,
            clock,
            metrics,
            redis,
            flights.errand,
            worker=worker,
            ttl_seconds=settings.results.ttl.total_seconds(),
        )
        stack.push_async_callback(board.aclose)
        joining = Joining(
            flights=flights,
            board=board,
            results=results,
            ledger=ledger,
            books=store.books,
            clock=clock,
            keep_alive_seconds=settings.relay.keep_alive_seconds,
            shared=settings.storage.redis is not None,
        )
        stack.push_async_callback(joining.aclose)
        patience = patience_of(settings)
        admission = Admission(
            gate,
            ledger,
            lease,
            worker,
            budgets,
            clock,
            repeat_unknown=patience.repeat_unknown,
        )
        news = open_result_news(settings, clock, metrics)
        if news is not None:
            stack.push_async_callback(news.aclose)
        comebacks = Comebacks(
            joining=joining,
            results=results,
            admission=admission,
            ledger=store.ledger,
            books=store.books,
            budgets=budgets,
            flights=flights,
            clock=clock,
            patience=patience,
        )
        keeper = Keeper(
            cache=cache,
            policy=cache_policy(settings),
            results=results,
            flights=flights,
            room=room,
            clock=clock,
        )
        attempts = Attempts(
            openai.request,
            ledger,
            health,
            clock,
            settings.relay.attempts,
            patience_seconds=settings.patience_seconds,
        )
        owning = Owning(store.ownership, flights, clock, settings.responses.keep)
        background = Background(clock, settings.background_seconds, openai.USER_AGENT)
        purchases = Purchases(
            ledger=ledger,
            safe=safe,
            attempts=attempts,
            room=room,
            flights=flights,
            clock=clock,
            budgets=budgets,
            factors=factors,
            joining=joining,
            keeper=keeper,
            owning=owning,
            background=background,
            keep_alive_seconds=settings.relay.keep_alive_seconds,
            keep=settings.ledger.keep,
            propagate=settings.tracing.propagate,
        )
        wanted = min(settings.server.max_in_flight, sum(places(settings).values()))
        share = shares(
            *(fd_limit(), fds_open()), settings.server.max_connections or MAX_CONNECTIONS, wanted
        )
        if share.in_flight < wanted:
            log.info(
                "there are file descriptors for fewer calls at once than are configured",
                extra={"limit": fd_limit(), "max_in_flight": share.in_flight},
            )
        turnstile = Turnstile(
            min(settings.server.max_in_flight, share.spare_in_flight),
            per_upstream=places(settings),
            queue=settings.server.queue,
            patience_seconds=settings.server.queue_seconds,
            clock=clock,
            waited=metrics.observer("gateway_queue_seconds"),
        )
        upstreams.watch(turnstile)
        addresses = any(passes_urls(one) for one in settings.upstreams.values())
        references = References(
            store.ownership,
            clock,
            lambda kind: metrics.add("gateway_cross_team_denied_total", kind=kind.value),
        )
        passing = Passing(
            keyring=keyring,
            users=users,
            gate=gate,
            upstreams=lambda: upstreams.accounts,
            health=health,
            room=room,
            flights=flights,
            clock=clock,
            agent=openai.USER_AGENT,
            begun=metrics.begun,
        )
        forwarding = Forwarding(passing, references, store.ownership)
        lookups = Lookups(forwarding, enabled=settings.responses.enabled)
        files = Files(passing, forwarding, store.ownership, clock, file_rules(settings))
        checks = Checks(passing, check_rules(settings))
        pipeline = Pipeline(
            keyring=keyring,
            references=references,
            planner=planner,
            admission=admission,
            purchases=purchases,
            estimates=Estimates(budgets, observed, clock),
            budgets=budgets,
            ledger=store.ledger,
            comebacks=comebacks,
            joining=joining,
            results=results,
            hosting=None if hosting is None else hosting[0],
            news=news,
            patience=patience,
            rules=read_rules(settings, addresses),
            room=room,
            flights=flights,
            clock=clock,
            turnstile=turnstile,
            users=users,
            log_prompts=settings.relay.log_prompts,
            begun=metrics.begun,
        )
        housekeeping = Housekeeping(
            store=store,
            recover=purchases.recover,
            report=lambda seconds: metrics.set("gateway_ledger_oldest_hold_seconds", seconds),
            expired=spenders.heard,
            clock=clock,
            worker=worker,
            keep=settings.ledger.keep,
            pace=Pace(sweep=settings.ledger.sweep_seconds),
        )
        stack.push_async_callback(_cancel, asyncio.create_task(housekeeping.run()))
        metrics.watch("gateway_inflight_requests", lambda: flights.count)
        metrics.watch("gateway_queued_requests", lambda: turnstile.waiting)
        metrics.watch("gateway_fds", fds_open, kind="open")
        metrics.watch("gateway_fds", fd_limit, kind="limit")
        metrics.watch("gateway_workers", lambda: 1)
        if isinstance(gate, RedisGate):
            metrics.watch("gateway_gate_degraded", lambda: gate.degraded)
        metrics.watch("gateway_memory_bytes", memory_bytes)
        metrics.follow("gateway_cpu_seconds_total", cpu_seconds)
        metrics.watch("gateway_settlements_waiting", lambda: purchases.waiting)
        metrics.watch("gateway_inflight_bytes", lambda: room.memory_used, where="memory")
        metrics.watch("gateway_inflight_bytes", lambda: room.disk_used, where="disk")
        stack.push_async_callback(_cancel, asyncio.create_task(_look_for_ever(metrics, health)))

        def counted(outcome: str) -> None:
            metrics.add("gateway_webhook_total", outcome=outcome)

        notifier = open_notifier(settings, clock, counted)
        budget_watch = BudgetWatch(
            ledger=store.ledger,
            upkeep=store.upkeep,
            owners=Owners(store.directory, lambda: keyring.declared),
            spenders=spenders,
            clock=clock,
            warn_percent=settings.notify.budget_percent,
            notifier=notifier,
            message_id=lambda name: message_id(peppers, name),
            counted=lambda team, mark: metrics.add(
                "gateway_budget_notices_total", team=metrics.team(team), mark=mark
            ),
        )
        parts = Parts(
            directory=store.directory,
            cache=cache,
            upstreams=upstreams,
            keyring=keyring,
            users=users,
            admission=admission,
            keeper=keeper,
            attempts=attempts,
            joining=joining,
            comebacks=comebacks,
            purchases=purchases,
            pipeline=pipeline,
            files=files,
            lookups=lookups,
            owning=owning,
            background=background,
            checks=checks,
            factors=factors,
            health=health,
            turnstile=turnstile,
            budget_watch=budget_watch,
            metrics=metrics,
            clock=clock,
            counted=counted,
        )
        swap = Swap(settings, planner, notifier, parts)
        stack.push_async_callback(swap.aclose)

        async def flush() -> None:
            await budget_watch.flush()
            if news is not None:
                await news.drain()

        drain = Drain(flights, flush)
        watching = asyncio.create_task(budget_watch.run(WATCH_SECONDS))
        stack.push_async_callback(_cancel, watching)
        stack.push_async_callback(_cancel, asyncio.create_task(factors.stay_fresh()))

        vitals = Vitals(
            store=store,
            gate=gate,
            shared_cache=shared_cache,
            without_redis=without_redis(settings),
            drain=drain,
            declared=lambda: keyring.declared.teams,
            factors=factors,
            disks=Disks(stored_in(settings)),
            clock=clock,
            metrics=metrics,
        )
        flights.errand(vitals.greet_cache())
        listeners: tuple[Telemetry, ...] = (
            RequestLog(clock),
            metrics,
            observed,
            budget_watch,
            *(() if spans is None else (spans,)),
            *telemetry,
        )
        desk = ResultDesk(
            results=results,
            flights=flights,
            board=board,
            books=store.books,
            joining=joining,
            clock=clock,
            policy=result_policy,
        )
        watchdog = Watchdog(
            clock, lambda seconds: metrics.observe("gateway_loop_lag_seconds", seconds)
        )
        await stack.enter_async_context(watchdog.watching())
        doors = client_doors(
            settings,
            clock,
            metrics,
            listeners,
            keyring=keyring,
            planner=lambda: swap.planner,
            pipeline=pipeline,
            passes=passes_of(files, checks, lookups),
            desk=desk,
            hosting=None if hosting is None else hosting[0],
            look=vitals.look,
            exposition=vitals.exposition,
        )
        yield Gateway(
            doors,
            monitor_doors(vitals.look, vitals.exposition),
            store.ledger,
            store.directory,
            flights,
            metrics,
            budget_watch,
            factors,
            drain,
            share.connections,
            lambda: metrics.add("gateway_connections_refused_total"),
            swap.reload,
        )


async def _look_for_ever(metrics: Metrics, health: Health) -> None:
    """What this worker has of its own, written down for the one that is asked."""
    while True:
        health.look()
        if metrics.shared:
            metrics.look()
        await asyncio.sleep(LOOK_SECONDS)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
