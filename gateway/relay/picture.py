"""What a picture's first bytes say of it: its type and its size, by the header alone.

Nothing is decoded, so a picture of 50,000 x 50,000 pixels in 300 KB costs the same look as any
other. Sources: PNG (W3C) 5.3 and 11.2.2, JPEG (ITU T.81) B.1-B.2, WebP (RFC 9649), GIF89a 18,
TIFF 6.0 section 2, BITMAPINFOHEADER.
"""

from __future__ import annotations

import re
from typing import NamedTuple

PNG = "image/png"
JPEG = "image/jpeg"
WEBP = "image/webp"
GIF = "image/gif"
BMP = "image/bmp"
TIFF = "image/tiff"
SVG = "image/svg+xml"
PDF = "application/pdf"

_SVG = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:svg[\s>/:]|(?:[?!].{0,4000}?<svg[\s>/]))", re.DOTALL)
_BMP_HEADERS = frozenset({12, 16, 40, 52, 56, 64, 108, 124})
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD8)})
_JPEG_START_OF_SCAN = 0xDA
_JPEG_END = 0xD9
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_TIFF_SHORT = 3


class Picture(NamedTuple):
    """``width`` and ``height`` are pixels, both 0 where the size lies beyond the bytes seen or
    makes no sense. A JPEG's EXIF orientation is not applied."""

    media_type: str
    width: int = 0
    height: int = 0


def probe(head: bytes) -> Picture | None:
    """The picture that begins with ``head`` (any length), None where its type is not recognised.

    Never raises.
    """
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(head)
    if head.startswith(b"\xff\xd8\xff"):
        return _jpeg(head)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return _webp(head)
    if head.startswith((b"GIF87a", b"GIF89a")):
        return _sized(GIF, _little(head, 6, 2), _little(head, 8, 2))
    if head.startswith((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")):
        return _tiff(head)
    if head.startswith(b"BM"):
        return _bmp(head)
    if head.startswith(b"%PDF-"):
        return Picture(PDF)
    if _SVG.match(head):
        return Picture(SVG)
    return None


def _sized(media_type: str, width: int, height: int) -> Picture:
    return Picture(media_type, width, height) if width and height else Picture(media_type)


def _little(head: bytes, at: int, size: int) -> int:
    """An unsigned number at ``at``, 0 where ``head`` ends before it."""
    return int.from_bytes(head[at : at + size], "little") if at + size <= len(head) else 0


def _big(head: bytes, at: int, size: int) -> int:
    return int.from_bytes(head[at : at + size], "big") if at + size <= len(head) else 0


def _png(head: bytes) -> Picture:
    if head[12:16] != b"IHDR":
        return Picture(PNG)
    return _sized(PNG, _big(head, 16, 4), _big(head, 20, 4))


def _jpeg(head: bytes) -> Picture:
    at = 2
    while at + 2 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _JPEG_BARE:
            at += 2
        elif marker in _JPEG_FRAMES:
            return _sized(JPEG, _big(head, at + 7, 2), _big(head, at + 5, 2))
        elif marker in (_JPEG_START_OF_SCAN, _JPEG_END, 0x00):
            break
        else:
            length = _big(head, at + 2, 2)
            if length < 2:
                break
            at += 2 + length
    return Picture(JPEG)


def _webp(head: bytes) -> Picture:
    kind = head[12:16]
    if kind == b"VP8X" and len(head) >= 30:
        return _sized(WEBP, _little(head, 24, 3) + 1, _little(head, 27, 3) + 1)
    if kind == b"VP8L" and head[20:21] == b"\x2f" and len(head) >= 25:
        bits = _little(head, 21, 4)
        return _sized(WEBP, (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        return _sized(WEBP, _little(head, 26, 2) & 0x3FFF, _little(head, 28, 2) & 0x3FFF)
    return Picture(WEBP)


def _bmp(head: bytes) -> Picture | None:
    # Two letters alone would take many a text for a picture.
    header = _little(head, 14, 4)
    if header not in _BMP_HEADERS:
        return None
    if header == 12:
        return _sized(BMP, _little(head, 18, 2), _little(head, 20, 2))
    height = _little(head, 22, 4)
    # A negative height says that the rows run from the top.
    return _sized(BMP, _little(head, 18, 4), min(height, (1 << 32) - height))


def _tiff(head: bytes) -> Picture:
    order = _little if head[:1] == b"I" else _big
    if order(head, 2, 2) != 42:
        return Picture(TIFF)
    directory = order(head, 4, 4)
    width = height = 0
    for entry in range(directory + 2, directory + 2 + 12 * order(head, directory, 2), 12):
        if entry + 12 > len(head):
            break
        tag = order(head, entry, 2)
        value = order(head, entry + 8, 2 if order(head, entry + 2, 2) == _TIFF_SHORT else 4)
        if tag == _TIFF_WIDTH:
            width = value
        elif tag == _TIFF_HEIGHT:
            height = value
    return _sized(TIFF, width, height)
