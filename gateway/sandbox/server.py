"""Runs the sandbox on a loopback port: in a thread of its own, or in the running loop.

::

    with SandboxServer(clock) as server:
        OpenAI(base_url=server.base_url, api_key="any").images.generate(...)
        assert server.journal[0].usage == {...}

    async with serve_sandbox(clock) as server: ...
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.ports import Clock
from gateway.sandbox.app import SandboxApp, create_sandbox
from gateway.sandbox.exchange import Sandbox
from gateway.sandbox.journal import Journal
from gateway.sandbox.rules import Rules
from gateway.sandbox.watch import Gate
from gateway.sandbox.wire import CLOSE

START_SECONDS = 10.0
STOP_SECONDS = 10.0


class _Protocol(HttpToolsProtocol):
    """uvicorn's own, which also tells the app how to close the connection."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {CLOSE: {"close": self.transport.close}}


class _Server(uvicorn.Server):
    """uvicorn without its hold on the process's signals, and with an end that waits for nobody."""

    def __init__(self, app: SandboxApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                # Longer than any test keeps a connection: no client meets one being closed.
                timeout_keep_alive=75,
            )
        )
        self.ready = Gate()
        self.stopping = Gate()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    async def main_loop(self) -> None:
        """uvicorn's own looks for its end ten times a second; a test suite starts hundreds."""
        ticking = asyncio.ensure_future(super().main_loop())
        await self.stopping.until(self.stopping.is_set)
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drops every connection, and waits only for the requests to notice."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        tasks = set(self.server_state.tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_SECONDS)
        # One turn of the loop, for the dropped connections to close their sockets.
        await asyncio.sleep(0)
        for listening in sockets or []:
            listening.close()


class RunningSandbox:
    """A sandbox that listens."""

    def __init__(self, sandbox: Sandbox, host: str, port: int) -> None:
        self.sandbox = sandbox
        self.host, self.port = host, port

    @property
    def base_url(self) -> str:
        """For an SDK or an upstream's setting: ``http://127.0.0.1:PORT/v1``."""
        return f"{self.origin}/v1"

    @property
    def origin(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def rules(self) -> Rules:
        return self.sandbox.rules

    @property
    def journal(self) -> Journal:
        return self.sandbox.journal


class SandboxServer(RunningSandbox):
    """A sandbox in a thread with a loop of its own. The port is bound when this is made."""

    def __init__(
        self,
        clock: Clock,
        *,
        rules: Rules | None = None,
        journal: Journal | None = None,
        latency_seconds: float = 0,
        control: bool = False,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        app = create_sandbox(
            clock, rules=rules, journal=journal, latency_seconds=latency_seconds, control=control
        )
        self._socket = _listen(host, port)
        super().__init__(app.state.sandbox, host, self._socket.getsockname()[1])
        self._server = _Server(app)
        self._thread = threading.Thread(target=self._run, name="sandbox", daemon=True)

    def __enter__(self) -> SandboxServer:
        self._thread.start()
        self._server.ready.wait_until(self._server.ready.is_set, START_SECONDS)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sandbox.close()
        self._server.stopping.set()
        self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._server.serve([self._socket]))


@asynccontextmanager
async def serve_sandbox(
    clock: Clock,
    *,
    rules: Rules | None = None,
    journal: Journal | None = None,
    latency_seconds: float = 0,
    control: bool = False,
    host: str = "127.0.0.1",
    port: int = 0,
    listening: socket.socket | None = None,
) -> AsyncIterator[RunningSandbox]:
    """A sandbox in the running loop, until the block is left. A socket that listens already is
    taken in place of ``host`` and ``port``, and closed."""
    app = create_sandbox(
        clock, rules=rules, journal=journal, latency_seconds=latency_seconds, control=control
    )
    if listening is None:
        listening = _listen(host, port)
    server = _Server(app)
    serving = asyncio.create_task(server.serve([listening]))
    try:
        await server.ready.until(server.ready.is_set)
        yield RunningSandbox(app.state.sandbox, *listening.getsockname()[:2])
    finally:
        app.state.sandbox.close()
        server.stopping.set()
        await serving


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket: the port is known, and nobody else's, before the server starts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named; without it a small answer waits
    # 40 ms for the client's delayed acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(1024)
    except OSError:
        listening.close()
        raise
    return listening
