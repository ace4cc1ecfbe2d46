"""LlamaIndex: the tool of dall-e-3, which gives a url or writes a file."""

from __future__ import annotations

import os
from pathlib import Path

from llama_index.tools.openai import OpenAIImageGenerationToolSpec
from story import OUTPUTS, POOR_KEY, UNKNOWN_KEY, feature, raised, tell


def tool(key=os.environ["OPENAI_API_KEY"]):
    return OpenAIImageGenerationToolSpec(api_key=key, cache_dir=str(OUTPUTS / "cache"))


@feature
def generate():
    """It asks for base64, and says where it wrote the picture."""
    [path] = tool().image_generation("generate: a lighthouse", quality="hd", download=True)
    return [Path(path).read_bytes()]


@feature
def url():
    return [tool().image_generation("url: a lighthouse", size="1024x1792")]


@feature
def errors():
    def ask(key, **changes):
        return raised(lambda: tool(key).image_generation("errors: a lighthouse", **changes))

    return {
        "unknown_key": ask(UNKNOWN_KEY),
        "over_budget": ask(POOR_KEY),
        "bad_parameter": ask(os.environ["OPENAI_API_KEY"], num_images=11),
    }


@feature
def retry():
    return [tool().image_generation("retry: a lighthouse")]


tell()
