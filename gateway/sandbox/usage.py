"""The bill: tokens of an order, as OpenAI counts them (contract 5.2 and 5.3; money.md 7).

Three things are not published and chosen here so that they stay within the gateway's bound:
gpt-image-2.6 counts as 2.5 with low and medium as high (a relay measured three to four times 2.5's
low); a GIF costs its frames; an SVG's author writes one token for four characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gateway.domain.call import Json
from gateway.domain.tokens import image_tokens, tile_tokens
from gateway.sandbox.models import Family
from gateway.sandbox.pictures import Given
from gateway.sandbox.validate import Order

TOKENS_PER_PARTIAL = 100
TOKENS_PER_INPUT = 1457
"""Of one picture given to a 2.x model: the only count ever seen (contract 1.3)."""

AXES: Mapping[Family, Mapping[str, int]] = MappingProxyType(
    {
        Family.TWO: {"low": 16, "medium": 48, "high": 96},
        Family.TWO_FIVE: {"low": 16, "medium": 24, "high": 48, "xhigh": 64, "max": 96},
        Family.TWO_SIX: {"low": 48, "medium": 48, "high": 48, "xhigh": 64, "max": 96},
    }
)
"""Tokens along the longer edge. The sandbox keeps its own copy: an upstream's bill that came from
the gateway's price book could never disagree with it."""

FIXED: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "low": {"1024x1024": 272, "1024x1536": 408, "1536x1024": 400},
        "medium": {"1024x1024": 1056, "1024x1536": 1584, "1536x1024": 1568},
        "high": {"1024x1024": 4160, "1024x1536": 6240, "1536x1024": 6208},
    }
)
REASONING: Mapping[str, int] = MappingProxyType(
    {"none": 0, "minimal": 64, "low": 128, "medium": 256, "high": 512, "xhigh": 1024, "max": 2048}
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What was used, in tokens."""

    text_in: int
    image_in: int
    image_out: int

    def as_json(self, output_details: bool) -> dict[str, Json]:
        """The ``usage`` object, its keys in OpenAI's order. 1-mini's answers and the events of
        streams carry no details of the output (contract 1.3, 1.4)."""
        usage: dict[str, Json] = {
            "input_tokens": self.text_in + self.image_in,
            "input_tokens_details": {
                "image_tokens": self.image_in,
                "text_tokens": self.text_in,
            },
            "output_tokens": self.image_out,
        }
        if output_details:
            usage["output_tokens_details"] = {"image_tokens": self.image_out, "text_tokens": 0}
        usage["total_tokens"] = self.text_in + self.image_in + self.image_out
        return usage


def text_tokens(text: str) -> int:
    """One for four bytes of UTF-8, at least one."""
    return max(1, -(-len(text.encode()) // 4))


def picture_tokens(order: Order) -> int:
    """Output tokens of one picture, without partial ones."""
    if order.model.family is Family.ONE:
        return FIXED[order.quality][order.size]
    axis = AXES[order.model.family][order.quality]
    return image_tokens(axis, order.width, order.height) * order.frame_count


def input_tokens(order: Order) -> int:
    """Of the pictures given; a mask or markup is not counted."""
    if order.model.family is not Family.ONE:
        return TOKENS_PER_INPUT * len(order.images)
    return sum(_tiles(order, given) for given in order.images)


def tokens(order: Order, pictures: int, partials: int) -> Tokens:
    """Of a whole order: so many pictures made, so many partial ones sent on the way."""
    made = pictures * picture_tokens(order) + TOKENS_PER_PARTIAL * partials
    return Tokens(text_tokens(order.prompt), input_tokens(order), made)


def svg_usage(order: Order, svg: str) -> dict[str, Json]:
    """The author model's bill. Its reasoning is a part of its output."""
    given, reasoning = text_tokens(order.prompt), REASONING[order.svg_effort]
    written = text_tokens(svg) + reasoning
    return {
        "input_tokens": given,
        "model": order.svg_model,
        "output_tokens": written,
        "reasoning_tokens": reasoning,
        "total_tokens": given + written,
    }


def _tiles(order: Order, given: Given) -> int:
    low = tile_tokens(given.width, given.height)
    if order.input_fidelity == "low":
        return low
    return low + (4160 if given.width == given.height else 6240)
