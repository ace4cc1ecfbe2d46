"""The other spellings of the same paths, and what is said at every path that is none."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Mapping
from typing import Any

import pytest
from openai import (
    AsyncAzureOpenAI,
    AuthenticationError,
    AzureOpenAI,
    DefaultAsyncHttpxClient,
    DefaultHttpxClient,
    NotFoundError,
)
from PIL import Image

from gateway.sandbox.rules import Rule
from tests.raw import JSON, RawAnswer, RawClient
from tests.running import ALIAS, KEY, MODEL, GatewayUnderTest, Start

VERSION = "2025-04-01-preview"
ASKED: dict[str, Any] = {"prompt": "A lighthouse", "quality": "low", "size": "1024x1024"}


def azure(gateway: GatewayUnderTest, **options: Any) -> AsyncAzureOpenAI:
    """Azure's own client, as its users make it."""
    return AsyncAzureOpenAI(
        azure_endpoint=gateway.origin,
        api_version=VERSION,
        max_retries=0,
        http_client=DefaultAsyncHttpxClient(verify=False, timeout=30),
        **{"api_key": KEY, **options},
    )


def a_picture() -> tuple[str, bytes, str]:
    """A file, as the SDK takes it."""
    out = io.BytesIO()
    Image.effect_noise((256, 256), 90).convert("RGBA").save(out, "PNG")
    return "a.png", out.getvalue(), "image/png"


def drawn(b64: str | None) -> tuple[int, int]:
    assert b64 is not None
    return Image.open(io.BytesIO(base64.b64decode(b64))).size


# Azure's clients


async def test_azures_client_makes_a_picture(gateway: GatewayUnderTest) -> None:
    async with azure(gateway) as sdk:
        answer = await sdk.images.with_raw_response.generate(model=ALIAS, **ASKED)
        picture = answer.parse()
    assert answer.http_request.url.path == f"/openai/deployments/{ALIAS}/images/generations"
    assert "authorization" not in answer.http_request.headers
    assert picture.data is not None
    assert drawn(picture.data[0].b64_json) == (1024, 1024)
    assert answer.headers["x-model-served"] == MODEL
    [record] = gateway.sandbox.journal
    assert record.path == "/v1/images/generations"
    assert record.fields["model"] == MODEL
    assert record.header("authorization") == "Bearer sk-upstream-secret"
    assert record.header("api-key") is None
    [(receipt, _)] = await gateway.told.until(1)
    assert (receipt.team, receipt.model, receipt.operation) == ("growth", ALIAS, "generation")


async def test_azures_client_that_does_not_wait_for_a_loop(start: Start) -> None:
    """The same from a thread: the client that most scripts have."""
    async with start() as gateway:
        gateway.sandbox.rules.add(Rule(payload_bytes=400))

        def ask() -> bool:
            with AzureOpenAI(
                azure_endpoint=gateway.origin,
                api_version=VERSION,
                api_key=KEY,
                max_retries=0,
                http_client=DefaultHttpxClient(verify=False, timeout=30),
            ) as sdk:
                return bool(sdk.images.generate(model=MODEL, **ASKED).data)

        assert await asyncio.to_thread(ask)


async def test_azures_client_edits_and_streams(gateway: GatewayUnderTest) -> None:
    content = a_picture()
    async with azure(gateway) as sdk:
        edited = await sdk.images.edit(model=MODEL, image=[content], mask=content, **ASKED)
        assert edited.data is not None
        assert drawn(edited.data[0].b64_json) == (1024, 1024)
        events = [
            event.type
            async for event in await sdk.images.generate(
                model=MODEL, stream=True, partial_images=2, **ASKED
            )
        ]
        of_edit = [
            event.type
            async for event in await sdk.images.edit(
                model=MODEL, image=content, stream=True, partial_images=1, **ASKED
            )
        ]
    assert events[-1] == "image_generation.completed"
    assert events[:-1] == ["image_generation.partial_image"] * 2
    assert of_edit == ["image_edit.partial_image", "image_edit.completed"]
    first = next(iter(gateway.sandbox.journal))
    assert {part.field for part in first.files} == {"image[]", "mask"}


async def test_an_azure_client_without_a_key_of_ours(gateway: GatewayUnderTest) -> None:
    async with azure(gateway, api_key="another-key-0123456789abcdef") as sdk:
        with pytest.raises(AuthenticationError) as raised:
            await sdk.images.generate(model=MODEL, **ASKED)
    assert raised.value.code == "invalid_api_key"
    async with azure(gateway, api_key=None, azure_ad_token=KEY) as sdk:
        gateway.sandbox.rules.add(Rule(payload_bytes=400))
        assert (await sdk.images.generate(model=MODEL, **ASKED)).data


async def test_a_bearer_goes_before_an_api_key(gateway: GatewayUnderTest) -> None:
    for headers, status in (
        ((f"authorization: Bearer {KEY}", "api-key: nonsense"), 200),
        (("authorization: Bearer nonsense-0123456789", f"api-key: {KEY}"), 401),
        (("authorization: Basic Zm9vOmJhcg==", f"Api-Key: {KEY} "), 200),
        (("authorization: Bearer ", f"api-key: {KEY}"), 200),
        (("authorization:", "api-key:"), 401),
    ):
        async with RawClient.to(gateway.port) as client:
            await client.head("/v1/models", headers, method="GET")
            assert (await client.answer()).status == status, headers


async def test_azures_list_of_models(gateway: GatewayUnderTest) -> None:
    async with azure(gateway) as sdk, gateway.sdk() as plain:
        theirs = [model.id async for model in sdk.models.list()]
        assert theirs == [model.id async for model in plain.models.list()]
        assert (await sdk.models.retrieve(ALIAS)).id == ALIAS
        with pytest.raises(NotFoundError) as raised:
            await sdk.models.retrieve("*")
    assert raised.value.code == "model_not_found"


@pytest.mark.parametrize("base", ["/openai/v1", "/openai"])
async def test_the_newer_surface_of_azure_takes_every_door(
    gateway: GatewayUnderTest, base: str
) -> None:
    gateway.sandbox.rules.add(Rule(payload_bytes=400))
    async with gateway.sdk() as plain:
        sdk = plain.with_options(base_url=f"{gateway.origin}{base}")
        answer = await sdk.images.with_raw_response.generate(model=MODEL, **ASKED)
        assert (await sdk.images.edit(model=MODEL, image=a_picture(), **ASKED)).data
        assert [model.id async for model in sdk.models.list()]
        result = await sdk.get(f"/images/results/{answer.headers['x-request-id']}", cast_to=object)
        estimate = await sdk.post(
            "/images/estimate", body={"model": MODEL, **ASKED}, cast_to=object
        )
    assert isinstance(result, Mapping)
    assert isinstance(estimate, Mapping)
    assert "data" in result
    assert estimate["object"] == "image.estimate"


def ordered(**more: Any) -> dict[str, Any]:
    return {**ASKED, **more}


@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": "gpt-image-2"}, {"model": ""}])
async def test_the_paths_model_goes_before_the_bodys(
    gateway: GatewayUnderTest, body: dict[str, Any]
) -> None:
    async with gateway.http() as http:
        path = f"/openai/deployments/{ALIAS}/images/generations?api-version={VERSION}"
        answer = await http.post(f"{gateway.origin}{path}", json=ordered(**body))
    assert answer.status_code == 200, answer.text
    [record] = gateway.sandbox.journal
    assert record.fields["model"] == MODEL
    assert (await gateway.told.until(1))[0][0].model == ALIAS


async def test_the_clients_deployment_goes_before_the_calls_model(
    gateway: GatewayUnderTest,
) -> None:
    content = a_picture()
    async with azure(gateway, azure_deployment=ALIAS) as sdk:
        assert (await sdk.images.generate(model="gpt-image-2", **ASKED)).data
        assert (await sdk.images.edit(model="gpt-image-2", image=content, **ASKED)).data
        stream = await sdk.images.generate(stream=True, **ASKED)
        assert [event.type async for event in stream][-1] == "image_generation.completed"
    assert {record.fields["model"] for record in gateway.sandbox.journal} == {MODEL}
    assert {receipt.model for receipt, _ in await gateway.told.until(3)} == {ALIAS}


async def test_a_deployment_may_have_any_name(gateway: GatewayUnderTest) -> None:
    async with gateway.http() as http:
        for written, name in (("no%20such%2Emodel", "no such.model"), ("%C3%A9", "é")):
            path = f"/openai/deployments/{written}/images/generations"
            answer = await http.post(f"{gateway.origin}{path}", json=ordered(model=MODEL))
            assert answer.status_code in (400, 404), answer.text
            assert name in answer.json()["error"]["message"]


# What is served nowhere

UNKNOWN = (
    "/",
    "/index.html",
    "/v1",
    "/v1/",
    "/v2/images/generations",
    "/v1/images",
    "/v1/images/generation",
    "/v1/images/generations/more",
    "/v1/images/generations%2Fmore",
    "/v1//images/generations",
    "//v1/models",
    "/images/generations",
    "/V1/models",
    "/v1/../v1/models",
    "/openai",
    "/openai/v1",
    "/openai/deployments",
    f"/openai/deployments/{MODEL}",
    f"/openai/deployments/{MODEL}/images/variations/",
    f"/openai/deployments/{MODEL}/images/estimate",
    "/openai/deployments//images/generations",
    "/openai/deployments/a%2Fb/images/generations",
    "/openai/deployments/a/b/images/generations",
    f"/openai/deployments/{MODEL}/chat/completions",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/audio/speech",
    "/v1/videos",
    "/v1/batches",
    "/v1/assistants",
    "/v1/threads/t/runs",
    "/v1/fine_tuning/jobs",
    "/v1/vector_stores",
    "/v1/organization/costs",
    "/v1/images/variations",
    "/v1/%00",
    "/v1/%ff%fe",
    "/%E2%98%83",
    "/v1/<script>alert(1)</script>",
    "/docs",
    "/openapi.json",
    "/favicon.ico",
    "/v1/" + "x" * 5000,
)
SERVED = {
    "/v1/images/generations": "POST",
    "/v1/images/edits": "POST",
    "/v1/images/estimate": "POST",
    "/openai/v1/images/edits": "POST",
    f"/openai/deployments/{MODEL}/images/edits": "POST",
    "/v1/images/results/req_0": "GET",
    "/v1/models": "GET",
    "/v1/models/": "GET",
    f"/v1/models/{MODEL}": "GET",
    "/openai/v1/models": "GET",
    "/healthz": "GET, HEAD",
    "/readyz/": "GET, HEAD",
    "/metrics": "GET, HEAD",
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")


def check_error(answer: RawAnswer, status: int, code: str, *, head: bool) -> None:
    """An error in OpenAI's shape, and never a word of HTML."""
    assert answer.status == status
    assert answer.header("content-type") == "application/json"
    assert answer.header("x-should-retry") == "false"
    assert (answer.header("x-request-id") or "").startswith("req_")
    if head:
        assert answer.body == b""
        return
    error = answer.error
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert len(error["message"]) < 600


async def ask(client: RawClient, method: str, path: str) -> RawAnswer:
    await client.head(path, method=method)
    if method != "HEAD":
        return await client.answer()
    # Its length is announced all the same, and nothing comes.
    head = await client.reader.readuntil(b"\r\n\r\n")
    status, *lines = head.decode("latin-1")[:-4].split("\r\n")
    named = tuple(
        (name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)
    )
    return RawAnswer(int(status.split(" ")[1]), named, b"", 0, "")


async def test_no_unknown_path_is_answered_in_another_shape(gateway: GatewayUnderTest) -> None:
    for path in UNKNOWN:
        for method in METHODS:
            async with RawClient.to(gateway.port, KEY) as client:
                answer = await ask(client, method, path)
                code = "endpoint_retired" if "variations" in path else "unknown_url"
                check_error(answer, 404, code, head=method == "HEAD")
                assert answer.header("allow") is None
                assert await client.is_open()
    assert gateway.told.requests == []


async def test_no_wrong_method_is_answered_in_another_shape(gateway: GatewayUnderTest) -> None:
    for path, allowed in SERVED.items():
        for method in METHODS:
            if method in allowed:
                continue
            async with RawClient.to(gateway.port, KEY) as client:
                answer = await ask(client, method, path)
                check_error(answer, 405, "method_not_allowed", head=method == "HEAD")
                said = answer.header("allow") or ""
                assert {one.strip() for one in said.split(",")} == set(allowed.split(", "))


async def test_a_known_endpoint_of_openais_says_why_it_is_not_here(
    gateway: GatewayUnderTest,
) -> None:
    async with gateway.sdk() as sdk:
        with pytest.raises(NotFoundError) as raised:
            await sdk.chat.completions.create(model="gpt-6-astra", messages=[])
        assert raised.value.body == {
            "message": "This gateway serves images only, not chat completions: "
            "/v1/chat/completions. It answers /v1/images/generations, /v1/images/edits, "
            "/v1/images/estimate, /v1/images/results/{id}, /v1/models, /v1/responses, /v1/files, "
            "/v1/moderations and /v1/content_provenance_checks.",
            "type": "invalid_request_error",
            "param": None,
            "code": "unknown_url",
        }
        with pytest.raises(NotFoundError) as raised:
            await sdk.embeddings.create(model="text-embedding-4", input="a")
        assert "images only, not embeddings" in raised.value.message
        with pytest.raises(NotFoundError, match=r"Base urls end in /v1\."):
            await sdk.with_options(base_url=gateway.origin).images.generate(model=MODEL, **ASKED)


async def test_variations_are_retired_and_cost_nothing(gateway: GatewayUnderTest) -> None:
    async with gateway.sdk(max_retries=2) as sdk:
        with (
            pytest.warns(DeprecationWarning, match="deprecated"),
            pytest.raises(NotFoundError) as raised,
        ):
            await sdk.images.create_variation(image=a_picture(), model="dall-e-2")
    assert raised.value.code == "endpoint_retired"
    assert raised.value.message == (
        "Error code: 404 - OpenAI has retired /v1/images/variations, so nothing is sent there. "
        "/v1/images/edits takes a picture and a prompt."
    )
    # It is answered before any of the body was sent.
    async with RawClient.to(gateway.port) as client:
        await client.head("/v1/images/variations", ("content-length: 90000000",))
        assert (await client.answer()).status == 404
    assert len(gateway.sandbox.journal) == 0
    assert await gateway.usage() == []


MALFORMED = (
    b"GET\r\n\r\n",
    b"nonsense\r\n\r\n",
    b"GET /v1/models\r\n\r\n",
    b"GET /v1/models HTTP/9.9\r\n\r\n",
    b"BREW /v1/models HTTP/1.1\r\nhost: gateway\r\n\r\n",
    b"GET  /v1/models HTTP/1.1\r\nhost: gateway\r\n\r\n",
    b"GET /v1/mod els HTTP/1.1\r\nhost: gateway\r\n\r\n",
    b"GET http:// HTTP/1.1\r\nhost: gateway\r\n\r\n",
    b"GET v1/models HTTP/1.1\r\nhost: gateway\r\n\r\n",
    b"GET /v1/\xff\xfe HTTP/1.1\r\nhost: gateway\r\n\r\n",
    b"GET /v1/\x00 HTTP/1.1\r\nhost: gateway\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nhost: gateway\r\n\r\n",
    b"CONNECT example.com:443 HTTP/1.1\r\nhost: gateway\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nhost: a\r\n folded\r\nb\x01d: c\r\n\r\n",
    b"POST /v1/images/edits HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
    b"POST /v1/images/edits HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
    b"POST /v1/images/edits HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/nowhere HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
)
"""The last one begins a TLS connection."""


@pytest.mark.parametrize("sent", MALFORMED)
async def test_what_is_no_request_is_an_error_in_json_too(
    gateway: GatewayUnderTest, sent: bytes
) -> None:
    async with RawClient.to(gateway.port) as client:
        await client.send(sent)
        answer = await client.answer()
    assert 400 <= answer.status < 500
    check_error(answer, answer.status, str(answer.error["code"]), head=False)


async def test_a_wrong_method_does_not_read_the_body(gateway: GatewayUnderTest) -> None:
    async with RawClient.to(gateway.port, KEY) as client:
        await client.head("/v1/models", (JSON, "content-length: 90000000"), method="POST")
        answer = await client.answer()
        check_error(answer, 405, "method_not_allowed", head=False)
    async with RawClient.to(gateway.port, KEY) as client:
        # What fits is thrown away, and the connection goes on.
        answer = await client.post("/v1/models", b"{}", [JSON])
        check_error(answer, 405, "method_not_allowed", head=False)
        assert await client.is_open()
