"""The sockets: uvicorn, with seven things it does not do.

It answers clients that close their sending half, it lets a client that is still uploading read why
it was refused, it refuses what is no HTTP in the shape of every other error, it can drop a
connection that takes nothing any more, it says so when it has no room for another one, it goes on
listening while it drains, and it ends with exit code 0 when it was told to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Protocol, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gateway.api.door import ABORT, CLOSED, HUNG_UP, ASGIApp, Scope
from gateway.api.errors import no_http, no_room

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
BACKLOG = 2048
ACCEPTED_AT_ONCE = 16
"""Of connections in one turn of the loop: each is counted before the next turn."""
TURNED_AWAY = 16
"""How many connections without a place may be open, to hear that there is none."""
LINGER_SECONDS = 10.0
LINGER_BYTES = 256 * 1024 * 1024
"""How much of a refused upload is read and thrown away, so that the refusal arrives."""


class _Lingering:
    """A transport whose ``close`` waits for a client that is still sending.

    Closing a socket with unread bytes resets it, and the reset overtakes the answer: the client
    would see a broken connection, and send the same upload again.
    """

    def __init__(self, transport: asyncio.Transport, linger: Callable[[], bool]) -> None:
        self._transport = transport
        self._linger = linger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        if self._transport.is_closing() or not self._linger():
            self._transport.close()


class Draining(Protocol):
    """What ends in order behind the sockets."""

    def begin(self) -> None:
        """Nothing new is to be taken."""

    async def over(self) -> None:
        """Waits until all that was taken is done."""


class Door:
    """How many connections a server may have; those beyond it are turned away."""

    def __init__(self, limit: int | None, refused: Callable[[], None]) -> None:
        self.limit = limit
        self.refused = refused
        self._away: OrderedDict[asyncio.Transport, None] = OrderedDict()

    def turn_away(self, transport: asyncio.Transport) -> None:
        """Tells a connection that there is no room. It may stay until it has read that, or until
        too many others are told the same."""
        self.refused()
        self._away[transport] = None
        transport.write(no_room())
        transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_SECONDS, transport.close)
        if len(self._away) > TURNED_AWAY:
            oldest, _ = self._away.popitem(last=False)
            oldest.abort()

    def left(self, transport: asyncio.Transport) -> None:
        self._away.pop(transport, None)

    def close(self) -> None:
        for transport in self._away:
            transport.abort()


class Connection(HttpToolsProtocol):
    """One client's connection."""

    _real: asyncio.Transport
    _closed: asyncio.Event
    _door: Door | None = None
    _turned_away = False
    _unwanted_bytes = 0
    _lingers: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._real = transport
        self._closed = asyncio.Event()
        door = self._door
        if door is not None and door.limit is not None and len(self.connections) >= door.limit:
            self._turned_away = True
            door.turn_away(transport)
            return
        super().connection_made(cast(asyncio.Transport, _Lingering(transport, self._linger)))

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        # Requests are parsed one after the other, so this scope is the one that began just now.
        scope = cast(Scope, self.scope)
        scope[HUNG_UP] = asyncio.Event()
        scope[CLOSED] = self._closed
        scope[ABORT] = self._real.abort

    def _linger(self) -> bool:
        """Whether the end waits: the answer is complete, the request is not."""
        cycle = cast(RequestResponseCycle | None, self.cycle)
        if cycle is None or not cycle.response_complete or not cycle.more_body:
            return False
        if self._lingers is None:
            self._lingers = self.loop.call_later(LINGER_SECONDS, self._real.close)
            self._real.write_eof()
            self._real.resume_reading()
        return True

    def _unsupported_upgrade_warning(self) -> None:
        """An upgrade is not made; anybody may ask for one, so it is not worth a line."""

    def timeout_keep_alive_handler(self) -> None:
        """An idle connection is closed; one that does not even take the end of its last answer is
        dropped, since closing would wait for it."""
        if self._real.get_write_buffer_size():
            self._real.abort()
        else:
            super().timeout_keep_alive_handler()

    def shutdown(self) -> None:
        if self._lingers is None:
            super().shutdown()
        else:
            self._real.close()

    def data_received(self, data: bytes) -> None:
        if self._lingers is None and not self._turned_away:
            super().data_received(data)
            return
        self._unwanted_bytes += len(data)
        if self._unwanted_bytes > LINGER_BYTES:
            self._real.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed.set()
        if self._turned_away:
            if self._door is not None:
                self._door.left(self._real)
            return
        if self._lingers is not None:
            self._lingers.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """For bytes that no parser takes. uvicorn's own says it in plain text."""
        self.transport.write(no_http())
        self.transport.close()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """A client that has sent all it wants may still read. It cannot be told from one that has
        left until something is written, so it is noted, and answered."""
        cycle = cast(RequestResponseCycle | None, self.cycle)
        if self._turned_away or cycle is None or cycle.response_complete or cycle.more_body:
            self._closed.set()
            self._real.close()
            return None
        cycle.keep_alive = False
        cast(Scope, cycle.scope)[HUNG_UP].set()
        return True


class Server(uvicorn.Server):
    """A server whose signals end it in order: the first drains, the second does not wait.

    It goes on listening while it drains: who comes then is told where else to go, also by
    `/readyz`, and a retry may still find the answer of the call that it left here.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        signals: bool,
        door: Door,
        drain_seconds: float,
        draining: Draining | None,
    ) -> None:
        super().__init__(config)
        self._door = door
        self._signals = signals
        self._drain_seconds = drain_seconds
        self._draining = draining
        self._ending: asyncio.Task[None] | None = None

    @property
    def ending(self) -> bool:
        """Whether it was told to end."""
        return self._ending is not None or self.should_exit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            # asyncio accepts as many at once as it lets wait; here the one is far less.
            listening.listen(BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._door.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if not self._signals:
            yield
            return
        # The loop drops its handlers when it closes: what still drains behind this is drained too.
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's own waits on at a second SIGTERM, and the calls behind it at any signal."""
        if self.ending:
            log.warning("told to end twice: running calls are given up, and expire at their bound")
            os._exit(128 + sig)
        if connections := len(self.server_state.tasks):
            log.warning(
                "stopping: running requests may finish; a second signal gives them up, and what "
                "they bought is booked at its bound",
                extra={"running": connections, "seconds": self._drain_seconds},
            )
        if self._draining is not None:
            self._draining.begin()
        self._ending = asyncio.get_running_loop().create_task(self._drain(sig))

    async def _drain(self, sig: int) -> None:
        """Then it closes its sockets, and what is still being said has the rest of the time."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._drain_seconds
        try:
            async with asyncio.timeout_at(until):
                if tasks := set(self.server_state.tasks):
                    await asyncio.wait(tasks)
                if self._draining is not None:
                    await self._draining.over()
        except TimeoutError:
            log.warning("the time for running requests is up: what still runs is given up")
        except Exception:
            log.exception("the end did not go in order")
        self.config.timeout_graceful_shutdown = max(0, math.ceil(until - loop.time()))
        super().handle_exit(sig, None)


def server(
    app: ASGIApp,
    *,
    drain_seconds: float = 610,
    signals: bool = False,
    trusted_proxies: Sequence[str] = (),
    draining: Draining | None = None,
    max_connections: int | None = None,
    refused: Callable[[], None] = lambda: None,
) -> Server:
    """A server for ``app``, to be run with ``serve([socket])``. Only ``trusted_proxies`` (networks)
    may say who the client is. ``refused`` hears of each connection over ``max_connections``."""
    door = Door(max_connections, refused)
    return Server(
        uvicorn.Config(
            app,
            http=type("Guarded", (Connection,), {"_door": door}),
            backlog=ACCEPTED_AT_ONCE,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(trusted_proxies),
            forwarded_allow_ips=list(trusted_proxies),
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=round(drain_seconds),
        ),
        signals=signals,
        door=door,
        drain_seconds=drain_seconds,
        draining=draining,
    )


def listen(host: str, port: int, *, next_free: bool = False) -> socket.socket:
    """A listening socket; ``next_free`` takes the next port that is free when this one is taken.

    Raises ``OSError``.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    last = min(port + 100, 65_535) if next_free and port else port
    while True:
        # Named as TCP, or asyncio does not switch Nagle's algorithm off: 46 ms against 1.4 ms.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(BACKLOG)
        except OSError:
            listening.close()
            if port >= last:
                raise
            port += 1
        else:
            listening.setblocking(False)
            return listening
