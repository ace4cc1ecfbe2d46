"""Content encodings undone as they stream: no socket, bounded pieces."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Protocol

from gateway.upstream.wire import Lost, Reason

PIECE_BYTES = 256 * 1024
"""The most that one step inflates to: a bomb is noticed piece by piece, not after it burst."""

_ZLIB_OR_GZIP = 32 + zlib.MAX_WBITS
_RAW = -zlib.MAX_WBITS


class Inflater:
    """gzip, or deflate with or without zlib's wrapping. Members may follow each other."""

    def __init__(self, max_bytes: int) -> None:
        """``max_bytes`` bounds the sum of what is inflated."""
        self._max_bytes = max_bytes
        self._sum = 0
        self._stream: _Stream = zlib.decompressobj(_ZLIB_OR_GZIP)
        self._begun = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What ``data`` inflates to, in pieces. Raises ``Lost`` (encoding, too_large)."""
        while data:
            if self._stream.eof:  # another member, or padding
                data = data.lstrip(b"\0")
                if not data:
                    return
                self._stream = zlib.decompressobj(_ZLIB_OR_GZIP)
            piece = self._step(data)
            self._begun = True
            self._sum += len(piece)
            if self._sum > self._max_bytes:
                raise Lost(Reason.TOO_LARGE, "the answer is too large")
            data = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail
            if piece:
                yield piece

    def end(self) -> None:
        """Raises ``Lost`` (truncated) if the stream has not come to its end."""
        if self._begun and not self._stream.eof:
            raise Lost(Reason.TRUNCATED, "the compressed answer is cut short")

    def _step(self, data: bytes) -> bytes:
        try:
            return self._stream.decompress(data, PIECE_BYTES)
        except zlib.error as error:
            if not self._begun:
                self._stream = zlib.decompressobj(_RAW)
                try:
                    return self._stream.decompress(data, PIECE_BYTES)
                except zlib.error:
                    pass
            raise Lost(Reason.ENCODING, "the answer's compression is damaged") from error


class _Stream(Protocol):
    """zlib's own type has no name that can be written."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    @property
    def unconsumed_tail(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int = ..., /) -> bytes: ...
