"""One configured upstream: its origin, its keys, its deadlines. The port ``Upstream``.

Here a failed exchange becomes an error with an answer: what could not be sent is
``UpstreamUnavailable``, what may have been bought ``UpstreamUnknown``, what was announced and not
delivered ``UpstreamBroken`` (money.md 8.1). No text names the upstream's address or key.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol, TypeAlias
from urllib.parse import urlsplit

from gateway.domain.errors import (
    GatewayError,
    Overloaded,
    UpstreamBroken,
    UpstreamUnavailable,
    UpstreamUnknown,
)
from gateway.domain.header_lists import by_name
from gateway.ports import Credential, Lent, Outgoing, Take, Whole
from gateway.upstream.connection import written_head
from gateway.upstream.inflate import Inflater
from gateway.upstream.transport import (
    IDLE_SECONDS,
    MAX_CONNECTIONS,
    MAX_RESPONSE_BYTES,
    SocketTransport,
    proxy_wire,
    tls_context,
)
from gateway.upstream.wire import (
    Exchange,
    Lost,
    NotSent,
    Origin,
    Reason,
    Timeouts,
    Wire,
    WireRequest,
)

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 5.0
SECRET_CHARS = 12
"""What is shorter is no secret: a header's value may be any word, and a local upstream's key is `x`
or `none`. To take it out of an answer would break the answer."""
MARK_CHARS = 16
MAX_BEGINNINGS = 64
FORMER_KEYS = 64
"""So many keys that are no longer used may still be in an answer."""
Beginning: TypeAlias = tuple[str, tuple[tuple[str, str], ...], bytes]
"""Of requests that are alike but for their length: target, headers, and both as written."""
SANDBOX_KEY = "sk-sandbox"
SANDBOX_CREDENTIAL = Credential("-")


class SecretLike(Protocol):
    """A value that shows itself only when asked."""

    def reveal(self) -> str: ...


@dataclass(frozen=True, slots=True)
class AccountKey:
    """One of its keys: of the lowest ``order`` first, those of one order by ``weight``."""

    secret: SecretLike
    order: int = 0
    weight: int = 1


@dataclass(frozen=True, slots=True)
class AccountNews:
    """Who hears of its traffic: how many seconds each request waited for a free connection (through
    a forward proxy, of none), and the bytes of bodies as they go and come."""

    waited: Callable[[float], None] = lambda seconds: None
    sent: Callable[[int], None] = lambda count: None
    received: Callable[[int], None] = lambda count: None


@dataclass(frozen=True, slots=True)
class AccountOptions:
    """What the configuration says of one upstream.

    ``provider`` is whose price list applies. ``headers`` are added to every request. ``proxy`` is
    a forward proxy's URL, ``ca_file`` a PEM file trusted instead of the usual authorities.
    ``idle_seconds`` is how long an unused connection is kept. ``numbers`` are what its keys are
    called by: an account that replaces another goes on with its. ``mark_key`` is what
    ``Credential.mark`` is made with; without one, keys have no marks.
    """

    name: str
    base_url: str
    provider: str = "openai"
    kind: str = "openai"
    keys: Sequence[AccountKey] = ()
    timeouts: Timeouts = field(default_factory=Timeouts)
    headers: Mapping[str, str] = field(default_factory=dict)
    proxy: str | None = None
    ca_file: str | None = None
    max_connections: int = MAX_CONNECTIONS
    idle_seconds: float = IDLE_SECONDS
    max_response_bytes: int = MAX_RESPONSE_BYTES
    news: AccountNews = AccountNews()
    numbers: Iterator[int] = field(default_factory=lambda: count(1))
    mark_key: bytes = field(default=b"", repr=False)


def build_account(options: AccountOptions) -> Account:
    """An account with a wire of its own. Raises ``ValueError`` for the base URL, ``OSError`` for
    the CA file."""
    origin, _ = split_base_url(options.base_url)
    wire: Wire
    if options.proxy is not None:
        wire = proxy_wire(
            options.proxy,
            ca_file=options.ca_file,
            max_connections=options.max_connections,
            idle_seconds=options.idle_seconds,
            max_response_bytes=options.max_response_bytes,
        )
    else:
        wire = SocketTransport(
            tls=tls_context(options.ca_file) if origin.tls else None,
            max_connections=options.max_connections,
            idle_seconds=options.idle_seconds,
            max_response_bytes=options.max_response_bytes,
            waited=options.news.waited,
        )
    return Account(options, wire)


def split_base_url(base_url: str) -> tuple[Origin, str]:
    """The origin, and the path without its last slash. Raises ``ValueError``."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a base URL is http:// or https:// with a host")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("a base URL has no credentials, no query and no fragment")
    tls = parts.scheme == "https"
    host = parts.hostname.encode("idna").decode("ascii")
    return Origin(tls, host, parts.port or (443 if tls else 80)), parts.path.rstrip("/")


class Account:
    """One provider account. Its keys are known by numbers, in the order they were first seen."""

    def __init__(self, options: AccountOptions, wire: Wire) -> None:
        # Plain attributes: every call asks for them twenty times.
        self.name = options.name
        self.provider = options.provider
        self._origin, self._base_path = split_base_url(options.base_url)
        self._numbers = options.numbers
        self._keys: dict[str, AccountKey] = {}
        self._credentials: tuple[Credential, ...] = ()
        self._mark_key = options.mark_key
        self._former: deque[AccountKey] = deque(maxlen=FORMER_KEYS)
        # By method, path, headers and key: to write and check a head takes 15 us, to find it 1.
        self._beginnings: dict[tuple[object, ...], Beginning] = {}
        self.replace_keys(options.keys)
        self._sandbox = options.kind == "sandbox"
        self._timeouts = options.timeouts
        self._max_response_bytes = options.max_response_bytes
        self._wire = wire
        self._news = options.news
        self._secret_headers = tuple(options.headers.items())
        self._headers = (
            ("host", self._origin.authority),
            ("accept-encoding", "identity"),
            *((name.lower(), value) for name, value in options.headers.items()),
        )

    @property
    def address(self) -> tuple[str, int]:
        return self._origin.host, self._origin.port

    @property
    def ready(self) -> bool:
        return self._sandbox or bool(self._keys)

    @property
    def credentials(self) -> Sequence[Credential]:
        """As they are configured now; a sandbox, which takes every key, has one without a name."""
        if not self._keys:
            return (SANDBOX_CREDENTIAL,) if self._sandbox else ()
        return self._credentials

    def masked(self, text: bytes) -> bytes:
        values = {key.secret.reveal() for key in (*self._keys.values(), *self._former)}
        for _, value in self._secret_headers:
            # After its scheme: a provider that repeats a token may leave out "Bearer".
            values |= {value, value.partition(" ")[2].strip()}
        for value in sorted(values, key=len, reverse=True):
            if len(value) >= SECRET_CHARS:
                text = text.replace(value.encode(), b"***")
        return text

    async def send(self, outgoing: Outgoing, credential: str) -> AccountReply:
        """Raises ``UpstreamUnavailable`` or ``Overloaded`` when nothing was sent, and
        ``UpstreamUnknown`` afterwards. A body not read to its end is left to its maker."""
        if not (self._keys or self._sandbox):
            raise UpstreamUnavailable(
                f"The upstream {self.name} is off: it has no key. Nothing was bought.",
                should_retry=False,
            )
        body = outgoing.body
        try:
            sending = self._wire.exchange(self._request(outgoing, credential))
            del outgoing  # the answer is all that is waited for
            exchange = await sending
        except NotSent as error:
            raise self._not_sent(error) from error
        except Lost as error:
            raise self._lost(error) from error
        finally:
            if body.__class__ is Whole:
                self._news.sent(body.taken)
        return AccountReply(self.name, exchange, self._max_response_bytes, self._news.received)

    def _request(self, outgoing: Outgoing, credential: str) -> WireRequest:
        body, method = outgoing.body, outgoing.method
        named = (method, outgoing.path, outgoing.headers, credential)
        beginning = self._beginnings.get(named)
        if beginning is None:
            beginning = self._beginning(outgoing, credential)
            if len(self._beginnings) >= MAX_BEGINNINGS:
                self._beginnings.clear()
            self._beginnings[named] = beginning
        target, headers, head = beginning
        if body is not None or method != "GET":
            length = str(outgoing.length)
            headers = (*headers, ("content-length", length))
            head += f"content-length: {length}\r\n".encode()
        if body is not None and not isinstance(body, Whole):
            body = _Counted(body, self._news.sent)
        return WireRequest(
            method,
            self._origin,
            target,
            headers,
            body,
            outgoing.length,
            self._timeouts,
            outgoing.max_response_bytes,
            head + b"\r\n",
        )

    def _beginning(self, outgoing: Outgoing, credential: str) -> Beginning:
        target = self._base_path + outgoing.path
        authorization = ("authorization", f"Bearer {self._secret(credential)}")
        headers = (*self._headers, *outgoing.headers, authorization)
        return target, headers, written_head(outgoing.method, target, headers)

    def replace_keys(self, keys: Sequence[AccountKey]) -> None:
        """From now on these are used. One that was there before keeps its id, another gets one that
        no key had before it; a call that was sent ends with the key it began with."""
        ids = {key.secret.reveal(): id for id, key in self._keys.items()}
        found: dict[str, AccountKey] = {}
        for key in keys:
            id = ids.get(key.secret.reveal())
            if id is None:
                id = str(next(self._numbers))
            found[id] = key
        # A call that was sent with one of them may still be answered.
        self._former += (key for id, key in self._keys.items() if id not in found)
        self._keys = found
        self._beginnings.clear()
        # An HMAC for each key: made here, not for each of the looks that every call takes at them.
        self._credentials = tuple(
            Credential(id, key.order, key.weight, self._mark(key)) for id, key in found.items()
        )

    async def aclose(self) -> None:
        await self._wire.aclose()

    def _mark(self, key: AccountKey) -> str:
        if not self._mark_key:
            return ""
        secret = key.secret.reveal().encode("utf-8", "surrogateescape")
        return hmac.digest(self._mark_key, secret, hashlib.sha256).hex()[:MARK_CHARS]

    def _secret(self, credential: str) -> str:
        if not self._keys:
            return SANDBOX_KEY
        key = self._keys.get(credential) or next(iter(self._keys.values()))
        return key.secret.reveal()

    def _not_sent(self, error: NotSent) -> GatewayError:
        # A host that cannot be trusted is an alarm: it may be somebody else's.
        log.log(
            logging.ERROR if error.reason is Reason.TLS else logging.WARNING,
            "an upstream was not reached",
            extra={
                "upstream": self.name,
                "reason": error.reason.value,
                "error": str(error.__cause__ or error),
            },
        )
        if error.reason is Reason.POOL:
            return Overloaded(
                f"Every connection to the upstream {self.name} is busy. Nothing was bought; "
                "try again.",
                reason=error.reason,
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        if error.reason is Reason.TLS:
            return UpstreamUnavailable(
                f"The upstream {self.name} cannot be trusted: its TLS handshake failed. Nothing "
                "was bought. Ask the gateway's operator.",
                status=502,
                code="upstream_tls",
                reason=error.reason,
                should_retry=False,
            )
        return UpstreamUnavailable(
            f"The upstream {self.name} cannot be reached ({error}). Nothing was bought; try again.",
            reason=error.reason,
            retry_after_seconds=RETRY_AFTER_SECONDS,
        )

    def _lost(self, error: Lost) -> UpstreamUnknown:
        late = error.reason is Reason.READ_TIMEOUT
        return UpstreamUnknown(
            f"The request was sent to the upstream {self.name}, and then {error}. It may have "
            "been bought: money may have been spent. Sending it again may buy it twice.",
            status=504 if late else 502,
            reason=error.reason,
        )


class AccountReply:
    """An answer whose body still arrives: the port ``Reply``. ``headers`` have their names in lower
    case, and repeated values joined with commas."""

    __slots__ = (
        "_encoding", "_exchange", "_max_response_bytes", "_received", "_upstream", "headers",
        "status",
    )  # fmt: skip

    def __init__(
        self,
        upstream: str,
        exchange: Exchange,
        max_response_bytes: int,
        received: Callable[[int], None],
    ) -> None:
        self._upstream = upstream
        self._exchange = exchange
        self._received = received
        self._max_response_bytes = max_response_bytes
        self.status = exchange.status
        headers = by_name(exchange.headers)
        if len(headers) != len(exchange.headers):
            headers = _joined(exchange.headers)
        self.headers: Mapping[str, str] = headers
        self._encoding = "identity"
        if "content-encoding" in headers:
            self._encoding = headers.pop("content-encoding").strip().lower() or "identity"
            if self._encoding != "identity":
                headers.pop("content-length", None)

    def chunks(self, take: Take | None = None) -> AsyncIterator[bytes]:
        """The body as it arrives, decoded; to be read once. Raises ``UpstreamBroken``, which
        says "billed" whatever the status was: the caller knows better for a refusal."""
        if self._encoding == "identity":
            return _AsItComes(self, None if take is None else self._counting(take))
        return self._decoded()

    async def _decoded(self) -> AsyncIterator[bytes]:
        try:
            if self._encoding not in ("gzip", "x-gzip", "deflate"):
                raise Lost(Reason.ENCODING, "the answer's content encoding is unknown")
            inflater = Inflater(self._max_response_bytes)
            while chunk := await self.read():
                for piece in inflater.feed(chunk):
                    yield piece
            inflater.end()
        except Lost as error:
            raise self.broken(error) from error
        finally:
            await self._exchange.aclose()

    async def aclose(self) -> None:
        await self._exchange.aclose()

    async def read(self, take: Take | None = None) -> bytes:
        """The next piece, encoded as it came. Raises ``Lost``."""
        chunk = await self._exchange.read(take)
        self._received(len(chunk))
        return chunk

    def _counting(self, take: Take) -> Take:
        def counted(piece: bytes) -> bool:
            taken = take(piece)
            if taken:
                self._received(len(piece))
            return taken

        return counted

    def broken(self, error: Lost) -> UpstreamBroken:
        """What a client is told of an answer that was cut."""
        return UpstreamBroken(
            f"The upstream {self._upstream} began to answer, and then {error}. It has probably "
            "been bought: money has probably been spent. Sending it again may buy it twice.",
            status=504 if error.reason is Reason.BODY_TIMEOUT else 502,
            reason=error.reason,
        )


def _joined(headers: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers of which some are said more than once: their values in one."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        known = found.get(name)
        found[name] = value if known is None else b"%b, %b" % (known, value)
    return by_name(found.items())


class _AsItComes:
    """A body that needs no decoding. A generator would be told to its loop, which keeps a weak set
    of them: as much again as all that is done here."""

    __slots__ = ("_reply", "_take")

    def __init__(self, reply: AccountReply, take: Take | None) -> None:
        self._reply = reply
        self._take = take

    def __aiter__(self) -> _AsItComes:
        return self

    async def __anext__(self) -> bytes:
        whole = True
        try:
            chunk = await self._reply.read(self._take)
            whole = not chunk
        except Lost as error:
            raise self._reply.broken(error) from error
        finally:
            if whole:
                await self._reply.aclose()
        if whole:
            raise StopAsyncIteration
        return chunk


class _Counted:
    """A body, whose pieces ``sent`` hears of as they are taken."""

    __slots__ = ("_next", "_sent")

    def __init__(self, body: AsyncIterator[bytes | Lent], sent: Callable[[int], None]) -> None:
        self._next = body.__anext__
        self._sent = sent

    def __aiter__(self) -> AsyncIterator[bytes | Lent]:
        return self

    async def __anext__(self) -> bytes | Lent:
        piece = await self._next()
        self._sent(len(piece))
        return piece
