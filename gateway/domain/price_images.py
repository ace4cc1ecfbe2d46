"""A price per picture delivered: relays, self-hosted models, DALL-E."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.domain.call import Call
from gateway.domain.money import Money
from gateway.domain.price import (
    FORMATS,
    OPEN,
    Answer,
    Bound,
    BySize,
    CannotPrice,
    Confidence,
    PriceList,
)


@dataclass(frozen=True, slots=True)
class ImagePrice:
    """So much a picture, whatever it took: prompt, frames and an SVG's author are in it.

    ``amounts`` are nano-dollars by size and quality; ``input_image`` is added for every picture
    that came with the request, masks and markup included.
    """

    amounts: BySize
    input_image: Money = 0

    def bound(self, call: Call, prices: PriceList) -> Bound:
        """``n`` times the dearest that applies; SOFT where the call says what is not listed."""
        if call.n < 1:
            raise CannotPrice("Less than one picture has no price.", "n")
        amount, sure = self.amounts.most(call.size, call.quality)
        if call.unknown or call.output_format not in FORMATS:
            amount, sure = self.amounts.largest, False
        return Bound(
            call.n * amount + len(call.inputs) * self.input_image,
            Confidence.HARD if sure else Confidence.SOFT,
        )

    def likely(self, call: Call, prices: PriceList) -> Money | None:
        """The same as the bound, where size and quality are said: it is the price."""
        if call.size in OPEN or call.quality in OPEN:
            return None
        bound = self.bound(call, prices)
        return bound.amount if bound.confidence is Confidence.HARD else None

    def cost(self, answer: Answer, prices: PriceList) -> Money | None:
        """By the count of pictures. None for an answer without any (a bill for nothing is not
        ours to guess at), and where priced input pictures were not counted."""
        if answer.images < 1:
            return None
        if answer.input_images is None and self.input_image:
            return None
        amount, _ = self.amounts.most(answer.size, answer.quality)
        return answer.images * amount + (answer.input_images or 0) * self.input_image

    def knows(self, size: str, quality: str) -> bool:
        """Whether both are listed."""
        return self.amounts.most(size, quality)[1]
