"""Pictures as urls of this gateway, for clients that asked for urls.

Everywhere else a picture's base64 is passed on as it came. Here it is decoded, piece by piece,
into a store from which anybody may fetch it who has its url: signed, and over after a while. Of
the answer everything else stays.
"""

from __future__ import annotations

import asyncio
import binascii
import hashlib
import hmac
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import parse_qs

from gateway.domain import keys
from gateway.domain.call import Span
from gateway.domain.errors import NotServed, Overloaded
from gateway.ports import Cache, Cached, CachedMeta, Clock, Unreachable
from gateway.relay import picture, replay
from gateway.relay.chunks import once, read
from gateway.relay.flights import Head
from gateway.relay.skim import BadJson, Hole, JsonSkimmer

log = logging.getLogger(__name__)

HOSTED = "/v1/images/hosted/"
"""Pictures are below this path, by name."""
KEEP_BYTES = 16 * 1024
STEP_BYTES = 256 * 1024
"""How much base64 is looked at, or decoded, in one go; a multiple of four."""
MAX_QUERY_BYTES = 512
BINARY = "application/octet-stream"

SPARE = 0.5
"""How much longer than a url's life a picture is kept, as a part of that: for so long it is
handed out again as it is, and each url still opens it to its end."""

_PURPOSE = "urls of hosted pictures"
_NAMING = "names of hosted pictures"
_EXTENSIONS = MappingProxyType(
    {
        picture.PNG: "png",
        picture.JPEG: "jpg",
        picture.WEBP: "webp",
        picture.GIF: "gif",
        picture.BMP: "bmp",
        picture.TIFF: "tiff",
        picture.SVG: "svg",
    }
)
_EXPIRES = re.compile(r"[0-9]{1,12}", re.ASCII)

Body: TypeAlias = Callable[[], AsyncIterator[bytes]]


class NotHosted(Exception):
    """A picture cannot be handed over as a url. ``str()`` says why, for the log."""


class Links:
    """The urls of pictures: who holds one may fetch what it names until it expires.

    The key of the signatures is derived from the pepper, and old peppers open what they signed.
    """

    def __init__(self, public_url: str, ttl: timedelta, peppers: Callable[[], keys.Peppers]):
        """``public_url`` is where this gateway is reached, without a slash at its end."""
        self._public_url = public_url
        self.ttl = ttl
        self._peppers = peppers

    def make(self, name: str, now: datetime) -> str:
        expires = int((now + self.ttl).timestamp())
        [signature, *_] = self._signatures(name, str(expires))
        query = f"expires={expires}&signature={signature}"
        return f"{self._public_url}{HOSTED}{name}?{query}"

    def name(self, team: str, digest: bytes, index: int) -> str:
        """What the picture at ``index`` of an answer is called, without its ending: the same
        whenever the team gets the same answer. It tells nobody which answer that is."""
        key = keys.derived(self._peppers(), _NAMING)
        text = digest + f"{index}\n{team}".encode()
        return hmac.digest(key, text, hashlib.sha256).hex()[:32]

    def left_seconds(self, name: str, query: str, now: datetime) -> int | None:
        """How long a name may be fetched with a url's query; None where it may not, for whatever
        reason: each takes the same time."""
        expires, signature = _said(query)
        opened = False
        for right in self._signatures(name, expires):
            opened |= hmac.compare_digest(right.encode(), signature.encode())
        left = int(expires or 0) - now.timestamp()
        return max(0, int(left)) if opened and left > 0 else None

    def _signatures(self, name: str, expires: str) -> list[str]:
        """A name's signatures, the current pepper's first."""
        text = f"{name}\n{expires}".encode("utf-8", "surrogateescape")
        return [
            hmac.digest(key, text, hashlib.sha256).hex()
            for key in self._peppers().digests(_PURPOSE)
        ]


def _said(query: str) -> tuple[str, str]:
    """``expires`` and ``signature`` of a url's query, empty where it does not say them once."""
    try:
        found = parse_qs(query[:MAX_QUERY_BYTES], max_num_fields=8)
    except ValueError:
        found = {}
    expires, signature = (
        values[0] if len(values := found.get(name, [])) == 1 else ""
        for name in ("expires", "signature")
    )
    return (expires if _EXPIRES.fullmatch(expires) else ""), signature


@dataclass(frozen=True, slots=True)
class HostedPicture:
    """A picture that may be fetched for ``left_seconds`` more. ``chunks`` may be read again."""

    name: str
    media_type: str
    size_bytes: int
    left_seconds: int
    chunks: Callable[[], AsyncIterator[bytes]]


class Hosting:
    """Puts pictures behind urls, and has them for whoever comes with one."""

    def __init__(
        self,
        store: Cache,
        links: Links,
        clock: Clock,
        counted: Callable[[str], None] = lambda outcome: None,
    ) -> None:
        """``counted`` hears ``stored`` of each picture, or ``reused`` where it was already, and
        ``failed`` of each answer whose pictures could not be."""
        self._store = store
        self._links = links
        self._clock = clock
        self._counted = counted

    async def hosted(self, head: Head, team: str) -> Head:
        """A JSON answer with a url in place of each picture's base64. It closes what ``head``
        holds, or leaves that to its own ``close``. An answer that this team had already is not
        stored once more: what costs nothing must not push out what others wait for.

        Raises ``NotHosted``; then nothing of it is kept, and ``head`` is as it was.
        """
        stored: list[str] = []
        try:
            return await self._hosted(head, team, stored)
        except (BadJson, replay.SourceTooShort, OSError, Unreachable, ValueError) as error:
            self._counted("failed")
            for key in stored:
                await self._store.delete(key)
            raise NotHosted(str(error) or type(error).__name__) from error

    async def _hosted(self, head: Head, team: str, stored: list[str]) -> Head:
        document, digest = await _skimmed(head.body)
        entries = document.get("data") if isinstance(document, dict) else None
        if not isinstance(entries, list):
            raise ValueError("an answer without data")
        mended = []
        async with aclosing(read(head.body)) as source:
            cursor = _Cursor(source)
            for index, entry in enumerate(entries):
                key = self._links.name(team, digest, index)
                mended.append(await self._with_url(entry, key, cursor, stored))
        form = replay.written({**document, "data": mended})
        if any(isinstance(part, Span) for part in form):
            return replace(head, length=replay.length(form), body=lambda: _spliced(form, head.body))
        content = b"".join(part for part in form if not isinstance(part, Span))
        head.close()
        return Head.of(head.status, head.headers, content)

    async def _with_url(self, entry: Any, key: str, cursor: _Cursor, stored: list[str]) -> Any:
        """One of an answer's entries, with a url where its picture was."""
        content = entry.get("b64_json") if isinstance(entry, dict) else None
        if not content:
            return entry
        url = await self._url(key, _found(content), cursor, stored)
        members = {name: value for name, value in entry.items() if name != "url"}
        return {
            ("url" if name == "b64_json" else name): (url if name == "b64_json" else value)
            for name, value in members.items()
        }

    async def _url(self, key: str, found: _Found, cursor: _Cursor, stored: list[str]) -> str:
        """Raises ``OSError`` where the picture is not there afterwards."""
        now = self._clock.now()
        head = binascii.a2b_base64(found.head)
        seen = picture.probe(head)
        media_type = seen.media_type if seen and seen.media_type in _EXTENSIONS else BINARY
        url = self._links.make(f"{key}.{_EXTENSIONS.get(media_type, 'bin')}", now)
        known = await self._store.get(key)
        if known is not None and now - known.meta.stored_at <= self._links.ttl * SPARE:
            self._counted("reused")
            return url
        meta = CachedMeta(
            stored_at=now, cost=0, images=1, model_served="", upstream="",
            size_bytes=found.size_bytes, headers=(("content-type", media_type),),
        )  # fmt: skip
        coded = once(found.literal) if found.span is None else cursor.span(found.span)
        if known is None:
            # Else another answer's url may name it.
            stored.append(key)
        seconds = (self._links.ttl * (1 + SPARE)).total_seconds()
        async with aclosing(coded), aclosing(_decoded(coded)) as chunks:
            await self._store.put(key, meta, chunks, seconds)
        if not await self._store.holds(key):
            raise OSError("the store of hosted pictures does not take it")
        self._counted("stored")
        return url

    async def find(self, name: str, query: str) -> HostedPicture:
        """What a url names; ``query`` is what stands behind its question mark.

        Raises ``NotServed`` for an unknown name, a wrong signature and one whose time is over,
        alike in words and time; ``Overloaded`` where the store cannot hand it out now.
        """
        left = self._links.left_seconds(name, query, self._clock.now())
        if left is None:
            raise no_picture()
        key = name.partition(".")[0]
        kept = await self._store.get(key)
        if kept is None:
            if await self._is_gone(key):
                raise no_picture()
            raise Overloaded(
                "The picture cannot be fetched now: its store does not answer. Try again.",
                code="hosted_unavailable",
                should_retry=True,
                retry_after_seconds=5,
            )
        return _hosted_picture(name, kept, left)

    async def _is_gone(self, key: str) -> bool:
        """Whether a picture is surely not there, and not only hard to have now."""
        try:
            return not await self._store.holds(key)
        except (OSError, Unreachable):
            return False


def no_picture() -> NotServed:
    """The one answer to every url that opens nothing."""
    return NotServed(
        "There is no picture at this url. It is not complete, or its time is over.",
        code="picture_not_found",
    )


def not_hosted(rid: str, *, kept: bool) -> Overloaded:
    """What is said where a picture cannot be put behind a url. ``kept``: it was bought, and is
    among the results under this request id; else it is in the cache, and is had again for
    nothing."""
    if kept:
        return Overloaded(
            "The picture was made, and could not be put behind a url. It is not lost: fetch it "
            f"with GET /v1/images/results/{rid}, or ask without response_format=url.",
            code="picture_not_hosted",
            should_retry=False,
        )
    return Overloaded(
        "The picture could not be put behind a url. Nothing was bought. Try again, or ask without "
        "response_format=url.",
        code="picture_not_hosted",
        should_retry=True,
        retry_after_seconds=5,
    )


def _hosted_picture(name: str, kept: Cached, left_seconds: int) -> HostedPicture:
    media_type = dict(kept.meta.headers).get("content-type", BINARY)
    return HostedPicture(name, media_type, kept.meta.size_bytes, left_seconds, kept.chunks)


class _Found(NamedTuple):
    """A picture's base64: at ``span`` of the answer, or, where that is None, ``literal`` itself.
    ``head`` is how it begins, whole groups of it."""

    head: bytes
    size_bytes: int
    span: Span | None
    literal: bytes = b""


def _found(content: Any) -> _Found:
    """Raises ``ValueError`` for what is no base64."""
    if isinstance(content, str):
        literal = content.partition(",")[2] if content.startswith("data:") else content
        decoded = binascii.a2b_base64(literal, strict_mode=True)
        return _Found(literal.encode(), len(decoded), None, literal.encode())
    if not isinstance(content, Hole) or not content.base64:
        raise ValueError("a picture that is not base64")
    skip = content.head.find(b",") + 1 if content.head.startswith(b"data:") else 0
    span = Span(content.start + skip, content.end)
    head = content.head[skip:]
    size = (span.end - span.start) // 4 * 3 - content.padding
    return _Found(head[: len(head) // 4 * 4], size, span)


class _Cursor:
    """A source, read once, by spans that ascend."""

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        self._source = source
        self._at = 0
        self._rest = b""

    async def span(self, span: Span) -> AsyncGenerator[bytes, None]:
        """Raises ``SourceTooShort``, and ``ValueError`` for a span behind which it is already."""
        start, end = span
        if start < self._at:
            raise ValueError("spans that do not ascend")
        while start < end:
            if not self._rest:
                chunk = await anext(self._source, None)
                if chunk is None:
                    raise replay.SourceTooShort("The source ends before the picture does.")
                self._rest = chunk
            skip = start - self._at
            piece = self._rest[skip : skip + end - start]
            taken = min(len(self._rest), skip + len(piece))
            self._at += taken
            self._rest = self._rest[taken:]
            start += len(piece)
            if piece:
                yield piece


async def _decoded(coded: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The bytes that base64 stands for, which is known to be right."""
    left = b""
    async for chunk in coded:
        for at in range(0, len(chunk), STEP_BYTES):
            piece = left + chunk[at : at + STEP_BYTES]
            whole = len(piece) // 4 * 4
            left = piece[whole:]
            if whole:
                yield binascii.a2b_base64(piece[:whole])


async def _skimmed(body: Body) -> tuple[Any, bytes]:
    """The document, and the SHA-256 of its bytes. Raises ``BadJson``."""
    digest = hashlib.sha256()
    skimmer = JsonSkimmer(keep_bytes=KEEP_BYTES, lenient=True, check_base64=True)
    looked_at = 0
    async with aclosing(read(body)) as chunks:
        async for chunk in chunks:
            skimmer.feed(chunk)
            digest.update(chunk)
            looked_at += len(chunk)
            if looked_at >= STEP_BYTES:
                # What comes from memory never waits by itself.
                looked_at = 0
                await asyncio.sleep(0)
    return skimmer.close().value, digest.digest()


async def _spliced(form: replay.Splice, body: Body) -> AsyncGenerator[bytes, None]:
    async with aclosing(read(body)) as source:
        async for piece in replay.pieces(form, source):
            yield piece
