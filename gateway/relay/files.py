"""`/v1/files`: forwarded to one upstream, and owned here.

OpenAI scopes files to its own project, which all teams share. So the list is ours alone, an id is
looked up before it goes anywhere, and an upload is over when its owner is on disk (contract 3.3).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs

from gateway.domain.call import Json
from gateway.domain.errors import (
    GatewayError,
    InvalidRequest,
    LedgerUnavailable,
)
from gateway.domain.owned import Owned, OwnedKind
from gateway.domain.team import Caller
from gateway.ports import Clock, Ownership
from gateway.relay.body import Spool
from gateway.relay.flights import Head
from gateway.relay.forwarding import Forwarding
from gateway.relay.media import FORM_OVERHEAD_BYTES, FORM_TYPE, media_of, too_large
from gateway.relay.multipart import FormScanner, Part, boundary_of, say_bytes
from gateway.relay.passing import Errand, Passing, Place, Visit, bad_answer, bad_query, place_of
from gateway.relay.references import path_of

log = logging.getLogger(__name__)

PURPOSES = ("vision", "user_data")
"""The others are for endpoints that are not served here: what is in them would be bought unseen."""
EXPIRY_SECONDS = (3600, 2_592_000)
MAX_PAGE = 10_000
MAX_FILENAME_CHARS = 1024
KEPT = ("object", "bytes", "created_at", "filename", "purpose", "status", "expires_at")
"""Of a provider's file object: what the list shows."""

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_RANGE = re.compile(r"bytes=[0-9, -]{1,200}")


@dataclass(frozen=True, slots=True)
class FileRules:
    """``max_bytes`` is of one file, ``max_total_bytes`` of all files of a team."""

    place: Place
    max_bytes: int
    max_total_bytes: int


class Files:
    """Answers for the files; each public method is a handler of ``api/passed.py``."""

    def __init__(
        self,
        passing: Passing,
        forwarding: Forwarding,
        ownership: Ownership,
        clock: Clock,
        rules: FileRules,
    ) -> None:
        self.rules = rules
        self._passing = passing
        self._forwarding = forwarding
        self._ownership = ownership
        self._clock = clock
        self._arriving: dict[str, int] = {}

    async def upload(self, visit: Visit) -> Head:
        """``POST /files``: its owner is written down before the answer begins."""
        rules = self.rules
        upstream = place_of(rules.place, "/v1/files")
        caller = await self._passing.enter(visit)
        reader = UploadReader(visit.headers.get("content-type", ""), rules.max_bytes)
        limit = rules.max_bytes + FORM_OVERHEAD_BYTES
        body = await self._passing.take_in(visit, FORM_TYPE, limit, reader.feed)
        upload = reader.close()
        team = caller.team.id
        used = await self._ownership.total_bytes(team, OwnedKind.FILE, self._clock.now())
        used += self._arriving.get(team, 0)
        if used + upload.size_bytes > rules.max_total_bytes:
            raise InvalidRequest(
                f"The files of team {team} may have {say_bytes(rules.max_total_bytes)} together; "
                "with this one they would have more. Delete some, or ask the gateway's operator.",
                code="file_storage_exceeded",
                param="file",
                reason="file_storage",
            )
        self._arriving[team] = self._arriving.get(team, 0) + upload.size_bytes
        try:
            return await self._passing.to_the_end(
                visit, self._store(visit, caller, upstream, upload, body)
            )
        finally:
            self._arriving[team] -= upload.size_bytes
            if not self._arriving[team]:
                del self._arriving[team]

    async def _store(
        self, visit: Visit, caller: Caller, upstream: str, upload: Upload, body: Spool
    ) -> Head:
        passing = self._passing
        errand = Errand(
            "POST", "/files", upstream=upstream, body=body, content_type=upload.content_type,
            repeatable=False,
        )  # fmt: skip
        reply = await passing.send(visit, errand)
        content = await passing.whole(visit, reply, repeatable=False)
        made = _object(content)
        id = made.get("id")
        if not isinstance(id, str) or not _ID.fullmatch(id) or visit.anchor is None:
            raise bad_answer(upstream)
        now = self._clock.now()
        owned = Owned(
            id=id,
            kind=OwnedKind.FILE,
            team=caller.team.id,
            key_id=caller.key.id,
            anchor=visit.anchor,
            created=now,
            expires=_expiry(made, upload, now),
            size_bytes=upload.size_bytes,
            detail={**_kept(made), "purpose": upload.purpose},
        )
        try:
            await self._ownership.record([owned])
        except LedgerUnavailable as error:
            await self._take_back(visit, owned)
            raise LedgerUnavailable(
                "The gateway cannot write down whose this file is, so it was not kept. Upload it "
                "again in a few seconds.",
                retry_after_seconds=5,
            ) from error
        return passing.answer(visit, content, reply)

    async def _take_back(self, visit: Visit, owned: Owned) -> None:
        """A file without an owner is of no use to anybody."""
        try:
            await self._passing.send(
                visit, Errand("DELETE", path_of(owned.kind, owned.id), owned.anchor)
            )
        except GatewayError as error:
            log.error(
                "a file without an owner stays at an upstream",
                extra={
                    "request_id": visit.rid,
                    "upstream": owned.anchor.upstream,
                    "file": owned.id,
                    "error": str(error),
                },
            )

    async def page(self, visit: Visit) -> Head:
        """``GET /files``: the team's own, from here; no upstream is asked."""
        place_of(self.rules.place, "/v1/files")
        caller = await self._passing.enter(visit)
        asked = _query(visit.query)
        purpose, after = asked.get("purpose", ""), asked.get("after", "")
        order = asked.get("order", "desc")
        if order not in ("asc", "desc"):
            raise bad_query("order", "asc or desc")
        limit = _whole(asked.get("limit", str(MAX_PAGE)), "limit", 1, MAX_PAGE)
        found = await self._ownership.owned(
            caller.team.id,
            OwnedKind.FILE,
            self._clock.now(),
            limit=limit + 1,
            after=after,
            newest_first=order == "desc",
            purpose=purpose,
        )
        shown = [{"id": one.id, **one.detail} for one in found[:limit]]
        listed = {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(found) > limit,
        }
        return self._passing.answer(visit, json.dumps(listed, separators=(",", ":")).encode())

    async def show(self, visit: Visit) -> Head:
        """``GET /files/{id}``."""
        owned = await self._owned(visit)
        errand = Errand("GET", path_of(owned.kind, owned.id), owned.anchor)
        return await self._forwarding.show(visit, owned, errand)

    async def content(self, visit: Visit) -> Head:
        """``GET /files/{id}/content``, or a range of it."""
        owned = await self._owned(visit)
        asked = visit.headers.get("range", "")
        more = (("range", asked),) if _RANGE.fullmatch(asked) else ()
        errand = Errand(
            "GET",
            f"{path_of(owned.kind, owned.id)}/content",
            owned.anchor,
            accept="*/*",
            more=more,
            max_response_bytes=owned.size_bytes + FORM_OVERHEAD_BYTES,
        )
        return await self._forwarding.show(visit, owned, errand)

    async def delete(self, visit: Visit) -> Head:
        """``DELETE /files/{id}``."""
        owned = await self._owned(visit)
        return await self._forwarding.delete(visit, owned)

    async def _owned(self, visit: Visit) -> Owned:
        place_of(self.rules.place, "/v1/files")
        return await self._forwarding.enter(visit, OwnedKind.FILE)


@dataclass(frozen=True, slots=True)
class Upload:
    """What a form says of the file in it. ``expires_after_seconds`` counts from its creation."""

    content_type: str
    purpose: str
    size_bytes: int
    expires_after_seconds: int | None


class UploadReader:
    """Looks at an upload's form as it passes, its parts in whatever order they come.

    Both methods raise ``InvalidRequest``, and ``BodyTooLarge`` for a file over ``max_bytes``. A
    part that this gateway does not know is refused: the upstream might take it for another.
    """

    def __init__(self, content_type: str, max_bytes: int) -> None:
        """Raises ``InvalidRequest`` where a form has no usable boundary; another media type is
        refused elsewhere."""
        self._content_type = content_type
        is_form = media_of(content_type) == FORM_TYPE
        boundary = boundary_of(content_type) if is_form else b"-"
        self._scanner = FormScanner(boundary, max_file_bytes=max_bytes)
        self._max_bytes = max_bytes
        self._parts: dict[str, Part] = {}

    def feed(self, chunk: bytes) -> None:
        for part in self._scanner.feed(chunk):
            self._take(part)

    def close(self) -> Upload:
        """The body is complete."""
        self._scanner.close()
        for name in ("purpose", "file"):
            if name not in self._parts:
                raise _bad(
                    f"Missing required parameter: '{name}'.", "missing_required_parameter", name
                )
        return Upload(
            self._content_type,
            self._text("purpose"),
            self._parts["file"].size_bytes,
            self._expiry(),
        )

    def _take(self, part: Part) -> None:
        name = part.name
        known = ("purpose", "file", "expires_after[anchor]", "expires_after[seconds]")
        if name not in known:
            raise _bad(f"Unknown parameter: '{name[:64]}'.", "unknown_parameter", name[:64])
        if name in self._parts:
            raise _bad(f"Duplicate parameter: '{name}'.", "duplicate_parameter", name)
        if part.is_file != (name == "file"):
            wanted = "a file, with a filename" if name == "file" else "a text"
            raise _bad(f"Invalid type for '{name}': expected {wanted}.", "invalid_type", name)
        self._parts[name] = part
        if name == "purpose" and self._text(name) not in PURPOSES:
            # At once: half a gigabyte may follow.
            raise _bad(
                f"Invalid value for 'purpose': {self._text(name)[:64]!r} is none of "
                f"{', '.join(PURPOSES)}, the purposes that this gateway takes.",
                "invalid_value",
                "purpose",
            )
        if part.is_file and part.size_bytes > self._max_bytes:
            raise too_large(self._max_bytes)

    def _text(self, name: str) -> str:
        return self._parts[name].content.decode("utf-8", "replace")

    def _expiry(self) -> int | None:
        anchor, seconds = "expires_after[anchor]", "expires_after[seconds]"
        given = [name for name in (anchor, seconds) if name in self._parts]
        if not given:
            return None
        if len(given) == 1:
            missing = seconds if given[0] == anchor else anchor
            raise _bad(
                f"Missing required parameter: '{missing}'.", "missing_required_parameter", missing
            )
        if self._text(anchor) != "created_at":
            raise _bad(
                f"Invalid value for '{anchor}': it must be created_at.", "invalid_value", anchor
            )
        return _whole(self._text(seconds), seconds, *EXPIRY_SECONDS)


def _bad(message: str, code: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, code=code, param=param, reason="invalid_param")


def _whole(text: str, name: str, low: int, high: int) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text, re.ASCII) or not low <= int(text) <= high:
        raise bad_query(name, f"an integer from {low} to {high}")
    return int(text)


def _query(query: str) -> dict[str, str]:
    """Each parameter's last value."""
    try:
        return {name: values[-1] for name, values in parse_qs(query, max_num_fields=50).items()}
    except ValueError:
        raise bad_query("query", "of at most 50 parameters") from None


def _object(content: bytes) -> Mapping[str, Json]:
    """The JSON object that an upstream answered; empty for anything else."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _kept(made: Mapping[str, Json]) -> dict[str, Json]:
    """The small members of a file object."""
    found: dict[str, Json] = {}
    for name in KEPT:
        value = made.get(name)
        if isinstance(value, str):
            found[name] = value[:MAX_FILENAME_CHARS]
        elif value is None or isinstance(value, (bool, int, float)):
            found[name] = value
    return found


def _expiry(made: Mapping[str, Json], upload: Upload, now: datetime) -> datetime | None:
    """When it goes: as the provider says, else as was asked for."""
    said = made.get("expires_at")
    if isinstance(said, int) and not isinstance(said, bool) and 0 < said < 2**40:
        try:
            return datetime.fromtimestamp(said, UTC)
        except (ValueError, OverflowError):
            pass
    if upload.expires_after_seconds is None:
        return None
    return now + timedelta(seconds=upload.expires_after_seconds)
