"""The judge of the storm is judged: every kind of damage is planted once, and must be found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest

from tests.torture.verdict import Hold, Ledger, Notes, Verdict, judge

ACCOUNT = "team:a|t|all"


def books() -> tuple[Ledger, Notes, list[tuple[str, int]], dict[str, int]]:
    """Two calls: one posted and heard of, one expired; a budget that has room for both."""
    holds = [
        Hold("r1", "P", 10, 7, (ACCOUNT,), (), "one"),
        Hold("r2", "X", 10, 10, (ACCOUNT,), (), "two"),
        Hold("r3", "V", 10, 0, (ACCOUNT,), (), None),
    ]
    journal = [
        ("r1", "H", 10, 0), ("r2", "H", 10, 0), ("r3", "H", 10, 0),
        ("r1", "P", -10, 7), ("r2", "X", -10, 10), ("r3", "V", -10, 0),
    ]  # fmt: skip
    notes = Notes(charged={"one": 7})
    ledger = Ledger(holds, {ACCOUNT: (17, 0)}, 17, journal)
    return ledger, notes, [("one", 7), ("two", 7)], {ACCOUNT: 20}


def test_a_call_may_go_elsewhere() -> None:
    ledger, notes, bill, budgets = books()
    ways = [("r1", "B", 0, 0), ("r3", "B", 4, 0), ("r3", "B", 1, 0)]
    ends = [("r1", "P", -10, 7), ("r2", "X", -10, 10), ("r3", "V", -15, 0)]
    rerouted = replace(ledger, journal=[*ledger.journal[:3], *ways, *ends])
    assert judge(rerouted, notes, bill, budgets).clean
    too_late = replace(ledger, journal=[*ledger.journal, ("r1", "B", 0, 0)])
    assert judge(too_late, notes, bill, budgets).sums_wrong == 1


def test_right_books_are_clean() -> None:
    verdict = judge(*books())
    assert verdict.clean
    counts = [getattr(verdict, each.name) for each in fields(Verdict) if each.name != "details"]
    assert counts == [0] * len(counts)


Damage = Callable[[Ledger, Notes, list[tuple[str, int]], dict[str, int]], Ledger]


def a_charge_is_gone(
    ledger: Ledger, notes: Notes, bill: list[tuple[str, int]], _: object
) -> Ledger:
    notes.charged["three"] = 7
    return ledger


def a_charge_has_another_amount(ledger: Ledger, notes: Notes, *_: object) -> Ledger:
    notes.charged["one"] = 8
    return ledger


def it_was_bought_twice(
    ledger: Ledger, _: Notes, bill: list[tuple[str, int]], __: object
) -> Ledger:
    bill.append(("two", 1))
    return ledger


def it_was_booked_twice(ledger: Ledger, *_: object) -> Ledger:
    return replace(ledger, holds=[*ledger.holds, Hold("r4", "P", 0, 0, (), (), "one")])


def a_budget_was_passed(ledger: Ledger, _: Notes, __: object, budgets: dict[str, int]) -> Ledger:
    budgets[ACCOUNT] = 16
    return ledger


def a_balance_drifted(ledger: Ledger, *_: object) -> Ledger:
    return replace(ledger, balances={ACCOUNT: (16, 0)})


def a_pending_amount_leaked(ledger: Ledger, *_: object) -> Ledger:
    return replace(ledger, balances={ACCOUNT: (17, 10)})


def the_days_have_less(ledger: Ledger, *_: object) -> Ledger:
    return replace(ledger, daily_cost=16)


def the_journal_settled_twice(ledger: Ledger, *_: object) -> Ledger:
    return replace(ledger, journal=[*ledger.journal, ("r1", "P", 0, 0)])


def the_bill_is_higher(ledger: Ledger, _: Notes, bill: list[tuple[str, int]], __: object) -> Ledger:
    bill[1] = ("two", 11)
    return ledger


def it_was_bought_and_never_booked(
    ledger: Ledger, _: Notes, bill: list[tuple[str, int]], __: object
) -> Ledger:
    bill.append(("four", 1))
    return ledger


def a_hold_never_ended(ledger: Ledger, *_: object) -> Ledger:
    held = Hold("r5", "H", 5, 0, (ACCOUNT,), (), "five")
    return replace(
        ledger,
        holds=[*ledger.holds, held],
        journal=[*ledger.journal, ("r5", "H", 5, 0)],
        balances={ACCOUNT: (17, 5)},
    )


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (a_charge_is_gone, "lost"),
        (a_charge_has_another_amount, "lost"),
        (it_was_bought_twice, "doubled"),
        (it_was_booked_twice, "doubled"),
        (a_budget_was_passed, "over_budget_nanousd"),
        (a_balance_drifted, "sums_wrong"),
        (a_pending_amount_leaked, "sums_wrong"),
        (the_days_have_less, "sums_wrong"),
        (the_journal_settled_twice, "sums_wrong"),
        (the_bill_is_higher, "under_billed"),
        (it_was_bought_and_never_booked, "under_billed"),
        (a_hold_never_ended, "stuck"),
    ],
)
def test_damage_is_found(damage: Damage, found: str) -> None:
    ledger, notes, bill, budgets = books()
    verdict = judge(damage(ledger, notes, bill, budgets), notes, bill, budgets)
    assert getattr(verdict, found) > 0
    assert not verdict.clean
