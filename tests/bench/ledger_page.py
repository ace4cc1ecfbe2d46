"""What the study of a growing ledger says, as Markdown: tables by subject, a column for each
ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from tests.bench.growth_ledger import LIMIT_MS, Measured
from tests.bench.report import figure, rows

TITLES: Final = {"sqlite": "SQLite", "postgres": "PostgreSQL"}
NOTHING: Final = "–"
"""What was not measured, or cannot be where there is nothing."""

PAIRS: Final = {
    "reserve_ms": "a reservation, alone, ms",
    "reserve_p99_ms": "the slowest of 100, ms",
    "settle_ms": "a settlement, alone, ms",
    "settle_p99_ms": "the slowest of 100, ms",
    "pairs_per_second": "both of a call, 64 calls at a time, calls/s",
    "process_cpu_us": "CPU of the gateway's process for both, us a call",
}
LISTING: Final = {
    "usage_rows": "rows of usage, all days",
    "usage_rows_per_second": "listed, rows/s",
    "focus_rows": "rows of FOCUS, a month",
    "focus_seconds": "exported as CSV in, s",
    "focus_rows_per_second": "exported, rows/s",
}
RETENTION: Final = {
    "calls_forgotten": "calls deleted",
    "calls_per_second": "deleted, calls/s",
    "batch_ms": "a batch of 100 calls, ms",
    "batch_p99_ms": "the slowest of 100 batches, ms",
    "reserve_p50_ms": "a reservation while nothing is deleted, ms",
    "reserve_p99_ms": "the slowest of 100, ms",
    "beside_p50_ms": "a reservation beside the deletion, ms",
    "beside_p99_ms": "the slowest of 100, ms",
}
QUESTIONS: Final = {
    "usage, a day": "rows of usage, a day",
    "usage, a team's 90 days": "rows of usage, a team's 90 days",
    "usage --by user, 80 crooked days": "usage --by user, 80 days, neither end that of a month",
    "usage --by user, two half months around a whole one": (
        "usage --by user, half a month, a month, half a month"
    ),
    "usage --by user, from an 8th to a 7th": (
        "usage --by user, from the 8th of a month to the 7th two months later"
    ),
    "routed, a day": "where a day's calls went, by upstream",
    "unresolved, 100 calls": "the first 100 calls of unknown outcome",
    "unresolved, dollars": "what calls of unknown outcome cost",
    "running calls": "how many calls run",
    "sweep, nothing due": "a sweep, nothing is due",
    "sweep, 100 due": "a sweep, 100 calls are due",
}
"""Where a question's name says too little to who has not asked it."""
COUNTS: Final = frozenset({"usage_rows", "focus_rows", "calls_forgotten"})
MB: Final = 1_000_000

Show = Callable[[Measured], str]


def text(results: Sequence[Measured]) -> str:
    """The tables, and which questions take longer than they may."""
    asked = [*results[0].questions_ms]
    usage = [name for name in asked if name.startswith("usage")]
    others = [name for name in asked if name not in usage]
    slow = [
        f"- {_title(one)} calls: {QUESTIONS.get(name, name)}: {one.questions_ms[name]:,.0f} ms"
        for one in results
        for name in one.slow
    ]
    parts = [
        "### A call",
        _table(results, _lines(PAIRS, lambda one: one.pairs)),
        "### Questions about usage, ms",
        _table(results, _questions(usage)),
        "### Questions about calls, and sweeps, ms",
        _table(results, _questions(others)),
        "### The whole of it",
        _table(
            results,
            [
                ("size, MB", lambda one: _number(one.pairs.get("bytes", 0.0) / MB)),
                ("opening it, ms", lambda one: _number(one.open_ms)),
                *_lines(LISTING, lambda one: one.pairs),
                ("gateway ledger verify, s", lambda one: _number(one.audit_seconds)),
            ],
        ),
        "### Deletion of what was kept for long enough, beside 50 calls a second",
        _table(results, _lines(RETENTION, lambda one: one.retention)),
        f"Questions that take more than {LIMIT_MS:.0f} ms: {'' if slow else 'none.'}".strip(),
    ]
    return "\n\n".join((*parts, *(["\n".join(slow)] if slow else [])))


def _title(one: Measured) -> str:
    return f"{TITLES[one.store]}, {one.calls:,}"


def _table(results: Sequence[Measured], lines: Sequence[tuple[str, Show]]) -> str:
    head = ("", *(_title(one) for one in results))
    return rows(head, [(name, *(show(one) for one in results)) for name, show in lines])


def _lines(
    names: Mapping[str, str], group: Callable[[Measured], Mapping[str, float]]
) -> list[tuple[str, Show]]:
    def shown(key: str) -> Show:
        if key in COUNTS:
            return lambda one: f"{group(one)[key]:,.0f}" if key in group(one) else NOTHING
        return lambda one: _number(group(one).get(key, 0.0))

    return [(name, shown(key)) for key, name in names.items()]


def _questions(names: Sequence[str]) -> list[tuple[str, Show]]:
    def shown(name: str) -> Show:
        return lambda one: _number(one.questions_ms.get(name, 0.0))

    return [(QUESTIONS.get(name, name), shown(name)) for name in names]


def _number(value: float) -> str:
    """Nothing takes no time at all: then there was nothing to measure."""
    return figure(value) if value else NOTHING
