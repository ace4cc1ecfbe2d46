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
from dataclasses import dataclass, replace
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
from gateway.domain.bill import BilledItem
from gateway.domain.call import Inquiry, Operation
from gateway.domain.errors import GatewayError
from gateway.domain.ledger import Entry, Settlement
from gateway.domain.money import NANOS_PER_DOLLAR
from gateway.domain.notices import money_lines
from gateway.domain.price import FACTOR_ONE, Price, PriceBook
from gateway.domain.quota import Scope as Owner
from gateway.domain.route import WILDCARD, Model, Pin, Unpriced
from gateway.domain.team import Declared, Key, Team
from gateway.housekeeping import Housekeeping, Pace
from gateway.notify import PAUSES_SECONDS, Webhooks
from gateway.ports import (
    BillUnreadable,
    Cache,
    Clock,
    Directory,
    Gate,
    Ledger,
    Notifier,
    Store,
    StoreError,
    Telemetry,
)
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
from gateway.reload import needs_restart, swapped
from gateway.reports.budgets import BudgetWatch
from gateway.sandbox.server import serve_sandbox
from gateway.settings import ConfigError, ImageUrls, Kind, Settings, WithoutRedis, shipped
from gateway.settings import Upstream as UpstreamSettings
from gateway.stores.blobs import DiskCache
from gateway.stores.memory import MemoryCache, MemoryGate
from gateway.stores.postgres import PostgresStore
from gateway.stores.redis_cache import RedisCache
from gateway.stores.redis_gate import GateListener, RedisGate
from gateway.stores.redis_link import Reason, StoreAway, connect, same_server
from gateway.stores.redis_link import Server as RedisServer
from gateway.stores.safe import SettlementSafe
from gateway.stores.sqlite import SQLiteStore, keys_in
from gateway.stores.tiered import TieredCache
from gateway.telemetry.log import RequestLog
from gateway.telemetry.metrics import Metrics
from gateway.upstream import openai
from gateway.upstream.account import Account, AccountOptions, build_account
from gateway.upstream.costs import read_costs
from gateway.upstream.postbox import WebPostbox
from gateway.upstream.wire import Timeouts
from gateway.yamlfile import plain

log = logging.getLogger(__name__)

DISTRIBUTION = "image-gateway"
PING_SECONDS = 2.0
LOOK_SECONDS = 1.0
LAST_SECONDS = 5.0
"""What still runs when the doors are closed has this long; the server drained before."""
WATCH_SECONDS = 15.0
CACHE_TIMEOUT_SECONDS = 1.0
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
        _refuse(settings, unpriced_models(settings, prices, clock.now().date()))
        store = open_store(settings)
        stack.push_async_callback(store.aclose)
        peppers = read_peppers(settings)
        declared = await declared_keys(settings, peppers, store.directory)
        _refuse(settings, await _owned_twice(settings, peppers, store.directory))
        accounts: dict[str, Account] = {}
        for name, configured in settings.upstreams.items():
            base_url = configured.base_url
            if configured.kind is Kind.SANDBOX:
                base_url = (await stack.enter_async_context(serve_sandbox(clock))).base_url
            upstream = _account(configured, base_url)
            stack.push_async_callback(upstream.aclose)
            accounts[name] = upstream
        redis = RedisServer()
        gate = _gate(settings, clock, metrics, redis)
        stack.push_async_callback(gate.aclose)
        cache, shared_cache = _cache(settings, clock, metrics, redis)
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
            settings.catalogue, accounts, prices, cache, policy, frozenset(passing), factors.of
        )
        keyring = KeyRing(peppers, declared, store.directory, clock)
        reloading = _Reloading(settings, keyring, accounts, store.directory, metrics)
        spools = settings.storage.blobs / "spool"
        _make_folder(spools, settings.storage.blobs)
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
            provider=openai.request,
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
            rules=_rules(settings, bool(passing)),
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
            message_id=lambda name: _message_id(peppers, name),
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
                    degraded["redis"] = f"{gate.trouble}: {_without_redis(settings)}"
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
        directory: Directory,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._keyring = keyring
        self._accounts = accounts
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
        _refuse(found, await _owned_twice(settings, peppers, self._directory))
        declared = await declared_keys(settings, peppers, self._directory)
        news = needs_restart(self._settings, found)
        self._keyring.replace(peppers, declared)
        for name, account in self._accounts.items():
            account.replace_keys(settings.upstreams[name].api_keys)
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
    rule = settings.catalogue.wildcard
    if rule is not None and rule.pin is not None:
        found += _unknown_wildcard_pin(settings, book, day, rule.target.upstream, rule.pin)
    return found


def _unknown_wildcard_pin(
    settings: Settings, book: PriceBook, day: date, upstream: str, pin: Pin
) -> list[str]:
    """One entry for many models: not all need to draw what it pins, but one of them must."""
    rows = book.of(upstream, settings.upstreams[upstream].prices, day).rows.values()
    if any(row.price.knows(pin.size, pin.quality) for row in rows):
        return []
    return [
        f"models.{WILDCARD}.pin: no price at {upstream} knows size {pin.size} with quality "
        f"{pin.quality}. Pin what its models draw, or set auto: bound"
    ]


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
    settings: Settings, peppers: keys.Peppers, directory: Directory
) -> list[str]:
    """Teams and keys have one owner, the file or the directory: else a limit that one of them
    changes would not be the limit that holds."""
    found = [
        f"teams.{team.id}: a team of this name was made with `gateway team create` too. Give the "
        "one in this file another name"
        for team in await directory.teams()
        if team.id in settings.teams
    ]
    for declared in settings.declared_keys:
        digests = peppers.digests(declared.secret.reveal())
        made = [one for digest in digests if (one := await directory.find_key(digest)) is not None]
        for team, key in made[:1]:
            named = f"the key {declared.name}" if declared.name else "a key"
            found.append(
                f"teams.{declared.team}.keys: {named} was made with `gateway key create` as "
                f"{key.id} of team {team.id} too. Remove it from this file"
            )
    return found


def _refuse(settings: Settings, mistakes: Sequence[str]) -> None:
    if mistakes:
        raise CannotServe("\n".join(f"{settings.file}: {mistake}" for mistake in mistakes))


def open_store(settings: Settings) -> Store:
    """The database. Raises ``StoreError``."""
    database = settings.storage.database
    if isinstance(database, Path):
        return SQLiteStore.open(database, on_conflict=_conflict)
    return PostgresStore.open(database.reveal(), on_conflict=_conflict)


def _conflict(entry: Entry, settlement: Settlement) -> None:
    log.error(
        "a call was settled twice, with different amounts; the first stands",
        extra={"request_id": entry.rid, "first": entry.cost, "second": settlement.cost},
    )


def read_peppers(settings: Settings) -> keys.Peppers:
    """The pepper of the keys, configured or made once beside the database, and those before it.

    Raises ``StoreError`` as ``_read_pepper`` does.
    """
    old = tuple(pepper.reveal().encode() for pepper in settings.storage.old_peppers)
    return keys.Peppers(_read_pepper(settings), old)


def _read_pepper(settings: Settings) -> bytes:
    """Raises ``StoreError`` when the file is unusable: with another one no key would be known."""
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


async def declared_keys(
    settings: Settings, peppers: keys.Peppers, directory: Directory
) -> Declared:
    """The teams and keys of the file. A key's id is the one that the directory remembers: it is
    what the books know the key by, and outlives its pepper. Raises ``LedgerUnavailable``."""
    found: dict[bytes, tuple[Team, Key]] = {}
    for declared in settings.declared_keys:
        secret = declared.secret.reveal()
        digests = peppers.digests(secret)
        proposed = keys.declared_id(keys.digest(peppers.oldest, secret))
        key_id = await directory.declared_id(digests, proposed)
        found[digests[0]] = (settings.teams[declared.team], declared.key(key_id))
    return Declared(settings.teams, found)


def _message_id(peppers: keys.Peppers, name: str) -> str:
    """The same in every process, also while a rotation has reached only some of them."""
    return f"msg_{keys.digest(peppers.oldest, f'message {name}').hex()[:32]}"


async def read_bill(settings: Settings, upstream: str, day: date) -> list[BilledItem]:
    """What an upstream billed on a UTC day, by line item, read with its ``admin_key``.

    Raises ``CannotServe`` where it has none, ``BillUnreadable`` for all that can go wrong then.
    """
    configured = settings.upstreams[upstream]
    if configured.kind is Kind.SANDBOX:
        raise BillUnreadable(
            f"upstream {upstream} is a sandbox inside the gateway, and its bill ends with it. Run "
            "`gateway sandbox` and point an upstream of kind openai at it"
        )
    if not configured.admin_key:
        raise CannotServe(
            f"{settings.file}: upstreams.{upstream}.admin_key is not set, and it is what reads a "
            "bill. Set it, or give the upstream's export with --csv FILE"
        )
    account = _account(replace(configured, api_keys=(configured.admin_key,)), configured.base_url)
    try:
        found = await read_costs(account, day, day)
    finally:
        await account.aclose()
    if day not in found:
        raise BillUnreadable(
            f"upstream {upstream}: its costs do not have {day} yet; try again later"
        )
    return found[day]


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


class _GateNews(GateListener):
    """What the shared gate says of itself, as metrics and as lines of the log."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._said: Reason | None = None

    def waited(self, seconds: float) -> None:
        self._metrics.observe("gateway_gate_seconds", seconds)

    def failed(self, reason: Reason, error: BaseException) -> None:
        self._metrics.add("gateway_gate_errors_total", reason=reason.value)
        if self._said is not reason:
            self._said = reason
            said = {"reason": reason.value, "error": str(error)}
            log.warning("the shared gate does not answer", extra=said)

    def back(self) -> None:
        if self._said is not None:
            self._said = None
            log.warning("the shared gate answers again")

    def restarted(self) -> None:
        self._metrics.add("gateway_gate_restarts_total")
        log.warning("the shared gate has forgotten what it counted: limits begin anew")

    def evicts(self, policy: str) -> None:
        log.warning(
            "storage.redis may drop rate limits when it is full; set maxmemory-policy to "
            "noeviction, or give the cache a Redis of its own",
            extra={"maxmemory_policy": policy},
        )


def _gate(settings: Settings, clock: Clock, metrics: Metrics, server: RedisServer) -> Gate:
    replicas, url = settings.server.replicas, settings.storage.redis
    if url is None:
        return MemoryGate(clock, processes=replicas)
    gate = RedisGate(
        connect(url.reveal()),
        clock,
        server=server,
        processes=replicas * settings.server.workers,
        deny=settings.storage.without_redis is WithoutRedis.DENY,
        listener=_GateNews(metrics),
    )
    gate.greet()
    return gate


def _without_redis(settings: Settings) -> str:
    """What holds while the shared gate is away."""
    if settings.storage.without_redis is WithoutRedis.DENY:
        return "requests with a limit are refused"
    processes = settings.server.replicas * settings.server.workers
    part = f"1/{processes} of each" if processes > 1 else "all of each"
    return f"limits are kept by this process, {part}"


def _cache(
    settings: Settings, clock: Clock, metrics: Metrics, server: RedisServer
) -> tuple[Cache, Cache | None]:
    """In-process in front of Redis where it is configured, else of the disk; and the one in a
    Redis of its own, where there is one. ``server`` is that of the gate."""
    cache, state = settings.cache, settings.storage.redis

    def failed(*_: object) -> None:
        metrics.add("gateway_cache_errors_total", operation="store")

    front = MemoryCache(clock, max_bytes=cache.memory_bytes, max_entry_bytes=cache.max_entry_bytes)
    metrics.watch("gateway_cache_bytes", lambda: front.bytes_held, where="memory")
    url = cache.redis or state
    if url is None:
        folder = settings.storage.blobs / "cache"
        disk = DiskCache(folder, clock, max_bytes=cache.max_bytes, on_error=failed)
        metrics.watch("gateway_cache_bytes", lambda: disk.bytes_held, where="disk")
        return TieredCache(front, disk), None
    same = state is not None and same_server(url.reveal(), state.reveal())
    back = RedisCache(
        connect(url.reveal(), timeout=CACHE_TIMEOUT_SECONDS),
        clock,
        max_entry_bytes=cache.max_entry_bytes,
        server=server if same else None,
        on_error=failed,
    )
    return TieredCache(front, back), None if same else back


def open_notifier(
    settings: Settings, clock: Clock, counted: Callable[[str], None] = lambda outcome: None
) -> Notifier | None:
    """Who hears of budgets and drifts; nobody where no webhook is configured.

    ``counted`` hears how each message went. Raises ``CannotServe``.
    """
    notify = settings.notify
    if notify.webhook is None:
        return None
    try:
        postbox = WebPostbox(notify.webhook.reveal())
    except ValueError as error:
        raise CannotServe(f"{settings.file}: notify.webhook: {error}") from None
    return Webhooks(
        postbox,
        notify.secret.reveal() if notify.secret else None,
        clock,
        counted=counted,
        pauses_seconds=PAUSES_SECONDS,
    )


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
