"""A budget of 100 calls, asked for 256 times at once through four processes: 100 are admitted.

64 clients for each of 4 gateways, 5 times (20 in a soak), each time a team that nobody has seen
before: the first use of a row is part of the race (reliability.md T5, row 91).
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from gateway.domain.money import format_dollars
from gateway.sandbox.journal import Journal
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from tests.postgres import Postgres
from tests.processes import GatewayProcess
from tests.running import MODEL, TestClock, config_of
from tests.sizes import size
from tests.valkey import eventually, run_valkey

PROCESSES, CLIENTS, ROOM, REPEATS = 4, 64, 100, size(5, 20)
SPARE = 10
"""Teams for rounds in which Redis had no turn."""
PROMPT = "a red square"
BOUND = 196 * 30_000 + (len(PROMPT) + 32) * 5_000
"""Of gpt-image-2.5-flare at 1024x1024 and low, in nano-dollars: 196 tokens of picture, and the
prompt's bytes with what a provider may wrap around them (money.md 7)."""

BUDGET: Mapping[str, Any] = {"budget": {"day": format_dollars(ROOM * BOUND)}}
SLOTS: Mapping[str, Any] = {"limits": {"concurrent_requests": ROOM}}


@pytest.fixture
def sandbox() -> Iterator[SandboxServer]:
    with SandboxServer(TestClock(), journal=Journal(records=10_000, body_bytes=0)) as running:
        yield running


async def ask(port: int, team: str) -> tuple[int, str]:
    """One request over a connection of its own; the status, and the error's code."""
    body = json.dumps(
        {"model": MODEL, "prompt": PROMPT, "quality": "low", "size": "1024x1024"}
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            b"POST /v1/images/generations HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n"
            b"authorization: Bearer %s-key-0123456789abcdef\r\n\r\n%s"
            % (len(body), team.encode(), body)
        )
        answer = await reader.read()
    finally:
        writer.close()
    head, _, content = answer.partition(b"\r\n\r\n")
    status = int(head[9:12])
    return status, "" if status == 200 else json.loads(content)["error"]["code"]


def configured(
    folder: Path, sandbox: SandboxServer, limits: Mapping[str, Any], storage: Mapping[str, Any]
) -> Path:
    teams = {
        f"team{number}": {"keys": [f"team{number}-key-0123456789abcdef"], **limits}
        for number in range(REPEATS + SPARE)
    }
    return config_of(
        folder,
        sandbox.base_url,
        {
            "server": {"host": "127.0.0.1"},
            "storage": dict(storage),
            "cache": {"enabled": False},
            "teams": teams,
        },
    )


async def race(config: Path, sandbox: SandboxServer, refusal: str) -> None:
    with ExitStack() as stack:
        gateways = [stack.enter_context(GatewayProcess(config)) for _ in range(PROCESSES)]
        ports = [gateway.wait_ready().port for gateway in gateways]
        clean, troubles = 0, 0.0
        for number in range(REPEATS + SPARE):
            # Nothing is settled before everybody was let in or refused.
            making = Gate()
            sandbox.rules.clear()
            sandbox.rules.add(Rule(wait_for=making, payload_bytes=400))
            asked = [
                asyncio.create_task(ask(port, f"team{number}"))
                for _ in range(CLIENTS)
                for port in ports
            ]

            received = sandbox.journal.received + len(asked)

            def everybody_knows(
                asked: Sequence[asyncio.Task[Any]] = asked, received: int = received
            ) -> bool:
                return sandbox.journal.received + sum(one.done() for one in asked) == received

            async with asyncio.timeout(60):
                await eventually(everybody_knows, 60)
                making.set()
                ended = Counter(await asyncio.gather(*asked))
            before, troubles = troubles, sum(map(gate_errors, gateways))
            if troubles > before:
                # The machine was so busy that Redis had no turn in 0.3 s: each process has then
                # kept a share of its own, and the round says nothing.
                continue
            assert ended == {(200, ""): ROOM, (429, refusal): PROCESSES * CLIENTS - ROOM}
            clean += 1
            if clean == REPEATS:
                return
        pytest.fail(f"only {clean} of {REPEATS} races were run with Redis answering")


def gate_errors(gateway: GatewayProcess) -> float:
    found = gateway.metrics()
    return sum(found[name] for name in found if name.startswith("gateway_gate_errors_total"))


async def test_on_sqlite(tmp_path: Path, sandbox: SandboxServer) -> None:
    config = configured(tmp_path, sandbox, BUDGET, {})
    await race(config, sandbox, "insufficient_quota")


async def test_on_postgres(tmp_path: Path, sandbox: SandboxServer, postgres: Postgres) -> None:
    storage = {"database": postgres.fresh_database(), "pepper": "p" * 32}
    config = configured(tmp_path, sandbox, BUDGET, storage)
    await race(config, sandbox, "insufficient_quota")


async def test_with_redis_as_the_gate(tmp_path: Path, sandbox: SandboxServer) -> None:
    with run_valkey() as valkey:
        config = configured(tmp_path, sandbox, SLOTS, {"redis": valkey.url})
        await race(config, sandbox, "rate_limit_exceeded")
