"""What is small is read in one walk as the skimmer reads it, or left to the skimmer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.relay.skim import BadJson, JsonSkimmer, Skimmed
from gateway.relay.small_json import fields_of, parsed
from tests.relay.documents import documents, skim, values

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
