"""`gateway serve`: the gateway itself, until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import resource
from pathlib import Path

import click

from gateway.app import open_gateway
from gateway.cli.common import (
    config_option,
    failures,
    load_settings,
    open_socket,
    origin_of,
    warn,
)
from gateway.clock import SystemClock
from gateway.server import Server, server
from gateway.settings import Settings
from gateway.telemetry.log import configure


@click.command()
@config_option
@click.option("--host", help="Listen here instead of server.host.")
@click.option("--port", type=click.IntRange(0, 65535), help="Listen here instead of server.port.")
def serve(config: Path | None, host: str | None, port: int | None) -> None:
    """Serve the gateway until SIGTERM or Ctrl-C.

    The first signal lets running requests finish (server.drain_seconds), a second one does not.
    """
    settings = load_settings(config)
    warn(settings)
    configure(settings.log.level.value, settings.log.format.value)
    with failures():
        asyncio.run(
            _serve(
                settings,
                settings.server.host if host is None else host,
                settings.server.port if port is None else port,
            )
        )


async def _serve(settings: Settings, host: str, port: int) -> None:
    raise_file_limit()
    give_memory_back()
    async with contextlib.AsyncExitStack() as stack:
        listening = stack.enter_context(open_socket(host, port))
        gateway = await stack.enter_async_context(open_gateway(settings, SystemClock()))
        if settings.server.metrics_port is not None:
            monitor = server(gateway.metrics_app, drain_seconds=1)
            socket = stack.enter_context(open_socket(host, settings.server.metrics_port))
            watching = asyncio.create_task(monitor.serve([socket]))
            stack.push_async_callback(_stop, monitor, watching)
        if not settings.declared_keys and not await gateway.directory.keys():
            click.echo(
                "warning: nobody has a key yet: declare a team in the configuration, or make one "
                "with gateway team create and gateway key create",
                err=True,
            )
        click.echo(f"gateway: serving on {origin_of(listening)}/v1", err=True)
        # What was built so far lives as long as the process: the collector need not look at it.
        gc.freeze()
        main = server(
            gateway.app,
            drain_seconds=settings.server.drain_seconds,
            signals=True,
            trusted_proxies=[str(network) for network in settings.server.trusted_proxies],
        )
        await main.serve([listening])


async def _stop(monitor: Server, watching: asyncio.Task[None]) -> None:
    monitor.should_exit = True
    await watching


def raise_file_limit() -> None:
    """Lets the process have as many connections as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
"""Of glibc's malloc.h."""


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
