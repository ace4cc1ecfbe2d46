"""Two caches as one: a small near one in front of a large far one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from gateway.ports import Cache, Cached, CachedMeta, CacheEntry, Parts
from gateway.stores.kept import Kept


class TieredCache:
    """Asks ``front``, then ``back``; what the back had is copied to the front when it is small.

    Another process cannot reach into this one's front: a copy there may outlive a ``delete``
    elsewhere, but never ``copy_seconds`` nor the entry's own time to live.
    """

    def __init__(
        self,
        front: Cache,
        back: Cache,
        *,
        copy_max_bytes: int = 8 * 1024 * 1024,
        copy_seconds: float = 300.0,
        puts_at_once: int = 16,
    ) -> None:
        """Further puts wait: each that runs holds pieces of its answer in memory."""
        self._front = front
        self.back = back
        self._copy_max_bytes = copy_max_bytes
        self._copy_seconds = copy_seconds
        self._puts = asyncio.Semaphore(puts_at_once)

    async def get(self, key: str) -> Cached | None:
        near = await self._front.get(key)
        if near is not None:
            return near
        far = await self.back.get(key)
        if far is None or far.meta.size_bytes > self._copy_max_bytes:
            return far
        left = self._copy_seconds
        if isinstance(far, Kept):
            left = min(left, far.left_seconds)
        try:
            await self._front.put(key, far.meta, far.chunks(), left)
        except OSError:
            # The back failed while it was read, before a byte of the answer has gone out.
            return None
        return await self._front.get(key) or far

    async def put(
        self, key: str, meta: CachedMeta, chunks: AsyncIterator[bytes], ttl_seconds: float
    ) -> bool:
        if isinstance(chunks, Parts):
            # Nothing is copied, and nobody waits for the slower of the two.
            near = await self._front.put(key, meta, chunks, ttl_seconds)
            return await self.back.put(key, meta, chunks, ttl_seconds) or near
        async with self._puts:
            return await self._put_both(key, meta, chunks, ttl_seconds)

    def put_at_once(self, entry: CacheEntry, body: Parts) -> bool:
        return self.back.put_at_once(entry, body) and self._front.put_at_once(entry, body)

    async def _put_both(
        self, key: str, meta: CachedMeta, chunks: AsyncIterator[bytes], ttl_seconds: float
    ) -> bool:
        branches = (_Branch(), _Branch())
        puts = [
            asyncio.create_task(_put(cache, branch, key, meta, ttl_seconds))
            for cache, branch in zip((self._front, self.back), branches, strict=True)
        ]
        try:
            async for chunk in chunks:
                for branch in branches:
                    await branch.feed(chunk)
            for branch in branches:
                await branch.feed(None)
            return any(await asyncio.gather(*puts))
        finally:
            # Nothing to do after a whole put; after a cut one, neither tier may keep its part.
            for task in puts:
                task.cancel()
            await asyncio.gather(*puts, return_exceptions=True)

    async def holds(self, key: str) -> bool:
        return await self._front.holds(key) or await self.back.holds(key)

    async def delete(self, key: str) -> None:
        await self._front.delete(key)
        await self.back.delete(key)

    async def ping(self) -> None:
        await self._front.ping()
        await self.back.ping()

    async def aclose(self) -> None:
        await self._front.aclose()
        await self.back.aclose()


class _Branch:
    """One reader of a shared stream: holds one chunk, and takes none once its reader has left."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1)
        self._left = False

    async def feed(self, chunk: bytes | None) -> None:
        if not self._left:
            await self._queue.put(chunk)

    async def chunks(self) -> AsyncIterator[bytes]:
        while (chunk := await self._queue.get()) is not None:
            yield chunk

    def leave(self) -> None:
        self._left = True
        while not self._queue.empty():
            self._queue.get_nowait()


async def _put(
    cache: Cache, branch: _Branch, key: str, meta: CachedMeta, ttl_seconds: float
) -> bool:
    try:
        return await cache.put(key, meta, branch.chunks(), ttl_seconds)
    finally:
        branch.leave()
