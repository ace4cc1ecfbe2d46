"""`gateway key`: keys of the teams that the directory holds. A secret is shown once."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path

import click

from gateway.cli.common import (
    EXIT_FAILED,
    Day,
    config_option,
    describe_limits,
    fail,
    json_option,
    keys_of_the_file,
    limit_options,
    load_settings,
    models_of,
    no_team,
    peppers_of,
    print_json,
    print_table,
    warn_of,
    with_store,
)
from gateway.clock import SystemClock
from gateway.domain import keys
from gateway.domain.team import Key, Limits
from gateway.ports import NotKnown, Store


@click.group()
def key() -> None:
    """Create, list and revoke keys."""


@key.command()
@click.option("--team", "team", required=True, help="The team it belongs to.")
@click.option("--name", default="", help="A name for people.")
@click.option("--models", help="Comma-separated names; default: all of the team's.")
@click.option(
    "--expires",
    type=Day(or_moment=True),
    help="The instant it stops working (UTC).",
)
@limit_options()
@json_option
@config_option
def create(
    team: str,
    name: str,
    models: str | None,
    expires: datetime | None,
    as_json: bool,
    config: Path | None,
    **limits: int | None,
) -> None:
    """Create a key and print its secret, this once."""
    if sys.stdout is None:  # As in ``gateway key create >&-``: click prints nothing then.
        fail("standard output is closed: nobody would see the key's secret", EXIT_FAILED)
    settings = load_settings(config, of_ones_own=True)
    if team in settings.teams:
        fail(f"team {team} is declared in {settings.file}; add its key there", EXIT_FAILED)
    now = SystemClock().now()
    until = None if expires is None else expires.replace(tzinfo=UTC)
    if until is not None and until <= now:
        fail(f"--expires {until:%Y-%m-%d %H:%M} UTC is over already", EXIT_FAILED)
    minted, pepper = keys.mint(), peppers_of(settings).current
    made = Key(
        id=minted.id,
        team=team,
        name=name,
        models=models_of(models, settings),
        limits=Limits(**limits),
        created=now,
        expires=until,
        pepper=keys.pepper_id(pepper),
    )
    digest = keys.digest(pepper, minted.secret)

    async def create_it(store: Store) -> None:
        found = [one for one in await store.directory.teams() if one.id == team]
        if not found:
            raise await no_team(store, settings, team)
        if found[0].disabled:
            fail(f"team {team} is disabled: no key of it works", EXIT_FAILED)
        await store.directory.create_key(made, digest)

    with_store(settings, create_it)
    warn_of(settings, made.limits, made.models)
    try:
        if as_json:
            print_json({**_describe(made), "secret": minted.secret})
            return
        click.echo(f"key {minted.id} of team {team}; its secret, shown this once:", err=True)
        click.echo(minted.secret)
    except OSError:
        # Nobody knows it then, and nobody will: a key that works is not left to lie about.
        with_store(settings, lambda store: store.directory.revoke_key(made.id, now))
        with contextlib.suppress(OSError):
            click.echo(f"key {made.id} is revoked again: its secret could not be shown", err=True)
        raise


@key.command("list")
@click.option("--team", "team", help="Only this team's.")
@json_option
@config_option
def list_keys(team: str | None, as_json: bool, config: Path | None) -> None:
    """List every key, of the file and of the directory; never a secret.

    One that says "old pepper" was not used since the pepper changed: it works for as long as that
    one is in storage.old_peppers. "lost pepper": it was made with one that is in no setting.
    """
    settings = load_settings(config, of_ones_own=True)
    peppers = peppers_of(settings)

    async def read(store: Store) -> tuple[list[Key], set[str]]:
        teams = (*settings.teams.values(), *await store.directory.teams())
        if team is not None and all(one.id != team for one in teams):
            raise await no_team(store, settings, team)
        declared = await keys_of_the_file(settings, store)
        made = await store.directory.keys(team)
        return [*declared, *made], {one.id for one in teams if one.disabled}

    every, disabled = with_store(settings, read)
    found = [one for one in every if team is None or one.team == team]
    found = [replace(one, disabled=one.disabled or one.team in disabled) for one in found]
    found.sort(key=lambda one: (one.team, one.id))
    if as_json:
        print_json(
            [{**_describe(one), "pepper": keys.pepper_state(one, peppers).value} for one in found]
        )
        return
    rows = [
        (
            one.id,
            one.team,
            one.name or "-",
            "file" if one.declared else "directory",
            _said(one, peppers),
            "never" if one.expires is None else f"{one.expires:%Y-%m-%d %H:%M}",
        )
        for one in found
    ]
    print_table(("KEY", "TEAM", "NAME", "FROM", "STATE", "EXPIRES"), rows)


@key.command()
@click.argument("key_id", metavar="KEY")
@config_option
def revoke(key_id: str, config: Path | None) -> None:
    """Revoke the key with the id KEY, within five seconds, for good."""
    settings = load_settings(config, of_ones_own=True)

    async def revoke_it(store: Store) -> Key:
        if any(one.id == key_id for one in await keys_of_the_file(settings, store)):
            fail(f"key {key_id} is declared in {settings.file}; remove it there", EXIT_FAILED)
        try:
            return await store.directory.revoke_key(key_id, SystemClock().now())
        except NotKnown:
            known = (*await keys_of_the_file(settings, store), *await store.directory.keys())
            raise _no_key(key_id, known) from None

    revoked = with_store(settings, revoke_it)
    click.echo(f"key {revoked.id} of team {revoked.team} is revoked")


def _no_key(asked: str, known: Sequence[Key]) -> NotKnown:
    """What was meant perhaps: a name, an id with a slip of the pen, or a secret, which is not
    repeated."""
    if asked.startswith(keys.PREFIX):
        why = "that is a key's secret, and its id is needed"
        found = [one.id for one in known if one.id in asked.split("_")]
    else:
        why = f"there is no key {asked}"
        found = [one.id for one in known if one.name == asked and one.revoked is None]
        if len(found) != 1:
            found = get_close_matches(asked, [one.id for one in known], n=1)
    near = f"did you mean {found[0]}? " if found else ""
    return NotKnown(f"{why}; {near}gateway key list shows all")


def _said(one: Key, peppers: keys.Peppers) -> str:
    """Its state, and the pepper that it still needs."""
    found = keys.pepper_state(one, peppers)
    return _state(one) + ("" if found is keys.PepperState.CURRENT else f", {found} pepper")


def _state(one: Key) -> str:
    if one.revoked is not None:
        return "revoked"
    if one.disabled:
        return "disabled"
    if one.expires is not None and one.expires <= SystemClock().now():
        return "expired"
    return "active"


def _describe(one: Key) -> dict[str, object]:
    return {
        "id": one.id,
        "team": one.team,
        "name": one.name,
        "declared": one.declared,
        "state": _state(one),
        "models": None if one.models is None else sorted(one.models),
        "created": one.created.isoformat() if one.created else None,
        "expires": one.expires.isoformat() if one.expires else None,
        "limits": describe_limits(one.limits),
    }
