"""The attempts of one purchase, for a request that is traced: when each set out, under which span,
and what came back."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.domain.errors import GatewayError
from gateway.domain.receipt import Attempt
from gateway.domain.trace import TraceContext
from gateway.ports import Clock, Reply
from gateway.relay.failover import kind_of
from gateway.relay.plan import Way


@dataclass(frozen=True, slots=True)
class Leg:
    """One attempt that is under way. ``headers`` tell the upstream which span it works for."""

    span_id: str
    way: Way
    began: float
    headers: tuple[tuple[str, str], ...]


class Trail:
    """The attempts of one purchase, in order. ``context`` is the request's span, ``began`` the
    clock's seconds at which the purchase began. ``propagate``: upstreams hear of the trace."""

    def __init__(
        self, context: TraceContext, began: float, clock: Clock, *, propagate: bool
    ) -> None:
        self.attempts: list[Attempt] = []
        self._context = context
        self._began = began
        self._clock = clock
        self._propagate = propagate

    def set_out(self, way: Way) -> Leg:
        """Before an attempt is sent."""
        span = self._context.child()
        began = self._clock.monotonic() - self._began
        return Leg(span.span_id, way, began, span.headers if self._propagate else ())

    def came_back(self, leg: Leg, reply: Reply | None, error: GatewayError | None) -> None:
        """Its answer's head is there, or none will come. Neither of both: it broke here."""
        if not self._context.sampled:
            return
        way, kind = leg.way, kind_of(error) if error is not None else None
        host, port = way.upstream.address
        why = "" if reply is not None and error is None else "internal"
        self.attempts.append(
            Attempt(
                span_id=leg.span_id,
                upstream=way.upstream.name,
                provider=way.upstream.provider,
                host=host,
                port=port,
                model=way.target.model,
                began=leg.began,
                ended=self._clock.monotonic() - self._began,
                status=reply.status if reply is not None else 0,
                error=kind.value if kind is not None else why,
            )
        )
