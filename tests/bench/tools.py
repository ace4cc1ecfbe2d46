"""The C programs of the benchmark: built when first needed, started, asked, stopped.

::

    with Mock(Reply(folder / "S.http"), Reply(folder / "E.http", delay_ms=50)) as mock:
        done = load(mock.ports[0], folder / "S.request", connections=8, seconds=10)
        assert done.requests == mock.stats()[mock.ports[0]].requests
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypedDict, Unpack

HERE: Final = Path(__file__).parent
BUILT: Final = HERE.parents[1] / ".tools" / "bench"
FLAGS: Final = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-D_GNU_SOURCE")
COMPILERS: Final = ("cc", "gcc", "clang")
TIMEOUT_SECONDS: Final = 700


class BuildError(Exception):
    """A program cannot be built here; it says what to install, or why not."""


class LoadError(Exception):
    """The load generator could not run: its message."""


def missing() -> str:
    """Why the programs cannot be built here, or nothing where they are."""
    try:
        build("mock")
        build("load")
    except BuildError as error:
        return str(error)
    return ""


def build(name: str) -> Path:
    """The program of ``NAME.c``, compiled if it has changed. Raises ``BuildError``."""
    sources = [HERE / f"{name}.c", *sorted(HERE.glob("*.h"))]
    digest = hashlib.sha256(b"\0".join([" ".join(FLAGS).encode(), *map(Path.read_bytes, sources)]))
    program = BUILT / f"{name}-{digest.hexdigest()[:16]}"
    if program.exists():
        return program
    wanted = (os.environ["CC"],) if os.environ.get("CC") else COMPILERS
    compiler = next(filter(None, map(shutil.which, wanted)), None)
    if compiler is None:
        raise BuildError(
            f"no C compiler ({', '.join(wanted)}) to build tests/bench/{name}.c with; "
            "Debian: apt install gcc libc6-dev"
        )
    BUILT.mkdir(parents=True, exist_ok=True)
    unfinished = program.with_name(f"{program.name}.{os.getpid()}")
    done = subprocess.run(
        [compiler, *FLAGS, "-o", str(unfinished), str(sources[0])],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BuildError(
            f"{compiler} cannot build tests/bench/{name}.c (Linux with glibc or musl and their "
            f"headers are needed; Debian: apt install gcc libc6-dev):\n{done.stderr.strip()}"
        )
    unfinished.replace(program)
    return program


@dataclass(frozen=True, slots=True)
class Reply:
    """What a port of the mock answers: the raw bytes of ``file``, and when.

    With ``gather``, answers are held until so many requests wait; ``delay_ms`` begins after that.
    With ``piece_bytes``, they go out in pieces with ``gap_ms`` between them. Port 0: a free one.
    """

    file: Path
    delay_ms: int = 0
    gather: int = 0
    piece_bytes: int = 0
    gap_ms: int = 0
    port: int = 0

    def options(self) -> list[str]:
        options = ["--port", str(self.port), "--reply", str(self.file)]
        numbers = {
            "--delay": self.delay_ms,
            "--gather": self.gather,
            "--piece": self.piece_bytes,
            "--gap": self.gap_ms,
        }
        for name, value in numbers.items():
            if value:
                options += [name, str(value)]
        return options


@dataclass(frozen=True, slots=True)
class Stats:
    """Of one port of the mock, since its start; waiting and connections are those of now."""

    requests: int
    bytes_in: int
    bytes_out: int
    now_waiting: int
    connections: int
    accepted: int


class Mock:
    """A running mock upstream; its ports are in the order of the replies.

    ``cores``: those it is bound to; None leaves it to the system.
    """

    def __init__(self, *replies: Reply, cores: Collection[int] | None = None) -> None:
        self._replies = replies
        self._cores = cores
        self._process: subprocess.Popen[str] | None = None
        self.control = 0
        self.ports: tuple[int, ...] = ()

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Returns when it listens. Raises ``BuildError`` and ``RuntimeError``."""
        command = [str(build("mock")), "--control", "0"]
        for reply in self._replies:
            command += reply.options()
        self._process = _start(command, self._cores)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        word, *ports = self._process.stdout.readline().split() or [""]
        if word != "listening":
            complaint = self._process.stderr.read().strip()
            self.stop()
            raise RuntimeError(f"the mock upstream did not start: {complaint}")
        self.control, *others = map(int, ports)
        self.ports = tuple(others)

    def stats(self) -> dict[int, Stats]:
        """By port."""
        url = f"http://127.0.0.1:{self.control}/stats"
        with urllib.request.urlopen(url, timeout=30) as answer:
            told: dict[str, dict[str, int]] = json.load(answer)["ports"]
        return {int(port): Stats(**numbers) for port, numbers in told.items()}

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Mock:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds; all zero where there was no answer."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float
    min: float


@dataclass(frozen=True, slots=True)
class Load:
    """What the load generator counted; see load.c. ``requests`` are whole answers of any status."""

    requests: int
    errors: int
    errors_by: dict[str, int]
    statuses: dict[int, int]
    reopened: int
    seconds: float
    cpu_seconds: float
    bytes_in: int
    bytes_out: int
    head_sample: str | None
    latency_us: Times
    first_us: Times

    @classmethod
    def read(cls, text: str) -> Load:
        told: dict[str, Any] = json.loads(text)
        told["statuses"] = {int(status): count for status, count in told["statuses"].items()}
        told["latency_us"] = Times(**told["latency_us"])
        told["first_us"] = Times(**told["first_us"])
        return cls(**told)

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds


class Loading:
    """A load generator at work."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def result(self) -> Load:
        """Waits for its end. Raises ``LoadError``; interrupted, it stops the generator."""
        try:
            said, complaint = self._process.communicate()
        except BaseException:
            self.stop()
            raise
        if self._process.returncode:
            raise LoadError(complaint.strip() or f"load ended with {self._process.returncode}")
        return Load.read(said)

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


class How(TypedDict, total=False):
    """How much is asked, and how: the options of load.c. One of ``requests``, ``seconds`` and
    ``once`` says when it ends. ``ramp_ms``: within which all have asked for the first time."""

    requests: int | None
    seconds: float | None
    once: bool
    warmup: int
    ramp_ms: int
    numbers: int | None
    keys: int | None
    timeout_seconds: int
    cores: Collection[int] | None


_OPTIONS: Final = {
    "requests": "--requests",
    "seconds": "--seconds",
    "warmup": "--warmup",
    "ramp_ms": "--ramp",
    "numbers": "--numbers",
    "keys": "--keys",
    "timeout_seconds": "--timeout",
}


def start_load(port: int, request: Path, connections: int, **how: Unpack[How]) -> Loading:
    """Starts the requests of the file ``request`` at 127.0.0.1:``port``. Raises ``BuildError``."""
    how = {"timeout_seconds": TIMEOUT_SECONDS, **how}
    command = [str(build("load")), "--port", str(port), "--request", str(request)]
    command += ["--connections", str(connections)]
    for name, value in how.items():
        if name in _OPTIONS and value is not None:
            command += [_OPTIONS[name], str(value)]
    if how.get("once"):
        command.append("--once")
    return Loading(_start(command, how.get("cores")))


def load(port: int, request: Path, connections: int, **how: Unpack[How]) -> Load:
    """As ``start_load``, waited for. Raises ``BuildError`` and ``LoadError``."""
    return start_load(port, request, connections, **how).result()


@contextmanager
def neighbour(kb: int, core: int) -> Iterator[None]:
    """Beside whoever else is on ``core`` a loop goes on over so much memory. Raises
    ``BuildError``."""
    process = _start([str(build("neighbour")), str(kb)], {core})
    try:
        yield
    finally:
        process.kill()
        process.communicate()


def _start(command: list[str], cores: Collection[int] | None) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    if cores is not None:
        os.sched_setaffinity(process.pid, cores)  # of one thread each: it binds the whole
    return process
