"""Putting an answer where it is found again: by the next identical request, and by who comes back.

Nobody waits for it for long, and no answer fails because of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime
from typing import Any, TypeAlias

from gateway.domain.call import Span
from gateway.domain.errors import GatewayError
from gateway.domain.ledger import Settlement
from gateway.domain.record import record
from gateway.ports import Cache, CachedMeta, CacheEntry, Clock, Form, Parts
from gateway.relay import headers, replay
from gateway.relay.body import Room, Spool, held
from gateway.relay.chunks import once
from gateway.relay.flights import Flight, Flights
from gateway.relay.landing import Landing
from gateway.relay.plan import CachePolicy, Plan, Way
from gateway.relay.replay import Splice
from gateway.relay.results import Results

log = logging.getLogger(__name__)

KEEP_SECONDS = 0.5
"""How long an answer waits for the cache, so that the next identical request finds it there."""
PAUSE_SECONDS = 5.0
"""Before a result that could not be kept is tried again."""
LOOK_SECONDS = 0.5

Body: TypeAlias = Parts | AsyncGenerator[bytes, None]


@record
class Keeping:
    """Whether a call's picture is kept for whoever comes back, and whether for an
    Idempotency-Key, which is longer."""

    result: bool = True
    idempotent: bool = False


@record
class Bought:
    """A purchase that is over and settled. ``common`` are the headers of its answer, whoever
    reads it."""

    flight: Flight
    plan: Plan
    way: Way
    landing: Landing
    spool: Spool
    settlement: Settlement
    common: headers.Headers


class Keeper:
    """Keeps answers for one pipeline."""

    def __init__(
        self,
        *,
        cache: Cache,
        policy: CachePolicy,
        results: Results,
        flights: Flights,
        room: Room,
        clock: Clock,
    ) -> None:
        self._cache = cache
        self.policy = policy
        """As of now: another one may be set."""
        self._results = results
        self._flights = flights
        self._room = room
        self._clock = clock

    async def keep(self, bought: Bought, keeping: Keeping) -> None:
        """Puts the answer away. Its flight can be watched until that is done, however long a store
        takes; the caller waits for a moment only."""
        flight, spool = bought.flight, bought.spool
        if self._is_kept_at_once(bought, keeping):
            self._flights.close(flight)
            return
        spool.share()

        async def put() -> None:
            try:
                await self._put(bought, keeping)
            except Exception:
                log.exception("an answer was not kept", extra={"request_id": flight.rid})
            finally:
                self._flights.close(flight)
                spool.close()

        flight.keeping = self._flights.errand(put())
        await _ended(flight.keeping, KEEP_SECONDS)

    def _is_kept_at_once(self, bought: Bought, keeping: Keeping) -> bool:
        """Whether the answer is where it has to be without any waiting: in memory, or nowhere. A
        task, a timer and their turns of the loop are 50 us."""
        if keeping.result or bought.landing.error is not None:
            return False
        try:
            cached = self._cached(bought)
            if cached is None:
                return True
            body = _body(bought)
            return isinstance(body, Parts) and self._cache.put_at_once(cached, body)
        except Exception:
            # It is paid for: whatever goes wrong with a copy, its client gets it.
            log.exception("an answer was not kept", extra={"request_id": bought.flight.rid})
            return True

    async def _put(self, bought: Bought, keeping: Keeping) -> None:
        error, at = bought.landing.error, self._clock.now()
        if error is not None:
            # Has no picture in it, so that nobody minds, and somebody may have paid for it.
            await self._results.keep(
                bought.flight.rid,
                _of_error(bought, at, error),
                once(error.content),
                idempotent=keeping.idempotent,
            )
            return
        cached = self._cached(bought)
        body = _body(bought)
        if isinstance(body, Parts):
            # A store that keeps both makes them of one copy.
            body.beside = cached
        kept = not keeping.result or await self._keep_result(bought, at, keeping, body)
        if cached is not None:
            # What is cached has the same bytes as the result.
            again = body.again() if isinstance(body, Parts) else _body(bought)
            async with aclosing(again) as chunks:
                await self._cache.put(cached.key, cached.meta, chunks, cached.ttl_seconds)
        if not kept:
            await self._keep_trying(bought, at, keeping)

    async def _keep_result(
        self, bought: Bought, at: datetime, keeping: Keeping, body: Body
    ) -> bool:
        """Whether it is kept, or never can be."""
        landing = bought.landing
        size = replay.length(_pieces(landing))
        if not self._results.takes(size):
            return True
        meta = _as_result(
            bought,
            at,
            size,
            form=Form.EVENTS if landing.json is None else Form.JSON,
            streamable=landing.streamable and landing.json is not None,
        )
        async with aclosing(body) as chunks:
            return await self._results.keep(
                bought.flight.rid, meta, chunks, idempotent=keeping.idempotent
            )

    async def _keep_trying(self, bought: Bought, at: datetime, keeping: Keeping) -> None:
        """What was paid for waits here for its store to come back, as long as it would be kept
        there: who comes back to this process gets it meanwhile. A process that ends, or runs out
        of room, waits for nobody."""
        log.warning(
            "a result cannot be kept yet; it can be had from this process",
            extra={"request_id": bought.flight.rid},
        )
        seconds = self._results.kept_for(idempotent=False).total_seconds()
        until = next_try = self._clock.monotonic()
        until += seconds
        next_try += PAUSE_SECONDS
        while (now := self._clock.monotonic()) < until:
            if self._flights.draining or self._room.is_tight:
                break
            if now >= next_try:
                if await self._keep_result(bought, at, keeping, _body(bought)):
                    return
                next_try = now + PAUSE_SECONDS
            await asyncio.sleep(LOOK_SECONDS)
        log.error("a result was never kept", extra={"request_id": bought.flight.rid})

    def _cached(self, bought: Bought) -> CacheEntry | None:
        """What the cache is to have: a whole, priced answer of the model that was asked for, in
        its JSON form."""
        plan, way, landing = bought.plan, bought.way, bought.landing
        form, reading = landing.json, landing.reading
        if form is None or reading is None or reading.hosted or not plan.keep:
            return None
        # What was repaired otherwise than for the first way is not what the fingerprint stands for.
        if way.model is not plan.asked or way.quote.row is None or way.call is not None:
            return None
        size = replay.length(form)
        if bought.settlement.images != plan.call.n or size > self.policy.max_entry_bytes:
            return None
        meta = _meta(bought, self._clock.now(), size, streamable=landing.streamable)
        return CacheEntry(plan.fingerprint, meta, self.policy.ttl_seconds)


async def _ended(task: asyncio.Task[None], seconds: float) -> None:
    """Waits until it has, or for so long: ``asyncio.wait`` of one task, for a third of its cost."""
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()

    def wake(_: object = None) -> None:
        if not waiter.done():
            waiter.set_result(None)

    timer = loop.call_later(seconds, wake)
    task.add_done_callback(wake)
    try:
        await waiter
    finally:
        timer.cancel()
        task.remove_done_callback(wake)


def _pieces(landing: Landing) -> Splice:
    return landing.json or (Span(0, landing.upto),)


def _body(bought: Bought) -> Body:
    """The answer as it is kept, of whose spool the keeper has a share."""
    return held(bought.spool, _pieces(bought.landing))


def _meta(bought: Bought, stored_at: datetime, size_bytes: int, **more: Any) -> CachedMeta:
    way, settlement, reading = bought.way, bought.settlement, bought.landing.reading
    return CachedMeta(
        stored_at=stored_at,
        cost=settlement.cost,
        images=settlement.images,
        model_served=way.target.model,
        upstream=way.upstream.name,
        size_bytes=size_bytes,
        usage=settlement.usage,
        size=reading.answer.size if reading else "",
        quality=reading.answer.quality if reading else "",
        price_id=way.quote.price_id,
        **more,
    )


def _as_result(
    bought: Bought,
    stored_at: datetime,
    size_bytes: int,
    advice: headers.Headers = (),
    **more: Any,
) -> CachedMeta:
    settlement = bought.settlement
    said = [pair for pair in bought.common if pair[0] != "content-type"]
    return _meta(
        bought,
        stored_at,
        size_bytes,
        team=bought.plan.caller.team.id,
        operation=bought.plan.call.operation.value,
        headers=(*said, *headers.of_cost(settlement.cost, settlement.basis), *advice),
        **more,
    )


def _of_error(bought: Bought, stored_at: datetime, error: GatewayError) -> CachedMeta:
    advice, size = headers.of_advice(error), len(error.content)
    return _as_result(bought, stored_at, size, advice, status=error.status)
