"""A kept answer in its other form: JSON as a completed event, a completed event as JSON.

The picture's base64 is not touched: the other form is a *splice*, literal bytes and spans of the
source, and the spans are streamed through. Only the small members are written anew.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Mapping
from math import isfinite
from typing import Any, TypeAlias

from gateway.domain.call import Operation, Span
from gateway.relay.skim import Hole, Skimmed

Body: TypeAlias = Callable[[], AsyncIterator[bytes]]

Splice: TypeAlias = tuple[bytes | Span, ...]
"""Literal bytes, and spans of the source in ascending order."""

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
"""``json.dumps`` makes one for each value: made once, an event's members cost half as much."""

# The members in the order of contract 1.3 and 1.4; those that are not named come before `usage`,
# which stays last as OpenAI writes it.
_BEFORE_DATA = ("created", "background")
_AFTER_DATA = ("output_format", "quality", "safety_identifier", "size", "svg_usage")
_EVENT_TYPE = {
    Operation.GENERATION: "image_generation.completed",
    Operation.EDIT: "image_edit.completed",
}


_ALWAYS_WRITTEN: frozenset[type] = frozenset({str, int, bool, type(None)})


class SourceTooShort(Exception):
    """The source ended before the last span of the splice was complete."""


def completed_event(operation: Operation, answer: Skimmed) -> Splice | None:
    """A JSON answer as one server-sent event, its blank line included.

    None where that cannot be said: not exactly one picture, a url instead of its bytes, an error,
    or a long string beside the picture.
    """
    document = answer.value
    picture = _only_picture(document)
    if picture is None:
        return None
    rest = _beside_picture(document, picture)
    if "created" in rest:
        rest["created_at"] = rest.pop("created")
    kind = _EVENT_TYPE[operation]
    members = _members(rest, ("background", "created_at", *_AFTER_DATA))
    if members is None:
        return None
    return (
        f'event: {kind}\ndata: {{"type":"{kind}","b64_json":'.encode(),
        *_string(picture["b64_json"]),
        b"".join(b"," + member for member in members) + b"}\n\n",
    )


def has_event(answer: Skimmed) -> bool:
    """Whether ``completed_event`` can be said. Most answers are never asked for as one: to write
    it takes 13 values through the JSON encoder, to look takes a tenth."""
    picture = _only_picture(answer.value)
    return picture is not None and _is_written(_beside_picture(answer.value, picture))


def _beside_picture(document: Mapping[str, Any], picture: Mapping[str, Any]) -> dict[str, Any]:
    """What an event says beside its picture, under the names that it has in an answer."""
    rest = {name: value for name, value in picture.items() if name not in ("b64_json", "url")}
    rest |= {name: value for name, value in document.items() if name != "data"}
    rest.pop("type", None)
    return rest


def _is_written(value: object) -> bool:
    """Whether JSON can be made of a value without its source: no hole, no number beyond JSON."""
    if isinstance(value, dict | list):
        for member in value.values() if isinstance(value, dict) else value:
            # Of the thirteen values of an answer ten are these: one look each, and no call.
            if member.__class__ not in _ALWAYS_WRITTEN and not _is_written(member):
                return False
        return True
    if isinstance(value, float):
        return isfinite(value)
    return not isinstance(value, Hole)


def answer(event: Skimmed) -> Splice | None:
    """The data of a completed event as a JSON answer.

    None where it is not a completed event with a picture, or has a long string beside it. Who
    names the event in its ``event:`` line alone has no ``type``.
    """
    document = event.value
    if not isinstance(document, dict) or document.get("error") is not None:
        return None
    picture = document.get("b64_json")
    kind = document.get("type", _EVENT_TYPE[Operation.GENERATION])
    if not isinstance(kind, str) or not kind.endswith(".completed"):
        return None
    if not isinstance(picture, str | Hole):
        return None
    if picture == "":
        return None
    rest = {name: value for name, value in document.items() if name not in ("b64_json", "type")}
    if "created_at" in rest:
        rest["created"] = rest.pop("created_at")
    beside = {"revised_prompt": rest.pop("revised_prompt")} if "revised_prompt" in rest else {}
    before = _members({name: rest.pop(name) for name in _BEFORE_DATA if name in rest}, _BEFORE_DATA)
    rest.pop("data", None)
    after = _members(rest, _AFTER_DATA)
    inside = _members(beside, ())
    if before is None or after is None or inside is None:
        return None
    return (
        b"{" + b"".join(member + b"," for member in before) + b'"data":[{"b64_json":',
        *_string(picture),
        b"".join(b"," + member for member in inside)
        + b"}]"
        + b"".join(b"," + member for member in after)
        + b"}",
    )


def written(value: Any) -> Splice:
    """A skimmed value as JSON again: each hole is spliced from its place, the rest written anew.

    Raises ``ValueError`` for a number that JSON does not have, and where the holes do not ascend:
    a name that stood twice counts where it stood first.
    """
    found: list[bytes | Span] = []
    literal = bytearray()
    end = 0
    for part in _parts(value):
        if not isinstance(part, Span):
            literal += part
            continue
        if part.start < end:
            raise ValueError("the holes of a document must ascend")
        end = part.end
        found += [bytes(literal), part]
        literal.clear()
    return (*found, bytes(literal))


def _parts(value: Any) -> Iterator[bytes | Span]:
    if isinstance(value, dict):
        yield b"{"
        for index, (name, member) in enumerate(value.items()):
            yield (b"," if index else b"") + _json(name) + b":"
            yield from _parts(member)
        yield b"}"
    elif isinstance(value, list):
        yield b"["
        for index, member in enumerate(value):
            yield b"," if index else b""
            yield from _parts(member)
        yield b"]"
    elif isinstance(value, Hole):
        yield from _string(value)
    else:
        yield _json(value)


def length(splice: Splice) -> int:
    """The size in bytes of what a splice makes: its Content-Length."""
    found = 0
    for part in splice:
        found += part.end - part.start if isinstance(part, Span) else len(part)
    return found


async def pieces(
    splice: Splice, source: AsyncIterable[bytes], *, origin: int = 0
) -> AsyncIterator[bytes]:
    """The bytes that a splice makes, reading the source once and no further than needed.

    ``origin`` is the offset of the source's first byte in the stream that the spans count. Closing
    the source is the caller's business. Raises ``SourceTooShort``, and ``ValueError`` for spans
    that do not ascend.
    """
    cutter = _Cutter(splice, origin)
    for piece in cutter.feed(b""):
        yield piece
    if cutter.finished():
        return
    async for chunk in source:
        for piece in cutter.feed(chunk):
            yield piece
        if cutter.finished():
            return
    raise SourceTooShort("The source ends before the splice does.")


class _Cutter:
    """Walks a splice along its source."""

    __slots__ = ("_from", "_position", "_rest")

    def __init__(self, splice: Splice, origin: int) -> None:
        end = origin
        for part in splice:
            if isinstance(part, Span):
                if not end <= part.start <= part.end:
                    raise ValueError("the spans of a splice must ascend")
                end = part.end
        self._rest = list(reversed(splice))
        self._from = -1  # how far the first span of the rest was written, -1: not begun
        self._position = origin

    def feed(self, chunk: bytes) -> list[bytes]:
        """What the splice says as far as this chunk of the source goes."""
        written = []
        start = self._position
        self._position += len(chunk)
        while self._rest:
            part = self._rest[-1]
            if isinstance(part, Span):
                at = max(part.start, self._from)
                until = min(part.end, self._position)
                if at < until:
                    written.append(chunk[at - start : until - start])
                    self._from = until
                if self._position < part.end:
                    return written
                self._from = -1
            elif part:
                written.append(part)
            self._rest.pop()
        return written

    def finished(self) -> bool:
        return not self._rest


def _only_picture(document: object) -> Mapping[str, Any] | None:
    """The one entry of an answer's ``data``, if it carries its picture itself."""
    if not isinstance(document, dict) or document.get("error") is not None:
        return None
    entries = document.get("data")
    if not isinstance(entries, list) or len(entries) != 1 or not isinstance(entries[0], dict):
        return None
    picture = entries[0]
    content = picture.get("b64_json")
    if picture.get("url") is not None or not isinstance(content, str | Hole) or content == "":
        return None
    return picture


def _string(content: str | Hole) -> Splice:
    """A string's JSON: the raw content of a hole between quotes, a kept string written anew."""
    if isinstance(content, Hole):
        return b'"', Span(content.start, content.end), b'"'
    return (_json(content),)


def _members(values: Mapping[str, Any], order: tuple[str, ...]) -> list[bytes] | None:
    """Members as ``"name":value``: in this order, then the others, then ``usage``.

    None where a hole is among them, because only the picture is streamed from its place.
    """
    known = [name for name in order if name in values]
    others = [name for name in values if name not in order and name != "usage"]
    last = ["usage"] if "usage" in values else []
    try:
        return [_json(name) + b":" + _json(values[name]) for name in (*known, *others, *last)]
    except (TypeError, ValueError):
        # A hole, or a number that JSON does not have.
        return None


def _json(value: Any) -> bytes:
    """Half a surrogate pair stays the escape that it came as."""
    try:
        return _ENCODER.encode(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
