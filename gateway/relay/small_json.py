"""JSON of a few KB that is there whole, read in one walk, as ``skim.py`` would read it.

What is odd about a text is left to the skimmer, which says what is wrong with it: nothing here
raises.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gateway.domain.call import Layout, Spot
from gateway.relay.json_rules import Refused, half_pair, scan, scan_leniently
from gateway.relay.skim import Skimmed

_BLANK = " \t\r\n"
# The names of an object's members up to their values, the second one also the object's end.
_NAME = r'[ \t\r\n]*"([^"\\\x00-\x1f]*)"[ \t\r\n]*:[ \t\r\n]*'
_FIRST_NAME = re.compile(r"[ \t\r\n]*\{" + _NAME)
_NEXT_NAME = re.compile(rf"[ \t\r\n]*(?:,{_NAME}|\}}[ \t\r\n]*\Z)")


def parsed(text: bytes, *, max_depth: int = 32, max_values: int = 10_000) -> Skimmed | None:
    """A whole document, read leniently, as the skimmer would read it where no string of it is too
    long to keep; without ``spans``. None where that is not surely so: then the skimmer says what
    is wrong with it. Six times cheaper for an answer of 1.5 KB."""
    if not _is_modest(text, max_depth, max_values):
        return None
    try:
        said = text.decode().strip(_BLANK)
        value, end = scan_leniently(said, 0)
    except (ValueError, StopIteration, Refused):
        return None
    return Skimmed(value, {}, len(text)) if end == len(said) else None


def _is_modest(text: bytes, max_depth: int, max_values: int) -> bool:
    """Whether a text surely nests no deeper, and has no more values. Brackets and commas in strings
    are counted too, so there are no more than these."""
    opened = text.count(b"{") + text.count(b"[")
    # A value takes a byte or more: of a short text nothing is to be counted.
    modest = len(text) <= max_values or opened + text.count(b",") <= max_values
    return modest and opened <= max_depth


def fields_of(
    text: bytes, *, max_depth: int = 32, max_values: int = 10_000
) -> tuple[dict[str, Any], Layout] | None:
    """The members of an object, read strictly, as the skimmer would read them where no string is
    too long to keep, and where they lie. None where that is not surely so, and for a name with an
    escape in it: then the skimmer reads it, or says what is wrong. A quarter of what that takes."""
    if not _is_modest(text, max_depth, max_values):
        return None
    values: dict[str, Any] = {}
    spots: dict[str, Spot] = {}
    try:
        said = text.decode()
        if half_pair(said) >= 0:
            return None
        found = _FIRST_NAME.match(said)
        while found is not None and (name := found[1]) is not None:
            if name in values:
                return None
            start = found.end()
            values[name], end = scan(said, start)
            spots[name] = Spot(found.start(1) - 1, start, end, end)
            found = _NEXT_NAME.match(said, end)
    except (ValueError, StopIteration, Refused):
        return None
    if found is None:
        return None
    if not said.isascii():
        spots = _in_bytes(said, spots)
    return values, Layout(text.index(b"{") + 1, spots)


def _in_bytes(said: str, spots: Mapping[str, Spot]) -> dict[str, Spot]:
    """Places that are counted in characters, counted in bytes."""
    moved: dict[str, Spot] = {}
    at = ahead = 0
    for name, spot in spots.items():
        places = []
        for place in (spot.start, spot.value_start, spot.value_end):
            ahead += len(said[at:place].encode()) - (place - at)
            at = place
            places.append(place + ahead)
        start, value_start, end = places
        moved[name] = Spot(start, value_start, end, end)
    return moved
