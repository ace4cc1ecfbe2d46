"""A look at a Redis or a Valkey: what it says of itself. Nothing is written."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import unquote, urlsplit

from redis.exceptions import RedisClusterException, RedisError

from gateway.stores.redis_link import connect, is_refused, on_every_master

PINGS = 3
SECTIONS = ("server", "memory", "persistence", "replication", "cluster")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class RedisAway(Exception):
    """It gave no answer. ``str()`` says why, without the password."""


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
    them. ``script_error`` is why no script can be run, empty where one can."""

    nodes: tuple[RedisNode, ...]
    seconds: float
    now: datetime
    script_error: str = ""


async def glance_at_redis(url: str, seconds: float) -> RedisGlance:
    """``seconds`` bounds each answer. Raises ``RedisAway``."""
    client = connect(url, timeout=seconds)
    try:
        everywhere, anywhere = on_every_master(client)
        sections = [await client.execute_command("INFO", one, **everywhere) for one in SECTIONS]
        loop = asyncio.get_running_loop()
        quickest, now = math.inf, EPOCH
        for _ in range(PINGS):
            began = loop.time()
            said = await client.execute_command("TIME", **anywhere)
            took = loop.time() - began
            if took < quickest:
                quickest = took
                now = EPOCH + timedelta(seconds=int(said[0]), microseconds=int(said[1]))
        script_error = ""
        try:
            await client.execute_command("EVAL", "return 1", 0, **anywhere)
        except RedisError as error:
            script_error = _said(error, url)
        return RedisGlance(_nodes(sections), quickest, now, script_error)
    except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
        raise RedisAway(_said(error, url)) from None
    finally:
        with suppress(RedisError, OSError, asyncio.TimeoutError):
            await client.aclose()


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
