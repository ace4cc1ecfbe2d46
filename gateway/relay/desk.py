"""Where results are asked for by request id: the kept answer, or how far it is."""

from __future__ import annotations

import asyncio

from gateway.domain.errors import ClientGone, Overloaded, ResultExpired
from gateway.domain.ledger import State
from gateway.domain.receipt import CacheResult
from gateway.domain.team import Caller
from gateway.ports import Books, Clock, FlightBoard, FlightNotice
from gateway.relay import headers
from gateway.relay.flights import Client, Flights
from gateway.relay.joining import (
    KEEPING_SECONDS,
    POLL_SECONDS,
    Joining,
    unknown_outcome,
    unreachable,
)
from gateway.relay.results import ResultPolicy, Results, as_it_is
from gateway.relay.running import Fetched, no_result, running, running_head


class ResultDesk:
    """Hands results to the team that they belong to."""

    def __init__(
        self,
        *,
        results: Results,
        flights: Flights,
        board: FlightBoard,
        books: Books,
        joining: Joining,
        clock: Clock,
        policy: ResultPolicy,
    ) -> None:
        self._results = results
        self._flights = flights
        self._board = board
        self._books = books
        self._joining = joining
        self._clock = clock
        self._policy = policy

    async def fetch(self, caller: Caller, rid: str, wait_seconds: float, client: Client) -> Fetched:
        """The answer to a request of the caller's team, or, once the wait is over, a 202.

        Raises ``ResultNotFound`` for what is unknown and for what is another team's,
        ``ResultExpired``, ``UpstreamUnknown``, ``ClientGone``.
        """
        team = caller.team.id
        began = self._clock.monotonic()
        while True:
            real, kept = await self._results.locate(rid, team)
            if kept is not None:
                said = headers.of_request(rid, CacheResult.HIT)
                seat = self._joining.reader(real)
                return Fetched(as_it_is(kept).head(said), seat.tell)
            waited = self._clock.monotonic() - began
            try:
                notice, partials = await self._running(rid, real, team)
            except (ResultExpired, Overloaded):
                # It may have been put away, and have ended, between the two looks.
                kept = await self._results.find(rid, team)
                if kept is None:
                    raise
                continue
            if waited >= wait_seconds:
                return Fetched(running_head(running(notice, self._clock.now(), partials)))
            await _pause(client, min(POLL_SECONDS, wait_seconds - waited))

    async def _running(self, rid: str, real: str, team: str) -> tuple[FlightNotice, int]:
        """A flight that has not ended, and how many partial pictures it has shown. ``real`` is its
        id, ``rid`` the one it is asked for by."""
        flight = self._flights.find(real)
        if flight is not None and flight.notice.team == team:
            return flight.notice, flight.partials
        seen = await self._board.look(real)
        listed = seen is not None and seen.notice.team == team and not seen.ended
        if seen is not None and listed and seen.alive:
            return seen.notice, seen.partials
        hold = await self._books.find(real)
        if hold is None or hold.team != team:
            if listed:
                raise unknown_outcome(real)
            raise no_result(rid, self._policy.ttl, self._policy.idempotent_ttl)
        if hold.state is State.EXPIRED or (listed and hold.state is State.HELD):
            raise unknown_outcome(real)
        age = (self._clock.now() - hold.at).total_seconds()
        if hold.state is State.HELD or (seen is not None and not listed and age < KEEPING_SECONDS):
            return (
                FlightNotice(
                    hold.rid, "", team, hold.key_id, hold.operation, hold.model, False, hold.at
                ),
                0,
            )
        if hold.state is State.VOIDED:
            raise ResultExpired(
                f"The request {rid} ended without a picture, and nothing was bought. Send it again."
            )
        if not await self._results.is_gone(real, team):
            raise unreachable(rid)
        raise ResultExpired(
            f"The request {rid} was answered and paid for, and its answer is not kept any more."
        )


async def _pause(client: Client, seconds: float) -> None:
    """Raises ``ClientGone``."""
    try:
        async with asyncio.timeout(seconds):
            await client.gone.wait()
    except TimeoutError:
        return
    raise ClientGone("upstream")
