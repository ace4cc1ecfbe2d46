"""The skimmer against a strict reference parser, with every document cut at every place."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NoReturn

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from gateway.domain.call import Span
from gateway.relay.skim import (
    BadEvent,
    BadJson,
    Event,
    EventSkimmer,
    Hole,
    JsonSkimmer,
    Skimmed,
    fields_of,
    parsed,
)

KEEP = 24  # more than any key of a generated document takes, escaped


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


def skim(chunks: list[bytes], keep_bytes: int = KEEP, **options: Any) -> Skimmed:
    skimmer = JsonSkimmer(keep_bytes=keep_bytes, **options)
    for chunk in chunks:
        skimmer.feed(chunk)
    return skimmer.close()


def filled(value: Any, document: bytes) -> Any:
    """The value with every hole read from its place in the stream."""
    if isinstance(value, Hole):
        raw = document[value.start : value.end]
        assert document[value.start - 1 : value.start] == b'"'
        assert document[value.end : value.end + 1] == b'"'
        assert raw.startswith(value.head)
        assert value.escaped == (b"\\" in raw)
        return json.loads(b'"' + raw + b'"')
    if isinstance(value, dict):
        return {name: filled(member, document) for name, member in value.items()}
    if isinstance(value, list):
        return [filled(member, document) for member in value]
    return value


def holes(value: Any) -> Iterator[Hole]:
    if isinstance(value, Hole):
        yield value
    elif isinstance(value, dict | list):
        for member in value.values() if isinstance(value, dict) else value:
            yield from holes(member)


def cuts(document: bytes) -> Iterator[list[bytes]]:
    """Whole, byte by byte, and in two at every place."""
    yield [document]
    yield [document[at : at + 1] for at in range(len(document))]
    for at in range(1, len(document)):
        yield [document[:at], document[at:]]


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


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    ["", "a" * KEEP, "a" * (KEEP + 1), "é" * 12, "é" * 13, "\U0001f600" * 4, '"\\/\n\u2028', "\x00"]
)
keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=2)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """A document, with or without escapes, slashes escaped, and blanks in odd places."""
    text = json.dumps(
        draw(values),
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, None, "\t", " \r"])),
        separators=draw(st.sampled_from([(",", ":"), (" , ", " : ")])),
    )
    if draw(st.booleans()):
        text = text.replace("/", "\\/")
    return (
        draw(st.sampled_from(["", " ", "\n\t"])) + text + draw(st.sampled_from(["", "\r\n"]))
    ).encode()


@st.composite
def chunked(draw: st.DrawFn, source: st.SearchStrategy[bytes]) -> tuple[bytes, list[bytes]]:
    document = draw(source)
    places = sorted(draw(st.lists(st.integers(0, len(document)), max_size=6)))
    bounds = [0, *places, len(document)]
    return document, [document[a:b] for a, b in pairwise(bounds)]


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


def outcome(refusal: type[Exception], judge: Callable[[], Any]) -> Any:
    """What it returned, or how it refused."""
    try:
        return judge()
    except refusal as error:
        return error


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


def timed(work: Callable[[], Any]) -> float:
    """CPU seconds: other processes do not count."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


# Events


def read(chunks: list[bytes], keep_bytes: int = KEEP) -> list[Event]:
    skimmer = EventSkimmer(keep_bytes=keep_bytes)
    events = [event for chunk in chunks for event in skimmer.feed(chunk)]
    last = skimmer.close()
    return events if last is None else [*events, last]


def reference_events(stream: bytes) -> list[tuple[str, str]]:
    """Name and joined data, by the rules of the HTML standard, of a whole stream of text.

    Unlike a browser it also gives the events without data, and an unterminated last one.
    """
    events = []
    name, data, begun = "", list[str](), False
    lines = re.split("\r\n|\n|\r", stream.decode())
    for number, line in enumerate(lines):
        if line == "":
            if begun:
                events.append((name, "\n".join(data)))
            name, data, begun = "", [], False
            continue
        begun = True
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        if number == len(lines) - 1:
            events.append((name, "\n".join(data)))
    return events


def check_stream(stream: bytes, chunks: list[bytes]) -> None:
    events = read(chunks)
    expected = reference_events(stream)
    assert len(events) == len(expected)
    at = 0
    for event, (name, data) in zip(events, expected, strict=True):
        assert event.start == at
        at = event.end
        assert event.name == name
        assert event.done == (data == "[DONE]")
        if event.done or data == "":
            assert event.data is None
            continue
        assert event.data is not None
        assert filled(event.data.value, stream) == json.loads(data)
        assert event.data.length == len(data.encode())
        for member, span in event.data.spans.items():
            # A value over several lines has the lines' beginnings in its span.
            raw = re.sub(rb"(\r\n|\r|\n)data: ?", b"\n", stream[span.start : span.end])
            assert json.loads(raw) == json.loads(data)[member]
    assert at <= len(stream)
    assert stream[at:].strip(b"\r\n") == b""


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    end = draw(st.sampled_from(["\n", "\r\n", "\r", "mixed"]))

    def line_end() -> str:
        # An LF right behind a CR would not be a line end of its own.
        ends = ["\r\n", "\r"] if text.endswith("\r") else ["\r\n", "\r", "\n"]
        return draw(st.sampled_from(ends)) if end == "mixed" else end

    text = ""
    for _ in range(draw(st.integers(0, 4))):
        for line in draw(
            st.lists(
                st.sampled_from(
                    [": keepalive", ":", "id: 7", "retry: 1000", "event: a.b", "event:c"]
                )
                | st.just("x"),
                max_size=3,
            )
        ):
            text += line + line_end()
        kind = draw(st.sampled_from(["json", "json", "lines", "done", "nothing", "empty"]))
        space = draw(st.sampled_from(["", " "]))
        if kind == "json":
            text += f"data:{space}{json.dumps(draw(values), ensure_ascii=False)}{line_end()}"
        elif kind == "lines":
            for line in json.dumps(draw(values), indent=1).split("\n"):
                text += f"data:{space}{line}{line_end()}"
        elif kind == "done":
            text += f"data:{space}[DONE]{line_end()}"
        elif kind == "empty":
            text += f"data:{space}{line_end()}"
        for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
            text += line_end()
    return text.encode()


@given(chunked(streams()))
@settings(max_examples=500, deadline=None)
def test_any_stream_in_any_chunks(case: tuple[bytes, list[bytes]]) -> None:
    check_stream(*case)


@given(streams())
@settings(max_examples=25, deadline=None)
def test_any_stream_cut_at_every_place(stream: bytes) -> None:
    whole = read([stream])
    for chunks in cuts(stream):
        check_stream(stream, chunks)
        assert read(chunks) == whole


LONG = b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAAB"
STREAM = (
    b": keepalive\n\nevent: image_generation.partial_image\n"
    b'data: {"type":"image_generation.partial_image","b64_json":"' + LONG + b'"}\n\n'
    b"event: image_generation.completed\nid: 3\n"
    b'data: {"type":"image_generation.completed","b64_json":"' + LONG + b'","usage":{"t":1}}\n\n'
    b"data: [DONE]\n\n"
)


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_a_stream_of_pictures(line_end: bytes) -> None:
    stream = STREAM.replace(b"\n", line_end)
    for chunks in cuts(stream):
        comment, partial, completed, done = read(chunks)
        assert (comment.data, comment.name, comment.start) == (None, "", 0)
        assert partial.name == "image_generation.partial_image"
        assert completed.data is not None
        hole = completed.data.value["b64_json"]
        assert stream[hole.start : hole.end] == LONG
        usage = completed.data.spans["usage"]
        assert stream[usage.start : usage.end] == b'{"t":1}'
        assert stream[completed.start : completed.end].startswith(b"event: image_generation.comp")
        assert (done.done, done.data, done.end) == (True, None, len(stream))


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_an_event_is_given_when_its_blank_line_is_there(line_end: bytes) -> None:
    skimmer = EventSkimmer()
    head = b'data: {"a":1}' + line_end
    assert skimmer.feed(head) == []
    events = skimmer.feed(line_end)
    if line_end == b"\r":
        # The first CR was only seen to stand alone by the second: nothing more is waited for.
        assert len(events) == 1
    assert [event.end for event in events] == [len(head) + len(line_end)]


def test_the_last_event_may_miss_its_blank_line() -> None:
    for end in (b"", b"\n", b"\r", b"\r\n"):
        skimmer = EventSkimmer()
        assert skimmer.feed(b'event: x\ndata: {"a":1}' + end) == []
        event = skimmer.close()
        assert event is not None
        assert event.data is not None
        assert event.data.value == {"a": 1}
        assert event.end == 22 + len(end)


@pytest.mark.parametrize(
    "stream",
    [
        b'data: {"a":1',
        b'data: {"a":"' + b"x" * 50,
        b"event: image_generation.completed\n",
        b"event: image_gen",
        b"data: [DON",
        b'{"error":{"message":"no stream"}}',
    ],
)
def test_a_stream_that_ends_inside_an_event(stream: bytes) -> None:
    for chunks in cuts(stream):
        skimmer = EventSkimmer()
        with pytest.raises(BadEvent):
            [skimmer.feed(chunk) for chunk in chunks] and skimmer.close()


@pytest.mark.parametrize(
    ("stream", "offset"),
    [
        (b"data: <html>\n\n", 6),
        (b"data: [DONE\n\n", 7),
        (b'data: {"a":1}}\n\n', 13),
        (b'event: x\ndata: {"a" 1}\n\n', 20),
        (b'data: {"a":"' + b"x" * 50 + b'\ndata: y"}\n\n', 63),
        (b'data: {"a":\ndata: 1,,\ndata: }\n\n', 20),
        (b"data: \xff\n\n", 6),
    ],
)
def test_frames_that_are_garbage(stream: bytes, offset: int) -> None:
    for chunks in cuts(stream):
        with pytest.raises(BadEvent) as caught:
            read(chunks)
        assert caught.value.offset == offset, str(caught.value)


def test_good_events_before_garbage_are_not_lost() -> None:
    skimmer = EventSkimmer()
    assert len(skimmer.feed(b'data: {"a":1}\n\ndata: oops\n\ndata: {}\n\n')) == 1
    for _ in range(2):
        with pytest.raises(BadEvent):
            skimmer.feed(b"")
    with pytest.raises(BadEvent):
        skimmer.close()


@given(chunked(st.builds(lambda a, b: a + b + a, streams(), st.binary(max_size=20))))
@settings(max_examples=500, deadline=None)
def test_nothing_else_is_raised(case: tuple[bytes, list[bytes]]) -> None:
    stream, chunks = case
    events = outcome(BadEvent, lambda: read(chunks))
    if isinstance(events, BadEvent):
        assert 0 <= events.offset <= len(stream)
    else:
        assert events == read([stream])


def mended(chunks: list[bytes]) -> bytes:
    """The stream as it is passed on."""
    text = bytearray(b"".join(chunks))
    for event in read(chunks):
        for span, content in event.mends:
            assert event.start <= span.start < span.end <= event.end
            assert len(content) == span.end - span.start
            text[slice(*span)] = content
    return bytes(text)


def seen_by_the_sdk(stream: bytes) -> list[tuple[str | None, str]]:
    return [(sse.event, sse.data) for sse in SSEDecoder().iter_bytes(iter([stream]))]


KEEP_ALIVE = ": keepalive\n\n"


@pytest.mark.parametrize(
    ("stream", "passes"),
    [
        ("retry: 1000\n\n", ":etry: 1000\n\n"),
        ("id: 7\r\n\r\n", ":d: 7\r\n\r\n"),
        ("id: 7\rdata: {}\r\r", ":d: 7\rdata: {}\r\r"),
        ("id\ndata: {}\n\n", "id\ndata: {}\n\n"),
        ("event: ping\n\n", ":vent: ping\n\n"),
        ("event: ping\ndata:\ndata: \n\n", ":vent: ping\n:ata:\n:ata: \n\n"),
        ("garbage\n: a\n\n", ":arbage\n: a\n\n"),
        ("retry: 1\nextra: 2\ndata: {}\n\n", "retry: 1\nextra: 2\ndata: {}\n\n"),
        ("event: x\ndata: [DONE]\n\n", "event: x\ndata: [DONE]\n\n"),
        (": caf\u00e9 \u2028\n\n", ": caf\u00e9 \u2028\n\n"),
        ("\u20acuro: \u00e9\n\n", ":??uro: ??\n\n"),
    ],
)
def test_a_line_that_says_nothing_becomes_a_comment(stream: str, passes: str) -> None:
    for chunks in cuts(stream.encode()):
        assert mended(chunks) == passes.encode()
    for _, data in seen_by_the_sdk((passes + KEEP_ALIVE).encode()):
        assert data in ("{}", "[DONE]")


@pytest.mark.parametrize(
    ("stream", "passes"),
    [
        (b": \xff\xfe\xc3\xa9.\n\n", b": ????.\n\n"),
        (b"\xff: 1\n\n", b":: 1\n\n"),
        (b"event: a\xc3\ndata: {}\n\n", b"event: a?\ndata: {}\n\n"),
        (b": \xc3 \xa9\ndata: {}\n\n", b": ? ?\ndata: {}\n\n"),
    ],
)
def test_what_is_not_utf8_beside_the_data_is_no_obstacle(stream: bytes, passes: bytes) -> None:
    for chunks in cuts(stream):
        assert mended(chunks) == passes


noise = st.lists(
    st.sampled_from([b"id: 7", b"id", b"retry: 1", b"event: a", b"event:", b"data:", b"", b"x"])
    | st.binary(max_size=9)
    | st.text(max_size=3).map(lambda text: text.encode("utf-8", "replace")),
    max_size=6,
).map(b"\n".join)


@given(chunked(st.builds(lambda a, b, c: a + b + b"\n\n" + c, streams(), noise, streams())))
@settings(max_examples=500, deadline=None)
def test_the_sdk_reads_all_that_is_passed_on(case: tuple[bytes, list[bytes]]) -> None:
    """Every event with data, as it came, and no other: also with comments of ours in between."""
    stream, chunks = case
    events = outcome(BadEvent, lambda: read(chunks))
    if isinstance(events, BadEvent):
        return
    passed = mended(chunks)
    assert mended([stream]) == passed
    pieces = [passed[event.start : event.end] for event in events]
    if pieces and events[-1].end == len(stream):
        pieces[-1] += b"\n\n"
    seen = seen_by_the_sdk(KEEP_ALIVE.encode().join([b"", *pieces, b""]))
    said = [event for event in events if event.data is not None or event.done]
    assert [name or "" for name, _ in seen] == [event.name for event in said]
    for (_, data), event in zip(seen, said, strict=True):
        assert data.startswith("[DONE]") if event.done else json.loads(data) is not ...


@pytest.mark.parametrize(
    "stream",
    [b"id: 7\n" * 2000, b"x\n" * 2000, b": " + b"\xc3\xa9" * 10_000 + b"\n"],
    ids=["ids", "fields", "letters"],
)
def test_what_would_be_kept_of_noise_is_bounded(stream: bytes) -> None:
    for chunks in ([stream], [stream[at : at + 100] for at in range(0, len(stream), 100)]):
        with pytest.raises(BadEvent):
            read(chunks)


def test_a_line_of_ten_megabytes() -> None:
    picture = b"QUJDRA" * 1_700_000
    stream = b'data: {"b64_json":"' + picture + b'"}\n\n'
    chunks = [stream[at : at + 65_536] for at in range(0, len(stream), 65_536)]
    assert min(timed(lambda: read(chunks, 4096)) for _ in range(5)) < 0.03
    (event,) = read(chunks, 4096)
    assert event.data is not None
    assert event.data.value["b64_json"].end == 19 + len(picture)


@pytest.mark.parametrize("line_end", [b"\n", b"\r", b"\r\n"])
def test_many_lines_are_linear(line_end: bytes) -> None:
    def lines(count: int) -> Callable[[], list[Event]]:
        return lambda: read([(b": x" + line_end) * count])

    few = min(timed(lines(5_000)) for _ in range(5))
    assert min(timed(lines(40_000)) for _ in range(3)) < few * 24


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


SMALL = [
    b'{"a":1,"b":[true,null,"x\\ud800"],"a":2.5e3}',
    b' {"data":[{"b64_json":"iVBO"}]} \n',
    b'"text"',
    '{"ü":"🗼"}'.encode(),
    b"[" * 32 + b"]" * 32,
    b"1e999",
]
BROKEN = [
    b"",
    b"{",
    b'{"a":NaN}',
    b"Infinity",
    b'{"a":1}x',
    b"<html>",
    b"\xef\xbb\xbf{}",
    b'{"a":"\xff"}',
    b'{"a":"\n"}',
    b'{"a":' + b"1" * 101 + b"}",
    b"[" * 33 + b"]" * 33,
    b"[" + b"1," * 10_000 + b"1]",
]


def skim_leniently(text: bytes) -> Skimmed:
    """Raises ``BadJson``."""
    skimmer = JsonSkimmer(lenient=True)
    skimmer.feed(text)
    return skimmer.close()


@pytest.mark.parametrize("text", SMALL)
def test_what_is_small_is_parsed_as_it_is_skimmed(text: bytes) -> None:
    known, whole = skim_leniently(text), parsed(text)
    assert whole is not None
    assert (whole.value, whole.length) == (known.value, known.length)


@pytest.mark.parametrize("text", BROKEN)
def test_what_the_skimmer_refuses_is_not_parsed_either(text: bytes) -> None:
    assert parsed(text) is None
    with pytest.raises(BadJson):
        skim_leniently(text)


JSON_LIKE = st.text(alphabet='{}[]:,"\\ntfu01e-. ', max_size=40).map(str.encode)


@given(st.binary(max_size=40) | JSON_LIKE)
def test_nothing_is_parsed_that_the_skimmer_refuses(text: bytes) -> None:
    whole = parsed(text)
    try:
        value = skim_leniently(text).value
    except BadJson:
        assert whole is None
    else:
        assert whole is not None
        assert whole.value == value


def skim_strictly(text: bytes) -> Skimmed:
    """Raises ``BadJson``."""
    return skim([text], keep_bytes=4096, layout=True)


@pytest.mark.parametrize(
    "text",
    [
        b'{"model":"m","prompt":"a cat","n":1}',
        b' {\n "a" : [1, {"b": "\\n"}] ,"c":"\\ud83d\\uddfc", "" : null } \r\n',
        '{"ü":"🗼","b":"ß","c":1.5}'.encode(),
    ],
)
def test_the_fields_of_what_is_small_are_those_that_are_skimmed(text: bytes) -> None:
    known = skim_strictly(text)
    assert fields_of(text) == (known.value, known.layout)


@pytest.mark.parametrize(
    "text",
    [
        *(text for text in BROKEN),
        *(b"{}", b'"text"', b"[1]", b"1e999"),
        *(b'{"a":1,"a":2}', b'{"a":{"b":1,"b":1}}', b'{"a":1e999}', b'{"a":1,}', b'{,"a":1}'),
        *(b'{"a":"\\ud800"}', b'{"a":"\\\\\\ud800"}', b'{"a" 1}', b'{"a":}', b'{"a":1 "b":1}'),
        *(b'{"a":01}', b'{"a":"\xed\xa0\x80"}', b'{"\\u0061":1}', b'{"a":1}{"b":1}'),
    ],
)
def test_what_is_odd_about_an_object_is_the_skimmers_to_say(text: bytes) -> None:
    assert fields_of(text) is None


def check_fields(text: bytes) -> None:
    found = fields_of(text)
    try:
        known = skim_strictly(text)
    except BadJson:
        assert found is None
    else:
        assert found is None or found == (known.value, known.layout)


@given(st.binary(max_size=40) | JSON_LIKE | documents())
def test_no_fields_are_read_that_the_skimmer_reads_otherwise(text: bytes) -> None:
    check_fields(text)


@given(st.dictionaries(st.text(max_size=4), values, min_size=1, max_size=4), st.booleans())
def test_fields_lie_where_the_skimmer_finds_them(members: dict[str, Any], plain: bool) -> None:
    check_fields(json.dumps(members, ensure_ascii=plain, indent=1).encode())
