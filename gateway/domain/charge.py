"""What a call owes, once it is known how it ended. Pure: the whole policy is this table.

=============================  =========  =====================================
delivered, usage               settle     measured
delivered, no usage            settle     n x price, else the bound; ``estimated``
bought, but no picture         settle     measured, else the bound; ``estimated``
surely not billed              void       nothing
outcome unknown                expire     the bound, until a later truth corrects it
=============================  =========  =====================================
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.domain.call import Usage
from gateway.domain.ledger import Basis, Event, Outcome, Settlement
from gateway.domain.money import Money
from gateway.domain.price import FACTOR_ONE, Answer, Bound, Confidence, PriceList, PriceRow


@dataclass(frozen=True, slots=True)
class Quote:
    """What is known of a call's price before it: the bound, and the row it came from.

    ``row`` is None for an unpriced model that the operator allows; ``bound`` is then what is held
    and, without better knowledge, booked (0, or ``max_cost_per_request``). ``base`` is what
    the row alone says, ``factor`` what that was raised by, in millionths.
    """

    bound: Bound
    prices: PriceList
    row: PriceRow | None
    base: Money = 0
    factor: int = FACTOR_ONE

    @property
    def price_id(self) -> str:
        return self.row.id if self.row else ""


@dataclass(frozen=True, slots=True)
class Ending:
    """How an upstream call ended. ``invalid_usage``: it carried a usage that cannot be true."""

    outcome: Outcome
    answer: Answer | None = None
    invalid_usage: bool = False


def charge(rid: str, quote: Quote, ending: Ending) -> Settlement:
    """The settlement that ``ending`` owes under ``quote``."""
    if ending.outcome is Outcome.REFUSED:
        return Settlement(rid, Event.VOID, ending.outcome, Basis.NONE)
    soft = ("soft",) if quote.bound.confidence is Confidence.SOFT else ()
    if ending.outcome is Outcome.UNKNOWN:
        flags = soft if quote.row else (*soft, "unpriced")
        return Settlement(
            rid, Event.EXPIRE, ending.outcome, Basis.ESTIMATED, quote.bound.amount, flags=flags
        )
    answer = ending.answer or Answer(0)
    measured = quote.row.price.cost(answer, quote.prices) if quote.row else None
    flags = soft
    if quote.row is None:
        flags = (*flags, "unpriced")
    elif ending.invalid_usage:
        flags = (*flags, "invalid_usage")
    elif measured is None:
        # Also where a usage says too little for the row; a price per picture needs none.
        flags = (*flags, "no_usage")
    cost: Money = quote.bound.amount if measured is None else measured
    if measured is not None and answer.tokens is not None:
        basis = Basis.USAGE
    else:
        basis = Basis.ESTIMATED if quote.row or cost else Basis.NONE
    if cost > quote.bound.amount:
        flags = (*flags, "over_bound")
    return Settlement(
        rid,
        Event.SETTLE,
        ending.outcome,
        basis,
        cost,
        answer.tokens or Usage(),
        answer.images if ending.outcome is Outcome.DELIVERED else 0,
        flags,
    )
