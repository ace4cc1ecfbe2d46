"""A look at an SQLite file that changes nothing, beside gateways that use it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gateway.domain.team import Key, Team
from gateway.stores.rows import KEY_COLUMNS, TEAM_COLUMNS, key_of, team_of
from gateway.stores.schema import Versions, migrations
from gateway.stores.sqlite_file import (
    APPLICATION_ID,
    NETWORK_FILESYSTEMS,
    filesystem_of,
    one_number,
)
from gateway.stores.sqlite_read import read_only

SAFE_LIBRARY = (3, 51, 3)
"""From here on SQLite itself closes the WAL-reset race (money.md 4)."""
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
    return read_only(path, lambda db, alone: _look(db, alone, wal, is_late))


def _look(
    db: sqlite3.Connection, alone: bool, wal: Path, is_late: Callable[[], bool]
) -> SqliteGlance:
    schema = Versions(one_number(db, "PRAGMA user_version"), len(migrations("sqlite")))
    ours = one_number(db, "PRAGMA application_id") == APPLICATION_ID
    (mode,) = db.execute("PRAGMA journal_mode").fetchone()
    if alone:
        mode = ""
    wal_bytes = wal.stat().st_size if wal.exists() else 0
    if not ours or schema.upgrade_needed or schema.too_new:
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


def is_mounted(path: Path, mounts: Path = Path("/proc/mounts")) -> bool:
    """Whether a file is mounted by itself, as a container's secrets are."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    name = str(path).replace("\\", r"\134").replace(" ", r"\040")
    return any(line.split(" ")[1:2] == [name] for line in lines)


def is_network_disk(kind: str) -> bool:
    return kind in NETWORK_FILESYSTEMS
