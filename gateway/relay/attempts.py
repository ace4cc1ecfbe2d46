"""From what is held to an upstream's 200: over the ways and keys that there are, until one answers.

Nothing is ever sent again once a byte of it may have been bought; ``failover.verdict`` is the
table. Each way that is not the one the call is held for is first put to the ledger, so that what
is sent is always covered. Nothing is hedged: two attempts never run at once.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from gateway.domain.errors import (
    Evidence,
    GatewayError,
    LedgerUnavailable,
    Overloaded,
    UpstreamAccount,
    UpstreamUnavailable,
)
from gateway.domain.ledger import Denied, Held, Reroute
from gateway.domain.record import record
from gateway.ports import (
    Clock,
    Credential,
    Ledger,
    Lent,
    NotKnown,
    Outgoing,
    Parts,
    Provider,
    Reply,
    Whole,
)
from gateway.relay.body import Spool, edited, edited_length
from gateway.relay.failover import (
    ERROR_BODY_BYTES,
    LEAST_WAIT_SECONDS,
    UNREACHED,
    UPSTREAM_RID_CHARS,
    Kind,
    Next,
    kind_of,
    refusal,
    said_wait,
    verdict,
    why_refused,
)
from gateway.relay.health import Chance, Health, Ticket, Why
from gateway.relay.media import is_stream
from gateway.relay.owner import account_rests, rests
from gateway.relay.plan import Plan, Way
from gateway.relay.references import keys_at
from gateway.relay.trail import Trail

log = logging.getLogger(__name__)

MOST = 2
PATIENCE_SECONDS = 50.0
"""After the first attempt began; the lease is a minute longer than the longest call."""
PAUSE_SECONDS = (0.2, 2.0)
"""Before an upstream that has failed is asked again: full jitter."""
RETRY_SECONDS = 5.0


@record
class Opened:
    """An upstream's 200, its body still arriving. ``attempts`` is how often the call was tried
    upstream, this one in; ``held`` is what covers it now; ``ticket`` who sent it."""

    reply: Reply
    way: Way
    attempts: int
    held: Held
    ticket: Ticket


@record
class Failed:
    """No 200. ``way`` is the one tried last, ``attempts`` how often the call was tried, 0 where
    nothing was sent; ``status`` and ``headers`` are the last answer's, 0 and empty without one,
    ``reply_rid`` the provider's name for it."""

    error: GatewayError
    way: Way
    attempts: int
    held: Held
    reply_rid: str = ""
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Journey:
    """One call, and what was seen of its ways so far. Ways are told apart by their place in the
    plan, keys by that and their id. Nothing is seen of most calls, and each of them waits with its
    journey for a picture: what is empty is shared by all (1.5 KB a call as sets of its own)."""

    plan: Plan
    held: Held
    way: Way
    """Held for, and tried last."""
    began: float
    tried: int = 0
    was_sent: bool = False
    counted: int = 0
    error: GatewayError | None = None
    last: Reply | None = None
    spent: frozenset[int] = frozenset()
    shut: frozenset[int] = frozenset()
    """Ways that may not be entered, whatever their keys are good for."""
    barred_keys: frozenset[tuple[str, str, str]] = frozenset()
    barred_hosts: frozenset[str] = frozenset()
    failing: frozenset[str] = frozenset()
    """Upstreams that failed: they are asked again only after a pause, and within their budget."""
    sent: tuple[tuple[int, str], ...] = ()
    """Which key was sent where, once for each time."""
    fallbacks: frozenset[str] = frozenset()
    poor: frozenset[str] = frozenset()
    """Failed upstreams whose budget of retries is used up."""


class Attempts:
    """Opens answers for one pipeline. At most ``most`` attempts for each call; one that only found
    out that a key is refused for everything is free, and not counted. None begins later than
    ``patience_seconds`` after the first: it has to end before its hold does."""

    def __init__(
        self,
        provider: Provider,
        ledger: Ledger,
        health: Health,
        clock: Clock,
        most: int = MOST,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: Chance | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._patience_seconds = patience_seconds
        self._provider = provider
        self._ledger = ledger
        self._health = health
        self._clock = clock
        self._most = most
        self._sleep = sleep
        self._chance = chance or random.Random()
        self._turns: dict[str, Counter[str]] = {}

    def replace(self, most: int, patience_seconds: float) -> None:
        """From now on these hold, for what is under way too."""
        self._most = most
        self._patience_seconds = patience_seconds

    async def open(
        self,
        rid: str,
        plan: Plan,
        body: Spool,
        held: Held,
        enter: Callable[[Way], bool] = lambda way: True,
        trail: Trail | None = None,
    ) -> Opened | Failed:
        """The first 200, or why there is none. ``enter`` is asked before each attempt whether it
        may go that way; a way that it may not is passed over. ``trail`` hears of each attempt.
        Raises ``LedgerUnavailable`` where the first way that is open cannot be held for; whatever
        else goes wrong is ``Failed``."""
        journey = _Journey(plan, held, plan.way, self._clock.monotonic())
        while (found := self._next(journey)) is not None:
            place, credential, ticket, again = found
            del found
            way = plan.ways[place]
            if not enter(way):
                self._health.unused(ticket)
                journey.shut |= {place}
                continue
            if way is not journey.way and not await self._cover(rid, journey, place, ticket):
                continue
            if again:
                # Other upstreams were asked at once; this one has failed a moment ago.
                try:
                    await self._sleep(self._chance.uniform(*PAUSE_SECONDS))
                except BaseException:
                    self._health.unused(ticket)
                    raise
            if way.model is not plan.asked and way.model.name not in journey.fallbacks:
                journey.fallbacks |= {way.model.name}
                self._health.listener.fell_back(plan.asked.label or plan.asked.name, way.model.name)
            journey.way = way
            journey.sent += ((place, credential.id),)
            reply, error = await self._attempt(plan, way, body, ticket, trail)
            journey.tried += 1
            journey.was_sent |= error is None or kind_of(error) not in UNREACHED
            journey.counted += error is None or not _is_free(error, reply)
            if again:
                outcome = "answered" if error is None else "failed"
                self._health.listener.retried(way.upstream.name, outcome)
            if reply is not None and error is None:
                return Opened(reply, way, journey.tried, journey.held, ticket)
            journey.last, journey.error = reply, error
            if error is None or not self._goes_on(journey, place, credential, error):
                break
        return self._ended(journey)

    def landed(self, opened: Opened, error: GatewayError | None) -> None:
        """How the body of a 200 ended, for the counts and, where it was an error of the owner's
        account after all, for the key."""
        if error is None:
            return
        kind = kind_of(error)
        if kind is None:
            return
        if kind is Kind.BAD_ANSWER and is_stream(opened.reply):
            kind = Kind.SSE
        self._health.listener.failed(opened.ticket.upstream, kind.value)
        if isinstance(error, UpstreamAccount):
            self._health.refused(opened.ticket, why_refused(error, opened.reply.status))

    def _next(self, journey: _Journey) -> tuple[int, Credential, Ticket, bool] | None:
        """Where to go now: the place of a way, a key with leave to be used, and whether its
        upstream has failed this call before. First ways of upstreams that have not, the asked
        model's before the others'; of those that have, last of all, whoever was not asked yet."""
        if journey.counted >= self._most or (journey.tried and self._is_late(journey)):
            return None
        untouched = not (journey.tried or journey.shut or journey.spent)
        if untouched and (found := self._admitted(journey, 0)) is not None:
            return 0, *found, False  # the first way is free: nearly every call takes it
        places = [place for place in range(len(journey.plan.ways)) if self._is_open(journey, place)]
        fresh = [place for place in places if not self._has_failed(journey, place)]
        for place in fresh:
            if (found := self._admitted(journey, place)) is not None:
                return place, *found, False
        again = [place for place in places if self._has_failed(journey, place)]
        for place in sorted(again, key=lambda one: self._times(journey, one)):
            upstream = journey.plan.ways[place].upstream.name
            if upstream in journey.poor or (found := self._admitted(journey, place)) is None:
                continue
            if self._health.take_retry(upstream):
                return place, *found, True
            self._health.unused(found[1])
            journey.poor |= {upstream}
        return None

    def _is_late(self, journey: _Journey) -> bool:
        return self._clock.monotonic() - journey.began > self._patience_seconds

    def _is_open(self, journey: _Journey, place: int) -> bool:
        upstream = journey.plan.ways[place].upstream.name
        closed = journey.spent | journey.shut
        return place not in closed and upstream not in journey.barred_hosts

    def _has_failed(self, journey: _Journey, place: int) -> bool:
        return journey.plan.ways[place].upstream.name in journey.failing

    def _times(self, journey: _Journey, place: int) -> int:
        return sum(one == place for one, _ in journey.sent)

    def _admitted(self, journey: _Journey, place: int) -> tuple[Credential, Ticket] | None:
        """A key of a way that may be used now: of those sent least in this call, by order, and
        then in turn."""
        way = journey.plan.ways[place]
        name = way.upstream.name
        left: Sequence[Credential] = keys_at(way.upstream.credentials, journey.plan.anchor)
        if journey.barred_keys:
            left = [
                one for one in left if (name, one.id, way.target.model) not in journey.barred_keys
            ]
        while left:
            if len(left) == 1:
                # One key takes every turn: nothing to compare, which is most of the time here.
                ticket = self._health.admit(name, left[0].id, way.target.model)
                return None if ticket is None else (left[0], ticket)
            ranks = [(journey.sent.count((place, one.id)), one.order) for one in left]
            least = min(ranks)
            equal = [one for one, rank in zip(left, ranks, strict=True) if rank == least]
            usable = [one for one in equal if not self._health.wait(name, one.id, way.target.model)]
            if usable:
                credential = self._turn(name, usable)
                ticket = self._health.admit(name, credential.id, way.target.model)
                if ticket is not None:
                    return credential, ticket
            left = [one for one in left if one not in equal]
        return None

    def _turn(self, upstream: str, credentials: Sequence[Credential]) -> Credential:
        """Keys take turns, in proportion to their weights and as evenly as that goes."""
        credit = self._turns.setdefault(upstream, Counter())
        for one in credentials:
            credit[one.id] += one.weight
        best = max(credentials, key=lambda one: credit[one.id])
        credit[best.id] -= sum(one.weight for one in credentials)
        return best

    async def _cover(self, rid: str, journey: _Journey, place: int, ticket: Ticket) -> bool:
        """Whether the ledger holds the call for this way. A way that it has no room for is closed;
        a ledger that cannot be asked closes them all, with the error so far."""
        plan, now = journey.plan, journey.way
        way = plan.ways[place]
        held_for = now.model.name, now.upstream.name, now.quote
        if (way.model.name, way.upstream.name, way.quote) == held_for:
            return True
        wanted = Reroute(
            rid,
            way.model.name,
            way.upstream.name,
            way.quote.price_id,
            way.quote.bound.amount,
            plan.lines,
            self._clock.now(),
        )
        covered = False
        try:
            answer = await self._ledger.reroute(wanted)
            covered = isinstance(answer, Held)
        except (LedgerUnavailable, NotKnown) as error:
            if journey.error is None:
                raise LedgerUnavailable(
                    "The ledger cannot be asked to cover another upstream, and the first one is "
                    "away. Nothing was bought; try again.",
                    retry_after_seconds=5,
                ) from error
            log.warning(
                "no other upstream is asked: the ledger cannot cover it",
                extra={"request_id": rid, "error": str(error)},
            )
            journey.spent |= set(range(len(journey.plan.ways)))
            return False
        finally:
            if not covered:
                self._health.unused(ticket)
        if isinstance(answer, Denied):
            log.info(
                "another upstream is not asked: a budget has no room for its price",
                extra={"request_id": rid, "upstream": way.upstream.name, "model": way.model.name},
            )
            journey.spent |= {place}
            return False
        journey.held, journey.way = answer, way
        return True

    async def _attempt(
        self, plan: Plan, way: Way, body: Spool, ticket: Ticket, trail: Trail | None
    ) -> tuple[Reply | None, GatewayError | None]:
        """One exchange, as far as its answer's head; of any but a 200 the error it amounts to, with
        the answer closed. The key's health hears of it, whatever happens."""
        heard = False
        reply: Reply | None = None
        error: GatewayError | None = None
        leg = None if trail is None else trail.set_out(way)
        try:
            request = self._provider(way.call_of(plan), way.target)
            began = self._clock.monotonic()
            content = _sent_once(edited(body, request.edits))
            try:
                sending = way.upstream.send(
                    Outgoing(
                        "POST",
                        request.path,
                        request.headers if leg is None else (*request.headers, *leg.headers),
                        content,
                        edited_length(body.length, request.edits),
                    ),
                    ticket.credential,
                )
                del request  # 300 bytes, for as long as a picture takes
                reply = await sending
            except GatewayError as fault:
                error = fault
            except OSError as fault:
                error = _unread(fault)
            finally:
                await content.aclose()
            if reply is not None:
                seconds = self._clock.monotonic() - began
                self._health.listener.answered(ticket.upstream, reply.status, seconds)
                if reply.status != 200:
                    error = await _refused(reply, way)
            elif error is not None and kind_of(error) not in (None, Kind.POOL):
                seconds = self._clock.monotonic() - began
                self._health.listener.answered(ticket.upstream, 0, seconds)
            if error is None:
                self._health.succeeded(ticket)
            else:
                self._learn(plan, ticket, error, reply)
            heard = True
            return reply, error
        finally:
            if not heard:
                self._health.unsure(ticket)
            if trail is not None and leg is not None:
                trail.came_back(leg, reply, error)

    def _learn(self, plan: Plan, ticket: Ticket, error: GatewayError, reply: Reply | None) -> None:
        """Tells the key's health how an attempt failed."""
        kind = kind_of(error)
        if kind is not None:
            self._health.listener.failed(ticket.upstream, kind.value)
        if kind is None or kind is Kind.POOL:
            # Ours: our disk, or our own number of connections.
            self._health.unused(ticket)
        elif isinstance(error, UpstreamAccount):
            self._health.refused(ticket, why_refused(error, reply.status if reply else 0))
        elif kind in UNREACHED:
            self._health.failed(ticket)
        elif kind is Kind.SERVER:
            # Perhaps of what this one asks for.
            self._health.failed(ticket, plan.fingerprint)
        elif kind is Kind.LIMITED:
            self._health.limited(ticket, _wait(reply, self._clock.now()))
        elif error.evidence is Evidence.NOT_BILLED and kind not in (Kind.REDIRECT, Kind.EDGE):
            self._health.alive(ticket)
        else:
            self._health.unsure(ticket)

    def _goes_on(
        self, journey: _Journey, place: int, credential: Credential, error: GatewayError
    ) -> bool:
        """Closes what this error closes. False where nothing more may be sent."""
        way = journey.plan.ways[place]
        upstream = way.upstream.name
        match verdict(error):
            case Next.STOP:
                return False
            case Next.OTHER_HOST_ONLY:
                journey.barred_hosts |= {upstream}
            case Next.OTHER_UPSTREAM_ONLY:
                journey.spent |= {place}
            case Next.OTHER_KEY_FIRST:
                journey.barred_keys |= {(upstream, credential.id, way.target.model)}
            case Next.OTHER_UPSTREAM_FIRST:
                journey.failing |= {upstream}
        return True

    def _ended(self, journey: _Journey) -> Failed:
        error, reply = journey.error, journey.last
        if error is None:
            error = self._nobody(journey)
        elif isinstance(error, UpstreamAccount):
            rests(error, min(self._waits(journey), default=0.0))
        return Failed(
            error,
            journey.way,
            journey.tried if journey.was_sent else 0,
            journey.held,
            reply.headers.get("x-request-id", "")[:UPSTREAM_RID_CHARS] if reply else "",
            reply.status if reply else 0,
            reply.headers if reply else {},
        )

    def _nobody(self, journey: _Journey) -> GatewayError:
        """Every way is to be left alone, or too dear: nothing was sent."""
        name = journey.plan.asked.name
        asked = list(self._asked(journey))
        refused = [self._health.quarantined(*one) for one in asked]
        reasons = [why for why in refused if why is not None]
        waits = self._waits(journey)
        if reasons and len(reasons) == len(refused) and not journey.shut:
            upstreams = (upstream for upstream, _, _ in asked)
            return account_rests(f"every upstream of {name}", upstreams, reasons, min(waits))
        wait = min(waits, default=RETRY_SECONDS)
        return UpstreamUnavailable(
            f"No upstream of {name} can be asked now. Nothing was bought; try again.",
            reason="upstream_resting",
            retry_after_seconds=max(wait, LEAST_WAIT_SECONDS),
        )

    def _waits(self, journey: _Journey) -> list[float]:
        """Seconds until each key may be asked, and each way that has no place may be tried."""
        waits = [self._health.wait(*one) for one in self._asked(journey)]
        return waits + [RETRY_SECONDS] * len(journey.shut)

    def _asked(self, journey: _Journey) -> Iterator[tuple[str, str, str]]:
        """The keys of all ways that are left: upstream, key and model, as their health is kept."""
        for place, way in enumerate(journey.plan.ways):
            if place in journey.shut or place in journey.spent:
                continue
            for one in keys_at(way.upstream.credentials, journey.plan.anchor):
                yield way.upstream.name, one.id, way.target.model


def _is_free(error: GatewayError, reply: Reply | None) -> bool:
    """Whether an attempt only found out that a key is good for nothing: that bounds itself, for
    the key rests. What is forbidden for one model may be so with every key."""
    if not isinstance(error, UpstreamAccount):
        return False
    return why_refused(error, reply.status if reply else 0) is not Why.FORBIDDEN


def _wait(reply: Reply | None, now: datetime) -> float | None:
    return None if reply is None else said_wait(reply.headers, now)


def _unread(fault: OSError) -> Overloaded:
    """The body could not be read back, and not a byte of it has left."""
    error = Overloaded(
        "The gateway could not read the request back from its disk. Nothing was bought; try again "
        "in a few seconds.",
        retry_after_seconds=5,
    )
    error.__cause__ = fault
    return error


async def _refused(reply: Reply, way: Way) -> GatewayError:
    """The error that any answer but a 200 amounts to; the answer is closed."""
    text = b""
    try:
        async for chunk in reply.chunks():
            text += chunk
            if len(text) > ERROR_BODY_BYTES:
                break
    except GatewayError:
        # The status has been said, and it decides; its text was cut.
        text = b""
    finally:
        await reply.aclose()
    billed = way.target.failures_billed
    return refusal(reply.status, reply.headers, text, way.upstream.name, failures_billed=billed)


class _Once:
    """A body in memory that is dropped as it leaves: a call that waits for its picture does not
    keep what is sent already beside the spool that it was made of (1.5 KB of a small request)."""

    __slots__ = ("_left",)

    def __init__(self, parts: Sequence[bytes]) -> None:
        self._left = [*parts[::-1]]

    def __aiter__(self) -> _Once:
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop()

    async def aclose(self) -> None:
        self._left.clear()


def _sent_once(
    body: Parts | AsyncGenerator[bytes | Lent, None],
) -> Whole | _Once | AsyncGenerator[bytes | Lent, None]:
    if not isinstance(body, Parts):
        return body
    return Whole(body.parts[0]) if len(body.parts) == 1 else _Once(body.parts)
