"""What is set aside before anything is bought: the gate's rates, then the ledger's money."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date, timedelta

from gateway.domain.call import Call
from gateway.domain.errors import GatewayError, InvalidRequest, QuotaExceeded, RateLimited
from gateway.domain.ledger import Balance, Claim, Claimed, Denied, Held, Line
from gateway.domain.money import say_dollars
from gateway.domain.quota import (
    Demand,
    Grant,
    Period,
    Refusal,
    Standing,
    Unit,
    Window,
)
from gateway.domain.team import Caller
from gateway.ports import Clock, Gate, Ledger
from gateway.relay import headers
from gateway.relay.budget import BudgetView, has_budget
from gateway.relay.plan import Plan, say_cheaper, say_owner

NOUNS = {Unit.REQUESTS: "request", Unit.IMAGES: "image", Unit.SLOTS: "request"}


class Admission:
    """The two ports that a call's demand is put to, all or nothing: the gate first, given back
    if the ledger refuses."""

    def __init__(
        self,
        gate: Gate,
        ledger: Ledger,
        lease: timedelta,
        worker: str,
        budgets: BudgetView,
        clock: Clock,
        *,
        repeat_unknown: bool = False,
    ) -> None:
        """``repeat_unknown``: under its Idempotency-Key a call of unknown outcome is bought again
        (``relay.on_unknown: repeat``)."""
        self._repeat_unknown = repeat_unknown
        self._gate = gate
        self._ledger = ledger
        self._lease = lease
        self._worker = worker
        self._budgets = budgets
        self._clock = clock

    def replace(self, lease: timedelta, *, repeat_unknown: bool) -> None:
        """From now on these hold; ``lease`` is no shorter than the longest call."""
        self._lease = lease
        self._repeat_unknown = repeat_unknown

    async def pass_gate(self, rid: str, plan: Plan, demand: Demand) -> Grant:
        """Rates and a slot. Raises ``RateLimited``, or ``InvalidRequest`` where it never fits."""
        answer = await self._gate.take(rid, plan.rates, demand)
        if isinstance(answer, Refusal):
            raise rate_limited(answer, plan.caller, demand)
        return answer

    async def pass_gate_for_replay(self, rid: str, caller: Caller) -> None:
        """A request, and nothing else: an answer that is there already. Raises ``RateLimited``."""
        demand = Demand(requests=1, images=0, slots=0)
        answer = await self._gate.take(rid, caller.rates, demand)
        if isinstance(answer, Refusal):
            raise rate_limited(answer, caller, demand)

    async def hold(self, rid: str, plan: Plan, idempotency_key: str | None) -> Held:
        """The bound, against every budget, durable before it returns. Raises ``QuotaExceeded``,
        ``KeyTaken``, ``LedgerUnavailable``; the gate has then been given back."""
        call, way = plan.call, plan.ways[0]
        claim = Claim(
            rid=rid,
            team=plan.caller.team.id,
            key_id=plan.caller.key.id,
            model=way.model.name,
            operation=call.operation,
            upstream=way.upstream.name,
            images=call.n,
            bound=way.quote.bound.amount,
            lines=plan.lines,
            at=plan.at,
            lease_ends=self._clock.now() + self._lease,
            price_id=way.quote.price_id,
            fingerprint=plan.fingerprint,
            idempotency_key=key_of(call, idempotency_key),
            worker=self._worker,
            repeat_unknown=self._repeat_unknown,
            user=plan.caller.recorded_user,
        )
        try:
            match await self._ledger.reserve(claim):
                case Denied() as denied:
                    self._budgets.learn((denied.line,), (denied.balance,))
                    raise quota_exceeded(denied, plan)
                case Claimed() as claimed:
                    raise KeyTaken(claimed)
                case held:
                    return _without_unasked(held, plan.lines)
        except (GatewayError, KeyTaken):
            await self.undo(rid, plan)
            raise

    async def undo(self, rid: str, plan: Plan) -> None:
        """Gives rates and slot back: for a call that was let in and then came to nothing."""
        await self._gate.undo(rid, plan.rates, plan.demand)

    def leave_at_once(self, rid: str) -> bool:
        """``leave``, where that has to wait for nothing; False, and nothing done, where it has."""
        return self._gate.release_at_once(rid)

    async def leave(self, rid: str, plan: Plan) -> None:
        """Gives the slot back."""
        await self._gate.release(rid, plan.rates)


def rate_limited(refusal: Refusal, caller: Caller, demand: Demand) -> GatewayError:
    """What a caller is told whom the gate refused."""
    limit, wait = refusal.limit, refusal.wait_seconds
    amount = limit.amount or 0
    noun = NOUNS[limit.unit] + ("" if amount == 1 else "s")
    per = " at a time" if limit.unit is Unit.SLOTS else " a minute"
    limited = f"{say_owner(limit.scope, caller)} is limited to {amount} {noun}{per}"
    if wait is None and amount == 0:
        return InvalidRequest(
            f"{limited}. Ask an administrator to raise the limit.",
            code="limit_exceeded",
            reason="never_fits",
        )
    if wait is None:
        return InvalidRequest(
            f"{limited}, and this request asks for {demand.of(limit.unit)}. Ask for fewer pictures "
            "at once, or ask an administrator to raise the limit.",
            code="limit_exceeded",
            param="n",
            reason="never_fits",
        )
    words = f"{math.ceil(wait)} s" if wait >= 1 else "a moment"
    error = RateLimited(
        f"{limited}; try again in {words}.",
        reason={
            Unit.REQUESTS: "requests_per_minute",
            Unit.IMAGES: "images_per_minute",
            Unit.SLOTS: "concurrent_requests",
        }[limit.unit],
        retry_after_seconds=wait,
    )
    error.headers = headers.of_rates((Standing(refusal.counted, 0, wait),))
    return error


def _without_unasked(held: Held, lines: Sequence[Line]) -> Held:
    """As long as the call is under way only the balances of budgets are kept: 70 bytes each, and
    most lines have none."""
    balances = [
        balance if has_budget(line) else _UNASKED
        for line, balance in zip(lines, held.balances, strict=False)
    ]
    return Held(held.rid, tuple(balances), held.duplicate)


_UNASKED = Balance()
SPANS = {Window.DAY: "a day", Window.WEEK: "a week", Window.MONTH: "a month"}


def quota_exceeded(denied: Denied, plan: Plan) -> QuotaExceeded:
    """What a caller is told whose budget has no room for a call's bound."""
    line, balance, bound = denied.line, denied.balance, plan.quote.bound.amount
    amount, period = line.limit.amount or 0, line.period
    whose = say_owner(line.limit.scope, plan.caller)
    advice = say_cheaper(plan.call, plan.quote, amount - balance.used)
    held = f" and holds {say_dollars(balance.pending)} for running requests" * bool(balance.pending)
    if bound > amount:
        span = SPANS.get(period.window, "in all")
        return QuotaExceeded(
            f"{whose} may spend {say_dollars(amount)} {span}; this request could cost up to "
            f"{say_dollars(bound)}, so waiting does not help.{advice}"
        )
    then = "It is not renewed: ask an administrator to raise it."
    if period.ends is not None:
        then = f"Resets {period.ends:%Y-%m-%d %H:%M} UTC."
    return QuotaExceeded(
        f"{whose} has spent {say_dollars(balance.posted)} of its {say_dollars(amount)} "
        f"{_when(period)}{held}; this request could cost up to {say_dollars(bound)}. {then}{advice}"
    )


def _when(period: Period) -> str:
    """A running period in words. A month goes by its label: where the team is, it may have begun
    on another day than in UTC."""
    match period.window:
        case Window.DAY:
            return "today"
        case Window.WEEK:
            return "this week"
        case Window.MONTH:
            year, month = period.label.removeprefix("m|").split("-")
            return f"for {date(int(year), int(month), 1):%B}"
        case _:
            return "in all"


class KeyTaken(Exception):
    """An Idempotency-Key belongs to another call already: who looks there answers this one. No
    answer by itself, so it is none of the tree's errors."""

    def __init__(self, claimed: Claimed) -> None:
        super().__init__(f"The key belongs to {claimed.rid}.")
        self.claimed = claimed


def key_of(call: Call, idempotency_key: str | None) -> str | None:
    """The name that the ledger knows an Idempotency-Key by: each route has its own."""
    return None if idempotency_key is None else f"{call.operation.value}:{idempotency_key}"


def key_reused() -> InvalidRequest:
    return InvalidRequest(
        "This Idempotency-Key was used for another request. Use a new key for each request that "
        "differs.",
        status=422,
        code="idempotency_key_reused",
        param="Idempotency-Key",
        reason="idempotency_key_reused",
    )
