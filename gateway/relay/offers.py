"""What a configured model is on a day: where it is served, at what price, and until when. It is the
same for all calls, so it is worked out once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date
from typing import NamedTuple

from gateway.domain.price import PriceBook, PriceList, PriceRow
from gateway.domain.route import Model, Target
from gateway.ports import Upstream
from gateway.relay.plan_response import is_text_model

MAX_REMEMBERED = 1000
"""Models: behind the wildcard each call has one of its own, that nobody asks for again."""


class Place(NamedTuple):
    """One of a model's targets. ``row`` is its price among ``prices``, those of its upstream; None
    where it has none. ``retired``: it is served there no more."""

    target: Target
    upstream: Upstream
    prices: PriceList
    row: PriceRow | None
    retired: bool


class Offer(NamedTuple):
    """A model on a day.

    ``row`` is its price at the first of its upstreams that has one and still serves it. ``last`` is
    the price of the target that ends last, where all of them end; ``over``: it has ended.
    """

    model: Model
    places: tuple[Place, ...]
    row: PriceRow | None
    last: PriceRow | None
    over: bool
    only_writes: bool
    """A model of text: it draws nothing."""


class Offers:
    """The models that are configured, and all that they are served at."""

    def __init__(self, upstreams: Mapping[str, Upstream], prices: PriceBook) -> None:
        self._upstreams = upstreams
        self._prices = prices
        self._offers: dict[int, Offer] = {}
        self._day: date | None = None

    def of(self, model: Model, today: date) -> Offer:
        """As it is today. A call asks for that of its model five times (0.2 us each, not 2)."""
        if self._day != today:
            self._offers, self._day = {}, today
        # By identity: to hash a model takes longer than all of this.
        known = self._offers.get(id(model))
        if known is None or known.model is not model:
            if len(self._offers) >= MAX_REMEMBERED:
                self._offers.clear()
            known = self._offers[id(model)] = self._look_up(model, today)
        return known

    def place(self, target: Target, today: date) -> Place:
        """What is known of a target."""
        upstream = self._upstreams[target.upstream]
        prices = self._prices.of(upstream.name, upstream.provider, today)
        row = prices.find(target.model)
        return Place(target, upstream, prices, row, row is not None and row.retired(today))

    def lists(self, today: date) -> Iterable[PriceList]:
        """What every configured upstream charges."""
        for upstream in self._upstreams.values():
            yield self._prices.of(upstream.name, upstream.provider, today)

    def _look_up(self, model: Model, today: date) -> Offer:
        places = tuple(self.place(target, today) for target in model.targets)
        rows = [place.row for place in places if place.row is not None]
        serving = (row for row in rows if not row.retired(today))
        ending = [(row.shuts_down, row) for row in rows if row.shuts_down is not None]
        last = max(ending, key=lambda one: one[0])[1] if len(ending) == len(places) else None
        row = next(serving, rows[0] if rows else None)
        return Offer(
            model,
            places,
            row,
            last,
            last is not None and last.retired(today),
            row is not None and is_text_model(row),
        )
