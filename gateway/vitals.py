"""What a running gateway says of itself: whether it is ready, and its metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

from gateway.api.health import Readiness
from gateway.domain.errors import GatewayError
from gateway.domain.money import NANOS_PER_DOLLAR
from gateway.domain.price import FACTOR_ONE
from gateway.domain.quota import Scope as Owner
from gateway.domain.team import Team, money_lines
from gateway.machine import Disks
from gateway.ports import Cache, Clock, Gate, Store
from gateway.relay.drain import Drain
from gateway.relay.factors import Factors
from gateway.stores.redis_gate import RedisGate
from gateway.stores.redis_link import StoreAway
from gateway.telemetry.metrics import MAX_TEAMS, Metrics

log = logging.getLogger(__name__)

PING_SECONDS = 2.0
MONEY_SECONDS = 2.0
"""Both together stay far below a scrape's 10 s: a ledger that hangs must not look like a gateway
that is gone."""
_SETTINGS = MappingProxyType(
    {
        "ledger": "storage.database",
        "directory": "storage.database",
        "redis": "storage.redis",
        "cache": "cache.redis",
    }
)
"""What says where each store is: the first thing to look at where it does not answer."""


class Vitals:
    """Looks at the stores whenever it is asked, each within its time."""

    def __init__(
        self,
        *,
        store: Store,
        gate: Gate,
        shared_cache: Cache | None,
        without_redis: str,
        drain: Drain,
        declared: Callable[[], Mapping[str, Team]],
        factors: Factors,
        disks: Disks,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        """``shared_cache`` is one in a Redis of its own; ``without_redis`` says what holds while
        the shared gate is away; ``declared`` are the file's teams as of now."""
        self._store = store
        self._gate = gate
        self._shared_cache = shared_cache
        self._without_redis = without_redis
        self._drain = drain
        self._declared = declared
        self._factors = factors
        self._disks = disks
        self._clock = clock
        self._metrics = metrics

    async def look(self) -> Readiness:
        """Whether requests can be taken, and what is degraded."""
        if self._drain.begun:
            return Readiness(False, {}, {}, draining=True)
        gate = self._gate if isinstance(self._gate, RedisGate) else None
        pings = {"ledger": self._store.ledger.ping, "directory": self._store.directory.ping}
        if gate is not None:
            pings["redis"] = gate.ping
        if self._shared_cache is not None:
            pings["cache"] = self._shared_cache.ping
        answers = await asyncio.gather(*(_answers(name, ping) for name, ping in pings.items()))
        stores = dict(zip(pings, answers, strict=True))
        degraded: dict[str, str] = {}
        if gate is not None and gate.trouble is not None:
            degraded["redis"] = f"{gate.trouble}: {self._without_redis}"
        if not stores.get("cache", True):
            degraded["cache"] = "answers are kept by this process alone"
        self._metrics.dependencies(stores)
        return Readiness(stores["ledger"] and stores["directory"], degraded, stores)

    async def greet_cache(self) -> None:
        """A look at a Redis of the cache's own before anybody asks, so that the log of a start says
        that it is away. The gate does so by itself, and without the database there is no start."""
        if self._shared_cache is not None:
            await _answers("cache", self._shared_cache.ping)

    async def exposition(self) -> bytes:
        """The metrics, with the gauges that are read when they are asked for."""
        metrics = self._metrics
        state, free = await asyncio.gather(self.look(), self._disks.free())
        metrics.replace(
            "gateway_disk_free_bytes", {(name,): float(left) for name, left in free.items()}
        )
        for (upstream, model), factor in self._factors.by_label().items():
            metrics.set("gateway_bound_factor", factor / FACTOR_ONE, upstream=upstream, model=model)
        metrics.set("gateway_clock_skew_seconds", self._store.clock_skew_seconds)
        if all(state.stores.get(name, True) for name in ("ledger", "directory")):
            await self._look_at_money()
        return metrics.exposition()

    async def _look_at_money(self) -> None:
        """Sets the gauges of open holds, unresolved dollars, and budgets of teams that may spend,
        as far as they can be read in time."""
        ledger, metrics, now = self._store.ledger, self._metrics, self._clock.now()
        try:
            async with asyncio.timeout(MONEY_SECONDS):
                declared = [team for team in self._declared().values() if not team.disabled]
                made = await self._store.directory.some_teams(MAX_TEAMS)
                lines = [
                    line
                    for team in (*declared, *made)[:MAX_TEAMS]
                    for line in money_lines(team.limits.of(Owner.TEAM, team.id), now, team.zone)
                ]
                metrics.budgets(zip(lines, await ledger.balances(lines), strict=True))
                metrics.set("gateway_ledger_open_holds", await ledger.open_holds())
                unresolved = await ledger.unresolved() / NANOS_PER_DOLLAR
                metrics.set("gateway_ledger_unresolved_usd", unresolved)
        except (GatewayError, TimeoutError) as error:
            log.warning("the ledger cannot be read for the metrics", extra={"error": str(error)})


async def _answers(store: str, ping: Callable[[], Awaitable[None]]) -> bool:
    """Whether a store answers, and in time."""
    try:
        async with asyncio.timeout(PING_SECONDS):
            await ping()
    except (GatewayError, StoreAway, OSError) as error:
        said = {"store": store, "setting": _SETTINGS[store], "error": _why(error)}
        log.warning("a store does not answer", extra=said)
        return False
    return True


def _why(error: Exception) -> str:
    """What a store's error says to an operator; never a password."""
    if isinstance(error, TimeoutError):
        return f"no answer within {PING_SECONDS:g} s"
    # Of Redis' client: where it was looked for, and what came of it.
    told = error.__cause__ if isinstance(error, StoreAway) else None
    return " ".join(str(told or error).split()) or type(error).__name__
