"""Faults that take more than one step to tell: clients that dawdle or come back, connections that
end between two calls, keys that rest, bills that cannot be, and room that is used up
(reliability.md 4.2, 4.3, 4.5)."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import gateway.api.door
from gateway import assembly
from gateway.domain.call import Json
from gateway.domain.ledger import Outcome
from gateway.domain.money import NANOS_PER_DOLLAR
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from gateway.upstream.wire import Timeouts
from tests import upstream_cuts as cuts
from tests.departures import Departures
from tests.e2e.test_endings import connect, gone, leave, read, request, send, soon
from tests.e2e.test_fault_matrix import FRESH, ask, books_of, error
from tests.e2e.test_ways import Hurried, upstream
from tests.postgres import Postgres
from tests.processes import bill
from tests.running import MODEL, GatewayUnderTest, Start, TestClock, run_gateway
from tests.upstream.raw_server import Peer, raw_server

SMALL = Rule(payload_bytes=400)
NO_CACHE = {"cache": {"enabled": False}}
ASKED = {"model": MODEL, "prompt": "A lighthouse", "quality": "low", "size": "1024x1024"}


async def buy(gateway: GatewayUnderTest, prompt: str = "A lighthouse") -> httpx.Response:
    async with gateway.http() as http:
        return await http.post("/images/generations", json={**ASKED, "prompt": prompt})


# Clients (33, 34, 35).


@pytest.mark.parametrize("form", ["json", "stream"])
async def test_an_orphan_is_found_by_the_retry_that_comes_for_it(
    start: Start, departures: Departures, form: str
) -> None:
    """There is no cache: what was bought for the client that left is what its retry gets."""
    gate = Gate()
    async with start(NO_CACHE) as running:
        running.sandbox.rules.add(Rule(wait_for=gate, payload_bytes=400))
        client = await connect(running.port)
        whole = request(form, "left")
        await send(client, whole)
        async with asyncio.timeout(30):
            await gate.arrived()
        before = departures.seen["reset"]
        leave(client, "reset")
        await departures.more_than("reset", before)
        gate.set()
        told = await running.told.until(1)
        assert (told[0][0].outcome, told[0][1].gone) == (Outcome.DELIVERED, "upstream")
        retry = b"\r\nx-stainless-retry-count: 1\r\nconnection: close\r\n"
        again = await connect(running.port)
        await send(again, whole.replace(b"\r\n", retry, 1))
        said = await read(again)
        assert said.startswith(b"HTTP/1.1 200")
        assert b"x-cache: join" in said
        assert b"AAAA" in said
        again.close()
        [record] = running.sandbox.journal.billed
        books = books_of(running)
        [hold] = books.holds.values()
        assert (hold.state, hold.cost) == ("P", bill(record))
        assert gone(await running.metrics(), "upstream") == 1
        rid = told[0][0].rid
        async with running.http() as http:
            kept = await http.get(f"/images/results/{rid}")
        assert kept.status_code == 200
        assert "AAAA" in kept.text
        assert len(running.sandbox.journal) == 1


async def test_a_client_that_reads_a_byte_at_a_time_is_dropped_and_finds_it_kept(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.api.door, "STALL_SECONDS", 0.5)
    async with start(NO_CACHE) as running:
        running.sandbox.rules.add(Rule(payload_bytes=20_000_000))
        client = await connect(running.port, receive_buffer=4096)
        await send(client, request("json", "slow"))

        async def dawdle() -> None:
            with suppress(OSError):
                while await asyncio.get_running_loop().sock_recv(client, 1):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

        reading = asyncio.create_task(dawdle())
        [(receipt, delivery)] = await running.told.until(1)
        reading.cancel()
        client.close()
        assert (receipt.outcome, delivery.gone) == (Outcome.DELIVERED, "stalled")
        assert gone(await running.metrics(), "stalled") == 1
        async with running.http() as http:
            kept = await http.get(f"/images/results/{receipt.rid}")
        assert (kept.status_code, kept.headers["x-request-id"]) == (200, receipt.rid)
        assert len(kept.content) > 20_000_000
        [record] = running.sandbox.journal.billed
        assert books_of(running).spent == bill(record)


# Connections (40, 43).


async def test_a_full_pool_is_no_fault_of_the_call(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls that failed elsewhere meet at an upstream with one connection."""
    monkeypatch.setattr(assembly, "Timeouts", partial(Timeouts, pool=0.3))
    go, arrived = asyncio.Event(), asyncio.Event()

    async def slow(peer: Peer) -> None:
        await peer.request()
        arrived.set()
        await go.wait()
        await peer.send(cuts.json_head(len(cuts.answer())) + cuts.answer())

    async with raw_server(slow) as narrow:
        origin = f"http://127.0.0.1:{narrow.port}/v1"
        azure = upstream(origin, max_connections=1, max_in_flight=2)
        changes = {
            "upstreams": {"azure": azure},
            "models": {"art": {"upstreams": ["openai", "azure"], "model": MODEL}},
        }
        async with start(changes) as running:
            running.sandbox.rules.add(Rule(status=500))
            first = asyncio.create_task(ask(running))
            async with asyncio.timeout(30):
                await arrived.wait()
            second = await ask(running)
            assert (second.status, second.error["code"]) == (503, "overloaded")
            assert second.headers["retry-after"] == "5"
            assert second.headers.get("x-should-retry") != "false"
            # What will be counted can be scraped before it is.
            spent = {
                name: dollars
                for name, dollars in (await running.metrics()).items()
                if name.startswith("gateway_spend_usd_total{")
            }
            assert list(spent.values()) == [0]
            go.set()
            assert (await first).status == 200
            metrics = await running.metrics()
            assert metrics['gateway_upstream_errors_total{class="pool",upstream="azure"}'] == 1
            where = 'endpoint="generation",fault="gateway",reason="pool"'
            assert metrics[f"gateway_requests_rejected_total{{{where}}}"] == 1
            waits = "gateway_upstream_pool_wait_seconds"
            assert metrics[f'{waits}_count{{upstream="azure"}}'] == 2
            assert metrics[f'{waits}_sum{{upstream="azure"}}'] >= 0.3
            states = sorted(hold.state for hold in books_of(running).holds.values())
            assert states == ["P", "V"]


def lasting(*, then: str) -> cuts.Script:
    """Answers one request on a connection that it says it keeps."""
    head = cuts.json_head(len(cuts.answer())).replace(cuts.CLOSE, b"")

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(head + cuts.answer())
        if peer.number == 1:
            if then == "closes as we send":
                await peer.request()
            return
        await peer.gone()

    return script


async def test_a_connection_that_ends_as_it_is_used_again_may_have_cost_a_picture(
    start: Start,
) -> None:
    async with (
        raw_server(lasting(then="closes as we send")) as server,
        start(cuts.at(server) | NO_CACHE) as running,
    ):
        assert (await buy(running)).status_code == 200
        lost = await buy(running)
        assert (lost.status_code, lost.json()["error"]["code"]) == (502, "upstream_outcome_unknown")
        assert lost.headers["x-should-retry"] == "false"
        assert server.accepted == 1
        states = {hold.state: hold for hold in books_of(running).holds.values()}
        assert states.keys() == {"P", "X"}
        assert states["X"].cost == states["X"].bound
        metrics = await running.metrics()
        assert metrics['gateway_upstream_errors_total{class="disconnect",upstream="openai"}'] == 1
        where = 'endpoint="generation",fault="upstream",reason="disconnect"'
        assert metrics[f"gateway_requests_rejected_total{{{where}}}"] == 1


async def test_a_connection_that_ended_between_two_calls_is_not_used(start: Start) -> None:
    async with (
        raw_server(lasting(then="closes")) as server,
        start(cuts.at(server) | NO_CACHE) as running,
    ):
        assert (await buy(running)).status_code == 200
        assert (await buy(running)).status_code == 200
        assert server.accepted == 2
        assert books_of(running).spent == 2 * cuts.COST


# Bills that cannot be (48).

NUMBERS = st.sampled_from([0, 1, -1, 196, 7024, 10**18, -(10**18), 1e18, 0.5, 2**63, True])
VALUES = NUMBERS | st.none() | st.text(max_size=5) | st.integers()
TOKENS = st.fixed_dictionaries(
    {},
    optional={
        name: VALUES | st.dictionaries(st.sampled_from(["text_tokens", "image_tokens"]), VALUES)
        for name in (
            *("input_tokens", "output_tokens", "total_tokens"),
            *("input_tokens_details", "output_tokens_details"),
        )
    },
)


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(usage=TOKENS | VALUES | st.lists(VALUES, max_size=3), count=st.integers(1, 3))
async def test_whatever_the_bill_says_the_picture_passes_and_money_is_sane(
    gateway: GatewayUnderTest, usage: Any, count: int
) -> None:
    gateway.sandbox.rules.clear()
    gateway.sandbox.rules.add(Rule(usage=usage, data_count=count, payload_bytes=400))
    async with gateway.http(headers=FRESH) as http:
        answer = await http.post("/images/generations", json={**ASKED, "n": 2})
    assert answer.status_code == 200
    assert len(answer.json()["data"]) == count
    receipt = (await gateway.told.until(1))[-1][0]
    assert receipt.rid == answer.headers["x-request-id"]
    cost = round(float(answer.headers["x-cost-usd"]) * NANOS_PER_DOLLAR)
    assert cost == receipt.cost > 0
    assert cost <= receipt.bound or "over_bound" in receipt.flags
    if receipt.basis == "estimated":
        assert cost == receipt.bound
        assert {"no_usage", "invalid_usage"} & set(receipt.flags)
    books_of(gateway)


async def test_a_bill_that_cannot_be_is_counted(gateway: GatewayUnderTest) -> None:
    absurd: Json = {"input_tokens": 3, "output_tokens": 10**18}
    gateway.sandbox.rules.add(Rule(usage=absurd, payload_bytes=400))
    answer = await buy(gateway)
    assert (answer.status_code, answer.headers["x-cost-basis"]) == (200, "estimated")
    [(receipt, _)] = await gateway.told.until(1)
    assert (receipt.cost, receipt.flags) == (receipt.bound, ("invalid_usage",))
    metrics = await gateway.metrics()
    assert metrics[f'gateway_usage_invalid_total{{model="{MODEL}"}}'] == 1


# Keys that rest (53, 54).


async def test_a_limit_without_a_time_rests_a_second_and_twice_as_long_each_time(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    clock = Hurried()
    sandbox.rules.add(Rule(status=429))
    waits = []
    async with run_gateway(tmp_path, sandbox, NO_CACHE, clock) as running:
        for number in range(1, 9):
            passed = await buy(running)
            assert (passed.status_code, passed.headers.get("retry-after")) == (429, None)
            refused = await buy(running)
            assert (refused.status_code, len(sandbox.journal)) == (503, number)
            assert refused.json()["error"]["code"] == "upstream_unavailable"
            wait = int(refused.headers["retry-after-ms"]) / 1000
            assert refused.headers.get("x-should-retry") != "false"
            waits.append(wait)
            clock.ahead += wait
        sandbox.rules.clear()
        sandbox.rules.add(SMALL)
        clock.ahead += 60
        assert (await buy(running)).status_code == 200
        metrics = await running.metrics()
        assert metrics['gateway_upstream_cooldowns_total{upstream="openai"}'] == 8
    for wait, most in zip(waits, (1, 2, 4, 8, 16, 32, 60, 60), strict=True):
        assert most / 2 - 1 < wait <= most, waits
    assert {hold.state for hold in books_of(running).holds.values()} == {"V", "P"}


async def test_another_key_is_asked_while_a_limited_one_rests(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    clock = Hurried()
    keys = {"upstreams": {"openai": {"api_keys": ["sk-one", "sk-two"]}}} | NO_CACHE
    limited = Rule(key="sk-one", status=429, headers={"retry-after": "30"}, times=1)
    sandbox.rules.add(limited)
    sandbox.rules.add(SMALL)

    def asked() -> list[str | None]:
        return [record.header("authorization") for record in sandbox.journal]

    async with run_gateway(tmp_path, sandbox, keys, clock) as running:
        for _ in range(3):
            assert (await buy(running)).status_code == 200
        assert asked() == [f"Bearer sk-{key}" for key in ("one", "two", "two", "two")]
        clock.ahead += 31
        assert (await buy(running)).status_code == 200
        assert (await buy(running)).status_code == 200
        assert "Bearer sk-one" in asked()[4:]


# Headers (61).

TOKEN = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_!#$%&'*+.^`|~", min_size=1, max_size=12)
OWNERS = (
    "Set-Cookie", "openai-organization", "openai-project", "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-tokens", "Server", "CF-Ray", "Keep-Alive", "Proxy-Authenticate",
    "Trailer", "Upgrade", "Via", "Alt-Svc", "Strict-Transport-Security", "x-cost-usd", "x-cache",
    "x-budget-remaining-usd", "Location", "x-request-id", "openai-processing-ms", "openai-version",
)  # fmt: skip
LINES = st.lists(
    st.tuples(
        st.sampled_from(OWNERS) | TOKEN,
        st.binary(max_size=30).map(lambda value: value.replace(b"\0", b"")),
    ),
    max_size=8,
)
FRAMING = {"content-length", "transfer-encoding", "connection", "content-type", "content-encoding"}
PASSED = {"openai-processing-ms", "openai-version", "x-upstream-request-id"}
ADVICE = {"retry-after", "retry-after-ms", "x-should-retry"}


@dataclass
class Odd:
    """An upstream that says what it is told beside its answers. ``plain`` are the headers of an
    answer where it says nothing."""

    gateway: GatewayUnderTest
    sent: list[tuple[str, bytes]] = field(default_factory=list)
    status: str = "200 OK"
    plain: set[str] = field(default_factory=set)


@pytest.fixture
async def odd(start: Start) -> AsyncIterator[Odd]:
    found: Odd | None = None

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            assert found is not None
            good = found.status == "200 OK"
            body = cuts.answer() if good else json.dumps(error("x", "bad")).encode()
            lines = b"".join(b"%b: %b\r\n" % (name.encode(), value) for name, value in found.sent)
            head = f"HTTP/1.1 {found.status}\r\ncontent-length: {len(body)}\r\n".encode()
            await peer.send(head + b"content-type: application/json\r\n" + lines + b"\r\n" + body)

    async with raw_server(script) as server, start(cuts.at(server) | NO_CACHE) as running:
        found = Odd(running)
        found.plain = set((await buy(running)).headers)
        yield found
    books_of(running)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(lines=LINES, good=st.booleans())
@example(lines=[("Set-Cookie", b"a=b\r\nx-evil: 1"), ("openai-version", b"1\r\n2")], good=True)
@example(lines=[("openai-version", b"2020\rx-evil: 1"), ("x-request-id", b"\xff")], good=True)
@example(lines=[("x-should-retry", b"true\nx-evil: 1"), ("Set-Cookie", b"a")], good=False)
async def test_of_an_upstreams_headers_only_a_few_pass(
    odd: Odd, lines: list[tuple[str, bytes]], good: bool
) -> None:
    """What was sent may have ended the head early, or be no HTTP at all: a clean error."""
    odd.sent = [one for one in lines if one[0].lower() not in FRAMING]
    odd.status = "200 OK" if good else "400 Bad Request"
    answer = await buy(odd.gateway)
    assert answer.status_code in (200, 400, 502), answer.text
    assert set(answer.headers) <= odd.plain | PASSED | ADVICE, answer.headers
    for value in answer.headers.values():
        assert value.isascii()
        assert value.isprintable()
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["x-cache"] == "off"


# The process (77, 78, 80).


async def test_a_blocked_loop_is_measured_told_of_and_not_alive(
    gateway: GatewayUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    """The gateway runs in this loop, which does nothing for two seconds."""
    probes: list[bool] = []

    def probe() -> None:
        try:
            with urlopen(f"{gateway.origin}/healthz", timeout=0.5) as answer:
                probes.append(answer.status == 200)
        except (URLError, TimeoutError):
            probes.append(False)

    async def alive() -> None:
        await asyncio.to_thread(probe)

    await alive()
    with caplog.at_level(logging.WARNING, "gateway.watchdog"):
        prober = threading.Thread(target=probe)
        prober.start()
        time.sleep(2)  # noqa: ASYNC251
        prober.join()
        await soon(
            lambda: any("goes on" in one.message for one in caplog.records), "the loop goes on"
        )
    await alive()
    assert probes == [True, False, True]
    [blocked] = [one for one in caplog.records if one.message == "the event loop is blocked"]
    assert any("test_a_blocked_loop" in place for place in blocked.__dict__["stack"])
    metrics = await gateway.metrics()
    late = metrics['gateway_loop_lag_seconds_bucket{le="+Inf"}']
    assert late - metrics['gateway_loop_lag_seconds_bucket{le="1.0"}'] == 1
    gateway.sandbox.rules.add(SMALL)
    assert (await buy(gateway)).status_code == 200


async def test_workers_an_hour_apart_leave_each_others_calls_alone(
    tmp_path: Path, sandbox: SandboxServer, postgres: Postgres
) -> None:
    """Leases are the database's: a clock that is an hour ahead ends nobody's call."""
    changes = {
        "storage": {
            "database": postgres.fresh_database(),
            "pepper": "pepper-0123456789abcdef-0123456789",
        },
        "ledger": {"sweep_seconds": 0.1},
        "cache": {"enabled": False},
    }
    gate = Gate()
    sandbox.rules.add(Rule(wait_for=gate, payload_bytes=400))
    homes = [tmp_path / name for name in ("late", "early")]
    for home in homes:
        home.mkdir()
    now = TestClock().now()
    clocks = TestClock(now), TestClock(now)
    clocks[0].advance(hours=-1)
    clocks[1].advance(hours=1)
    async with (
        run_gateway(homes[0], sandbox, changes, clocks[0]) as late,
        run_gateway(homes[1], sandbox, changes, clocks[1]) as early,
    ):
        calls = [asyncio.create_task(buy(one, "apart")) for one in (late, early)]
        async with asyncio.timeout(30):
            await gate.arrived(2)
        skews = []
        for one in (late, early):
            assert await one.gateway.ledger.sweep(one.clock.now()) == []
            skews.append((await one.metrics())["gateway_clock_skew_seconds"])
        assert 7190 < skews[1] - skews[0] < 7210
        gate.set()
        for call in calls:
            assert (await call).status_code == 200
        assert await late.gateway.ledger.open_holds() == 0
        rows = await late.usage()
        assert sum(row.requests for row in rows) == 2
        assert sum(row.unresolved for row in rows) == 0
        assert sum(row.cost for row in rows) == sum(map(bill, sandbox.journal.billed))


async def test_a_picture_that_does_not_fit_is_booked_and_told_of(start: Start) -> None:
    changes = {"server": {"buffer_bytes": 1000, "spool_bytes": "2MiB"}}
    async with start(changes) as running:
        running.sandbox.rules.add(Rule(prompt="large", payload_bytes=4_000_000))
        running.sandbox.rules.add(SMALL)
        lost = await buy(running, "large")
        assert (lost.status_code, lost.json()["error"]["code"]) == (503, "overloaded")
        assert lost.headers["x-should-retry"] == "false"
        assert "retry-after" not in lost.headers
        [(receipt, _)] = await running.told.until(1)
        assert receipt.rid in lost.json()["error"]["message"]
        [hold] = books_of(running).holds.values()
        assert (hold.state, hold.cost) == ("X", hold.bound)
        assert (await buy(running, "small")).status_code == 200
        metrics = await running.metrics()
        for where in ("memory", "disk"):
            assert metrics[f'gateway_inflight_bytes{{where="{where}"}}'] == 0


async def test_nothing_is_bought_while_the_answers_that_wait_fill_the_disk(start: Start) -> None:
    """A client that does not read keeps more than half of the room: the rest is for what is under
    way already."""
    changes = {"server": {"buffer_bytes": 1000, "spool_bytes": "32MiB"}} | NO_CACHE
    gate = Gate()
    async with start(changes) as running:
        running.sandbox.rules.add(Rule(prompt="large", payload_bytes=20_000_000))
        running.sandbox.rules.add(Rule(prompt="under way", payload_bytes=4_000_000, wait_for=gate))
        running.sandbox.rules.add(SMALL)
        under_way = asyncio.create_task(buy(running, "under way"))
        await gate.arrived()
        client = await connect(running.port, receive_buffer=4096)
        await send(client, request("json", "large"))
        await read(client, 100)
        refused = await buy(running, "small")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"] == "5"
        assert refused.headers["x-cost-usd"] == "0"
        assert len(running.sandbox.journal) == 1 + 1
        gate.set()
        assert (await under_way).status_code == 200
        leave(client, "reset")
        await running.told.until(3)
        metrics = await running.metrics()
        assert metrics['gateway_inflight_bytes{where="disk"}'] == 0
        assert (await buy(running, "small")).status_code == 200
