"""What one transaction decides about money, of rows that nobody else can change meanwhile.

A store reads the rows that its calls need, has each call decided here against them, in order, by
``domain.transition``, and writes what has changed: one statement a table, whatever the number of
calls. A later call sees what an earlier one of the same page has decided.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from gateway.domain.books import Adjustment, Correction
from gateway.domain.ledger import (
    Balance,
    Claim,
    Claimed,
    Denied,
    Entry,
    Event,
    Held,
    Part,
    Reroute,
    Route,
    Settlement,
    State,
)
from gateway.domain.money import Money
from gateway.domain.transition import (
    CORRECTED,
    DOUBTFUL,
    KEY_LIFETIME,
    REROUTED,
    Counts,
    Move,
    by_model,
    corrected,
    corrected_part,
    correction,
    correction_counts,
    no_room,
    no_room_elsewhere,
    rerouted,
    settled_part,
    transition,
    usage_day,
    yields_key,
)
from gateway.ports import NotKnown
from gateway.stores.rows import (
    adjustment_detail,
    adjustment_row,
    claim_row,
    correction_detail,
    detail_of,
    flags_text,
    micros,
    part_of,
    part_row,
    reroute_detail,
)

MOST = 2**63 - 1
HELD = str(State.HELD)

UsageKey = tuple[str, str, str, str]
"""day, team, key_id, model."""

HOLD_COLUMNS = (
    "rid, state, bound, cost, accounts, team, key_id, model, upstream, price_id, fingerprint,"
    " idempotency_key, at, day, outcome, basis, drawn_model, drawn_images, drawn_cost, flags"
)
"""What a decision looks at, in the order that ``held_of`` reads it."""

NEW_HOLD_COLUMNS = (
    "rid, bound, accounts, team, key_id, model, operation, upstream, images, price_id, fingerprint,"
    " idempotency_key, worker, at, day, lease_ends, end_user"
)
"""In the order of ``claim_row``; whatever else a hold has is what it begins with."""

EVENT_COLUMNS = "at, rid, kind, pending, posted, detail"


class Outdated(Exception):
    """A row that was not locked is needed: it appeared meanwhile. Begin anew."""


class Needs(NamedTuple):
    """What a call will look at: its accounts, its holds, and idempotency keys by team. ``makes`` is
    which of the holds it makes, where that is not there already."""

    accounts: tuple[str, ...] = ()
    rids: tuple[str, ...] = ()
    keys: tuple[tuple[str, str], ...] = ()
    makes: str = ""


NOTHING = Needs()


def needs_of(claim: Claim) -> Needs:
    """Its accounts are those of its lines, in their order."""
    key = claim.idempotency_key
    keys = () if key is None else ((claim.team, key),)
    rid = claim.rid
    return Needs(tuple([line.account for line in claim.lines]), (rid,), keys, rid)


@dataclass(slots=True)
class HeldRow:
    """A row of ``hold`` as far as a decision looks at it; ``accounts`` each once."""

    rid: str
    state: State
    bound: Money
    cost: Money
    accounts: tuple[str, ...]
    team: str
    key_id: str
    model: str
    upstream: str
    price_id: str
    fingerprint: str
    idempotency_key: str | None
    at: int
    day: str
    outcome: str | None = None
    basis: str | None = None
    drawn: Part | None = None
    flags: tuple[str, ...] = ()

    @property
    def route(self) -> Route:
        return Route(self.model, self.upstream, self.price_id)

    def go(self, route: Route, bound: Money) -> None:
        self.model, self.upstream, self.price_id = route
        self.bound = bound

    def end(self) -> tuple[object, ...]:
        """state, cost, outcome, basis, flags, drawn_model, drawn_images, drawn_cost."""
        ended = (str(self.state), self.cost, self.outcome, self.basis, flags_text(self.flags))
        return (*ended, *part_row(self.drawn))


def held_of(row: Sequence[Any]) -> HeldRow:
    """``row`` has ``HOLD_COLUMNS``."""
    rid, state, bound, cost, accounts, *names = row
    *names, drawn_model, drawn_images, drawn_cost, flags = names
    hold = HeldRow(rid, State(state), bound, cost, accounts_in(accounts), *names)
    hold.drawn = part_of(drawn_model, drawn_images, drawn_cost)
    hold.flags = () if flags == "[]" else tuple(json.loads(flags))
    return hold


# A key has the same accounts for a day: of a thousand calls one list is read, and one written.
@lru_cache(maxsize=1024)
def accounts_in(text: str) -> tuple[str, ...]:
    """The accounts of a hold, of their JSON text."""
    return tuple(json.loads(text))


@lru_cache(maxsize=1024)
def accounts_text(accounts: tuple[str, ...]) -> str:
    return json.dumps(accounts)


@dataclass(slots=True)
class Page:
    """The rows of one transaction, and what has been decided about them.

    Every decision checks everything before it changes anything: one that raises leaves no trace.
    What is written is ``made``, ``ended``, ``rerouted`` and ``keyless`` of the holds, the balances
    in ``moved``, the journal's ``events``, ``usage`` and ``adjustments``. A hold is always made as
    it was reserved, and ended by another statement: so triggers see both.
    """

    holds: dict[str, HeldRow] = field(default_factory=dict)
    accounts: dict[str, Balance] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)
    made: dict[str, tuple[Claim, str, int]] = field(default_factory=dict)
    """By rid: the claim, the text of its accounts, and when its lease ends, in microseconds."""
    ended: dict[str, HeldRow] = field(default_factory=dict)
    rerouted: dict[str, HeldRow] = field(default_factory=dict)
    keyless: set[str] = field(default_factory=set)
    events: list[tuple[object, ...]] = field(default_factory=list)
    usage: dict[UsageKey, Counts] = field(default_factory=dict)
    adjustments: list[tuple[object, ...]] = field(default_factory=list)
    _keys: dict[tuple[str, str], str] = field(default_factory=dict)

    def know(self, rows: Iterable[Sequence[Any]]) -> list[HeldRow]:
        """Takes rows of ``HOLD_COLUMNS``; returns the holds."""
        found = [held_of(row) for row in rows]
        for hold in found:
            self.holds[hold.rid] = hold
            if hold.idempotency_key is not None:
                self._keys[hold.team, hold.idempotency_key] = hold.rid
        return found

    def balances(self, accounts: Iterable[str]) -> tuple[Balance, ...]:
        known = self.accounts
        try:
            return tuple([known[account] for account in accounts])
        except KeyError:
            raise Outdated from None

    def reserve(
        self, claim: Claim, accounts: tuple[str, ...], lease_ends: int
    ) -> Held | Denied | Claimed:
        """``accounts`` are those of the claim's lines, in their order; ``lease_ends`` is in
        microseconds, by the clock that will judge it."""
        known = self.holds.get(claim.rid)
        if known is not None:
            return Held(claim.rid, self.balances(known.accounts), duplicate=True)
        holder = self._holder_of_key(claim)
        if isinstance(holder, Claimed):
            return holder
        denied = no_room(claim.lines, self.accounts, claim.bound)
        if denied is not None:
            return denied
        each = tuple(dict.fromkeys(accounts))
        at, day = micros(claim.at), usage_day(claim.at)
        after = self._move(each, pending=claim.bound, posted=0)
        if holder is not None:
            holder.idempotency_key = None
            self.keyless.add(holder.rid)
        self._make(claim, each, lease_ends, at, day)
        self.events.append((at, claim.rid, HELD, claim.bound, 0, "{}"))
        return Held(claim.rid, after if each == accounts else self.balances(accounts))

    def reroute(self, reroute: Reroute) -> Held | Denied:
        """Raises ``NotKnown``."""
        hold = self.holds.get(reroute.rid)
        bump = None
        if hold is not None:
            bump = rerouted(hold.state, hold.bound, hold.route, reroute)
        if hold is None or bump is None:
            raise NotKnown(f"no reservation {reroute.rid} is held, that could go elsewhere")
        denied = no_room_elsewhere(reroute, bump, hold.accounts, self.accounts)
        if denied is not None:
            return denied
        if bump.applied:
            self._move(hold.accounts, bump.pending, posted=0)
            detail = reroute_detail(reroute, hold.route)
            self.events.append((micros(reroute.at), hold.rid, REROUTED, bump.pending, 0, detail))
            hold.go(reroute.route, bump.bound)
            self.rerouted[hold.rid] = hold
        after = self.balances(line.account for line in reroute.lines)
        return Held(hold.rid, after, duplicate=not bump.applied)

    def settle(self, settlement: Settlement, at: int | None) -> Entry:
        """``at`` is for the journal, in microseconds. Raises ``NotKnown``."""
        rid = settlement.rid
        hold = self.holds.get(rid)
        if hold is None:
            if settlement.event is Event.SETTLE:
                raise NotKnown(f"no reservation {rid} to settle")
            return Entry(rid, State.VOIDED, bound=0, cost=0, applied=False)
        move = transition(hold.state, settlement.event, hold.bound, hold.cost, settlement.cost)
        if move.applied:
            counts = correction(hold.state, hold.cost, hold.flags, move, settlement)
            drawn = settled_part(move, settlement)
            after = self._apply(hold, move, counts, settlement.flags, drawn)
            hold.outcome, hold.basis = str(settlement.outcome), str(settlement.basis)
            detail = detail_of(settlement)
            self.events.append((at, rid, str(move.state), move.pending, move.posted, detail))
            return Entry(rid, hold.state, hold.bound, hold.cost, True, after, hold.accounts)
        return self._entry(hold, applied=False)

    def correct(self, correction: Correction, repeated: bool) -> Entry:
        """``repeated``: it was applied before. Raises ``NotKnown``."""
        hold = self.holds.get(correction.rid)
        if hold is None:
            raise NotKnown(
                f"there is no reservation {correction.rid}, or it was forgotten: "
                "what it cost can only be adjusted, for its team and day"
            )
        if repeated:
            return self._entry(hold, applied=False)
        doubtful = not DOUBTFUL.isdisjoint(hold.flags)
        move = corrected(hold.state, hold.cost, correction.cost, doubtful)
        if move.applied:
            drawn = corrected_part(hold.drawn, hold.cost, move.cost)
            detail = correction_detail(correction, hold.cost, drawn)
            counts = correction_counts(hold.state, hold.cost, hold.flags, correction)
            self._apply(hold, move, counts, (), drawn)
            at = micros(correction.at)
            self.events.append((at, hold.rid, CORRECTED, move.pending, move.posted, detail))
            self.adjustments.append(
                (
                    correction.id,
                    at,
                    hold.rid,
                    hold.team,
                    hold.key_id,
                    hold.model,
                    hold.day,
                    accounts_text(hold.accounts),
                    move.posted,
                    correction.reason,
                    correction.actor,
                )
            )
        return self._entry(hold, move.applied)

    def adjust(self, adjustment: Adjustment) -> None:
        accounts = tuple(dict.fromkeys(adjustment.accounts))
        self._move(accounts, pending=0, posted=adjustment.amount)
        gains = [(adjustment.model, Counts(cost=adjustment.amount))]
        self.count(adjustment.day, adjustment.team, "", gains)
        at, detail = micros(adjustment.at), adjustment_detail(adjustment)
        self.events.append((at, adjustment.id, CORRECTED, 0, adjustment.amount, detail))
        self.adjustments.append(adjustment_row(adjustment, accounts_text(accounts)))

    def count(self, day: str, team: str, key_id: str, gains: Iterable[tuple[str, Counts]]) -> None:
        """Adds to the roll-up of a day, by model."""
        for model, counts in gains:
            if any(counts):
                key = (day, team, key_id, model)
                before = self.usage.get(key)
                self.usage[key] = counts if before is None else before.plus(counts)

    def made_rows(self) -> list[tuple[object, ...]]:
        """``NEW_HOLD_COLUMNS`` of the new holds. A key that has moved on already is not theirs."""
        rows = []
        for rid, (claim, text, lease_ends) in self.made.items():
            hold = self.holds[rid]
            rows.append(claim_row(claim, text, hold.idempotency_key, hold.at, hold.day, lease_ends))
        return rows

    def _holder_of_key(self, claim: Claim) -> Claimed | HeldRow | None:
        """Who has the claim's idempotency key: a call that keeps it, or the hold of one that
        ``yields_key``, or has outlived it after a day."""
        if claim.idempotency_key is None:
            return None
        rid = self._keys.get((claim.team, claim.idempotency_key))
        if rid is None:
            return None
        hold = self.holds[rid]
        same = hold.fingerprint == claim.fingerprint
        outlived = hold.at < micros(claim.at - KEY_LIFETIME)
        if outlived or yields_key(hold.state, same, claim.repeat_unknown):
            return hold
        return Claimed(rid, hold.state, same)

    def _make(
        self, claim: Claim, accounts: tuple[str, ...], lease_ends: int, at: int, day: str
    ) -> None:
        """``at`` is when it was reserved, in microseconds."""
        rid = claim.rid
        self.made[rid] = (claim, accounts_text(accounts), lease_ends)
        self.holds[rid] = HeldRow(
            rid, State.HELD, claim.bound, 0, accounts, claim.team, claim.key_id, claim.model,
            claim.upstream, claim.price_id, claim.fingerprint, claim.idempotency_key, at,
            day,
        )  # fmt: skip
        if claim.idempotency_key is not None:
            self._keys[claim.team, claim.idempotency_key] = rid

    def _apply(
        self, hold: HeldRow, move: Move, counts: Counts, flags: tuple[str, ...], drawn: Part | None
    ) -> tuple[Balance, ...]:
        """The balances of its accounts after that."""
        after = self._move(hold.accounts, move.pending, move.posted)
        gains = by_model(hold.model, counts, drawn, hold.drawn)
        self.count(hold.day, hold.team, hold.key_id, gains)
        hold.state, hold.cost, hold.flags, hold.drawn = move.state, move.cost, flags, drawn
        self.ended[hold.rid] = hold
        return after

    def _move(
        self, accounts: tuple[str, ...], pending: Money, posted: Money
    ) -> tuple[Balance, ...]:
        """The balances of the accounts, each of which is there once, after that."""
        after: list[Balance] = []
        for spent, held in self.balances(accounts):
            spent += posted
            held += pending
            if not (-MOST <= spent <= MOST and -MOST <= held <= MOST):
                raise OverflowError("an amount does not fit into 64 bits")
            # A call has some fourteen: ``Balance(...)`` is a function of Python around this.
            after.append(tuple.__new__(Balance, (spent, held)))
        self.accounts.update(zip(accounts, after, strict=True))
        self.moved.update(accounts)
        return tuple(after)

    def _entry(self, hold: HeldRow, applied: bool) -> Entry:
        accounts = hold.accounts
        balances = self.balances(accounts)
        return Entry(hold.rid, hold.state, hold.bound, hold.cost, applied, balances, accounts)
