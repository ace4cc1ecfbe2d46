"""Which part of something a request asks for, and whether it has it already (RFC 9110, 13-14)."""

from __future__ import annotations

import re

from gateway.domain.call import Span

_RANGE = re.compile(
    r"bytes[ \t]*=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*", re.ASCII | re.IGNORECASE
)
_TAG = re.compile(r'(?:W/)?("[\x21\x23-\x7e\x80-\xff]*")')


class Unsatisfiable(Exception):
    """The range begins behind the end: 416."""


def part_of(header: str, size: int) -> Span | None:
    """The bytes that a ``Range`` asks for of ``size``, ends cut to what there is.

    None where all of it is to be sent: no range, one that is not understood, or several, which
    nobody asks of a picture. Raises ``Unsatisfiable``.
    """
    found = _RANGE.fullmatch(header.strip())
    if found is None or found[1] == found[2] == "":
        return None
    if found[1] == "":
        last = int(found[2])
        if last == 0 or size == 0:
            raise Unsatisfiable
        return Span(max(0, size - last), size)
    first = int(found[1])
    if found[2] != "" and int(found[2]) < first:
        return None
    if first >= size:
        raise Unsatisfiable
    return Span(first, size if found[2] == "" else min(size, int(found[2]) + 1))


def names(if_none_match: str, tag: str) -> bool:
    """Whether an ``If-None-Match`` names an entity tag (in its quotes), weak or strong."""
    return if_none_match.strip() == "*" or tag in _TAG.findall(if_none_match)


def still(if_range: str | None, tag: str) -> bool:
    """Whether a ``Range`` holds under an ``If-Range``: there is none, or it is this strong tag. A
    date is not: nothing here says when it was made."""
    return if_range is None or if_range.strip() == tag
