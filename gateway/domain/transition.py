"""What an event does to a hold: the table of money.md 3 as one pure function.

Every ledger store reads a hold, asks here what moves, and writes exactly that; so no two stores
can disagree about money. Nothing here knows where the numbers are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from operator import add, sub
from typing import NamedTuple, TypeAlias

from gateway.domain.books import Correction
from gateway.domain.ledger import (
    Balance,
    Basis,
    Denied,
    Entry,
    Event,
    Line,
    Outcome,
    Part,
    Replay,
    Reroute,
    Route,
    Settlement,
    State,
)
from gateway.domain.money import Money
from gateway.domain.record import record

KEY_LIFETIME = timedelta(hours=24)
"""How long an idempotency key stands for its first call, counted from ``Claim.at``."""

WORKER_MEMORY = timedelta(days=1)
"""How long a silent worker without open holds is remembered."""

CORRECTED = "A"
"""The journal's kind of corrections and adjustments."""

REROUTED = "B"
"""The journal's kind of reroutes, which may raise a bound."""

DOUBTFUL = frozenset({"unpriced", "no_usage", "invalid_usage", "over_bound"})
"""The flags that say a cost may be wrong; ``soft`` alone says only that the bound was a guess."""


@record
class Move:
    """What an event changes. ``pending`` and ``posted`` are added to every account of the hold.

    ``cost`` is what is posted for the hold afterwards. All amounts are nano-dollars. Where
    ``applied`` is False nothing moves and the first answer stands.
    """

    state: State
    cost: Money
    pending: Money = 0
    posted: Money = 0
    applied: bool = True


def transition(state: State, event: Event, bound: Money, cost: Money, new_cost: Money) -> Move:
    """Moves a hold of ``bound``, with ``cost`` posted so far, by ``event``.

    ``new_cost`` is what the call did cost; only SETTLE looks at it, because a void owes nothing
    and an expiry owes the bound.
    """
    match state, event:
        case State.HELD, Event.SETTLE:
            return Move(State.POSTED, new_cost, pending=-bound, posted=new_cost)
        case State.HELD, Event.VOID:
            return Move(State.VOIDED, 0, pending=-bound)
        case State.HELD, Event.EXPIRE:
            return Move(State.EXPIRED, bound, pending=-bound, posted=bound)
        case State.EXPIRED, Event.SETTLE:
            return Move(State.POSTED, new_cost, posted=new_cost - cost)
        case State.EXPIRED, Event.VOID:
            return Move(State.VOIDED, 0, posted=-cost)
        case _:
            return Move(state, cost, applied=False)


def no_room(lines: Iterable[Line], balances: Mapping[str, Balance], bound: Money) -> Denied | None:
    """The first line whose limit ``bound`` does not fit under, beside what its account has."""
    for line in lines:
        amount = line.limit.amount
        if amount is None:
            continue
        balance = balances[line.account]
        if balance.used + bound > amount:
            return Denied(line, balance)
    return None


def yields_key(state: State, same_fingerprint: bool, repeat_unknown: bool = False) -> bool:
    """Whether a call in ``state`` gives its idempotency key to a new one: only to the same request,
    where it was surely not billed, or where its outcome is unknown and somebody takes the risk."""
    free = state is State.VOIDED or (state is State.EXPIRED and repeat_unknown)
    return same_fingerprint and free


@record
class Bump:
    """What a reroute changes: the hold goes its route, for ``bound``; ``pending`` is added to every
    account. Where ``applied`` is False it is a repeat, and nothing moves."""

    bound: Money
    pending: Money
    applied: bool = True


def rerouted(state: State, bound: Money, route: Route, reroute: Reroute) -> Bump | None:
    """Moves a hold of ``bound`` that goes ``route``. None where it is not held any more."""
    if state is not State.HELD:
        return None
    new_bound = max(bound, reroute.bound)
    applied = (route, bound) != (reroute.route, new_bound)
    return Bump(new_bound, new_bound - bound, applied)


def no_room_elsewhere(
    reroute: Reroute, bump: Bump, accounts: Collection[str], balances: Mapping[str, Balance]
) -> Denied | None:
    """Where the hold on ``accounts`` cannot grow. As when it was reserved, each balance is looked
    at without it, so that its whole bound has to fit; what does not grow always fits."""
    if not bump.pending:
        return None
    held = bump.bound - bump.pending
    lines = [line for line in reroute.lines if line.account in accounts]
    without = {
        account: Balance(balances[account].posted, balances[account].pending - held)
        for account in {line.account for line in lines}
    }
    return no_room(lines, without, bump.bound)


def corrected(state: State, cost: Money, new_cost: Money, doubtful: bool) -> Move:
    """Moves a closed hold, with ``cost`` posted, to what a person says that it cost.

    ``doubtful``: it has a flag of ``DOUBTFUL``, which the correction clears. A hold that still
    runs is not touched: it will end by itself. What is so already stays as it is.
    """
    if state is State.HELD or (state is State.POSTED and cost == new_cost and not doubtful):
        return Move(state, cost, applied=False)
    return Move(State.POSTED, new_cost, posted=new_cost - cost)


def contradicts(state: State, event: Event, cost: Money, new_cost: Money) -> bool:
    """Whether a repeat names another amount than the final answer that stands: an alarm.

    A void says that nothing is owed. An expiry knows nothing, so it contradicts nothing.
    """
    if state not in (State.POSTED, State.VOIDED) or event is Event.EXPIRE:
        return False
    return (new_cost if event is Event.SETTLE else 0) != cost


OnConflict: TypeAlias = Callable[[Entry, Settlement], None]
"""Hears of a settlement that ``contradicts`` the entry which stands."""


def ignore_conflict(entry: Entry, settlement: Settlement) -> None:
    """The ``OnConflict`` of whoever has no alarm to raise."""


class Counts(NamedTuple):
    """What is added to one row of the daily roll-up, in the order of ``UsageRow``'s columns."""

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

    def plus(self, other: Counts) -> Counts:
        return Counts._make(map(add, self, other))

    def minus(self, other: Counts) -> Counts:
        return Counts._make(map(sub, self, other))


def counted(state: State, cost: Money, settlement: Settlement, flags: Collection[str]) -> Counts:
    """What a hold in ``state`` contributes to its day, given the settlement that put it there.

    A running call and a voided one count nowhere. An expired one counts as a request of unknown
    outcome at its bound: pictures and tokens only count once somebody has seen them.
    """
    flagged = int(not DOUBTFUL.isdisjoint(flags))
    if state is State.EXPIRED:
        return Counts(requests=1, cost=cost, unresolved=1, unresolved_cost=cost, flagged=flagged)
    if state is State.POSTED:
        return Counts(
            requests=1,
            images=settlement.images,
            text_in=settlement.usage.text_in,
            image_in=settlement.usage.image_in,
            text_out=settlement.usage.text_out,
            image_out=settlement.usage.image_out,
            cost=cost,
            flagged=flagged,
        )
    return Counts()


def correction(
    before: State, cost: Money, flags: Collection[str], move: Move, settlement: Settlement
) -> Counts:
    """What the daily roll-up must gain for ``move``: the new contribution less the old one.

    ``cost`` and ``flags`` are the hold's before the move. Only HELD, which counts nothing, and
    EXPIRED, which counts no pictures, can still move, so the old settlement is not needed.
    """
    now = counted(move.state, move.cost, settlement, settlement.flags)
    if before is State.HELD:
        return now
    return now.minus(counted(before, cost, settlement, flags))


def correction_counts(
    before: State, cost: Money, flags: Collection[str], correction: Correction
) -> Counts:
    """What the daily roll-up must gain for a correction of a hold that had ``cost`` and
    ``flags``."""
    if before is State.VOIDED:  # it counted nowhere, its flags neither
        return Counts(requests=1, images=correction.images, cost=correction.cost)
    flagged = -int(not DOUBTFUL.isdisjoint(flags))
    gained = Counts(cost=correction.cost - cost, flagged=flagged)
    if before is State.EXPIRED:
        return gained.plus(Counts(images=correction.images, unresolved=-1, unresolved_cost=-cost))
    return gained


def settled_part(move: Move, settlement: Settlement) -> Part | None:
    """What a hold has of another model after ``move``: only a posted one knows of any. One that is
    booked at its bound has all of it under the model that was asked for."""
    return settlement.drawn if move.state is State.POSTED else None


def corrected_part(part: Part | None, cost: Money, new_cost: Money) -> Part | None:
    """What becomes of the other model's part where ``cost`` turns out to be ``new_cost``.

    Who corrects a call names one sum. It is split as the call was booked, a fraction of a
    nano-dollar going to the model that was asked for, which also has all of a call of which nothing
    was booked for the other one.
    """
    if part is None:
        return None
    return replace(part, cost=part.cost * new_cost // cost if cost else 0)


def by_model(
    model: str, gained: Counts, part: Part | None, before: Part | None = None
) -> list[tuple[str, Counts]]:
    """The models whose rows of the day gain something, and what: ``gained`` is the whole, of a call
    for ``model``; ``part`` is what another one now has of it, ``before`` what it had."""
    other = part or before
    if other is None:
        return [(model, gained)]
    its = _counted_part(part).minus(_counted_part(before))
    if not any(its):
        return [(model, gained)]
    return [(model, gained.minus(its)), (other.model, its)]


def _counted_part(part: Part | None) -> Counts:
    if part is None:
        return Counts()
    return Counts(
        images=part.images,
        text_in=part.usage.text_in,
        image_in=part.usage.image_in,
        text_out=part.usage.text_out,
        image_out=part.usage.image_out,
        cost=part.cost,
    )


def counted_replay(replay: Replay) -> Counts:
    """What an answer from the cache adds to its day: no money but the cost it avoided."""
    return Counts(requests=1, images=replay.images, cached_requests=1, avoided=replay.avoided)


def replay_by_model(replay: Replay) -> list[tuple[str, Counts]]:
    """As ``by_model``: the pictures of an answer count with the model that drew them."""
    part = Part(replay.draws, replay.images) if replay.draws else None
    return by_model(replay.model, counted_replay(replay), part)


def expiry(rid: str, bound: Money) -> Settlement:
    """What a sweep says of a hold whose lease is over."""
    return Settlement(rid, Event.EXPIRE, Outcome.UNKNOWN, Basis.ESTIMATED, cost=bound)


def usage_day(at: datetime) -> str:
    """The UTC day that a call is counted in, ``2026-11-22``; ``at`` is when it was reserved."""
    return at.astimezone(UTC).date().isoformat()
