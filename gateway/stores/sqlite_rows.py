"""What the views of the SQLite file have in common: the statements on balances, usage and journal.

Each runs inside an operation of the writer, or on the reader's connection.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple

from gateway.domain.ledger import Balance, Entry, Part, State
from gateway.domain.money import Money
from gateway.domain.transition import Counts, Move
from gateway.stores.rows import micros, part_of

PING = "SELECT account FROM balance LIMIT 1"


class Booked(NamedTuple):
    """A hold as an event finds it. ``accounts`` and ``flags`` are JSON text."""

    rid: str
    state: State
    bound: Money
    cost: Money
    accounts: str
    flags: str
    day: str
    team: str
    key_id: str
    model: str
    drawn_model: str
    drawn_images: int
    drawn_cost: Money

    @property
    def drawn(self) -> Part | None:
        return part_of(self.drawn_model, self.drawn_images, self.drawn_cost)


def booked(db: sqlite3.Connection, rid: str) -> Booked | None:
    found = db.execute(
        "SELECT rid, state, bound, cost, accounts, flags, day, team, key_id, model,"
        "       drawn_model, drawn_images, drawn_cost FROM hold WHERE rid = ?",
        (rid,),
    ).fetchone()
    return None if found is None else Booked(found[0], State(found[1]), *found[2:])


def entry_of(db: sqlite3.Connection, hold: Booked, move: Move) -> Entry:
    """``hold`` after ``move``, with what its accounts are now."""
    balances = balances_of(db, json.loads(hold.accounts))
    after, accounts = tuple(balances.values()), tuple(balances)
    return Entry(hold.rid, move.state, hold.bound, move.cost, move.applied, after, accounts)


def balances_of(db: sqlite3.Connection, accounts: Iterable[str]) -> dict[str, Balance]:
    """The balance of each account, in their order; of one that has no row yet, nothing."""
    balances = {account: Balance() for account in accounts}
    rows = db.execute(
        "SELECT account, posted, pending FROM balance"
        " WHERE account IN (SELECT value FROM json_each(?))",
        (json.dumps(list(balances)),),
    )
    for account, posted, pending in rows:
        balances[account] = Balance(posted, pending)
    return balances


def move_balances(db: sqlite3.Connection, accounts: str, pending: Money, posted: Money) -> None:
    """Adds to accounts (JSON text of a list) that have their rows."""
    db.execute(
        "UPDATE balance SET pending = pending + ?, posted = posted + ?"
        " WHERE account IN (SELECT value FROM json_each(?))",
        (pending, posted, accounts),
    )


def count(
    db: sqlite3.Connection, day: str, team: str, key_id: str, gains: Iterable[tuple[str, Counts]]
) -> None:
    """Adds to the roll-up of a day, by model."""
    for model, counts in gains:
        if any(counts):
            db.execute(_COUNT, (day, team, key_id, model, *counts))


def write_journal(
    db: sqlite3.Connection,
    at: datetime | None,
    rid: str,
    kind: str,
    *,
    pending: Money = 0,
    posted: Money = 0,
    detail: str = "{}",
) -> None:
    db.execute(
        "INSERT INTO journal (at, rid, kind, pending, posted, detail) VALUES (?, ?, ?, ?, ?, ?)",
        (None if at is None else micros(at), rid, kind, pending, posted, detail),
    )


def exists(db: sqlite3.Connection, sql: str, value: str | bytes) -> bool:
    return db.execute(sql, (value,)).fetchone() is not None


_COUNT = """
INSERT INTO usage_daily (day, team, key_id, model, requests, images, cached_requests, text_in,
       image_in, text_out, image_out, cost, avoided, unresolved, unresolved_cost, flagged)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET
       requests = requests + excluded.requests,
       images = images + excluded.images,
       cached_requests = cached_requests + excluded.cached_requests,
       text_in = text_in + excluded.text_in,
       image_in = image_in + excluded.image_in,
       text_out = text_out + excluded.text_out,
       image_out = image_out + excluded.image_out,
       cost = cost + excluded.cost,
       avoided = avoided + excluded.avoided,
       unresolved = unresolved + excluded.unresolved,
       unresolved_cost = unresolved_cost + excluded.unresolved_cost,
       flagged = flagged + excluded.flagged
"""
