"""What a process does for the books while nobody looks: it beats, sweeps and forgets.

It is no step of a request, so it is no part of ``relay``, and it is given the stores as ports.
Every process does all of it; where several do, each hold is expired by one of them (money.md 6a).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from gateway.domain.errors import GatewayError
from gateway.domain.ledger import Entry
from gateway.ports import Clock, Store

log = logging.getLogger(__name__)

FORGET_BATCH = 100
"""Holds that are deleted in one transaction: a reservation waits for at most one of these."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often, and when somebody is dead, in seconds.

    ``unbroken``: who has not itself beaten for so long calls nobody dead: behind a database that
    was away, everybody has been silent. ``drift``: by how much the calendar may leave the steady
    clock between two beats; more is a jump, behind which the others' beats look old.
    """

    beat: float = 5.0
    dead: float = 15.0
    unbroken: float = 30.0
    drift: float = 2.0
    sweep: float = 15.0
    forget: float = 3600.0
    overdue: float = 60.0
    recover: float = 10.0


class Housekeeping:
    """The chores of one process, each by itself, and all of them for ever (``run``).

    ``recover`` goes on with the settlements of processes that are gone; ``report`` hears the age
    of the open hold whose lease ends first, in seconds, and ``expired`` each hold that this
    process has ended. ``keep`` is how long closed holds stay; None is for ever.
    """

    def __init__(
        self,
        *,
        store: Store,
        recover: Callable[[], Awaitable[None]],
        report: Callable[[float], None],
        expired: Callable[[Entry], None] = lambda entry: None,
        clock: Clock,
        worker: str,
        keep: timedelta | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._store = store
        self._recover = recover
        self._report = report
        self._expired = expired
        self._clock = clock
        self._worker = worker
        self._keep = keep
        self._pace = pace or Pace()
        self._beats: _Beats | None = None
        self._skewed = False

    async def run(self) -> None:
        """Never returns, and never raises for what a store can do."""
        async with asyncio.TaskGroup() as chores:
            chores.create_task(_for_ever(self.beat, self._pace.beat))
            chores.create_task(_for_ever(self.sweep, self._pace.sweep))
            chores.create_task(_for_ever(self.forget_expired, self._pace.forget))
            if self._keep is not None:
                chores.create_task(_for_ever(self.forget, self._pace.forget))

    async def beat(self) -> None:
        """Says that this process lives. Raises ``LedgerUnavailable``."""
        now, at = self._clock.now(), self._clock.monotonic()
        try:
            await self._store.upkeep.beat(self._worker, now)
        except BaseException:
            self._beats = None
            raise
        skew, known = self._store.clock_skew_seconds, self._skewed
        self._skewed = abs(skew) > self._pace.drift
        if self._skewed and not known:
            log.warning(
                "this machine's clock and the database's differ; leases go by the database's, "
                "days and months by this one",
                extra={"skew_seconds": round(skew, 3)},
            )
        since = self._beats.since if self._beats and self._follows(self._beats, now, at) else at
        self._beats = _Beats(since, now, at)

    async def sweep(self) -> None:
        """Expires what nobody will settle: first what is known is posted, so that a hold whose
        settlement waits on this disk need not be corrected. Raises ``LedgerUnavailable``."""
        try:
            async with asyncio.timeout(self._pace.recover):
                await self._recover()
        except Exception:
            # A disk that fails, or hangs, keeps no hold standing.
            log.exception("what other processes left behind cannot be read")
        while expired := await self._store.ledger.sweep(
            self._clock.now(), silent_before=self._silent_before()
        ):
            for entry in expired:
                self._expired(entry)
                log.warning(
                    "a hold expired; its outcome is unknown and it is posted at its bound",
                    extra={"request_id": entry.rid, "bound_nanousd": entry.bound},
                )
        await self._look_at_the_oldest()

    async def forget(self) -> None:
        """Deletes closed holds that were kept for long enough. Raises ``LedgerUnavailable``."""
        if self._keep is None:
            return
        before = self._clock.now() - self._keep
        total = 0
        begun = self._clock.monotonic()
        while forgotten := await self._store.upkeep.forget(before, FORGET_BATCH):
            total += forgotten
            # As long again, so that the writer has half of its time for calls.
            await asyncio.sleep(self._clock.monotonic() - begun)
            begun = self._clock.monotonic()
        if total:
            log.info("closed holds were rolled up and deleted", extra={"holds": total})

    async def forget_expired(self) -> None:
        """Deletes the ids at upstreams that are nobody's any more. Raises ``LedgerUnavailable``."""
        while await self._store.ownership.forget_expired(self._clock.now(), FORGET_BATCH):
            pass

    async def _look_at_the_oldest(self) -> None:
        oldest = await self._store.books.oldest_hold()
        now = self._clock.now()
        self._report(0.0 if oldest is None else (now - oldest.at).total_seconds())
        if oldest is None:
            return
        # A lease ends by the store's clock.
        skew = self._store.clock_skew_seconds
        overdue = (now - oldest.lease_ends).total_seconds() - skew
        if overdue > self._pace.overdue:
            log.error(
                "a hold has outlived its lease and no sweep has ended it",
                extra={"request_id": oldest.rid, "overdue_seconds": round(overdue)},
            )

    def _silent_before(self) -> datetime | None:
        """Since when a living worker has beaten; None where this one cannot tell."""
        now, at = self._clock.now(), self._clock.monotonic()
        beats = self._beats
        if beats is None or not self._follows(beats, now, at):
            return None
        if at - beats.since < self._pace.unbroken:
            return None
        return now - timedelta(seconds=self._pace.dead)

    def _follows(self, beats: _Beats, now: datetime, at: float) -> bool:
        """Whether no beat is missing between the last one and now, and no clock has jumped."""
        passed = at - beats.last
        drift = (now - beats.last_date).total_seconds() - passed
        return passed <= self._pace.dead and abs(drift) <= self._pace.drift


@dataclass(frozen=True, slots=True)
class _Beats:
    """A series of beats without a gap, in the steady clock's seconds."""

    since: float
    last_date: datetime
    last: float


async def _for_ever(chore: Callable[[], Awaitable[None]], pause_seconds: float) -> None:
    name = getattr(chore, "__name__", "")
    while True:
        try:
            await chore()
        except GatewayError as error:
            log.warning(
                "the ledger is away, and a chore waits", extra={"chore": name, "error": str(error)}
            )
        except Exception:
            # Whatever it is: a sweep that stops for ever would leave every later hold standing.
            log.exception("a chore failed", extra={"chore": name})
        await asyncio.sleep(pause_seconds)
