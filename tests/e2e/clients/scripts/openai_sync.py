"""OpenAI's Python SDK, synchronous. It reads OPENAI_BASE_URL and OPENAI_API_KEY itself."""

from __future__ import annotations

from openai import OpenAI
from story import FIRST, MASK, MODEL, POOR_KEY, SECOND, UNKNOWN_KEY, feature, raised, tell

client = OpenAI()


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
