"""Models that their providers stop serving: a property of a price list and a name on it.

The same name may go on at an upstream with another list, so a model is over when the last of its
upstreams has ended it. Days are UTC: on ``shuts_down`` itself nothing is sent any more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from difflib import get_close_matches

from gateway.domain.errors import ModelRetired
from gateway.domain.price import PriceRow
from gateway.domain.route import Catalogue, Model, Target
from gateway.domain.team import Caller
from gateway.relay.offers import Offers
from gateway.relay.plan_response import is_text_model

SUNSET_DAYS = 30
"""So long before its end the answers of a model say so."""


@dataclass(frozen=True, slots=True)
class Sunset:
    """The end of a model that is still served: on ``day``, and what the caller may use instead;
    empty where that is not known."""

    model: str
    day: date
    replacement: str


class Retirements:
    """What ends when, as far as the price lists know."""

    def __init__(self, catalogue: Catalogue, offers: Offers) -> None:
        self._catalogue = catalogue
        self._offers = offers

    def end(self, model: Model, today: date) -> date | None:
        """The day on which the last of its upstreams stops serving a model, which may be past;
        None where one of them goes on, or is not known to stop."""
        row = self._offers.of(model, today).last
        return row.shuts_down if row else None

    def is_over(self, model: Model, today: date) -> bool:
        return self._offers.of(model, today).over

    def sunset(self, caller: Caller, model: Model, today: date) -> Sunset | None:
        """The end of a model, where it is near."""
        row = self._offers.of(model, today).last
        if row is None or row.shuts_down is None:
            return None
        if not 0 < (row.shuts_down - today).days <= SUNSET_DAYS:
            return None
        return Sunset(_named(model, row), row.shuts_down, self._instead(caller, row, today))

    def over(self, caller: Caller, model: Model, today: date) -> ModelRetired | None:
        """Why a model is served no more; None where it is."""
        if not self.is_over(model, today):
            return None
        return self.refusal(caller, model, model.target, today)

    def refusal(
        self, caller: Caller, model: Model, target: Target, today: date
    ) -> ModelRetired | None:
        """Why a model's target is none any more; None where it is one."""
        row = self._row_of(target, today)
        if row is None or not row.retired(today):
            return None
        return self._refused(caller, _named(model, row), row, today)

    def of_name(self, caller: Caller, name: str, today: date) -> ModelRetired | None:
        """Why a name that no entry routes leads nowhere: every list that knows it has ended it.
        None where none knows it, or one goes on."""
        rows = self._rows(name, today)
        if not rows or not all(row.retired(today) for row in rows):
            return None
        row = max(rows, key=lambda row: row.shuts_down or date.min)
        return self._refused(caller, name, row, today)

    def _refused(self, caller: Caller, named: str, row: PriceRow, today: date) -> ModelRetired:
        if instead := self._instead(caller, row, today):
            advice = f"Use {instead}."
        elif another := self._another(caller, row, today):
            advice = f"You may use {another}. GET /v1/models lists yours."
        else:
            advice = "GET /v1/models lists yours."
        return ModelRetired(
            f"{named} was shut down by {row.provider} on {row.shuts_down}. {advice}", param="model"
        )

    def _row_of(self, target: Target, today: date) -> PriceRow | None:
        return self._offers.place(target, today).row

    def _instead(self, caller: Caller, row: PriceRow, today: date) -> str:
        """The name under which the caller may use what takes a model's place, if any. What takes
        it may end in its turn: then one that does not goes first."""
        found: list[Model] = []
        wanted, seen = row.replacement, {""}
        while wanted not in seen:
            seen.add(wanted)
            found += self._served_as(wanted, today)
            wanted = next((one.replacement for one in self._rows(wanted, today)), "")
        usable = [model for model in found if caller.may_use(model.name)]
        return next((model.name for model in self._lasting_first(usable, today)), "")

    def _rows(self, name: str, today: date) -> list[PriceRow]:
        """What the configured upstreams' lists say of a name."""
        found = (prices.find(name) for prices in self._offers.lists(today))
        return [row for row in found if row is not None]

    def _served_as(self, name: str, today: date) -> list[Model]:
        """The models of that name, configured or at their upstreams."""
        named = self._catalogue.find(name)
        # Behind the wildcard every name is a model; only one with a price is known to be served.
        if named is not None and self._row_of(named.target, today) is None:
            named = None
        served = [
            model
            for _, model in sorted(self._catalogue.models.items())
            if any(target.model == name for target in model.targets)
        ]
        return served if named is None else [named, *served]

    def _another(self, caller: Caller, row: PriceRow, today: date) -> str:
        """One of the caller's own that does the same work, where it may not use what takes a
        model's place: the one with the most similar name."""
        alike = []
        for model in self._catalogue.permitted(caller.may_use):
            own = self._row_of(model.target, today)
            if own is not None and is_text_model(own) == is_text_model(row):
                alike.append(model)
        serving = self._lasting_first(alike, today)
        lasting = [model.name for model in serving if self.end(model, today) is None]
        names = lasting or [model.name for model in serving]
        near = get_close_matches(row.replacement or row.model, names, n=1, cutoff=0.0)
        return near[0] if near else ""

    def _lasting_first(self, models: Iterable[Model], today: date) -> list[Model]:
        """Those that are still served, and of these before all others those that go on."""
        serving = [model for model in models if not self.is_over(model, today)]
        return sorted(serving, key=lambda model: self.end(model, today) is not None)


def _named(model: Model, row: PriceRow) -> str:
    """A model as the client knows it, and as its provider does where that differs."""
    return model.name if model.name == row.model else f"{model.name} ({row.model})"
