"""Draws growth as SVG: ``python -m tests.bench.plot_growth growth.json growth.svg``. Needs
matplotlib."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt

from tests.bench.study import METRICS, Study, Table, line_of, read

SHOWN: Final = (
    ("body", "cpu_us"),
    ("body", "rss_growth_mb"),
    ("in_flight", "cpu_us"),
    ("in_flight", "rss_kb_per_request"),
    ("keys", "cpu_us"),
    ("keys", "idle_ms"),
)
COLOUR: Final = "#1f6f54"
AXES: Final = {"body": "body, MB", "in_flight": "in flight", "keys": "keys"}

OTHERS: Final = re.compile(" of | workers$")
"""Points that are not on the curve: of something else than the rest."""


def draw(study: Study, path: Path) -> None:
    """Each metric over what grows, on scales of tens."""
    matplotlib.rcParams["svg.hashsalt"] = "growth"
    figure, all_axes = plt.subplots(3, 2, figsize=(8, 8))
    for axes, (name, metric) in zip(all_axes.flat, SHOWN, strict=True):
        if name in study.tables:
            _curve(axes, name, study.tables[name], metric)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _curve(axes: Any, name: str, table: Table, metric: str) -> None:
    found = sorted(
        (point.size, said)
        for point in table.points
        if not OTHERS.search(point.label) and (said := point.summary(metric)) is not None
    )  # fmt: skip
    sizes = [size for size, _ in found]
    medians = [said.median for _, said in found]
    spreads = [
        [said.median - said.least for _, said in found],
        [said.most - said.median for _, said in found],
    ]
    axes.errorbar(sizes, medians, yerr=spreads, fmt="o-", color=COLOUR, ecolor="#333333", ms=4)
    line = line_of(table, metric) if name == "body" and metric == "cpu_us" else None
    if line is not None:
        fitted = [line.fixed + line.slope * size for size in sizes]
        axes.plot(sizes, fitted, "--", color="#8a8f98", lw=1)
    axes.set_xscale("log")
    if medians and min(medians) > 0 and max(medians) > 20 * min(medians):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(AXES[name], fontsize=8)
    axes.set_title(METRICS[metric], loc="left", fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main(arguments: Sequence[str]) -> None:
    results, path = arguments
    draw(read(Path(results)), Path(path))


if __name__ == "__main__":
    main(sys.argv[1:])
