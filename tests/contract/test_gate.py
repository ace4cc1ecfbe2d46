"""What every gate promises: one process's own, and the one that all replicas share."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.domain.quota import Demand, Grant, Limit, Refusal, Scope, Unit, Window
from gateway.ports import Gate
from gateway.stores.memory import MemoryGate, interval_us
from gateway.stores.redis_gate import RedisGate
from gateway.stores.redis_link import connect
from tests.clock import StillClock
from tests.redis_servers import Cluster, Sentinelled
from tests.valkey import Valkey

ONE = Demand(requests=1, images=1, slots=1)


@dataclass(frozen=True)
class Bench:
    gate: Gate
    advance: Callable[[float], None]


@pytest.fixture(params=["memory", "redis", "cluster", "sentinels"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    clock = StillClock()
    if request.param == "memory":
        yield Bench(MemoryGate(clock), clock.advance)
        return
    server: Valkey | Cluster | Sentinelled = request.getfixturevalue(
        "valkey" if request.param == "redis" else request.param
    )
    if isinstance(server, Cluster):
        server.empty()
    client = connect(server.url, timeout=5.0)
    if not isinstance(server, Cluster):
        await client.execute_command("FLUSHALL")
    gate = RedisGate(client, clock, deadline_seconds=5.0, offset=lambda: clock.monotonic() - 1000)
    yield Bench(gate, clock.advance)
    # Nothing here may have been answered by the stand-in.
    assert not gate.degraded
    await gate.aclose()


def rate(
    amount: int | None, unit: Unit = Unit.REQUESTS, scope: Scope = Scope.TEAM, owner: str = "t"
) -> Limit:
    return Limit(scope, owner, unit, Window.MINUTE, amount)


def slots(amount: int | None, scope: Scope = Scope.TEAM, owner: str = "t") -> Limit:
    return Limit(scope, owner, Unit.SLOTS, Window.NOW, amount)


def granted(answer: Grant | Refusal) -> Grant:
    assert isinstance(answer, Grant), answer
    assert not answer.degraded
    return answer


def refused(answer: Grant | Refusal) -> Refusal:
    assert isinstance(answer, Refusal), answer
    return answer


async def test_of_200_at_once_exactly_the_limit_gets_in(bench: Bench) -> None:
    for limit in (rate(20), rate(20, Unit.IMAGES), slots(20)):
        answers = await asyncio.gather(
            *(bench.gate.take(f"{limit.unit}-{i}", [limit], ONE) for i in range(200))
        )
        kinds = Counter(type(answer) for answer in answers)
        assert kinds == {Grant: 20, Refusal: 180}, limit


async def test_a_minute_refills_at_an_even_pace(bench: Bench) -> None:
    limit = rate(6)
    for i in range(6):
        granted(await bench.gate.take(f"a{i}", [limit], ONE))
    no = refused(await bench.gate.take("b", [limit], ONE))
    assert no.limit == limit
    assert no.wait_seconds is not None
    assert no.wait_seconds == pytest.approx(10, abs=1)
    bench.advance(no.wait_seconds)
    granted(await bench.gate.take("c", [limit], ONE))
    refused(await bench.gate.take("d", [limit], ONE))
    bench.advance(60)
    for i in range(6):
        granted(await bench.gate.take(f"e{i}", [limit], ONE))
    refused(await bench.gate.take("f", [limit], ONE))


async def test_standings_say_what_is_left(bench: Bench) -> None:
    limits = [rate(10), rate(20, Unit.IMAGES), slots(5)]
    grant = granted(await bench.gate.take("a", limits, Demand(requests=1, images=4, slots=1)))
    assert [standing.limit for standing in grant.standings] == limits
    assert [standing.remaining for standing in grant.standings] == [9, 16, 4]
    resets = [standing.reset_seconds for standing in grant.standings]
    assert resets == [pytest.approx(6, abs=0.5), pytest.approx(12, abs=0.5), 1.0]


async def test_a_refusal_takes_nothing_from_any_limit(bench: Bench) -> None:
    team, key = rate(100), rate(1, scope=Scope.KEY, owner="k")
    running = slots(3)
    granted(await bench.gate.take("a", [team, running, key], ONE))
    for i in range(20):
        refused(await bench.gate.take(f"b{i}", [team, running, key], ONE))
    grant = granted(await bench.gate.take("c", [team, running], ONE))
    assert [standing.remaining for standing in grant.standings] == [98, 1]


async def test_the_longest_wait_is_named(bench: Bench) -> None:
    fast, slow = rate(60), rate(1, Unit.IMAGES, Scope.KEY, "k")
    busy = slots(1)
    granted(await bench.gate.take("a", [busy, slow], ONE))
    for limits in ([busy, slow, fast], [fast, slow, busy]):
        no = refused(await bench.gate.take("b", limits, ONE))
        assert no.limit == slow
        assert no.wait_seconds == pytest.approx(60, abs=1)
    no = refused(await bench.gate.take("b", [busy, slow], Demand(requests=1, images=2, slots=1)))
    assert (no.limit, no.wait_seconds) == (slow, None)


async def test_what_can_never_fit_has_no_wait(bench: Bench) -> None:
    images = rate(4, Unit.IMAGES)
    no = refused(await bench.gate.take("a", [images], Demand(images=5)))
    assert (no.limit, no.wait_seconds) == (images, None)
    granted(await bench.gate.take("b", [images], Demand(images=4)))


async def test_nothing_wanted_is_never_refused(bench: Bench) -> None:
    images = rate(1, Unit.IMAGES)
    granted(await bench.gate.take("a", [images], ONE))
    grant = granted(await bench.gate.take("b", [images], Demand(images=0)))
    assert grant.standings[0].remaining == 0
    granted(await bench.gate.take("c", [rate(0, Unit.IMAGES), slots(0)], Demand(slots=0)))


@pytest.mark.parametrize("limit", [rate(0), rate(0, Unit.IMAGES), slots(0)], ids=lambda x: x.unit)
async def test_an_amount_of_nothing_means_never(bench: Bench, limit: Limit) -> None:
    no = refused(await bench.gate.take("a", [limit], ONE))
    assert (no.limit, no.wait_seconds) == (limit, None)


async def test_money_and_what_is_only_counted_are_not_looked_at(bench: Bench) -> None:
    money = Limit(Scope.TEAM, "t", Unit.MONEY, Window.DAY, 0)
    grant = granted(await bench.gate.take("a", [money, rate(None), slots(None)], ONE))
    assert grant.standings == ()
    await bench.gate.release("a", [money, rate(None), slots(None)])
    await bench.gate.undo("a", [money, rate(None)], ONE)


async def test_slots_are_held_until_released(bench: Bench) -> None:
    limit = slots(2)
    granted(await bench.gate.take("a", [limit], ONE))
    granted(await bench.gate.take("b", [limit], ONE))
    no = refused(await bench.gate.take("c", [limit], ONE))
    assert (no.limit, no.wait_seconds) == (limit, 1.0)
    await bench.gate.release("a", [limit])
    await bench.gate.release("a", [limit])
    granted(await bench.gate.take("c", [limit], ONE))
    refused(await bench.gate.take("d", [limit], ONE))
    await bench.gate.release("never taken", [limit])
    refused(await bench.gate.take("d", [limit], ONE))


async def test_the_same_call_again_takes_nothing_twice(bench: Bench) -> None:
    limits = [rate(3), slots(3)]
    first = granted(await bench.gate.take("a", limits, ONE))
    for _ in range(10):
        again = granted(await bench.gate.take("a", limits, ONE))
        assert [s.remaining for s in again.standings] == [s.remaining for s in first.standings]
    rates_only = [rate(3)]
    for _ in range(10):
        granted(await bench.gate.take("b", rates_only, ONE))
    assert granted(await bench.gate.take("c", limits, ONE)).standings[0].remaining == 0


async def test_the_same_call_again_is_let_in_though_all_is_taken(bench: Bench) -> None:
    limits = [rate(1), slots(1)]
    granted(await bench.gate.take("a", limits, ONE))
    granted(await bench.gate.take("a", limits, ONE))
    refused(await bench.gate.take("b", limits, ONE))


async def test_undo_gives_everything_back_once(bench: Bench) -> None:
    limits = [rate(5), rate(8, Unit.IMAGES), slots(2)]
    two = Demand(requests=1, images=2, slots=1)
    granted(await bench.gate.take("kept", limits, two))
    granted(await bench.gate.take("a", limits, two))
    for _ in range(3):
        await bench.gate.undo("a", limits, two)
    grant = granted(await bench.gate.take("b", limits, two))
    assert [standing.remaining for standing in grant.standings] == [3, 4, 0]
    await bench.gate.undo("never taken", limits, two)
    assert isinstance(await bench.gate.take("c", limits, two), Refusal)


async def test_undo_of_the_only_call_leaves_the_limit_whole(bench: Bench) -> None:
    limit = rate(2, Unit.IMAGES)
    granted(await bench.gate.take("a", [limit], Demand(images=2)))
    bench.advance(45)
    await bench.gate.undo("a", [limit], Demand(images=2))
    granted(await bench.gate.take("b", [limit], Demand(images=2)))
    refused(await bench.gate.take("c", [limit], ONE))


async def test_owners_scopes_and_units_are_apart(bench: Bench) -> None:
    for limit in (
        rate(1),
        rate(1, Unit.IMAGES),
        rate(1, scope=Scope.KEY),
        rate(1, owner="t2"),
        slots(1),
        slots(1, scope=Scope.KEY),
    ):
        granted(await bench.gate.take(f"a-{limit}", [limit], ONE))
        refused(await bench.gate.take(f"b-{limit}", [limit], ONE))


async def test_release_keeps_the_rate(bench: Bench) -> None:
    limits = [rate(1), slots(1)]
    granted(await bench.gate.take("a", limits, ONE))
    await bench.gate.release("a", limits)
    assert refused(await bench.gate.take("b", limits, ONE)).limit == limits[0]


async def test_no_more_than_one_slot_is_asked_for(bench: Bench) -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        await bench.gate.take("a", [slots(5)], Demand(slots=2))


async def test_it_answers_a_ping(bench: Bench) -> None:
    await bench.gate.ping()


class LeakyBucket:
    """The same promise told another way: a bucket of a minute's amount that leaks evenly."""

    def __init__(self, amount: int) -> None:
        self.each = interval_us(amount)
        self.size = amount * self.each
        self.level = 0

    def leak(self, us: int) -> None:
        self.level = max(0, self.level - us)

    def pour(self, units: int) -> bool:
        if self.level + units * self.each > self.size:
            return False
        self.level += units * self.each
        return True


@given(
    amount=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.integers(0, 90_000), st.integers(0, 20)), max_size=30),
)
@settings(max_examples=150, deadline=None)
def test_the_memory_gate_is_a_leaky_bucket(amount: int, steps: list[tuple[int, int]]) -> None:
    async def run() -> None:
        clock, bucket = StillClock(), LeakyBucket(amount)
        gate = MemoryGate(clock)
        for i, (ms, units) in enumerate(steps):
            clock.advance(ms / 1000)
            bucket.leak(ms * 1000)
            answer = await gate.take(str(i), [rate(amount, Unit.IMAGES)], Demand(images=units))
            assert isinstance(answer, Grant) == bucket.pour(units), (i, answer, bucket.level)

    asyncio.run(run())


@given(
    amount=st.sampled_from([1, 2, 3, 4, 5, 6, 10, 12, 15]),
    steps=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 20)), max_size=20),
)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_the_redis_gate_is_a_leaky_bucket(
    valkey: Valkey, amount: int, steps: list[tuple[int, int]]
) -> None:
    """In whole seconds, so that the real time a run takes (well below one) changes no answer."""

    async def run() -> None:
        clock, bucket = StillClock(), LeakyBucket(amount)
        client = connect(valkey.url, timeout=5.0)
        await client.execute_command("FLUSHALL")
        gate = RedisGate(
            client, clock, deadline_seconds=5.0, offset=lambda: clock.monotonic() - 1000
        )
        for i, (seconds, units) in enumerate(steps):
            clock.advance(seconds)
            bucket.leak(seconds * 1_000_000)
            answer = await gate.take(str(i), [rate(amount, Unit.IMAGES)], Demand(images=units))
            assert isinstance(answer, Grant) == bucket.pour(units), (i, answer, bucket.level)
        assert not gate.degraded
        await gate.aclose()

    asyncio.run(run())


async def test_the_memory_gate_forgets_what_is_idle() -> None:
    clock = StillClock()
    gate = MemoryGate(clock)
    for i in range(1000):
        limits = [rate(10, owner=f"o{i}"), slots(10, owner=f"o{i}")]
        granted(await gate.take(f"r{i}", limits, ONE))
        if i:
            await gate.release(f"r{i}", limits)
    assert len(gate) > 2000
    clock.advance(121)
    granted(await gate.take("last", [rate(10, owner="z")], ONE))
    # The running call's slot and its id, and what was just taken.
    assert len(gate) == 4
    assert "r0" in gate
    clock.advance(3600)
    assert not isinstance(await gate.take("x", [slots(1, owner="o0")], ONE), Grant)


@pytest.mark.parametrize(("amount", "each"), [(20, 5), (7, 1), (4, 1), (3, 1), (1, 1), (0, 0)])
async def test_processes_that_count_apart_share_a_limit(amount: int, each: int) -> None:
    """Together never more than the limit, unless there are more processes than that: then one."""
    gates = [MemoryGate(StillClock(), processes=4) for _ in range(4)]
    for limit in (rate(amount), rate(amount, Unit.IMAGES), slots(amount)):
        for gate in gates:
            answers = [await gate.take(f"{limit.unit}-{i}", [limit], ONE) for i in range(25)]
            assert sum(isinstance(answer, Grant) for answer in answers) == each
        assert 4 * each <= max(amount, 4)


async def test_a_share_refills_at_its_own_pace_and_is_told_beside_the_whole_limit() -> None:
    clock = StillClock()
    gate, limit = MemoryGate(clock, processes=4), rate(24, Unit.IMAGES)
    grant = granted(await gate.take("a", [limit], Demand(images=6)))
    part = replace(limit, amount=6)
    assert [(each.limit, each.remaining) for each in grant.standings] == [(part, 0)]
    no = refused(await gate.take("b", [limit], ONE))
    assert (no.limit, no.counted, no.wait_seconds) == (limit, part, 10.0)
    clock.advance(10)
    granted(await gate.take("b", [limit], ONE))
    # Within the limit, but not within a share of it: it fits once somebody counts for all.
    clock.advance(60)
    assert refused(await gate.take("c", [limit], Demand(images=7))).wait_seconds == 5.0
    assert refused(await gate.take("d", [limit], Demand(images=25))).wait_seconds is None
