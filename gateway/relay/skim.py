"""JSON and server-sent events, watched as they pass: the small members kept, the long strings not.

A picture is one JSON string of megabytes. The skimmer jumps over such a string, remembers where
it lay (a ``Hole``) and copies everything else, a few hundred bytes, to a *reduced text* in which
the bare word ``NaN`` stands for each hole. Clients and upstreams cannot write that word, because
the scanner refuses every letter that JSON does not use outside strings. At the end the standard
library's C parser reads the reduced text, so the whole grammar is checked by a real parser while
no byte of a picture is copied or decoded.

Nothing here waits, reads a clock or does input or output: bytes go in, values come out. All
offsets are byte offsets in the stream the caller feeds, counted from its first byte.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from json.scanner import make_scanner
from math import isinf
from typing import Any, cast

from gateway.domain.call import Edit, Layout, Span, Spot
from gateway.domain.record import record

_QUOTE, _COLON, _COMMA, _LF, _CR = b'":,\n\r'
_OPENING, _CLOSING = b"[{", b"]}"
_BLANK = b" \t\r\n"
_JSON_BLANK = _BLANK.decode()
_MARKER = b"NaN"
_MAX_INTEGER_DIGITS = 100
_MAX_NAME_BYTES = 1024
_MAX_MENDS = 1000
_MAX_ODD_BYTES = 16 * 1024
_NO_LAYOUT = Layout()
_ASCII = bytes(range(128))
_TO_ASCII = _ASCII + b"?" * 128
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

# Outside strings: a whole short string, the opening quote of any other, a structure byte, or a
# byte that no JSON text has there (which is how NaN, Infinity, HTML and a BOM are refused early).
_TOKEN = re.compile(
    rb'"(?:[^"\\]{0,64}+")?|[\[\]{}:,]|[^ \t\r\n0-9+\-.eEtrufalsn]',
)
# Inside a string from its first backslash on: up to the closing quote, a wrong escape, or the end.
# Some escapes at a time, because the matcher remembers each. (A possessive group would not, but
# loses its place in CPython before 3.11.5.)
_ESCAPED = re.compile(rb'[^"\\]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\]*+){0,256}')
# An escape that the end of a chunk cut in two.
_CUT_ESCAPE = re.compile(rb"\\(?:u[0-9a-fA-F]{0,3})?")
# The names of an object's members up to their values, the second one also the object's end.
_NAME = r'[ \t\r\n]*"([^"\\\x00-\x1f]*)"[ \t\r\n]*:[ \t\r\n]*'
_FIRST_NAME = re.compile(r"[ \t\r\n]*\{" + _NAME)
_NEXT_NAME = re.compile(rf"[ \t\r\n]*(?:,{_NAME}|\}}[ \t\r\n]*\Z)")
_CONTROL = re.compile(rb"[\x00-\x1f]")
# Maps every control character to another byte: translate() then returns its argument itself,
# without a copy, exactly when there was none. Six times faster than a regex.
_MARK_CONTROLS = bytes(range(1, 33)) + bytes(range(32, 256))
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


class BadJson(Exception):
    """Not the JSON that is accepted here. ``str(error)`` is a sentence for the client.

    ``code`` is ``invalid_json``, ``duplicate_key``, ``json_too_deep``, ``json_too_large`` or
    ``invalid_unicode``; ``offset`` is where, in bytes of the stream.
    """

    def __init__(self, code: str, offset: int, problem: str) -> None:
        super().__init__(f"{problem}, at byte {offset}.")
        self.code = code
        self.offset = offset


@record
class Hole:
    """A string too long to keep: where it lies and what is known of it.

    ``start`` and ``end`` bound its raw content in the stream, quotes excluded. ``head`` is the
    first raw bytes of it, escapes as they came. ``digest`` is the hex SHA-256 of the raw content,
    empty unless digests were asked for. ``escaped`` says whether a backslash occurs in it.
    ``base64`` is True only if that was asked for and the string (after the first comma, where it
    starts with ``data:``) is strict base64 with correct padding, without any escape; ``padding``
    then says with how many ``=`` it ends.
    """

    start: int
    end: int
    head: bytes
    digest: str
    escaped: bool
    base64: bool
    padding: int = 0


@record
class Skimmed:
    """A parsed document; a ``Hole`` stands in ``value`` where a long string was.

    ``spans`` gives, for each member of a top-level object, where its raw value lies in the stream
    (a string's quotes included). ``layout`` has the same members with their names, for who wants
    to edit them. ``length`` is the document's size in bytes.
    """

    value: Any
    spans: Mapping[str, Span]
    length: int
    layout: Layout = _NO_LAYOUT


class JsonSkimmer:
    """Reads one JSON document in chunks.

    Strings of more than ``keep_bytes`` raw bytes become holes. Brackets may nest ``max_depth``
    deep, and there may be some ``max_values`` values. ``max_kept`` bounds, in bytes, what is kept
    in memory: the reduced text and the heads of the holes. ``check_controls`` also refuses raw
    control characters inside holes, at about 0.4 ms per megabyte; kept strings are always checked.
    Lone surrogates are refused in kept strings and keys, not in holes. ``origin`` is the stream's
    offset of the first byte that will be fed. ``lenient`` is for answers that were paid for: keys
    given twice (the last one counts), lone surrogates and numbers beyond a float are let through,
    as the SDKs let them. ``layout``: where whole members lie is told too.

    After a ``BadJson`` the skimmer is spent.
    """

    __slots__ = (
        "_base64",
        "_carry",
        "_check_base64",
        "_check_controls",
        "_cut_at",
        "_cut_by",
        "_decoder",
        "_depth",
        "_digests",
        "_escaped",
        "_hash",
        "_head",
        "_heads",
        "_holes",
        "_inside",
        "_keep",
        "_layout",
        "_length",
        "_lenient",
        "_max_depth",
        "_max_kept",
        "_max_values",
        "_members",
        "_position",
        "_size",
        "_split_character",
        "_string_at",
        "_text",
        "_value_at",
        "_values",
    )

    def __init__(
        self,
        *,
        keep_bytes: int = 4096,
        max_depth: int = 32,
        digests: bool = False,
        check_base64: bool = False,
        check_controls: bool = False,
        max_kept: int = 1 << 20,
        max_values: int = 10_000,
        origin: int = 0,
        lenient: bool = False,
        layout: bool = False,
    ) -> None:
        if not 1 <= max_depth <= 500:
            # The C parser recurses; 500 stays far from the interpreter's limit.
            raise ValueError("max_depth must be from 1 to 500")
        self._keep = keep_bytes
        self._max_depth = max_depth
        self._digests = digests
        self._check_base64 = check_base64
        self._check_controls = check_controls
        self._max_kept = max_kept
        self._max_values = max_values
        self._values = 0
        self._lenient = lenient
        self._layout = layout
        self._position = origin  # stream offset of the next byte to look at
        self._length = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._split_character = False
        self._text = bytearray()
        # From reduced offset _cut_at[i] on, the stream is _cut_by[i] bytes ahead.
        self._cut_at = [0]
        self._cut_by = [origin]
        self._depth = 0
        self._value_at = -1  # reduced offset after the last colon of the top-level object
        self._members: list[tuple[int, int]] = []
        self._holes: list[Hole] = []
        self._heads = 0
        # The string that the end of the last chunk cut.
        self._inside = False
        self._carry = b""
        self._string_at = 0
        self._size = 0
        self._head = bytearray()
        self._escaped = False
        self._hash: hashlib._Hash | None = None
        self._base64: _Base64Watch | None = None

    def feed(self, chunk: bytes) -> None:
        """Takes the next bytes, cut anywhere. Raises ``BadJson`` as early as it is known."""
        if not chunk:
            return
        if self._inside and self._passes(chunk):
            return
        if self._split_character or not chunk.isascii():
            self._check_utf8(chunk)
        self._length += len(chunk)
        if self._carry:
            chunk = self._carry + chunk
            self._carry = b""
        size = len(chunk)
        at = 0
        if self._inside:
            at = self._find_end(chunk, 0)
            self._absorb(chunk, 0, at)
            if at < size and chunk[at] == _QUOTE:
                at += 1
                self._end_string(at)
            else:
                at = size
        if at < size:
            self._read_structure(chunk, at)
        self._position += size - len(self._carry)
        self._check_size()

    def _passes(self, chunk: bytes) -> bool:
        """Whether the chunk lies in the middle of a hole of which nothing more is to be known: of
        the picture of an answer it is nearly every one. Beside three looks at memory speed that
        is 0.7 us a chunk, not 1.6 (and 2 ms less for a picture that comes in crumbs of 1 KB)."""
        size = len(chunk)
        if (
            self._size <= self._keep
            or self._carry
            or self._split_character
            or self._hash is not None
            or self._base64 is not None
            or self._check_controls
            or chunk.find(b'"') >= 0
            or chunk.find(b"\\") >= 0
            or not chunk.isascii()
        ):
            return False
        self._size += size
        self._length += size
        self._position += size
        return True

    def skip(self, count: int) -> None:
        """Says that the next ``count`` bytes of the stream are no part of the document.

        Only between tokens: raises ``BadJson`` inside a string.
        """
        if self._inside:
            raise BadJson("invalid_json", self._position, "A string is broken by a line end")
        self._position += count
        self._cut(self._position)

    def close(self) -> Skimmed:
        """The document. Raises ``BadJson`` when it is incomplete or invalid."""
        if self._inside:
            raise BadJson("invalid_json", self._string_at - 1, "A string has no end")
        if not self._text.strip(_BLANK):
            raise BadJson("invalid_json", self._position, "There is no JSON, only an empty text")
        text = self._text.decode()
        try:
            value = self._decoder_of_text().decode(text)
        except json.JSONDecodeError as error:
            problem = error.msg.removesuffix(" starting at").removesuffix(" at")
            if problem.startswith("Expecting property name") and text.startswith("NaN", error.pos):
                problem = "A key is too long"
            raise self._bad("invalid_json", text, error.pos, problem) from None
        except _Refused:
            raise self._bad(*_find_refused(text)) from None
        half = -1 if self._lenient else _half_pair(text)
        if half >= 0:
            problem = "A string holds half of a surrogate pair"
            raise self._bad("invalid_unicode", text, half, problem)
        spans: dict[str, Span] = {}
        if isinstance(value, dict) and len(value) == len(self._members):
            spans = dict(zip(value, self._spans(self._members), strict=True))
        told = self._layout and isinstance(value, dict) and len(spans) == len(self._members)
        layout = self._laid_out(spans) if told else _NO_LAYOUT
        return Skimmed(value, spans, self._length, layout)

    def _laid_out(self, spans: Mapping[str, Span]) -> Layout:
        """A member's name begins behind the comma of the one before it."""
        before = self._text.index(b"{") + 1
        opening = self._to_stream(before)
        places: list[tuple[int, int]] = []
        for start, end in self._members:
            places.append((before, start))
            before = end + 1
        fields: dict[str, Spot] = {}
        for (name, value), key in zip(spans.items(), self._spans(places), strict=True):
            fields[name] = Spot(key.start, value.start, value.end, value.end)
        return Layout(opening, fields)

    def _decoder_of_text(self) -> json.JSONDecoder:
        """A constant stands for a hole; without any, and strict, it is the same for all."""
        if not (self._holes or self._lenient):
            return _STRICT
        holes = iter(self._holes)
        return json.JSONDecoder(
            object_pairs_hook=dict if self._lenient else _members,
            parse_float=float if self._lenient else _float,
            parse_int=_int,
            parse_constant=lambda _: next(holes),
        )

    def _read_structure(self, chunk: bytes, at: int) -> None:
        """Reads from ``at``, outside any string, to the end of the chunk."""
        size = len(chunk)
        text = self._text
        depth = self._depth
        run = at  # chunk[run:] is not copied to the reduced text yet
        searching = True
        while searching:
            searching = False
            for token in _TOKEN.finditer(chunk, at):
                at = token.start()
                byte = chunk[at]
                if byte == _QUOTE:
                    if 2 <= token.end() - at <= self._keep + 2:
                        continue
                    self._escaped = False
                    end = self._find_end(chunk, at + 1)
                    closed = end < size and chunk[end] == _QUOTE
                    if closed and end - at - 1 <= self._keep:
                        at = end + 1
                    else:
                        text += chunk[run:at]
                        self._begin_string(self._position + at + 1)
                        self._absorb(chunk, at + 1, end)
                        at = run = end + 1 if closed else size
                        if closed:
                            self._end_string(at)
                    searching = at < size
                    break
                if byte in _OPENING:
                    depth += 1
                    self._count_value(at)
                    if depth > self._max_depth:
                        problem = f"The JSON nests more than {self._max_depth} deep"
                        raise BadJson("json_too_deep", self._position + at, problem)
                elif byte in _CLOSING or byte == _COMMA:
                    if byte == _COMMA:
                        self._count_value(at)
                    if depth == 1 and self._value_at >= 0:
                        self._members.append((self._value_at, len(text) + at - run))
                        self._value_at = -1
                    if byte != _COMMA:
                        depth -= 1
                        if depth < 0:
                            problem = "A bracket closes nothing"
                            raise BadJson("invalid_json", self._position + at, problem)
                elif byte == _COLON:
                    if depth == 1:
                        self._value_at = len(text) + at - run + 1
                else:
                    problem = "There is a byte that JSON does not have outside strings"
                    raise BadJson("invalid_json", self._position + at, problem)
        text += chunk[run:]
        self._depth = depth

    def _count_value(self, at: int) -> None:
        """Parsing costs by the value, on the event loop: a request has dozens, not thousands."""
        self._values += 1
        if self._values > self._max_values:
            problem = f"The JSON has more than {self._max_values} values"
            raise BadJson("json_too_large", self._position + at, problem)

    def _find_end(self, chunk: bytes, start: int) -> int:
        """The index of the quote that ends the string, or of where the chunk's part of it ends.

        An escape that the chunk's end cuts is put aside for the next chunk.
        """
        size = len(chunk)
        end = chunk.find(b'"', start)
        if end < 0:
            end = size
        slash = chunk.find(b"\\", start, end)
        if slash < 0:
            return end
        self._escaped = True
        end = slash
        while (matched := _ESCAPED.match(chunk, end)) is not None and matched.end() > end:
            end = matched.end()
        if end < size and chunk[end] != _QUOTE:
            if _CUT_ESCAPE.fullmatch(chunk, end) is None:
                problem = "A string holds a wrong escape"
                raise BadJson("invalid_json", self._position + end, problem)
            self._carry = chunk[end:]
        return end

    def _begin_string(self, start: int) -> None:
        self._inside = True
        self._string_at = start
        self._size = 0
        self._head = bytearray()
        self._hash = None
        self._base64 = None

    def _absorb(self, chunk: bytes, start: int, end: int) -> None:
        """Takes a part of the open string; beyond ``keep_bytes`` it becomes a hole, and no more of
        it is copied than somebody is to look at."""
        size, head = self._size, self._head
        self._size += end - start
        if self._size <= self._keep:
            head += chunk[start:end]
            return
        if size <= self._keep:
            known = bytes(head)
            if self._digests:
                self._hash = hashlib.sha256()
            if self._check_base64:
                self._base64 = _Base64Watch()
            self._watch(known, self._string_at)
        head += chunk[start : min(end, start + self._keep - len(head))]
        if self._digests or self._check_base64 or self._check_controls:
            self._watch(chunk[start:end], self._string_at + size)

    def _watch(self, part: bytes, start: int) -> None:
        if self._hash is not None:
            self._hash.update(part)
        if self._base64 is not None:
            self._base64.feed(part)
        if self._check_controls and part.translate(_MARK_CONTROLS) is not part:
            control = _CONTROL.search(part)
            if control is not None:
                problem = "A string holds a raw control character"
                raise BadJson("invalid_json", start + control.start(), problem)

    def _end_string(self, after: int) -> None:
        """Closes the open string; ``after`` is the chunk's index behind its closing quote."""
        self._inside = False
        if self._size <= self._keep:
            self._text += b'"' + self._head + b'"'
            return
        self._holes.append(
            Hole(
                start=self._string_at,
                end=self._string_at + self._size,
                head=bytes(self._head),
                digest="" if self._hash is None else self._hash.hexdigest(),
                escaped=self._escaped,
                base64=self._base64 is not None and self._base64.valid(),
                padding=0 if self._base64 is None else self._base64.padding,
            )
        )
        self._heads += len(self._head)
        self._text += _MARKER
        self._cut(self._position + after)
        self._check_size()

    def _cut(self, position: int) -> None:
        """Says that the end of the reduced text now is ``position`` in the stream."""
        self._cut_at.append(len(self._text))
        self._cut_by.append(position - len(self._text))

    def _to_stream(self, reduced: int) -> int:
        if len(self._cut_at) == 1:
            return reduced + self._cut_by[0]
        return reduced + self._cut_by[bisect_right(self._cut_at, reduced) - 1]

    def _spans(self, places: Sequence[tuple[int, int]]) -> list[Span]:
        """Values' places in the stream, from what lies between their colons and commas."""
        text = self._text
        # Nearly every request is as it came: one look instead of two calls for each.
        ahead = self._cut_by[0] if len(self._cut_at) == 1 else None
        found: list[Span] = []
        for start, end in places:
            while start < end and text[start] in _BLANK:
                start += 1
            while start < end and text[end - 1] in _BLANK:
                end -= 1
            if ahead is None:
                found.append(Span(self._to_stream(start), self._to_stream(end)))
            else:
                found.append(Span(start + ahead, end + ahead))
        return found

    def _check_size(self) -> None:
        if len(self._text) + self._heads > self._max_kept:
            problem = f"The JSON holds more than {self._max_kept} bytes beside its long strings"
            raise BadJson("json_too_large", self._position, problem)

    def _check_utf8(self, chunk: bytes) -> None:
        buffered = len(self._decoder.getstate()[0])
        try:
            self._decoder.decode(chunk)
        except UnicodeDecodeError as error:
            offset = self._position + len(self._carry) - buffered + error.start
            raise BadJson("invalid_json", offset, "The text is not UTF-8") from None
        self._split_character = bool(self._decoder.getstate()[0])

    def _bad(self, code: str, text: str, index: int, problem: str) -> BadJson:
        """The error at a character of the reduced text, with its offset in the stream."""
        return BadJson(code, self._to_stream(len(text[:index].encode())), problem)


class _Base64Watch:
    """Whether a string, seen in parts, is base64 or a data URL of base64."""

    __slots__ = ("_characters", "_good", "_payload", "_start", "padding")

    def __init__(self) -> None:
        self._start = b""
        self._payload = False
        self._characters = 0
        self.padding = 0
        self._good = True

    def feed(self, part: bytes) -> None:
        if not self._good:
            return
        if not self._payload:
            # The few bytes before a data URL's comma; a long part is copied at most once.
            part = self._start + part
            self._start = b""
            if b"data:".startswith(part[:5]):
                comma = part.find(b",")
                if comma < 0:
                    self._start = part[:5]
                    return
                part = part[comma + 1 :]
            self._payload = True
        rest = part.translate(None, _BASE64)
        if rest.strip(b"=") or not part.endswith(rest) or (self.padding and rest != part):
            self._good = False
        self.padding += len(rest)
        self._characters += len(part)

    def valid(self) -> bool:
        whole = self._characters > 0 and self._characters % 4 == 0
        return self._good and self._payload and whole and self.padding <= 2


def parsed(text: bytes, *, max_depth: int = 32, max_values: int = 10_000) -> Skimmed | None:
    """A whole document, read leniently, as the skimmer would read it where no string of it is too
    long to keep; without ``spans``. None where that is not surely so: then the skimmer says what
    is wrong with it. Six times cheaper for an answer of 1.5 KB."""
    if not _is_modest(text, max_depth, max_values):
        return None
    try:
        said = text.decode().strip(_JSON_BLANK)
        value, end = _SCAN_LENIENT(said, 0)
    except (ValueError, StopIteration, _Refused):
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
        if _half_pair(said) >= 0:
            return None
        found = _FIRST_NAME.match(said)
        while found is not None and (name := found[1]) is not None:
            if name in values:
                return None
            start = found.end()
            values[name], end = _SCAN(said, start)
            spots[name] = Spot(found.start(1) - 1, start, end, end)
            found = _NEXT_NAME.match(said, end)
    except (ValueError, StopIteration, _Refused):
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


def _half_pair(text: str) -> int:
    """Where the escape of one half of a surrogate pair stands alone; -1 where none does."""
    if "\\" in text and _SURROGATE.search(text) is not None:
        for escape in _ESCAPE_OR_PAIR.finditer(text):
            if escape[1] is not None:
                return escape.start()
    return -1


class _Refused(Exception):
    """Valid JSON that is not accepted here; where it is, is looked for afterwards."""


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _Refused
    return members


def _float(literal: str) -> float:
    number = float(literal)
    if isinf(number):
        raise _Refused
    return number


def _int(literal: str) -> int:
    if len(literal) > _MAX_INTEGER_DIGITS and len(literal.lstrip("-")) > _MAX_INTEGER_DIGITS:
        raise _Refused
    return int(literal)


def _constant(_: str) -> Any:
    raise _Refused


_STRICT = json.JSONDecoder(
    object_pairs_hook=_members, parse_float=_float, parse_int=_int, parse_constant=_constant
)
# What its type says that it takes is not what it does.
_SCAN: Callable[[str, int], tuple[Any, int]] = cast(Any, make_scanner)(_STRICT)
"""One value at a place of a text, and where it ends."""
_LENIENT = json.JSONDecoder(parse_float=float, parse_int=_int, parse_constant=_constant)
_SCAN_LENIENT: Callable[[str, int], tuple[Any, int]] = cast(Any, make_scanner)(_LENIENT)


def _find_refused(text: str) -> tuple[str, str, int, str]:
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
            except _Refused:
                return "invalid_json", text, atom.start(), "A number is too large"
    return "invalid_json", text, 0, "The JSON is not accepted"


@record
class Event:
    """One server-sent event.

    ``name`` comes from its ``event:`` line, empty without one. ``data`` is the JSON of its
    ``data:`` lines, with every offset counted in the stream; None for ``[DONE]`` (then ``done``
    is True), for comments alone and for empty data. ``start`` and ``end`` are its bytes in the
    stream, its blank line included; each event starts where the one before ended.

    ``mends`` are bytes to write over as many of its own, so that no SDK stumbles over what says
    nothing (contract 4.7): a line without meaning becomes a comment.
    """

    name: str
    data: Skimmed | None
    done: bool
    start: int
    end: int
    mends: tuple[Edit, ...] = ()


class BadEvent(Exception):
    """A frame that is no event of JSON. ``offset`` is where, in bytes of the stream."""

    def __init__(self, offset: int, problem: str) -> None:
        super().__init__(problem)
        self.offset = offset


class EventSkimmer:
    """Reads a stream of server-sent events in chunks.

    Lines may end in LF, CRLF or CR, and chunks may be cut anywhere. Fields other than ``data``
    and ``event`` are passed over. ``keep_bytes``, ``lenient``, ``max_kept`` and ``max_values``
    (of one event) are as for ``JsonSkimmer``.

    What Python's SDK cannot read is mended: it takes a block without data for an event (a lone
    ``retry:``, a name alone), after an ``id:`` every later comment too, and it reads no line that
    is not UTF-8. All of them mean nothing here, because nobody reconnects to a POST.
    """

    __slots__ = (
        "_bare_cr",
        "_bare_lines",
        "_begun",
        "_data_at",
        "_data_end",
        "_done",
        "_eat_lf",
        "_error",
        "_field",
        "_held_cr",
        "_keep",
        "_lenient",
        "_line",
        "_line_at",
        "_max_kept",
        "_max_values",
        "_mends",
        "_name",
        "_odd",
        "_odd_at",
        "_position",
        "_skimmer",
        "_start",
        "_waiting",
    )

    def __init__(
        self,
        *,
        keep_bytes: int = 4096,
        lenient: bool = False,
        max_kept: int = 1 << 20,
        max_values: int = 10_000,
    ) -> None:
        self._keep = keep_bytes
        self._lenient = lenient
        self._max_kept = max_kept
        self._max_values = max_values
        self._position = 0
        self._error: BadEvent | None = None
        self._bare_cr = False  # the last CR stood alone, so lines end in CR
        self._eat_lf = False  # a line ended at CR; if LF follows, it belongs to it
        self._held_cr = False  # the chunk ended in a CR that may be half of a CRLF
        self._begin_line(0)
        self._begin_event(0)

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that this chunk completes.

        Raises ``BadEvent`` for a frame whose data is neither JSON nor ``[DONE]``. Where good
        events came before it in the same chunk, they are returned and the next call raises.
        """
        events: list[Event] = []
        if self._error is None:
            try:
                self._read(chunk, events)
            except BadEvent as error:
                self._error = error
        if self._error is not None and not events:
            raise self._error
        return events

    def close(self) -> Event | None:
        """The last event where its blank line is missing; None when nothing is pending.

        Raises ``BadEvent`` when it is incomplete.
        """
        if self._error is not None:
            raise self._error
        if self._held_cr or self._line or self._field:
            self._held_cr = False
            event = self._end_line(self._position)
            if event is not None:
                return event
        if not self._begun:
            return None
        complete = self._begun == "comment"
        event = self._end_event(self._position)
        if event.data is None and not event.done and not complete:
            raise BadEvent(event.start, "The stream ends inside an event.")
        return event

    def _passes(self, chunk: bytes) -> bool:
        """Whether the chunk lies in the middle of a line of data: of a stream of pictures nearly
        every one. It is read then, and nothing is to be said of its lines."""
        if (
            self._field != "data"
            or self._skimmer is None
            or self._held_cr
            or chunk.find(b"\n") >= 0
            or chunk.find(b"\r") >= 0
        ):
            return False
        self._position += len(chunk)
        self._data_end = self._position
        self._skim(chunk)
        return True

    def _read(self, chunk: bytes, events: list[Event]) -> None:
        if self._passes(chunk):
            return
        size = len(chunk)
        base = self._position
        self._position += size
        at = 0
        lf = cr = -1
        while at < size:
            if self._eat_lf:
                self._eat_lf = False
                if chunk[at] == _LF:
                    self._bare_cr = False
                    at += 1
                    self._begin_line(base + at)
                    continue
            if self._held_cr:
                self._held_cr = False
                if chunk[at] == _LF:
                    at += 1
                else:
                    self._bare_cr = True
                self._finish(base + at, events)
                continue
            # Each position is looked for again only once it has been passed: linear, whatever
            # the line ends are.
            if lf < at:
                lf = chunk.find(b"\n", at)
                lf = size if lf < 0 else lf
            if cr < at:
                cr = chunk.find(b"\r", at)
                cr = size if cr < 0 else cr
            end = min(lf, cr)
            if end > at:
                self._take(chunk[at:end], base + at)
            if end == size:
                return
            at = end + 1
            if end == cr:
                if self._bare_cr:
                    self._eat_lf = True
                elif at == size:
                    self._held_cr = True
                    return
                elif chunk[at] == _LF:
                    at += 1
                else:
                    self._bare_cr = True
            self._finish(base + at, events)

    def _finish(self, end: int, events: list[Event]) -> None:
        event = self._end_line(end)
        if event is not None:
            events.append(event)

    def _begin_line(self, position: int) -> None:
        self._line_at = position
        self._line = b""
        self._field = ""
        self._odd = bytearray()  # what is perhaps not UTF-8 outside of data
        self._odd_at = 0

    def _begin_event(self, position: int) -> None:
        self._start = position
        self._begun = ""  # what came so far: "", "comment" or "field"
        self._name = ""
        self._done = False
        self._skimmer: JsonSkimmer | None = None
        self._waiting = b""  # data that may still turn out to be [DONE]
        self._bare_lines: list[int] = []  # where fields begin, as long as there is no data
        self._mends: list[Edit] = []
        self._data_at = 0
        self._data_end = 0

    def _take(self, part: bytes, position: int) -> None:
        """Takes a part of the current line, without its end."""
        if self._field == "data":
            self._take_data(part, position)
            return
        if self._field == "":
            self._line += part
            # Six bytes tell the field apart, and whether a space follows "data:".
            if len(self._line) >= 6:
                self._open_field(position + len(part))
        elif self._field == "event" and len(self._line) < _MAX_NAME_BYTES:
            self._line += part
        if self._field != "data" and (self._odd or not part.isascii()):
            if not self._odd:
                odd = part.lstrip(_ASCII)
                self._odd_at = position + len(part) - len(odd)
                part = odd
            self._odd += part
            if len(self._odd) > _MAX_ODD_BYTES:
                raise BadEvent(position, "A long line outside of data is not ASCII.")

    def _open_field(self, position: int) -> None:
        """Decides what the line is, from its beginning; ``position`` is where that ends."""
        line = self._line
        if line.startswith(b":"):
            self._field = "comment"
            self._begun = self._begun or "comment"
        elif line.startswith(b"data:"):
            self._field = "data"
            value = line[6:] if line[5:6] == b" " else line[5:]
            self._begun = "field"
            self._open_data(position - len(value))
            self._take_data(value, position - len(value))
        else:
            self._field = "event" if line.startswith(b"event:") else "other"
            self._begun = "field"
            if line.startswith(b"id:"):
                self._mends.append(_comment(self._line_at))
        if self._field != "comment" and not self._has_data():
            self._bare_lines.append(self._line_at)
        if len(self._mends) + len(self._bare_lines) > _MAX_MENDS:
            raise BadEvent(self._line_at, "An event has too many lines without data.")

    def _has_data(self) -> bool:
        return self._skimmer is not None or bool(self._waiting) or self._done

    def _open_data(self, position: int) -> None:
        """A ``data:`` line's value begins at ``position``; lines are joined by a line end."""
        if self._waiting:
            self._skim(self._waiting)
            self._waiting = b""
        if self._skimmer is not None:
            self._skim(b"\n")
            try:
                self._skimmer.skip(position - self._data_end - 1)
            except BadJson as error:
                raise BadEvent(error.offset, f"An event's data is not JSON: {error}") from None
        self._data_at = self._data_end = position

    def _take_data(self, part: bytes, position: int) -> None:
        if self._done or not part:
            return
        self._data_end = position + len(part)
        if self._skimmer is None:
            part = self._waiting + part
            self._waiting = b""
            if part.startswith(b"[DONE]"):
                self._done = True
                return
            if b"[DONE]".startswith(part):
                self._waiting = part
                return
        self._skim(part)

    def _skim(self, part: bytes) -> None:
        if self._skimmer is None:
            self._skimmer = JsonSkimmer(
                keep_bytes=self._keep,
                origin=self._data_at,
                lenient=self._lenient,
                max_kept=self._max_kept,
                max_values=self._max_values,
            )
        try:
            self._skimmer.feed(part)
        except BadJson as error:
            raise BadEvent(error.offset, f"An event's data is not JSON: {error}") from None

    def _end_line(self, end: int) -> Event | None:
        """Ends the line; ``end`` is the offset behind its line end. A blank one ends the event."""
        if self._field == "" and self._line:
            self._open_field(self._line_at + len(self._line))
        if self._field == "event":
            name = self._line[len(b"event:") : _MAX_NAME_BYTES]
            self._name = name.removeprefix(b" ").decode(errors="replace")
        # A colon over the first byte of a letter would leave the rest of it.
        if self._odd and (self._odd_at == self._line_at or not _is_utf8(self._odd)):
            span = Span(self._odd_at, self._odd_at + len(self._odd))
            # First of all: that a line becomes a comment is written over it.
            self._mends.insert(0, Edit(span, bytes(self._odd.translate(_TO_ASCII))))
        blank = self._field == ""
        self._begin_line(end)
        # A blank line with nothing before it belongs to the event that follows.
        return self._end_event(end) if blank and self._begun else None

    def _end_event(self, end: int) -> Event:
        data = None
        if self._waiting:
            self._skim(self._waiting)
        if self._skimmer is not None:
            try:
                data = self._skimmer.close()
            except BadJson as error:
                raise BadEvent(error.offset, f"An event's data is not JSON: {error}") from None
        if data is None and not self._done:
            self._mends += [_comment(line) for line in self._bare_lines]
        event = Event(self._name, data, self._done, self._start, end, tuple(self._mends))
        self._begin_event(end)
        return event


def _comment(line: int) -> Edit:
    """Makes a comment of the line that begins there."""
    return Edit(Span(line, line + 1), b":")


def _is_utf8(text: bytearray) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
