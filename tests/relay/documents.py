"""JSON documents, and ways to cut them, for the tests of what reads them as they pass."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from gateway.relay.skim import Hole, JsonSkimmer, Skimmed

KEEP = 24  # more than any key of a generated document takes, escaped


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


def outcome(refusal: type[Exception], judge: Callable[[], Any]) -> Any:
    """What it returned, or how it refused."""
    try:
        return judge()
    except refusal as error:
        return error


def cuts(document: bytes) -> Iterator[list[bytes]]:
    """Whole, byte by byte, and in two at every place."""
    yield [document]
    yield [document[at : at + 1] for at in range(len(document))]
    for at in range(1, len(document)):
        yield [document[:at], document[at:]]


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


def timed(work: Callable[[], Any]) -> float:
    """CPU seconds: other processes do not count."""
    begun = time.process_time()
    work()
    return time.process_time() - begun
