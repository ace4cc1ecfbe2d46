"""Secrets are changed while teams work: the pepper of the keys, the keys of an upstream, the keys
of teams. A backup of the books goes on with the same keys."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway.domain import keys
from gateway.sandbox.journal import Journal
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from tests.contract.stores import server
from tests.e2e.test_processes import Answered, configured, database
from tests.e2e.test_workers import wait_for_all, with_workers
from tests.processes import GatewayProcess, key_name, run, wait_until
from tests.running import KEY, OTHER_KEY, TestClock
from tests.valkey import Valkey, run_valkey

PEPPER = "pepper-b-0123456789abcdef-0123456789abcdef"
OLD_FILE = "${file:data/gateway.pepper}"
NEW_KEY = "growth-key-fedcba9876543210"
QUICK = Rule(prompt="quick", payload_bytes=400)


@pytest.fixture
def sandbox() -> Iterator[SandboxServer]:
    with SandboxServer(TestClock(), journal=Journal(records=100_000)) as running:
        running.rules.add(QUICK)
        yield running


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with run_valkey() as running:
        yield running


def change(config: Path, section: str, **changes: Any) -> None:
    document = yaml.safe_load(config.read_text())
    document[section] = {**document.get(section, {}), **changes}
    config.write_text(yaml.safe_dump(document))


def command(config: Path, *arguments: str, code: int = 0) -> str:
    said = run(*arguments, "--config", str(config))
    assert said.returncode == code, said.stdout + said.stderr
    return said.stdout


def listed(config: Path) -> dict[str, dict[str, Any]]:
    """The keys, by the names that they have for people."""
    return {one["name"]: one for one in json.loads(command(config, "key", "list", "--json"))}


def made(config: Path, name: str) -> str:
    """A new key's secret."""
    said = command(config, "key", "create", "--team", "art", "--name", name, "--json")
    return str(json.loads(said)["secret"])


async def buy(url: str, secret: str, name: str) -> int:
    """The status of a small picture."""
    body = {"model": "gpt-image-2", "prompt": name, "quality": "low", "size": "1024x1024"}
    async with httpx.AsyncClient(timeout=60, verify=False) as http:
        answer = await http.post(
            f"{url}/images/generations", json=body, headers={"authorization": f"Bearer {secret}"}
        )
    return answer.status_code


def spent(config: Path) -> dict[str, str]:
    """Dollars by key."""
    rows = json.loads(command(config, "usage", "--json"))["rows"]
    return {row["key_id"]: row["cost_usd"] for row in rows}


async def test_a_pepper_is_changed_and_the_old_one_dropped(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    teams = {"growth": {"keys": [{"key": KEY, "name": "declared"}]}}
    config = configured(tmp_path, sandbox, teams=teams)
    command(config, "team", "create", "art", "--budget-total", "0.04")
    secrets = {name: made(config, name) for name in ("moved", "idle")}
    with GatewayProcess(config) as first:
        first.wait_ready()
        for secret in (KEY, *secrets.values()):
            assert await buy(first.base_url, secret, "quick one") == 200
    before, dollars = listed(config), spent(config)
    assert {one["pepper"] for one in before.values()} == {"current"}

    change(config, "storage", pepper=PEPPER, old_peppers=[OLD_FILE])
    with GatewayProcess(config) as second:
        second.wait_ready()
        assert "2 keys were not used since the pepper changed" in second.stderr
        assert await buy(second.base_url, KEY, "quick two") == 200
        assert await buy(second.base_url, secrets["moved"], "quick two") == 200
        # The budget knows what the team had spent under the old pepper.
        statuses = [await buy(second.base_url, secrets["moved"], f"quick {n}") for n in range(9)]
        assert 429 in statuses
    after = listed(config)
    assert {name: one["id"] for name, one in after.items()} == {
        name: one["id"] for name, one in before.items()
    }
    assert {name: one["pepper"] for name, one in after.items()} == {
        "declared": "current",
        "": "current",
        "moved": "current",
        "idle": "old",
    }
    table = command(config, "key", "list")
    assert [line.split()[0] for line in table.splitlines() if "old pepper" in line] == [
        after["idle"]["id"]
    ]
    assert set(spent(config)) == set(dollars), "every key has the row that it had"

    change(config, "storage", pepper=PEPPER, old_peppers=[])
    command(config, "team", "update", "art", "--budget-total", "none")
    with GatewayProcess(config) as third:
        third.wait_ready()
        assert "1 keys were made with a pepper that is not configured" in third.stderr
        assert await buy(third.base_url, KEY, "quick three") == 200
        assert await buy(third.base_url, secrets["moved"], "quick three") == 200
        assert await buy(third.base_url, secrets["idle"], "quick three") == 401
    last = listed(config)
    assert {name: one["id"] for name, one in last.items()} == {
        name: one["id"] for name, one in before.items()
    }
    assert last["idle"]["pepper"] == "lost"
    assert set(spent(config)) == set(dollars)


def hang_up(gateway: GatewayProcess, *, outcome: str, workers: int = 1) -> None:
    """SIGHUP, until every worker has read the file."""
    name = f'gateway_config_reloads_total{{outcome="{outcome}"}}'
    before = gateway.metrics().get(name, 0)
    os.kill(gateway.pid, signal.SIGHUP)
    wait_until(lambda: gateway.metrics().get(name, 0) == before + workers, "the file is read again")


def refused_lines(gateway: GatewayProcess) -> list[str]:
    return [
        one["error"] for one in gateway.log if one["event"] == "the configuration is not read again"
    ]


Started = Callable[[Path, SandboxServer, Valkey], tuple[Path, int]]


def alone(folder: Path, sandbox: SandboxServer, valkey: Valkey) -> tuple[Path, int]:
    return configured(folder, sandbox), 1


def two_workers(folder: Path, sandbox: SandboxServer, valkey: Valkey) -> tuple[Path, int]:
    return with_workers(folder, sandbox, valkey, 2), 2


@pytest.mark.parametrize("start", [alone, two_workers])
async def test_an_upstream_key_is_changed_under_load(
    tmp_path: Path, sandbox: SandboxServer, valkey: Valkey, start: Started
) -> None:
    """What runs ends with the key it began with, what comes has the new one, nobody is refused."""
    config, workers = start(tmp_path, sandbox, valkey)
    making = Gate()
    sandbox.rules.add(Rule(prompt="making", wait_for=making, payload_bytes=400))
    answered, over = Answered(), asyncio.Event()
    statuses: list[int | None] = []
    headers = {"authorization": f"Bearer {KEY}"}
    limits = httpx.Limits(max_keepalive_connections=0)

    async with httpx.AsyncClient(headers=headers, timeout=60, limits=limits, verify=False) as http:

        async def knock(url: str) -> None:
            """Connections of their own, all the while."""
            while not over.is_set():
                statuses.append((await http.get(f"{url}/models")).status_code)
                await asyncio.sleep(0.01)

        with GatewayProcess(config) as gateway:
            await asyncio.to_thread(wait_for_all, config, gateway, workers) if workers > 1 else (
                await asyncio.to_thread(gateway.wait_ready)
            )
            url = gateway.base_url
            knocking = asyncio.ensure_future(knock(url))
            running = [
                asyncio.ensure_future(answered.call(http, url, f"making {number}"))
                for number in range(20)
            ]
            await making.arrived(20)
            # From now on the upstream knows only the new key.
            sandbox.rules.clear()
            sandbox.rules.add(Rule(key="sk-upstream-secret", status=401))
            sandbox.rules.add(QUICK)
            change(config, "upstreams", openai=with_key(config, "sk-upstream-new"))
            await asyncio.to_thread(hang_up, gateway, outcome="applied", workers=workers)
            for number in range(10):
                assert await answered.call(http, url, f"quick {number}") == 200
            making.set()
            assert await asyncio.gather(*running) == [200] * 20
            assert set(bearers(sandbox, "making")) == {"Bearer sk-upstream-secret"}
            assert set(bearers(sandbox, "quick")) == {"Bearer sk-upstream-new"}

            # A broken file changes nothing, and says all that is wrong with it.
            whole = config.read_text()
            document = yaml.safe_load(whole)
            document["teams"]["growth"] |= {"limits": {"requests_per_minute": "many"}, "bugdet": {}}
            document["upstreams"]["openai"]["api_keys"] = ["sk-nobody"]
            config.write_text(yaml.safe_dump(document))
            await asyncio.to_thread(hang_up, gateway, outcome="refused", workers=workers)
            assert gateway.metrics()["gateway_config_reload_failed"] == 1
            lines = refused_lines(gateway)
            assert any("requests_per_minute" in line for line in lines)
            assert any("bugdet" in line for line in lines)
            assert await answered.call(http, url, "quick, with a broken file") == 200
            assert set(bearers(sandbox, "quick")) == {"Bearer sk-upstream-new"}
            config.write_text(whole)
            await asyncio.to_thread(hang_up, gateway, outcome="applied", workers=workers)
            assert gateway.metrics()["gateway_config_reload_failed"] == 0
            assert "sk-" not in gateway.stderr

            over.set()
            await knocking
            gateway.terminate()
            assert await asyncio.to_thread(gateway.wait) == 0
    assert set(statuses) == {200}
    assert answered.broken == 0


def with_key(config: Path, key: str) -> Mapping[str, Any]:
    return {**yaml.safe_load(config.read_text())["upstreams"]["openai"], "api_keys": [key]}


def bearers(sandbox: SandboxServer, prompt: str) -> list[str]:
    """With which keys pictures were asked for."""
    return [
        record.header("authorization") or ""
        for record in sandbox.journal
        if str(record.fields.get("prompt", "")).startswith(prompt)
    ]


async def test_teams_and_peppers_change_without_a_restart(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    config = configured(tmp_path, sandbox)
    command(config, "team", "create", "art")
    secret = made(config, "ci")
    with GatewayProcess(config) as gateway:
        gateway.wait_ready()
        url = gateway.base_url
        for known in (KEY, OTHER_KEY, secret):
            assert await buy(url, known, "quick one") == 200
        ids = {one["id"] for one in json.loads(command(config, "key", "list", "--json"))}

        # Another key for one team, another team for the other, another pepper, another port.
        document = yaml.safe_load(config.read_text())
        document["teams"] = {
            "growth": {"keys": [KEY, NEW_KEY], "limits": {"requests_per_minute": 2}},
        }
        document["storage"] |= {"pepper": PEPPER, "old_peppers": [OLD_FILE]}
        document["server"]["drain_seconds"] = 3
        document["models"]["another"] = {"upstream": "openai", "model": "gpt-image-2"}
        config.write_text(yaml.safe_dump(document))
        await asyncio.to_thread(hang_up, gateway, outcome="applied")
        assert await buy(url, secret, "quick two") == 200
        assert await buy(url, OTHER_KEY, "quick two") == 401
        statuses = [await buy(url, NEW_KEY, f"quick {number}") for number in range(3)]
        assert statuses == [200, 200, 429]
        later = [one["setting"] for one in gateway.log if "setting" in one]
        assert later == ["server.drain_seconds"]
        after = {one["id"] for one in json.loads(command(config, "key", "list", "--json"))}
        assert len(after & ids) == 2, "the growth key and the directory's are who they were"

        # A team that a command has made since is not the file's too: all or nothing.
        document["teams"] |= {"art": {"keys": [OTHER_KEY]}}
        config.write_text(yaml.safe_dump(document))
        await asyncio.to_thread(hang_up, gateway, outcome="refused")
        assert "teams.art" in refused_lines(gateway)[-1]
        assert await buy(url, OTHER_KEY, "quick two") == 401


def test_workers_that_only_start_are_told_too(
    tmp_path: Path, sandbox: SandboxServer, valkey: Valkey
) -> None:
    with GatewayProcess(with_workers(tmp_path, sandbox, valkey, 2)) as gateway:
        # The first worker serves, the second one may have read the file already.
        gateway.wait_listening()
        hang_up(gateway, outcome="applied", workers=2)
        assert gateway.is_ready()


async def test_a_backup_under_load_goes_on_elsewhere(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    """From one machine to PostgreSQL and back, with the same keys, ids and budgets."""
    budget = {"budget": {"total": 1000}}
    teams = {"growth": {"keys": [{"key": KEY, "name": "declared"}], **budget}}
    config = configured(tmp_path, sandbox, teams=teams)
    command(config, "team", "create", "art", "--budget-total", "0.02")
    secret = made(config, "ci")
    answered, over, file = Answered(), asyncio.Event(), tmp_path / "books.backup"

    async with httpx.AsyncClient(
        headers={"authorization": f"Bearer {KEY}"}, timeout=60, verify=False
    ) as http:

        async def client(url: str, number: int) -> None:
            sent = 0
            while not over.is_set():
                assert await answered.call(http, url, f"quick {number} {sent}") == 200
                sent += 1

        with GatewayProcess(config) as gateway:
            gateway.wait_ready()
            assert await buy(gateway.base_url, secret, "quick") == 200
            buying = [
                asyncio.ensure_future(client(gateway.base_url, number)) for number in range(8)
            ]
            await asyncio.to_thread(wait_until, lambda: len(answered.costs) > 40, "they buy")
            acknowledged = dict(answered.costs)
            said = await asyncio.to_thread(command, config, "db", "backup", str(file))
            more = len(answered.costs)
            await asyncio.to_thread(wait_until, lambda: len(answered.costs) > more, "and go on")
            over.set()
            await asyncio.gather(*buying)
    assert "Its books add up." in said
    assert str(tmp_path / "data" / "gateway.pepper") in said
    with closing(sqlite3.connect(file)) as db:
        posted = db.execute("SELECT idempotency_key, cost FROM hold WHERE state = 'P'")
        costs = {key_name(key): cost for key, cost in posted}
    assert acknowledged.items() <= costs.items()
    assert KEY.encode() not in file.read_bytes()
    assert "is there already" in run("db", "backup", str(file), "--config", str(config)).stderr
    before = listed(config)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    there = configured(elsewhere, sandbox, teams=teams)
    pepper = (tmp_path / "data" / "gateway.pepper").read_text()
    change(there, "storage", database=server().fresh_database(), pepper=pepper)
    said = command(there, "db", "restore", str(file))
    assert "The books add up." in said
    assert pepper not in said
    command(there, "db", "restore", str(file), code=1)
    with GatewayProcess(there) as gateway:
        gateway.wait_ready()
        assert await buy(gateway.base_url, KEY, "quick, elsewhere") == 200
        statuses = [await buy(gateway.base_url, secret, f"quick {n}") for n in range(5)]
        assert statuses.count(200) == 2, "the budget knows what was spent where it comes from"
        assert statuses[-1] == 429
    after = listed(there)
    assert {name: one["id"] for name, one in after.items()} == {
        name: one["id"] for name, one in before.items()
    }

    second = tmp_path / "books-of-postgres.backup"
    command(there, "db", "backup", str(second))
    back = tmp_path / "back"
    back.mkdir()
    here = configured(back, sandbox, teams=teams)
    (back / "data").mkdir()
    (back / "data" / "gateway.pepper").write_text(pepper)
    command(here, "db", "restore", str(second))
    with GatewayProcess(here) as gateway:
        gateway.wait_ready()
        assert await buy(gateway.base_url, KEY, "quick, back") == 200
        assert await buy(gateway.base_url, secret, "quick, back") == 429
    assert database(here).exists()
    assert spent(here).keys() == spent(there).keys()
    assert listed(here)["ci"]["id"] == before["ci"]["id"]
    assert before["ci"]["pepper"] == listed(here)["ci"]["pepper"] == "current"
    assert keys.pepper_id(pepper.encode()) not in said
