"""Bodies as chunks: one of known bytes, one of none, and one whose source ends with its reader."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable

from gateway.ports import Growing, Parts


def once(content: bytes) -> Parts:
    return Parts((content,))


def nothing() -> Parts:
    return Parts(())


async def read(body: Callable[[], AsyncIterator[bytes]]) -> AsyncGenerator[bytes, None]:
    """A body from its beginning. Its source ends with it, wherever its reader has left it."""
    source = body()
    try:
        async for chunk in source:
            yield chunk
    finally:
        if isinstance(source, AsyncGenerator | Growing):
            await source.aclose()
