"""The books and their upkeep in this process's memory: for tests."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from gateway.domain.books import Adjustment, Correction, Discrepancy, Hold, JournalLine
from gateway.domain.call import Operation
from gateway.domain.ledger import By, Entry, Outcome, Part, State, UsageRow, UserUsage
from gateway.domain.money import Money
from gateway.domain.transition import (
    CORRECTED,
    DOUBTFUL,
    WORKER_MEMORY,
    Counts,
    Move,
    by_model,
    corrected,
    corrected_part,
    correction_counts,
)
from gateway.ports import NotKnown
from gateway.stores.memory_rows import NOTHING, MemoryHold, MemoryRows
from gateway.stores.rows import adjustment_detail, compare_booked, correction_detail, routed_of

NO_PART = Part("")


class MemoryBooks:
    """``Books`` without durability."""

    def __init__(self, rows: MemoryRows) -> None:
        self._rows = rows

    async def find(self, rid: str) -> Hold | None:
        await asyncio.sleep(0)
        hold = self._rows.holds.get(rid)
        return None if hold is None else self._hold(hold)

    async def journal(self, rid: str) -> list[JournalLine]:
        await asyncio.sleep(0)
        return [line for line in self._rows.journal if line.rid == rid]

    async def unresolved(self, limit: int = 100, after: str = "") -> list[Hold]:
        await asyncio.sleep(0)
        asking = [
            self._hold(hold)
            for rid, hold in sorted(self._rows.holds.items())
            if rid > after
            and (
                hold.state is State.EXPIRED
                or (hold.state is State.POSTED and not DOUBTFUL.isdisjoint(hold.flags))
            )
        ]
        return asking[:limit]

    async def oldest_hold(self) -> Hold | None:
        await asyncio.sleep(0)
        held = [hold for hold in self._rows.holds.values() if hold.state is State.HELD]
        oldest = min(held, key=lambda hold: hold.claim.lease_ends, default=None)
        return None if oldest is None else self._hold(oldest)

    async def correct(self, correction: Correction) -> Entry:
        if correction.cost < 0:
            raise ValueError("a cost is never negative")
        await asyncio.sleep(0)
        rows = self._rows
        hold = rows.holds.get(correction.rid)
        if hold is None:
            raise NotKnown(f"there is no reservation {correction.rid}, or it was forgotten")
        if correction.id in rows.corrections or correction.id in rows.adjustments:
            return rows.entry_of(hold, Move(hold.state, hold.cost, applied=False))
        doubtful = not DOUBTFUL.isdisjoint(hold.flags)
        move = corrected(hold.state, hold.cost, correction.cost, doubtful)
        if move.applied:
            gained = correction_counts(hold.state, hold.cost, hold.flags, correction)
            drawn = corrected_part(hold.drawn, hold.cost, move.cost)
            gains = by_model(hold.claim.model, gained, drawn, hold.drawn)
            rows.count(hold.day, hold.claim.team, hold.claim.key_id, gains)
            rows.add(hold.accounts, move.pending, move.posted)
            rows.corrections.add(correction.id)
            rows.write_journal(
                correction.at,
                correction.rid,
                CORRECTED,
                pending=move.pending,
                posted=move.posted,
                detail=json.loads(correction_detail(correction, hold.cost, drawn)),
            )
            hold.state, hold.cost, hold.flags = move.state, move.cost, ()
            hold.drawn = drawn
        return rows.entry_of(hold, move)

    async def adjustment(self, adjustment_id: str) -> Adjustment | None:
        await asyncio.sleep(0)
        return self._rows.adjustments.get(adjustment_id)

    async def adjust(self, adjustment: Adjustment) -> bool:
        return bool(await self.adjust_all([adjustment], {}))

    async def adjust_all(
        self, adjustments: Sequence[Adjustment], seen: Mapping[tuple[str, str], Money]
    ) -> list[str]:
        await asyncio.sleep(0)
        booked = Counter[tuple[str, str]]()
        for (day, _, _, model), counts in self._rows.usage.items():
            booked[day, model] += counts.cost
        compare_booked(seen, booked)
        return [one.id for one in adjustments if self._adjust(one)]

    def _adjust(self, adjustment: Adjustment) -> bool:
        rows = self._rows
        if adjustment.id in rows.corrections or adjustment.id in rows.adjustments:
            return False
        rows.adjustments[adjustment.id] = adjustment
        rows.add(dict.fromkeys(adjustment.accounts), 0, adjustment.amount)
        gains = [(adjustment.model, Counts(cost=adjustment.amount))]
        rows.count(adjustment.day, adjustment.team, "", gains)
        rows.write_journal(
            adjustment.at,
            adjustment.id,
            CORRECTED,
            posted=adjustment.amount,
            detail=json.loads(adjustment_detail(adjustment)),
        )
        return True

    async def routed(self, day: str) -> list[tuple[str, UsageRow]]:
        await asyncio.sleep(0)
        found: dict[tuple[str, str, str, str], tuple[int, int, int]] = {}
        for hold in self._rows.holds.values():
            if hold.day == day and hold.state in (State.POSTED, State.EXPIRED):
                one = self._hold(hold)
                part = one.drawn or NO_PART
                asked = 0 if one.operation == Operation.RESPONSE else one.images
                for model, *sums in (
                    (one.model, 1, asked, one.cost - part.cost),
                    (part.model, 0, part.images, part.cost),
                ):
                    who = (one.upstream, one.team, one.key_id, model)
                    requests, images, cost = found.get(who, (0, 0, 0))
                    found[who] = (requests + sums[0], images + sums[1], cost + sums[2])
        return [routed_of(day, (*who, *sums)) for who, sums in found.items() if who[3]]

    async def usage_by_user(
        self, team: str | None = None, since: str | None = None, until: str | None = None
    ) -> list[UserUsage]:
        await asyncio.sleep(0)
        found: dict[tuple[str, str], UserUsage] = {}
        for hold in (*self._rows.holds.values(), *self._rows.forgotten):
            day, owner = hold.day, hold.claim.team
            if (
                hold.state not in (State.POSTED, State.EXPIRED)
                or (team is not None and owner != team)
                or (since is not None and day < since)
                or (until is not None and day > until)
            ):
                continue
            who = (owner, hold.claim.user)
            known = found.get(who, UserUsage(*who, 0, 0, 0, 0))
            if hold.claim.operation is Operation.RESPONSE:
                images = 0 if hold.drawn is None else hold.drawn.images
            else:
                images = hold.claim.images if hold.outcome is Outcome.DELIVERED else 0
            found[who] = UserUsage(
                *who,
                known.requests + 1,
                known.images + images,
                known.cost + hold.cost,
                known.unresolved + (hold.state is State.EXPIRED),
            )
        return [found[who] for who in sorted(found)]

    async def usage_by(
        self,
        by: By,
        team: str | None = None,
        since: str | None = None,
        until: str | None = None,
    ) -> list[UsageRow]:
        await asyncio.sleep(0)
        sums: dict[tuple[str, str, str, str], Counts] = {}
        for (day, owner, key_id, model), counts in self._rows.usage.items():
            if (
                (team is None or owner == team)
                and (since is None or day >= since)
                and (until is None or day <= until)
            ):
                row = {
                    By.DAY: (day, "", "", ""),
                    By.MONTH: (day[:7], "", "", ""),
                    By.TEAM: ("", owner, "", ""),
                    By.KEY: ("", owner, key_id, ""),
                    By.MODEL: ("", "", "", model),
                }[by]
                sums[row] = sums.get(row, Counts()).plus(counts)
        return [
            UsageRow(*row, *counts)
            for row, counts in sorted(sums.items())
            if counts.requests > 0 or counts.images != 0 or counts.cost != 0
        ]

    async def audit(self) -> list[Discrepancy]:
        await asyncio.sleep(0)
        rows = self._rows
        posted, pending = Counter(rows.rolled_up), Counter[str]()
        del posted[""]
        for hold in rows.holds.values():
            for account in hold.accounts:
                posted[account] += hold.cost
                pending[account] += _still_held(hold)
        for adjustment in rows.adjustments.values():
            for account in dict.fromkeys(adjustment.accounts):
                posted[account] += adjustment.amount
        spent = sum(hold.cost for hold in rows.holds.values()) + rows.rolled_up.get("", 0)
        spent += sum(adjustment.amount for adjustment in rows.adjustments.values())
        pairs = [("cost of all days", sum(day.cost for day in rows.usage.values()), spent)]
        for account in sorted({*rows.balances, *posted, *pending}):
            kept = rows.balances.get(account, NOTHING)
            pairs.append((f"posted of {account}", kept.posted, posted[account]))
            pairs.append((f"pending of {account}", kept.pending, pending[account]))
        days, users = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        for (day, team, _, _), counts in rows.usage.items():
            days[day, team] += counts.cost
        for hold in (*rows.holds.values(), *rows.forgotten):
            users[hold.day, hold.claim.team] += hold.cost
        for adjustment in rows.adjustments.values():
            users[adjustment.day, adjustment.team] += adjustment.amount
        for day, team in sorted({*days, *users}):
            what = f"cost of {day} {team} and its users"
            pairs.append((what, days[day, team], users[day, team]))
        said_posted, said_pending = Counter[str](), Counter[str]()
        for line in rows.journal:
            said_posted[line.rid] += line.posted
            said_pending[line.rid] += line.pending
        for rid, hold in sorted(rows.holds.items()):
            pairs.append((f"posted of {rid} in the journal", hold.cost, said_posted[rid]))
            pairs.append((f"pending of {rid} in the journal", _still_held(hold), said_pending[rid]))
        return [Discrepancy(what, kept, summed) for what, kept, summed in pairs if kept != summed]

    def _hold(self, hold: MemoryHold) -> Hold:
        claim = hold.claim
        return Hold(
            rid=claim.rid,
            state=hold.state,
            bound=claim.bound,
            cost=hold.cost,
            accounts=hold.accounts,
            team=claim.team,
            key_id=claim.key_id,
            model=claim.model,
            operation=claim.operation,
            upstream=claim.upstream,
            images=claim.images,
            price_id=claim.price_id,
            worker=claim.worker,
            at=claim.at,
            lease_ends=claim.lease_ends,
            idempotency_key=self._rows.key_of(hold),
            outcome=hold.outcome,
            basis=hold.basis,
            flags=hold.flags,
            user=claim.user,
            drawn=hold.drawn,
        )


def _still_held(hold: MemoryHold) -> int:
    return hold.claim.bound if hold.state is State.HELD else 0


class MemoryUpkeep:
    """``Upkeep`` without durability."""

    def __init__(self, rows: MemoryRows) -> None:
        self._rows = rows

    async def beat(self, worker: str, now: datetime) -> None:
        await asyncio.sleep(0)
        workers = self._rows.workers
        workers[worker] = max(now, workers.get(worker, now))
        busy = {hold.claim.worker for hold in self._rows.holds.values() if hold.state is State.HELD}
        for other, beat_at in list(workers.items()):
            if beat_at < now - WORKER_MEMORY and other not in busy:
                del workers[other]

    async def forget(self, before: datetime, limit: int = 1000) -> int:
        await asyncio.sleep(0)
        rows = self._rows
        old = sorted(
            (hold.claim.at, rid)
            for rid, hold in rows.holds.items()
            if (
                hold.state is State.VOIDED
                or (hold.state is State.POSTED and DOUBTFUL.isdisjoint(hold.flags))
            )
            and hold.claim.at < before
            and rows.key_of(hold) is None
        )[:limit]
        for _, rid in old:
            hold = rows.holds.pop(rid)
            rows.forgotten.append(hold)
            for account in (*hold.accounts, ""):
                rows.rolled_up[account] = rows.rolled_up.get(account, 0) + hold.cost
        gone = {rid for _, rid in old}
        rows.journal = [line for line in rows.journal if line.rid not in gone]
        return len(old)

    async def claim_notice(
        self, account: str, mark: str, now: datetime, lease_seconds: float
    ) -> bool:
        await asyncio.sleep(0)
        known = self._rows.notices.get((account, mark))
        if known is not None:
            claimed_at, sent_at = known
            if sent_at is not None or claimed_at > now - timedelta(seconds=lease_seconds):
                return False
        self._rows.notices[account, mark] = (now, None)
        return True

    async def notice_sent(self, account: str, mark: str, now: datetime) -> None:
        await asyncio.sleep(0)
        claimed_at, sent_at = self._rows.notices.get((account, mark), (now, None))
        self._rows.notices[account, mark] = (claimed_at, sent_at or now)

    async def factors(self) -> dict[tuple[str, str], int]:
        await asyncio.sleep(0)
        return dict(self._rows.factors)

    async def raise_factor(self, upstream: str, model: str, millionths: int) -> int:
        await asyncio.sleep(0)
        raised = max(millionths, self._rows.factors.get((upstream, model), millionths))
        self._rows.factors[upstream, model] = raised
        return raised

    async def reset_factor(self, upstream: str, model: str) -> bool:
        await asyncio.sleep(0)
        return self._rows.factors.pop((upstream, model), None) is not None
