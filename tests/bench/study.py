"""A study: how a cost changes with something that grows, or with how many share the work.

A study has tables, a table points, a point samples of each metric. What is concluded from them
(lines, ratios) is calculated when it is shown, so that a results file has measurements alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import comb
from pathlib import Path
from statistics import median
from typing import Any, Final

from tests.bench.report import rows, spread
from tests.bench.results import Summary, rounded, summary

METRICS: Final = {
    "cpu_us": "CPU us a request",
    "requests_per_second": "requests/s",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "rss_idle_mb": "RSS before, MB",
    "rss_mb": "RSS, MB",
    "rss_growth_mb": "RSS peak over RSS before, MB",
    "rss_kb_per_request": "RSS a request in flight, KB",
    "upstream_waiting": "of them at the upstream",
    "idle_ms": "while nobody asks, CPU ms a second",
    "idle_held_ms": "a request then, longest ms",
    "scrape_ms": "/metrics, ms",
    "scrape_cpu_ms": "/metrics, CPU ms",
    "scrape_kb": "/metrics, KB",
    "scrape_held_ms": "another request meanwhile, longest ms",
    "share_of_one": "requests of the busiest process, share",
    "valkey_us": "Valkey, CPU us a request",
    "valkey_trips": "Valkey, round trips a request",
    "valkey_commands": "Valkey, commands a request, those of scripts too",
    "postgres_us": "PostgreSQL, CPU us a request",
    "postgres_commits": "PostgreSQL, commits a request",
    "postgres_syncs": "PostgreSQL, syncs a request",
    "postgres_wal_kb": "PostgreSQL, WAL KB a request",
    "connections": "PostgreSQL, connections",
}
"""Of a point, in the order of the columns; those that a table does not have are left out."""


@dataclass(frozen=True, slots=True)
class Point:
    """``size`` is what it is drawn over. A point with a ``failure`` has no numbers."""

    label: str
    size: float
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    failure: str | None = None

    def summary(self, metric: str) -> Summary | None:
        values = self.samples.get(metric)
        return summary(values) if values and self.failure is None else None

    def median(self, metric: str) -> float | None:
        said = self.summary(metric)
        return said.median if said is not None else None


@dataclass(frozen=True, slots=True)
class Table:
    """``axis`` says what the sizes of the points are; ``skipped`` which are missing, and why."""

    title: str
    axis: str
    points: Sequence[Point]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def get(self, label: str, metric: str) -> float | None:
        """The median at a point; None where there is none."""
        found = [point.median(metric) for point in self.points if point.label == label]
        return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Study:
    """``machine`` are names and values, as they are printed; ``numbers`` what was measured of the
    machine and the stores alone; ``tables`` by name."""

    machine: Mapping[str, str]
    tables: Mapping[str, Table]
    numbers: Mapping[str, float] = field(default_factory=dict)


def write(study: Study, path: Path) -> None:
    path.write_text(json.dumps(rounded(asdict(study)), indent=1) + "\n")


def read(path: Path) -> Study:
    """Raises ``KeyError`` and ``TypeError`` for what ``write`` has not written."""
    said = json.loads(path.read_text())
    tables = {name: _table(table) for name, table in said["tables"].items()}
    return Study(said["machine"], tables, said["numbers"])


def _table(said: Mapping[str, Any]) -> Table:
    points = [Point(**point) for point in said["points"]]
    return Table(said["title"], said["axis"], points, said.get("skipped", {}))


def table_text(table: Table) -> str:
    """Points down, metrics across; below it what failed or was skipped."""
    metrics = [
        name for name in METRICS if any(name in point.samples for point in table.points)
    ]  # fmt: skip
    lines = []
    for point in table.points:
        said = [point.summary(name) for name in metrics]
        lines.append((point.label, *(spread(one) if one is not None else "" for one in said)))
    failures = [
        f"**FAILED**: {point.label}: {point.failure}" for point in table.points if point.failure
    ]
    skipped = [f"Skipped: {label}: {why}" for label, why in table.skipped.items()]
    head = (table.axis, *(METRICS[name] for name in metrics))
    return "\n\n".join((rows(head, lines), *failures, *skipped))


@dataclass(frozen=True, slots=True)
class Line:
    """``fixed + slope * size``. ``worst`` is the largest part by which a point is off it."""

    fixed: float
    slope: float
    worst: float


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """The line through (size, value > 0) whose *relative* errors have the least squares: small
    sizes count as much as large ones. Raises ``ValueError`` for fewer than two sizes."""
    if len({size for size, _ in points}) < 2:
        raise ValueError("a line needs two sizes")
    # With weights 1/value^2, the normal equations of least squares.
    weights = [1 / value**2 for _, value in points]
    w = sum(weights)
    wx = sum(weight * size for weight, (size, _) in zip(weights, points, strict=True))
    wy = sum(weight * value for weight, (_, value) in zip(weights, points, strict=True))
    wxx = sum(weight * size**2 for weight, (size, _) in zip(weights, points, strict=True))
    wxy = sum(weight * size * value for weight, (size, value) in zip(weights, points, strict=True))
    slope = (w * wxy - wx * wy) / (w * wxx - wx**2)
    fixed = (wy - slope * wx) / w
    worst = max(abs(fixed + slope * size - value) / value for size, value in points)
    return Line(fixed, slope, worst)


def line_of(table: Table, metric: str) -> Line | None:
    """Through the medians; None where fewer than two points have them."""
    found = [
        (point.size, value)
        for point in table.points
        if (value := point.median(metric)) is not None and value > 0
    ]
    return fit(found) if len({size for size, _ in found}) > 1 else None


def rise(table: Table, metric: str, label: str, first: str) -> float | None:
    """By what a metric is more at one point than at another: 0.1 is 10 % more."""
    above, below = table.get(label, metric), table.get(first, metric)
    return above / below - 1 if above is not None and below else None


@dataclass(frozen=True, slots=True)
class Rise:
    """By what something is more than something else: 0.1 is 10 % more. ``low`` to ``high`` has the
    true median 19 times in 20, whatever the samples are distributed like; of fewer than six it has
    all of them."""

    median: float
    low: float
    high: float


def rise_in_rounds(table: Table, metric: str, label: str, first: str) -> Rise | None:
    """The rise within each round, of two points that were measured side by side in it. What comes
    and goes with the rounds is in both, so it is not in their ratio."""
    points = {point.label: point for point in table.points if point.failure is None}
    if label not in points or first not in points:
        return None
    pairs = zip(
        points[label].samples.get(metric, ()), points[first].samples.get(metric, ()), strict=True
    )
    found = sorted(above / below - 1 for above, below in pairs)
    if not found:
        return None
    outside = _outside(len(found))
    return Rise(median(found), found[outside], found[-1 - outside])


def _outside(count: int) -> int:
    """How many of so many sorted samples may be left out at each end, so that the median is between
    the others 19 times in 20: each sample is below it as often as a coin falls on one side."""
    left, chance = 0, 2 / 2**count
    while left + 1 <= (count - 1) // 2:
        chance += 2 * comb(count, left + 1) / 2**count
        if chance > 0.05:
            break
        left += 1
    return left
