"""Responses, asked for again: shown, deleted, cancelled, and what was their input. Passed on to
where they live, for the team that they belong to; nothing of it costs (contract 3.4)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import aclosing
from urllib.parse import parse_qsl, urlencode

from gateway.domain.errors import BodyTooLarge, NotServed
from gateway.domain.owned import Owned, OwnedKind
from gateway.relay.flights import Head
from gateway.relay.forwarding import Forwarding
from gateway.relay.media import JSON_TYPE
from gateway.relay.passing import Errand, Visit
from gateway.relay.references import path_of

MAX_BODY_BYTES = 64 * 1024
"""Of a cancellation: the SDKs send none at all."""
MAX_ANSWER_BYTES = 512 * 1024 * 1024
"""A response repeats every picture that it has drawn."""
EVENTS = "text/event-stream, application/json"
OF_SHOWING = frozenset({"include", "include[]", "stream", "starting_after", "include_obfuscation"})
OF_ITEMS = frozenset({"include", "include[]", "limit", "order", "after"})


class Lookups:
    """Answers for the responses that there are; each public method is a handler of
    ``api/passed.py``."""

    def __init__(self, forwarding: Forwarding, *, enabled: bool) -> None:
        self.enabled = enabled
        """As of now: it may be switched off."""
        self._forwarding = forwarding

    async def show(self, visit: Visit) -> Head:
        """``GET /responses/{id}``, as events where it is asked for so."""
        owned = await self._owned(visit)
        asked = _asked(visit, OF_SHOWING)
        accept = EVENTS if "stream=true" in asked else JSON_TYPE
        return await self._show(visit, owned, "GET", asked, accept)

    async def items(self, visit: Visit) -> Head:
        """``GET /responses/{id}/input_items``."""
        owned = await self._owned(visit)
        return await self._show(visit, owned, "GET", "/input_items" + _asked(visit, OF_ITEMS))

    async def cancel(self, visit: Visit) -> Head:
        """``POST /responses/{id}/cancel``: whoever bought it hears of its end, and settles."""
        owned = await self._owned(visit)
        length = 0
        async with aclosing(self._forwarding.arriving(visit)) as chunks:
            async for chunk in chunks:
                length += len(chunk)
                if length > MAX_BODY_BYTES:
                    raise BodyTooLarge("A cancellation has no body.", close=True)
        return await self._show(visit, owned, "POST", "/cancel")

    async def delete(self, visit: Visit) -> Head:
        """``DELETE /responses/{id}``."""
        owned = await self._owned(visit)
        return await self._forwarding.delete(visit, owned)

    async def _owned(self, visit: Visit) -> Owned:
        if not self.enabled:
            raise NotServed("/v1/responses is switched off on this gateway. Ask its operator.")
        return await self._forwarding.enter(visit, OwnedKind.RESPONSE)

    async def _show(
        self, visit: Visit, owned: Owned, method: str, rest: str, accept: str = JSON_TYPE
    ) -> Head:
        errand = Errand(
            method,
            path_of(owned.kind, owned.id) + rest,
            owned.anchor,
            accept=accept,
            max_response_bytes=MAX_ANSWER_BYTES,
        )
        return await self._forwarding.show(visit, owned, errand)


def _asked(visit: Visit, known: Iterable[str]) -> str:
    """What of a query is passed on, with its question mark."""
    pairs = [(name, value) for name, value in parse_qsl(visit.query) if name in known]
    return f"?{urlencode(pairs)}" if pairs else ""
