"""The form scanner: any cut, any damage, and the parts as they were."""

from __future__ import annotations

import contextlib
import hashlib
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.domain.errors import BodyTooLarge, GatewayError, InvalidRequest
from gateway.ports import Lent
from gateway.relay import multipart
from gateway.relay.multipart import HEAD_BYTES, FormScanner, Part, boundary_of

BOUNDARY = b"d029280f043d6dcb"
MIB = 1 << 20


def scan(body: bytes, *, cuts: int = 0, boundary: bytes = BOUNDARY) -> list[Part]:
    """Every part of ``body``, fed in pieces of ``cuts`` bytes (0: at once)."""
    scanner = FormScanner(boundary, max_file_bytes=MIB)
    step = cuts or len(body) or 1
    parts = [
        part for at in range(0, len(body), step) for part in scanner.feed(body[at : at + step])
    ]
    scanner.close()
    return parts


def part(headers: bytes, content: bytes) -> bytes:
    return b"--" + BOUNDARY + b"\r\n" + headers + b"\r\n\r\n" + content + b"\r\n"


def text(name: bytes, content: bytes) -> bytes:
    return part(b'Content-Disposition: form-data; name="%b"' % name, content)


def file(name: bytes, content: bytes, filename: bytes = b"a.png") -> bytes:
    disposition = b'Content-Disposition: form-data; name="%b"; filename="%b"' % (name, filename)
    return part(disposition + b"\r\nContent-Type: image/png", content)


END = b"--" + BOUNDARY + b"--\r\n"
TRICKY = b"\r\n--d029280f043d6dc\r\n--\r\n\r\n--d029280f043d6dca--\r\r\n-"
FORM = text(b"prompt", "ein Bär".encode()) + file(b"image", TRICKY) + text(b"n", b"") + END


def test_parts_as_they_were() -> None:
    prompt, image, n = scan(FORM)
    assert (prompt.name, prompt.content, prompt.is_file) == ("prompt", "ein Bär".encode(), False)
    assert (image.name, image.filename, image.content_type) == ("image", "a.png", "image/png")
    assert FORM[slice(*image.span)] == TRICKY
    assert image.digest == hashlib.sha256(TRICKY).hexdigest()
    assert image.size_bytes == len(TRICKY)
    assert FORM[slice(*prompt.span)] == prompt.content
    assert (n.content, n.size_bytes) == (b"", 0)


@pytest.mark.parametrize("step", range(1, 60))
def test_any_cut_gives_the_same_parts(step: int) -> None:
    assert scan(FORM, cuts=step) == scan(FORM)


def test_every_single_cut() -> None:
    whole = scan(FORM)
    for at in range(len(FORM)):
        scanner = FormScanner(BOUNDARY, max_file_bytes=MIB)
        parts = scanner.feed(FORM[:at]) + scanner.feed(FORM[at:])
        scanner.close()
        assert parts == whole


@given(
    contents=st.lists(
        st.one_of(
            st.binary(max_size=200),
            st.lists(
                st.sampled_from([b"\r", b"\n", b"-", b"--", BOUNDARY[:-1], b"\r\n--", b"x"]),
                max_size=30,
            ).map(b"".join),
        ),
        max_size=5,
    ),
    step=st.integers(1, 80),
    preamble=st.sampled_from([b"", b"\r\n", b"hello\r\n", b"--\r\n"]),
)
def test_round_trip(contents: list[bytes], step: int, preamble: bytes) -> None:
    contents = [content for content in contents if b"\r\n--" + BOUNDARY not in b"\r\n" + content]
    body = preamble + b"".join(file(b"f", content) for content in contents) + END + b"epilogue"
    parts = scan(body, cuts=step)
    assert [item.content for item in parts] == contents
    assert [body[slice(*item.span)] for item in parts] == contents


@settings(max_examples=300)
@given(st.binary(max_size=400), st.integers(1, 50))
def test_random_bytes_only_raise_the_house_errors(noise: bytes, step: int) -> None:
    for body in (noise, FORM[:90] + noise, b"--" + BOUNDARY + b"\r\n" + noise + b"\r\n\r\n" + END):
        with contextlib.suppress(GatewayError):
            scan(body, cuts=step)


def test_a_form_cut_anywhere_is_refused() -> None:
    for at in range(len(FORM) - len(b"\r\n")):
        with pytest.raises(InvalidRequest) as caught:
            scan(FORM[:at])
        assert caught.value.code == "invalid_multipart"
    assert len(scan(FORM[:-2])) == 3


@settings(max_examples=200)
@given(
    size=st.integers(HEAD_BYTES, HEAD_BYTES + 3_000),
    ends=st.lists(
        st.sampled_from([b"\r", b"\n", b"-", b"--", BOUNDARY[:-1], b"\r\n--", b"x"]), max_size=30
    ).map(b"".join),
    step=st.integers(1, 700),
    tail=st.sampled_from([END, b"", text(b"n", b"1") + END, END + b"\r\nbehind it"]),
)
def test_lent_pieces_give_the_same_parts(size: int, ends: bytes, step: int, tail: bytes) -> None:
    """One buffer for all of them, written over each time, with old bytes behind what is lent."""
    body = file(b"image", bytes(size) + ends) + tail
    whole, lent = (FormScanner(BOUNDARY, max_file_bytes=MIB) for _ in range(2))
    wanted = whole.feed(body)
    found = lent.feed(body[:HEAD_BYTES])
    buffer = bytearray(END * (step // len(END) + 1))[:step]
    for at in range(HEAD_BYTES, len(body), step):
        piece = body[at : at + step]
        buffer[: len(piece)] = piece
        found += lent.feed(Lent(buffer, len(piece)))
    assert found == wanted
    for scanner in (whole, lent):
        if tail:
            scanner.close()
        else:
            with pytest.raises(InvalidRequest):
                scanner.close()


@pytest.mark.parametrize("first", [0, 60, 5_000, HEAD_BYTES - 1, HEAD_BYTES, HEAD_BYTES + 9])
@pytest.mark.parametrize("step", [40_000, HEAD_BYTES, 2 * HEAD_BYTES + 5, 2 * MIB])
def test_lent_pieces_may_begin_and_end_anywhere(first: int, step: int) -> None:
    """In the head of a file, which is kept, and with its end and another one in one piece."""
    noise = random.Random(first).randbytes(HEAD_BYTES + 100_000)
    pictures = file(b"image[]", noise) + file(b"image[]", noise[:200_000] + b"\r\n--")
    body = text(b"prompt", b"a cat") + pictures + file(b"mask", noise * 2) + END
    whole, lent = (FormScanner(BOUNDARY, max_file_bytes=MIB) for _ in range(2))
    found = lent.feed(body[:first])
    buffer = bytearray(step + 7)
    for at in range(first, len(body), step):
        piece = body[at : at + step]
        buffer[7 : 7 + len(piece)] = piece
        found += lent.feed(Lent(buffer, len(piece), 7))
    lent.close()
    assert found == whole.feed(body)
    assert [part.size_bytes for part in found[1:]] == [len(noise), 200_004, 2 * len(noise)]


def test_lent_pieces_are_searched_where_the_system_has_no_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(multipart, "_SYSTEM_SEARCH", None)
    scanner = FormScanner(BOUNDARY, max_file_bytes=MIB)
    scanner.feed(file(b"image", bytes(HEAD_BYTES + 9))[:-2])
    assert scanner.feed(Lent(bytearray(100_000), 100_000)) == []
    behind = bytearray(b"\r\n" + END)
    (found,) = scanner.feed(Lent(behind, len(behind)))
    scanner.close()
    assert found.size_bytes == HEAD_BYTES + 9 + 100_000


def test_a_lent_piece_over_the_limit_of_a_file_is_refused() -> None:
    scanner = FormScanner(BOUNDARY, max_file_bytes=MIB)
    scanner.feed(file(b"image", b"")[:-2] + bytes(HEAD_BYTES))
    buffer = bytearray(MIB)
    with pytest.raises(BodyTooLarge):
        scanner.feed(Lent(buffer, MIB - HEAD_BYTES + 64))


def test_only_the_head_of_a_file_is_kept() -> None:
    content = bytes(range(256)) * 2048
    (found,) = scan(file(b"image", content) + END, cuts=1000)
    assert found.content == content[:HEAD_BYTES]
    assert found.digest == hashlib.sha256(content).hexdigest()


def test_a_file_over_the_limit_is_refused_before_its_end() -> None:
    scanner = FormScanner(BOUNDARY, max_file_bytes=MIB)
    scanner.feed(file(b"image", b"")[:-2])
    scanner.feed(bytes(MIB))
    with pytest.raises(BodyTooLarge) as caught:
        scanner.feed(bytes(64))
    assert (caught.value.status, caught.value.param, caught.value.close) == (413, "image", True)


DISPOSITION = b"Content-Disposition: form-data; "


@pytest.mark.parametrize(
    ("headers", "name", "filename"),
    [
        (DISPOSITION + b"name=prompt", "prompt", None),
        (DISPOSITION + rb'name="a\"b\\c"', 'a"b\\c', None),
        (DISPOSITION + b'name="a%22b"', 'a"b', None),
        (DISPOSITION + b'name="a%5B"', "a%5B", None),
        (DISPOSITION + b'name="b;c=d"', "b;c=d", None),
        (DISPOSITION + rb'name="f"; filename="C:\new\x.png"', "f", "C:\\new\\x.png"),
        (DISPOSITION + b'name="f"; filename="../../etc/x.png"', "f", "../../etc/x.png"),
        (DISPOSITION + b'name="f"; filename=""', "f", ""),
        (DISPOSITION + b"name=\"f\"; filename*=UTF-8''%e2%82%ac.png", "f", "€.png"),
        (DISPOSITION + 'name="ü"; filename="ä.png"'.encode(), "ü", "ä.png"),
        (DISPOSITION + b'name="f"; filename="\xe4.png"', "f", "�.png"),
        (b'content-disposition:FORM-DATA;name="f" ; filename="x" ;', "f", "x"),
        (b"X-Other: 1\r\n" + DISPOSITION + b'name="f"', "f", None),
        (DISPOSITION + b'name="f"\r\nContent-Transfer-Encoding: 8bit', "f", None),
    ],
)
def test_names_are_read(headers: bytes, name: str, filename: str | None) -> None:
    (found,) = scan(part(headers, b"x") + END)
    assert (found.name, found.filename) == (name, filename)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_multipart"),
        (b"{}", "invalid_multipart"),
        (text(b"a", b"b"), "invalid_multipart"),
        (text(b"a", b"b").replace(b"\r\n", b"\n") + END, "invalid_multipart"),
        (part(b"", b"x") + END, "invalid_multipart"),
        (part(b"Content-Type: text/plain", b"x") + END, "invalid_multipart"),
        (part(b"Content-Disposition: form-data", b"x") + END, "invalid_multipart"),
        (part(b'Content-Disposition: attachment; name="a"', b"x") + END, "invalid_multipart"),
        (part(DISPOSITION + b'name=""', b"x") + END, "invalid_multipart"),
        (part(DISPOSITION + b'name="a', b"x") + END, "invalid_multipart"),
        (part(DISPOSITION + b'name="a"; name="b"', b"x") + END, "invalid_multipart"),
        (part(DISPOSITION + b"name=\"a\"; name*=utf-8''n", b"x") + END, "invalid_multipart"),
        (part(DISPOSITION + b'name="a"; name*0="n"', b"x") + END, "invalid_multipart"),
        (part(DISPOSITION + b'name="\xff"', b"x") + END, "invalid_multipart"),
        (part(DISPOSITION + b'name="a";\r\n filename="b"', b"x") + END, "invalid_multipart"),
        (part(DISPOSITION + b'name="a"\r\nno colon', b"x") + END, "invalid_multipart"),
        (part(b"Content-Disposition : form-data; name=a", b"x") + END, "invalid_multipart"),
        (part((DISPOSITION + b"name=a\r\n") * 2 + b"A: b", b"x") + END, "invalid_multipart"),
        (
            part(DISPOSITION + b"name=a\r\nContent-Transfer-Encoding: base64", b"x") + END,
            "invalid_multipart",
        ),
        (
            part(DISPOSITION + b"name=a" + b"".join(b"\r\nX-%d: 1" % i for i in range(16)), b"")
            + END,
            "invalid_multipart",
        ),
        (part(DISPOSITION + b'name="a"\r\nX: ' + b"y" * (64 << 10), b"x"), "invalid_multipart"),
        (part(DISPOSITION + b'name="a\nb"', b"x") + END, "bad_header"),
        (part(DISPOSITION + b'name="a\x00b"', b"x") + END, "bad_header"),
        (part(DISPOSITION + b'name="a%0D%0Ab"', b"x") + END, "bad_header"),
        (part(DISPOSITION + b'name="a"; filename="a\rb"', b"x") + END, "bad_header"),
        (b"".join(text(b"f%d" % i, b"x") for i in range(41)) + END, "invalid_multipart"),
        (text(b"a", bytes(257 << 10)) + END, "invalid_multipart"),
        (text(b"a", b"b") + END + text(b"n", b"10") + END, "invalid_multipart"),
        (text(b"a", b"b\r\n--" + BOUNDARY + b"longer") + END, "invalid_multipart"),
        (text(b"a", b"b\r\n--" + BOUNDARY + b" " * 4096 + b"\r\n"), "invalid_multipart"),
    ],
)
@pytest.mark.parametrize("step", [0, 1, 7])
def test_what_is_refused(body: bytes, code: str, step: int) -> None:
    if step == 1 and len(body) > 10_000:
        step = 700
    with pytest.raises(InvalidRequest) as caught:
        scan(body, cuts=step)
    assert (caught.value.status, caught.value.code) == (400, code)


def test_forty_parts_and_a_text_of_256_kib_are_read() -> None:
    assert len(scan(b"".join(text(b"f%d" % i, b"x") for i in range(40)) + END)) == 40
    assert scan(text(b"a", bytes(256 << 10)) + END)[0].size_bytes == 256 << 10


def test_blanks_behind_a_boundary() -> None:
    body = text(b"a", b"b").replace(BOUNDARY + b"\r\n", BOUNDARY + b" \t \r\n") + END
    assert scan(body)[0].content == b"b"


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/form-data; boundary=abc", b"abc"),
        ('multipart/form-data; charset=utf-8; Boundary="a b=c"', b"a b=c"),
        (
            "multipart/form-data;boundary=----WebKitFormBoundaryx/Y+1",
            b"----WebKitFormBoundaryx/Y+1",
        ),
    ],
)
def test_the_boundary(content_type: str, boundary: bytes) -> None:
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize(
    "parameter",
    ["", "; boundary=", '; boundary=""', "; boundary=ü", "; boundary=a; boundary=b",
     "; boundary=a; boundary*=utf-8''b", "; boundary=a; boundary*0=b",
     '; boundary="a\r\nb"', '; boundary="a "', "; boundary=" + "x" * 201, "; =", '; boundary="a'],
)  # fmt: skip
def test_no_usable_boundary(parameter: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        boundary_of("multipart/form-data" + parameter)
    assert caught.value.code == "invalid_multipart"


@pytest.mark.parametrize("content", [b"\r\n" * (4 * MIB), b"\r\n--d029280f043d6dc" * 400_000])
def test_a_file_made_to_be_slow_is_not(content: bytes) -> None:
    scanner = FormScanner(BOUNDARY, max_file_bytes=50 * MIB)
    body = file(b"image", content) + END
    started = time.perf_counter()
    for at in range(0, len(body), 1 << 16):
        scanner.feed(body[at : at + (1 << 16)])
    scanner.close()
    assert time.perf_counter() - started < 2
