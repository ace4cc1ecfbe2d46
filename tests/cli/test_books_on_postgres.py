"""The commands on the books, against PostgreSQL, beside the gateway that goes on spending."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from decimal import Decimal
from pathlib import Path

from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from tests.cli.conftest import Say
from tests.cli.spending import DAY, NOON, ONE, spend
from tests.contract.stores import server
from tests.running import ALIAS, MODEL, TestClock, run_gateway


async def test_from_a_lost_call_to_chargeback(say: Say, tmp_path: Path) -> None:
    clock = TestClock(NOON)
    storage = {"database": server().fresh_database(), "pepper": "0123456789abcdef" * 4}
    changes = {"storage": storage, "upstreams": {"openai": {"admin_key": "sk-admin-1"}}}
    with SandboxServer(clock) as sandbox:
        config, [lost] = await spend(tmp_path, sandbox, clock, changes, lost=1)

        async def run(*arguments: str, code: int = 0) -> str:
            said = await asyncio.to_thread(say, *arguments, "--config", config)
            assert said.exit_code == code, said.output
            return said.stdout

        async with run_gateway(tmp_path, sandbox, changes, clock):
            [suspect] = json.loads(await run("ledger", "unresolved", "--json"))
            assert suspect["rid"] == lost
            correction = ("ledger", "adjust", lost, "--reason", "on the bill", "--id", "ticket-1")
            exact = str(Decimal(ONE) / 10**9)
            assert "unresolved" in await run(*correction, "--cost", exact)
            assert "nothing to do" in await run(*correction, "--cost", exact)
            assert "on the bill; as ticket-1" in await run("ledger", "show", lost)

            sandbox.rules.add(Rule(path="/organization/costs", drift_percent=0.9))
            found = json.loads(await run("reconcile", "--day", DAY, "--json", "--apply"))
            assert Decimal(found["total"]["difference_usd"]) == Decimal(5 * ONE * 9) / 10**12
            assert {(one["team"], one["model"]) for one in found["proposals"]} == {
                ("growth", MODEL),
                ("growth", ALIAS),
                ("design", MODEL),
            }
            again = json.loads(await run("reconcile", "--day", DAY, "--json"))
            assert again["total"]["difference_usd"] == "0"
            books = json.loads(await run("ledger", "verify", "--json"))
            assert books["ok"]

            text = await run("export", "focus", "--from", DAY, "--to", DAY)
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
            billed = sum(Decimal(row["BilledCost"]) for row in rows)
            assert billed == Decimal(books["booked_usd"]) == Decimal(found["total"]["billed_usd"])
            assert await run("ledger", "factors") == "UPSTREAM/MODEL  FACTOR\n"
