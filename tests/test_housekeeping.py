"""The chores, on a clock that the test moves: who is dead, who only seems to be, and alarms."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import pytest

from gateway.domain.books import Hold
from gateway.domain.errors import LedgerUnavailable
from gateway.domain.ledger import Claim, Entry, State
from gateway.domain.owned import Anchor, Owned, OwnedKind
from gateway.domain.transition import ignore_conflict
from gateway.housekeeping import Housekeeping, Pace
from gateway.ports import Store
from gateway.stores.memory_ledger import MemoryStore
from tests.clock import StillClock
from tests.contract.stores import BACKENDS, LEASE, claim, settled
from tests.valkey import eventually

PACE = Pace()


@dataclass
class House:
    """One store, one clock, and as many processes as the test wants."""

    clock: StillClock = field(default_factory=StillClock)
    store: Store = field(default_factory=MemoryStore)
    told: list[float] = field(default_factory=list)
    expired: list[Entry] = field(default_factory=list)
    recovered: int = 0

    def process(
        self, worker: str, *, keep: timedelta | None = None, pace: Pace = PACE
    ) -> Housekeeping:
        async def recover() -> None:
            self.recovered += 1

        return Housekeeping(
            store=self.store,
            recover=recover,
            report=self.told.append,
            expired=self.expired.append,
            clock=self.clock,
            worker=worker,
            keep=keep,
            pace=pace,
        )

    async def reserve(self, rid: str, worker: str) -> None:
        one: Claim = claim(rid, at=self.clock.now(), worker=worker)
        await self.store.ledger.reserve(one)

    async def beat(self, seconds: float, *processes: Housekeeping) -> None:
        """Time passes, with beats as they come."""
        for _ in range(round(seconds / PACE.beat)):
            self.clock.advance(PACE.beat)
            for process in processes:
                await process.beat()

    async def state(self, rid: str) -> State:
        hold = await self.store.books.find(rid)
        assert hold is not None
        return hold.state


@pytest.fixture
def house() -> House:
    return House()


@pytest.fixture(params=BACKENDS)
async def any_house(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[House]:
    """With each store there is."""
    store = BACKENDS[request.param](tmp_path, ignore_conflict)
    yield House(store=store)
    await store.aclose()


async def no_beat(process: Housekeeping, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """One beat comes when the database is away."""

    async def refuse(*_: object) -> None:
        raise LedgerUnavailable("The ledger is away.")

    with monkeypatch.context() as patch:
        patch.setattr(house.store.upkeep, "beat", refuse)
        with pytest.raises(LedgerUnavailable):
            await process.beat()


async def test_the_holds_of_a_dead_worker_end_before_their_lease(any_house: House) -> None:
    house = any_house
    living, dying = house.process("living"), house.process("dying")
    await house.beat(40, living, dying)
    await house.reserve("its", "dying")
    await house.reserve("mine", "living")
    await house.reserve("nobody's", "never beat")
    await house.beat(15, living)
    await living.sweep()
    assert await house.state("its") is State.HELD, "silent for 15 s, not longer"
    await house.beat(5, living)
    await living.sweep()
    assert await house.state("its") is State.EXPIRED
    assert await house.state("mine") is State.HELD
    assert await house.state("nobody's") is State.HELD
    # Its late truth corrects it.
    entry = await house.store.ledger.settle(settled("its", 3))
    assert (entry.state, entry.cost, entry.applied) == (State.POSTED, 3, True)
    house.clock.advance(661)
    await living.sweep()
    assert await house.state("mine") is await house.state("nobody's") is State.EXPIRED
    assert await house.store.books.audit() == []


async def test_who_has_just_begun_calls_nobody_dead(house: House) -> None:
    dying = house.process("dying")
    await dying.beat()
    await house.reserve("its", "dying")
    house.clock.advance(100)
    fresh = house.process("fresh")
    await fresh.sweep()
    await fresh.beat()
    await house.beat(25, fresh)
    await fresh.sweep()
    assert await house.state("its") is State.HELD, "29 s are not 30"
    await house.beat(5, fresh)
    await fresh.sweep()
    assert await house.state("its") is State.EXPIRED


@pytest.mark.parametrize("how", ["away", "frozen"])
async def test_behind_an_outage_nobody_is_dead(
    house: House, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were silent while the database was away, or while the machine stood still."""
    one, other = house.process("one"), house.process("other")
    await house.beat(60, one, other)
    await house.reserve("its", "other")
    if how == "away":
        await no_beat(one, house, monkeypatch)
    house.clock.advance(60)
    await one.sweep()
    await one.beat()
    await one.sweep()
    assert await house.state("its") is State.HELD
    await house.beat(25, one, other)
    await one.sweep()
    assert await house.state("its") is State.HELD


async def test_a_failed_beat_breaks_the_series_even_when_it_is_short(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = house.process("one"), house.process("other")
    await house.beat(60, one, other)
    await house.reserve("its", "other")
    await no_beat(one, house, monkeypatch)
    await house.beat(30, one)
    await one.sweep()
    assert await house.state("its") is State.HELD
    await house.beat(10, one)
    await one.sweep()
    assert await house.state("its") is State.EXPIRED


@pytest.mark.parametrize("seconds", [60, -60])
@pytest.mark.parametrize("seen", ["by the beat", "by the sweep"])
async def test_a_clock_that_jumps_kills_nobody(house: House, seconds: float, seen: str) -> None:
    one, other = house.process("one"), house.process("other")
    await house.beat(60, one, other)
    await house.reserve("its", "other")
    house.clock._now += timedelta(seconds=seconds)
    if seen == "by the beat":
        await one.beat()
    await one.sweep()
    assert await house.state("its") is State.HELD


async def test_what_is_known_is_posted_before_the_sweep(house: House) -> None:
    order: list[str] = []

    async def recover() -> None:
        order.append("recover")
        await house.store.ledger.settle(settled("its", 4))

    chores = Housekeeping(
        store=house.store, recover=recover, report=house.told.append, clock=house.clock, worker="w"
    )
    await house.reserve("its", "dead")
    house.clock.advance(700)
    await chores.sweep()
    assert order == ["recover"]
    assert await house.state("its") is State.POSTED


async def test_the_sweep_goes_on_until_nothing_is_left(house: House) -> None:
    for number in range(250):
        await house.reserve(f"r{number}", "dead")
    house.clock.advance(661)
    await house.process("one").sweep()
    assert await house.store.ledger.open_holds() == 0
    assert len({entry.rid for entry in house.expired if entry.applied and entry.accounts}) == 250


async def test_closed_holds_are_forgotten_when_they_are_old(any_house: House) -> None:
    house = any_house
    for rid in ("old", "new"):
        await house.reserve(rid, "w")
        await house.store.ledger.settle(settled(rid, 1))
        house.clock.advance(3 * 86_400)
    await house.process("w").forget()
    assert await house.store.books.find("old") is not None, "for ever"
    await house.process("w", keep=timedelta(days=4)).forget()
    assert await house.store.books.find("old") is None
    assert await house.store.books.find("new") is not None
    assert await house.store.books.audit() == []


async def test_a_hold_that_no_sweep_ends_is_an_alarm(
    house: House, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    chores = house.process("w")
    await chores.sweep()
    await house.reserve("its", "w")
    house.clock.advance(10)
    await chores.sweep()
    assert house.told == [0.0, 10.0]

    async def nothing(*_: object, **__: object) -> list[object]:
        return []

    monkeypatch.setattr(house.store.ledger, "sweep", nothing)
    house.clock.advance(650 + 60)
    await chores.sweep()
    assert "outlived" not in caplog.text
    house.clock.advance(1)
    await chores.sweep()
    assert house.told == [0.0, 10.0, 720.0, 721.0]
    [record] = [one for one in caplog.records if "outlived its lease" in one.message]
    assert (record.levelname, record.request_id) == ("ERROR", "its")  # type: ignore[attr-defined]


async def test_no_chore_stops_for_ever_and_none_waits_for_another(
    house: House, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    counts = {"beat": 0, "sweep": 0}

    async def beat(*_: object) -> None:
        counts["beat"] += 1
        if counts["beat"] == 1:
            raise LedgerUnavailable("The ledger is away.")
        if counts["beat"] == 2:
            raise ZeroDivisionError

    async def stuck() -> None:
        counts["sweep"] += 1
        await asyncio.Event().wait()

    monkeypatch.setattr(house.store.upkeep, "beat", beat)
    chores = Housekeeping(
        store=house.store,
        recover=stuck,
        report=house.told.append,
        clock=house.clock,
        worker="w",
        pace=Pace(beat=0.001, sweep=0.001),
    )
    running = asyncio.create_task(chores.run())
    await eventually(lambda: counts["beat"] > 3)
    assert counts["sweep"] == 1
    running.cancel()
    await asyncio.wait({running})
    assert "the ledger is away, and a chore waits" in caplog.text
    assert "a chore failed" in caplog.text


class Skewed(MemoryStore):
    """A database whose clock is another."""

    skew = 0.0

    @property
    def clock_skew_seconds(self) -> float:
        return self.skew


async def test_clocks_that_differ_are_an_alarm_and_only_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Skewed()
    process = House(store=store).process("w1")
    alarms = []
    for store.skew in (0.5, -2.5, -2.6, 1.0, 3.0):
        caplog.clear()
        await process.beat()
        alarms.append(len(caplog.records))
    assert alarms == [0, 1, 0, 0, 1]


async def test_a_lease_ends_by_the_clock_of_the_database(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process is an hour ahead: a call that has just begun is not overdue."""
    store = Skewed()
    store.skew = 3600.0
    house = House(store=store)
    await house.reserve("r1", "w1")
    found = await store.books.oldest_hold()
    assert found is not None
    by_its_clock = replace(found, lease_ends=found.lease_ends - timedelta(hours=1))

    async def oldest() -> Hold:
        return by_its_clock

    async def nothing(*_: object, **__: object) -> list[object]:
        return []

    monkeypatch.setattr(store.books, "oldest_hold", oldest)
    monkeypatch.setattr(store.ledger, "sweep", nothing)
    process = house.process("w1")
    for seconds, alarms in ((1, 0), (LEASE.total_seconds() + 60, 1)):
        house.clock.advance(seconds)
        await process.sweep()
        assert caplog.text.count("outlived its lease") == alarms


async def test_a_disk_that_hangs_keeps_no_hold_standing(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    chores = Housekeeping(
        store=house.store,
        recover=never,
        report=house.told.append,
        clock=house.clock,
        worker="w1",
        pace=Pace(recover=0.01),
    )
    await house.reserve("r1", "w1")
    house.clock.advance(LEASE.total_seconds() + 1)
    await chores.sweep()
    assert await house.state("r1") is State.EXPIRED
    assert "cannot be read" in caplog.text


async def test_ids_at_upstreams_that_have_expired_are_deleted(any_house: House) -> None:
    now = any_house.clock.now()
    ownership = any_house.store.ownership
    owned = Owned("resp_1", OwnedKind.RESPONSE, "growth", "k1", Anchor("openai", ""), now)
    await ownership.record(
        [
            replace(owned, expires=now + timedelta(seconds=9)),
            replace(owned, id="file-1", kind=OwnedKind.FILE),
        ]
    )
    chores = asyncio.create_task(any_house.process("w1", pace=replace(PACE, forget=0.01)).run())
    any_house.clock.advance(10)

    async def gone() -> bool:
        # Also from before it expired, its row is gone.
        found = await ownership.find("growth", ["resp_1", "file-1"], now)
        return list(found) == ["file-1"]

    try:
        await eventually(gone)
    finally:
        chores.cancel()
