"""One JSON line a request, from an allow-list of fields: never a key, a picture, or (unless the
operator asks for it) a prompt."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, TextIO

import structlog

from gateway.domain.money import format_dollars
from gateway.domain.receipt import Delivery, Receipt
from gateway.ports import Clock

MAX_TEXT = 512
MAX_PROMPT = 4000

# The second line of defence: nothing that looks like a secret or a picture leaves in a text.
_SECRETS = (
    (re.compile(r"\b(sk|igw)[-_][A-Za-z0-9_-]{8,}"), r"\1-***"),
    (re.compile(r"(?i)\bbearer\s+[^\s\"']+"), "Bearer ***"),
    (re.compile(r"data:[a-z]+/[a-z0-9.+-]+;base64,[A-Za-z0-9+/=]*"), "data:***"),
    (re.compile(r"[A-Za-z0-9+/]{200,}={0,2}"), "***"),
)

_LONG_TEXT = 200
"""What the last of them takes for a picture; no shorter text is cut either."""

# What a terminal obeys, and what turns the direction of a line round or begins another.
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def redact(text: str) -> str:
    """``text`` without what looks like a key or a picture."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _are_plain(texts: Sequence[str]) -> bool:
    """Whether ``_redact_event`` would leave these as they are: 3 us for the texts of a request,
    where the patterns take 60. It may say no of what is harmless."""
    if max(map(len, texts), default=0) >= _LONG_TEXT:
        return False
    together = "\n".join(texts).lower()
    # Spelled out: with any() over a list of hints it takes twice as long.
    return not (
        "sk-" in together
        or "sk_" in together
        or "igw-" in together
        or "igw_" in together
        or "bearer" in together
        or "data:" in together
    )


def _without_colour(
    _: object, __: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    event.pop("color_message", None)
    return event


def _redact_event(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if isinstance(value, str):
            limit = MAX_PROMPT if name in ("prompt", "exception") else MAX_TEXT
            event[name] = redact(value)[:limit]
    return event


class _Text:
    """Lines for a terminal. What clients and providers wrote is shown, and not obeyed."""

    def __init__(self) -> None:
        self._console = structlog.dev.ConsoleRenderer(colors=False)

    def __call__(self, logger: Any, name: str, event: MutableMapping[str, Any]) -> str:
        # Only a traceback has lines of its own.
        event["event"] = str(event.get("event", "")).replace("\n", "\\n")
        return _CONTROL.sub(_escaped, self._console(logger, name, event))


def _escaped(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]


class _JsonLines(logging.StreamHandler[TextIO]):
    """Also takes a line that is JSON already."""

    def write(self, line: str) -> bool:
        """Whether it could be written."""
        self.acquire()
        try:
            self.stream.write(line)
            self.stream.flush()
        except (OSError, ValueError):
            return False
        finally:
            self.release()
        return True


def configure(level: str, form: str, stream: TextIO | None = None) -> None:
    """Sends every logger of the process, uvicorn's too, through one renderer to ``stream``."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _without_colour,
        _redact_event,
    ]
    as_json = form == "json"
    renderer: Any = structlog.processors.JSONRenderer() if as_json else _Text()
    handler = (_JsonLines if as_json else logging.StreamHandler)(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.propagate = name != "uvicorn.access"
        logger.setLevel("WARNING")


class RequestLog:
    """Writes the line of each request.

    As JSON it is made and written here, 35 us, and looks like any other: by way of a record of
    ``logging`` and the processors of structlog it would take 245.
    """

    def __init__(self, clock: Clock) -> None:
        self._log = logging.getLogger("gateway.request")
        self._clock = clock

    def finished(self, receipt: Receipt, delivery: Delivery) -> None:
        if not self._log.isEnabledFor(logging.INFO):
            return
        fields, listening = _fields(receipt, delivery), logging.root.handlers
        lines = listening[0] if len(listening) == 1 else None
        # Text, what cannot be written, and whoever else listens: as ``logging`` does it.
        if not isinstance(lines, _JsonLines) or not lines.write(self._line(fields)):
            self._log.info("request", extra=fields)

    def _line(self, fields: Mapping[str, object]) -> str:
        now = self._clock.now().replace(tzinfo=None)
        line: dict[str, object] = {
            "event": "request",
            "level": "info",
            "logger": self._log.name,
            **fields,
            "timestamp": f"{now.isoformat(timespec='microseconds')}Z",
        }
        # What is a str and no more: the members of our own enumerations hide nothing.
        if not _are_plain([text for text in fields.values() if text.__class__ is str]):
            _redact_event(None, "", line)
        return f"{json.dumps(line)}\n"


def _fields(receipt: Receipt, delivery: Delivery) -> dict[str, object]:
    """What is said of a request; nothing of what is not known."""
    timings, usage = receipt.timings, receipt.usage
    line: dict[str, object] = {
        "request_id": receipt.rid,
        "team": receipt.team,
        "key_id": receipt.key_id,
        "user": receipt.user,
        "endpoint": receipt.operation,
        "model": receipt.model[:MAX_TEXT],
        "model_served": receipt.model_served[:MAX_TEXT],
        "upstream": receipt.upstream,
        "upstream_request_id": receipt.upstream_rid,
        "upstream_status": receipt.upstream_status or None,
        "status": receipt.status,
        "code": receipt.code,
        "reason": receipt.reason,
        "stream": receipt.stream,
        "cache": receipt.cache,
        "joined": receipt.joined,
        "changed": ",".join(receipt.changed),
        "attempts": receipt.attempts or None,
        "retried": receipt.retried or None,
        "async": receipt.asynchronous or None,
        "outcome": receipt.outcome,
        "cost_usd": format_dollars(receipt.cost),
        "cost_basis": receipt.basis,
        "bound_usd": format_dollars(receipt.bound),
        "avoided_usd": format_dollars(receipt.avoided),
        "price": receipt.price_id,
        "flags": ",".join(receipt.flags),
        "images_asked": receipt.images_asked,
        "images": receipt.images,
        "drawn_model": receipt.drawn.model[:MAX_TEXT] if receipt.drawn else "",
        "drawn_usd": format_dollars(receipt.drawn.cost) if receipt.drawn else "",
        "tokens_in": usage.text_in + usage.image_in,
        "tokens_out": usage.text_out + usage.image_out,
        "bytes_in": receipt.bytes_in,
        "bytes_out": delivery.bytes_out,
        "seconds": round(delivery.seconds, 6),
        "read_seconds": round(timings.reading, 6),
        "queue_seconds": round(timings.queueing, 6),
        "reserve_seconds": round(timings.reserving, 6),
        "upstream_seconds": round(timings.upstream, 6),
        "upstream_first_byte_seconds": round(timings.upstream_first_byte, 6),
        "first_image_seconds": round(timings.first_image, 6),
        "settle_seconds": round(timings.settling, 6),
        "client_gone": delivery.gone,
        "client_address": delivery.client_address,
        "degraded": receipt.degraded,
    }
    if receipt.trace is not None and receipt.trace.context.sampled:
        line["trace_id"] = receipt.trace.context.trace_id
        line["span_id"] = receipt.trace.context.span_id
    if receipt.prompt is not None:
        line["prompt"] = receipt.prompt
    return {name: value for name, value in line.items() if value is not None and value != ""}
