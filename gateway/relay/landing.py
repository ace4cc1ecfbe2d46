"""From an upstream's reply to everything that its settlement needs.

A JSON answer lands when it is whole. A stream lands when its last picture is complete: partial
pictures have left by then, the completed one waits in the spool, unpublished.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

from gateway.domain.call import Call, Span
from gateway.domain.charge import Ending
from gateway.domain.errors import Evidence, Fault, GatewayError, Overloaded, UpstreamBroken
from gateway.domain.ledger import Outcome
from gateway.domain.record import record
from gateway.ports import Reply
from gateway.relay import replay
from gateway.relay.body import Spool
from gateway.relay.events import Event
from gateway.relay.media import is_stream
from gateway.relay.meter import (
    EventMeter,
    EventReader,
    JsonMeter,
    NoPicture,
    Reading,
    error_event,
    is_completed,
    is_partial,
)
from gateway.relay.meter_response import Told
from gateway.relay.replay import Splice

LAG_BYTES = 4 * 1024 * 1024
"""How far a follower may lag behind what is published before the upstream is not read."""
CAUGHT_UP_BYTES = 1024 * 1024
PAUSE_SECONDS = 30.0
"""The longest pause in a row: a provider that is not read may cut a call that is paid for. Beyond
it the spool takes what comes."""
PAUSES_SECONDS = 60.0
"""All pauses of one call together: its deadline goes on meanwhile."""


@record
class Landing:
    """How the upstream's part ended. Either ``reading`` is set, or ``error``. ``told`` is what a
    response said of itself, as far as it came.

    ``json`` and ``events`` are the answer in either form, as splices of the spool; None where it
    cannot be said in that form. ``streamable``: it has ``events``, which ``as_events`` makes once
    somebody asks for them. ``streamed``: the spool holds events, to be followed as they are,
    up to ``upto``; ``rest`` says how far more of it may be published, as it comes.
    """

    ending: Ending
    reading: Reading | None = None
    error: GatewayError | None = None
    json: Splice | None = None
    streamable: bool = False
    as_events: Callable[[], Splice | None] = lambda: ()
    streamed: bool = False
    upto: int = 0
    rest: AsyncGenerator[int, None] | None = None
    told: Told | None = None

    @property
    def events(self) -> Splice | None:
        return self.as_events() if self.streamable else None


class Taker(Protocol):
    """Takes the answer to one call in. One per operation (``purchase.TAKERS``)."""

    async def take(
        self,
        reply: Reply,
        spool: Spool,
        upstream: str,
        begin: Callable[[Event], None],
        named: Callable[[Told], Awaitable[None]],
    ) -> Landing:
        """Whatever its form; only a stream for a stream leaves early. ``begin`` is called before
        an event with data is published, ``named`` before the first one that says an id by which
        clients can ask for what is being made."""

    def error_event(self, error: GatewayError) -> bytes:
        """An error in the form that it has inside this operation's streams."""


class PictureTaker:
    """Takes the answer to one call for pictures in."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def take(
        self,
        reply: Reply,
        spool: Spool,
        upstream: str,
        begin: Callable[[Event], None],
        named: Callable[[Told], Awaitable[None]],
    ) -> Landing:
        """As ``Taker`` says. A picture that came in the other form than asked is turned; none is
        asked for by an id."""
        call = self._call
        if not is_stream(reply):
            meter = JsonMeter(call.operation, upstream)
            return await land_json(reply, spool, meter, as_stream=call.stream)
        events = EventMeter(call.operation, upstream)
        return await land_events(reply, spool, events, call.n, begin, as_json=not call.stream)

    def error_event(self, error: GatewayError) -> bytes:
        return error_event(error)


async def land_json(reply: Reply, spool: Spool, meter: JsonMeter, *, as_stream: bool) -> Landing:
    """Takes a JSON answer in whole. Nothing of it is published.

    ``as_stream``: the client asked for events, so an answer without that form is broken.
    """

    def take(chunk: bytes) -> bool:
        if not spool.take(chunk):
            return False
        meter.feed(chunk)
        return True

    try:
        async for chunk in reply.chunks(take):
            meter.feed(chunk)
            await keep(spool, chunk)
        reading = meter.close()
    except NoPicture as nothing:
        return _no_picture(nothing)
    except GatewayError as error:
        return failed(error)
    document = reading.document or meter.document()
    streamable = replay.has_event(document)
    if as_stream and not streamable:
        return _wrong_form(reading, meter.upstream, "JSON to a request for a stream")
    return Landing(
        Ending(Outcome.DELIVERED, reading.answer, reading.invalid_usage),
        reading,
        json=(Span(0, spool.length),),
        streamable=streamable,
        as_events=lambda: replay.completed_event(meter.operation, document),
    )


async def land_events(
    reply: Reply,
    spool: Spool,
    meter: EventMeter,
    wanted: int,
    begin: Callable[[Event], None],
    *,
    as_json: bool,
) -> Landing:
    """Takes a stream in, publishing each event as it comes, but not its last picture.

    ``begin`` is called before an event with data is published. A stream that breaks lands with
    its error. ``as_json``: the client asked for JSON, so the events are collapsed. While a follower
    is slow the upstream is not read.
    """
    intake = Intake(spool, meter)
    chunks = reply.chunks(intake.take)
    brake = Brake(spool)
    try:
        async for chunk in chunks:
            events = await intake.events(chunk)
            for index, event in enumerate(events):
                await mend(spool, event)
                refused = meter.see(event)
                if refused is not None:
                    return _refused(refused, meter)
                if meter.completed >= wanted or (event.done and meter.completed):
                    rest = the_rest(events[index + 1 :], chunks, intake)
                    return _landed(meter, as_json, event.end, rest)
                if event.done:
                    # The SDKs read no further than [DONE]: behind it no error would be seen.
                    return _ended_early(meter)
                if event.data is not None:
                    begin(event)
                # Of several pictures the newest waits: it may be the last.
                spool.publish(event.start if is_completed(event) else event.end)
            await brake.hold()
        for event in meter.close():
            await mend(spool, event)
            refused = meter.see(event)
            if refused is not None:
                return _refused(refused, meter)
            # Python's SDK loses a last event that has no blank line behind it (contract 4.7).
            await keep(spool, b"\n\n")
    except GatewayError as error:
        return failed(error)
    return _landed(meter, as_json, spool.length) if meter.completed else _ended_early(meter)


async def the_rest(
    seen: Sequence[Event], chunks: AsyncIterator[bytes], intake: Intake
) -> AsyncGenerator[int, None]:
    """How far what follows the last picture may be published: whole events without a picture.

    A further picture was not asked for and is not on the bill, so the stream ends before it.
    """
    for event in seen:
        if not _is_harmless(event):
            return
        await mend(intake.spool, event)
        yield event.end
        if event.done:
            return
    async for chunk in chunks:
        for event in await intake.events(chunk):
            if not _is_harmless(event):
                return
            await mend(intake.spool, event)
            yield event.end
            if event.done:
                return


def _is_harmless(event: Event) -> bool:
    members = event.data.value if event.data else None
    said = members if isinstance(members, dict) else {}
    error = said.get("error") or said.get("type") == "error" or event.name == "error"
    return not (error or is_partial(event) or is_completed(event))


class Intake:
    """Keeps a stream and reads it. In the middle of an event that is done where its pieces are
    received: for a picture in 45 of them the task that lands it is woken once."""

    __slots__ = ("_events", "_meter", "_piece", "spool")

    def __init__(self, spool: Spool, meter: EventReader) -> None:
        self.spool = spool
        self._meter = meter
        self._piece: bytes | None = None
        """The piece whose events wait for its turn."""
        self._events: list[Event] = []

    def take(self, piece: bytes) -> bool:
        """A ``ports.Take``; one that completes events is read, and has its turn all the same."""
        if piece is self._piece or self.spool.lag > LAG_BYTES or not self.spool.take(piece):
            return False
        events = self._meter.feed(piece)
        if events:
            self._piece, self._events = piece, events
        return not events

    async def events(self, piece: bytes) -> list[Event]:
        """Those that ``piece`` completes, which has its turn. Raises ``UpstreamBroken`` as ``keep``
        and the meter do."""
        if piece is self._piece:
            events, self._piece, self._events = self._events, None, []
            return events
        if not self.spool.take(piece):
            await keep(self.spool, piece)
        return self._meter.feed(piece)


class Brake:
    """Holds the reading of one upstream back while a follower of its stream is slow."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._patient = True
        self._left_seconds = PAUSES_SECONDS

    async def hold(self) -> None:
        """Returns when the upstream is to be read on: at once, mostly."""
        lag = self._spool.lag
        if lag <= CAUGHT_UP_BYTES:
            self._patient = True
        if lag <= LAG_BYTES or not self._patient:
            return
        time = asyncio.get_running_loop().time
        began = time()
        try:
            async with asyncio.timeout(max(0.0, min(PAUSE_SECONDS, self._left_seconds))):
                await self._spool.caught_up(CAUGHT_UP_BYTES)
        except TimeoutError:
            self._patient = False
        self._left_seconds -= time() - began


async def keep(spool: Spool, chunk: bytes) -> None:
    """Raises ``UpstreamBroken`` where there is no room: the picture was bought all the same."""
    try:
        await spool.write(chunk)
    except Overloaded as error:
        raise _not_held() from error


async def mend(spool: Spool, event: Event) -> None:
    """Makes an event one that every SDK can read. Raises like ``keep``."""
    try:
        for edit in event.mends:
            await spool.mend(edit)
    except Overloaded as error:
        raise _not_held() from error


def _not_held() -> UpstreamBroken:
    return UpstreamBroken(
        "The picture was made, but this gateway had no room to hold it. It may have been paid "
        "for, so this is not retried for you.",
        status=503,
        code="overloaded",
        fault=Fault.GATEWAY,
    )


def _ended_early(meter: EventMeter) -> Landing:
    return failed(
        UpstreamBroken(
            f"The upstream {meter.upstream} ended its stream without a picture. It may have "
            "been paid for, so this is not retried for you."
        )
    )


def _landed(
    meter: EventMeter, as_json: bool, upto: int, rest: AsyncGenerator[int, None] | None = None
) -> Landing:
    reading = meter.read()
    form = None if reading.document is None else replay.answer(reading.document)
    if as_json and form is None:
        return _wrong_form(reading, meter.upstream, "a stream to a request for JSON")
    return Landing(
        Ending(Outcome.DELIVERED, reading.answer, reading.invalid_usage),
        reading,
        json=form,
        streamable=form is not None,
        streamed=True,
        upto=upto,
        rest=None if as_json else rest,
    )


def _wrong_form(reading: Reading, upstream: str, what: str) -> Landing:
    error = UpstreamBroken(
        f"The upstream {upstream} answered with {what}, in a form that cannot be turned into the "
        "other. It has been paid for, so this is not retried for you."
    )
    ending = Ending(Outcome.BROKEN, reading.answer, reading.invalid_usage)
    return Landing(ending, error=error)


def _no_picture(nothing: NoPicture) -> Landing:
    reading = nothing.reading
    error = UpstreamBroken(f"{nothing} It may have been paid for, so this is not retried for you.")
    return Landing(Ending(Outcome.BROKEN, reading.answer, reading.invalid_usage), error=error)


def _refused(error: GatewayError, meter: EventMeter) -> Landing:
    """An error inside a stream: not billed, unless a partial picture shows that work was done."""
    if meter.partials or meter.completed:
        return Landing(Ending(Outcome.BROKEN), error=error)
    return failed(error)


def failed(error: GatewayError) -> Landing:
    """The landing of a call that ended in an error, by what the error proves."""
    refused = error.evidence is Evidence.NOT_BILLED
    return Landing(Ending(Outcome.REFUSED if refused else Outcome.UNKNOWN), error=error)
