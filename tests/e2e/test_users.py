"""End users inside a team: who asked is told apart, each has limits, and nobody is named."""

from __future__ import annotations

import asyncio
import base64
import re
import sqlite3
from collections.abc import Mapping
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, RateLimitError

from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from tests.e2e.test_limits import LeapingClock, ask, refused, said
from tests.e2e.test_reload import again
from tests.postgres import Postgres
from tests.running import KEY, MODEL, OTHER_KEY, GatewayUnderTest, Start, run_gateway
from tests.valkey import run_valkey

ANN, BOB = "ann@example.com", "bob-4711"
ONE_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)
BODY = {"safety_identifier", "user"}
USER = re.compile(r"u_[0-9a-f]{20}")


@pytest.fixture
def clock() -> LeapingClock:
    return LeapingClock()


@pytest.fixture(autouse=True)
def quick(sandbox: SandboxServer) -> None:
    """Pictures that need no drawing."""
    sandbox.rules.add(Rule(prompt="A lighthouse", payload_bytes=400))


def per_user(**settings: Any) -> dict[str, Any]:
    return {"teams": {"growth": {"per_user": settings}}}


def of(name: str, source: str = "user") -> dict[str, Any]:
    """How a client of the SDK says who its user is."""
    if source in BODY:
        # Its own arguments know user; the newer one goes as OpenAI says for older SDKs.
        return {"user": name} if source == "user" else {"extra_body": {source: name}}
    return {"extra_headers": {"cache-control": "no-store", source: name}}


def holds(gateway: GatewayUnderTest) -> list[str]:
    """The end user of each call in the books, in the order they came."""
    path = gateway.config.parent / "data" / "gateway.db"
    with closing(sqlite3.connect(path)) as db:
        rows = db.execute(
            "SELECT end_user FROM hold JOIN journal USING (rid) WHERE kind = 'H' ORDER BY seq"
        )
        return [user for (user,) in rows]


def accounts(gateway: GatewayUnderTest) -> list[str]:
    path = gateway.config.parent / "data" / "gateway.db"
    with closing(sqlite3.connect(path)) as db:
        return [name for (name,) in db.execute("SELECT account FROM balance ORDER BY account")]


async def last_user(gateway: GatewayUnderTest, count: int) -> str:
    await gateway.told.until(count)
    return gateway.told.last.user


# Who it is.


@pytest.mark.parametrize(
    "source", ["safety_identifier", "user", "x-openwebui-user-id", "X-OpenWebUI-User-Email"]
)
async def test_a_user_is_a_hash_from_the_first_moment(
    start: Start, sandbox: SandboxServer, source: str
) -> None:
    async with start() as gateway:
        await ask(gateway, **of(ANN, source))
        await ask(gateway, **of(BOB, source))
        await ask(gateway, **of(ANN, source))
        await ask(gateway)
        await ask(gateway, OTHER_KEY, **of(ANN, source))
        users = [receipt.user for receipt, _ in await gateway.told.until(5)]
        ann, bob, again, nobody, other = users
        assert (ann, nobody) == (again, "")
        assert all(USER.fullmatch(user) for user in (ann, bob, other))
        assert len({ann, bob, other}) == 3, "one person is two users in two teams"
        assert holds(gateway) == users
        metrics = str(await gateway.metrics())
        assert not any(user and user in metrics for user in users)
        # What a body says goes on to the provider as it came; a header of ours does not.
        sent = sandbox.journal[0]
        assert (ANN in str(sent.body)) == (source in BODY)
        assert "openwebui" not in str(sent.headers).lower()
    # Nothing but the body's owner is told, and nobody is made an account of.
    assert not any(name.startswith("user:") for name in accounts(gateway))
    async with start() as gateway:
        await ask(gateway, **of(ANN, source))
        assert await last_user(gateway, 1) == ann, "the same behind a restart"


async def test_the_first_that_says_something_wins(start: Start) -> None:
    both = {**of(BOB), "extra_body": {"safety_identifier": ANN}}
    async with start() as gateway:
        await ask(gateway, **both)
        await ask(gateway, **of(ANN))
        ann, same = [receipt.user for receipt, _ in await gateway.told.until(2)]
        assert ann == same
        assert await again(gateway, lambda one: one.update(users={"sources": ["user"]}))
        await ask(gateway, **both)
        bob = await last_user(gateway, 3)
        assert bob not in ("", ann)
        assert await again(gateway, lambda one: one.update(users={"sources": []}))
        await ask(gateway, **both)
        assert await last_user(gateway, 4) == ""


async def test_a_form_names_its_user_too(start: Start) -> None:
    async with start() as gateway, gateway.sdk() as sdk:
        await sdk.images.edit(
            model=MODEL, prompt="A lighthouse", image=("cat.png", ONE_PIXEL), user=ANN
        )
        edited = await last_user(gateway, 1)
        await ask(gateway, **of(ANN, "x-openwebui-user-id"))
        assert await last_user(gateway, 2) == edited != ""


async def test_who_is_not_recorded_is_limited_all_the_same(start: Start) -> None:
    settings = per_user(limits={"requests_per_minute": 1})
    async with start({"users": {"record": False}, **settings}) as gateway:
        await ask(gateway, **of(ANN))
        error = await refused(gateway, **of(ANN))
        assert error.status_code == 429
        await ask(gateway, **of(BOB))
        assert [receipt.user for receipt, _ in await gateway.told.until(3)] == ["", "", ""]
        assert holds(gateway) == ["", ""]


# Limits.


@pytest.mark.parametrize("source", ["safety_identifier", "user", "x-openwebui-user-id"])
async def test_the_rate_of_one_user_is_not_another_s(
    start: Start, clock: LeapingClock, source: str
) -> None:
    async with start(per_user(limits={"images_per_minute": 2})) as gateway:
        await ask(gateway, **of(ANN, source), n=2)
        error = await refused(gateway, **of(ANN, source))
        assert isinstance(error, RateLimitError)
        await gateway.told.until(2)
        user = gateway.told.last.user
        assert said(error).startswith(f"User {user} of team growth is limited to 2 images a minute")
        assert ANN not in error.response.text
        assert error.response.headers["x-ratelimit-limit-images"] == "2"
        # Neither is anybody else's, nor that of who says nothing, nor another team's.
        await ask(gateway, **of(BOB, source), n=2)
        await ask(gateway, n=2)
        await ask(gateway, n=2)
        await ask(gateway, OTHER_KEY, **of(ANN, source), n=2)
        clock.leap(30)
        await ask(gateway, **of(ANN, source))
        assert (await refused(gateway, **of(ANN, source))).status_code == 429


async def test_a_team_s_limit_holds_beside_its_users(start: Start) -> None:
    changes = {
        "teams": {
            "growth": {
                "limits": {"requests_per_minute": 3},
                "per_user": {"limits": {"requests_per_minute": 2}},
            }
        }
    }
    async with start(changes) as gateway:
        for name in (ANN, ANN, BOB):
            await ask(gateway, **of(name))
        assert said(await refused(gateway, **of(BOB))).startswith("Team growth is limited to 3")
        assert said(await refused(gateway, **of(ANN))).startswith("User u_")


async def test_so_many_of_one_user_at_a_time(start: Start, sandbox: SandboxServer) -> None:
    gate = Gate()
    sandbox.rules.clear()
    sandbox.rules.add(Rule(payload_bytes=400, wait_for=gate))
    async with start(per_user(limits={"concurrent_requests": 1})) as gateway:
        ann = asyncio.create_task(ask(gateway, **of(ANN)))
        await gate.arrived(1)
        error = await refused(gateway, **of(ANN))
        assert "of team growth is limited to 1 request at a time" in said(error)
        bob = asyncio.create_task(ask(gateway, **of(BOB)))
        await gate.arrived(2)
        gate.set()
        await asyncio.gather(ann, bob)
        await gateway.told.until(3)
        await ask(gateway, **of(ANN))


async def test_an_answer_from_the_cache_is_a_request_of_its_user(start: Start) -> None:
    """As it is one of the team's. A header changes nothing of what is asked for."""

    def hinted(name: str) -> dict[str, Any]:
        return {"extra_headers": {"x-openwebui-user-id": name}}

    async with start(per_user(limits={"requests_per_minute": 2})) as gateway:
        await ask(gateway, **hinted(ANN))
        await ask(gateway, **hinted(ANN))
        assert (await refused(gateway, **hinted(ANN))).status_code == 429
        await ask(gateway, **hinted(BOB))
        receipts = [receipt for receipt, _ in await gateway.told.until(4)]
        assert [receipt.cache.value for receipt in receipts] == ["miss", "hit", "off", "hit"]
        assert holds(gateway) == [receipts[0].user]


# Money.


async def test_the_budget_of_one_user_is_not_another_s(start: Start, clock: LeapingClock) -> None:
    """A picture costs 0.0059 dollars, and may cost 0.0061."""
    async with start(per_user(budget={"day": 0.01})) as gateway:
        await ask(gateway, **of(ANN))
        error = await refused(gateway, **of(ANN))
        assert isinstance(error, RateLimitError)
        assert error.code == "insufficient_quota"
        await gateway.told.until(2)
        user = gateway.told.last.user
        assert said(error).startswith(f"User {user} of team growth has spent $0.006 of its")
        assert error.response.headers["x-should-retry"] == "false"
        assert error.response.headers["x-budget-remaining-usd"].startswith("0.004")
        await ask(gateway, **of(BOB))
        await ask(gateway)
        clock.advance(days=1)
        await ask(gateway, **of(ANN))
        receipts = [receipt for receipt, _ in await gateway.told.until(5)]
        bob = receipts[2].user
        # Only the windows that have an amount: of every other user and window there is nothing.
        assert [name for name in accounts(gateway) if name.startswith("user:")] == sorted(
            [
                f"user:growth/{user}|d|2026-11-22",
                f"user:growth/{user}|d|2026-11-23",
                f"user:growth/{bob}|d|2026-11-22",
            ]
        )
        assert user not in str(await gateway.metrics())


async def test_what_a_team_allows_each_user_may_change(start: Start) -> None:
    async with start() as gateway:
        await ask(gateway, **of(ANN))
        await ask(gateway, **of(ANN))

        def limit(document: dict[str, Any]) -> None:
            document["teams"]["growth"]["per_user"] = {"limits": {"requests_per_minute": 1}}

        assert await again(gateway, limit)
        await ask(gateway, **of(ANN))
        assert (await refused(gateway, **of(ANN))).status_code == 429


# A user that has to be named.


async def test_a_request_that_names_nobody(start: Start, sandbox: SandboxServer) -> None:
    async with start(per_user(required=True)) as gateway:
        for changes in ({}, of(""), of("  ", "safety_identifier"), of("", "x-openwebui-user-id")):
            error = await refused(gateway, retries=2, **changes)
            assert isinstance(error, BadRequestError)
            assert (error.code, error.param) == ("user_required", "safety_identifier")
            assert "Send safety_identifier" in said(error)
        assert len(sandbox.journal) == 0
        told = await gateway.told.until(4)
        assert {receipt.reason for receipt, _ in told} == {"user_required"}
        for source in ("safety_identifier", "user", "x-openwebui-user-email"):
            await ask(gateway, **of(ANN, source))
        await ask(gateway, OTHER_KEY)


# What it would cost.


async def test_an_estimate_knows_its_user(start: Start) -> None:
    settings = per_user(limits={"images_per_minute": 3}, budget={"month": 0.01})
    async with start(settings) as gateway, gateway.http(KEY) as http:
        await ask(gateway, **of(ANN))
        user = await last_user(gateway, 1)
        asked: dict[str, Any] = {
            "model": MODEL, "prompt": "A lighthouse", "quality": "low", "size": "1024x1024",
        }  # fmt: skip

        async def estimate(**changes: Any) -> Mapping[str, Any]:
            answer = await http.post("/images/estimate", json={**asked, **changes})
            found: Mapping[str, Any] = answer.json()
            return found

        ann, bob, nobody = await estimate(user=ANN), await estimate(user=BOB), await estimate()
        assert (ann["admitted"], bob["admitted"], nobody["admitted"]) == (False, True, True)
        assert ann["refusal"]["message"].startswith(f"User {user} of team growth has spent")
        assert [(one["scope"], one["owner"]) for one in ann["budgets"]] == [
            ("user", f"growth/{user}")
        ]
        assert ann["rate_limits"][0]["scope"] == "user"
        assert nobody["budgets"] == nobody["rate_limits"] == []
        many = await estimate(user=BOB, n=4)
        assert many["refusal"]["code"] in ("limit_exceeded", "insufficient_quota")


# What is passed on, and what is shared.


async def test_what_is_passed_on_is_within_the_rate_of_the_user_that_a_header_names(
    start: Start, sandbox: SandboxServer
) -> None:
    async with (
        start(per_user(limits={"requests_per_minute": 2})) as gateway,
        gateway.http() as http,
    ):
        ann, bob = ({"x-openwebui-user-id": name} for name in (ANN, BOB))
        for _ in range(2):
            assert (await http.get("/files", headers=ann)).status_code == 200
        refused = await http.post("/moderations", headers=ann, json={"input": "A lighthouse"})
        assert refused.status_code == 429
        [*_, (receipt, _)] = await gateway.told.until(3)
        assert USER.fullmatch(receipt.user)
        assert f"User {receipt.user} of team growth is limited to 2" in refused.text
        assert not len(sandbox.journal)
        # Nobody else is held up by that, and nobody has to be named here.
        for headers in (bob, {}, {}, {}):
            assert (await http.get("/files", headers=headers)).status_code == 200


@pytest.mark.parametrize("by", ["rate", "budget"])
async def test_the_limits_of_one_user_hold_over_all_replicas(
    tmp_path: Path, sandbox: SandboxServer, clock: LeapingClock, postgres: Postgres, by: str
) -> None:
    """The rate by the gate in Redis, the budget by the ledger in PostgreSQL."""
    limits: dict[str, Any] = {
        "rate": {"limits": {"requests_per_minute": 1}},
        "budget": {"budget": {"day": 0.01}},
    }
    async with AsyncExitStack() as stack:
        valkey = stack.enter_context(run_valkey())
        shared = {"database": postgres.fresh_database(), "redis": valkey.url}
        changes = {"storage": {**shared, "pepper": 4 * "pepper of both "}, **per_user(**limits[by])}
        both = []
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            running = run_gateway(tmp_path / name, sandbox, changes, clock)
            both.append(await stack.enter_async_context(running))
        one, other = both
        await ask(one, **of(ANN))
        await one.told.until(1)
        error = await refused(other, **of(ANN))
        code = "rate_limit_exceeded" if by == "rate" else "insufficient_quota"
        assert (error.status_code, error.code) == (429, code)
        assert said(error).startswith(f"User {one.told.last.user} of team growth ")
        await ask(other, **of(BOB))
        await other.told.until(2)
        assert (await refused(one, **of(BOB))).code == code
        users = {one.told.requests[0][0].user, other.told.last.user}
        assert len(users) == 2
        rows = await other.usage()
        assert sum(row.requests for row in rows) == 2
