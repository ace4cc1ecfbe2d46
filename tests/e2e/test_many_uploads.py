"""Many uploads at once through the whole gateway, to an upstream that is slow and fails: files and
buffers go from one to the next, and nobody's bytes go with them."""

from __future__ import annotations

import asyncio
import random
import re
from contextlib import suppress
from functools import cache
from typing import Any

import pytest

from gateway.relay import body as spools
from gateway.relay import scratch
from tests import upstream_cuts as cuts
from tests.e2e.test_edits import EDITS, with_model
from tests.raw import FORM, Field, RawAnswer, RawClient, form, texts
from tests.running import ALIAS, KEY, OTHER_KEY, GatewayUnderTest, Start
from tests.upstream.raw_server import Peer, raw_server

MB = 1024 * 1024
UPLOADS, AT_ONCE = 60, 10
HELD = [f'gateway_inflight_bytes{{where="{where}"}}' for where in ("disk", "memory")]


@cache
def body_of(number: int) -> bytes:
    noise = random.Random(number)
    size = noise.choice((300_000, 700_000, MB, noise.randrange(MB, 3 * MB)))
    pictures = [
        Field("image[]", noise.randbytes(size // count), "a.png")
        for count in [noise.choice((1, 2))]
        for _ in range(count)
    ]
    asked = texts(model=ALIAS, prompt=f"number {number}.", quality="low")
    return form(*asked[:2], *pictures, asked[2])


class Upstream:
    """Takes uploads as it comes: slowly, in part, not at all. Those it has seen, and what was in
    one that was not there."""

    def __init__(self) -> None:
        self.chance = random.Random(1)
        self.whole: list[int] = []
        self.parts = 0
        self.wrong: list[int] = []

    async def __call__(self, peer: Peer) -> None:
        head = await peer.head()
        found = re.search(rb"content-length: (\d+)", head.lower())
        assert found is not None
        left, kind, got = int(found[1]), self.chance.random(), bytearray()
        ends = self.chance.randrange(left) if kind < 0.4 else left
        while len(got) < ends:
            most = min(self.chance.randrange(1, 200_000), ends - len(got))
            piece = await peer.reader.read(most)
            if not piece:
                break
            got += piece
            await asyncio.sleep(self.chance.choice((0, 0, 0.002)))
        named = re.search(rb"number (\d+)\.", got)
        if named is not None:
            number = int(named[1])
            if bytes(got) != with_model(body_of(number))[: len(got)]:
                self.wrong.append(number)
            self.parts += 1
        if len(got) == left:
            assert named is not None
            self.whole.append(int(named[1]))
            answer = cuts.answer().replace(b'"created":1', b'"created":%b' % named[1])
            await peer.send(cuts.json_head(len(answer)) + answer)
        elif kind < 0.2:
            peer.reset()
        elif kind < 0.3:
            await peer.reply(b'{"error":{"message":"no"}}', status="503 Service Unavailable")


async def call(port: int, number: int, chance: random.Random) -> RawAnswer | None:
    """Sends it in pieces, or in chunks; may leave in the middle."""
    body, kind = body_of(number), chance.random()
    async with RawClient.to(port, (KEY, OTHER_KEY)[number % 2]) as client:
        if kind < 0.15:
            pieces = [body[at : at + 100_000] for at in range(0, len(body), 100_000)]
            return await client.post_chunked(EDITS, pieces, (FORM,))
        await client.head(EDITS, (FORM, f"content-length: {len(body)}"))
        ends = chance.randrange(len(body)) if kind < 0.35 else len(body)
        at = 0
        while at < ends:
            size = chance.choice((1_000, 65_536, 300_000, 2 * MB))
            await client.send(body[at : min(at + size, ends)])
            at += size
            await asyncio.sleep(chance.choice((0, 0, 0.003)))
        if ends < len(body):
            if kind < 0.25:
                client.writer.transport.abort()
            return None
        return await client.answer()


async def held(gateway: GatewayUnderTest) -> float:
    metrics = await gateway.metrics()
    return sum(metrics[name] for name in HELD)


@pytest.mark.parametrize("seed", [1, 2])
async def test_nobody_gets_another_ones_bytes(
    start: Start, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    for module in (spools, scratch):
        monkeypatch.setattr(module, "KEPT_FILE_BYTES", 2 * MB)
    upstream, chance, places = Upstream(), random.Random(seed), asyncio.Semaphore(AT_ONCE)
    upstream.chance = random.Random(seed + 10)
    answered: list[int] = []

    async def one(port: int, number: int) -> None:
        async with places:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                answer = await call(port, number, chance)
                if answer is not None and answer.status == 200:
                    made: dict[str, Any] = answer.json
                    assert made["created"] == number
                    answered.append(number)

    async with raw_server(upstream, receive_buffer=65536) as server:
        changes = cuts.at(server, first_byte_seconds=5)
        async with start({**changes, "cache": {"enabled": False}}) as gateway:
            async with asyncio.TaskGroup() as group:
                for number in range(1, UPLOADS + 1):
                    group.create_task(one(gateway.port, number))
            # A client that broke off is seen a little later. pytest's time-out is the bound.
            while await held(gateway):  # noqa: ASYNC110 - it is a number, and no event
                await asyncio.sleep(0.01)
    assert upstream.wrong == []
    assert len(answered) > UPLOADS // 3
    assert upstream.parts > len(upstream.whole) >= len(answered)
