"""The rows of both databases: their columns are the same, so their readers and writers are too.

Times are microseconds since 1970, lists and objects are JSON text, switches are 0 and 1; a backup
of one database can be read into the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from gateway.domain.books import Adjustment, Correction, Hold, JournalLine
from gateway.domain.call import Usage
from gateway.domain.ledger import (
    Basis,
    By,
    Claim,
    Outcome,
    Part,
    Reroute,
    Route,
    Settlement,
    State,
    UsageRow,
)
from gateway.domain.money import Money, exact_dollars
from gateway.domain.owned import Anchor, Owned, OwnedKind
from gateway.domain.team import Key, Limits, PerUser, Team
from gateway.domain.transition import Counts
from gateway.ports import BooksChanged

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
EMPTY = "''"
LAST_DAY = "9999-12-31"

# What each reader expects, in its order; a statement names them itself.
HOLD_COLUMNS = (
    "rid, state, bound, cost, accounts, team, key_id, model, operation, upstream, images, price_id,"
    " worker, at, lease_ends, idempotency_key, outcome, basis, flags, end_user,"
    " drawn_model, drawn_images, drawn_cost"
)
"""In the order that ``hold_of`` reads them."""

USER_SUMS = ("requests", "images", "cost", "unresolved")
"""What is added up of each user; of half a month as well (``half_requests``)."""

JOURNAL_COLUMNS = "seq, at, rid, kind, pending, posted, detail"
"""In the order that ``journal_line_of`` reads them."""

USAGE_COLUMNS = (
    "day, team, key_id, model, requests, images, cached_requests, text_in, image_in, text_out,"
    " image_out, cost, avoided, unresolved, unresolved_cost, flagged"
)
"""In the order of ``UsageRow``'s fields."""

_USAGE_NAMES = ("day", "team", "key_id", "model")
_NAMED_BY = {
    By.DAY: {"day": "day"},
    By.MONTH: {"day": "substr(day, 1, 7)"},
    By.TEAM: {"team": "team"},
    By.KEY: {"team": "team", "key_id": "key_id"},
    By.MODEL: {"model": "model"},
}
# By these, parts are added up as they lie in the table's key, and only the parts are sorted.
_PARTS_BY = {By.MONTH: "day", By.TEAM: "day, team"}


def usage_by_sql(
    by: By, asked: Callable[[str], str], whole: Callable[[str], str], *, in_order: bool
) -> str:
    """The statement of ``Books.usage_by``. ``asked`` makes a parameter of the name of a text that
    may be null, ``whole`` makes a sum the whole number that it is; ``in_order``: the table lies as
    its key does."""
    named = _NAMED_BY[by]
    names = ", ".join(f"{named.get(name, EMPTY)} AS {name}" for name in _USAGE_NAMES)
    sums = ", ".join(whole(f"sum({name})") for name in Counts._fields)
    rows = f"""
      FROM usage_daily
     WHERE day BETWEEN coalesce({asked("since")}, '') AND coalesce({asked("until")}, '{LAST_DAY}')
       AND ({asked("team")} IS NULL OR team = {asked("team")})
    """
    if in_order and by in _PARTS_BY:
        part = _PARTS_BY[by]
        parts = ", ".join(f"sum({name}) AS {name}" for name in Counts._fields)
        rows = f"FROM (SELECT {part}, {parts} {rows} GROUP BY {part})"
    return f"""
    SELECT {names}, {sums} {rows}
     GROUP BY {", ".join(named.values())}
    HAVING sum(requests) > 0 OR sum(images) <> 0 OR sum(cost) <> 0
     ORDER BY {", ".join(named.values())}
    """


OWNED_COLUMNS = "id, kind, team, key_id, upstream, mark, created, expires, size_bytes, detail"
"""In the order that ``owned_of`` reads them."""

TEAM_COLUMNS = "id, models, limits, cache_enabled, disabled, time_zone"
KEY_COLUMNS = "id, team, name, models, limits, created, expires, disabled, revoked, pepper"

_LIMITS = frozenset(field.name for field in fields(Limits))
_PER_USER = "per_user"
_NO_USAGE = Usage()


def micros(instant: datetime) -> int:
    """Microseconds since 1970 of an aware datetime, in whole numbers."""
    return (instant - EPOCH) // MICROSECOND


def instant(micros: int) -> datetime:
    return EPOCH + micros * MICROSECOND


# Nearly all calls have none, or the one that their model's price brings with it.
@lru_cache(maxsize=256)
def flags_text(flags: tuple[str, ...]) -> str:
    """The flags of a hold as JSON."""
    return json.dumps(flags)


def detail_of(settlement: Settlement) -> str:
    """What the journal keeps of a settlement beside its amounts."""
    usage, drawn = settlement.usage, settlement.drawn
    said = (
        f'"outcome": "{settlement.outcome}", "basis": "{settlement.basis}",'
        f' "images": {settlement.images}'
    )
    # Numbers are written in a sixth of the time that ``asdict`` and an encoder take.
    if usage != _NO_USAGE:
        svg = "null" if usage.svg is None else json.dumps(asdict(usage.svg))
        said += (
            f', "usage": {{"text_in": {usage.text_in}, "image_in": {usage.image_in},'
            f' "cached_text_in": {usage.cached_text_in},'
            f' "cached_image_in": {usage.cached_image_in},'
            f' "text_out": {usage.text_out}, "image_out": {usage.image_out}, "svg": {svg}}}'
        )
    if settlement.flags:
        said += f', "flags": {flags_text(settlement.flags)}'
    if drawn is not None:
        said += f', "drawn": {json.dumps(asdict(drawn))}'
    return f"{{{said}}}"


def correction_detail(correction: Correction, before: Money, drawn: Part | None) -> str:
    """What the journal keeps of a correction; ``before`` is what the hold had posted, ``drawn`` is
    the other model's part of the new cost."""
    part = {} if drawn is None else {"drawn": {"model": drawn.model, "cost": drawn.cost}}
    return json.dumps(
        {
            "id": correction.id,
            "reason": correction.reason,
            "actor": correction.actor,
            "before": before,
            "cost": correction.cost,
            **part,
        }
    )


def part_row(drawn: Part | None) -> tuple[str, int, Money]:
    """drawn_model, drawn_images, drawn_cost; no model where there is no part."""
    return ("", 0, 0) if drawn is None else (drawn.model, drawn.images, drawn.cost)


def part_of(model: str, images: int, cost: Money) -> Part | None:
    return Part(model, images, cost) if model else None


def reroute_detail(reroute: Reroute, before: Route) -> str:
    """What the journal keeps of a reroute; ``before`` is the way it went until then."""
    return json.dumps({**reroute.route._asdict(), "before": before._asdict()})


def adjustment_detail(adjustment: Adjustment) -> str:
    """What the journal keeps of an adjustment beside its amount."""
    return json.dumps({"id": adjustment.id, "reason": adjustment.reason, "actor": adjustment.actor})


def adjustment_row(adjustment: Adjustment, accounts: str) -> tuple[object, ...]:
    """id, at, rid, team, key_id, model, day, accounts, amount, reason, actor. It has no rid and
    no key: it belongs to no call."""
    return (
        adjustment.id,
        micros(adjustment.at),
        None,
        adjustment.team,
        "",
        adjustment.model,
        adjustment.day,
        accounts,
        adjustment.amount,
        adjustment.reason,
        adjustment.actor,
    )


ADJUSTMENT_COLUMNS = "id, team, model, day, amount, accounts, reason, actor, at"
"""In the order that ``adjustment_of`` reads them."""


def adjustment_of(row: Sequence[Any]) -> Adjustment:
    name, team, model, day, amount, accounts, reason, actor, at = row
    parts = tuple(json.loads(accounts))
    return Adjustment(name, team, model, day, amount, parts, reason, actor, instant(at))


def compare_booked(
    seen: Mapping[tuple[str, str], Money], booked: Mapping[tuple[str, str], Money]
) -> None:
    """What was booked by (day, model) when somebody looked, against what is. Raises
    ``BooksChanged``."""
    for (day, model), cost in seen.items():
        now = booked.get((day, model), 0)
        if now != cost:
            raise BooksChanged(
                f"the books changed meanwhile ({model}, {day}: {exact_dollars(cost)} before, "
                f"{exact_dollars(now)} now) and nothing was booked; run it again"
            )


def claim_row(
    claim: Claim, accounts: str, idempotency_key: str | None, at: int, day: str, lease_ends: int
) -> tuple[object, ...]:
    """A new hold: rid, bound, accounts, team, key_id, model, operation, upstream, images,
    price_id, fingerprint, idempotency_key, worker, at, day, lease_ends, end_user."""
    return (
        claim.rid,
        claim.bound,
        accounts,
        claim.team,
        claim.key_id,
        claim.model,
        str(claim.operation),
        claim.upstream,
        claim.images,
        claim.price_id,
        claim.fingerprint,
        idempotency_key,
        claim.worker,
        at,
        day,
        lease_ends,
        claim.user,
    )


def hold_of(row: Sequence[Any]) -> Hold:
    """``row`` has ``HOLD_COLUMNS``."""
    (
        rid, state, bound, cost, accounts, team, key_id, model, operation, upstream, images,
        price_id, worker, at, lease_ends, idempotency_key, outcome, basis, flags, user, *drawn,
    ) = row  # fmt: skip
    return Hold(
        rid=rid,
        state=State(state),
        bound=bound,
        cost=cost,
        accounts=tuple(json.loads(accounts)),
        team=team,
        key_id=key_id,
        model=model,
        operation=operation,
        upstream=upstream,
        images=images,
        price_id=price_id,
        worker=worker,
        at=instant(at),
        lease_ends=instant(lease_ends),
        idempotency_key=idempotency_key,
        outcome=None if outcome is None else Outcome(outcome),
        basis=None if basis is None else Basis(basis),
        flags=tuple(json.loads(flags)),
        user=user,
        drawn=part_of(*drawn),
    )


def journal_line_of(row: Sequence[Any]) -> JournalLine:
    """``row`` has ``JOURNAL_COLUMNS``."""
    seq, at, rid, kind, pending, posted, detail = row
    when = None if at is None else instant(at)
    return JournalLine(seq, when, rid, kind, pending, posted, json.loads(detail))


def owned_row(owned: Owned) -> tuple[object, ...]:
    """``OWNED_COLUMNS``, and then the purpose."""
    return (
        owned.id,
        owned.kind.value,
        owned.team,
        owned.key_id,
        *owned.anchor,
        micros(owned.created),
        None if owned.expires is None else micros(owned.expires),
        owned.size_bytes,
        json.dumps(owned.detail),
        purpose_of(owned),
    )


def owned_of(row: Sequence[Any]) -> Owned:
    """``row`` has ``OWNED_COLUMNS``."""
    name, kind, team, key_id, upstream, mark, created, expires, size_bytes, detail = row
    return Owned(
        name,
        OwnedKind(kind),
        team,
        key_id,
        Anchor(upstream, mark),
        instant(created),
        None if expires is None else instant(expires),
        size_bytes,
        json.loads(detail),
    )


def purpose_of(owned: Owned) -> str:
    """What a file is for, as the provider said it; empty where it did not."""
    purpose = owned.detail.get("purpose")
    return purpose if isinstance(purpose, str) else ""


def storable(ids: Iterable[str]) -> list[str]:
    """Those that a database can look up: clients may name anything, and an id with a NUL or half
    of a surrogate pair, which no text column takes, is nobody's."""
    return [id for id in ids if id.isprintable()]


def team_row(team: Team) -> tuple[object, ...]:
    """``TEAM_COLUMNS`` but the id, and then the id. What each user may is beside the limits of the
    team, where a release that does not know it leaves it alone."""
    per_user = {} if team.per_user == PerUser() else {_PER_USER: asdict(team.per_user)}
    return (
        json.dumps(sorted(team.models)),
        json.dumps(asdict(team.limits) | per_user),
        int(team.cache_enabled),
        int(team.disabled),
        team.time_zone,
        team.id,
    )


def team_of(row: Sequence[Any]) -> Team:
    """``row`` has ``TEAM_COLUMNS``."""
    team_id, models, limits, cache_enabled, disabled, time_zone = row
    return Team(
        team_id,
        _models(models),
        _limits(limits),
        cache_enabled=bool(cache_enabled),
        disabled=bool(disabled),
        time_zone=time_zone,
        per_user=_per_user(limits),
    )


def key_row(key: Key, digest: bytes) -> tuple[object, ...]:
    """id, digest, team, name, models, limits, created, expires, disabled, revoked, pepper."""
    return (
        key.id,
        digest,
        key.team,
        key.name,
        None if key.models is None else json.dumps(sorted(key.models)),
        json.dumps(asdict(key.limits)),
        *(None if at is None else micros(at) for at in (key.created, key.expires)),
        int(key.disabled),
        None if key.revoked is None else micros(key.revoked),
        key.pepper,
    )


def key_of(row: Sequence[Any]) -> Key:
    """``row`` has ``KEY_COLUMNS``."""
    key_id, team, name, models, limits, created, expires, disabled, revoked, pepper = row
    return Key(
        key_id,
        team,
        name,
        None if models is None else _models(models),
        _limits(limits),
        created=None if created is None else instant(created),
        expires=None if expires is None else instant(expires),
        disabled=bool(disabled),
        revoked=None if revoked is None else instant(revoked),
        pepper=pepper,
    )


@lru_cache(maxsize=1024)
def _models(text: str) -> frozenset[str]:
    return frozenset(json.loads(text))


# Most teams and keys have the limits of many others: they are read once.
@lru_cache(maxsize=1024)
def _limits(text: str) -> Limits:
    """A newer release may have written limits that this one does not know: they do not hold here,
    and are kept where they are."""
    return _known(json.loads(text))


@lru_cache(maxsize=1024)
def _per_user(text: str) -> PerUser:
    found = json.loads(text).get(_PER_USER)
    return PerUser(_known(found["limits"]), bool(found["required"])) if found else PerUser()


def _known(limits: Mapping[str, Any]) -> Limits:
    return Limits(**{name: value for name, value in limits.items() if name in _LIMITS})


def routed_of(day: str, row: Sequence[Any]) -> tuple[str, UsageRow]:
    """What went to one upstream: upstream, team, key, model, calls, images, cost."""
    upstream, team, key_id, model, requests, images, cost = row
    found = UsageRow(
        day, team, key_id, model, requests=int(requests), images=int(images), cost=int(cost)
    )
    return upstream, found
