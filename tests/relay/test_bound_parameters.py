"""Every parameter of contract 1.2 and 2.1, and what it does to the bound (money.md 7, rule 1).

One row each: a parameter that is read but stands in no row here fails the first test. So a new one
is either priced or treated as unknown, never passed by.
"""

from __future__ import annotations

import base64
import io
import json
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gateway.domain.call import Operation
from gateway.domain.price import Bound, Confidence, PriceBook, PriceList, PriceRow
from gateway.domain.price_tokens import TokenPrice
from gateway.pricefile import load_prices
from gateway.relay.inputs import PICTURE_ROLES
from gateway.relay.read import KNOWN, ReadRules, reader_for

MODEL = "gpt-image-2.5-flare"
AUTHOR = PriceRow(
    "openai", "gpt-6", date(2026, 1, 1), "a test",
    TokenPrice(text_in=1_000, text_out=8_000, max_output_tokens=100_000),
)  # fmt: skip
BOOK = PriceBook(load_prices(Path(__file__).parents[2] / "config" / "prices.yaml").rows)
LIST = BOOK.of("openai", "openai", date(2026, 11, 22))
PRICES = PriceList({**LIST.rows, "gpt-6": AUTHOR})


class Effect(Enum):
    NONE = "costs nothing: the bound and its confidence stay"
    PRICED = "is a factor or a term of the bound, and sure"
    GUESSED = "is a factor or a term of the bound; what it costs is not published"
    DOUBTED = "costs nothing as far as is known, which nobody has published"
    WORST = "is not known: the model's worst case"


BASE: dict[str, Any] = {"model": MODEL, "prompt": "p", "size": "1024x1024", "quality": "low"}
ONE, TEXT, WORST = 196 * 30_000, 33 * 5_000, 23_719 * 30_000

TABLE: list[tuple[str, dict[str, Any], Effect, int]] = [
    # What is sent beside the base, and the nano-dollars that it must be held at.
    ("prompt", {"prompt": "é" * 10}, Effect.PRICED, ONE + 52 * 5_000),
    ("n", {"n": 10}, Effect.PRICED, 10 * ONE + TEXT),
    ("size", {"size": "1536x1024"}, Effect.PRICED, 158 * 30_000 + TEXT),
    ("size", {"size": "auto"}, Effect.PRICED, 659 * 30_000 + TEXT),
    ("size", {"size": "8K"}, Effect.WORST, WORST + TEXT),
    ("quality", {"quality": "xhigh"}, Effect.PRICED, 3122 * 30_000 + TEXT),
    ("quality", {"quality": "max"}, Effect.PRICED, 7024 * 30_000 + TEXT),
    ("quality", {"quality": "auto"}, Effect.PRICED, 7024 * 30_000 + TEXT),
    ("quality", {"quality": "hd"}, Effect.PRICED, 1756 * 30_000 + TEXT),
    ("quality", {"quality": "ultra"}, Effect.WORST, WORST + TEXT),
    ("complexity", {"complexity": "high"}, Effect.DOUBTED, ONE + TEXT),
    ("background", {"background": "transparent"}, Effect.NONE, ONE + TEXT),
    ("moderation", {"moderation": "low"}, Effect.NONE, ONE + TEXT),
    ("output_format", {"output_format": "webp"}, Effect.NONE, ONE + TEXT),
    ("output_format", {"output_format": "jpeg"}, Effect.NONE, ONE + TEXT),
    ("output_format", {"output_format": "gif"}, Effect.GUESSED, 9 * ONE + TEXT),
    ("output_format", {"output_format": "avif"}, Effect.WORST, 9 * WORST + TEXT),
    ("output_compression", {"output_compression": 50}, Effect.NONE, ONE + TEXT),
    ("frame_count", {"output_format": "gif", "frame_count": 2}, Effect.GUESSED, 2 * ONE + TEXT),
    ("frame_count", {"output_format": "gif", "frame_count": 16}, Effect.GUESSED, 16 * ONE + TEXT),
    ("frame_count", {"frame_count": 16}, Effect.NONE, ONE + TEXT),
    ("frame_duration_ms", {"frame_duration_ms": 90}, Effect.NONE, ONE + TEXT),
    (
        "svg",
        {"output_format": "svg", "svg": {"model": "gpt-6"}},
        Effect.GUESSED,
        ONE + TEXT + 100_000 * 8_000 + 33 * 1_000,
    ),
    ("svg", {"svg": {"model": "gpt-6"}}, Effect.DOUBTED, ONE + TEXT),
    ("stream", {"stream": True}, Effect.NONE, ONE + TEXT),
    (
        "partial_images",
        {"stream": True, "partial_images": 3, "n": 2},
        Effect.PRICED,
        2 * (ONE + 300 * 30_000) + TEXT,
    ),
    ("safety_identifier", {"safety_identifier": "u"}, Effect.NONE, ONE + TEXT),
    ("user", {"user": "u"}, Effect.NONE, ONE + TEXT),
    ("response_format", {"response_format": "b64_json"}, Effect.NONE, ONE + TEXT),
    ("style", {"style": "vivid"}, Effect.NONE, ONE + TEXT),
    ("input_fidelity", {"input_fidelity": "high"}, Effect.NONE, ONE + TEXT),
    ("turbo", {"turbo": True}, Effect.WORST, WORST + TEXT),
]


def held(body: dict[str, Any], operation: Operation = Operation.GENERATION) -> Bound:
    text = json.dumps(body).encode()
    reader = reader_for(operation, "application/json", None, len(text), ReadRules())
    reader.feed(text)
    row = PRICES.find(body["model"])
    assert row is not None
    return row.price.bound(reader.close(), PRICES)


def test_every_parameter_that_is_known_has_a_row() -> None:
    assert {name for name, *_ in TABLE} - {"turbo"} == KNOWN - {"model"}
    assert sorted(PICTURE_ROLES) == ["image", "markup", "mask"]


@pytest.mark.parametrize(
    ("more", "effect", "amount"),
    [row[1:] for row in TABLE],
    ids=[f"{name} {json.dumps(more)}" for name, more, *_ in TABLE],
)
def test_what_a_parameter_does_to_the_bound(
    more: dict[str, Any], effect: Effect, amount: int
) -> None:
    plain = held(BASE)
    assert plain == Bound(ONE + TEXT, Confidence.HARD)
    bound = held({**BASE, **more})
    assert bound.amount == amount
    sure = effect in (Effect.NONE, Effect.PRICED)
    assert (bound.confidence is Confidence.HARD) is sure
    assert (bound.amount == plain.amount) is (effect in (Effect.NONE, Effect.DOUBTED))


def data_url(width: int, height: int) -> dict[str, str]:
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, "PNG")
    return {"image_url": "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()}


@pytest.mark.parametrize(
    ("more", "pictures"),
    [
        ({}, 1),
        ({"mask": data_url(64, 64)}, 2),
        ({"markup": data_url(64, 64)}, 2),
        ({"images": [data_url(64, 64)] * 16}, 16),
    ],
)
def test_each_picture_of_an_edit_is_held(more: dict[str, Any], pictures: int) -> None:
    edit = {**BASE, "images": [data_url(1536, 1024)], **more}
    bound = held(edit, Operation.EDIT)
    assert bound == Bound(ONE + TEXT + pictures * 6_500 * 8_000, Confidence.SOFT)
    # 1.x by its pixels: two tiles of the wide one, one of any other.
    tiles = [323] if "images" not in more else []
    tiles += [194] * (pictures - len(tiles))
    old = held({**edit, "model": "gpt-image-1"}, Operation.EDIT)
    assert old.amount == 272 * 40_000 + TEXT + sum(tiles) * 10_000
    # A mask is square, so the constant of its high fidelity is the smaller.
    high = held({**edit, "model": "gpt-image-1", "input_fidelity": "high"}, Operation.EDIT)
    wide = 1 if "images" not in more else 0
    more_tokens = wide * 6240 + (pictures - wide) * 4160
    assert high.amount - old.amount == more_tokens * 10_000
