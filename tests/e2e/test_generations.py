"""The main job: an unmodified SDK makes a picture; the team's key in, the upstream's key out."""

from __future__ import annotations

import base64
import io
import json
import socket
from dataclasses import dataclass, field
from typing import Any

import pytest
from openai import (
    APIStatusError,
    AsyncOpenAI,
    BadRequestError,
    InternalServerError,
    RateLimitError,
)
from PIL import Image

from gateway.domain.ledger import UsageRow
from gateway.relay import landing
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from tests.running import ALIAS, MODEL, GatewayUnderTest, Start

ASKED: dict[str, Any] = {
    "model": MODEL,
    "prompt": "A lighthouse",
    "quality": "low",
    "size": "1024x1024",
}
"""196 output tokens at $30 a million and 3 of text at $5 (contract 5.3): $0.005895. Its bound
counts each of the prompt's 12 bytes as a token, and 32 around it: $0.0061."""
COST, BOUND = 5_895_000, 6_100_000
USAGE = {
    "input_tokens": 3,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 3},
    "output_tokens": 196,
    "output_tokens_details": {"image_tokens": 196, "text_tokens": 0},
    "total_tokens": 199,
}
EVERY_ANSWER = {
    "date",
    "content-type",
    "content-length",
    "x-request-id",
    "x-upstream-request-id",
    "openai-processing-ms",
    "openai-version",
    "x-cost-usd",
    "x-cost-basis",
    "x-cache",
    "x-model-served",
    "x-gateway-upstream",
    "x-gateway-attempts",
}


def quick(gateway: GatewayUnderTest, **fault: Any) -> None:
    """Answers from the sandbox that need no drawing."""
    gateway.sandbox.rules.add(Rule(**{"payload_bytes": 400, **fault}))


def answers(gateway: GatewayUnderTest, body: bytes, **more: Any) -> None:
    """Lets the upstream answer every request with these very bytes."""
    rule = Rule(status=200, body=body, content_type="application/json", **more)
    gateway.sandbox.rules.add(rule)


def an_answer(picture: bytes = b"iVBORw0KGgoA", usage: object = USAGE) -> bytes:
    tail = b'],"quality":"low","size":"1024x1024","usage":%b}' % json.dumps(usage).encode()
    return b'{"created":1790000000,"data":[{"b64_json":"' + picture + b'"}' + tail


async def booked(gateway: GatewayUnderTest) -> UsageRow:
    """The only row of the books (empty where nothing was booked); and nothing is left on hold."""
    assert await gateway.gateway.ledger.open_holds() == 0
    rows = await gateway.usage()
    assert len(rows) <= 1
    return rows[0] if rows else UsageRow("", "", "", "")


async def failing(sdk: AsyncOpenAI, **changes: Any) -> APIStatusError:
    """The error that the SDK raises for a request."""
    async with sdk:
        with pytest.raises(APIStatusError) as raised:
            await sdk.images.generate(**{**ASKED, **changes})
    return raised.value


async def test_a_picture_comes_back(gateway: GatewayUnderTest) -> None:
    async with gateway.sdk() as sdk:
        answer = await sdk.images.generate(
            model=MODEL, prompt="A lighthouse", quality="low", size="1024x1024"
        )
    assert answer.data
    picture = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or "")))
    assert picture.size == (1024, 1024)
    [record] = gateway.sandbox.journal
    assert dict(record.headers)["authorization"] == "Bearer sk-upstream-secret"


async def test_an_alias_is_spliced_and_nothing_else_changes(gateway: GatewayUnderTest) -> None:
    body = b'{ "n":1, "prompt" : "caf\\u00e9", "model":"team-art","quality":"low", "size":null }'
    async with gateway.http() as http:
        answer = await http.post(
            "/images/generations", content=body, headers={"content-type": "application/json"}
        )
    assert answer.status_code == 200
    assert answer.headers["x-model-served"] == MODEL
    [record] = gateway.sandbox.journal
    assert record.body == body.replace(ALIAS.encode(), MODEL.encode())


async def test_every_parameter_of_the_contract_arrives(start: Start) -> None:
    everything: dict[str, Any] = {
        "prompt": 'Ein Leuchtturm bei Sturm, 灯塔 \U0001f5fc "quoted" \\ \n',
        "model": ALIAS,
        "n": 2,
        "size": "1536x1024",
        "quality": "xhigh",
        "complexity": "high",
        "background": "transparent",
        "moderation": "low",
        "output_format": "webp",
        "output_compression": 80,
        "frame_count": 4,
        "frame_duration_ms": 120,
        "svg": {"model": "gpt-6-astra", "reasoning": {"effort": "xhigh"}},
        "stream": False,
        "partial_images": 2,
        "safety_identifier": "user-123",
        "user": "someone",
        "response_format": "b64_json",
        "style": "vivid",
    }
    async with start({"compat": False}) as gateway, gateway.sdk() as sdk:
        answers(gateway, an_answer())
        await sdk.images.generate(**everything)
        [record] = gateway.sandbox.journal
    assert json.loads(record.body) == {**everything, "model": MODEL}


async def test_unknown_parameters_pass_and_the_upstream_decides(
    gateway: GatewayUnderTest,
) -> None:
    extra = {
        "seed": 2**70,
        "negative_prompt": "",
        "lora": [{"name": "x", "weight": 0.30000000000000004}],
        "nothing": None,
        "flag": True,
    }
    answers(gateway, an_answer(), times=1)
    async with gateway.sdk() as sdk:
        await sdk.images.generate(**ASKED, extra_body=extra)
        assert json.loads(gateway.sandbox.journal[0].body) == {**ASKED, **extra}
        with pytest.raises(BadRequestError) as raised:
            await sdk.images.generate(**ASKED, extra_body={"seed": 1})
    assert raised.value.code == "unknown_parameter"
    assert raised.value.param == "seed"


async def test_nulls_are_forwarded_and_mean_nothing(gateway: GatewayUnderTest) -> None:
    quick(gateway)
    names = ("n", "background", "stream", "partial_images", "output_format", "moderation")
    nulls: dict[str, Any] = dict.fromkeys(names)
    async with gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.generate(**ASKED, **nulls)
    assert answer.headers["x-cost-usd"] == "0.005895"
    [record] = gateway.sandbox.journal
    assert json.loads(record.body) == {**ASKED, **nulls}


async def test_what_is_the_owners_or_the_clients_stays_where_it_is(
    gateway: GatewayUnderTest,
) -> None:
    quick(gateway)
    headers = {"cookie": "session=1", "x-forwarded-for": "10.0.0.1", "x-api-key": "mine"}
    async with gateway.sdk(organization="org-client", project="proj_client") as sdk:
        await sdk.images.generate(**ASKED, extra_headers=headers)
    [record] = gateway.sandbox.journal
    assert {name for name, _ in record.headers} == {
        "host",
        "accept",
        "accept-encoding",
        "authorization",
        "content-length",
        "content-type",
        "user-agent",
    }
    assert record.headers_of("authorization") == ["Bearer sk-upstream-secret"]


async def test_an_answer_says_what_it_cost_and_nothing_of_the_shared_account(
    gateway: GatewayUnderTest,
) -> None:
    quick(gateway)
    async with gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.generate(**{**ASKED, "model": ALIAS})
    [record] = gateway.sandbox.journal
    said = {name.lower(): value for name, value in answer.headers.items()}
    assert said.keys() == EVERY_ANSWER
    assert said["content-type"] == "application/json"
    assert said["x-cost-usd"] == "0.005895"
    assert said["x-cost-basis"] == "usage"
    assert said["x-cache"] == "miss"
    assert said["x-model-served"] == MODEL
    assert said["x-gateway-upstream"] == "openai"
    assert said["x-gateway-attempts"] == "1"
    assert said["x-upstream-request-id"] == record.request_id
    [(receipt, _)] = await gateway.told.until(1)
    assert said["x-request-id"] == receipt.rid
    everything = json.dumps(said)
    for secret in ("org-sandbox", "proj_sandbox", "__cf_bm", gateway.sandbox.origin[7:], "sk-"):
        assert secret not in everything
    row = await booked(gateway)
    assert (row.team, row.model, row.requests, row.images) == ("growth", ALIAS, 1, 1)
    assert (row.text_in, row.image_out, row.cost, row.flagged) == (3, 196, COST, 0)


async def test_with_limits_the_headers_are_the_teams_own(start: Start) -> None:
    limits = {"requests_per_minute": 60, "images_per_minute": 20}
    team = {"limits": limits, "budget": {"day": 5.00, "month": 50.00}}
    async with start({"teams": {"growth": team}}) as gateway:
        quick(gateway)
        async with gateway.sdk() as sdk:
            answer = await sdk.images.with_raw_response.generate(**ASKED, n=2)
    said = answer.headers
    assert said["x-ratelimit-limit-requests"] == "60"
    assert said["x-ratelimit-remaining-requests"] == "59"
    assert said["x-ratelimit-reset-requests"] == "1.000s"
    assert said["x-ratelimit-limit-images"] == "20"
    assert said["x-ratelimit-remaining-images"] == "18"
    assert said["x-ratelimit-reset-images"] == "6.000s"
    assert said["x-cost-usd"] == "0.011775"
    assert said["x-budget-remaining-usd"] == "4.988225"
    assert said["x-budget-reset"] == "2026-11-23T00:00:00Z"
    assert not [name for name in said if "tokens" in name or "input-images" in name]


COSTS: list[tuple[dict[str, Any], str]] = [
    ({"quality": "medium"}, "0.013185"),
    ({"quality": "high"}, "0.052695"),
    ({"quality": "xhigh"}, "0.093675"),
    ({"quality": "max"}, "0.210735"),
    ({"size": "3840x2160", "quality": "max"}, "0.400275"),
    ({"model": "gpt-image-2", "quality": "medium"}, "0.052695"),
    ({"model": "gpt-image-1.5", "quality": "medium"}, "0.033807"),
    ({"model": "gpt-image-1-mini", "size": "1024x1536"}, "0.00327"),
    ({"n": 3}, "0.017655"),
]


async def test_the_cost_is_exact(gateway: GatewayUnderTest) -> None:
    quick(gateway)
    async with gateway.sdk() as sdk:
        for changes, dollars in COSTS:
            answer = await sdk.images.with_raw_response.generate(**{**ASKED, **changes})
            assert answer.headers["x-cost-usd"] == dollars, changes
            assert answer.headers["x-cost-basis"] == "usage"


async def test_an_answer_arrives_byte_for_byte(gateway: GatewayUnderTest) -> None:
    odd = (
        b' \n{"x":1E+30,"data" : [ {"b64_json":"aVZC\\u0041\\/"} ],\r\n\t"caf\xc3\xa9":'
        b'"\\ud83d\\ude00",'
        b'"big":123456789012345678901234567890, "usage":%b }\n\n' % json.dumps(USAGE).encode()
    )
    answers(gateway, odd)
    async with gateway.http() as http:
        answer = await http.post("/images/generations", json=ASKED)
    assert answer.content == odd
    assert answer.headers["content-length"] == str(len(odd))
    assert answer.headers["x-cost-usd"] == "0.005895"


async def test_twenty_megabytes_arrive_byte_for_byte(gateway: GatewayUnderTest) -> None:
    body = an_answer(b"A" * 20_000_000)
    answers(gateway, body)
    async with gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.generate(**ASKED)
    assert answer.content == body


async def test_beyond_the_buffer_answers_wait_in_a_file(start: Start) -> None:
    body = an_answer(b"A" * 20_000_000)
    async with start({"server": {"buffer_bytes": "1MiB"}}) as gateway:
        answers(gateway, body)
        async with (
            gateway.http() as http,
            http.stream("POST", "/images/generations", json=ASKED) as answer,
        ):
            # The client has the head and takes no more than the sockets do.
            held = await gateway.metrics()
            assert held['gateway_inflight_bytes{where="disk"}'] == len(body)
            assert held['gateway_inflight_bytes{where="memory"}'] <= 1024 * 1024
            assert await answer.aread() == body
        await gateway.told.until(1)
        left = await gateway.metrics()
        assert left['gateway_inflight_bytes{where="disk"}'] == 0
        assert left['gateway_inflight_bytes{where="memory"}'] == 0


async def test_a_compressed_answer_is_unpacked(gateway: GatewayUnderTest) -> None:
    quick(gateway, gzip=True)
    async with gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.generate(**ASKED)
    assert "content-encoding" not in answer.headers
    assert json.loads(answer.content)["usage"] == USAGE
    assert answer.headers["x-cost-usd"] == "0.005895"


@dataclass(frozen=True)
class Pitfall:
    """A 200 that is no success: what the client is told, and what is booked."""

    fault: dict[str, Any]
    cost: int = 0
    status: int = 502
    code: str = "upstream_bad_response"
    unresolved: int = 0
    flagged: int = 0
    says: str = "not retried for you"


PITFALLS = {
    "cut body": Pitfall(
        {"payload_bytes": 4000, "cut_after_bytes": 1000}, BOUND, unresolved=1, says="buy it twice"
    ),
    "cut before its last byte": Pitfall(
        {"cut_after_bytes": 700}, BOUND, unresolved=1, says="buy it twice"
    ),
    "an error inside": Pitfall({"error_in_200": True}, code="server_error", says="Sorry about"),
    "an error beside a picture": Pitfall(
        {"extra_fields": {"error": {"message": "and yet"}}}, COST, says="an error too"
    ),
    "an error that is a text": Pitfall(
        {"status": 200, "body": {"error": "out of paint"}}, code="http_502", says="out of paint"
    ),
    "a refusal inside": Pitfall(
        {"status": 200, "body": {"error": {"message": "no", "code": "moderation_blocked"}}},
        status=400,
        code="moderation_blocked",
        says="no",
    ),
    "empty data": Pitfall({"empty_data": True}, COST, says="without a picture"),
    "data that is null": Pitfall(
        {"status": 200, "body": {"created": 1, "data": None}}, BOUND, flagged=1
    ),
    "empty data, no usage": Pitfall({"empty_data": True, "no_usage": True}, BOUND, flagged=1),
    "html": Pitfall({"html_200": True}, BOUND, flagged=1, says="not JSON"),
    "empty body": Pitfall({"empty_body": True}, BOUND, flagged=1, says="not JSON"),
    "not an object": Pitfall({"status": 200, "body": b"[1, 2]"}, BOUND, flagged=1),
}


@pytest.mark.parametrize("pitfall", PITFALLS.values(), ids=PITFALLS)
async def test_a_success_that_is_none_is_a_clean_error(
    gateway: GatewayUnderTest, pitfall: Pitfall
) -> None:
    quick(gateway, **pitfall.fault)
    # The SDK's own two retries would buy the picture again.
    error = await failing(gateway.sdk(max_retries=2))
    assert error.status_code == pitfall.status
    assert error.code == (None if pitfall.code == "http_502" else pitfall.code)
    assert pitfall.says in error.message
    assert error.response.headers.get("x-should-retry", "false") == "false"
    [(receipt, _)] = await gateway.told.until(1)
    assert len(gateway.sandbox.journal) == 1
    assert receipt.code == pitfall.code
    row = await booked(gateway)
    assert (row.cost, row.images) == (pitfall.cost, 0)
    assert (row.unresolved, row.flagged) == (pitfall.unresolved, pitfall.flagged)
    assert row.requests == (1 if pitfall.cost else 0)
    # Nothing of it was kept.
    error = await failing(gateway.sdk())
    assert error.status_code == pitfall.status
    assert len(gateway.sandbox.journal) == 2


@pytest.mark.parametrize("oddity", ["half \ud83d", 1e30])
async def test_a_harmless_oddity_costs_no_picture(
    gateway: GatewayUnderTest, oddity: object
) -> None:
    quick(gateway, extra_fields={"note": oddity})
    async with gateway.sdk() as sdk:
        answer = await sdk.images.generate(**ASKED)
    assert answer.data
    assert (await booked(gateway)).images == 1


async def test_a_fault_of_our_own_is_booked_at_once(
    gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(landing, "land_json", broken)
    error = await failing(gateway.sdk(max_retries=2))
    [(receipt, _)] = await gateway.told.until(1)
    assert (error.status_code, error.code) == (500, "internal_error")
    assert receipt.rid in error.message
    assert len(gateway.sandbox.journal) == 1
    row = await booked(gateway)
    assert (row.cost, row.unresolved, row.images) == (BOUND, 1, 0)


@dataclass(frozen=True)
class Oddity:
    """A picture whose bill is not as it should be."""

    fault: dict[str, Any]
    dollars: str = "0.0061"
    basis: str = "estimated"
    flags: tuple[str, ...] = ()
    metric: str = ""
    asked: dict[str, Any] = field(default_factory=dict)
    images: int = 1


def used(tokens_in: int, tokens_out: int) -> dict[str, int]:
    return {"input_tokens": tokens_in, "output_tokens": tokens_out}


ODDITIES = {
    "no usage": Oddity({"no_usage": True}, flags=("no_usage",), metric="usage_missing"),
    "null usage": Oddity({"usage": None}, flags=("no_usage",), metric="usage_missing"),
    "other names": Oddity({"usage": {"prompt_tokens": 5}}, flags=("no_usage",)),
    "negative": Oddity({"usage": used(-1, 196)}, flags=("invalid_usage",), metric="usage_invalid"),
    "zero": Oddity({"usage": used(0, 0)}, flags=("invalid_usage",), metric="usage_invalid"),
    "text": Oddity({"usage": "lots"}, flags=("invalid_usage",)),
    "does not add up": Oddity(
        {"usage": {**used(3, 196), "total_tokens": 7}}, flags=("invalid_usage",)
    ),
    "without details": Oddity({"usage": used(3, 196)}, "0.005895", "usage"),
    "over the bound": Oddity(
        {"usage": used(3, 7024)},
        "0.210735",
        "usage",
        ("over_bound",),
        "ledger_underestimate",
    ),
    "fewer pictures than n": Oddity({"data_count": 1}, "0.005895", "usage", asked={"n": 2}),
    "fewer, and no usage": Oddity(
        {"data_count": 1, "no_usage": True}, "0.01198", flags=("no_usage",), asked={"n": 2}
    ),
}


@pytest.mark.parametrize("oddity", ODDITIES.values(), ids=ODDITIES)
async def test_a_picture_with_an_odd_bill_is_delivered_booked_and_flagged(
    gateway: GatewayUnderTest, oddity: Oddity
) -> None:
    quick(gateway, **oddity.fault)
    async with gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.generate(**ASKED, **oddity.asked)
    assert len(json.loads(answer.content)["data"]) == 1
    assert answer.headers["x-cost-usd"] == oddity.dollars
    assert answer.headers["x-cost-basis"] == oddity.basis
    await gateway.told.until(1)
    assert gateway.told.last.flags == oddity.flags
    row = await booked(gateway)
    assert row.cost == round(float(oddity.dollars) * 1e9)
    assert (row.images, row.flagged) == (oddity.images, int(bool(oddity.flags)))
    if oddity.metric:
        metrics = await gateway.metrics()
        assert metrics[f'gateway_{oddity.metric}_total{{model="{MODEL}"}}'] == 1


async def test_fewer_pictures_than_asked_for_are_not_kept(gateway: GatewayUnderTest) -> None:
    quick(gateway, data_count=1)
    async with gateway.sdk() as sdk:
        for _ in range(2):
            answer = await sdk.images.with_raw_response.generate(**ASKED, n=2)
            assert answer.headers["x-cache"] == "miss"


async def test_a_url_is_passed_on_as_it_is_and_not_kept(gateway: GatewayUnderTest) -> None:
    quick(gateway, url_instead=True)
    async with gateway.sdk() as sdk:
        first = await sdk.images.generate(**ASKED)
        second = await sdk.images.generate(**ASKED)
    assert first.data
    assert second.data
    assert first.data[0].url == "https://sandbox.invalid/files/1.png"
    assert first.data[0].b64_json is None
    assert second.data[0].url == "https://sandbox.invalid/files/2.png"


MODERATED = {
    "message": "Your request was rejected by the safety system. request ID req_1",
    "type": "image_generation_user_error",
    "param": None,
    "code": "moderation_blocked",
    "moderation_details": {"moderation_stage": "output", "categories": ["violence", "self-harm"]},
}


async def test_a_refusal_by_the_provider_is_passed_on_unchanged(
    gateway: GatewayUnderTest,
) -> None:
    body = json.dumps({"error": MODERATED}, indent=1).encode()
    rule = Rule(status=400, body=body, content_type="application/json")
    gateway.sandbox.rules.add(rule)
    error = await failing(gateway.sdk(max_retries=2))
    assert isinstance(error, BadRequestError)
    assert error.body == MODERATED
    assert error.response.content == body
    assert "x-should-retry" not in error.response.headers
    assert "openai-organization" not in error.response.headers
    [(receipt, _)] = await gateway.told.until(1)
    assert error.request_id == receipt.rid
    assert receipt.reason == "moderation"
    assert (await booked(gateway)).requests == 0


async def test_the_providers_status_is_the_clients(gateway: GatewayUnderTest) -> None:
    for status in (400, 404, 409, 413, 422):
        quick(gateway, status=status, times=1)
        error = await failing(gateway.sdk())
        assert error.status_code == status
        assert error.message.endswith("The sandbox was told to refuse.")
    assert (await booked(gateway)).requests == 0


@pytest.mark.parametrize(
    ("status", "to_do"),
    [
        (401, "put a valid key into upstreams.openai.api_keys"),
        (402, "pay there, raise the limit, or put another account's key into "
              "upstreams.openai.api_keys"),
        (403, "let the key of upstreams.openai.api_keys use this model there, or put in one that "
              "may"),
    ],
)  # fmt: skip
async def test_a_refused_account_is_the_owners_fault(
    gateway: GatewayUnderTest, status: int, to_do: str
) -> None:
    quick(gateway, status=status, times=1)
    error = await failing(gateway.sdk(max_retries=2))
    assert isinstance(error, InternalServerError)
    assert error.status_code == 503
    assert error.code == "upstream_account_refused"
    assert error.message.endswith(
        f"The upstream openai refused this gateway's own account ({status}). Your key and "
        f"request are fine, and nothing was charged. The gateway's operator has to {to_do}."
    )
    assert error.response.headers["retry-after"] == "60"
    assert error.response.headers["x-should-retry"] == "false"
    assert len(gateway.sandbox.journal) == 1
    assert (await booked(gateway)).requests == 0


async def test_the_providers_rate_limit_is_waited_for(gateway: GatewayUnderTest) -> None:
    advice = {"retry-after": "1", "retry-after-ms": "30"}
    gateway.sandbox.rules.add(Rule(times=1, status=429, headers=advice))
    quick(gateway)
    async with gateway.sdk(max_retries=2) as sdk:
        await sdk.images.generate(**ASKED)
    told = await gateway.told.until(2)
    assert [receipt.status for receipt, _ in told] == [429, 200]
    assert (await booked(gateway)).cost == COST


async def test_the_providers_rate_limit_says_how_long(gateway: GatewayUnderTest) -> None:
    quick(gateway, status=429, headers={"retry-after": "7", "retry-after-ms": "6500"})
    error = await failing(gateway.sdk())
    assert isinstance(error, RateLimitError)
    assert error.code == "rate_limit_exceeded"
    assert error.response.headers["retry-after"] == "7"
    assert error.response.headers["retry-after-ms"] == "6500"
    assert not [name for name in error.response.headers if name.startswith("x-ratelimit")]


@pytest.mark.parametrize(
    "code", ["insufficient_quota", "credit_balance_exhausted", "project_spend_limit_exceeded"]
)
async def test_an_empty_account_never_looks_like_the_teams(
    gateway: GatewayUnderTest, code: str
) -> None:
    body = {"message": "You exceeded your quota", "type": "insufficient_quota", "code": code}
    quick(gateway, status=429, body={"error": body}, times=1)
    for _ in range(2):  # of which the second is not sent
        error = await failing(gateway.sdk(max_retries=2))
        assert error.status_code == 503
        assert error.code == "upstream_account_exhausted"
        assert "Your team's budget is fine, and nothing was charged." in error.message
        assert "pay there, raise the limit, or put another account's key into" in error.message
        assert error.response.headers["x-should-retry"] == "false"
        assert 50 < int(error.response.headers["retry-after"]) <= 60
    assert len(gateway.sandbox.journal) == 1
    assert (await booked(gateway)).requests == 0


async def test_the_providers_own_failure_may_be_retried(gateway: GatewayUnderTest) -> None:
    for status in (500, 503):
        quick(gateway, status=status, times=2)
        error = await failing(gateway.sdk())
        assert error.status_code == status
        assert error.type == "server_error"
        assert error.response.headers["x-gateway-attempts"] == "2"
        assert "x-should-retry" not in error.response.headers
    assert (await booked(gateway)).requests == 0


async def test_an_edge_that_gave_up_may_have_cost_a_picture(gateway: GatewayUnderTest) -> None:
    for number, status in enumerate((502, 504, 520, 524), start=1):
        quick(gateway, status=status, times=1)
        error = await failing(gateway.sdk(max_retries=2))
        assert error.status_code == 504
        assert error.code == "upstream_outcome_unknown"
        assert error.message.endswith(
            f"Something between this gateway and the upstream openai gave up ({status}). The "
            "picture may have been made and paid for, so this is not retried for you. Request id: "
            f"{error.request_id}."
        )
        assert error.response.headers["x-should-retry"] == "false"
        assert len(gateway.sandbox.journal) == number
    row = await booked(gateway)
    assert (row.requests, row.cost, row.images) == (4, 4 * BOUND, 0)
    assert (row.unresolved, row.unresolved_cost) == (4, 4 * BOUND)
    assert await gateway.gateway.ledger.unresolved() == 4 * BOUND


async def test_an_answer_that_never_begins_may_have_cost_a_picture(
    gateway: GatewayUnderTest,
) -> None:
    quick(gateway, cut_before_headers=True)
    error = await failing(gateway.sdk(max_retries=2))
    assert (error.status_code, error.code) == (502, "upstream_outcome_unknown")
    assert error.response.headers["x-should-retry"] == "false"
    assert len(gateway.sandbox.journal) == 1
    assert (await booked(gateway)).unresolved_cost == BOUND


async def test_an_upstream_that_is_late_may_have_made_the_picture(start: Start) -> None:
    slow = {"openai": {"timeouts": {"first_byte_seconds": 0.1}}}
    async with start({"upstreams": slow}) as gateway:
        quick(gateway, delay_seconds=20)
        error = await failing(gateway.sdk(max_retries=2))
        assert (error.status_code, error.code) == (504, "upstream_outcome_unknown")
        assert len(gateway.sandbox.journal) == 1
        assert (await booked(gateway)).unresolved_cost == BOUND


async def test_an_error_in_another_shape_gets_the_one_that_sdks_read(
    gateway: GatewayUnderTest,
) -> None:
    bodies: list[tuple[int, object, str]] = [
        (422, {"detail": [{"loc": ["body", "size"], "msg": "too large"}]}, "too large"),
        (400, {"detail": "size is wrong"}, "size is wrong"),
        (404, {"detail": "no such model"}, "no such model"),
        (409, b"<html>not now</html>", "The upstream answered 409 without an error body."),
    ]
    for status, body, words in bodies:
        quick(gateway, status=status, body=body, times=1)
        error = await failing(gateway.sdk())
        assert error.status_code == status
        assert words in error.message
        assert error.response.headers["content-type"] == "application/json"
    assert (await booked(gateway)).requests == 0


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"<html>not here</html>"),
        (404, {"detail": "Not Found"}),
        (405, b""),
        (404, {"error": {"message": "Invalid URL (POST /images/generations)",
                         "type": "invalid_request_error", "param": None, "code": None}}),
        (404, {"error": {"code": "404", "message": "Resource not found"}}),
    ],
)  # fmt: skip
async def test_a_base_url_that_leads_nowhere_is_the_operators(
    gateway: GatewayUnderTest, status: int, body: object
) -> None:
    """It is not the client's address that is wrong."""
    quick(gateway, status=status, body=body, times=1)
    error = await failing(gateway.sdk(max_retries=2))
    assert (error.status_code, error.code) == (502, "upstream_not_there")
    assert error.response.headers["x-should-retry"] == "false"
    assert "has to correct upstreams.openai.base_url, which usually ends in /v1" in error.message
    [(receipt, _)] = await gateway.told.until(1)
    assert (receipt.reason, receipt.upstream_status) == ("upstream_not_there", status)
    assert (await booked(gateway)).requests == 0


async def test_a_success_other_than_200_is_no_answer(gateway: GatewayUnderTest) -> None:
    quick(gateway, status=201, body={"id": "task-1", "status": "queued"})
    error = await failing(gateway.sdk(max_retries=2))
    assert (error.status_code, error.code) == (502, "upstream_bad_response")
    assert error.response.headers["x-should-retry"] == "false"
    assert len(gateway.sandbox.journal) == 1
    assert (await booked(gateway)).unresolved_cost == BOUND


async def test_a_name_in_another_script_is_a_model_too(
    start: Start, sandbox: SandboxServer
) -> None:
    star = {"*": {"upstream": "openai", "unpriced": "allow"}}
    async with start({"models": star}) as gateway:
        sandbox.rules.add(Rule(status=200, body=json.loads(an_answer())))
        async with gateway.sdk() as sdk:
            answer = await sdk.images.generate(**{**ASKED, "model": "模型-é"})
        assert answer.data
        assert sandbox.journal[0].fields["model"] == "模型-é"
        assert (await booked(gateway)).model == "模型-é"


async def test_a_redirect_is_not_followed(gateway: GatewayUnderTest) -> None:
    quick(gateway, redirect=f"{gateway.sandbox.base_url}/images/edits")
    error = await failing(gateway.sdk(max_retries=2))
    assert (error.status_code, error.code) == (502, "upstream_redirect")
    assert gateway.sandbox.origin not in error.response.text + str(error.response.headers)
    assert len(gateway.sandbox.journal) == 1
    assert (await booked(gateway)).requests == 0


async def test_an_upstream_that_is_not_there_costs_nothing(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        nowhere = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    async with start({"upstreams": {"openai": {"base_url": nowhere}}}) as gateway:
        error = await failing(gateway.sdk())
        assert (error.status_code, error.code) == (503, "upstream_unavailable")
        assert "Nothing was bought; try again." in error.message
        assert nowhere.split("/")[2] not in error.message
        assert error.response.headers["retry-after"] == "5"
        assert "x-should-retry" not in error.response.headers
        assert (await booked(gateway)).requests == 0


async def test_an_upstream_without_a_key_is_off(start: Start) -> None:
    async with start({"upstreams": {"openai": {"api_keys": [""]}}}) as gateway:
        error = await failing(gateway.sdk(max_retries=2))
        assert (error.status_code, error.code) == (503, "upstream_off")
        assert f"so {MODEL} is off" in error.message
        assert len(gateway.sandbox.journal) == 0


async def test_several_upstream_keys_take_turns(start: Start) -> None:
    keys = ["sk-upstream-one", "sk-upstream-two"]
    async with start({"upstreams": {"openai": {"api_keys": keys}}}) as gateway:
        quick(gateway)
        async with gateway.sdk() as sdk:
            for number in range(4):
                await sdk.images.generate(**{**ASKED, "prompt": f"Number {number}"})
        sent = [record.header("authorization") for record in gateway.sandbox.journal]
    assert sent == [f"Bearer {key}" for key in keys * 2]


async def test_the_gateway_refuses_only_what_it_must(gateway: GatewayUnderTest) -> None:
    """Framing, JSON, the types of what is priced; the upstream judges everything else."""
    quick(gateway)
    ours = {
        b'{"model":"gpt-image-2","prompt":"x","prompt":"y"}': "duplicate_key",
        b'{"model":"gpt-image-2","prompt":"x"': "invalid_json",
        b'{"model":"gpt-image-2","prompt":"x","n":"2"}': "invalid_type",
        b'{"model":"gpt-image-2","prompt":"x","n":11}': "invalid_value",
        b'{"prompt":"x"}': "missing_required_parameter",
    }
    async with gateway.http(headers={"content-type": "application/json"}) as http:
        for body, code in ours.items():
            answer = await http.post("/images/generations", content=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), body
            assert answer.headers["x-should-retry"] == "false"
        assert len(gateway.sandbox.journal) == 0
        theirs = {"model": MODEL, "prompt": "x", "size": "512x512", "background": "green"}
        answer = await http.post("/images/generations", json=theirs)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_value"
    assert len(gateway.sandbox.journal) == 1


async def test_strict_models_refuse_before_anything_is_sent(start: Start) -> None:
    strict = {"gpt-image-2": {"upstream": "openai", "validate": "strict"}}
    async with start({"models": strict, "compat": False}) as gateway:
        error = await failing(gateway.sdk(), model="gpt-image-2", size="512x512")
        assert error.status_code == 400
        assert error.message.endswith(
            "512x512 is not served by gpt-image-2. Nearest: 816x816. The picture must have from "
            "655,360 to 8,294,400 pixels."
        )
        assert error.param == "size"
        assert len(gateway.sandbox.journal) == 0
