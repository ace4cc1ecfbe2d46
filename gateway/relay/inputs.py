"""The pictures that come with a request: looked at by their first bytes, never decoded, never
fetched. What is refused here would be refused by every upstream, or is too large to be safe.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass

from gateway.domain.call import InputImage
from gateway.domain.errors import BodyTooLarge, InvalidRequest
from gateway.relay.media import media_of
from gateway.relay.multipart import Part, say_bytes
from gateway.relay.picture import BMP, GIF, PDF, SVG, TIFF, Picture, probe
from gateway.relay.skim import Hole

OCTETS = "application/octet-stream"
"""What a library declares that does not know what it sends."""
PICTURE_ROLES = frozenset({"image", "mask", "markup"})
_NOT_TAKEN = frozenset({GIF, BMP, TIFF, SVG, PDF})
"""Types that can be told by their bytes and that no image model takes."""
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")
_BASE64_BYTES = re.compile(rb"[A-Za-z0-9+/]*")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=:)")


@dataclass(frozen=True, slots=True)
class PictureRules:
    """What one picture may be: bytes, pixels in all, and pixels of the longer side."""

    max_file_bytes: int
    max_pixels: int
    max_side: int
    urls_allowed: bool


def from_file(part: Part, role: str, param: str, rules: PictureRules) -> tuple[InputImage, str]:
    """The picture in a form's file, and the type that its bytes say, empty where they do not. Its
    own type is as declared, ``application/octet-stream`` where nothing is. A file whose role is
    unknown is only described.

    Raises ``InvalidRequest`` (``invalid_image``, ``unsupported_file_mimetype``).
    """
    seen = probe(part.content)
    if role in PICTURE_ROLES:
        if part.size_bytes == 0:
            raise _invalid(param, "the file is empty. Send the picture's bytes.")
        _check(seen, param, rules)
    picture = InputImage(
        role=role,
        digest=part.digest,
        size_bytes=part.size_bytes,
        media_type=media_of(part.content_type) or OCTETS,
        width=seen.width if seen else 0,
        height=seen.height if seen else 0,
    )
    return picture, seen.media_type if seen else ""


def from_url(value: str | Hole, role: str, param: str, rules: PictureRules) -> InputImage:
    """The picture behind an ``image_url``: a data URL, or where the rules allow it an https URL,
    which the upstream fetches (contract 2.3).

    The digest is of the URL's text, as it is written where it is long. The size of a long one may
    count its one or two padding bytes; a URL that is not data has size 0 and no type.

    Raises ``InvalidRequest`` (``invalid_image``, ``unsupported_file_mimetype``,
    ``image_url_not_allowed``) and ``BodyTooLarge``.
    """
    text = value if isinstance(value, str) else _beginning(value)
    scheme = _SCHEME.match(text)
    name = scheme[0].lower() if scheme else ""
    if name == "data":
        return _from_data(value, text, role, param, rules)
    if name != "https" or not rules.urls_allowed or isinstance(value, Hole):
        raise InvalidRequest(
            f"'{param}' is an address that this gateway does not pass on. Send the picture "
            "itself: as a data URL (data:image/png;base64,...) or as a file of a multipart form.",
            code="image_url_not_allowed",
            param=param,
            reason="ssrf_blocked",
        )
    return InputImage(role=role, digest=_sha256(text), size_bytes=0, media_type="")


def from_id(id: str, role: str) -> InputImage:
    """A file that lives at an upstream: how large it is, its owner's row says. Nothing is known of
    its type and its pixels."""
    return InputImage(role=role, digest=digest_of_file(id), size_bytes=0, media_type="")


def digest_of_file(id: str) -> str:
    """What stands for the content of a file, which never changes under its id."""
    return _sha256(f"file_id:{id}")


def _from_data(
    value: str | Hole, text: str, role: str, param: str, rules: PictureRules
) -> InputImage:
    header, comma, payload = text.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise _invalid(param, "a data URL must look like data:image/png;base64,....")
    if isinstance(value, str):
        digest = _sha256(value)
        # Four characters are three bytes; the padding stands for bytes that are not there.
        size = len(payload) // 4 * 3 - (len(payload) - len(payload.rstrip("=")))
        strict = len(payload) % 4 == 0 and _BASE64.fullmatch(payload) is not None
    else:
        digest = value.digest
        length = value.end - value.start - len(header) - 1
        size = length * 3 // 4
        # Some encoders write every slash as \/, which base64 is full of, and the skimmer does not
        # judge a string with escapes: then its beginning stands for all of it, and it counts as a
        # little larger than it is.
        strict = value.base64 or (value.escaped and _BASE64.fullmatch(payload) is not None)
    if not strict:
        raise _invalid(param, "it is not valid base64 (A-Z a-z 0-9 + / and = at the end).")
    if size > rules.max_file_bytes:
        raise BodyTooLarge(
            f"'{param}' holds a picture larger than the {say_bytes(rules.max_file_bytes)} that one "
            "file may have. Send a smaller one.",
            param=param,
        )
    if size <= 0:
        raise _invalid(param, "the data URL holds no bytes.")
    seen = probe(_decoded(payload))
    _check(seen, param, rules)
    return InputImage(
        role=role,
        digest=digest,
        size_bytes=size,
        media_type=media_of(header.partition(":")[2]),
        width=seen.width if seen else 0,
        height=seen.height if seen else 0,
    )


def _check(seen: Picture | None, param: str, rules: PictureRules) -> None:
    if seen is None:
        return
    if seen.media_type in _NOT_TAKEN:
        raise InvalidRequest(
            f"Invalid file '{param}': unsupported mimetype ('{seen.media_type}'). Supported file "
            "formats are 'image/jpeg', 'image/png', and 'image/webp'.",
            code="unsupported_file_mimetype",
            param=param,
            reason="invalid_image",
        )
    if max(seen.width, seen.height) > rules.max_side or seen.width * seen.height > rules.max_pixels:
        raise InvalidRequest(
            f"Invalid image '{param}': {seen.width}x{seen.height} is more than the "
            f"{rules.max_pixels:,} pixels, or the {rules.max_side:,} a side, that this gateway "
            "takes. Send a smaller picture.",
            code="invalid_image",
            param=param,
            reason="image_bomb",
        )


def _beginning(hole: Hole) -> str:
    """The head of a long string as text, its slashes unescaped, up to any other escape."""
    head = hole.head
    if hole.escaped:
        head = head.replace(b"\\/", b"/").partition(b"\\")[0]
    return head.decode("latin-1")


def _decoded(payload: str) -> bytes:
    """The bytes that a beginning of base64 stands for, as far as whole groups go."""
    plain = payload.rstrip("=").encode("latin-1", "replace")
    match = _BASE64_BYTES.match(plain)
    usable = match[0] if match else b""
    whole = len(usable) // 4 * 4
    rest = usable[whole:]
    tail = rest + b"=" * (4 - len(rest)) if len(rest) > 1 else b""
    return base64.b64decode(usable[:whole] + tail)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _invalid(param: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid image '{param}': {why}",
        code="invalid_image",
        param=param,
        reason="invalid_image",
    )
