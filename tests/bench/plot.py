"""Draws a run as SVG: ``python -m tests.bench.plot results.json bench.svg``. Needs matplotlib."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt

from tests.bench.report import figure
from tests.bench.results import CaseResult, Run, read
from tests.bench.variants import TITLES

SHOWN: Final = ("s_c32", "m_c8", "e_c8", "upload_20mb_c4", "hit_memory_c8")
OURS: Final = "#1f6f54"
NGINX: Final = "#8a8f98"
PEER: Final = "#c9743b"


def draw(run: Run, path: Path) -> None:
    """CPU a request by case, on scales of tens: peers are far away."""
    cases = [run.cases[name] for name in SHOWN if name in run.cases]
    matplotlib.rcParams["svg.hashsalt"] = "bench"
    figure_, all_axes = plt.subplots(len(cases), 1, figsize=(8, 1.7 * len(cases)), squeeze=False)
    for axes, case in zip(all_axes.flat, cases, strict=True):
        _bars(axes, case)
    figure_.tight_layout()
    figure_.savefig(path, metadata={"Date": None})


def _bars(axes: Any, case: CaseResult) -> None:
    bars = [
        (name, said)
        for name, measured in reversed(list(case.targets.items()))
        if (said := measured.summary("cpu_us")) is not None
    ]
    medians = [said.median for _, said in bars]
    spreads = [
        [said.median - said.least for _, said in bars],
        [said.most - said.median for _, said in bars],
    ]
    places = range(len(bars))
    colours = [_colour(name) for name, _ in bars]
    axes.barh(places, medians, color=colours, xerr=spreads, ecolor="#333333")
    axes.set_yticks(places, [TITLES[name] for name, _ in bars])
    axes.set_xscale("log")
    for place, (_, said) in enumerate(bars):
        axes.annotate(f" {figure(said.median)}", (said.most, place), va="center", fontsize=8)
    axes.set_title(f"CPU us a request: {case.about}", loc="left", fontsize=9)
    axes.margins(x=0.15)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _colour(name: str) -> str:
    if name.startswith("gateway"):
        return OURS
    return NGINX if name.startswith("nginx") else PEER


def main(arguments: Sequence[str]) -> None:
    results, path = arguments
    draw(read(Path(results)), Path(path))


if __name__ == "__main__":
    main(sys.argv[1:])
