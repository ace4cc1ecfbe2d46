"""Whose the ids are that live at upstreams, in this process's memory: for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from gateway.domain.owned import Owned, OwnedKind
from gateway.stores.memory_rows import MemoryRows
from gateway.stores.rows import EPOCH, purpose_of


class MemoryOwnership:
    """``Ownership`` without durability. What was disowned has expired in 1970."""

    def __init__(self, rows: MemoryRows) -> None:
        self._rows = rows

    async def record(self, owned: Sequence[Owned]) -> None:
        await asyncio.sleep(0)
        kept = self._rows.owned
        for one in owned:
            known = kept.setdefault(one.id, one)
            if known.team == one.team:
                kept[one.id] = replace(
                    known, expires=one.expires, size_bytes=one.size_bytes, detail=one.detail
                )

    async def find(self, team: str, ids: Sequence[str], now: datetime) -> dict[str, Owned]:
        await asyncio.sleep(0)
        found = (self._rows.owned.get(id) for id in dict.fromkeys(ids))
        return {one.id: one for one in found if one and one.team == team and _lives(one, now)}

    async def others(self, team: str, ids: Sequence[str], now: datetime) -> frozenset[str]:
        await asyncio.sleep(0)
        found = (self._rows.owned.get(id) for id in ids)
        return frozenset(one.id for one in found if one and one.team != team and _lives(one, now))

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
        await asyncio.sleep(0)
        theirs = [one for one in self._rows.owned.values() if (one.team, one.kind) == (team, kind)]
        theirs.sort(key=lambda one: (one.created, one.id), reverse=newest_first)
        if after:
            places = [place for place, one in enumerate(theirs, 1) if one.id == after]
            theirs = theirs[places[0] :] if places else []
        page = (
            one
            for one in theirs
            if _lives(one, now) and (not purpose or purpose_of(one) == purpose)
        )
        return list(page)[:limit]

    async def total_bytes(self, team: str, kind: OwnedKind, now: datetime) -> int:
        await asyncio.sleep(0)
        return sum(
            one.size_bytes
            for one in self._rows.owned.values()
            if (one.team, one.kind) == (team, kind) and _lives(one, now)
        )

    async def disown(self, team: str, id: str) -> bool:
        await asyncio.sleep(0)
        one = self._rows.owned.get(id)
        if one is None or one.team != team or one.expires == EPOCH:
            return False
        self._rows.owned[id] = replace(one, expires=EPOCH, detail={})
        return True

    async def forget_expired(self, now: datetime, limit: int = 1000) -> int:
        await asyncio.sleep(0)
        over = [id for id, one in self._rows.owned.items() if not _lives(one, now)][:limit]
        for id in over:
            del self._rows.owned[id]
        return len(over)


def _lives(one: Owned, now: datetime) -> bool:
    return one.expires is None or one.expires > now
