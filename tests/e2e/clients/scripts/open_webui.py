"""What Open WebUI sends for a picture (its routers/images.py, 2026-11), by its own aiohttp.

Replayed, not run: the requests and what it reads of the answers are its, the code is not.
"""

from __future__ import annotations

import json
import os
import uuid

import aiohttp
from story import FIRST, MODEL, POOR_KEY, SECOND, UNKNOWN_KEY, feature, tell

BASE = os.environ["OPENAI_BASE_URL"]


def headers(key=os.environ["OPENAI_API_KEY"]):
    """With ENABLE_FORWARD_USER_INFO_HEADERS."""
    return {
        "Authorization": f"Bearer {key}",
        "X-OpenWebUI-User-Name": "Ada%20Lovelace",
        "X-OpenWebUI-User-Id": "8f1f6f0e-0000-4000-8000-3c2d3f0a9b11",
        "X-OpenWebUI-User-Email": "ada@example.com",
        "X-OpenWebUI-User-Role": "user",
    }


async def ask(path, given, **body):
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{BASE}{path}", headers=given, **body) as answer,
    ):
        answer.raise_for_status()
        return (await answer.json(content_type=None))["data"]


async def order(key=None, **changes):
    given = {**headers(*([key] if key else [])), "Content-Type": "application/json"}
    return await ask("/images/generations", given, json=changes)


@feature
async def generate():
    """Its default model and size; of a model that is not gpt-image it asks for base64."""
    data = await order(
        model="dall-e-2",
        prompt="generate: a lighthouse",
        n=1,
        size="512x512",
        response_format="b64_json",
    )
    return [picture.get("url") or picture["b64_json"] for picture in data]


@feature
async def edit():
    form = aiohttp.FormData()
    fields = {"model": MODEL, "prompt": "edit: both on one table", "n": 1, "size": "1024x1024"}
    for name, value in fields.items():
        form.add_field(name, json.dumps(value) if isinstance(value, dict) else str(value))
    for path in (FIRST, SECOND):
        form.add_field(
            "image[]",
            path.read_bytes(),
            filename=f"{uuid.uuid4()}.png",
            content_type="image/png",
        )
    data = await ask("/images/edits", headers(), data=form)
    return [picture.get("url") or picture["b64_json"] for picture in data]


@feature
async def url():
    """With {"response_format": "url"} among its additional parameters."""
    data = await order(
        model="gpt-image-1",
        prompt="url: a lighthouse",
        n=2,
        size="1024x1024",
        response_format="url",
    )
    return [picture.get("url") or picture["b64_json"] for picture in data]


@feature
async def errors():
    async def status(key=None, **changes):
        asked = {"model": MODEL, "prompt": "errors: a lighthouse", "n": 1, **changes}
        try:
            await order(key, **asked)
        except aiohttp.ClientResponseError as error:
            return str(error.status)
        return "nothing"

    return {
        "unknown_key": await status(UNKNOWN_KEY),
        "over_budget": await status(POOR_KEY),
        "bad_parameter": await status(n=11),
    }


tell()
