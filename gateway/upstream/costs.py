"""What an upstream says that it billed: OpenAI's ``GET /v1/organization/costs`` (contract 3.6).

Needs an admin key, which may do nothing but look. Reading costs nothing and changes nothing, so it
is repeated where a picture never would be.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import NoReturn
from urllib.parse import urlencode

from gateway.domain.bill import BilledItem, round_dollars
from gateway.domain.errors import GatewayError
from gateway.ports import BillUnreadable, Outgoing, Upstream

ATTEMPTS = 4
WAITS_SECONDS = (1.0, 2.0, 4.0)
LONGEST_WAIT_SECONDS = 30.0
DEADLINE_SECONDS = 120.0
MAX_PAGES = 1_000
MAX_PAGE_BYTES = 16 * 1024 * 1024
BUCKETS_A_PAGE = 31
"""A month. The API allows 180 and gives 7 to who does not ask."""
PAST = frozenset({408, 425, 429})
"""Statuses below 500 that pass by themselves."""


class _Passing(Exception):
    """A failure that may be over in a moment. ``wait_seconds`` is what the upstream asked for."""

    def __init__(self, why: str, wait_seconds: float | None = None) -> None:
        super().__init__(why)
        self.wait_seconds = wait_seconds


async def read_costs(
    upstream: Upstream,
    first: date,
    last: date,
    *,
    buckets_a_page: int = BUCKETS_A_PAGE,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> dict[date, list[BilledItem]]:
    """The line items of each UTC day from ``first`` to ``last``, both included.

    ``upstream`` sends the admin key. A day that the answer does not have is not in the result: it
    is not known, which is not nothing. Raises ``BillUnreadable``.
    """
    start, end = _midnight(first), _midnight(last + timedelta(days=1))
    asked = {
        "start_time": str(start),
        "end_time": str(end),
        "bucket_width": "1d",
        "group_by[]": "line_item",
        "limit": str(buckets_a_page),
    }
    found: dict[date, list[BilledItem]] = {}
    seen: set[str] = set()
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            for _ in range(MAX_PAGES):
                page = await _page(upstream, asked, pause)
                for bucket in _list(page.get("data"), "data", upstream):
                    _take(_object(bucket, "data[]", upstream), start, end, found, upstream)
                cursor = page.get("next_page")
                if not page.get("has_more"):
                    break
                if not isinstance(cursor, str) or not cursor or cursor in seen:
                    _unreadable(upstream, "it says has_more without a next_page of its own")
                seen.add(cursor)
                asked["page"] = cursor
            else:
                _unreadable(upstream, f"it has more than {MAX_PAGES} pages")
    except TimeoutError:
        raise BillUnreadable(
            f"upstream {upstream.name}: its costs were not read within {DEADLINE_SECONDS:.0f} s; "
            "try again later"
        ) from None
    return found


async def _page(
    upstream: Upstream, asked: Mapping[str, str], pause: Callable[[float], Awaitable[None]]
) -> Mapping[str, object]:
    """One page, tried a few times."""
    outgoing = Outgoing(
        "GET", f"/organization/costs?{urlencode(asked)}", (("accept", "application/json"),)
    )
    why = ""
    for attempt in range(ATTEMPTS):
        try:
            return await _once(upstream, outgoing)
        except _Passing as error:
            why = str(error)
            if attempt < ATTEMPTS - 1:
                wait = WAITS_SECONDS[attempt] if error.wait_seconds is None else error.wait_seconds
                await pause(min(wait, LONGEST_WAIT_SECONDS))
    raise BillUnreadable(
        f"upstream {upstream.name}: its costs cannot be read ({why}, {ATTEMPTS} times); try again "
        "later, or give its export with --csv FILE"
    )


async def _once(upstream: Upstream, outgoing: Outgoing) -> Mapping[str, object]:
    """One answer. Raises ``_Passing`` or ``BillUnreadable``."""
    try:
        key = next((one.id for one in upstream.credentials), "")
        reply = await upstream.send(outgoing, key)
        body = bytearray()
        try:
            async for chunk in reply.chunks():
                body += chunk
                if len(body) > MAX_PAGE_BYTES:
                    _unreadable(upstream, f"an answer of more than {MAX_PAGE_BYTES} bytes")
        finally:
            await reply.aclose()
    except GatewayError as error:
        # Its text speaks of pictures that may have been bought; here nothing was.
        raise _Passing(error.reason.replace("_", " ")) from error
    if reply.status == 200:
        return _parse(bytes(body), upstream)
    said = _message(bytes(body))
    if reply.status in PAST or reply.status >= 500:
        raise _Passing(f"HTTP {reply.status}", _retry_after(reply.headers.get("retry-after")))
    if reply.status in (401, 403):
        raise BillUnreadable(
            f"upstreams.{upstream.name}.admin_key may not read costs: HTTP {reply.status}{said}. "
            "It has to be an admin key of the organization (sk-admin-...), not one of a project"
        )
    raise BillUnreadable(
        f"upstream {upstream.name} answered HTTP {reply.status}{said} to "
        "GET /organization/costs; if it has no such endpoint, give its export with --csv FILE"
    )


def _parse(body: bytes, upstream: Upstream) -> Mapping[str, object]:
    try:
        page = json.loads(body, parse_float=Decimal, parse_constant=_no_number)
    except (ValueError, RecursionError):
        _unreadable(upstream, "it is not JSON")
    return _object(page, "the answer", upstream)


def _take(
    bucket: Mapping[str, object],
    start: int,
    end: int,
    found: dict[date, list[BilledItem]],
    upstream: Upstream,
) -> None:
    """Adds a bucket's results to its day. One of another time was not asked for."""
    begins = bucket.get("start_time")
    if not isinstance(begins, int) or isinstance(begins, bool):
        _unreadable(upstream, "a bucket has no start_time")
    if not start <= begins < end:
        return
    items = found.setdefault(datetime.fromtimestamp(begins, UTC).date(), [])
    for entry in _list(bucket.get("results"), "results", upstream):
        result = _object(entry, "results[]", upstream)
        if result.get("amount") is None:
            continue
        amount = _object(result["amount"], "amount", upstream)
        currency, value = amount.get("currency"), amount.get("value")
        if not isinstance(currency, str) or currency.lower() != "usd":
            _unreadable(upstream, f"an amount is in {currency!r}, and the books are in dollars")
        # Documented as a number; seen as text too.
        if isinstance(value, bool) or not isinstance(value, (int, Decimal, str)):
            _unreadable(upstream, "an amount has no value")
        try:
            nanousd = round_dollars(value)
        except ValueError as error:
            _unreadable(upstream, str(error))
        name = result.get("line_item")
        items.append(BilledItem(name if isinstance(name, str) else "", nanousd))


def _object(value: object, name: str, upstream: Upstream) -> Mapping[str, object]:
    if not isinstance(value, dict):
        _unreadable(upstream, f"{name} is not an object")
    return value


def _list(value: object, name: str, upstream: Upstream) -> list[object]:
    if not isinstance(value, list):
        _unreadable(upstream, f"{name} is not a list")
    return value


def _message(body: bytes) -> str:
    """What the upstream said, as an end of a sentence; keys in it are masked by the upstream."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" ({message[:200].rstrip('. ')})" if isinstance(message, str) else ""


def _retry_after(text: str | None) -> float | None:
    """Seconds. A date, and what cannot be read, is none."""
    if text is None or not text.isascii() or not text.isdecimal() or len(text) > 6:
        return None
    return float(text)


def _midnight(day: date) -> int:
    return int(datetime.combine(day, time(), UTC).timestamp())


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _unreadable(upstream: Upstream, why: str) -> NoReturn:
    raise BillUnreadable(
        f"upstream {upstream.name}: its answer to GET /organization/costs cannot be read: {why}"
    )
