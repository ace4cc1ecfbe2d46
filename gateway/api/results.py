"""`GET /v1/images/results/{request_id}`: what was bought, on another connection than it was asked
for on. Raw ASGI like the relayed routes, for a result is as large as an answer."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Protocol

from gateway.api import auth
from gateway.api.door import (
    Receive,
    Scope,
    Send,
    ask_again,
    crashed,
    deliver,
    new_request_id,
    opened_to_read,
)
from gateway.api.prefer import preferences
from gateway.domain.errors import (
    ClientGone,
    GatewayError,
    IdempotentResultExpired,
    InvalidKey,
    NotServed,
    ResultExpired,
    ResultNotFound,
    UpstreamUnknown,
)
from gateway.domain.team import Caller
from gateway.relay.flights import Client
from gateway.relay.headers import Headers, error_head
from gateway.relay.keyring import KeyRing
from gateway.relay.running import RESULTS, Fetched, no_result

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"req_[0-9a-f]{24}")
NOT_STORED: Headers = (("cache-control", "no-store"),)
"""A result is one team's, and over in minutes: no cache between may have it."""


class ResultDesk(Protocol):
    """Who has the results."""

    async def fetch(self, caller: Caller, rid: str, wait_seconds: float, client: Client) -> Fetched:
        """The kept answer, or a 202 where the call still runs after ``wait_seconds``.

        Raises ``ResultNotFound`` for what is unknown and, alike in words and time, for what is
        another team's; ``ResultExpired``; ``UpstreamUnknown`` where nobody knows what became of the
        call; ``ClientGone``; other errors where it cannot be said now.
        """


class ResultRoutes:
    """Answers for the results; one coroutine a request."""

    def __init__(
        self,
        keyring: KeyRing,
        desk: ResultDesk,
        *,
        ttl: timedelta,
        idempotent_ttl: timedelta,
        counted: Callable[[str], None] = lambda outcome: None,
    ) -> None:
        """``counted`` hears ``ready``, ``running``, ``gone``, ``unknown``, ``unknown_outcome`` or
        ``failed`` of each question of somebody who is known."""
        self._keyring = keyring
        self._desk = desk
        self._ttl = ttl
        self._idempotent_ttl = idempotent_ttl
        self._counted = counted

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """From the request line to the last byte; the id is what follows ``RESULTS`` in the path.

        Errors have a request id of their own, as every question has one.
        """
        own = new_request_id()
        door, headers = opened_to_read(scope, receive, send)
        try:
            fetched = await self._answer(own, scope, headers, door.client)
            head = fetched.head
            if head.length is not None:
                head = replace(head, headers=(*head.headers, *NOT_STORED))
            try:
                await deliver(own, head, door)
            finally:
                head.close()
                fetched.done(door.delivered)
        except asyncio.CancelledError:
            # It ends here: whatever is raised, the server takes for a crash.
            await door.give_up(own, error_head(ask_again("result"), own))
        finally:
            door.stop_watching()

    async def _answer(
        self, own: str, scope: Scope, headers: Mapping[str, str], client: Client
    ) -> Fetched:
        if scope["method"] != "GET":
            refused = NotServed(
                f"{RESULTS}{{request_id}} takes GET, not {scope['method']}.",
                status=405,
                code="method_not_allowed",
            )
            return Fetched(error_head(refused, own, (("allow", "GET"),)))
        try:
            caller = await self._keyring.identify(auth.secret(headers))
            fetched = await self._fetch(caller, scope, client)
        except GatewayError as error:
            self._count(error)
            return Fetched(error_head(error, own))
        except Exception:
            log.exception("the question for a result crashed", extra={"request_id": own})
            self._counted("failed")
            return Fetched(error_head(crashed(), own))
        self._counted("running" if fetched.head.status == 202 else "ready")
        return fetched

    async def _fetch(self, caller: Caller, scope: Scope, client: Client) -> Fetched:
        rid = str(scope["path"]).removeprefix(RESULTS)
        if REQUEST_ID.fullmatch(rid) is None:
            raise no_result(rid, self._ttl, self._idempotent_ttl)
        wait_seconds = preferences(scope["headers"]).wait_seconds or 0.0
        return await self._desk.fetch(caller, rid, wait_seconds, client)

    def _count(self, error: GatewayError) -> None:
        """What went wrong at the door is nobody's result."""
        if isinstance(error, ResultNotFound):
            self._counted("unknown")
        elif isinstance(error, ResultExpired | IdempotentResultExpired):
            self._counted("gone")
        elif isinstance(error, UpstreamUnknown):
            self._counted("unknown_outcome")
        elif not isinstance(error, InvalidKey | ClientGone):
            self._counted("failed")
