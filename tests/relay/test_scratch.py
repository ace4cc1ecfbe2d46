"""Files that are written over: which are kept, for how long, and that nobody sees another's."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from gateway.domain.errors import Overloaded
from gateway.ports import Lent, LentFile
from gateway.relay import scratch
from gateway.relay.body import Room, Spool
from gateway.relay.scratch import KEPT_FILES, KEPT_FROM_BYTES, Scratch
from tests.upstream.calls import until

MB = 1024 * 1024


@pytest.fixture
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    made = Room(MB, 100 * MB, tmp_path)
    yield made
    made.close()
    assert made.disk_used == 0


async def upload(room: Room, content: bytes) -> tuple[Spool, int]:
    """It, written, and the number of its file."""
    spool = Spool(room, 0, for_request=True)
    await spool.write(content)
    assert spool._file is not None
    return spool, os.fstat(spool._file.fd).st_ino


async def read(spool: Spool) -> bytes:
    whole = b""
    async with aclosing(spool.lent_slice(0, spool.length)) as pieces:
        async for piece in pieces:
            assert isinstance(piece, LentFile)
            assert not piece.is_at_hand(), "the system would send pages that are written over"
            await piece.fetch()
            whole += bytes(piece)
    return whole


def open_files(room: Room) -> int:
    names = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.path.exists(one) and str(room.folder) in os.readlink(one) for one in names)


async def test_the_next_upload_writes_over_the_last_one(room: Room) -> None:
    first, one = await upload(room, b"a" * 3 * MB)
    assert room.disk_used == 3 * MB
    first.close()
    assert room.disk_used == 0
    second, other = await upload(room, b"b" * 2 * MB)
    assert one == other
    # What it does not use takes room all the same.
    assert room.disk_used == 3 * MB
    assert await read(second) == b"b" * 2 * MB
    await second.write(b"c" * 2 * MB)
    assert room.disk_used == 4 * MB
    assert await read(second) == b"b" * 2 * MB + b"c" * 2 * MB
    second.close()


async def test_nothing_behind_what_was_written_is_read(room: Room) -> None:
    first, _ = await upload(room, b"secret" * MB)
    first.close()
    second, _ = await upload(room, b"short")
    assert await read(second) == b"short"
    assert b"".join([piece async for piece in second.slice(0, 5)]) == b"short"
    beyond = second.slice(0, 6)
    assert await anext(beyond) == b"short"
    with pytest.raises(OSError, match="shorter"):
        await anext(beyond)
    with pytest.raises(OSError, match="shorter"):
        await anext(second.lent_slice(0, 6))
    second.close()


async def test_two_at_once_have_two_files(room: Room) -> None:
    first, one = await upload(room, b"a" * 2 * MB)
    second, other = await upload(room, b"b" * 2 * MB)
    assert one != other
    assert await read(first) == b"a" * 2 * MB
    assert await read(second) == b"b" * 2 * MB
    first.close()
    second.close()


async def test_two_who_read_at_once_have_a_buffer_each(room: Room) -> None:
    spool, _ = await upload(room, bytes(range(256)) * 4096)
    assert len(await read(spool)) == MB  # a buffer is there
    one, other = spool.lent_slice(0, MB), spool.lent_slice(300, MB)
    async with aclosing(one), aclosing(other):
        pieces: list[Lent] = []
        for content in (one, other):
            piece = await anext(content)
            assert isinstance(piece, LentFile)
            await piece.fetch()
            pieces.append(piece)
        assert bytes(pieces[0])[:2] == b"\x00\x01"
        assert bytes(pieces[1])[:2] == b"\x2c\x2d"
    spool.close()


async def test_a_file_is_kept_as_long_as_somebody_holds_it(room: Room) -> None:
    spool, one = await upload(room, b"a" * 2 * MB)
    spool.share()
    spool.close()
    other, inode = await upload(room, b"b" * 2 * MB)
    assert inode != one
    assert await read(spool) == b"a" * 2 * MB
    spool.close()
    other.close()


@pytest.mark.parametrize("size", [KEPT_FROM_BYTES - 1, KEPT_FROM_BYTES, 8 * MB, 8 * MB + 1])
async def test_neither_small_nor_huge_ones_are_kept(
    room: Room, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(scratch, "KEPT_FILE_BYTES", 8 * MB)
    spool, _ = await upload(room, b"a" * size)
    spool.close()
    assert open_files(room) == (KEPT_FROM_BYTES <= size <= 8 * MB)


async def test_only_a_few_are_kept(room: Room) -> None:
    spools = [(await upload(room, b"a" * MB))[0] for _ in range(KEPT_FILES + 2)]
    for spool in spools:
        spool.close()
    assert open_files(room) == KEPT_FILES
    room.close()
    assert open_files(room) == 0


async def test_answers_have_files_of_their_own(room: Room) -> None:
    """They are paid for, and followed: their pieces may be anywhere."""
    first, one = await upload(room, b"a" * 2 * MB)
    first.close()
    answer = Spool(room, 0)
    await answer.write(b"b" * 2 * MB)
    assert answer._file is not None
    assert os.fstat(answer._file.fd).st_ino != one
    answer.close()


async def test_a_kept_file_waits_for_seconds(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "KEPT_SECONDS", 0.05)
    spool, _ = await upload(room, b"a" * 2 * MB)
    spool.close()
    assert open_files(room) == 1
    await until(lambda: open_files(room) == 0)


async def test_an_old_file_is_not_kept(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system would begin to write it to the disk."""
    monkeypatch.setattr(scratch, "LAST_SECONDS", 0.0)
    spool, _ = await upload(room, b"a" * 2 * MB)
    spool.close()
    assert open_files(room) == 0


async def test_what_could_not_be_written_is_not_kept(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, _ = await upload(room, b"a" * 2 * MB)

    def full(*_: object) -> int:
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", full)
        with pytest.raises(Overloaded):
            await spool.write(b"b")
    spool.close()
    assert open_files(room) == 0


async def test_kept_files_make_room_for_who_needs_it(tmp_path: Path) -> None:
    room = Room(0, 12 * MB, tmp_path)
    first, _ = await upload(room, b"a" * 2 * MB)
    first.close()
    assert open_files(room) == 1
    answer = Spool(room)
    await answer.write(b"b" * 8 * MB)
    assert open_files(room) == 2
    await answer.write(b"c" * 3 * MB)
    assert open_files(room) == 1, "11 of 12 MB: the kept one had to go"
    answer.close()
    assert room.disk_used == 0


async def test_a_room_that_is_short_keeps_nothing(tmp_path: Path) -> None:
    """What is kept takes as much of the disk as it has, so it is for when there is plenty."""
    room = Room(0, 12 * MB, tmp_path)
    answer = Spool(room)
    await answer.write(b"a" * 4 * MB)
    spool, _ = await upload(room, b"b" * MB)
    spool.close()
    assert open_files(room) == 1
    answer.close()
    spool, one = await upload(room, b"b" * 2 * MB)
    spool.close()
    answer = Spool(room)
    await answer.write(b"a" * 2 * MB)
    spool, other = await upload(room, b"b")
    assert one != other, "2 of 3 MB are used"
    spool.close()
    answer.close()
    room.close()


def test_without_a_loop_nothing_is_kept(tmp_path: Path) -> None:
    kept = scratch.Scratches(tmp_path)
    one = Scratch(tmp_path)
    one.write((b"a" * 2 * MB,), 0)
    kept.give_back(one, keep=True)
    assert kept.size_bytes == 0
