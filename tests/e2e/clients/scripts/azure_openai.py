"""AzureOpenAI of OpenAI's Python SDK: the model is a deployment, named in the path."""

from __future__ import annotations

import os

from openai import AzureOpenAI
from story import FIRST, MASK, MODEL, POOR_KEY, SECOND, UNKNOWN_KEY, feature, raised, tell


def connect(key=os.environ["OPENAI_API_KEY"]):
    return AzureOpenAI(
        azure_endpoint=os.environ["GATEWAY_ORIGIN"],
        api_version="2025-04-01-preview",
        api_key=key,
        base_url=None,
    )


# The SDK takes no endpoint beside the address that the others read.
del os.environ["OPENAI_BASE_URL"]
client = connect()


@feature
def generate():
    answer = client.images.generate(
        model=MODEL, prompt="generate: a lighthouse", n=2, size="1024x1024", quality="low"
    )
    return [picture.b64_json for picture in answer.data]


@feature
def edit():
    answer = client.images.edit(
        model=MODEL,
        image=[FIRST, SECOND],
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
        partial_images=1,
    )
    partial, completed = events
    assert partial.type == "image_generation.partial_image"
    assert completed.type == "image_generation.completed"
    return [completed.b64_json]


@feature
def errors():
    def ask(key, **changes):
        order = {"model": MODEL, "prompt": "errors: a lighthouse", "quality": "low", **changes}
        return raised(lambda: connect(key).images.generate(**order))

    return {
        "unknown_key": ask(UNKNOWN_KEY),
        "over_budget": ask(POOR_KEY),
        "bad_parameter": ask(client.api_key, n=11),
    }


@feature
def retry():
    answer = client.images.generate(
        model=MODEL, prompt="retry: a lighthouse", size="1024x1024", quality="low"
    )
    return [picture.b64_json for picture in answer.data]


tell()
