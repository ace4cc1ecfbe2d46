"""The skimmer against a strict reference parser, with every document cut at every place."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.domain.call import Span
from gateway.relay.skim import BadJson, Hole, JsonSkimmer
from tests.relay.documents import KEEP, chunked, cuts, documents, filled, outcome, skim, timed


class Refused(Exception):
    """The reference refuses the document."""


def reference(document: bytes) -> Any:
    """Slow and strict: the standard parser and, beside it, every rule that it does not know."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise Refused("duplicate_key")
        return dict(pairs)

    def real(literal: str) -> float:
        if math.isinf(float(literal)):
            raise Refused("invalid_json")
        return float(literal)

    def integer(literal: str) -> int:
        if len(literal.lstrip("-")) > 100:
            raise Refused("invalid_json")
        return int(literal)

    def constant(_: str) -> NoReturn:
        raise Refused("invalid_json")

    try:
        value = json.loads(
            document.decode(),
            object_pairs_hook=members,
            parse_float=real,
            parse_int=integer,
            parse_constant=constant,
        )
    except (ValueError, RecursionError):
        raise Refused("invalid_json") from None
    if depth(value) > 32:
        raise Refused("json_too_deep")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refused("invalid_unicode") from None
    return value


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max((depth(member) for member in value.values()), default=0)
    if isinstance(value, list):
        return 1 + max((depth(member) for member in value), default=0)
    return 0


def holes(value: Any) -> Iterator[Hole]:
    if isinstance(value, Hole):
        yield value
    elif isinstance(value, dict | list):
        for member in value.values() if isinstance(value, dict) else value:
            yield from holes(member)


def check_document(document: bytes, chunks: list[bytes]) -> None:
    result = skim(chunks)
    expected = reference(document)
    assert filled(result.value, document) == expected
    assert result.length == len(document)
    for hole in holes(result.value):
        assert hole.end - hole.start > KEEP
        assert len(hole.head) == KEEP
    assert list(result.spans) == (list(expected) if isinstance(expected, dict) else [])
    for name, span in result.spans.items():
        raw = document[span.start : span.end]
        assert raw == raw.strip(b" \t\r\n")
        assert json.loads(raw) == expected[name]


@given(chunked(documents()))
@settings(max_examples=400, deadline=None)
def test_any_document_in_any_chunks(case: tuple[bytes, list[bytes]]) -> None:
    check_document(*case)


@given(documents())
@settings(max_examples=40, deadline=None)
def test_any_document_cut_at_every_place(document: bytes) -> None:
    for chunks in cuts(document):
        check_document(document, chunks)


GENERATION = (
    b'{ "created":1790000000, "data" : [ {"b64_json":"%b"} , {"b64_json":"%b"}],"size":'
    b'"1024x1024",\n"n\\u00e9":"\\/\\"\\\\\\ud83d\\ude00 long enough", "usage":{"total":2} }'
) % (base64.b64encode(b"x" * 21), base64.b64encode(b"y" * 20).replace(b"/", b"\\/"))


@pytest.mark.parametrize(
    "document",
    [
        GENERATION,
        b"0",
        b'""',
        b'"' + b"a" * 40 + b'"',
        b' {"a" :"' + b"\\\\" * 20 + b'" , "b": "' + b'\\"' * 20 + b'"}',
        '{"é":"ééééééééééééééééé","z":["\U0001f600"],"":{}}'.encode(),
        b"[" * 32 + b"]" * 32,
        b'{"a":{"b":{"c":["' + b"q" * 20 + b'",{}]}},"d":[],"e":1.50,"f":"x"}',
    ],
)
def test_cut_at_every_place(document: bytes) -> None:
    for chunks in cuts(document):
        check_document(document, chunks)


def verdict(judge: Callable[[], Any]) -> str:
    try:
        judge()
    except (BadJson, Refused):
        return "refused"
    return "accepted"


SPLINTERS = (
    b'|"|\\|{|}|[|]|,|:|NaN|-Infinity|1e400|\xff|\xc3|\xed\xa0\x80|\xef\xbb\xbf|\x00|\n|\\ud800|\\u12'
    b'|\\x|01|1.|-|tru|"a":1,"a":2|"a string longer than what is kept"|' + b"9" * 101
).split(b"|")


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A document with something cut out, put in, or exchanged."""
    document = draw(documents())
    start = draw(st.integers(0, len(document)))
    end = draw(st.integers(start, min(len(document), start + 4)))
    splinter = draw(st.sampled_from(SPLINTERS) | st.binary(max_size=3))
    return document[:start] + splinter + document[end:]


@given(chunked(damaged()))
@settings(max_examples=1500, deadline=None)
@example((b'{"a":1,"a":2}', [b'{"a":1,"a":2}']))
@example((b"[null,1e4000.0]", [b"[null,1e4000.0]"]))
@example((b'{"long string here":1}', [b'{"long string here":1}']))
def test_damage_is_judged_as_the_reference_does(case: tuple[bytes, list[bytes]]) -> None:
    document, chunks = case
    # Keys and strings kept whole, so that both parsers look at the same things.
    ours = verdict(lambda: skim(chunks, keep_bytes=10_000))
    assert ours == verdict(lambda: reference(document)), document


@given(chunked(damaged()))
@settings(max_examples=1000, deadline=None)
def test_damage_beside_holes(case: tuple[bytes, list[bytes]]) -> None:
    document, chunks = case
    ours = outcome(BadJson, lambda: skim(chunks, check_controls=True))
    theirs = outcome(Refused, lambda: reference(document))
    if isinstance(ours, BadJson):
        assert 0 <= ours.offset <= len(document)
        str(ours).encode()
        # Only a key too long to keep is refused here and allowed there.
        assert isinstance(theirs, Refused) or any(
            len(json.dumps(name)) > KEEP for name in all_keys(theirs)
        )
    elif isinstance(theirs, Refused):
        # Half a surrogate inside a hole is nobody's business.
        assert str(theirs) == "invalid_unicode"
    else:
        assert filled(ours.value, document) == theirs


def all_keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        if isinstance(value, dict):
            yield from value
        for member in value.values() if isinstance(value, dict) else value:
            yield from all_keys(member)


@given(documents(), st.data())
@settings(max_examples=200, deadline=None)
def test_no_beginning_of_a_document_is_a_document(document: bytes, data: st.DataObject) -> None:
    cut = document[: data.draw(st.integers(0, len(document) - 1))]
    assert verdict(lambda: skim([cut], 10_000)) == verdict(lambda: reference(cut))


TORTURE = [
    (b"", "invalid_json", 0),
    (b" \r\n", "invalid_json", 3),
    (b"[" * 100_000, "json_too_deep", 32),
    (b'{"a":' * 100_000, "json_too_deep", 160),
    (b'{"n":' + b"7" * 5000 + b"}", "invalid_json", 5),
    (b'{"n":-' + b"7" * 101 + b"}", "invalid_json", 5),
    (b'{"n":NaN}', "invalid_json", 5),
    (b'{"n":Infinity}', "invalid_json", 5),
    (b'{"n":-Infinity}', "invalid_json", 6),
    (b'{"a":"e5","n":[1, 1e400]}', "invalid_json", 18),
    (b'{"n":-1e400}', "invalid_json", 5),
    (b'{"a":"\\ud800"}', "invalid_unicode", 6),
    (b'{"a":"\\\\\\udc00 x"}', "invalid_unicode", 8),
    (b'{"a":"\\ude00\\ud83d"}', "invalid_unicode", 6),
    (b'{"\\uD800":1}', "invalid_unicode", 2),
    (b'{"n":1,"n":10}', "duplicate_key", 7),
    (b'{"n":1,"\\u006e":10}', "duplicate_key", 7),
    (b'{"a":[{"k":"v" , "x":{"k":1},"k" : 2}]}', "duplicate_key", 29),
    (b'{"' + b"k" * 50 + b'":1}', "invalid_json", 1),
    (b'{"a":"\xff"}', "invalid_json", 6),
    (b'{"a":"' + b"x" * 50 + b'\xed\xa0\x80"}', "invalid_json", 56),
    (b'{"a":"' + b"x" * 50 + b'\xc3"}', "invalid_json", 56),
    (b'{"a":"' + b"x" * 50 + b"\\", "invalid_json", 5),
    (b'{"a":"' + b"x" * 50 + b'\\q"}', "invalid_json", 56),
    (b'{"a":"' + b"x" * 50 + b'\\u12g4"}', "invalid_json", 56),
    (b"\xef\xbb\xbf{}", "invalid_json", 0),
    (b"{} x", "invalid_json", 3),
    (b"{}{}", "invalid_json", 2),
    (b'{"a":"' + b"x" * 50 + b'"}}', "invalid_json", 58),
    (b'{"a":"' + b"x" * 50 + b'" 1}', "invalid_json", 58),
    (b'["' + b"x" * 50 + b'",01]', "invalid_json", 55),
    (b'-"' + b"x" * 50 + b'"', "invalid_json", 0),
    ('{"é":"'.encode() + "é".encode() * 50 + b'",,}', "invalid_json", 109),
    (b"<html><body>502 Bad Gateway", "invalid_json", 0),
    (b'{"a":"\n"}', "invalid_json", 6),
    (b'{"a":1', "invalid_json", 6),
    (b"]", "invalid_json", 0),
]


@pytest.mark.parametrize(("document", "code", "offset"), TORTURE)
def test_torture(document: bytes, code: str, offset: int) -> None:
    for size in (1, 2, 3, 7, 50, 65_536):
        if size < 50 and len(document) > 6000:
            continue
        chunks = [document[at : at + size] for at in range(0, len(document), size)]
        with pytest.raises(BadJson) as caught:
            skim(chunks)
        assert (caught.value.code, caught.value.offset) == (code, offset), str(caught.value)
        assert f"at byte {offset}" in str(caught.value)
        str(caught.value).encode()


def test_what_is_wrong_is_known_before_the_end() -> None:
    for beginning in (b'{"n":N', b"[" * 33, b"<", b'{"a":"\xff', b'{"a":"\\x', b"{}]"):
        with pytest.raises(BadJson):
            JsonSkimmer().feed(beginning)


def test_the_parts_that_are_kept_are_bounded() -> None:
    with pytest.raises(BadJson) as caught:
        skim([b"[" + b"1," * 600], max_kept=1000)
    assert caught.value.code == "json_too_large"
    # The heads of holes count, or a body of nothing but holes would be kept whole.
    with pytest.raises(BadJson) as caught:
        skim([b"[", *[b'"' + b"x" * 200 + b'",'] * 20], keep_bytes=100, max_kept=1000)
    assert caught.value.code == "json_too_large"
    skim([b'"' + b"x" * 100_000 + b'"'], max_kept=100)


def test_a_number_of_a_hundred_digits_is_a_number() -> None:
    assert skim([b"-" + b"7" * 100]).value == -int("7" * 100)


@pytest.mark.parametrize("depth_allowed", [0, 501])
def test_depths_that_cannot_be_promised(depth_allowed: int) -> None:
    with pytest.raises(ValueError):
        JsonSkimmer(max_depth=depth_allowed)


def test_controls_in_holes_are_refused_where_asked() -> None:
    document = b'{"a":"' + b"x" * 50 + b'\n"}'
    assert skim([document]).value["a"].end == 57
    for chunks in cuts(document):
        with pytest.raises(BadJson) as caught:
            skim(chunks, check_controls=True)
        assert caught.value.offset == 56


def strict_base64(text: str) -> bool:
    payload = text.split(",", 1)[1] if text.startswith("data:") and "," in text else text
    if text.startswith("data:") and "," not in text:
        return False
    whole = len(payload) > 0 and len(payload) % 4 == 0
    return whole and re.fullmatch(r"[A-Za-z0-9+/]*={0,2}", payload) is not None


@given(
    chunked(
        st.builds(
            lambda start, body, end: start + base64.b64encode(body) + end,
            st.sampled_from([b"", b"data:image/png;base64,", b"data:", b"dat", b"data:,", b"a,"]),
            st.binary(max_size=40),
            st.sampled_from([b"", b"=", b"==", b"====", b" ", b"-", b"A", b"AAAA", b","]),
        )
    )
)
@settings(max_examples=600, deadline=None)
@example((b"data:,A===", [b"data:,A=", b"=="]))
@example((b"QUI=QUI=", [b"QUI=", b"QUI="]))
def test_base64_and_digests(case: tuple[bytes, list[bytes]]) -> None:
    content, chunks = case
    hole = skim([b'"', *chunks, b'"'], keep_bytes=6, digests=True, check_base64=True).value
    if not isinstance(hole, Hole):
        return
    assert hole.base64 == strict_base64(content.decode())
    assert hole.digest == hashlib.sha256(content).hexdigest()


def test_base64_and_digests_are_not_made_unasked() -> None:
    hole = skim([b'"' + b"QUJD" * 9 + b'"']).value
    assert (hole.base64, hole.digest) == (False, "")
    escaped = skim([b'"' + b"QU\\/D" * 9 + b'"'], check_base64=True).value
    assert (escaped.base64, escaped.escaped) == (False, True)


def test_ten_megabytes_cost_little_time_and_less_memory() -> None:
    picture = base64.b64encode(bytes(range(256)) * 31_250)
    document = b'{"created":1,"data":[{"b64_json":"' + picture + b'"}],"usage":{"total_tokens":1}}'
    chunks = [document[at : at + 65_536] for at in range(0, len(document), 65_536)]
    seconds = min(timed(lambda: skim(chunks, 4096)) for _ in range(5))
    # 1 ms where it was written; the bound only tells a scan from a decoding loop.
    assert seconds < 0.02
    tracemalloc.start()
    try:
        result = skim(chunks, 4096)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000
    assert result.spans["usage"] == Span(len(document) - 19, len(document) - 1)


def test_many_tokens_and_escapes_are_linear() -> None:
    def tokens(count: int) -> list[bytes]:
        document = json.dumps({"a": [{"x": "y\n" * 40}] * count, "b": list(range(count))}).encode()
        return [document[at : at + 65_536] for at in range(0, len(document), 65_536)]

    few, many = tokens(2_000), tokens(16_000)
    once = min(timed(lambda: skim(few, max_kept=1 << 30, max_values=1 << 30)) for _ in range(5))
    eight = min(timed(lambda: skim(many, max_kept=1 << 30, max_values=1 << 30)) for _ in range(3))
    assert eight < once * 24


@pytest.mark.parametrize("text", [b"[" + b"1," * 20_000 + b"1]", b"[" + b"[]," * 20_000 + b"1]"])
def test_thousands_of_values_are_refused_as_they_come(text: bytes) -> None:
    with pytest.raises(BadJson) as refused:
        skim([text[:50_000]])
    assert refused.value.code == "json_too_large"


def test_what_was_paid_for_is_read_leniently() -> None:
    text = b'{"size":"a","size":"b","prompt":"half \\ud83d","created":1e999}'
    skimmer = JsonSkimmer(lenient=True)
    skimmer.feed(text)
    assert skimmer.close().value == {"size": "b", "prompt": "half \ud83d", "created": math.inf}
