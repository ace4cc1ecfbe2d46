"""A bill as a file: what is understood, and what is said about what is not."""

from __future__ import annotations

from datetime import date

import pytest

from gateway.domain.bill import BilledItem
from gateway.ports import BillUnreadable
from gateway.reports.billcsv import read_bill

DAY = date(2026, 11, 20)
EXPORT = """\
start_time,end_time,start_time_iso,end_time_iso,amount_value,amount_currency,line_item,project_id,\
organization_id,organization_name
1795046400,1795132800,2026-11-19T00:00:00+00:00,2026-11-20T00:00:00+00:00,9.5,usd,"m, x",,org-1,P
1795132800,1795219200,2026-11-20T00:00:00+00:00,2026-11-21T00:00:00+00:00,0.0600000000000,usd,\
"gpt-image-2.5-flare, image output",,org-1,Personal
1795132800,1795219200,2026-11-20T00:00:00+00:00,2026-11-21T00:00:00+00:00,0.00004,usd,\
"gpt-image-2.5-flare, text input",,org-1,Personal
1795219200,1795305600,2026-11-21T00:00:00+00:00,2026-11-22T00:00:00+00:00,,,,,,
"""


def test_the_export_of_openai_s_dashboard() -> None:
    assert read_bill(EXPORT, DAY) == [
        BilledItem("gpt-image-2.5-flare, image output", 60_000_000),
        BilledItem("gpt-image-2.5-flare, text input", 40_000),
    ]


def test_a_day_on_which_nothing_was_billed() -> None:
    assert read_bill(EXPORT, date(2026, 11, 21)) == []


@pytest.mark.parametrize(
    "text",
    [
        "date,model,cost\n2026-11-20,m,0.5\n",
        "\ufeffDate, Model ,Cost_USD\r\n2026-11-20,m,$0.50\r\n",
        "day,line_item,amount,currency,more\n2026-11-20,m,0.5,USD,x\n",
        "start_time,line_item,amount_value\n1795132800,m,0.5\n",
        "start_time,line_item,amount_value\n1795132800.0,m,0.5\n",
        "start_time_iso,line_item,amount_value\n2026-11-20T00:00:00Z,m,0.5\n",
        "start_time_iso,line_item,amount_value\n2026-11-19T23:30:00-01:00,m,5e-1\n",
        "date,model,cost\n2026-11-20 08:00:00,m,0.5\n",
    ],
)
def test_other_forms(text: str) -> None:
    assert read_bill(text, DAY) == [BilledItem("m", 500_000_000)]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no column for the day: one of start_time, .* it has none"),
        ("model,cost\nm,1\n", "no column for the day"),
        ("date,cost\n2026-11-20,1\n", "no column for the model or line item: .* date, cost"),
        ("date,model\n2026-11-20,m\n", "no column for the dollars: one of amount_value, cost"),
        ("date,model,cost\n20.11.2026,m,1\n", "line 2: '20.11.2026' is neither"),
        ("date,model,cost\n2026-11-20,m,1\n\n2026-11-20,m,much\n", "line 4: 'much'"),
        ("date,model,cost,currency\n2026-11-20,m,1,eur\n", "line 2: the amount is in 'eur'"),
        ("date,model,cost\n2026-11-19,m,1\n", "no row of 2026-11-20 .it has 2026-11-19 to"),
        ("date,model,cost\n", "no rows at all"),
        ('date,model,cost\n2026-11-20,"m"x,1\n', "line 2"),
    ],
)
def test_what_is_no_bill(text: str, why: str) -> None:
    with pytest.raises(BillUnreadable, match=why):
        read_bill(text, DAY)
