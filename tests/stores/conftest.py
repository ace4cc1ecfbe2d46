"""The servers that the tests of stores share, and those that they mistreat."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from gateway.stores.redis_link import Client, connect
from tests.awake import Awake
from tests.awake import awake as awake_clock
from tests.valkey import Valkey, run_valkey


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    """One to be killed, frozen and filled."""
    with run_valkey() as server:
        yield server


@pytest.fixture
async def admin(valkey: Valkey) -> AsyncIterator[Client]:
    """Somebody who looks into it."""
    client = connect(valkey.url, timeout=5.0)
    yield client
    await client.aclose()


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[Valkey]:
    """One for all tests that do it no harm."""
    with run_valkey() as server:
        yield server


@pytest.fixture
async def client(shared_valkey: Valkey) -> AsyncIterator[Client]:
    """A client of its own, on a server that is empty."""
    client = connect(shared_valkey.url)
    await client.execute_command("FLUSHALL")
    yield client
    await client.aclose()


@pytest.fixture
async def awake() -> AsyncIterator[Awake]:
    async with awake_clock() as clock:
        yield clock
