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
import struct
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Protocol

import uvicorn

from gateway.api.door import ASGIApp
from gateway.protocol import ACCEPTED_AT_ONCE, Connection, Door

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
BACKLOG = 65_535
"""As many as the system lets wait (net.core.somaxconn): for whom there is no room knocks again
after a second, then three, then seven."""
LOOK_SECONDS = 0.2
LOOKS = 25
"""Where at so many looks, one after the other, connections wait, and never fewer than at the one
before, one that is full tells them, until its next look, that there is no room: who should take
them may hang."""
REOPEN_SECONDS = 1.0
"""After a failure to accept again."""
_WAITING = struct.Struct("=24xI")
"""Of Linux's tcp_info: on a socket that listens, how many wait to be accepted."""


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

    One of several on a socket does not accept while it is full and another one has room: whoever
    has nothing to do but to refuse would be the first to accept. ``say_full`` tells the others.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        signals: bool,
        door: Door,
        drain_seconds: float,
        draining: Draining | None,
        say_full: Callable[[bool], None] | None,
    ) -> None:
        super().__init__(config)
        self._door = door
        self._say_full = say_full
        self._sockets: Sequence[socket.socket] = ()
        self._opening: asyncio.Task[None] | None = None
        self._looking: asyncio.TimerHandle | None = None
        if say_full is not None:
            door.changed = self._changed
        self._signals = signals
        self._drain_seconds = drain_seconds
        self._draining = draining
        self._ending: asyncio.Task[None] | None = None

    @property
    def ending(self) -> bool:
        """Whether it was told to end."""
        return self._ending is not None or self.should_exit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._sockets = sockets or ()
        await self._open()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stop_looking()
        if self._opening is not None:
            self._opening.cancel()
        self._door.close()
        await super().shutdown(sockets)

    async def _open(self) -> None:
        # Who closes a server closes its sockets: it has some of its own.
        await super().startup([listening.dup() for listening in self._sockets])
        for listening in self._sockets:
            # asyncio accepts as many at once as it lets wait; here the one is far less.
            listening.listen(BACKLOG)
        if self._door.is_shut:
            self._close()

    def _close(self) -> None:
        for one in self.servers:
            one.close()
        self.servers = []

    def _changed(self) -> None:
        """It has become full, or there is room again."""
        if self._say_full is None or self.ending:
            return
        # Until it hears that nobody has room: those who come meanwhile are others' then.
        (self.rest if self._door.is_full else self.wake)()
        self._say_full(self._door.is_full)

    def rest(self) -> None:
        """Accepts nothing while it is full: another worker has room."""
        if self.ending or not self._door.is_full or self._door.is_shut:
            return
        self._door.is_shut = True
        if self._opening is None or self._opening.done():
            self._close()
        self._stop_looking()
        self._look(0, 0)

    def wake(self) -> None:
        """Accepts, if only to refuse: nobody else has room."""
        self._stop_looking()
        if self._door.is_shut:
            self._door.is_shut = False
            if self._opening is None or self._opening.done():
                self._opening = asyncio.get_running_loop().create_task(self._reopen())

    async def _reopen(self) -> None:
        while not self._door.is_shut:
            try:
                await self._open()
            except OSError as error:
                # There may be no file descriptor left for a moment.
                log.error("nothing is accepted, tried again: %s", error)
                self._close()
                await asyncio.sleep(REOPEN_SECONDS)
            else:
                return

    def _look(self, in_vain: int, before: int) -> None:
        """``in_vain``: at so many looks as many waited as at the one before, or more."""
        waiting = sum(map(_waiting, self._sockets))
        in_vain = in_vain + 1 if waiting and waiting >= before else 0
        loop = asyncio.get_running_loop()
        if in_vain < LOOKS:
            self._looking = loop.call_later(LOOK_SECONDS, self._look, in_vain, waiting)
        else:
            log.warning("full, and no other worker takes who waits: they are refused")
            self.wake()
            self._looking = loop.call_later(LOOK_SECONDS, self.rest)

    def _stop_looking(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None

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
        self.wake()

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
    say_full: Callable[[bool], None] | None = None,
) -> Server:
    """A server for ``app``, to be run with ``serve([socket])``. Only ``trusted_proxies`` (networks)
    may say who the client is. ``refused`` hears of each connection over ``max_connections``. Of
    several on one socket, ``say_full`` hears when there is no room, and when there is again."""
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
        say_full=say_full,
    )


def _waiting(listening: socket.socket) -> int:
    """How many connections wait to be accepted; 0 where the system does not say."""
    try:
        said = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _WAITING.size)
        return int(_WAITING.unpack(said)[0])
    except (AttributeError, OSError, struct.error):
        return 0


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
