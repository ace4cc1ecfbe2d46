"""From an upstream's reply to everything that its settlement needs.

A JSON answer lands when it is whole. A stream lands when its last picture is complete: partial
pictures have left by then, the completed one waits in the spool, unpublished.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from gateway.domain.call import Span
from gateway.domain.charge import Ending
from gateway.domain.errors import Evidence, GatewayError, Overloaded, UpstreamBroken
from gateway.domain.ledger import Outcome
from gateway.ports import Reply
from gateway.relay import replay
from gateway.relay.body import Spool
from gateway.relay.meter import EventMeter, JsonMeter, NoPicture, Reading
from gateway.relay.replay import Splice


@dataclass(frozen=True, slots=True)
class Landing:
    """How the upstream's part ended. Either ``reading`` is set, or ``error``.

    ``json`` and ``events`` are the answer in either form, as splices of the spool; None where it
    cannot be said in that form. ``streamed``: the spool holds events, to be followed as they are.
    """

    ending: Ending
    reading: Reading | None = None
    error: GatewayError | None = None
    json: Splice | None = None
    events: Splice | None = None
    streamed: bool = False
    rest: AsyncIterator[bytes] | None = None
    """What may still follow the last picture of a stream: ``[DONE]``, or nothing."""


async def land_json(reply: Reply, spool: Spool, meter: JsonMeter, *, as_stream: bool) -> Landing:
    """Takes a JSON answer in whole. Nothing of it is published.

    ``as_stream``: the client asked for events, so an answer without that form is broken.
    """
    try:
        async for chunk in reply.chunks():
            meter.feed(chunk)
            await spool.write(chunk)
        reading = meter.close()
    except NoPicture as nothing:
        return _no_picture(nothing)
    except (GatewayError, OSError) as error:
        return failed(error)
    events = replay.completed_event(meter.operation, meter.document())
    if as_stream and events is None:
        return _wrong_form(reading, meter.upstream, "JSON to a request for a stream")
    return Landing(
        Ending(Outcome.DELIVERED, reading.answer, reading.invalid_usage),
        reading,
        json=(Span(0, spool.length),),
        events=events,
    )


async def land_events(
    reply: Reply,
    spool: Spool,
    meter: EventMeter,
    wanted: int,
    first: Callable[[], None],
    *,
    as_json: bool,
) -> Landing:
    """Takes a stream in, publishing each event but the completed ones as it comes.

    ``first`` is called before each event is published. Raises nothing: a stream that breaks lands
    with its error. ``as_json``: the client asked for JSON, so the events are collapsed.
    """
    chunks = reply.chunks()
    try:
        async for chunk in chunks:
            await spool.write(chunk)
            for event in meter.feed(chunk):
                refused = meter.see(event)
                if refused is not None:
                    return _refused(refused, meter)
                if meter.completed >= wanted or (event.done and meter.completed):
                    return _landed(meter, as_json, chunks)
                if event.done:
                    # The SDKs read no further than [DONE]: behind it no error would be seen.
                    return _ended_early(meter)
                first()
                spool.publish(event.start if meter.completed else event.end)
        for event in meter.close():
            refused = meter.see(event)
            if refused is not None:
                return _refused(refused, meter)
            # Python's SDK loses a last event that has no blank line behind it (contract 4.7).
            await spool.write(b"\n\n")
    except (GatewayError, OSError) as error:
        return failed(error)
    return _landed(meter, as_json) if meter.completed else _ended_early(meter)


def _ended_early(meter: EventMeter) -> Landing:
    return failed(
        UpstreamBroken(
            f"The upstream {meter.upstream} ended its stream without a picture. It may have "
            "been paid for, so this is not retried for you."
        )
    )


def _landed(meter: EventMeter, as_json: bool, rest: AsyncIterator[bytes] | None = None) -> Landing:
    reading = meter.read()
    form = None if reading.document is None else replay.answer(reading.document)
    if as_json and form is None:
        return _wrong_form(reading, meter.upstream, "a stream to a request for JSON")
    return Landing(
        Ending(Outcome.DELIVERED, reading.answer, reading.invalid_usage),
        reading,
        json=form,
        events=None if form is None else (),
        streamed=True,
        rest=rest,
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


def failed(error: GatewayError | OSError) -> Landing:
    """The landing of a call that ended in an error, by what the error proves."""
    if isinstance(error, (Overloaded, OSError)):
        error = UpstreamBroken(
            "The picture was made, but this gateway had no room to hold it. It may have been paid "
            "for, so this is not retried for you.",
            status=503,
            code="overloaded",
        )
    refused = error.evidence is Evidence.NOT_BILLED
    return Landing(Ending(Outcome.REFUSED if refused else Outcome.UNKNOWN), error=error)
