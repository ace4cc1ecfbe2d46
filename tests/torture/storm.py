"""Real processes under load, while they are killed and frozen at random moments (T1).

::

    clients ──► gateways (each with workers) ──► an upstream that keeps its own bill
                    │            │
              PostgreSQL      Valkey          each of them may die (kill -9) or freeze (SIGSTOP)
              or SQLite

The upstream and the clients live in this process, which nobody kills.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psycopg

from gateway.sandbox.journal import Journal
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from tests.postgres import Postgres, run_postgres
from tests.processes import GatewayProcess, bill, wait_until
from tests.running import MODEL, TestClock, config_of
from tests.torture.verdict import Ledger, Notes, Query, Verdict, judge
from tests.valkey import Valkey, run_valkey

LEASE_SECONDS = 8
SWEEP_SECONDS = 1
CALL_SECONDS = 5
UPSTREAM_SECONDS = 0.15
TEAMS = 12
DOLLAR = 10**9
PEPPER = "torture-pepper-0123456789abcdef0123456789"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run, for how long."""

    seconds: float
    database: str = "postgres"
    gateways: int = 3
    workers: int = 2
    clients: int = 32
    seed: int = 20261122
    pause_seconds: tuple[float, float] = (0.3, 2.0)
    """Between two blows."""


@dataclass(slots=True)
class Outcome:
    """What was done, and what became of the money."""

    plan: Plan
    blows: Counter[str] = field(default_factory=Counter)
    """``kill gateway``, ``freeze postgres`` ... -> how often."""
    notes: Notes = field(default_factory=Notes)
    states: Counter[str] = field(default_factory=Counter)
    """How the holds ended: P, V, X."""
    billed: int = 0
    verdict: Verdict | None = None

    @property
    def kills(self) -> int:
        return sum(count for blow, count in self.blows.items() if blow.startswith("kill"))


class Storm:
    """One run: everything is started by ``run``, and ended by it."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._dice = random.Random(plan.seed)
        self._outcome = Outcome(plan)
        self._over = asyncio.Event()
        self._serving: list[GatewayProcess] = []
        self._every: list[GatewayProcess] = []
        # From a dollar, which a few dozen calls exhaust, to what no run can spend.
        self._budgets = {
            f"team{number}": DOLLAR // 4 * 3**number // (1 if number else 4)
            for number in range(TEAMS)
        }

    async def run(self) -> Outcome:
        with ExitStack() as stack:
            journal = Journal(records=5_000_000, body_bytes=0)
            sandbox = stack.enter_context(
                SandboxServer(TestClock(), journal=journal, latency_seconds=UPSTREAM_SECONDS)
            )
            sandbox.rules.add(Rule(payload_bytes=400))
            valkey = stack.enter_context(run_valkey())
            postgres: Postgres | None = None
            url = "sqlite:///data/gateway.db"
            if self._plan.database == "postgres":
                postgres = stack.enter_context(run_postgres(durable=True))
                url = postgres.fresh_database()
            config = self._configure(sandbox, valkey, url)
            stack.callback(self._end_all)
            for _ in range(self._plan.gateways):
                self._serving.append(await self._start(config))
            clients = [asyncio.create_task(self._client(n)) for n in range(self._plan.clients)]
            havoc = asyncio.create_task(self._havoc(config, valkey, postgres))
            await asyncio.sleep(self._plan.seconds)
            self._over.set()
            await asyncio.gather(havoc, *clients)
            await self._calm(config, url)
            outcome = self._outcome
            with _snapshot(url, self._folder) as query:
                ledger = Ledger.read(query)
            purchases = [(str(one.fields["prompt"]), bill(one)) for one in journal.billed]
            outcome.billed = len(purchases)
            outcome.states = Counter(hold.state for hold in ledger.holds)
            totals = {f"team:{team}|t|all": limit for team, limit in self._budgets.items()}
            outcome.verdict = judge(ledger, outcome.notes, purchases, totals)
            return outcome

    def _configure(self, sandbox: SandboxServer, valkey: Valkey, url: str) -> Path:
        return config_of(
            self._folder,
            sandbox.base_url,
            {
                "server": {"host": "127.0.0.1", "workers": self._plan.workers, "drain_seconds": 20},
                "storage": {"database": url, "redis": valkey.url, "pepper": PEPPER},
                "ledger": {"lease_seconds": LEASE_SECONDS, "sweep_seconds": SWEEP_SECONDS},
                "cache": {"enabled": False},
                "upstreams": {
                    "openai": {
                        "timeouts": {
                            "first_byte_seconds": CALL_SECONDS,
                            "total_seconds": CALL_SECONDS,
                        }
                    }
                },
                "teams": {
                    team: {
                        "keys": [_key(team)],
                        "budget": {"total": limit / DOLLAR},
                        "limits": {"concurrent_requests": 100},
                    }
                    for team, limit in self._budgets.items()
                },
            },
        )

    async def _start(self, config: Path) -> GatewayProcess:
        process = GatewayProcess(config)
        self._every.append(process)
        await asyncio.to_thread(process.wait_listening)
        return process

    def _end_all(self) -> None:
        for process in self._every:
            for pid in _family(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            process.__exit__(None, None, None)

    async def _client(self, number: int) -> None:
        """Calls until the storm is over; every name is new, or was broken a moment ago."""
        dice = random.Random(self._plan.seed * 1000 + number)
        notes, sent, again = self._outcome.notes, 0, ""
        async with httpx.AsyncClient(verify=False, timeout=20) as http:
            while not self._over.is_set():
                name = again or f"call-{number}-{sent}"
                sent += not again
                # The same team for a name, always: an idempotency key belongs to a team.
                team = f"team{sum(map(ord, name)) % TEAMS}"
                process = dice.choice(self._serving)
                notes.sent += 1
                try:
                    answer = await http.post(
                        f"{process.base_url}/images/generations",
                        json={
                            "model": MODEL, "prompt": name, "quality": "low", "size": "1024x1024",
                        },
                        headers={
                            "authorization": f"Bearer {_key(team)}",
                            "idempotency-key": name,
                            # Its process may be gone in a moment: nobody waits for a reused line.
                            "connection": "close",
                        },
                    )  # fmt: skip
                except (httpx.TransportError, LookupError):
                    notes.broken += 1
                    again = name if dice.random() < 0.5 and not again else ""
                    await asyncio.sleep(0.05)
                    continue
                if again and (answer.status_code, answer.headers.get("x-cost-usd")) == (200, "0"):
                    # What the broken one had bought, for nothing: the upstream's bill has it once.
                    notes.replayed += 1
                else:
                    self._note(name, answer)
                again = ""

    def _note(self, name: str, answer: httpx.Response) -> None:
        notes, status = self._outcome.notes, answer.status_code
        code = "" if status == 200 else answer.json()["error"]["code"]
        if status == 200:
            if answer.headers.get("x-cost-basis") != "usage" or name in notes.charged:
                notes.surprises.append(f"{name}: 200 {dict(answer.headers)}")
            notes.charged[name] = _nanos(answer.headers["x-cost-usd"])
        elif (status, code) == (429, "insufficient_quota"):
            notes.refused += 1
        elif status == 503:
            notes.unavailable += 1
        elif status == 409:
            notes.repeated += 1
        elif (status, code) == (410, "idempotent_result_expired"):
            # Booked, and its picture died with its process, or with the Valkey that had it.
            notes.gone += 1
        elif status in (500, 502, 504):
            notes.unknown += 1
        else:
            notes.surprises.append(f"{name}: {status} {answer.text[:200]}")

    async def _havoc(self, config: Path, valkey: Valkey, postgres: Postgres | None) -> None:
        blows = ["kill gateway"] * 4 + ["kill worker"] * 2 * (self._plan.workers > 1)
        blows += ["freeze gateway"] * 2 + ["kill valkey", "freeze valkey"]
        if postgres is not None:
            blows += ["kill postgres", "freeze postgres"]
        least, most = self._plan.pause_seconds
        struck: dict[str, asyncio.Task[None]] = {}
        while not self._over.is_set():
            await asyncio.sleep(self._dice.uniform(least, most))
            blow = self._dice.choice(blows)
            place = self._dice.randrange(len(self._serving))
            whom = blow.split()[1]
            if whom in ("gateway", "worker"):
                whom = f"gateway {place}"
            # One blow at a time for each: several of them may be down together.
            if whom not in struck or struck[whom].done():
                strike = self._strike(blow, place, config, valkey, postgres)
                struck[whom] = asyncio.create_task(strike)
                self._outcome.blows[blow] += 1
        await asyncio.gather(*struck.values())

    async def _strike(
        self, blow: str, place: int, config: Path, valkey: Valkey, postgres: Postgres | None
    ) -> None:
        match blow:
            case "kill gateway":
                self._serving[place].kill()
                self._serving[place] = await self._start(config)
            case "kill worker":
                workers = _family(self._serving[place].pid)[1:]
                if workers:
                    _signal(self._dice.choice(workers), signal.SIGKILL)
            case "freeze gateway":
                # Now and then longer than a lease: it wakes to find its holds expired.
                frozen = _family(self._serving[place].pid)
                for pid in frozen:
                    _signal(pid, signal.SIGSTOP)
                await asyncio.sleep(self._dice.choice((0.5, 1, 2, LEASE_SECONDS + 3)))
                for pid in frozen:
                    _signal(pid, signal.SIGCONT)
            case "kill valkey":
                await asyncio.to_thread(valkey.restart)
            case "freeze valkey":
                valkey.freeze()
                await asyncio.sleep(self._dice.uniform(0.2, 3))
                valkey.thaw()
            case "kill postgres" if postgres is not None:
                await asyncio.to_thread(postgres.restart)
            case "freeze postgres" if postgres is not None:
                postgres.freeze()
                await asyncio.sleep(self._dice.uniform(0.2, 5))
                postgres.thaw()

    async def _calm(self, config: Path, url: str) -> None:
        """Nobody calls any more: what runs ends, what waited on disk is booked, leases lapse."""
        for process in self._serving:
            if not process.running:
                await self._start(config)

        def ended() -> bool:
            with _snapshot(url, self._folder) as query:
                return not query("SELECT 1 FROM hold WHERE state = 'H' LIMIT 1")

        await asyncio.to_thread(wait_until, ended, "every hold ended", LEASE_SECONDS + 60)

        def booked() -> bool:
            folder = self._folder / "data" / "settlements"
            return not folder.exists() or not any(one.stat().st_size for one in folder.iterdir())

        await asyncio.to_thread(wait_until, booked, "every settlement is booked", 90)
        for process in self._serving:
            if process.running:
                process.terminate()
        for process in self._serving:
            await asyncio.to_thread(process.wait, 60)


def _key(team: str) -> str:
    return f"{team}-key-0123456789abcdef"


def _nanos(dollars: str) -> int:
    """Exact decimal dollars, without a float."""
    whole, _, fraction = dollars.partition(".")
    return int(whole) * DOLLAR + int(fraction.ljust(9, "0") or 0)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _family(pid: int) -> list[int]:
    """A process and those that it has started."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return [pid]
    return [pid, *(each for child in text.split() for each in _family(int(child)))]


@contextlib.contextmanager
def _snapshot(url: str, folder: Path) -> Iterator[Query]:
    if url.startswith("sqlite"):
        path = folder / "data" / "gateway.db"
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)) as db:
            db.execute("BEGIN")
            yield lambda sql: db.execute(sql).fetchall()
    else:
        with psycopg.connect(url) as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            yield lambda sql: connection.execute(sql.encode()).fetchall()
