"""Where the time of a request goes: samples of py-spy, by the room of the innermost line of ours.

Only samples in which a thread holds the interpreter's lock: what the kernel and SQLite do meanwhile
is not among them, and is part of the CPU that the cases count.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Final

from tests.bench import report
from tests.bench.cases import CASES, Case
from tests.bench.install import MissingTool
from tests.bench.processes import Cores
from tests.bench.rounds import NUMBERS_EACH, Bench, Plan, open_upstream, say
from tests.bench.targets import Site
from tests.bench.variants import POLICY_TARGET, site_folder, start

SHOWN: Final = ("s_c32", "m_c8")
SAMPLES_A_SECOND: Final = 400
LEAST_PERCENT: Final = 1.0
LOOP: Final = "the event loop, uvicorn"
PAGE: Final = Path(__file__).parent / "where.md"

_OURS = re.compile(r"gateway/(\w+)(?:/(\w+))?\.py:\d+\)$")


def rooms(raw: str) -> Counter[str]:
    """Samples by room, ``relay/purchase`` or ``protocol``, of py-spy's raw format: a line for each
    stack, its frames from the outermost on, and how often it was seen."""
    found: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        ours = (_OURS.search(frame) for frame in reversed(stack.split(";")))
        room = next(("/".join(filter(None, one.groups())) for one in ours if one), "")
        found[LOOP if room in ("", "cli/serve", "__main__") else room] += int(count)
    return found


def table(found: Counter[str]) -> str:
    """The rooms that take the most, and what is left."""
    whole = found.total() or 1
    lines = [
        (f"`{room}`" if room != LOOP else room, f"{100 * count / whole:.1f} %")
        for room, count in found.most_common()
        if 100 * count / whole >= LEAST_PERCENT
    ]
    shown = sum(count for count in found.values() if 100 * count / whole >= LEAST_PERCENT)
    lines.append(("all others", f"{100 * (whole - shown) / whole:.1f} %"))
    return report.rows(("room", "share"), lines)


def measure(cores: Cores, seconds: float) -> dict[str, Counter[str]]:
    """By case. Raises ``MissingTool``, ``BuildError``, ``StartError``, ``CheckError``."""
    cases = [case for case in CASES if case.name in SHOWN]
    return {case.name: _profile(case, cores, seconds) for case in cases}


def text(found: dict[str, Counter[str]]) -> str:
    about = {case.name: case.about for case in CASES}
    parts = [
        "## Where the time goes",
        "`make bench STUDY=where`: of the time in which Python ran, the share of each room, by the "
        "innermost line of ours; nothing kept on disk.",
    ]
    for name, one in found.items():
        parts += [f"### `{name}`: {about[name]}", table(one)]
    return "\n\n".join(parts) + "\n"


def _profile(case: Case, cores: Cores, seconds: float) -> Counter[str]:
    plan = Plan(cores, rounds=1, seconds=seconds)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(site_folder()))
        folder.chmod(0o755)
        upstream = open_upstream(case, plan, folder, stack)
        site = Site(folder, cores.target, upstream.ports, upstream.ca, upstream.reply.body)
        target = start(POLICY_TARGET, site, stack)
        assert target.process is not None
        bench = Bench(case, POLICY_TARGET, target, upstream, folder, NUMBERS_EACH)
        bench.warm(plan)
        raw = folder / "stacks"
        spy = subprocess.Popen(
            [
                *(_py_spy(), "record", "--gil", "--nonblocking", "--format", "raw"),
                *("--rate", str(SAMPLES_A_SECOND), "--duration", str(max(1, int(seconds) - 1))),
                *("--output", raw, "--pid", str(target.process.pid)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            bench.measure(plan)
        finally:
            spy.wait(timeout=60)
        say(f"{case.name}: looked at")
        return rooms(raw.read_text())


def _py_spy() -> str:
    beside = Path(sys.executable).with_name("py-spy")
    found = str(beside) if beside.exists() else shutil.which("py-spy")
    if found is None:
        raise MissingTool("no py-spy: pip install -e '.[bench]' (make bench does)")
    return found
