"""`gateway ledger`: looking a call up, saying what it did cost, and adding the books up again."""

from __future__ import annotations

import getpass
import os
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, time, tzinfo
from pathlib import Path
from typing import Any

import click

from gateway.cli.below_zero import below_zero, warn_below_zero
from gateway.cli.common import (
    EXIT_FAILED,
    Day,
    Dollars,
    config_option,
    fail,
    json_option,
    load_settings,
    no_team,
    print_json,
    print_table,
    with_store,
)
from gateway.clock import SystemClock
from gateway.domain.books import Adjustment, Correction, Discrepancy, Hold, JournalLine
from gateway.domain.call import Json
from gateway.domain.ledger import Basis, Entry, Line, State, UsageRow
from gateway.domain.money import Money, exact_dollars, format_dollars, parse_dollars
from gateway.domain.quota import MONEY_WINDOWS, Limit, Scope, Unit, period
from gateway.ports import Store
from gateway.reports.reconcile import say_doubt
from gateway.settings import Settings

STATES: Mapping[str, str] = {
    State.HELD: "running",
    State.POSTED: "posted",
    State.VOIDED: "voided",
    State.EXPIRED: "unresolved",
}
EVENTS: Mapping[str, str] = {
    State.HELD: "its bound was set aside",
    State.POSTED: "it ended, and its cost was posted",
    State.VOIDED: "surely not billed: nothing is posted",
    State.EXPIRED: "its outcome is unknown: posted at its bound",
    "A": "adjusted",
    "B": "it went elsewhere",
}
BASES: Mapping[str, str] = {
    Basis.USAGE: "cost by its usage",
    Basis.ESTIMATED: "cost not said, so its bound",
}
FACTOR_ONE = 1_000_000


class SignedDollars(click.ParamType[int]):
    """An amount like -0.35, kept exactly."""

    name = "dollars"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip()
        try:
            if text.startswith("-"):
                return -parse_dollars(text[1:])
            return parse_dollars(text)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.group()
def ledger() -> None:
    """Look calls up, correct them, and check that the books add up.

    Works beside a running gateway.
    """


@ledger.command()
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="How many.")
@json_option
@config_option
def unresolved(limit: int, as_json: bool, config: Path | None) -> None:
    """List the calls whose cost may be wrong, and why.

    Their outcome is unknown, and they are booked at their bound; or their answer did not say what
    they cost, or said something that cannot be true; or they had no price, or cost more than their
    bound. They stay so until `gateway ledger adjust RID` says better.
    """
    settings = load_settings(config, of_ones_own=True)
    holds = with_store(settings, lambda store: store.books.unresolved(limit))
    if as_json:
        print_json([{**hold_json(hold), "why": say_doubt(hold)} for hold in holds])
        return
    rows = [
        (
            hold.rid,
            _when(hold.at),
            hold.team,
            hold.model,
            STATES[hold.state],
            exact_dollars(hold.cost),
            say_doubt(hold),
        )
        for hold in holds
    ]
    print_table(("RID", "WHEN", "TEAM", "MODEL", "STATE", "COST", "WHY"), rows)
    if len(holds) == limit:
        click.echo(f"these are the first {limit}; see more with --limit", err=True)


@ledger.command(short_help="Show the call RID, and what moved its money.")
@click.argument("rid")
@json_option
@config_option
def show(rid: str, as_json: bool, config: Path | None) -> None:
    """Show the call RID: what it is, and everything that moved its money.

    RID is the x-request-id of its answer. The id of an adjustment works too.
    """
    settings = load_settings(config, of_ones_own=True)

    async def read(store: Store) -> tuple[Hold | None, list[JournalLine]]:
        return await store.books.find(rid), await store.books.journal(rid)

    hold, lines = with_store(settings, read)
    if hold is None and not lines:
        fail(
            f"the books have no call {rid}: nothing was set aside under that id (a cached answer "
            "and a refusal are not), or it is older than ledger.keep",
            EXIT_FAILED,
        )
    if as_json:
        described = None if hold is None else hold_json(hold)
        print_json({"rid": rid, "hold": described, "journal": [_line_json(one) for one in lines]})
        return
    if hold is not None:
        for name, value in _facts(hold):
            click.echo(f"{name:<12}{value}")
        click.echo()
    print_table(
        ("WHEN", "SET ASIDE", "POSTED", "WHAT"),
        [
            (
                "" if line.at is None else _when(line.at),
                _move(line.pending),
                _move(line.posted),
                _say(line),
            )
            for line in lines
        ],
    )


@ledger.command(short_help="Say what a call did cost, or add to a team's day.")
@click.argument("rid", required=False)
@click.option("--cost", type=Dollars(), help="What the call RID did cost.")
@click.option("--images", type=click.IntRange(0), help="How many pictures RID delivered.")
@click.option("--team", "team_id", help="Without RID: whose books.")
@click.option("--model", help="Without RID: the model's name here.")
@click.option("--day", type=Day(), help="Without RID: the day.")
@click.option("--amount", type=SignedDollars(), help="Without RID: dollars to add, or -0.35.")
@click.option("--reason", required=True, help="Why; kept in the journal for ever.")
@click.option("--actor", help="Who says so. Default: the user of this machine.")
@click.option("--id", "given_id", help="Repeating an id changes nothing. Default: a new one.")
@config_option
def adjust(
    rid: str | None,
    cost: Money | None,
    images: int | None,
    team_id: str | None,
    model: str | None,
    day: datetime | None,
    amount: Money | None,
    reason: str,
    actor: str | None,
    given_id: str | None,
    config: Path | None,
) -> None:
    """Say what the call RID did cost, or add an amount to a team's day.

    With RID and --cost, the call is posted at that cost, and is no longer unresolved. With --team,
    --model, --day and --amount, a sum that belongs to no call moves that day of the team, its week,
    its month and its total. Where that leaves less than nothing spent, its budgets have that much
    more room, and a warning says so.
    """
    of_day = {"--team": team_id, "--model": model, "--day": day, "--amount": amount}
    if not reason.strip():
        raise click.UsageError("--reason is empty: say why")
    if rid is not None:
        if cost is None:
            raise click.UsageError("with RID, say --cost")
        if other := [name for name, value in of_day.items() if value is not None]:
            raise click.UsageError(f"{', '.join(other)} cannot be said of one call; leave RID out")
    else:
        if missing := [name for name, value in of_day.items() if value is None]:
            raise click.UsageError(f"say RID and --cost, or also {', '.join(missing)}")
        if cost is not None or images is not None:
            raise click.UsageError("--cost and --images are of one call: say its RID")
    settings = load_settings(config, of_ones_own=True)
    signed_by = (actor or os_user()).strip()
    new_id = given_id or f"adj_{secrets.token_hex(8)}"
    now = SystemClock().now()
    if rid is not None and cost is not None:
        correction = Correction(new_id, rid, cost, reason, signed_by, now, images or 0)
        _correct(settings, correction)
    elif team_id is not None and model is not None and day is not None and amount is not None:
        _adjust_day(settings, new_id, team_id, model, day.date(), amount, reason, signed_by, now)


@ledger.command()
@json_option
@config_option
def verify(as_json: bool, config: Path | None) -> None:
    """Add everything up a second way. Ends with 1 where two sums differ.

    Each balance is compared with the calls, adjustments and forgotten calls that made it, and the
    daily usage with all of them.
    """
    settings = load_settings(config, of_ones_own=True)

    async def read(store: Store) -> tuple[list[Discrepancy], list[UsageRow], int, Money]:
        found = await store.books.audit()
        rows = await store.ledger.usage()
        return found, rows, await store.ledger.open_holds(), await store.ledger.unresolved()

    found, rows, running, unknown = with_store(settings, read)
    booked = sum(row.cost for row in rows)
    if as_json:
        print_json(
            {
                "ok": not found,
                "discrepancies": [
                    {"what": one.what, "kept": one.kept, "summed": one.summed} for one in found
                ],
                "booked_usd": format_dollars(booked),
                "usage_rows": len(rows),
                "running_calls": running,
                "unresolved_usd": format_dollars(unknown),
            }
        )
    elif not found:
        click.echo(
            f"the books add up: {exact_dollars(booked)} in {len(rows):,} rows of daily usage, "
            f"{running:,} calls running, {exact_dollars(unknown)} of unknown outcome"
        )
    else:
        for one in found:
            click.echo(f"{one.what}: the row says {one.kept:,}, its parts add up to {one.summed:,}")
        click.echo("(nano-dollars, or a count.) The file is damaged, or the gateway has a defect.")
    if found:
        raise SystemExit(EXIT_FAILED)


@ledger.command(short_help="List by how much the bounds of models are raised.")
@click.option("--reset", metavar="UPSTREAM/MODEL", help="Forget this one.")
@json_option
@config_option
def factors(reset: str | None, as_json: bool, config: Path | None) -> None:
    """List by how much the bounds of a model are raised, because calls have cost more than them.

    Reset one after its price or its formula was mended.
    """
    settings = load_settings(config, of_ones_own=True)
    if reset is not None:
        upstream, slash, model = reset.partition("/")
        if not (upstream and slash and model):
            raise click.UsageError(
                "--reset takes UPSTREAM/MODEL, as `gateway ledger factors` lists"
            )
        if not with_store(settings, lambda store: store.upkeep.reset_factor(upstream, model)):
            fail(f"the bounds of {reset} are not raised", EXIT_FAILED)
        click.echo(
            f"the bounds of {reset} are as the prices say again; a running gateway follows within "
            "a minute"
        )
        return
    found = sorted(with_store(settings, lambda store: store.upkeep.factors()).items())
    if as_json:
        print_json(
            [
                {"upstream": upstream, "model": model, "factor": _factor(millionths)}
                for (upstream, model), millionths in found
            ]
        )
        return
    rows = [(f"{up}/{model}", f"x {_factor(millionths)}") for (up, model), millionths in found]
    print_table(("UPSTREAM/MODEL", "FACTOR"), rows)


def os_user() -> str:
    """Who runs this command, as the system knows them."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        # A container may run as a user that has no name.
        return f"uid {os.getuid()}"


def team_accounts(team: str, day: date, zone: tzinfo) -> tuple[str, ...]:
    """The balances of a team that a day belongs to, as people in its zone count days: its day,
    week, month and total."""
    noon = datetime.combine(day, time(12), zone)
    return tuple(
        Line(Limit(Scope.TEAM, team, Unit.MONEY, window, None), period(window, noon, zone)).account
        for window in MONEY_WINDOWS
    )


async def zone_of(store: Store, settings: Settings, team: str, day: str) -> tzinfo:
    """The zone of a team of the file or the directory. One that is gone, but has books of that
    day, counts in UTC. Raises ``NotKnown``."""
    if team in settings.teams:
        return settings.teams[team].zone
    for known in await store.directory.teams():
        if known.id == team:
            return known.zone
    if any(row.team == team for row in await store.ledger.usage(day, day)):
        return UTC
    raise await no_team(store, settings, team)


def hold_json(hold: Hold) -> dict[str, object]:
    """A call for JSON; dollars as exact decimal text."""
    return {
        "rid": hold.rid,
        "state": STATES[hold.state],
        "team": hold.team,
        "key_id": hold.key_id,
        "user": hold.user or None,
        "model": hold.model,
        "operation": hold.operation,
        "upstream": hold.upstream,
        "images": hold.images,
        "at": hold.at.isoformat(),
        "lease_ends": hold.lease_ends.isoformat(),
        "bound_usd": format_dollars(hold.bound),
        "cost_usd": format_dollars(hold.cost),
        "drawn": None
        if hold.drawn is None
        else {
            "model": hold.drawn.model,
            "images": hold.drawn.images,
            "cost_usd": format_dollars(hold.drawn.cost),
        },
        "outcome": hold.outcome,
        "basis": hold.basis,
        "flags": list(hold.flags),
        "price_id": hold.price_id,
        "idempotency_key": hold.idempotency_key,
        "accounts": list(hold.accounts),
    }


def _correct(settings: Settings, correction: Correction) -> None:
    async def work(store: Store) -> tuple[Hold | None, Entry, list[tuple[str, Money]]]:
        before = await store.books.find(correction.rid)
        entry = await store.books.correct(correction)
        if before is None or not entry.applied:
            return before, entry, []
        return before, entry, await below_zero(store, before.team, before.accounts)

    before, entry, negative = with_store(settings, work)
    if entry.state is State.HELD and before is not None:
        fail(
            f"{correction.rid} still runs: it will end by itself, at the latest when its lease "
            f"ends at {_when(before.lease_ends)}; then correct it, if it is wrong",
            EXIT_FAILED,
        )
    now = exact_dollars(entry.cost)
    if entry.applied and before is not None:
        click.echo(
            f"{correction.rid} (team {before.team}, {before.model}): "
            f"{STATES[before.state]} {exact_dollars(before.cost)} -> "
            f"{STATES[entry.state]} {now}, as {correction.id}"
        )
        warn_below_zero(before.team, negative)
    elif entry.cost == correction.cost:
        click.echo(f"nothing to do: {correction.rid} is {STATES[entry.state]} at {now} already")
    else:
        fail(
            f"the id {correction.id} was used before: {correction.rid} stays {STATES[entry.state]} "
            f"at {now}; give another --id, or none",
            EXIT_FAILED,
        )


def _adjust_day(
    settings: Settings,
    adjustment_id: str,
    team: str,
    model: str,
    day: date,
    amount: Money,
    reason: str,
    actor: str,
    now: datetime,
) -> None:
    on = day.isoformat()
    what = f"team {team}, {model}, {on}"

    negative: list[tuple[str, Money]] = []

    async def work(store: Store) -> tuple[Money, Money] | Adjustment | str | None:
        """What was booked before and after, or what its id was used for, or what is wrong."""
        zone = await zone_of(store, settings, team, on)
        if day > now.astimezone(zone).date():
            return f"{on} has not begun yet, where team {team} is ({zone})"
        rows = await store.ledger.usage(on, on)
        if model not in settings.catalogue.models and all(row.model != model for row in rows):
            near = settings.catalogue.nearest(model)
            asked = f"; did you mean {near.name}?" if near else ""
            return (
                f"there is no model {model!r} in {settings.file}, and nothing was booked for it on "
                f"{on}{asked}"
            )
        accounts = team_accounts(team, day, zone)
        applied = await store.books.adjust(
            Adjustment(adjustment_id, team, model, on, amount, accounts, reason, actor, now)
        )
        if not applied:
            return await store.books.adjustment(adjustment_id)
        negative.extend(await below_zero(store, team, accounts))
        return booked(rows), booked(await store.ledger.usage(on, on))

    def booked(rows: Sequence[UsageRow]) -> Money:
        return sum(row.cost for row in rows if (row.team, row.model) == (team, model))

    done = with_store(settings, work)
    if isinstance(done, tuple):
        before, after = map(exact_dollars, done)
        click.echo(f"{what}: {before} -> {after}, as {adjustment_id}")
        warn_below_zero(team, negative)
        return
    if isinstance(done, str):
        fail(done, EXIT_FAILED)
    if done is None:
        was = "to correct a call"
    elif (done.team, done.model, done.day, done.amount) == (team, model, on, amount):
        click.echo(
            f"nothing to do: {adjustment_id} was applied before ({what}: {exact_dollars(amount)})"
        )
        return
    else:
        was = f"for team {done.team}, {done.model}, {done.day}: {exact_dollars(done.amount)}"
    fail(
        f"the id {adjustment_id} was used before, {was}. Nothing was booked: give another --id, or "
        "none",
        EXIT_FAILED,
    )


def _facts(hold: Hold) -> list[tuple[str, str]]:
    """A call in words, a line each."""
    state = STATES[hold.state]
    if doubt := say_doubt(hold):
        state += f" ({doubt})"
    if hold.state is State.HELD:
        state += f", at the latest until {_when(hold.lease_ends)}"
    drawn = ""
    if (part := hold.drawn) is not None:
        drawn = f", of it {exact_dollars(part.cost)} for {part.images} by {part.model}"
    return [
        ("call", f"{hold.rid}, {_when(hold.at)}"),
        ("state", state),
        ("team", f"{hold.team}, key {hold.key_id}" + f", user {hold.user}" * bool(hold.user)),
        ("asked for", f"{hold.operation} with {hold.model} from {hold.upstream}, n={hold.images}"),
        ("bound", f"{exact_dollars(hold.bound)}, by price {hold.price_id or '(none)'}"),
        ("cost", exact_dollars(hold.cost) + drawn),
        ("counted in", ", ".join(hold.accounts)),
    ]


def _say(line: JournalLine) -> str:
    """A journal line in words."""
    detail = line.detail
    said = [EVENTS.get(line.kind, line.kind)]
    if line.kind == "A":
        said = [f"{detail.get('actor', 'somebody')} adjusted it: {detail.get('reason', '')}"]
    if line.kind == "B":
        said = [
            f"it went on to {detail.get('upstream')} as {detail.get('model')}, "
            f"by price {detail.get('price_id') or '(none)'}"
        ]
        if isinstance(before := detail.get("before"), Mapping):
            said.append(f"before that {before.get('model')} from {before.get('upstream')}")
    if line.kind == State.POSTED:
        said += [str(detail.get("outcome", "")), BASES.get(str(detail.get("basis")), "")]
    if detail.get("images"):
        said.append(f"images {detail['images']}")
    if usage := _counts(detail.get("usage")):
        said.append(f"tokens {usage}")
    flags = detail.get("flags")
    if isinstance(flags, Sequence) and flags:
        said.append(f"flags {', '.join(str(flag) for flag in flags)}")
    if detail.get("id") not in (None, line.rid):
        said.append(f"as {detail['id']}")
    return "; ".join(part for part in said if part)


def _counts(usage: Json) -> str:
    """The tokens of a journal line, those that are not 0."""
    if not isinstance(usage, Mapping):
        return ""
    return ", ".join(f"{name} {count}" for name, count in usage.items() if count)


def _line_json(line: JournalLine) -> dict[str, object]:
    return {
        "seq": line.seq,
        "at": None if line.at is None else line.at.isoformat(),
        "kind": line.kind,
        "set_aside_usd": format_dollars(line.pending),
        "posted_usd": format_dollars(line.posted),
        "detail": dict(line.detail),
    }


def _move(amount: Money) -> str:
    if not amount:
        return ""
    return f"{'-' if amount < 0 else '+'}${format_dollars(abs(amount))}"


def _factor(millionths: int) -> str:
    """``1250000`` -> ``"1.25"``."""
    whole, rest = divmod(millionths, FACTOR_ONE)
    return f"{whole}.{rest:06d}".rstrip("0").rstrip(".")


def _when(instant: datetime) -> str:
    return f"{instant.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
