"""The event loop that serves: uvloop, or asyncio's own where that is not there.

uvloop is not made for Windows, nor for other Pythons than CPython. What is written in this package
runs on both loops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

try:
    import uvloop
except ImportError:
    LOOP: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
else:
    LOOP = uvloop.new_event_loop

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """As ``asyncio.run``."""
    with asyncio.Runner(loop_factory=LOOP) as runner:
        return runner.run(main)
