"""A gateway under test: the real app on a real socket, the sandbox behind it, real SDKs before it.

The gateway runs in the test's own loop and the sandbox in a thread, so a test can look at both
while a request is under way. Dates stand still at 2026-11-22; durations are real.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import yaml
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from gateway.app import Gateway, open_gateway
from gateway.domain.ledger import UsageRow
from gateway.domain.receipt import Delivery, Receipt
from gateway.sandbox.server import SandboxServer
from gateway.server import listen, server
from gateway.settings import load

TODAY = datetime(2026, 11, 22, 12, tzinfo=UTC)
MODEL = "gpt-image-2.5-flare"
ALIAS = "team-art"
KEY = "growth-key-0123456789abcdef"
OTHER_KEY = "design-key-0123456789abcdef"


class TestClock:
    """A calendar that stands still until it is moved, and seconds that run."""

    __test__ = False

    def __init__(self, now: datetime = TODAY) -> None:
        self._now = now

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return time.monotonic()

    def advance(self, **units: float) -> None:
        self._now += timedelta(**units)


@dataclass
class Told:
    """Hears of every request's end; a test waits for it here."""

    requests: list[tuple[Receipt, Delivery]] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def finished(self, receipt: Receipt, delivery: Delivery) -> None:
        self.requests.append((receipt, delivery))
        self._news.set()

    async def until(self, count: int) -> list[tuple[Receipt, Delivery]]:
        """The requests, once there are ``count`` of them."""
        async with asyncio.timeout(30):
            while len(self.requests) < count:
                self._news.clear()
                await self._news.wait()
        return self.requests

    @property
    def last(self) -> Receipt:
        return self.requests[-1][0]


@dataclass
class GatewayUnderTest:
    """``base_url`` ends in /v1; ``told`` has every receipt; ``sandbox`` is the upstream."""

    origin: str
    gateway: Gateway
    sandbox: SandboxServer
    clock: TestClock
    told: Told
    config: Path

    @property
    def base_url(self) -> str:
        return f"{self.origin}/v1"

    @property
    def port(self) -> int:
        return int(self.origin.rpartition(":")[2])

    def sdk(self, key: str = KEY, **options: Any) -> AsyncOpenAI:
        """The real SDK; no retries unless asked, so that each attempt is seen."""
        # Loading the authorities takes 40 ms a client, for connections that are not encrypted.
        client = DefaultAsyncHttpxClient(verify=False, timeout=options.get("timeout", 30))
        options = {"max_retries": 0, "timeout": 30, "http_client": client, **options}
        return AsyncOpenAI(base_url=self.base_url, api_key=key, **options)

    def http(self, key: str = KEY, **options: Any) -> httpx.AsyncClient:
        """A plain client, for what an SDK would not send."""
        headers = {"authorization": f"Bearer {key}", **options.pop("headers", {})}
        options = {"timeout": 30, "verify": False, **options}
        return httpx.AsyncClient(base_url=self.base_url, headers=headers, **options)

    async def usage(self) -> list[UsageRow]:
        return await self.gateway.ledger.usage()

    async def put_away(self) -> None:
        """Where nothing flies: waits for a moment until what flew has been put away too."""
        if self.gateway.flights.count == 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await self.gateway.flights.idle()

    async def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, as ``name{labels}`` -> value."""
        await self.put_away()
        async with httpx.AsyncClient(base_url=self.origin, verify=False) as http:
            text = (await http.get("/metrics")).text
        samples = (line.rpartition(" ") for line in text.splitlines() if line[:1] not in ("#", ""))
        return {name: float(value) for name, _, value in samples}


def config_of(folder: Path, upstream: str, changes: Mapping[str, Any]) -> Path:
    """A configuration file: one sandbox upstream, two teams; ``changes`` are merged into it."""
    document: dict[str, Any] = {
        "server": {"port": 0},
        "storage": {"database": "sqlite:///data/gateway.db", "blobs": "data/blobs"},
        "upstreams": {
            "openai": {"kind": "openai", "base_url": upstream, "api_keys": ["sk-upstream-secret"]}
        },
        "models": {
            MODEL: {"upstream": "openai"},
            "gpt-image-2": {"upstream": "openai"},
            ALIAS: {"upstream": "openai", "model": MODEL},
            "*": {"upstream": "openai"},
        },
        "teams": {"growth": {"keys": [KEY]}, "design": {"keys": [OTHER_KEY]}},
    }
    _merge(document, changes)
    path = folder / "gateway.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(base.get(name), dict):
            _merge(base[name], value)
        else:
            base[name] = value


@contextlib.asynccontextmanager
async def run_gateway(
    folder: Path,
    sandbox: SandboxServer,
    changes: Mapping[str, Any] | None = None,
    clock: TestClock | None = None,
) -> AsyncIterator[GatewayUnderTest]:
    """A gateway in the running loop, until the block is left; then everything has ended."""
    clock, told = clock or TestClock(), Told()
    config = config_of(folder, sandbox.base_url, changes or {})
    settings = load(config, {})
    with listen("127.0.0.1", 0) as listening:
        async with open_gateway(settings, clock, [told]) as gateway:
            trusted = [str(network) for network in settings.server.trusted_proxies]
            running = server(gateway.app, drain_seconds=20, trusted_proxies=trusted)
            serving = asyncio.create_task(running.serve([listening]))
            try:
                origin = f"http://127.0.0.1:{listening.getsockname()[1]}"
                yield GatewayUnderTest(origin, gateway, sandbox, clock, told, config)
            finally:
                running.should_exit = True
                await serving


Start = Callable[..., contextlib.AbstractAsyncContextManager[GatewayUnderTest]]
