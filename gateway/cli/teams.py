"""`gateway team`: the teams that the directory holds; those of the file are only listed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from gateway.cli.common import (
    EXIT_FAILED,
    NONE,
    TimeZone,
    config_option,
    describe_limits,
    fail,
    json_option,
    limit_options,
    load_settings,
    models_of,
    no_team,
    of_user,
    per_user_options,
    place_of,
    print_json,
    print_table,
    say_limits,
    warn_of,
    with_store,
)
from gateway.domain.team import ANY_MODEL, Limits, PerUser, Team
from gateway.ports import Store
from gateway.settings import is_team_name


@click.group()
def team() -> None:
    """Create, change, list and revoke teams."""


@team.command()
@click.argument("name")
@click.option("--models", help="Comma-separated names; default: every model.")
@click.option("--no-cache", is_flag=True, help="Never share results between requests.")
@click.option(
    "--time-zone",
    type=TimeZone(),
    default="UTC",
    show_default=True,
    help="Where its days, weeks and months begin.",
)
@limit_options()
@per_user_options()
@config_option
def create(
    name: str,
    models: str | None,
    no_cache: bool,
    time_zone: str,
    config: Path | None,
    **given: int | None,
) -> None:
    """Create the team NAME, with its limits."""
    settings = load_settings(config, of_ones_own=True)
    if not is_team_name(name):
        fail(f"{name!r} is not a team's name: use a-z, 0-9, - and _", EXIT_FAILED)
    if name in settings.teams:
        fail(f"team {name} is declared in {settings.file}; change it there", EXIT_FAILED)
    limits, of_each, required = of_user(given)
    made = Team(
        name,
        models_of(models, settings) or frozenset({ANY_MODEL}),
        Limits(**limits),
        cache_enabled=not no_cache,
        time_zone=time_zone,
        per_user=PerUser(Limits(**of_each), bool(required)),
    )
    with_store(settings, lambda store: store.directory.create_team(made))
    warn_of(settings, made.limits, made.models)
    click.echo(f"team {name} created in {place_of(settings)}")
    there = "" if config is None else f" --config {shlex.quote(str(config))}"
    click.echo(f"now: gateway key create --team {name}{there}")


@team.command(short_help="Change the team NAME: what is named, nothing else.")
@click.argument("name")
@click.option("--models", help="Comma-separated names; none: every model.")
@click.option("--cache/--no-cache", default=None, help="Share results between requests, or never.")
@click.option("--time-zone", type=TimeZone(), help="Where its days, weeks and months begin.")
@limit_options(removable=True)
@per_user_options(removable=True)
@config_option
def update(
    name: str,
    models: str | None,
    cache: bool | None,
    time_zone: str | None,
    config: Path | None,
    **given: int | str | None,
) -> None:
    """Change the team NAME: what is named here, and nothing else; none takes a limit away.

    A running gateway obeys within five seconds. What was spent counts against new limits.
    """
    settings = load_settings(config, of_ones_own=True)
    if name in settings.teams:
        fail(f"team {name} is declared in {settings.file}; change it there", EXIT_FAILED)
    every = models is not None and models.lower() == NONE
    allowed = frozenset({ANY_MODEL}) if every else models_of(models, settings)
    limits, of_each, required = of_user(given)
    changed, of_each = _changes(limits), _changes(of_each)
    others = (allowed, cache, time_zone, required)
    if not changed and not of_each and all(one is None for one in others):
        fail("nothing to change is named; see gateway team update --help", EXIT_FAILED)

    async def change(store: Store) -> Team:
        for one in await store.directory.teams():
            if one.id == name:
                after = replace(
                    one,
                    models=one.models if allowed is None else allowed,
                    limits=replace(one.limits, **changed),
                    cache_enabled=one.cache_enabled if cache is None else cache,
                    time_zone=time_zone or one.time_zone,
                    per_user=PerUser(
                        replace(one.per_user.limits, **of_each),
                        one.per_user.required if required is None else required,
                    ),
                )
                await store.directory.update_team(after)
                return after
        raise await no_team(store, settings, name)

    after = with_store(settings, change)
    warn_of(settings, after.limits, allowed)
    click.echo(f"team {name} is changed; its limits: {say_limits(after.limits)}")
    if after.per_user != PerUser():
        click.echo(f"of each user: {_say_per_user(after.per_user)}")
    click.echo(f"models: {', '.join(sorted(after.models))}; time zone: {after.time_zone}")


@team.command("list")
@json_option
@config_option
def list_teams(as_json: bool, config: Path | None) -> None:
    """List every team, of the file and of the directory."""
    settings = load_settings(config, of_ones_own=True)
    made = with_store(settings, lambda store: store.directory.teams())
    teams = sorted((*settings.teams.values(), *made), key=lambda one: one.id)
    if as_json:
        print_json([_describe(one) for one in teams])
        return
    rows = [
        (
            one.id,
            "file" if one.declared else "directory",
            "disabled" if one.disabled else "active",
            ",".join(sorted(one.models)),
            one.time_zone,
            say_limits(one.limits)
            + f"; each user {_say_per_user(one.per_user)}" * (one.per_user != PerUser()),
        )
        for one in teams
    ]
    print_table(("TEAM", "FROM", "STATE", "MODELS", "ZONE", "LIMITS"), rows)


@team.command(short_help="Disable the team NAME and all of its keys.")
@click.argument("name")
@config_option
def revoke(name: str, config: Path | None) -> None:
    """Disable the team NAME and with it all of its keys, within five seconds, for good."""
    settings = load_settings(config, of_ones_own=True)
    if name in settings.teams:
        fail(f"team {name} is declared in {settings.file}; disable it there", EXIT_FAILED)

    async def disable(store: Store) -> None:
        for one in await store.directory.teams():
            if one.id == name:
                await store.directory.update_team(replace(one, disabled=True))
                return
        raise await no_team(store, settings, name)

    with_store(settings, disable)
    click.echo(f"team {name} is disabled")


def _describe(one: Team) -> dict[str, object]:
    return {
        "id": one.id,
        "declared": one.declared,
        "disabled": one.disabled,
        "models": sorted(one.models),
        "cache": one.cache_enabled,
        "time_zone": one.time_zone,
        "limits": describe_limits(one.limits),
        "per_user": None if one.per_user == PerUser() else _describe_per_user(one.per_user),
    }


def _changes(given: Mapping[str, Any]) -> dict[str, int | None]:
    """What is named; ``none`` takes a limit away."""
    return {
        limit: value if isinstance(value, int) else None
        for limit, value in given.items()
        if value is not None
    }


def _describe_per_user(one: PerUser) -> dict[str, object]:
    return {"limits": describe_limits(one.limits), "required": one.required}


def _say_per_user(one: PerUser) -> str:
    return say_limits(one.limits) + ", has to be named" * one.required
