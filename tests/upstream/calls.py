"""Short words for the tests of this folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from gateway.upstream.transport import SocketTransport
from gateway.upstream.wire import Exchange, Origin, Timeouts, WireRequest

QUICK = Timeouts(pool=5, connect=5, write=5, first_byte=5, total=5)


async def pieces(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def post(
    port: int,
    body: bytes | Iterable[bytes] = b"{}",
    *,
    length: int | None = None,
    timeouts: Timeouts = QUICK,
    host: str = "127.0.0.1",
    tls: bool = False,
    headers: tuple[tuple[str, str], ...] = (),
) -> WireRequest:
    chunks = [body] if isinstance(body, bytes) else list(body)
    size = sum(map(len, chunks)) if length is None else length
    return WireRequest(
        method="POST",
        origin=Origin(tls, host, port),
        target="/v1/images/generations",
        headers=(("host", "test"), ("content-length", str(size)), *headers),
        body=pieces(chunks),
        length=size,
        timeouts=timeouts,
    )


async def read_all(exchange: Exchange) -> bytes:
    whole = []
    while chunk := await exchange.read():
        whole.append(chunk)
    return b"".join(whole)


async def ask(transport: SocketTransport, request: WireRequest) -> tuple[int, bytes]:
    exchange = await transport.exchange(request)
    return exchange.status, await read_all(exchange)


async def until(true: Callable[[], bool]) -> None:
    """Lets the loop turn until something is so. pytest's time-out is the bound."""
    while not true():  # noqa: ASYNC110 - what is waited for has no event to set
        await asyncio.sleep(0)
