"""What the contract suites run against."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gateway.domain.ledger import Entry, Settlement
from gateway.ports import Books, Directory, Ledger, Ownership, Store, Upkeep
from gateway.stores.redis_link import Client, connect
from tests.contract.stores import BACKENDS
from tests.redis_servers import Cluster, Sentinelled, run_cluster, run_sentinels
from tests.valkey import Valkey, run_valkey


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """One server for all suites, never mistreated. Each test empties it."""
    with run_valkey() as server:
        yield server


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three masters and their replicas, never mistreated."""
    with run_cluster() as running:
        yield running


@pytest.fixture(scope="session")
def sentinels() -> Iterator[Sentinelled]:
    """A master under sentinels, never mistreated."""
    with run_sentinels() as running:
        yield running


@pytest.fixture
async def admin(valkey: Valkey) -> AsyncIterator[Client]:
    """A client of its own on an empty server."""
    client = connect(valkey.url, timeout=5.0)
    await client.execute_command("FLUSHALL")
    yield client
    await client.aclose()


@pytest.fixture
def conflicts() -> list[tuple[Entry, Settlement]]:
    """Every settlement that named another amount than the one that stands."""
    return []


@pytest.fixture(params=BACKENDS)
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, conflicts: list[tuple[Entry, Settlement]]
) -> AsyncIterator[Store]:
    """Each store in turn, empty, in ``tmp_path``."""
    opened = BACKENDS[request.param](tmp_path, lambda *conflict: conflicts.append(conflict))
    yield opened
    await opened.aclose()


@pytest.fixture
def ledger(store: Store) -> Ledger:
    return store.ledger


@pytest.fixture
def books(store: Store) -> Books:
    return store.books


@pytest.fixture
def upkeep(store: Store) -> Upkeep:
    return store.upkeep


@pytest.fixture
def directory(store: Store) -> Directory:
    return store.directory


@pytest.fixture
def ownership(store: Store) -> Ownership:
    return store.ownership
