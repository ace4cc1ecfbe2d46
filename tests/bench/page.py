"""The page of the benchmark, written by a full run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.bench import report
from tests.bench.results import Run, read, to_json
from tests.bench.rounds import say
from tests.bench.targets import ROOT

RESULTS: Final = Path(__file__).parent / "results.json"
PAGE: Final = ROOT / "gateway" / "docs" / "bench.md"
PLOT: Final = ROOT / "gateway" / "docs" / "bench.svg"
WHERE: Final = Path(__file__).parent / "where.md"
"""What ``where`` found last."""
README: Final = ROOT / "README.md"
BETWEEN: Final = ("<!-- make bench -->", "<!-- end of make bench -->")
"""Where the README has the short table."""

HEAD: Final = """# Benchmark

How much of a machine the gateway takes, beside nginx as the limit and beside the gateways that a
user might take instead. This page and its plot are written by a full run; numbers are never
edited.

## How to repeat it

```console
$ make bench                          # every case; 7 rounds
$ make bench QUICK=1                  # five cases, under 3 minutes
$ make bench PEERS=1                  # LiteLLM and Portkey too; writes this page
$ make bench CASES=s_c32,m_c8 ROUNDS=9
$ make bench STUDY=where              # a profile, below
```

It needs a C compiler and nginx (Debian: `apt install gcc libc6-dev nginx-light`), and for the
peers npm. Cases that need what is missing are skipped, and said to be.

## Method

- The target and all its processes are bound to one core; the load generator, the mock upstream,
  Valkey and PostgreSQL to another. Generator and mock are small C programs (`tests/bench/load.c`,
  `mock.c`).
- **CPU a request** is the CPU time of the target's whole tree of processes, from before the first
  request until it is quiet again after the last, through the number of requests. It says more
  than requests a second, since it does not depend on who else is busy.
- Targets of a case run side by side and take turns: round 1 A B C, round 2 B C A. Every number is
  the median of the rounds, with the least and the most in brackets; only ratios within a run are
  claimed.
- The gateway runs as it ships, with everything on: a key, limits and budgets (huge ones), the
  ledger in SQLite with every commit synced to the disk, the cache and results kept on disk,
  metrics, a log line for each request (to /dev/null). No request is like another, except in the
  cases of the cache. *Nothing kept on disk* is the same without results and with a cache in memory
  alone: what the goals were set for. The others only pass bytes on: LiteLLM without its database,
  and nginx and Portkey, keep no books.
- Every target is first asked by another client, and its answer compared with the upstream's; then
  every answer of the load must be a 200 of the right length, the upstream must have seen as many
  requests as were made (of the cache's none), and in the end the gateway's books must have every
  one of them, settled. Else it has failed, and has no numbers.
- Requests in flight begin evenly spread over most of the time that the upstream takes (2,000 over
  8 of 10 s, 9,000 over 18 of 20 s), so that all are there together before the first is answered,
  and the answers come as spread as the requests did: what a request waits beyond that time is the
  target's. All at once they would wait for one core to open so many connections.
  Each round has targets that have just begun: the answers that one keeps are not the next round's.
  Where the hard limit of open files (`ulimit -Hn`) has no room for so many in one process (four for
  each: two for a connection, two for a call), the gateway runs in as many workers as are needed, on
  the same core, with a Valkey that shares their limits, and its row says so. Its memory is then the
  sum over its processes; what they share is counted in each, so that the growth is what counts.
- The first event of a stream is measured twice: of four streams whose upstream begins after 1.5 s,
  which is what a client sees, and of eight that follow each other without a pause, where it waits
  for the bytes of the other seven. The goal is about the former.
- S is 1.5 KB of JSON, M 2.7 MB (one picture in base64), L 8 MB; the stream of 4.8 MB has three
  partial pictures.
"""


def page(run: Run) -> str:
    where = f"\n{WHERE.read_text()}" if WHERE.exists() else ""
    return f"{HEAD}\n![CPU a request]({PLOT.name})\n\n{report.text(run)}{where}"


def with_table(text: str, table: str) -> str:
    """The README with another short table. Raises ``ValueError`` where its place is missing."""
    before, begin, rest = text.partition(BETWEEN[0])
    _, end, after = rest.partition(BETWEEN[1])
    if not begin or not end:
        raise ValueError(f"no place for the table: {BETWEEN[0]} ... {BETWEEN[1]}")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def write_page(run: Run) -> None:
    PAGE.write_text(page(run))


def write(run: Run) -> None:
    """Results, page, plot and the README's table. Without matplotlib the plot stays as it was, and
    this is said."""
    RESULTS.write_text(to_json(run))
    run = read(RESULTS)  # its digits: whoever writes the page again finds the same
    write_page(run)
    README.write_text(with_table(README.read_text(), report.short_table(run)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.plot", RESULTS, PLOT], cwd=ROOT, check=False
    )
    if done.returncode:
        say("the plot was NOT drawn: pip install -e '.[bench]' (make bench does)")
    say(f"wrote {RESULTS}, {PAGE}, {PLOT}, and the table in {README}")
