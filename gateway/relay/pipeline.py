"""The life of a request.

::

    Arrival --read--> Call --plan--> Plan --reserve--> Held --open--> Reply --settle--> Receipt

``answer`` tells it up to the point where the client waits. ``_fly`` is the part that the client
cannot cancel: reserve, open, land, settle, keep, hand over, in this order.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from gateway.domain.call import Call, Operation
from gateway.domain.charge import Ending, charge
from gateway.domain.errors import (
    ClientGone,
    Evidence,
    GatewayError,
    Internal,
    LedgerUnavailable,
    Overloaded,
)
from gateway.domain.ledger import Basis, Entry, Event, Held, Outcome, Replay, Settlement
from gateway.domain.quota import Demand, Grant
from gateway.domain.receipt import Receipt, Timings
from gateway.ports import Cache, Cached, CachedMeta, Clock, Ledger, Outgoing, Provider, Reply
from gateway.relay import headers, replay
from gateway.relay.admission import Admission
from gateway.relay.body import Room, Spool, edited, edited_length, spliced
from gateway.relay.failover import ERROR_BODY_BYTES, refusal
from gateway.relay.flights import Client, Flight, Flights, Head
from gateway.relay.keyring import KeyRing
from gateway.relay.landing import Landing, failed, land_events, land_json
from gateway.relay.meter import EventMeter, JsonMeter, error_event, is_partial
from gateway.relay.plan import CachePolicy, CacheWish, Plan, Planner
from gateway.relay.read import ReadRules, reader_for
from gateway.relay.skim import Event as SkimmedEvent

log = logging.getLogger(__name__)

MEMORY_BODY_BYTES = 1024 * 1024
"""A request's body over this goes to disk: it may wait there for minutes."""
SETTLE_PAUSES_SECONDS = (0.1, 0.5, 1.0)
MAX_PAUSE_SECONDS = 30.0
KEEP_SECONDS = 0.5
"""How long an answer waits for the cache, so that the next identical request finds it there."""
REST_SECONDS = 5.0
"""How long a stream may stay open behind its last picture."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """Who and what is at the door. ``body`` has not been read; ``at`` is the clock's seconds."""

    rid: str
    operation: Operation
    secret: str | None
    content_type: str
    content_encoding: str | None
    content_length: int | None
    wish: CacheWish
    idempotency_key: str | None
    body: AsyncIterator[bytes]
    client: Client
    at: float


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
        ledger: Ledger,
        cache: Cache,
        policy: CachePolicy,
        provider: Provider,
        rules: ReadRules,
        room: Room,
        flights: Flights,
        clock: Clock,
        log_prompts: bool = False,
    ) -> None:
        self._keyring = keyring
        self._planner = planner
        self._admission = admission
        self._ledger = ledger
        self._cache = cache
        self._policy = policy
        self._provider = provider
        self._rules = rules
        self._room = room
        self._flights = flights
        self._clock = clock
        self._log_prompts = log_prompts

    async def answer(self, arrival: Arrival) -> Answer:
        """The whole story. Whatever can go wrong with a request is an answer too; ``ClientGone``
        is one that nobody will read."""
        so_far = Receipt(arrival.rid, arrival.operation.value, 0)
        body = Spool(self._room, MEMORY_BODY_BYTES)
        try:
            caller = await self._keyring.identify(arrival.secret)
            so_far = replace(so_far, team=caller.team.id, key_id=caller.key.id)
            call = await self._read(arrival, body)
            seconds = self._clock.monotonic() - arrival.at
            so_far = _with_call(so_far, call, seconds, self._prompt(call))
            plan = await self._planner.plan(caller, call, arrival.wish, self._clock.now())
            so_far = _with_plan(so_far, plan)
            if plan.cached is not None:
                return await self._replay(arrival, plan, plan.cached, so_far)
            flight = self._launch(arrival, plan, body, so_far)
        except GatewayError as error:
            return _refused(so_far, error)
        finally:
            body.close()
        try:
            return Answer(await flight.head(), flight.receipt)
        except GatewayError as error:
            return Answer(headers.error_head(error, arrival.rid), flight.receipt, _stage(error))

    def _prompt(self, call: Call) -> str | None:
        prompt = call.parameters.get("prompt")
        return prompt if self._log_prompts and isinstance(prompt, str) else None

    async def _read(self, arrival: Arrival, body: Spool) -> Call:
        """Takes the body in, once, while the scanners look at it."""
        reader = reader_for(
            arrival.operation,
            arrival.content_type,
            arrival.content_encoding,
            arrival.content_length,
            self._rules,
        )
        async for chunk in arrival.body:
            reader.feed(chunk)
            await body.write(chunk)
        return reader.close()

    async def _replay(
        self, arrival: Arrival, plan: Plan, cached: Cached, so_far: Receipt
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
            *headers.of_call(arrival.rid, plan, call.stream),
            *headers.of_age(meta.stored_at, now),
            *headers.of_cost(0, Basis.NONE),
            *headers.of_rates(grant.standings),
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

    def _launch(self, arrival: Arrival, plan: Plan, body: Spool, so_far: Receipt) -> Flight:
        body.share()
        return self._flights.launch(
            arrival.rid,
            arrival.client,
            lambda flight: self._fly(flight, arrival, plan, body, so_far),
        )

    async def _fly(
        self, flight: Flight, arrival: Arrival, plan: Plan, body: Spool, so_far: Receipt
    ) -> Receipt:
        """From the reservation to the settlement. The client may watch; it cannot cancel."""
        try:
            grant = await self._admission.pass_gate(flight.rid, plan, plan.demand)
            try:
                held = await self._hold(flight, arrival, plan)
                reserved = self._clock.monotonic() - arrival.at
                so_far = replace(
                    so_far,
                    degraded=grant.degraded,
                    timings=replace(so_far.timings, reserving=reserved - so_far.timings.reading),
                )
                return await self._buy(flight, plan, body, grant, held, so_far)
            finally:
                await self._leave(flight, plan)
        except GatewayError as error:
            flight.refuse(error)
            return _failed(so_far, error)
        except Exception:
            log.exception("a flight crashed", extra={"request_id": flight.rid})
            crash = _crash(flight.rid)
            flight.refuse(crash)
            return replace(_failed(so_far, crash), cost=so_far.bound, posted=False)
        finally:
            body.close()

    async def _hold(self, flight: Flight, arrival: Arrival, plan: Plan) -> Held:
        """The reservation, and the last look at the client before anything is sent.

        Raises what ``Admission.hold`` does, and ``ClientGone``; nothing is then held for long.
        """
        nothing = Settlement(flight.rid, Event.VOID, Outcome.REFUSED, Basis.NONE)
        try:
            held = await self._admission.hold(
                flight.rid, plan, arrival.idempotency_key, self._clock.now()
            )
        except LedgerUnavailable:
            # It may yet be written, after nobody waits for it: a void behind it takes it back.
            self._flights.errand(self._settle_later(nothing))
            raise
        if arrival.client.gone.is_set():
            await self._settle(nothing)
            raise ClientGone("reserved")
        return held

    async def _leave(self, flight: Flight, plan: Plan) -> None:
        """Gives the slot back. Whatever goes wrong here changes nothing for the call."""
        try:
            await self._admission.leave(flight.rid, plan)
        except Exception:
            log.exception("a slot was not given back", extra={"request_id": flight.rid})

    async def _buy(
        self, flight: Flight, plan: Plan, body: Spool, grant: Grant, held: Held, so_far: Receipt
    ) -> Receipt:
        """Opens, lands, settles, keeps and hands over: what is bought here is always booked."""
        spool = Spool(self._room)
        reply: Reply | None = None
        started = self._clock.monotonic()
        marks = {"started": started}
        try:
            said: headers.Headers = ()
            try:
                reply = await self._open(plan, body)
                marks["opened"] = self._clock.monotonic()
                said = (
                    *headers.of_call(flight.rid, plan, plan.call.stream),
                    *headers.of_upstream(reply.headers),
                    *headers.of_rates(grant.standings),
                )
                landing = await self._land(flight, plan, reply, spool, said, marks)
            except GatewayError as error:
                landing = failed(error)
            if landing.error is not None:
                _name_it(landing.error, flight.rid, _upstream_rid(reply))
            landed = self._clock.monotonic()
            settlement = charge(flight.rid, plan.quote, _completed(landing.ending, plan.call))
            entry = await self._settle(settlement)
            settled = self._clock.monotonic()
            await self._keep(plan, landing, spool, settlement)
            timings = replace(
                so_far.timings,
                upstream_first_byte=marks.get("opened", landed) - started,
                first_image=_first_image(plan, landing, marks, landed) - started,
                upstream=landed - started,
                settling=settled - landed,
            )
            receipt = _with_purchase(so_far, reply, settlement, entry, timings)
            if landing.error is not None:
                await _break_off(flight, spool, landing.error)
                return _failed(receipt, landing.error)
            balances = entry.balances if entry else held.balances
            said = (
                *said,
                *headers.of_cost(receipt.cost, receipt.basis),
                *headers.of_budget(plan.lines, balances),
            )
            _hand_over(flight, plan, landing, spool, said)
            if landing.rest is not None:
                await _pass_the_rest(landing.rest, spool)
            return receipt
        except Exception:
            # A stream that has begun must not end as if it were whole.
            await _break_off(flight, spool, _crash(flight.rid))
            raise
        finally:
            spool.finish()
            spool.close()
            if reply is not None:
                await reply.aclose()

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
        marks: dict[str, float],
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
                marks.setdefault("first", self._clock.monotonic())
            if call.stream:
                _begin_stream(flight, spool, (*said, *headers.of_bound(plan.quote)))

        meter = EventMeter(call.operation, upstream)
        return await land_events(reply, spool, meter, call.n, begin, as_json=not call.stream)

    async def _settle(self, settlement: Settlement) -> Entry | None:
        """Books the ending. None: the ledger is away, and it goes on being tried behind the
        answer; the hold stands until then, or until the sweep."""
        settlement = replace(settlement, at=self._clock.now())
        for pause in SETTLE_PAUSES_SECONDS:
            try:
                return await self._ledger.settle(settlement)
            except LedgerUnavailable:
                await asyncio.sleep(pause)
        log.error(
            "a settlement cannot be written yet; its hold stands",
            extra={"request_id": settlement.rid, "cost_nanousd": settlement.cost},
        )
        self._flights.errand(self._settle_later(settlement))
        return None

    async def _settle_later(self, settlement: Settlement) -> None:
        """Tries until the ledger is back. Also right after the sweep: a late truth corrects it."""
        pause = SETTLE_PAUSES_SECONDS[0]
        while True:
            try:
                await self._ledger.settle(settlement)
            except LedgerUnavailable:
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE_SECONDS)
            else:
                return

    async def _keep(
        self, plan: Plan, landing: Landing, spool: Spool, settlement: Settlement
    ) -> None:
        """Puts a whole, priced answer into the cache, in its JSON form."""
        reading, form = landing.reading, landing.json
        if reading is None or form is None or not plan.keep or reading.hosted:
            return
        size = replay.length(form)
        if settlement.images != plan.call.n or size > self._policy.max_entry_bytes:
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
                    await self._cache.put(plan.fingerprint, meta, chunks, self._policy.ttl_seconds)
            except Exception:
                log.exception("an answer was not kept", extra={"key": plan.fingerprint})
            finally:
                spool.close()

        await self._flights.within(KEEP_SECONDS, put())


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


def _crash(rid: str) -> Internal:
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


def _first_image(plan: Plan, landing: Landing, marks: dict[str, float], landed: float) -> float:
    """When the first picture of a stream was there, partial or whole; else when it began."""
    whole = plan.call.stream and landing.reading is not None
    return marks.get("first", landed if whole else marks["started"])


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


def _with_call(receipt: Receipt, call: Call, seconds: float, prompt: str | None) -> Receipt:
    return replace(
        receipt,
        model=call.model,
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
        cache=plan.cache,
        bound=plan.quote.bound.amount,
        price_id=plan.quote.price_id,
    )


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


def _refused(receipt: Receipt, error: GatewayError) -> Answer:
    failed_receipt = _failed(receipt, error)
    head = headers.error_head(error, receipt.rid)
    return Answer(head, lambda: _known(failed_receipt), _stage(error))


def _stage(error: GatewayError) -> str:
    return error.stage if isinstance(error, ClientGone) else ""


def _failed(receipt: Receipt, error: GatewayError) -> Receipt:
    return replace(receipt, status=error.status, reason=error.reason, code=error.code)


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
