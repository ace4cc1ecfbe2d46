"""Telling the operator's own systems that an asynchronous request is over."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from gateway.domain.money import Money, format_dollars
from gateway.ports import Clock, Message, Notifier
from gateway.relay.headers import say_instant
from gateway.relay.running import result_url

log = logging.getLogger(__name__)

PAUSES_SECONDS = (1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0)
"""Between the tries of one message, the last again and again."""
TRIES_AT_ONCE = 64
MOST_WAITING = 10_000
"""Messages of some hundred bytes each; more than a receiver that is down is worth."""
DRAIN_SECONDS = 10.0
ENDS = "the gateway ends"


@dataclass(frozen=True, slots=True)
class Finished:
    """How an asynchronous request ended. ``status`` is what fetching its result answers, ``code``
    that of the error, or empty. ``cost`` is what was booked for it, in nano-dollars; from
    ``expires_at`` on the result is gone. Never the picture, the prompt or the key."""

    rid: str
    team: str
    operation: str
    model: str
    status: int
    code: str
    images: int
    cost: Money
    at: datetime
    expires_at: datetime


def message_of(finished: Finished) -> Message:
    """``image.result.completed`` or ``image.result.failed``; a request has one such message, and
    its id follows from the request's, so that a repeat is known as one."""
    failed = finished.status >= 400
    return Message(
        id=f"msg_{finished.rid.removeprefix('req_')}",
        type=f"image.result.{'failed' if failed else 'completed'}",
        at=finished.at,
        data={
            "id": finished.rid,
            "team": finished.team,
            "operation": finished.operation,
            "model": finished.model,
            "status": finished.status,
            "code": finished.code or None,
            "images": finished.images,
            "cost_usd": format_dollars(finished.cost),
            "result_url": result_url(finished.rid),
            "expires_at": say_instant(finished.expires_at),
        },
    )


class ResultNews:
    """Tries each message until it is taken, for as long as a result is kept. Owns ``notifier``,
    whose ``tell`` should be one try, and closes it."""

    def __init__(
        self,
        notifier: Notifier,
        clock: Clock,
        *,
        keep_trying_seconds: float,
        counted: Callable[[str], None] = lambda outcome: None,
        pauses_seconds: Sequence[float] = PAUSES_SECONDS,
    ) -> None:
        """``counted`` hears ``delivered`` or ``abandoned`` of each message."""
        self._notifier = notifier
        self._clock = clock
        self._keep_trying_seconds = keep_trying_seconds
        self._counted = counted
        self._pauses_seconds = tuple(pauses_seconds)
        self._turns = asyncio.Semaphore(TRIES_AT_ONCE)
        self._ending = asyncio.Event()
        self._running: set[asyncio.Task[str]] = set()

    @property
    def waiting(self) -> int:
        """Messages that were not taken yet."""
        return len(self._running)

    def tell(self, finished: Finished) -> None:
        """Sends it in a task of its own: nobody waits for it."""
        message = message_of(finished)
        if self.waiting >= MOST_WAITING:
            self._abandon(message, finished.rid, "too many are waiting")
            return
        task = asyncio.create_task(self._try_until_taken(message))
        self._running.add(task)
        task.add_done_callback(lambda task: self._ended(task, message, finished.rid))

    async def drain(self, seconds: float = DRAIN_SECONDS) -> None:
        """One more try for what was not taken, now; after ``seconds`` the rest is abandoned, each
        with a line in the log that names it."""
        self._ending.set()
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while self._running and loop.time() < until:
            await asyncio.wait(set(self._running), timeout=until - loop.time())
        left = set(self._running)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)

    async def aclose(self) -> None:
        """Abandons what ``drain`` has not waited for."""
        await self.drain(0)
        await self._notifier.aclose()

    def _ended(self, task: asyncio.Task[str], message: Message, rid: str) -> None:
        self._running.discard(task)
        if task.cancelled():
            self._abandon(message, rid, ENDS)
        elif error := task.exception():
            log.error("a message of a result crashed", exc_info=error)
            self._abandon(message, rid, "it crashed")
        elif why := task.result():
            self._abandon(message, rid, why)
        else:
            self._counted("delivered")

    async def _try_until_taken(self, message: Message) -> str:
        """Empty once it was taken, else why it will not be."""
        until = self._clock.monotonic() + self._keep_trying_seconds
        tries = 0
        while True:
            last = self._ending.is_set()
            async with self._turns:
                if await self._notifier.tell(message):
                    return ""
            if last:
                return ENDS
            left = until - self._clock.monotonic()
            if left <= 0:
                return "the result is over"
            await self._pause(min(left, self._pauses_seconds[tries]))
            tries = min(tries + 1, len(self._pauses_seconds) - 1)

    async def _pause(self, seconds: float) -> None:
        """The end of the gateway ends it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ending.wait()

    def _abandon(self, message: Message, rid: str, why: str) -> None:
        self._counted("abandoned")
        log.error(
            "the webhook of results never heard that a request is over",
            extra={
                "message_id": message.id,
                "type": message.type,
                "request_id": rid,
                "error": why,
            },
        )
