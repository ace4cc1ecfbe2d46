"""OpenAI's Python SDK, asynchronous; with files, and the image tool of the Responses API."""

from __future__ import annotations

from openai import AsyncOpenAI
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

client = AsyncOpenAI()
TOOL = {"type": "image_generation", "model": MODEL, "size": "1024x1024", "quality": "low"}


@feature
async def generate():
    answer = await client.images.generate(
        model=MODEL, prompt="generate: a lighthouse", n=2, size="1024x1024", quality="low"
    )
    return [picture.b64_json for picture in answer.data]


@feature
async def edit():
    answer = await client.images.edit(
        model=MODEL,
        image=[FIRST, SECOND],
        mask=MASK,
        prompt="edit: both on one table",
        size="1024x1024",
        quality="low",
    )
    return [picture.b64_json for picture in answer.data]


@feature
async def stream():
    events = await client.images.edit(
        model=MODEL,
        image=[FIRST],
        prompt="stream: at night",
        size="1024x1024",
        quality="low",
        stream=True,
        partial_images=2,
    )
    types, last = [], None
    async for event in events:
        types.append(event.type)
        last = event
    assert types == ["image_edit.partial_image"] * 2 + ["image_edit.completed"], types
    return [last.b64_json]


@feature
async def url():
    answer = await client.images.generate(
        model=MODEL,
        prompt="url: a lighthouse",
        n=2,
        size="1024x1024",
        quality="low",
        response_format="url",
    )
    return [picture.url for picture in answer.data]


@feature
async def files():
    """A picture is uploaded once, and named by its id; the SDK has no method for that edit."""
    uploaded = await client.files.create(file=FIRST, purpose="vision")
    assert uploaded.id in [file.id async for file in client.files.list(purpose="vision")]
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
    """A picture, then a change to it, as a stream."""
    first = await client.responses.create(
        model=TEXT_MODEL, input="responses: draw a lighthouse", tools=[TOOL]
    )
    pictures = [item.result for item in first.output if item.type == "image_generation_call"]
    events = await client.responses.create(
        model=TEXT_MODEL,
        input="responses: now at night",
        previous_response_id=first.id,
        tools=[{**TOOL, "partial_images": 1}],
        stream=True,
    )
    types = []
    async for event in events:
        types.append(event.type)
        if event.type == "response.completed":
            pictures += [
                item.result
                for item in event.response.output
                if item.type == "image_generation_call"
            ]
    assert "response.image_generation_call.partial_image" in types, types
    again = await client.responses.retrieve(first.id)
    assert again.id == first.id
    await client.responses.delete(first.id)
    return pictures


@feature
async def errors():
    async def ask(key, **changes):
        order = {"model": MODEL, "prompt": "errors: a lighthouse", "quality": "low", **changes}
        return await raised_by(AsyncOpenAI(api_key=key).images.generate(**order))

    return {
        "unknown_key": await ask(UNKNOWN_KEY),
        "over_budget": await ask(POOR_KEY),
        "bad_parameter": await ask(client.api_key, n=11),
    }


@feature
async def retry():
    """An edit from a path can be sent again; the SDK does so by itself."""
    answer = await client.images.edit(
        model=MODEL, image=FIRST, prompt="retry: at night", size="1024x1024", quality="low"
    )
    return [picture.b64_json for picture in answer.data]


tell()
