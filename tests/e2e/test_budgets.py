"""Budgets of every window, in the team's own time; and who hears of them, once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from openai import AsyncOpenAI, RateLimitError

from gateway.assembly import read_peppers
from gateway.assembly_stores import open_store
from gateway.domain import keys
from gateway.domain.errors import LedgerUnavailable
from gateway.domain.ledger import Balance, Line
from gateway.domain.quota import Limit, Period, Scope, Unit, Window
from gateway.domain.team import Key, Limits, Team
from gateway.reports.budgets import LEASE_SECONDS
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from gateway.settings import load
from tests.inbox import SECRET, Inbox, inbox
from tests.running import KEY, MODEL, OTHER_KEY, GatewayUnderTest, Start, TestClock
from tests.valkey import eventually

ASKED: dict[str, Any] = {
    "model": MODEL,
    "prompt": "A lighthouse",
    "quality": "low",
    "size": "1024x1024",
    "extra_headers": {"cache-control": "no-cache"},
}
COST, BOUND = 5_895_000, 6_100_000
DIGITS = {Window.DAY: "d", Window.WEEK: "w", Window.MONTH: "m", Window.TOTAL: "t"}


@pytest.fixture(autouse=True)
def quick(sandbox: SandboxServer) -> None:
    """Pictures that need no drawing. The rules of a test that come later find only its prompts."""
    sandbox.rules.add(Rule(prompt="A ", payload_bytes=400))


@pytest.fixture
async def box() -> AsyncIterator[Inbox]:
    async with inbox() as running:
        yield running


async def buy(sdk: AsyncOpenAI, times: int = 1) -> None:
    for _ in range(times):
        await sdk.images.generate(**ASKED)


async def refused(sdk: AsyncOpenAI, **changes: Any) -> str:
    with pytest.raises(RateLimitError) as raised:
        await sdk.images.generate(**{**ASKED, **changes})
    assert raised.value.code == "insufficient_quota"
    assert raised.value.response.headers["x-should-retry"] == "false"
    return raised.value.message


async def spent(
    gateway: GatewayUnderTest, window: Window, label: str, team: str = "growth"
) -> Balance:
    limit = Limit(Scope.TEAM, team, Unit.MONEY, window, None)
    line = Line(limit, Period(window, f"{DIGITS[window]}|{label}", None))
    [found] = await gateway.gateway.ledger.balances([line])
    return found


def growth(box: Inbox | None = None, **settings: Any) -> dict[str, Any]:
    changes: dict[str, Any] = {"teams": {"growth": settings}}
    if box is not None:
        changes["notify"] = {"webhook": box.url, "secret": SECRET}
    return changes


# In the team's own time


@pytest.mark.parametrize(
    ("window", "days"), [("day", 1), ("week", 1), ("month", 9), ("total", 400)]
)
async def test_a_hard_budget_holds_until_its_period_ends(
    start: Start, clock: TestClock, window: str, days: int
) -> None:
    """The 22nd of November 2026 is a Sunday."""
    async with start(growth(budget={window: 0.012})) as gateway, gateway.sdk() as sdk:
        await buy(sdk, 2)
        assert "0.012" in await refused(sdk)
        clock.advance(days=days - 1, hours=11, minutes=59, seconds=59)
        await refused(sdk)
        clock.advance(seconds=1)
        if window == "total":
            await refused(sdk)
        else:
            await buy(sdk)
        label = {"day": "2026-11-22", "week": "2026-W47", "month": "2026-11", "total": "all"}[
            window
        ]
        assert (await spent(gateway, Window(window), label)).posted == 2 * COST


async def test_two_teams_at_one_instant_are_in_two_days(start: Start, clock: TestClock) -> None:
    budget = {"day": 0.0061}
    teams = {
        "growth": {"budget": budget, "time_zone": "Pacific/Kiritimati"},
        "design": {"budget": budget, "time_zone": "UTC"},
    }
    async with (
        start({"teams": teams}) as gateway,
        gateway.sdk(KEY) as growth,
        gateway.sdk(OTHER_KEY) as design,
    ):
        await buy(growth)
        await buy(design)
        assert await spent(gateway, Window.DAY, "2026-11-23") == Balance(COST)
        assert await spent(gateway, Window.DAY, "2026-11-22") == Balance()
        assert await spent(gateway, Window.WEEK, "2026-W48") == Balance(COST)
        assert await spent(gateway, Window.DAY, "2026-11-22", "design") == Balance(COST)
        assert await spent(gateway, Window.WEEK, "2026-W47", "design") == Balance(COST)
        assert "2026-11-23 10:00 UTC" in await refused(growth)
        assert "2026-11-23 00:00 UTC" in await refused(design)

        found = await gateway.metrics()
        where = 'scope="team",window="day"'
        ends = {
            team: found[f'gateway_budget_reset_timestamp_seconds{{owner="{team}",{where}}}']
            for team in teams
        }
        assert ends == {
            "growth": datetime(2026, 11, 23, 10, tzinfo=UTC).timestamp(),
            "design": datetime(2026, 11, 23, tzinfo=UTC).timestamp(),
        }

        clock.advance(hours=12)
        await buy(design)
        await refused(growth)
        clock.advance(hours=10)
        await buy(growth)
        assert await spent(gateway, Window.DAY, "2026-11-24") == Balance(COST)


async def test_the_accounts_of_a_key_are_in_its_teams_zone(start: Start) -> None:
    teams = {"growth": {"time_zone": "Pacific/Kiritimati", "keys": [{"key": KEY, "name": "ci"}]}}
    async with start({"teams": teams}) as gateway, gateway.sdk() as sdk:
        await buy(sdk)
        [(receipt, _)] = await gateway.told.until(1)
        limit = Limit(Scope.KEY, receipt.key_id, Unit.MONEY, Window.DAY, None)
        line = Line(limit, Period(Window.DAY, "d|2026-11-23", None))
        assert await gateway.gateway.ledger.balances([line]) == [Balance(COST)]


async def test_a_call_over_midnight_is_booked_where_it_was_held(
    start: Start, clock: TestClock, sandbox: SandboxServer
) -> None:
    """It began at 23:59:59 in Berlin, on the last day of a month and of its budget."""
    clock.advance(days=8, hours=10, minutes=59, seconds=59)
    gate = Gate()
    sandbox.rules.clear()
    sandbox.rules.add(Rule(prompt="A ", payload_bytes=400, wait_for=gate))
    budget = {"day": 0.0061, "month": 0.0061}
    async with (
        start(growth(time_zone="Europe/Berlin", budget=budget)) as gateway,
        gateway.sdk() as sdk,
    ):
        first = asyncio.create_task(buy(sdk))
        await gate.arrived(1)
        assert await spent(gateway, Window.DAY, "2026-11-30") == Balance(0, BOUND)
        clock.advance(seconds=2)
        second = asyncio.create_task(buy(sdk))
        await gate.arrived(2)
        gate.set()
        await asyncio.gather(first, second)
        for window, before, after in (
            (Window.DAY, "2026-11-30", "2026-12-01"),
            (Window.MONTH, "2026-11", "2026-12"),
        ):
            assert await spent(gateway, window, before) == Balance(COST)
            assert await spent(gateway, window, after) == Balance(COST)


async def test_a_zone_that_changes_keeps_what_was_spent(start: Start, clock: TestClock) -> None:
    """Labels carry no zone: the 22nd of November is the same account in Berlin and in Lima."""
    for zone in ("Europe/Berlin", "America/Lima"):
        changes = growth(time_zone=zone, budget={"day": 0.012})
        async with start(changes) as gateway, gateway.sdk() as sdk:
            await buy(sdk)
            balance = await spent(gateway, Window.DAY, "2026-11-22")
    assert balance == Balance(2 * COST)
    changes = growth(time_zone="Asia/Tokyo", budget={"day": 0.012})
    async with start(changes) as gateway, gateway.sdk() as sdk:
        await refused(sdk)


# Who hears of it


async def test_a_soft_budget_is_passed_and_told_once_by_two_gateways(
    start: Start, box: Inbox, caplog: pytest.LogCaptureFixture
) -> None:
    changes = growth(box, soft_budget={"day": 0.0119}, time_zone="Europe/Berlin")
    async with start(changes) as one, start(changes) as two:
        watches = [one.gateway.budget_watch, two.gateway.budget_watch] * 3
        async with one.sdk() as sdk, two.sdk() as other:
            await buy(sdk)
            await asyncio.gather(*(watch.look() for watch in watches))
            assert box.posts == []
            await buy(other)
            await asyncio.gather(*(watch.look() for watch in watches))
            await box.until(1)
            await buy(sdk)
            await asyncio.gather(*(watch.look() for watch in watches))
            await box.until(2)
            await buy(other, 3)
        for watch in watches:
            await watch.look()
        counted = [await gateway.metrics() for gateway in (one, two)]
    warning, reached = box.posts
    assert warning.is_signed
    assert reached.is_signed
    assert warning.headers["webhook-id"] != reached.headers["webhook-id"]
    assert warning.json == {
        "type": "soft_budget.warning",
        "timestamp": "2026-11-22T12:00:00+00:00",
        "data": {
            "team": "growth",
            "window": "day",
            "period": "2026-11-22",
            "spent_usd": "0.01179",
            "reserved_usd": "0",
            "limit_usd": "0.0119",
            "percent": 80,
            "resets_at": "2026-11-22T23:00:00+00:00",
        },
    }
    assert (reached.json["type"], reached.json["data"]["percent"]) == ("soft_budget.reached", 100)
    assert reached.json["data"]["spent_usd"] == "0.017685"
    for mark in ("soft_budget:80", "soft_budget:100"):
        name = f'gateway_budget_notices_total{{mark="{mark}",team="growth"}}'
        assert sum(found.get(name, 0) for found in counted) == 1
    delivered = 'gateway_webhook_total{outcome="delivered"}'
    assert sum(found.get(delivered, 0) for found in counted) == 2
    assert counted[0][
        'gateway_budget_soft_limit_usd{owner="growth",scope="team",window="day"}'
    ] == (0.0119)
    lines = [record for record in caplog.records if record.name == "gateway.reports.budgets"]
    assert [line.getMessage() for line in lines] == [
        "a soft budget is nearly passed",
        "a soft budget is passed",
    ]
    assert {line.levelno for line in lines} == {logging.WARNING}
    said = lines[0].__dict__
    assert (said["team"], said["window"], said["spent_usd"]) == ("growth", "day", "0.01179")


async def test_a_new_period_and_a_raised_budget_warn_anew(
    start: Start, clock: TestClock, box: Inbox
) -> None:
    async with start(growth(box, budget={"day": 0.0073})) as gateway, gateway.sdk() as sdk:
        await buy(sdk)
        await gateway.gateway.budget_watch.look()
        clock.advance(days=1)
        await gateway.gateway.budget_watch.look()  # what was passed yesterday is over
        assert len(box.posts) == 1
        await buy(sdk)
        await gateway.gateway.budget_watch.look()
        assert len(box.posts) == 2
    async with start(growth(box, budget={"day": 0.0131})) as gateway, gateway.sdk() as sdk:
        await gateway.gateway.budget_watch.look()
        assert len(box.posts) == 2
        await buy(sdk)
        await gateway.gateway.budget_watch.look()
    assert [post.json["type"] for post in box.posts] == ["budget.warning"] * 3
    told = [(post.json["data"]["period"], post.json["data"]["limit_usd"]) for post in box.posts]
    assert told == [("2026-11-22", "0.0073"), ("2026-11-23", "0.0073"), ("2026-11-23", "0.0131")]
    assert len({post.headers["webhook-id"] for post in box.posts}) == 3


async def test_a_period_that_ends_meanwhile_is_not_told(
    start: Start, clock: TestClock, box: Inbox
) -> None:
    """Two marks are passed at once; midnight comes while the first is sent."""
    box.on_post = lambda: clock.advance(hours=12)
    soft = {"day": COST / 1e9, "month": 0.007}
    async with start(growth(box, soft_budget=soft)) as gateway, gateway.sdk() as sdk:
        await buy(sdk)
        await gateway.gateway.budget_watch.look()
        await gateway.gateway.budget_watch.look()
        told = [(post.json["data"]["window"], post.json["data"]["percent"]) for post in box.posts]
    assert told == [("day", 80), ("month", 80)]


async def test_who_died_while_telling_is_followed_by_another(
    start: Start, clock: TestClock, box: Inbox
) -> None:
    async with start(growth(box, soft_budget={"day": 0.007})) as gateway, gateway.sdk() as sdk:
        await buy(sdk)
        store = open_store(load(gateway.config, {}))
        account, now = "team:growth|d|2026-11-22", clock.now()
        for mark in ("soft_budget:80/0.007", "soft_budget:80/0.007 webhook"):
            assert await store.upkeep.claim_notice(account, mark, now, LEASE_SECONDS)
        await store.aclose()
        watch = gateway.gateway.budget_watch
        await watch.look()
        assert box.posts == []
        clock.advance(seconds=LEASE_SECONDS)
        await watch.look()
        await watch.look()
        assert len(box.posts) == 1


async def test_the_watch_outlives_what_goes_wrong(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with start() as gateway:
        watch, looks = gateway.gateway.budget_watch, 0

        async def look() -> None:
            nonlocal looks
            looks += 1
            raise LedgerUnavailable("Busy.") if looks == 1 else ZeroDivisionError

        monkeypatch.setattr(watch, "look", look)
        watching = asyncio.create_task(watch.run(0.001))
        await eventually(lambda: looks > 3)
        watching.cancel()
        await asyncio.wait([watching])
    assert "the budgets could not be looked at" in caplog.text
    assert "the watch over the budgets failed" in caplog.text


async def test_a_hard_budget_is_used_up_when_it_refuses(start: Start, box: Inbox) -> None:
    """It is hardly ever spent to the last cent."""
    async with start(growth(box, budget={"day": 0.012})) as gateway, gateway.sdk() as sdk:
        await buy(sdk)
        await refused(sdk, quality="high")  # too dear, but half is left
        await gateway.gateway.budget_watch.look()
        assert box.posts == []
        await buy(sdk)
        await gateway.gateway.budget_watch.look()
        await box.until(1)
        for count in (4, 5):
            await refused(sdk)
            await gateway.told.until(count)
            await gateway.gateway.budget_watch.look()
        assert [post.json["type"] for post in box.posts] == ["budget.warning", "budget.reached"]
        assert box.posts[1].json["data"]["spent_usd"] == "0.01179"


async def test_teams_and_keys_that_commands_made_are_watched_too(start: Start, box: Inbox) -> None:
    secret = "igw_test_0123456789_abcdefghijklmnopqrstuvwxyzABCDEF_xxxxxx"
    async with start(growth(box)) as gateway:
        pepper = read_peppers(load(gateway.config, {})).current
        directory = gateway.gateway.directory
        soft = Limits(soft_budget_total=COST)
        await directory.create_team(Team("art", limits=soft, time_zone="Asia/Tokyo"))
        weekly = Limits(budget_week=BOUND)
        for name, limits in (("spends", weekly), ("leaves", weekly), ("idles", soft)):
            key = Key(f"key-{name}", "art", name, limits=limits)
            await directory.create_key(key, keys.digest(pepper, f"{secret}{name}"))
        for name in ("spends", "leaves"):
            async with gateway.sdk(f"{secret}{name}") as sdk:
                await buy(sdk)
        await directory.revoke_key("key-leaves", gateway.clock.now())
        await gateway.gateway.budget_watch.look()
        found = {(post.json["type"], post.json["data"].get("key")) for post in box.posts}
        assert found == {
            ("budget.warning", "key-spends"),
            ("soft_budget.warning", None),
            ("soft_budget.reached", None),
        }
        [keyed] = [post.json["data"] for post in box.posts if "key" in post.json["data"]]
        assert (keyed["team"], keyed["key_name"], keyed["period"]) == ("art", "spends", "2026-W47")


async def test_a_receiver_that_was_away_hears_of_it_later(
    start: Start, clock: TestClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway starts and serves; the news waits in the books, for whoever tells it."""
    monkeypatch.setattr("gateway.assembly.PAUSES_SECONDS", (0.0,))
    async with inbox(503, 503, 204) as box:
        changes = growth(box, soft_budget={"day": COST / 1e9})
        async with start(changes) as gateway, gateway.sdk() as sdk:
            await buy(sdk)
            await gateway.gateway.budget_watch.look()
            assert len(box.posts) == 2  # both tries of the first message
            failed = 'gateway_webhook_total{outcome="failed"}'
            assert (await gateway.metrics())[failed] == 1
            # Another gateway tells what the first has not claimed; what it has, after its lease.
            async with start(changes):
                await box.until(3)
            clock.advance(seconds=89)
            await gateway.gateway.budget_watch.look()
            assert len(box.posts) == 3
            clock.advance(seconds=1)
            await gateway.gateway.budget_watch.look()
            await gateway.gateway.budget_watch.look()
            assert len(box.posts) == 4
            counted = await gateway.metrics()
        first, again, second, late = box.posts
        assert first.headers["webhook-id"] == again.headers["webhook-id"]
        assert late.headers["webhook-id"] == first.headers["webhook-id"]
        assert second.headers["webhook-id"] != first.headers["webhook-id"]
        assert late.json["timestamp"] != first.json["timestamp"]
        assert counted['gateway_budget_notices_total{mark="soft_budget:80",team="growth"}'] == 1


async def test_what_is_passed_already_is_told_at_the_start(start: Start, box: Inbox) -> None:
    async with start() as gateway, gateway.sdk() as sdk:
        await buy(sdk)
    async with start(growth(box, budget={"total": 0.007})):
        await box.until(1)
    async with start(growth(box, budget={"total": 0.007})) as gateway:
        await gateway.gateway.budget_watch.look()
    [post] = box.posts
    assert post.json["data"]["window"] == "total"
    assert post.json["data"]["period"] == "all"
    assert post.json["data"]["resets_at"] is None


async def test_without_a_webhook_the_log_says_it(
    start: Start, caplog: pytest.LogCaptureFixture, box: Inbox
) -> None:
    async with start(growth(soft_budget={"month": 0.007})) as gateway, gateway.sdk() as sdk:
        await buy(sdk)
        watching = asyncio.create_task(gateway.gateway.budget_watch.run(0.01))
        await eventually(lambda: "a soft budget is nearly passed" in caplog.text)
        watching.cancel()
        await asyncio.wait([watching])
    # The webhook of a later configuration still hears of what is passed.
    async with start(growth(box, soft_budget={"month": 0.007})):
        await box.until(1)
    assert caplog.text.count("a soft budget is nearly passed") == 1
