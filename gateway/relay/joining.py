"""Coming back to a flight: which one a call belongs to, and what it shows to who comes late.

A flight of this process is watched where it is. One of another replica is looked at through the
board: the partial pictures of its stream are passed on by it, and its end is found among the
results. Where neither knows anything any more, the ledger still knows what became of the money.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import NoReturn

from gateway.domain.call import Operation
from gateway.domain.errors import (
    ClientGone,
    GatewayError,
    Overloaded,
    ResultExpired,
    UpstreamUnknown,
)
from gateway.domain.ledger import Basis, Event, Outcome, Settlement, State
from gateway.ports import (
    Books,
    Cached,
    Clock,
    FlightBoard,
    Form,
    Ledger,
    NotKnown,
)
from gateway.relay import headers
from gateway.relay.body import KEEP_ALIVE, Spool
from gateway.relay.doubts import Closed, Doubts
from gateway.relay.flights import Client, Flight, Flights, Seat, Shown
from gateway.relay.meter import ERROR_FRAMES
from gateway.relay.results import Results, as_stream, shown

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
"""How often another process's flight is looked at: a look costs a look-up, a picture takes 5 s."""
KEEPING_SECONDS = 2.0
"""How long a settled answer that no board knows of may still be on its way to where it is kept."""
PASS_ON_SECONDS = 0.5
PIECE_BYTES = 256 * 1024


class NeverSent(Exception):
    """An earlier request has ended, or died, without anything being sent: whoever came back for it
    is the first."""


class Joining:
    """Finds flights for those who come back, and shows them."""

    def __init__(
        self,
        *,
        flights: Flights,
        board: FlightBoard,
        results: Results,
        ledger: Ledger,
        books: Books,
        clock: Clock,
        keep_alive_seconds: float,
        shared: bool,
    ) -> None:
        """``shared``: the board is seen by other processes."""
        self._flights = flights
        self._board = board
        self._results = results
        self._ledger = ledger
        self._books = books
        self._clock = clock
        self.keep_alive_seconds = keep_alive_seconds
        """As of now: another one may be set."""
        self._shared = shared
        # Once, and not bound for each call that waits.
        self._when_left, self._when_lost = self._left, self._lost
        self._doubts = Doubts(lambda rid: self._leave(rid, delivered=True))

    async def find(
        self, fingerprint: str, key_id: str, *, stream: bool, orphans_only: bool
    ) -> str | None:
        """The flight that a call comes back to, now watched by it too; a ``seat`` ends that."""
        mark = flight_mark(fingerprint, stream=stream)
        found = await self._board.join(mark, key_id, orphans_only=orphans_only)
        return None if found is None else found.rid

    def seat(self, rid: str, client: Client) -> Seat:
        """The place of one who watches; given up when the client leaves, or has all of it."""

        seat = Seat(self._when_left, rid, client.closed, self._when_lost)
        client.when_away(seat.abandon)
        return seat

    def _left(self, rid: str, closed: Closed | None, delivered: bool) -> None:
        """One who watched has all of it, or has left."""
        if delivered and closed is not None:
            # A client that closes its connection right behind its answer may have given up a
            # moment before it came: its retry is still led to it, for as long as it takes.
            self._doubts.add(rid, closed)
        else:
            self._leave(rid, delivered=delivered)

    def _leave(self, rid: str, *, delivered: bool) -> None:
        if not self._board.leave_at_once(rid, delivered=delivered):
            self._flights.errand(self._board.leave(rid, delivered=delivered))

    async def aclose(self) -> None:
        """Whoever may still come back does so to another process."""
        left = self._doubts.close()
        await asyncio.gather(*(self._board.leave(rid, delivered=True) for rid in left))

    def reader(self, rid: str) -> Seat:
        """The place of one who was not counted, because the ledger or an id led it there."""

        def leave(rid: str, closed: Closed | None, delivered: bool) -> None:
            if delivered:
                self._leave(rid, delivered=True)

        return Seat(leave, rid)

    async def announce(self, flight: Flight) -> None:
        """From here on it can be joined."""
        await self._board.announce(flight.notice)
        flight.seat = self.seat(flight.rid, flight.client)
        # By its name: a client that knew its flight would make a circle with it.
        flight.client.when_gone(flight.seat.lose)

    def _lost(self, rid: str) -> None:
        """A flight's client has gone. Who came back for it meanwhile keeps it flying. That of one
        that is sent already matters to nobody."""
        flight = self._flights.find(rid)
        if flight is not None and not flight.begun:
            self._flights.errand(self._desert(flight))

    async def _desert(self, flight: Flight) -> None:
        if await self.is_deserted(flight):
            flight.deserted.set()

    async def is_deserted(self, flight: Flight) -> bool:
        """Whether nobody waits for a flight any more."""
        if not (flight.awaited and flight.client.gone.is_set()):
            return False
        seen = await self._board.look(flight.rid)
        return seen is None or not seen.watchers

    def begun(self, flight: Flight, spool: Spool) -> None:
        """It is about to be sent: from here on it flies to its end, whoever leaves."""
        flight.begun = flight.joinable = True
        flight.admitted.set()
        if self._shared and flight.stream:
            self._flights.errand(self._pass_on(flight, spool))

    def saw_partial(self, flight: Flight) -> None:
        flight.partials += 1
        if not self._board.progress_at_once(flight.rid, flight.partials):
            self._flights.errand(self._board.progress(flight.rid, flight.partials))

    def ended(self, flight: Flight) -> None:
        """It is over. What it ended with can be found as soon as it is put away."""
        if flight.keeping is None or flight.keeping.done():
            self._end(flight)
        else:
            flight.keeping.add_done_callback(lambda kept: self._end(flight))

    def _end(self, flight: Flight) -> None:
        self._flights.close(flight)
        if not self._board.end_at_once(flight.rid, joinable=flight.joinable):
            self._flights.errand(self._board.end(flight.rid, joinable=flight.joinable))

    async def forget(self, rid: str) -> None:
        """Nobody is led to this flight any more."""
        await self._board.leave(rid, delivered=True)

    async def take_over(self, rid: str) -> bool:
        """Whether the caller is the one who may buy again what a dead flight left."""
        return await self._board.take_over(rid)

    async def write_off(self, rid: str) -> None:
        """Posts what a dead flight may have cost at its bound, without waiting for the sweep; so
        its Idempotency-Key comes free. Should it live after all, its settlement corrects that.
        Raises ``LedgerUnavailable``."""
        unknown = Settlement(rid, Event.EXPIRE, Outcome.UNKNOWN, Basis.ESTIMATED)
        with suppress(NotKnown):
            await self._ledger.settle(replace(unknown, at=self._clock.now()))

    async def follow(
        self,
        rid: str,
        team: str,
        *,
        operation: Operation,
        stream: bool,
        client: Client,
        patience_seconds: float | None = None,
    ) -> Shown:
        """What a flight shows, with a share of it; waits as long as the client does.

        Raises the error that the flight ended in, ``UpstreamUnknown`` where whoever flew it is
        gone, ``ResultExpired`` where its answer is kept no longer, ``ClientGone``, and
        ``TimeoutError`` when the patience is over; ``NeverSent``.
        """
        flight = self._flights.find(rid)
        if flight is not None and flight.stream == stream:
            return await flight.watch().shown(client, patience_seconds)
        async with asyncio.timeout(patience_seconds):
            return await self._from_afar(rid, team, operation, stream, client)

    async def _from_afar(
        self, rid: str, team: str, operation: Operation, stream: bool, client: Client
    ) -> Shown:
        began = self._clock.monotonic()
        missing_since: float | None = None
        while True:
            kept = await self._results.find(rid, team)
            if kept is not None:
                return shown(kept, stream=stream)
            missing_since = await self._goes_on(rid, team, missing_since)
            if stream and self._shared and missing_since is None:
                silent = self._clock.monotonic() - began >= self.keep_alive_seconds
                if await self._has_begun(rid) or silent:
                    return self._passed_on(rid, team, operation)
            await _pause(client)

    async def _left_by_the_dead(self, rid: str, team: str) -> NoReturn:
        """Raises what became of a call whose process is gone. Its last act may have been to settle;
        where it had not even reserved, nothing was sent."""
        if await self._books.find(rid) is None:
            raise NeverSent
        await self._ask_the_books(rid, team, over=True)
        raise unknown_outcome(rid)

    async def _has_begun(self, rid: str) -> bool:
        await self._board.want_events(rid)
        return bool(await self._board.events(rid, 0))

    async def _ask_the_books(self, rid: str, team: str, *, over: bool) -> None:
        """Raises the truth about a call that no board knows to be running. What is still held may
        yet end well; what is settled may still be put away, unless that is surely ``over``."""
        hold = await self._books.find(rid)
        if hold is None or hold.team != team:
            raise NeverSent
        if hold.state is State.EXPIRED:
            raise unknown_outcome(rid)
        if hold.state is State.HELD:
            return
        if not over and self._clock.now() < hold.lease_ends:
            return
        if hold.state is State.VOIDED:
            raise NeverSent
        if not await self._results.is_gone(rid, team):
            if await self._results.find(rid, team) is not None:
                return  # It has been put away between the two looks.
            raise unreachable(rid)
        raise ResultExpired(
            f"The request {rid} was answered and paid for, and its answer is not kept any more."
        )

    def _passed_on(self, rid: str, team: str, operation: Operation) -> Shown:
        said = headers.of_form(True)
        return Shown(200, said, (), None, lambda: self._events(rid, team, operation))

    async def _events(
        self, rid: str, team: str, operation: Operation
    ) -> AsyncGenerator[bytes, None]:
        """The stream of another process's flight: its partial pictures as they come through the
        board, and its end from the results."""
        position, quiet_since = 0, self._clock.monotonic()
        missing_since: float | None = None
        while True:
            chunk = await self._board.events(rid, position)
            now = self._clock.monotonic()
            if chunk:
                position, quiet_since = position + len(chunk), now
                yield chunk
                continue
            kept = await self._results.find(rid, team)
            if kept is not None:
                break
            try:
                missing_since = await self._goes_on(rid, team, missing_since)
            except NeverSent:
                yield ERROR_FRAMES[operation](unknown_outcome(rid).content)
                return
            except GatewayError as error:
                yield ERROR_FRAMES[operation](error.content)
                return
            if now - quiet_since >= self.keep_alive_seconds:
                quiet_since = now
                yield KEEP_ALIVE
            await asyncio.sleep(POLL_SECONDS)
        async with aclosing(_end_of(kept, position)) as rest:
            async for piece in rest:
                yield piece

    async def _goes_on(self, rid: str, team: str, missing_since: float | None) -> float | None:
        """Since when a flight is missing; None where it is not. Raises what became of it."""
        seen, now = await self._board.look(rid), self._clock.monotonic()
        if seen is not None and not seen.ended:
            if not seen.alive:
                await self._left_by_the_dead(rid, team)
            return None
        missing_since = now if missing_since is None else missing_since
        await self._ask_the_books(rid, team, over=now - missing_since >= KEEPING_SECONDS)
        return missing_since

    async def _pass_on(self, flight: Flight, spool: Spool) -> None:
        """Lets watchers in other processes have what a running stream publishes. Ends with it."""
        spool.share()
        try:
            await self._pass_on_until_over(flight, spool)
        finally:
            spool.close()

    async def _pass_on_until_over(self, flight: Flight, spool: Spool) -> None:
        position = 0
        while not flight.over.is_set():
            try:
                async with asyncio.timeout(PASS_ON_SECONDS):
                    await flight.over.wait()
                    return
            except TimeoutError:
                pass
            if not self._board.wanted(flight.rid):
                continue
            end = spool.published if flight.ends_at is None else flight.ends_at
            while position < end:
                upto = min(end, position + PIECE_BYTES)
                async with aclosing(spool.slice(position, upto)) as chunks:
                    piece = b"".join([chunk async for chunk in chunks])
                await self._board.add_events(flight.rid, position, piece)
                position = upto


async def _end_of(kept: Cached, position: int) -> AsyncGenerator[bytes, None]:
    """What a stream still owes to one who has its first ``position`` bytes."""
    meta = kept.meta
    if meta.status != 200:
        content = b"".join([chunk async for chunk in kept.chunks()])
        yield ERROR_FRAMES[Operation(meta.operation)](content)
    elif meta.form is Form.JSON:
        async for piece in as_stream(Operation(meta.operation), kept):
            yield piece
    else:
        async for chunk in kept.chunks():
            if len(chunk) > position:
                yield chunk[position:]
            position = max(0, position - len(chunk))


def flight_mark(fingerprint: str, *, stream: bool) -> str:
    """What a retry and its flight have in common: the form too, for it asks as it asked before."""
    return f"{fingerprint}:{'events' if stream else 'json'}"


def unknown_outcome(rid: str) -> UpstreamUnknown:
    """What is said of a call whose outcome nobody can tell any more."""
    return UpstreamUnknown(
        f"The request {rid} was sent upstream, and nobody can tell any more what became of it. "
        "The picture may have been made and paid for, so it is not bought again for you. To buy "
        "another one, send it anew (with another Idempotency-Key, if it has one).",
    )


def unreachable(rid: str) -> Overloaded:
    """What is said while the store of the results is away."""
    return Overloaded(
        f"The answer to {rid} cannot be fetched now: the store of the results does not answer. "
        "Nothing is lost and nothing was bought; try again.",
        code="results_unavailable",
        reason="results_unavailable",
        should_retry=True,
        retry_after_seconds=5,
    )


async def _pause(client: Client) -> None:
    """Raises ``ClientGone``."""
    try:
        async with asyncio.timeout(POLL_SECONDS):
            await client.gone.wait()
    except TimeoutError:
        return
    raise ClientGone("upstream")
