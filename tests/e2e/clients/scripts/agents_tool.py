"""OpenAI's agents SDK: an agent that has the image tool."""

from __future__ import annotations

import os

from agents import Agent, ImageGenerationTool, OpenAIResponsesModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI
from story import MODEL, POOR_KEY, TEXT_MODEL, UNKNOWN_KEY, feature, raised_by, tell

set_tracing_disabled(True)


def agent(key=os.environ["OPENAI_API_KEY"], **changes):
    tool = {"type": "image_generation", "model": MODEL, "quality": "low", **changes}
    client = AsyncOpenAI(api_key=key)
    return Agent(
        name="Painter",
        instructions="You draw what you are asked for.",
        model=OpenAIResponsesModel(model=TEXT_MODEL, openai_client=client),
        tools=[ImageGenerationTool(tool)],
    )


@feature
async def responses():
    run = await Runner.run(agent(), "responses: draw a lighthouse")
    return [
        item.raw_item.result
        for item in run.new_items
        if item.type == "tool_call_item" and item.raw_item.type == "image_generation_call"
    ]


@feature
async def errors():
    async def ask(*given, **changes):
        return await raised_by(Runner.run(agent(*given, **changes), "errors: draw a lighthouse"))

    return {
        "unknown_key": await ask(UNKNOWN_KEY),
        "over_budget": await ask(POOR_KEY),
        "bad_parameter": await ask(size="large"),
    }


tell()
