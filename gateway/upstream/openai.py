"""The dialect of an upstream that speaks OpenAI's: almost nothing, as it is ours too. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from gateway.domain.call import Call, Edit, Encoding
from gateway.domain.route import Target

USER_AGENT = "image-gateway/0.1"

FROM_CLIENT = ("openai-beta",)
"""What of the client's headers an upstream may see. Its key, its organisation, its cookies and
its SDK's marks stay here (contract 2.2)."""

TO_CLIENT = {
    "content-type": "content-type",
    "openai-processing-ms": "openai-processing-ms",
    "openai-version": "openai-version",
    "retry-after": "retry-after",
    "retry-after-ms": "retry-after-ms",
    "x-request-id": "x-upstream-request-id",
}
"""What of an upstream's headers a client may see, and as what. Everything else stays here: the
owner's organisation, the shared account's rates, cookies (contract 4.5)."""

_FORBIDDEN = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class OpenAIRequest:
    """What to send, but for the credentials and the body: ``edits`` are to be spliced into it."""

    path: str
    headers: tuple[tuple[str, str], ...]
    edits: tuple[Edit, ...] = ()


def request(call: Call, target: Target, client_headers: Mapping[str, str]) -> OpenAIRequest:
    """``call`` as ``target`` wants it. ``client_headers`` have names in lower case."""
    accept = "text/event-stream, application/json" if call.stream else "application/json"
    passed = tuple(
        (name, value)
        for name in FROM_CLIENT
        if (value := client_headers.get(name)) is not None and not _FORBIDDEN.search(value)
    )
    return OpenAIRequest(
        path=call.operation.path,
        headers=(
            ("content-type", call.content_type),
            ("accept", accept),
            ("user-agent", USER_AGENT),
            *passed,
        ),
        edits=_edits(call, target),
    )


def answer_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of an upstream's answer that the client gets. Names are in lower case.

    A value that could end its line is dropped.
    """
    return {
        passed: value
        for name, passed in TO_CLIENT.items()
        if (value := headers.get(name)) is not None and not _FORBIDDEN.search(value)
    }


def _edits(call: Call, target: Target) -> tuple[Edit, ...]:
    if target.model == call.model:
        return ()
    if call.encoding is Encoding.JSON:
        content = json.dumps(target.model)[1:-1].encode("ascii")
    else:
        content = target.model.encode()
    return (Edit(call.model_span, content),)
