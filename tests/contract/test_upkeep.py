"""What every ``Upkeep`` promises. The stores are those of ``BACKENDS``."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from gateway.domain.books import Adjustment, Correction
from gateway.domain.ledger import Balance, Claimed, Held
from gateway.ports import NotKnown, Store, Upkeep
from tests.contract.stores import NOON, claim, expired, lines, settled, voided

DAY = timedelta(days=1)
SECOND = timedelta(seconds=1)
ACCOUNTS = tuple(line.account for line in lines())


# Workers


async def test_a_beat_never_goes_back(store: Store) -> None:
    await store.ledger.reserve(claim("r"))
    await store.upkeep.beat("w1", NOON + 5 * SECOND)
    await store.upkeep.beat("w1", NOON)
    assert await store.ledger.sweep(NOON, silent_before=NOON + 5 * SECOND) == []
    assert len(await store.ledger.sweep(NOON, silent_before=NOON + 6 * SECOND)) == 1


async def test_a_silent_worker_is_forgotten_after_a_day_unless_it_holds(store: Store) -> None:
    for worker, rid in (("idle", "a"), ("busy", "b"), ("late", "c")):
        await store.ledger.reserve(claim(rid, worker=worker))
        await store.upkeep.beat(worker, NOON + (SECOND if worker == "late" else 0 * SECOND))
    await store.ledger.settle(settled("a", 1))
    await store.upkeep.beat("w2", NOON + DAY + SECOND)
    # Who is forgotten has not beaten as far as anybody knows: its holds live by their lease.
    for worker, rid in (("idle", "d"), ("late", "e")):
        await store.ledger.reserve(claim(rid, worker=worker))
    swept = await store.ledger.sweep(NOON, silent_before=NOON + DAY)
    assert sorted(entry.rid for entry in swept) == ["b", "c", "e"]


# Forgetting


async def test_what_is_forgotten_still_adds_up(store: Store) -> None:
    for rid in ("posted", "voided", "held", "expired"):
        await store.ledger.reserve(claim(rid))
    await store.ledger.reserve(claim("young", at=NOON + DAY))
    await store.ledger.settle(settled("posted", 7))
    await store.ledger.settle(settled("young", 2))
    await store.ledger.settle(voided("voided"))
    await store.ledger.settle(expired("expired"))
    usage = await store.ledger.usage()
    balances = await store.ledger.balances(lines())
    unresolved = await store.ledger.unresolved()

    assert await store.upkeep.forget(NOON + SECOND) == 2
    for rid in ("posted", "voided"):
        assert await store.books.find(rid) is None
        assert await store.books.journal(rid) == []
    for rid in ("held", "expired", "young"):
        assert await store.books.find(rid) is not None
        assert await store.books.journal(rid) != []
    assert await store.ledger.usage() == usage
    assert await store.ledger.balances(lines()) == balances
    assert await store.ledger.unresolved() == unresolved
    assert await store.books.audit() == []
    assert await store.upkeep.forget(NOON + SECOND) == 0

    # Once they have ended they are forgotten as well.
    await store.ledger.settle(settled("held", 4))
    await store.books.correct(Correction("c", "expired", 5, "found", "ann", NOON + 30 * DAY))
    assert await store.upkeep.forget(NOON + 2 * DAY) == 3
    assert await store.ledger.balances(lines()) == [Balance(16, 0), Balance(18, 0)] * 2
    assert await store.books.audit() == []


async def test_what_may_be_wrong_waits_for_somebody(store: Store) -> None:
    for rid, *flags in (("a", "no_usage"), ("b", "soft"), ("c", "soft", "over_bound"), ("d",)):
        await store.ledger.reserve(claim(rid))
        await store.ledger.settle(settled(rid, 7, *flags))
    await store.ledger.reserve(claim("v"))
    await store.ledger.settle(replace(voided("v"), flags=("no_usage",)))
    assert await store.upkeep.forget(NOON + SECOND) == 3
    assert [hold.rid for hold in await store.books.unresolved()] == ["a", "c"]
    assert len(await store.books.journal("c")) == 2
    await store.books.correct(Correction("1", "a", 7, "so it is", "ann", NOON + DAY))
    await store.books.correct(Correction("2", "c", 5, "found", "ann", NOON + DAY))
    assert await store.upkeep.forget(NOON + SECOND) == 2
    assert await store.ledger.balances(lines()) == [Balance(26, 0)] * 4
    assert await store.books.audit() == []


async def test_only_what_was_reserved_before_is_forgotten(store: Store) -> None:
    await store.ledger.reserve(claim("r"))
    await store.ledger.settle(settled("r", 7))
    assert await store.upkeep.forget(NOON) == 0
    assert await store.upkeep.forget(NOON + timedelta(microseconds=1)) == 1
    # An earlier instant afterwards is harmless.
    await store.ledger.reserve(claim("s"))
    await store.ledger.settle(settled("s", 7))
    assert await store.upkeep.forget(NOON - DAY) == 0
    assert await store.upkeep.forget(NOON + timedelta(microseconds=1)) == 1


async def test_the_oldest_are_forgotten_first_in_batches(store: Store) -> None:
    for number in (3, 1, 4, 2, 5):
        await store.ledger.reserve(claim(f"r{number}", at=NOON + number * SECOND))
        await store.ledger.settle(settled(f"r{number}", number))
    assert await store.upkeep.forget(NOON + DAY, limit=2) == 2
    assert [await store.books.find(f"r{number}") is None for number in range(1, 6)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert await store.books.audit() == []
    assert [await store.upkeep.forget(NOON + DAY, limit=2) for _ in range(3)] == [2, 1, 0]
    assert await store.books.audit() == []
    assert await store.ledger.balances(lines()) == [Balance(15, 0)] * 4


async def test_the_record_of_an_idempotency_key_is_not_forgotten(store: Store) -> None:
    await store.ledger.reserve(claim("r", key="i"))
    await store.ledger.settle(settled("r", 7))
    await store.ledger.reserve(claim("moved", key="j"))
    await store.ledger.settle(voided("moved"))
    assert isinstance(await store.ledger.reserve(claim("s", key="j")), Held)
    assert await store.upkeep.forget(NOON + SECOND) == 1  # "moved" has given its key away
    assert isinstance(await store.ledger.reserve(claim("t", key="i")), Claimed)
    await store.ledger.sweep(NOON + DAY)
    assert await store.upkeep.forget(NOON + SECOND) == 0
    await store.ledger.sweep(NOON + DAY + SECOND)  # the lease of "s" is over too
    assert await store.upkeep.forget(NOON + SECOND) == 1
    assert await store.books.find("r") is None
    assert await store.books.audit() == []


async def test_corrections_and_adjustments_are_counted_once_afterwards(store: Store) -> None:
    for rid, cost in (("a", 7), ("b", 1)):
        await store.ledger.reserve(claim(rid))
        await store.ledger.settle(settled(rid, cost))
    await store.books.correct(Correction("c", "a", 4, "found", "ann", NOON))
    adjustment = Adjustment(
        "d", "growth", "flare", "2026-11-22", -2, ACCOUNTS, "drift", "ann", NOON
    )
    assert await store.books.adjust(adjustment)
    assert await store.upkeep.forget(NOON + DAY) == 2
    assert await store.ledger.balances(lines()) == [Balance(3, 0)] * 4
    assert await store.books.audit() == []
    # What belongs to no call stays, and so do the ids.
    assert len(await store.books.journal("d")) == 1
    assert await store.books.adjust(adjustment) is False


async def test_a_call_that_was_forgotten_is_not_known(store: Store) -> None:
    await store.ledger.reserve(claim("r"))
    await store.ledger.settle(settled("r", 7))
    await store.upkeep.forget(NOON + DAY)
    with pytest.raises(NotKnown):
        await store.ledger.settle(settled("r", 7))
    with pytest.raises(NotKnown, match="forgotten"):
        await store.books.correct(Correction("c", "r", 4, "found", "ann", NOON))
    assert not (await store.ledger.settle(expired("r"))).applied
    assert await store.ledger.balances(lines()) == [Balance(7, 0)] * 4


async def test_a_call_without_accounts_is_forgotten_too(store: Store) -> None:
    await store.ledger.reserve(claim("r", limits=()))
    await store.ledger.settle(settled("r", 7))
    assert await store.upkeep.forget(NOON + DAY) == 1
    assert [row.cost for row in await store.ledger.usage()] == [7]
    assert await store.books.audit() == []


async def test_forgetting_while_money_moves(store: Store) -> None:
    await asyncio.gather(*(store.ledger.reserve(claim(f"r{n}")) for n in range(30)))
    await asyncio.gather(
        *(store.ledger.settle(settled(f"r{n}", 3)) for n in range(30)),
        *(store.upkeep.forget(NOON + DAY, limit=7) for _ in range(4)),
        *(store.ledger.reserve(claim(f"s{n}")) for n in range(10)),
    )
    while await store.upkeep.forget(NOON + DAY, limit=7):
        assert await store.books.audit() == []
    assert await store.ledger.balances(lines()) == [Balance(90, 100)] * 4
    assert await store.ledger.open_holds() == 10


async def test_a_running_call_survives_being_old(store: Store) -> None:
    await store.ledger.reserve(claim("r"))
    assert await store.upkeep.forget(NOON + 400 * DAY) == 0
    entry = await store.ledger.settle(settled("r", 3))
    assert (entry.applied, entry.cost) == (True, 3)


# Notices


async def test_one_of_many_says_it(upkeep: Upkeep) -> None:
    said = await asyncio.gather(
        *(upkeep.claim_notice("team:growth|m|2026-11", "budget:80", NOON, 60) for _ in range(20))
    )
    assert sum(said) == 1


async def test_a_notice_that_was_not_sent_is_claimed_again(upkeep: Upkeep) -> None:
    assert await upkeep.claim_notice("a", "m", NOON, 60)
    assert not await upkeep.claim_notice("a", "m", NOON + 59 * SECOND, 60)
    later = NOON + 61 * SECOND
    said = await asyncio.gather(*(upkeep.claim_notice("a", "m", later, 60) for _ in range(20)))
    assert sum(said) == 1
    # The second claim has a lease of its own.
    assert not await upkeep.claim_notice("a", "m", later + 59 * SECOND, 60)


async def test_a_notice_that_was_sent_is_never_claimed_again(upkeep: Upkeep) -> None:
    assert await upkeep.claim_notice("a", "m", NOON, 60)
    await upkeep.notice_sent("a", "m", NOON + SECOND)
    await upkeep.notice_sent("a", "m", NOON + 2 * SECOND)
    assert not await upkeep.claim_notice("a", "m", NOON + DAY, 60)
    # Another mark, and another account, are other notices.
    assert await upkeep.claim_notice("a", "n", NOON, 60)
    assert await upkeep.claim_notice("b", "m", NOON, 60)


async def test_a_notice_that_nobody_claimed_may_be_sent(upkeep: Upkeep) -> None:
    await upkeep.notice_sent("a", "m", NOON)
    assert not await upkeep.claim_notice("a", "m", NOON + DAY, 60)


# Factors


async def test_a_factor_is_raised_and_never_lowered(upkeep: Upkeep) -> None:
    assert await upkeep.factors() == {}
    assert await upkeep.raise_factor("openai", "flare", 1_200_000) == 1_200_000
    assert await upkeep.raise_factor("openai", "flare", 1_100_000) == 1_200_000
    assert await upkeep.raise_factor("other", "flare", 1_050_000) == 1_050_000
    assert await upkeep.raise_factor("openai", "flare", 1_300_000) == 1_300_000
    assert await upkeep.factors() == {
        ("openai", "flare"): 1_300_000,
        ("other", "flare"): 1_050_000,
    }


async def test_factors_raised_at_once(upkeep: Upkeep) -> None:
    wanted = [1_000_000 + 1_000 * ((7 * number) % 20) for number in range(20)]
    answers = await asyncio.gather(*(upkeep.raise_factor("openai", "flare", one) for one in wanted))
    assert all(answer >= one for answer, one in zip(answers, wanted, strict=True))
    assert await upkeep.factors() == {("openai", "flare"): max(wanted)}


async def test_a_factor_that_is_reset_starts_anew(upkeep: Upkeep) -> None:
    await upkeep.raise_factor("openai", "flare", 1_200_000)
    assert await upkeep.reset_factor("openai", "flare") is True
    assert await upkeep.reset_factor("openai", "flare") is False
    assert await upkeep.factors() == {}
    assert await upkeep.raise_factor("openai", "flare", 1_100_000) == 1_100_000
