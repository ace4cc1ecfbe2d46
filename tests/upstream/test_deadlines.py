"""One timer for all that waits: each is told of its own deadline, and of no other's."""

from __future__ import annotations

import asyncio

from gateway.upstream.deadlines import Deadlines


class _Waiting:
    def __init__(self, seconds: float) -> None:
        self.deadline = asyncio.get_running_loop().time() + seconds
        self.expired = asyncio.Event()
        self.expired_at = 0.0

    def expire(self) -> None:
        assert not self.expired.is_set(), "told once"
        self.expired_at = asyncio.get_running_loop().time()
        self.expired.set()


async def test_each_expires_at_its_own_deadline_whatever_the_order_they_came_in() -> None:
    deadlines = Deadlines()
    late, early = _Waiting(0.1), _Waiting(0.03)
    deadlines.watch(late)
    deadlines.watch(early)

    await asyncio.wait_for(early.expired.wait(), 5)
    assert early.expired_at >= early.deadline
    assert not late.expired.is_set()

    await asyncio.wait_for(late.expired.wait(), 5)
    assert late.expired_at >= late.deadline


async def test_what_is_over_or_has_been_put_off_is_not_told_too_early() -> None:
    deadlines = Deadlines()
    over, put_off, last = _Waiting(0.01), _Waiting(0.01), _Waiting(0.05)
    for one in (over, put_off, last):
        deadlines.watch(one)
    deadlines.forget(over)
    deadlines.forget(over)
    put_off.deadline += 0.1

    await asyncio.wait_for(put_off.expired.wait(), 5)
    assert put_off.expired_at >= put_off.deadline
    assert last.expired.is_set(), "the later one has gone first meanwhile"
    assert not over.expired.is_set()


async def test_one_that_comes_when_all_others_are_over_is_timed_anew() -> None:
    deadlines = Deadlines()
    first = _Waiting(0.01)
    deadlines.watch(first)
    await asyncio.wait_for(first.expired.wait(), 5)

    second = _Waiting(0.01)
    deadlines.watch(second)
    await asyncio.wait_for(second.expired.wait(), 5)


async def test_nothing_is_told_after_the_end() -> None:
    deadlines, others = Deadlines(), Deadlines()
    one, later = _Waiting(0.01), _Waiting(0.05)
    deadlines.watch(one)
    deadlines.close()
    others.watch(later)

    await asyncio.wait_for(later.expired.wait(), 5)
    assert not one.expired.is_set()
