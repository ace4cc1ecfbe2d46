"""A provider's bill as a CSV file.

Understood is OpenAI's export of the cost dashboard (``start_time``, ``end_time``,
``start_time_iso``, ``end_time_iso``, ``amount_value``, ``amount_currency``, ``line_item``,
``project_id``, ``organization_id``, ``organization_name``; seen in exports of 2025) and anything
with these columns, in any order, with or without others:

- the day, in UTC: ``start_time`` (Unix seconds), ``start_time_iso``, ``date`` or ``day``;
- what for: ``line_item`` or ``model``;
- dollars: ``amount_value``, ``cost``, ``cost_usd`` or ``amount``;
- optionally ``amount_currency`` or ``currency``, which must be usd.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime

from gateway.domain.bill import BilledItem, round_dollars
from gateway.ports import BillUnreadable

DAY_COLUMNS = ("start_time", "start_time_iso", "date", "day")
ITEM_COLUMNS = ("line_item", "model")
AMOUNT_COLUMNS = ("amount_value", "cost", "cost_usd", "amount")
CURRENCY_COLUMNS = ("amount_currency", "currency")


def read_bill(text: str, day: date) -> list[BilledItem]:
    """The line items of one UTC day. Rows of other days are passed over, and so are rows without
    an amount: exports have one for each day on which nothing was billed.

    Raises ``BillUnreadable`` that names the line or the column; also where no row is of this day:
    a bill that is not known is not a bill of nothing.
    """
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    try:
        head = [name.strip().lower() for name in reader.fieldnames or ()]
        reader.fieldnames = head
        day_column = _column(head, DAY_COLUMNS, "the day")
        item_column = _column(head, ITEM_COLUMNS, "the model or line item")
        amount_column = _column(head, AMOUNT_COLUMNS, "the dollars")
        currency_column = next((name for name in CURRENCY_COLUMNS if name in head), None)
        seen: set[date] = set()
        items: list[BilledItem] = []
        for row in reader:
            of_day = _day(_cell(row, day_column), reader.line_num)
            seen.add(of_day)
            amount = _cell(row, amount_column)
            if of_day != day or not amount:
                continue
            currency = _cell(row, currency_column) if currency_column else ""
            if currency.lower() not in ("", "usd"):
                raise BillUnreadable(
                    f"line {reader.line_num}: the amount is in {currency!r}, and the books are in "
                    "dollars"
                )
            try:
                nanousd = round_dollars(amount.removeprefix("$"))
            except ValueError as error:
                raise BillUnreadable(f"line {reader.line_num}: {error}") from None
            items.append(BilledItem(_cell(row, item_column), nanousd))
    except csv.Error as error:
        # Unlike DictReader's own count, this one has the line that cannot be read.
        raise BillUnreadable(f"line {reader.reader.line_num}: {error}") from None
    if day not in seen:
        has = f"it has {min(seen)} to {max(seen)}" if seen else "it has no rows at all"
        raise BillUnreadable(f"it has no row of {day} ({has}; days are UTC)")
    return items


def _column(head: Sequence[str], known: Sequence[str], what: str) -> str:
    for name in known:
        if name in head:
            return name
    raise BillUnreadable(
        f"it has no column for {what}: one of {', '.join(known)} is needed, and it has "
        f"{', '.join(head) or 'none'}"
    )


def _cell(row: Mapping[str, str | None], name: str) -> str:
    return (row.get(name) or "").strip()


def _day(text: str, line: int) -> date:
    """The UTC day of Unix seconds, of an ISO 8601 date, or of a date and time; without a zone it
    is UTC."""
    try:
        if text.isascii() and text.replace(".", "", 1).isdecimal():
            return datetime.fromtimestamp(int(text.partition(".")[0]), UTC).date()
        if len(text) == len("2026-11-22"):
            return date.fromisoformat(text)
        instant = datetime.fromisoformat(text)
    except (ValueError, OverflowError, OSError):
        raise BillUnreadable(f"line {line}: {text!r} is neither a date nor Unix seconds") from None
    return instant.date() if instant.tzinfo is None else instant.astimezone(UTC).date()
