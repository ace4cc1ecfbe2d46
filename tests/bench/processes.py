"""Processes that are pinned to a core and measured: CPU time and memory of a whole tree.

The target has a core for itself; the load generator, the mock upstream and the stores have the
other one, on which the benchmark itself runs, so that all it starts is there unless it says so.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench.install import MissingTool

OWN_DESCRIPTORS: Final = 256
"""Of a process, for stores, pipes and answers that it keeps."""
STOP_SECONDS: Final = 30.0
QUIET_SECONDS: Final = 0.05
QUIET_SHARE: Final = 0.1
"""Of a core: a process that uses less has nothing left to do for the requests before."""


@dataclass(frozen=True, slots=True)
class Cores:
    """``target`` is what is measured on, ``others`` where everything else runs."""

    target: int
    others: int


def cores() -> Cores:
    """Two of those that this process may use; on a machine with one, both are that one."""
    usable = sorted(os.sched_getaffinity(0))
    return Cores(usable[0], usable[1 if len(usable) > 1 else 0])


def stay_off_the_target(of: Cores) -> None:
    """This process, and what it starts from now on."""
    os.sched_setaffinity(0, {of.others})


def raise_file_limit() -> None:
    """To the hard limit: a request in flight has two sockets in a proxy."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def workers_for(connections: int) -> int:
    """In how many workers a gateway has room for so many calls at once: each wants two descriptors
    for a connection, two for a call (``gateway/descriptors.py``), and some of its own. Raises
    ``MissingTool`` where the generator has not enough for itself."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit == resource.RLIM_INFINITY:
        return 1
    if (wanted := connections + OWN_DESCRIPTORS) > limit:
        raise MissingTool(f"{wanted:,} file descriptors are wanted, ulimit -Hn is {limit:,}")
    return -(-4 * connections // (limit - OWN_DESCRIPTORS))


class Process:
    """A command on one core. What it says goes to ``log``, its standard output to ``stdout`` where
    that is named."""

    def __init__(
        self,
        command: Sequence[str | Path],
        core: int,
        log: Path,
        *,
        stdout: Path | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        def pin() -> None:
            os.sched_setaffinity(0, {core})
            raise_file_limit()

        self.log = log
        self._stopped = False
        with log.open("wb") as said, (stdout or log).open("ab") as out:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=said,
                env={**os.environ, **(environment or {})},
                cwd=folder,
                preexec_fn=pin,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid)

    def rss_bytes(self) -> int:
        return sum(_memory(pid, "VmRSS") for pid in tree(self.pid))

    def peak_bytes(self) -> int:
        """The most since ``forget_peak``; of several processes the sum of each one's most."""
        return sum(_memory(pid, "VmHWM") for pid in tree(self.pid))

    def forget_peak(self) -> None:
        for pid in tree(self.pid):
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def wait_quiet(self, timeout: float = 10.0) -> None:
        """Until it does nothing more: answers are settled and logged after they are sent."""
        deadline = time.monotonic() + timeout
        before = self.cpu_seconds()
        while time.monotonic() < deadline:
            time.sleep(QUIET_SECONDS)
            now = self.cpu_seconds()
            if now - before < QUIET_SECONDS * QUIET_SHARE:
                return
            before = now

    def stop(self) -> None:
        """SIGTERM, and after a while SIGKILL, to all of its session. Nothing, once it has been
        stopped."""
        if self._stopped:
            return
        self._stopped = True
        if self.running:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def tree(pid: int) -> list[int]:
    """A process and all that it started and that still run."""
    found = [pid]
    for one in found:
        for task in _tasks(one):
            with contextlib.suppress(OSError):
                found.extend(map(int, (task / "children").read_text().split()))
    return found


def move(pid: int, core: int) -> None:
    """All of a process's threads to a core; those that it starts later follow."""
    for task in _tasks(pid):
        os.sched_setaffinity(int(task.name), {core})


def cpu_seconds(pid: int) -> float:
    """Of a process and all that it started and that still run."""
    return sum(_cpu_seconds(one) for one in tree(pid))


def kernel_seconds(pid: int) -> float:
    """As ``cpu_seconds``, in system calls and page faults."""
    return sum(_kernel_seconds(one) for one in tree(pid))


def _tasks(pid: int) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(Path(f"/proc/{pid}/task").iterdir())
    return []


def _cpu_seconds(pid: int) -> float:
    """By its POSIX CPU clock: all threads, to the nanosecond."""
    with contextlib.suppress(OSError):
        return time.clock_gettime_ns((~pid << 3) | 2) / 1e9
    return 0.0


def _kernel_seconds(pid: int) -> float:
    with contextlib.suppress(OSError):
        # Behind the name, which may have any characters: proc_pid_stat(5), field 15.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[12]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _memory(pid: int, name: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
