"""How the tests of this folder call the sandbox."""

from __future__ import annotations

import base64
import io

import httpx
from PIL import Image

from gateway.domain.call import Json

FLARE = "gpt-image-2.5-flare"


def generate(http: httpx.Client, **fields: Json) -> httpx.Response:
    """POST /images/generations with a model and a prompt, and whatever is given."""
    body = {"model": FLARE, "prompt": "A lighthouse", **fields}
    return http.post("/images/generations", json=body)


def png(width: int = 64, height: int = 64, mode: str = "RGBA") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def picture(b64: str | None) -> Image.Image:
    assert b64 is not None
    return Image.open(io.BytesIO(base64.b64decode(b64)))
