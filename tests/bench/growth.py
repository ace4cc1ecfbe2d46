"""How cost grows: with the size of an answer, with requests in flight, with teams and keys."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench import bodies, checks, tools
from tests.bench.checks import CheckError
from tests.bench.growth_keys import measure_keys
from tests.bench.install import MissingTool
from tests.bench.processes import Cores, workers_for
from tests.bench.rounds import MB, say
from tests.bench.study import Point, Table
from tests.bench.targets import Gateway, Site, StartError
from tests.bench.variants import site_folder, start_gateway

SIZES: Final = {
    "1 KB": 1_000,
    "10 KB": 10_000,
    "100 KB": 100_000,
    "1 MB": MB,
    "2.7 MB": 2_700_000,
    "8 MB": 8 * MB,
    "20 MB": 20 * MB,
    "50 MB": 50 * MB,
}
BODY_CONNECTIONS: Final = 4
BODY_ROUNDS: Final = 3
BODY_BYTES: Final = 40 * MB
"""Of a size in a round, as far as the numbers of requests let it."""
BODY_REQUESTS: Final = (4, 1_000)

COUNTS: Final = (1, 10, 100, 1_000, 3_000, 9_000)
RATE: Final = 300
"""Requests a second at every count, so that nothing but the count differs: who waits for more of
them waits longer."""
WINDOWS: Final = 3
WINDOW_SECONDS: Final = 3.0
RSS_FROM: Final = 100
"""In flight: of fewer, a process's memory says nothing."""
FIRST_NUMBER: Final = 10_000_000_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: all of it, or as little as shows that it works."""

    bodies: Sequence[str] = tuple(SIZES)
    body_rounds: int = BODY_ROUNDS
    body_bytes: int = BODY_BYTES
    in_flight: Sequence[int] = COUNTS
    rate: int = RATE
    window_seconds: float = WINDOW_SECONDS
    keys: Sequence[int] = (10, 100, 1_000, 10_000, 100_000, 10)
    key_seconds: float = 3.0
    idle_seconds: float = 16.0
    """Longer than anything that a gateway does again and again rests."""


def measure(cores: Cores, sizes: Sizes) -> dict[str, Table]:
    """Every table, by its name."""
    return {
        "body": measure_bodies(cores, sizes),
        "in_flight": measure_in_flight(cores, sizes),
        "keys": measure_keys(cores, sizes.keys, sizes.key_seconds, sizes.idle_seconds),
    }


@contextlib.contextmanager
def gateway_before(
    cores: Cores, replies: dict[str, tools.Reply], workers: int = 1
) -> Iterator[_Setting]:
    """A gateway of its own before a mock with these replies."""
    with (
        site_folder() as name,
        tools.Mock(*replies.values()) as mock,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(name)
        ports = dict(zip(replies, mock.ports, strict=True))
        site = Site(folder, cores.target, ports, workers=workers)
        gateway = start_gateway(site, stack)
        try:
            yield _Setting(folder, gateway, mock, site)
        finally:
            gateway.stop()


@dataclass
class _Setting:
    folder: Path
    gateway: Gateway
    mock: tools.Mock
    site: Site
    made: int = 0

    def request(self, upstream: str) -> Path:
        address = self.gateway.address(upstream)
        raw = bodies.raw_request(
            bodies.question(address.model), address.port, address.headers
        )  # fmt: skip
        return bodies.write(self.folder, f"{upstream}.request", raw)

    def check(self, upstream: str, reply: bodies.Reply) -> None:
        """One answer is looked at byte by byte. Raises ``CheckError``."""
        question = bodies.question(upstream, number=f"{self.made:012}")
        self.made += 1
        checks.check_answer(
            checks.ask(self.gateway.address(upstream), question), reply.body, exact=True
        )

    def load(
        self, upstream: str, reply: bodies.Reply, connections: int, requests: int
    ) -> tools.Load:
        """Raises ``CheckError``."""
        port = self.gateway.address(upstream).port
        numbers = FIRST_NUMBER + self.made
        done = tools.load(
            port, self.request(upstream), connections, requests=requests, numbers=numbers
        )
        self.made += done.requests
        checks.check_load(done, reply.body, exact=True)
        return done

    def finish(self) -> None:
        """It ends, and its books are looked at. Raises ``CheckError``."""
        self.gateway.stop()
        checks.check_books(self.gateway.books(), self.made, cached=False)


def measure_bodies(cores: Cores, sizes: Sizes) -> Table:
    """One gateway, asked for answers of every size by turns."""
    title = f"Body size: JSON, {BODY_CONNECTIONS} at a time"
    answers = {label: bodies.json_reply(SIZES[label]) for label in sizes.bodies}
    samples: dict[str, dict[str, list[float]]] = {
        label: {"cpu_us": [], "rss_growth_mb": [], "p50_ms": []} for label in answers
    }
    failure = None
    with site_folder() as name:
        replies = {
            f"b{SIZES[label]}": tools.Reply(bodies.write(Path(name), label, answer.raw))
            for label, answer in answers.items()
        }
        try:
            with gateway_before(cores, replies) as setting:
                for label, answer in answers.items():
                    setting.check(f"b{SIZES[label]}", answer)
                for number in range(sizes.body_rounds):
                    for label, answer in answers.items():
                        _measure_body(setting, label, answer, sizes, samples[label])
                    say(f"growth: bodies {number + 1}/{sizes.body_rounds}")
                setting.finish()
        except (CheckError, StartError, tools.LoadError) as error:
            failure = str(error)
            say(f"growth: bodies FAILED: {failure}")
    points = [
        Point(label, len(answer.body) / MB, samples[label], failure)
        for label, answer in answers.items()
    ]
    return Table(title, "body", points)


def _measure_body(
    setting: _Setting,
    label: str,
    answer: bodies.Reply,
    sizes: Sizes,
    samples: dict[str, list[float]],
) -> None:
    least, most = BODY_REQUESTS
    requests = min(most, max(least, sizes.body_bytes // SIZES[label]))
    process = setting.gateway.process
    process.wait_quiet()
    process.forget_peak()
    idle, before = process.rss_bytes(), process.cpu_seconds()
    done = setting.load(f"b{SIZES[label]}", answer, min(BODY_CONNECTIONS, requests), requests)
    process.wait_quiet()
    samples["cpu_us"].append((process.cpu_seconds() - before) / done.requests * 1e6)
    samples["rss_growth_mb"].append((process.peak_bytes() - idle) / MB)
    samples["p50_ms"].append(done.latency_us.p50 / 1000)


def measure_in_flight(cores: Cores, sizes: Sizes) -> Table:
    """A gateway for each count, asked at the same rate: so many are in flight because each is
    answered so late. It has more workers where one may not open so many files, and is called so."""
    points: list[Point] = []
    skipped: dict[str, str] = {}
    for count in sizes.in_flight:
        samples: dict[str, list[float]] = {"cpu_us": []}
        failure, label = None, f"{count:,}"
        try:
            workers = workers_for(count)
        except MissingTool as missing:
            say(f"growth: {label} in flight is SKIPPED: {missing}")
            skipped[label] = str(missing)
            continue
        if workers > 1:
            label = f"{label}, {workers} workers"
        try:
            _measure_count(cores, count, workers, sizes, samples)
        except (CheckError, StartError, tools.LoadError) as error:
            failure = str(error)
            say(f"growth: {label} in flight FAILED: {failure}")
        points.append(Point(label, count, samples, failure))
        say(f"growth: {label} in flight")
    title = f"Requests in flight: 1.5 KB, {sizes.rate} a second at every count"
    return Table(title, "in flight", points, skipped)


def _measure_count(
    cores: Cores, count: int, workers: int, sizes: Sizes, samples: dict[str, list[float]]
) -> None:
    """Looked at while it goes on: in windows in which as many come as are answered."""
    answer = bodies.reply("S")
    delay_ms = max(1, round(count / sizes.rate * 1000))
    with site_folder() as name:
        file = bodies.write(Path(name), "reply", answer.raw)
        replies = {"late": tools.Reply(file, delay_ms=delay_ms), "warm": tools.Reply(file)}
        with gateway_before(cores, replies, workers) as setting:
            process = setting.gateway.process
            setting.check("warm", answer)
            setting.load("warm", answer, 32, 500)
            process.wait_quiet()
            idle = process.rss_bytes()
            # Half a second more: the last ones to begin are on their way.
            rise_seconds = delay_ms / 1000 + 0.5
            loading = tools.start_load(
                setting.gateway.address("late").port,
                setting.request("late"),
                count,
                seconds=rise_seconds + WINDOWS * sizes.window_seconds,
                ramp_ms=delay_ms,
                numbers=FIRST_NUMBER + setting.made,
            )
            try:
                time.sleep(rise_seconds)
                _watch_windows(setting, count, idle, sizes, samples)
            except BaseException:
                loading.stop()
                raise
            done = loading.result()
            setting.made += done.requests
            checks.check_load(done, answer.body, exact=True)
            samples["p50_ms"] = [done.latency_us.p50 / 1000 - delay_ms]
            process.wait_quiet()
            setting.finish()


def _watch_windows(
    setting: _Setting, count: int, idle: int, sizes: Sizes, samples: dict[str, list[float]]
) -> None:
    process, port = setting.gateway.process, setting.site.ports["late"]
    for _ in range(WINDOWS):
        seen, spent = setting.mock.stats()[port], process.cpu_seconds()
        time.sleep(sizes.window_seconds)
        now, cpu = setting.mock.stats()[port], process.cpu_seconds()
        if count >= RSS_FROM:
            samples.setdefault("upstream_waiting", []).append(now.now_waiting)
            each = (process.rss_bytes() - idle) / count / 1024
            samples.setdefault("rss_kb_per_request", []).append(each)
        if now.requests == seen.requests:
            raise CheckError("nothing was answered in a window")
        samples["cpu_us"].append((cpu - spent) / (now.requests - seen.requests) * 1e6)
