"""When a gateway under test has seen that a client left: a test that goes on before that races with
the gateway's socket.

::

    before = departures.seen["reset"]
    leave(client, "reset")
    await departures.more_than("reset", before)
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from gateway.protocol import Connection


@dataclass
class Departures:
    """Sees what the gateway's sockets see: ends of what clients send, and ends of connections."""

    seen: dict[str, int] = field(default_factory=lambda: {"fin": 0, "reset": 0})
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, how: str) -> None:
        self.seen[how] += 1
        self._news.set()

    async def more_than(self, how: str, count: int) -> None:
        async with asyncio.timeout(30):
            while self.seen[how] <= count:
                self._news.clear()
                await self._news.wait()
        for _ in range(5):  # turns of the loop, for those whom the connection tells in turn
            await asyncio.sleep(0)


def watch_departures(monkeypatch: pytest.MonkeyPatch) -> Departures:
    """Watches every connection of every gateway in this process."""
    watched = Departures()
    eof, lost = Connection.eof_received, Connection.connection_lost

    def eof_received(self: Connection) -> bool | None:
        said = eof(self)
        watched.note("fin")
        return said

    def connection_lost(self: Connection, error: Exception | None) -> None:
        lost(self, error)
        watched.note("reset")

    monkeypatch.setattr(Connection, "eof_received", eof_received)
    monkeypatch.setattr(Connection, "connection_lost", connection_lost)
    return watched
