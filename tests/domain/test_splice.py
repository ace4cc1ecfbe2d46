"""Any fields, put into any body, changed in it and cut out of it."""

from __future__ import annotations

import email
import email.policy
import json
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.call import Edit, Encoding, Json, Layout, Spot
from gateway.domain.errors import InvalidRequest
from gateway.domain.splice import spliced_fields
from gateway.relay.multipart import FormScanner
from gateway.relay.skim import JsonSkimmer

NAMES = st.sampled_from(["model", "size", "style", "n", "stream", 'a"b', "\u00e9", ""])
BLANKS = st.text(" \t\r\n", max_size=3)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner),
    max_leaves=4,
)
PUT_IN = VALUES.filter(lambda value: value is not None)


def applied(body: bytes, edits: Sequence[Edit]) -> bytes:
    made, at = b"", 0
    for span, content in edits:
        assert at <= span.start <= span.end <= len(body)
        made += body[at : span.start] + content
        at = span.end
    return made + body[at:]


@st.composite
def documents(draw: st.DrawFn) -> tuple[bytes, dict[str, Json]]:
    """An object with its members in any order, written with any blanks and escapes."""
    members: dict[str, Json] = draw(st.dictionaries(NAMES, VALUES))
    ascii_only = draw(st.booleans())

    def blank() -> str:
        return draw(BLANKS)

    def written(value: Json) -> str:
        return json.dumps(value, ensure_ascii=ascii_only)

    items = [
        f"{blank()}{written(name)}{blank()}:{blank()}{written(value)}{blank()}"
        for name, value in members.items()
    ]
    text = f"{blank()}{{{','.join(items) or blank()}}}{blank()}"
    return text.encode(), members


@given(
    document=documents(),
    fields=st.dictionaries(NAMES, st.none() | PUT_IN),
    keep_bytes=st.sampled_from([0, 3, 4096]),
    step=st.integers(1, 40),
)
def test_json_says_exactly_what_is_expected(
    document: tuple[bytes, dict[str, Json]], fields: dict[str, Json], keep_bytes: int, step: int
) -> None:
    body, members = document
    # Names are kept whatever is not, as in a request.
    skimmer = JsonSkimmer(keep_bytes=max(keep_bytes, 64), layout=True)
    for at in range(0, len(body), step):
        skimmer.feed(body[at : at + step])
    layout = skimmer.close().layout
    assert list(layout.fields) == list(members)
    made = applied(body, spliced_fields(Encoding.JSON, layout, fields))
    expected = {name: value for name, value in members.items() if fields.get(name, 0) is not None}
    expected |= {name: value for name, value in fields.items() if value is not None}
    assert json.loads(made) == expected
    if not fields:
        assert made == body


def test_a_long_string_is_stepped_over() -> None:
    """Where offsets in what is kept are not those of the stream."""
    long = "x" * 100
    body = json.dumps({"image": long, "style": "vivid", "mask": long, "n": 1}).encode()
    skimmer = JsonSkimmer(keep_bytes=16, layout=True)
    skimmer.feed(body)
    layout = skimmer.close().layout
    edits = spliced_fields(Encoding.JSON, layout, {"style": None, "n": 2, "new": [1]})
    assert json.loads(applied(body, edits)) == {"new": [1], "image": long, "mask": long, "n": 2}


BOUNDARY = b"x-9'(z"
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=8)
FIELDS = st.sampled_from(["model", "size", "style", "n", "stream"])


def scanned(body: bytes, step: int) -> tuple[Layout, list[tuple[str, bytes]]]:
    scanner = FormScanner(BOUNDARY, max_file_bytes=1 << 20)
    parts = [
        part for at in range(0, len(body), step) for part in scanner.feed(body[at : at + step])
    ]
    scanner.close()
    texts = {
        part.name: Spot(part.whole.start, *part.span, part.whole.end)
        for part in parts
        if not part.is_file
    }
    opening = parts[0].whole.start if parts else 0
    return Layout(opening, texts, (), BOUNDARY), [(part.name, part.content) for part in parts]


@given(
    texts=st.dictionaries(FIELDS, TEXTS),
    order=st.randoms(use_true_random=False),
    fields=st.dictionaries(FIELDS, st.none() | TEXTS | st.booleans() | st.integers()),
    preamble=st.sampled_from([b"", b"a word before\r\n"]),
    step=st.integers(1, 40),
)
def test_a_form_says_exactly_what_is_expected(
    texts: dict[str, str],
    order: random.Random,
    fields: dict[str, Json],
    preamble: bytes,
    step: int,
) -> None:
    parts = [(name, value.encode(), "") for name, value in texts.items()]
    parts += [("image[]", b"\r\n--x-9 picture", '; filename="a.png"')] * 2
    order.shuffle(parts)
    body = preamble
    for name, content, more in parts:
        head = f'Content-Disposition: form-data; name="{name}"{more}'.encode()
        body += b"--%b\r\n%b\r\n\r\n%b\r\n" % (BOUNDARY, head, content)
    body += b"--%b--\r\n" % BOUNDARY
    layout, _ = scanned(body, step)
    made = applied(body, spliced_fields(Encoding.MULTIPART, layout, fields))
    _, found = scanned(made, step)

    def text(value: Json) -> bytes:
        return value.encode() if isinstance(value, str) else json.dumps(value).encode()

    new = [(name, text(value)) for name, value in fields.items() if value is not None]
    expected = [(name, value) for name, value in new if name not in texts]
    for name, content, _ in parts:
        if name not in fields:
            expected.append((name, content))
        elif fields[name] is not None:
            expected.append((name, text(fields[name])))
    assert found == expected
    # Another reader of forms sees the same parts.
    head = b'Content-Type: multipart/form-data; boundary="%b"\r\n\r\n' % BOUNDARY
    read = email.message_from_bytes(head + made, policy=email.policy.HTTP).iter_parts()
    names = [str(part.get_param("name", header="content-disposition")) for part in read]
    assert names == [name for name, _ in expected]


@pytest.mark.parametrize("place", ["put in", "changed"])
@pytest.mark.parametrize(
    "value",
    [
        'm\r\n--x-9\'(z\r\nContent-Disposition: form-data; name="n"\r\n\r\n10',
        "\n",
        "m\r",
        "m\0",
        "--x-9'(z",
        "--x-9'(z--",
    ],
)
def test_no_value_of_a_form_can_hold_a_delimiter(value: str, place: str) -> None:
    body = b'--%b\r\nContent-Disposition: form-data; name="model"\r\n\r\nart\r\n--%b--\r\n' % (
        BOUNDARY,
        BOUNDARY,
    )
    layout, _ = scanned(body, len(body))
    name = "model" if place == "changed" else "style"
    with pytest.raises(InvalidRequest) as refused:
        spliced_fields(Encoding.MULTIPART, layout, {name: value})
    assert refused.value.param == name
    # In JSON it is a text like any other.
    assert spliced_fields(Encoding.JSON, Layout(1), {name: value})
