"""``CachedMeta`` as JSON: the one form in which every store outside this process writes it.

Fields that a later version added are ignored, fields that it dropped take their defaults; only a
change of meaning raises the version, and an entry of another version is a miss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from json.encoder import c_make_encoder as make_encoder  # type: ignore[attr-defined]
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from gateway.domain.call import SvgUsage, Usage
from gateway.ports import CachedMeta, Form

VERSION = 1
# What ``JSONEncoder.encode`` makes anew for each text.
_pieces = make_encoder(None, json.JSONEncoder().default, quoted, None, ":", ",", False, False, True)


def encode(meta: CachedMeta, extra: Mapping[str, int | float | str]) -> bytes:
    """JSON in UTF-8: ``{"v": 1, "meta": {...}, **extra}``. ``extra`` is the store's own."""
    usage = meta.usage
    tokens = {
        "text_in": usage.text_in,
        "image_in": usage.image_in,
        "cached_text_in": usage.cached_text_in,
        "cached_image_in": usage.cached_image_in,
        "text_out": usage.text_out,
        "image_out": usage.image_out,
        "svg": None
        if usage.svg is None
        else {
            "model": usage.svg.model,
            "input_tokens": usage.svg.input_tokens,
            "output_tokens": usage.svg.output_tokens,
        },
    }
    fields = {
        "stored_at": meta.stored_at.astimezone(UTC).isoformat(),
        "cost": meta.cost,
        "images": meta.images,
        "model_served": meta.model_served,
        "upstream": meta.upstream,
        "size_bytes": meta.size_bytes,
        "streamable": meta.streamable,
        "usage": tokens,
        "size": meta.size,
        "quality": meta.quality,
        "price_id": meta.price_id,
        "team": meta.team,
        "operation": meta.operation,
        "status": meta.status,
        "form": meta.form.value,
        "headers": meta.headers,
        "same_as": meta.same_as,
    }
    return "".join(_pieces({**extra, "v": VERSION, "meta": fields}, 0)).encode("ascii")


def decode(data: bytes) -> tuple[CachedMeta, Mapping[str, Any]]:
    """The answer's meta and the whole document, for the store's own fields.

    Raises ``ValueError`` for anything that is not an entry of this version.
    """
    try:
        document = json.loads(data)
        if document["v"] != VERSION:
            raise ValueError(f"a cache entry of version {document['v']!r}")
        return _meta(document["meta"]), document
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("not a cache entry") from error


def _meta(fields: Mapping[str, Any]) -> CachedMeta:
    stored_at = datetime.fromisoformat(fields["stored_at"])
    if stored_at.tzinfo is None:
        raise ValueError("a cache entry's date without its zone")
    return CachedMeta(
        stored_at=stored_at.astimezone(UTC),
        cost=int(fields["cost"]),
        images=int(fields["images"]),
        model_served=str(fields["model_served"]),
        upstream=str(fields["upstream"]),
        size_bytes=int(fields["size_bytes"]),
        streamable=bool(fields.get("streamable", False)),
        usage=_usage(fields.get("usage") or {}),
        size=str(fields.get("size", "")),
        quality=str(fields.get("quality", "")),
        price_id=str(fields.get("price_id", "")),
        team=str(fields.get("team", "")),
        operation=str(fields.get("operation", "")),
        status=int(fields.get("status", 200)),
        form=Form(fields.get("form", Form.JSON)),
        headers=tuple((str(name), str(value)) for name, value in fields.get("headers", ())),
        same_as=str(fields.get("same_as", "")),
    )


def _usage(fields: Mapping[str, Any]) -> Usage:
    svg = fields.get("svg")
    return Usage(
        text_in=int(fields.get("text_in", 0)),
        image_in=int(fields.get("image_in", 0)),
        cached_text_in=int(fields.get("cached_text_in", 0)),
        cached_image_in=int(fields.get("cached_image_in", 0)),
        text_out=int(fields.get("text_out", 0)),
        image_out=int(fields.get("image_out", 0)),
        svg=None
        if svg is None
        else SvgUsage(str(svg["model"]), int(svg["input_tokens"]), int(svg["output_tokens"])),
    )
