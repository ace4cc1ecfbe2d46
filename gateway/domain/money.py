"""Money is a whole number of nano-dollars (1 USD = 1_000_000_000), never a float.

$30 per million tokens is exactly 30_000 nano-dollars a token, so every published price is exact.
"""

from __future__ import annotations

import re
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from fractions import Fraction
from functools import lru_cache
from typing import TypeAlias

Money: TypeAlias = int
"""Nano-dollars. A plain int: names that hold one end in ``_nanousd`` where the type is not near."""

NANOS_PER_DOLLAR = 1_000_000_000
MAX_NANOUSD = 2**63 - 1

_SCIENTIFIC = re.compile(r"[0-9](\.[0-9]{1,30})?[eE][+-]?[0-9]{1,2}", re.ASCII)


def parse_dollars(text: str | int | Decimal) -> Money:
    """Dollars, as an operator writes them ("50.00"), to nano-dollars.

    Raises ``ValueError`` for what is not a number, is negative, is finer than a nano-dollar or
    does not fit 64 bits. Floats are refused by type: ``0.1`` has already lost its exactness.
    """
    if isinstance(text, (bool, float)):
        raise ValueError("dollars are written as decimal text, not as a binary float")
    try:
        dollars = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{text!r} is not an amount of dollars, like 1.50") from None
    if not dollars.is_finite() or dollars < 0:
        raise ValueError(f"{text!r} is not an amount of dollars: it must be zero or more")
    if dollars > MAX_NANOUSD // NANOS_PER_DOLLAR:
        raise ValueError(f"{text!r} dollars is more than the ledger can hold")
    # Decimal's own arithmetic rounds to 28 digits, so a longer fraction would look exact.
    nanos = Fraction(dollars) * NANOS_PER_DOLLAR
    if nanos.denominator != 1:
        raise ValueError(f"{text!r} dollars is finer than a nano-dollar")
    return nanos.numerator


def without_exponent(number: str) -> str:
    """``5e-05`` as ``0.00005``, with every digit; any other text as it is.

    Programs that write YAML (helm is one) put small and large numbers so.
    """
    return format(Decimal(number), "f") if _SCIENTIFIC.fullmatch(number) else number


@lru_cache(maxsize=1024)
def format_dollars(nanousd: Money) -> str:
    """Exact decimal dollars without trailing zeros: ``52680000`` -> ``"0.05268"``. A request says
    its few amounts, those of its price, a dozen times."""
    sign, rest = ("-", -nanousd) if nanousd < 0 else ("", nanousd)
    whole, fraction = divmod(rest, NANOS_PER_DOLLAR)
    digits = f"{fraction:09d}".rstrip("0")
    return f"{sign}{whole}.{digits}" if digits else f"{sign}{whole}"


def exact_dollars(nanousd: Money) -> str:
    """Exact, for people: ``$0.35``, ``-$0.35``."""
    return f"{'-' if nanousd < 0 else ''}${format_dollars(abs(nanousd))}"


def say_dollars(nanousd: Money) -> str:
    """Dollars for a sentence: cents where they say enough, more digits for less than a dime.

    ``49_870_000_000`` -> ``"$49.87"``, ``5_880_000`` -> ``"$0.006"``, ``0`` -> ``"$0.00"``.
    """
    places = "0.01" if nanousd == 0 or abs(nanousd) >= NANOS_PER_DOLLAR // 10 else "0.001"
    dollars = Decimal(nanousd) / NANOS_PER_DOLLAR
    rounded = dollars.quantize(Decimal(places), rounding=ROUND_HALF_UP)
    if rounded == 0 and nanousd > 0:
        return "less than $0.001"
    return f"-${-rounded}" if rounded < 0 else f"${rounded}"
