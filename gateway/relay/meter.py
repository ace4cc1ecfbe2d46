"""What an answer says of itself, seen while it passes: nothing is kept but the small members.

A JSON answer is judged when it is whole. A stream is judged event by event: partial pictures may
leave at once, a completed one waits for the settlement.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gateway.domain.call import Operation, Usage
from gateway.domain.errors import GatewayError, UpstreamBroken
from gateway.domain.price import Answer
from gateway.domain.record import record
from gateway.domain.usage import InvalidUsage, read_usage
from gateway.relay.events import BadEvent, Event, EventSkimmer
from gateway.relay.failover import error_in_success
from gateway.relay.skim import BadJson, Hole, JsonSkimmer, Skimmed
from gateway.relay.small_json import parsed

KEEP_BYTES = 16 * 1024
"""Strings up to this are kept: a revised prompt, an error's text; a picture is longer."""


@record
class Reading:
    """What a complete answer said of itself.

    ``document`` is the JSON answer, or the only completed event of a stream (None where there
    were several). ``hosted`` is set where a picture came as a url, which is never kept.
    """

    answer: Answer
    invalid_usage: bool = False
    hosted: bool = False
    document: Skimmed | None = None


class NoPicture(Exception):
    """The answer was a success that carries no picture: bought, but nothing to deliver."""

    def __init__(self, why: str, reading: Reading) -> None:
        super().__init__(why)
        self.reading = reading


class JsonMeter:
    """Reads one JSON answer as it passes."""

    def __init__(self, operation: Operation, upstream: str) -> None:
        self.operation = operation
        self.upstream = upstream
        self._skimmer: JsonSkimmer | None = None
        self._small: bytes | None = b""
        """All that came, as long as no string of it can be too long to keep."""
        self._document: Skimmed | None = None

    def feed(self, chunk: bytes) -> None:
        """Raises ``NoPicture`` as soon as it cannot be an answer, but for what is small: that is
        read when it is whole."""
        if self._small is not None:
            chunk, self._small = self._small + chunk if self._small else chunk, None
            if len(chunk) <= KEEP_BYTES:
                self._small = chunk
                return
        self._skim(chunk)

    def _skim(self, chunk: bytes) -> JsonSkimmer:
        if self._skimmer is None:
            self._skimmer = JsonSkimmer(keep_bytes=KEEP_BYTES, lenient=True)
        try:
            self._skimmer.feed(chunk)
        except BadJson as error:
            raise NoPicture(_not_json(self.upstream), Reading(Answer(0))) from error
        return self._skimmer

    def close(self) -> Reading:
        """Raises ``NoPicture`` for a success without a picture, and the error that an error
        object in a success stands for (not billed)."""
        document = self.document()
        value = document.value
        members = value if isinstance(value, dict) else {}
        data = members.get("data")
        items = data if isinstance(data, list) else []
        pictures = [item for item in items if isinstance(item, dict) and _has_picture(item)]
        usage, invalid = _usage(members, self.operation)
        reading = Reading(
            _answer(len(pictures), usage, members),
            invalid,
            not all(item.get("b64_json") for item in pictures),
            document,
        )
        if members.get("error") and pictures:
            raise NoPicture(f"The upstream {self.upstream} answered with an error too.", reading)
        if members.get("error"):
            raise error_in_success(plain(members["error"]), self.upstream)
        if not pictures:
            raise NoPicture(f"The upstream {self.upstream} answered without a picture.", reading)
        return reading

    def document(self) -> Skimmed:
        """The whole answer, skimmed. Raises ``NoPicture`` when it is not JSON."""
        if self._document is None and self._small is not None:
            self._document = parsed(self._small)
        if self._document is None:
            skimmer = self._skim(self._small or b"")
            try:
                self._document = skimmer.close()
            except BadJson as error:
                raise NoPicture(_not_json(self.upstream), Reading(Answer(0))) from error
        return self._document


class EventReader:
    """Cuts a stream into events. ``bought`` is what they are of, as an error begins with it."""

    __slots__ = ()
    upstream: str
    bought: ClassVar[str]
    _skimmer: EventSkimmer

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that ``chunk`` completes. Raises ``UpstreamBroken`` on garbage."""
        try:
            return self._skimmer.feed(chunk)
        except BadEvent as error:
            raise self.broken("sent an event that is not JSON") from error

    def close(self) -> list[Event]:
        """An event that the end of the body completes. Raises ``UpstreamBroken`` when the stream
        was cut in the middle of one."""
        self.feed(b"")  # Raises what was wrong behind the last good event.
        try:
            last = self._skimmer.close()
        except BadEvent as error:
            raise self.broken("was cut in the middle of an event") from error
        return [] if last is None else [last]

    def broken(self, what: str) -> UpstreamBroken:
        """The error of a stream that ended before it was whole."""
        return UpstreamBroken(
            f"The upstream {self.upstream} {what}. {self.bought} may have been paid for, so this "
            "is not retried for you."
        )


@dataclass(slots=True)
class EventMeter(EventReader):
    """Reads one stream of events as it passes.

    ``partials`` counts the partial pictures seen, ``completed`` the whole ones.
    """

    bought: ClassVar[str] = "The picture"

    operation: Operation
    upstream: str
    partials: int = 0
    completed: int = 0
    _usage: Usage = field(default_factory=Usage)
    _counted: int = 0
    _invalid: bool = False
    _last: Skimmed | None = None
    _skimmer: EventSkimmer = field(
        default_factory=lambda: EventSkimmer(keep_bytes=KEEP_BYTES, lenient=True)
    )

    def see(self, event: Event) -> GatewayError | None:
        """Counts an event. Returns the error that it stands for, if it does."""
        members = event.data.value if event.data else None
        if not isinstance(members, dict):
            return None
        if members.get("error"):
            return error_in_success(plain(members["error"]), self.upstream)
        if event.name == "error" or members.get("type") == "error":
            flat = {key: plain(members.get(key)) for key in ("message", "code", "param")}
            return error_in_success(flat, self.upstream)
        if is_partial(event):
            self.partials += 1
        elif is_completed(event):
            self.completed += 1
            usage, invalid = _usage(members, self.operation)
            self._invalid = self._invalid or invalid
            if usage is not None:
                self._counted += 1
                self._usage = self._usage + usage
            self._last = event.data
        return None

    def read(self) -> Reading:
        """What the stream said, once at least one picture is complete.

        The usage of several pictures is their sum. Where one of them does not say, or says what
        cannot be true, there is no usage: a part must not pass for the whole.
        """
        members: dict[str, Any] = self._last.value if self._last else {}
        whole = self._counted == self.completed and not self._invalid
        return Reading(
            _answer(self.completed, self._usage if whole else None, members),
            self._invalid,
            "b64_json" not in members,
            self._last if self.completed == 1 else None,
        )


def is_partial(event: Event) -> bool:
    """Whether an event carries a partial picture (contract 1.4)."""
    return _type(event).endswith(".partial_image")


def is_completed(event: Event) -> bool:
    """Whether an event carries a whole picture."""
    members = event.data.value if event.data else None
    whole = isinstance(members, dict) and _has_picture(members)
    return whole and _type(event).endswith(".completed")


def _type(event: Event) -> str:
    members = event.data.value if event.data else None
    kind = members.get("type") if isinstance(members, dict) else None
    return kind if isinstance(kind, str) else event.name


def _usage(members: dict[str, Any], operation: Operation) -> tuple[Usage | None, bool]:
    """The usage, and whether what stood there cannot be true."""
    try:
        return read_usage(members.get("usage"), members.get("svg_usage"), operation), False
    except InvalidUsage:
        return None, True


def plain(value: object) -> object:
    """A value of an answer without holes: of a long text, its beginning."""
    if isinstance(value, Hole):
        return value.head.decode("utf-8", "replace")
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def _has_picture(item: dict[str, Any]) -> bool:
    return bool(item.get("b64_json") or item.get("url"))


def _answer(images: int, usage: Usage | None, members: dict[str, Any]) -> Answer:
    return Answer(
        images,
        usage,
        size=_text(members, "size"),
        quality=_text(members, "quality"),
        output_format=_text(members, "output_format"),
    )


def _text(members: dict[str, Any], name: str) -> str:
    value = members.get(name)
    return value if isinstance(value, str) and len(value) <= 64 else ""


def _not_json(upstream: str) -> str:
    return f"The upstream {upstream} answered with something that is not JSON."


def error_event(error: GatewayError) -> bytes:
    """The one form of an error inside a stream that both SDKs raise (contract 4.7)."""
    return error_frame(error.content)


def error_frame(content: bytes) -> bytes:
    """An error's body as an event."""
    return b"event: error\ndata: " + content.replace(b"\n", b" ") + b"\n\n"


def flat_error_frame(content: bytes, sequence: int = 0) -> bytes:
    """An error's body as an event of a response's stream: flat, as only there (contract 3.4)."""
    described = json.loads(content).get("error", {})
    flat = {
        "type": "error",
        "code": described.get("code"),
        "message": described.get("message", ""),
        "param": described.get("param"),
        "sequence_number": sequence,
    }
    return b"event: error\ndata: " + json.dumps(flat, separators=(",", ":")).encode() + b"\n\n"


ERROR_FRAMES: Mapping[Operation, Callable[[bytes], bytes]] = {
    Operation.GENERATION: error_frame,
    Operation.EDIT: error_frame,
    Operation.RESPONSE: flat_error_frame,
}
"""How an error's body is said in the middle of an operation's stream."""
