"""/v1/files (contract 3.3): uploads that live under the key that sent them."""

from __future__ import annotations

import re
import secrets
from urllib.parse import parse_qsl

from gateway.domain.call import Json
from gateway.sandbox.exchange import MULTIPART, Exchange
from gateway.sandbox.forms import Form, StoredFile
from gateway.sandbox.refusals import (
    Refused,
    bad_value,
    duplicate,
    in_range,
    missing,
    no_file,
    unknown,
    wrong_type,
)
from gateway.sandbox.validate import the_file

MAX_FILE_BYTES = 512 * 1024 * 1024
PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS = 3600, 2_592_000
MAX_LIST = 10_000
_RANGE = re.compile(r"bytes=([0-9]*)-([0-9]*)")


async def create_file(exchange: Exchange, body: bytes, name: str) -> None:
    """Its rules match their prompt in the file's name."""
    form, trouble = await exchange.form(body, MULTIPART)
    if await exchange.met("", form.uploads[0].part.filename if form.uploads else ""):
        return
    if trouble is not None:
        raise trouble
    file = _checked(form, exchange.created)
    exchange.sandbox.files.put(exchange.project, file.id, file)
    await exchange.whole(exchange.dump(_as_json(file)))


async def list_files(exchange: Exchange, body: bytes, name: str) -> None:
    if await exchange.met():
        return
    asked = dict(parse_qsl(exchange.record.query))
    order = asked.get("order", "desc")
    if order not in ("asc", "desc"):
        raise bad_value("order", order, ("asc", "desc"))
    limit = asked.get("limit", str(MAX_LIST))
    if not re.fullmatch("-?[0-9]{1,9}", limit):
        raise wrong_type("limit", "an integer", limit)
    in_range("limit", int(limit), 1, MAX_LIST)
    purpose = asked.get("purpose")
    ids = [
        file.id
        for file in exchange.sandbox.files.of(exchange.project)
        if exchange.stored(file.id) is not None and purpose in (None, file.purpose)
    ]
    if order == "desc":
        ids.reverse()
    after = asked.get("after")
    if after is not None:
        if after not in ids:
            raise no_file(after, "after")
        ids = ids[ids.index(after) + 1 :]
    page = [file for id_ in ids[: int(limit)] if (file := exchange.stored(id_)) is not None]
    rows: list[Json] = [_as_json(file) for file in page]
    await exchange.json(
        200,
        {
            "object": "list",
            "data": rows,
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": len(ids) > len(page),
        },
    )


async def get_file(exchange: Exchange, body: bytes, file_id: str) -> None:
    if not await exchange.met():
        await exchange.whole(exchange.dump(_as_json(_found(exchange, file_id))))


async def file_content(exchange: Exchange, body: bytes, file_id: str) -> None:
    """The bytes, or the one range of them that is asked for."""
    if await exchange.met():
        return
    file = _found(exchange, file_id)
    if file.purpose == "assistants":
        raise Refused(f"Not allowed to download files of purpose: {file.purpose}", code=None)
    headers = {
        "accept-ranges": "bytes",
        "content-disposition": f'attachment; filename="{_header_safe(file.filename)}"',
    }
    size = len(file.content)
    asked = _RANGE.fullmatch(exchange.record.header("range") or "")
    start, end = _range(asked[1], asked[2], size) if asked is not None else (0, size)
    if asked is not None and start >= end:
        headers["content-range"] = f"bytes */{size}"
        await exchange.whole(b"", "application/octet-stream", headers, 416)
        return
    if asked is not None:
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    status = 206 if asked is not None else 200
    await exchange.whole(file.content[start:end], "application/octet-stream", headers, status)


async def delete_file(exchange: Exchange, body: bytes, file_id: str) -> None:
    if await exchange.met():
        return
    _found(exchange, file_id)
    exchange.sandbox.files.take(exchange.project, file_id)
    await exchange.whole(exchange.dump({"id": file_id, "object": "file", "deleted": True}))


def _found(exchange: Exchange, file_id: str) -> StoredFile:
    file = exchange.stored(file_id)
    if file is None:
        raise no_file(file_id, "id")
    return file


def _checked(form: Form, now: int) -> StoredFile:
    """The file that a form uploads. Raises ``Refused``."""
    for name in form.fields:
        if name == "file":
            raise wrong_type("file", "a file", form.fields[name])
        if name not in ("purpose", "expires_after"):
            raise unknown(name)
        if name in form.repeated:
            raise duplicate(name)
    upload = the_file(form)
    if "purpose" not in form.fields:
        raise missing("purpose")
    purpose = form.fields["purpose"]
    if not isinstance(purpose, str) or purpose not in PURPOSES:
        raise bad_value("purpose", purpose, PURPOSES)
    if len(upload.content) > MAX_FILE_BYTES:
        raise Refused(
            f"File is too large. The limit is {MAX_FILE_BYTES} bytes.",
            code="request_too_large",
            param="file",
            status=413,
        )
    life = _expiry_seconds(form)
    if life is None and purpose == "batch":
        life = MAX_EXPIRY_SECONDS
    return StoredFile(
        id=f"file-{secrets.token_urlsafe(16).replace('-', 'A').replace('_', 'B')}",
        filename=upload.part.filename,
        purpose=purpose,
        content=upload.content,
        created=now,
        expires=now + life if life is not None else None,
    )


def _expiry_seconds(form: Form) -> int | None:
    if "expires_after" not in form.fields:
        return None
    asked = form.fields["expires_after"]
    if not isinstance(asked, dict):
        raise wrong_type("expires_after", "an object", asked)
    for name in ("anchor", "seconds"):
        if name not in asked:
            raise missing(f"expires_after.{name}")
    if asked["anchor"] != "created_at":
        raise bad_value("expires_after.anchor", asked["anchor"], ("created_at",))
    seconds = asked["seconds"]
    if not isinstance(seconds, str) or not re.fullmatch("-?[0-9]{1,12}", seconds):
        raise wrong_type("expires_after.seconds", "an integer", seconds)
    in_range("expires_after.seconds", int(seconds), MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS)
    return int(seconds)


def _as_json(file: StoredFile) -> dict[str, Json]:
    return {
        "object": "file",
        "id": file.id,
        "purpose": file.purpose,
        "filename": file.filename,
        "bytes": len(file.content),
        "created_at": file.created,
        "expires_at": file.expires,
        "status": "processed",
        "status_details": None,
    }


def _range(first: str, last: str, size: int) -> tuple[int, int]:
    """Bytes ``[start, end)``; empty where the range lies outside of the file."""
    if not first:
        return (max(0, size - int(last)), size) if last else (0, 0)
    return int(first), min(size, int(last) + 1) if last else size


def _header_safe(name: str) -> str:
    return re.sub(r"[^ !#-\[\]-~]", "_", name)
