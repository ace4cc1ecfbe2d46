"""``python -m tests.bench``: see ``make bench`` and gateway/docs/bench.md."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence

from tests.bench import page, studies, tools
from tests.bench.cases import PEERS, Case, chosen
from tests.bench.machine import machine
from tests.bench.processes import cores, raise_file_limit, stay_off_the_target
from tests.bench.report import failures, text
from tests.bench.results import Run
from tests.bench.rounds import Plan, run_case, say

ROUNDS = 7
QUICK_ROUNDS = 3


def main(arguments: Sequence[str]) -> int:
    """The exit code: 1 where answers were wrong, 2 where nothing can be measured here."""
    asked = _parser().parse_args(arguments)
    # So that what was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        cases = chosen(asked.cases, quick=asked.quick)
        for program in ("mock", "load"):
            tools.build(program)
    except (ValueError, tools.BuildError) as error:
        say(str(error))
        return 2
    if asked.study:
        return studies.run(asked.study, quick=asked.quick)
    run = _measure(asked, cases)
    print(text(run))
    whole = not asked.cases and not asked.quick and asked.peers
    if asked.write or whole:
        page.write(run)
    wrong = failures(run)
    for line in wrong:
        say(f"FAILED {line}")
    return 1 if wrong else 0


def _measure(asked: argparse.Namespace, cases: Sequence[Case]) -> Run:
    where = cores()
    if where.target == where.others:
        say("this machine has one core: target and generator share it, ratios are distorted")
    stay_off_the_target(where)
    raise_file_limit()
    rounds = asked.rounds or (QUICK_ROUNDS if asked.quick else ROUNDS)
    plan = Plan(where, rounds, *((1.5, 0.5, 1) if asked.quick else (asked.seconds,)))
    results = {}
    for case in cases:
        began = time.monotonic()
        names = (*case.targets, *(PEERS if case.peers and asked.peers else ()))
        results[case.name] = run_case(case, names, plan)
        say(f"{case.name}: {time.monotonic() - began:.0f} s in all")
    return Run(machine(where), rounds, results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("study", nargs="?", choices=list(studies.NAMES), help="instead of cases")
    parser.add_argument("--quick", action="store_true", help="five cases, three short rounds")
    parser.add_argument("--peers", action="store_true", help="LiteLLM and Portkey too, installed")
    parser.add_argument("--cases", default="", help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=0, help=f"default {ROUNDS}, quick 3")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a target in a round")
    parser.add_argument("--write", action="store_true", help="write the page, plot and results")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
