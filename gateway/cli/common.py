"""What the commands share: the configuration, its mistakes, and the store behind it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shlex
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeAlias, TypeVar
from zoneinfo import available_timezones

import click

from gateway.assembly import (
    CannotServe,
    declared_keys,
    price_book,
    read_peppers,
    unpriced_models,
)
from gateway.assembly_stores import open_store
from gateway.clock import SystemClock
from gateway.domain.errors import GatewayError
from gateway.domain.keys import Peppers
from gateway.domain.money import format_dollars, parse_dollars
from gateway.domain.quota import MONEY_WINDOWS
from gateway.domain.team import ANY_MODEL, Key, Limits
from gateway.ports import AlreadyExists, BooksChanged, NotKnown, Store, StoreError
from gateway.pricefile import PriceFileError
from gateway.server import listen
from gateway.settings import ConfigError, Settings, default_config_path, load, shipped
from gateway.stores.postgres_link import place

T = TypeVar("T")
Command: TypeAlias = Callable[..., None]

EXIT_CONFIG = 2
EXIT_FAILED = 1

config_option = click.option(
    "--config",
    "config",
    type=click.Path(path_type=Path),
    help="The configuration file. Default: $GATEWAY_CONFIG, then config/gateway.yaml.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def load_settings(config: Path | None, *, of_ones_own: bool = False) -> Settings:
    """The settings; every mistake is printed and the command ends with 2.

    ``of_ones_own``: not the file that ships, whose books nobody would look into.
    """
    if (
        of_ones_own
        and config is None
        and default_config_path(os.environ) == shipped("gateway.yaml")
    ):
        fail(
            "no configuration is named: use --config FILE, or set GATEWAY_CONFIG, to that of your "
            f"gateway; a copy of {shipped('gateway.yaml')} will do to begin with",
            EXIT_CONFIG,
        )
    try:
        return load(config, os.environ)
    except ConfigError as error:
        fail(str(error), EXIT_CONFIG)


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """What can go wrong becomes its reason and an exit code: 2 for what the configuration has to
    mend, 1 for the rest."""
    try:
        yield
    except (PriceFileError, CannotServe) as error:
        fail(str(error), EXIT_CONFIG)
    except (StoreError, GatewayError, AlreadyExists, BooksChanged, NotKnown) as error:
        fail(str(error), EXIT_FAILED)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        fail(f"{name}{error.strerror or error}", EXIT_FAILED)


def require_servable(settings: Settings) -> None:
    """Warnings are printed. Where the prices are wrong, or lack a model, every mistake is printed
    and the command ends with 2, as that of a gateway would. Nothing is opened."""
    with failures():
        book = price_book(settings)
    warn(settings)
    if mistakes := unpriced_models(settings, book, SystemClock().now().date()):
        fail("\n".join(f"{settings.file}: {mistake}" for mistake in mistakes), EXIT_CONFIG)


def warn(settings: Settings) -> None:
    for warning in settings.warnings:
        click.echo(f"warning: {warning}", err=True)


def with_store(settings: Settings, work: Callable[[Store], Awaitable[T]]) -> T:
    """Runs ``work`` on the opened store; fails as ``failures`` says."""

    async def run() -> T:
        store = open_store(settings)
        try:
            return await work(store)
        finally:
            await store.aclose()

    with failures():
        return asyncio.run(run())


def place_of(settings: Settings) -> str:
    """The database, for people: a path, or a server without its password."""
    database = settings.storage.database
    if isinstance(database, Path):
        return str(database)
    with failures():
        return place(database.reveal())


def peppers_of(settings: Settings) -> Peppers:
    """What keys are hashed with; made where there is none yet."""
    with failures():
        if isinstance(settings.storage.database, Path):
            settings.storage.database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return read_peppers(settings)


async def keys_of_the_file(settings: Settings, store: Store) -> list[Key]:
    """The keys that the configuration declares, by the ids that the books know them by."""
    found = await declared_keys(settings, peppers_of(settings), store.directory)
    return [key for _, key in found.keys.values()]


def open_socket(
    host: str,
    port: int,
    *,
    next_free: bool = False,
    host_setting: str = "--host",
    port_setting: str = "--port",
) -> socket.socket:
    """A listening socket, or one sentence that says why there is none, and what to change: the
    settings are what the host and the port came from."""
    try:
        return listen(host, port, next_free=next_free)
    except (OSError, UnicodeError) as error:
        known, words = (error.errno, error.strerror) if isinstance(error, OSError) else (None, None)
        # A name that nobody knows, or that cannot be one.
        if isinstance(error, (socket.gaierror, UnicodeError)) or known == errno.EADDRNOTAVAIL:
            why = (
                f"cannot listen on {host}: this machine has no such address; say one that it "
                f"has with {host_setting}, or 0.0.0.0 for all of them"
            )
        elif known == errno.EADDRINUSE:
            where = f"{port} to {port + 100}" if next_free else str(port)
            why = f"port {where} of {host} is taken; choose another with {port_setting}"
        elif known == errno.EACCES:
            why = (
                f"port {port} of {host} is not for this user; choose one over 1023 with "
                f"{port_setting}"
            )
        else:
            why = f"cannot listen on {host}, port {port} ({host_setting}, {port_setting}): {words}"
        fail(why, EXIT_FAILED)


def origin_of(listening: socket.socket) -> str:
    """The address of a server, as a client writes it."""
    host, port, *_ = listening.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def fail(message: str, code: int) -> NoReturn:
    """Ends the command: the reason on standard error, the code for scripts."""
    click.echo(message, err=True)
    sys.exit(code)


def require_folder(file: Path) -> None:
    """Fails where the folder that a file is to be written to is not there."""
    folder = file.parent
    if folder.is_dir():
        return
    if os.path.lexists(folder):
        what = f"{folder} is no folder; name another file"
    else:
        made = shlex.quote(str(folder))
        what = f"there is no folder {folder}; make it (mkdir -p {made}), or name another file"
    fail(f"{file} cannot be written: {what}", EXIT_FAILED)


async def no_team(store: Store, settings: Settings, name: str, more: str = "") -> NotKnown:
    """Nobody is called so. The nearest name is said, or what shows the names."""
    known = (*settings.teams, *(one.id for one in await store.directory.teams()))
    near = get_close_matches(name, known, n=1)
    asked = f"did you mean {near[0]}?" if near else "gateway team list shows all"
    return NotKnown(f"there is no team {name}{more}; {asked}")


def print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


NONE = "none"
"""What an option says that takes a limit away."""


class Dollars(click.ParamType[int]):
    """An amount like 5.00, kept exactly."""

    name = "dollars"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_dollars(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Day(click.DateTime):
    """A day of the calendar; ``or_moment``: or an instant of it, in UTC."""

    def __init__(self, *, or_moment: bool = False) -> None:
        super().__init__(["%Y-%m-%d", *(["%Y-%m-%dT%H:%M:%SZ"] if or_moment else ())])
        self._like = "2026-11-20" + (", or a moment like 2026-11-20T12:00:00Z" if or_moment else "")

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "DAY|MOMENT" if len(self.formats) > 1 else "DAY"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is not a day like {self._like}", param, ctx)


class OrNone(click.ParamType[int | str]):
    """A value of another kind, or the word ``none``."""

    def __init__(self, kind: click.ParamType[int]) -> None:
        self.name = f"{kind.name}|{NONE}"
        self._kind = kind

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if str(value).lower() == NONE:
            return NONE
        try:
            return self._kind.convert(value, param, ctx)
        except click.BadParameter as error:
            self.fail(f"{error.message.rstrip('.')}; or say {NONE}", param, ctx)


class TimeZone(click.ParamType[str]):
    """The IANA name of a zone."""

    name = "zone"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        known = available_timezones()
        if value not in known:
            near = get_close_matches(str(value), known, n=1)
            asked = f"; did you mean {near[0]}?" if near else ""
            self.fail(f"{value!r} is not a time zone's name, like Europe/Berlin{asked}", param, ctx)
        return str(value)


SPANS = MappingProxyType(
    {"day": "a day", "week": "a week", "month": "a month", "total": "in all, for ever"}
)


def limit_options(*, removable: bool = False) -> Callable[[Command], Command]:
    """The limits that a team and a key may have. ``removable``: ``none`` takes one away."""

    def kind(of: click.ParamType[int]) -> click.ParamType[Any]:
        return OrNone(of) if removable else of

    count, dollars = kind(click.IntRange(1, 1_000_000_000)), kind(Dollars())
    options = (
        click.option("--requests-per-minute", type=count, help="Requests a minute."),
        click.option("--images-per-minute", type=count, help="Images a minute; n counts."),
        click.option("--concurrent-requests", type=count, help="Requests at one time."),
        *(
            click.option(f"--budget-{window}", type=dollars, help=f"Dollars {span}; hard.")
            for window, span in SPANS.items()
        ),
        *(
            click.option(
                f"--soft-budget-{window}", type=dollars, help=f"Dollars {span}; only warns."
            )
            for window, span in SPANS.items()
        ),
        click.option("--max-cost-per-request", type=dollars, help="Dollars one call may cost."),
    )
    return _with(options)


def per_user_options(*, removable: bool = False) -> Callable[[Command], Command]:
    """What each end user of a team may; each name begins with ``user_``."""

    def kind(of: click.ParamType[int]) -> click.ParamType[Any]:
        return OrNone(of) if removable else of

    count, dollars = kind(click.IntRange(1, 1_000_000_000)), kind(Dollars())
    return _with(
        (
            click.option("--user-requests-per-minute", type=count, help="Of each end user."),
            click.option("--user-images-per-minute", type=count, help="Of each end user."),
            click.option("--user-concurrent-requests", type=count, help="Of each end user."),
            *(
                click.option(
                    f"--user-budget-{window}", type=dollars, help=f"Of each end user: {span}."
                )
                for window, span in SPANS.items()
            ),
            click.option(
                "--user-required/--user-optional",
                default=None,
                help="Refuse requests that name no end user, or not.",
            ),
        )
    )


def _with(options: Sequence[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def of_user(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], bool | None]:
    """Options taken apart: a team's own limits, those of each user, and whether it is required."""
    own = {name: value for name, value in given.items() if not name.startswith("user_")}
    rest = {name.removeprefix("user_"): given[name] for name in given if name not in own}
    required = rest.pop("required")
    return own, rest, required


def models_of(text: str | None, settings: Settings) -> frozenset[str] | None:
    """The models of a comma-separated list; one that no entry routes ends the command."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name != ANY_MODEL and settings.catalogue.find(name) is None:
            near = settings.catalogue.nearest(name)
            asked = f"; did you mean {near.name}?" if near else ""
            fail(f"there is no model {name!r} in {settings.file}{asked}", EXIT_FAILED)
    return frozenset(names)


def warn_of(settings: Settings, limits: Limits, models: frozenset[str] | None) -> None:
    """Says what is allowed, and is hardly meant: a soft budget that is never reached, a model
    that is routed (perhaps only by ``*``) and has no price."""
    for window in limits.unreachable:
        click.echo(
            f"warning: the soft budget of {window} is over the hard one, so that it is never "
            "reached",
            err=True,
        )
    with failures():
        book = price_book(settings)
    today = SystemClock().now().date()
    for name in sorted((models or frozenset()) - {ANY_MODEL}):
        model = settings.catalogue.find(name)
        if model is None:
            continue
        places = [(settings.upstreams[target.upstream], target) for target in model.targets]
        if all(
            book.of(upstream.name, upstream.prices, today).find(target.model) is None
            for upstream, target in places
        ):
            near = settings.catalogue.nearest(name)
            asked = f"; did you mean {near.name}?" if near and near.name != name else ""
            click.echo(f"warning: no price is known for {name}{asked}", err=True)


def describe_limits(limits: Limits) -> dict[str, object]:
    """Limits for JSON; dollars as exact decimal text, null where there is no limit."""

    def dollars(amount: int | None) -> str | None:
        return None if amount is None else format_dollars(amount)

    return {
        "requests_per_minute": limits.requests_per_minute,
        "images_per_minute": limits.images_per_minute,
        "concurrent_requests": limits.concurrent_requests,
        **{f"budget_{one}_usd": dollars(of) for one, of in limits.budgets.items()},
        **{
            f"soft_budget_{one}_usd": dollars(amount) for one, amount in limits.soft_budgets.items()
        },
        "max_cost_per_request_usd": dollars(limits.max_cost_per_request),
    }


def say_limits(limits: Limits) -> str:
    """Limits in a few words."""
    words = {
        "requests/min": limits.requests_per_minute,
        "images/min": limits.images_per_minute,
        "at once": limits.concurrent_requests,
    }
    spans = dict(zip(MONEY_WINDOWS, ("a day", "a week", "a month", "in all"), strict=True))
    money = {
        **{spans[window]: amount for window, amount in limits.budgets.items()},
        **{f"{spans[window]} (soft)": amount for window, amount in limits.soft_budgets.items()},
        "a request": limits.max_cost_per_request,
    }
    said = [f"{amount} {word}" for word, amount in words.items() if amount is not None]
    said += [
        f"${format_dollars(amount)} {word}" for word, amount in money.items() if amount is not None
    ]
    return ", ".join(said) or "none"
