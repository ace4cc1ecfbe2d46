"""From an upstream's reply to everything that the settlement of a response needs.

As in ``landing.py``: JSON lands when it is whole, a stream when its last event is, and that one
waits in the spool, unpublished. What is asked for in the background lands twice: its beginning is
handed over at once, and its end is fetched (``background.py``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from gateway.domain.call import Call, Span
from gateway.domain.charge import Ending
from gateway.domain.errors import GatewayError, UpstreamBroken
from gateway.domain.ledger import Outcome
from gateway.domain.owned import OwnedKind
from gateway.domain.price import Answer
from gateway.ports import Reply
from gateway.relay.body import Spool
from gateway.relay.events import Event
from gateway.relay.landing import Brake, Intake, Landing, failed, keep, mend, the_rest
from gateway.relay.media import is_stream
from gateway.relay.meter import Reading, flat_error_frame
from gateway.relay.meter_response import (
    ResponseEventMeter,
    ResponseMeter,
    Told,
)


class ResponseTaker:
    """Takes the answer to one response in."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._events = ResponseEventMeter("")

    async def take(
        self,
        reply: Reply,
        spool: Spool,
        upstream: str,
        begin: Callable[[Event], None],
        named: Callable[[Told], Awaitable[None]],
    ) -> Landing:
        """As ``landing.Taker`` says. Events are passed on untouched."""
        if is_stream(reply) is not self._call.stream:
            what = "JSON" if self._call.stream else "a stream"
            return failed(
                UpstreamBroken(
                    f"The upstream {upstream} answered with {what}, which was not asked for. It "
                    "may have been paid for, so this is not retried for you."
                )
            )
        if not self._call.stream:
            return await _land_json(reply, spool, ResponseMeter(upstream))
        self._events = ResponseEventMeter(upstream)
        return await _land_events(reply, spool, self._events, begin, named)

    def error_event(self, error: GatewayError) -> bytes:
        """An error of ours inside the stream, numbered as its next event."""
        return flat_error_frame(error.content, self._events.sequence + 1)


def landed(told: Told, landing: Landing) -> Landing:
    """How a response ended, of what it said in the end."""
    reading = Reading(told.answer, told.invalid_usage)
    return replace(landing, ending=told.ending, reading=reading, told=told)


async def _land_json(reply: Reply, spool: Spool, meter: ResponseMeter) -> Landing:
    def take(chunk: bytes) -> bool:
        if not spool.take(chunk):
            return False
        meter.feed(chunk)
        return True

    try:
        async for chunk in reply.chunks(take):
            meter.feed(chunk)
            await keep(spool, chunk)
        told = meter.close()
    except GatewayError as error:
        return failed(error)
    form = (Span(0, spool.length),)
    return landed(told, Landing(Ending(Outcome.UNKNOWN), json=form))


async def _land_events(
    reply: Reply,
    spool: Spool,
    meter: ResponseEventMeter,
    begin: Callable[[Event], None],
    named: Callable[[Told], Awaitable[None]],
) -> Landing:
    intake = Intake(spool, meter)
    chunks = reply.chunks(intake.take)
    brake = Brake(spool)
    unnamed = True
    try:
        async for chunk in chunks:
            events = await intake.events(chunk)
            for index, event in enumerate(events):
                await mend(spool, event)
                refused = meter.see(event)
                if refused is not None:
                    return _refused(refused, meter)
                if meter.told is not None:
                    rest = the_rest(events[index + 1 :], chunks, intake)
                    form = Landing(
                        Ending(Outcome.UNKNOWN), streamed=True, upto=event.end, rest=rest
                    )
                    return landed(meter.told, form)
                if event.done:
                    # The SDKs read no further than [DONE]: behind it no error would be seen.
                    return _cut(meter.broken("ended its stream without an end"), meter)
                seen = _seen(meter) if unnamed else None
                if seen is not None:
                    unnamed = False
                    await named(seen)
                if event.data is not None:
                    begin(event)
                spool.publish(event.end)
            await brake.hold()
        for event in meter.close():
            await mend(spool, event)
            refused = meter.see(event)
            if refused is not None:
                return _refused(refused, meter)
            # Python's SDK loses a last event that has no blank line behind it (contract 4.7).
            await keep(spool, b"\n\n")
    except GatewayError as error:
        return _cut(error, meter)
    if meter.told is not None:
        return landed(
            meter.told, Landing(Ending(Outcome.UNKNOWN), streamed=True, upto=spool.length)
        )
    return _cut(meter.broken("ended its stream without an end"), meter)


def _refused(error: GatewayError, meter: ResponseEventMeter) -> Landing:
    """An error inside a stream: not billed, unless something was made before it."""
    if meter.worked:
        return replace(_cut(error, meter), ending=Ending(Outcome.BROKEN))
    return failed(error)


def _cut(error: GatewayError, meter: ResponseEventMeter) -> Landing:
    """A stream that ended without its last event. What it has named may live at the upstream."""
    return replace(failed(error), told=_seen(meter))


def _seen(meter: ResponseEventMeter) -> Told | None:
    """What a stream has named so far, as it would be told if it were cut now."""
    own = next((name for name, kind in meter.seen.items() if kind is OwnedKind.RESPONSE), "")
    if not own:
        return None
    return Told(own, "cut", Answer(0), ids=tuple(meter.seen.items()))
