"""The flights of one process, in its memory.

Nothing here awaits anything, so each call is atomic in the event loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

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


@dataclass(slots=True)
class Flight:
    """A flight as its own process knows it; ``began`` and ``ended`` by the monotonic clock.

    ``hidden``: no join finds it any more.
    """

    notice: FlightNotice
    began: float
    watchers: int = 1
    partials: int = 0
    ended: float | None = None
    joinable: bool = True
    delivered: bool = False
    taken: bool = False
    wanted: bool = False
    hidden: bool = False


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
        self._calls: dict[_Call, dict[str, Flight]] = {}
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
            flight.watchers += 1

    async def announce(self, notice: FlightNotice) -> None:
        self._prune()
        if notice.rid not in self._flights:
            flight = Flight(notice, self._clock.monotonic())
            self._flights[notice.rid] = flight
            self._calls.setdefault(_call(notice), {})[notice.rid] = flight

    async def join(
        self, fingerprint: str, key_id: str, *, orphans_only: bool
    ) -> FlightNotice | None:
        self._prune()
        oldest = self._clock.monotonic() - RUNNING_SECONDS
        found = None
        for flight in self._calls.get((fingerprint, key_id), {}).values():
            if flight.ended is None and flight.began <= oldest:
                continue
            if not flight.watchers:
                found = flight
                break
            if found is None and not orphans_only:
                found = flight
        if found is None:
            return None
        found.watchers += 1
        return found.notice

    async def leave(self, rid: str, *, delivered: bool) -> None:
        self.leave_at_once(rid, delivered=delivered)

    def leave_at_once(self, rid: str, *, delivered: bool) -> bool:
        flight = self._flights.get(rid)
        if flight is not None:
            flight.watchers = max(0, flight.watchers - 1)
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
        if flight.delivered or not flight.joinable:
            self._hide(flight)
        if flight.ended is not None and flight.hidden and not flight.watchers:
            self._flights.pop(flight.notice.rid, None)

    def _hide(self, flight: Flight) -> None:
        flight.hidden = True
        self._ended.pop(flight.notice.rid, None)
        call = _call(flight.notice)
        flights = self._calls.get(call, {})
        flights.pop(flight.notice.rid, None)
        if not flights:
            self._calls.pop(call, None)

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
