"""What is left of budgets, for headers and estimates: remembered for a moment, and never in a
call's way."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence

from gateway.domain.errors import GatewayError
from gateway.domain.ledger import Balance, Line
from gateway.ports import Clock, Ledger

log = logging.getLogger(__name__)

KNOWN_SECONDS = 1.0
"""How long a balance is believed: an account is read at most so often, whoever asks."""
PATIENCE_SECONDS = 0.25
"""How long an answer waits for a balance; it then goes without."""
MAX_REMEMBERED = 20_000


class BudgetView:
    """The balances of accounts with a budget, hard or soft.

    What reservations and settlements return anyway is learned, so a process that buys reads
    nothing; only answers without either (from the cache, refusals, estimates) may have to ask.
    """

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock
        self._known: OrderedDict[str, tuple[Balance, float]] = OrderedDict()
        """By account: its balance, and until when it is believed."""
        self._reading: dict[tuple[str, ...], asyncio.Task[Sequence[Balance]]] = {}
        self._away_until = 0.0

    def learn(self, lines: Sequence[Line], balances: Sequence[Balance]) -> None:
        """Notes what the ledger has just said of some accounts."""
        known, until = self._known, self._clock.monotonic() + KNOWN_SECONDS
        for line, balance in zip(lines, balances):  # noqa: B905 - ``strict`` costs as much again
            limit = line.limit
            if limit.amount is not None or limit.soft is not None:
                known[line.account] = balance, until
                known.move_to_end(line.account)
        while len(known) > MAX_REMEMBERED:
            known.popitem(last=False)

    async def balances(self, lines: Sequence[Line]) -> tuple[Sequence[Line], Sequence[Balance]]:
        """The accounts among ``lines`` that have a hard budget, and their balances, which are at
        most a second old. Both are empty where the ledger does not answer in time."""
        hard = [line for line in lines if line.limit.amount is not None]
        found = self._remembered(hard)
        if found is None and self._clock.monotonic() >= self._away_until:
            await self._read(hard)
            found = self._remembered(hard)
        return (hard, found) if found is not None else ((), ())

    async def budgets(self, lines: Sequence[Line]) -> tuple[Sequence[Line], Sequence[Balance]]:
        """The accounts among ``lines`` that have a budget, hard or soft, and their balances, which
        are at most a second old. Waits for the ledger. Raises ``LedgerUnavailable``."""
        limited = [line for line in lines if has_budget(line)]
        found: Sequence[Balance] | None = self._remembered(limited)
        if found is None:
            found = await asyncio.shield(self._ask(limited))
        return limited, found

    def _remembered(self, lines: Sequence[Line]) -> list[Balance] | None:
        now, found = self._clock.monotonic(), []
        for line in lines:
            known = self._known.get(line.account)
            if known is None or known[1] <= now:
                return None
            found.append(known[0])
        return found

    async def _read(self, lines: Sequence[Line]) -> None:
        """Waits for a moment, for what ``learn`` is told then."""
        task = self._ask(lines)
        await asyncio.wait({task}, timeout=PATIENCE_SECONDS)
        if not task.done() or task.cancelled() or task.exception() is not None:
            self._give_up()

    def _ask(self, lines: Sequence[Line]) -> asyncio.Task[Sequence[Balance]]:
        """Asks once for all who wait for the same accounts, in a task that none of them ends."""
        accounts = tuple(line.account for line in lines)
        task = self._reading.get(accounts)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._asked(lines))
            self._reading[accounts] = task
            task.add_done_callback(lambda done: self._answered(accounts, done))
        return task

    async def _asked(self, lines: Sequence[Line]) -> Sequence[Balance]:
        balances = await self._ledger.balances(lines)
        self.learn(lines, balances)
        return balances

    def _answered(self, accounts: tuple[str, ...], task: asyncio.Task[Sequence[Balance]]) -> None:
        del self._reading[accounts]
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, GatewayError):
            log.warning("a budget cannot be read", extra={"error": str(error)})
        elif error is not None:
            log.error("a budget cannot be read", exc_info=error)

    def _give_up(self) -> None:
        self._away_until = self._clock.monotonic() + KNOWN_SECONDS


def has_budget(line: Line) -> bool:
    return line.limit.amount is not None or line.limit.soft is not None
