"""W3C Trace Context (Level 2): which trace a request belongs to, read from headers and written
into them."""

from __future__ import annotations

import re
import secrets
from dataclasses import replace
from datetime import datetime

from gateway.domain.record import record

MAX_STATE_CHARS = 512
MAX_STATE_MEMBERS = 32
LONG_MEMBER_CHARS = 128

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_MEMBER = re.compile(
    r"([a-z0-9][a-z0-9_*/@-]{0,255})=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}"
    r"[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)
_SAMPLED, _RANDOM = 1, 2


@record
class TraceContext:
    """A span, as others may know it: ``trace_id`` is 32 and ``span_id`` 16 lower-case hexadecimal
    digits, neither all zero. ``random``: the trace's id is random, so that it may be sampled by.
    ``state`` is the ``tracestate`` of other vendors, for the collector alone; empty for none."""

    trace_id: str
    span_id: str
    sampled: bool
    state: str = ""
    random: bool = False

    @property
    def traceparent(self) -> str:
        flags = _SAMPLED * self.sampled | _RANDOM * self.random
        return f"00-{self.trace_id}-{self.span_id}-{flags:02x}"

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """What tells an upstream that it is called from this span. What the client's vendors wrote
        into ``state`` is none of its business."""
        return (("traceparent", self.traceparent),)

    def child(self) -> TraceContext:
        """Another span of the same trace."""
        return replace(self, span_id=new_span_id())


@record
class Trace:
    """The span of one request. ``parent`` is the id of the client's, empty where this one begins
    the trace; ``began`` is the instant from which the request's timings count."""

    context: TraceContext
    parent: str
    began: datetime


def new_span_id() -> str:
    return secrets.token_hex(8)


def begin(client: TraceContext | None, sample: float, at: datetime) -> Trace:
    """The span of a request that came at ``at``: a child of the client's, which has decided whether
    it is sampled; else the first of a trace of its own, of which a share of ``sample`` is."""
    if client is not None:
        return Trace(client.child(), client.span_id, at)
    trace_id = secrets.token_hex(16)
    # As OpenTelemetry's TraceIdRatioBased decides: other services agree by the id alone.
    sampled = int(trace_id[16:], 16) < sample * 2**64
    return Trace(TraceContext(trace_id, new_span_id(), sampled, random=True), "", at)


def of_stranger(trace: Trace, sample: float) -> Trace:
    """The same span, of a client that nobody knows. Whether it is sampled is then decided here, by
    a die of its own: the trace's id is the client's choice too."""
    if not trace.parent:
        return trace
    sampled = secrets.randbits(64) < sample * 2**64
    return replace(trace, context=replace(trace.context, sampled=sampled))


def parse(traceparent: str, tracestate: str = "") -> TraceContext | None:
    """The caller's span; None where ``traceparent`` is not valid, whatever else is said. Several
    headers of one name come joined with commas.

    A later version is read as far as this one goes. A ``tracestate`` that is not valid is dropped,
    one that is too long is cut.
    """
    found = _PARENT.fullmatch(traceparent)
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    if not trace_id.strip("0") or not span_id.strip("0"):
        return None
    bits = int(flags, 16)
    return TraceContext(
        trace_id, span_id, bool(bits & _SAMPLED), _state(tracestate), bool(bits & _RANDOM)
    )


def _state(text: str) -> str:
    """``tracestate`` in its shortest form; empty where it is not valid."""
    if len(text) > MAX_STATE_MEMBERS * MAX_STATE_CHARS:
        return ""
    members = [member for part in text.split(",") if (member := part.strip(" \t"))]
    found = [_MEMBER.fullmatch(member) for member in members]
    keys = {match[1] for match in found if match}
    if len(keys) < len(members) or len(members) > MAX_STATE_MEMBERS:
        return ""
    # What is too long is cut by whole members: the long ones first, then from the end.
    if len(",".join(members)) > MAX_STATE_CHARS:
        members = [member for member in members if len(member) <= LONG_MEMBER_CHARS]
    while len(",".join(members)) > MAX_STATE_CHARS:
        members.pop()
    return ",".join(members)
