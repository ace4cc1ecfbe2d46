"""Budgets that are nearly or wholly used up: logged, counted and sent, each once.

Every process looks; of those that see the same mark, the one that claims it in the books tells it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from gateway.domain.errors import GatewayError, QuotaExceeded
from gateway.domain.ledger import Balance, Line
from gateway.domain.money import Money, format_dollars
from gateway.domain.notices import Mark, marks
from gateway.domain.quota import Limit, Scope
from gateway.domain.receipt import Delivery, Receipt
from gateway.domain.team import Declared, Key, Team, money_lines
from gateway.ports import Clock, Directory, Ledger, Message, Notifier, Upkeep

log = logging.getLogger(__name__)

LEASE_SECONDS = 90.0
"""How long who claimed a mark has for telling it: longer than all tries of one message, so that no
other process sends it meanwhile."""
OWNERS_AT_ONCE = 200
"""Whose balances are read and looked at in one go."""
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
    """Looks at every limited account of every team and key, again and again."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        upkeep: Upkeep,
        directory: Directory,
        declared: Callable[[], Declared],
        clock: Clock,
        warn_percent: int,
        notifier: Notifier | None,
        message_id: Callable[[str], str],
        counted: Callable[[str, str], None],
    ) -> None:
        """``declared`` are the teams and keys of the file, as of now. ``message_id`` makes an id of
        a name that is the same in every process of this gateway and in no other gateway.
        ``counted`` hears the team and the name of each mark."""
        self._ledger = ledger
        self._upkeep = upkeep
        self._directory = directory
        self._declared = declared
        self._clock = clock
        self._warn_percent = warn_percent
        self._notifier = notifier
        self._message_id = message_id
        self._counted = counted
        self._turn = asyncio.Lock()
        self._rests: dict[tuple[str, str], datetime] = {}
        """Until when a claim needs no question to the books: it is told, or somebody's."""
        self._refused: dict[tuple[Scope, str], Money] = {}
        """The dearest call that was refused since the last look, by team and by key."""

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

    async def looked(self) -> None:
        """Waits for the end of a look that is under way: whom it tells is still needed."""
        async with self._turn:
            pass

    async def flush(self) -> None:
        """A last look, if anybody outside hears of it. Raises ``LedgerUnavailable``."""
        if self._notifier is not None:
            await self.look()

    async def look(self) -> None:
        """Tells what was passed and nobody has told, one look at a time. Raises
        ``LedgerUnavailable``."""
        async with self._turn:
            await self._look()

    async def _look(self) -> None:
        passed = await self._passed()
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
            await self._send(self._notifier, passed)
        accounts = {one.line.account for one in passed}
        self._rests = {key: until for key, until in self._rests.items() if key[0] in accounts}

    async def _send(self, notifier: Notifier, passed: list[_Passed]) -> None:
        """Until the first that is not delivered: behind a receiver that is away all would wait."""
        for one in passed:
            account, claim = one.line.account, f"{one.mark.claim} webhook"
            if await self._is_ours(one, claim):
                message = Message(
                    self._message_id(f"{account} {claim}"),
                    one.mark.event,
                    self._clock.now(),
                    one.data,
                )
                if not await notifier.tell(message):
                    return
                await self._told(account, claim)

    async def _is_ours(self, one: _Passed, claim: str) -> bool:
        """Whether this process is to tell it. A mark of a period that is over is nobody's."""
        now, key = self._clock.now(), (one.line.account, claim)
        if not one.runs(now) or now < self._rests.get(key, now):
            return False
        self._rests[key] = now + timedelta(seconds=LEASE_SECONDS)
        return await self._upkeep.claim_notice(one.line.account, claim, now, LEASE_SECONDS)

    async def _told(self, account: str, claim: str) -> None:
        await self._upkeep.notice_sent(account, claim, self._clock.now())
        self._rests[account, claim] = FOR_EVER

    async def _passed(self) -> list[_Passed]:
        """In slices, so that however many budgets there are the event loop never stands still for
        long: with 100,000 keys it stood for seconds."""
        now = self._clock.now()
        refused, self._refused = self._refused, {}
        owners = await self._owners()
        passed: list[_Passed] = []
        for start in range(0, len(owners), OWNERS_AT_ONCE):
            watched = _lines(owners[start : start + OWNERS_AT_ONCE], now)
            balances = await self._ledger.balances([line for _, _, line in watched])
            passed += [
                _Passed(team, key, line, balance, mark)
                for (team, key, line), balance in zip(watched, balances, strict=True)
                for mark in marks(
                    line.limit,
                    balance,
                    self._warn_percent,
                    refused.get((line.limit.scope, line.limit.owner), 0),
                )
            ]
        return passed

    async def _owners(self) -> list[tuple[Team, Key | None]]:
        """Whoever may spend and has a budget: of the file, and of the directory."""
        declared = self._declared()
        return [
            *((team, None) for team in declared.teams.values() if not team.disabled),
            *((team, key) for team, key in declared.keys.values() if _may_spend(team, key)),
            *await self._directory.watched(),
        ]


def _may_spend(team: Team, key: Key) -> bool:
    return not team.disabled and not key.disabled and key.revoked is None


def _lines(
    owners: Sequence[tuple[Team, Key | None]], now: datetime
) -> list[tuple[Team, Key | None, Line]]:
    """The running accounts that have an amount, hard or soft."""
    return [
        (team, key, line)
        for team, key in owners
        for line in money_lines(_limits(team, key), now, team.zone)
        if line.limit.amount is not None or line.limit.soft is not None
    ]


def _limits(team: Team, key: Key | None) -> tuple[Limit, ...]:
    if key is None:
        return team.limits.of(Scope.TEAM, team.id)
    return key.limits.of(Scope.KEY, key.id)
