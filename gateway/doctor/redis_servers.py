"""Redis: what limits and pictures are shared by, each with needs of its own."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gateway.doctor.clocks import compared
from gateway.doctor.finding import Check, Finding, Topic, sized
from gateway.ports import Clock
from gateway.secret import Secret
from gateway.settings import Settings
from gateway.stores.redis_glance import (
    LIMITS_KEYS,
    PICTURES_KEYS,
    RedisAway,
    RedisGlance,
    RedisNode,
    Trouble,
    glance_at_redis,
    host_of,
)
from gateway.stores.redis_link import same_server

OLDEST = 7
SLOW_SECONDS = 0.02
FULL = 0.9
ANSWER_SECONDS = 2.5
ACL = "~gw* +@read +@write +@scripting +@connection +time -@dangerous +info +cluster|slots"
"""What is enough for the gateway's user; ``cluster|slots`` is for clusters."""


@dataclass(frozen=True, slots=True)
class Use:
    """What a server is for: limits must not be forgotten, pictures may be."""

    limits: bool
    pictures: bool


async def limits(settings: Settings, clock: Clock) -> Check:
    """The Redis of ``storage.redis``."""
    url = settings.storage.redis
    if url is None:
        processes = settings.server.replicas * settings.server.workers
        yield Topic("redis", "storage.redis").ok(
            "not set: one process needs none"
            if processes == 1
            else f"not set: each of {processes} processes keeps its share of the limits"
        )
        return
    cache = settings.cache.redis
    wanted = settings.cache.enabled or settings.results.enabled
    keys = (*LIMITS_KEYS, *PICTURES_KEYS) if wanted and cache is None else LIMITS_KEYS
    shared = wanted and (cache is None or same_server(cache.reveal(), url.reveal()))
    use = Use(limits=True, pictures=shared)
    async for finding in _server("storage.redis", url, clock, keys, use):
        yield finding
    if shared:
        yield Topic("redis", "storage.redis").warn(
            "holds the pictures too: when they fill it, limits are not kept any more",
            "give pictures a Redis of their own that may evict: cache.redis",
        )


async def pictures(settings: Settings, clock: Clock) -> Check:
    """The Redis of ``cache.redis``, where it is another one."""
    url, state = settings.cache.redis, settings.storage.redis
    if url is None or (state is not None and same_server(url.reveal(), state.reveal())):
        return
    use = Use(limits=False, pictures=True)
    async for finding in _server("cache.redis", url, clock, PICTURES_KEYS, use):
        yield finding


async def _server(setting: str, url: Secret, clock: Clock, keys: Sequence[str], use: Use) -> Check:
    topic = Topic("redis", setting)
    host = host_of(url.reveal())
    try:
        found = await glance_at_redis(url.reveal(), ANSWER_SECONDS, keys)
    except RedisAway as error:
        if error.trouble is not Trouble.AWAY:
            yield _unusable(topic, setting, host, error)
            return
        without = (
            "storage.without_redis says what holds meanwhile"
            if use.limits
            else "pictures are bought again meanwhile"
        )
        yield topic.fail(
            f"{host} does not answer: {error}",
            f"start it, or mend {setting} ({without})",
        )
        return
    if found.seconds > SLOW_SECONDS:
        yield topic.warn(
            f"{host} takes {found.seconds * 1000:.0f} ms to answer: every request waits for it",
            "move it closer to the gateway",
        )
    yield topic.ok(
        f"{host} is {found.nodes[0].called}"
        f"{f', {len(found.nodes)} masters' if len(found.nodes) > 1 else ''}, "
        f"{found.seconds * 1000:.1f} ms away"
    )
    for finding in judge(topic, url.reveal(), found, use):
        yield finding
    yield compared(setting, found.now, clock.now(), found.seconds)


def judge(topic: Topic, url: str, found: RedisGlance, use: Use) -> Iterator[Finding]:
    yield from _refused(topic, url, found)
    for node in found.nodes:
        yield from _judge_node(topic, url, node, use)
    if not url.startswith("rediss") and _is_public(host_of(url)):
        yield topic.warn(
            "is asked over a public network without encryption", "use rediss:// and a password"
        )


def _unusable(topic: Topic, setting: str, host: str, error: RedisAway) -> Finding:
    """It answers, and is not what the url makes of it."""
    match error.trouble:
        case Trouble.PASSWORD:
            return topic.fail(
                f"{host} does not let the gateway in: {error}",
                f"write the right user and password into {setting}: redis://user:password@host/0",
            )
        case Trouble.DATABASE:
            return topic.fail(
                f"{host} has no such database: {error}",
                f"end {setting} with a number that it has, as in redis://host:6379/0",
            )
        case Trouble.NO_CLUSTER:
            return topic.fail(
                f"{host} is no cluster: {error}",
                f"write redis:// (rediss:// with TLS) in {setting}, or name a cluster's nodes",
            )
        case Trouble.SILENT:
            return topic.warn(f"{host} says nothing of itself: {error}", _allow(host))
    return topic.fail(f"{host} refuses what the gateway asks: {error}", _allow(host))


def _allow(host: str) -> str:
    return f"ACL SETUSER name {ACL} (at {host})"


def _refused(topic: Topic, url: str, found: RedisGlance) -> Iterator[Finding]:
    if found.forbidden:
        yield topic.fail(
            f"refuses what the gateway asks: {found.refusal}",
            _allow(host_of(url)),
        )
        return
    told = any(
        node.role != "master" or node.refuses_writes or (node.clustered and not _is_cluster(url))
        for node in found.nodes
    )
    if found.refusal and not told:
        yield topic.fail(
            f"does not do what the gateway asks: {found.refusal}",
            "mend what it says; where it is full, raise maxmemory",
        )


def _is_cluster(url: str) -> bool:
    return "+cluster" in url.partition("://")[0]


def _judge_node(topic: Topic, url: str, node: RedisNode, use: Use) -> Iterator[Finding]:
    name = f"{node.name}: " if node.name else ""
    if node.product == "Redis" and node.version < (OLDEST,):
        yield topic.fail(
            f"{name}{node.called} is too old", f"use Redis {OLDEST} or newer, or Valkey"
        )
    if node.clustered and not _is_cluster(url):
        yield topic.fail(
            f"{name}is part of a cluster, and is asked as if it were alone",
            "write redis+cluster:// (rediss+cluster:// with TLS)",
        )
    if node.role != "master":
        yield topic.fail(
            f"{name}is a replica: nothing can be written there",
            "name the master, or use redis+sentinel://",
        )
    if node.refuses_writes:
        yield topic.fail(
            f"{name}its last save to disk failed, so that it refuses to be written",
            "make room on its disk, or switch its persistence off: limits need none",
        )
    evicts = node.policy not in ("", "noeviction")
    if use.limits and evicts:
        yield topic.warn(
            f"{name}maxmemory-policy is {node.policy}: when it is full, limits are forgotten",
            "CONFIG SET maxmemory-policy noeviction, and the same in its redis.conf",
        )
    if use.limits and node.policy == "noeviction":
        yield topic.ok(f"{name}maxmemory-policy is noeviction")
    if use.pictures and not node.max_bytes:
        policy = "" if use.limits else " and maxmemory-policy allkeys-lru"
        yield topic.warn(
            f"{name}maxmemory is not set: pictures fill its machine",
            f"CONFIG SET maxmemory 4gb{policy}, and the same in its redis.conf",
        )
    elif not use.limits and not evicts:
        yield topic.warn(
            f"{name}maxmemory-policy is {node.policy or 'unknown'}: once full, no picture is kept",
            "CONFIG SET maxmemory-policy allkeys-lru, and the same in its redis.conf",
        )
    elif not use.limits:
        yield topic.ok(f"{name}at most {sized(node.max_bytes)}, then {node.policy}")
    if node.max_bytes and node.used_bytes > FULL * node.max_bytes and not evicts:
        yield topic.warn(
            f"{name}{sized(node.used_bytes)} of {sized(node.max_bytes)} are used",
            "raise maxmemory, or take something else out of it",
        )
    if node.persistent and not use.limits:
        yield topic.ok(
            f"{name}writes pictures to its disk too (appendonly): the cache needs it not"
        )


def _is_public(hosts: str) -> bool:
    for host in hosts.split(","):
        try:
            if ipaddress.ip_address(host.rpartition(":")[0].strip("[]") or host).is_global:
                return True
        except ValueError:
            continue
    return False
