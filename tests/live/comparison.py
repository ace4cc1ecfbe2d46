"""One generation and one stream through a gateway, with every byte of the upstream's answers kept:
what is seen, and how it differs from what we assume (contract 1.3, 1.4, 4.5 and 5.3)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from gateway.api.door import Receive, Scope, Send
from gateway.app import Gateway, open_gateway
from gateway.clock import SystemClock
from gateway.domain.money import format_dollars, parse_dollars
from gateway.domain.tokens import image_tokens
from gateway.server import listen, server
from gateway.settings import load
from tests.running import KEY, MODEL, config_of

PROMPT = "A red circle on a white ground"
BUDGET = "0.02"
"""Of the team, in dollars: kept by the gateway itself, so no mistake here can spend more."""
LOW_AXIS = 16
PARTIAL_TOKENS = 100
TEXT_IN, IMAGE_OUT = 5_000, 30_000
"""Nano-dollars a token."""
SECONDS = 600
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}
SHOWN = ("content-type", "x-request-id", "openai-processing-ms", "openai-version")


@dataclass
class Exchange:
    """One answer of the upstream, as it came."""

    status: int
    headers: list[tuple[str, str]]
    body: bytearray = field(default_factory=bytearray)
    first_byte_seconds: float = 0
    seconds: float = 0


class Recorder:
    """An ASGI app that passes requests on to ``upstream`` and keeps what comes back."""

    def __init__(self, upstream: str) -> None:
        self._http = httpx.AsyncClient(base_url=upstream, timeout=SECONDS)
        self.exchanges: list[Exchange] = []

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = [
            (name.decode(), value.decode())
            for name, value in scope["headers"]
            if name.decode() not in HOP_BY_HOP
        ]
        began = time.monotonic()
        path = scope["path"].removeprefix("/v1/")
        async with self._http.stream(
            scope["method"], path, content=bytes(body), headers=headers
        ) as answer:
            exchange = Exchange(answer.status_code, answer.headers.multi_items())
            exchange.first_byte_seconds = time.monotonic() - began
            self.exchanges.append(exchange)
            passed = [
                (name.encode(), value.encode())
                for name, value in exchange.headers
                if name not in HOP_BY_HOP
            ]
            await send(
                {"type": "http.response.start", "status": exchange.status, "headers": passed}
            )
            async for chunk in answer.aiter_raw():
                exchange.body += chunk
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        exchange.seconds = time.monotonic() - began
        await send({"type": "http.response.body", "body": b""})


@dataclass
class Findings:
    """``seen`` is for people; ``differences`` are what we assume and the upstream does not do."""

    seen: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    cost: int = 0

    def expect(self, what: str, seen: object, assumed: object) -> None:
        self.seen.append(f"{what}: {seen}")
        if seen != assumed:
            self.differences.append(f"{what}: {seen}, where we assume {assumed}")

    def look_at(self, name: str, exchange: Exchange) -> None:
        """The headers and the times of an answer."""
        headers = dict(exchange.headers)
        self.seen.append(
            f"{name}: {exchange.status}, first byte after {exchange.first_byte_seconds:.1f} s, "
            f"{len(exchange.body):,} bytes after {exchange.seconds:.1f} s"
        )
        self.seen += [f"{name}: {header}: {headers.get(header, '(none)')}" for header in SHOWN]
        others = sorted({header for header in headers if header not in SHOWN})
        self.seen.append(f"{name}: other headers: {', '.join(others)}")
        if "x-request-id" not in headers:
            self.differences.append(f"{name}: no x-request-id")

    def compare_usage(self, name: str, usage: dict[str, Any], partial_images: int) -> int:
        """Usage against the formula; returns what it costs, by arithmetic of this file's own."""
        expected = image_tokens(LOW_AXIS, 1024, 1024) + PARTIAL_TOKENS * partial_images
        self.seen.append(f"{name}: usage as it came: {json.dumps(usage)}")
        self.expect(f"{name}: output tokens", usage["output_tokens"], expected)
        details = usage.get("input_tokens_details") or {}
        self.expect(f"{name}: input image tokens", details.get("image_tokens", 0), 0)
        cost: int = usage["input_tokens"] * TEXT_IN + usage["output_tokens"] * IMAGE_OUT
        return cost


async def compare(findings: Findings, upstream: str, key: str, folder: Path) -> None:
    """Buys one picture and one stream with one partial image; raises when the gateway cannot."""
    async with _running(upstream, key, folder) as (gateway, recorder, base_url):
        async with AsyncOpenAI(
            base_url=base_url, api_key=KEY, max_retries=0, timeout=SECONDS
        ) as sdk:
            await _generation(sdk, recorder, findings)
            await _stream(sdk, recorder, findings)
        rows = await gateway.ledger.usage()
        booked = sum(row.cost for row in rows)
        findings.expect("booked in all", format_dollars(booked), format_dollars(findings.cost))
        findings.expect("unresolved or flagged", sum(r.unresolved + r.flagged for r in rows), 0)
        assert booked < parse_dollars(BUDGET)


async def _generation(sdk: AsyncOpenAI, recorder: Recorder, findings: Findings) -> None:
    name = "generation"
    answer = await sdk.images.with_raw_response.generate(
        model=MODEL, prompt=PROMPT, size="1024x1024", quality="low"
    )
    [exchange] = recorder.exchanges
    findings.look_at(name, exchange)
    document = json.loads(exchange.body)
    findings.expect(f"{name}: the same bytes", answer.content == bytes(exchange.body), True)
    findings.seen.append(f"{name}: members in order: {', '.join(document)}")
    findings.expect(f"{name}: size", document.get("size"), "1024x1024")
    findings.expect(f"{name}: quality", document.get("quality"), "low")
    cost = findings.compare_usage(name, document["usage"], partial_images=0)
    findings.expect(f"{name}: x-cost-usd", answer.headers["x-cost-usd"], format_dollars(cost))
    findings.expect(f"{name}: x-cost-basis", answer.headers["x-cost-basis"], "usage")
    findings.cost += cost


async def _stream(sdk: AsyncOpenAI, recorder: Recorder, findings: Findings) -> None:
    name = "stream"
    stream = await sdk.images.generate(
        model=MODEL,
        prompt=PROMPT,
        size="1024x1024",
        quality="low",
        stream=True,
        partial_images=1,
        extra_headers={"cache-control": "no-store"},
    )
    events = [event async for event in stream]
    exchange = recorder.exchanges[-1]
    findings.look_at(name, exchange)
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    findings.seen.append(f"{name}: events: {', '.join(kinds)}")
    findings.expect(f"{name}: the last event", kinds[-1], "completed")
    done = exchange.body.rstrip().endswith(b"data: [DONE]")
    findings.seen.append(f"{name}: ends with {'[DONE]' if done else 'the last event, no [DONE]'}")
    findings.seen.append(f"{name}: its last bytes: {bytes(exchange.body[-40:])!r}")
    last = events[-1]
    assert last.type == "image_generation.completed"
    findings.cost += findings.compare_usage(
        name, last.usage.to_dict(), partial_images=kinds.count("partial_image")
    )


@contextlib.asynccontextmanager
async def _running(
    upstream: str, key: str, folder: Path
) -> AsyncIterator[tuple[Gateway, Recorder, str]]:
    """A gateway with the real clock, a hard budget, and a recorder between it and the upstream."""
    async with contextlib.AsyncExitStack() as stack:
        recorder = Recorder(upstream)
        stack.push_async_callback(recorder.aclose)
        between = await stack.enter_async_context(_serving(recorder))
        changes = {
            "upstreams": {"openai": {"api_keys": ["${OPENAI_API_KEY}"]}},
            "teams": {"growth": {"budget": {"day": BUDGET}}},
        }
        settings = load(config_of(folder, between, changes), {"OPENAI_API_KEY": key})
        gateway = await stack.enter_async_context(open_gateway(settings, SystemClock()))
        base_url = await stack.enter_async_context(_serving(gateway.app))
        yield gateway, recorder, base_url


@contextlib.asynccontextmanager
async def _serving(app: Any) -> AsyncIterator[str]:
    with listen("127.0.0.1", 0) as listening:
        running = server(app, drain_seconds=5)
        task = asyncio.create_task(running.serve([listening]))
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        finally:
            running.should_exit = True
            await task
