"""What a provider says it billed, in whole nano-dollars."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from gateway.domain.money import MAX_NANOUSD, NANOS_PER_DOLLAR, Money

FINEST_EXPONENT = -60
"""Digits behind the point that are looked at; what is finer is no money of anybody's."""


@dataclass(frozen=True, slots=True)
class BilledItem:
    """One line of a provider's bill of a day, as the provider names it
    (``gpt-image-2.5-flare, image output``). Credits are negative."""

    line_item: str
    amount: Money


def round_dollars(value: str | int | Decimal) -> Money:
    """A provider's amount of dollars to the nearest nano-dollar, halves to even.

    Providers send JSON floats, whose text is only near the amount: ``0.05999999999999999778``.
    Give the text or its ``Decimal``, never a float. Raises ``ValueError`` for what is no amount
    or does not fit 64 bits.
    """
    if isinstance(value, (bool, float)):
        raise ValueError("dollars are read from their text, not from a binary float")
    try:
        dollars = Decimal(value)
    except InvalidOperation:
        raise ValueError(f"{value!r} is not an amount of dollars") from None
    if not dollars.is_finite():
        raise ValueError(f"{value!r} is not an amount of dollars")
    if abs(dollars) > MAX_NANOUSD // NANOS_PER_DOLLAR:
        raise ValueError(f"{value!r} dollars is more than the ledger can hold")
    if dollars.adjusted() < FINEST_EXPONENT:
        return 0
    return round(Fraction(dollars) * NANOS_PER_DOLLAR)
