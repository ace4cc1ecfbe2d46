"""The door: what it takes from a request, how it answers, and where a client can leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from gateway.api import door as doors
from gateway.api.door import ABORT, HUNG_UP, Message
from gateway.api.relayed import RelayedRoutes, cache_wish
from gateway.domain.call import Operation
from gateway.domain.errors import ClientGone, InvalidKey
from gateway.domain.receipt import Delivery, Receipt
from gateway.relay import headers as answers
from gateway.relay.arrival import Answer, Arrival
from gateway.relay.flights import Head
from gateway.relay.pipeline import Pipeline
from gateway.relay.plan import CacheWish
from tests.clock import StillClock

DISCONNECT: Message = {"type": "http.disconnect"}
RECEIPT = Receipt("req_1", "generation", 200, team="growth")


def sent(body: bytes, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


@dataclass
class Relay:
    """Stands for the pipeline: takes the body in, and answers as the test says."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)
    chunks: tuple[bytes | Exception, ...] = (b"one", b"two")
    length: int | None = 6
    reads: bool = True
    error: Exception | None = None
    waits: asyncio.Event | None = None
    """Set when the flight answers; the client may leave before."""
    receipt: Receipt = RECEIPT
    landed: asyncio.Event | None = None
    arrival: Arrival | None = None
    taken: list[bytes] = field(default_factory=list)
    closed: int = 0
    done: list[bool] = field(default_factory=list)
    """What the door says at the end: whether the client has got all of it."""

    async def answer(self, arrival: Arrival) -> Answer:
        self.arrival = arrival
        try:
            if self.reads:
                async for chunk in arrival.body:
                    self.taken.append(bytes(chunk))
            if self.waits is not None:
                await self._wait(arrival)
        except ClientGone as gone:
            return Answer(
                answers.error_head(gone, arrival.rid), self._receipt, gone.stage, self.done.append
            )
        if self.error is not None:
            raise self.error
        head = Head(self.status, self.headers, self.length, self._body, self._close)
        return Answer(head, self._receipt, done=self.done.append)

    async def _wait(self, arrival: Arrival) -> None:
        assert self.waits is not None
        either = [asyncio.create_task(one.wait()) for one in (self.waits, arrival.client.gone)]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in either:
                task.cancel()
        if not self.waits.is_set():
            raise ClientGone("upstream")

    async def _body(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    def _close(self) -> None:
        self.closed += 1

    async def _receipt(self) -> Receipt:
        if self.landed is not None:
            await self.landed.wait()
        return self.receipt


@dataclass
class Client:
    """The server's side of ASGI, by a script; what is received after it waits for ever."""

    said: list[Message] = field(default_factory=lambda: [sent(b"{}")])
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "POST"
    leaves_at: int = 99
    """The number of the message sent to it at which it disconnects."""
    fails_at: int = 99
    """The same, for a server that raises."""
    stalls_at: int = 99
    heard: list[Message] = field(default_factory=list)
    aborted: int = 0
    hung_up: bool = False
    _left: asyncio.Event = field(default_factory=asyncio.Event)

    async def receive(self) -> Message:
        if self.said:
            return self.said.pop(0)
        await self._left.wait()
        return DISCONNECT

    async def send(self, message: Message) -> None:
        number = len(self.heard)
        if number == self.fails_at:
            raise BrokenPipeError
        if number == self.stalls_at:
            await asyncio.Event().wait()
        self.heard.append(message)
        if number == self.leaves_at:
            await self.leave()

    async def leave(self) -> None:
        self._left.set()
        for _ in range(5):
            await asyncio.sleep(0)

    def abort(self) -> None:
        self.aborted += 1

    @property
    def scope(self) -> dict[str, Any]:
        hung_up = asyncio.Event()
        if self.hung_up:
            hung_up.set()
        return {
            "type": "http",
            "method": self.method,
            "path": "/v1/images/generations",
            "headers": [
                (name.encode(), value.encode("latin-1")) for name, value in self.headers.items()
            ],
            HUNG_UP: hung_up,
            ABORT: self.abort,
        }

    @property
    def status(self) -> int:
        return int(self.heard[0]["status"])

    @property
    def answer(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.heard[0]["headers"]}

    @property
    def body(self) -> bytes:
        assert self.heard[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
        return b"".join(message.get("body", b"") for message in self.heard[1:])


@dataclass
class Told:
    requests: list[tuple[Receipt, Delivery]] = field(default_factory=list)

    def finished(self, receipt: Receipt, delivery: Delivery) -> None:
        self.requests.append((receipt, delivery))


def routes(relay: Relay, told: Told) -> RelayedRoutes:
    return RelayedRoutes(cast(Pipeline, relay), [told], StillClock())


async def through(relay: Relay, client: Client) -> tuple[Receipt, Delivery]:
    """One request from end to end: what was told of it. Nothing of it is left running."""
    told = Told()
    async with asyncio.timeout(5):
        await routes(relay, told).handle(
            Operation.GENERATION, client.scope, client.receive, client.send
        )
    for _ in range(3):
        # Those who watch the client are told one after the other.
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    (request,) = told.requests
    return request


# What a request says


@pytest.mark.parametrize(
    ("said", "read", "write", "max_age"),
    [
        ("", True, True, None),
        ("no-cache", False, True, None),
        ("No-Cache", False, True, None),
        ("no-store", False, False, None),
        ("no-cache, no-store", False, False, None),
        ("max-age=60", True, True, 60),
        ("max-age=0", True, True, 0),
        ("max-age = 60", True, True, 60),
        ('max-age="60"', True, True, 60),
        ("private, max-age=60,no-transform", True, True, 60),
        ("no-cache,max-age=60", False, True, 60),
        ("max-age=", True, True, None),
        ("max-age=-1", True, True, None),
        ("max-age=soon", True, True, None),
        ("no-cached", True, True, None),
        (" , ,", True, True, None),
        ("only-if-cached", True, True, None),
    ],
)
def test_what_cache_control_asks(said: str, read: bool, write: bool, max_age: int | None) -> None:
    assert cache_wish(said) == CacheWish(read, write, max_age)


async def test_what_an_arrival_says() -> None:
    relay = Relay()
    await through(
        relay,
        Client(
            [sent(b"ab", True), sent(b"", True), sent(b"cd", True), sent(b"")],
            {
                "authorization": "Bearer growth-key",
                "content-type": "application/json",
                "content-encoding": "gzip",
                "content-length": "4",
                "cache-control": "max-age=60, no-cache",
                "idempotency-key": "idem 1",
            },
        ),
    )
    arrival = relay.arrival
    assert arrival is not None
    assert relay.taken == [b"ab", b"cd"]
    assert (arrival.rid[:4], len(arrival.rid)) == ("req_", 28)
    assert (arrival.operation, arrival.secret) == (Operation.GENERATION, "growth-key")
    assert (arrival.content_type, arrival.content_encoding) == ("application/json", "gzip")
    assert (arrival.content_length, arrival.idempotency_key) == (4, "idem 1")
    assert (arrival.wish, arrival.at) == (CacheWish(False, True, 60), 1000.0)


async def test_what_is_not_said_is_not_known() -> None:
    relay = Relay()
    await through(relay, Client())
    arrival = relay.arrival
    assert arrival is not None
    assert (arrival.secret, arrival.content_type, arrival.content_encoding) == (None, "", None)
    assert (arrival.content_length, arrival.idempotency_key) == (None, None)
    assert arrival.wish == CacheWish()
    assert (arrival.retried, arrival.asynchronous) == (False, False)


@pytest.mark.parametrize(
    ("count", "retried"),
    [("0", False), ("", False), ("00", False), ("1", True), ("2", True), ("10", True)],
)
async def test_an_sdk_says_that_it_comes_again(count: str, retried: bool) -> None:
    relay = Relay()
    await through(relay, Client(headers={"x-stainless-retry-count": count}))
    assert relay.arrival is not None
    assert relay.arrival.retried is retried


@pytest.mark.parametrize(
    ("said", "asynchronous"),
    [
        ({"prefer": "respond-async"}, True),
        ({"prefer": "wait=5, Respond-Async"}, True),
        ({"x-gateway-async": "true"}, True),
        ({"x-gateway-async": "false"}, False),
        ({"prefer": "wait=5"}, False),
    ],
)
async def test_a_client_that_does_not_wait_says_so(
    said: dict[str, str], asynchronous: bool
) -> None:
    relay = Relay()
    await through(relay, Client(headers=said))
    assert relay.arrival is not None
    assert relay.arrival.asynchronous is asynchronous


@pytest.mark.parametrize(
    ("header", "secret"),
    [
        ("Bearer abc", "abc"),
        ("bearer abc", "abc"),
        ("BEARER  abc ", "abc"),
        ("Bearer", None),
        ("Bearer ", None),
        ("abc", None),
        ("Basic abc", None),
        ("", None),
        ("Bearer a b", "a b"),
    ],
)
async def test_whose_key_it_is(header: str, secret: str | None) -> None:
    relay = Relay()
    await through(relay, Client(headers={"authorization": header}))
    assert relay.arrival is not None
    assert relay.arrival.secret == secret


@pytest.mark.parametrize(
    ("length", "known"),
    [("7", 7), ("007", 7), ("-1", None), ("7.0", None), ("x", None), ("²", None)],
)
async def test_a_length_is_a_number_or_unknown(length: str, known: int | None) -> None:
    relay = Relay()
    await through(relay, Client(headers={"content-length": length}))
    assert relay.arrival is not None
    assert relay.arrival.content_length == known


@pytest.mark.parametrize(
    ("key", "taken"),
    [
        ("a", True),
        ("~" * 255, True),
        ("a b", True),
        ("{'odd': \"one\"}", True),
        ("", False),
        (" ", False),
        (" a", False),
        ("a ", False),
        ("~" * 256, False),
        ("caf\xe9", False),
        ("a\tb", False),
        ("a\x7f", False),
    ],
)
async def test_the_forms_of_an_idempotency_key(key: str, taken: bool) -> None:
    relay, client = Relay(), Client(headers={"idempotency-key": key})
    receipt, _ = await through(relay, client)
    if taken:
        assert relay.arrival is not None
        assert relay.arrival.idempotency_key == key
        return
    error = json.loads(client.body)["error"]
    assert (client.status, error["code"], error["param"]) == (
        *(400, "invalid_idempotency_key"),
        "Idempotency-Key",
    )
    assert error["message"] == "An Idempotency-Key is 1 to 255 printable ASCII characters."
    assert (relay.arrival, receipt.code) == (None, "invalid_idempotency_key")


def test_ids_of_requests_are_told_apart() -> None:
    assert len({doors.new_request_id() for _ in range(1000)}) == 1000


# How it is answered


async def test_an_answer() -> None:
    relay, client = Relay(headers=(("content-type", "application/json"), ("x-a", "b"))), Client()
    receipt, delivery = await through(relay, client)
    assert (client.status, client.body) == (200, b"onetwo")
    assert client.answer == {
        "content-type": "application/json",
        "x-a": "b",
        "content-length": "6",
    }
    assert (receipt, delivery) == (RECEIPT, Delivery(200, 6, 0.0))
    assert (relay.closed, client.aborted, relay.done) == (1, 0, [True])


async def test_a_stream_has_no_length_and_is_kept_by_nobody() -> None:
    client = Client()
    await through(Relay(length=None), client)
    assert "content-length" not in client.answer
    assert client.answer["cache-control"] == "no-cache"


@pytest.mark.parametrize("value", ["a\r\nset-cookie: b", "caf\xe9", "\x00", "\u2028"])
async def test_a_header_that_would_break_the_answer_is_left_out(value: str) -> None:
    client = Client()
    await through(Relay(headers=(("x-model-served", value), ("x-a", "b"))), client)
    assert client.answer == {"x-a": "b", "content-length": "6"}


async def test_a_body_that_nobody_read_ends_the_connection() -> None:
    client = Client()
    await through(Relay(reads=False), client)
    assert client.answer["connection"] == "close"
    client = Client()
    relay = Relay(reads=False, headers=(("connection", "close"),))
    await through(relay, client)
    assert [name for name, _ in client.heard[0]["headers"]].count(b"connection") == 1


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS"])
async def test_a_picture_is_posted_for(method: str) -> None:
    relay, client = Relay(), Client(method=method)
    receipt, delivery = await through(relay, client)
    assert client.status == delivery.status == receipt.status == 405
    assert client.answer["allow"] == "POST"
    assert json.loads(client.body)["error"]["message"] == (
        f"/v1/images/generations takes POST, not {method}."
    )
    assert (relay.arrival, receipt.reason) == (None, "not_served")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidKey("No."), 401, "invalid_api_key"),
        (RuntimeError("sk-secret"), 500, "internal_error"),
    ],
)
async def test_whatever_goes_wrong_is_an_answer(error: Exception, status: int, code: str) -> None:
    client = Client()
    receipt, delivery = await through(Relay(error=error), client)
    assert client.status == receipt.status == delivery.status == status
    assert json.loads(client.body)["error"]["code"] == receipt.code == code
    assert b"sk-secret" not in client.body


@pytest.mark.parametrize(
    ("chunks", "body"), [((RuntimeError(),), b""), ((b"one", OSError("disk")), b"one")]
)
async def test_an_answer_that_breaks_is_a_broken_connection(
    chunks: tuple[bytes | Exception, ...], body: bytes
) -> None:
    relay, client = Relay(chunks=chunks), Client()
    _, delivery = await through(relay, client)
    assert delivery == Delivery(200, len(body), 0.0, gone="broken")
    assert (client.aborted, relay.closed, relay.done) == (1, 1, [False])
    assert client.heard[-1].get("more_body", True), "a cut answer must not look whole"


async def test_the_books_are_closed_when_the_flight_has_landed() -> None:
    relay, client, told = Relay(landed=asyncio.Event()), Client(), Told()
    handling = asyncio.create_task(
        routes(relay, told).handle(Operation.GENERATION, client.scope, client.receive, client.send)
    )
    for _ in range(20):
        await asyncio.sleep(0)
    assert client.body == b"onetwo"
    assert (told.requests, relay.closed, handling.done()) == ([], 1, False)
    assert relay.landed is not None
    relay.landed.set()
    await handling
    assert len(told.requests) == 1


# Where a client can leave


MORE = sent(b"abc", True)


@pytest.mark.parametrize(
    ("said", "taken"),
    [([DISCONNECT], []), ([MORE, DISCONNECT], [b"abc"]), ([MORE, MORE, DISCONNECT], [b"abc"] * 2)],
)
async def test_during_the_upload(said: list[Message], taken: list[bytes]) -> None:
    relay, client = Relay(), Client(list(said))
    _, delivery = await through(relay, client)
    assert relay.taken == taken
    assert (delivery, client.heard) == (Delivery(0, 0, 0.0, gone="upload"), [])


@pytest.mark.parametrize(
    ("reason", "gone"),
    [("", "upstream"), ("upstream_5xx", "upstream"), ("client_gone", "reserved")],
)
async def test_while_the_picture_is_made(reason: str, gone: str) -> None:
    receipt = Receipt("req_1", "generation", 200, reason=reason)
    relay = Relay(waits=asyncio.Event(), receipt=receipt)
    client = Client([sent(b"{}"), DISCONNECT])
    _, delivery = await through(relay, client)
    assert (delivery, client.heard) == (Delivery(0, 0, 0.0, gone=gone), [])
    assert relay.done == [False]


@pytest.mark.parametrize("how", ["leaves_at", "fails_at"])
@pytest.mark.parametrize(("at", "bytes_out"), [(0, 0), (1, 3), (2, 6)])
async def test_while_it_is_sent(how: str, at: int, bytes_out: int) -> None:
    script: dict[str, Any] = {how: at}
    relay, client = Relay(), Client(**script)
    _, delivery = await through(relay, client)
    if how == "fails_at":
        bytes_out = max(0, bytes_out - 3)
    assert delivery == Delivery(200, bytes_out, 0.0, gone="response")
    assert (relay.closed, client.aborted, relay.done) == (1, 0, [False])


async def test_with_the_last_byte_in_hand() -> None:
    relay, client = Relay(), Client(leaves_at=3)
    _, delivery = await through(relay, client)
    assert (delivery.gone, client.body, relay.done) == ("", b"onetwo", [True])


@pytest.mark.parametrize(("at", "bytes_out"), [(0, 0), (1, 0), (2, 3), (3, 6)])
async def test_without_taking_anything_any_more(
    monkeypatch: pytest.MonkeyPatch, at: int, bytes_out: int
) -> None:
    monkeypatch.setattr(doors, "STALL_SECONDS", 0.01)
    relay, client = Relay(), Client(stalls_at=at)
    _, delivery = await through(relay, client)
    assert delivery == Delivery(200, bytes_out, 0.0, gone="stalled")
    assert (client.aborted, relay.closed, relay.done) == (1, 1, [False])


async def test_half_closed_is_counted_as_gone_and_answered() -> None:
    relay, client = Relay(), Client(hung_up=True)
    _, delivery = await through(relay, client)
    assert delivery == Delivery(200, 6, 0.0, gone="upstream")
    assert (client.body, relay.done) == (b"onetwo", [False])


# The server's patience


async def cancelled(
    relay: Relay, client: Client, before: Callable[[], Awaitable[None]] | None = None
) -> None:
    handling = asyncio.create_task(
        routes(relay, Told()).handle(
            Operation.GENERATION, client.scope, client.receive, client.send
        )
    )
    for _ in range(20):
        await asyncio.sleep(0)
    if before is not None:
        await before()
    handling.cancel()
    await handling


async def test_a_request_given_up_before_its_answer_is_told_not_to_come_again() -> None:
    client = Client()
    await cancelled(Relay(waits=asyncio.Event()), client)
    assert client.status == 503
    assert client.answer["x-should-retry"] == "false"
    assert json.loads(client.body)["error"]["code"] == "shutting_down"


async def test_an_answer_given_up_in_its_middle_is_broken_off() -> None:
    client = Client(stalls_at=2)
    relay = Relay()
    await cancelled(relay, client)
    assert (client.status, client.aborted, relay.done) == (200, 1, [False])


async def test_a_request_given_up_after_its_answer_is_left_as_it_is() -> None:
    client = Client()
    relay = Relay(landed=asyncio.Event())
    await cancelled(relay, client)
    assert (client.status, client.body, relay.closed) == (200, b"onetwo", 1)


@pytest.mark.parametrize("how", ["leaves", "fails"])
async def test_nobody_hears_that_a_request_was_given_up(how: str) -> None:
    client = Client(fails_at=0 if how == "fails" else 99)
    stuck = asyncio.Event()

    class Deaf(Relay):
        async def _wait(self, arrival: Arrival) -> None:
            await stuck.wait()

    leave = client.leave if how == "leaves" else None
    await cancelled(Deaf(waits=stuck), client, leave)
    assert client.heard == []
