"""Every cent: budgets that are hard, prices that are known, and nothing bought twice."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from openai import (
    APIStatusError,
    AsyncOpenAI,
    BadRequestError,
    RateLimitError,
    UnprocessableEntityError,
)

from gateway.domain.ledger import Balance, Line
from gateway.domain.quota import Limit, Scope, Unit, Window, period
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from tests.running import KEY, MODEL, OTHER_KEY, GatewayUnderTest, Start, TestClock

ASKED: dict[str, Any] = {
    "model": MODEL,
    "prompt": "A lighthouse",
    "quality": "low",
    "size": "1024x1024",
}
COST, BOUND = 5_895_000, 6_100_000
CI_KEY = "growth-ci-key-0123456789abcdef"
FRESH = {"cache-control": "no-cache"}


@pytest.fixture(autouse=True)
def quick(sandbox: SandboxServer) -> None:
    """Pictures that need no drawing. The rules of a test that come later find only its prompts."""
    sandbox.rules.add(Rule(prompt="A ", payload_bytes=400))


async def buy(sdk: AsyncOpenAI, *, fresh: bool = True, **changes: Any) -> None:
    await sdk.images.generate(**{**ASKED, **changes}, extra_headers=FRESH if fresh else None)


async def refused(gateway: GatewayUnderTest, key: str = KEY, **changes: Any) -> APIStatusError:
    """A refusal that the SDK, with its own retries, does not try again."""
    before = len(gateway.told.requests)
    headers = {**FRESH, **changes.pop("headers", {})}
    async with gateway.sdk(key, max_retries=2) as sdk:
        with pytest.raises(APIStatusError) as raised:
            await sdk.images.generate(**{**ASKED, **changes}, extra_headers=headers)
    assert raised.value.response.headers["x-should-retry"] == "false"
    assert "retry-after" not in raised.value.response.headers
    await gateway.told.until(before + 1)
    assert len(gateway.told.requests) == before + 1
    return raised.value


def said(error: APIStatusError) -> str:
    """The gateway's own words."""
    return error.message.removeprefix(f"Error code: {error.status_code} - ")


async def balance(gateway: GatewayUnderTest, window: Window, owner: str = "growth") -> Balance:
    limit = Limit(Scope.TEAM, owner, Unit.MONEY, window, None)
    line = Line(limit, period(window, gateway.clock.now()))
    [found] = await gateway.gateway.ledger.balances([line])
    return found


def budget(**amounts: float) -> dict[str, Any]:
    return {"teams": {"growth": {"budget": amounts}}}


async def test_fifty_at_once_against_ten_bounds(start: Start, sandbox: SandboxServer) -> None:
    gate = Gate()
    sandbox.rules.clear()
    sandbox.rules.add(Rule(payload_bytes=400, wait_for=gate))

    async def one(number: int) -> RateLimitError | None:
        try:
            await sdk.images.generate(**{**ASKED, "prompt": f"Lighthouse{number:02d}"})
        except RateLimitError as error:
            return error
        return None

    # The SDK as it comes, with its two retries.
    async with start(budget(day=0.061)) as gateway, gateway.sdk(max_retries=2) as sdk:
        running = [asyncio.create_task(one(number)) for number in range(50)]
        await gate.arrived(10)
        await gateway.told.until(40)
        assert await balance(gateway, Window.DAY) == Balance(posted=0, pending=10 * BOUND)
        assert await gateway.gateway.ledger.open_holds() == 10
        gate.set()
        errors = [error for error in await asyncio.gather(*running) if error is not None]
        await gateway.told.until(50)
        assert len(gateway.told.requests) == 50
        assert len(errors) == 40
        for error in errors:
            assert (error.code, error.type) == ("insufficient_quota", "insufficient_quota")
            assert error.response.headers["x-should-retry"] == "false"
        assert said(errors[-1]) == (
            "Team growth has spent $0.00 of its $0.061 today and holds $0.061 for running "
            "requests; this request could cost up to $0.006. Resets 2026-11-23 00:00 UTC."
        )
        assert sandbox.journal.billed_requests == len(sandbox.journal) == 10
        assert await balance(gateway, Window.DAY) == Balance(posted=10 * COST, pending=0)
        assert await balance(gateway, Window.MONTH) == Balance(posted=10 * COST, pending=0)
        [row] = await gateway.usage()
        assert (row.requests, row.cost) == (10, 10 * COST)
        metrics = await gateway.metrics()
        rejected = 'gateway_quota_rejections_total{limit="insufficient_quota",team="growth"}'
        assert metrics[rejected] == 40


async def test_a_budget_of_a_day_begins_anew_the_next_day(start: Start, clock: TestClock) -> None:
    async with start(budget(day=0.012)) as gateway, gateway.sdk() as sdk:
        await buy(sdk)
        await buy(sdk)
        error = await refused(gateway)
        assert isinstance(error, RateLimitError)
        assert said(error) == (
            "Team growth has spent $0.012 of its $0.012 today; this request could cost up to "
            "$0.006. Resets 2026-11-23 00:00 UTC."
        )
        clock.advance(hours=11, minutes=59, seconds=59)
        await refused(gateway)
        clock.advance(seconds=1)
        await buy(sdk)
        assert await balance(gateway, Window.DAY) == Balance(posted=COST)
        assert await balance(gateway, Window.MONTH) == Balance(posted=3 * COST)
        assert [(row.day, row.requests) for row in await gateway.usage()] == [
            ("2026-11-22", 2),
            ("2026-11-23", 1),
        ]


async def test_a_budget_of_a_month_and_a_cheaper_way(start: Start, clock: TestClock) -> None:
    async with start(budget(month=0.11, day=0.08)) as gateway, gateway.sdk() as sdk:
        await buy(sdk, quality="high")
        error = await refused(gateway, quality="high")
        assert said(error) == (
            "Team growth has spent $0.053 of its $0.080 today; this request could cost up to "
            "$0.053. Resets 2026-11-23 00:00 UTC. Cheaper now: quality=low (at most $0.006)."
        )
        clock.advance(days=3)
        await buy(sdk, quality="high")
        error = await refused(gateway, quality="high")
        assert "today" in said(error)
        clock.advance(days=5)
        error = await refused(gateway, quality="high")
        assert said(error) == (
            "Team growth has spent $0.11 of its $0.11 for November; this request could cost up to "
            "$0.053. Resets 2026-12-01 00:00 UTC."
        )
        clock.advance(days=1)
        await buy(sdk, quality="high")
        assert await balance(gateway, Window.MONTH) == Balance(posted=52_695_000)


async def test_a_budget_of_a_key_within_its_teams(start: Start) -> None:
    growth = {
        "keys": [KEY, {"key": CI_KEY, "name": "ci", "budget": {"day": 0.0062}}],
        "budget": {"day": 0.012},
    }
    async with start({"teams": {"growth": growth}}) as gateway:
        async with gateway.sdk(CI_KEY) as sdk:
            answer = await sdk.images.with_raw_response.generate(**ASKED)
        # The tightest of all is said.
        assert answer.headers["x-budget-remaining-usd"] == "0.000305"
        assert said(await refused(gateway, CI_KEY)) == (
            "Key ci of team growth has spent $0.006 of its $0.006 today; this request could cost "
            "up to $0.006. Resets 2026-11-23 00:00 UTC."
        )
        async with gateway.sdk(KEY) as sdk:
            await buy(sdk)
            assert said(await refused(gateway, KEY)).startswith("Team growth has spent $0.012")
        async with gateway.sdk(OTHER_KEY) as sdk:
            await buy(sdk)


async def test_what_cost_more_than_its_bound_is_booked_and_counts(
    start: Start, sandbox: SandboxServer
) -> None:
    sandbox.rules.clear()
    sandbox.rules.add(Rule(payload_bytes=400, usage={"input_tokens": 3, "output_tokens": 1000}))
    async with start(budget(day=0.02)) as gateway, gateway.sdk() as sdk:
        await buy(sdk)
        assert await balance(gateway, Window.DAY) == Balance(posted=30_015_000)
        other = await refused(gateway, model="gpt-image-2")
        assert said(other).startswith("Team growth has spent $0.030 of its $0.020")
        # Its own model is now held at what was seen.
        assert "this request could cost up to $0.030" in said(await refused(gateway))


async def test_a_budget_of_nothing_buys_nothing(start: Start) -> None:
    async with start(budget(month=0)) as gateway:
        assert said(await refused(gateway)) == (
            "Team growth may spend $0.00 a month; this request could cost up to $0.006, so "
            "waiting does not help."
        )
        assert len(gateway.sandbox.journal) == 0


async def test_a_request_may_not_cost_more_than_the_team_allows(start: Start) -> None:
    teams = {"growth": {"limits": {"max_cost_per_request": 0.01}}}
    async with start({"teams": teams}) as gateway, gateway.sdk() as sdk:
        error = await refused(gateway, quality="high")
        assert isinstance(error, BadRequestError)
        assert error.code == "max_cost_exceeded"
        assert said(error) == (
            "This request could cost up to $0.053, and team growth allows $0.010 a request. "
            "Cheaper now: quality=low (at most $0.006)."
        )
        # What is left open is the dearest.
        assert (await refused(gateway, quality="auto")).code == "max_cost_exceeded"
        assert (await refused(gateway, size="auto")).code == "max_cost_exceeded"
        assert (await refused(gateway, n=2)).code == "max_cost_exceeded"
        await buy(sdk)
        assert len(gateway.sandbox.journal) == 1


async def test_auto_is_held_at_its_worst_and_booked_as_it_was(gateway: GatewayUnderTest) -> None:
    async with gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.generate(model=MODEL, prompt="A lighthouse")
    await gateway.told.until(1)
    # 23,719 tokens at 2880x2880 and max (contract 5.3), and twelve of text.
    assert gateway.told.last.bound == 711_790_000
    assert gateway.told.last.cost == 13_185_000
    assert answer.headers["x-cost-usd"] == "0.013185"


# Models without a price.


HOUSE: dict[str, Any] = {**ASKED, "model": "house-model"}


def house(sandbox: SandboxServer, usage: dict[str, int] | None = None) -> None:
    """The upstream serves a model that nobody has a price for."""
    sandbox.rules.clear()
    body: dict[str, Any] = {"created": 1, "data": [{"b64_json": "iVBORw0KGgoA"}]}
    if usage is not None:
        body["usage"] = usage
    sandbox.rules.add(Rule(status=200, body=body))


async def test_a_model_without_a_price_is_refused(gateway: GatewayUnderTest) -> None:
    error = await refused(gateway, model="house-model")
    assert (error.status_code, error.code, error.param) == (400, "model_not_priced", "model")
    assert said(error) == (
        "house-model has no price on this gateway, so nothing is bought. Ask the gateway's "
        "operator to add one."
    )
    assert len(gateway.sandbox.journal) == 0


UNPRICED = {"house-model": {"upstream": "openai", "unpriced": "allow"}}


@pytest.mark.parametrize("usage", [None, {"input_tokens": 5, "output_tokens": 100}], ids=str)
async def test_a_model_without_a_price_may_be_allowed_and_is_flagged(
    start: Start, sandbox: SandboxServer, usage: dict[str, int] | None
) -> None:
    house(sandbox, usage)
    async with start({"models": UNPRICED}) as gateway:
        async with gateway.sdk() as sdk:
            answer = await sdk.images.with_raw_response.generate(**HOUSE)
        assert answer.headers["x-cost-usd"] == "0"
        assert answer.headers["x-cost-basis"] == "none"
        [row] = await gateway.usage()
        assert (row.model, row.requests, row.cost, row.flagged) == ("house-model", 1, 0, 1)
        metrics = await gateway.metrics()
        assert metrics['gateway_unpriced_requests_total{model="house-model"}'] == 1


async def test_no_price_and_a_hard_budget_do_not_go_together(
    start: Start, sandbox: SandboxServer
) -> None:
    house(sandbox)
    async with start({"models": UNPRICED, **budget(month=50)}) as gateway:
        error = await refused(gateway, model="house-model")
        assert (error.status_code, error.code) == (400, "model_not_priced")
        assert said(error) == (
            "house-model has no price on this gateway, and team growth has a hard budget. Ask the "
            "gateway's operator for a price, or for max_cost_per_request."
        )
        # The other team has none.
        async with gateway.sdk(OTHER_KEY) as sdk:
            await sdk.images.generate(**HOUSE)


async def test_no_price_within_a_budget_costs_the_most_a_request_may(
    start: Start, sandbox: SandboxServer
) -> None:
    house(sandbox)
    changes = {"models": UNPRICED, **budget(month=0.10)}
    changes["teams"]["growth"]["limits"] = {"max_cost_per_request": 0.04}
    async with start(changes) as gateway, gateway.sdk() as sdk:
        for _ in range(2):
            answer = await sdk.images.with_raw_response.generate(**HOUSE)
            assert answer.headers["x-cost-usd"] == "0.04"
            assert answer.headers["x-cost-basis"] == "estimated"
        error = await refused(gateway, model="house-model")
        assert said(error) == (
            "Team growth has spent $0.080 of its $0.10 for November; this request could cost up "
            "to $0.040. Resets 2026-12-01 00:00 UTC."
        )
        [row] = await gateway.usage()
        assert (row.cost, row.flagged) == (80_000_000, 2)


async def test_the_operators_own_price(start: Start, sandbox: SandboxServer) -> None:
    house(sandbox)
    rows = [{"upstream": "openai", "model": "house-model", "per_image": "0.04"}]
    async with start({"prices": {"rows": rows}}) as gateway, gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.generate(**HOUSE)
        assert answer.headers["x-cost-usd"] == "0.04"
        await gateway.told.until(1)
        assert gateway.told.last.price_id.startswith("own:openai/house-model@")


async def test_the_operators_price_goes_before_the_list(start: Start) -> None:
    rows = [
        {
            "upstream": "openai",
            "model": MODEL,
            "usd_per_million_tokens": {"text_in": 10, "image_in": 16, "image_out": 60},
            "output_tokens": {"table": {"default": {"any": 1000}}},
            "input_image_tokens": 100,
        }
    ]
    async with start({"prices": {"rows": rows}}) as gateway, gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.generate(**ASKED)
        assert answer.headers["x-cost-usd"] == "0.01179"
        await gateway.told.until(1)
        assert gateway.told.last.bound == 60_440_000


# Idempotency keys.


def with_key(key: str) -> dict[str, Any]:
    return {"extra_headers": {"idempotency-key": key}}


async def test_a_key_is_for_one_request(gateway: GatewayUnderTest) -> None:
    async with gateway.sdk() as sdk:
        await sdk.images.generate(**ASKED, **with_key("order-1"))
        again = await sdk.images.with_raw_response.generate(**ASKED, **with_key("order-1"))
        assert again.headers["x-cache"] == "hit"
        assert again.headers["idempotent-replayed"] == "true"
    await gateway.told.until(2)
    error = await refused(gateway, prompt="A dune", headers={"idempotency-key": "order-1"})
    assert isinstance(error, UnprocessableEntityError)
    assert (error.code, error.param) == ("idempotency_key_reused", "Idempotency-Key")
    assert said(error) == (
        "This Idempotency-Key was used for another request. Use a new key for each request that "
        "differs."
    )
    assert len(gateway.sandbox.journal) == 1
    # Another team's keys are its own.
    async with gateway.sdk(OTHER_KEY) as sdk:
        await sdk.images.generate(**{**ASKED, "prompt": "A dune"}, **with_key("order-1"))


async def test_a_key_in_use_never_buys_a_second_picture(
    start: Start, sandbox: SandboxServer
) -> None:
    gate = Gate()
    sandbox.rules.clear()
    sandbox.rules.add(Rule(payload_bytes=400, wait_for=gate))
    async with start() as gateway, gateway.sdk() as sdk:
        ask = sdk.images.with_raw_response.generate
        first = asyncio.create_task(ask(**ASKED, **with_key("order-1")))
        await gate.arrived()
        second = asyncio.create_task(ask(**ASKED, **with_key("order-1")))
        await until_watched(gateway, 2)
        gate.set()
        answers = await asyncio.gather(first, second)
        assert [answer.headers["x-cache"] for answer in answers] == ["miss", "join"]
        assert answers[0].content == answers[1].content
        await gateway.told.until(2)
        [row] = await gateway.usage()
        assert (len(sandbox.journal), row.cost, row.cached) == (1, COST, 1)


async def test_a_key_whose_request_was_refused_is_free_again(
    gateway: GatewayUnderTest, sandbox: SandboxServer
) -> None:
    sandbox.rules.clear()
    sandbox.rules.add(Rule(status=400, times=1))
    sandbox.rules.add(Rule(payload_bytes=400))
    async with gateway.sdk() as sdk:
        with pytest.raises(BadRequestError):
            await sdk.images.generate(**ASKED, **with_key("order-1"))
        await sdk.images.generate(**ASKED, **with_key("order-1"))
    [row] = await gateway.usage()
    assert (row.requests, row.cost) == (1, COST)


async def test_a_key_whose_outcome_is_unknown_is_not_free(
    gateway: GatewayUnderTest, sandbox: SandboxServer
) -> None:
    sandbox.rules.clear()
    sandbox.rules.add(Rule(cut_before_headers=True))
    async with gateway.sdk() as sdk:
        with pytest.raises(APIStatusError):
            await sdk.images.generate(**ASKED, **with_key("order-1"))
    await gateway.told.until(1)
    error = await refused(gateway, headers={"idempotency-key": "order-1"})
    assert (error.status_code, error.code) == (502, "upstream_outcome_unknown")
    assert len(sandbox.journal) == 1


async def test_a_key_that_is_none(gateway: GatewayUnderTest) -> None:
    async with gateway.http() as http:
        for key in (b"", b"x" * 256, "caf\xe9".encode("latin-1"), b"a\tb"):
            headers = {b"idempotency-key": key}
            answer = await http.post("/images/generations", json=ASKED, headers=headers)
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["code"] == "invalid_idempotency_key"
            assert error["message"] == "An Idempotency-Key is 1 to 255 printable ASCII characters."
            assert answer.headers["x-should-retry"] == "false"
    assert len(gateway.sandbox.journal) == 0


async def test_the_price_of_the_day_applies(start: Start, clock: TestClock) -> None:
    rows = [
        {"upstream": "openai", "model": "house-model", "per_image": "0.04"},
        {
            "upstream": "openai",
            "model": "house-model",
            "per_image": "0.02",
            "valid_from": datetime(2026, 12, 1, tzinfo=UTC).date(),
        },
    ]
    async with start({"prices": {"rows": rows}}) as gateway, gateway.sdk() as sdk:
        house(gateway.sandbox)
        costs = []
        for _ in range(2):
            answer = await sdk.images.with_raw_response.generate(**HOUSE, extra_headers=FRESH)
            costs.append(answer.headers["x-cost-usd"])
            clock.advance(days=9)
        assert costs == ["0.04", "0.02"]
