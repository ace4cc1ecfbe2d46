"""Files without a name, for what passes through a process: written over by the next one.

Of 20 MB that are written to a new file three quarters of the CPU are its pages: found, cleared,
booked by the file system, and let go again a moment later. A file that has them takes a copy.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

KEPT_FILES = 4
KEPT_FROM_BYTES = 1024 * 1024
"""A smaller file has little to be saved."""
KEPT_FILE_BYTES = 32 * 1024 * 1024
"""A larger one is not kept."""
KEPT_SECONDS = 5.0
"""So long a file waits for the next one who writes."""
LAST_SECONDS = 20.0
"""And so old it may be: after 30 s Linux writes to the disk what nobody has deleted by then."""


class Scratch:
    """An open file that is on the disk and in no folder, so that a killed process leaves none.

    ``size`` is how much was ever written to it. What is behind the bytes of who has it now is
    another one's: nobody reads further than was written.
    """

    __slots__ = ("_file", "born_at", "idle_since", "is_spent", "size")

    def __init__(self, folder: Path, born_at: float = 0.0) -> None:
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by its holder
        self._file = cast(BinaryIO, file)
        self.born_at = born_at
        self.idle_since = born_at
        self.size = 0
        self.is_spent = False
        """It is not written over: a write failed, or the system sends its pages to a socket, which
        may hold them as they are, uncopied, longer than anybody here knows."""

    @property
    def fd(self) -> int:
        return self._file.fileno()

    def write(self, chunks: tuple[bytes | memoryview, ...], offset: int) -> None:
        """In a thread. Raises ``OSError``."""
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                try:
                    written = os.pwrite(self.fd, view, offset)
                except OSError:
                    self.is_spent = True
                    raise
                offset += written
                view = view[written:]
            self.size = max(self.size, offset)

    def close(self) -> None:
        self._file.close()


class Scratches:
    """A few files that nobody writes to at the moment, for a few seconds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: list[Scratch] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def size_bytes(self) -> int:
        return sum([one.size for one in self._kept])

    def take(self, most: int) -> Scratch:
        """The one that was used last, where it has at most so many bytes, else a new one. Raises
        ``OSError``."""
        if self._kept and self._kept[-1].size <= most:
            return self._kept.pop()
        return Scratch(self._folder, asyncio.get_running_loop().time())

    def give_back(self, one: Scratch, *, keep: bool) -> None:
        if (
            not keep
            or one.is_spent
            or not KEPT_FROM_BYTES <= one.size <= KEPT_FILE_BYTES
            or len(self._kept) >= KEPT_FILES
        ):
            one.close()
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            one.close()
            return
        one.idle_since = loop.time()
        if one.idle_since - one.born_at >= LAST_SECONDS:
            one.close()
            return
        self._kept.append(one)
        if self._timer is None:
            self._timer = loop.call_later(KEPT_SECONDS, self._look)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        kept = []
        for one in self._kept:
            if now - one.idle_since < KEPT_SECONDS and now - one.born_at < LAST_SECONDS:
                kept.append(one)
            else:
                one.close()
        self._kept = kept
        self._timer = loop.call_later(KEPT_SECONDS, self._look) if kept else None

    def close(self) -> None:
        """Lets go of what is kept. May be repeated."""
        kept, self._kept = self._kept, []
        for one in kept:
            one.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
