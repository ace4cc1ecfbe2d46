"""`gateway db`: the schema of the database, looked at and brought up to date."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gateway.cli.common import (
    EXIT_FAILED,
    config_option,
    failures,
    json_option,
    load_settings,
    place_of,
    print_json,
    with_store,
)
from gateway.settings import Settings
from gateway.stores import postgres_schema
from gateway.stores.schema import Versions, sqlite_versions


@click.group()
def db() -> None:
    """Look at the database's schema, and bring it up to date."""


@db.command()
@config_option
def upgrade(config: Path | None) -> None:
    """Bring the database's schema up to date.

    Run it before a new release starts; gateways that run meanwhile go on. Repeating it, and
    running it twice at once, is harmless. SQLite needs it never: it brings itself up to date.
    """
    settings = load_settings(config, of_ones_own=True)
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
