"""The header probe against pictures that Pillow made, damage, and hostile headers."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, ImageSequence

from gateway.relay.picture import Picture, probe

SIZES = [(1, 1), (2, 3), (17, 5), (255, 256), (640, 480), (1025, 1), (1, 1024), (1536, 1024)]


def made(kind: str, size: tuple[int, int], mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("kind", "mode", "options", "media_type"),
    [
        *(("PNG", mode, {}, "image/png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *(("JPEG", mode, {}, "image/jpeg") for mode in ("L", "RGB", "CMYK")),
        ("JPEG", "RGB", {"progressive": True}, "image/jpeg"),
        ("JPEG", "RGB", {"exif": b"Exif\x00\x00" + bytes(60_000)}, "image/jpeg"),
        ("JPEG", "RGB", {"icc_profile": bytes(200_000)}, "image/jpeg"),
        ("WEBP", "RGB", {}, "image/webp"),
        ("WEBP", "RGBA", {}, "image/webp"),
        ("WEBP", "RGB", {"lossless": True}, "image/webp"),
        ("WEBP", "RGBA", {"lossless": True}, "image/webp"),
        ("WEBP", "RGB", {"exif": b"Exif\x00\x00II*\x00"}, "image/webp"),
        ("GIF", "P", {}, "image/gif"),
        ("BMP", "RGB", {}, "image/bmp"),
        ("BMP", "RGBA", {}, "image/bmp"),
        ("TIFF", "RGB", {}, "image/tiff"),
        ("TIFF", "RGB", {"compression": "raw"}, "image/tiff"),
    ],
)
def test_pillow_made(
    kind: str, mode: str, options: dict[str, object], media_type: str, size: tuple[int, int]
) -> None:
    data = made(kind, size, mode, **options)
    assert probe(data) == Picture(media_type, *size)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_a_rotated_picture_is_measured_as_it_is_stored(kind: str, orientation: int) -> None:
    data = made(kind, (640, 480), exif=exif(orientation))
    found = probe(data)
    assert found is not None
    assert (found.width, found.height) == (640, 480)
    # Turned or not, it has the same tiles: only the longer and the shorter edge count.
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert {found.width, found.height} == set(shown.size)


def test_a_thumbnail_inside_a_jpeg_is_not_the_picture() -> None:
    tags = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00" + made("JPEG", (16, 12))
    assert probe(made("JPEG", (640, 480), exif=tags)) == Picture("image/jpeg", 640, 480)


@pytest.mark.parametrize(("kind", "media_type"), [("WEBP", "image/webp"), ("GIF", "image/gif")])
def test_an_animation_is_measured_by_its_canvas(kind: str, media_type: str) -> None:
    frames = [Image.new("RGB", (320, 200), color) for color in ("red", "green", "blue")]
    frames[1].paste("white", (10, 20, 30, 40))  # A frame that is stored as a small part.
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=100)
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(out.getvalue()))))) == 3
    assert probe(out.getvalue()) == Picture(media_type, 320, 200)


def interlaced(width: int, height: int) -> bytes:
    """A grey PNG in Adam7 (PNG 8.2), which Pillow reads but does not write."""
    passes = [
        *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
        *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
    ]
    rows = b""
    for left, top, across, down in passes:
        columns = len(range(left, width, across))
        rows += (b"\x00" + b"\x80" * columns) * len(range(top, height, down)) if columns else b""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_an_interlaced_png(size: tuple[int, int]) -> None:
    data = interlaced(*size)
    picture = Image.open(io.BytesIO(data))
    assert (picture.info["interlace"], picture.getextrema()) == (1, (0x80, 0x80))
    assert probe(data) == Picture("image/png", *size)


def test_a_jpeg_whose_size_lies_beyond_the_head_is_still_a_jpeg() -> None:
    data = made("JPEG", (64, 48), icc_profile=bytes(300_000))
    assert probe(data[: 256 << 10]) == Picture("image/jpeg")
    assert probe(data) == Picture("image/jpeg", 64, 48)


def test_a_bomb_is_measured_not_decoded() -> None:
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )
    assert probe(data) == Picture("image/png", 50_000, 50_000)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"", None),
        (b"hello", None),
        (b"BM and other words", None),
        (b"<html><svg></svg>", None),
        (b"<svg xmlns='x'>", Picture("image/svg+xml")),
        (b"<svg>", Picture("image/svg+xml")),
        (b"\xef\xbb\xbf\n <?xml version='1.0'?>\n<!-- a --><svg/>", Picture("image/svg+xml")),
        (b"<?xml version='1.0'?><html/>", None),
        (b"%PDF-1.7", Picture("application/pdf")),
        (b"\x89PNG\r\n\x1a\n", Picture("image/png")),
        (b"\x89PNG\r\n\x1a\n" + bytes(4) + b"IHDR" + bytes(8), Picture("image/png")),
        (b"\xff\xd8\xff\xd9", Picture("image/jpeg")),
        (b"\xff\xd8\xff\xe0\x00\x00" * 9, Picture("image/jpeg")),
        (b"\xff\xd8\xff\xff\xff\xc0\x00\x11\x08\x00\x02\x00\x03", Picture("image/jpeg", 3, 2)),
        (b"RIFF\x00\x00\x00\x00WEBPVP8X", Picture("image/webp")),
        (b"GIF89a\x01", Picture("image/gif")),
        (b"II*\x00\xff\xff\xff\xff", Picture("image/tiff")),
    ],
)
def test_heads(head: bytes, expected: Picture | None) -> None:
    assert probe(head) == expected


HEADS = [
    *(made(kind, (33, 21))[:600] for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")),
    made("WEBP", (9, 9), "RGBA", lossless=True),
    made("GIF", (33, 21), "P")[:600],
    b"<?xml version='1.0'?><!DOCTYPE svg><svg>",
    b"MM\x00*\x00\x00\x00\x08\xff\xff",
]


@settings(max_examples=400)
@given(
    st.sampled_from(HEADS),
    st.integers(0, 600),
    st.lists(st.tuples(st.integers(0), st.integers(0, 255))),
)
def test_never_raises(head: bytes, length: int, damage: list[tuple[int, int]]) -> None:
    broken = bytearray(head[:length])
    for at, value in damage:
        if broken:
            broken[at % len(broken)] = value
    found = probe(bytes(broken))
    assert found is None or (found.width >= 0 and found.height >= 0)


@given(st.binary(max_size=300))
def test_never_raises_on_noise(noise: bytes) -> None:
    for magic in (
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"RIFF0000WEBPVP8 ",
        b"BM",
        b"II*\x00",
    ):
        probe(magic + noise)
