"""`make torture MINUTES=n`: the storm, on both databases; a table, and exit code 1 for a loss."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.torture.storm import Outcome, Plan, Storm


def main() -> int:
    parser = argparse.ArgumentParser(prog="torture", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2, help="together, both databases")
    parser.add_argument("--database", choices=("postgres", "sqlite"), help="default: both")
    parser.add_argument("--gateways", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=20261122)
    asked = parser.parse_args()
    databases = [asked.database] if asked.database else ["postgres", "sqlite"]
    outcomes = []
    for database in databases:
        plan = Plan(
            seconds=asked.minutes * 60 / len(databases),
            database=database,
            gateways=asked.gateways,
            workers=asked.workers,
            clients=asked.clients,
            seed=asked.seed,
        )
        print(f"{database}: {plan.seconds:.0f} s, seed {plan.seed} ...", flush=True)
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            outcomes.append(asyncio.run(Storm(plan, Path(folder)).run()))
    print(table(outcomes))
    for outcome in outcomes:
        for line in outcome.verdict.details if outcome.verdict else ():
            print(f"{outcome.plan.database}: {line}")
    return 0 if all(one.verdict is not None and one.verdict.clean for one in outcomes) else 1


def table(outcomes: list[Outcome]) -> str:
    """A row of numbers for each thing that was counted, a column for each run."""
    rows: list[tuple[str, list[object]]] = [
        ("", [one.plan.database for one in outcomes]),
        ("minutes", [round(one.plan.seconds / 60, 1) for one in outcomes]),
        ("kill -9", [one.kills for one in outcomes]),
    ]
    blows = sorted({blow for one in outcomes for blow in one.blows})
    rows += [(f"  {blow}", [one.blows[blow] for one in outcomes]) for blow in blows]
    for name in (
        "sent", "charged", "refused", "unavailable", "unknown", "repeated", "replayed", "gone",
        "broken",
    ):  # fmt: skip
        values = [getattr(one.notes, name) for one in outcomes]
        rows.append((name, [len(each) if isinstance(each, dict) else each for each in values]))
    rows += [
        ("purchases on the upstream's bill", [one.billed for one in outcomes]),
        ("holds posted", [one.states["P"] for one in outcomes]),
        ("holds expired at their bound", [one.states["X"] for one in outcomes]),
        ("holds voided", [one.states["V"] for one in outcomes]),
    ]
    for name in (
        "lost", "doubled", "over_budget_nanousd", "sums_wrong", "under_billed", "stuck",
        "surprises",
    ):  # fmt: skip
        rows.append((f"**{name}**", [getattr(one.verdict, name) for one in outcomes]))
    widths = [
        max(len(str(cell)) for cell in column) for column in zip(*(r[1] for r in rows), strict=True)
    ]
    first = max(len(name) for name, _ in rows)
    lines = [
        f"| {name:{first}} | "
        + " | ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True))
        + " |"
        for name, cells in rows
    ]
    rule = (
        "|" + "-" * (first + 2) + "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]])


if __name__ == "__main__":
    sys.exit(main())
