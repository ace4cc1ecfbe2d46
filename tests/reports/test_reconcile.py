"""The comparison of a bill with the books, as tables."""

from __future__ import annotations

import csv
import io
import shlex
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.bill import BilledItem, round_dollars
from gateway.domain.ledger import UsageRow
from gateway.domain.route import Target
from gateway.reports.reconcile import Drift, as_csv, as_json, model_of, reconcile, split

DAY = "2026-11-20"
FLARE = "gpt-image-2.5-flare"
ONE = Decimal(1)


def row(team: str, model: str, cost: int, key: str = "k", requests: int = 1) -> UsageRow:
    return UsageRow(DAY, team, key, model, requests=requests, cost=cost)


def served(model: str) -> tuple[Target, ...]:
    """An alias, a model of another upstream, one that is gone, one of both, and a wildcard."""
    if model == "gone":
        return ()
    if model == "mountains":
        return (Target("other", "mountain-1"),)
    if model == "both":
        return (Target("openai", FLARE), Target("other", "dep-1"))
    if model == "twice":
        return (Target("openai", FLARE), Target("openai", "dep-2"))
    return (Target("openai", FLARE if model == "team-art" else model),)


def items(**amounts: int) -> list[BilledItem]:
    return [BilledItem(f"{name.replace('_', '-')}, image output", n) for name, n in amounts.items()]


@pytest.mark.parametrize(
    ("line_item", "model"),
    [
        ("gpt-image-2.5-flare, image output", FLARE),
        ("gpt-image-2.5-flare", FLARE),
        (" gpt-image-2.5-flare , text input", FLARE),
        ("gpt-image-2.5-flare-2026-09-08, image output", FLARE),
        ("gpt-image-2, image output", "gpt-image-2"),
        ("gpt-image-2-2026-04-21, image output", "gpt-image-2-2026-04-21"),
        ("gpt-image-2-2026-05-05, image output", "gpt-image-2"),
        ("gpt-image-2-mini, image output", None),
        ("gpt-image-2.5, image output", None),
        ("gpt-6-astra, input_tokens", None),
        ("image output, gpt-image-2", None),
        ("", None),
    ],
)
def test_whose_a_line_item_is(line_item: str, model: str | None) -> None:
    assert model_of(line_item, [FLARE, "gpt-image-2", "gpt-image-2-2026-04-21"]) == model


@pytest.mark.parametrize(
    ("text", "nanousd"),
    [
        ("0.06", 60_000_000),
        ("0.05999999999999999778", 60_000_000),
        ("0.8958740000000000", 895_874_000),
        ("5.88e-06", 5_880),
        ("-1.5", -1_500_000_000),
        ("0.0000000005", 0),
        ("0.0000000015", 2),
        ("1e-400000", 0),
        ("0", 0),
    ],
)
def test_a_provider_s_amount(text: str, nanousd: int) -> None:
    assert round_dollars(text) == round_dollars(Decimal(text)) == nanousd


@pytest.mark.parametrize("text", ["", "much", "NaN", "Infinity", "1e30", "1e400000"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(ValueError, match="dollars"):
        round_dollars(text)


def test_a_binary_float_is_refused() -> None:
    with pytest.raises(ValueError, match="binary float"):
        round_dollars(0.1)  # type: ignore[arg-type]


def test_names_of_one_model_are_one_line() -> None:
    rows = [row("growth", FLARE, 60), row("growth", "team-art", 30), row("design", "team-art", 10)]
    found = reconcile(["openai"], DAY, items(gpt_image_2=7), rows, served, ["gpt-image-2"])
    assert found.models == (Drift("gpt-image-2", 7, 0), Drift(FLARE, 0, 100))
    assert found.total == Drift("total", 7, 100)
    assert found.nobodys == ("gpt-image-2",)


def test_the_line_items_of_a_model_are_added_up() -> None:
    bill = [
        BilledItem(f"{FLARE}, text input", 3),
        BilledItem(f"{FLARE}, image output", 90),
        BilledItem(f"{FLARE}-2026-09-08, image output", 7),
    ]
    found = reconcile(["openai"], DAY, bill, [row("growth", FLARE, 100)], served)
    assert found.models == (Drift(FLARE, 100, 100),)
    assert not found.proposals
    assert found.drifts(Decimal(0)) == []


def test_what_belongs_to_no_model_is_listed_and_compared_with_nothing() -> None:
    bill = [
        BilledItem("gpt-6-astra, input_tokens", 1_000),
        BilledItem("", 5),
        BilledItem("gpt-6-astra, input_tokens", 500),
    ]
    rows = [row("growth", FLARE, 10), row("growth", "mountains", 77), row("growth", "gone", 9)]
    found = reconcile(["openai"], DAY, [*bill, BilledItem(FLARE, 10)], rows, served)
    assert found.other == (
        BilledItem("(no line item)", 5),
        BilledItem("gpt-6-astra, input_tokens", 1_500),
    )
    assert found.unrouted == (("gone", 9),)
    assert found.total == Drift("total", 10, 10)


def test_several_upstreams_on_one_bill() -> None:
    rows = [row("growth", FLARE, 10), row("growth", "mountains", 77)]
    bill = [BilledItem(FLARE, 10), BilledItem("mountain-1, image output", 80)]
    found = reconcile(["openai", "other"], DAY, bill, rows, served)
    assert found.upstream == "openai+other"
    assert found.models == (Drift(FLARE, 10, 10), Drift("mountain-1", 80, 77))
    [proposal] = found.proposals
    assert (proposal.model, proposal.amount) == ("mountains", 3)


@pytest.mark.parametrize(
    ("billed", "booked", "beyond"),
    [
        (1_005, 1_000, False),
        (1_000, 1_005, False),
        (1_020, 1_000, True),
        (1_000, 1_020, True),
        (100, 99, False),
        (10_000, 9_899, True),
        (0, 0, False),
        (0, 1, True),
        (1, 0, True),
        (-100, -100, False),
    ],
)
def test_when_it_is_told(billed: int, booked: int, beyond: bool) -> None:
    assert Drift("m", billed, booked).beyond(ONE) is beyond


def test_one_model_may_hide_behind_another_in_the_day_s_sum() -> None:
    rows = [row("growth", FLARE, 100), row("growth", "gpt-image-2", 100)]
    bill = [BilledItem(FLARE, 150), BilledItem("gpt-image-2", 50)]
    found = reconcile(["openai"], DAY, bill, rows, served)
    assert [drift.model for drift in found.drifts(ONE)] == ["gpt-image-2", FLARE]
    assert not found.total.difference


@pytest.mark.parametrize(
    ("drift", "percent"),
    [
        (Drift("m", 100, 98), "+2.00"),
        (Drift("m", 100, 102), "-2.00"),
        (Drift("m", 3, 2), "+33.33"),
        (Drift("m", 0, 0), "0.00"),
        (Drift("m", 0, 5), ""),
        (Drift("m", 5, 0), "+100.00"),
    ],
)
def test_the_percent_of_the_bill(drift: Drift, percent: str) -> None:
    assert drift.percent == percent


def test_a_difference_is_split_by_what_each_was_booked() -> None:
    rows = [
        row("growth", FLARE, 600, "k1"),
        row("growth", FLARE, 0, "k2"),
        row("design", "team-art", 300),
        row("art", FLARE, 100),
        row("growth", FLARE, -50, "", requests=0),
    ]
    found = reconcile(["openai"], DAY, [BilledItem(FLARE, 1_049)], rows, served)
    shares = {(each.team, each.model): each.amount for each in found.proposals}
    assert shares == {
        ("growth", FLARE): 57,
        ("design", "team-art"): 31,
        ("art", FLARE): 11,
    }
    assert sum(shares.values()) == 1_049 - 950


def test_without_a_price_what_was_drawn_for_responses_is_split_by_pictures() -> None:
    """They have no requests of their own in the row of who drew them."""
    rows = [
        UsageRow(DAY, "growth", "k", FLARE, images=3),
        UsageRow(DAY, "design", "k", FLARE, images=1),
    ]
    found = reconcile(["openai"], DAY, [BilledItem(FLARE, 80)], rows, served)
    assert {one.team: one.amount for one in found.proposals} == {"growth": 60, "design": 20}


def test_without_a_price_it_is_split_by_requests() -> None:
    rows = [row("growth", FLARE, 0, requests=3), row("design", FLARE, 0)]
    found = reconcile(["openai"], DAY, [BilledItem(FLARE, 8)], rows, served)
    assert {each.team: each.amount for each in found.proposals} == {"growth": 6, "design": 2}


def test_the_same_bill_and_books_have_the_same_ids_and_others_have_others() -> None:
    def ids(billed: int, booked: int, day: str = DAY) -> set[str]:
        rows = [row("growth", FLARE, booked), row("design", FLARE, booked)]
        found = reconcile(["openai"], day, [BilledItem(FLARE, billed)], rows, served)
        assert len({each.id for each in found.proposals}) == 2
        return {each.id for each in found.proposals}

    assert ids(100, 40) == ids(100, 40)
    variants = [ids(100, 40), ids(101, 40), ids(100, 41), ids(100, 40, "2026-11-21")]
    assert len(set.union(*variants)) == 8


def test_the_command_says_it_all() -> None:
    found = reconcile(["openai"], DAY, [BilledItem(FLARE, 40)], [row("growth", FLARE, 100)], served)
    [proposal] = found.proposals
    words = shlex.split(proposal.command)
    assert words[:3] == ["gateway", "ledger", "adjust"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options == {
        "--team": "growth",
        "--model": FLARE,
        "--day": DAY,
        "--amount": "-0.00000006",
        "--id": proposal.id,
        "--reason": f"openai billed $0.00000004 for {FLARE} on {DAY}, booked were $0.0000001",
    }


@given(
    st.integers(-(10**18), 10**18),
    st.dictionaries(
        st.tuples(st.text(max_size=3), st.text(max_size=3)),
        st.integers(1, 10**15),
        min_size=1,
        max_size=6,
    ),
)
def test_parts_add_up_and_are_off_by_less_than_one(
    amount: int, weights: dict[tuple[str, str], int]
) -> None:
    parts = split(amount, weights)
    assert sum(parts.values()) == amount
    whole = sum(weights.values())
    for who, part in parts.items():
        assert abs(part * whole - amount * weights[who]) < whole


def test_as_a_file() -> None:
    bill = [BilledItem(FLARE, 102), BilledItem("gpt-6-astra, input_tokens", 5)]
    found = reconcile(["openai"], DAY, bill, [row("growth", FLARE, 100)], served)
    lines = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert [line["model"] for line in lines] == [
        FLARE,
        "total",
        "other: gpt-6-astra, input_tokens",
    ]
    assert lines[0]["difference_usd"] == "0.000000002"
    assert lines[0]["percent"] == "+1.96"
    report = as_json(found, ONE)
    assert report["drifts"] == [FLARE, "total"]
    assert report["alert_percent"] == "1"


def test_of_a_model_of_two_upstreams_only_the_calls_of_this_one_count() -> None:
    rows = [row("growth", "both", 100), row("design", "both", 50), row("growth", FLARE, 10)]
    routed = [
        ("openai", row("growth", "both", 60)),
        ("other", row("growth", "both", 30)),
        ("other", row("design", "both", 50)),
        ("openai", row("growth", FLARE, 10)),
    ]
    found = reconcile(["openai"], DAY, [BilledItem(FLARE, 77)], rows, served, (), routed)
    assert found.models == (Drift(FLARE, 77, 70),)
    assert found.unattributed == (("both", 10),)
    assert {(one.team, one.model): one.amount for one in found.proposals} == {
        ("growth", "both"): 6,
        ("growth", FLARE): 1,
    }
    assert found.seen == (("both", 150), (FLARE, 10))
    there = reconcile(["other"], DAY, [BilledItem("dep-1", 80)], rows, served, (), routed)
    assert (there.models, there.proposals) == ((Drift("dep-1", 80, 80),), ())
    everywhere = reconcile(["openai", "other"], DAY, [BilledItem(FLARE, 90),
                           BilledItem("dep-1", 80)], rows, served, (), routed)  # fmt: skip
    assert everywhere.models == (Drift(FLARE, 170, 160),)
    assert everywhere.unattributed == ()
    assert as_json(found, ONE)["unattributed"] == [{"model": "both", "booked_usd": "0.00000001"}]


def test_two_names_of_one_model_are_one() -> None:
    rows = [row("growth", "twice", 100), row("growth", "dep-2", 5)]
    bill = [BilledItem(FLARE, 70), BilledItem("dep-2, image output", 35)]
    found = reconcile(["openai"], DAY, bill, rows, served)
    assert found.models == (Drift(FLARE, 105, 105),)
