"""Haystack: the component for image generation."""

from __future__ import annotations

from haystack.components.generators import OpenAIImageGenerator
from haystack.utils import Secret
from story import MODEL, POOR_KEY, UNKNOWN_KEY, feature, raised, tell


@feature
def generate():
    generator = OpenAIImageGenerator(model=MODEL, quality="low")
    return generator.run("generate: a lighthouse")["images"]


@feature
def errors():
    def ask(key=None, **changes):
        given = {"api_key": Secret.from_token(key)} if key else {}
        generator = OpenAIImageGenerator(model=MODEL, quality="low", **given, **changes)
        return raised(lambda: generator.run("errors: a lighthouse"))

    return {
        "unknown_key": ask(UNKNOWN_KEY),
        "over_budget": ask(POOR_KEY),
        "bad_parameter": ask(size="large"),
    }


@feature
def retry():
    return OpenAIImageGenerator(model=MODEL, quality="low").run("retry: a lighthouse")["images"]


tell()
