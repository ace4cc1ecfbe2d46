"""Older clients through the front door: a strict upstream draws for them, and they are told what
was changed."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import openai
import pytest
from PIL import Image

from gateway.sandbox.rules import Rule
from tests.flying import Fly
from tests.raw import FORM, JSON, Field, RawClient, form, texts
from tests.running import KEY, MODEL, OTHER_KEY, GatewayUnderTest, Start

CHANGED = "x-gateway-changed"
OLD_MODEL = "gpt-image-1.5"
ALIASES = {"dall-e-3": MODEL, "dall-e-2": OLD_MODEL}
AS_OF_2024: dict[str, Any] = {
    "model": "dall-e-3",
    "prompt": "A lighthouse",
    "style": "vivid",
    "quality": "hd",
    "size": "1792x1024",
    "response_format": "b64_json",
}
AS_IT_IS: dict[str, Any] = {
    "model": MODEL,
    "prompt": "A lighthouse",
    "quality": "high",
    "size": "1792x1024",
}
SAID = f"model={MODEL}, response_format, style, quality=high"


def compat(**more: Any) -> dict[str, Any]:
    models = {OLD_MODEL: {"upstream": "openai"}}
    return {"models": models, "compat": {"aliases": ALIASES, **more}}


def png(shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", (64, 64), shade).save(out, "PNG")
    return out.getvalue()


def last_sent(gateway: GatewayUnderTest) -> Any:
    return json.loads(gateway.sandbox.journal[-1].body)


async def test_a_call_as_of_2024(start: Start) -> None:
    async with start(compat()) as gateway, gateway.sdk() as sdk:
        fresh = await sdk.images.with_raw_response.generate(**AS_OF_2024)
        assert fresh.headers[CHANGED] == SAID
        assert fresh.headers["x-model-served"] == MODEL
        assert fresh.parse().data
        assert last_sent(gateway) == AS_IT_IS
        [(receipt, _)] = await gateway.told.until(1)
        assert receipt.changed == ("model", "response_format", "style", "quality")
        assert (receipt.model, receipt.model_label, receipt.quality) == ("dall-e-3", MODEL, "high")

        # The cache knows it by what was sent, and tells each client what was changed of its own.
        cached = await sdk.images.with_raw_response.generate(**AS_OF_2024)
        assert (cached.headers["x-cache"], cached.headers[CHANGED]) == ("hit", SAID)
        plain = await sdk.images.with_raw_response.generate(**AS_IT_IS)
        assert plain.headers["x-cache"] == "hit"
        assert CHANGED not in plain.headers
        assert len(gateway.sandbox.journal) == 1
        metrics = await gateway.metrics()
        for change in receipt.changed:
            assert metrics[f'gateway_requests_changed_total{{change="{change}"}}'] == 2
        assert 'gateway_requests_changed_total{change="size"}' not in metrics


async def test_a_size_that_the_model_behind_an_alias_does_not_serve(start: Start) -> None:
    async with start(compat()) as gateway, gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.generate(
            model="dall-e-2", prompt="A lighthouse", size="1024x1792"
        )
        assert answer.headers[CHANGED] == f"model={OLD_MODEL}, size=1024x1536"
        assert last_sent(gateway)["size"] == "1024x1536"


@pytest.mark.parametrize("response_format", ["b64_json", "url"])
async def test_a_stream_is_base64_whatever_was_asked(start: Start, response_format: str) -> None:
    asked = {**AS_OF_2024, "response_format": response_format, "stream": True}
    async with start(compat()) as gateway, gateway.http() as http:
        answer = await http.post("/images/generations", json=asked)
        assert (answer.status_code, answer.headers[CHANGED]) == (200, SAID)
        assert b"b64_json" in answer.content
        assert last_sent(gateway) == {**AS_IT_IS, "stream": True}


async def test_a_url_that_nobody_could_open(start: Start) -> None:
    async with start(compat()) as gateway, gateway.sdk() as sdk:
        with pytest.raises(openai.BadRequestError) as refused:
            await sdk.images.generate(**{**AS_OF_2024, "response_format": "url"})
        assert refused.value.param == "response_format"
        assert "server.public_url" in str(refused.value)
        assert not len(gateway.sandbox.journal)


@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": ""}])
async def test_no_model_at_all(start: Start, body: dict[str, Any]) -> None:
    asked = {"prompt": "A lighthouse", **body}
    own = {"key": OTHER_KEY, "compat": {"default_model": OLD_MODEL}}
    changes = {**compat(default_model=MODEL), "teams": {"design": {"keys": [own]}}}
    async with start(changes) as gateway:
        for count, (key, model) in enumerate(((KEY, MODEL), (OTHER_KEY, OLD_MODEL)), start=1):
            async with gateway.http(key) as http:
                answer = await http.post("/images/generations", json=asked)
            assert (answer.status_code, answer.headers[CHANGED]) == (200, f"model={model}")
            assert last_sent(gateway) == {"model": model, "prompt": "A lighthouse"}
            told = await gateway.told.until(count)
            assert told[-1][0].model == model


async def test_a_default_that_the_team_may_not_use_is_said_to_be_one(start: Start) -> None:
    teams = {"growth": {"models": ["gpt-image-2", "team-art"]}}
    changes = {**compat(default_model=MODEL), "teams": teams}
    async with start(changes) as gateway, gateway.http() as http:
        answer = await http.post("/images/generations", json={"prompt": "A lighthouse"})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (403, "model_not_allowed")
        assert error["message"] == (
            f"This request names no model, and the default here is {MODEL}, which team growth may "
            "not use with this key. Name one in 'model' that it may: gpt-image-2, team-art."
        )


async def test_no_model_and_no_default(start: Start) -> None:
    async with start() as gateway, gateway.http() as http:
        answer = await http.post("/images/generations", json={"prompt": "A lighthouse"})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (
            400,
            "missing_required_parameter",
            "model",
        )
        assert CHANGED not in answer.headers


OFF: list[tuple[dict[str, Any], str]] = [
    ({"models": {MODEL: {"compat": False}}}, "a model"),
    ({"models": {MODEL: {"compat": {"style": False}}}}, "a model's style"),
    ({"teams": {"growth": {"keys": [{"key": KEY, "compat": "off"}]}}}, "a key"),
    ({"compat": False}, "all"),
]


@pytest.mark.parametrize(("changes", "whose"), OFF, ids=[whose for _, whose in OFF])
async def test_switched_off_it_is_the_upstream_that_refuses(
    start: Start, changes: dict[str, Any], whose: str
) -> None:
    """The strict upstream knows neither; what is refused says what was changed all the same."""
    asked = {**AS_OF_2024, "model": MODEL}
    async with start(changes) as gateway, gateway.http() as http:
        answer = await http.post("/images/generations", json=asked)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "unknown_parameter"
        partly = whose == "a model's style"
        said = "response_format, quality=high" if partly else None
        assert answer.headers.get(CHANGED) == said
        left_out = {"response_format"} if partly else set()
        assert last_sent(gateway).keys() == asked.keys() - left_out


async def test_the_keys_word_goes_before_the_models(start: Start) -> None:
    key = {"key": KEY, "compat": {"style": True, "response_format": True}}
    changes = {
        "models": {MODEL: {"compat": False}},
        "teams": {"growth": {"keys": [key]}},
    }
    asked = {"model": MODEL, "prompt": "p", "style": "vivid", "response_format": "b64_json"}
    async with start(changes) as gateway, gateway.http() as http:
        answer = await http.post("/images/generations", json=asked)
        assert (answer.status_code, answer.headers[CHANGED]) == (200, "response_format, style")


async def test_without_aliases_a_key_is_told_that_the_model_is_gone(start: Start) -> None:
    keys = {"growth": {"keys": [{"key": KEY, "compat": False}]}}
    async with start({**compat(), "teams": keys}) as gateway, gateway.http() as http:
        answer = await http.post("/images/generations", json=AS_OF_2024)
        assert 400 <= answer.status_code < 500
        assert CHANGED not in answer.headers


async def test_a_team_that_may_not_use_what_an_alias_leads_to(start: Start) -> None:
    teams = {"growth": {"models": [OLD_MODEL, "gpt-image-2"]}}
    async with start({**compat(), "teams": teams}) as gateway, gateway.sdk() as sdk:
        with pytest.raises(openai.PermissionDeniedError):
            await sdk.images.generate(**AS_OF_2024)
        answer = await sdk.images.with_raw_response.generate(model="dall-e-2", prompt="p")
        assert answer.headers[CHANGED] == f"model={OLD_MODEL}"


async def test_an_error_behind_the_repair_says_what_was_changed(start: Start) -> None:
    teams = {"growth": {"limits": {"max_cost_per_request": 0.001}}}
    async with start({**compat(), "teams": teams}) as gateway, gateway.http() as http:
        refused = await http.post("/images/generations", json=AS_OF_2024)
        assert (refused.status_code, refused.headers[CHANGED]) == (400, SAID)
    strict = compat()
    strict["models"][MODEL] = {"validate": "strict"}
    async with start(strict) as gateway, gateway.http() as http:
        answer = await http.post("/images/generations", json=AS_OF_2024)
        assert (answer.status_code, answer.headers[CHANGED]) == (200, SAID)
        refused = await http.post("/images/generations", json={**AS_OF_2024, "size": "large"})
        assert (refused.status_code, refused.headers[CHANGED]) == (400, SAID)
        assert refused.json()["error"]["param"] == "size"


async def test_an_estimate_is_of_what_would_be_sent(start: Start) -> None:
    async with start(compat()) as gateway, gateway.http() as http:
        old = (await http.post("/images/estimate", json=AS_OF_2024)).json()
        new = (await http.post("/images/estimate", json=AS_IT_IS)).json()
    assert old["changed"] == {
        "model": MODEL,
        "response_format": None,
        "style": None,
        "quality": "high",
    }
    assert new["changed"] == {}
    assert (old["bound_usd"], old["model_served"]) == (new["bound_usd"], MODEL)


async def test_who_joins_is_told_of_its_own_words(fly: Fly) -> None:
    """A flight that one client began as dall-e-3 is joined by one that asked for the model itself,
    and the other way round."""
    plain = {**AS_IT_IS, "quality": "low"}
    old = {**AS_OF_2024, "quality": "low"}
    said = f"model={MODEL}, response_format, style"
    async with fly(compat()) as house:
        for first, second, announced in ((old, plain, None), (plain, old, said)):
            gate = house.hold_back()
            content = json.dumps(first).encode()
            flights = len(house.board.flights)
            async with RawClient.to(house.gateway.port, KEY) as client:
                fresh = "cache-control: no-cache"
                await client.head(
                    "/v1/images/generations", (JSON, f"content-length: {len(content)}", fresh)
                )
                await client.send(content)
                await house.flying(flights + 1)
            joined = len(house.board.joined)
            async with house.gateway.http() as http:
                again = {"x-stainless-retry-count": "1", "cache-control": "no-cache"}
                asking = asyncio.create_task(
                    http.post("/images/generations", json=second, headers=again)
                )
                await house.joins(joined + 1)
                gate.set()
                answer = await asking
            assert (answer.status_code, answer.headers["x-cache"]) == (200, "join")
            assert answer.headers.get(CHANGED) == announced


# What stands in.

CUSTOM = "sd-xl"
OWN = {"upstream": "openai", "model": CUSTOM, "unpriced": "allow"}
ANOTHER: dict[str, Any] = {
    "prompt": "A lighthouse",
    "style": "vivid",
    "quality": "hd",
    "size": "1024x1792",
    "response_format": "b64_json",
}


def standing_in(asked: Any, name: str, other: str) -> dict[str, Any]:
    return {"models": {name: {**asked, "fallback": [other]}, "custom": OWN, **(
        {"custom": {**OWN, "fallback": [other]}} if name == "custom" else {}
    )}}  # fmt: skip


async def test_what_stands_in_for_another_family_is_repaired_for(start: Start) -> None:
    """A model of which nothing is known gets the call as it came; the one that stands in for it
    would refuse that."""
    async with start(standing_in(OWN, "custom", MODEL)) as gateway, gateway.http() as http:
        gateway.sandbox.rules.add(Rule(model=CUSTOM, status=503, times=1))
        answer = await http.post("/images/generations", json={"model": "custom", **ANOTHER})
        assert answer.status_code == 200, answer.text
        bodies = [json.loads(one.body) for one in gateway.sandbox.journal]
        assert bodies == [
            {"model": CUSTOM, **ANOTHER},
            {"model": MODEL, "prompt": "A lighthouse", "quality": "high", "size": "1024x1792"},
        ]
        said = f"model={MODEL}, response_format, style, quality=high"
        assert answer.headers[CHANGED] == said
        [(receipt, _)] = await gateway.told.until(1)
        assert (receipt.model_served, receipt.price_id.partition("@")[0]) == (
            MODEL, f"openai/{MODEL}"
        )  # fmt: skip
        # Its price is that of what was sent, and it is kept for nobody.
        assert receipt.cost > 0
        rid = answer.headers["x-request-id"]
        found = await http.get(f"/images/results/{rid}")
        assert found.headers[CHANGED] == said
        gateway.sandbox.rules.add(Rule(model=CUSTOM, status=503, times=1))
        again = await http.post("/images/generations", json={"model": "custom", **ANOTHER})
        assert again.headers["x-cache"] == "miss"


async def test_what_stands_in_for_a_gpt_image_model_gets_the_call_as_it_came(start: Start) -> None:
    changes = standing_in({"upstream": "openai"}, MODEL, "custom")
    async with start(changes) as gateway, gateway.http() as http:
        gateway.sandbox.rules.add(Rule(model=MODEL, status=503, times=1))
        answer = await http.post("/images/generations", json={"model": MODEL, **ANOTHER})
        bodies = [json.loads(one.body) for one in gateway.sandbox.journal]
        assert bodies == [
            {"model": MODEL, "prompt": "A lighthouse", "quality": "high", "size": "1024x1792"},
            {"model": CUSTOM, **ANOTHER},
        ]
        assert answer.headers[CHANGED] == "model=custom"
        # Asked itself, it is told of its own repairs.
        own = await http.post("/images/generations", json={"model": MODEL, **ANOTHER})
        assert own.headers[CHANGED] == "response_format, style, quality=high"


async def test_urls_from_what_stands_in(start: Start) -> None:
    """Of base64 alone a picture is put behind a url of ours, and only that is said."""
    asked = {"prompt": "A lighthouse", "quality": "low", "response_format": "url"}
    public = {"server": {"public_url": "http://pictures.test"}}
    changes = {**standing_in(OWN, "custom", MODEL), **public}
    async with start(changes) as gateway, gateway.http() as http:
        gateway.sandbox.rules.add(Rule(model=CUSTOM, status=503, times=1))
        answer = await http.post("/images/generations", json={"model": "custom", **asked})
        assert answer.headers[CHANGED] == f"model={MODEL}, response_format=url->hosted"
        assert answer.json()["data"][0]["url"].startswith("http://pictures.test/v1/")


# Forms.


async def test_bytes_without_a_type(start: Start) -> None:
    """The SDK sends plain bytes as application/octet-stream under the name "upload"."""
    picture, mask = png(1), png(2)
    async with start(compat()) as gateway, gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.edit(
            model=MODEL, image=[picture, ("a.bin", mask, "application/octet-stream")], prompt="p"
        )
        assert answer.headers[CHANGED] == "content_type=image/png"
        [record] = gateway.sandbox.journal
        assert [file.content_type for file in record.files] == ["image/png"] * 2
        assert [file.filename for file in record.files] == ["upload.png", "a.png"]
        assert [file.size_bytes for file in record.files] == [len(picture), len(mask)]
        assert picture in record.body
        assert mask in record.body
        # As if it had been sent so: the cache knows it.
        named = [("x.png", picture, "image/png"), ("y.png", mask, "image/png")]
        again = await sdk.images.with_raw_response.edit(model=MODEL, image=named, prompt="p")
        assert again.headers["x-cache"] == "hit"
        assert CHANGED not in again.headers


async def test_bytes_without_a_type_as_they_came(start: Start) -> None:
    changes = {"compat": {"media_types": False}}
    async with start(changes) as gateway, gateway.sdk() as sdk:
        with pytest.raises(openai.BadRequestError):
            await sdk.images.edit(model=MODEL, image=png(1), prompt="p")
        assert gateway.sandbox.journal[0].files[0].content_type == "application/octet-stream"


async def test_an_edit_as_of_2024(start: Start) -> None:
    async with start(compat()) as gateway, gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.edit(
            model="dall-e-2",
            image=png(1),
            prompt="p",
            size="512x512",
            response_format="b64_json",
            n=2,
        )
        assert answer.headers[CHANGED] == (
            f"model={OLD_MODEL}, response_format, size=1024x1024, content_type=image/png"
        )
        [record] = gateway.sandbox.journal
        assert {name: str(value) for name, value in record.fields.items()} == {
            "model": OLD_MODEL,
            "prompt": "p",
            "size": "1024x1024",
            "n": "2",
        }
        assert len(answer.parse().data or []) == 2


@pytest.mark.parametrize("taken", [False, True])
async def test_pictures_that_are_all_called_image(start: Start, taken: bool) -> None:
    pictures = [png(shade) for shade in (1, 2, 3)]
    files = [Field("image", each, f"{at}.png") for at, each in enumerate(pictures)]
    body = form(*texts(model=MODEL, prompt="p"), *files)
    async with start({"compat": {"repeated_images": taken}}) as gateway, gateway.http() as http:
        kind = FORM.partition(": ")[2]
        answer = await http.post("/images/edits", content=body, headers={"content-type": kind})
        if not taken:
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                400,
                "duplicate_parameter",
            )
            assert not len(gateway.sandbox.journal)
            return
        assert (answer.status_code, answer.headers[CHANGED]) == (200, "image=image[]")
        [record] = gateway.sandbox.journal
        assert [file.field for file in record.files] == ["image[]"] * 3
        assert [file.filename for file in record.files] == ["0.png", "1.png", "2.png"]
