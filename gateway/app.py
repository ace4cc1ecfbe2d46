"""The composition root: settings become stores, upstreams and a pipeline, and those an ASGI app.

Nothing here decides anything; it only says who keeps which promise of ``ports.py``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import date, timedelta
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI

from gateway.api import errors as api_errors
from gateway.api.health import Readiness, health_routes, metrics_routes
from gateway.api.middleware import RequestId
from gateway.api.models import router as model_routes
from gateway.api.relayed import ASGIApp, Receive, RelayedRoutes, Scope, Send
from gateway.domain import keys
from gateway.domain.call import Inquiry, Operation
from gateway.domain.errors import GatewayError
from gateway.domain.ledger import Entry, Line, Settlement
from gateway.domain.money import NANOS_PER_DOLLAR
from gateway.domain.price import FACTOR_ONE, Price, PriceBook
from gateway.domain.quota import Scope as Owner
from gateway.domain.quota import Unit, period
from gateway.domain.route import Model, Unpriced
from gateway.domain.team import Key, Team
from gateway.ports import Cache, Clock, Directory, Gate, Ledger, StoreError, Telemetry, Upstream
from gateway.pricefile import PriceFileError, load_prices
from gateway.relay.admission import Admission
from gateway.relay.body import Room
from gateway.relay.budget import BudgetView
from gateway.relay.estimate import Estimates, Observed
from gateway.relay.factors import Factors
from gateway.relay.flights import Flights
from gateway.relay.keyring import KeyRing
from gateway.relay.pipeline import Pipeline
from gateway.relay.plan import CachePolicy, Planner
from gateway.relay.purchase import Purchases
from gateway.relay.read import ReadRules
from gateway.sandbox.server import serve_sandbox
from gateway.settings import ImageUrls, Kind, Settings, shipped
from gateway.settings import Upstream as UpstreamSettings
from gateway.stores.blobs import DiskCache
from gateway.stores.memory import MemoryCache, MemoryGate
from gateway.stores.redis_cache import RedisCache
from gateway.stores.redis_gate import RedisGate
from gateway.stores.redis_link import StoreAway, connect
from gateway.stores.sqlite import SQLiteStore, keys_in
from gateway.stores.tiered import TieredCache
from gateway.telemetry.log import RequestLog
from gateway.telemetry.metrics import Metrics
from gateway.upstream import openai
from gateway.upstream.account import Account, AccountOptions, build_account
from gateway.upstream.wire import Timeouts
from gateway.yamlfile import plain

log = logging.getLogger(__name__)

DISTRIBUTION = "image-gateway"
PING_SECONDS = 2.0
LAST_SECONDS = 5.0
"""What still runs when the doors are closed has this long; the server drained before."""
CACHE_TIMEOUT_SECONDS = 2.0
PEPPER_FILE = "gateway.pepper"
RELAYED = {f"/v1{endpoint.path}": endpoint for endpoint in (*Operation, *Inquiry)}


class CannotServe(Exception):
    """The configuration can be read but not served: one line for each mistake."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway that is open: its doors, and what the commands look at."""

    app: ASGIApp
    metrics_app: ASGIApp
    ledger: Ledger
    directory: Directory
    flights: Flights
    metrics: Metrics
    factors: Factors


@asynccontextmanager
async def open_gateway(
    settings: Settings, clock: Clock, telemetry: Sequence[Telemetry] = ()
) -> AsyncIterator[Gateway]:
    """Opens the stores and starts the sweep; closes all of it in the opposite order.

    Raises ``StoreError`` and ``PriceFileError`` for what cannot be opened, ``CannotServe`` for a
    model without a price and for a team or key that both the file and the directory have.
    """
    async with AsyncExitStack() as stack:
        metrics = Metrics(version(DISTRIBUTION))
        prices = price_book(settings)
        _refuse(settings, unpriced_models(settings, prices, clock.now().date()))
        store = open_store(settings)
        stack.push_async_callback(store.aclose)
        pepper = read_pepper(settings)
        declared = declared_keys(settings, pepper)
        _refuse(settings, await _owned_twice(settings, declared, store.directory))
        upstreams: dict[str, Upstream] = {}
        for name, configured in settings.upstreams.items():
            base_url = configured.base_url
            if configured.kind is Kind.SANDBOX:
                base_url = (await stack.enter_async_context(serve_sandbox(clock))).base_url
            upstream = _account(configured, base_url)
            stack.push_async_callback(upstream.aclose)
            upstreams[name] = upstream
        gate = _gate(settings, clock)
        stack.push_async_callback(gate.aclose)
        cache = _cache(settings, clock, metrics)
        stack.push_async_callback(cache.aclose)

        policy = CachePolicy(
            settings.cache.enabled,
            settings.cache.scope.value,
            settings.cache.ttl.total_seconds(),
            settings.cache.max_entry_bytes,
        )
        passing = {name for name, one in settings.upstreams.items() if _passes_urls(one)}
        flights = Flights()

        def tell_ratio(model: str, ratio: float) -> None:
            metrics.observe("gateway_bound_ratio", ratio, model=model)

        factors = Factors(store.upkeep, flights, settings.catalogue, tell_ratio)
        await factors.refresh()
        planner = Planner(
            settings.catalogue, upstreams, prices, cache, policy, frozenset(passing), factors.of
        )
        keyring = KeyRing(pepper, declared, store.directory, clock)
        spools = settings.storage.blobs / "spool"
        _make_folder(spools, settings.storage.blobs)
        room = Room(settings.server.buffer_bytes, settings.server.spool_bytes, spools)
        stack.push_async_callback(flights.drain, LAST_SECONDS)
        worker = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"
        lease = timedelta(seconds=settings.lease_seconds)
        budgets = BudgetView(store.ledger, clock)
        observed = Observed()
        pipeline = Pipeline(
            keyring=keyring,
            planner=planner,
            admission=Admission(gate, store.ledger, lease, worker, budgets),
            purchases=Purchases(
                ledger=store.ledger,
                cache=cache,
                policy=policy,
                provider=openai.request,
                room=room,
                flights=flights,
                clock=clock,
                budgets=budgets,
                factors=factors,
            ),
            estimates=Estimates(planner, store.ledger, observed, clock),
            budgets=budgets,
            ledger=store.ledger,
            rules=_rules(settings, bool(passing)),
            room=room,
            flights=flights,
            clock=clock,
            log_prompts=settings.relay.log_prompts,
        )
        sweeper = asyncio.create_task(
            _sweep_for_ever(store.ledger, clock, settings.ledger.sweep_seconds)
        )
        stack.push_async_callback(_cancel, sweeper)
        stack.push_async_callback(_cancel, asyncio.create_task(factors.stay_fresh()))

        async def look() -> Readiness:
            stores = {
                "ledger": await _answers(store.ledger.ping),
                "directory": await _answers(store.directory.ping),
            }
            degraded = isinstance(gate, RedisGate) and gate.degraded
            if isinstance(gate, RedisGate):
                stores["redis"] = await _answers(gate.ping)
                degraded = degraded or not stores["redis"]
            metrics.dependencies(stores)
            metrics.set("gateway_gate_degraded", 1 if degraded else 0)
            return Readiness(stores["ledger"] and stores["directory"], degraded, stores)

        async def exposition() -> bytes:
            await look()
            metrics.set("gateway_inflight_requests", flights.count)
            metrics.set("gateway_inflight_bytes", room.memory_used, where="memory")
            metrics.set("gateway_inflight_bytes", room.disk_used, where="disk")
            for (upstream, model), factor in factors.by_label().items():
                metrics.set(
                    "gateway_bound_factor", factor / FACTOR_ONE, upstream=upstream, model=model
                )
            await _look_at_money(store.ledger, store.directory, settings.teams, clock, metrics)
            return metrics.exposition()

        listeners: tuple[Telemetry, ...] = (RequestLog(), metrics, observed, *telemetry)
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
            factors,
        )


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


def price_book(settings: Settings) -> PriceBook:
    """The prices that apply. Raises ``PriceFileError``."""
    own = [plain(row) for row in settings.prices.rows]
    try:
        return PriceBook(
            load_prices(
                settings.prices.file or shipped("prices.yaml"),
                [row for row in own if isinstance(row, dict)],
            )
        )
    except PriceFileError as error:
        raise PriceFileError([_placed(mistake, settings) for mistake in error.mistakes]) from None


def _placed(mistake: str, settings: Settings) -> str:
    """A mistake in one of the operator's rows, with the line that the row begins at."""
    row = re.match(r"prices\.rows\[(\d+)\]", mistake)
    if row is None:
        return mistake
    place = settings.prices.rows[int(row[1])].place
    return f"{settings.file}:{place.line}:{place.column}: {mistake}"


def unpriced_models(settings: Settings, book: PriceBook, day: date) -> list[str]:
    """What is configured but has no price, models and pins: refused, unless the operator allows
    it of a model."""
    found = []
    for model in settings.catalogue.models.values():
        upstream = settings.upstreams[model.target.upstream]
        prices = book.of(upstream.name, upstream.prices, day)
        row = prices.find(model.target.model)
        if row is not None:
            found += _unknown_pin(model, row.price)
        elif model.unpriced is Unpriced.REFUSE:
            found.append(
                f"models.{model.name}: {model.target.model} has no price at {upstream.name}. Add "
                "a row under prices.rows, or set unpriced: allow"
            )
    return found


def _unknown_pin(model: Model, price: Price) -> list[str]:
    """What is filled in for clients must be what the model draws, at a sure price."""
    pin = model.pin
    if pin is None or price.knows(pin.size, pin.quality):
        return []
    return [
        f"models.{model.name}.pin: the price of {model.target.model} does not know size "
        f"{pin.size} with quality {pin.quality}. Pin what it draws, or set auto: bound"
    ]


async def _owned_twice(
    settings: Settings, declared: Mapping[bytes, tuple[Team, Key]], directory: Directory
) -> list[str]:
    """Teams and keys have one owner, the file or the directory: else a limit that one of them
    changes would not be the limit that holds."""
    found = [
        f"teams.{team.id}: a team of this name was made with `gateway team create` too. Give the "
        "one in this file another name"
        for team in await directory.teams()
        if team.id in settings.teams
    ]
    for digest, (team, key) in declared.items():
        made = await directory.find_key(digest)
        if made is not None:
            found.append(
                f"teams.{team.id}.keys: the key {key.name or key.id} was made with `gateway key "
                f"create` as {made[1].id} of team {made[0].id} too. Remove it from this file"
            )
    return found


def _refuse(settings: Settings, mistakes: Sequence[str]) -> None:
    if mistakes:
        raise CannotServe("\n".join(f"{settings.file}: {mistake}" for mistake in mistakes))


def open_store(settings: Settings) -> SQLiteStore:
    """The ledger and the directory. Raises ``StoreError``."""
    if not isinstance(settings.storage.database, Path):
        raise StoreError("PostgreSQL does not exist in this version")
    return SQLiteStore.open(settings.storage.database, on_conflict=_conflict)


def _conflict(entry: Entry, settlement: Settlement) -> None:
    log.error(
        "a call was settled twice, with different amounts; the first stands",
        extra={"request_id": entry.rid, "first": entry.cost, "second": settlement.cost},
    )


def read_pepper(settings: Settings) -> bytes:
    """The pepper of the keys: configured, or made once beside the database.

    Raises ``StoreError`` when the file is unusable: with another pepper no key would be known.
    """
    configured = settings.storage.pepper
    if configured:
        return configured.reveal().encode()
    database = settings.storage.database
    if not isinstance(database, Path):
        raise StoreError("storage.pepper must be set where the database is shared")
    path = database.parent / PEPPER_FILE
    try:
        if not path.exists():
            known = keys_in(database)
            if known:
                raise StoreError(
                    f"{path} is missing, and {known} keys in {database} were made "
                    "with it. Restore it from a backup, or set storage.pepper to what it held"
                )
            _make_pepper(path)
        pepper = path.read_bytes().strip()
    except OSError as error:
        raise StoreError(f"{path} cannot be made or read: {error}") from error
    if len(pepper) < 32:
        raise StoreError(
            f"{path} is not a pepper of this gateway; restore it from a backup, or no key will be "
            "known"
        )
    return pepper


def _make_folder(folder: Path, configured: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StoreError(
            f"storage.blobs {configured} cannot be written ({error.strerror or error}): make it "
            "writable for this user, or name another folder"
        ) from error


def _make_pepper(path: Path) -> None:
    """Makes the file whole or not at all; of two processes that start at once, one wins."""
    made = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(32).encode())
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(made, path)
    finally:
        made.unlink()


def declared_keys(settings: Settings, pepper: bytes) -> Mapping[bytes, tuple[Team, Key]]:
    """The keys of the file, by digest, with their teams."""
    found: dict[bytes, tuple[Team, Key]] = {}
    for declared in settings.declared_keys:
        digest = keys.digest(pepper, declared.secret.reveal())
        found[digest] = (
            settings.teams[declared.team],
            declared.key(keys.declared_id(digest)),
        )
    return found


def _passes_urls(upstream: UpstreamSettings) -> bool:
    return upstream.image_urls is ImageUrls.PASSTHROUGH


def _account(configured: UpstreamSettings, base_url: str) -> Account:
    timeouts = configured.timeouts
    return build_account(
        AccountOptions(
            name=configured.name,
            base_url=base_url,
            provider=configured.prices,
            kind=configured.kind.value,
            keys=configured.api_keys,
            timeouts=Timeouts(
                connect=timeouts.connect_seconds,
                write=timeouts.write_seconds,
                first_byte=timeouts.first_byte_seconds,
                total=timeouts.total_seconds,
            ),
            headers={name: value.reveal() for name, value in configured.headers},
            proxy=configured.proxy.reveal() if configured.proxy else None,
            ca_file=str(configured.verify) if isinstance(configured.verify, Path) else None,
            max_connections=configured.max_connections,
        )
    )


def _gate(settings: Settings, clock: Clock) -> Gate:
    if settings.storage.redis is None:
        return MemoryGate(clock)

    def away(error: BaseException) -> None:
        log.warning("the shared gate does not answer", extra={"error": str(error)})

    return RedisGate(connect(settings.storage.redis.reveal()), clock, on_error=away)


def _cache(settings: Settings, clock: Clock, metrics: Metrics) -> Cache:
    """In-process in front of Redis where it is configured, else of the disk."""
    cache = settings.cache

    def failed(_: BaseException) -> None:
        metrics.add("gateway_cache_errors_total", operation="store")

    front = MemoryCache(clock, max_bytes=cache.memory_bytes, max_entry_bytes=cache.max_entry_bytes)
    metrics.watch("gateway_cache_bytes", lambda: front.bytes_held, where="memory")
    url = cache.redis or settings.storage.redis
    if url is not None:
        client = connect(url.reveal(), timeout=CACHE_TIMEOUT_SECONDS)
        back: Cache = RedisCache(
            client, clock, max_entry_bytes=cache.max_entry_bytes, on_error=failed
        )
    else:
        folder = settings.storage.blobs / "cache"
        disk = DiskCache(folder, clock, max_bytes=cache.max_bytes, on_error=failed)
        metrics.watch("gateway_cache_bytes", lambda: disk.bytes_held, where="disk")
        back = disk
    return TieredCache(front, back)


def _rules(settings: Settings, image_urls: bool) -> ReadRules:
    server = settings.server
    return ReadRules(
        max_json_bytes=server.max_json_bytes,
        max_form_bytes=server.max_form_bytes,
        max_file_bytes=server.max_file_bytes,
        max_pixels=server.max_pixels,
        max_side=server.max_side,
        image_urls_allowed=image_urls,
    )


async def _answers(ping: Callable[[], Awaitable[None]]) -> bool:
    """Whether a store answers, and in time."""
    try:
        async with asyncio.timeout(PING_SECONDS):
            await ping()
    except (GatewayError, StoreAway, OSError) as error:
        log.warning("a store does not answer", extra={"error": str(error)})
        return False
    return True


async def _sweep_for_ever(ledger: Ledger, clock: Clock, pause_seconds: float) -> None:
    """Expires lapsed holds at the start, and then for ever."""
    while True:
        try:
            while expired := await ledger.sweep(clock.now()):
                for entry in expired:
                    log.warning(
                        "a hold expired; its outcome is unknown and it is posted at its bound",
                        extra={"request_id": entry.rid, "bound_nanousd": entry.bound},
                    )
        except GatewayError as error:
            log.warning("the sweep could not write", extra={"error": str(error)})
        except Exception:
            # Whatever it is: a sweep that stops for ever would leave every later hold standing.
            log.exception("the sweep failed")
        await asyncio.sleep(pause_seconds)


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
    """Sets the gauges of budgets, open holds and unresolved dollars."""
    try:
        teams = [*declared.values(), *await directory.teams()]
        lines = [
            Line(limit, period(limit.window, clock.now()))
            for team in teams
            for limit in team.limits.of(Owner.TEAM, team.id)
            if limit.unit is Unit.MONEY and limit.amount is not None
        ]
        metrics.budgets(zip(lines, await ledger.balances(lines), strict=True))
        metrics.set("gateway_ledger_open_holds", await ledger.open_holds())
        unresolved = await ledger.unresolved() / NANOS_PER_DOLLAR
        metrics.set("gateway_ledger_unresolved_usd", unresolved)
    except GatewayError as error:
        log.warning("the ledger cannot be read for the metrics", extra={"error": str(error)})
