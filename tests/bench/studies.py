"""The studies, run and written: ``make bench STUDY=growth``, ``ledger``, ``scale``, ``where``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.bench import growth, growth_ledger, ledger_page, results, scale, study, where
from tests.bench import page as page_of_cases
from tests.bench.machine import machine
from tests.bench.processes import Cores, cores, raise_file_limit, stay_off_the_target
from tests.bench.report import figure, rows
from tests.bench.rounds import say
from tests.bench.scale_limits import METHOD, needs_text, rises_text
from tests.bench.study import METRICS, Study, Table, line_of, rise, table_text
from tests.bench.targets import ROOT
from tests.bench.variants import site_folder

HERE: Final = Path(__file__).parent
PAGE: Final = ROOT / "gateway" / "docs" / "growth.md"
PLOT: Final = PAGE.with_suffix(".svg")
LEDGERS: Final = "ledger.json"
QUICK: Final = growth.Sizes(
    bodies=("1 KB", "100 KB", "2.7 MB"), body_rounds=1, body_bytes=5_000_000,
    in_flight=(1, 100), rate=50, window_seconds=1.0, keys=(10, 1_000, 10), key_seconds=0.5,
    idle_seconds=2.0,
)  # fmt: skip

HEAD: Final = """# Growth and scale-out

How what a request costs changes with the size of its answer, with requests in flight, with teams
and keys, with the rows of the ledger, and with how many processes serve; and from that what would
be scarce first behind 100 and 1,000 replicas. The page is written by the studies; numbers are never
edited. How they are taken is in [bench.md](bench.md): cores, CPU a request, medians with the least
and the most.

```console
$ make bench STUDY=growth             # 10 minutes
$ make bench STUDY=ledger             # half an hour, and 10 GB of disk
$ make bench STUDY=scale              # 7 minutes
```
"""


LEDGER_HEAD: Final = """Calls that were settled before, over 90 days, of 200 teams, 1,000 keys and
14,000 users; at five million each user calls every day. Heads name the database and how many calls
it has. Questions are asked of the store as commands and the Admin API ask them, each some times:
the median is shown. "all" is of all days and teams, "a month" is October, "a team" has all days;
what is not measured, or cannot be where there are no calls, is "–"."""


def run(name: str, *, quick: bool) -> int:
    """The exit code: 1 where something failed. What is not quick is written down."""
    on = cores()
    stay_off_the_target(on)
    raise_file_limit()
    if name == WHERE:
        return _where(on, quick=quick)
    if name == LEDGER:
        return _ledger(on, quick=quick)
    if name == "growth":
        sizes = QUICK if quick else growth.Sizes()
        found = Study(machine(on), growth.measure(on, sizes))
    else:
        few = scale.Sizes(rounds=1, warm_seconds=1.0, slow_seconds=1.0)
        tables, numbers = scale.measure(on, few if quick else scale.Sizes())
        found = Study(machine(on), tables, numbers)
    print(TEXTS[name](found))
    if not quick:
        study.write(found, HERE / f"{name}.json")
        write_page()
    failed = [
        f"{table.title}: {point.label}: {point.failure}"
        for table in found.tables.values()
        for point in table.points
        if point.failure
    ]
    for line in failed:
        say(f"FAILED {line}")
    return 1 if failed else 0


def _where(on: Cores, *, quick: bool) -> int:
    """Its part of the benchmark's page is written too."""
    looks = where.measure(on, 4.0 if quick else 12.0)
    with site_folder() as folder:
        said = where.text(looks, where.digest_us(), where.file_cost(Path(folder)))
    print(said)
    if not quick:
        page_of_cases.WHERE.write_text(said)
        page_of_cases.write_page(results.read(page_of_cases.RESULTS))
    return 0


def _ledger(on: Cores, *, quick: bool) -> int:
    found = growth_ledger.run(growth_ledger.QUICK_SIZES if quick else growth_ledger.SIZES)
    print(ledger_page.text(found))
    if not quick:
        growth_ledger.write(machine(on), found, HERE / LEDGERS)
        write_page()
    return 0


def growth_text(found: Study) -> str:
    parts = []
    for name, table in found.tables.items():
        parts += [f"## {table.title}", table_text(table), *CONCLUSIONS[name](table)]
    return "\n\n".join(parts)


def _bodies(table: Table) -> list[str]:
    line = line_of(table, "cpu_us")
    if line is None:
        return []
    return [
        f"CPU a request is {figure(line.fixed)} us and {figure(line.slope)} us for each MB; no size"
        f" is off that line by more than {line.worst * 100:.0f} %."
    ]


def _in_flight(table: Table) -> list[str]:
    """Of one worker: two on one core take more for each request, however many there are."""
    alone = [point.label for point in table.points if "workers" not in point.label]
    return _rise(table, alone[0], alone[-1], "cpu_us")


def _keys(table: Table) -> list[str]:
    counts = [point.label for point in table.points if " of " not in point.label]
    again = [point.label for point in table.points if " of " in point.label]
    said = _rise(table, counts[0], counts[-1], "cpu_us")
    for label in again:
        said += _rise(table, counts[0], label, "cpu_us")
    return said + [
        line
        for metric in ("rss_mb", "idle_ms", "scrape_kb", "scrape_cpu_ms")
        for line in _rise(table, counts[0], counts[-1], metric)
    ]


def _rise(table: Table, first: str, last: str, metric: str) -> list[str]:
    value = rise(table, metric, last, first)
    if value is None or first == last:
        return []
    return [f"From {first} to {last}, {METRICS[metric]}: {value * 100:+.0f} %."]


CONCLUSIONS: Final[dict[str, Callable[[Table], list[str]]]] = {
    "body": _bodies,
    "in_flight": _in_flight,
    "keys": _keys,
}


def scale_text(found: Study) -> str:
    parts = []
    for table in found.tables.values():
        parts += [f"## {table.title}", table_text(table)]
    alone = [f"- {name}: {figure(value)}" for name, value in found.numbers.items()]
    return "\n\n".join(
        (
            *parts,
            "## What more processes cost",
            METHOD,
            rises_text(found),
            "## The next bottleneck",
            "Calculated for replicas that each have 50 requests a second (1,000 in flight of 20 s)"
            " and keep pictures of 2.7 MB, from what one replica takes at that rate.",
            needs_text(found),
            "Measured alone:",
            "\n".join(alone),
        )
    )


TEXTS: Final[dict[str, Callable[[Study], str]]] = {"growth": growth_text, "scale": scale_text}
WHERE: Final = "where"
LEDGER: Final = "ledger"
NAMES: Final = (*TEXTS, LEDGER, WHERE)


def page() -> str:
    """Of all the results that there are."""
    parts = [HEAD.strip()]
    for name, text in TEXTS.items():
        file = HERE / f"{name}.json"
        if file.exists():
            found = study.read(file)
            if name == "growth":
                parts.append(f"![CPU a request]({PLOT.name})")
            date = found.machine.get("date", "")
            said = text(found).replace("\n## ", "\n### ").replace("## ", "### ", 1)
            parts += [f"## {name.capitalize()}, {date}", said]
            parts += [f"### Machine of {name}", rows(("what", "which"), found.machine.items())]
        if name == "growth" and (HERE / LEDGERS).exists():
            on, ledgers = growth_ledger.read(HERE / LEDGERS)
            parts += [f"## Rows of the ledger, {on['date']}", LEDGER_HEAD]
            parts += [ledger_page.text(ledgers)]
    return "\n\n".join(parts) + "\n"


def write_page() -> None:
    """Page and plot. Without matplotlib the plot stays as it was, and this is said."""
    PAGE.write_text(page())
    results = HERE / "growth.json"
    if results.exists():
        command = [sys.executable, "-m", "tests.bench.plot_growth", str(results), str(PLOT)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            say("the plot was not drawn: pip install -e '.[bench]' (make bench does)")
    say(f"wrote {PAGE}")
