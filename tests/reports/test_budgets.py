"""Whom the watch over budgets looks at, and when: e2e/test_budgets.py has what it says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

import pytest

from gateway.domain.books import Adjustment
from gateway.domain.errors import LedgerUnavailable
from gateway.domain.ledger import Balance, Line
from gateway.domain.quota import Scope
from gateway.domain.team import Declared, Key, Limits, Team, money_lines
from gateway.ports import Message
from gateway.reports import budgets
from gateway.reports.budgets import LEASE_SECONDS, BudgetWatch
from gateway.reports.owners import Owners, Spenders, owners_of
from gateway.stores.memory_ledger import MemoryStore
from gateway.telemetry.timed import TimedLedger
from tests.clock import StillClock
from tests.contract.stores import claim, expired, settled, voided

BUDGET = Limits(budget_day=10)
TEAMS = 40
AT_ONCE = 4
OTHERS = 8


@dataclass
class Receiver:
    """Takes messages unless it is away."""

    away: bool = False
    heard: list[str] = field(default_factory=list)

    async def tell(self, message: Message) -> bool:
        if not self.away:
            self.heard.append(str(message.data.get("key", message.data["team"])))
        return not self.away

    async def aclose(self) -> None:
        return


class Bench:
    """A directory of many teams, and a watch that sees a few of them a look."""

    def __init__(self) -> None:
        self.clock = StillClock()
        self.store = MemoryStore()
        self.receiver = Receiver()
        self.declared = Declared({"file": Team("file", limits=BUDGET)})
        self.spenders = Spenders()
        self.ledger = TimedLedger(
            self.store.ledger, self.clock, lambda *_: None, self.spenders.heard
        )
        self.looked_at: list[str] = []
        self.watch = BudgetWatch(
            ledger=self.ledger,
            upkeep=self.store.upkeep,
            owners=Owners(self.store.directory, lambda: self.declared),
            spenders=self.spenders,
            clock=self.clock,
            warn_percent=80,
            notifier=self.receiver,
            message_id=lambda name: name,
            counted=lambda team, mark: None,
        )

    async def fill(self) -> None:
        for number in range(TEAMS):
            await self.store.directory.create_team(Team(f"team{number:02}", limits=BUDGET))
        await self.store.directory.create_key(Key("k1", "team07", limits=BUDGET), b"1")

    async def spend(self, team: str, cost: int = 8, *, here: bool = True) -> None:
        """A call of a team's key is reserved and settled, here or in another process."""
        lines = money_lines(
            (*BUDGET.of(Scope.KEY, f"key-{team}"), *BUDGET.of(Scope.TEAM, team)),
            self.clock.now(),
            Team(team).zone,
        )
        ledger = self.ledger if here else self.store.ledger
        await ledger.reserve(claim(f"req-{team}", limits=lines, at=self.clock.now(), team=team))
        await ledger.settle(settled(f"req-{team}", cost))

    async def look(self) -> set[str]:
        """Whose balances were asked for."""
        self.looked_at.clear()
        await self.watch.look()
        assert len(self.looked_at) == len(set(self.looked_at)), "nobody is looked at twice"
        return set(self.looked_at)


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(budgets, "OWNERS_AT_ONCE", AT_ONCE)
    monkeypatch.setattr(budgets, "OTHERS_A_LOOK", OTHERS)
    bench = Bench()
    balances = bench.store.ledger.balances

    async def seen(lines: Sequence[Line]) -> list[Balance]:
        bench.looked_at += [line.limit.owner for line in lines]
        assert len(lines) <= AT_ONCE
        return await balances(lines)

    monkeypatch.setattr(bench.store.ledger, "balances", seen)
    await bench.fill()
    return bench


async def test_a_look_is_at_who_has_spent_and_at_a_few_others(bench: Bench) -> None:
    assert await bench.look() == {"file", *(f"team{number:02}" for number in range(8))}
    await bench.spend("team30")
    assert await bench.look() == {"team30", *(f"team{number:02}" for number in range(8, 16))}
    assert bench.receiver.heard == ["team30"]
    assert "team30" not in await bench.look()


async def test_what_other_processes_booked_is_found_in_a_round(bench: Bench) -> None:
    await bench.look()
    await bench.spend("team30", here=False)
    await bench.spend("file", here=False)
    seen: set[str] = set()
    looks = 0
    while not {"team30", "file"} <= set(bench.receiver.heard):
        seen |= await bench.look()
        looks += 1
    everybody = {"file", "k1", *(f"team{number:02}" for number in range(TEAMS))}
    assert seen == everybody
    assert looks <= 2 * -(-len(everybody) // OTHERS)
    for _ in range(looks):
        await bench.look()
    assert sorted(bench.receiver.heard) == ["file", "team30"]


async def test_an_adjustment_is_found_too(bench: Bench) -> None:
    at = bench.clock.now()
    account = f"team:team39|d|{at:%Y-%m-%d}"
    await bench.store.books.adjust(
        Adjustment("a1", "team39", "flare", f"{at:%Y-%m-%d}", 9, (account,), "why", "who", at)
    )
    for _ in range(-(-(TEAMS + 2) // OTHERS)):
        await bench.look()
    assert bench.receiver.heard == ["team39"]


async def test_who_is_gone_or_may_not_spend_is_not_looked_at(bench: Bench) -> None:
    await bench.store.directory.update_team(Team("team31", limits=BUDGET, disabled=True))
    await bench.store.directory.update_team(Team("team32"))
    for team in ("team31", "team32", "gone"):
        await bench.spend(team)
    assert not {"team31", "team32", "gone"} & await bench.look()


async def test_a_look_that_broke_off_passes_nobody_by(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.look()
    await bench.spend("team30")
    with monkeypatch.context() as patch:

        async def away(lines: Sequence[Line]) -> list[Balance]:
            raise LedgerUnavailable("It is away.")

        patch.setattr(bench.store.ledger, "balances", away)
        with pytest.raises(LedgerUnavailable):
            await bench.watch.look()
    assert {"team30", "file", "team00"} <= await bench.look()
    assert bench.receiver.heard == ["team30"]


@pytest.mark.parametrize("webhook", [False, True])
async def test_a_claim_that_the_books_did_not_answer_is_made_at_the_next_look(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    webhook: bool,
) -> None:
    await bench.look()
    await bench.spend("team30")
    claim_notice = bench.store.upkeep.claim_notice
    with monkeypatch.context() as patch:

        async def away(account: str, notice: str, at: datetime, seconds: float) -> bool:
            if notice.endswith("webhook") == webhook:
                raise LedgerUnavailable("It is away.")
            return await claim_notice(account, notice, at, seconds)

        patch.setattr(bench.store.upkeep, "claim_notice", away)
        with pytest.raises(LedgerUnavailable):
            await bench.watch.look()
    await bench.look()
    assert bench.receiver.heard == ["team30"]
    assert [one.message for one in caplog.records] == ["a budget is nearly used up"]


async def test_a_message_that_was_not_taken_is_tried_again_without_a_call(bench: Bench) -> None:
    bench.receiver.away = True
    for team in ("team30", "team31"):
        await bench.spend(team)
    assert {"team30", "team31"} <= await bench.look()
    bench.receiver.away = False
    bench.clock.advance(LEASE_SECONDS - 1)
    # One may have been tried, and waits for the end of its claim; the other has not.
    assert {"team30", "team31"} <= await bench.look()
    assert len(bench.receiver.heard) == 1
    bench.clock.advance(1)
    assert len({"team30", "team31"} & await bench.look()) == 1
    assert sorted(bench.receiver.heard) == ["team30", "team31"]
    await bench.look()
    assert sorted(bench.receiver.heard) == ["team30", "team31"]


async def test_a_round_that_begins_while_a_page_is_read_begins_with_the_first(bench: Bench) -> None:
    owners = Owners(bench.store.directory, lambda: bench.declared)
    for _ in range(2):
        await owners.next(AT_ONCE)
    page = asyncio.create_task(owners.next(AT_ONCE))
    await asyncio.sleep(0)
    owners.begin_anew()
    assert len(await page) == AT_ONCE
    found = []
    while some := await owners.next(AT_ONCE):
        found += [team.id if key is None else key.id for team, key in some]
    assert found == ["file", *(f"team{number:02}" for number in range(TEAMS)), "k1"]


async def test_spenders_are_those_whose_hold_cost_something() -> None:
    bench = Bench()
    accounts = {
        "free": voided("free"),
        "paid": settled("paid", 3),
        "lost": expired("lost"),
    }
    for rid, settlement in accounts.items():
        await bench.ledger.reserve(claim(rid, team=rid))
        for _ in range(2):
            await bench.ledger.settle(settlement)
    taken = bench.spenders.take()
    found = {owner for some in taken for owner in owners_of(some)}
    assert found == {(Scope.KEY, "k1"), (Scope.TEAM, "paid"), (Scope.TEAM, "lost")}
    assert bench.spenders.take() == set()
    bench.spenders.give_back(taken)
    assert bench.spenders.take() == taken


async def test_a_settlement_whose_answer_was_lost_is_heard_when_it_is_repeated() -> None:
    bench = Bench()
    await bench.ledger.reserve(claim("r1", team="paid"))
    await bench.store.ledger.settle(settled("r1", 3))  # booked, and nobody here was told
    await bench.ledger.settle(settled("r1", 3))
    [accounts] = bench.spenders.take()
    assert (Scope.TEAM, "paid") in owners_of(accounts)


def test_an_account_names_its_owner_and_users_are_nobody() -> None:
    named = owners_of(["team:a|b:c|t|all", "key:k1|w|2026-W47", "user:a/u_1|d|2026-11-22"])
    assert named == {(Scope.TEAM, "a|b:c"), (Scope.KEY, "k1")}


def test_accounts_of_a_newer_release_break_no_look() -> None:
    assert owners_of(["project:p1|t|all", "team:a|t|all"]) == {(Scope.TEAM, "a")}
