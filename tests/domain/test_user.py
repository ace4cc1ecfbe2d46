"""Who the end user of a call is: a table of who says what, and a hash that says nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.call import Json
from gateway.domain.quota import Limit, Scope, Unit, Window
from gateway.domain.team import Caller, Key, Limits, PerUser, Team
from gateway.domain.user import USER_HEADERS, UserSource, said_user, user_id

SAFETY, USER, ID, EMAIL = UserSource
ALL = tuple(UserSource)


@pytest.mark.parametrize(
    ("sources", "parameters", "hints", "said"),
    [
        (ALL, {}, {}, ""),
        (ALL, {"safety_identifier": "s", "user": "u"}, {ID: "i", EMAIL: "e"}, "s"),
        (ALL, {"user": "u"}, {ID: "i", EMAIL: "e"}, "u"),
        (ALL, {}, {ID: "i", EMAIL: "e"}, "i"),
        (ALL, {}, {EMAIL: "e"}, "e"),
        ((EMAIL, SAFETY), {"safety_identifier": "s", "user": "u"}, {ID: "i", EMAIL: "e"}, "e"),
        ((ID,), {"safety_identifier": "s", "user": "u"}, {EMAIL: "e"}, ""),
        ((), {"safety_identifier": "s"}, {ID: "i"}, ""),
        # What says nothing leaves the word to the next one.
        (ALL, {"safety_identifier": " \t", "user": "u"}, {}, "u"),
        (ALL, {"safety_identifier": 7, "user": ["u"]}, {ID: ""}, ""),
        (ALL, {"safety_identifier": None, "user": " u "}, {}, "u"),
        # A field of the body that is called as a header is none, and the other way round.
        (ALL, {ID.value: "i"}, {"user": "u"}, ""),
    ],
)
def test_who_says_it(
    sources: tuple[UserSource, ...],
    parameters: Mapping[str, Json],
    hints: Mapping[str, str],
    said: str,
) -> None:
    assert said_user(sources, parameters, hints) == said


def test_headers_are_named_as_they_arrive() -> None:
    assert all(name == name.lower() for name in USER_HEADERS)


@given(said=st.text(min_size=1), team=st.text("abc", min_size=1))
def test_the_hash_says_nothing(said: str, team: str) -> None:
    """Whatever JSON can say, half surrogates too."""
    found = user_id(b"k" * 32, team, said)
    assert re.fullmatch("u_[0-9a-f]{20}", found)
    assert found == user_id(b"k" * 32, team, said)
    assert len({found, user_id(b"o" * 32, team, said), user_id(b"k" * 32, f"{team}x", said)}) == 3


def test_half_a_surrogate_pair_is_a_user_too() -> None:
    assert user_id(b"k", "growth", "\ud800") != user_id(b"k", "growth", "\ud801")


def caller(per_user: PerUser, user: str = "u_1") -> Caller:
    return Caller(Team("growth", per_user=per_user), Key("k1", "growth"), user)


def test_limits_of_a_user_are_accounts_of_the_user_in_the_team() -> None:
    one = caller(PerUser(Limits(6, 10, 2, budget_day=5)))
    nobody = Caller(one.team, one.key)
    assert one.limits == (
        Limit(Scope.USER, "growth/u_1", Unit.REQUESTS, Window.MINUTE, 6),
        Limit(Scope.USER, "growth/u_1", Unit.IMAGES, Window.MINUTE, 10),
        Limit(Scope.USER, "growth/u_1", Unit.SLOTS, Window.NOW, 2),
        # Of money only what has an amount: the books do not grow with every user.
        Limit(Scope.USER, "growth/u_1", Unit.MONEY, Window.DAY, 5),
        *nobody.limits,
    )
    assert {limit.scope for limit in nobody.limits} == {Scope.TEAM, Scope.KEY}
    assert (one.has_budget, nobody.has_budget) == (True, False)


def test_without_limits_a_user_has_no_accounts() -> None:
    one = caller(PerUser())
    assert one.limits == Caller(one.team, one.key).limits


def test_a_user_that_is_not_recorded_is_limited_all_the_same() -> None:
    one = caller(PerUser(Limits(6)))
    hidden = Caller(one.team, one.key, one.user, records_user=False)
    assert (one.recorded_user, hidden.recorded_user) == ("u_1", "")
    assert hidden.limits == one.limits
