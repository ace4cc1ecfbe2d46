"""The dialect of an upstream that speaks OpenAI's: almost nothing, as it is ours too. Pure.

The client's body is sent on byte for byte; only the model's name, what was changed for the call
and, where the target wants it, ``stream`` are spliced into it (``domain/splice.py``).

Nothing of the client's headers is passed on but the body's type: its key, its organisation, its
cookies and its SDK's marks stay here (contract 2.2).
"""

from __future__ import annotations

from functools import lru_cache

from gateway.domain.call import Call, Edit, Json
from gateway.domain.compat import TOOL_MODEL
from gateway.domain.route import Target
from gateway.domain.splice import spliced_fields
from gateway.ports import UpstreamRequest

USER_AGENT = "image-gateway/0.1"


def request(call: Call, target: Target) -> UpstreamRequest:
    """``call`` as ``target`` wants it: the port ``Provider``."""
    events = call.stream or _streams_anyway(call, target)
    return UpstreamRequest(
        path=call.operation.path,
        # A form's has its boundary in it, and is not met again.
        headers=(_headers if ";" in call.content_type else _shared)(call.content_type, events),
        edits=_edits(call, target),
    )


def _headers(content_type: str, events: bool) -> tuple[tuple[str, str], ...]:
    accept = "text/event-stream, application/json" if events else "application/json"
    return ("content-type", content_type), ("accept", accept), ("user-agent", USER_AGENT)


_shared = lru_cache(maxsize=64)(_headers)
"""Those of most calls are one of a few: 250 bytes of each that waits."""


def _edits(call: Call, target: Target) -> tuple[Edit, ...]:
    fields: dict[str, Json] = {
        change.name: change.after for change in call.changes if change.name != TOOL_MODEL
    }
    if _streams_anyway(call, target):
        fields["stream"] = True
    if target.model == call.model_said:
        fields.pop("model", None)
    else:
        fields["model"] = target.model
    tool = None if call.asks is None else call.asks.tool
    if tool is not None and target.tool not in ("", tool.model):
        fields["tools"] = tool.drawn_by(target.tool)
    edits = spliced_fields(call.encoding, call.layout, fields)
    return (*edits, *(mend.edit for mend in call.mends)) if call.mends else edits


def _streams_anyway(call: Call, target: Target) -> bool:
    """Whether a call that wants JSON is made as a stream.

    Only where the one form can be had from the other: of one picture, and not of a format that
    has no events (contract 1.2). ``partial_images`` is not added: it would cost more.
    """
    wanted = target.stream_always and not call.stream and call.asks is None
    return wanted and call.n == 1 and call.output_format not in ("gif", "svg")
