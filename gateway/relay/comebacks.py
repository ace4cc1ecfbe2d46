"""Requests that repeat an earlier one: led to its flight, or to what it ended with.

A retry of an SDK, a request under a known Idempotency-Key, and one whose first caller has left
are one purchase with what came before (money.md 8.3, 8.4). Two live calls that are no retries are
never made one: who asks twice for the same prompt wants two pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gateway.domain.errors import (
    ClientGone,
    GatewayError,
    IdempotentResultExpired,
    ResultExpired,
    StillRunning,
    UpstreamUnknown,
)
from gateway.domain.ledger import Claimed, Outcome, Replay, State
from gateway.domain.receipt import CacheResult, Receipt
from gateway.ports import Books, Clock, FlightNotice, Ledger
from gateway.relay import headers
from gateway.relay.admission import Admission, key_of, key_reused
from gateway.relay.arrival import Answer, Arrival, Draft, Patience, ended, known
from gateway.relay.budget import BudgetView
from gateway.relay.flights import Flights, Seat
from gateway.relay.joining import Joining, NeverSent, unknown_outcome
from gateway.relay.plan import Routed
from gateway.relay.results import Results
from gateway.relay.running import APPLIED, running, running_head


@dataclass(frozen=True, slots=True)
class Earlier:
    """The request that another one repeats, and that answers both. ``seat`` is its place there;
    ``over``: it has ended, and what it ended with is replayed."""

    rid: str
    seat: Seat
    over: bool = False

    def done(self, delivered: bool) -> None:
        """Its client has all that it came for, or has left without."""
        self.seat.leave(delivered=delivered)


@dataclass(frozen=True, slots=True)
class Vacant:
    """No answer: the request is made as if it were the first. ``took_over`` is the one of a dead
    process that it makes good, where that is why (``relay.on_unknown: repeat``)."""

    took_over: str = ""


class Comebacks:
    """Finds the request that another one repeats, and answers with its answer."""

    def __init__(
        self,
        *,
        joining: Joining,
        results: Results,
        admission: Admission,
        ledger: Ledger,
        books: Books,
        budgets: BudgetView,
        flights: Flights,
        clock: Clock,
        patience: Patience,
    ) -> None:
        self._joining = joining
        self._results = results
        self._admission = admission
        self._ledger = ledger
        self._books = books
        self._budgets = budgets
        self._flights = flights
        self._clock = clock
        self.patience = patience
        """As of now: another one may be set."""

    async def earlier(
        self, arrival: Arrival, routed: Routed, *, orphans_only: bool = False
    ) -> Earlier | None:
        """The request that this one repeats: that of its Idempotency-Key, where it has one; else a
        flight of the same call and key, for a retry, and for a call whose client has hung up before
        it was read: its retry may have overtaken it. ``orphans_only``: else, and only where the
        client takes kept answers, such a flight that nobody waits for any more.

        Raises ``InvalidRequest`` for a key of another request, ``UpstreamUnknown``.
        """
        caller, mark = routed.caller, routed.fingerprint
        key = arrival.idempotency_key
        if key is not None and (key := key_of(routed.call, key)) is not None:
            if orphans_only:
                return None
            claimed = await self._ledger.claimed(caller.team.id, key, mark, self._clock.now())
            return None if claimed is None else self._behind(claimed)
        again = arrival.retried or arrival.client.away
        if orphans_only == again or (orphans_only and not arrival.wish.read):
            return None
        rid = await self._joining.find(
            mark, caller.key.id, stream=routed.call.stream, orphans_only=orphans_only
        )
        return None if rid is None else Earlier(rid, self._joining.seat(rid, arrival.client))

    def _behind(self, claimed: Claimed) -> Earlier | None:
        """What an Idempotency-Key that is in use stands for."""
        if not claimed.same_fingerprint:
            raise key_reused()
        if claimed.state is not State.EXPIRED:
            over = claimed.state is not State.HELD
            return Earlier(claimed.rid, self._joining.reader(claimed.rid), over)
        if self.patience.repeat_unknown:
            return None
        raise unknown_outcome(claimed.rid)

    async def answer(
        self, arrival: Arrival, routed: Routed, earlier: Earlier, draft: Draft
    ) -> Answer | Vacant:
        """What the earlier request shows, for this one too; nothing is bought. ``Vacant`` where it
        came to nothing before anything was sent, too."""
        rid, caller, stream = earlier.rid, routed.caller, routed.call.stream
        cache = CacheResult.HIT if earlier.over else CacheResult.JOIN
        label = routed.model.label or routed.model.name
        tool = routed.tool
        drawn_label = "" if tool is None else tool.label or tool.name
        joined_trace = None
        if draft.trace is not None and (flight := self._flights.find(rid)) is not None:
            joined_trace = flight.trace
        so_far = draft.receipt(
            cache=cache,
            joined=rid,
            model_label=label,
            drawn_label=drawn_label,
            joined_trace=joined_trace,
        )
        said = (*headers.of_request(arrival.rid, cache), *headers.NOTHING_SPENT)
        try:
            if earlier.over:
                # As a hit of the cache: it costs the team a request, and nothing else.
                await self._admission.pass_gate_for_replay(arrival.rid, caller)
                said = (*said, headers.REPLAYED)
            await self._results.point(
                arrival.rid,
                rid,
                caller.team.id,
                self._clock.now(),
                idempotent=arrival.idempotency_key is not None,
            )
            if arrival.asynchronous and not earlier.over:
                return self._accepted(arrival, routed, earlier, so_far)
            shown = await self._joining.follow(
                rid,
                caller.team.id,
                operation=routed.call.operation,
                stream=stream,
                client=arrival.client,
                patience_seconds=None if stream else self.patience.max_wait_seconds,
            )
        except TimeoutError:
            return ended(so_far, still_running(rid), said, lambda delivered: earlier.done(False))
        except NeverSent:
            return await self._vacated(earlier)
        except GatewayError as error:
            if isinstance(error, ClientGone) and not arrival.client.gone.is_set():
                # It is the first one's client that has left, before anything was sent.
                return await self._vacated(earlier)
            if isinstance(error, UpstreamUnknown) and await self._takes_over(rid):
                return replace(await self._vacated(earlier), took_over=rid)
            if isinstance(error, ResultExpired) and arrival.idempotency_key is not None:
                error = IdempotentResultExpired(error.message)
            # What is to be tried again has not been answered yet.
            final = error.should_retry is False
            return ended(so_far, error, said, lambda told: earlier.done(told and final))
        left = headers.of_budget(*await self._budgets.balances(caller.lines(self._clock.now())))
        receipt = replace(so_far, status=shown.status, outcome=Outcome.REPLAYED)
        return Answer(
            shown.head((*said, *left)), lambda: self._receipt(routed, receipt), done=earlier.done
        )

    async def _vacated(self, earlier: Earlier) -> Vacant:
        """Nobody else is led to an earlier request that has no answer."""
        await self._joining.forget(earlier.rid)
        earlier.seat.leave(delivered=False)
        return Vacant()

    async def _takes_over(self, rid: str) -> bool:
        """Whether what a dead process left is bought again, by this request and no other. What the
        first purchase may have cost stays on the books."""
        if not self.patience.repeat_unknown:
            return False
        await self._joining.write_off(rid)
        return await self._joining.take_over(rid)

    def _accepted(
        self, arrival: Arrival, routed: Routed, earlier: Earlier, so_far: Receipt
    ) -> Answer:
        """For a client that does not wait: where the earlier request's result will be."""
        now, call, caller = self._clock.now(), routed.call, routed.caller
        flight = self._flights.find(earlier.rid)
        if flight is not None:
            flight.awaited, flight.tells = False, True
        notice = FlightNotice(
            earlier.rid, routed.fingerprint, caller.team.id, caller.key.id, call.operation.value,
            routed.model.name, call.stream, now,
        )  # fmt: skip
        said = (*headers.of_request(arrival.rid, CacheResult.JOIN), *headers.NOTHING_SPENT)
        receipt = replace(so_far, status=202)
        head = running_head(running(notice, now), (*said, *APPLIED))
        return Answer(head, lambda: known(receipt), done=earlier.done)

    async def _receipt(self, routed: Routed, receipt: Receipt) -> Receipt:
        """That of an answer which another request has paid for: what it cost is what this one
        avoided, once it is known."""
        call, caller = routed.call, routed.caller
        flight = self._flights.find(receipt.joined)
        if flight is not None:
            await flight.receipt()
        hold = await self._books.find(receipt.joined)
        delivered = receipt.status == 200
        images = call.n
        if call.asks is not None:  # It may have drawn fewer than it was allowed to.
            images = 0 if hold is None or hold.drawn is None else hold.drawn.images
        receipt = replace(
            receipt,
            avoided=hold.cost if hold is not None and delivered else 0,
            images=images if delivered else 0,
        )
        if not delivered:
            # As where it is heard while the flight still runs: an error is no cached answer.
            return receipt
        await self._ledger.replay(
            Replay(
                receipt.rid,
                caller.team.id,
                caller.key.id,
                routed.model.name,
                call.operation,
                receipt.images,
                receipt.avoided,
                self._clock.now(),
                "" if routed.tool is None else routed.tool.name,
            )
        )
        return receipt


def still_running(rid: str) -> StillRunning:
    """For a client that is not to wait any longer."""
    return StillRunning(
        "The picture is still being made, and nothing is lost. Ask for it with GET "
        f"/v1/images/results/{rid}."
    )
