"""The ledger and the directory in one SQLite file: the store of a gateway on one machine.

Each write is one operation of the writer's next transaction (``sqlite_file``), each read goes
over a connection of its own. A reservation that nobody waits for any more is skipped where the
writer still can; otherwise it stands until the sweep ends it.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path

from gateway.domain.ledger import (
    Balance,
    Claim,
    Claimed,
    Denied,
    Entry,
    Event,
    Held,
    Line,
    Replay,
    Settlement,
    State,
    UsageRow,
)
from gateway.domain.money import Money
from gateway.domain.team import Key, Team
from gateway.domain.transition import (
    KEY_LIFETIME,
    Counts,
    OnConflict,
    contradicts,
    correction,
    counted_replay,
    expiry,
    ignore_conflict,
    transition,
    usage_day,
)
from gateway.ports import AlreadyExists, NotKnown, StoreError
from gateway.stores.rows import (
    claim_row,
    detail_of,
    key_of,
    key_row,
    micros,
    team_of,
    team_row,
)
from gateway.stores.sqlite_file import (
    BUSY_SECONDS,
    Reader,
    Writer,
    one_number,
    open_database,
)

_log = logging.getLogger(__name__)


class SQLiteStore:
    """One database file, open: ``ledger`` and ``directory`` are two views of it."""

    def __init__(self, writer: Writer, reader: Reader, on_conflict: OnConflict) -> None:
        self._writer = writer
        self._reader = reader
        self.ledger = SQLiteLedger(self, writer, reader, on_conflict)
        self.directory = SQLiteDirectory(writer, reader)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        on_conflict: OnConflict = ignore_conflict,
        busy_seconds: float = BUSY_SECONDS,
    ) -> SQLiteStore:
        """Opens the file, makes it (0600) where there is none, and brings its schema up to date.

        Blocks for as long as a check of the file takes; call it before serving. ``on_conflict``
        is called on the event loop for a repeated settlement that names another amount.
        ``busy_seconds`` is how long a lock of another program is waited for. Raises
        ``StoreError`` for a file that is corrupt, newer than this program, not ours, gone while
        its journal is still there, or on a network file system.
        """
        writer, reader = open_database(path, busy_seconds)
        return cls(writer, reader, on_conflict)

    async def aclose(self) -> None:
        """Commits what is queued and closes the file. Repeating it is harmless."""
        await self._reader.aclose()
        await self._writer.aclose()


class SQLiteLedger:
    """``Ledger`` on SQLite. Each write is one operation of the writer's next transaction."""

    def __init__(
        self,
        store: SQLiteStore,
        writer: Writer,
        reader: Reader,
        on_conflict: OnConflict,
    ) -> None:
        self._store = store
        self._writer = writer
        self._reader = reader
        self._on_conflict = on_conflict

    async def reserve(self, claim: Claim) -> Held | Denied | Claimed:
        if claim.bound < 0:
            raise ValueError("a bound is never negative")
        return await self._writer.submit(lambda db: _reserve(db, claim), droppable=True)

    async def settle(self, settlement: Settlement) -> Entry:
        if settlement.cost < 0:
            raise ValueError("a cost is never negative")
        at = None if settlement.at is None else micros(settlement.at)
        entry = await self._writer.submit(lambda db: _settle(db, settlement, at))
        if not entry.applied and contradicts(
            entry.state, settlement.event, entry.cost, settlement.cost
        ):
            self._on_conflict(entry, settlement)
        return entry

    async def replay(self, replay: Replay) -> None:
        row = (usage_day(replay.at), replay.team, replay.key_id, replay.model)
        self._writer.post(lambda db: _count(db, row, counted_replay(replay)), replay.rid)

    async def sweep(self, now: datetime, limit: int = 100) -> list[Entry]:
        return await self._writer.submit(lambda db: _sweep(db, now, limit))

    async def balances(self, lines: Sequence[Line]) -> list[Balance]:
        accounts = [line.account for line in lines]

        def read(db: sqlite3.Connection) -> list[Balance]:
            found = _balances(db, accounts)
            return [found[account] for account in accounts]

        return await self._reader.run(read)

    async def usage(self, since: str | None = None, until: str | None = None) -> list[UsageRow]:
        rows = await self._reader.run(
            lambda db: db.execute(_USAGE, {"since": since, "until": until}).fetchall()
        )
        return [UsageRow(*row) for row in rows]

    async def open_holds(self) -> int:
        return await self._reader.run(
            lambda db: one_number(db, "SELECT count(*) FROM hold WHERE state = 'H'")
        )

    async def unresolved(self) -> Money:
        return await self._reader.run(
            lambda db: one_number(db, "SELECT coalesce(sum(cost), 0) FROM hold WHERE state = 'X'")
        )

    async def ping(self) -> None:
        """Raises ``LedgerUnavailable`` when the file cannot be read, or is no longer there."""
        await self._reader.ping(_PING)

    async def aclose(self) -> None:
        """Closes the whole store, the directory too: they are one file."""
        await self._store.aclose()


class SQLiteDirectory:
    """``Directory`` on SQLite."""

    def __init__(self, writer: Writer, reader: Reader) -> None:
        self._writer = writer
        self._reader = reader

    async def find_key(self, digest: bytes) -> tuple[Team, Key] | None:
        def read(db: sqlite3.Connection) -> tuple[Team, Key] | None:
            found = db.execute(_KEY + " WHERE digest = ?", (digest,)).fetchone()
            if found is None:
                return None
            key = key_of(found)
            team = db.execute(_TEAM + " WHERE id = ?", (key.team,)).fetchone()
            return team_of(team), key

        return await self._reader.run(read)

    async def teams(self) -> list[Team]:
        rows = await self._reader.run(lambda db: db.execute(_TEAM + " ORDER BY id").fetchall())
        return [team_of(row) for row in rows]

    async def keys(self, team: str | None = None) -> list[Key]:
        rows = await self._reader.run(
            lambda db: db.execute(
                _KEY + " WHERE :team IS NULL OR team = :team ORDER BY team, id", {"team": team}
            ).fetchall()
        )
        return [key_of(row) for row in rows]

    async def create_team(self, team: Team) -> None:
        def write(db: sqlite3.Connection) -> None:
            if _exists(db, "SELECT 1 FROM team WHERE id = ?", team.id):
                raise AlreadyExists(f"there is a team {team.id} already")
            db.execute(
                "INSERT INTO team (models, limits, cache_enabled, disabled, time_zone, id)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                team_row(team),
            )

        await self._writer.submit(write)

    async def update_team(self, team: Team) -> None:
        def write(db: sqlite3.Connection) -> None:
            changed = db.execute(
                "UPDATE team SET models = ?, limits = ?, cache_enabled = ?, disabled = ?,"
                " time_zone = ? WHERE id = ?",
                team_row(team),
            )
            if changed.rowcount == 0:
                raise NotKnown(f"there is no team {team.id}")

        await self._writer.submit(write)

    async def create_key(self, key: Key, digest: bytes) -> None:
        def write(db: sqlite3.Connection) -> None:
            if not _exists(db, "SELECT 1 FROM team WHERE id = ?", key.team):
                raise NotKnown(f"there is no team {key.team}")
            if _exists(db, "SELECT 1 FROM key WHERE id = ?", key.id) or _exists(
                db, "SELECT 1 FROM key WHERE digest = ?", digest
            ):
                raise AlreadyExists(f"there is a key {key.id} already, or one with this secret")
            db.execute(
                "INSERT INTO key (id, digest, team, name, models, limits, created, expires,"
                " disabled, revoked) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                key_row(key, digest),
            )

        await self._writer.submit(write)

    async def revoke_key(self, key_id: str, at: datetime) -> Key:
        def write(db: sqlite3.Connection) -> Key:
            db.execute(
                "UPDATE key SET revoked = ? WHERE id = ? AND revoked IS NULL",
                (micros(at), key_id),
            )
            found = db.execute(_KEY + " WHERE id = ?", (key_id,)).fetchone()
            if found is None:
                raise NotKnown(f"there is no key {key_id}")
            return key_of(found)

        return await self._writer.submit(write)

    async def ping(self) -> None:
        await self._reader.ping(_PING)


_USAGE = """
SELECT day, team, key_id, model, requests, images, cached_requests, text_in, image_in, text_out,
       image_out, cost, avoided, unresolved, unresolved_cost, flagged
  FROM usage_daily
 WHERE requests > 0  -- a row whose calls were all voided counts nothing
   AND (:since IS NULL OR day >= :since) AND (:until IS NULL OR day <= :until)
 ORDER BY day, team, key_id, model
"""

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

_INSERT_HOLD = """
INSERT INTO hold (rid, state, bound, accounts, team, key_id, model, operation, upstream, images,
       price_id, fingerprint, idempotency_key, worker, at, day, lease_ends)
VALUES (?, 'H', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""

_JOURNAL = "INSERT INTO journal (at, rid, kind, pending, posted, detail) VALUES (?, ?, ?, ?, ?, ?)"

_TEAM = "SELECT id, models, limits, cache_enabled, disabled, time_zone FROM team"

_KEY = "SELECT id, team, name, models, limits, created, expires, disabled, revoked FROM key"

_PING = "SELECT account FROM balance LIMIT 1"


def _reserve(db: sqlite3.Connection, claim: Claim) -> Held | Denied | Claimed:
    known = db.execute("SELECT accounts FROM hold WHERE rid = ?", (claim.rid,)).fetchone()
    if known is not None:
        held = _balances(db, json.loads(known[0]))
        return Held(claim.rid, tuple(held.values()), duplicate=True)
    holder = _holder_of_key(db, claim)
    if isinstance(holder, Claimed):
        return holder
    found = _balances(db, dict.fromkeys(line.account for line in claim.lines))
    for line in claim.lines:
        amount = line.limit.amount
        if amount is not None and found[line.account].used + claim.bound > amount:
            return Denied(line, found[line.account])
    if holder is not None:
        db.execute("UPDATE hold SET idempotency_key = NULL WHERE rid = ?", (holder,))
    accounts = json.dumps(list(found))
    db.execute(
        "INSERT INTO balance (account, pending) SELECT value, ? FROM json_each(?) WHERE true"
        " ON CONFLICT DO UPDATE SET pending = pending + excluded.pending",
        (claim.bound, accounts),
    )
    at = micros(claim.at)
    db.execute(
        _INSERT_HOLD,
        claim_row(claim, accounts, micros(claim.lease_ends)),
    )
    db.execute(_JOURNAL, (at, claim.rid, State.HELD.value, claim.bound, 0, "{}"))
    return Held(
        claim.rid,
        tuple(
            Balance(found[line.account].posted, found[line.account].pending + claim.bound)
            for line in claim.lines
        ),
    )


def _holder_of_key(db: sqlite3.Connection, claim: Claim) -> Claimed | str | None:
    """Who has the claim's idempotency key: a call that keeps it, or the rid of one that yields.

    A voided call bought nothing, so the same request may run again under its key; a call of more
    than a day ago has outlived it.
    """
    if claim.idempotency_key is None:
        return None
    found = db.execute(
        "SELECT rid, state, fingerprint, at FROM hold WHERE team = ? AND idempotency_key = ?",
        (claim.team, claim.idempotency_key),
    ).fetchone()
    if found is None:
        return None
    rid, state, fingerprint, at = str(found[0]), State(found[1]), found[2], found[3]
    same = fingerprint == claim.fingerprint
    if at < micros(claim.at - KEY_LIFETIME) or (state is State.VOIDED and same):
        return rid
    return Claimed(rid, state, same)


def _settle(db: sqlite3.Connection, settlement: Settlement, at: int | None) -> Entry:
    """Applies one event. ``at`` is for the journal, in microseconds."""
    rid = settlement.rid
    found = db.execute(
        "SELECT state, bound, cost, accounts, flags, day, team, key_id, model"
        "  FROM hold WHERE rid = ?",
        (rid,),
    ).fetchone()
    if found is None:
        if settlement.event is Event.SETTLE:
            raise NotKnown(f"no reservation {rid} to settle")
        return Entry(rid, State.VOIDED, bound=0, cost=0, applied=False)
    state, bound, cost, accounts, flags = State(found[0]), found[1], found[2], found[3], found[4]
    row: tuple[str, str, str, str] = found[5:]
    move = transition(state, settlement.event, bound, cost, settlement.cost)
    if move.applied:
        kept_flags = json.dumps(settlement.flags)
        db.execute(
            "UPDATE hold SET state = ?, cost = ?, outcome = ?, basis = ?, flags = ? WHERE rid = ?",
            (
                move.state.value,
                move.cost,
                settlement.outcome.value,
                settlement.basis.value,
                kept_flags,
                rid,
            ),
        )
        db.execute(
            "UPDATE balance SET pending = pending + ?, posted = posted + ?"
            " WHERE account IN (SELECT value FROM json_each(?))",
            (move.pending, move.posted, accounts),
        )
        _count(db, row, correction(state, cost, json.loads(flags), move, settlement))
        db.execute(
            _JOURNAL,
            (at, rid, move.state.value, move.pending, move.posted, detail_of(settlement)),
        )
    after = _balances(db, json.loads(accounts))
    return Entry(rid, move.state, bound, move.cost, move.applied, tuple(after.values()))


def _sweep(db: sqlite3.Connection, now: datetime, limit: int) -> list[Entry]:
    instant = micros(now)
    db.execute(
        "UPDATE hold SET idempotency_key = NULL WHERE rid IN (SELECT rid FROM hold"
        " WHERE idempotency_key IS NOT NULL AND at < ? ORDER BY at LIMIT 1000)",
        (micros(now - KEY_LIFETIME),),
    )
    over = db.execute(
        "SELECT rid, bound FROM hold WHERE state = 'H' AND lease_ends < ?"
        " ORDER BY lease_ends, rid LIMIT ?",
        (instant, limit),
    ).fetchall()
    entries = []
    for rid, bound in over:
        db.execute("SAVEPOINT expiry")
        try:
            entries.append(_settle(db, expiry(rid, bound), at=instant))
        except (sqlite3.IntegrityError, OverflowError):
            # One hold that cannot be booked must not keep the others standing.
            db.execute("ROLLBACK TO expiry")
            _log.exception("the hold %s cannot be expired", rid)
        db.execute("RELEASE expiry")
    return entries


def _count(db: sqlite3.Connection, row: tuple[str, str, str, str], counts: Counts) -> None:
    if any(counts):
        db.execute(_COUNT, (*row, *counts))


def _balances(db: sqlite3.Connection, accounts: Iterable[str]) -> dict[str, Balance]:
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


def _exists(db: sqlite3.Connection, sql: str, value: str | bytes) -> bool:
    return db.execute(sql, (value,)).fetchone() is not None


def keys_in(path: Path) -> int:
    """How many keys the directory in a database file has; 0 where there is no such file yet.

    Raises ``StoreError``.
    """
    if not path.exists():
        return 0
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            return one_number(db, "SELECT count(*) FROM key")
    except sqlite3.Error as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
