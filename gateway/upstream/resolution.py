"""What the names of upstreams lead to, asked once for many connections.

The system's resolver is asked in a thread: a burst of a thousand connections would else queue there
a thousand times for the one answer, and every one of them within its deadline.
"""

from __future__ import annotations

import asyncio
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

from gateway.domain.address import address_of, is_never_an_upstream

KEPT_SECONDS = 10.0
"""How long an answer of the resolver serves; a name that moves is followed within it."""

MOST_NAMES = 100


class ForbiddenError(Exception):
    """The name leads to where nothing must be sent."""


class Resolution:
    """Names to addresses, for the transport of one upstream: it has few names."""

    def __init__(self, kept_seconds: float = KEPT_SECONDS) -> None:
        self._kept_seconds = kept_seconds
        self._known: dict[str, tuple[float, tuple[str, ...]]] = {}
        self._asking: dict[str, asyncio.Task[tuple[str, ...]]] = {}

    async def addresses(self, host: str, port: int) -> tuple[str, ...]:
        """In the order in which they should be tried, at least one. Raises ``OSError``,
        ``UnicodeError`` and ``ForbiddenError``."""
        loop = asyncio.get_running_loop()
        known = self._known.get(host)
        if known is not None and known[0] > loop.time():
            return known[1]
        if _is_address(host):
            found = (host,)
            _check(found)
            self._keep(host, float("inf"), found)
            return found
        asking = self._asking.get(host)
        if asking is None:
            asking = self._asking[host] = loop.create_task(self._ask(host, port))
            asking.add_done_callback(lambda task: self._answered(host, task))
        # Whoever is cancelled leaves the question to those who wait for its answer too.
        return await asyncio.shield(asking)

    def forget(self, host: str) -> None:
        """Nobody was there: the next one asks anew."""
        if not _is_address(host):
            self._known.pop(host, None)

    async def _ask(self, host: str, port: int) -> tuple[str, ...]:
        loop = asyncio.get_running_loop()
        answers = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        found = tuple(dict.fromkeys(str(address[0]) for *_, address in answers))
        if not found:
            raise OSError("the name has no addresses")
        _check(found)
        self._keep(host, loop.time() + self._kept_seconds, found)
        return found

    def _keep(self, host: str, until: float, found: tuple[str, ...]) -> None:
        if len(self._known) >= MOST_NAMES:
            self._known.clear()
        self._known[host] = (until, found)

    def _answered(self, host: str, task: asyncio.Task[tuple[str, ...]]) -> None:
        self._asking.pop(host, None)
        if not task.cancelled():
            task.exception()  # seen, also where nobody waits for it any more


def _is_address(host: str) -> bool:
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _check(addresses: tuple[str, ...]) -> None:
    for each in addresses:
        address: IPv4Address | IPv6Address | None = address_of(each)
        if address is not None and is_never_an_upstream(address):
            raise ForbiddenError
