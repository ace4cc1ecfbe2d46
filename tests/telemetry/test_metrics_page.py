"""The reference of every metric: current, whole, and true of what labels can be."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.domain.call import Inquiry, Operation, Passage
from gateway.domain.errors import Fault
from gateway.domain.quota import Window
from gateway.domain.receipt import CacheResult
from gateway.relay.failover import Kind as Failure
from gateway.relay.health import Why
from gateway.reload import Reloaded
from gateway.stores.redis_link import Reason
from gateway.telemetry.metrics import LABELS, TABLE, Kind, label_of
from tests.reference.metrics import page, unit_of

DOCS = Path(__file__).parents[2] / "gateway" / "docs"


def test_the_page_is_current() -> None:
    assert (DOCS / "metrics.md").read_text() == page(), "run `make docs`"


def test_every_metric_is_on_it_once() -> None:
    for spec in TABLE:
        assert page().count(f"\n### `{spec.name}`\n") == 1


def test_each_gauge_is_said_to_be_added_up_or_not() -> None:
    head = page().partition("\n## ")[0]
    for spec in TABLE:
        if spec.kind is Kind.GAUGE:
            once = spec.mode != "livesum" and spec.name != "gateway_build_info"
            assert (f"`{spec.name}`" in head) == once, spec.name
    assert "`gateway_ledger_unresolved_usd`" in head


def test_every_label_is_described_and_no_other() -> None:
    used = set()
    for spec in TABLE:
        for name in spec.labels:
            label = label_of(spec, name)
            assert label.help or label.values, (spec.name, name)
            own = f"{spec.name}.{name}"
            used.add(own if own in LABELS else name)
    assert used == LABELS.keys()


def test_whatever_has_a_unit_says_it() -> None:
    units = {spec.name: unit_of(spec) for spec in TABLE}
    assert units["gateway_ledger_underestimate_nanousd_total"] == "nano-dollars"
    assert units["gateway_prices_compiled_timestamp_seconds"] == "Unix time, in seconds"
    assert units["gateway_spend_usd_total"] == "US dollars"
    assert units["gateway_requests_total"] == ""
    assert all(units[spec.name] for spec in TABLE if spec.kind is Kind.HISTOGRAM)


@pytest.mark.parametrize(
    ("label", "values"),
    [
        ("endpoint", {*Operation, *Inquiry, *Passage}),
        ("cache", set(CacheResult)),
        ("result", set(CacheResult)),
        ("class", set(Failure)),
        ("why", set(Why)),
        ("fault", set(Fault)),
        ("window", set(Window) - {Window.NOW, Window.MINUTE}),
        ("gateway_gate_errors_total.reason", set(Reason)),
        ("gateway_flight_board_errors_total.reason", set(Reason)),
        ("gateway_config_reloads_total.outcome", set(Reloaded)),
    ],
)
def test_a_list_of_values_is_whole(label: str, values: set[str]) -> None:
    assert set(LABELS[label].values) == values
