"""Clients that take their stream slowly, or not at all: who pays, who waits, and what is held.

The upstream sends six partial pictures of 6 MB. What the kernel holds for a client that does not
read is some megabytes; far behind that the upstream is no longer read.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httptools
import pytest

import gateway.api.door
from gateway.domain.receipt import Delivery, Receipt
from gateway.relay import landing
from gateway.relay.body import Spool
from tests.e2e.test_streams import ASKED, COMPLETED_EVENT, COST, at, event
from tests.raw import JSON, RawClient
from tests.running import KEY, GatewayUnderTest, Start
from tests.upstream.raw_server import Peer, raw_server

BIG = event("partial_image", b'"partial_image_index":0', picture=b"QUJD" * 1_500_000)
COUNT = 6
HELD = "gateway_inflight_bytes"
STATUS = b"HTTP/1.1 200"


@dataclass
class Upstream:
    """``left`` counts the bytes that have left for the gateway, of streams that are big."""

    left: int = 0
    all_left: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, peer: Peer) -> None:
        while True:
            _, body = await peer.request()
            big = json.loads(body)["prompt"] == "big"
            head = (
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
            )
            await peer.send(head)
            for _ in range(COUNT if big else 0):
                await peer.send(BIG)
                self.left += len(BIG)
            await peer.send(COMPLETED_EVENT)
            if big:
                self.all_left.set()
            peer.writer.write_eof()


@dataclass
class Pauses:
    """Sees the upstream being held back."""

    began: asyncio.Event = field(default_factory=asyncio.Event)
    count: int = 0


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Pauses:
    seen = Pauses()
    caught_up = Spool.caught_up

    async def watched(self: Spool, within: int) -> None:
        seen.count += 1
        seen.began.set()
        await caught_up(self, within)

    monkeypatch.setattr(Spool, "caught_up", watched)
    return seen


async def slow_client(gateway: GatewayUnderTest, receive_buffer: int = 4096) -> socket.socket:
    """A client with a small window that has asked for a big stream, and read its first line."""
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    await loop.sock_connect(sock, ("127.0.0.1", gateway.port))
    body = json.dumps({**ASKED, "prompt": "big", "stream": True}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: g\r\nauthorization: Bearer {KEY}\r\n"
    head += f"{JSON}\r\ncontent-length: {len(body)}\r\n\r\n"
    await loop.sock_sendall(sock, head.encode() + body)
    assert (await loop.sock_recv(sock, len(STATUS))) == STATUS
    return sock


class Body:
    """What a parser finds of an answer's body, without the sizes of its chunks."""

    def __init__(self) -> None:
        self.content = bytearray()

    def on_body(self, piece: bytes) -> None:
        self.content += piece


def body_of(answer: bytes) -> bytes:
    body = Body()
    httptools.HttpResponseParser(body).feed_data(answer)
    return bytes(body.content)


async def held(gateway: GatewayUnderTest) -> float:
    samples = await gateway.metrics()
    return sum(value for name, value in samples.items() if name.startswith(HELD))


async def others_are_served(gateway: GatewayUnderTest) -> None:
    async with gateway.http() as http:
        answers = await asyncio.gather(
            *(
                http.post("/images/generations", json={**ASKED, "prompt": f"{n}", "stream": True})
                for n in range(5)
            )
        )
    assert [answer.content for answer in answers] == [COMPLETED_EVENT] * 5


async def receipt_of_the_big_one(gateway: GatewayUnderTest, count: int) -> tuple[Receipt, Delivery]:
    told = await gateway.told.until(count)
    [found] = [one for one in told if one[1].gone or one[1].bytes_out > len(BIG)]
    return found


async def test_a_client_that_never_reads_pauses_its_upstream_alone(
    start: Start, pauses: Pauses
) -> None:
    upstream = Upstream()
    async with raw_server(upstream) as server, start(at(server.port)) as gateway:
        client = await slow_client(gateway)
        await pauses.began.wait()
        await others_are_served(gateway)
        stopped = await held(gateway)
        # What the client has not taken: the mark, and the picture that passed it; not all of it.
        assert stopped < COUNT * len(BIG) - 2 * len(BIG)
        await others_are_served(gateway)
        assert await held(gateway) == stopped
        assert not upstream.all_left.is_set()
        # It leaves: a stream that nobody follows is read to its end, and booked.
        client.close()
        receipt, delivery = await receipt_of_the_big_one(gateway, 11)
        assert (receipt.cost, receipt.images, delivery.gone) == (COST, 1, "response")
        assert await held(gateway) == 0
        assert await gateway.gateway.ledger.open_holds() == 0
        # What it paid for is kept.
        async with gateway.http() as http:
            again = await http.post("/images/generations", json={**ASKED, "prompt": "big"})
        assert again.headers["x-cache"] == "hit"
        assert sum(row.cost for row in await gateway.usage()) == 6 * COST


async def one_byte_at_a_time(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while await loop.sock_recv(sock, 1):  # noqa: ASYNC110 - this is what it does
        await asyncio.sleep(0.01)


async def nothing(sock: socket.socket) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("reads", [nothing, one_byte_at_a_time])
async def test_a_paid_picture_does_not_wait_for_a_slow_reader_for_ever(
    start: Start,
    pauses: Pauses,
    monkeypatch: pytest.MonkeyPatch,
    reads: Callable[[socket.socket], Any],
) -> None:
    """A provider that is not read may cut the call. The client is dropped later, by itself."""
    monkeypatch.setattr(landing, "PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(gateway.api.door, "STALL_SECONDS", 2.0)
    upstream = Upstream()
    async with raw_server(upstream) as server, start(at(server.port)) as running:
        client = await slow_client(running)
        reading = asyncio.create_task(reads(client))
        await upstream.all_left.wait()
        # One pause, because it has not caught up since.
        assert pauses.count == 1
        assert await held(running) < COUNT * len(BIG) + 1_000_000
        receipt, delivery = await receipt_of_the_big_one(running, 1)
        assert (receipt.cost, receipt.images, delivery.gone) == (COST, 1, "stalled")
        assert await held(running) == 0
        reading.cancel()
        client.close()


async def test_a_reader_that_is_only_slow_gets_every_byte(start: Start, pauses: Pauses) -> None:
    """It pauses its upstream more than once, and in the end has all of it."""
    upstream = Upstream()
    async with raw_server(upstream) as server, start(at(server.port)) as gateway:
        client = await slow_client(gateway, receive_buffer=1 << 18)
        await pauses.began.wait()
        loop, got = asyncio.get_running_loop(), bytearray()
        while not got.endswith(b"\r\n0\r\n\r\n"):
            got += await loop.sock_recv(client, 1 << 20)
        client.close()
        assert body_of(STATUS + got) == COUNT * BIG + COMPLETED_EVENT
        assert pauses.count > 1
        receipt, delivery = await receipt_of_the_big_one(gateway, 1)
        assert (receipt.cost, delivery.gone) == (COST, "")
        assert delivery.bytes_out == COUNT * len(BIG) + len(COMPLETED_EVENT)
        assert await held(gateway) == 0


async def test_a_stream_that_nobody_is_slow_on_is_never_paused(
    start: Start, pauses: Pauses
) -> None:
    upstream = Upstream()
    async with raw_server(upstream) as server, start(at(server.port)) as gateway:
        body = json.dumps({**ASKED, "prompt": "big"}).encode()
        async with RawClient.to(gateway.port, KEY) as client:
            # JSON out of events: nobody follows them.
            answer = await client.post("/v1/images/generations", body, (JSON,))
        assert (answer.status, pauses.count) == (200, 0)
