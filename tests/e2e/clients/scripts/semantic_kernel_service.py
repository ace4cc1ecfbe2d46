"""Semantic Kernel: its service that makes pictures from text."""

from __future__ import annotations

import os

from semantic_kernel.connectors.ai.open_ai import OpenAITextToImage
from story import FIRST, MASK, MODEL, POOR_KEY, SECOND, UNKNOWN_KEY, feature, raised_by, tell


def service(key=os.environ["OPENAI_API_KEY"], model=MODEL):
    return OpenAITextToImage(ai_model_id=model, api_key=key)


@feature
async def generate():
    return await service().generate_images(
        "generate: a lighthouse", n=2, width=1792, height=1024, quality="low"
    )


@feature
async def edit():
    paths = [str(FIRST), str(SECOND)]
    own = service()
    settings = own.get_prompt_execution_settings_class()(ai_model_id=MODEL, quality="low")
    return await own.edit_image(
        "edit: both on one table", image_paths=paths, mask_path=str(MASK), settings=settings
    )


@feature
async def errors():
    async def ask(*given, **changes):
        return await raised_by(
            service(*given).generate_images("errors: a lighthouse", quality="low", **changes)
        )

    return {
        "unknown_key": await ask(UNKNOWN_KEY),
        "over_budget": await ask(POOR_KEY),
        "bad_parameter": await ask(output_compression=101),
    }


@feature
async def retry():
    return await service().generate_images("retry: a lighthouse", quality="low")


tell()
