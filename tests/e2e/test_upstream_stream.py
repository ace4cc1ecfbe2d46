"""JSON for the client, events from the upstream: for walls that cut what is silent for too long."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError
from PIL import Image

import tests.running
from gateway.domain.route import Catalogue, Model
from gateway.sandbox.rules import Rule
from gateway.settings import Settings, load
from tests.e2e import test_node
from tests.e2e.test_streams import (
    ASKED,
    BOUND,
    COMPLETED_EVENT,
    COST,
    PARTIAL_EVENT,
    at,
    booked,
    only_receipt,
)
from tests.raw import BOUNDARY, FORM, JSON, Field, RawAnswer, RawClient, form, texts
from tests.running import KEY, MODEL, GatewayUnderTest, Start
from tests.upstream.raw_server import Peer, raw_server


def always(model: Model) -> Model:
    return replace(
        model,
        target=replace(model.target, stream_always=True),
        others=tuple(replace(other, stream_always=True) for other in model.others),
    )


@pytest.fixture(autouse=True)
def upstream_stream_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model of every gateway here has ``upstream_stream: always``."""

    def loaded(*given: Any) -> Settings:
        settings = load(*given)
        models = {name: always(model) for name, model in settings.catalogue.models.items()}
        wildcard = settings.catalogue.wildcard
        catalogue = Catalogue(models, None if wildcard is None else always(wildcard))
        return replace(settings, catalogue=catalogue)

    monkeypatch.setattr(tests.running, "load", loaded)


@pytest.fixture
async def gateway(start: Start) -> AsyncIterator[GatewayUnderTest]:
    async with start() as running:
        running.sandbox.rules.add(Rule(payload_bytes=400))
        yield running


def picture() -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", (64, 64), (200, 30, 30, 255)).save(out, "PNG")
    return out.getvalue()


async def test_the_sdk_gets_json_from_a_stream(gateway: GatewayUnderTest) -> None:
    async with gateway.sdk() as sdk:
        raw = await sdk.images.with_raw_response.generate(**ASKED)
        again = await sdk.images.with_raw_response.generate(**ASKED)
    answer = raw.parse()
    assert answer.data is not None
    assert answer.usage is not None
    assert (answer.usage.output_tokens, answer.size, answer.quality) == (196, "1024x1024", "low")
    document = json.loads(raw.content)
    assert list(document)[:2] == ["created", "background"]
    assert "type" not in document
    assert raw.headers["content-type"] == "application/json"
    assert raw.headers["content-length"] == str(len(raw.content))
    assert (raw.headers["x-cost-usd"], raw.headers["x-cost-basis"]) == ("0.005895", "usage")
    assert (again.headers["x-cache"], again.content) == ("hit", raw.content)
    [record] = gateway.sandbox.journal
    assert record.fields == {**ASKED, "stream": True}
    assert record.header("accept") == "text/event-stream, application/json"
    assert (await gateway.told.until(1))[0][0].bound == BOUND
    assert (await booked(gateway)).cost == COST


async def test_a_stream_stays_the_stream_that_was_asked_for(gateway: GatewayUnderTest) -> None:
    body = json.dumps({**ASKED, "stream": True, "partial_images": 1}).encode()
    async with RawClient.to(gateway.port, KEY) as client:
        answer = await client.post("/v1/images/generations", body, (JSON,))
    assert answer.header("content-type") == "text/event-stream; charset=utf-8"
    assert gateway.sandbox.journal[0].body == body


async def post(gateway: GatewayUnderTest, path: str, body: bytes, kind: str) -> RawAnswer:
    async with RawClient.to(gateway.port, KEY) as client:
        answer = await client.post(path, body, (kind,))
    assert answer.status == 200, answer.body
    assert len(answer.json["data"]) == 1
    return answer


PRETTY = json.dumps({"prompt": 'say "stream": false', "n": 1, **ASKED}, indent=2).encode()


@pytest.mark.parametrize(
    ("body", "leaves"),
    [
        (
            b'{"model":"%b","prompt":"caf\xc3\xa9"}' % MODEL.encode(),
            b'{"stream":true,"model":"%b","prompt":"caf\xc3\xa9"}' % MODEL.encode(),
        ),
        (PRETTY, PRETTY.replace(b"{", b'{"stream":true,', 1)),
        (
            PRETTY.replace(b'"n": 1', b'"stream" : false'),
            PRETTY.replace(b'"n": 1', b'"stream" : true'),
        ),
        (
            PRETTY.replace(b'"n": 1', b'"n": null,\n"stream":null'),
            PRETTY.replace(b'"n": 1', b'"n": null,\n"stream":true'),
        ),
    ],
    ids=["short", "pretty", "false", "null"],
)
async def test_one_member_is_spliced_and_no_other_byte(
    gateway: GatewayUnderTest, body: bytes, leaves: bytes
) -> None:
    await post(gateway, "/v1/images/generations", body, JSON)
    [record] = gateway.sandbox.journal
    assert record.body == leaves
    assert record.fields["stream"] is True
    pairs: list[str] = []
    json.loads(record.body, object_pairs_hook=lambda given: pairs.extend(k for k, _ in given))
    assert pairs.count("stream") == 1


@pytest.mark.parametrize("sent", [None, "false"])
async def test_one_part_is_spliced_before_the_picture(
    gateway: GatewayUnderTest, sent: str | None
) -> None:
    """Node's order: the picture first, the prompt last."""
    image = Field("image", picture(), "a.png")
    said = {} if sent is None else {"stream": sent}
    parts = [image, *texts(**said, size="1024x1024", model=MODEL, quality="low", prompt="p")]
    body = form(*parts)
    await post(gateway, "/v1/images/edits", body, FORM)
    [record] = gateway.sandbox.journal
    if sent is None:
        part = b"--%b\r\n%b\r\n\r\ntrue\r\n" % (
            BOUNDARY.encode(),
            b'Content-Disposition: form-data; name="stream"',
        )
        assert record.body == part + body
    else:
        assert record.body == body.replace(b"\r\n\r\nfalse\r\n", b"\r\n\r\ntrue\r\n")
    assert record.body.count(b'name="stream"') == 1
    assert record.fields["stream"] == "true"
    assert [file.size_bytes for file in record.files] == [len(image.content)]


@pytest.mark.skipif(
    test_node.NODE is None or not (test_node.TOOLS / "node_modules" / "openai").is_dir(),
    reason="no Node.js, or no openai package: run tests/e2e/node/install.sh (needs npm)",
)
@pytest.mark.node
async def test_node_s_generations_and_edits(gateway: GatewayUnderTest, tmp_path: Path) -> None:
    (tmp_path / "disk.png").write_bytes(picture())
    first, second = await test_node.node(gateway, "generate.mjs")
    assert (first["usage"], second["cache"]) == (gateway.sandbox.journal[0].usage, "hit")
    said = await test_node.node(gateway, "edit.mjs", PICTURE=str(tmp_path / "disk.png"))
    for name in ("file", "toFile", "several"):
        assert said[name]["b64"].startswith("iVBORw0KGgoA")
    for record in gateway.sandbox.journal:
        assert record.fields["stream"] in (True, "true")
        assert "partial_images" not in record.fields


@pytest.mark.parametrize(
    "more", [{"n": 2}, {"output_format": "gif"}], ids=["two pictures", "a gif"]
)
async def test_what_cannot_be_collapsed_is_asked_for_as_it_was(
    gateway: GatewayUnderTest, more: dict[str, Any]
) -> None:
    body = json.dumps({**ASKED, **more}).encode()
    async with RawClient.to(gateway.port, KEY) as client:
        await client.post("/v1/images/generations", body, (JSON,))
    [record] = gateway.sandbox.journal
    assert record.body == body
    assert record.header("accept") == "application/json"


async def test_partial_pictures_that_were_asked_for_are_held_and_paid(
    gateway: GatewayUnderTest,
) -> None:
    """They were in the bound before, and come only now."""
    async with gateway.sdk() as sdk:
        answer = await sdk.images.generate(**ASKED, extra_body={"partial_images": 2})
    assert answer.data is not None
    assert len(answer.data) == 1
    assert gateway.sandbox.journal[0].fields == {**ASKED, "partial_images": 2, "stream": True}
    assert (await only_receipt(gateway)).bound == BOUND + 2 * 3_000_000
    assert (await booked(gateway)).cost == COST + 2 * 3_000_000


@pytest.mark.parametrize(
    ("fault", "status", "cost"),
    [
        ({"sse_error_after": 0}, 502, 0),
        ({"sse_no_completed": True}, 502, BOUND),
        ({"sse_garbage": True}, 502, BOUND),
        ({"sse_cut_after": 0}, 502, BOUND),
        ({"status": 400}, 400, 0),
    ],
    ids=["error", "no picture", "garbage", "cut", "refused"],
)
async def test_an_error_of_the_stream_is_an_ordinary_error(
    start: Start, fault: dict[str, Any], status: int, cost: int
) -> None:
    async with start() as gateway, gateway.sdk(max_retries=2) as sdk:
        gateway.sandbox.rules.add(Rule(payload_bytes=400, **fault))
        with pytest.raises(APIStatusError) as raised:
            await sdk.images.generate(**ASKED)
        assert raised.value.status_code == status
        assert len(gateway.sandbox.journal) == 1
        assert (await booked(gateway)).cost == cost


async def test_an_upstream_that_answers_json_all_the_same(start: Start) -> None:
    async with start() as gateway, gateway.sdk() as sdk:
        gateway.sandbox.rules.add(Rule(payload_bytes=400, json_for_stream=True))
        answer = await sdk.images.generate(**ASKED)
        assert answer.usage is not None
        assert answer.usage.output_tokens == 196
        assert (await booked(gateway)).cost == COST


SILENCE_SECONDS = 0.4
"""What the wall here allows; Azure's is 122 s."""


async def test_a_wall_on_silence_is_passed_by_a_stream(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture takes longer than the wall allows an answer to be silent; streams it lets live."""

    async def wall(peer: Peer) -> None:
        _, body = await peer.request()
        if json.loads(body).get("stream"):
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
            for _ in range(4):
                await peer.send(b": working\n\n")
                await asyncio.sleep(SILENCE_SECONDS / 2)
            await peer.send(PARTIAL_EVENT + COMPLETED_EVENT)
        else:
            await asyncio.sleep(SILENCE_SECONDS)
            peer.reset()

    async with raw_server(wall) as server:
        async with start(at(server.port)) as gateway, gateway.sdk() as sdk:
            answer = await sdk.images.generate(**ASKED)
            assert answer.data is not None
            assert answer.data[0].b64_json == "iVBORw0KGgoA"
            assert (await booked(gateway)).cost == COST
        monkeypatch.setattr(tests.running, "load", load)
        async with start(at(server.port)) as gateway, gateway.sdk() as sdk:
            with pytest.raises(APIStatusError) as raised:
                await sdk.images.generate(**{**ASKED, "prompt": "Another lighthouse"})
            assert raised.value.code == "upstream_outcome_unknown"
