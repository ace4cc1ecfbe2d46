"""The end of a process, in order: nothing new, what flies lands, what is owed is done."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from gateway.domain.errors import Fault, GatewayError, Overloaded
from gateway.relay.flights import Flights

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
FLUSH_SECONDS = 10.0
"""How long the last news has: what is not delivered by then, another process tells."""


class Drain:
    """Of one process. ``flush`` sends what is to be told; it may fail."""

    def __init__(self, flights: Flights, flush: Callable[[], Awaitable[None]]) -> None:
        self._flights = flights
        self._flush = flush

    @property
    def begun(self) -> bool:
        return self._flights.draining

    def begin(self) -> None:
        """From now on nothing new is taken in or launched, and `/readyz` says so."""
        self._flights.begin_draining()

    async def over(self) -> None:
        """Waits until all that flew has landed and is settled, and the errands are done."""
        await self._flights.idle()
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                await self._flush()
        except (GatewayError, TimeoutError) as error:
            log.warning("the last news was not sent", extra={"error": str(error)})
        except Exception:
            # Whatever it is: the process ends in order all the same.
            log.exception("the last news was not sent")
        await self._flights.idle()


def shutting_down() -> Overloaded:
    """What a new request is told, before its body is read: another replica takes it."""
    return Overloaded(
        "This gateway is shutting down and takes nothing new. Nothing was bought; try again.",
        code="shutting_down",
        reason="shutting_down",
        should_retry=True,
        retry_after_seconds=RETRY_SECONDS,
        close=True,
        fault=Fault.NOBODY,
    )
