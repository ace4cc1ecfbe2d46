"""Pictures as urls: whoever asks for `response_format=url` gets one that anybody may open, for a
while, and that gives exactly the picture that was bought."""

from __future__ import annotations

import asyncio
import base64
import io
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import httpx2
import pytest
from openai import APIStatusError
from PIL import Image

from gateway.relay.hosting import HOSTED
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from tests.flying import ASKED, FRESH, GENERATIONS, Fly, House, a_picture
from tests.processes import GatewayProcess
from tests.running import (
    KEY,
    MODEL,
    OTHER_KEY,
    GatewayUnderTest,
    Start,
    TestClock,
    config_of,
    run_gateway,
)
from tests.valkey import run_valkey

PUBLIC = "http://pictures.test/behind/a/prefix"
AUTHOR = {
    "upstream": "openai",
    "model": "gpt-6-astra",
    "usd_per_million_tokens": {"text_in": 1, "text_out": 10},
    "max_output_tokens": 1000,
}
"""What the writer of an SVG costs."""
URLS: dict[str, Any] = {"server": {"public_url": f"{PUBLIC}/"}, "prices": {"rows": [AUTHOR]}}
AS_URL = {**ASKED, "response_format": "url"}
SMALL: dict[str, Any] = {
    "model": MODEL,
    "prompt": "A harbour",
    "size": "1024x1024",
    "quality": "low",
    "response_format": "url",
}
LATER = {"prefer": "respond-async", **FRESH}
MISSING = f"{HOSTED}{32 * '0'}.png?expires=1795348800&signature={64 * '0'}"


@pytest.fixture
async def urls(start: Start) -> AsyncIterator[GatewayUnderTest]:
    """A gateway that is reached below ``PUBLIC``."""
    async with start(URLS) as running:
        yield running


@pytest.fixture
async def seen(fly: Fly) -> AsyncIterator[House]:
    """Such a gateway that can be looked into; its upstream sends a small picture."""
    async with fly(URLS) as house:
        house.gateway.sandbox.rules.clear()
        yield house


def inside(url: str | None) -> str:
    """A url as the proxy in front passes it on: without what stands before ``/v1``."""
    assert url is not None
    assert url.startswith(f"{PUBLIC}{HOSTED}")
    return url.removeprefix(PUBLIC)


async def ask(gateway: GatewayUnderTest, method: str, path: str, **headers: str) -> httpx.Response:
    """Asks as a browser does, without a key. ``If_Range`` is a header's name."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx.AsyncClient(base_url=gateway.origin, verify=False) as http:
        return await http.request(method, path, headers=named)


async def get(gateway: GatewayUnderTest, path: str, **headers: str) -> httpx.Response:
    return await ask(gateway, "GET", path, **headers)


async def generate(gateway: GatewayUnderTest, **changes: Any) -> httpx.Response:
    """An answer with urls; what ``headers`` has goes there."""
    headers = changes.pop("headers", {})
    async with gateway.http() as http:
        answer = await http.post(GENERATIONS, json={**AS_URL, **changes}, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert "b64_json" not in answer.text
    assert answer.headers["x-gateway-changed"] == "response_format=url->hosted"
    return answer


async def a_url(gateway: GatewayUnderTest, **changes: Any) -> str:
    return inside((await generate(gateway, **changes)).json()["data"][0]["url"])


async def bought(gateway: GatewayUnderTest, rid: str) -> list[bytes]:
    """The pictures of a result, as they were bought."""
    async with gateway.http() as http:
        found = (await http.get(f"/images/results/{rid}")).json()
    return [base64.b64decode(one["b64_json"]) for one in found["data"]]


# What a client sees


async def test_the_sdk_gets_a_url_that_opens_the_picture(urls: GatewayUnderTest) -> None:
    async with urls.sdk() as sdk:
        raw = await sdk.images.with_raw_response.generate(**AS_URL)
        answer = raw.parse()
    assert answer.data is not None
    [picture] = answer.data
    assert picture.b64_json is None
    assert answer.usage is not None
    path = inside(picture.url)
    async with httpx2.AsyncClient(base_url=urls.origin, verify=False) as anybody:
        found = await anybody.get(path)
    assert found.status_code == 200
    assert [found.content] == await bought(urls, raw.headers["x-request-id"])
    image = Image.open(io.BytesIO(found.content))
    image.load()
    assert (image.format, image.size) == ("PNG", (1024, 1024))
    name = urlsplit(path).path.removeprefix(HOSTED)
    wanted = {
        "content-type": "image/png",
        "content-length": str(len(found.content)),
        "content-disposition": f'inline; filename="{name}"',
        "accept-ranges": "bytes",
        "etag": f'"{name}"',
        "cache-control": "private, max-age=3600, immutable",
        "access-control-allow-origin": "*",
        "cross-origin-resource-policy": "cross-origin",
        "x-content-type-options": "nosniff",
        "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox",
    }
    assert {key: found.headers.get(key) for key in wanted} == wanted


FORMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "png": ({}, "image/png", "png"),
    "jpeg": ({}, "image/jpeg", "jpg"),
    "webp": ({}, "image/webp", "webp"),
    "gif": ({"size": "1024x640", "frame_count": 2}, "image/gif", "gif"),
    "svg": ({"svg": {"model": "gpt-6-astra"}}, "image/svg+xml", "svg"),
}


@pytest.mark.parametrize("output_format", FORMS)
async def test_each_form_has_its_type(urls: GatewayUnderTest, output_format: str) -> None:
    more, media_type, extension = FORMS[output_format]
    path = await a_url(urls, output_format=output_format, **more)
    assert urlsplit(path).path.endswith(f".{extension}")
    found = await get(urls, path)
    assert found.headers["content-type"] == media_type
    if output_format == "svg":
        assert found.text.startswith("<svg")
        assert "sandbox" in found.headers["content-security-policy"]
    else:
        image = Image.open(io.BytesIO(found.content))
        assert (image.format or "").lower() == output_format


async def test_several_pictures_have_a_url_each(urls: GatewayUnderTest) -> None:
    answer = await generate(urls, n=3)
    paths = [inside(one["url"]) for one in answer.json()["data"]]
    assert len(set(paths)) == 3
    found = [(await get(urls, path)).content for path in paths]
    assert found == await bought(urls, answer.headers["x-request-id"])
    assert len(set(found)) == 3
    metrics = await urls.metrics()
    assert metrics['gateway_hosted_total{outcome="stored"}'] == 3
    assert metrics['gateway_hosted_total{outcome="served"}'] == 3
    assert metrics["gateway_hosted_sent_bytes_total"] == sum(map(len, found))
    assert metrics['gateway_hosted_bytes{where="disk"}'] > sum(map(len, found))


async def test_the_same_picture_is_had_in_both_forms(urls: GatewayUnderTest) -> None:
    path = await a_url(urls)
    async with urls.http() as http:
        plain = await http.post(GENERATIONS, json=ASKED)
    found = await get(urls, path)
    assert base64.b64decode(plain.json()["data"][0]["b64_json"]) == found.content


async def test_an_edit_and_a_retired_name_have_urls_too(start: Start) -> None:
    async with start({**URLS, "compat": {"aliases": {"dall-e-3": MODEL}}}) as running:
        drawn = a_picture(3000)
        async with running.sdk() as sdk:
            edited = await sdk.images.with_raw_response.edit(
                image=("a.png", drawn), prompt="A boat", model=MODEL, response_format="url"
            )
            old = await sdk.images.with_raw_response.generate(
                model="dall-e-3", prompt="A boat", response_format="url", style="vivid"
            )
        for raw in (edited, old):
            [picture] = raw.parse().data or []
            found = await get(running, inside(picture.url))
            assert [found.content] == await bought(running, raw.headers["x-request-id"])
            assert "response_format=url->hosted" in raw.headers["x-gateway-changed"]


async def test_streams_and_results_stay_base64(urls: GatewayUnderTest) -> None:
    async with urls.http() as http:
        streamed = await http.post(GENERATIONS, json={**AS_URL, "stream": True})
        begun = await http.post(GENERATIONS, json=AS_URL, headers=LATER)
        result = f"/images/results/{begun.headers['x-request-id']}"
        found = await http.get(result, headers={"prefer": "wait=20"})
    assert b'"b64_json"' in streamed.content
    assert HOSTED not in streamed.text
    assert (begun.status_code, found.status_code) == (202, 200)
    assert found.json()["data"][0]["b64_json"]


async def test_urls_of_an_upstream_stay_as_they_are(urls: GatewayUnderTest) -> None:
    urls.sandbox.rules.add(Rule(url_instead=True))
    async with urls.http() as http:
        answer = await http.post(GENERATIONS, json=AS_URL)
    assert answer.status_code == 200
    [picture] = answer.json()["data"]
    assert picture["url"].startswith("https://")
    assert HOSTED not in picture["url"]


# Who comes back


async def test_a_kept_answer_has_the_same_picture_by_a_newer_url(urls: GatewayUnderTest) -> None:
    first = await generate(urls)
    await urls.put_away()
    urls.clock.advance(minutes=5)
    again = await generate(urls)
    assert (again.headers["x-cache"], again.headers["x-cost-usd"]) == ("hit", "0")
    paths = [inside(one.json()["data"][0]["url"]) for one in (first, again)]
    one, other = (urlsplit(path) for path in paths)
    assert one.path == other.path
    assert one.query != other.query
    assert await pictures(urls, *paths) == 2 * await bought(urls, first.headers["x-request-id"])
    urls.clock.advance(minutes=57)
    assert (await get(urls, paths[0])).status_code == 404
    assert (await get(urls, paths[1])).status_code == 200


async def pictures(gateway: GatewayUnderTest, *paths: str) -> list[bytes]:
    return [(await get(gateway, path)).content for path in paths]


async def test_what_costs_nothing_pushes_no_other_team_s_picture_out(start: Start) -> None:
    """Room for two pictures: one team has one, and the other asks for its own again and again."""
    async with start({**URLS, "hosted": {"max_bytes": "1MiB"}}) as gateway:
        async with gateway.http(OTHER_KEY) as http:
            first = (await http.post(GENERATIONS, json=SMALL)).json()
        path = inside(first["data"][0]["url"])
        whole = (await get(gateway, path)).content
        assert 2 * len(whole) < 1024 * 1024 < 12 * len(whole)
        found = [await generate(gateway, **SMALL) for _ in range(12)]
        assert {one.headers["x-cache"] for one in found[1:]} == {"hit"}
        names = {urlsplit(one.json()["data"][0]["url"]).path for one in found}
        assert len(names) == 1
        again = await get(gateway, path)
        assert (again.status_code, again.content) == (200, whole)
        metrics = await gateway.metrics()
        assert metrics['gateway_hosted_total{outcome="stored"}'] == 2
        assert metrics['gateway_hosted_total{outcome="reused"}'] == 11
        # The same answer in two teams has two names: one's url says nothing of the other's.
        assert urlsplit(path).path not in names


async def test_who_does_not_wait_is_told_that_the_result_has_base64(urls: GatewayUnderTest) -> None:
    async with urls.http() as http:
        later = await http.post(GENERATIONS, json=AS_URL, headers=LATER)
        assert (later.status_code, later.headers["x-gateway-changed"]) == (202, "response_format")
        await urls.told.until(1)
        await urls.put_away()
        found = await http.get(f"/images/results/{later.headers['x-request-id']}")
        assert (found.status_code, found.headers["x-gateway-changed"]) == (200, "response_format")
        assert list(found.json()["data"][0]) == ["b64_json"]
        # So it is with what was handed over by a url, and is fetched from there.
        waited = await generate(urls, prompt="Another lighthouse")
        found = await http.get(f"/images/results/{waited.headers['x-request-id']}")
        assert found.headers["x-gateway-changed"] == "response_format"
        # From the cache there is nothing to wait for.
        kept = await http.post(
            GENERATIONS, json={**AS_URL, "prompt": "Another lighthouse"},
            headers={"prefer": "respond-async"},
        )  # fmt: skip
        assert kept.headers["x-gateway-changed"] == "response_format=url->hosted"
        assert kept.json()["data"][0]["url"]


async def test_a_retry_that_joins_its_flight_gets_a_url(seen: House) -> None:
    gate = seen.hold_back()
    first = asyncio.create_task(generate(seen.gateway))
    await seen.watched_by(1)
    again = asyncio.create_task(generate(seen.gateway, headers={"x-stainless-retry-count": "1"}))
    await seen.joins(1)
    gate.set()
    answers = await asyncio.gather(first, again)
    paths = [inside(one.json()["data"][0]["url"]) for one in answers]
    one, other = [(await get(seen.gateway, path)).content for path in paths]
    assert one == other
    await seen.settled(purchases=1)


async def test_a_replay_under_an_idempotency_key_gets_a_url(seen: House) -> None:
    key = {"idempotency-key": "order-1", **FRESH}
    first = await generate(seen.gateway, headers=key)
    await seen.gateway.put_away()
    again = await generate(seen.gateway, headers=key)
    assert again.headers["idempotent-replayed"] == "true"
    paths = [inside(one.json()["data"][0]["url"]) for one in (first, again)]
    one, other = [(await get(seen.gateway, path)).content for path in paths]
    assert one == other
    await seen.settled(purchases=1)


# Whom it opens for


async def test_whatever_opens_nothing_has_one_answer(
    urls: GatewayUnderTest, clock: TestClock
) -> None:
    path = await a_url(urls)
    name, query = path.split("?")
    identifier = name.removeprefix(HOSTED)
    last = "0" if query[-1] != "0" else "1"
    other = f"{HOSTED}{'0' if identifier[0] != '0' else '1'}{identifier[1:]}?{query}"
    later = path.replace("expires=1", "expires=2")
    wrong = [
        MISSING, name, f"{name}?{query[:-1]}{last}", other, later,
        f"{name.replace('.png', '.svg')}?{query}",
        f"{HOSTED}%2e%2e%2f{identifier}?{query}",
        f"{HOSTED}{500 * 'a'}.png?{query}", f"{name}?{query}&{query}",
    ]  # fmt: skip
    answers = [await get(urls, one) for one in wrong]
    clock.advance(minutes=59, seconds=59)
    assert (await get(urls, path)).headers["cache-control"] == "private, max-age=1, immutable"
    clock.advance(seconds=1)
    answers.append(await get(urls, path))
    answers.append(await ask(urls, "HEAD", path))
    assert {answer.status_code for answer in answers} == {404}
    assert len({answer.content for answer in answers if answer.content}) == 1
    error = answers[0].json()["error"]
    assert (error["code"], error["type"]) == ("picture_not_found", "invalid_request_error")
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.headers["cache-control"] == "no-store"
    found = await urls.metrics()
    assert found['gateway_hosted_total{outcome="not_found"}'] == len(answers)


async def test_only_reading_is_allowed(urls: GatewayUnderTest) -> None:
    path = await a_url(urls)
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        answer = await ask(urls, method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
        assert answer.json()["error"]["code"] == "method_not_allowed"


async def test_a_page_of_another_origin_may_show_it(urls: GatewayUnderTest) -> None:
    for path in (await a_url(urls), MISSING):
        preflight = await ask(
            urls, "OPTIONS", path, origin="https://app.test",
            access_control_request_method="GET", access_control_request_headers="range",
        )  # fmt: skip
        assert (preflight.status_code, preflight.content) == (204, b"")
        assert preflight.headers["access-control-allow-origin"] == "*"
        assert preflight.headers["access-control-allow-methods"] == "GET, HEAD, OPTIONS"
        assert preflight.headers["access-control-allow-headers"] == "*"
    found = await get(urls, await a_url(urls), origin="https://app.test")
    assert "content-range" in found.headers["access-control-expose-headers"]


# Parts, and what is known already


async def test_a_head_says_what_a_get_would(urls: GatewayUnderTest) -> None:
    path = await a_url(urls)
    whole, head = await get(urls, path), await ask(urls, "HEAD", path, range="bytes=0-9")
    assert (head.status_code, head.content) == (200, b"")
    changing = ("date", "x-request-id")
    one, other = (
        {name: value for name, value in answer.headers.items() if name not in changing}
        for answer in (whole, head)
    )
    assert one == other


@pytest.mark.parametrize(
    ("asked", "first", "end"),
    [
        ("bytes=0-99", 0, 100),
        ("bytes=1000-1999", 1000, 2000),
        ("bytes=-100", -100, None),
        ("bytes=500-", 500, None),
        ("bytes=0-99999999", 0, None),
    ],
)
async def test_a_part_of_it(
    urls: GatewayUnderTest, asked: str, first: int, end: int | None
) -> None:
    path = await a_url(urls)
    whole = (await get(urls, path)).content
    found = await get(urls, path, range=asked)
    assert (found.status_code, found.content) == (206, whole[first:end])
    start, stop = (first + len(whole)) % len(whole), len(whole) if end is None else end
    assert found.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}"
    assert found.headers["content-type"] == "image/png"


async def test_a_part_behind_its_end_and_parts_that_are_not_understood(
    urls: GatewayUnderTest,
) -> None:
    path = await a_url(urls)
    whole = await get(urls, path)
    size = len(whole.content)
    beyond = await get(urls, path, range=f"bytes={size}-")
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{size}")
    assert beyond.json()["error"]["code"] == "range_not_satisfiable"
    for asked in ("bytes=0-1,5-6", "bytes=9-1", "pages=1-2"):
        found = await get(urls, path, range=asked)
        assert (found.status_code, found.content) == (200, whole.content)


async def test_what_a_client_has_is_not_sent_again(urls: GatewayUnderTest) -> None:
    path = await a_url(urls)
    tag = (await get(urls, path)).headers["etag"]
    for known in (tag, f'"other", W/{tag}', "*"):
        for method in ("GET", "HEAD"):
            same = await ask(urls, method, path, If_None_Match=known, range="bytes=0-9")
            assert (same.status_code, same.content) == (304, b"")
            assert same.headers["etag"] == tag
            assert same.headers["cache-control"] == "private, max-age=3600, immutable"
            assert "content-length" not in same.headers
    assert (await get(urls, path, If_None_Match='"other"')).status_code == 200
    part = {"range": "bytes=0-9"}
    assert (await get(urls, path, If_Range=tag, **part)).status_code == 206
    for other in ('"other"', f"W/{tag}", "Sun, 22 Nov 2026 12:00:00 GMT"):
        assert (await get(urls, path, If_Range=other, **part)).status_code == 200


async def test_several_answers_on_one_connection(urls: GatewayUnderTest) -> None:
    path = await a_url(urls)
    async with httpx.AsyncClient(base_url=urls.origin, verify=False) as http:
        whole = (await http.get(path)).content
        statuses = [
            (await http.request(method, path, headers=headers)).status_code
            for method, headers in (
                ("HEAD", {}),
                ("GET", {"if-none-match": "*"}),
                ("OPTIONS", {}),
                ("GET", {"range": "bytes=5-9"}),
                ("GET", {"range": "bytes=99999999-"}),
            )
        ]
        assert statuses == [200, 304, 204, 206, 416]
        assert (await http.get(path)).content == whole


# What can go wrong


async def test_a_picture_that_cannot_be_stored_is_not_lost(fly: Fly) -> None:
    async with fly({**URLS, "hosted": {"max_bytes": 1000}}) as house:
        house.gateway.sandbox.rules.clear()
        async with house.gateway.sdk() as sdk:
            with pytest.raises(APIStatusError) as refused:
                await sdk.images.generate(**AS_URL)
        answer = refused.value.response
        assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "false")
        assert refused.value.code == "picture_not_hosted"
        assert answer.headers["x-cost-usd"] == "0.005895"
        rid = answer.headers["x-request-id"]
        assert f"GET /v1/images/results/{rid}" in refused.value.message
        [picture] = await bought(house.gateway, rid)
        assert Image.open(io.BytesIO(picture)).size == (1024, 1024)
        async with house.gateway.http() as http:
            again = await http.post(GENERATIONS, json=AS_URL)
            assert (again.status_code, again.headers["x-should-retry"]) == (503, "true")
            assert "Nothing was bought" in again.text
            plain = await http.post(GENERATIONS, json=ASKED)
        assert base64.b64decode(plain.json()["data"][0]["b64_json"]) == picture
        found = await house.gateway.metrics()
        assert found['gateway_hosted_total{outcome="failed"}'] == 2
        await house.settled(purchases=1, cached=2)


async def test_what_is_kept_nowhere_is_handed_over_as_it_is(fly: Fly) -> None:
    async with fly({**URLS, "hosted": {"max_bytes": 1000}}) as house:
        async with house.gateway.http() as http:
            answer = await http.post(
                GENERATIONS, json=AS_URL, headers={"cache-control": "no-store"}
            )
        assert answer.status_code == 200
        assert answer.json()["data"][0]["b64_json"]
        assert "b64_json" in answer.headers["x-gateway-warning"]
        assert answer.headers["x-gateway-changed"] == "response_format"
        await house.settled(purchases=1)


async def test_a_folder_that_cannot_be_written(
    start: Start, tmp_path: Path, sandbox: SandboxServer
) -> None:
    async with start(URLS) as running:
        path = await a_url(running)
        folder = tmp_path / "data" / "blobs" / "hosted"
        shutil.rmtree(folder)
        folder.write_text("")
        async with running.http() as http:
            answer = await http.post(GENERATIONS, json=AS_URL, headers=FRESH)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "false")
        away = await get(running, path)
        assert (away.status_code, away.headers["x-should-retry"]) == (503, "true")
        assert away.json()["error"]["code"] == "hosted_unavailable"
        found = await running.metrics()
        assert found['gateway_hosted_total{outcome="unavailable"}'] == 1
        assert found['gateway_hosted_errors_total{operation="store"}'] >= 1


async def test_an_error_stays_an_error(urls: GatewayUnderTest) -> None:
    urls.sandbox.rules.add(Rule(status=400))
    async with urls.http() as http:
        answer = await http.post(GENERATIONS, json=AS_URL, headers=FRESH)
    assert answer.status_code == 400
    assert "url" not in answer.json()


# Where it is kept


async def test_urls_outlive_a_restart_and_open_with_an_old_pepper(start: Start) -> None:
    first = {"storage": {"pepper": 4 * "first pepper "}, **URLS}
    async with start(first) as running:
        path = await a_url(running)
        whole = (await get(running, path)).content
    async with start(first) as running:
        assert (await get(running, path)).content == whole
    peppers = {"pepper": 4 * "second pepper ", "old_peppers": [4 * "first pepper "]}
    async with start({"storage": peppers, **URLS}) as running:
        assert (await get(running, path)).content == whole
        assert (await get(running, await a_url(running))).content == whole
    async with start({"storage": {**peppers, "old_peppers": []}, **URLS}) as running:
        assert (await get(running, path)).status_code == 404


async def test_urls_outlive_a_process_that_is_killed(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    config = config_of(tmp_path, sandbox.base_url, URLS)
    with GatewayProcess(config) as first:
        await asyncio.to_thread(first.wait_ready)
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(verify=False, headers=headers, timeout=30) as http:
            answer = await http.post(first.base_url + GENERATIONS, json=AS_URL)
            rid = answer.headers["x-request-id"]
            path = inside(answer.json()["data"][0]["url"]).removeprefix("/v1")
            whole = (await http.get(first.base_url + path)).content
        first.kill()
    with GatewayProcess(config) as second:
        await asyncio.to_thread(second.wait_ready)
        async with httpx.AsyncClient(verify=False, timeout=30) as anybody:
            found = await anybody.get(second.base_url + path)
        assert (found.status_code, found.headers["content-type"]) == (200, "image/png")
        assert found.content == whole
        async with httpx.AsyncClient(verify=False, headers=headers, timeout=30) as http:
            kept = await http.get(f"{second.base_url}/images/results/{rid}")
            assert base64.b64decode(kept.json()["data"][0]["b64_json"]) == whole
            # Its picture is known by the same name to the next process.
            again = await http.post(second.base_url + GENERATIONS, json=AS_URL)
        assert again.headers["x-cache"] == "hit"
        assert urlsplit(inside(again.json()["data"][0]["url"])).path == "/v1" + urlsplit(path).path


@asynccontextmanager
async def two(
    folder: Path, sandbox: SandboxServer, clock: TestClock
) -> AsyncIterator[list[GatewayUnderTest]]:
    """Two gateways that share a Redis and a pepper, and nothing else."""
    with run_valkey() as valkey:
        storage = {"redis": valkey.url, "pepper": 4 * "pepper of both "}
        async with AsyncExitStack() as stack:
            found = []
            for name in ("one", "other"):
                (folder / name).mkdir()
                running = run_gateway(folder / name, sandbox, {**URLS, "storage": storage}, clock)
                found.append(await stack.enter_async_context(running))
            yield found


async def test_replicas_serve_each_others_urls(
    tmp_path: Path, sandbox: SandboxServer, clock: TestClock
) -> None:
    async with two(tmp_path, sandbox, clock) as [one, other]:
        path = await a_url(one)
        whole = await get(one, path)
        assert whole.status_code == 200
        found = await get(other, path)
        assert (found.status_code, found.content) == (200, whole.content)
        part = await get(other, path, range="bytes=1000-400000")
        assert part.content == whole.content[1000:400001]
        assert not (tmp_path / "one" / "data" / "blobs" / "hosted").exists()


# Where it is off


@pytest.mark.parametrize("changes", [{}, {**URLS, "hosted": {"enabled": False}}])
async def test_where_it_is_off_there_is_no_such_path(start: Start, changes: dict[str, Any]) -> None:
    async with start(changes) as running:
        answer = await get(running, MISSING)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "unknown_url"
