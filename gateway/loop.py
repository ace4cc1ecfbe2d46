"""The event loop that serves: uvloop, or asyncio's own where that is not there.

uvloop is not made for Windows, nor for other Pythons than CPython. What is written in this package
runs on both loops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from gateway.threads import give_way

try:
    import uvloop
except ImportError:
    LOOP: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
else:
    LOOP = uvloop.new_event_loop

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """As ``asyncio.run``; its threads leave the core to the loop."""
    with asyncio.Runner(loop_factory=LOOP) as runner:
        runner.get_loop().set_default_executor(ThreadPoolExecutor(initializer=give_way))
        return runner.run(main)
