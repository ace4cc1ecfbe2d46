"""What an answer says of itself, and what of the upstream's words stays behind."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from gateway.domain.call import Call, Change, Encoding, Operation
from gateway.domain.charge import Quote
from gateway.domain.errors import (
    GatewayError,
    InvalidRequest,
    LedgerUnavailable,
    QuotaExceeded,
    RateLimited,
    UpstreamRefused,
    UpstreamUnavailable,
    UpstreamUnknown,
)
from gateway.domain.ledger import Balance, Basis, Line
from gateway.domain.price import Bound, Confidence, PriceList
from gateway.domain.quota import Demand, Limit, Period, Scope, Standing, Unit, Window
from gateway.domain.receipt import CacheResult
from gateway.domain.route import Model, Target
from gateway.domain.team import Caller, Key, Team
from gateway.ports import Credential, Outgoing, Reply
from gateway.relay import headers
from gateway.relay.plan import Plan, Way

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
DAY = Period(Window.DAY, "d|2026-11-22", datetime(2026, 11, 23, tzinfo=UTC))
TOTAL = Period(Window.TOTAL, "t|all", None)
MONTH = Period(Window.MONTH, "m|2026-11", datetime(2026, 12, 1, tzinfo=UTC))
QUOTE = Quote(Bound(52_680_000, Confidence.HARD), PriceList({}), None)


class Comet:
    """An upstream that is never asked for anything."""

    name = "comet"
    provider = "openai"
    address = ("comet.test", 443)
    ready = True
    credentials = (Credential("1"),)

    def masked(self, text: bytes) -> bytes:
        raise AssertionError("it says nothing")

    async def send(self, outgoing: Outgoing, credential: str) -> Reply:
        raise NotImplementedError

    async def aclose(self) -> None:
        return


class Azure(Comet):
    name = "azure"


CALL = Call(Operation.GENERATION, Encoding.JSON, "application/json", "art", 3, {"prompt": "cat"})
ART = Model("art", Target("comet", "gpt-image-2"))
PLAN = Plan(
    caller=Caller(Team("growth"), Key("k1", "growth")),
    call=CALL,
    asked=ART,
    ways=(Way(ART, ART.target, Comet(), QUOTE),),
    demand=Demand(),
    rates=(),
    lines=(),
    fingerprint="f",
    cache=CacheResult.MISS,
    keep=True,
    at=datetime(2026, 11, 22, tzinfo=UTC),
)


@pytest.mark.parametrize("cache", list(CacheResult))
def test_every_answer_says_which_request_it_is_for(cache: CacheResult) -> None:
    assert headers.of_request("req_1", cache) == (
        ("x-request-id", "req_1"),
        ("x-cache", cache.value),
    )


@pytest.mark.parametrize(
    ("stream", "form"),
    [(False, "application/json"), (True, "text/event-stream; charset=utf-8")],
)
def test_every_answer_says_what_form_it_has(stream: bool, form: str) -> None:
    assert headers.of_form(stream) == (("content-type", form),)


def test_every_answer_says_who_makes_the_picture() -> None:
    assert headers.of_way(PLAN, PLAN.way) == (
        ("x-model-served", "gpt-image-2"),
        ("x-gateway-upstream", "comet"),
    )


@pytest.mark.parametrize(
    ("filled_in", "said"),
    [
        ({"quality": "medium"}, "quality=medium"),
        ({"size": "1024x1024", "quality": "medium"}, "size=1024x1024, quality=medium"),
    ],
)
def test_what_was_filled_in_is_said(filled_in: dict[str, str], said: str) -> None:
    changes = tuple(Change(name, None, value) for name, value in filled_in.items())
    plan = replace(PLAN, call=replace(PLAN.call, changes=changes))
    assert dict(headers.of_way(plan, plan.way))["x-gateway-changed"] == said


def test_little_passes_from_an_upstream() -> None:
    theirs = {
        "openai-processing-ms": "1234",
        "openai-version": "2020-10-01",
        "x-request-id": "req_upstream",
        "openai-organization": "org-123",
        "openai-project": "proj_1",
        "x-ratelimit-remaining-requests": "1",
        "set-cookie": "a=b",
        "cf-ray": "c",
        "content-length": "7",
        "server": "s",
        "x-should-retry": "true",
    }
    assert headers.of_upstream(theirs) == (
        ("openai-processing-ms", "1234"),
        ("openai-version", "2020-10-01"),
        ("x-upstream-request-id", "req_upstream"),
    )
    assert headers.of_upstream({}) == ()


DIRTY = ["a\r\nset-cookie: b", "a\nb", "a\x00b", "\x7f", "caf\xe9", "\u2028", "a\tb"]


@pytest.mark.parametrize("value", DIRTY)
def test_what_could_break_a_header_is_dropped(value: str) -> None:
    assert headers.of_upstream({"openai-version": value, "x-request-id": value}) == ()
    refused = UpstreamRefused(429, b"{}", code="c", headers=(("retry-after", value),))
    assert "retry-after" not in dict(headers.error_head(refused, "req_1").headers)


def test_what_it_cost_and_could_cost() -> None:
    assert headers.of_cost(52_680_000, Basis.USAGE) == (
        ("x-cost-usd", "0.05268"),
        ("x-cost-basis", "usage"),
    )
    assert headers.of_cost(0, Basis.NONE) == (("x-cost-usd", "0"), ("x-cost-basis", "none"))
    assert headers.of_bound(QUOTE) == (("x-cost-bound-usd", "0.05268"),)


def line(amount: int | None, period: Period) -> Line:
    return Line(Limit(Scope.TEAM, "growth", Unit.MONEY, period.window, amount), period)


@pytest.mark.parametrize(
    ("amounts", "balances", "said"),
    [
        ((None, None), [Balance(5), Balance(5)], None),
        ((10**10, None), [Balance(10**9), Balance(0)], ("9", "2026-11-23T00:00:00Z")),
        ((10**10, 10**9), [Balance(), Balance(1)], ("0.999999999", "2026-12-01T00:00:00Z")),
        # What running calls hold is not left.
        ((10**10, None), [Balance(10**9, 10**9), Balance()], ("8", "2026-11-23T00:00:00Z")),
        ((10**9, 10**9), [Balance(), Balance()], ("1", "2026-11-23T00:00:00Z")),
        # Overspent is nothing left, not less than nothing.
        ((10**9, None), [Balance(2 * 10**9), Balance()], ("0", "2026-11-23T00:00:00Z")),
        ((10**9, None), [], None),
    ],
)
def test_the_tightest_budget_is_told(
    amounts: tuple[int | None, int | None],
    balances: list[Balance],
    said: tuple[str, str] | None,
) -> None:
    lines = [line(amounts[0], DAY), line(amounts[1], MONTH)]
    wanted = () if said is None else tuple(zip(NAMES, said, strict=True))
    assert headers.of_budget(lines, balances) == wanted


NAMES = ("x-budget-remaining-usd", "x-budget-reset")


@pytest.mark.parametrize(
    ("day", "total", "said"),
    [
        (2, 1, (("x-budget-remaining-usd", "0.000000001"),)),
        (1, 2, (("x-budget-remaining-usd", "0.000000001"), (NAMES[1], "2026-11-23T00:00:00Z"))),
        (1, 1, (("x-budget-remaining-usd", "0.000000001"), (NAMES[1], "2026-11-23T00:00:00Z"))),
        (None, 0, (("x-budget-remaining-usd", "0"),)),
    ],
)
def test_what_is_never_renewed_has_no_reset(
    day: int | None, total: int, said: headers.Headers
) -> None:
    lines = [line(total, TOTAL), line(day, DAY)]
    assert headers.of_budget(lines, [Balance(), Balance()]) == said


def test_an_instant_is_said_in_utc() -> None:
    there = timezone(timedelta(hours=14))
    assert headers.say_instant(datetime(2026, 12, 1, tzinfo=there)) == "2026-11-30T10:00:00Z"


@pytest.mark.parametrize(
    ("amount", "left", "reset", "taken", "then"),
    [
        (60, 59, 1.0, 1, (60, 0.0)),
        (60, 30, 30.0, 10, (40, 20.0)),
        (20, 0, 60.0, 20, (20, 0.0)),
        # As much as was taken is never more than all.
        (20, 20, 0.5, 3, (20, 0.0)),
        (0, 0, 0.0, 0, (0, 0.0)),
    ],
)
def test_what_was_given_back_is_there_again(
    amount: int, left: int, reset: float, taken: int, then: tuple[int, float]
) -> None:
    limit = Limit(Scope.TEAM, "t", Unit.IMAGES, Window.MINUTE, amount)
    demand = Demand(images=taken)
    [found] = headers.given_back([Standing(limit, left, reset)], demand)
    assert found == Standing(limit, *then)


def test_an_error_says_what_is_known_and_what_it_knows_better() -> None:
    known = (("x-cache", "miss"), ("content-type", "text/event-stream"), ("x-left", "7"))
    error = RateLimited("Slowly.", retry_after_seconds=1)
    error.headers = (("x-left", "0"), ("x-dirty", "a\nb"))
    found = dict(headers.error_head(error, "req_1", known).headers)
    assert found == {
        "x-cache": "miss",
        "x-left": "0",
        "content-type": "application/json",
        "x-request-id": "req_1",
        "retry-after": "1",
        "retry-after-ms": "1000",
    }


def test_the_tightest_rate_of_each_unit_is_told() -> None:
    def standing(unit: Unit, amount: int, left: int, reset: float) -> Standing:
        return Standing(Limit(Scope.TEAM, "t", unit, Window.MINUTE, amount), left, reset)

    assert headers.of_rates(()) == ()
    assert headers.of_rates([standing(Unit.SLOTS, 3, 1, 1.0)]) == ()
    assert headers.of_rates(
        [
            standing(Unit.IMAGES, 20, 17, 9.0),
            standing(Unit.REQUESTS, 60, 59, 1.0),
            standing(Unit.REQUESTS, 10, 4, 36.0204),
            standing(Unit.SLOTS, 3, 0, 1.0),
        ]
    ) == (
        ("x-ratelimit-limit-requests", "10"),
        ("x-ratelimit-remaining-requests", "4"),
        ("x-ratelimit-reset-requests", "36.020s"),
        ("x-ratelimit-limit-images", "20"),
        ("x-ratelimit-remaining-images", "17"),
        ("x-ratelimit-reset-images", "9.000s"),
    )


@pytest.mark.parametrize(
    ("stored", "age"), [(0.0, "0"), (0.9, "0"), (61.5, "61"), (86_400, "86400"), (-5, "0")]
)
def test_a_kept_answer_has_an_age(stored: float, age: str) -> None:
    assert headers.of_age(NOW - timedelta(seconds=stored), NOW) == (("age", age),)


# Errors


def said(error: GatewayError) -> dict[str, str]:
    head = headers.error_head(error, "req_1")
    assert head.status == error.status
    assert head.length == len(error.content)
    assert len(head.headers) == len(dict(head.headers)), "nothing is said twice"
    found = dict(head.headers)
    assert (found.pop("content-type"), found.pop("x-request-id")) == ("application/json", "req_1")
    return found


@pytest.mark.parametrize(
    ("wait", "told"),
    [
        (None, {}),
        (0.0, {"retry-after": "0", "retry-after-ms": "0"}),
        (0.0001, {"retry-after": "1", "retry-after-ms": "1"}),
        (6.5004, {"retry-after": "7", "retry-after-ms": "6501"}),
        (60.0, {"retry-after": "60", "retry-after-ms": "60000"}),
        (
            60.001,
            {"retry-after": "61", "retry-after-ms": "60001", "x-should-retry": "false"},
        ),
        (
            3600.0,
            {"retry-after": "3600", "retry-after-ms": "3600000", "x-should-retry": "false"},
        ),
    ],
)
def test_how_long_to_wait(wait: float | None, told: dict[str, str]) -> None:
    assert said(RateLimited("Slowly.", retry_after_seconds=wait)) == told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InvalidRequest("No."), {"x-should-retry": "false"}),
        (QuotaExceeded("No."), {"x-should-retry": "false"}),
        (UpstreamUnknown("Perhaps."), {"x-should-retry": "false"}),
        (UpstreamUnavailable("No."), {}),
        (
            LedgerUnavailable("No.", retry_after_seconds=5),
            {"retry-after": "5", "retry-after-ms": "5000"},
        ),
        (UpstreamUnavailable("No.", should_retry=True), {"x-should-retry": "true"}),
        (InvalidRequest("No.", close=True), {"x-should-retry": "false", "connection": "close"}),
        (
            UpstreamRefused(
                429, b"{}", code="c", headers=(("retry-after", "7"), ("x-should-retry", "true"))
            ),
            {"retry-after": "7", "x-should-retry": "true"},
        ),
    ],
)
def test_whether_to_try_again(error: GatewayError, told: dict[str, str]) -> None:
    assert said(error) == told


@pytest.mark.parametrize(
    ("theirs", "retry"),
    [
        ({"retry-after": "60"}, None),
        ({"retry-after": "61"}, "false"),
        ({"retry-after-ms": "60000", "retry-after": "61"}, None),
        ({"retry-after-ms": "60001"}, "false"),
        ({"retry-after-ms": "soon", "retry-after": "61"}, "false"),
        ({"retry-after": "61", "x-should-retry": "true"}, "false"),
        ({"retry-after": "Sun, 22 Nov 2026 13:00:00 GMT"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, "false"),
        ({"x-should-retry": "false"}, "false"),
    ],
)
def test_an_upstreams_long_wait_is_no_invitation(theirs: dict[str, str], retry: str | None) -> None:
    found = said(UpstreamRefused(429, b"{}", code="c", headers=tuple(theirs.items())))
    assert found.get("x-should-retry") == retry
    assert found.items() >= {(name, value) for name, value in theirs.items() if "after" in name}


async def test_an_error_is_sent_as_it_is() -> None:
    error = UpstreamRefused(400, b' {"error": {"code": "moderation_blocked"}} ', code="c")
    head = headers.error_head(error, "req_1", (("allow", "POST"),))
    assert [chunk async for chunk in head.body()] == [error.content]
    assert ("allow", "POST") in head.headers
    head.close()
    ours = headers.error_head(InvalidRequest("Größe?", param="size"), "req_1")
    (content,) = [chunk async for chunk in ours.body()]
    assert json.loads(content)["error"]["message"] == "Größe?"


def test_another_way_than_the_first_is_said_as_it_is() -> None:
    spare = Model("spare", Target("azure", "dep-1"))
    pinned = replace(PLAN, call=replace(CALL, changes=(Change("size", None, "1024x1024"),)))
    assert headers.of_way(pinned, Way(spare, spare.target, Azure(), QUOTE)) == (
        ("x-model-served", "dep-1"),
        ("x-gateway-upstream", "azure"),
        ("x-gateway-changed", "model=spare, size=1024x1024"),
    )


@pytest.mark.parametrize("count", [0, 1, 3])
def test_how_often_it_was_sent_is_said(count: int) -> None:
    assert headers.of_attempts(count) == (("x-gateway-attempts", str(count)),)


def test_what_was_never_sent_cost_nothing() -> None:
    assert dict(headers.NOTHING_SPENT) == {
        "x-gateway-attempts": "0",
        "x-cost-usd": "0",
        "x-cost-basis": "none",
    }


def test_the_advice_of_an_error_is_kept_apart_from_its_head() -> None:
    error = UpstreamUnavailable("No.", retry_after_seconds=90)
    advice = headers.of_advice(error)
    assert dict(advice) == {
        "retry-after": "90",
        "retry-after-ms": "90000",
        "x-should-retry": "false",
    }
    assert set(advice) <= set(headers.error_head(error, "req_1").headers)


def test_what_an_error_says_goes_before_what_is_known_of_the_request() -> None:
    error = UpstreamUnknown("Perhaps.")
    head = headers.error_head(error, "req_2", headers.of_request("req_1", CacheResult.JOIN))
    assert dict(head.headers)["x-request-id"] == "req_2"
    assert dict(head.headers)["x-cache"] == "join"
    assert len(head.headers) == len(dict(head.headers))
