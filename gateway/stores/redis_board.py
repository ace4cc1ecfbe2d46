"""A board of flights that all replicas share, in Redis 7+ or Valkey.

While Redis is away it goes on with the flights of this process.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from enum import StrEnum
from itertools import count, islice
from typing import Any, TypeVar

from gateway.ports import Clock, FlightNotice, FlightSeen
from gateway.stores.memory_board import (
    EVENTS_SECONDS,
    MAX_EVENT_BYTES,
    READ_BYTES,
    RUNNING_SECONDS,
    Flight,
    MemoryBoard,
)
from gateway.stores.redis_link import (
    CLOSE_SECONDS,
    GATE_SECONDS,
    Client,
    Errand,
    Link,
    Reason,
    Script,
    Server,
    StoreAway,
)

T = TypeVar("T")

PIECE_BYTES = 256 * 1024
"""Small enough for a deadline on a slow line, with all that are under way at once."""
BULK = 4
"""Commands with bytes of streams at once, so that they never hold up the others."""
BATCH = 200
"""Flights that one script call beats for."""
TOLD_TOGETHER = 40
"""Flights that one script call is told of: about 50 us each, and everybody else waits for them."""
REMEMBER_MS = 60_000
"""How long a flight that is over, or a watcher, is known: longer than any retry of a lost reply."""
TOLD_BEFORE = "-"
MAX_OWED = 10_000
"""Flights that Redis is still to be told of; leases end the rest."""
GONE_SECONDS = 5.0
"""A failover may lose what Redis took this long ago: it is told again."""
MAX_GONE = 1000
FOREVER_US = 2**52

_NOTICE = tuple(each.name for each in fields(FlightNotice))
_TELL = Script.load("board_tell.lua")
_JOIN = Script.load("board_join.lua")
_BEAT = Script.load("board_beat.lua")
_LOOK = Script.load("board_look.lua")
_TAKE = Script.load("board_take.lua")
_ADD = Script.load("board_event.lua")
_READ = Script.load("board_events.lua")


class _State(StrEnum):
    """As ``board_tell.lua`` is told it."""

    RUNS = "runs"
    ENDED = "ended"
    VOID = "void"
    """It has ended, and nobody is to join it."""


@dataclass(slots=True)
class _Known:
    """What this process knows of a flight, and tells Redis: always all of it, so that a command
    that is lost, late or repeated does no harm.

    ``mine``: it is flown here. ``left`` were watchers, and Redis may still count them. ``changes``
    counts what happened here, ``told`` how much of that Redis knows; ``heard``: it may have heard
    of this flight at all; ``kept``: it has its notice, and says so where it has lost it;
    ``fresh``: no beat has come by.
    """

    notice: FlightNotice
    mine: bool
    began: float
    watchers: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    state: _State = _State.RUNS
    delivered: bool = False
    taken: str = ""
    wants: bool = False
    partials: int = 0
    changes: int = 1
    told: int = 0
    heard: bool = False
    kept: bool = False
    fresh: bool = True
    seen: FlightSeen | None = None
    seen_at: float = 0.0

    @property
    def flown(self) -> bool:
        return self.mine and self.state is _State.RUNS

    def is_beaten(self) -> bool:
        """Whether a beat is for it too. That it was announced is the first one, unless there is
        more to say or to hear: most small calls are over before the second."""
        fresh, self.fresh = self.fresh and self.mine and self.kept, False
        if fresh and not (self.notice.stream or self.wants or self.partials):
            return False
        return self.flown or bool(self.watchers)

    @property
    def said(self) -> str:
        """Its notice, as Redis is told it."""
        if not self.mine:
            return ""
        return TOLD_BEFORE if self.kept else _written(self.notice)

    def leave(self, *, delivered: bool) -> None:
        """One who watched it here does so no more."""
        if self.watchers:
            self.left.append(self.watchers.pop())
        self.delivered |= delivered
        self.changes += 1

    @property
    def idle(self) -> bool:
        """Nothing more happens to it here."""
        return not self.watchers and not self.flown

    @property
    def over(self) -> bool:
        """Nobody is to find it any more."""
        return self.state is _State.VOID or (self.state is _State.ENDED and self.delivered)


class RedisBoard:
    """The board that all replicas share, and what holds while Redis is away.

    Time is Redis's own. A flight is alive, and a watcher counts, while its process has beaten
    within ``lease_seconds``; one task beats for all of them every ``beat_seconds``, brings back
    what Redis forgot, and learns whose events are wanted. There is none while nothing runs here
    and nobody here watches. So nothing of a killed process stays but its flight, dead and
    unwatched, and a join whose answer was lost ends by itself.

    Without Redis, joins find the flights of this process; what happens to them meanwhile is told
    when Redis is back. ``ttl_seconds`` is how long a flight that ended can be joined. ``account``
    is the hash tag of every key: one cluster slot, one script. ``worker`` names this process to
    people who look into Redis. ``server`` is shared with whoever else uses the same Redis.
    ``errand`` starts what nobody waits for, but the end of the process. ``offset`` (seconds added
    to Redis's clock) is for tests. Owns ``client`` and closes it.
    """

    def __init__(
        self,
        client: Client,
        clock: Clock,
        *,
        worker: str,
        ttl_seconds: float,
        server: Server | None = None,
        on_error: Callable[[Reason, BaseException], None] | None = None,
        account: str = "default",
        beat_seconds: float = 1.0,
        lease_seconds: float = 15.0,
        deadline_seconds: float = GATE_SECONDS,
        errand: Errand = asyncio.create_task,
        offset: Callable[[], float] | None = None,
    ) -> None:
        self._prefix = f"gw:{{{account}}}:"
        self._probe_key = self._prefix + "probe"
        server = server or Server()
        self._link = Link(client, server, on_error=on_error, small=True)
        server.listen(self._back)
        self._clock = clock
        self._worker = worker
        self._seed, self._count = secrets.token_hex(4), count()
        self._local = MemoryBoard(clock, ttl_seconds=ttl_seconds)
        self._ttl_ms = round(ttl_seconds * 1000)
        self._beat_seconds = beat_seconds
        self._lease = lease_seconds
        self._deadline = deadline_seconds
        running_ms = round(RUNNING_SECONDS * 1000) + self._least_ms
        self._keeping_ms = (running_ms, self._ttl_ms, REMEMBER_MS)
        self._offset = offset
        self._known: dict[str, _Known] = {}
        self._owed: dict[str, None] = {}
        self._gone: deque[tuple[float, _Known]] = deque(maxlen=MAX_GONE)
        self._wanted: set[str] = set()
        self._bulk = asyncio.Semaphore(BULK)
        self._wake = asyncio.Event()
        self._heart: asyncio.Task[None] | None = None
        self._errand = errand
        self._posted: dict[str, _Known] = {}
        """Of whom Redis is about to be told, by nobody who waits."""
        self._teller: asyncio.Task[None] | None = None
        self._back_at: float | None = None
        self._since: bytes | None = None
        self._closed = False

    @property
    def degraded(self) -> bool:
        """Only the flights of this process are known now, or would be."""
        return self._link.breaker(self._probe_key).failing

    @property
    def beating(self) -> bool:
        return self._heart is not None

    async def announce(self, notice: FlightNotice) -> None:
        if notice.rid in self._local:
            return
        await self._local.announce(notice)
        known = _Known(notice, True, self._clock.monotonic(), [self._watcher()])
        self._known[notice.rid] = known
        self._keep_beating()
        await self._tell(known)

    async def join(
        self, fingerprint: str, key_id: str, *, orphans_only: bool
    ) -> FlightNotice | None:
        watcher = self._watcher()
        since = self._prefix + "board"
        keys = (self._index(fingerprint, key_id), f"{self._prefix}jn:{watcher}", since)
        only = "1" if orphans_only else ""
        limits = (round(RUNNING_SECONDS * 1e6), self._ttl_ms * 1000, REMEMBER_MS)
        args = (*self._times(), self._flight(""), watcher, only, *limits)
        notice = None
        try:
            reply = await self._run(_JOIN, keys, args)
            self._look_at(reply[0])
            notice = _read(reply[1]) if len(reply) > 1 else None
            stand_in = notice is None and bool(self._owed)
        except StoreAway:
            stand_in = True
        if notice is not None:
            self._local.attend(notice.rid)
        elif stand_in:
            notice = await self._local.join(fingerprint, key_id, orphans_only=orphans_only)
        if notice is not None:
            self._recall(notice).watchers.append(watcher)
            self._keep_beating()
        return notice

    async def leave(self, rid: str, *, delivered: bool) -> None:
        known = self._known.get(rid) or await self._find(rid)
        self._local.leave_at_once(rid, delivered=delivered)
        if known is not None:
            known.leave(delivered=delivered)
            await self._tell(known)

    def leave_at_once(self, rid: str, *, delivered: bool) -> bool:
        known = self._known.get(rid)
        if known is None:
            return False
        self._local.leave_at_once(rid, delivered=delivered)
        known.leave(delivered=delivered)
        self._post(known)
        return True

    async def progress(self, rid: str, partials: int) -> None:
        self.progress_at_once(rid, partials)

    def progress_at_once(self, rid: str, partials: int) -> bool:
        """Redis hears of it with the next beat."""
        self._local.progress_at_once(rid, partials)
        known = self._known.get(rid)
        if known is not None:
            known.partials = max(known.partials, partials)
        return True

    def end_at_once(self, rid: str, *, joinable: bool) -> bool:
        known = self._ended(rid, joinable=joinable)
        if known is not None:
            self._post(known)
        return True

    async def end(self, rid: str, *, joinable: bool) -> None:
        known = self._ended(rid, joinable=joinable)
        if known is not None:
            await self._tell(known)

    def _ended(self, rid: str, *, joinable: bool) -> _Known | None:
        self._local.end_at_once(rid, joinable=joinable)
        known = self._known.get(rid)
        if known is None or not known.flown:
            return None
        known.state = _State.ENDED if joinable else _State.VOID
        known.changes += 1
        return known

    async def look(self, rid: str) -> FlightSeen | None:
        """None for one that is over and handed over, too. One that is watched from here, and
        cannot be looked at, is as it was last seen; where Redis has forgotten it, it is alive for
        one lease more, since who flies it brings it back."""
        known, keys = self._known.get(rid), (self._flight(rid),)
        mine = await self._local.look(rid)
        try:
            reply = await self._run(_LOOK, keys, self._times())
        except StoreAway:
            return mine or (_last_seen(known) if known is not None else None)
        if reply == 0:
            return mine or (self._forgotten(known) if known is not None else None)
        notice = _read(reply[0]) if reply != -1 else None
        if notice is None:
            return None
        _, ended, alive, watchers, partials = reply
        seen = FlightSeen(notice, bool(ended), bool(alive), watchers, partials)
        if mine is not None:
            seen = replace(
                seen,
                ended=seen.ended or mine.ended,
                alive=mine.alive and not seen.ended,
                partials=max(seen.partials, mine.partials),
            )
        if known is not None:
            known.seen, known.seen_at = seen, self._clock.monotonic()
        return seen

    async def take_over(self, rid: str) -> bool:
        """False for another process's flight while Redis is away: nobody may be the second."""
        who = self._watcher()
        try:
            taken = bool(await self._run(_TAKE, (self._flight(rid),), (who,)))
        except StoreAway:
            flight = self._local.flight(rid)
            if flight is None or not await self._local.take_over(rid):
                return False
            known = self._recall(flight.notice)
            known.taken = who
            known.changes += 1
            self._owe(known)
            return True
        if taken:
            await self._local.take_over(rid)
        return taken

    async def want_events(self, rid: str) -> None:
        known = self._known.get(rid)
        if known is not None:
            known.wants = True
        keys = (self._flight(rid), self._flight(rid))
        args = (self._offset_us(), self._least_ms, rid, "", "1", 0, 0)
        with suppress(StoreAway):
            [wanted] = await self._run(_BEAT, keys, args)
            if wanted == 1 and known is not None and known.flown:
                self._wanted.add(rid)

    def wanted(self, rid: str) -> bool:
        return rid in self._wanted

    async def add_events(self, rid: str, start: int, content: bytes) -> None:
        """What does not get through leaves a gap, which readers do not pass."""
        keep_ms = round(EVENTS_SECONDS * 1000)
        for at in range(0, len(content), PIECE_BYTES):
            piece = content[at : at + PIECE_BYTES]
            args = (start + at, piece, MAX_EVENT_BYTES, keep_ms)
            try:
                async with self._bulk:
                    await self._run(_ADD, (self._stream(rid),), args)
            except StoreAway:
                return

    async def events(self, rid: str, start: int) -> bytes:
        """About 1 MiB at the most; empty while Redis is away."""
        try:
            async with self._bulk:
                return b"".join(await self._run(_READ, (self._stream(rid),), (start, READ_BYTES)))
        except StoreAway:
            return b""

    async def aclose(self) -> None:
        """What still runs here is dead to the others when its lease ends."""
        if self._teller is not None:
            # Nobody else has waited for it.
            await asyncio.wait({self._teller}, timeout=CLOSE_SECONDS)
        self._closed = True
        rest = [task for task in (self._teller, self._heart) if task is not None]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        self._known.clear()
        self._owed.clear()
        await self._link.aclose()
        await self._local.aclose()

    def _post(self, known: _Known) -> None:
        """Has it told soon, together with others: what ends at one moment is one script call."""
        self._posted[known.notice.rid] = known
        if self._teller is None and not self._closed:
            self._teller = self._errand(self._tell_posted())

    async def _tell_posted(self) -> None:
        try:
            while self._posted:
                some = [*islice(self._posted.values(), TOLD_TOGETHER)]
                for known in some:
                    del self._posted[known.notice.rid]
                await self._tell(*some)
        finally:
            self._teller = None

    async def _tell(self, *some: _Known) -> bool:
        """Whether Redis knows them now; where it does not, it is told again by the next beats."""
        now = self._clock.monotonic()
        changes = [known.changes for known in some]
        keys = [self._prefix + "board"]
        args: list[object] = [*self._times(), *self._keeping_ms, self._worker]
        for known in some:
            notice = known.notice
            keys += (self._flight(notice.rid), self._index(notice.fingerprint, notice.key_id))
            args += (
                notice.rid,
                known.said,
                round((now - known.began) * 1e6),
                known.state.value,
                "1" if known.delivered else "",
                known.taken,
                len(known.watchers),
                len(known.left),
                *known.watchers,
                *known.left,
            )
        try:
            since, *lost = await self._run(_TELL, keys, args)
        except StoreAway as error:
            for known in some:
                known.heard |= error.asked
                self._owe(known)
            return False
        except asyncio.CancelledError:
            for known in some:
                known.heard = True
                self._owe(known)
            raise
        for number, (known, upto) in enumerate(zip(some, changes, strict=True), start=1):
            known.kept = number not in lost
            if known.kept:
                self._is_told(known, upto)
        self._look_at(since)
        if lost:
            # With all there is to say of them.
            return await self._tell(*(some[number - 1] for number in lost))
        return True

    def _is_told(self, known: _Known, changes: int) -> None:
        known.heard = True
        known.told = max(known.told, changes)
        if known.told == known.changes:
            self._owed.pop(known.notice.rid, None)
            self._let_go(known)

    def _owe(self, known: _Known) -> None:
        rid = known.notice.rid
        known = self._known.setdefault(rid, known)
        unheard = known.over and not known.heard
        if known.idle and (unheard or len(self._owed) >= MAX_OWED):
            self._owed.pop(rid, None)
            self._known.pop(rid)
            return
        self._owed[rid] = None
        self._keep_beating()

    def _let_go(self, known: _Known) -> None:
        if known.idle and self._known.pop(known.notice.rid, None) is not None:
            self._wanted.discard(known.notice.rid)
            if known.mine and known.over:
                self._gone.append((self._clock.monotonic(), known))

    def _recall(self, notice: FlightNotice) -> _Known:
        """What is known of a flight that Redis knows as well."""
        known = self._known.get(notice.rid)
        if known is None:
            flight = self._local.flight(notice.rid)
            known = self._from_local(flight) if flight is not None else _Known(notice, False, 0.0)
            known.told, known.heard = known.changes, True
            known.seen_at = self._clock.monotonic()
            self._known[notice.rid] = known
        return known

    def _from_local(self, flight: Flight) -> _Known:
        known = _Known(flight.notice, True, flight.began, delivered=flight.delivered)
        if flight.ended is not None:
            known.state = _State.ENDED if flight.joinable else _State.VOID
        return known

    async def _find(self, rid: str) -> _Known | None:
        """A flight that nobody here watches: one that landed here, or another process's."""
        flight = self._local.flight(rid)
        if flight is not None:
            return self._recall(flight.notice)
        seen = await self.look(rid)
        return self._recall(seen.notice) if seen is not None else None

    def _forgotten(self, known: _Known) -> FlightSeen:
        since = max(known.seen_at, self._back_at or 0.0)
        alive = self._clock.monotonic() - since < self._lease
        seen = _last_seen(known)
        return replace(seen, alive=seen.alive and alive)

    def _look_at(self, since: bytes) -> None:
        if self._since is not None and since != self._since:
            self._back()
            for each in self._known.values():
                each.kept = False
            self._owed |= dict.fromkeys(rid for rid, each in self._known.items() if each.mine)
        self._since = since

    def _back(self) -> None:
        """Redis answers again, and may have lost what it had."""
        now = self._clock.monotonic()
        self._back_at = now
        for flight in self._local.landed():
            self._known.setdefault(flight.notice.rid, self._from_local(flight))
        for at, known in self._gone:
            if now - at < GONE_SECONDS:
                self._known.setdefault(known.notice.rid, known)
        self._gone.clear()
        for rid, known in self._known.items():
            if known.mine and not known.flown:
                self._owed[rid] = None
        if self._known:
            self._keep_beating()
        self._wake.set()

    def _keep_beating(self) -> None:
        if self._heart is None and not self._closed:
            self._heart = asyncio.create_task(self._beats())

    async def _beats(self) -> None:
        while self._known:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._beat_seconds):
                    await self._wake.wait()
            self._wake.clear()
            beaten = [each for each in self._known.values() if each.is_beaten()]
            for batch in _batches(beaten, BATCH):
                if not await self._beat(batch):
                    break
            await self._pay()
        self._heart = None

    async def _beat(self, batch: Sequence[_Known]) -> bool:
        sent = [tuple(known.watchers) for known in batch]
        keys: list[str] = []
        args: list[object] = [self._offset_us(), self._least_ms]
        for known, watchers in zip(batch, sent, strict=True):
            notice = known.notice
            keys += (self._flight(notice.rid), self._index(notice.fingerprint, notice.key_id))
            flown, wants = "1" if known.flown else "", "1" if known.wants else ""
            args += (notice.rid, flown, wants, known.partials, len(watchers), *watchers)
        try:
            reply = await self._run(_BEAT, keys, args)
        except StoreAway:
            return False
        late: list[_Known] = []
        for known, watchers, said in zip(batch, sent, reply, strict=True):
            if said >= 0:
                known.seen_at = self._clock.monotonic()
            elif known.mine and known.told and not known.idle:
                self._owed[known.notice.rid] = None
            if said == 1 and known.flown:
                self._wanted.add(known.notice.rid)
            # Left while the beat was under way: Redis may have seen the beat last.
            left = [each for each in watchers if each not in known.watchers]
            if left:
                known.left += left
                known.changes += 1
                late.append(known)
        for known in late:
            await self._tell(known)
        return True

    async def _pay(self) -> None:
        if self._owed:
            # What comes late does no harm, but what is told now should be the last word.
            await self._link.settled()
        for rids in _batches(list(self._owed), TOLD_TOGETHER):
            some = [self._known[rid] for rid in rids if rid in self._known]
            for rid in rids:
                if rid not in self._known:
                    self._owed.pop(rid, None)
            if some and not await self._tell(*some):
                return

    async def _run(self, script: Script, keys: Sequence[str], args: Sequence[object]) -> Any:
        return await self._link.run(self._probe_key, self._deadline, script, keys, args)

    def _watcher(self) -> str:
        """A name that no other one has, in any process."""
        return f"{self._worker}.{self._seed}.{next(self._count):x}"

    def _flight(self, rid: str) -> str:
        return f"{self._prefix}fl:{rid}"

    def _index(self, fingerprint: str, key_id: str) -> str:
        return f"{self._prefix}sf:{fingerprint}:{key_id}"

    def _stream(self, rid: str) -> str:
        return f"{self._prefix}ev:{rid}"

    @property
    def _least_ms(self) -> int:
        return round(self._lease * 4000)

    def _offset_us(self) -> int:
        return round(self._offset() * 1e6) if self._offset is not None else 0

    def _times(self) -> tuple[int, int]:
        """Nobody is called dead just after Redis was away: who lives has to be heard first."""
        lease = round(self._lease * 1e6)
        if self._back_at is not None:
            since = self._clock.monotonic() - self._back_at
            lease = FOREVER_US if since < 3 * self._beat_seconds else lease
        return self._offset_us(), lease


def _last_seen(known: _Known) -> FlightSeen:
    return known.seen or FlightSeen(known.notice, False, True, len(known.watchers))


def _written(notice: FlightNotice) -> str:
    members = {name: getattr(notice, name) for name in _NOTICE}
    return json.dumps(members | {"at": notice.at.isoformat()})


def _read(text: bytes) -> FlightNotice | None:
    """None for what another release wrote and this one cannot read."""
    try:
        document = json.loads(text)
        return FlightNotice(**document | {"at": datetime.fromisoformat(document["at"])})
    except (ValueError, KeyError, TypeError):
        return None


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
