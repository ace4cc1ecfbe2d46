"""Real `gateway serve` processes on one PostgreSQL and one Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import httpx2
import psycopg
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from gateway.sandbox.server import SandboxServer
from tests.balancer import Balancer
from tests.postgres import Postgres
from tests.processes import GatewayProcess, bill, run
from tests.redis_servers import say
from tests.running import KEY, MODEL, config_of
from tests.valkey import Valkey, eventually

PEPPER = "pepper-0123456789abcdef-0123456789"
GENERATIONS = "/images/generations"


@dataclass(frozen=True)
class Hold:
    """A row of the books."""

    rid: str
    state: str
    bound: int
    cost: int


@dataclass(frozen=True)
class Replicas:
    """Gateways on the same books, each with a configuration of its own."""

    all: list[GatewayProcess]
    configs: list[Path]
    stack: ExitStack
    database: str
    sandbox: SandboxServer

    async def start(self, place: int) -> None:
        """In the place of one that has ended."""
        self.all[place] = self.stack.enter_context(GatewayProcess(self.configs[place]))
        await asyncio.to_thread(self.all[place].wait_ready)

    def balancer(self) -> Balancer:
        return Balancer(lambda: [one.port for one in self.all])

    def http(self, place: int, key: str = KEY, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.all[place].base_url,
            headers={"authorization": f"Bearer {key}"},
            **{"timeout": 60, "verify": False, **options},
        )

    def holds(self) -> list[Hold]:
        with psycopg.connect(self.database) as db:
            rows = db.execute("SELECT rid, state, bound, cost FROM hold ORDER BY at, rid")
            return [Hold(*row) for row in rows]

    async def settled(self) -> list[Hold]:
        """The holds, once none is open."""
        await eventually(lambda: all(hold.state != "H" for hold in self.holds()), 30)
        return self.holds()

    async def check(self, purchases: int) -> None:
        """So many were bought, each is on the books once and exactly, and every sum agrees."""
        bought = [hold for hold in await self.settled() if hold.state == "P"]
        billed = [bill(record) for record in self.sandbox.journal.billed]
        assert len(billed) == purchases, f"{len(billed)} bought, not {purchases}: {self.doubles()}"
        posted = sorted(hold.cost for hold in bought)
        assert posted == sorted(billed), f"posted {posted}, billed {sorted(billed)}"
        self.verify()

    def doubles(self) -> list[object]:
        """What the logs say of calls that were bought more than once."""
        with psycopg.connect(self.database) as db:
            rows = db.execute(
                "SELECT rid, at, state FROM hold WHERE fingerprint IN (SELECT fingerprint FROM hold"
                " WHERE state <> 'V' GROUP BY fingerprint HAVING count(*) > 1) ORDER BY at"
            ).fetchall()
        rids = {rid for rid, _, _ in rows}
        lines = [line for one in self.all for line in one.log]
        return [
            *rows,
            *(line for line in lines if rids & {line.get("request_id"), line.get("joined")}),
        ]

    def verify(self) -> None:
        said = run("ledger", "verify", "--config", str(self.configs[0]), "--json")
        assert said.returncode == 0, said.stdout + said.stderr

    def metric(self, place: int, name: str) -> float:
        return sum(
            value for key, value in self.all[place].metrics().items() if key.split("{")[0] == name
        )


@asynccontextmanager
async def replicas(
    folder: Path,
    sandbox: SandboxServer,
    postgres: Postgres,
    valkey: Valkey,
    count: int = 2,
    **changes: Any,
) -> AsyncIterator[Replicas]:
    database = postgres.fresh_database()
    with ExitStack() as stack:
        running, configs = [], []
        for place in range(count):
            home = folder / f"replica-{place}"
            home.mkdir()
            config = config_of(
                home,
                sandbox.base_url,
                {
                    "server": {"host": "127.0.0.1", "watch_seconds": 0},
                    "storage": {"database": database, "redis": valkey.url, "pepper": PEPPER},
                    "cache": {"enabled": False},
                    "teams": {"growth": {"budget": {"day": 1000}}},
                    **changes,
                },
            )
            configs.append(config)
            running.append(stack.enter_context(GatewayProcess(config)))
        for one in running:
            await asyncio.to_thread(one.wait_ready)
        yield Replicas(running, configs, stack, database, sandbox)
        for one in running:
            assert "Traceback" not in one.stderr, one.stderr


def asked(name: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": name, "quality": "low", "size": "1024x1024", **more}


def sdk_of(base_url: str, *, keep_alive: bool = True, **options: Any) -> AsyncOpenAI:
    limits = httpx2.Limits(
        max_connections=1000, max_keepalive_connections=None if keep_alive else 0
    )
    client = DefaultAsyncHttpxClient(verify=False, limits=limits)
    return AsyncOpenAI(base_url=base_url, api_key=KEY, http_client=client, **options)


def watchers(valkey: Valkey, rid: str) -> int:
    """How many wait for a flight, as the board has it."""
    fields = say(valkey.port, "HKEYS", f"gw:{{default}}:fl:{rid}")
    return sum(name.startswith(b"w:") for name in fields)
