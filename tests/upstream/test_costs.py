"""The bill of an upstream, from the sandbox's own endpoint over a real socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import date
from typing import Any

import httpx
import pytest

from gateway.domain.bill import BilledItem
from gateway.ports import BillUnreadable
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from gateway.upstream import costs
from gateway.upstream.account import Account, AccountKey, AccountOptions, build_account
from gateway.upstream.costs import ATTEMPTS, read_costs
from tests.clock import StillClock
from tests.upstream.calls import QUICK
from tests.upstream.test_account import Hidden

FLARE = "gpt-image-2.5-flare"
DAY = date(2026, 11, 22)
PATH = "/organization/costs"
DAY_SECONDS = 86_400
START = 1_795_305_600


@pytest.fixture
def clock() -> StillClock:
    return StillClock()


@pytest.fixture
def sandbox(clock: StillClock) -> Iterator[SandboxServer]:
    with SandboxServer(clock) as running:
        yield running


@asynccontextmanager
async def account(sandbox: SandboxServer, key: str = "sk-admin-1") -> AsyncIterator[Account]:
    made = build_account(
        AccountOptions("openai", sandbox.base_url, keys=(AccountKey(Hidden(key)),), timeouts=QUICK)
    )
    try:
        yield made
    finally:
        await made.aclose()


async def draw(sandbox: SandboxServer, n: int = 1) -> None:
    sandbox.rules.add(Rule(payload_bytes=100, times=1))
    body = {"model": FLARE, "prompt": "A lighthouse", "n": n, "quality": "low"}
    async with httpx.AsyncClient(
        base_url=sandbox.base_url, headers={"authorization": "Bearer any"}, verify=False
    ) as http:
        answer = await http.post("/images/generations", json={**body, "size": "1024x1024"})
        assert answer.status_code == 200


class Pauses:
    """Waits for nothing and remembers for how long it should have."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


async def test_the_items_of_a_day(sandbox: SandboxServer) -> None:
    await draw(sandbox, 2)
    async with account(sandbox) as upstream:
        found = await read_costs(upstream, DAY, DAY)
    assert found == {
        DAY: [
            BilledItem(f"{FLARE}, image output", 2 * 196 * 30_000),
            BilledItem(f"{FLARE}, text input", 3 * 5_000),
        ]
    }


async def test_pages_are_followed(sandbox: SandboxServer, clock: StillClock) -> None:
    await draw(sandbox)
    clock.advance(2 * DAY_SECONDS)
    await draw(sandbox, 3)
    async with account(sandbox) as upstream:
        found = await read_costs(upstream, DAY, date(2026, 11, 25), buckets_a_page=1)
    asked = [record for record in sandbox.journal if record.path.endswith(PATH)]
    assert len(asked) == 4
    images = [
        sum(item.amount for item in items if "output" in item.line_item) // (196 * 30_000)
        for _, items in sorted(found.items())
    ]
    assert images == [1, 0, 3, 0]


@pytest.mark.parametrize("key", ["sk-proj-1", "sk-upstream"])
async def test_a_key_that_may_not(sandbox: SandboxServer, key: str) -> None:
    async with account(sandbox, key) as upstream:
        with pytest.raises(BillUnreadable) as refused:
            await read_costs(upstream, DAY, DAY)
    assert str(refused.value).startswith(
        "upstreams.openai.admin_key may not read costs: HTTP 401 (You have insufficient"
    )
    assert key not in str(refused.value)


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_what_passes_is_tried_again(sandbox: SandboxServer, status: int) -> None:
    await draw(sandbox)
    sandbox.rules.add(Rule(path=PATH, status=status, times=2, headers={"retry-after": "7"}))
    sandbox.rules.add(Rule(path=PATH, cut_before_headers=True, status=500, times=1))
    pauses = Pauses()
    async with account(sandbox) as upstream:
        found = await read_costs(upstream, DAY, DAY, pause=pauses)
    assert pauses.seconds == [7, 7, 4]
    assert len(found[DAY]) == 2


async def test_what_does_not_pass(sandbox: SandboxServer) -> None:
    sandbox.rules.add(Rule(path=PATH, status=503))
    pauses = Pauses()
    async with account(sandbox) as upstream:
        with pytest.raises(BillUnreadable, match=r"HTTP 503, 4 times.*--csv"):
            await read_costs(upstream, DAY, DAY, pause=pauses)
    assert len(pauses.seconds) == ATTEMPTS - 1
    assert sandbox.journal.received == ATTEMPTS


async def test_it_does_not_wait_for_ever(
    sandbox: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "DEADLINE_SECONDS", 0.1)
    sandbox.rules.add(Rule(path=PATH, wait_for=Gate()))
    async with account(sandbox) as upstream:
        with pytest.raises(BillUnreadable, match="not read within 0 s; try again later"):
            await read_costs(upstream, DAY, DAY)


async def test_an_upstream_without_the_endpoint(sandbox: SandboxServer) -> None:
    sandbox.rules.add(Rule(path=PATH, status=404, body={"detail": "Not Found"}))
    async with account(sandbox) as upstream:
        with pytest.raises(BillUnreadable, match=r"answered HTTP 404 .*--csv FILE"):
            await read_costs(upstream, DAY, DAY)


def result(value: Any, currency: str = "usd", item: str | None = "m, x") -> dict[str, Any]:
    return {"amount": {"value": value, "currency": currency}, "line_item": item}


def bucket(*results: Any, start: Any = START) -> dict[str, Any]:
    return {"object": "bucket", "start_time": start, "results": list(results)}


def page(*buckets: Any, **more: Any) -> dict[str, Any]:
    return {"object": "page", "data": list(buckets), "has_more": False, **more}


async def said(sandbox: SandboxServer, body: Any) -> dict[date, list[BilledItem]]:
    """What is read where an upstream answers just this."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    sandbox.rules.add(Rule(path=PATH, status=200, body=raw, content_type="application/json"))
    async with account(sandbox) as upstream:
        return await read_costs(upstream, DAY, DAY)


async def test_amounts_are_rounded_to_nano_dollars_from_their_text(sandbox: SandboxServer) -> None:
    raw = json.dumps(page(bucket(result("X"), result("1.5e-3"), result(-2), result(0))))
    raw = raw.replace('"X"', "0.05999999999999999778")
    found = await said(sandbox, raw.encode())
    assert [item.amount for item in found[DAY]] == [60_000_000, 1_500_000, -2_000_000_000, 0]


async def test_only_the_days_that_were_asked_for(sandbox: SandboxServer) -> None:
    other = bucket(result(1), start=START + DAY_SECONDS)
    assert await said(sandbox, page(bucket(), other)) == {DAY: []}


async def test_a_day_without_a_bucket_is_not_known(sandbox: SandboxServer) -> None:
    assert await said(sandbox, page()) == {}


async def test_what_has_no_name_keeps_its_money(sandbox: SandboxServer) -> None:
    found = await said(sandbox, page(bucket(result(1, item=None), {"amount": None})))
    assert found == {DAY: [BilledItem("", 1_000_000_000)]}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"<html>", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"data": [{"start_time": NaN}]}', "not JSON"),
        ([], "the answer is not an object"),
        ({}, "data is not a list"),
        (page(1), "data\\[\\] is not an object"),
        (page(bucket(start="x")), "start_time"),
        (page(bucket(1)), "results\\[\\] is not an object"),
        (page({"start_time": START}), "results is not a list"),
        (page(bucket(result(1, "eur"))), "'eur'"),
        (page(bucket(result(None))), "no value"),
        (page(bucket(result(True))), "no value"),
        (page(bucket(result("much"))), "'much' is not an amount"),
        (page(bucket(result("1e400000"))), "more than"),
        (page(has_more=True), "next_page"),
        (page(has_more=True, next_page="again"), "next_page"),
    ],
)
async def test_an_answer_that_makes_no_sense(sandbox: SandboxServer, body: Any, why: str) -> None:
    with pytest.raises(BillUnreadable, match=why):
        await said(sandbox, body)
