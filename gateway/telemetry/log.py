"""One JSON line a request, from an allow-list of fields: never a key, a picture, or (unless the
operator asks for it) a prompt."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Collection, MutableMapping
from functools import lru_cache
from json.encoder import encode_basestring_ascii as _quoted
from types import MappingProxyType
from typing import Any, TextIO, cast

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


def _are_plain(texts: Collection[str]) -> bool:
    """Whether ``_redact_event`` would leave these as they are: 3 us for the texts of a request,
    where the patterns take 60. It may say no of what is harmless."""
    together = "\n".join(texts).lower()
    if len(together) >= _LONG_TEXT and max(map(len, texts)) >= _LONG_TEXT:
        return False
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
        if self.lock is None:
            return False
        with self.lock:
            try:
                self.stream.write(line)
                self.stream.flush()
            except (OSError, ValueError):
                return False
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

    As JSON it is made and written here, 16 us, and looks like any other: by way of a record of
    ``logging`` and the processors of structlog it would take 245.
    """

    def __init__(self, clock: Clock) -> None:
        self._log = logging.getLogger("gateway.request")
        self._clock = clock

    def finished(self, receipt: Receipt, delivery: Delivery) -> None:
        if not self._log.isEnabledFor(logging.INFO):
            return
        alike, counts = _alike(receipt, delivery), _counts(receipt, delivery)
        words, listening = _words(receipt, delivery), logging.root.handlers
        lines = listening[0] if len(listening) == 1 else None
        # Text, what cannot be written, and whoever else listens: as ``logging`` does it.
        if not isinstance(lines, _JsonLines) or not lines.write(self._line(alike, counts, words)):
            counted = {
                name: round(value, 6) if isinstance(value, float) else value
                for name, value in zip(_COUNTS, counts, strict=True)
            }
            self._log.info("request", extra={**_said(alike), **counted, **words})

    def _line(
        self, alike: tuple[object, ...], counts: tuple[object, ...], words: dict[str, str]
    ) -> str:
        if not _are_plain(words.values()):
            words = words.copy()
            _redact_event(None, "", cast("dict[str, Any]", words))
        said = "".join([f'"{name}": {_quoted(text)}, ' for name, text in words.items()])
        now = self._clock.now()
        day, time = (now.year, now.month, now.day), (now.hour, now.minute, now.second)
        return _LINE % (_beginning(alike), *counts, said, *day, *time, now.microsecond)


_ALIKE = (
    "team",
    "key_id",
    "endpoint",
    "model",
    "model_served",
    "upstream",
    "upstream_status",
    "status",
    "code",
    "reason",
    "stream",
    "cache",
    "changed",
    "attempts",
    "retried",
    "async",
    "outcome",
    "cost_basis",
    "price",
    "flags",
    "images_asked",
    "images",
    "degraded",
    "client_gone",
)
"""What many requests have in common: the line begins with it, and its text is kept."""


def _alike(receipt: Receipt, delivery: Delivery) -> tuple[object, ...]:
    """The values of ``_ALIKE``."""
    return (
        receipt.team,
        receipt.key_id,
        receipt.operation,
        receipt.model[:MAX_TEXT],
        receipt.model_served[:MAX_TEXT],
        receipt.upstream,
        receipt.upstream_status or None,
        receipt.status,
        receipt.code,
        receipt.reason,
        receipt.stream,
        receipt.cache,
        ",".join(receipt.changed),
        receipt.attempts or None,
        receipt.retried or None,
        receipt.asynchronous or None,
        receipt.outcome,
        receipt.basis,
        receipt.price_id,
        ",".join(receipt.flags),
        receipt.images_asked,
        receipt.images,
        receipt.degraded,
        delivery.gone,
    )


@lru_cache(maxsize=256)
def _beginning(alike: tuple[object, ...]) -> str:
    """A line as far as it is the same for many; the fields of one follow."""
    line: dict[str, object] = {
        "event": "request",
        "level": "info",
        "logger": "gateway.request",
        **_said(alike),
    }
    # What is a str and no more: the members of our own enumerations hide nothing.
    if not _are_plain([text for text in line.values() if text.__class__ is str]):
        _redact_event(None, "", line)
    return f"{json.dumps(line)[:-1]}, "


_COUNTS = (
    "cost_usd",
    "bound_usd",
    "avoided_usd",
    "tokens_in",
    "tokens_out",
    "bytes_in",
    "bytes_out",
    "seconds",
    "read_seconds",
    "queue_seconds",
    "reserve_seconds",
    "upstream_seconds",
    "upstream_first_byte_seconds",
    "first_image_seconds",
    "settle_seconds",
)
"""What every line counts: dollars as text, whole numbers, and seconds."""

_WRITTEN = MappingProxyType({"usd": '"%s"', "seconds": "%.6f"})
"""What counts are written as, by the end of their names; the others are whole."""
_COUNTED = ", ".join(f'"{name}": {_WRITTEN.get(name.rpartition("_")[2], "%d")}' for name in _COUNTS)
_LINE = f'%s{_COUNTED}, %s"timestamp": "%d-%02d-%02dT%02d:%02d:%02d.%06dZ"}}\n'
"""What is alike, the counts, the words and the instant. As a dictionary, by ``json``, it takes
three times as long; rounding and ``repr`` would take as long as all the rest of it."""


def _counts(receipt: Receipt, delivery: Delivery) -> tuple[object, ...]:
    """The values of ``_COUNTS``."""
    timings, usage = receipt.timings, receipt.usage
    return (
        format_dollars(receipt.cost),
        format_dollars(receipt.bound),
        format_dollars(receipt.avoided),
        usage.text_in + usage.image_in,
        usage.text_out + usage.image_out,
        receipt.bytes_in,
        delivery.bytes_out,
        delivery.seconds,
        timings.reading,
        timings.queueing,
        timings.reserving,
        timings.upstream,
        timings.upstream_first_byte,
        timings.first_image,
        timings.settling,
    )


def _words(receipt: Receipt, delivery: Delivery) -> dict[str, str]:
    """What is said in words of one request alone."""
    words = {"request_id": receipt.rid}
    if receipt.user:
        words["user"] = receipt.user
    if receipt.upstream_rid:
        words["upstream_request_id"] = receipt.upstream_rid
    if receipt.joined:
        words["joined"] = receipt.joined
    if receipt.drawn is not None:
        words["drawn_model"] = receipt.drawn.model[:MAX_TEXT]
        words["drawn_usd"] = format_dollars(receipt.drawn.cost)
    if delivery.client_address:
        words["client_address"] = delivery.client_address
    if receipt.trace is not None and receipt.trace.context.sampled:
        words["trace_id"] = receipt.trace.context.trace_id
        words["span_id"] = receipt.trace.context.span_id
    if receipt.prompt:
        words["prompt"] = receipt.prompt
    return words


def _said(alike: tuple[object, ...]) -> dict[str, object]:
    """By name; nothing of what is not known."""
    fields = zip(_ALIKE, alike, strict=True)
    return {name: value for name, value in fields if value is not None and value != ""}
