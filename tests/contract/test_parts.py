"""What every store says of a call that another model drew for: one hold, one sum, two models on the
bill. The stores are those of ``BACKENDS``."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from gateway.domain.books import Correction
from gateway.domain.call import Operation, Usage
from gateway.domain.ledger import (
    Balance,
    Claim,
    Entry,
    Part,
    Replay,
    Settlement,
    UsageRow,
    UserUsage,
)
from gateway.ports import NotKnown, Store
from tests.contract.stores import (
    ACCOUNTS,
    NOON,
    P,
    V,
    claim,
    elsewhere,
    expired,
    settled,
    voided,
    written,
)

TEXT, FLARE, DAY = "text", "flare", "2026-11-22"
DRAWN = Usage(text_in=1, image_in=3, image_out=7)


def asking(rid: str, team: str = "growth", upstream: str = "openai") -> Claim:
    """A response that may draw four pictures."""
    made = claim(rid, 100, model=TEXT, team=team)
    return replace(made, operation=Operation.RESPONSE, images=4, upstream=upstream)


def drew(rid: str, cost: int, part: int, *flags: str, images: int = 1) -> Settlement:
    """It cost ``cost``, of which ``part`` is that of the pictures."""
    return replace(
        settled(rid, cost, *flags, images=images), drawn=Part(FLARE, images, part, DRAWN)
    )


def corrected(rid: str, cost: int, name: str = "c1", images: int = 0) -> Correction:
    return Correction(name, rid, cost, "the invoice says so", "ann", NOON, images)


def text_row(**more: int) -> UsageRow:
    return UsageRow(
        DAY, "growth", "k1", TEXT, **{"requests": 1, "text_in": 1, "text_out": 5, **more}
    )


def flare_row(**more: int) -> UsageRow:
    counts = {"images": 1, "text_in": 1, "image_in": 3, "image_out": 7, **more}
    return UsageRow(DAY, "growth", "k1", FLARE, **counts)


async def used(store: Store) -> list[UsageRow]:
    """In the order of their models, the text's last; the books add up besides."""
    assert await store.books.audit() == []
    return await store.ledger.usage()


async def test_each_model_has_what_it_is_billed_for(store: Store) -> None:
    await store.ledger.reserve(asking("r"))
    entry = await store.ledger.settle(drew("r", 17, 12))
    assert entry == Entry("r", P, 100, 17, True, (Balance(17, 0),) * 4, accounts=ACCOUNTS)
    assert await used(store) == [flare_row(cost=12), text_row(cost=5)]
    hold = await store.books.find("r")
    assert hold is not None
    assert (hold.model, hold.cost, hold.drawn) == (TEXT, 17, Part(FLARE, 1, 12))
    held, posted = await store.books.journal("r")
    assert (held.kind, posted.kind, posted.posted) == ("H", "P", 17)
    assert posted.detail["drawn"] == {
        "model": FLARE,
        "images": 1,
        "cost": 12,
        "usage": {
            "text_in": 1,
            "image_in": 3,
            "cached_text_in": 0,
            "cached_image_in": 0,
            "text_out": 0,
            "image_out": 7,
            "svg": None,
        },
    }
    again = await store.ledger.settle(drew("r", 17, 3))
    assert not again.applied
    assert await used(store) == [flare_row(cost=12), text_row(cost=5)]


async def test_where_its_parts_went(store: Store) -> None:
    """By upstream: what the pictures of both doors cost is found under their model."""
    for rid, upstream, part in (("r1", "openai", 12), ("r2", "openai", 2), ("r3", "azure", 17)):
        await store.ledger.reserve(asking(rid, upstream=upstream))
        await store.ledger.settle(drew(rid, 17, part, images=2))
    await store.ledger.reserve(claim("picture"))
    await store.ledger.settle(settled("picture", 9))
    await store.ledger.reserve(asking("lost"))
    await store.ledger.settle(expired("lost"))
    await store.ledger.reserve(asking("void"))
    await store.ledger.settle(voided("void"))
    await store.ledger.reserve(asking("open"))
    found = {
        (upstream, row.model): (row.requests, row.images, row.cost)
        for upstream, row in await store.books.routed(DAY)
    }
    assert found == {
        ("openai", TEXT): (3, 0, 5 + 15 + 100),
        ("openai", FLARE): (1, 5, 9 + 14),
        ("azure", TEXT): (1, 0, 0),
        ("azure", FLARE): (0, 2, 17),
    }
    assert sum(cost for _, _, cost in found.values()) == sum(one.cost for one in await used(store))


@pytest.mark.parametrize(
    ("cost", "part"),
    [(34, 24), (18, 12), (1, 0), (0, 0), (2**52, 12 * 2**52 // 17)],
)
async def test_a_correction_splits_as_it_was_booked(store: Store, cost: int, part: int) -> None:
    """A fraction of a nano-dollar goes to the model that was asked for."""
    await store.ledger.reserve(asking("r"))
    await store.ledger.settle(drew("r", 17, 12, "over_bound"))
    entry = await store.books.correct(corrected("r", cost, images=3))
    assert entry == Entry("r", P, 100, cost, True, (Balance(cost, 0),) * 4, accounts=ACCOUNTS)
    assert await used(store) == [flare_row(cost=part), text_row(cost=cost - part)]
    hold = await store.books.find("r")
    assert hold is not None
    assert hold.drawn == Part(FLARE, 1, part)
    assert (await store.books.journal("r"))[-1].detail["drawn"] == {"model": FLARE, "cost": part}
    await store.books.correct(corrected("r", 3, "c2"))
    assert sum(row.cost for row in await used(store)) == 3


@pytest.mark.parametrize("first", [expired("r"), settled("r", 100, "no_usage", images=0)])
async def test_what_nobody_measured_stays_with_the_model_that_was_asked(
    store: Store, first: Settlement
) -> None:
    await store.ledger.reserve(asking("r"))
    await store.ledger.settle(first)
    (row,) = await used(store)
    assert (row.model, row.cost) == (TEXT, 100)
    await store.books.correct(corrected("r", 30))
    (row,) = await used(store)
    assert (row.model, row.cost, row.flagged, row.unresolved) == (TEXT, 30, 0, 0)
    hold = await store.books.find("r")
    assert hold is not None
    assert hold.drawn is None


async def test_pictures_without_a_sum_of_their_own(store: Store) -> None:
    """They were seen: they count with who drew them, the bound with the model that was asked."""
    await store.ledger.reserve(asking("r"))
    await store.ledger.settle(drew("r", 100, 0, "no_usage"))
    assert await used(store) == [flare_row(), text_row(cost=100, flagged=1)]


async def test_a_late_truth_splits_what_had_expired(store: Store) -> None:
    await store.ledger.reserve(asking("r"))
    await store.ledger.settle(replace(expired("r"), cost=100, drawn=Part(FLARE, 1, 50)))
    (row,) = await used(store)
    assert (row.model, row.cost, row.images, row.unresolved) == (TEXT, 100, 0, 1)
    assert (await store.ledger.settle(drew("r", 17, 12))).applied
    assert await used(store) == [flare_row(cost=12), text_row(cost=5)]


@pytest.mark.parametrize("cost", [0, 9])
async def test_a_call_that_was_given_back_has_no_part(store: Store, cost: int) -> None:
    await store.ledger.reserve(asking("r"))
    void = replace(voided("r"), cost=1, drawn=Part(FLARE, 1, 1))
    assert (await store.ledger.settle(void)).state is V
    assert await used(store) == []
    await store.books.correct(corrected("r", cost))
    assert [(row.model, row.cost) for row in await used(store)] == [(TEXT, cost)]


async def test_the_model_asked_for_may_be_another_one_in_the_end(store: Store) -> None:
    await store.ledger.reserve(asking("r"))
    await store.ledger.reroute(elsewhere("r", 200, model="words"))
    await store.ledger.settle(drew("r", 17, 12))
    found = [(row.model, row.cost, row.requests) for row in await used(store)]
    assert found == [(FLARE, 12, 0), ("words", 5, 1)]


async def test_a_model_may_draw_for_itself(store: Store) -> None:
    await store.ledger.reserve(replace(asking("r"), model=FLARE))
    await store.ledger.settle(drew("r", 17, 12))
    await store.books.correct(corrected("r", 34))
    (row,) = await used(store)
    assert (row.model, row.cost, row.requests, row.images) == (FLARE, 34, 1, 1)


async def test_users_have_the_whole_and_the_pictures_that_were_drawn(store: Store) -> None:
    for rid in ("r1", "r2", "quiet", "lost"):
        await store.ledger.reserve(replace(asking(rid), user="u_ann"))
    await store.ledger.settle(drew("r1", 17, 12, images=2))
    await store.ledger.settle(drew("r2", 3, 1))
    await store.ledger.settle(settled("quiet", 4, images=0))
    await store.ledger.settle(expired("lost"))
    assert await store.books.usage_by_user() == [UserUsage("growth", "u_ann", 4, 3, 124, 1)]
    rows = await used(store)
    assert sum(row.cost for row in rows) == 124
    assert sum(row.images for row in rows) == 3
    assert sum(row.requests for row in rows) == 4


async def test_the_days_remember_when_the_call_is_forgotten(store: Store) -> None:
    await store.ledger.reserve(asking("r"))
    await store.ledger.settle(drew("r", 17, 12))
    assert await store.upkeep.forget(NOON + timedelta(days=2)) == 1
    assert await used(store) == [flare_row(cost=12), text_row(cost=5)]
    with pytest.raises(NotKnown):
        await store.books.correct(corrected("r", 1))


async def test_several_at_once(store: Store) -> None:
    """As one transaction of the writer's takes them."""
    await asyncio.gather(*(store.ledger.reserve(asking(f"r{one}")) for one in range(5)))
    await asyncio.gather(*(store.ledger.settle(drew(f"r{one}", 17, 12)) for one in range(5)))
    found = [(row.model, row.cost, row.requests, row.images) for row in await used(store)]
    assert found == [(FLARE, 60, 0, 5), (TEXT, 25, 5, 0)]


async def test_pictures_from_a_kept_answer_count_with_who_drew_them(store: Store) -> None:
    hit = Replay("hit", "growth", "k1", TEXT, Operation.RESPONSE, 2, 17, NOON, draws=FLARE)
    await store.ledger.replay(hit)
    await written(store.ledger)
    assert await used(store) == [
        UsageRow(DAY, "growth", "k1", FLARE, images=2),
        UsageRow(DAY, "growth", "k1", TEXT, requests=1, cached_requests=1, avoided=17),
    ]


async def test_those_that_ask_for_a_look_say_whose_their_cost_is(store: Store) -> None:
    await store.ledger.reserve(asking("r"))
    await store.ledger.settle(drew("r", 117, 90, "over_bound"))
    (hold,) = await store.books.unresolved()
    assert hold.drawn == Part(FLARE, 1, 90)
