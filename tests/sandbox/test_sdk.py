"""The real SDK against the sandbox."""

from __future__ import annotations

import base64
import hashlib
import io

import httpx
import pytest
from openai import APIError, AsyncOpenAI, OpenAI

from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer, serve_sandbox
from tests.clock import StillClock
from tests.sandbox.calls import FLARE, generate, picture, png


def test_generate(sdk: OpenAI) -> None:
    answer = sdk.images.generate(model=FLARE, prompt="A lighthouse", n=3, quality="low")
    assert answer.data is not None
    assert len({image.b64_json for image in answer.data}) == 3
    assert answer.usage is not None
    assert answer.usage.output_tokens == 588


async def test_generate_in_the_running_loop(clock: StillClock) -> None:
    async with (
        serve_sandbox(clock) as running,
        AsyncOpenAI(base_url=running.base_url, api_key="any", max_retries=0) as sdk,
    ):
        answer = await sdk.images.generate(model=FLARE, prompt="A lighthouse")
        assert answer.data is not None
        assert picture(answer.data[0].b64_json).size == (1024, 1024)
        assert running.journal[0].header("x-stainless-async") == "async:asyncio"


def test_stream_with_partial_images(server: SandboxServer, sdk: OpenAI) -> None:
    with sdk.images.generate(
        model=FLARE, prompt="A lighthouse", stream=True, partial_images=2, quality="low"
    ) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    indexes = [getattr(event, "partial_image_index", None) for event in events]
    assert indexes == [0, 1, None]
    assert len({event.b64_json for event in events}) == 3
    assert {picture(event.b64_json).size for event in events} == {(1024, 1024)}
    last = events[-1]
    assert last.type == "image_generation.completed"
    assert last.usage.output_tokens == 396
    assert last.usage.total_tokens == 399
    [record] = server.journal.billed
    assert record.usage == last.usage.to_dict()


def test_stream_is_written_as_openai_writes_it(http: httpx.Client) -> None:
    answer = generate(http, stream=True, partial_images=0)
    assert answer.headers["content-type"].startswith("text/event-stream")
    head, _, rest = answer.text.partition('"b64_json":"')
    assert head == (
        'event: image_generation.completed\ndata: {"type":"image_generation.completed",'
    )
    assert rest.partition('",')[2] == (
        '"background":"opaque","created_at":1795348800,"output_format":"png","quality":"medium",'
        '"size":"1024x1024","usage":{"input_tokens":3,"input_tokens_details":{"image_tokens":0,'
        '"text_tokens":3},"output_tokens":439,"total_tokens":442}}\n\n'
    )


def test_a_stream_of_two_adds_up_to_its_bill(server: SandboxServer, sdk: OpenAI) -> None:
    with sdk.images.generate(model=FLARE, prompt="Hi", stream=True, n=2, quality="low") as stream:
        ends = [event for event in stream if event.type == "image_generation.completed"]
    assert [end.usage.total_tokens for end in ends] == [197, 196]
    usage = server.journal[0].usage
    assert isinstance(usage, dict)
    assert usage["total_tokens"] == 393


def test_edit_of_one(server: SandboxServer, sdk: OpenAI) -> None:
    content = png(200, 100)
    answer = sdk.images.edit(
        model=FLARE,
        prompt="A hat",
        image=("cat.png", content, "image/png"),
        mask=("mask.png", png(200, 100), "image/png"),
        n=2,
        extra_body={"safety_identifier": "me"},
    )
    assert answer.data is not None
    assert len(answer.data) == 2
    [record] = server.journal
    assert [(file.field, file.filename) for file in record.files] == [
        ("image", "cat.png"),
        ("mask", "mask.png"),
    ]
    assert record.files[0].sha256 == hashlib.sha256(content).hexdigest()
    assert record.files[0].size_bytes == len(content)
    assert record.fields == {
        "model": FLARE,
        "prompt": "A hat",
        "n": "2",
        "safety_identifier": "me",
    }
    assert hashlib.sha256(record.body).hexdigest() == record.body_sha256


def test_edit_of_a_list_streamed(server: SandboxServer, sdk: OpenAI) -> None:
    pictures = [("a.png", png(), "image/png"), ("b.png", png(), "image/png")]
    with sdk.images.edit(
        model=FLARE, prompt="Both", image=pictures, stream=True, partial_images=1
    ) as stream:
        kinds = [event.type for event in stream]
    assert kinds == ["image_edit.partial_image", "image_edit.completed"]
    assert [file.field for file in server.journal[0].files] == ["image[]", "image[]"]


def test_edit_of_nested_fields(sdk: OpenAI, server: SandboxServer) -> None:
    sdk.images.edit(
        model=FLARE,
        prompt="A hat",
        image=("a.png", png(), "image/png"),
        extra_body={"output_format": "svg", "svg": {"model": "m", "reasoning": {"effort": "low"}}},
    )
    svg = {"model": "m", "reasoning": {"effort": "low"}}
    assert server.journal[0].fields["svg"] == svg


def test_bytes_without_a_name_are_refused_as_openai_does(sdk: OpenAI) -> None:
    with pytest.raises(APIError) as refused:
        sdk.images.edit(model=FLARE, prompt="A hat", image=io.BytesIO(png()))
    assert refused.value.code == "unsupported_file_mimetype"


def test_edit_in_json(server: SandboxServer, http: httpx.Client) -> None:
    content = png(80, 60)
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    body = {
        "model": FLARE,
        "prompt": "A hat",
        "images": [{"image_url": url}, {"image_url": url}],
        "mask": {"image_url": url},
    }
    answer = http.post("/images/edits", json=body)
    assert answer.status_code == 200
    assert answer.json()["usage"]["input_tokens_details"]["image_tokens"] == 2914
    files = server.journal[0].files
    assert [file.field for file in files] == [
        "images[0].image_url",
        "images[1].image_url",
        "mask.image_url",
    ]
    assert {file.sha256 for file in files} == {hashlib.sha256(content).hexdigest()}


def test_headers_like_openais(http: httpx.Client) -> None:
    headers = generate(http).headers
    assert headers["x-request-id"].startswith("req_")
    assert headers["openai-version"] == "2020-10-01"
    assert headers["openai-organization"] == "org-sandbox"
    assert headers["openai-processing-ms"].isdigit()
    assert headers["x-ratelimit-limit-requests"] == "500"
    assert "__cf_bm" in headers["set-cookie"]


def test_latency(clock: StillClock) -> None:
    with SandboxServer(clock, latency_seconds=0.2) as server:
        server.rules.add(Rule(payload_bytes=40))
        headers = {"authorization": "Bearer any"}
        with httpx.Client(base_url=server.base_url, headers=headers, verify=False) as http:
            assert generate(http).elapsed.total_seconds() >= 0.2
