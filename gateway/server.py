"""The sockets: uvicorn, with connections of our own, and three things it does not do.

It accepts only as many connections at once as it can count, it goes on listening while it drains,
and it ends with exit code 0 when it was told to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Protocol

import uvicorn

from gateway.api.door import ASGIApp
from gateway.protocol import Connection, Door

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
BACKLOG = 65_535
"""As many as the system lets wait (net.core.somaxconn): for whom there is no room knocks again
after a second, then three, then seven."""
ACCEPTED_AT_ONCE = 16
"""Of connections in one turn of the loop: each is counted before the next turn."""


class Draining(Protocol):
    """What ends in order behind the sockets."""

    def begin(self) -> None:
        """Nothing new is to be taken."""

    async def over(self) -> None:
        """Waits until all that was taken is done."""


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
            # It would look whether a coroutine is called, and hand each request to a wrapper.
            interface="asgi3",
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
