"""The search for a few bytes in many, where they lie: by the C library, where it has ``memmem``.

``bytearray.find`` has no more than its own two ways, of which the fast one is taken below 30,000
bytes alone (``multipart.py``). In pictures glibc's is two to three times faster, in one call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TypeAlias

Search: TypeAlias = Callable[[bytearray, bytes, int, int], int]
"""Where a needle begins first in a buffer, from one place on, and before another; -1 where it does
not. As ``bytearray.find``."""


def system_search() -> Search | None:
    """None where the system has none."""
    try:
        # Not CDLL, which lets go of the interpreter for 50 us, and waits until it has it again.
        memmem = ctypes.PyDLL(None).memmem
    except (AttributeError, OSError, TypeError):  # the last is what Windows makes of None
        return None
    memmem.restype = ctypes.c_void_p
    memmem.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t)

    def search(buffer: bytearray, needle: bytes, start: int, end: int) -> int:
        if not 0 <= start < end <= len(buffer):
            return buffer.find(needle, start, end)
        # As long as this lives the buffer is where it is.
        held = ctypes.c_char.from_buffer(buffer)
        begin = ctypes.addressof(held)
        found: int | None = memmem(begin + start, end - start, needle, len(needle))
        return -1 if found is None else found - begin

    return search
