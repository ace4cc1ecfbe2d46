"""What lives on at an upstream between two requests, each project's apart from every other's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Thing = TypeVar("Thing")


class Shelf(Generic[Thing]):
    """Things by their id, for one project each. Any thread may use it.

    ``size_of`` gives a thing's size in bytes. Above ``max_bytes`` in all the oldest are forgotten,
    for a sandbox that runs for months.
    """

    def __init__(self, size_of: Callable[[Thing], int], max_bytes: int) -> None:
        self._lock = threading.Lock()
        self._size_of, self._max_bytes = size_of, max_bytes
        self._things: dict[tuple[str, str], tuple[Thing, int]] = {}
        self._bytes = 0

    def put(self, project: str, id_: str, thing: Thing) -> None:
        """Adds a thing, or replaces the one of that id."""
        with self._lock:
            self._bytes -= self._things.pop((project, id_), (thing, 0))[1]
            size = self._size_of(thing)
            self._things[project, id_] = (thing, size)
            self._bytes += size
            while self._bytes > self._max_bytes and len(self._things) > 1:
                self._bytes -= self._things.pop(next(iter(self._things)))[1]

    def get(self, project: str, id_: str) -> Thing | None:
        with self._lock:
            found = self._things.get((project, id_))
        return found[0] if found is not None else None

    def take(self, project: str, id_: str) -> Thing | None:
        """Removes a thing."""
        with self._lock:
            found = self._things.pop((project, id_), None)
            if found is None:
                return None
            self._bytes -= found[1]
            return found[0]

    def of(self, project: str) -> list[Thing]:
        """A project's things, the oldest first."""
        with self._lock:
            return [thing for (owner, _), (thing, _) in self._things.items() if owner == project]

    def __len__(self) -> int:
        return len(self._things)
