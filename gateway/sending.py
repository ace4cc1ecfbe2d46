"""How what stands in memory gets into a socket: by whichever way costs this machine less."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from statistics import median

from gateway.ports import OpenFile

REMEMBERED = 9
"""So many costs of each way decide."""
LEARNS_FROM_BYTES = 64 * 1024
ASKED_AGAIN = 64
"""Once in so many times the other way is measured: machines have hours."""


class _Way:
    """What a thousand bytes cost, by one way."""

    def __init__(self) -> None:
        self._costs: deque[float] = deque(maxlen=REMEMBERED)
        self.cost = 0.0

    @property
    def is_known(self) -> bool:
        return len(self._costs) == REMEMBERED

    def learn(self, cost: float) -> None:
        self._costs.append(cost)
        self.cost = median(self._costs)


class Sender:
    """Sends files that are in memory.

    ``os.sendfile`` hands the socket the very pages, and copies nothing; but it does so 64 KB at a
    time, and each time wakes who reads. One ``writev`` copies, and wakes less often. Neither is
    always better: of 2.7 MB on loopback the first takes 1.5 times as much CPU as the second on one
    machine, two thirds as much on another, and with a network card it depends on the card. So both
    are measured as they are used. ``cpu_ns`` is the CPU time of this thread.
    """

    def __init__(self, cpu_ns: Callable[[], int] = time.thread_time_ns) -> None:
        self._cpu_ns = cpu_ns
        self._by_reference = _Way()
        self._by_copy = _Way()
        self._sent = 0

    def send(self, out: int, head: bytes, file: OpenFile, at: int, size: int) -> int:
        """How many bytes of ``head``, and of the file behind it, the socket took. Raises
        ``OSError`` where it takes none."""
        if file.content is None:
            return _send_pages(out, head, file, at, size)
        way = self._choose()
        send = _send_pages if way is self._by_reference else _send_bytes
        began = self._cpu_ns()
        sent = send(out, head, file, at, size)
        if sent >= LEARNS_FROM_BYTES:
            way.learn((self._cpu_ns() - began) / sent)
        return sent

    def _choose(self) -> _Way:
        self._sent += 1
        cheaper, dearer = self._by_reference, self._by_copy
        if dearer.cost < cheaper.cost:
            cheaper, dearer = dearer, cheaper
        if not (cheaper.is_known and dearer.is_known):
            return self._by_copy if self._sent % 2 else self._by_reference
        return dearer if self._sent % ASKED_AGAIN == 0 else cheaper


def _send_pages(out: int, head: bytes, file: OpenFile, at: int, size: int) -> int:
    written = os.write(out, head) if head else 0
    if written < len(head):
        return written
    try:
        return written + os.sendfile(out, file.fd, at, size)
    except OSError:
        if not written:
            raise
        return written


def _send_bytes(out: int, head: bytes, file: OpenFile, at: int, size: int) -> int:
    assert file.content is not None
    with memoryview(file.content) as content, content[at : at + size] as part:
        return os.writev(out, (head, part)) if head else os.write(out, part)
