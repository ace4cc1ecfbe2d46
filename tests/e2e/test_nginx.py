"""``config/nginx.conf`` in a real nginx, in front of the gateway; skipped where there is none."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from gateway.relay.body import KEEP_ALIVE, Spool
from gateway.sandbox.rules import Rule
from gateway.server import listen
from tests.e2e.test_streams import ASKED, COMPLETED_EVENT, COST, PARTIAL_EVENT, at, booked
from tests.raw import FORM, JSON, Field, RawClient, form, texts
from tests.running import KEY, MODEL, GatewayUnderTest, Start
from tests.upstream.raw_server import Peer, raw_server

SHIPPED = Path(__file__).parents[2] / "config" / "nginx.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
STARTS_SECONDS = 20
WALL_SECONDS = 2

pytestmark = pytest.mark.skipif(
    NGINX is None, reason="no nginx: apt-get install nginx-light, to see config/nginx.conf at work"
)


def free_port() -> int:
    with listen("127.0.0.1", 0) as taken:
        return int(taken.getsockname()[1])


@contextlib.asynccontextmanager
async def nginx(folder: Path, gateway: GatewayUnderTest, **other: str) -> AsyncIterator[int]:
    """The port of an nginx with the shipped file; ``other`` are values instead of those there."""
    port = free_port()
    text = SHIPPED.read_text()
    changes = {"server 127.0.0.1:8080": f"server 127.0.0.1:{gateway.port}"}
    changes["listen 80;"] = f"listen 127.0.0.1:{port};"
    for name, value in other.items():
        [line] = [line for line in text.splitlines() if line.strip().startswith(f"{name} ")]
        changes[line] = f"{name} {value};"
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    folder.mkdir()
    (folder / "gateway.conf").write_text(text)
    temps = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"user {getpass.getuser()};\ndaemon off;\nmaster_process off;\npid {folder}/pid;\n"
        f"error_log {folder}/error.log warn;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{temps}include {folder}/gateway.conf;\n}}\n"
    )
    process = await asyncio.create_subprocess_exec(
        str(NGINX),
        *("-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(STARTS_SECONDS):
            while not await _answers(port):
                assert process.returncode is None, (await process.communicate())[1].decode()
                await asyncio.sleep(0.02)
        yield port
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def _answers(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def sdk(port: int, **options: Any) -> AsyncOpenAI:
    options = {"max_retries": 0, "timeout": 30, **options}
    return AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, **options)


class Slow:
    """An upstream that sends a partial picture, another one and the whole one when it is told to.
    nginx lets the first pass in any case, since it comes with the headers."""

    def __init__(self) -> None:
        self.seen = asyncio.Event()
        self.go_on = asyncio.Event()

    async def __call__(self, peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        await peer.send(PARTIAL_EVENT)
        await self.seen.wait()
        await peer.send(PARTIAL_EVENT)
        await self.go_on.wait()
        await peer.send(COMPLETED_EVENT)


@pytest.mark.parametrize(
    "other",
    [{}, {"proxy_buffering": "on", "proxy_http_version": "1.0"}],
    ids=["as shipped", "nginx's own defaults"],
)
async def test_a_stream_passes_event_by_event(
    start: Start, tmp_path: Path, other: dict[str, str]
) -> None:
    """Also where somebody left nginx at its defaults."""
    upstream = Slow()
    async with (
        raw_server(upstream) as server,
        start(at(server.port)) as gateway,
        nginx(tmp_path / "nginx", gateway, **other) as port,
        sdk(port) as client,
    ):
        stream = await client.images.generate(stream=True, partial_images=1, **ASKED)
        assert (await anext(stream)).type == "image_generation.partial_image"
        upstream.seen.set()
        assert (await anext(stream)).type == "image_generation.partial_image"
        assert gateway.gateway.flights.count == 1
        upstream.go_on.set()
        assert [one.type async for one in stream] == ["image_generation.completed"]
        assert (await booked(gateway)).cost == COST


async def test_keep_alives_carry_a_stream_over_a_wall(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nginx's default would be 60 s; here it is 2."""
    follow = Spool.follow
    monkeypatch.setattr(Spool, "follow", lambda self, *_, **__: follow(self, 0.25))
    upstream = Slow()
    wall = f"{WALL_SECONDS}s"
    async with (
        raw_server(upstream) as server,
        start(at(server.port)) as gateway,
        nginx(tmp_path / "nginx", gateway, proxy_read_timeout=wall) as port,
        RawClient.to(port, KEY) as client,
    ):
        body = json.dumps({**ASKED, "stream": True, "partial_images": 1}).encode()
        began = asyncio.get_running_loop().time()
        await client.head("/v1/images/generations", (JSON, f"content-length: {len(body)}"))
        await client.send(body)
        while asyncio.get_running_loop().time() - began < 1.5 * WALL_SECONDS:
            await client.reader.readuntil(KEEP_ALIVE)
        upstream.seen.set()
        upstream.go_on.set()
        await client.reader.readuntil(COMPLETED_EVENT)
        assert (await client.reader.readuntil(b"0\r\n\r\n")).endswith(b"0\r\n\r\n")
        assert (await booked(gateway)).cost == COST


async def test_a_wall_cuts_what_is_silent_and_nothing_is_lost(start: Start, tmp_path: Path) -> None:
    """A stream without keep-alives, and a JSON answer; the picture is bought once all the same."""
    upstream = Slow()
    async with (
        raw_server(upstream) as server,
        start(at(server.port)) as gateway,
        nginx(tmp_path / "nginx", gateway, proxy_read_timeout="1s") as port,
        RawClient.to(port, KEY) as client,
        RawClient.to(port, KEY) as other,
    ):
        cut = client.post(
            "/v1/images/generations", json.dumps({**ASKED, "stream": True}).encode(), (JSON,)
        )
        late = other.post(
            "/v1/images/generations", json.dumps({**ASKED, "prompt": "another"}).encode(), (JSON,)
        )
        ended, answer = await asyncio.gather(cut, late, return_exceptions=True)
        assert isinstance(ended, asyncio.IncompleteReadError)
        assert not isinstance(answer, BaseException)
        assert answer.status == 504
        assert gateway.gateway.flights.count == 2
        upstream.seen.set()
        upstream.go_on.set()
        told = await gateway.told.until(2)
        assert [receipt.cost for receipt, _ in told] == [COST, COST]
        async with gateway.http() as http:
            again = await http.post("/images/generations", json={**ASKED, "prompt": "another"})
        assert again.headers["x-cache"] == "hit"
        assert server.accepted == 2


async def test_large_uploads_and_refusals_pass(start: Start, tmp_path: Path) -> None:
    async with start() as gateway, nginx(tmp_path / "nginx", gateway) as port:
        gateway.sandbox.rules.add(Rule(payload_bytes=3_000_000))
        async with RawClient.to(port, KEY) as client:
            body = json.dumps(ASKED).encode()
            answer = await client.post("/v1/images/generations", body, (JSON,), keep=False)
            assert (answer.status, answer.header("x-cost-usd")) == (200, "0.005895")
            assert answer.body_bytes > 3_000_000
            # Over the gateway's limit of one file, by far: its own words reach the client.
            picture = Field("image", b"\x89PNG\r\n\x1a\n" + bytes(60 << 20), "a.png")
            refused = await client.post(
                "/v1/images/edits", form(*texts(model=MODEL, prompt="p"), picture), (FORM,)
            )
            assert (refused.status, refused.error["code"]) == (413, "request_too_large")
        async with sdk(port, max_retries=2) as other:
            answers = [await other.images.generate(**ASKED) for _ in range(3)]
        assert all(answer.data for answer in answers)
