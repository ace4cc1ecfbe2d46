"""The end of a process, in order, and bounded."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

import gateway.relay.drain
from gateway.domain.errors import LedgerUnavailable
from gateway.domain.receipt import Receipt
from gateway.ports import FlightNotice
from gateway.relay.drain import Drain, shutting_down
from gateway.relay.flights import Client, Flight, Flights

RECEIPT = Receipt("req_1", "generation", 200)
NOTICE = FlightNotice(
    "req_1", "f", "growth", "k1", "generation", "art", False, datetime(2026, 11, 22, tzinfo=UTC)
)


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Story:
    """Flights and errands that end when the test says so, and what was done in which order."""

    def __init__(self) -> None:
        self.flights = Flights()
        self.done: list[str] = []
        self.drain = Drain(self.flights, self.flush)

    async def flush(self) -> None:
        self.done.append("flush")

    def fly(self, until: asyncio.Event) -> None:
        async def run(flight: Flight) -> Receipt:
            await until.wait()
            self.done.append("landed")
            return RECEIPT

        self.flights.launch(NOTICE, Client(), run)

    def errand(self, until: asyncio.Event, *, durable: bool = False) -> asyncio.Task[None]:
        async def run() -> None:
            await until.wait()
            self.done.append("errand")

        return self.flights.errand(run(), durable=durable)


async def test_flights_then_errands_then_the_news() -> None:
    story, landing, running = Story(), asyncio.Event(), asyncio.Event()
    story.fly(landing)
    story.errand(running)
    story.drain.begin()
    assert story.flights.draining
    assert story.drain.begun
    over = asyncio.ensure_future(story.drain.over())
    await turns()
    landing.set()
    await turns()
    assert story.done == ["landed"]
    assert not over.done()
    running.set()
    await over
    assert story.done == ["landed", "errand", "flush"]


async def test_what_is_on_disk_is_not_waited_for() -> None:
    story, never = Story(), asyncio.Event()
    task = story.errand(never, durable=True)
    await story.drain.over()
    assert story.done == ["flush"]
    assert not task.done()
    never.set()
    await task
    await story.drain.over()


async def test_an_errand_of_a_flight_is_waited_for_too() -> None:
    story, landing, running = Story(), asyncio.Event(), asyncio.Event()

    async def run(flight: Flight) -> Receipt:
        await landing.wait()
        story.errand(running)
        return RECEIPT

    story.flights.launch(NOTICE, Client(), run)
    over = asyncio.ensure_future(story.drain.over())
    await turns()
    landing.set()
    await turns()
    assert not over.done()
    running.set()
    await over
    assert story.done == ["errand", "flush"]


@pytest.mark.parametrize("error", [LedgerUnavailable("away"), RuntimeError("a fault")])
async def test_news_that_cannot_be_sent_keeps_nothing_from_ending(error: Exception) -> None:
    async def flush() -> None:
        raise error

    await Drain(Flights(), flush).over()


async def test_news_for_a_receiver_that_is_silent_has_an_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gateway.relay.drain, "FLUSH_SECONDS", 0.01)

    async def flush() -> None:
        await asyncio.Event().wait()

    async with asyncio.timeout(30):
        await Drain(Flights(), flush).over()


async def test_those_who_fly_now_are_waited_for_and_no_others() -> None:
    story, first, second = Story(), asyncio.Event(), asyncio.Event()
    story.fly(first)
    landed = asyncio.ensure_future(story.flights.landed())
    await turns()
    story.fly(second)
    first.set()
    await landed
    assert story.flights.count == 1
    second.set()
    await story.flights.idle()


def test_the_refusal_sends_clients_elsewhere_at_once() -> None:
    error = shutting_down()
    assert (error.status, error.code, error.should_retry) == (503, "shutting_down", True)
    assert (error.retry_after_seconds, error.close) == (1, True)


async def test_what_waits_for_the_end_of_a_client_is_broken_off() -> None:
    story, entered = Story(), asyncio.Event()

    async def upload() -> None:
        async with story.flights.until_draining():
            entered.set()
            await asyncio.Event().wait()

    async with story.flights.until_draining():
        pass
    uploading = asyncio.create_task(upload())
    await entered.wait()
    story.drain.begin()
    story.drain.begin()
    with pytest.raises(TimeoutError):
        await uploading
    with pytest.raises(TimeoutError):
        await upload()
