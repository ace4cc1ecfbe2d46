"""How near the bounds are to what is billed, and by how much a model's are raised.

A bound is arithmetic over what a provider publishes, and a provider may bill more. One call that
costs more than its bound shows it: from then on every bound of its model, at its upstream, is
multiplied by the ratio that was seen. At once in this process; in the others and after a restart
by way of the store, which is re-read every minute (money.md 7, rule 5).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from gateway.domain.errors import LedgerUnavailable
from gateway.domain.money import Money
from gateway.domain.price import FACTOR_ONE
from gateway.domain.route import OTHER, Catalogue
from gateway.ports import Upkeep
from gateway.relay.flights import Flights

log = logging.getLogger(__name__)

MAX_FACTOR = 10 * FACTOR_ONE
"""Ten times. What is billed beyond it is posted in full, but a single absurd answer must not close
a model to every budget."""
REREAD_SECONDS = 60.0


class Factors:
    """By upstream and the model's name there, in millionths. One for each process."""

    def __init__(
        self,
        upkeep: Upkeep,
        flights: Flights,
        catalogue: Catalogue,
        tell_ratio: Callable[[str, float], None],
    ) -> None:
        """``tell_ratio`` hears the model's label and cost / bound of each measured call."""
        self._upkeep = upkeep
        self._flights = flights
        self._tell_ratio = tell_ratio
        self._labels = _labels(catalogue)
        self._stored: dict[tuple[str, str], int] = {}
        self._unwritten: dict[tuple[str, str], int] = {}
        # A re-read that began before a write must not undo it here.
        self._store = asyncio.Lock()

    def replace(self, catalogue: Catalogue) -> None:
        """From now on these are the models that have labels of their own."""
        self._labels = _labels(catalogue)

    def of(self, upstream: str, model: str) -> int:
        """What the bounds of a model are multiplied by; ``FACTOR_ONE`` where nothing is known."""
        known = self._stored.get((upstream, model), FACTOR_ONE)
        return max(FACTOR_ONE, known, self._unwritten.get((upstream, model), FACTOR_ONE))

    def observe(self, upstream: str, model: str, base: Money, actual: Money) -> None:
        """A call was billed ``actual``; its price alone, without a factor, had said ``base``.

        Never waits and never raises: a factor is written behind the answer.
        """
        if base < 1:
            return
        self._tell_ratio(self._label(upstream, model)[1], actual / base)
        seen = min(-(-actual * FACTOR_ONE // base), MAX_FACTOR)
        if seen <= FACTOR_ONE or seen <= self.of(upstream, model):
            return
        log.warning(
            "a call cost more than its bound; the model's bounds are raised",
            extra={"upstream": upstream, "model": model, "factor_millionths": seen},
        )
        self._unwritten[upstream, model] = seen
        self._flights.errand(self._write_down())

    async def refresh(self) -> None:
        """Writes what could not be written before, and reads what other processes wrote, or a
        person took back. With the store away, what is known here goes on."""
        async with self._store:
            try:
                await self._write()
                self._stored = dict(await self._upkeep.factors())
            except LedgerUnavailable as error:
                log.warning("the factors of bounds cannot be read", extra={"error": str(error)})

    async def stay_fresh(self) -> None:
        """Refreshes for ever."""
        while True:
            await asyncio.sleep(REREAD_SECONDS)
            try:
                await self.refresh()
            except Exception:
                # Whatever it is: a re-read that stops for ever would hide what others have seen.
                log.exception("the factors of bounds were not refreshed")

    def by_label(self) -> dict[tuple[str, str], int]:
        """Every configured model's factor, by upstream and label; behind the wildcard the
        largest."""
        found = dict.fromkeys(self._labels, FACTOR_ONE)
        for upstream, model in {*self._stored, *self._unwritten}:
            label = self._label(upstream, model)
            if label in found:
                found[label] = max(found[label], self.of(upstream, model))
        return found

    def _label(self, upstream: str, model: str) -> tuple[str, str]:
        named = (upstream, model)
        return named if named in self._labels else (upstream, OTHER)

    async def _write_down(self) -> None:
        async with self._store:
            try:
                await self._write()
            except LedgerUnavailable as error:
                log.warning("a factor is not written yet", extra={"error": str(error)})

    async def _write(self) -> None:
        for named, millionths in list(self._unwritten.items()):
            self._stored[named] = await self._upkeep.raise_factor(*named, millionths)
            # It may have been raised again meanwhile; that has an errand of its own.
            if self._unwritten[named] == millionths:
                del self._unwritten[named]


def _labels(catalogue: Catalogue) -> set[tuple[str, str]]:
    targets = [target for model in catalogue.models.values() for target in model.targets]
    labels = {(target.upstream, target.model) for target in targets}
    if catalogue.wildcard is not None:
        labels |= {(target.upstream, OTHER) for target in catalogue.wildcard.targets}
    return labels
