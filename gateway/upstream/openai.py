"""The dialect of an upstream that speaks OpenAI's: almost nothing, as it is ours too. Pure.

Nothing of the client's headers is passed on but the body's type: its key, its organisation, its
cookies and its SDK's marks stay here (contract 2.2).
"""

from __future__ import annotations

import json

from gateway.domain.call import Call, Edit, Encoding
from gateway.domain.route import Target
from gateway.ports import UpstreamRequest

USER_AGENT = "image-gateway/0.1"


def request(call: Call, target: Target) -> UpstreamRequest:
    """``call`` as ``target`` wants it: the port ``Provider``."""
    return UpstreamRequest(
        path=call.operation.path,
        headers=(
            ("content-type", call.content_type),
            (
                "accept",
                "text/event-stream, application/json" if call.stream else "application/json",
            ),
            ("user-agent", USER_AGENT),
        ),
        edits=_edits(call, target),
    )


def _edits(call: Call, target: Target) -> tuple[Edit, ...]:
    if target.model == call.model:
        return ()
    if call.encoding is Encoding.JSON:
        content = json.dumps(target.model)[1:-1].encode("ascii")
    else:
        content = target.model.encode()
    return (Edit(call.model_span, content),)
