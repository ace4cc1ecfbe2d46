"""A receiver of webhooks: a real HTTP server that checks each signature by itself."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.upstream.raw_server import Peer, raw_server

RAW_SECRET = bytes(range(32))
SECRET = f"whsec_{base64.b64encode(RAW_SECRET).decode()}"


@dataclass
class Post:
    """One request as it came."""

    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        found = json.loads(self.body)
        assert isinstance(found, dict)
        return found

    @property
    def is_signed(self) -> bool:
        """As standardwebhooks.com says it, written from there and not from our code."""
        text = f"{self.headers['webhook-id']}.{self.headers['webhook-timestamp']}."
        mac = hmac.new(RAW_SECRET, text.encode() + self.body, hashlib.sha256).digest()
        return self.headers.get("webhook-signature") == "v1," + base64.b64encode(mac).decode()


@dataclass
class Inbox:
    """``answers`` are given in turn, the last for ever: a status, a whole status line with headers,
    or None for silence."""

    answers: Sequence[int | str | None] = (204,)
    port: int = 0
    posts: list[Post] = field(default_factory=list)
    on_post: Callable[[], None] = lambda: None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hooks/token-5f2c?to=ops"

    async def until(self, count: int) -> list[Post]:
        async with asyncio.timeout(30):
            while len(self.posts) < count:
                self._news.clear()
                await self._news.wait()
        return self.posts

    async def take(self, peer: Peer) -> None:
        while True:
            head, body = await peer.request()
            first, *lines = head.decode().rstrip().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            answer = self.answers[min(len(self.posts), len(self.answers) - 1)]
            self.posts.append(Post(first.split()[1], headers, body))
            self.on_post()
            self._news.set()
            if answer is None:
                await peer.gone()
                return
            status, *more = str(answer).split("\n")
            await peer.send(
                "\r\n".join(
                    (f"HTTP/1.1 {status} Answer", "content-length: 0", *more, "", "")
                ).encode()
            )


@asynccontextmanager
async def inbox(*answers: int | str | None) -> AsyncIterator[Inbox]:
    box = Inbox(answers or (204,))
    async with raw_server(box.take) as server:
        box.port = server.port
        yield box
