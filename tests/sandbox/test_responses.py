"""/v1/responses with the image tool, with the real SDK: what it says, what it costs."""

from __future__ import annotations

import base64
from decimal import Decimal
from typing import Any

import httpx
import pytest
from openai import APIError, BadRequestError, InternalServerError, NotFoundError, OpenAI
from openai.types.responses import Response, ResponseInputParam
from openai.types.responses.response_output_item import ImageGenerationCall

from gateway.domain.call import Json
from gateway.sandbox.costs import NANOS_PER_DOLLAR
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from tests.sandbox.calls import FLARE, picture, png

MODEL = "gpt-4.1"
TOOL: Any = {"type": "image_generation", "model": FLARE, "quality": "low", "size": "1024x1024"}
LOW = 196


def ask(sdk: OpenAI, **fields: Any) -> Response:
    given = {"model": MODEL, "input": "A lighthouse", "tools": [TOOL], **fields}
    answer = sdk.responses.create(**given)
    assert isinstance(answer, Response)
    return answer


def pictures(answer: Response) -> list[ImageGenerationCall]:
    return [item for item in answer.output if isinstance(item, ImageGenerationCall)]


def billed(server: SandboxServer) -> dict[str, Decimal]:
    """Dollars by line item."""
    return {item: Decimal(nanos) / NANOS_PER_DOLLAR for _, item, nanos in server.journal.costs}


def test_a_picture_and_a_sentence(server: SandboxServer, sdk: OpenAI) -> None:
    answer = ask(sdk, instructions="Be kind", metadata={"a": "b"})
    assert (answer.object, answer.status, answer.model) == ("response", "completed", MODEL)
    assert answer.id.startswith("resp_")
    [drawn] = pictures(answer)
    assert drawn.id.startswith("ig_")
    assert (drawn.status, drawn.quality, drawn.size) == ("completed", "low", "1024x1024")
    assert (drawn.action, drawn.output_format) == ("generate", "png")
    assert picture(drawn.result).size == (1024, 1024)
    assert answer.output_text == "Here it is: A lighthouse"
    assert (answer.instructions, answer.metadata) == ("Be kind", {"a": "b"})
    usage, drawing = answer.usage, answer.tool_usage
    assert usage is not None
    assert drawing is not None
    # "A lighthouse\nBe kind" is 20 bytes; "Here it is: A lighthouse" 24, the call's prompt 12.
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (5, 9, 14)
    assert usage.input_tokens_details.cached_tokens == 0
    assert usage.output_tokens_details.reasoning_tokens == 0
    assert drawing.image_gen.input_tokens_details.text_tokens == 3
    assert drawing.image_gen.output_tokens == LOW
    assert drawing.image_gen.total_tokens == LOW + 3
    assert drawing.web_search.num_requests == 0
    [record] = server.journal.billed
    assert record.images == 1
    assert record.usage == usage.to_dict()
    assert record.tool_usage == drawing.image_gen.to_dict()
    assert billed(server) == {
        f"{MODEL}, text input": Decimal(5 * 2) / 10**6,
        f"{MODEL}, text output": Decimal(9 * 8) / 10**6,
        f"{FLARE}, text input": Decimal(3 * 5) / 10**6,
        f"{FLARE}, image output": Decimal(LOW * 30) / 10**6,
    }


def test_the_tools_model_when_none_is_named(server: SandboxServer, sdk: OpenAI) -> None:
    ask(sdk, tools=[{"type": "image_generation"}])
    assert "gpt-image-2.6-sunburst, image output" in billed(server)


def test_reasoning_is_a_part_of_what_is_written(sdk: OpenAI) -> None:
    answer = ask(sdk, model="gpt-5", reasoning={"effort": "low"})
    assert answer.usage is not None
    assert answer.usage.output_tokens_details.reasoning_tokens == 128
    assert answer.usage.output_tokens == 128 + 9


@pytest.mark.parametrize("fields", [{"tools": []}, {"tool_choice": "none"}])
def test_words_alone(server: SandboxServer, sdk: OpenAI, fields: dict[str, Any]) -> None:
    answer = ask(sdk, **fields)
    assert pictures(answer) == []
    assert answer.output_text == "You said: A lighthouse"
    assert answer.tool_usage is not None
    assert answer.tool_usage.image_gen.total_tokens == 0
    assert server.journal[0].images == 0


def test_going_on_by_the_previous_response(server: SandboxServer, sdk: OpenAI) -> None:
    first = ask(sdk)
    assert first.usage is not None
    second = ask(sdk, input="Now at night", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert second.usage is not None
    assert second.usage.input_tokens == first.usage.total_tokens + 3
    [drawn] = pictures(second)
    assert drawn.action == "edit"
    assert second.tool_usage is not None
    assert second.tool_usage.image_gen.input_tokens_details.image_tokens == 1457
    third = ask(sdk, input="And rain", previous_response_id=second.id)
    assert third.tool_usage is not None
    assert third.tool_usage.image_gen.input_tokens_details.image_tokens == 2 * 1457
    only_new = [TOOL | {"action": "generate"}]
    again = ask(sdk, input="Anew", previous_response_id=first.id, tools=only_new)
    assert pictures(again)[0].action == "generate"


def test_a_long_context_comes_from_the_cache(server: SandboxServer, sdk: OpenAI) -> None:
    first = ask(sdk, input="x" * 8000, tools=[])
    second = ask(sdk, input="More", previous_response_id=first.id, tools=[])
    assert first.usage is not None
    assert second.usage is not None
    cached = second.usage.input_tokens_details.cached_tokens
    assert cached == first.usage.total_tokens
    assert billed(server)[f"{MODEL}, cached text input"] == Decimal(cached) / 2 / 10**6


def test_going_on_by_the_pictures_id(sdk: OpenAI) -> None:
    first = ask(sdk)
    for kind in ("image_generation_call", "item_reference"):
        said: Any = [
            {"role": "user", "content": "At night"},
            {"type": kind, "id": pictures(first)[0].id},
        ]
        [drawn] = pictures(ask(sdk, input=said))
        assert drawn.action == "edit"


def test_a_reference_need_not_say_that_it_is_one(server: SandboxServer, sdk: OpenAI) -> None:
    first = ask(sdk)
    said: Any = [{"role": "user", "content": "At night"}, {"id": pictures(first)[0].id}]
    [drawn] = pictures(ask(sdk, input=said))
    assert drawn.action == "edit"


def test_pictures_in_the_input(server: SandboxServer, sdk: OpenAI) -> None:
    stored = sdk.files.create(file=("a.png", png()), purpose="vision")
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    said: ResponseInputParam = [
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "Both"},
                {"type": "input_image", "image_url": url, "detail": "auto"},
                {"type": "input_image", "file_id": stored.id, "detail": "auto"},
            ],
        }
    ]
    answer = ask(sdk, input=said, tools=[TOOL | {"input_image_mask": {"file_id": stored.id}}])
    assert answer.usage is not None
    assert answer.usage.input_tokens == 1 + 2 * 765
    assert answer.tool_usage is not None
    assert answer.tool_usage.image_gen.input_tokens_details.image_tokens == 2 * 1457


def test_what_is_another_keys_does_not_exist(server: SandboxServer, sdk: OpenAI) -> None:
    mine = ask(sdk)
    stored = sdk.files.create(file=("a.png", png()), purpose="vision")
    with OpenAI(base_url=server.base_url, api_key="other", max_retries=0) as other:
        with pytest.raises(NotFoundError) as lost:
            other.responses.retrieve(mine.id)
        assert f"Response with id '{mine.id}' not found." in lost.value.message
        with pytest.raises(NotFoundError):
            other.responses.delete(mine.id)
        with pytest.raises(NotFoundError):
            other.responses.input_items.list(mine.id)
        with pytest.raises(BadRequestError) as previous:
            ask(other, previous_response_id=mine.id)
        assert previous.value.code == "previous_response_not_found"
        with pytest.raises(NotFoundError) as item:
            ask(other, input=[{"type": "image_generation_call", "id": pictures(mine)[0].id}])
        assert item.value.param == "input"
        shown = {"type": "input_image", "file_id": stored.id}
        with pytest.raises(NotFoundError) as file:
            ask(other, input=[{"role": "user", "content": [shown]}])
        assert file.value.param == "input[0].content[0].file_id"


def test_half_a_surrogate_pair_has_no_bytes(http: httpx.Client) -> None:
    body = b'{"model":"gpt-4.1","input":"\\ud83d","instructions":"\\ud83d"}'
    answer = http.post("/responses", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200


def test_what_is_deleted_is_no_longer_worked_on(sdk: OpenAI) -> None:
    first = ask(sdk)
    second = ask(sdk, input="Now at night", previous_response_id=first.id)
    sdk.responses.delete(first.id)
    third = ask(sdk, input="And rain", previous_response_id=second.id)
    assert third.tool_usage is not None
    assert third.tool_usage.image_gen.input_tokens_details.image_tokens == 1457


def test_looking_up_and_deleting(sdk: OpenAI) -> None:
    made = ask(sdk)
    assert sdk.responses.retrieve(made.id) == made
    items = sdk.responses.input_items.list(made.id)
    assert [item.type for item in items.data] == ["message"]
    sdk.responses.delete(made.id)
    with pytest.raises(NotFoundError):
        sdk.responses.retrieve(made.id)
    with pytest.raises(NotFoundError):
        ask(sdk, input=[{"type": "image_generation_call", "id": pictures(made)[0].id}])


def test_input_items_in_pages(sdk: OpenAI) -> None:
    said: Any = [{"role": "user", "content": word} for word in ("one", "two", "three")]
    made = ask(sdk, input=said, tools=[])
    pages = sdk.responses.input_items.list(made.id, limit=2, order="asc")
    assert (len(pages.data), pages.has_more) == (2, True)
    texts = [item.to_dict()["content"] for item in pages]
    assert texts == [[{"type": "input_text", "text": one}] for one in ("one", "two", "three")]


def test_what_is_not_stored_is_not_there(sdk: OpenAI) -> None:
    made = ask(sdk, store=False)
    assert made.store is False  # type: ignore[attr-defined]
    with pytest.raises(NotFoundError):
        sdk.responses.retrieve(made.id)
    with pytest.raises(NotFoundError):
        ask(sdk, input=[{"type": "image_generation_call", "id": pictures(made)[0].id}])


@pytest.mark.parametrize(
    ("limit", "drawn", "words"), [(100, 1, True), (16, 0, False), (40, 1, False)]
)
def test_output_that_ends_at_its_limit(sdk: OpenAI, limit: int, drawn: int, words: bool) -> None:
    answer = ask(sdk, input="A lighthouse" * 10, max_output_tokens=limit)
    assert (len(pictures(answer)), bool(answer.output_text)) == (drawn, words)
    assert answer.usage is not None
    assert answer.usage.output_tokens <= limit
    if words:
        assert answer.status == "completed"
    else:
        assert answer.status == "incomplete"
        assert answer.incomplete_details is not None
        assert answer.incomplete_details.reason == "max_output_tokens"


def test_a_picture_that_safety_refuses(server: SandboxServer, sdk: OpenAI) -> None:
    answer = ask(sdk, input="moderationtest")
    [call] = pictures(answer)
    assert (answer.status, call.status, call.result) == ("completed", "failed", None)
    assert call.error is not None
    assert call.error.code == "moderation_blocked"
    assert call.error.moderation_details is not None
    assert call.error.moderation_details.moderation_stage == "input"
    assert server.journal[0].images == 0
    assert f"{FLARE}, image output" not in billed(server)


REFUSED: list[tuple[dict[str, Json], int, str | None, str | None]] = [
    ({"input": None}, 400, "missing_required_parameter", "input"),
    ({"model": None}, 400, "missing_required_parameter", "model"),
    ({"model": FLARE}, 400, "model_not_found", "model"),
    ({"n": 2}, 400, "unknown_parameter", "n"),
    ({"stream": "yes"}, 400, "invalid_type", "stream"),
    ({"max_output_tokens": 15}, 400, "integer_below_min_value", "max_output_tokens"),
    ({"max_tool_calls": 0}, 400, "integer_below_min_value", "max_tool_calls"),
    ({"reasoning": {"effort": "low"}}, 400, "unsupported_parameter", "reasoning.effort"),
    ({"background": True, "store": False}, 400, None, "store"),
    ({"conversation": "conv_1"}, 404, "not_found", "conversation"),
    ({"tools": [{"type": "paint"}]}, 400, "invalid_value", "tools[0].type"),
    ({"tools": [{}]}, 400, "missing_required_parameter", "tools[0].type"),
    ({"tools": [{"type": "function"}]}, 400, "missing_required_parameter", "tools[0].name"),
    ({"tools": [{**TOOL, "n": 2}]}, 400, "unknown_parameter", "tools[0].n"),
    ({"tools": [{**TOOL, "model": "nano"}]}, 400, "invalid_value", "tools[0].model"),
    ({"tools": [{**TOOL, "size": "1x1"}]}, 400, "invalid_value", "tools[0].size"),
    (
        {"tools": [{**TOOL, "partial_images": 4}]},
        400,
        "integer_above_max_value",
        "tools[0].partial_images",
    ),
    ({"tools": [{**TOOL, "action": "edit"}]}, 400, "invalid_value", "tools[0].action"),
    ({"tools": [], "tool_choice": {"type": "image_generation"}}, 400, None, "tool_choice"),
    ({"input": [{"type": "song"}]}, 400, "invalid_value", "input[0].type"),
    ({"input": [{"role": "king", "content": "x"}]}, 400, "invalid_value", "input[0].role"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        400,
        "invalid_image_url",
        "input[0].content[0].image_url",
    ),
    ({"input": [{"type": "image_generation_call", "id": "ig_1"}]}, 404, None, "input"),
]


@pytest.mark.parametrize(("fields", "status", "code", "param"), REFUSED)
def test_what_is_refused(
    server: SandboxServer,
    http: httpx.Client,
    fields: dict[str, Json],
    status: int,
    code: str | None,
    param: str | None,
) -> None:
    body = {"model": MODEL, "input": "A lighthouse", "tools": [TOOL], **fields}
    answer = http.post("/responses", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert server.journal.billed == []


def test_faults(server: SandboxServer, sdk: OpenAI, http: httpx.Client) -> None:
    server.rules.add(Rule(path="/responses", method="POST", times=1, status=500))
    server.rules.add(Rule(model="gpt-5", times=1, status=503))
    server.rules.add(Rule(prompt="cut me", times=1, cut_before_headers=True))
    server.rules.add(Rule(path="/responses/*", times=1, status=429))
    with pytest.raises(InternalServerError):
        ask(sdk)
    with pytest.raises(InternalServerError):
        ask(sdk, model="gpt-5")
    with pytest.raises(httpx.RemoteProtocolError):
        http.post("/responses", json={"model": MODEL, "input": "cut me"})
    assert [record.status for record in server.journal] == [500, 503, None]
    assert server.journal.billed_requests == 1
    made = ask(sdk)
    with pytest.raises(APIError):
        sdk.responses.retrieve(made.id)
    assert sdk.responses.retrieve(made.id) == made


def test_usage_that_is_missing_or_wrong(server: SandboxServer, sdk: OpenAI) -> None:
    server.rules.add(Rule(times=1, no_tool_usage=True))
    server.rules.add(Rule(times=1, no_usage=True))
    server.rules.add(Rule(times=1, data_count=3))
    assert ask(sdk).tool_usage is None
    assert ask(sdk).usage is None
    many = ask(sdk, max_tool_calls=2)
    assert len(pictures(many)) == 2
    assert many.tool_usage is not None
    assert many.tool_usage.image_gen.output_tokens == 2 * LOW
    assert [record.images for record in server.journal] == [1, 1, 2]
    assert billed(server)[f"{FLARE}, image output"] == Decimal(4 * LOW * 30) / 10**6


def test_a_response_that_fails(server: SandboxServer, sdk: OpenAI) -> None:
    server.rules.add(Rule(times=1, response_status="failed", response_error="invalid_image"))
    server.rules.add(Rule(times=1, response_status="failed", data_count=1, no_usage=True))
    first, second = ask(sdk), ask(sdk)
    assert (first.status, first.output) == ("failed", [])
    assert first.error is not None
    assert first.error.code == "invalid_image"
    assert (second.status, second.usage, len(pictures(second))) == ("failed", None, 1)
