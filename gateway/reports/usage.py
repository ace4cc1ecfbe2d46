"""What the books say of each team, key, model and day."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.domain.ledger import UsageRow, UserUsage
from gateway.domain.money import format_dollars

COUNTS = (
    "requests",
    "cached_requests",
    "images",
    "text_in",
    "image_in",
    "text_out",
    "image_out",
    "unresolved",
    "flagged",
)
MONEY = ("cost", "avoided", "unresolved_cost")


def usage_report(rows: Sequence[UsageRow], key_names: Mapping[str, str]) -> dict[str, object]:
    """Rows and their total; dollars are exact decimal text."""
    listed = [
        {
            "day": row.day,
            "team": row.team,
            "key_id": row.key_id,
            "key_name": key_names.get(row.key_id, ""),
            "model": row.model,
            **_figures({name: getattr(row, name) for name in (*COUNTS, *MONEY)}),
        }
        for row in rows
    ]
    totals = {name: sum(getattr(row, name) for row in rows) for name in (*COUNTS, *MONEY)}
    return {"rows": listed, "total": _figures(totals)}


def user_report(rows: Sequence[UserUsage]) -> dict[str, object]:
    """Rows by team and end user, and their total; dollars are exact decimal text. ``user`` is null
    for the calls that named nobody."""
    names = ("requests", "images", "cost", "unresolved")
    listed = [
        {
            "team": row.team,
            "user": row.user or None,
            **_user_figures({name: getattr(row, name) for name in names}),
        }
        for row in rows
    ]
    totals = {name: sum(getattr(row, name) for row in rows) for name in names}
    return {"rows": listed, "total": _user_figures(totals)}


def _user_figures(values: Mapping[str, int]) -> dict[str, object]:
    return {
        "requests": values["requests"],
        "images": values["images"],
        "cost_usd": format_dollars(values["cost"]),
        "unresolved": values["unresolved"],
    }


def _figures(values: Mapping[str, int]) -> dict[str, object]:
    return {
        "requests": values["requests"],
        "cached_requests": values["cached_requests"],
        "images": values["images"],
        "tokens": {
            "text_in": values["text_in"],
            "image_in": values["image_in"],
            "text_out": values["text_out"],
            "image_out": values["image_out"],
        },
        "cost_usd": format_dollars(values["cost"]),
        "avoided_usd": format_dollars(values["avoided"]),
        "unresolved": values["unresolved"],
        "unresolved_usd": format_dollars(values["unresolved_cost"]),
        "flagged": values["flagged"],
    }
