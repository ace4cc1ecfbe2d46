"""Which models there are, and who may use which."""

from __future__ import annotations

from typing import Any

import pytest
from openai import APIStatusError, NotFoundError, PermissionDeniedError

from gateway.sandbox.rules import Rule
from tests.running import ALIAS, KEY, MODEL, OTHER_KEY, GatewayUnderTest, Start

CI_KEY = "growth-ci-key-0123456789abcdef"
ASKED: dict[str, Any] = {"prompt": "A lighthouse", "quality": "low", "size": "1024x1024"}
LISTED: dict[str, Any] = {"object": "model", "owned_by": "openai", "shutdown_date": None}


async def refusal(gateway: GatewayUnderTest, model: str, key: str = KEY) -> APIStatusError:
    """What the SDK raises for a picture by ``model``, without a second attempt."""
    before = len(gateway.told.requests)
    async with gateway.sdk(key, max_retries=2) as sdk:
        with pytest.raises(APIStatusError) as raised:
            await sdk.images.generate(model=model, **ASKED)
    await gateway.told.until(before + 1)
    assert len(gateway.told.requests) == before + 1
    assert raised.value.response.headers["x-should-retry"] == "false"
    assert raised.value.param == "model"
    return raised.value


async def works(gateway: GatewayUnderTest, model: str, key: str = KEY) -> bool:
    if not len(gateway.sandbox.rules):
        gateway.sandbox.rules.add(Rule(payload_bytes=400))
    async with gateway.sdk(key) as sdk:
        return bool((await sdk.images.generate(model=model, **ASKED)).data)


async def test_every_name_is_listed_aliases_too(start: Start) -> None:
    models = {"gpt-image-1.5": {"upstream": "openai"}, "old": {"model": "gpt-image-1-mini"}}
    models["old"]["upstream"] = "openai"
    async with start({"models": models}) as gateway, gateway.sdk() as sdk:
        listed = [model.model_dump() async for model in sdk.models.list()]
    september, april = 1788825600, 1776729600
    expected = {
        "gpt-image-1.5": {**LISTED, "created": 1765843200, "shutdown_date": "2026-12-01"},
        "gpt-image-2": {**LISTED, "created": april},
        MODEL: {**LISTED, "created": september},
        "old": {**LISTED, "shutdown_date": "2026-12-01"},
        ALIAS: {**LISTED, "created": september},
    }
    assert [one["id"] for one in listed] == list(expected)
    for one in listed:
        name = one.pop("id")
        assert one == {"created": one["created"], **expected[name]}
        assert one["created"] > 0


async def test_one_model_says_what_the_list_says(gateway: GatewayUnderTest) -> None:
    async with gateway.sdk() as sdk:
        listed = [model async for model in sdk.models.list()]
        for model in listed:
            assert await sdk.models.retrieve(model.id) == model


async def test_behind_the_star_every_name_is_a_model(gateway: GatewayUnderTest) -> None:
    async with gateway.sdk() as sdk:
        model = await sdk.models.retrieve("gpt-image-1.5")
        assert model.id == "gpt-image-1.5"
        unpriced = await sdk.models.retrieve("vendor/some-model:v2")
    assert unpriced.id == "vendor/some-model:v2"
    assert (unpriced.created, unpriced.owned_by) == (0, "openai")


async def test_a_team_sees_only_what_it_may_use(start: Start) -> None:
    teams = {
        "growth": {
            "models": ["gpt-image-2", ALIAS],
            "keys": [KEY, {"key": CI_KEY, "name": "ci", "models": [ALIAS]}],
        },
        "design": {"models": ["*"]},
    }
    async with start({"teams": teams}) as gateway:
        seen = {}
        for key in (KEY, CI_KEY, OTHER_KEY):
            async with gateway.sdk(key) as sdk:
                seen[key] = [model.id async for model in sdk.models.list()]
        assert seen == {
            KEY: ["gpt-image-2", ALIAS],
            CI_KEY: [ALIAS],
            OTHER_KEY: ["gpt-image-2", MODEL, ALIAS],
        }
        async with gateway.sdk() as sdk:
            for foreign in (MODEL, "gpt-image-1.5"):
                with pytest.raises(NotFoundError) as raised:
                    await sdk.models.retrieve(foreign)
                assert raised.value.code == "model_not_found"
                assert raised.value.message == (
                    f"Error code: 404 - No model {foreign}. GET /v1/models lists yours."
                )


async def test_the_list_needs_a_key(gateway: GatewayUnderTest) -> None:
    async with gateway.sdk("another-key-0123456789abcdef") as sdk:
        with pytest.raises(APIStatusError) as raised:
            await sdk.models.list()
    assert (raised.value.status_code, raised.value.code) == (401, "invalid_api_key")
    assert raised.value.request_id


async def test_a_model_that_the_team_may_not_use(start: Start) -> None:
    async with start({"teams": {"growth": {"models": [MODEL]}}}) as gateway:
        error = await refusal(gateway, "gpt-image-2.6-sunburst")
        assert isinstance(error, PermissionDeniedError)
        assert error.code == "model_not_allowed"
        assert error.message == (
            "Error code: 403 - Team growth may use gpt-image-2.5-flare, not "
            "gpt-image-2.6-sunburst. Ask an administrator to add it."
        )
        # No way around by an alias of what it may use, or by a name behind the star.
        for way_around in (ALIAS, "gpt-image-2", f"{MODEL}-2026-09-08", "gpt-image-1.5"):
            assert (await refusal(gateway, way_around)).status_code == 403
        assert await works(gateway, MODEL)
        assert len(gateway.sandbox.journal) == 1
        assert [row.model for row in await gateway.usage()] == [MODEL]


async def test_an_alias_alone_does_not_open_the_model_behind_it(start: Start) -> None:
    async with start({"teams": {"growth": {"models": [ALIAS]}}}) as gateway:
        assert await works(gateway, ALIAS)
        assert (await refusal(gateway, MODEL)).code == "model_not_allowed"


async def test_a_key_may_be_allowed_less_than_its_team(start: Start) -> None:
    keys = [KEY, {"key": CI_KEY, "models": [ALIAS, "gpt-image-2"]}]
    teams = {"growth": {"keys": keys, "models": [MODEL, ALIAS]}}
    async with start({"teams": teams}) as gateway:
        error = await refusal(gateway, MODEL, CI_KEY)
        assert error.message == (
            "Error code: 403 - Team growth may use team-art, not gpt-image-2.5-flare with this "
            "key. Ask an administrator to add it."
        )
        # A key cannot be allowed more than its team.
        assert (await refusal(gateway, "gpt-image-2", CI_KEY)).status_code == 403
        assert await works(gateway, ALIAS, CI_KEY)
        assert await works(gateway, MODEL, KEY)


async def test_an_omitted_model_is_never_a_default(start: Start) -> None:
    async with start({"teams": {"growth": {"models": [ALIAS]}}}) as gateway, gateway.sdk() as sdk:
        nothing: tuple[dict[str, Any], ...] = ({}, {"model": None})
        for absent in nothing:
            with pytest.raises(APIStatusError) as raised:
                await sdk.images.generate(prompt="A lighthouse", **absent)
            assert raised.value.status_code == 400
            assert raised.value.param == "model"
        assert len(gateway.sandbox.journal) == 0


@pytest.mark.usefixtures("no_star")
async def test_an_unknown_model_is_answered_with_the_nearest(start: Start) -> None:
    models = {"dall-e-3": {"upstream": "openai", "model": MODEL}}
    async with start({"models": models}) as gateway:
        error = await refusal(gateway, "dall-e-4")
        assert isinstance(error, NotFoundError)
        assert error.code == "model_not_found"
        assert error.message == (
            "Error code: 404 - No model dall-e-4. Did you mean dall-e-3 (served by "
            "gpt-image-2.5-flare)? GET /v1/models lists yours."
        )
        error = await refusal(gateway, "gpt-image-2.5-flair")
        assert error.message == (
            "Error code: 404 - No model gpt-image-2.5-flair. Did you mean gpt-image-2.5-flare? "
            "GET /v1/models lists yours."
        )
        error = await refusal(gateway, "zzz")
        assert error.message == "Error code: 404 - No model zzz. GET /v1/models lists yours."
        assert len(gateway.sandbox.journal) == 0


@pytest.mark.usefixtures("no_star")
async def test_the_nearest_is_never_what_the_team_may_not_use(start: Start) -> None:
    changes = {"teams": {"growth": {"models": ["gpt-image-2"]}}}
    async with start(changes) as gateway:
        error = await refusal(gateway, "team-arts")
        assert error.message == "Error code: 404 - No model team-arts. GET /v1/models lists yours."


async def test_behind_the_star_any_priced_name_is_served(gateway: GatewayUnderTest) -> None:
    assert await works(gateway, "gpt-image-2.5-sunburst")
    [record] = gateway.sandbox.journal
    assert record.fields["model"] == "gpt-image-2.5-sunburst"


async def test_the_star_itself_is_no_model(gateway: GatewayUnderTest) -> None:
    assert (await refusal(gateway, "*")).status_code == 404


async def test_what_is_not_served_says_so_in_json(gateway: GatewayUnderTest) -> None:
    async with gateway.http() as http:
        answers = [
            await http.post("/images/inpaintings", json={}),
            await http.get("/batches"),
            await http.get("/images/generations"),
            await http.delete("/models"),
        ]
    assert [answer.status_code for answer in answers] == [404, 404, 405, 405]
    for answer in answers:
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["error"]["code"] in ("unknown_url", "method_not_allowed")
        assert answer.headers["x-request-id"].startswith("req_")
