"""Where the time of a request goes: samples of py-spy, by the room of the innermost line of ours.

Only samples in which a thread holds the interpreter's lock: what the kernel and SQLite do meanwhile
is not among them, and is part of the CPU that the cases count.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench import report
from tests.bench.cases import CASES, Case
from tests.bench.install import MissingTool
from tests.bench.processes import Cores, kernel_seconds
from tests.bench.rounds import NUMBERS_EACH, Bench, Plan, Upstream, open_upstream, say
from tests.bench.targets import Site
from tests.bench.variants import POLICY_TARGET, TITLES, site_folder, start

SHOWN: Final = (
    ("s_c32", POLICY_TARGET, "nginx"),
    ("s_c32", "gateway", "nginx"),
    ("m_c8", POLICY_TARGET, "nginx-64k"),
    ("m_c8", "gateway", "nginx-64k"),
    ("upload_20mb_c4", "gateway", "nginx"),
    ("hit_memory_c8", "gateway", "nginx-sendfile"),
    ("hit_memory_s_c32", "gateway", "nginx-sendfile"),
    ("hit_redis_c8", "gateway-redis", "nginx-sendfile"),
)
"""The case, the target that is looked into, and what it is compared with."""
FILE_PARTS: Final = (bytes(67_500),) * 40
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


@dataclass(frozen=True, slots=True)
class Look:
    """What one target takes for a request of a case, in us of CPU, and in which rooms Python is.

    ``kernel_us`` and ``lock_us``, in which a thread has the interpreter's lock, overlap where a
    system call is made with the lock."""

    case: Case
    target: str
    cpu_us: float
    kernel_us: float
    lock_us: float
    beside: str
    beside_us: float
    rooms: Counter[str]


def measure(cores: Cores, seconds: float) -> list[Look]:
    """Raises ``MissingTool``, ``BuildError``, ``StartError``, ``CheckError``."""
    cases = {case.name: case for case in CASES}
    return [_look(cases[name], target, beside, cores, seconds) for name, target, beside in SHOWN]


def digest_us(megabytes: int = 20) -> float:
    """The CPU that SHA-256 of so much takes, in us: the least of a few."""
    piece = bytes(1_000_000)
    taken = []
    for _ in range(5):
        digest, began = hashlib.sha256(), time.thread_time_ns()
        for _ in range(megabytes):
            digest.update(piece)
        taken.append(time.thread_time_ns() - began)
    return min(taken) / 1000


@dataclass(frozen=True, slots=True)
class FileCost:
    """The CPU that one file of 2.7 MB takes to write, in us: beside the others, which all stay, and
    in the place of the one before, which is gone."""

    new_us: float
    again_us: float


def file_cost(folder: Path, files: int = 300) -> FileCost:
    began = time.thread_time_ns()
    for number in range(files):
        _write(folder / f"new-{number}")
    new = time.thread_time_ns() - began
    again = 0
    for number in range(files):
        began = time.thread_time_ns()
        _write(folder / f"again-{number}")
        again += time.thread_time_ns() - began
        (folder / f"again-{number}").unlink()
    return FileCost(new / files / 1000, again / files / 1000)


def _write(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        os.writev(descriptor, FILE_PARTS)
    finally:
        os.close(descriptor)


def text(looks: Sequence[Look], sha256_us: float, file: FileCost) -> str:
    parts = [
        "## Where the time goes",
        "`make bench STUDY=where`: CPU us a request; of it in the kernel, and with the"
        " interpreter's lock held (system calls that are made with the lock are in both; what is in"
        " neither are digests, copies and SQLite). SHA-256 of 20 MB alone takes"
        f" {report.figure(sha256_us)} us here, and a file of 2.7 MB {report.figure(file.new_us)} us"
        f" to write, or {report.figure(file.again_us)} where the one before has just been deleted:"
        " the rest is memory that the (virtual) machine has yet to get.",
        report.rows(
            ("case", "who", "CPU", "kernel", "lock", "beside it", "CPU of that"),
            [
                (
                    f"`{one.case.name}`", TITLES[one.target],
                    *map(report.figure, (one.cpu_us, one.kernel_us, one.lock_us)),
                    TITLES[one.beside], report.figure(one.beside_us),
                )
                for one in looks
            ],
        ),
        "Of the time in which Python ran, the share of each room, by the innermost line of ours:",
    ]  # fmt: skip
    for one in looks:
        title = f"### `{one.case.name}`: {one.case.about}; {TITLES[one.target]}"
        parts += [title, table(one.rooms)]
    return "\n\n".join(parts) + "\n"


def _look(case: Case, name: str, beside_name: str, cores: Cores, seconds: float) -> Look:
    """Each is measured undisturbed; then the target is measured again, under py-spy."""
    plan = Plan(cores, rounds=1, seconds=seconds / 2)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(site_folder()))
        folder.chmod(0o755)
        upstream = open_upstream(case, plan, folder, stack)
        target, beside = (
            _bench(case, one, place, upstream, plan, folder, stack)
            for place, one in enumerate((name, beside_name), start=1)
        )
        beside.measure(plan)
        assert target.target.process is not None
        pid = target.target.process.pid
        before, began = kernel_seconds(pid), target.made
        target.measure(plan)
        kernel_us = (kernel_seconds(pid) - before) / (target.made - began) * 1e6
        spy = _spy(pid, folder / "stacks", int(seconds) - 1)
        try:
            target.measure(Plan(cores, rounds=1, seconds=seconds))
        finally:
            spy.wait(timeout=60)
        say(f"{case.name}: {name}: looked at")
        found = rooms((folder / "stacks").read_text())
        undisturbed, watched = target.samples
        held = found.total() / (SAMPLES_A_SECOND * (int(seconds) - 1))
        return Look(
            case, name, undisturbed["cpu_us"], kernel_us,
            held / watched["requests_per_second"] * 1e6,
            beside_name, beside.samples[0]["cpu_us"], found,
        )  # fmt: skip


def _bench(
    case: Case,
    name: str,
    place: int,
    upstream: Upstream,
    plan: Plan,
    folder: Path,
    stack: contextlib.ExitStack,
) -> Bench:
    """A target that runs and is warm."""
    own = folder / name
    own.mkdir()
    site = Site(own, plan.cores.target, upstream.ports, upstream.ca, upstream.reply.body)
    bench = Bench(case, name, start(name, site, stack), upstream, own, place * NUMBERS_EACH)
    bench.warm(plan)
    return bench


def _spy(pid: int, raw: Path, seconds: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *(_py_spy(), "record", "--gil", "--nonblocking", "--format", "raw"),
            *("--rate", str(SAMPLES_A_SECOND), "--duration", str(seconds)),
            *("--output", raw, "--pid", str(pid)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _py_spy() -> str:
    beside = Path(sys.executable).with_name("py-spy")
    found = str(beside) if beside.exists() else shutil.which("py-spy")
    if found is None:
        raise MissingTool("no py-spy: pip install -e '.[bench]' (make bench does)")
    return found
