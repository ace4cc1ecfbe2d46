"""`gateway sandbox`: an OpenAI images server that draws for nothing."""

from __future__ import annotations

import asyncio
import signal

import click

from gateway.cli.common import failures, open_socket, origin_of
from gateway.clock import SystemClock
from gateway.sandbox.server import serve_sandbox
from gateway.telemetry.log import configure


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8090,
    show_default=True,
    help="0: any that is free.",
)
@click.option("--latency", type=click.FloatRange(0, 600), default=0.0, help="Seconds per picture.")
@click.option("--control", is_flag=True, help="Open /sandbox/rules and /sandbox/journal.")
def sandbox(host: str, port: int, latency: float, control: bool) -> None:
    """Serve an OpenAI images server that draws its pictures itself.

    It is as strict as OpenAI and costs nothing: point a test suite at it, with any key.
    """
    configure("info", "text")
    with failures():
        asyncio.run(_serve(host, port, latency, control))


async def _serve(host: str, port: int, latency: float, control: bool) -> None:
    told = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    with open_socket(host, port) as listening:
        # Its own server: a rule may cut a connection, and ASGI has no word for that.
        async with serve_sandbox(
            SystemClock(), latency_seconds=latency, control=control, listening=listening
        ):
            click.echo(f"export OPENAI_BASE_URL={origin_of(listening)}/v1")
            click.echo("export OPENAI_API_KEY=sk-sandbox")
            await told.wait()
