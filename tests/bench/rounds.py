"""A case is measured: its targets side by side, in rounds that are interleaved over them."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import trustme

from tests.bench import bodies, checks, tools
from tests.bench.cases import Case
from tests.bench.checks import CheckError
from tests.bench.install import MissingTool
from tests.bench.processes import Cores, Process, workers_for
from tests.bench.results import CaseResult, Measured, Sample, together
from tests.bench.targets import Site, StartError, Target, TlsFront
from tests.bench.variants import row, site_folder, start

MB: Final = 1_000_000
WATCH_SECONDS: Final = 0.2
WARM_CONNECTIONS: Final = 64
SAME_NUMBER: Final = "000000000000"
PATIENCE_SECONDS: Final = 180
ALMOST_ALL: Final = 0.99
NUMBERS_EACH: Final = 10_000_000_000
PROGRESS: Final = ("cpu_us", "requests_per_second", "p50_ms", "in_flight", "rss_kb_per_request")


@dataclass(frozen=True, slots=True)
class Plan:
    """``seconds`` for each target in each round, ``warm_seconds`` before the first. Of a case that
    is long there are at most ``long_rounds``."""

    cores: Cores
    rounds: int
    seconds: float = 3.0
    warm_seconds: float = 1.5
    long_rounds: int = 3


def say(text: str) -> None:
    """With the time: a run is long."""
    print(f"bench {time.strftime('%H:%M:%S')}: {text}", file=sys.stderr, flush=True)


@dataclass
class Upstream:
    """The mock behind a case; ``ports`` by name, those that targets know."""

    mock: tools.Mock
    ports: Mapping[str, int]
    ca: Path | None
    reply: bodies.Reply

    def requests(self) -> int:
        return sum(port.requests for port in self.mock.stats().values())

    def waiting(self) -> int:
        return sum(port.now_waiting for port in self.mock.stats().values())


@dataclass
class Bench:
    """A target in a case. Its requests have numbers that no other's of the case has."""

    case: Case
    name: str
    target: Target
    upstream: Upstream
    folder: Path
    first_number: int
    made: int = 0
    samples: list[Sample] = field(default_factory=list)
    failure: str | None = None

    def warm(self, plan: Plan) -> None:
        """One answer is looked at byte by byte, then there is load that is not measured. Raises
        ``CheckError``."""
        where = "warm" if self.case.once else "bench"
        address = self.target.address(where)
        question = self._question(address.model, self._number())
        answer = checks.ask(address, question)
        self.made += 1
        checks.check_answer(answer, self.upstream.reply.body, exact=self.target.exact)
        if self.case.cached and self.target.keeps_books:
            self.made += checks.wait_kept(self.target, address, question)
        self._load(where, min(self.case.connections, WARM_CONNECTIONS), plan.warm_seconds)

    def measure(self, plan: Plan) -> None:
        """One round. Raises ``CheckError``."""
        process = self.target.process
        if process is not None:
            process.wait_quiet()
            process.forget_peak()
        idle = process.rss_bytes() if process is not None else 0
        before = _cpu(process)
        with self._watching() as seen:
            done = self._load("bench", self.case.connections, plan.seconds)
        if process is not None:
            process.wait_quiet()
        spent = _cpu(process) - before
        sample = sample_of(done)
        if process is not None:
            peak = process.peak_bytes()
            sample["cpu_us"] = spent / done.requests * 1e6
            sample["rss_idle_mb"] = idle / MB
            sample["rss_peak_mb"] = peak / MB
            self._add_growth(sample, peak - idle, done.requests, max(seen, default=0))
        self.samples.append(sample)

    def _add_growth(
        self, sample: dict[str, float], growth: int, requests: int, in_flight: int
    ) -> None:
        """Above what it had before. Memory is divided only where all were in flight together, which
        ``gather`` sees to."""
        if self.case.delay_ms:
            sample["in_flight"] = in_flight
        together = self.case.gather > 0 or in_flight >= ALMOST_ALL * requests
        if self.case.once and together:
            sample["rss_kb_per_request"] = growth / requests / 1024

    def finish(self) -> None:
        """It ends, and its books are looked at. Raises ``CheckError``."""
        self.target.stop()
        booked = self.target.books()
        if booked is not None:
            checks.check_books(booked, self.made, cached=self.case.cached)

    def _load(self, where: str, connections: int, seconds: float) -> tools.Load:
        address = self.target.address(where)
        request = self._question(address.model, bodies.NUMBER)
        raw = bodies.raw_request(request, address.port, address.headers)
        once = self.case.once and where == "bench"
        before = self.upstream.requests()
        done = tools.load(
            address.port,
            bodies.write(self.folder, "request", raw),
            connections,
            seconds=None if once else seconds,
            once=once,
            ramp_ms=self.case.ramp_ms if where == "bench" else 0,
            numbers=self.first_number + self.made,
            timeout_seconds=PATIENCE_SECONDS + (self.case.delay_ms + self.case.ramp_ms) // 1000,
        )
        self.made += done.requests
        checks.check_load(done, self.upstream.reply.body, exact=self.target.exact)
        self._check_upstream(done.requests, self.upstream.requests() - before)
        return done

    def _check_upstream(self, made: int, seen: int) -> None:
        wanted = 0 if self.case.cached else made
        if seen != wanted:
            raise CheckError(f"the upstream saw {seen} requests, of {made}")

    def _question(self, model: str, number: str) -> bodies.Question:
        if self.case.cached:
            number = SAME_NUMBER
        if self.case.upload:
            return bodies.edit(model, self.case.upload, number)
        return bodies.question(model, stream=self.case.stream, number=number)

    def _number(self) -> str:
        return f"{self.first_number + self.made:012}"

    @contextlib.contextmanager
    def _watching(self) -> Iterator[list[int]]:
        """How many requests wait at the upstream, looked at every now and then, where answers are
        late."""
        seen: list[int] = []
        over = threading.Event()

        def watch() -> None:
            while not over.wait(WATCH_SECONDS):
                seen.append(self.upstream.waiting())

        watcher = threading.Thread(target=watch, name="watch")
        if self.case.delay_ms:
            watcher.start()
        try:
            yield seen
        finally:
            over.set()
            if self.case.delay_ms:
                watcher.join()


def sample_of(done: tools.Load) -> dict[str, float]:
    """What the load generator has seen, in the units of ``results.METRICS``."""
    return {
        "requests_per_second": done.requests_per_second,
        "mb_per_second": (done.bytes_in + done.bytes_out) / done.seconds / MB,
        "p50_ms": done.latency_us.p50 / 1000,
        "p99_ms": done.latency_us.p99 / 1000,
        "max_ms": done.latency_us.max / 1000,
        "first_ms": done.first_us.p50 / 1000,
    }


def run_case(case: Case, names: Sequence[str], plan: Plan) -> CaseResult:
    """Every target is started, warmed and measured; one whose answers are wrong is out. Of a case
    that asks once the rounds are repeats of all of that: the answers that a target keeps of one
    round would be memory of the next one's."""
    rounds = min(plan.rounds, plan.long_rounds) if case.long else plan.rounds
    if not case.once:
        return _run(case, names, replace(plan, rounds=rounds))
    repeats = [_run(case, names, replace(plan, rounds=1)) for _ in range(rounds)]
    return together(repeats)


def _run(case: Case, names: Sequence[str], plan: Plan) -> CaseResult:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(site_folder()))
        folder.chmod(0o755)
        try:
            upstream = open_upstream(case, plan, folder, stack)
        except (MissingTool, tools.BuildError) as error:
            say(f"{case.name} is SKIPPED: {error}")
            return CaseResult(case.name, case.about, {}, dict.fromkeys(names, str(error)))
        benches, failed, skipped = _start_all(case, names, upstream, plan, folder, stack)
        for bench in benches:
            _attempt(bench, "warm-up", lambda one: one.warm(plan))
        for number in range(plan.rounds):
            turn = number % max(len(benches), 1)
            for bench in (*benches[turn:], *benches[:turn]):
                _attempt(bench, f"{number + 1}/{plan.rounds}", lambda one: one.measure(plan))
        for bench in benches:
            _attempt(bench, "books", lambda one: one.finish())
    measured = {bench.name: Measured(bench.samples, bench.failure) for bench in benches}
    measured |= {name: Measured((), why) for name, why in failed.items()}
    return CaseResult(case.name, case.about, measured, skipped)


def _start_all(
    case: Case,
    names: Sequence[str],
    upstream: Upstream,
    plan: Plan,
    folder: Path,
    stack: contextlib.ExitStack,
) -> tuple[list[Bench], dict[str, str], dict[str, str]]:
    """Those that run, and why others failed or are skipped."""
    benches: list[Bench] = []
    failed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for place, name in enumerate(names, start=1):
        own = folder / name
        own.mkdir()
        site = Site(own, plan.cores.target, upstream.ports, upstream.ca, upstream.reply.body)
        called = name
        try:
            if name.startswith("gateway"):
                site = replace(site, workers=workers_for(case.connections))
                called = row(name, site.workers)
            target = start(name, site, stack)
        except MissingTool as error:
            say(f"{case.name}: {called} is SKIPPED: {error}")
            skipped[called] = str(error)
        except StartError as error:
            say(f"{case.name}: {called} FAILED: {error}")
            failed[called] = str(error)
        else:
            benches.append(Bench(case, called, target, upstream, own, place * NUMBERS_EACH))
    return benches, failed, skipped


def _attempt(bench: Bench, what: str, act: Callable[[Bench], None]) -> None:
    """Of what failed once nothing more is measured."""
    if bench.failure is not None:
        return
    try:
        act(bench)
    except (CheckError, tools.LoadError) as error:
        bench.failure = f"{what}: {error}"
        say(f"{bench.case.name}: {bench.name} FAILED: {bench.failure}")
        bench.target.stop()  # what it still waits for must not be counted as another's
        return
    line = ""
    if bench.samples and "/" in what:
        shown = bench.samples[-1]
        line = ", ".join(f"{name} {shown[name]:.5g}" for name in PROGRESS if name in shown)
    say(f"{bench.case.name}: {bench.name}: {what}  {line}")


def open_upstream(case: Case, plan: Plan, folder: Path, stack: contextlib.ExitStack) -> Upstream:
    """The mock; where the case wants TLS, behind an nginx that ends it. A case that asks once has
    a second upstream to warm up on, which answers at once."""
    reply = bodies.reply(case.reply)
    file = bodies.write(folder, "reply", reply.raw)
    replies = [tools.Reply(file, delay_ms=case.delay_ms, gather=case.gather), tools.Reply(file)]
    names = ["bench", "warm"] if case.once else ["bench"]
    mock = stack.enter_context(tools.Mock(*replies[: len(names)]))
    ports = dict(zip(names, mock.ports, strict=True))
    if not case.tls:
        return Upstream(mock, ports, None, reply)
    authority = trustme.CA()
    ca, certificate = folder / "ca.pem", folder / "certificate.pem"
    authority.cert_pem.write_to_path(ca)
    leaf = authority.issue_cert("127.0.0.1", "localhost")
    leaf.private_key_and_cert_chain_pem.write_to_path(certificate)
    own = folder / "tls"
    own.mkdir()
    front = TlsFront(Site(own, plan.cores.others, ports), certificate)
    stack.callback(front.stop)
    return Upstream(mock, front.ports, ca, reply)


def _cpu(process: Process | None) -> float:
    return process.cpu_seconds() if process is not None else 0.0
