"""What holds for every test: examples are not timed, for the machines that run them are shared;
the tests themselves are not looked through for garbage; and with ``TEST_LOOP=uvloop`` everything
runs on the loop that `gateway serve` has."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable

from hypothesis import HealthCheck, settings

from gateway.loop import LOOP

settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

OLD_COLLECTIONS = 100
"""Of what is younger, before all is looked through. Python's 10 are a tenth of all the CPU of the
tests: 9,000 of them are 400,000 objects, and each look takes a third of a second."""


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    new, young, _ = gc.get_threshold()
    gc.set_threshold(new, young, OLD_COLLECTIONS)


if os.environ.get("TEST_LOOP") == "uvloop":

    def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
        """pytest-asyncio's hook: the loops of each test."""
        return {"uvloop": LOOP}
