"""What happened and what it cost: one receipt a request, and how the client got its answer."""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum

from gateway.domain.call import Usage
from gateway.domain.errors import Fault
from gateway.domain.ledger import Basis, Outcome, Part
from gateway.domain.money import Money
from gateway.domain.record import record
from gateway.domain.trace import Trace, TraceContext


class CacheResult(StrEnum):
    """The value of ``x-cache`` and of the metric's label."""

    HIT = "hit"
    MISS = "miss"
    OFF = "off"
    JOIN = "join"
    """The answer of another request's flight."""


@record
class Timings:
    """Seconds. ``upstream_first_byte`` is until the status line, ``first_image`` until the first
    picture of a stream was whole; 0 where it never came to that."""

    reading: float = 0.0
    reserving: float = 0.0
    upstream_first_byte: float = 0.0
    first_image: float = 0.0
    upstream: float = 0.0
    settling: float = 0.0
    queueing: float = 0.0
    queued_at: float = 0.0
    """When it came to the queue, after the request began; 0 where it did not."""

    @property
    def sent_at(self) -> float:
        """When the upstream's part began, after the request began."""
        return self.reading + self.queueing + self.reserving


@record
class Attempt:
    """One time that a call was sent upstream. ``began`` and ``ended`` are seconds after the
    upstream's part began; an attempt ends with the head of its answer, also the one that is then
    read on. ``status`` is 0 without an answer, ``error`` how it failed (a closed list), or empty.
    """

    span_id: str
    upstream: str
    provider: str
    host: str
    port: int
    model: str
    began: float
    ended: float
    status: int = 0
    error: str = ""


@record
class Receipt:
    """One request, as metrics, the log line and the books see it. Empty text where not known:
    a request refused at the door has no model, one with an unknown key has no team.

    ``model`` is the name asked for, ``model_label`` its bounded form for metrics, ``reason`` why
    it was refused or failed (a closed list), and money is nano-dollars.
    """

    rid: str
    operation: str
    status: int
    team: str = ""
    key_id: str = ""
    user: str = ""
    """The end user, as a hash, where that is to be recorded."""
    model: str = ""
    model_label: str = ""
    model_served: str = ""
    drawn_label: str = ""
    """As ``model_label``, of the model behind a response's image tool, whose its ``images`` are;
    empty where there is none."""
    upstream: str = ""
    upstream_rid: str = ""
    upstream_status: int = 0
    size: str = ""
    quality: str = ""
    output_format: str = ""
    stream: bool = False
    cache: CacheResult = CacheResult.OFF
    outcome: Outcome | None = None
    basis: Basis = Basis.NONE
    cost: Money = 0
    bound: Money = 0
    avoided: Money = 0
    images_asked: int = 0
    images: int = 0
    usage: Usage = field(default_factory=Usage)
    drawn: Part | None = None
    """Of cost, images and usage, what that model has."""
    flags: tuple[str, ...] = ()
    reason: str = ""
    fault: Fault | None = None
    """Whose, of a request that was refused or failed."""
    code: str = ""
    price_id: str = ""
    bytes_in: int = 0
    timings: Timings = field(default_factory=Timings)
    degraded: bool = False
    posted: bool = True
    """False where the ledger could not be told: the sweep will post the bound."""
    attempts: int = 0
    """How many times it was sent upstream."""
    retried: bool = False
    """An SDK says that it has sent this before."""
    asynchronous: bool = False
    """The client did not wait: it asks for the result."""
    changed: tuple[str, ...] = ()
    """What was sent on otherwise than it came, by name (a closed list)."""
    joined: str = ""
    """The request whose flight, or kept answer, this one was answered with."""
    took_over: str = ""
    """The request of a process that is gone, which this one bought again."""
    trace: Trace | None = None
    """Where requests are traced: which span this one is."""
    trail: tuple[Attempt, ...] = ()
    """Of a request whose trace is sampled: its attempts, in order."""
    joined_trace: TraceContext | None = None
    """The span of the request that it joined, where that is known here."""
    method: str = "POST"
    """Of its request line, once that was found to be one that is answered."""
    prompt: str | None = None
    """Only where the operator asked for prompts in the log."""


@record
class Delivery:
    """How the answer left. ``gone`` is the stage at which the client left, or empty;
    ``client_address`` is where it is, as far as a trusted proxy or the connection says."""

    status: int
    bytes_out: int
    seconds: float
    gone: str = ""
    client_address: str = ""
