"""From a call to a plan: served by whom, at what price, and out of which cache."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from gateway.domain.call import Call, Encoding, InputImage, Json, Operation
from gateway.domain.errors import (
    GatewayError,
    InvalidRequest,
    ModelNotAllowed,
    ModelNotFound,
    UpstreamAccount,
)
from gateway.domain.money import Money
from gateway.domain.price import (
    Answer,
    Bound,
    CannotPrice,
    Confidence,
    PriceBook,
    PriceList,
    PriceRow,
)
from gateway.domain.quota import Demand, Scope, Unit, Window
from gateway.domain.receipt import CacheResult
from gateway.domain.route import Catalogue, Model, Pin, Target, Unpriced
from gateway.domain.team import Caller, Key, Limits, Team
from gateway.ports import (
    Cached,
    CachedMeta,
    CacheEntry,
    Credential,
    Outgoing,
    Parts,
    Reply,
    Upstream,
)
from gateway.relay.plan import CachePolicy, CacheWish, Chooser, Plan, Planner, cheaper, drawn

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
HARD, SOFT = Confidence.HARD, Confidence.SOFT
CENT = 10_000_000


class Account:
    """An upstream that is never asked for anything here."""

    def __init__(self, name: str, ready: bool = True) -> None:
        self.name = name
        self.provider = "openai"
        self.address = ("upstream.test", 443)
        self.ready = ready
        self.credentials = (Credential("1"),)

    def masked(self, text: bytes) -> bytes:
        raise AssertionError("it says nothing")

    async def send(self, outgoing: Outgoing, credential: str) -> Reply:
        raise NotImplementedError

    async def aclose(self) -> None:
        return


@dataclass
class ByQuality:
    """So many cents a picture; ``refuses`` is what it cannot price."""

    cents: Mapping[str, int]
    refuses: str = ""
    confidence: Confidence = HARD
    asked: list[Call] = field(default_factory=list)

    def knows(self, size: str, quality: str) -> bool:
        return True

    def bound(self, call: Call, prices: PriceList) -> Bound:
        self.asked.append(call)
        if self.refuses in (call.quality, call.size):
            raise CannotPrice("This has no price.", "quality")
        each = self.cents.get(f"{call.size} {call.quality}", self.cents.get(call.quality, 100))
        return Bound(call.n * each * CENT, self.confidence)

    def likely(self, call: Call, prices: PriceList) -> Money | None:
        return None

    def cost(self, answer: Answer, prices: PriceList) -> Money | None:
        return None


class OneAnswer:
    """A cache that has an answer to everything, or nothing; it remembers who asked for what."""

    def __init__(self, stored: Cached | None = None) -> None:
        self.stored = stored
        self.asked: list[str] = []

    async def get(self, key: str) -> Cached | None:
        self.asked.append(key)
        return self.stored

    async def put(
        self, key: str, meta: CachedMeta, chunks: AsyncIterator[bytes], ttl_seconds: float
    ) -> bool:
        raise NotImplementedError

    def put_at_once(self, entry: CacheEntry, body: Parts) -> bool:
        raise NotImplementedError

    async def holds(self, key: str) -> bool:
        return self.stored is not None

    async def delete(self, key: str) -> None:
        raise NotImplementedError

    async def ping(self) -> None:
        return

    async def aclose(self) -> None:
        return


def kept(age: float = 60.0, streamable: bool = True) -> Cached:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"{}"

    stored_at = NOW - timedelta(seconds=age)
    return Cached(CachedMeta(stored_at, CENT, 1, "flare", "openai", 2, streamable), chunks)


FLARE = Model("flare", Target("openai", "flare"), label="flare")
ART = Model("team-art", Target("openai", "flare"), label="team-art")
LOCAL = Model("local", Target("home", "sd"), label="local")
DEAR = Model("dear", Target("openai", "unheard-of"), Unpriced.ALLOW, label="dear")
ANY = Model("*", Target("openai", "*"), Unpriced.REFUSE)
SECOND = Model("gpt-image-2", Target("openai", "gpt-image-2"), label="gpt-image-2")
PRICE = ByQuality({"high": 20, "low": 1, "auto": 70})


@dataclass
class Bench:
    cache: OneAnswer = field(default_factory=OneAnswer)
    policy: CachePolicy = field(default_factory=CachePolicy)
    price: ByQuality = field(default_factory=lambda: replace(PRICE, asked=[]))
    models: tuple[Model, ...] = (FLARE, ART, LOCAL, DEAR)
    factor_of: Callable[[str, str], int] = lambda upstream, model: 1_000_000
    wildcard: Model | None = None
    ready: bool = True
    passing_urls: frozenset[str] = frozenset()
    usable: Callable[[Upstream, str], bool] = lambda upstream, model: True
    chooser: Chooser = field(default_factory=lambda: random.Random(7))

    @property
    def planner(self) -> Planner:
        rows = [
            PriceRow("openai", name, date(2026, 1, 1), "list", self.price)
            for name in ("flare", "sd", "brand-new", "gpt-image-2")
        ]
        return Planner(
            Catalogue({model.name: model for model in self.models}, self.wildcard),
            {"openai": Account("openai", self.ready), "home": Account("home")},
            PriceBook(rows),
            self.cache,
            self.policy,
            self.passing_urls,
            self.factor_of,
            self.usable,
            self.chooser,
        )

    async def plan(self, call: Call, who: Caller | None = None, wish: Any = None) -> Plan:
        planner = self.planner
        who = who or caller()
        routed = planner.route_call(who, planner.repaired(who, call, NOW), NOW)
        return await planner.plan(routed, wish or CacheWish(), NOW)

    async def refused(
        self, kind: type[GatewayError], call: Call, who: Caller | None = None
    ) -> GatewayError:
        with pytest.raises(kind) as refused:
            await self.plan(call, who)
        assert type(refused.value) is kind
        return refused.value


def caller(
    limits: Limits | None = None,
    key_limits: Limits | None = None,
    *,
    models: frozenset[str] = frozenset({"*"}),
    key_models: frozenset[str] | None = None,
    cache: bool = True,
) -> Caller:
    return Caller(
        Team("growth", models, limits or Limits(), cache),
        Key("k1", "growth", models=key_models, limits=key_limits or Limits()),
    )


def a_call(model: str = "flare", **more: Any) -> Call:
    members = {"quality": "high", "size": "1024x1024", "parameters": {"prompt": "cat"}} | more
    return Call(
        Operation.GENERATION,
        Encoding.JSON,
        "application/json",
        model,
        3,
        **members,
    )


LINKED = InputImage("image", "d1", 0, "")
SENT = InputImage("image", "d1", 7, "image/png", 64, 64)


# What a plan says


async def test_a_plan() -> None:
    bench = Bench()
    limits = Limits(60, 20, 10, budget_day=5, budget_month=50)
    who = caller(limits, Limits(requests_per_minute=6))
    plan = await bench.plan(a_call("team-art", n=3), who)
    assert plan.model is ART
    assert plan.upstream.name == "openai"
    assert (plan.quote.bound, plan.quote.price_id) == (
        Bound(60 * CENT, HARD),
        "openai/flare@2026-01-01",
    )
    assert plan.demand == Demand(requests=1, images=3, slots=1, money=60 * CENT)
    assert [(limit.scope, limit.unit) for limit in plan.rates] == [
        (Scope.KEY, Unit.REQUESTS),
        (Scope.TEAM, Unit.REQUESTS),
        (Scope.TEAM, Unit.IMAGES),
        (Scope.TEAM, Unit.SLOTS),
    ]
    assert [line.account for line in plan.lines] == [
        "key:k1|d|2026-11-22",
        "key:k1|w|2026-W47",
        "key:k1|m|2026-11",
        "key:k1|t|all",
        "team:growth|d|2026-11-22",
        "team:growth|w|2026-W47",
        "team:growth|m|2026-11",
        "team:growth|t|all",
    ]
    assert (plan.cache, plan.keep, plan.cached) == (CacheResult.MISS, True, None)
    assert bench.cache.asked == [plan.fingerprint]


async def test_an_alias_asks_for_the_same_picture_as_its_model() -> None:
    bench = Bench()
    alias, plain = await bench.plan(a_call("team-art")), await bench.plan(a_call("flare"))
    elsewhere = await bench.plan(a_call("local"))
    assert alias.fingerprint == plain.fingerprint != elsewhere.fingerprint


@pytest.mark.parametrize(
    ("scope", "other_key", "other_team"),
    [("team", True, False), ("key", False, False), ("organization", True, True)],
)
async def test_who_shares_an_answer(scope: str, other_key: bool, other_team: bool) -> None:
    bench = Bench(policy=CachePolicy(scope=scope))
    mine = await bench.plan(a_call())
    colleague = await bench.plan(a_call(), Caller(Team("growth"), Key("k2", "growth")))
    stranger = await bench.plan(a_call(), Caller(Team("design"), Key("k3", "design")))
    assert (mine.fingerprint == colleague.fingerprint) is other_key
    assert (mine.fingerprint == stranger.fingerprint) is other_team


# The cache


@pytest.mark.parametrize(
    ("policy", "team", "model", "wish", "looked", "cache", "keep"),
    [
        (True, True, True, CacheWish(), True, CacheResult.MISS, True),
        (True, True, True, CacheWish(read=False), False, CacheResult.MISS, True),
        (True, True, True, CacheWish(write=False), True, CacheResult.MISS, False),
        (True, True, True, CacheWish(False, False), False, CacheResult.MISS, False),
        (False, True, True, CacheWish(), False, CacheResult.OFF, False),
        (True, False, True, CacheWish(), False, CacheResult.OFF, False),
        (True, True, False, CacheWish(), False, CacheResult.OFF, False),
        (False, False, False, CacheWish(), False, CacheResult.OFF, False),
    ],
)
async def test_who_may_look_and_who_may_keep(
    policy: bool,
    team: bool,
    model: bool,
    wish: CacheWish,
    looked: bool,
    cache: CacheResult,
    keep: bool,
) -> None:
    bench = Bench(policy=CachePolicy(enabled=policy), models=(replace(FLARE, cache_enabled=model),))
    plan = await bench.plan(a_call(), caller(cache=team), wish)
    assert bool(bench.cache.asked) is looked
    assert (plan.cache, plan.keep) == (cache, keep)


@pytest.mark.parametrize(
    ("age", "ttl", "max_age", "hit"),
    [
        (60, 86_400, None, True),
        (60, 60, None, True),
        (61, 60, None, False),
        (60, 86_400, 60, True),
        (61, 86_400, 60, False),
        (1, 86_400, 0, False),
        (61, 60, 600, False),
    ],
)
async def test_how_old_an_answer_may_be(
    age: float, ttl: float, max_age: int | None, hit: bool
) -> None:
    bench = Bench(cache=OneAnswer(kept(age)), policy=CachePolicy(ttl_seconds=ttl))
    plan = await bench.plan(a_call(), wish=CacheWish(max_age=max_age))
    assert (plan.cached is not None) is hit
    assert plan.cache is (CacheResult.HIT if hit else CacheResult.MISS)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("streamable", [False, True])
async def test_a_stream_is_answered_from_what_has_that_form(stream: bool, streamable: bool) -> None:
    bench = Bench(cache=OneAnswer(kept(streamable=streamable)))
    plan = await bench.plan(a_call(stream=stream))
    assert (plan.cached is not None) is (streamable or not stream)


async def test_a_hit_costs_nothing_and_needs_no_money() -> None:
    bench = Bench(cache=OneAnswer(kept()), ready=False)
    who = caller(Limits(60, budget_day=1, max_cost_per_request=1))
    plan = await bench.plan(a_call(), who)
    assert plan.cache is CacheResult.HIT
    assert (plan.quote.bound, plan.quote.row, plan.lines, plan.keep) == (
        Bound(0, HARD),
        None,
        (),
        False,
    )
    assert [limit.unit for limit in plan.rates] == [Unit.REQUESTS]
    assert bench.price.asked == []


async def test_permission_is_asked_before_the_cache() -> None:
    bench = Bench(cache=OneAnswer(kept()))
    await bench.refused(ModelNotAllowed, a_call(), caller(models=frozenset({"local"})))
    assert bench.cache.asked == []


# Addresses of pictures


async def test_an_address_is_refused_unless_its_upstream_may_have_it() -> None:
    error = await Bench().refused(InvalidRequest, a_call(inputs=(SENT, LINKED)))
    assert error.message == (
        "flare does not take addresses of pictures on this gateway. Send the picture itself, as "
        "a data URL or a file of a multipart form."
    )
    assert (error.code, error.param, error.reason) == (
        "image_url_not_allowed",
        "image_url",
        "ssrf_blocked",
    )
    elsewhere = Bench(passing_urls=frozenset({"home"}))
    await elsewhere.refused(InvalidRequest, a_call(inputs=(LINKED,)))
    await elsewhere.plan(a_call("local", inputs=(LINKED,)))


async def test_what_stands_at_an_address_may_change_so_it_is_never_cached() -> None:
    bench = Bench(cache=OneAnswer(kept()), passing_urls=frozenset({"openai"}))
    plan = await bench.plan(a_call(inputs=(LINKED,)))
    assert (plan.cache, plan.keep, plan.cached, bench.cache.asked) == (
        CacheResult.OFF,
        False,
        None,
        [],
    )
    assert (await bench.plan(a_call(inputs=(SENT,)))).cached is not None


# Names


async def test_a_name_that_nobody_serves() -> None:
    error = await Bench().refused(ModelNotFound, a_call("flair"))
    assert error.message == "No model flair. Did you mean flare? GET /v1/models lists yours."
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    error = await Bench().refused(ModelNotFound, a_call("teamart"))
    assert error.message == (
        "No model teamart. Did you mean team-art (served by flare)? GET /v1/models lists yours."
    )
    error = await Bench().refused(ModelNotFound, a_call("zzz"))
    assert error.message == "No model zzz. GET /v1/models lists yours."


async def test_a_hint_names_no_model_that_the_caller_may_not_use() -> None:
    who = caller(models=frozenset({"local"}))
    error = await Bench().refused(ModelNotFound, a_call("flair"), who)
    assert error.message == "No model flair. GET /v1/models lists yours."


@pytest.mark.parametrize(
    ("models", "key_models", "text"),
    [
        (
            *({"team-art"}, None),
            "Team growth may use team-art, not flare. Ask an administrator to add it.",
        ),
        (
            *({"*"}, {"team-art", "local"}),
            "Team growth may use local, team-art, not flare with this key. "
            "Ask an administrator to add it.",
        ),
        (
            *({"gone"}, None),
            "Team growth may use no model, not flare. Ask an administrator to add it.",
        ),
    ],
)
async def test_a_model_that_is_not_for_this_caller(
    models: set[str], key_models: set[str] | None, text: str
) -> None:
    who = caller(
        models=frozenset(models),
        key_models=None if key_models is None else frozenset(key_models),
    )
    error = await Bench().refused(ModelNotAllowed, a_call(), who)
    assert error.message == text
    assert (error.status, error.code, error.param) == (403, "model_not_allowed", "model")


async def test_a_long_list_of_models_is_cut_short() -> None:
    many = tuple(Model(f"m{number}", FLARE.target) for number in range(8))
    who = caller(models=frozenset(model.name for model in many))
    error = await Bench(models=(FLARE, *many)).refused(ModelNotAllowed, a_call(), who)
    assert "may use m0, m1, m2, m3, m4 and 3 more, not flare" in error.message


async def test_an_alias_is_allowed_by_its_own_name() -> None:
    bench, who = Bench(), caller(models=frozenset({"team-art"}))
    assert (await bench.plan(a_call("team-art"), who)).model is ART
    await bench.refused(ModelNotAllowed, a_call("flare"), who)


async def test_the_wildcard() -> None:
    bench = Bench(wildcard=ANY)
    plan = await bench.plan(a_call("brand-new"))
    assert plan.model == Model("brand-new", Target("openai", "brand-new"), label="other")
    assert plan.quote.price_id == "openai/brand-new@2026-01-01"
    error = await bench.refused(InvalidRequest, a_call("unheard-of"))
    assert error.code == "model_not_priced"
    await bench.refused(ModelNotAllowed, a_call("brand-new"), caller(models=frozenset({"flare"})))


def test_the_models_of_a_caller_are_listed_by_name() -> None:
    planner = Bench(wildcard=ANY).planner
    assert [model.name for model in planner.models(caller(), NOW)] == [
        "dear",
        "flare",
        "local",
        "team-art",
    ]
    who = caller(models=frozenset({"local", "flare", "gone"}), key_models=frozenset({"flare"}))
    assert planner.models(who, NOW) == [FLARE]


# Prices


async def test_an_upstream_without_a_key_is_off() -> None:
    error = await Bench(ready=False).refused(UpstreamAccount, a_call("team-art"))
    assert error.message == (
        "This gateway has no key for its upstream openai yet, so team-art is off. "
        "The gateway's operator has to put one into upstreams.openai.api_keys."
    )
    assert (error.status, error.code, error.reason) == (503, "upstream_off", "upstream_off")


@pytest.mark.parametrize(
    ("rule", "team", "key", "bound"),
    [
        (Unpriced.REFUSE, Limits(), Limits(), "unpriced"),
        (Unpriced.REFUSE, Limits(max_cost_per_request=7), Limits(), "unpriced"),
        (Unpriced.ALLOW, Limits(), Limits(), 0),
        (Unpriced.ALLOW, Limits(max_cost_per_request=7), Limits(), 7),
        (Unpriced.ALLOW, Limits(max_cost_per_request=7), Limits(max_cost_per_request=5), 5),
        (Unpriced.ALLOW, Limits(budget_day=9), Limits(), "budget"),
        (Unpriced.ALLOW, Limits(), Limits(budget_month=9), "budget"),
        (Unpriced.ALLOW, Limits(budget_day=9, max_cost_per_request=7), Limits(), 7),
        (Unpriced.ALLOW, Limits(budget_day=9), Limits(max_cost_per_request=0), 0),
    ],
)
async def test_a_model_without_a_price(
    rule: Unpriced, team: Limits, key: Limits, bound: int | str
) -> None:
    bench, who = Bench(models=(replace(DEAR, unpriced=rule),)), caller(team, key)
    if isinstance(bound, int):
        plan = await bench.plan(a_call("dear"), who)
        assert plan.quote.bound == Bound(bound, SOFT)
        assert (plan.quote.row, plan.keep, plan.cache) == (None, False, CacheResult.MISS)
        assert plan.demand.money == bound
        return
    error = await bench.refused(InvalidRequest, a_call("dear"), who)
    assert (
        error.message
        == {
            "unpriced": "dear has no price on this gateway, so nothing is bought. "
            "Ask the gateway's operator to add one.",
            "budget": "dear has no price on this gateway, and team growth has a hard budget. "
            "Ask the gateway's operator for a price, or for max_cost_per_request.",
        }[bound]
    )
    assert (error.status, error.code, error.param, error.reason) == (
        *(400, "model_not_priced"),
        *("model", "unpriced"),
    )


async def test_a_call_without_a_bound() -> None:
    bench = Bench(price=ByQuality({}, refuses="high"))
    error = await bench.refused(InvalidRequest, a_call())
    assert (error.message, error.code, error.param) == (
        "This has no price. That is for the gateway's operator to do.",
        "model_not_priced",
        "quality",
    )


@pytest.mark.parametrize(
    ("team", "key", "refused"),
    [
        (None, None, None),
        (20 * CENT, None, None),
        (20 * CENT - 1, None, "team growth allows $0.20"),
        (None, 5 * CENT, "key k1 of team growth allows $0.050"),
        (30 * CENT, 10 * CENT, "key k1 of team growth allows $0.10"),
        (10 * CENT, 30 * CENT, "team growth allows $0.10"),
        (None, CENT, "key k1 of team growth allows $0.010"),
        (None, CENT - 1, "key k1 of team growth allows $0.010"),
        (None, 0, "key k1 of team growth allows $0.00"),
    ],
)
async def test_the_most_that_a_request_may_cost(
    team: int | None, key: int | None, refused: str | None
) -> None:
    bench = Bench()
    who = caller(Limits(max_cost_per_request=team), Limits(max_cost_per_request=key))
    if refused is None:
        await bench.plan(a_call(), who)
        return
    error = await bench.refused(InvalidRequest, a_call(), who)
    # A way that is still too dear is no advice.
    fits = min(one for one in (team, key) if one is not None) >= CENT
    advice = "Cheaper now: quality=low (at most $0.010)."
    otherwise = "Ask for fewer pictures, a smaller size or a lower quality."
    assert error.message == (
        f"This request could cost up to $0.20, and {refused} a request. "
        f"{advice if fits else otherwise}"
    )
    assert (error.status, error.code, error.reason) == (
        *(400, "max_cost_exceeded"),
        "max_cost_exceeded",
    )


@pytest.mark.parametrize("day", [Window.DAY, Window.MONTH])
async def test_accounts_are_of_the_day_and_month_of_the_clock(day: Window) -> None:
    planner = Bench().planner
    late = datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC)
    for instant, labels in (
        (late, {Window.DAY: "d|2026-11-30", Window.MONTH: "m|2026-11"}),
        (late + timedelta(seconds=1), {Window.DAY: "d|2026-12-01", Window.MONTH: "m|2026-12"}),
    ):
        routed = planner.route_call(caller(), a_call(), NOW)
        plan = await planner.plan(routed, CacheWish(), instant)
        found = {line.limit.window: line.period.label for line in plan.lines}
        assert found[day] == labels[day]


async def test_what_openai_would_refuse_is_refused_here_where_asked() -> None:
    strict = Model("gpt-image-2", Target("openai", "gpt-image-2"), strict=True)
    bench = Bench(models=(strict, FLARE))
    odd = {"prompt": "cat", "quality": "ultra"}
    await bench.refused(InvalidRequest, a_call("gpt-image-2", parameters=odd))
    await bench.plan(a_call("flare", parameters=odd))


async def test_what_is_judged_is_what_is_sent() -> None:
    """What is mended here would have been refused as it came."""
    strict = Model("gpt-image-2", Target("openai", "gpt-image-2"), strict=True)
    bench = Bench(models=(strict,))
    call = a_call("gpt-image-2", size="5x5", parameters={"prompt": "cat", "size": "5x5"})
    plan = await bench.plan(call)
    assert changed_of(plan)["size"] == "1024x1024"
    assert bench.price.asked == [plan.call]
    with pytest.raises(InvalidRequest):
        bench.planner.route_call(caller(), call, NOW)


# A cheaper way


@pytest.mark.parametrize(
    ("size", "quality", "cents", "words", "bound"),
    [
        ("1024x1024", "high", {"high": 20, "low": 1}, "quality=low", 1),
        ("1024x1024", "high", {"high": 20, "low": 10, "medium": 15}, "quality=low", 10),
        ("1024x1024", "high", {"high": 20, "low": 11, "medium": 10}, "quality=medium", 10),
        ("1024x1024", "high", {"high": 20, "low": 11, "medium": 15}, None, 0),
        ("1024x1024", "high", {"high": 20, "low": 0, "medium": 5}, "quality=medium", 5),
        ("1024x1024", "auto", {"auto": 70, "low": 1}, "quality=low", 1),
        ("auto", "auto", {"auto auto": 71, "low": 1}, "1024x1024, quality=low", 1),
        ("auto", "high", {"auto high": 71, "low": 70}, None, 0),
        ("1024x1024", "low", {"low": 20, "medium": 1}, None, 0),
        ("auto", "low", {"auto low": 20, "low": 1}, None, 0),
        ("1024x1024", "medium", {"medium": 20, "low": 1}, "quality=low", 1),
        ("1024x1024", "medium", {"medium": 20, "low": 19}, None, 0),
    ],
)
async def test_the_first_way_that_saves_by_half(
    size: str, quality: str, cents: Mapping[str, int], words: str | None, bound: int
) -> None:
    plan = await Bench(price=ByQuality(cents)).plan(a_call(size=size, quality=quality))
    assert cheaper(plan.call, plan.quote) == (None if words is None else (words, bound * CENT))


async def test_a_way_that_has_no_price_is_no_way() -> None:
    price = ByQuality({"high": 20, "medium": 5}, refuses="low")
    plan = await Bench(price=price).plan(a_call())
    assert cheaper(plan.call, plan.quote) == ("quality=medium", 5 * CENT)


async def test_nothing_is_cheaper_than_what_has_no_price() -> None:
    plan = await Bench().plan(a_call("dear"))
    assert cheaper(plan.call, plan.quote) is None


# What a client leaves open

PIN = Pin("1024x1024", "medium")


def changed_of(plan: Plan) -> dict[str, Json]:
    return {change.name: change.after for change in plan.call.changed}


PINNED = replace(FLARE, pin=PIN)
BY_PIN = ByQuality({"high": 20, "medium": 5, "low": 1, "auto": 70})


@pytest.mark.parametrize(
    ("asked", "changed", "cents"),
    [
        ({"size": "auto", "quality": "auto"}, {"size": "1024x1024", "quality": "medium"}, 5),
        ({"size": "", "quality": "high"}, {"size": "1024x1024"}, 20),
        ({"size": "512x512", "quality": "auto"}, {"quality": "medium"}, 5),
        ({"size": "512x512", "quality": "ultra"}, {}, 100),
    ],
)
async def test_what_is_left_open_is_pinned_and_nothing_else(
    asked: dict[str, str], changed: dict[str, str], cents: int
) -> None:
    bench = Bench(models=(PINNED,), price=replace(BY_PIN, asked=[]))
    call = a_call(**asked, parameters={"prompt": "cat", **asked})
    plan = await bench.plan(call)
    assert changed_of(plan) == changed
    assert plan.quote.bound == Bound(cents * CENT, HARD)
    assert bench.price.asked == [plan.call]
    effective = {**asked, **changed}
    assert (plan.call.size, plan.call.quality) == (effective["size"], effective["quality"])
    assert plan.call.parameters == {"prompt": "cat", **effective}
    # The answer is that of a call which says so itself.
    said = await bench.plan(a_call(**effective, parameters={"prompt": "cat", **effective}))
    assert (changed_of(said), said.fingerprint) == ({}, plan.fingerprint)


async def test_without_a_pin_what_is_left_open_stays_open() -> None:
    call = a_call(size="auto", quality="auto")
    plan = await Bench().plan(call)
    assert (plan.call, changed_of(plan), plan.quote.bound.amount) == (call, {}, 70 * CENT)


async def test_a_hit_says_what_was_pinned() -> None:
    bench = Bench(cache=OneAnswer(kept()), models=(PINNED,))
    plan = await bench.plan(a_call(size="auto"))
    assert (plan.cache, changed_of(plan)) == (CacheResult.HIT, {"size": "1024x1024"})


async def test_an_unknown_parameter_is_refused_where_the_operator_says_so() -> None:
    bench = Bench(models=(replace(FLARE, refuse_unknown=True), LOCAL), cache=OneAnswer(kept()))
    turbo = frozenset({"turbo", "zoom"})
    error = await bench.refused(InvalidRequest, a_call(unknown=turbo))
    assert (error.status, error.code, error.param) == (400, "unknown_parameter", "turbo")
    assert error.message == (
        "Unknown parameter: 'turbo'. flare takes only what this gateway knows the price of. "
        "Remove it."
    )
    assert bench.cache.asked == []
    await bench.plan(a_call())
    await bench.plan(a_call("local", unknown=turbo))


# Factors


def of_flare(upstream: str, model: str) -> int:
    assert upstream == "openai"
    return 1_500_000 if model == "flare" else 1_000_000


async def test_a_model_that_cost_more_is_held_higher() -> None:
    bench = Bench(factor_of=of_flare, models=(FLARE, ART, SECOND))
    plan = await bench.plan(a_call("team-art"))
    assert plan.quote.bound == Bound(30 * CENT, SOFT)
    assert (plan.quote.base, plan.quote.factor) == (20 * CENT, 1_500_000)
    assert plan.demand.money == 30 * CENT
    other = await bench.plan(a_call("gpt-image-2"))
    assert (other.quote.bound, other.quote.base) == (Bound(20 * CENT, HARD), 20 * CENT)


async def test_the_most_a_request_may_cost_counts_the_factor() -> None:
    who = caller(Limits(max_cost_per_request=25 * CENT))
    await Bench().plan(a_call(), who)
    error = await Bench(factor_of=of_flare).refused(InvalidRequest, a_call(), who)
    assert error.code == "max_cost_exceeded"
    assert "could cost up to $0.30" in error.message


async def test_what_would_be_cheaper_counts_the_factor_too() -> None:
    plan = await Bench(factor_of=of_flare).plan(a_call())
    assert cheaper(plan.call, plan.quote) == ("quality=low", 15_000_000)


# Several ways


def places(*targets: Target, **more: Any) -> Model:
    first, *others = targets
    return Model("flare", first, label="flare", others=tuple(others), **more)


def ways_of(plan: Plan) -> list[str]:
    return [f"{way.model.name}: {way.upstream.name}/{way.target.model}" for way in plan.ways]


async def test_ways_go_by_order() -> None:
    model = places(Target("openai", "flare", 2), Target("home", "sd", 3), Target("home", "x", 1))
    plan = await Bench(models=(replace(model, unpriced=Unpriced.ALLOW),)).plan(a_call())
    assert ways_of(plan) == ["flare: home/x", "flare: openai/flare", "flare: home/sd"]
    assert (plan.asked, plan.model, plan.target) == (
        plan.ways[0].model,
        plan.asked,
        model.others[1],
    )
    assert plan.keep


async def test_the_name_in_the_cache_does_not_depend_on_the_draw() -> None:
    model = places(Target("openai", "flare", 1), Target("home", "sd", 1))
    plans = [
        await Bench(models=(model,), chooser=random.Random(seed)).plan(a_call())
        for seed in range(20)
    ]
    assert {plan.upstream.name for plan in plans} == {"openai", "home"}
    assert len({plan.fingerprint for plan in plans}) == 1
    alone = await Bench(models=(FLARE,)).plan(a_call())
    assert plans[0].fingerprint == alone.fingerprint


def test_a_draw_goes_by_weight() -> None:
    chooser = random.Random(7)
    firsts = Counter(next(iter(drawn([1, 3, 6], chooser))) for _ in range(10_000))
    assert [round(firsts[place] / 1000) for place in range(3)] == [1, 3, 6]
    assert sorted(drawn([1, 3, 6], chooser)) == [0, 1, 2]
    assert list(drawn([], chooser)) == []


async def test_what_cannot_be_asked_now_comes_last() -> None:
    model = places(Target("openai", "flare", 1), Target("home", "sd", 2), fallbacks=("local",))
    bench = Bench(models=(model, LOCAL), usable=lambda upstream, name: upstream.name == "home")
    plan = await bench.plan(a_call())
    assert ways_of(plan) == ["flare: home/sd", "flare: openai/flare", "local: home/sd"]


async def test_a_call_may_enter_at_each_way_of_its_model_that_does_not_rest() -> None:
    model = places(
        *(Target("openai", "flare", 1), Target("home", "sd", 2), Target("home", "x", 3)),
        fallbacks=("local",),
        unpriced=Unpriced.ALLOW,
    )
    plan = await Bench(models=(model, LOCAL)).plan(a_call())
    assert plan.entrances == ("openai", "home")
    assert plan.entered_at("openai") is plan
    moved = plan.entered_at("home")
    assert ways_of(moved) == [
        "flare: home/sd", "flare: openai/flare", "flare: home/x", "local: home/sd",
    ]  # fmt: skip
    assert moved.demand == replace(plan.demand, money=moved.quote.bound.amount)
    assert moved.quote != plan.quote
    awake = Bench(models=(model, LOCAL), usable=lambda upstream, name: upstream.name == "openai")
    assert (await awake.plan(a_call())).entrances == ("openai",)
    nobody = Bench(models=(model, LOCAL), usable=lambda upstream, name: False)
    assert (await nobody.plan(a_call())).entrances == ("openai",)


async def test_a_way_that_is_off_unpriced_or_too_dear_is_left_out() -> None:
    model = places(Target("openai", "flare", 1), Target("home", "sd", 2), Target("home", "x", 3))
    assert ways_of(await Bench(models=(model,), ready=False).plan(a_call())) == ["flare: home/sd"]
    dear = Bench(models=(model,), factor_of=lambda name, model: 9 * 10**6 if name == "home" else 1)
    who = caller(Limits(max_cost_per_request=100 * CENT))
    assert ways_of(await dear.plan(a_call(), who)) == ["flare: openai/flare"]
    error = await dear.refused(InvalidRequest, a_call(), caller(Limits(max_cost_per_request=1)))
    assert error.code == "max_cost_exceeded"
    lost = places(Target("openai", "y", 1), Target("home", "x", 2), fallbacks=("local",))
    refused = await Bench(models=(lost, LOCAL)).refused(InvalidRequest, a_call())
    assert refused.code == "model_not_priced"
    off = places(Target("openai", "flare", 1))
    assert (await Bench(models=(off,), ready=False).refused(UpstreamAccount, a_call())).code == (
        "upstream_off"
    )


async def test_fallbacks_come_last_and_only_those_that_the_caller_may_use() -> None:
    model = replace(FLARE, fallbacks=("local", "gpt-image-2", "gone", "dear"))
    bench = Bench(models=(model, LOCAL, SECOND))
    every = ["flare: openai/flare", "local: home/sd", "gpt-image-2: openai/gpt-image-2"]
    assert ways_of(await bench.plan(a_call())) == every
    who = caller(models=frozenset({"flare", "gpt-image-2"}))
    assert ways_of(await bench.plan(a_call(), who)) == [every[0], every[2]]


async def test_a_fallback_judges_the_call_by_its_own_rules() -> None:
    model = replace(FLARE, fallbacks=("gpt-image-2", "local"))
    strict = replace(SECOND, strict=True)
    known = replace(LOCAL, refuse_unknown=True)
    call = a_call(size="512x512", unknown=frozenset({"turbo"}))
    plan = await Bench(models=(model, strict, known)).plan(call)
    assert ways_of(plan) == ["flare: openai/flare"]


async def test_a_model_that_is_off_is_stood_in_for() -> None:
    model = replace(FLARE, fallbacks=("local",))
    plan = await Bench(models=(model, LOCAL), ready=False).plan(a_call())
    assert (ways_of(plan), plan.asked.name) == (["local: home/sd"], "flare")


async def test_an_address_of_a_picture_goes_only_where_it_may() -> None:
    model = places(
        Target("openai", "flare", 1), Target("home", "sd", 2), fallbacks=("gpt-image-2",)
    )
    bench = Bench(models=(model, SECOND), passing_urls=frozenset({"home"}))
    plan = await bench.plan(replace(a_call(), operation=Operation.EDIT, inputs=(LINKED,)))
    assert ways_of(plan) == ["flare: home/sd"]


async def test_the_price_in_the_list_of_models_is_that_of_any_upstream() -> None:
    planner = Bench().planner
    model = places(Target("openai", "unheard-of", 1), Target("home", "sd", 2))
    row = planner.row(model, NOW)
    assert row is not None
    assert row.model == "sd"
    assert planner.row(DEAR, NOW) is None
