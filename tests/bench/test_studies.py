"""The studies' arithmetic, and the smallest run of each that shows that it works."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench import growth, growth_ledger, scale, studies, study, tools
from tests.bench.growth_keys import measure_keys
from tests.bench.growth_ledger import Measured
from tests.bench.processes import cores
from tests.bench.scale import ALONE, APART, BESIDE_LITTLE, ONE, ONE_VALKEY, PAIR, SPREAD, WORKERS
from tests.bench.scale_limits import Need, needs, needs_text, rises, rises_text
from tests.bench.study import Point, Study, Table, fit, rise_in_rounds, table_text

MISSING = tools.missing()
with_tools = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(autouse=True)
def _own_cores() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


def point(label: str, size: float, **medians: float) -> Point:
    return Point(label, size, {name: [value] for name, value in medians.items()})


def scaled(**changes: float) -> Study:
    """One replica takes 1 ms of PostgreSQL and 0.1 ms of Valkey for each request."""
    slow = {"postgres_us": 1000.0, "postgres_wal_kb": 4.0, "valkey_us": 100.0} | changes
    cpu = {ONE: 900.0, ONE_VALKEY: 1000.0, WORKERS: 1100.0, ALONE: 1200.0, PAIR: 1500.0}
    busy = [point(label, 0, cpu_us=value, connections=2) for label, value in cpu.items()]
    pictures = [point(ALONE, 0, cpu_us=2000.0), point(PAIR, 1, cpu_us=2100.0)]
    tables = {
        "busy": Table("Busy", "who", busy),
        "pictures": Table("Pictures", "who", pictures),
        "slow": Table("Slow", "who", [point(ALONE, 0, **slow)]),
    }
    return Study({}, tables, {"row_ms": 4.0, "picture_mb": 2.7, "picture_valkey_mb": 5.4})


def test_a_line_is_found_through_sizes_far_apart() -> None:
    line = fit([(size, 500 + 2000 * size) for size in (0.001, 0.1, 1, 50)])
    assert line.fixed == pytest.approx(500)
    assert line.slope == pytest.approx(2000)
    assert line.worst == pytest.approx(0, abs=1e-9)


def test_what_is_off_the_line_is_seen() -> None:
    straight = [(size, 500 + 2000 * size) for size in (0.001, 0.1, 1, 10)]
    assert fit([*straight, (50.0, 300_000.0)]).worst > 0.2
    with pytest.raises(ValueError, match="two sizes"):
        fit([(1, 5), (1, 6)])


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    said = scaled()
    study.write(said, tmp_path / "results.json")
    assert study.read(tmp_path / "results.json") == said


def test_a_point_that_failed_has_no_numbers() -> None:
    failed = Point("10", 10, {"cpu_us": [1.0]}, "statuses {429: 7}")
    table = Table("Keys", "keys", [point("1", 1, cpu_us=1234.0), failed])
    text = table_text(table)
    assert "| 1 | 1,234 |" in text
    assert "| 10 |  |" in text
    assert "**FAILED**: 10: statuses {429: 7}" in text
    assert table.get("10", "cpu_us") is None


def test_a_point_that_is_skipped_is_named_with_the_reason(tmp_path: Path) -> None:
    table = Table("In flight", "calls", [point("1", 1, cpu_us=1.0)], {"9,000": "too few files"})
    assert table_text(table).endswith("Skipped: 9,000: too few files")
    study.write(Study({}, {"in_flight": table}), tmp_path / "results.json")
    assert study.read(tmp_path / "results.json").tables["in_flight"].skipped == table.skipped


def test_what_more_processes_cost() -> None:
    found = rises(scaled())
    assert found[PAIR, APART] is None
    for pair, value in (((WORKERS, ONE_VALKEY), 0.1), ((PAIR, ALONE), 0.25)):
        rise = found[pair]
        assert rise is not None
        assert [rise.median, rise.low, rise.high] == pytest.approx([value] * 3)
    text = rises_text(scaled())
    assert "| 1.5 KB | +10 % (+10 to +10) | reached |" in text
    assert "| 1.5 KB | +25 % (+25 to +25) | missed |" in text
    assert "| 2.7 MB | +5 % (+5 to +5) | reached |" in text
    assert "| 1.5 KB | not measured | what it costs that stores are shared |" in text


def test_a_rise_is_that_of_each_round() -> None:
    """A machine that becomes twice as slow is in both of a round."""
    slower = [1000.0 * 2**number for number in range(12)]
    rises_ = [0.9, 0.5, 0.11, 0.12, 0.13, 0.14, 0.16, 0.17, 0.18, 0.19, -0.5, -0.1]
    above = [value * (1 + rise) for value, rise in zip(slower, rises_, strict=True)]
    points = [Point("1", 1, {"cpu_us": slower}), Point("2", 2, {"cpu_us": above})]
    found = rise_in_rounds(Table("", "", points), "cpu_us", "2", "1")
    assert found is not None
    assert found.median == pytest.approx(0.15)
    # Two of twelve may be left out at each end: 19 times in 20 the median is between the others.
    assert [found.low, found.high] == pytest.approx([0.11, 0.19])
    points[0] = Point("1", 1, {}, "it broke")
    assert rise_in_rounds(Table("", "", points), "cpu_us", "2", "1") is None


def test_a_rise_that_may_be_on_either_side_is_said_to_be_noise() -> None:
    busy = [
        Point(ALONE, 0, {"cpu_us": [100.0] * 3}),
        Point(PAIR, 1, {"cpu_us": [110.0, 112.0, 118.0]}),
    ]
    text = rises_text(Study({}, {"busy": Table("", "", busy)}))
    assert "| +12 % (+10 to +18) | reached, within the noise |" in text


def test_the_scarcest_comes_first() -> None:
    found = {need.what: need for need in needs(scaled())}
    cores_, row = found["PostgreSQL: cores"], found["one team's row: writers that wait, s"]
    assert cores_.share(100) == pytest.approx(100 * 50 * 1e-3 / 16)
    assert row.replicas == pytest.approx(3.0 / 4e-3)
    assert found["PostgreSQL: connections"].replicas == 50
    order = [need.replicas for need in needs(scaled())]
    assert order == sorted(order)
    text = needs_text(scaled())
    assert "At 100 replicas: Valkey: results kept for 15 min, GB" in text
    assert needs_text(Study({}, {"busy": Table("", "", []), "slow": Table("", "", [])}))


def test_a_thing_that_is_not_used_does_for_all() -> None:
    unused = Need("disk", 0.0, 5.0, "", "")
    assert (unused.share(1000), unused.replicas) == (0, float("inf"))


def test_the_page_has_every_study_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = [point("1 KB", 0.001, cpu_us=502.0), point("1 MB", 1.0, cpu_us=2500.0)]
    keys = [point("10", 10, cpu_us=500.0), point("100", 100, cpu_us=600.0)]
    grown = {
        "body": Table("Bodies", "body", sizes),
        "in_flight": Table("In flight", "in flight", keys),
        "keys": Table("Keys", "keys", [*keys, point("10 of 100", 10, cpu_us=550.0)]),
    }
    monkeypatch.setattr(studies, "HERE", tmp_path)
    study.write(Study({"date": "2026-11-23"}, grown), tmp_path / "growth.json")
    study.write(scaled(), tmp_path / "scale.json")
    ledger = Measured("sqlite", 10, questions_ms={"usage, a day": 250.0})
    growth_ledger.write({"date": "2026-11-24"}, [ledger], tmp_path / "ledger.json")
    text = studies.page()
    assert "2,000 us for each MB" in text
    assert "From 10 to 100, CPU us a request: +20 %." in text
    assert "From 10 to 10 of 100, CPU us a request: +10 %." in text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == len(set(headings))
    assert [line for line in headings if line.startswith("## ")] == [
        "## Growth, 2026-11-23", "## Rows of the ledger, 2026-11-24", "## Scale, ",
    ]  # fmt: skip
    assert "- SQLite, 10 calls: rows of usage, a day: 250 ms" in text


SMALL = growth.Sizes(
    bodies=("1 KB", "100 KB"), body_rounds=1, body_bytes=1_000_000,
    in_flight=(1, 100), rate=100, window_seconds=0.5,
)  # fmt: skip


@with_tools
def test_growth_is_measured() -> None:
    bodies = growth.measure_bodies(cores(), SMALL)
    flights = growth.measure_in_flight(cores(), SMALL)
    for found in (*bodies.points, *flights.points):
        assert found.failure is None
        assert 50 < (found.median("cpu_us") or 0) < 1_000_000
    assert flights.points[0].median("rss_kb_per_request") is None
    assert flights.points[1].median("rss_kb_per_request") is not None


@with_tools
def test_keys_of_the_directory_are_asked_by_turns() -> None:
    found = measure_keys(cores(), (10, 300, 10), 0.2, 0.5)
    assert [one.label for one in found.points] == ["10", "300", "10 of 300"]
    assert [one.failure for one in found.points] == [None, None, None]
    assert all((one.median("scrape_kb") or 0) > 1 for one in found.points)


@with_tools
def test_scale_is_measured() -> None:
    sizes = scale.Sizes(rounds=1, seconds=0.3, warm_seconds=0.3, slow_seconds=0.3)
    tables, numbers = scale.measure(
        cores(), sizes, (WORKERS, ALONE, APART, SPREAD, BESIDE_LITTLE), (ALONE, WORKERS)
    )
    busy, pictures = tables["busy"], tables["pictures"]
    assert [one.failure for one in (*busy.points, *pictures.points)] == [None] * 7
    assert (pictures.get(ALONE, "cpu_us") or 0) > (busy.get(ALONE, "cpu_us") or 0)
    assert busy.get(APART, "connections") == 2 * (busy.get(ALONE, "connections") or 0)
    assert 0.5 <= (busy.get(WORKERS, "share_of_one") or 0) <= 1
    assert 0 < (busy.get(ALONE, "postgres_commits") or 0) <= 3
    assert (busy.get(ALONE, "valkey_commands") or 0) > 1
    assert (pictures.get(ALONE, "valkey_us") or 0) < numbers["picture_valkey_us"]
    assert numbers["picture_valkey_mb"] > 2
    assert numbers["row_ms"] >= numbers["commit_ms"] > 0


def test_what_failed_once_is_not_measured_again(capsys: pytest.CaptureFixture[str]) -> None:
    work = scale.works()["busy"]
    fleet = scale.Fleet(scale.KINDS[ONE], work, 0, Path(), [], [], 0, [])
    fleets = scale.Fleets(work, (ONE, ALONE), {ONE: fleet})
    asked: list[scale.Fleet] = []

    def break_(one: scale.Fleet) -> None:
        asked.append(one)
        raise tools.LoadError("statuses {429: 7}")

    for label in (ONE, ONE, ALONE):
        fleets.attempt(label, break_)
    assert asked == [fleet]
    assert [one.failure for one in fleets.table().points] == ["statuses {429: 7}", None]
    assert "one worker FAILED: statuses {429: 7}" in capsys.readouterr().err
