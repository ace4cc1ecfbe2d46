"""Files that are looked at again: has one of them changed since it was read?

What a name leads to is compared, not what was announced about it: an edit in place, an atomic
rename, and Kubernetes' way (``..data`` is made to point to another folder) all change it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a name leads to: the file behind all links, and its identity there."""

    path: str
    device: int
    inode: int
    mtime_ns: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Source:
    """A file as it was when it was read; ``stamp`` None: it was not there."""

    path: Path
    stamp: Stamp | None


def source(path: Path) -> Source:
    """To be taken before the file is read: what changes meanwhile is then seen again."""
    return Source(path.absolute(), stamp(path))


def stamp(path: Path) -> Stamp | None:
    """None where nothing can be read there."""
    try:
        real = os.path.realpath(path)
        found = os.stat(real)
    except (OSError, ValueError):
        return None
    return Stamp(real, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


class FileWatch:
    """Compares files with what they were at the last reading, whether that went well or not.

    A file that is missing at one look may be on its way: only at the second one it is gone.
    """

    def __init__(self, sources: Iterable[Source]) -> None:
        self._known: dict[Path, Stamp | None] = {}
        self._missing: frozenset[Path] = frozenset()
        self.read(sources)

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self._known)

    def read(self, sources: Iterable[Source]) -> None:
        """A reading has seen these. Files that only an earlier one saw go on being watched: a
        reading that failed may not have come to all of them."""
        self._known |= {one.path: one.stamp for one in sources}

    def only(self, sources: Iterable[Source]) -> None:
        """A reading that went well has seen these, and needs no others."""
        self._known = {one.path: one.stamp for one in sources}

    def changed(self, found: Mapping[Path, Stamp | None]) -> bool:
        """Whether what was found at ``paths`` is something else. What is told once is known."""
        missing = frozenset(
            path for path, now in found.items() if now is None and self._known.get(path) is not None
        )
        gone, self._missing = missing & self._missing, missing
        news = {
            path: now
            for path, now in found.items()
            if path in self._known and now != self._known[path] and (now or path in gone)
        }
        self._known |= news
        return bool(news)


def look(paths: Iterable[Path]) -> dict[Path, Stamp | None]:
    """What is there now. Blocks as long as the disk does."""
    return {path: stamp(path) for path in paths}
