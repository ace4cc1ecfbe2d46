"""The price of a response, by hand: the bound term by term, the cost by both usages."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from typing import Any

import pytest

from gateway.domain.call import (
    Call,
    Encoding,
    ImageTool,
    InputImage,
    Json,
    Operation,
    ResponseAsk,
    SvgUsage,
    Usage,
)
from gateway.domain.price import Answer, BySize, CannotPrice, Confidence, PriceList, PriceRow
from gateway.domain.price_images import ImagePrice
from gateway.domain.price_response import ResponsePrice, row_of
from gateway.domain.price_tokens import TokenPrice
from gateway.domain.usage import InvalidUsage, read_text_usage, read_tool_usage

DAY = date(2026, 11, 22)
TEXT = TokenPrice(text_in=2, text_out=16, cached_text_in=1, max_output_tokens=5_000)
DRAWS = TokenPrice(
    text_in=5,
    image_in=8,
    image_out=30,
    cached_image_in=2,
    output=BySize({"1024x1024": {"low": 100, "high": 1_000}}),
    input_image=50,
)
PER_PICTURE = ImagePrice(BySize({"default": {"any": 1_000_000}}))
NOTHING = PriceList({})
TOOL = ImageTool(index=0, model="draws", size="1024x1024", quality="low")
PICTURE = InputImage("image", "aa", 1000, "image/png", 1024, 1024)


def a_call(ask: ResponseAsk, inputs: tuple[InputImage, ...] = ()) -> Call:
    tool = ask.tool
    return Call(
        Operation.RESPONSE,
        Encoding.JSON,
        "application/json",
        "text",
        ask.text_bytes,
        {},
        inputs,
        n=ask.max_tool_calls,
        size=tool.size if tool else "",
        quality=tool.quality if tool else "",
        asks=ask,
    )


def an_ask(**said: Any) -> ResponseAsk:
    return replace(ResponseAsk(TOOL, 1_000, max_output_tokens=400, max_tool_calls=1), **said)


def bound(ask: ResponseAsk, inputs: tuple[InputImage, ...] = ()) -> int:
    return ResponsePrice(TEXT, DRAWS).bound(a_call(ask, inputs), NOTHING).amount


def one_picture(text_bytes: int = 1_000, seen: int = 0, drawn: int = 100) -> int:
    return drawn * 30 + (text_bytes + 32) * 5 + seen * 50 * 8


ONE = 2 * (1_000 + 3_000) * 2 + 1 * 6_500 * 2 + 400 * 2 + 400 * 16 + one_picture() + 400 * 5
"""Two turns of text, the second of which sees the picture; what is written, and read again; the
picture, and its prompt."""


def test_the_bound_is_every_turn_and_every_picture() -> None:
    assert bound(an_ask()) == ONE
    assert ResponsePrice(TEXT, DRAWS).bound(a_call(an_ask()), NOTHING).confidence is Confidence.SOFT


@pytest.mark.parametrize(
    ("said", "inputs", "more"),
    [
        ({"text_bytes": 1_500}, (), 2 * 500 * 2 + 500 * 5),
        ({"context_tokens": 700}, (), 2 * 700 * 2 + 700 * 5),
        ({"context_pictures": 1}, (), 2 * 6_500 * 2 + 50 * 8),
        ({}, (PICTURE,), 2 * 6_500 * 2 + 50 * 8),
        ({"max_output_tokens": 500}, (), 100 * 2 + 100 * 16 + 100 * 5),
        # More than the model can write is not held.
        ({"max_output_tokens": 9_000}, (), 4_600 * 2 + 4_600 * 16 + 4_600 * 5),
        ({"tool": replace(TOOL, quality="high")}, (), 900 * 30),
        ({"tool": replace(TOOL, partial_images=2)}, (), 2 * 100 * 30),
        ({"tool": replace(TOOL, unknown=frozenset({"x"}))}, (), 900 * 30),
        # The second call of the tool may be given what the first has drawn.
        (
            {"max_tool_calls": 2},
            (),
            4_000 * 2 + 2 * 6_500 * 2 + 400 * 2 + one_picture(seen=1),
        ),
    ],
)
def test_the_bound_grows_by(
    said: dict[str, Any], inputs: tuple[InputImage, ...], more: int
) -> None:
    ask = an_ask(**said)
    assert bound(ask, inputs) == ONE + more


def test_without_the_tool_it_is_one_turn_of_text() -> None:
    ask = an_ask(tool=None, max_tool_calls=0)
    amount = ResponsePrice(TEXT, None).bound(a_call(ask), NOTHING).amount
    assert amount == 4_000 * 2 + 400 * 16


def test_pictures_by_the_piece_have_no_prompt() -> None:
    amount = ResponsePrice(TEXT, PER_PICTURE).bound(a_call(an_ask()), NOTHING).amount
    assert amount == ONE - one_picture() - 400 * 5 + 1_000_000


def test_a_text_row_may_say_what_a_picture_is_to_read() -> None:
    seeing = replace(TEXT, image_in=3, input_image=100)
    amount = ResponsePrice(seeing, DRAWS).bound(a_call(an_ask()), NOTHING).amount
    assert amount == ONE - 6_500 * 2 + 100 * 3


@pytest.mark.parametrize("text", [DRAWS, replace(TEXT, text_out=None), PER_PICTURE])
def test_a_model_that_writes_nothing_has_no_response(text: TokenPrice | ImagePrice) -> None:
    def bound_of() -> None:
        row = row_of(PriceRow("openai", "text", DAY, "here", text), None)
        row.price.bound(a_call(an_ask()), NOTHING)

    with pytest.raises(CannotPrice) as refused:
        bound_of()
    assert refused.value.param == "model"


def test_the_row_has_both_names() -> None:
    text = PriceRow("openai", "text", DAY, "here", TEXT)
    draws = PriceRow("mine", "draws", DAY, "here", DRAWS, own=True)
    assert row_of(text, draws).id == "openai/text@2026-11-22+own:mine/draws@2026-11-22"
    assert row_of(text, None).id == "openai/text@2026-11-22"


SPOKEN = Usage(text_in=100, cached_text_in=40, text_out=10)
SPOKEN_COSTS = 60 * 2 + 40 * 1 + 10 * 16
PAINTED = Usage(text_in=20, image_in=10, cached_image_in=4, image_out=100)
PAINTED_COSTS = 20 * 5 + 6 * 8 + 4 * 2 + 100 * 30


@pytest.mark.parametrize(
    ("answer", "cost"),
    [
        (Answer(1, PAINTED, text_usage=SPOKEN), SPOKEN_COSTS + PAINTED_COSTS),
        (Answer(0, None, text_usage=SPOKEN), SPOKEN_COSTS),
        (Answer(0, PAINTED, text_usage=SPOKEN), SPOKEN_COSTS + PAINTED_COSTS),
        (Answer(1, None, text_usage=SPOKEN), None),
        (Answer(1, PAINTED), None),
        (Answer(0), None),
    ],
)
def test_the_cost_is_by_both_usages_or_not_known(answer: Answer, cost: int | None) -> None:
    assert ResponsePrice(TEXT, DRAWS).cost(answer, NOTHING) == cost


def test_pictures_by_the_piece_are_counted() -> None:
    price = ResponsePrice(TEXT, PER_PICTURE)
    answer = Answer(2, None, text_usage=SPOKEN, input_images=0)
    # No tool_usage: the count of what was delivered is all that such a price needs.
    assert price.cost(replace(answer, usage=PAINTED), NOTHING) == SPOKEN_COSTS + 2_000_000
    assert price.cost(answer, NOTHING) == SPOKEN_COSTS + 2_000_000


def test_both_usages_are_counted_together() -> None:
    assert Answer(1, PAINTED, text_usage=SPOKEN).tokens == PAINTED + SPOKEN
    assert Answer(1, None, text_usage=SPOKEN).tokens == SPOKEN
    assert Answer(1, PAINTED).tokens == PAINTED
    assert Answer(1).tokens is None


def text(tokens_in: Json = 10, tokens_out: Json = 5, **more: Json) -> dict[str, Json]:
    return {"input_tokens": tokens_in, "output_tokens": tokens_out, **more}


@pytest.mark.parametrize(
    ("raw", "usage"),
    [
        (None, None),
        ({}, None),
        (text(), Usage(text_in=10, text_out=5)),
        (text(total_tokens=15), Usage(text_in=10, text_out=5)),
        (text(0, 0), Usage()),
        (
            text(input_tokens_details={"cached_tokens": 4, "cache_write_tokens": 0}),
            Usage(text_in=10, cached_text_in=4, text_out=5),
        ),
        (text(output_tokens_details={"reasoning_tokens": 3}), Usage(text_in=10, text_out=5)),
    ],
)
def test_the_usage_of_the_text(raw: Json, usage: Usage | None) -> None:
    assert read_text_usage(raw) == usage


@pytest.mark.parametrize(
    "raw",
    [
        [],
        {"input_tokens": 1},
        text("ten"),
        text(-1),
        text(True),
        text(10**10),
        text(total_tokens=16),
        text(input_tokens_details={"cached_tokens": 11}),
    ],
)
def test_a_usage_of_the_text_that_cannot_be_true(raw: Json) -> None:
    with pytest.raises(InvalidUsage):
        read_text_usage(raw)


def tool(**more: Json) -> dict[str, Json]:
    """As contract 3.4 has it."""
    drawn: dict[str, Json] = {
        "input_tokens": 60,
        "input_tokens_details": {"image_tokens": 50, "text_tokens": 10},
        "output_tokens": 100,
        "total_tokens": 160,
    }
    return {"image_gen": {**drawn, **more}, "web_search": {"num_requests": 0}}


DRAWN = Usage(text_in=10, image_in=50, image_out=100)
AUTHOR: Json = {"model": "text", "input_tokens": 3, "output_tokens": 4, "total_tokens": 7}


@pytest.mark.parametrize(
    ("raw", "documents", "images", "usage"),
    [
        (tool(), [None], 1, DRAWN),
        (None, [None], 1, None),
        ({}, [None], 1, None),
        ({"image_gen": None}, [None], 1, None),
        (tool(input_tokens=0, output_tokens=0, total_tokens=0), [], 0, None),
        (None, [], 0, None),
        # Nothing was delivered, and something was drawn: it is on the bill.
        (tool(), [], 0, DRAWN),
        (
            tool(
                cached_tokens=30,
                cached_tokens_details={"cached_image_tokens": 25, "cached_text_tokens": 5},
            ),
            [None],
            1,
            replace(DRAWN, cached_text_in=5, cached_image_in=25),
        ),
        (
            tool(output_tokens_details={"image_tokens": 90, "text_tokens": 10}),
            [None],
            1,
            replace(DRAWN, text_out=10, image_out=90),
        ),
        (tool(), [AUTHOR, None, AUTHOR], 2, replace(DRAWN, svg=SvgUsage("text", 6, 8))),
    ],
)
def test_the_usage_of_the_pictures(
    raw: Json, documents: list[Json], images: int, usage: Usage | None
) -> None:
    assert read_tool_usage(raw, documents, images) == usage


@pytest.mark.parametrize(
    ("raw", "documents"),
    [
        (tool(output_tokens=0, total_tokens=60), [None]),
        ({"image_gen": {"input_tokens": 1}}, [None]),
        ([], [None]),
        (tool(), [AUTHOR, {"model": "x", "input_tokens": 1, "output_tokens": 1}]),
    ],
)
def test_a_usage_of_the_pictures_that_cannot_be_true(raw: Json, documents: list[Json]) -> None:
    with pytest.raises(InvalidUsage):
        read_tool_usage(raw, documents, 1)
