"""Prices: every model has one today, and no model ends soon."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date

from gateway.assembly import ended_row, price_book, standing_in, unpriced_models
from gateway.doctor.finding import Check, Finding, Topic, counted
from gateway.domain.price import PriceBook
from gateway.domain.route import Model, Target
from gateway.pricefile import PriceFileError
from gateway.settings import Settings

SOON_DAYS = 30
OLD_DAYS = 60
"""The alert of the same has the same."""


async def prices(settings: Settings, today: date) -> Check:
    topic = Topic("prices")
    try:
        book = price_book(settings)
    except PriceFileError as error:
        for mistake in error.mistakes:
            yield topic.fail(mistake, "mend that line: gateway check says the same")
        return
    missing = unpriced_models(settings, book, today)
    for mistake in missing:
        says, _, fix = mistake.partition(". ")
        yield topic.fail(says, fix)
    if not missing:
        free = _without_price(settings, book, today)
        yield topic.ok(
            f"{counted(len(settings.catalogue.models) - len(free), 'model')} priced"
            + (f"; booked as nothing: {', '.join(free)} (unpriced: allow)" if free else "")
        )
    if book.compiled is not None:
        yield judge_age(settings, book.compiled, today)
    for finding in ending(settings, book, today):
        yield finding


def judge_age(settings: Settings, compiled: date, today: date) -> Finding:
    topic = Topic("prices", "list")
    said = f"compiled on {compiled}"
    days = (today - compiled).days
    if days <= OLD_DAYS:
        return topic.ok(said)
    fix = (
        f"look the prices up again, then the day: {settings.prices.file}"
        if settings.prices.file
        else "install a newer release, or write newer rows under prices.rows"
    )
    return topic.warn(
        f"{said}, {days} days ago: what is charged may differ from what is billed", fix
    )


def ending(settings: Settings, book: PriceBook, today: date) -> Iterator[Finding]:
    """Models that their provider stops serving, as the price list knows it."""
    for model in settings.catalogue.models.values():
        for target in model.targets:
            upstream = settings.upstreams[target.upstream]
            row = book.of(upstream.name, upstream.prices, today).find(target.model)
            if row is None or row.shuts_down is None:
                continue
            found = ends(
                *(model.name, target.model, upstream.name, row.shuts_down, today),
                replacement=row.replacement,
                answered_by=_answered_by(settings, book, model, today),
            )
            if found is not None:
                yield found


def has_spoken(settings: Settings, book: PriceBook, target: Target, today: date) -> date | None:
    """The day on which a target ends, where ``ending`` says something of it."""
    upstream = settings.upstreams[target.upstream]
    row = book.of(upstream.name, upstream.prices, today).find(target.model)
    day = None if row is None else row.shuts_down
    return day if day is not None and (day - today).days <= SOON_DAYS else None


def _answered_by(settings: Settings, book: PriceBook, model: Model, today: date) -> str:
    """Who answers calls for a model of which a target has ended; empty for nobody."""
    for target in model.targets:
        ready = settings.upstreams[target.upstream].ready
        if ready and ended_row(settings, book, target, today) is None:
            return f"the upstream {target.upstream}"
    stand_in = standing_in(settings, book, model, today, ready=True)
    return f"its fallback {stand_in}" if stand_in else ""


def ends(
    model: str,
    there: str,
    upstream: str,
    day: date,
    today: date,
    *,
    replacement: str = "",
    answered_by: str = "",
) -> Finding | None:
    """What is said of a model that has ended, or ends soon. ``answered_by``: who answers its calls
    all the same, empty for nobody."""
    topic = Topic("models", model)
    name = f"{there} at {upstream}" if there != model else f"it at {upstream}"
    left = (day - today).days
    fix = (
        f"route models.{model} to another one ({{upstream: {upstream}, model: "
        f"{replacement or '...'}}}), and tell who calls it"
    )
    if left <= 0 and answered_by:
        return topic.warn(
            f"its provider has stopped serving {name} on {day}; {answered_by} answers", fix
        )
    if left <= 0:
        return topic.fail(f"its provider has stopped serving {name} on {day}", fix)
    if left <= SOON_DAYS:
        return topic.warn(
            f"its provider stops serving {name} on {day}, in {counted(left, 'day')}", fix
        )
    return None


def _without_price(settings: Settings, book: PriceBook, today: date) -> list[str]:
    return [
        model.name
        for model in settings.catalogue.models.values()
        if any(
            book.of(target.upstream, settings.upstreams[target.upstream].prices, today).find(
                target.model
            )
            is None
            for target in model.targets
        )
    ]
