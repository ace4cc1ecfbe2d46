"""The directory on PostgreSQL: teams and keys that commands made."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from gateway.domain.team import Key, Team
from gateway.ports import AlreadyExists, NotKnown
from gateway.stores.postgres_ledger import PING
from gateway.stores.postgres_link import Link
from gateway.stores.postgres_writer import Reader, Transaction, Writer, alone
from gateway.stores.rows import (
    KEY_COLUMNS,
    TEAM_COLUMNS,
    key_of,
    key_row,
    micros,
    team_of,
    team_row,
    watched_of,
)

_TEAM = f"SELECT {TEAM_COLUMNS} FROM team"  # noqa: S608 - names of columns
_SOME_TEAMS = _TEAM + " WHERE disabled = 0 ORDER BY id LIMIT %s"
_KEY = f"SELECT {KEY_COLUMNS} FROM key"  # noqa: S608 - names of columns
_HAS_BUDGET = (
    "EXISTS (SELECT 1 FROM json_each_text(limits::json)"
    " WHERE substr(key, 1, 7) = 'budget_' AND value IS NOT NULL"
    " OR substr(key, 1, 12) = 'soft_budget_' AND value IS NOT NULL)"
)
_WATCHED_KEYS = _KEY + " WHERE disabled = 0 AND revoked IS NULL AND " + _HAS_BUDGET
_WATCHED_TEAMS = _TEAM + " WHERE disabled = 0 AND (id = ANY(%s::text[]) OR " + _HAS_BUDGET + ")"
_DECLARED = "SELECT digest, id FROM declared_key WHERE digest = ANY(%s::bytea[])"
_DECLARING = "SELECT pg_advisory_xact_lock(hashtextextended('declared keys', 0))"


class PostgresDirectory:
    """``Directory`` on PostgreSQL."""

    def __init__(self, writer: Writer, reader: Reader) -> None:
        self._writer = writer
        self._reader = reader

    async def find_key(self, digest: bytes) -> tuple[Team, Key] | None:
        def read(link: Link) -> tuple[Team, Key] | None:
            found = link.execute(_KEY + " WHERE digest = %s", (digest,)).fetchone()
            if found is None:
                return None
            key = key_of(found)
            team = link.execute(_TEAM + " WHERE id = %s", (key.team,)).fetchone()
            return None if team is None else (team_of(team), key)

        return await self._reader.run(read)

    async def teams(self) -> list[Team]:
        rows = await self._reader.run(lambda link: link.execute(_TEAM + " ORDER BY id").fetchall())
        return [team_of(row) for row in rows]

    async def some_teams(self, most: int) -> list[Team]:
        rows = await self._reader.run(lambda link: link.execute(_SOME_TEAMS, (most,)).fetchall())
        return [team_of(row) for row in rows]

    async def keys(self, team: str | None = None) -> list[Key]:
        rows = await self._reader.run(
            lambda link: link.execute(
                _KEY + " WHERE %(team)s::text IS NULL OR team = %(team)s ORDER BY team, id",
                {"team": team},
            ).fetchall()
        )
        return [key_of(row) for row in rows]

    async def watched(self) -> list[tuple[Team, Key | None]]:
        def read(link: Link) -> list[tuple[Team, Key | None]]:
            # Made here, in the thread that reads: of 100,000 keys that takes seconds.
            keys = [key_of(row) for row in link.execute(_WATCHED_KEYS + " ORDER BY team, id")]
            theirs = sorted({key.team for key in keys})
            rows = link.execute(_WATCHED_TEAMS + " ORDER BY id", (theirs,))
            return watched_of([team_of(row) for row in rows], keys)

        return await self._reader.run(read)

    async def create_team(self, team: Team) -> None:
        def write(transaction: Transaction) -> None:
            made = transaction.link.execute(
                "INSERT INTO team (models, limits, cache_enabled, disabled, time_zone, id)"
                " VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
                team_row(team),
            )
            if made.rowcount == 0:
                raise AlreadyExists(f"there is a team {team.id} already")

        await self._writer.run(alone(write))

    async def update_team(self, team: Team) -> None:
        def write(transaction: Transaction) -> None:
            changed = transaction.link.execute(
                "UPDATE team SET models = %s, limits = %s, cache_enabled = %s, disabled = %s,"
                " time_zone = %s WHERE id = %s",
                team_row(team),
            )
            if changed.rowcount == 0:
                raise NotKnown(f"there is no team {team.id}")

        await self._writer.run(alone(write))

    async def create_key(self, key: Key, digest: bytes) -> None:
        def write(transaction: Transaction) -> None:
            link = transaction.link
            # Teams are never deleted: one that is there now stays.
            if link.number("SELECT count(*) FROM team WHERE id = %s", (key.team,)) == 0:
                raise NotKnown(f"there is no team {key.team}")
            made = link.execute(
                "INSERT INTO key (id, digest, team, name, models, limits, created, expires,"
                " disabled, revoked, pepper)"
                " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
                " ON CONFLICT DO NOTHING",
                key_row(key, digest),
            )
            if made.rowcount == 0:
                raise AlreadyExists(f"there is a key {key.id} already, or one with this secret")

        await self._writer.run(alone(write))

    async def revoke_key(self, key_id: str, at: datetime) -> Key:
        def write(transaction: Transaction) -> Key:
            transaction.link.execute(
                "UPDATE key SET revoked = %s WHERE id = %s AND revoked IS NULL",
                (micros(at), key_id),
            )
            found = transaction.link.execute(_KEY + " WHERE id = %s", (key_id,)).fetchone()
            if found is None:
                raise NotKnown(f"there is no key {key_id}")
            return key_of(found)

        return await self._writer.run(alone(write))

    async def rehash_key(self, old: bytes, new: bytes, pepper: str) -> None:
        def write(transaction: Transaction) -> None:
            transaction.link.execute(
                "UPDATE key SET digest = %s, pepper = %s WHERE digest = %s", (new, pepper, old)
            )

        await self._writer.run(alone(write))

    async def declared_id(self, digests: Sequence[bytes], proposed: str) -> str:
        asked = list(digests)

        def write(transaction: Transaction) -> str:
            link = transaction.link
            # Replicas that start at once must agree.
            link.execute(_DECLARING)
            known = {bytes(digest): str(name) for digest, name in link.execute(_DECLARED, (asked,))}
            name = next((known[digest] for digest in asked if digest in known), proposed)
            link.execute(
                "INSERT INTO declared_key (digest, id)"
                " SELECT digest, %s FROM unnest(%s::bytea[]) AS digest ON CONFLICT DO NOTHING",
                (name, asked),
            )
            return name

        return await self._writer.run(alone(write))

    async def ping(self) -> None:
        await self._reader.ping(PING)
