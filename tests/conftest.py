"""What holds for every test: examples are not timed, for the machines that run them are shared; and
with ``TEST_LOOP=uvloop`` everything runs on the loop that `gateway serve` has."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from hypothesis import HealthCheck, settings

from gateway.loop import LOOP

settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


if os.environ.get("TEST_LOOP") == "uvloop":

    def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
        """pytest-asyncio's hook: the loops of each test."""
        return {"uvloop": LOOP}
