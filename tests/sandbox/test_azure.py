"""The sandbox as Azure: its SDK client, its paths, its errors."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from openai import (
    AuthenticationError,
    AzureOpenAI,
    BadRequestError,
    DefaultHttpxClient,
    NotFoundError,
    OpenAI,
)

from gateway.domain.call import Json
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from tests.sandbox.calls import FLARE, picture, png

VERSION = "2025-04-01-preview"


@pytest.fixture
def azure(server: SandboxServer) -> Iterator[AzureOpenAI]:
    with AzureOpenAI(
        azure_endpoint=server.origin,
        api_key="any",
        api_version=VERSION,
        max_retries=0,
        http_client=DefaultHttpxClient(verify=False, timeout=20),
    ) as client:
        yield client


def test_a_deployment_draws_and_edits(server: SandboxServer, azure: AzureOpenAI) -> None:
    made = azure.images.generate(model=FLARE, prompt="A lighthouse", quality="low")
    assert made.data is not None
    assert picture(made.data[0].b64_json).size == (1024, 1024)
    assert made.usage is not None
    assert made.usage.output_tokens == 196
    assert made.model_extra is not None
    assert set(made.model_extra) >= {"content_filter_results", "prompt_filter_results"}
    edited = azure.images.edit(model=FLARE, prompt="A hat", image=("a.png", png(), "image/png"))
    assert edited.data is not None
    first, second = server.journal
    assert first.path == f"/openai/deployments/{FLARE}/images/generations"
    assert second.path == f"/openai/deployments/{FLARE}/images/edits"
    assert first.query == f"api-version={VERSION}"
    assert first.header("api-key") == "any"
    assert server.journal.costs[0][1].startswith(FLARE)


def test_gpt_image_2_takes_no_model_in_the_body(azure: AzureOpenAI, server: SandboxServer) -> None:
    with pytest.raises(BadRequestError) as refused:
        azure.images.generate(model="gpt-image-2", prompt="x")
    assert (refused.value.code, refused.value.param) == ("unknown_parameter", "model")
    path = f"/openai/deployments/gpt-image-2/images/generations?api-version={VERSION}"
    body: Json = {"prompt": "x", "quality": "low"}
    answer = httpx.post(
        f"{server.origin}{path}", json=body, headers={"api-key": "any"}, verify=False
    )
    assert answer.status_code == 200


def test_errors_in_azures_words(azure: AzureOpenAI, server: SandboxServer) -> None:
    with pytest.raises(NotFoundError) as missing:
        azure.images.generate(model="nano", prompt="x")
    assert missing.value.code == "DeploymentNotFound"
    with pytest.raises(BadRequestError) as unsafe:
        azure.images.generate(model=FLARE, prompt="moderationtest")
    assert unsafe.value.code == "contentFilter"
    assert isinstance(unsafe.value.body, dict)
    assert unsafe.value.body["innererror"]["code"] == "ResponsibleAIPolicyViolation"
    path = f"{server.origin}/openai/deployments/{FLARE}/images/generations"
    denied = httpx.post(f"{path}?api-version={VERSION}", json={}, verify=False)
    assert (denied.status_code, denied.json()["error"]["code"]) == (401, "401")
    old = httpx.post(path, json={"prompt": "x"}, headers={"api-key": "any"}, verify=False)
    assert (old.status_code, old.json()["error"]) == (
        404,
        {"code": "404", "message": "Resource not found"},
    )


def test_the_v1_surface_is_openais(server: SandboxServer) -> None:
    base = f"{server.origin}/openai/v1"
    with OpenAI(
        base_url=base, api_key="any", default_headers={"api-key": "any"}, max_retries=0
    ) as v1:
        made = v1.images.generate(model=FLARE, prompt="x", quality="low")
        assert made.data is not None
        assert FLARE in {model.id for model in v1.models.list()}
        server.rules.add(Rule(path="/models", status=401))
        with pytest.raises(AuthenticationError):
            v1.models.list()
    assert httpx.get(f"{base}/files", headers={"api-key": "any"}, verify=False).json()["data"] == []
    assert httpx.get(f"{base}/files", verify=False).json()["error"]["code"] == "401"


def test_a_rule_meets_a_deployment(azure: AzureOpenAI, server: SandboxServer) -> None:
    server.rules.add(Rule(path="/images/generations", model=FLARE, key="any", status=401))
    with pytest.raises(AuthenticationError):
        azure.images.generate(model=FLARE, prompt="x")
