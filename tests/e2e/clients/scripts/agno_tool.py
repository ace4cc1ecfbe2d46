"""Agno: the toolkit of OpenAI, as an agent calls it. It raises nothing: what went wrong is told to
the model as a text."""

from __future__ import annotations

import re

from agno.tools.openai import OpenAITools
from story import MODEL, POOR_KEY, UNKNOWN_KEY, feature, tell


@feature
def generate():
    tools = OpenAITools(image_model=MODEL, image_quality="low")
    return [image.content for image in tools.generate_image("generate: a lighthouse").images]


@feature
def errors():
    def ask(key=None, **changes):
        tools = OpenAITools(api_key=key, image_model=MODEL, image_quality="low", **changes)
        said = tools.generate_image("errors: a lighthouse").content
        return re.findall(r"Error code: (\d+)", said)[0]

    return {
        "unknown_key": ask(UNKNOWN_KEY),
        "over_budget": ask(POOR_KEY),
        "bad_parameter": ask(image_size="large"),
    }


@feature
def retry():
    """As it was written for dall-e-3; the SDK inside asks again by itself."""
    tools = OpenAITools(
        image_model="dall-e-3",
        image_quality="standard",
        image_style="vivid",
        image_size="1024x1792",
    )
    return [image.content for image in tools.generate_image("retry: a lighthouse").images]


tell()
