"""POST /v1/moderations and /v1/content_provenance_checks (contract 3): free, and without state."""

from __future__ import annotations

import asyncio
import io
import json
import secrets
from datetime import UTC, datetime

from PIL import Image

from gateway.domain.call import Json
from gateway.sandbox.draw import MADE_BY, MARK
from gateway.sandbox.exchange import JSON, MULTIPART, Exchange
from gateway.sandbox.forms import picture
from gateway.sandbox.pictures import check_picture
from gateway.sandbox.refusals import (
    bad_value,
    missing,
    unknown,
    wrong_type,
)
from gateway.sandbox.validate import the_file

MODERATORS = ("omni-moderation-latest", "omni-moderation-2024-09-26")
CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
SEEN_TOO = frozenset(
    {"self-harm", "self-harm/instructions", "self-harm/intent", "sexual", "violence"}
    | {"violence/graphic"}
)
"""Those that are also judged of pictures."""
BAD_WORDS = ("moderationtest", "forbidden-by-sandbox", "kill")


async def moderate(exchange: Exchange, body: bytes, name: str) -> None:
    form, trouble = await exchange.form(body, JSON)
    fields = form.fields
    model, said = fields.get("model"), fields.get("input")
    text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    if await exchange.met(model if isinstance(model, str) else "", text):
        return
    if trouble is not None:
        raise trouble
    extra = next((field for field in fields if field not in ("model", "input")), None)
    if extra is not None:
        raise unknown(extra)
    if said is None:
        raise missing("input")
    if model is None:
        model = MODERATORS[0]
    if not isinstance(model, str) or model not in MODERATORS:
        raise bad_value("model", model, MODERATORS)
    results: list[Json] = [_judged(words, seen) for words, seen in _inputs(said)]
    answer: dict[str, Json] = {
        "id": f"modr-{secrets.token_hex(16)}",
        "model": model,
        "results": results,
    }
    await exchange.whole(exchange.dump(answer))


def _inputs(said: Json) -> list[tuple[str, bool]]:
    """What is judged: texts one by one, or the parts of one message together, and whether it
    shows a picture."""
    if isinstance(said, str):
        return [(said, False)]
    if not isinstance(said, list) or not said:
        raise wrong_type("input", "one of a string or an array", said)
    if all(isinstance(one, str) for one in said):
        return [(str(one), False) for one in said]
    texts, seen = [], False
    for place, part in enumerate(said):
        name = f"input[{place}]"
        if not isinstance(part, dict):
            raise wrong_type(name, "an object", part)
        match part.get("type"):
            case "text" if isinstance(part.get("text"), str):
                texts.append(str(part["text"]))
            case "text":
                raise missing(f"{name}.text")
            case "image_url":
                _shown(f"{name}.image_url", part.get("image_url"))
                seen = True
            case other:
                raise bad_value(f"{name}.type", other, ("text", "image_url"))
    return [("\n".join(texts), seen)]


def _shown(name: str, holder: Json) -> None:
    """A picture of the input: a data URL, since the sandbox fetches nothing."""
    if not isinstance(holder, dict):
        raise wrong_type(name, "an object", holder)
    if not isinstance(holder.get("url"), str):
        raise missing(f"{name}.url")
    held: dict[str, Json] = {"image_url": holder["url"]}
    found = picture(name, held, lambda _: None)
    check_picture(name, held, {found.part.field} if found is not None else set())


def _judged(text: str, seen: bool) -> dict[str, Json]:
    """Violence for a handful of words, nothing for any other."""
    bad = any(word in text.lower() for word in BAD_WORDS)
    flags: dict[str, Json] = {category: bad and category == "violence" for category in CATEGORIES}
    scores: dict[str, Json] = {
        category: 0.98 if flags[category] else 0.0001 for category in CATEGORIES
    }
    judged: dict[str, Json] = {
        category: [
            *(["text"] if text else []),
            *(["image"] if seen and category in SEEN_TOO else []),
        ]
        for category in CATEGORIES
    }
    return {
        "flagged": bad,
        "categories": flags,
        "category_scores": scores,
        "category_applied_input_types": judged,
    }


async def check_provenance(exchange: Exchange, body: bytes, name: str) -> None:
    """Knows the sandbox's own pictures by their metadata."""
    form, trouble = await exchange.form(body, MULTIPART)
    if await exchange.met():
        return
    if trouble is not None:
        raise trouble
    for field in form.fields:
        raise (
            wrong_type("file", "a file", form.fields[field]) if field == "file" else unknown(field)
        )
    content = the_file(form).content
    model = await asyncio.to_thread(_maker, content)
    at = datetime.fromtimestamp(exchange.created, UTC).isoformat() if model is not None else None
    outcome = "detected" if model is not None else "not_detected"
    results: list[Json] = [
        {
            "type": "c2pa",
            "outcome": outcome,
            "validation_state": "trusted" if model is not None else "not_present",
            "issuer": "OpenAI" if model is not None else None,
            "model": model,
            "generated_at": at,
        },
        {"type": "synthid", "outcome": outcome, "model": model, "generated_at": at},
    ]
    await exchange.whole(
        exchange.dump(
            {
                "object": "content_provenance_check",
                "created_at": exchange.created,
                "results": results,
            }
        )
    )


def _maker(content: bytes) -> str | None:
    """The model that drew a picture, by what draw.py wrote into it; None for any other file."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as opened:
            said = opened.info.get(MADE_BY) or opened.info.get("comment")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    text = said.decode("latin-1") if isinstance(said, bytes) else said
    return text.removeprefix(MARK) if isinstance(text, str) and text.startswith(MARK) else None
