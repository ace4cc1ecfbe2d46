"""A gateway that has spent, and has ended: its books, and the sandbox that billed it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai

from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from tests.running import ALIAS, KEY, MODEL, OTHER_KEY, TestClock, run_gateway

DAY = "2026-11-20"
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
PROMPT = "A red circle on a white ground"
ONE = 8 * 5_000 + 196 * 30_000
"""Nano-dollars of one low picture of 1024x1024 with this prompt."""


async def spend(
    folder: Path,
    sandbox: SandboxServer,
    clock: TestClock,
    changes: Mapping[str, Any] | None = None,
    *,
    lost: int = 0,
    no_usage: int = 0,
) -> tuple[Path, list[str]]:
    """Three pictures for growth (two of them by the alias), one for design. Then ``lost`` calls of
    design whose answer never came, and ``no_usage`` whose answer did not say what it cost.

    Returns the configuration and the request ids of the latter two.
    """
    settings = {"upstreams": {"openai": {"admin_key": "sk-admin-1"}}, **(changes or {})}
    async with run_gateway(folder, sandbox, settings, clock) as gateway:

        async def draw(key: str, model: str = MODEL, n: int = 1) -> None:
            async with gateway.sdk(key) as sdk:
                await sdk.images.generate(
                    model=model,
                    prompt=PROMPT,
                    quality="low",
                    size="1024x1024",
                    n=n,
                    extra_headers={"cache-control": "no-cache"},
                )

        await draw(KEY)
        await draw(KEY, ALIAS)
        await draw(KEY, ALIAS)
        await draw(OTHER_KEY)
        for _ in range(lost):
            sandbox.rules.add(Rule(path="/generations", times=1, cut_before_headers=True))
            try:
                await draw(OTHER_KEY)
            except openai.APIStatusError:
                continue
            raise AssertionError("the answer came all the same")
        for _ in range(no_usage):
            sandbox.rules.add(Rule(path="/generations", times=1, no_usage=True))
            await draw(OTHER_KEY)
        told = await gateway.told.until(4 + lost + no_usage)
        return gateway.config, [receipt.rid for receipt, _ in told[4:]]
