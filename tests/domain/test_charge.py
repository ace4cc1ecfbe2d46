"""What a call owes, for every ending under every kind of quote."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from datetime import date

import pytest

from gateway.domain.call import Call, SvgUsage, Usage
from gateway.domain.charge import Ending, Quote, charge
from gateway.domain.ledger import Basis, Event, Outcome, Part, Settlement
from gateway.domain.money import Money
from gateway.domain.price import (
    Answer,
    Bound,
    BySize,
    Confidence,
    Price,
    PriceList,
    PriceRow,
)
from gateway.domain.price_images import ImagePrice
from gateway.domain.price_response import ResponsePrice
from gateway.domain.price_tokens import TokenPrice

BOUND = 1000
LITTLE = Usage(text_in=2, image_out=9)
"""Costs 2 + 9 x 10 = 92 by the token."""
MUCH = Usage(image_out=101)
"""Costs 1010, over the bound."""
HARD, SOFT = Confidence.HARD, Confidence.SOFT
NOTHING = PriceList({})


@dataclass(frozen=True)
class Free:
    """A price that measures everything at nothing."""

    def bound(self, call: Call, prices: PriceList) -> Bound:
        return Bound(0, HARD)

    def likely(self, call: Call, prices: PriceList) -> Money | None:
        return None

    def cost(self, answer: Answer, prices: PriceList) -> Money | None:
        return 0

    def knows(self, size: str, quality: str) -> bool:
        return True


TOKENS = TokenPrice(text_in=1, image_out=10)
IMAGES = ImagePrice(BySize({"default": {"any": 300}}))


def quote(price: Price | None, confidence: Confidence = HARD, bound: Money = BOUND) -> Quote:
    row = None if price is None else PriceRow("openai", "m", date(2026, 1, 1), "list", price)
    return Quote(Bound(bound, confidence), NOTHING, row)


def owed(quoted: Quote, ending: Ending) -> Settlement:
    settlement = charge("r", quoted, ending)
    assert (settlement.rid, settlement.outcome) == ("r", ending.outcome)
    return settlement


def booked(settlement: Settlement) -> tuple[Event, Basis, Money, tuple[str, ...]]:
    return settlement.event, settlement.basis, settlement.cost, settlement.flags


# price, usage, pictures, invalid usage -> basis, cost, flags; the event is always SETTLE.
ANSWERED: list[tuple[Price | None, Usage | None, int, bool, Basis, Money, tuple[str, ...]]] = [
    (TOKENS, LITTLE, 1, False, Basis.USAGE, 92, ()),
    (TOKENS, MUCH, 1, False, Basis.USAGE, 1010, ("over_bound",)),
    (TOKENS, None, 1, False, Basis.ESTIMATED, BOUND, ("no_usage",)),
    (TOKENS, None, 1, True, Basis.ESTIMATED, BOUND, ("invalid_usage",)),
    (TOKENS, LITTLE, 0, False, Basis.USAGE, 92, ()),
    (TOKENS, None, 0, False, Basis.ESTIMATED, BOUND, ("no_usage",)),
    (IMAGES, LITTLE, 2, False, Basis.USAGE, 600, ()),
    (IMAGES, None, 2, False, Basis.ESTIMATED, 600, ()),
    (IMAGES, None, 2, True, Basis.ESTIMATED, 600, ("invalid_usage",)),
    (IMAGES, None, 4, False, Basis.ESTIMATED, 1200, ("over_bound",)),
    (IMAGES, None, 0, False, Basis.ESTIMATED, BOUND, ("no_usage",)),
    # A usage that the price cannot turn into dollars is as good as none.
    (IMAGES, LITTLE, 0, False, Basis.ESTIMATED, BOUND, ("no_usage",)),
    (TOKENS, Usage(image_in=5), 1, False, Basis.ESTIMATED, BOUND, ("no_usage",)),
    (TOKENS, Usage(svg=SvgUsage("gpt", 1, 1)), 1, False, Basis.ESTIMATED, BOUND, ("no_usage",)),
    (Free(), LITTLE, 1, False, Basis.USAGE, 0, ()),
    (Free(), None, 1, False, Basis.ESTIMATED, 0, ()),
    # Without a price the bound is the operator's own figure, and the best that is known.
    (None, LITTLE, 1, False, Basis.ESTIMATED, BOUND, ("unpriced",)),
    (None, None, 1, False, Basis.ESTIMATED, BOUND, ("unpriced",)),
    (None, None, 1, True, Basis.ESTIMATED, BOUND, ("unpriced",)),
]


@pytest.mark.parametrize("confidence", [HARD, SOFT])
@pytest.mark.parametrize("outcome", [Outcome.DELIVERED, Outcome.BROKEN])
@pytest.mark.parametrize(
    ("price", "usage", "images", "invalid", "basis", "cost", "flags"), ANSWERED
)
def test_an_answer_is_settled(
    price: Price | None,
    usage: Usage | None,
    images: int,
    invalid: bool,
    basis: Basis,
    cost: Money,
    flags: tuple[str, ...],
    outcome: Outcome,
    confidence: Confidence,
) -> None:
    ending = Ending(outcome, Answer(images, usage), invalid)
    settlement = owed(quote(price, confidence), ending)
    soft = ("soft",) if confidence is SOFT else ()
    assert booked(settlement) == (Event.SETTLE, basis, cost, (*soft, *flags))
    assert settlement.usage == (usage or Usage())
    assert settlement.images == (images if outcome is Outcome.DELIVERED else 0)


@pytest.mark.parametrize("price", [TOKENS, IMAGES, None])
@pytest.mark.parametrize("confidence", [HARD, SOFT])
@pytest.mark.parametrize("answer", [None, Answer(1, LITTLE)])
@pytest.mark.parametrize("invalid", [False, True])
def test_what_was_surely_not_billed_owes_nothing(
    price: Price | None, confidence: Confidence, answer: Answer | None, invalid: bool
) -> None:
    settlement = owed(quote(price, confidence), Ending(Outcome.REFUSED, answer, invalid))
    assert settlement == Settlement("r", Event.VOID, Outcome.REFUSED, Basis.NONE)


@pytest.mark.parametrize("price", [TOKENS, IMAGES, None])
@pytest.mark.parametrize("confidence", [HARD, SOFT])
@pytest.mark.parametrize("answer", [None, Answer(1, LITTLE)])
def test_an_unknown_outcome_expires_at_the_bound(
    price: Price | None, confidence: Confidence, answer: Answer | None
) -> None:
    settlement = owed(quote(price, confidence), Ending(Outcome.UNKNOWN, answer))
    soft = ("soft",) if confidence is SOFT else ()
    unpriced = () if price else ("unpriced",)
    flags = (*soft, *unpriced)
    assert booked(settlement) == (Event.EXPIRE, Basis.ESTIMATED, BOUND, flags)
    assert (settlement.usage, settlement.images) == (Usage(), 0)


@pytest.mark.parametrize("price", [TOKENS, None])
def test_work_was_done_and_nothing_said_is_settled_at_the_bound(price: Price | None) -> None:
    settlement = owed(quote(price), Ending(Outcome.BROKEN))
    flags = ("no_usage",) if price else ("unpriced",)
    assert booked(settlement) == (Event.SETTLE, Basis.ESTIMATED, BOUND, flags)


def test_an_allowed_model_without_a_price_books_nothing_but_is_flagged() -> None:
    ending = Ending(Outcome.DELIVERED, Answer(1, LITTLE))
    settlement = owed(quote(None, SOFT, bound=0), ending)
    assert booked(settlement) == (Event.SETTLE, Basis.NONE, 0, ("soft", "unpriced"))
    assert settlement.usage == LITTLE


EVERY = list(
    itertools.product(
        [Outcome.DELIVERED, Outcome.BROKEN, Outcome.REFUSED, Outcome.UNKNOWN],
        [TOKENS, IMAGES, Free(), None],
        [None, LITTLE, MUCH],
        [0, 1, 4],
        [False, True],
        [HARD, SOFT],
    )
)


@pytest.mark.parametrize("bound", [0, BOUND])
def test_no_combination_breaks_the_rules(bound: Money) -> None:
    known = {"unpriced", "no_usage", "invalid_usage", "over_bound", "soft"}
    for outcome, price, usage, images, invalid, confidence in EVERY:
        ending = Ending(outcome, Answer(images, usage), invalid)
        settlement = owed(quote(price, confidence, bound), ending)
        assert set(settlement.flags) <= known
        assert len(settlement.flags) == len(set(settlement.flags))
        assert (settlement.event is Event.VOID) == (outcome is Outcome.REFUSED)
        assert (settlement.event is Event.EXPIRE) == (outcome is Outcome.UNKNOWN)
        assert settlement.cost >= 0
        assert ("over_bound" in settlement.flags) == (settlement.cost > bound)
        if settlement.event is Event.VOID:
            continue
        assert ("soft" in settlement.flags) == (confidence is SOFT)
        assert ("unpriced" in settlement.flags) == (price is None)
        if settlement.event is Event.EXPIRE:
            assert settlement.cost == bound
        elif settlement.cost == bound and settlement.basis is not Basis.USAGE and price is TOKENS:
            # The bound in place of a measure is always marked as doubtful.
            assert set(settlement.flags) & {"unpriced", "no_usage", "invalid_usage"}


@pytest.mark.parametrize(("price", "name"), [(TOKENS, "openai/m@2026-01-01"), (None, "")])
def test_a_quote_names_its_price(price: Price | None, name: str) -> None:
    assert quote(price).price_id == name


WROTE = Usage(text_in=4, text_out=3)
"""Costs 4 + 3 x 2 = 10."""
WRITES = TokenPrice(text_in=1, text_out=2, max_output_tokens=100)


@pytest.mark.parametrize(
    ("picture", "answer", "invalid", "cost", "drawn"),
    [
        (TOKENS, Answer(1, LITTLE, text_usage=WROTE), False, 102, Part("art", 1, 92, LITTLE)),
        (IMAGES, Answer(2, LITTLE, text_usage=WROTE), False, 610, Part("art", 2, 600, LITTLE)),
        (IMAGES, Answer(2, None, text_usage=WROTE), False, 610, Part("art", 2, 600)),
        (TOKENS, Answer(1, MUCH, text_usage=WROTE), False, 1020, Part("art", 1, 1010, MUCH)),
        # It drew, and delivered nothing: it is on the bill.
        (TOKENS, Answer(0, LITTLE, text_usage=WROTE), False, 102, Part("art", 0, 92, LITTLE)),
        (TOKENS, Answer(0, None, text_usage=WROTE), False, 10, None),
        # Nobody measured it: the bound is of both, the pictures were seen.
        (TOKENS, Answer(1, None, text_usage=WROTE), False, BOUND, Part("art", 1)),
        (TOKENS, Answer(1, LITTLE), False, BOUND, Part("art", 1, 0, LITTLE)),
        (TOKENS, Answer(1), True, BOUND, Part("art", 1)),
        (TOKENS, Answer(0), False, BOUND, None),
    ],
)
def test_a_response_has_a_part_for_each_of_its_models(
    picture: Price, answer: Answer, invalid: bool, cost: Money, drawn: Part | None
) -> None:
    asked = replace(quote(ResponsePrice(WRITES, picture)), draws="art")
    settlement = owed(asked, Ending(Outcome.DELIVERED, answer, invalid))
    assert (settlement.cost, settlement.drawn) == (cost, drawn)
    assert settlement.images == answer.images
    assert settlement.usage == (answer.tokens or Usage())
    # One that failed has delivered nothing, and owes the same.
    broken = owed(asked, Ending(Outcome.BROKEN, answer, invalid))
    assert broken.cost == cost
    assert broken.drawn == (None if drawn is None else replace(drawn, images=0))
    for outcome in (Outcome.UNKNOWN, Outcome.REFUSED):
        assert owed(asked, Ending(outcome, answer)).drawn is None


def test_without_a_price_the_bound_stays_with_the_model_that_was_asked() -> None:
    asked = replace(quote(None, SOFT, bound=50), draws="art")
    settlement = owed(asked, Ending(Outcome.DELIVERED, Answer(1, LITTLE, text_usage=WROTE)))
    assert (settlement.cost, settlement.drawn) == (50, Part("art", 1, 0, LITTLE))


def test_a_response_without_an_image_tool_is_one_models() -> None:
    answer = Answer(0, None, text_usage=WROTE)
    settlement = owed(quote(ResponsePrice(WRITES, None)), Ending(Outcome.DELIVERED, answer))
    assert (settlement.cost, settlement.drawn) == (10, None)


@pytest.mark.parametrize(("cost", "part"), [(5, 6), (5, -1), (0, 1)])
def test_a_part_is_no_more_than_the_whole(cost: Money, part: Money) -> None:
    with pytest.raises(ValueError, match="part of the cost"):
        Settlement(
            "r", Event.SETTLE, Outcome.DELIVERED, Basis.USAGE, cost, drawn=Part("art", 1, part)
        )
