"""The purchase: what is bought here is always booked.

Opens, lands, settles, keeps and hands over, in this order, inside a flight that no client can
cancel. The settlement is durable before the last byte of an answer may leave.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import timedelta

from gateway.domain.call import Call
from gateway.domain.charge import Ending, charge
from gateway.domain.errors import Evidence, GatewayError, Internal, LedgerUnavailable, Overloaded
from gateway.domain.ledger import Basis, Entry, Event, Held, Outcome, Settlement
from gateway.domain.receipt import Receipt, Timings
from gateway.ports import (
    Cache,
    CachedMeta,
    Clock,
    Ledger,
    NotKnown,
    Outgoing,
    Provider,
    Reply,
    Safe,
)
from gateway.relay import headers, replay
from gateway.relay.body import Room, Spool, edited, edited_length, spliced
from gateway.relay.budget import BudgetView
from gateway.relay.factors import Factors
from gateway.relay.failover import ERROR_BODY_BYTES, refusal
from gateway.relay.flights import Flight, Flights, Head
from gateway.relay.landing import Landing, failed, land_events, land_json
from gateway.relay.meter import EventMeter, JsonMeter, error_event, is_partial
from gateway.relay.plan import CachePolicy, Plan
from gateway.relay.skim import Event as SkimmedEvent

log = logging.getLogger(__name__)

SETTLE_PAUSES_SECONDS = (0.1, 0.5, 1.0)
SETTLE_SECONDS = 2.0
"""A ledger that took so long to say nothing is not asked again before the answer goes out."""
MAX_PAUSE_SECONDS = 30.0
SAFE_SECONDS = 5.0
"""How long an answer waits for a disk that takes its settlement while the ledger is away."""
MAX_VOIDS = 1000
KEEP_SECONDS = 0.5
"""How long an answer waits for the cache, so that the next identical request finds it there."""
REST_SECONDS = 5.0
"""How long a stream may stay open behind its last picture."""


@dataclass(slots=True)
class Marks:
    """When a purchase reached its stages, in the clock's seconds; 0 where it did not."""

    started: float
    opened: float = 0.0
    first: float = 0.0
    landed: float = 0.0
    settled: float = 0.0

    def timings(self, so_far: Receipt) -> Timings:
        """The stages as durations, beside those before the purchase."""
        return replace(
            so_far.timings,
            upstream_first_byte=(self.opened or self.landed) - self.started,
            first_image=(self.first or self.started) - self.started,
            upstream=self.landed - self.started,
            settling=self.settled - self.landed,
        )


class Purchases:
    """Buys from upstreams, for one pipeline. ``keep`` is how long the ledger remembers a closed
    call; None is for ever."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        safe: Safe,
        cache: Cache,
        policy: CachePolicy,
        provider: Provider,
        room: Room,
        flights: Flights,
        clock: Clock,
        budgets: BudgetView,
        factors: Factors,
        keep: timedelta | None = None,
    ) -> None:
        self._keep_closed = keep
        self._factors = factors
        self._ledger = ledger
        self._safe = safe
        self._cache = cache
        self.policy = policy
        """As of now: another one may be set."""
        self._provider = provider
        self._room = room
        self._flights = flights
        self._clock = clock
        self._budgets = budgets
        self._voids = 0
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """Settlements that the ledger has not taken yet."""
        return self._waiting

    async def buy(
        self, flight: Flight, plan: Plan, body: Spool, held: Held, so_far: Receipt
    ) -> Receipt:
        """What is held becomes a picture, and a receipt. Whatever the upstream does is settled.

        ``flight.said`` are the headers so far: of the call, and of its rates.
        """
        spool = Spool(self._room)
        marks = Marks(self._clock.monotonic())
        reply: Reply | None = None
        said = flight.said
        try:
            try:
                reply = await self._open(plan, body)
                marks.opened = self._clock.monotonic()
                said = (*said, *headers.of_upstream(reply.headers))
                early = (
                    *said,
                    *headers.of_bound(plan.quote),
                    *headers.of_budget(plan.lines, held.balances),
                )
                landing = await self._land(flight, plan, reply, spool, early, marks)
            except GatewayError as error:
                landing = failed(error)
            except Exception:
                # Ours, and perhaps after the upstream was asked: it is booked as unknown at once.
                log.exception("a purchase crashed", extra={"request_id": flight.rid})
                fault = crash(flight.rid)
                landing = Landing(Ending(Outcome.UNKNOWN), error=fault)
            marks.landed = self._clock.monotonic()
            if landing.error is not None:
                _name_it(landing.error, flight.rid, _upstream_rid(reply))
            elif plan.call.stream:
                marks.first = marks.first or marks.landed
            settlement, entry = await self._book(flight, plan, landing, spool, marks)
            receipt = _with_purchase(so_far, reply, settlement, entry, marks.timings(so_far))
            balances = entry.balances if entry else held.balances
            self._budgets.learn(plan.lines, balances)
            spent = (
                *headers.of_cost(receipt.cost, receipt.basis),
                *headers.of_budget(plan.lines, balances),
            )
            if landing.error is not None:
                sent = reply is not None or settlement.event is not Event.VOID
                flight.said = (*said, *headers.of_attempts(int(sent)), *spent)
                await _break_off(flight, spool, landing.error)
                return failed_receipt(receipt, landing.error)
            _hand_over(flight, plan, landing, spool, (*said, *spent))
            if landing.rest is not None:
                await _pass_the_rest(landing.rest, spool)
            return receipt
        finally:
            spool.finish()
            spool.close()
            if reply is not None:
                await reply.aclose()

    async def give_back(self, rid: str) -> None:
        """Voids a hold for which nothing was sent."""
        await self._settle(_nothing(rid))

    def give_back_later(self, rid: str) -> None:
        """Voids a hold that may yet be written, after nobody waits for it.

        Of a ledger that is away for long only so many are remembered: a hold that was written after
        all then expires, and costs its bound until somebody corrects it.
        """
        if self._voids < MAX_VOIDS:
            self._voids += 1
            task = self._flights.errand(self._settle_later(_nothing(rid)))
            task.add_done_callback(self._void_done)

    def _void_done(self, _: object) -> None:
        self._voids -= 1

    async def _open(self, plan: Plan, body: Spool) -> Reply:
        """The upstream's answer, whatever its status. Raises where none came."""
        request = self._provider(plan.call, plan.model.target)
        async with aclosing(edited(body, request.edits)) as content:
            try:
                return await plan.upstream.send(
                    Outgoing(
                        "POST",
                        request.path,
                        request.headers,
                        content,
                        edited_length(body.length, request.edits),
                    )
                )
            except OSError as error:
                # The body could not be read back, and not a byte of it has left.
                raise Overloaded(
                    "The gateway could not read the request back from its disk. Nothing was "
                    "bought; try again in a few seconds.",
                    retry_after_seconds=5,
                ) from error

    async def _land(
        self,
        flight: Flight,
        plan: Plan,
        reply: Reply,
        spool: Spool,
        said: headers.Headers,
        marks: Marks,
    ) -> Landing:
        """Takes the answer in, whatever its form; only a stream for a stream leaves early."""
        call, upstream = plan.call, plan.upstream.name
        if reply.status != 200:
            return failed(await _refusal(reply, upstream))
        if not _is_stream(reply):
            return await land_json(
                reply, spool, JsonMeter(call.operation, upstream), as_stream=call.stream
            )

        def begin(event: SkimmedEvent) -> None:
            if is_partial(event):
                marks.first = marks.first or self._clock.monotonic()
            if call.stream:
                _begin_stream(flight, spool, said)

        meter = EventMeter(call.operation, upstream)
        return await land_events(reply, spool, meter, call.n, begin, as_json=not call.stream)

    async def _book(
        self, flight: Flight, plan: Plan, landing: Landing, spool: Spool, marks: Marks
    ) -> tuple[Settlement, Entry | None]:
        """Settles and keeps. A fault of our own in between ends a stream that has begun with an
        error: it must not look whole."""
        try:
            settlement = charge(flight.rid, plan.quote, _completed(landing.ending, plan.call))
            entry = await self._settle(settlement)
            marks.settled = self._clock.monotonic()
            self._compare(plan, settlement)
            await self._keep(plan, landing, spool, settlement)
        except Exception:
            await _break_off(flight, spool, crash(flight.rid))
            raise
        return settlement, entry

    async def recover(self) -> None:
        """Goes on with the settlements of processes that are gone."""
        for settlement in await self._safe.left_behind():
            log.warning(
                "a settlement that another process left behind is posted now",
                extra={"request_id": settlement.rid, "cost_nanousd": settlement.cost},
            )
            self._flights.errand(self._settle_later(settlement, kept=True), durable=True)

    def _compare(self, plan: Plan, settlement: Settlement) -> None:
        """Sets what was measured against the bound, for the bounds to come."""
        if settlement.basis is Basis.USAGE:
            served = plan.model.target.model
            self._factors.observe(plan.upstream.name, served, plan.quote.base, settlement.cost)

    async def _settle(self, settlement: Settlement) -> Entry | None:
        """Books the ending. None: the ledger is away, so the ending is kept on disk and goes on
        being tried behind the answer; the hold stands until then, or until the sweep."""
        settlement = replace(settlement, at=self._clock.now())
        began = self._clock.monotonic()
        for pause in SETTLE_PAUSES_SECONDS:
            try:
                return await self._ledger.settle(settlement)
            except LedgerUnavailable:
                if self._clock.monotonic() - began > SETTLE_SECONDS:
                    break
                await asyncio.sleep(pause)
            except asyncio.CancelledError:
                # The process ends before the ledger has answered: what it knows must not.
                await self._put_away(settlement)
                raise
            except Exception:
                # What the ledger has against it is for a person. The picture is paid for.
                log.exception(
                    "the ledger refuses a settlement", extra={"request_id": settlement.rid}
                )
                break
        kept = await self._put_away(settlement)
        self._flights.errand(self._settle_later(settlement, kept=kept), durable=kept)
        return None

    async def _put_away(self, settlement: Settlement) -> bool:
        """Whether a settlement outlives this process. An answer that is paid for is handed over
        even where it does not."""
        said = {"request_id": settlement.rid, "cost_nanousd": settlement.cost}
        try:
            async with asyncio.timeout(SAFE_SECONDS):
                await self._safe.keep(settlement)
        except OSError as error:
            log.error(
                "a settlement can be written nowhere yet and is in memory alone; its hold stands",
                extra={**said, "error": str(error) or "the disk does not answer"},
            )
            return False
        log.error(
            "a settlement cannot be written yet; it is kept on disk, and its hold stands",
            extra=said,
        )
        return True

    async def _settle_later(self, settlement: Settlement, *, kept: bool = False) -> None:
        """Tries until the ledger is back. Also right after the sweep: a late truth corrects it."""
        said = {"request_id": settlement.rid, "cost_nanousd": settlement.cost}
        pause = SETTLE_PAUSES_SECONDS[0]
        self._waiting += 1
        try:
            while True:
                try:
                    await self._ledger.settle(settlement)
                except LedgerUnavailable:
                    await asyncio.sleep(random.uniform(pause / 2, pause))
                    pause = min(2 * pause, MAX_PAUSE_SECONDS)
                else:
                    break
        except NotKnown:
            if self._is_forgotten(settlement):
                log.warning(
                    "a settlement of a call that the ledger has forgotten is dropped: the call was "
                    "closed, and is older than ledger.keep",
                    extra=said,
                )
                self._waiting -= 1
                await self._safe.settled(settlement.rid)
                return
            # It goes on being counted as waiting, and stays on disk: a person has to look.
            log.error(
                "the ledger has no reservation for a settlement: is it an older copy of itself?",
                extra=said,
            )
            return
        except Exception:
            log.exception("a settlement cannot be posted as it is", extra=said)
            return
        except asyncio.CancelledError:
            if kept:
                log.warning("a settlement stays on disk; the next start posts it", extra=said)
            elif settlement.event is not Event.VOID:
                log.error(
                    "a settlement was never written; its hold expires at the bound", extra=said
                )
            raise
        self._waiting -= 1
        await self._safe.settled(settlement.rid)

    def _is_forgotten(self, settlement: Settlement) -> bool:
        """Whether its hold may be gone because of its age: only a closed one ever is."""
        keep, at = self._keep_closed, settlement.at
        return keep is not None and at is not None and at < self._clock.now() - keep

    async def _keep(
        self, plan: Plan, landing: Landing, spool: Spool, settlement: Settlement
    ) -> None:
        """Puts a whole, priced answer into the cache, in its JSON form."""
        reading, form = landing.reading, landing.json
        if reading is None or form is None or not plan.keep or reading.hosted:
            return
        size = replay.length(form)
        if settlement.images != plan.call.n or size > self.policy.max_entry_bytes:
            return
        meta = CachedMeta(
            stored_at=self._clock.now(),
            cost=settlement.cost,
            images=settlement.images,
            model_served=plan.model.target.model,
            upstream=plan.upstream.name,
            size_bytes=size,
            streamable=landing.events is not None,
            usage=settlement.usage,
            size=reading.answer.size,
            quality=reading.answer.quality,
            price_id=plan.quote.price_id,
        )
        spool.share()

        async def put() -> None:
            try:
                async with aclosing(spliced(spool, form)) as chunks:
                    await self._cache.put(plan.fingerprint, meta, chunks, self.policy.ttl_seconds)
            except Exception:
                log.exception("an answer was not kept", extra={"key": plan.fingerprint})
            finally:
                spool.close()

        await self._flights.within(KEEP_SECONDS, put())


def _nothing(rid: str) -> Settlement:
    return Settlement(rid, Event.VOID, Outcome.REFUSED, Basis.NONE)


def _hand_over(
    flight: Flight, plan: Plan, landing: Landing, spool: Spool, said: headers.Headers
) -> None:
    """Lets the client have what is verified and settled, in the form it asked for."""
    if plan.call.stream and landing.streamed:
        _begin_stream(flight, spool, said)
        spool.publish(landing.upto)
        return
    form = landing.events if plan.call.stream else landing.json
    if form is None:
        raise RuntimeError("an answer lands in the form that was asked for, or with an error")
    spool.share()
    length = None if plan.call.stream else replay.length(form)
    flight.answer(Head(200, said, length, lambda: spliced(spool, form), spool.close))


def _begin_stream(flight: Flight, spool: Spool, said: headers.Headers) -> None:
    """Lets the client follow the spool. Harmless when it does already."""
    if not flight.answered:
        spool.share()
        flight.answer(Head(200, said, None, spool.follow, spool.close))


async def _break_off(flight: Flight, spool: Spool, error: GatewayError) -> None:
    """Ends an answer with an error: as a status while that is possible, else as an event."""
    if not flight.answered:
        flight.refuse(error)
        return
    spool.forget_unpublished()
    try:
        await spool.write(error_event(error))
    except GatewayError:
        log.warning("no room for an error event", extra={"request_id": flight.rid})
    spool.publish()


async def _pass_the_rest(rest: AsyncGenerator[int, None], spool: Spool) -> None:
    """What an upstream still sends behind the last picture: `[DONE]`, mostly, or nothing."""
    try:
        async with asyncio.timeout(REST_SECONDS), aclosing(rest):
            async for upto in rest:
                spool.publish(upto)
    except (GatewayError, TimeoutError):
        # The pictures are delivered and booked: a ragged end takes nothing away.
        return


def crash(rid: str) -> Internal:
    """What a client is told when the fault is ours and its money may be gone."""
    return Internal(
        "The gateway failed in a way it should not. If something was bought it stays on the "
        f"books; quote {rid} to the gateway's operator.",
        should_retry=False,
    )


async def _refusal(reply: Reply, upstream: str) -> GatewayError:
    """The error that any answer but a 200 amounts to."""
    text = b""
    try:
        async for chunk in reply.chunks():
            text += chunk
            if len(text) > ERROR_BODY_BYTES:
                break
    except GatewayError:
        # The status has been said, and it decides; its text was cut.
        text = b""
    return refusal(reply.status, reply.headers, text, upstream)


def _upstream_rid(reply: Reply | None) -> str:
    return reply.headers.get("x-request-id", "")[:128] if reply else ""


def _name_it(error: GatewayError, rid: str, upstream_rid: str) -> None:
    """An error says under which names it can be looked up: at the provider, and, where it may
    have cost money, on the books."""
    error.upstream_rid = upstream_rid
    if error.evidence is not Evidence.NOT_BILLED:
        error.message = f"{error.message} Request id: {rid}."


def _completed(ending: Ending, call: Call) -> Ending:
    """What the answer does not say of itself, as it was asked for."""
    if ending.answer is None:
        return ending
    asked = ending.answer
    return replace(
        ending,
        answer=replace(
            asked,
            size=asked.size or call.size,
            quality=asked.quality or call.quality,
            output_format=asked.output_format or call.output_format,
            input_images=len(call.inputs),
        ),
    )


def _is_stream(reply: Reply) -> bool:
    return reply.headers.get("content-type", "").strip().lower().startswith("text/event-stream")


def _with_purchase(
    receipt: Receipt,
    reply: Reply | None,
    settlement: Settlement,
    entry: Entry | None,
    timings: Timings,
) -> Receipt:
    return replace(
        receipt,
        status=200,
        upstream_status=reply.status if reply else 0,
        upstream_rid=_upstream_rid(reply),
        outcome=settlement.outcome,
        basis=settlement.basis,
        cost=entry.cost if entry else settlement.cost,
        usage=settlement.usage,
        images=settlement.images,
        flags=settlement.flags,
        posted=entry is not None,
        timings=timings,
    )


def failed_receipt(receipt: Receipt, error: GatewayError) -> Receipt:
    """A receipt, ended by an error."""
    return replace(receipt, status=error.status, reason=error.reason, code=error.code)
