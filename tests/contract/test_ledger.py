"""What every ``Ledger`` promises. A new store joins with one factory in ``BACKENDS``."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gateway.domain.call import Operation, Usage
from gateway.domain.ledger import (
    Balance,
    Basis,
    Claim,
    Claimed,
    Denied,
    Entry,
    Event,
    Held,
    Line,
    Outcome,
    Replay,
    Settlement,
    State,
    UsageRow,
)
from gateway.domain.quota import Limit, Scope, Unit, Window, period
from gateway.domain.transition import OnConflict
from gateway.ports import Ledger, NotKnown
from gateway.stores.memory_ledger import MemoryLedger
from gateway.stores.sqlite import SQLiteStore


def memory(folder: Path, on_conflict: OnConflict) -> Ledger:
    return MemoryLedger(on_conflict)


def sqlite(folder: Path, on_conflict: OnConflict) -> Ledger:
    return SQLiteStore.open(folder / "gateway.db", on_conflict=on_conflict).ledger


BACKENDS: dict[str, Callable[[Path, OnConflict], Ledger]] = {"memory": memory, "sqlite": sqlite}

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
LEASE = timedelta(seconds=660)
H, P, V, X = State.HELD, State.POSTED, State.VOIDED, State.EXPIRED


def lines(
    team_day: int | None = None,
    team_month: int | None = None,
    key_day: int | None = None,
    at: datetime = NOON,
    team: str = "growth",
) -> tuple[Line, ...]:
    """The four accounts of a call: key and team, day and month."""
    amounts = (
        (Scope.KEY, "k1", Window.DAY, key_day),
        (Scope.KEY, "k1", Window.MONTH, None),
        (Scope.TEAM, team, Window.DAY, team_day),
        (Scope.TEAM, team, Window.MONTH, team_month),
    )
    return tuple(
        Line(Limit(scope, owner, Unit.MONEY, window, amount), period(window, at))
        for scope, owner, window, amount in amounts
    )


def claim(
    rid: str,
    bound: int = 10,
    *,
    limits: tuple[Line, ...] | None = None,
    at: datetime = NOON,
    key: str | None = None,
    fingerprint: str = "f",
    model: str = "flare",
    team: str = "growth",
) -> Claim:
    return Claim(
        rid=rid,
        team=team,
        key_id="k1",
        model=model,
        operation=Operation.GENERATION,
        upstream="openai",
        images=1,
        bound=bound,
        lines=lines(at=at, team=team) if limits is None else limits,
        at=at,
        lease_ends=at + LEASE,
        price_id="p1",
        fingerprint=fingerprint,
        idempotency_key=key,
        worker="w1",
    )


def settled(rid: str, cost: int, *flags: str, images: int = 1) -> Settlement:
    usage = Usage(text_in=2, image_in=3, cached_text_in=1, text_out=5, image_out=7)
    return Settlement(rid, Event.SETTLE, Outcome.DELIVERED, Basis.USAGE, cost, usage, images, flags)


def voided(rid: str) -> Settlement:
    return Settlement(rid, Event.VOID, Outcome.REFUSED, Basis.NONE)


def expired(rid: str, *flags: str) -> Settlement:
    return Settlement(rid, Event.EXPIRE, Outcome.UNKNOWN, Basis.ESTIMATED, flags=flags)


async def written(ledger: Ledger) -> None:
    """Returns once everything queued before is written: replays are not waited for."""
    await ledger.sweep(datetime(2000, 1, 1, tzinfo=UTC))


@pytest.fixture
def conflicts() -> list[tuple[Entry, Settlement]]:
    return []


@pytest.fixture(params=BACKENDS)
async def ledger(
    request: pytest.FixtureRequest, tmp_path: Path, conflicts: list[tuple[Entry, Settlement]]
) -> AsyncIterator[Ledger]:
    opened = BACKENDS[request.param](tmp_path, lambda *conflict: conflicts.append(conflict))
    yield opened
    await opened.aclose()


# What each state is reached by, and what is then posted and pending of a bound of 10.
REACHED: dict[State, tuple[list[Settlement], Balance]] = {
    H: ([], Balance(0, 10)),
    P: ([settled("r", 7)], Balance(7, 0)),
    V: ([voided("r")], Balance(0, 0)),
    X: ([expired("r")], Balance(10, 0)),
}
EVENTS = {Event.SETTLE: settled("r", 6), Event.VOID: voided("r"), Event.EXPIRE: expired("r")}


async def reach(ledger: Ledger, state: State) -> None:
    assert isinstance(await ledger.reserve(claim("r")), Held)
    for step in REACHED[state][0]:
        await ledger.settle(step)


@pytest.mark.parametrize(
    ("state", "event", "after", "cost", "applied"),
    [
        (H, Event.SETTLE, P, 6, True),
        (H, Event.VOID, V, 0, True),
        (H, Event.EXPIRE, X, 10, True),
        (X, Event.SETTLE, P, 6, True),
        (X, Event.VOID, V, 0, True),
        (X, Event.EXPIRE, X, 10, False),
        (P, Event.SETTLE, P, 7, False),
        (P, Event.VOID, P, 7, False),
        (P, Event.EXPIRE, P, 7, False),
        (V, Event.SETTLE, V, 0, False),
        (V, Event.VOID, V, 0, False),
        (V, Event.EXPIRE, V, 0, False),
    ],
)
async def test_every_event_in_every_state(
    ledger: Ledger, state: State, event: Event, after: State, cost: int, applied: bool
) -> None:
    await reach(ledger, state)
    entry = await ledger.settle(EVENTS[event])
    balances = (Balance(posted=cost, pending=0),) * 4
    assert entry == Entry("r", after, 10, cost, applied, balances)
    assert await ledger.balances(lines()) == list(balances)
    assert await ledger.open_holds() == 0
    assert await ledger.unresolved() == (cost if after is X else 0)
    assert sum(row.cost for row in await ledger.usage()) == cost
    repeat = await ledger.settle(EVENTS[event])
    assert repeat == replace(entry, applied=False)


@pytest.mark.parametrize("state", State)
async def test_reserving_an_rid_again_takes_nothing(ledger: Ledger, state: State) -> None:
    await reach(ledger, state)
    balance = REACHED[state][1]
    again = await ledger.reserve(claim("r", bound=999))
    assert again == Held("r", (balance,) * 4, duplicate=True)
    assert await ledger.balances(lines()) == [balance] * 4


async def test_held_says_what_the_accounts_are_with_this_call(ledger: Ledger) -> None:
    await ledger.reserve(claim("a", 4))
    await ledger.settle(settled("a", 3))
    held = await ledger.reserve(claim("b", 5))
    assert held == Held("b", (Balance(posted=3, pending=5),) * 4)
    assert await ledger.open_holds() == 1


async def test_the_line_without_room_is_named_and_nothing_is_taken(ledger: Ledger) -> None:
    limits = lines(team_day=15, team_month=12, key_day=100)
    assert isinstance(await ledger.reserve(claim("a", 10, limits=limits)), Held)
    assert await ledger.reserve(claim("b", 3, limits=limits)) == Denied(limits[3], Balance(0, 10))
    assert await ledger.reserve(claim("b", 6, limits=limits)) == Denied(limits[2], Balance(0, 10))
    assert await ledger.balances(limits) == [Balance(0, 10)] * 4
    assert await ledger.open_holds() == 1
    # A refusal is not remembered: the same rid may come again, and just fits.
    assert isinstance(await ledger.reserve(claim("b", 2, limits=limits)), Held)


async def test_a_limit_set_later_knows_what_was_spent_without_one(ledger: Ledger) -> None:
    await ledger.reserve(claim("a", 10))
    limits = lines(team_day=9)
    assert await ledger.reserve(claim("b", 0, limits=limits)) == Denied(limits[2], Balance(0, 10))


async def test_more_than_the_bound_is_posted_in_full_and_then_refused(ledger: Ledger) -> None:
    limits = lines(team_day=10)
    await ledger.reserve(claim("a", 10, limits=limits))
    entry = await ledger.settle(settled("a", 25, "over_bound"))
    assert (entry.cost, entry.balances[2]) == (25, Balance(25, 0))
    assert await ledger.reserve(claim("b", 0, limits=limits)) == Denied(limits[2], Balance(25, 0))


async def test_a_call_over_midnight_settles_where_it_was_held(ledger: Ledger) -> None:
    late = datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC)
    next_day = late + timedelta(seconds=2)
    november, december = lines(team_day=10, at=late), lines(team_day=10, at=next_day)
    await ledger.reserve(claim("a", 10, limits=november, at=late))
    # The new day has room from its first second.
    await ledger.reserve(claim("b", 9, limits=december, at=next_day))
    await ledger.settle(settled("a", 7))
    assert await ledger.balances(november) == [Balance(7, 0)] * 4
    assert await ledger.balances(december) == [Balance(0, 9)] * 4
    assert [(row.day, row.cost) for row in await ledger.usage()] == [("2026-11-30", 7)]


async def test_an_account_named_by_two_lines_moves_once(ledger: Ledger) -> None:
    once = lines(team_day=10)[2]
    assert await ledger.reserve(claim("a", 6, limits=(once, once))) == Held(
        "a", (Balance(0, 6), Balance(0, 6))
    )
    await ledger.settle(settled("a", 6))
    assert await ledger.balances([once]) == [Balance(6, 0)]


async def test_a_claim_without_lines_is_held_too(ledger: Ledger) -> None:
    assert await ledger.reserve(claim("a", 6, limits=())) == Held("a", ())
    assert (await ledger.settle(settled("a", 6))).balances == ()


async def test_settling_what_was_never_reserved_is_a_bug(ledger: Ledger) -> None:
    with pytest.raises(NotKnown):
        await ledger.settle(settled("nobody", 1))


@pytest.mark.parametrize("event", [voided, expired])
async def test_ending_what_was_never_reserved_does_nothing(
    ledger: Ledger, event: Callable[[str], Settlement]
) -> None:
    entry = await ledger.settle(event("nobody"))
    assert entry == Entry("nobody", V, bound=0, cost=0, applied=False)
    assert await ledger.usage() == []


async def test_negative_amounts_are_refused(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="bound"):
        await ledger.reserve(claim("a", -1))
    with pytest.raises(ValueError, match="cost"):
        await ledger.settle(settled("a", -1))


async def test_an_amount_at_the_end_of_64_bits(ledger: Ledger) -> None:
    most = 2**63 - 1
    limits = lines(team_day=most)
    assert isinstance(await ledger.reserve(claim("a", most, limits=limits)), Held)
    assert (await ledger.settle(settled("a", most))).cost == most
    assert [row.cost for row in await ledger.usage()] == [most]


@pytest.mark.parametrize(
    ("first", "second", "alarm"),
    [
        (settled("r", 7), settled("r", 7), False),
        (settled("r", 7), settled("r", 8), True),
        (settled("r", 7), voided("r"), True),
        (settled("r", 7), expired("r"), False),
        (voided("r"), settled("r", 7), True),
        (voided("r"), voided("r"), False),
        (expired("r"), settled("r", 7), False),
    ],
)
async def test_a_repeat_with_another_amount_raises_the_alarm(
    ledger: Ledger,
    conflicts: list[tuple[Entry, Settlement]],
    first: Settlement,
    second: Settlement,
    alarm: bool,
) -> None:
    await ledger.reserve(claim("r"))
    await ledger.settle(first)
    entry = await ledger.settle(second)
    assert conflicts == ([(entry, second)] if alarm else [])


# Idempotency keys


@pytest.mark.parametrize("fingerprint", ["f", "other"])
@pytest.mark.parametrize("state", State)
async def test_an_idempotency_key_stands_for_one_call(
    ledger: Ledger, state: State, fingerprint: str
) -> None:
    await ledger.reserve(claim("r", key="i"))
    for step in REACHED[state][0]:
        await ledger.settle(step)
    answer = await ledger.reserve(claim("s", key="i", fingerprint=fingerprint))
    same = fingerprint == "f"
    if state is V and same:
        assert isinstance(answer, Held)
        # The key has moved on: it now stands for the new call.
        third = await ledger.reserve(claim("t", key="i"))
        assert third == Claimed("s", H, same_fingerprint=True)
    else:
        assert answer == Claimed("r", state, same)
        assert await ledger.balances(lines()) == [REACHED[state][1]] * 4


async def test_a_denied_call_leaves_the_key_where_it_was(ledger: Ledger) -> None:
    await ledger.reserve(claim("r", key="i"))
    await ledger.settle(voided("r"))
    answer = await ledger.reserve(claim("s", key="i", limits=lines(team_day=1)))
    assert isinstance(answer, Denied)
    other = await ledger.reserve(claim("t", key="i", fingerprint="other"))
    assert other == Claimed("r", V, same_fingerprint=False)


async def test_teams_do_not_share_idempotency_keys(ledger: Ledger) -> None:
    await ledger.reserve(claim("r", key="i"))
    assert isinstance(await ledger.reserve(claim("s", key="i", team="art")), Held)


@pytest.mark.parametrize("swept", [False, True])
async def test_an_idempotency_key_lives_for_24_hours(ledger: Ledger, swept: bool) -> None:
    await ledger.reserve(claim("r", key="i"))
    await ledger.settle(settled("r", 7))
    day, moment = timedelta(hours=24), timedelta(microseconds=1)
    if swept:
        await ledger.sweep(NOON + day)
    last = await ledger.reserve(claim("s", key="i", fingerprint="other", at=NOON + day))
    assert last == Claimed("r", P, same_fingerprint=False)
    if swept:
        await ledger.sweep(NOON + day + moment)
    assert isinstance(
        await ledger.reserve(claim("s", key="i", fingerprint="other", at=NOON + day + moment)),
        Held,
    )
    # The old call is still in the books.
    assert (await ledger.settle(settled("r", 7))).state is P


# Sweeps


async def test_a_sweep_expires_the_oldest_leases_first(ledger: Ledger) -> None:
    for minute, rid in ((3, "b"), (1, "c"), (2, "a")):
        await ledger.reserve(claim(rid, minute, at=NOON + timedelta(minutes=minute)))
    over = NOON + timedelta(minutes=2) + LEASE
    assert await ledger.sweep(NOON + timedelta(minutes=1) + LEASE) == []  # over only after it
    first = await ledger.sweep(over + timedelta(microseconds=1), limit=1)
    assert [(entry.rid, entry.state, entry.cost) for entry in first] == [("c", X, 1)]
    second = await ledger.sweep(over + timedelta(microseconds=1))
    assert [(entry.rid, entry.applied) for entry in second] == [("a", True)]
    assert second[0].balances == (Balance(posted=3, pending=3),) * 4
    assert await ledger.sweep(over + timedelta(microseconds=1)) == []
    assert (await ledger.open_holds(), await ledger.unresolved()) == (1, 3)


async def test_a_late_settlement_corrects_what_the_sweep_posted(ledger: Ledger) -> None:
    await ledger.reserve(claim("r", 10))
    await ledger.sweep(NOON + 2 * LEASE)
    assert await ledger.unresolved() == 10
    assert (await ledger.settle(settled("r", 4))).applied
    assert await ledger.unresolved() == 0
    (row,) = await ledger.usage()
    assert (row.requests, row.images, row.cost, row.unresolved, row.unresolved_cost) == (
        1,
        1,
        4,
        0,
        0,
    )


# The daily roll-up


async def test_the_roll_up_adds_up_exactly(ledger: Ledger) -> None:
    for rid in ("held", "posted", "doubtful", "soft", "voided", "expired", "taken back"):
        await ledger.reserve(claim(rid, 10))
    await ledger.settle(settled("posted", 3, images=2))
    await ledger.settle(settled("doubtful", 4, "soft", "no_usage"))
    await ledger.settle(settled("soft", 5, "soft"))
    await ledger.settle(voided("voided"))
    await ledger.settle(expired("expired", "over_bound"))
    await ledger.settle(expired("taken back", "over_bound"))
    await ledger.settle(voided("taken back"))
    await ledger.replay(
        Replay("hit", "growth", "k1", "flare", Operation.EDIT, images=3, avoided=6, at=NOON)
    )
    await written(ledger)
    assert await ledger.usage() == [
        UsageRow(
            day="2026-11-22",
            team="growth",
            key_id="k1",
            model="flare",
            requests=5,
            images=7,
            cached_requests=1,
            text_in=6,
            image_in=9,
            text_out=15,
            image_out=21,
            cost=22,
            avoided=6,
            unresolved=1,
            unresolved_cost=10,
            flagged=2,
        )
    ]
    assert await ledger.balances(lines()) == [Balance(posted=22, pending=10)] * 4


async def test_usage_is_read_between_two_days_in_order(ledger: Ledger) -> None:
    for offset, team, model in ((2, "a", "m"), (0, "b", "m"), (0, "a", "n"), (0, "a", "m")):
        rid = f"{offset}{team}{model}"
        await ledger.reserve(claim(rid, at=NOON + timedelta(days=offset), team=team, model=model))
        await ledger.settle(settled(rid, 1))
    await ledger.reserve(claim("void", at=NOON + timedelta(days=1)))
    await ledger.settle(expired("void"))
    await ledger.settle(voided("void"))

    def names(rows: Iterable[UsageRow]) -> list[str]:
        return [f"{row.day[-2:]}{row.team}{row.model}" for row in rows]

    assert names(await ledger.usage()) == ["22am", "22an", "22bm", "24am"]
    assert names(await ledger.usage(since="2026-11-23")) == ["24am"]
    assert names(await ledger.usage(until="2026-11-22")) == ["22am", "22an", "22bm"]
    assert names(await ledger.usage("2026-11-24", "2026-11-24")) == ["24am"]


# Many at once


@pytest.mark.parametrize("used_before", [False, True])
async def test_fifty_at_once_on_a_budget_for_ten(ledger: Ledger, used_before: bool) -> None:
    limits = lines(team_day=100)
    if used_before:
        await ledger.reserve(claim("first", 0, limits=limits))
    answers = await asyncio.gather(
        *(ledger.reserve(claim(f"r{number}", 10, limits=limits)) for number in range(50))
    )
    assert sum(isinstance(answer, Held) for answer in answers) == 10
    assert sum(isinstance(answer, Denied) for answer in answers) == 40
    assert await ledger.balances(limits) == [Balance(0, 100)] * 4


async def test_one_rid_or_one_key_at_once_is_one_call(ledger: Ledger) -> None:
    answers = await asyncio.gather(*(ledger.reserve(claim("r")) for _ in range(20)))
    assert sum(isinstance(one, Held) and not one.duplicate for one in answers) == 1
    keyed = await asyncio.gather(
        *(ledger.reserve(claim(f"k{number}", key="i")) for number in range(20))
    )
    assert sum(isinstance(one, Held) for one in keyed) == 1
    assert sum(isinstance(one, Claimed) for one in keyed) == 19


async def test_settling_and_sweeping_at_once_ends_once(ledger: Ledger) -> None:
    await asyncio.gather(*(ledger.reserve(claim(f"r{number}", 10)) for number in range(40)))
    await asyncio.gather(
        *(ledger.settle(settled(f"r{number % 40}", 3)) for number in range(80)),
        *(ledger.sweep(NOON + 2 * LEASE, limit=7) for _ in range(5)),
    )
    assert await ledger.balances(lines()) == [Balance(120, 0)] * 4
    (row,) = await ledger.usage()
    assert (row.requests, row.cost, row.unresolved) == (40, 120, 0)


async def test_a_cancelled_caller_breaks_nothing(ledger: Ledger) -> None:
    tasks = [asyncio.create_task(ledger.reserve(claim(f"r{number}", 1))) for number in range(40)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(answer, Held) for answer in answers[1::2])
    # A cancelled reservation is there or it is not; either way the books agree.
    holds = await ledger.open_holds()
    assert 20 <= holds <= 40
    assert await ledger.balances(lines()) == [Balance(0, holds)] * 4


async def test_ping(ledger: Ledger) -> None:
    await ledger.ping()


# The model: every backend against sums over a plain list of calls (reliability.md T2)

_T = TypeVar("_T")
TICK = timedelta(seconds=1)
# Small amounts against small limits, and ticks about the lease: large ones let bugs live.
TICKS = (0, 1, 49, 50, 51, 99, 100, 101, 86_399, 86_400, 86_401)
RIDS = tuple(f"r{number}" for number in range(8))


@dataclass
class Call:
    claim: Claim
    key: str | None
    state: State = H
    cost: int = 0
    last: Settlement | None = None


class LedgerMachine(RuleBasedStateMachine):
    """Drives all backends with the same calls; the model derives everything anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(
            dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        )
        self.runner = asyncio.Runner()
        self.alarms: dict[str, int] = dict.fromkeys(BACKENDS, 0)
        self.ledgers: dict[str, Ledger] = {}
        self.calls: dict[str, Call] = {}
        self.replays: list[Replay] = []
        self.expected_alarms = 0
        self.now = NOON

    @initialize()
    def open(self) -> None:
        for name, backend in BACKENDS.items():
            self.ledgers[name] = self.run(self.opened(name, backend))

    async def opened(self, name: str, backend: Callable[[Path, OnConflict], Ledger]) -> Ledger:
        def alarm(entry: Entry, settlement: Settlement) -> None:
            self.alarms[name] += 1

        return backend(Path(self.folder.name), alarm)

    def teardown(self) -> None:
        for ledger in self.ledgers.values():
            self.run(ledger.aclose())
        self.runner.close()
        self.folder.cleanup()

    def run(self, work: Coroutine[object, object, _T]) -> _T:
        return self.runner.run(work)

    def check(self, expected: _T, ask: Callable[[Ledger], Coroutine[object, object, _T]]) -> None:
        for name, ledger in self.ledgers.items():
            assert self.run(ask(ledger)) == expected, name

    def balance(self, account: str) -> Balance:
        drawn = [
            call
            for call in self.calls.values()
            if account in {line.account for line in call.claim.lines}
        ]
        return Balance(
            posted=sum(call.cost for call in drawn),
            pending=sum(call.claim.bound for call in drawn if call.state is H),
        )

    def balances(self, claimed: Claim) -> tuple[Balance, ...]:
        return tuple(self.balance(line.account) for line in claimed.lines)

    @rule(ticks=st.sampled_from(TICKS))
    def wait(self, ticks: int) -> None:
        self.now += ticks * TICK

    @rule(
        rid=st.sampled_from(RIDS),
        bound=st.integers(0, 4),
        amounts=st.tuples(*[st.sampled_from((None, 5, 8, 20))] * 3),
        key=st.sampled_from((None, "i", "j")),
        fingerprint=st.sampled_from("fg"),
    )
    def reserve(
        self,
        rid: str,
        bound: int,
        amounts: tuple[int | None, int | None, int | None],
        key: str | None,
        fingerprint: str,
    ) -> None:
        limits = lines(*amounts, at=self.now)
        wanted = replace(
            claim(rid, bound, limits=limits, at=self.now, key=key, fingerprint=fingerprint),
            lease_ends=self.now + 100 * TICK,
        )
        self.check(self.expect_reserve(wanted), lambda ledger: ledger.reserve(wanted))

    def expect_reserve(self, wanted: Claim) -> Held | Denied | Claimed:
        known = self.calls.get(wanted.rid)
        if known is not None:
            return Held(wanted.rid, self.balances(known.claim), duplicate=True)
        owner = next(
            (
                call
                for call in self.calls.values()
                if wanted.idempotency_key is not None and call.key == wanted.idempotency_key
            ),
            None,
        )
        if owner is not None and wanted.at - owner.claim.at <= timedelta(days=1):
            same = owner.claim.fingerprint == wanted.fingerprint
            if not (same and owner.state is V):
                return Claimed(owner.claim.rid, owner.state, same)
        for line in wanted.lines:
            before = self.balance(line.account)
            amount = line.limit.amount
            if amount is not None and before.posted + before.pending + wanted.bound > amount:
                return Denied(line, before)
        if owner is not None:
            owner.key = None
        self.calls[wanted.rid] = Call(wanted, wanted.idempotency_key)
        return Held(wanted.rid, self.balances(wanted))

    @rule(
        rid=st.sampled_from(RIDS),
        event=st.sampled_from(Event),
        cost=st.integers(0, 5),
        images=st.integers(0, 2),
        flags=st.sampled_from(((), ("soft",), ("no_usage",), ("soft", "over_bound"))),
    )
    def settle(
        self, rid: str, event: Event, cost: int, images: int, flags: tuple[str, ...]
    ) -> None:
        end = Settlement(
            rid, event, Outcome.DELIVERED, Basis.USAGE, cost, Usage(text_in=cost), images, flags
        )
        call = self.calls.get(rid)
        if call is None:
            if event is not Event.SETTLE:
                nothing = Entry(rid, V, 0, 0, applied=False)
                self.check(nothing, lambda ledger: ledger.settle(end))
                return
            for ledger in self.ledgers.values():
                with pytest.raises(NotKnown):
                    self.run(ledger.settle(end))
            return
        applied = self.expect_end(call, end)
        if call.state in (P, V) and not applied and event is not Event.EXPIRE:
            self.expected_alarms += call.cost != (cost if event is Event.SETTLE else 0)
        entry = Entry(
            rid, call.state, call.claim.bound, call.cost, applied, self.balances(call.claim)
        )
        self.check(entry, lambda ledger: ledger.settle(end))

    def expect_end(self, call: Call, end: Settlement) -> bool:
        if call.state in (P, V) or (call.state is X and end.event is Event.EXPIRE):
            return False
        call.last = end
        match end.event:
            case Event.SETTLE:
                call.state, call.cost = P, end.cost
            case Event.VOID:
                call.state, call.cost = V, 0
            case Event.EXPIRE:
                call.state, call.cost = X, call.claim.bound
        return True

    @rule(limit=st.sampled_from((1, 2, 100)))
    def sweep(self, limit: int) -> None:
        over = sorted(
            (call.claim.lease_ends, rid)
            for rid, call in self.calls.items()
            if call.state is H and call.claim.lease_ends < self.now
        )
        entries = []
        for _, rid in over[:limit]:
            call = self.calls[rid]
            self.expect_end(call, expired(rid))
            bound = call.claim.bound
            entries.append(Entry(rid, X, bound, bound, True, self.balances(call.claim)))
        for call in self.calls.values():
            if self.now - call.claim.at > timedelta(days=1):
                call.key = None
        self.check(entries, lambda ledger: ledger.sweep(self.now, limit))

    @rule(avoided=st.integers(0, 4))
    def replay(self, avoided: int) -> None:
        hit = Replay("h", "growth", "k1", "flare", Operation.EDIT, 1, avoided, self.now)
        self.replays.append(hit)
        self.check(None, lambda ledger: ledger.replay(hit))

    def expect_usage(self) -> list[UsageRow]:
        rows: dict[str, UsageRow] = {}
        for call in self.calls.values():
            if call.state not in (P, X) or call.last is None:
                continue
            day = call.claim.at.date().isoformat()
            row = rows.get(day, UsageRow(day, "growth", "k1", "flare"))
            posted, doubtful = call.state is P, set(call.last.flags) - {"soft"}
            rows[day] = replace(
                row,
                requests=row.requests + 1,
                images=row.images + posted * call.last.images,
                text_in=row.text_in + posted * call.last.usage.text_in,
                cost=row.cost + call.cost,
                unresolved=row.unresolved + (not posted),
                unresolved_cost=row.unresolved_cost + (not posted) * call.cost,
                flagged=row.flagged + bool(doubtful),
            )
        for hit in self.replays:
            day = hit.at.date().isoformat()
            row = rows.get(day, UsageRow(day, "growth", "k1", "flare"))
            rows[day] = replace(
                row,
                requests=row.requests + 1,
                images=row.images + 1,
                cached_requests=row.cached_requests + 1,
                avoided=row.avoided + hit.avoided,
            )
        return [rows[day] for day in sorted(rows)]

    @invariant()
    def the_books_agree(self) -> None:
        if not self.ledgers:
            return
        for ledger in self.ledgers.values():
            self.run(written(ledger))
        today = lines(at=self.now)
        self.check(
            [self.balance(line.account) for line in today],
            lambda ledger: ledger.balances(today),
        )
        self.check(self.expect_usage(), lambda ledger: ledger.usage())
        open_holds = sum(call.state is H for call in self.calls.values())
        self.check(open_holds, lambda ledger: ledger.open_holds())
        unresolved = sum(call.cost for call in self.calls.values() if call.state is X)
        self.check(unresolved, lambda ledger: ledger.unresolved())
        assert self.alarms == dict.fromkeys(BACKENDS, self.expected_alarms)


LedgerMachine.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
# It takes 15 s; finding the smallest example of a failure takes minutes.
TestModel = pytest.mark.timeout(600)(LedgerMachine.TestCase)
