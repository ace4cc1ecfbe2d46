"""What things cost: dated prices, the bound before a call, the cost after it.

A new kind of price is one file beside this one (``price_tokens``, ``price_images``) and one line
in ``gateway/pricefile.py``, the loader of ``config/prices.yaml``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import Protocol

from gateway.domain.call import Call, Usage
from gateway.domain.money import Money
from gateway.domain.record import record

OPEN = frozenset({"", "auto"})
"""Sizes and qualities that leave the choice to the provider."""

OLD_QUALITIES: Mapping[str, str] = {"standard": "medium", "hd": "high"}
"""Deprecated names (contract 1.2), for a price that does not list them itself."""

FORMATS = frozenset({"png", "webp", "jpeg", "gif", "svg"})
"""What contract 1.2 lists. Another ``output_format`` is priced at the model's worst case."""

_SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")


@lru_cache(maxsize=256)
def parse_size(text: str) -> tuple[int, int] | None:
    """``"1536x1024"`` -> width and height in pixels; None for anything else."""
    found = _SIZE.fullmatch(text)
    return (int(found[1]), int(found[2])) if found else None


class Confidence(StrEnum):
    """HARD: the call cannot cost more. SOFT: the provider does not publish enough to be sure."""

    HARD = "hard"
    SOFT = "soft"


@record
class Bound:
    """The most a call can cost, in nano-dollars."""

    amount: Money
    confidence: Confidence


@record
class Answer:
    """What is known of an answer, for its cost.

    ``images`` were delivered. ``size``, ``quality`` and ``output_format`` are as the answer says,
    or as they were asked for where it does not; empty where neither is known, and then the
    dearest. ``input_images`` came with the request; None is not known. ``text_usage`` is what the
    text model of a response used, beside ``usage``, which is that of its pictures.
    """

    images: int
    usage: Usage | None = None
    size: str = ""
    quality: str = ""
    output_format: str = ""
    input_images: int | None = None
    text_usage: Usage | None = None

    @property
    def tokens(self) -> Usage | None:
        """All that it used, of whichever model; None where it does not say."""
        if self.usage is None or self.text_usage is None:
            return self.usage or self.text_usage
        return self.usage + self.text_usage


@dataclass(frozen=True, slots=True)
class BySize:
    """Amounts (tokens or nano-dollars) per picture: size -> quality -> amount.

    Size ``default`` stands for every size not listed, quality ``any`` for every quality.
    """

    cells: Mapping[str, Mapping[str, int]]

    def most(self, size: str, quality: str) -> tuple[int, bool]:
        """The largest amount that applies, and whether it is sure.

        What is left open is the largest listed. A size or quality that is not listed is the
        largest of all, and not sure.
        """
        row = self.cells.get(size) or self.cells.get("default")
        if size in OPEN:
            rows = list(self.cells.values())
        elif row is not None:
            rows = [row]
        else:
            return self.largest, False
        if quality in OPEN:
            return max(max(row.values()) for row in rows), True
        names = (quality, OLD_QUALITIES.get(quality, quality), "any")
        found = [next((row[name] for name in names if name in row), None) for row in rows]
        amounts = [amount for amount in found if amount is not None]
        # With an open size, a row that lacks the quality just cannot be what was chosen.
        return (max(amounts), True) if amounts else (self.largest, False)

    @property
    def largest(self) -> int:
        return max(max(row.values()) for row in self.cells.values())


FACTOR_ONE = 1_000_000
"""Factors of bounds are counted in millionths."""


def raised(bound: Bound, factor: int) -> Bound:
    """A bound times what its model was seen to need (money.md 7, rule 5), rounded up. It is SOFT
    then: what was sure has been passed once."""
    if factor <= FACTOR_ONE:
        return bound
    return Bound(-(-bound.amount * factor // FACTOR_ONE), Confidence.SOFT)


class CannotPrice(Exception):
    """This call has no bound: the message says which parameter, and what to do."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class Price(Protocol):
    """How one model is billed."""

    def bound(self, call: Call, prices: PriceList) -> Bound:
        """The most ``call`` can cost. Raises ``CannotPrice``."""

    def likely(self, call: Call, prices: PriceList) -> Money | None:
        """What ``call``, which has a bound, will probably cost; None where the call or the price
        leaves too much open."""

    def cost(self, answer: Answer, prices: PriceList) -> Money | None:
        """What ``answer`` cost, or None where it does not say enough (no usage)."""

    def knows(self, size: str, quality: str) -> bool:
        """Whether a picture of this size and quality has a sure price."""


@dataclass(frozen=True)
class PriceRow:
    """One dated price, with where it was read.

    ``provider`` is whose list it is on (``openai``), or the name of one upstream where the
    operator set it, which is then an ``own`` row: an upstream may be called ``openai`` as well.
    ``shuts_down`` is the day the provider stops serving the model, ``replacement`` the model of
    the same list that takes its place; empty where none is named.
    """

    provider: str
    model: str
    valid_from: date
    source: str
    price: Price
    shuts_down: date | None = None
    own: bool = False
    replacement: str = ""
    beside: PriceRow | None = None
    """Of a response: the row of the model that draws its pictures."""

    def retired(self, day: date) -> bool:
        """Whether the model is not served any more on a (UTC) day."""
        return self.shuts_down is not None and self.shuts_down <= day

    @cached_property
    def id(self) -> str:
        """The name in the ledger: ``openai/gpt-image-2@2026-04-21``, ``own:comet/...``; of a
        response those of its two models, with a plus sign between them."""
        whose = f"own:{self.provider}" if self.own else self.provider
        own = f"{whose}/{self.model}@{self.valid_from.isoformat()}"
        return own if self.beside is None else f"{own}+{self.beside.id}"


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
    """Every dated row. An upstream's own rows go before those of its provider.

    ``compiled`` is the day on which somebody last looked all of them up; None is not known.
    """

    def __init__(self, rows: Iterable[PriceRow], compiled: date | None = None) -> None:
        self.compiled = compiled
        # The last of a model wins: the operator's after the list's, the newer after the older.
        self._rows = tuple(sorted(rows, key=lambda row: (row.own, row.valid_from)))
        self._lists: dict[tuple[str, str, date], PriceList] = {}

    def of(self, upstream: str, provider: str, day: date) -> PriceList:
        """What an upstream charges on a day, when its list is ``provider``'s."""
        wanted = (upstream, provider, day)
        if wanted not in self._lists:
            if len(self._lists) >= 256:
                self._lists.clear()
            valid = [row for row in self._rows if row.valid_from <= day]
            general = {row.model: row for row in valid if row.provider == provider and not row.own}
            own = {row.model: row for row in valid if row.provider == upstream and row.own}
            self._lists[wanted] = PriceList(general | own)
        return self._lists[wanted]
