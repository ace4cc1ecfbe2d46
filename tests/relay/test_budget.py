"""What is left, remembered for a second, and never in the way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from gateway.domain.errors import LedgerUnavailable
from gateway.domain.ledger import Balance, Line
from gateway.domain.quota import Limit, Scope, Unit, Window, period
from gateway.domain.transition import ignore_conflict
from gateway.relay import budget
from gateway.relay.budget import BudgetView
from gateway.stores.memory_ledger import MemoryLedger
from gateway.stores.memory_rows import MemoryRows
from tests.clock import StillClock


class Asked(MemoryLedger):
    """A ledger that counts who asks, waits where it is told to, and may be away."""

    def __init__(self) -> None:
        super().__init__(MemoryRows(), ignore_conflict)
        self.times = 0
        self.posted = 0
        self.asked = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()
        self.error: Exception | None = None

    async def balances(self, lines: Sequence[Line]) -> list[Balance]:
        self.times += 1
        self.asked.set()
        await self.open.wait()
        if self.error is not None:
            raise self.error
        return [Balance(self.posted) for _ in lines]


CLOCK = StillClock()


def line(owner: str = "growth", amount: int | None = 10, window: Window = Window.DAY) -> Line:
    limit = Limit(Scope.TEAM, owner, Unit.MONEY, window, amount)
    return Line(limit, period(window, CLOCK.now()))


LINES = (line(), line(window=Window.MONTH))


@pytest.fixture
def clock() -> StillClock:
    return StillClock()


@pytest.fixture
def ledger() -> Asked:
    return Asked()


@pytest.fixture
def view(ledger: Asked, clock: StillClock) -> BudgetView:
    return BudgetView(ledger, clock)


async def test_it_asks_once_a_second(view: BudgetView, ledger: Asked, clock: StillClock) -> None:
    for _ in range(10):
        assert await view.balances(LINES) == (list(LINES), [Balance(), Balance()])
    ledger.posted = 7
    clock.advance(0.99)
    assert (await view.balances(LINES))[1] == [Balance(), Balance()]
    assert ledger.times == 1
    clock.advance(0.02)
    assert (await view.balances(LINES))[1] == [Balance(7), Balance(7)]
    assert ledger.times == 2


async def test_many_at_once_ask_once(view: BudgetView, ledger: Asked) -> None:
    ledger.open.clear()
    asking = [asyncio.create_task(view.balances(LINES)) for _ in range(20)]
    await ledger.asked.wait()
    await asyncio.sleep(0)
    # One that goes takes nothing from the others.
    asking.pop(0).cancel()
    ledger.open.set()
    assert await asyncio.gather(*asking) == [(list(LINES), [Balance(), Balance()])] * 19
    assert ledger.times == 1


async def test_where_nothing_is_limited_nothing_is_asked(view: BudgetView, ledger: Asked) -> None:
    assert await view.balances([line(amount=None)]) == ([], [])
    assert ledger.times == 0
    limited = line()
    assert await view.balances([line(amount=None, window=Window.WEEK), limited]) == (
        [limited],
        [Balance()],
    )


async def test_what_is_learned_is_not_asked_for(
    view: BudgetView, ledger: Asked, clock: StillClock
) -> None:
    view.learn(LINES, (Balance(1), Balance(2)))
    assert (await view.balances(LINES))[1] == [Balance(1), Balance(2)]
    assert ledger.times == 0
    # Of another account nothing was learned, so all are asked for.
    both = (*LINES, line("design"))
    assert (await view.balances(both))[1] == [Balance(), Balance(), Balance()]
    assert ledger.times == 1


@pytest.mark.parametrize("error", [LedgerUnavailable("Away."), RuntimeError("a fault")], ids=repr)
async def test_a_ledger_that_is_away_is_left_alone_for_a_second(
    view: BudgetView, ledger: Asked, clock: StillClock, error: Exception
) -> None:
    ledger.error = error
    assert await view.balances(LINES) == ((), ())
    assert await view.balances((line("design"),)) == ((), ())
    assert ledger.times == 1
    ledger.error = None
    clock.advance(1.01)
    assert (await view.balances(LINES))[1] == [Balance(), Balance()]


async def test_a_slow_ledger_is_not_waited_for(
    view: BudgetView, ledger: Asked, clock: StillClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "PATIENCE_SECONDS", 0.01)
    ledger.open.clear()
    assert await view.balances(LINES) == ((), ())
    assert await view.balances(LINES) == ((), ())
    assert ledger.times == 1
    ledger.open.set()
    clock.advance(1.01)
    # What was asked then is an answer to this too.
    assert (await view.balances(LINES))[1] == [Balance(), Balance()]


async def test_it_does_not_grow_for_ever(
    view: BudgetView, ledger: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "MAX_REMEMBERED", 3)
    for owner in "abcde":
        view.learn([line(owner)], [Balance(1)])
    assert (await view.balances([line("e")]))[1] == [Balance(1)]
    assert ledger.times == 0
    assert (await view.balances([line("a")]))[1] == [Balance()]
    assert ledger.times == 1
