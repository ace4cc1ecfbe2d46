"""The directory on SQLite: teams and keys that commands made."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from datetime import datetime

from gateway.domain.team import Key, Team
from gateway.ports import AlreadyExists, NotKnown
from gateway.stores.rows import (
    KEY_COLUMNS,
    TEAM_COLUMNS,
    key_of,
    key_row,
    micros,
    team_of,
    team_row,
)
from gateway.stores.sqlite_file import Reader, Writer
from gateway.stores.sqlite_rows import PING, exists

_TEAM = f"SELECT {TEAM_COLUMNS} FROM team"  # noqa: S608 - names of columns
_SOME_TEAMS = _TEAM + " WHERE disabled = 0 ORDER BY id LIMIT ?"
_KEY = f"SELECT {KEY_COLUMNS} FROM key"  # noqa: S608 - names of columns
_BEHIND = " WHERE id > ? ORDER BY id LIMIT ?"
_NAMED = " WHERE id IN (SELECT value FROM json_each(?))"
_DECLARED = "SELECT id FROM declared_key WHERE digest = ?"


class SQLiteDirectory:
    """``Directory`` on SQLite."""

    def __init__(self, writer: Writer, reader: Reader) -> None:
        self._writer = writer
        self._reader = reader

    async def find_key(self, digest: bytes) -> tuple[Team, Key] | None:
        def read(db: sqlite3.Connection) -> tuple[Team, Key] | None:
            found = db.execute(_KEY + " WHERE digest = ?", (digest,)).fetchone()
            if found is None:
                return None
            key = key_of(found)
            team = db.execute(_TEAM + " WHERE id = ?", (key.team,)).fetchone()
            return team_of(team), key

        return await self._reader.run(read)

    async def teams(self) -> list[Team]:
        rows = await self._reader.run(lambda db: db.execute(_TEAM + " ORDER BY id").fetchall())
        return [team_of(row) for row in rows]

    async def some_teams(self, most: int) -> list[Team]:
        rows = await self._reader.run(lambda db: db.execute(_SOME_TEAMS, (most,)).fetchall())
        return [team_of(row) for row in rows]

    async def keys(self, team: str | None = None) -> list[Key]:
        rows = await self._reader.run(
            lambda db: db.execute(
                _KEY + " WHERE :team IS NULL OR team = :team ORDER BY team, id", {"team": team}
            ).fetchall()
        )
        return [key_of(row) for row in rows]

    async def teams_behind(self, after: str, most: int) -> list[Team]:
        return await self._reader.run(lambda db: _teams(db, _BEHIND, after, most))

    async def keys_behind(self, after: str, most: int) -> list[tuple[Team, Key]]:
        return await self._reader.run(lambda db: _keys(db, _BEHIND, after, most))

    async def teams_named(self, ids: Sequence[str]) -> list[Team]:
        asked = json.dumps(list(ids))
        return await self._reader.run(lambda db: _teams(db, _NAMED, asked))

    async def keys_named(self, ids: Sequence[str]) -> list[tuple[Team, Key]]:
        asked = json.dumps(list(ids))
        return await self._reader.run(lambda db: _keys(db, _NAMED, asked))

    async def create_team(self, team: Team) -> None:
        def write(db: sqlite3.Connection) -> None:
            if exists(db, "SELECT 1 FROM team WHERE id = ?", team.id):
                raise AlreadyExists(f"there is a team {team.id} already")
            db.execute(
                "INSERT INTO team (models, limits, cache_enabled, disabled, time_zone, id)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                team_row(team),
            )

        await self._writer.submit(write)

    async def update_team(self, team: Team) -> None:
        def write(db: sqlite3.Connection) -> None:
            changed = db.execute(
                "UPDATE team SET models = ?, limits = ?, cache_enabled = ?, disabled = ?,"
                " time_zone = ? WHERE id = ?",
                team_row(team),
            )
            if changed.rowcount == 0:
                raise NotKnown(f"there is no team {team.id}")

        await self._writer.submit(write)

    async def create_key(self, key: Key, digest: bytes) -> None:
        def write(db: sqlite3.Connection) -> None:
            if not exists(db, "SELECT 1 FROM team WHERE id = ?", key.team):
                raise NotKnown(f"there is no team {key.team}")
            if exists(db, "SELECT 1 FROM key WHERE id = ?", key.id) or exists(
                db, "SELECT 1 FROM key WHERE digest = ?", digest
            ):
                raise AlreadyExists(f"there is a key {key.id} already, or one with this secret")
            db.execute(
                "INSERT INTO key (id, digest, team, name, models, limits, created, expires,"
                " disabled, revoked, pepper) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                key_row(key, digest),
            )

        await self._writer.submit(write)

    async def revoke_key(self, key_id: str, at: datetime) -> Key:
        def write(db: sqlite3.Connection) -> Key:
            db.execute(
                "UPDATE key SET revoked = ? WHERE id = ? AND revoked IS NULL",
                (micros(at), key_id),
            )
            found = db.execute(_KEY + " WHERE id = ?", (key_id,)).fetchone()
            if found is None:
                raise NotKnown(f"there is no key {key_id}")
            return key_of(found)

        return await self._writer.submit(write)

    async def rehash_key(self, old: bytes, new: bytes, pepper: str) -> None:
        def write(db: sqlite3.Connection) -> None:
            db.execute("UPDATE key SET digest = ?, pepper = ? WHERE digest = ?", (new, pepper, old))

        await self._writer.submit(write)

    async def declared_id(self, digests: Sequence[bytes], proposed: str) -> str:
        def write(db: sqlite3.Connection) -> str:
            known = proposed
            for digest in reversed(digests):  # the newest has the last word
                found = db.execute(_DECLARED, (digest,)).fetchone()
                known = known if found is None else str(found[0])
            db.executemany(
                "INSERT INTO declared_key (digest, id) VALUES (?, ?) ON CONFLICT DO NOTHING",
                [(digest, known) for digest in digests],
            )
            return known

        return await self._writer.submit(write)

    async def ping(self) -> None:
        await self._reader.ping(PING)


# Read whole before anything is made of them: a statement takes the interpreter's lock for each row.
def _teams(db: sqlite3.Connection, which: str, *asked: object) -> list[Team]:
    return [team_of(row) for row in db.execute(_TEAM + which, asked).fetchall()]


def _keys(db: sqlite3.Connection, which: str, *asked: object) -> list[tuple[Team, Key]]:
    keys = [key_of(row) for row in db.execute(_KEY + which, asked).fetchall()]
    theirs = json.dumps(list({key.team for key in keys}))
    teams = {team.id: team for team in _teams(db, _NAMED, theirs)}
    return [(teams[key.team], key) for key in keys]
