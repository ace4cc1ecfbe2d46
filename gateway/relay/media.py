"""What a body is, and may be: its media type, its encoding, its size; how others are refused."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.domain.errors import BodyTooLarge, UnsupportedMedia
from gateway.ports import Reply
from gateway.relay.multipart import say_bytes

JSON_TYPE = "application/json"
FORM_TYPE = "multipart/form-data"
FORM_OVERHEAD_BYTES = 64 * 1024
"""What a form with one file may have beside it."""


def media_of(content_type: str) -> str:
    """A ``Content-Type`` without its parameters, in lower case."""
    return content_type.partition(";")[0].strip().lower()


def check_media(content_type: str, wanted: Sequence[str], path: str) -> str:
    """The media type, which is one of ``wanted``. Raises ``UnsupportedMedia``."""
    media = media_of(content_type)
    if media not in wanted:
        given = f"not {media[:80]!r}" if media else "and this request has no Content-Type"
        raise UnsupportedMedia(f"{path} takes {' or '.join(wanted)}, {given}.")
    return media


def check_encoding(content_encoding: str | None) -> None:
    """Raises ``UnsupportedMedia`` for a body that is compressed."""
    given = (content_encoding or "").strip()
    if given.lower() not in ("", "identity"):
        raise UnsupportedMedia(
            f"Content-Encoding {given[:80]!r} is not taken: send the body uncompressed."
        )


def too_large(limit_bytes: int, who: str = "this") -> BodyTooLarge:
    """The refusal of a body over ``limit_bytes``, which ``who`` takes."""
    return BodyTooLarge(
        f"The request is larger than the {say_bytes(limit_bytes)} that {who} takes.", close=True
    )


def is_stream(reply: Reply) -> bool:
    """Whether an upstream answers with events."""
    return reply.headers.get("content-type", "").strip().lower().startswith("text/event-stream")
