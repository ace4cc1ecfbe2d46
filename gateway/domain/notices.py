"""What somebody should hear of: budgets that are nearly, or wholly, used up."""

from __future__ import annotations

from enum import StrEnum

from gateway.domain.ledger import Balance
from gateway.domain.money import Money, format_dollars
from gateway.domain.quota import Limit
from gateway.domain.record import record


class Kind(StrEnum):
    """Which of an account's two amounts a mark is on."""

    HARD = "budget"
    SOFT = "soft_budget"


@record
class Mark:
    """``percent`` of an amount of money, in nano-dollars."""

    kind: Kind
    percent: int
    amount: Money

    @property
    def name(self) -> str:
        """``budget:80``: the label of the metric."""
        return f"{self.kind}:{self.percent}"

    @property
    def claim(self) -> str:
        """What is told once for an account: ``budget:80/50.5``. A budget that was raised is another
        one, and warns anew."""
        return f"{self.name}/{format_dollars(self.amount)}"

    @property
    def event(self) -> str:
        """The type of its message."""
        return f"{self.kind}.{'reached' if self.percent == 100 else 'warning'}"


def marks(
    limit: Limit, balance: Balance, warn_percent: int, refused: Money = 0
) -> tuple[Mark, ...]:
    """The marks that an account has passed, by what is posted: the warning, then the whole, of the
    hard amount and then of the soft one.

    What running calls hold does not count: most of it is given back. Nothing spent passes nothing.
    ``refused`` is the dearest bound of a call that was refused. A hard amount is hardly ever spent
    to the last cent, so it is reached, too, when it was warned of and such a call has no room.
    """
    found = []
    for kind, amount in ((Kind.HARD, limit.amount), (Kind.SOFT, limit.soft)):
        if amount is not None and balance.posted > 0:
            passed = {
                percent
                for percent in (warn_percent, 100)
                if balance.posted * 100 >= amount * percent
            }
            if kind is Kind.HARD and passed and balance.posted + refused > amount:
                passed.add(100)
            found += [Mark(kind, percent, amount) for percent in sorted(passed)]
    return tuple(found)
