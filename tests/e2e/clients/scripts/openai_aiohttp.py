"""OpenAI's Python SDK over aiohttp: openai[aiohttp]."""

from __future__ import annotations

from openai import AsyncOpenAI, DefaultAioHttpClient
from openai.types import ImagesResponse
from story import (
    FIRST,
    MASK,
    MODEL,
    POOR_KEY,
    SECOND,
    TEXT_MODEL,
    UNKNOWN_KEY,
    feature,
    raised_by,
    tell,
)

TOOL = {"type": "image_generation", "model": MODEL, "size": "1024x1024", "quality": "low"}


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
async def files():
    async with connect() as client:
        uploaded = await client.files.create(file=FIRST, purpose="vision")
        answer = await client.post(
            "/images/edits",
            body={
                "model": MODEL,
                "images": [{"file_id": uploaded.id}],
                "prompt": "files: at night",
                "size": "1024x1024",
                "quality": "low",
            },
            cast_to=ImagesResponse,
        )
        assert (await client.files.content(uploaded.id)).read() == FIRST.read_bytes()
        assert (await client.files.delete(uploaded.id)).deleted
    return [picture.b64_json for picture in answer.data]


@feature
async def responses():
    async with connect() as client:
        answer = await client.responses.create(
            model=TEXT_MODEL, input="responses: draw a lighthouse", tools=[TOOL]
        )
    return [item.result for item in answer.output if item.type == "image_generation_call"]


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
