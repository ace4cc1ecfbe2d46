"""The directory in this process's memory: for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from gateway.domain.team import Key, Team
from gateway.ports import AlreadyExists, NotKnown


class MemoryDirectory:
    """``Directory`` without durability."""

    def __init__(self) -> None:
        self._teams: dict[str, Team] = {}
        self._keys: dict[str, Key] = {}
        self._digests: dict[bytes, str] = {}
        self._declared: dict[bytes, str] = {}

    async def find_key(self, digest: bytes) -> tuple[Team, Key] | None:
        await asyncio.sleep(0)
        key_id = self._digests.get(digest)
        if key_id is None:
            return None
        key = self._keys[key_id]
        return self._teams[key.team], key

    async def teams(self) -> list[Team]:
        await asyncio.sleep(0)
        return sorted(self._teams.values(), key=lambda team: team.id)

    async def some_teams(self, most: int) -> list[Team]:
        return [team for team in await self.teams() if not team.disabled][:most]

    async def keys(self, team: str | None = None) -> list[Key]:
        await asyncio.sleep(0)
        found = (key for key in self._keys.values() if team is None or key.team == team)
        return sorted(found, key=lambda key: (key.team, key.id))

    async def teams_behind(self, after: str, most: int) -> list[Team]:
        return [team for team in await self.teams() if team.id > after][:most]

    async def keys_behind(self, after: str, most: int) -> list[tuple[Team, Key]]:
        return await self.keys_named(sorted(key for key in self._keys if key > after)[:most])

    async def teams_named(self, ids: Sequence[str]) -> list[Team]:
        await asyncio.sleep(0)
        return [self._teams[name] for name in ids if name in self._teams]

    async def keys_named(self, ids: Sequence[str]) -> list[tuple[Team, Key]]:
        await asyncio.sleep(0)
        found = [self._keys[name] for name in ids if name in self._keys]
        return [(self._teams[key.team], key) for key in found]

    async def create_team(self, team: Team) -> None:
        await asyncio.sleep(0)
        if team.id in self._teams:
            raise AlreadyExists(f"there is a team {team.id} already")
        self._teams[team.id] = replace(team, declared=False)

    async def update_team(self, team: Team) -> None:
        await asyncio.sleep(0)
        if team.id not in self._teams:
            raise NotKnown(f"there is no team {team.id}")
        self._teams[team.id] = replace(team, declared=False)

    async def create_key(self, key: Key, digest: bytes) -> None:
        await asyncio.sleep(0)
        if key.team not in self._teams:
            raise NotKnown(f"there is no team {key.team}")
        if key.id in self._keys or digest in self._digests:
            raise AlreadyExists(f"there is a key {key.id} already, or one with this secret")
        self._keys[key.id] = replace(key, declared=False)
        self._digests[digest] = key.id

    async def revoke_key(self, key_id: str, at: datetime) -> Key:
        await asyncio.sleep(0)
        key = self._keys.get(key_id)
        if key is None:
            raise NotKnown(f"there is no key {key_id}")
        if key.revoked is None:
            key = self._keys[key_id] = replace(key, revoked=at)
        return key

    async def rehash_key(self, old: bytes, new: bytes, pepper: str) -> None:
        await asyncio.sleep(0)
        key_id = self._digests.pop(old, None)
        if key_id is not None:
            self._digests[new] = key_id
            self._keys[key_id] = replace(self._keys[key_id], pepper=pepper)

    async def declared_id(self, digests: Sequence[bytes], proposed: str) -> str:
        await asyncio.sleep(0)
        known = (self._declared[digest] for digest in digests if digest in self._declared)
        key_id = next(known, proposed)
        for digest in digests:
            self._declared.setdefault(digest, key_id)
        return key_id

    async def ping(self) -> None:
        await asyncio.sleep(0)
