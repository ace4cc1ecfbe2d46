"""The books as FOCUS 1.2, the FinOps Open Cost and Usage Specification, for chargeback.

A row is what one team and key spent on one model on one UTC day. The columns are those that the
specification (focus.finops.org, v1.2, "Columns") says must be there, in its names and order, then
the gateway's own, which begin with ``x_``. What the specification leaves to decide:

- A team is a sub account. Costs are what the ledger posted, in dollars; the four cost columns are
  equal, because nobody here grants discounts or amortizes.
- A row adds up calls at several prices, so it has no unit price, and is counted in requests. The
  unit price columns, and those of a pricing currency, must not be null where they are present;
  they are asked of providers that publish such prices, and so they are left out.
- What another model drew for a response is that model's row, and the request is the row's of the
  model that was asked for: so the former may have a cost and no request.
- An adjustment (``Books.adjust``) is a row of its own with the charge category "Adjustment".
  ``ChargeClass`` is null throughout: "Correction" is for billing periods that were invoiced
  before, and the gateway writes no invoices: an export shows the books as they are now.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TypeAlias

from gateway.domain.ledger import UsageRow
from gateway.domain.money import format_dollars

Value: TypeAlias = "str | int | None"
COLUMNS = (
    "AvailabilityZone",
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingAccountType",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "CapacityReservationId",
    "CapacityReservationStatus",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "CommitmentDiscountCategory",
    "CommitmentDiscountId",
    "CommitmentDiscountName",
    "CommitmentDiscountQuantity",
    "CommitmentDiscountStatus",
    "CommitmentDiscountType",
    "CommitmentDiscountUnit",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "EffectiveCost",
    "InvoiceId",
    "InvoiceIssuerName",
    "ListCost",
    "PricingCategory",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "RegionId",
    "RegionName",
    "ResourceId",
    "ResourceName",
    "ResourceType",
    "ServiceCategory",
    "ServiceName",
    "ServiceSubcategory",
    "SkuId",
    "SkuMeter",
    "SkuPriceDetails",
    "SkuPriceId",
    "SubAccountId",
    "SubAccountName",
    "SubAccountType",
    "Tags",
)
OWN_COLUMNS = (
    "x_KeyId",
    "x_KeyName",
    "x_Upstream",
    "x_Requests",
    "x_CachedRequests",
    "x_Images",
    "x_TextTokensIn",
    "x_ImageTokensIn",
    "x_TextTokensOut",
    "x_ImageTokensOut",
    "x_AvoidedCost",
    "x_UnresolvedRequests",
    "x_UnresolvedCost",
    "x_FlaggedRequests",
)
ISSUER = "image-gateway"
UNKNOWN = "unknown"
"""The provider of a model that no entry of the configuration serves any more."""


@dataclass(frozen=True, slots=True)
class Provider:
    """Who serves a model: the configured upstream, and whose price list it goes by."""

    upstream: str
    name: str


def focus_rows(
    rows: Sequence[UsageRow],
    account: str,
    key_names: Mapping[str, str],
    provider_of: Callable[[str], Provider | None],
) -> list[dict[str, Value]]:
    """A row of the export for each row of the books, its columns in their order. Where calls were
    voided and nothing is left of a row, there is nothing to charge for.

    ``account`` names the billing account. Dollars are exact decimal text, counts are integers,
    None is null.
    """
    return [
        _row(row, account, key_names, provider_of(row.model))
        for row in rows
        if row.requests or row.images or row.cost
    ]


def as_csv(rows: Sequence[Mapping[str, Value]]) -> str:
    """RFC 4180, with a head. Null is an empty field; no value is an empty text."""
    out = io.StringIO()
    writer = csv.DictWriter(out, (*COLUMNS, *OWN_COLUMNS), lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_json(rows: Sequence[Mapping[str, Value]]) -> str:
    """A list of objects. Dollars stay text: a JSON number would be read as a binary float."""
    return json.dumps(rows, indent=2) + "\n"


def _row(
    row: UsageRow, account: str, key_names: Mapping[str, str], provider: Provider | None
) -> dict[str, Value]:
    day = date.fromisoformat(row.day)
    month = day.replace(day=1)
    following = (month + timedelta(days=31)).replace(day=1)
    cost = format_dollars(row.cost)
    # Only an adjustment belongs to no key.
    used = bool(row.key_id)
    maker = provider.name if provider is not None else UNKNOWN
    known: dict[str, Value] = {
        "BilledCost": cost,
        "BillingAccountId": account,
        "BillingAccountName": account,
        "BillingAccountType": "Organization",
        "BillingCurrency": "USD",
        "BillingPeriodStart": _instant(month),
        "BillingPeriodEnd": _instant(following),
        "ChargeCategory": "Usage" if used else "Adjustment",
        "ChargeDescription": (
            f"{row.model}: requests {row.requests}, images {row.images}"
            if used
            else f"{row.model}: adjustment of the ledger"
        ),
        "ChargeFrequency": "Usage-Based" if used else "One-Time",
        "ChargePeriodStart": _instant(day),
        "ChargePeriodEnd": _instant(day + timedelta(days=1)),
        "ConsumedQuantity": row.requests if used else None,
        "ConsumedUnit": "Requests" if used else None,
        "ContractedCost": cost,
        "EffectiveCost": cost,
        "InvoiceIssuerName": ISSUER,
        "ListCost": cost,
        "PricingCategory": "Standard" if used else None,
        "PricingQuantity": row.requests if used else None,
        "PricingUnit": "Requests" if used else None,
        "ProviderName": maker,
        "PublisherName": maker,
        "ResourceId": row.key_id or None,
        "ResourceName": key_names.get(row.key_id) or None,
        "ResourceType": "API Key" if used else None,
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": "Image Generation",
        "ServiceSubcategory": "Generative AI",
        "SkuId": row.model,
        "SkuMeter": "Image Requests",
        "SkuPriceId": row.model,
        "SubAccountId": row.team,
        "SubAccountName": row.team,
        "SubAccountType": "Team",
        "x_KeyId": row.key_id or None,
        "x_KeyName": key_names.get(row.key_id) or None,
        "x_Upstream": provider.upstream if provider is not None else None,
        "x_Requests": row.requests,
        "x_CachedRequests": row.cached_requests,
        "x_Images": row.images,
        "x_TextTokensIn": row.text_in,
        "x_ImageTokensIn": row.image_in,
        "x_TextTokensOut": row.text_out,
        "x_ImageTokensOut": row.image_out,
        "x_AvoidedCost": format_dollars(row.avoided),
        "x_UnresolvedRequests": row.unresolved,
        "x_UnresolvedCost": format_dollars(row.unresolved_cost),
        "x_FlaggedRequests": row.flagged,
    }
    return {name: known.get(name) for name in (*COLUMNS, *OWN_COLUMNS)}


def _instant(day: date) -> str:
    """Its beginning in UTC, as the specification's date and time format has it."""
    return f"{day.isoformat()}T00:00:00Z"
