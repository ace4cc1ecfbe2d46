"""Two gateways on one PostgreSQL: what one spends, the other knows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from gateway.sandbox.server import SandboxServer
from tests.postgres import Postgres, run_postgres
from tests.running import MODEL, run_gateway


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with run_postgres() as running:
        yield running


async def test_replicas_share_a_budget(
    tmp_path: Path, sandbox: SandboxServer, server: Postgres
) -> None:
    changes = {
        "storage": {
            "database": server.fresh_database(),
            "pepper": "pepper-0123456789abcdef-0123456789",
        },
        "cache": {"enabled": False},
        "teams": {"growth": {"budget": {"day": 0.1}}},
    }
    homes = [tmp_path / name for name in ("one", "two")]
    for home in homes:
        home.mkdir()
    async with (
        run_gateway(homes[0], sandbox, changes) as one,
        run_gateway(homes[1], sandbox, changes) as two,
    ):
        bought = 0
        refusals: list[str | None] = []

        async def buy(gateway: int) -> None:
            nonlocal bought
            async with (one, two)[gateway].sdk() as sdk:
                try:
                    answer = await sdk.images.generate(
                        model=MODEL, prompt="a lighthouse", size="1024x1024", quality="low"
                    )
                except openai.RateLimitError as error:
                    refusals.append(error.code)
                else:
                    assert answer.data
                    assert answer.data[0].b64_json
                    bought += 1

        while not refusals:
            await asyncio.gather(*(buy(number % 2) for number in range(8)))
        # Whoever spent it: now neither of them has anything left for this.
        before = bought
        await buy(0)
        await buy(1)
        assert bought == before
        assert set(refusals) == {"insufficient_quota"}

        await asyncio.gather(one.told.until(1), two.told.until(1))
        for gateway in (one, two):
            (row,) = await gateway.usage()
            assert (row.team, row.requests, row.images) == ("growth", bought, bought)
            assert 0 < row.cost <= 100_000_000
            assert await gateway.gateway.ledger.open_holds() == 0
        assert one.told.requests
        assert two.told.requests
