"""A text that does not show itself."""

from __future__ import annotations

import hmac
from typing import NoReturn


class Secret:
    """A text that does not show itself: ``repr``, ``str`` and ``format`` give ``***``.

    ``reveal`` is for the one place that needs the value. Comparing takes the same time wherever
    two values differ. It cannot be pickled; a copy is the same object.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return "***"

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(_octets(self._value), _octets(other._value))

    __hash__ = None  # type: ignore[assignment]

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not pickled")


def _octets(value: str) -> bytes:
    return value.encode("utf-8", "surrogatepass")
