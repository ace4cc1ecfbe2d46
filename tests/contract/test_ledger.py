"""What every ``Ledger`` promises. The stores are those of ``BACKENDS``."""

from __future__ import annotations

import asyncio
import sqlite3
import unittest
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings

from gateway.domain.books import Adjustment, Correction
from gateway.domain.call import Operation
from gateway.domain.ledger import (
    Balance,
    Claim,
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
from gateway.stores.memory_ledger import MemoryStore
from tests.contract.machine import LedgerMachine
from tests.contract.stores import (
    ACCOUNTS,
    BACKENDS,
    LEASE,
    NOON,
    H,
    P,
    V,
    X,
    claim,
    elsewhere,
    expired,
    lines,
    settled,
    voided,
    written,
)
from tests.sizes import size

# What each state is reached by, and what is then posted and pending of a bound of 10.
REACHED: dict[State, tuple[list[Settlement], Balance]] = {
    H: ([], Balance(0, 10)),
    P: ([settled("r", 7)], Balance(7, 0)),
    V: ([voided("r")], Balance(0, 0)),
    X: ([expired("r")], Balance(10, 0)),
}
SECOND = timedelta(seconds=1)
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
    assert entry == Entry("r", after, 10, cost, applied, balances, accounts=ACCOUNTS)
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


def taking_over(rid: str, fingerprint: str = "f") -> Claim:
    return replace(claim(rid, key="i", fingerprint=fingerprint), repeat_unknown=True)


@pytest.mark.parametrize("fingerprint", ["f", "other"])
@pytest.mark.parametrize("state", State)
async def test_a_key_is_taken_over_from_a_call_of_unknown_outcome(
    store: Store, state: State, fingerprint: str
) -> None:
    ledger = store.ledger
    await ledger.reserve(claim("r", key="i"))
    for step in REACHED[state][0]:
        await ledger.settle(step)
    answer = await ledger.reserve(taking_over("s", fingerprint))
    same = fingerprint == "f"
    if state not in (V, X) or not same:
        assert answer == Claimed("r", state, same)
        assert await ledger.balances(lines()) == [REACHED[state][1]] * 4
        return
    posted = REACHED[state][1].posted
    assert answer == Held("s", (Balance(posted, 10),) * 4)
    # It has moved, once: who comes now finds the new call, whatever it is ready to risk.
    assert await ledger.reserve(taking_over("t")) == Claimed("s", H, same_fingerprint=True)
    found = [await store.books.find(rid) for rid in "rs"]
    assert [one and one.idempotency_key for one in found] == [None, "i"]
    # The first call's late truth still counts, and does not touch the key.
    entry = await ledger.settle(settled("r", 4))
    assert (entry.applied, entry.cost) == (state is X, 4 if state is X else 0)
    assert await ledger.claimed("growth", "i", "f", NOON) == Claimed("s", H, same_fingerprint=True)
    assert await store.books.audit() == []


async def test_a_denied_repeat_leaves_the_key_where_it_was(ledger: Ledger) -> None:
    await ledger.reserve(claim("r", key="i"))
    await ledger.settle(expired("r"))
    tight = replace(taking_over("s"), lines=lines(team_day=19))
    assert await ledger.reserve(tight) == Denied(tight.lines[2], Balance(10, 0))
    assert await ledger.claimed("growth", "i", "f", NOON) == Claimed("r", X, same_fingerprint=True)


async def test_of_many_that_repeat_at_once_one_does(ledger: Ledger) -> None:
    await ledger.reserve(claim("r", key="i"))
    await ledger.settle(expired("r"))
    answers = await asyncio.gather(*(ledger.reserve(taking_over(f"s{n}")) for n in range(20)))
    (held,) = (one for one in answers if isinstance(one, Held))
    others = [one for one in answers if isinstance(one, Claimed)]
    assert others == [Claimed(held.rid, H, same_fingerprint=True)] * 19
    assert await ledger.balances(lines()) == [Balance(10, 10)] * 4


@pytest.mark.parametrize("fingerprint", ["f", "other"])
@pytest.mark.parametrize("state", State)
async def test_whose_a_key_is_can_be_asked(ledger: Ledger, state: State, fingerprint: str) -> None:
    await ledger.reserve(claim("r", key="i"))
    for step in REACHED[state][0]:
        await ledger.settle(step)
    same = fingerprint == "f"
    expected = None if state is V and same else Claimed("r", state, same)
    assert await ledger.claimed("growth", "i", fingerprint, NOON) == expected
    assert await ledger.claimed("growth", "j", fingerprint, NOON) is None
    assert await ledger.claimed("art", "i", fingerprint, NOON) is None
    # Asking takes nothing.
    assert await ledger.balances(lines()) == [REACHED[state][1]] * 4
    again = await ledger.reserve(claim("s", key="i", fingerprint=fingerprint))
    assert again == expected if expected else isinstance(again, Held)


@pytest.mark.parametrize("swept", [False, True])
async def test_whose_a_key_was_a_day_ago_is_not_said(ledger: Ledger, swept: bool) -> None:
    await ledger.reserve(claim("r", key="i"))
    await ledger.settle(settled("r", 7))
    day, moment = timedelta(hours=24), timedelta(microseconds=1)
    assert await ledger.claimed("growth", "i", "f", NOON + day) == Claimed("r", P, True)
    if swept:
        await ledger.sweep(NOON + day + moment)
    assert await ledger.claimed("growth", "i", "f", NOON + day + moment) is None


async def test_a_key_is_known_from_the_moment_it_is_reserved(ledger: Ledger) -> None:
    async def call(rid: str) -> None:
        assert isinstance(await ledger.reserve(claim(rid, key=rid)), Held)
        assert await ledger.claimed("growth", rid, "f", NOON) == Claimed(rid, H, True)
        await ledger.settle(settled(rid, 3))
        assert await ledger.claimed("growth", rid, "f", NOON) == Claimed(rid, P, True)

    await asyncio.gather(*(call(f"r{number}") for number in range(50)))


# Going elsewhere


@pytest.mark.parametrize(("bound", "raised"), [(25, 15), (11, 1), (10, 0), (3, 0), (0, 0)])
async def test_a_held_call_goes_elsewhere(store: Store, bound: int, raised: int) -> None:
    await store.ledger.reserve(claim("other", 5))
    await store.ledger.reserve(claim("r", key="i"))
    before = await store.books.find("r")
    after = NOON + SECOND
    answer = await store.ledger.reroute(
        elsewhere("r", bound, model="blaze", limits=lines(team_day=100, at=NOON), at=after)
    )
    balance = Balance(0, 15 + raised)
    assert answer == Held("r", (balance,) * 4)
    assert await store.ledger.balances(lines()) == [balance] * 4
    assert before is not None
    now = replace(before, model="blaze", upstream="azure", price_id="p2", bound=10 + raised)
    assert await store.books.find("r") == now
    assert await store.ledger.open_holds() == 2
    first, second = await store.books.journal("r")
    assert (first.kind, first.pending) == ("H", 10)
    assert (second.at, second.kind, second.pending, second.posted) == (after, "B", raised, 0)
    assert second.detail == {
        "model": "blaze",
        "upstream": "azure",
        "price_id": "p2",
        "before": {"model": "flare", "upstream": "openai", "price_id": "p1"},
    }
    assert await store.ledger.claimed("growth", "i", "f", NOON) == Claimed("r", H, True)
    assert await store.books.audit() == []


REROUTED = {
    P: (settled("r", 7), 7),
    V: (voided("r"), 0),
    X: (expired("r"), 25),
}


@pytest.mark.parametrize("state", REROUTED)
async def test_a_rerouted_call_ends_where_it_went(store: Store, state: State) -> None:
    """At its raised bound, in the usage of the model that it went to at last."""
    end, cost = REROUTED[state]
    await store.ledger.reserve(claim("r"))
    await store.ledger.reroute(elsewhere("r", 25, model="nova"))
    await store.ledger.reroute(elsewhere("r", 20, model="blaze"))
    entry = await store.ledger.settle(end)
    balances = (Balance(cost, 0),) * 4
    assert entry == Entry("r", state, 25, cost, applied=True, balances=balances, accounts=ACCOUNTS)
    rows = await store.ledger.usage()
    counted = [("blaze", 1, cost)] if cost else []
    assert [(row.model, row.requests, row.cost) for row in rows] == counted
    assert await store.books.audit() == []
    await store.books.correct(Correction("c", "r", 9, "the bill", "ann", NOON))
    assert [(row.model, row.cost) for row in await store.ledger.usage()] == [("blaze", 9)]
    assert [line.kind for line in await store.books.journal("r")] == [*"HBB", state.value, "A"]
    assert await store.books.audit() == []


async def test_a_sweep_expires_a_rerouted_call_at_its_raised_bound(store: Store) -> None:
    await store.ledger.reserve(claim("r"))
    await store.ledger.reroute(elsewhere("r", 25, model="blaze"))
    (entry,) = await store.ledger.sweep(NOON + 2 * LEASE)
    assert entry == Entry(
        "r", X, 25, 25, applied=True, balances=(Balance(25, 0),) * 4, accounts=ACCOUNTS
    )
    (row,) = await store.ledger.usage()
    assert (row.model, row.cost, row.unresolved_cost) == ("blaze", 25, 25)
    assert await store.ledger.unresolved() == 25
    assert (await store.ledger.settle(settled("r", 4))).cost == 4
    assert await store.books.audit() == []
    assert await store.upkeep.forget(NOON + 2 * LEASE) == 1
    assert await store.books.audit() == []


async def test_a_reroute_that_does_not_fit_leaves_everything(store: Store) -> None:
    limits = lines(team_day=20, team_month=24, key_day=100)
    await store.ledger.reserve(claim("other", 5, limits=limits))
    await store.ledger.reserve(claim("r", 10, limits=limits))
    before = await store.books.find("r")
    # The balance is without this call, as when it was reserved.
    for bound, line in ((16, limits[2]), (99, limits[0])):
        denied = await store.ledger.reroute(elsewhere("r", bound, limits=limits))
        assert denied == Denied(line, Balance(0, 5))
    looser = lines(team_day=100, team_month=24, key_day=100)
    denied = await store.ledger.reroute(elsewhere("r", 20, limits=looser))
    assert denied == Denied(looser[3], Balance(0, 5))
    assert await store.books.find("r") == before
    assert len(await store.books.journal("r")) == 1
    assert await store.ledger.balances(limits) == [Balance(0, 15)] * 4
    # A refusal is not remembered: what just fits goes.
    held = await store.ledger.reroute(elsewhere("r", 15, limits=limits))
    assert held == Held("r", (Balance(0, 20),) * 4)
    assert await store.books.audit() == []


async def test_what_need_not_grow_is_not_denied(ledger: Ledger) -> None:
    """Another call has cost more than its bound meanwhile; this one's money was set aside."""
    limits = lines(team_day=20)
    await ledger.reserve(claim("r", 10, limits=limits))
    await ledger.reserve(claim("other", 10, limits=limits))
    await ledger.settle(settled("other", 25, "over_bound"))
    denied = await ledger.reroute(elsewhere("r", 11, limits=limits))
    assert denied == Denied(limits[2], Balance(25, 0))
    assert await ledger.reroute(elsewhere("r", 10, limits=limits)) == Held(
        "r", (Balance(25, 10),) * 4
    )


async def test_the_accounts_stay_those_that_were_reserved(store: Store) -> None:
    """Even where somebody comes with other lines, of the next day: they are not moved."""
    late, tomorrow = lines(team_day=20), lines(team_day=1, at=NOON + timedelta(days=40))
    await store.ledger.reserve(claim("r", 10, limits=late))
    once = (late[2], *tomorrow, late[2])
    assert await store.ledger.reroute(elsewhere("r", 21, limits=once)) == Denied(
        late[2], Balance(0, 0)
    )
    held = await store.ledger.reroute(elsewhere("r", 20, limits=once))
    there = Balance(0, 20)
    assert held == Held("r", (there, *[Balance()] * 4, there))
    assert await store.ledger.balances(late) == [there] * 4
    assert await store.ledger.balances(tomorrow) == [Balance()] * 4
    assert await store.books.audit() == []


async def test_a_reroute_without_lines_moves_its_accounts_too(store: Store) -> None:
    await store.ledger.reserve(claim("r", 10))
    assert await store.ledger.reroute(elsewhere("r", 12, limits=())) == Held("r", ())
    assert await store.ledger.balances(lines()) == [Balance(0, 12)] * 4
    await store.ledger.reserve(claim("free", 10, limits=()))
    assert await store.ledger.reroute(elsewhere("free", 12, limits=())) == Held("free", ())
    assert await store.books.audit() == []


async def test_repeating_a_reroute_changes_nothing(store: Store) -> None:
    limits = lines(team_day=30)
    await store.ledger.reserve(claim("r", limits=limits))
    there = elsewhere("r", 25, limits=limits)
    first = await store.ledger.reroute(there)
    assert first == Held("r", (Balance(0, 25),) * 4)
    answers = await asyncio.gather(*(store.ledger.reroute(there) for _ in range(10)))
    assert answers == [Held("r", (Balance(0, 25),) * 4, duplicate=True)] * 10
    # Also where nobody could pay for it any more.
    await store.books.adjust(
        Adjustment("a", "growth", "flare", "2026-11-22", 99, (limits[2].account,), "r", "a", NOON)
    )
    again = await store.ledger.reroute(there)
    assert isinstance(again, Held)
    assert again.duplicate
    assert [line.kind for line in await store.books.journal("r")] == ["H", "B"]
    assert await store.books.audit() == []


async def test_each_part_of_a_way_counts(store: Store) -> None:
    """There and back again is no repeat, and another price alone is another way."""
    await store.ledger.reserve(claim("r"))
    ways = (
        elsewhere("r", upstream="azure", price_id="p1"),
        elsewhere("r", upstream="azure", price_id="p2"),
        elsewhere("r", upstream="azure", price_id="p2", model="blaze"),
        elsewhere("r", upstream="openai", price_id="p1"),
        elsewhere("r", 11, upstream="openai", price_id="p1"),
    )
    for way in ways:
        answer = await store.ledger.reroute(way)
        assert isinstance(answer, Held)
        assert not answer.duplicate
    assert [line.kind for line in await store.books.journal("r")] == list("HBBBBB")
    found = await store.books.find("r")
    assert found is not None
    assert (found.upstream, found.model, found.price_id, found.bound) == (
        *("openai", "flare", "p1"),
        11,
    )


@pytest.mark.parametrize("state", [P, V, X])
async def test_a_call_that_has_ended_goes_nowhere(store: Store, state: State) -> None:
    await store.ledger.reserve(claim("r"))
    await store.ledger.reroute(elsewhere("r"))
    for step in REACHED[state][0]:
        await store.ledger.settle(step)
    before = await store.books.find("r")
    for rid in ("r", "nobody"):
        with pytest.raises(NotKnown, match=rid):
            await store.ledger.reroute(elsewhere(rid, 25))
    # What was rerouted while it was held is not rerouted again, not even by a repeat.
    with pytest.raises(NotKnown):
        await store.ledger.reroute(elsewhere("r"))
    assert await store.books.find("r") == before
    assert await store.ledger.balances(lines()) == [REACHED[state][1]] * 4


async def test_a_negative_bound_of_a_reroute_is_refused(ledger: Ledger) -> None:
    await ledger.reserve(claim("r"))
    with pytest.raises(ValueError, match="bound"):
        await ledger.reroute(elsewhere("r", -1))


async def test_a_reroute_that_leaves_64_bits_is_refused(store: Store) -> None:
    await store.ledger.reserve(claim("other", 2**62))
    await store.ledger.reserve(claim("r", 10))
    if isinstance(store, MemoryStore):
        pytest.skip("Python's numbers have no end")
    with pytest.raises((OverflowError, sqlite3.IntegrityError)):
        await store.ledger.reroute(elsewhere("r", 2**63 - 1))
    assert await store.ledger.balances(lines()) == [Balance(0, 2**62 + 10)] * 4
    assert await store.books.audit() == []


async def test_many_that_grow_at_once_never_pass_a_budget(store: Store) -> None:
    limits = lines(team_day=150)
    for number in range(10):
        await store.ledger.reserve(claim(f"r{number}", 10, limits=limits))
    answers = await asyncio.gather(
        *(store.ledger.reroute(elsewhere(f"r{n}", 20, limits=limits)) for n in range(10)),
        *(store.ledger.reserve(claim(f"s{n}", 10, limits=limits)) for n in range(10)),
        *(store.ledger.reroute(elsewhere(f"r{n}", 20, limits=limits)) for n in range(10)),
    )
    grown = sum(isinstance(one, Held) and not one.duplicate for one in answers)
    assert grown == 5
    assert await store.ledger.balances(limits) == [Balance(0, 150)] * 4
    assert await store.books.audit() == []


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
    assert late == Entry(
        "r", P, 10, 4, applied=True, balances=(Balance(4, 0),) * 4, accounts=ACCOUNTS
    )
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

EXAMPLES = size(60, 50_000)
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
