"""What the machine gives: file descriptors, memory, cores, and the versions of what runs here."""

from __future__ import annotations

import os
import platform
import resource
import sqlite3
from importlib.metadata import version
from pathlib import Path

from gateway.descriptors import shares
from gateway.doctor.finding import Check, Finding, Topic, sized
from gateway.settings import Settings

MAX_CONNECTIONS = 10_000
"""Where server.max_connections says nothing."""
EACH_WORKER_BYTES = 160 * 1024 * 1024
"""Of a process that has no picture in memory, after a burst of them."""
OPENED = 32
NO_LIMIT = 1 << 60
CGROUP = Path("/sys/fs/cgroup")


async def versions() -> Check:
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("uvicorn", "httpx", "redis", "psycopg")
    )
    yield Topic("versions").ok(
        f"gateway {version('image-gateway')}, Python {platform.python_version()}, SQLite "
        f"{sqlite3.sqlite_version}, {libraries}"
    )


async def machine(settings: Settings) -> Check:
    # Serving raises the soft limit to the hard one.
    yield judge_descriptors(settings, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    yield judge_memory(settings, memory_bytes())
    yield judge_cores(settings, cores())


def judge_descriptors(settings: Settings, limit: int) -> Finding:
    topic = Topic("machine", "file descriptors")
    wanted = settings.server.max_connections or MAX_CONNECTIONS
    places = sum(upstream.places for upstream in settings.upstreams.values())
    flying = max(1, min(settings.server.max_in_flight, places))
    found = shares(limit, OPENED, wanted, flying)
    said = f"enough for {found.connections} connections and {found.in_flight} calls at once"
    if limit == resource.RLIM_INFINITY:
        return topic.ok("without a limit")
    if found.in_flight < flying or (settings.server.max_connections and found.connections < wanted):
        return topic.warn(
            f"{limit} in each process: {said}, and {wanted} and {flying} are configured",
            f"ulimit -Hn {2 * (wanted + flying) + 256}, or LimitNOFILE of systemd, or lower "
            "server.max_connections and server.max_in_flight",
        )
    return topic.ok(f"{limit} in each process: {said}")


def judge_memory(settings: Settings, limit_bytes: int) -> Finding:
    topic = Topic("machine", "memory")
    workers = settings.server.workers
    wanted = settings.server.buffer_bytes + workers * (
        EACH_WORKER_BYTES + settings.cache.memory_bytes * settings.cache.enabled
    )
    if not limit_bytes:
        return topic.skipped("the system does not say how much there is")
    if wanted > limit_bytes:
        return topic.warn(
            f"{sized(limit_bytes)}, and server.workers: {workers} may want {sized(wanted)}",
            "raise the limit, or lower server.buffer_bytes, cache.memory_bytes or server.workers",
        )
    return topic.ok(f"{sized(limit_bytes)}, at most about {sized(wanted)} wanted")


def judge_cores(settings: Settings, count: float) -> Finding:
    topic = Topic("machine", "cores")
    workers = settings.server.workers
    if workers > max(1, count):
        return topic.warn(
            f"{count:g}, for {workers} processes: they only take turns",
            f"set server.workers to {max(1, int(count))}",
        )
    return topic.ok(f"{count:g}, for server.workers: {workers}")


def memory_bytes() -> int:
    """What this container, or else this machine, has; 0 where nobody says."""
    limits = [_number(CGROUP / name) for name in ("memory.max", "memory/memory.limit_in_bytes")]
    try:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):
        limits.append(0)
    return min((one for one in limits if 0 < one < NO_LIMIT), default=0)


def cores() -> float:
    """Those that this process may use, or the share of them that its container has."""
    if hasattr(os, "sched_getaffinity"):
        count: float = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return min(count, int(quota) / int(period))
    except (OSError, ValueError):  # no container, or no limit ("max")
        return count


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
