"""Buffers that are used again: which, by whom, and for how long they are kept."""

from __future__ import annotations

import gc
import weakref

import pytest

from gateway.relay import buffers
from gateway.relay.buffers import MOST, Buffers
from tests.upstream.calls import until

SIZE = 100_000


class Buffer(bytearray):
    """One that can be watched."""


async def test_one_that_was_given_back_is_taken_again() -> None:
    kept = Buffers(SIZE)
    one = kept.take(SIZE)
    assert len(one) == SIZE
    assert kept.take(SIZE) is not one
    kept.give_back(one)
    assert kept.take(10) is one
    assert len(kept.take(10)) == 10
    kept.give_back(one)
    assert len(kept.take(SIZE + 1)) == SIZE + 1
    kept.close()
    assert kept.take(SIZE) is not one


async def test_others_are_not_kept() -> None:
    kept = Buffers(SIZE)
    for size in (0, SIZE - 1, SIZE + 1):
        kept.give_back(bytearray(size))
    assert len(kept.take(1)) == 1


async def test_a_few_are_kept_for_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "KEPT_SECONDS", 0.05)
    kept, seen = Buffers(SIZE), []
    for _ in range(MOST + 1):
        one = Buffer(SIZE)
        seen.append(weakref.ref(one))
        kept.give_back(one)
    del one
    gc.collect()
    assert sum(each() is not None for each in seen) == MOST
    await until(lambda: all(each() is None for each in seen))
    again = kept.take(SIZE)
    kept.give_back(again)
    assert kept.take(SIZE) is again
    kept.close()
