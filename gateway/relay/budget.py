"""What is left of budgets, for headers: remembered for a moment, and never in a call's way."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.domain.errors import GatewayError
from gateway.domain.ledger import Balance, Line
from gateway.ports import Clock, Ledger

log = logging.getLogger(__name__)

KNOWN_SECONDS = 1.0
"""How long a balance is believed: an account is read at most so often, whoever asks."""
PATIENCE_SECONDS = 0.25
"""How long an answer waits for a balance; it then goes without."""
MAX_REMEMBERED = 20_000


@dataclass(frozen=True, slots=True)
class _Remembered:
    balance: Balance
    until: float


class BudgetView:
    """The balances of accounts with a hard budget.

    What reservations and settlements return anyway is learned, so a process that buys reads
    nothing; only answers without either (from the cache, and refusals) may have to ask.
    """

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock
        self._known: OrderedDict[str, _Remembered] = OrderedDict()
        self._reading: dict[tuple[str, ...], asyncio.Task[None]] = {}
        self._away_until = 0.0

    def learn(self, lines: Sequence[Line], balances: Sequence[Balance]) -> None:
        """Notes what the ledger has just said of some accounts."""
        until = self._clock.monotonic() + KNOWN_SECONDS
        for line, balance in zip(lines, balances, strict=False):
            if line.limit.amount is not None:
                self._known[line.account] = _Remembered(balance, until)
                self._known.move_to_end(line.account)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)

    async def balances(self, lines: Sequence[Line]) -> tuple[Sequence[Line], Sequence[Balance]]:
        """The accounts among ``lines`` that have a hard budget, and their balances, which are at
        most a second old. Both are empty where the ledger does not answer in time."""
        hard = [line for line in lines if line.limit.amount is not None]
        found = self._remembered(hard)
        if found is None and self._clock.monotonic() >= self._away_until:
            await self._read(hard)
            found = self._remembered(hard)
        return (hard, found) if found is not None else ((), ())

    def _remembered(self, lines: Sequence[Line]) -> list[Balance] | None:
        now, found = self._clock.monotonic(), []
        for line in lines:
            known = self._known.get(line.account)
            if known is None or known.until <= now:
                return None
            found.append(known.balance)
        return found

    async def _read(self, lines: Sequence[Line]) -> None:
        """Asks once for all who wait for the same accounts, in a task that none of them ends."""
        accounts = tuple(line.account for line in lines)
        task = self._reading.get(accounts)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._ask(lines))
            self._reading[accounts] = task
            task.add_done_callback(lambda _: self._reading.pop(accounts))
        await asyncio.wait({task}, timeout=PATIENCE_SECONDS)

    async def _ask(self, lines: Sequence[Line]) -> None:
        try:
            self.learn(lines, await self._ledger.balances(lines))
        except GatewayError as error:
            self._away_until = self._clock.monotonic() + KNOWN_SECONDS
            log.warning("a budget cannot be read for a header", extra={"error": str(error)})
        except Exception:
            self._away_until = self._clock.monotonic() + KNOWN_SECONDS
            log.exception("a budget cannot be read for a header")
