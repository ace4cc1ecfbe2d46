"""A provider's bill of one day against the books, model by model, and what would mend them.

A line item belongs to the model before its first comma: ``gpt-image-2.5-flare, image output``. That
is a model which the gateway has from this upstream, or a dated version of one
(``gpt-image-2.5-flare-2026-09-08``); of several the longest. Every other line item is listed, and
compared with nothing: the account may serve more than this gateway.

A model that is served by this upstream alone is compared with all that is booked under its name.
Of one that others serve too, only the calls count that went here in the end, which the ledger knows
of each call; what is booked without a call (adjustments, calls that were forgotten) cannot be laid
at one door, and is listed. Where the names of a model at its upstreams differ, they are one model.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from gateway.domain.bill import BilledItem
from gateway.domain.books import Hold
from gateway.domain.ledger import State, UsageRow
from gateway.domain.money import Money, exact_dollars, format_dollars
from gateway.domain.route import Target

NO_LINE_ITEM = "(no line item)"
_VERSION = re.compile(r"-\d{4}-\d\d-\d\d")
COLUMNS = ("day", "upstream", "model", "billed_usd", "booked_usd", "difference_usd", "percent")


@dataclass(frozen=True, slots=True)
class Drift:
    """One model, or the whole day. Money is nano-dollars; ``model`` is the provider's name."""

    model: str
    billed: Money
    booked: Money

    @property
    def difference(self) -> Money:
        """What the books lack; negative where they have too much."""
        return self.billed - self.booked

    def beyond(self, percent: Decimal) -> bool:
        """Whether the books are off by more than ``percent`` of what was billed; without a bill,
        by anything at all."""
        return abs(self.difference) * 100 > percent * abs(self.billed)

    @property
    def percent(self) -> str:
        """The difference in percent of the bill, for people: ``+2.00``; empty without a bill."""
        if not self.billed:
            return "" if self.difference else "0.00"
        share = Decimal(self.difference) * 100 / abs(Decimal(self.billed))
        return f"{share:+.2f}" if self.difference else "0.00"


@dataclass(frozen=True, slots=True)
class Proposal:
    """An adjustment that would bring a team's share of one model to the bill. ``model`` is the
    configured name. The same bill against the same books has the same ids, so that applying it
    twice moves money once."""

    id: str
    team: str
    model: str
    day: str
    amount: Money
    reason: str

    @property
    def command(self) -> str:
        """What a person types for it."""
        return shlex.join(
            [
                *("gateway", "ledger", "adjust", "--team", self.team, "--model", self.model),
                *("--day", self.day, "--amount", format_dollars(self.amount)),
                *("--id", self.id, "--reason", self.reason),
            ]
        )


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """``other`` are line items of no model that this upstream serves here; ``unrouted`` are models
    of the books that no entry routes any more, and what they cost; ``nobodys`` are models whose
    difference has no team to be split over. ``seen`` is what the comparison was made with: each
    configured name of these models, and what all teams were booked for it."""

    upstream: str
    day: str
    models: tuple[Drift, ...]
    other: tuple[BilledItem, ...] = ()
    unrouted: tuple[tuple[str, Money], ...] = ()
    proposals: tuple[Proposal, ...] = ()
    nobodys: tuple[str, ...] = ()
    seen: tuple[tuple[str, Money], ...] = ()
    unattributed: tuple[tuple[str, Money], ...] = ()
    """Booked for models that other upstreams serve too, without a call that says which."""

    @property
    def total(self) -> Drift:
        return Drift(
            "total",
            sum(drift.billed for drift in self.models),
            sum(drift.booked for drift in self.models),
        )

    def drifts(self, percent: Decimal) -> list[Drift]:
        """The models, and then the day, that are off by more than ``percent``."""
        return [drift for drift in (*self.models, self.total) if drift.beyond(percent)]


def model_of(line_item: str, models: Iterable[str]) -> str | None:
    """The longest of ``models`` that a line item belongs to, by the rule of this file."""
    name = line_item.partition(",")[0].strip()
    fits = (
        model
        for model in models
        if name == model
        or (name.startswith(model) and _VERSION.fullmatch(name.removeprefix(model)))
    )
    return max(fits, key=len, default=None)


def reconcile(
    upstreams: Sequence[str],
    day: str,
    billed: Iterable[BilledItem],
    rows: Sequence[UsageRow],
    served: Callable[[str], Sequence[Target]],
    configured: Iterable[str] = (),
    routed: Iterable[tuple[str, UsageRow]] = (),
) -> Reconciliation:
    """Compares. ``upstreams`` are all that are on this bill: a provider's bill is of an
    organization, which may have several keys. ``rows`` are the day's usage of every team,
    ``served`` says where a configured name is served (nowhere: it is no entry any more),
    ``configured`` are the models that these upstreams may serve, as the provider calls them,
    ``routed`` the day's calls by the upstream that they went to.

    Several configured names may be one model of the provider; their costs are added up.
    """
    upstream = "+".join(upstreams)
    mine: dict[str, list[UsageRow]] = {}
    unrouted: dict[str, Money] = {}
    shared: dict[str, Money] = {}
    group = _Groups()
    for row in rows:
        targets = served(row.model)
        here = [target for target in targets if target.upstream in upstreams]
        group.join(target.model for target in here)
        if not targets:
            unrouted[row.model] = unrouted.get(row.model, 0) + row.cost
        elif len(here) == len(targets):
            mine.setdefault(here[0].model, []).append(row)
        elif here:
            shared[row.model] = shared.get(row.model, 0) + row.cost
    for where, row in routed:
        if row.model in shared:
            shared[row.model] -= row.cost
            names = (target.model for target in served(row.model) if target.upstream == where)
            if where in upstreams and (name := next(names, None)) is not None:
                mine.setdefault(name, []).append(row)
    names_here = {row.model for of_model in mine.values() for row in of_model}
    models = {*configured, *mine, *group.names}
    mine = group.merged(mine)
    bill: dict[str, Money] = {}
    other: dict[str, Money] = {}
    for item in billed:
        model = model_of(item.line_item, models)
        if model is None:
            into, name = other, item.line_item or NO_LINE_ITEM
        else:
            into, name = bill, group.of(model)
        into[name] = into.get(name, 0) + item.amount
    drifts = [
        Drift(model, bill.get(model, 0), sum(row.cost for row in mine.get(model, ())))
        for model in sorted({*bill, *mine})
    ]
    proposals: list[Proposal] = []
    nobodys: list[str] = []
    for drift in drifts:
        if not drift.difference:
            continue
        shares = _shares(drift.difference, mine.get(drift.model, ()))
        if not shares:
            nobodys.append(drift.model)
        proposals += [
            _proposal(upstream, day, drift, team, model, amount)
            for (team, model), amount in shares.items()
            if amount
        ]
    return Reconciliation(
        upstream,
        day,
        tuple(drifts),
        tuple(BilledItem(name, amount) for name, amount in sorted(other.items())),
        tuple(sorted(unrouted.items())),
        tuple(proposals),
        tuple(nobodys),
        tuple(sorted(_booked(row for row in rows if row.model in names_here).items())),
        tuple((model, cost) for model, cost in sorted(shared.items()) if cost),
    )


class _Groups:
    """Names of a provider's that are one model here."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}

    @property
    def names(self) -> set[str]:
        return set(self._above)

    def of(self, name: str) -> str:
        """What its group is called: by the name that was joined first."""
        while (above := self._above.get(name, name)) != name:
            name = above
        return name

    def join(self, names: Iterable[str]) -> None:
        first: str | None = None
        for name in names:
            self._above.setdefault(name, name)
            if first is None:
                first = name
            elif self.of(name) != self.of(first):
                self._above[self.of(name)] = self.of(first)

    def merged(self, rows: Mapping[str, Sequence[UsageRow]]) -> dict[str, list[UsageRow]]:
        found: dict[str, list[UsageRow]] = {}
        for name, of_name in rows.items():
            found.setdefault(self.of(name), []).extend(of_name)
        return found


def _booked(rows: Iterable[UsageRow]) -> dict[str, Money]:
    """By the configured name."""
    booked: dict[str, Money] = {}
    for row in rows:
        booked[row.model] = booked.get(row.model, 0) + row.cost
    return booked


def split(amount: Money, weights: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], Money]:
    """``amount`` in proportion to ``weights`` (not negative, not all 0), by largest remainder: the
    parts are whole nano-dollars and their sum is ``amount``."""
    whole, sign = sum(weights.values()), 1 if amount >= 0 else -1
    parts = {who: abs(amount) * weight // whole for who, weight in weights.items()}
    left = abs(amount) - sum(parts.values())
    by_remainder = sorted(weights, key=lambda who: (-(abs(amount) * weights[who] % whole), who))
    for who in by_remainder[:left]:
        parts[who] += 1
    return {who: sign * part for who, part in parts.items()}


def _shares(amount: Money, rows: Iterable[UsageRow]) -> dict[tuple[str, str], Money]:
    """By what each team was booked for each name; where nothing was booked (a model without a
    price), by its requests, and by its pictures where it drew for another model's requests. Empty
    where nobody asked."""
    costs: dict[tuple[str, str], int] = {}
    requests: dict[tuple[str, str], int] = {}
    for row in rows:
        who = (row.team, row.model)
        costs[who] = costs.get(who, 0) + row.cost
        asked = row.requests - row.cached_requests if row.requests else row.images
        requests[who] = requests.get(who, 0) + max(asked, 0)
    for weights in (costs, requests):
        positive = {who: weight for who, weight in weights.items() if weight > 0}
        if positive:
            return split(amount, positive)
    return {}


def _proposal(
    upstream: str, day: str, drift: Drift, team: str, model: str, amount: Money
) -> Proposal:
    # With both sums in it: a bill that grows later, or a call that is settled late, is another
    # adjustment, not a repeat of this one.
    parts = (upstream, day, drift.model, str(drift.billed), str(drift.booked), team, model)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    reason = (
        f"{upstream} billed {exact_dollars(drift.billed)} for {drift.model} on {day}, "
        f"booked were {exact_dollars(drift.booked)}"
    )
    return Proposal(f"reconcile-{day}-{digest}", team, model, day, amount, reason)


def as_json(
    found: Reconciliation,
    percent: Decimal,
    suspects: Sequence[Hold] = (),
    applied: Iterable[str] = (),
) -> dict[str, object]:
    """Everything, dollars as exact decimal text. ``applied`` are ids that were booked just now."""
    done = set(applied)
    return {
        "upstream": found.upstream,
        "day": found.day,
        "alert_percent": f"{percent.normalize():f}",
        "drifts": [drift.model for drift in found.drifts(percent)],
        "models": [_drift_json(drift) for drift in found.models],
        "total": _drift_json(found.total),
        "other": [
            {"line_item": item.line_item, "billed_usd": format_dollars(item.amount)}
            for item in found.other
        ],
        "unattributed": [
            {"model": model, "booked_usd": format_dollars(cost)}
            for model, cost in found.unattributed
        ],
        "unrouted": [
            {"model": model, "booked_usd": format_dollars(cost)} for model, cost in found.unrouted
        ],
        "nobodys": list(found.nobodys),
        "suspects": [
            {
                "rid": hold.rid,
                "team": hold.team,
                "model": hold.model,
                "cost_usd": format_dollars(hold.cost),
                "why": say_doubt(hold),
            }
            for hold in suspects
        ],
        "proposals": [
            {
                "id": proposal.id,
                "team": proposal.team,
                "model": proposal.model,
                "day": proposal.day,
                "amount_usd": format_dollars(proposal.amount),
                "command": proposal.command,
                "applied": proposal.id in done,
            }
            for proposal in found.proposals
        ],
    }


def as_csv(found: Reconciliation) -> str:
    """The comparison, a model a line, line items of no model with nothing booked, and the total."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    others = [Drift(f"other: {item.line_item}", item.amount, 0) for item in found.other]
    for drift in (*found.models, found.total):
        writer.writerow([found.day, found.upstream, *_drift_json(drift).values()])
    for drift in others:
        billed = format_dollars(drift.billed)
        writer.writerow([found.day, found.upstream, drift.model, billed, "", "", ""])
    return out.getvalue()


def say_doubt(hold: Hold) -> str:
    """Why a hold asks for a look, in words."""
    words = {
        "unpriced": "the model had no price: nothing was booked",
        "no_usage": "the answer had no usage: booked at its bound",
        "invalid_usage": "the answer's usage cannot be true: booked at its bound",
        "over_bound": "it cost more than its bound",
        "soft": "its bound was a guess",
    }
    said = [words.get(flag, flag) for flag in hold.flags]
    if hold.state is State.EXPIRED:
        said.insert(0, "outcome unknown: booked at its bound")
    return "; ".join(said)


def _drift_json(drift: Drift) -> dict[str, str]:
    return {
        "model": drift.model,
        "billed_usd": format_dollars(drift.billed),
        "booked_usd": format_dollars(drift.booked),
        "difference_usd": format_dollars(drift.difference),
        "percent": drift.percent,
    }
