"""Whose the ids are that live at upstreams, on SQLite."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from datetime import datetime

from gateway.domain.owned import Owned, OwnedKind
from gateway.stores.rows import OWNED_COLUMNS, micros, owned_of, owned_row, storable
from gateway.stores.sqlite_file import Reader, Writer

_RECORD = f"""
INSERT INTO owned AS kept ({OWNED_COLUMNS}, purpose) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET expires = excluded.expires, size_bytes = excluded.size_bytes,
       detail = excluded.detail, purpose = excluded.purpose
 WHERE kept.team = excluded.team
"""  # noqa: S608 - names of columns

_FIND = f"""
SELECT {OWNED_COLUMNS} FROM owned
 WHERE id IN (SELECT value FROM json_each(?)) AND team = ? AND (expires IS NULL OR expires > ?)
"""  # noqa: S608 - names of columns

_OTHERS = """
SELECT id FROM owned
 WHERE id IN (SELECT value FROM json_each(?)) AND team <> ? AND (expires IS NULL OR expires > ?)
"""

_PLACE = "SELECT created, id FROM owned WHERE id = ? AND team = ? AND kind = ?"

# One statement for each direction, so that each can go along the index.
PAGES = {
    newest_first: f"""
SELECT {OWNED_COLUMNS} FROM owned
 WHERE team = :team AND kind = :kind AND (expires IS NULL OR expires > :now)
   AND (:purpose = '' OR purpose = :purpose)
   AND (:id IS NULL OR (created, id) {behind} (:created, :id))
 ORDER BY created {order}, id {order} LIMIT :limit
"""  # noqa: S608 - names of columns
    for newest_first, behind, order in ((True, "<", "DESC"), (False, ">", "ASC"))
}

_TOTAL = """
SELECT coalesce(sum(size_bytes), 0) FROM owned
 WHERE team = ? AND kind = ? AND (expires IS NULL OR expires > ?)
"""

_DISOWN = """
UPDATE owned SET expires = 0, detail = '{}'
 WHERE id = ? AND team = ? AND (expires IS NULL OR expires <> 0)
"""

_FORGET = """
DELETE FROM owned WHERE id IN (
       SELECT id FROM owned WHERE expires IS NOT NULL AND expires <= ? ORDER BY expires LIMIT ?)
"""


class SQLiteOwnership:
    """``Ownership`` on SQLite."""

    def __init__(self, writer: Writer, reader: Reader) -> None:
        self._writer = writer
        self._reader = reader

    async def record(self, owned: Sequence[Owned]) -> None:
        rows = [owned_row(one) for one in owned]

        def write(db: sqlite3.Connection) -> None:
            db.executemany(_RECORD, rows)

        await self._writer.submit(write)

    async def find(self, team: str, ids: Sequence[str], now: datetime) -> dict[str, Owned]:
        asked = (json.dumps(storable(ids)), team, micros(now))
        rows = await self._reader.run(lambda db: db.execute(_FIND, asked).fetchall())
        return {one.id: one for one in map(owned_of, rows)}

    async def others(self, team: str, ids: Sequence[str], now: datetime) -> frozenset[str]:
        asked = (json.dumps(storable(ids)), team, micros(now))
        rows = await self._reader.run(lambda db: db.execute(_OTHERS, asked).fetchall())
        return frozenset(id for (id,) in rows)

    async def owned(
        self,
        team: str,
        kind: OwnedKind,
        now: datetime,
        *,
        limit: int,
        after: str = "",
        newest_first: bool = True,
        purpose: str = "",
    ) -> list[Owned]:
        def read(db: sqlite3.Connection) -> list[tuple[object, ...]]:
            place = None
            if after:
                known = storable([after])
                place = db.execute(_PLACE, (*known, team, kind)).fetchone() if known else None
                if place is None:
                    return []
            created, last = place or (None, None)
            asked = {
                "team": team,
                "kind": kind,
                "now": micros(now),
                "purpose": purpose,
                "created": created,
                "id": last,
                "limit": limit,
            }
            return db.execute(PAGES[newest_first], asked).fetchall()

        return [owned_of(row) for row in await self._reader.run(read)]

    async def total_bytes(self, team: str, kind: OwnedKind, now: datetime) -> int:
        asked = (team, kind, micros(now))
        return await self._reader.run(lambda db: int(db.execute(_TOTAL, asked).fetchone()[0]))

    async def disown(self, team: str, id: str) -> bool:
        known = storable([id])
        if not known:
            return False
        return await self._writer.submit(
            lambda db: db.execute(_DISOWN, (*known, team)).rowcount > 0
        )

    async def forget_expired(self, now: datetime, limit: int = 1000) -> int:
        return await self._writer.submit(
            lambda db: db.execute(_FORGET, (micros(now), limit)).rowcount
        )
