"""Who and what is at the door, and what it gets: the two ends of a request's life."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

from gateway.domain.call import Call, Inquiry, Operation
from gateway.domain.compat import changed_names
from gateway.domain.errors import ClientGone, GatewayError
from gateway.domain.receipt import Receipt, Timings
from gateway.domain.record import record
from gateway.domain.team import Caller
from gateway.domain.trace import Trace
from gateway.ports import Lent
from gateway.relay import headers
from gateway.relay.flights import Client, Head
from gateway.relay.plan import CacheWish, Plan

Watch: TypeAlias = Callable[[bytes | Lent], object]
"""Is shown a piece of a body. It may refuse the request by raising a ``GatewayError``."""


class Incoming(Protocol):
    """A request's body as it comes."""

    def __aiter__(self) -> AsyncIterator[bytes | Lent]: ...

    def show_to(self, watch: Watch) -> None:
        """From now on each piece is shown to ``watch`` before it is handed out, perhaps in several
        parts, as they come. What that raises is raised where the piece was asked for."""

    def whole(self) -> bytes | None:
        """All of it, where that is here already: nothing is to be waited for. Else None, and
        nothing was taken. Asked before anything else."""


@record
class Arrival:
    """Who and what is at the door. ``body`` has not been read; ``at`` is the clock's seconds."""

    rid: str
    operation: Operation | Inquiry
    secret: str | None
    content_type: str
    content_encoding: str | None
    content_length: int | None
    wish: CacheWish
    idempotency_key: str | None
    body: Incoming
    client: Client
    at: float
    retried: bool = False
    """An SDK says that it has sent this before (``x-stainless-retry-count``)."""
    asynchronous: bool = False
    """The client does not wait: it asks for the result later."""
    trace: Trace | None = None
    """Its span, where requests are traced."""
    user_hints: Mapping[str, str] = field(default_factory=dict)
    """Its headers among ``USER_HEADERS``: who the end user is, where the body does not say."""
    deployment: str | None = None
    """The model that the path names, as Azure's do: it goes before the body's own."""


@record
class Answer:
    """What the client gets, and in time the receipt: it waits for the end of the flight, which
    may be long after the client has left. ``gone`` is the stage at which it left, or empty: there
    is nobody to send the head to. ``done`` is told whether the client has got all of it."""

    head: Head
    receipt: Callable[[], Awaitable[Receipt]]
    gone: str = ""
    done: Callable[[bool], None] = lambda delivered: None


@dataclass(frozen=True, slots=True)
class Patience:
    """How long clients wait. ``max_wait_seconds`` is for JSON answers; None: as long as they like.
    ``repeat_unknown``: what a dead process left with an unknown outcome is bought again."""

    max_wait_seconds: float | None = None
    repeat_unknown: bool = False


_NOBODY: frozenset[str] = frozenset()


class Draft:
    """What is known of a request before it ends. Its receipt is written from that, once and whole:
    growing one field by field cost ten copies a request (a quarter of a millisecond).
    """

    __slots__ = (
        "arrival", "call", "caller", "changed", "model", "prompt", "reading", "took_over", "vacant",
    )  # fmt: skip

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival
        self.caller: Caller | None = None
        """With the end user, once the call has named one."""
        self.call: Call | None = None
        """As it came."""
        self.model = ""
        """As it was asked for."""
        self.reading = 0.0
        """Seconds until it was read."""
        self.prompt: str | None = None
        self.changed: tuple[str, ...] = ()
        self.took_over = ""
        """The request of a dead process that it makes good."""
        self.vacant = _NOBODY
        """The requests that turned out to have no answer for this one."""

    @property
    def trace(self) -> Trace | None:
        return self.arrival.trace

    def read(self, call: Call, seconds: float, prompt: str | None) -> None:
        self.call, self.model, self.reading, self.prompt = call, call.model, seconds, prompt

    def repaired(self, call: Call) -> None:
        self.model = self.model or call.model
        self.changed = changed_names(call)

    def receipt(self, plan: Plan | None = None, **more: Any) -> Receipt:
        """The receipt as far as it goes. ``plan``: as it was bought, where it came to that;
        ``more`` are further fields, and go before those."""
        arrival, caller, call = self.arrival, self.caller, self.call
        known: dict[str, Any] = {
            "rid": arrival.rid,
            "operation": str(arrival.operation),
            "status": 0,
            "retried": arrival.retried,
            "asynchronous": arrival.asynchronous,
            "trace": arrival.trace,
            "model": self.model,
            "changed": self.changed,
            "took_over": self.took_over,
        }
        if caller is not None:
            known["team"] = caller.team.id
            known["key_id"] = caller.key.id
            known["user"] = caller.recorded_user
        if call is not None:
            known["stream"] = call.stream
            known["images_asked"] = call.n
            known["bytes_in"] = call.body_bytes
            known["prompt"] = self.prompt
            if "timings" not in more:
                known["timings"] = Timings(self.reading)
        # As it is bought: what was left open may be pinned.
        bought = call if plan is None else plan.call
        if bought is not None:
            known["size"] = bought.size
            known["quality"] = bought.quality
            known["output_format"] = bought.output_format
        if plan is not None:
            way = plan.way
            known["model_label"], known["drawn_label"] = labels(plan)
            known["cache"] = plan.cache
            known["model_served"] = way.target.model
            known["upstream"] = way.upstream.name
            known["bound"] = way.quote.bound.amount
            if "price_id" not in more:
                known["price_id"] = way.quote.price_id
        known.update(more)
        return Receipt(**known)


def labels(plan: Plan) -> tuple[str, str]:
    """What its model is counted as, and the one behind its image tool, or empty."""
    tool = plan.tool
    drawn = "" if tool is None else tool.label or tool.name
    model = plan.ways[0].model
    return model.label or model.name, drawn


def of_error(error: GatewayError) -> dict[str, Any]:
    """What a receipt says of the error that ended its request."""
    return {
        "status": error.status,
        "reason": error.reason,
        "fault": error.fault,
        "code": error.code,
    }


def ended(
    receipt: Receipt,
    error: GatewayError,
    said: headers.Headers,
    done: Callable[[bool], None] = lambda delivered: None,
) -> Answer:
    """A request that no flight of its own stands behind, ended by an error."""
    receipt = failed(receipt, error)
    head = headers.error_head(error, receipt.rid, said)
    return Answer(head, lambda: known(receipt), stage(error), done)


def failed(receipt: Receipt, error: GatewayError) -> Receipt:
    """A receipt, ended by an error."""
    return replace(receipt, **of_error(error))


def stage(error: GatewayError) -> str:
    """At which stage the client left; empty where it did not."""
    return error.stage if isinstance(error, ClientGone) else ""


async def known(receipt: Receipt) -> Receipt:
    return receipt
