"""How threads beside the event loop's share a core with it."""

from __future__ import annotations

import contextlib
import os


def give_way() -> None:
    """In a thread that works for the event loop: it never takes the core from whoever wakes it.

    It gets as much of the core as before, when the waking thread has to wait or has had its time
    (Linux, ``sched(7)``: SCHED_BATCH, which needs no privilege). Otherwise the loop would be put
    off in the middle of its turn for a thread that at once waits for the GIL, which the loop holds.
    Who runs the gateway under a policy of their own keeps it.
    """
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
