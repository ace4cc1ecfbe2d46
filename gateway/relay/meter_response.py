"""What a response says of itself, seen while it passes (contract 3.4): both usages, its status, and
the ids that it leaves at the upstream.

Its pictures pass by like any long string. A stream is judged by its last event, which repeats the
whole response.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gateway.domain.call import Usage
from gateway.domain.charge import Ending
from gateway.domain.errors import GatewayError, UpstreamBroken
from gateway.domain.ledger import Outcome
from gateway.domain.owned import OwnedKind
from gateway.domain.price import Answer
from gateway.domain.usage import InvalidUsage, read_text_usage, read_tool_usage
from gateway.relay.events import Event, EventSkimmer
from gateway.relay.failover import error_in_success
from gateway.relay.meter import EventReader, plain
from gateway.relay.skim import BadJson, JsonSkimmer

KEEP_BYTES = 16 * 1024
MAX_KEPT_BYTES = 16 << 20
MAX_VALUES = 200_000
"""An answer that is paid for is read, whatever tools and texts it repeats."""
MAX_ID_CHARS = 256

RUNNING = frozenset({"queued", "in_progress"})
DELIVERED = frozenset({"completed", "incomplete"})
TERMINAL = frozenset({"response.completed", "response.failed", "response.incomplete"})
LIFECYCLE = frozenset({"response.created", "response.queued", "response.in_progress"})
"""Events that are sent before any work is done."""
PICTURE_CALL = "image_generation_call"


@dataclass(frozen=True, slots=True)
class Told:
    """What a response said of itself.

    ``ids`` are what it leaves at the upstream, itself first; ``tokens`` is what its conversation
    has come to, None where it does not say.
    """

    id: str
    status: str
    answer: Answer
    invalid_usage: bool = False
    ids: tuple[tuple[str, OwnedKind], ...] = ()
    tokens: int | None = None

    @property
    def runs(self) -> bool:
        """It was asked for in the background and is not over."""
        return self.status in RUNNING

    @property
    def ending(self) -> Ending:
        """What it owes. One that failed owes what it says that it used; where it says nothing,
        nobody knows."""
        if self.status in DELIVERED:
            return Ending(Outcome.DELIVERED, self.answer, self.invalid_usage)
        if self.answer.text_usage is None:
            return Ending(Outcome.UNKNOWN)
        return Ending(Outcome.BROKEN, self.answer, self.invalid_usage)


def told(members: Mapping[str, Any]) -> Told:
    """What the object of a response says of itself."""
    output = members.get("output")
    items = [one for one in output if isinstance(one, dict)] if isinstance(output, list) else []
    calls = [one for one in items if one.get("type") == PICTURE_CALL]
    drawn = [one for one in calls if one.get("result")]
    documents = [one.get("svg_usage") for one in calls]
    text: Usage | None = None
    picture: Usage | None = None
    invalid = False
    try:
        text = read_text_usage(members.get("usage"))
        picture = read_tool_usage(members.get("tool_usage"), documents, len(drawn))
    except InvalidUsage:
        text, picture, invalid = None, None, True
    own = _id(members)
    ids = [(own, OwnedKind.RESPONSE)] if own else []
    ids += [(name, _kind(one)) for one in items if (name := _id(one))]
    return Told(
        id=own,
        status=str(members.get("status", "completed")),
        answer=Answer(
            len(drawn),
            picture,
            size=_said_by_all(drawn, "size"),
            quality=_said_by_all(drawn, "quality"),
            output_format=_said_by_all(drawn, "output_format"),
            text_usage=text,
        ),
        invalid_usage=invalid,
        ids=tuple(ids),
        tokens=None if text is None else text.text_in + text.text_out,
    )


class ResponseMeter:
    """Reads one JSON answer as it passes."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._skimmer = JsonSkimmer(
            keep_bytes=KEEP_BYTES, max_kept=MAX_KEPT_BYTES, max_values=MAX_VALUES, lenient=True
        )

    def feed(self, chunk: bytes) -> None:
        """Raises ``UpstreamBroken`` as soon as it cannot be an answer."""
        try:
            self._skimmer.feed(chunk)
        except BadJson as error:
            raise self._broken("something that is not JSON") from error

    def close(self) -> Told:
        """Raises ``UpstreamBroken`` for what is no response, and the error that an error object
        without one stands for (not billed)."""
        try:
            members = self._skimmer.close().value
        except BadJson as error:
            raise self._broken("something that is not JSON") from error
        if not isinstance(members, dict):
            raise self._broken("something that is no response")
        if not _id(members):
            if members.get("error"):
                raise error_in_success(plain(members["error"]), self._upstream)
            raise self._broken("something that is no response")
        return told(members)

    def _broken(self, what: str) -> UpstreamBroken:
        return UpstreamBroken(
            f"The upstream {self._upstream} answered with {what}. It may have been paid for, so "
            "this is not retried for you."
        )


@dataclass(slots=True)
class ResponseEventMeter(EventReader):
    """Reads one stream of events as it passes. ``told`` is what its last event said, None before
    it; ``worked`` whether anything but its beginning was seen; ``sequence`` is the number of the
    event seen last. ``seen`` are the ids so far."""

    bought: ClassVar[str] = "The response"

    upstream: str
    told: Told | None = None
    worked: bool = False
    sequence: int = -1
    seen: dict[str, OwnedKind] = field(default_factory=dict)
    _skimmer: EventSkimmer = field(
        default_factory=lambda: EventSkimmer(
            keep_bytes=KEEP_BYTES, lenient=True, max_kept=MAX_KEPT_BYTES, max_values=MAX_VALUES
        )
    )

    def see(self, event: Event) -> GatewayError | None:
        """Looks at an event. Returns the error that it stands for, if it does."""
        members = event.data.value if event.data else None
        if not isinstance(members, dict):
            return None
        kind = members.get("type", event.name)
        number = members.get("sequence_number")
        if isinstance(number, int):
            self.sequence = number
        if kind == "error" or event.name == "error":
            flat = {key: plain(members.get(key)) for key in ("message", "code", "param")}
            nested = members.get("error")
            return error_in_success(plain(nested) if nested else flat, self.upstream)
        self.worked = self.worked or kind not in LIFECYCLE
        response, item = members.get("response"), members.get("item")
        if isinstance(response, dict) and (own := _id(response)):
            self.seen[own] = OwnedKind.RESPONSE
        if isinstance(item, dict) and (own := _id(item)):
            self.seen[own] = _kind(item)
        if kind in TERMINAL and isinstance(response, dict):
            self.told = told({"status": kind.removeprefix("response."), **response})
        return None


def _id(members: Mapping[str, Any]) -> str:
    value = members.get("id")
    return value if isinstance(value, str) and len(value) <= MAX_ID_CHARS else ""


def _kind(item: Mapping[str, Any]) -> OwnedKind:
    return OwnedKind.PICTURE if item.get("type") == PICTURE_CALL else OwnedKind.ITEM


def _said_by_all(items: list[dict[str, Any]], name: str) -> str:
    """What every picture says of itself; empty where they differ, which is held as the dearest."""
    values = {item.get(name) for item in items}
    value = values.pop() if len(values) == 1 else ""
    return value if isinstance(value, str) and len(value) <= 64 else ""
