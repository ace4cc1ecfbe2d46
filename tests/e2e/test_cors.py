"""Pages of other origins: let in by name, told what they may read, and never by default."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from gateway.api.cors import EXPOSED
from gateway.sandbox.rules import Rule
from tests.reference.errors import ANSWER_HEADERS
from tests.running import KEY, MODEL, GatewayUnderTest, Start

PAGE = "https://studio.example.com"
CORS: dict[str, Any] = {"server": {"cors": {"origins": [PAGE, "http://localhost:5173"]}}}
ASKED: dict[str, Any] = {"model": MODEL, "prompt": "A lighthouse", "quality": "low"}
LIMITS = {"images_per_minute": 6, "requests_per_minute": 60}
SAFELISTED = {"cache-control", "content-length", "content-type"}
"""What a page may read anyhow."""
NOT_FOR_PAGES = {
    "access-control-allow-origin",
    "access-control-expose-headers",
    "allow",
    "connection",
    "date",
    "transfer-encoding",
    "x-content-type-options",
    "vary",
    "x-accel-buffering",
}
"""What is for the browser, or for what stands between."""


def preflight(
    origin: str = PAGE, method: str = "POST", headers: str = "authorization,content-type"
) -> dict[str, str]:
    return {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": headers,
    }


async def asked(gateway: GatewayUnderTest, path: str, headers: dict[str, str]) -> httpx.Response:
    async with httpx.AsyncClient(base_url=gateway.origin, verify=False) as http:
        return await http.options(path, headers=headers)


async def test_nobody_is_let_in_by_default(gateway: GatewayUnderTest) -> None:
    answer = await asked(gateway, "/v1/images/generations", preflight())
    assert answer.status_code == 405
    assert answer.json()["error"]["code"] == "method_not_allowed"
    async with gateway.http(headers={"origin": PAGE}) as http:
        listed = await http.get("/models")
    for said in (answer, listed):
        assert not [name for name in said.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    "path",
    ["/v1/images/generations", "/openai/deployments/m/images/edits", "/v1/models", "/v1/nothing"],
)
async def test_a_preflight_before_every_door(start: Start, path: str) -> None:
    sdk = "authorization, api-key, content-type, x-stainless-os, x-stainless-retry-count"
    more = "openai-organization, idempotency-key, cache-control, prefer, traceparent, user-agent"
    async with start(CORS) as gateway:
        answer = await asked(gateway, path, preflight(headers=f"{sdk}, {more}"))
    assert (answer.status_code, answer.content) == (204, b"")
    said = answer.headers
    assert said["access-control-allow-origin"] == PAGE
    assert said["access-control-allow-headers"] == f"{sdk}, {more}"
    assert said["access-control-max-age"] == "600"
    assert "POST" in said["access-control-allow-methods"]
    assert "Origin" in said["vary"]
    assert "access-control-allow-credentials" not in said


@pytest.mark.parametrize(
    ("headers", "what"),
    [
        (preflight("https://evil.example.com"), "origin"),
        (preflight("https://studio.example.com.evil.com"), "origin"),
        (preflight("http://studio.example.com"), "origin"),
        (preflight("null"), "origin"),
        (preflight(method="PUT"), "method"),
        (preflight(headers="authorization, cookie"), "the header cookie"),
    ],
)
async def test_a_preflight_that_is_refused_is_an_error_in_json(
    start: Start, headers: dict[str, str], what: str
) -> None:
    async with start(CORS) as gateway:
        answer = await asked(gateway, "/v1/images/generations", headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "cors_refused")
    assert answer.headers["content-type"] == "application/json"
    assert what in error["message"]
    assert "server.cors" in error["message"]
    if what == "origin":
        assert "access-control-allow-origin" not in answer.headers


async def test_every_header_of_ours_can_be_read_by_a_page(start: Start) -> None:
    """Answers and refusals, raw doors and others: all of them say who may read them, and what."""
    changes: dict[str, Any] = {
        **CORS,
        "teams": {"growth": {"budget": {"month": 50}, "limits": LIMITS}},
    }
    async with start(changes) as gateway, gateway.http(headers={"origin": PAGE}) as http:
        gateway.sandbox.rules.add(Rule(payload_bytes=400))
        path = "/images/generations"
        fresh, ending = {"cache-control": "no-cache"}, {**ASKED, "model": "gpt-image-1.5"}
        keyed = {"idempotency-key": "once", **fresh}
        answers = [
            await http.post(path, json=ASKED),
            await http.post(path, json=ASKED),
            await http.post(path, json=ending),
            await http.post(
                path, json={**ASKED, "stream": True, "partial_images": 1}, headers=fresh
            ),
            await http.post(path, json=ASKED, headers=keyed),
            await http.post(path, json=ASKED, headers=keyed),
            await http.post(path, json=ASKED, headers={"prefer": "respond-async", **fresh}),
            await http.post(path, json={**ASKED, "n": 5}, headers=fresh),
            await http.post(path, json={}),
            await http.get(path),
            await http.get("/models"),
            await http.get("/images/results/req_000000000000000000000000"),
            await http.post("/images/variations"),
            await http.get("/models", headers={"authorization": "Bearer nobody-0123456789"}),
        ]
    seen = {answer.status_code for answer in answers}
    assert seen == {200, 202, 400, 401, 404, 405, 429}
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == PAGE
        exposed = set(answer.headers["access-control-expose-headers"].split(", "))
        assert exposed == set(EXPOSED)
        assert set(answer.headers) - exposed - SAFELISTED - NOT_FOR_PAGES == set()
    named = {name for answer in answers for name in answer.headers}
    assert set(EXPOSED) - named == {"x-gateway-changed"}


def test_every_header_of_the_docs_can_be_read_by_a_page() -> None:
    assert set(ANSWER_HEADERS) - NOT_FOR_PAGES <= set(EXPOSED)


async def test_an_answer_to_another_page_is_not_marked_for_it(start: Start) -> None:
    async with start(CORS) as gateway, gateway.http() as http:
        for origin in ("https://evil.example.com", "http://localhost:5174", "null"):
            answer = await http.get("/models", headers={"origin": origin})
            assert "access-control-allow-origin" not in answer.headers
            assert "Origin" in answer.headers["vary"]


async def test_a_star_lets_every_page_in_without_credentials(start: Start) -> None:
    changes: dict[str, Any] = {"server": {"cors": {"origins": ["*"], "max_age": "1h"}}}
    async with start(changes) as gateway, gateway.http(headers={"origin": PAGE}) as http:
        answer = await http.get("/models")
        ahead = await asked(gateway, "/v1/models", preflight("null", "GET"))
    for said in (answer.headers, ahead.headers):
        assert said["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in said
    assert ahead.headers["access-control-max-age"] == "3600"
    # A page of the internet does not get into a private network by a star alone.
    private = {**preflight(), "access-control-request-private-network": "true"}
    async with start(changes) as gateway:
        assert (await asked(gateway, "/v1/models", private)).status_code == 400
    async with start(CORS) as gateway:
        assert (await asked(gateway, "/v1/models", private)).status_code == 204


async def test_who_is_no_page_sees_no_difference(start: Start) -> None:
    async with start(CORS) as gateway, gateway.sdk(KEY) as sdk:
        gateway.sandbox.rules.add(Rule(payload_bytes=400))
        answer = await sdk.images.with_raw_response.generate(**ASKED)
    assert "access-control-allow-origin" not in answer.headers
