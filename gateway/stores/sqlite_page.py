"""A batch of calls on money in one transaction of the SQLite file: read once, decided in Python
(``page``), and written by one statement a table.

Each statement hands the interpreter's lock over several times, each row that is read does too, and
the event loop waits at the other end: a batch has eight statements, where each call of it used to
have twelve, and reads nothing that this connection was the last to write (``Known``).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from gateway.domain.ledger import Balance
from gateway.domain.transition import Counts
from gateway.stores.page import (
    EVENT_COLUMNS,
    HOLD_COLUMNS,
    NEW_HOLD_COLUMNS,
    HeldRow,
    Needs,
    Outdated,
    Page,
)

_NOTHING = Balance()

Decide: TypeAlias = Callable[[Page], Any]


MOST_KNOWN = 20_000
"""Holds, and accounts: more are forgotten."""


class Asked(NamedTuple):
    """A call, and what of the books it will look at."""

    needs: Needs
    decide: Decide


class Known:
    """What a connection's last page has left in the file: balances, and calls that are still held.
    It needs not be read again while no other connection has written, and must be forgotten when
    this one has, by anything but ``decide_all``, or was rolled back."""

    def __init__(self) -> None:
        self.holds: dict[str, HeldRow] = {}
        self.accounts: dict[str, Balance] = {}
        self._version = -1

    def forget(self) -> None:
        # New ones: an answer may still look at a page of the old.
        self.holds, self.accounts = {}, {}

    def renew(self, db: sqlite3.Connection) -> None:
        """Forgets what may have changed. Inside a transaction, so that it stays true in it."""
        (version,) = db.execute("PRAGMA data_version").fetchone()
        crowded = len(self.holds) > MOST_KNOWN or len(self.accounts) > MOST_KNOWN
        if version != self._version or crowded:
            # Both together: the accounts of a known hold are known.
            self.forget()
            self._version = version


def book(db: sqlite3.Connection, asked: Sequence[Asked]) -> list[Any]:
    """What each call is answered, in order; the exception where it raised one, which alone then
    leaves no trace. Inside a transaction.

    Raises what makes the whole transaction doubtful (``is_of_one_call``).
    """
    db.execute("SAVEPOINT page")
    try:
        answers = decide_all(db, asked)
    except Exception as error:
        if not is_of_one_call(error):
            raise
        db.execute("ROLLBACK TO page")
        if len(asked) == 1:
            answers = [error]
        else:
            # Something that one of them asked for. The others must not suffer.
            half = len(asked) // 2
            answers = [*book(db, asked[:half]), *book(db, asked[half:])]
    db.execute("RELEASE page")
    return answers


def is_of_one_call(error: Exception) -> bool:
    """Whether an error is that of what was asked for, not that of the file or the transaction."""
    guilty = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError)
    return not isinstance(error, sqlite3.Error) or isinstance(error, guilty)


def decide_all(db: sqlite3.Connection, asked: Sequence[Asked]) -> list[Any]:
    """As ``book``, but what a statement raises leaves the transaction to be rolled back."""
    page = Page()
    _read(db, page, [one.needs for one in asked])
    answers = [_answer(one.decide, page) for one in asked]
    _write(db, page)
    return answers


def decide_known(db: sqlite3.Connection, asked: Sequence[Asked], known: Known) -> list[Any]:
    """As ``decide_all``, with what is ``known``, and trusting that a hold that is to be made is not
    there yet. Raises ``Outdated``, or ``IntegrityError``, where it is, and then ``known`` has to be
    forgotten, as whenever this raises."""
    known.renew(db)
    page = Page(known.holds, known.accounts)
    made = {one.needs.makes for one in asked if one.needs.makes}
    _read(db, page, [one.needs for one in asked], made)
    answers = [_answer(one.decide, page) for one in asked]
    # One that was not made was refused as if it were new. Is it?
    refused = [rid for rid in made if rid not in page.holds]
    if refused and next(_HOLDS.found(db, refused), None) is not None:
        raise Outdated
    _write(db, page)
    for rid in page.ended:
        del page.holds[rid]
    return answers


def _answer(decide: Decide, page: Page) -> Any:
    try:
        return decide(page)
    except Exception as error:  # noqa: BLE001 - its waiter hears of it
        return error


def _read(
    db: sqlite3.Connection, page: Page, needs: Sequence[Needs], made: Container[str] = ()
) -> None:
    """Reads what is needed, but what the page has, and the holds that will be ``made``."""
    holds = page.holds
    rids = {
        rid: None for need in needs for rid in need.rids if rid not in holds and rid not in made
    }
    read = page.know(_HOLDS.found(db, rids)) if rids else []
    keys = [key for need in needs for key in need.keys]
    if keys:
        read += page.know(db.execute(_HOLDS_OF_KEYS, (json.dumps(keys),)))
    accounts = page.accounts
    wanted = {account for need in needs for account in need.accounts if account not in accounts}
    for hold in read:
        wanted.update([account for account in hold.accounts if account not in accounts])
    if wanted:
        accounts.update(dict.fromkeys(wanted, _NOTHING))
        for account, posted, pending in _BALANCES.found(db, wanted):
            accounts[account] = Balance(posted, pending)


def _write(db: sqlite3.Connection, page: Page) -> None:
    balances = page.accounts
    _WRITE_BALANCES.run(
        db, [(name, balances[name].posted, balances[name].pending) for name in page.moved]
    )
    # A key leaves its old hold before it comes to a new one.
    if page.keyless:
        db.execute(_LEAVE_KEYS, (json.dumps(list(page.keyless)),))
    _MAKE_HOLDS.run(db, page.made_rows())
    _END_HOLDS.run(db, [(hold.rid, *hold.end()) for hold in page.ended.values()])
    _REROUTE_HOLDS.run(db, [(one.rid, *one.route, one.bound) for one in page.rerouted.values()])
    _WRITE_EVENTS.run(db, page.events)
    _COUNT.run(db, [(*key, *counts) for key, counts in page.usage.items()])


def _row(width: int, *more: str) -> str:
    return f"({', '.join(['?'] * width + [*more])})"


class _Rows:
    """A statement that takes many rows: ``{rows}`` in it stands for their parameters.

    It is written out for some numbers of rows only, so that few texts have to be prepared; of 23
    rows 16 go at once, and then 7. Parameters keep their order in all of them.
    """

    SIZES = (64, 32, 16, 8, 7, 6, 5, 4, 3, 2, 1)

    def __init__(self, statement: str, row: str, one: str = "") -> None:
        """``one`` does the same for a single row, in less time."""
        self._texts = [
            (size, statement.format(rows=", ".join([row] * size))) for size in self.SIZES
        ]
        if one:
            self._texts[-1] = (1, one)

    def run(self, db: sqlite3.Connection, rows: Sequence[tuple[object, ...]]) -> None:
        done = 0
        for text, size in self._parts(len(rows)):
            some = rows[done : done + size]
            db.execute(text, [value for row in some for value in row])
            done += size

    def found(self, db: sqlite3.Connection, names: Iterable[str]) -> Iterator[tuple[Any, ...]]:
        """What a query for rows of one name each finds."""
        asked, done = list(names), 0
        for text, size in self._parts(len(asked)):
            yield from db.execute(text, asked[done : done + size])
            done += size

    def _parts(self, length: int) -> Iterator[tuple[str, int]]:
        for size, text in self._texts:
            while length >= size:
                yield text, size
                length -= size


# CROSS JOIN: what is asked for comes first, and each is looked up by its key. A list of values is
# read in half the time of a list in JSON.
_HOLDS = _Rows(
    f"""
SELECT {HOLD_COLUMNS} FROM (VALUES {{rows}}) AS asked CROSS JOIN hold WHERE rid = asked.column1
""",  # noqa: S608 - names of columns
    "(?)",
    one=f"SELECT {HOLD_COLUMNS} FROM hold WHERE rid = ?",  # noqa: S608 - names of columns
)

# Each is looked up in the index hold_idempotency. (SQLite knows ->> since 3.38 alone.)
_HOLDS_OF_KEYS = f"""
SELECT {HOLD_COLUMNS} FROM json_each(?) AS asked CROSS JOIN hold
 WHERE hold.team = json_extract(asked.value, '$[0]')
   AND hold.idempotency_key = json_extract(asked.value, '$[1]')
   AND hold.idempotency_key IS NOT NULL
"""  # noqa: S608 - names of columns

_BALANCES = _Rows(
    """
SELECT account, posted, pending FROM (VALUES {rows}) AS asked CROSS JOIN balance
 WHERE account = asked.column1
""",
    "(?)",
)

_WRITE_BALANCES = _Rows(
    """
INSERT INTO balance (account, posted, pending) VALUES {rows}
    ON CONFLICT DO UPDATE SET posted = excluded.posted, pending = excluded.pending
""",
    _row(3),
)

_LEAVE_KEYS = """
UPDATE hold SET idempotency_key = NULL WHERE rid IN (SELECT value FROM json_each(?))
"""

_MAKE_HOLDS = _Rows(
    f"INSERT INTO hold ({NEW_HOLD_COLUMNS}, state) VALUES {{rows}}",  # noqa: S608
    _row(len(NEW_HOLD_COLUMNS.split(", ")), "'H'"),
)

_END_HOLDS = _Rows(
    """
UPDATE hold SET state = new.column2, cost = new.column3, outcome = new.column4,
       basis = new.column5, flags = new.column6, drawn_model = new.column7,
       drawn_images = new.column8, drawn_cost = new.column9
  FROM (VALUES {rows}) AS new WHERE hold.rid = new.column1
""",
    _row(9),
    one="""
UPDATE hold SET state = ?2, cost = ?3, outcome = ?4, basis = ?5, flags = ?6, drawn_model = ?7,
       drawn_images = ?8, drawn_cost = ?9
 WHERE rid = ?1
""",
)

_REROUTE_HOLDS = _Rows(
    """
UPDATE hold SET model = new.column2, upstream = new.column3, price_id = new.column4,
       bound = new.column5
  FROM (VALUES {rows}) AS new WHERE hold.rid = new.column1
""",
    _row(5),
)

_WRITE_EVENTS = _Rows(f"INSERT INTO journal ({EVENT_COLUMNS}) VALUES {{rows}}", _row(6))  # noqa: S608

_SUMS = ", ".join(f"{name} = {name} + excluded.{name}" for name in Counts._fields)

_COUNT = _Rows(
    f"""
INSERT INTO usage_daily (day, team, key_id, model, {", ".join(Counts._fields)}) VALUES {{rows}}
    ON CONFLICT DO UPDATE SET {_SUMS}
""",  # noqa: S608 - names of columns
    _row(4 + len(Counts._fields)),
)
