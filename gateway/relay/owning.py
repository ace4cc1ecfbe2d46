"""Writing down whose a response is, and all that it has put out, before its answer may leave.

Whoever has an id of another team's is told that there is no such thing (``references.py``), so
what is not written down here is nobody's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from datetime import timedelta

from gateway.domain.call import Call, Json
from gateway.domain.errors import LedgerUnavailable
from gateway.domain.owned import Anchor, Owned, OwnedKind
from gateway.domain.team import Caller
from gateway.ports import Clock, Ownership
from gateway.relay.flights import Flights
from gateway.relay.meter_response import Told

log = logging.getLogger(__name__)

PAUSES_SECONDS = (0.1, 0.5)
LATER_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Behind an answer that could not wait for it any longer."""


class Owning:
    """Records what responses leave at upstreams, for ``keep``: as long as the provider has it."""

    def __init__(
        self, ownership: Ownership, flights: Flights, clock: Clock, keep: timedelta
    ) -> None:
        self._ownership = ownership
        self._flights = flights
        self._clock = clock
        self.keep = keep
        """As of now: another one may be set."""

    async def own(self, caller: Caller, call: Call, anchor: Anchor, told: Told) -> None:
        """Durable when it returns, mostly: a store that is away holds no paid answer up for long,
        and is tried again behind it."""
        rows = self._rows(caller, call, anchor, told)
        if rows and not await self._record(rows, PAUSES_SECONDS):
            log.error("a response has no owner yet: the store is away", extra={"id": told.id})
            self._flights.errand(self._later(rows, told.id))

    async def _later(self, rows: list[Owned], id: str) -> None:
        if not await self._record(rows, LATER_SECONDS):
            log.error("a response was never given an owner", extra={"id": id})

    async def _record(self, rows: list[Owned], pauses: tuple[float, ...]) -> bool:
        for pause in (*pauses, None):
            try:
                await self._ownership.record(rows)
            except LedgerUnavailable:
                if pause is not None:
                    await asyncio.sleep(pause)
            else:
                return True
        return False

    def _rows(self, caller: Caller, call: Call, anchor: Anchor, told: Told) -> list[Owned]:
        now, stored = self._clock.now(), call.asks is None or call.asks.stored
        return [
            Owned(
                id, kind, caller.team.id, caller.key.id, anchor, now, now + self.keep,
                detail=_detail(kind, call, told),
            )
            for id, kind in told.ids
            if stored or kind is not OwnedKind.RESPONSE
        ]  # fmt: skip


def _detail(kind: OwnedKind, call: Call, told: Told) -> Mapping[str, Json]:
    if kind is OwnedKind.RESPONSE:
        return conversation(call, told)
    detail: dict[str, Json] = {"response": told.id}
    if kind is OwnedKind.ITEM:
        detail["context_tokens"] = conversation(call, told)["context_tokens"]
    return detail


def conversation(call: Call, told: Told) -> dict[str, Json]:
    """How large a conversation has become: what the next response of it begins with."""
    ask = call.asks
    pictures = told.answer.images + len(call.inputs) + (ask.context_pictures if ask else 0)
    tokens = told.tokens
    if tokens is None and ask is not None:
        tokens = ask.text_bytes + ask.context_tokens + ask.max_output_tokens
    return {"context_tokens": tokens or 0, "pictures": pictures}
