"""What every ``Ledger`` promises. The stores are those of ``BACKENDS``."""

from __future__ import annotations

import asyncio
import os
import unittest
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings

from gateway.domain.call import Operation
from gateway.domain.ledger import (
    Balance,
    Claimed,
    Denied,
    Entry,
    Event,
    Held,
    Replay,
    Settlement,
    State,
    UsageRow,
)
from gateway.ports import Ledger, NotKnown, Store
from tests.contract.machine import LedgerMachine
from tests.contract.stores import (
    BACKENDS,
    LEASE,
    NOON,
    H,
    P,
    V,
    X,
    claim,
    expired,
    lines,
    settled,
    voided,
    written,
)

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


SECOND = timedelta(seconds=1)


async def test_a_sweep_expires_what_dead_workers_hold(store: Store) -> None:
    ledger, upkeep = store.ledger, store.upkeep
    for rid, worker in (("a", "alive"), ("b", "dead"), ("c", "unheard"), ("d", "dead")):
        await ledger.reserve(claim(rid, worker=worker))
    await ledger.settle(settled("d", 3))
    await upkeep.beat("dead", NOON)
    await upkeep.beat("alive", NOON + SECOND)
    now = NOON + timedelta(seconds=30)
    assert await ledger.sweep(now) == []
    assert await ledger.sweep(now, silent_before=NOON) == []  # it was last seen then, not before
    (entry,) = await ledger.sweep(now, silent_before=NOON + SECOND)
    assert (entry.rid, entry.state, entry.cost, entry.applied) == ("b", X, 10, True)
    assert await ledger.sweep(now, silent_before=NOON + SECOND) == []
    assert await ledger.open_holds() == 2
    # Once it beats again it is alive: what it reserves now is left alone.
    await upkeep.beat("dead", NOON + 2 * SECOND)
    await ledger.reserve(claim("e", worker="dead"))
    assert await ledger.sweep(now, silent_before=NOON + SECOND) == []
    # The lease counts for everybody.
    over = await ledger.sweep(NOON + 2 * LEASE, silent_before=NOON)
    assert [entry.rid for entry in over] == ["a", "c", "e"]
    assert await store.books.audit() == []


async def test_a_sweep_of_dead_workers_keeps_to_its_limit(store: Store) -> None:
    await store.upkeep.beat("w1", NOON)
    for minute, rid in ((2, "a"), (1, "b"), (3, "c")):
        await store.ledger.reserve(claim(rid, at=NOON - timedelta(minutes=minute)))
    first = await store.ledger.sweep(NOON, limit=2, silent_before=NOON + SECOND)
    assert [entry.rid for entry in first] == ["c", "a"]
    second = await store.ledger.sweep(NOON, limit=2, silent_before=NOON + SECOND)
    assert [entry.rid for entry in second] == ["b"]


async def test_a_frozen_worker_that_wakes_up_still_says_what_it_cost(
    store: Store, conflicts: list[tuple[Entry, Settlement]]
) -> None:
    """It was taken for dead and charged at its bound; its own settlement is the truth."""
    await store.upkeep.beat("w1", NOON)
    await store.ledger.reserve(claim("r", 10))
    (entry,) = await store.ledger.sweep(NOON + 20 * SECOND, silent_before=NOON + SECOND)
    assert entry.balances == (Balance(10, 0),) * 4
    late = await store.ledger.settle(settled("r", 4))
    assert late == Entry("r", P, 10, 4, applied=True, balances=(Balance(4, 0),) * 4)
    assert [(row.requests, row.cost, row.unresolved) for row in await store.ledger.usage()] == [
        (1, 4, 0)
    ]
    assert (await store.books.audit(), conflicts) == ([], [])


async def test_many_replicas_sweep_a_dead_workers_holds_once(store: Store) -> None:
    await store.upkeep.beat("w1", NOON)
    await asyncio.gather(*(store.ledger.reserve(claim(f"r{number}")) for number in range(30)))
    swept = await asyncio.gather(
        *(store.ledger.sweep(NOON, silent_before=NOON + SECOND) for _ in range(5))
    )
    assert sorted(entry.rid for entries in swept for entry in entries) == sorted(
        f"r{number}" for number in range(30)
    )
    assert await store.ledger.balances(lines()) == [Balance(300, 0)] * 4


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


# The model

EXAMPLES = 50_000 if os.environ.get("SOAK") else 200 if os.environ.get("CI") else 60
"""On the embedded stores. A step on PostgreSQL takes ten times as long."""


class EmbeddedMachine(LedgerMachine):
    backends: ClassVar = {name: BACKENDS[name] for name in ("memory", "sqlite")}


class PostgresMachine(LedgerMachine):
    backends: ClassVar = {"postgres": BACKENDS["postgres"]}


def model(machine: type[LedgerMachine], examples: int) -> type[unittest.TestCase]:
    machine.TestCase.settings = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    # Finding the smallest example of a failure takes minutes; 50,000 take hours.
    return pytest.mark.timeout(0 if EXAMPLES > 200 else 600)(machine.TestCase)


TestModel = model(EmbeddedMachine, EXAMPLES)
TestModelOnPostgres = model(PostgresMachine, EXAMPLES // 4)
