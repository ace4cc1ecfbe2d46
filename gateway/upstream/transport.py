"""The way out: our own HTTP/1.1 client, and httpx's where a forward proxy stands between.

The only file that imports httpx. httpx's own pool scans every connection on every request
(performance.md) and dies of cancelled requests (encode/httpcore#1093); ours costs the same at any
size and gives every slot back.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import httpx

from gateway.ports import Lent, LentFile, Take, Whole
from gateway.upstream.connection import READ_BYTES, Connection, SocketExchange, encode_head
from gateway.upstream.deadlines import Deadlines
from gateway.upstream.patience import Patience
from gateway.upstream.pool import Pool
from gateway.upstream.resolution import ForbiddenError, Resolution
from gateway.upstream.wire import (
    Exchange,
    Lost,
    NotSent,
    Origin,
    Reason,
    Timeouts,
    WireError,
    WireRequest,
)

MAX_RESPONSE_BYTES = 256 * 1024 * 1024
MAX_CONNECTIONS = 10_000
LOOK_AGAIN_SECONDS = 0.001
"""A connection that was fresh so short a time ago is not looked at again."""
IDLE_SECONDS = 4.0
"""Below the 5 s after which common servers close an idle connection."""


def tls_context(ca_file: str | None = None) -> ssl.SSLContext:
    """Verifies certificates and names, offers HTTP/1.1 only. Raises ``OSError`` for the file.

    Trusts ``ca_file`` instead of the usual authorities where it is given.
    """
    if ca_file is None:
        context = httpx.create_ssl_context()
    else:
        context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["http/1.1"])
    return context


class _Home(NamedTuple):
    """The pool of an origin, and what its connections and exchanges call in the end: bound once,
    and not for each, where it took 300 bytes for as long as a picture takes."""

    pool: Pool
    give: Callable[[Connection | None], None]
    on_closed: Callable[[Connection], None]


class SocketTransport(httpx.AsyncBaseTransport):
    """Keep-alive connections per origin over asyncio. A ``Wire``, and an httpx transport.

    Never follows a redirect, never retries, never decodes. A connection is used again only after
    an answer that came whole, to a request that was sent whole.
    """

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None = None,
        max_connections: int = MAX_CONNECTIONS,
        idle_seconds: float = IDLE_SECONDS,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        timeouts: Timeouts | None = None,
        waited: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """``max_connections`` is for each origin. ``timeouts`` are for requests of httpx that
        bring none. Without ``tls`` the default context is made at the first need. ``waited`` hears
        of each request how many seconds it waited for a free connection, in vain too."""
        self._tls = tls
        self._max_connections = max_connections
        self._idle_seconds = idle_seconds
        self._max_response_bytes = max_response_bytes
        self._timeouts = timeouts if timeouts is not None else Timeouts()
        self._waited = waited
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._resolution = Resolution()
        self._homes: dict[Origin, _Home] = {}
        self._connections: set[Connection] = set()
        self._deadlines = Deadlines()
        self._closed = False
        self._emptied = asyncio.Event()

    async def exchange(self, request: WireRequest) -> Exchange:
        """As the port says. On cancellation the connection is closed and its slot is free."""
        if self._closed:
            raise NotSent(Reason.CONNECT, "the gateway is shutting down")
        head = request.head or encode_head(request)
        timeouts = request.timeouts
        loop = asyncio.get_running_loop()
        began = loop.time()
        total_at = began + timeouts.total
        home = self._homes.get(request.origin) or self._home(request.origin)
        pool = home.pool
        try:
            connection = await pool.take(min(timeouts.pool, timeouts.total))
        finally:
            self._waited(loop.time() - began)
        exchange: SocketExchange | None = None
        try:
            if connection is None:
                connection = await self._connect(request.origin, home, timeouts.connect, total_at)
            first: bytes | Lent = b""
            rest = request.body
            if isinstance(rest, Whole) and not connection.closed:
                first, rest = rest.take(), None
            elif rest is not None:
                taken_at = loop.time()
                first = await anext(rest, b"")
                if isinstance(first, LentFile) and not connection.may_send_file(first):
                    await first.fetch()  # what cannot be read is not begun to be sent
                # A body in memory is here at once: a second look at the socket says nothing new.
                waited = loop.time() - taken_at > LOOK_AGAIN_SECONDS
                if connection.closed or (waited and not connection.is_fresh()):
                    connection.abort()  # gone while the body was fetched; nothing is sent
                    connection = await self._connect(
                        request.origin, home, timeouts.connect, total_at
                    )
            exchange = SocketExchange(
                connection,
                home.give,
                max(self._max_response_bytes, request.max_response_bytes),
                self._deadlines,
                loop.time() + timeouts.first_byte,
                total_at,
            )
            await exchange.send(head, first, rest, request.length, timeouts.write)
            head = first = b""  # sent: not to be kept while the picture is painted
            rest = None
            del request
            while (news := exchange.news()) is not None:
                await news
        except BaseException as error:
            if exchange is not None:
                exchange.close()
            else:
                if connection is not None:
                    connection.abort()
                pool.give(None)
            if exchange is None or isinstance(error, WireError) or not isinstance(error, Exception):
                raise
            raise Lost(Reason.WRITE, "the request's body could not be read") from error
        return exchange

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """httpx's way in. Its ``read`` time-out bounds the wait for the headers; ``total``, a key
        of our own beside it in ``extensions``, the whole call. None means no own bound: the
        transport's applies.

        Raises ``ConnectError``, ``ConnectTimeout`` or ``PoolTimeout`` when nothing was written,
        another ``TransportError`` afterwards.
        """
        if request.url.scheme not in ("http", "https"):
            raise httpx.UnsupportedProtocol("only http and https", request=request)
        stream = request.stream
        length = int(request.headers.get("content-length", "0"))
        if "transfer-encoding" in request.headers or request.method in ("HEAD", "CONNECT"):
            raise httpx.LocalProtocolError(
                "the body needs a Content-Length; HEAD and CONNECT are not spoken",
                request=request,
            )
        assert isinstance(stream, httpx.AsyncByteStream), "an asynchronous request"
        wire_request = WireRequest(
            method=request.method,
            origin=_origin(request.url),
            target=request.url.raw_path.decode("ascii"),
            headers=tuple(
                (name.decode("latin-1"), value.decode("latin-1"))
                for name, value in request.headers.raw
            ),
            body=aiter(stream) if length else None,
            length=length,
            timeouts=self._from_httpx(request.extensions.get("timeout", {})),
        )
        try:
            exchange = await self.exchange(wire_request)
        except WireError as error:
            raise _to_httpx(error, request) from error
        except ValueError as error:
            raise httpx.LocalProtocolError(str(error), request=request) from error
        return httpx.Response(
            exchange.status,
            headers=exchange.headers,
            stream=_ResponseStream(exchange, request),
            extensions={"http_version": b"HTTP/1.1"},
        )

    async def aclose(self) -> None:
        """Closes every connection, also those in use: their exchanges are lost."""
        self._closed = True
        for connection in list(self._connections):
            if connection.exchange is not None:
                connection.exchange.close()
            connection.abort()
        self._deadlines.close()
        for home in self._homes.values():
            home.pool.close()
        if self._connections:  # each is closed by the loop, a turn or two later
            self._emptied.clear()
            await self._emptied.wait()

    def _home(self, origin: Origin) -> _Home:
        home = self._homes.get(origin)
        if home is None:
            pool = Pool(self._max_connections, self._idle_seconds)
            home = self._homes[origin] = _Home(pool, pool.give, partial(self._on_closed, pool))
        return home

    async def _connect(
        self, origin: Origin, home: _Home, seconds: float, total_at: float
    ) -> Connection:
        """A new connection, in a slot the caller owns. Raises ``NotSent``."""
        left = total_at - asyncio.get_running_loop().time()
        connection = Connection(self._buffer, home.on_closed)
        try:
            async with Patience(min(seconds, left), lambda: connection.is_made):
                addresses = await self._resolution.addresses(origin.host, origin.port)
                await self._reach(addresses, origin, connection)
        except BaseException as error:
            self._resolution.forget(origin.host)
            connection.abort()
            failure = _connect_failure(error)
            if failure is None:
                raise
            raise failure from error
        if connection.closed or self._closed:
            connection.abort()
            raise NotSent(Reason.CONNECT, "the connection was closed at once")
        self._connections.add(connection)
        return connection

    def _on_closed(self, pool: Pool, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._emptied.set()
        pool.forget(connection)

    async def _reach(
        self, addresses: Sequence[str], origin: Origin, connection: Connection
    ) -> None:
        """Connects to the first address where somebody is. Raises ``OSError`` of the last."""
        if origin.tls and self._tls is None:
            self._tls = tls_context()
        for left in range(len(addresses), 0, -1):
            try:
                await asyncio.get_running_loop().create_connection(
                    lambda: connection,
                    addresses[-left],
                    origin.port,
                    ssl=self._tls if origin.tls else None,
                    server_hostname=origin.host if origin.tls else None,
                )
                return
            except OSError as error:
                # Who answers is taken at its word: a certificate that is wrong stays wrong.
                if left == 1 or connection.is_made or isinstance(error, ssl.SSLError):
                    raise

    def _from_httpx(self, given: dict[str, float | None]) -> Timeouts:
        def seconds(key: str, default: float) -> float:
            value = given.get(key)
            return default if value is None else value

        own = self._timeouts
        return Timeouts(
            pool=seconds("pool", own.pool),
            connect=seconds("connect", own.connect),
            write=seconds("write", own.write),
            first_byte=seconds("read", own.first_byte),
            total=seconds("total", own.total),
        )


class HttpxWire:
    """Any httpx transport as a ``Wire``: for a forward proxy, and for httpx's mocks in tests.

    What httpx raises before it writes is ``NotSent``; a deadline that ends while it may have
    written is ``Lost``.
    """

    def __init__(
        self, transport: httpx.AsyncBaseTransport, max_response_bytes: int = MAX_RESPONSE_BYTES
    ) -> None:
        self._transport = transport
        self._max_response_bytes = max_response_bytes

    async def exchange(self, request: WireRequest) -> Exchange:
        if not request.head:
            encode_head(request)  # for its checks
        timeouts = request.timeouts
        origin = request.origin
        now = asyncio.get_running_loop().time()
        body = request.body
        asked = httpx.Request(
            request.method,
            httpx.URL(
                scheme="https" if origin.tls else "http",
                host=origin.host,
                port=origin.port,
                raw_path=request.target.encode("ascii"),
            ),
            headers=list(request.headers),
            stream=_RequestStream(body) if body is not None else httpx.ByteStream(b""),
            extensions={
                "timeout": {
                    "pool": timeouts.pool,
                    "connect": timeouts.connect,
                    "write": timeouts.write,
                    "read": timeouts.first_byte,
                }
            },
        )
        try:
            async with asyncio.timeout_at(now + min(timeouts.first_byte, timeouts.total)):
                response = await self._transport.handle_async_request(asked)
        except TimeoutError as error:
            raise Lost(Reason.READ_TIMEOUT, "no answer came in time") from error
        except httpx.TransportError as error:
            raise _from_httpx_error(error) from error
        most = max(self._max_response_bytes, request.max_response_bytes)
        return HttpxExchange(response, now + timeouts.total, most)

    async def aclose(self) -> None:
        await self._transport.aclose()


class HttpxExchange:
    """An answer of an httpx transport: the port ``Exchange``."""

    def __init__(self, response: httpx.Response, total_at: float, max_body_bytes: int) -> None:
        assert isinstance(response.stream, httpx.AsyncByteStream), "an asynchronous answer"
        self._stream = response.stream
        self._pieces = aiter(response.stream)
        self._total_at = total_at
        self._left = max_body_bytes
        self._closed = False
        self.status = response.status_code
        self.headers = [(name.lower(), value) for name, value in response.headers.raw]

    async def read(self, take: Take | None = None) -> bytes:
        try:
            async with asyncio.timeout_at(self._total_at):
                piece = b""
                while not piece:  # a transport may yield empty pieces; here they mean the end
                    piece = await anext(self._pieces)
        except StopAsyncIteration:
            return b""
        except TimeoutError as error:
            raise Lost(Reason.BODY_TIMEOUT, "the answer was not whole in time") from error
        except httpx.ReadTimeout as error:
            raise Lost(Reason.BODY_TIMEOUT, "the answer stopped coming") from error
        except httpx.TransportError as error:
            raise Lost(Reason.TRUNCATED, "the connection ended before the answer did") from error
        self._left -= len(piece)
        if self._left < 0:
            raise Lost(Reason.TOO_LARGE, "the answer is too large")
        return piece

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            with suppress(httpx.TransportError):
                await self._stream.aclose()


def proxy_wire(
    proxy: str,
    *,
    ca_file: str | None = None,
    max_connections: int = MAX_CONNECTIONS,
    idle_seconds: float = IDLE_SECONDS,
    max_response_bytes: int = MAX_RESPONSE_BYTES,
) -> HttpxWire:
    """httpx's own transport, through a forward proxy (``http://[user:password@]host:port``)."""
    limits = httpx.Limits(
        max_connections=max_connections,
        max_keepalive_connections=max_connections,
        keepalive_expiry=idle_seconds,
    )
    transport = httpx.AsyncHTTPTransport(
        verify=tls_context(ca_file), trust_env=False, limits=limits, proxy=proxy
    )
    return HttpxWire(transport, max_response_bytes)


class _RequestStream(httpx.AsyncByteStream):
    def __init__(self, body: AsyncIterator[bytes | Lent]) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._body:
            if isinstance(piece, LentFile):
                await piece.fetch()
            yield bytes(piece)


class _ResponseStream(httpx.AsyncByteStream):
    def __init__(self, exchange: Exchange, request: httpx.Request) -> None:
        self._exchange = exchange
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while chunk := await self._exchange.read():
                yield chunk
        except WireError as error:
            raise _to_httpx(error, self._request) from error

    async def aclose(self) -> None:
        await self._exchange.aclose()


def _origin(url: httpx.URL) -> Origin:
    tls = url.scheme == "https"
    return Origin(tls, url.raw_host.decode("ascii"), url.port or (443 if tls else 80))


def _connect_failure(error: BaseException) -> NotSent | None:
    """What went wrong before there was a connection; None for what is not ours to map."""
    if isinstance(error, ForbiddenError):
        return NotSent(
            Reason.CONNECT, "its name leads to a link-local address or a cloud's metadata service"
        )
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return NotSent(Reason.DNS, "the name cannot be resolved")
    if isinstance(error, TimeoutError):  # ours, or the kernel's
        return NotSent(Reason.CONNECT_TIMEOUT, "no connection in time")
    if isinstance(error, ssl.SSLError):  # CertificateError is one
        return NotSent(Reason.TLS, "the TLS handshake failed")
    if isinstance(error, ConnectionRefusedError):
        return NotSent(Reason.CONNECT, "connection refused")
    if isinstance(error, OSError):
        return NotSent(Reason.CONNECT, "no connection")
    return None


def _to_httpx(error: WireError, request: httpx.Request) -> httpx.TransportError:
    kinds: dict[Reason, type[httpx.TransportError]] = {
        Reason.DNS: httpx.ConnectError,
        Reason.CONNECT: httpx.ConnectError,
        Reason.CONNECT_TIMEOUT: httpx.ConnectTimeout,
        Reason.TLS: httpx.ConnectError,
        Reason.POOL: httpx.PoolTimeout,
        Reason.WRITE: httpx.WriteError,
        Reason.WRITE_TIMEOUT: httpx.WriteTimeout,
        Reason.READ_TIMEOUT: httpx.ReadTimeout,
        Reason.BODY_TIMEOUT: httpx.ReadTimeout,
    }
    kind = kinds.get(error.reason, httpx.RemoteProtocolError)
    if kind is httpx.RemoteProtocolError and isinstance(error.__cause__, OSError):
        kind = httpx.ReadError
    return kind(str(error), request=request)


def _from_httpx_error(error: httpx.TransportError) -> WireError:
    match error:
        case httpx.PoolTimeout():
            return NotSent(Reason.POOL, "every connection is busy")
        case httpx.ConnectTimeout():
            return NotSent(Reason.CONNECT_TIMEOUT, "no connection in time")
        case httpx.ProxyError():
            return NotSent(Reason.CONNECT, "the forward proxy refused")
        case httpx.ConnectError():
            return _connect_failure(_root(error)) or NotSent(Reason.CONNECT, "no connection")
        case httpx.UnsupportedProtocol():
            return NotSent(Reason.CONNECT, "no connection")
        case httpx.WriteTimeout():
            return Lost(Reason.WRITE_TIMEOUT, "the upstream stopped taking the request")
        case httpx.WriteError() | httpx.LocalProtocolError():
            return Lost(Reason.WRITE, "the connection broke while the request was sent")
        case httpx.ReadTimeout():
            return Lost(Reason.READ_TIMEOUT, "no answer came in time")
        case _:
            return Lost(Reason.DISCONNECT, "the connection ended before an answer came")


def _root(error: BaseException) -> BaseException:
    """The first exception of a chain: httpcore hides the socket's own under two of its own."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return error
