"""One row of the fault matrix after another: each upstream fault over real sockets, first where
there is one upstream, then where there is another (reliability.md 4.3).

What every case says is what the client is told, what the call owes, how it is counted, and whether
another upstream may be asked. ``tests/rows.py`` says which tests prove which row.
"""

from __future__ import annotations

import gzip
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from gateway import assembly
from gateway.relay.failover import BILLING_CODES
from gateway.upstream.account import AccountOptions
from tests import upstream_cuts as cuts
from tests.e2e.test_endings import noise
from tests.processes import Books
from tests.running import MODEL, GatewayUnderTest, TestClock, run_gateway
from tests.upstream.raw_server import Peer, RawServer, raw_server

ASKED = {"model": "art", "prompt": "A lighthouse", "quality": "low", "size": "1024x1024"}
FRESH = {"cache-control": "no-cache"}
MIB = 1024 * 1024
LARGE_BYTES = 12_000_000
METADATA = "http://169.254.169.254/latest/meta-data/"

Place = Callable[[Path], AbstractAsyncContextManager[tuple[dict[str, Any], RawServer | None]]]


# Where the first upstream is.


def scripted(script: cuts.Script) -> Place:
    """A server that does as it is told."""

    @asynccontextmanager
    async def place(folder: Path) -> AsyncIterator[tuple[dict[str, Any], RawServer | None]]:
        async with raw_server(script, receive_buffer=65_536) as server:
            yield {"base_url": f"http://127.0.0.1:{server.port}/v1"}, server

    return place


@asynccontextmanager
async def unknown_name(folder: Path) -> AsyncIterator[tuple[dict[str, Any], RawServer | None]]:
    yield {"base_url": "https://nowhere.invalid/v1"}, None


@asynccontextmanager
async def closed_port(folder: Path) -> AsyncIterator[tuple[dict[str, Any], RawServer | None]]:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    yield {"base_url": f"http://127.0.0.1:{port}/v1"}, None


@asynccontextmanager
async def black_hole(folder: Path) -> AsyncIterator[tuple[dict[str, Any], RawServer | None]]:
    """A port whose queue is full: a SYN that comes there is dropped."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=0)) as full:
        waiting = []
        for _ in range(4):
            one = socket.socket()
            one.setblocking(False)
            with suppress(BlockingIOError):
                one.connect(full.getsockname())
            waiting.append(one)
        yield (
            {
                "base_url": f"http://127.0.0.1:{full.getsockname()[1]}/v1",
                "timeouts": {"connect_seconds": 0.3},
            },
            None,
        )
        for one in waiting:
            one.close()


def untrusted(fault: str) -> Place:
    """A host with a certificate that is good for nothing; the last one speaks no TLS at all."""

    async def never(peer: Peer) -> None:
        assert not await peer.reader.read(1), "nothing is ever sent here"

    async def plain(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    @asynccontextmanager
    async def place(folder: Path) -> AsyncIterator[tuple[dict[str, Any], RawServer | None]]:
        authority = trustme.CA()
        known = trustme.CA() if fault == "unknown authority" else authority
        name = "other.example" if fault == "wrong name" else "localhost"
        until = datetime.now(UTC) + timedelta(days=-1 if fault == "expired" else 1)
        certificate = authority.issue_cert(
            name, not_before=until - timedelta(days=9), not_after=until
        )
        context: ssl.SSLContext | None = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        assert context is not None
        certificate.configure_cert(context)
        bundle = folder / "ca.pem"
        known.cert_pem.write_to_path(bundle)
        script = never
        if fault == "no TLS":
            context, script = None, plain
        async with raw_server(script, tls=context) as server:
            yield (
                {"base_url": f"https://localhost:{server.port}/v1", "verify": str(bundle)},
                None,
            )

    return place


# What it does to the call.


def says(
    status: str, body: bytes | Mapping[str, Any], *headers: str, times: int | None = None
) -> cuts.Script:
    """Answers every request, or the first so many, with this; then it is good."""

    async def script(peer: Peer) -> None:
        if times is not None and peer.number > times:
            await cuts.good(peer)
            return
        await peer.request()
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        own = any(header.startswith("content-type") for header in headers)
        kind = () if own else ("content-type: application/json",)
        await peer.reply(text, *kind, "connection: close", *headers, status=status)

    return script


def error(kind: str, code: str | None = None, message: str = "m") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


MODERATED = error("image_generation_user_error", "moderation_blocked")
SERVER = error("server_error", "server_error")
LIMITED = error("requests", "rate_limit_exceeded")
EDGE_PAGE = b"<html><head><title>502 Bad Gateway</title></head></html>"
EDGE = ("content-type: text/html", "cf-ray: 8a1b2c3d4e5f-FRA", "server: cloudflare")
NO_PICTURE = b'{"created":1,"data":[],"usage":%b}' % cuts.USAGE
EVENT_OF_MODERATION = (
    b"event: error\ndata: %b\n\n"
    % json.dumps({"type": "error", "error": MODERATED["error"]}).encode()
)
GARBAGE = b"event: image_generation.completed\ndata: {this is no JSON\n\n"
LONG_LINE = b"data: " + b"x" * 10_000_000 + b"\n\n"


def events(*sent: bytes) -> cuts.Script:
    whole = b"".join(map(cuts.chunk, sent))
    return cuts.cut(cuts.stream_head() + whole + cuts.LAST_CHUNK)


async def endless(peer: Peer) -> None:
    await peer.request()
    await peer.send(cuts.json_head(chunked=True) + cuts.chunk(b'{"data":[{"b64_json":"'))
    with suppress(ConnectionError):
        while not peer.writer.is_closing():
            await peer.send(cuts.chunk(b"A" * 65_536))


def packed(content: bytes, encoding: str = "gzip") -> cuts.Script:
    return says("200 OK", content, f"content-encoding: {encoding}")


BOMB = gzip.compress(b'{"data":[{"b64_json":"' + b"A" * (8 * MIB) + b'"}]}')

UNAVAILABLE, UNTRUSTED = "upstream_unavailable", "upstream_tls"
UNKNOWN, BROKEN = "upstream_outcome_unknown", "upstream_bad_response"
QUICK = {"first_byte_seconds": 0.3, "total_seconds": 30}
SHORT = {"first_byte_seconds": 30, "total_seconds": 0.5}


@dataclass(frozen=True)
class Fault:
    """One fault, and what must follow from it.

    ``state`` is what becomes of the reservation: V void, X booked at its bound and unresolved, P
    booked for good, at ``cost`` or, where that is None, at the bound and flagged. ``kinds`` is how
    it is counted (``class``), ``tries`` how often one upstream is asked. ``partials``: so many
    pictures came before the error, which is then an event; ``status`` is what is on the books.
    """

    row: int
    name: str
    place: Place
    status: int
    code: str | None
    kinds: tuple[str, ...]
    state: str = "V"
    retry: str | None = None
    wait: str | None = None
    moves: bool = False
    form: str = "json"
    partials: int | None = None
    cost: int | None = None
    tries: int = 1
    timeouts: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    """What the client gets, unchanged."""


def unreached(row: int, name: str, place: Place, kind: str) -> Fault:
    return Fault(row, name, place, 503, UNAVAILABLE, (kind,), wait="5", moves=True, tries=2)


def unsure(row: int, name: str, script: cuts.Script, *kinds: str, **more: Any) -> Fault:
    more = {"status": 502, "code": UNKNOWN, "state": "X", "retry": "false", **more}
    return Fault(row, name, scripted(script), kinds=kinds, **more)


def broken(row: int, name: str, script: cuts.Script, *kinds: str, **more: Any) -> Fault:
    return unsure(row, name, script, *kinds, **{"code": BROKEN, **more})


def refused(row: int, name: str, script: cuts.Script, status: int, code: str | None, kind: str,
            **more: Any) -> Fault:  # fmt: skip
    return Fault(row, name, scripted(script), status, code, (kind,), **more)


def _faults() -> list[Fault]:
    size = len(cuts.answer())
    found = [
        unreached(37, "a name that nobody knows", unknown_name, "dns"),
        unreached(38, "a closed port", closed_port, "connect"),
        unreached(38, "a SYN that is dropped", black_hole, "connect_timeout"),
    ]
    found += [
        Fault(39, f"TLS, {fault}", untrusted(fault), 502, UNTRUSTED, ("tls",), retry="false",
              moves=True)
        for fault in ("wrong name", "expired", "unknown authority", "no TLS")
    ]  # fmt: skip
    # The system's buffers take up to 10 MB: the end of a body may be in them when the reset comes.
    found += [
        unsure(41, f"reset at {eighth}/8 of the body",
               cuts.cut_request(1 + LARGE_BYTES * eighth // 8),
               *(("write",) if eighth < 2 else ("write", "disconnect")), form="large")
        for eighth in range(8)
    ]  # fmt: skip
    found += [
        unsure(42, "hangs before the headers", cuts.hang(), "read_timeout", status=504,
               timeouts=QUICK),
        broken(44, "hangs within the body", cuts.hang(cuts.json_head(size) + b'{"data"'),
               "body_timeout", status=504, timeouts=SHORT),
        broken(44, "drips", cuts.drip(cuts.json_head(100_000)), "body_timeout", status=504,
               timeouts=SHORT),
        broken(45, "a short body", cuts.cut(cuts.json_head(size) + cuts.answer()[:-9]),
               "truncated"),
        broken(45, "an early end", cuts.cut(cuts.json_head(chunked=True)), "truncated"),
        broken(45, "JSON that is cut", cuts.cut(cuts.json_head(size - 9) + cuts.answer()[:-9]),
               "bad_answer", state="P"),
        broken(46, "HTML", says("200 OK", b"<html></html>", "content-type: text/html"),
               "bad_answer", state="P"),
        broken(46, "nothing", says("200 OK", b""), "bad_answer", state="P"),
        broken(46, "no picture", says("200 OK", NO_PICTURE), "bad_answer", state="P",
               cost=cuts.COST),
        broken(46, "no picture and no bill", says("200 OK", {"data": []}), "bad_answer",
               state="P"),
        refused(46, "a refusal in a success", says("200 OK", error("invalid_request_error")),
                400, None, "200_error"),
        refused(46, "a limit in a success", says("200 OK", LIMITED), 429, "rate_limit_exceeded",
                "200_error"),
        refused(46, "a failure in a success", says("200 OK", SERVER), 502, "server_error",
                "200_error", retry="false"),
        broken(50, "an answer without end", endless, "too_large"),
        broken(51, "a stream that is cut",
               cuts.cut(cuts.stream_head() + cuts.chunk(cuts.partial())), "truncated",
               form="stream", partials=1),
        broken(51, "a stream without a picture", events(cuts.partial()), "sse", form="stream",
               partials=1),
        broken(51, "an empty stream", events(), "sse", form="stream"),
        broken(51, "garbage behind a partial", events(cuts.partial(), GARBAGE), "sse",
               form="stream", partials=1),
        broken(51, "a line of 10 MB", events(cuts.partial(), LONG_LINE), "sse", form="stream",
               partials=1),
        refused(52, "moderation in a stream", events(EVENT_OF_MODERATION), 400,
                "moderation_blocked", "moderation", form="stream"),
        refused(52, "moderation behind a partial", events(cuts.partial(), EVENT_OF_MODERATION),
                400, "moderation_blocked", "moderation", form="stream", partials=1, state="P"),
        refused(53, "a limit", says("429 Too Many", LIMITED, "retry-after: 7",
                                    "retry-after-ms: 6500"),
                429, "rate_limit_exceeded", "429", wait="7", moves=True, body=LIMITED),
        refused(54, "a limit without a time", says("429 Too Many", LIMITED), 429,
                "rate_limit_exceeded", "429", moves=True, body=LIMITED),
    ]  # fmt: skip
    found += [
        refused(55, f"billing, {code}", says(status, error("insufficient_quota", code)), 503,
                "upstream_account_exhausted", "account", retry="false", wait="60",
                moves=True)
        for code, status in (
            *((code, "429 Too Many") for code in sorted(BILLING_CODES)),
            ("one_that_is_new", "429 Too Many"),
            ("billing_hard_limit_reached", "400 Bad Request"),
        )
    ]  # fmt: skip
    found += [
        refused(56, f"a key refused with {status}", says(f"{status} No", error("invalid_key")),
                503, "upstream_account_refused", "auth", retry="false", wait="60", moves=True)
        for status in (401, 403)
    ]  # fmt: skip
    found += [
        refused(56, "a 403 of an edge", says("403 Forbidden", EDGE_PAGE, *EDGE), 502,
                "upstream_forbidden", "edge", retry="false", moves=True),
        refused(57, "moderation", says("400 Bad Request", MODERATED), 400, "moderation_blocked",
                "moderation", body=MODERATED),
        refused(57, "moderation as 403", says("403 Forbidden", MODERATED), 403,
                "moderation_blocked", "moderation", body=MODERATED),
        refused(57, "invalid", says("400 Bad Request", error("invalid_request_error", "bad")),
                400, "bad", "4xx", body=error("invalid_request_error", "bad")),
    ]  # fmt: skip
    found += [
        refused(58, f"{status} of the API", says(f"{status} No", SERVER), status, "server_error",
                "5xx", moves=True, tries=2, body=SERVER)
        for status in (500, 503)
    ]  # fmt: skip
    found += [
        unsure(58, f"{status} that may be billed", says(f"{status} No", SERVER), "5xx",
               settings={"bill_on_5xx": "always"})
        for status in (500, 503)
    ]  # fmt: skip
    found += [
        unsure(59, f"{status} of an edge", says(f"{status} No", EDGE_PAGE, *EDGE), "edge",
               status=504)
        for status in (500, 502, 503, 504, 520, 524)
    ]  # fmt: skip
    found += [
        unsure(59, "502 of an edge in JSON", says("502 Bad Gateway", SERVER), "edge", status=504)
    ]
    found += [
        refused(60, f"{status} to the metadata", says(f"{status} Elsewhere", b"",
                                                      f"location: {METADATA}"),
                502, "upstream_redirect", "redirect", retry="false")
        for status in (301, 302, 303, 307, 308)
    ]  # fmt: skip
    found += [
        broken(62, "an unknown encoding", packed(cuts.answer(), "br"), "encoding"),
        broken(62, "an encoding that is not true", packed(cuts.answer()), "encoding"),
        broken(62, "a damaged encoding", packed(gzip.compress(cuts.answer())[:-9]), "truncated"),
        broken(62, "a bomb", packed(BOMB), "too_large"),
    ]  # fmt: skip
    return found


@dataclass(frozen=True)
class Said:
    """What a client was told."""

    status: int
    headers: httpx.Headers
    error: Mapping[str, Any]
    partials: int = 0


async def ask(gateway: GatewayUnderTest, form: str = "json", **headers: str) -> Said:
    """One call, and its error where it has one."""
    async with gateway.http(headers={**FRESH, **headers}) as http:
        if form == "large":
            picture = noise() + bytes(LARGE_BYTES)
            answer = await http.post(
                "/images/edits", data=ASKED, files={"image": ("a.png", picture, "image/png")}
            )
        else:
            more = {"stream": True, "partial_images": 1} if form == "stream" else {}
            answer = await http.post("/images/generations", json={**ASKED, **more})
    if answer.headers["content-type"].startswith("text/event-stream"):
        data = [json.loads(line[6:]) for line in answer.text.splitlines() if line[:6] == "data: "]
        partials = sum(".partial_image" in str(one.get("type")) for one in data)
        return Said(answer.status_code, answer.headers, data[-1].get("error", {}), partials)
    return Said(answer.status_code, answer.headers, answer.json().get("error", {}))


def upstreams(first: Mapping[str, Any], second: RawServer | None, fault: Fault) -> dict[str, Any]:
    timeouts = {**dict(first.get("timeouts", {})), **fault.timeouts}
    found = {"openai": {**first, **fault.settings, **({"timeouts": timeouts} if timeouts else {})}}
    names = ["openai"]
    if second is not None:
        names.append("azure")
        base_url = f"http://127.0.0.1:{second.port}/v1"
        found["azure"] = {"kind": "openai", "base_url": base_url, "api_keys": ["sk-azure"]}
    return {
        "upstreams": found,
        "models": {"art": {"upstreams": names, "model": MODEL}},
        "teams": {"growth": {"budget": {"day": 1000}}},
    }


def books_of(gateway: GatewayUnderTest) -> Books:
    books = Books.read(gateway.config.parent / "data" / "gateway.db")
    books.check()
    assert books.open == []
    assert books.pending == 0
    return books


def counted(metrics: Mapping[str, float], kinds: tuple[str, ...]) -> float:
    """How many failures of the first upstream are of these kinds; there are no others."""
    name = "gateway_upstream_errors_total"
    found = {key: value for key, value in metrics.items() if key.startswith(name) and value}
    wanted = {f'{name}{{class="{kind}",upstream="openai"}}' for kind in kinds}
    assert found.keys() <= wanted, found
    return sum(found.values())


FAULTS = _faults()
IDS = [f"{fault.row} {fault.name}" for fault in FAULTS]


@pytest.fixture(autouse=True)
def small_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer may have 4 MiB in place of 256."""
    options = partial(AccountOptions, max_response_bytes=4 * MIB)
    monkeypatch.setattr(assembly, "AccountOptions", options)


@pytest.mark.parametrize("fault", FAULTS, ids=IDS)
async def test_a_fault_of_the_only_upstream(
    tmp_path: Path, sandbox: Any, clock: TestClock, fault: Fault
) -> None:
    async with fault.place(tmp_path) as (first, server):
        changes = upstreams(first, None, fault)
        async with run_gateway(tmp_path, sandbox, changes, clock) as gateway:
            said = await ask(gateway, fault.form)
            [(receipt, _)] = await gateway.told.until(1)
            assert receipt.status == fault.status
            assert said.error["code"] == fault.code
            assert said.partials == (fault.partials or 0)
            assert said.headers["x-request-id"] == receipt.rid
            if fault.partials is None:
                assert said.status == fault.status
                assert said.headers.get("x-should-retry") == fault.retry
                assert said.headers.get("retry-after") == fault.wait
            else:
                assert said.status == 200
            if fault.body is not None:
                assert {"error": said.error} == fault.body

            books = books_of(gateway)
            [hold] = books.holds.values()
            assert (hold.rid, hold.state) == (receipt.rid, fault.state)
            if fault.state == "V":
                assert receipt.cost == books.spent == 0
                assert await gateway.usage() == []
            else:
                cost = hold.bound if fault.cost is None else fault.cost
                assert hold.cost == receipt.cost == books.spent == cost > 0
                [row] = await gateway.usage()
                assert (row.requests, row.images) == (1, 0)
                assert row.unresolved == (fault.state == "X")
                assert row.flagged == (fault.state == "P" and fault.cost is None)
            assert counted(await gateway.metrics(), fault.kinds) == fault.tries
            if server is not None:
                assert server.accepted == fault.tries

            if fault.state != "V" and fault.code in (UNKNOWN, BROKEN):
                assert receipt.rid in said.error["message"]
                assert re.search("not retried for you|may buy it twice", said.error["message"])
                async with gateway.http() as http:
                    later = await http.get(f"/images/results/{receipt.rid}")
                assert later.status_code == fault.status
                assert later.json()["error"]["code"] == fault.code
                assert later.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("fault", FAULTS, ids=IDS)
async def test_a_fault_where_there_is_another_upstream(
    tmp_path: Path, sandbox: Any, clock: TestClock, fault: Fault
) -> None:
    """It is asked only where the first one surely made nothing, and then it is what is paid."""
    async with raw_server(cuts.good) as other, fault.place(tmp_path) as (first, server):
        changes = upstreams(first, other, fault)
        async with run_gateway(tmp_path, sandbox, changes, clock) as gateway:
            said = await ask(gateway, fault.form)
            [(receipt, _)] = await gateway.told.until(1)
            books = books_of(gateway)
            [hold] = books.holds.values()
            assert hold.rid == receipt.rid
            assert counted(await gateway.metrics(), fault.kinds) == 1
            if server is not None:
                assert server.accepted == 1
            if fault.moves:
                assert said.status == 200
                assert said.headers["x-gateway-upstream"] == "azure"
                assert said.headers["x-gateway-attempts"] == "2"
                assert other.accepted == 1
                assert (hold.state, hold.cost) == ("P", cuts.COST)
            else:
                assert other.accepted == 0
                assert (receipt.status, said.error["code"]) == (fault.status, fault.code)
                assert hold.state == fault.state
