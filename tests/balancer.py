"""What stands in front of replicas: a TCP balancer that gives each connection to the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

TRIES_SECONDS = 10.0


class Balancer:
    """Connections take turns. A replica that takes none is passed over for that connection, and
    while none takes any, the connection waits, for ``TRIES_SECONDS`` at the most.

    ``ports`` are asked for at each connection, so that replicas may come and go. ``went`` has the
    port of each connection, in their order.
    """

    def __init__(self, ports: Callable[[], Sequence[int]]) -> None:
        self._ports = ports
        self.went: list[int] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def base_url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    async def __aenter__(self) -> Balancer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=2048)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            behind, to = await self._connect()
            there = asyncio.create_task(_copy(reader, to))
            try:
                await _copy(behind, writer)
            finally:
                there.cancel()
                to.close()
                await asyncio.gather(there, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            return
        finally:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        until = loop.time() + TRIES_SECONDS
        while True:
            ports = self._ports()
            turn = len(self.went)
            for place in range(len(ports)):
                port = ports[(turn + place) % len(ports)]
                self.went.append(port)
                with suppress(OSError):
                    return await asyncio.open_connection("127.0.0.1", port)
                self.went.pop()
            if loop.time() > until:
                raise ConnectionRefusedError("no replica takes connections")
            await asyncio.sleep(0.05)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A client that leaves is told on: its replica sees the end at once."""
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
