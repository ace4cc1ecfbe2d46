"""A look at an SQLite file that changes nothing, beside gateways that use it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from gateway.domain.team import Key, Team
from gateway.ports import StoreError
from gateway.stores.rows import KEY_COLUMNS, TEAM_COLUMNS, key_of, team_of
from gateway.stores.schema import Versions, migrations
from gateway.stores.sqlite_file import (
    APPLICATION_ID,
    NETWORK_FILESYSTEMS,
    filesystem_of,
    one_number,
)

SAFE_LIBRARY = (3, 51, 3)
"""From here on SQLite itself closes the WAL-reset race (money.md 4)."""
ALONE = "immutable=1"
STEPS = 20_000
"""Of SQLite's machine, between two looks at the clock."""

_TEAMS = f"SELECT {TEAM_COLUMNS} FROM team"  # noqa: S608 - names of columns
_KEYS = f"SELECT {KEY_COLUMNS} FROM key"  # noqa: S608 - names of columns


@dataclass(frozen=True, slots=True)
class SqliteGlance:
    """``journal_mode`` is empty where nobody has the file open. ``damage`` is what the quick check
    found: empty where the file is whole, None where it was not looked through in time. ``keys``
    are those that commands made."""

    schema: Versions
    ours: bool
    journal_mode: str
    wal_bytes: int
    damage: str | None = ""
    teams: tuple[Team, ...] = ()
    keys: tuple[Key, ...] = ()


def glance_at_sqlite(path: Path, is_late: Callable[[], bool]) -> SqliteGlance:
    """Blocks until the file is looked through, or ``is_late``. Raises ``StoreError``."""
    wal = path.with_name(f"{path.name}-wal")
    if not wal.exists():
        # Nobody has it open: then SQLite would make the files of a log, and leave them behind.
        try:
            found = _look(path, wal, ALONE, is_late)
        except StoreError:
            if not wal.exists():
                raise
        else:
            if not wal.exists():
                return found
        # Somebody has opened it meanwhile, and what was read may have changed under our eyes.
    return _look(path, wal, "mode=ro", is_late)


def _look(path: Path, wal: Path, how: str, is_late: Callable[[], bool]) -> SqliteGlance:
    program = len(migrations("sqlite"))
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True)) as db:
            schema = Versions(one_number(db, "PRAGMA user_version"), program)
            ours = one_number(db, "PRAGMA application_id") == APPLICATION_ID
            (mode,) = db.execute("PRAGMA journal_mode").fetchone()
            if how == ALONE:
                mode = ""
            wal_bytes = wal.stat().st_size if wal.exists() else 0
            if not ours or schema.database != program:
                return SqliteGlance(schema, ours, mode, wal_bytes)
            return SqliteGlance(
                schema,
                ours,
                mode,
                wal_bytes,
                _damage(db, is_late),
                tuple(map(team_of, db.execute(_TEAMS))),
                tuple(map(key_of, db.execute(_KEYS))),
            )
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error


def _damage(db: sqlite3.Connection, is_late: Callable[[], bool]) -> str | None:
    db.set_progress_handler(is_late, STEPS)
    try:
        (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError:
        if is_late():
            return None
        raise
    finally:
        db.set_progress_handler(None, 0)
    return "" if found == "ok" else str(found)


def kind_of_disk(folder: Path) -> str:
    """The type of the file system that a folder is on; empty where the system does not say."""
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return filesystem_of(folder.resolve(), mounts)


def is_network_disk(kind: str) -> bool:
    return kind in NETWORK_FILESYSTEMS
