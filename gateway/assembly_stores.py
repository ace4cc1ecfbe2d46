"""The stores among the parts: which technology keeps what, by the settings."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gateway.descriptors import kept_answers
from gateway.descriptors import limit as fd_limit
from gateway.domain import keys
from gateway.domain.ledger import Entry, Settlement
from gateway.ports import (
    Cache,
    Clock,
    FlightBoard,
    Gate,
    Store,
    StoreError,
)
from gateway.relay.hosting import Hosting, Links
from gateway.settings import (
    Settings,
    WithoutRedis,
)
from gateway.stores.blobs import DiskCache
from gateway.stores.memory import MemoryCache, MemoryGate
from gateway.stores.memory_board import MemoryBoard
from gateway.stores.postgres import PostgresStore
from gateway.stores.redis_board import RedisBoard
from gateway.stores.redis_cache import RedisCache
from gateway.stores.redis_gate import GateListener, RedisGate
from gateway.stores.redis_link import Errand, Reason, same_server
from gateway.stores.redis_link import Server as RedisServer
from gateway.stores.sqlite import SQLiteStore
from gateway.stores.tiered import TieredCache
from gateway.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

RESULT_MAX_BYTES = 256 * 1024 * 1024
"""A larger answer can only be read on the connection that it was asked for on."""
RESULT_SECONDS = 60.0
"""What reading a result from Redis may take: it cannot be had in another way, as a cached answer
can."""


def open_store(settings: Settings) -> Store:
    """The database. Raises ``StoreError``."""
    database = settings.storage.database
    if isinstance(database, Path):
        return SQLiteStore.open(database, on_conflict=_conflict)
    return PostgresStore.open(database.reveal(), on_conflict=_conflict)


def stored_in(settings: Settings) -> dict[str, Path]:
    """The folders that this gateway writes to, by what they hold."""
    storage = settings.storage
    folders = {"blobs": storage.blobs, "settlements": settings.ledger.spool}
    if isinstance(storage.database, Path):
        folders["database"] = storage.database.parent
    return folders


def _conflict(entry: Entry, settlement: Settlement) -> None:
    log.error(
        "a call was settled twice, with different amounts; the first stands",
        extra={"request_id": entry.rid, "first": entry.cost, "second": settlement.cost},
    )


def make_folder(folder: Path, configured: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StoreError(
            f"storage.blobs {configured} cannot be written ({error.strerror or error}): make it "
            "writable for this user, or name another folder"
        ) from error


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
            said = {"setting": "storage.redis", "reason": reason.value, "error": str(error)}
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


def make_gate(
    settings: Settings, clock: Clock, metrics: Metrics, server: RedisServer, errand: Errand
) -> Gate:
    """``errand`` starts what nobody waits for, but the end of the process."""
    replicas, url = settings.server.replicas, settings.storage.redis
    if url is None:
        return MemoryGate(clock, processes=replicas)
    gate = RedisGate(
        server.connect(url.reveal()),
        clock,
        server=server,
        processes=replicas * settings.server.workers,
        deny=settings.storage.without_redis is WithoutRedis.DENY,
        listener=_GateNews(metrics),
        errand=errand,
    )
    gate.greet()
    return gate


def make_board(
    settings: Settings,
    clock: Clock,
    metrics: Metrics,
    server: RedisServer,
    errand: Errand,
    *,
    worker: str,
    ttl_seconds: float,
) -> FlightBoard:
    """``ttl_seconds`` is how long an answer that nobody took is kept. ``server`` is that of the
    gate; the gate's news say when it is away, and back."""
    url = settings.storage.redis
    if url is None:
        return MemoryBoard(clock, ttl_seconds=ttl_seconds)

    def failed(reason: Reason, _: BaseException) -> None:
        metrics.add("gateway_flight_board_errors_total", reason=reason.value)

    return RedisBoard(
        server.connect(url.reveal()),
        clock,
        worker=worker,
        ttl_seconds=ttl_seconds,
        server=server,
        on_error=failed,
        errand=errand,
    )


def without_redis(settings: Settings) -> str:
    """What holds while the shared gate is away."""
    if settings.storage.without_redis is WithoutRedis.DENY:
        return "requests with a limit are refused"
    processes = settings.server.replicas * settings.server.workers
    part = f"1/{processes} of each" if processes > 1 else "all of each"
    return f"limits are kept by this process, {part}"


def make_cache(
    settings: Settings, clock: Clock, metrics: Metrics, server: RedisServer
) -> tuple[Cache, Cache | None]:
    """In-process in front of Redis where it is configured, else of the disk; and the one in a
    Redis of its own, where there is one. ``server`` is that of the gate."""
    cache, state = settings.cache, settings.storage.redis

    def failed(*_: object) -> None:
        metrics.add("gateway_cache_errors_total", operation="store")

    front = MemoryCache(
        clock,
        max_bytes=cache.memory_bytes,
        max_entry_bytes=cache.max_entry_bytes,
        max_files=kept_answers(fd_limit()),
    )
    metrics.watch("gateway_cache_bytes", lambda: front.bytes_held, where="memory")
    url = cache.redis or state
    if url is None:
        folder = settings.storage.blobs / "cache"
        processes = settings.server.replicas * settings.server.workers
        disk = DiskCache(
            folder, clock, max_bytes=cache.max_bytes, on_error=failed, alone=processes == 1
        )
        metrics.watch("gateway_cache_bytes", lambda: disk.bytes_held, where="disk")
        return TieredCache(front, disk), None
    same = state is not None and same_server(url.reveal(), state.reveal())
    back = RedisCache(
        (server if same else RedisServer()).connect(url.reveal()),
        clock,
        max_entry_bytes=cache.max_entry_bytes,
        server=server if same else None,
        on_error=failed,
    )
    return TieredCache(front, back), None if same else back


def make_results(
    settings: Settings,
    clock: Clock,
    metrics: Metrics,
    server: RedisServer,
    cache: Cache | None = None,
) -> Cache | None:
    """Answers by request id, in the Redis of the cache, else on disk; None where they are off.

    ``server`` is that of the gate. No tier in memory: hardly any is read twice. What goes into
    ``cache`` too is one file with its entry there.
    """
    if not settings.results.enabled:
        return None
    kind = _Shelf("results", "gwr", "gateway_results_bytes", "gateway_results_errors_total")
    beside = cache.back if isinstance(cache, TieredCache) else None
    return _make_shelf(kind, settings.results.max_bytes, settings, clock, metrics, server, beside)


def make_hosting(
    settings: Settings,
    clock: Clock,
    metrics: Metrics,
    server: RedisServer,
    peppers: Callable[[], keys.Peppers],
) -> tuple[Hosting, Cache] | None:
    """Who puts pictures behind urls, and where they are kept: as results are, apart from them.
    None where nobody can ask for urls. ``peppers`` are those of now."""
    public_url = settings.server.public_url
    if public_url is None or not settings.hosts_pictures:
        return None
    kind = _Shelf("hosted", "gwh", "gateway_hosted_bytes", "gateway_hosted_errors_total")
    shelf = _make_shelf(kind, settings.hosted.max_bytes, settings, clock, metrics, server)
    return Hosting(
        shelf,
        Links(public_url, settings.hosted.ttl, peppers),
        clock,
        counted=lambda outcome: metrics.add("gateway_hosted_total", outcome=outcome),
    ), shelf


class _Shelf(NamedTuple):
    """A store of what is fetched by its own name: a folder of blobs, or, where the cache is in a
    Redis, keys there that begin with ``prefix``; and the names of its metrics."""

    folder: str
    prefix: str
    bytes_held: str
    errors: str


def _make_shelf(
    kind: _Shelf,
    max_bytes: int,
    settings: Settings,
    clock: Clock,
    metrics: Metrics,
    server: RedisServer,
    beside: Cache | None = None,
) -> Cache:
    def failed(*_: object) -> None:
        metrics.add(kind.errors, operation="store")

    state = settings.storage.redis
    url = settings.cache.redis or state
    if url is None:
        disk = DiskCache(
            settings.storage.blobs / kind.folder,
            clock,
            max_bytes=max_bytes,
            max_entry_bytes=RESULT_MAX_BYTES,
            on_error=failed,
            beside=beside if isinstance(beside, DiskCache) else None,
        )
        metrics.watch(kind.bytes_held, lambda: disk.bytes_held, where="disk")
        disk.keep_swept()
        return disk
    same = state is not None and same_server(url.reveal(), state.reveal())
    return RedisCache(
        (server if same else RedisServer()).connect(url.reveal()),
        clock,
        max_entry_bytes=RESULT_MAX_BYTES,
        data_seconds=RESULT_SECONDS,
        prefix=kind.prefix,
        server=server if same else None,
        on_error=failed,
        beside=beside if isinstance(beside, RedisCache) else None,
    )
