"""Dollars in and out of whole nano-dollars, with nothing lost on the way."""

from __future__ import annotations

import ast
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.money import MAX_NANOUSD, format_dollars, parse_dollars, say_dollars

DOMAIN = Path(__file__).parents[2] / "gateway" / "domain"


@pytest.mark.parametrize(
    ("written", "nanousd"),
    [
        ("50.00", 50_000_000_000),
        ("0.05268", 52_680_000),
        ("0", 0),
        ("0.000000001", 1),
        ("1e-9", 1),
        ("1E3", 1_000_000_000_000),
        (" 5 ", 5_000_000_000),
        ("-0", 0),
        ("00.10", 100_000_000),
        ("9223372036", 9_223_372_036_000_000_000),
        (50, 50_000_000_000),
        (Decimal("0.1"), 100_000_000),
    ],
)
def test_what_operators_write(written: str | int | Decimal, nanousd: int) -> None:
    assert parse_dollars(written) == nanousd
    assert type(parse_dollars(written)) is int


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("", "not an amount"),
        ("fifty", "not an amount"),
        ("$50", "not an amount"),
        ("50,00", "not an amount"),
        ("-0.01", "zero or more"),
        (-1, "zero or more"),
        ("nan", "zero or more"),
        ("inf", "zero or more"),
        ("-inf", "zero or more"),
        ("sNaN", "zero or more"),
        ("0.0000000001", "finer"),
        ("0.00000000100000000000000000000000001", "finer"),
        ("9223372037", "more than the ledger"),
        ("9223372036.1", "more than the ledger"),
        ("1e30", "more than the ledger"),
        ("1e999999", "more than the ledger"),
        (0.1, "binary float"),
        (5.0, "binary float"),
        (True, "binary float"),
    ],
)
def test_what_is_no_amount(written: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_dollars(written)


@pytest.mark.parametrize(
    ("nanousd", "exact", "said"),
    [
        (0, "0", "$0.00"),
        (1, "0.000000001", "less than $0.001"),
        (499_999, "0.000499999", "less than $0.001"),
        (500_000, "0.0005", "$0.001"),
        (5_880_000, "0.00588", "$0.006"),
        (52_680_000, "0.05268", "$0.053"),
        (99_499_999, "0.099499999", "$0.099"),
        (99_999_999, "0.099999999", "$0.100"),
        (100_000_000, "0.1", "$0.10"),
        (104_999_999, "0.104999999", "$0.10"),
        (105_000_000, "0.105", "$0.11"),
        (1_000_000_000, "1", "$1.00"),
        (49_870_000_000, "49.87", "$49.87"),
        (MAX_NANOUSD, "9223372036.854775807", "$9223372036.85"),
        (-5_880_000, "-0.00588", "-$0.006"),
        (-49_870_000_000, "-49.87", "-$49.87"),
    ],
)
def test_exact_for_machines_and_short_for_people(nanousd: int, exact: str, said: str) -> None:
    assert format_dollars(nanousd) == exact
    assert say_dollars(nanousd) == said


@given(st.integers(0, 9_223_372_036 * 10**9))
def test_there_and_back_is_the_same_amount(nanousd: int) -> None:
    assert parse_dollars(format_dollars(nanousd)) == nanousd


@given(st.integers(-MAX_NANOUSD, MAX_NANOUSD))
def test_what_is_written_is_exact_and_has_no_useless_zeros(nanousd: int) -> None:
    written = format_dollars(nanousd)
    assert Decimal(written).scaleb(9) == nanousd
    assert not ("." in written and written.endswith(("0", ".")))
    assert "e" not in written.lower()


@given(st.integers(0, MAX_NANOUSD))
def test_what_is_said_is_off_by_half_a_cent_at_most(nanousd: int) -> None:
    said = say_dollars(nanousd)
    if said == "less than $0.001":
        assert 0 < nanousd < 500_000
        return
    allowed = 500_000 if 0 < nanousd < 100_000_000 else 5_000_000
    assert abs(int(Decimal(said.removeprefix("$")).scaleb(9)) - nanousd) <= allowed


@pytest.mark.parametrize("file", ["money", "price", "price_images", "price_tokens", "tokens"])
def test_money_is_never_a_float(file: str) -> None:
    tree = ast.parse((DOMAIN / f"{file}.py").read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Div) or file == "money", f"{file}.py divides"
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float))
        called = node.func if isinstance(node, ast.Call) else None
        assert not (isinstance(called, ast.Name) and called.id == "float")
