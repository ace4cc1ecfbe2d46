"""`gateway serve`: the gateway itself, until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
from pathlib import Path

import click

from gateway.app import open_gateway
from gateway.cli.common import (
    EXIT_CONFIG,
    EXIT_FAILED,
    config_option,
    fail,
    load_settings,
    warn,
)
from gateway.clock import SystemClock
from gateway.pricefile import PriceFileError
from gateway.server import Server, listen, server
from gateway.settings import Settings
from gateway.stores.sqlite import StoreError
from gateway.telemetry.log import configure


@click.command()
@config_option
@click.option("--host", help="Listen here instead of server.host.")
@click.option("--port", type=click.IntRange(0, 65535), help="Instead of server.port.")
def serve(config: Path | None, host: str | None, port: int | None) -> None:
    """Serve the gateway until SIGTERM or Ctrl-C.

    The first signal lets running requests finish (server.drain_seconds), a second one does not.
    """
    settings = load_settings(config)
    warn(settings)
    configure(settings.log.level.value, settings.log.format.value)
    try:
        asyncio.run(
            _serve(
                settings,
                settings.server.host if host is None else host,
                settings.server.port if port is None else port,
            )
        )
    except PriceFileError as error:
        fail(str(error), EXIT_CONFIG)
    except (StoreError, OSError) as error:
        fail(str(error), EXIT_FAILED)


async def _serve(settings: Settings, host: str, port: int) -> None:
    raise_file_limit()
    async with contextlib.AsyncExitStack() as stack:
        listening = stack.enter_context(listen(host, port))
        gateway = await stack.enter_async_context(open_gateway(settings, SystemClock()))
        if settings.server.metrics_port is not None:
            monitor = server(gateway.metrics_app, drain_seconds=1)
            socket = stack.enter_context(listen(host, settings.server.metrics_port))
            watching = asyncio.create_task(monitor.serve([socket]))
            stack.push_async_callback(_stop, monitor, watching)
        bound = listening.getsockname()[1]
        click.echo(f"gateway: serving on http://{host}:{bound}/v1", err=True)
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
