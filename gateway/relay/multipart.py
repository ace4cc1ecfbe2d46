"""A form, read as it passes: multipart/form-data (RFC 7578, RFC 2046 5.1), sans-I/O.

Chunks of any size go in; the parts that ended inside them come out, each with the span of its
content in the stream. The bytes themselves are never changed, joined or kept: a small text field
is kept whole, a file only as its SHA-256, its size and its first bytes.

House rules:

- ``CRLF--boundary`` holds its only CR at its head. So at the end of a chunk the last CR alone can
  begin a delimiter, and nearly every chunk is searched in place and held back not at all.
- Two readers of one form must agree on it, since the upstream reads it again after us. Where
  parsers are known to differ (a boundary that is another's prefix, parts after the end, ``name*``,
  folded lines, transfer encodings) the form is refused rather than guessed at.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import Enum, auto
from urllib.parse import unquote

from gateway.domain.call import Span
from gateway.domain.errors import BodyTooLarge, InvalidRequest
from gateway.ports import Lent
from gateway.relay.search import system_search

MAX_PARTS = 40
MAX_HEADER_BYTES = 16 << 10
MAX_HEADER_LINES = 16
MAX_TEXT_BYTES = 256 << 10
HEAD_BYTES = 256 << 10
"""How much of a file's beginning is kept for the header probe."""
MAX_BOUNDARY_BYTES = 200
MAX_PADDING_BYTES = 128

_WINDOW_BYTES = 24 << 10
"""CPython searches less than 30,000 bytes by skipping, more by its two-way method, which is three
times slower on pictures. Skipping is linear here too: a delimiter has its CR at its head only."""
_SYSTEM_SEARCH = system_search()

_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(
    rf';[ \t]*(?:({_NAME})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*)))?[ \t]*', re.DOTALL
)
_ESCAPED = re.compile(r'\\(["\\])')
_HEADER = re.compile(rf"({_NAME}):[ \t]*(.*)", re.DOTALL)
_BOUNDARY = re.compile(rb"[\x20-\x7e]*[\x21-\x7e]")
_BREAKS = re.compile(r"[\x00\r\n]")
_QUOTED_PERCENT = (("%22", '"'), ("%0D", "\r"), ("%0d", "\r"), ("%0A", "\n"), ("%0a", "\n"))
"""What browsers write for the three characters a quoted name cannot hold (RFC 7578 2)."""
_NOWHERE = Span(0, 0)
_PLAIN_TRANSFERS = frozenset({"7bit", "8bit", "binary"})


@dataclass(frozen=True, slots=True)
class Part:
    """One field of a form.

    ``span`` is its content in the stream, in bytes. ``content`` is the whole of a text field or
    the first ``HEAD_BYTES`` of a file. ``filename`` is None for a text field; it is only shown,
    never used as a path. ``digest`` is the hex SHA-256 of a file, empty for a text field.
    ``content_type`` is as declared, empty where it is not. ``head`` are its headers without the
    empty line behind them, ``whole`` is from the line of its boundary to that of the next.
    """

    name: str
    filename: str | None
    content_type: str
    span: Span
    content: bytes
    digest: str = ""
    head: Span = _NOWHERE
    whole: Span = _NOWHERE

    @property
    def is_file(self) -> bool:
        return self.filename is not None

    @property
    def size_bytes(self) -> int:
        return self.span.end - self.span.start


def boundary_of(content_type: str) -> bytes:
    """The boundary parameter of a ``multipart/form-data`` content type.

    Raises ``InvalidRequest`` (``invalid_multipart``) where it is missing or not usable.
    """
    try:
        _, parameters = _parse_parameters(content_type)
        boundary = parameters.get("boundary", "").encode("ascii")
    except ValueError:
        raise _malformed("The Content-Type header of the form cannot be read.") from None
    if not boundary:
        raise _malformed(
            "The Content-Type header names no boundary. Let the HTTP library set the header of a "
            "form itself."
        )
    if len(boundary) > MAX_BOUNDARY_BYTES or not _BOUNDARY.fullmatch(boundary):
        raise _malformed("The boundary in the Content-Type header is not a valid one.")
    return boundary


class _State(Enum):
    CONTENT = auto()
    """Inside a part, or in the text before the first or after the last one."""
    DELIMITED = auto()
    """Just behind a delimiter: another part, or the end."""
    HEADERS = auto()


class _Open:
    """The part whose content is arriving."""

    __slots__ = (
        *("content", "content_type", "digest", "filename", "head", "line_at", "name", "size"),
        "start",
    )

    def __init__(
        self,
        named: tuple[str, str | None, str],
        line_at: int,
        head: Span,
        start: int,
    ) -> None:
        self.name, self.filename, self.content_type = named
        self.line_at = line_at
        self.head = head
        self.start = start
        self.size = 0
        self.content = bytearray()
        self.digest = None if self.filename is None else hashlib.sha256()

    def closed(self, next_line_at: int) -> Part:
        return Part(
            name=self.name,
            filename=self.filename,
            content_type=self.content_type,
            span=Span(self.start, self.start + self.size),
            content=bytes(self.content),
            digest="" if self.digest is None else self.digest.hexdigest(),
            head=self.head,
            whole=Span(self.line_at, next_line_at),
        )


class FormScanner:
    """Reads one form.

    ``feed`` and ``close`` raise ``InvalidRequest`` (``invalid_multipart``, ``bad_header``) and,
    for a file over ``max_file_bytes``, ``BodyTooLarge``; after an error it must not be fed again.
    """

    def __init__(self, boundary: bytes, *, max_file_bytes: int) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._max_file_bytes = max_file_bytes
        # The first delimiter may stand at the very beginning: as if a line had ended before it.
        self._held = b"\r\n"
        self._seen = 0
        self._state = _State.CONTENT
        self._open: _Open | None = None
        self._line_at = 0  # where the last boundary's line begins, at its dashes
        self._parts = 0
        self._ended = False

    def feed(self, chunk: bytes | Lent) -> list[Part]:
        """The parts that ended within this chunk, in their order."""
        if not isinstance(chunk, bytes):
            chunk = self._past_the_inside(chunk)
            if not chunk:
                return []
        data = self._held + chunk if self._held else chunk
        base = self._seen - len(self._held)
        self._seen += len(chunk)
        parts: list[Part] = []
        at = 0
        while True:
            if self._state is _State.CONTENT:
                found = self._find(data, at, len(data))
                end = self._undecided(data, at, len(data)) if found < 0 else found
                self._take(data, at, end)
                if found < 0:
                    self._held = data[end:]
                    return parts
                if self._ended:
                    raise _malformed(f"A part follows the end of the form, at byte {base + found}.")
                self._line_at = base + found + len(b"\r\n")
                if self._open is not None:
                    parts.append(self._open.closed(self._line_at))
                    self._open = None
                self._state = _State.DELIMITED
                at = found + len(self._delimiter)
            else:
                step = self._delimited if self._state is _State.DELIMITED else self._headers
                after = step(data, at, base)
                if after < 0:
                    self._held = data[at:]
                    return parts
                at = after

    def _past_the_inside(self, chunk: Lent) -> bytes:
        """Takes what is the inside of a file, which is looked at where it lies; a copy of what is
        behind that."""
        part = self._open
        if (
            self._held
            or self._state is not _State.CONTENT
            or part is None
            or part.digest is None
            or part.size + chunk.size > self._max_file_bytes
        ):
            return bytes(chunk)
        found = self._find_lent(chunk)
        stop = self._undecided(chunk.buffer, chunk.start, chunk.end) if found < 0 else found
        inside = chunk.view[: stop - chunk.start]
        missing = HEAD_BYTES - len(part.content)
        if missing > 0:
            part.content += inside[:missing]
        part.size += len(inside)
        part.digest.update(inside)
        self._seen += len(inside)
        rest = bytes(chunk.view[len(inside) :])
        if found >= 0:
            return rest
        self._seen += len(rest)
        self._held = rest
        return b""

    def close(self) -> None:
        """Nothing more comes. Raises where the end boundary was never seen."""
        if not self._ended:
            raise _malformed(
                f"The form ends after {self._seen} bytes without its end boundary: it was cut on "
                "the way, or the boundary in Content-Type is not the one in the body."
            )

    def _find_lent(self, chunk: Lent) -> int:
        if _SYSTEM_SEARCH is None:
            return self._find(chunk.buffer, chunk.start, chunk.end)
        return _SYSTEM_SEARCH(chunk.buffer, self._delimiter, chunk.start, chunk.end)

    def _find(self, data: bytes | bytearray, at: int, stop: int) -> int:
        """Where the next delimiter begins, -1 where there is none before ``stop``."""
        for start in range(at, stop, _WINDOW_BYTES):
            end = min(start + _WINDOW_BYTES + len(self._delimiter) - 1, stop)
            found = data.find(self._delimiter, start, end)
            if found >= 0:
                return found
        return -1

    def _undecided(self, data: bytes | bytearray, at: int, stop: int) -> int:
        """From where on what is before ``stop`` may be the beginning of a delimiter."""
        last = data.rfind(b"\r", max(at, stop - len(self._delimiter) + 1), stop)
        if last >= 0 and self._delimiter.startswith(bytes(data[last:stop])):
            return last
        return stop

    def _take(self, data: bytes, start: int, end: int) -> None:
        part = self._open
        if part is None or start == end:
            return
        part.size += end - start
        if part.digest is None:
            if part.size > MAX_TEXT_BYTES:
                raise _malformed(
                    f"The field {_short(part.name)} is longer than {MAX_TEXT_BYTES >> 10} KiB of "
                    "text. A picture is sent as a file part, with a filename.",
                    param=part.name,
                )
            part.content += data[start:end]
            return
        if part.size > self._max_file_bytes:
            raise BodyTooLarge(
                f"The file in {_short(part.name)} is larger than the "
                f"{say_bytes(self._max_file_bytes)} that one file may have. Send a smaller one.",
                param=part.name,
                close=True,
            )
        missing = HEAD_BYTES - len(part.content)
        if missing > 0:
            part.content += data[start : min(end, start + missing)]
        whole = start == 0 and end == len(data)
        part.digest.update(data if whole else memoryview(data)[start:end])

    def _delimited(self, data: bytes, at: int, base: int) -> int:
        """Behind a delimiter: ``--`` ends the form, else blanks may stand before the line's end."""
        if data.startswith(b"--", at):
            self._ended = True
            self._state = _State.CONTENT
            return at + 2
        end = data.find(b"\r\n", at, at + MAX_PADDING_BYTES + 2)
        if end < 0 and len(data) - at <= MAX_PADDING_BYTES + 1:
            return -1
        if end < 0 or data[at:end].strip(b" \t"):
            raise _malformed(f"The boundary line at byte {base + at} has other text behind it.")
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _malformed(f"The form has more than {MAX_PARTS} parts.")
        self._state = _State.HEADERS
        return end + 2

    def _headers(self, data: bytes, at: int, base: int) -> int:
        # An empty line at once: a part without headers, which the parser below refuses.
        empty = data.startswith(b"\r\n", at)
        end = at if empty else data.find(b"\r\n\r\n", at, at + MAX_HEADER_BYTES + 4)
        if end < 0:
            if len(data) - at > MAX_HEADER_BYTES + 3:
                raise _malformed(
                    f"The headers of the part at byte {base + at} are longer than "
                    f"{MAX_HEADER_BYTES >> 10} KiB."
                )
            return -1
        after = end + (2 if empty else 4)
        named = _parse_headers(data[at:end], base + at)
        self._open = _Open(named, self._line_at, Span(base + at, base + end), base + after)
        self._state = _State.CONTENT
        return after


def _parse_headers(block: bytes, offset: int) -> tuple[str, str | None, str]:
    """Name, filename and content type of the part whose headers begin at byte ``offset``."""
    where = f"the part at byte {offset}"
    lines = block.split(b"\r\n")
    if len(lines) > MAX_HEADER_LINES:
        raise _malformed(f"{where} has more than {MAX_HEADER_LINES} header lines.")
    headers: dict[str, str] = {}
    for line in lines:
        # Latin-1 maps each byte to one character and back: names are decoded once they are found.
        text = line.decode("latin-1")
        if _BREAKS.search(text):
            raise _bad_header(f"A header of {where} holds a NUL, CR or LF character.")
        match = _HEADER.fullmatch(text)
        if match is None:
            raise _malformed(f"A header line of {where} cannot be read.")
        key = match[1].lower()
        if key in headers:
            raise _malformed(f"{where} has two {match[1]} headers.")
        headers[key] = match[2].strip(" \t")
    try:
        kind, parameters = _parse_parameters(headers.get("content-disposition", ""))
        name = _decoded(parameters["name"], "strict")
    except (KeyError, ValueError):
        raise _malformed(
            f'{where} has no readable header like: Content-Disposition: form-data; name="prompt".'
        ) from None
    if kind != "form-data" or not name or "name*" in parameters:
        raise _malformed(f"{where} is not a named field of a form.")
    if _BREAKS.search(name):
        raise _bad_header(f"The name of {where} holds a NUL, CR or LF character.")
    transfer = headers.get("content-transfer-encoding", "binary").lower()
    if transfer not in _PLAIN_TRANSFERS:
        raise _malformed(
            f"{where} has a Content-Transfer-Encoding. Send its bytes as they are.", param=name
        )
    return name, _filename(parameters), headers.get("content-type", "")


def _filename(parameters: dict[str, str]) -> str | None:
    """Whether this is a file, and what it calls itself. Never refused: it is only shown."""
    if "filename" in parameters:
        return _decoded(parameters["filename"], "replace")
    extended = parameters.get("filename*")
    if extended is None:
        return None
    return unquote(extended.rsplit("'", 1)[-1], "utf-8", "replace")


def _decoded(latin: str, errors: str) -> str:
    text = latin.encode("latin-1").decode("utf-8", errors)
    for written, meant in _QUOTED_PERCENT:
        text = text.replace(written, meant)
    return text


def _parse_parameters(header: str) -> tuple[str, dict[str, str]]:
    """``form-data; name="a"`` -> ``("form-data", {"name": "a"})``; names in lower case.

    Only ``\\"`` and ``\\\\`` are escapes: some senders write the backslashes of a path bare.
    Raises ``ValueError`` for what cannot be read and for a parameter given twice.
    """
    value, semicolon, _ = header.partition(";")
    parameters: dict[str, str] = {}
    at = len(value) if semicolon else len(header)
    while at < len(header):
        match = _PARAMETER.match(header, at)
        if match is None:
            raise ValueError("unreadable parameter")
        at = match.end()
        name, quoted, bare = match.groups()
        if name is None:
            continue
        if name.lower() in parameters:
            raise ValueError("parameter given twice")
        if "*" in name and name.lower() != "filename*":
            # RFC 2231 continuations and charsets: other readers let them win over the plain one.
            raise ValueError("parameter with a star")
        parameters[name.lower()] = bare if quoted is None else _ESCAPED.sub(r"\1", quoted)
    return value.strip(" \t").lower(), parameters


def say_bytes(count: int) -> str:
    """A limit in words: ``52428800`` -> ``"50 MiB"``."""
    for shift, unit in ((20, "MiB"), (10, "KiB")):
        if count >= 1 << shift and count % (1 << shift) == 0:
            return f"{count >> shift} {unit}"
    return f"{count} bytes"


def _short(name: str) -> str:
    return repr(name if len(name) <= 64 else name[:64] + "...")


def _malformed(message: str, *, param: str | None = None) -> InvalidRequest:
    text = message[0].upper() + message[1:]
    return InvalidRequest(text, code="invalid_multipart", param=param, reason="invalid_multipart")


def _bad_header(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="bad_header", reason="bad_header")
