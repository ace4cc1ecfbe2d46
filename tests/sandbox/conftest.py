from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from openai import DefaultHttpxClient, OpenAI

from gateway.sandbox.server import SandboxServer
from tests.clock import StillClock


@pytest.fixture
def clock() -> StillClock:
    """2026-11-22, the day of the contract, until a test moves it."""
    return StillClock()


@pytest.fixture
def server(clock: StillClock) -> Iterator[SandboxServer]:
    with SandboxServer(clock, control=True) as running:
        yield running


@pytest.fixture
def http(server: SandboxServer) -> Iterator[httpx.Client]:
    """A plain client with a key, for what an SDK would not send."""
    with httpx.Client(
        base_url=server.base_url, headers={"authorization": "Bearer any"}, timeout=20, verify=False
    ) as client:
        yield client


@pytest.fixture
def sdk(server: SandboxServer) -> Iterator[OpenAI]:
    # Loading the authorities takes longer than most of these tests.
    plain = DefaultHttpxClient(verify=False, timeout=20)
    with OpenAI(
        base_url=server.base_url, api_key="any", max_retries=0, timeout=20, http_client=plain
    ) as client:
        yield client
