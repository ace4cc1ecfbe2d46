"""Every target by its name: how it is started, and on which stores."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from tests.bench.targets import (
    BUFFERED,
    STATIC,
    UNBUFFERED,
    Direct,
    Gateway,
    LiteLLM,
    Nginx,
    Portkey,
    Site,
    Target,
)
from tests.postgres import run_postgres
from tests.valkey import start_valkey

Start = Callable[[Site, contextlib.ExitStack], Target]
"""Stores that it needs are started on the stack."""

NO_MEMORY: Final = {"memory_bytes": 1}
"""Room for no answer at all."""
POLICY: Final[Mapping[str, Mapping[str, object]]] = {
    "results": {"enabled": False},
    "cache": {"max_bytes": 1},
}
"""What the goals are about: key, gate, ledger, look into the cache, metrics, log. Of answers only
what is in memory is kept; as it ships, the gateway writes each to disk for who comes back."""


_FLAGS: Final = struct.Struct("l")
_GET_FLAGS: Final = 0x80086601
_SET_FLAGS: Final = 0x40086602
_SPREAD_FOLDERS: Final = 0x00020000
"""Of linux/fs.h: FS_IOC_GETFLAGS, FS_IOC_SETFLAGS on 64 bits, and FS_TOPDIR_FL (``chattr +T``)."""


def start_gateway(
    site: Site,
    stack: contextlib.ExitStack,
    changes: Mapping[str, Mapping[str, object]] | None = None,
) -> Gateway:
    """Several workers share their limits through a Valkey."""
    changes = changes or {}
    if site.workers > 1:
        shared = {"redis": stack.enter_context(start_valkey()), **changes.get("storage", {})}
        changes = {**changes, "storage": shared, "server": {"workers": site.workers}}
    return Gateway(site, changes)


def _disk(site: Site, stack: contextlib.ExitStack) -> Target:
    return start_gateway(site, stack, {"cache": NO_MEMORY})


def _redis(site: Site, stack: contextlib.ExitStack) -> Target:
    url = stack.enter_context(start_valkey())
    return start_gateway(site, stack, {"cache": {**NO_MEMORY, "redis": url}})


def _postgres(site: Site, stack: contextlib.ExitStack) -> Target:
    server = stack.enter_context(run_postgres(durable=True))
    storage = {"database": server.fresh_database(), "pepper": "bench-pepper-0123456789abcdef01"}
    return start_gateway(site, stack, {"storage": storage})


POLICY_TARGET: Final = "gateway-policy"

STARTS: Final[dict[str, Start]] = {
    "gateway": lambda site, stack: start_gateway(site, stack),
    POLICY_TARGET: lambda site, stack: start_gateway(site, stack, POLICY),
    "gateway-disk": _disk,
    "gateway-redis": _redis,
    "gateway-postgres": _postgres,
    "nginx": lambda site, _: Nginx(site, UNBUFFERED),
    "nginx-64k": lambda site, _: Nginx(site, BUFFERED),
    "nginx-sendfile": lambda site, _: Nginx(site, STATIC),
    "litellm": lambda site, _: LiteLLM(site),
    "portkey": lambda site, _: Portkey(site),
    "direct": lambda site, _: Direct(site),
}

TITLES: Final[Mapping[str, str]] = {
    "gateway": "gateway",
    POLICY_TARGET: "gateway, nothing kept on disk",
    "gateway-disk": "gateway, cache on disk alone",
    "gateway-redis": "gateway, cache in Valkey alone",
    "gateway-postgres": "gateway, PostgreSQL",
    "nginx": "nginx, unbuffered",
    "nginx-64k": "nginx, buffers of 64k",
    "nginx-sendfile": "nginx, sendfile",
    "litellm": "LiteLLM",
    "portkey": "Portkey",
    "direct": "the mock alone",
}


def row(name: str, workers: int) -> str:
    """What a target is called in the results, where it runs in so many workers."""
    return name if workers == 1 else f"{name}-{workers}-workers"


def title(row: str) -> str:
    name, _, workers = row.removesuffix("-workers").rpartition("-")
    if row.endswith("-workers") and workers.isdecimal():
        return f"{title(name)}, {workers} workers"
    return TITLES.get(row, row)


def start(name: str, site: Site, stack: contextlib.ExitStack) -> Target:
    """Runs until the stack is closed, its stores a little longer. Raises ``StartError`` and
    ``MissingTool``."""
    target = STARTS[name](site, stack)
    stack.callback(target.stop)
    return target


@contextlib.contextmanager
def site_folder() -> Iterator[str]:
    """Gone afterwards, with all that is in it.

    On ext4 it begins in a part of the disk that its name, a random one, decides. For up to five
    minutes ext4 gives no new file the number of a deleted one, and passes by all of these for each
    file that it makes: beside the thousands that the last run has just deleted, that took as long
    as the whole request.
    """
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as outer:
        with contextlib.suppress(OSError):
            _set_flag(outer, _SPREAD_FOLDERS)
        Path(outer).chmod(0o755)
        yield tempfile.mkdtemp(dir=outer)


def _set_flag(folder: str, flag: int) -> None:
    """As ``chattr`` does. Raises ``OSError`` where the file system has no such flags."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        (flags,) = _FLAGS.unpack(fcntl.ioctl(descriptor, _GET_FLAGS, _FLAGS.pack(0)))
        fcntl.ioctl(descriptor, _SET_FLAGS, _FLAGS.pack(flags | flag))
    finally:
        os.close(descriptor)


def mount(path: Path) -> str:
    """The kind of file system that a path is on, as /proc/mounts has it."""
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if path.resolve().is_relative_to(where) and len(where) > len(best[0]):
            best = (where, kind)
    return best[1]
