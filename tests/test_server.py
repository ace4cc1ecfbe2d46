"""A server that is one of several on a socket, and rests while it is full."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from gateway import server as module
from gateway.server import Server, listen, server
from tests.valkey import eventually

ROOM = 20


async def app(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


class Crowd:
    """Connections that say nothing."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._inside: list[asyncio.StreamWriter] = []

    async def come(self) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._inside.append(writer)

    async def leave(self) -> None:
        for one in self._inside:
            one.close()
            await one.wait_closed()
        self._inside.clear()

    async def status(self) -> int:
        """Of one more, that asks."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        said = await reader.read()
        writer.close()
        await writer.wait_closed()
        return int(said.split()[1])


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Server, Crowd, list[bool]]]:
    """The server, who comes to it, and what it said of being full."""
    said: list[bool] = []
    listening = listen("127.0.0.1", 0)
    one = server(app, max_connections=ROOM, say_full=said.append, drain_seconds=1)
    task = asyncio.create_task(one.serve([listening]))
    await eventually(lambda: one.started)
    crowd = Crowd(listening.getsockname()[1])
    yield one, crowd, said
    await crowd.leave()
    one.should_exit = True
    await task
    listening.close()


@contextmanager
def no_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/proc/self/fd"))) + 1
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        try:
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


async def test_one_that_cannot_accept_again_for_want_of_descriptors_tries_until_it_can(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving() as (one, crowd, said):
        for _ in range(ROOM):
            await crowd.come()
        await eventually(lambda: said == [True])
        assert not one.servers
        with no_descriptors():
            one.wake()
            await eventually(lambda: "nothing is accepted" in caplog.text)
        await crowd.leave()
        await eventually(lambda: bool(one.servers))
        assert await crowd.status() == 200


async def test_one_that_is_told_that_nobody_has_room_goes_on_to_refuse(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waiting = 1
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(module, "_waiting", lambda _: waiting)
    async with serving() as (one, crowd, said):
        for _ in range(ROOM):
            await crowd.come()
        await eventually(lambda: "no other worker takes who waits" in caplog.text)
        # It refuses until its next look; what it is told meanwhile is the last word.
        waiting = 0
        one.rest()
        one.wake()
        for _ in range(3):
            assert await crowd.status() == 503
            await asyncio.sleep(0.06)  # longer than until its next look, were there one
        assert one.servers
        assert said == [True]


async def test_a_queue_that_is_worked_off_is_not_taken_for_one_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = 0

    def waiting(_: object) -> int:
        nonlocal looks
        looks += 1
        return 1 + looks % 2

    monkeypatch.setattr(module, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(module, "_waiting", waiting)
    async with serving() as (one, crowd, _):
        for _ in range(ROOM):
            await crowd.come()
        await eventually(lambda: looks > 5 * module.LOOKS)
        assert not one.servers
