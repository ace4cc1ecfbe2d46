"""Every store and upstream call of one request, counted, and the n-th of them failing.

The ports are wrapped where ``gateway.app`` has them made, so nothing in the product knows of it::

    faults = Faults()
    install(faults, monkeypatch.setattr)
    async with start(...) as gateway:
        faults.arm(("ledger.settle", 2), Way.AFTER)    # made, and its answer is lost
        ...
        calls = faults.disarm()       # ["directory.find_key", "cache.get", ...]

A call fails as its port promises: with its own error, and a hang ends with the deadline that the
port has. Redis fails below its gate, at the command, because the gate answers for what was lost.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar

import psycopg
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

import gateway.app
import gateway.assembly_stores
import gateway.relay.budget
import gateway.relay.keeping
import gateway.relay.keyring
import gateway.relay.purchase
import gateway.stores.redis_link
import gateway.swap
from gateway.domain.errors import (
    LedgerUnavailable,
    UpstreamBroken,
    UpstreamUnavailable,
    UpstreamUnknown,
)
from gateway.ports import Cached, CachedMeta, CacheEntry, Outgoing, Parts, Reply, Take
from gateway.stores.redis_gate import RedisGate
from gateway.stores.redis_link import GATE_SECONDS, Script, Server, connect
from gateway.stores.safe import SettlementSafe
from tests.torture.verdict import Ledger

T = TypeVar("T")
Place = tuple[str, int]
"""A call, and which of its name, counted from 1. So errands that overtake each other change
nothing."""
Set = Callable[[Any, str, Any], None]
"""``monkeypatch.setattr``, or ``setattr`` where the process ends anyway."""

PIECE_BYTES = 300
"""An upstream's body comes in pieces of this size, whatever the network made of it."""
HANG_SECONDS = 0.05
"""How long a call hangs whose port promises an end: in real life up to 3 s, or 600."""
KILLED = 9
"""The exit code of a process that dies at a call."""
SLOT_LEASE_SECONDS = 1.0
"""Of a gateway that is to die."""
PATIENT_SECONDS = 5.0


class Way(StrEnum):
    """How a call fails."""

    BEFORE = "error before"
    AFTER = "error after"
    HANG = "hang, not made"
    HANG_MADE = "hang, made"
    KILL_BEFORE = "kill before"
    KILL_AFTER = "kill after"

    @property
    def made(self) -> bool:
        return self in (Way.AFTER, Way.HANG_MADE, Way.KILL_AFTER)

    @property
    def hangs(self) -> bool:
        return self in (Way.HANG, Way.HANG_MADE)


@dataclass
class Faults:
    """Which call fails, and how. Only calls between ``arm`` and ``disarm`` are counted: those of
    one request. ``away`` are calls that fail anyway, so many times."""

    calls: list[str] = field(default_factory=list)
    met: str = ""
    """The call that failed."""
    stores: list[Any] = field(default_factory=list)
    """Those that were opened, unwrapped."""
    _mine: set[str] = field(default_factory=set)
    _armed: bool = False
    _place: Place = ("", 0)
    _way: Way = Way.BEFORE
    _away: dict[str, int] = field(default_factory=dict)

    def arm(
        self,
        place: Place = ("", 0),
        way: Way = Way.BEFORE,
        away: Mapping[str, int] | None = None,
    ) -> None:
        """The call at ``place`` fails, counted from now on; without one, none does."""
        self.calls, self.met = [], ""
        self._mine.clear()
        self._armed, self._place, self._way = True, place, way
        self._away = dict(away or {})

    @property
    def places(self) -> list[Place]:
        """The calls since ``arm``, as places."""
        return [(name, self.calls[: n + 1].count(name)) for n, name in enumerate(self.calls)]

    def disarm(self) -> list[str]:
        self._armed = False
        return self.calls

    def meets(self, name: str) -> Way | None:
        """Counts a call; how it fails, if it does."""
        if not self._armed:
            return None
        self.calls.append(name)
        if (name, self.calls.count(name)) == self._place:
            self.met = name
            return self._way
        if self._away.get(name, 0) > 0:
            self._away[name] -= 1
            return Way.BEFORE
        return None

    def began(self, rid: str) -> None:
        """A request that is looked at; what is still to be done for others is let through."""
        if self._armed:
            self._mine.add(rid)

    def knows(self, rid: str) -> bool:
        return rid in self._mine

    async def through(
        self,
        name: str,
        call: Callable[[], Awaitable[T]],
        fail: Callable[[Way], T],
        *,
        seconds: float = HANG_SECONDS,
        lose: Callable[[T], Awaitable[None]] | None = None,
    ) -> T:
        """Makes a call, or fails in its place: ``fail`` raises the port's error, or returns what
        the port promises in place of one. ``lose`` disposes of an answer that nobody gets."""
        way = self.meets(name)
        if way is None:
            return await call()
        if way is Way.KILL_BEFORE:
            os._exit(KILLED)
        if way.made:
            answer = await call()
            if way is Way.KILL_AFTER:
                os._exit(KILLED)
            if lose is not None:
                await lose(answer)
        if way.hangs:
            await asyncio.sleep(seconds)
        return fail(way)


class _Wrapped:
    """Everything of ``target`` but what a subclass does otherwise."""

    def __init__(self, target: Any, faults: Faults) -> None:
        self._target = target
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def _ledger_away(_: Way) -> NoReturn:
    raise LedgerUnavailable("The ledger is away.", retry_after_seconds=5)


class _Directory(_Wrapped):
    async def find_key(self, digest: bytes) -> Any:
        return await self._faults.through(
            "directory.find_key", lambda: self._target.find_key(digest), _ledger_away
        )


class _Ledger(_Wrapped):
    async def reserve(self, claim: Any) -> Any:
        self._faults.began(claim.rid)
        return await self._faults.through(
            "ledger.reserve", lambda: self._target.reserve(claim), _ledger_away
        )

    async def claimed(self, team: str, idempotency_key: str, fingerprint: str, at: Any) -> Any:
        return await self._faults.through(
            "ledger.claimed",
            lambda: self._target.claimed(team, idempotency_key, fingerprint, at),
            _ledger_away,
        )

    async def reroute(self, reroute: Any) -> Any:
        return await self._faults.through(
            "ledger.reroute", lambda: self._target.reroute(reroute), _ledger_away
        )

    async def settle(self, settlement: Any) -> Any:
        if not self._faults.knows(settlement.rid):
            return await self._target.settle(settlement)
        return await self._faults.through(
            "ledger.settle", lambda: self._target.settle(settlement), _ledger_away
        )

    async def balances(self, lines: Any) -> Any:
        return await self._faults.through(
            "ledger.balances", lambda: self._target.balances(lines), _ledger_away
        )

    async def replay(self, replay: Any) -> Any:
        """It promises nothing, so a failure is not heard of."""
        return await self._faults.through(
            "ledger.replay", lambda: self._target.replay(replay), lambda _: None
        )


class _Store(_Wrapped):
    def __init__(self, target: Any, faults: Faults) -> None:
        super().__init__(target, faults)
        faults.stores.append(target)
        self.ledger = _Ledger(target.ledger, faults)
        self.directory = _Directory(target.directory, faults)


class _Cache(_Wrapped):
    """A cache that is away is a miss, never an error."""

    async def get(self, key: str) -> Cached | None:
        return await self._faults.through("cache.get", lambda: self._get(key), lambda _: None)

    async def _get(self, key: str) -> Cached | None:
        found: Cached | None = await self._target.get(key)
        return found

    async def put(
        self, key: str, meta: CachedMeta, chunks: AsyncIterator[bytes], ttl_seconds: float
    ) -> bool:
        return await self._faults.through(
            "cache.put", lambda: self._target.put(key, meta, chunks, ttl_seconds), lambda _: False
        )

    def put_at_once(self, entry: CacheEntry, body: Parts) -> bool:
        return False


class _Safe(_Wrapped):
    @staticmethod
    def _broken(_: Way) -> NoReturn:
        raise OSError("the disk is broken")

    async def keep(self, settlement: Any) -> None:
        await self._faults.through("safe.keep", lambda: self._target.keep(settlement), self._broken)

    async def settled(self, rid: str) -> None:
        """A mark that cannot be written is no error."""
        if not self._faults.knows(rid):
            await self._target.settled(rid)
            return
        await self._faults.through(
            "safe.settled", lambda: self._target.settled(rid), lambda _: None
        )


class _Upstream(_Wrapped):
    async def send(self, outgoing: Outgoing, credential: str) -> Reply:
        reply = await self._faults.through(
            "upstream.send",
            lambda: self._send(outgoing, credential),
            self._lost,
            lose=lambda one: one.aclose(),
        )
        return _Reply(reply, self._faults)

    async def _send(self, outgoing: Outgoing, credential: str) -> Reply:
        reply: Reply = await self._target.send(outgoing, credential)
        return reply

    @staticmethod
    def _lost(way: Way) -> NoReturn:
        if way.made:
            raise UpstreamUnknown("It was sent.", status=504 if way.hangs else 502)
        raise UpstreamUnavailable("It was not reached.", retry_after_seconds=5)


class _Reply(_Wrapped):
    """Each piece of the body is a call of its own, and so is its end."""

    async def chunks(self, take: Take | None = None) -> AsyncIterator[bytes]:
        pieces = _pieces(self._target.chunks())
        while piece := await self._faults.through(
            "reply.chunk", lambda: anext(pieces, b""), self._broken
        ):
            yield piece

    @staticmethod
    def _broken(way: Way) -> NoReturn:
        raise UpstreamBroken("It broke.", status=504 if way.hangs else 502)


async def _pieces(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    held = b""
    async for chunk in chunks:
        held += chunk
        while len(held) >= PIECE_BYTES:
            yield held[:PIECE_BYTES]
            held = held[PIECE_BYTES:]
    if held:
        yield held


class _Redis(_Wrapped):
    """The scripts of the gate; what else it asks is no part of a request."""

    _NAMES: Mapping[str, str] = {
        Script.load(f"{file}.lua").digest: name
        for file, name in (
            ("gate", "gate.take"), ("gate_undo", "gate.undo"), ("gate_release", "gate.release"),
        )
    }  # fmt: skip

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        name = self._NAMES.get(str(args[1])) if args[0] == "EVALSHA" else None
        run = partial(self._target.execute_command, *args, **options)
        if name is None:
            return await run()
        return await self._faults.through(name, run, self._cut, seconds=GATE_SECONDS + 0.1)

    @staticmethod
    def _cut(way: Way) -> NoReturn:
        raise RedisTimeoutError("no answer") if way.hangs else RedisConnectionError("it was cut")


def install(faults: Faults, put: Set, *, dying: bool = False) -> None:
    """Wraps every port of gateways that are opened from now on, and shortens their pauses. A slot
    that nobody gave back is held for longer than a test waits. A process that is ``dying`` has
    patience instead, so that it meets its call on a busy machine too."""
    app: Any = gateway.app
    parts: Any = gateway.assembly_stores
    swap: Any = gateway.swap
    open_store, account, cache = app.open_store, swap.make_account, app.make_cache
    put(app, "open_store", lambda settings: _Store(open_store(settings), faults))
    put(swap, "make_account", lambda *given: _Upstream(account(*given), faults))
    if dying:
        put(gateway.stores.redis_link, "connect", partial(connect, timeout=PATIENT_SECONDS))

    class FaultyServer(Server):
        def __init__(self) -> None:
            super().__init__(pause=0.02)

        def connect(self, url: str) -> Any:
            return _Redis(super().connect(url), faults)

    def wrapped_cache(*given: Any) -> Any:
        made, shared = cache(*given)
        return _Cache(made, faults), shared

    def wrapped_safe(folder: Path, worker: str) -> Any:
        return _Safe(SettlementSafe.open(folder, worker), faults)

    put(app, "make_cache", wrapped_cache)
    put(app, "SettlementSafe", SimpleNamespace(open=wrapped_safe))
    put(app, "RedisServer", FaultyServer)
    if dying:
        quick = _gate_of(lease_seconds=SLOT_LEASE_SECONDS, deadline_seconds=PATIENT_SECONDS)
    else:
        quick = _gate_of(lease_seconds=60.0)
        put(gateway.relay.purchase, "SAFE_SECONDS", HANG_SECONDS / 2)
    put(parts, "RedisGate", quick)
    put(gateway.relay.purchase, "SETTLE_PAUSES_SECONDS", (0.01, 0.01, 0.01))
    put(gateway.relay.keeping, "KEEP_SECONDS", HANG_SECONDS / 2)
    put(gateway.relay.budget, "PATIENCE_SECONDS", HANG_SECONDS / 2)
    # Nothing is remembered: each request makes every call.
    put(gateway.relay.budget, "KNOWN_SECONDS", 0.0)
    put(gateway.relay.keyring, "KNOWN_SECONDS", 0.0)


def _gate_of(**options: Any) -> type[RedisGate]:
    class Quick(RedisGate):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **{"beat_seconds": 0.2, **options, **named})

    return Quick


@contextmanager
def snapshot(database: Path | str) -> Iterator[Callable[[str], Sequence[Sequence[Any]]]]:
    """Plain SQL on a SQLite file, or on a PostgreSQL by its url; all of it at one moment."""
    if isinstance(database, Path):
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=10)) as db:
            db.execute("BEGIN")
            yield lambda sql: db.execute(sql).fetchall()
    else:
        with psycopg.connect(database) as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            yield lambda sql: connection.execute(sql.encode()).fetchall()


def ledger_of(database: Path | str) -> Ledger:
    """The books, as somebody reads them who knows nothing of the gateway's code."""
    with snapshot(database) as query:
        return Ledger.read(query)
