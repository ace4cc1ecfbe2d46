"""The rows that one transaction decides about: locked, changed in Python, written back at once.

::

    learn    the accounts of the holds that are asked for, without locks
    lock     every account in order of its name, then every hold in order of its rid
    decide   each call against the locked rows (``page``)
    write    one statement a table, whatever the number of calls

Every writer takes its locks in this order, so no two of them can wait for each other, and the
round trips of a transaction do not grow with it. A balance that is missing is made before it is
locked: two first uses of an account meet at that row.

A writer remembers what never changes (``Known``): which accounts its own holds have, and which
accounts there are. So nearly every transaction has nothing to learn, and locks as it begins.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from gateway.domain.ledger import Balance
from gateway.domain.transition import Counts
from gateway.stores import page
from gateway.stores.page import (
    EVENT_COLUMNS,
    HOLD_COLUMNS,
    NEW_HOLD_COLUMNS,
    HeldRow,
    Needs,
    Outdated,
    accounts_in,
)
from gateway.stores.postgres_link import Link

MOST_KNOWN = 20_000
"""Holds, and accounts: more are forgotten."""

_LEARN = "SELECT accounts FROM hold WHERE rid = ANY(%s::text[])"

_MAKE_BALANCES = """
INSERT INTO balance (account) SELECT account FROM unnest(%s::text[]) AS account ORDER BY account
ON CONFLICT DO NOTHING
"""

_LOCK_BALANCES = """
SELECT account, posted, pending FROM balance WHERE account = ANY(%s::text[])
 ORDER BY account FOR UPDATE
"""

_LOCK_HOLDS = f"""
SELECT {HOLD_COLUMNS} FROM hold WHERE rid = ANY(%s::text[]) ORDER BY rid FOR UPDATE
"""  # noqa: S608

_LOCK_HOLDS_AND_KEYS = f"""
SELECT {HOLD_COLUMNS} FROM hold
 WHERE rid IN (SELECT unnest(%s::text[]) UNION ALL
               SELECT keyed.rid FROM unnest(%s::text[], %s::text[]) AS asked (team, key)
                 JOIN hold AS keyed
                   ON keyed.team = asked.team AND keyed.idempotency_key = asked.key
                WHERE keyed.idempotency_key IS NOT NULL)
 ORDER BY rid FOR UPDATE OF hold
"""  # noqa: S608

_WRITE_BALANCES = """
UPDATE balance SET posted = new.posted, pending = new.pending
  FROM json_populate_recordset(NULL::balance, %s) AS new WHERE balance.account = new.account
"""

_WRITE_HOLDS = """
UPDATE hold SET state = new.state, cost = new.cost, outcome = new.outcome, basis = new.basis,
       flags = new.flags, idempotency_key = new.idempotency_key, bound = new.bound,
       model = new.model, upstream = new.upstream, price_id = new.price_id,
       drawn_model = new.drawn_model, drawn_images = new.drawn_images, drawn_cost = new.drawn_cost
  FROM json_populate_recordset(NULL::hold, %s) AS new WHERE hold.rid = new.rid
"""

_MAKE_HOLDS = f"""
INSERT INTO hold ({NEW_HOLD_COLUMNS}, state)
SELECT {NEW_HOLD_COLUMNS}, 'H' FROM json_populate_recordset(NULL::hold, %s)
"""  # noqa: S608

_JOURNAL = f"""
INSERT INTO journal ({EVENT_COLUMNS})
SELECT {EVENT_COLUMNS} FROM json_populate_recordset(NULL::journal, %s)
"""  # noqa: S608

_COUNT = f"""
INSERT INTO usage_daily AS kept SELECT * FROM json_populate_recordset(NULL::usage_daily, %s)
ON CONFLICT (day, team, key_id, model) DO UPDATE SET
       {", ".join(f"{name} = kept.{name} + excluded.{name}" for name in Counts._fields)}
"""  # noqa: S608

_ADJUSTMENT = """
INSERT INTO adjustment (id, at, rid, team, key_id, model, day, accounts, amount, reason, actor)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""


_USAGE_KEY = ("day", "team", "key_id", "model")
_NEW_HOLD = NEW_HOLD_COLUMNS.split(", ")
_EVENT = EVENT_COLUMNS.split(", ")
_END = (
    "state", "cost", "outcome", "basis", "flags", "drawn_model", "drawn_images", "drawn_cost",
)  # fmt: skip


class Known:
    """What a writer has committed, as far as it never changes: the accounts of holds that it made
    and that are still held, and accounts that have a row. Where it knows any, it trusts that a hold
    which is to be made is not there yet: one that is there is locked all the same, and then
    ``Outdated`` where its accounts are not. It has to forget whenever a transaction fails."""

    def __init__(self) -> None:
        self.holds: dict[str, tuple[str, ...]] = {}
        self.accounts: set[str] = set()

    def forget(self) -> None:
        self.holds.clear()
        self.accounts.clear()

    def unknown(self, needs: Collection[Needs]) -> list[str]:
        """The holds whose accounts have to be asked for."""
        trusting = bool(self.accounts)
        return sorted(
            {
                rid
                for need in needs
                for rid in need.rids
                if rid not in self.holds and not (trusting and rid == need.makes)
            }
        )

    def committed(self, page: Page) -> None:
        if len(self.holds) > MOST_KNOWN or len(self.accounts) > MOST_KNOWN:
            self.forget()
        self.accounts.update(page.accounts)
        for rid in page.made:
            self.holds[rid] = page.holds[rid].accounts
        for rid in page.ended:
            self.holds.pop(rid, None)


class Page(page.Page):
    """The locked rows of one transaction."""

    @classmethod
    def learn(cls, link: Link, needs: Collection[Needs], known: Known) -> Learnt:
        """Asks for the accounts of the holds that are not known; inside a pipeline."""
        rids = known.unknown(needs)
        return Learnt(needs, known, link.execute(_LEARN, (rids,)) if rids else None)

    @classmethod
    def lock(cls, link: Link, learnt: Learnt) -> Page:
        """Waits for the rows, in order, and reads them. Raises ``Outdated``."""
        with link.pipeline():
            locking = cls.begin_locking(link, learnt)
        return cls.locked(locking)

    @classmethod
    def begin_locking(cls, link: Link, learnt: Learnt) -> Locking:
        """Asks for the rows, in order; inside a pipeline."""
        accounts = sorted(learnt.accounts())
        rids = sorted({rid for need in learnt.needs for rid in need.rids})
        keys = sorted({key for need in learnt.needs for key in need.keys})
        balances = holds = None
        if accounts:
            if not learnt.known.accounts.issuperset(accounts):
                link.execute(_MAKE_BALANCES, (accounts,))
            balances = link.execute(_LOCK_BALANCES, (accounts,))
        if keys:
            teams, names = [key[0] for key in keys], [key[1] for key in keys]
            holds = link.execute(_LOCK_HOLDS_AND_KEYS, (rids, teams, names))
        elif rids:
            holds = link.execute(_LOCK_HOLDS, (rids,))
        return Locking(len(accounts), balances, holds)

    @classmethod
    def locked(cls, locking: Locking) -> Page:
        """What was locked, once the pipeline has been left. Raises ``Outdated`` where an account
        that was known is not there: it was another database."""
        locked = cls()
        for account, posted, pending in locking.balances.fetchall() if locking.balances else ():
            locked.accounts[account] = Balance(posted, pending)
        if len(locked.accounts) < locking.accounts:
            raise Outdated
        locked.know(locking.holds.fetchall() if locking.holds else ())
        return locked

    def write(self, link: Link) -> None:
        """Sends everything that was decided; inside a pipeline."""
        moved = [
            {"account": account, "posted": balance.posted, "pending": balance.pending}
            for account, balance in self.accounts.items()
            if account in self.moved
        ]
        changed = {*self.ended, *self.rerouted, *self.keyless}
        usage = [
            {**dict(zip(_USAGE_KEY, key, strict=True)), **counts._asdict()}
            for key, counts in sorted(self.usage.items())
        ]
        # A key leaves its old hold before it comes to a new one.
        for statement, rows in (
            (_WRITE_BALANCES, moved),
            (_WRITE_HOLDS, [_row(self.holds[rid]) for rid in changed if rid not in self.made]),
            (_MAKE_HOLDS, [dict(zip(_NEW_HOLD, row, strict=True)) for row in self.made_rows()]),
            (_WRITE_HOLDS, [_row(self.holds[rid]) for rid in changed if rid in self.made]),
            (_JOURNAL, [dict(zip(_EVENT, event, strict=True)) for event in self.events]),
            (_COUNT, usage),
        ):
            if rows:
                link.execute(statement, (json.dumps(rows),))
        for adjustment in self.adjustments:
            link.execute(_ADJUSTMENT, adjustment)


def _row(hold: HeldRow) -> dict[str, Any]:
    """What may change of a hold."""
    return {
        "rid": hold.rid,
        "bound": hold.bound,
        "idempotency_key": hold.idempotency_key,
        **hold.route._asdict(),
        **dict(zip(_END, hold.end(), strict=True)),
    }


@dataclass(frozen=True, slots=True)
class Learnt:
    """What ``Page.lock`` has to lock; ``accounts`` once the pipeline has been left."""

    needs: Collection[Needs]
    known: Known
    _found: Any

    def accounts(self) -> set[str]:
        named = {account for need in self.needs for account in need.accounts}
        for need in self.needs:
            for rid in need.rids:
                named.update(self.known.holds.get(rid, ()))
        for (accounts,) in self._found.fetchall() if self._found is not None else ():
            named.update(accounts_in(accounts))
        return named


@dataclass(frozen=True, slots=True)
class Locking:
    """What was asked for: so many ``accounts``, and what their balances and the holds are."""

    accounts: int
    balances: Any
    holds: Any
