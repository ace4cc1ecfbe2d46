"""What every ``Books`` promises. The stores are those of ``BACKENDS``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from gateway.domain.books import Adjustment, Correction, Hold
from gateway.domain.call import Operation
from gateway.domain.ledger import (
    Balance,
    Basis,
    Denied,
    Entry,
    Held,
    Outcome,
    Reroute,
    Settlement,
    State,
    UsageRow,
)
from gateway.domain.transition import usage_day
from gateway.ports import Books, BooksChanged, Ledger, NotKnown, Store
from gateway.stores.memory_ledger import MemoryStore
from gateway.stores.memory_rows import MemoryRows
from tests.contract.stores import (
    ACCOUNTS,
    LEASE,
    NOON,
    SPOILERS,
    H,
    P,
    V,
    X,
    claim,
    expired,
    lines,
    settled,
    voided,
)

LATER = NOON + timedelta(days=3)


def corrected(rid: str, cost: int, name: str = "c1", images: int = 0) -> Correction:
    return Correction(name, rid, cost, "the invoice says so", "ann", LATER, images)


def adjusted(
    amount: int,
    name: str = "a1",
    day: str = "2026-11-22",
    accounts: tuple[str, ...] = ACCOUNTS,
) -> Adjustment:
    return Adjustment(name, "growth", "flare", day, amount, accounts, "drift", "bob", LATER)


async def row(ledger: Ledger) -> UsageRow:
    (only,) = await ledger.usage()
    return only


# What each state is reached by.
REACHED: dict[State, list[Settlement]] = {
    H: [],
    P: [settled("r", 7)],
    V: [voided("r")],
    X: [expired("r")],
}


# Looking


@pytest.mark.parametrize("state", State)
async def test_a_reservation_is_found_whatever_became_of_it(store: Store, state: State) -> None:
    await store.ledger.reserve(claim("r", key="i"))
    for end in REACHED[state]:
        await store.ledger.settle(end)
    outcome, basis, cost = {
        H: (None, None, 0),
        P: (Outcome.DELIVERED, Basis.USAGE, 7),
        V: (Outcome.REFUSED, Basis.NONE, 0),
        X: (Outcome.UNKNOWN, Basis.ESTIMATED, 10),
    }[state]
    assert await store.books.find("r") == Hold(
        rid="r",
        state=state,
        bound=10,
        cost=cost,
        accounts=ACCOUNTS,
        team="growth",
        key_id="k1",
        model="flare",
        operation=Operation.GENERATION,
        upstream="openai",
        images=1,
        price_id="p1",
        worker="w1",
        at=NOON,
        lease_ends=NOON + LEASE,
        idempotency_key="i",
        outcome=outcome,
        basis=basis,
    )


async def test_flags_are_found_and_an_unknown_rid_is_not(store: Store) -> None:
    await store.ledger.reserve(claim("r"))
    await store.ledger.settle(settled("r", 7, "soft", "no_usage"))
    found = await store.books.find("r")
    assert found is not None
    assert found.flags == ("soft", "no_usage")
    assert await store.books.find("nobody") is None
    assert await store.books.journal("nobody") == []


async def test_the_journal_says_what_happened_in_order(store: Store) -> None:
    await store.ledger.reserve(claim("r"))
    await store.ledger.reserve(claim("other"))
    await store.ledger.sweep(NOON + 2 * LEASE, limit=2)
    await store.ledger.settle(replace(settled("r", 4, "no_usage"), at=NOON + 3 * LEASE))
    await store.books.correct(corrected("r", 6))
    journal = await store.books.journal("r")
    assert [(line.at, line.kind, line.pending, line.posted) for line in journal] == [
        (NOON, "H", 10, 0),
        (NOON + 2 * LEASE, "X", -10, 10),
        (NOON + 3 * LEASE, "P", 0, -6),
        (LATER, "A", 0, 2),
    ]
    assert {line.rid for line in journal} == {"r"}
    assert [line.seq for line in journal] == sorted({line.seq for line in journal})
    held, gone, posted, said = (line.detail for line in journal)
    assert held == {}
    assert (gone["outcome"], gone["basis"]) == ("unknown", "estimated")
    assert (posted["outcome"], posted["images"], posted["flags"]) == ("delivered", 1, ["no_usage"])
    assert said == {
        "id": "c1",
        "reason": "the invoice says so",
        "actor": "ann",
        "before": 4,
        "cost": 6,
    }


async def test_a_settlement_without_a_time_is_in_the_journal_too(store: Store) -> None:
    await store.ledger.reserve(claim("r"))
    await store.ledger.settle(settled("r", 4))
    assert [line.at for line in await store.books.journal("r")] == [NOON, None]


async def test_what_asks_for_a_look(store: Store) -> None:
    for rid in "abcdefgh":
        await store.ledger.reserve(claim(rid))
    await store.ledger.settle(expired("b"))
    await store.ledger.settle(settled("c", 1, "soft"))
    await store.ledger.settle(settled("d", 1, "soft", "over_bound"))
    await store.ledger.settle(settled("e", 1))
    await store.ledger.settle(replace(voided("f"), flags=("no_usage",)))
    await store.ledger.settle(expired("g", "no_usage"))
    await store.ledger.settle(settled("h", 1, "unpriced"))

    async def asked(limit: int = 100, after: str = "") -> str:
        return "".join(hold.rid for hold in await store.books.unresolved(limit, after))

    assert await asked() == "bdgh"
    assert (await asked(2), await asked(2, "d"), await asked(2, "h")) == ("bd", "gh", "")
    for number, rid in enumerate("bdgh"):
        await store.books.correct(corrected(rid, 1, f"c{number}"))
    assert await asked() == ""
    assert await store.books.audit() == []


# Correcting


@pytest.mark.parametrize("cost", [0, 4, 10, 25])
@pytest.mark.parametrize("state", [P, V, X])
async def test_a_closed_call_is_corrected_up_and_down(
    store: Store, state: State, cost: int
) -> None:
    await store.ledger.reserve(claim("r"))
    for end in REACHED[state]:
        await store.ledger.settle(end)
    entry = await store.books.correct(corrected("r", cost, images=2))
    balances = (Balance(cost, 0),) * 4
    assert entry == Entry("r", P, 10, cost, applied=True, balances=balances, accounts=ACCOUNTS)
    assert await store.ledger.balances(lines()) == list(balances)
    assert await store.ledger.unresolved() == 0
    counted = await row(store.ledger)
    assert (counted.requests, counted.cost, counted.unresolved, counted.unresolved_cost) == (
        (1, cost, 0, 0)
    )
    # The pictures of a posted call were counted when it was posted.
    assert counted.images == (1 if state is P else 2)
    assert await store.books.audit() == []


@pytest.mark.parametrize("flags", [(), ("soft",), ("no_usage",)])
async def test_what_is_so_already_stays(store: Store, flags: tuple[str, ...]) -> None:
    await store.ledger.reserve(claim("r"))
    await store.ledger.settle(settled("r", 7, *flags))
    doubtful = flags == ("no_usage",)
    entry = await store.books.correct(corrected("r", 7))
    assert entry == Entry(
        "r", P, 10, 7, applied=doubtful, balances=(Balance(7, 0),) * 4, accounts=ACCOUNTS
    )
    found = await store.books.find("r")
    assert found is not None
    assert found.flags == (() if doubtful else flags)
    assert (await row(store.ledger)).flagged == 0
    assert len(await store.books.journal("r")) == (3 if doubtful else 2)


async def test_a_resolved_call_has_no_flags_and_keeps_what_was_seen(store: Store) -> None:
    await store.ledger.reserve(claim("r", key="i"))
    await store.ledger.settle(expired("r", "over_bound"))
    assert (await row(store.ledger)).flagged == 1
    await store.books.correct(corrected("r", 4, images=1))
    found = await store.books.find("r")
    assert found is not None
    assert (found.state, found.cost, found.flags) == (P, 4, ())
    assert (found.outcome, found.basis) == (Outcome.UNKNOWN, Basis.ESTIMATED)
    assert found.idempotency_key == "i"
    counted = await row(store.ledger)
    assert (counted.images, counted.flagged) == (1, 0)


async def test_a_voided_call_that_was_billed_counts_as_a_request(store: Store) -> None:
    await store.ledger.reserve(claim("r"))
    await store.ledger.settle(replace(voided("r"), flags=("no_usage",)))
    await store.books.correct(corrected("r", 9))
    counted = await row(store.ledger)
    assert (counted.requests, counted.cost, counted.flagged) == (1, 9, 0)
    assert await store.books.audit() == []


async def test_a_running_call_is_not_corrected(store: Store) -> None:
    await store.ledger.reserve(claim("r"))
    entry = await store.books.correct(corrected("r", 3))
    assert entry == Entry(
        "r", H, 10, 0, applied=False, balances=(Balance(0, 10),) * 4, accounts=ACCOUNTS
    )
    assert [line.kind for line in await store.books.journal("r")] == ["H"]
    # The same correction may be said again once the call has ended.
    await store.ledger.settle(settled("r", 7))
    assert (await store.books.correct(corrected("r", 3))).applied
    assert await store.ledger.balances(lines()) == [Balance(3, 0)] * 4


async def test_a_correction_applies_once(store: Store) -> None:
    await store.ledger.reserve(claim("r"))
    await store.ledger.settle(expired("r"))
    first = await store.books.correct(corrected("r", 4))
    assert first.applied
    assert await store.books.correct(corrected("r", 4)) == replace(first, applied=False)
    # Its id is what counts: a later one stands although the first is said again.
    assert (await store.books.correct(corrected("r", 6, "c2"))).cost == 6
    again = await store.books.correct(corrected("r", 4))
    assert (again.cost, again.applied) == (6, False)
    assert [line.kind for line in await store.books.journal("r")] == ["H", "X", "A", "A"]
    assert await store.ledger.balances(lines()) == [Balance(6, 0)] * 4


async def test_the_same_correction_many_times_at_once(store: Store) -> None:
    await store.ledger.reserve(claim("r"))
    await store.ledger.settle(expired("r"))
    entries = await asyncio.gather(
        *(store.books.correct(corrected("r", number % 2)) for number in range(10))
    )
    assert sum(entry.applied for entry in entries) == 1
    assert len({entry.cost for entry in entries}) == 1
    assert await store.books.audit() == []


async def test_a_correction_of_nothing(books: Books) -> None:
    with pytest.raises(NotKnown, match=r"nobody.*forgotten"):
        await books.correct(corrected("nobody", 3))
    with pytest.raises(ValueError, match="never negative"):
        await books.correct(corrected("nobody", -1))


@pytest.mark.parametrize(("cost", "alarm"), [(4, False), (5, True)])
async def test_a_settlement_after_a_correction_is_a_repeat(
    store: Store, conflicts: list[tuple[Entry, Settlement]], cost: int, alarm: bool
) -> None:
    await store.ledger.reserve(claim("r"))
    await store.ledger.settle(expired("r"))
    await store.books.correct(corrected("r", 4))
    late = settled("r", cost)
    entry = await store.ledger.settle(late)
    assert entry == Entry(
        "r", P, 10, 4, applied=False, balances=(Balance(4, 0),) * 4, accounts=ACCOUNTS
    )
    assert conflicts == ([(entry, late)] if alarm else [])


async def test_settling_and_correcting_at_once_adds_up(store: Store) -> None:
    await asyncio.gather(*(store.ledger.reserve(claim(f"r{n}")) for n in range(20)))
    await asyncio.gather(
        *(store.ledger.settle(expired(f"r{n}")) for n in range(20)),
        *(store.books.correct(corrected(f"r{n}", 3, f"c{n}")) for n in range(20)),
        *(store.ledger.settle(settled(f"r{n}", 4)) for n in range(20)),
        *(store.books.adjust(adjusted(n, f"a{n}")) for n in range(5)),
    )
    assert await store.books.audit() == []
    assert await store.ledger.open_holds() == 0


# Adjusting


@pytest.mark.parametrize("amount", [5, 0, -3, -100])
async def test_an_adjustment_moves_balances_and_usage(store: Store, amount: int) -> None:
    await store.ledger.reserve(claim("r"))
    await store.ledger.settle(settled("r", 7))
    assert await store.books.adjust(adjusted(amount)) is True
    assert await store.ledger.balances(lines()) == [Balance(7 + amount, 0)] * 4
    rows = await store.ledger.usage()
    assert sum(one.cost for one in rows) == 7 + amount
    by_key = {one.key_id: (one.requests, one.cost) for one in rows}
    assert by_key == {"k1": (1, 7)} | ({"": (0, amount)} if amount else {})
    assert await store.books.audit() == []


async def test_an_adjustment_applies_once(store: Store) -> None:
    applied = await asyncio.gather(*(store.books.adjust(adjusted(5)) for _ in range(10)))
    assert sorted(applied) == [False] * 9 + [True]
    assert await store.books.adjust(adjusted(99)) is False
    assert await store.ledger.balances(lines()) == [Balance(5, 0)] * 4
    (line,) = await store.books.journal("a1")
    assert (line.at, line.kind, line.pending, line.posted) == (LATER, "A", 0, 5)
    assert line.detail == {"id": "a1", "reason": "drift", "actor": "bob"}


async def test_corrections_and_adjustments_share_their_ids(store: Store) -> None:
    await store.ledger.reserve(claim("r"))
    await store.ledger.settle(settled("r", 7))
    assert await store.books.adjust(adjusted(1, "one"))
    assert not (await store.books.correct(corrected("r", 3, "one"))).applied
    assert (await store.books.correct(corrected("r", 3, "two"))).applied
    assert not await store.books.adjust(adjusted(1, "two"))
    assert await store.ledger.balances(lines()) == [Balance(4, 0)] * 4
    assert await store.books.audit() == []


async def test_an_adjustment_of_another_day_makes_its_row(store: Store) -> None:
    twice = (*ACCOUNTS, ACCOUNTS[0])  # an account named twice moves once
    await store.books.adjust(adjusted(-4, day="2026-11-20", accounts=twice))
    assert await store.ledger.usage() == [UsageRow("2026-11-20", "growth", "", "flare", cost=-4)]
    assert await store.ledger.balances(lines()) == [Balance(-4, 0)] * 4
    assert await store.books.audit() == []


async def test_budgets_know_of_adjustments(store: Store) -> None:
    limits = lines(team_day=10)
    await store.books.adjust(adjusted(5))
    denied = await store.ledger.reserve(claim("r", 6, limits=limits))
    assert denied == Denied(limits[2], Balance(5, 0))
    # More is given back than was spent: there is room for it.
    await store.books.adjust(adjusted(-8, "a2"))
    assert isinstance(await store.ledger.reserve(claim("r", 13, limits=limits)), Held)


async def test_an_adjustment_is_found_by_its_id(store: Store) -> None:
    await store.ledger.reserve(claim("r"))
    await store.ledger.settle(settled("r", 7))
    await store.books.correct(corrected("r", 3, "of a call"))
    await store.books.adjust(adjusted(5))
    assert await store.books.adjustment("a1") == adjusted(5)
    assert await store.books.adjustment("of a call") is None
    assert await store.books.adjustment("nobody") is None


SEEN = ("2026-11-22", "flare")


async def test_adjustments_that_belong_together_are_applied_together(store: Store) -> None:
    await store.ledger.reserve(claim("r"))
    await store.ledger.settle(settled("r", 7))
    await store.ledger.reserve(claim("other", model="blaze"))
    await store.ledger.settle(settled("other", 1))
    both = [adjusted(5, "a1"), adjusted(-2, "a2")]
    assert await store.books.adjust_all(both, {SEEN: 7}) == ["a1", "a2"]
    assert await store.ledger.balances(lines()) == [Balance(11, 0)] * 4
    assert await store.books.audit() == []
    # What was applied before is left out, if the sums are those that were seen.
    assert await store.books.adjust_all([*both, adjusted(1, "a3")], {SEEN: 10}) == ["a3"]
    assert await store.books.adjust_all([], {}) == []
    assert await store.books.audit() == []


@pytest.mark.parametrize(
    "seen", [{SEEN: 6}, {SEEN: 7, ("2026-11-22", "nova"): 1}, {("2026-11-21", "flare"): 7}]
)
async def test_other_books_than_were_seen_are_left_alone(
    store: Store, seen: dict[tuple[str, str], int]
) -> None:
    await store.ledger.reserve(claim("r"))
    await store.ledger.settle(settled("r", 7))
    with pytest.raises(BooksChanged, match="changed meanwhile"):
        await store.books.adjust_all([adjusted(5, "a1"), adjusted(-2, "a2")], seen)
    assert await store.ledger.balances(lines()) == [Balance(7, 0)] * 4
    assert await store.books.journal("a1") == []
    assert await store.books.adjust_all([adjusted(5)], {SEEN: 7}) == ["a1"]


async def test_of_many_that_mend_the_same_difference_one_does(store: Store) -> None:
    """Each has other ids and other accounts: the sum that they saw is what they share."""
    await store.ledger.reserve(claim("r"))
    await store.ledger.settle(settled("r", 7))

    async def mend(number: int) -> list[str]:
        accounts = tuple(f"team:t{number}|{name}" for name in ("d", "m"))
        return await store.books.adjust_all(
            [adjusted(2, f"{number}-a", accounts=accounts), adjusted(1, f"{number}-b")], {SEEN: 7}
        )

    done = await asyncio.gather(*(mend(number) for number in range(10)), return_exceptions=True)
    assert [type(one) for one in done].count(BooksChanged) == 9
    [row, mended] = await store.ledger.usage()
    assert row.cost + mended.cost == 10
    assert await store.books.audit() == []


# The audit


async def busy(store: Store) -> None:
    """Books with something of everything."""
    for rid in ("held", "posted", "voided", "expired", "late", "fixed", "old"):
        await store.ledger.reserve(claim(rid))
    await store.ledger.reserve(claim("nowhere", limits=()))
    await store.ledger.settle(settled("nowhere", 2))
    await store.ledger.settle(settled("posted", 7))
    await store.ledger.settle(settled("old", 3))
    await store.ledger.settle(voided("voided"))
    for rid in ("expired", "late", "fixed"):
        await store.ledger.settle(expired(rid))
    await store.ledger.settle(settled("late", 4))
    await store.books.correct(corrected("fixed", 6))
    await store.books.adjust(adjusted(-5))


async def test_good_books_have_no_discrepancy(store: Store) -> None:
    assert await store.books.audit() == []
    await busy(store)
    assert await store.books.audit() == []


ACCOUNT = "team:growth|d|2026-11-22"


def move_balance(rows: MemoryRows, posted: int, pending: int) -> None:
    before = rows.balances[ACCOUNT]
    rows.balances[ACCOUNT] = Balance(before.posted + posted, before.pending + pending)


def change_usage(rows: MemoryRows) -> None:
    key = next(iter(rows.usage))
    rows.usage[key] = rows.usage[key]._replace(cost=rows.usage[key].cost + 1)


def change_hold(rows: MemoryRows) -> None:
    rows.holds["posted"].cost += 1


def lose_line(rows: MemoryRows) -> None:
    rows.journal = [one for one in rows.journal if (one.rid, one.kind) != ("posted", "P")]


def lose_adjustment(rows: MemoryRows) -> None:
    del rows.adjustments["a1"]


def lose_balance(rows: MemoryRows) -> None:
    del rows.balances[ACCOUNT]


USERS = "cost of 2026-11-22 growth and its users"

DAMAGES: dict[str, tuple[str, Callable[[MemoryRows], None], dict[str, tuple[int, int]]]] = {
    "a balance's posted": (
        "UPDATE balance SET posted = posted + 1 WHERE account = 'team:growth|d|2026-11-22'",
        lambda rows: move_balance(rows, 1, 0),
        {f"posted of {ACCOUNT}": (26, 25)},
    ),
    "a balance's pending": (
        "UPDATE balance SET pending = pending - 3 WHERE account = 'team:growth|d|2026-11-22'",
        lambda rows: move_balance(rows, 0, -3),
        {f"pending of {ACCOUNT}": (7, 10)},
    ),
    "a lost balance": (
        "DELETE FROM balance WHERE account = 'team:growth|d|2026-11-22'",
        lose_balance,
        {f"posted of {ACCOUNT}": (0, 25), f"pending of {ACCOUNT}": (0, 10)},
    ),
    "a day's usage": (
        "UPDATE usage_daily SET cost = cost + 1 WHERE key_id = 'k1'",
        change_usage,
        {"cost of all days": (28, 27), USERS: (28, 27)},
    ),
    "a hold's cost": (
        "UPDATE hold SET cost = cost + 1 WHERE rid = 'posted'",
        change_hold,
        {
            "cost of all days": (27, 28),
            USERS: (27, 28),
            **{f"posted of {account}": (25, 26) for account in ACCOUNTS},
            "posted of posted in the journal": (8, 7),
        },
    ),
    "a lost line of the journal": (
        "DELETE FROM journal WHERE rid = 'posted' AND kind = 'P'",
        lose_line,
        {
            "posted of posted in the journal": (7, 0),
            "pending of posted in the journal": (0, 10),
        },
    ),
    "a lost adjustment": (
        "DELETE FROM adjustment WHERE id = 'a1'",
        lose_adjustment,
        {
            "cost of all days": (27, 32),
            USERS: (27, 32),
            **{f"posted of {account}": (25, 30) for account in ACCOUNTS},
        },
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_the_audit_finds_damage(
    store: Store, request: pytest.FixtureRequest, tmp_path: Path, damage: str
) -> None:
    sql, poke, found = DAMAGES[damage]
    await busy(store)
    assert await store.books.audit() == []
    backend = request.node.callspec.params["store"]
    if isinstance(store, MemoryStore):
        poke(store.rows)
    elif backend in SPOILERS:
        SPOILERS[backend](tmp_path, sql)
    else:
        pytest.skip(f"nothing plants damage in {backend}")
    discrepancies = await store.books.audit()
    assert {one.what: (one.kept, one.summed) for one in discrepancies} == found


async def test_an_audit_while_money_moves_sees_one_instant(store: Store) -> None:
    looks = 0

    async def spend(name: str) -> None:
        turn = 0
        while turn < 10 or looks < 2:
            rid = f"{name}-{turn}"
            await store.ledger.reserve(claim(rid))
            await store.ledger.settle(settled(rid, turn) if turn % 2 else expired(rid))
            turn += 1

    spending = asyncio.gather(*(spend(f"s{number}") for number in range(8)))
    while not spending.done():
        assert await store.books.audit() == []
        looks += 1
    await spending
    assert looks > 1


async def test_the_oldest_hold_is_the_one_whose_lease_ends_first(store: Store) -> None:
    assert await store.books.oldest_hold() is None
    for hours, rid in enumerate(("closed", "oldest", "younger")):
        await store.ledger.reserve(claim(rid, at=NOON + timedelta(hours=hours)))
    await store.ledger.settle(settled("closed", 1))
    oldest = await store.books.oldest_hold()
    assert oldest is not None
    assert oldest == await store.books.find("oldest")
    assert oldest.lease_ends == NOON + timedelta(hours=1) + LEASE


async def test_where_the_calls_of_a_day_went(store: Store) -> None:
    """By the upstream that each went to in the end; what was given back counts nowhere."""
    ledger = store.ledger
    for rid, upstream, cost in (("r1", "openai", 3), ("r2", "openai", 4), ("r3", "azure", 5)):
        await ledger.reserve(replace(claim(rid), upstream=upstream, bound=9))
        await ledger.settle(settled(rid, cost))
    await ledger.reserve(replace(claim("r4"), upstream="azure", bound=9))
    await ledger.settle(voided("r4"))
    await ledger.reserve(replace(claim("r5"), upstream="openai", bound=9))
    await ledger.reroute(Reroute("r5", "spare", "azure", "p", 9, claim("r5").lines, claim("r5").at))
    await ledger.settle(expired("r5"))
    await ledger.reserve(replace(claim("r6"), upstream="azure", bound=9))
    await store.books.adjust(adjusted(100))
    day = usage_day(claim("r1").at)
    found = {
        (upstream, row.model, row.team): (row.requests, row.cost)
        for upstream, row in await store.books.routed(day)
    }
    model, team = claim("r1").model, claim("r1").team
    assert found == {
        ("openai", model, team): (2, 7),
        ("azure", model, team): (1, 5),
        ("azure", "spare", team): (1, 9),
    }
    assert await store.books.routed("2001-01-01") == []
