"""What is set aside, in which order it is given back, and every word of a refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from gateway.domain.call import Call, Encoding, Operation
from gateway.domain.charge import Quote
from gateway.domain.errors import (
    GatewayError,
    InvalidRequest,
    LedgerUnavailable,
    QuotaExceeded,
    RateLimited,
)
from gateway.domain.ledger import (
    Balance,
    Claim,
    Claimed,
    Denied,
    Entry,
    Held,
    Line,
    Replay,
    Reroute,
    Settlement,
    State,
    UsageRow,
)
from gateway.domain.money import Money
from gateway.domain.price import Answer, Bound, Confidence, PriceList, PriceRow
from gateway.domain.quota import (
    Demand,
    Grant,
    Limit,
    Period,
    Refusal,
    Scope,
    Unit,
    Window,
    period,
)
from gateway.domain.receipt import CacheResult
from gateway.domain.route import Model, Target
from gateway.domain.team import Caller, Key, Limits, Team
from gateway.ports import Credential, Outgoing, Reply
from gateway.relay.admission import Admission, KeyTaken, key_of, key_reused
from gateway.relay.budget import BudgetView
from gateway.relay.plan import Plan, Way
from tests.clock import StillClock

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
DAY = Period(Window.DAY, "d|2026-11-22", datetime(2026, 11, 23, tzinfo=UTC))
WEEK = Period(Window.WEEK, "w|2026-W47", datetime(2026, 11, 23, tzinfo=UTC))
MONTH = Period(Window.MONTH, "m|2026-11", datetime(2026, 12, 1, tzinfo=UTC))
TOTAL = Period(Window.TOTAL, "t|all", None)
LAST_NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)
HERE, THERE = ZoneInfo("Pacific/Kiritimati"), ZoneInfo("Pacific/Niue")
DECEMBER = Period(Window.MONTH, "m|2026-12", datetime(2027, 1, 1, tzinfo=UTC))
CENT = 10_000_000
DOLLAR = 100 * CENT
LEASE = timedelta(seconds=660)
STILL = StillClock(NOW)


@dataclass
class Stores:
    """Gate and ledger at once: they answer as told, and write down what they are asked."""

    gate: Grant | Refusal = field(default_factory=Grant)
    ledger: Held | Denied | Claimed | GatewayError | RuntimeError = field(
        default_factory=lambda: Held("req_1")
    )
    done: list[str] = field(default_factory=list)
    claim: Claim | None = None

    async def take(self, rid: str, limits: Sequence[Limit], demand: Demand) -> Grant | Refusal:
        self.done.append(f"take {rid} {demand.requests}/{demand.images}/{demand.slots}")
        return self.gate

    async def release(self, rid: str, limits: Sequence[Limit]) -> None:
        self.done.append(f"release {rid}")

    def release_at_once(self, rid: str) -> bool:
        return False

    async def undo(self, rid: str, limits: Sequence[Limit], demand: Demand) -> None:
        self.done.append(f"undo {rid} {demand.requests}/{demand.images}/{demand.slots}")

    async def reserve(self, claim: Claim) -> Held | Denied | Claimed:
        self.done.append(f"reserve {claim.rid} {claim.bound // CENT}")
        self.claim = claim
        if isinstance(self.ledger, Exception):
            raise self.ledger
        return self.ledger

    async def claimed(
        self, team: str, idempotency_key: str, fingerprint: str, at: datetime
    ) -> Claimed | None:
        raise NotImplementedError

    async def reroute(self, reroute: Reroute) -> Held | Denied:
        raise NotImplementedError

    async def settle(self, settlement: Settlement) -> Entry:
        raise NotImplementedError

    async def replay(self, replay: Replay) -> None:
        raise NotImplementedError

    async def sweep(
        self, now: datetime, limit: int = 100, silent_before: datetime | None = None
    ) -> list[Entry]:
        raise NotImplementedError

    async def balances(self, lines: Sequence[Line]) -> list[Balance]:
        raise NotImplementedError

    async def usage(
        self, since: str | None = None, until: str | None = None, team: str | None = None
    ) -> list[UsageRow]:
        raise NotImplementedError

    async def open_holds(self) -> int:
        raise NotImplementedError

    async def unresolved(self) -> Money:
        raise NotImplementedError

    async def ping(self) -> None:
        return

    async def aclose(self) -> None:
        return

    async def admit(self, plan: Plan, idempotency_key: str | None = None) -> Held:
        """As the relay does: the gate, then the ledger."""
        admission = Admission(self, self, LEASE, "pod/1", BudgetView(self, STILL), STILL)
        await admission.pass_gate("req_1", plan, plan.demand)
        return await admission.hold("req_1", plan, idempotency_key)

    async def refused(self, plan: Plan) -> Any:
        """A ``GatewayError``, or ``KeyTaken``."""
        with pytest.raises((GatewayError, KeyTaken)) as refused:
            await self.admit(plan)
        return refused.value


class Comet:
    name = "comet"
    provider = "openai"
    address = ("comet.test", 443)
    ready = True
    credentials = (Credential("1"),)

    def masked(self, text: bytes) -> bytes:
        raise AssertionError("it says nothing")

    async def send(self, outgoing: Outgoing, credential: str) -> Reply:
        raise NotImplementedError

    async def aclose(self) -> None:
        return


@dataclass(frozen=True)
class ByQuality:
    nanousd: Mapping[str, int]

    def knows(self, size: str, quality: str) -> bool:
        return True

    def bound(self, call: Call, prices: PriceList) -> Bound:
        return Bound(call.n * self.nanousd[call.quality], Confidence.HARD)

    def likely(self, call: Call, prices: PriceList) -> Money | None:
        return None

    def cost(self, answer: Answer, prices: PriceList) -> Money | None:
        return None


PRICE = ByQuality({"high": 21 * CENT, "medium": 20 * CENT, "low": 5_880_000})


def a_plan(
    *, n: int = 1, key_name: str = "ci", priced: bool = True, lines: tuple[Line, ...] = ()
) -> Plan:
    call = Call(
        *(Operation.GENERATION, Encoding.JSON, "application/json", "art", 3),
        *({"prompt": "cat"}, (), n, "1024x1024", "high"),
    )
    row = PriceRow("openai", "flare", date(2026, 1, 1), "list", PRICE)
    prices = PriceList({})
    bound = PRICE.bound(call, prices)
    limits = Limits(60, 20, 10)
    caller = Caller(Team("growth", limits=limits), Key("k1", "growth", key_name))
    model = Model("art", Target("comet", "flare"))
    return Plan(
        caller=caller,
        call=call,
        asked=model,
        ways=(Way(model, model.target, Comet(), Quote(bound, prices, row if priced else None)),),
        demand=Demand(images=n, money=bound.amount),
        rates=tuple(limit for limit in caller.limits if limit.unit is not Unit.MONEY),
        lines=lines,
        fingerprint="f00",
        cache=CacheResult.MISS,
        keep=True,
        at=NOW,
    )


def team_line(amount: int, period: Period = MONTH) -> Line:
    return Line(Limit(Scope.TEAM, "growth", Unit.MONEY, period.window, amount), period)


def key_line(amount: int, period: Period = DAY) -> Line:
    return Line(Limit(Scope.KEY, "k1", Unit.MONEY, period.window, amount), period)


# The order


async def test_the_gate_first_and_then_the_ledger() -> None:
    stores = Stores()
    held = await stores.admit(a_plan(n=2))
    assert held == Held("req_1")
    assert stores.done == ["take req_1 1/2/1", "reserve req_1 42"]


async def test_a_closed_gate_is_as_far_as_it_goes() -> None:
    limit = Limit(Scope.TEAM, "growth", Unit.REQUESTS, Window.MINUTE, 60)
    stores = Stores(gate=Refusal(limit, 1.0))
    await stores.refused(a_plan())
    assert stores.done == ["take req_1 1/1/1"]


@pytest.mark.parametrize(
    "answer",
    [
        Denied(team_line(DOLLAR), Balance()),
        Claimed("req_0", State.HELD, True),
        LedgerUnavailable("The ledger does not answer."),
    ],
)
async def test_what_the_gate_gave_is_given_back_when_the_ledger_refuses(
    answer: Denied | Claimed | GatewayError,
) -> None:
    stores = Stores(ledger=answer)
    await stores.refused(a_plan(n=2))
    assert stores.done == ["take req_1 1/2/1", "reserve req_1 42", "undo req_1 1/2/1"]


async def test_a_degraded_grant_says_so() -> None:
    stores = Stores(gate=Grant(degraded=True))
    admission = Admission(stores, stores, LEASE, "pod/1", BudgetView(stores, STILL), STILL)
    plan = a_plan()
    assert (await admission.pass_gate("req_1", plan, plan.demand)).degraded


async def test_a_slot_is_given_back() -> None:
    stores = Stores()
    await Admission(stores, stores, LEASE, "pod/1", BudgetView(stores, STILL), STILL).leave(
        "req_1", a_plan()
    )
    assert stores.done == ["release req_1"]


async def test_a_claim_says_everything_that_the_books_need() -> None:
    stores = Stores()
    lines = (key_line(DOLLAR), team_line(50 * DOLLAR))
    await stores.admit(a_plan(n=2, lines=lines), "idem-1")
    assert stores.claim == Claim(
        rid="req_1",
        team="growth",
        key_id="k1",
        model="art",
        operation=Operation.GENERATION,
        upstream="comet",
        images=2,
        bound=42 * CENT,
        lines=lines,
        at=NOW,
        lease_ends=NOW + LEASE,
        price_id="openai/flare@2026-01-01",
        fingerprint="f00",
        idempotency_key="generation:idem-1",
        worker="pod/1",
    )


async def test_a_lease_counts_from_the_hold() -> None:
    """Not from the plan: minutes may lie between, in the queue."""
    stores, late = Stores(), StillClock(NOW + timedelta(minutes=3))
    admission = Admission(stores, stores, LEASE, "pod/1", BudgetView(stores, late), late)
    await admission.hold("req_1", a_plan(), None)
    assert stores.claim is not None
    assert (stores.claim.at, stores.claim.lease_ends) == (NOW, NOW + timedelta(minutes=3) + LEASE)


# Rates


TEAM, KEY = Scope.TEAM, Scope.KEY


@pytest.mark.parametrize(
    ("scope", "unit", "amount", "wait", "text", "reason"),
    [
        (
            *(TEAM, Unit.IMAGES, 20, 7.0),
            "Team growth is limited to 20 images a minute; try again in 7 s.",
            "images_per_minute",
        ),
        (
            *(TEAM, Unit.IMAGES, 1, 6.2),
            "Team growth is limited to 1 image a minute; try again in 7 s.",
            "images_per_minute",
        ),
        (
            *(TEAM, Unit.REQUESTS, 60, 1.0),
            "Team growth is limited to 60 requests a minute; try again in 1 s.",
            "requests_per_minute",
        ),
        (
            *(KEY, Unit.REQUESTS, 1, 59.001),
            "Key ci of team growth is limited to 1 request a minute; try again in 60 s.",
            "requests_per_minute",
        ),
        (
            *(TEAM, Unit.SLOTS, 10, 0.5),
            "Team growth is limited to 10 requests at a time; try again in a moment.",
            "concurrent_requests",
        ),
        (
            *(KEY, Unit.SLOTS, 1, 1.0),
            "Key ci of team growth is limited to 1 request at a time; try again in 1 s.",
            "concurrent_requests",
        ),
    ],
)
async def test_too_fast(
    scope: Scope, unit: Unit, amount: int, wait: float, text: str, reason: str
) -> None:
    limit = Limit(scope, "x", unit, Window.MINUTE, amount)
    error = await Stores(gate=Refusal(limit, wait)).refused(a_plan())
    assert type(error) is RateLimited
    assert error.message == text
    assert (error.status, error.type, error.code) == (429, "requests", "rate_limit_exceeded")
    assert (error.reason, error.retry_after_seconds) == (reason, wait)
    names = {} if unit is Unit.SLOTS else {"limit": amount, "remaining": 0, "reset": f"{wait:.3f}s"}
    assert error.headers == tuple(
        (f"x-ratelimit-{name}-{unit.value}", str(value)) for name, value in names.items()
    )


async def test_a_key_without_a_name_goes_by_its_id() -> None:
    limit = Limit(KEY, "k1", Unit.IMAGES, Window.MINUTE, 20)
    error = await Stores(gate=Refusal(limit, 7.0)).refused(a_plan(key_name=""))
    assert error.message.startswith("Key k1 of team growth is limited to")


@pytest.mark.parametrize(
    ("unit", "amount", "n", "text", "param"),
    [
        (
            *(Unit.IMAGES, 3, 4),
            "Team growth is limited to 3 images a minute, and this request asks for 4. Ask for "
            "fewer pictures at once, or ask an administrator to raise the limit.",
            "n",
        ),
        (
            *(Unit.REQUESTS, 0, 1),
            "Team growth is limited to 0 requests a minute. "
            "Ask an administrator to raise the limit.",
            None,
        ),
        (
            *(Unit.SLOTS, 0, 1),
            "Team growth is limited to 0 requests at a time. "
            "Ask an administrator to raise the limit.",
            None,
        ),
    ],
)
async def test_what_can_never_fit(
    unit: Unit, amount: int, n: int, text: str, param: str | None
) -> None:
    limit = Limit(TEAM, "growth", unit, Window.MINUTE, amount)
    error = await Stores(gate=Refusal(limit, None)).refused(a_plan(n=n))
    assert type(error) is InvalidRequest
    assert error.message == text
    assert (error.status, error.code, error.param) == (400, "limit_exceeded", param)
    assert (error.reason, error.should_retry) == ("never_fits", False)


# Money


@pytest.mark.parametrize(
    ("line", "balance", "text"),
    [
        (
            *(team_line(50 * DOLLAR), Balance(4987 * CENT)),
            "Team growth has spent $49.87 of its $50.00 for November; this request could cost up "
            "to $0.21. Resets 2026-12-01 00:00 UTC. Cheaper now: quality=low (at most $0.006).",
        ),
        (
            *(team_line(5 * DOLLAR, DAY), Balance(490 * CENT)),
            "Team growth has spent $4.90 of its $5.00 today; this request could cost up to $0.21. "
            "Resets 2026-11-23 00:00 UTC. Cheaper now: quality=low (at most $0.006).",
        ),
        (
            *(key_line(DOLLAR), Balance(80 * CENT, 10 * CENT)),
            "Key ci of team growth has spent $0.80 of its $1.00 today and holds $0.10 for running "
            "requests; this request could cost up to $0.21. Resets 2026-11-23 00:00 UTC. "
            "Cheaper now: quality=low (at most $0.006).",
        ),
        (
            # Nothing is advised that would be refused as well.
            *(team_line(50 * DOLLAR), Balance(50 * DOLLAR - 5_879_999)),
            "Team growth has spent $49.99 of its $50.00 for November; this request could cost up "
            "to $0.21. Resets 2026-12-01 00:00 UTC.",
        ),
        (
            # What running requests hold may yet be spent.
            *(key_line(DOLLAR), Balance(80 * CENT, 20 * CENT)),
            "Key ci of team growth has spent $0.80 of its $1.00 today and holds $0.20 for running "
            "requests; this request could cost up to $0.21. Resets 2026-11-23 00:00 UTC.",
        ),
        (
            *(team_line(50 * DOLLAR, DECEMBER), Balance(51 * DOLLAR)),
            "Team growth has spent $51.00 of its $50.00 for December; this request could cost up "
            "to $0.21. Resets 2027-01-01 00:00 UTC.",
        ),
        (
            *(team_line(5 * DOLLAR, WEEK), Balance(490 * CENT)),
            "Team growth has spent $4.90 of its $5.00 this week; this request could cost up to "
            "$0.21. Resets 2026-11-23 00:00 UTC. Cheaper now: quality=low (at most $0.006).",
        ),
        (
            *(team_line(5 * DOLLAR, TOTAL), Balance(490 * CENT)),
            "Team growth has spent $4.90 of its $5.00 in all; this request could cost up to $0.21. "
            "It is not renewed: ask an administrator to raise it. "
            "Cheaper now: quality=low (at most $0.006).",
        ),
        (
            *(team_line(20 * CENT, WEEK), Balance(20 * CENT)),
            "Team growth may spend $0.20 a week; this request could cost up to $0.21, so "
            "waiting does not help.",
        ),
        (
            *(key_line(20 * CENT, TOTAL), Balance(20 * CENT)),
            "Key ci of team growth may spend $0.20 in all; this request could cost up to $0.21, so "
            "waiting does not help.",
        ),
        (
            # December is there already, by the label; in UTC its predecessor still runs.
            *(team_line(50 * DOLLAR, period(Window.MONTH, LAST_NOON, HERE)), Balance(50 * DOLLAR)),
            "Team growth has spent $50.00 of its $50.00 for December; this request could cost up "
            "to $0.21. Resets 2026-12-31 10:00 UTC.",
        ),
        (
            # And here November goes on into December.
            *(team_line(50 * DOLLAR, period(Window.MONTH, LAST_NOON, THERE)), Balance(50 * DOLLAR)),
            "Team growth has spent $50.00 of its $50.00 for November; this request could cost up "
            "to $0.21. Resets 2026-12-01 11:00 UTC.",
        ),
        (
            *(team_line(0), Balance()),
            "Team growth may spend $0.00 a month; this request could cost up to $0.21, so "
            "waiting does not help.",
        ),
    ],
)
async def test_no_room_in_a_budget(line: Line, balance: Balance, text: str) -> None:
    error = await Stores(ledger=Denied(line, balance)).refused(a_plan(lines=(line,)))
    assert type(error) is QuotaExceeded
    assert error.message == text
    assert (error.status, error.type, error.code) == (
        *(429, "insufficient_quota"),
        "insufficient_quota",
    )
    assert (error.should_retry, error.retry_after_seconds) == (False, None)


async def test_what_the_ledger_said_of_a_budget_need_not_be_asked_again() -> None:
    line = team_line(DOLLAR)
    stores = Stores(ledger=Denied(line, Balance(90 * CENT)))
    view = BudgetView(stores, STILL)
    with pytest.raises(QuotaExceeded):
        await Admission(stores, stores, LEASE, "pod/1", view, STILL).hold("r", a_plan(), None)
    # ``Stores`` cannot be asked for balances.
    assert await view.balances([line]) == ([line], [Balance(90 * CENT)])


async def test_without_a_price_nothing_cheaper_is_known() -> None:
    denied = Denied(team_line(DOLLAR), Balance(90 * CENT))
    error = await Stores(ledger=denied).refused(a_plan(priced=False))
    assert "Cheaper" not in error.message


# Idempotency keys


def test_a_key_that_was_used_for_another_request() -> None:
    error = key_reused()
    assert type(error) is InvalidRequest
    assert error.message == (
        "This Idempotency-Key was used for another request. Use a new key for each request that "
        "differs."
    )
    assert (error.status, error.code, error.param) == (
        *(422, "idempotency_key_reused"),
        "Idempotency-Key",
    )


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("state", list(State))
async def test_a_key_that_is_taken_is_for_others_to_answer(state: State, same: bool) -> None:
    claimed = Claimed("req_0", state, same)
    error = await Stores(ledger=claimed).refused(a_plan())
    assert isinstance(error, KeyTaken)
    assert error.claimed is claimed


def test_each_route_has_keys_of_its_own() -> None:
    generation = a_plan().call
    edit = replace(generation, operation=Operation.EDIT)
    assert key_of(generation, "order-1") == "generation:order-1"
    assert key_of(edit, "order-1") == "edit:order-1"
    assert key_of(generation, None) is None


@pytest.mark.parametrize("repeat", [True, False])
async def test_a_claim_says_whether_an_unknown_outcome_may_be_bought_again(repeat: bool) -> None:
    stores, plan = Stores(), a_plan()
    budgets = BudgetView(stores, STILL)
    admission = Admission(stores, stores, LEASE, "pod/1", budgets, STILL, repeat_unknown=repeat)
    await admission.hold("req_1", plan, "idem-1")
    assert stores.claim is not None
    assert stores.claim.repeat_unknown is repeat


async def test_an_answer_that_is_there_costs_a_request_and_no_place() -> None:
    stores = Stores()
    admission = Admission(stores, stores, LEASE, "pod/1", BudgetView(stores, STILL), STILL)
    await admission.pass_gate_for_replay("req_1", a_plan().caller)
    assert stores.done == ["take req_1 1/0/0"]
    stores.gate = Refusal(Limit(Scope.TEAM, "growth", Unit.REQUESTS, Window.MINUTE, 60), 1.0)
    with pytest.raises(RateLimited):
        await admission.pass_gate_for_replay("req_2", a_plan().caller)
