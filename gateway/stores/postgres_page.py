"""The rows that one transaction decides about: locked, changed in Python, written back at once.

::

    learn    the accounts of the holds that are asked for, without locks
    lock     every account in order of its name, then every hold in order of its rid
    decide   each call against the locked rows, by ``domain.transition``
    write    one statement a table, whatever the number of calls

Every writer takes its locks in this order, so no two of them can wait for each other, and the
round trips of a transaction do not grow with it. A balance that is missing is made before it is
locked: two first uses of an account meet at that row.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from gateway.stores.postgres_link import Link
from gateway.stores.rows import (
    accounts_of,
    adjustment_detail,
    adjustment_row,
    correction_detail,
    detail_of,
    micros,
    part_of,
    part_row,
    reroute_detail,
)

MOST = 2**63 - 1

UsageKey = tuple[str, str, str, str]
"""day, team, key_id, model."""

_LEARN = "SELECT accounts FROM hold WHERE rid = ANY(%s::text[])"

_MAKE_BALANCES = """
INSERT INTO balance (account) SELECT account FROM unnest(%s::text[]) AS account ORDER BY account
ON CONFLICT DO NOTHING
"""

_LOCK_BALANCES = """
SELECT account, posted, pending FROM balance WHERE account = ANY(%s::text[])
 ORDER BY account FOR UPDATE
"""

_HOLD = (
    "rid, state, bound, cost, accounts, team, key_id, model, upstream, price_id, fingerprint,"
    " idempotency_key, at, day, outcome, basis, drawn_model, drawn_images, drawn_cost, flags"
)

_LOCK_HOLDS = f"""
SELECT {_HOLD} FROM hold WHERE rid = ANY(%s::text[]) ORDER BY rid FOR UPDATE
"""  # noqa: S608

_LOCK_HOLDS_AND_KEYS = f"""
SELECT {_HOLD} FROM hold
 WHERE rid IN (SELECT unnest(%s::text[]) UNION ALL
               SELECT keyed.rid FROM unnest(%s::text[], %s::text[]) AS asked (team, key)
                 JOIN hold AS keyed
                   ON keyed.team = asked.team AND keyed.idempotency_key = asked.key
                WHERE keyed.idempotency_key IS NOT NULL)
 ORDER BY rid FOR UPDATE OF hold
"""  # noqa: S608

_WRITE_BALANCES = """
UPDATE balance SET posted = new.posted, pending = new.pending
  FROM json_populate_recordset(NULL::balance, %s) AS new WHERE balance.account = new.account
"""

_WRITE_HOLDS = """
UPDATE hold SET state = new.state, cost = new.cost, outcome = new.outcome, basis = new.basis,
       flags = new.flags, idempotency_key = new.idempotency_key, bound = new.bound,
       model = new.model, upstream = new.upstream, price_id = new.price_id,
       drawn_model = new.drawn_model, drawn_images = new.drawn_images, drawn_cost = new.drawn_cost
  FROM json_populate_recordset(NULL::hold, %s) AS new WHERE hold.rid = new.rid
"""

_NEW_HOLD = (
    "rid, state, bound, cost, accounts, team, key_id, model, operation, upstream, images, price_id,"
    " fingerprint, idempotency_key, worker, at, day, lease_ends, outcome, basis, flags,"
    " end_user, drawn_model, drawn_images, drawn_cost"
)

_MAKE_HOLDS = f"""
INSERT INTO hold ({_NEW_HOLD}) SELECT {_NEW_HOLD} FROM json_populate_recordset(NULL::hold, %s)
"""  # noqa: S608

_EVENT = "at, rid, kind, pending, posted, detail"

_JOURNAL = f"""
INSERT INTO journal ({_EVENT}) SELECT {_EVENT} FROM json_populate_recordset(NULL::journal, %s)
"""  # noqa: S608

_COUNT = f"""
INSERT INTO usage_daily AS kept SELECT * FROM json_populate_recordset(NULL::usage_daily, %s)
ON CONFLICT (day, team, key_id, model) DO UPDATE SET
       {", ".join(f"{name} = kept.{name} + excluded.{name}" for name in Counts._fields)}
"""  # noqa: S608

_ADJUSTMENT = """
INSERT INTO adjustment (id, at, rid, team, key_id, model, day, accounts, amount, reason, actor)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""


class Outdated(Exception):
    """A row that was not locked is needed: it appeared meanwhile. Begin anew."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a call will look at: its accounts, its holds, and idempotency keys by team."""

    accounts: tuple[str, ...] = ()
    rids: tuple[str, ...] = ()
    keys: tuple[tuple[str, str], ...] = ()


NOTHING = Needs()


def needs_of(claim: Claim) -> Needs:
    key = claim.idempotency_key
    keys = () if key is None else ((claim.team, key),)
    return Needs(tuple(accounts_of(claim)), (claim.rid,), keys)


@dataclass(slots=True)
class _Hold:
    """A row of ``hold`` as far as a decision looks at it; ``rest`` has what a new one has besides.

    ``changed``: it has to be written.
    """

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
    rest: dict[str, Any] | None = None
    changed: bool = False

    @property
    def route(self) -> Route:
        return Route(self.model, self.upstream, self.price_id)

    def go(self, route: Route, bound: Money) -> None:
        self.model, self.upstream, self.price_id = route
        self.bound = bound
        self.changed = True

    def row(self) -> dict[str, Any]:
        """For a hold that is there, what may change; for a new one, everything."""
        drawn_model, drawn_images, drawn_cost = part_row(self.drawn)
        row: dict[str, Any] = {
            "rid": self.rid,
            "state": self.state.value,
            "bound": self.bound,
            "cost": self.cost,
            **self.route._asdict(),
            "outcome": self.outcome,
            "basis": self.basis,
            "flags": json.dumps(self.flags),
            "idempotency_key": self.idempotency_key,
            "drawn_model": drawn_model,
            "drawn_images": drawn_images,
            "drawn_cost": drawn_cost,
        }
        if self.rest is not None:
            row |= self.rest
        return row


def _hold_of(row: Sequence[Any]) -> _Hold:
    rid, state, bound, cost, accounts, *names = row
    *names, drawn_model, drawn_images, drawn_cost, flags = names
    hold = _Hold(rid, State(state), bound, cost, tuple(json.loads(accounts)), *names)
    hold.drawn = part_of(drawn_model, drawn_images, drawn_cost)
    hold.flags = tuple(json.loads(flags))
    return hold


@dataclass(slots=True)
class Page:
    """The locked rows of one transaction, and what has been decided about them.

    Every decision checks everything before it changes anything: one that raises leaves no trace.
    """

    _balances: dict[str, Balance] = field(default_factory=dict)
    _moved: set[str] = field(default_factory=set)
    _holds: dict[str, _Hold] = field(default_factory=dict)
    _keys: dict[tuple[str, str], str] = field(default_factory=dict)
    _events: list[dict[str, Any]] = field(default_factory=list)
    _usage: dict[UsageKey, Counts] = field(default_factory=dict)
    _adjustments: list[tuple[Any, ...]] = field(default_factory=list)

    @classmethod
    def learn(cls, link: Link, needs: Collection[Needs]) -> Learnt:
        """Asks for the accounts of the holds; inside a pipeline."""
        rids = sorted({rid for need in needs for rid in need.rids})
        return Learnt(needs, rids, link.execute(_LEARN, (rids,)) if rids else None)

    @classmethod
    def lock(cls, link: Link, learnt: Learnt) -> Page:
        """Waits for the rows, in order, and reads them."""
        accounts = sorted(learnt.accounts())
        keys = sorted({key for need in learnt.needs for key in need.keys})
        balances = holds = None
        with link.pipeline():
            if accounts:
                link.execute(_MAKE_BALANCES, (accounts,))
                balances = link.execute(_LOCK_BALANCES, (accounts,))
            if keys:
                teams, names = [key[0] for key in keys], [key[1] for key in keys]
                holds = link.execute(_LOCK_HOLDS_AND_KEYS, (learnt.rids, teams, names))
            elif learnt.rids:
                holds = link.execute(_LOCK_HOLDS, (learnt.rids,))
        page = cls()
        for account, posted, pending in balances.fetchall() if balances else ():
            page._balances[account] = Balance(posted, pending)
        for row in holds.fetchall() if holds else ():
            hold = _hold_of(row)
            page._holds[hold.rid] = hold
            if hold.idempotency_key is not None:
                page._keys[hold.team, hold.idempotency_key] = hold.rid
        return page

    def balances(self, accounts: Iterable[str]) -> tuple[Balance, ...]:
        try:
            return tuple(self._balances[account] for account in accounts)
        except KeyError:
            raise Outdated from None

    def reserve(self, claim: Claim, lease_ends: int) -> Held | Denied | Claimed:
        """``lease_ends`` in microseconds, by the clock that will judge it."""
        known = self._holds.get(claim.rid)
        if known is not None:
            return Held(claim.rid, self.balances(known.accounts), duplicate=True)
        holder = self._holder_of_key(claim)
        if isinstance(holder, Claimed):
            return holder
        denied = no_room(claim.lines, self._balances, claim.bound)
        if denied is not None:
            return denied
        accounts = tuple(accounts_of(claim))
        self._move(accounts, pending=claim.bound, posted=0)
        if holder is not None:
            holder.idempotency_key = None
            holder.changed = True
        self._add(claim, accounts, lease_ends)
        self._note(micros(claim.at), claim.rid, State.HELD.value, claim.bound, 0, "{}")
        return Held(claim.rid, self.balances(line.account for line in claim.lines))

    def reroute(self, reroute: Reroute) -> Held | Denied:
        """Raises ``NotKnown``."""
        hold = self._holds.get(reroute.rid)
        bump = None
        if hold is not None:
            bump = rerouted(hold.state, hold.bound, hold.route, reroute)
        if hold is None or bump is None:
            raise NotKnown(f"no reservation {reroute.rid} is held, that could go elsewhere")
        denied = no_room_elsewhere(reroute, bump, hold.accounts, self._balances)
        if denied is not None:
            return denied
        if bump.applied:
            self._move(hold.accounts, bump.pending, posted=0)
            detail = reroute_detail(reroute, hold.route)
            self._note(micros(reroute.at), hold.rid, REROUTED, bump.pending, 0, detail)
            hold.go(reroute.route, bump.bound)
        after = self.balances(line.account for line in reroute.lines)
        return Held(hold.rid, after, duplicate=not bump.applied)

    def settle(self, settlement: Settlement, at: int | None) -> Entry:
        """``at`` is for the journal, in microseconds. Raises ``NotKnown``."""
        rid = settlement.rid
        hold = self._holds.get(rid)
        if hold is None:
            if settlement.event is Event.SETTLE:
                raise NotKnown(f"no reservation {rid} to settle")
            return Entry(rid, State.VOIDED, bound=0, cost=0, applied=False)
        move = transition(hold.state, settlement.event, hold.bound, hold.cost, settlement.cost)
        if move.applied:
            counts = correction(hold.state, hold.cost, hold.flags, move, settlement)
            self._apply(hold, move, counts, settlement.flags, settled_part(move, settlement))
            hold.outcome, hold.basis = settlement.outcome.value, settlement.basis.value
            detail = detail_of(settlement)
            self._note(at, rid, move.state.value, move.pending, move.posted, detail)
        return self._entry(hold, move.applied)

    def correct(self, correction: Correction, repeated: bool) -> Entry:
        """``repeated``: it was applied before. Raises ``NotKnown``."""
        hold = self._holds.get(correction.rid)
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
            self._note(at, hold.rid, CORRECTED, move.pending, move.posted, detail)
            self._adjustments.append(
                (
                    correction.id,
                    at,
                    hold.rid,
                    hold.team,
                    hold.key_id,
                    hold.model,
                    hold.day,
                    json.dumps(hold.accounts),
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
        self._note(at, adjustment.id, CORRECTED, 0, adjustment.amount, detail)
        self._adjustments.append(adjustment_row(adjustment, json.dumps(accounts)))

    def count(self, day: str, team: str, key_id: str, gains: Iterable[tuple[str, Counts]]) -> None:
        """Adds to the roll-up of a day, by model."""
        for model, counts in gains:
            if any(counts):
                key = (day, team, key_id, model)
                self._usage[key] = self._usage.get(key, Counts()).plus(counts)

    def write(self, link: Link) -> None:
        """Sends everything that was decided; inside a pipeline."""
        moved = [
            {"account": account, "posted": balance.posted, "pending": balance.pending}
            for account, balance in self._balances.items()
            if account in self._moved
        ]
        changed = [hold for hold in self._holds.values() if hold.changed]
        usage = [
            {**dict(zip(("day", "team", "key_id", "model"), key, strict=True)), **counts._asdict()}
            for key, counts in sorted(self._usage.items())
        ]
        # A key leaves its old hold before it comes to a new one.
        for statement, rows in (
            (_WRITE_BALANCES, moved),
            (_WRITE_HOLDS, [hold.row() for hold in changed if hold.rest is None]),
            (_MAKE_HOLDS, [hold.row() for hold in changed if hold.rest is not None]),
            (_JOURNAL, self._events),
            (_COUNT, usage),
        ):
            if rows:
                link.execute(statement, (json.dumps(rows),))
        for adjustment in self._adjustments:
            link.execute(_ADJUSTMENT, adjustment)

    def _holder_of_key(self, claim: Claim) -> Claimed | _Hold | None:
        """Who has the claim's idempotency key: a call that keeps it, or the hold of one that
        ``yields_key``, or has outlived it after a day."""
        if claim.idempotency_key is None:
            return None
        rid = self._keys.get((claim.team, claim.idempotency_key))
        if rid is None:
            return None
        hold = self._holds[rid]
        same = hold.fingerprint == claim.fingerprint
        outlived = hold.at < micros(claim.at - KEY_LIFETIME)
        if outlived or yields_key(hold.state, same, claim.repeat_unknown):
            return hold
        return Claimed(rid, hold.state, same)

    def _add(self, claim: Claim, accounts: tuple[str, ...], lease_ends: int) -> None:
        at, day = micros(claim.at), usage_day(claim.at)
        rest: dict[str, Any] = {
            "accounts": json.dumps(accounts),
            "team": claim.team,
            "key_id": claim.key_id,
            "operation": claim.operation.value,
            "images": claim.images,
            "fingerprint": claim.fingerprint,
            "worker": claim.worker,
            "at": at,
            "day": day,
            "lease_ends": lease_ends,
            "end_user": claim.user,
        }
        self._holds[claim.rid] = _Hold(
            claim.rid, State.HELD, claim.bound, 0, accounts, claim.team, claim.key_id, claim.model,
            claim.upstream, claim.price_id, claim.fingerprint, claim.idempotency_key, at, day,
            rest=rest, changed=True,
        )  # fmt: skip
        if claim.idempotency_key is not None:
            self._keys[claim.team, claim.idempotency_key] = claim.rid

    def _apply(
        self, hold: _Hold, move: Move, counts: Counts, flags: tuple[str, ...], drawn: Part | None
    ) -> None:
        self._move(hold.accounts, move.pending, move.posted)
        gains = by_model(hold.model, counts, drawn, hold.drawn)
        self.count(hold.day, hold.team, hold.key_id, gains)
        hold.state, hold.cost, hold.flags, hold.drawn = move.state, move.cost, flags, drawn
        hold.changed = True

    def _move(self, accounts: tuple[str, ...], pending: Money, posted: Money) -> None:
        before = self.balances(accounts)
        after = [Balance(one.posted + posted, one.pending + pending) for one in before]
        if any(
            not -MOST <= amount <= MOST for one in after for amount in (one.posted, one.pending)
        ):
            raise OverflowError("an amount does not fit into 64 bits")
        self._balances.update(zip(accounts, after, strict=True))
        if pending or posted:
            self._moved.update(accounts)

    def _note(
        self, at: int | None, rid: str, kind: str, pending: Money, posted: Money, detail: str
    ) -> None:
        self._events.append(
            {
                "at": at,
                "rid": rid,
                "kind": kind,
                "pending": pending,
                "posted": posted,
                "detail": detail,
            }
        )

    def _entry(self, hold: _Hold, applied: bool) -> Entry:
        balances = self.balances(hold.accounts)
        return Entry(hold.rid, hold.state, hold.bound, hold.cost, applied, balances)


@dataclass(frozen=True, slots=True)
class Learnt:
    """What ``Page.lock`` has to lock; ``accounts`` once the pipeline has been left."""

    needs: Collection[Needs]
    rids: list[str]
    _found: Any

    def accounts(self) -> set[str]:
        named = {account for need in self.needs for account in need.accounts}
        for (accounts,) in self._found.fetchall() if self._found is not None else ():
            named.update(json.loads(accounts))
        return named
