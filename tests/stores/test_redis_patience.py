"""How long is waited for one Redis, by whom, and in which order they ask."""

from __future__ import annotations

import asyncio
import time

import pytest

from gateway.stores import redis_patience
from gateway.stores.redis_patience import GaveUp, Turns, Waits


def answer() -> asyncio.Future[object]:
    return asyncio.get_running_loop().create_future()


async def gave_up(waits: Waits, seconds: float, waited: float = 0.0) -> tuple[GaveUp, float]:
    """Why, and after how long."""
    loop = asyncio.get_running_loop()
    began, asked = loop.time(), answer()
    wait = waits.begin(asked, seconds, waited)
    try:
        async with asyncio.timeout(30):
            await asked
    except GaveUp as why:
        return why, loop.time() - began
    finally:
        waits.end(wait)
    raise AssertionError("it was answered")


@pytest.mark.parametrize("seconds", [0.02, 0.12])
async def test_a_silent_server_is_given_up_after_its_time(seconds: float) -> None:
    waits = Waits()
    # One that came before looks less often: that of the others does not matter.
    other = asyncio.create_task(gave_up(waits, 5.0, 4.6))
    await asyncio.sleep(0.01)
    why, passed = await gave_up(waits, seconds)
    assert why.silent
    assert not why.down
    assert passed >= seconds - 0.002
    assert not (await other)[0].silent


async def test_whoever_is_answered_keeps_the_others_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redis_patience, "MOST_SECONDS", 0.5)
    waits = Waits()

    async def chatter() -> None:
        while True:
            await asyncio.sleep(0.01)
            waits.answers += 1

    talking = asyncio.create_task(chatter())
    why, passed = await gave_up(waits, 0.1)
    talking.cancel()
    assert not why.silent
    assert passed >= 0.45


async def test_a_stall_of_this_process_is_one_tick() -> None:
    waits = Waits()
    waiting = asyncio.create_task(gave_up(waits, 0.2))
    await asyncio.sleep(0.01)
    time.sleep(0.5)  # noqa: ASYNC251 - nobody hears anything meanwhile
    why, passed = await waiting
    assert why.silent
    assert passed >= 0.5 + 0.05


async def test_of_a_server_that_is_down_nobody_waits_but_who_looks_for_it() -> None:
    waits = Waits()
    usual, probe = answer(), answer()
    waits.begin(usual, 5.0)
    found = waits.begin(probe, 5.0, undaunted=True)
    waits.give_up()
    with pytest.raises(GaveUp) as why:
        await usual
    assert why.value.down
    assert not probe.done()
    waits.end(found)


async def test_turns_are_given_in_their_order_and_not_to_those_that_left() -> None:
    turns = Turns(1)
    assert turns.take()
    assert not turns.take()
    first, left, last = turns.queue(), turns.queue(), turns.queue()
    left.cancel()
    turns.give()
    assert first.done()
    assert not turns.take()
    turns.give()
    assert last.done()
    turns.give()
    assert turns.take()
