"""An HTTP client that sends exactly the bytes it is told to, for what no client library would.

::

    async with RawClient.to(port) as client:
        answer = await client.post("/v1/images/edits", body, ("content-type: text/plain",))
        assert answer.status == 415 and await client.is_open()
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

WAIT_SECONDS = 60
READ_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """One answer. ``headers`` are as they came, names in lower case; ``body`` is empty and only
    its ``sha256`` and ``body_bytes`` are known where it was not to be kept."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    body_bytes: int
    sha256: str

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def headers_of(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object. An answer that has none, or more beside it, fails the test."""
        document = self.json
        assert list(document) == ["error"], document
        error = document["error"]
        assert sorted(error) == ["code", "message", "param", "type"], error
        return dict(error)


@dataclass(slots=True)
class RawClient:
    """One connection. Every wait ends after ``WAIT_SECONDS``."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    authorization: str = ""
    sent: int = field(default=0)

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, port: int, key: str = "") -> AsyncIterator[RawClient]:
        """A connection to a port of this machine; with ``key``, a bearer in each request."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=READ_BYTES)
        try:
            yield cls(reader, writer, f"authorization: Bearer {key}" if key else "")
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def send(self, data: bytes) -> None:
        """Sends bytes, as they are, and waits while the other side takes no more."""
        self.writer.write(data)
        self.sent += len(data)
        async with asyncio.timeout(WAIT_SECONDS):
            await self.writer.drain()

    async def head(
        self, path: str, headers: Sequence[str | bytes] = (), method: str = "POST"
    ) -> None:
        """A request line and headers; ``host`` and the key are added."""
        lines: list[bytes] = [f"{method} {path} HTTP/1.1".encode(), b"host: gateway"]
        lines += [self.authorization.encode()] * bool(self.authorization)
        lines += [line.encode("latin-1") if isinstance(line, str) else line for line in headers]
        await self.send(b"\r\n".join(lines) + b"\r\n\r\n")

    async def post(
        self, path: str, body: bytes, headers: Sequence[str | bytes] = (), *, keep: bool = True
    ) -> RawAnswer:
        """A request with the length of its body announced, and its answer."""
        await self.head(path, (*headers, f"content-length: {len(body)}"))
        await self.send(body)
        return await self.answer(keep=keep)

    async def post_chunked(
        self, path: str, pieces: Iterable[bytes], headers: Sequence[str | bytes] = ()
    ) -> RawAnswer:
        """The same without a length: each piece is a chunk."""
        await self.head(path, (*headers, "transfer-encoding: chunked"))
        for piece in pieces:
            await self.chunk(piece)
        await self.send(b"0\r\n\r\n")
        return await self.answer()

    async def chunk(self, piece: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(piece), piece))

    async def answer(self, *, keep: bool = True) -> RawAnswer:
        """The next answer, its body to the end: by its length, its chunks, or the close."""
        async with asyncio.timeout(WAIT_SECONDS):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            status_line, *lines = head[:-4].split("\r\n")
            headers = tuple(
                (name.lower(), value.strip())
                for name, _, value in (line.partition(":") for line in lines)
            )
            named = dict(headers)
            body, count, digest = bytearray(), 0, hashlib.sha256()
            async for piece in self._body(named):
                count += len(piece)
                digest.update(piece)
                if keep:
                    body += piece
            status = int(status_line.split(" ")[1])
            return RawAnswer(status, headers, bytes(body), count, digest.hexdigest())

    async def _body(self, headers: dict[str, str]) -> AsyncIterator[bytes]:
        if "content-length" in headers:
            async for piece in self._exactly(int(headers["content-length"])):
                yield piece
        elif headers.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                async for piece in self._exactly(size):
                    yield piece
                assert await self.reader.readexactly(2) == b"\r\n"
            assert await self.reader.readexactly(2) == b"\r\n"
        else:
            while piece := await self.reader.read(READ_BYTES):
                yield piece

    async def _exactly(self, count: int) -> AsyncIterator[bytes]:
        while count:
            piece = await self.reader.read(min(count, READ_BYTES))
            if not piece:
                raise asyncio.IncompleteReadError(b"", count)
            count -= len(piece)
            yield piece

    async def is_open(self) -> bool:
        """Whether the connection takes another request: asks, and has an answer."""
        await self.head("/healthz", method="GET")
        return (await self.answer()).status == 200

    async def closed(self) -> bool:
        """Waits until the other side closes, with a reset or without; anything sent fails."""
        async with asyncio.timeout(WAIT_SECONDS):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True


BOUNDARY = "b0undary"
FORM = f"content-type: multipart/form-data; boundary={BOUNDARY}"
JSON = "content-type: application/json"


@dataclass(frozen=True, slots=True)
class Field:
    """One part of a form: a text, or with ``filename`` a file. ``headers`` stand instead of the
    usual ones."""

    name: str
    content: bytes
    filename: str | None = None
    content_type: str = "image/png"
    headers: bytes | None = None

    def head(self) -> bytes:
        if self.headers is not None:
            return self.headers
        line = f'Content-Disposition: form-data; name="{self.name}"'
        if self.filename is not None:
            line += f'; filename="{self.filename}"'
            if self.content_type:
                line += f"\r\nContent-Type: {self.content_type}"
        return line.encode()


def form(*fields: Field, boundary: str = BOUNDARY) -> bytes:
    """The body of a form, its parts in the order given."""
    mark = f"--{boundary}".encode()
    parts = [b"%b\r\n%b\r\n\r\n%b\r\n" % (mark, part.head(), part.content) for part in fields]
    return b"".join(parts) + mark + b"--\r\n"


def texts(**fields: str) -> list[Field]:
    """Text fields, in the order given."""
    return [Field(name, text.encode()) for name, text in fields.items()]
