"""OpenAI's Python SDK over aiohttp: openai[aiohttp]."""

from __future__ import annotations

from openai import AsyncOpenAI, DefaultAioHttpClient
from story import FIRST, MASK, MODEL, POOR_KEY, SECOND, UNKNOWN_KEY, feature, raised_by, tell


def connect(**options):
    return AsyncOpenAI(http_client=DefaultAioHttpClient(), **options)


@feature
async def generate():
    async with connect() as client:
        answer = await client.images.generate(
            model=MODEL, prompt="generate: a lighthouse", n=2, size="1024x1024", quality="low"
        )
    return [picture.b64_json for picture in answer.data]


@feature
async def edit():
    async with connect() as client:
        answer = await client.images.edit(
            model=MODEL,
            image=[FIRST.read_bytes(), ("second.png", SECOND.read_bytes(), "image/png")],
            mask=MASK,
            prompt="edit: both on one table",
            size="1024x1024",
            quality="low",
        )
    return [picture.b64_json for picture in answer.data]


@feature
async def stream():
    types, last = [], None
    async with connect() as client:
        events = await client.images.generate(
            model=MODEL,
            prompt="stream: a lighthouse",
            size="1024x1024",
            quality="low",
            stream=True,
            partial_images=2,
        )
        async for event in events:
            types.append(event.type)
            last = event
    assert types == ["image_generation.partial_image"] * 2 + ["image_generation.completed"], types
    return [last.b64_json]


@feature
async def url():
    async with connect() as client:
        answer = await client.images.generate(
            model="dall-e-2",
            prompt="url: a lighthouse",
            n=2,
            size="512x512",
            response_format="url",
        )
    return [picture.url for picture in answer.data]


@feature
async def errors():
    async def ask(**changes):
        key = {"api_key": changes.pop("key")} if "key" in changes else {}
        order = {"model": MODEL, "prompt": "errors: a lighthouse", "quality": "low", **changes}
        async with connect(**key) as client:
            return await raised_by(client.images.generate(**order))

    return {
        "unknown_key": await ask(key=UNKNOWN_KEY),
        "over_budget": await ask(key=POOR_KEY),
        "bad_parameter": await ask(n=11),
    }


@feature
async def retry():
    async with connect() as client:
        answer = await client.images.generate(
            model=MODEL, prompt="retry: a lighthouse", size="1024x1024", quality="low"
        )
    return [picture.b64_json for picture in answer.data]


tell()
