"""The loader of prices: ``config/prices.yaml``, and the rows of an operator's own file.

Reads text, never numbers that YAML has already made binary floats. Reports every mistake at once,
each with its line. What the fields mean stands at the head of ``config/prices.yaml``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import yaml

from gateway.domain.money import Money, parse_dollars, without_exponent
from gateway.domain.price import BySize, Price, PriceRow, parse_size
from gateway.domain.price_images import ImagePrice
from gateway.domain.price_tokens import ByAxis, Tiles, TokenPrice

ALWAYS = date(2000, 1, 1)
"""From when an operator's own row counts, where it does not say."""

MAX_DEPTH = 8
MAX_COUNT = 1_000_000_000

Spot: TypeAlias = "tuple[str | int, ...]"
"""Where a value stands: ``(3, "per_image", "default")`` is in the fourth row."""

Say: TypeAlias = Callable[[Spot, str], None]
"""Notes a mistake. A reader that has said one returns any value: it is never used."""

COMMON_FIELDS = (
    "provider",
    "upstream",
    "model",
    "valid_from",
    "shuts_down",
    "replacement",
    "source",
)
RATES = (
    "text_in",
    "cached_text_in",
    "image_in",
    "cached_image_in",
    "text_out",
    "image_out",
)
LIMITS = ("min_pixels", "max_pixels", "max_edge", "max_ratio")

_DECIMAL = re.compile(r"[0-9]{1,9}(\.[0-9]{1,12})?")
_WHOLE = re.compile(r"[0-9]{1,10}")
_QUALITY = re.compile(r"[a-z][a-z0-9_-]*")


class PriceFileError(Exception):
    """Prices that cannot be used. ``mistakes`` has one sentence each, with its place."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = tuple(mistakes)


@dataclass(frozen=True, slots=True)
class Prices:
    """The rows of a price file and of an operator, and the day on which the file was compiled: None
    where it does not say."""

    rows: tuple[PriceRow, ...]
    compiled: date | None = None


def load_prices(
    text_or_path: str | Path, extra_rows: Sequence[Mapping[str, object]] = ()
) -> Prices:
    """Every row of a price file (a ``Path``, or the text itself), then the operator's.

    A file is ``{compiled: 2026-11-22, rows: [...]}``, or the list of rows alone.

    ``extra_rows`` are parsed already; their money is text, ``Decimal`` or a whole number, never a
    float. Raises ``PriceFileError``.
    """
    label = f"{text_or_path.name}, line" if isinstance(text_or_path, Path) else "line"
    try:
        text = text_or_path if isinstance(text_or_path, str) else text_or_path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PriceFileError([f"{text_or_path} cannot be read: {error}"]) from None
    file = _of_file(text, label)
    mistakes = list(file.mistakes)

    def say(spot: Spot, text: str) -> None:
        mistakes.append(_dotted((f"prices.rows[{spot[0]}]", *spot[1:]), text))

    rows = {row.id: row for row in file.prices.rows}
    _add(rows, extra_rows, (), say)
    if mistakes:
        raise PriceFileError(mistakes)
    return Prices(tuple(rows.values()), file.prices.compiled)


@dataclass(frozen=True, slots=True)
class _File:
    """What a file says: of one with mistakes, the rest."""

    prices: Prices
    mistakes: tuple[str, ...]


@lru_cache(maxsize=2)
def _of_file(text: str, label: str) -> _File:
    """The text is nearly always the last one, when a configuration is read again; YAML takes 16 ms
    for the shipped table. Raises ``PriceFileError`` for what is no YAML."""
    mistakes: list[str] = []
    lines: dict[Spot, int] = {}

    def say(spot: Spot, text: str) -> None:
        known = next(spot[:end] for end in range(len(spot), -1, -1) if spot[:end] in lines)
        # The line says which row it is.
        row = next((at for at, part in enumerate(spot) if isinstance(part, int)), -1)
        mistakes.append(f"{label} {lines[known]}: {_dotted(spot[row + 1 :], text)}")

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = f"{label} {mark.line + 1}" if mark else label
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        raise PriceFileError([f"{where}: this is not YAML: {problem}"]) from None
    lines[()] = 1
    plain = _plain(root, (), lines, say) if root else []
    compiled: date | None = None
    listed: Spot = ()
    if isinstance(plain, dict) and plain.keys() & {"compiled", "rows"}:
        listed = ("rows",)
        fields = _fields(plain, (), ("compiled", "rows"), say)
        if "compiled" in fields:
            compiled = _date(fields["compiled"], (), "compiled", say)
        plain = fields.get("rows")
    if not isinstance(plain, list):
        say(listed, "a price file is a list of rows")
        plain = []
    rows: dict[str, PriceRow] = {}
    _add(rows, plain, listed, say)
    return _File(Prices(tuple(rows.values()), compiled), tuple(mistakes))


def _add(rows: dict[str, PriceRow], items: Sequence[object], place: Spot, say: Say) -> None:
    """Adds what the items say to the rows, by their ids."""
    for index, raw in enumerate(items):
        spot = (*place, index)
        for row in _rows(raw, spot, say):
            if row.id in rows:
                say(spot, f"{row.model} has another price from {row.valid_from} on")
            rows[row.id] = row


def _dotted(spot: Spot, text: str) -> str:
    return f"{'.'.join(map(str, spot))}: {text}" if spot else text


def _plain(node: yaml.Node, spot: Spot, lines: dict[Spot, int], say: Say) -> object:
    """A YAML node as lists, dicts and text; scalars keep the characters of the file."""
    lines.setdefault(spot, node.start_mark.line + 1)
    if len(spot) > MAX_DEPTH:
        say(spot, "this is nested too deeply")
        return None
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else str(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*spot, index), lines, say) for index, item in enumerate(node.value)]
    members: dict[str, object] = {}
    for key, value in node.value:
        name = str(key.value)
        lines[(*spot, name)] = key.start_mark.line + 1
        if name in members:
            say((*spot, name), "this is written twice")
        members[name] = _plain(value, (*spot, name), lines, say)
    return members


def _rows(raw: object, spot: Spot, say: Say) -> list[PriceRow]:
    """The rows of one item: one for each of its models."""
    if not isinstance(raw, Mapping):
        say(spot, "a row is a list of fields")
        return []
    kinds = [kind for kind in KINDS if kind in raw]
    of_kind = [name for kind in kinds or KINDS for name in (kind, *KINDS[kind][0])]
    fields = _fields(raw, spot, (*COMMON_FIELDS, *of_kind), say)
    if len(kinds) != 1:
        say(spot, f"a row has one price: {' or '.join(KINDS)}")
        return []
    own = "upstream" in fields
    if own == ("provider" in fields):
        say(spot, "a row is either of a provider (its list) or of an upstream (yours)")
    if not own and "provider" not in fields:
        # The rest is another for either.
        return []
    whose = _text(fields.get("upstream" if own else "provider"), spot, "provider", say)
    valid_from = _date(fields.get("valid_from", ALWAYS if own else None), spot, "valid_from", say)
    source = _text(
        fields.get("source", "the operator's own price" if own else None), spot, "source", say
    )
    shuts_down = None
    if fields.get("shuts_down") is not None:
        shuts_down = _date(fields["shuts_down"], spot, "shuts_down", say)
        if shuts_down <= valid_from:
            say((*spot, "shuts_down"), "this is before valid_from")
    replacement = ""
    if fields.get("replacement") is not None:
        replacement = _text(fields["replacement"], spot, "replacement", say)
        if shuts_down is None:
            say((*spot, "replacement"), "this needs shuts_down beside it")
    models = fields.get("model")
    price = KINDS[kinds[0]][1](fields, spot, say)
    return [
        PriceRow(whose, name, valid_from, source, price, shuts_down, own, replacement)
        for model in (models if isinstance(models, list | tuple) and models else [models])
        for name in [_text(model, spot, "model", say)]
    ]


def _token_price(fields: Mapping[str, object], spot: Spot, say: Say) -> Price:
    rates_spot = (*spot, "usd_per_million_tokens")
    quoted = _fields(fields["usd_per_million_tokens"], rates_spot, RATES, say)
    rates = {name: _rate(value, (*rates_spot, name), say) for name, value in quoted.items()}
    for cached, whole in (("cached_text_in", "text_in"), ("cached_image_in", "image_in")):
        if cached in rates and rates[cached] > rates.get(whole, -1):
            say((*rates_spot, cached), f"this needs a {whole} that is not below it")
    if "text_in" not in rates:
        say(rates_spot, "text_in is missing")
    needs = (
        ("output_tokens", "image_out"),
        ("input_image_tokens", "image_in"),
        ("max_output_tokens", "text_out"),
    )
    for name, rate in needs:
        if name in fields and rate not in rates:
            say((*spot, name), f"this needs the rate {rate}")
    for name, rate in needs[:2]:
        if rate in rates and name not in fields:
            say((*rates_spot, rate), f"this needs {name} beside the rates, for the bound")
    if "output_tokens" not in fields and "max_output_tokens" not in fields:
        say(spot, "a row needs output_tokens (it draws) or max_output_tokens (it writes)")
    return TokenPrice(
        text_in=rates.get("text_in", 0),
        image_in=rates.get("image_in"),
        text_out=rates.get("text_out"),
        image_out=rates.get("image_out"),
        cached_text_in=rates.get("cached_text_in"),
        cached_image_in=rates.get("cached_image_in"),
        output=_output(fields["output_tokens"], (*spot, "output_tokens"), say)
        if "output_tokens" in fields
        else None,
        input_image=_input_image(fields["input_image_tokens"], (*spot, "input_image_tokens"), say)
        if "input_image_tokens" in fields
        else None,
        margin_percent=_count(fields.get("margin_percent", 100), spot, "margin_percent", say, 100),
        soft=_flag(fields.get("soft", "false"), (*spot, "soft"), say),
        max_output_tokens=_count(fields["max_output_tokens"], spot, "max_output_tokens", say)
        if "max_output_tokens" in fields
        else None,
    )


def _image_price(fields: Mapping[str, object], spot: Spot, say: Say) -> Price:
    extra = fields.get("per_input_image", 0)
    return ImagePrice(
        _by_size(fields["per_image"], (*spot, "per_image"), _dollars, say),
        _dollars(extra, (*spot, "per_input_image"), say),
    )


Kind: TypeAlias = "tuple[tuple[str, ...], Callable[[Mapping[str, object], Spot, Say], Price]]"

KINDS: Mapping[str, Kind] = {
    "usd_per_million_tokens": (
        ("output_tokens", "input_image_tokens", "margin_percent", "soft", "max_output_tokens"),
        _token_price,
    ),
    "per_image": (("per_input_image",), _image_price),
}
"""The field that makes a row of a kind -> its other fields, and its reader."""


def _output(raw: object, spot: Spot, say: Say) -> BySize | ByAxis:
    if isinstance(raw, Mapping) and "table" in raw:
        fields = _fields(raw, spot, ("table",), say)
        return _by_size(fields["table"], (*spot, "table"), _tokens, say)
    fields = _fields(raw, spot, ("axes", *LIMITS, "table"), say)
    axes_spot = (*spot, "axes")
    axes = {
        quality: _count(value, axes_spot, quality, say, most=10_000)
        for quality, value in _qualities(fields.get("axes"), axes_spot, say).items()
    }
    limits = {name: _count(fields.get(name), spot, name, say) for name in LIMITS}
    return ByAxis(axes, **limits)


def _input_image(raw: object, spot: Spot, say: Say) -> int | Tiles:
    if not isinstance(raw, Mapping):
        return _tokens(raw, spot, say)
    names = ("high_square", "high_other")
    fields = _fields(raw, spot, names, say)
    square, other = (_count(fields.get(name), spot, name, say) for name in names)
    return Tiles(square, other)


def _by_size(raw: object, spot: Spot, read: Callable[[object, Spot, Say], int], say: Say) -> BySize:
    """One amount for all, or ``{size: amount}``, or ``{size: {quality: amount}}``."""
    if not isinstance(raw, Mapping):
        return BySize({"default": {"any": read(raw, spot, say)}})
    if not raw:
        say(spot, "this is empty")
    cells: dict[str, Mapping[str, int]] = {}
    for size, row in raw.items():
        here = (*spot, str(size))
        if size != "default" and not parse_size(str(size)):
            say(here, 'a size is written "1024x1024"; "default" is every other')
        if isinstance(row, Mapping):
            cells[str(size)] = {
                quality: read(amount, (*here, quality), say)
                for quality, amount in _qualities(row, here, say).items()
            }
        else:
            cells[str(size)] = {"any": read(row, here, say)}
    return BySize(cells)


def _qualities(raw: object, spot: Spot, say: Say) -> Mapping[str, object]:
    if not isinstance(raw, Mapping) or not raw:
        say(spot, "this is a list of qualities, each with its number")
        return {}
    for name in raw:
        if not _QUALITY.fullmatch(str(name)) or name == "auto":
            say((*spot, str(name)), "this is not a quality")
    return {str(name): value for name, value in raw.items()}


def _fields(raw: object, spot: Spot, allowed: Sequence[str], say: Say) -> Mapping[str, object]:
    """The members of a mapping; says every name that is not ``allowed``."""
    if not isinstance(raw, Mapping):
        say(spot, "fields are expected here, not a single value")
        return {}
    for name in raw:
        if name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, 1)
            if name in RATES and "usd_per_million_tokens" in allowed:
                near = [f"write it as usd_per_million_tokens: {{{name}: ...}}"]
            elif near:
                near = [f"{near[0]}?"]
            say((*spot, str(name)), "; ".join(("unknown field", *near)))
    return {str(name): value for name, value in raw.items()}


def _text(value: object, spot: Spot, name: str, say: Say) -> str:
    if not isinstance(value, str) or not value.strip():
        say(spot if value is None else (*spot, name), f"{name} is missing or not text")
        return ""
    return value.strip()


def _date(value: object, spot: Spot, name: str, say: Say) -> date:
    if type(value) is date:
        return value
    if value is None:
        say(spot, f"{name} is missing")
        return ALWAYS
    try:
        return date.fromisoformat(str(value))
    except ValueError:
        say((*spot, name), "a day is written 2026-11-22")
        return ALWAYS


def _flag(value: object, spot: Spot, say: Say) -> bool:
    if value not in (True, False, "true", "false"):
        say(spot, "this is true or false")
    return value in (True, "true")


def _count(
    value: object, spot: Spot, name: str, say: Say, least: int = 1, most: int = MAX_COUNT
) -> int:
    """A whole number, as an int or its digits."""
    here = (*spot, name)
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        say(here, f"this is a whole number from {least} to {most}")
        return least
    return value


def _tokens(value: object, spot: Spot, say: Say) -> int:
    return _count(value, spot[:-1], str(spot[-1]), say)


def _dollars(value: object, spot: Spot, say: Say) -> Money:
    """Dollars, as decimal text, ``Decimal`` or a whole number, in nano-dollars."""
    if isinstance(value, float):
        say(spot, 'a price needs exact digits: write it in quotes, "0.04"')
        return 0
    written = format(value, "f") if isinstance(value, Decimal) else without_exponent(str(value))
    if not isinstance(value, str | int | Decimal) or not _DECIMAL.fullmatch(written):
        say(spot, "a price is written in plain dollars: 0.04")
        return 0
    try:
        return parse_dollars(written)
    except ValueError as error:
        say(spot, str(error))
        return 0


def _rate(value: object, spot: Spot, say: Say) -> Money:
    """Dollars a million tokens, in nano-dollars a token."""
    per_token, rest = divmod(_dollars(value, spot, say), 1_000_000)
    if rest:
        say(spot, "this is finer than a nano-dollar a token: at most three decimals")
    return per_token
