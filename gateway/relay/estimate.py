"""What a call would cost, and whether it would be admitted: the answer of an estimate.

It is read and planned as the call itself would be; then nothing is taken, held, sent or booked.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from itertools import product

from gateway.domain.call import Call, Inquiry, Json, Operation
from gateway.domain.charge import Quote
from gateway.domain.errors import (
    GatewayError,
    InvalidRequest,
    ModelNotAllowed,
    ModelRetired,
    RateLimited,
    TeamFault,
    UpstreamAccount,
)
from gateway.domain.ledger import Balance, Basis, Denied, Line, Outcome
from gateway.domain.money import Money, format_dollars
from gateway.domain.owned import Anchor
from gateway.domain.price import OLD_QUALITIES, OPEN, CannotPrice, parse_size, raised
from gateway.domain.quota import Demand, Limit, Refusal, Unit
from gateway.domain.receipt import CacheResult, Delivery, Receipt
from gateway.domain.route import Model
from gateway.domain.team import Caller
from gateway.ports import Clock, Lent
from gateway.relay import headers
from gateway.relay.admission import quota_exceeded, rate_limited
from gateway.relay.budget import BudgetView
from gateway.relay.flights import Head
from gateway.relay.media import FORM_TYPE, JSON_TYPE, media_of
from gateway.relay.plan import CacheWish, Plan, Planner
from gateway.relay.read import Reader, ReadRules, reader_for

REFUSALS = frozenset({"model_not_priced", "max_cost_exceeded"})
"""Codes of an ``InvalidRequest`` that are about money or rules, not about the body: what an
estimate tells of, and does not fail with."""
MISSING = "missing_required_parameter"
QUALITIES = ("high", "medium", "low")
ABOVE = ("max", "xhigh")
SMALL = "1024x1024"
CHEAPER_PERCENT = 75
"""An alternative costs at most so much of what was asked, and of the one before it."""
MAX_ALTERNATIVES = 3
MAX_AT_ONCE = 4
"""Estimates of one key, in one process."""
RETRY_SECONDS = 1.0
MAX_KINDS = 1000
LAST = 50
"""How many settlements of a kind make its mean."""

Kind = tuple[str, str, str, str, str, str, str]


class Observed:
    """What the last pictures of each kind did cost, a picture, in this process.

    A kind is an upstream, the model there, its price, the operation, and what was asked for: size,
    quality and format. Hears of every request's end, as ``Telemetry``.
    """

    def __init__(self) -> None:
        self._costs: OrderedDict[Kind, deque[Money]] = OrderedDict()

    def finished(self, receipt: Receipt, delivery: Delivery) -> None:
        exact = receipt.outcome is Outcome.DELIVERED and receipt.basis is Basis.USAGE
        if not exact or receipt.images < 1:
            return
        kind = (
            *(receipt.upstream, receipt.model_served, receipt.price_id, receipt.operation),
            *(receipt.size, receipt.quality, receipt.output_format),
        )
        costs = self._costs.get(kind)
        if costs is None:
            costs = self._costs[kind] = deque(maxlen=LAST)
        costs.append(receipt.cost // receipt.images)
        self._costs.move_to_end(kind)
        if len(self._costs) > MAX_KINDS:
            self._costs.popitem(last=False)

    def mean(self, plan: Plan, call: Call) -> Money | None:
        """Of one picture, in nano-dollars; None where none like it was bought yet."""
        kind = (
            *(plan.upstream.name, plan.target.model, plan.quote.price_id),
            *(call.operation.value, call.size, call.quality, call.output_format),
        )
        costs = self._costs.get(kind)
        return sum(costs) // len(costs) if costs else None


class Estimates:
    """Answers what calls would cost."""

    def __init__(self, budgets: BudgetView, observed: Observed, clock: Clock) -> None:
        self._budgets = budgets
        self._observed = observed
        self._clock = clock
        self._running: Counter[str] = Counter()

    @contextmanager
    def turn(self, caller: Caller) -> Iterator[None]:
        """One of the few estimates that a key may have under way in this process: no rate is asked
        of them, and each may be a large upload. Raises ``RateLimited``, before anything is read."""
        key = caller.key.id
        if self._running[key] >= MAX_AT_ONCE:
            raise RateLimited(
                f"This key has {MAX_AT_ONCE} estimates under way, which is the most at a time; try "
                "again in a moment.",
                reason="concurrent_estimates",
                retry_after_seconds=RETRY_SECONDS,
            )
        self._running[key] += 1
        try:
            yield
        finally:
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]

    async def answer(
        self,
        rid: str,
        planner: Planner,
        caller: Caller,
        call: Call,
        wish: CacheWish,
        anchor: Anchor | None = None,
    ) -> tuple[Head, Plan | None]:
        """The estimate, and the plan where the call could be planned.

        Raises what the call itself would be refused for where that is its body: ``ModelNotFound``,
        ``InvalidRequest``; and ``LedgerUnavailable``.
        """
        now = self._clock.now()
        model, plan, refusal = await _plan(planner, caller, call, wish, now, anchor)
        lines, balances = await self._budgets.budgets(caller.lines(now))
        if plan is not None and refusal is None:
            refusal = _never_fits(plan) or _no_room(plan, dict(zip(lines, balances, strict=True)))
        target = plan.target if plan else model.target if model else None
        described: dict[str, Json] = {
            "object": "image.estimate",
            "request_id": rid,
            "operation": call.operation.value,
            "model": call.model or (plan.call.model if plan else None),
            "model_served": target.model if target else None,
            "upstream": target.upstream if target else None,
            "images": call.n,
            "changed": {change.name: change.after for change in plan.call.changed} if plan else {},
            "cache": plan.cache.value if plan else None,
            **self._costs(plan),
            "admitted": refusal is None,
            "refusal": _say_refusal(refusal) if refusal else None,
            "budgets": [
                _say_budget(line, balance) for line, balance in zip(lines, balances, strict=True)
            ],
            "rate_limits": [
                _say_rate(limit)
                for limit in caller.limits
                if limit.unit is not Unit.MONEY and limit.amount is not None
            ],
            "cheaper": self._cheaper(plan) if plan else [],
        }
        said = (
            ("content-type", JSON_TYPE),
            ("x-request-id", rid),
            *headers.NOTHING_SPENT,
            *headers.of_sunsets(plan.sunsets if plan else ()),
            *headers.of_budget(lines, balances),
        )
        return Head.of(200, said, json.dumps(described).encode()), plan

    def _costs(self, plan: Plan | None) -> dict[str, Json]:
        if plan is None:
            return dict.fromkeys(("bound_usd", "bound_confidence", "likely_usd", "likely_basis"))
        bound = plan.quote.bound
        likely, basis = self._likely(plan, plan.call)
        return {
            "bound_usd": format_dollars(bound.amount),
            "bound_confidence": bound.confidence.value,
            "likely_usd": None if likely is None else format_dollars(likely),
            "likely_basis": basis,
        }

    def _likely(self, plan: Plan, call: Call) -> tuple[Money | None, str | None]:
        """What a call will probably cost, and how that is known.

        The formula is exact in what is drawn, so it goes first; what an input picture costs is not
        published, so with one what was seen goes first.
        """
        if plan.cache is CacheResult.HIT:
            return 0, "cache"
        row = plan.quote.row
        formula = row.price.likely(call, plan.quote.prices) if row else None
        mean = self._observed.mean(plan, call)
        if mean is not None and (formula is None or call.inputs):
            return mean * call.n, "observed"
        return formula, None if formula is None else "formula"

    def _cheaper(self, plan: Plan) -> list[Json]:
        found: list[Json] = []
        for change, call, bound in alternatives(plan.call, plan.quote):
            likely, _ = self._likely(plan, call)
            found.append(
                {
                    "change": dict(change),
                    "bound_usd": format_dollars(bound),
                    "likely_usd": None if likely is None else format_dollars(likely),
                }
            )
        return found


async def _plan(
    planner: Planner,
    caller: Caller,
    call: Call,
    wish: CacheWish,
    now: datetime,
    anchor: Anchor | None,
) -> tuple[Model | None, Plan | None, GatewayError | None]:
    """As the call itself would be planned, as far as that goes, and what would refuse it."""
    try:
        call = planner.repaired(caller, call, now)
        model = planner.route(caller, call.model, now)
    except (ModelNotAllowed, ModelRetired) as error:
        return None, None, error
    try:
        return model, await _planned(planner, caller, call, wish, now, anchor), None
    except (UpstreamAccount, ModelRetired) as error:
        return model, None, error
    except InvalidRequest as error:
        if error.code not in REFUSALS:
            raise
        if error.code != "max_cost_exceeded":
            return model, None, error
        # What it would cost is then the very thing to be told.
        lifted = _without_most(caller)
        return model, await _planned(planner, lifted, call, wish, now, anchor), error


async def _planned(
    planner: Planner,
    caller: Caller,
    call: Call,
    wish: CacheWish,
    now: datetime,
    anchor: Anchor | None,
) -> Plan:
    return await planner.plan(planner.route_call(caller, call, now, anchor), wish, now)


def alternatives(call: Call, quote: Quote) -> list[tuple[Mapping[str, str], Call, Money]]:
    """Ways to ask for the same with a lower quality or a smaller size: what to change, the call
    then, and its bound in nano-dollars. Each is a quarter cheaper than what was asked and than the
    one before; at most three, the cheapest last."""
    if quote.row is None:
        return []
    asked = OLD_QUALITIES.get(call.quality, call.quality)
    qualities: Sequence[str] = QUALITIES if asked in OPEN or asked in ABOVE else ()
    if asked in QUALITIES:
        qualities = QUALITIES[QUALITIES.index(asked) + 1 :]
    found = []
    for size, quality in product(("", SMALL) if _is_larger(call.size) else ("",), ("", *qualities)):
        change = {name: said for name, said in (("size", size), ("quality", quality)) if said}
        other = replace(call, size=size or call.size, quality=quality or call.quality)
        try:
            bound = raised(quote.row.price.bound(other, quote.prices), quote.factor).amount
        except CannotPrice:
            continue
        found.append((change, other, bound))
    # Of two that cost the same, the one that changes less.
    found.sort(key=lambda one: (-one[2], len(one[0])))
    kept: list[tuple[Mapping[str, str], Call, Money]] = []
    last = quote.bound.amount
    for one in found:
        if 100 * one[2] <= CHEAPER_PERCENT * last:
            kept.append(one)
            last = one[2]
    return kept if len(kept) <= MAX_ALTERNATIVES else [*kept[: MAX_ALTERNATIVES - 1], kept[-1]]


def _is_larger(size: str) -> bool:
    """Whether 1024x1024 is smaller, or may be."""
    pixels = parse_size(size)
    return size in OPEN if pixels is None else pixels[0] * pixels[1] > 1024 * 1024


def _without_most(caller: Caller) -> Caller:
    """The same caller, who may spend as much as it likes on one request."""
    team, key = caller.team, caller.key
    return replace(
        caller,
        team=replace(team, limits=replace(team.limits, max_cost_per_request=None)),
        key=replace(key, limits=replace(key.limits, max_cost_per_request=None)),
    )


def _demand(plan: Plan) -> Demand:
    """A kept answer takes one request, and no slot."""
    hit = plan.cache is CacheResult.HIT
    return Demand(requests=1, images=0, slots=0) if hit else plan.demand


def _never_fits(plan: Plan) -> GatewayError | None:
    """The refusal by a rate that this call can never meet. Whether it would have to wait is not
    known: asking the gate would take from it."""
    demand = _demand(plan)
    for limit in plan.rates:
        if limit.amount is not None and demand.of(limit.unit) > limit.amount:
            return rate_limited(Refusal(limit, None), plan.caller, demand)
    return None


def _no_room(plan: Plan, balances: Mapping[Line, Balance]) -> TeamFault | None:
    """The refusal by a budget, as the ledger would give it now."""
    for line in plan.lines:
        balance, amount = balances.get(line, Balance()), line.limit.amount
        if amount is not None and balance.used + plan.quote.bound.amount > amount:
            return quota_exceeded(Denied(line, balance), plan)
    return None


def _say_refusal(error: GatewayError) -> Json:
    return {
        "status": error.status,
        "type": error.type,
        "code": error.code,
        "param": error.param,
        "message": error.message,
    }


def _say_budget(line: Line, balance: Balance) -> Json:
    limit, ends = line.limit, line.period.ends
    left = None if limit.amount is None else max(0, limit.amount - balance.used)
    return {
        "scope": limit.scope.value,
        "owner": limit.owner,
        "window": limit.window.value,
        "limit_usd": _dollars(limit.amount),
        "soft_limit_usd": _dollars(limit.soft),
        "spent_usd": _dollars(balance.posted),
        "reserved_usd": _dollars(balance.pending),
        "remaining_usd": _dollars(left),
        "resets_at": None if ends is None else headers.say_instant(ends),
    }


def _say_rate(limit: Limit) -> Json:
    return {
        "scope": limit.scope.value,
        "owner": limit.owner,
        "unit": limit.unit.value,
        "window": limit.window.value,
        "limit": limit.amount,
    }


def _dollars(amount: Money | None) -> str | None:
    return None if amount is None else format_dollars(amount)


def estimate_reader(
    content_type: str, content_encoding: str | None, content_length: int | None, rules: ReadRules
) -> Reader:
    """The reader of a body that may be a generation or an edit. Raises what ``reader_for`` does."""
    edit = reader_for(
        *(Operation.EDIT, content_type, content_encoding, content_length, rules),
        path=Inquiry.ESTIMATE.path,
    )
    if media_of(content_type) == FORM_TYPE:
        return edit
    generation = reader_for(Operation.GENERATION, content_type, content_encoding, None, rules)
    return _EitherReader(generation, edit)


class _EitherReader:
    """Reads a JSON body as both operations would: one with ``images`` is an edit."""

    def __init__(self, generation: Reader, edit: Reader) -> None:
        self._generation = _Attempt(generation)
        self._edit = _Attempt(edit)

    def feed(self, chunk: bytes | Lent) -> None:
        self._generation.feed(chunk)
        self._edit.feed(chunk)
        if self._generation.error and self._edit.error:
            raise self._better()

    def close(self) -> Call:
        generation, edit = self._generation.close(), self._edit.close()
        if edit is not None:
            return edit
        if generation is not None and not generation.parameters.get("images"):
            return generation
        raise self._better()

    def _better(self) -> GatewayError:
        """The error of what the body is meant to be."""
        first, second = self._generation.error, self._edit.error
        if second is None or (
            first is not None and second.param == "images" and second.code == MISSING
        ):
            second = first
        if second is None:
            raise RuntimeError("a body that both can read has an error in neither")
        return second


class _Attempt:
    """One reader, and the error it ended with."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.error: GatewayError | None = None

    def feed(self, chunk: bytes | Lent) -> None:
        if self.error is None:
            try:
                self._reader.feed(chunk)
            except GatewayError as error:
                self.error = error

    def close(self) -> Call | None:
        if self.error is None:
            try:
                return self._reader.close()
            except GatewayError as error:
                self.error = error
        return None
