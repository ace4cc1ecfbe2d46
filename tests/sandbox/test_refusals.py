"""What OpenAI refuses, with its own bodies."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import UTC, datetime

import httpx
import pytest
from openai import BadRequestError, OpenAI

from gateway.domain.call import Json
from gateway.sandbox.server import SandboxServer
from tests.clock import StillClock
from tests.sandbox.calls import FLARE, generate, png

REQUEST, USER = "invalid_request_error", "image_generation_user_error"
SIZES = "Supported sizes are 1024x1024, 1024x1536, 1536x1024, and auto."

GENERATIONS: list[tuple[dict[str, Json], str, str, str, str]] = [
    # fields, type, code, param, message
    ({"foo": 1}, REQUEST, "unknown_parameter", "foo", "Unknown parameter: 'foo'."),
    (
        {"response_format": "b64_json"},
        REQUEST,
        "unknown_parameter",
        "response_format",
        "Unknown parameter: 'response_format'.",
    ),
    ({"style": "vivid"}, REQUEST, "unknown_parameter", "style", "Unknown parameter: 'style'."),
    (
        {"input_fidelity": "high"},
        REQUEST,
        "unknown_parameter",
        "input_fidelity",
        "Unknown parameter: 'input_fidelity'.",
    ),
    (
        {"model": None},
        REQUEST,
        "missing_required_parameter",
        "model",
        "Missing required parameter: 'model'.",
    ),
    (
        {"prompt": None},
        REQUEST,
        "missing_required_parameter",
        "prompt",
        "Missing required parameter: 'prompt'.",
    ),
    (
        {"prompt": 5},
        REQUEST,
        "invalid_type",
        "prompt",
        "Invalid type for 'prompt': expected a string, but got an integer instead.",
    ),
    (
        {"n": "2"},
        REQUEST,
        "invalid_type",
        "n",
        "Invalid type for 'n': expected an integer, but got a string instead.",
    ),
    (
        {"n": True},
        REQUEST,
        "invalid_type",
        "n",
        "Invalid type for 'n': expected an integer, but got a boolean instead.",
    ),
    (
        {"n": 1.5},
        REQUEST,
        "invalid_type",
        "n",
        "Invalid type for 'n': expected an integer, but got a decimal number instead.",
    ),
    (
        {"stream": "yes"},
        REQUEST,
        "invalid_type",
        "stream",
        "Invalid type for 'stream': expected a boolean, but got a string instead.",
    ),
    (
        {"n": 11},
        REQUEST,
        "integer_above_max_value",
        "n",
        "Invalid 'n': integer above maximum value. Expected a value <= 10, but got 11 instead.",
    ),
    (
        {"n": 0},
        REQUEST,
        "integer_below_min_value",
        "n",
        "Invalid 'n': integer below minimum value. Expected a value >= 1, but got 0 instead.",
    ),
    (
        {"prompt": "x" * 32_001},
        REQUEST,
        "string_above_max_length",
        "prompt",
        "Invalid 'prompt': string too long. Expected a string with maximum length 32000, but got "
        "a string with length 32001 instead.",
    ),
    (
        {"quality": "max", "model": "gpt-image-2"},
        REQUEST,
        "invalid_value",
        "quality",
        "Invalid value: 'max'. Supported values are: 'low', 'medium', 'high', and 'auto'.",
    ),
    (
        {"quality": "standard"},
        REQUEST,
        "invalid_value",
        "quality",
        "Invalid value: 'standard'. Supported values are: 'low', 'medium', 'high', 'xhigh', "
        "'max', and 'auto'.",
    ),
    (
        {"size": "512x512", "model": "gpt-image-1.5"},
        USER,
        "invalid_value",
        "size",
        f"Invalid size '512x512'. {SIZES}",
    ),
    (
        {"size": "123x456"},
        USER,
        "invalid_value",
        "size",
        "Invalid size '123x456'. Supported sizes are those whose width and height are divisible "
        "by 16.",
    ),
    ({"size": "large"}, USER, "invalid_value", "size", f"Invalid size 'large'. {SIZES}"),
    (
        {"size": "512x512"},
        USER,
        "invalid_value",
        "size",
        "Invalid size '512x512'. Supported sizes are those of 655360 to 8294400 pixels in all.",
    ),
    (
        {"size": "2944x2880"},
        USER,
        "invalid_value",
        "size",
        "Invalid size '2944x2880'. Supported sizes are those of 655360 to 8294400 pixels in all.",
    ),
    (
        {"size": "3856x2000"},
        USER,
        "invalid_value",
        "size",
        "Invalid size '3856x2000'. Supported sizes are those of at most 3840 pixels an edge.",
    ),
    (
        {"size": "2064x672"},
        USER,
        "invalid_value",
        "size",
        "Invalid size '2064x672'. Supported sizes are those with a ratio between 1:3 and 3:1.",
    ),
    (
        {"model": "dall-e-3"},
        USER,
        "invalid_value",
        "model",
        "The model 'dall-e-3' does not exist.",
    ),
    (
        {"model": "gpt-image-1"},
        USER,
        "invalid_value",
        "model",
        "The model 'gpt-image-1' does not exist.",
    ),
    ({"model": "nano"}, USER, "invalid_value", "model", "The model 'nano' does not exist."),
    (
        {"output_compression": 50},
        USER,
        "invalid_value",
        "output_compression",
        "Compression less than 100 is not supported for PNG output format",
    ),
    (
        {"partial_images": 2},
        USER,
        "invalid_value",
        "partial_images",
        "partial_images is only supported when stream is true.",
    ),
    (
        {"stream": True, "output_format": "gif"},
        USER,
        "invalid_value",
        "stream",
        "Streaming is not supported for gif output.",
    ),
    (
        {"stream": True, "output_format": "svg"},
        USER,
        "invalid_value",
        "stream",
        "Streaming is not supported for svg output.",
    ),
    (
        {"output_format": "svg", "n": 2},
        USER,
        "invalid_value",
        "n",
        "n must be 1 for svg output.",
    ),
    (
        {"background": "transparent", "output_format": "jpeg"},
        USER,
        "invalid_value",
        "background",
        "Transparent background requires png or webp output.",
    ),
    (
        {"frame_count": 4},
        USER,
        "invalid_value",
        "frame_count",
        "frame_count is only supported for gif output.",
    ),
    (
        {"output_format": "svg", "svg": {"reasoning": {}}},
        REQUEST,
        "missing_required_parameter",
        "svg.model",
        "Missing required parameter: 'svg.model'.",
    ),
]


def error_of(answer: httpx.Response) -> dict[str, Json]:
    body = answer.json()
    assert list(body) == ["error"]
    assert isinstance(body["error"], dict)
    return body["error"]


@pytest.mark.parametrize(("fields", "kind", "code", "param", "message"), GENERATIONS)
def test_generations(
    server: SandboxServer,
    http: httpx.Client,
    fields: dict[str, Json],
    kind: str,
    code: str,
    param: str,
    message: str,
) -> None:
    answer = generate(http, **fields)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    expected = {"message": message, "type": kind, "param": param, "code": code}
    assert error_of(answer) == expected
    assert server.journal.billed == []


@pytest.mark.parametrize(
    ("model", "first_day_gone"),
    [
        ("gpt-image-1.5", datetime(2026, 12, 1, tzinfo=UTC)),
        ("gpt-image-1-mini", datetime(2026, 12, 1, tzinfo=UTC)),
        ("chatgpt-image-latest", datetime(2026, 12, 1, tzinfo=UTC)),
        ("gpt-image-1", datetime(2026, 10, 23, tzinfo=UTC)),
    ],
)
def test_models_end_by_the_clock(model: str, first_day_gone: datetime) -> None:
    for seconds, status in ((-1, 200), (0, 400)):
        still = StillClock(first_day_gone)
        still.advance(seconds)
        with (
            SandboxServer(still) as server,
            httpx.Client(base_url=server.base_url, verify=False) as http,
        ):
            http.headers["authorization"] = "Bearer any"
            assert generate(http, model=model, quality="low").status_code == status
            listed = [row["id"] for row in http.get("/models").json()["data"]]
            assert (model in listed) == (status == 200)


@pytest.mark.parametrize("prompt", ["a ModerationTest", "forbidden-by-sandbox cat"])
def test_moderation(server: SandboxServer, http: httpx.Client, prompt: str) -> None:
    answer = generate(http, prompt=prompt)
    assert answer.status_code == 400
    request_id = answer.headers["x-request-id"]
    assert error_of(answer) == {
        "message": "Your request was rejected by the safety system. If you believe this is an "
        f"error, contact us at help.openai.com and include the request ID {request_id}.",
        "type": USER,
        "param": None,
        "code": "moderation_blocked",
        "moderation_details": {"moderation_stage": "input", "categories": ["violence"]},
    }
    assert server.journal.billed == []


def test_nulls_are_omissions(http: httpx.Client) -> None:
    fields: dict[str, Json] = dict.fromkeys(("n", "size", "quality", "stream", "svg", "foo"))
    assert generate(http, **fields).status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": ""}, {"authorization": "Bearer"}, {"api-key": "x"}]
)
def test_a_key_is_needed(server: SandboxServer, headers: dict[str, str]) -> None:
    answer = httpx.get(f"{server.base_url}/models", headers=headers, verify=False)
    assert answer.status_code == 401
    error = error_of(answer)
    assert (error["type"], error["code"]) == (REQUEST, "invalid_api_key")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/images/variations", 404, "unknown_url"),
        ("POST", "/chat/completions", 404, "unknown_url"),
        ("GET", "/images/generations", 405, "method_not_supported"),
        ("GET", "/models/dall-e-3", 404, "model_not_found"),
    ],
)
def test_what_is_not_there(
    http: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert error_of(answer)["code"] == code


def test_models(http: httpx.Client) -> None:
    listed = http.get("/models").json()
    assert listed["object"] == "list"
    by_id = {row["id"]: row for row in listed["data"]}
    assert sum(name.startswith(("gpt-image", "chatgpt-image")) for name in by_id) == 12
    assert by_id["gpt-6-astra"]["object"] == "model"
    assert by_id["gpt-image-1.5"]["shutdown_date"] == "2026-12-01"
    one = http.get(f"/models/{FLARE}").json()
    assert one == by_id[FLARE]
    assert list(one) == ["id", "object", "created", "owned_by", "shutdown_date"]
    assert one["created"] == 1788825600


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff"])
def test_broken_json(http: httpx.Client, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = http.post("/images/generations", content=body, headers=headers)
    assert answer.status_code == 400
    assert error_of(answer)["type"] == REQUEST


def test_a_form_is_no_generation(http: httpx.Client) -> None:
    answer = http.post("/images/generations", data={"model": FLARE, "prompt": "x"})
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "unsupported_content_type"


EditFile = tuple[str, tuple[str, bytes, str]]
GOOD: EditFile = ("image", ("a.png", png(), "image/png"))

EDITS: list[tuple[list[EditFile], dict[str, str], str, str | None, str]] = [
    # files, fields, code, param, message
    (
        [("image", ("upload", png(), "application/octet-stream"))],
        {},
        "unsupported_file_mimetype",
        "image",
        "Invalid file 'image': unsupported mimetype ('application/octet-stream'). Supported file "
        "formats are 'image/jpeg', 'image/png', and 'image/webp'.",
    ),
    (
        [
            ("image[]", ("a.png", png(), "image/png")),
            ("image[]", ("upload", png(), "application/octet-stream")),
        ],
        {},
        "unsupported_file_mimetype",
        "image[1]",
        "Invalid file 'image[1]': unsupported mimetype ('application/octet-stream'). Supported "
        "file formats are 'image/jpeg', 'image/png', and 'image/webp'.",
    ),
    (
        [GOOD, GOOD],
        {},
        "duplicate_parameter",
        "image",
        "Duplicate parameter: 'image'. You provided multiple values for this parameter, whereas "
        "only one is allowed. If you are trying to provide a list of values, use the array syntax "
        "instead e.g. 'image[]=<value>'.",
    ),
    (
        [("mask", ("m.png", png(), "image/png"))],
        {},
        "missing_required_parameter",
        "image",
        "Missing required parameter: 'image'.",
    ),
    (
        [("image[]", ("a.png", png(), "image/png"))] * 17,
        {},
        "array_above_max_length",
        "image",
        "Invalid 'image': array too long. Expected an array with maximum length 16, but got an "
        "array with length 17 instead.",
    ),
    (
        [("image", ("a.png", b"no picture", "image/png"))],
        {},
        "invalid_image_file",
        "image",
        "Invalid file 'image': the file is not a valid image.",
    ),
    (
        [GOOD, ("mask", ("m.png", png(32, 64), "image/png"))],
        {},
        "invalid_image_file",
        "mask",
        "Invalid mask image size - 32x64 is not the size of the first image, 64x64.",
    ),
    (
        [GOOD, ("mask", ("m.png", png(mode="RGB"), "image/png"))],
        {},
        "invalid_image_file",
        "mask",
        "Invalid mask image format - the alpha channel is missing.",
    ),
    (
        [GOOD, ("mask", ("m.png", png(), "image/png")), ("markup", ("m", png(), "image/png"))],
        {},
        "invalid_value",
        "markup",
        "markup cannot be combined with mask.",
    ),
    (
        [GOOD],
        {"input_fidelity": "high", "model": "gpt-image-2"},
        "invalid_value",
        "input_fidelity",
        "The parameter 'input_fidelity' is not supported by 'gpt-image-2'.",
    ),
    (
        [GOOD],
        {"input_fidelity": "high", "model": "gpt-image-1-mini"},
        "invalid_value",
        "input_fidelity",
        "Invalid value: 'high'. Supported values are: 'low'.",
    ),
    (
        [GOOD],
        {"n": "two"},
        "invalid_type",
        "n",
        "Invalid type for 'n': expected an integer, but got a string instead.",
    ),
    (
        [GOOD, ("picture", ("a.png", png(), "image/png"))],
        {},
        "unknown_parameter",
        "picture",
        "Unknown parameter: 'picture'.",
    ),
    ([GOOD], {"foo": "1"}, "unknown_parameter", "foo", "Unknown parameter: 'foo'."),
]


@pytest.mark.parametrize(("files", "fields", "code", "param", "message"), EDITS)
def test_edits(
    server: SandboxServer,
    http: httpx.Client,
    files: list[EditFile],
    fields: Mapping[str, str],
    code: str,
    param: str | None,
    message: str,
) -> None:
    asked = {"model": FLARE, "prompt": "A hat", **fields}
    answer = http.post("/images/edits", data=asked, files=files)
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["message"], error["code"], error["param"]) == (message, code, param)
    assert server.journal.billed == []


def test_a_mask_that_is_no_png(http: httpx.Client) -> None:
    jpeg = base64.b64decode(generate(http, output_format="jpeg").json()["data"][0]["b64_json"])
    files = {"image": ("a.jpg", jpeg, "image/jpeg"), "mask": ("m.jpg", jpeg, "image/jpeg")}
    answer = http.post("/images/edits", data={"model": FLARE, "prompt": "A hat"}, files=files)
    message = "Invalid mask image format - the mask must be a PNG."
    assert error_of(answer)["message"] == message


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({}, "missing_required_parameter", "images"),
        ({"images": []}, "missing_required_parameter", "images"),
        ({"images": "x"}, "invalid_type", "images"),
        ({"images": ["x"]}, "invalid_type", "images[0]"),
        ({"images": [{}]}, "invalid_value", "images[0]"),
        ({"images": [{"file_id": 1}]}, "invalid_type", "images[0].file_id"),
        ({"images": [{"url": "x"}]}, "unknown_parameter", "images[0].url"),
        (
            {"images": [{"image_url": "https://example.com/a.png"}]},
            "failed_to_download_image",
            "images[0].image_url",
        ),
        ({"images": [{"image_url": "data:,x"}]}, "invalid_image_url", "images[0].image_url"),
        ({"images": [{"image_url": "x"}] * 17}, "array_above_max_length", "images"),
        ({"image": "x"}, "unknown_parameter", "image"),
    ],
)
def test_json_edits(http: httpx.Client, fields: dict[str, Json], code: str, param: str) -> None:
    body = {"model": FLARE, "prompt": "A hat", **fields}
    answer = http.post("/images/edits", json=body)
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["code"], error["param"]) == (code, param)


def test_the_sdk_reads_the_error(sdk: OpenAI) -> None:
    with pytest.raises(BadRequestError) as refused:
        sdk.images.generate(model=FLARE, prompt="x", size="256x256")
    assert (refused.value.code, refused.value.param) == ("invalid_value", "size")
    assert refused.value.request_id
