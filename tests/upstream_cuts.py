"""An images upstream whose every byte is scripted: answers of known cost, to be cut anywhere.

Each connection carries one request, so that the number of connections is the number of calls.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from tests.upstream.raw_server import Peer, RawServer

Script = Callable[[Peer], Awaitable[None]]

USAGE = (
    b'{"input_tokens":10,"output_tokens":196,"total_tokens":206,'
    b'"input_tokens_details":{"text_tokens":10,"image_tokens":0}}'
)
COST = 10 * 5_000 + 196 * 30_000
"""Nano-dollars of that usage at the list price of gpt-image-2.5."""
PNG = b"iVBORw0KGgoA"
CLOSE = b"connection: close\r\n"


def answer(picture_bytes: int = 400) -> bytes:
    """A JSON answer."""
    return (
        b'{"created":1,"data":[{"b64_json":"%b"}],"output_format":"png","quality":"low",'
        b'"size":"1024x1024","usage":%b}' % (PNG.ljust(picture_bytes, b"A"), USAGE)
    )


def partial(picture_bytes: int = 400) -> bytes:
    """A partial picture's event."""
    return (
        b"event: image_generation.partial_image\n"
        b'data: {"type":"image_generation.partial_image","b64_json":"%b",'
        b'"partial_image_index":0,"size":"1024x1024","quality":"low"}\n\n'
        % PNG.ljust(picture_bytes, b"A")
    )


def completed(picture_bytes: int = 400) -> bytes:
    """The completed event."""
    return (
        b"event: image_generation.completed\n"
        b'data: {"type":"image_generation.completed","b64_json":"%b",'
        b'"size":"1024x1024","quality":"low","usage":%b}\n\n'
        % (PNG.ljust(picture_bytes, b"A"), USAGE)
    )


def json_head(length: int | None = None, *, chunked: bool = False) -> bytes:
    """The head of a JSON answer: with a length, in chunks, or until the connection closes."""
    framing = b"transfer-encoding: chunked\r\n" if chunked else b""
    framing += b"content-length: %d\r\n" % length if length is not None else b""
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + CLOSE + framing + b"\r\n"


def stream_head(*, chunked: bool = True) -> bytes:
    framing = b"transfer-encoding: chunked\r\n" if chunked else b""
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + CLOSE + framing + b"\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


async def good(peer: Peer) -> None:
    """Takes a request and answers it, in the form that it asks for."""
    _, body = await peer.request()
    if re.search(rb'"stream":\s*true', body):
        await peer.send(stream_head() + chunk(partial()) + chunk(completed()) + LAST_CHUNK)
    else:
        await peer.send(json_head(len(answer())) + answer())


def cut(data: bytes, *, reset: bool = False) -> Script:
    """Takes the request, sends ``data`` and closes."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(data)
        if reset:
            peer.reset()

    return script


def hang(data: bytes = b"") -> Script:
    """Takes the request, sends ``data``, and nothing more until the other side gives up."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(data)
        await peer.gone()

    return script


def drip(head: bytes, byte: bytes = b" ") -> Script:
    """Takes the request, and answers a byte at a time for as long as it is listened to."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(head)
        with suppress(ConnectionError):
            while not peer.writer.is_closing():
                await peer.send(byte)
                await asyncio.sleep(0.02)

    return script


def cut_request(after_bytes: int) -> Script:
    """Resets the connection after so many bytes of the request's body."""

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.reader.readexactly(after_bytes)
        peer.reset()

    return script


async def never_reads(peer: Peer) -> None:
    """Takes the head of the request, and no more than its buffers hold."""
    await peer.head()
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.Event().wait()


def first(script: Script) -> Script:
    """``script`` for the first request, good answers from then on."""

    async def run(peer: Peer) -> None:
        await (script if peer.number == 1 else good)(peer)

    return run


def at(server: RawServer, **timeouts: float) -> dict[str, Any]:
    """The changes of a configuration that make ``server`` the upstream."""
    upstream: dict[str, Any] = {"base_url": f"http://127.0.0.1:{server.port}/v1"}
    if timeouts:
        upstream["timeouts"] = timeouts
    return {
        "upstreams": {"openai": upstream},
        "teams": {"growth": {"budget": {"day": 1000, "month": 10_000}}},
    }
