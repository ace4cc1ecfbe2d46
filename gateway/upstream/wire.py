"""One exchange with an origin, as the rest of ``upstream`` speaks of it: no httpx, no sockets.

A wire sends one request and hands back its answer, body still arriving. Whatever goes wrong is a
``WireError``, and the class says the one thing that money asks (money.md 8.1)::

    WireError
    ├── NotSent    no byte of the request left: surely nothing was bought
    └── Lost       a byte may have left; what became of it is not known from here
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from gateway.ports import Lent, Take


class Reason(StrEnum):
    """Why an exchange failed: the label of metrics and log lines, a closed list."""

    DNS = "dns"
    CONNECT = "connect"
    CONNECT_TIMEOUT = "connect_timeout"
    TLS = "tls"
    POOL = "pool"

    WRITE = "write"
    """The connection broke while the request was being written."""
    WRITE_TIMEOUT = "write_timeout"
    DISCONNECT = "disconnect"
    """The connection ended after the request, before the answer's headers."""
    READ_TIMEOUT = "read_timeout"
    """The headers did not come in time."""
    PROTOCOL = "protocol"
    """What came is not HTTP/1.1, or its headers are too large."""

    TRUNCATED = "truncated"
    """The body ended before its announced end."""
    BODY_TIMEOUT = "body_timeout"
    TOO_LARGE = "too_large"
    ENCODING = "encoding"
    """The body's content encoding is unknown or damaged."""


class WireError(Exception):
    """An exchange that failed. ``str(error)`` names neither address nor credentials."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class NotSent(WireError):
    """Nothing was written. Reasons: dns, connect, connect_timeout, tls, pool."""


class Lost(WireError):
    """Something was, or may have been, written."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. The values are those of money.md 8.1.

    ``pool`` is the wait for a free connection, ``connect`` covers name, TCP and TLS, ``write`` is
    for each wait until the socket takes more, ``first_byte`` runs from the request's first byte to
    the answer's headers, ``total`` from the call to the body's last byte.
    """

    pool: float = 5.0
    connect: float = 5.0
    write: float = 60.0
    first_byte: float = 600.0
    total: float = 600.0


class Origin(NamedTuple):
    """Where connections may be shared. ``host`` is ASCII, without the brackets of IPv6."""

    tls: bool
    host: str
    port: int

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


@dataclass(slots=True)
class WireRequest:
    """One request, complete: ``headers`` hold Host, and Content-Length where there is a body.

    ``target`` is the path with its query. ``body`` yields exactly ``length`` bytes and is read
    once.
    """

    method: str
    origin: Origin
    target: str
    headers: tuple[tuple[str, str], ...]
    body: AsyncIterator[bytes | Lent] | None
    length: int
    timeouts: Timeouts
    max_response_bytes: int = 0
    """Where it is more than the wire takes otherwise."""
    head: bytes = b""
    """All before the body as written, where that is known; a wire drops it once it is sent."""


class Exchange(Protocol):
    """An answer whose headers are here."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """As they came, names in lower case."""

    async def read(self, take: Take | None = None) -> bytes:
        """The next piece of the body; empty at its end. Raises ``Lost``. With ``take`` the next
        that is not taken, as ``Reply.chunks`` has it."""

    async def aclose(self) -> None:
        """Drops the connection, unless the answer came whole and it can serve again."""


class Wire(Protocol):
    """What carries requests. Never follows a redirect, never sends anything twice."""

    async def exchange(self, request: WireRequest) -> Exchange:
        """Returns once the final headers are here. Raises ``NotSent`` or ``Lost``; ``ValueError``
        for a request that cannot be written as HTTP."""

    async def aclose(self) -> None: ...
