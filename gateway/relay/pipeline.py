"""The life of a request.

::

    Arrival --read--> Call --plan--> Plan --reserve--> Held --open--> Reply --settle--> Receipt

``answer`` tells it up to the point where the client waits. ``_fly`` is the part that the client
cannot cancel: the reservation, and the purchase (``purchase.py``) up to its settlement.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace

from gateway.domain.call import Call, Inquiry, Operation
from gateway.domain.errors import ClientGone, GatewayError, LedgerUnavailable
from gateway.domain.ledger import Held, Outcome, Replay
from gateway.domain.quota import Demand
from gateway.domain.receipt import Receipt, Timings
from gateway.domain.team import Caller
from gateway.ports import Cached, Clock, Ledger
from gateway.relay import headers, replay
from gateway.relay.admission import Admission
from gateway.relay.body import Room, Spool
from gateway.relay.budget import BudgetView
from gateway.relay.drain import shutting_down
from gateway.relay.estimate import Estimates, estimate_reader
from gateway.relay.flights import Client, Flight, Flights, Head
from gateway.relay.keyring import KeyRing
from gateway.relay.meter import JsonMeter
from gateway.relay.plan import CacheWish, Plan, Planner, lines_of
from gateway.relay.purchase import Purchases, crash, failed_receipt
from gateway.relay.read import ReadRules, reader_for
from gateway.relay.turnstile import Turnstile

log = logging.getLogger(__name__)

MEMORY_BODY_BYTES = 1024 * 1024
"""A request's body over this goes to disk: it may wait there for minutes."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """Who and what is at the door. ``body`` has not been read; ``at`` is the clock's seconds."""

    rid: str
    operation: Operation | Inquiry
    secret: str | None
    content_type: str
    content_encoding: str | None
    content_length: int | None
    wish: CacheWish
    idempotency_key: str | None
    body: AsyncIterator[bytes]
    client: Client
    at: float
    again: bool = False
    """Whether it may be a try that is not the first: something may be under way for it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the client gets, and in time the receipt: it waits for the end of the flight, which
    may be long after the client has left. ``gone`` is the stage at which it left, or empty: there
    is nobody to send the head to."""

    head: Head
    receipt: Callable[[], Awaitable[Receipt]]
    gone: str = ""


class Pipeline:
    """Everything a request meets, in the order it meets it."""

    def __init__(
        self,
        *,
        keyring: KeyRing,
        planner: Planner,
        admission: Admission,
        purchases: Purchases,
        estimates: Estimates,
        budgets: BudgetView,
        ledger: Ledger,
        rules: ReadRules,
        room: Room,
        flights: Flights,
        clock: Clock,
        turnstile: Turnstile,
        log_prompts: bool = False,
    ) -> None:
        self._keyring = keyring
        self._planner = planner
        self._admission = admission
        self._purchases = purchases
        self._estimates = estimates
        self._budgets = budgets
        self._ledger = ledger
        self._rules = rules
        self._room = room
        self._flights = flights
        self._clock = clock
        self._turnstile = turnstile
        self._log_prompts = log_prompts

    def replace(self, planner: Planner, rules: ReadRules, *, log_prompts: bool) -> None:
        """From now on these hold. A request that is under way ends with what it began with."""
        self._planner = planner
        self._rules = rules
        self._log_prompts = log_prompts

    async def answer(self, arrival: Arrival) -> Answer:
        """The whole story. Whatever can go wrong with a request is an answer too; ``ClientGone``
        is one that nobody will read."""
        so_far = Receipt(arrival.rid, arrival.operation.value, 0)
        body = Spool(self._room, MEMORY_BODY_BYTES, for_request=True)
        said: headers.Headers = ()
        caller: Caller | None = None
        planner, rules = self._planner, self._rules
        try:
            self._refuse_if_new(arrival)
            caller = await self._keyring.identify(arrival.secret)
            so_far = replace(so_far, team=caller.team.id, key_id=caller.key.id)
            if isinstance(arrival.operation, Inquiry):
                with self._estimates.turn(caller):
                    so_far, call = await self._taken_in(arrival, body, so_far, rules)
                    return await self._estimate(arrival, planner, caller, call, so_far)
            so_far, call = await self._taken_in(arrival, body, so_far, rules)
            plan = await planner.plan(caller, call, arrival.wish, self._clock.now())
            so_far = _with_plan(so_far, plan)
            said = headers.of_call(arrival.rid, plan, call.stream)
            if plan.cached is not None:
                return await self._replay(arrival, plan, plan.cached, so_far, said)
            if self._flights.draining:
                raise shutting_down()
            flight = self._launch(arrival, plan, body, so_far, said)
        except GatewayError as error:
            return _refused(so_far, error, (*said, *await self._unspent(caller, error)))
        finally:
            body.close()
        try:
            return Answer(await flight.head(), flight.receipt)
        except GatewayError as error:
            head = headers.error_head(error, arrival.rid, flight.said)
            return Answer(head, flight.receipt, _stage(error))

    def _refuse_if_new(self, arrival: Arrival) -> None:
        """While the process ends, what is surely new goes elsewhere, the sooner the better."""
        if self._flights.draining and not arrival.again:
            raise shutting_down()

    async def _unspent(self, caller: Caller | None, error: GatewayError) -> headers.Headers:
        """What a refusal says of money: none was spent, and what is left of the budgets."""
        if caller is None or isinstance(error, ClientGone):
            return ()
        return (*headers.NOTHING_SPENT, *await self._left(caller))

    async def _left(self, caller: Caller) -> headers.Headers:
        lines = lines_of(caller, self._clock.now())
        return headers.of_budget(*await self._budgets.balances(lines))

    def _prompt(self, call: Call) -> str | None:
        prompt = call.parameters.get("prompt")
        return prompt if self._log_prompts and isinstance(prompt, str) else None

    async def _taken_in(
        self, arrival: Arrival, body: Spool, so_far: Receipt, rules: ReadRules
    ) -> tuple[Receipt, Call]:
        call = await self._read(arrival, body, rules)
        seconds = self._clock.monotonic() - arrival.at
        return _with_call(so_far, call, seconds, self._prompt(call)), call

    async def _read(self, arrival: Arrival, body: Spool, rules: ReadRules) -> Call:
        """Takes the body in, once, while the scanners look at it. That of an estimate is not kept:
        nobody reads it again."""
        announced = (
            *(arrival.content_type, arrival.content_encoding),
            *(arrival.content_length, rules),
        )
        if isinstance(arrival.operation, Inquiry):
            reader = estimate_reader(*announced)
            async for chunk in arrival.body:
                reader.feed(chunk)
            return reader.close()
        reader = reader_for(arrival.operation, *announced)
        async for chunk in arrival.body:
            self._refuse_if_new(arrival)
            reader.feed(chunk)
            await body.write(chunk)
        return reader.close()

    async def _estimate(
        self, arrival: Arrival, planner: Planner, caller: Caller, call: Call, so_far: Receipt
    ) -> Answer:
        head, plan = await self._estimates.answer(arrival.rid, planner, caller, call, arrival.wish)
        if plan is not None:
            so_far = _with_plan(so_far, plan)
        receipt = replace(so_far, status=head.status)
        return Answer(head, lambda: _known(receipt))

    async def _replay(
        self,
        arrival: Arrival,
        plan: Plan,
        cached: Cached,
        so_far: Receipt,
        known: headers.Headers,
    ) -> Answer:
        """A kept answer: an upstream whose price is nothing, so nothing has to be held."""
        call, meta, now = plan.call, cached.meta, self._clock.now()
        demand = Demand(requests=1, images=0, slots=0)
        grant = await self._admission.pass_gate(arrival.rid, plan, demand)
        await self._ledger.replay(
            Replay(
                arrival.rid,
                plan.caller.team.id,
                plan.caller.key.id,
                plan.model.name,
                call.operation,
                meta.images,
                meta.cost,
                now,
            )
        )
        said = (
            *known,
            *headers.of_age(meta.stored_at, now),
            *headers.NOTHING_SPENT,
            *headers.of_rates(grant.standings),
            *await self._left(plan.caller),
        )
        if call.stream:
            head = Head(200, said, None, lambda: _as_stream(call.operation, cached))
        else:
            head = Head(200, said, meta.size_bytes, cached.chunks)
        receipt = replace(
            so_far,
            status=200,
            outcome=Outcome.REPLAYED,
            avoided=meta.cost,
            images=meta.images,
            price_id=meta.price_id,
            degraded=grant.degraded,
        )
        return Answer(head, lambda: _known(receipt))

    def _launch(
        self, arrival: Arrival, plan: Plan, body: Spool, so_far: Receipt, known: headers.Headers
    ) -> Flight:
        body.share()
        return self._flights.launch(
            arrival.rid,
            arrival.client,
            lambda flight: self._fly(flight, arrival, plan, body, so_far, known),
        )

    async def _fly(
        self,
        flight: Flight,
        arrival: Arrival,
        plan: Plan,
        body: Spool,
        so_far: Receipt,
        known: headers.Headers,
    ) -> Receipt:
        """From the reservation to the settlement. The client may watch; it cannot cancel.

        ``known`` are the headers that every answer to the call has.
        """
        flight.said = (*known, *headers.NOTHING_SPENT)
        flight.stage, team = "queued", plan.caller.team
        came = self._clock.monotonic()
        turn = self._turnstile.turn(team.id, team.weight, plan.upstream.name, arrival.client.gone)
        try:
            async with turn:
                flight.stage = "upstream"
                timings = replace(so_far.timings, queueing=self._clock.monotonic() - came)
                so_far = replace(so_far, timings=timings)
                return await self._fly_on(flight, arrival, plan, body, so_far, known)
        except GatewayError as error:
            flight.said = (*flight.said, *await self._left(plan.caller))
            flight.refuse(error)
            return failed_receipt(so_far, error)
        except Exception:
            log.exception("a flight crashed", extra={"request_id": flight.rid})
            fault = crash(flight.rid)
            flight.refuse(fault)
            return replace(failed_receipt(so_far, fault), cost=so_far.bound, posted=False)
        finally:
            body.close()

    async def _fly_on(
        self,
        flight: Flight,
        arrival: Arrival,
        plan: Plan,
        body: Spool,
        so_far: Receipt,
        known: headers.Headers,
    ) -> Receipt:
        """With a place: the gate, the reservation, the purchase."""
        grant = await self._admission.pass_gate(flight.rid, plan, plan.demand)
        back = headers.given_back(grant.standings, plan.demand)
        flight.said = (*flight.said, *headers.of_rates(back))
        try:
            held = await self._hold(flight, arrival, plan)
            flight.said = (*known, *headers.of_rates(grant.standings))
            before = arrival.at + so_far.timings.reading + so_far.timings.queueing
            so_far = replace(
                so_far,
                degraded=grant.degraded,
                timings=replace(so_far.timings, reserving=self._clock.monotonic() - before),
            )
            return await self._purchases.buy(flight, plan, body, held, so_far)
        finally:
            await self._leave(flight, plan)

    async def _hold(self, flight: Flight, arrival: Arrival, plan: Plan) -> Held:
        """The reservation, and the last look at the client before anything is sent.

        Raises what ``Admission.hold`` does, and ``ClientGone``; nothing is then held for long.
        """
        try:
            held = await self._admission.hold(flight.rid, plan, arrival.idempotency_key)
        except LedgerUnavailable:
            # It may yet be written, after nobody waits for it: a void behind it takes it back.
            self._purchases.give_back_later(flight.rid)
            raise
        if arrival.client.gone.is_set():
            await self._purchases.give_back(flight.rid)
            raise ClientGone("reserved")
        return held

    async def _leave(self, flight: Flight, plan: Plan) -> None:
        """Gives the slot back. Whatever goes wrong here changes nothing for the call."""
        try:
            await self._admission.leave(flight.rid, plan)
        except Exception:
            log.exception("a slot was not given back", extra={"request_id": flight.rid})


def _with_call(receipt: Receipt, call: Call, seconds: float, prompt: str | None) -> Receipt:
    return replace(
        receipt,
        model=call.model,
        size=call.size,
        quality=call.quality,
        output_format=call.output_format,
        stream=call.stream,
        images_asked=call.n,
        bytes_in=call.body_bytes,
        prompt=prompt,
        timings=Timings(reading=seconds),
    )


def _with_plan(receipt: Receipt, plan: Plan) -> Receipt:
    return replace(
        receipt,
        model_label=plan.model.label or plan.model.name,
        model_served=plan.model.target.model,
        upstream=plan.upstream.name,
        # As it is bought: what was left open may be pinned.
        size=plan.call.size,
        quality=plan.call.quality,
        output_format=plan.call.output_format,
        cache=plan.cache,
        bound=plan.quote.bound.amount,
        price_id=plan.quote.price_id,
    )


def _refused(receipt: Receipt, error: GatewayError, said: headers.Headers) -> Answer:
    ended = failed_receipt(receipt, error)
    head = headers.error_head(error, receipt.rid, said)
    return Answer(head, lambda: _known(ended), _stage(error))


def _stage(error: GatewayError) -> str:
    return error.stage if isinstance(error, ClientGone) else ""


async def _as_stream(operation: Operation, cached: Cached) -> AsyncIterator[bytes]:
    """A kept JSON answer as its one completed event: a look for its small members, then a pass."""
    meter = JsonMeter(operation, cached.meta.upstream)
    async for chunk in cached.chunks():
        meter.feed(chunk)
    form = replay.completed_event(operation, meter.document())
    if form is None:
        raise RuntimeError("only what has the form of a stream is kept as streamable")
    async for piece in replay.pieces(form, cached.chunks()):
        yield piece


async def _known(receipt: Receipt) -> Receipt:
    return receipt
