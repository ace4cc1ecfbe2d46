"""The benchmark at work, as small as it gets: a few requests, the gateway alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.bench import rounds, tools
from tests.bench.cases import CASES, Case
from tests.bench.processes import cores
from tests.bench.targets import KEY, Gateway
from tests.bench.variants import STARTS

MISSING = tools.missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
PLAN = rounds.Plan(cores(), rounds=2, seconds=0.2, warm_seconds=0.1)


def case(name: str, **changes: object) -> Case:
    [found] = [one for one in CASES if one.name == name]
    return replace(found, **changes)  # type: ignore[arg-type]


def test_a_small_case_is_measured_and_its_books_are_right() -> None:
    done = rounds.run_case(case("s_c32", connections=4), ["gateway", "direct"], PLAN)
    ours, alone = done.targets["gateway"], done.targets["direct"]
    assert (ours.failure, alone.failure) == (None, None)
    assert len(ours.samples) == len(alone.samples) == 2
    sample = ours.samples[0]
    assert 50 < sample["cpu_us"] < 500_000
    assert 20 < sample["rss_idle_mb"] <= sample["rss_peak_mb"]
    assert 0 < sample["p50_ms"] <= sample["p99_ms"] <= sample["max_ms"]
    assert "cpu_us" not in alone.samples[0]


def test_hits_are_hits() -> None:
    done = rounds.run_case(case("hit_memory_c8", reply="S"), ["gateway"], PLAN)
    assert done.targets["gateway"].failure is None


def test_a_target_that_refuses_has_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer is the upstream's; of those that are measured most are 429."""
    few = {"bench": {"keys": [KEY], "limits": {"requests_per_minute": 3}}}
    monkeypatch.setitem(STARTS, "gateway", lambda site, _: Gateway(site, {"teams": few}))
    done = rounds.run_case(case("s_c1"), ["gateway"], PLAN)
    refused = done.targets["gateway"]
    assert refused.failure is not None
    assert "429" in refused.failure
    assert refused.summary("cpu_us") is None
