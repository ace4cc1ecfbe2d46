"""The main job: an unmodified SDK makes a picture; the team's key in, the upstream's key out."""

from __future__ import annotations

import base64
import io

from PIL import Image

from tests.running import ALIAS, MODEL, GatewayUnderTest


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
