"""What a call owes, once it is known how it ended. Pure: the whole policy is this table.

=============================  =========  =====================================
delivered, usage               settle     measured
delivered, no usage            settle     n x price, else the bound; ``estimated``
bought, but no picture         settle     measured, else the bound; ``estimated``
surely not billed              void       nothing
outcome unknown                expire     the bound, until a later truth corrects it
=============================  =========  =====================================

Of a response, what was measured has two parts, one for each model that is billed. A bound is of
both together, and stays with the model that was asked for.
"""

from __future__ import annotations

from datetime import datetime

from gateway.domain.call import Usage
from gateway.domain.ledger import Basis, Event, Outcome, Part, Settlement
from gateway.domain.money import Money
from gateway.domain.price import FACTOR_ONE, Answer, Bound, Confidence, PriceList, PriceRow
from gateway.domain.price_response import ResponsePrice
from gateway.domain.record import record


@record
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
    draws: str = ""
    """The configured name of the model behind the image tool of a response; empty where there is
    none."""

    @property
    def price_id(self) -> str:
        return self.row.id if self.row else ""


@record
class Ending:
    """How an upstream call ended. ``invalid_usage``: it carried a usage that cannot be true."""

    outcome: Outcome
    answer: Answer | None = None
    invalid_usage: bool = False


def charge(rid: str, quote: Quote, ending: Ending, at: datetime | None = None) -> Settlement:
    """The settlement that ``ending`` owes under ``quote``, booked ``at``."""
    if ending.outcome is Outcome.REFUSED:
        return Settlement(rid, Event.VOID, ending.outcome, Basis.NONE, at=at)
    soft = ("soft",) if quote.bound.confidence is Confidence.SOFT else ()
    if ending.outcome is Outcome.UNKNOWN:
        flags = soft if quote.row else (*soft, "unpriced")
        return Settlement(
            rid,
            Event.EXPIRE,
            ending.outcome,
            Basis.ESTIMATED,
            quote.bound.amount,
            flags=flags,
            at=at,
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
    images = answer.images if ending.outcome is Outcome.DELIVERED else 0
    return Settlement(
        rid,
        Event.SETTLE,
        ending.outcome,
        basis,
        cost,
        answer.tokens or Usage(),
        images,
        flags,
        at=at,
        drawn=_drawn(quote, answer, images, measured),
    )


def _drawn(quote: Quote, answer: Answer, images: int, measured: Money | None) -> Part | None:
    """What the model behind the tool has of a settlement; None where it did nothing."""
    if not quote.draws or (answer.usage is None and not answer.images):
        return None
    cost: Money | None = 0
    if measured is not None and quote.row is not None:
        price = quote.row.price
        cost = price.picture_cost(answer, quote.prices) if isinstance(price, ResponsePrice) else 0
    return Part(quote.draws, images, cost or 0, answer.usage or Usage())
