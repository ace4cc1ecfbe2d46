from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.sandbox.server import SandboxServer
from tests.departures import Departures, watch_departures
from tests.flying import Fly, House, flier
from tests.postgres import Postgres, run_postgres
from tests.running import GatewayUnderTest, Start, TestClock, config_of, run_gateway


@pytest.fixture
def clock(request: pytest.FixtureRequest) -> TestClock:
    """A server of PostgreSQL lets keys and leases end by its own clock: beside one the day of a
    test is today."""
    if "postgres" in request.fixturenames:
        return TestClock(datetime.now(UTC))
    return TestClock()


@pytest.fixture
def sandbox(clock: TestClock) -> Iterator[SandboxServer]:
    with SandboxServer(clock) as running:
        yield running


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server, never mistreated; each test has a database of its own there."""
    with run_postgres() as running:
        yield running


@pytest.fixture
def start(tmp_path: Path, sandbox: SandboxServer, clock: TestClock) -> Start:
    """Starts a gateway with changes to its configuration, merged by name."""

    def begin(
        changes: Mapping[str, Any] | None = None,
    ) -> contextlib.AbstractAsyncContextManager[GatewayUnderTest]:
        return run_gateway(tmp_path, sandbox, changes, clock)

    return begin


@pytest.fixture
async def gateway(start: Start) -> AsyncIterator[GatewayUnderTest]:
    """A gateway as it comes: no limits, the cache on."""
    async with start() as running:
        yield running


@pytest.fixture
def no_star(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gateway of the test is configured without the model of all other names."""

    def config(folder: Path, upstream: str, changes: Mapping[str, Any]) -> Path:
        path = config_of(folder, upstream, changes)
        document = yaml.safe_load(path.read_text())
        del document["models"]["*"]
        path.write_text(yaml.safe_dump(document))
        return path

    monkeypatch.setattr("tests.running.config_of", config)


@pytest.fixture
def fly(monkeypatch: pytest.MonkeyPatch, start: Start) -> Fly:
    """Starts a gateway that can be looked into."""
    return flier(monkeypatch, start)


@pytest.fixture
async def house(fly: Fly) -> AsyncIterator[House]:
    """Such a gateway, as it comes."""
    async with fly() as running:
        yield running


@pytest.fixture
def departures(monkeypatch: pytest.MonkeyPatch) -> Departures:
    return watch_departures(monkeypatch)
