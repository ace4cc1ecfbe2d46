"""pydantic-ai: its image generator, and an agent that has the image tool."""

from __future__ import annotations

import os

from openai import AsyncOpenAI
from pydantic_ai import Agent, BinaryContent, BinaryImage, ImageGenerationTool, ImageGenerator
from pydantic_ai.capabilities import NativeTool
from pydantic_ai.images.openai import OpenAIImageGenerationModel
from pydantic_ai.providers.openai import OpenAIProvider
from story import (
    FIRST,
    MODEL,
    POOR_KEY,
    SECOND,
    TEXT_MODEL,
    UNKNOWN_KEY,
    feature,
    raised_by,
    tell,
)

SETTINGS = {"dimensions": (1024, 1024), "openai_quality": "low"}
generator = ImageGenerator(f"openai:{MODEL}", settings=SETTINGS)


@feature
async def generate():
    made = await generator.generate("generate: a lighthouse", settings={"openai_n": 2})
    return [image.content.data for image in made.images]


@feature
async def edit():
    images = [BinaryImage(path.read_bytes(), media_type="image/png") for path in (FIRST, SECOND)]
    made = await generator.generate("edit: both on one table", images=images)
    return [image.content.data for image in made.images]


@feature
async def responses():
    tool = ImageGenerationTool(provider_settings={"openai": {"model": MODEL, "quality": "low"}})
    agent = Agent(f"openai-responses:{TEXT_MODEL}", capabilities=[NativeTool(tool)])
    run = await agent.run("responses: draw a lighthouse")
    return [file.data for file in run.response.images if isinstance(file, BinaryContent)]


@feature
async def errors():
    async def ask(key, **changes):
        provider = OpenAIProvider(openai_client=AsyncOpenAI(api_key=key))
        model = OpenAIImageGenerationModel(MODEL, provider=provider)
        settings = {**SETTINGS, **changes}
        return await raised_by(
            ImageGenerator(model, settings=settings).generate("errors: a lighthouse")
        )

    own = os.environ["OPENAI_API_KEY"]
    return {
        "unknown_key": await ask(UNKNOWN_KEY),
        "over_budget": await ask(POOR_KEY),
        "bad_parameter": await ask(own, openai_output_compression=101),
    }


@feature
async def retry():
    made = await generator.generate("retry: a lighthouse")
    return [image.content.data for image in made.images]


tell()
