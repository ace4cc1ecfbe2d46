"""The dialect of an upstream that speaks OpenAI's: almost nothing, as it is ours too. Pure.

The client's body is sent on byte for byte; only the model's name, what is pinned (a size or a
quality that was left open) and, where the target wants it, ``stream`` are spliced into it. A member
or a part that is missing is put right behind the model, which every body has.

Nothing of the client's headers is passed on but the body's type: its key, its organisation, its
cookies and its SDK's marks stay here (contract 2.2).
"""

from __future__ import annotations

import json

from gateway.domain.call import Call, Edit, Encoding, Span
from gateway.domain.route import Target
from gateway.ports import UpstreamRequest

USER_AGENT = "image-gateway/0.1"


def request(call: Call, target: Target) -> UpstreamRequest:
    """``call`` as ``target`` wants it: the port ``Provider``."""
    events = call.stream or _streams_anyway(call, target)
    return UpstreamRequest(
        path=call.operation.path,
        headers=(
            ("content-type", call.content_type),
            (
                "accept",
                "text/event-stream, application/json" if events else "application/json",
            ),
            ("user-agent", USER_AGENT),
        ),
        edits=_edits(call, target),
    )


def _edits(call: Call, target: Target) -> tuple[Edit, ...]:
    as_json = _is_json(call)
    edits = [
        _filled_in(call, name, _json(value) if as_json else value.encode())
        for name, value in call.pinned.items()
    ]
    if _streams_anyway(call, target):
        edits.append(_filled_in(call, "stream", b"true"))
    if target.model != call.model:
        model = _json(target.model)[1:-1] if as_json else target.model.encode()
        # First of those that begin at one place: its span is the one that is not empty.
        edits.insert(0, Edit(call.model_span, model))
    return tuple(edits)


def _streams_anyway(call: Call, target: Target) -> bool:
    """Whether a call that wants JSON is made as a stream.

    Only where the one form can be had from the other: of one picture, and not of a format that
    has no events (contract 1.2). ``partial_images`` is not added: it would cost more.
    """
    wanted = target.stream_always and not call.stream
    return wanted and call.n == 1 and call.output_format not in ("gif", "svg")


def _filled_in(call: Call, name: str, content: bytes) -> Edit:
    """Replaces what the body says of ``name`` (``auto``, null), or says it for the first time."""
    given = call.value_spans.get(name)
    if given is not None:
        return Edit(given, content)
    end = call.model_span.end
    if _is_json(call):
        # Behind the closing quote.
        return Edit(Span(end + 1, end + 1), b"," + _json(name) + b":" + content)
    head = b'Content-Disposition: form-data; name="' + name.encode() + b'"'
    part = b"\r\n--" + call.boundary + b"\r\n" + head + b"\r\n\r\n" + content
    return Edit(Span(end, end), part)


def _is_json(call: Call) -> bool:
    return call.encoding is Encoding.JSON


def _json(text: str) -> bytes:
    return json.dumps(text).encode("ascii")
