"""Answers that must not be measured, and the bodies that they are compared with."""

from __future__ import annotations

import base64
import io
import json
import re

import pytest
from PIL import Image

from tests.bench import bodies
from tests.bench.checks import Answer, CheckError, check_answer, check_books, check_load
from tests.bench.targets import Booked
from tests.bench.tools import Load, Times

TIMES = Times(1, 1, 1, 1, 1, 1)
BODY = b'{"data":[{"b64_json":"abcd"}]}'


def load(**changed: object) -> Load:
    said: dict[str, object] = {
        "requests": 10, "errors": 0, "errors_by": {}, "statuses": {200: 10}, "reopened": 0,
        "seconds": 1.0, "cpu_seconds": 0.1, "bytes_in": 12_000, "bytes_out": 1_000,
        "head_sample": None, "latency_us": TIMES, "first_us": TIMES,
    }  # fmt: skip
    return Load(**{**said, **changed})  # type: ignore[arg-type]


def test_good_answers_pass() -> None:
    check_load(load(), b"x" * 1000, exact=True)
    check_answer(Answer(200, {}, BODY), BODY, exact=True)
    check_answer(Answer(200, {}, b'{"data": [{"b64_json": "abcd"}]}'), BODY, exact=False)
    check_books(Booked(10, 0, 0, "0.08"), 10, cached=False)
    check_books(Booked(10, 9, 0, "0.008"), 10, cached=True)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"errors": 1, "errors_by": {"cut": 1}}, "without an answer"),
        ({"statuses": {200: 9, 429: 1}, "head_sample": "HTTP/1.1 429"}, "429"),
        ({"bytes_in": 9_990}, "bytes an answer"),
        ({"bytes_in": 60_000}, "bytes an answer"),
    ],
)
def test_load_with_anything_else_fails(changed: dict[str, object], why: str) -> None:
    with pytest.raises(CheckError, match=why):
        check_load(load(**changed), b"x" * 1000, exact=True)


@pytest.mark.parametrize(
    ("answer", "exact"),
    [
        (Answer(401, {}, BODY), True),
        (Answer(200, {}, BODY + b" "), True),
        (Answer(200, {}, b'{"data":[{"b64_json":"abce"}]}'), False),
        (Answer(200, {}, b"not json"), False),
    ],
)
def test_an_answer_that_is_not_the_upstreams_fails(answer: Answer, exact: bool) -> None:
    with pytest.raises(CheckError):
        check_answer(answer, BODY, exact=exact)


@pytest.mark.parametrize(
    ("booked", "cached"),
    [
        (Booked(9, 0, 0, "1"), False),
        (Booked(10, 0, 1, "1"), False),
        (Booked(10, 1, 0, "1"), False),
        (Booked(10, 0, 0, "0"), False),
        (Booked(10, 8, 0, "1"), True),
    ],
)
def test_books_with_something_missing_fail(booked: Booked, cached: bool) -> None:
    with pytest.raises(CheckError):
        check_books(booked, 10, cached=cached)


@pytest.mark.parametrize(("name", "low", "high"), [("S", 1_300, 1_700), ("M", 2.6e6, 2.8e6)])
def test_a_json_reply_is_of_its_size_and_holds_a_picture(name: str, low: int, high: int) -> None:
    made = bodies.reply(name)
    assert low <= len(made.body) <= high
    assert made.raw.endswith(made.body)
    assert f"content-length: {len(made.body)}".encode() in made.raw
    said = json.loads(made.body)
    assert list(said)[-1] == "usage"
    with Image.open(io.BytesIO(base64.b64decode(said["data"][0]["b64_json"]))) as picture:
        picture.load()


def test_a_stream_has_three_partial_pictures_and_a_bill() -> None:
    made = bodies.reply("T")
    kinds = re.findall(rb"^event: (.+)$", made.body, re.M)
    assert kinds == [b"image_generation.partial_image"] * 3 + [b"image_generation.completed"]
    last = json.loads(made.body.rpartition(b"data: ")[2])
    assert last["usage"]["output_tokens"] == 572
    assert made.raw.endswith(b"0\r\n\r\n")


def test_each_request_has_one_place_for_its_number() -> None:
    for question in (bodies.question("bench"), bodies.edit("bench", 30_000)):
        raw = bodies.raw_request(question, 80, {"authorization": "Bearer x"})
        assert raw.count(b"@" * 12) == 1
        assert b"@" * 13 not in raw
        head, _, body = raw.partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}".encode() in head
