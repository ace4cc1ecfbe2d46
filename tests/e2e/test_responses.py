"""Responses through the front door with the real SDK: two models in one answer, both priced; each
team's ids its own; what the client does not wait for is bought all the same."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response

from gateway.domain.ledger import Outcome
from gateway.domain.money import format_dollars, say_dollars
from gateway.domain.receipt import Receipt
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from tests.e2e.test_files import uploaded
from tests.running import MODEL, OTHER_KEY, GatewayUnderTest, Start
from tests.valkey import eventually

TEXT = "gpt-5-mini"
SUNBURST = "gpt-image-2.6-sunburst"
MODELS = {TEXT: {"upstream": "openai"}, SUNBURST: {"upstream": "openai"}}
SETTINGS: dict[str, Any] = {"models": MODELS}
TOOL: Any = {
    "type": "image_generation",
    "model": MODEL,
    "quality": "low",
    "size": "1024x1024",
}
TEXT_IN, TEXT_OUT = 250, 2_000
"""Nano-dollars a token of gpt-5-mini; below, those of gpt-image-2.5-flare."""
PROMPT_IN, IMAGE_IN, IMAGE_OUT = 5_000, 8_000, 30_000


async def drawn(sdk: AsyncOpenAI, **more: Any) -> Response:
    asked: dict[str, Any] = {"model": TEXT, "input": "draw a cat", "tools": [TOOL], **more}
    response = await sdk.responses.create(**asked)
    assert isinstance(response, Response)
    return response


def parts(response: Mapping[str, Any]) -> tuple[int, int]:
    """What the text and what the pictures cost, in nano-dollars, by both usages of contract 3.4."""
    usage = response["usage"]
    cached = usage["input_tokens_details"]["cached_tokens"]
    text = (usage["input_tokens"] - cached) * TEXT_IN + cached * TEXT_IN // 10
    text += usage["output_tokens"] * TEXT_OUT
    tool = response["tool_usage"]["image_gen"]
    details = tool["input_tokens_details"]
    pictures = details["text_tokens"] * PROMPT_IN + details["image_tokens"] * IMAGE_IN
    return text, pictures + tool["output_tokens"] * IMAGE_OUT


def costs(response: Mapping[str, Any]) -> int:
    """Of both, in nano-dollars."""
    return sum(parts(response))


def picture_of(response: Response) -> str:
    return next(item.id for item in response.output if item.type == "image_generation_call")


def sent(sandbox: SandboxServer) -> dict[str, Any]:
    """The body of the last response that was asked for upstream."""
    made = [one for one in sandbox.journal if one.path == "/v1/responses"]
    body: dict[str, Any] = json.loads(made[-1].body)
    return body


def events_of(text: str) -> list[dict[str, Any]]:
    lines = (line for line in text.splitlines() if line.startswith("data: "))
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def bought_by(gateway: GatewayUnderTest) -> Receipt:
    """The receipt of the only response, once it is over."""
    while True:
        for receipt, _ in gateway.told.requests:
            if receipt.operation == "response":
                return receipt
        await gateway.told.until(len(gateway.told.requests) + 1)


async def settled(gateway: GatewayUnderTest, count: int) -> None:
    await gateway.told.until(count)
    assert await gateway.gateway.ledger.open_holds() == 0


async def test_a_response_draws_and_both_models_are_paid_for(start: Start) -> None:
    async with start(SETTINGS) as gateway, gateway.sdk() as sdk:
        raw = await sdk.responses.with_raw_response.create(
            model=TEXT, input="draw a cat", tools=[TOOL]
        )
        response = raw.parse()
        (call,) = (item for item in response.output if item.type == "image_generation_call")
        assert call.result is not None
        assert base64.b64decode(call.result).startswith(b"\x89PNG")

        cost = costs(response.model_dump())
        assert raw.headers["x-cost-usd"] == format_dollars(cost)
        assert raw.headers["x-cost-basis"] == "usage"
        assert raw.headers["x-cache"] == "off"
        changed = "max_output_tokens=16384, max_tool_calls=4"
        assert raw.headers["x-gateway-changed"] == changed
        await settled(gateway, 1)
        wrote, drew = await gateway.usage()
        text, picture = parts(response.model_dump())
        assert (wrote.model, wrote.cost, wrote.images, wrote.requests) == (TEXT, text, 0, 1)
        assert (drew.model, drew.cost, drew.images, drew.requests) == (MODEL, picture, 1, 0)
        assert drew.image_out > 0 == wrote.image_out
        assert gateway.told.last.price_id == (
            "openai/gpt-5-mini@2026-01-01+openai/gpt-image-2.5-flare@2026-09-08"
        )
        assert gateway.told.last.bound > cost


async def test_each_model_is_counted_under_its_own_name(start: Start) -> None:
    """In the metrics, and in the line of the request: the picture is the larger part."""
    async with start(SETTINGS) as gateway, gateway.sdk() as sdk:
        response = await drawn(sdk)
        text, picture = parts(response.model_dump())
        await settled(gateway, 1)
        found = await gateway.metrics()

        def of(name: str, model: str, more: str = "") -> float | None:
            labels = f'endpoint="response",model="{model}",team="growth"'
            return found.get(f"{name}{{{more}{labels}}}")

        for model, cost, images in ((TEXT, text, 0), (MODEL, picture, 1)):
            assert of("gateway_spend_usd_total", model) == pytest.approx(cost / 10**9)
            assert of("gateway_images_total", model, 'cache="off",') == images
        tokens = {
            (model, direction, modality): found.get(
                f'gateway_tokens_total{{direction="{direction}",modality="{modality}",'
                f'model="{model}",team="growth"}}'
            )
            for model in (TEXT, MODEL)
            for direction, modality in (("in", "text"), ("out", "text"), ("out", "image"))
        }
        usage, tool = response.usage, response.model_dump()["tool_usage"]["image_gen"]
        assert usage is not None
        assert tokens == {
            (TEXT, "in", "text"): usage.input_tokens,
            (TEXT, "out", "text"): usage.output_tokens,
            (TEXT, "out", "image"): None,
            (MODEL, "in", "text"): tool["input_tokens_details"]["text_tokens"],
            (MODEL, "out", "text"): None,
            (MODEL, "out", "image"): tool["output_tokens"],
        }
        assert gateway.told.last.drawn is not None
        assert (gateway.told.last.drawn.model, gateway.told.last.drawn.cost) == (MODEL, picture)


async def test_only_what_is_not_said_is_filled_in(start: Start, sandbox: SandboxServer) -> None:
    body = b'{ "model":"gpt-5-mini", "max_tool_calls": 1,\n"input":"a cat", "tools":[%b] }' % (
        json.dumps(TOOL).encode()
    )
    async with start(SETTINGS) as gateway, gateway.http() as http:
        answer = await http.post(
            "/responses", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 200
        assert answer.headers["x-gateway-changed"] == "max_output_tokens=16384"
        (record,) = sandbox.journal
        assert record.body == b'{"max_output_tokens":16384,' + body[1:]


async def test_events_pass_untouched_and_the_last_one_waits_for_the_settlement(
    start: Start, sandbox: SandboxServer
) -> None:
    asked = {
        "model": TEXT,
        "input": "a cat",
        "stream": True,
        "background": True,  # so that the upstream can tell it again, for comparison
        "tools": [TOOL | {"partial_images": 2}],
    }
    async with start(SETTINGS) as gateway, gateway.http() as http:
        answer = await http.post("/responses", json=asked)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "x-cost-usd" not in answer.headers
        assert answer.headers["x-cost-bound-usd"]
        events = events_of(answer.text)
        kinds = [event["type"] for event in events]
        assert kinds.count("response.image_generation_call.partial_image") == 2
        assert kinds[-1] == "response.completed"
        await settled(gateway, 1)
        found = {row.model: row.cost for row in await gateway.usage()}
        text, picture = parts(events[-1]["response"])
        assert found == {TEXT: text, MODEL: picture}

        path = f"/responses/{events[-1]['response']['id']}?stream=true"
        upstream = {"authorization": "Bearer sk-upstream-secret"}
        async with httpx.AsyncClient(
            base_url=sandbox.base_url, headers=upstream, verify=False
        ) as direct:
            assert answer.content == (await direct.get(path)).content
        assert answer.content == (await http.get(path)).content


async def test_a_conversation_goes_on_where_it_is(start: Start, sandbox: SandboxServer) -> None:
    two = {"upstreams": {"openai": {"api_keys": ["sk-upstream-one", "sk-upstream-two"]}}}
    async with start({**SETTINGS, **two}) as gateway, gateway.sdk() as sdk:
        first = await drawn(sdk)
        second = await drawn(sdk, input="now with a hat", previous_response_id=first.id)
        third = await drawn(
            sdk,
            input=[
                {"type": "image_generation_call", "id": picture_of(second)},
                {"role": "user", "content": "and a moustache"},
            ],
        )
        assert third.status == "completed"
        keys = {record.header("authorization") for record in sandbox.journal}
        assert len(keys) == 1  # the project that knows the ids
        await gateway.told.until(3)
        bounds = [receipt.bound for receipt, _ in gateway.told.requests]
        assert bounds[1] > bounds[0]  # what was said before is read again
        assert bounds[2] > bounds[0]


async def test_a_file_is_a_picture_of_the_input(start: Start) -> None:
    async with start(SETTINGS) as gateway, gateway.sdk() as sdk:
        file = await uploaded(sdk)
        content = [
            {"type": "input_text", "text": "a hat for it"},
            {"type": "input_image", "file_id": file.id, "detail": "auto"},
        ]
        response = await drawn(sdk, input=[{"role": "user", "content": content}])
        assert response.status == "completed"
        tool = response.model_dump()["tool_usage"]["image_gen"]
        assert tool["input_tokens_details"]["image_tokens"] > 0


async def test_nobody_sees_another_teams_ids(start: Start, sandbox: SandboxServer) -> None:
    async with start(SETTINGS) as gateway, gateway.sdk() as sdk, gateway.sdk(OTHER_KEY) as other:
        mine = await drawn(sdk)
        file = await uploaded(sdk)
        before = len(sandbox.journal)
        inputs: list[dict[str, Any]] = [
            {"previous_response_id": mine.id},
            {"input": [{"type": "image_generation_call", "id": picture_of(mine)}]},
            {"input": [{"type": "item_reference", "id": mine.output[-1].id}]},
            {"input": [{"id": picture_of(mine)}]},
            {"input": [{"type": None, "id": mine.output[-1].id}]},
            {"input": [{"type": "item_reference", "id": picture_of(mine)}]},
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": file.id}]}]},
        ]
        for more in inputs:
            with pytest.raises(openai.NotFoundError) as refused:
                await drawn(other, **more)
            assert refused.value.param is not None
        routes = (
            other.responses.retrieve(mine.id),
            other.responses.delete(mine.id),
            other.responses.cancel(mine.id),
            other.responses.input_items.list(mine.id),
            other.responses.retrieve("resp_unknown"),
        )
        texts = set()
        for route in routes:
            with pytest.raises(openai.NotFoundError) as refused:
                await route
            texts.add(refused.value.message.replace(mine.id, "ID").replace("resp_unknown", "ID"))
        assert len(texts) == 1
        assert len(sandbox.journal) == before
        denied = await gateway.metrics()
        assert denied['gateway_cross_team_denied_total{kind="response"}'] == 5
        assert (await sdk.responses.retrieve(mine.id)).id == mine.id


async def test_the_owner_looks_a_response_up_and_deletes_it(start: Start) -> None:
    async with start(SETTINGS) as gateway, gateway.sdk() as sdk:
        made = await drawn(sdk)
        again = await sdk.responses.retrieve(made.id, include=["message.input_image.image_url"])
        assert again.output == made.output
        items = await sdk.responses.input_items.list(made.id, limit=1)
        assert [item.type for item in items.data] == ["message"]
        with pytest.raises(openai.BadRequestError):
            await sdk.responses.cancel(made.id)
        await sdk.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.retrieve(made.id)
        told = await gateway.told.until(6)
        assert [receipt.operation for receipt, _ in told] == ["response"] + ["response_lookup"] * 5
        assert [receipt.cost for receipt, _ in told[1:]] == [0] * 5


async def test_a_budget_without_room_refuses_with_the_whole_bound(
    start: Start, sandbox: SandboxServer
) -> None:
    changes = {**SETTINGS, "teams": {"growth": {"budget": {"day": "0.05"}}}}
    async with start(changes) as gateway, gateway.sdk() as sdk:
        with pytest.raises(openai.RateLimitError) as refused:
            await drawn(sdk)
        assert refused.value.code == "insufficient_quota"
        assert len(sandbox.journal) == 0
        ((receipt, _),) = await gateway.told.until(1)
        assert f"could cost up to {say_dollars(receipt.bound)}" in refused.value.message
        response = await drawn(sdk, max_tool_calls=1, max_output_tokens=2_000)
        assert response.status == "completed"


async def test_pictures_are_required_unless_the_operator_says_otherwise(start: Start) -> None:
    async with start(SETTINGS) as gateway, gateway.sdk() as sdk:
        with pytest.raises(openai.BadRequestError) as refused:
            await sdk.responses.create(model=TEXT, input="hello")
        assert refused.value.code == "image_tool_required"
    allowed = {**SETTINGS, "responses": {"without_image_tool": "allow"}}
    async with start(allowed) as gateway, gateway.sdk() as sdk:
        raw = await sdk.responses.with_raw_response.create(model=TEXT, input="hello")
        response = raw.parse()
        usage = response.usage
        assert usage is not None
        cost = usage.input_tokens * TEXT_IN + usage.output_tokens * TEXT_OUT
        assert raw.headers["x-cost-usd"] == format_dollars(cost)
        assert raw.headers["x-gateway-changed"] == "max_output_tokens=16384"


async def test_both_models_have_to_be_allowed(start: Start, sandbox: SandboxServer) -> None:
    only_text = {**SETTINGS, "teams": {"growth": {"models": [TEXT, "team-art"]}}}
    async with start(only_text) as gateway, gateway.sdk() as sdk:
        for tool in (TOOL, {"type": "image_generation"}):
            with pytest.raises(openai.PermissionDeniedError) as refused:
                await drawn(sdk, tools=[tool])
            assert refused.value.param == "tools[0].model"
        assert len(sandbox.journal) == 0
        # An alias is written as its upstream knows it.
        await drawn(sdk, tools=[{"type": "function", "name": "f"}, TOOL | {"model": "team-art"}])
        assert sent(sandbox)["tools"] == [{"type": "function", "name": "f"}, TOOL]


async def test_the_default_of_the_tool_is_said(start: Start, sandbox: SandboxServer) -> None:
    async with start(SETTINGS) as gateway, gateway.sdk() as sdk:
        await drawn(sdk, tools=[{"type": "image_generation", "quality": "low"}])
        assert sent(sandbox)["tools"][0]["model"] == SUNBURST


async def test_a_failed_response_is_paid_for_as_it_says(
    start: Start, sandbox: SandboxServer
) -> None:
    async with start(SETTINGS) as gateway, gateway.sdk() as sdk:
        sandbox.rules.add(Rule(times=1, response_status="failed"))
        failed = await drawn(sdk)
        assert failed.status == "failed"
        assert failed.usage is not None
        await settled(gateway, 1)
        assert gateway.told.last.outcome is Outcome.BROKEN
        assert gateway.told.last.cost == failed.usage.output_tokens * TEXT_OUT + (
            failed.usage.input_tokens * TEXT_IN
        )
        # Where it says nothing, nobody knows: the bound, until a later truth corrects it.
        sandbox.rules.add(Rule(times=1, response_status="failed", no_usage=True))
        assert (await drawn(sdk)).status == "failed"
        (_, (unknown, _)) = await gateway.told.until(2)
        assert unknown.outcome is Outcome.UNKNOWN
        assert unknown.cost == unknown.bound


async def test_pictures_without_a_bill_cost_the_bound(start: Start, sandbox: SandboxServer) -> None:
    async with start(SETTINGS) as gateway, gateway.sdk() as sdk:
        sandbox.rules.add(Rule(times=1, no_tool_usage=True))
        await drawn(sdk)
        await settled(gateway, 1)
        last = gateway.told.last
        assert (last.cost, last.basis.value) == (last.bound, "estimated")
        assert "no_usage" in last.flags
        # The picture was seen; what of the bound is whose, nobody knows.
        wrote, drew = await gateway.usage()
        assert (drew.model, drew.images, drew.cost) == (MODEL, 1, 0)
        assert (wrote.model, wrote.images, wrote.cost) == (TEXT, 0, last.bound)


async def test_a_stream_that_is_cut_ends_in_a_flat_error_and_is_unresolved(
    start: Start, sandbox: SandboxServer
) -> None:
    async with start(SETTINGS) as gateway, gateway.http() as http:
        sandbox.rules.add(Rule(times=1, cut_after_bytes=6_000))
        asked = {"model": TEXT, "input": "a cat", "stream": True, "tools": [TOOL]}
        answer = await http.post("/responses", json=asked)
        events = events_of(answer.text)
        last = events[-1]
        assert last["type"] == "error"
        assert last["code"] == "upstream_bad_response"
        assert last["sequence_number"] == events[-2]["sequence_number"] + 1
        assert set(last) == {"type", "code", "message", "param", "sequence_number"}
        await settled(gateway, 1)
        assert gateway.told.last.outcome is Outcome.UNKNOWN
        assert gateway.told.last.cost == gateway.told.last.bound


async def test_a_client_that_leaves_in_the_middle_is_still_booked(
    start: Start, sandbox: SandboxServer
) -> None:
    held = Gate()
    sandbox.rules.add(Rule(times=1, wait_for=held, wait_after=1))
    async with start(SETTINGS) as gateway, gateway.sdk() as sdk:
        tool = TOOL | {"partial_images": 2}
        stream = await sdk.responses.create(model=TEXT, input="a cat", stream=True, tools=[tool])
        async for event in stream:
            if event.type.endswith("partial_image"):
                break
        await stream.close()
        held.set()
        await settled(gateway, 1)
        assert gateway.told.last.outcome is Outcome.DELIVERED
        assert gateway.told.last.images == 1


async def test_a_retry_joins_the_response_that_is_under_way(
    start: Start, sandbox: SandboxServer
) -> None:
    held = Gate()
    sandbox.rules.add(Rule(times=1, wait_for=held))
    async with start(SETTINGS) as gateway, gateway.http() as http:
        asked = {"model": TEXT, "input": "a cat", "tools": [TOOL]}
        first = asyncio.create_task(http.post("/responses", json=asked))
        await held.arrived()
        retried = {"x-stainless-retry-count": "1"}
        second = asyncio.create_task(http.post("/responses", json=asked, headers=retried))
        await gateway.gateway.ledger.ping()
        held.set()
        one, two = await asyncio.gather(first, second)
        assert one.content == two.content
        assert two.headers["x-cache"] == "join"
        assert two.headers["x-cost-usd"] == "0"
        assert len(sandbox.journal) == 1
        # The picture of both answers counts with the model that drew it, and was paid for once.
        await settled(gateway, 2)
        text, picture = parts(one.json())

        async def both_count() -> bool:
            return [row.images for row in await gateway.usage()] == [0, 2]

        # What costs nothing is counted behind its answer.
        await eventually(both_count)
        wrote, drew = await gateway.usage()
        assert (drew.model, drew.requests, drew.images, drew.cost) == (MODEL, 0, 2, picture)
        assert (wrote.model, wrote.requests, wrote.images, wrote.cost) == (TEXT, 2, 0, text)
        assert (wrote.cached_requests, wrote.avoided) == (1, text + picture)


async def test_in_the_background_it_is_looked_after_until_it_is_over(
    start: Start, sandbox: SandboxServer
) -> None:
    held = Gate()
    sandbox.rules.add(Rule(times=1, path="/responses", wait_for=held))
    async with start(SETTINGS) as gateway, gateway.sdk() as sdk:
        raw = await sdk.responses.with_raw_response.create(
            model=TEXT, input="a cat", tools=[TOOL], background=True
        )
        queued = raw.parse()
        assert queued.status == "queued"
        assert raw.headers["x-cost-bound-usd"]
        assert await gateway.gateway.ledger.open_holds() == 1
        assert (await sdk.responses.retrieve(queued.id)).status in ("queued", "in_progress")
        held.set()
        bought = await bought_by(gateway)
        response = await sdk.responses.retrieve(queued.id)
        assert response.status == "completed"
        assert bought.cost == costs(response.model_dump())
        assert bought.images == 1
        # What it has drawn is its team's from then on.
        assert (await drawn(sdk, previous_response_id=queued.id)).status == "completed"


async def test_a_stream_in_the_background_has_its_owner_before_it_names_itself(
    start: Start, sandbox: SandboxServer
) -> None:
    held = Gate()
    sandbox.rules.add(Rule(times=1, wait_for=held, wait_after=1))
    async with start(SETTINGS) as gateway, gateway.sdk() as sdk, gateway.sdk(OTHER_KEY) as other:
        tool = TOOL | {"partial_images": 2}
        stream = await sdk.responses.create(
            model=TEXT, input="a cat", stream=True, background=True, tools=[tool]
        )
        first = await anext(aiter(stream))
        assert first.type == "response.created"
        name, before = first.response.id, len(sandbox.journal)
        assert (await sdk.responses.retrieve(name)).id == name
        resumed = await sdk.responses.retrieve(name, stream=True, starting_after=1)
        assert (await anext(aiter(resumed))).sequence_number == 2
        await resumed.close()
        # The sandbox has drawn all of it before its first event, so it says what it can of that.
        with pytest.raises(openai.BadRequestError, match="completed response"):
            await sdk.responses.cancel(name)
        assert len(sandbox.journal) == before + 3
        for route in (other.responses.retrieve(name), other.responses.cancel(name)):
            with pytest.raises(openai.NotFoundError):
                await route
        await stream.close()
        held.set()
        bought = await bought_by(gateway)
        assert bought.images == 1
        assert bought.outcome is Outcome.DELIVERED


async def test_an_item_by_its_id_is_as_long_as_it_was(start: Start, sandbox: SandboxServer) -> None:
    usage: Any = {
        "input_tokens": 1_000,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 16_000,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 17_000,
    }
    sandbox.rules.add(Rule(times=1, usage=usage))
    async with start(SETTINGS) as gateway, gateway.sdk() as sdk:
        long = await drawn(sdk)
        again = {"type": "item_reference", "id": long.output[-1].id}
        said = {"role": "user", "content": "x" * len(json.dumps(again))}
        await drawn(sdk, input=[said])
        await drawn(sdk, input=[{"role": "user", "content": ""}, again])
        await drawn(sdk, input=[said, {"type": "item_reference", "id": picture_of(long)}])
        assert sent(sandbox)["input"][1]["id"] == picture_of(long)
        told = await gateway.told.until(4)
        plain, item, picture = (receipt.bound for receipt, _ in told[1:])
        # Read in each of five turns, and by the image model at each of four calls.
        assert item - plain > 5 * 16_000 * TEXT_IN
        assert picture - plain > 5 * 6_000 * TEXT_IN
        # What the client has sent itself has an id too, and can be sent again.
        (heard,) = (await sdk.responses.input_items.list(long.id)).data
        with pytest.raises(openai.NotFoundError, match="Send an item of its input as it is"):
            await drawn(sdk, input=[said, {"type": "item_reference", "id": heard.id}])


async def test_what_is_cancelled_in_the_background_is_unresolved(
    start: Start, sandbox: SandboxServer
) -> None:
    held = Gate()
    sandbox.rules.add(Rule(times=1, path="/responses", wait_for=held))
    async with start(SETTINGS) as gateway, gateway.sdk() as sdk:
        queued = await drawn(sdk, background=True)
        assert (await sdk.responses.cancel(queued.id)).status == "cancelled"
        held.set()
        bought = await bought_by(gateway)
        assert bought.outcome is Outcome.UNKNOWN
        assert bought.cost == bought.bound


async def test_a_response_that_is_not_stored_leaves_nothing_to_go_on_with(start: Start) -> None:
    async with start(SETTINGS) as gateway, gateway.sdk() as sdk:
        made = await drawn(sdk, store=False)
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.retrieve(made.id)


async def test_switched_off_there_are_no_responses(start: Start) -> None:
    async with (
        start({**SETTINGS, "responses": {"enabled": False}}) as gateway,
        gateway.sdk() as sdk,
    ):
        with pytest.raises(openai.NotFoundError, match="does not offer"):
            await drawn(sdk)
        with pytest.raises(openai.NotFoundError, match="switched off"):
            await sdk.responses.retrieve("resp_1")


# The names of its two models


CHANGED = "x-gateway-changed"
FILLED = "max_output_tokens=16384, max_tool_calls=4"


async def asked_with(gateway: GatewayUnderTest, **tool: Any) -> httpx.Response:
    """The answer to a response whose image tool says this."""
    said = {"type": "image_generation", "quality": "low", "size": "1024x1024", **tool}
    async with gateway.http() as http:
        return await http.post(
            "/responses", json={"model": TEXT, "input": "draw a cat", "tools": [said]}
        )


@pytest.mark.parametrize("said", ["dall-e-3", "team-art", None])
async def test_the_tools_model_is_routed_as_the_call_is_and_told(
    start: Start, sandbox: SandboxServer, said: str | None
) -> None:
    aliases = {"dall-e-3": "team-art", SUNBURST: MODEL}
    models = {TEXT: {"upstream": "openai"}}
    async with start({"models": models, "compat": {"aliases": aliases}}) as gateway:
        answer = await asked_with(gateway, **({} if said is None else {"model": said}))
        assert answer.status_code == 200, answer.text
        assert answer.headers[CHANGED] == f"{FILLED}, tools[0].model={MODEL}"
        assert sent(sandbox)["tools"][0]["model"] == MODEL
        receipt = await bought_by(gateway)
        assert receipt.changed == ("max_output_tokens", "max_tool_calls", "tool_model")
        metrics = await gateway.metrics()
        assert metrics['gateway_requests_changed_total{change="tool_model"}'] == 1


async def test_a_tools_model_is_told_as_its_own_upstream_calls_it(
    start: Start, sandbox: SandboxServer
) -> None:
    upstream = {"kind": "openai", "base_url": sandbox.base_url, "api_keys": ["sk-2"]}
    art = [{"upstream": "openai", "model": SUNBURST}, {"upstream": "second", "model": MODEL}]
    changes = {
        "upstreams": {"second": upstream},
        "models": {TEXT: {"upstream": "second"}, "art": {"upstreams": art}},
    }
    async with start(changes) as gateway:
        answer = await asked_with(gateway, model="art")
        assert answer.headers[CHANGED] == f"{FILLED}, tools[0].model={MODEL}"


async def test_a_tool_without_a_model_whose_default_cannot_be_had(start: Start) -> None:
    models = {**MODELS, "gpt-image-1": {"upstream": "openai"}}
    teams = {"growth": {"models": [TEXT, MODEL, "gpt-image-2", "gpt-image-1"]}}
    async with start({"models": models, "teams": teams}) as gateway:
        answer = await asked_with(gateway)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (
            *(403, "model_not_allowed"),
            "tools[0].model",
        )
        assert error["message"] == (
            f"The image tool names no model, and OpenAI's default {SUNBURST} is not allowed for "
            f"team growth. Name one in 'tools[0].model': gpt-image-2, {MODEL}."
        )


async def test_a_default_that_is_not_served(start: Start, no_star: None) -> None:
    async with start({"models": {TEXT: {"upstream": "openai"}}}) as gateway:
        answer = await asked_with(gateway)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (404, "model_not_found")
        assert error["message"] == (
            f"The image tool names no model, and OpenAI's default {SUNBURST} is not served here. "
            f"Name one in 'tools[0].model': gpt-image-2, {MODEL}, team-art."
        )


@pytest.mark.parametrize("model", ["dall-e-3", "gpt-image-1"])
async def test_a_tool_that_would_draw_with_what_is_gone(start: Start, model: str) -> None:
    async with start({"models": {**MODELS, "dall-e-3": {"upstream": "openai"}}}) as gateway:
        answer = await asked_with(gateway, model=model, quality="hd")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (
            *(404, "model_retired"),
            "tools[0].model",
        )
        assert error["message"].endswith(f"Use {MODEL}.")


async def test_both_models_of_it_may_end(start: Start) -> None:
    rows = [
        {
            "upstream": "openai",
            "model": TEXT,
            "shuts_down": "2026-12-05",
            "usd_per_million_tokens": {"text_in": "0.25", "text_out": 2},
            "max_output_tokens": 128_000,
        }
    ]
    async with start({**SETTINGS, "prices": {"rows": rows}}) as gateway:
        answer = await asked_with(gateway, model="gpt-image-1.5")
        assert answer.status_code == 200, answer.text
        assert answer.headers["sunset"] == "Tue, 01 Dec 2026 00:00:00 GMT"
        assert answer.headers["x-gateway-warning"] == (
            f"{TEXT} shuts down on 2026-12-05. gpt-image-1.5 shuts down on 2026-12-01; use {MODEL}."
        )
        answer = await asked_with(gateway, model=MODEL)
        assert answer.headers["x-gateway-warning"] == f"{TEXT} shuts down on 2026-12-05."


async def test_each_kind_of_model_at_the_others_place(start: Start) -> None:
    draws = f"{TEXT} is a text model: it draws no pictures here. "
    ends = "; GET /v1/models lists yours."
    async with start(SETTINGS) as gateway:
        async with gateway.http() as http:
            picture = await http.post(
                "/images/generations", json={"model": TEXT, "prompt": "a cat"}
            )
            response = await http.post(
                "/responses", json={"model": MODEL, "input": "a cat", "tools": [TOOL]}
            )
        tool = await asked_with(gateway, model=TEXT)
        for answer, param, says in (
            (picture, "model", f"{draws}Ask for an image model{ends}"),
            (tool, "tools[0].model", f"{draws}Name an image model{ends}"),
            (
                *(response, "model"),
                f"{MODEL} is an image model: it answers no responses here. Ask for a text model, "
                f"and name this one in the tool image_generation{ends}",
            ),
        ):
            error = answer.json()["error"]
            assert (answer.status_code, error["message"]) == (400, says)
            assert (error["code"], error["param"]) == ("invalid_value", param)
        assert len(gateway.sandbox.journal) == 0


async def test_the_least_that_it_may_write(start: Start) -> None:
    async with start(SETTINGS) as gateway, gateway.http() as http:
        asked = {"model": TEXT, "input": "a cat", "tools": [TOOL], "max_output_tokens": 15}
        answer = await http.post("/responses", json=asked)
        assert answer.status_code == 400
        assert "'max_output_tokens': this gateway takes 16 to 16384." in answer.text
        answer = await http.post("/responses", json={**asked, "max_output_tokens": 16})
        assert answer.status_code == 200
