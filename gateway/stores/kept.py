"""What every cache says of an entry it has: how long it has left to live."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.ports import Cached


@dataclass(frozen=True, slots=True)
class Kept(Cached):
    """A cached answer that knows the seconds it has left, so that a copy cannot outlive it."""

    left_seconds: float
