"""What is said of a result that is not there: it is still being made, or there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from gateway.domain.errors import ResultNotFound
from gateway.ports import FlightNotice
from gateway.relay.flights import Head
from gateway.relay.headers import Headers
from gateway.relay.media import JSON_TYPE

RESULTS = "/v1/images/results/"
"""Results are below this path, by request id."""
RETRY_SECONDS = 2
APPLIED: Headers = (("preference-applied", "respond-async"),)
"""Of the first answer to a request that did not want to wait."""


@dataclass(frozen=True, slots=True)
class Running:
    """A call that is under way, as whoever asked for it may know it. ``seconds`` since it was asked
    for; ``partials`` are the partial pictures seen so far."""

    rid: str
    operation: str
    model: str
    created_at: datetime
    seconds: float
    partials: int = 0


@dataclass(frozen=True, slots=True)
class Fetched:
    """What somebody gets who asks for a result. ``done`` is told whether all of it arrived."""

    head: Head
    done: Callable[[bool], None] = lambda delivered: None


def running(notice: FlightNotice, now: datetime, partials: int = 0) -> Running:
    """A flight, as whoever asked for it may know it."""
    seconds = (now - notice.at).total_seconds()
    return Running(notice.rid, notice.operation, notice.model, notice.at, seconds, partials)


def result_url(rid: str) -> str:
    """Where a result is, below the gateway's origin."""
    return f"{RESULTS}{rid}"


def running_head(running: Running, more: Headers = ()) -> Head:
    """202: where to ask, and how far it is. ``more`` are further headers."""
    url = result_url(running.rid)
    document = {
        "id": running.rid,
        "object": "image.result",
        "status": "in_progress",
        "created_at": int(running.created_at.timestamp()),
        "operation": running.operation,
        "model": running.model,
        "progress": {
            "partial_images": running.partials,
            "seconds": round(max(0.0, running.seconds), 1),
        },
        "result_url": url,
    }
    content = json.dumps(document, separators=(",", ":")).encode()
    headers = {
        "content-type": JSON_TYPE,
        "x-request-id": running.rid,
        "location": url,
        "retry-after": str(RETRY_SECONDS),
        **dict(more),
    }
    return Head.of(202, tuple(headers.items()), content)


def no_result(rid: str, ttl: timedelta, idempotent_ttl: timedelta) -> ResultNotFound:
    """The one answer to ids that nobody has, that another team has, and that are none: its words
    tell nothing about which. ``ttl`` and ``idempotent_ttl`` are how long results are kept."""
    return ResultNotFound(
        f"No result {rid[:64]} of your team. Results are kept for {_words(ttl)}, and for "
        f"{_words(idempotent_ttl)} where the request had an Idempotency-Key."
    )


def _words(kept: timedelta) -> str:
    seconds = round(kept.total_seconds())
    units = (("hour", 3600), ("minute", 60), ("second", 1))
    name, length = next(unit for unit in units if seconds % unit[1] == 0)
    count = seconds // length
    return f"{count} {name}{'' if count == 1 else 's'}"
