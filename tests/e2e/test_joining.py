"""A client that comes back finds its own flight: one purchase, one charge, one picture."""

from __future__ import annotations

import asyncio

from gateway.sandbox.rules import Rule
from gateway.sandbox.watch import Gate
from tests.running import MODEL, GatewayUnderTest

ASKED = {"model": MODEL, "prompt": "A lighthouse", "quality": "low", "size": "1024x1024"}
FRESH = {"cache-control": "no-cache"}


async def test_an_impatient_sdk_gets_the_picture_that_it_asked_for_first(
    gateway: GatewayUnderTest,
) -> None:
    held = Gate()
    gateway.sandbox.rules.add(Rule(wait_for=held))
    async with gateway.sdk(max_retries=3, timeout=0.6) as sdk:
        asking = asyncio.create_task(
            sdk.images.with_raw_response.generate(**ASKED, extra_headers=FRESH)
        )
        await gateway.told.until(0)
        await asyncio.sleep(1.5)
        held.set()
        answer = await asking
    assert answer.headers["x-cache"] == "join"
    assert len(gateway.sandbox.journal) == 1
