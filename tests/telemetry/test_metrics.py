"""Every metric of the table moves, none says too much, and none grows without bound."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.multiprocess import mark_process_dead
from prometheus_client.parser import text_string_to_metric_families

from gateway.domain.call import Passage, Usage
from gateway.domain.errors import Fault
from gateway.domain.ledger import Balance, Basis, Line, Outcome
from gateway.domain.quota import Limit, Period, Scope, Unit, Window
from gateway.domain.receipt import CacheResult, Delivery, Receipt, Timings
from gateway.supervisor import METRICS_FOLDER
from gateway.telemetry import metrics as module
from gateway.telemetry.metrics import TABLE, Kind, Metrics, label_of

GATEWAY = Path(__file__).parents[2] / "gateway"
DOLLAR = 10**9

BOUGHT = Receipt(
    rid="req_1",
    operation="generation",
    status=200,
    team="growth",
    key_id="k1",
    model="team-art",
    model_label="team-art",
    model_served="flare",
    upstream="openai",
    upstream_rid="req_up",
    upstream_status=200,
    quality="low",
    bytes_in=300,
    cache=CacheResult.MISS,
    outcome=Outcome.DELIVERED,
    basis=Basis.USAGE,
    cost=2 * DOLLAR,
    bound=3 * DOLLAR,
    images_asked=2,
    images=2,
    attempts=1,
    usage=Usage(10, 20, 3, 4, 5, 60),
    timings=Timings(0.5, 0.002, 1.0, 2.0, 4.0, 0.003),
)
SENT = Delivery(200, 1000, 5.0)
HIT = replace(
    BOUGHT,
    cache=CacheResult.HIT,
    outcome=Outcome.REPLAYED,
    basis=Basis.NONE,
    cost=0,
    bound=0,
    avoided=2 * DOLLAR,
    usage=Usage(),
    timings=Timings(0.5),
)
FAILED = replace(BOUGHT, images=0, cost=0, basis=Basis.NONE, usage=Usage(), timings=Timings())
UPSTREAM_429 = replace(
    FAILED,
    status=429,
    outcome=Outcome.REFUSED,
    upstream_status=0,
    reason="upstream_429",
    fault=Fault.NOBODY,
    code="rate_limit_exceeded",
)
UNKNOWN = replace(
    FAILED, status=504, outcome=Outcome.UNKNOWN, reason="upstream_edge",
    fault=Fault.UPSTREAM, basis=Basis.ESTIMATED, cost=3 * DOLLAR,
)  # fmt: skip
QUOTA = replace(
    FAILED,
    status=429,
    outcome=None,
    reason="insufficient_quota",
    fault=Fault.TEAM,
    code="insufficient_quota",
)
RATE = replace(
    FAILED,
    status=429,
    outcome=None,
    reason="images_per_minute",
    fault=Fault.TEAM,
    code="rate_limit_exceeded",
)
DOOR = Receipt("req_1", "edit", 401, reason="auth_failed", fault=Fault.TEAM, code="invalid_api_key")
DOUBTS = replace(
    BOUGHT,
    basis=Basis.ESTIMATED,
    flags=("soft", "no_usage", "invalid_usage", "unpriced", "over_bound"),
    cost=4 * DOLLAR,
    posted=False,
)
END = datetime(2026, 11, 23, tzinfo=UTC)
DAY = Period(Window.DAY, "d|2026-11-22", END)


def told(*receipts: Receipt, delivery: Delivery = SENT) -> Metrics:
    metrics = Metrics("1.2.3")
    for receipt in receipts:
        metrics.finished(receipt, delivery)
    return metrics


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample as ``name{label="value"}`` -> value; of a histogram, its sum and count."""
    found = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                continue
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def moved(metrics: Metrics) -> dict[str, float]:
    still = samples(Metrics("1.2.3"))
    return {name: value for name, value in samples(metrics).items() if still.get(name) != value}


def budget(metrics: Metrics, team: str = "growth") -> None:
    limit = Limit(Scope.TEAM, team, Unit.MONEY, Window.DAY, 5 * DOLLAR, 4 * DOLLAR)
    metrics.budgets([(Line(limit, DAY), Balance(2 * DOLLAR, DOLLAR // 2))])


# The table


def test_names_follow_one_convention() -> None:
    names = [spec.name for spec in TABLE]
    assert len(names) == len(set(names))
    for spec in TABLE:
        assert re.fullmatch("gateway_[a-z_]+", spec.name)
        assert spec.name.endswith("_total") == (spec.kind is Kind.COUNTER), spec.name
        assert spec.help.endswith(".")
        if spec.kind is Kind.HISTOGRAM:
            assert spec.name.endswith(("_seconds", "_ratio"))
            assert list(spec.buckets) == sorted(set(spec.buckets))
            assert "team" not in spec.labels


def test_labels_come_from_closed_sets() -> None:
    allowed = {"team", "model", "endpoint", "upstream", "status", "cache", "reason", "limit"}
    allowed |= {"direction", "modality", "scope", "owner", "window", "where", "result", "stage"}
    allowed |= {
        "operation",
        "name",
        "version",
        "mark",
        "outcome",
        "class",
        "key",
        "why",
        "fault",
        "to",
        "kind",
        "folder",
        "quality",
        "change",
    }
    assert {label for spec in TABLE for label in spec.labels} <= allowed


# These are set where the whole gateway is put together, not by a receipt.
COMPOSED = {
    "gateway_cross_team_denied_total",
    "gateway_upstream_errors_total",
    "gateway_upstream_key_disabled",
    "gateway_upstream_circuit_state",
    "gateway_upstream_cooldowns_total",
    "gateway_upstream_retries_total",
    "gateway_fallbacks_total",
    "gateway_spans_dropped_total",
    "gateway_clock_skew_seconds",
    "gateway_budget_notices_total",
    "gateway_webhook_total",
    "gateway_bound_ratio",
    "gateway_bound_factor",
    "gateway_inflight_requests",
    "gateway_inflight_bytes",
    "gateway_cache_errors_total",
    "gateway_cache_bytes",
    "gateway_results_total",
    "gateway_results_bytes",
    "gateway_results_errors_total",
    "gateway_result_news_total",
    "gateway_result_news_waiting",
    "gateway_gate_degraded",
    "gateway_gate_seconds",
    "gateway_gate_errors_total",
    "gateway_gate_restarts_total",
    "gateway_flight_board_errors_total",
    "gateway_ledger_open_holds",
    "gateway_ledger_unresolved_usd",
    "gateway_ledger_oldest_hold_seconds",
    "gateway_settlements_waiting",
    "gateway_config_reload_failed",
    "gateway_config_reloads_total",
    "gateway_inflight_upstream_requests",
    "gateway_queued_requests",
    "gateway_queue_seconds",
    "gateway_upstream_pool_wait_seconds",
    "gateway_fds",
    "gateway_connections_refused_total",
    "gateway_loop_lag_seconds",
    "gateway_upstream_requests_total",
    "gateway_upstream_first_byte_seconds",
    "gateway_upstream_bytes_total",
    "gateway_ledger_seconds",
    "gateway_prices_compiled_timestamp_seconds",
    "gateway_model_shutdown_timestamp_seconds",
    "gateway_disk_free_bytes",
    "gateway_workers",
    "gateway_memory_bytes",
    "gateway_cpu_seconds_total",
    "gateway_hosted_total",
    "gateway_hosted_bytes",
    "gateway_hosted_sent_bytes_total",
    "gateway_hosted_errors_total",
}


COMPOSERS = ("app.py", "assembly.py", "assembly_stores.py", "doors.py", "swap.py", "vitals.py")


def test_no_metric_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TEAMS", 1)
    metrics = told(BOUGHT, HIT, UPSTREAM_429, UNKNOWN, QUOTA, RATE, DOOR, DOUBTS, JOINED)
    metrics.finished(RETRIED, SENT)
    metrics.finished(TAKEN_OVER, SENT)
    metrics.finished(REPAIRED, SENT)
    metrics.finished(replace(BOUGHT, team="design"), replace(SENT, gone="response"))
    budget(metrics)
    metrics.dependencies({"ledger": True})
    found = {re.sub(r"(_sum|_count)?(\{.*)?$", "", name) for name in moved(metrics)}
    dead = {spec.name for spec in TABLE} - found - {"gateway_build_info"} - COMPOSED
    assert dead == set()
    source = "".join((GATEWAY / name).read_text() for name in COMPOSERS)
    assert {name for name in COMPOSED if f'"{name}"' not in source} == set()
    assert samples(metrics)['gateway_build_info{version="1.2.3"}'] == 1


JOINED = replace(
    BOUGHT,
    cache=CacheResult.JOIN,
    outcome=Outcome.REPLAYED,
    joined="req_0",
    retried=True,
    cost=0,
    avoided=2 * DOLLAR,
    upstream="",
    basis=Basis.NONE,
    usage=Usage(),
    timings=Timings(reading=0.5),
    attempts=0,
)
RETRIED = replace(BOUGHT, attempts=1, retried=True)
TAKEN_OVER = replace(RETRIED, took_over="req_0")

# What each kind of request moves


ART = 'endpoint="generation",model="team-art"'
TEAM_ART = f'{ART},team="growth"'


def test_a_picture_that_was_bought() -> None:
    assert moved(told(BOUGHT)) == {
        f'gateway_requests_total{{cache="miss",{ART},status="2xx",team="growth"}}': 1,
        'gateway_request_bytes_total{endpoint="generation"}': 300,
        'gateway_response_bytes_total{endpoint="generation"}': 1000,
        'gateway_cache_total{result="miss"}': 1,
        f"gateway_request_duration_seconds_count{{{ART}}}": 1,
        f"gateway_request_duration_seconds_sum{{{ART}}}": 5.0,
        f"gateway_team_request_seconds_total{{{TEAM_ART}}}": 5.0,
        'gateway_overhead_seconds_count{endpoint="generation"}': 1,
        'gateway_overhead_seconds_sum{endpoint="generation"}': 0.5,
        f'gateway_images_total{{cache="miss",{TEAM_ART}}}': 2,
        'gateway_image_qualities_total{model="team-art",quality="low"}': 2,
        "gateway_reserve_seconds_count": 1,
        "gateway_reserve_seconds_sum": 0.002,
        "gateway_settle_seconds_count": 1,
        "gateway_settle_seconds_sum": 0.003,
        f'gateway_upstream_duration_seconds_count{{{ART},upstream="openai"}}': 1,
        f'gateway_upstream_duration_seconds_sum{{{ART},upstream="openai"}}': 4.0,
        f"gateway_first_image_seconds_count{{{ART}}}": 1,
        f"gateway_first_image_seconds_sum{{{ART}}}": 2.0,
        f"gateway_spend_usd_total{{{TEAM_ART}}}": 2.0,
        **{
            f'gateway_tokens_total{{direction="{direction}",modality="{modality}",'
            'model="team-art",team="growth"}': count
            for direction, modality, count in (
                ("in", "text", 7),
                ("in", "image", 16),
                ("in", "cached_text", 3),
                ("in", "cached_image", 4),
                ("out", "text", 5),
                ("out", "image", 60),
            )
        },
    }


def test_a_picture_from_the_cache() -> None:
    assert moved(told(HIT)) == {
        f'gateway_requests_total{{cache="hit",{ART},status="2xx",team="growth"}}': 1,
        'gateway_request_bytes_total{endpoint="generation"}': 300,
        'gateway_response_bytes_total{endpoint="generation"}': 1000,
        'gateway_cache_total{result="hit"}': 1,
        f"gateway_request_duration_seconds_count{{{ART}}}": 1,
        f"gateway_request_duration_seconds_sum{{{ART}}}": 5.0,
        f"gateway_team_request_seconds_total{{{TEAM_ART}}}": 5.0,
        'gateway_overhead_seconds_count{endpoint="generation"}': 1,
        'gateway_overhead_seconds_sum{endpoint="generation"}': 4.5,
        f'gateway_images_total{{cache="hit",{TEAM_ART}}}': 2,
        f"gateway_spend_avoided_usd_total{{{TEAM_ART}}}": 2.0,
    }


@pytest.mark.parametrize("cache", [CacheResult.HIT, CacheResult.MISS])
def test_an_estimate_is_no_look_and_no_picture(cache: CacheResult) -> None:
    asked = Receipt(
        *("req_1", "estimate", 200, "growth"), model_label="team-art", cache=cache, bound=DOLLAR
    )
    where = 'endpoint="estimate",model="team-art"'
    assert moved(told(asked)) == {
        f'gateway_requests_total{{cache="off",{where},status="2xx",team="growth"}}': 1,
        'gateway_request_bytes_total{endpoint="estimate"}': 0,
        'gateway_response_bytes_total{endpoint="estimate"}': 1000,
        f"gateway_request_duration_seconds_count{{{where}}}": 1,
        f"gateway_request_duration_seconds_sum{{{where}}}": 5.0,
        f'gateway_team_request_seconds_total{{{where},team="growth"}}': 5.0,
        'gateway_overhead_seconds_count{endpoint="estimate"}': 1,
        'gateway_overhead_seconds_sum{endpoint="estimate"}': 5.0,
    }


def test_a_stranger_at_the_door_has_no_labels_of_its_own() -> None:
    assert moved(told(DOOR, delivery=Delivery(401, 150, 0.001))) == {
        'gateway_requests_total{cache="off",endpoint="edit",model="none",status="4xx",team="none"}'
        "": 1,
        'gateway_request_bytes_total{endpoint="edit"}': 0,
        'gateway_response_bytes_total{endpoint="edit"}': 150,
        'gateway_requests_rejected_total{endpoint="edit",fault="team",reason="auth_failed"}': 1,
    }


@pytest.mark.parametrize("receipt", [QUOTA, RATE])
def test_a_refusal_by_the_teams_own_limits(receipt: Receipt) -> None:
    found = moved(told(receipt))
    assert found[f'gateway_quota_rejections_total{{limit="{receipt.reason}",team="growth"}}'] == 1
    where = f'endpoint="generation",fault="team",reason="{receipt.reason}"'
    assert found[f"gateway_requests_rejected_total{{{where}}}"] == 1
    assert not any("upstream" in name or "spend" in name for name in found)


@pytest.mark.parametrize("receipt", [UPSTREAM_429, replace(UPSTREAM_429, upstream_status=429)])
def test_an_upstream_that_is_busy_is_not_the_teams_limit(receipt: Receipt) -> None:
    found = moved(told(receipt))
    where = 'endpoint="generation",fault="nobody",reason="upstream_429"'
    assert found[f"gateway_requests_rejected_total{{{where}}}"] == 1
    assert not any("quota_rejections" in name for name in found)


@pytest.mark.parametrize(
    ("said", "label"),
    [("high", "high"), ("auto", "auto"), ("", "none"), ("ultra-7f3a", "other")],
)
def test_a_quality_is_one_of_a_list(said: str, label: str) -> None:
    found = moved(told(replace(BOUGHT, quality=said)))
    assert {name: count for name, count in found.items() if "quality" in name} == {
        f'gateway_image_qualities_total{{model="team-art",quality="{label}"}}': 2
    }


def test_an_upstream_that_rests_was_not_asked() -> None:
    """And was not quick."""
    resting = replace(FAILED, status=503, outcome=Outcome.REFUSED, reason="upstream_resting")
    name = "gateway_upstream_duration_seconds"
    assert any(one.startswith(name) for one in moved(told(resting)))
    assert not any(one.startswith(name) for one in moved(told(replace(resting, attempts=0))))


def test_an_unknown_outcome_is_an_estimated_expense() -> None:
    found = moved(told(UNKNOWN))
    assert found[f"gateway_spend_usd_total{{{TEAM_ART}}}"] == 3.0
    assert found['gateway_spend_estimated_usd_total{model="team-art"}'] == 3.0
    where = 'endpoint="generation",fault="upstream",reason="upstream_edge"'
    assert found[f"gateway_requests_rejected_total{{{where}}}"] == 1
    assert not any("images" in name for name in found)


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("no_usage", "gateway_usage_missing_total"),
        ("invalid_usage", "gateway_usage_invalid_total"),
        ("unpriced", "gateway_unpriced_requests_total"),
        ("over_bound", "gateway_ledger_underestimate_total"),
        ("soft", "gateway_bound_soft_total"),
        ("estimated", None),
    ],
)
def test_doubts_are_counted_by_model(flag: str, name: str | None) -> None:
    new = moved(told(replace(BOUGHT, flags=(flag,), cost=4 * DOLLAR))).items()
    old = moved(told(replace(BOUGHT, cost=4 * DOLLAR))).items()
    wanted = {f'{name}{{model="team-art"}}': 1.0} if name else {}
    if flag == "over_bound":
        wanted['gateway_ledger_underestimate_nanousd_total{model="team-art"}'] = float(DOLLAR)
    assert dict(new - old) == wanted


def test_what_is_not_on_the_books_yet() -> None:
    assert moved(told(replace(BOUGHT, posted=False)))["gateway_ledger_unposted_total"] == 1


@pytest.mark.parametrize(
    ("outcome", "orphans"),
    [(Outcome.DELIVERED, 1), (Outcome.UNKNOWN, None), (None, None)],
)
def test_a_client_that_left(outcome: Outcome | None, orphans: int | None) -> None:
    found = moved(told(replace(BOUGHT, outcome=outcome), delivery=replace(SENT, gone="upstream")))
    assert found['gateway_client_gone_total{stage="upstream"}'] == 1
    assert found.get("gateway_orphaned_results_total") == orphans


REPAIRED = replace(HIT, changed=("model", "style"))


def test_what_was_changed_is_counted() -> None:
    before, after = moved(told(HIT)), moved(told(REPAIRED))
    assert after == before | {
        'gateway_requests_changed_total{change="model"}': 1.0,
        'gateway_requests_changed_total{change="style"}': 1.0,
    }


def test_a_picture_of_another_requests_flight() -> None:
    """It is no purchase, and the time that it took is not the gateway's own."""
    assert moved(told(JOINED)) == {
        f'gateway_requests_total{{cache="join",{ART},status="2xx",team="growth"}}': 1,
        'gateway_request_bytes_total{endpoint="generation"}': 300,
        'gateway_response_bytes_total{endpoint="generation"}': 1000,
        'gateway_cache_total{result="join"}': 1,
        f"gateway_request_duration_seconds_count{{{ART}}}": 1,
        f"gateway_request_duration_seconds_sum{{{ART}}}": 5.0,
        f"gateway_team_request_seconds_total{{{TEAM_ART}}}": 5.0,
        f'gateway_images_total{{cache="join",{TEAM_ART}}}': 2,
        f"gateway_spend_avoided_usd_total{{{TEAM_ART}}}": 2.0,
        'gateway_flight_joins_total{endpoint="generation"}': 1,
    }


@pytest.mark.parametrize(
    ("receipt", "counted"),
    [
        (replace(BOUGHT, attempts=1), None),
        (RETRIED, "gateway_flight_unjoined_retries_total"),
        (replace(BOUGHT, attempts=0, retried=True), None),
        (TAKEN_OVER, "gateway_flight_takeovers_total"),
        (replace(JOINED, status=502), "gateway_flight_joins_total"),
    ],
    ids=["first", "unjoined", "refused", "takeover", "join that failed"],
)
def test_what_becomes_of_those_who_come_back(receipt: Receipt, counted: str | None) -> None:
    found = {name.split("{")[0] for name in moved(told(receipt)) if name.startswith("gateway_fli")}
    assert found == ({counted} if counted else set())


def test_the_reference_names_every_stage_at_which_a_client_can_leave() -> None:
    source = "".join(
        (GATEWAY / name).read_text()
        for name in (
            "api/door.py",
            "api/relayed.py",
            "relay/pipeline.py",
            "relay/purchase.py",
            "relay/flights.py",
        )
    )
    stages = set(re.findall(r'(?:left_at|ClientGone)\("(\w+)"', source))
    reference = next(spec.help for spec in TABLE if spec.name == "gateway_client_gone_total")
    assert stages
    assert {stage for stage in stages if not re.search(rf"\b{stage}\b", reference)} == set()


def test_time_never_runs_backwards() -> None:
    # The body may have arrived while the upstream was already at work.
    slow = replace(BOUGHT, timings=Timings(reading=3.0, upstream=4.0, reserving=-1e-9))
    found = moved(told(slow))
    assert found['gateway_overhead_seconds_sum{endpoint="generation"}'] == 0
    assert found["gateway_reserve_seconds_count"] == 1


# Gauges


def test_budgets() -> None:
    metrics = Metrics("1.2.3")
    budget(metrics)
    where = 'owner="growth",scope="team",window="day"'
    assert moved(metrics) == {
        f"gateway_budget_limit_usd{{{where}}}": 5.0,
        f"gateway_budget_soft_limit_usd{{{where}}}": 4.0,
        f"gateway_budget_spent_usd{{{where}}}": 2.0,
        f"gateway_budget_reserved_usd{{{where}}}": 0.5,
        f"gateway_budget_reset_timestamp_seconds{{{where}}}": END.timestamp(),
    }


def test_a_limit_that_was_taken_away_is_gone() -> None:
    metrics = Metrics("1.2.3")
    budget(metrics)
    total = Limit(Scope.TEAM, "growth", Unit.MONEY, Window.TOTAL, None)
    metrics.budgets([(Line(total, Period(Window.TOTAL, "t|all", None)), Balance(DOLLAR, 0))])
    where = 'owner="growth",scope="team",window="total"'
    assert moved(metrics) == {f"gateway_budget_spent_usd{{{where}}}": 1.0}


def test_dependencies() -> None:
    metrics = Metrics("1.2.3")
    metrics.dependencies({"ledger": True, "redis": False})
    assert moved(metrics) == {
        'gateway_dependency_up{name="ledger"}': 1,
        'gateway_dependency_up{name="redis"}': 0,
    }


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("add", "gateway_gate_degraded"),
        ("set", "gateway_orphaned_results_total"),
        ("observe", "gateway_orphaned_results_total"),
        ("add", "gateway_settle_seconds"),
    ],
)
def test_a_metric_is_moved_as_what_it_is(method: str, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        getattr(Metrics("1.2.3"), method)(name, 1)


def test_a_series_is_the_same_whatever_the_order_of_its_labels() -> None:
    metrics, name = Metrics("1.2.3"), "gateway_upstream_bytes_total"
    for _ in range(2):
        metrics.add(name, 1, upstream="openai", direction="sent")
        metrics.add(name, 10, direction="sent", upstream="openai")
    metrics.add(name, 100, upstream="sent", direction="openai")
    assert moved(metrics) == {
        f'{name}{{direction="sent",upstream="openai"}}': 22,
        f'{name}{{direction="openai",upstream="sent"}}': 100,
    }


@pytest.mark.parametrize("labels", [{}, {"upstream": "a"}, {"upstream": "a", "key": "b"}])
def test_a_series_has_the_labels_of_the_table(labels: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"has the labels \('upstream', 'direction'\)"):
        Metrics("1.2.3").add("gateway_upstream_bytes_total", 1, **labels)


def test_a_counter_never_falls() -> None:
    with pytest.raises(ValueError, match="gateway_orphaned_results never falls"):
        Metrics("1.2.3").add("gateway_orphaned_results_total", -1)


@given(st.lists(st.sampled_from(module.SMALL_SECONDS) | st.floats(0, 10), max_size=20))
def test_a_value_falls_into_the_bucket_that_prometheus_client_finds(seconds: list[float]) -> None:
    name, metrics, registry = "gateway_settle_seconds", Metrics("1.2.3"), CollectorRegistry()
    (spec,) = (spec for spec in TABLE if spec.name == name)
    theirs = Histogram(name, spec.help, registry=registry, buckets=spec.buckets)
    for value in seconds:
        metrics.observe(name, value)
        theirs.observe(value)
    said = generate_latest(registry).decode().splitlines()
    assert [line for line in metrics.exposition().decode().splitlines() if name in line] == said


def test_two_gateways_in_one_process_do_not_meet() -> None:
    first, second = told(BOUGHT), Metrics("1.2.3")
    assert moved(first)
    assert not moved(second)


# Several workers

WORKER = """
import os, sys
from gateway.machine import memory_bytes
from gateway.telemetry.metrics import Metrics

number = int(sys.argv[1])
metrics = Metrics("1.2.3")
metrics.watch("gateway_inflight_requests", lambda: number)
metrics.watch("gateway_workers", lambda: 1)
metrics.watch("gateway_gate_degraded", lambda: number == 3)
metrics.set("gateway_config_reload_failed", number == 3)
metrics.watch("gateway_memory_bytes", memory_bytes)
metrics.follow("gateway_cpu_seconds_total", lambda: 10.0 * number)
metrics.set("gateway_ledger_open_holds", number)
metrics.add("gateway_orphaned_results_total", number)
metrics.observe("gateway_settle_seconds", 0.002)
sys.stdout.buffer.write(metrics.exposition())
print("pid", os.getpid())
"""


def test_each_worker_tells_what_all_of_them_have(tmp_path: Path) -> None:
    """In processes of their own: prometheus_client decides when it is imported."""

    def told_by(number: int) -> dict[str, float]:
        ended = subprocess.run(
            [sys.executable, "-c", WORKER, str(number)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, METRICS_FOLDER: str(tmp_path)},
            cwd=GATEWAY.parent,
        )
        lines = [line for line in ended.stdout.splitlines() if not line.startswith("#")]
        found = {name: float(value) for name, _, value in (one.rpartition(" ") for one in lines)}
        assert len(found) == len(lines), "each sample once"
        return found

    def said(found: dict[str, float]) -> tuple[float, ...]:
        return (
            found["gateway_inflight_requests"],
            found["gateway_ledger_open_holds"],
            found["gateway_orphaned_results_total"],
            found["gateway_settle_seconds_count"],
            found["gateway_workers"],
            found["gateway_cpu_seconds_total"],
            found['gateway_build_info{version="1.2.3"}'],
            found["gateway_gate_degraded"],
            found["gateway_config_reload_failed"],
        )

    first = told_by(3)
    # Another one begins: its file is there, and has no room yet.
    (tmp_path / "counter_999999999.db").touch()
    second = told_by(5)
    assert said(first) == (3, 3, 3, 1, 1, 30, 1, 1, 1)
    assert said(second) == (8, 5, 8, 2, 2, 80, 1, 1, 1)
    assert second["gateway_memory_bytes"] > first["gateway_memory_bytes"] > 1_000_000
    # The supervisor says that the first is dead: what it had is gone, what it did is not.
    mark_process_dead(int(first["pid"]), str(tmp_path))  # type: ignore[no-untyped-call]
    third = told_by(2)
    assert said(third) == (7, 2, 10, 3, 2, 100, 1, 0, 0)
    gone, new = first["gateway_memory_bytes"], third["gateway_memory_bytes"]
    assert new < second["gateway_memory_bytes"] + gone


FORGETFUL = """
import sys
from gateway.domain.ledger import Balance, Line
from gateway.domain.quota import Limit, Period, Scope, Unit, Window
from gateway.telemetry.metrics import Metrics

metrics = Metrics("1.2.3")
day = Period(Window.DAY, "d|2026-11-22", None)
for team, amount in (("growth", 7), ("gone", 7), ("growth", None)):
    limit = Limit(Scope.TEAM, team, Unit.MONEY, Window.DAY, amount)
    metrics.budgets([(Line(limit, day), Balance())])
sys.stdout.buffer.write(metrics.exposition())
"""


def test_a_worker_forgets_a_limit_that_was_taken_away(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FORGETFUL],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, METRICS_FOLDER: str(tmp_path)},
        cwd=GATEWAY.parent,
    )
    assert ended.stderr == ""
    found = {line for line in ended.stdout.splitlines() if line.startswith("gateway_budget_")}
    where = 'owner="growth",scope="team",window="day"'
    assert found == {f"gateway_budget_spent_usd{{{where}}} 0.0"}
    kept = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"gateway_inflight_requests" in kept
    assert b"gateway_budget_" not in kept


def test_a_gauge_of_several_workers_forgets_the_dead() -> None:
    for spec in TABLE:
        if spec.kind is Kind.GAUGE:
            assert spec.mode in ("livesum", "livemax", "livemostrecent", "scraped"), spec.name


# Bounds


def test_teams_beyond_the_cap_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TEAMS", 2)
    metrics = told(*(replace(BOUGHT, team=team) for team in ("a", "b", "c", "d", "a", "c")))
    found = samples(metrics)
    assert {
        team: found[f'gateway_spend_usd_total{{{ART},team="{team}"}}']
        for team in ("a", "b", "other")
    } == {"a": 4.0, "b": 2.0, "other": 6.0}
    assert found["gateway_metrics_label_overflow_total"] == 3
    assert not any('team="c"' in name for name in found)


def test_budgets_take_no_place_from_the_teams_that_are_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_TEAMS", 2)
    metrics = Metrics("1.2.3")
    limits = [Limit(Scope.TEAM, one, Unit.MONEY, Window.DAY, DOLLAR) for one in ("a", "b", "c")]
    for _ in range(2):
        metrics.budgets((Line(limit, DAY), Balance()) for limit in limits)
    metrics.finished(replace(BOUGHT, team="c"), SENT)
    metrics.finished(replace(BOUGHT, team="d"), SENT)
    found = samples(metrics)
    assert [name for name in found if "budget_limit" in name] == [
        f'gateway_budget_limit_usd{{owner="{one}",scope="team",window="day"}}' for one in ("a", "b")
    ]
    assert found[f'gateway_spend_usd_total{{{ART},team="c"}}'] == 2.0
    assert found[f'gateway_spend_usd_total{{{ART},team="d"}}'] == 2.0
    assert found["gateway_metrics_label_overflow_total"] == 0


def test_what_a_call_will_count_is_there_before_it_counts() -> None:
    """So that the first picture of a team is not lost to ``increase()``."""
    metrics = Metrics("1.2.3")
    metrics.begun(replace(BOUGHT, status=0, outcome=None, cost=0, images=0))
    before = moved(metrics)
    assert set(before.values()) == {0}
    metrics.finished(BOUGHT, SENT)
    assert {
        name.partition("{")[0] for name in moved(metrics) if "team=" in name and name not in before
    } == {"gateway_tokens_total"}


def test_what_a_call_will_count_takes_no_place_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TEAMS", 1)
    metrics = told(BOUGHT)
    before = samples(metrics)
    metrics.begun(replace(BOUGHT, team="growth-2"))
    assert samples(metrics) == before


text = st.text(min_size=1, max_size=12)
LABELS = ["", "flare", "team-art", "other"]
REASONS = ["", "auth_failed", "insufficient_quota", "images_per_minute", "upstream_429"]
STAGES = ["", "upload", "response"]
receipts = st.builds(
    Receipt,
    rid=text,
    operation=st.sampled_from(["generation", "edit"]),
    status=st.sampled_from([200, 400, 429, 500, 504]),
    team=text | st.just(""),
    key_id=text,
    model=text,
    model_label=st.sampled_from(LABELS),
    model_served=text,
    upstream=st.sampled_from(["openai", "comet"]),
    upstream_rid=text,
    upstream_status=st.integers(0, 999),
    stream=st.booleans(),
    cache=st.sampled_from(CacheResult),
    outcome=st.none() | st.sampled_from(Outcome),
    basis=st.sampled_from(Basis),
    cost=st.integers(5, 9),
    bound=st.integers(0, 5),
    avoided=st.integers(0, 9),
    images=st.integers(0, 10),
    usage=st.builds(Usage, st.integers(5, 9), st.integers(5, 9), st.integers(0, 5)),
    flags=st.lists(st.sampled_from(["soft", "no_usage", "over_bound"]), unique=True).map(tuple),
    reason=st.sampled_from(REASONS),
    fault=st.none() | st.sampled_from(Fault),
    code=st.sampled_from(["", "insufficient_quota", "rate_limit_exceeded"]) | text,
    price_id=text,
    prompt=text,
)
deliveries = st.builds(
    Delivery,
    st.sampled_from([0, 200, 500]),
    st.integers(0, 9),
    st.floats(0, 9),
    st.sampled_from(STAGES),
)
DOMAINS = {
    "team": 3 + 2,
    "owner": 3 + 2,
    "model": len(LABELS),
    "endpoint": 2,
    "upstream": 2,
    "status": 3,
    "cache": len(CacheResult),
    "result": len(CacheResult),
    "reason": len(REASONS),
    "fault": len(Fault),
    "limit": len(REASONS),
    "direction": 2,
    "modality": 4,
    "stage": len(STAGES),
}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(receipts, deliveries), max_size=25))
def test_whatever_is_asked_the_series_are_bounded(
    requests: list[tuple[Receipt, Delivery]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_TEAMS", 3)
        metrics = Metrics("1.2.3")
        for receipt, delivery in requests:
            metrics.finished(receipt, delivery)
            budget(metrics, receipt.team)
    for spec in TABLE:
        series = {
            tuple(sorted(sample.labels.items()))
            for family in metrics.registry.collect()
            for sample in family.samples
            if sample.name.startswith(spec.name) and not sample.name.endswith("_bucket")
        }
        most = math.prod(DOMAINS.get(label, 1) for label in spec.labels)
        assert len(series) <= most, spec.name


MODELS = [*LABELS[1:3], "flare-2", "other"]
UPSTREAMS = ["openai", "comet"]
KINDS = [BOUGHT, HIT, JOINED, UPSTREAM_429, UNKNOWN, QUOTA, RATE, DOUBTS, DOOR]


def exposed(metrics: Metrics) -> list[str]:
    """Every series that Prometheus would keep, buckets too."""
    lines = metrics.exposition().decode().splitlines()
    return [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.builds(
            replace,
            st.sampled_from(KINDS),
            operation=st.sampled_from(["generation", "edit"]),
            quality=text,
            upstream=st.sampled_from(UPSTREAMS),
            reason=st.sampled_from(REASONS),
            rid=text,
        ),
        max_size=60,
    ),
    st.lists(st.sampled_from(STAGES), min_size=1),
)
def test_a_team_with_one_model_is_forty_series(requests: list[Receipt], stages: list[str]) -> None:
    metrics = Metrics("1.2.3")
    for place, receipt in enumerate(requests):
        known = replace(receipt, team="growth", model_label="flare" if receipt.model_label else "")
        if receipt.outcome is not None and receipt.cache in (CacheResult.MISS, CacheResult.OFF):
            metrics.begun(known)
        metrics.finished(known, replace(SENT, gone=stages[place % len(stages)]))
    windows = (Window.DAY, Window.WEEK, Window.MONTH, Window.TOTAL)
    limits = [Limit(Scope.TEAM, "growth", Unit.MONEY, one, None) for one in windows]
    limits[2] = replace(limits[2], amount=DOLLAR)
    metrics.budgets((Line(limit, DAY), Balance()) for limit in limits)
    assert sum('"growth"' in one for one in exposed(metrics)) <= 40


def test_all_that_can_happen_is_two_thousand_series() -> None:
    """Four models at two upstreams with two keys each, and each label with each of its values."""
    metrics = Metrics("1.2.3")
    configured = {
        "model": MODELS,
        "to": MODELS,
        "upstream": UPSTREAMS,
        "key": ["1", "2"],
        "mark": ["budget:80", "budget:100", "soft_budget:80", "soft_budget:100"],
        "version": ["1.2.3"],
        "reason": [f"reason_{number}" for number in range(60)],
    }
    for spec in TABLE:
        if {"team", "owner"} & set(spec.labels):
            continue
        domains: list[list[str]] = []
        for name in spec.labels:
            found = list(label_of(spec, name).values) or configured[name]
            # What an estimate asks never goes upstream; what is passed on has no model, and is
            # neither joined nor refused for most reasons.
            bought = "upstream" in spec.labels or spec.name == "gateway_first_image_seconds"
            priced = bought or {"model", "reason"} & set(spec.labels) or "joins" in spec.name
            without = {"estimate"} if bought else set()
            without |= set(Passage) if priced else set()
            domains.append([one for one in found if one not in without])
            if name == "fault":
                domains[-1] = [Fault.UPSTREAM]  # A reason is one's fault.
        for values in itertools.product(*domains):
            labels = dict(zip(spec.labels, values, strict=True))
            if spec.kind is Kind.COUNTER:
                metrics.add(spec.name, 1, **labels)
            elif spec.kind is Kind.GAUGE:
                metrics.set(spec.name, 1, **labels)
            else:
                metrics.observe(spec.name, 1, **labels)
    for passage in Passage:
        metrics.observe("gateway_request_duration_seconds", 1, model="none", endpoint=passage)
        for reason in configured["reason"][:15]:
            metrics.add(
                "gateway_requests_rejected_total",
                endpoint=passage,
                reason=reason,
                fault=Fault.UPSTREAM,
            )
    assert 1500 < len(exposed(metrics)) <= 2200


@pytest.mark.parametrize(
    "name",
    [
        *("rid", "key_id", "model", "model_served", "upstream_rid", "code"),
        *("price_id", "prompt", "size", "quality", "output_format"),
    ],
)
def test_nothing_that_a_client_chose_becomes_a_label(name: str) -> None:
    members: dict[str, Any] = {name: "marker-7f3a"}
    for receipt in (BOUGHT, HIT, UPSTREAM_429, UNKNOWN, QUOTA, RATE, DOOR, DOUBTS):
        assert b"marker-7f3a" not in told(replace(receipt, **members)).exposition()
