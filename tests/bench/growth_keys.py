"""How cost grows with teams and keys: rows of the directory, each key of a team of its own."""

from __future__ import annotations

import http.client
import sqlite3
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from gateway.domain import keys
from gateway.domain.team import Key, Limits, Team
from gateway.stores.rows import key_row, team_row
from tests.bench import bodies, checks, tools
from tests.bench.checks import CheckError
from tests.bench.processes import Cores
from tests.bench.rounds import MB, say
from tests.bench.study import Point, Table
from tests.bench.targets import HUGE, Gateway, Site, StartError
from tests.bench.variants import site_folder

SECRET: Final = "bench-directory-key-"
"""Its number follows: twelve digits, of the load generator."""
CONNECTIONS: Final = 32
ROUNDS: Final = 3
SCRAPES: Final = 3
PATIENCE_SECONDS: Final = 120.0
IDLE_PAUSE_SECONDS: Final = 0.1
FIRST_NUMBER: Final = 20_000_000_000
LIMITS: Final = Limits(
    requests_per_minute=HUGE,
    images_per_minute=HUGE,
    concurrent_requests=HUGE,
    budget_day=10**15,
    budget_month=10**15,
)


def measure_keys(cores: Cores, counts: Sequence[int], seconds: float, idle_seconds: float) -> Table:
    """One gateway, whose directory grows; a count less than the one before is asked for again, to
    see what the rest of the directory costs those who have few. Every request is of the next key,
    so that of many keys none is remembered."""
    answer = bodies.reply("S")
    points = []
    with site_folder() as name:
        folder = Path(name)
        file = bodies.write(folder, "reply", answer.raw)
        with tools.Mock(tools.Reply(file)) as mock:
            gateway = Gateway(Site(folder, cores.target, {"bench": mock.ports[0]}))
            try:
                keyed = _Keyed(gateway, folder, answer, seconds, idle_seconds)
                for place, count in enumerate(counts):
                    points.append(keyed.measure(count, again=count in counts[:place]))
                keyed.finish(points)
            except StartError as error:
                say(f"growth: keys FAILED: {error}")
            finally:
                gateway.stop()
    title = f"Teams and keys: 1.5 KB, {CONNECTIONS} at a time, a team for each key"
    return Table(title, "keys", points)


class _Keyed:
    """A gateway whose callers have keys of the directory."""

    def __init__(
        self,
        gateway: Gateway,
        folder: Path,
        answer: bodies.Reply,
        seconds: float,
        idle_seconds: float,
    ) -> None:
        self._gateway = gateway
        self._data = folder / "data"
        self._answer = answer
        self._seconds = seconds
        self._idle_seconds = idle_seconds
        self._there = 0
        self._made = 0
        address = gateway.address("bench")
        self._port = address.port
        headers = {"authorization": f"Bearer {SECRET}{'#' * 12}"}
        raw = bodies.raw_request(bodies.question(address.model), address.port, headers)
        self._request = bodies.write(folder, "request", raw)

    def measure(self, count: int, *, again: bool) -> Point:
        samples: dict[str, list[float]] = {}
        failure = None
        try:
            self._fill(count)
            self._load(count, 0.5)  # Not measured.
            for _ in range(ROUNDS):
                self._measure_load(count, samples)
            _measure_idle(self._gateway, self._port, self._idle_seconds, samples)
            for _ in range(SCRAPES):
                _measure_scrape(self._gateway, self._port, samples)
        except (CheckError, tools.LoadError) as error:
            failure = str(error)
            say(f"growth: {count} keys FAILED: {failure}")
        say(f"growth: {count:,} keys")
        label = f"{count:,} of {self._there:,}" if again else f"{count:,}"
        return Point(label, count, samples, failure)

    def finish(self, points: Sequence[Point]) -> None:
        """It ends, and its books are looked at."""
        self._gateway.stop()
        if all(point.failure is None for point in points):
            checks.check_books(self._gateway.books(), self._made, cached=False)

    def _fill(self, count: int) -> None:
        """As commands would, in one transaction."""
        if count <= self._there:
            return
        pepper = (self._data / "gateway.pepper").read_bytes().strip()
        numbers = range(self._there, count)
        teams = [Team(f"team-{number:06}", limits=LIMITS) for number in numbers]
        made = [
            key_row(
                Key(f"key{number:06}", f"team-{number:06}", pepper=keys.pepper_id(pepper)),
                keys.digest(pepper, f"{SECRET}{number:012}"),
            )
            for number in numbers
        ]
        with closing(sqlite3.connect(self._data / "gateway.db", timeout=60)) as db, db:
            db.executemany(
                "INSERT INTO team (models, limits, cache_enabled, disabled, time_zone, id)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                map(team_row, teams),
            )
            db.executemany(
                "INSERT INTO key (id, digest, team, name, models, limits, created, expires,"
                " disabled, revoked, pepper) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                made,
            )
        self._there = count

    def _load(self, count: int, seconds: float) -> tools.Load:
        done = tools.load(
            self._port,
            self._request,
            CONNECTIONS,
            seconds=seconds,
            # Two in each request: the key's and the prompt's.
            numbers=FIRST_NUMBER + 2 * self._made,
            keys=count,
        )
        self._made += done.requests
        checks.check_load(done, self._answer.body, exact=True)
        return done

    def _measure_load(self, count: int, samples: dict[str, list[float]]) -> None:
        process = self._gateway.process
        process.wait_quiet()
        before = process.cpu_seconds()
        done = self._load(count, self._seconds)
        process.wait_quiet()
        found = {
            "cpu_us": (process.cpu_seconds() - before) / done.requests * 1e6,
            "p50_ms": done.latency_us.p50 / 1000,
            "rss_mb": process.rss_bytes() / MB,
        }
        for name, value in found.items():
            samples.setdefault(name, []).append(value)


def _measure_idle(
    gateway: Gateway, port: int, seconds: float, samples: dict[str, list[float]]
) -> None:
    """What is done while nobody asks for a picture, and for how long that holds up somebody who
    asks for something else now and then."""
    process = gateway.process
    began, before = time.monotonic(), process.cpu_seconds()
    waits = []
    while time.monotonic() - began < seconds:
        waits.append(_get(port, "/healthz")[0])
        time.sleep(IDLE_PAUSE_SECONDS)
    spent = process.cpu_seconds() - before
    found = {
        "idle_ms": spent / (time.monotonic() - began) * 1000,
        "idle_held_ms": max(waits) * 1000,
    }
    for name, value in found.items():
        samples.setdefault(name, []).append(value)


def _measure_scrape(gateway: Gateway, port: int, samples: dict[str, list[float]]) -> None:
    """One look at /metrics, and for how long it holds up whoever asks for something else."""
    process = gateway.process
    process.wait_quiet()
    over = threading.Event()
    waits: list[float] = []

    def ask_on() -> None:
        while not over.is_set():
            waits.append(_get(port, "/healthz")[0])

    other = threading.Thread(target=ask_on, name="other")
    before = process.cpu_seconds()
    spent, body = _get(port, "/metrics")
    process.wait_quiet()
    found = {
        "scrape_ms": spent * 1000,
        "scrape_cpu_ms": (process.cpu_seconds() - before) * 1000,
        "scrape_kb": len(body) / 1000,
    }
    other.start()
    try:
        _get(port, "/metrics")
    finally:
        over.set()
        other.join()
    found["scrape_held_ms"] = max(waits) * 1000
    for name, value in found.items():
        samples.setdefault(name, []).append(value)


def _get(port: int, path: str) -> tuple[float, bytes]:
    """Seconds, and what was answered. Raises ``CheckError``."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    try:
        connection.request("GET", path)
        said = connection.getresponse()
        body = said.read()
    except (OSError, http.client.HTTPException) as error:
        raise CheckError(f"{path}: no answer: {error!r}") from error
    finally:
        connection.close()
    if said.status != 200:
        raise CheckError(f"{path} answered {said.status}: {body[:300]!r}")
    return time.monotonic() - began, body
