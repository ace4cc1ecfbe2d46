"""`gateway doctor`: each thing that can be wrong, made wrong for real, and what is said of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import trustme
from click.testing import CliRunner

from gateway.assembly import PEPPER_FILE
from gateway.assembly_stores import open_store
from gateway.cli import main
from gateway.clock import SystemClock
from gateway.doctor import examine as table
from gateway.doctor import upstreams
from gateway.doctor.clocks import compared, date_of
from gateway.doctor.database import judge_library, judge_postgres, judge_sqlite
from gateway.doctor.disks import Kept, look
from gateway.doctor.examine import examine
from gateway.doctor.finding import Finding, State, Topic, sized
from gateway.doctor.machine import judge_cores, judge_descriptors, judge_memory
from gateway.doctor.prices import judge_age
from gateway.doctor.upstreams import reach
from gateway.domain.team import Key, Team
from gateway.ports import Clock
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.settings import Settings, load
from gateway.stores.postgres_glance import PostgresGlance
from gateway.stores.schema import Versions
from gateway.stores.sqlite_glance import SqliteGlance, is_mounted
from gateway.upstream.wire import Origin
from tests.cli.conftest import Say
from tests.contract.stores import server
from tests.running import KEY, MODEL, TestClock, config_of
from tests.valkey import Valkey, run_valkey

OK, WARN, FAIL, SKIPPED = State.OK, State.WARN, State.FAIL, State.SKIPPED
PEPPER = "0123456789abcdef" * 4
UPSTREAM_KEY = "sk-upstream-secret"
ENDS = {"gpt-image-1.5", "gpt-image-1-mini"}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[SandboxServer]:
    with SandboxServer(SystemClock()) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_rules(sandbox: SandboxServer) -> None:
    sandbox.rules.clear()


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with run_valkey("--maxmemory", "64mb") as running:
        yield running


class Said:
    """What the doctor said, to be asked."""

    def __init__(self, findings: list[Finding]) -> None:
        self.findings = findings

    def of(self, check: str, subject: str = "") -> list[Finding]:
        """Of this subject, or where there is none such, of those with this in their names."""
        found = [one for one in self.findings if one.check == check]
        exact = [one for one in found if one.subject == subject] if subject else []
        return exact or [one for one in found if subject in one.subject]

    def bad(self, check: str, subject: str = "") -> list[Finding]:
        return [one for one in self.of(check, subject) if one.state in (WARN, FAIL)]

    def the(self, state: State, check: str, subject: str = "") -> Finding:
        [found] = [one for one in self.of(check, subject) if one.state is state]
        return found


async def look_at(
    folder: Path,
    upstream: str,
    changes: Mapping[str, Any] | None = None,
    clock: Clock | None = None,
    **options: Any,
) -> Said:
    settings = load(config_of(folder, upstream, changes or {}), {})
    said = Said(await examine(settings, clock or SystemClock(), **options))
    for one in said.findings:
        assert bool(one.fix) == (one.state in (WARN, FAIL)), one
    return said


# As a whole


def test_a_good_gateway(say: Say, tmp_path: Path, sandbox: SandboxServer) -> None:
    config = config_of(tmp_path, sandbox.base_url, {})
    config.chmod(0o600)
    said = say("doctor", "--config", config)
    assert said.exit_code == 0, said.output
    assert said.stderr == ""
    assert "ok       upstream openai: key 1 accepted (GET /models, " in said.stdout
    assert "\x1b" not in said.stdout, "colours are for terminals"
    assert "fail " not in said.stdout
    *lines, last = said.stdout.splitlines()
    for line in lines:
        assert line.startswith((*(f"{state:7}  " for state in State), "         fix: ")), line
    assert last.startswith(("Nothing fails", "All is well"))
    assert [path.name for path in tmp_path.iterdir()] == ["gateway.yaml"], "it makes nothing"
    assert {record.path for record in sandbox.journal} == {"/v1/models"}, "what is free alone"


def test_the_form_for_scripts(say: Say, tmp_path: Path, sandbox: SandboxServer) -> None:
    config = config_of(tmp_path, sandbox.base_url, {"server": {"drain_seconds": 1}})
    said = say("doctor", "--json", "--config", config)
    assert said.exit_code == 0
    found = json.loads(said.stdout)
    assert set(found) == {"version", "config", "summary", "findings"}
    assert all(
        set(one) == {"check", "subject", "state", "says", "fix"} for one in found["findings"]
    )
    states = [one["state"] for one in found["findings"]]
    assert found["summary"] == {state.value: states.count(state) for state in State}
    [drain] = [one for one in found["findings"] if one["subject"] == "server.drain_seconds"]
    assert (drain["check"], drain["state"]) == ("config", "warn")
    assert f"{config}:" in drain["fix"]
    assert say("doctor", "--json", "--strict", "--config", config).exit_code == 1


def test_exit_codes(say: Say, tmp_path: Path, sandbox: SandboxServer) -> None:
    config = config_of(
        tmp_path, sandbox.base_url, {"models": {"new-model": {"upstream": "openai"}}}
    )
    said = say("doctor", "--config", config, "--offline")
    assert said.exit_code == 1
    assert "fail     prices: models.new-model: new-model has no price at openai\n" in said.stdout
    assert "         fix: Add a row under prices.rows, or set unpriced: allow\n" in said.stdout
    config.write_text("server: {prot: 1}\n")
    said = say("doctor", "--config", config)
    assert said.exit_code == 2
    assert "did you mean" in said.stderr
    assert say("doctor", "--config", tmp_path / "none.yaml").exit_code == 2


def test_colours_on_a_terminal(tmp_path: Path, sandbox: SandboxServer) -> None:
    config = config_of(tmp_path, sandbox.base_url, {})
    asked = ["doctor", "--offline", "--config", str(config)]
    said = CliRunner().invoke(main, asked, color=True)
    assert "\x1b[32mok     \x1b[0m  prices: " in said.stdout


def test_the_file_that_ships(say: Say) -> None:
    said = say("doctor", "--offline")
    assert said.exit_code == 1
    assert "fail     secrets upstream openai: no key: it is off, and with it " in said.stdout
    assert "         fix: set OPENAI_API_KEY\n" in said.stdout
    assert "warn     keys: nobody has a key: nobody can call\n" in said.stdout


async def test_offline_asks_nobody(tmp_path: Path, sandbox: SandboxServer, valkey: Valkey) -> None:
    asked = len(list(sandbox.journal))
    storage = {"database": server().url("nowhere"), "redis": valkey.url, "pepper": PEPPER}
    hook = {"webhook": "http://127.0.0.1:9/"}
    said = await look_at(
        tmp_path, sandbox.base_url, {"storage": storage, "notify": hook}, offline=True
    )
    assert len(list(sandbox.journal)) == asked
    skipped = {(one.check, one.subject) for one in said.findings if one.state is SKIPPED}
    assert skipped == {
        ("database", ""),
        ("redis", "storage.redis"),
        ("upstream", "openai"),
        ("webhook", "notify.webhook"),
        ("clock", ""),
    }


async def test_what_hangs_does_not_hang_the_doctor(tmp_path: Path, valkey: Valkey) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, run_valkey() as frozen:
        silent_url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        storage = {"redis": frozen.url}
        frozen.freeze()
        try:
            began = time.monotonic()
            said = await look_at(tmp_path, silent_url, {"storage": storage}, deadline_seconds=1.0)
            took = time.monotonic() - began
        finally:
            frozen.thaw()
    assert took < 10
    assert "within 1 s" in said.the(FAIL, "upstream", "openai").says
    assert "within 1 s" in said.the(FAIL, "redis", "storage.redis").says
    assert said.the(OK, "upstream", "openai").says.startswith("127.0.0.1:"), "what came before"
    assert said.of("prices"), "the others are not kept from speaking"


async def test_a_silent_upstream_is_left_after_its_own_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstreams, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        said = await look_at(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}/v1")
    assert "key 1: no answer to GET /models (read_timeout)" in said.the(FAIL, "upstream").says


def test_a_name_that_never_resolves_is_not_waited_for_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, never = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> list[Any]:
        asked.set()
        never.wait(60)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(upstreams, "DNS_SECONDS", 0.2)
    settings = load(config_of(tmp_path, "http://slow.internal/v1", {}), {})
    began = time.monotonic()
    # Closing the loop is where such a thread would be waited for.
    said = Said(asyncio.run(examine(settings, SystemClock())))
    assert asked.is_set()
    assert time.monotonic() - began < 20
    never.set()
    assert "slow.internal is not resolved within 0.2 s" in said.the(FAIL, "upstream").says


async def test_one_broken_check_hides_no_other(
    tmp_path: Path, sandbox: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(settings: Settings) -> AsyncIterator[Finding]:
        yield Topic("doors").ok("so far")
        raise ZeroDivisionError(KEY)

    monkeypatch.setattr(table, "doors", broken)
    said = await look_at(tmp_path, sandbox.base_url, offline=True)
    assert said.the(OK, "doors").says == "so far"
    failed = said.the(FAIL, "doors").says
    assert failed.startswith("the check itself failed: ZeroDivisionError in test_doctor.py, line")
    assert said.of("prices")


def test_no_secret_is_shown(say: Say, tmp_path: Path, sandbox: SandboxServer) -> None:
    """Everything fails that can, and each failure knows a secret."""
    canaries = {
        name: f"canary-{name}-0123456789abcdef"
        for name in ("key", "redis", "cache", "sql", "pepper", "proxy", "hook", "team", "header")
    }
    message = f"Incorrect API key provided: {canaries['key']}"
    body: Any = {"error": {"message": message, "code": f"no {canaries['key']}", "type": message}}
    sandbox.rules.add(Rule(path="/models", status=401, body=body))
    port = urlsplit(server().url()).port
    config = config_of(
        tmp_path,
        sandbox.base_url,
        {
            "storage": {
                "database": f"postgresql://gateway:{canaries['sql']}@127.0.0.1:{port}/postgres",
                "pepper": canaries["pepper"] * 2,
                "redis": f"redis://:{canaries['redis']}@127.0.0.1:1/0",
            },
            "cache": {"redis": f"redis://user:{canaries['cache']}@127.0.0.1:2/0"},
            "upstreams": {
                "openai": {
                    "api_keys": [canaries["key"]],
                    "headers": {"x-own": canaries["header"]},
                },
                "other": {
                    "kind": "openai",
                    "base_url": "http://api.internal/v1",
                    "api_keys": [f"{canaries['key']}-2"],
                    "proxy": f"http://user:{canaries['proxy']}@127.0.0.1:3",
                },
            },
            "notify": {"webhook": f"http://127.0.0.1:4/{canaries['hook']}"},
            "teams": {"growth": {"keys": [canaries["team"]]}},
        },
    )
    for form in ((), ("--json",)):
        said = say("doctor", "--config", config, *form)
        assert said.exit_code == 1
        assert said.output.count("fail") >= 6, said.output
        for canary in canaries.values():
            assert canary not in said.output
        assert "canary" not in said.output


# Upstreams


@pytest.mark.parametrize(
    ("rule", "state", "says"),
    [
        (Rule(status=401), FAIL, "401 invalid_api_key from GET /models: it is refused"),
        (Rule(status=403, body={"error": {"code": "unsupported_country"}}), FAIL, "it is refused"),
        (
            Rule(status=403, body={"error": {"message": "Missing scopes: api.model.read"}}),
            WARN,
            "known, but it may not list models",
        ),
        (
            Rule(status=429, body={"error": {"code": "insufficient_quota"}}),
            FAIL,
            "429 insufficient_quota from GET /models: its account cannot pay",
        ),
        (Rule(status=402, body=b"pay"), FAIL, "402 from GET /models: its account cannot pay"),
        (Rule(status=429), WARN, "it is at its rate limit now"),
        (Rule(status=404), SKIPPED, "another path than upstreams.openai.base_url says"),
        (Rule(status=503), WARN, "the provider fails"),
        (Rule(redirect="https://elsewhere.test/"), FAIL, "redirects are never followed"),
        (Rule(status=200, body=b"<html>"), WARN, "that is no list of models"),
        (Rule(status=200, body={"data": "x"}), WARN, "that is no list of models"),
        (Rule(status=418, body=[]), WARN, "418 from GET /models"),
        (Rule(cut_before_headers=True, status=200), FAIL, "no answer to GET /models (disconnect)"),
    ],
    ids=str,
)
async def test_what_a_key_is_answered(
    tmp_path: Path, sandbox: SandboxServer, rule: Rule, state: State, says: str
) -> None:
    sandbox.rules.add(rule)
    said = await look_at(tmp_path, sandbox.base_url)
    found = said.of("upstream", "openai")[-1]
    assert found.state is state
    assert found.says.startswith("key 1: ")
    assert says in found.says


async def test_each_key_by_its_place_in_the_file(tmp_path: Path, sandbox: SandboxServer) -> None:
    sandbox.rules.add(Rule(path="/models", key="sk-two-long-enough", status=401))
    keys = [UPSTREAM_KEY, {"key": "sk-two-long-enough", "order": 2}]
    said = await look_at(tmp_path, sandbox.base_url, {"upstreams": {"openai": {"api_keys": keys}}})
    refused = said.the(FAIL, "upstream", "openai")
    assert refused.says.startswith("key 2 of 2: 401 invalid_api_key")
    lines = (tmp_path / "gateway.yaml").read_text().splitlines()
    number = next(index for index, line in enumerate(lines, 1) if "sk-two" in line)
    assert f"gateway.yaml:{number}:" in refused.fix
    assert refused.fix.endswith("upstreams.openai.api_keys[1]")
    assert "key 1 of 2 accepted" in said.of("upstream", "openai")[1].says


async def test_models_that_the_provider_lists(tmp_path: Path, sandbox: SandboxServer) -> None:
    rows: Any = [{"id": MODEL, "shutdown_date": "2026-12-01"}, {"id": "gpt-image-22"}, {}, 7]
    sandbox.rules.add(Rule(path="/models", status=200, body={"data": rows}))
    said = await look_at(tmp_path, sandbox.base_url, clock=TestClock())
    missing = said.the(WARN, "models", "gpt-image-2")
    assert missing.says == "openai does not list gpt-image-2"
    assert missing.fix.startswith("did you mean gpt-image-22? Mend models.gpt-image-2")
    assert "on 2026-12-01, in 9 days" in said.the(WARN, "models", MODEL).says
    assert "team-art" in said.of("models")[-1].subject, "an alias ends with its model"


async def test_models_that_end_soon(tmp_path: Path, sandbox: SandboxServer) -> None:
    models = {name: {"upstream": "openai"} for name in ("gpt-image-1", *ENDS)}
    rows = [
        {"upstream": "openai", "model": "m", "per_image": "0.04", "shuts_down": "2026-11-23"},
        {"upstream": "openai", "model": "late", "per_image": "0.04", "shuts_down": "2026-12-23"},
    ]
    changes = {
        "models": {**models, "m": {"upstream": "openai"}, "late": {"upstream": "openai"}},
        "prices": {"rows": rows},
    }
    said = await look_at(tmp_path, sandbox.base_url, changes, TestClock(), offline=True)
    assert "has stopped serving it at openai on 2026-10-23" in said.the(FAIL, "models").says
    assert said.the(FAIL, "models").subject == "gpt-image-1"
    assert f"model: {MODEL}}}" in said.the(FAIL, "models").fix
    warned = {one.subject: one.says for one in said.bad("models") if one.state is WARN}
    assert set(warned) == {"m", *ENDS}
    assert warned["m"].endswith("on 2026-11-23, in 1 day")


async def test_a_model_that_ends_is_said_once(tmp_path: Path, sandbox: SandboxServer) -> None:
    models = {
        "gpt-image-1": {"upstream": "openai"},
        "old": {"upstream": "openai", "model": "gpt-image-1", "fallback": ["gpt-image-2"]},
        "gpt-image-1.5": {"upstream": "openai"},
    }
    rows: Any = [
        {"id": MODEL},
        {"id": "gpt-image-2"},
        {"id": "gpt-image-1.5", "shutdown_date": "2026-12-01"},
    ]
    sandbox.rules.add(Rule(path="/models", status=200, body={"data": rows}))
    said = await look_at(tmp_path, sandbox.base_url, {"models": models}, TestClock())
    assert [(one.subject, one.state) for one in said.bad("models")] == [
        ("gpt-image-1", FAIL),
        ("gpt-image-1.5", WARN),
        ("old", WARN),
    ]
    for one in said.bad("models"):
        assert f"model: {MODEL}}}" in one.fix
    old = said.the(WARN, "models", "old").says
    assert old == (
        "its provider has stopped serving gpt-image-1 at openai on 2026-10-23; its fallback "
        "gpt-image-2 answers"
    )
    listed = said.of("upstream", "openai")[-1].says
    assert listed.endswith("all that are configured but those that have ended, or end soon")


async def test_a_provider_that_ends_a_model_before_the_list_says(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    rows: Any = [{"id": name} for name in (MODEL, "gpt-image-2")]
    rows.append({"id": "gpt-image-1.5", "shutdown_date": "2026-11-25"})
    sandbox.rules.add(Rule(path="/models", status=200, body={"data": rows}))
    models = {"gpt-image-1.5": {"upstream": "openai"}}
    said = await look_at(tmp_path, sandbox.base_url, {"models": models}, TestClock())
    assert any("on 2026-11-25, in 3 days" in one.says for one in said.bad("models"))


def test_how_old_the_prices_are(tmp_path: Path) -> None:
    settings = load(config_of(tmp_path, "http://127.0.0.1/v1", {}), {})
    compiled = date(2026, 11, 22)
    assert judge_age(settings, compiled, date(2027, 1, 21)).state is OK
    old = judge_age(settings, compiled, date(2027, 1, 22))
    assert old.state is WARN
    assert "compiled on 2026-11-22, 61 days ago" in old.says


async def test_a_sandbox_and_an_upstream_that_is_off(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    changes = {
        "upstreams": {
            "fake": {"kind": "sandbox"},
            "spare": {"kind": "openai", "base_url": "http://127.0.0.1/v1", "api_keys": []},
        },
        "models": {"gpt-image-2": {"upstream": None}},
    }
    del changes["models"]
    both = {"art": {"upstreams": ["openai", "spare"], "model": "gpt-image-2"}}
    said = await look_at(tmp_path, sandbox.base_url, {**changes, "models": both})
    assert "draws for nothing" in said.the(OK, "upstream", "fake").says
    assert said.the(SKIPPED, "upstream", "spare").says == "off: it has no key"
    assert "other upstreams have its models" in said.the(WARN, "secrets", "upstream spare").says


async def test_a_closed_port_and_a_name_that_is_none(tmp_path: Path) -> None:
    port = closed_port()
    changes = {
        "upstreams": {
            "odd": {
                "kind": "openai",
                "base_url": "http://no.such.test/v1",
                "api_keys": ["sk-odd-1"],
            }
        },
        "results": {"webhook": f"http://127.0.0.1:{port}/hear"},
        "tracing": {"otlp": f"http://127.0.0.1:{port}/v1/traces"},
    }
    said = await look_at(tmp_path, f"http://127.0.0.1:{port}/v1", changes)
    assert f"nobody listens on port {port}" in said.the(FAIL, "upstream", "openai").says
    assert said.the(FAIL, "upstream", "odd").says == "the name no.such.test does not resolve"
    assert "refuses connections" in said.the(FAIL, "webhook", "results.webhook").says
    assert "refuses connections" in said.the(FAIL, "tracing", "tracing.otlp").says
    assert said.the(SKIPPED, "clock").says == "nobody was reached to compare it with"


async def test_an_address_that_keys_must_not_go_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("169.254.169.254", "fd00:ec2::254", "::ffff:169.254.1.1", "0.0.0.0"):

        def resolve(host: str, port: int, *_: object, answer: str = address) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answer, port))]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        [found] = await reach(Topic("upstream"), Origin(True, "x.test", 443), None, now())
        assert found.state is FAIL
        assert f"resolves to {address}" in found.says


async def test_through_a_forward_proxy(tmp_path: Path, sandbox: SandboxServer) -> None:
    """What the proxy is asked for is the upstream's own name, which nobody here can resolve."""
    asked: list[str] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            asked.append(head.splitlines()[0])
            writer.write(LIST)
        writer.close()

    listening = await asyncio.start_server(proxy, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        proxied = {"base_url": "http://far.internal/v1", "proxy": f"http://u:pw@127.0.0.1:{port}"}
        said = await look_at(tmp_path, "", {"upstreams": {"openai": proxied}})
    assert asked == ["GET http://far.internal/v1/models HTTP/1.1"]
    told = [one.says for one in said.of("upstream", "openai") if one.state is OK]
    assert told[0].startswith(f"goes through the forward proxy 127.0.0.1:{port}")
    assert "key 1 accepted" in told[2]


LIST = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 29\r\n"
    b"date: Sun, 22 Nov 2026 12:00:00 GMT\r\nconnection: close\r\n\r\n"
    b'{"data": [{"id": "gpt-x"}]}  '
)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@contextlib.asynccontextmanager
async def tls_upstream(
    folder: Path, authority: trustme.CA, name: str = "localhost", ends: datetime | None = None
) -> AsyncIterator[dict[str, Any]]:
    """A provider behind TLS that lists one model; yields how it is configured."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name, not_after=ends).configure_cert(context)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(LIST)
        writer.close()

    bundle = folder / "ca.pem"
    authority.cert_pem.write_to_path(bundle)
    async with await asyncio.start_server(answer, "localhost", 0, ssl=context) as listening:
        port = listening.sockets[0].getsockname()[1]
        yield {"base_url": f"https://localhost:{port}/v1", "verify": str(bundle)}


async def test_a_certificate(tmp_path: Path, authority: trustme.CA) -> None:
    async with tls_upstream(tmp_path, authority) as configured:
        said = await look_at(tmp_path, "", {"upstreams": {"openai": configured}}, TestClock())
    met, key, *_ = said.of("upstream", "openai")
    assert met.state is OK
    assert ", TLSv1.3, certificate good for " in met.says
    assert key.state is OK
    clock = said.the(OK, "clock", "against upstream openai")
    assert clock.says.startswith("equal, as far as can be seen (within 0.5")


async def test_a_clock_that_is_another(tmp_path: Path, authority: trustme.CA) -> None:
    clock = TestClock()
    clock.advance(minutes=3)
    async with tls_upstream(tmp_path, authority) as configured:
        said = await look_at(tmp_path, "", {"upstreams": {"openai": configured}}, clock)
    found = said.the(WARN, "clock").says
    assert found.startswith("this machine is 179.")
    assert found.endswith(" s ahead of it")


@pytest.mark.parametrize(
    ("fault", "says", "fix"),
    [
        ("expired", "certificate has expired", "renew it"),
        ("ends soon", "its certificate ends in 4 days", "renew it"),
        ("other name", "mismatch", "write the name that is in the certificate"),
        ("unknown authority", "unable to get local issuer certificate", "does not hold who signed"),
    ],
)
async def test_a_certificate_that_is_not_right(
    tmp_path: Path, authority: trustme.CA, fault: str, says: str, fix: str
) -> None:
    ends = {
        "expired": now() - timedelta(days=1),
        "ends soon": now() + timedelta(days=4, hours=12),
    }.get(fault)
    name = "elsewhere.test" if fault == "other name" else "localhost"
    signer = trustme.CA() if fault == "unknown authority" else authority
    async with tls_upstream(tmp_path, signer, name, ends) as configured:
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        said = await look_at(tmp_path, "", {"upstreams": {"openai": configured}})
    found = said.bad("upstream", "openai")[0]
    assert found.state is (WARN if fault == "ends soon" else FAIL)
    assert says in found.says
    assert fix in found.fix


async def test_tls_where_there_is_none(tmp_path: Path, sandbox: SandboxServer) -> None:
    said = await look_at(tmp_path, sandbox.base_url.replace("http:", "https:"))
    assert "does not speak TLS as it should" in said.the(FAIL, "upstream").says


# Redis


async def test_a_redis_for_limits(tmp_path: Path, sandbox: SandboxServer, valkey: Valkey) -> None:
    set_option(valkey, "maxmemory-policy", "noeviction")
    said = await look_at(tmp_path, sandbox.base_url, {"storage": {"redis": valkey.url}})
    first, *_ = said.of("redis", "storage.redis")
    assert first.says.startswith(f"127.0.0.1:{valkey.port} is Valkey ")
    assert first.says.endswith(" ms away")
    [shared] = said.bad("redis")
    assert "holds the pictures too" in shared.says
    assert said.the(OK, "clock", "against storage.redis").says.startswith("equal")


async def test_pictures_without_a_bound(tmp_path: Path, sandbox: SandboxServer) -> None:
    with run_valkey() as unbound:
        changes: dict[str, object] = {"storage": {"redis": unbound.url}}
        said = await look_at(tmp_path, sandbox.base_url, changes)
        filled, shared = said.bad("redis", "storage.redis")
        assert filled.says == "maxmemory is not set: pictures fill its machine"
        assert filled.fix == "CONFIG SET maxmemory 4gb, and the same in its redis.conf"
        assert "holds the pictures too" in shared.says
        nothing_kept = {"cache": {"enabled": False}, "results": {"enabled": False}}
        said = await look_at(tmp_path, sandbox.base_url, {**changes, **nothing_kept})
        assert not said.bad("redis"), "limits need little room"


async def test_a_policy_that_forgets_limits(
    tmp_path: Path, sandbox: SandboxServer, valkey: Valkey
) -> None:
    set_option(valkey, "maxmemory-policy", "allkeys-lru")
    cache = f"redis://localhost:{valkey.port}/1"
    changes = {"storage": {"redis": valkey.url}, "cache": {"redis": cache}}
    said = await look_at(tmp_path, sandbox.base_url, changes)
    found = said.the(WARN, "redis", "storage.redis")
    assert "maxmemory-policy is allkeys-lru" in found.says
    assert "CONFIG SET maxmemory-policy noeviction" in found.fix
    assert not said.bad("redis", "cache.redis"), "there it is right"
    set_option(valkey, "maxmemory-policy", "noeviction")
    said = await look_at(tmp_path, sandbox.base_url, changes)
    assert "once full, no picture is kept" in said.the(WARN, "redis", "cache.redis").says
    assert not said.bad("redis", "storage.redis")


async def test_a_redis_that_is_not_right(tmp_path: Path, sandbox: SandboxServer) -> None:
    with run_valkey("--cluster-enabled", "yes") as alone:
        set_option(alone, "requirepass", "open-sesame-1")
        locked = {"storage": {"redis": alone.url}}
        said = await look_at(tmp_path, sandbox.base_url, locked)
        assert "Authentication required" in said.bad("redis")[0].says
        url = alone.url.replace("//", "//:open-sesame-1@")
        said = await look_at(tmp_path, sandbox.base_url, {"cache": {"redis": url}})
        told = " ".join(one.says for one in said.bad("redis", "cache.redis"))
        assert "is part of a cluster, and is asked as if it were alone" in told
        assert "maxmemory is not set" in told
    said = await look_at(tmp_path, sandbox.base_url, locked)
    assert "nobody listens there" in said.bad("redis")[0].says


async def test_a_replica_and_a_user_without_scripts(
    tmp_path: Path, sandbox: SandboxServer, valkey: Valkey
) -> None:
    with run_valkey("--replicaof", "127.0.0.1", str(valkey.port)) as replica:
        tell(replica, "ACL", "SETUSER", "poor", "on", ">poor-password-1", "+info", "+time")
        url = replica.url.replace("//", "//poor:poor-password-1@")
        said = await look_at(tmp_path, sandbox.base_url, {"storage": {"redis": url}})
    told = [one.says for one in said.bad("redis", "storage.redis") if one.state is FAIL]
    assert told[0].startswith("refuses what the gateway asks: ")
    assert told[1] == "is a replica: nothing can be written there"


@pytest.mark.parametrize(
    "rights",
    [
        "~other:* +@all",
        "~gw* +@read +eval",
        "~gw* +@all -@scripting",
        "~gw* +@all -@sortedset",
        "~gw:* +@all",
    ],
)
async def test_a_user_that_may_not_do_what_the_gateway_does(
    tmp_path: Path, sandbox: SandboxServer, valkey: Valkey, rights: str
) -> None:
    """And what the doctor advises is enough."""
    tell(valkey, "ACL", "SETUSER", "gw", "reset", "on", ">poor-password-1", *rights.split())
    url = valkey.url.replace("//", "//gw:poor-password-1@")
    changes = {"storage": {"redis": url}}
    said = await look_at(tmp_path, sandbox.base_url, changes)
    found = said.the(FAIL, "redis", "storage.redis")
    assert "refuses what the gateway asks: " in found.says
    assert "ermissions" in found.says
    advised = found.fix.partition(" name ")[2].partition(" (")[0].split()
    tell(valkey, "ACL", "SETUSER", "gw", "reset", "on", ">poor-password-1", *advised)
    said = await look_at(tmp_path, sandbox.base_url, changes)
    assert [one for one in said.bad("redis") if one.state is FAIL] == []
    tell(valkey, "ACL", "SETUSER", "gw", "-info")
    said = await look_at(tmp_path, sandbox.base_url, changes)
    assert [one for one in said.bad("redis") if one.state is FAIL] == []
    assert "says nothing of itself" in said.bad("redis")[0].says


async def test_a_redis_that_is_not_as_its_url_says(
    tmp_path: Path, sandbox: SandboxServer, valkey: Valkey
) -> None:
    for url, says, fix in (
        (valkey.url.replace("//", "//x:not-its-password@"), "let the gateway in", "password"),
        (f"{valkey.url.removesuffix('0')}99", "no such database", "a number that it has"),
        (valkey.url.replace("redis:", "redis+cluster:"), "is no cluster", "write redis://"),
    ):
        said = await look_at(tmp_path, sandbox.base_url, {"storage": {"redis": url}})
        [found] = [one for one in said.bad("redis") if one.state is FAIL]
        assert says in found.says
        assert fix in found.fix
        assert "start it" not in found.fix


# Databases


async def test_a_new_postgres(tmp_path: Path, sandbox: SandboxServer) -> None:
    storage = {"database": server().fresh_database(), "pepper": PEPPER}
    said = await look_at(tmp_path, sandbox.base_url, {"storage": storage})
    found = [one.says for one in said.of("database", " at 127.0.0.1:")]
    assert "is up to date, a row could be written (and was rolled back)" in found[0]
    assert "fsync or full_page_writes is off" in said.the(WARN, "database").says, "the tests' own"
    assert any(one.startswith("room for ") for one in found)
    assert said.the(OK, "clock", "against PostgreSQL").says.startswith("equal")
    settings = load(tmp_path / "gateway.yaml", {})
    store = open_store(settings)
    assert await store.directory.teams() == []
    await store.aclose()


async def test_a_postgres_without_a_schema_or_room(tmp_path: Path, sandbox: SandboxServer) -> None:
    url = server().empty_database()
    name = urlsplit(url).path.strip("/")
    server().execute(f'ALTER DATABASE "{name}" CONNECTION LIMIT 5')
    changes = {
        "server": {"replicas": 3, "workers": 2},
        "storage": {"database": url, "pepper": PEPPER},
    }
    said = await look_at(tmp_path, sandbox.base_url, changes)
    bad = {one.says: one.fix for one in said.bad("database")}
    assert any("has schema 0, this program needs" in one for one in bad)
    assert "run: gateway db upgrade" in bad.values()
    assert any("6 processes need 12" in one for one in bad)


async def test_a_role_that_may_not_write(tmp_path: Path, sandbox: SandboxServer) -> None:
    url = server().fresh_database()
    server().execute("DROP ROLE IF EXISTS reader")
    server().execute("CREATE ROLE reader LOGIN PASSWORD 'reader-password-1'")
    parts = urlsplit(url)
    poor = f"postgresql://reader:reader-password-1@127.0.0.1:{parts.port}{parts.path}"
    storage = {"database": poor, "pepper": PEPPER}
    said = await look_at(tmp_path, sandbox.base_url, {"storage": storage})
    assert "permission denied for table schema_version" in said.the(FAIL, "database").says
    assert said.the(FAIL, "database").fix.startswith("GRANT ")
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
        owner.execute("GRANT ALL ON balance, hold TO reader")
        said = await look_at(tmp_path, sandbox.base_url, {"storage": storage})
        owner.execute("DROP OWNED BY reader")
    server().execute("DROP ROLE reader")
    found = said.the(FAIL, "database")
    assert found.says.startswith("the role may not read and write adjustment, ")
    assert "hold" not in found.says


async def test_a_postgres_that_is_away(tmp_path: Path, sandbox: SandboxServer) -> None:
    url = f"postgresql://gateway:a-password-1@127.0.0.1:{closed_port()}/gateway"
    storage = {"database": url, "pepper": PEPPER}
    said = await look_at(tmp_path, sandbox.base_url, {"storage": storage})
    found = said.the(FAIL, "database")
    assert "refused" in found.says
    assert "psql with the same url" in found.fix


def test_what_postgres_says_of_itself() -> None:
    good = PostgresGlance(
        "17.2", Versions(1, 1), encrypted=False, local=True, now=now(), free=90, ours=4
    )

    def bad(**changes: Any) -> list[str]:
        values = {name: getattr(good, name) for name in PostgresGlance.__slots__} | changes
        found = judge_postgres(Topic("database"), PostgresGlance(**values), 2)
        return [one.says for one in found if one.state in (WARN, FAIL)]

    assert bad() == []
    assert "not encrypted" in bad(local=False)[0]
    assert bad(local=False, encrypted=True) == []
    assert "nothing is acknowledged" in bad(standby_names="one", standbys=0)[0]
    assert bad(standby_names="one", standbys=None) == []
    assert "by transaction" in bad(pooled=True, shared=True)[0]
    assert bad(pooled=True) == []
    assert "newer" in bad(schema=Versions(2, 1))[0] or "schema 2" in bad(schema=Versions(2, 1))[0]
    assert bad(free=0) == [], "those that run have their connections"
    assert "room for 1 more connection" in bad(free=1, ours=0)[0]
    assert bad(refused="disk full") == ["cannot be written: disk full"]


async def test_an_sqlite_file_beside_who_writes_it(tmp_path: Path, sandbox: SandboxServer) -> None:
    config = config_of(tmp_path, sandbox.base_url, {})
    store = open_store(load(config, {}))
    soon = SystemClock().now() + timedelta(days=3, hours=1)
    await store.directory.create_team(Team(id="made"))
    await store.directory.create_key(Key(id="k1", team="made", expires=soon), b"digest")
    with contextlib.closing(sqlite3.connect(tmp_path / "data/gateway.db")) as busy:
        busy.execute("BEGIN IMMEDIATE")
        (tmp_path / "data" / PEPPER_FILE).write_text(PEPPER)
        said = await look_at(tmp_path, sandbox.base_url)
        busy.execute("ROLLBACK")
    assert "whole and writable; schema " in said.the(OK, "database", "gateway.db").says
    assert said.the(WARN, "keys", "made, k1").says.startswith("expires in 3 days")
    assert said.of("teams")[0].says.endswith("design, growth, made")
    await store.directory.create_team(Team(id="more"))
    await store.aclose()
    before = sorted(path.name for path in (tmp_path / "data").iterdir())
    said = await look_at(tmp_path, sandbox.base_url)
    assert said.of("teams")[0].says.endswith("design, growth, made, more")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == before


async def test_keys_that_no_pepper_fits(tmp_path: Path, sandbox: SandboxServer) -> None:
    config = config_of(tmp_path, sandbox.base_url, {})
    store = open_store(load(config, {}))
    await store.directory.create_team(Team(id="made"))
    await store.directory.create_key(Key(id="k1", team="made", pepper="deadbeef"), b"digest")
    await store.aclose()
    said = await look_at(tmp_path, sandbox.base_url)
    lost = said.the(FAIL, "secrets", "pepper")
    assert f"{PEPPER_FILE} is missing" in lost.says
    assert not (tmp_path / "data" / PEPPER_FILE).exists(), "the doctor makes none"
    changes = {"storage": {"pepper": PEPPER, "old_peppers": [PEPPER[::-1]]}}
    said = await look_at(tmp_path, sandbox.base_url, changes)
    assert "1 key in the database cannot be used" in said.the(FAIL, "secrets", "pepper").says


async def test_files_that_are_no_database_of_ours(tmp_path: Path, sandbox: SandboxServer) -> None:
    path = tmp_path / "data" / "gateway.db"
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE notes (text)")
    said = await look_at(tmp_path, sandbox.base_url, offline=True)
    assert said.the(FAIL, "database").says == "is not a database of this gateway"
    path.write_bytes(b"not a database at all, " * 100)
    said = await look_at(tmp_path, sandbox.base_url, offline=True)
    assert "file is not a database" in said.the(FAIL, "database").says


async def test_a_damaged_file(tmp_path: Path, sandbox: SandboxServer) -> None:
    store = open_store(load(config_of(tmp_path, sandbox.base_url, {}), {}))
    await store.aclose()
    path = tmp_path / "data" / "gateway.db"
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)
    said = await look_at(tmp_path, sandbox.base_url, offline=True)
    assert "restore it from a backup" in said.the(FAIL, "database").fix
    assert "Page 2" in said.the(FAIL, "database").says


def test_what_sqlite_says_of_itself() -> None:
    topic = Topic("database")

    def judged(**changes: Any) -> list[State]:
        values: dict[str, Any] = {"schema": Versions(2, 2), "ours": True, "journal_mode": "wal"}
        found = judge_sqlite(topic, SqliteGlance(**{**values, "wal_bytes": 0, **changes}))
        return [one.state for one in found]

    assert judged() == [OK]
    assert judged(damage=None) == [SKIPPED]
    assert judged(damage="page 3") == [FAIL]
    assert judged(schema=Versions(3, 2)) == [FAIL]
    assert judged(schema=Versions(1, 2)) == [OK]
    assert judged(journal_mode="delete", wal_bytes=1 << 30) == [OK, WARN, WARN]
    assert judge_library((3, 51, 3)).state is OK
    old = judge_library((3, 40, 1))
    assert old.state is WARN
    assert "works around it" in old.says


# Files, disks, the machine


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """That every user gets to, as they do not to those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


async def test_who_may_read_the_secrets(open_folder: Path, sandbox: SandboxServer) -> None:
    tmp_path = open_folder
    key = tmp_path / "key.txt"
    key.write_text(f"{UPSTREAM_KEY}-2\n")
    changes = {"upstreams": {"openai": {"api_keys": ["${file:key.txt}", UPSTREAM_KEY]}}}
    config_of(tmp_path, sandbox.base_url, changes).chmod(0o666)
    key.chmod(0o604)
    said = await look_at(tmp_path, sandbox.base_url, changes, offline=True)
    assert {one.subject for one in said.bad("secrets")} == {
        str(tmp_path / "gateway.yaml"),
        str(key),
    }
    assert said.bad("secrets", str(key))[0].fix == f"chmod o-rwx {key}"
    assert "may change" in said.bad("config")[-1].says
    tmp_path.chmod(0o700)
    said = await look_at(tmp_path, sandbox.base_url, changes, offline=True)
    assert said.bad("secrets") == [], "nobody gets there"
    tmp_path.chmod(0o755)
    for path in (key, tmp_path / "gateway.yaml"):
        path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    said = await look_at(tmp_path, sandbox.base_url, changes, offline=True)
    assert said.bad("secrets") == []


def test_a_secret_of_another_user(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed to all others, the gateway could not read it either."""
    key = open_folder / "key.txt"
    key.write_text(f"{UPSTREAM_KEY}-2\n")
    key.chmod(0o644)
    changes = {"upstreams": {"openai": {"api_keys": ["${file:key.txt}"]}}}
    monkeypatch.setattr("os.geteuid", lambda: 65532)
    monkeypatch.setattr("os.getegid", lambda: 65532)
    monkeypatch.setattr("os.getgroups", list)
    said = asyncio.run(look_at(open_folder, "http://127.0.0.1:1/v1", changes, offline=True))
    [found] = said.bad("secrets", str(key))
    assert found.fix == f"chown 65532 {key} && chmod o-rwx {key}"
    # As Compose mounts it, with the mode that config/compose.yaml tells to give it.
    monkeypatch.setattr("gateway.doctor.files.is_mounted", lambda path: path == key.resolve())
    said = asyncio.run(look_at(open_folder, "http://127.0.0.1:1/v1", changes, offline=True))
    assert said.bad("secrets", str(key)) == []
    mounts = open_folder / "mounts"
    mounts.write_text("/dev/sda1 /run/secrets/a\\040key ext4 ro 0 0\n")
    assert is_mounted(Path("/run/secrets/a key"), mounts)
    assert not is_mounted(Path("/run/secrets"), mounts)


async def test_folders_that_cannot_be_written(tmp_path: Path, sandbox: SandboxServer) -> None:
    (tmp_path / "file").write_text("")
    changes = {
        "storage": {"database": "sqlite:///file/gateway.db", "blobs": "/proc/blobs"},
        "ledger": {"spool": "/proc/1"},
    }
    said = await look_at(tmp_path, sandbox.base_url, changes, offline=True)
    told = {one.subject: one.says for one in said.bad("disk")}
    assert set(told) == {"storage.database", "storage.blobs", "ledger.spool"}
    assert f"{tmp_path / 'file'} " in told["storage.database"]
    assert "cannot be made" in said.bad("database", "file/gateway.db")[0].says


def test_a_folder_that_this_user_may_only_read() -> None:
    """As somebody who is not root: root may write everywhere."""
    with tempfile.TemporaryDirectory(prefix="doctor-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "blobs").mkdir(mode=0o555)
        (folder / "blobs").chmod(0o555)
        look_there = (
            "import sys; from pathlib import Path; from gateway.doctor.disks import probe\n"
            "for one in sys.argv[1:]: print(probe(Path(one)))"
        )
        asked = [str(folder / "blobs"), str(folder / "blobs" / "new"), str(folder.parent)]
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY + look_there, *asked],
            capture_output=True,
            text=True,
            check=True,
        )
    said = done.stdout.splitlines()
    assert said[0] == "Permission denied"
    assert said[1] == f"{folder / 'blobs'} is read-only for this user"
    assert said[2] == "", "and what may be written is"


AS_NOBODY = """
import os
import gateway.doctor.disks, gateway.doctor.finding
if os.geteuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
"""


def test_what_is_kept_and_where(tmp_path: Path) -> None:
    clock = SystemClock()
    full = look(Kept("storage.blobs", tmp_path / "blobs", 1 << 60), clock)
    assert full.state is WARN
    assert "may be wanted" in full.says
    assert look(Kept("storage.blobs", tmp_path, 1), clock).state is OK
    shared = Path("/dev/shm")
    if shared.is_dir():
        memory = look(Kept("ledger.spool", shared / "x", lasting=True), clock)
        assert memory.state is WARN
        assert "tmpfs" in memory.says


def test_what_the_machine_gives(tmp_path: Path) -> None:
    settings = load(
        config_of(
            tmp_path, "http://127.0.0.1/v1", {"server": {"workers": 4}, "cache": {"redis": None}}
        ),
        {},
    )
    assert judge_cores(settings, 2).state is WARN
    assert judge_cores(settings, 4).state is OK
    assert judge_memory(settings, 256 << 20).state is WARN
    assert judge_memory(settings, 8 << 30).state is OK
    assert judge_memory(settings, 0).state is SKIPPED
    few = judge_descriptors(settings, 1024)
    assert few.state is WARN
    assert "1024 in each process" in few.says
    assert judge_descriptors(settings, 1 << 20).state is OK


async def test_the_chain_of_time_outs(tmp_path: Path, sandbox: SandboxServer) -> None:
    times = {"total_seconds": 60, "connect_seconds": 90, "first_byte_seconds": 600}
    changes = {
        "relay": {"keep_alive_seconds": 75, "max_wait_seconds": 500},
        "upstreams": {"openai": {"timeouts": times}},
        "server": {"trusted_proxies": ["0.0.0.0/0", "10.0.0.0/8"], "queue_seconds": 7},
    }
    said = await look_at(tmp_path, sandbox.base_url, changes, offline=True)
    told = " ".join(one.says for one in said.bad("time-outs"))
    for word in ("total_seconds is 60", "first_byte_seconds (600)", "connect_seconds (90)",
                 "keep_alive_seconds is 75", "max_wait_seconds (500)"):  # fmt: skip
        assert word in told
    assert said.the(WARN, "doors", "trusted_proxies").says.startswith("0.0.0.0/0 is nearly every")
    changes = {"server": {"public_url": "https://images.test"}}
    said = await look_at(tmp_path, sandbox.base_url, changes, offline=True)
    assert "https://images.test/v1/images/hosted/" in said.the(OK, "doors", "public_url").says
    said = await look_at(tmp_path, sandbox.base_url, offline=True)
    assert said.bad("time-outs") == said.bad("doors") == []
    answer, end = said.of("time-outs")
    assert "may take 605 s" in answer.says
    assert "wait 640 s" in end.says


def test_clocks_are_compared_as_well_as_they_can_be_read() -> None:
    noon = datetime(2026, 11, 22, 12, tzinfo=UTC)
    for seconds, round_trip, grain, state in (
        (0.9, 0.0, 0.0, OK),
        (-0.9, 0.0, 0.0, OK),
        (1.1, 0.0, 0.0, WARN),
        (2.4, 3.0, 0.0, OK),
        (1.9, 0.0, 1.0, OK),
        (2.1, 0.0, 1.0, WARN),
        (-1.1, 0.0, 1.0, WARN),
    ):
        ours = noon + timedelta(seconds=seconds)
        assert compared("it", noon, ours, round_trip, grain).state is state, seconds
    assert "behind it" in compared("it", noon, noon - timedelta(hours=1), 0).says
    assert date_of("Sun, 22 Nov 2026 12:00:00 GMT") == noon
    assert date_of("yesterday") is None
    assert date_of("") is None


def test_bytes_for_people() -> None:
    assert [sized(one) for one in (0, 1024, 1536, 10 << 30, 5 << 40)] == [
        "0 B",
        "1 KiB",
        "1.5 KiB",
        "10 GiB",
        "5120 GiB",
    ]


# Helpers


def now() -> datetime:
    return SystemClock().now()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


def tell(valkey: Valkey, *words: str) -> None:
    with socket.create_connection(("127.0.0.1", valkey.port), timeout=5) as wire:
        parts = "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
        wire.sendall(f"*{len(words)}\r\n{parts}".encode())
        assert wire.recv(100).startswith(b"+OK")


def set_option(valkey: Valkey, name: str, value: str) -> None:
    tell(valkey, "CONFIG", "SET", name, value)
