"""`gateway export focus`: what leaves for chargeback is what the ledger has, to the nano-dollar."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gateway.sandbox.server import SandboxServer
from tests.cli.conftest import Say
from tests.cli.spending import DAY, NOON, ONE, spend
from tests.running import ALIAS, KEY, MODEL, TestClock

Ask = Callable[..., Any]


async def _spend(folder: Path) -> Path:
    clock = TestClock(NOON)
    with SandboxServer(clock) as sandbox:
        named = {"teams": {"growth": {"keys": [{"key": KEY, "name": "ci"}]}}}
        config, _ = await spend(folder, sandbox, clock, named, lost=1)
        return config


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return asyncio.run(_spend(tmp_path_factory.mktemp("books")))


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def total(text: str) -> Decimal:
    return sum((Decimal(row["BilledCost"]) for row in rows(text)), Decimal())


def test_the_export_is_the_ledger(say: Say, ask: Ask, books: Path) -> None:
    """With a correction of a day, below nothing even, the sums stay the same number."""
    spent = ("export", "focus", "--from", DAY, "--to", DAY, "--config", books)
    before = say(*spent).stdout
    usage = ask("usage", "--json", "--config", books)["total"]["cost_usd"]
    verified = ask("ledger", "verify", "--json", "--config", books)
    assert verified["ok"]
    assert total(before) == Decimal(usage) == Decimal(verified["booked_usd"])

    said = say(
        *("ledger", "adjust", "--team", "growth", "--model", MODEL, "--day", DAY),
        *("--amount", "-1.000000001", "--reason", "a credit", "--config", books),
    )
    assert said.exit_code == 0, said.output
    after = say(*spent).stdout
    assert total(after) == total(before) - Decimal("1.000000001")
    verified = ask("ledger", "verify", "--json", "--config", books)
    assert verified["ok"]
    assert total(after) == Decimal(verified["booked_usd"])
    [credit] = [row for row in rows(after) if row["ChargeCategory"] == "Adjustment"]
    assert (credit["SubAccountId"], credit["BilledCost"]) == ("growth", "-1.000000001")


def test_a_row_per_team_key_model_and_day(say: Say, books: Path) -> None:
    text = say("export", "focus", "--from", DAY, "--to", DAY, "--config", books).stdout
    used = [row for row in rows(text) if row["ChargeCategory"] == "Usage"]
    assert sorted((row["SubAccountId"], row["SkuId"], row["x_Requests"]) for row in used) == [
        ("design", MODEL, "2"),
        ("growth", MODEL, "1"),
        ("growth", ALIAS, "2"),
    ]
    assert {row["ProviderName"] for row in used} == {"openai"}
    assert {row["SubAccountId"]: row["ResourceName"] for row in used} == {
        "growth": "ci",
        "design": "",
    }
    assert {len(row["x_KeyId"]) for row in used} == {10}
    [design] = [row for row in used if row["SubAccountId"] == "design"]
    assert design["x_UnresolvedRequests"] == "1"
    assert Decimal(design["BilledCost"]) - Decimal(design["x_UnresolvedCost"]) == (
        Decimal(ONE) / 10**9
    )


def test_as_json_into_a_file(say: Say, books: Path, tmp_path: Path) -> None:
    out = tmp_path / "focus.json"
    said = say(
        *("export", "focus", "--from", DAY, "--to", DAY, "--format", "json", "--out", out),
        *("--billing-account", "acme", "--config", books),
    )
    assert (said.exit_code, said.stdout) == (0, "")
    found = json.loads(out.read_text())
    assert {row["BillingAccountId"] for row in found} == {"acme"}
    assert {type(row["BilledCost"]) for row in found} == {str}
    assert f"{len(found)} rows written" in said.stderr


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (("--from", "2026-11-21", "--to", "2026-11-30"), 0),
        (("--from", "2026-11-01", "--to", "2026-11-19"), 0),
        (("--to", "1999-01-01", "--from", "1998-01-01"), 0),
    ],
)
def test_other_days(say: Say, books: Path, options: tuple[str, ...], count: int) -> None:
    text = say("export", "focus", *options, "--config", books).stdout
    assert len(rows(text)) == count
    assert text.startswith("AvailabilityZone,BilledCost,")


def test_without_days_it_is_this_month(say: Say, config: Path) -> None:
    said = say("export", "focus", "--config", config)
    assert said.exit_code == 0
    assert rows(said.stdout) == []


def test_days_in_the_wrong_order(say: Say, books: Path) -> None:
    said = say("export", "focus", "--from", "2026-11-22", "--to", "2026-11-21", "--config", books)
    assert said.exit_code == 2
    assert "--to is before --from" in said.stderr


def test_a_folder_that_is_not_there(say: Say, books: Path, tmp_path: Path) -> None:
    said = say("export", "focus", "--out", tmp_path / "no" / "x.csv", "--config", books)
    assert said.exit_code == 1
    assert f"there is no folder {tmp_path}/no; make it (mkdir -p {tmp_path}/no)" in said.stderr
