"""One connection to PostgreSQL: how it is made, what it waits for, and what its errors mean.

It knows nothing of money. Each process has two: the writer's and the reader's (money.md 4).
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg import errors
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow

from gateway.ports import StoreError

_T = TypeVar("_T")

APPLICATION = "image-gateway"
STATEMENT_MILLISECONDS = 2_000
LOCK_MILLISECONDS = 1_000
IDLE_MILLISECONDS = 5_000
"""How long the server keeps the locks of a transaction whose client says nothing."""
SILENCE_SECONDS = 2.4
"""How long a server may say nothing to a statement, which it would have ended itself by then: it is
frozen, or the network is."""
OLDEST_SERVER = 14

MEND = "mend storage.database, or the server: psql with the same url must work from here"
"""What to do where it cannot be reached, or does not let us in."""

_TICK_SECONDS = 0.1
_HINT = re.compile(r" Is the server running [^?]*\?")
"""What libpq asks of whoever reads its error: ``MEND`` says it, for all of them."""
_DEFAULTS: dict[str, str | int] = {
    "connect_timeout": 2,
    "application_name": APPLICATION,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 3_000,
    "target_session_attrs": "primary",
}
"""Where the url does not say otherwise."""
_GONE = ("08", "57", "25", "53", "XX")
"""Classes of errors after which the connection is of no more use: it broke, the server goes down,
it became a standby, it has no room."""

# remote_apply is more than we need, and somebody's decision.
_SETTINGS = """
SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit')
           WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, false),
       set_config('statement_timeout', %s, false),
       set_config('lock_timeout', %s, false),
       set_config('idle_in_transaction_session_timeout', %s, false),
       (SELECT count(set_config(name, value, false))
          FROM unnest(%s::text[], %s::text[]) AS asked (name, value)),
       pg_is_in_recovery(), pid, backend_start::text
  FROM pg_stat_activity WHERE pid = pg_backend_pid()
"""
# Of a connection that writes: each row by an index, and each plan made once. While the tables are
# new, the server would choose to read all of them, and go on with that plan until it next looks at
# its statistics, whatever they have grown to; and it plans anew each time for a list of one.
_BY_INDEX = {
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
}
_READ_ONLY = "SELECT set_config('default_transaction_read_only', 'on', false)"
# What adds up many rows needs room for its groups: in the server's 4 MB it sorts them on the disk.
# And to compile its statement takes longer than what that saves.
_LONG_READS = """
SELECT set_config('default_transaction_read_only', 'on', false), set_config('jit', 'off', false),
       set_config('work_mem',
           greatest(pg_size_bytes(current_setting('work_mem')) / 1024, 32768) || 'kB', false)
"""


class ServerSilent(psycopg.OperationalError):
    """The server has not answered in time, or is not the one that may be written."""


class Link(psycopg.Connection[TupleRow]):
    """A connection that waits for its server with an end.

    ``process`` is the one that serves it: its id, and when it began.
    """

    patient = False
    """Waits for ever: for what may take long."""
    process: tuple[int, str] = (0, "")

    def number(self, sql: LiteralString, asked: Sequence[object] = ()) -> int:
        """The one whole number that a query answers."""
        found = self.execute(sql, asked).fetchone()
        return int(found[0]) if found else 0

    def wait(self, gen: PQGen[_T], *arguments: Any, **options: Any) -> _T:
        if self.patient:
            return super().wait(gen, *arguments, **options)
        options["interval"] = _TICK_SECONDS
        try:
            return super().wait(_until_silent(gen), **options)
        except ServerSilent:
            # Whatever comes after this must not wait again.
            self.pgconn.finish()
            raise


def _until_silent(gen: PQGen[_T]) -> Generator[Any, Any, _T]:
    """``gen``, until the server has said nothing for too long."""
    try:
        wanted = next(gen)
        silent = 0
        while True:
            ready = yield wanted
            silent = 0 if ready else silent + 1
            if silent * _TICK_SECONDS > SILENCE_SECONDS:
                raise ServerSilent("the server does not answer")
            wanted = gen.send(ready)
    except StopIteration as done:
        value: _T = done.value
        return value


def connect(url: str, *, read_only: bool = False, patient: bool = False) -> Link:
    """A connection of ours to the server that may be written, in autocommit.

    ``patient``: without time limits. Raises ``psycopg.Error``; ``StoreError`` for a url that
    cannot be read.
    """
    link = Link.connect(_parameters(url), autocommit=True)
    link.patient = patient
    try:
        limits = (STATEMENT_MILLISECONDS, LOCK_MILLISECONDS, IDLE_MILLISECONDS)
        asked = [str(0 if patient else limit) for limit in limits]
        plans = {} if read_only or patient else _BY_INDEX
        said = link.execute(_SETTINGS, [*asked, [*plans], [*plans.values()]])
        (*_, standby, pid, began) = said.fetchone() or (True, 0, "")
        if standby:
            raise ServerSilent("the server is a standby: name the primary")
        link.process = pid, began
        if read_only:
            link.execute(_LONG_READS if patient else _READ_ONLY)
    except BaseException:
        link.close()
        raise
    return link


def connect_at_start(url: str, *, read_only: bool = False, patient: bool = False) -> Link:
    """As ``connect``. Raises ``StoreError``, which says what to do, and never the password."""
    try:
        link = connect(url, read_only=read_only, patient=patient)
    except psycopg.Error as error:
        why = _HINT.sub("", said_of(error, url)).rstrip(".")
        raise StoreError(f"{place(url)} cannot be used: {why}; {MEND}") from None
    version = link.info.server_version // 10_000
    if version < OLDEST_SERVER:
        link.close()
        raise StoreError(f"{place(url)} is PostgreSQL {version}; {OLDEST_SERVER} is the oldest")
    encoding = link.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        # One that has not every character would fail a transaction for the name of a model.
        link.close()
        raise StoreError(
            f"{place(url)} has the encoding {encoding}, and UTF8 is needed: make it with "
            "CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0"
        )
    return link


def place(url: str) -> str:
    """The database that a url names, for people: without its user and password."""
    known = _read(url)
    host, port = known.get("host", "localhost"), known.get("port", 5432)
    return f"PostgreSQL database {known.get('dbname', '')} at {host}:{port}"


def said_of(error: BaseException, url: str) -> str:
    """What an error says, on one line, without the password."""
    text = " ".join(str(error).split()) or type(error).__name__
    known = _read(url)
    for name in ("password", "sslpassword"):
        secret = known.get(name)
        if secret:
            text = text.replace(str(secret), "***")
    return text


def is_transient(error: BaseException) -> bool:
    """Whether the same transaction may succeed when it is sent again: what failed is the server,
    the network or a race, and not what was asked."""
    if isinstance(error, errors.UniqueViolation):
        # Somebody else's transaction was first; this time its row will be seen.
        return True
    asked = (psycopg.DataError, psycopg.IntegrityError)
    return isinstance(error, psycopg.Error) and not isinstance(error, asked)


def is_of_no_use(link: Link, error: BaseException) -> bool:
    """Whether a connection should be replaced after this error."""
    state = error.sqlstate if isinstance(error, psycopg.Error) else None
    broken = link.closed or link.broken
    return broken or (state is not None and state.startswith(_GONE))


def _parameters(url: str) -> str:
    known = _read(url)
    defaults = {name: value for name, value in _DEFAULTS.items() if name not in known}
    return make_conninfo(url, **defaults)


def _read(url: str) -> dict[str, Any]:
    try:
        return dict(conninfo_to_dict(url))
    except psycopg.ProgrammingError:
        # What it says may have a part of the password in it.
        raise StoreError(
            "storage.database is no url that PostgreSQL's client can read: a parameter has an "
            "unknown name, or a character of the user or the password is not percent-encoded"
        ) from None
