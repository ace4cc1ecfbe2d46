"""Spans: how a receipt becomes a trace, and how that leaves for a collector (OTLP over HTTP).

Imported only where tracing is configured: it needs the extra ``otel``. Spans are made at a
request's end, all at once, from what the receipt says. What an attribute may be is listed here
alone: never a key, a user, a prompt or a byte of a picture.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

from gateway.domain.call import Inquiry, Operation, Passage
from gateway.domain.money import NANOS_PER_DOLLAR
from gateway.domain.receipt import Attempt, Delivery, Receipt
from gateway.domain.trace import TraceContext
from gateway.telemetry.log import redact

log = logging.getLogger(__name__)

MAX_QUEUED_SPANS = 4096
"""What waits for a collector; about 4 MB. More is dropped, and counted."""
BATCH_SPANS = 256
DELAY_SECONDS = 2.0
EXPORT_SECONDS = 5.0
"""One batch, with its retries; then it is dropped."""
FLUSH_SECONDS = 5.0
"""What is still queued at the end has this long."""
MAX_TEXT = 256
NANOS = 1_000_000_000
SERVICE = "image-gateway"
ROUTES = {one.value: f"/v1{one.path}" for one in (*Operation, *Inquiry, *Passage)}
NOT_ALLOWED = 405

Value = str | int | float | bool


class _Counted(SpanExporter):
    """An exporter that says how many spans it was given, and how many it could not bring on."""

    def __init__(self, inner: SpanExporter, lost: Callable[[int], None]) -> None:
        self.taken = 0
        self._inner = inner
        self._lost = lost

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.taken += len(spans)
        result = self._inner.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._lost(len(spans))
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._inner.force_flush(timeout_millis)


class Spans:
    """``Telemetry`` as spans, sent by a thread of its own. Whatever the collector does, nobody
    waits for it but the end of the process, and that for ``FLUSH_SECONDS``."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        version: str,
        cost: bool,
        lost: Callable[[int], None],
    ) -> None:
        """``cost``: spans of calls say what they cost. ``lost`` hears, in any thread, of so many
        spans that were dropped."""
        # Its warnings tell of each retry; what is dropped in the end is an error.
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)
        resource = Resource.create({"service.version": version})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": SERVICE}))
        self._resource = resource
        self._scope = InstrumentationScope("gateway", version)
        self._cost = cost
        self._lost = lost
        self._handed_over = 0
        exporter = OTLPSpanExporter(
            url,
            headers=dict(headers),
            timeout=EXPORT_SECONDS,
            compression=Compression.Gzip,
        )
        self._exporter = _Counted(exporter, lost)
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=MAX_QUEUED_SPANS,
            schedule_delay_millis=DELAY_SECONDS * 1000,
            max_export_batch_size=BATCH_SPANS,
            export_timeout_millis=EXPORT_SECONDS * 1000,
        )

    def finished(self, receipt: Receipt, delivery: Delivery) -> None:
        trace = receipt.trace
        if trace is None or not trace.context.sampled:
            return
        spans = self.made_of(receipt, delivery)
        if self._handed_over - self._exporter.taken + len(spans) > MAX_QUEUED_SPANS:
            self._lost(len(spans))
            return
        self._handed_over += len(spans)
        for span in spans:
            self._processor.on_end(span)

    def made_of(self, receipt: Receipt, delivery: Delivery) -> list[ReadableSpan]:
        """The spans of a request that is traced, its own first."""
        assert receipt.trace is not None
        return _Story(self._resource, self._scope, receipt, delivery, cost=self._cost).spans()

    async def aclose(self) -> None:
        """Sends what is queued, for ``FLUSH_SECONDS`` at the most."""
        loop, over = asyncio.get_running_loop(), asyncio.Event()

        def end() -> None:
            self._processor.shutdown()  # type: ignore[no-untyped-call]
            # Where it took too long nobody listens, and the loop may be closed.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(over.set)

        # A daemon: a collector that is silent must not hold the end of the process up.
        threading.Thread(target=end, name="gateway-spans-end", daemon=True).start()
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                await over.wait()
        except TimeoutError:
            self._exporter.shutdown()
        if left := self._handed_over - self._exporter.taken:
            log.warning("spans were not sent before the end", extra={"spans": left})


class _Story:
    """The spans of one receipt."""

    def __init__(
        self,
        resource: Resource,
        scope: InstrumentationScope,
        receipt: Receipt,
        delivery: Delivery,
        *,
        cost: bool,
    ) -> None:
        assert receipt.trace is not None
        self._resource = resource
        self._scope = scope
        self._receipt = receipt
        self._delivery = delivery
        self._with_cost = cost
        self._trace = receipt.trace
        self._began = _nanos(receipt.trace.began)
        self._state = _state(receipt.trace.context)
        self._own = self._context(receipt.trace.context.span_id)

    def spans(self) -> list[ReadableSpan]:
        timings = self._receipt.timings
        found = [self._server()]
        if timings.reading:
            found.append(self._part("read", 0.0, timings.reading))
        sent = timings.sent_at
        if timings.queued_at:
            dequeued = timings.queued_at + timings.queueing
            found.append(self._part("queue", timings.queued_at, dequeued))
            found.append(self._part("reserve", dequeued, sent))
        found += [self._client(attempt, sent) for attempt in self._receipt.trail]
        if timings.settling:
            landed = sent + timings.upstream
            posted = {"gateway.posted": self._receipt.posted}
            found.append(self._part("settle", landed, landed + timings.settling, posted))
        return found

    def _server(self) -> ReadableSpan:
        receipt, delivery = self._receipt, self._delivery
        route = ROUTES[receipt.operation]
        # Another method is refused at the door, before anybody has looked at more of it.
        method = "_OTHER" if receipt.status == NOT_ALLOWED else receipt.method
        attributes: dict[str, Value | None] = {
            "http.request.method": method,
            "http.route": route,
            "url.path": route,
            "http.response.status_code": delivery.status or None,
            "gateway.request_id": receipt.rid,
            "gateway.team": receipt.team,
            "gateway.model": _text(receipt.model),
            "gateway.stream": receipt.stream,
            "gateway.cache": receipt.cache.value,
            "gateway.outcome": receipt.outcome.value if receipt.outcome else "",
            "gateway.reason": receipt.reason,
            "gateway.attempts": receipt.attempts or None,
            "gateway.joined": receipt.joined,
            "gateway.retried": receipt.retried or None,
            "gateway.async": receipt.asynchronous or None,
            "gateway.images": receipt.images,
            "gateway.queue": round(receipt.timings.queueing, 6) or None,
            "gateway.client_gone": delivery.gone,
        }
        status = Status(StatusCode.UNSET)
        if delivery.status >= 500 or (not delivery.status and receipt.status >= 500):
            attributes["error.type"] = receipt.reason or str(delivery.status)
            status = Status(StatusCode.ERROR)
        parent = self._trace.parent
        links = []
        if (joined := receipt.joined_trace) is not None:
            links.append(Link(_context(joined.trace_id, joined.span_id, joined.sampled)))
        return self._span(
            f"{'HTTP' if method == '_OTHER' else method} {route}",
            self._own,
            self._context(parent, remote=True) if parent else None,
            0.0,
            delivery.seconds,
            attributes,
            kind=SpanKind.SERVER,
            status=status,
            links=links,
        )

    def _client(self, attempt: Attempt, sent: float) -> ReadableSpan:
        receipt = self._receipt
        timings, usage = receipt.timings, receipt.usage
        answered = attempt.status == 200 and not attempt.error
        ended = max(attempt.ended, timings.upstream) if answered else attempt.ended
        error = attempt.error or (receipt.reason if answered else "")
        attributes: dict[str, Value | None] = {
            "http.request.method": "POST",
            "http.response.status_code": attempt.status or None,
            "server.address": attempt.host,
            "server.port": attempt.port,
            "error.type": error,
            "gen_ai.operation.name": "generate_content",
            "gen_ai.output.type": "image",
            "gen_ai.provider.name": attempt.provider,
            "gen_ai.request.model": _text(attempt.model),
            "gateway.upstream": attempt.upstream,
        }
        events: list[tuple[str, float]] = []
        if answered:
            tokens_in, tokens_out = usage.text_in + usage.image_in, usage.text_out + usage.image_out
            attributes |= {
                "gen_ai.response.model": _text(receipt.model_served),
                "gen_ai.usage.input_tokens": tokens_in or None,
                "gen_ai.usage.output_tokens": tokens_out or None,
                "gateway.images": receipt.images,
                "gateway.upstream_request_id": _text(receipt.upstream_rid),
            }
            if self._with_cost:
                attributes |= {
                    "gen_ai.usage.cost.total": receipt.cost / NANOS_PER_DOLLAR,
                    "gen_ai.usage.cost.currency": "USD",
                }
            events.append(("first_byte", attempt.ended))
            if timings.first_image:
                events.append(("first_image", timings.first_image))
        return self._span(
            f"generate_content {_text(attempt.model)}",
            self._context(attempt.span_id),
            self._own,
            sent + attempt.began,
            sent + ended,
            attributes,
            kind=SpanKind.CLIENT,
            status=Status(StatusCode.ERROR) if error else Status(StatusCode.UNSET),
            events=[(name, sent + at) for name, at in events],
        )

    def _part(
        self, name: str, start: float, end: float, attributes: Mapping[str, Value] | None = None
    ) -> ReadableSpan:
        context = self._context(self._trace.context.child().span_id)
        return self._span(name, context, self._own, start, end, attributes or {})

    def _span(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        start: float,
        end: float,
        attributes: Mapping[str, Value | None],
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        status: Status | None = None,
        links: Sequence[Link] = (),
        events: Sequence[tuple[str, float]] = (),
    ) -> ReadableSpan:
        # A tracer's own start and end cost 110 us a span, this 3: it samples, it locks, it reads
        # the clock, and all of that is decided here already.
        return ReadableSpan(
            name,
            context,
            parent,
            self._resource,
            {name: value for name, value in attributes.items() if value not in ("", None)},
            [Event(name, timestamp=self._at(at)) for name, at in events],
            links,
            kind,
            status=status or Status(StatusCode.UNSET),
            start_time=self._at(start),
            end_time=self._at(max(start, end)),
            instrumentation_scope=self._scope,
        )

    def _at(self, seconds: float) -> int:
        return self._began + round(seconds * NANOS)

    def _context(self, span_id: str, *, remote: bool = False) -> SpanContext:
        context = self._trace.context
        return _context(context.trace_id, span_id, True, self._state, remote=remote)


def _context(
    trace_id: str,
    span_id: str,
    sampled: bool,
    state: TraceState | None = None,
    *,
    remote: bool = False,
) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    return SpanContext(int(trace_id, 16), int(span_id, 16), remote, flags, state)


def _state(context: TraceContext) -> TraceState | None:
    return TraceState.from_header([context.state]) if context.state else None


def _nanos(instant: datetime) -> int:
    since = instant - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * NANOS + since.microseconds * 1000


def _text(text: str) -> str:
    """What a client or a provider has chosen."""
    return redact(text)[:MAX_TEXT]
