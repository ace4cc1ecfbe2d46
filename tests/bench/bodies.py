"""What is asked and answered in the benchmark, as files of raw HTTP.

Replies have the form of OpenAI's (the sandbox's are the model of it): S is 1.5 KB of JSON, M 2.7 MB
(one picture in base64, ``usage`` last), L 8 MB, E a stream of three partial pictures of 700 KB and
a completed one of 2.7 MB, T a stream of the same events with tiny pictures.
"""

from __future__ import annotations

import base64
import json
import random
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

NUMBER: Final = "@" * 12
"""Where the load generator writes a number that is never the same twice."""

PATH: Final = "/v1/images/generations"
EDIT_PATH: Final = "/v1/images/edits"
REAL_MODEL: Final = "gpt-image-2.5-flare"

_USAGE: Final = {
    "input_tokens": 20,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 20},
    "output_tokens": 272,
    "total_tokens": 292,
}
_DRAWN: Final = {"output_format": "png", "quality": "low", "size": "1024x1024"}
_CREATED: Final = 1795305600
_BOUNDARY: Final = "bench-boundary-4f1d0a3c"


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer as it is sent, and its body, decoded from chunks."""

    raw: bytes
    body: bytes


@dataclass(frozen=True, slots=True)
class Question:
    """``path`` and ``body`` of a request; ``streams`` asks for events."""

    path: str
    body: bytes
    content_type: str


@cache
def picture(size: int) -> bytes:
    """A PNG of about so many bytes: noise, which no compression makes smaller."""
    side = max(8, int((size / 3) ** 0.5))
    noise = random.Random(side)
    rows = b"".join(b"\0" + noise.randbytes(3 * side) for _ in range(side))
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _base64(length: int) -> bytes:
    """A picture whose base64 is about so long."""
    return base64.b64encode(picture(length * 3 // 4))


def json_reply(length: int) -> Reply:
    """An answer with one picture whose base64 is about so long."""
    head = b'{"created":%d,"background":"opaque","data":[{"b64_json":"' % _CREATED
    tail = _dump({**_DRAWN, "usage": _USAGE})
    body = b'%b%b"}],%b' % (head, _base64(length), tail[1:])
    lines = (
        "HTTP/1.1 200 OK",
        "content-type: application/json",
        "openai-processing-ms: 1",
        f"content-length: {len(body)}",
    )
    return Reply("\r\n".join((*lines, "", "")).encode() + body, body)


def _stream_reply(partial_length: int, length: int) -> Reply:
    events = [_event("partial_image", partial_length, index) for index in range(3)]
    events.append(_event("completed", length, None))
    lines = ("HTTP/1.1 200 OK", "content-type: text/event-stream", "transfer-encoding: chunked")
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)
    raw = "\r\n".join((*lines, "", "")).encode() + chunks + b"0\r\n\r\n"
    return Reply(raw, b"".join(events))


def _event(name: str, length: int, index: int | None) -> bytes:
    kind = f"image_generation.{name}"
    said: dict[str, object] = {"background": "opaque", "created_at": _CREATED, **_DRAWN}
    if index is not None:
        said["partial_image_index"] = index
    else:
        said["usage"] = {**_USAGE, "output_tokens": 572, "total_tokens": 592}
    data = b'{"type":"%b","b64_json":"%b",%b' % (kind.encode(), _base64(length), _dump(said)[1:])
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)


@cache
def reply(name: str) -> Reply:
    """S, M, L, E or T."""
    if name == "E":
        return _stream_reply(700_000, 2_700_000)
    if name == "T":
        return _stream_reply(400, 400)
    return json_reply({"S": 1_200, "M": 2_700_000, "L": 8_000_000}[name])


def question(model: str, *, stream: bool = False, number: str = NUMBER) -> Question:
    """A generation."""
    said: dict[str, object] = {
        "model": model,
        "prompt": f"A lighthouse in a storm, seen from the sea, number {number}",
        "size": "1024x1024",
        "quality": "low",
        "n": 1,
    }
    if stream:
        said |= {"stream": True, "partial_images": 3}
    return Question(PATH, _dump(said), "application/json")


def edit(model: str, size: int, number: str = NUMBER) -> Question:
    """A form with one picture of ``size`` bytes."""
    fields = {
        "model": model,
        "prompt": f"The same by night, number {number}",
        "size": "1024x1024",
        "quality": "low",
    }
    parts = [
        f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    ]
    file = (
        f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="image"; filename="sea.png"\r\n'
        "content-type: image/png\r\n\r\n"
    )
    start, end = "".join((*parts, file)).encode(), f"\r\n--{_BOUNDARY}--\r\n".encode()
    kind = f"multipart/form-data; boundary={_BOUNDARY}"
    return Question(EDIT_PATH, start + picture(size) + end, kind)


def raw_request(question: Question, port: int, headers: Mapping[str, str]) -> bytes:
    """As it goes over the wire."""
    lines = [
        f"POST {question.path} HTTP/1.1",
        f"host: 127.0.0.1:{port}",
        f"content-type: {question.content_type}",
        f"content-length: {len(question.body)}",
        "accept: */*",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join((*lines, "", "")).encode() + question.body


def write(folder: Path, name: str, data: bytes) -> Path:
    """A file of this name; its path."""
    path = folder / name
    path.write_bytes(data)
    return path


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
