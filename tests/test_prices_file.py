"""config/prices.yaml against the field's list, and its loader against mistakes."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Mapping
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from gateway.domain.price import BySize, PriceBook
from gateway.domain.price_images import ImagePrice
from gateway.domain.price_tokens import TokenPrice
from gateway.pricefile import PriceFileError, Prices, load_prices

PRICES = Path(__file__).parents[1] / "config" / "prices.yaml"
FIELD = Path(__file__).parent / "data" / "litellm-openai-images-2026-11.csv"
ROWS = load_prices(PRICES).rows
BY_MODEL = {row.model: row for row in ROWS}
TODAY = date(2026, 11, 22)

RATES = {
    "input_cost_per_token": "text_in",
    "cache_read_input_token_cost": "cached_text_in",
    "input_cost_per_image_token": "image_in",
    "cache_read_input_image_token_cost": "cached_image_in",
    "output_cost_per_token": "text_out",
    "output_cost_per_image_token": "image_out",
}
CONTRACT = {  # contract 5.1, dollars a million: text, cached, image, cached, text out, image out
    "gpt-image-2.6-sunburst": ("5", "1.25", "8", "2", None, "30"),
    "gpt-image-2.6-flare": ("5", "1.25", "8", "2", None, "30"),
    "gpt-image-2.5-sunburst": ("5", "1.25", "8", "2", None, "30"),
    "gpt-image-2.5-flare": ("5", "1.25", "8", "2", None, "30"),
    "gpt-image-2.5-sunburst-2026-09-08": ("5", "1.25", "8", "2", None, "30"),
    "gpt-image-2.5-flare-2026-09-08": ("5", "1.25", "8", "2", None, "30"),
    "gpt-image-2": ("5", "1.25", "8", "2", None, "30"),
    "gpt-image-2-2026-04-21": ("5", "1.25", "8", "2", None, "30"),
    "gpt-image-1.5": ("5", "1.25", "8", "2", "10", "32"),
    "gpt-image-1.5-2025-12-16": ("5", "1.25", "8", "2", "10", "32"),
    "chatgpt-image-latest": ("5", "1.25", "8", "2", "10", "32"),
    "gpt-image-1-mini": ("2", "0.20", "2.5", "0.25", None, "8"),
    "gpt-image-1": ("5", "1.25", "10", "2.5", None, "40"),
}
FIELD_ROWS = list(csv.DictReader(FIELD.read_text("utf-8").splitlines()))
# "standard" is the list's old name for low; we hold it as medium, which is dearer.
BY_PICTURE = [
    row
    for row in FIELD_ROWS
    if row["key"].count("/") == 2 and not row["key"].startswith("standard")
]


def rate(price: TokenPrice, name: str) -> int | None:
    value = getattr(price, name)
    assert value is None or type(value) is int
    return value


TEXT_MODELS = {
    "gpt-5.4-mini": ("0.75", "0.075", "4.5", 128_000),
    "gpt-5.4-nano": ("0.2", "0.02", "1.25", 128_000),
    "gpt-5-mini": ("0.25", "0.025", "2", 128_000),
    "gpt-4.1": ("2", "0.5", "8", 32_768),
}
"""Dollars a million tokens read, read from a cache and written; the most that is written."""


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_text_models_are_those_of_their_source(model: str) -> None:
    price = BY_MODEL[model].price
    assert isinstance(price, TokenPrice)
    *dollars, most = TEXT_MODELS[model]
    wanted = [Decimal(str(one)) * 1000 for one in dollars]
    assert [price.text_in, price.cached_text_in, price.text_out] == wanted
    assert (price.max_output_tokens, price.output, price.image_out) == (most, None, None)


def test_every_model_of_the_contract_has_one_row() -> None:
    assert set(BY_MODEL) == {*CONTRACT, "dall-e-3", "dall-e-2", *TEXT_MODELS}
    assert len(ROWS) == len(BY_MODEL)
    assert all(row.provider == "openai" and not row.own and row.source for row in ROWS)


@pytest.mark.parametrize("model", CONTRACT)
def test_rates_are_those_of_the_contract(model: str) -> None:
    price = BY_MODEL[model].price
    assert isinstance(price, TokenPrice)
    quoted = [None if dollars is None else Decimal(dollars) * 1000 for dollars in CONTRACT[model]]
    assert [rate(price, name) for name in RATES.values()] == quoted


@pytest.mark.parametrize(
    "listed", [row for row in FIELD_ROWS if "/" not in row["key"]], ids=lambda row: str(row["key"])
)
def test_rates_and_ends_are_those_of_the_fields_list(listed: dict[str, str]) -> None:
    row = BY_MODEL[listed["key"]]
    assert isinstance(row.price, TokenPrice)
    for column, name in RATES.items():
        if listed[column]:
            assert rate(row.price, name) == Decimal(listed[column]) * 10**9, column
    ends = listed["deprecation_date"]
    assert row.shuts_down == (date.fromisoformat(ends) if ends else None)


@pytest.mark.parametrize("listed", BY_PICTURE, ids=lambda row: str(row["key"]))
def test_the_tables_come_to_the_fields_prices_by_picture(listed: dict[str, str]) -> None:
    quality, size, model = listed["key"].split("/")
    price = BY_MODEL[model].price
    assert isinstance(price, TokenPrice)
    assert isinstance(price.output, BySize)
    assert price.image_out is not None
    tokens = price.output.cells[size.replace("-x-", "x")][quality]
    dollars = Decimal(tokens * price.image_out) / 10**9
    # The list rounds, and gives landscape the price of portrait (32 tokens more). Mini is a
    # constant above its tokens: its row is soft and says so.
    above = Decimal("0.003") if model == "gpt-image-1-mini" else Decimal("0.002")
    assert abs(Decimal(listed["input_cost_per_image"]) - dollars) < above


def test_retired_models_and_dall_e() -> None:
    assert BY_MODEL["gpt-image-1"].shuts_down == date(2026, 10, 23)
    assert BY_MODEL["gpt-image-1.5"].shuts_down == date(2026, 12, 1)
    three, two = BY_MODEL["dall-e-3"], BY_MODEL["dall-e-2"]
    assert three.shuts_down == two.shuts_down == date(2026, 5, 12)
    assert isinstance(three.price, ImagePrice)
    assert isinstance(two.price, ImagePrice)
    assert three.price.amounts.cells["1792x1024"] == {"standard": 80_000_000, "hd": 120_000_000}
    assert two.price.amounts.cells["512x512"] == {"any": 18_000_000}


def test_every_model_that_ends_names_one_that_goes_on() -> None:
    ending = [row for row in ROWS if row.shuts_down is not None]
    assert len(ending) == 7
    for row in ROWS:
        assert bool(row.replacement) == (row in ending)
    for row in ending:
        assert BY_MODEL[row.replacement].shuts_down is None
        assert row.shuts_down is not None
        assert not row.retired(row.shuts_down - timedelta(days=1))
        assert row.retired(row.shuts_down)


def numbers(value: object) -> Iterator[object]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from numbers(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from numbers(item)
    else:
        yield value


def test_no_price_is_a_float() -> None:
    kinds = {type(number) for row in ROWS for number in numbers(row)}
    assert kinds == {int, str, bool, date, type(None)}


def test_the_file_applies_by_day() -> None:
    book = PriceBook(ROWS)
    day_before = book.of("openai", "openai", date(2026, 9, 7))
    assert day_before.find("gpt-image-2.5-flare") is None
    assert day_before.find("gpt-image-2") is not None
    assert book.of("openai", "openai", TODAY).find("gpt-image-2.5-flare") is not None
    assert book.of("comet", "comet", TODAY).rows == {}


OWN: list[Mapping[str, object]] = [
    {"upstream": "comet", "model": "gpt-image-2", "per_image": "0.04"},
    {
        "upstream": "local",
        "model": ["a", "b"],
        "valid_from": date(2026, 1, 2),
        "source": "our invoice",
        "per_image": {"default": Decimal("0.01"), "1024x1024": {"low": 0, "high": "0.02"}},
        "per_input_image": "0.001",
    },
    {
        "upstream": "local",
        "model": "author",
        "usd_per_million_tokens": {"text_in": "0.63", "text_out": 8},
        "max_output_tokens": 100_000,
    },
]


def test_an_operators_rows_go_beside_the_file_and_before_it() -> None:
    rows = load_prices(PRICES, OWN).rows
    assert rows[: len(ROWS)] == ROWS
    flat, first, second, author = rows[len(ROWS) :]
    assert flat.id == "own:comet/gpt-image-2@2000-01-01"
    assert flat.price == ImagePrice(BySize({"default": {"any": 40_000_000}}))
    assert (first.model, second.model, first.source) == ("a", "b", "our invoice")
    assert first.price == ImagePrice(
        BySize({"default": {"any": 10_000_000}, "1024x1024": {"low": 0, "high": 20_000_000}}),
        1_000_000,
    )
    assert author.price == TokenPrice(text_in=630, text_out=8_000, max_output_tokens=100_000)
    book = PriceBook(rows)
    assert book.of("comet", "openai", TODAY).find("gpt-image-2") is flat
    assert book.of("openai", "openai", TODAY).find("gpt-image-2") == BY_MODEL["gpt-image-2"]


HEAD = "- {provider: p, model: m, valid_from: 2026-01-01, source: s"
TABLE = "output_tokens: {table: {default: {low: 1}}}"


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("a: [", "line 1: this is not YAML"),
        ("a: 1", "line 1: a price file is a list of rows"),
        ("- 7", "line 1: a row is a list of fields"),
        ("- {}", "line 1: a row has one price: usd_per_million_tokens or per_image"),
        (f"{HEAD}}}", "line 1: a row has one price"),
        (f"{HEAD}, per_image: 1, usd_per_million_tokens: {{}}}}", "line 1: a row has one price"),
        (f"{HEAD}, per_imge: 1}}", "line 1: per_imge: unknown field; per_image?"),
        (f"{HEAD}, per_image: 1, soft: true}}", "line 1: soft: unknown field"),
        (
            f"{HEAD}, text_in: 1, max_output_tokens: 9}}",
            "line 1: text_in: unknown field; write it as usd_per_million_tokens: {text_in: ...}",
        ),
        (f"{HEAD},\n per_image: 1,\n per_image: 2}}", "line 3: per_image: this is written twice"),
        (f"{HEAD}, upstream: u, per_image: 1}}", "line 1: a row is either of a provider"),
        ("- {model: m, valid_from: 2026-01-01, source: s, per_image: 1}", "a row is either"),
        ("- {provider: p, model: m, source: s, per_image: 1}", "valid_from is missing"),
        ("- {provider: p, model: m, valid_from: 2026-01-01, per_image: 1}", "source is missing"),
        ("- {provider: p, valid_from: 2026-01-01, source: s, per_image: 1}", "model is missing"),
        (f"{HEAD}, shuts_down: 2025-01-01, per_image: 1}}", "shuts_down: this is before"),
        (f"{HEAD}, shuts_down: soon, per_image: 1}}", "shuts_down: a day is written 2026-11-22"),
        (f"{HEAD}, replacement: n, per_image: 1}}", "replacement: this needs shuts_down beside it"),
        (
            f"{HEAD}, shuts_down: 2030-01-01, replacement: [n], per_image: 1}}",
            "replacement: replacement is missing or not text",
        ),
        (f"{HEAD}, per_image: -1}}", "per_image: a price is written in plain dollars: 0.04"),
        (f"{HEAD}, per_image: 1e}}", "per_image: a price is written in plain dollars"),
        (f"{HEAD}, per_image: 4 cents}}", "per_image: a price is written in plain dollars"),
        (f"{HEAD}, per_image: 0.0000000001}}", "per_image: '0.0000000001' dollars is finer"),
        (f"{HEAD}, per_image: }}", "per_image: a price is written in plain dollars"),
        (f"{HEAD}, per_image: {{}}}}", "per_image: this is empty"),
        (f"{HEAD}, per_image: {{big: 1}}}}", 'per_image.big: a size is written "1024x1024"'),
        (f"{HEAD}, per_image: {{default: {{auto: 1}}}}}}", "auto: this is not a quality"),
        (f"{HEAD}, per_image: {{default: {{}}}}}}", "default: this is a list of qualities"),
        (f"{HEAD}, per_image: 1}}\n{HEAD}, per_image: 2}}", "line 2: m has another price from"),
        (
            f"{HEAD}, usd_per_million_tokens: {{text_in: 1, image_out: 0.0001}}, {TABLE}}}",
            "image_out: this is finer than a nano-dollar a token",
        ),
        (
            f"{HEAD}, usd_per_million_tokens: {{image_out: 1}}, {TABLE}}}",
            "usd_per_million_tokens: text_in is missing",
        ),
        (
            f"{HEAD}, usd_per_million_tokens: {{text_in: 1}}, {TABLE}}}",
            "output_tokens: this needs the rate image_out",
        ),
        (
            f"{HEAD}, usd_per_million_tokens: {{text_in: 1, cached_text_in: 2, image_out: 1}}, "
            f"{TABLE}}}",
            "cached_text_in: this needs a text_in that is not below it",
        ),
        (
            f"{HEAD}, usd_per_million_tokens: {{text_in: 1, image_out: 1}}}}",
            "image_out: this needs output_tokens beside the rates",
        ),
        (f"{HEAD}, usd_per_million_tokens: {{text_in: 1}}}}", "a row needs output_tokens"),
        (
            f"{HEAD}, usd_per_million_tokens: {{text_in: 1, image_out: 1}}, margin_percent: 50, "
            f"{TABLE}}}",
            "margin_percent: this is a whole number from 100",
        ),
        (
            f"{HEAD}, usd_per_million_tokens: {{text_in: 1, image_out: 1}}, soft: maybe, {TABLE}}}",
            "soft: this is true or false",
        ),
        (
            f"{HEAD}, usd_per_million_tokens: {{text_in: 1, image_out: 1}}, "
            "output_tokens: {axes: {low: 0}, min_pixels: 1, max_pixels: 1, max_edge: 1}}",
            "output_tokens.max_ratio: this is a whole number",
        ),
    ],
)
def test_a_mistake_says_where_it_is(text: str, mistake: str) -> None:
    with pytest.raises(PriceFileError) as caught:
        load_prices(text)
    assert any(mistake in said for said in caught.value.mistakes), caught.value.mistakes


@pytest.mark.parametrize(
    ("row", "mistake"),
    [
        ({"upstream": "u", "model": "m"}, "prices.rows[0]: a row has one price"),
        (
            {"upstream": "u", "model": "m", "per_image": 0.04},
            'prices.rows[0].per_image: a price needs exact digits: write it in quotes, "0.04"',
        ),
        (
            {"upstream": "u", "model": "m", "per_image": True},
            "prices.rows[0].per_image: a price is written in plain dollars",
        ),
        (
            {"upstream": "u", "model": "m", "per_image": Decimal("1.0000000000000000000000000001")},
            "prices.rows[0].per_image: a price is written in plain dollars",
        ),
        (
            {"upstream": "u", "model": "m", "per_image": Decimal("NaN")},
            "prices.rows[0].per_image: a price is written in plain dollars",
        ),
    ],
)
def test_an_operators_mistake_says_where_it_is(row: Mapping[str, object], mistake: str) -> None:
    with pytest.raises(PriceFileError) as caught:
        load_prices("[]", [row])
    assert any(said.startswith(mistake) for said in caught.value.mistakes), caught.value.mistakes


def test_all_mistakes_come_at_once(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(f"{HEAD}, per_image: x}}\n\n- {{model: 7, per_image: 1, colour: red}}\n")
    with pytest.raises(PriceFileError) as caught:
        load_prices(file, [{"upstream": "u", "per_image": "1"}])
    assert caught.value.mistakes == (
        "prices.yaml, line 1: per_image: a price is written in plain dollars: 0.04",
        "prices.yaml, line 3: colour: unknown field",
        "prices.yaml, line 3: a row is either of a provider (its list) or of an upstream (yours)",
        "prices.rows[0]: model is missing or not text",
    )


def test_a_file_that_is_not_there_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(PriceFileError, match="cannot be read"):
        load_prices(tmp_path / "none.yaml")
    assert load_prices("") == load_prices("rows: []") == Prices(())


@pytest.mark.parametrize(
    ("written", "nanos"), [("5e-05", 50_000), ("1E-9", 1), ("1.2500005e+06", 1_250_000_500_000_000)]
)
def test_a_price_with_an_exponent_is_as_exact_as_one_without(written: str, nanos: int) -> None:
    listed = f"- {{upstream: azure, model: m, per_image: {written}}}"
    own = {"upstream": "azure", "model": "m", "per_image": written}
    for prices in (load_prices(listed), load_prices("[]", [own])):
        (row,) = prices.rows
        assert isinstance(row.price, ImagePrice)
        assert row.price.amounts.cells["default"]["any"] == nanos


@pytest.mark.parametrize("written", ["1e-10", "1e+12", "1e999999999", "-5e-05", "e5"])
def test_an_exponent_has_the_bounds_of_every_price(written: str) -> None:
    with pytest.raises(PriceFileError, match="per_image"):
        load_prices(f"- {{upstream: azure, model: m, per_image: {written}}}")


def test_a_file_can_say_when_it_was_compiled() -> None:
    row = f"{HEAD}, per_image: 1}}"
    alone, dated = load_prices(row), load_prices(f"compiled: 2026-11-22\nrows:\n{row}\n")
    assert alone.compiled is None
    assert dated == Prices(alone.rows, date(2026, 11, 22))
    assert load_prices(PRICES).compiled is not None


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("compiled: soon\nrows: []", "line 1: compiled: a day is written 2026-11-22"),
        ("compiled:\nrows: []", "line 1: compiled is missing"),
        ("rows: []\nrow: 1", "line 2: row: unknown field; rows?"),
        ("compiled: 2026-11-22", "line 1: rows: a price file is a list of rows"),
        ("rows:\n  model: 1", "line 1: rows: a price file is a list of rows"),
        (f"rows:\n{HEAD}, per_image: x}}", "line 2: per_image: a price is written in plain"),
        (f"rows:\n{HEAD}, per_image: {{big: 1}}}}", "line 2: per_image.big: a size is written"),
        (f"rows:\n{HEAD}, per_image: 1}}\n{HEAD}, per_image: 2}}", "line 3: m has another"),
        (f"- compiled: 2026-11-22\n{HEAD}, per_image: 1}}", "line 1: compiled: unknown field"),
    ],
)
def test_a_mistake_around_the_rows_says_where_it_is(text: str, mistake: str) -> None:
    with pytest.raises(PriceFileError) as caught:
        load_prices(text)
    assert any(said.startswith(mistake) for said in caught.value.mistakes), caught.value.mistakes


def test_a_text_that_is_read_again_says_what_it_said_and_knows_nobody_elses_rows() -> None:
    row = {"model": "m", "valid_from": "2026-01-01", "source": "s", "per_image": "1"}
    own = {"provider": "openai", **row}
    text = PRICES.read_text("utf-8")
    assert load_prices(text).rows == ROWS
    assert load_prices(text, [own]).rows[:-1] == ROWS
    assert load_prices(text).rows == ROWS
    said = []
    for _ in range(2):
        with pytest.raises(PriceFileError) as caught:
            load_prices("rows: [1, {}]", [{"nonsense": "1"}])
        said.append(caught.value.mistakes)
    assert said[0] == said[1]
    places = {mistake.partition(":")[0] for mistake in said[0]}
    assert {"line 1", "prices.rows[0].nonsense"} <= places, "both are told of"
