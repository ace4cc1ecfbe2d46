"""An answer is looked at before it is measured: a benchmark of refusals is worth nothing."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tests.bench.bodies import Question
from tests.bench.targets import Address, Booked, Target
from tests.bench.tools import Load

SECONDS: Final = 60
KEPT_SECONDS: Final = 10
HEAD_BYTES: Final = 2_000
"""The most that an answer may have beside its body: its head, and the sizes of its chunks."""


class CheckError(Exception):
    """What is wrong with the answers of a target: its numbers would say nothing."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


def ask(address: Address, question: Question) -> Answer:
    """One request, by a client that has nothing of the load generator. Raises ``CheckError``."""
    connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=SECONDS)
    headers = {"content-type": question.content_type, **address.headers}
    try:
        connection.request("POST", question.path, question.body, headers)
        said = connection.getresponse()
        return Answer(said.status, {k.lower(): v for k, v in said.getheaders()}, said.read())
    except (OSError, http.client.HTTPException) as error:
        raise CheckError(f"no answer: {error!r}") from error
    finally:
        connection.close()


def check_answer(answer: Answer, expected: bytes, *, exact: bool) -> None:
    """The upstream's bytes, or of who writes its own JSON at least the picture. Raises
    ``CheckError``."""
    if answer.status != 200:
        raise CheckError(f"answered {answer.status}: {answer.body[:300]!r}")
    if exact and answer.body != expected:
        raise CheckError(f"answered {len(answer.body)} bytes that are not those of the upstream")
    if not exact and _pictures(answer.body) != _pictures(expected):
        raise CheckError(f"not the upstream's picture: {answer.body[:300]!r}")


def _pictures(body: bytes) -> list[object]:
    try:
        return [item.get("b64_json") for item in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def wait_kept(target: Target, address: Address, question: Question) -> int:
    """Until the cache answers; how many requests that took. Raises ``CheckError``."""
    deadline = time.monotonic() + KEPT_SECONDS
    asked = 0
    while time.monotonic() < deadline:
        asked += 1
        if ask(address, question).headers.get("x-cache") == "hit":
            return asked
        time.sleep(0.1)
    raise CheckError("the cache does not answer")


def check_load(load: Load, expected: bytes, *, exact: bool) -> None:
    """No errors, nothing but 200, and about the bytes there should be. Raises ``CheckError``."""
    if load.errors:
        raise CheckError(f"{load.errors} requests without an answer: {load.errors_by}")
    if load.statuses != {200: load.requests}:
        raise CheckError(f"statuses {load.statuses}: {_short(load.head_sample or '')}")
    each = load.bytes_in / load.requests
    # A peer may leave members out of the JSON that it writes anew, never the picture.
    least = len(expected) * (1 if exact else 0.7)
    most = len(expected) * 1.02 + HEAD_BYTES
    if not least <= each <= most:
        raise CheckError(f"{each:.0f} bytes an answer, of {len(expected)}")


def _short(answer: str) -> str:
    """The status and the body of an answer, in one line."""
    head, _, body = answer.replace("\r\n", "\n").partition("\n\n")
    return " ".join((head.partition("\n")[0], *body.split()))


def check_books(booked: Booked, requests: int, *, cached: bool) -> None:
    """Every request is in the books, settled. Raises ``CheckError``."""
    if booked.unresolved:
        raise CheckError(f"the books have {booked.unresolved} calls of unknown outcome")
    if booked.requests != requests:
        raise CheckError(f"the books have {booked.requests} calls, {requests} were made")
    if cached and booked.cached != requests - 1:
        raise CheckError(f"the books have {booked.cached} hits, of {requests} requests")
    if not cached and booked.cached:
        raise CheckError(f"{booked.cached} requests were answered by the cache")
    if not float(booked.cost) > 0:
        raise CheckError("the books have no costs")
