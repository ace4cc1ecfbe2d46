"""The flights of one process, in its memory.

Nothing here awaits anything, so each call is atomic in the event loop.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from gateway.ports import Clock, FlightNotice, FlightSeen

RUNNING_SECONDS = 900.0
"""How old a flight may be that is still joined while it runs: longer than any client's patience
and than any upstream's deadline."""
MAX_FLIGHTS = 10_000
"""Ended flights that wait to be handed over; of more, the oldest are forgotten."""
EVENTS_SECONDS = 120.0
"""How long a stream's bytes are there after the last were added."""
MAX_EVENT_BYTES = 256 * 1024 * 1024
"""Of one flight."""
READ_BYTES = 1024 * 1024
"""Roughly what one call of ``events`` returns at the most."""

_Call = tuple[str, str]
_NUMBER = attrgetter("number")


@dataclass(slots=True)
class Flight:
    """A flight as its own process knows it; ``began`` and ``ended`` by the monotonic clock.

    ``number`` counts the flights of a board; ``hidden``: no join finds it any more.
    """

    notice: FlightNotice
    began: float
    number: int = 0
    watchers: int = 1
    partials: int = 0
    ended: float | None = None
    joinable: bool = True
    delivered: bool = False
    taken: bool = False
    wanted: bool = False
    hidden: bool = False


class _Alike:
    """The flights of one call that joins may find, each list the oldest first. Many may be under
    way at once: who looks for one that nobody watches passes over none of the others."""

    __slots__ = ("orphans", "watched")

    def __init__(self) -> None:
        self.watched: list[Flight] = []
        self.orphans: list[Flight] | tuple[()] = ()
        """Nearly no call has any."""

    def add(self, flight: Flight) -> None:
        if flight.watchers:
            insort(self.watched, flight, key=_NUMBER)
        elif isinstance(self.orphans, list):
            insort(self.orphans, flight, key=_NUMBER)
        else:
            self.orphans = [flight]

    def remove(self, flight: Flight) -> None:
        """Where it is by how many watch it now; nothing happens where it is not."""
        where = self.watched if flight.watchers else self.orphans
        if isinstance(where, list):
            at = bisect_left(where, flight.number, key=_NUMBER)
            if at < len(where) and where[at] is flight:
                del where[at]


@dataclass(slots=True)
class _Stream:
    expires: float
    size: int = 0
    pieces: dict[int, bytes] = field(default_factory=dict)

    def at(self, offset: int) -> bytes:
        piece = self.pieces.get(offset)
        if piece is None:
            within = ((at, each) for at, each in self.pieces.items() if at < offset)
            piece = next(
                (each[offset - at :] for at, each in within if at + len(each) > offset), b""
            )
        return piece


class MemoryBoard:
    """The board of one process.

    ``ttl_seconds`` is how long a flight that ended, and was not handed over, can be joined. One
    that nobody can join and nobody watches is forgotten at once.
    """

    def __init__(self, clock: Clock, *, ttl_seconds: float, max_flights: int = MAX_FLIGHTS) -> None:
        self._clock = clock
        self._ttl = ttl_seconds
        self._max_flights = max_flights
        self._flights: dict[str, Flight] = {}
        self._calls: dict[_Call, _Alike] = {}
        self._announced = 0
        self._ended: dict[str, Flight] = {}
        self._streams: dict[str, _Stream] = {}

    def __contains__(self, rid: object) -> bool:
        return rid in self._flights

    def __len__(self) -> int:
        """How many things are remembered: flights, calls, streams."""
        return len(self._flights) + len(self._calls) + len(self._ended) + len(self._streams)

    def flight(self, rid: str) -> Flight | None:
        return self._flights.get(rid)

    def landed(self) -> Iterator[Flight]:
        """Those that have ended and wait to be handed over, oldest first."""
        self._prune()
        return iter(tuple(self._ended.values()))

    def attend(self, rid: str) -> None:
        """One watcher more."""
        flight = self._flights.get(rid)
        if flight is not None:
            self._watched_by(flight, flight.watchers + 1)

    def _watched_by(self, flight: Flight, watchers: int) -> None:
        """So many watch it from now on."""
        if flight.hidden or bool(watchers) == bool(flight.watchers):
            flight.watchers = watchers
            return
        alike = self._calls[_call(flight.notice)]
        alike.remove(flight)
        flight.watchers = watchers
        alike.add(flight)

    async def announce(self, notice: FlightNotice) -> None:
        if self._ended:
            self._prune()
        if notice.rid not in self._flights:
            self._announced += 1
            flight = Flight(notice, self._clock.monotonic(), self._announced)
            self._flights[notice.rid] = flight
            call = _call(notice)
            alike = self._calls.get(call)
            if alike is None:
                alike = self._calls[call] = _Alike()
            # The youngest, and watched by who asked for it.
            alike.watched.append(flight)

    async def join(
        self, fingerprint: str, key_id: str, *, orphans_only: bool
    ) -> FlightNotice | None:
        if self._ended:
            self._prune()
        alike = self._calls.get((fingerprint, key_id))
        if alike is None:
            return None
        found = self._oldest(alike.orphans)
        if found is None and not orphans_only:
            found = self._oldest(alike.watched)
        if found is None:
            return None
        self._watched_by(found, found.watchers + 1)
        return found.notice

    def _oldest(self, flights: Sequence[Flight]) -> Flight | None:
        """The first that has not been running for too long."""
        oldest = self._clock.monotonic() - RUNNING_SECONDS
        return next((one for one in flights if one.ended is not None or one.began > oldest), None)

    async def leave(self, rid: str, *, delivered: bool) -> None:
        self.leave_at_once(rid, delivered=delivered)

    def leave_at_once(self, rid: str, *, delivered: bool) -> bool:
        flight = self._flights.get(rid)
        if flight is not None:
            self._watched_by(flight, max(0, flight.watchers - 1))
            flight.delivered |= delivered
            self._review(flight)
        return True

    async def progress(self, rid: str, partials: int) -> None:
        self.progress_at_once(rid, partials)

    def progress_at_once(self, rid: str, partials: int) -> bool:
        flight = self._flights.get(rid)
        if flight is not None:
            flight.partials = max(flight.partials, partials)
        return True

    async def end(self, rid: str, *, joinable: bool) -> None:
        self.end_at_once(rid, joinable=joinable)

    def end_at_once(self, rid: str, *, joinable: bool) -> bool:
        flight = self._flights.get(rid)
        if flight is not None and flight.ended is None:
            flight.ended = self._clock.monotonic()
            flight.joinable = joinable
            self._ended[rid] = flight
            self._review(flight)
            if self._ended:
                self._prune()
        return True

    async def look(self, rid: str) -> FlightSeen | None:
        flight = self._flights.get(rid)
        if flight is None:
            return None
        ended = flight.ended is not None
        return FlightSeen(flight.notice, ended, not ended, flight.watchers, flight.partials)

    async def take_over(self, rid: str) -> bool:
        flight = self._flights.get(rid)
        if flight is None or flight.taken:
            return False
        flight.taken = True
        return True

    async def want_events(self, rid: str) -> None:
        flight = self._flights.get(rid)
        if flight is not None:
            flight.wanted = True

    def wanted(self, rid: str) -> bool:
        flight = self._flights.get(rid)
        return flight is not None and flight.wanted

    async def add_events(self, rid: str, start: int, content: bytes) -> None:
        now = self._clock.monotonic()
        self._prune_streams(now)
        stream = self._streams.pop(rid, None) or _Stream(now)
        # Behind all others, because it ends last.
        self._streams[rid] = stream
        stream.expires = now + EVENTS_SECONDS
        more = len(content) - len(stream.pieces.get(start, b""))
        if more > 0 and stream.size + more <= MAX_EVENT_BYTES:
            stream.pieces[start] = content
            stream.size += more

    async def events(self, rid: str, start: int) -> bytes:
        self._prune_streams(self._clock.monotonic())
        stream = self._streams.get(rid)
        found = bytearray()
        while stream is not None and len(found) < READ_BYTES:
            piece = stream.at(start + len(found))
            if not piece:
                break
            found += piece
        return bytes(found)

    async def aclose(self) -> None:
        for table in (self._flights, self._calls, self._ended, self._streams):
            table.clear()

    def _review(self, flight: Flight) -> None:
        if not flight.hidden and (flight.delivered or not flight.joinable):
            self._hide(flight)
        if flight.hidden:
            self._ended.pop(flight.notice.rid, None)
        if flight.ended is not None and flight.hidden and not flight.watchers:
            self._flights.pop(flight.notice.rid, None)

    def _hide(self, flight: Flight) -> None:
        if flight.hidden:
            return
        flight.hidden = True
        call = _call(flight.notice)
        alike = self._calls[call]
        alike.remove(flight)
        if not alike.watched and not alike.orphans:
            del self._calls[call]

    def _prune(self) -> None:
        """Hides what ended too long ago, or is too much; who watches it may still look."""
        oldest = self._clock.monotonic() - self._ttl
        while self._ended:
            flight = next(iter(self._ended.values()))
            recent = flight.ended is not None and flight.ended > oldest
            if recent and len(self._ended) <= self._max_flights:
                break
            self._hide(flight)
            self._review(flight)

    def _prune_streams(self, now: float) -> None:
        while self._streams:
            rid, stream = next(iter(self._streams.items()))
            if stream.expires > now:
                break
            del self._streams[rid]


def _call(notice: FlightNotice) -> _Call:
    return (notice.fingerprint, notice.key_id)
