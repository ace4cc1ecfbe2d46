"""JSON, watched as it passes: the small members kept, the long strings not.

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
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.domain.call import Layout, Span, Spot
from gateway.domain.record import record
from gateway.relay.json_rules import STRICT, Refused, decoder, find_refused, half_pair

_QUOTE, _COLON, _COMMA = b'":,'
_OPENING, _CLOSING = b"[{", b"]}"
_BLANK = b" \t\r\n"
_MARKER = b"NaN"
_NO_LAYOUT = Layout()
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
_CONTROL = re.compile(rb"[\x00-\x1f]")
# Maps every control character to another byte: translate() then returns its argument itself,
# without a copy, exactly when there was none. Six times faster than a regex.
_MARK_CONTROLS = bytes(range(1, 33)) + bytes(range(32, 256))


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
        except Refused:
            raise self._bad(*find_refused(text)) from None
        half = -1 if self._lenient else half_pair(text)
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
            return STRICT
        holes = iter(self._holes)
        return decoder(lenient=self._lenient, constant=lambda _: next(holes))

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
