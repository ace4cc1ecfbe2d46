"""The model of the ledger: every store against sums over a plain list of calls (reliability.md T2).

The model knows nothing of ``domain.transition``: it keeps what each call is and owes, and adds
everything up anew after each step.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import ClassVar, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.domain.books import Adjustment, Correction, Discrepancy
from gateway.domain.call import Operation, Usage
from gateway.domain.ledger import (
    Balance,
    Basis,
    Claim,
    Claimed,
    Denied,
    Entry,
    Event,
    Held,
    Outcome,
    Part,
    Replay,
    Reroute,
    Settlement,
    State,
    UsageRow,
)
from gateway.domain.transition import OnConflict
from gateway.ports import NotKnown, Store
from tests.contract.stores import BACKENDS, NOON, H, P, V, X, claim, expired, lines, written

_T = TypeVar("_T")
TICK = timedelta(seconds=1)
DAY = timedelta(days=1)
# Small amounts against small limits, and ticks about the lease: large ones let bugs live.
TICKS = (0, 1, 49, 50, 51, 99, 100, 101, 86_399, 86_400, 86_401)
PICKS = st.integers(0, 9)
"""Which of the calls there are, so that most steps are about one of them."""
WORKERS = ("w1", "w2")
FLAGS = ((), ("soft",), ("no_usage",), ("soft", "over_bound"))
MODELS = ("flare", "blaze")
PRICES = ("p1", "p2")
IDS = ("c1", "c2", "c3", "c4", "c5", "c6")
"""Of corrections and adjustments alike."""


@dataclass
class Call:
    """One call, as it was rerouted last, and what it now contributes to the usage of its day."""

    claim: Claim
    key: str | None
    state: State = H
    cost: int = 0
    images: int = 0
    tokens: int = 0
    part: int | None = None
    """Of the cost, that of the pictures which another model drew; it has one of the tokens."""
    doubtful: bool = False
    reroutes: int = 0


class LedgerMachine(RuleBasedStateMachine):
    """Drives all stores with the same calls."""

    backends: ClassVar[Mapping[str, Callable[[Path, OnConflict], Store]]] = BACKENDS

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(
            dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        )
        self.runner = asyncio.Runner()
        self.alarms: dict[str, int] = dict.fromkeys(self.backends, 0)
        self.stores: dict[str, Store] = {}
        self.calls: dict[str, Call] = {}
        self.forgotten: list[Call] = []
        self.adjustments: list[Adjustment] = []
        self.applied: set[str] = set()
        self.beats: dict[str, datetime] = {}
        self.replays: list[Replay] = []
        self.expected_alarms = 0
        self.made = 0
        self.now = NOON

    @initialize()
    def open(self) -> None:
        for name, backend in self.backends.items():
            self.stores[name] = self.run(self.opened(name, backend))
        # So that every step from the first on has something to be about.
        for worker in WORKERS:
            self.reserve_one(self.fresh(), 3, (None, 20, None), None, "f", worker)

    async def opened(self, name: str, backend: Callable[[Path, OnConflict], Store]) -> Store:
        def alarm(entry: Entry, settlement: Settlement) -> None:
            self.alarms[name] += 1

        return backend(Path(self.folder.name), alarm)

    def teardown(self) -> None:
        for store in self.stores.values():
            self.run(store.aclose())
        self.runner.close()
        self.folder.cleanup()

    def run(self, work: Coroutine[object, object, _T]) -> _T:
        return self.runner.run(work)

    def check(self, expected: _T, ask: Callable[[Store], Coroutine[object, object, _T]]) -> None:
        for name, store in self.stores.items():
            assert self.run(ask(store)) == expected, name

    def refused(self, ask: Callable[[Store], Coroutine[object, object, object]]) -> None:
        for store in self.stores.values():
            with pytest.raises(NotKnown):
                self.run(ask(store))

    def balance(self, account: str) -> Balance:
        drawn = [
            call
            for call in (*self.calls.values(), *self.forgotten)
            if account in {line.account for line in call.claim.lines}
        ]
        adjusted = sum(one.amount for one in self.adjustments if account in one.accounts)
        return Balance(
            posted=sum(call.cost for call in drawn) + adjusted,
            pending=sum(call.claim.bound for call in drawn if call.state is H),
        )

    def entry(self, call: Call, applied: bool) -> Entry:
        claimed = call.claim
        balances = tuple(self.balance(line.account) for line in claimed.lines)
        accounts = tuple(line.account for line in claimed.lines)
        return Entry(claimed.rid, call.state, claimed.bound, call.cost, applied, balances, accounts)

    @rule(ticks=st.sampled_from(TICKS))
    def wait(self, ticks: int) -> None:
        self.now += ticks * TICK

    def picked(self, pick: int) -> str:
        """The rid of a call, now and then of none."""
        rids = [*self.calls, "nobody"]
        return rids[pick % len(rids)]

    @rule(bound=st.integers(1, 4), worker=st.sampled_from(WORKERS))
    def reserve_freely(self, bound: int, worker: str) -> None:
        self.reserve_one(self.fresh(), bound, (None, None, None), None, "f", worker)

    def fresh(self) -> str:
        self.made += 1
        return f"r{self.made}"

    @rule(
        pick=PICKS,
        again=st.sampled_from((False, False, False, True)),
        bound=st.integers(0, 4),
        amounts=st.tuples(*[st.sampled_from((None, 5, 8, 20))] * 3),
        key=st.sampled_from((None, "i", "j")),
        fingerprint=st.sampled_from("fg"),
        worker=st.sampled_from(WORKERS),
        repeat=st.booleans(),
    )
    def reserve(
        self,
        pick: int,
        again: bool,
        bound: int,
        amounts: tuple[int | None, int | None, int | None],
        key: str | None,
        fingerprint: str,
        worker: str,
        repeat: bool,
    ) -> None:
        rid = self.picked(pick) if again else self.fresh()
        self.reserve_one(rid, bound, amounts, key, fingerprint, worker, repeat)

    def reserve_one(
        self,
        rid: str,
        bound: int,
        amounts: tuple[int | None, int | None, int | None],
        key: str | None,
        fingerprint: str,
        worker: str,
        repeat: bool = False,
    ) -> None:
        limits = lines(*amounts, at=self.now)
        wanted = replace(
            claim(rid, bound, limits=limits, at=self.now, key=key, fingerprint=fingerprint),
            lease_ends=self.now + 100 * TICK,
            worker=worker,
            repeat_unknown=repeat,
        )
        self.check(self.expect_reserve(wanted), lambda store: store.ledger.reserve(wanted))

    def expect_reserve(self, wanted: Claim) -> Held | Denied | Claimed:
        known = self.calls.get(wanted.rid)
        if known is not None:
            return Held(wanted.rid, self.entry(known, False).balances, duplicate=True)
        owner = self.owner(wanted.idempotency_key)
        free = (V, X) if wanted.repeat_unknown else (V,)
        if owner is not None and wanted.at - owner.claim.at <= DAY:
            same = owner.claim.fingerprint == wanted.fingerprint
            if not (same and owner.state in free):
                return Claimed(owner.claim.rid, owner.state, same)
        for line in wanted.lines:
            before = self.balance(line.account)
            amount = line.limit.amount
            if amount is not None and before.posted + before.pending + wanted.bound > amount:
                return Denied(line, before)
        if owner is not None:
            owner.key = None
        call = self.calls[wanted.rid] = Call(wanted, wanted.idempotency_key)
        return Held(wanted.rid, self.entry(call, True).balances)

    def owner(self, key: str | None) -> Call | None:
        """The call that a key stands for, however old."""
        mine = (call for call in self.calls.values() if key is not None and call.key == key)
        return next(mine, None)

    @rule(key=st.sampled_from("ij"), fingerprint=st.sampled_from("fg"))
    def ask_for_a_key(self, key: str, fingerprint: str) -> None:
        owner, expected = self.owner(key), None
        if owner is not None and self.now - owner.claim.at <= DAY:
            same = owner.claim.fingerprint == fingerprint
            if not (same and owner.state is V):
                expected = Claimed(owner.claim.rid, owner.state, same)
        self.check(
            expected, lambda store: store.ledger.claimed("growth", key, fingerprint, self.now)
        )

    @precondition(lambda self: self.calls)
    @rule(
        pick=PICKS,
        bound=st.integers(0, 6),
        amounts=st.tuples(*[st.sampled_from((None, 5, 8, 20))] * 3),
        model=st.sampled_from(MODELS),
        price_id=st.sampled_from(PRICES),
        late=st.sampled_from((False, False, True)),
    )
    def reroute(
        self,
        pick: int,
        bound: int,
        amounts: tuple[int | None, int | None, int | None],
        model: str,
        price_id: str,
        late: bool,
    ) -> None:
        """``late``: with the lines of now, which may not be all those that it was reserved with."""
        rid = self.picked(pick)
        call = self.calls.get(rid)
        reserved = self.now if call is None or late else call.claim.at
        limits = lines(*amounts, at=reserved)
        wanted = Reroute(rid, model, "openai", price_id, bound, limits, self.now)
        if call is None or call.state is not H:
            self.refused(lambda store: store.ledger.reroute(wanted))
            return
        expected = self.expect_reroute(call, wanted)
        self.check(expected, lambda store: store.ledger.reroute(wanted))
        now = call.claim

        async def way(store: Store) -> tuple[str, str, int, int]:
            found = await store.books.find(rid)
            assert found is not None
            kinds = [line.kind for line in await store.books.journal(rid)]
            return found.model, found.price_id, found.bound, kinds.count("B")

        self.check((now.model, now.price_id, now.bound, call.reroutes), way)

    def expect_reroute(self, call: Call, wanted: Reroute) -> Held | Denied:
        before = call.claim
        after = replace(
            before,
            model=wanted.model,
            price_id=wanted.price_id,
            bound=wanted.bound if wanted.bound > before.bound else before.bound,
        )
        more = after.bound - before.bound
        mine = {line.account for line in before.lines}
        for line in wanted.lines:
            amount, there = line.limit.amount, self.balance(line.account)
            if more == 0 or amount is None or line.account not in mine:
                continue
            if there.posted + there.pending + more > amount:
                return Denied(line, Balance(there.posted, there.pending - before.bound))
        call.claim = after
        call.reroutes += after != before
        balances = tuple(self.balance(line.account) for line in wanted.lines)
        return Held(wanted.rid, balances, duplicate=after == before)

    @precondition(lambda self: self.calls)
    @rule(
        pick=PICKS,
        cost=st.integers(0, 4),
        images=st.integers(0, 2),
        flags=st.sampled_from(FLAGS),
        part=st.sampled_from((None, None, 0, 1, 3)),
    )
    def settle(
        self, pick: int, cost: int, images: int, flags: tuple[str, ...], part: int | None
    ) -> None:
        part = None if part is None else min(part, cost)
        self.end(self.picked(pick), Event.SETTLE, cost, images, flags, part)

    @precondition(lambda self: self.calls)
    @rule(pick=PICKS)
    def void(self, pick: int) -> None:
        self.end(self.picked(pick), Event.VOID)

    @precondition(lambda self: self.calls)
    @rule(pick=PICKS, flags=st.sampled_from(FLAGS))
    def expire(self, pick: int, flags: tuple[str, ...]) -> None:
        self.end(self.picked(pick), Event.EXPIRE, images=2, flags=flags)

    def end(
        self,
        rid: str,
        event: Event,
        cost: int = 0,
        images: int = 0,
        flags: tuple[str, ...] = (),
        part: int | None = None,
    ) -> None:
        drawn = None if part is None else Part("drawer", images, part, Usage(image_out=1))
        usage = Usage(text_in=cost, image_out=0 if drawn is None else 1)
        end = Settlement(
            rid, event, Outcome.DELIVERED, Basis.USAGE, cost, usage, images, flags, drawn=drawn
        )
        call = self.calls.get(rid)
        if call is None:
            if event is Event.SETTLE:
                self.refused(lambda store: store.ledger.settle(end))
            else:
                nothing = Entry(rid, V, 0, 0, applied=False)
                self.check(nothing, lambda store: store.ledger.settle(end))
            return
        applied = self.expect_end(call, end)
        if call.state in (P, V) and not applied and event is not Event.EXPIRE:
            self.expected_alarms += call.cost != (cost if event is Event.SETTLE else 0)
        self.check(self.entry(call, applied), lambda store: store.ledger.settle(end))

    def expect_end(self, call: Call, end: Settlement) -> bool:
        if call.state in (P, V) or (call.state is X and end.event is Event.EXPIRE):
            return False
        call.images = call.tokens = 0
        call.doubtful = bool(set(end.flags) - {"soft"})
        match end.event:
            case Event.SETTLE:
                call.state, call.cost = P, end.cost
                call.images, call.tokens = end.images, end.usage.text_in
                call.part = None if end.drawn is None else end.drawn.cost
            case Event.VOID:
                call.state, call.cost = V, 0
            case Event.EXPIRE:
                call.state, call.cost = X, call.claim.bound
        return True

    @rule(worker=st.sampled_from(WORKERS))
    def beat(self, worker: str) -> None:
        self.beats[worker] = self.now
        busy = {call.claim.worker for call in self.calls.values() if call.state is H}
        self.beats = {
            name: at for name, at in self.beats.items() if name in busy or at >= self.now - DAY
        }
        self.check(None, lambda store: store.upkeep.beat(worker, self.now))

    @rule(limit=st.sampled_from((1, 2, 100)), silence=st.sampled_from((None, 0, 50, 100)))
    def sweep(self, limit: int, silence: int | None) -> None:
        silent_before = None if silence is None else self.now - silence * TICK
        dead = {name for name, at in self.beats.items() if silent_before and at < silent_before}
        over = sorted(
            (call.claim.lease_ends, rid)
            for rid, call in self.calls.items()
            if call.state is H and (call.claim.lease_ends < self.now or call.claim.worker in dead)
        )
        entries = []
        for _, rid in over[:limit]:
            call = self.calls[rid]
            self.expect_end(call, expired(rid))
            entries.append(self.entry(call, True))
        for call in self.calls.values():
            if self.now - call.claim.at > DAY:
                call.key = None
        self.check(entries, lambda store: store.ledger.sweep(self.now, limit, silent_before))

    @precondition(lambda self: self.calls)
    @rule(
        pick=PICKS,
        name=st.sampled_from(IDS),
        cost=st.integers(0, 4),
        images=st.integers(0, 2),
    )
    def correct(self, pick: int, name: str, cost: int, images: int) -> None:
        rid = self.picked(pick)
        said = Correction(name, rid, cost, "reason", "actor", self.now, images)
        call = self.calls.get(rid)
        if call is None:
            self.refused(lambda store: store.books.correct(said))
            return
        as_it_is = call.state is P and call.cost == cost and not call.doubtful
        applied = name not in self.applied and call.state is not H and not as_it_is
        if applied:
            self.applied.add(name)
            if call.state is not P:
                call.images, call.tokens = images, 0
            if call.part is not None:
                call.part = int(Fraction(call.part, call.cost) * cost) if call.cost else 0
            call.state, call.cost, call.doubtful = P, cost, False
        self.check(self.entry(call, applied), lambda store: store.books.correct(said))

    @rule(name=st.sampled_from(IDS), amount=st.integers(-4, 4))
    def adjust(self, name: str, amount: int) -> None:
        said = Adjustment(
            id=name,
            team="growth",
            model="flare",
            day=self.now.date().isoformat(),
            amount=amount,
            accounts=tuple(line.account for line in lines(at=self.now)),
            reason="reason",
            actor="actor",
            at=self.now,
        )
        applied = name not in self.applied
        if applied:
            self.applied.add(name)
            self.adjustments.append(said)
        self.check(applied, lambda store: store.books.adjust(said))

    @rule(age=st.sampled_from((-1, 0, 50, 86_400)), limit=st.sampled_from((1, 2, 100)))
    def forget(self, age: int, limit: int) -> None:
        before = self.now - age * TICK
        old = sorted(
            (call.claim.at, rid)
            for rid, call in self.calls.items()
            if call.claim.at < before
            and call.key is None
            and (call.state is V or (call.state is P and not call.doubtful))
        )[:limit]
        self.forgotten += [self.calls.pop(rid) for _, rid in old]
        self.check(len(old), lambda store: store.upkeep.forget(before, limit))

    @rule(avoided=st.integers(0, 4))
    def replay(self, avoided: int) -> None:
        hit = Replay("h", "growth", "k1", "flare", Operation.EDIT, 1, avoided, self.now)
        self.replays.append(hit)
        self.check(None, lambda store: store.ledger.replay(hit))

    def expect_usage(self) -> list[UsageRow]:
        rows: dict[tuple[str, str, str], UsageRow] = {}

        def add(day: str, key_id: str, model: str, **counts: int) -> None:
            row = rows.get((day, key_id, model), UsageRow(day, "growth", key_id, model))
            sums = {name: getattr(row, name) + number for name, number in counts.items()}
            rows[day, key_id, model] = replace(row, **sums)

        for call in (*self.calls.values(), *self.forgotten):
            if call.state in (P, X):
                unknown, split = call.state is X, call.part is not None
                day, part = call.claim.at.date().isoformat(), call.part or 0
                if split:
                    add(day, "k1", "drawer", images=call.images, image_out=1, cost=part)
                add(
                    day,
                    "k1",
                    call.claim.model,
                    requests=1,
                    images=0 if split else call.images,
                    text_in=call.tokens,
                    cost=call.cost - part,
                    unresolved=unknown,
                    unresolved_cost=unknown * call.cost,
                    flagged=call.doubtful,
                )
        for hit in self.replays:
            day = hit.at.date().isoformat()
            add(day, "k1", "flare", requests=1, images=1, cached_requests=1, avoided=hit.avoided)
        for one in self.adjustments:
            add(one.day, "", "flare", cost=one.amount)
        return [row for _, row in sorted(rows.items()) if row.requests or row.images or row.cost]

    @invariant()
    def the_books_agree(self) -> None:
        if not self.stores:
            return
        for store in self.stores.values():
            self.run(written(store.ledger))
        today = lines(at=self.now)
        self.check(
            [self.balance(line.account) for line in today],
            lambda store: store.ledger.balances(today),
        )
        self.check(self.expect_usage(), lambda store: store.ledger.usage())
        open_holds = sum(call.state is H for call in self.calls.values())
        self.check(open_holds, lambda store: store.ledger.open_holds())
        unresolved = sum(call.cost for call in self.calls.values() if call.state is X)
        self.check(unresolved, lambda store: store.ledger.unresolved())
        asking = [
            (rid, call.state, call.cost)
            for rid, call in sorted(self.calls.items())
            if call.state is X or (call.state is P and call.doubtful)
        ]

        async def asked(store: Store) -> list[tuple[str, State, int]]:
            return [(hold.rid, hold.state, hold.cost) for hold in await store.books.unresolved()]

        self.check(asking, asked)
        sound: list[Discrepancy] = []
        self.check(sound, lambda store: store.books.audit())
        assert self.alarms == dict.fromkeys(self.backends, self.expected_alarms)
