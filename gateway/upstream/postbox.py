"""An address that messages are posted to: the port ``Postbox``."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Sequence
from urllib.parse import unquote, urlsplit

from gateway.ports import NotDelivered
from gateway.upstream.transport import SocketTransport
from gateway.upstream.wire import Origin, Timeouts, Wire, WireError, WireRequest

DEADLINE_SECONDS = 10.0


class WebPostbox:
    """Posts to one http:// or https:// url, over connections of its own."""

    def __init__(
        self, url: str, *, deadline_seconds: float = DEADLINE_SECONDS, wire: Wire | None = None
    ) -> None:
        """Raises ``ValueError`` for the url."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("a url is http:// or https:// with a host")
        tls = parts.scheme == "https"
        host = parts.hostname.encode("idna").decode("ascii")
        self._origin = Origin(tls, host, parts.port or (443 if tls else 80))
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._headers: tuple[tuple[str, str], ...] = (("host", self._origin.authority),)
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            basic = base64.b64encode(pair.encode()).decode()
            self._headers += (("authorization", f"Basic {basic}"),)
        self._timeouts = Timeouts(*[deadline_seconds] * 5)
        self._wire = wire or SocketTransport()

    async def post(self, headers: Sequence[tuple[str, str]], body: bytes) -> int:
        request = WireRequest(
            method="POST",
            origin=self._origin,
            target=self._target,
            headers=(*self._headers, *headers, ("content-length", str(len(body)))),
            body=_once(body),
            length=len(body),
            timeouts=self._timeouts,
        )
        try:
            exchange = await self._wire.exchange(request)
        except WireError as error:
            raise NotDelivered(f"{error.reason.value}: {error}") from None
        except ValueError:
            raise NotDelivered("the url cannot be written as HTTP") from None
        await exchange.aclose()
        return exchange.status

    async def aclose(self) -> None:
        await self._wire.aclose()


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
