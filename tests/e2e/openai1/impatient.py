"""A client of openai 1.x that gives up sooner than the picture is there, and asks again."""

import json
import os
import sys

import openai

sdk = openai.OpenAI(timeout=float(os.environ["TIMEOUT_SECONDS"]), max_retries=8)
answer = sdk.images.with_raw_response.generate(
    model=os.environ["MODEL"],
    prompt="A lighthouse",
    quality="low",
    size="1024x1024",
    extra_headers={"cache-control": "no-cache"},
)
pictures = answer.parse().data or []
said = {
    "version": openai.__version__,
    "b64": pictures[0].b64_json,
    "cache": answer.headers["x-cache"],
    "attempts": 1 + answer.retries_taken,
}
json.dump(said, sys.stdout)
