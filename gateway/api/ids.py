"""The names of requests: ``req_`` and 96 random bits."""

from __future__ import annotations

import os

ID_BYTES = 12
BLOCK_BYTES = 341 * ID_BYTES
"""4 KB, for 341 ids."""


class RequestIds:
    """Makes them from blocks of random bytes. A system call for each would let go of the GIL, and
    then wait for it behind whatever thread is busy: 300 us at 32 connections, for 12 bytes.

    A process that was forked begins a block of its own: no name is ever given twice.
    """

    def __init__(self) -> None:
        self._pid = 0
        self._block = ""
        self._at = 0

    def new(self) -> str:
        at = self._at
        if at == len(self._block) or self._pid != os.getpid():
            self._pid, self._block, at = os.getpid(), os.urandom(BLOCK_BYTES).hex(), 0
        self._at = at + 2 * ID_BYTES
        return f"req_{self._block[at : self._at]}"
