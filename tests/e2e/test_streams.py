"""Pictures that come in pieces: each leaves as it comes, the last one once it is booked."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import pytest
from openai import APIError, APIStatusError, AsyncOpenAI, RateLimitError
from openai.types import (
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
    ImageGenStreamEvent,
)

from gateway.domain.ledger import UsageRow
from gateway.domain.receipt import Receipt
from gateway.relay import purchase
from gateway.sandbox.rules import Rule
from tests.running import MODEL, GatewayUnderTest, Start
from tests.upstream.raw_server import Peer, raw_server

ASKED: dict[str, Any] = {
    "model": MODEL,
    "prompt": "A lighthouse",
    "quality": "low",
    "size": "1024x1024",
}
"""Costs $0.005895, and $0.003 more for each partial picture; its bound is $0.000205 higher."""
COST, BOUND, PARTIAL = 5_895_000, 6_100_000, 3_000_000
USAGE = b'{"input_tokens":3,"output_tokens":196,"total_tokens":199}'
SERVER_ERROR = "The server had an error while processing your request. Sorry about that!"


def quick(gateway: GatewayUnderTest, **fault: Any) -> None:
    """Streams from the sandbox that need no drawing."""
    gateway.sandbox.rules.add(Rule(**{"payload_bytes": 400, **fault}))


def event(kind: str, *members: bytes, picture: bytes = b"iVBORw0KGgoA") -> bytes:
    name = f"image_generation.{kind}".encode()
    said = b",".join((b'{"type":"%b","b64_json":"%b"' % (name, picture), *members))
    return b"event: %b\ndata: %b}\n\n" % (name, said)


PARTIAL_EVENT = event("partial_image", b'"partial_image_index":0')
COMPLETED_EVENT = event("completed", b'"size":"1024x1024"', b'"usage":' + USAGE)


def streams(gateway: GatewayUnderTest, body: bytes, **more: Any) -> None:
    """Lets the upstream answer every request with these very bytes of events."""
    rule = Rule(status=200, body=body, content_type="text/event-stream", **more)
    gateway.sandbox.rules.add(rule)


async def events_of(
    sdk: AsyncOpenAI, partial_images: int | None = None, **changes: Any
) -> list[ImageGenStreamEvent]:
    asked = {**ASKED, **changes}
    if partial_images is not None:
        asked["partial_images"] = partial_images
    return [one async for one in await sdk.images.generate(stream=True, **asked)]


async def booked(gateway: GatewayUnderTest) -> UsageRow:
    """The only row of the books (empty where nothing was booked); and nothing is left on hold."""
    assert await gateway.gateway.ledger.open_holds() == 0
    rows = await gateway.usage()
    assert len(rows) <= 1
    return rows[0] if rows else UsageRow("", "", "", "")


async def only_receipt(gateway: GatewayUnderTest) -> Receipt:
    [(receipt, _)] = await gateway.told.until(1)
    return receipt


@pytest.mark.parametrize("partial_images", [None, 0, 1, 2, 3])
async def test_a_stream_costs_what_its_completed_event_says(
    gateway: GatewayUnderTest, partial_images: int | None
) -> None:
    quick(gateway)
    count = partial_images or 0
    async with gateway.sdk() as sdk:
        *partials, last = await events_of(sdk, partial_images)
    assert len(partials) == count
    assert all(isinstance(one, ImageGenPartialImageEvent) for one in partials)
    assert isinstance(last, ImageGenCompletedEvent)
    assert last.usage.output_tokens == 196 + 100 * count
    assert last.size == "1024x1024"
    receipt = await only_receipt(gateway)
    assert receipt.bound == BOUND + count * PARTIAL
    row = await booked(gateway)
    assert (row.cost, row.images, row.flagged) == (COST + count * PARTIAL, 1, 0)


async def test_a_stream_says_its_bound_while_the_cost_is_not_known(
    gateway: GatewayUnderTest,
) -> None:
    quick(gateway)
    asked = {**ASKED, "stream": True, "partial_images": 1}
    async with gateway.http() as http:
        answer = await http.post("/images/generations", json=asked)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-cost-bound-usd"] == "0.0091"
    assert "x-cost-usd" not in answer.headers
    for name in ("openai-organization", "set-cookie", "x-ratelimit-limit-requests"):
        assert name not in answer.headers


async def test_a_stream_without_partial_pictures_says_its_exact_cost(
    gateway: GatewayUnderTest,
) -> None:
    quick(gateway)
    async with gateway.http() as http:
        answer = await http.post("/images/generations", json={**ASKED, "stream": True})
    assert answer.headers["x-cost-usd"] == "0.005895"
    assert answer.headers["x-cost-basis"] == "usage"


async def test_the_events_pass_byte_for_byte(gateway: GatewayUnderTest) -> None:
    """Comments, CRLF, odd fields, white space and all."""
    odd = (
        b": hello\r\n\r\nextra: 7\r\nretry: 10\r\n"
        + PARTIAL_EVENT.replace(b"\n", b"\r\n")
        + b"event: image_generation.hint\ndata: {}\n\n: ping\n\n"
        + COMPLETED_EVENT.replace(b"data: {", b'data:{"odd" : "caf\xc3\xa9",')
        + b"data: [DONE]\n\n"
    )
    streams(gateway, odd)
    async with gateway.http() as http:
        answer = await http.post("/images/generations", json={**ASKED, "stream": True})
    assert answer.content == odd
    assert (await only_receipt(gateway)).status == 200
    assert (await booked(gateway)).cost == COST


async def test_partial_pictures_arrive_while_the_picture_is_still_being_made(
    start: Start,
) -> None:
    go_on = asyncio.Event()

    async def upstream(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        await peer.send(PARTIAL_EVENT)
        await go_on.wait()
        await peer.send(COMPLETED_EVENT)

    async with (
        raw_server(upstream) as server,
        start(at(server.port)) as gateway,
        gateway.sdk() as sdk,
    ):
        stream = await sdk.images.generate(stream=True, partial_images=1, **ASKED)
        first = await anext(stream)
        assert isinstance(first, ImageGenPartialImageEvent)
        # The upstream has sent nothing more: the money is held, and nothing is booked.
        assert await gateway.gateway.ledger.open_holds() == 1
        assert await gateway.usage() == []
        assert gateway.gateway.flights.count == 1
        go_on.set()
        last = await anext(stream)
        assert isinstance(last, ImageGenCompletedEvent)
        # The picture has left only after it was booked.
        assert (await booked(gateway)).cost == COST
        await stream.close()


def at(port: int) -> dict[str, Any]:
    return {"upstreams": {"openai": {"base_url": f"http://127.0.0.1:{port}/v1"}}}


async def test_an_upstream_that_lingers_behind_its_picture_keeps_nobody(start: Start) -> None:
    """The completed picture reaches the client although the upstream does not end the body."""
    seen = asyncio.Event()

    async def upstream(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        await peer.send(COMPLETED_EVENT)
        await seen.wait()

    async with (
        raw_server(upstream) as server,
        start(at(server.port)) as gateway,
        gateway.sdk() as sdk,
    ):
        stream = await sdk.images.generate(stream=True, **ASKED)
        assert isinstance(await anext(stream), ImageGenCompletedEvent)
        assert (await booked(gateway)).cost == COST
        seen.set()
        await stream.close()


@pytest.mark.parametrize("done_marker", [True, False])
async def test_done_is_passed_on_where_there_is_one(
    gateway: GatewayUnderTest, done_marker: bool
) -> None:
    quick(gateway, done_marker=done_marker)
    async with gateway.sdk() as sdk, gateway.http() as http:
        assert len(await events_of(sdk)) == 1
        asked = {**ASKED, "prompt": "Another", "stream": True}
        raw = (await http.post("/images/generations", json=asked)).text
    assert raw.endswith("data: [DONE]\n\n") is done_marker
    assert raw.count("event: image_generation.completed") == 1


async def test_two_pictures_in_one_stream(gateway: GatewayUnderTest) -> None:
    quick(gateway)
    async with gateway.sdk() as sdk:
        events = await events_of(sdk, 1, n=2)
    kinds = [one.type.rpartition(".")[2] for one in events]
    assert kinds == ["partial_image", "completed"] * 2
    row = await booked(gateway)
    assert (row.images, row.cost) == (2, 2 * (196 + 100) * 30_000 + 15_000)


async def test_a_last_event_without_its_blank_line_is_not_lost(gateway: GatewayUnderTest) -> None:
    """Python's SDK would drop it (contract 4.7)."""
    streams(gateway, COMPLETED_EVENT.removesuffix(b"\n"))
    async with gateway.sdk() as sdk:
        [last] = await events_of(sdk)
    assert isinstance(last, ImageGenCompletedEvent)
    assert (await booked(gateway)).cost == COST


async def test_json_for_a_stream_becomes_one_completed_event(gateway: GatewayUnderTest) -> None:
    quick(gateway, json_for_stream=True)
    async with gateway.sdk() as sdk:
        [last] = await events_of(sdk, 2)
    assert isinstance(last, ImageGenCompletedEvent)
    assert last.b64_json.startswith("iVBORw0KGgoA")
    assert (last.quality, last.size, last.usage.output_tokens) == ("low", "1024x1024", 196)
    assert last.created_at == 1795348800
    assert (await booked(gateway)).cost == COST


async def test_json_with_two_pictures_is_no_stream(gateway: GatewayUnderTest) -> None:
    quick(gateway, json_for_stream=True)
    async with gateway.sdk(max_retries=2) as sdk:
        with pytest.raises(APIStatusError) as raised:
            await events_of(sdk, n=2)
    assert (raised.value.status_code, raised.value.code) == (502, "upstream_bad_response")
    assert len(gateway.sandbox.journal) == 1
    assert (await booked(gateway)).cost == 2 * 196 * 30_000 + 15_000


async def test_a_stream_for_json_becomes_one_answer(gateway: GatewayUnderTest) -> None:
    streams(gateway, PARTIAL_EVENT + COMPLETED_EVENT)
    async with gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.generate(**ASKED)
    document = json.loads(answer.content)
    assert document["data"] == [{"b64_json": "iVBORw0KGgoA"}]
    assert document["usage"] == json.loads(USAGE)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-cost-usd"] == "0.005895"


async def test_a_stream_of_two_pictures_is_no_answer_in_json(gateway: GatewayUnderTest) -> None:
    """It has no agreed form; what was bought is booked."""
    streams(gateway, COMPLETED_EVENT * 2)
    async with gateway.sdk(max_retries=2) as sdk:
        with pytest.raises(APIStatusError) as raised:
            await sdk.images.generate(**ASKED, n=2)
    assert (raised.value.status_code, raised.value.code) == (502, "upstream_bad_response")
    assert len(gateway.sandbox.journal) == 1
    assert (await booked(gateway)).cost == 2 * COST


EARLY: dict[str, tuple[dict[str, Any], int, str]] = {
    "bad request": ({"status": 400}, 400, ""),
    "overloaded": ({"status": 503}, 503, "overloaded"),
    "edge": ({"status": 504}, 504, "upstream_outcome_unknown"),
    "an error in a 200": ({"error_in_200": True}, 502, "server_error"),
    "an event of an error": ({"sse_error_after": 0}, 502, "server_error"),
    "html": ({"html_200": True}, 502, "upstream_bad_response"),
    "nothing": ({"empty_body": True}, 502, "upstream_bad_response"),
    "garbage": ({"sse_garbage": True}, 502, "upstream_bad_response"),
    "no completed": ({"sse_no_completed": True}, 502, "upstream_bad_response"),
    "cut": ({"sse_cut_after": 0}, 502, "upstream_bad_response"),
    "no answer": ({"cut_before_headers": True}, 502, "upstream_outcome_unknown"),
}
FREE = {"bad request", "overloaded", "an error in a 200", "an event of an error"}


@pytest.mark.parametrize("name", EARLY)
async def test_an_error_before_the_first_picture_is_an_ordinary_error(
    gateway: GatewayUnderTest, name: str
) -> None:
    fault, status, code = EARLY[name]
    quick(gateway, **fault)
    async with gateway.sdk(max_retries=0 if name == "overloaded" else 2) as sdk:
        with pytest.raises(APIStatusError) as raised:
            await events_of(sdk)
    error = raised.value
    assert (error.status_code, error.code or "") == (status, code)
    assert error.response.headers["content-type"] == "application/json"
    assert error.response.headers.get("x-should-retry", "false") == "false"
    assert len(gateway.sandbox.journal) == (2 if name == "overloaded" else 1)
    row = await booked(gateway)
    assert row.cost == (0 if name in FREE else BOUND)
    assert row.images == 0


@dataclass(frozen=True)
class MidStream:
    """A stream that ends badly behind its first partial picture."""

    fault: dict[str, Any]
    code: str = "upstream_bad_response"
    says: str = "not retried for you"
    unresolved: int = 1


HELD = BOUND + 2 * PARTIAL
MID_STREAM = {
    "error event": MidStream({"sse_error_after": 1}, "server_error", SERVER_ERROR, 0),
    "cut": MidStream({"sse_cut_after": 1}, says="buy it twice"),
    "cut inside an event": MidStream({"cut_after_bytes": 1000}, says="buy it twice"),
    "garbage": MidStream({"sse_garbage": True}),
    "no completed": MidStream({"sse_no_completed": True}),
    "done without completed": MidStream({"sse_no_completed": True, "done_marker": True}),
    "flat error": MidStream(
        {
            "status": 200,
            "content_type": "text/event-stream",
            "body": PARTIAL_EVENT + b'data: {"type":"error","message":"out of paint"}\n\n',
        },
        "",
        "out of paint",
        0,
    ),
}


@pytest.mark.parametrize("case", MID_STREAM.values(), ids=MID_STREAM)
async def test_an_error_behind_a_partial_picture_is_raised_and_booked(
    gateway: GatewayUnderTest, case: MidStream
) -> None:
    quick(gateway, **case.fault)
    seen = []

    async def watch(sdk: AsyncOpenAI) -> None:
        async for one in await sdk.images.generate(stream=True, partial_images=2, **ASKED):
            seen.append(one)

    async with gateway.sdk(max_retries=2) as sdk:
        with pytest.raises(APIError) as raised:
            await watch(sdk)
    assert seen
    assert all(isinstance(one, ImageGenPartialImageEvent) for one in seen)
    assert (raised.value.code or "") == case.code
    assert case.says in raised.value.message
    await only_receipt(gateway)
    assert len(gateway.sandbox.journal) == 1
    row = await booked(gateway)
    assert (row.cost, row.images) == (HELD, 0)
    assert row.unresolved == case.unresolved
    metrics = await gateway.metrics()
    assert metrics[f'gateway_spend_estimated_usd_total{{model="{MODEL}"}}'] == HELD / 1_000_000_000


async def test_the_error_event_has_the_one_form_that_both_sdks_raise(
    gateway: GatewayUnderTest,
) -> None:
    streams(gateway, PARTIAL_EVENT + b'event: image_generation.partial_image\ndata: {"ty')
    async with gateway.http() as http:
        answer = await http.post("/images/generations", json={**ASKED, "stream": True})
    assert answer.status_code == 200
    assert answer.text.startswith(PARTIAL_EVENT.decode())
    last = answer.text.removeprefix(PARTIAL_EVENT.decode())
    assert last.startswith('event: error\ndata: {"error":{"message":"')
    assert last.endswith("}}\n\n")
    assert last.count("\n") == 3
    error = json.loads(last.partition("data: ")[2])["error"]
    assert error.keys() == {"message", "type", "param", "code"}


async def test_the_second_of_two_pictures_is_missing(gateway: GatewayUnderTest) -> None:
    """What came is delivered and booked by its usage, and not kept."""
    quick(gateway, data_count=1)
    async with gateway.sdk() as sdk:
        assert len(await events_of(sdk, n=2)) == 1
        row = await booked(gateway)
        assert (row.cost, row.images) == (COST, 1)
        await events_of(sdk, n=2)
    assert len(gateway.sandbox.journal) == 2


@pytest.mark.parametrize(
    ("usage", "flag"),
    [({"no_usage": True}, "no_usage"), ({"usage": {"output_tokens": -1}}, "invalid_usage")],
    ids=["none", "invalid"],
)
async def test_a_completed_picture_without_a_bill_costs_the_bound(
    gateway: GatewayUnderTest, usage: dict[str, Any], flag: str
) -> None:
    quick(gateway, **usage)
    async with gateway.sdk() as sdk:
        assert len(await events_of(sdk)) == 1
    assert (await only_receipt(gateway)).flags == (flag,)
    row = await booked(gateway)
    assert (row.cost, row.images, row.flagged) == (BOUND, 1, 1)


async def test_a_stream_over_the_budget_is_refused_before_it_begins(start: Start) -> None:
    async with start({"teams": {"growth": {"budget": {"day": 0.001}}}}) as gateway:
        async with gateway.sdk(max_retries=2) as sdk:
            with pytest.raises(RateLimitError) as raised:
                await events_of(sdk)
        assert raised.value.code == "insufficient_quota"
        assert len(await gateway.told.until(1)) == 1
        assert len(gateway.sandbox.journal) == 0


async def test_a_client_that_leaves_a_stream_finds_its_picture_in_the_cache(
    start: Start,
) -> None:
    go_on = asyncio.Event()

    async def upstream(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        await peer.send(PARTIAL_EVENT)
        await go_on.wait()
        await peer.send(COMPLETED_EVENT)

    async with (
        raw_server(upstream) as server,
        start(at(server.port)) as gateway,
        gateway.sdk() as sdk,
    ):
        stream = await sdk.images.generate(stream=True, partial_images=1, **ASKED)
        await anext(stream)
        await stream.response.aclose()
        go_on.set()
        await gateway.told.until(1)
        assert (await booked(gateway)).cost == COST
        [last] = await events_of(sdk, 1)
        assert isinstance(last, ImageGenCompletedEvent)
        assert server.accepted == 1


async def test_a_stream_that_comes_byte_by_byte_is_the_same_stream(start: Start) -> None:
    body = PARTIAL_EVENT + COMPLETED_EVENT + b"data: [DONE]\n\n"

    async def upstream(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        for place in range(len(body)):
            await peer.send(body[place : place + 1])
            await asyncio.sleep(0)

    async with (
        raw_server(upstream) as server,
        start(at(server.port)) as gateway,
        gateway.http() as http,
    ):
        answer = await http.post("/images/generations", json={**ASKED, "stream": True})
        assert answer.content == body
        assert (await booked(gateway)).cost == COST


async def test_a_fault_of_our_own_does_not_end_a_stream_as_if_it_were_whole(
    gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(purchase, "charge", broken)
    seen: list[str] = []
    async with gateway.sdk() as sdk:
        stream = await sdk.images.generate(
            model=MODEL, prompt="p", quality="low", stream=True, partial_images=1
        )

        async def watch() -> None:
            async for event in stream:
                seen.append(event.type)

        with pytest.raises(APIError) as raised:
            await watch()
    assert seen == ["image_generation.partial_image"]
    assert raised.value.code == "internal_error"
