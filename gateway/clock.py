"""The one clock. Everything else is given one."""

from __future__ import annotations

import time
from datetime import UTC, datetime


class SystemClock:
    """The machine's time; implements ``ports.Clock``."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    # The function itself: it is asked thirty times a request.
    monotonic = staticmethod(time.monotonic)
