"""What every answer says of money and rates, however it ends; and what a call would cost."""

from __future__ import annotations

import base64
import io
import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from openai import APIStatusError
from PIL import Image

import gateway.app
import gateway.relay.purchase
from gateway.domain.ledger import Line
from gateway.domain.money import Money, format_dollars, parse_dollars
from gateway.domain.quota import Scope, Unit, period
from gateway.domain.team import Limits
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.settings import Settings
from gateway.stores.sqlite import SQLiteStore
from tests.running import ALIAS, KEY, MODEL, OTHER_KEY, GatewayUnderTest, Start

ASKED: dict[str, Any] = {
    "model": MODEL,
    "prompt": "A lighthouse",
    "quality": "low",
    "size": "1024x1024",
}
COST, BOUND = 5_895_000, 5_940_000
"""Of one such picture, in nano-dollars: 196 tokens and those of the prompt, or its bytes."""
GENERATIONS, EDITS, ESTIMATE = "/images/generations", "/images/edits", "/images/estimate"
LIMITS = Limits(
    requests_per_minute=600,
    images_per_minute=6,
    budget_day=parse_dollars("5"),
    budget_month=parse_dollars("4"),
)
TEAM: dict[str, Any] = {
    "limits": {"requests_per_minute": 600, "images_per_minute": 6},
    "budget": {"day": 5, "month": 4},
}
PAID = ("x-cost-usd", "x-cost-basis")
BUDGET = ("x-budget-remaining-usd", "x-budget-reset")
ROUTE = ("x-cache", "x-model-served", "x-gateway-upstream")
RATES = tuple(
    f"x-ratelimit-{what}-{unit}"
    for unit in ("requests", "images")
    for what in ("limit", "remaining", "reset")
)
SHOWN = {*PAID, "x-cost-bound-usd", *BUDGET, *ROUTE, *RATES, "x-gateway-attempts", "age"}


def with_team(**changes: Any) -> dict[str, Any]:
    return {"teams": {"growth": {**TEAM, **changes}}}


async def remaining(gateway: GatewayUnderTest, limits: Limits = LIMITS) -> Money:
    """What is left of the team's tightest budget, by the ledger."""
    now = gateway.clock.now()
    lines = [
        Line(limit, period(limit.window, now))
        for limit in limits.of(Scope.TEAM, "growth")
        if limit.unit is Unit.MONEY and limit.amount is not None
    ]
    balances = await gateway.gateway.ledger.balances(lines)
    return min(
        (line.limit.amount or 0) - balance.used
        for line, balance in zip(lines, balances, strict=True)
    )


@pytest.fixture(autouse=True)
def quick(sandbox: SandboxServer) -> None:
    """Pictures that need no drawing."""
    sandbox.rules.add(Rule(prompt="A lighthouse", payload_bytes=400))


# The endings.


@dataclass(frozen=True)
class Ending:
    """One way to end: what is asked, and what the answer then says, beside what is left.

    ``says`` are the headers by value, ``names`` those that only have to be there; no other of the
    list may be.
    """

    status: int
    says: Mapping[str, str]
    names: tuple[str, ...] = (*BUDGET, *ROUTE, *RATES)
    asked: Mapping[str, Any] = field(default_factory=dict)
    rule: Mapping[str, Any] | None = None
    held: Money = 0
    """What is held while the answer's headers leave, and given back later."""


FREE = {"x-cost-usd": "0", "x-cost-basis": "none", "x-gateway-attempts": "0"}
UNPAID = {**FREE, "x-gateway-attempts": "1"}
AT_BOUND = {"x-cost-usd": "0.00594", "x-cost-basis": "estimated", "x-gateway-attempts": "1"}
UPSTREAM = {"x-model-served": MODEL, "x-gateway-upstream": "openai"}
TAKEN = {"x-ratelimit-remaining-images": "5", "x-ratelimit-reset-images": "10.000s"}
NOT_TAKEN = {"x-ratelimit-remaining-images": "6", "x-ratelimit-reset-images": "0.000s"}

ENDINGS = {
    "json": Ending(
        200,
        {
            **{"x-cost-usd": "0.005895", "x-cost-basis": "usage", "x-gateway-attempts": "1"},
            **{"x-cache": "miss", **UPSTREAM, **TAKEN},
        },
    ),
    "alias": Ending(
        200,
        {"x-cost-usd": "0.005895", "x-cost-basis": "usage", "x-gateway-attempts": "1", **UPSTREAM},
        asked={"model": ALIAS},
    ),
    "stream": Ending(
        200,
        {"x-cost-bound-usd": "0.00894", "x-gateway-attempts": "1", "x-cache": "miss", **TAKEN},
        asked={"stream": True, "partial_images": 1},
        held=8_940_000,
    ),
    "unreadable": Ending(400, FREE, BUDGET, asked={"n": "two"}),
    "too many for a request": Ending(400, FREE, BUDGET, asked={"n": 11}),
    "never fits": Ending(
        400, {**FREE, "x-cache": "miss"}, (*BUDGET, *ROUTE), asked={"n": 7, "prompt": "A row"}
    ),
    "not allowed": Ending(403, FREE, BUDGET, asked={"model": "gpt-image-2"}),
    "unknown": Ending(404, FREE, BUDGET, asked={"model": "*"}),
    "no room": Ending(
        429,
        {**FREE, "x-cache": "miss", **NOT_TAKEN},
        asked={"n": 6, "quality": "auto", "size": "auto"},
    ),
    "upstream 400": Ending(
        400, {**UNPAID, **TAKEN, **UPSTREAM}, rule={"status": 400, "headers": {"x-a": "b"}}
    ),
    "upstream 429": Ending(429, {**UNPAID, **UPSTREAM}, rule={"status": 429}),
    "upstream 500": Ending(500, {**UNPAID, **TAKEN, **UPSTREAM}, rule={"status": 500}),
    "account refused": Ending(503, {**UNPAID, **UPSTREAM}, rule={"status": 401}),
    "upstream 502": Ending(504, {**AT_BOUND, **UPSTREAM}, rule={"status": 502}),
    "cut before": Ending(502, {**AT_BOUND, **UPSTREAM}, rule={"cut_before_headers": True}),
    "cut": Ending(502, {**AT_BOUND, **TAKEN, **UPSTREAM}, rule={"cut_after_bytes": 100}),
    "empty": Ending(
        502,
        {"x-cost-usd": "0.005895", "x-cost-basis": "usage", "x-gateway-attempts": "1"},
        rule={"empty_data": True},
    ),
    "cut stream": Ending(
        502,
        {**AT_BOUND, **UPSTREAM},
        asked={"stream": True},
        rule={"sse_cut_after": 0},
    ),
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
async def test_every_ending_says_what_is_known(
    start: Start, sandbox: SandboxServer, ending: Ending
) -> None:
    if ending.rule is not None:
        sandbox.rules.clear()
        sandbox.rules.add(Rule(**ending.rule))
    config = with_team(models=[MODEL, ALIAS, "dall-e-3"])
    async with start(config) as gateway, gateway.http() as http:
        answer = await http.post(GENERATIONS, json={**ASKED, **ending.asked})
        assert answer.status_code == ending.status, answer.text
        await gateway.told.until(1)
        said = {name: value for name, value in answer.headers.items() if name in SHOWN}
        assert said.items() >= ending.says.items(), said
        assert said.keys() == {*ending.says, *ending.names}
        assert answer.headers["x-request-id"] == gateway.told.last.rid
        left = await remaining(gateway)
        if ending.held:
            left += gateway.told.last.cost - ending.held
        assert said["x-budget-remaining-usd"] == format_dollars(left)
        assert said["x-budget-reset"] == "2026-12-01T00:00:00Z", "the month is the tighter one"
        if "x-cost-usd" in said:
            assert parse_dollars(said["x-cost-usd"]) == parse_dollars("4") - left


async def test_what_is_said_of_a_hit(start: Start) -> None:
    async with start(with_team()) as gateway, gateway.http() as http:
        await http.post(GENERATIONS, json=ASKED)
        for count in range(2, 4):
            answer = await http.post(GENERATIONS, json=ASKED)
            await gateway.told.until(count)
            said = answer.headers
            assert said["x-cache"] == "hit"
            assert {name: said[name] for name in FREE} == FREE
            assert said["x-budget-remaining-usd"] == "3.994105"
            assert said["x-budget-remaining-usd"] == format_dollars(await remaining(gateway))
            assert said["x-budget-reset"] == "2026-12-01T00:00:00Z"
            assert {name: said[name] for name in UPSTREAM} == UPSTREAM
            assert {"x-ratelimit-remaining-requests", "age"} <= said.keys()


async def test_a_rate_that_refuses_is_told_with_its_true_wait(start: Start) -> None:
    async with start(with_team(limits={"images_per_minute": 2})) as gateway, gateway.http() as http:
        for prompt in ("A lighthouse", "A lighthouse at dusk"):
            answer = await http.post(GENERATIONS, json={**ASKED, "prompt": prompt})
            assert answer.status_code == 200
        answer = await http.post(GENERATIONS, json={**ASKED, "prompt": "A lighthouse by day"})
        assert answer.status_code == 429
        said = answer.headers
        assert said["x-ratelimit-limit-images"] == "2"
        assert said["x-ratelimit-remaining-images"] == "0"
        reset = float(said["x-ratelimit-reset-images"].removesuffix("s"))
        assert 25 < reset <= 30
        assert abs(reset * 1000 - float(said["retry-after-ms"])) <= 1
        assert "x-ratelimit-limit-requests" not in said
        assert {name: said[name] for name in FREE} == FREE
        assert said["x-budget-remaining-usd"] == format_dollars(await remaining(gateway))


async def test_a_budget_without_an_end_has_no_reset(start: Start) -> None:
    budget = {"day": 5, "month": 4, "total": 0.01}
    async with start(with_team(budget=budget)) as gateway:
        async with gateway.http() as http:
            answer = await http.post(GENERATIONS, json=ASKED)
            assert answer.headers["x-budget-remaining-usd"] == "0.004105"
            assert "x-budget-reset" not in answer.headers
            await gateway.metrics()
            refused = await http.post(GENERATIONS, json={**ASKED, "prompt": "A lighthouse, again"})
        assert refused.status_code == 429
        assert refused.headers["x-budget-remaining-usd"] == "0.004105"
        assert "x-budget-reset" not in refused.headers
        assert refused.json()["error"]["message"] == (
            "Team growth has spent $0.006 of its $0.010 in all; this request could cost up to "
            "$0.006. It is not renewed: ask an administrator to raise it."
        )


async def test_the_tightest_of_key_and_team_is_told(start: Start) -> None:
    keys = [{"key": KEY, "name": "ci", "budget": {"week": 1}}]
    async with start(with_team(keys=keys)) as gateway, gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.generate(**ASKED)
        assert answer.headers["x-budget-remaining-usd"] == "0.994105"
        assert answer.headers["x-budget-reset"] == "2026-11-23T00:00:00Z"


async def test_a_stranger_is_told_nothing(start: Start) -> None:
    async with start(with_team()) as gateway, gateway.http("sk-nobody-0123456789abcdef") as http:
        answer = await http.post(GENERATIONS, json=ASKED)
        assert answer.status_code == 401
        assert not SHOWN & set(answer.headers)
        assert answer.headers["x-request-id"].startswith("req_")


async def test_without_limits_there_is_nothing_to_tell(gateway: GatewayUnderTest) -> None:
    async with gateway.http() as http:
        answers = [await http.post(GENERATIONS, json=ASKED) for _ in range(2)]
        answers.append(await http.post(GENERATIONS, json={**ASKED, "n": 0}))
    for answer in answers:
        assert not {*BUDGET, *RATES} & set(answer.headers)
        assert "x-cost-usd" in answer.headers


async def test_a_ledger_that_is_away_is_no_reason_to_say_nothing_else(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_store(settings: Settings) -> SQLiteStore:
        assert not isinstance(settings.storage.database, str)
        return SQLiteStore.open(settings.storage.database, busy_seconds=0.1)  # type: ignore[arg-type]

    monkeypatch.setattr(gateway.app, "open_store", open_store)
    async with start(with_team()) as running, running.http() as http:
        path = running.config.parent / "data" / "gateway.db"
        with closing(sqlite3.connect(path, isolation_level=None)) as stranger:
            stranger.execute("BEGIN EXCLUSIVE")
            answer = await http.post(GENERATIONS, json=ASKED)
            stranger.execute("ROLLBACK")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "ledger_unavailable"
        said = answer.headers
        assert {name: said[name] for name in {**FREE, **UPSTREAM}} == {**FREE, **UPSTREAM}
        assert {name: said[name] for name in NOT_TAKEN} == NOT_TAKEN
        # It can be read while somebody else writes: nothing is held.
        assert said["x-budget-remaining-usd"] == "4"
