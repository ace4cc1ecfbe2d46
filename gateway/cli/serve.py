"""`gateway serve`: the gateway itself, until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click

from gateway.app import Gateway, open_gateway
from gateway.assembly import read_peppers
from gateway.cli.common import (
    config_option,
    failures,
    load_settings,
    open_socket,
    origin_of,
    warn,
)
from gateway.clock import SystemClock
from gateway.domain.keys import PepperState, pepper_state
from gateway.filewatch import FileWatch
from gateway.loop import run
from gateway.reload import reload_when
from gateway.server import Server, server
from gateway.settings import ConfigError, Settings, load
from gateway.supervisor import Inheritance, Supervisor
from gateway.telemetry.log import configure


@dataclass(frozen=True, slots=True)
class Reading:
    """``read`` reads the configuration as this process was started with it; ``watch`` knows the
    files that it was read from."""

    read: Callable[[], Awaitable[Settings]]
    watch: FileWatch


@click.command()
@config_option
@click.option("--host", help="Listen here instead of server.host.")
@click.option("--port", type=click.IntRange(0, 65535), help="Listen here instead of server.port.")
@click.option(
    "--workers", type=click.IntRange(1, 256), help="So many processes instead of server.workers."
)
@click.option("--inherited", hidden=True, help="What the supervisor gives to a worker.")
def serve(
    config: Path | None,
    host: str | None,
    port: int | None,
    workers: int | None,
    inherited: str | None,
) -> None:
    """Serve the gateway until SIGTERM or Ctrl-C.

    The first signal lets running requests finish (server.drain_seconds), a second one does not.
    SIGHUP, or a change of its files, has the configuration read again: upstreams, models, prices,
    the rules of the cache, relay, notify, peppers, and teams with their keys and limits change at
    once, all of it or nothing; everything else with the next start.
    """
    # Until there is somebody to hear it: it must not end what only starts.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    settings = load_settings(config)
    if inherited is None:
        warn(settings)
    configure(settings.log.level.value, settings.log.format.value)
    settings = _with_workers(settings, workers, quiet=inherited is not None)
    host = settings.server.host if host is None else host
    port = settings.server.port if port is None else port

    watch = FileWatch(settings.sources)

    async def read() -> Settings:
        try:
            found = await asyncio.to_thread(load, config, os.environ)
        except ConfigError as error:
            watch.read(error.sources)
            raise
        watch.only(found.sources)
        return _with_workers(found, workers, quiet=True)

    with failures():
        if inherited is not None:
            run(_work(settings, Inheritance.parse(inherited), Reading(read, watch)))
        elif settings.server.workers > 1:
            sys.exit(asyncio.run(_supervise(settings, host, port)))
        else:
            run(_serve_alone(settings, host, port, Reading(read, watch)))


def _with_workers(settings: Settings, asked: int | None, *, quiet: bool) -> Settings:
    """The settings with as many workers as there will be."""
    workers = settings.server.workers if asked is None else asked
    if workers > 1 and settings.storage.redis is None:
        if not quiet:
            click.echo(
                f"gateway: server.workers is {workers}, but limits are shared only through "
                "storage.redis: running 1",
                err=True,
            )
        workers = 1
    return replace(settings, server=replace(settings.server, workers=workers))


async def _supervise(settings: Settings, host: str, port: int) -> int:
    raise_file_limit()
    with contextlib.ExitStack() as stack:
        sockets = _listen(stack, settings, host, port)
        origin = origin_of(sockets[0])
        supervisor = Supervisor(
            # As this process was started, whatever that was.
            [sys.executable, *sys.orig_argv[1:], "--inherited"],
            settings.server.workers,
            sockets,
            SystemClock(),
            lambda: _say_origin(origin),
        )
        return await supervisor.run()


async def _work(settings: Settings, inheritance: Inheritance, reading: Reading) -> None:
    """One of several workers."""
    listening, *monitoring = inheritance.sockets
    await _serve(settings, listening, monitoring, reading, inheritance)


async def _serve_alone(settings: Settings, host: str, port: int, reading: Reading) -> None:
    raise_file_limit()
    with contextlib.ExitStack() as stack:
        listening, *monitoring = _listen(stack, settings, host, port)
        await _serve(settings, listening, monitoring, reading)


def _listen(
    stack: contextlib.ExitStack, settings: Settings, host: str, port: int
) -> list[socket.socket]:
    """The socket of the doors and, where it is another one, that of the metrics."""

    def opened(port: int, port_setting: str) -> socket.socket:
        return stack.enter_context(
            open_socket(host, port, host_setting="--host or server.host", port_setting=port_setting)
        )

    sockets = [opened(port, "--port or server.port")]
    if settings.server.metrics_port is not None:
        sockets.append(opened(settings.server.metrics_port, "server.metrics_port"))
    return sockets


def _say_origin(origin: str) -> None:
    click.echo(f"gateway: serving on {origin}/v1", err=True)


async def _serve(
    settings: Settings,
    listening: socket.socket,
    monitoring: list[socket.socket],
    reading: Reading,
    inheritance: Inheritance | None = None,
) -> None:
    give_memory_back()
    async with contextlib.AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(open_gateway(settings, SystemClock()))
        if monitoring:
            monitor = server(gateway.metrics_app, drain_seconds=1)
            watching = asyncio.create_task(monitor.serve(monitoring))
            stack.push_async_callback(_stop, monitor, watching)
        first = inheritance is None or inheritance.number == 0
        if first and not settings.declared_keys and not await gateway.directory.keys():
            click.echo(
                "warning: nobody has a key yet: declare a team in the configuration, or make one "
                "with gateway team create and gateway key create",
                err=True,
            )
        if first:
            await _warn_of_old_peppers(settings, gateway)
        told = asyncio.Event()
        # Before anybody hears that it serves: who is told so may send it.
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, told.set)
        reloading = asyncio.create_task(
            reload_when(
                told,
                lambda: gateway.reload(reading.read),
                reading.watch,
                settings.server.watch_seconds,
            )
        )
        stack.callback(reloading.cancel)
        # What was built so far lives as long as the process: the collector need not look at it.
        gc.freeze()
        gc.set_threshold(NEW_OBJECTS)
        main = server(
            gateway.app,
            drain_seconds=settings.server.drain_seconds,
            signals=True,
            trusted_proxies=[str(network) for network in settings.server.trusted_proxies],
            draining=gateway.drain,
            max_connections=gateway.max_connections,
            refused=gateway.connection_refused,
            say_full=None if inheritance is None else inheritance.say_full,
        )
        if inheritance is None:
            _say_origin(origin_of(listening))
        else:
            inheritance.serve(lambda: _drain(main), rest=main.rest, wake=main.wake)
        await main.serve([listening])


async def _warn_of_old_peppers(settings: Settings, gateway: Gateway) -> None:
    now, made = SystemClock().now(), await gateway.directory.keys()
    peppers = read_peppers(settings)
    states = [
        pepper_state(key, peppers)
        for key in made
        if key.revoked is None and (key.expires is None or key.expires > now)
    ]
    if old := states.count(PepperState.OLD):
        click.echo(
            f"warning: {old} keys were not used since the pepper changed: they need "
            "storage.old_peppers (gateway key list shows them)",
            err=True,
        )
    if lost := states.count(PepperState.LOST):
        click.echo(
            f"warning: {lost} keys were made with a pepper that is not configured, and are "
            "refused: put it into storage.old_peppers (gateway key list shows them)",
            err=True,
        )


def _drain(main: Server) -> None:
    """As the first signal does; one that drains already is not told twice."""
    if not main.ending:
        main.handle_exit(signal.SIGTERM, None)


async def _stop(monitor: Server, watching: asyncio.Task[None]) -> None:
    monitor.should_exit = True
    await watching


def raise_file_limit() -> None:
    """Lets the process have as many connections as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


NEW_OBJECTS = 10_000
"""The collector looks for cycles after so many. Python's 700 are two requests, and took 380 us of
the CPU of each; these take 200. 50,000 take 150, but stop the process for 50 ms at a time."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Of glibc's malloc.h."""
KEPT_FREE_BYTES = 16 * 1024 * 1024
"""At the end of the heap. With glibc's 128 KiB each picture that is let go is given back, and the
next one's 660 pages are mapped and cleared anew: a third of what a picture from Redis costs."""


def give_memory_back() -> None:
    """Keeps a burst of pictures from staying in the process as holes between what still lives.

    glibc keeps an arena for each thread, and the larger a piece it has freed, the larger those it
    cuts from an arena. 300 answers of 2.7 MB at once: 600 MB at the peak and 540 after, against
    350 and 150. Other C libraries have no such knobs.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, 64 * 1024)
        mallopt(M_TRIM_THRESHOLD, KEPT_FREE_BYTES)
