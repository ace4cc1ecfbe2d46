"""What every answer says of money and rates, however it ends; and what a call would cost."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError
from PIL import Image

import gateway.app
import gateway.relay.purchase
from gateway.domain.ledger import Balance, Line
from gateway.domain.money import Money, format_dollars, parse_dollars
from gateway.domain.quota import Scope, Unit, period
from gateway.domain.team import Limits
from gateway.reports.budgets import BudgetWatch
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.settings import Settings
from gateway.stores.sqlite import SQLiteStore
from gateway.stores.sqlite_ledger import SQLiteLedger
from tests.raw import JSON, RawAnswer, RawClient
from tests.running import ALIAS, KEY, MODEL, OTHER_KEY, GatewayUnderTest, Start
from tests.valkey import eventually

ASKED: dict[str, Any] = {
    "model": MODEL,
    "prompt": "A lighthouse",
    "quality": "low",
    "size": "1024x1024",
}
COST, BOUND = 5_895_000, 6_100_000
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
SMALL = "1024x1024"
NO_CACHE = {"cache-control": "no-cache"}
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
TWICE = {**FREE, "x-gateway-attempts": "2"}
AT_BOUND = {"x-cost-usd": "0.0061", "x-cost-basis": "estimated", "x-gateway-attempts": "1"}
UPSTREAM = {"x-model-served": MODEL, "x-gateway-upstream": "openai"}
TAKEN = {"x-ratelimit-remaining-images": "5", "x-ratelimit-reset-images": "10.000s"}
NOT_TAKEN = {"x-ratelimit-remaining-images": "6", "x-ratelimit-reset-images": "0.000s"}

ENDINGS = {
    "json": Ending(
        200,
        {
            "x-cost-usd": "0.005895",
            "x-cost-basis": "usage",
            "x-gateway-attempts": "1",
            "x-cache": "miss",
            **UPSTREAM,
            **TAKEN,
        },
    ),
    "alias": Ending(
        200,
        {"x-cost-usd": "0.005895", "x-cost-basis": "usage", "x-gateway-attempts": "1", **UPSTREAM},
        asked={"model": ALIAS},
    ),
    "stream": Ending(
        200,
        {"x-cost-bound-usd": "0.0091", "x-gateway-attempts": "1", "x-cache": "miss", **TAKEN},
        asked={"stream": True, "partial_images": 1},
        held=9_100_000,
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
    "upstream 500": Ending(500, {**TWICE, **TAKEN, **UPSTREAM}, rule={"status": 500}),
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


async def test_a_purchase_reads_no_balance_and_hits_and_estimates_one_a_second(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[float] = []
    told: set[str] = set()
    read = SQLiteLedger.balances

    async def counted(self: SQLiteLedger, lines: Sequence[Line]) -> list[Balance]:
        reads.append(asyncio.get_running_loop().time())
        return await read(self, lines)

    async def nothing(self: BudgetWatch) -> None:
        """The watch reads by itself, whoever asks."""

    monkeypatch.setattr(BudgetWatch, "look", nothing)
    monkeypatch.setattr(SQLiteLedger, "balances", counted)
    async with start(with_team(soft_budget={"total": 3})) as gateway, gateway.http() as http:
        for prompt in ("A lighthouse", "A lighthouse at dusk", "A lighthouse by day"):
            answer = await http.post(GENERATIONS, json={**ASKED, "prompt": prompt})
            assert answer.headers["x-cache"] == "miss"
        assert reads == []
        began = asyncio.get_running_loop().time()
        for _ in range(30):
            answer = await http.post(GENERATIONS, json=ASKED)
            assert answer.headers["x-cache"] == "hit"
            told.add(answer.headers["x-budget-remaining-usd"])
            answer = await http.post(ESTIMATE, json=ASKED)
            told.add(answer.headers["x-budget-remaining-usd"])
            assert [one["window"] for one in answer.json()["budgets"]] == ["day", "month", "total"]
        # Hits ask for the hard budgets, estimates for the soft one too.
        assert len(reads) <= 2 * (1 + asyncio.get_running_loop().time() - began)
        assert told == {format_dollars(await remaining(gateway))}


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
        assert isinstance(settings.storage.database, Path)
        return SQLiteStore.open(settings.storage.database, busy_seconds=0.1)

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


# Estimates.


def png(size: tuple[int, int] = (64, 64)) -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", size).save(out, "PNG")
    return out.getvalue()


def rows(gateway: GatewayUnderTest) -> list[str]:
    """Every row of the database, as the statements that would write it."""
    path = gateway.config.parent / "data" / "gateway.db"
    with closing(sqlite3.connect(path)) as db:
        return [line for line in db.iterdump() if line.startswith("INSERT")]


async def estimate(
    gateway: GatewayUnderTest,
    key: str = KEY,
    headers: Mapping[str, str] | None = None,
    **asked: Any,
) -> dict[str, Any]:
    async with gateway.http(key, headers=headers or {}) as http:
        answer = await http.post(ESTIMATE, json={**ASKED, **asked})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert found["request_id"] == answer.headers["x-request-id"]
    return found


async def test_an_estimate_says_all_of_it(start: Start) -> None:
    async with start(with_team(soft_budget={"week": 1})) as gateway, gateway.sdk() as sdk:
        await sdk.images.generate(**ASKED)
        wanted = {**ASKED, "model": ALIAS, "prompt": "A lighthouse at night", "n": 2}
        found = await sdk.post(
            "/images/estimate", body={**wanted, "quality": "high"}, cast_to=object
        )
    assert isinstance(found, dict)
    assert found.pop("request_id").startswith("req_")
    account = {"scope": "team", "owner": "growth"}
    spent = {"spent_usd": "0.005895", "reserved_usd": "0"}
    assert found == {
        "object": "image.estimate",
        "operation": "generation",
        "model": ALIAS,
        "model_served": MODEL,
        "upstream": "openai",
        "images": 2,
        "changed": {},
        "cache": "miss",
        # Two pictures of 1,756 tokens, a prompt of 21 bytes, and 32 tokens around it.
        "bound_usd": "0.105625",
        "bound_confidence": "hard",
        "likely_usd": "0.10539",
        "likely_basis": "formula",
        "admitted": True,
        "refusal": None,
        "budgets": [
            {
                **account,
                "window": "day",
                "limit_usd": "5",
                "soft_limit_usd": None,
                **spent,
                "remaining_usd": "4.994105",
                "resets_at": "2026-11-23T00:00:00Z",
            },
            {
                **account,
                "window": "week",
                "limit_usd": None,
                "soft_limit_usd": "1",
                **spent,
                "remaining_usd": None,
                "resets_at": "2026-11-23T00:00:00Z",
            },
            {
                **account,
                "window": "month",
                "limit_usd": "4",
                "soft_limit_usd": None,
                **spent,
                "remaining_usd": "3.994105",
                "resets_at": "2026-12-01T00:00:00Z",
            },
        ],
        "rate_limits": [
            {**account, "unit": "requests", "window": "minute", "limit": 600},
            {**account, "unit": "images", "window": "minute", "limit": 6},
        ],
        "cheaper": [
            {
                "change": {"quality": "medium"},
                "bound_usd": "0.026605",
                "likely_usd": "0.02637",
            },
            {"change": {"quality": "low"}, "bound_usd": "0.012025", "likely_usd": "0.01179"},
        ],
    }


async def test_what_was_estimated_is_what_it_costs(gateway: GatewayUnderTest) -> None:
    """To the prompt, which is counted in fours of bytes."""
    async with gateway.sdk() as sdk:
        for changes in ({}, {"quality": "high", "n": 3}, {"size": "1536x1024"}):
            found = await estimate(gateway, **changes)
            asked = {**ASKED, **changes}
            answer = await sdk.images.with_raw_response.generate(**asked)
            cost = parse_dollars(answer.headers["x-cost-usd"])
            assert cost <= parse_dollars(found["bound_usd"])
            assert abs(parse_dollars(found["likely_usd"]) - cost) <= 5 * 5_000
            await gateway.told.until(1)
            assert parse_dollars(found["bound_usd"]) == gateway.told.last.bound or changes


async def test_nothing_at_all_is_booked(start: Start, sandbox: SandboxServer) -> None:
    limits = {"requests_per_minute": 3, "images_per_minute": 3, "concurrent_requests": 1}
    async with start(with_team(limits=limits)) as gateway:
        async with gateway.http() as http:
            await http.post(GENERATIONS, json=ASKED)
            before, sent = rows(gateway), len(sandbox.journal)
            tables = {line.split('"')[1] for line in before}
            assert {"hold", "journal", "balance"} <= tables
            form = {name: (None, value) for name, value in ASKED.items()}
            for count in range(50):
                for answer in (
                    await http.post(ESTIMATE, json={**ASKED, "prompt": f"A {count}"}),
                    await http.post(ESTIMATE, json=ASKED),
                    await http.post(ESTIMATE, json={**ASKED, "n": 99}),
                    await http.post(
                        ESTIMATE, files={**form, "image": ("a.png", png(), "image/png")}
                    ),
                ):
                    assert answer.status_code in (200, 400)
                    assert {name: answer.headers[name] for name in FREE} == FREE
            await gateway.told.until(201)
            assert rows(gateway) == before
            assert len(sandbox.journal) == sent
            # Two of three requests are left, as before; 200 estimates have used up none.
            for prompt in ("A lighthouse, one", "A lighthouse, two"):
                answer = await http.post(GENERATIONS, json={**ASKED, "prompt": prompt})
                assert answer.status_code == 200, answer.text
        metrics = await gateway.metrics()
        where = f'cache="off",endpoint="estimate",model="{MODEL}"'
        assert metrics[f'gateway_requests_total{{{where},status="2xx",team="growth"}}'] == 150
        assert not [name for name in metrics if "spend" in name and "estimate" in name]
        receipts = [one for one, _ in gateway.told.requests if one.operation == "estimate"]
        assert {one.cost for one in receipts} == {0}
        assert {one.outcome for one in receipts} == {None}


async def test_a_kept_answer_would_cost_nothing(gateway: GatewayUnderTest) -> None:
    assert (await estimate(gateway))["cache"] == "miss"
    async with gateway.http() as http:
        await http.post(GENERATIONS, json=ASKED)
    found = await estimate(gateway)
    assert (found["cache"], found["bound_usd"], found["likely_usd"]) == ("hit", "0", "0")
    assert (found["likely_basis"], found["cheaper"]) == ("cache", [])
    anew = await estimate(gateway, headers={"cache-control": "no-cache"})
    assert (anew["cache"], anew["bound_usd"]) == ("miss", "0.0061")
    stranger = await estimate(gateway, OTHER_KEY)
    assert stranger["cache"] == "miss"
    # The log says what was found; the metrics count looks.
    asked = [one.cache.value for one, _ in gateway.told.requests if one.operation == "estimate"]
    assert asked == ["miss", "hit", "miss", "miss"]
    metrics = await gateway.metrics()
    looks = {name: value for name, value in metrics.items() if "gateway_cache_total" in name}
    assert looks == {'gateway_cache_total{result="miss"}': 1}
    assert not [name for name in metrics if "images_total" in name and "estimate" in name]


async def test_what_was_left_open_is_likely_what_it_did_cost(
    gateway: GatewayUnderTest,
) -> None:
    auto: dict[str, Any] = {"size": "auto", "quality": "auto"}
    first = await estimate(gateway, **auto)
    assert (first["likely_usd"], first["likely_basis"]) == (None, None)
    assert first["bound_usd"] == "0.71179"
    async with gateway.sdk() as sdk:
        for prompt in ("A lighthouse", "A lighthouse in the rain, at night"):
            await sdk.images.generate(**{**ASKED, **auto, "prompt": prompt})
    await gateway.told.until(3)
    costs = [receipt.cost for receipt, _ in gateway.told.requests if receipt.cost]
    assert len(costs) == 2
    then = await estimate(gateway, **auto, n=3, prompt="A dune")
    assert then["likely_basis"] == "observed"
    assert parse_dollars(then["likely_usd"]) == 3 * (sum(costs) // 2)
    # Of another kind nothing was seen.
    assert (await estimate(gateway, **{**auto, "model": "gpt-image-2"}))["likely_usd"] is None


async def test_cheaper_ways_of_what_was_left_open(gateway: GatewayUnderTest) -> None:
    found = await estimate(gateway, size="auto", quality="auto")
    ways = found["cheaper"]
    assert [way["change"] for way in ways][-1] == {"size": "1024x1024", "quality": "low"}
    bounds = [parse_dollars(found["bound_usd"]), *(parse_dollars(way["bound_usd"]) for way in ways)]
    assert 1 < len(ways) <= 3
    assert all(4 * less <= 3 * more for more, less in itertools.pairwise(bounds))
    for way in ways:
        asked = {"size": "auto", "quality": "auto", **way["change"]}
        assert (await estimate(gateway, **asked))["bound_usd"] == way["bound_usd"]


def form(model: str = MODEL, **more: str) -> dict[str, Any]:
    texts = {**ASKED, "model": model, **more}
    return {name: (None, value) for name, value in texts.items()}


async def test_an_edit_is_estimated_in_either_form(gateway: GatewayUnderTest) -> None:
    picture = png()
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    asked = {**ASKED, "images": [{"image_url": url}]}
    async with gateway.http() as http:
        files = {**form(), "image": ("a.png", picture, "image/png")}
        answers = [await http.post(ESTIMATE, files=files), await http.post(ESTIMATE, json=asked)]
        real = await http.post(EDITS, json=asked)
        assert real.status_code == 200, real.text
        answers.append(await http.post(ESTIMATE, files=files))
    before, same, after = (answer.json() for answer in answers)
    await gateway.told.until(4)
    bound = next(one.bound for one, _ in gateway.told.requests if one.operation == "edit")
    for found in (before, same):
        assert (found["operation"], found["images"], found["cache"]) == ("edit", 1, "miss")
        assert found["bound_confidence"] == "soft"
        assert parse_dollars(found["bound_usd"]) == bound
        assert found["likely_basis"] == "formula"
    # What pictures cost that come with a request is not published: what was seen goes first.
    assert (after["cache"], after["likely_basis"]) == ("miss", "observed")
    assert after["likely_usd"] == real.headers["x-cost-usd"]


async def test_a_large_upload_is_read_and_thrown_away(gateway: GatewayUnderTest) -> None:
    picture = png() + b"\0" * 20_000_000
    files = {**form(), "image": ("a.png", picture, "image/png")}
    async with gateway.http() as http:
        answer = await http.post(ESTIMATE, files=files)
        assert answer.status_code == 200, answer.text
        assert answer.json()["operation"] == "edit"
    metrics = await gateway.metrics()
    assert metrics['gateway_inflight_bytes{where="disk"}'] == 0
    assert metrics['gateway_inflight_bytes{where="memory"}'] == 0


LOW = {"teams": {"growth": {"limits": {"max_cost_per_request": 0.01, "images_per_minute": 2}}}}
NO_ROOM = with_team(budget={"day": 0.01, "month": 4})
REFUSALS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("model", with_team(models=[MODEL]), {"model": "gpt-image-2"}),
    ("price", {}, {"model": "house-model"}),
    ("most", LOW, {"quality": "high"}),
    ("rate", LOW, {"n": 3, "quality": "low", "size": "1024x1024"}),
    ("rate", with_team(), {"n": 7}),
    ("budget", NO_ROOM, {"n": 2}),
    ("budget", with_team(budget={"week": 0.001}), {}),
    ("off", {"upstreams": {"openai": {"api_keys": []}}}, {}),
]


@pytest.mark.parametrize(("why", "config", "asked"), REFUSALS, ids=[one[0] for one in REFUSALS])
async def test_it_would_be_refused_in_the_same_words(
    start: Start, why: str, config: dict[str, Any], asked: dict[str, Any]
) -> None:
    async with start(config) as gateway:
        found = await estimate(gateway, **asked)
        assert found["admitted"] is False
        async with gateway.sdk() as sdk:
            with pytest.raises(APIStatusError) as raised:
                await sdk.images.generate(**{**ASKED, **asked})
        error = raised.value
        assert isinstance(error.body, dict)
        assert found["refusal"] == {"status": error.status_code, **error.body}
        assert len(gateway.sandbox.journal) == 0
        known = why in ("most", "rate", "budget")
        assert (found["bound_usd"] is not None) == known
        assert (found["model_served"] is None) == (why == "model")


async def test_what_would_be_filled_in_is_told_and_priced(start: Start) -> None:
    pinned = {"upstream": "openai", "auto": "pin", "pin": {"size": SMALL, "quality": "low"}}
    async with start({"models": {MODEL: pinned}}) as gateway:
        found = await estimate(gateway, size="auto", quality="auto")
        assert found["changed"] == {"size": SMALL, "quality": "low"}
        assert (found["bound_usd"], found["likely_basis"]) == ("0.0061", "formula")
        assert found["cheaper"] == []


async def test_what_costs_too_much_for_a_request_has_ways_that_do_not(start: Start) -> None:
    async with start(LOW) as gateway:
        found = await estimate(gateway, quality="high")
        assert (found["refusal"]["code"], found["bound_usd"]) == ("max_cost_exceeded", "0.0529")
        assert found["cheaper"][-1]["change"] == {"quality": "low"}
        assert (await estimate(gateway))["admitted"] is True


async def test_a_hit_is_admitted_without_a_budget(start: Start) -> None:
    async with start(with_team(budget={"day": 0.0065})) as gateway, gateway.http() as http:
        await http.post(GENERATIONS, json=ASKED)
        assert (await estimate(gateway))["admitted"] is True
        anew = await estimate(gateway, prompt="A dune")
        assert anew["refusal"]["code"] == "insufficient_quota"


BAD: dict[str, tuple[int, dict[str, Any]]] = {
    "no model": (400, {"json": {"prompt": "A"}}),
    "no prompt": (400, {"json": {"model": MODEL}}),
    "a number in quotes": (400, {"json": {**ASKED, "n": "2"}}),
    "a model nobody has": (404, {"json": {**ASKED, "model": "*"}}),
    "no JSON": (400, {"content": b"{", "headers": {"content-type": "application/json"}}),
    "a list": (400, {"json": [1]}),
    "a control character": (400, {"json": {**ASKED, "prompt": "\x01"}}),
    "a url": (400, {"json": {**ASKED, "images": [{"image_url": "https://a.example/b.png"}]}}),
    "no picture": (
        400,
        {"json": {**ASKED, "images": [{"image_url": "data:image/png;base64,@@@"}]}},
    ),
    "another type": (415, {"content": b"a", "headers": {"content-type": "text/plain"}}),
    "an edit without": (400, {"files": {"prompt": (None, "A"), "model": (None, MODEL)}}),
}


@pytest.mark.parametrize(("status", "sent"), BAD.values(), ids=BAD.keys())
async def test_a_body_that_cannot_be_read_is_an_error_here_too(
    gateway: GatewayUnderTest, status: int, sent: dict[str, Any]
) -> None:
    is_edit = "files" in sent or "images" in (sent.get("json") or {}) or status == 415
    async with gateway.http() as http:
        found = await http.post(ESTIMATE, **sent)
        real = await http.post(EDITS if is_edit else GENERATIONS, **sent)
    assert found.status_code == real.status_code == status
    assert found.text.replace(ESTIMATE, EDITS) == real.text
    assert EDITS not in found.text
    assert {name: found.headers[name] for name in FREE} == FREE


async def test_a_key_has_four_estimates_under_way_at_most(gateway: GatewayUnderTest) -> None:
    """The fifth is refused before its body is read: each may be a large upload."""
    body = json.dumps(ASKED).encode()
    path, announced = f"/v1{ESTIMATE}", (JSON, f"content-length: {len(body)}")
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(RawClient.to(gateway.port, KEY)) for _ in "1234"]
        for client in clients:
            await client.head(path, announced)
            await client.send(body[:10])

        async def fifth(key: str = KEY) -> RawAnswer:
            async with RawClient.to(gateway.port, key) as client:
                await client.head(path, announced)
                if key == OTHER_KEY:
                    await client.send(body)
                return await client.answer()

        async with gateway.http() as http:

            async def full() -> bool:
                return (await http.post(ESTIMATE, content=b"{")).status_code == 429

            await eventually(full)
        answer = await fifth()
        assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")
        assert answer.header("retry-after") == "1"
        assert answer.header("connection") == "close"
        assert (await fifth(OTHER_KEY)).status == 200
        for client in clients:
            await client.send(body[10:])
            assert (await client.answer()).status == 200
        # Those whose clients leave are over too.
        for _ in "1234":
            async with RawClient.to(gateway.port, KEY) as client:
                await client.head(path, announced)
        async with gateway.http() as http:

            async def free() -> bool:
                return (await http.post(ESTIMATE, json=ASKED)).status_code == 200

            await eventually(free)
    metrics = await gateway.metrics()
    where = 'endpoint="estimate",fault="team",reason="concurrent_estimates"'
    refused = f"gateway_requests_rejected_total{{{where}}}"
    assert metrics[refused] >= 2


async def test_a_pinned_call_is_remembered_as_what_was_bought(start: Start) -> None:
    """What an edit did cost is the mean of what it was, not of the `auto` that was said."""
    pinned = {"auto": "pin", "pin": {"size": SMALL, "quality": "low"}}
    async with start({"models": {ALIAS: pinned}}) as gateway, gateway.http() as http:
        files = {"image": ("a.png", png(), "image/png")}
        texts: dict[str, Any] = {"prompt": (None, "A lighthouse"), **files}
        alias, plain = ({**texts, "model": (None, model)} for model in (ALIAS, MODEL))
        real = await http.post(EDITS, files=alias)
        assert real.status_code == 200, real.text
        await gateway.told.until(1)
        assert (gateway.told.last.size, gateway.told.last.quality) == (SMALL, "low")
        same = (await http.post(ESTIMATE, files=alias, headers=NO_CACHE)).json()
        assert (same["likely_usd"], same["likely_basis"]) == (
            real.headers["x-cost-usd"],
            "observed",
        )
        other = (await http.post(ESTIMATE, files=plain)).json()
        assert (other["likely_usd"], other["likely_basis"]) == (None, None)


async def test_a_generation_is_held_to_its_own_size(start: Start) -> None:
    async with start({"server": {"max_json_bytes": 200_000}}) as gateway, gateway.http() as http:
        long = {**ASKED, "user": "A" * 250_000}
        picture = base64.b64encode(png() + b"\0" * 200_000).decode()
        edit = {**ASKED, "images": [{"image_url": f"data:image/png;base64,{picture}"}]}
        assert (await http.post(ESTIMATE, json=long)).status_code == 413
        answer = await http.post(ESTIMATE, json=edit)
        assert answer.status_code == 200, answer.text


async def test_only_post_estimates_and_only_for_those_who_are_known(
    gateway: GatewayUnderTest,
) -> None:
    async with gateway.http() as http:
        answer = await http.get(ESTIMATE)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert answer.json()["error"]["code"] == "method_not_allowed"
    async with gateway.http("sk-nobody-0123456789abcdef") as http:
        answer = await http.post(ESTIMATE, json=ASKED)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert not SHOWN & set(answer.headers)


async def test_a_stream_is_estimated_as_json(gateway: GatewayUnderTest) -> None:
    found = await estimate(gateway, stream=True, partial_images=2)
    assert (found["bound_usd"], found["likely_usd"]) == ("0.0121", "0.011895")
