"""How much of a long story is told: a part of it in every run, all of it in `make soak`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final, TypeVar

T = TypeVar("T")

SOAK: Final = bool(os.environ.get("SOAK"))


def size(usual: T, whole: T) -> T:
    """``whole`` where there is time for it."""
    return whole if SOAK else usual


def some(ways: Sequence[T], turn: int, step: int) -> list[T]:
    """Every ``step``-th of ``ways``, counted from ``turn``: of so many turns in a row each way is
    met. All of them in a soak."""
    return [way for place, way in enumerate(ways) if SOAK or (place + turn) % step == 0]
