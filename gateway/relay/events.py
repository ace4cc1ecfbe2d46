"""Server-sent events, watched as they pass: their JSON is skimmed, what SDKs cannot read mended."""

from __future__ import annotations

from gateway.domain.call import Edit, Span
from gateway.domain.record import record
from gateway.relay.skim import BadJson, JsonSkimmer, Skimmed

_LF, _CR = b"\n\r"
_BLANK = b" \t\r\n"
_MAX_NAME_BYTES = 1024
_MAX_MENDS = 1000
_MAX_ODD_BYTES = 16 * 1024
_ASCII = bytes(range(128))
_TO_ASCII = _ASCII + b"?" * 128


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
