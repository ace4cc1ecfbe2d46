"""Short words for the tests of this folder."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterable

import pytest
import trustme

from gateway.upstream.transport import SocketTransport
from gateway.upstream.wire import Exchange, Lost, Origin, Reason, Timeouts, WireRequest

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


def slots(transport: SocketTransport) -> tuple[int, int]:
    """Owned and idle, over all origins."""
    pools = [home.pool for home in transport._homes.values()]
    return sum(pool.slots for pool in pools), sum(pool.idle for pool in pools)


async def fails(transport: SocketTransport, request: WireRequest) -> Reason:
    """Why the request, or the reading of its answer, was lost. Its slot must be free then."""
    with pytest.raises(Lost) as caught:
        await ask(transport, request)
    assert slots(transport) == (0, 0)
    return caught.value.reason


def server_tls(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context
