"""Threads beside the event loop's leave the core to it; the loop's own does not."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gateway.loop import run
from gateway.stores.writing import Operation, WriterThread, deliver
from gateway.threads import give_way

pytestmark = pytest.mark.skipif(
    not hasattr(os, "SCHED_BATCH"), reason="a policy of Linux: sched(7)"
)


def policy() -> int:
    """Of the thread that asks."""
    return os.sched_getscheduler(0)


class Scribe(WriterThread[Operation[int]]):
    """Answers with the policy of its thread."""

    def work(self, batch: Sequence[Operation[Any]]) -> None:
        for operation in batch:
            operation.result = (policy(),)
        deliver(batch)

    def end(self) -> None:
        pass

    async def ask(self) -> int:
        return int(await self._asked(Operation()))


def test_threads_of_the_loop_give_way_and_the_loop_does_not() -> None:
    async def main() -> tuple[int, int]:
        return await asyncio.to_thread(policy), policy()

    assert run(main()) == (os.SCHED_BATCH, os.SCHED_OTHER)


def test_a_writer_gives_way() -> None:
    async def main() -> int:
        scribe = Scribe(patience_seconds=60.0)
        scribe.start()
        try:
            return await scribe.ask()
        finally:
            await scribe.aclose()

    assert run(main()) == os.SCHED_BATCH


def test_a_policy_that_somebody_chose_is_kept() -> None:
    def idle_then_give_way() -> int:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        give_way()
        return policy()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(idle_then_give_way).result() == os.SCHED_IDLE


def test_a_system_that_forbids_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    found: list[int] = []
    thread = threading.Thread(target=lambda: (give_way(), found.append(policy())))  # type: ignore[func-returns-value]
    thread.start()
    thread.join()
    assert found == [os.SCHED_OTHER]
