"""Who hears of each request at its end, and under which trace it ran until then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gateway.api.door import Door, Scope
from gateway.domain.receipt import Delivery, Receipt
from gateway.domain.trace import Trace, begin, of_stranger, parse
from gateway.ports import Clock, Telemetry


class Listeners:
    """``sample`` is the share of the traces beginning here, and of those of unknown clients, that
    are sampled; None: nothing is traced."""

    def __init__(self, telemetry: Sequence[Telemetry], clock: Clock, sample: float | None) -> None:
        self._telemetry = tuple(telemetry)
        self._clock = clock
        self._sample = sample

    def trace(self, scope: Scope) -> Trace | None:
        """A request's span: under the client's, where the headers name one."""
        if self._sample is None:
            return None

        def said(name: bytes) -> str:
            found = [value for one, value in scope["headers"] if one == name]
            return b",".join(found).decode("latin-1")

        client = parse(said(b"traceparent"), said(b"tracestate"))
        return begin(client, self._sample, self._clock.now())

    def finished(self, receipt: Receipt, door: Door, seconds: float) -> None:
        """A request is over; it took so long until its answer had left."""
        if receipt.trace is not None and self._sample is not None and not receipt.team:
            # Whoever has no key must not fill the collector.
            receipt = replace(receipt, trace=of_stranger(receipt.trace, self._sample))
        address = str(door.address[0]) if door.address else ""
        delivery = Delivery(door.status, door.bytes_out, seconds, door.gone, address)
        for listener in self._telemetry:
            listener.finished(receipt, delivery)
