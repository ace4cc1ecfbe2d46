"""A response told in events (contract 3.4)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from gateway.domain.call import Json
from gateway.sandbox.exchange import Beat, Moment

PICTURE = "response.image_generation_call"


def beats(
    body: Mapping[str, Json], partials: Sequence[Sequence[str]], *, after: int = -1
) -> list[Beat]:
    """The events of a finished response, those numbered above ``after``."""
    made: list[Beat] = []
    for number, (kind, said) in enumerate(_events(body, partials)):
        if number <= after:
            continue
        moment = Moment.PARTIAL if kind == f"{PICTURE}.partial_image" else Moment.STEP
        if kind == f"response.{body['status']}":
            moment = Moment.LAST
        event = {"type": kind, "sequence_number": number, **said}
        made.append(Beat(moment, partial(_sse, event)))
    return made


def flat_error(error: Mapping[str, Json], number: int) -> bytes:
    """An error in a stream of a response: not nested, unlike those of pictures (contract 4.7)."""
    said = {name: error[name] for name in ("code", "message", "param")}
    return _sse({"type": "error", "sequence_number": number, **said})


def _events(
    body: Mapping[str, Json], partials: Sequence[Sequence[str]]
) -> Iterator[tuple[str, dict[str, Json]]]:
    """Each event's type and what it says."""
    begun: dict[str, Json] = {
        **{name: value for name, value in body.items() if name != "tool_usage"},
        "status": "in_progress",
        "output": [],
        "usage": None,
        "error": None,
        "completed_at": None,
        "incomplete_details": None,
    }
    if body["background"]:
        yield "response.created", {"response": {**begun, "status": "queued"}}
        yield "response.queued", {"response": {**begun, "status": "queued"}}
    else:
        yield "response.created", {"response": begun}
    yield "response.in_progress", {"response": begun}
    output = body["output"]
    pictures = iter(partials)
    for place, item in enumerate(output if isinstance(output, list) else []):
        if not isinstance(item, dict):
            continue
        if item["type"] == "message":
            yield from _message(item, place)
        else:
            yield from _picture(item, place, next(pictures, ()))
    yield f"response.{body['status']}", {"response": dict(body)}


def _picture(
    item: dict[str, Json], place: int, partials: Sequence[str]
) -> Iterator[tuple[str, dict[str, Json]]]:
    at: dict[str, Json] = {"item_id": item["id"], "output_index": place}
    begun: dict[str, Json] = {
        "id": item["id"],
        "type": item["type"],
        "status": "in_progress",
        "result": None,
    }
    yield "response.output_item.added", {"output_index": place, "item": begun}
    yield f"{PICTURE}.in_progress", at
    yield f"{PICTURE}.generating", at
    told = {name: item[name] for name in ("background", "output_format", "quality", "size")}
    for index, file in enumerate(partials):
        yield (
            f"{PICTURE}.partial_image",
            {**at, "partial_image_index": index, "partial_image_b64": file, **told},
        )
    if item["status"] == "completed":
        yield f"{PICTURE}.completed", at
    yield "response.output_item.done", {"output_index": place, "item": item}


def _message(item: dict[str, Json], place: int) -> Iterator[tuple[str, dict[str, Json]]]:
    content = item["content"]
    part = content[0] if isinstance(content, list) else None
    text = str(part["text"]) if isinstance(part, dict) else ""
    at: dict[str, Json] = {"item_id": item["id"], "output_index": place, "content_index": 0}
    begun: dict[str, Json] = {**item, "status": "in_progress", "content": []}
    yield "response.output_item.added", {"output_index": place, "item": begun}
    empty: dict[str, Json] = {
        "type": "output_text",
        "annotations": [],
        "logprobs": [],
        "text": "",
    }
    yield "response.content_part.added", {**at, "part": empty}
    for word in re.findall(r"\S*\s*", text):
        if word:
            yield "response.output_text.delta", {**at, "delta": word, "logprobs": []}
    yield "response.output_text.done", {**at, "text": text, "logprobs": []}
    yield "response.content_part.done", {**at, "part": part}
    yield "response.output_item.done", {"output_index": place, "item": item}


def _sse(event: Mapping[str, Json]) -> bytes:
    data = json.dumps(event, separators=(",", ":")).encode()
    return b"event: %b\ndata: %b\n\n" % (str(event["type"]).encode(), data)
