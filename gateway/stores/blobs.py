"""Answers on disk: one file each, its meta in front of its content.

A file is ``gwc1``, the header's length (4 bytes, big endian), the header (JSON), the content, and
nothing after it. It appears under its name by a rename, whole, and is never written again.

An answer that is kept in two folders, as a result and as a cached entry, is one file under two
names: its header says the one entry, and the other one in ``also``.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import re
import secrets
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gateway.ports import (
    Cached,
    CachedMeta,
    CacheEntry,
    Clock,
    FileBody,
    OpenFile,
    Parts,
)
from gateway.stores.cachemeta import decode, encode
from gateway.stores.kept import Kept

T = TypeVar("T")

MAGIC = b"gwc1"
WRITE_BYTES = 512 * 1024
MOST_PARTS = 1024
"""In one call: the least that every system takes."""
MAX_HEADER_BYTES = 1024 * 1024
SWEEP_SECONDS = 60.0
_KEY = re.compile(r"[a-z0-9][a-z0-9:_-]{2,250}")
_HALF = ".put-"


@dataclass(slots=True)
class _Known:
    """A file by what it takes: bytes on disk, and when it expires (Unix time)."""

    size: int
    expires: float


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file that was opened and found whole."""

    file: OpenFile
    meta: CachedMeta
    start: int
    size: int
    expires: float
    used: float

    def iterate(self) -> FileBody:
        return FileBody(self.file, self.start, self.size, waits=True)


class DiskCache:
    """Answers in ``folder/<key[:2]>/<key>``, least recently used out first.

    ``max_bytes`` bounds the files, headers included, that this process knows: what it found at
    its first use, put, or read. Larger content than ``max_entry_bytes`` is not kept. Several
    processes may share a folder; each then keeps its own count. Dates are the clock's, so entries
    outlive a restart. ``on_error`` hears of each ``OSError``; the caller of the cache does not.
    """

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        *,
        max_bytes: int,
        max_entry_bytes: int | None = None,
        puts_at_once: int = 16,
        on_error: Callable[[OSError], None] | None = None,
        beside: DiskCache | None = None,
        alone: bool = False,
    ) -> None:
        """Further puts wait: each that runs holds a part of its answer in memory. Of a body that
        is also kept in ``beside`` one file is made for both. ``alone``: no other process puts
        anything into the folder, so that what is not known is not there."""
        self._beside = beside
        self._alone = alone
        self._folder = folder
        self._root = os.fspath(folder)
        self._clock = clock
        self._max_bytes = max_bytes
        self._max_entry_bytes = max_bytes if max_entry_bytes is None else max_entry_bytes
        self._on_error = on_error
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._bytes = 0
        self._scanned = False
        self._scanning = asyncio.Lock()
        self._next_sweep = 0.0
        self._sweeping: asyncio.Task[None] | None = None
        self._puts = asyncio.Semaphore(puts_at_once)
        self._token = secrets.token_hex(8)
        self._halves = itertools.count()

    @property
    def bytes_held(self) -> int:
        """On disk, with what is being written."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._known)

    def keep_swept(self, every_seconds: float = SWEEP_SECONDS) -> None:
        """From now on what has expired is deleted though nobody asks, until ``aclose``."""
        if self._sweeping is None:
            self._sweeping = asyncio.create_task(self._sweep_for_ever(every_seconds))

    async def get(self, key: str) -> Cached | None:
        self._check(key)
        if not self._scanned:
            await self._scan_once()
        known = self._known.get(key)
        if known is None and self._alone and self._scanned:
            return None
        try:
            entry = await asyncio.to_thread(_look, Path(self._name(key)), self._now())
        except FileNotFoundError:
            entry = None
        except OSError as error:
            self._tell(error)
            return None
        if entry is None:
            # Only what was known before the look: a put may have ended meanwhile.
            if known is not None and self._known.get(key) is known:
                self._forget(key)
            return None
        if known is None and key not in self._known:
            self._learn(key, _Known(entry.size, entry.expires))
            await self._make_room()
        elif key in self._known:
            self._known.move_to_end(key)
        return Kept(entry.meta, entry.iterate, entry.expires - self._now())

    async def put(
        self, key: str, meta: CachedMeta, chunks: AsyncIterator[bytes], ttl_seconds: float
    ) -> bool:
        self._check(key)
        if isinstance(chunks, Parts) and chunks.made is self:
            return True
        if not self._takes(meta, ttl_seconds):
            return False
        if not self._scanned:
            await self._scan_once()
        now = self._now()
        if now >= self._next_sweep:
            await self._sweep(now)
        if isinstance(chunks, Parts):
            return await self._put_whole(CacheEntry(key, meta, ttl_seconds), chunks, now)
        async with self._puts:
            return await self._put(CacheEntry(key, meta, ttl_seconds), chunks)

    def put_at_once(self, entry: CacheEntry, body: Parts) -> bool:
        """Only where there is nothing to do: it is there, or is never taken."""
        if not (body.made is self or self._is_too_large(entry)):
            return False
        self._check(entry.key)
        return True

    def _is_too_large(self, entry: CacheEntry) -> bool:
        takes = self._takes(entry.meta, entry.ttl_seconds)
        return not takes or entry.meta.size_bytes > self._max_bytes

    def _takes(self, meta: CachedMeta, ttl_seconds: float) -> bool:
        return ttl_seconds > 0 and meta.size_bytes <= self._max_entry_bytes

    async def _put_whole(self, entry: CacheEntry, body: Parts, now: float) -> bool:
        """Writes what is in memory in one go, and perhaps a second name for it: one thread is
        asked once, where a body that still arrives takes three and more."""
        caches = [(self, entry), *await self._others(body, now)]
        head = _head([one for _, one in caches], now)
        size = len(head) + entry.meta.size_bytes
        if size > self._max_bytes or sum(map(len, body.parts)) != entry.meta.size_bytes:
            return False
        names = [cache._name(one.key) for cache, one in caches]
        # Counted before it is written, so that half-written files are within the bound too.
        for cache, _ in caches:
            cache._bytes += size
        made = 0
        try:
            for cache, _ in caches:
                if cache._bytes > cache._max_bytes:
                    await cache._make_room()
            half = f"{_HALF}{self._token}-{next(self._halves)}"
            made = await _in_thread(_write_whole, names, half, [head, *body.parts], now)
        except OSError as error:
            self._tell(error)
        finally:
            for cache, _ in caches:
                cache._bytes -= size
        for cache, one in caches[:made]:
            await cache._kept(one, size, now)
        if made > 1:
            body.made = self._beside
        return made > 0

    async def _others(self, body: Parts, now: float) -> list[tuple[DiskCache, CacheEntry]]:
        """Where a second name for this body's file is wanted, and what it is to say."""
        other, entry = self._beside, body.beside
        if other is None or entry is None or not other._takes(entry.meta, entry.ttl_seconds):
            return []
        if entry.meta.size_bytes > other._max_bytes // 2:
            # It may be too large with what stands in front of it: that is looked at by its own put.
            return []
        other._check(entry.key)
        if not other._scanned:
            await other._scan_once()
        if now >= other._next_sweep:
            await other._sweep(now)
        return [(other, entry)]

    async def _kept(self, entry: CacheEntry, size: int, now: float) -> None:
        """A file that was begun ``now`` is in its place."""
        self._forget(entry.key)
        self._learn(entry.key, _Known(size, now + entry.ttl_seconds))
        if self._bytes > self._max_bytes:
            await self._make_room()

    async def _put(self, entry: CacheEntry, chunks: AsyncIterator[bytes]) -> bool:
        now = self._now()
        head = _head([entry], now)
        size = len(head) + entry.meta.size_bytes
        if size > self._max_bytes:
            return False
        # Counted before it is written, so that half-written files are within the bound too.
        self._bytes += size
        kept = False
        try:
            await self._make_room()
            path = Path(self._name(entry.key))
            kept = await self._write(path, head, entry.meta.size_bytes, chunks)
        finally:
            self._bytes -= size
        if kept:
            await self._kept(entry, size, self._now())
        return kept

    async def holds(self, key: str) -> bool:
        await self.ping()
        return await self.get(key) is not None

    async def delete(self, key: str) -> None:
        path = self._path(key)
        self._forget(key)
        await self._unlink([path])

    async def ping(self) -> None:
        """Raises ``OSError`` when nothing can be written to the folder."""
        await asyncio.to_thread(_try_to_write, self._folder)

    async def aclose(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait({self._sweeping})

    def _path(self, key: str) -> Path:
        """Raises as ``_check`` does."""
        self._check(key)
        return Path(self._name(key))

    @staticmethod
    def _check(key: str) -> None:
        """Raises ``ValueError`` for a key that is not ``[a-z0-9:_-]``: it would be a path."""
        if not _KEY.fullmatch(key):
            raise ValueError("a cache key is 3 to 251 of a-z, 0-9, colon, hyphen and underscore")

    def _name(self, key: str) -> str:
        return f"{self._root}/{key[:2]}/{key}"

    def _now(self) -> float:
        return self._clock.now().timestamp()

    def _tell(self, error: OSError) -> None:
        if self._on_error is not None:
            self._on_error(error)

    def _learn(self, key: str, known: _Known) -> None:
        self._known[key] = known
        self._bytes += known.size

    def _forget(self, key: str) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self._bytes -= known.size

    async def _scan_once(self) -> None:
        async with self._scanning:
            if self._scanned:
                return
            try:
                found = await asyncio.to_thread(_scan, self._folder, self._now())
            except OSError as error:
                # Tried again at the next use: a disk may be mounted late.
                self._tell(error)
                return
            for entry_key, known in found:
                self._learn(entry_key, known)
            self._scanned = True
            await self._make_room()

    async def _sweep(self, now: float) -> None:
        self._next_sweep = now + SWEEP_SECONDS
        await self._drop_expired(now)

    async def _sweep_for_ever(self, every_seconds: float) -> None:
        while True:
            await self._scan_once()
            await self._drop_expired(self._now())
            await asyncio.sleep(every_seconds)

    async def _drop_expired(self, now: float) -> None:
        await self._drop([key for key, known in self._known.items() if known.expires <= now])

    async def _make_room(self) -> None:
        if self._bytes <= self._max_bytes:
            return
        # Nothing that may still be asked for goes before what may not.
        await self._drop_expired(self._now())
        over = self._bytes - self._max_bytes
        victims = []
        for key, known in self._known.items():
            if over <= 0:
                break
            victims.append(key)
            over -= known.size
        await self._drop(victims)

    async def _drop(self, keys: list[str]) -> None:
        for key in keys:
            self._forget(key)
        await self._unlink([self._path(key) for key in keys])

    async def _unlink(self, paths: list[Path]) -> None:
        if not paths:
            return
        try:
            await asyncio.to_thread(_unlink_all, paths)
        except OSError as error:
            self._tell(error)

    async def _write(
        self, path: Path, head: bytes, size: int, chunks: AsyncIterator[bytes]
    ) -> bool:
        """True when the file is in place. Raises only what ``chunks`` raises."""
        half: _Half | None = None
        try:
            half = await _threaded(_Half, path)
            waiting: list[bytes] = [head]
            waiting_bytes = came = 0
            chunk: bytes | None
            while (chunk := await anext(chunks, None)) is not None:
                came += len(chunk)
                if came > size:
                    return False
                waiting.append(chunk)
                waiting_bytes += len(chunk)
                if waiting_bytes >= WRITE_BYTES:
                    await _threaded(half.write, waiting)
                    waiting, waiting_bytes = [], 0
            if came != size:
                return False
            await _threaded(half.write, waiting)
            await _threaded(half.keep, self._now())
        except _DiskError as error:
            self._tell(error.cause)
            return False
        finally:
            if half is not None:
                half.close()
        return True


class _DiskError(Exception):
    """An ``OSError`` of the disk, told apart from one of the stream that is being kept."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


async def _in_thread(work: Callable[..., T], *args: object) -> T:
    """As ``asyncio.to_thread``, without a copy of the context that nothing here looks at."""
    return await asyncio.get_running_loop().run_in_executor(None, work, *args)


async def _threaded(work: Callable[..., T], *args: object) -> T:
    """Raises ``_DiskError`` for an ``OSError``."""
    try:
        return await asyncio.to_thread(work, *args)
    except OSError as error:
        raise _DiskError(error) from error


class _Half:
    """A file that is being written beside its place. It is gone when closed, unless kept.

    A thread may still be writing when the task that asked is cancelled, and a descriptor closed
    under it could by then be somebody else's: so the later of the two closes it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = path
        self._fd, self._name = tempfile.mkstemp(prefix=_HALF, dir=path.parent)
        self._end = weakref.finalize(self, _abandon, self._fd, self._name)
        self._writing = threading.Lock()
        self._closed = False
        # Tells a starting process, which removes what a crash left behind, that we live.
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, parts: list[bytes]) -> None:
        with self._in_use():
            for part in parts:
                rest = memoryview(part)
                while rest:
                    rest = rest[os.write(self._fd, rest) :]

    def keep(self, used: float) -> None:
        """Puts the file in its place, whole."""
        with self._in_use():
            os.utime(self._fd, (used, used))
            os.replace(self._name, self._path)
            self._end.detach()
            os.close(self._fd)

    def close(self) -> None:
        """Never waits."""
        self._closed = True
        if self._writing.acquire(blocking=False):
            self._end()
            self._writing.release()

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        try:
            with self._writing:
                if self._closed:
                    raise OSError("nobody waits for this file any more")
                yield
        finally:
            if self._closed:
                self._end()


def _head(entries: Sequence[CacheEntry], now: float) -> bytes:
    """What stands in front of the content of a file: its entry, and the one it is beside."""
    header = b""
    for entry in reversed(entries):
        extra: dict[str, float | str] = {"key": entry.key, "expires": now + entry.ttl_seconds}
        if header:
            extra["also"] = header.decode()
        header = encode(entry.meta, extra)
    return MAGIC + len(header).to_bytes(4, "big") + header


def _write_whole(names: Sequence[str], half: str, parts: Sequence[bytes], used: float) -> int:
    """Writes a file that appears under each of these names, the first one surely; how many it is.
    Another name may be on a disk of its own, or a file may be unable to have two. ``half`` is what
    it is called until it is whole.

    Raises ``OSError``; then there is no file.
    """
    name, *others = names
    half = f"{os.path.dirname(name)}/{half}"
    fd = _create(half)
    linked: list[str] = []
    try:
        # Tells a starting process, which removes what a crash left behind, that we live.
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _write_all(fd, parts)
        os.utime(fd, (used, used))
        linked += [other for other in others if _linked(half, other)]
        os.replace(half, name)
    except BaseException:
        with contextlib.suppress(OSError):
            _unlink_all([half, *linked])
        raise
    finally:
        os.close(fd)
    return 1 + len(linked)


def _create(name: str) -> int:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(name, flags, 0o600)
    except FileNotFoundError:
        _make_folder(name)
        return os.open(name, flags, 0o600)


def _make_folder(name: str) -> None:
    Path(name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)


def _write_all(fd: int, parts: Sequence[bytes]) -> None:
    """As few calls as can be: for each, the thread gives up Python's lock and waits for it."""
    for at in range(0, len(parts), MOST_PARTS):
        some = parts[at : at + MOST_PARTS]
        written, size = os.writev(fd, some), sum(map(len, some))
        if written < size:
            rest = memoryview(b"".join(some))[written:]
            while rest:
                rest = rest[os.write(fd, rest) :]


def _linked(half: str, name: str) -> bool:
    """Whether a file that is whole has this name too, in place of what had it before."""
    try:
        try:
            os.link(half, name)
        except FileNotFoundError:
            _make_folder(name)
            os.link(half, name)
        except FileExistsError:
            # A link cannot replace: it is made beside its place, and renamed.
            spare = f"{os.path.dirname(name)}/{os.path.basename(half)}"
            os.link(half, spare)
            os.replace(spare, name)
    except OSError:
        return False
    return True


def _abandon(fd: int, name: str) -> None:
    os.close(fd)
    with contextlib.suppress(OSError):
        os.unlink(name)


def _open(path: Path, now: float) -> _Entry | None:
    """The entry in this file, None (and no file) if it is expired or damaged.

    Raises ``OSError`` where it cannot be read.
    """
    file = OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
    try:
        entry = _parse(file, path.name)
    except ValueError:
        entry = None
    if entry is None or entry.expires <= now:
        path.unlink(missing_ok=True)
        return None
    return entry


def _parse(file: OpenFile, key: str) -> _Entry:
    """Raises ``ValueError`` for a file that is not whole, or not this key's."""
    stat = os.fstat(file.fd)
    start = len(MAGIC) + 4
    if stat.st_size < start:
        raise ValueError("too short")
    prefix = file.read(start, 0)
    length = int.from_bytes(prefix[len(MAGIC) :], "big")
    if prefix[: len(MAGIC)] != MAGIC or length > min(MAX_HEADER_BYTES, stat.st_size - start):
        raise ValueError("no header")
    meta, document = decode(file.read(length, start))
    start += length
    if document.get("key") != key and isinstance(also := document.get("also"), str):
        meta, document = decode(also.encode())
    expires = document.get("expires")
    if document.get("key") != key or not isinstance(expires, int | float):
        raise ValueError("another entry's header")
    if start + meta.size_bytes != stat.st_size:
        raise ValueError("not as long as it says")
    return _Entry(file, meta, start, stat.st_size, float(expires), stat.st_mtime)


def _look(path: Path, now: float) -> _Entry | None:
    """As ``_open``, and the file counts as used now."""
    entry = _open(path, now)
    if entry is not None:
        os.utime(entry.file.fd, (now, now))
    return entry


def _scan(folder: Path, now: float) -> list[tuple[str, _Known]]:
    """What is in the folder, least recently used first. Damaged, expired and half files go."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found: list[tuple[float, str, _Known]] = []
    for path in _files(folder):
        if path.name.startswith(_HALF):
            _remove_if_abandoned(path)
        elif _KEY.fullmatch(path.name) and path.parent.name == path.name[:2]:
            try:
                entry = _open(path, now)
            except OSError:
                # One bad sector or stranger's file is no reason to know nothing of the others.
                continue
            if entry is not None:
                found.append((entry.used, path.name, _Known(entry.size, entry.expires)))
    found.sort(key=lambda item: item[:2])
    return [(key, known) for _, key, known in found]


def _files(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        shelves = [entry for entry in entries if len(entry.name) == 2]
    for shelf in shelves:
        if shelf.is_dir(follow_symlinks=False):
            with os.scandir(shelf) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False):
                        yield Path(entry.path)


def _remove_if_abandoned(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except OSError:
        # Another process is writing it.
        return
    finally:
        os.close(fd)


def _unlink_all(names: Sequence[str | Path]) -> None:
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _try_to_write(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"?")
