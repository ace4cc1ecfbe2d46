"""The numbered schemas of both databases, and which of them a database has."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from gateway.stores.sqlite_read import read_only

_HALF_MONTHS_SO_FAR = 8
"""The file of SQLite that adds them up."""


@dataclass(frozen=True, slots=True)
class Versions:
    """The schema that a database has, 0 where it has none, and the one that this program knows."""

    database: int
    program: int

    @property
    def upgrade_needed(self) -> bool:
        return self.database < self.program

    @property
    def too_new(self) -> bool:
        return self.database > self.program


def migrations(kind: Literal["sqlite", "postgres"]) -> list[str]:
    """The text of each numbered file, in order."""
    folder = resources.files("gateway.stores").joinpath("migrations", kind)
    files = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".sql")),
        key=lambda file: file.name,
    )
    return [file.read_text(encoding="utf-8") for file in files]


def half_months() -> str:
    """The statement that adds up the first half of each month, in words that both databases know,
    for books that nobody else writes. No backup has these sums: they are those of days."""
    return migrations("sqlite")[_HALF_MONTHS_SO_FAR - 1]


def sqlite_versions(path: Path) -> Versions:
    """Of an SQLite file, which is not changed. Raises ``StoreError``."""
    program = len(migrations("sqlite"))
    if not path.exists():
        return Versions(0, program)
    return Versions(
        read_only(path, lambda db, _: int(db.execute("PRAGMA user_version").fetchone()[0])), program
    )
