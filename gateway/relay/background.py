"""What an upstream goes on with by itself: a response that was asked for in the background.

Its answer came at once and says nothing of what it will cost. So whoever bought it looks after it
until it is over, at the same upstream and with the same key.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from gateway.domain.errors import GatewayError
from gateway.domain.owned import OwnedKind
from gateway.ports import Clock, Outgoing, Upstream
from gateway.relay.media import JSON_TYPE
from gateway.relay.meter_response import ResponseMeter, Told
from gateway.relay.references import path_of

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 10.0
GROWTH = 1.5


class Background:
    """Looks after responses, each for at most ``seconds`` after its purchase began: its hold ends
    then."""

    def __init__(
        self,
        clock: Clock,
        seconds: float,
        agent: str,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self.seconds = seconds
        """As of now: another one may be set."""
        self._agent = agent
        self._sleep = sleep

    async def end_of(
        self, upstream: Upstream, credential: str, id: str, began: float
    ) -> Told | None:
        """What a response said of itself in the end. None where nobody can tell: it is gone, or it
        was not over in time. ``began`` is the clock's seconds."""
        pause = FIRST_PAUSE_SECONDS
        while self._clock.monotonic() - began + pause < self.seconds:
            await self._sleep(pause)
            pause = min(GROWTH * pause, LONGEST_PAUSE_SECONDS)
            try:
                status, told = await self._look(upstream, credential, id)
            except GatewayError as error:
                log.info("a response in the background cannot be looked at", extra=_said(id, error))
                continue
            if status == 404:
                return None
            if told is not None and not told.runs:
                return told
        log.warning("a response in the background was not over in time", extra={"response": id})
        return None

    async def _look(self, upstream: Upstream, credential: str, id: str) -> tuple[int, Told | None]:
        """Its status as HTTP says it, and, of a 200, what it says of itself."""
        path = path_of(OwnedKind.RESPONSE, id)
        asked = (("accept", JSON_TYPE), ("user-agent", self._agent))
        reply = await upstream.send(Outgoing("GET", path, asked), credential)
        try:
            if reply.status != 200:
                return reply.status, None
            meter = ResponseMeter(upstream.name)
            async for chunk in reply.chunks():
                meter.feed(chunk)
            return reply.status, meter.close()
        finally:
            await reply.aclose()


def _said(id: str, error: GatewayError) -> dict[str, str]:
    return {"response": id, "error": str(error)}
