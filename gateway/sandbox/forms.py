"""Bodies into fields and files. The sandbox has a reader of its own, so that it cannot share a
mistake with the gateway's."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from typing import TypeAlias

from gateway.domain.call import Json
from gateway.sandbox.journal import FilePart

_DISPOSITION = re.compile(r';\s*(name|filename)="((?:[^"\\]|\\.)*)"')
_DATA_URL = re.compile(r"data:([a-z0-9.+/-]*)(;base64)?,", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of /v1/files. Times are in seconds since 1970."""

    id: str
    filename: str
    purpose: str
    content: bytes
    created: int
    expires: int | None = None


Stored: TypeAlias = Callable[[str], StoredFile | None]
"""The file of an id, if the asking key's project has it."""


class Malformed(Exception):
    """The body cannot be read at all."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A file and its content."""

    part: FilePart
    content: bytes


@dataclass(frozen=True, slots=True)
class Form:
    """What a body says. ``texts`` is True where every field is text (multipart), to be converted
    by its type. ``repeated`` are the names of single fields that came more than once."""

    fields: Mapping[str, Json]
    uploads: tuple[Upload, ...] = ()
    texts: bool = False
    repeated: frozenset[str] = frozenset()


def read_json(body: bytes, stored: Stored) -> Form:
    """The JSON form; data URLs and stored files in ``images``, ``mask`` and ``markup`` become
    files. Raises ``Malformed``."""
    fields = read_object(body)
    images = fields.get("images")
    held: list[tuple[str, Json]] = []
    if isinstance(images, list):
        held = [(f"images[{place}]", image) for place, image in enumerate(images)]
    held += [("mask", fields.get("mask")), ("markup", fields.get("markup"))]
    uploads = [picture(name, holder, stored) for name, holder in held]
    return Form(fields, tuple(upload for upload in uploads if upload is not None))


def read_object(body: bytes) -> dict[str, Json]:
    """A JSON object. Raises ``Malformed``."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise Malformed from None
    if not isinstance(fields, dict):
        raise Malformed
    return fields


def picture(name: str, holder: Json, stored: Stored) -> Upload | None:
    """The file that an object names by ``image_url`` (a base64 data URL) or ``file_id``; None
    where there is none."""
    if not isinstance(holder, dict):
        return None
    url, file_id = holder.get("image_url"), holder.get("file_id")
    if isinstance(url, str):
        return _data_url(f"{name}.image_url", url)
    found = stored(file_id) if isinstance(file_id, str) else None
    if found is None:
        return None
    return upload(f"{name}.file_id", found.filename, kind_of(found.content), found.content)


def kind_of(content: bytes) -> str:
    """The media type of a picture by its first bytes: a stored file has no other."""
    for start, kind in ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg")):
        if content.startswith(start):
            return kind
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "image/webp"
    return "application/octet-stream"


def read_multipart(content_type: str, body: bytes) -> Form:
    """A multipart form of RFC 7578. ``svg[model]`` becomes ``{"svg": {"model": ...}}``. Raises
    ``Malformed``."""
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_param("boundary")
    if not isinstance(boundary, str) or not boundary:
        raise Malformed
    fields: dict[str, Json] = {}
    uploads: list[Upload] = []
    repeated: set[str] = set()
    for head, start, end in _parts(body, boundary.encode()):
        said = dict(_DISPOSITION.findall(head.get("content-disposition", "")))
        name = said.get("name")
        if name is None:
            raise Malformed
        if "filename" in said:
            kind = head.get("content-type", "application/octet-stream")
            uploads.append(upload(name, said["filename"], kind, body[start:end]))
            continue
        if not _put(fields, name, body[start:end].decode("utf-8", "replace")):
            repeated.add(name)
    return Form(fields, tuple(uploads), texts=True, repeated=frozenset(repeated))


def _parts(body: bytes, boundary: bytes) -> list[tuple[dict[str, str], int, int]]:
    """Each part's headers and where its content lies in the body."""
    opening, delimiter = b"--" + boundary, b"\r\n--" + boundary
    at = 0 if body.startswith(opening) else body.find(delimiter) + 2
    if not body.startswith(opening, at):
        raise Malformed
    found = []
    at += len(opening)
    while not body.startswith(b"--", at):
        start = body.find(b"\r\n\r\n", at)
        end = body.find(delimiter, start + 2)
        if not body.startswith(b"\r\n", at) or start < 0 or end < 0:
            raise Malformed
        head = {}
        for line in body[at:start].decode("utf-8", "replace").split("\r\n"):
            name, _, value = line.partition(":")
            head[name.strip().lower()] = value.strip()
        found.append((head, start + 4, max(start + 4, end)))
        at = end + len(delimiter)
    return found


def _put(fields: dict[str, Json], name: str, text: str) -> bool:
    """Sets a field, nested by its brackets; False where it is there already."""
    keys = re.findall(r"[^\[\]]+|\[\]", name)
    here = fields
    for key in keys[:-1]:
        inner = here.setdefault(key, {})
        if not isinstance(inner, dict):
            return False
        here = inner
    last = keys[-1] if keys else name
    if last in here:
        return last == "[]"
    here[last] = text
    return True


def upload(name: str, filename: str, content_type: str, content: bytes) -> Upload:
    digest = hashlib.sha256(content).hexdigest()
    return Upload(FilePart(name, filename, content_type, digest, len(content)), content)


def _data_url(name: str, url: str) -> Upload | None:
    """The file in a base64 data URL; None for any other kind of URL."""
    head = _DATA_URL.match(url)
    if head is None or head[2] is None:
        return None
    try:
        content = base64.b64decode(url[head.end() :], validate=True)
    except binascii.Error:
        return None
    return upload(name, "", head[1].lower(), content)
