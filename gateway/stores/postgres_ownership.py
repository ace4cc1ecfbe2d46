"""Whose the ids are that live at upstreams, on PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from gateway.domain.owned import Owned, OwnedKind
from gateway.stores.postgres_link import Link
from gateway.stores.postgres_writer import Reader, Transaction, Writer, alone
from gateway.stores.rows import OWNED_COLUMNS, micros, owned_of, owned_row, storable

_RECORD = f"""
INSERT INTO owned AS kept ({OWNED_COLUMNS}, purpose)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (id) DO UPDATE SET expires = excluded.expires, size_bytes = excluded.size_bytes,
       detail = excluded.detail, purpose = excluded.purpose
 WHERE kept.team = excluded.team
"""  # noqa: S608 - names of columns

_FIND = f"""
SELECT {OWNED_COLUMNS} FROM owned
 WHERE id = ANY(%s::text[]) AND team = %s AND (expires IS NULL OR expires > %s)
"""  # noqa: S608 - names of columns

_OTHERS = """
SELECT id FROM owned
 WHERE id = ANY(%s::text[]) AND team <> %s AND (expires IS NULL OR expires > %s)
"""

_PLACE = "SELECT created, id FROM owned WHERE id = %s AND team = %s AND kind = %s"

# One statement for each direction, so that each can go along the index.
PAGES = {
    newest_first: f"""
SELECT {OWNED_COLUMNS} FROM owned
 WHERE team = %(team)s AND kind = %(kind)s AND (expires IS NULL OR expires > %(now)s)
   AND (%(purpose)s::text = '' OR purpose = %(purpose)s)
   AND (%(id)s::text IS NULL OR (created, id) {behind} (%(created)s::bigint, %(id)s::text))
 ORDER BY created {order}, id {order} LIMIT %(limit)s
"""  # noqa: S608 - names of columns
    for newest_first, behind, order in ((True, "<", "DESC"), (False, ">", "ASC"))
}

_TOTAL = """
SELECT coalesce(sum(size_bytes), 0) FROM owned
 WHERE team = %s AND kind = %s AND (expires IS NULL OR expires > %s)
"""

_DISOWN = """
UPDATE owned SET expires = 0, detail = '{}'
 WHERE id = %s AND team = %s AND (expires IS NULL OR expires <> 0)
"""

_FORGET = """
DELETE FROM owned WHERE id IN (
       SELECT id FROM owned WHERE expires IS NOT NULL AND expires <= %s
        ORDER BY expires LIMIT %s FOR UPDATE SKIP LOCKED)
"""


class PostgresOwnership:
    """``Ownership`` on PostgreSQL."""

    def __init__(self, writer: Writer, reader: Reader) -> None:
        self._writer = writer
        self._reader = reader

    async def record(self, owned: Sequence[Owned]) -> None:
        # In order of their ids: two processes that record the same never wait for each other.
        rows = [owned_row(one) for one in sorted(owned, key=lambda one: one.id)]

        def write(transaction: Transaction) -> None:
            with transaction.link.cursor() as cursor:
                cursor.executemany(_RECORD, rows)

        await self._writer.run(alone(write))

    async def find(self, team: str, ids: Sequence[str], now: datetime) -> dict[str, Owned]:
        asked = (storable(ids), team, micros(now))
        rows = await self._reader.run(lambda link: link.execute(_FIND, asked).fetchall())
        return {one.id: one for one in map(owned_of, rows)}

    async def others(self, team: str, ids: Sequence[str], now: datetime) -> frozenset[str]:
        asked = (storable(ids), team, micros(now))
        rows = await self._reader.run(lambda link: link.execute(_OTHERS, asked).fetchall())
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
        def read(link: Link) -> list[tuple[Any, ...]]:
            place = None
            if after:
                known = storable([after])
                if known:
                    place = link.execute(_PLACE, (*known, team, kind.value)).fetchone()
                if place is None:
                    return []
            created, last = place or (None, None)
            asked = {
                "team": team,
                "kind": kind.value,
                "now": micros(now),
                "purpose": purpose,
                "created": created,
                "id": last,
                "limit": limit,
            }
            return link.execute(PAGES[newest_first], asked).fetchall()

        return [owned_of(row) for row in await self._reader.run(read)]

    async def total_bytes(self, team: str, kind: OwnedKind, now: datetime) -> int:
        asked = (team, kind.value, micros(now))
        return await self._reader.run(lambda link: link.number(_TOTAL, asked))

    async def disown(self, team: str, id: str) -> bool:
        known = storable([id])
        if not known:
            return False
        return (
            await self._writer.run(
                alone(
                    lambda transaction: transaction.link.execute(_DISOWN, (*known, team)).rowcount
                )
            )
            > 0
        )

    async def forget_expired(self, now: datetime, limit: int = 1000) -> int:
        def write(transaction: Transaction) -> int:
            return transaction.link.execute(_FORGET, (micros(now), limit)).rowcount

        return await self._writer.run(alone(write))
