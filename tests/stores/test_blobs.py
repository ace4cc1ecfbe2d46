"""The cache on disk: what it leaves in the folder, and what it makes of a damaged one."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import stat
import sys
import textwrap
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gateway.ports import Cached, CachedMeta, CacheEntry, Parts
from gateway.stores.blobs import DiskCache
from tests.clock import StillClock
from tests.valkey import eventually, pieces

KEY = hashlib.sha256(b"a call").hexdigest()
MIB = 1024 * 1024


def meta_of(data: bytes) -> CachedMeta:
    return CachedMeta(datetime(2026, 11, 22, tzinfo=UTC), 1, 1, "m", "u", len(data))


def key_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


async def keep(cache: DiskCache, key: str, data: bytes, ttl: float = 60) -> None:
    await cache.put(key, meta_of(data), pieces(data, 100_000), ttl)


async def content(cached: Cached | None) -> bytes | None:
    if cached is None:
        return None
    return b"".join([chunk async for chunk in cached.chunks()])


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


class Disk:
    """A folder, and the errors that were told of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = StillClock()
        self.errors: list[OSError] = []

    def cache(self, max_bytes: int = 64 * MIB) -> DiskCache:
        return DiskCache(self.folder, self.clock, max_bytes=max_bytes, on_error=self.errors.append)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "blobs")


async def test_files_are_private_and_nothing_else_is_left(disk: Disk) -> None:
    await keep(disk.cache(), KEY, os.urandom(MIB))
    (file,) = files(disk.folder)
    assert file == disk.folder / KEY[:2] / KEY
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


async def test_entries_outlive_a_restart_and_so_does_their_order(disk: Disk) -> None:
    first = disk.cache()
    for name in "abcd":
        disk.clock.advance(1)
        await keep(first, key_of(name), name.encode() * 1000)
    disk.clock.advance(1)
    assert await content(await first.get(key_of("a"))) == b"a" * 1000
    assert first.bytes_held == held(disk.folder)
    await first.aclose()

    room = held(disk.folder)
    second = disk.cache(max_bytes=room)
    assert await content(await second.get(key_of("b"))) == b"b" * 1000
    assert (len(second), second.bytes_held) == (4, room)
    await keep(second, key_of("e"), b"e" * 1000)
    there = [name for name in "abcde" if (disk.folder / key_of(name)[:2] / key_of(name)).exists()]
    assert there == ["a", "b", "d", "e"]
    assert second.bytes_held == held(disk.folder)


async def test_the_bound_holds_while_files_are_written(disk: Disk) -> None:
    cache = disk.cache(max_bytes=350_000)
    seen = 0

    async def watched(data: bytes) -> AsyncIterator[bytes]:
        nonlocal seen
        for start in range(0, len(data), 20_000):
            yield data[start : start + 20_000]
            await asyncio.sleep(0)
            seen = max(seen, held(disk.folder))

    for i in range(30):
        data = os.urandom(50_000 + 1000 * i)
        await cache.put(key_of(str(i)), meta_of(data), watched(data), 60)
        assert held(disk.folder) == cache.bytes_held <= 350_000
    assert 100_000 < seen <= 350_000
    await keep(cache, KEY, os.urandom(350_001))
    assert await cache.get(KEY) is None


async def test_expired_files_are_removed_without_being_asked_for(disk: Disk) -> None:
    cache = disk.cache()
    await keep(cache, key_of("a"), b"a" * 1000, ttl=10)
    await keep(cache, key_of("b"), b"b" * 1000, ttl=10)
    disk.clock.advance(61)
    await keep(cache, key_of("c"), b"c" * 1000)
    assert [path.name for path in files(disk.folder)] == [key_of("c")]
    assert cache.bytes_held == held(disk.folder)
    disk.clock.advance(61)
    assert await disk.cache().get(key_of("a")) is None
    assert files(disk.folder) == []


async def test_expired_files_are_removed_while_nobody_comes(disk: Disk) -> None:
    """Nobody puts or gets anything: what is private must not stay because it is a quiet night."""
    cache = disk.cache()
    await keep(cache, "req_" + "a" * 24, b"a" * 1000, ttl=900)
    await keep(cache, "req_" + "b" * 24, b"b" * 1000, ttl=86_400)
    disk.clock.advance(901)
    cache.keep_swept(0.01)
    await eventually(lambda: len(files(disk.folder)) == 1)
    assert await content(await cache.get("req_" + "b" * 24)) == b"b" * 1000
    assert (len(cache), cache.bytes_held) == (1, held(disk.folder))
    disk.clock.advance(86_400)
    await eventually(lambda: not files(disk.folder))
    assert cache.bytes_held == 0
    await cache.aclose()

    another = disk.cache()
    await keep(cache, "req_" + "c" * 24, b"c" * 1000, ttl=900)
    disk.clock.advance(901)
    another.keep_swept(0.01)
    await eventually(lambda: not files(disk.folder))
    await another.aclose()
    await another.aclose()


async def test_what_has_expired_makes_room_before_what_has_not(disk: Disk) -> None:
    cache = disk.cache(max_bytes=35_000)
    await keep(cache, key_of("old"), b"o" * 10_000, ttl=86_400)
    await keep(cache, key_of("brief"), b"b" * 10_000, ttl=10)
    disk.clock.advance(11)
    await keep(cache, key_of("new"), b"n" * 10_000, ttl=900)
    # Less than a minute after the last sweep, and there is no room for one more.
    await keep(cache, key_of("newer"), b"m" * 10_000, ttl=900)
    there = {path.name for path in files(disk.folder)}
    assert there == {key_of("old"), key_of("new"), key_of("newer")}
    await keep(cache, key_of("newest"), b"l" * 10_000, ttl=900)
    assert key_of("old") not in {path.name for path in files(disk.folder)}
    assert cache.bytes_held == held(disk.folder) <= 35_000


async def test_what_a_crash_left_behind_is_removed_and_a_live_put_is_not(disk: Disk) -> None:
    crashing = textwrap.dedent(
        """
        import asyncio, os, sys
        from datetime import UTC, datetime
        from pathlib import Path
        from gateway.ports import CachedMeta
        from gateway.stores.blobs import DiskCache
        from tests.clock import StillClock

        async def chunks():
            yield b"x" * 2_000_000
            await asyncio.sleep(0)
            os.kill(os.getpid(), 9)
            yield b"y"

        meta = CachedMeta(datetime.now(UTC), 0, 0, "m", "u", 3_000_000)
        cache = DiskCache(Path(sys.argv[1]), StillClock(), max_bytes=10**9)
        asyncio.run(cache.put(sys.argv[2], meta, chunks(), 60))
        """
    )
    root = Path(__file__).parents[2]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", crashing, disk.folder, KEY, cwd=root
    )
    assert await process.wait() == -9
    (half,) = files(disk.folder)
    assert half.stat().st_size > MIB

    go, begun = asyncio.Event(), asyncio.Event()
    data = os.urandom(2 * MIB)

    async def slowly() -> AsyncIterator[bytes]:
        yield data[:MIB]
        begun.set()
        await go.wait()
        yield data[MIB:]

    writer = disk.cache()
    put = asyncio.create_task(writer.put(key_of("live"), meta_of(data), slowly(), 60))
    await begun.wait()
    assert half not in files(disk.folder)
    assert len(files(disk.folder)) == 1
    assert await disk.cache().get(KEY) is None
    assert len(files(disk.folder)) == 1
    go.set()
    await put
    assert await content(await writer.get(key_of("live"))) == data


async def test_a_file_cut_anywhere_is_a_miss_and_is_removed(disk: Disk) -> None:
    await keep(disk.cache(), KEY, b"0123456789")
    (file,) = files(disk.folder)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        # Found by a look-up, and, by another process, when it starts.
        cache = disk.cache()
        assert await cache.get(KEY) is None, length
        assert not file.exists()
        assert (cache.bytes_held, len(cache)) == (0, 0)
    warm = disk.cache()
    await keep(warm, KEY, b"0123456789")
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        assert await warm.get(KEY) is None, length
        assert not file.exists()
        assert warm.bytes_held == 0
        await keep(warm, KEY, b"0123456789")
    assert disk.errors == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole + b"x",
        lambda whole: b"xxxx" + whole[4:],
        lambda whole: whole[:4] + b"\xff\xff\xff\xff" + whole[8:],
        lambda whole: whole[:4] + b"\x00\x00\x00\x00" + whole[8:],
        lambda whole: whole[:8] + b"x" + whole[9:],
        lambda whole: whole.replace(KEY.encode(), key_of("other").encode()),
        lambda whole: whole.replace(b'"expires":', b'"expired":'),
        lambda whole: bytes(len(whole)),
    ],
)
async def test_a_damaged_file_is_a_miss_and_is_removed(disk: Disk, damage: object) -> None:
    assert callable(damage)
    await keep(disk.cache(), KEY, b"0123456789")
    (file,) = files(disk.folder)
    file.write_bytes(damage(file.read_bytes()))
    assert await disk.cache().get(KEY) is None
    assert files(disk.folder) == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "a",
        "../../etc/passwd",
        "ab/cd",
        "ab\\cd",
        "..",
        "ABCD",
        "ab.d",
        "ab\0d",
        "ab\nd",
        "a" * 300,
        "-abc",
        "abcd\n",
        "é" * 10,
        "%2e%2e",
    ],
)
async def test_a_key_cannot_be_a_path(disk: Disk, key: str) -> None:
    cache = disk.cache()
    for call in (cache.get(key), cache.delete(key), keep(cache, key, b"x")):
        with pytest.raises(ValueError, match="cache key"):
            await call
    assert not disk.folder.exists()


async def test_a_link_is_not_followed(disk: Disk, tmp_path: Path) -> None:
    cache = disk.cache()
    await keep(cache, KEY, b"0123456789")
    (file,) = files(disk.folder)
    elsewhere = tmp_path / "secret"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert await cache.get(KEY) is None
    assert elsewhere.exists()


async def test_a_full_disk_is_quiet_and_told(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = disk.cache()
    await keep(cache, key_of("before"), b"before")
    real = os.write

    def full(fd: int, data: memoryview) -> int:
        if len(data) > 10_000:
            real(fd, data[:10_000])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", full)
    await keep(cache, KEY, os.urandom(MIB))
    monkeypatch.undo()
    assert [error.errno for error in disk.errors] == [errno.ENOSPC]
    assert await cache.get(KEY) is None
    assert len(files(disk.folder)) == 1
    assert cache.bytes_held == held(disk.folder)
    assert await content(await cache.get(key_of("before"))) == b"before"


@pytest.mark.parametrize("call", ["open", "replace", "utime"])
async def test_a_disk_that_fails_is_a_miss(
    disk: Disk, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = disk.cache()
    await keep(cache, KEY, b"here")

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fails)
    await keep(cache, key_of("new"), b"new")
    missed = await cache.get(KEY)
    monkeypatch.undo()
    assert call == "replace" or missed is None
    assert disk.errors
    assert {error.errno for error in disk.errors} == {errno.EIO}
    assert await cache.get(key_of("new")) is None
    assert await content(await cache.get(KEY)) == b"here"
    assert cache.bytes_held == held(disk.folder)


async def test_a_folder_that_cannot_be_made_is_a_miss(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("a file is in the way")
    disk = Disk(tmp_path / "blobs")
    cache = disk.cache()
    await keep(cache, KEY, b"x")
    assert await cache.get(KEY) is None
    await cache.delete(KEY)
    assert disk.errors
    with pytest.raises(OSError):
        await cache.ping()
    (tmp_path / "blobs").unlink()
    await keep(cache, KEY, b"x")
    assert await content(await cache.get(KEY)) == b"x"


async def test_a_folder_emptied_by_hand_is_only_missed(disk: Disk) -> None:
    cache = disk.cache()
    await keep(cache, KEY, b"x")
    for file in files(disk.folder):
        file.unlink()
        file.parent.rmdir()
    assert await cache.get(KEY) is None
    assert cache.bytes_held == 0
    await keep(cache, KEY, b"y")
    assert await content(await cache.get(KEY)) == b"y"


async def test_two_processes_may_share_a_folder(disk: Disk) -> None:
    one, two = disk.cache(), disk.cache()
    assert await two.get(KEY) is None
    await keep(one, KEY, b"from one")
    assert await content(await two.get(KEY)) == b"from one"
    assert one.bytes_held == two.bytes_held == held(disk.folder)
    await two.delete(KEY)
    assert await one.get(KEY) is None
    assert one.bytes_held == two.bytes_held == 0


RESULT = "growth:req_0123456789abcdef01234567"


class Pair:
    """Results beside a cache: what both keep is one file."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.clock = StillClock()
        self.errors: list[OSError] = []
        self.cache = DiskCache(
            folder / "cache",
            self.clock,
            on_error=self.errors.append,
            **{"max_bytes": 64 * MIB, **options},
        )
        self.results = DiskCache(
            folder / "results",
            self.clock,
            max_bytes=64 * MIB,
            on_error=self.errors.append,
            beside=self.cache,
        )

    async def keep(self, data: bytes, brief: float = 900, long: float = 86_400) -> list[bool]:
        body = Parts([data[:7], data[7:]], CacheEntry(KEY, meta_of(data), long))
        named = CachedMeta(datetime(2026, 11, 22, tzinfo=UTC), 2, 1, "m", "u", len(data), team="t")
        return [
            await self.results.put(RESULT, named, body, brief),
            await self.cache.put(KEY, meta_of(data), body.again(), long),
        ]


async def test_what_two_folders_keep_is_one_file(tmp_path: Path) -> None:
    pair, data = Pair(tmp_path), os.urandom(2 * MIB)
    assert await pair.keep(data) == [True, True]
    result, cached = files(tmp_path / "results"), files(tmp_path / "cache")
    assert [one.stat().st_ino for one in result] == [one.stat().st_ino for one in cached]
    assert pair.cache.bytes_held == pair.results.bytes_held == held(tmp_path / "cache")
    for store in (pair, Pair(tmp_path)):
        kept, again = await store.results.get(RESULT), await store.cache.get(KEY)
        assert kept is not None
        assert again is not None
        assert (kept.meta.team, kept.meta.cost, again.meta) == ("t", 2, meta_of(data))
        assert await content(kept) == await content(again) == data
        assert await store.cache.get(RESULT) is None
    assert pair.errors == []


async def test_each_name_of_a_file_has_an_end_of_its_own(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    await pair.keep(b"0123456789", brief=10)
    pair.clock.advance(11)
    assert await pair.results.get(RESULT) is None
    assert files(tmp_path / "results") == []
    assert await content(await pair.cache.get(KEY)) == b"0123456789"
    await pair.keep(b"9876543210")
    await pair.cache.delete(KEY)
    assert await content(await pair.results.get(RESULT)) == b"9876543210"
    assert files(tmp_path / "cache") == []
    await pair.keep(b"newer than that")
    await pair.keep(b"the newest of all")
    assert await content(await pair.cache.get(KEY)) == b"the newest of all"
    assert len(files(tmp_path)) == 2
    assert pair.cache.bytes_held == held(tmp_path / "cache")


@pytest.mark.parametrize("options", [{"max_bytes": 1000}, {"max_entry_bytes": 1000}])
async def test_one_that_takes_no_such_answer_gets_no_name_of_it(
    tmp_path: Path, options: dict[str, int]
) -> None:
    pair = Pair(tmp_path, **options)
    assert await pair.keep(b"x" * 1001) == [True, False]
    assert len(files(tmp_path)) == 1
    assert (await pair.results.get(RESULT)) is not None


async def test_where_a_file_cannot_have_two_names_it_is_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", fails)
    pair = Pair(tmp_path)
    assert await pair.keep(b"0123456789") == [True, True]
    assert len({one.stat().st_ino for one in files(tmp_path)}) == 2
    assert await content(await pair.cache.get(KEY)) == b"0123456789"


async def test_a_file_that_finds_no_place_has_no_name_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    pair = Pair(tmp_path)
    assert await pair.keep(b"0123456789") == [False, False]
    assert files(tmp_path) == []
    assert pair.cache.bytes_held == pair.results.bytes_held == 0
    assert {error.errno for error in pair.errors} == {errno.ENOSPC}


async def test_who_is_alone_does_not_look_for_what_it_does_not_know(disk: Disk) -> None:
    await keep(disk.cache(), KEY, b"from before")
    alone = DiskCache(disk.folder, disk.clock, max_bytes=MIB, alone=True)
    assert await content(await alone.get(KEY)) == b"from before"
    assert await alone.get(key_of("other")) is None
    await keep(disk.cache(), key_of("other"), b"from another")
    assert await alone.get(key_of("other")) is None
    await keep(alone, key_of("other"), b"its own")
    assert await content(await alone.get(key_of("other"))) == b"its own"
