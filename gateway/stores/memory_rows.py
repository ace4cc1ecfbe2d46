"""The rows of a store in memory, as plain values: what its views share.

Every method of a view gives way to other tasks once before it touches anything, because a store
that never awaits hides what cancellation and concurrency do to its callers. After that it runs to
its end without a break, which is its lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from gateway.domain.books import Adjustment, JournalLine
from gateway.domain.call import Json
from gateway.domain.ledger import Balance, Basis, Claim, Entry, Outcome, Part, Route, State
from gateway.domain.money import Money
from gateway.domain.owned import Owned
from gateway.domain.transition import Counts, Move, usage_day

NOTHING = Balance()


@dataclass(slots=True)
class MemoryHold:
    """A claim, as it was rerouted last, and where it has got to. ``accounts`` are those of its
    lines, each once."""

    claim: Claim
    accounts: tuple[str, ...]
    state: State = State.HELD
    cost: Money = 0
    flags: tuple[str, ...] = ()
    outcome: Outcome | None = None
    basis: Basis | None = None
    drawn: Part | None = None

    @property
    def day(self) -> str:
        return usage_day(self.claim.at)

    @property
    def route(self) -> Route:
        return Route(self.claim.model, self.claim.upstream, self.claim.price_id)

    def go(self, route: Route, bound: Money) -> None:
        self.claim = replace(self.claim, bound=bound, **route._asdict())


@dataclass(slots=True)
class MemoryRows:
    """One store. Tests may damage it to see who notices."""

    holds: dict[str, MemoryHold] = field(default_factory=dict)
    keys: dict[tuple[str, str], str] = field(default_factory=dict)
    """(team, idempotency key) to the rid it stands for."""
    balances: dict[str, Balance] = field(default_factory=dict)
    usage: dict[tuple[str, str, str, str], Counts] = field(default_factory=dict)
    journal: list[JournalLine] = field(default_factory=list)
    corrections: set[str] = field(default_factory=set)
    """The ids of those that were applied."""
    adjustments: dict[str, Adjustment] = field(default_factory=dict)
    forgotten: list[MemoryHold] = field(default_factory=list)
    """Holds that were forgotten, for what their users did."""
    rolled_up: dict[str, Money] = field(default_factory=dict)
    """Account to what its forgotten holds had posted; '' is all of them once."""
    workers: dict[str, datetime] = field(default_factory=dict)
    notices: dict[tuple[str, str], tuple[datetime, datetime | None]] = field(default_factory=dict)
    """(account, mark) to when it was claimed, and when it was sent."""
    factors: dict[tuple[str, str], int] = field(default_factory=dict)
    owned: dict[str, Owned] = field(default_factory=dict)
    events: int = 0

    def read(self, accounts: Iterable[str]) -> tuple[Balance, ...]:
        return tuple(self.balances.get(account, NOTHING) for account in accounts)

    def add(self, accounts: Iterable[str], pending: Money, posted: Money) -> None:
        for account in accounts:
            before = self.balances.get(account, NOTHING)
            self.balances[account] = Balance(before.posted + posted, before.pending + pending)

    def count(self, day: str, team: str, key_id: str, gains: Iterable[tuple[str, Counts]]) -> None:
        """Adds to the roll-up of a day, by model."""
        for model, counts in gains:
            row = (day, team, key_id, model)
            self.usage[row] = self.usage.get(row, Counts()).plus(counts)

    def write_journal(
        self,
        at: datetime | None,
        rid: str,
        kind: str,
        *,
        pending: Money = 0,
        posted: Money = 0,
        detail: Mapping[str, Json] | None = None,
    ) -> None:
        self.events += 1
        line = JournalLine(self.events, at, rid, kind, pending, posted, detail or {})
        self.journal.append(line)

    def key_of(self, hold: MemoryHold) -> str | None:
        """The idempotency key that still stands for this hold."""
        key = hold.claim.idempotency_key
        if key is not None and self.keys.get((hold.claim.team, key)) == hold.claim.rid:
            return key
        return None

    def entry_of(self, hold: MemoryHold, move: Move) -> Entry:
        """A hold after ``move``, with what its accounts are now."""
        return Entry(
            hold.claim.rid,
            move.state,
            hold.claim.bound,
            move.cost,
            move.applied,
            self.read(hold.accounts),
            tuple(hold.accounts),
        )
