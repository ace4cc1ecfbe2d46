"""The price of a response: a text model that reads and writes, and an image tool that it may call.

The bound, for ``calls`` of the tool at most (``max_tool_calls``) and so ``calls + 1`` turns of the
text model, each of which reads again all that came before it::

    sum over the turns k = 0..calls:
        (text + context + 3,000) + (pictures so far + k) x 6,500   tokens read
    + calls x max_output_tokens          what it wrote itself, read again
      all x text_in
    + max_output_tokens x text_out
    + sum over the calls k = 0..calls-1:
        one picture by the tool's parameters, from the text and every picture so far
    + max_output_tokens x text_in of the image model      the prompts that the text model writes

It is SOFT: how often a provider bills what is read again is not published. Tokens are settled by
the two usages of the answer (contract 3.4), each at its own row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gateway.domain.call import Call, InputImage
from gateway.domain.money import Money
from gateway.domain.price import (
    Answer,
    Bound,
    CannotPrice,
    Confidence,
    Price,
    PriceList,
    PriceRow,
)
from gateway.domain.price_tokens import TokenPrice

AROUND_TOKENS = 3_000
"""Around the text of one turn: the tool's own description, roles, the date. Published nowhere."""
PICTURE_TOKENS = 6_500
"""Of one picture that a text model reads, where its row does not say: that of the image models,
whose rule is not published either."""
_EARLIER = InputImage(role="image", digest="", size_bytes=0, media_type="")
"""A picture of which nothing is known here but that it is there."""


@dataclass(frozen=True, slots=True)
class ResponsePrice:
    """``text`` is the price of the model that was asked, ``picture`` that of the model behind its
    image tool: None where the request has no such tool."""

    text: TokenPrice
    picture: Price | None

    def bound(self, call: Call, prices: PriceList) -> Bound:
        """The most that ``call`` can cost, which has ``asks``. Raises ``CannotPrice``."""
        ask = call.asks
        text_out = self.text.text_out
        if ask is None or text_out is None or self.text.max_output_tokens is None:
            raise CannotPrice(
                f"The price of {call.model} says nothing of text that it writes: add text_out and "
                "max_output_tokens to its row, or ask for a text model.",
                "model",
            )
        calls, turns = ask.max_tool_calls, ask.max_tool_calls + 1
        written = min(ask.max_output_tokens, self.text.max_output_tokens)
        text = ask.text_bytes + ask.context_tokens + AROUND_TOKENS
        seen = turns * (len(call.inputs) + ask.context_pictures) + calls * turns // 2
        read = turns * text + calls * written
        amount = read * self.text.text_in + written * text_out + seen * self._reads_picture()
        if self.picture is not None and ask.tool is not None:
            amount += self._pictures(self.picture, call, prices)
            if isinstance(self.picture, TokenPrice):
                amount += written * self.picture.text_in
        return Bound(amount, Confidence.SOFT)

    def likely(self, call: Call, prices: PriceList) -> Money | None:
        """Nobody can say: the model chooses what it writes, and whether it draws."""
        return None

    def cost(self, answer: Answer, prices: PriceList) -> Money | None:
        """By both usages. None without that of the text, and where pictures came without one."""
        if answer.text_usage is None:
            return None
        text = self.text.cost(Answer(0, answer.text_usage), prices)
        picture = self.picture_cost(answer, prices)
        return None if text is None or picture is None else text + picture

    def picture_cost(self, answer: Answer, prices: PriceList) -> Money | None:
        """Of the cost, that of the pictures: 0 where none were drawn, None where the answer does
        not say enough."""
        if answer.usage is None and answer.images == 0:
            return 0
        if self.picture is None:
            return None
        return self.picture.cost(replace(answer, text_usage=None), prices)

    def knows(self, size: str, quality: str) -> bool:
        """Whether its pictures have a sure price."""
        return self.picture is not None and self.picture.knows(size, quality)

    def _reads_picture(self) -> Money:
        """What one picture costs that the text model reads."""
        rate = self.text.text_in if self.text.image_in is None else self.text.image_in
        rule = self.text.input_image
        if rule is None:
            return PICTURE_TOKENS * rate
        return (rule if isinstance(rule, int) else rule.of(_EARLIER, "high")) * rate

    def _pictures(self, price: Price, call: Call, prices: PriceList) -> Money:
        ask = call.asks
        if ask is None:
            return 0
        earlier = (_EARLIER,) * ask.context_pictures
        return sum(
            price.bound(drawn(call, (*earlier, *(_EARLIER,) * made)), prices).amount
            for made in range(ask.max_tool_calls)
        )


def row_of(text: PriceRow, picture: PriceRow | None) -> PriceRow:
    """The row of a response, of those of its two models. Raises ``CannotPrice`` where the first is
    no text model's."""
    if not isinstance(text.price, TokenPrice):
        raise CannotPrice(
            f"The price of {text.model} is one of pictures: ask for a text model.", "model"
        )
    price = ResponsePrice(text.price, None if picture is None else picture.price)
    return replace(text, price=price, beside=picture)


def drawn(call: Call, earlier: tuple[InputImage, ...] = ()) -> Call:
    """One picture of a response as a call of its own; size and quality are those of ``call``.

    An SVG whose author is not named is written by the text model (contract 3.4).
    """
    ask = call.asks
    if ask is None or ask.tool is None:
        raise ValueError("a call without an image tool draws nothing")
    tool = ask.tool
    parameters = dict(tool.parameters)
    if tool.output_format == "svg":
        svg = parameters.get("svg")
        parameters["svg"] = {"model": call.model, **(svg if isinstance(svg, dict) else {})}
    return replace(
        call,
        model=tool.model,
        prompt_bytes=ask.text_bytes + ask.context_tokens,
        parameters=parameters,
        inputs=(*call.inputs, *earlier),
        n=1,
        partial_images=tool.partial_images,
        output_format=tool.output_format,
        frame_count=tool.frame_count,
        unknown=tool.unknown,
        asks=None,
    )
