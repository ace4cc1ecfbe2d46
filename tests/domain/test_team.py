"""Who may use what, and which accounts a call draws on."""

from __future__ import annotations

import pytest

from gateway.domain.quota import Limit, Scope, Unit, Window
from gateway.domain.team import Caller, Key, Limits, Team

ANY = frozenset({"*"})
ART = frozenset({"art"})
BOTH = frozenset({"art", "photo"})
NONE: frozenset[str] = frozenset()


def caller(team: Limits | None = None, key: Limits | None = None) -> Caller:
    return Caller(
        Team("growth", limits=team or Limits()), Key("k1", "growth", limits=key or Limits())
    )


@pytest.mark.parametrize(
    ("team", "key", "art", "photo"),
    [
        (ANY, None, True, True),
        (ANY, ANY, True, True),
        (ANY, ART, True, False),
        (ANY, NONE, False, False),
        (ART, None, True, False),
        (ART, ANY, True, False),
        (ART, ART, True, False),
        (ART, BOTH, True, False),
        (BOTH, ART, True, False),
        (BOTH, None, True, True),
        (ART, frozenset({"photo"}), False, False),
        (NONE, ANY, False, False),
        (NONE, None, False, False),
        (frozenset({"*", "art"}), None, True, True),
    ],
)
def test_a_model_is_allowed_by_the_team_and_by_the_key(
    team: frozenset[str], key: frozenset[str] | None, art: bool, photo: bool
) -> None:
    asking = Caller(Team("growth", models=team), Key("k1", "growth", models=key))
    assert (asking.may_use("art"), asking.may_use("photo")) == (art, photo)


def test_a_team_may_use_every_model_unless_told_otherwise() -> None:
    assert caller().may_use("whatever")


def test_limits_are_accounts_of_their_owner() -> None:
    every = Limits(60, 20, 10, budget_day=5, budget_month=50, max_cost_per_request=1)
    assert every.of(Scope.TEAM, "growth") == (
        Limit(Scope.TEAM, "growth", Unit.REQUESTS, Window.MINUTE, 60),
        Limit(Scope.TEAM, "growth", Unit.IMAGES, Window.MINUTE, 20),
        Limit(Scope.TEAM, "growth", Unit.SLOTS, Window.NOW, 10),
        Limit(Scope.TEAM, "growth", Unit.MONEY, Window.DAY, 5),
        Limit(Scope.TEAM, "growth", Unit.MONEY, Window.WEEK, None),
        Limit(Scope.TEAM, "growth", Unit.MONEY, Window.MONTH, 50),
        Limit(Scope.TEAM, "growth", Unit.MONEY, Window.TOTAL, None),
    )


def test_a_soft_budget_is_a_mark_on_the_same_account() -> None:
    soft = Limits(budget_month=50, soft_budget_month=40, soft_budget_total=900)
    assert soft.of(Scope.KEY, "k1") == (
        Limit(Scope.KEY, "k1", Unit.MONEY, Window.DAY, None),
        Limit(Scope.KEY, "k1", Unit.MONEY, Window.WEEK, None),
        Limit(Scope.KEY, "k1", Unit.MONEY, Window.MONTH, 50, 40),
        Limit(Scope.KEY, "k1", Unit.MONEY, Window.TOTAL, None, 900),
    )
    assert soft.has_budget
    assert not Limits(soft_budget_total=900).has_budget


def test_money_is_counted_without_a_limit_and_rates_are_not() -> None:
    assert Limits().of(Scope.KEY, "k1") == (
        Limit(Scope.KEY, "k1", Unit.MONEY, Window.DAY, None),
        Limit(Scope.KEY, "k1", Unit.MONEY, Window.WEEK, None),
        Limit(Scope.KEY, "k1", Unit.MONEY, Window.MONTH, None),
        Limit(Scope.KEY, "k1", Unit.MONEY, Window.TOTAL, None),
    )


@pytest.mark.parametrize(
    "limits", [Limits(requests_per_minute=0), Limits(budget_day=0), Limits(concurrent_requests=0)]
)
def test_zero_is_a_limit(limits: Limits) -> None:
    assert 0 in [limit.amount for limit in limits.of(Scope.TEAM, "growth")]


def test_a_call_draws_on_the_keys_accounts_and_then_on_the_teams() -> None:
    asking = caller(Limits(requests_per_minute=60), Limits(images_per_minute=5, budget_day=1))
    assert [(limit.scope, limit.owner, limit.unit, limit.amount) for limit in asking.limits] == [
        (Scope.KEY, "k1", Unit.IMAGES, 5),
        (Scope.KEY, "k1", Unit.MONEY, 1),
        *[(Scope.KEY, "k1", Unit.MONEY, None)] * 3,
        (Scope.TEAM, "growth", Unit.REQUESTS, 60),
        *[(Scope.TEAM, "growth", Unit.MONEY, None)] * 4,
    ]


@pytest.mark.parametrize(
    ("team", "key", "most"), [(None, None, None), (5, None, 5), (None, 3, 3), (5, 3, 3), (5, 0, 0)]
)
def test_the_smaller_cap_on_a_request_counts(
    team: int | None, key: int | None, most: int | None
) -> None:
    asking = caller(Limits(max_cost_per_request=team), Limits(max_cost_per_request=key))
    assert asking.max_cost_per_request == most


@pytest.mark.parametrize(
    ("team", "key", "hard"),
    [
        (Limits(), Limits(), False),
        (Limits(budget_day=0), Limits(), True),
        (Limits(budget_month=9), Limits(), True),
        (Limits(), Limits(budget_day=1), True),
        (Limits(), Limits(budget_month=1), True),
        (Limits(max_cost_per_request=1, requests_per_minute=1), Limits(), False),
    ],
)
def test_a_budget_of_either_is_a_budget(team: Limits, key: Limits, hard: bool) -> None:
    assert caller(team, key).has_budget is hard
