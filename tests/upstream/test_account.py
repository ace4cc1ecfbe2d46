"""The configured upstream: its keys, and what its failures become."""

from __future__ import annotations

import asyncio
import gzip
import re
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import httpx
import pytest
import trustme

from gateway.domain.errors import (
    Evidence,
    GatewayError,
    Overloaded,
    UpstreamBroken,
    UpstreamUnavailable,
    UpstreamUnknown,
)
from gateway.ports import Credential, Outgoing, Reply, Upstream
from gateway.upstream.account import (
    Account,
    AccountKey,
    AccountNews,
    AccountOptions,
    build_account,
    split_base_url,
)
from gateway.upstream.transport import HttpxWire
from gateway.upstream.wire import Origin, Timeouts
from tests.upstream.calls import QUICK, pieces, until
from tests.upstream.raw_server import Peer, hello, raw_server

KEY = "sk-upstream-0123456789"


@dataclass(frozen=True)
class Hidden:
    value: str

    def reveal(self) -> str:
        return self.value


def account(
    port: int, *, scheme: str = "http", timeouts: Timeouts = QUICK, **options: Any
) -> Account:
    host = "localhost" if scheme == "https" else "127.0.0.1"
    base_url = f"{scheme}://{host}:{port}/v1/"
    chosen: dict[str, Any] = {"keys": (AccountKey(Hidden(KEY)),), "timeouts": timeouts} | options
    return build_account(AccountOptions("openai", base_url, **chosen))


def outgoing(body: bytes = b"{}") -> Outgoing:
    headers = (("content-type", "application/json"),)
    return Outgoing("POST", "/images/generations", headers, pieces([body]), len(body))


async def whole(reply: Reply) -> bytes:
    return b"".join([chunk async for chunk in reply.chunks()])


def answering(
    answer: bytes | None, then: Callable[[Peer], Awaitable[None]] | None = None
) -> Callable[[Peer], Awaitable[None]]:
    async def script(peer: Peer) -> None:
        await peer.request()
        if answer is not None:
            await peer.send(answer)
        if then is not None:
            await then(peer)

    return script


def check(error: GatewayError, port: int) -> None:
    """No text that a client reads names the address or the key."""
    text = error.content.decode()
    for secret in (KEY, "localhost", "127.0.0.1", "::1", str(port), "Errno"):
        assert secret not in text


async def failing(port: int, **options: Any) -> GatewayError:
    """The error of one call, in sending or in reading."""
    used = account(port, **options)
    with pytest.raises(GatewayError) as caught:
        await whole(await used.send(outgoing(), "1"))
    await used.aclose()
    check(caught.value, port)
    return caught.value


async def test_what_is_sent_and_what_comes_back() -> None:
    heads: list[bytes] = []

    async def script(peer: Peer) -> None:
        while True:
            head, _ = await peer.request()
            heads.append(head)
            await peer.reply(b"hello", "X-Many: 1", "x-many: 2", "Content-Type: text/plain")

    async with raw_server(script) as server:
        used: Upstream = account(
            server.port,
            keys=(AccountKey(Hidden("k1")), AccountKey(Hidden("k2"), 1, 3)),
            headers={"OpenAI-Project": "p"},
        )
        assert (used.name, used.provider, used.ready) == ("openai", "openai", True)
        assert list(used.credentials) == [Credential("1"), Credential("2", 1, 3)]
        for credential in ("1", "2", "gone"):
            reply = await used.send(outgoing(), credential)
            assert reply.status == 200
            assert reply.headers == {
                "content-length": "5",
                "x-many": "1, 2",
                "content-type": "text/plain",
            }
            assert await whole(reply) == b"hello"
            await reply.aclose()
        await used.aclose()
        assert server.accepted == 1
    assert heads[0] == (
        b"POST /v1/images/generations HTTP/1.1\r\n"
        b"host: 127.0.0.1:%d\r\naccept-encoding: identity\r\nopenai-project: p\r\n"
        b"content-type: application/json\r\nauthorization: Bearer k1\r\n"
        b"content-length: 2\r\n\r\n" % server.port
    )
    assert [b"Bearer k1" in head for head in heads] == [True, False, True]


async def test_an_account_without_a_key_is_off() -> None:
    async with raw_server(hello) as server:
        off = account(server.port, keys=())
        assert not off.ready
        assert off.credentials == ()
        with pytest.raises(UpstreamUnavailable):
            await off.send(outgoing(), "1")
        sandbox = account(server.port, keys=(), kind="sandbox")
        assert sandbox.ready
        assert sandbox.credentials == (Credential("-"),)
        assert await whole(await sandbox.send(outgoing(), "1")) == b"hello"
        assert server.accepted == 1
        await off.aclose()
        await sandbox.aclose()


async def test_what_it_was_sent_is_taken_out_of_what_it_says() -> None:
    made = account(
        9,
        keys=(AccountKey(Hidden("first-key-0123456789")), AccountKey(Hidden("other-key-0123456"))),
        headers={"x-secret": "secret-header-1", "x-word": "image"},
    )
    said = b"no: first-key-0123456789, other-key-0123456, secret-header-1, image"
    assert made.masked(said) == b"no: ***, ***, ***, image"
    assert made.address == ("127.0.0.1", 9)
    await made.aclose()


async def test_what_is_too_short_for_a_secret_breaks_no_answer() -> None:
    short = [AccountKey(Hidden(key)) for key in ("1", "x", "none", "EMPTY", "eleven-char")]
    made = account(9, keys=short, headers={"x-word": "limit"})
    said = b'{"error":{"limit":10,"code":"none","param":"x-eleven-char EMPTY"}}'
    assert made.masked(said) == said
    await made.aclose()


async def test_a_token_is_taken_out_without_its_scheme_too() -> None:
    made = account(9, headers={"x-forward": "Bearer token-0123456789"})
    said = b"not Bearer token-0123456789, not token-0123456789; a Bearer"
    assert made.masked(said) == b"not ***, not ***; a Bearer"
    await made.aclose()


async def test_a_key_within_another_leaves_no_rest() -> None:
    made = account(
        9,
        keys=(
            AccountKey(Hidden("sk-0123456789")),
            AccountKey(Hidden("sk-0123456789-longer")),
        ),
    )
    assert made.masked(b"sk-0123456789-longer, sk-0123456789") == b"***, ***"
    await made.aclose()


async def test_a_key_that_was_replaced_is_still_taken_out() -> None:
    made = account(9, keys=(AccountKey(Hidden("first-key-0123456789")),))
    for number in range(3):
        made.replace_keys([AccountKey(Hidden(f"later-key-{number}-123456"))])
    said = b"first-key-0123456789 later-key-0-123456 later-key-2-123456"
    assert made.masked(said) == b"*** *** ***"
    await made.aclose()


async def test_new_keys_are_for_the_next_call() -> None:
    heads: list[bytes] = []
    sent, going = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        while True:
            head, _ = await peer.request()
            heads.append(head)
            sent.set()
            await going.wait()
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")

    async with raw_server(script) as server:
        used = account(server.port, keys=(AccountKey(Hidden("k1")), AccountKey(Hidden("k2"))))
        first = asyncio.create_task(used.send(outgoing(), "1"))
        await sent.wait()
        used.replace_keys((AccountKey(Hidden("k3")),))
        going.set()
        assert await whole(await first) == b"hello"
        for _ in range(2):
            assert await whole(await used.send(outgoing(), "1")) == b"hello"
        used.replace_keys(())
        assert not used.ready
        await used.aclose()
    assert [head.partition(b"Bearer ")[2][:2] for head in heads] == [b"k1", b"k3", b"k3"]


async def test_a_key_keeps_its_name_and_a_new_one_gets_a_new_one() -> None:
    one, two, three = (AccountKey(Hidden(key)) for key in ("k1", "k2", "k3"))
    used = account(1, keys=(one, two))
    used.replace_keys((three, replace(two, weight=5)))
    assert list(used.credentials) == [Credential("3"), Credential("2", weight=5)]
    used.replace_keys((one,))
    assert list(used.credentials) == [Credential("4")]
    await used.aclose()


async def test_an_account_that_replaces_another_goes_on_with_its_numbers() -> None:
    numbers = count(1)
    keys = (AccountKey(Hidden("k1")), AccountKey(Hidden("k2")))
    before, after = (account(port, keys=keys, numbers=numbers) for port in (1, 2))
    assert [one.id for one in before.credentials] == ["1", "2"]
    assert [one.id for one in after.credentials] == ["3", "4"]
    before.replace_keys((AccountKey(Hidden("k3")),))
    assert [one.id for one in before.credentials] == ["5"]
    for one in (before, after):
        await one.aclose()


async def test_an_unread_reply_drops_its_connection() -> None:
    left = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello")
        await peer.gone()
        left.set()

    async with raw_server(script) as server:
        used = account(server.port)
        reply = await used.send(outgoing(), "1")
        await reply.aclose()
        await left.wait()
        await used.aclose()


async def test_nothing_was_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    error = await failing(port)
    assert isinstance(error, UpstreamUnavailable)
    assert error.message == (
        "The upstream openai cannot be reached (connection refused). Nothing was bought; try again."
    )
    assert (error.status, error.reason, error.retry_after_seconds) == (503, "connect", 5)
    assert error.evidence is Evidence.NOT_BILLED


async def test_a_name_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(*args: object, **kwargs: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", unknown)
    assert (await failing(9, scheme="https")).reason == "dns"


async def test_tls_that_cannot_be_trusted() -> None:
    async def script(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with raw_server(script) as server:
        error = await failing(server.port, scheme="https")
    assert isinstance(error, UpstreamUnavailable)
    assert (error.status, error.code, error.reason) == (502, "upstream_tls", "tls")
    assert error.should_retry is False


async def test_an_authority_of_ones_own() -> None:
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    with authority.cert_pem.tempfile() as ca_file:
        async with raw_server(hello, tls=tls) as server:
            used = account(server.port, scheme="https", ca_file=ca_file)
            assert await whole(await used.send(outgoing(), "1")) == b"hello"
            await used.aclose()


async def test_every_connection_is_busy() -> None:
    async with raw_server(answering(None, Peer.gone)) as server:
        used = account(server.port, max_connections=1, timeouts=replace(QUICK, pool=0.02))
        running = asyncio.create_task(used.send(outgoing(), "1"))
        await until(lambda: server.accepted == 1)
        with pytest.raises(Overloaded) as caught:
            await used.send(outgoing(), "1")
        assert (caught.value.status, caught.value.reason) == (503, "pool")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await used.aclose()


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        (b"", 502, "disconnect"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", 502, "disconnect"),
        (b"\x15\x03\x01\x00\x02\x02\x16", 502, "protocol"),
        (None, 504, "read_timeout"),
    ],
    ids=["closed", "interim, closed", "TLS", "silent"],
)
async def test_the_outcome_is_unknown(answer: bytes | None, status: int, reason: str) -> None:
    async with raw_server(answering(answer, Peer.gone if answer is None else None)) as server:
        error = await failing(server.port, timeouts=replace(QUICK, first_byte=0.05))
    assert isinstance(error, UpstreamUnknown)
    assert (error.status, error.reason) == (status, reason)
    assert error.code == "upstream_outcome_unknown"
    assert error.should_retry is False
    assert error.evidence is Evidence.UNKNOWN
    assert "money may have been spent" in error.message


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
CUT = gzip.compress(b"cut", mtime=0)[:-9]
BOMB = gzip.compress(bytes(50_000_000), mtime=0)


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        (HEAD + b"content-length: 10\r\n\r\nshort", 502, "truncated"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nshort\r\n", 502, "truncated"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nno\r\n", 502, "protocol"),
        (HEAD + b"content-length: 2000000\r\n\r\n", 502, "too_large"),
        (HEAD + b"content-encoding: br\r\ncontent-length: 2\r\n\r\nxx", 502, "encoding"),
        (HEAD + b"content-encoding: gzip, gzip\r\n\r\nxx", 502, "encoding"),
        (HEAD + b"content-encoding: gzip\r\n\r\nnot gzip", 502, "encoding"),
        (HEAD + b"content-encoding: gzip\r\n\r\n" + CUT, 502, "truncated"),
        (HEAD + b"content-encoding: gzip\r\n\r\n" + BOMB, 502, "too_large"),
        (None, 504, "body_timeout"),
    ],
    ids=[
        "sized",
        "chunked",
        "bad chunk",
        "announced too large",
        "brotli",
        "gzip twice",
        "not gzip",
        "gzip cut",
        "gzip bomb",
        "late",
    ],
)
async def test_an_answer_that_breaks(answer: bytes | None, status: int, reason: str) -> None:
    sent = HEAD + b"content-length: 10\r\n\r\n" if answer is None else answer
    async with raw_server(answering(sent, Peer.gone if answer is None else None)) as server:
        timeouts = replace(QUICK, total=0.05) if answer is None else QUICK
        error = await failing(server.port, timeouts=timeouts, max_response_bytes=1_000_000)
    assert isinstance(error, UpstreamBroken)
    assert (error.status, error.reason) == (status, reason)
    assert error.code == "upstream_bad_response"
    assert error.should_retry is False
    assert error.evidence is Evidence.BILLED


@pytest.mark.parametrize("proxied", [False, True])
async def test_a_file_may_be_larger_than_a_picture(proxied: bool) -> None:
    answer = HEAD + b"content-length: 2000\r\n\r\n" + b"x" * 2000
    async with raw_server(answering(answer)) as server:
        proxy = f"http://127.0.0.1:{server.port}" if proxied else None
        used = account(server.port, max_response_bytes=1000, proxy=proxy)
        sent = replace(outgoing(), max_response_bytes=2000)
        assert await whole(await used.send(sent, "1")) == b"x" * 2000
        with pytest.raises(UpstreamBroken) as broken:
            await whole(await used.send(outgoing(), "1"))
        assert broken.value.reason == "too_large"
        await used.aclose()


_raw = zlib.compressobj(wbits=-15)
RAW_DEFLATE = _raw.compress(b"a picture" * 1000) + _raw.flush()


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(b"a picture" * 1000)),
        ("GZIP", gzip.compress(b"a picture" * 400) + gzip.compress(b"a picture" * 600) + b"\0\0"),
        ("deflate", zlib.compress(b"a picture" * 1000)),
        ("deflate", RAW_DEFLATE),
        ("identity", b"a picture" * 1000),
    ],
    ids=["gzip", "two members", "zlib", "raw deflate", "identity"],
)
@pytest.mark.parametrize("step", [5, 1_000_000])
async def test_encodings_are_undone(encoding: str, body: bytes, step: int) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(
            HEAD
            + f"content-encoding: {encoding}\r\n".encode()
            + b"transfer-encoding: chunked\r\n\r\n"
        )
        for start in range(0, len(body), step):
            piece = body[start : start + step]
            await peer.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        await peer.send(b"0\r\n\r\n")

    async with raw_server(script) as server:
        used = account(server.port)
        reply = await used.send(outgoing(), "1")
        assert "content-encoding" not in reply.headers
        assert await whole(reply) == b"a picture" * 1000
        await used.aclose()


async def test_bytes_are_counted_as_they_go_and_come() -> None:
    """Of bodies, as they are on the wire; of an answer that breaks, what came."""
    packed = gzip.compress(b"a picture" * 1000)
    length = len(packed) + 10
    head = HEAD + f"content-encoding: gzip\r\ncontent-length: {length}\r\n\r\n".encode()
    sent, received = list[int](), list[int]()
    async with raw_server(answering(head + packed)) as server:
        used = account(server.port, news=AccountNews(sent=sent.append, received=received.append))
        ask = replace(outgoing(), body=pieces([b"{", b"a" * 500, b"}"]), length=502)
        reply = await used.send(ask, "1")
        assert (sent, sum(received)) == ([1, 500, 1], 0)
        with pytest.raises(UpstreamBroken):
            await whole(reply)
        assert sum(received) == len(packed)
        await used.aclose()


async def test_an_encoded_answer_without_a_body() -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 0\r\n\r\n"
    async with raw_server(answering(answer)) as server:
        used = account(server.port)
        assert await whole(await used.send(outgoing(), "1")) == b""
        await used.aclose()


async def test_a_cancelled_reader_closes_the_socket() -> None:
    left = asyncio.Event()

    async def stay(peer: Peer) -> None:
        await peer.gone()
        left.set()

    async with raw_server(answering(HEAD + b"content-length: 10\r\n\r\nhello", stay)) as server:
        used = account(server.port)
        reply = await used.send(outgoing(), "1")
        chunks = reply.chunks()
        assert await anext(chunks) == b"hello"
        task = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await left.wait()
        await used.aclose()


# A forward proxy, and httpx's own transports


async def test_a_forward_proxy() -> None:
    seen: list[bytes] = []

    async def proxy(peer: Peer) -> None:
        while True:
            head, body = await peer.request()
            seen.append(head)
            await peer.reply(body)

    async with raw_server(proxy) as server:
        options = AccountOptions(
            "openai",
            "http://upstream.invalid/v1",
            keys=(AccountKey(Hidden(KEY)),),
            timeouts=QUICK,
            proxy=f"http://127.0.0.1:{server.port}",
        )
        used = build_account(options)
        for _ in range(2):
            assert await whole(await used.send(outgoing(b"echo"), "1")) == b"echo"
        await used.aclose()
        assert server.accepted == 1
    head = seen[0].lower()
    assert head.startswith(b"post http://upstream.invalid/v1/images/generations http/1.1\r\n")
    assert b"host: upstream.invalid\r\n" in head
    assert b"content-length: 4\r\n" in head


async def test_a_proxy_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    error = await failing(9, proxy=f"http://127.0.0.1:{port}")
    assert isinstance(error, UpstreamUnavailable)
    assert error.reason == "connect"


async def test_a_proxy_that_refuses_the_tunnel() -> None:
    refusal = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n"

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(refusal)

    async with raw_server(script) as server:
        proxy = f"http://127.0.0.1:{server.port}"
        error = await failing(9, scheme="https", proxy=proxy)
    assert isinstance(error, UpstreamUnavailable)


async def test_a_proxied_answer_that_breaks() -> None:
    answer = HEAD + b"content-length: 10\r\n\r\nshort"
    async with raw_server(answering(answer)) as server:
        error = await failing(9, proxy=f"http://127.0.0.1:{server.port}")
    assert isinstance(error, UpstreamBroken)
    assert error.reason == "truncated"


@pytest.mark.parametrize("sent", [b"", HEAD + b"content-length: 10\r\n\r\n"])
async def test_a_proxied_answer_that_is_late(sent: bytes) -> None:
    async with raw_server(answering(sent, Peer.gone)) as server:
        error = await failing(
            9,
            proxy=f"http://127.0.0.1:{server.port}",
            timeouts=replace(QUICK, first_byte=0.2, total=0.2),
        )
    assert isinstance(error, UpstreamBroken if sent else UpstreamUnknown)
    assert error.status == 504


@pytest.mark.parametrize(
    ("raised", "kind", "reason"),
    [
        (httpx.PoolTimeout, Overloaded, "pool"),
        (httpx.ConnectTimeout, UpstreamUnavailable, "connect_timeout"),
        (httpx.ConnectError, UpstreamUnavailable, "connect"),
        (httpx.UnsupportedProtocol, UpstreamUnavailable, "connect"),
        (httpx.WriteTimeout, UpstreamUnknown, "write_timeout"),
        (httpx.WriteError, UpstreamUnknown, "write"),
        (httpx.ReadTimeout, UpstreamUnknown, "read_timeout"),
        (httpx.ReadError, UpstreamUnknown, "disconnect"),
        (httpx.RemoteProtocolError, UpstreamUnknown, "disconnect"),
    ],
)
async def test_what_httpx_raises(
    raised: type[httpx.TransportError], kind: type[GatewayError], reason: str
) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise raised(f"http://localhost/ {KEY}")

    options = AccountOptions("openai", "http://localhost/v1", keys=(AccountKey(Hidden(KEY)),))
    used = Account(options, HttpxWire(httpx.MockTransport(refuse)))
    with pytest.raises(kind) as caught:
        await used.send(outgoing(), "1")
    assert caught.value.reason == reason
    check(caught.value, 80)


async def test_a_mocked_upstream() -> None:
    class Body(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for piece in (b"he", b"", b"llo"):
                yield piece

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == f"Bearer {KEY}"
        return httpx.Response(201, headers={"X-A": "b"}, stream=Body())

    options = AccountOptions("openai", "https://a.test/v1", keys=(AccountKey(Hidden(KEY)),))
    used = Account(options, HttpxWire(httpx.MockTransport(answer)))
    reply = await used.send(outgoing(), "1")
    assert (reply.status, dict(reply.headers)) == (201, {"x-a": "b"})
    assert await whole(reply) == b"hello"


# Base URLs


def test_base_urls() -> None:
    assert split_base_url("https://api.openai.com/v1/") == (
        Origin(True, "api.openai.com", 443),
        "/v1",
    )
    assert split_base_url("http://[::1]:8000") == (Origin(False, "::1", 8000), "")
    assert split_base_url("https://bücher.example/v1")[0].host == "xn--bcher-kva.example"


@pytest.mark.parametrize(
    "base_url",
    [
        "ftp://a.test",
        "https:///v1",
        "a.test/v1",
        "https://user:pass@a.test/v1",
        "https://a.test/v1?x=1",
        "https://a.test/v1#x",
        "https://a.test:99999/v1",
    ],
)
def test_base_urls_that_are_none(base_url: str) -> None:
    with pytest.raises(ValueError):
        split_base_url(base_url)


async def test_a_key_is_known_again_by_its_mark() -> None:
    """In another process, after a restart, at another place in the list; and it tells nothing."""
    one, two = AccountKey(Hidden("first-key-0123456789")), AccountKey(Hidden("other-key-0123456"))
    marks = []
    for keys, mark_key in (((one, two), b"a"), ((two, one), b"a"), ((one, two), b"b")):
        used = account(9, keys=keys, mark_key=mark_key)
        marks.append([each.mark for each in used.credentials])
        await used.aclose()
    assert marks[0] == marks[1][::-1]
    assert len({*marks[0], *marks[2]}) == 4
    for mark in (*marks[0], *marks[2]):
        assert re.fullmatch("[0-9a-f]{16}", mark)
