"""One line a request: what stands in it, and what never does."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.domain import keys
from gateway.domain.call import Usage
from gateway.domain.ledger import Basis, Outcome, Part
from gateway.domain.receipt import CacheResult, Delivery, Receipt, Timings
from gateway.telemetry.log import MAX_PROMPT, MAX_TEXT, RequestLog, configure, redact
from tests.clock import StillClock

RECEIPT = Receipt(
    rid="req_1",
    operation="generation",
    status=200,
    team="growth",
    key_id="abc123def4",
    user="u_0123456789abcdef0123",
    model="team-art",
    model_label="team-art",
    model_served="flare",
    upstream="openai",
    upstream_rid="req_up",
    cache=CacheResult.MISS,
    outcome=Outcome.DELIVERED,
    basis=Basis.USAGE,
    cost=52_680_000,
    bound=60_000_000,
    images_asked=2,
    images=1,
    usage=Usage(10, 20, 3, 4, 5, 60),
    flags=("soft", "no_usage"),
    price_id="openai/flare@2026-04-21",
    bytes_in=77,
    timings=Timings(0.5, 0.002, 1.0, 2.0, 4.0, 0.0030000001),
)
SENT = Delivery(200, 1000, 5.25)


@contextmanager
def logging_as(form: str) -> Iterator[io.StringIO]:
    """Where the log goes meanwhile; everything is as before afterwards."""
    names = ("", "uvicorn", "uvicorn.error", "uvicorn.access")
    loggers = [logging.getLogger(name) for name in names]
    before = [(one.handlers[:], one.level, one.propagate) for one in loggers]
    written = io.StringIO()
    configure("info", form, written)
    try:
        yield written
    finally:
        for one, (handlers, level, propagate) in zip(loggers, before, strict=True):
            one.handlers[:], one.propagate = handlers, propagate
            one.setLevel(level)


@pytest.fixture(params=["json"])
def stream(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    with logging_as(request.param) as written:
        yield written


def only(stream: io.StringIO) -> dict[str, Any]:
    (line,) = stream.getvalue().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def told(stream: io.StringIO, receipt: Receipt, delivery: Delivery = SENT) -> dict[str, Any]:
    stream.seek(0)
    stream.truncate()
    with alone():
        RequestLog(StillClock()).finished(receipt, delivery)
    return only(stream)


@contextmanager
def alone() -> Iterator[None]:
    """Without pytest, which listens too once a test runs."""
    listening, logging.root.handlers = logging.root.handlers, logging.root.handlers[:1]
    try:
        yield
    finally:
        logging.root.handlers = listening


# The line of a request


def test_the_line_names_both_models_of_a_response(stream: io.StringIO) -> None:
    line = told(stream, replace(RECEIPT, drawn=Part("art", 1, 50_000_000)))
    assert (line["model"], line["cost_usd"]) == ("team-art", "0.05268")
    assert (line["drawn_model"], line["drawn_usd"]) == ("art", "0.05")


def test_the_line_of_a_request(stream: io.StringIO) -> None:
    line = told(stream, RECEIPT)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "request",
        "level": "info",
        "logger": "gateway.request",
        "request_id": "req_1",
        "team": "growth",
        "key_id": "abc123def4",
        "user": "u_0123456789abcdef0123",
        "endpoint": "generation",
        "model": "team-art",
        "model_served": "flare",
        "upstream": "openai",
        "upstream_request_id": "req_up",
        "status": 200,
        "stream": False,
        "cache": "miss",
        "outcome": "delivered",
        "cost_usd": "0.05268",
        "cost_basis": "usage",
        "bound_usd": "0.06",
        "avoided_usd": "0",
        "price": "openai/flare@2026-04-21",
        "flags": "soft,no_usage",
        "images_asked": 2,
        "images": 1,
        "tokens_in": 30,
        "tokens_out": 65,
        "bytes_in": 77,
        "bytes_out": 1000,
        "seconds": 5.25,
        "read_seconds": 0.5,
        "queue_seconds": 0.0,
        "reserve_seconds": 0.002,
        "upstream_seconds": 4.0,
        "upstream_first_byte_seconds": 1.0,
        "first_image_seconds": 2.0,
        "settle_seconds": 0.003,
        "degraded": False,
    }


def test_what_is_not_known_is_not_said(stream: io.StringIO) -> None:
    refused = Receipt("req_1", "edit", 401, reason="auth_failed", code="invalid_api_key")
    line = told(stream, refused, Delivery(401, 150, 0.001, gone="response"))
    assert {"team", "key_id", "model", "upstream", "outcome", "price", "prompt"}.isdisjoint(line)
    assert (line["reason"], line["code"], line["client_gone"]) == (
        *("auth_failed", "invalid_api_key"),
        "response",
    )


def test_a_prompt_is_written_only_when_the_receipt_has_one(stream: io.StringIO) -> None:
    assert "prompt" not in told(stream, RECEIPT)
    assert told(stream, replace(RECEIPT, prompt="a cat"))["prompt"] == "a cat"
    assert (
        told(stream, replace(RECEIPT, prompt="a " * 9000))["prompt"] == ("a " * 9000)[:MAX_PROMPT]
    )


def test_a_key_in_a_prompt_is_struck_out(stream: io.StringIO) -> None:
    secret = keys.mint().secret
    line = told(stream, replace(RECEIPT, prompt=f"draw {secret} please"))
    assert line["prompt"] == "draw igw-*** please"


def test_long_names_are_cut(stream: io.StringIO) -> None:
    line = told(stream, replace(RECEIPT, model="m " * 9000, model_served="s " * 9000))
    assert len(line["model"]) == len(line["model_served"]) == MAX_TEXT


@pytest.mark.parametrize(
    "receipt",
    [
        RECEIPT,
        replace(RECEIPT, upstream_rid=f"of {keys.mint().secret}", model="BEARER of news"),
        replace(
            RECEIPT, prompt="see DATA:IMAGE/png;base64,AAAA data:image/png;base64,iVBORw0KGgo="
        ),
        replace(RECEIPT, code="A" * 200, upstream="a " * 400, prompt="é" * 9000),
        replace(RECEIPT, model="a task-force", team="\u2028\ud800"),
    ],
    ids=["ordinary", "keys", "pictures", "long", "harmless"],
)
def test_the_short_way_writes_what_logging_would(stream: io.StringIO, receipt: Receipt) -> None:
    short = told(stream, receipt)
    stream.truncate(stream.seek(0))
    assert len(logging.root.handlers) > 1
    RequestLog(StillClock()).finished(receipt, SENT)
    long = only(stream)
    assert short.pop("timestamp") == "2026-11-22T12:00:00.000000Z"
    assert len(str(long.pop("timestamp"))) == len("2026-11-22T12:00:00.000000Z")
    assert list(short.items()) == list(long.items())


def test_a_log_that_cannot_be_written_fails_no_request(
    stream: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    stream.close()
    with alone():
        RequestLog(StillClock()).finished(RECEIPT, SENT)
    assert "Logging error" in capsys.readouterr().err


@pytest.mark.parametrize("level", ["warning", "error"])
def test_the_line_of_a_request_is_information(stream: io.StringIO, level: str) -> None:
    logging.root.setLevel(level.upper())
    with alone():
        RequestLog(StillClock()).finished(RECEIPT, SENT)
    assert not stream.getvalue()


ODD = ["a\nb", 'a"},\n{"event": "request"', "\x1b[31mred", "\r\x00\x08", "\u2028", "ü", "a\\nb"]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["model", "upstream_rid", "prompt", "team", "code"])
def test_nobody_writes_a_line_of_their_own(stream: io.StringIO, name: str, odd: str) -> None:
    members: dict[str, Any] = {name: odd}
    line = told(stream, replace(RECEIPT, **members))
    assert odd in line.values()
    text = stream.getvalue()
    assert text.endswith("}\n")
    assert all(letter.isprintable() for letter in text[:-1])


@settings(max_examples=100)
@given(st.text())
def test_whatever_is_logged_is_one_line_of_json(text: str) -> None:
    with logging_as("json") as written:
        logging.getLogger("gateway.test").info("%s", text, extra={"said": text})
    (line,) = written.getvalue().removesuffix("\n").split("\n")
    assert set(json.loads(line)) >= {"event", "said", "level", "timestamp"}


# What never leaves


SECRET = "sk-proj-0123456789abcdefABCDEF_-xyz"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"key {SECRET} is bad", "key sk-*** is bad"),
        ("sk-ant-api03-abcdefgh", "sk-***"),
        ("igw_live_0123456789_abcdefghij", "igw-***"),
        (f"({SECRET})", "(sk-***)"),
        ("Authorization: Bearer growth-key-0123", "Authorization: Bearer ***"),
        ("bearer abc, next", "Bearer *** next"),
        ('{"a": "BEARER abc"}', '{"a": "Bearer ***"}'),
        ("data:image/png;base64,iVBORw0KGgo=", "data:***"),
        ("see data:image/svg+xml;base64,PHN2Zz4= here", "see data:*** here"),
        ("A" * 200, "***"),
        ("A" * 199, "A" * 199),
        ("x " + "iVBORw0K/+" * 30 + "==" + " y", "x *** y"),
        # Words that only begin alike are left alone.
        ("a task-force", "a task-force"),
        ("disk_full sk-1 ask-me-anything-now", "disk_full sk-1 ask-me-anything-now"),
        ("the bearer of news", "the Bearer *** news"),
        ("an ordinary text", "an ordinary text"),
        ("", ""),
    ],
)
def test_what_looks_like_a_secret_or_a_picture_is_struck_out(text: str, kept: str) -> None:
    assert redact(text) == kept
    assert redact(redact(text)) == kept


@pytest.mark.parametrize("where", ["message", "extra", "exception"])
@pytest.mark.parametrize("stream", ["json", "console"], indirect=True)
@pytest.mark.parametrize(
    "secret",
    [SECRET, keys.mint().secret, "Bearer growth-key-0123", "iVBORw0K" * 40],
    ids=["provider's", "ours", "bearer", "picture"],  # the same in every worker
)
def test_secrets_are_struck_out_wherever_they_are(
    stream: io.StringIO, where: str, secret: str
) -> None:
    log = logging.getLogger("gateway.test")
    if where == "message":
        log.warning("it said %s", secret)
    elif where == "extra":
        log.warning("it said", extra={"text": secret})
    else:
        try:
            raise RuntimeError(f"it said {secret}")
        except RuntimeError:
            log.exception("it failed")
    text = stream.getvalue()
    assert "it said" in text
    assert "***" in text
    assert secret not in text
    assert secret[10:30] not in text


@pytest.mark.parametrize("pad", range(MAX_TEXT - 40, MAX_TEXT + 1, 5))
def test_a_secret_on_the_edge_is_not_half_kept(stream: io.StringIO, pad: int) -> None:
    logging.getLogger("gateway.test").warning("x" * (pad - 1) + " " + SECRET)
    assert SECRET[3:10] not in stream.getvalue()


# Configuration


@pytest.mark.parametrize(
    ("logger", "level", "heard"),
    [
        ("gateway.relay", logging.INFO, True),
        ("gateway.relay", logging.DEBUG, False),
        ("uvicorn.error", logging.WARNING, True),
        ("uvicorn.error", logging.INFO, False),
        # A line a request is our own: the server's would be a second.
        ("uvicorn.access", logging.CRITICAL, False),
    ],
)
def test_who_is_heard(stream: io.StringIO, logger: str, level: int, heard: bool) -> None:
    logging.getLogger(logger).log(level, "hello")
    assert ("hello" in stream.getvalue()) is heard


def test_colours_of_the_server_are_left_out(stream: io.StringIO) -> None:
    logging.getLogger("uvicorn.error").warning("up", extra={"color_message": "\x1b[1mup"})
    assert "color_message" not in only(stream)


def test_a_terminal_is_told_nothing_by_a_client() -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202e\u2028\x7f\x00"
    with logging_as("text") as written:
        log = logging.getLogger("gateway.test")
        log.info("one %s\nforged", evil, extra={"model": evil, "spaced": f"a {evil}\nb"})
        try:
            raise ValueError(evil)
        except ValueError:
            log.exception("two")
    said = written.getvalue()
    assert all(one.isprintable() or one == "\n" for one in said)
    assert r"\x1b[2J" in said
    lines = said.splitlines()
    assert r"\nforged" in lines[0]
    assert "two" in lines[1]
    assert lines[2] == "Traceback (most recent call last):"
    assert r"ValueError: \x1b[2J" in lines[-1]
    assert "é" in _line_of_text("café")


def _line_of_text(word: str) -> str:
    with logging_as("text") as written:
        logging.getLogger("gateway.test").info(word)
    return written.getvalue()
