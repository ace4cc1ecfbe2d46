"""Models that their providers stop serving: a property of a price list and a name on it.

The same name may go on at an upstream with another list, so a model is over when the last of its
upstreams has ended it. Days are UTC: on ``shuts_down`` itself nothing is sent any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import TypeAlias

from gateway.domain.errors import ModelRetired
from gateway.domain.price import PriceRow
from gateway.domain.route import Catalogue, Model, Target
from gateway.domain.team import Caller

SUNSET_DAYS = 30
"""So long before its end the answers of a model say so."""

RowOf: TypeAlias = Callable[[Target, date], PriceRow | None]
"""The price of a target on a day; None where it has none."""


@dataclass(frozen=True, slots=True)
class Sunset:
    """The end of a model that is still served: on ``day``, and what the caller may use instead;
    empty where that is not known."""

    model: str
    day: date
    replacement: str


class Retirements:
    """What ends when, as far as the price lists know."""

    def __init__(self, catalogue: Catalogue, row_of: RowOf) -> None:
        self._catalogue = catalogue
        self._row_of = row_of

    def end(self, model: Model, today: date) -> date | None:
        """The day on which the last of its upstreams stops serving a model, which may be past;
        None where one of them goes on, or is not known to stop."""
        row = self._last(model, today)
        return row.shuts_down if row else None

    def is_over(self, model: Model, today: date) -> bool:
        row = self._last(model, today)
        return row is not None and row.retired(today)

    def sunset(self, caller: Caller, model: Model, today: date) -> Sunset | None:
        """The end of a model, where it is near."""
        row = self._last(model, today)
        if row is None or row.shuts_down is None:
            return None
        if not 0 < (row.shuts_down - today).days <= SUNSET_DAYS:
            return None
        return Sunset(_named(model, row), row.shuts_down, self._instead(caller, row, today))

    def refusal(
        self, caller: Caller, model: Model, target: Target, today: date
    ) -> ModelRetired | None:
        """Why a model's target is none any more; None where it is one."""
        row = self._row_of(target, today)
        if row is None or not row.retired(today):
            return None
        instead = self._instead(caller, row, today)
        advice = f"Use {instead}." if instead else "GET /v1/models lists yours."
        return ModelRetired(
            f"{_named(model, row)} was shut down by {row.provider} on {row.shuts_down}. {advice}",
            param="model",
        )

    def _last(self, model: Model, today: date) -> PriceRow | None:
        """The price of the target that ends last, where all of them end."""
        ending = []
        for target in model.targets:
            row = self._row_of(target, today)
            if row is None or row.shuts_down is None:
                return None
            ending.append((row.shuts_down, row))
        return max(ending, key=lambda one: one[0])[1]

    def _instead(self, caller: Caller, row: PriceRow, today: date) -> str:
        """The name under which the caller may use what takes a model's place, if any."""
        wanted = row.replacement
        named = self._catalogue.find(wanted)
        # Behind the wildcard every name is a model; only one with a price is known to be served.
        if named is not None and self._row_of(named.target, today) is None:
            named = None
        served = [
            model
            for _, model in sorted(self._catalogue.models.items())
            if any(target.model == wanted for target in model.targets)
        ]
        for model in served if named is None else [named, *served]:
            if caller.may_use(model.name) and not self.is_over(model, today):
                return model.name
        return ""


def _named(model: Model, row: PriceRow) -> str:
    """A model as the client knows it, and as its provider does where that differs."""
    return model.name if model.name == row.model else f"{model.name} ({row.model})"
