"""What is likely, what would be cheaper, and which operation a body is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.domain.call import Call, Encoding, Operation
from gateway.domain.charge import Quote
from gateway.domain.errors import GatewayError
from gateway.domain.ledger import Basis, Outcome
from gateway.domain.money import Money
from gateway.domain.price import Answer, Bound, CannotPrice, Confidence, PriceList, PriceRow
from gateway.domain.quota import Demand
from gateway.domain.receipt import CacheResult, Delivery, Receipt
from gateway.domain.route import Model, Target
from gateway.domain.team import Caller, Key, Team
from gateway.ports import Credential, Outgoing, Reply
from gateway.relay import estimate
from gateway.relay.estimate import Observed, alternatives, estimate_reader
from gateway.relay.plan import Plan, Way
from gateway.relay.read import ReadRules, reader_for

SMALL = "1024x1024"


@dataclass(frozen=True)
class Cells:
    """A picture's price by size and quality; what is not listed has none."""

    cells: Mapping[tuple[str, str], int]

    def bound(self, call: Call, prices: PriceList) -> Bound:
        if (call.size, call.quality) not in self.cells:
            raise CannotPrice("This has no price.", "size")
        return Bound(call.n * self.cells[call.size, call.quality], Confidence.HARD)

    def likely(self, call: Call, prices: PriceList) -> Money | None:
        return None

    def cost(self, answer: Answer, prices: PriceList) -> Money | None:
        return None

    def knows(self, size: str, quality: str) -> bool:
        return (size, quality) in self.cells


class Comet:
    name = "comet"
    provider = "openai"
    address = ("comet.test", 443)
    ready = True
    credentials = (Credential("1"),)

    def masked(self, text: bytes) -> bytes:
        raise AssertionError("it says nothing")

    async def send(self, outgoing: Outgoing, credential: str) -> Reply:
        raise NotImplementedError

    async def aclose(self) -> None:
        return


def a_call(size: str = SMALL, quality: str = "high", n: int = 1) -> Call:
    return Call(
        *(Operation.GENERATION, Encoding.JSON, "application/json", "art", 3),
        *({"prompt": "cat"}, (), n, size, quality),
    )


def quote(cells: Mapping[tuple[str, str], int], call: Call) -> Quote:
    row = PriceRow("openai", "flare", date(2026, 1, 1), "list", Cells(cells))
    return Quote(row.price.bound(call, PriceList({})), PriceList({}), row)


AUTO = {
    ("auto", "auto"): 1000,
    ("auto", "high"): 900,
    ("auto", "medium"): 300,
    ("auto", "low"): 99,
    (SMALL, "auto"): 400,
    (SMALL, "high"): 200,
    (SMALL, "medium"): 50,
    (SMALL, "low"): 10,
}


LOW = ({"quality": "low"}, 10)


@pytest.mark.parametrize(
    ("asked", "cells", "found"),
    [
        # At most three: the mildest two, and the cheapest.
        (
            ("auto", "auto"),
            AUTO,
            [
                ({"size": SMALL}, 400),
                ({"quality": "medium"}, 300),
                ({"size": SMALL, "quality": "low"}, 10),
            ],
        ),
        (("auto", "low"), AUTO, [({"size": SMALL}, 10)]),
        ((SMALL, "low"), AUTO, []),
        ((SMALL, "high"), AUTO, [({"quality": "medium"}, 50), ({"quality": "low"}, 10)]),
        # A quarter is enough, less is not.
        ((SMALL, "high"), {(SMALL, "high"): 100, (SMALL, "low"): 75}, [({"quality": "low"}, 75)]),
        ((SMALL, "high"), {(SMALL, "high"): 100, (SMALL, "low"): 76}, []),
        # Of two that cost the same, the one that changes less; what costs more goes unsaid.
        (
            ("2048x2048", "medium"),
            {
                ("2048x2048", "medium"): 100,
                ("2048x2048", "low"): 20,
                (SMALL, "low"): 20,
                (SMALL, "medium"): 120,
            },
            [({"quality": "low"}, 20)],
        ),
        # A smaller size than that is not made larger.
        (("512x512", "low"), {("512x512", "low"): 100, (SMALL, "low"): 10}, []),
        ((SMALL, "max"), {**AUTO, (SMALL, "max"): 260}, [({"quality": "medium"}, 50), LOW]),
        ((SMALL, "xhigh"), {**AUTO, (SMALL, "xhigh"): 66}, [LOW]),
        ((SMALL, "hd"), {**AUTO, (SMALL, "hd"): 200}, [({"quality": "medium"}, 50), LOW]),
        ((SMALL, "standard"), {**AUTO, (SMALL, "standard"): 50}, [LOW]),
    ],
)
def test_cheaper_ways(
    asked: tuple[str, str],
    cells: Mapping[tuple[str, str], int],
    found: list[tuple[dict[str, str], int]],
) -> None:
    for n in (1, 3):
        call = a_call(*asked, n=n)
        ways = alternatives(call, quote(cells, call))
        assert [(change, bound) for change, _, bound in ways] == [
            (change, n * bound) for change, bound in found
        ]
        for change, other, _ in ways:
            assert other == replace(call, **change)  # type: ignore[arg-type]


def test_a_bound_that_was_raised_raises_its_alternatives() -> None:
    call = a_call()
    quoted = quote({(SMALL, "high"): 200, (SMALL, "low"): 10}, call)
    doubled = replace(quoted, bound=Bound(400, Confidence.SOFT), factor=2_000_000)
    assert [bound for _, _, bound in alternatives(call, doubled)] == [20]


def test_what_has_no_price_has_no_cheaper_way() -> None:
    nothing = Quote(Bound(5, Confidence.SOFT), PriceList({}), None)
    assert alternatives(a_call(), nothing) == []


# What was seen.


def a_plan(price_id: str = "") -> Plan:
    row = None
    if price_id:
        row = PriceRow("openai", "flare", date(2026, 1, 1), "list", Cells({}))
    model = Model("art", Target("comet", "flare"))
    quote = Quote(Bound(0, Confidence.HARD), PriceList({}), row)
    return Plan(
        caller=Caller(Team("growth"), Key("k1", "growth")),
        call=a_call(),
        asked=model,
        ways=(Way(model, model.target, Comet(), quote),),
        demand=Demand(),
        rates=(),
        lines=(),
        fingerprint="f",
        cache=CacheResult.MISS,
        keep=True,
        at=datetime(2026, 11, 22, tzinfo=UTC),
    )


BOUGHT = Receipt(
    *("req_1", "generation", 200),
    model_served="flare",
    upstream="comet",
    size=SMALL,
    quality="high",
    output_format="png",
    outcome=Outcome.DELIVERED,
    basis=Basis.USAGE,
    cost=100,
    images=1,
)
DELIVERED = Delivery(200, 1, 1.0)


def seen(*receipts: Receipt) -> Observed:
    observed = Observed()
    for receipt in receipts:
        observed.finished(receipt, DELIVERED)
    return observed


def test_the_mean_is_of_one_picture() -> None:
    observed = seen(BOUGHT, replace(BOUGHT, cost=600, images=3), replace(BOUGHT, cost=301))
    assert observed.mean(a_plan(), a_call()) == (100 + 200 + 301) // 3


@pytest.mark.parametrize(
    "change",
    [
        *({"outcome": Outcome.BROKEN}, {"outcome": Outcome.REPLAYED}, {"outcome": None}),
        *({"basis": Basis.ESTIMATED}, {"images": 0}, {"upstream": "other"}, {"size": "auto"}),
        *({"model_served": "other"}, {"operation": "edit"}, {"quality": "low"}),
        *({"output_format": "svg"}, {"price_id": "openai/flare@2026-06-01"}),
    ],
    ids=str,
)
def test_only_what_was_bought_like_this_counts(change: dict[str, Any]) -> None:
    assert seen(replace(BOUGHT, **change)).mean(a_plan(), a_call()) is None


def test_only_the_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    dear = [replace(BOUGHT, cost=10_000)] * 10
    assert seen(*dear, *[BOUGHT] * estimate.LAST).mean(a_plan(), a_call()) == 100
    monkeypatch.setattr(estimate, "MAX_KINDS", 2)
    others = [replace(BOUGHT, size=f"{edge}x{edge}") for edge in (16, 32)]
    assert seen(BOUGHT, *others).mean(a_plan(), a_call()) is None
    assert seen(others[0], BOUGHT, others[1]).mean(a_plan(), a_call()) == 100


# Which operation a body is.

PICTURE = "data:image/png;base64,iVBORw0KGgo="
BODIES: list[dict[str, Any]] = [
    {"model": "m", "prompt": "p"},
    {"model": "m", "prompt": "p", "images": None},
    {"model": "m", "prompt": "p", "images": []},
    {"model": "m", "prompt": "p", "images": [{"image_url": PICTURE}]},
    {"model": "m", "prompt": "p", "mask": {"image_url": PICTURE}},
    {"model": "m", "prompt": "p", "images": [{"file_id": "f"}]},
    {"model": "m", "prompt": "p", "images": "none"},
    {"model": "m", "images": [{"image_url": PICTURE}]},
    {"model": "m", "prompt": "data:image/png;base64,@@@" * 20_000},
    {"prompt": "\x07" * 3, "model": "m"},
    {"prompt": 3, "model": "m"},
    {"model": "m", "prompt": "p", "n": 0},
]


def outcome(reader: Any, body: bytes, step: int) -> Call | str:
    try:
        for at in range(0, len(body), step):
            reader.feed(body[at : at + step])
        call: Call = reader.close()
        return call
    except GatewayError as error:
        return error.message


@pytest.mark.parametrize("body", BODIES, ids=lambda body: str(body)[:60])
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_it_is_read_as_the_operation_would_read_it(body: dict[str, Any], step: int) -> None:
    if step < 10 and len(str(body)) > 10_000:
        step *= 1000
    sent, rules = json.dumps(body).encode(), ReadRules()
    kind = Operation.EDIT if body.get("images") else Operation.GENERATION
    real = reader_for(kind, "application/json", None, None, rules)
    either = estimate_reader("application/json", None, None, rules)
    assert outcome(either, sent, step) == outcome(real, sent, step)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(1, 60))
def test_bytes_of_any_kind_are_refused_like_everywhere(body: bytes, step: int) -> None:
    rules = ReadRules()
    either = estimate_reader("application/json", None, None, rules)
    real = reader_for(Operation.GENERATION, "application/json", None, None, rules)
    assert outcome(either, body, step) == outcome(real, body, step)
