"""A look at a PostgreSQL database: what it says of itself, and whether it could be written.

The one thing that is written is rolled back.
"""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg

from gateway.domain.team import Key, Team
from gateway.ports import StoreError
from gateway.stores.postgres_link import Link, connect_at_start, place, said_of
from gateway.stores.postgres_schema import schema_of
from gateway.stores.rows import KEY_COLUMNS, TEAM_COLUMNS, key_of, team_of, team_row
from gateway.stores.schema import Versions

_SERVER = """
SELECT current_setting('fsync') = 'on' AND current_setting('full_page_writes') = 'on',
       current_setting('synchronous_commit'), current_setting('synchronous_standby_names'),
       (SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')),
       (SELECT count(*) FROM pg_stat_replication WHERE sync_state IS NULL)
"""
# Without the connections of this look: one that was closed may still be counted for a moment.
_ROOM = """
WITH others AS (SELECT * FROM pg_stat_activity WHERE pid <> ALL(%s::int[]))
SELECT least(
           current_setting('max_connections')::bigint
               - current_setting('superuser_reserved_connections')::bigint
               - coalesce(current_setting('reserved_connections', true), '0')::bigint
               - (SELECT count(*) FROM others WHERE backend_type = 'client backend'),
           (SELECT CASE WHEN datconnlimit < 0 THEN 1000000 ELSE datconnlimit - (
                SELECT count(*) FROM others WHERE datname = current_database()) END
              FROM pg_database WHERE datname = current_database()),
           (SELECT CASE WHEN rolconnlimit < 0 THEN 1000000 ELSE rolconnlimit - (
                SELECT count(*) FROM others WHERE usename = current_user) END
              FROM pg_roles WHERE rolname = current_user)),
       (SELECT count(*) FROM others
         WHERE datname = current_database() AND application_name = %s)
"""
_TABLES = """
SELECT relname FROM pg_class
 WHERE relkind = 'r' AND relname <> 'schema_version'
   AND relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'schema_version'::regclass)
   AND NOT (has_table_privilege(oid, 'SELECT') AND has_table_privilege(oid, 'INSERT')
            AND has_table_privilege(oid, 'UPDATE') AND has_table_privilege(oid, 'DELETE'))
 ORDER BY relname
"""
_TEAMS = f"SELECT {TEAM_COLUMNS} FROM team"  # noqa: S608 - names of columns
_KEYS = f"SELECT {KEY_COLUMNS} FROM key"  # noqa: S608 - names of columns
_ADD_TEAM = (
    "INSERT INTO team (models, limits, cache_enabled, disabled, time_zone, id)"
    " VALUES (%s, %s, %s, %s, %s, %s)"
)


@dataclass(frozen=True, slots=True)
class PostgresGlance:
    """``forbidden`` are the tables that the role may not change, ``refused`` is why a row could not
    be written. ``standbys`` answer as synchronous ones; None: the role may not see that. ``free``
    is how many more connections there may be, ``ours`` how many gateways have. ``shared``: two idle
    clients were given one server process, as only a pooler that shares by transaction does."""

    version: str
    schema: Versions
    encrypted: bool
    local: bool
    now: datetime
    durable: bool = True
    synchronous_commit: str = "on"
    standby_names: str = ""
    standbys: int | None = 0
    free: int = 0
    ours: int = 0
    pooled: bool = False
    shared: bool = False
    forbidden: tuple[str, ...] = ()
    refused: str = ""
    teams: tuple[Team, ...] = ()
    keys: tuple[Key, ...] = ()


def glance_at_postgres(url: str, application: str) -> PostgresGlance:
    """Blocks for a few seconds at the most. ``application`` is what gateways call themselves.
    Raises ``StoreError``, which never has the password."""
    link = connect_at_start(url)
    with link:
        try:
            return _look(link, url, application)
        except psycopg.Error as error:
            raise StoreError(f"{place(url)} cannot be read: {said_of(error, url)}") from None


def _look(link: Link, url: str, application: str) -> PostgresGlance:
    with connect_at_start(url, read_only=True) as other:
        shared = other.process == link.process
        looking = [link.process[0], other.process[0]]
    durable, commit, names, standbys, unseen = _row(link, _SERVER)
    free, ours = _row(link, _ROOM, looking, application)
    schema = schema_of(link)
    forbidden: tuple[str, ...] = ()
    refused, teams, keys = "", tuple[Team, ...](), tuple[Key, ...]()
    if schema.database == schema.program:
        forbidden = tuple(name for (name,) in link.execute(_TABLES).fetchall())
        refused = "" if forbidden else _why_not_written(link, url)
        if not forbidden:
            teams = tuple(map(team_of, link.execute(_TEAMS)))
            keys = tuple(map(key_of, link.execute(_KEYS)))
    (now,) = _row(link, "SELECT clock_timestamp()")
    return PostgresGlance(
        version=str(link.info.parameter_status("server_version")).split()[0],
        schema=schema,
        encrypted=bool(link.pgconn.ssl_in_use),
        local=_is_local(link.info.hostaddr or link.info.host),
        now=now,
        durable=durable,
        synchronous_commit=commit,
        standby_names=names,
        standbys=None if unseen else standbys,
        free=free,
        ours=ours,
        pooled=link.info.backend_pid != link.process[0],
        shared=shared,
        forbidden=forbidden,
        refused=refused,
        teams=teams,
        keys=keys,
    )


def _row(link: Link, sql: str, *asked: object) -> tuple[Any, ...]:
    found = link.execute(sql.encode(), asked or None).fetchone()
    assert found is not None, "a row of aggregates"
    return found


def _why_not_written(link: Link, url: str) -> str:
    """Empty where a row could be written; it is gone again."""
    try:
        with link.transaction(force_rollback=True):
            link.execute(_ADD_TEAM, team_row(Team(id=f"doctor-{secrets.token_hex(8)}")))
    except psycopg.Error as error:
        return said_of(error, url)
    return ""


def _is_local(host: str) -> bool:
    if not host or host.startswith("/") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
