"""The real OpenAI against what we assume: only `make live` runs it (two pictures, $0.015)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.clock import SystemClock
from gateway.sandbox.server import serve_sandbox
from tests.live.comparison import Findings, compare

OPENAI = "https://api.openai.com/v1"


@pytest.fixture
def findings() -> Iterator[Findings]:
    """Printed at the end, however it comes."""
    found = Findings()
    yield found
    print("\n  ".join(["", *found.seen, f"differences: {found.differences or 'none'}"]))


@pytest.mark.live
@pytest.mark.timeout(1300)
async def test_openai_does_what_we_assume(findings: Findings, tmp_path: Path) -> None:
    assert os.environ.get("LIVE") == "1", "this buys two pictures: run it with `make live`"
    key = os.environ.get("OPENAI_API_KEY", "")
    assert key, "set OPENAI_API_KEY to a key of your OpenAI account"
    assert not key.startswith("igw_"), "OPENAI_API_KEY holds a key of a gateway, not of OpenAI"
    await compare(findings, OPENAI, key, tmp_path)
    assert not findings.differences


async def test_rehearsal_on_the_sandbox(findings: Findings, tmp_path: Path) -> None:
    """The comparison itself works, and the sandbox does what we assume of OpenAI."""
    async with serve_sandbox(SystemClock()) as sandbox:
        await compare(findings, sandbox.base_url, "sk-rehearsal", tmp_path)
        assert [record.status for record in sandbox.journal] == [200, 200]
    assert not findings.differences
    assert findings.cost == 2 * 8 * 5_000 + (196 + 296) * 30_000
