"""Tests are worth their time only if they notice: bugs are planted one by one, and each is killed.

A bug is a small substitution in the source of one function or one statement of SQL, in place while
the model, or a test of the contract where chance would take long, runs against SQLite
(reliability.md T2).
"""

from __future__ import annotations
import __future__

import asyncio
import inspect
import textwrap
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType, ModuleType
from typing import TypeAlias

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from gateway.domain import transition as arithmetic
from gateway.domain.ledger import State
from gateway.domain.transition import ignore_conflict
from gateway.ports import Store
from gateway.stores import sqlite_books, sqlite_ledger, sqlite_upkeep
from gateway.stores.page import HeldRow, Page
from tests.contract import test_books, test_ledger, test_parts, test_upkeep
from tests.contract.machine import LedgerMachine
from tests.contract.stores import H, V, X, sqlite
from tests.sizes import size

Test: TypeAlias = Callable[[Store], Coroutine[object, object, None]]


@dataclass(frozen=True)
class Bug:
    """``name`` is the function or the constant of ``module``, a class of one too, in which ``old``
    becomes ``new``."""

    what: str
    module: ModuleType | type
    name: str
    old: str
    new: str
    test: Test | None = None
    """Who kills it; the model where it is None."""


def one_key_one_call(fingerprint: str) -> Test:
    return lambda store: test_ledger.test_an_idempotency_key_stands_for_one_call(
        store.ledger, V, fingerprint
    )


def taken_over(state: State) -> Test:
    return lambda store: test_ledger.test_a_key_is_taken_over_from_a_call_of_unknown_outcome(
        store, state, "f"
    )


def whose_key(store: Store) -> Coroutine[object, object, None]:
    return test_ledger.test_whose_a_key_is_can_be_asked(store.ledger, X, "f")


def key_for_a_day(store: Store) -> Coroutine[object, object, None]:
    return test_ledger.test_an_idempotency_key_lives_for_24_hours(store.ledger, False)


def oldest_leases_first(store: Store) -> Coroutine[object, object, None]:
    return test_ledger.test_a_sweep_expires_the_oldest_leases_first(store.ledger)


def resolved(store: Store) -> Coroutine[object, object, None]:
    return test_books.test_a_closed_call_is_corrected_up_and_down(store, X, 4)


BUGS = (
    Bug(
        "settling an expired call posts the whole cost",
        arithmetic, "transition", "posted=new_cost - cost", "posted=new_cost",
    ),
    Bug(
        "voiding an expired call gives nothing back",
        arithmetic, "transition", "posted=-cost", "posted=0",
    ),
    Bug(
        "an expiry leaves what was held",
        arithmetic, "transition",
        "Move(State.EXPIRED, bound, pending=-bound,", "Move(State.EXPIRED, bound, pending=0,",
    ),
    Bug(
        "a void leaves what was held",
        arithmetic, "transition",
        "Move(State.VOIDED, 0, pending=-bound)", "Move(State.VOIDED, 0)",
    ),
    Bug(
        "an expiry posts nothing: a lost lease is refunded",
        arithmetic, "transition",
        "Move(State.EXPIRED, bound, pending=-bound, posted=bound)",
        "Move(State.EXPIRED, 0, pending=-bound)",
    ),
    Bug(
        "settling twice posts twice",
        arithmetic, "transition",
        "case State.HELD, Event.SETTLE:", "case State.HELD | State.POSTED, Event.SETTLE:",
    ),
    Bug(
        "a void after the settlement counts",
        arithmetic, "transition",
        "case State.EXPIRED, Event.VOID:", "case State.EXPIRED | State.POSTED, Event.VOID:",
    ),
    Bug(
        "the alarm is raised for the same amount",
        arithmetic, "contradicts", "!= cost", "== cost",
    ),
    Bug(
        "an expired call counts its pictures",
        arithmetic, "counted",
        "Counts(requests=1, cost=cost,", "Counts(requests=1, images=1, cost=cost,",
    ),
    Bug(
        "a late truth leaves the call unresolved",
        arithmetic, "correction",
        "now.minus(counted(before, cost, settlement, flags))", "now",
    ),
    Bug(
        "a correction posts the whole cost",
        arithmetic, "corrected", "posted=new_cost - cost", "posted=new_cost",
    ),
    Bug(
        "a running call is corrected",
        arithmetic, "corrected", "state is State.HELD or (", "(",
    ),
    Bug(
        "a correction is counted twice",
        arithmetic, "correction_counts",
        "Counts(cost=correction.cost - cost,", "Counts(cost=2 * (correction.cost - cost),",
    ),
    Bug(
        "a resolved call stays unresolved in the usage",
        arithmetic, "correction_counts", "unresolved=-1, unresolved_cost=-cost", "",
        resolved,
    ),
    Bug(
        "a budget cannot be spent to its end",
        arithmetic, "no_room", "bound > amount", "bound >= amount",
    ),
    Bug(
        "what is held does not count against a budget",
        arithmetic, "no_room", ".used + bound", ".posted + bound",
    ),
    Bug(
        "only the first budget is looked at",
        arithmetic, "no_room", "in lines:", "in tuple(lines)[:1]:",
    ),
    Bug(
        "an idempotency key is not moved on",
        Page, "reserve", "if holder is not None:", "if holder == '':",
        one_key_one_call("f"),
    ),
    Bug(
        "an idempotency key lives for ever",
        Page, "_holder_of_key", "outlived or", "",
        key_for_a_day,
    ),
    Bug(
        "another request takes over the key of a voided call",
        arithmetic, "yields_key", "same_fingerprint and free", "free",
        one_key_one_call("other"),
    ),
    Bug(
        "a call of unknown outcome is repeated unasked",
        arithmetic, "yields_key", " and repeat_unknown", "",
        whose_key,
    ),
    Bug(
        "a running call is repeated",
        arithmetic, "yields_key", "state is State.EXPIRED and", "state is not State.POSTED and",
        taken_over(H),
    ),
    Bug(
        "a repeat of an unknown outcome is refused",
        Page, "_holder_of_key", ", claim.repeat_unknown", "",
        taken_over(X),
    ),
    Bug(
        "a reroute holds nothing more",
        Page, "reroute", "bump.pending, posted=0", "0, posted=0",
    ),
    Bug(
        "a reroute holds both bounds",
        arithmetic, "rerouted", "new_bound - bound", "new_bound",
    ),
    Bug(
        "a cheaper way gives back what was held",
        arithmetic, "rerouted", "max(bound, reroute.bound)", "reroute.bound",
    ),
    Bug(
        "a reroute is booked again when it is repeated",
        arithmetic, "rerouted", "(route, bound) != (reroute.route, new_bound)", "True",
    ),
    Bug(
        "only a raised bound makes another way",
        arithmetic, "rerouted",
        "(route, bound) != (reroute.route, new_bound)", "bound != new_bound",
    ),
    Bug(
        "a call that has ended is rerouted",
        arithmetic, "rerouted", "is not State.HELD", "is State.VOIDED",
    ),
    Bug(
        "a reroute passes a budget",
        arithmetic, "no_room_elsewhere", "no_room(lines, without, bump.bound)", "None",
    ),
    Bug(
        "a reroute has to fit beside itself",
        arithmetic, "no_room_elsewhere", ".pending - held", ".pending",
    ),
    Bug(
        "a reroute that need not grow is denied",
        arithmetic, "no_room_elsewhere", "not bump.pending", "not bump.applied",
    ),
    Bug(
        "a reroute asks the budgets of another day",
        arithmetic, "no_room_elsewhere",
        "for line in reroute.lines if line.account in accounts", "for line in reroute.lines",
        test_ledger.test_the_accounts_stay_those_that_were_reserved,
    ),
    Bug(
        "a rerouted call is counted for its first model",
        HeldRow, "go", "self.model, self.upstream", "_, self.upstream",
    ),
    Bug(
        "a rerouted call keeps its bound",
        HeldRow, "go", "self.bound = bound", "pass",
    ),
    Bug(
        "a raised bound is not in the journal",
        Page, "reroute", "REROUTED, bump.pending", "REROUTED, 0",
        test_ledger.test_a_sweep_expires_a_rerouted_call_at_its_raised_bound,
    ),
    Bug(
        "a sweep expires a lease at its end, not after it",
        sqlite_ledger, "_OVER", "lease_ends < :now", "lease_ends <= :now",
        oldest_leases_first,
    ),
    Bug(
        "a sweep expires calls of the living",
        sqlite_ledger, "_OVER", "beat_at < :silent_before", "beat_at <= :silent_before",
    ),
    Bug(
        "a sweep expires the newest first",
        sqlite_ledger, "_OVER", "ORDER BY lease_ends,", "ORDER BY lease_ends DESC,",
        oldest_leases_first,
    ),
    Bug(
        "a correction may be applied twice",
        sqlite_books, "_correct", "if exists(db, _APPLIED, correction.id):", "if not hold.rid:",
        test_books.test_a_correction_applies_once,
    ),
    Bug(
        "a correction leaves the flags",
        sqlite_books, "_correct", "flags = '[]'", "flags = flags",
        test_books.test_a_resolved_call_has_no_flags_and_keeps_what_was_seen,
    ),
    Bug(
        "an adjustment is not in the usage",
        sqlite_books, "_adjust", "Counts(cost=adjustment.amount)", "Counts()",
    ),
    Bug(
        "an adjustment replaces the balance",
        sqlite_books, "_adjust",
        "SET posted = posted + excluded.posted", "SET posted = excluded.posted",
    ),
    Bug(
        "expired calls are forgotten",
        sqlite_upkeep, "_FORGOTTEN", "IN ('P', 'V')", "IN ('P', 'V', 'X')",
    ),
    Bug(
        "the record of an idempotency key is forgotten",
        sqlite_upkeep, "_FORGOTTEN", "AND idempotency_key IS NULL", "",
        test_upkeep.test_the_record_of_an_idempotency_key_is_not_forgotten,
    ),
    Bug(
        "what is forgotten is not rolled up",
        sqlite_upkeep, "_ROLL_UP", "SELECT account, sum(cost)", "SELECT account, 0",
    ),
    Bug(
        "each forgetting replaces what was rolled up before",
        sqlite_upkeep, "_ROLL_UP",
        "SET posted = posted + excluded.posted", "SET posted = excluded.posted",
        test_upkeep.test_the_oldest_are_forgotten_first_in_batches,
    ),
    Bug(
        "what another model drew is not remembered",
        HeldRow, "end", "*part_row(self.drawn)", "*part_row(None)",
    ),
    Bug(
        "a correction leaves the part of another model as it is",
        sqlite_books, "_correct",
        "drawn = corrected_part(hold.drawn, hold.cost, move.cost)", "drawn = hold.drawn",
    ),
    Bug(
        "both models have the whole of what one of them drew",
        arithmetic, "by_model", "(model, gained.minus(its))", "(model, gained)",
    ),
    Bug(
        "where calls went forgets who drew",
        sqlite_books, "ROUTED", "drawn_model <> ''", "drawn_model = ''",
        test_parts.test_where_its_parts_went,
    ),
)  # fmt: skip


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The bug in place, wherever the function or the constant is used."""
    original = getattr(bug.module, bug.name)
    if isinstance(original, str):
        assert original.count(bug.old) == 1, bug.what
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bug.module, bug.name, original.replace(bug.old, bug.new))
            yield
        return
    assert isinstance(original, FunctionType)
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(bug.old) == 1, bug.what
    sound = original.__code__
    # The function stays the same object, so that whoever has imported it has the bug too.
    original.__code__ = compiled(bug, source.replace(bug.old, bug.new)).__code__
    try:
        yield
    finally:
        original.__code__ = sound


def compiled(bug: Bug, source: str) -> FunctionType:
    names: dict[str, object] = {}
    flags = __future__.annotations.compiler_flag
    code = compile(source, f"<{bug.what}>", "exec", flags=flags, dont_inherit=True)
    exec(code, dict(vars(bug.module)), names)
    function = names[bug.name]
    assert isinstance(function, FunctionType)
    return function


class SQLiteMachine(LedgerMachine):
    """The model against SQLite alone: memory shares the arithmetic, and would only cost time."""

    backends = {"sqlite": sqlite}  # noqa: RUF012 - a ClassVar of the base


def death(test: Test | None) -> str | None:
    """What a test, or the model, died of, in one line; None where it noticed nothing."""
    try:
        if test is None:
            run_state_machine_as_test(SQLiteMachine, settings=QUICKLY)
        else:
            asyncio.run(tried(test))
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - whatever it noticed
        return f"{type(error).__name__}: {error}".splitlines()[0][:40]
    return None


async def tried(test: Test) -> None:
    with TemporaryDirectory() as folder:
        store = sqlite(Path(folder), ignore_conflict)
        try:
            await test(store)
        finally:
            await store.aclose()


QUICKLY = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.timeout(300)
def test_every_planted_bug_is_killed(capsys: pytest.CaptureFixture[str]) -> None:
    deaths: dict[str, str | None] = {}
    # Chance takes long: a third of the bugs that only the model finds, except in a soak.
    model = [bug for bug in BUGS if bug.test is None][:: size(3, 1)]
    for bug in (bug for bug in BUGS if bug.test is not None or bug in model):
        with planted(bug):
            deaths[bug.what] = death(bug.test)
    table = [f"{what:<52} {died_of or 'SURVIVED'}" for what, died_of in deaths.items()]
    with capsys.disabled():
        print("\n" + "\n".join(table))
    assert [what for what, died_of in deaths.items() if died_of is None] == []


@pytest.mark.parametrize("test", dict.fromkeys(bug.test for bug in BUGS if bug.test))
def test_who_kills_lets_the_sound_ledger_live(test: Test) -> None:
    """The model against it is ``test_ledger.TestModel``."""
    assert death(test) is None
