"""The bound against the published formula and tables, over a grid of what may be asked (T18).

Tokens are computed here a second time, from the text of contract 5.2 and 5.3, and dollars from 5.1:
nothing is imported from ``gateway.domain.tokens``, and no rate is read from ``config/prices.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import date
from fractions import Fraction
from itertools import product
from math import ceil, floor
from pathlib import Path

import pytest

from gateway.domain.call import Call, Encoding, InputImage, Operation, Usage
from gateway.domain.charge import Ending, Quote, charge
from gateway.domain.ledger import Outcome
from gateway.domain.price import Answer, Bound, Confidence, PriceBook, PriceRow
from gateway.domain.price_tokens import TokenPrice
from gateway.pricefile import load_prices

ROWS = load_prices(Path(__file__).parents[2] / "config" / "prices.yaml").rows
DAY = date(2026, 11, 22)
LIST = PriceBook(ROWS).of("openai", "openai", DAY)
PROMPT_BYTES = 40
N = range(1, 11)
PARTIALS = range(4)


@dataclass(frozen=True)
class Family:
    """What contract 5 says of some models. Rates are dollars a million tokens, which is thousands
    of nano-dollars a token; ``pictures`` are dollars a picture times 10,000."""

    text_in: int = 0
    image_out: int = 0
    axes: dict[str, int] = field(default_factory=dict)
    table: dict[str, dict[str, int]] = field(default_factory=dict)
    pictures: dict[str, dict[str, int]] = field(default_factory=dict)
    soft: bool = False

    @property
    def qualities(self) -> list[str]:
        if self.axes:
            return list(self.axes)
        rows = self.table or self.pictures
        return list(next(iter(rows.values())))

    @property
    def sizes(self) -> list[str]:
        return LEGAL if self.axes else list(self.table or self.pictures)

    def tokens(self, size: str, quality: str) -> int:
        """Of one picture."""
        if self.table:
            return self.table[size][quality]
        width, height = map(int, size.split("x"))
        return published(self.axes[quality], width, height)

    def cost(self, size: str, quality: str, n: int, partials: int) -> int:
        """Nano-dollars of an answer without its prompt."""
        if self.pictures:
            return n * self.pictures[size][quality] * 100_000
        return n * (self.tokens(size, quality) + 100 * partials) * self.image_out * 1000


def published(axis: int, width: int, height: int) -> int:
    """Contract 5.3 in fractions: round(axis x S / L), halves up; then up to a whole token."""
    longer, shorter = max(width, height), min(width, height)
    across = floor(Fraction(axis * shorter, longer) + Fraction(1, 2))
    return ceil(Fraction(axis * across * (2_000_000 + width * height), 4_000_000))


TABLE_1X = {
    "1024x1024": {"low": 272, "medium": 1056, "high": 4160},
    "1024x1536": {"low": 408, "medium": 1584, "high": 6240},
    "1536x1024": {"low": 400, "medium": 1568, "high": 6208},
}
TWO = {"low": 16, "medium": 48, "high": 96}
TWO_FIVE = {"low": 16, "medium": 24, "high": 48, "xhigh": 64, "max": 96}
# Not confirmed: what one relay saw, in 2.5's axes (contract 5.3).
TWO_SIX = {"low": 48, "medium": 48, "high": 48, "xhigh": 64, "max": 96}
GENERATION_2 = Family(5, 30)
FAMILIES = {
    "gpt-image-2.6-sunburst": replace(GENERATION_2, axes=TWO_SIX, soft=True),
    "gpt-image-2.6-flare": replace(GENERATION_2, axes=TWO_SIX, soft=True),
    "gpt-image-2.5-sunburst": replace(GENERATION_2, axes=TWO_FIVE),
    "gpt-image-2.5-flare": replace(GENERATION_2, axes=TWO_FIVE),
    "gpt-image-2.5-sunburst-2026-09-08": replace(GENERATION_2, axes=TWO_FIVE),
    "gpt-image-2.5-flare-2026-09-08": replace(GENERATION_2, axes=TWO_FIVE),
    "gpt-image-2": replace(GENERATION_2, axes=TWO),
    "gpt-image-2-2026-04-21": replace(GENERATION_2, axes=TWO),
    "gpt-image-1.5": Family(5, 32, table=TABLE_1X, soft=True),
    "gpt-image-1.5-2025-12-16": Family(5, 32, table=TABLE_1X, soft=True),
    "chatgpt-image-latest": Family(5, 32, table=TABLE_1X, soft=True),
    "gpt-image-1-mini": Family(2, 8, table=TABLE_1X, soft=True),
    "gpt-image-1": Family(5, 40, table=TABLE_1X),
    "dall-e-3": Family(
        pictures={
            "1024x1024": {"standard": 400, "hd": 800},
            "1024x1792": {"standard": 800, "hd": 1200},
            "1792x1024": {"standard": 800, "hd": 1200},
        }
    ),
    "dall-e-2": Family(
        pictures={"256x256": {"": 160}, "512x512": {"": 180}, "1024x1024": {"": 200}}
    ),
}


def legal_sizes() -> Iterator[tuple[int, int]]:
    """Every size that contract 1.2 allows gpt-image-2 and later."""
    for width, height in product(range(16, 3841, 16), repeat=2):
        if 655_360 <= width * height <= 8_294_400 and max(width, height) <= 3 * min(width, height):
            yield width, height


ALL_LEGAL = list(legal_sizes())
EXTREMES = [
    *("2880x2880", "3840x2160", "2160x3840", "3840x1280", "1280x3840", "1024x1024", "1536x1024"),
    *("1024x1536", "1536x864", "2048x2048", "2560x1440", "1408x480", "480x1408", "1280x512"),
    *("640x1024", "1024x640", "2896x2864", "2864x2896", "816x816"),
]
LEGAL = list(dict.fromkeys([*EXTREMES, *(f"{w}x{h}" for w, h in ALL_LEGAL[::97])]))


def row_of(model: str) -> PriceRow:
    row = LIST.find(model)
    assert row is not None
    return row


def a_call(model: str, size: str, quality: str) -> Call:
    return Call(
        operation=Operation.GENERATION,
        encoding=Encoding.JSON,
        content_type="application/json",
        model=model,
        prompt_bytes=PROMPT_BYTES,
        parameters={},
        size=size,
        quality=quality,
    )


def bound(call: Call) -> Bound:
    return row_of(call.model).price.bound(call, LIST)


def quarter_more(model: str, amount: int) -> int:
    return -(-amount * 5 // 4) if "-2.6-" in model else amount


def test_the_grid_covers_every_model_of_the_list_and_the_extremes() -> None:
    drawing = {row.model for row in ROWS if row.price.knows("1024x1024", "auto")}
    assert drawing == FAMILIES.keys()
    assert len(LEGAL) >= 200
    assert {f"{w}x{h}" for w, h in ALL_LEGAL} >= set(LEGAL)
    pixels = [w * h for w, h in (map(int, size.split("x")) for size in LEGAL)]
    assert (min(pixels), max(pixels)) == (655_360, 8_294_400)


@pytest.mark.parametrize("model", FAMILIES)
def test_no_explicit_call_costs_more_than_its_bound(model: str) -> None:
    family = FAMILIES[model]
    # At most as many tokens as bytes, and 32 around them.
    text = (PROMPT_BYTES + 32) * family.text_in * 1000
    for size, quality in product(family.sizes, family.qualities):
        plain = a_call(model, size, quality)
        for n, partials in product(N, PARTIALS):
            call = replace(plain, n=n, partial_images=partials, stream=partials > 0)
            cost = family.cost(size, quality, n, partials if not family.pictures else 0)
            held = bound(call)
            assert cost + text <= held.amount, (size, quality, n, partials)
            exact = quarter_more(model, cost + text)
            assert held.amount == exact, (size, quality, n, partials)
            assert (held.confidence is Confidence.SOFT) is family.soft, (size, quality)


@pytest.mark.parametrize("model", FAMILIES)
def test_the_format_changes_nothing_but_frames_and_confidence(model: str) -> None:
    family = FAMILIES[model]
    frames = 1 if family.pictures else 9
    for size, quality in product(family.sizes[:20], family.qualities):
        call = replace(a_call(model, size, quality), n=3)
        for still in ("png", "webp", "jpeg"):
            assert bound(replace(call, output_format=still)) == bound(call)
        gif = bound(replace(call, output_format="gif", frame_count=9))
        text = (PROMPT_BYTES + 32) * family.text_in * 1000
        cost = family.cost(size, quality, 3, 0) * frames + text
        assert gif.amount == quarter_more(model, cost)
        soft = family.soft or not family.pictures
        assert (gif.confidence is Confidence.SOFT) is soft


@pytest.mark.parametrize("model", FAMILIES)
def test_what_is_left_open_is_held_at_the_dearest_legal_choice_and_not_above(model: str) -> None:
    family = FAMILIES[model]
    everywhere = [f"{w}x{h}" for w, h in ALL_LEGAL] if family.axes else family.sizes
    text = (PROMPT_BYTES + 32) * family.text_in * 1000
    dearest = {
        quality: max(family.cost(size, quality, 1, 0) for size in everywhere)
        for quality in family.qualities
    }
    for quality, most in dearest.items():
        held = bound(a_call(model, "auto", quality or "auto")).amount
        assert held == quarter_more(model, most + text)
    held = bound(a_call(model, "auto", "auto")).amount
    assert held == quarter_more(model, max(dearest.values()) + text)
    for size in family.sizes[:20]:
        most = max(family.cost(size, quality, 1, 0) for quality in family.qualities)
        assert bound(a_call(model, size, "auto")).amount == quarter_more(model, most + text)


def test_the_worst_picture_of_2_5_is_71_cents() -> None:
    # 23,719 tokens at 30 (money.md 7), and 72 of text at 5.
    assert bound(a_call("gpt-image-2.5-flare", "auto", "auto")).amount == 711_570_000 + 360_000


@pytest.mark.parametrize(
    ("longer", "tokens"),
    [(1024, 194), (1536, 323), (2049, 452), (3073, 581), (9000, 581), (0, 581)],
)
@pytest.mark.parametrize(("fidelity", "more"), [("low", 0), ("high", 6240)])
def test_input_pictures_of_1_x_by_their_real_size(
    longer: int, tokens: int, fidelity: str, more: int
) -> None:
    # 65 and 129 a tile of 512, after the shorter edge is scaled to one tile (money.md 7).
    picture = InputImage("image", "aa", 9, "image/png", longer, min(longer, 1024))
    square = 4160 if longer == 1024 and more else more
    call = a_call("gpt-image-1", "1024x1024", "low")
    edit = replace(call, inputs=(picture,) * 3, parameters={"input_fidelity": fidelity})
    assert bound(edit).amount - bound(call).amount == 3 * (tokens + square) * 10_000


@dataclass(frozen=True)
class Recorded:
    """A usage that somebody was billed, with what was asked for as far as it is known."""

    model: str
    size: str
    quality: str
    usage: Usage
    pictures: int = 0
    partials: int = 0


@pytest.mark.parametrize(
    "recorded",
    [
        # Contract 1.3: one reference picture, 17 tokens of text.
        Recorded(
            *("gpt-image-2.5-sunburst", "1536x1024", "high"),
            Usage(text_in=17, image_in=1457, image_out=1372),
            pictures=1,
        ),
        # Contract 1.4: 50 tokens of text; its partial pictures are inside or not sent.
        Recorded(
            "gpt-image-2.5-flare", "1024x1024", "high", Usage(text_in=50, image_out=1756), 0, 1
        ),
        # Contract 5.3: "real usages 196, 1372, 5930, 7024 match".
        Recorded("gpt-image-2", "1024x1024", "low", Usage(image_out=196)),
        Recorded("gpt-image-2", "1536x1024", "medium", Usage(image_out=1372)),
        Recorded("gpt-image-2", "2880x2880", "medium", Usage(image_out=5930)),
        Recorded("gpt-image-2", "1024x1024", "high", Usage(image_out=7024)),
        # Contract 5.3: what a relay measured of 2.6, and the most of flare with quality omitted.
        Recorded("gpt-image-2.6-sunburst", "1536x1024", "low", Usage(image_out=664)),
        Recorded("gpt-image-2.6-sunburst", "1536x1024", "high", Usage(image_out=1353)),
        Recorded("gpt-image-2.6-sunburst", "3840x2160", "high", Usage(image_out=3337)),
        Recorded("gpt-image-2.6-flare", "1024x1024", "auto", Usage(image_out=5800)),
    ],
    ids=lambda recorded: f"{recorded.model} {recorded.usage.image_out}",
)
def test_what_was_really_billed_is_within_the_bound(recorded: Recorded) -> None:
    row = row_of(recorded.model)
    assert isinstance(row.price, TokenPrice)
    picture = InputImage("image", "aa", 9, "image/png", 1024, 1024)
    call = replace(
        a_call(recorded.model, recorded.size, recorded.quality),
        inputs=(picture,) * recorded.pictures,
        partial_images=recorded.partials,
    )
    held = bound(call)
    answer = Answer(1, recorded.usage, input_images=recorded.pictures)
    settled = charge("r", Quote(held, LIST, row), Ending(Outcome.DELIVERED, answer))
    by_hand = (
        recorded.usage.text_in * 5_000
        + recorded.usage.image_in * 8_000
        + recorded.usage.image_out * 30_000
    )
    assert settled.cost == by_hand <= held.amount
    assert "over_bound" not in settled.flags
