"""Threads that nobody has to wait for at the end.

A name that does not resolve, or a file on a dead server, holds its thread for as long as the system
likes. asyncio's own executor is joined when the loop closes and again when the process ends, so one
such name would keep a command that has long said everything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class AbandonableThreads(ThreadPoolExecutor):
    """One daemon thread for each call. Shutting it down waits for none."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        # From now on it cannot be cancelled: who gives up only stops listening.
        future.set_running_or_notify_cancel()

        def work() -> None:
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - whoever waits hears it, whatever it is
                future.set_exception(error)
            else:
                future.set_result(result)

        threading.Thread(target=work, daemon=True, name="doctor").start()
        return future

    def shutdown(self, *args: Any, **options: Any) -> None:
        """Nothing: what still runs is of no interest to anybody."""
