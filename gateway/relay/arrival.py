"""Who and what is at the door, and what it gets: the two ends of a request's life."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace

from gateway.domain.call import Inquiry, Operation
from gateway.domain.errors import ClientGone, GatewayError
from gateway.domain.receipt import Receipt
from gateway.domain.trace import Trace
from gateway.relay import headers
from gateway.relay.flights import Client, Head
from gateway.relay.plan import CacheWish


@dataclass(frozen=True, slots=True)
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
    body: AsyncIterator[bytes]
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


@dataclass(frozen=True, slots=True)
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
    return replace(
        receipt,
        status=error.status,
        reason=error.reason,
        fault=error.fault,
        code=error.code,
    )


def stage(error: GatewayError) -> str:
    """At which stage the client left; empty where it did not."""
    return error.stage if isinstance(error, ClientGone) else ""


async def known(receipt: Receipt) -> Receipt:
    return receipt
