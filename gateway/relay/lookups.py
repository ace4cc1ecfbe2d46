"""Responses, asked for again: shown, deleted, cancelled, and what was their input. Passed on to
where they live, for the team that they belong to; nothing of it costs (contract 3.4)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import aclosing
from urllib.parse import parse_qsl, quote, urlencode

from gateway.domain.call import Operation
from gateway.domain.errors import BodyTooLarge, NotServed, UpstreamRefused
from gateway.domain.owned import Owned, OwnedKind
from gateway.ports import Ownership
from gateway.relay.flights import Head
from gateway.relay.passing import Errand, Passing, Visit
from gateway.relay.references import References, not_owned

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

    def __init__(
        self, passing: Passing, references: References, ownership: Ownership, *, enabled: bool
    ) -> None:
        self.enabled = enabled
        """As of now: it may be switched off."""
        self._passing = passing
        self._references = references
        self._ownership = ownership

    async def show(self, visit: Visit) -> Head:
        """``GET /responses/{id}``, as events where it is asked for so."""
        owned = await self._owned(visit)
        asked = _asked(visit, OF_SHOWING)
        accept = EVENTS if "stream=true" in asked else "application/json"
        return await self._forwarded(visit, owned, "GET", asked, accept)

    async def items(self, visit: Visit) -> Head:
        """``GET /responses/{id}/input_items``."""
        owned = await self._owned(visit)
        return await self._forwarded(visit, owned, "GET", "/input_items" + _asked(visit, OF_ITEMS))

    async def cancel(self, visit: Visit) -> Head:
        """``POST /responses/{id}/cancel``: whoever bought it hears of its end, and settles."""
        owned = await self._owned(visit)
        length = 0
        async with aclosing(self._passing.arriving(visit)) as chunks:
            async for chunk in chunks:
                length += len(chunk)
                if length > MAX_BODY_BYTES:
                    raise BodyTooLarge("A cancellation has no body.", close=True)
        return await self._forwarded(visit, owned, "POST", "/cancel")

    async def delete(self, visit: Visit) -> Head:
        """``DELETE /responses/{id}``: at the upstream, and then here. Where it is not there any
        more, its row goes too."""
        owned = await self._owned(visit)
        return await self._passing.to_the_end(visit, self._delete(visit, owned))

    async def _delete(self, visit: Visit, owned: Owned) -> Head:
        try:
            reply = await self._passing.send(visit, Errand("DELETE", _path(owned), owned.anchor))
        except UpstreamRefused as error:
            if error.status != 404:
                raise
            await self._ownership.disown(owned.team, owned.id)
            raise not_owned(OwnedKind.RESPONSE, owned.id) from error
        content = await self._passing.whole(visit, reply)
        await self._ownership.disown(owned.team, owned.id)
        return self._passing.answer(visit, content, reply)

    async def _owned(self, visit: Visit) -> Owned:
        if not self.enabled:
            raise NotServed("/v1/responses is switched off on this gateway. Ask its operator.")
        caller = await self._passing.enter(visit)
        return await self._references.one(caller, OwnedKind.RESPONSE, visit.names[0])

    async def _forwarded(
        self, visit: Visit, owned: Owned, method: str, rest: str, accept: str = "application/json"
    ) -> Head:
        errand = Errand(
            method,
            _path(owned) + rest,
            owned.anchor,
            accept=accept,
            max_response_bytes=MAX_ANSWER_BYTES,
        )
        try:
            reply = await self._passing.send(visit, errand)
        except UpstreamRefused as error:
            if error.status != 404:
                raise
            raise not_owned(OwnedKind.RESPONSE, owned.id) from error
        return self._passing.head(visit, reply)


def _path(owned: Owned) -> str:
    return f"{Operation.RESPONSE.path}/{quote(owned.id, safe='')}"


def _asked(visit: Visit, known: Iterable[str]) -> str:
    """What of a query is passed on, with its question mark."""
    pairs = [(name, value) for name, value in parse_qsl(visit.query) if name in known]
    return f"?{urlencode(pairs)}" if pairs else ""
