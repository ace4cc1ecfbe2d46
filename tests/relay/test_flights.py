"""A flight goes on whatever its clients do, and everything it holds is let go once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest

from gateway.domain.errors import ClientGone, UpstreamBroken
from gateway.domain.receipt import Receipt
from gateway.ports import FlightNotice
from gateway.relay.doubts import Closed
from gateway.relay.flights import Client, Flight, Flights, Seat, Shown
from gateway.relay.moment import Moment

RECEIPT = Receipt("req_1", "generation", 200)


def notice(rid: str = "req_1") -> FlightNotice:
    at = datetime(2026, 11, 22, tzinfo=UTC)
    return FlightNotice(rid, "f", "growth", "k1", "generation", "art", True, at)


async def content() -> AsyncIterator[bytes]:
    yield b"picture"


@dataclass
class Story:
    """A flight that does what the test says, when it says so; it counts who holds its answer."""

    client: Client = field(default_factory=Client)
    shared: int = 0
    closed: int = 0
    ended: bool = False
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    def shown(self) -> Shown:
        common, own = (("a", "b"),), (("for", "the first"),)
        return Shown(200, common, own, None, content, self.share, self.close)

    def share(self) -> None:
        self.shared += 1

    def close(self) -> None:
        self.closed += 1

    @property
    def held(self) -> int:
        """Shares that were taken and not given back."""
        return self.shared - self.closed

    def run(
        self, *acts: Callable[[Flight], None]
    ) -> Callable[[Flight], Coroutine[Any, Any, Receipt]]:
        """One act at once, each further one when the test lets the flight go on."""

        async def flown(flight: Flight) -> Receipt:
            for act in acts:
                act(flight)
                await self.go_on.wait()
                self.go_on.clear()
            self.ended = True
            return RECEIPT

        return flown

    def answer(self, flight: Flight) -> None:
        flight.show(self.shown())

    def refuse(self, flight: Flight) -> None:
        flight.refuse(UpstreamBroken("It broke."))

    def wait(self, flight: Flight) -> None:
        return


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


# The client it was launched for


async def test_the_client_has_the_head_before_the_flight_has_ended() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch(notice(), story.client, story.run(story.answer))
    shown = await flight.own.shown(story.client)
    head = shown.head(shown.own)
    assert (head.status, head.headers) == (200, (("a", "b"), ("for", "the first")))
    assert [chunk async for chunk in head.body()] == [b"picture"]
    assert flight.answered
    assert (flights.count, story.ended, story.held) == (1, False, 1)
    head.close()
    story.go_on.set()
    assert await flight.receipt() is RECEIPT
    assert (flights.count, story.shared, story.closed) == (0, 1, 1)


async def test_an_error_is_an_answer_and_the_receipt_comes_all_the_same() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch(notice(), story.client, story.run(story.wait, story.refuse))
    assert not flight.answered
    story.go_on.set()
    with pytest.raises(UpstreamBroken):
        await flight.own.shown(story.client)
    story.go_on.set()
    assert await flight.receipt() is RECEIPT


async def test_a_client_that_leaves_does_not_stop_its_flight() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch(notice(), story.client, story.run(story.wait, story.answer))
    waiting = asyncio.create_task(flight.own.shown(story.client))
    await turns()
    story.client.leave()
    with pytest.raises(ClientGone) as gone:
        await waiting
    assert gone.value.stage == "upstream"
    story.go_on.set()
    await turns()
    # Nobody takes a share of an answer that nobody waits for.
    assert (story.shared, flights.count) == (0, 1)
    story.go_on.set()
    assert await flight.receipt() is RECEIPT


async def test_a_client_that_leaves_is_told_where_its_flight_was() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch(notice(), story.client, story.run(story.wait))
    flight.stage = "queued"
    story.client.leave()
    with pytest.raises(ClientGone) as gone:
        await flight.own.shown(story.client)
    assert gone.value.stage == "queued"
    story.go_on.set()
    await flight.receipt()


async def test_a_client_that_leaves_as_the_answer_comes_has_the_answer() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch(notice(), story.client, story.run(story.answer))
    await turns()
    story.client.leave()
    assert (await flight.own.shown(story.client)).status == 200
    assert story.held == 1
    story.go_on.set()
    await flights.drain(5)


async def test_a_door_that_is_cancelled_leaves_nothing_open() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch(notice(), story.client, story.run(story.wait, story.answer))
    waiting = asyncio.create_task(flight.own.shown(story.client))
    await turns()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    story.go_on.set()
    await turns()
    assert (story.held, story.ended) == (0, False)
    story.go_on.set()
    await flights.drain(5)
    assert story.ended


async def test_a_door_that_is_cancelled_with_the_answer_in_hand_gives_it_back() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch(notice(), story.client, story.run(story.wait))
    waiting = asyncio.create_task(flight.own.shown(story.client))
    await turns()
    story.answer(flight)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (story.shared, story.held) == (1, 0)
    story.go_on.set()
    await flights.drain(5)


async def test_patience_has_an_end_and_the_flight_goes_on() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch(notice(), story.client, story.run(story.wait, story.answer))
    with pytest.raises(TimeoutError):
        await flight.own.shown(story.client, 0.001)
    story.go_on.set()
    await turns()
    assert (story.shared, flights.count) == (0, 1)
    late = await flight.watch().shown(Client(), 5)
    assert (late.status, story.held) == (200, 1)
    story.go_on.set()
    assert await flight.receipt() is RECEIPT


async def test_waiting_for_the_receipt_cannot_stop_the_flight() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch(notice(), story.client, story.run(story.answer))
    await flight.own.shown(story.client)
    waiting = asyncio.create_task(flight.receipt())
    await turns()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (flights.count, story.ended) == (1, False)
    story.go_on.set()
    assert await flight.receipt() is RECEIPT


async def test_the_first_answer_stands() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch(
        notice(), story.client, story.run(story.answer, story.answer, story.refuse)
    )
    await turns()
    for _ in range(3):
        story.go_on.set()
        await turns()
    assert (await flight.own.shown(story.client)).status == 200
    assert story.shared == 1, "the second answer is not given to anyone"
    await flight.receipt()


# Everybody else who watches


@pytest.mark.parametrize("count", [1, 2, 7])
async def test_everybody_who_watches_has_a_share_of_one_answer(count: int) -> None:
    story, flights = Story(), Flights()
    flight = flights.launch(notice(), story.client, story.run(story.wait, story.answer))
    others = [flight.watch() for _ in range(count)]
    waiting = [asyncio.create_task(watch.shown(Client())) for watch in (flight.own, *others)]
    await turns()
    story.go_on.set()
    shown = await asyncio.gather(*waiting)
    assert all(one is shown[0] for one in shown)
    assert story.held == count + 1
    for number, one in enumerate(shown):
        head = one.head((("for", str(number)),))
        assert head.headers == (("a", "b"), ("for", str(number))), "what is another's stays there"
        head.close()
    assert story.held == 0
    story.go_on.set()
    await flight.receipt()


async def test_one_who_comes_late_has_what_the_first_has() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch(notice(), story.client, story.run(story.answer))
    first = await flight.own.shown(story.client)
    late = flight.watch()
    assert story.held == 2, "a share is taken at once: the spool may be given up any moment"
    assert await late.shown(Client()) is first
    story.go_on.set()
    await flight.receipt()
    assert await flight.watch().shown(Client()) is first, "right until it is closed"
    assert story.held == 3


async def test_one_who_comes_late_to_an_error_has_that() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch(notice(), story.client, story.run(story.refuse))
    await turns()
    watches = [flight.own, flight.watch(), flight.watch()]
    for watch in watches:
        with pytest.raises(UpstreamBroken):
            await watch.shown(Client())
    story.go_on.set()
    await flight.receipt()


async def test_who_leaves_takes_nothing_from_those_who_stay() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch(notice(), story.client, story.run(story.wait, story.answer))
    stays, leaves = Client(), Client()
    staying = asyncio.create_task(flight.watch().shown(stays))
    leaving = asyncio.create_task(flight.watch().shown(leaves))
    owning = asyncio.create_task(flight.own.shown(story.client))
    await turns()
    story.client.leave()
    leaves.leave()
    for task in (owning, leaving):
        with pytest.raises(ClientGone):
            await task
    story.go_on.set()
    assert (await staying).status == 200
    assert (story.shared, story.held) == (1, 1)
    story.go_on.set()
    await flight.receipt()


async def test_a_share_is_given_back_by_who_never_asked_for_it() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch(notice(), story.client, story.run(story.answer))
    await turns()
    watch = flight.watch()
    assert story.held == 2
    watch.give_up()
    flight.own.give_up()
    assert (story.shared, story.held) == (2, 0)
    story.go_on.set()
    await flight.receipt()


async def test_a_flight_is_found_until_it_is_closed() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch(notice(), story.client, story.run(story.answer))
    assert flights.find("req_1") is flight
    assert flights.find("req_2") is None
    await turns()
    story.go_on.set()
    await flight.receipt()
    assert (flights.find("req_1"), flights.count, flight.closed) == (flight, 0, False)
    flights.close(flight)
    flights.close(flight)
    assert (flights.find("req_1"), flight.closed) == (None, True)
    with pytest.raises(RuntimeError, match="closed"):
        flight.watch()


# Who is there


def test_who_leaves_or_hangs_up_gives_the_seat_back_once() -> None:
    left: list[tuple[str, Closed | None, bool]] = []
    closed = Moment()

    def leave(rid: str, closed: Closed | None, delivered: bool) -> None:
        left.append((rid, closed, delivered))

    seat = Seat(leave, "req_1", closed)
    seat.leave(delivered=True)
    seat.leave(delivered=False)
    assert left == [("req_1", closed, True)]


@pytest.mark.parametrize("gone", [True, False])
async def test_a_client_that_is_away_is_told_of_once(gone: bool) -> None:
    client, told = Client(), []
    client.when_away(lambda: told.append("first"))
    client.when_away(lambda: told.append("second"))
    assert told == []
    for _ in range(2):
        if gone:
            client.leave()
        else:
            client.hang_up()
    assert sorted(told) == ["first", "second"]
    assert client.gone.is_set() is gone
    client.when_away(lambda: told.append("late"))
    assert told[-1] == "late"


# What goes wrong


@pytest.mark.parametrize("crash", [RuntimeError("a bug"), asyncio.CancelledError()])
async def test_a_flight_that_crashes_leaves_nobody_waiting(crash: BaseException) -> None:
    async def crashes(_: Flight) -> Receipt:
        raise crash

    flights = Flights()
    flight = flights.launch(notice(), Client(), crashes)
    other = flight.watch()
    for watch in (flight.own, other):
        with pytest.raises(type(crash)):
            await watch.shown(Client())
    with pytest.raises(type(crash)):
        await flight.receipt()
    assert flights.count == 0
    assert flight.admitted.is_set()
    assert flight.over.is_set()


async def test_a_flight_that_ends_without_an_answer_leaves_nobody_waiting() -> None:
    async def silent(_: Flight) -> Receipt:
        return RECEIPT

    flight = Flights().launch(notice(), Client(), silent)
    with pytest.raises(asyncio.CancelledError):
        await flight.own.shown(Client())


async def test_an_error_that_nobody_asks_for_is_no_noise() -> None:
    heard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    story, flights = Story(), Flights()
    flights.launch(notice(), story.client, story.run(story.refuse)).watch()
    await turns()
    story.go_on.set()
    await flights.drain(5)
    await turns()
    assert heard == []


async def test_a_flight_has_no_receipt_before_it_starts() -> None:
    with pytest.raises(RuntimeError, match="after it has started"):
        await Flight(notice(), Client()).receipt()


# The end of the process


async def test_a_drain_waits_for_every_flight_and_errand() -> None:
    flights, stories = Flights(), [Story(), Story()]
    for number, story in enumerate(stories):
        flights.launch(notice(f"req_{number}"), story.client, story.run(story.wait))
    gate, done = asyncio.Event(), asyncio.Event()

    async def errand() -> None:
        await gate.wait()
        done.set()

    await flights.within(0, errand())
    draining = asyncio.create_task(flights.drain(5))
    for event in (stories[1].go_on, stories[0].go_on, gate):
        await turns()
        assert not draining.done()
        event.set()
    await draining
    assert done.is_set()
    assert all(story.ended for story in stories)
    assert flights.count == 0


async def test_flights_that_begin_during_a_drain_are_waited_for() -> None:
    flights, first, second = Flights(), Story(), Story()

    def another(_: Flight) -> None:
        flights.launch(notice("req_2"), second.client, second.run(second.wait))

    flights.launch(notice(), first.client, first.run(first.wait, another))
    draining = asyncio.create_task(flights.drain(5))
    for _ in range(2):
        await turns()
        first.go_on.set()
    await turns()
    assert (first.ended, draining.done()) == (True, False)
    second.go_on.set()
    await draining


async def test_an_empty_house_drains_at_once() -> None:
    await Flights().drain(5)


async def test_a_drain_gives_up_what_does_not_end() -> None:
    flights, story = Flights(), Story()
    flight = flights.launch(notice(), story.client, story.run(story.wait))
    errand = flights.errand(asyncio.sleep(60))
    await flights.drain(0.01)
    assert (flights.count, story.ended) == (0, False)
    assert errand.cancelled()
    with pytest.raises(asyncio.CancelledError):
        await flight.receipt()


async def test_an_errand_that_fails_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    async def errand() -> None:
        raise RuntimeError("a bug")

    flights = Flights()
    await flights.within(5, errand())
    assert [record.message for record in caplog.records] == ["an errand failed"]
    await flights.drain(5)


async def test_an_errand_is_waited_for_as_long_as_said() -> None:
    flights, done = Flights(), asyncio.Event()

    async def errand() -> None:
        done.set()

    await flights.within(5, errand())
    assert done.is_set()
