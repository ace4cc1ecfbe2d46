"""Who goes next, when there is no room for all: shares, not floods, and a true time to wait."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime

import pytest

from gateway.domain.errors import ClientGone, Overloaded
from gateway.relay.moment import Moment
from gateway.relay.turnstile import MAX_WAIT_SECONDS, Place, Turnstile

TODAY = datetime(2026, 11, 22, tzinfo=UTC)


class Seconds:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.at = 100.0

    def now(self) -> datetime:
        return TODAY

    def monotonic(self) -> float:
        return self.at


class Crowd:
    """Calls that wait at a turnstile, in the order in which they came, and those that got in."""

    def __init__(self, turnstile: Turnstile) -> None:
        self.turnstile = turnstile
        self.served: list[str] = []
        self.refused: list[Exception] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.gone: list[Moment] = []
        self.places: list[Place] = []
        self._ends: list[asyncio.Event] = []

    async def come(self, *teams: str, weight: int = 1, upstream: str = "a") -> None:
        """``upstream`` is one, or several with commas."""
        for team in teams:
            gone = Moment()
            self.gone.append(gone)
            upstreams = upstream.split(",")
            self.tasks.append(asyncio.ensure_future(self._call(team, weight, upstreams, gone)))
            await turns()

    async def _call(self, team: str, weight: int, upstreams: Sequence[str], gone: Moment) -> None:
        try:
            place = await self.turnstile.enter(team, weight, upstreams, gone)
        except (Overloaded, ClientGone) as error:
            self.refused.append(error)
            return
        try:
            self.served.append(team)
            self.places.append(place)
            end = asyncio.Event()
            self._ends.append(end)
            await end.wait()
        finally:
            place.leave()

    async def end(self, count: int = 1) -> None:
        """The calls that have been in for the longest end, one after the other."""
        for _ in range(count):
            self._ends.pop(0).set()
            await turns()

    async def finish(self) -> None:
        while self._ends:
            await self.end()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def turns() -> None:
    """Lets everything that can go on go on."""
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def crowd(
    limit: int = 1,
    per_upstream: Mapping[str, int] = {"a": 1000, "b": 1000},
    queue: int = 1000,
    patience: float = 60.0,
    clock: Seconds | None = None,
) -> AsyncIterator[Crowd]:
    turnstile = Turnstile(
        limit,
        per_upstream=per_upstream,
        queue=queue,
        patience_seconds=patience,
        clock=clock or Seconds(),
    )
    running = Crowd(turnstile)
    try:
        yield running
        await running.finish()
        assert turnstile.waiting == 0
        assert {name: turnstile.flying(name) for name in per_upstream} == dict.fromkeys(
            per_upstream, 0
        )
    finally:
        for task in running.tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*running.tasks, return_exceptions=True)


FAIR: dict[str, tuple[Sequence[tuple[str, int, int]], int, Mapping[str, int]]] = {
    "one against a hundred": ((("flood", 100, 1), ("quiet", 1, 1)), 2, {"quiet": 1, "flood": 1}),
    "equals": ((("a", 30, 1), ("b", 30, 1)), 20, {"a": 10, "b": 10}),
    "two to one": ((("a", 30, 2), ("b", 30, 1)), 15, {"a": 10, "b": 5}),
    "five to two to one": (
        (("a", 60, 5), ("b", 60, 2), ("c", 60, 1)),
        40,
        {"a": 25, "b": 10, "c": 5},
    ),
    "what one does not want the others get": (
        (("a", 2, 5), ("b", 20, 1), ("c", 20, 1)),
        12,
        {"a": 2, "b": 5, "c": 5},
    ),
}


@pytest.mark.parametrize("how", FAIR)
async def test_places_are_shared_by_weight(how: str) -> None:
    teams, ends, expected = FAIR[how]
    async with crowd() as all_of_them:
        await all_of_them.come("first")
        for name, count, weight in teams:
            await all_of_them.come(*[name] * count, weight=weight)
        await all_of_them.end(ends)
        served = Counter(all_of_them.served[1:])
        assert set(served) == set(expected)
        assert all(abs(served[name] - expected[name]) <= 1 for name in expected), served


async def test_a_team_takes_its_own_in_the_order_in_which_they_came() -> None:
    order: list[int] = []
    turnstile = Turnstile(1, per_upstream={"a": 9}, queue=9, patience_seconds=60, clock=Seconds())

    async def call(number: int) -> None:
        place = await turnstile.enter("team", 1, ["a"], Moment())
        order.append(number)
        await turns()
        place.leave()

    await asyncio.gather(*(call(number) for number in range(6)))
    assert order == list(range(6))


async def test_a_team_that_was_away_saves_up_nothing() -> None:
    async with crowd() as running:
        await running.come("first", *["busy"] * 20)
        await running.end(10)
        await running.come(*["late"] * 10)
        before = len(running.served)
        await running.end(10)
        served = Counter(running.served[before:])
        assert abs(served["late"] - served["busy"]) <= 1


async def test_a_team_that_always_has_one_waiting_gets_its_share_and_no_more() -> None:
    async with crowd() as running:
        await running.come("first", *["deep"] * 30, "shallow")
        for _ in range(20):
            seen = running.served.count("shallow")
            await running.end()
            if running.served.count("shallow") > seen:
                await running.come("shallow")
        served = Counter(running.served[1:])
        assert abs(served["deep"] - served["shallow"]) <= 1


async def test_those_who_left_cost_their_team_no_turn() -> None:
    async with crowd() as running:
        await running.come("first", *["patient"] * 10, *["leaver"] * 50)
        for gone in running.gone[-50:]:
            gone.set()
        await turns()
        assert running.turnstile.waiting == 10
        assert {error.stage for error in running.refused if isinstance(error, ClientGone)} == {
            "queued"
        }
        await running.come("leaver")
        await running.end(2)
        assert "leaver" in running.served


async def test_an_upstream_that_is_full_keeps_nobody_from_another() -> None:
    async with crowd(limit=100, per_upstream={"a": 1, "b": 2}) as running:
        await running.come("x", "x", "x")
        assert running.turnstile.flying("a") == 1
        assert running.turnstile.waiting == 2
        await running.come("x", "y", upstream="b")
        assert running.turnstile.flying("b") == 2
        assert running.served == ["x", "x", "y"]


async def test_who_may_go_to_several_goes_where_there_is_room() -> None:
    async with crowd(limit=100, per_upstream={"a": 1, "b": 1}) as running:
        await running.come("x", "x", "x", upstream="a,b")
        assert [place.upstream for place in running.places] == ["a", "b"]
        assert running.turnstile.waiting == 1
        await running.end()
        assert [place.upstream for place in running.places] == ["a", "b", "a"]
        assert running.turnstile.waiting == 0


async def test_a_place_moves_along_without_waiting() -> None:
    async with crowd(limit=100, per_upstream={"a": 2, "b": 1}) as running:
        await running.come("x", "x")
        flying = running.turnstile.flying
        first, second = running.places
        assert first.move("a")
        assert first.move("b")
        assert (first.upstream, flying("a"), flying("b")) == ("b", 1, 1)
        assert not second.move("b")
        assert (second.upstream, flying("a"), flying("b")) == ("a", 1, 1)
        await running.come("y", "z")
        assert (running.served, running.turnstile.waiting) == (["x", "x", "y"], 1)
        await running.come("w", upstream="b")
        assert running.served[3:] == []
        assert not first.move("a"), "it has been taken meanwhile"
        await running.end()
        assert running.served[3:] == ["w"], "what is given back is the place it had in the end"


async def test_both_limits_hold_at_once() -> None:
    async with crowd(limit=3, per_upstream={"a": 2, "b": 2}) as running:
        await running.come("x", "x", "x")
        await running.come("y", "y", "y", upstream="b")
        flying = (running.turnstile.flying("a"), running.turnstile.flying("b"))
        assert flying == (2, 1)
        await running.end()
        assert running.turnstile.flying("a") + running.turnstile.flying("b") == 3


async def test_a_flood_that_fills_both_limits_keeps_nobody_out() -> None:
    async with crowd(limit=4, per_upstream={"a": 8}) as running:
        await running.come(*["flood"] * 50, "quiet")
        await running.end(3)
        assert "quiet" in running.served, "one place at the upstream, then one in the process"


async def test_a_queue_that_is_full_refuses_at_once() -> None:
    clock = Seconds()
    async with crowd(queue=2, clock=clock) as running:
        await running.come("x", "x", "x", "x")
        [error] = running.refused
        assert isinstance(error, Overloaded)
        assert (error.status, error.code, error.should_retry) == (503, "overloaded", True)


def teams_of(running: Crowd) -> Counter[tuple[str, str]]:
    """How many wait, by team and upstream."""
    crowds = running.turnstile._queue._crowds
    return Counter({crowd: len(waiting) for crowd, waiting in crowds.items()})


async def test_a_flood_gives_places_in_a_full_queue_up_to_other_teams() -> None:
    async with crowd(queue=10) as running:
        await running.come("first", *["flood"] * 20)
        assert len(running.refused) == 10, "those beyond the queue"
        await running.come(*["quiet"] * 3)
        assert teams_of(running) == {("flood", "a"): 7, ("quiet", "a"): 3}
        assert len(running.refused) == 13
        error = running.refused[-1]
        assert isinstance(error, Overloaded)
        assert (error.status, error.code, error.should_retry) == (503, "overloaded", True)
        assert [task.done() for task in running.tasks[1:11]] == [False] * 7 + [True] * 3, (
            "the newest of the flood"
        )
        await running.end(2)
        assert "quiet" in running.served


async def test_nobody_is_turned_out_for_a_team_that_waits_as_much() -> None:
    async with crowd(queue=10) as running:
        await running.come("first", *["one", "other"] * 5)
        await running.come("one", "other", "one", "other")
        assert teams_of(running) == {("one", "a"): 5, ("other", "a"): 5}
        assert all(task.done() for task in running.tasks[11:]), "each newcomer, and nobody else"


async def test_the_queue_is_shared_by_weight() -> None:
    async with crowd(queue=9) as running:
        await running.come("first")
        await running.come(*["light"] * 20)
        await running.come(*["heavy"] * 20, weight=2)
        assert teams_of(running) == {("light", "a"): 3, ("heavy", "a"): 6}


async def test_those_who_wait_for_a_hung_upstream_leave_room_for_another() -> None:
    """Many teams, each no flood: the upstream is what has them wait."""
    per_upstream = {"hung": 1, "b": 1}
    async with crowd(limit=100, per_upstream=per_upstream, queue=8) as running:
        await running.come("t0", *[f"t{number}" for number in range(8)], upstream="hung")
        await running.come("t0", "t1", "new", "t2", upstream="b")
        assert running.served == ["t0", "t0"], "one at each upstream"
        waiting = teams_of(running)
        assert waiting.total() == 8
        assert {team for team, upstream in waiting if upstream == "b"} == {"t1", "new", "t2"}


async def test_a_team_that_floods_one_upstream_gets_to_another() -> None:
    async with crowd(limit=100, per_upstream={"hung": 1, "b": 1}, queue=6) as running:
        await running.come(*["flood"] * 10, upstream="hung")
        await running.come(*["flood"] * 10, upstream="b")
        assert teams_of(running) == {("flood", "hung"): 3, ("flood", "b"): 3}


async def test_who_has_just_been_given_a_place_keeps_it() -> None:
    async with crowd(queue=2) as running:
        await running.come("first", "flood", "flood")
        # In one turn of the loop: a place comes free, is handed on, and two more want to wait.
        running._ends.pop(0).set()
        await running.tasks[0]
        await running.come("quiet", "third")
        assert running.served == ["first", "flood"]
        assert teams_of(running) == {("flood", "a"): 1, ("quiet", "a"): 1}
        assert running.turnstile.flying("a") == 1


async def test_patience_ends() -> None:
    async with crowd(patience=0.01) as running:
        await running.come("x", "x")
        await running.tasks[1]
        [error] = running.refused
        assert isinstance(error, Overloaded)
        assert running.turnstile.waiting == 0


@pytest.mark.parametrize(
    ("seconds_each", "ends", "waiting", "expected"),
    [(2.0, 5, 3, 8.0), (0.01, 5, 3, 1.0), (30.0, 5, 9, MAX_WAIT_SECONDS), (0, 0, 3, 7.0)],
    ids=["by the rate", "at least a second", "at most a minute", "no rate yet: the patience"],
)
async def test_the_time_to_come_back_is_the_one_that_was_measured(
    seconds_each: float, ends: int, waiting: int, expected: float
) -> None:
    clock = Seconds()
    async with crowd(queue=ends + waiting, clock=clock, patience=7.0) as running:
        await running.come("x", *["x"] * (ends + waiting))
        for _ in range(ends):
            clock.at += seconds_each
            await running.end()
        await running.come(*["x"] * (ends + 1))
        error = running.refused[-1]
        assert isinstance(error, Overloaded)
        there = ends + waiting
        exact = min(MAX_WAIT_SECONDS, max(1.0, (there + 1) * seconds_each)) if ends else 7.0
        assert error.retry_after_seconds == pytest.approx(exact)
        if not ends:
            assert exact == expected


async def test_an_idle_hour_does_not_slow_the_measured_rate_down() -> None:
    clock = Seconds()
    async with crowd(queue=1, clock=clock) as running:
        await running.come("x")
        await running.end()
        clock.at += 3600
        await running.come("x", "x")
        clock.at += 2
        await running.end()
        await running.come("x", "x")
        error = running.refused[-1]
        assert isinstance(error, Overloaded)
        assert error.retry_after_seconds == pytest.approx(4.0)


async def test_a_cancelled_call_gives_back_what_it_was_handed() -> None:
    async with crowd() as running:
        await running.come("x", "y", "z")
        running._ends.pop(0).set()
        await running.tasks[0]
        # In this turn of the loop "y" has its place already, and does not know it.
        running.tasks[1].cancel()
        await turns()
        assert running.served == ["x", "z"] or running.served == ["x", "y", "z"]
        assert running.turnstile.flying("a") == 1


async def test_other_limits_hold_at_once() -> None:
    async with crowd(limit=100, per_upstream={"a": 1, "b": 1}) as running:
        await running.come("x", "x", "x", "x")
        running.turnstile.replace({"a": 3, "new": 1})
        await turns()
        assert running.turnstile.flying("a") == 3
        await running.come("x", upstream="new")
        await running.come("x", upstream="b")
        assert running.turnstile.flying("new") == 1
        running.turnstile.replace({"a": 1})
        await running.end()
        assert running.turnstile.flying("a") == 2, "what flies stays, and nobody follows it"


async def test_ten_thousand_wait_in_no_time() -> None:
    """Comparisons of the heap, not of a list: a queue ten times as long is not ten times as slow
    for each."""
    turnstile = Turnstile(
        1, per_upstream={"a": 100_000}, queue=100_000, patience_seconds=600, clock=Seconds()
    )
    lane = turnstile._process
    assert lane.take()

    def work(count: int) -> int:
        for number in range(count):
            lane.join(f"team-{number % 1000}", 1 + number % 3)
        served = 0
        while lane.waiting:
            lane.give()
            served += 1
        return served

    loop = asyncio.get_running_loop()

    def seconds(count: int) -> float:
        began = loop.time()
        assert work(count) == count
        return (loop.time() - began) / count

    seconds(1000)
    small = min(seconds(1000) for _ in range(3))
    assert min(seconds(10_000) for _ in range(3)) < 10 * small
