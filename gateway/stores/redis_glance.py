"""A look at a Redis or a Valkey: what it says of itself, and whether it does what the stores ask.

One key of each store is written and deleted; nothing stays."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from typing import Any
from urllib.parse import unquote, urlsplit

from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    RedisClusterException,
    RedisError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from gateway.stores.redis_link import PROBE, Client, connect, is_refused, on_every_master

PINGS = 3
SECTIONS = ("server", "memory", "persistence", "replication", "cluster")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


LIMITS_KEYS = ("gw:{default}:doctor",)
PICTURES_KEYS = ("gwc:{doctor}", "gwr:{doctor}")
"""Keys as the gate and the board, and the cache, have them."""
PROBE_MS = 10_000


class Trouble(Enum):
    """Why nothing is known of a server."""

    AWAY = auto()
    PASSWORD = auto()
    DATABASE = auto()
    NO_CLUSTER = auto()
    REFUSED = auto()
    """Its user may not do what the gateway does."""
    SILENT = auto()
    """It does what the gateway asks, but says nothing of itself."""


class RedisAway(Exception):
    """It gave no answer. ``str()`` says why, without the password."""

    def __init__(self, words: str, trouble: Trouble) -> None:
        super().__init__(words)
        self.trouble = trouble


@dataclass(frozen=True, slots=True)
class RedisNode:
    """One server, or one master of a cluster. ``max_bytes`` 0 is without a limit; ``policy`` is
    empty where it does not say."""

    name: str
    product: str
    version: tuple[int, ...]
    policy: str
    used_bytes: int
    max_bytes: int
    role: str
    clustered: bool
    persistent: bool
    refuses_writes: bool

    @property
    def called(self) -> str:
        return f"{self.product} {'.'.join(map(str, self.version))}"


@dataclass(frozen=True, slots=True)
class RedisGlance:
    """``seconds`` is the quickest of a few round trips; ``now`` the server's time during one of
    them. ``refusal`` is why it does not do what the stores ask; empty where it does. ``forbidden``:
    because of what its user may do."""

    nodes: tuple[RedisNode, ...]
    seconds: float
    now: datetime
    refusal: str = ""
    forbidden: bool = False


async def glance_at_redis(url: str, seconds: float, keys: Sequence[str]) -> RedisGlance:
    """``seconds`` bounds each answer; ``keys`` are written and deleted. Raises ``RedisAway``."""
    client = connect(url, timeout=seconds)
    refusal: RedisError | None = None
    try:
        try:
            await _try(client, keys)
        except (
            AuthenticationError,
            RedisClusterException,
            RedisConnectionError,
            RedisTimeoutError,
        ):
            raise
        except RedisError as error:
            refusal = error
        everywhere, anywhere = on_every_master(client)
        sections = [await client.execute_command("INFO", one, **everywhere) for one in SECTIONS]
        loop = asyncio.get_running_loop()
        quickest, now = math.inf, EPOCH
        for _ in range(PINGS):
            began = loop.time()
            time = await client.execute_command("TIME", **anywhere)
            took = loop.time() - began
            if took < quickest:
                quickest = took
                now = EPOCH + timedelta(seconds=int(time[0]), microseconds=int(time[1]))
        said = "" if refusal is None else _said(refusal, url)
        forbidden = _is_forbidden(refusal)
        return RedisGlance(_nodes(sections), quickest, now, said, forbidden)
    except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
        if refusal is not None and _is_forbidden(error) and _is_forbidden(refusal):
            raise RedisAway(_said(refusal, url), Trouble.REFUSED) from None
        raise RedisAway(_said(error, url), _trouble(error)) from None
    finally:
        with suppress(RedisError, OSError, asyncio.TimeoutError):
            await client.aclose()


async def _try(client: Client, keys: Sequence[str]) -> None:
    """What the stores do, by scripts and without."""
    for key in keys:
        await PROBE.run(client, [key], PROBE_MS)
        for command in ("EXISTS", "UNLINK"):
            await client.execute_command(command, key)
        await client.execute_command("HGET", key, "f")


def _is_forbidden(error: BaseException | None) -> bool:
    # What a script may not do is an error of the script.
    return isinstance(error, NoPermissionError) or "ACL failure" in str(error)


def _trouble(error: BaseException) -> Trouble:
    if isinstance(error, NoPermissionError):
        return Trouble.SILENT
    if isinstance(error, AuthenticationError):
        return Trouble.PASSWORD
    text = str(error)
    if "DB index" in text:
        return Trouble.DATABASE
    if isinstance(error, RedisClusterException) and "ot enabled" in text:
        return Trouble.NO_CLUSTER
    return Trouble.AWAY


def host_of(url: str) -> str:
    """The servers that a url names, without user and password."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _nodes(sections: list[Any]) -> tuple[RedisNode, ...]:
    """Each section is a table, or a table of them by node."""
    known: dict[str, dict[str, Any]] = {}
    for section in sections:
        several = all(isinstance(one, Mapping) for one in section.values()) and section
        for name, table in (section if several else {"": section}).items():
            known.setdefault(str(name), {}).update(table)
    return tuple(_node(name, table) for name, table in known.items())


def _node(name: str, said: Mapping[str, Any]) -> RedisNode:
    valkey = said.get("valkey_version")
    version = str(valkey or said.get("redis_version", "0"))
    return RedisNode(
        name=name,
        product="Valkey" if valkey else "Redis",
        version=tuple(int(part) for part in version.split(".")[:3] if part.isdecimal()),
        policy=str(said.get("maxmemory_policy", "")),
        used_bytes=int(said.get("used_memory", 0)),
        max_bytes=int(said.get("maxmemory", 0)),
        role=str(said.get("role", "master")),
        clustered=str(said.get("cluster_enabled", 0)) == "1",
        persistent=str(said.get("aof_enabled", 0)) == "1",
        refuses_writes=said.get("rdb_last_bgsave_status", "ok") != "ok"
        or said.get("aof_last_write_status", "ok") != "ok",
    )


def _said(error: BaseException, url: str) -> str:
    if is_refused(error):
        return "nobody listens there"
    text = " ".join(str(error).split()) or type(error).__name__
    with suppress(ValueError):
        for secret in (urlsplit(url).password, unquote(urlsplit(url).password or "")):
            if secret:
                text = text.replace(secret, "***")
    return text
