"""What an operator sees: metrics, the log, health; and what nobody may see there."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError

from gateway.domain.team import Limits, Team
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from gateway.telemetry.log import configure
from tests.running import ALIAS, KEY, MODEL, OTHER_KEY, GatewayUnderTest, Start

ASKED: dict[str, Any] = {
    "model": MODEL,
    "prompt": "A lighthouse",
    "quality": "low",
    "size": "1024x1024",
}
SECRETS = (KEY, OTHER_KEY, "sk-upstream-secret")
BUCKETS = "0.1 0.25 0.5 1 2 5 10 15 20 30 45 60 90 120 180 300 600"


@pytest.fixture(autouse=True)
def quick(sandbox: SandboxServer) -> None:
    """Pictures that need no drawing."""
    sandbox.rules.add(Rule(prompt="A lighthouse", payload_bytes=4000))


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the process writes as its log, all of it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    written = io.StringIO()
    configure("debug", "json", written)
    yield written
    root.handlers[:] = handlers
    root.setLevel(level)


def lines_of(log: io.StringIO) -> list[dict[str, Any]]:
    """The lines of requests; every line is JSON."""
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    return [line for line in lines if line["logger"] == "gateway.request"]


async def fails(gateway: GatewayUnderTest, key: str = KEY, **changes: Any) -> APIStatusError:
    async with gateway.sdk(key) as sdk:
        with pytest.raises(APIStatusError) as raised:
            await sdk.images.generate(**{**ASKED, **changes})
    return raised.value


# Metrics.


async def test_the_metrics_of_known_traffic(start: Start, sandbox: SandboxServer) -> None:
    sandbox.rules.add(Rule(prompt="A stormy sea", times=1, status=504))
    teams = {"growth": {"budget": {"month": 50}}, "design": {"limits": {"images_per_minute": 1}}}
    async with start({"teams": teams}) as gateway:
        async with gateway.sdk() as sdk:
            await sdk.images.generate(**ASKED)
            await sdk.images.generate(**ASKED)
            await sdk.images.generate(**{**ASKED, "model": ALIAS, "quality": "medium"}, n=2)
            stream = await sdk.images.generate(**ASKED, n=1, stream=True, partial_images=1)
            assert len([event async for event in stream]) == 2
        await fails(gateway, prompt="A stormy sea")
        await fails(gateway, OTHER_KEY, n=2)
        await fails(gateway, "nobody-0123456789abcdef")
        await gateway.told.until(7)
        seen = await gateway.metrics()

    def sample(metric: str, **labels: str) -> float:
        inside = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
        return seen[f"gateway_{metric}{{{inside}}}" if inside else f"gateway_{metric}"]

    growth = {"team": "growth", "endpoint": "generation"}
    flare = {**growth, "model": MODEL}
    assert sample("requests_total", **flare, status="2xx", cache="miss") == 2
    assert sample("requests_total", **flare, status="2xx", cache="hit") == 1
    assert sample("requests_total", **flare, status="5xx", cache="miss") == 1
    assert sample("requests_total", **{**growth, "model": ALIAS}, status="2xx", cache="miss") == 1
    nobody = {"team": "none", "model": "none", "endpoint": "generation", "cache": "off"}
    assert sample("requests_total", **nobody, status="4xx") == 1
    assert sample("images_total", **flare, cache="miss") == 2
    assert sample("images_total", **flare, cache="hit") == 1
    assert sample("images_total", **{**growth, "model": ALIAS}, cache="miss") == 2
    # Two pictures of 196 tokens, one of them with a partial one of 100; and 3 tokens of text each.
    tokens = {"team": "growth", "model": MODEL}
    assert sample("tokens_total", **tokens, direction="out", modality="image") == 492
    assert sample("tokens_total", **tokens, direction="in", modality="text") == 6
    spent = 0.005895 + 0.008895 + 0.0061
    assert sample("spend_usd_total", **flare) == pytest.approx(spent)
    assert sample("spend_usd_total", **{**growth, "model": ALIAS}) == pytest.approx(0.026355)
    assert sample("spend_avoided_usd_total", **flare) == pytest.approx(0.005895)
    assert sample("spend_estimated_usd_total", model=MODEL) == pytest.approx(0.0061)
    assert sample("ledger_unresolved_usd") == pytest.approx(0.0061)
    assert sample("upstream_errors_total", **{"upstream": "openai", "class": "edge"}) == 1
    rejected = {"endpoint": "generation"}
    for reason, fault in (
        ("never_fits", "client"),
        ("auth_failed", "team"),
        ("upstream_edge", "upstream"),
    ):
        assert sample("requests_rejected_total", **rejected, reason=reason, fault=fault) == 1
    assert sample("cache_total", result="hit") == 1
    month = {"scope": "team", "owner": "growth", "window": "month"}
    assert sample("budget_limit_usd", **month) == 50
    assert sample("budget_spent_usd", **month) == pytest.approx(spent + 0.026355)
    assert sample("budget_reserved_usd", **month) == 0
    assert sample("budget_reset_timestamp_seconds", **month) == 1796083200
    where = {"model": MODEL, "endpoint": "generation"}
    assert sample("request_duration_seconds_count", **where) == 3
    assert sample("upstream_duration_seconds_count", **where, upstream="openai") == 3
    assert sample("first_image_seconds_count", **where) == 1
    assert sample("dependency_up", name="ledger") == 1
    assert sample("build_info", version="0.1.0") == 1
    assert sample("ledger_open_holds") == 0
    buckets = [
        found[1]
        for name in seen
        if name.startswith("gateway_request_duration_seconds_bucket") and MODEL in name
        if (found := re.search(r'le="([^"]+)"', name))
    ]
    assert [float(one) for one in buckets[:-1]] == [float(one) for one in BUCKETS.split()]
    assert not [name for name in seen if "_created" in name]


async def test_the_labels_are_bounded(start: Start) -> None:
    """No key, no prompt, no request and no name that a client made up is ever a label."""
    async with start() as gateway:
        async with gateway.sdk() as sdk:
            for model in ("gpt-image-2.5-sunburst", "gpt-image-1-mini"):
                await sdk.images.generate(**{**ASKED, "model": model}, user="end-user-1")
        for number in range(5):
            error = await fails(gateway, model=f"made-up-{number}", user="end-user-1")
            assert error.code == "model_not_priced"
        await gateway.told.until(7)
        seen = await gateway.metrics()
        ids = [receipt.rid for receipt, _ in gateway.told.requests]
        ids += [gateway.told.last.key_id, "end-user", "made-up", "lighthouse", "mini", *SECRETS]
        names = "\n".join(seen)
        assert not [one for one in ids if one in names]
        where = 'endpoint="generation",model="other"'
        assert seen[f'gateway_spend_usd_total{{{where},team="growth"}}'] > 0
        assert seen[f"gateway_request_duration_seconds_count{{{where}}}"] == 2


async def test_the_budget_of_a_team_that_may_not_spend_is_not_shown(start: Start) -> None:
    art = Team("art", limits=Limits(budget_day=10**9))

    def of_art(metrics: Mapping[str, float]) -> set[str]:
        return {name.partition("{")[0] for name in metrics if 'owner="art"' in name}

    async with start() as gateway:
        await gateway.gateway.directory.create_team(art)
        assert "gateway_budget_limit_usd" in of_art(await gateway.metrics())
        await gateway.gateway.directory.update_team(replace(art, disabled=True))
        assert of_art(await gateway.metrics()) == set()


async def test_what_is_under_way_is_seen(start: Start, sandbox: SandboxServer) -> None:
    gate = Gate()
    sandbox.rules.clear()
    sandbox.rules.add(Rule(payload_bytes=400, wait_for=gate))
    async with start({"teams": {"growth": {"budget": {"day": 1}}}}) as gateway:
        async with gateway.sdk() as sdk:
            running = asyncio.create_task(sdk.images.generate(**ASKED))
            await gate.arrived()
            seen = await gateway.metrics()
            gate.set()
            await running
        assert seen["gateway_inflight_requests"] == 1
        assert seen["gateway_ledger_open_holds"] == 1
        assert seen['gateway_inflight_bytes{where="memory"}'] > 0
        day = '{owner="growth",scope="team",window="day"}'
        assert seen[f"gateway_budget_reserved_usd{day}"] == 0.0061
        await gateway.told.until(1)
        seen = await gateway.metrics()
        assert seen["gateway_inflight_requests"] == 0
        assert seen['gateway_inflight_bytes{where="memory"}'] == 0
        assert seen['gateway_cache_bytes{where="memory"}'] > 0
        assert (
            seen['gateway_cache_bytes{where="disk"}'] > seen['gateway_cache_bytes{where="memory"}']
        )


async def test_the_metrics_are_prometheus_text(gateway: GatewayUnderTest) -> None:
    async with httpx.AsyncClient(base_url=gateway.origin, verify=False) as http:
        answer = await http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "# TYPE gateway_requests_total counter" in answer.text
    assert "# TYPE gateway_request_duration_seconds histogram" in answer.text


async def test_the_metrics_can_have_a_port_of_their_own(start: Start) -> None:
    async with (
        start({"server": {"metrics_port": 9100}}) as gateway,
        httpx.AsyncClient(base_url=gateway.origin, verify=False) as http,
    ):
        assert (await http.get("/metrics")).status_code == 404
        assert (await http.get("/healthz")).status_code == 200


# The log.


@pytest.mark.parametrize(
    ("trusted", "told", "address"),
    [
        ([], "203.0.113.9", "127.0.0.1"),
        (["127.0.0.1"], "203.0.113.9", "203.0.113.9"),
        # What stands left of a proxy that is not ours, the client wrote itself.
        (["127.0.0.1", "10.0.0.0/8"], "198.51.100.1, 203.0.113.9, 10.1.2.3", "203.0.113.9"),
        (["127.0.0.1"], "203.0.113.9, 10.1.2.3", "10.1.2.3"),
        (["127.0.0.1"], "", "127.0.0.1"),
    ],
)
async def test_where_a_client_is_says_a_trusted_proxy(
    start: Start, log: io.StringIO, trusted: list[str], told: str, address: str
) -> None:
    async with start({"server": {"trusted_proxies": trusted}}) as gateway:
        async with gateway.http(headers={"x-forwarded-for": told}) as http:
            await http.post("/images/generations", json={**ASKED, "model": "none/such"})
        await gateway.told.until(1)
    [line] = lines_of(log)
    assert line["client_address"] == address


async def test_one_line_a_request(start: Start, log: io.StringIO) -> None:
    async with start() as gateway:
        async with gateway.sdk() as sdk:
            await sdk.images.generate(**{**ASKED, "model": ALIAS})
            await sdk.images.generate(**{**ASKED, "model": ALIAS})
        await gateway.told.until(2)
        bought, kept = lines_of(log)
        [record] = gateway.sandbox.journal
        first, second = (receipt for receipt, _ in gateway.told.requests)
    assert bought["request_id"] == first.rid
    assert kept["request_id"] == second.rid
    for line in (bought, kept):
        assert re.fullmatch(r"[0-9a-z]{10}", line["key_id"])
        assert (line["event"], line["level"], line["team"]) == ("request", "info", "growth")
        assert (line["endpoint"], line["model"], line["status"]) == ("generation", ALIAS, 200)
        assert line["model_served"] == MODEL
        assert line["upstream"] == "openai"
        assert line["bytes_in"] > 70
        assert line["bytes_out"] > 4000
        assert line["seconds"] > 0
        assert (line["images"], line["stream"]) == (1, False)
        assert "timestamp" in line
    assert (bought["cache"], kept["cache"]) == ("miss", "hit")
    assert (bought["cost_usd"], kept["cost_usd"]) == ("0.005895", "0")
    assert (bought["cost_basis"], kept["cost_basis"]) == ("usage", "none")
    assert (bought["bound_usd"], kept["avoided_usd"]) == ("0.0061", "0.005895")
    assert (bought["outcome"], kept["outcome"]) == ("delivered", "replayed")
    assert bought["upstream_request_id"] == record.request_id
    assert bought["price"] == "openai/gpt-image-2.5-flare@2026-09-08"
    assert (bought["tokens_in"], bought["tokens_out"]) == (3, 196)
    assert bought["upstream_seconds"] > 0


async def test_a_failure_is_found_by_its_request_id(start: Start, log: io.StringIO) -> None:
    async with start({"teams": {"growth": {"budget": {"day": 0.001}}}}) as gateway:
        error = await fails(gateway)
        await gateway.told.until(1)
    [line] = lines_of(log)
    assert line["request_id"] == error.request_id
    assert (line["status"], line["code"], line["team"]) == (429, "insufficient_quota", "growth")
    assert line["cost_usd"] == "0"


async def test_prompts_are_logged_where_the_operator_asks(start: Start, log: io.StringIO) -> None:
    async with start({"relay": {"log_prompts": True}}) as gateway:
        async with gateway.sdk() as sdk:
            await sdk.images.generate(**ASKED)
        await gateway.told.until(1)
    [line] = lines_of(log)
    assert line["prompt"] == "A lighthouse"


# Health.


async def test_health(gateway: GatewayUnderTest) -> None:
    async with httpx.AsyncClient(base_url=gateway.origin, verify=False) as http:
        alive, ready = await http.get("/healthz"), await http.get("/readyz")
    assert (alive.status_code, alive.json()) == (200, {"status": "ok"})
    assert ready.status_code == 200
    assert ready.json() == {
        "status": "ready",
        "stores": {"ledger": "up", "directory": "up"},
        "degraded": {},
    }
    assert ready.headers["x-request-id"].startswith("req_")


async def test_without_its_database_no_traffic_should_come(start: Start, tmp_path: Path) -> None:
    async with start() as gateway, httpx.AsyncClient(base_url=gateway.origin, verify=False) as http:
        database = tmp_path / "data" / "gateway.db"
        away = database.rename(tmp_path / "elsewhere.db")
        ready = await http.get("/readyz")
        assert ready.status_code == 503
        assert ready.json() == {
            "status": "not ready",
            "stores": {"ledger": "down", "directory": "down"},
            "degraded": {},
        }
        assert (await http.get("/healthz")).status_code == 200
        # Nothing is bought that could not be booked.
        error = await fails(gateway)
        assert (error.status_code, error.code) == (503, "ledger_unavailable")
        assert len(gateway.sandbox.journal) == 0
        metrics = await gateway.metrics()
        assert metrics['gateway_dependency_up{name="ledger"}'] == 0
        away.rename(database)
        assert (await http.get("/readyz")).status_code == 200
        async with gateway.sdk() as sdk:
            await sdk.images.generate(**ASKED)
        [row] = await gateway.usage()
        assert (row.requests, row.cost) == (1, 5_895_000)
