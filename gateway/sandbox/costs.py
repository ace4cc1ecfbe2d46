"""What was billed in dollars, by day and line item: ``GET /v1/organization/costs`` (contract 3.6).

Line items are ``<model>, text input``, ``<model>, image input`` and ``<model>, image output``, and
of a response's own model ``text input``, ``cached text input`` and ``text output``. The author of
an SVG is not billed: no price of such a model is published.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from types import MappingProxyType
from urllib.parse import parse_qsl

from gateway.domain.call import Json
from gateway.sandbox.refusals import Refused

NANOS_PER_DOLLAR = 1_000_000_000
DAY_SECONDS = 86_400
ADMIN_KEY = "sk-admin"
PATH = "/v1/organization/costs"
GROUPS = ("project_id", "user_id", "line_item", "api_key_id", "api_source")
MAX_BUCKETS, USUAL_BUCKETS = 180, 7


@dataclass(frozen=True, slots=True)
class Rates:
    """Nano-dollars a token."""

    text_in: int
    image_in: int
    image_out: int


RATES: Mapping[str, Rates] = MappingProxyType(
    {
        "gpt-image-1-mini": Rates(2_000, 2_500, 8_000),
        "gpt-image-1.5": Rates(5_000, 8_000, 32_000),
        "gpt-image-1": Rates(5_000, 10_000, 40_000),
        "chatgpt-image-latest": Rates(5_000, 8_000, 32_000),
        "gpt-image-2": Rates(5_000, 8_000, 30_000),
    }
)
"""By the beginning of a model's name, the first that fits. The sandbox keeps its own copy: an
upstream's bill that came from the gateway's price book could never disagree with it."""


TEXT_RATES: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "gpt-5.4-mini": (750, 75, 4_500),
        "gpt-5.4-nano": (200, 20, 1_250),
        "gpt-5": (1_250, 125, 10_000),
        "gpt-5-mini": (250, 25, 2_000),
        "gpt-4.1": (2_000, 500, 8_000),
        "gpt-4.1-mini": (400, 100, 1_600),
        "gpt-4o": (2_500, 1_250, 10_000),
    }
)
"""Nano-dollars a token of the models that hold conversations: input, cached input, output. One
that is not here has no published price."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question that was understood: buckets from ``start`` to before ``end``, ``limit`` of them
    from ``cursor`` on."""

    start: datetime
    end: datetime
    cursor: datetime
    by_line_item: bool
    limit: int


def line_items(model: str, usage: Json) -> Iterator[tuple[str, int]]:
    """(line item, nano-dollars) of one answer's usage. Nothing for a usage without counts, which
    only a rule can make."""
    rates = next((rates for start, rates in RATES.items() if model.startswith(start)), None)
    if rates is None or not isinstance(usage, dict):
        return
    details = usage.get("input_tokens_details")
    parts = details if isinstance(details, dict) else {}
    counts = (
        ("text input", parts.get("text_tokens"), rates.text_in),
        ("image input", parts.get("image_tokens"), rates.image_in),
        ("image output", usage.get("output_tokens"), rates.image_out),
    )
    for name, count, rate in counts:
        if isinstance(count, int) and count > 0:
            yield f"{model}, {name}", count * rate


def text_line_items(model: str, usage: Json) -> Iterator[tuple[str, int]]:
    """(line item, nano-dollars) of the ``usage`` of a response, without its pictures."""
    if model not in TEXT_RATES or not isinstance(usage, dict):
        return
    rates = TEXT_RATES[model]
    given, written = usage.get("input_tokens"), usage.get("output_tokens")
    details = usage.get("input_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    cached = cached if isinstance(cached, int) else 0
    fresh = given - cached if isinstance(given, int) else None
    counts = (("text input", fresh), ("cached text input", cached), ("text output", written))
    for (name, count), rate in zip(counts, rates, strict=True):
        if isinstance(count, int) and count > 0:
            yield f"{model}, {name}", count * rate


def read_query(query: str, now: datetime) -> Asked:
    """The question of a query string. Raises ``Refused``."""
    given: dict[str, list[str]] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        given.setdefault(name.removesuffix("[]"), []).append(value)
    if "start_time" not in given:
        raise Refused(
            "Missing required parameter: 'start_time'.",
            code="missing_required_parameter",
            param="start_time",
        )
    start = _instant(given, "start_time")
    end = _instant(given, "end_time") if "end_time" in given else _day_of(now) + timedelta(days=1)
    if given.get("bucket_width", ["1d"]) != ["1d"]:
        raise _invalid("bucket_width", "Supported values are: '1d'.")
    groups = given.get("group_by", [])
    if unknown := next((name for name in groups if name not in GROUPS), None):
        raise _invalid("group_by", f"Got '{unknown}'; supported values are: {GROUPS}.")
    limit = _whole(given, "limit") if "limit" in given else USUAL_BUCKETS
    if not 1 <= limit <= MAX_BUCKETS:
        raise _invalid("limit", f"Expected a value from 1 to {MAX_BUCKETS}.")
    cursor = _cursor(given["page"][-1]) if "page" in given else start
    return Asked(_day_of(start), end, _day_of(cursor), "line_item" in groups, limit)


def page(
    asked: Asked, billed: Iterable[tuple[date, str, int]], drift_percent: float
) -> dict[str, Json]:
    """An answer. ``billed`` is (day, line item, nano-dollars); a drift makes each dearer by so
    many percent, as a bill that the ledger has not seen all of. Amounts are JSON floats, because
    OpenAI's are."""
    days: dict[date, dict[str | None, int]] = {}
    for day, item, nanos in billed:
        of_day = days.setdefault(day, {})
        key = item if asked.by_line_item else None
        of_day[key] = of_day.get(key, 0) + nanos
    buckets: list[Json] = []
    at = asked.cursor
    while at < asked.end and len(buckets) < asked.limit:
        results = sorted(days.get(at.date(), {}).items(), key=lambda row: row[0] or "")
        buckets.append(
            {
                "object": "bucket",
                "start_time": int(at.timestamp()),
                "end_time": int(at.timestamp()) + DAY_SECONDS,
                "results": [_result(item, nanos, drift_percent) for item, nanos in results],
            }
        )
        at += timedelta(days=1)
    more = at < asked.end
    next_page = _page_name(at) if more else None
    return {"object": "page", "data": buckets, "has_more": more, "next_page": next_page}


def may_read(authorization: str) -> bool:
    """Whether a header's key is an admin key; any that looks like one is."""
    return authorization.partition(" ")[2].strip().startswith(ADMIN_KEY)


def _result(item: str | None, nanos: int, drift_percent: float) -> Json:
    value = nanos * (1 + drift_percent / 100) / NANOS_PER_DOLLAR
    return {
        "object": "organization.costs.result",
        "amount": {"value": value, "currency": "usd"},
        "line_item": item,
        "project_id": None,
        "api_key_id": None,
        "quantity": None,
    }


def _day_of(instant: datetime) -> datetime:
    return instant.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _instant(given: Mapping[str, list[str]], name: str) -> datetime:
    try:
        return datetime.fromtimestamp(_whole(given, name), UTC)
    except (OverflowError, ValueError, OSError):
        raise _invalid(name, "Expected a time in Unix seconds.") from None


def _whole(given: Mapping[str, list[str]], name: str) -> int:
    try:
        return int(given[name][-1])
    except ValueError:
        raise _invalid(name, "Expected an integer.") from None


def _page_name(at: datetime) -> str:
    return "page_" + base64.urlsafe_b64encode(str(int(at.timestamp())).encode()).decode()


def _cursor(name: str) -> datetime:
    try:
        return datetime.fromtimestamp(
            int(base64.urlsafe_b64decode(name.removeprefix("page_"))), UTC
        )
    except (ValueError, OverflowError, OSError, binascii.Error):
        raise _invalid("page", "It is no cursor of an earlier answer.") from None


def _invalid(name: str, why: str) -> Refused:
    return Refused(f"Invalid value for '{name}'. {why}", code="invalid_value", param=name)
