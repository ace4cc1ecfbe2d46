"""Scripted faults, over a real socket."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import pytest
from openai import (
    APIConnectionError,
    APIError,
    AuthenticationError,
    InternalServerError,
    OpenAI,
    RateLimitError,
)

from gateway.domain.call import Json
from gateway.sandbox.app import create_sandbox
from gateway.sandbox.journal import Journal
from gateway.sandbox.rules import Drip, Rule, Rules, rule_from_json
from gateway.sandbox.server import SandboxServer, serve_sandbox
from gateway.sandbox.watch import Gate
from gateway.sandbox.wire import ConnectionCut
from tests.clock import StillClock
from tests.sandbox.calls import FLARE, generate

CHEAP = 1000


def read(http: httpx.Client, **fields: Json) -> tuple[bytes, bool]:
    """What arrived of an answer's body, and whether it was whole."""
    body = {"model": FLARE, "prompt": "A lighthouse", **fields}
    got = b""
    with http.stream("POST", "/images/generations", json=body) as answer:
        try:
            for chunk in answer.iter_raw():
                got += chunk
        except httpx.RemoteProtocolError:
            return got, False
    return got, True


def test_a_key_that_may_not_list_models(server: SandboxServer, sdk: OpenAI) -> None:
    server.rules.add(Rule(path="/models", key=sdk.api_key, times=1, status=401))
    with pytest.raises(AuthenticationError):
        sdk.models.list()
    assert FLARE in {model.id for model in sdk.models.list()}
    server.rules.add(Rule(path="/models", key="another", status=401))
    assert sdk.models.list().data


def test_a_rate_limit_twice(server: SandboxServer, sdk: OpenAI) -> None:
    server.rules.add(Rule(times=2, status=429, headers={"Retry-After": "1"}))
    for _ in range(2):
        with pytest.raises(RateLimitError) as refused:
            sdk.images.generate(model=FLARE, prompt="x")
        assert refused.value.code == "rate_limit_exceeded"
        assert refused.value.response.headers["retry-after"] == "1"
    assert len(server.rules) == 0
    sdk.images.generate(model=FLARE, prompt="x")
    assert [record.status for record in server.journal] == [429, 429, 200]
    assert server.journal.billed_requests == 1


def test_an_error_of_the_api_and_one_of_its_edge(server: SandboxServer, http: httpx.Client) -> None:
    server.rules.add(Rule(times=1, status=500))
    server.rules.add(Rule(times=1, status=502))
    server.rules.add(Rule(times=1, status=503, body={"error": "busy"}))
    server.rules.add(Rule(times=1, status=418, body=b"teapot", content_type="text/x-tea"))
    first, second, third, fourth = (generate(http) for _ in range(4))
    assert first.json()["error"]["type"] == "server_error"
    assert second.headers["content-type"] == "text/html; charset=UTF-8"
    assert "cf-ray" in second.headers
    assert "<h1>502 Bad Gateway</h1>" in second.text
    assert third.json() == {"error": "busy"}
    assert (fourth.text, fourth.headers["content-type"]) == ("teapot", "text/x-tea")
    assert server.journal.billed == []


def test_a_status_meets_requests_that_are_wrong_too(
    server: SandboxServer, http: httpx.Client
) -> None:
    server.rules.add(Rule(status=500))
    assert generate(http, foo=1).status_code == 500


def test_only_what_matches(server: SandboxServer, http: httpx.Client) -> None:
    server.rules.add(Rule(path="/images/edits", status=500))
    server.rules.add(Rule(model="gpt-image-2", status=501))
    server.rules.add(Rule(prompt="cat", status=502))
    server.rules.add(Rule(payload_bytes=CHEAP))
    assert generate(http).status_code == 200
    assert generate(http, model="gpt-image-2").status_code == 501
    assert generate(http, prompt="a cat").status_code == 502


def test_a_cut_in_the_middle_of_the_body(server: SandboxServer, http: httpx.Client) -> None:
    server.rules.add(Rule(times=1, payload_bytes=200_000, cut_after_bytes=70_000))
    got, whole = read(http)
    assert (len(got), whole) == (70_000, False)
    assert server.journal[0].billed_at is not None
    assert generate(http).status_code == 200


def test_a_cut_looks_like_a_lost_connection_to_the_sdk(server: SandboxServer, sdk: OpenAI) -> None:
    server.rules.add(Rule(cut_after_bytes=100))
    with pytest.raises(APIConnectionError):
        sdk.images.generate(model=FLARE, prompt="x")


@pytest.mark.parametrize("billed", [None, True, False])
def test_a_cut_before_the_headers(
    server: SandboxServer, http: httpx.Client, billed: bool | None
) -> None:
    server.rules.add(Rule(cut_before_headers=True, payload_bytes=CHEAP, billed=billed))
    with pytest.raises(httpx.RemoteProtocolError):
        generate(http)
    assert len(server.journal.billed) == (billed is not False)
    assert server.journal[0].status is None


def test_a_dripping_body(server: SandboxServer, http: httpx.Client) -> None:
    server.rules.add(Rule(payload_bytes=CHEAP, drip=Drip(500, 0.05)))
    started = time.monotonic()
    got, whole = read(http)
    assert whole
    assert len(got) > CHEAP
    assert time.monotonic() - started >= 0.1


def test_a_delay(server: SandboxServer, http: httpx.Client) -> None:
    server.rules.add(Rule(payload_bytes=CHEAP, delay_seconds=0.2))
    assert generate(http).elapsed.total_seconds() >= 0.2


def test_a_gate_from_another_thread(server: SandboxServer, http: httpx.Client) -> None:
    gate = Gate()
    server.rules.add(Rule(wait_for=gate, payload_bytes=CHEAP))
    answers: list[int] = []
    asking = threading.Thread(target=lambda: answers.append(generate(http).status_code))
    asking.start()
    gate.wait_arrived()
    assert server.journal.billed == []
    assert answers == []
    gate.set()
    asking.join()
    assert answers == [200]


async def test_a_client_that_leaves_is_billed_all_the_same(clock: StillClock) -> None:
    gate = Gate()
    rules = Rules()
    rules.add(Rule(wait_for=gate, payload_bytes=CHEAP))
    headers = {"authorization": "Bearer any"}
    async with (
        serve_sandbox(clock, rules=rules) as running,
        httpx.AsyncClient(base_url=running.base_url, headers=headers, verify=False) as http,
    ):
        body = {"model": FLARE, "prompt": "x"}
        asking = asyncio.create_task(http.post("/images/generations", json=body))
        await gate.arrived()
        asking.cancel()
        gate.set()
        await running.journal.until(lambda: running.journal.billed_requests == 1)


def test_leaving_the_block_ends_what_is_held(clock: StillClock) -> None:
    gate = Gate()
    with SandboxServer(clock) as server:
        server.rules.add(Rule(wait_for=gate))
        lost: list[Exception] = []

        def ask() -> None:
            try:
                headers = {"authorization": "Bearer any"}
                body = {"model": FLARE, "prompt": "x"}
                httpx.post(
                    f"{server.base_url}/images/generations",
                    json=body,
                    headers=headers,
                    verify=False,
                )
            except httpx.TransportError as error:
                lost.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        gate.wait_arrived()
    asking.join()
    assert len(lost) == 1


def test_what_the_usage_says(server: SandboxServer, http: httpx.Client) -> None:
    server.rules.add(Rule(times=1, payload_bytes=CHEAP, no_usage=True))
    server.rules.add(Rule(times=1, payload_bytes=CHEAP, usage=None))
    server.rules.add(Rule(times=1, payload_bytes=CHEAP, usage={"output_tokens": -1}))
    assert "usage" not in generate(http).json()
    assert generate(http).json()["usage"] is None
    assert generate(http).json()["usage"] == {"output_tokens": -1}
    bills = [record.usage for record in server.journal.billed]
    assert isinstance(bills[0], dict)
    assert bills[0]["output_tokens"] == 439
    assert bills[1:] == [None, {"output_tokens": -1}]


def test_successes_that_are_none(server: SandboxServer, http: httpx.Client) -> None:
    server.rules.add(Rule(times=1, error_in_200=True))
    server.rules.add(Rule(times=1, empty_data=True))
    server.rules.add(Rule(times=1, empty_body=True))
    server.rules.add(Rule(times=1, html_200=True))
    error, no_data, nothing, page = (generate(http) for _ in range(4))
    assert {answer.status_code for answer in (error, no_data, nothing, page)} == {200}
    assert error.json()["error"]["code"] == "server_error"
    assert no_data.json()["data"] == []
    assert nothing.content == b""
    assert page.text.startswith("<!DOCTYPE html>")
    assert server.journal.billed_requests == 4


def test_other_shapes(server: SandboxServer, http: httpx.Client) -> None:
    server.rules.add(Rule(times=1, url_instead=True))
    server.rules.add(Rule(times=1, data_count=1, payload_bytes=CHEAP))
    server.rules.add(Rule(times=1, extra_fields={"id": "x", "size": "1x1"}, headers={"X-A": "b"}))
    server.rules.add(Rule(times=1, gzip=True))
    server.rules.add(Rule(times=1, redirect="https://example.com/"))
    assert list(generate(http).json()["data"][0]) == ["url"]
    fewer = generate(http, n=3).json()
    assert (len(fewer["data"]), fewer["usage"]["output_tokens"]) == (1, 439)
    extra = generate(http)
    assert (extra.json()["id"], extra.json()["size"]) == ("x", "1x1")
    assert list(extra.json())[-1] == "usage"
    assert extra.headers["x-a"] == "b"
    zipped = generate(http)
    assert zipped.headers["content-encoding"] == "gzip"
    assert zipped.json()["quality"] == "medium"
    moved = generate(http)
    assert (moved.status_code, moved.headers["location"]) == (307, "https://example.com/")


def test_large_payloads_are_cheap_and_each_another(
    server: SandboxServer, http: httpx.Client
) -> None:
    server.rules.add(Rule(payload_bytes=2_700_001))
    first, second = (generate(http).json()["data"][0]["b64_json"] for _ in range(2))
    assert len(first) == 2_700_004
    assert first != second
    assert first.startswith("iVBORw0KGgo")


def events(body: bytes) -> list[bytes]:
    return [event.partition(b"\n")[0] for event in body.split(b"\n\n") if event]


PARTIAL, COMPLETED = b"event: image_generation.partial_image", b"event: image_generation.completed"


@pytest.mark.parametrize(
    ("rule", "expected", "whole"),
    [
        (Rule(), [PARTIAL, PARTIAL, COMPLETED], True),
        (Rule(done_marker=True), [PARTIAL, PARTIAL, COMPLETED, b"data: [DONE]"], True),
        (Rule(sse_error_after=1), [PARTIAL, b"event: error"], True),
        (Rule(sse_error_after=9), [PARTIAL, PARTIAL, b"event: error"], True),
        (Rule(sse_cut_after=0), [], False),
        (Rule(sse_cut_after=1), [PARTIAL], False),
        (Rule(sse_no_completed=True), [PARTIAL, PARTIAL], True),
        (Rule(sse_garbage=True), [PARTIAL, PARTIAL, b"data: {this is no JSON"], True),
        (Rule(empty_body=True), [], True),
    ],
)
def test_streams(
    server: SandboxServer, http: httpx.Client, rule: Rule, expected: list[bytes], whole: bool
) -> None:
    server.rules.add(rule)
    got, complete = read(http, stream=True, partial_images=2)
    assert events(got) == expected
    assert complete is whole
    assert server.journal.billed_requests == 1


@pytest.mark.parametrize(("after", "partials"), [(0, 0), (1, 1), (9, 2)])
def test_a_stream_is_held_behind_its_partial_images(
    server: SandboxServer, http: httpx.Client, after: int, partials: int
) -> None:
    gate = Gate()
    server.rules.add(Rule(wait_for=gate, wait_after=after, payload_bytes=CHEAP))
    body = {"model": FLARE, "prompt": "x", "stream": True, "partial_images": 2}
    with http.stream("POST", "/images/generations", json=body) as answer:
        gate.wait_arrived()
        chunks, got = answer.iter_bytes(), b""
        while got.count(b"\n\n") < partials:
            got += next(chunks)
        assert events(got) == [PARTIAL] * partials
        gate.set()
        got += b"".join(chunks)
    assert events(got) == [PARTIAL, PARTIAL, COMPLETED]
    assert gate.arrivals == 1


def test_what_is_no_stream_is_not_held_behind_anything(
    server: SandboxServer, http: httpx.Client
) -> None:
    server.rules.add(Rule(wait_for=Gate(), wait_after=0, payload_bytes=CHEAP))
    assert generate(http).status_code == 200


def test_a_stream_cut_within_an_event(server: SandboxServer, http: httpx.Client) -> None:
    server.rules.add(Rule(payload_bytes=CHEAP, cut_after_bytes=1500))
    got, whole = read(http, stream=True, partial_images=2)
    assert b"0\r\n\r\n" not in got
    assert (len(got), whole) == (1500, False)


def test_the_sdk_sees_an_error_in_a_stream(server: SandboxServer, sdk: OpenAI) -> None:
    server.rules.add(Rule(sse_error_after=1))
    with (
        pytest.raises(APIError, match="The server had an error"),
        sdk.images.generate(model=FLARE, prompt="x", stream=True, partial_images=2) as stream,
    ):
        list(stream)


def test_json_though_a_stream_was_asked_for(server: SandboxServer, http: httpx.Client) -> None:
    server.rules.add(Rule(json_for_stream=True, payload_bytes=CHEAP))
    answer = generate(http, stream=True)
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.json()["data"]) == 1


def test_events_are_flushed_one_by_one(server: SandboxServer, http: httpx.Client) -> None:
    server.rules.add(Rule(payload_bytes=CHEAP, drip=Drip(10_000, 0)))
    body = {"model": FLARE, "prompt": "x", "stream": True, "partial_images": 3}
    with http.stream("POST", "/images/generations", json=body) as answer:
        assert answer.headers["transfer-encoding"] == "chunked"
        assert len(list(answer.iter_lines())) == 12


def test_without_its_own_server_a_cut_is_an_exception(clock: StillClock) -> None:
    app = create_sandbox(clock)
    app.state.sandbox.rules.add(Rule(cut_before_headers=True, payload_bytes=CHEAP))

    async def ask() -> None:
        headers = {"authorization": "Bearer any"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x/v1") as http:
            body = {"model": FLARE, "prompt": "x"}
            await http.post("/images/generations", json=body, headers=headers)

    with pytest.raises(ConnectionCut):
        asyncio.run(ask())


def test_control_from_outside(server: SandboxServer, sdk: OpenAI) -> None:
    rules, journal = f"{server.origin}/sandbox/rules", f"{server.origin}/sandbox/journal"
    made = httpx.post(rules, json={"times": 1, "status": 503, "prompt": "x"}, verify=False)
    assert (made.status_code, made.json()) == (201, {"rules": 1})
    with pytest.raises(InternalServerError):
        sdk.images.generate(model=FLARE, prompt="x")
    assert httpx.delete(rules).json() == {"rules": 0}
    sdk.images.generate(model=FLARE, prompt="x")
    read_back = httpx.get(journal, verify=False).json()
    assert (read_back["received"], read_back["billed_images"]) == (2, 1)
    last = read_back["records"][-1]
    assert last["fields"] == {"model": FLARE, "prompt": "x"}
    assert last["usage"]["total_tokens"] == 440
    assert ["authorization", "..."] in last["headers"]
    assert httpx.post(rules, json={"stauts": 1}, verify=False).status_code == 400


def test_no_control_unless_asked_for(clock: StillClock) -> None:
    with SandboxServer(clock) as server:
        assert httpx.get(f"{server.origin}/sandbox/journal", verify=False).status_code == 401


@pytest.mark.parametrize(
    "bad",
    [
        [],
        {"nothing": 1},
        {"wait_for": "x"},
        {"wait_after": 1},
        {"status": "500"},
        {"status": True},
        {"times": -1},
        {"drip": [0, 1]},
        {"drip": True},
        {"headers": {"a": 1}},
        {"extra_fields": []},
        {"gzip": 1},
        {"path": 5},
        {"delay_seconds": "1"},
    ],
)
def test_rules_that_are_none(bad: Json) -> None:
    with pytest.raises(ValueError, match=r"rule|value"):
        rule_from_json(bad)


def test_a_rule_from_json() -> None:
    rule = rule_from_json(
        {"drip": [10, 0.5], "usage": None, "headers": {"a": "b"}, "delay_seconds": 1, "gzip": True}
    )
    assert rule == Rule(
        drip=Drip(10, 0.5), usage=None, headers={"a": "b"}, delay_seconds=1, gzip=True
    )
    of_responses: dict[str, Json] = {
        "method": "GET",
        "path": "/responses/*",
        "response_status": "failed",
        "response_error": "invalid_image",
        "no_tool_usage": True,
        "tool_usage": {"input_tokens": 1},
    }
    assert rule_from_json(of_responses) == Rule(
        method="GET",
        path="/responses/*",
        response_status="failed",
        response_error="invalid_image",
        no_tool_usage=True,
        tool_usage={"input_tokens": 1},
    )


@pytest.mark.parametrize(
    ("wanted", "path", "fits"),
    [
        ("/images/edits", "/v1/images/edits", True),
        ("/responses/*", "/v1/responses/resp_1", True),
        ("/responses/*", "/v1/responses", False),
        ("/responses/*", "/v1/responses/resp_1/cancel", False),
        ("/files/*/content", "/v1/files/file-1/content", True),
        ("/files/*", "/v1/files/file-1/content", False),
    ],
)
def test_a_path_with_a_star(wanted: str, path: str, fits: bool) -> None:
    assert Rule(path=wanted).matches(path, "", "") is fits


def test_the_journal_is_bounded(clock: StillClock) -> None:
    with (
        SandboxServer(clock, journal=Journal(records=2, body_bytes=10)) as server,
        httpx.Client(
            base_url=server.base_url, headers={"authorization": "Bearer a"}, verify=False
        ) as http,
    ):
        server.rules.add(Rule(payload_bytes=CHEAP))
        for number in range(3):
            generate(http, prompt=f"number {number}")
        assert server.journal.received == 3
        assert [record.fields["prompt"] for record in server.journal] == ["number 1", "number 2"]
        assert len(server.journal[0].body) == 10
        assert server.journal[0].body_bytes > 10
        server.journal.clear()
        assert (len(server.journal), server.journal.received) == (0, 0)


def test_the_journal_can_be_off(clock: StillClock) -> None:
    with (
        SandboxServer(clock, journal=Journal(records=0)) as server,
        httpx.Client(
            base_url=server.base_url, headers={"authorization": "Bearer a"}, verify=False
        ) as http,
    ):
        generate(http)
        assert len(server.journal) == 0
        assert server.journal.billed_images == 1
