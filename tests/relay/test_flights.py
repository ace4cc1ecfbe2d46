"""A flight goes on whatever its client does, and everything it holds is let go once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from gateway.domain.errors import ClientGone, UpstreamBroken
from gateway.domain.receipt import Receipt
from gateway.relay.flights import Client, Flight, Flights, Head

RECEIPT = Receipt("req_1", "generation", 200)


async def nothing() -> AsyncIterator[bytes]:
    for chunk in (b"",):
        yield chunk


@dataclass
class Story:
    """A flight that does what the test says, when it says so."""

    client: Client = field(default_factory=Client)
    closed: int = 0
    ended: bool = False
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    def head(self) -> Head:
        return Head(200, (("a", "b"),), None, nothing, self.close)

    def close(self) -> None:
        self.closed += 1

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
        flight.answer(self.head())

    def refuse(self, flight: Flight) -> None:
        flight.refuse(UpstreamBroken("It broke."))

    def wait(self, flight: Flight) -> None:
        return


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_client_has_the_head_before_the_flight_has_ended() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch("req_1", story.client, story.run(story.answer))
    head = await flight.head()
    assert (head.status, head.headers) == (200, (("a", "b"),))
    assert flight.answered
    assert (flights.count, story.ended, story.closed) == (1, False, 0)
    story.go_on.set()
    assert await flight.receipt() is RECEIPT
    assert (flights.count, story.closed) == (0, 0)


async def test_an_error_is_an_answer_and_the_receipt_comes_all_the_same() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch("req_1", story.client, story.run(story.wait, story.refuse))
    assert not flight.answered
    story.go_on.set()
    with pytest.raises(UpstreamBroken):
        await flight.head()
    story.go_on.set()
    assert await flight.receipt() is RECEIPT


async def test_a_client_that_leaves_does_not_stop_its_flight() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch("req_1", story.client, story.run(story.wait, story.answer))
    waiting = asyncio.create_task(flight.head())
    await turns()
    story.client.leave()
    with pytest.raises(ClientGone) as gone:
        await waiting
    assert gone.value.stage == "upstream"
    story.go_on.set()
    await turns()
    # The answer that nobody waits for is let go at once.
    assert (story.closed, flights.count) == (1, 1)
    story.go_on.set()
    assert await flight.receipt() is RECEIPT


async def test_a_client_that_leaves_as_the_answer_comes_has_the_answer() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch("req_1", story.client, story.run(story.answer))
    await turns()
    story.client.leave()
    assert (await flight.head()).status == 200
    assert story.closed == 0
    story.go_on.set()
    await flights.drain(5)


async def test_a_door_that_is_cancelled_leaves_nothing_open() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch("req_1", story.client, story.run(story.wait, story.answer))
    waiting = asyncio.create_task(flight.head())
    await turns()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    story.go_on.set()
    await turns()
    assert (story.closed, story.ended) == (1, False)
    story.go_on.set()
    await flights.drain(5)
    assert story.ended


async def test_waiting_for_the_receipt_cannot_stop_the_flight() -> None:
    story, flights = Story(), Flights()
    flight = flights.launch("req_1", story.client, story.run(story.answer))
    await flight.head()
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
        "req_1", story.client, story.run(story.answer, story.answer, story.refuse)
    )
    await turns()
    for _ in range(3):
        story.go_on.set()
        await turns()
    assert (await flight.head()).status == 200
    assert story.closed == 1, "the second head is not given to anyone"
    await flight.receipt()


@pytest.mark.parametrize("crash", [RuntimeError("a bug"), asyncio.CancelledError()])
async def test_a_flight_that_crashes_leaves_nobody_waiting(crash: BaseException) -> None:
    async def crashes(_: Flight) -> Receipt:
        raise crash

    flights = Flights()
    flight = flights.launch("req_1", Client(), crashes)
    with pytest.raises(type(crash)):
        await flight.head()
    with pytest.raises(type(crash)):
        await flight.receipt()
    assert flights.count == 0


async def test_a_flight_that_ends_without_an_answer_leaves_nobody_waiting() -> None:
    async def silent(_: Flight) -> Receipt:
        return RECEIPT

    flight = Flights().launch("req_1", Client(), silent)
    with pytest.raises(asyncio.CancelledError):
        await flight.head()


async def test_an_error_that_nobody_asks_for_is_no_noise() -> None:
    heard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    story, flights = Story(), Flights()
    flights.launch("req_1", story.client, story.run(story.refuse))
    await turns()
    story.go_on.set()
    await flights.drain(5)
    await turns()
    assert heard == []


async def test_a_flight_has_no_receipt_before_it_starts() -> None:
    with pytest.raises(RuntimeError, match="after it has started"):
        await Flight("req_1", Client()).receipt()


async def test_a_drain_waits_for_every_flight_and_errand() -> None:
    flights, stories = Flights(), [Story(), Story()]
    for number, story in enumerate(stories):
        flights.launch(f"req_{number}", story.client, story.run(story.wait))
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
        flights.launch("req_2", second.client, second.run(second.wait))

    flights.launch("req_1", first.client, first.run(first.wait, another))
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
    flight = flights.launch("req_1", story.client, story.run(story.wait))
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
