"""The same front door for the other SDK: the openai package of npm."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gateway.sandbox.journal import FilePart
from gateway.sandbox.rules import Rule
from tests.running import ALIAS, KEY, MODEL, GatewayUnderTest, Start

SCRIPTS = Path(__file__).parent / "node"
TOOLS = Path(__file__).parents[2] / ".tools" / "node"
NODE = shutil.which("node")
SECONDS = 60

pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(
        NODE is None or not (TOOLS / "node_modules" / "openai").is_dir(),
        reason="no Node.js, or no openai package: run tests/e2e/node/install.sh (needs npm)",
    ),
]


async def node(gateway: GatewayUnderTest, script: str, **environment: str) -> Any:
    """What a script said. The SDK itself reads the address and the key from the environment."""
    process = await asyncio.create_subprocess_exec(
        str(NODE),
        str(SCRIPTS / script),
        env={
            "PATH": os.environ.get("PATH", ""),
            "OPENAI_BASE_URL": gateway.base_url,
            "OPENAI_API_KEY": KEY,
            "NODE_TOOLS": str(TOOLS),
            "MODEL": ALIAS,
            **environment,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(SECONDS):
        said, complaints = await process.communicate()
    assert process.returncode == 0, complaints.decode()
    return json.loads(said)


async def test_a_picture_is_bought_once(gateway: GatewayUnderTest) -> None:
    first, second = await node(gateway, "generate.mjs")
    picture = Image.open(io.BytesIO(base64.b64decode(first["b64"])))
    assert picture.size == (1024, 1024)
    assert (first["cache"], second["cache"]) == ("miss", "hit")
    assert second["b64"] == first["b64"]
    assert second["cost"] == "0"
    [record] = gateway.sandbox.journal
    assert first["usage"] == record.usage
    assert record.fields["model"] == MODEL
    assert record.header("authorization") == "Bearer sk-upstream-secret"
    assert [name for name, _ in record.headers if "stainless" in name] == []
    told = [receipt.rid for receipt, _ in await gateway.told.until(2)]
    assert [first["requestId"], second["requestId"]] == told


async def test_every_kind_of_file_arrives(gateway: GatewayUnderTest, tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.effect_noise((256, 256), 90).convert("RGBA").save(out, "PNG")
    content = out.getvalue()
    (tmp_path / "disk.png").write_bytes(content)
    said = await node(gateway, "edit.mjs", PICTURE=str(tmp_path / "disk.png"))

    def part(field: str, filename: str, kind: str = "image/png") -> FilePart:
        return FilePart(field, filename, kind, hashlib.sha256(content).hexdigest(), len(content))

    records = {str(record.fields["prompt"]): record for record in gateway.sandbox.journal}
    assert {name: list(record.files) for name, record in records.items()} == {
        "file": [part("image", "file.png")],
        "toFile": [part("image", "to-file.png")],
        "several": [part("image[]", "b.png"), part("image[]", "a.png")],
        # Sent as application/octet-stream: mended here.
        "stream": [part("image", "disk.png")],
    }
    for name in ("file", "toFile", "several", "stream"):
        assert base64.b64decode(said[name]["b64"]).startswith(b"\x89PNG")
    for record in records.values():
        assert record.fields["model"] == MODEL
        assert record.header("content-length") == str(record.body_bytes)


async def test_a_stream(gateway: GatewayUnderTest) -> None:
    said = await node(gateway, "stream.mjs", PROMPT="A lighthouse")
    assert said["ended"] is None
    assert [event["type"] for event in said["events"]] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert said["events"][-1]["usage"] == gateway.sandbox.journal[0].usage
    [(receipt, _)] = await gateway.told.until(1)
    assert receipt.cost > 0


async def test_an_error_in_a_stream_is_thrown(gateway: GatewayUnderTest) -> None:
    gateway.sandbox.rules.add(Rule(sse_error_after=1))
    said = await node(gateway, "stream.mjs", PROMPT="A lighthouse")
    assert [event["type"] for event in said["events"]] == ["image_generation.partial_image"]
    assert said["ended"]["name"] == "APIError"
    assert said["ended"]["attempts"] == 1
    assert "The server had an error" in said["ended"]["message"]


async def refused(gateway: GatewayUnderTest, options: Any = None, **order: Any) -> Any:
    """With the SDK's own retries."""
    return await node(
        gateway,
        "refusal.mjs",
        OPTIONS=json.dumps(options or {}),
        ORDER=json.dumps({"model": MODEL, "prompt": "p", "quality": "low", **order}),
    )


async def test_an_empty_budget_is_told_once(start: Start) -> None:
    async with start({"teams": {"growth": {"budget": {"day": 0.001}}}}) as gateway:
        said = await refused(gateway)
        assert said["name"] == "RateLimitError"
        assert (said["status"], said["code"], said["type"]) == (429, *["insufficient_quota"] * 2)
        assert said["attempts"] == 1
        assert said["requestId"].startswith("req_")
        assert gateway.sandbox.journal.received == 0


@pytest.mark.parametrize(
    ("options", "order", "name", "status", "code", "param"),
    [
        ({"apiKey": "nobody's"}, {}, "AuthenticationError", 401, "invalid_api_key", None),
        ({}, {"n": 11}, "BadRequestError", 400, "invalid_value", "n"),
        ({}, {"model": "gpt-image-2"}, "PermissionDeniedError", 403, "model_not_allowed", "model"),
        ({}, {"user": "x" * 60_000}, "APIError", 413, "request_too_large", None),
    ],
    ids=["key", "parameter", "model", "size"],
)
async def test_what_is_refused_is_not_tried_again(
    start: Start, options: Any, order: Any, name: str, status: int, code: str, param: str | None
) -> None:
    changes = {
        "server": {"max_json_bytes": 50_000},
        "teams": {"growth": {"models": [MODEL, ALIAS]}},
    }
    async with start(changes) as gateway:
        said = await refused(gateway, options, **order)
        assert (said["name"], said["status"]) == (name, status)
        assert (said["code"], said["param"]) == (code, param)
        assert said["attempts"] == 1
        assert gateway.sandbox.journal.received == 0


async def test_a_page_of_another_origin(start: Start) -> None:
    """`dangerouslyAllowBrowser`, behind a fetch that asks first and hides what is not exposed."""
    page = "https://studio.example.com"
    async with start({"server": {"cors": {"origins": [page]}}}) as gateway:
        said = await node(gateway, "browser.mjs", ORIGIN=page)
        assert "failed" not in said, said
        assert said["b64"] > 1000
        assert said["events"] == ["image_generation.partial_image", "image_generation.completed"]
        assert said["headers"]["x-cost-usd"] != ""
        assert said["headers"]["x-model-served"] == MODEL
        assert "date" not in said["headers"]
        assert [one["status"] for one in said["preflights"]] == [204, 204, 204]
        assert {"authorization", "content-type"} < set(said["preflights"][0]["names"])
        # A refusal can be read like an answer.
        refusal = said["refusal"]
        assert (refusal["status"], refusal["code"]) == (401, "invalid_api_key")
        told = [receipt.rid for receipt, _ in await gateway.told.until(3)]
        assert [said["requestId"], refusal["requestId"]] == [told[0], told[2]]
        foreign = await node(gateway, "browser.mjs", ORIGIN="https://evil.example.com")
        assert "preflight was refused" in foreign["failed"]
        assert len(gateway.told.requests) == 3
