"""Bytes on their way: kept in memory while the process has room, then in a file.

One kind of keeper serves both directions. A request's body is written whole, then read for the
upstream (perhaps twice, with edits). An answer is written as it arrives and *published* as far as
it may be seen: a JSON answer all at once when it is verified and settled, a stream event by event.
"""

from __future__ import annotations

import asyncio
import os
from bisect import bisect_left, bisect_right
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from gateway.domain.call import Edit, Span
from gateway.domain.errors import Overloaded
from gateway.ports import Growing, Lent, LentFile, Parts
from gateway.relay.buffers import Buffers
from gateway.relay.moment import Moment
from gateway.relay.scratch import KEPT_FILE_BYTES, Scratch, Scratches

LENT_BYTES = 512 * 1024
"""Read from a request's file at a time, into one buffer."""
PROBE_BYTES = 256 * 1024
"""Of a request's file one byte in so many is looked at, to know whether it is in memory: the system
writes and forgets pages by the run."""
READ_BYTES = 60 * 1024
"""Read from a file at a time: below the 64 KB from which `gateway serve` has malloc map new pages,
so that none has to be faulted in."""
GROUP_BYTES = 128 * 1024
"""Handed to a follower at once: nobody knows how much of that it has taken yet. A client that reads
slowly has one in the server's hands and one in the follower's, counted nowhere once the rest is on
disk: 0.4 MB each, 1.1 with groups of 512 KB."""
TINY_BYTES = 512
ONE_PIECE = 32 * 1024
"""A request's body up to this is copied into one piece to be sent: that takes less than sending
the pieces."""
_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)  # Linux's
KEEP_ALIVE = b": keepalive\n\n"
"""A comment, which both SDKs pass over (contract 4.7)."""


class Room:
    """The bytes that all spools of a process may hold: in memory, and beyond that on disk.

    Requests may have half of the disk: an answer that was paid for always finds room.
    """

    def __init__(self, memory_bytes: int, disk_bytes: int, folder: Path) -> None:
        self.memory_bytes = memory_bytes
        self.disk_bytes = disk_bytes
        self.folder = folder
        self.memory_used = 0
        self.disk_used = 0
        self.buffers = Buffers(LENT_BYTES)
        """For who reads a file: no file keeps one while its picture is painted."""
        self._scratches = Scratches(folder)

    def refuse_if_full(self) -> None:
        """Raises ``Overloaded`` where half of the disk is used: the other half is for the answers
        to calls that are bought already."""
        if self.disk_used > self.disk_bytes // 2:
            raise _no_room()

    @property
    def is_tight(self) -> bool:
        """Whether half of the disk is used: what can be given up should be."""
        return self.disk_used > self.disk_bytes // 2

    def take_memory(self, count: int) -> bool:
        if self.memory_used + count > self.memory_bytes:
            return False
        self.memory_used += count
        return True

    def take_disk(self, count: int, most: int) -> None:
        """Raises ``Overloaded`` when more than ``most`` bytes of the spool folder would be used."""
        if self._scratches.size_bytes + self.disk_used + count > most:
            self._scratches.close()
        if self.disk_used + count > most:
            raise _no_room()
        self.disk_used += count

    def open_file(self) -> Scratch:
        """One that may have been used, while there is plenty of room. Raises ``OSError``."""
        return self._scratches.take(self.disk_bytes // 4 - self.disk_used)

    def close_file(self, file: Scratch) -> None:
        self._scratches.give_back(file, keep=self.disk_used <= self.disk_bytes // 4)

    def close(self) -> None:
        """Lets go of files and buffers that wait for who uses them next. May be repeated."""
        self._scratches.close()
        self.buffers.close()

    def give_back(self, memory: int, disk: int) -> None:
        self.memory_used -= memory
        self.disk_used -= disk


class Spool:
    """Append-only bytes with one writer and any number of readers.

    ``memory_limit`` is what this spool alone may hold in memory; over it, or when the room of the
    process is used up, everything moves to a nameless file, so that a killed process leaves none.
    """

    __slots__ = (
        "_announced", "_chunks", "_file", "_finished", "_followers", "_for_request", "_holders",
        "_in_memory", "_limit", "_moves", "_news", "_on_disk", "_published", "_room", "_starts",
        "_written",
    )  # fmt: skip

    def __init__(
        self,
        room: Room,
        memory_limit: int | None = None,
        *,
        for_request: bool = False,
        announced: int | None = None,
    ) -> None:
        """``announced``: how much will come, where that is said. What will not stay in memory is
        not copied there first."""
        self._room = room
        self._announced = announced or 0
        self._limit = room.memory_bytes if memory_limit is None else memory_limit
        self._for_request = for_request
        self._chunks: list[bytes] = []
        self._starts: list[int] = []
        self._file: Scratch | None = None
        self._written = 0
        self._published = 0
        self._in_memory = 0
        self._on_disk = 0
        self._holders = 1
        self._finished = False
        # Each is made by who waits for it: most spools have nobody who follows them.
        self._news: Moment | None = None
        self._followers: tuple[_Follower, ...] = ()
        self._moves: Moment | None = None

    @property
    def length(self) -> int:
        """Bytes written so far."""
        return self._written

    @property
    def published(self) -> int:
        """Bytes that followers may see."""
        return self._published

    @property
    def lag(self) -> int:
        """How many published bytes the slowest follower has not taken; 0 where nobody follows."""
        if not self._followers:
            return 0
        return self._published - min([one.taken for one in self._followers])

    @property
    def spilled(self) -> bool:
        return self._file is not None

    async def write(self, chunk: bytes | Lent) -> None:
        """Keeps ``chunk``. Raises ``Overloaded`` when neither memory nor disk has room."""
        if isinstance(chunk, bytes):
            if self.take(chunk):
                return
        elif (
            self._file is None
            and max(self._written + chunk.size, self._announced) <= self._limit
            and self.take(bytes(chunk))
        ):
            return
        try:
            await self._write_to_file(chunk)
        except OSError as error:
            raise _no_room() from error
        self._written += len(chunk)

    def take(self, chunk: bytes) -> bool:
        """Keeps ``chunk`` where that needs no waiting, because there is room for it in memory;
        whether it did. Else it is to be written."""
        size = len(chunk)
        if size == 0:
            return True
        fits = self._file is None and self._written + size <= self._limit
        if not (fits and self._room.take_memory(size)):
            return False
        self._in_memory += size
        if size < TINY_BYTES and self._chunks and len(self._chunks[-1]) < TINY_BYTES:
            # A chunk costs 48 bytes by itself: crumbs would take more room than is counted.
            self._chunks[-1] += chunk
        else:
            self._starts.append(self._written)
            self._chunks.append(chunk)
        self._written += size
        return True

    async def _write_to_file(self, chunk: bytes | Lent) -> None:
        room, file = self._room, self._file
        content = chunk.view if isinstance(chunk, Lent) else chunk
        if file is not None:
            self._count_on_disk(self._written + len(chunk))
            await _in_thread(file.write, (content,), self._written)
            return
        self._count_on_disk(self._written + len(chunk))
        file = room.open_file() if self._for_request else Scratch(room.folder)
        try:
            # What it has of others is counted as well: it takes as much of the disk.
            self._count_on_disk(file.size)
            await _in_thread(file.write, (*self._chunks, content), 0)
        except BaseException:
            file.close()
            raise
        self._file = file
        self._chunks, self._starts = [], []
        room.give_back(self._in_memory, 0)
        self._in_memory = 0

    def _count_on_disk(self, size: int) -> None:
        """What an earlier try took is still held: only the rest is taken. Raises ``Overloaded``."""
        room = self._room
        if size > self._on_disk:
            most = room.disk_bytes // 2 if self._for_request else room.disk_bytes
            room.take_disk(size - self._on_disk, most)
            self._on_disk = size

    async def mend(self, edit: Edit) -> None:
        """Writes over bytes that nobody could see yet, by as many others.

        Raises ``ValueError`` for any other bytes, ``Overloaded`` when the disk does not take them.
        """
        start, end = edit.span
        if not self._published <= start <= end <= self._written or end - start != len(edit.content):
            raise ValueError("only what is written and not published is written over")
        if self._file is not None:
            try:
                await _in_thread(self._file.write, (edit.content,), start)
            except OSError as error:
                raise _no_room() from error
            return
        while start < end:
            index = bisect_right(self._starts, start) - 1
            chunk, offset = self._chunks[index], start - self._starts[index]
            piece = edit.content[start - edit.span.start :][: len(chunk) - offset]
            self._chunks[index] = chunk[:offset] + piece + chunk[offset + len(piece) :]
            start += len(piece)

    def publish(self, upto: int | None = None) -> None:
        """Lets followers see the bytes before ``upto`` (default: all that is written)."""
        self._published = max(self._published, self._written if upto is None else upto)
        self._wake()

    def finish(self) -> None:
        """No more will be written or published: followers end at what is published."""
        self._finished = True
        if self._news is not None:
            self._wake()

    def forget_unpublished(self) -> None:
        """Drops what was written beyond the published mark: an event that never ended."""
        while self._chunks and self._starts[-1] >= self._published:
            self._starts.pop()
            dropped = len(self._chunks.pop())
            self._in_memory -= dropped
            self._room.give_back(dropped, 0)
        if self._chunks:
            keep = self._published - self._starts[-1]
            dropped = len(self._chunks[-1]) - keep
            self._chunks[-1] = self._chunks[-1][:keep]
            self._in_memory -= dropped
            self._room.give_back(dropped, 0)
        self._written = self._published

    def _wake(self) -> None:
        news, self._news = self._news, None
        if news is not None:
            news.set()

    def follow(self, keep_alive_seconds: float | None = None) -> Growing:
        """What is published, from the first byte, as it is published, until ``finish``.

        With ``keep_alive_seconds`` a comment after each such silence: only what ends with an event
        is ever published, so it stands between two of them.
        """
        return Growing(self._follow(keep_alive_seconds))

    async def _follow(
        self, keep_alive_seconds: float | None
    ) -> AsyncGenerator[Sequence[bytes], None]:
        self.share()
        follower = _Follower()
        self._followers += (follower,)
        try:
            while True:
                if self._news is None:
                    self._news = Moment()
                news = self._news
                while follower.taken < self._published:
                    group = await self._group(follower.taken, self._published)
                    yield group
                    # Only who comes back for more has taken it.
                    follower.taken += sum(map(len, group))
                    self._moved()
                if self._finished and follower.taken >= self._published:
                    return
                if news is self._news and not await _within(keep_alive_seconds, news):
                    yield (KEEP_ALIVE,)
        finally:
            self._followers = tuple([one for one in self._followers if one is not follower])
            self._moved()
            self.close()

    def _moved(self) -> None:
        moves, self._moves = self._moves, None
        if moves is not None:
            moves.set()

    async def caught_up(self, within: int) -> None:
        """Waits until every follower has taken all but ``within`` of the published bytes; whoever
        leaves is waited for no longer."""
        while self.lag > within:
            if self._moves is None:
                self._moves = Moment()
            await self._moves.wait()

    async def slice(self, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        """The bytes ``[start, end)``, published or not; ``end`` defaults to all written now."""
        stop = self._written if end is None else end
        self.share()
        try:
            while start < stop:
                chunk = await self._read(start, stop)
                start += len(chunk)
                yield chunk
        finally:
            self.close()

    async def lent_slice(self, start: int, end: int) -> AsyncGenerator[bytes | Lent, None]:
        """As ``slice``, for who is done with each piece before it asks for the next: what is in a
        file is a ``LentFile``, each time the same."""
        if self._file is None:
            async with aclosing(self.slice(start, end)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        if end > self._written:  # behind that the file has what another one wrote
            raise OSError("a spool is shorter than what is asked of it")
        self.share()
        try:
            piece = _FilePiece(self._file, start, self._room.buffers)
            while piece.move(end):
                yield piece
            piece.let_go()
        finally:
            self.close()

    def parts(self, start: int, end: int) -> list[bytes] | None:
        """The bytes ``[start, end)`` as they lie in memory; None where they do not. Who takes them
        has a share for as long as it uses them: they are counted as long as the spool is."""
        if self._file is not None or end > self._written:
            return None
        if start == 0 and end == self._written:
            return self._chunks.copy()
        if start >= end:
            return []
        first, last = bisect_right(self._starts, start) - 1, bisect_right(self._starts, end - 1)
        found = self._chunks[first:last]
        # The end first: where both are in one chunk, its beginning is cut off behind that.
        found[-1] = found[-1][: end - self._starts[last - 1]]
        found[0] = found[0][start - self._starts[first] :]
        return found

    async def _group(self, start: int, end: int) -> list[bytes]:
        """The first pieces of the bytes ``[start, end)``, no more of them once they are
        ``GROUP_BYTES``; from a file one."""
        after = bisect_left(self._starts, start + GROUP_BYTES)
        upto = min(end, self._starts[after]) if after < len(self._starts) else end
        parts = self.parts(start, upto)
        return [await self._read(start, end)] if parts is None else parts

    async def _read(self, start: int, end: int) -> bytes:
        if start >= self._written:
            raise OSError("a spool is shorter than what is asked of it")
        end = min(end, self._written)
        if self._file is not None:
            count = min(READ_BYTES, end - start)
            buffer = bytearray(count)
            return bytes(memoryview(buffer)[: await _read_into(self._file.fd, buffer, start)])
        index = bisect_right(self._starts, start) - 1
        chunk, offset = self._chunks[index], start - self._starts[index]
        if offset == 0 and len(chunk) <= end - start:
            return chunk
        return chunk[offset : offset + end - start]

    def share(self) -> None:
        """One more holder: memory and file stay until each has called ``close``."""
        self._holders += 1

    def close(self) -> None:
        """One holder less; the last one gives memory and file back."""
        self._holders -= 1
        if self._holders == 0:
            self._free()

    def _free(self) -> None:
        self._room.give_back(self._in_memory, self._on_disk)
        self._in_memory = self._on_disk = 0
        self._chunks, self._starts = [], []
        file, self._file = self._file, None
        if file is not None and self._for_request:
            self._room.close_file(file)
        elif file is not None:
            file.close()


class _FilePiece(LentFile):
    """A piece of a spool's file, moved along it. There is a buffer where somebody fetches."""

    __slots__ = ("_buffers", "_file", "_room")

    def __init__(self, file: Scratch, start: int, buffers: Buffers) -> None:
        super().__init__(file.fd, start, 0)
        self._file = file
        self._buffers = buffers
        self._room = bytearray()

    def move(self, end: int) -> bool:
        """To what is behind it, as far as ``end``; whether there is anything."""
        self.at += self.size
        self.size = min(LENT_BYTES, end - self.at)
        self.buffer, self.view = bytearray(), memoryview(b"")
        return self.size > 0

    def is_at_hand(self) -> bool:
        """Never of a file that will be written over: who sends it holds its pages, not a copy."""
        if _NOWAIT is None or self._file.size <= KEPT_FILE_BYTES:
            return False
        self._file.is_spent = True
        one = bytearray(1)
        last = self.at + self.size - 1
        try:
            return all(
                os.preadv(self.fd, (one,), at, _NOWAIT)
                for at in (*range(self.at, last, PROBE_BYTES), last)
            )
        except OSError:
            return False

    async def fetch(self) -> None:
        if self.buffer:
            return
        if len(self._room) < self.size:
            self._room = self._buffers.take(self.size)
        view = memoryview(self._room)[: self.size]
        count = 0
        while count < self.size:
            count += await _read_into(self.fd, view[count:], self.at + count)
        self.buffer, self.view = self._room, view

    def let_go(self) -> None:
        """The last one was asked for: nobody looks at what was fetched."""
        room, self._room = self._room, bytearray()
        self._buffers.give_back(room)


class _Follower:
    """One reader of what is published, and how much it has taken."""

    __slots__ = ("taken",)

    def __init__(self) -> None:
        self.taken = 0


async def _within(seconds: float | None, event: Moment) -> bool:
    """Whether an event comes in that time."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _no_room() -> Overloaded:
    return Overloaded(
        "The gateway holds as many pictures as it has room for. Nothing was bought; try again in "
        "a few seconds.",
        retry_after_seconds=5,
    )


P = ParamSpec("P")
T = TypeVar("T")
_Piece = TypeVar("_Piece", bound="bytes | Lent")


async def _in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Like ``asyncio.to_thread``, but never leaves the thread behind when it is cancelled: the
    descriptor it works on may be closed, and its number given to another file, right after."""
    done = Moment()
    work = asyncio.get_running_loop().run_in_executor(None, partial(function, *args, **kwargs))
    work.add_done_callback(lambda work: done.set())
    try:
        await done.wait()
    except asyncio.CancelledError:
        while not work.done():
            with suppress(asyncio.CancelledError):
                await done.wait()
        if not work.cancelled():
            work.exception()  # Looked at, so that nobody reports it as forgotten.
        raise
    return work.result()


async def _read_into(descriptor: int, buffer: bytearray | memoryview, offset: int) -> int:
    """Reads what the system has in memory at once, which is nearly always all: it was written a
    moment ago. Only what has to be waited for, or cannot be asked for so, takes a thread."""
    count = 0
    if _NOWAIT is not None:
        with suppress(OSError):
            count = os.preadv(descriptor, (buffer,), offset, _NOWAIT)
    count = count or await _in_thread(os.preadv, descriptor, (buffer,), offset)
    if not count:
        raise OSError("a spool file is shorter than what was written to it")
    return count


def edited_length(length: int, edits: Sequence[Edit]) -> int:
    """The length of a body after its edits."""
    for edit in edits:
        length += len(edit.content) - (edit.span.end - edit.span.start)
    return length


def edited(spool: Spool, edits: Sequence[Edit]) -> Parts | AsyncGenerator[bytes | Lent, None]:
    """A body with its edits spliced in, every other byte as it came, for who has a share of the
    spool until it is read, and is done with each piece before it asks for the next. A small body
    that is in memory is one piece, and so leaves in one packet: one system call instead of three.
    """
    if len(edits) > 1:
        edits = sorted(edits, key=lambda edit: edit.span.start)
    position = 0
    whole = spool.parts(0, spool.length) if spool.length <= ONE_PIECE else None
    if whole is not None:
        content = b"".join(whole)
        parts: list[bytes] = []
        for edit in edits:
            parts += (content[position : edit.span.start], edit.content)
            position = edit.span.end
        return Parts((b"".join((*parts, content[position:])),))
    pieces: list[bytes | Span] = []
    for edit in edits:
        pieces += (Span(position, edit.span.start), edit.content)
        position = edit.span.end
    pieces.append(Span(position, spool.length))
    return _spliced(spool.lent_slice, pieces) if spool.spilled else held(spool, pieces)


def spliced(spool: Spool, pieces: Sequence[bytes | Span]) -> AsyncGenerator[bytes, None]:
    """Literal bytes and spans of a spool, one after the other."""
    return _spliced(spool.slice, pieces)


async def _spliced(
    read: Callable[[int, int], AsyncGenerator[_Piece, None]], pieces: Sequence[bytes | Span]
) -> AsyncGenerator[_Piece | bytes, None]:
    for piece in pieces:
        if isinstance(piece, Span):
            async with aclosing(read(piece.start, piece.end)) as chunks:
                async for chunk in chunks:
                    yield chunk
        elif piece:
            yield piece


def held(spool: Spool, pieces: Sequence[bytes | Span]) -> Parts | AsyncGenerator[bytes, None]:
    """As ``spliced``, for who has a share of the spool until it is read: what is in memory is
    handed over as it lies there. Sixty times cheaper for a picture of 2.7 MB in 45 chunks."""
    parts: list[bytes] = []
    for piece in pieces:
        if isinstance(piece, Span):
            found = spool.parts(piece.start, piece.end)
            if found is None:
                return spliced(spool, pieces)
            parts += found
        elif piece:
            parts.append(piece)
    return Parts(parts)
