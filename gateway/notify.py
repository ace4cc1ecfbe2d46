"""Webhooks, as Standard Webhooks has them (standardwebhooks.com): an id that stays, a time, a
signature over both and the body."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
from collections.abc import Callable, Sequence

from gateway.ports import Clock, Message, NotDelivered, Postbox

log = logging.getLogger(__name__)

PAUSES_SECONDS = (1.0, 5.0, 30.0)
"""Between the tries of one message."""


class Webhooks:
    """``Notifier`` by HTTP: posts until a 2xx comes, a few times."""

    def __init__(
        self,
        postbox: Postbox,
        secret: str | None,
        clock: Clock,
        *,
        counted: Callable[[str], None] = lambda outcome: None,
        pauses_seconds: Sequence[float] = PAUSES_SECONDS,
    ) -> None:
        """``secret`` is ``whsec_`` and base64; None leaves the messages unsigned. ``counted`` hears
        ``delivered`` or ``failed`` of each message. Raises ``ValueError`` for the secret."""
        self._postbox = postbox
        self._key = None if secret is None else base64.b64decode(secret.removeprefix("whsec_"))
        self._clock = clock
        self._counted = counted
        self._pauses_seconds = tuple(pauses_seconds)

    async def tell(self, message: Message) -> bool:
        body = body_of(message)
        why = ""
        for pause in (0.0, *self._pauses_seconds):
            await asyncio.sleep(pause)
            try:
                status = await self._postbox.post(self._headers(message.id, body), body)
            except NotDelivered as error:
                why = str(error)
            else:
                if 200 <= status < 300:
                    self._counted("delivered")
                    return True
                why = f"it answered {status}"
        log.warning(
            "the webhook did not take a message; it is tried again later",
            extra={"message_id": message.id, "type": message.type, "error": why},
        )
        self._counted("failed")
        return False

    async def aclose(self) -> None:
        await self._postbox.aclose()

    def _headers(self, message_id: str, body: bytes) -> list[tuple[str, str]]:
        seconds = str(int(self._clock.now().timestamp()))
        headers = [
            ("content-type", "application/json"),
            ("user-agent", "image-gateway"),
            ("webhook-id", message_id),
            ("webhook-timestamp", seconds),
        ]
        if self._key is not None:
            headers.append(("webhook-signature", signature(self._key, message_id, seconds, body)))
        return headers


def signature(key: bytes, message_id: str, seconds: str, body: bytes) -> str:
    """The value of ``webhook-signature``; ``seconds`` is the time of the try since 1970."""
    mac = hmac.digest(key, f"{message_id}.{seconds}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(mac).decode()}"


def body_of(message: Message) -> bytes:
    """The JSON that is sent: the same bytes at every try."""
    document = {"type": message.type, "timestamp": message.at.isoformat(), "data": message.data}
    return json.dumps(document, separators=(",", ":")).encode()
