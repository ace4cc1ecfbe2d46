"""`gateway db`: the schema of the database, and its backup."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gateway.assembly import PEPPER_FILE
from gateway.cli.common import (
    EXIT_FAILED,
    config_option,
    fail,
    failures,
    json_option,
    load_settings,
    place_of,
    print_json,
    require_folder,
    require_servable,
    with_store,
)
from gateway.clock import SystemClock
from gateway.settings import Settings
from gateway.stores import postgres_schema
from gateway.stores.backup import Contents, may_be_replaced, open_backup, write_backup
from gateway.stores.postgres_backup import postgres_snapshot, restore_postgres
from gateway.stores.schema import Versions, sqlite_versions
from gateway.stores.sqlite_backup import restore_sqlite, sqlite_snapshot


@click.group(short_help="The schema: look, upgrade. The books: back up, restore.")
def db() -> None:
    """Look at the database's schema, bring it up to date, back it up and restore it."""


@db.command()
@config_option
def upgrade(config: Path | None) -> None:
    """Bring the database's schema up to date.

    Run it before a new release starts; gateways that run meanwhile go on. Repeating it, and
    running it twice at once, is harmless. SQLite needs it never: it brings itself up to date.

    A configuration that `gateway check` refuses is refused here too, with 2, before the database
    is touched: no gateway could start on the new schema.
    """
    settings = load_settings(config, of_ones_own=True)
    require_servable(settings)
    where, database = place_of(settings), settings.storage.database
    with failures():
        if isinstance(database, Path):
            found = sqlite_versions(database)
        else:
            found = postgres_schema.upgrade(database.reveal())
    if isinstance(database, Path):
        # Opening it is all that it takes.
        with_store(settings, lambda store: store.ledger.ping())
    if found.upgrade_needed:
        click.echo(f"{where}: schema {found.database} is now {found.program}")
    else:
        click.echo(f"{where}: schema {found.database} is up to date")


@db.command()
@json_option
@config_option
def status(as_json: bool, config: Path | None) -> None:
    """Say which schema the database has, and which this program needs.

    Exits with 1 where they differ, so that no gateway would start: a PostgreSQL database that has
    to be upgraded, or a database that a newer release has upgraded.
    """
    settings = load_settings(config, of_ones_own=True)
    where = place_of(settings)
    with failures():
        found = _versions(settings)
    if as_json:
        print_json(
            {
                "database": where,
                "schema": found.database,
                "program": found.program,
                "upgrade_needed": found.upgrade_needed,
                "too_new": found.too_new,
            }
        )
    else:
        click.echo(f"{where}: schema {found.database}; this program needs {found.program}")
        click.echo(_advice(found, settings))
    by_itself = isinstance(settings.storage.database, Path)
    if found.too_new or (found.upgrade_needed and not by_itself):
        sys.exit(EXIT_FAILED)


@db.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--force", is_flag=True, help="Replace FILE where it is a backup already.")
@config_option
def backup(file: Path, force: bool, config: Path | None) -> None:
    """Write the books, teams and keys to FILE, while gateways run.

    It is what they were at one instant: every charge that a client was told of before is in it.
    SQLite and PostgreSQL have the same format, so it is also the way from one to the other.

    Exits with 1 where the books in it do not add up; it is kept all the same.
    """
    settings = load_settings(config, of_ones_own=True)
    database = settings.storage.database
    if file.exists() and not force:
        fail(f"{file} is there already; name another file, or use --force", EXIT_FAILED)
    if isinstance(database, Path) and file.resolve() == database.resolve():
        fail(f"{file} is the database itself; name another file", EXIT_FAILED)
    require_folder(file)
    with failures():
        if file.exists() and not may_be_replaced(file):
            fail(f"{file} is there and is no backup: it is not replaced; name another", EXIT_FAILED)
    with failures():
        snapshot = (
            sqlite_snapshot(database)
            if isinstance(database, Path)
            else postgres_snapshot(database.reveal())
        )
        with snapshot as found:
            contents, discrepancies = write_backup(file, found, SystemClock().now())
    click.echo(f"{place_of(settings)} is backed up to {file}: {_counted(contents)}")
    click.echo(f"The pepper is not in it, and without it no key is known: keep {_pepper(settings)}")
    if discrepancies:
        fail(
            f"its books do not add up: {len(discrepancies)} sums differ, as they do in the "
            "database; run: gateway ledger verify",
            EXIT_FAILED,
        )
    click.echo("Its books add up.")


@db.command(short_help="Read the backup FILE into an empty database.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@config_option
def restore(file: Path, config: Path | None) -> None:
    """Read the backup FILE into an empty database, all of it or nothing.

    An SQLite file is made where there is none; a PostgreSQL database is made with createdb, and
    its schema with `gateway db upgrade`. Start gateways on it afterwards.

    Exits with 1 where the restored books do not add up.
    """
    settings = load_settings(config, of_ones_own=True)
    database = settings.storage.database
    with failures(), open_backup(file) as found:
        # Makes the file, or looks whether the schema is there.
        with_store(settings, lambda store: store.ledger.ping())
        if isinstance(database, Path):
            restore_sqlite(database, found)
        else:
            restore_postgres(database.reveal(), found)
        contents = found.contents
    made = f"made {contents.created:%Y-%m-%d %H:%M} UTC from {contents.kind}"
    click.echo(f"{file}, {made}, is restored to {place_of(settings)}: {_counted(contents)}")
    if contents.open_holds:
        click.echo(
            "Calls that ran then are still held: each is posted at its bound once its lease is "
            "over and a gateway runs; gateway ledger unresolved lists them."
        )
    click.echo(f"Keys are known only with the pepper they were made with: {_pepper(settings)}")
    if discrepancies := with_store(settings, lambda store: store.books.audit()):
        fail(
            f"the restored books do not add up: {len(discrepancies)} sums differ; run: gateway "
            "ledger verify",
            EXIT_FAILED,
        )
    click.echo("The books add up.")


def _counted(contents: Contents) -> str:
    rows = contents.rows
    return (
        f"{rows['hold']} calls ({contents.open_holds} running), {rows['journal']} lines of the "
        f"journal, {rows['team']} teams, {rows['key']} keys"
    )


def _pepper(settings: Settings) -> str:
    """Where it is; never what it is."""
    database = settings.storage.database
    if settings.storage.pepper or not isinstance(database, Path):
        return f"what storage.pepper and storage.old_peppers are in {settings.file}"
    return str(database.parent / PEPPER_FILE)


def _versions(settings: Settings) -> Versions:
    database = settings.storage.database
    if isinstance(database, Path):
        return sqlite_versions(database)
    return postgres_schema.versions(database.reveal())


def _advice(found: Versions, settings: Settings) -> str:
    if found.too_new:
        return "a newer release has upgraded it: use that one"
    if not found.upgrade_needed:
        return "nothing to do"
    if isinstance(settings.storage.database, Path):
        return "it is brought up to date when a gateway starts"
    return "run: gateway db upgrade"
