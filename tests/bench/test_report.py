"""Medians, ratios, goals and tables: arithmetic on numbers that were made up."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.bench.cases import CASES, chosen
from tests.bench.goals import GOALS, KEPT, Goal, added_p50_ms
from tests.bench.page import PAGE, README, RESULTS, page, with_table
from tests.bench.report import (
    case_table,
    failures,
    figure,
    goals_table,
    short_table,
    spread,
    text,
)
from tests.bench.results import (
    CaseResult,
    Measured,
    Run,
    Summary,
    from_json,
    read,
    summary,
    to_json,
    together,
)
from tests.bench.variants import STARTS, TITLES, row, title


def measured(**metrics: float) -> Measured:
    return Measured([metrics])


def run(**cases: Mapping[str, Measured]) -> Run:
    made = {name: CaseResult(name, f"about {name}", said) for name, said in cases.items()}
    return Run({"CPU": "one"}, 1, made)


def goal(text: str) -> Goal:
    [found] = [one for one in GOALS if one.text.startswith(text) and KEPT not in one.text]
    return found


def test_a_summary_is_the_median_and_how_far_it_varies() -> None:
    assert summary([5.0, 1.0, 9.0]) == Summary(5, 1, 9)
    assert summary([4.0, 1.0]) == Summary(2.5, 1, 4)
    rounds = Measured([{"cpu_us": 3.0}, {"cpu_us": 1.0, "p50_ms": 7.0}, {"cpu_us": 2.0}])
    assert rounds.summary("cpu_us") == Summary(2, 1, 3)
    assert rounds.summary("p50_ms") == Summary(7, 7, 7)
    assert rounds.summary("first_ms") is None


def test_what_failed_has_no_numbers() -> None:
    failed = Measured([{"cpu_us": 1.0}], "books: one is missing")
    assert failed.summary("cpu_us") is None
    one = run(s_c32={"gateway": failed, "litellm": measured(cpu_us=100)})
    assert one.median("s_c32", "gateway", "cpu_us") is None
    assert one.ratio("cpu_us", ("s_c32", "litellm"), ("s_c32", "gateway")) is None
    assert failures(one) == ["s_c32: gateway: books: one is missing"]
    table = case_table(one.cases["s_c32"])
    assert "**FAILED**: gateway: books: one is missing" in table
    assert "| LiteLLM | 100 |" in table
    assert "| gateway |" not in table


def test_repeats_of_a_case_are_its_rounds() -> None:
    one = CaseResult("S", "small", {"a": Measured([{"cpu_us": 1.0}]), "b": Measured()})
    two = CaseResult("S", "small", {"a": Measured([{"cpu_us": 3.0}]), "b": Measured((), "wrong")})
    found = together([one, two])
    assert [sample["cpu_us"] for sample in found.targets["a"].samples] == [1.0, 3.0]
    assert found.targets["b"].failure == "wrong"


def test_a_ratio_is_of_two_medians() -> None:
    one = run(
        m_c8={"gateway": Measured([{"cpu_us": 30.0}, {"cpu_us": 10.0}, {"cpu_us": 20.0}])},
        s_c32={"litellm": measured(cpu_us=50.0), "direct": measured(cpu_us=0.0)},
    )
    assert one.ratio("cpu_us", ("s_c32", "litellm"), ("m_c8", "gateway")) == 2.5
    assert one.ratio("cpu_us", ("m_c8", "gateway"), ("s_c32", "direct")) is None
    assert one.ratio("cpu_us", ("m_c8", "gateway"), ("m_c8", "portkey")) is None
    assert one.ratio("cpu_us", ("none", "gateway"), ("m_c8", "gateway")) is None


@pytest.mark.parametrize(
    ("theirs", "reached"),
    [(5_900, "missed"), (6_000, "goal"), (14_900, "goal"), (15_000, "stretch")],
)
def test_of_some_goals_more_is_better(theirs: float, reached: str) -> None:
    one = run(s_c32={"gateway-policy": measured(cpu_us=100), "litellm": measured(cpu_us=theirs)})
    assert goal("CPU of an S request at c32, LiteLLM").reached(one) == reached


@pytest.mark.parametrize(
    ("ours", "reached"), [(161, "missed"), (160, "goal"), (101, "goal"), (100, "stretch")]
)
def test_of_others_less_is(ours: float, reached: str) -> None:
    one = run(m_c8={"gateway-policy": measured(cpu_us=ours), "nginx-64k": measured(cpu_us=100)})
    assert goal("CPU of an M request at c8, ours").reached(one) == reached


def test_a_goal_that_was_not_measured_says_so() -> None:
    empty = run()
    assert {one.reached(empty) for one in GOALS} == {"not measured"}
    instead = sum(one.instead for one in GOALS)
    assert goals_table(empty).count("not measured") == len(GOALS) - instead


def test_the_added_latency_is_that_above_the_mock_alone() -> None:
    s = {
        "direct": measured(p50_ms=0.5),
        "gateway": measured(p50_ms=2.5),
        "gateway-policy": measured(p50_ms=2.5),
        "litellm": measured(p50_ms=60.5),
        "nginx": measured(p50_ms=0.4),
    }
    one = run(s_c32=s)
    assert added_p50_ms(one, "gateway") == 2
    assert added_p50_ms(one, "nginx") == 0.001
    assert added_p50_ms(one, "portkey") is None
    assert goal("added p50").measure(one) == 30


def test_the_longest_wait_is_told_in_delays_of_the_upstream() -> None:
    one = run(inflight_9000={"gateway": measured(max_ms=22_000.0)})
    assert goal("9,000 in flight on one").measure(one) == pytest.approx(1.1)
    assert goal("9,000 in flight on one").reached(one) == "goal"


def test_what_several_workers_reach_is_not_said_of_one() -> None:
    two = run(inflight_9000={"gateway-2-workers": measured(max_ms=22_000.0)})
    assert goal("9,000 in flight on one").measure(two) is None
    assert goal("9,000 in flight on two").reached(two) == "goal"
    assert "| 9,000 in flight on two" in goals_table(two)
    assert "| gateway, 2 workers |" in case_table(
        CaseResult("inflight_9000", "9,000 in flight", two.cases["inflight_9000"].targets)
    )
    one = run(inflight_9000={"gateway": measured(max_ms=22_000.0)})
    assert goal("9,000 in flight on two").measure(one) is None
    assert "on two" not in goals_table(one)
    assert [row("gateway", 1), title("gateway-redis"), title("bogus-workers")] == [
        "gateway", TITLES["gateway-redis"], "bogus-workers"
    ]  # fmt: skip


def test_figures_have_three_digits_that_count() -> None:
    assert [figure(value) for value in (0.0123, 1.234, 45.67, 789.4, 12_345.6)] == [
        "0.012", "1.23", "45.7", "789", "12,346"
    ]  # fmt: skip
    assert spread(Summary(2, 1, 3)) == "2.00 (1.00-3.00)"
    assert spread(Summary(2, 2, 2)) == "2.00"


def test_a_table_has_a_row_for_each_target_and_says_what_was_skipped() -> None:
    targets = {"gateway": measured(cpu_us=250.0, p50_ms=1.5), "direct": measured(p50_ms=0.5)}
    case = CaseResult("s_c32", "small", targets, {"nginx": "no nginx: apt-get install it"})
    lines = case_table(case).splitlines()
    assert lines[0] == "|  | CPU us a request | p50 ms |"
    assert lines[1] == "|---|---:|---:|"
    assert lines[2] == "| gateway | 250 | 1.50 |"
    assert lines[3] == "| the mock alone |  | 0.5 |"
    assert lines[-1] == "Skipped: nginx, unbuffered: no nginx: apt-get install it"


def test_results_are_read_as_they_were_written() -> None:
    case = CaseResult(
        "m_c8", "big", {"gateway": Measured([{"cpu_us": 1.5}], None)}, {"nginx": "no"}
    )
    one = Run({"CPU": "x"}, 7, {"m_c8": case})
    again = from_json(to_json(one))
    assert again == one
    assert text(again) == text(one)


def test_the_page_and_the_readme_have_the_results_that_were_written() -> None:
    """Nobody edits numbers."""
    written = read(RESULTS)
    assert PAGE.read_text() == page(written)
    readme = README.read_text()
    assert with_table(readme, short_table(written)) == readme


def test_the_short_table_has_the_best_of_nginx_and_says_how_many_goals_are_reached() -> None:
    targets = {
        "gateway": measured(cpu_us=4_000.0, mb_per_second=400.0),
        "gateway-policy": measured(cpu_us=1_500.0, mb_per_second=600.0),
        "nginx": measured(cpu_us=3_000.0, mb_per_second=1_100.0),
        "nginx-64k": measured(cpu_us=1_000.0, mb_per_second=900.0),
    }
    one = Run({}, 7, {"m_c8": CaseResult("m_c8", "big", targets, {})})
    lines = short_table(one).splitlines()
    assert lines[0] == "|  | gateway | nothing kept on disk | nginx | LiteLLM | Portkey |"
    assert lines[2:4] == [
        "| 2.7 MB JSON, 8 at once: CPU us a request | 4,000 | 1,500 | 1,000 |  |  |",
        "| the same: MB/s through one core | 400 | 600 | 1,100 |  |  |",
    ]
    assert lines[-1] == "Of the 4 goals of that page 1 are reached."


def test_a_readme_without_a_place_for_the_table_is_told_of() -> None:
    with pytest.raises(ValueError, match="no place"):
        with_table("# Nothing", "| |")


def test_every_target_of_a_case_can_be_started_and_has_a_title() -> None:
    named = {name for case in CASES for name in case.targets}
    assert named <= set(STARTS)
    assert set(STARTS) == set(TITLES)


def test_cases_are_chosen_by_name() -> None:
    assert [case.name for case in chosen("m_c8,s_c1", quick=True)] == ["m_c8", "s_c1"]
    assert chosen("", quick=False) == list(CASES)
    assert {case.name for case in chosen("", quick=True)} == {
        "s_c32", "m_c8", "upload_20mb_c4", "hit_memory_c8", "inflight_2000"
    }  # fmt: skip
    with pytest.raises(ValueError, match="no case 's_c3'"):
        chosen("s_c3", quick=False)
