"""The FOCUS 1.2 export against the specification's own rules, as a table.

``RULES`` is written from the columns of the specification (focus.finops.org, v1.2): whether a
column must be there, whether it may be null, its values and its form.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal

import pytest

from gateway.domain.ledger import UsageRow
from gateway.domain.money import NANOS_PER_DOLLAR
from gateway.reports.focus import (
    COLUMNS,
    OWN_COLUMNS,
    Provider,
    Value,
    as_csv,
    as_json,
    focus_rows,
)

MODEL = "gpt-image-2.5-flare"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
NUMBER = re.compile(r"-?\d+(\.\d+)?([eE]-?\d+)?")
Check = Callable[[str], bool]


def one_of(*values: str) -> Check:
    return lambda value: value in values


def text(value: str) -> bool:
    return bool(value) and value == value.strip()


time_: Check = lambda value: TIME.fullmatch(value) is not None  # noqa: E731
number: Check = lambda value: NUMBER.fullmatch(value) is not None  # noqa: E731
currency: Check = lambda value: re.fullmatch("[A-Z]{3}", value) is not None  # noqa: E731

NEVER_NULL: Mapping[str, Check] = {
    "BilledCost": number,
    "BillingAccountId": text,
    "BillingAccountName": text,
    "BillingAccountType": text,
    "BillingCurrency": currency,
    "BillingPeriodEnd": time_,
    "BillingPeriodStart": time_,
    "ChargeCategory": one_of("Usage", "Purchase", "Tax", "Credit", "Adjustment"),
    "ChargeDescription": text,
    "ChargeFrequency": one_of("One-Time", "Recurring", "Usage-Based"),
    "ChargePeriodEnd": time_,
    "ChargePeriodStart": time_,
    "ContractedCost": number,
    "EffectiveCost": number,
    "InvoiceIssuerName": text,
    "ListCost": number,
    "ProviderName": text,
    "PublisherName": text,
    "ServiceCategory": one_of("AI and Machine Learning"),
    "ServiceName": text,
    "ServiceSubcategory": one_of("Generative AI"),
    "SubAccountId": text,
    "SubAccountType": text,
}
OF_USAGE: Mapping[str, Check] = {
    "ConsumedQuantity": lambda value: number(value) and Decimal(value) > 0,
    "ConsumedUnit": text,
    "PricingCategory": one_of("Standard", "Dynamic", "Committed", "Other"),
    "PricingQuantity": number,
    "PricingUnit": text,
    "SkuId": text,
    "SkuPriceId": text,
}
"""What must not be null in a row of the category "Usage"."""

MANDATORY = {
    "BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency", "BillingPeriodEnd",
    "BillingPeriodStart", "ChargeCategory", "ChargeClass", "ChargeDescription", "ChargePeriodEnd",
    "ChargePeriodStart", "ContractedCost", "EffectiveCost", "InvoiceIssuerName", "ListCost",
    "PricingQuantity", "PricingUnit", "ProviderName", "PublisherName", "ServiceCategory",
    "ServiceName",
}  # fmt: skip
"""The 21 columns of the feature level "Mandatory"."""

NOT_WHERE_NULL = {
    "ContractedUnitPrice", "ListUnitPrice", "PricingCurrency",
    "PricingCurrencyContractedUnitPrice", "PricingCurrencyEffectiveCost",
    "PricingCurrencyListUnitPrice",
}  # fmt: skip
"""Columns that are asked of who publishes unit prices or has two currencies, and then must not be
null."""


def provider_of(model: str) -> Provider | None:
    return None if model == "gone" else Provider("main", "openai")


def row(day: str, team: str, key: str, cost: int, **counts: int) -> UsageRow:
    return UsageRow(day, team, key, MODEL, cost=cost, **counts)


BOOKS = [
    row("2026-11-20", "growth", "k1", 17_760_000, requests=4, cached_requests=1, images=4),
    row("2026-11-20", "growth", "", -123_456_789),
    row("2026-11-30", "design", "k2", 710_000_001, requests=1, unresolved=1,
        unresolved_cost=710_000_001),
    row("2026-12-31", "design", "k2", 0, requests=2, cached_requests=2, avoided=9),
    row("2026-12-31", "design", "k3", 0),
    UsageRow("2026-12-31", "design", "k2", "gone", requests=1, cost=10**18 + 1),
]  # fmt: skip


def exported(books: list[UsageRow] = BOOKS) -> list[dict[str, Value]]:
    return focus_rows(books, "acme", {"k1": "ci"}, provider_of)


def test_the_columns_of_the_specification_come_first_and_in_order() -> None:
    assert set(COLUMNS) >= MANDATORY | set(NEVER_NULL) | set(OF_USAGE)
    assert not set(COLUMNS) & NOT_WHERE_NULL
    assert list(COLUMNS) == sorted(COLUMNS)
    assert len(COLUMNS) + len(NOT_WHERE_NULL) == 57
    for name in COLUMNS:
        assert re.fullmatch("[A-Z][A-Za-z]{1,49}", name)
    for name in OWN_COLUMNS:
        assert re.fullmatch("x_[A-Z][A-Za-z]{1,47}", name)
    for made in exported():
        assert tuple(made) == (*COLUMNS, *OWN_COLUMNS)


@pytest.mark.parametrize("form", ["csv", "json"])
def test_every_row_keeps_the_rules(form: str) -> None:
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(as_csv(exported()), newline="")))
        found = [{name: value or None for name, value in one.items()} for one in rows]
    else:
        parsed = json.loads(as_json(exported()))
        found = [{name: None if v is None else str(v) for name, v in one.items()} for one in parsed]
    assert len(found) == 5
    for one in found:
        for name, check in NEVER_NULL.items():
            value = one[name]
            assert value is not None, name
            assert check(value), (name, value)
        usage = one["ChargeCategory"] == "Usage"
        for name, check in OF_USAGE.items():
            value = one[name]
            if usage:
                assert value is not None, name
                assert check(value), (name, value)
        assert one["ChargeClass"] is None
        assert (one["ConsumedQuantity"] is None) == (one["ConsumedUnit"] is None) == (not usage)
        assert (one["PricingQuantity"] is None) == (one["PricingUnit"] is None)
        assert (one["ResourceId"] is None) == (one["ResourceType"] is None)
        assert one["ResourceId"] is not None or one["ResourceName"] is None
        assert one["SkuId"] is not None or one["SkuMeter"] is None
        # The price is the list's, nothing is amortized, and there is no unit price.
        costs = {one[f"{name}Cost"] for name in ("Billed", "Contracted", "Effective", "List")}
        assert len(costs) == 1
        assert one["ChargePeriodStart"] < one["ChargePeriodEnd"]  # type: ignore[operator]
        assert one["BillingPeriodStart"] <= one["ChargePeriodStart"]  # type: ignore[operator]
        assert one["ChargePeriodEnd"] <= one["BillingPeriodEnd"]  # type: ignore[operator]


def test_the_sum_is_exact() -> None:
    total = sum(Decimal(str(one["BilledCost"])) for one in exported())
    assert total * NANOS_PER_DOLLAR == sum(one.cost for one in BOOKS)


def test_a_row_of_usage() -> None:
    first = exported()[0]
    assert {name: value for name, value in first.items() if value not in (None, 0, "0")} == {
        "BilledCost": "0.01776",
        "BillingAccountId": "acme",
        "BillingAccountName": "acme",
        "BillingAccountType": "Organization",
        "BillingCurrency": "USD",
        "BillingPeriodStart": "2026-11-01T00:00:00Z",
        "BillingPeriodEnd": "2026-12-01T00:00:00Z",
        "ChargeCategory": "Usage",
        "ChargeDescription": f"{MODEL}: requests 4, images 4",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodStart": "2026-11-20T00:00:00Z",
        "ChargePeriodEnd": "2026-11-21T00:00:00Z",
        "ConsumedQuantity": 4,
        "ConsumedUnit": "Requests",
        "ContractedCost": "0.01776",
        "EffectiveCost": "0.01776",
        "InvoiceIssuerName": "image-gateway",
        "ListCost": "0.01776",
        "PricingCategory": "Standard",
        "PricingQuantity": 4,
        "PricingUnit": "Requests",
        "ProviderName": "openai",
        "PublisherName": "openai",
        "ResourceId": "k1",
        "ResourceName": "ci",
        "ResourceType": "API Key",
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": "Image Generation",
        "ServiceSubcategory": "Generative AI",
        "SkuId": MODEL,
        "SkuMeter": "Image Requests",
        "SkuPriceId": MODEL,
        "SubAccountId": "growth",
        "SubAccountName": "growth",
        "SubAccountType": "Team",
        "x_KeyId": "k1",
        "x_KeyName": "ci",
        "x_Upstream": "main",
        "x_Requests": 4,
        "x_CachedRequests": 1,
        "x_Images": 4,
    }


def test_what_another_model_drew_for_a_response_is_a_row_without_a_request() -> None:
    picture = row("2026-12-30", "growth", "k1", 5_895_000, images=1, image_out=196)
    unpriced = row("2026-12-30", "growth", "k2", 0, images=1)
    found = exported([picture, unpriced])
    assert [one["BilledCost"] for one in found] == ["0.005895", "0"]
    for one in found:
        assert (one["ChargeCategory"], one["ConsumedQuantity"]) == ("Usage", 0)
        assert (one["x_Requests"], one["x_Images"]) == (0, 1)


def test_an_adjustment_is_a_charge_of_its_own() -> None:
    _, adjusted, unresolved, last, gone = exported()
    assert adjusted["ChargeCategory"] == "Adjustment"
    assert adjusted["ChargeFrequency"] == "One-Time"
    assert adjusted["BilledCost"] == "-0.123456789"
    assert adjusted["x_KeyId"] is None
    assert unresolved["x_UnresolvedCost"] == "0.710000001"
    assert unresolved["x_UnresolvedRequests"] == 1
    assert last["BillingPeriodEnd"] == last["ChargePeriodEnd"] == "2027-01-01T00:00:00Z"
    assert gone["ProviderName"] == "unknown"
    assert gone["BilledCost"] == "1000000000.000000001"
