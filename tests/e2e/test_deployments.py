"""Azure's paths name the model, percent-encoded: what such a name may hold is no more than what a
body's may, for it is written into the same places."""

from __future__ import annotations

import base64
from typing import Any
from urllib.parse import quote

import pytest

from gateway.sandbox.server import SandboxServer
from tests.running import MODEL, Start

ANY_MODEL: dict[str, Any] = {"models": {"*": {"upstream": "openai", "unpriced": "allow"}}}
TEN_PICTURES = '\r\n--BB\r\nContent-Disposition: form-data; name="n"\r\n\r\n10'
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
FORM = (
    b'--BB\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nhi\r\n'
    b'--BB\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
    b"Content-Type: image/png\r\n\r\n" + PNG + b"\r\n--BB--\r\n"
)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        (MODEL + TEN_PICTURES, "bad_header"),
        (MODEL + "\n", "bad_header"),
        (MODEL + "\0", "bad_header"),
        ("--BB", "bad_header"),
        ("--BB--", "bad_header"),
        ("m" * 257, "invalid_value"),
        ("x\x1b[31mred", "invalid_value"),
    ],
)
async def test_no_name_in_a_path_can_write_a_field(
    name: str, code: str, start: Start, sandbox: SandboxServer
) -> None:
    path = f"/openai/deployments/{quote(name, safe='')}/images/edits?api-version=1"
    said = {"content-type": "multipart/form-data; boundary=BB"}
    async with start(ANY_MODEL) as gateway, gateway.http() as http:
        refused = await http.post(gateway.origin + path, content=FORM, headers=said)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == (code, "model")
        assert refused.headers["x-cost-usd"] == "0"
        await gateway.told.until(1)
        assert await gateway.gateway.ledger.open_holds() == 0
    assert len(sandbox.journal) == 0
