"""Sends an answer, or breaks it where a rule says so.

ASGI has no word for closing a connection in the middle of a body. The sandbox's own server puts
one into the scope (``CLOSE``); under any other server a cut ends in an exception after a partial
body, on which servers close the connection too, with a line in their log. Before any header those
answer 500 instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from starlette.types import Receive, Scope, Send

from gateway.sandbox.rules import Rule
from gateway.sandbox.watch import Gate

CLOSE = "gateway.sandbox.close"
"""The scope's extension whose ``close`` ends the connection once what was sent has left."""


class ConnectionCut(Exception):
    """A rule closed the connection, or the sandbox is stopping: the request ends here."""


class Wire:
    """One answer on its way out. ``closing`` ends every pause when the sandbox stops."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        rule: Rule,
        closing: Gate,
        started: Callable[[int], None],
    ) -> None:
        extensions = scope.get("extensions") or {}
        self._close: Callable[[], None] | None = extensions.get(CLOSE, {}).get("close")
        self._receive, self._send = receive, send
        self._rule, self._closing, self._started = rule, closing, started
        self._left = rule.cut_after_bytes

    async def pause(self, seconds: float) -> None:
        """Sleeps. Raises ``ConnectionCut`` if the sandbox stops meanwhile."""
        if seconds > 0:
            try:
                async with asyncio.timeout(seconds):
                    await self._closing.until(self._closing.is_set)
            except TimeoutError:
                return
        if self._closing.is_set():
            await self.cut()

    async def hold(self, gate: Gate) -> None:
        """Waits for a gate of a rule's. Raises ``ConnectionCut`` if the sandbox stops first."""
        held = asyncio.ensure_future(gate.wait())
        closed = asyncio.ensure_future(self._closing.until(self._closing.is_set))
        try:
            await asyncio.wait({held, closed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            held.cancel()
            closed.cancel()
            await asyncio.gather(held, closed, return_exceptions=True)
        if not gate.is_set():
            await self.cut()

    async def answer(self, status: int, headers: Sequence[tuple[str, str]], body: bytes) -> None:
        """A whole answer of known length."""
        await self.start(status, [*headers, ("content-length", str(len(body)))])
        await self.write(body)
        await self.end()

    async def start(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        self._started(status)
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def write(self, data: bytes) -> None:
        """A piece of the body, dripped or cut by the rule; flushed before this returns."""
        drip = self._rule.drip
        size = len(data) if drip is None else drip.size_bytes
        for start in range(0, len(data), max(1, size)):
            if start and drip is not None:
                await self.pause(drip.seconds)
            await self._write(data[start : start + size])

    async def end(self) -> None:
        if self._left is not None:
            # The body was shorter than the place of the cut: its last byte is the place then.
            await self.cut()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def cut(self) -> None:
        """Closes the connection. Always raises ``ConnectionCut``."""
        if self._close is not None:
            self._close()
            while (await self._receive())["type"] != "http.disconnect":
                pass
        raise ConnectionCut

    async def _write(self, data: bytes) -> None:
        piece = data if self._left is None else data[: self._left]
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        if self._left is not None:
            self._left -= len(piece)
            if not self._left:
                await self.cut()

    @property
    def closes(self) -> bool:
        """Whether the server can close a connection when asked."""
        return self._close is not None
