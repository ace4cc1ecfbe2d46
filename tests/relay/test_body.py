"""A spool gives back what was put in, to everyone, and in the end gives everything back."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.domain.call import Edit, Span
from gateway.domain.errors import Overloaded
from gateway.ports import Growing, Lent, LentFile, Parts
from gateway.relay import body
from gateway.relay.body import KEEP_ALIVE, Room, Spool, edited, edited_length, spliced
from gateway.relay.scratch import Scratch

TEXT = bytes(range(97, 123)) * 4

MEMORY, FILE = 10_000, 0
"""Limits of a spool: one that keeps its bytes in memory, and one that writes them to a file."""


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    """A room in which nothing is left when a test ends."""
    made = Room(10_000, 10_000, tmp_path)
    yield made
    assert (made.memory_used, made.disk_used) == (0, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=[MEMORY, FILE], ids=["memory", "file"])
def limit(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


async def full(room: Room, limit: int, *chunks: bytes) -> Spool:
    spool = Spool(room, limit)
    for chunk in chunks:
        await spool.write(chunk)
    return spool


async def all_of(chunks: Parts | Growing | AsyncGenerator[bytes | Lent, None]) -> bytes:
    whole = b""
    async with aclosing(chunks):
        async for chunk in chunks:
            if isinstance(chunk, LentFile):
                with pytest.raises(ValueError, match="fetched"):
                    bytes(chunk)
                await chunk.fetch()
            whole += bytes(chunk)
    return whole


def used(room: Room) -> tuple[int, int]:
    return room.memory_used, room.disk_used


# Where the bytes are


async def test_what_is_written_is_read(room: Room, limit: int) -> None:
    spool = await full(room, limit, b"one", b"", b"two", b"three")
    assert spool.length == 11
    assert spool.spilled is (limit == FILE)
    assert used(room) == ((0, 11) if limit == FILE else (11, 0))
    assert await all_of(spool.slice()) == b"onetwothree"
    spool.close()


@pytest.mark.parametrize("start", [0, 2, 3, 5, 11])
@pytest.mark.parametrize("end", [0, 2, 3, 4, 6, 11, None])
async def test_any_slice_is_a_slice(room: Room, limit: int, start: int, end: int | None) -> None:
    spool = await full(room, limit, b"one", b"two", b"three")
    assert await all_of(spool.slice(start, end)) == b"onetwothree"[start:end]
    spool.close()


async def test_a_whole_chunk_is_passed_on_and_not_copied(room: Room) -> None:
    chunk = b"a picture" * 100
    spool = await full(room, MEMORY, b"x", chunk)
    async with aclosing(spool.slice(1)) as chunks:
        assert await anext(chunks) is chunk
    spool.close()


@pytest.mark.parametrize(("size", "spilled"), [(7, False), (8, False), (9, True)])
async def test_over_its_limit_a_spool_moves_to_a_file(room: Room, size: int, spilled: bool) -> None:
    spool = await full(room, 8, b"1234", TEXT[: size - 4])
    assert spool.spilled is spilled
    assert used(room) == ((0, size) if spilled else (size, 0))
    assert await all_of(spool.slice()) == b"1234" + TEXT[: size - 4]
    spool.close()


async def test_when_the_process_is_full_a_spool_moves_to_a_file(tmp_path: Path) -> None:
    room = Room(10, 100, tmp_path)
    first, second = await full(room, 10, b"12345678"), await full(room, 10, b"1")
    await second.write(b"23")
    assert (first.spilled, second.spilled, used(room)) == (False, True, (8, 3))
    first.close()
    await second.write(b"4")
    assert used(room) == (0, 4)
    assert await all_of(second.slice()) == b"1234"
    second.close()
    assert used(room) == (0, 0)


async def test_without_a_limit_of_its_own_a_spool_has_the_rooms(tmp_path: Path) -> None:
    spool = Spool(Room(5, 100, tmp_path))
    await spool.write(b"12345")
    spilled = [spool.spilled]
    await spool.write(b"6")
    assert [*spilled, spool.spilled] == [False, True]
    spool.close()


async def test_a_spool_file_has_no_name(tmp_path: Path, room: Room) -> None:
    spool = await full(room, FILE, TEXT)
    assert list(tmp_path.iterdir()) == []
    spool.close()


# No room


@pytest.mark.parametrize(
    ("disk", "chunks"),
    [
        (0, [b"12345"]),
        (7, [b"12345678"]),
        (7, [b"1234", b"5678"]),
        (3, [b"1234", b"5678"]),
    ],
)
async def test_neither_memory_nor_disk(tmp_path: Path, disk: int, chunks: list[bytes]) -> None:
    room = Room(4, disk, tmp_path)
    *before, last = chunks
    spool = await full(room, 4, *before)
    with pytest.raises(Overloaded, match="Nothing was bought; try again in") as refused:
        await spool.write(last)
    assert refused.value.retry_after_seconds == 5
    assert await all_of(spool.slice()) == b"".join(before)
    spool.close()
    assert used(room) == (0, 0)


async def test_another_try_after_no_room_is_accounted_for_once(tmp_path: Path) -> None:
    room = Room(4, 6, tmp_path)
    spool = await full(room, 4, b"1234")
    for _ in range(3):
        with pytest.raises(Overloaded):
            await spool.write(b"5678")
    await spool.write(b"56")
    assert used(room) == (0, 6)
    spool.close()
    assert used(room) == (0, 0)


async def test_a_broken_disk_is_accounted_for_once(tmp_path: Path) -> None:
    room = Room(4, 100, tmp_path / "gone")
    spool = await full(room, 4, b"1234")
    for _ in range(3):
        with pytest.raises(Overloaded):
            await spool.write(b"5")
    room.folder = tmp_path
    await spool.write(b"5")
    assert await all_of(spool.slice()) == b"12345"
    spool.close()
    assert used(room) == (0, 0)


async def test_reading_what_is_not_there_is_an_error(room: Room, limit: int) -> None:
    spool = await full(room, limit, b"12345678")
    with pytest.raises(OSError, match="shorter"):
        await all_of(spool.slice(4, 20))
    spool.publish()
    spool.publish(2)
    assert spool.published == 8, "what was seen cannot be taken back"
    spool.close()


async def test_reading_what_was_forgotten_is_an_error(room: Room, limit: int) -> None:
    spool = await full(room, limit, b"12345678")
    spool.publish(4)
    spool.forget_unpublished()
    assert await all_of(spool.slice(0, 4)) == b"1234"
    with pytest.raises(OSError, match="shorter"):
        await all_of(spool.slice(0, 8))
    spool.close()


# Holders


async def test_bytes_stay_until_the_last_holder_closes(room: Room, limit: int) -> None:
    spool = await full(room, limit, TEXT)
    spool.share()
    spool.share()
    spool.close()
    spool.close()
    assert await all_of(spool.slice()) == TEXT
    assert sum(used(room)) == len(TEXT)
    spool.close()
    assert used(room) == (0, 0)


@pytest.mark.parametrize("how", ["slice", "follow"])
async def test_a_reader_is_a_holder(room: Room, limit: int, how: str) -> None:
    spool = await full(room, limit, b"one", b"two")
    spool.publish()
    spool.finish()
    chunks = spool.slice() if how == "slice" else spool.follow()
    read = await anext(chunks)
    spool.close()
    assert sum(used(room)) == 6
    assert read + await all_of(chunks) == b"onetwo"


@pytest.mark.parametrize(
    "reader",
    [
        lambda spool: spool.slice(),
        lambda spool: spool.follow(),
        lambda spool: spliced(spool, [Span(0, 9), b"!"]),
    ],
    ids=["slice", "follow", "spliced"],
)
async def test_a_reader_that_leaves_gives_back_at_once(
    room: Room, limit: int, reader: Callable[[Spool], Growing | AsyncGenerator[bytes, None]]
) -> None:
    spool = await full(room, limit, b"one", b"two", b"three")
    spool.publish()
    chunks = reader(spool)
    await anext(chunks)
    spool.close()
    assert sum(used(room)) == 11
    await chunks.aclose()
    assert used(room) == (0, 0)


async def test_a_reader_that_never_began_holds_nothing(room: Room, limit: int) -> None:
    spool = await full(room, limit, b"one")
    await spool.slice().aclose()
    await spool.follow().aclose()
    spool.close()


# Followers


async def test_followers_see_what_is_published_and_no_more(room: Room, limit: int) -> None:
    spool = await full(room, limit, b"head")
    seen: list[bytes] = []

    async def follow() -> None:
        async for chunk in spool.follow():
            seen.append(chunk)

    following = asyncio.create_task(follow())
    await _settled(lambda: not seen)
    spool.publish(2)
    await _settled(lambda: b"".join(seen) == b"he")
    await spool.write(b"tail")
    await _settled(lambda: b"".join(seen) == b"he")
    spool.publish()
    await _settled(lambda: b"".join(seen) == b"headtail")
    assert not following.done()
    await spool.write(b"never seen")
    spool.finish()
    await following
    assert b"".join(seen) == b"headtail"
    spool.close()


async def _settled(true: Callable[[], bool]) -> None:
    """Gives every task and thread its turn until ``true`` holds, and then some more."""
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    assert true()


async def test_a_finished_spool_can_be_followed_from_its_first_byte(room: Room, limit: int) -> None:
    spool = await full(room, limit, b"one", b"two")
    spool.publish(4)
    spool.finish()
    assert await all_of(spool.follow()) == b"onet"
    assert await all_of(spool.follow()) == b"onet"
    spool.close()


async def test_a_silence_is_filled_between_what_is_published(room: Room, limit: int) -> None:
    spool = await full(room, limit, b"one\n\n", b"tw")
    chunks = spool.follow(0.001)
    assert [await anext(chunks) for _ in range(2)] == [KEEP_ALIVE] * 2
    spool.publish(5)
    seen = b""
    while len(seen) < 5:
        seen += await anext(chunks)
    assert seen == b"one\n\n"
    assert await anext(chunks) == KEEP_ALIVE
    await spool.write(b"o\n\n")
    spool.publish()
    spool.finish()
    rest = await all_of(chunks)
    assert rest.replace(KEEP_ALIVE, b"") == b"two\n\n"
    assert rest.endswith(b"two\n\n")
    assert await all_of(spool.follow(0.001)) == b"one\n\ntwo\n\n"
    spool.close()


async def test_the_slowest_follower_is_known(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "GROUP_BYTES", 1000)
    spool = await full(room, MEMORY, *[b"x" * 1000] * 4)
    assert spool.lag == 0
    spool.publish(2000)
    slow, quick = spool.follow(), spool.follow()
    assert spool.lag == 0
    await anext(slow)
    await anext(quick)
    # What is in hand is not taken yet.
    assert spool.lag == 2000
    await anext(quick)
    assert spool.lag == 2000
    waiting = asyncio.create_task(spool.caught_up(1500))
    await _settled(lambda: not waiting.done())
    await anext(slow)
    await _settled(waiting.done)
    assert spool.lag == 1000
    spool.publish()
    waiting = asyncio.create_task(spool.caught_up(0))
    await quick.aclose()
    await _settled(lambda: not waiting.done())
    await slow.aclose()
    await waiting
    assert spool.lag == 0
    spool.close()


async def test_what_nobody_has_seen_can_be_written_over(room: Room, limit: int) -> None:
    spool = await full(room, limit, b"one", b"two", b"three")
    spool.publish(2)
    await spool.mend(Edit(Span(2, 7), b"E-TWO"))
    assert await all_of(spool.slice()) == b"onE-TWOhree"
    await spool.mend(Edit(Span(11, 11), b""))
    await spool.mend(Edit(Span(10, 11), b"!"))
    assert await all_of(spool.slice()) == b"onE-TWOhre!"
    for wrong in (Edit(Span(1, 3), b"xx"), Edit(Span(10, 12), b"xx"), Edit(Span(4, 5), b"xx")):
        with pytest.raises(ValueError):
            await spool.mend(wrong)
    assert await all_of(spool.slice()) == b"onE-TWOhre!"
    spool.close()


async def test_an_empty_answer_ends(room: Room) -> None:
    spool = Spool(room)
    spool.finish()
    assert await all_of(spool.follow()) == b""
    spool.close()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 40)),
        st.tuples(st.just("publish"), st.integers(0, 100)),
        st.tuples(st.just("read"), st.integers(0, 3)),
    ),
    max_size=30,
)


@pytest.mark.parametrize("memory", [100_000, 60, 0])
@settings(max_examples=40, deadline=None)
@given(steps=steps)
def test_readers_at_different_paces_read_the_same(
    memory: int, steps: list[tuple[str, int]]
) -> None:
    async def story(folder: Path) -> None:
        room = Room(100_000, 100_000, folder)
        spool = Spool(room, memory)
        readers = [spool.follow() for _ in range(4)]
        read = [b""] * 4
        source = b""
        for what, number in steps:
            if what == "write":
                chunk = os.urandom(number)
                source += chunk
                await spool.write(chunk)
            elif what == "publish":
                spool.publish(spool.length * number // 100)
            elif len(read[number]) < spool.published:
                read[number] += await anext(readers[number])
                assert source.startswith(read[number])
                assert len(read[number]) <= spool.published
        spool.finish()
        seen = source[: spool.published]
        for reader, begun in zip(readers[:3], read, strict=False):
            assert begun + await all_of(reader) == seen
        await readers[3].aclose()
        assert await all_of(spool.slice()) == source
        spool.close()
        assert used(room) == (0, 0)

    with TemporaryDirectory() as folder:
        asyncio.run(story(Path(folder)))


# Forgetting


@pytest.mark.parametrize("published", [0, 1, 3, 4, 6, 10, 11])
async def test_what_was_not_published_is_forgotten(room: Room, limit: int, published: int) -> None:
    spool = await full(room, limit, b"one", b"two", b"three")
    spool.publish(published)
    spool.forget_unpublished()
    assert spool.length == spool.published == published
    if limit == MEMORY:
        assert used(room) == (published, 0)
    await spool.write(b"an error")
    spool.publish()
    spool.finish()
    assert await all_of(spool.follow()) == b"onetwothree"[:published] + b"an error"
    spool.close()


@settings(max_examples=60, deadline=None)
@given(
    before=st.lists(st.binary(max_size=30), max_size=6),
    after=st.lists(st.binary(max_size=30), max_size=4),
    percent=st.integers(0, 100),
    memory=st.sampled_from([0, 20, 1000]),
)
def test_forgetting_anywhere(
    before: list[bytes], after: list[bytes], percent: int, memory: int
) -> None:
    async def story(folder: Path) -> None:
        room = Room(1000, 1000, folder)
        spool = await full(room, memory, *before)
        source = b"".join(before)
        mark = len(source) * percent // 100
        spool.publish(mark)
        spool.forget_unpublished()
        for chunk in after:
            await spool.write(chunk)
        assert await all_of(spool.slice()) == source[:mark] + b"".join(after)
        spool.close()
        assert used(room) == (0, 0)

    with TemporaryDirectory() as folder:
        asyncio.run(story(Path(folder)))


# Edits and splices


spans = st.lists(st.integers(0, len(TEXT)), max_size=8).map(
    lambda marks: [Span(*pair) for pair in zip(*[iter(sorted(marks))] * 2, strict=False)]
)


def plainly(source: bytes, edits: Sequence[Edit]) -> bytes:
    for edit in sorted(edits, key=lambda edit: edit.span.start, reverse=True):
        source = source[: edit.span.start] + edit.content + source[edit.span.end :]
    return source


@settings(max_examples=60, deadline=None)
@given(
    spans=spans,
    contents=st.lists(st.binary(max_size=9), min_size=4, max_size=4),
    size=st.integers(1, 60),
    memory=st.sampled_from([0, 1000]),
    backwards=st.booleans(),
)
def test_edits_are_as_by_slicing(
    spans: list[Span], contents: list[bytes], size: int, memory: int, backwards: bool
) -> None:
    distinct = {span.start: span for span in spans}.values()
    edits = [Edit(span, content) for span, content in zip(distinct, contents, strict=False)]
    wanted = plainly(TEXT, edits)
    assert edited_length(len(TEXT), edits) == len(wanted)

    async def story(folder: Path) -> None:
        chunks = [TEXT[at : at + size] for at in range(0, len(TEXT), size)]
        spool = await full(Room(1000, 1000, folder), memory, *chunks)
        for _ in range(2):
            given = edits[::-1] if backwards else edits
            assert await all_of(edited(spool, given)) == wanted
        spool.close()

    with TemporaryDirectory() as folder:
        asyncio.run(story(Path(folder)))


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.one_of(st.binary(max_size=9), spans.map(lambda some: some[:1])), max_size=6),
    memory=st.sampled_from([0, 1000]),
)
def test_splices_are_as_by_slicing(pieces: list[bytes | list[Span]], memory: int) -> None:
    flat = [one for piece in pieces for one in ([piece] if isinstance(piece, bytes) else piece)]
    wanted = b"".join(TEXT[one.start : one.end] if isinstance(one, Span) else one for one in flat)

    async def story(folder: Path) -> None:
        spool = await full(Room(1000, 1000, folder), memory, TEXT[:17], TEXT[17:])
        assert await all_of(spliced(spool, flat)) == wanted
        spool.close()

    with TemporaryDirectory() as folder:
        asyncio.run(story(Path(folder)))


async def test_a_file_is_read_in_pieces(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "READ_BYTES", 10)
    spool = await full(room, FILE, TEXT)
    sizes = [len(chunk) async for chunk in spool.slice(1)]
    assert sizes == [10] * 10 + [3]
    spool.close()


# Cancellation


class Slow:
    """Stands for the writing of a file: stops in its thread until it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.descriptors_open: list[bool] = []

    def write(self, file: Scratch, chunks: Sequence[bytes], offset: int) -> None:
        self.begun.set()
        assert self.go_on.wait(5)
        try:
            os.fstat(file.fd)
        except (OSError, ValueError):
            self.descriptors_open.append(False)
        else:
            self.descriptors_open.append(True)
            os.pwrite(file.fd, b"".join(chunks), offset)


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("spilled_before", [False, True])
async def test_no_thread_is_left_behind_on_a_closed_file(
    room: Room, monkeypatch: pytest.MonkeyPatch, times: int, spilled_before: bool
) -> None:
    spool = await full(room, FILE, b"before") if spilled_before else Spool(room, FILE)
    slow = Slow()
    monkeypatch.setattr(Scratch, "write", lambda *given: slow.write(*given))

    async def write_and_close() -> None:
        try:
            await spool.write(b"after")
        finally:
            spool.close()

    writing = asyncio.create_task(write_and_close())
    await asyncio.to_thread(slow.begun.wait, 5)
    for _ in range(times):
        writing.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not writing.done(), "the file would be closed under the thread's hands"
    slow.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert slow.descriptors_open == [True]


async def test_a_write_that_fails_while_it_is_cancelled_is_no_news(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    heard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))

    def fail(*_: object) -> None:
        begun.set()
        go_on.wait(5)
        raise OSError("the disk is gone")

    monkeypatch.setattr(Scratch, "write", fail)
    spool = Spool(room, FILE)
    writing = asyncio.create_task(spool.write(b"x"))
    await asyncio.to_thread(begun.wait, 5)
    writing.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    spool.close()
    assert heard == []


@pytest.mark.parametrize(("announced", "spilled"), [(None, False), (10, False), (11, True)])
async def test_what_will_not_stay_in_memory_is_not_copied_there(
    room: Room, announced: int | None, spilled: bool
) -> None:
    spool = Spool(room, 10, for_request=True, announced=announced)
    await spool.write(b"a")  # came with the head: it is there as it is
    assert used(room) == (1, 0)
    await spool.write(Lent(bytearray(b"bcd"), 3))
    assert spool.spilled is spilled
    assert used(room) == ((0, 4) if spilled else (4, 0))
    assert await all_of(spool.slice()) == b"abcd"
    spool.close()


async def test_requests_leave_half_of_the_disk_to_answers(tmp_path: Path) -> None:
    room = Room(0, 1000, tmp_path)
    request, answer = Spool(room, 0, for_request=True), Spool(room)
    await request.write(b"r" * 400)
    with pytest.raises(Overloaded):
        await request.write(b"r" * 200)
    await answer.write(b"a" * 600)
    request.close()
    answer.close()
    assert room.disk_used == 0


async def test_crumbs_do_not_take_more_room_than_is_counted(room: Room) -> None:
    spool = Spool(room)
    for number in range(2000):
        await spool.write(bytes([number % 251]))
    chunks = [chunk async for chunk in spool.slice()]
    assert b"".join(chunks) == bytes(number % 251 for number in range(2000))
    assert len(chunks) < 10
    spool.close()
