"""What the contract suites run against."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from gateway.stores.redis_link import Client, connect
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
