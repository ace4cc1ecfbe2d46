"""Which JSON is accepted: what the parser refuses beside what is no JSON, and where that stands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from json.scanner import make_scanner
from math import isinf
from typing import Any, cast

_MAX_INTEGER_DIGITS = 100
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# Escapes in order, so that an escaped backslash before a "u" is not mistaken; group 1 is half a
# pair.
_ESCAPE_OR_PAIR = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F])|.)"
)
# What a refusal is looked for in: strings (group 1 marks a key), brackets, numbers.
_ATOM = re.compile(
    r'"[^"\\]*(?:\\.[^"\\]*)*"(?=[ \t\r\n]*(:)?)|[\[\]{}]'
    r"|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?",
    re.DOTALL,
)


def half_pair(text: str) -> int:
    """Where the escape of one half of a surrogate pair stands alone; -1 where none does."""
    if "\\" in text and _SURROGATE.search(text) is not None:
        for escape in _ESCAPE_OR_PAIR.finditer(text):
            if escape[1] is not None:
                return escape.start()
    return -1


class Refused(Exception):
    """Valid JSON that is not accepted here; where it is, is looked for afterwards."""


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise Refused
    return members


def _float(literal: str) -> float:
    number = float(literal)
    if isinf(number):
        raise Refused
    return number


def _int(literal: str) -> int:
    if len(literal) > _MAX_INTEGER_DIGITS and len(literal.lstrip("-")) > _MAX_INTEGER_DIGITS:
        raise Refused
    return int(literal)


def _constant(_: str) -> Any:
    raise Refused


def decoder(*, lenient: bool, constant: Callable[[str], Any] = _constant) -> json.JSONDecoder:
    """``constant`` makes the value of ``NaN``, which no JSON has. What is refused is a
    ``Refused``, beside the errors of the decoder's own; ``lenient`` lets the last of two equal
    keys count, and numbers beyond a float through."""
    return json.JSONDecoder(
        object_pairs_hook=None if lenient else _members,
        parse_float=float if lenient else _float,
        parse_int=_int,
        parse_constant=constant,
    )


STRICT = decoder(lenient=False)
# What its type says that it takes is not what it does.
scan: Callable[[str, int], tuple[Any, int]] = cast(Any, make_scanner)(STRICT)
"""One value at a place of a text, and where it ends."""
scan_leniently: Callable[[str, int], tuple[Any, int]] = cast(Any, make_scanner)(
    decoder(lenient=True)
)


def find_refused(text: str) -> tuple[str, str, int, str]:
    """The first key given twice or number too large: its code, the text, where, and why.

    Only for a text in which the parser met one; each is found where it stands, not where its
    object ends.
    """
    keys: list[set[str]] = [set()]
    for atom in _ATOM.finditer(text):
        literal = atom[0]
        if literal in "{[":
            keys.append(set())
        elif literal in "}]":
            keys.pop()
        elif literal.startswith('"'):
            if atom[1] is None:
                continue
            name = json.loads(literal)
            if name in keys[-1]:
                # As JSON, because half a surrogate in a message could not be sent.
                problem = f"The key {json.dumps(name[:64])} occurs twice in one object"
                return "duplicate_key", text, atom.start(), problem
            keys[-1].add(name)
        else:
            try:
                if literal.strip("-0123456789"):
                    _float(literal)
                else:
                    _int(literal)
            except Refused:
                return "invalid_json", text, atom.start(), "A number is too large"
    return "invalid_json", text, 0, "The JSON is not accepted"
