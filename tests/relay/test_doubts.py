"""How long an answer that was sent is in doubt."""

from __future__ import annotations

import asyncio

import pytest

from gateway.relay import doubts
from gateway.relay.doubts import TICK_SECONDS, TICKS, Doubts


class Ended:
    """When each doubt ended, by the loop's clock."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}
        self._changed = asyncio.Event()

    def __call__(self, rid: str) -> None:
        self.at[rid] = asyncio.get_running_loop().time()
        self._changed.set()

    async def has(self, rid: str) -> float:
        while rid not in self.at:
            self._changed.clear()
            await self._changed.wait()
        return self.at[rid]


def closed() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


async def test_one_that_is_gone_keeps_nobody_else_in_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doubts, "RETRY_SECONDS", 60.0)
    loop, ended = asyncio.get_running_loop(), Ended()
    found = Doubts(ended)
    found.add("open", asyncio.Event())
    found.add("gone", closed())
    await ended.has("open")
    # From here on the timer only waits for who is gone.
    began = loop.time()
    found.add("next", asyncio.Event())
    async with asyncio.timeout(30):
        waited = await ended.has("next") - began
    assert waited >= TICKS * TICK_SECONDS
    assert found.close() == ["gone"]


async def test_who_is_gone_may_come_back_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubts, "RETRY_SECONDS", 0.2)
    ended = Ended()
    found = Doubts(ended)
    found.add("gone", closed())
    found.add("open", asyncio.Event())
    gone = await ended.has("gone")
    assert gone - ended.at["open"] >= 0.2
    assert found.close() == []
