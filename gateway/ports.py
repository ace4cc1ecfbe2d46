"""What the house needs from outside: every Protocol, in the order of a request's life.

A port says what is promised; who keeps the promise is chosen in ``app.py``. Every store port has
one contract suite in ``tests/contract/`` that each implementation passes.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Protocol, TypeAlias

from gateway.domain.books import Adjustment, Correction, Discrepancy, Hold, JournalLine
from gateway.domain.call import Call, Edit, Usage
from gateway.domain.ledger import (
    Balance,
    By,
    Claim,
    Claimed,
    Denied,
    Entry,
    Held,
    Line,
    Replay,
    Reroute,
    Settlement,
    UsageRow,
    UserUsage,
)
from gateway.domain.money import Money
from gateway.domain.owned import Owned, OwnedKind
from gateway.domain.quota import Demand, Grant, Limit, Refusal
from gateway.domain.receipt import Delivery, Receipt
from gateway.domain.record import record
from gateway.domain.route import Target
from gateway.domain.team import Key, Team


class Clock(Protocol):
    """The one source of time."""

    def now(self) -> datetime:
        """The instant, aware, in UTC."""

    def monotonic(self) -> float:
        """Seconds that never go back, for durations and deadlines."""


class Directory(Protocol):
    """Teams and keys that commands made; those declared in the file never come here.

    Secrets never come here either: a key is found by the HMAC digest of its secret.
    Raises ``LedgerUnavailable`` when the store cannot be read.
    """

    async def find_key(self, digest: bytes) -> tuple[Team, Key] | None:
        """The key with this digest and its team, whatever their state; None if unknown."""

    async def teams(self) -> list[Team]: ...

    async def some_teams(self, most: int) -> list[Team]:
        """The first so many by name, of those that are not disabled."""

    async def keys(self, team: str | None = None) -> list[Key]: ...

    async def teams_behind(self, after: str, most: int) -> list[Team]:
        """A page of all teams, by name: the first so many behind ``after``. All of it is never
        read at once: 100,000 teams take seconds."""

    async def keys_behind(self, after: str, most: int) -> list[tuple[Team, Key]]:
        """The same of keys, by id, each with its team."""

    async def teams_named(self, ids: Sequence[str]) -> list[Team]:
        """Those of these names that there are, in no order."""

    async def keys_named(self, ids: Sequence[str]) -> list[tuple[Team, Key]]:
        """Those with these ids that there are, in no order, each with its team."""

    async def create_team(self, team: Team) -> None:
        """Raises ``AlreadyExists``."""

    async def update_team(self, team: Team) -> None:
        """Replaces a team's models, limits and switches. Raises ``NotKnown``."""

    async def create_key(self, key: Key, digest: bytes) -> None:
        """``key.pepper`` says what the digest was made with. Raises ``AlreadyExists`` for the id or
        the digest, ``NotKnown`` for the team."""

    async def revoke_key(self, key_id: str, at: datetime) -> Key:
        """Revoking twice keeps the first date. Raises ``NotKnown``."""

    async def rehash_key(self, old: bytes, new: bytes, pepper: str) -> None:
        """A key's digest under another pepper, and that one's public id. Harmless where nothing
        has ``old`` any more; ``old`` may be ``new``, where only the id was not known yet."""

    async def declared_id(self, digests: Sequence[bytes], proposed: str) -> str:
        """The id of a key that the file declares: the one it got when one of its ``digests``
        (newest pepper first) was first seen, else ``proposed``, remembered from now on for all
        of them. So the books of a key outlive a change of the pepper."""

    async def ping(self) -> None: ...


class AlreadyExists(Exception):
    """A team or a key of that name is there already."""


class NotKnown(Exception):
    """There is no team or key of that name."""


class BooksChanged(Exception):
    """What an adjustment was worked out from is no longer so; nothing was booked."""


class Gate(Protocol):
    """Rates and concurrency: fast and forgettable."""

    async def take(self, rid: str, limits: Sequence[Limit], demand: Demand) -> Grant | Refusal:
        """Takes the demand against every limit, or nothing. Money limits are not looked at.

        Requests and images a minute are GCRA with a burst of one minute's amount; slots are held
        until ``release``. The same rid again takes nothing twice. For a store that is away a local
        gate stands in with this process's share of each limit, and the grant says ``degraded``;
        where the owner chose to deny instead, it raises ``GateUnavailable``.
        """

    async def release(self, rid: str, limits: Sequence[Limit]) -> None:
        """Gives the slots back. Repeating it is harmless."""

    def release_at_once(self, rid: str) -> bool:
        """``release``, where nobody has to wait for that: it is done, or seen to by the gate before
        it closes. False, and nothing done, where somebody has to."""

    async def undo(self, rid: str, limits: Sequence[Limit], demand: Demand) -> None:
        """Gives everything back, rates too: for a call that the ledger refused."""

    async def ping(self) -> None:
        """Raises when the store behind it does not answer."""

    async def aclose(self) -> None: ...


class Ledger(Protocol):
    """Money: durable and exact. Each call returns only when what it says is on disk.

    Raises ``LedgerUnavailable`` when that cannot be promised; the call may be repeated.
    """

    async def reserve(self, claim: Claim) -> Held | Denied | Claimed: ...

    async def claimed(
        self, team: str, idempotency_key: str, fingerprint: str, at: datetime
    ) -> Claimed | None:
        """Whose an idempotency key is, as ``reserve`` would say it at that time; None where it is
        free: unknown, older than a day, or that of the same request which was surely not billed.
        It sees what any process has reserved before, and takes nothing."""

    async def reroute(self, reroute: Reroute) -> Held | Denied:
        """Another upstream, and room for its bound, durable before anything is sent there. All or
        nothing; ``Denied`` leaves the hold as it was. Where nothing more has to be held, there is
        nothing to deny. Repeating it is harmless (``Held.duplicate``). Raises ``NotKnown`` where no
        such call is held (any more)."""

    async def settle(self, settlement: Settlement) -> Entry:
        """Applies SETTLE, VOID or EXPIRE by the table of money.md 3. Idempotent by rid."""

    async def replay(self, replay: Replay) -> None:
        """Counts a cached answer. Not awaited by the client's answer, not durable before it."""

    async def sweep(
        self, now: datetime, limit: int = 100, silent_before: datetime | None = None
    ) -> list[Entry]:
        """Expires the holds whose lease ended before ``now``, oldest first.

        With ``silent_before``, also those of workers that have beaten (``Upkeep.beat``), but not
        since then: they are dead, and what they bought is charged at its bound. Several replicas
        may sweep at once; each hold is expired by one.
        """

    async def balances(self, lines: Sequence[Line]) -> list[Balance]: ...

    async def usage(
        self, since: str | None = None, until: str | None = None, team: str | None = None
    ) -> list[UsageRow]:
        """Rows by day, team, key and model, between two days (``2026-11-22``, inclusive)."""

    async def open_holds(self) -> int: ...

    async def unresolved(self) -> Money:
        """What is posted only because its outcome is unknown, in nano-dollars."""

    async def ping(self) -> None: ...

    async def aclose(self) -> None: ...


class Books(Protocol):
    """The ledger as a person reads and mends it. Same store, same transactions, same errors."""

    async def find(self, rid: str) -> Hold | None:
        """A reservation by its id; None where there is none, or it was forgotten."""

    async def journal(self, rid: str) -> list[JournalLine]:
        """What happened to a reservation, oldest first."""

    async def unresolved(self, limit: int = 100, after: str = "") -> list[Hold]:
        """Holds that ask for a look: expired ones, and posted ones with a flag that says their cost
        may be wrong (``transition.DOUBTFUL``). By rid, those behind ``after``."""

    async def oldest_hold(self) -> Hold | None:
        """The open hold whose lease ends first; None where none is open."""

    async def correct(self, correction: Correction) -> Entry:
        """Posts what a call did cost, by ``transition.corrected``. Idempotent by the correction's
        id: a repeat finds the hold as it is. ``applied`` is False for a repeat, for a hold that
        still runs and for one that is so already; the last two leave no trace, and the id free.
        Raises ``NotKnown``, ``ValueError`` for a negative cost."""

    async def adjustment(self, adjustment_id: str) -> Adjustment | None:
        """One that was applied. None where there is none, or the id is that of a correction."""

    async def adjust(self, adjustment: Adjustment) -> bool:
        """Moves a team's balances and its day's usage. False where its id was applied before."""

    async def adjust_all(
        self, adjustments: Sequence[Adjustment], seen: Mapping[tuple[str, str], Money]
    ) -> list[str]:
        """Applies all of them or none, in one transaction; returns the ids that were not applied
        before. ``seen``: (day, model) -> what all teams were booked, when the adjustments were
        worked out. Raises ``BooksChanged`` where one of these sums is another by now: so of two
        that mend the same difference at once, one does."""

    async def routed(self, day: str) -> list[tuple[str, UsageRow]]:
        """What closed calls of a UTC day cost, with the upstream that they went to in the end: by
        upstream, team, key and model; only ``requests``, ``images`` and ``cost`` are set. Without
        adjustments, and without calls that were forgotten."""

    async def usage_by_user(
        self, team: str | None = None, since: str | None = None, until: str | None = None
    ) -> list[UserUsage]:
        """What closed calls cost, by team and end user, between two days (inclusive, UTC); calls
        that were forgotten (``Upkeep.forget``) too. Adjustments and answers from the cache are not
        in it."""

    async def usage_by(
        self,
        by: By,
        team: str | None = None,
        since: str | None = None,
        until: str | None = None,
    ) -> list[UsageRow]:
        """The rows of ``Ledger.usage`` added up by one thing, in its order; the names of all others
        are empty. A key is named with its team, a month stands in ``day``."""

    async def audit(self) -> list[Discrepancy]:
        """Adds everything up a second way (I2 of money.md); empty where the books are right.

        Every account: posted is the sum of its holds' costs, adjustments and forgotten holds;
        pending is the sum of its open bounds. All days of usage cost what all holds, adjustments
        and forgotten holds cost. Each day of a team is what its users did, and what was adjusted or
        answered from the cache; each month of a user is the sum of its days.
        """


class Ownership(Protocol):
    """Whose the ids are that live at upstreams. Same store as ``Ledger``, same errors."""

    async def record(self, owned: Sequence[Owned]) -> None:
        """Durable when it returns, all of them or none. An id that is there already stays its
        owner's: only the owner's own ``expires``, ``size_bytes`` and ``detail`` are replaced."""

    async def find(self, team: str, ids: Sequence[str], now: datetime) -> dict[str, Owned]:
        """Those of ``ids`` that are this team's and not expired, by id."""

    async def others(self, team: str, ids: Sequence[str], now: datetime) -> frozenset[str]:
        """Those of ``ids`` that are another team's: for the count of who reached for them, never
        for an answer."""

    async def owned(
        self,
        team: str,
        kind: OwnedKind,
        now: datetime,
        *,
        limit: int,
        after: str = "",
        newest_first: bool = True,
        purpose: str = "",
    ) -> list[Owned]:
        """A page of a team's ids, by creation and then id. Those behind ``after``, which may be
        gone; ``purpose`` is that of files (``detail["purpose"]``). Expired ones are left out."""

    async def total_bytes(self, team: str, kind: OwnedKind, now: datetime) -> int: ...

    async def disown(self, team: str, id: str) -> bool:
        """Forgets an id. False where it is not this team's."""

    async def forget_expired(self, now: datetime, limit: int = 1000) -> int:
        """Deletes what has expired; returns how many."""


class Upkeep(Protocol):
    """What keeps the books in order while nobody looks. Same store as ``Ledger``."""

    async def beat(self, worker: str, now: datetime) -> None:
        """This worker lives. Silent workers without open holds are forgotten after a day."""

    async def forget(self, before: datetime, limit: int = 1000) -> int:
        """Deletes posted and voided holds reserved before then, and their journal lines, rolled up
        per account so that ``Books.audit`` still adds up; returns how many. Balances and daily
        usage stay for ever; expired holds, and posted ones whose cost may be wrong
        (``transition.DOUBTFUL``), stay until somebody resolves them, and a hold that still has its
        idempotency key until a sweep has cleared it."""

    async def claim_notice(
        self, account: str, mark: str, now: datetime, lease_seconds: float
    ) -> bool:
        """Whether this caller is the one to say that ``account`` has passed ``mark``: True once,
        and again after the lease where ``notice_sent`` did not follow."""

    async def notice_sent(self, account: str, mark: str, now: datetime) -> None: ...

    async def factors(self) -> dict[tuple[str, str], int]:
        """(upstream, model served there) -> by how much its bounds are raised, in millionths."""

    async def raise_factor(self, upstream: str, model: str, millionths: int) -> int:
        """Raises a factor, never lowers it; returns what it is now."""

    async def reset_factor(self, upstream: str, model: str) -> bool:
        """Forgets a factor. False where there is none."""


class Store(Protocol):
    """One database, open: its views."""

    @property
    def ledger(self) -> Ledger: ...

    @property
    def books(self) -> Books: ...

    @property
    def upkeep(self) -> Upkeep: ...

    @property
    def directory(self) -> Directory: ...

    @property
    def ownership(self) -> Ownership: ...

    @property
    def clock_skew_seconds(self) -> float:
        """By how much this process's clock is ahead of the store's, as of the last beat; 0 where
        the store has no clock of its own."""

    async def aclose(self) -> None:
        """Commits what is queued and closes it. Repeating it is harmless."""


class StoreError(Exception):
    """A database cannot be used, and a person has to look. The message says what to do."""


class Unreachable(Exception):
    """A store does not answer; it may again."""


class Safe(Protocol):
    """Settlements that the ledger could not take, on disk until it does (money.md 6a)."""

    async def keep(self, settlement: Settlement) -> None:
        """Durable when it returns. Raises ``OSError``."""

    async def settled(self, rid: str) -> None:
        """The ledger has it."""

    async def left_behind(self) -> list[Settlement]:
        """What processes that are gone have left; theirs are taken over."""

    async def aclose(self) -> None: ...


class Form(StrEnum):
    """How a kept answer is written down."""

    JSON = "json"
    EVENTS = "events"


@record
class CachedMeta:
    """What a kept answer says of itself.

    ``streamable``: it has a form as one completed event too. ``cost`` is what the answer cost when
    it was bought, in nano-dollars. Only results, which are kept by request id, have the rest:
    ``team`` is whose it is, ``status`` may be that of an error, ``headers`` are what was said of
    the call beside it; ``same_as`` is the request under whose id the answer itself is kept.
    """

    stored_at: datetime
    cost: Money
    images: int
    model_served: str
    upstream: str
    size_bytes: int
    streamable: bool = False
    usage: Usage = field(default_factory=Usage)
    size: str = ""
    quality: str = ""
    price_id: str = ""
    team: str = ""
    operation: str = ""
    status: int = 200
    form: Form = Form.JSON
    headers: tuple[tuple[str, str], ...] = ()
    same_as: str = ""


@dataclass(frozen=True, slots=True)
class Cached:
    """A kept answer in its JSON form, byte for byte. ``chunks`` may be called more than once;
    what it yields survives an eviction that happens meanwhile."""

    meta: CachedMeta
    chunks: Callable[[], AsyncIterator[bytes]]


@record
class CacheEntry:
    """What is kept of an answer beside its bytes: under which key, and for how long."""

    key: str
    meta: CachedMeta
    ttl_seconds: float


class Lent:
    """``size`` bytes of a ``buffer`` from ``start`` on, which is written over when the next piece
    is asked for: who wants to keep them copies them (``bytes``). Nothing is allocated for them."""

    __slots__ = ("buffer", "size", "start", "view")

    def __init__(self, buffer: bytearray, size: int, start: int = 0) -> None:
        self.buffer = buffer
        self.size = size
        self.start = start
        self.view = memoryview(buffer)[start : start + size]

    @property
    def end(self) -> int:
        return self.start + self.size

    def __len__(self) -> int:
        return self.size

    def __bytes__(self) -> bytes:
        return bytes(self.view)


class LentFile(Lent, ABC):
    """As ``Lent``, of bytes that stand in a file: in the buffer they are once they are fetched. Who
    can have the system send them from where they stand (``fd``, from ``at`` on) copies nothing."""

    __slots__ = ("at", "fd")

    def __init__(self, fd: int, at: int, size: int) -> None:
        super().__init__(bytearray(), size)
        self.fd = fd
        self.at = at

    def __bytes__(self) -> bytes:
        """Raises ``ValueError`` for what was not fetched."""
        if len(self.view) != self.size:
            raise ValueError("a piece of a file is fetched before it is read")
        return super().__bytes__()

    @abstractmethod
    def is_at_hand(self) -> bool:
        """Whether nobody would wait for a disk: the system nearly surely has all in memory."""

    @abstractmethod
    async def fetch(self) -> None:
        """May be repeated. Raises ``OSError``."""


FILE_READ_BYTES = 512 * 1024
"""At most so much of a file is in memory for each who reads it."""


class Growing:
    """A body that others write while it is read. It is read like any other; who takes ``groups``
    instead gets all pieces that are there, up to some size, at once."""

    __slots__ = ("_rest", "groups")

    def __init__(self, groups: AsyncGenerator[Sequence[bytes], None]) -> None:
        self.groups = groups
        self._rest: Iterator[bytes] = iter(())

    def __aiter__(self) -> Growing:
        return self

    async def __anext__(self) -> bytes:
        while True:
            for piece in self._rest:
                return piece
            self._rest = iter(await anext(self.groups))

    async def aclose(self) -> None:
        self._rest = iter(())
        await self.groups.aclose()


class Parts:
    """A body of which every byte is in memory: ``parts``, as they came. It is read like any other;
    who takes ``parts`` instead waits for nothing and copies nothing.

    ``beside`` is another entry that will be made of the same bytes, in another store: one that
    can make both at once says in ``made`` where it has made that one too.
    """

    __slots__ = ("_rest", "beside", "made", "parts")

    def __init__(self, parts: Sequence[bytes], beside: CacheEntry | None = None) -> None:
        self.parts = parts
        self.beside = beside
        self.made: object | None = None
        self._rest = iter(parts)

    def __aiter__(self) -> Parts:
        return self

    async def __anext__(self) -> bytes:
        for part in self._rest:
            return part
        raise StopAsyncIteration

    def again(self) -> Parts:
        """The same, to be read once more."""
        parts = Parts(self.parts)
        parts.made = self.made
        return parts

    async def aclose(self) -> None:
        """Nothing is open: so that it can stand where a generator does."""


class Whole:
    """A body that is one piece in memory, and is dropped as it is taken: a call that waits for its
    picture does not keep what is sent already. ``taken`` is how many bytes of it were."""

    __slots__ = ("_piece", "taken")

    def __init__(self, piece: bytes) -> None:
        self._piece = piece
        self.taken = 0

    def take(self) -> bytes:
        """All of it, once; then nothing."""
        piece, self._piece = self._piece, b""
        self.taken += len(piece)
        return piece

    def __aiter__(self) -> Whole:
        return self

    async def __anext__(self) -> bytes:
        if piece := self.take():
            return piece
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """It is not wanted any more."""
        self._piece = b""


class OpenFile:
    """An open file. Its descriptor is closed with the last one who holds this."""

    __slots__ = ("__weakref__", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        weakref.finalize(self, os.close, fd)

    def read(self, size: int, offset: int) -> bytes:
        """Raises ``OSError`` where the file ends early."""
        data = os.pread(self.fd, size, offset)
        if len(data) != size:
            raise OSError("a kept file ends early")
        return data


class FileBody:
    """A body that stands in a file, from ``at`` to ``end``; ``at`` moves as it is read. It is read
    like any other; who can have the system send it from where it stands copies nothing.

    ``waits``: the file is on a disk, which only a thread may wait for.
    """

    __slots__ = ("at", "end", "file", "waits")

    def __init__(self, file: OpenFile, at: int, end: int, *, waits: bool) -> None:
        self.file = file
        self.at = at
        self.end = end
        self.waits = waits

    def __aiter__(self) -> FileBody:
        return self

    async def __anext__(self) -> bytes:
        if self.at == self.end:
            raise StopAsyncIteration
        return await self.read(FILE_READ_BYTES)

    async def read(self, most: int) -> bytes:
        """The next bytes, at most so many. Raises ``OSError`` where they cannot be read."""
        size = min(most, self.end - self.at)
        if self.waits:
            data = await asyncio.to_thread(self.file.read, size, self.at)
        else:
            data = self.file.read(size, self.at)
        self.at += size
        return data


class Cache(Protocol):
    """Exact results, by fingerprint. A store that is away is a miss, never an error."""

    async def get(self, key: str) -> Cached | None: ...

    async def put(
        self, key: str, meta: CachedMeta, chunks: AsyncIterator[bytes], ttl_seconds: float
    ) -> bool:
        """Keeps an answer; whether it did. Nothing is visible to ``get`` before the last chunk is
        stored."""

    def put_at_once(self, entry: CacheEntry, body: Parts) -> bool:
        """As ``put``, where that takes no waiting. False: nothing was done, it is to be put."""

    async def holds(self, key: str) -> bool:
        """Whether it is there, though ``get`` may be too busy to hand it out. Unlike ``get`` it
        raises where that cannot be said: ``Unreachable``, ``OSError``."""

    async def delete(self, key: str) -> None: ...

    async def ping(self) -> None: ...

    async def aclose(self) -> None: ...


@record
class FlightNotice:
    """A flight as others may know it: which call it is (``fingerprint``), whose, since when."""

    rid: str
    fingerprint: str
    team: str
    key_id: str
    operation: str
    model: str
    stream: bool
    at: datetime


@dataclass(frozen=True, slots=True)
class FlightSeen:
    """A flight as its board has it now. ``watchers`` are clients that still wait for it;
    ``partials`` were seen so far. ``alive``: it runs, and whoever flies it has beaten lately; one
    that is not alive and has not ended has an unknown outcome."""

    notice: FlightNotice
    ended: bool
    alive: bool
    watchers: int
    partials: int = 0


class FlightBoard(Protocol):
    """Which calls are under way, and who waits for them: what lets a retry join its own flight,
    wherever it lands. Fast and forgettable like the gate; money never depends on it.

    A board that is shared goes on with the flights of this process while its store is away; it
    never raises for that.
    """

    async def announce(self, notice: FlightNotice) -> None:
        """The call is about to be sent, watched by one client. From here on a flight that is
        silent may have been bought."""

    async def join(
        self, fingerprint: str, key_id: str, *, orphans_only: bool
    ) -> FlightNotice | None:
        """Finds a flight of this call and key, and counts the caller among its watchers, in one
        step, so that two who look at once find two flights where there are two. First one that
        nobody watches, running or ended but not handed over, then (unless ``orphans_only``) one
        that is watched; of several the oldest. Dead ones are found too."""

    async def leave(self, rid: str, *, delivered: bool) -> None:
        """One watcher less. ``delivered``: it has the whole answer, so nobody needs to be
        reunited with it: an ended flight is not found any more."""

    async def progress(self, rid: str, partials: int) -> None:
        """So many partial pictures were seen. Not awaited by anything that matters."""

    async def end(self, rid: str, *, joinable: bool) -> None:
        """It is over, and its result is kept. ``joinable`` is False where surely nothing was
        billed: a retry is then a new call."""

    def leave_at_once(self, rid: str, *, delivered: bool) -> bool:
        """``leave``, where nobody has to wait for that: it is done, or seen to by the board before
        it closes. False, and nothing done, where somebody has to."""

    def progress_at_once(self, rid: str, partials: int) -> bool:
        """``progress``, likewise."""

    def end_at_once(self, rid: str, *, joinable: bool) -> bool:
        """``end``, likewise."""

    async def look(self, rid: str) -> FlightSeen | None:
        """None for one that nobody knows, or any more: it is over and nobody can join it."""

    async def take_over(self, rid: str) -> bool:
        """Whether the caller is the one who may buy again what a dead flight left: once each."""

    async def want_events(self, rid: str) -> None:
        """Somebody in another process watches the stream: its events are wanted (``wanted``)."""

    def wanted(self, rid: str) -> bool:
        """Whether another process wants this flight's events, as of the last beat."""

    async def add_events(self, rid: str, start: int, content: bytes) -> None:
        """Bytes of a wanted stream, from its offset ``start``; adding them twice is harmless."""

    async def events(self, rid: str, start: int) -> bytes:
        """What was added from ``start`` on; empty where there is no more yet."""

    async def aclose(self) -> None: ...


@record
class UpstreamRequest:
    """What a dialect makes of a call: ``path`` is below the upstream's base URL, ``edits`` are
    spliced into the client's body, which is otherwise sent as it came."""

    path: str
    headers: tuple[tuple[str, str], ...]
    edits: tuple[Edit, ...] = ()


class Provider(Protocol):
    """A dialect: pure, no socket, no clock, no settings."""

    def __call__(self, call: Call, target: Target) -> UpstreamRequest: ...


@dataclass(slots=True)
class Outgoing:
    """One request to an upstream, without its credentials: the origin's client adds those.

    ``path`` is below the upstream's base URL. ``body`` is read once, and each of its pieces is
    sent before the next is asked for; ``length`` is its size in bytes, known because a request is
    taken in whole before it is sent on. ``max_response_bytes`` is what its answer may have, where
    that is more than a picture's.
    """

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: AsyncIterator[bytes | Lent] | None = None
    length: int = 0
    max_response_bytes: int = 0


Take: TypeAlias = Callable[[bytes], bool]
"""Takes a piece of a body without waiting, or says False and has done nothing with it."""


class Reply(Protocol):
    """An upstream's answer, its body still arriving."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Names in lower case. Content encodings are already undone."""

    def chunks(self, take: Take | None = None) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises ``UpstreamBroken`` where it is cut or late.

        ``take`` may be called with pieces as they come, in their order; those that it does not
        take, and those that it is not called with, are yielded. What it raises is raised here.
        """

    async def aclose(self) -> None:
        """Gives the connection back, or drops it when the body was not read to its end."""


@dataclass(frozen=True, slots=True)
class Credential:
    """One of an upstream's keys, by a public name: ``id`` tells it from the others in logs and
    metrics, and stays while the key does. The lowest ``order`` comes first, and those of one
    order share by ``weight``. ``mark`` knows it again in another process and after a restart (an
    HMAC of the key; empty for a sandbox): what lives at an upstream remembers it."""

    id: str
    order: int = 0
    weight: int = 1
    mark: str = ""


class Upstream(Protocol):
    """One configured provider account: its origin, its keys, its deadlines."""

    @property
    def name(self) -> str: ...

    @property
    def provider(self) -> str:
        """Whose price list applies."""

    @property
    def address(self) -> tuple[str, int]:
        """Its host and port."""

    @property
    def ready(self) -> bool:
        """False where it has no key: it is off."""

    @property
    def credentials(self) -> Sequence[Credential]:
        """Its keys, as they are configured now."""

    def masked(self, text: bytes) -> bytes:
        """What it has said, without the secrets that it was sent."""

    async def send(self, outgoing: Outgoing, credential: str) -> Reply:
        """Sends it with the key of that id (any, where it is gone). Raises ``UpstreamUnavailable``
        when surely nothing was sent, ``UpstreamUnknown`` once a byte may have left and no answer
        came."""

    async def aclose(self) -> None: ...


class BillUnreadable(Exception):
    """What a provider billed cannot be read. The message says why, and what to do."""


class Telemetry(Protocol):
    """Who hears of each request's end. Called once a request, when its money is settled too."""

    def finished(self, receipt: Receipt, delivery: Delivery) -> None: ...


@dataclass(frozen=True, slots=True)
class Message:
    """News for the operator's own systems, as JSON. ``id`` is the same however often it is sent,
    and another for other news; ``type`` is like ``budget.warning``, ``at`` when it was seen."""

    id: str
    type: str
    at: datetime
    data: Mapping[str, object]


class Notifier(Protocol):
    """Who brings messages to where somebody hears of them."""

    async def tell(self, message: Message) -> bool:
        """Whether it was delivered; tried for a minute or so. Never raises for a receiver that is
        away: whoever has the message tells it again later, under the same id."""

    async def aclose(self) -> None: ...


class Postbox(Protocol):
    """One address on the web that bodies are posted to."""

    async def post(self, headers: Sequence[tuple[str, str]], body: bytes) -> int:
        """The answer's status; redirects are not followed. Raises ``NotDelivered``."""

    async def aclose(self) -> None: ...


class NotDelivered(Exception):
    """No answer came, and why; without the address, which may hold a token."""
