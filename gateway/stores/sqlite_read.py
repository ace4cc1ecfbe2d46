"""An SQLite file that is read, and nothing left beside it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from gateway.ports import StoreError

T = TypeVar("T")

ALONE = "immutable=1"


def read_only(path: Path, look: Callable[[sqlite3.Connection, bool], T]) -> T:
    """What ``look`` finds; it is told whether nobody has the file open, and is called again where
    somebody has come meanwhile. Raises ``StoreError``."""
    wal = path.with_name(f"{path.name}-wal")
    if not wal.exists():
        # Then SQLite would make the files of a log, and leave them behind, of this very user.
        before = _state(path)
        try:
            found = _look(path, ALONE, look)
        except StoreError:
            if not wal.exists() and _state(path) == before:
                raise
        else:
            if not wal.exists() and _state(path) == before:
                return found
        # Somebody has opened it, and what was read may have changed under our eyes.
    return _look(path, "mode=ro", look)


def _look(path: Path, how: str, look: Callable[[sqlite3.Connection, bool], T]) -> T:
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True)) as db:
            return look(db, how == ALONE)
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    return found.st_mtime_ns, found.st_size
