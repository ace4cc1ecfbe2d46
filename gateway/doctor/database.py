"""The database: reached, of the right schema, writable, and kept where it is not lost."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from gateway.assembly import PEPPER_FILE, read_peppers
from gateway.doctor.clocks import compared
from gateway.doctor.disks import probe
from gateway.doctor.finding import Check, Finding, Topic, counted, sized
from gateway.domain.keys import PepperState, pepper_state
from gateway.domain.team import Key, Team
from gateway.ports import Clock, StoreError
from gateway.settings import Settings
from gateway.stores.postgres_glance import PostgresGlance, glance_at_postgres
from gateway.stores.postgres_link import APPLICATION, MEND, place
from gateway.stores.sqlite_glance import (
    SAFE_LIBRARY,
    SqliteGlance,
    glance_at_sqlite,
    is_network_disk,
    kind_of_disk,
)

CHECK_SECONDS = 6.0
LARGE_WAL_BYTES = 256 * 1024 * 1024
SOON = timedelta(days=14)
GRANT = "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO its role"
EACH_PROCESS = 2
"""Connections: the writer's and the reader's."""


async def sqlite(settings: Settings, path: Path, clock: Clock) -> Check:
    """The file, from its disk to its rows. It is read only, beside whoever writes it."""
    topic = Topic("database", str(path))
    yield judge_library(sqlite3.sqlite_version_info)
    # What a dead disk holds up first is in a thread, so that it holds up nothing else.
    kind = await asyncio.to_thread(kind_of_disk, path.parent)
    if is_network_disk(kind):
        yield topic.fail(
            f"on a network file system ({kind}), where SQLite loses data",
            "put it on a local disk, or use postgresql:// for several machines",
        )
        return
    if not path.exists():
        why = probe(path.parent)
        if why:
            yield topic.fail(
                f"is not there yet, and cannot be made: {why}",
                f"make {path.parent} writable for this user, or change storage.database",
            )
        else:
            yield topic.ok("is made by the first start")
        for finding in judge_teams(settings, (), (), clock.now()):
            yield finding
        return
    if why := _why_not_written(path):
        yield topic.fail(
            f"cannot be written: {why}",
            f"give {path}, and the folder it is in, to the user that runs the gateway",
        )
    ends = clock.monotonic() + CHECK_SECONDS
    try:
        found = await asyncio.to_thread(glance_at_sqlite, path, lambda: clock.monotonic() > ends)
    except StoreError as error:
        yield topic.fail(
            str(error).removeprefix(f"{path} "),
            "let this user read it and its folder; if it is damaged, restore a backup: gateway db "
            "restore",
        )
        return
    for finding in judge_sqlite(topic, found):
        yield finding
    for finding in judge_teams(settings, found.teams, found.keys, clock.now()):
        yield finding


def judge_library(version: tuple[int, ...]) -> Finding:
    topic = Topic("database", "SQLite library")
    said = ".".join(map(str, version))
    if version >= SAFE_LIBRARY:
        return topic.ok(said)
    return topic.warn(
        f"{said} has the WAL-reset race, which can damage a database while its log is moved into "
        "it; the gateway works around it with a lock of its own, other programs do not",
        "use a Python with SQLite 3.51.3 or newer; until then write to the file with nothing else",
    )


def judge_sqlite(topic: Topic, found: SqliteGlance) -> Iterator[Finding]:
    schema = found.schema
    if not found.ours:
        yield topic.fail(
            "is not a database of this gateway", "name another file in storage.database"
        )
        return
    if schema.too_new:
        yield topic.fail(
            f"has schema {schema.database}, this program knows {schema.program}",
            "use the newer release that upgraded it, or restore a backup from before",
        )
        return
    if schema.upgrade_needed:
        yield topic.ok(
            f"schema {schema.database} is brought to {schema.program} when a gateway starts; its "
            "rows were not looked at"
        )
    elif found.damage is None:
        yield topic.skipped(f"too large to be looked through in {CHECK_SECONDS:.0f} s")
    elif found.damage:
        yield topic.fail(
            f"is damaged: {found.damage}", "stop the gateway, and restore it from a backup"
        )
    else:
        yield topic.ok(f"whole and writable; schema {schema.database} is up to date")
    if found.journal_mode not in ("wal", ""):
        yield topic.warn(
            f"its journal mode is {found.journal_mode}, not wal",
            "nothing but the gateway should write to it; it sets the mode when it starts",
        )
    if found.wal_bytes > LARGE_WAL_BYTES:
        yield topic.warn(
            f"its log has {sized(found.wal_bytes)}, and is not moved into it",
            "end whatever has had it open for long: a sqlite3 shell, a backup tool",
        )


async def postgres(settings: Settings, url: str, clock: Clock) -> Check:
    """The server, the role, and the room that there is for gateways."""
    topic = Topic("database", place(url).removeprefix("PostgreSQL database "))
    began = clock.monotonic()
    try:
        found = await asyncio.to_thread(glance_at_postgres, url, APPLICATION)
    except StoreError as error:
        says = str(error).removeprefix(f"{place(url)} ").removesuffix(f"; {MEND}")
        yield topic.fail(says, GRANT if "permission denied" in says else MEND)
        return
    took = clock.monotonic() - began
    processes = settings.server.replicas * settings.server.workers
    for finding in judge_postgres(topic, found, processes):
        yield finding
    yield compared("PostgreSQL", found.now, clock.now(), min(took, 0.5))
    for finding in judge_teams(settings, found.teams, found.keys, clock.now()):
        yield finding


def judge_postgres(topic: Topic, found: PostgresGlance, processes: int) -> Iterator[Finding]:
    schema = found.schema
    if schema.too_new:
        yield topic.fail(
            f"has schema {schema.database}, this program knows {schema.program}",
            "use the newer release that upgraded it, or restore a backup from before",
        )
    elif schema.upgrade_needed:
        yield topic.fail(
            f"has schema {schema.database}, this program needs {schema.program}",
            "run: gateway db upgrade",
        )
    elif found.forbidden:
        yield topic.fail(
            f"the role may not read and write {', '.join(found.forbidden)}",
            GRANT,
        )
    elif found.refused:
        yield topic.fail(f"cannot be written: {found.refused}", "look into the log of the server")
    else:
        yield topic.ok(
            f"PostgreSQL {found.version}, schema {schema.database} is up to date, a row could be "
            "written (and was rolled back)"
        )
    if not found.durable:
        yield topic.warn(
            "fsync or full_page_writes is off: a crash of its machine loses charges, or the whole "
            "database",
            "ALTER SYSTEM SET fsync = on; ALTER SYSTEM SET full_page_writes = on",
        )
    if not found.standby_names:
        yield topic.ok("no synchronous standby: a failover may lose the last charges")
    elif found.standbys == 0:
        yield topic.fail(
            "synchronous_standby_names is set and no such standby answers: nothing is acknowledged",
            "bring a standby back, or empty synchronous_standby_names",
        )
    else:
        seen = (
            "its standbys cannot be seen by this role" if found.standbys is None else "one answers"
        )
        yield topic.ok(f"commits wait for a synchronous standby ({seen})")
    # Those that run already have theirs.
    needed = max(0, processes * EACH_PROCESS - found.ours)
    if needed > found.free:
        yield topic.warn(
            f"has room for {counted(found.free, 'more connection')}; {processes} processes need "
            f"{needed}",
            "raise max_connections (or the limit of the role or the database), or lower "
            "server.replicas and server.workers",
        )
    else:
        yield topic.ok(f"room for {counted(found.free, 'more connection')}, {needed} needed")
    if found.shared:
        yield topic.fail(
            "a pooler in between shares connections by transaction: settings and locks of one "
            "process would be another's",
            "set pool_mode = session for this database, or leave the pooler out",
        )
    elif found.pooled:
        yield topic.ok("behind a pooler that shares by session")
    if not found.encrypted and not found.local:
        yield topic.warn(
            "the connection is not encrypted, and leaves this machine",
            "add ?sslmode=verify-full&sslrootcert=/path/ca.pem to storage.database",
        )


def judge_teams(
    settings: Settings, made_teams: Sequence[Team], made: Sequence[Key], now: datetime
) -> Iterator[Finding]:
    """Keys that cannot be used, or soon cannot; teams that nothing limits."""
    database = settings.storage.database
    readable = settings.storage.pepper or (
        isinstance(database, Path) and (database.parent / PEPPER_FILE).exists()
    )
    live = [
        key for key in made if key.revoked is None and (key.expires is None or key.expires > now)
    ]
    if readable and live:
        # Where it cannot be read, the check of the pepper says so.
        with suppress(StoreError):
            yield from _judge_peppers(settings, live)
    declared = [
        (f"{one.team}, {one.name or 'a key of the file'}", one.expires)
        for one in settings.declared_keys
        if not one.disabled
    ]
    for name, expires in declared + [
        (f"{key.team}, {key.name or key.id}", key.expires) for key in live
    ]:
        if expires is not None and now < expires <= now + SOON:
            days = counted((expires - now).days, "day")
            yield Topic("keys", name).warn(
                f"expires in {days}, on {expires:%Y-%m-%d}",
                "give the team a new one: gateway key create, or teams in the file",
            )
    teams = [*settings.teams.values(), *made_teams]
    free = sorted(
        team.id for team in teams if not team.disabled and not any(team.limits.budgets.values())
    )
    if free:
        yield Topic("teams").ok(
            f"without a hard budget, so that nothing ends what they spend: {', '.join(free)}"
        )
    if not settings.declared_keys and not live:
        yield Topic("keys").warn(
            "nobody has a key: nobody can call",
            "declare a team in the file, or run: gateway team create, then gateway key create",
        )


def _judge_peppers(settings: Settings, live: Sequence[Key]) -> Iterator[Finding]:
    peppers = read_peppers(settings)
    states = [pepper_state(key, peppers) for key in live]
    topic = Topic("secrets", "pepper")
    if lost := states.count(PepperState.LOST):
        yield topic.fail(
            f"{counted(lost, 'key')} in the database cannot be used: what they were hashed with is "
            "not configured",
            "put that pepper into storage.old_peppers; gateway key list shows which keys",
        )
    if old := states.count(PepperState.OLD):
        yield topic.ok(f"{counted(old, 'key')} still need storage.old_peppers")
    if settings.storage.old_peppers and not old and not lost:
        yield topic.ok(
            "no key that a command made needs storage.old_peppers any more; those of the file may"
        )
    if not lost:
        yield topic.ok(f"fits the {counted(len(live), 'key')} in the database")


def _why_not_written(path: Path) -> str:
    """Asked of the system, not tried: to open and close a file that SQLite has open in this process
    would give its locks away."""
    follow = os.access in os.supports_effective_ids
    for one, word in ((path, "the file"), (path.parent, "its folder")):
        if not os.access(one, os.W_OK, effective_ids=follow):
            return f"{word} is read-only for this user"
    return ""
