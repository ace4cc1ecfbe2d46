"""`gateway demo`: a gateway that works at once, and shows it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import click

from gateway.app import Gateway, open_gateway
from gateway.assembly import read_peppers
from gateway.cli.common import (
    EXIT_FAILED,
    fail,
    failures,
    load_settings,
    open_socket,
    origin_of,
)
from gateway.clock import SystemClock
from gateway.domain import keys
from gateway.domain.money import parse_dollars
from gateway.domain.team import Key, Limits, Team
from gateway.server import server
from gateway.settings import Settings
from gateway.telemetry.log import configure

TEAM = "demo"
MODEL = "gpt-image-2.5-flare"
PROMPT = "A lighthouse at dusk, seen from the sea"
PICTURE = "lighthouse.png"
EXAMPLE = f"""\
import base64
from openai import OpenAI
image = OpenAI().images.generate(model="{MODEL}", prompt="{PROMPT}", quality="low")
with open("{PICTURE}", "wb") as file:
    file.write(base64.b64decode(image.data[0].b64_json))
"""
AS_A_URL = f"""\
image = OpenAI().images.generate(
    model="{MODEL}", prompt="{PROMPT}", quality="low", response_format="url"
)
print(image.data[0].url)
"""

CONFIG = """\
# Written by `gateway demo`, anew at each start. Change a copy: gateway serve --config COPY
# Each upstream has books and pictures of its own, so nothing that the sandbox drew is ever an
# answer of OpenAI.
storage: {{database: "sqlite:///{name}/gateway.db", blobs: "{name}/blobs"}}
ledger: {{spool: "{name}/settlements"}}
upstreams:
  {upstream}
models:
  gpt-image-2.6-sunburst: {{upstream: {name}}}
  gpt-image-2.6-flare:    {{upstream: {name}}}
  gpt-image-2.5-sunburst: {{upstream: {name}}}
  gpt-image-2.5-flare:    {{upstream: {name}}}
  gpt-image-2:            {{upstream: {name}}}
  "*":                    {{upstream: {name}}}
compat:
  aliases: {{dall-e-3: {model}, dall-e-2: {model}, gpt-image-1: {model}}}
log: {{level: warning, format: text}}
"""
UPSTREAMS = {
    "sandbox": "sandbox: {kind: sandbox}",
    "openai": "openai: {kind: openai, base_url: https://api.openai.com/v1, "
    'api_keys: ["${OPENAI_API_KEY}"]}',
}


@click.command(short_help="Start a gateway here, and show a picture coming back.")
@click.option(
    "--upstream",
    type=click.Choice(sorted(UPSTREAMS)),
    default="sandbox",
    show_default=True,
    help="Who makes the pictures. The sandbox draws them here, for nothing.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Where to listen; the next free one is taken when this one is not.",
)
@click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".demo"),
    show_default=True,
    help="Where the demo keeps its configuration, its books and its pictures.",
)
def demo(upstream: str, port: int, home: Path) -> None:
    """Start a gateway on this machine, make a key, and show a picture coming back.

    A new start makes a new key and revokes the old one. With --upstream openai nothing is bought
    until you ask for a picture.
    """
    if upstream == "openai":
        _check_openai_key(os.environ.get("OPENAI_API_KEY", ""))
    if importlib.util.find_spec("openai") is None and upstream == "sandbox":
        fail("the demo needs the openai package: pip install 'image-gateway[demo]'", EXIT_FAILED)
    with failures():
        config = home / "gateway.yaml"
        text = CONFIG.format(upstream=UPSTREAMS[upstream], name=upstream, model=MODEL)
        try:
            home.mkdir(parents=True, exist_ok=True)
            config.write_text(text)
        except OSError as error:
            why = error.strerror or error
            fail(f"{config} cannot be written ({why}): name a folder with --home", EXIT_FAILED)
        settings = load_settings(config)
        configure(settings.log.level.value, settings.log.format.value)
        asyncio.run(_run(settings, home, port, free=upstream == "sandbox"))


def _check_openai_key(secret: str) -> None:
    if not secret:
        fail("set OPENAI_API_KEY to a key of your OpenAI account first", EXIT_FAILED)
    if secret.startswith(keys.PREFIX):
        fail(
            "OPENAI_API_KEY holds a key of a gateway (it starts with igw_), not one of OpenAI. "
            "Unset it, or set it to a key of your OpenAI account.",
            EXIT_FAILED,
        )


async def _run(settings: Settings, home: Path, port: int, *, free: bool) -> None:
    async with contextlib.AsyncExitStack() as stack:
        listening = stack.enter_context(open_socket("127.0.0.1", port, next_free=True))
        origin = origin_of(listening)
        if settings.server.public_url is None:
            settings = replace(settings, server=replace(settings.server, public_url=origin))
        gateway = await stack.enter_async_context(open_gateway(settings, SystemClock()))
        secret = await _new_key(settings, gateway)
        base_url = f"{origin}/v1"
        main = server(
            gateway.app,
            drain_seconds=settings.server.drain_seconds,
            signals=True,
            draining=gateway.drain,
        )
        serving = asyncio.create_task(main.serve([listening]))
        if free:
            await _show_a_picture(base_url, secret, home)
        else:
            click.echo("Ready. Nothing has been bought: the examples below cost about $0.006.")
        click.echo(_instructions(base_url, secret))
        await serving


async def _new_key(settings: Settings, gateway: Gateway) -> str:
    """A new key of the demo's team; the keys of earlier starts are revoked."""
    directory, now = gateway.directory, SystemClock().now()
    if all(known.id != TEAM for known in await directory.teams()):
        await directory.create_team(Team(TEAM, limits=Limits(budget_day=parse_dollars("5.00"))))
    for old in await directory.keys(TEAM):
        if old.revoked is None:
            await directory.revoke_key(old.id, now)
    minted = keys.mint("demo")
    pepper = read_peppers(settings).current
    key = Key(id=minted.id, team=TEAM, name="demo", created=now, pepper=keys.pepper_id(pepper))
    await directory.create_key(key, keys.digest(pepper, minted.secret))
    return minted.secret


async def _show_a_picture(base_url: str, secret: str, home: Path) -> None:
    """Runs the example that is printed below it, as a team would, with the real SDK; then asks for
    the same picture as a url, which buys nothing."""
    began = SystemClock().monotonic()
    example = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        EXAMPLE + AS_A_URL,
        cwd=home,
        stdout=asyncio.subprocess.PIPE,
        env={
            **os.environ,
            "OPENAI_BASE_URL": base_url,
            "OPENAI_API_KEY": secret,
            "NO_PROXY": "127.0.0.1",
        },
    )
    url, _ = await example.communicate()
    if example.returncode:
        fail("the picture did not come back; what went wrong stands above", EXIT_FAILED)
    seconds = SystemClock().monotonic() - began
    click.echo(
        f"A picture came back in {seconds:.1f} s: {(home / PICTURE).resolve()}\n"
        "The sandbox drew it on this machine; nothing was bought.\n"
        f"The same as a url, for a browser: {url.decode().strip()}"
    )


def _instructions(base_url: str, secret: str) -> str:
    python = shlex.quote(sys.executable)
    return f"""
Point any OpenAI SDK at this gateway:

export OPENAI_BASE_URL={base_url}
export OPENAI_API_KEY={secret}

With curl:

curl -s $OPENAI_BASE_URL/images/generations \\
  -H "Authorization: Bearer $OPENAI_API_KEY" -H "Content-Type: application/json" \\
  -d '{{"model": "{MODEL}", "prompt": "{PROMPT}", "quality": "low"}}' \\
  | {python} -c 'import base64, json, sys; open("{PICTURE}", "wb").write(
base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))'

With Python:

{python} - <<'EOF'
{EXAMPLE}EOF

Metrics: {base_url.removesuffix("/v1")}/metrics
Ctrl-C ends it."""
