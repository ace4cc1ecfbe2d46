"""The life of a request.

::

    Arrival --read--> Call --plan--> Plan --reserve--> Held --open--> Reply --settle--> Receipt

``answer`` tells it up to the point where the client waits: one that comes back is led to its own
flight, one whose picture is there already gets that, and for everybody else a flight is launched.
``_fly`` is the part that no client can cancel: the reservation, and the purchase
(``purchase.py``) up to its settlement.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from gateway.domain.call import AnswerAs, Call, Inquiry, Operation
from gateway.domain.errors import ClientGone, GatewayError, LedgerUnavailable
from gateway.domain.ledger import Held, Outcome, Replay
from gateway.domain.quota import Demand, Grant
from gateway.domain.receipt import CacheResult, Receipt
from gateway.domain.team import Caller
from gateway.ports import Cached, Clock, FlightNotice, Ledger
from gateway.relay import headers
from gateway.relay.admission import Admission, KeyTaken
from gateway.relay.arrival import (
    Answer,
    Arrival,
    Draft,
    Incoming,
    Patience,
    ended,
    known,
    labels,
    of_error,
    stage,
)
from gateway.relay.body import Room, Spool
from gateway.relay.budget import BudgetView
from gateway.relay.comebacks import Comebacks, still_running
from gateway.relay.drain import shutting_down
from gateway.relay.estimate import Estimates, estimate_reader
from gateway.relay.flights import Client, Flight, Flights, Head
from gateway.relay.hosting import Hosting, NotHosted, not_hosted
from gateway.relay.joining import Joining, flight_mark
from gateway.relay.keeping import Keeping
from gateway.relay.keyring import KeyRing
from gateway.relay.news import Finished, ResultNews
from gateway.relay.plan import Plan, Planner
from gateway.relay.purchase import Marks, Purchases, crash
from gateway.relay.read import Reader, ReadRules, check_model, reader_for
from gateway.relay.read_response import remembered, response_reader
from gateway.relay.references import References, Resolved
from gateway.relay.results import Results, as_stream
from gateway.relay.running import APPLIED, running, running_head
from gateway.relay.turnstile import Place, Turnstile
from gateway.relay.users import Users

log = logging.getLogger(__name__)

READERS: Mapping[Operation, Callable[..., Reader]] = {
    Operation.GENERATION: reader_for,
    Operation.EDIT: reader_for,
    Operation.RESPONSE: response_reader,
}
"""Who reads an operation's body."""
MEMORY_BODY_BYTES = 1024 * 1024
"""A request's body over this goes to disk: it may wait there for minutes."""
MAX_TOLD = 10_000
"""Kinds of calls that are remembered as told of."""


class Pipeline:
    """Everything a request meets, in the order it meets it."""

    def __init__(
        self,
        *,
        keyring: KeyRing,
        references: References,
        planner: Planner,
        admission: Admission,
        purchases: Purchases,
        estimates: Estimates,
        budgets: BudgetView,
        ledger: Ledger,
        comebacks: Comebacks,
        joining: Joining,
        results: Results,
        hosting: Hosting | None,
        news: ResultNews | None,
        patience: Patience,
        rules: ReadRules,
        room: Room,
        flights: Flights,
        clock: Clock,
        turnstile: Turnstile,
        users: Users,
        log_prompts: bool = False,
        begun: Callable[[Receipt], None] = lambda receipt: None,
    ) -> None:
        """``begun`` hears of each call that its limits let in, before it is bought."""
        self._begun = begun
        self._told: set[tuple[str, ...]] = set()
        self._keyring = keyring
        self._references = references
        self._planner = planner
        self._admission = admission
        self._purchases = purchases
        self._estimates = estimates
        self._budgets = budgets
        self._ledger = ledger
        self._comebacks = comebacks
        self._joining = joining
        self._results = results
        self._hosting = hosting
        self._news = news
        self._patience = patience
        self._rules = rules
        self._room = room
        self._flights = flights
        self._clock = clock
        self._turnstile = turnstile
        self._users = users
        self._log_prompts = log_prompts

    def replace(
        self, planner: Planner, rules: ReadRules, patience: Patience, *, log_prompts: bool
    ) -> None:
        """From now on these hold. A call that is planned ends with what it was planned with."""
        self._planner = planner
        self._rules = rules
        self._patience = patience
        self._log_prompts = log_prompts
        self._told.clear()

    async def answer(self, arrival: Arrival) -> Answer:
        """The whole story. Whatever can go wrong with a request is an answer too; ``ClientGone``
        is one that nobody will read."""
        if arrival.asynchronous and not self._results.on:
            # A preference: without results there is nothing to come back for.
            arrival = replace(arrival, asynchronous=False)
        draft = Draft(arrival)
        body = Spool(
            self._room, MEMORY_BODY_BYTES, for_request=True, announced=arrival.content_length
        )
        changed: headers.Headers = ()
        rules = self._rules
        try:
            if self._flights.draining and not _is_again(arrival):
                raise shutting_down()
            caller = draft.caller = await self._keyring.identify(arrival.secret)
            if isinstance(arrival.operation, Inquiry):
                with self._estimates.turn(caller):
                    call = await self._taken_in(arrival, body, draft, rules)
                    caller = draft.caller = self._users.named(caller, call, arrival.user_hints)
                    found = await self._references.resolve(caller, call)
                    return await self._estimate(arrival, self._planner, caller, found, draft)
            call = await self._taken_in(arrival, body, draft, rules)
            came, call = call, self._planner.repaired(caller, call, self._clock.now())
            if call is not came:
                changed = headers.of_changes(call)
                draft.repaired(call)
            caller = draft.caller = self._users.named(caller, call, arrival.user_hints)
            found = await self._references.resolve(caller, call)
            if call.asks is not None:
                found = remembered(found)
            answer = await self._planned(arrival, caller, found, draft)
            while isinstance(answer, Plan):
                # Bought and waited for from here: two coroutines less that wait for the picture.
                flight = self._launch(arrival, answer, body, draft)
                try:
                    if arrival.asynchronous:
                        answer = await self._admitted(arrival, flight)
                    else:
                        wait = None if flight.stream else self._patience.max_wait_seconds
                        shown = await flight.own.shown(arrival.client, wait)
                        answer = Answer(shown.head(shown.own), flight.receipt, done=flight.leave)
                except TimeoutError:
                    answer = _told_to_come_back(arrival, flight)
                except KeyTaken as taken:
                    draft.vacant -= {taken.claimed.rid}
                    log.debug(
                        "an Idempotency-Key was taken meanwhile", extra={"by": taken.claimed.rid}
                    )
                    answer = await self._planned(arrival, caller, found, draft)
                except GatewayError as error:
                    head = headers.error_head(error, arrival.rid, flight.said)
                    answer = Answer(head, flight.receipt, stage(error), flight.leave)
            if call.came is not None or answer.head.status == 202:
                call = self._handed_over(caller, call, answer.head)
            head = headers.with_changes(answer.head, call)
            if head is not answer.head:
                answer = replace(answer, head=head)
            if self._hosting is None or call.answer_as is not AnswerAs.URL:
                return answer
            return await self._as_asked(self._hosting, arrival, caller, call, answer)
        except GatewayError as error:
            said = (*await self._unspent(draft.caller, error), *changed)
            return ended(draft.receipt(took_over=""), error, said)
        finally:
            body.close()

    async def _planned(
        self, arrival: Arrival, caller: Caller, found: Resolved, draft: Draft
    ) -> Answer | Plan:
        """A call that is read: whose answer it gets, or by which plan it is to be bought. What is
        configured now plans it, also where it was read, or has waited for another one, for longer
        than anything else lives."""
        while True:
            planner = self._planner
            now = self._clock.now()
            routed = planner.route_call(caller, found.call, now, found.anchor)
            earlier = None
            if _is_again(arrival) or arrival.client.away:
                earlier = await self._comebacks.earlier(arrival, routed)
                now = self._clock.now()
            if earlier is not None and earlier.rid not in draft.vacant:
                answer = await self._comebacks.answer(arrival, routed, earlier, draft)
                if isinstance(answer, Answer):
                    return answer
                draft.vacant |= {earlier.rid}
                draft.took_over = answer.took_over or draft.took_over
                continue
            plan = await planner.plan(routed, arrival.wish, now)
            if plan.cached is not None:
                return await self._replay(arrival, plan, plan.cached, draft)
            orphan = await self._comebacks.earlier(arrival, routed, orphans_only=True)
            if orphan is not None and orphan.rid not in draft.vacant:
                answer = await self._comebacks.answer(arrival, routed, orphan, draft)
                if isinstance(answer, Answer):
                    return answer
                draft.vacant |= {orphan.rid}
                draft.took_over = answer.took_over or draft.took_over
                continue
            return plan

    def _handed_over(self, caller: Caller, call: Call, head: Head) -> Call:
        """The call as it was sent for this answer, and as the answer keeps it: who does not wait
        gets a result, and results have their pictures in them."""
        if head.status == 202:
            call = replace(call, answer_as=AnswerAs.B64)
        # What was kept as it came is what another model may want repaired otherwise.
        made_by = None if call.came is None else headers.stood_in(head)
        if made_by is None:
            return call
        name, served = made_by
        return self._planner.as_served(caller, call, name or call.model, served)

    async def _as_asked(
        self, hosting: Hosting, arrival: Arrival, caller: Caller, call: Call, answer: Answer
    ) -> Answer:
        """The answer with urls in place of its pictures, as was asked for. What is bought is
        booked already, and stays to be had: among the results, or, where it is not kept there, as
        it is."""
        head = answer.head
        if head.status != 200 or head.length is None:
            return answer
        try:
            return replace(answer, head=await hosting.hosted(head, caller.team.id))
        except NotHosted as why:
            log.warning(
                "a picture cannot be put behind a url",
                extra={"request_id": arrival.rid, "error": str(why)},
            )
        except BaseException:
            head.close()
            answer.done(False)
            raise
        head = headers.with_changes(head, replace(call, answer_as=AnswerAs.B64))
        said = dict(head.headers)
        cached = said.get("x-cache") == CacheResult.HIT.value and headers.REPLAYED[0] not in said
        if not cached and not self._keeps(arrival):
            return replace(answer, head=replace(head, headers=(*head.headers, headers.NOT_HOSTED)))
        head.close()
        error = not_hosted(arrival.rid, kept=not cached)
        refusal = headers.error_head(error, arrival.rid, head.headers)
        return replace(answer, head=refusal, done=lambda delivered: answer.done(False))

    async def _admitted(self, arrival: Arrival, flight: Flight) -> Answer:
        """The answer to a client that does not wait, once money is held. Raises ``KeyTaken``."""
        await flight.admitted.wait()
        if isinstance(flight.error, KeyTaken):
            raise flight.error
        if isinstance(flight.error, GatewayError) and not flight.begun:
            head = headers.error_head(flight.error, arrival.rid, flight.said)
            return Answer(head, flight.receipt)
        flight.own.give_up()
        now = self._clock.now()
        head = running_head(running(flight.notice, now), (*flight.said, *APPLIED))
        return Answer(head, flight.receipt)

    async def _unspent(self, caller: Caller | None, error: GatewayError) -> headers.Headers:
        """What a refusal says of money: none was spent, and what is left of the budgets."""
        if caller is None or isinstance(error, ClientGone):
            return ()
        return (*headers.NOTHING_SPENT, *await self._left(caller))

    async def _left(self, caller: Caller) -> headers.Headers:
        lines = caller.lines(self._clock.now())
        return headers.of_budget(*await self._budgets.balances(lines))

    def _prompt(self, call: Call) -> str | None:
        prompt = call.parameters.get("prompt")
        return prompt if isinstance(prompt, str) else None

    async def _taken_in(
        self, arrival: Arrival, body: Spool, draft: Draft, rules: ReadRules
    ) -> Call:
        if arrival.deployment is not None:
            check_model(arrival.deployment)
        announced = arrival.content_type, arrival.content_encoding, arrival.content_length, rules
        reader: Reader
        kept: Spool | None = None  # nobody reads the body of an estimate again
        if isinstance(arrival.operation, Inquiry):
            reader = estimate_reader(*announced)
        else:
            reader, kept = READERS[arrival.operation](arrival.operation, *announced), body
        whole = arrival.body.whole()
        if whole is None:
            await self._upload(arrival, reader, kept)
        elif whole:
            reader.feed(whole)
            if kept is not None and not kept.take(whole):
                await kept.write(whole)
        call = reader.close()
        if arrival.deployment is not None:
            call = replace(call, model=arrival.deployment)
        seconds = self._clock.monotonic() - arrival.at
        draft.read(call, seconds, self._prompt(call) if self._log_prompts else None)
        return call

    async def _upload(self, arrival: Arrival, reader: Reader, kept: Spool | None) -> None:
        """Waits for a body, as long as this process takes in what is new."""
        if _is_again(arrival):
            await _take(arrival.body, reader, kept)
            return
        try:
            async with self._flights.until_draining():
                await _take(arrival.body, reader, kept)
        except TimeoutError:
            if self._flights.draining:
                raise shutting_down() from None
            raise

    async def _estimate(
        self, arrival: Arrival, planner: Planner, caller: Caller, found: Resolved, draft: Draft
    ) -> Answer:
        head, plan = await self._estimates.answer(
            arrival.rid, planner, caller, found.call, arrival.wish, found.anchor
        )
        receipt = draft.receipt(plan, status=head.status)
        return Answer(head, lambda: known(receipt))

    async def _replay(
        self,
        arrival: Arrival,
        plan: Plan,
        cached: Cached,
        draft: Draft,
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
            *headers.of_form(call.stream),
            *headers.of_request(arrival.rid, plan.cache),
            *headers.of_way(plan, plan.way),
            *headers.of_age(meta.stored_at, now),
            *headers.NOTHING_SPENT,
            *headers.of_rates(grant.standings),
            *await self._left(plan.caller),
        )
        if call.stream:
            head = Head(200, said, None, lambda: as_stream(call.operation, cached))
        else:
            head = Head(200, said, meta.size_bytes, cached.chunks)
        receipt = draft.receipt(
            plan,
            status=200,
            outcome=Outcome.REPLAYED,
            avoided=meta.cost,
            images=meta.images,
            price_id=meta.price_id,
            degraded=grant.degraded,
        )
        return Answer(head, lambda: known(receipt))

    def _launch(self, arrival: Arrival, plan: Plan, body: Spool, draft: Draft) -> Flight:
        """A flight of its own, for a client that watches it."""
        if self._flights.draining:
            raise shutting_down()
        self._room.refuse_if_full()
        body.share()
        caller, call = plan.caller, plan.call
        notice = FlightNotice(
            arrival.rid, flight_mark(plan.fingerprint, stream=call.stream), caller.team.id,
            caller.key.id, call.operation.value, plan.ways[0].model.name, call.stream, plan.at,
        )  # fmt: skip
        # Who does not wait cannot leave either.
        client = Client() if arrival.asynchronous else arrival.client
        flight = self._flights.launch(
            notice, client, lambda flight: self._fly(flight, arrival, plan, body, draft)
        )
        flight.trace = None if arrival.trace is None else arrival.trace.context
        return flight

    async def _fly(
        self, flight: Flight, arrival: Arrival, plan: Plan, body: Spool, draft: Draft
    ) -> Receipt:
        """From the reservation to the settlement. Clients may watch; they cannot cancel."""
        flight.tells, flight.awaited = arrival.asynchronous, not arrival.asynchronous
        flight.say, degraded = partial(_said_of_unspent, flight.rid, plan), False
        try:
            grant = await self._admission.pass_gate(flight.rid, plan, plan.demand)
            degraded = grant.degraded
            flight.say = partial(_said_of_unspent, flight.rid, plan, grant)
            self._is_let_in(arrival, plan, draft)
            try:
                await self._joining.announce(flight)
                flight.stage, came = "queued", self._clock.monotonic()
                place = self._turnstile.enter_at_once(plan.entrances)
                if place is None:
                    place = await self._queued(flight, plan)
                try:
                    flight.stage = "upstream"
                    entered = plan.entered_at(place.upstream)
                    queueing = self._clock.monotonic() - came
                    held = await self._hold(flight, arrival, entered)
                    flight.say = partial(_said_of_bought, flight.rid, plan, grant)
                    plan.forget_prompt()
                    # Awaited here, and not one call deeper: each coroutine between this and the
                    # upstream takes 350 bytes while a picture is painted, and is passed through
                    # whenever something comes.
                    receipt = await self._purchases.buy(
                        flight,
                        entered,
                        body,
                        held,
                        draft,
                        self._marks(draft, came, queueing, degraded=degraded),
                        Keeping(self._keeps(arrival), arrival.idempotency_key is not None),
                        place,
                    )
                finally:
                    place.leave()
            finally:
                self._leave(flight.rid, plan)
        except GatewayError as error:
            flight.said = (
                *flight.said,
                *headers.of_way(plan, plan.way),
                *await self._left(plan.caller),
            )
            flight.refuse(error)
            receipt = draft.receipt(plan, degraded=degraded, **of_error(error))
        except KeyTaken as taken:
            flight.refuse(taken)
            receipt = draft.receipt()
        except Exception:
            log.exception("a flight crashed", extra={"request_id": flight.rid})
            fault = crash(flight.rid)
            flight.refuse(fault)
            bound = plan.quote.bound.amount
            receipt = draft.receipt(
                plan, degraded=degraded, cost=bound, posted=False, **of_error(fault)
            )
        finally:
            body.close()
            self._joining.ended(flight)
        if flight.tells and flight.begun:
            self._tell(flight, receipt, idempotent=arrival.idempotency_key is not None)
        if arrival.asynchronous and flight.seat is not None:
            # It is asked for by its id: the same call anew wants another picture.
            flight.seat.leave(delivered=True)
        return receipt

    def _is_let_in(self, arrival: Arrival, plan: Plan, draft: Draft) -> None:
        """Tells of a call that its limits let in, where none that counts alike was told of."""
        kind = (plan.caller.team.id, arrival.operation, plan.cache, *labels(plan))
        if kind not in self._told:
            if len(self._told) >= MAX_TOLD:
                self._told.clear()
            self._told.add(kind)
            self._begun(draft.receipt(plan))

    async def _queued(self, flight: Flight, plan: Plan) -> Place:
        """A place of those that are all taken. Raises what ``Turnstile.enter`` does; the gate has
        then been given back."""
        team = plan.caller.team
        try:
            return await self._turnstile.enter(
                team.id, team.weight, plan.entrances, flight.deserted
            )
        except GatewayError:
            await self._admission.undo(flight.rid, plan)
            raise

    def _marks(self, draft: Draft, came: float, queueing: float, *, degraded: bool) -> Marks:
        """The stages of a purchase that begins now, of a call that ``came`` to the queue."""
        started = self._clock.monotonic()
        return Marks(
            started,
            reading=draft.reading,
            queueing=queueing,
            reserving=started - draft.arrival.at - draft.reading - queueing,
            queued_at=came - draft.arrival.at,
            degraded=degraded,
        )

    def _tell(self, flight: Flight, receipt: Receipt, *, idempotent: bool) -> None:
        """Says that an asynchronous request is over, to who wants to hear of it."""
        if self._news is None:
            return
        now = self._clock.now()
        self._news.tell(
            Finished(
                rid=flight.rid,
                team=receipt.team,
                operation=receipt.operation,
                model=receipt.model,
                status=receipt.status,
                code=receipt.code,
                images=receipt.images,
                cost=receipt.cost,
                at=now,
                expires_at=now + self._results.kept_for(idempotent=idempotent),
            )
        )

    def _keeps(self, arrival: Arrival) -> bool:
        """Whether the answer is kept for who comes back. ``no-store`` is taken at its word, except
        where the request itself asks to be answered again."""
        asked = arrival.idempotency_key is not None or arrival.asynchronous
        return self._results.on and (asked or arrival.wish.write)

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
        if flight.client.gone.is_set() and await self._joining.is_deserted(flight):
            await self._purchases.give_back(flight.rid)
            raise ClientGone("reserved")
        return held

    def _leave(self, rid: str, plan: Plan) -> None:
        """Gives the slot back. Whatever goes wrong here changes nothing for the call, and nobody
        waits for it: a store tells its board of the flight's end in the same round trip."""
        try:
            if not self._admission.leave_at_once(rid):
                self._flights.errand(self._admission.leave(rid, plan))
        except Exception:
            log.exception("a slot was not given back", extra={"request_id": rid})


def _told_to_come_back(arrival: Arrival, flight: Flight) -> Answer:
    """It is told that the picture comes: from now on it may leave."""
    flight.awaited = False
    head = headers.error_head(still_running(flight.rid), arrival.rid, flight.said)
    return Answer(head, flight.receipt, done=lambda delivered: flight.leave(False))


def _said_of_unspent(rid: str, plan: Plan, grant: Grant | None = None) -> headers.Headers:
    """What is said of one that is refused: ``grant`` is given back. Worked out for that alone."""
    said = (*headers.of_request(rid, plan.cache), *headers.NOTHING_SPENT)
    if grant is None:
        return said
    return (*said, *headers.of_rates(headers.given_back(grant.standings, plan.demand)))


def _said_of_bought(rid: str, plan: Plan, grant: Grant) -> headers.Headers:
    return (*headers.of_request(rid, plan.cache), *headers.of_rates(grant.standings))


async def _take(body: Incoming, reader: Reader, kept: Spool | None) -> None:
    """Takes a body in, once, while the scanners look at it."""
    body.show_to(reader.feed)
    async for chunk in body:
        if kept is not None:
            await kept.write(chunk)


def _is_again(arrival: Arrival) -> bool:
    """Whether an earlier request of this process may answer it. While the process ends, what is
    surely new goes elsewhere, the sooner the better."""
    return arrival.retried or arrival.idempotency_key is not None
