"""LangChain: DallEAPIWrapper, which reads `data[].url`, and ChatOpenAI with the image tool."""

from __future__ import annotations

import os

from langchain_community.tools.openai_dalle_image_generation import OpenAIDALLEImageGenerationTool
from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper
from langchain_openai import ChatOpenAI
from story import MODEL, POOR_KEY, TEXT_MODEL, UNKNOWN_KEY, feature, raised, tell


@feature
def generate():
    """An agent's tool, which answers with urls."""
    tool = OpenAIDALLEImageGenerationTool(api_wrapper=DallEAPIWrapper(model="dall-e-3"))
    return tool.invoke("generate: a lighthouse").split("\n")


@feature
def url():
    wrapper = DallEAPIWrapper(model="dall-e-2", n=2, size="512x512")
    return wrapper.run("url: a lighthouse").split("\n")


@feature
def responses():
    tool = {"type": "image_generation", "model": MODEL, "size": "1024x1024", "quality": "low"}
    model = ChatOpenAI(model=TEXT_MODEL, use_responses_api=True).bind_tools([tool])
    answer = model.invoke("responses: draw a lighthouse")
    return [block["base64"] for block in answer.content_blocks if block["type"] == "image"]


@feature
def errors():
    def ask(key, **changes):
        wrapper = DallEAPIWrapper(model=MODEL, api_key=key, quality="low", **changes)
        return raised(lambda: wrapper.run("errors: a lighthouse"))

    return {
        "unknown_key": ask(UNKNOWN_KEY),
        "over_budget": ask(POOR_KEY),
        "bad_parameter": ask(os.environ["OPENAI_API_KEY"], n=11),
    }


@feature
def retry():
    return DallEAPIWrapper(model="dall-e-3").run("retry: a lighthouse").split("\n")


tell()
