"""However a call ends, its money ends too: once, exactly, and with nothing left behind.

Clients that leave and upstreams that break off, at every stage and over real sockets; and a
database that somebody else has locked (reliability.md 4.2, 4.3, 4.4).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import socket
import sqlite3
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import (
    APIError,
    APIStatusError,
    AsyncOpenAI,
    DefaultAsyncHttpxClient,
    InternalServerError,
)
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image

import gateway.api.door
import gateway.app
import gateway.relay.purchase
from gateway.domain.ledger import Claim, Outcome
from gateway.domain.receipt import CacheResult, Delivery, Receipt
from gateway.sandbox.rules import Rule
from gateway.sandbox.watch import Gate
from gateway.settings import Settings
from gateway.stores.sqlite import SQLiteStore
from tests import upstream_cuts as upstream
from tests.departures import Departures
from tests.processes import Books, bill
from tests.running import KEY, MODEL, GatewayUnderTest, Start
from tests.upstream.raw_server import Peer, raw_server

BUDGETS = {"teams": {"growth": {"budget": {"day": 1000, "month": 10_000}}}}
SMALL = Rule(payload_bytes=400)
SOON_SECONDS = 30.0
HOWS = ("fin", "reset")
KINDS = ("json", "edit", "stream")
BOUNDARY = "cut-here"


# What a client sends, and how it leaves.


@functools.cache
def noise() -> bytes:
    """A PNG of 1.7 MB: more than a request may keep in memory."""
    file = BytesIO()
    Image.frombytes("RGB", (750, 750), os.urandom(750 * 750 * 3)).save(file, "PNG")
    return file.getvalue()


def request(kind: str, prompt: str) -> bytes:
    """A request's bytes; the same prompt gives the same ones."""
    fields = {"model": MODEL, "prompt": prompt, "quality": "low", "size": "1024x1024"}
    path, content_type = "/v1/images/generations", "application/json"
    if kind == "edit":
        path, content_type = "/v1/images/edits", f"multipart/form-data; boundary={BOUNDARY}"
        parts = [
            f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
        ]
        parts.append(
            f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n'
            "content-type: image/png\r\n\r\n"
        )
        body = "".join(parts).encode() + noise() + f"\r\n--{BOUNDARY}--\r\n".encode()
    else:
        streaming = ',"stream":true,"partial_images":1' if kind == "stream" else ""
        members = ",".join(f'"{name}":"{value}"' for name, value in fields.items())
        body = f"{{{members}{streaming}}}".encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


_connected: list[socket.socket] = []


@pytest.fixture(autouse=True)
def close_clients() -> Iterator[None]:
    """A test that fails leaves no socket behind."""
    yield
    while _connected:
        _connected.pop().close()


async def connect(port: int, receive_buffer: int | None = None) -> socket.socket:
    raw = socket.socket()
    _connected.append(raw)
    if receive_buffer is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
    return raw


async def send(raw: socket.socket, data: bytes) -> None:
    async with asyncio.timeout(30):
        await asyncio.get_running_loop().sock_sendall(raw, data)


async def read(raw: socket.socket, count: int | None = None, until: bytes = b"") -> bytes:
    """So many bytes at least, or up to a mark, or all until the other side closes."""
    found = b""
    async with asyncio.timeout(30):
        while (count is None or len(found) < count) and not (until and until in found):
            some = await asyncio.get_running_loop().sock_recv(raw, 65536)
            if not some:
                break
            found += some
    return found


def leave(raw: socket.socket, how: str) -> None:
    if how == "reset":
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


# What must be left behind: nothing, and books that add up.


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def connections(port: int) -> int:
    """How many connections the gateway has not closed, whatever their clients did."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ours = f"{port:04X}"
    established, close_wait = "01", "08"
    return sum(line[1].endswith(ours) and line[3] in (established, close_wait) for line in lines)


async def soon(true: Callable[[], bool], what: str) -> None:
    """Looks until ``true()``: for what nobody tells of, a closed file or a task that is over."""
    try:
        async with asyncio.timeout(SOON_SECONDS):
            while not true():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"not within {SOON_SECONDS} s: {what}") from None


def books_of(gateway: GatewayUnderTest) -> Books:
    return Books.read(gateway.config.parent / "data" / "gateway.db")


def plain(gateway: GatewayUnderTest) -> httpx.AsyncClient:
    """Without a list of authorities, which takes longer to read than most of these stories."""
    return gateway.http(verify=False)


def sdk_of(gateway: GatewayUnderTest, max_retries: int = 2) -> AsyncOpenAI:
    http = DefaultAsyncHttpxClient(verify=False)
    return gateway.sdk(max_retries=max_retries, http_client=http)


async def metrics_of(gateway: GatewayUnderTest) -> dict[str, float]:
    await gateway.put_away()
    async with plain(gateway) as http:
        text = (await http.get(f"{gateway.origin}/metrics")).text
    samples = (line.rpartition(" ") for line in text.splitlines() if line[:1] not in ("#", ""))
    return {name: float(value) for name, _, value in samples}


@contextlib.asynccontextmanager
async def nothing_left(gateway: GatewayUnderTest) -> AsyncIterator[None]:
    """Whatever happens inside: no hold, no task, no file, no byte of it is left behind."""
    async with plain(gateway) as http:  # so that whatever is made at the first call is made
        await http.post("/images/generations", content=b"{", headers={"connection": "close"})
        ours = {"model": MODEL, "prompt": "warm", "quality": "low", "size": "1024x1024"}
        warm = await http.post("/images/generations", json=ours)
        assert warm.status_code == 200, warm.text
    await metrics_of(gateway)
    tasks = asyncio.all_tasks()
    await soon(lambda: connections(gateway.port) == 0, "the warming up has left")
    files = open_files()
    yield
    await soon(lambda: gateway.gateway.flights.count == 0, "every flight has landed")
    await soon(lambda: asyncio.all_tasks() <= tasks, f"{asyncio.all_tasks() - tasks} are over")
    await soon(lambda: connections(gateway.port) == 0, "every connection is closed")
    await soon(lambda: open_files() <= files, f"{open_files()} files are {files} again")
    metrics = await metrics_of(gateway)
    assert metrics['gateway_inflight_bytes{where="memory"}'] == 0
    assert metrics['gateway_inflight_bytes{where="disk"}'] == 0
    assert metrics["gateway_inflight_requests"] == 0
    assert metrics["gateway_ledger_open_holds"] == 0
    books = books_of(gateway)
    books.check()
    assert books.open == []
    assert books.pending == 0


async def last_of(gateway: GatewayUnderTest, count: int) -> tuple[Receipt, Delivery]:
    """The last of ``count`` requests, counted from the start of the gateway."""
    told = await gateway.told.until(count)
    assert len(told) == count
    return told[-1]


def gone(metrics: dict[str, float], stage: str) -> float:
    return metrics.get(f'gateway_client_gone_total{{stage="{stage}"}}', 0)


WARM = 2
"""Requests of the warming up in ``nothing_left``."""


# The client leaves.


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_that_leaves_while_it_sends_buys_nothing(start: Start, kind: str) -> None:
    """At every tenth of the upload, and before its last byte; with FIN and with RST."""
    whole = request(kind, f"never {kind}")
    head = whole.index(b"\r\n\r\n") + 4
    places = [head + (len(whole) - head) * tenth // 10 for tenth in range(10)] + [len(whole) - 1]
    async with start(BUDGETS) as gateway:
        gateway.sandbox.rules.add(SMALL)
        async with nothing_left(gateway):
            for place in places:
                for how in HOWS:
                    client = await connect(gateway.port)
                    await send(client, whole[:place])
                    leave(client, how)
            told = await gateway.told.until(WARM + 2 * len(places))
        assert {delivery.gone for _, delivery in told[WARM:]} == {"upload"}
        assert {receipt.outcome for receipt, _ in told[WARM:]} == {None}
        assert gone(await metrics_of(gateway), "upload") == 2 * len(places)
        assert len(gateway.sandbox.journal) == 1
        assert len(books_of(gateway).holds) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_that_leaves_before_the_call_is_sent_gets_its_money_back(
    start: Start, departures: Departures, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    async with start(BUDGETS) as gateway:
        gateway.sandbox.rules.add(SMALL)
        async with nothing_left(gateway):
            client = await connect(gateway.port)
            ledger = gateway.gateway.ledger
            reserve = ledger.reserve

            async def leave_meanwhile(claim: Claim) -> Any:
                held = await reserve(claim)
                before = departures.seen["reset"]
                leave(client, "reset")
                await departures.more_than("reset", before)
                return held

            with monkeypatch.context() as patch:
                patch.setattr(ledger, "reserve", leave_meanwhile)
                await send(client, request(kind, "held"))
                receipt, delivery = await last_of(gateway, WARM + 1)
        assert (receipt.outcome, receipt.cost, delivery.gone) == (None, 0, "reserved")
        assert len(gateway.sandbox.journal) == 1, "only the warming up was sent"
        books = books_of(gateway)
        assert [hold.rid for hold in books.of("V")] == [receipt.rid]
        assert gone(await metrics_of(gateway), "reserved") == 1


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_that_leaves_while_the_picture_is_made_pays_for_it_and_may_come_back(
    start: Start, departures: Departures, kind: str, how: str
) -> None:
    gate = Gate()
    async with start(BUDGETS) as gateway:
        gateway.sandbox.rules.add(Rule(prompt="left", wait_for=gate, payload_bytes=400))
        gateway.sandbox.rules.add(SMALL)
        async with nothing_left(gateway):
            client = await connect(gateway.port)
            await send(client, request(kind, "left"))
            async with asyncio.timeout(30):
                await gate.arrived()
            before = departures.seen[how]
            leave(client, how)
            await departures.more_than(how, before)
            gate.set()
            receipt, delivery = await last_of(gateway, WARM + 1)
            assert (receipt.outcome, delivery.gone) == (Outcome.DELIVERED, "upstream")
            [_, record] = gateway.sandbox.journal.billed
            assert receipt.cost == bill(record) > 0

            back = await connect(gateway.port)
            await send(
                back, request(kind, "left").replace(b"\r\n", b"\r\nconnection: close\r\n", 1)
            )
            again = await read(back)
            back.close()
            assert again.startswith(b"HTTP/1.1 200")
            assert b"x-cache: hit" in again
            assert b"AAAA" in again
            receipt, delivery = await last_of(gateway, WARM + 2)
            assert (receipt.cache, receipt.cost, delivery.gone) == (CacheResult.HIT, 0, "")
        assert len(gateway.sandbox.journal.billed) == 2, "one for the warming up, one for this"
        assert books_of(gateway).spent == sum(map(bill, gateway.sandbox.journal.billed))
        await soon(lambda: books_of(gateway).usage["cached_requests"] == 1, "the hit is counted")
        metrics = await metrics_of(gateway)
        assert gone(metrics, "upstream") == 1
        assert metrics["gateway_orphaned_results_total"] == 1


@pytest.mark.parametrize("how", HOWS)
async def test_a_client_that_leaves_within_a_large_answer_gives_all_room_back(
    start: Start, how: str
) -> None:
    changes = {**BUDGETS, "server": {"buffer_bytes": "4MiB"}}
    async with start(changes) as gateway:
        gateway.sandbox.rules.add(Rule(prompt="large", payload_bytes=20_000_000))
        gateway.sandbox.rules.add(SMALL)
        async with nothing_left(gateway):
            client = await connect(gateway.port, receive_buffer=16_384)
            await send(client, request("json", "large"))
            await read(client, 10_000)
            held = await metrics_of(gateway)
            assert held['gateway_inflight_bytes{where="disk"}'] > 20_000_000
            assert held['gateway_inflight_bytes{where="memory"}'] < 4 * 1024 * 1024
            leave(client, how)  # with a reset in both cases: there is much it has not read
            receipt, delivery = await last_of(gateway, WARM + 1)
            assert (receipt.outcome, delivery.gone) == (Outcome.DELIVERED, "response")
            assert 10_000 < delivery.bytes_out < 20_000_000
            async with plain(gateway) as http:
                body = request("json", "large").partition(b"\r\n\r\n")[2]
                again = await http.post(
                    "/images/generations",
                    content=body,
                    headers={"content-type": "application/json"},
                )
            assert (again.status_code, again.headers["x-cache"]) == (200, "hit")
            assert len(again.content) > 20_000_000
        [_, record] = gateway.sandbox.journal.billed
        assert receipt.cost == bill(record)
        metrics = await metrics_of(gateway)
        assert gone(metrics, "response") == 1
        assert metrics["gateway_orphaned_results_total"] == 1


@pytest.mark.parametrize("how", HOWS)
async def test_a_client_that_leaves_within_a_stream_does_not_stop_it(
    start: Start, departures: Departures, how: str
) -> None:
    go, drained = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        if peer.number == 1:  # the warming up
            await upstream.good(peer)
            return
        await peer.request()
        await peer.send(upstream.stream_head() + upstream.chunk(upstream.partial()))
        await go.wait()
        await peer.send(upstream.chunk(upstream.completed(5_000_000)) + upstream.LAST_CHUNK)
        await peer.gone()
        drained.set()

    async with raw_server(script) as server, start(upstream.at(server)) as gateway:
        async with nothing_left(gateway):
            client = await connect(gateway.port, receive_buffer=16_384)
            await send(client, request("stream", "left"))
            seen = await read(client, until=b'"quality":"low"}\n\n')
            assert b"partial_image" in seen
            before = departures.seen[how]
            leave(client, how)
            await departures.more_than(how, before)
            go.set()
            async with asyncio.timeout(30):
                await drained.wait()
            receipt, delivery = await last_of(gateway, WARM + 1)
            assert (receipt.outcome, delivery.gone) == (Outcome.DELIVERED, "response")
            assert receipt.cost == upstream.COST
            again = await connect(gateway.port)
            await send(again, request("stream", "left"))
            said = await read(again, until=b"0\r\n\r\n")
            again.close()
            assert b"x-cache: hit" in said
            assert said.count(b"event: image_generation.completed") == 1
            await gateway.told.until(WARM + 2)
        assert server.accepted == 2
        assert books_of(gateway).spent == 2 * upstream.COST
        metrics = await metrics_of(gateway)
        assert gone(metrics, "response") == 1
        assert metrics["gateway_orphaned_results_total"] == 1


async def test_a_client_that_takes_nothing_is_dropped(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.api.door, "STALL_SECONDS", 0.3)
    async with start(BUDGETS) as running:
        running.sandbox.rules.add(Rule(prompt="large", payload_bytes=20_000_000))
        running.sandbox.rules.add(SMALL)
        async with nothing_left(running):
            client = await connect(running.port, receive_buffer=16_384)
            await send(client, request("json", "large"))
            receipt, delivery = await last_of(running, WARM + 1)
            assert (receipt.outcome, delivery.gone) == (Outcome.DELIVERED, "stalled")
            head, _, body = (await read(client)).partition(b"\r\n\r\n")
            client.close()
            length = re.search(rb"content-length: (\d+)", head)
            assert length
            assert 0 < len(body) < int(length[1]), "what is cut never looks whole"
        [_, record] = running.sandbox.journal.billed
        assert receipt.cost == bill(record)
        metrics = await metrics_of(running)
        assert gone(metrics, "stalled") == 1
        assert metrics["gateway_orphaned_results_total"] == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_that_closes_only_its_sending_half_is_answered(
    start: Start, departures: Departures, kind: str
) -> None:
    gate = Gate()
    async with start(BUDGETS) as gateway:
        gateway.sandbox.rules.add(Rule(prompt="half", wait_for=gate, payload_bytes=200_000))
        gateway.sandbox.rules.add(SMALL)
        async with nothing_left(gateway):
            client = await connect(gateway.port)
            await send(client, request(kind, "half"))
            async with asyncio.timeout(30):
                await gate.arrived()
            before = departures.seen["fin"]
            client.shutdown(socket.SHUT_WR)
            await departures.more_than("fin", before)
            gate.set()
            said = await read(client)
            client.close()
            head, _, body = said.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            length = re.search(rb"content-length: (\d+)", head)
            assert len(body) == int(length[1]) if length else body.endswith(b"0\r\n\r\n")
            assert body.count(b"A") > (390_000 if kind == "stream" else 190_000)
            receipt, _ = await last_of(gateway, WARM + 1)
            assert receipt.outcome is Outcome.DELIVERED
        assert books_of(gateway).spent == sum(map(bill, gateway.sandbox.journal.billed))


# The upstream breaks off.


@dataclass(frozen=True)
class Break:
    """One way in which an upstream breaks a call off, and what the client must be told."""

    name: str
    script: upstream.Script
    status: int
    code: str
    kind: str = "json"
    partials: int | None = None
    """So many pictures of a stream came before the error, which is then an event; None: a status,
    before anything else."""
    state: str = "X"
    timeouts: dict[str, float] = field(default_factory=dict)


UNKNOWN, BROKEN = "upstream_outcome_unknown", "upstream_bad_response"
WHOLE = upstream.answer()
PARTIAL, COMPLETED = upstream.partial(), upstream.completed()
QUICK = {"first_byte_seconds": 1.0, "total_seconds": 30}
SHORT = {"first_byte_seconds": 30, "total_seconds": 1.5}
"""What a hanging upstream is given; a whole answer has to come within it too, on a busy machine."""


def _breaks() -> list[Break]:
    found = [
        Break("before the headers", upstream.cut(b""), 502, UNKNOWN),
        Break("reset before the headers", upstream.cut(b"", reset=True), 502, UNKNOWN),
        Break("within the headers", upstream.cut(b"HTTP/1.1 200 OK\r\ncont"), 502, UNKNOWN),
        Break("no HTTP", upstream.cut(b"SSH-2.0-OpenSSH\r\n\r\n"), 502, UNKNOWN),
        Break("hangs before the headers", upstream.hang(), 504, UNKNOWN, timeouts=QUICK),
        Break(
            "never reads the request",
            upstream.never_reads,
            502,
            UNKNOWN,
            kind="large",
            timeouts={"write_seconds": 0.3},
        ),
        Break(
            "hangs within the body",
            upstream.hang(upstream.json_head(len(WHOLE)) + WHOLE[:300]),
            504,
            BROKEN,
            timeouts=SHORT,
        ),
        Break("drips", upstream.drip(upstream.json_head(100_000)), 504, BROKEN, timeouts=SHORT),
        Break(
            "within a chunk",
            upstream.cut(upstream.json_head(chunked=True) + upstream.chunk(WHOLE)[:-20]),
            502,
            BROKEN,
        ),
        Break(
            "before the last chunk",
            upstream.cut(upstream.json_head(chunked=True) + upstream.chunk(WHOLE)),
            502,
            BROKEN,
        ),
        # The end of such an answer is the end of the connection: it came whole, and is no JSON.
        Break("no length", upstream.cut(upstream.json_head() + WHOLE[:-5]), 502, BROKEN, state="P"),
    ]
    for after in (0, 1, 65_536, 700_000, 1_400_000):
        found.append(
            Break(f"after {after} sent", upstream.cut_request(after), 502, UNKNOWN, kind="edit")
        )
    size = len(WHOLE)
    for place in (0, 1, 20, size // 4, size // 2, size * 3 // 4, size - 10, size - 1):
        for reset in (False, True):
            sent = upstream.json_head(size) + WHOLE[:place]
            name = f"JSON {'reset' if reset else 'cut'} at {place} of {size}"
            found.append(Break(name, upstream.cut(sent, reset=reset), 502, BROKEN))
    for chunked in (True, False):
        head = upstream.stream_head(chunked=chunked)
        frame = upstream.chunk if chunked else bytes
        how = "chunks" if chunked else "no length"
        found += [
            Break(f"{name} ({how})", upstream.cut(head + sent), 502, BROKEN, "stream", partials)
            for name, sent, partials in [
                ("nothing", b"", None),
                ("within a partial", frame(PARTIAL[:200]), None),
                ("within the second partial", frame(PARTIAL) + frame(PARTIAL[:200]), 1),
                ("between events", frame(PARTIAL), 1),
                ("in the name of the completed", frame(PARTIAL) + frame(COMPLETED[:20]), 1),
                ("in the picture", frame(PARTIAL) + frame(COMPLETED[:300]), 1),
                ("in the usage", frame(PARTIAL) + frame(COMPLETED[:-40]), 1),
                ("in the completed, alone", frame(COMPLETED[:-40]), None),
            ]
        ]
    head = upstream.stream_head()
    ended = head + upstream.chunk(PARTIAL) + upstream.LAST_CHUNK
    found += [
        Break("no completed", upstream.cut(ended), 502, BROKEN, "stream", 1),
        Break(
            "hangs within a stream",
            upstream.hang(head + upstream.chunk(PARTIAL)),
            504,
            BROKEN,
            "stream",
            1,
            timeouts=SHORT,
        ),
        Break(
            "drips within a stream",
            upstream.drip(head + upstream.chunk(PARTIAL), upstream.chunk(b":")),
            504,
            BROKEN,
            "stream",
            1,
            timeouts=SHORT,
        ),
    ]
    return found


async def ask(sdk: AsyncOpenAI, kind: str) -> tuple[int, object]:
    """One call with the real SDK: how many partial pictures came, and the answer or the error."""
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": "broken",
        "quality": "low",
        "size": "1024x1024",
    }
    partials = 0
    try:
        if kind in ("edit", "large"):
            picture = noise() + bytes(12_000_000 if kind == "large" else 0)
            return 0, await sdk.images.edit(image=("a.png", picture, "image/png"), **asked)
        if kind == "json":
            return 0, await sdk.images.generate(**asked)
        last: object = None
        async for event in await sdk.images.generate(stream=True, partial_images=1, **asked):
            partials += isinstance(event, ImageGenPartialImageEvent)
            last = event
        return partials, last
    except APIError as error:
        return partials, error


@pytest.mark.parametrize("case", _breaks(), ids=lambda case: case.name.replace(" ", "-"))
async def test_an_upstream_that_breaks_off_is_booked_and_never_asked_twice(
    start: Start, case: Break
) -> None:
    async with (
        raw_server(upstream.first(case.script), receive_buffer=65_536) as server,
        start(upstream.at(server, **case.timeouts)) as gateway,
    ):
        async with sdk_of(gateway) as sdk:
            partials, error = await ask(sdk, case.kind)
        receipt, _ = await last_of(gateway, 1)
        assert isinstance(error, APIError), error
        assert error.code == case.code
        assert partials == (case.partials or 0)
        if case.partials is None:
            assert type(error) is InternalServerError
            assert error.status_code == case.status
            assert error.response.headers["x-should-retry"] == "false"
            assert error.response.headers["x-request-id"] == receipt.rid
            assert "retry-after" not in error.response.headers
        else:
            assert not isinstance(error, APIStatusError)
        assert receipt.status == case.status
        assert re.search("(bought|paid for)", error.message), error.message
        assert receipt.rid in error.message
        assert server.accepted == 1, "with retries on, it was asked once"
        assert gateway.gateway.flights.count == 0
        books = books_of(gateway)
        books.check()
        [hold] = books.holds.values()
        assert (hold.rid, hold.state) == (receipt.rid, case.state)
        assert hold.cost == hold.bound == receipt.cost > 0
        assert books.usage["unresolved"] == (case.state == "X")
        assert books.usage["images"] == 0

        # What was cut is not kept: the next one is bought, and it is whole.
        async with sdk_of(gateway) as sdk:
            partials, answer = await ask(sdk, case.kind)
        assert not isinstance(answer, APIError), answer
        assert partials == (case.kind == "stream")
        assert server.accepted == 2
        receipt, _ = await last_of(gateway, 2)
        assert receipt.cost == upstream.COST
        metrics = await metrics_of(gateway)
        assert metrics['gateway_inflight_bytes{where="memory"}'] == 0
        assert metrics['gateway_inflight_bytes{where="disk"}'] == 0


async def test_an_upstream_that_cannot_be_reached_costs_nothing(start: Start) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    changes = {**BUDGETS, "upstreams": {"openai": {"base_url": f"http://127.0.0.1:{port}/v1"}}}
    async with start(changes) as gateway:
        for count, kind in enumerate(KINDS, start=1):
            async with sdk_of(gateway, max_retries=0) as sdk:
                partials, error = await ask(sdk, kind)
            assert type(error) is InternalServerError
            assert (partials, error.status_code, error.code) == (0, 503, "upstream_unavailable")
            assert "Nothing was bought" in error.message
            assert error.response.headers["retry-after"] == "5"
            assert error.response.headers.get("x-should-retry") != "false", "a retry is free"
            receipt, _ = await last_of(gateway, count)
            assert (receipt.cost, receipt.outcome) == (0, Outcome.REFUSED)
        books = books_of(gateway)
        books.check()
        assert len(books.of("V")) == len(books.holds) == 3
        assert await gateway.usage() == []


UNFRAMED = upstream.stream_head(chunked=False)
FRAMED = upstream.stream_head()
RAGGED = {
    "no length": UNFRAMED + PARTIAL + COMPLETED,
    "no last chunk": FRAMED + upstream.chunk(PARTIAL) + upstream.chunk(COMPLETED),
    "a ragged rest": FRAMED + upstream.chunk(PARTIAL + COMPLETED + b"data: [DO"),
}
BARE = {  # such an event is only whole when the stream ends in order
    "no blank line": UNFRAMED + PARTIAL + COMPLETED.rstrip(b"\n"),
    "half a blank line": UNFRAMED + PARTIAL + COMPLETED[:-1],
}


@pytest.mark.parametrize(
    ("sent", "reset"),
    [
        *(pytest.param(sent, False, id=f"{name}, fin") for name, sent in (RAGGED | BARE).items()),
        *(pytest.param(sent, True, id=f"{name}, reset") for name, sent in RAGGED.items()),
    ],
)
async def test_a_ragged_end_behind_the_picture_takes_nothing_away(
    start: Start, sent: bytes, reset: bool
) -> None:
    async with (
        raw_server(upstream.cut(sent, reset=reset)) as server,
        start(upstream.at(server)) as gateway,
    ):
        async with sdk_of(gateway) as sdk:
            partials, last = await ask(sdk, "stream")
        assert isinstance(last, ImageGenCompletedEvent), last
        assert partials == 1
        receipt, _ = await last_of(gateway, 1)
        assert (receipt.outcome, receipt.cost) == (Outcome.DELIVERED, upstream.COST)
        assert server.accepted == 1
        books_of(gateway).check()


async def test_a_stream_that_stays_open_behind_its_picture_is_closed(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The completed event comes at once, also to a client that reads to the end."""
    monkeypatch.setattr(gateway.relay.purchase, "REST_SECONDS", 0.3)
    rest_began = asyncio.Event()
    whole = upstream.stream_head() + upstream.chunk(PARTIAL) + upstream.chunk(COMPLETED)

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(whole)
        rest_began.set()
        await peer.gone()

    async with raw_server(script) as server, start(upstream.at(server)) as running:
        loop = asyncio.get_running_loop()
        client = await connect(running.port)
        await send(client, request("stream", "open"))
        await rest_began.wait()
        sent_at = loop.time()
        await read(client, until=b'"total_tokens":206')
        assert running.gateway.flights.count == 1, "the picture is here before the end is"
        assert await read(client, until=b"0\r\n\r\n")
        assert loop.time() - sent_at < 5
        client.close()
        receipt, delivery = await last_of(running, 1)
        assert (receipt.outcome, receipt.cost) == (Outcome.DELIVERED, upstream.COST)
        assert delivery.gone == ""
        await soon(lambda: running.gateway.flights.count == 0, "the flight has landed")


# Somebody else has locked the database.


@contextlib.contextmanager
def impatient(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store that waits 0.1 s for a stranger's lock, in place of 2 s."""

    def open_store(settings: Settings) -> SQLiteStore:
        assert isinstance(settings.storage.database, Path)
        return SQLiteStore.open(settings.storage.database, busy_seconds=0.1)

    with monkeypatch.context() as patch:
        patch.setattr(gateway.app, "open_store", open_store)
        patch.setattr(gateway.relay.purchase, "SETTLE_PAUSES_SECONDS", (0.01, 0.01))
        yield


@contextlib.contextmanager
def locked(running: GatewayUnderTest) -> Any:
    path: Path = running.config.parent / "data" / "gateway.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as stranger:
        stranger.execute("BEGIN IMMEDIATE")
        yield
        stranger.execute("ROLLBACK")


async def test_nothing_is_bought_while_the_ledger_is_locked(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    with impatient(monkeypatch):
        async with start(BUDGETS) as running:
            running.sandbox.rules.add(SMALL)
            with locked(running):
                for count, kind in enumerate(KINDS, start=1):
                    async with sdk_of(running, max_retries=0) as sdk:
                        partials, error = await ask(sdk, kind)
                    assert type(error) is InternalServerError
                    assert (error.status_code, error.code) == (503, "ledger_unavailable")
                    assert int(error.response.headers["retry-after"]) > 0
                    assert error.response.headers.get("x-should-retry") != "false"
                    assert partials == 0
                    receipt, _ = await last_of(running, count)
                    assert (receipt.cost, receipt.outcome) == (0, None)
            assert running.gateway.flights.count == 0
            assert len(running.sandbox.journal) == 0
            assert len(books_of(running).holds) == 0
            async with sdk_of(running) as sdk:  # and when it is free again, all is well
                assert not isinstance((await ask(sdk, "json"))[1], APIError)
            metrics = await metrics_of(running)
            assert metrics['gateway_inflight_bytes{where="memory"}'] == 0
            assert metrics['gateway_inflight_bytes{where="disk"}'] == 0
            assert len(books_of(running).of("P")) == 1
            books_of(running).check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("late", [False, True], ids=["within-the-lease", "after-the-lease"])
async def test_a_picture_is_delivered_even_if_it_cannot_be_booked_yet(
    start: Start, monkeypatch: pytest.MonkeyPatch, kind: str, late: bool
) -> None:
    """The hold stands meanwhile; what is known is booked when the lock is gone, also where the
    sweep was there before."""
    gate = Gate()
    ledger = {"lease_seconds": 660, "sweep_seconds": 0.05}
    with impatient(monkeypatch):
        async with start({**BUDGETS, "ledger": ledger}) as running:
            running.sandbox.rules.add(Rule(wait_for=gate, payload_bytes=400))
            async with sdk_of(running, max_retries=0) as sdk:
                call = asyncio.ensure_future(ask(sdk, kind))
                async with asyncio.timeout(30):
                    await gate.arrived()
                with locked(running):
                    gate.set()
                    _, answer = await call
                    assert not isinstance(answer, APIError), answer
                    receipt, _ = await last_of(running, 1)
                    [hold] = books_of(running).open
                    assert hold.rid == receipt.rid
                    if late:
                        running.clock.advance(seconds=661)
            assert (receipt.outcome, receipt.posted) == (Outcome.DELIVERED, False)
            assert (await metrics_of(running))["gateway_ledger_unposted_total"] == 1
            await soon(lambda: len(books_of(running).of("P")) == 1, "the call is booked")
            books = books_of(running)
            books.check()
            [hold] = books.holds.values()
            [record] = running.sandbox.journal.billed
            assert hold.cost == receipt.cost == bill(record)
            assert await running.gateway.ledger.unresolved() == 0
