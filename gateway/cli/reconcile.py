"""`gateway reconcile`: what a provider billed on a day, against the books."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import click

from gateway.assembly import open_notifier, read_bill
from gateway.cli.common import (
    EXIT_FAILED,
    Day,
    config_option,
    fail,
    failures,
    json_option,
    load_settings,
    print_json,
    print_table,
    require_folder,
    with_store,
)
from gateway.cli.ledger import team_accounts, zone_of
from gateway.clock import SystemClock
from gateway.domain.bill import BilledItem
from gateway.domain.books import Adjustment, Hold
from gateway.domain.ledger import UsageRow
from gateway.domain.money import exact_dollars, format_dollars
from gateway.domain.route import Target
from gateway.domain.transition import usage_day
from gateway.ports import BillUnreadable, Message, Store
from gateway.reports.billcsv import read_bill as read_csv
from gateway.reports.reconcile import (
    Drift,
    Reconciliation,
    as_csv,
    say_doubt,
)
from gateway.reports.reconcile import as_json as describe
from gateway.reports.reconcile import reconcile as compare
from gateway.settings import Settings
from gateway.telemetry.log import configure

log = logging.getLogger(__name__)

EXIT_DRIFT = 3
ACTOR = "reconcile"
EVENT = "reconciliation.drift"
SHOWN_SUSPECTS = 20


@click.command()
@click.option("--day", type=Day(), help="The day (UTC). Default: yesterday.")
@click.option(
    "--upstream",
    "asked_for",
    multiple=True,
    help="Whose bill; again for each that is on the same bill. Default: the only one with an "
    "admin_key.",
)
@click.option(
    "--csv",
    "csv_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The upstream's cost export, in place of asking it.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the comparison: FILE.csv, or FILE.json with everything.",
)
@click.option(
    "--apply",
    "apply_it",
    is_flag=True,
    help="Book the proposed adjustments; of a day that is over.",
)
@json_option
@config_option
def reconcile(
    day: datetime | None,
    asked_for: tuple[str, ...],
    csv_file: Path | None,
    out: Path | None,
    apply_it: bool,
    as_json: bool,
    config: Path | None,
) -> None:
    """Compare what an upstream billed on a day with the books.

    Reads the upstream's costs with its admin_key, or a CSV export of them; compares them model by
    model; proposes the adjustments that would close the difference, split over the teams by what
    each was booked. Ends with 3 when a model or the day is off by more than notify.drift_percent;
    a webhook is told too.

    Calls of unknown outcome are the first suspects: correct those, and compare again, before
    anything is split.
    """
    if out is not None and out.suffix not in (".csv", ".json"):
        raise click.UsageError("--out ends in .csv or .json")
    if out is not None:
        require_folder(out)
    settings = load_settings(config, of_ones_own=True)
    today = SystemClock().now().date()
    of_day = day.date() if day is not None else today - timedelta(days=1)
    if of_day > today:
        fail(f"{of_day} has not begun yet in UTC", EXIT_FAILED)
    if of_day == today and apply_it:
        # Bills come hours late: what is not on them yet would be taken out of the books, and spent
        # once more today.
        fail(f"{of_day} is not over in UTC: without --apply it can be compared", EXIT_FAILED)
    if of_day == today:
        click.echo(f"warning: {of_day} is not over in UTC; both sides may still grow", err=True)
    names = _upstreams(settings, asked_for, asked=csv_file is None)
    billed = _bill(settings, names, of_day, csv_file)
    rows, routed, suspects = with_store(
        settings, lambda store: _books(store, names, of_day.isoformat())
    )
    found = compare(
        names,
        of_day.isoformat(),
        billed,
        rows,
        lambda model: _targets(settings, model),
        [
            target.model
            for model in settings.catalogue.models.values()
            for target in model.targets
            if target.upstream in names
        ],
        routed,
    )
    percent = Decimal(str(settings.notify.drift_percent))
    applied = (
        with_store(settings, lambda store: apply_all(store, settings, found)) if apply_it else []
    )
    report = describe(found, percent, suspects, applied)
    if out is not None:
        text = as_csv(found) if out.suffix == ".csv" else json.dumps(report, indent=2) + "\n"
        with failures():
            out.write_text(text, newline="")
    if as_json:
        print_json(report)
    else:
        _print(found, percent, suspects, applied if apply_it else None)
    if drifts := found.drifts(percent):
        _alert(settings, found, drifts, report)
        raise SystemExit(EXIT_DRIFT)


def _upstreams(settings: Settings, asked_for: tuple[str, ...], *, asked: bool) -> tuple[str, ...]:
    """Whose bill it is. ``asked``: one of them is asked, so it needs an admin key."""
    for name in asked_for:
        if name not in settings.upstreams:
            known = ", ".join(settings.upstreams)
            fail(f"there is no upstream {name} in {settings.file}, but {known}", EXIT_FAILED)
    if asked_for:
        return tuple(dict.fromkeys(asked_for))
    able = [one.name for one in settings.upstreams.values() if one.admin_key or not asked]
    if not able and len(settings.upstreams) == 1:
        able = list(settings.upstreams)
    if len(able) != 1:
        which = ", ".join(able) or "none has an admin_key"
        fail(f"say which upstream's bill with --upstream NAME ({which})", EXIT_FAILED)
    return tuple(able)


def _bill(
    settings: Settings, names: Sequence[str], day: date, csv_file: Path | None
) -> list[BilledItem]:
    with failures():
        try:
            if csv_file is not None:
                return read_csv(csv_file.read_text("utf-8"), day)
            with_key = (name for name in names if settings.upstreams[name].admin_key)
            return asyncio.run(read_bill(settings, next(with_key, names[0]), day))
        except BillUnreadable as error:
            fail(str(error) if csv_file is None else f"{csv_file}: {error}", EXIT_FAILED)
        except UnicodeDecodeError:
            fail(f"{csv_file}: it is not text in UTF-8", EXIT_FAILED)


def _targets(settings: Settings, model: str) -> tuple[Target, ...]:
    found = settings.catalogue.find(model)
    return () if found is None else found.targets


async def _books(
    store: Store, upstreams: Sequence[str], day: str
) -> tuple[list[UsageRow], list[tuple[str, UsageRow]], list[Hold]]:
    """The usage of a day, where its calls went, and those at these upstreams whose cost may be
    wrong."""
    suspects: list[Hold] = []
    after = ""
    while page := await store.books.unresolved(after=after):
        after = page[-1].rid
        suspects += [
            hold for hold in page if hold.upstream in upstreams and usage_day(hold.at) == day
        ]
    return await store.ledger.usage(day, day), await store.books.routed(day), suspects


async def apply_all(store: Store, settings: Settings, found: Reconciliation) -> list[str]:
    """Books all proposals or none; the ids of those that were not applied before. Raises
    ``BooksChanged``."""
    adjustments = []
    now = SystemClock().now()
    for one in found.proposals:
        zone = await zone_of(store, settings, one.team, one.day)
        accounts = team_accounts(one.team, date.fromisoformat(one.day), zone)
        adjustments.append(
            Adjustment(
                one.id, one.team, one.model, one.day, one.amount, accounts, one.reason, ACTOR, now
            )
        )
    seen = {(found.day, model): booked for model, booked in found.seen}
    return await store.books.adjust_all(adjustments, seen)


def _print(
    found: Reconciliation,
    percent: Decimal,
    suspects: Sequence[Hold],
    applied: Sequence[str] | None,
) -> None:
    """The comparison for people. ``applied`` None: nothing was to be applied."""
    click.echo(f"{found.upstream}, {found.day} (UTC)")
    rows = [_figures(drift, percent) for drift in (*found.models, found.total)]
    print_table(("MODEL", "BILLED", "BOOKED", "DIFFERENCE", "PERCENT", ""), rows)
    if found.other:
        click.echo("\nbilled for what is no model of this gateway, and compared with nothing:")
        for item in found.other:
            click.echo(f"  {item.line_item}  {exact_dollars(item.amount)}")
    if found.unrouted:
        click.echo("\nbooked under names that no entry serves any more, and compared with nothing:")
        for model, booked in found.unrouted:
            click.echo(f"  {model}  {exact_dollars(booked)}")
    if found.unattributed:
        click.echo("\nbooked without a call that says where it went, and compared with nothing:")
        for model, booked in found.unattributed:
            click.echo(f"  {model}  {exact_dollars(booked)}")
    if suspects:
        click.echo(
            "\nlook at these calls first (gateway ledger show RID, gateway ledger adjust RID):"
        )
        for hold in suspects[:SHOWN_SUSPECTS]:
            cost = exact_dollars(hold.cost)
            click.echo(f"  {hold.rid}  {hold.team}  {hold.model}  {cost}  {say_doubt(hold)}")
        if (more := len(suspects) - SHOWN_SUSPECTS) > 0:
            click.echo(f"  and {more} more: gateway ledger unresolved")
    for model in found.nobodys:
        click.echo(f"\n{model}: no team asked for it that day, so there is nobody to adjust")
    if found.proposals and applied is None:
        click.echo("\nto close the difference, these, or the same again with --apply:")
        for proposal in found.proposals:
            click.echo(f"  {proposal.command}")
    elif found.proposals:
        click.echo(f"\n{len(applied or ())} of {len(found.proposals)} adjustments were booked")
        if suspects:
            click.echo("when the calls above are corrected later, compare this day once more")


def _figures(drift: Drift, percent: Decimal) -> tuple[str, ...]:
    return (
        drift.model,
        exact_dollars(drift.billed),
        exact_dollars(drift.booked),
        exact_dollars(drift.difference),
        drift.percent and f"{drift.percent} %",
        "DRIFT" if drift.beyond(percent) else "",
    )


def _alert(
    settings: Settings,
    found: Reconciliation,
    drifts: Sequence[Drift],
    report: dict[str, object],
) -> None:
    """A log line for each, and one message to the webhook."""
    configure(settings.log.level.value, settings.log.format.value)
    for drift in drifts:
        log.warning(
            "the upstream's bill and the books differ",
            extra={
                "upstream": found.upstream,
                "day": found.day,
                "model": drift.model,
                "billed_usd": format_dollars(drift.billed),
                "booked_usd": format_dollars(drift.booked),
                "percent": drift.percent,
            },
        )
    clock = SystemClock()
    sums = f"{found.upstream}/{found.day}/{found.total.billed}/{found.total.booked}"
    message = Message(
        f"msg_{hashlib.sha256(sums.encode()).hexdigest()[:32]}",
        EVENT,
        clock.now(),
        {
            name: report[name]
            for name in ("upstream", "day", "alert_percent", "drifts", "models", "total")
        },
    )

    async def tell() -> None:
        notifier = open_notifier(settings, clock)
        if notifier is not None:
            try:
                await notifier.tell(message)
            finally:
                await notifier.aclose()

    with failures():
        asyncio.run(tell())
