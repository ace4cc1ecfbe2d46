"""What a run found, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from tests.bench.goals import GOALS
from tests.bench.results import METRICS, CaseResult, Measured, Run, Summary
from tests.bench.variants import title


def figure(value: float) -> str:
    """Three digits that count, thousands apart."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.2g}"


def spread(summary: Summary) -> str:
    """The median, and between brackets the least and the most."""
    if summary.least == summary.most:
        return figure(summary.median)
    return f"{figure(summary.median)} ({figure(summary.least)}-{figure(summary.most)})"


def rows(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    first = f"| {' | '.join(head)} |"
    rule = f"|---{'|---:' * (len(head) - 1)}|"
    return "\n".join((first, rule, *(f"| {' | '.join(line)} |" for line in lines)))


def case_table(case: CaseResult) -> str:
    """Targets down, metrics across; below it what failed or was skipped, and why."""
    metrics = [name for name in METRICS if _shown(case, name)]
    lines = []
    notes = [f"Skipped: {title(name)}: {why}" for name, why in case.skipped.items()]
    for name, measured in case.targets.items():
        if measured.failure is not None:
            notes.append(f"**FAILED**: {title(name)}: {measured.failure}")
            continue
        lines.append((title(name), *(_cell(measured, metric) for metric in metrics)))
    head = ("", *(METRICS[name] for name in metrics))
    table = [rows(head, lines)] if lines else []
    return "\n\n".join((*table, *notes))


def _shown(case: CaseResult, metric: str) -> bool:
    found = any(metric in sample for one in case.targets.values() for sample in one.samples)
    if metric == "first_ms":
        return found and "stream" in case.about
    if metric == "max_ms":
        return found and "in flight" in case.about
    return found


def _cell(measured: Measured, metric: str) -> str:
    said = measured.summary(metric)
    return spread(said) if said is not None else ""


def goals_table(run: Run) -> str:
    """Every goal, reached or not."""
    lines = []
    for goal in GOALS:
        value = goal.measure(run)
        if goal.instead and value is None:
            continue
        measured = figure(value) if value is not None else ""
        lines.append(
            (goal.text, goal.limit(goal.goal), goal.limit(goal.stretch), measured,
             goal.reached(run))
        )  # fmt: skip
    return rows(("", "goal", "stretch", "measured", "reached"), lines)


COLUMNS: Final = {
    "gateway": ("gateway",),
    "nothing kept on disk": ("gateway-policy",),
    "nginx": ("nginx", "nginx-64k", "nginx-sendfile"),
    "LiteLLM": ("litellm",),
    "Portkey": ("portkey",),
}
"""Of the short table: the best of these targets."""

SHORT: Final = (
    ("1.5 KB JSON, 32 at once: CPU us a request", "s_c32", "cpu_us"),
    ("2.7 MB JSON, 8 at once: CPU us a request", "m_c8", "cpu_us"),
    ("the same: MB/s through one core", "m_c8", "mb_per_second"),
    ("upload of 20 MB, 4 at once: CPU us a request", "upload_20mb_c4", "cpu_us"),
    ("2.7 MB from the cache: requests/s", "hit_memory_c8", "requests_per_second"),
    ("2,000 in flight: KB of memory each", "inflight_2000", "rss_kb_per_request"),
)


def short_table(run: Run) -> str:
    """For the README: medians alone, and how many of the goals are reached."""
    lines = []
    for about, case, metric in SHORT:
        cells = [_best_median(run, case, targets, metric) for targets in COLUMNS.values()]
        if any(cells):
            lines.append((about, *cells))
    said = [one for one in (goal.reached(run) for goal in GOALS) if one != "not measured"]
    reached = len(said) - said.count("missed")
    return rows(("", *COLUMNS), lines) + (
        f"\n\nOf the {len(said)} goals of that page {reached} are reached."
    )


def _best_median(run: Run, case: str, targets: Sequence[str], metric: str) -> str:
    found = [run.median(case, target, metric) for target in targets]
    values = [value for value in found if value is not None]
    if not values:
        return ""
    return figure((max if metric.endswith("per_second") else min)(values))


def machine_table(run: Run) -> str:
    return rows(("what", "which"), run.machine.items())


def text(run: Run) -> str:
    """All of it."""
    parts = ["## Goals", f"Medians of {run.rounds} rounds.", goals_table(run)]
    for case in run.cases.values():
        parts += [f"## `{case.name}`: {case.about}", case_table(case)]
    parts += ["## Machine and versions", machine_table(run)]
    return "\n\n".join(parts) + "\n"


def failures(run: Run) -> list[str]:
    """What failed: ``case: target: why``."""
    return [
        f"{case.name}: {name}: {measured.failure}"
        for case in run.cases.values()
        for name, measured in case.targets.items()
        if measured.failure is not None
    ]
