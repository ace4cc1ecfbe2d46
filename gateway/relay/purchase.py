"""The purchase: what is bought here is always booked.

Opens, lands, settles, keeps and hands over, in this order, inside a flight that no client can
cancel. The settlement is durable before the last byte of an answer may leave.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import timedelta

from gateway.domain.call import Call, Operation
from gateway.domain.charge import Ending, charge
from gateway.domain.errors import (
    Evidence,
    GatewayError,
    Internal,
    LedgerUnavailable,
    UpstreamRefused,
)
from gateway.domain.ledger import Basis, Entry, Event, Held, Outcome, Settlement
from gateway.domain.owned import Anchor
from gateway.domain.price import Answer
from gateway.domain.receipt import Receipt, Timings
from gateway.domain.trace import Trace
from gateway.ports import (
    Clock,
    Growing,
    Ledger,
    NotKnown,
    Safe,
)
from gateway.relay import headers, replay
from gateway.relay.arrival import Draft, of_error
from gateway.relay.attempts import Attempts, Failed, Opened
from gateway.relay.background import Background
from gateway.relay.body import Room, Spool, held, spliced
from gateway.relay.budget import BudgetView
from gateway.relay.events import Event as SkimmedEvent
from gateway.relay.factors import Factors
from gateway.relay.flights import Flight, Flights, Shown, StreamEnd
from gateway.relay.joining import Joining
from gateway.relay.keeping import Bought, Keeper, Keeping
from gateway.relay.landing import Landing, PictureTaker, Taker, failed
from gateway.relay.landing_response import ResponseTaker, landed
from gateway.relay.meter import is_partial
from gateway.relay.meter_response import Told
from gateway.relay.owning import Owning
from gateway.relay.plan import Plan, Way
from gateway.relay.trail import Trail
from gateway.relay.turnstile import Place

log = logging.getLogger(__name__)

SETTLE_PAUSES_SECONDS = (0.1, 0.5, 1.0)
SETTLE_SECONDS = 2.0
"""A ledger that took so long to say nothing is not asked again before the answer goes out."""
TAKERS: Mapping[Operation, Callable[[Call], Taker]] = {
    Operation.GENERATION: PictureTaker,
    Operation.EDIT: PictureTaker,
    Operation.RESPONSE: ResponseTaker,
}
"""Who takes an operation's answers in."""
MAX_PAUSE_SECONDS = 30.0
SAFE_SECONDS = 5.0
"""How long an answer waits for a disk that takes its settlement while the ledger is away."""
MAX_VOIDS = 1000
REST_SECONDS = 5.0
"""How long a stream may stay open behind its last picture."""


@dataclass(slots=True)
class Marks:
    """When a purchase reached its stages, in the clock's seconds; 0 where it did not. Those before
    it are seconds already. ``degraded``: a local gate let it in."""

    started: float
    reading: float = 0.0
    queueing: float = 0.0
    reserving: float = 0.0
    queued_at: float = 0.0
    degraded: bool = False
    opened: float = 0.0
    first: float = 0.0
    landed: float = 0.0
    settled: float = 0.0

    def timings(self) -> Timings:
        """All stages as durations."""
        return Timings(
            reading=self.reading,
            reserving=self.reserving,
            upstream_first_byte=(self.opened or self.landed) - self.started,
            first_image=(self.first or self.started) - self.started,
            upstream=self.landed - self.started,
            settling=self.settled - self.landed,
            queueing=self.queueing,
            queued_at=self.queued_at,
        )


class Course:
    """Where a purchase goes now, and whether it may go elsewhere."""

    __slots__ = ("_flight", "_place", "way")

    def __init__(self, flight: Flight, place: Place, way: Way) -> None:
        self._flight = flight
        self._place = place
        self.way = way

    def enter(self, way: Way) -> bool:
        """Whether an attempt may go there, with a place. The headers of a stream that has begun
        have named its model."""
        if way is self.way:
            return True
        if self._flight.answered and way.model is not self.way.model:
            return False
        if not self._place.move(way.upstream.name):
            return False
        self.way = way
        return True


@dataclass(slots=True)
class Beginning:
    """Lets clients follow a stream's spool, when called; harmless when they do already. What its
    head says is worked out then: most answers are shown when they are whole. ``tried`` is None
    where no upstream has answered yet."""

    purchases: Purchases
    flight: Flight
    plan: Plan
    way: Way
    spool: Spool
    held: Held
    tried: Opened | None

    def __call__(self) -> None:
        if not self.flight.answered:
            self.flight.show(
                self.purchases.streaming(self.flight, self.spool, self.common, self.own)
            )

    @property
    def common(self) -> headers.Headers:
        if self.tried is None:
            return (*headers.of_form(self.plan.call.stream), *headers.of_way(self.plan, self.way))
        return _common(self.plan, self.way, self.tried, sent=True)

    @property
    def own(self) -> headers.Headers:
        """What a stream says to whom it was bought for, before its cost is known."""
        return (
            *self.flight.said,
            *headers.of_bound(self.way.quote),
            *headers.of_budget(self.plan.lines, self.held.balances),
        )


class Purchases:
    """Buys from upstreams, for one pipeline. ``keep`` is how long the ledger remembers a closed
    call; None is for ever."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        safe: Safe,
        attempts: Attempts,
        room: Room,
        flights: Flights,
        clock: Clock,
        budgets: BudgetView,
        factors: Factors,
        joining: Joining,
        keeper: Keeper,
        owning: Owning,
        background: Background,
        keep_alive_seconds: float | None = None,
        keep: timedelta | None = None,
        propagate: bool = True,
    ) -> None:
        """``propagate``: upstreams are told which trace a call belongs to."""
        self._propagate = propagate
        self._keep_closed = keep
        self._joining = joining
        self._keeper = keeper
        self._owning = owning
        self._background = background
        self.keep_alive_seconds = keep_alive_seconds
        """As of now: another one may be set."""
        self._factors = factors
        self._ledger = ledger
        self._safe = safe
        self._attempts = attempts
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
        self,
        flight: Flight,
        plan: Plan,
        body: Spool,
        held: Held,
        draft: Draft,
        marks: Marks,
        keeping: Keeping,
        place: Place,
    ) -> Receipt:
        """What is held becomes a picture, and a receipt. Whatever the upstream does is settled.

        ``flight.said`` are the headers so far: of the request, and of its rates. ``place`` is
        where the plan begins, and goes along to where the call is sent.
        """
        spool = Spool(self._room)
        trail = None if draft.arrival.trace is None else self._trail(draft.arrival.trace, marks)
        tried: Opened | Failed | None = None
        way = plan.way
        course = Course(flight, place, way)
        taker = TAKERS[plan.call.operation](plan.call)
        flight.error_event = taker.error_event
        silence = None
        if plan.call.stream and self.keep_alive_seconds is not None:
            silence = self._break_silence(
                self.keep_alive_seconds, flight, plan, course, spool, held
            )
        try:
            self._joining.begun(flight, spool)
            try:
                tried = await self._attempts.open(
                    flight.rid, plan, body, held, enter=course.enter, trail=trail
                )
                marks.opened = self._clock.monotonic()
                held, way = tried.held, tried.way
                if isinstance(tried, Failed):
                    landing = failed(tried.error)
                else:
                    begin = Beginning(self, flight, plan, way, spool, held, tried)
                    landing = await self._land(taker, begin, plan, tried, marks)
                    if landing.error is not None:
                        self._attempts.landed(tried, landing.error)
                    if plan.call.asks is not None and plan.call.asks.background:
                        landing = await self._look_after(begin, plan, tried, landing, marks)
            except GatewayError as error:
                landing = failed(error)
            except Exception:
                # Ours, and perhaps after the upstream was asked: it is booked as unknown at once.
                log.exception("a purchase crashed", extra={"request_id": flight.rid})
                fault = crash(flight.rid)
                landing = Landing(Ending(Outcome.UNKNOWN), error=fault)
            marks.landed = self._clock.monotonic()
            if landing.error is not None:
                if isinstance(landing.error, UpstreamRefused):
                    # Some providers repeat a key that they refuse.
                    landing.error.mask(way.upstream.masked)
                _name_it(landing.error, flight.rid, _upstream_rid(tried))
            elif plan.call.stream:
                marks.first = marks.first or marks.landed
            settlement, entry = await self._book(flight, plan, way, landing, spool, marks)
            found = landing.error is not None or keeping.result
            flight.joinable = settlement.event is not Event.VOID and found
            balances = entry.balances if entry else held.balances
            self._budgets.learn(plan.lines, balances)
            cost = entry.cost if entry else settlement.cost
            spent = (
                *headers.of_cost(cost, settlement.basis),
                *headers.of_budget(plan.lines, balances),
            )
            common = _common(plan, way, tried, sent=settlement.event is not Event.VOID)
            if landing.told is not None and isinstance(tried, Opened):
                await self._owning.own(plan.caller, plan.call, _anchor(tried), landing.told)
            bought = Bought(flight, plan, way, landing, spool, settlement, common)
            await self._keeper.keep(bought, keeping)
            if landing.error is not None:
                flight.said = (*flight.said, *common, *spent)
                await _break_off(flight, spool, landing.error)
            else:
                self._hand_over(bought, (*flight.say(), *spent))
                if landing.rest is not None:
                    await _pass_the_rest(landing.rest, spool)
            return _receipt(draft, plan, way, tried, trail, settlement, entry, marks, landing.error)
        finally:
            if silence is not None:
                silence.cancel()
            flight.over.set()
            spool.finish()
            spool.close()
            if isinstance(tried, Opened):
                await tried.reply.aclose()

    def _trail(self, trace: Trace, marks: Marks) -> Trail:
        return Trail(trace.context, marks.started, self._clock, propagate=self._propagate)

    def _break_silence(
        self,
        seconds: float,
        flight: Flight,
        plan: Plan,
        course: Course,
        spool: Spool,
        held: Held,
    ) -> asyncio.TimerHandle:
        """Begins a stream that has nothing to say for so long that something between the client
        and here could give it up. What goes wrong from then on is an event."""

        def begin() -> None:
            Beginning(self, flight, plan, course.way, spool, held, None)()

        return asyncio.get_running_loop().call_later(seconds, begin)

    def _hand_over(self, bought: Bought, own: headers.Headers) -> None:
        """Lets the clients have what is verified and settled, in the form that was asked for."""
        flight, spool, landing = bought.flight, bought.spool, bought.landing
        stream = bought.plan.call.stream
        if stream and landing.streamed:
            flight.show(self.streaming(flight, spool, bought.common, own))
            flight.ends_at = spool.published
            spool.publish(landing.upto)
            return
        form = landing.events if stream else landing.json
        if form is None:
            raise RuntimeError("an answer lands in the form that was asked for, or with an error")
        if flight.answered:
            # The silence was broken before the upstream said that it would answer in one piece.
            if flight.end is not None:
                flight.end.instead = lambda: spliced(spool, form)
            return
        length = None if stream else replay.length(form)

        def pieces() -> AsyncIterator[bytes]:
            return held(spool, form)

        flight.show(Shown(200, bought.common, own, length, pieces, spool.share, spool.close))

    def streaming(
        self, flight: Flight, spool: Spool, common: headers.Headers, own: headers.Headers
    ) -> Shown:
        """A stream that follows its spool as far as that is published."""
        silence = self.keep_alive_seconds
        end = flight.end = flight.end or StreamEnd()

        async def events() -> AsyncGenerator[Sequence[bytes], None]:
            async with aclosing(spool.follow(silence).groups) as groups:
                async for group in groups:
                    yield group
            if end.instead is not None:
                async for piece in end.instead():
                    yield (piece,)

        return Shown(200, common, own, None, lambda: Growing(events()), spool.share, spool.close)

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

    async def _land(
        self, taker: Taker, beginning: Beginning, plan: Plan, tried: Opened, marks: Marks
    ) -> Landing:
        """Takes the answer in, whatever its form; only a stream for a stream leaves early."""
        flight = beginning.flight

        def begin(event: SkimmedEvent) -> None:
            if is_partial(event):
                marks.first = marks.first or self._clock.monotonic()
                self._joining.saw_partial(flight)
            if plan.call.stream:
                beginning()

        async def named(told: Told) -> None:
            # In the background: from now on it can be looked at, resumed and cancelled.
            if plan.call.asks is not None and plan.call.asks.background:
                await self._owning.own(plan.caller, plan.call, _anchor(tried), told)

        return await taker.take(
            tried.reply, beginning.spool, beginning.way.upstream.name, begin, named
        )

    async def _look_after(
        self, beginning: Beginning, plan: Plan, tried: Opened, landing: Landing, marks: Marks
    ) -> Landing:
        """A response that its upstream goes on with by itself: its beginning is handed over, with
        its owner, and its end is waited for here."""
        told, form, spool = landing.told, landing.json, beginning.spool
        if told is None or not (told.runs or landing.error):
            return landing
        await self._owning.own(plan.caller, plan.call, _anchor(tried), told)
        if form is not None:
            beginning.flight.show(
                Shown(
                    200,
                    beginning.common,
                    beginning.own,
                    replay.length(form),
                    lambda: spliced(spool, form),
                    spool.share,
                    spool.close,
                )
            )
        credential = tried.ticket.credential
        ended = await self._background.end_of(
            tried.way.upstream, credential, told.id, marks.started
        )
        if ended is None:
            return replace(landing, ending=Ending(Outcome.UNKNOWN))
        return landed(ended, landing)

    async def _book(
        self, flight: Flight, plan: Plan, way: Way, landing: Landing, spool: Spool, marks: Marks
    ) -> tuple[Settlement, Entry | None]:
        """Settles. A fault of our own ends a stream that has begun with an error: it must not look
        whole."""
        try:
            settlement = charge(
                flight.rid,
                way.quote,
                _completed(landing.ending, way.call_of(plan)),
                self._clock.now(),
            )
            entry = await self._settle(settlement)
            marks.settled = self._clock.monotonic()
            self._compare(way, settlement)
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

    def _compare(self, way: Way, settlement: Settlement) -> None:
        """Sets what was measured against the bound, for the bounds to come."""
        if settlement.basis is Basis.USAGE:
            served = way.target.model
            self._factors.observe(way.upstream.name, served, way.quote.base, settlement.cost)

    async def _settle(self, settlement: Settlement) -> Entry | None:
        """Books the ending. None: the ledger is away, so the ending is kept on disk and goes on
        being tried behind the answer; the hold stands until then, or until the sweep."""
        if settlement.at is None:
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


def _nothing(rid: str) -> Settlement:
    return Settlement(rid, Event.VOID, Outcome.REFUSED, Basis.NONE)


async def _break_off(flight: Flight, spool: Spool, error: GatewayError) -> None:
    """Ends an answer with an error: as a status while that is possible, else as an event."""
    if not flight.answered:
        flight.refuse(error)
        return
    spool.forget_unpublished()
    flight.ends_at = spool.published
    try:
        await spool.write(flight.error_event(error))
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


def _common(plan: Plan, way: Way, tried: Opened | Failed | None, *, sent: bool) -> headers.Headers:
    """The headers of an answer, whoever reads it. ``sent``: where nobody has answered, whether it
    was sent all the same."""
    form_and_way = (*headers.of_form(plan.call.stream), *headers.of_way(plan, way))
    if tried is None:
        return (*form_and_way, *headers.of_attempts(int(sent)))
    said = tried.headers if isinstance(tried, Failed) else tried.reply.headers
    return (*form_and_way, *headers.of_attempts(tried.attempts), *headers.of_upstream(said))


def _upstream_rid(tried: Opened | Failed | None) -> str:
    if isinstance(tried, Opened):
        return tried.reply.headers.get("x-request-id", "")[:128]
    return "" if tried is None else tried.reply_rid


def _receipt(
    draft: Draft,
    plan: Plan,
    way: Way,
    tried: Opened | Failed | None,
    trail: Trail | None,
    settlement: Settlement,
    entry: Entry | None,
    marks: Marks,
    error: GatewayError | None,
) -> Receipt:
    """By which way a call went, what came back, and what it cost."""
    status = tried.reply.status if isinstance(tried, Opened) else tried.status if tried else 0
    cost = entry.cost if entry else settlement.cost
    ended = {"status": 200} if error is None else of_error(error)
    return draft.receipt(
        plan,
        model_label=way.model.label or way.model.name,
        model_served=way.target.model,
        upstream=way.upstream.name,
        bound=way.quote.bound.amount,
        price_id=way.quote.price_id,
        upstream_status=status,
        upstream_rid=_upstream_rid(tried),
        attempts=tried.attempts if tried else 0,
        trail=() if trail is None else tuple(trail.attempts),
        degraded=marks.degraded,
        outcome=settlement.outcome,
        basis=settlement.basis,
        cost=cost,
        # Where another final answer stands, it is not known what of that is whose.
        drawn=settlement.drawn if cost == settlement.cost else None,
        usage=settlement.usage,
        images=settlement.images,
        flags=settlement.flags,
        posted=entry is not None,
        timings=marks.timings(),
        **ended,
    )


def _name_it(error: GatewayError, rid: str, upstream_rid: str) -> None:
    """An error says under which names it can be looked up: at the provider, and, where it may
    have cost money, on the books."""
    error.upstream_rid = upstream_rid
    if error.evidence is not Evidence.NOT_BILLED:
        error.message = f"{error.message} Request id: {rid}."


def _completed(ending: Ending, call: Call) -> Ending:
    """What the answer does not say of itself, as it was asked for."""
    said = ending.answer
    if said is None:
        return ending
    inputs = len(call.inputs)
    if said.size and said.quality and said.output_format and said.input_images == inputs:
        return ending
    answer = Answer(
        said.images,
        said.usage,
        said.size or call.size,
        said.quality or call.quality,
        said.output_format or call.output_format,
        inputs,
        said.text_usage,
    )
    return Ending(ending.outcome, answer, ending.invalid_usage)


def _anchor(opened: Opened) -> Anchor:
    """Where an answer was made: what it leaves there is only known to that key's project."""
    upstream, used = opened.way.upstream, opened.ticket.credential
    mark = next((one.mark for one in upstream.credentials if one.id == used), "")
    return Anchor(upstream.name, mark)
