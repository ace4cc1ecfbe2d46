"""Moderations and provenance checks, with the real SDK."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI, RateLimitError
from openai.types import ModerationMultiModalInputParam

from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from tests.sandbox.calls import FLARE, png

PICTURE = f"data:image/png;base64,{base64.b64encode(png()).decode()}"


def test_texts_are_judged_one_by_one(server: SandboxServer, sdk: OpenAI) -> None:
    answer = sdk.moderations.create(input=["I will kill you", "A lighthouse"])
    assert answer.id.startswith("modr-")
    assert answer.model == "omni-moderation-latest"
    assert [result.flagged for result in answer.results] == [True, False]
    bad, good = answer.results
    assert (bad.categories.violence, bad.categories.self_harm_intent) == (True, False)
    assert bad.category_scores.violence > 0.9 > good.category_scores.violence
    assert good.category_applied_input_types.hate_threatening == ["text"]
    assert server.journal.billed == []


def test_a_picture_is_judged_with_its_text(sdk: OpenAI) -> None:
    parts: list[ModerationMultiModalInputParam] = [
        {"type": "text", "text": "A cat"},
        {"type": "image_url", "image_url": {"url": PICTURE}},
    ]
    answer = sdk.moderations.create(model="omni-moderation-2024-09-26", input=parts)
    [result] = answer.results
    assert result.category_applied_input_types.violence == ["text", "image"]
    assert result.category_applied_input_types.hate == ["text"]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "input"),
        ({"input": "x", "n": 1}, "unknown_parameter", "n"),
        ({"input": "x", "model": "nano"}, "invalid_value", "model"),
        ({"input": 5}, "invalid_type", "input"),
        ({"input": [{"type": "text"}]}, "missing_required_parameter", "input[0].text"),
        ({"input": [{"type": "song"}]}, "invalid_value", "input[0].type"),
        (
            {"input": [{"type": "image_url", "image_url": {"url": "data:,x"}}]},
            "invalid_image_url",
            "input[0].image_url",
        ),
    ],
)
def test_what_is_not_judged(http: httpx.Client, body: Any, code: str, param: str) -> None:
    answer = http.post("/moderations", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code)
    assert error["param"].startswith(param)


@pytest.mark.parametrize(("format_", "model"), [("png", FLARE), ("jpeg", "gpt-image-2")])
def test_a_picture_of_the_sandboxs_own(sdk: OpenAI, format_: Any, model: str) -> None:
    drawn = sdk.images.generate(model=model, prompt="x", quality="low", output_format=format_)
    assert drawn.data is not None
    content = base64.b64decode(drawn.data[0].b64_json or "")
    answer = sdk.content_provenance_checks.create(file=("a", content))
    assert (answer.object, answer.created_at) == ("content_provenance_check", drawn.created)
    c2pa, synthid = answer.results
    assert c2pa.type == "c2pa"
    assert (c2pa.outcome, c2pa.validation_state) == ("detected", "trusted")
    assert (c2pa.model, synthid.model) == (model, model)
    assert (synthid.type, synthid.outcome) == ("synthid", "detected")


@pytest.mark.parametrize("content", [png(), b"no picture at all"])
def test_any_other_file(sdk: OpenAI, content: bytes) -> None:
    answer = sdk.content_provenance_checks.create(file=("a.png", content, "image/png"))
    assert {result.outcome for result in answer.results} == {"not_detected"}
    assert answer.results[0].model is None


def test_a_check_needs_one_file(sdk: OpenAI, http: httpx.Client) -> None:
    assert http.post("/content_provenance_checks", json={}).status_code == 400
    refused = http.post("/content_provenance_checks", files={"image": ("a", b"x")})
    assert refused.json()["error"]["code"] == "unknown_parameter"
    with pytest.raises(BadRequestError):
        sdk.post("/content_provenance_checks", cast_to=object, files={}, body={})


def test_faults_of_checks(server: SandboxServer, sdk: OpenAI, http: httpx.Client) -> None:
    server.rules.add(Rule(path="/moderations", prompt="boat", times=1, status=429))
    server.rules.add(Rule(path="/content_provenance_checks", times=1, cut_after_bytes=5))
    with pytest.raises(RateLimitError):
        sdk.moderations.create(input="A boat")
    assert sdk.moderations.create(input="A boat").results
    with pytest.raises(httpx.RemoteProtocolError):
        http.post("/content_provenance_checks", files={"file": ("a", b"x")})
