"""The two-phase ledger: hold, then post, void or expire (money.md 3).

::

              reserve (fits)                  settle(actual)
    none ───────────────────► HELD ──────────────────────────► POSTED
                               │ void(proof)                      ▲
                               ├──────────────► VOIDED ◄──┐       │ settle(actual)
                               │ expire        void(proof)│       │
                               └──────────────► EXPIRED ──┴───────┘

A HELD call may be rerouted: its bound grows where the other way is dearer, or it stays as it is.
An EXPIRED hold is posted at its bound: the picture has probably been bought. A later truth
corrects it. Every call is keyed by the request's id and may be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from gateway.domain.call import Operation, Usage
from gateway.domain.money import Money
from gateway.domain.quota import Limit, Period
from gateway.domain.record import record


class State(StrEnum):
    HELD = "H"
    POSTED = "P"
    VOIDED = "V"
    EXPIRED = "X"


class Basis(StrEnum):
    """Where the cost came from; the value of ``x-cost-basis``."""

    USAGE = "usage"
    ESTIMATED = "estimated"
    NONE = "none"


class Outcome(StrEnum):
    DELIVERED = "delivered"
    REPLAYED = "replayed"
    """Answered from the cache: nothing was bought."""
    REFUSED = "refused"
    """Surely not billed."""
    BROKEN = "broken"
    """Something was bought, but the answer was no picture (empty data, HTML, error after a
    partial image)."""
    UNKNOWN = "unknown"


class Event(StrEnum):
    SETTLE = "settle"
    VOID = "void"
    EXPIRE = "expire"


@dataclass(frozen=True)
class Line:
    """One account a call draws on, in the period it was reserved in.

    ``account`` names the balance row: ``team:growth|d|2026-11-22``.
    """

    limit: Limit
    period: Period

    @cached_property
    def account(self) -> str:
        return f"{self.limit.scope}:{self.limit.owner}|{self.period.label}"


@record
class Claim:
    """What a reservation asks for. ``bound`` is the most the call can cost, in nano-dollars.

    ``fingerprint`` guards the idempotency key against another body. ``lease_ends`` is when a
    sweep may expire the hold.
    """

    rid: str
    team: str
    key_id: str
    model: str
    operation: Operation
    upstream: str
    images: int
    bound: Money
    lines: tuple[Line, ...]
    at: datetime
    lease_ends: datetime
    price_id: str = ""
    fingerprint: str = ""
    idempotency_key: str | None = None
    worker: str = ""
    repeat_unknown: bool = False
    """The idempotency key may also be taken over from a call whose outcome is unknown
    (``on_unknown: repeat``): a person has decided that to buy it twice is better than not at
    all."""
    user: str = ""
    """The end user of the call, as a hash; empty where nobody said, or it is not to be kept."""


class Balance(NamedTuple):
    """An account in nano-dollars: ``posted`` is spent, ``pending`` is held by running calls.

    Each call makes sixteen of them; a tuple is made in a third of a dataclass's time."""

    posted: Money = 0
    pending: Money = 0

    @property
    def used(self) -> Money:
        return self.posted + self.pending


@record
class Held:
    """The claim is held, durably. ``balances`` are of its lines, in their order, this one in."""

    rid: str
    balances: tuple[Balance, ...] = ()
    duplicate: bool = False
    """The same was asked before; nothing was taken twice."""


@record
class Denied:
    """``line`` has no room; nothing was taken. ``balance`` is without this call."""

    line: Line
    balance: Balance


@record
class Claimed:
    """The idempotency key belongs to another call of the team: ``rid``, in ``state``."""

    rid: str
    state: State
    same_fingerprint: bool


class Route(NamedTuple):
    """Where a held call goes, and by which price it is bounded and settled."""

    model: str
    upstream: str
    price_id: str


@record
class Reroute:
    """A held call goes elsewhere than it was reserved for: to ``upstream``, as the configured
    ``model``, under another price. What is held becomes ``bound`` where that is more, never less:
    what was tried before may yet turn out to cost. ``lines`` are those of its claim: their limits
    are looked at again, but the accounts stay those that were reserved."""

    rid: str
    model: str
    upstream: str
    price_id: str
    bound: Money
    lines: tuple[Line, ...]
    at: datetime

    @property
    def route(self) -> Route:
        return Route(self.model, self.upstream, self.price_id)


@record
class Part:
    """Of a call, what another model than its own drew: the one behind a response's image tool. The
    provider bills it under that one's name.

    ``model`` is its configured name, ``images`` were delivered, ``cost`` is in nano-dollars. The
    books keep no ``usage`` of it beside a hold: that stands in the journal."""

    model: str
    images: int = 0
    cost: Money = 0
    usage: Usage = field(default_factory=Usage)


@record
class Settlement:
    """How a call ended and what it owes, in nano-dollars. ``images`` were delivered. Raises
    ``ValueError`` where ``drawn`` is more than the whole."""

    rid: str
    event: Event
    outcome: Outcome
    basis: Basis
    cost: Money = 0
    usage: Usage = field(default_factory=Usage)
    images: int = 0
    flags: tuple[str, ...] = ()
    """A closed list: ``unpriced``, ``no_usage``, ``invalid_usage``, ``over_bound``, ``soft``."""
    at: datetime | None = None
    """When it was settled, for the journal."""
    drawn: Part | None = None
    """Contained in ``cost``, ``usage`` and ``images``, which are the whole."""

    def __post_init__(self) -> None:
        if self.drawn is not None and not 0 <= self.drawn.cost <= max(self.cost, 0):
            raise ValueError("what another model drew is a part of the cost, and never negative")


@record
class Entry:
    """A reservation as the ledger has it after an event; the first final answer wins.

    ``cost`` is what is posted. ``applied`` is False where the event was a repeat.
    """

    rid: str
    state: State
    bound: Money
    cost: Money
    applied: bool
    balances: tuple[Balance, ...] = ()
    accounts: tuple[str, ...] = ()
    """Whose balances these are."""


@record
class Replay:
    """A call answered from the cache, for the books: no money moves, ``avoided`` is counted."""

    rid: str
    team: str
    key_id: str
    model: str
    operation: Operation
    images: int
    avoided: Money
    at: datetime
    draws: str = ""
    """The model whose pictures they are, where it is not ``model``: that of a response's tool."""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What one team, key and model did on one UTC day. Money is nano-dollars.

    ``unresolved`` counts the expired holds among ``requests``, whose cost is their bound.
    Requests that were voided count nowhere. A request counts with the model that it asked for; what
    another one drew for it (``Part``) is in that one's row, without a request.
    """

    day: str
    team: str
    key_id: str
    model: str
    requests: int = 0
    images: int = 0
    cached_requests: int = 0
    text_in: int = 0
    image_in: int = 0
    text_out: int = 0
    image_out: int = 0
    cost: Money = 0
    avoided: Money = 0
    unresolved: int = 0
    unresolved_cost: Money = 0
    flagged: int = 0


class By(StrEnum):
    """What rows of usage are added up by. A key is its team's; a month is ``2026-11``."""

    DAY = "day"
    MONTH = "month"
    TEAM = "team"
    KEY = "key"
    MODEL = "model"


@dataclass(frozen=True, slots=True)
class UserUsage:
    """What one end user of a team has bought, over some days. ``user`` is a hash, empty for the
    calls that named nobody, and for those of which nobody knows any more. ``images`` are those of
    answers that were delivered, ``cost`` is in nano-dollars; ``unresolved`` counts the expired
    holds among ``requests``."""

    team: str
    user: str
    requests: int
    images: int
    cost: Money
    unresolved: int
