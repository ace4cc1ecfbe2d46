"""What a storm must not have done to money: two sets of books and the clients' own notes, compared.

The gateway's database is read by plain SQL, by somebody who knows nothing of the gateway's code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Query = Callable[[str], Sequence[Sequence[Any]]]
"""Runs one statement in the one snapshot that everything is read from."""


@dataclass(frozen=True, slots=True)
class Hold:
    rid: str
    state: str
    bound: int
    cost: int
    accounts: tuple[str, ...]
    flags: tuple[str, ...]
    key: str | None
    """The idempotency key, which is the call's name: None where a voided call gave it up."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """Everything that was booked. Money is nano-dollars."""

    holds: Sequence[Hold]
    balances: Mapping[str, tuple[int, int]]
    """Account -> posted, pending."""
    daily_cost: int
    journal: Sequence[tuple[str, str, int, int]]
    """rid, kind, pending, posted, in the order of commits."""

    @classmethod
    def read(cls, query: Query) -> Ledger:
        return cls(
            holds=[
                Hold(
                    rid, state, bound, cost, tuple(json.loads(accounts)), tuple(json.loads(flags)),
                    # As its client wrote it: the ledger has its route before it.
                    key and key.rpartition(":")[2],
                )
                for rid, state, bound, cost, accounts, flags, key in query(
                    "SELECT rid, state, bound, cost, accounts, flags, idempotency_key FROM hold"
                )
            ],
            balances={
                account: (posted, pending)
                for account, posted, pending in query(
                    "SELECT account, posted, pending FROM balance"
                )
            },
            daily_cost=int(query("SELECT coalesce(sum(cost), 0) FROM usage_daily")[0][0]),
            journal=[
                (rid, kind, pending, posted)
                for rid, kind, pending, posted in query(
                    "SELECT rid, kind, pending, posted FROM journal ORDER BY seq"
                )
            ],
        )  # fmt: skip


@dataclass(slots=True)
class Notes:
    """What the clients were told, by the name of each call."""

    charged: dict[str, int] = field(default_factory=dict)
    """Answered with a picture: the cost that its header named."""
    sent: int = 0
    refused: int = 0
    """Budget refusals."""
    unavailable: int = 0
    """503: a store was away, nothing was bought."""
    unknown: int = 0
    """502, 504 and 500: it may have been bought, and they were told so."""
    repeated: int = 0
    """409: the call was sent before under the same key."""
    replayed: int = 0
    """Asked for again after it had broken, and answered for nothing."""
    gone: int = 0
    """410: it was bought, and its picture died with its process, or with a Valkey."""
    broken: int = 0
    """The connection broke: its process was killed."""
    surprises: list[str] = field(default_factory=list)
    """Answers that no storm explains."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Each is 0, or money was lost. Amounts are nano-dollars."""

    lost: int
    """Charges that a client was told of and the books do not have, or not at that amount."""
    doubled: int
    """Calls that were bought or booked twice."""
    over_budget_nanousd: int
    sums_wrong: int
    """Accounts, holds and days whose two sums differ."""
    under_billed: int
    """Calls for which the upstream billed more than the books have."""
    stuck: int
    """Holds that never ended."""
    surprises: int
    details: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        return not self.details


def judge(
    ledger: Ledger, notes: Notes, billed: Iterable[tuple[str, int]], budgets: Mapping[str, int]
) -> Verdict:
    """``billed`` is every purchase on the upstream's own bill, by the call's name; ``budgets``
    are hard limits by account."""
    details: list[str] = []

    def count(found: Iterable[str], what: str) -> int:
        each = [f"{what}: {one}" for one in found]
        details.extend(each[:10])
        return len(each)

    named: dict[str, list[Hold]] = {}
    for hold in ledger.holds:
        if hold.key is not None:
            named.setdefault(hold.key, []).append(hold)
    bill: dict[str, list[int]] = {}
    for name, amount in billed:
        bill.setdefault(name, []).append(amount)

    def booked(name: str) -> int:
        return sum(hold.cost for hold in named.get(name, ()))

    lost = count(
        (
            f"{name} was answered for {cost}, booked are {booked(name)}"
            for name, cost in notes.charged.items()
            if [(hold.state, hold.cost) for hold in named.get(name, ())] != [("P", cost)]
        ),
        "lost",
    )
    doubled = count((name for name, all_of in bill.items() if len(all_of) > 1), "bought twice")
    doubled += count((name for name, all_of in named.items() if len(all_of) > 1), "booked twice")
    over = {
        account: ledger.balances[account][0] - limit
        for account, limit in budgets.items()
        if account in ledger.balances and ledger.balances[account][0] > limit
    }
    count((f"{account} by {amount}" for account, amount in over.items()), "over budget")
    under = count(
        (
            f"{name}: billed {sum(amounts)}, booked {booked(name)}"
            for name, amounts in bill.items()
            if booked(name) < sum(amounts)
        ),
        "under the bill",
    )
    return Verdict(
        lost=lost,
        doubled=doubled,
        over_budget_nanousd=sum(over.values()),
        sums_wrong=count(_wrong_sums(ledger), "sums differ"),
        under_billed=under,
        stuck=count((hold.rid for hold in ledger.holds if hold.state == "H"), "never ended"),
        surprises=count(notes.surprises, "unexpected answer"),
        details=tuple(details),
    )


def _wrong_sums(ledger: Ledger) -> Iterable[str]:
    """Every sum that can be taken two ways (I2, I3 of money.md), where it differs."""
    posted, pending = dict.fromkeys(ledger.balances, 0), dict.fromkeys(ledger.balances, 0)
    for hold in ledger.holds:
        for account in hold.accounts:
            posted[account] = posted.get(account, 0) + hold.cost
            pending[account] = pending.get(account, 0) + (hold.bound if hold.state == "H" else 0)
    for account, (kept, held) in ledger.balances.items():
        if (kept, held) != (posted[account], pending[account]):
            yield f"{account} has {(kept, held)}, its holds {(posted[account], pending[account])}"
    moved: dict[str, tuple[str, int, int]] = {}
    for rid, kind, held, spent in ledger.journal:
        kinds, before_held, before_spent = moved.get(rid, ("", 0, 0))
        moved[rid] = (kinds + kind, before_held + held, before_spent + spent)
    for hold in ledger.holds:
        kinds, held, spent = moved.pop(hold.rid, ("", 0, 0))
        # However often it went elsewhere (B), before it ended.
        kinds = re.sub("^HB+", "H", kinds)
        if kinds not in ("H", "HP", "HV", "HX", "HXP", "HXV") or kinds[-1] != hold.state:
            yield f"{hold.rid} is {hold.state}, its journal {kinds}"
        if (held, spent) != (hold.bound if hold.state == "H" else 0, hold.cost):
            yield f"{hold.rid} cost {hold.cost}, its journal {spent}"
    for rid in moved:
        yield f"{rid} has a journal and no hold"
    total = sum(hold.cost for hold in ledger.holds)
    if ledger.daily_cost != total:
        yield f"the days have {ledger.daily_cost}, the holds {total}"
