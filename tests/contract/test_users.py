"""What every ``Books`` says of end users. The stores are those of ``BACKENDS``."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from gateway.domain.books import Correction
from gateway.domain.ledger import By, Claim, Denied, Held, Line, UserUsage
from gateway.domain.quota import Limit, Scope, Unit, Window, period
from gateway.ports import Store
from tests.contract.stores import NOON, claim, elsewhere, expired, lines, settled, voided

DAY = timedelta(days=1)
ANN, BOB = "u_0123456789abcdef0123", "u_fedcba98765432100000"


def of(user: str, rid: str, *, images: int = 1, days: int = 0, team: str = "growth") -> Claim:
    made = claim(rid, at=NOON + days * DAY, team=team)
    return replace(made, user=user, images=images)


async def test_a_call_knows_its_user(store: Store) -> None:
    await store.ledger.reserve(of(ANN, "r"))
    await store.ledger.reserve(claim("nobody"))
    await store.ledger.reroute(elsewhere("r", 20))
    await store.ledger.settle(settled("r", 7))
    for rid, user in (("r", ANN), ("nobody", "")):
        hold = await store.books.find(rid)
        assert hold is not None
        assert hold.user == user
    oldest = await store.books.oldest_hold()
    assert oldest is not None
    assert oldest.user == ""


async def test_usage_by_user(store: Store) -> None:
    ledger, books = store.ledger, store.books
    assert await books.usage_by_user() == []
    for made in (
        of(ANN, "a1", images=2),
        of(ANN, "a2"),
        of(ANN, "a3", days=1),
        of(ANN, "lost", images=3),
        of(ANN, "void"),
        of(ANN, "open"),
        of(BOB, "b1"),
        of("", "nobody"),
        of(ANN, "art", team="art"),
    ):
        await ledger.reserve(made)
    for rid, cost in (("a1", 7), ("a2", 2**40), ("a3", 1), ("b1", 5), ("nobody", 3), ("art", 2)):
        await ledger.settle(settled(rid, cost))
    await ledger.settle(voided("void"))
    await ledger.settle(expired("lost"))
    lost, first = UserUsage("growth", ANN, 4, 4, 2**40 + 18, 1), UserUsage("art", ANN, 1, 1, 2, 0)
    nobody, bob = UserUsage("growth", "", 1, 1, 3, 0), UserUsage("growth", BOB, 1, 1, 5, 0)
    assert await books.usage_by_user() == [first, nobody, lost, bob]
    assert await books.usage_by_user("growth") == [nobody, lost, bob]
    assert await books.usage_by_user("nobody") == []
    for since, until in (
        ("2026-11-23", None),
        ("2026-11-23", "2026-11-23"),
        ("2026-11-23", "2027-01-01"),
    ):
        tomorrow = [UserUsage("growth", ANN, 1, 1, 1, 0)]
        assert await books.usage_by_user(None, since, until) == tomorrow
        assert await books.usage_by_user("growth", since, until) == tomorrow
    assert await books.usage_by_user("growth", None, "2026-11-22") == [
        nobody,
        replace(lost, requests=3, images=3, cost=2**40 + 17),
        bob,
    ]
    assert await books.usage_by_user("growth", "2026-11-24") == []
    # What all users have bought is what the days say.
    found = await books.usage_by_user()
    usage = await ledger.usage()
    assert sum(one.cost for one in found) == sum(row.cost for row in usage)
    assert sum(one.requests for one in found) == sum(row.requests for row in usage)
    # A correction is the user's as well.
    await books.correct(Correction("c", "lost", 1, "found", "ann", NOON))
    assert await books.usage_by_user("growth", None, "2026-11-22") == [
        nobody,
        replace(lost, requests=3, images=3, cost=2**40 + 8, unresolved=0),
        bob,
    ]


async def test_the_users_of_many_teams(store: Store) -> None:
    """In the order of their teams, however many are added up at a time; each team once."""
    names = [f"team-{number:02}" for number in range(40)] + ["a", "~", "~ b"]
    # The last one begins with the last character that there is.
    names += ["\u00e9quipe", "\U0001f3a8", "\U0010ffff", "\U0010ffff!"]
    for number, team in enumerate(names):
        for user, days in ((ANN, 0), (BOB, 1)):
            rid = f"{number}-{days}"
            await store.ledger.reserve(of(user, rid, team=team, days=days))
            await store.ledger.settle(settled(rid, number + 1))
    costs = {team: number + 1 for number, team in enumerate(names)}
    everybody = [
        UserUsage(team, user, 1, 1, costs[team], 0) for team in sorted(names) for user in (ANN, BOB)
    ]
    assert await store.books.usage_by_user() == everybody
    anns = [one for one in everybody if one.user == ANN]
    assert await store.books.usage_by_user(None, "2026-11-22", "2026-11-22") == anns
    # All of the month but a day: that is subtracted.
    assert await store.books.usage_by_user(None, "2026-11-02", "2026-11-22") == anns
    assert await store.books.usage_by_user("~") == [one for one in everybody if one.team == "~"]
    totals = await store.books.usage_by(By.TEAM)
    assert {row.team: row.cost for row in totals} == {
        team: 2 * cost for team, cost in costs.items()
    }
    months = await store.books.usage_by(By.MONTH, None, "2026-11-23")
    assert [(row.day, row.requests) for row in months] == [("2026-11", len(names))]


async def test_calls_that_were_forgotten_stay_their_users(store: Store) -> None:
    await store.ledger.reserve(of(ANN, "r", images=2))
    await store.ledger.settle(settled("r", 7))
    assert await store.upkeep.forget(NOON + DAY) == 1
    assert await store.books.usage_by_user() == [UserUsage("growth", ANN, 1, 2, 7, 0)]
    assert await store.books.audit() == []


async def test_users_of_what_changes_its_mind(store: Store) -> None:
    """Expired, settled late, voided late, corrected: only the last word counts."""
    for made in (of(ANN, "late"), of(ANN, "void"), of(BOB, "found"), of("", "zero")):
        await store.ledger.reserve(made)
        await store.ledger.settle(expired(made.rid))
    await store.ledger.settle(settled("late", 3))
    await store.ledger.settle(voided("void"))
    await store.ledger.settle(settled("late", 3))
    await store.books.correct(Correction("c", "void", 2, "billed after all", "ann", NOON))
    await store.books.correct(Correction("d", "zero", 0, "not billed", "ann", NOON))
    assert await store.books.usage_by_user() == [
        UserUsage("growth", "", 1, 0, 0, 0),
        UserUsage("growth", ANN, 2, 1, 5, 0),
        UserUsage("growth", BOB, 1, 0, 10, 1),
    ]
    await store.ledger.settle(voided("found"))
    assert [one.user for one in await store.books.usage_by_user()] == ["", ANN]
    assert await store.books.audit() == []


@pytest.mark.parametrize(
    ("since", "until"),
    [
        (None, None),
        ("2026-09-01", "2026-09-30"),
        ("2026-08-29", "2026-11-16"),
        ("2026-09-02", "2026-09-29"),
        ("2026-10-20", None),
        (None, "2026-09-05"),
        ("2026-11-16", "2026-11-22"),
        # Half months, exactly, and a day more or less.
        ("2026-09-16", "2026-11-15"),
        ("2026-09-15", "2026-11-16"),
        ("2026-09-17", "2026-11-14"),
        ("2026-09-16", "2026-09-30"),
        ("2026-08-31", "2026-09-15"),
        # As far from both ends of a half month as can be.
        ("2026-09-24", "2026-11-08"),
        ("2026-10-08", "2026-10-23"),
    ],
)
async def test_any_stretch_of_days_is_the_sum_of_its_days(
    store: Store, since: str | None, until: str | None
) -> None:
    users = (ANN, BOB, "")
    days = range(-84, 1, 2)
    for number, day in enumerate(days):
        rid = f"r{number}"
        await store.ledger.reserve(of(users[number % 3], rid, images=number, days=day))
        await store.ledger.settle(settled(rid, 1 << number))
    wanted: dict[str, list[int]] = {}
    for number, day in enumerate(days):
        name = f"{NOON + day * DAY:%Y-%m-%d}"
        if (since or "") <= name <= (until or "9"):
            sums = wanted.setdefault(users[number % 3], [0, 0, 0])
            for place, amount in enumerate((1, number, 1 << number)):
                sums[place] += amount
    found = await store.books.usage_by_user("growth", since, until)
    assert {one.user: [one.requests, one.images, one.cost] for one in found} == wanted
    assert await store.books.audit() == []


async def test_what_moves_between_half_months_is_in_each(store: Store) -> None:
    """A call of each half, and what one loses the other gains: the month says nothing of it."""
    for rid, days in (("early", -14), ("late", 0)):
        await store.ledger.reserve(of(ANN, rid, days=days))
        await store.ledger.settle(expired(rid))
    await store.books.correct(Correction("c", "early", 7, "found", "ann", NOON))
    await asyncio.gather(
        store.books.correct(Correction("d", "early", 2, "found", "ann", NOON)),
        store.ledger.settle(settled("late", 15)),
    )
    for since, until, cost in (
        ("2026-11-01", "2026-11-15", 2),
        ("2026-11-16", "2026-11-30", 15),
        ("2026-11-01", "2026-11-30", 17),
    ):
        found = await store.books.usage_by_user("growth", since, until)
        assert [(one.cost, one.unresolved) for one in found] == [(cost, 0)]
    assert await store.books.audit() == []


def budget(user: str, amount: int) -> Line:
    limit = Limit(Scope.USER, f"growth/{user}", Unit.MONEY, Window.DAY, amount)
    return Line(limit, period(Window.DAY, NOON))


async def test_one_users_budget_does_not_touch_another_s(store: Store) -> None:
    async def reserve(rid: str, user: str, bound: int) -> object:
        limits = (budget(user, 15), *lines(team_day=100))
        return await store.ledger.reserve(replace(claim(rid, bound, limits=limits), user=user))

    assert isinstance(await reserve("a1", ANN, 10), Held)
    denied = await reserve("a2", ANN, 10)
    assert isinstance(denied, Denied)
    assert denied.line == budget(ANN, 15)
    assert isinstance(await reserve("b1", BOB, 10), Held)
    await store.ledger.settle(settled("a1", 4))
    assert isinstance(await reserve("a2", ANN, 10), Held)
    # Accounts of users are accounts like all others.
    [ann, bob] = await store.ledger.balances([budget(ANN, 15), budget(BOB, 15)])
    assert (ann.posted, ann.pending, bob.posted, bob.pending) == (4, 10, 0, 10)
    assert await store.books.audit() == []
    assert [hold.rid for hold in await store.books.unresolved()] == []
    await store.ledger.settle(voided("a2"))
    await store.ledger.settle(settled("b1", 5))
    assert await store.upkeep.forget(NOON + DAY) == 3
    assert await store.books.audit() == []
