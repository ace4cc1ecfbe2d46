"""A look at an address: does it resolve, connect, and prove who it is? Nothing is sent."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from gateway.upstream.transport import tls_context
from gateway.upstream.wire import Origin


@dataclass(frozen=True, slots=True)
class Handshake:
    """``protocol`` and ``expires`` (of the certificate) only where there is TLS."""

    seconds: float
    protocol: str = ""
    expires: datetime | None = None


async def addresses(origin: Origin) -> list[str]:
    """What a name resolves to, each once. Raises ``OSError``."""
    found = await asyncio.get_running_loop().getaddrinfo(
        origin.host, origin.port, type=socket.SOCK_STREAM
    )
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


async def shake_hands(origin: Origin, ca_file: str | None, seconds: float) -> Handshake:
    """Connects as a call would and closes again. Raises ``OSError``: ``ssl.SSLError`` and
    ``TimeoutError`` are such."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.timeout(seconds):
        _, writer = await asyncio.open_connection(
            origin.host,
            origin.port,
            ssl=tls_context(ca_file) if origin.tls else None,
            server_hostname=origin.host if origin.tls else None,
        )
    took = loop.time() - began
    secured = writer.get_extra_info("ssl_object")
    writer.transport.abort()
    with suppress(OSError):
        await writer.wait_closed()
    if not isinstance(secured, ssl.SSLObject):
        return Handshake(took)
    certificate = secured.getpeercert() or {}
    ends = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    return Handshake(took, secured.version() or "", datetime.fromtimestamp(ends, UTC))
