"""Commands to one Redis that go out together: what is asked in one turn of the event loop is one
round trip.

A round trip through redis-py costs about 100 us of this process, most of it for the connection, its
locks and its time-outs, and next to nothing for the bytes; so ten commands cost what one does.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ReadOnlyError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

TOGETHER = frozenset({"EVALSHA", "EVAL", "HGET", "EXISTS", "UNLINK"})
"""What redis-py hands on as it comes. What else there is goes by itself."""
SMALL_BYTES = 64 * 1024
"""A larger command goes by itself: the others would wait for its bytes."""
BATCH_BYTES = 256 * 1024
BATCH_COMMANDS = 64
"""Scripts of about 50 us each: others wait for them a few milliseconds at the most."""


class Asked:
    """A command on its way, whoever still waits for its ``answer``. ``text`` is that of its script,
    for a server that does not know it."""

    __slots__ = ("_args", "_text", "answer", "command")

    def __init__(self, args: tuple[Any, ...], command: list[bytes], text: str | None) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.command = command
        """As it is sent; several only where it is large."""
        self._args = args
        self._text = text

    def spell_out(self) -> bool:
        """Whether it can be asked with the text of its script, which it is from now on."""
        if self._text is None:
            return False
        self.command, _ = _packed(("EVAL", self._text, *self._args[2:]))
        self._text = None
        return True


class Together:
    """A client over redis-py's, of one server or of the master that sentinels name.

    ``users`` share it: the last one's ``aclose`` closes it. A batch is tried again once, like each
    of redis-py's commands, without what is answered already: every command may be repeated.
    """

    def __init__(self, client: Any, timeout: float) -> None:
        """``timeout`` in seconds, for all answers of a batch."""
        self.users = 1
        self._client = client
        self._timeout = timeout
        self._batch: deque[Asked] = deque()
        self._bytes = 0
        self._carried: dict[asyncio.Task[None], deque[Asked]] = {}
        """What is under way, by who brings it."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        if options or args[0] not in TOGETHER:
            return await self._client.execute_command(*args, **options)
        return await self.ask(args).answer

    def ask(self, args: tuple[Any, ...], text: str | None = None) -> Asked:
        """One of ``TOGETHER``, on its way from now on, whoever leaves; an ``EVALSHA`` may bring the
        ``text`` of its script."""
        command, size = _packed(args)
        asked = Asked(args, command, text)
        if size > SMALL_BYTES:
            self._start(deque((asked,)))
            return asked
        if self._bytes + size > BATCH_BYTES or len(self._batch) >= BATCH_COMMANDS:
            self._send()
        if not self._batch:
            asked.answer.get_loop().call_soon(self._send)
        self._batch.append(asked)
        self._bytes += size
        return asked

    def carriers(self, asked: Asked | None = None) -> set[asyncio.Task[None]]:
        """Who brings what is under way, or that one command; nobody, once it is over."""
        self._send()
        return {task for task, all in self._carried.items() if asked is None or asked in all}

    async def aclose(self) -> None:
        self.users -= 1
        if self.users:
            return
        tasks = [*self._carried]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    def _send(self) -> None:
        if self._batch:
            batch, self._batch, self._bytes = self._batch, deque(), 0
            self._start(batch)

    def _start(self, batch: deque[Asked]) -> None:
        task = asyncio.get_running_loop().create_task(self._carry(batch))
        self._carried[task] = batch
        task.add_done_callback(self._carried.__delitem__)

    async def _carry(self, batch: deque[Asked]) -> None:
        try:
            await self._exchange(batch)
        except Exception as error:  # noqa: BLE001 - whoever asked hears of it
            for asked in batch:
                if not asked.answer.done():
                    asked.answer.set_exception(error)
        finally:
            for asked in batch:
                asked.answer.cancel()

    async def _exchange(self, batch: deque[Asked]) -> None:
        pool = self._client.connection_pool
        connection = await pool.get_connection()
        try:
            try:
                await self._ask(connection, batch, again=True)
            except (RedisConnectionError, RedisTimeoutError, ReadOnlyError, TimeoutError):
                # READONLY: the master we knew was demoted; a new connection looks it up again.
                await connection.disconnect()
                await self._ask(connection, batch, again=False)
        finally:
            await pool.release(connection)

    async def _ask(self, connection: Any, batch: deque[Asked], *, again: bool) -> None:
        """Takes from ``batch`` what is answered. Raises what the rest is asked again for."""
        # One deadline over all: that of redis-py for each answer would be 12 us each.
        async with asyncio.timeout(self._timeout):
            while batch:
                await connection.send_packed_command(
                    [part for asked in batch for part in asked.command]
                )
                for _ in range(len(batch)):
                    await self._hear(connection, batch, again=again)

    async def _hear(self, connection: Any, batch: deque[Asked], *, again: bool) -> None:
        """The answer to the first of ``batch``, which then leaves it. One whose script is not known
        goes to its end: it is to be asked anew."""
        asked = batch[0]
        try:
            said = await connection.read_response(timeout=math.inf)
        except ResponseError as error:
            if again and isinstance(error, ReadOnlyError):
                raise
            batch.popleft()
            if isinstance(error, NoScriptError) and asked.spell_out():
                batch.append(asked)
            elif not asked.answer.done():
                asked.answer.set_exception(error)
        else:
            batch.popleft()
            if not asked.answer.done():
                asked.answer.set_result(said)


def _packed(args: tuple[Any, ...]) -> tuple[list[bytes], int]:
    """A command of texts, bytes and integers as it is sent, and its size: ten times as fast as
    redis-py packs it."""
    texts = [f"*{len(args)}\r\n"]
    for each in args:
        kind = type(each)
        if kind is int:
            each = str(each)
        elif kind is not str:
            return _packed_in_blocks(args)
        texts.append(f"${len(each)}\r\n{each}\r\n")
    text = "".join(texts)
    if len(text) > SMALL_BYTES or not text.isascii():
        return _packed_in_blocks(args)
    return [text.encode()], len(text)


def _packed_in_blocks(args: tuple[Any, ...]) -> tuple[list[bytes], int]:
    """An argument in blocks is a tuple of them: where it is large, none is copied."""
    parts, size = [b"*%d\r\n" % len(args)], 0
    for each in args:
        if isinstance(each, tuple):
            length = sum(map(len, each))
            size += length
            parts += (b"$%d\r\n" % length, *each, b"\r\n")
            continue
        if isinstance(each, str):
            each = each.encode()
        elif isinstance(each, int):
            each = b"%d" % each
        size += len(each)
        if len(each) > SMALL_BYTES:
            parts += (b"$%d\r\n" % len(each), each, b"\r\n")
        else:
            parts.append(b"$%d\r\n%b\r\n" % (len(each), each))
    return parts if size > SMALL_BYTES else [b"".join(parts)], size
