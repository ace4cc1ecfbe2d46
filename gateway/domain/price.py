"""What things cost: dated prices, the bound before a call, the cost after it.

A new kind of price is one file beside this one (``price_tokens``, ``price_images``) and one line
in the loader of ``config/prices.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from typing import Protocol

from gateway.domain.call import Call, Usage
from gateway.domain.money import Money


class Confidence(StrEnum):
    """HARD: the call cannot cost more. SOFT: the provider does not publish enough to be sure."""

    HARD = "hard"
    SOFT = "soft"


@dataclass(frozen=True, slots=True)
class Bound:
    """The most a call can cost, in nano-dollars."""

    amount: Money
    confidence: Confidence


@dataclass(frozen=True, slots=True)
class Answer:
    """What an answer said of itself, for its cost: pictures delivered, size and quality."""

    images: int
    usage: Usage | None = None
    size: str = ""
    quality: str = ""


class CannotPrice(Exception):
    """This call has no bound: the message says which parameter, and what to do."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class Price(Protocol):
    """How one model is billed."""

    def bound(self, call: Call, prices: PriceList) -> Bound:
        """The most ``call`` can cost. Raises ``CannotPrice``."""

    def cost(self, answer: Answer, prices: PriceList) -> Money | None:
        """What ``answer`` cost, or None where it does not say enough (no usage)."""


@dataclass(frozen=True, slots=True)
class PriceRow:
    """One dated price, with where it was read.

    ``provider`` is whose list it is on (``openai``), or the name of one upstream where the
    operator set it. ``shuts_down`` is the day the provider stops serving the model.
    """

    provider: str
    model: str
    valid_from: date
    source: str
    price: Price
    shuts_down: date | None = None

    @property
    def id(self) -> str:
        return f"{self.provider}/{self.model}@{self.valid_from.isoformat()}"


@dataclass(frozen=True, slots=True)
class PriceList:
    """The rows that apply at one upstream on one day, by the model's name there.

    A plan keeps its list until its call is settled, so a reload cannot change a running call.
    """

    rows: Mapping[str, PriceRow]

    def find(self, model: str) -> PriceRow | None:
        """The row of a model; None is unpriced, which is never the same as free."""
        return self.rows.get(model)


class PriceBook:
    """Every dated row. An upstream's own rows go before those of its provider."""

    def __init__(self, rows: Iterable[PriceRow]) -> None:
        self._rows = tuple(sorted(rows, key=lambda row: row.valid_from))
        self._lists: dict[tuple[str, str, date], PriceList] = {}

    def of(self, upstream: str, provider: str, day: date) -> PriceList:
        """What an upstream charges on a day, when its list is ``provider``'s."""
        wanted = (upstream, provider, day)
        if wanted not in self._lists:
            if len(self._lists) >= 256:
                self._lists.clear()
            valid = [row for row in self._rows if row.valid_from <= day]
            general = {row.model: row for row in valid if row.provider == provider}
            own = {row.model: row for row in valid if row.provider == upstream}
            self._lists[wanted] = PriceList(general | own)
        return self._lists[wanted]
