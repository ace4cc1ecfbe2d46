"""Models that end: told in time, and then in words instead of a bill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from openai import APIStatusError, AsyncOpenAI, InternalServerError, NotFoundError

from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from tests.running import ALIAS, KEY, MODEL, OTHER_KEY, GatewayUnderTest, Start, TestClock

ASKED: dict[str, Any] = {"prompt": "A lighthouse", "quality": "low", "size": "1024x1024"}
ENDING = "gpt-image-1.5"
WARNED = {
    "sunset": "Tue, 01 Dec 2026 00:00:00 GMT",
    "x-gateway-warning": f"{ENDING} shuts down on 2026-12-01; use {MODEL}.",
}
ELSEWHERE: dict[str, Any] = {"kind": "openai", "api_keys": ["sk-azure-secret"], "prices": "azure"}
"""An upstream with a list of its own, which says nothing of any end."""


def elsewhere(sandbox: SandboxServer) -> dict[str, Any]:
    return {**ELSEWHERE, "base_url": sandbox.base_url}


def row(model: str, **more: str) -> dict[str, Any]:
    return {"upstream": "azure", "model": model, "per_image": "0.04", **more}


async def refused(sdk: AsyncOpenAI, model: str) -> str:
    """What the SDK raises for a picture by a model that is over; it tries once."""
    with pytest.raises(NotFoundError) as raised:
        await sdk.with_options(max_retries=2).images.generate(model=model, **ASKED)
    error = raised.value
    assert (error.code, error.param, error.type) == (
        "model_retired", "model", "invalid_request_error",
    )  # fmt: skip
    assert error.response.headers["x-should-retry"] == "false"
    assert error.response.headers["x-cost-usd"] == "0"
    return error.message.removeprefix("Error code: 404 - ")


def warned(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: headers[name] for name in WARNED if name in headers}


async def test_a_retired_model_names_what_takes_its_place(gateway: GatewayUnderTest) -> None:
    async with gateway.sdk() as sdk:
        for model, day in (
            ("dall-e-3", "2026-05-12"),
            ("dall-e-2", "2026-05-12"),
            ("gpt-image-1", "2026-10-23"),
        ):
            expected = f"{model} was shut down by openai on {day}. Use {MODEL}."
            assert await refused(sdk, model) == expected
    told = await gateway.told.until(3)
    assert len(told) == 3
    assert {(one.reason, one.code, one.fault) for one, _ in told} == {
        ("model_retired", "model_retired", "team")
    }
    assert len(gateway.sandbox.journal) == 0
    assert await gateway.usage() == []


async def test_edits_and_streams_of_it_too(gateway: GatewayUnderTest) -> None:
    picture = ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(64), "image/png")
    async with gateway.sdk() as sdk:
        with pytest.raises(NotFoundError, match="gpt-image-1 was shut down"):
            await sdk.images.edit(model="gpt-image-1", image=picture, prompt="a boat")
        with pytest.raises(NotFoundError, match="gpt-image-1 was shut down"):
            await sdk.images.generate(model="gpt-image-1", stream=True, **ASKED)
    assert len(gateway.sandbox.journal) == 0


async def test_the_replacement_is_one_that_the_team_may_use(start: Start) -> None:
    models = {"old-art": {"upstream": "openai", "model": "dall-e-3"}}
    teams: dict[str, Any] = {"growth": {"models": ["old-art", ALIAS]}}
    async with start({"models": models, "teams": teams}) as gateway, gateway.sdk() as sdk:
        said = await refused(sdk, "old-art")
        # An alias of the replacement will do; both names of what is over are told.
        assert said == f"old-art (dall-e-3) was shut down by openai on 2026-05-12. Use {ALIAS}."
    teams["growth"]["models"] = ["old-art", "gpt-image-2"]
    async with start({"models": models, "teams": teams}) as gateway, gateway.sdk() as sdk:
        assert (await refused(sdk, "old-art")).endswith(" GET /v1/models lists yours.")


async def test_it_is_not_listed_any_more(start: Start) -> None:
    models = {name: {"upstream": "openai"} for name in ("dall-e-3", ENDING)}
    async with start({"models": models}) as gateway, gateway.sdk() as sdk:
        listed = {model.id: model async for model in sdk.models.list()}
        assert set(listed) == {ENDING, "gpt-image-2", MODEL, ALIAS}
        assert listed[ENDING].model_dump()["shutdown_date"] == "2026-12-01"
        with pytest.raises(NotFoundError) as raised:
            await sdk.models.retrieve("dall-e-3")
        assert raised.value.code == "model_retired"
        assert "on 2026-05-12" in raised.value.message


async def test_another_upstream_may_still_serve_it(start: Start, sandbox: SandboxServer) -> None:
    """The end is one of a list: the same name passes where another one holds."""
    changes = {
        "upstreams": {"azure": elsewhere(sandbox)},
        "models": {
            "dall-e-3": {"upstream": "azure"},
            "dall-e-2": {"upstreams": [{"upstream": "openai"}, {"upstream": "azure"}]},
        },
        "prices": {"rows": [row("dall-e-3"), row("dall-e-2", shuts_down="2026-12-10")]},
    }
    body = b'{"created":1790000000,"data":[{"b64_json":"iVBORw0KGgoA"}]}'
    sandbox.rules.add(Rule(status=200, body=body, content_type="application/json"))
    async with start(changes) as gateway, gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.generate(model="dall-e-3", **ASKED)
        assert answer.headers["x-gateway-upstream"] == "azure"
        assert warned(answer.headers) == {}
        answer = await sdk.images.with_raw_response.generate(model="dall-e-2", **ASKED)
        # One of two is over: the other one is asked, and warns of its own end.
        assert answer.headers["x-gateway-upstream"] == "azure"
        assert warned(answer.headers) == {
            "sunset": "Thu, 10 Dec 2026 00:00:00 GMT",
            "x-gateway-warning": "dall-e-2 shuts down on 2026-12-10.",
        }
        ends = {model.id: model.model_dump()["shutdown_date"] async for model in sdk.models.list()}
        assert (ends["dall-e-3"], ends["dall-e-2"]) == (None, "2026-12-10")
    assert [record.header("authorization") for record in sandbox.journal] == [
        "Bearer sk-azure-secret"
    ] * 2


async def test_a_fallback_stands_in_for_it(start: Start, sandbox: SandboxServer) -> None:
    sandbox.rules.add(Rule(payload_bytes=400))
    models = {"gpt-image-1": {"upstream": "openai", "fallback": ["gpt-image-2"]}}
    async with start({"models": models}) as gateway, gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.generate(model="gpt-image-1", **ASKED)
        assert answer.headers["x-gateway-changed"] == "model=gpt-image-2"
        assert [row.model for row in await gateway.usage()] == ["gpt-image-2"]


async def test_an_estimate_says_so_too(gateway: GatewayUnderTest) -> None:
    async with gateway.http() as http:
        over = await http.post("/images/estimate", json={"model": "dall-e-3", **ASKED})
        ending = await http.post("/images/estimate", json={"model": ENDING, **ASKED})
    said = over.json()
    assert (over.status_code, said["admitted"], said["bound_usd"]) == (200, False, None)
    assert said["refusal"]["code"] == "model_retired"
    assert said["refusal"]["message"] == (
        f"dall-e-3 was shut down by openai on 2026-05-12. Use {MODEL}."
    )
    assert ending.json()["admitted"] is True
    assert warned(ending.headers) == WARNED


async def test_every_kind_of_answer_warns_in_the_last_month(gateway: GatewayUnderTest) -> None:
    gateway.sandbox.rules.add(Rule(payload_bytes=400))
    order = {"model": ENDING, **ASKED}
    async with gateway.sdk() as sdk:
        raw = sdk.images.with_raw_response
        bought, cached = [await raw.generate(**order) for _ in range(2)]
        assert (bought.headers["x-cache"], cached.headers["x-cache"]) == ("miss", "hit")
        stream = await raw.generate(
            stream=True, **order, extra_headers={"cache-control": "no-cache"}
        )
        assert stream.headers["content-type"].startswith("text/event-stream")
        named = {"idempotency-key": "once", "cache-control": "no-cache"}
        keyed, again = [await raw.generate(**order, extra_headers=named) for _ in range(2)]
        assert again.headers["idempotent-replayed"] == "true"
        gateway.sandbox.rules.clear()
        gateway.sandbox.rules.add(Rule(status=503))
        with pytest.raises(InternalServerError) as raised:
            await sdk.images.generate(**order, extra_headers={"cache-control": "no-cache"})
        answers = [bought, cached, stream, keyed, again, raised.value.response]
        assert [warned(answer.headers) for answer in answers] == [WARNED] * len(answers)


async def test_the_warning_begins_thirty_days_before(start: Start, clock: TestClock) -> None:
    async with start() as gateway:
        gateway.sandbox.rules.add(Rule(payload_bytes=400))

        async def told() -> dict[str, str] | str:
            async with gateway.sdk() as sdk:
                try:
                    answer = await sdk.images.with_raw_response.generate(model=ENDING, **ASKED)
                except NotFoundError as error:
                    return str(error.code)
                return warned(answer.headers)

        clock.advance(days=-21)
        assert clock.now().date().isoformat() == "2026-11-01"
        assert await told() == WARNED
        clock.advance(days=-1)
        assert await told() == {}
        clock.advance(days=30)
        # The last evening, then the first minutes without it.
        clock.advance(hours=-0.5)
        assert clock.now().date().isoformat() == "2026-11-30"
        assert await told() == WARNED
        clock.advance(hours=13)
        assert clock.now().date().isoformat() == "2026-12-01"
        assert await told() == "model_retired"


async def test_a_model_that_goes_on_warns_of_nothing(gateway: GatewayUnderTest) -> None:
    gateway.sandbox.rules.add(Rule(payload_bytes=400))
    async with gateway.sdk(KEY) as sdk:
        answer = await sdk.images.with_raw_response.generate(model=MODEL, **ASKED)
    assert warned(answer.headers) == {}


# Names that nobody configured


@pytest.mark.usefixtures("no_star")
async def test_a_retired_name_that_nobody_configured_is_known_by_the_list(start: Start) -> None:
    aliases = {"compat": {"aliases": {"dall-e-3": MODEL}}}
    teams = {"growth": {"keys": [{"key": KEY, "compat": False}]}}
    models = {ENDING: {"upstream": "openai"}}
    async with start({"models": models, "teams": teams, **aliases}) as gateway:
        async with gateway.sdk() as sdk:
            for model, day in (("gpt-image-1", "2026-10-23"), ("dall-e-3", "2026-05-12")):
                said = await refused(sdk, model)
                assert said == f"{model} was shut down by openai on {day}. Use {MODEL}."
                with pytest.raises(NotFoundError) as raised:
                    await sdk.models.retrieve(model)
                assert raised.value.code == "model_retired"
        async with gateway.http() as http:
            answer = await http.post("/images/estimate", json={"model": "gpt-image-1", **ASKED})
        assert answer.json()["refusal"]["code"] == "model_retired"
        assert len(gateway.sandbox.journal) == 0


@pytest.mark.usefixtures("no_star")
async def test_without_the_replacement_another_one_of_the_teams_is_named(start: Start) -> None:
    teams: dict[str, Any] = {"growth": {"models": [ENDING, "gpt-image-2", "gpt-5-mini"]}}
    models = {name: {"upstream": "openai"} for name in (ENDING, "gpt-5-mini")}
    over = "gpt-image-1 was shut down by openai on 2026-10-23."
    async with start({"models": models, "teams": teams}) as gateway, gateway.sdk() as sdk:
        said = await refused(sdk, "gpt-image-1")
        assert said == f"{over} You may use gpt-image-2. GET /v1/models lists yours."
    teams["growth"]["models"] = ["gpt-5-mini"]
    async with start({"models": models, "teams": teams}) as gateway, gateway.sdk() as sdk:
        # A model that only writes is no help to who wants a picture.
        assert await refused(sdk, "gpt-image-1") == f"{over} GET /v1/models lists yours."


@pytest.mark.usefixtures("no_star")
async def test_a_hint_prefers_what_goes_on(start: Start, clock: TestClock) -> None:
    changes: dict[str, Any] = {"models": {ENDING: {"upstream": "openai"}}}

    async def hint(gateway: GatewayUnderTest) -> str:
        async with gateway.sdk() as sdk:
            with pytest.raises(NotFoundError) as raised:
                await sdk.images.generate(model="gpt-image-1.6", **ASKED)
        assert raised.value.code == "model_not_found"
        return raised.value.message.removeprefix("Error code: 404 - No model gpt-image-1.6.")

    async with start(changes) as gateway:
        assert (await hint(gateway)).startswith(" Did you mean gpt-image-2?")
    changes["teams"] = {"growth": {"models": [ENDING]}}
    async with start(changes) as gateway:
        assert (await hint(gateway)).startswith(f" Did you mean {ENDING}?")
        clock.advance(days=10)
        assert await hint(gateway) == " GET /v1/models lists yours."


async def test_a_replacement_that_ends_leads_on_to_its_own(
    start: Start, sandbox: SandboxServer
) -> None:
    changes = {
        "upstreams": {"azure": elsewhere(sandbox)},
        "models": {name: {"upstream": "azure"} for name in ("a", "b", "c")},
        "prices": {
            "rows": [
                row("a", shuts_down="2026-11-01", replacement="b"),
                row("b", shuts_down="2026-12-10", replacement="c"),
                row("c"),
            ]
        },
    }
    async with start(changes) as gateway, gateway.sdk() as sdk:
        assert (await refused(sdk, "a")).endswith("Use c.")


async def test_no_administrator_can_open_what_is_gone(start: Start) -> None:
    async with start({"teams": {"growth": {"models": [MODEL]}}}) as gateway, gateway.sdk() as sdk:
        assert (await refused(sdk, "gpt-image-1")).endswith(f"Use {MODEL}.")


@pytest.mark.parametrize(
    "mistake",
    [{"quality": "ultra"}, {"response_format": "url"}, {"background": "purple"}],
    ids=str,
)
async def test_that_it_is_gone_goes_before_what_it_would_not_take(
    start: Start, mistake: dict[str, Any]
) -> None:
    models = {"gpt-image-1": {"upstream": "openai", "validate": "strict"}}
    asked = {"model": "gpt-image-1", **ASKED, **mistake}
    async with start({"models": models}) as gateway, gateway.http() as http:
        answer = await http.post("/images/generations", json=asked)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_retired")
        estimate = await http.post("/images/estimate", json=asked)
        assert estimate.json()["refusal"]["code"] == "model_retired"
        assert len(gateway.sandbox.journal) == 0


async def test_an_alias_is_described_under_its_own_name(start: Start) -> None:
    aliases = {"dall-e-3": MODEL, "dall-e-2": "gpt-image-1"}
    models = {"gpt-image-1": {"upstream": "openai"}}
    teams = {"design": {"models": ["gpt-image-2"]}}
    changes = {"models": models, "compat": {"aliases": aliases}, "teams": teams}
    async with start(changes) as gateway, gateway.sdk() as sdk:
        model, meant = await sdk.models.retrieve("dall-e-3"), await sdk.models.retrieve(MODEL)
        assert model.model_dump() == {**meant.model_dump(), "id": "dall-e-3"}
        assert "dall-e-3" not in {one.id async for one in sdk.models.list()}
        with pytest.raises(NotFoundError) as raised:
            await sdk.models.retrieve("dall-e-2")
        assert raised.value.code == "model_retired"
        async with gateway.sdk(OTHER_KEY) as other:
            with pytest.raises(APIStatusError) as hidden:
                await other.models.retrieve("dall-e-3")
        assert hidden.value.code == "model_not_found"
