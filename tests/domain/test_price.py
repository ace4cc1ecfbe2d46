"""Bounds and costs, against figures typed in from contract 5 and money.md 7."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.domain.call import Call, Encoding, InputImage, Json, Operation, SvgUsage, Usage
from gateway.domain.price import (
    Answer,
    Bound,
    BySize,
    CannotPrice,
    Confidence,
    PriceBook,
    PriceList,
    PriceRow,
    raised,
)
from gateway.domain.price_images import ImagePrice
from gateway.domain.price_tokens import TokenPrice
from gateway.pricefile import load_prices

PRICES = Path(__file__).parents[2] / "config" / "prices.yaml"
ROWS = load_prices(PRICES).rows
TODAY = date(2026, 11, 22)
LIST = PriceBook(ROWS).of("openai", "openai", TODAY)
NOTHING = PriceList({})

LADDER_25 = {  # contract 5.3: size -> tokens at low, medium, high, xhigh, max
    "1024x1024": (196, 439, 1756, 3122, 7024),
    "1536x1024": (158, 343, 1372, 2459, 5488),
    "1024x1536": (158, 343, 1372, 2459, 5488),
    "1536x864": (120, 280, 1078, 1917, 4312),
    "2048x2048": (397, 892, 3568, 6343, 14272),
    "2560x1440": (205, 478, 1843, 3276, 7370),
    "3840x2160": (371, 865, 3336, 5930, 13342),
    "2880x2880": (659, 1483, 5930, 10542, 23719),
}
DOLLARS_25 = {  # contract 5.3: the same in units of $0.0001, as it rounds them
    "1024x1024": (59, 132, 527, 937, 2107),
    "1536x1024": (47, 103, 412, 738, 1646),
    "1024x1536": (47, 103, 412, 738, 1646),
    "1536x864": (36, 84, 323, 575, 1294),
    "2048x2048": (119, 268, 1070, 1903, 4282),
    "2560x1440": (62, 143, 553, 983, 2211),
    "3840x2160": (111, 260, 1001, 1779, 4003),
    "2880x2880": (198, 445, 1779, 3163, 7116),
}
QUALITIES_25 = ("low", "medium", "high", "xhigh", "max")
TABLE_1X = {  # contract 5.2: size -> tokens at low, medium, high
    "1024x1024": (272, 1056, 4160),
    "1024x1536": (408, 1584, 6240),
    "1536x1024": (400, 1568, 6208),
}
PICTURE = InputImage("image", "aa", 1000, "image/png", 1024, 1024)


def a_call(
    model: str = "gpt-image-2.5-flare",
    *,
    size: str = "1024x1024",
    quality: str = "high",
    n: int = 1,
    prompt_bytes: int = 0,
    parameters: Mapping[str, Json] | None = None,
    inputs: tuple[InputImage, ...] = (),
    partial_images: int = 0,
    output_format: str = "png",
    frame_count: int = 1,
    unknown: frozenset[str] = frozenset(),
) -> Call:
    return Call(
        Operation.EDIT if inputs else Operation.GENERATION,
        Encoding.JSON,
        "application/json",
        model,
        prompt_bytes,
        parameters or {},
        inputs,
        n,
        size,
        quality,
        partial_images > 0,
        partial_images,
        output_format,
        frame_count,
        unknown,
    )


def price_of(model: str) -> TokenPrice:
    row = next(row for row in ROWS if row.model == model)
    assert isinstance(row.price, TokenPrice)
    return row.price


def wrapping(model: str = "gpt-image-2.5-flare") -> int:
    """What is held for the 32 tokens that a provider may put around a prompt."""
    return 32 * price_of(model).text_in


def bound_of(call: Call, prices: PriceList = LIST) -> Bound:
    return price_of(call.model).bound(call, prices)


@pytest.mark.parametrize("size", LADDER_25)
@pytest.mark.parametrize("rung", range(5))
def test_every_published_size_of_2_5_is_bounded_exactly(size: str, rung: int) -> None:
    bound = bound_of(a_call(size=size, quality=QUALITIES_25[rung]))
    assert bound == Bound(LADDER_25[size][rung] * 30_000 + wrapping(), Confidence.HARD)
    assert (bound.amount - wrapping() + 50_000) // 100_000 == DOLLARS_25[size][rung]


@pytest.mark.parametrize("size", LADDER_25)
def test_gpt_image_2_has_three_of_the_rungs_of_2_5(size: str) -> None:
    for quality, rung in (("low", 0), ("medium", 2), ("high", 4)):
        bound = bound_of(a_call("gpt-image-2", size=size, quality=quality))
        expected = LADDER_25[size][rung] * 30_000 + wrapping("gpt-image-2")
        assert bound == Bound(expected, Confidence.HARD)


@pytest.mark.parametrize(
    ("model", "rate"),
    [
        ("gpt-image-1", 40_000),
        ("gpt-image-1.5", 32_000),
        ("chatgpt-image-latest", 32_000),
        ("gpt-image-1-mini", 8_000),
    ],
)
def test_1_x_is_bounded_by_its_table(model: str, rate: int) -> None:
    for size, tokens in TABLE_1X.items():
        for quality, expected in zip(("low", "medium", "high"), tokens, strict=True):
            bound = bound_of(a_call(model, size=size, quality=quality))
            assert bound.amount == expected * rate + wrapping(model)


@pytest.mark.parametrize(
    ("call", "tokens", "confidence"),
    [
        # What is left open is held at the most it can be.
        (a_call(size="auto", quality="low"), 659, "hard"),
        (a_call(size="auto", quality="medium"), 1483, "hard"),
        (a_call(size="auto", quality="high"), 5930, "hard"),
        (a_call(size="auto", quality="xhigh"), 10542, "hard"),
        (a_call(size="auto", quality="max"), 23719, "hard"),
        (a_call(size="auto", quality="auto"), 23719, "hard"),
        (a_call(size="", quality=""), 23719, "hard"),
        (a_call(quality="auto"), 7024, "hard"),
        (a_call("gpt-image-2", size="auto", quality="low"), 659, "hard"),
        (a_call("gpt-image-2", size="auto", quality="medium"), 5930, "hard"),
        (a_call("gpt-image-2", size="auto", quality="high"), 23719, "hard"),
        (a_call("gpt-image-1", size="auto", quality="medium"), 1584, "hard"),
        (a_call("gpt-image-1", size="1536x1024", quality="auto"), 6208, "hard"),
        (a_call("gpt-image-1", size="auto", quality="auto"), 6240, "hard"),
        # Old names.
        (a_call(quality="standard"), 439, "hard"),
        (a_call(quality="hd"), 1756, "hard"),
        (a_call("gpt-image-1", quality="hd"), 4160, "hard"),
        # What is not known is held at the worst of all.
        (a_call(quality="ultra"), 23719, "soft"),
        (a_call("gpt-image-2", quality="xhigh"), 23719, "soft"),
        (a_call("gpt-image-1", size="512x512", quality="low"), 6240, "soft"),
        (a_call("gpt-image-1", quality="max"), 6240, "soft"),
        (a_call(size="4K", quality="low"), 23719, "soft"),
        (a_call(size="0x1024", quality="low"), 23719, "soft"),
        (a_call(size="1024X1024", quality="low"), 23719, "soft"),
        (a_call(quality="low", unknown=frozenset({"turbo"})), 23719, "soft"),
        (a_call(quality="low", output_format="avif"), 23719, "soft"),
        # Sizes that will be refused: too many pixels, too long, too narrow, too small.
        (a_call(size="4096x4096", quality="low"), 659, "soft"),
        (a_call(size="3856x2144", quality="low"), 659, "soft"),
        (a_call(size="3840x16", quality="low"), 659, "soft"),
        (a_call(size="512x512", quality="low"), 145, "soft"),
        # Counts.
        (a_call(n=10), 17560, "hard"),
        (a_call(partial_images=3), 1756 + 300, "hard"),
        (a_call(n=2, partial_images=2), 2 * (1756 + 200), "hard"),
        (a_call(output_format="gif", frame_count=9), 9 * 1756, "soft"),
    ],
)
def test_output_tokens_of_the_bound(call: Call, tokens: int, confidence: str) -> None:
    rate = price_of(call.model).image_out
    assert rate is not None
    expected = tokens * rate + wrapping(call.model)
    assert bound_of(call) == Bound(expected, Confidence(confidence))


@pytest.mark.parametrize("model", ["gpt-image-2.5-flare", "gpt-image-2"])
def test_no_legal_size_is_above_the_bound_of_auto(model: str) -> None:
    price = price_of(model)
    worst = price.bound(a_call(model, size="auto", quality="high"), LIST).amount
    legal = [
        (width, height)
        for width in range(16, 3841, 16)
        for height in range(16, width + 1, 16)
        if 655_360 <= width * height <= 8_294_400 and width <= 3 * height
    ]
    bounds = [price.bound(a_call(model, size=f"{w}x{h}"), LIST) for w, h in legal]
    assert max(bound.amount for bound in bounds) == worst
    assert {bound.confidence for bound in bounds} == {Confidence.HARD}


@pytest.mark.parametrize(
    ("quality", "tokens"),
    [("low", 1756), ("medium", 1756), ("high", 1756), ("xhigh", 3122), ("max", 7024)],
)
def test_2_6_is_held_as_2_5_high_with_a_quarter_more(quality: str, tokens: int) -> None:
    for model in ("gpt-image-2.6-flare", "gpt-image-2.6-sunburst"):
        call = a_call(model, quality=quality, prompt_bytes=100)
        expected = (tokens * 30_000 + 132 * 5_000) * 5 // 4
        assert bound_of(call) == Bound(expected, Confidence.SOFT)


def test_the_prompt_counts_its_bytes() -> None:
    plain = bound_of(a_call()).amount
    assert bound_of(a_call(prompt_bytes=1_000)).amount - plain == 5_000_000
    assert bound_of(a_call(prompt_bytes=128_000)).amount - plain == 640_000_000


def test_a_prompt_of_two_bytes_may_come_back_as_more_tokens() -> None:
    call = a_call(prompt_bytes=2)
    wrapped = Usage(text_in=2 + 32, image_out=1756)
    assert price_of(call.model).cost(Answer(1, wrapped), LIST) == bound_of(call).amount


def test_planning_costs_nothing_as_far_as_is_known() -> None:
    call = a_call(parameters={"complexity": "high"})
    assert bound_of(call) == Bound(bound_of(a_call()).amount, Confidence.SOFT)


@pytest.mark.parametrize(
    ("model", "size", "quality", "known"),
    [
        ("gpt-image-2.5-flare", "1024x1024", "medium", True),
        ("gpt-image-2.5-flare", "2880x2880", "max", True),
        ("gpt-image-2.5-flare", "auto", "auto", True),
        ("gpt-image-2.5-flare", "1024x1024", "ultra", False),
        ("gpt-image-2.5-flare", "1000x1024", "low", False),
        ("gpt-image-2.5-flare", "512x512", "low", False),
        ("gpt-image-2.5-flare", "4096x1024", "low", False),
        ("gpt-image-2", "1024x1024", "xhigh", False),
        ("gpt-image-1.5", "1536x1024", "high", True),
        ("gpt-image-1.5", "2048x2048", "high", False),
        ("gpt-image-1.5", "1536x1024", "max", False),
        ("dall-e-3", "1024x1024", "hd", True),
        ("dall-e-3", "1024x1024", "low", False),
        ("dall-e-3", "512x512", "hd", False),
    ],
)
def test_what_a_price_knows(model: str, size: str, quality: str, known: bool) -> None:
    price = next(row.price for row in ROWS if row.model == model)
    assert price.knows(size, quality) is known
    assert not AUTHOR.knows(size, quality)


@pytest.mark.parametrize(
    ("amount", "factor", "raised_to"),
    [
        (100, 1_000_000, Bound(100, Confidence.HARD)),
        (100, 999_999, Bound(100, Confidence.HARD)),
        (100, 1_500_000, Bound(150, Confidence.SOFT)),
        (1, 1_000_001, Bound(2, Confidence.SOFT)),
        (0, 2_000_000, Bound(0, Confidence.SOFT)),
    ],
)
def test_a_factor_raises_a_bound_and_rounds_up(amount: int, factor: int, raised_to: Bound) -> None:
    assert raised(Bound(amount, Confidence.HARD), factor) == raised_to


def test_each_picture_that_comes_is_an_input_whatever_its_role() -> None:
    mask = InputImage("mask", "bb", 10, "image/png")
    bound = bound_of(a_call(inputs=(PICTURE, PICTURE, mask)))
    expected = 1756 * 30_000 + 3 * 6_500 * 8_000 + wrapping()
    assert bound == Bound(expected, Confidence.SOFT)


@pytest.mark.parametrize(
    ("width", "height", "fidelity", "tokens"),
    [
        (1024, 1024, None, 194),
        (1024, 1024, "low", 194),
        (1536, 1024, None, 323),
        (1024, 1536, None, 323),
        (100, 100, None, 194),
        (4000, 4000, None, 194),
        (9000, 10, None, 581),
        (0, 0, None, 581),
        (1024, 1024, "high", 194 + 4160),
        (1536, 1024, "high", 323 + 6240),
        (0, 0, "high", 581 + 6240),
        (1024, 1024, "extreme", 194 + 4160),
    ],
)
def test_input_pictures_of_1_x_are_tiles(
    width: int, height: int, fidelity: str | None, tokens: int
) -> None:
    picture = InputImage("image", "aa", 1000, "image/png", width, height)
    parameters: dict[str, Json] = {"input_fidelity": fidelity} if fidelity else {}
    call = a_call("gpt-image-1.5", inputs=(picture,), parameters=parameters)
    assert bound_of(call).amount == 4160 * 32_000 + tokens * 8_000 + wrapping("gpt-image-1.5")


AUTHOR = TokenPrice(text_in=1_000, text_out=8_000, max_output_tokens=100_000)
WITH_AUTHOR = PriceList(
    {**LIST.rows, "gpt-6": PriceRow("openai", "gpt-6", TODAY, "a test", AUTHOR)}
)


def test_an_svg_adds_the_most_its_author_can_write() -> None:
    call = a_call(output_format="svg", prompt_bytes=10, parameters={"svg": {"model": "gpt-6"}})
    expected = 1756 * 30_000 + 42 * 5_000 + 100_000 * 8_000 + 42 * 1_000
    assert bound_of(call, WITH_AUTHOR) == Bound(expected, Confidence.SOFT)
    # For a format that no author writes, it is the upstream's to refuse.
    picture = a_call(prompt_bytes=10, parameters={"svg": {"model": "gpt-7"}})
    assert bound_of(picture, WITH_AUTHOR) == Bound(1756 * 30_000 + 42 * 5_000, Confidence.SOFT)


@pytest.mark.parametrize(
    "svg", [None, {}, {"model": ""}, {"model": "gpt-7"}, {"model": "gpt-image-2"}, "gpt-6"]
)
def test_an_svg_without_a_priced_author_is_refused(svg: Json) -> None:
    call = a_call(output_format="svg", parameters={"svg": svg})
    with pytest.raises(CannotPrice) as caught:
        bound_of(call, WITH_AUTHOR)
    assert caught.value.param == "svg.model"


def test_a_text_model_draws_no_pictures() -> None:
    with pytest.raises(CannotPrice) as caught:
        AUTHOR.bound(a_call("gpt-6"), WITH_AUTHOR)
    assert caught.value.param == "model"


def test_an_edit_needs_a_price_for_its_pictures() -> None:
    price = TokenPrice(text_in=1, image_out=1, output=BySize({"default": {"any": 1}}))
    with pytest.raises(CannotPrice) as caught:
        price.bound(a_call(inputs=(PICTURE,)), NOTHING)
    assert caught.value.param == "image"


@pytest.mark.parametrize(
    ("model", "usage", "nanousd"),
    [
        # The recorded answer of contract 1.3: 17 x 5 + 1457 x 8 + 1372 x 30, per million.
        ("gpt-image-2.5-flare", Usage(text_in=17, image_in=1457, image_out=1372), 52_901_000),
        ("gpt-image-2", Usage(image_out=196), 5_880_000),
        ("gpt-image-2", Usage(image_out=1372), 41_160_000),
        ("gpt-image-2", Usage(image_out=5930), 177_900_000),
        ("gpt-image-2", Usage(image_out=7024), 210_720_000),
        ("gpt-image-1.5", Usage(text_in=50, text_out=7, image_out=4160), 133_440_000),
        ("gpt-image-1-mini", Usage(text_in=10, image_in=10, image_out=272), 2_221_000),
        # Cached tokens are a part of their input.
        (
            "gpt-image-2",
            Usage(text_in=100, image_in=1000, cached_text_in=40, cached_image_in=600, image_out=1),
            60 * 5_000 + 40 * 1_250 + 400 * 8_000 + 600 * 2_000 + 30_000,
        ),
        # No rate is published: as image output, not nothing.
        ("gpt-image-2", Usage(text_out=10, image_out=1), 11 * 30_000),
    ],
)
def test_cost_of_a_usage(model: str, usage: Usage, nanousd: int) -> None:
    assert price_of(model).cost(Answer(1, usage), LIST) == nanousd


def test_cached_input_without_a_rate_costs_as_uncached() -> None:
    price = TokenPrice(text_in=5, image_in=8, image_out=30)
    usage = Usage(text_in=10, image_in=10, cached_text_in=10, cached_image_in=10)
    assert price.cost(Answer(1, usage), NOTHING) == 130


def test_what_cannot_be_measured_is_none_and_never_zero() -> None:
    price = price_of("gpt-image-2.5-flare")
    written = Usage(image_out=1, svg=SvgUsage("gpt-6", 10, 20))
    assert price.cost(Answer(1), LIST) is None
    assert price.cost(Answer(1, written), LIST) is None
    assert price.cost(Answer(1, Usage(image_out=1), output_format="svg"), LIST) is None
    assert AUTHOR.cost(Answer(1, Usage(image_out=1)), LIST) is None
    assert price.cost(Answer(1, written), WITH_AUTHOR) == 30_000 + 10 * 1_000 + 20 * 8_000


def published_tokens(model: str) -> dict[str, dict[str, int]]:
    """Contract 5.2 and 5.3: size -> quality -> tokens of one picture."""
    if isinstance(price_of(model).output, BySize):
        rungs = ("low", "medium", "high")
        return {size: dict(zip(rungs, row, strict=True)) for size, row in TABLE_1X.items()}
    if model in {"gpt-image-2", "gpt-image-2-2026-04-21"}:
        return {
            size: {"low": row[0], "medium": row[2], "high": row[4]}
            for size, row in LADDER_25.items()
        }
    return {size: dict(zip(QUALITIES_25, row, strict=True)) for size, row in LADDER_25.items()}


TOKEN_MODELS = sorted(
    row.model for row in ROWS if isinstance(row.price, TokenPrice) and row.price.output
)


@settings(deadline=None)
@given(data=st.data())
def test_the_bound_is_never_below_the_cost_of_the_published_tokens(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from(TOKEN_MODELS))
    table = published_tokens(model)
    size = data.draw(st.sampled_from(sorted(table)))
    qualities = table[size]
    quality = data.draw(st.sampled_from(sorted(qualities)))
    n = data.draw(st.integers(1, 10))
    partials = data.draw(st.integers(0, 3))
    prompt = data.draw(st.integers(0, 128_000))
    pictures = data.draw(st.integers(0, 16))
    text_in = data.draw(st.integers(0, prompt))
    image_in = data.draw(st.integers(0, 194 * pictures))
    usage = Usage(
        text_in,
        image_in,
        data.draw(st.integers(0, text_in)),
        data.draw(st.integers(0, image_in)),
        0,
        n * (qualities[quality] + 100 * partials),
    )
    asked_size = data.draw(st.sampled_from([size, "auto"]))
    asked_quality = data.draw(st.sampled_from([quality, "auto"]))
    call = a_call(
        model,
        size=asked_size,
        quality=asked_quality,
        n=n,
        prompt_bytes=prompt,
        partial_images=partials,
        inputs=(PICTURE,) * pictures,
    )
    cost = price_of(model).cost(Answer(n, usage), LIST)
    bound = bound_of(call).amount
    assert cost is not None
    assert 0 <= cost <= bound
    assert type(cost) is int
    assert type(bound) is int


DALLE_3 = ImagePrice(
    BySize(
        {
            "1024x1024": {"standard": 40, "hd": 80},
            "1792x1024": {"standard": 80, "hd": 120},
        }
    )
)
FLAT = ImagePrice(BySize({"default": {"any": 7}}), input_image=2)
MIXED = ImagePrice(BySize({"default": {"low": 1, "high": 3}, "2048x2048": {"low": 4, "high": 9}}))


@pytest.mark.parametrize(
    ("price", "call", "amount", "confidence"),
    [
        (DALLE_3, a_call(quality="standard"), 40, "hard"),
        (DALLE_3, a_call(quality="hd", n=3), 240, "hard"),
        (DALLE_3, a_call(quality="auto"), 80, "hard"),
        (DALLE_3, a_call(size="auto", quality="standard"), 80, "hard"),
        (DALLE_3, a_call(size="auto", quality="auto"), 120, "hard"),
        (DALLE_3, a_call(size="640x640", quality="standard"), 120, "soft"),
        (DALLE_3, a_call(quality="sketch"), 120, "soft"),
        (DALLE_3, a_call(quality="standard", unknown=frozenset({"x"})), 120, "soft"),
        (DALLE_3, a_call(quality="standard", output_format="avif"), 120, "soft"),
        (FLAT, a_call(size="640x640", quality="sketch", n=2), 14, "hard"),
        (FLAT, a_call(inputs=(PICTURE, PICTURE)), 11, "hard"),
        (MIXED, a_call(size="640x640", quality="low"), 1, "hard"),
        (MIXED, a_call(size="640x640", quality="hd"), 3, "hard"),
        (MIXED, a_call(size="2048x2048", quality="high"), 9, "hard"),
        (MIXED, a_call(size="auto", quality="low"), 4, "hard"),
        (MIXED, a_call(size="640x640", quality="xhigh"), 9, "soft"),
    ],
)
def test_bound_by_picture(price: ImagePrice, call: Call, amount: int, confidence: str) -> None:
    assert price.bound(call, NOTHING) == Bound(amount, Confidence(confidence))


@pytest.mark.parametrize(
    ("price", "answer", "amount"),
    [
        (DALLE_3, Answer(1, size="1024x1024", quality="standard"), 40),
        (DALLE_3, Answer(2, size="1024x1024"), 160),
        (DALLE_3, Answer(1), 120),
        (DALLE_3, Answer(0), None),
        (FLAT, Answer(3, input_images=0), 21),
        (FLAT, Answer(1, input_images=2), 11),
        (FLAT, Answer(1), None),
    ],
)
def test_cost_by_picture(price: ImagePrice, answer: Answer, amount: int | None) -> None:
    assert price.cost(answer, NOTHING) == amount


def a_row(provider: str, model: str, day: date, amount: int, *, own: bool = False) -> PriceRow:
    price = ImagePrice(BySize({"default": {"any": amount}}))
    return PriceRow(provider, model, day, "a test", price, own=own)


def test_the_row_of_the_day_applies_and_an_upstreams_own_goes_first() -> None:
    old = a_row("openai", "a", date(2026, 1, 1), 1)
    new = a_row("openai", "a", date(2026, 6, 1), 2)
    mine = a_row("comet", "a", date(2026, 3, 1), 3, own=True)
    namesake = a_row("openai", "a", date(2026, 2, 1), 4, own=True)
    book = PriceBook([new, mine, old])
    assert book.of("x", "openai", date(2025, 12, 31)).find("a") is None
    assert book.of("x", "openai", date(2026, 1, 1)).find("a") is old
    assert book.of("x", "openai", date(2026, 5, 31)).find("a") is old
    assert book.of("x", "openai", date(2026, 6, 1)).find("a") is new
    assert book.of("comet", "openai", date(2026, 2, 28)).find("a") is old
    assert book.of("comet", "openai", date(2026, 7, 1)).find("a") is mine
    assert book.of("x", "openai", TODAY).find("b") is None
    # An upstream that is called like its provider keeps its own terms to itself.
    book = PriceBook([new, old, namesake])
    assert book.of("openai", "openai", TODAY).find("a") is namesake
    assert book.of("eu", "openai", TODAY).find("a") is new
    # Nor has it its namesake's prices, when it is another provider's.
    assert book.of("openai", "comet", TODAY).find("a") is namesake
    assert PriceBook([new]).of("openai", "comet", TODAY).find("a") is None
    assert {row.id for row in (new, namesake)} == {
        "openai/a@2026-06-01",
        "own:openai/a@2026-02-01",
    }


# What is likely.


@pytest.mark.parametrize("size", LADDER_25)
@pytest.mark.parametrize("rung", range(5))
def test_what_is_said_in_full_likely_costs_what_the_formula_says(size: str, rung: int) -> None:
    price = price_of("gpt-image-2.5-flare")
    call = a_call(size=size, quality=QUALITIES_25[rung], n=2, prompt_bytes=9, partial_images=1)
    text = 3 * price.text_in
    assert price.likely(call, LIST) == 2 * (LADDER_25[size][rung] + 100) * 30_000 + text
    assert (price.likely(call, LIST) or 0) <= price.bound(call, LIST).amount


@pytest.mark.parametrize(
    "call",
    [
        *(a_call(size="auto"), a_call(quality="auto"), a_call(size=""), a_call(quality="finest")),
        *(a_call(size="16x16"), a_call(size="9999x9999"), a_call(unknown=frozenset({"x"}))),
        *(a_call(output_format="gif", frame_count=9), a_call(output_format="tiff")),
    ],
    ids=str,
)
def test_what_is_not_said_is_not_guessed(call: Call) -> None:
    assert price_of(call.model).likely(call, LIST) is None


def test_input_pictures_are_likely_what_is_held_for_them() -> None:
    price = price_of("gpt-image-2.5-flare")
    apart = price.bound(a_call(inputs=(PICTURE,)), LIST).amount - price.bound(a_call(), LIST).amount
    assert price.likely(a_call(inputs=(PICTURE,)), LIST) == apart + 1756 * 30_000


def test_what_is_not_confirmed_is_likely_without_its_margin() -> None:
    call = a_call("gpt-image-2.6-flare")
    likely = price_of(call.model).likely(call, LIST)
    assert likely == 1756 * price_of(call.model).image_out  # type: ignore[operator]
    assert price_of(call.model).bound(call, LIST).amount > likely


def test_a_price_per_picture_is_what_it_likely_costs() -> None:
    price = ImagePrice(BySize({"1024x1024": {"low": 5, "high": 7}}), input_image=1)
    assert price.likely(a_call(n=3, inputs=(PICTURE,)), NOTHING) == 3 * 7 + 1
    for call in (a_call(size="auto"), a_call(quality="auto"), a_call(size="1x1")):
        assert price.likely(call, NOTHING) is None
