"""What is swapped when the configuration is read again: all of it at once, or nothing.

A request that is under way ends with what it began with: it took its planner once, and its plan
holds its upstream, its price and its limits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from ssl import SSLError
from typing import TypeAlias

from gateway.assembly import (
    CannotServe,
    account_keys,
    check_rules,
    declared_keys,
    file_rules,
    make_account,
    open_notifier,
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
from gateway.domain.errors import GatewayError
from gateway.domain.price import PriceBook
from gateway.filewatch import Stamp, stamp
from gateway.ports import Cache, Clock, Directory, Notifier, StoreError
from gateway.pricefile import PriceFileError
from gateway.relay.admission import Admission
from gateway.relay.attempts import Attempts
from gateway.relay.background import Background
from gateway.relay.checks import Checks
from gateway.relay.comebacks import Comebacks
from gateway.relay.factors import Factors
from gateway.relay.files import Files
from gateway.relay.flights import Flights
from gateway.relay.health import Health
from gateway.relay.joining import Joining
from gateway.relay.keeping import Keeper
from gateway.relay.keyring import KeyRing
from gateway.relay.lookups import Lookups
from gateway.relay.owning import Owning
from gateway.relay.pipeline import Pipeline
from gateway.relay.plan import CachePolicy, Planner
from gateway.relay.purchase import Purchases
from gateway.relay.turnstile import Turnstile
from gateway.relay.users import Users
from gateway.reload import Reloaded, needs_restart, swapped
from gateway.reports.budgets import BudgetWatch
from gateway.sandbox.server import serve_sandbox
from gateway.settings import BillOn5xx, ConfigError, ImageUrls, Kind, Settings
from gateway.settings import Upstream as UpstreamSettings
from gateway.telemetry.metrics import Metrics
from gateway.upstream.account import Account, AccountNews

log = logging.getLogger(__name__)

RETIRE_SECONDS = 60.0
"""Longer than any request is planned: after that only flights know an account that was replaced."""


def _tell(error: Exception) -> None:
    for line in str(error).splitlines():
        log.error("the configuration is not read again", extra={"error": line})


@dataclass(frozen=True, slots=True)
class Opened:
    """An account, and what it was made from."""

    made_from: _Shape
    account: Account


class Upstreams:
    """The accounts of this process, opened and closed as the configuration says."""

    def __init__(
        self,
        clock: Clock,
        flights: Flights,
        health: Health,
        metrics: Metrics,
        mark_key: bytes = b"",
    ) -> None:
        self._clock = clock
        self._mark_key = mark_key
        self._health = health
        self._flights = flights
        self._metrics = metrics
        self._opened: dict[str, Opened] = {}
        self._sandboxes: dict[str, str] = {}
        self._stack = AsyncExitStack()
        self._retiring: dict[asyncio.Task[None], Account] = {}
        self._watched: set[str] = set()
        self._numbers: dict[str, Iterator[int]] = {}

    @property
    def accounts(self) -> Mapping[str, Account]:
        return {name: one.account for name, one in self._opened.items()}

    async def prepare(self, wanted: Mapping[str, UpstreamSettings]) -> dict[str, Opened]:
        """The accounts that are wanted: those that are open already, and new ones.

        Raises ``OSError`` and ``ValueError`` as ``make_account`` does, with the new ones closed.
        """
        found: dict[str, Opened] = {}
        try:
            for name, configured in wanted.items():
                known, shape = self._opened.get(name), _shape(configured)
                if known is not None and known.made_from == shape:
                    found[name] = known
                else:
                    base_url = await self._base_url(configured)
                    numbers = self._numbers.setdefault(name, count(1))
                    account = make_account(
                        configured, base_url, self._news(name), numbers, self._mark_key
                    )
                    found[name] = Opened(shape, account)
        except BaseException:
            await self._close(found)
            raise
        return found

    def _news(self, name: str) -> AccountNews:
        metrics, traffic = self._metrics, "gateway_upstream_bytes_total"
        return AccountNews(
            waited=metrics.observer("gateway_upstream_pool_wait_seconds", upstream=name),
            sent=metrics.adder(traffic, upstream=name, direction="sent"),
            received=metrics.adder(traffic, upstream=name, direction="received"),
        )

    async def _close(self, found: Mapping[str, Opened]) -> None:
        """Closes those of ``found`` that are not in use."""
        for name, one in found.items():
            if self._opened.get(name) is not one:
                await one.account.aclose()

    def take_over(
        self, prepared: Mapping[str, Opened], wanted: Mapping[str, UpstreamSettings]
    ) -> None:
        """From now on these are the accounts, with the keys that are wanted. Never fails."""
        before, self._opened = self._opened, dict(prepared)
        for name, one in self._opened.items():
            one.account.replace_keys(account_keys(wanted[name]))
            self._health.keep(name, (each.id for each in one.account.credentials))
        for name in before.keys() - self._opened.keys():
            self._health.keep(name, ())
        for name, one in before.items():
            if self._opened.get(name) is not one:
                task = asyncio.get_running_loop().create_task(self._retire(one.account))
                self._retiring[task] = one.account
                task.add_done_callback(lambda done: self._retiring.pop(done, None))

    def watch(self, turnstile: Turnstile) -> None:
        """Lets the metrics see how many calls are at each upstream."""
        for name in self._opened.keys() - self._watched:
            self._watched.add(name)
            self._metrics.watch(
                "gateway_inflight_upstream_requests",
                lambda name=name: turnstile.flying(name),  # type: ignore[misc]
                upstream=name,
            )

    async def aclose(self) -> None:
        retiring = dict(self._retiring)
        for task in retiring:
            task.cancel()
        if retiring:
            await asyncio.wait(retiring)
        for account in (*retiring.values(), *(one.account for one in self._opened.values())):
            await account.aclose()
        await self._stack.aclose()

    async def _base_url(self, configured: UpstreamSettings) -> str:
        """Where calls go. A sandbox is started when it is first wanted, and lives on."""
        if configured.kind is not Kind.SANDBOX:
            return configured.base_url
        name = configured.name
        if name not in self._sandboxes:
            sandbox = await self._stack.enter_async_context(serve_sandbox(self._clock))
            self._sandboxes[name] = sandbox.base_url
        return self._sandboxes[name]

    async def _retire(self, account: Account) -> None:
        """Closes an account once nobody can be using it."""
        await asyncio.sleep(RETIRE_SECONDS)
        await self._flights.landed()
        await account.aclose()


_Shape: TypeAlias = tuple[UpstreamSettings, Stamp | None]


def _shape(configured: UpstreamSettings) -> _Shape:
    """What an account is made from, without what may change in one that is open; and its CA bundle,
    as it is now."""
    bundle = stamp(configured.verify) if isinstance(configured.verify, Path) else None
    lasting = replace(
        configured,
        api_keys=(),
        admin_key=None,
        max_in_flight=None,
        allow_http=False,
        image_urls=ImageUrls.REFUSE,
        bill_on_5xx=BillOn5xx.NEVER,
    )
    return lasting, bundle


@dataclass(frozen=True, slots=True)
class Parts:
    """Whatever knows something of the configuration that may change."""

    directory: Directory
    cache: Cache
    upstreams: Upstreams
    keyring: KeyRing
    users: Users
    admission: Admission
    keeper: Keeper
    attempts: Attempts
    joining: Joining
    comebacks: Comebacks
    purchases: Purchases
    pipeline: Pipeline
    files: Files
    lookups: Lookups
    owning: Owning
    background: Background
    checks: Checks
    factors: Factors
    health: Health
    turnstile: Turnstile
    budget_watch: BudgetWatch
    metrics: Metrics
    clock: Clock
    counted: Callable[[str], None]
    """Hears how each message of the notifier went."""


def cache_policy(settings: Settings) -> CachePolicy:
    return CachePolicy(
        settings.cache.enabled,
        settings.cache.scope.value,
        settings.cache.ttl.total_seconds(),
        settings.cache.max_entry_bytes,
    )


def make_planner(
    settings: Settings,
    accounts: Mapping[str, Account],
    prices: PriceBook,
    cache: Cache,
    factors: Factors,
    health: Health,
) -> Planner:
    passing = {name for name, one in settings.upstreams.items() if passes_urls(one)}
    return Planner(
        settings.catalogue,
        accounts,
        prices,
        cache,
        cache_policy(settings),
        frozenset(passing),
        factors.of,
        health.usable,
        compat=settings.compat,
        hosting=settings.hosts_pictures,
    )


def places(settings: Settings) -> dict[str, int]:
    """How many calls may be at each upstream."""
    return {name: one.places for name, one in settings.upstreams.items()}


class Swap:
    """Takes over what may change while the gateway runs."""

    def __init__(
        self, settings: Settings, planner: Planner, notifier: Notifier | None, parts: Parts
    ) -> None:
        self.planner = planner
        self._settings = settings
        self._notifier = notifier
        self._parts = parts
        self._turn = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        parts.metrics.set("gateway_config_reload_failed", 0)

    async def reload(self, read: Callable[[], Awaitable[Settings]]) -> Reloaded:
        """Takes over what is read, all of it or nothing; whether it did."""
        async with self._turn:
            try:
                await self._take_over(await read())
                ended = Reloaded.APPLIED
            except (ConfigError, CannotServe, PriceFileError, SSLError, ValueError) as error:
                _tell(error)
                ended = Reloaded.REFUSED
            except (StoreError, GatewayError, OSError) as error:
                _tell(error)
                ended = Reloaded.POSTPONED
            except Exception:
                # Whatever it is: the gateway goes on as it was.
                log.exception("the configuration is not read again")
                ended = Reloaded.POSTPONED
            metrics = self._parts.metrics
            metrics.set("gateway_config_reload_failed", 0 if ended is Reloaded.APPLIED else 1)
            metrics.add("gateway_config_reloads_total", outcome=ended.value)
            return ended

    async def _take_over(self, found: Settings) -> None:
        """Everything that can fail comes first; then all is swapped without a break."""
        parts, running = self._parts, self._settings
        settings = swapped(running, found)
        prices = await asyncio.to_thread(price_book, settings)
        refuse(found, unpriced_models(settings, prices, parts.clock.now().date()))
        peppers = read_peppers(settings)
        refuse(found, await owned_twice(settings, peppers, parts.directory))
        declared = await declared_keys(settings, peppers, parts.directory)
        news = needs_restart(running, found)
        same = settings.notify == running.notify
        notifier = self._notifier if same else open_notifier(settings, parts.clock, parts.counted)
        try:
            prepared = await parts.upstreams.prepare(settings.upstreams)
        except BaseException:
            if notifier is not None and not same:
                await notifier.aclose()
            raise
        # From here on nothing waits and nothing fails.
        parts.upstreams.take_over(prepared, settings.upstreams)
        parts.turnstile.replace(places(settings))
        parts.upstreams.watch(parts.turnstile)
        parts.keyring.replace(peppers, declared)
        parts.users.replace(peppers, settings.users.policy)
        patience, relay = patience_of(settings), settings.relay
        lease = timedelta(seconds=settings.lease_seconds)
        parts.admission.replace(lease, repeat_unknown=patience.repeat_unknown)
        parts.attempts.replace(relay.attempts, settings.patience_seconds)
        parts.comebacks.patience = patience
        parts.joining.keep_alive_seconds = relay.keep_alive_seconds
        parts.purchases.keep_alive_seconds = relay.keep_alive_seconds
        parts.factors.replace(settings.catalogue)
        parts.keeper.policy = cache_policy(settings)
        tell_prices(parts.metrics, settings, prices, parts.clock.now().date())
        self.planner = make_planner(
            settings, parts.upstreams.accounts, prices, parts.cache, parts.factors, parts.health
        )
        passing = any(passes_urls(one) for one in settings.upstreams.values())
        parts.pipeline.replace(
            self.planner,
            read_rules(settings, passing),
            patience,
            log_prompts=relay.log_prompts,
        )
        parts.files.rules = file_rules(settings)
        parts.lookups.enabled = settings.responses.enabled
        parts.owning.keep = settings.responses.keep
        parts.background.seconds = settings.background_seconds
        parts.checks.rules = check_rules(settings)
        parts.budget_watch.replace(settings.notify.budget_percent, notifier)
        before, self._notifier = self._notifier, notifier
        if before is not None and before is not notifier:
            task = asyncio.get_running_loop().create_task(self._retire(before))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        self._settings = settings
        log.info(
            "the configuration was read again",
            extra={
                "teams": len(declared.teams),
                "keys": len(declared.keys),
                "models": len(settings.catalogue.models),
                "upstreams": len(prepared),
            },
        )
        for name in news:
            log.warning("a setting needs a restart", extra={"setting": name})

    async def _retire(self, notifier: Notifier) -> None:
        await self._parts.budget_watch.looked()
        await notifier.aclose()

    async def aclose(self) -> None:
        if self._retiring:
            await asyncio.wait(self._retiring)
        if self._notifier is not None:
            await self._notifier.aclose()
