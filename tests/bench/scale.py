"""What a request costs where several processes serve: two workers, two gateways."""

from __future__ import annotations

import contextlib
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import psycopg

from tests.bench import bodies, checks, tools
from tests.bench.checks import CheckError
from tests.bench.processes import Cores, cpu_seconds, move, tree
from tests.bench.rounds import MB, say
from tests.bench.study import Point, Table
from tests.bench.targets import Gateway, Site, StartError
from tests.bench.variants import site_folder
from tests.postgres import Postgres, run_postgres
from tests.redis_servers import say as ask_valkey
from tests.valkey import Valkey, run_valkey

RAMP_MS: Final = 300
"""Connections come one after the other: of those that come together one worker may take all."""
SERVE_SECONDS: Final = 30.0
SLOW_MS: Final = 200
SLOW_CONNECTIONS: Final = 10
"""About 50 requests a second: what a replica gets that has 1,000 in flight of 20 s each."""
PICTURES: Final = 40
SCRAPES: Final = 10
COMMITS: Final = 200
NUMBERS_EACH: Final = 10_000_000_000
PEPPER: Final = "bench-pepper-0123456789abcdef01"

ONE: Final = "one worker"
ONE_VALKEY: Final = "one worker, Valkey"
WORKERS: Final = "two workers, Valkey"
ALONE: Final = "one gateway, PostgreSQL and Valkey"
PAIR: Final = "two gateways, PostgreSQL and Valkey"
APART: Final = "two gateways, each with a PostgreSQL and a Valkey of its own"
"""What two of anything cost a machine, whose caches they share: the rest of ``PAIR`` is sharing."""
WORKERS_SPREAD: Final = "two workers, Valkey, a core each"
SPREAD: Final = "two gateways, PostgreSQL and Valkey, a core each"
"""The second one beside generator, mock and stores."""
BESIDE_LITTLE: Final = "one gateway, PostgreSQL and Valkey, beside a loop over 4 KB"
"""What anything costs it that has the core in turns with it, however little that touches."""
BESIDE_MUCH: Final = "one gateway, PostgreSQL and Valkey, beside a loop over 8 MB"
TURNS: Final = (
    ONE, WORKERS, ONE_VALKEY, WORKERS_SPREAD, SPREAD, BESIDE_MUCH, ALONE, PAIR, APART,
    BESIDE_LITTLE,
)  # fmt: skip
"""In each round, and backwards in the next: what is compared stands side by side."""
WITH_PICTURES: Final = (ONE_VALKEY, WORKERS, ALONE, PAIR)
"""Which of them are measured with whole pictures too."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A fleet to be started. Without PostgreSQL its one gateway has SQLite. ``apart``: each gateway
    has stores of its own. ``spread``: of two that serve one is on the core of everything else."""

    gateways: int = 1
    workers: int = 1
    valkey: bool = False
    postgres: bool = False
    apart: bool = False
    spread: bool = False
    beside_kb: int = 0


KINDS: Final[Mapping[str, Kind]] = {
    ONE: Kind(),
    ONE_VALKEY: Kind(valkey=True),
    WORKERS: Kind(workers=2, valkey=True),
    WORKERS_SPREAD: Kind(workers=2, valkey=True, spread=True),
    ALONE: Kind(valkey=True, postgres=True),
    PAIR: Kind(gateways=2, valkey=True, postgres=True),
    SPREAD: Kind(gateways=2, valkey=True, postgres=True, spread=True),
    APART: Kind(gateways=2, valkey=True, postgres=True, apart=True),
    BESIDE_LITTLE: Kind(valkey=True, postgres=True, beside_kb=4),
    BESIDE_MUCH: Kind(valkey=True, postgres=True, beside_kb=8 * 1024),
}


KEPT_NOWHERE: Final[Mapping[str, Mapping[str, object]]] = {
    "results": {"enabled": False},
    "cache": {"max_entry_bytes": 1},
}
"""The cache is looked into. Kept in Valkey, what is answered in a minute would be 20 GB."""


@dataclass(frozen=True, slots=True)
class Work:
    """What fleets are asked in their rounds: a reply of ``bodies``, with so many ``connections`` of
    each process that serves: each has as much to do at once as the one that is alone. ``changes``
    are laid over the settings."""

    title: str
    upstream: str
    reply: bodies.Reply
    connections: int
    changes: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


def works() -> dict[str, Work]:
    """By the names of their tables."""
    return {
        "busy": Work("Scale-out: 1.5 KB", "small", bodies.reply("S"), 32),
        "pictures": Work(
            "Scale-out: 2.7 MB, kept nowhere",
            "large", bodies.reply("M"), 8, KEPT_NOWHERE,
        ),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: many short rounds, for what disturbs a machine lasts longer."""

    rounds: int = 20
    seconds: float = 1.0
    warm_seconds: float = 2.0
    slow_seconds: float = 6.0


@dataclass(frozen=True, slots=True)
class Counts:
    """What the stores have done so far."""

    valkey_seconds: float = 0.0
    valkey_commands: float = 0.0
    valkey_trips: float = 0.0
    valkey_bytes: float = 0.0
    postgres_seconds: float = 0.0
    commits: float = 0.0
    syncs: float = 0.0
    wal_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Stores:
    """What gateways share."""

    valkey: Valkey | None
    postgres: Postgres | None
    database: str = ""

    def settings(self) -> dict[str, object]:
        said: dict[str, object] = {"pepper": PEPPER}
        if self.valkey is not None:
            said["redis"] = self.valkey.url
        if self.database:
            said["database"] = self.database
        return said


@dataclass
class Fleet:
    """Gateways with stores that are nobody else's, on the core of the target if not ``spread``.
    Of several ``stores`` each gateway has its own. ``made``: requests of each gateway."""

    kind: Kind
    work: Work
    core: int
    folder: Path
    gateways: list[Gateway]
    stores: list[Stores]
    numbers: int
    made: list[int]
    samples: dict[str, list[float]] = field(default_factory=dict)

    def load(
        self, upstream: str, reply: bodies.Reply, connections: int, **how: Any
    ) -> list[tools.Load]:
        """All of its gateways at the same time. Raises ``CheckError``."""
        loads = []
        for place, gateway in enumerate(self.gateways):
            address = gateway.address(upstream)
            raw = bodies.raw_request(
                bodies.question(address.model), address.port, address.headers
            )  # fmt: skip
            file = bodies.write(self.folder, f"request-{place}", raw)
            numbers = self.numbers + self.made[place] + place * NUMBERS_EACH // 10
            loads.append(
                tools.start_load(
                    address.port, file, connections, numbers=numbers, ramp_ms=RAMP_MS, **how
                )
            )
        done = [loading.result() for loading in loads]
        for place, one in enumerate(done):
            self.made[place] += one.requests
            checks.check_load(one, reply.body, exact=True)
        return done

    def load_work(self, seconds: float) -> list[tools.Load]:
        """Its own, for so long. Raises ``CheckError``."""
        connections = self.work.connections * self.kind.workers
        return self.load(self.work.upstream, self.work.reply, connections, seconds=seconds)

    def cpu(self) -> float:
        return sum(gateway.process.cpu_seconds() for gateway in self.gateways)

    def wait_quiet(self) -> None:
        for gateway in self.gateways:
            gateway.process.wait_quiet()

    def counts(self) -> Counts:
        found: dict[str, float] = defaultdict(float)
        for stores in self.stores:
            if stores.valkey is not None:
                said = _info(stores.valkey.port)
                found["valkey_seconds"] += cpu_seconds(stores.valkey.process.pid)
                found["valkey_commands"] += float(said["total_commands_processed"])
                found["valkey_trips"] += float(said["total_reads_processed"])
                found["valkey_bytes"] += float(said["total_net_input_bytes"])
            if stores.postgres is not None:
                found["postgres_seconds"] += cpu_seconds(stores.postgres.process.pid)
                for name, value in _postgres_counts(stores.database).items():
                    found[name] += value
        return Counts(**found)


@dataclass
class Fleets:
    """Those that have the same work. One that fails once is not measured again."""

    work: Work
    labels: Sequence[str]
    running: dict[str, Fleet] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def attempt(self, label: str, act: Callable[[Fleet], object]) -> None:
        """Nothing, where it has failed before or was not started."""
        if label not in self.running or label in self.failures:
            return
        try:
            act(self.running[label])
        except (CheckError, tools.LoadError, psycopg.Error, OSError) as error:
            self.fail(label, error)

    def fail(self, label: str, error: Exception) -> None:
        self.failures[label] = str(error)
        say(f"scale: {label} FAILED: {error}")

    def table(self) -> Table:
        points = []
        for place, label in enumerate(self.labels):
            samples = self.running[label].samples if label in self.running else {}
            points.append(Point(label, place, samples, self.failures.get(label)))
        each = f"{self.work.connections} at a time for each process that serves"
        return Table(f"{self.work.title}, {each}", "who serves", points)


def measure(
    cores: Cores,
    sizes: Sizes,
    labels: Sequence[str] = tuple(KINDS),
    with_pictures: Sequence[str] = WITH_PICTURES,
) -> tuple[dict[str, Table], dict[str, float]]:
    """The tables by name, and what was measured of the stores alone."""
    of = works()
    small, large = of["busy"].reply, of["pictures"].reply
    slow: dict[str, dict[str, list[float]]] = {}
    numbers: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(site_folder()))
        folder.chmod(0o755)
        file = bodies.write(folder, "S", small.raw)
        mock = stack.enter_context(
            tools.Mock(
                tools.Reply(file),
                tools.Reply(file, delay_ms=SLOW_MS),
                tools.Reply(bodies.write(folder, "M", large.raw)),
            )
        )
        ports = dict(zip(("small", "slow", "large"), mock.ports, strict=True))
        serving = partial(_serving, cores, ports, sizes.warm_seconds)
        with serving(folder / "busy", of["busy"], labels) as busy:
            _measure_rounds(busy, sizes)
            for label in (ONE_VALKEY, ALONE):
                samples = slow.setdefault(label, {})
                busy.attempt(label, partial(_measure_slow, samples, small, sizes.slow_seconds))
            busy.attempt(ALONE, lambda one: numbers.update(_measure_alone(one, large)))
        with serving(folder / "pictures", of["pictures"], with_pictures) as pictures:
            _measure_rounds(pictures, sizes)
    tables = {
        "busy": busy.table(),
        "pictures": pictures.table(),
        "slow": Table(
            "One replica at 50 requests a second",
            "who serves",
            [Point(label, place, said) for place, (label, said) in enumerate(slow.items()) if said],
        ),
    }
    return tables, numbers


@contextlib.contextmanager
def _serving(
    cores: Cores,
    ports: Mapping[str, int],
    warm_seconds: float,
    folder: Path,
    work: Work,
    labels: Sequence[str],
) -> Iterator[Fleets]:
    """All of them started, and warm; in the end stopped, and their books looked at."""
    folder.mkdir()
    fleets = Fleets(work, labels)
    with contextlib.ExitStack() as stack:
        for place, label in enumerate(labels, start=1):
            own = folder / f"fleet-{place}"
            own.mkdir()
            try:
                fleets.running[label] = _start(label, work, own, cores, ports, place, stack)
            except StartError as error:
                fleets.fail(label, error)
        for label in labels:
            # Plans, caches and pages are then what they stay.
            fleets.attempt(label, lambda one: one.load_work(warm_seconds))
        yield fleets
        for label in labels:
            fleets.attempt(label, _finish)


def _measure_rounds(fleets: Fleets, sizes: Sizes) -> None:
    turns = [label for label in TURNS if label in fleets.labels]
    for number in range(sizes.rounds):
        for label in turns if number % 2 == 0 else reversed(turns):
            fleets.attempt(label, lambda one: _measure_round(one, sizes.seconds))
        say(f"scale: {fleets.work.title}: {number + 1}/{sizes.rounds}")


def _start(
    label: str,
    work: Work,
    folder: Path,
    cores: Cores,
    ports: Mapping[str, int],
    place: int,
    stack: contextlib.ExitStack,
) -> Fleet:
    """Raises ``StartError``."""
    kind, stores = KINDS[label], []
    for _ in range(kind.gateways if kind.apart else 1):
        valkey = stack.enter_context(run_valkey()) if kind.valkey else None
        postgres = stack.enter_context(run_postgres(durable=True)) if kind.postgres else None
        database = postgres.fresh_database() if postgres is not None else ""
        stores.append(Stores(valkey, postgres, database))
    server = {"workers": kind.workers, "replicas": 1 if kind.apart else kind.gateways}
    gateways = []
    for number in range(kind.gateways):
        own = folder / f"gateway-{number}"
        own.mkdir()
        site, storage = Site(own, cores.target, ports), stores[number % len(stores)].settings()
        gateways.append(Gateway(site, {**work.changes, "storage": storage, "server": server}))
        stack.callback(gateways[-1].stop)
    if kind.spread:
        pids = [pid for one in gateways for pid in _processes(one.process.pid, kind.workers)]
        move(pids[-1], cores.others)
    made = [0] * kind.gateways
    numbers = (10 + place) * NUMBERS_EACH
    return Fleet(kind, work, cores.target, folder, gateways, stores, numbers, made)


def _metrics(port: int) -> str:
    url = f"http://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(url, timeout=SERVE_SECONDS) as answer:
        return str(answer.read(), "utf-8")


def _measure_round(fleet: Fleet, seconds: float) -> None:
    def load() -> list[tools.Load]:
        beside_kb = fleet.kind.beside_kb
        with tools.neighbour(beside_kb, fleet.core) if beside_kb else contextlib.nullcontext():
            return fleet.load_work(seconds)

    _measure(fleet, fleet.samples, load)


def _measure_slow(
    samples: dict[str, list[float]], reply: bodies.Reply, seconds: float, fleet: Fleet
) -> None:
    _measure(fleet, samples, lambda: fleet.load(
        "slow", reply, SLOW_CONNECTIONS, seconds=seconds
    ))  # fmt: skip


def _measure(fleet: Fleet, samples: dict[str, list[float]], act: Any) -> None:
    """CPU of the gateways and of their stores, from quiet to quiet."""
    fleet.wait_quiet()
    first = [gateway.process.pid for gateway in fleet.gateways]
    serving = [pid for one in first for pid in _processes(one, fleet.kind.workers)]
    by_process = {pid: cpu_seconds(pid) for pid in serving}
    counted, before = fleet.counts(), fleet.cpu()
    done: list[tools.Load] = act()
    fleet.wait_quiet()
    spent, now = fleet.cpu() - before, fleet.counts()
    requests = sum(one.requests for one in done)
    found = {
        "cpu_us": spent / requests * 1e6,
        "requests_per_second": sum(one.requests_per_second for one in done),
        "p50_ms": max(one.latency_us.p50 for one in done) / 1000,
    }
    if len(by_process) > 1:
        shares = [cpu_seconds(pid) - was for pid, was in by_process.items()]
        found["share_of_one"] = max(shares) / sum(shares)
    if fleet.kind.valkey:
        found["valkey_us"] = (now.valkey_seconds - counted.valkey_seconds) / requests * 1e6
        found["valkey_trips"] = (now.valkey_trips - counted.valkey_trips) / requests
        found["valkey_commands"] = (now.valkey_commands - counted.valkey_commands) / requests
    if fleet.kind.postgres:
        found |= {
            "postgres_us": (now.postgres_seconds - counted.postgres_seconds) / requests * 1e6,
            "postgres_commits": (now.commits - counted.commits) / requests,
            "postgres_syncs": (now.syncs - counted.syncs) / requests,
            "postgres_wal_kb": (now.wal_bytes - counted.wal_bytes) / requests / 1000,
            "connections": sum(_connections(stores.database) for stores in fleet.stores),
        }
    for name, value in found.items():
        samples.setdefault(name, []).append(value)


def _processes(pid: int, workers: int) -> list[int]:
    """The processes that answer: of several workers not the one that sees to them."""
    return [pid] if workers == 1 else tree(pid)[1:]


def _measure_alone(fleet: Fleet, large: bodies.Reply) -> dict[str, float]:
    """What the stores take of a picture, of a scrape, of a commit, each by itself."""
    [stores] = fleet.stores
    fleet.wait_quiet()
    before = fleet.counts()
    fleet.load("large", large, 4, requests=PICTURES)
    fleet.wait_quiet()
    after = fleet.counts()
    port, cpu = fleet.gateways[0].address("small").port, fleet.cpu()
    for _ in range(SCRAPES):
        scraped = _metrics(port)
    fleet.wait_quiet()
    last = fleet.counts()
    commit_ms, row_ms = _commit_ms(stores.database)
    return {
        "picture_mb": len(large.body) / MB,
        "picture_valkey_us": (after.valkey_seconds - before.valkey_seconds) / PICTURES * 1e6,
        "picture_valkey_mb": (after.valkey_bytes - before.valkey_bytes) / PICTURES / MB,
        "scrape_kb": len(scraped) / 1000,
        "scrape_cpu_ms": (fleet.cpu() - cpu) / SCRAPES * 1000,
        "scrape_postgres_ms": (last.postgres_seconds - after.postgres_seconds) / SCRAPES * 1000,
        "commit_ms": commit_ms,
        "row_ms": row_ms,
    }


def _commit_ms(database: str) -> tuple[float, float]:
    """The mean of a COMMIT that is on the disk, and of holding a row up to it: changed in one round
    trip, committed in the next."""
    commits = rows = 0.0
    with psycopg.connect(database) as db:
        db.execute("CREATE TABLE bench_row (id int PRIMARY KEY, n int NOT NULL)")
        db.execute("INSERT INTO bench_row VALUES (1, 0)")
        db.commit()
        for _ in range(COMMITS):
            db.execute("SELECT 1")
            began = time.perf_counter()
            db.execute("UPDATE bench_row SET n = n + 1 WHERE id = 1")
            changed = time.perf_counter()
            db.commit()
            over = time.perf_counter()
            commits += over - changed
            rows += over - began
        db.execute("DROP TABLE bench_row")
    return commits / COMMITS * 1000, rows / COMMITS * 1000


def _finish(fleet: Fleet) -> None:
    """All end, and their books are looked at."""
    for gateway in fleet.gateways:
        gateway.stop()
    count = len(fleet.stores)
    for place in range(count):
        made = sum(fleet.made[place::count])
        checks.check_books(fleet.gateways[place].books(), made, cached=False)


def _info(port: int) -> dict[str, str]:
    lines = ask_valkey(port, "INFO", "stats").decode().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _postgres_counts(database: str) -> dict[str, float]:
    """Commits are those of the gateways' writers, by their own numbers; the syncs are those that
    the server has noted down so far, which may be a second old."""
    with psycopg.connect(database, autocommit=True) as db:
        commits, wal = _row(
            db, "SELECT coalesce(sum(last), 0), pg_current_wal_lsn() - '0/0' FROM writer"
        )  # fmt: skip
        if db.info.server_version >= 180_000:
            (syncs,) = _row(db, "SELECT sum(fsyncs) FROM pg_stat_io WHERE object = 'wal'")
        else:
            (syncs,) = _row(db, "SELECT wal_sync FROM pg_stat_wal")
    return {"commits": float(commits), "wal_bytes": float(wal), "syncs": float(syncs or 0)}


def _connections(database: str) -> float:
    with psycopg.connect(database, autocommit=True) as db:
        (found,) = _row(
            db,
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'image-gateway'"
            " AND datname = current_database()",
        )
    return float(found)


def _row(db: psycopg.Connection[Any], question: str) -> tuple[Any, ...]:
    [found] = db.execute(question.encode()).fetchall()
    return tuple(found)
