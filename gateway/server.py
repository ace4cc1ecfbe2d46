"""The sockets: uvicorn, with three things it does not do.

It answers clients that close their sending half, it can drop a connection that takes nothing any
more, and it ends with exit code 0 when it was told to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gateway.api.relayed import ABORT, HUNG_UP, ASGIApp, Scope

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
BACKLOG = 2048


class Connection(HttpToolsProtocol):
    """One client's connection."""

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        # Requests are parsed one after the other, so this scope is the one that began just now.
        scope = cast(Scope, self.scope)
        scope[HUNG_UP] = asyncio.Event()
        scope[ABORT] = self.transport.abort

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """A client that has sent all it wants may still read. It cannot be told from one that has
        left until something is written, so it is noted, and answered."""
        cycle = cast(RequestResponseCycle | None, self.cycle)
        if cycle is None or cycle.response_complete or cycle.more_body:
            return None
        cycle.keep_alive = False
        cast(Scope, cycle.scope)[HUNG_UP].set()
        return True


class Server(uvicorn.Server):
    """A server whose signals end it in order: the first drains, the second does not wait."""

    def __init__(self, config: uvicorn.Config, *, signals: bool) -> None:
        super().__init__(config)
        self._signals = signals

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
        if self.should_exit:
            log.warning("told to end twice: running calls are given up, and expire at their bound")
            os._exit(128 + sig)
        super().handle_exit(sig, frame)


def server(
    app: ASGIApp,
    *,
    drain_seconds: float = 610,
    signals: bool = False,
    trusted_proxies: Sequence[str] = (),
) -> Server:
    """A server for ``app``, to be run with ``serve([socket])``. Only ``trusted_proxies`` (networks)
    may say who the client is."""
    return Server(
        uvicorn.Config(
            app,
            http=Connection,
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
