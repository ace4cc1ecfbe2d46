"""What is passed on without being bought: look-ups, uploads, checks. One mechanism for all.

::

    Visit --enter--> a caller within its rate --take_in--> Spool --send--> Reply --head--> Head

Nothing here costs money, so nothing is reserved, joined or kept; it is counted, and it ends with a
receipt and a line in the log like everything else. What is sent was taken in whole before: a client
that leaves in the middle of an upload has sent nothing upstream.

A door's handler tells its own story with these steps; ``api/passed.py`` is the way in::

    async def moderate(visit: Visit) -> Head:
        await passing.enter(visit)
        body = await passing.take_in(visit, JSON_TYPE, MODERATION_BYTES)
        errand = Errand("POST", "/moderations", upstream="openai", body=body)
        return passing.head(visit, await passing.send(visit, errand))

What names an id is looked up before (``forwarding.py``).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

from gateway.domain.call import Passage
from gateway.domain.errors import (
    Evidence,
    GatewayError,
    InvalidRequest,
    NotServed,
    Overloaded,
    UnsupportedMedia,
    UploadStalled,
    UpstreamAccount,
    UpstreamRefused,
    UpstreamUnanswered,
    UpstreamUnavailable,
)
from gateway.domain.ledger import Basis
from gateway.domain.owned import Anchor
from gateway.domain.quota import Demand, Refusal
from gateway.domain.receipt import Receipt, Timings
from gateway.domain.team import Caller
from gateway.domain.user import USER_HEADERS
from gateway.ports import Clock, Credential, Gate, Outgoing, Reply, Upstream
from gateway.relay import headers as answers
from gateway.relay.admission import rate_limited
from gateway.relay.body import Room, Spool
from gateway.relay.drain import shutting_down
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
from gateway.relay.flights import Client, Flights, Head
from gateway.relay.health import Health, Ticket
from gateway.relay.keyring import KeyRing
from gateway.relay.media import JSON_TYPE, check_encoding, media_of, too_large
from gateway.relay.owner import account_rests, rests
from gateway.relay.references import keys_at
from gateway.relay.users import Users

log = logging.getLogger(__name__)

MEMORY_BODY_BYTES = 1024 * 1024
"""A body over this goes to disk."""
MOST_AT_ONCE = 256
"""From being sent to being delivered, in one process: they hold no slots of their teams."""
MOST_OF_A_TEAM = MOST_AT_ONCE // 4
IDLE_SECONDS = 60.0
"""How long a body may take without a byte of it."""
MOST_ATTEMPTS = 3
WHOLE_BYTES = 1024 * 1024
"""An answer that is read here before it is handed over: an object that describes something."""

PASSED_ON = (
    *("content-type", "content-disposition", "content-range", "accept-ranges"),
    *("etag", "last-modified"),
)
"""Headers of an upstream's answer that say what its body is."""
DISTRUSTED = (("x-content-type-options", "nosniff"),)
"""What a body is, its uploader has said."""

T = TypeVar("T")


@dataclass(slots=True)
class Visit:
    """One request at a door that buys nothing, and what is known of it so far.

    ``names`` are what its path names, ``query`` is as it came, ``headers`` have lower-case names.
    ``body`` has not been read; ``at`` is the clock's seconds. ``receipt`` grows on the way;
    ``said`` are the headers of every answer to it from then on. ``stack`` is closed when the
    answer has been delivered.
    """

    rid: str
    passage: Passage
    method: str
    names: tuple[str, ...]
    query: str
    headers: Mapping[str, str]
    secret: str | None
    body: AsyncIterator[bytes]
    client: Client
    at: float
    receipt: Receipt
    said: answers.Headers = ()
    anchor: Anchor | None = None
    """Where it was sent last."""
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    placed: bool = False
    """Whether it holds one of the places of what is under way."""


Handler: TypeAlias = Callable[[Visit], Awaitable[Head]]
"""Answers one kind of visit. Raises ``GatewayError``."""


@dataclass(frozen=True, slots=True)
class Errand:
    """One request to an upstream. ``path`` is below its base URL, query and all. It goes to
    ``anchor``, with the key that belongs there, or to ``upstream``, with any. ``accept`` is what
    may come back. ``repeatable``: to send it twice does no harm, so an SDK may, where nobody knows
    what became of it."""

    method: str
    path: str
    anchor: Anchor | None = None
    upstream: str = ""
    body: Spool | None = None
    content_type: str = ""
    accept: str = JSON_TYPE
    more: answers.Headers = ()
    repeatable: bool = True
    max_response_bytes: int = 0
    """Where it is more than an answer may have otherwise."""


@dataclass(frozen=True, slots=True)
class Place:
    """Whether something is passed on, and to which upstream; empty where none is on."""

    enabled: bool = True
    upstream: str = ""


class Passing:
    """The steps of a visit. ``upstreams`` are those that are configured now."""

    def __init__(
        self,
        *,
        keyring: KeyRing,
        users: Users,
        gate: Gate,
        upstreams: Callable[[], Mapping[str, Upstream]],
        health: Health,
        room: Room,
        flights: Flights,
        clock: Clock,
        agent: str,
        begun: Callable[[Receipt], None] = lambda receipt: None,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        """``begun`` hears of each visit that was let in; ``agent`` is what upstreams know us by;
        a body of which nothing comes for ``idle_seconds`` is given up."""
        self._agent = agent
        self._keyring = keyring
        self._users = users
        self._gate = gate
        self._upstreams = upstreams
        self._health = health
        self._room = room
        self._flights = flights
        self._clock = clock
        self._begun = begun
        self._idle_seconds = idle_seconds
        self._under_way: Counter[str] = Counter()

    async def enter(self, visit: Visit) -> Caller:
        """Who it is, within the rates of its team, its key and the user that a header names: one
        request, no picture, no slot.

        Raises ``InvalidKey``, ``RateLimited``, ``Overloaded`` while the process ends,
        ``LedgerUnavailable``.
        """
        if self._flights.draining:
            raise shutting_down()
        caller = await self._keyring.identify(visit.secret)
        hints = {name.value: visit.headers[name] for name in USER_HEADERS if name in visit.headers}
        caller = self._users.hinted(caller, hints)
        visit.receipt = replace(
            visit.receipt,
            team=caller.team.id,
            key_id=caller.key.id,
            user=caller.recorded_user,
        )
        visit.said = (*answers.of_attempts(0), *answers.of_cost(0, Basis.NONE))
        demand = Demand(requests=1, images=0, slots=0)
        answer = await self._gate.take(visit.rid, caller.rates, demand)
        if isinstance(answer, Refusal):
            raise rate_limited(answer, caller, demand)
        visit.said = (*visit.said, *answers.of_rates(answer.standings))
        visit.receipt = replace(visit.receipt, degraded=answer.degraded)
        self._begun(visit.receipt)
        return caller

    def _place(self, visit: Visit) -> None:
        """One of the places of what is under way, until the visit is over. A body that is still
        arriving has none, and no team has them all: else a few slow uploads would shut every
        route that is passed on, for everybody. Raises ``Overloaded``."""
        if visit.placed:
            return
        team = visit.receipt.team
        if self._under_way.total() >= MOST_AT_ONCE:
            raise Overloaded(
                "The gateway passes on as many requests as it can. Nothing was sent; try again.",
                retry_after_seconds=1,
            )
        if self._under_way[team] >= MOST_OF_A_TEAM:
            raise Overloaded(
                f"The gateway passes on at most {MOST_OF_A_TEAM} requests of a team at once. "
                "Nothing was sent; try again when one of yours is over.",
                retry_after_seconds=1,
            )
        self._under_way[team] += 1
        visit.placed = True
        visit.stack.callback(self._leave, team)

    def _leave(self, team: str) -> None:
        self._under_way[team] -= 1
        if not self._under_way[team]:
            del self._under_way[team]

    async def arriving(self, visit: Visit) -> AsyncGenerator[bytes, None]:
        """The body as it comes. Raises ``ClientGone``, ``UploadStalled`` where nothing of it comes
        for too long, ``Overloaded`` where the process ends meanwhile."""
        chunks = aiter(visit.body)
        while True:
            try:
                async with self._flights.until_draining(), asyncio.timeout(self._idle_seconds):
                    chunk = await anext(chunks, None)
            except TimeoutError:
                if self._flights.draining:
                    raise shutting_down() from None
                raise UploadStalled(
                    f"Nothing of the request's body came for {self._idle_seconds:g} seconds. "
                    "Nothing was sent; send it again.",
                    close=True,
                ) from None
            if chunk is None:
                return
            yield chunk

    async def take_in(
        self,
        visit: Visit,
        media: str,
        limit_bytes: int,
        feed: Callable[[bytes], object] = lambda chunk: None,
    ) -> Spool:
        """The whole body, which has to be of this media type. ``feed`` sees it as it comes.

        Raises ``UnsupportedMedia``, ``BodyTooLarge`` (before reading where its length is said),
        ``ClientGone``, ``UploadStalled``, ``Overloaded``, and what ``feed`` does.
        """
        given = visit.headers.get("content-type", "")
        if media_of(given) != media or not answers.is_clean(given):
            raise UnsupportedMedia(f"This takes {media}, not {given[:80]!r}.")
        check_encoding(visit.headers.get("content-encoding"))
        length = visit.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit_bytes:
            raise too_large(limit_bytes)
        spool = Spool(self._room, MEMORY_BODY_BYTES, for_request=True)
        visit.stack.callback(spool.close)
        try:
            async with aclosing(self.arriving(visit)) as chunks:
                async for chunk in chunks:
                    if spool.length + len(chunk) > limit_bytes:
                        raise too_large(limit_bytes)
                    feed(chunk)
                    await spool.write(chunk)
        finally:
            reading = self._clock.monotonic() - visit.at
            visit.receipt = replace(
                visit.receipt, bytes_in=spool.length, timings=Timings(reading=reading)
            )
        return spool

    async def send(self, visit: Visit, errand: Errand) -> Reply:
        """The upstream's success, its body still arriving; it is closed with the visit.

        What was surely not taken up goes out once more with another key. Raises what it amounts to
        else, in the words of something that costs nothing: ``UpstreamRefused``,
        ``UpstreamAccount``, ``UpstreamUnavailable``, ``UpstreamUnanswered``, ``Overloaded``.
        """
        self._place(visit)
        name = errand.upstream if errand.anchor is None else errand.anchor.upstream
        upstream = self._upstreams().get(name)
        if upstream is None or not upstream.ready:
            raise _gone(name)
        began = self._clock.monotonic()
        visit.receipt = replace(visit.receipt, upstream=name)
        tried: set[str] = set()
        while True:
            credential, ticket = self._admitted(visit, upstream, errand, tried)
            tried.add(credential.id)
            visit.anchor = Anchor(name, credential.mark)
            _count(visit)
            reply, error = await self._exchange(visit, upstream, errand, ticket)
            timings = replace(visit.receipt.timings, upstream=self._since(began))
            visit.receipt = replace(visit.receipt, timings=timings)
            if error is None and reply is not None:
                return reply
            if error is None:
                raise TypeError("an exchange ends in an answer or in an error")
            keys = keys_at(upstream.credentials, errand.anchor)
            another = any(one.id not in tried for one in keys) and len(tried) < MOST_ATTEMPTS
            if not another or not _goes_on(error):
                if isinstance(error, UpstreamRefused):
                    # Some providers repeat a key that they refuse.
                    error.mask(upstream.masked)
                if isinstance(error, UpstreamAccount):
                    asked = visit.passage.value
                    rests(error, min(self._health.wait(name, one.id, asked) for one in keys))
                error.upstream_rid = visit.receipt.upstream_rid
                raise _costless(error, name, repeatable=errand.repeatable)

    def head(self, visit: Visit, reply: Reply, more: answers.Headers = ()) -> Head:
        """The upstream's answer as ours, handed on as it comes."""
        passed = tuple(
            (name, reply.headers[name])
            for name in PASSED_ON
            if name in reply.headers and answers.is_clean(reply.headers[name])
        )
        length = reply.headers.get("content-length", "")
        known = int(length) if length.isdecimal() and len(length) < 16 else None
        return Head(
            reply.status,
            (*passed, *self.said(visit), *answers.of_upstream(reply.headers), *DISTRUSTED, *more),
            known,
            lambda: _body(reply),
        )

    def answer(self, visit: Visit, content: bytes, reply: Reply | None = None) -> Head:
        """JSON of known bytes; ``reply`` is the answer they were made from."""
        of_upstream = () if reply is None else answers.of_upstream(reply.headers)
        said = (("content-type", JSON_TYPE), *self.said(visit), *of_upstream)
        return Head.of(200, said, content)

    def said(self, visit: Visit) -> answers.Headers:
        """What every success says of the request that it is for."""
        of_upstream = (("x-gateway-upstream", visit.receipt.upstream),)
        return (
            ("x-request-id", visit.rid),
            *(of_upstream if visit.receipt.upstream else ()),
            *visit.said,
        )

    async def whole(
        self,
        visit: Visit,
        reply: Reply,
        limit_bytes: int = WHOLE_BYTES,
        *,
        repeatable: bool = True,
    ) -> bytes:
        """All of an answer's body. Raises ``UpstreamUnanswered`` where it is cut, late or longer;
        ``repeatable`` is the errand's."""
        content = bytearray()
        try:
            async with aclosing(_body(reply)) as chunks:
                async for chunk in chunks:
                    content += chunk
                    if len(content) > limit_bytes:
                        raise bad_answer(visit.receipt.upstream)
        except GatewayError as error:
            raise _costless(error, visit.receipt.upstream, repeatable=repeatable) from None
        return bytes(content)

    async def to_the_end(self, visit: Visit, work: Coroutine[Any, Any, T]) -> T:
        """What has to be finished once it is begun, whoever has left meanwhile. What the visit has
        open stays so until then."""
        ended: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        left_behind: list[AsyncExitStack] = []

        async def run() -> None:
            try:
                ended.set_result(await work)
            except Exception as error:  # noqa: BLE001 - whoever waits is told
                ended.set_exception(error)
                # Nobody may be there to hear of it.
                ended.exception()
            finally:
                ended.cancel()  # Where it was given up with the process.
                for stack in left_behind:
                    await stack.aclose()

        self._flights.errand(run())
        try:
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            left_behind.append(visit.stack.pop_all())
            raise

    def _admitted(
        self, visit: Visit, upstream: Upstream, errand: Errand, tried: set[str]
    ) -> tuple[Credential, Ticket]:
        """A key that may be used now, and was not. Raises ``UpstreamAccount`` where all of them
        are refused, ``UpstreamUnavailable`` where all are to be left alone."""
        asked = visit.passage.value
        keys = keys_at(upstream.credentials, errand.anchor)
        left = sorted((one for one in keys if one.id not in tried), key=lambda one: one.order)
        for one in left:
            ticket = self._health.admit(upstream.name, one.id, asked)
            if ticket is not None:
                return one, ticket
        raise self._resting(upstream, left or keys, asked)

    def _resting(self, upstream: Upstream, keys: Sequence[Credential], asked: str) -> GatewayError:
        refused = [self._health.quarantined(upstream.name, one.id, asked) for one in keys]
        reasons = [why for why in refused if why is not None]
        waits = [self._health.wait(upstream.name, one.id, asked) for one in keys]
        if reasons and len(reasons) == len(refused):
            whose = f"the upstream {upstream.name}"
            return account_rests(whose, (upstream.name,), reasons, min(waits))
        return UpstreamUnavailable(
            f"The upstream {upstream.name} cannot be asked now. Nothing was sent; try again.",
            reason="upstream_resting",
            retry_after_seconds=max(LEAST_WAIT_SECONDS, min(waits, default=1.0)),
        )

    async def _exchange(
        self, visit: Visit, upstream: Upstream, errand: Errand, ticket: Ticket
    ) -> tuple[Reply | None, GatewayError | None]:
        """One try, as far as the answer's head; of any but a success the error, with the answer
        closed. The key's health hears of it, whatever happens."""
        began, heard = self._clock.monotonic(), False
        reply: Reply | None = None
        try:
            try:
                reply = await self._sent(upstream, errand, ticket.credential)
            except GatewayError as error:
                heard = True
                self._learn(ticket, error, None)
                if kind_of(error) not in (None, Kind.POOL):
                    self._health.listener.answered(upstream.name, 0, self._since(began))
                return None, error
            self._health.listener.answered(upstream.name, reply.status, self._since(began))
            visit.stack.push_async_callback(reply.aclose)
            visit.receipt = replace(
                visit.receipt,
                upstream_status=reply.status,
                upstream_rid=reply.headers.get("x-request-id", "")[:UPSTREAM_RID_CHARS],
            )
            if 200 <= reply.status < 300:
                heard = True
                self._health.succeeded(ticket)
                return reply, None
            refused = await _refusal(reply, upstream.name, by_id=errand.anchor is not None)
            heard = True
            self._learn(ticket, refused, reply)
            return reply, refused
        finally:
            if not heard:
                self._health.unsure(ticket)

    async def _sent(self, upstream: Upstream, errand: Errand, credential: str) -> Reply:
        said = [("accept", errand.accept), ("user-agent", self._agent), *errand.more]
        outgoing = Outgoing(
            errand.method, errand.path, tuple(said), max_response_bytes=errand.max_response_bytes
        )
        if errand.body is None:
            return await upstream.send(outgoing, credential)
        said.append(("content-type", errand.content_type))
        async with aclosing(errand.body.slice()) as content:
            whole = replace(outgoing, headers=tuple(said), body=content, length=errand.body.length)
            try:
                return await upstream.send(whole, credential)
            except OSError as error:
                raise Overloaded(
                    "The gateway could not read the request back from its disk. Nothing was sent; "
                    "try again in a few seconds.",
                    retry_after_seconds=5,
                ) from error

    def _since(self, began: float) -> float:
        return self._clock.monotonic() - began

    def _learn(self, ticket: Ticket, error: GatewayError, reply: Reply | None) -> None:
        """Tells the key's health how an attempt failed. That an endpoint like these fails by
        itself says nothing of pictures, so no breaker opens for it."""
        kind = kind_of(error)
        if kind is not None:
            self._health.listener.failed(ticket.upstream, kind.value)
        if kind is None or kind is Kind.POOL:
            self._health.unused(ticket)
        elif isinstance(error, UpstreamAccount):
            self._health.refused(ticket, why_refused(error, reply.status if reply else 0))
        elif kind in UNREACHED:
            self._health.failed(ticket)
        elif kind is Kind.LIMITED:
            wait = None if reply is None else said_wait(reply.headers, self._clock.now())
            self._health.limited(ticket, wait)
        elif kind in (Kind.CLIENT, Kind.MODERATION):
            self._health.alive(ticket)
        else:
            self._health.unsure(ticket)


def place_of(place: Place, path: str) -> str:
    """The upstream that something is passed on to. Raises ``NotServed`` where it is switched off,
    ``UpstreamUnavailable`` where no upstream is on."""
    if not place.enabled:
        raise NotServed(f"{path} is switched off on this gateway. Ask its operator.")
    if not place.upstream:
        raise UpstreamUnavailable(
            f"This gateway has no upstream for {path} that is on. Ask its operator.",
            reason="upstream_off",
            should_retry=False,
        )
    return place.upstream


def bad_answer(upstream: str) -> UpstreamUnanswered:
    """A success whose body is not what was asked for."""
    return UpstreamUnanswered(
        f"The upstream {upstream} answered with something that cannot be read. Nothing is charged "
        "for it. Ask the gateway's operator if that goes on.",
        reason="upstream_bad_response",
        should_retry=False,
    )


def bad_query(name: str, wanted: str) -> InvalidRequest:
    """A parameter of the query that cannot be used."""
    return InvalidRequest(
        f"Invalid value for '{name}': it must be {wanted}.",
        code="invalid_value",
        param=name,
        reason="invalid_param",
    )


def _gone(name: str) -> UpstreamUnavailable:
    return UpstreamUnavailable(
        f"The upstream {name}, where this lives, is not configured any more, or is off. Nothing "
        "was sent. Ask the gateway's operator.",
        reason="upstream_off",
        should_retry=False,
    )


def _count(visit: Visit) -> None:
    """One more attempt, on the receipt and for the client."""
    visit.receipt = replace(visit.receipt, attempts=visit.receipt.attempts + 1)
    counted = answers.of_attempts(visit.receipt.attempts)
    names = {name for name, _ in counted}
    visit.said = (*(one for one in visit.said if one[0] not in names), *counted)


def _goes_on(error: GatewayError) -> bool:
    """Whether nothing came of it that another key would repeat."""
    if error.evidence is not Evidence.NOT_BILLED:
        return False
    return verdict(error) is Next.OTHER_KEY_FIRST or kind_of(error) in UNREACHED - {Kind.TLS}


def _costless(error: GatewayError, upstream: str, *, repeatable: bool) -> GatewayError:
    """An error in the words of something that nobody pays for."""
    if error.evidence is Evidence.NOT_BILLED:
        return error
    again = "It may be sent again." if repeatable else "See what became of it before you repeat it."
    costless = UpstreamUnanswered(
        f"The upstream {upstream} took this request and did not answer it to the end. Nothing is "
        f"charged for it. {again}",
        status=504 if error.status == 504 else 502,
        reason=error.reason,
        should_retry=repeatable,
    )
    costless.upstream_rid = error.upstream_rid
    return costless


async def _refusal(reply: Reply, upstream: str, *, by_id: bool) -> GatewayError:
    """The error that any answer but a success amounts to; the answer is closed."""
    text = b""
    try:
        async with aclosing(_body(reply)) as chunks:
            async for chunk in chunks:
                text += chunk
                if len(text) > ERROR_BODY_BYTES:
                    break
    except GatewayError:
        # The status has been said, and it decides; its text was cut.
        text = b""
    finally:
        await reply.aclose()
    return refusal(reply.status, reply.headers, text, upstream, by_id=by_id)


async def _body(reply: Reply) -> AsyncGenerator[bytes, None]:
    async for chunk in reply.chunks():
        yield chunk
