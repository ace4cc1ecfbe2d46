"""Responses in a stream and in the background, with the real SDK."""

from __future__ import annotations

import itertools
import json
from contextlib import suppress
from typing import Any

import httpx
import pytest
from openai import APIConnectionError, APIError, BadRequestError, NotFoundError, OpenAI
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseErrorEvent,
    ResponseImageGenCallPartialImageEvent,
    ResponseStreamEvent,
)

from gateway.domain.call import Json
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from tests.sandbox.calls import picture
from tests.sandbox.test_responses import LOW, MODEL, TOOL, ask, pictures

PARTIALS: Any = [TOOL | {"partial_images": 2}]
CALL = "response.image_generation_call"


def streamed(sdk: OpenAI, **fields: Any) -> list[ResponseStreamEvent]:
    given = {"model": MODEL, "input": "A lighthouse", "tools": PARTIALS, **fields}
    with sdk.responses.create(**given, stream=True) as stream:
        return list(stream)


def test_the_events_of_a_response(server: SandboxServer, sdk: OpenAI) -> None:
    events = streamed(sdk)
    kinds = [kind for kind, _ in itertools.groupby(event.type for event in events)]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        f"{CALL}.in_progress",
        f"{CALL}.generating",
        f"{CALL}.partial_image",
        f"{CALL}.completed",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    partials = [
        event for event in events if isinstance(event, ResponseImageGenCallPartialImageEvent)
    ]
    assert [event.partial_image_index for event in partials] == [0, 1]
    assert picture(partials[0].partial_image_b64).size == (1024, 1024)
    last = events[-1]
    assert isinstance(last, ResponseCompletedEvent)
    [drawn] = pictures(last.response)
    assert {event.item_id for event in partials} == {drawn.id}
    assert picture(drawn.result).size == (1024, 1024)
    assert last.response.tool_usage is not None
    assert last.response.tool_usage.image_gen.output_tokens == LOW + 2 * 100
    assert server.journal[0].tool_usage == last.response.tool_usage.image_gen.to_dict()
    assert sdk.responses.retrieve(last.response.id) == last.response


def test_the_sdks_own_accumulator(sdk: OpenAI) -> None:
    with sdk.responses.stream(model=MODEL, input="A lighthouse", tools=PARTIALS) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == "Here it is: A lighthouse"
    assert final.output[0].type == "image_generation_call"


def test_a_stream_that_fails_or_ends_early(server: SandboxServer, sdk: OpenAI) -> None:
    server.rules.add(Rule(times=1, response_status="failed"))
    assert streamed(sdk)[-1].type == "response.failed"
    assert streamed(sdk, max_output_tokens=16, input="x" * 200)[-1].type == "response.incomplete"


def test_a_gif_has_no_partial_images(sdk: OpenAI) -> None:
    gif = [TOOL | {"output_format": "gif", "partial_images": 2}]
    kinds = {event.type for event in streamed(sdk, tools=gif)}
    assert f"{CALL}.completed" in kinds
    assert f"{CALL}.partial_image" not in kinds


def test_an_error_event_is_flat(server: SandboxServer, sdk: OpenAI) -> None:
    server.rules.add(Rule(times=1, sse_error_after=1))
    events = streamed(sdk)
    last = events[-1]
    assert isinstance(last, ResponseErrorEvent)
    assert (last.code, last.param) == ("server_error", None)
    assert last.sequence_number == len(events) - 1
    assert sum(event.type == f"{CALL}.partial_image" for event in events) == 1


@pytest.mark.parametrize("after", [0, 1, 9])
def test_a_stream_that_is_cut(server: SandboxServer, http: httpx.Client, after: int) -> None:
    server.rules.add(Rule(times=1, sse_cut_after=after))
    body: Json = {"model": MODEL, "input": "A boat", "tools": PARTIALS, "stream": True}
    kinds = []
    with http.stream("POST", "/responses", json=body) as answer:
        try:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    kinds.append(json.loads(line[6:])["type"])
        except httpx.RemoteProtocolError:
            kinds.append("cut")
    assert kinds[-1] == "cut"
    assert kinds.count(f"{CALL}.partial_image") == min(after, 2)
    assert ("response.output_item.done" in kinds) == (after == 9)
    assert "response.completed" not in kinds
    assert server.journal[0].images == 1


def test_other_spoilt_streams(server: SandboxServer, sdk: OpenAI) -> None:
    for rule in ({"sse_no_completed": True}, {"empty_body": True}, {"json_for_stream": True}):
        server.rules.add(Rule(times=1, **rule))  # type: ignore[arg-type]
    assert streamed(sdk)[-1].type == "response.output_item.done"
    assert streamed(sdk) == []
    assert streamed(sdk) == []
    server.rules.add(Rule(times=1, cut_before_headers=True))
    with pytest.raises(APIConnectionError):
        streamed(sdk)
    assert server.journal.billed_images == 4


def test_a_stream_held_behind_a_partial_image(server: SandboxServer, http: httpx.Client) -> None:
    gate = Gate()
    server.rules.add(Rule(wait_for=gate, wait_after=1))
    body: Json = {"model": MODEL, "input": "A boat", "tools": PARTIALS, "stream": True}
    kinds = []
    with http.stream("POST", "/responses", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kinds.append(line[7:])
                if kinds[-1] == f"{CALL}.partial_image":
                    gate.wait_arrived()
                    assert gate.is_set() or kinds.count(f"{CALL}.partial_image") == 1
                    gate.set()
    assert kinds[-1] == "response.completed"


def background(sdk: OpenAI, **fields: Any) -> Response:
    return ask(sdk, background=True, **fields)


def test_in_the_background(server: SandboxServer, sdk: OpenAI) -> None:
    start, end = Gate(), Gate()
    server.rules.add(Rule(path="/responses", times=1, wait_for=start))
    queued = background(sdk)
    assert (queued.status, queued.output, queued.usage) == ("queued", [], None)
    start.wait_arrived()
    assert sdk.responses.retrieve(queued.id).status == "queued"
    assert server.journal.billed == []
    start.set()
    server.journal.wait_until(lambda: server.journal.billed_requests == 1)
    done = sdk.responses.retrieve(queued.id)
    assert (done.status, done.background) == ("completed", True)
    assert len(pictures(done)) == 1
    server.rules.add(Rule(path="/responses", times=1, wait_for=end, wait_after=0))
    second = background(sdk)
    end.wait_arrived()
    assert sdk.responses.retrieve(second.id).status == "in_progress"
    assert sdk.responses.cancel(second.id).status == "cancelled"
    assert sdk.responses.cancel(second.id).status == "cancelled"
    end.set()
    third = background(sdk)
    server.journal.wait_until(lambda: server.journal.billed_requests == 2)
    assert sdk.responses.retrieve(second.id).status == "cancelled"
    assert sdk.responses.retrieve(third.id).status == "completed"


def test_the_background_outlives_its_answer(server: SandboxServer, http: httpx.Client) -> None:
    server.rules.add(Rule(path="/responses", times=1, cut_before_headers=True))
    body: Json = {"model": MODEL, "input": "A boat", "tools": [TOOL], "background": True}
    with pytest.raises(httpx.RemoteProtocolError):
        http.post("/responses", json=body)
    server.journal.wait_until(lambda: server.journal.billed_images == 1)


def test_what_cannot_be_cancelled(sdk: OpenAI, server: SandboxServer) -> None:
    with pytest.raises(BadRequestError, match="synchronous"):
        sdk.responses.cancel(ask(sdk).id)
    done = background(sdk)
    server.journal.wait_until(lambda: server.journal.billed_requests == 2)
    with pytest.raises(BadRequestError, match="completed"):
        sdk.responses.cancel(done.id)


def test_deleted_while_it_was_made(server: SandboxServer, sdk: OpenAI) -> None:
    gate = Gate()
    server.rules.add(Rule(path="/responses", wait_for=gate))
    queued = background(sdk)
    sdk.responses.delete(queued.id)
    gate.set()
    server.journal.wait_until(lambda: server.journal.billed_requests == 1)
    with pytest.raises(NotFoundError):
        sdk.responses.retrieve(queued.id)


def test_a_background_response_that_fails(server: SandboxServer, sdk: OpenAI) -> None:
    server.rules.add(Rule(path="/responses", response_status="failed", no_usage=True))
    queued = background(sdk)
    server.journal.wait_until(lambda: server.journal.billed_requests == 1)
    failed = sdk.responses.retrieve(queued.id)
    assert (failed.status, failed.usage) == ("failed", None)


def test_a_background_stream_is_taken_up_again(server: SandboxServer, sdk: OpenAI) -> None:
    server.rules.add(Rule(path="/responses", times=1, sse_cut_after=1))
    events = []
    asked = {"model": MODEL, "input": "A boat", "tools": PARTIALS, "background": True}
    with suppress(APIError), sdk.responses.create(**asked, stream=True) as stream:
        for event in stream:
            events.append(event)
    first, seen = events[0], events[-1].sequence_number
    assert first.type == "response.created"
    assert [event.type for event in events[1:3]] == ["response.queued", "response.in_progress"]
    with sdk.responses.retrieve(first.response.id, stream=True, starting_after=seen) as rest:
        taken_up = list(rest)
    assert taken_up[0].sequence_number == seen + 1
    assert taken_up[-1].type == "response.completed"
    with pytest.raises(BadRequestError, match="cannot be streamed"):
        sdk.responses.retrieve(ask(sdk).id, stream=True)
