"""What was measured: samples of rounds, their medians, and files of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

METRICS: Final = {
    "cpu_us": "CPU us a request",
    "requests_per_second": "requests/s",
    "mb_per_second": "MB/s",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "first_ms": "first byte of the body, p50 ms",
    "max_ms": "longest ms",
    "in_flight": "in flight at once",
    "rss_idle_mb": "RSS before, MB",
    "rss_peak_mb": "RSS peak, MB",
    "rss_kb_per_request": "growth of RSS a request, KB",
}
"""Of a sample, in the order of the columns; what a target or a case does not have is left out."""

Sample = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one metric over all rounds."""

    median: float
    least: float
    most: float


def summary(values: Sequence[float]) -> Summary:
    """Of at least one value."""
    return Summary(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Measured:
    """A target in a case. ``samples`` has one for each round; a target with a ``failure`` has no
    numbers, whatever was measured before."""

    samples: Sequence[Sample] = ()
    failure: str | None = None

    def summary(self, metric: str) -> Summary | None:
        values = [sample[metric] for sample in self.samples if metric in sample]
        return summary(values) if values and self.failure is None else None


@dataclass(frozen=True, slots=True)
class CaseResult:
    """``targets`` by name, in their order; ``skipped`` are those that could not be had, and why."""

    name: str
    about: str
    targets: Mapping[str, Measured]
    skipped: Mapping[str, str] = field(default_factory=dict)


def together(repeats: Sequence[CaseResult]) -> CaseResult:
    """One result of several, in which each target has all its samples, or its first failure."""
    first = repeats[0]
    targets: dict[str, Measured] = {}
    for name in first.targets:
        found = [repeat.targets[name] for repeat in repeats if name in repeat.targets]
        samples = [sample for one in found for sample in one.samples]
        failure = next((one.failure for one in found if one.failure is not None), None)
        targets[name] = Measured(samples, failure)
    return replace(first, targets=targets)


@dataclass(frozen=True, slots=True)
class Run:
    """``machine`` are names and values, as they are printed; ``cases`` by name."""

    machine: Mapping[str, str]
    rounds: int
    cases: Mapping[str, CaseResult]

    def median(self, case: str, target: str, metric: str) -> float | None:
        """None where it was not measured, or failed."""
        found = self.cases.get(case)
        measured = found.targets.get(target) if found is not None else None
        said = measured.summary(metric) if measured is not None else None
        return said.median if said is not None else None

    def ratio(self, metric: str, above: tuple[str, str], below: tuple[str, str]) -> float | None:
        """Of two medians of (case, target); None where one is missing or the lower one is 0."""
        top, bottom = self.median(*above, metric), self.median(*below, metric)
        return top / bottom if top is not None and bottom else None


def to_json(run: Run) -> str:
    """Numbers to six digits: no clock here is better."""
    return json.dumps(rounded(asdict(run)), indent=1, sort_keys=False) + "\n"


def from_json(text: str) -> Run:
    """Raises ``KeyError`` and ``TypeError`` for what ``to_json`` has not written."""
    said = json.loads(text)
    cases = {name: _case(case) for name, case in said["cases"].items()}
    return Run(said["machine"], said["rounds"], cases)


def read(path: Path) -> Run:
    return from_json(path.read_text())


def _case(said: Mapping[str, Any]) -> CaseResult:
    targets = {name: Measured(**measured) for name, measured in said["targets"].items()}
    return CaseResult(said["name"], said["about"], targets, said["skipped"])


def rounded(value: Any) -> Any:
    """All its floats to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    return value
