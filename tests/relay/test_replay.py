"""Answers in their other form, read back by real parsers and the SDK's own types."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import (
    ImageEditCompletedEvent,
    ImageGenCompletedEvent,
    ImagesResponse,
)

from gateway.domain.call import Operation, Span
from gateway.relay.events import EventSkimmer
from gateway.relay.replay import (
    SourceTooShort,
    Splice,
    answer,
    completed_event,
    has_event,
    length,
    pieces,
)
from gateway.relay.skim import JsonSkimmer, Skimmed

PICTURE = base64.b64encode(bytes(range(256)) * 8).decode()
USAGE = {
    "input_tokens": 50,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 50},
    "output_tokens": 1756,
    "output_tokens_details": {"image_tokens": 1756, "text_tokens": 0},
    "total_tokens": 1806,
}
ANSWER = {
    "created": 1790000000,
    "background": "opaque",
    "data": [{"b64_json": PICTURE}],
    "output_format": "png",
    "quality": "high",
    "size": "1024x1024",
    "usage": USAGE,
}


def compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def skim(document: bytes, keep_bytes: int = 100) -> Skimmed:
    skimmer = JsonSkimmer(keep_bytes=keep_bytes)
    skimmer.feed(document)
    return skimmer.close()


def only_event(stream: bytes, keep_bytes: int = 100) -> Skimmed:
    skimmer = EventSkimmer(keep_bytes=keep_bytes)
    (event,) = skimmer.feed(stream)
    assert skimmer.close() is None
    assert event.data is not None
    return event.data


def cut(splice: Splice, source: Iterable[bytes], origin: int = 0) -> list[bytes]:
    """What ``pieces`` yields from a source that never waits, without a loop."""

    async def read() -> AsyncIterator[bytes]:
        for chunk in source:
            yield chunk

    async def collect() -> list[bytes]:
        return [piece async for piece in pieces(splice, read(), origin=origin)]

    running = collect()
    try:
        running.send(None)
    except StopIteration as ended:
        return cast(list[bytes], ended.value)
    raise AssertionError("it waited")


def made(splice: Splice | None, source: bytes, size: int = 64) -> bytes:
    assert splice is not None
    chunks = (source[at : at + size] for at in range(0, len(source), size))
    result = b"".join(cut(splice, chunks))
    assert length(splice) == len(result)
    return result


def event_data(stream: bytes) -> Any:
    head, data, end = stream.split(b"\n", 2)
    assert end == b"\n"
    assert head.startswith(b"event: ")
    value = json.loads(data.removeprefix(b"data: "))
    assert head == b"event: " + value["type"].encode()
    return value


@pytest.mark.parametrize("keep_bytes", [100, 100_000])
@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        (Operation.GENERATION, "image_generation.completed"),
        (Operation.EDIT, "image_edit.completed"),
    ],
)
def test_there_and_back_is_the_same_bytes(operation: Operation, kind: str, keep_bytes: int) -> None:
    source = compact(ANSWER)
    stream = made(completed_event(operation, skim(source, keep_bytes)), source)
    data = event_data(stream)
    assert list(data) == [
        *("type", "b64_json", "background", "created_at"),
        *("output_format", "quality", "size", "usage"),
    ]
    assert (data["type"], data["b64_json"], data["usage"]) == (kind, PICTURE, USAGE)
    back = made(answer(only_event(stream, keep_bytes)), stream)
    assert back == source


def test_the_sdk_reads_both_forms() -> None:
    source = compact(ANSWER)
    for operation, event_type in (
        (Operation.GENERATION, ImageGenCompletedEvent),
        (Operation.EDIT, ImageEditCompletedEvent),
    ):
        assert has_event(skim(source))
        stream = made(completed_event(operation, skim(source)), source)
        event = event_type.model_validate(event_data(stream))
        assert event.b64_json == PICTURE
        assert event.usage.total_tokens == 1806
        assert event.created_at == 1790000000
        response = ImagesResponse.model_validate_json(
            made(answer(only_event(stream)), stream), strict=True
        )
        assert response.created == 1790000000
        assert response.data is not None
        assert response.data[0].b64_json == PICTURE
        assert response.usage is not None
        assert response.usage.output_tokens == 1756


def test_what_is_missing_stays_missing_and_what_is_more_is_kept() -> None:
    source = compact(
        {"data": [{"b64_json": PICTURE, "url": None, "revised_prompt": "ein Häuschen"}]}
    )
    data = event_data(made(completed_event(Operation.GENERATION, skim(source)), source))
    assert data == {
        "type": "image_generation.completed",
        "b64_json": PICTURE,
        "revised_prompt": "ein Häuschen",
    }
    more = {**ANSWER, "id": "img_1", "safety_identifier": "s", "extra": {"a": [1.5, None]}}
    source = compact(more)
    stream = made(completed_event(Operation.GENERATION, skim(source)), source)
    data = event_data(stream)
    assert (data["id"], data["extra"], list(data)[-1]) == ("img_1", {"a": [1.5, None]}, "usage")
    back = json.loads(made(answer(only_event(stream)), stream))
    assert back == more
    assert list(back)[-1] == "usage"


def test_a_revised_prompt_goes_back_beside_its_picture() -> None:
    document = {"created": 1, "data": [{"b64_json": PICTURE, "revised_prompt": "x"}]}
    source = compact(document)
    stream = made(completed_event(Operation.EDIT, skim(source)), source)
    assert made(answer(only_event(stream)), stream) == source


@pytest.mark.parametrize("kind", [{}, {"type": "image.completed"}], ids=["none", "another"])
def test_a_picture_without_openai_s_name_for_it_is_one(kind: dict[str, str]) -> None:
    source = compact({**kind, "b64_json": PICTURE, "created_at": 1})
    assert json.loads(made(answer(skim(source)), source)) == {
        "created": 1,
        "data": [{"b64_json": PICTURE}],
    }


def test_escaped_slashes_pass_as_they_are() -> None:
    source = compact(ANSWER).replace(b"/", b"\\/")
    stream = made(completed_event(Operation.GENERATION, skim(source)), source)
    assert PICTURE.replace("/", "\\/").encode() in stream
    assert event_data(stream)["b64_json"] == PICTURE


@pytest.mark.parametrize(
    "document",
    [
        [],
        "text",
        {},
        {"data": None},
        {"data": []},
        {"data": ["x"]},
        {"data": [{}]},
        {"data": [{"b64_json": None}]},
        {"data": [{"b64_json": ""}]},
        {"data": [{"b64_json": 7}]},
        {"data": [{"url": "https://example.com/a.png"}]},
        {"data": [{"b64_json": PICTURE, "url": "https://example.com/a.png"}]},
        {"data": [{"b64_json": PICTURE}, {"b64_json": PICTURE}]},
        {"data": [{"b64_json": PICTURE}], "error": {"message": "no"}},
        {"data": [{"b64_json": PICTURE, "revised_prompt": "long " * 100}]},
        {"data": [{"b64_json": PICTURE}], "extra": {"a": ["long " * 100]}},
    ],
)
def test_answers_that_are_no_single_event(document: Any) -> None:
    answer = skim(compact(document))
    assert completed_event(Operation.GENERATION, answer) is None
    assert not has_event(answer)


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"type": "image_generation.completed"},
        {"type": "image_generation.completed", "b64_json": None},
        {"type": "image_generation.completed", "b64_json": ""},
        {"type": "image_generation.partial_image", "b64_json": PICTURE},
        {"type": ["image_edit.completed"], "b64_json": PICTURE},
        {"type": "image_edit.completed", "b64_json": PICTURE, "error": {}},
        {"type": "image_edit.completed", "b64_json": PICTURE, "extra": "long " * 100},
        {"type": "image_edit.completed", "b64_json": PICTURE, "revised_prompt": "long " * 100},
        {"type": "image_edit.completed", "b64_json": PICTURE, "created_at": "1" * 200},
    ],
)
def test_events_that_are_no_answer(document: Any) -> None:
    assert answer(skim(compact(document))) is None


small = (
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)


@given(
    st.permutations(list(ANSWER)),
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(
            lambda name: name not in {*ANSWER, "error", "type", "b64_json", "created_at", "url"}
        ),
        small | st.lists(small, max_size=3),
        max_size=3,
    ),
    st.sampled_from(["AAAA", PICTURE[:104], PICTURE]),
    st.integers(1, 300),
)
@settings(max_examples=200, deadline=None)
def test_round_trips(order: list[str], extra: dict[str, Any], picture: str, size: int) -> None:
    extra.pop("revised_prompt", None)
    document = {name: ANSWER[name] for name in order} | extra | {"data": [{"b64_json": picture}]}
    source = json.dumps(document).encode()
    stream = made(completed_event(Operation.EDIT, skim(source)), source, size)
    data = event_data(stream)
    assert data.pop("type") == "image_edit.completed"
    assert data.pop("b64_json") == picture
    assert data.pop("created_at") == document["created"]
    rest = {name: value for name, value in document.items() if name not in ("created", "data")}
    assert data == rest
    assert json.loads(made(answer(only_event(stream)), stream, size)) == document


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_pieces(size: int) -> None:
    source = bytes(range(65, 91))
    chunks = [source[at : at + size] for at in range(0, len(source), size)]
    for splice in (
        (),
        (b"", b"only literals"),
        (Span(0, 26),),
        (b"<", Span(2, 5), b"|", Span(5, 6), Span(6, 6), Span(10, 26), b">"),
        (Span(3, 3), b"x", Span(25, 26)),
    ):
        expected = b"".join(
            source[part.start : part.end] if isinstance(part, Span) else part for part in splice
        )
        assert b"".join(cut(splice, chunks)) == expected
        assert length(splice) == len(expected)


def test_a_source_that_is_too_short() -> None:
    with pytest.raises(SourceTooShort):
        cut((b"<", Span(0, 5)), [b"abc", b"d"])


def test_spans_must_ascend() -> None:
    for splice in ((Span(5, 6), Span(0, 1)), (Span(5, 4),)):
        with pytest.raises(ValueError, match="ascend"):
            cut(splice, [b"abcdefg"])
    with pytest.raises(ValueError, match="ascend"):
        cut((Span(5, 6),), [b"abcdefg"], origin=6)


def test_a_source_that_begins_later_in_the_stream() -> None:
    assert cut((Span(102, 105),), [b"ab", b"cde", b"f"], origin=100) == [b"cde"]


def test_no_more_is_read_than_needed_and_whole_chunks_are_not_copied() -> None:
    chunks = iter([b"a" * 10, b"b" * 10, b"c" * 10])
    written = cut((Span(10, 20), b"!"), chunks)
    assert written == [b"b" * 10, b"!"]
    assert list(chunks) == [b"c" * 10]
    whole = b"x" * 1000
    (piece,) = cut((Span(0, 1000),), [whole])
    assert piece is whole


def test_half_a_surrogate_pair_and_a_number_beyond_a_float() -> None:
    """Both are let through in an answer that was paid for; only the number has no other form."""

    def lenient(text: bytes) -> Skimmed:
        skimmer = JsonSkimmer(keep_bytes=100, lenient=True)
        skimmer.feed(text)
        return skimmer.close()

    picture = PICTURE.encode()
    cut_prompt = b'{"data":[{"b64_json":"' + picture + b'","revised_prompt":"half \\ud83d"}]}'
    stream = made(completed_event(Operation.GENERATION, lenient(cut_prompt)), cut_prompt)
    assert b'"revised_prompt":"half \\ud83d"' in stream
    beyond = b'{"created":1e999,"data":[{"b64_json":"' + picture + b'"}]}'
    assert completed_event(Operation.GENERATION, lenient(beyond)) is None
    assert not has_event(lenient(beyond))
