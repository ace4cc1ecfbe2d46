"""Events that pass, against the rules of the HTML standard and the SDK that reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from gateway.relay.events import BadEvent, Event, EventSkimmer
from tests.relay.documents import KEEP, chunked, cuts, filled, outcome, timed, values


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
