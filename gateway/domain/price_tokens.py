"""A price per token: OpenAI's GPT image models, and the text models that write SVG.

The bound is money.md 7::

    n x frames x (output tokens + 100 x partial_images) x image_out
      + (prompt's UTF-8 bytes + 32) x text_in
      + input tokens of every picture that came (masks and markup too) x image_in
      [ x margin ]
      [ + the SVG author's max_output_tokens x its text_out + (the prompt + 32) x its text_in ]

A rate that is not published is never zero. Cached input without a rate costs as uncached. Text
output without a rate (gpt-image-2 and later: none was ever seen in an answer) costs as image
output: third parties name a third of that, but with the wrong guess a team pays $0.00002 a token
too much, which a correction gives back, while the other wrong guess spends past a hard budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt

from gateway.domain.call import Call, InputImage, SvgUsage
from gateway.domain.money import Money
from gateway.domain.price import (
    FORMATS,
    OLD_QUALITIES,
    OPEN,
    Answer,
    Bound,
    BySize,
    CannotPrice,
    Confidence,
    PriceList,
    parse_size,
)
from gateway.domain.tokens import TILE_PIXELS, image_tokens, tile_tokens

PARTIAL_IMAGE_TOKENS = 100
"""Output tokens of one partial image (contract 1.4)."""

BYTES_PER_TOKEN = 4
"""Of English, about; only for what is likely, never for a bound."""
DOUBTFUL = ("svg", "complexity")
"""Parameters whose effect on the output tokens is not published."""
STILL = frozenset({"png", "webp", "jpeg"})

WRAPPING_TOKENS = 32
"""Text tokens around a prompt. No tokeniser makes more tokens than bytes, but a provider may put a
prompt between marks of its own (roles, an instruction), and how many is published nowhere: the
bytes alone would be too few for a prompt of two letters. $0.00016 at $5 a million."""

SIZE_STEP = 16
"""Pixels: both edges of a size of gpt-image-2 and later are multiples of it (contract 1.2)."""

MAX_SCALED_EDGE = 2048
"""Pixels: input pictures are first scaled down into a square of this."""


@dataclass(frozen=True, slots=True)
class ByAxis:
    """Output tokens by the formula of gpt-image-2 and later (contract 5.3).

    ``axes`` is quality -> tokens along the longer edge. The limits are those of the model's
    sizes, in pixels; ``max_ratio`` is the longer edge over the shorter.
    """

    axes: Mapping[str, int]
    min_pixels: int
    max_pixels: int
    max_edge: int
    max_ratio: int

    def most(self, size: str, quality: str) -> tuple[int, bool]:
        """Tokens of one picture, and whether they are sure; as ``BySize.most``.

        A size beyond the limits will be refused upstream: it is held as the worst legal one.
        """
        axis = self.axes.get(quality) or self.axes.get(OLD_QUALITIES.get(quality, ""))
        if quality in OPEN:
            axis = max(self.axes.values())
        pixels = parse_size(size)
        if axis is None or (pixels is None and size not in OPEN):
            return self.largest, False
        if pixels is None:
            return self._worst(axis), True
        width, height = pixels
        longer, shorter = max(pixels), min(pixels)
        beyond = (
            longer > self.max_edge
            or width * height > self.max_pixels
            or longer > self.max_ratio * shorter
        )
        if beyond:
            return self._worst(axis), False
        return image_tokens(axis, width, height), width * height >= self.min_pixels

    def knows(self, size: str, quality: str) -> bool:
        """Whether the model draws such pictures, at a sure price."""
        pixels = parse_size(size)
        fits = pixels is None or not any(edge % SIZE_STEP for edge in pixels)
        return fits and self.most(size, quality)[1]

    @property
    def largest(self) -> int:
        return self._worst(max(self.axes.values()))

    def _worst(self, axis: int) -> int:
        # The formula grows with the area and with the nearness to a square: no legal size is
        # above the square of the largest area (2880x2880 by OpenAI's limits).
        edge = isqrt(min(self.max_pixels, self.max_edge**2) - 1) + 1
        return image_tokens(axis, edge, edge)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Input tokens of one picture given to gpt-image-1.x: 65 and 129 a tile, and a constant at
    high fidelity, which is smaller for a square."""

    high_square: int
    high_other: int

    def of(self, image: InputImage, fidelity: str) -> int:
        """Tokens. Unknown pixels are held as four tiles, the most that scaling leaves."""
        longer = max(image.width, image.height)
        shorter = min(image.width, image.height)
        if shorter < 1:
            longer, shorter = MAX_SCALED_EDGE, TILE_PIXELS
        elif shorter > TILE_PIXELS:
            # Scaled down until the shorter edge is one tile.
            longer, shorter = -(-longer * TILE_PIXELS // shorter), TILE_PIXELS
        tokens = tile_tokens(min(longer, MAX_SCALED_EDGE), shorter)
        if fidelity == "low":
            return tokens
        square = 0 < image.width == image.height
        return tokens + (self.high_square if square else self.high_other)


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """Rates in nano-dollars a token ($30 per million is 30_000); None is not published.

    ``output`` says how many output tokens a picture is; None is a model that draws none.
    ``input_image`` is the tokens of one picture that came with a request. ``margin_percent``
    multiplies the whole bound (100: as computed) of a model whose rule is not confirmed, and
    ``soft`` says that its bound may be passed. ``max_output_tokens`` is the most that a text
    model writes: with it, its row can be the author of an SVG.
    """

    text_in: Money
    image_in: Money | None = None
    text_out: Money | None = None
    image_out: Money | None = None
    cached_text_in: Money | None = None
    cached_image_in: Money | None = None
    output: BySize | ByAxis | None = None
    input_image: int | Tiles | None = None
    margin_percent: int = 100
    soft: bool = False
    max_output_tokens: int | None = None

    def bound(self, call: Call, prices: PriceList) -> Bound:
        """The most ``call`` can cost. SOFT with input pictures, GIF, SVG, ``svg`` for another
        format (the upstream's to refuse), ``complexity`` (that planning is free, only third
        parties say), and whatever is not known of the model or in the call. Raises
        ``CannotPrice``."""
        if self.output is None or self.image_out is None:
            raise CannotPrice(
                f"The price of {call.model} says nothing of pictures: "
                "add output_tokens to its row, or ask for an image model.",
                "model",
            )
        if call.n < 1 or call.frame_count < 1:
            raise CannotPrice("Less than one picture has no price.", "n")
        tokens, sure = self.output.most(call.size, call.quality)
        if call.unknown or call.output_format not in FORMATS:
            tokens, sure = self.output.largest, False
        drawn = call.n * call.frame_count * (tokens + PARTIAL_IMAGE_TOKENS * call.partial_images)
        amount = drawn * self.image_out + _prompt_tokens(call) * self.text_in + self._inputs(call)
        amount = -(-amount * self.margin_percent // 100)
        if call.output_format == "svg":
            amount += call.n * _author_bound(call, prices)
        guessed = bool(call.inputs) or call.output_format in {"gif", "svg"}
        doubtful = not call.parameters.keys().isdisjoint(DOUBTFUL)
        soft = self.soft or guessed or doubtful or not sure
        return Bound(amount, Confidence.SOFT if soft else Confidence.HARD)

    def likely(self, call: Call, prices: PriceList) -> Money | None:
        """By the formula, without margin, and a token for every four bytes of the prompt. Input
        pictures are as in the bound. None for what the provider chooses, and for GIF and SVG."""
        open_ended = call.size in OPEN or call.quality in OPEN or call.output_format not in STILL
        doubtful = call.unknown or not call.parameters.keys().isdisjoint(DOUBTFUL)
        if open_ended or doubtful or self.output is None or self.image_out is None:
            return None
        tokens, sure = self.output.most(call.size, call.quality)
        if not sure:
            return None
        drawn = call.n * (tokens + PARTIAL_IMAGE_TOKENS * call.partial_images)
        text = -(-call.prompt_bytes // BYTES_PER_TOKEN)
        return drawn * self.image_out + text * self.text_in + self._inputs(call)

    def cost(self, answer: Answer, prices: PriceList) -> Money | None:
        """By the tokens of ``answer.usage``. None without usage, for tokens of a kind that has
        no rate, for an SVG that does not say what its author used, and for an author without a
        row: the caller books the bound, never a part of the bill."""
        usage = answer.usage
        if usage is None or (answer.output_format == "svg" and usage.svg is None):
            return None
        billed = (
            (usage.text_in - usage.cached_text_in, self.text_in),
            (usage.cached_text_in, _or(self.cached_text_in, self.text_in)),
            (usage.image_in - usage.cached_image_in, self.image_in),
            (usage.cached_image_in, _or(self.cached_image_in, self.image_in)),
            (usage.text_out, _or(self.text_out, self.image_out)),
            (usage.image_out, self.image_out),
        )
        total = 0
        for tokens, rate in billed:
            if tokens and rate is None:
                return None
            total += tokens * (rate or 0)
        if usage.svg is None:
            return total
        author = _author_cost(usage.svg, prices)
        return None if author is None else total + author

    def knows(self, size: str, quality: str) -> bool:
        """Whether the model draws such pictures, at a sure number of tokens."""
        if isinstance(self.output, ByAxis):
            return self.output.knows(size, quality)
        return self.output is not None and self.output.most(size, quality)[1]

    def _inputs(self, call: Call) -> Money:
        """Of the pictures that came with the request, in nano-dollars."""
        if not call.inputs:
            return 0
        if self.image_in is None or self.input_image is None:
            raise CannotPrice(
                f"The price of {call.model} does not say what an input picture costs: "
                "add image_in and input_image_tokens to its row.",
                "image",
            )
        fidelity = str(call.parameters.get("input_fidelity", "low"))
        if call.unknown:
            fidelity = "high"
        rule = self.input_image
        tokens = (rule if isinstance(rule, int) else rule.of(one, fidelity) for one in call.inputs)
        return sum(tokens) * self.image_in


def _or(rate: Money | None, other: Money | None) -> Money | None:
    return other if rate is None else rate


def _prompt_tokens(call: Call) -> int:
    """The most text tokens that a prompt can be."""
    return call.prompt_bytes + WRAPPING_TOKENS


def _author_bound(call: Call, prices: PriceList) -> Money:
    """The most that the text model behind one SVG can cost."""
    svg = call.parameters.get("svg")
    model = svg.get("model") if isinstance(svg, dict) else None
    if not isinstance(model, str) or not model:
        raise CannotPrice(
            "An SVG is written by a second model with a bill of its own: name it in svg.model.",
            "svg.model",
        )
    row = prices.find(model)
    price = row.price if row else None
    if (
        not isinstance(price, TokenPrice)
        or price.text_out is None
        or price.max_output_tokens is None
    ):
        raise CannotPrice(
            f"There is no price for {model} as the author of an SVG: "
            "add a row with text_in, text_out and max_output_tokens.",
            "svg.model",
        )
    return price.max_output_tokens * price.text_out + _prompt_tokens(call) * price.text_in


def _author_cost(used: SvgUsage, prices: PriceList) -> Money | None:
    row = prices.find(used.model)
    price = row.price if row else None
    if not isinstance(price, TokenPrice) or price.text_out is None:
        return None
    return used.input_tokens * price.text_in + used.output_tokens * price.text_out
