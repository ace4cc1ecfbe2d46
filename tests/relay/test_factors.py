"""A call that cost more than its bound raises the bounds to come: here at once, elsewhere soon."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

import pytest

from gateway.domain.errors import LedgerUnavailable
from gateway.domain.route import Catalogue, Model, Target
from gateway.relay import factors as module
from gateway.relay.factors import MAX_FACTOR, Factors
from gateway.relay.flights import Flights
from tests.valkey import eventually

ONE = 1_000_000
FLARE = ("openai", "flare")


@dataclass
class Shelf:
    """The store as its port describes it; it can be away, and slow."""

    kept: dict[tuple[str, str], int] = field(default_factory=dict)
    away: bool = False
    slow: asyncio.Event | None = None
    writes: int = 0

    async def factors(self) -> dict[tuple[str, str], int]:
        found = dict(self.kept)
        await self._answer()
        return found

    async def raise_factor(self, upstream: str, model: str, millionths: int) -> int:
        self.writes += 1
        await self._answer()
        self.kept[upstream, model] = max(millionths, self.kept.get((upstream, model), 0))
        return self.kept[upstream, model]

    async def _answer(self) -> None:
        if self.slow is not None:
            await self.slow.wait()
        if self.away:
            raise LedgerUnavailable("The ledger does not answer.")

    async def reset_factor(self, upstream: str, model: str) -> bool:
        return self.kept.pop((upstream, model), None) is not None

    async def beat(self, worker: str, now: datetime) -> None:
        raise NotImplementedError

    async def forget(self, before: datetime, limit: int = 1000) -> int:
        raise NotImplementedError

    async def claim_notice(
        self, account: str, mark: str, now: datetime, lease_seconds: float
    ) -> bool:
        raise NotImplementedError

    async def notice_sent(self, account: str, mark: str, now: datetime) -> None:
        raise NotImplementedError


@dataclass
class Bench:
    shelf: Shelf = field(default_factory=Shelf)
    flights: Flights = field(default_factory=Flights)
    ratios: list[tuple[str, float]] = field(default_factory=list)

    def factors(self) -> Factors:
        models = {
            "flare": Model("flare", Target("openai", "flare")),
            "art": Model("art", Target("openai", "flare")),
            "local": Model("local", Target("home", "sd")),
        }
        catalogue = Catalogue(models, Model("*", Target("openai", "*")))
        return Factors(self.shelf, self.flights, catalogue, lambda *told: self.ratios.append(told))

    async def settle(self) -> None:
        await self.flights.drain(5)


async def test_within_the_bound_nothing_changes_but_the_ratio_is_told() -> None:
    bench = Bench()
    factors = bench.factors()
    factors.observe(*FLARE, 1000, 1000)
    factors.observe(*FLARE, 1000, 250)
    factors.observe("openai", "brand-new", 1000, 500)
    await bench.settle()
    assert bench.ratios == [("flare", 1.0), ("flare", 0.25), ("other", 0.5)]
    assert (factors.of(*FLARE), bench.shelf.writes) == (ONE, 0)


@pytest.mark.parametrize(
    ("base", "actual", "millionths"),
    [
        (1000, 1500, 1_500_000),
        (1000, 1001, 1_001_000),
        (3, 4, 1_333_334),
        (1, 10, MAX_FACTOR),
        (1, 10**15, MAX_FACTOR),
    ],
)
async def test_over_it_the_factor_is_what_was_seen_rounded_up_to_a_cap(
    base: int, actual: int, millionths: int, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()
    factors = bench.factors()
    factors.observe(*FLARE, base, actual)
    assert factors.of(*FLARE) == millionths  # At once: nothing was waited for.
    assert factors.of("home", "flare") == ONE
    await bench.settle()
    assert bench.shelf.kept == {FLARE: millionths}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


async def test_it_is_only_raised_by_what_exceeds_it() -> None:
    bench = Bench(Shelf({FLARE: 2 * ONE}))
    factors = bench.factors()
    await factors.refresh()
    for actual in (1500, 2000, 2001, 1700):
        factors.observe(*FLARE, 1000, actual)
    await bench.settle()
    assert (factors.of(*FLARE), bench.shelf.writes) == (2_001_000, 1)


async def test_a_bound_of_nothing_says_nothing() -> None:
    bench = Bench()
    factors = bench.factors()
    factors.observe(*FLARE, 0, 500)
    assert (bench.ratios, factors.of(*FLARE)) == ([], ONE)


async def test_another_process_learns_of_it_and_a_person_takes_it_back() -> None:
    bench = Bench()
    mine, theirs = bench.factors(), bench.factors()
    mine.observe(*FLARE, 1000, 1500)
    await bench.settle()
    assert theirs.of(*FLARE) == ONE
    await theirs.refresh()
    assert theirs.of(*FLARE) == 1_500_000
    await bench.shelf.reset_factor(*FLARE)
    await mine.refresh()
    await theirs.refresh()
    assert (mine.of(*FLARE), theirs.of(*FLARE)) == (ONE, ONE)


async def test_a_higher_factor_of_another_process_stands() -> None:
    bench = Bench(Shelf({FLARE: 3 * ONE}))
    factors = bench.factors()
    factors.observe(*FLARE, 1000, 1500)
    assert factors.of(*FLARE) == 1_500_000
    await bench.settle()
    assert factors.of(*FLARE) == 3 * ONE


async def test_while_the_store_is_away_it_is_known_here_and_written_later() -> None:
    bench = Bench(Shelf(away=True))
    factors = bench.factors()
    await factors.refresh()
    factors.observe(*FLARE, 1000, 1500)
    await bench.settle()
    await factors.refresh()
    assert (factors.of(*FLARE), bench.shelf.kept) == (1_500_000, {})
    bench.shelf.away = False
    await factors.refresh()
    assert (factors.of(*FLARE), bench.shelf.kept) == (1_500_000, {FLARE: 1_500_000})


async def test_a_slow_read_does_not_undo_a_later_write() -> None:
    bench = Bench(Shelf(slow=asyncio.Event()))
    factors = bench.factors()
    reading = asyncio.create_task(factors.refresh())
    await asyncio.sleep(0)
    factors.observe(*FLARE, 1000, 1500)
    factors.observe(*FLARE, 1000, 1600)
    assert bench.shelf.slow is not None
    bench.shelf.slow.set()
    await reading
    await bench.settle()
    assert factors.of(*FLARE) == 1_600_000
    assert bench.shelf.kept == {FLARE: 1_600_000}


async def test_a_factor_raised_while_it_is_written_is_written_again() -> None:
    bench = Bench(Shelf(slow=asyncio.Event()))
    factors = bench.factors()
    factors.observe(*FLARE, 1000, 1500)
    await eventually(lambda: bench.shelf.writes == 1)
    factors.observe(*FLARE, 1000, 1600)
    assert bench.shelf.slow is not None
    bench.shelf.slow.set()
    await bench.settle()
    assert (bench.shelf.kept, factors.of(*FLARE)) == ({FLARE: 1_600_000}, 1_600_000)


@pytest.mark.parametrize(
    ("kept", "other"),
    [
        ({}, ONE),
        ({("openai", "a"): 2 * ONE, ("openai", "b"): 3 * ONE, ("gone", "sd"): 9 * ONE}, 3 * ONE),
    ],
)
async def test_labels_are_those_of_the_configuration(
    kept: Mapping[tuple[str, str], int], other: int
) -> None:
    bench = Bench(Shelf({FLARE: 1_200_000, **kept}))
    factors = bench.factors()
    await factors.refresh()
    assert factors.by_label() == {
        FLARE: 1_200_000,
        ("home", "sd"): ONE,
        ("openai", "other"): other,
    }


async def test_it_stays_fresh_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REREAD_SECONDS", 0)
    bench = Bench(Shelf(away=True))
    factors = bench.factors()
    reads = 0
    refresh = factors.refresh

    async def watched() -> None:
        nonlocal reads
        reads += 1
        if reads == 1:
            raise RuntimeError("a fault of our own")
        await refresh()

    monkeypatch.setattr(factors, "refresh", watched)
    running = asyncio.create_task(factors.stay_fresh())
    await eventually(lambda: reads >= 3)
    bench.shelf.kept[FLARE], bench.shelf.away = 1_500_000, False
    await eventually(lambda: factors.of(*FLARE) == 1_500_000)
    running.cancel()
    await asyncio.wait({running})
