"""A collector of traces in the test's process: OTLP over HTTP on a real socket, in a thread."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

WAIT_SECONDS = 30


@dataclass(frozen=True)
class SeenEvent:
    name: str
    at: int


@dataclass(frozen=True)
class SeenSpan:
    """A span as it came over the wire: ids in hexadecimal, times in nanoseconds."""

    name: str
    trace_id: str
    span_id: str
    parent: str
    kind: str
    state: str
    start: int
    end: int
    attributes: Mapping[str, Any]
    events: tuple[SeenEvent, ...]
    links: tuple[tuple[str, str], ...]
    failed: bool
    resource: Mapping[str, Any]

    def event(self, name: str) -> SeenEvent:
        [found] = [event for event in self.events if event.name == name]
        return found


class Collector:
    """What was received. ``status`` is what it answers; while ``held`` is cleared, nothing."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.status = 200
        self.held = threading.Event()
        self.held.set()
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.spans: list[SeenSpan] = []
        self._news = threading.Condition()

    def take(self, headers: dict[str, str], body: bytes) -> int:
        self.held.wait(WAIT_SECONDS)
        with self._news:
            self.headers.append(headers)
            if self.status == 200:
                self.bodies.append(body)
                self.spans += _spans(body)
            self._news.notify_all()
        return self.status

    def of(self, trace_id: str) -> list[SeenSpan]:
        return [span for span in self.spans if span.trace_id == trace_id]

    def until_requests(self, count: int) -> None:
        """Waits for so many requests' own spans."""
        deadline = time.monotonic() + WAIT_SECONDS
        with self._news:
            while sum(span.kind == "SERVER" for span in self.spans) < count:
                assert self._news.wait(deadline - time.monotonic()), self.spans

    def until_posts(self, count: int) -> None:
        with self._news:
            assert self._news.wait_for(lambda: len(self.headers) >= count, WAIT_SECONDS)


@contextmanager
def run_collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            if self.headers["content-encoding"] == "gzip":
                raw = gzip.decompress(raw)
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.send_response(collector.take(headers, raw))
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        collector = Collector(f"http://127.0.0.1:{server.server_port}/v1/traces")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield collector
        finally:
            collector.held.set()
            server.shutdown()
            thread.join()


def _spans(body: bytes) -> list[SeenSpan]:
    request = ExportTraceServiceRequest.FromString(body)
    kinds = {1: "INTERNAL", 2: "SERVER", 3: "CLIENT"}
    return [
        SeenSpan(
            name=span.name,
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent=span.parent_span_id.hex(),
            kind=kinds[span.kind],
            state=span.trace_state,
            start=span.start_time_unix_nano,
            end=span.end_time_unix_nano,
            attributes=_values(span.attributes),
            events=tuple(SeenEvent(event.name, event.time_unix_nano) for event in span.events),
            links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
            failed=span.status.code == 2,
            resource=_values(group.resource.attributes),
        )
        for group in request.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]


def _values(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in _typed(pairs)}


def _typed(pairs: Any) -> list[KeyValue]:
    return list(pairs)


def _value(value: AnyValue) -> Any:
    return getattr(value, value.WhichOneof("value") or "string_value")
