"""Room: bytes and inodes where things are kept, against what the configuration lets grow."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gateway.doctor.finding import Check, Finding, Topic, sized
from gateway.ports import Clock
from gateway.settings import Settings
from gateway.stores.sqlite_glance import kind_of_disk

MIB = 1024 * 1024
LEAST_BYTES = 64 * MIB
LOW_BYTES = 512 * MIB
LOW_INODES = 10_000
COUNT_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class Kept:
    """A folder, and the most that may be in it; ``lasting``: its loss is a loss of money."""

    setting: str
    folder: Path
    most_bytes: int = 0
    lasting: bool = False


async def disks(settings: Settings, clock: Clock) -> Check:
    for kept in kept_in(settings):
        yield await asyncio.to_thread(look, kept, clock)
    database, spool = settings.storage.database, settings.ledger.spool
    if isinstance(database, Path) and await asyncio.to_thread(_is_one, database.parent, spool):
        yield Topic("disk", "ledger.spool").ok(
            "on the disk of the database: if that fills up, settlements have nowhere to wait"
        )


def kept_in(settings: Settings) -> list[Kept]:
    """The folders that this configuration writes into."""
    storage = settings.storage
    found = []
    if isinstance(storage.database, Path):
        found.append(Kept("storage.database", storage.database.parent, lasting=True))
    on_disk = settings.cache.redis is None and storage.redis is None
    most = settings.server.spool_bytes
    if on_disk and settings.cache.enabled:
        most += settings.cache.max_bytes
    if on_disk and settings.results.enabled:
        most += settings.results.max_bytes
    if on_disk and settings.hosts_pictures:
        most += settings.hosted.max_bytes
    found.append(Kept("storage.blobs", storage.blobs, most))
    found.append(Kept("ledger.spool", settings.ledger.spool, lasting=True))
    return found


def look(kept: Kept, clock: Clock) -> Finding:
    topic = Topic("disk", kept.setting)
    if why := probe(kept.folder):
        return topic.fail(
            f"{kept.folder} cannot be written: {why}",
            f"make it writable for the user that runs the gateway, or change {kept.setting}",
        )
    there = nearest(kept.folder)
    kind = kind_of_disk(there)
    if kept.lasting and kind in ("tmpfs", "ramfs", "overlay"):
        lost = "the container" if kind == "overlay" else "the machine's memory"
        return topic.warn(
            f"{kept.folder} is in {lost} ({kind}), and ends with it",
            f"mount a volume there, or change {kept.setting}: what is lost there is money",
        )
    try:
        found = os.statvfs(there)
    except OSError as error:
        return topic.fail(f"{there}: {error.strerror}", f"change {kept.setting}")
    free = found.f_bavail * found.f_frsize
    said = f"{sized(free)} free at {kept.folder}"
    if free < LEAST_BYTES:
        return topic.fail(f"only {said}", "make room, or a larger disk")
    if found.f_files and found.f_favail < LOW_INODES:
        return topic.warn(
            f"only {found.f_favail} inodes are free at {kept.folder}",
            "remove small files there, or make the file system anew with more inodes",
        )
    if free < LOW_BYTES:
        return topic.warn(f"only {said}", "make room, or a larger disk")
    if kept.most_bytes:
        ends = clock.monotonic() + COUNT_SECONDS
        used = _used_bytes(kept.folder, clock, ends)
        if free + used < kept.most_bytes:
            return topic.warn(
                f"{said}, and {sized(kept.most_bytes)} may be wanted",
                "lower server.spool_bytes, cache.max_bytes, results.max_bytes and "
                "hosted.max_bytes, or make room",
            )
        said += f", at most {sized(kept.most_bytes)} wanted"
    return topic.ok(said)


def probe(folder: Path) -> str:
    """Why nothing can be written into a folder, or it cannot be made; empty where it can. The file
    that is tried has no name, and is gone at once."""
    there = nearest(folder)
    if there == folder:
        try:
            with tempfile.TemporaryFile(dir=folder):
                return ""
        except OSError as error:
            return error.strerror or str(error)
    if not there.is_dir():
        return f"{there} is not a folder"
    follow = os.access in os.supports_effective_ids
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=follow):
        return f"{there} is read-only for this user"
    return ""


def nearest(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(one for one in (folder, *folder.parents) if _exists(one))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a part of it may not be looked into
        return False


def _is_one(one: Path, other: Path) -> bool:
    """Whether two folders are on the same disk."""
    return nearest(one).stat().st_dev == nearest(other).stat().st_dev


def _used_bytes(folder: Path, clock: Clock, ends: float) -> int:
    """What is in it; of a large one only what was counted in time."""
    total = 0
    for sizes in _sizes(folder):
        total += sizes
        if clock.monotonic() > ends:
            break
    return total


def _sizes(folder: Path) -> Iterable[int]:
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(os.path.join(root, name)).st_size
            except OSError:
                yield 0  # removed meanwhile
