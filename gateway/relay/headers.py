"""The headers of an answer (lessons.md 4 is the only list), and errors as answers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from email.utils import format_datetime
from functools import lru_cache

from gateway.domain.call import AnswerAs, Call, Change
from gateway.domain.charge import Quote
from gateway.domain.compat import TOOL_MODEL
from gateway.domain.errors import GatewayError, UpstreamRefused
from gateway.domain.ledger import Balance, Basis, Line
from gateway.domain.money import Money, format_dollars
from gateway.domain.quota import Demand, Standing, Unit
from gateway.domain.receipt import CacheResult
from gateway.relay.failover import said_wait
from gateway.relay.flights import Head
from gateway.relay.media import JSON_TYPE
from gateway.relay.plan import Plan, Way
from gateway.relay.plan_response import tool_param
from gateway.relay.retirement import Sunset

Headers = tuple[tuple[str, str], ...]

EVENTS = "text/event-stream; charset=utf-8"
MAX_WAIT_SECONDS = 60.0
"""Node ignores a longer `retry-after` and comes back at once (contract 4.4), so it is told not
to come back at all."""

ENDLESS = datetime.max.replace(tzinfo=UTC)
CHANGED = "x-gateway-changed"
_MODEL = "model="
_TOOL = "tools["
_UNSAFE = re.compile(r"[^\x20-\x7e]")
_RATES = (
    (
        Unit.REQUESTS,
        "x-ratelimit-limit-requests",
        "x-ratelimit-remaining-requests",
        "x-ratelimit-reset-requests",
    ),
    (
        Unit.IMAGES,
        "x-ratelimit-limit-images",
        "x-ratelimit-remaining-images",
        "x-ratelimit-reset-images",
    ),
)
_PASSED_ON = (
    *(("openai-processing-ms", "openai-processing-ms"), ("openai-version", "openai-version")),
    ("x-request-id", "x-upstream-request-id"),
)
"""Of an upstream's headers those that clients get, and what they are called for them."""


def of_request(rid: str, cache: CacheResult) -> Headers:
    """What every answer says of the request that it is for."""
    return (("x-request-id", rid), ("x-cache", str(cache)))


def of_form(stream: bool) -> Headers:
    return (("content-type", EVENTS if stream else JSON_TYPE),)


def of_way(plan: Plan, way: Way) -> Headers:
    """Who makes the picture, and what was changed for it. What is kept has its pictures in it,
    as what is under way will; who gets urls is told so at the very end (``with_changes``)."""
    other = way.model.name if way.model.name != plan.asked.name else None
    call = plan.call if way.call is None else way.call
    who = (("x-model-served", way.target.model), ("x-gateway-upstream", way.upstream.name))
    if not (other or call.changes or call.mends or call.asks or plan.sunsets):
        return who
    return (*who, *of_changes(call, other, way.target.tool), *of_sunsets(plan.sunsets))


def of_sunsets(sunsets: Sequence[Sunset]) -> Headers:
    """That models which a call needs are soon served no more (RFC 8594): from the first of their
    days on it cannot be had, and what to do."""
    if not sunsets:
        return ()
    warning = " ".join(_say_sunset(sunset) for sunset in sunsets)
    first = min(sunset.day for sunset in sunsets)
    instant = format_datetime(datetime.combine(first, time(), UTC), usegmt=True)
    said = (("sunset", instant), ("x-gateway-warning", warning))
    return tuple((name, value) for name, value in said if is_clean(value))


def _say_sunset(sunset: Sunset) -> str:
    advice = f"; use {sunset.replacement}." if sunset.replacement else "."
    return f"{sunset.model} shuts down on {sunset.day}{advice}"


def of_attempts(count: int) -> Headers:
    """How many times the call was sent upstream."""
    return (("x-gateway-attempts", str(count)),)


def of_changes(
    call: Call, stand_in: str | None = None, drawn_by: str = "", *, hosted: bool = False
) -> Headers:
    """What was changed of a request, and the model that stood in for the one it is for, if any:
    ``name=value`` of what is sent instead, ``name`` alone of what is left out. ``drawn_by`` is what
    the image tool's model is called where the call is sent, empty before that is known; ``hosted``:
    the answer has urls where its pictures were."""
    if stand_in is None and call.asks is None and not (call.changes or call.mends):
        return ()
    models = ("model", TOOL_MODEL)
    said = [_say_change(change, hosted) for change in call.changed if change.name not in models]
    model, drawing = (
        next((change.after for change in call.changes if change.name == name), None)
        for name in models
    )
    if stand_in is not None or model is not None:
        said.insert(0, _MODEL + (stand_in or str(model)))
    tool = None if call.asks is None else call.asks.tool
    sent = drawn_by or str(drawing or "")
    if tool is not None and sent not in ("", tool.model):
        said.append(f"{tool_param(tool)}={sent}")
    return ((CHANGED, _UNSAFE.sub("?", ", ".join(said))),) if said else ()


def stood_in(head: Head) -> tuple[str, str] | None:
    """The configured model that an answer says it is from, empty where it is the asked one's own
    name, and what that is where it was served; None where it does not say."""
    said = dict(head.headers)
    served = said.get("x-model-served")
    if served is None:
        return None
    named = said.get(CHANGED, "").partition(", ")[0]
    return (named.removeprefix(_MODEL) if named.startswith(_MODEL) else ""), served


def with_changes(head: Head, call: Call) -> Head:
    """The head of an answer to ``call``, saying what was changed of this very request: who joins a
    flight, or gets a kept answer, asked for the same in its own words. A model that stood in did
    so for all of them."""
    theirs = ""
    for name, value in head.headers:
        if name == CHANGED:
            theirs = value
            break
    if not (theirs or call.changes or call.mends):
        return head
    items = theirs.split(", ")
    named = next((item for item in items if item.startswith(_MODEL)), "")
    stand_in = named.removeprefix(_MODEL)
    drawn_by = next((item.partition("=")[2] for item in items if item.startswith(_TOOL)), "")
    others = tuple(pair for pair in head.headers if pair[0] != CHANGED)
    other = stand_in if stand_in not in ("", call.model) else None
    own = of_changes(call, other, drawn_by, hosted=call.answer_as is AnswerAs.URL)
    return replace(head, headers=(*others, *own))


def _say_change(change: Change, hosted: bool) -> str:
    if change.name == "response_format" and hosted:
        return "response_format=url->hosted"
    return change.name if change.after is None else f"{change.name}={change.after}"


def of_upstream(headers: Mapping[str, str]) -> Headers:
    """What passes from the upstream's headers; everything else stays behind."""
    passed: list[tuple[str, str]] = []
    for name, told in _PASSED_ON:
        if name in headers and is_clean(headers[name]):
            passed.append((told, headers[name]))
    return tuple(passed)


def of_cost(cost: Money, basis: Basis) -> Headers:
    """The exact cost of a settled call."""
    return (("x-cost-usd", format_dollars(cost)), ("x-cost-basis", str(basis)))


NOTHING_SPENT: Headers = (*of_attempts(0), *of_cost(0, Basis.NONE))
"""Of a call that nothing was sent for."""


REPLAYED = ("idempotent-replayed", "true")
"""Of an answer that an earlier request under the same Idempotency-Key got."""


NOT_HOSTED = ("x-gateway-warning", "the picture could not be put behind a url; it is in b64_json")
"""Of an answer that is kept nowhere, and whose pictures could not be stored for their urls."""


def of_bound(quote: Quote) -> Headers:
    """What a stream can say before its usage is known."""
    return (("x-cost-bound-usd", format_dollars(quote.bound.amount)),)


def of_budget(lines: Sequence[Line], balances: Sequence[Balance]) -> Headers:
    """What is left of the tightest budget, and until when if it is ever renewed."""
    tightest: tuple[Money, datetime] | None = None
    for line, balance in zip(lines, balances):  # noqa: B905 - ``strict`` costs as much again
        amount = line.limit.amount
        if amount is not None:
            left = amount - balance.used, line.period.ends or ENDLESS
            if tightest is None or left < tightest:
                tightest = left
    if tightest is None:
        return ()
    remaining, resets = tightest
    said = ("x-budget-remaining-usd", format_dollars(max(0, remaining)))
    return (said,) if resets is ENDLESS else (said, ("x-budget-reset", say_instant(resets)))


@lru_cache(maxsize=256)
def say_instant(instant: datetime) -> str:
    """An instant in UTC, as RFC 3339 writes it. A period's end is said all the while that it
    runs."""
    return instant.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def of_rates(standings: Sequence[Standing]) -> Headers:
    """The team's own rates, in OpenAI's words: the tightest limit of each unit."""
    found: list[tuple[str, str]] = []
    for unit, limit, remaining, reset in _RATES:
        tightest: Standing | None = None
        for standing in standings:
            if standing.limit.unit is unit and (
                tightest is None or standing.remaining < tightest.remaining
            ):
                tightest = standing
        if tightest is not None:
            found += (
                (limit, str(tightest.limit.amount)),
                (remaining, str(tightest.remaining)),
                (reset, f"{tightest.reset_seconds:.3f}s"),
            )
    return tuple(found)


def given_back(standings: Sequence[Standing], demand: Demand) -> tuple[Standing, ...]:
    """The rates after what a call took of them was given back."""
    found = []
    for standing in standings:
        amount, taken = standing.limit.amount or 0, demand.of(standing.limit.unit)
        remaining = min(amount, standing.remaining + taken)
        reset = standing.reset_seconds - (60 * taken / amount if amount else 0)
        found.append(Standing(standing.limit, remaining, max(0.0, reset)))
    return tuple(found)


def of_age(stored_at: datetime, now: datetime) -> Headers:
    """How old a kept answer is, in whole seconds."""
    age = max(timedelta(), now - stored_at)
    return (("age", str(int(age.total_seconds()))),)


def error_head(error: GatewayError, rid: str, more: Headers = ()) -> Head:
    """An error as an answer: OpenAI's shape, whether another try can help, and ``more``: what is
    known of the request. What the error says itself goes before that."""
    headers = dict(more) | dict(of_advice(error)) | {"content-type": JSON_TYPE, "x-request-id": rid}
    if error.upstream_rid and is_clean(error.upstream_rid):
        headers["x-upstream-request-id"] = error.upstream_rid
    if error.close:
        headers["connection"] = "close"
    return Head.of(error.status, tuple(headers.items()), error.content)


def of_advice(error: GatewayError) -> Headers:
    """What an error says of itself: the provider's advice, and whether another try can help."""
    headers = {name: value for name, value in error.headers if is_clean(value)}
    wait, retry = error.retry_after_seconds, error.should_retry
    if isinstance(error, UpstreamRefused):
        wait = said_wait(headers)
    elif wait is not None:
        headers["retry-after"] = str(math.ceil(wait))
        headers["retry-after-ms"] = str(math.ceil(wait * 1000))
    if wait is not None and wait > MAX_WAIT_SECONDS:
        retry = False
    if retry is not None:
        headers["x-should-retry"] = "true" if retry else "false"
    return tuple(headers.items())


def is_clean(value: str) -> bool:
    return value.isprintable() and value.isascii()
