"""Budgets that are nearly or wholly used up: logged, counted and sent, each once.

Every process looks; of those that see the same mark, the one that claims it in the books tells it.
It looks at those whose accounts it has moved, and beside them at a part of all others, as large
however many there are: what others have changed, it finds in its round.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import TypeVar

from gateway.domain.errors import GatewayError, QuotaExceeded
from gateway.domain.ledger import Balance, Line
from gateway.domain.money import Money, format_dollars
from gateway.domain.notices import Mark, marks
from gateway.domain.quota import Scope, Unit, period
from gateway.domain.receipt import Delivery, Receipt
from gateway.domain.team import Key, Team
from gateway.ports import Clock, Ledger, Message, Notifier, Upkeep
from gateway.reports.owners import Name, Owner, Owners, Spenders, name_of, owners_of

log = logging.getLogger(__name__)

T = TypeVar("T")

LEASE_SECONDS = 90.0
"""How long who claimed a mark has for telling it: longer than all tries of one message, so that no
other process sends it meanwhile."""
OWNERS_AT_ONCE = 50
"""Who is read and looked at in one go: the event loop stands still for 1 or 2 ms."""
OTHERS_A_LOOK = 4_000
"""Of those who have spent nothing here: where there are no more, each look is at all of them."""
REST = 4.0
"""For how many times as long as it takes to look at some, others have the loop and the books."""
FOR_EVER = datetime.max.replace(tzinfo=UTC)

SAID = {
    "budget.warning": "a budget is nearly used up",
    "budget.reached": "a budget is used up",
    "soft_budget.warning": "a soft budget is nearly passed",
    "soft_budget.reached": "a soft budget is passed",
}


@dataclass(frozen=True, slots=True)
class _Passed:
    """A mark that an account has passed, and whose account it is."""

    team: Team
    key: Key | None
    line: Line
    balance: Balance
    mark: Mark

    def runs(self, now: datetime) -> bool:
        ends = self.line.period.ends
        return ends is None or now < ends

    @property
    def data(self) -> dict[str, object]:
        """What the message says. Dollars are exact decimal text."""
        ends = self.line.period.ends
        whose: dict[str, object] = {"team": self.team.id}
        if self.key is not None:
            whose |= {"key": self.key.id} | ({"key_name": self.key.name} if self.key.name else {})
        return whose | {
            "window": self.line.period.window.value,
            "period": self.line.period.label.partition("|")[2],
            "spent_usd": format_dollars(self.balance.posted),
            "reserved_usd": format_dollars(self.balance.pending),
            "limit_usd": format_dollars(self.mark.amount),
            "percent": self.mark.percent,
            "resets_at": None if ends is None else ends.isoformat(),
        }


class BudgetWatch:
    """Looks at the limited accounts of teams and keys, again and again."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        upkeep: Upkeep,
        owners: Owners,
        spenders: Spenders,
        clock: Clock,
        warn_percent: int,
        notifier: Notifier | None,
        message_id: Callable[[str], str],
        counted: Callable[[str, str], None],
    ) -> None:
        """``spenders`` hears of each hold that ends here. ``message_id`` makes an id of a name that
        is the same in every process of this gateway and in no other gateway. ``counted`` hears the
        team and the name of each mark."""
        self._ledger = ledger
        self._upkeep = upkeep
        self._owners = owners
        self._spenders = spenders
        self._clock = clock
        self._warn_percent = warn_percent
        self._notifier = notifier
        self._message_id = message_id
        self._counted = counted
        self._turn = asyncio.Lock()
        self._rests: dict[tuple[str, str], datetime] = {}
        """Until when a claim needs no question to the books: it is told, or somebody's."""
        self._passed_by: set[str] = set()
        """The accounts that had passed a mark when this round came to them."""
        self._refused: dict[Name, Money] = {}
        """The dearest call that was refused since the last look, by team and by key."""
        self._due: set[Name] = set()
        """Who is to be looked at again: a look broke off, or a message was not taken."""
        self._failed: set[tuple[str, str]] = set()
        """The claims whose message was not taken."""

    def finished(self, receipt: Receipt, delivery: Delivery) -> None:
        """Hears of calls that a budget refused. The port ``Telemetry``."""
        if receipt.code == QuotaExceeded.code and receipt.outcome is None:
            for owner in ((Scope.TEAM, receipt.team), (Scope.KEY, receipt.key_id)):
                self._refused[owner] = max(receipt.bound, self._refused.get(owner, 0))

    async def run(self, pause_seconds: float) -> None:
        """Looks for ever."""
        while True:
            try:
                await self.look()
            except GatewayError as error:
                log.warning("the budgets could not be looked at", extra={"error": str(error)})
            except Exception:
                # Whatever it is: a watch that stops for ever would never warn anybody again.
                log.exception("the watch over the budgets failed")
            await asyncio.sleep(pause_seconds)

    def replace(self, warn_percent: int, notifier: Notifier | None) -> None:
        """Who hears from the next look on, and when."""
        self._warn_percent = warn_percent
        self._notifier = notifier
        self._owners.begin_anew()

    async def looked(self) -> None:
        """Waits for the end of a look that is under way: whom it tells is still needed."""
        async with self._turn:
            pass

    async def flush(self) -> None:
        """A last look, if anybody outside hears of it. Raises ``LedgerUnavailable``."""
        if self._notifier is not None:
            await self.look(rest=0)

    async def look(self, rest: float = REST) -> None:
        """Tells what was passed and nobody has told, one look at a time. Raises
        ``LedgerUnavailable``."""
        async with self._turn:
            refused, self._refused = self._refused, {}
            again, self._due = self._due, set()
            spenders = self._spenders.take()
            try:
                due = again | set(refused)
                for some in _slices(list(spenders)):
                    due |= owners_of(chain.from_iterable(some))
                    await asyncio.sleep(0)
                await self._look(due, refused, rest)
            except BaseException:
                # Nobody is passed by because a look broke off.
                self._spenders.give_back(spenders)
                self._due |= again
                self._owners.begin_anew()
                for name, bound in refused.items():
                    self._refused[name] = max(bound, self._refused.get(name, 0))
                raise

    async def _look(self, due: Collection[Name], refused: dict[Name, Money], rest: float) -> None:
        passed, over = await self._passed(due, refused, rest)
        for one in passed:
            account, claim = one.line.account, one.mark.claim
            if await self._is_ours(one, claim):
                log.warning(
                    SAID[one.mark.event],
                    extra={name: value for name, value in one.data.items() if value is not None},
                )
                self._counted(one.team.id, one.mark.name)
                await self._told(account, claim)
        if self._notifier is not None:
            self._due |= await self._send(self._notifier, passed)
        self._passed_by.update(one.line.account for one in passed)
        if over:
            stands, self._passed_by = self._passed_by, set()
            self._rests = {key: until for key, until in self._rests.items() if key[0] in stands}
            self._failed = {key for key in self._failed if key[0] in stands}

    async def _send(self, notifier: Notifier, passed: Sequence[_Passed]) -> set[Name]:
        """Until the first that is not delivered: behind a receiver that is away all would wait.
        Returns who has to be looked at again for that."""
        waiting: set[Name] = set()
        for place, one in enumerate(passed):
            account, claim = one.line.account, f"{one.mark.claim} webhook"
            if await self._is_ours(one, claim):
                message = Message(
                    self._message_id(f"{account} {claim}"),
                    one.mark.event,
                    self._clock.now(),
                    one.data,
                )
                if not await notifier.tell(message):
                    self._failed.add((account, claim))
                    return waiting | {name_of((left.team, left.key)) for left in passed[place:]}
                await self._told(account, claim)
                self._failed.discard((account, claim))
            elif (account, claim) in self._failed and one.runs(self._clock.now()):
                waiting.add(name_of((one.team, one.key)))
        return waiting

    async def _is_ours(self, one: _Passed, claim: str) -> bool:
        """Whether this process is to tell it. A mark of a period that is over is nobody's."""
        now, key = self._clock.now(), (one.line.account, claim)
        if not one.runs(now) or now < self._rests.get(key, now):
            return False
        ours = await self._upkeep.claim_notice(one.line.account, claim, now, LEASE_SECONDS)
        # Not before the books have answered: where they do not, the next look asks again.
        self._rests[key] = now + timedelta(seconds=LEASE_SECONDS)
        return ours

    async def _told(self, account: str, claim: str) -> None:
        await self._upkeep.notice_sent(account, claim, self._clock.now())
        self._rests[account, claim] = FOR_EVER

    async def _passed(
        self, due: Collection[Name], refused: dict[Name, Money], rest: float
    ) -> tuple[list[_Passed], bool]:
        """By those who are due and by some of the others, and whether these were the last of
        their round. In slices, so that however many there are the event loop never stands still
        for long, and a key that is looked up never waits."""
        passed = []
        for names in _slices(list(due)):
            began = self._clock.monotonic()
            passed += await self._passed_of(await self._owners.named(names), refused)
            await asyncio.sleep(rest * (self._clock.monotonic() - began))
        others = 0
        while others < OTHERS_A_LOOK:
            began = self._clock.monotonic()
            owners = await self._owners.next(OWNERS_AT_ONCE)
            if not owners:
                return passed, True
            others += len(owners)
            new = [owner for owner in owners if name_of(owner) not in due]
            passed += await self._passed_of(new, refused)
            await asyncio.sleep(rest * (self._clock.monotonic() - began))
        return passed, False

    async def _passed_of(
        self, owners: Sequence[Owner], refused: dict[Name, Money]
    ) -> list[_Passed]:
        watched = _lines(owners, self._clock.now())
        if not watched:
            return []
        balances = await self._ledger.balances([line for _, _, line in watched])
        return [
            _Passed(team, key, line, balance, mark)
            for (team, key, line), balance in zip(watched, balances, strict=True)
            if balance.posted > 0
            for mark in marks(
                line.limit,
                balance,
                self._warn_percent,
                refused.get((line.limit.scope, line.limit.owner), 0),
            )
        ]


def _slices(all_of_them: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(all_of_them), OWNERS_AT_ONCE):
        yield all_of_them[start : start + OWNERS_AT_ONCE]


def _lines(owners: Sequence[Owner], now: datetime) -> list[tuple[Team, Key | None, Line]]:
    """The running accounts, of those who may spend, that have an amount, hard or soft."""
    return [
        (team, key, Line(limit, period(limit.window, now, team.zone)))
        for team, key in owners
        if not team.disabled and (key is None or (not key.disabled and key.revoked is None))
        for limit in (team if key is None else key).limits.of(*name_of((team, key)))
        if limit.unit is Unit.MONEY and (limit.amount is not None or limit.soft is not None)
    ]
