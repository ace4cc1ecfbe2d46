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
)

_TEAM = f"SELECT {TEAM_COLUMNS} FROM team"  # noqa: S608 - names of columns
_SOME_TEAMS = _TEAM + " WHERE disabled = 0 ORDER BY id LIMIT %s"
_KEY = f"SELECT {KEY_COLUMNS} FROM key"  # noqa: S608 - names of columns
_BEHIND = " WHERE id > %s ORDER BY id LIMIT %s"
_NAMED = " WHERE id = ANY(%s::text[])"
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

    async def teams_behind(self, after: str, most: int) -> list[Team]:
        return await self._reader.run(lambda link: _teams(link, _BEHIND, after, most))

    async def keys_behind(self, after: str, most: int) -> list[tuple[Team, Key]]:
        return await self._reader.run(lambda link: _keys(link, _BEHIND, after, most))

    async def teams_named(self, ids: Sequence[str]) -> list[Team]:
        asked = list(ids)
        return await self._reader.run(lambda link: _teams(link, _NAMED, asked))

    async def keys_named(self, ids: Sequence[str]) -> list[tuple[Team, Key]]:
        asked = list(ids)
        return await self._reader.run(lambda link: _keys(link, _NAMED, asked))

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


def _teams(link: Link, which: str, *asked: object) -> list[Team]:
    return [team_of(row) for row in link.execute(_TEAM + which, asked)]


def _keys(link: Link, which: str, *asked: object) -> list[tuple[Team, Key]]:
    keys = [key_of(row) for row in link.execute(_KEY + which, asked)]
    # Teams are never deleted, so each key's is there by now.
    theirs = list({key.team for key in keys})
    teams = {team.id: team for team in _teams(link, _NAMED, theirs)}
    return [(teams[key.team], key) for key in keys]
