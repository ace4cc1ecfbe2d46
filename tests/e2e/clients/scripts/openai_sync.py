"""OpenAI's Python SDK, synchronous. It reads OPENAI_BASE_URL and OPENAI_API_KEY itself."""

from __future__ import annotations

from openai import OpenAI
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
    raised,
    tell,
)

client = OpenAI()
TOOL = {"type": "image_generation", "model": MODEL, "size": "1024x1024", "quality": "low"}


@feature
def generate():
    answer = client.images.generate(
        model=MODEL, prompt="generate: a lighthouse", n=2, size="1024x1024", quality="low"
    )
    return [picture.b64_json for picture in answer.data]


@feature
def edit():
    """Raw bytes have no name, and the SDK sends them as application/octet-stream."""
    answer = client.images.edit(
        model=MODEL,
        image=[FIRST.read_bytes(), SECOND.read_bytes()],
        mask=MASK,
        prompt="edit: both on one table",
        size="1024x1024",
        quality="low",
    )
    return [picture.b64_json for picture in answer.data]


@feature
def stream():
    events = client.images.generate(
        model=MODEL,
        prompt="stream: a lighthouse",
        size="1024x1024",
        quality="low",
        stream=True,
        partial_images=2,
    )
    *partial, completed = events
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    assert completed.type == "image_generation.completed"
    return [completed.b64_json]


@feature
def url():
    """As programs were written for dall-e-3."""
    answer = client.images.generate(
        model="dall-e-3",
        prompt="url: a lighthouse",
        size="1792x1024",
        quality="standard",
        style="vivid",
        response_format="url",
    )
    return [picture.url for picture in answer.data]


@feature
def files():
    """A picture is uploaded once, and named by its id; the SDK has no method for that edit."""
    uploaded = client.files.create(file=FIRST, purpose="vision")
    assert uploaded.id in [file.id for file in client.files.list(purpose="vision")]
    answer = client.post(
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
    assert client.files.content(uploaded.id).read() == FIRST.read_bytes()
    assert client.files.delete(uploaded.id).deleted
    return [picture.b64_json for picture in answer.data]


@feature
def responses():
    """A picture, then a change to it."""
    first = client.responses.create(
        model=TEXT_MODEL, input="responses: draw a lighthouse", tools=[TOOL]
    )
    second = client.responses.create(
        model=TEXT_MODEL,
        input="responses: now at night",
        previous_response_id=first.id,
        tools=[TOOL],
    )
    return [
        item.result
        for response in (first, second)
        for item in response.output
        if item.type == "image_generation_call"
    ]


@feature
def errors():
    def ask(key, **changes):
        order = {"model": MODEL, "prompt": "errors: a lighthouse", "quality": "low", **changes}
        return raised(lambda: OpenAI(api_key=key).images.generate(**order))

    return {
        "unknown_key": ask(UNKNOWN_KEY),
        "over_budget": ask(POOR_KEY),
        "bad_parameter": ask(client.api_key, n=11),
    }


@feature
def retry():
    """The first attempt is answered 429 with retry-after-ms; the SDK asks again by itself."""
    answer = client.images.generate(
        model=MODEL, prompt="retry: a lighthouse", size="1024x1024", quality="low"
    )
    return [picture.b64_json for picture in answer.data]


tell()
