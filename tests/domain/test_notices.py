"""Which marks an account has passed."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.ledger import Balance
from gateway.domain.notices import Kind, Mark, marks
from gateway.domain.quota import Limit, Scope, Unit, Window
from gateway.domain.team import Limits, money_lines

DOLLAR = 1_000_000_000


def passed(
    posted: int, hard: int | None = None, soft: int | None = None, percent: int = 80
) -> list[str]:
    limit = Limit(Scope.TEAM, "growth", Unit.MONEY, Window.DAY, hard, soft)
    return [mark.name for mark in marks(limit, Balance(posted, pending=10**18), percent)]


@pytest.mark.parametrize(
    ("posted", "hard", "soft", "names"),
    [
        (79, 100, None, []),
        (80, 100, None, ["budget:80"]),
        (99, 100, None, ["budget:80"]),
        (100, 100, None, ["budget:80", "budget:100"]),
        (250, 100, None, ["budget:80", "budget:100"]),
        (79, None, 100, []),
        (80, None, 100, ["soft_budget:80"]),
        (100, None, 100, ["soft_budget:80", "soft_budget:100"]),
        (100, 120, 100, ["budget:80", "soft_budget:80", "soft_budget:100"]),
        (10**15, None, None, []),
        # 80 % of 7 is 5.6: not before the sixth.
        (5, 7, None, []),
        (6, 7, None, ["budget:80"]),
        # Nothing is passed by nothing, and everything by something.
        (0, 0, 0, []),
        (1, 0, None, ["budget:80", "budget:100"]),
    ],
)
def test_marks(posted: int, hard: int | None, soft: int | None, names: list[str]) -> None:
    assert passed(posted, hard, soft) == names


def test_a_warning_at_all_of_it_is_no_warning() -> None:
    assert passed(99, 100, percent=100) == []
    assert passed(100, 100, percent=100) == ["budget:100"]
    assert passed(1, 100, percent=1) == ["budget:1"]


def test_what_running_calls_hold_passes_nothing() -> None:
    limit = Limit(Scope.TEAM, "growth", Unit.MONEY, Window.DAY, 100)
    assert marks(limit, Balance(posted=79, pending=1000), 80) == ()


@pytest.mark.parametrize(
    ("posted", "refused", "names"),
    [
        (95, 5, ["budget:80"]),
        (95, 6, ["budget:80", "budget:100"]),
        (80, 21, ["budget:80", "budget:100"]),
        # Far from used up: only that call was too dear.
        (79, 90, []),
        (0, 200, []),
    ],
)
def test_a_budget_is_used_up_when_a_call_was_refused_behind_the_warning(
    posted: int, refused: int, names: list[str]
) -> None:
    hard = Limit(Scope.TEAM, "growth", Unit.MONEY, Window.DAY, 100)
    assert [mark.name for mark in marks(hard, Balance(posted), 80, refused)] == names
    soft = Limit(Scope.TEAM, "growth", Unit.MONEY, Window.DAY, None, 100)
    assert "soft_budget:100" not in [one.name for one in marks(soft, Balance(posted), 80, refused)]


@given(st.integers(0, 2**63 - 1), st.none() | st.integers(1, 2**63 - 1), st.integers(1, 99))
def test_more_spent_never_passes_less(posted: int, amount: int | None, percent: int) -> None:
    names = passed(posted, amount, amount, percent)
    assert set(names) <= set(passed(posted + 1, amount, amount, percent))
    assert ("budget:100" in names) == (amount is not None and posted >= amount)
    assert len(set(names)) == len(names)


def test_what_a_mark_is_called() -> None:
    warning, whole = Mark(Kind.SOFT, 80, DOLLAR * 101 // 2), Mark(Kind.HARD, 100, DOLLAR)
    assert (warning.name, whole.name) == ("soft_budget:80", "budget:100")
    assert (warning.claim, whole.claim) == ("soft_budget:80/50.5", "budget:100/1")
    assert (warning.event, whole.event) == ("soft_budget.warning", "budget.reached")
    assert Mark(Kind.HARD, 80, DOLLAR).event == "budget.warning"
    assert Mark(Kind.SOFT, 100, DOLLAR).event == "soft_budget.reached"


def test_the_accounts_of_money_are_in_the_periods_of_their_zone() -> None:
    limits = Limits(requests_per_minute=5, budget_day=1, soft_budget_total=2)
    instant = datetime(2026, 11, 30, 12, tzinfo=UTC)
    lines = money_lines(limits.of(Scope.TEAM, "growth"), instant, ZoneInfo("Pacific/Kiritimati"))
    assert {line.account: (line.limit.amount, line.limit.soft) for line in lines} == {
        "team:growth|d|2026-12-01": (1, None),
        "team:growth|w|2026-W49": (None, None),
        "team:growth|m|2026-12": (None, None),
        "team:growth|t|all": (None, 2),
    }
