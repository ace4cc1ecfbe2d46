"""Fields put into a body, changed in it and cut out of it: as edits, every other byte stays. Pure.

One mechanism for both encodings. A member of JSON is cut with a comma, so that its neighbours are
joined by one; a form's part is cut with the boundary line before it. What is new stands first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set

from gateway.domain.call import Edit, Encoding, Json, Layout, Span, Spot
from gateway.domain.errors import InvalidRequest

_BREAKS = b"\0\r\n"


def spliced_fields(
    encoding: Encoding, layout: Layout, fields: Mapping[str, Json]
) -> tuple[Edit, ...]:
    """What makes a body say ``fields``: each is put in or changed, and cut out where it is None.
    The edits do not overlap, and are in the order of the body.

    ``fields`` are named as in ``layout``. In a form a value is text. Raises ``InvalidRequest``
    for text in which a form's delimiter could stand: behind it, everything would be the caller's.
    """
    as_json = encoding is Encoding.JSON
    edits: list[Edit] = []
    put_in: dict[str, Json] = {}
    cut: set[str] = set()
    for name, value in fields.items():
        spot = layout.fields.get(name)
        if spot is None:
            put_in |= {} if value is None else {name: value}
        elif value is None:
            cut.add(name)
        else:
            content = _json(value) if as_json else _text(name, value, layout.boundary)
            edits.append(Edit(spot.value, content))
    if put_in:
        edits.append(_put_in(put_in, layout, comma=len(layout.fields) > len(cut), as_json=as_json))
    if as_json and cut:
        edits += _members_cut(list(layout.fields.items()), cut)
    elif cut:
        edits += (Edit(layout.fields[name].whole, b"") for name in cut)
    if len(edits) > 1:
        # Of two at one place the one that takes nothing away is first.
        edits.sort(key=lambda edit: edit.span)
    return tuple(edits)


def _put_in(fields: Mapping[str, Json], layout: Layout, *, comma: bool, as_json: bool) -> Edit:
    """``comma``: members stay behind the new ones."""
    if as_json:
        content = b",".join(_json(name) + b":" + _json(value) for name, value in fields.items())
        content += b"," if comma else b""
    else:
        content = b"".join(
            b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
            % (layout.boundary, name.encode(), _text(name, value, layout.boundary))
            for name, value in fields.items()
        )
    return Edit(Span(layout.opening, layout.opening), content)


def _members_cut(members: list[tuple[str, Spot]], cut: Set[str]) -> Iterator[Edit]:
    """Each run of members that go, with the comma before it, or at the beginning the one behind."""
    at = 0
    while at < len(members):
        first = at
        while at < len(members) and members[at][0] in cut:
            at += 1
        if at == first:
            at += 1
            continue
        start, end = members[first][1].whole.start, members[at - 1][1].whole.end
        if first > 0:
            start = members[first - 1][1].whole.end
        elif at < len(members):
            end = members[at][1].whole.start
        yield Edit(Span(start, end), b"")


def _json(value: Json) -> bytes:
    return json.dumps(value).encode("ascii")


def _text(name: str, value: Json, boundary: bytes) -> bytes:
    """A value as a form writes it: ``true``, ``4``, and text without quotes.

    A delimiter begins behind a line break, and for some readers right behind a part's headers
    (Go's ``mime/multipart`` of an empty part).
    """
    text = value.encode() if isinstance(value, str) else _json(value)
    if any(byte in text for byte in _BREAKS) or text.startswith(b"--" + boundary):
        raise InvalidRequest(
            f"'{name}' must be one line, and must not begin with the form's boundary.",
            code="bad_header",
            param=name,
            reason="bad_header",
        )
    return text
