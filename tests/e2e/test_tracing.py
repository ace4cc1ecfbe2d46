"""A request as a trace: over the real wire to a collector, with the upstream as a witness."""

from __future__ import annotations

import asyncio
import importlib
import io
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

import gateway.telemetry.trace
from gateway.app import open_gateway
from gateway.assembly import CannotServe
from gateway.domain.trace import parse
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from gateway.settings import load
from tests.collector import Collector, SeenSpan, run_collector
from tests.e2e.test_seeing import lines_of, log  # noqa: F401
from tests.flying import Fly
from tests.processes import ENVIRONMENT, GatewayProcess
from tests.running import ALIAS, MODEL, GatewayUnderTest, Start, TestClock, config_of

ASKED: dict[str, Any] = {
    "model": MODEL,
    "prompt": "A lighthouse",
    "quality": "low",
    "size": "1024x1024",
}
CLIENT_TRACE, CLIENT_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
FROM_CLIENT = {
    "traceparent": f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01",
    "tracestate": "vendor=abc",
    "baggage": "user=canary",
}
SMALL = Rule(payload_bytes=400)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with run_collector() as running:
        yield running


@asynccontextmanager
async def traced(
    start: Start, collector: Collector, changes: Mapping[str, Any] | None = None
) -> AsyncIterator[GatewayUnderTest]:
    """A gateway that traces; what it has to say has been said when the block ends."""
    said = dict(changes or {})
    said["tracing"] = {"otlp": collector.url, **said.get("tracing", {})}
    async with start(said) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def quick(sandbox: SandboxServer) -> None:
    sandbox.rules.add(Rule(prompt="A lighthouse", payload_bytes=400))


def by_name(spans: list[SeenSpan]) -> dict[str, SeenSpan]:
    found = {span.name: span for span in spans}
    assert len(found) == len(spans), "each name once"
    return found


def own(collector: Collector) -> SeenSpan:
    [found] = [span for span in collector.spans if span.kind == "SERVER"]
    return found


async def test_a_request_and_its_parts(
    start: Start,
    collector: Collector,
    log: io.StringIO,  # noqa: F811
) -> None:
    async with traced(start, collector) as gateway:
        async with gateway.http(headers=FROM_CLIENT) as http:
            answer = await http.post("/images/generations", json={**ASKED, "model": ALIAS})
        assert answer.status_code == 200
        await gateway.told.until(1)
        [record] = gateway.sandbox.journal
        receipt, delivery = gateway.told.requests[0]
        port = gateway.sandbox.port
    collector.until_requests(1)
    spans = by_name(collector.of(CLIENT_TRACE))
    assert list(spans) == [
        "POST /v1/images/generations",
        "read",
        "queue",
        "reserve",
        f"generate_content {MODEL}",
        "settle",
    ]
    server, call = spans["POST /v1/images/generations"], spans[f"generate_content {MODEL}"]
    assert (server.kind, server.parent, server.state) == ("SERVER", CLIENT_SPAN, "vendor=abc")
    assert all(span.parent == server.span_id for span in spans.values() if span is not server)
    assert server.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/images/generations",
        "url.path": "/v1/images/generations",
        "http.response.status_code": 200,
        "gateway.request_id": receipt.rid,
        "gateway.team": "growth",
        "gateway.model": ALIAS,
        "gateway.stream": False,
        "gateway.cache": "miss",
        "gateway.outcome": "delivered",
        "gateway.attempts": 1,
        "gateway.images": 1,
        "gateway.queue": server.attributes["gateway.queue"],
    }
    assert call.kind == "CLIENT"
    assert call.attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "server.address": "127.0.0.1",
        "server.port": port,
        "gen_ai.operation.name": "generate_content",
        "gen_ai.output.type": "image",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.model": MODEL,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 196,
        "gateway.upstream": "openai",
        "gateway.images": 1,
        "gateway.upstream_request_id": record.request_id,
    }
    assert not any(span.failed for span in spans.values())
    # What the upstream was told is the span of the attempt, in the client's trace.
    heard = parse(record.header("traceparent") or "")
    assert heard is not None
    assert (heard.trace_id, heard.span_id) == (CLIENT_TRACE, call.span_id)
    assert heard.sampled
    assert record.header("tracestate") is None
    assert len(record.headers_of("traceparent")) == 1
    assert record.header("baggage") is None
    # One after the other, inside of the whole.
    order = [spans[name] for name in ("read", "queue", "reserve", call.name, "settle")]
    for before, after in pairwise(order):
        assert before.start <= before.end <= after.start
    assert server.start == order[0].start
    assert order[-1].end <= server.end
    assert call.start < call.event("first_byte").at <= call.end
    assert spans["settle"].attributes == {"gateway.posted": True}
    assert (server.end - server.start) / 1e9 == pytest.approx(delivery.seconds, abs=1e-6)
    assert (call.end - call.start) / 1e9 <= receipt.timings.upstream
    assert server.resource["service.name"] == "image-gateway"
    assert server.resource["service.version"] == "0.1.0"
    [line] = lines_of(log)
    assert (line["trace_id"], line["span_id"]) == (CLIENT_TRACE, server.span_id)


async def test_a_stream_an_edit_and_a_hit(
    start: Start, collector: Collector, sandbox: SandboxServer
) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "navy").save(picture, "PNG")
    sandbox.rules.add(SMALL)
    async with traced(start, collector, {"tracing": {"cost": True}}) as gateway:
        async with gateway.sdk() as sdk:
            stream = await sdk.images.generate(**ASKED, stream=True, partial_images=1)
            assert len([event async for event in stream]) == 2
            await sdk.images.generate(**ASKED, extra_headers={"cache-control": "no-cache"})
            await sdk.images.generate(**ASKED)
            await sdk.images.edit(
                **{**ASKED, "prompt": "A fog"}, image=("a.png", picture.getvalue())
            )
        told = await gateway.told.until(4)
        traces = [receipt.trace for receipt, _ in told]
    collector.until_requests(4)
    stories = [by_name(collector.of(trace.context.trace_id)) for trace in traces if trace]
    streamed, bought, hit, edited = stories
    call = streamed[f"generate_content {MODEL}"]
    first = call.event("first_image").at
    assert call.event("first_byte").at < first <= call.end
    assert call.attributes["gen_ai.usage.cost.total"] == pytest.approx(0.008895)
    assert call.attributes["gen_ai.usage.cost.currency"] == "USD"
    assert [event.name for event in bought[call.name].events] == ["first_byte"]
    # No span for what was not done.
    assert list(hit) == ["POST /v1/images/generations", "read"]
    assert hit["POST /v1/images/generations"].attributes["gateway.cache"] == "hit"
    assert hit["POST /v1/images/generations"].parent == ""
    assert "POST /v1/images/edits" in edited
    assert len({trace.context.trace_id for trace in traces if trace}) == 4


async def test_a_refusal(start: Start, collector: Collector) -> None:
    async with traced(start, collector) as gateway:
        async with gateway.http("nobody-0123456789abcdef") as http:
            await http.post("/images/generations", json=ASKED)
        json = {"content-type": "application/json"}
        async with gateway.http() as http:
            await http.post("/images/generations", content=b"{", headers=json)
            await http.get("/images/generations")
        await gateway.told.until(3)
    collector.until_requests(3)
    key, body, method = collector.spans
    assert (key.attributes["gateway.reason"], key.failed) == ("auth_failed", False)
    assert key.attributes["http.response.status_code"] == 401
    assert (body.attributes["http.response.status_code"], body.failed) == (400, False)
    assert body.attributes["gateway.team"] == "growth"
    assert (method.name, method.attributes["http.response.status_code"]) == (
        "HTTP /v1/images/generations",
        405,
    )


async def test_two_attempts_are_two_spans(
    start: Start, collector: Collector, sandbox: SandboxServer, clock: TestClock
) -> None:
    sandbox.rules.clear()
    sandbox.rules.add(Rule(status=503))
    with SandboxServer(clock) as second:
        second.rules.add(SMALL)
        spare = {"kind": "openai", "base_url": second.base_url, "api_keys": ["sk-spare"]}
        changes = {
            "upstreams": {"spare": spare},
            "models": {"both": {"upstreams": ["openai", "spare"], "model": MODEL}},
        }
        async with traced(start, collector, changes) as gateway:
            async with gateway.http() as http:
                answer = await http.post("/images/generations", json={**ASKED, "model": "both"})
            assert answer.status_code == 200
            await gateway.told.until(1)
            asked = [*sandbox.journal, *second.journal]
            ports = [sandbox.port, second.port]
    collector.until_requests(1)
    failed, answered = [span for span in collector.spans if span.kind == "CLIENT"]
    assert [span.attributes["gateway.upstream"] for span in (failed, answered)] == [
        "openai",
        "spare",
    ]
    assert [span.attributes["server.port"] for span in (failed, answered)] == ports
    assert (failed.failed, failed.attributes["error.type"]) == (True, "5xx")
    assert failed.attributes["http.response.status_code"] == 503
    assert "gen_ai.usage.input_tokens" not in failed.attributes
    assert (answered.failed, answered.attributes["gen_ai.usage.output_tokens"]) == (False, 196)
    assert failed.end <= answered.start
    heard = [parse(record.header("traceparent") or "") for record in asked]
    assert [one.span_id for one in heard if one] == [failed.span_id, answered.span_id]
    server = own(collector)
    assert (server.attributes["gateway.attempts"], server.failed) == (2, False)


async def test_an_upstream_that_breaks_off(
    start: Start, collector: Collector, sandbox: SandboxServer
) -> None:
    sandbox.rules.add(Rule(prompt="A storm", cut_after_bytes=100, payload_bytes=4000))
    async with traced(start, collector) as gateway:
        async with gateway.http() as http:
            answer = await http.post("/images/generations", json={**ASKED, "prompt": "A storm"})
        assert answer.status_code >= 500
        await gateway.told.until(1)
    collector.until_requests(1)
    [call] = [span for span in collector.spans if span.kind == "CLIENT"]
    assert call.failed
    assert call.attributes["error.type"] == "truncated"
    server = own(collector)
    assert (server.failed, server.attributes["error.type"]) == (True, "truncated")
    assert server.attributes["gateway.outcome"] == "unknown"


async def test_a_client_that_leaves_and_one_that_comes_back(
    fly: Fly, collector: Collector, sandbox: SandboxServer
) -> None:
    gate, asked = Gate(), {**ASKED, "prompt": "A gale"}
    async with fly({"tracing": {"otlp": collector.url}}) as house:
        gateway = house.gateway
        sandbox.rules.clear()
        sandbox.rules.add(Rule(payload_bytes=400, wait_for=gate))
        async with gateway.http() as http:
            first = asyncio.create_task(http.post("/images/generations", json=asked))
            await gate.arrived()
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
        async with gateway.http(headers={"x-stainless-retry-count": "1"}) as http:
            second = asyncio.create_task(http.post("/images/generations", json=asked))
            await house.joins(1)
            gate.set()
            assert (await second).status_code == 200
        await gateway.told.until(2)
    collector.until_requests(2)
    servers = [span for span in collector.spans if span.kind == "SERVER"]
    [flown] = [span for span in servers if "gateway.client_gone" in span.attributes]
    [joined] = [span for span in servers if "gateway.joined" in span.attributes]
    assert flown.attributes["gateway.client_gone"] == "upstream"
    [call] = [span for span in collector.spans if span.kind == "CLIENT"]
    assert call.parent == flown.span_id
    assert joined.attributes["gateway.joined"] == flown.attributes["gateway.request_id"]
    assert joined.links == ((flown.trace_id, flown.span_id),)
    assert joined.trace_id != flown.trace_id


async def test_what_is_not_sampled_is_passed_on_and_not_sent(
    start: Start,
    collector: Collector,
    log: io.StringIO,  # noqa: F811
) -> None:
    async with traced(start, collector, {"tracing": {"sample": 0}}) as gateway:
        async with gateway.http() as http:
            await http.post("/images/generations", json=ASKED)
            not_sampled = {"traceparent": f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-00"}
            fresh = {"cache-control": "no-cache"}
            await http.post("/images/generations", json=ASKED, headers=not_sampled | fresh)
            await http.post("/images/generations", json=ASKED, headers=FROM_CLIENT | fresh)
        await gateway.told.until(3)
        heard = [parse(record.header("traceparent") or "") for record in gateway.sandbox.journal]
    assert [one.sampled for one in heard if one] == [False, False, True]
    assert [one.trace_id for one in heard[1:] if one] == [CLIENT_TRACE, CLIENT_TRACE]
    collector.until_requests(1)
    assert {span.trace_id for span in collector.spans} == {CLIENT_TRACE}
    assert own(collector).parent == CLIENT_SPAN
    assert ["trace_id" in line for line in lines_of(log)] == [False, False, True]


async def test_a_stranger_does_not_decide_what_is_sent(
    start: Start,
    collector: Collector,
    log: io.StringIO,  # noqa: F811
) -> None:
    async with traced(start, collector, {"tracing": {"sample": 0}}) as gateway:
        wrong = {"authorization": "Bearer sk-nobody-knows-this-key"}
        async with gateway.http(headers=FROM_CLIENT) as http:
            for refused in (wrong, wrong, {"idempotency-key": "x" * 256}):
                answer = await http.post("/images/generations", json=ASKED, headers=refused)
                assert answer.status_code in (400, 401)
            assert (await http.get("/images/generations")).status_code == 405
            no_model = {**ASKED, "model": "nobody-has-it"}
            known = await http.post("/images/generations", json=no_model)
            assert known.status_code == 400
        await gateway.told.until(5)
    collector.until_requests(1)
    span = own(collector)
    assert (span.trace_id, span.attributes["http.response.status_code"]) == (CLIENT_TRACE, 400)
    assert span.attributes["gateway.team"] == "growth"
    assert ["trace_id" in line for line in lines_of(log)] == [False] * 4 + [True]


@pytest.mark.parametrize("traces", [True, False])
async def test_upstreams_hear_nothing_where_that_is_not_wanted(
    start: Start, collector: Collector, traces: bool
) -> None:
    tracing = {"otlp": collector.url, "propagate": False} if traces else {}
    async with start({"tracing": tracing}) as gateway:
        async with gateway.http(headers=FROM_CLIENT) as http:
            await http.post("/images/generations", json=ASKED)
        await gateway.told.until(1)
        [record] = gateway.sandbox.journal
        assert (gateway.told.last.trace is not None) is traces
    assert not {"traceparent", "tracestate", "baggage"} & {name for name, _ in record.headers}
    assert bool(collector.spans) is traces


async def test_a_header_that_names_no_span_begins_a_trace(
    start: Start, collector: Collector
) -> None:
    async with traced(start, collector) as gateway:
        twice = [("traceparent", FROM_CLIENT["traceparent"])] * 2
        async with gateway.http() as http:
            await http.post("/images/generations", json=ASKED, headers=twice)
        await gateway.told.until(1)
    collector.until_requests(1)
    assert own(collector).trace_id != CLIENT_TRACE
    assert own(collector).parent == ""


async def test_the_collector_is_told_who_sends(start: Start, collector: Collector) -> None:
    headers = {"authorization": "Bearer collector-token"}
    async with traced(start, collector, {"tracing": {"headers": headers}}) as gateway:
        async with gateway.http() as http:
            await http.post("/images/generations", json=ASKED)
        await gateway.told.until(1)
    collector.until_requests(1)
    assert collector.headers[0]["authorization"] == "Bearer collector-token"
    assert collector.headers[0]["content-type"] == "application/x-protobuf"


DROPPED = "gateway_spans_dropped_total"


async def _dropped(running: GatewayUnderTest) -> float:
    """How many spans were dropped, once there are any."""
    async with asyncio.timeout(30):
        while True:
            if dropped := (await running.metrics())[DROPPED]:
                return dropped
            await asyncio.sleep(0.02)


async def test_a_collector_that_is_away_harms_nobody(
    start: Start, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.telemetry.trace, "EXPORT_SECONDS", 0.2)
    monkeypatch.setattr(gateway.telemetry.trace, "DELAY_SECONDS", 0.01)
    away = {"tracing": {"otlp": "http://127.0.0.1:9/v1/traces"}}
    async with start(away) as running, running.http() as http:
        assert (await http.post("/images/generations", json=ASKED)).status_code == 200
        await running.told.until(1)
        dropped = await _dropped(running)
    assert dropped == 6


async def test_a_collector_that_refuses_loses_what_it_refuses(
    start: Start, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.telemetry.trace, "DELAY_SECONDS", 0.01)
    collector.status = 400
    async with traced(start, collector) as running, running.http() as http:
        await http.post("/images/generations", json=ASKED)
        await running.told.until(1)
        dropped = await _dropped(running)
        collector.status = 200
        await http.post("/images/generations", json=ASKED)
        await asyncio.to_thread(collector.until_requests, 1)
        assert (await running.metrics())[DROPPED] == dropped == 6


async def test_the_queue_of_spans_is_bounded_and_so_is_the_end(
    start: Start, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector takes a connection and says nothing. Requests go on, a few spans wait, and the
    end does not."""
    module = gateway.telemetry.trace
    monkeypatch.setattr(module, "DELAY_SECONDS", 0.01)
    monkeypatch.setattr(module, "MAX_QUEUED_SPANS", 12)
    monkeypatch.setattr(module, "BATCH_SPANS", 6)
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.1)
    monkeypatch.setattr(module, "EXPORT_SECONDS", 20.0)
    collector.held.clear()
    fresh = {"cache-control": "no-cache"}
    async with traced(start, collector) as running, running.http(headers=fresh) as http:
        for _ in range(8):
            answer = await http.post("/images/generations", json=ASKED)
            assert answer.status_code == 200
        await running.told.until(8)
        dropped = (await running.metrics())[DROPPED]
        ending = asyncio.get_running_loop().time()
    took = asyncio.get_running_loop().time() - ending
    # Of 48: at most one batch is on its way, and two more wait.
    assert 48 - 18 <= dropped < 48
    assert took < module.EXPORT_SECONDS / 2
    collector.held.set()


async def test_without_the_extra_the_start_says_what_to_install(
    tmp_path: Path, sandbox: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(
        tmp_path, sandbox.base_url, {"tracing": {"otlp": "http://collector:4318/v1/traces"}}
    )
    for name in [*sys.modules]:
        if name.partition(".")[0] == "opentelemetry" or name == "gateway.telemetry.trace":
            monkeypatch.delitem(sys.modules, name)
    # What an import statement finds where a package is not there.
    monkeypatch.setattr(importlib, "import_module", _as_if_not_installed)
    with pytest.raises(CannotServe) as refused:
        async with open_gateway(load(config, {}), TestClock()):
            pass
    assert str(refused.value) == (
        f"{config}: tracing.otlp: tracing needs the extra otel, which is not installed: "
        'pip install "image-gateway[otel]"; or remove this setting'
    )


def _as_if_not_installed(name: str) -> None:
    raise ModuleNotFoundError("No module named 'opentelemetry'", name="opentelemetry")


def test_a_process_sends_what_it_has_before_it_ends(
    tmp_path: Path, sandbox: SandboxServer, collector: Collector
) -> None:
    config = config_of(tmp_path, sandbox.base_url, {"tracing": {"otlp": collector.url}})
    with GatewayProcess(config) as process:
        process.wait_ready()
        key = {"authorization": "Bearer growth-key-0123456789abcdef"}
        url = f"{process.base_url}/images/generations"
        assert httpx.post(url, json=ASKED, headers=key, timeout=30, verify=False).status_code == 200
        process.terminate()
        assert process.wait() == 0
    assert len(collector.spans) == 6
    assert own(collector).attributes["http.response.status_code"] == 200


LOADS = """
import asyncio, pathlib, sys
import gateway.cli
from gateway.app import open_gateway
from gateway.clock import SystemClock
from gateway.settings import load

async def run():
    async with open_gateway(load(pathlib.Path(sys.argv[1]), {}), SystemClock()):
        ours = ("opentelemetry.exporter", "gateway.telemetry.trace")
        print("opened", [name for name in sys.modules if name.startswith(ours)])

asyncio.run(run())
"""


def test_no_exporter_is_loaded_where_nobody_asks(tmp_path: Path, sandbox: SandboxServer) -> None:
    config = config_of(tmp_path, sandbox.base_url, {})
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "opened []\n"), done.stderr
