"""What a person does with the books: looks a call up, corrects it, adjusts a sum, audits them.

Corrections and adjustments are the journal's kind ``A``: signed by whoever made them, with a
reason, keyed by an id so that they may be repeated, and never undone but by another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from gateway.domain.call import Json
from gateway.domain.ledger import Basis, Outcome, Part, State
from gateway.domain.money import Money
from gateway.domain.record import record


@record
class Hold:
    """A reservation as the books have it, whatever became of it. Money is nano-dollars.

    ``accounts`` are the rows that it draws on. ``outcome`` and ``basis`` are None while it is
    held.
    """

    rid: str
    state: State
    bound: Money
    cost: Money
    accounts: tuple[str, ...]
    team: str
    key_id: str
    model: str
    operation: str
    upstream: str
    images: int
    price_id: str
    worker: str
    at: datetime
    lease_ends: datetime
    idempotency_key: str | None = None
    outcome: Outcome | None = None
    basis: Basis | None = None
    flags: tuple[str, ...] = ()
    user: str = ""
    """The end user of the call, as a hash; empty where nobody said."""
    drawn: Part | None = None
    """Of the cost, that of another model; without its usage."""


@dataclass(frozen=True, slots=True)
class JournalLine:
    """One event of the journal, for ever. ``kind`` is the state it led to (H, P, V, X), A for a
    correction or an adjustment, B for a raised bound.

    ``pending`` and ``posted`` are what it added to each account; ``detail`` is what else it said.
    """

    seq: int
    at: datetime | None
    rid: str
    kind: str
    pending: Money
    posted: Money
    detail: Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Correction:
    """The truth about one call, said by a person or a reconciliation: it cost ``cost``.

    An expired or doubtful hold is resolved by it: it is POSTED, without flags. ``images`` were
    delivered, where that is known (an expired hold counts none). Of a call that another model drew
    for, that one's part becomes its share of ``cost`` (``transition.corrected_part``).
    """

    id: str
    rid: str
    cost: Money
    reason: str
    actor: str
    at: datetime
    images: int = 0


@dataclass(frozen=True, slots=True)
class Adjustment:
    """A signed sum on a team's books that belongs to no call: a drift that was reconciled.

    ``day`` (``2026-11-22``) and ``model`` say which row of the daily usage it corrects;
    ``accounts`` are the balances it moves.
    """

    id: str
    team: str
    model: str
    day: str
    amount: Money
    accounts: tuple[str, ...]
    reason: str
    actor: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Discrepancy:
    """Two sums of the books that should be one and are not: a defect, or a damaged file.

    ``what`` names them (``posted of team:growth|m|2026-11``), ``kept`` is what the row says and
    ``summed`` what its parts add up to.
    """

    what: str
    kept: int
    summed: int
