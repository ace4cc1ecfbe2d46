"""The page of every metric, from the one table of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from gateway.telemetry.metrics import GROUPS, LABELS, MAX_TEAMS, OTHER, TABLE, Kind, Spec, label_of

UNITS: Mapping[str, str] = MappingProxyType(
    {
        "_timestamp_seconds": "Unix time, in seconds",
        "_seconds": "seconds",
        "_bytes": "bytes",
        "_nanousd": "nano-dollars",
        "_usd": "US dollars",
        "_ratio": "ratio",
        "_factor": "ratio",
    }
)
"""How a name ends, its ``_total`` apart, -> what it counts."""

MODES: Mapping[str, str] = MappingProxyType(
    {
        "livesum": "the sum over the workers that live",
        "livemax": "the most of any worker that lives",
        "livemostrecent": "what a living worker saw last",
        "scraped": "what the worker that is asked has just looked up",
    }
)


LEAST = ("gateway_disk_free_bytes", "gateway_dependency_up")
"""Gauges of which the least is the worst."""
MOST = tuple(
    spec.name
    for spec in TABLE
    if spec.kind is Kind.GAUGE and spec.mode != "livesum"
    if spec.name not in (*LEAST, "gateway_build_info")
)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def page() -> str:
    return _HEAD + "".join(_group(title, specs) for title, specs in GROUPS.items()) + _labels()


_HEAD = f"""\
# Every metric

<!-- Written by `make docs` from gateway/telemetry/metrics.py. -->

`GET /metrics` speaks the Prometheus text format. It is on the gateway's own port, or on
`server.metrics_port` alone where that is set; it asks for no key, so leave it to your own network.
A scrape looks into the ledger and the stores: every 15 to 60 seconds is a good pace.

```yaml
scrape_configs:
  - job_name: gateway
    scrape_interval: 15s
    static_configs: [{{targets: ["gateway:8080"]}}]
```

**Series are bounded.** Labels come from the configuration and from lists of this gateway's own,
never from what a client sends: no key, no user, no prompt, no request id. A process tells the
first {MAX_TEAMS} teams apart and counts the others as `{OTHER}`
(`gateway_metrics_label_overflow_total` says how often). Teams are labels of counters and gauges,
not of histograms. With four models at two upstreams expect up to 1,500 series, and beside them 40
for each team, or 30 more for each further model that the team uses.

**Several workers** (`server.workers`) answer as one: whichever is asked tells the counters and
histograms of all, also of those that have ended, and of each gauge what its entry below says.
Several replicas are scraped one by one. Counters, histograms and the gauges that are sums over
workers are added up, with `sum by (...)`. Of every other gauge each replica tells what it sees of
the same thing, so take the worst: `min by (...)` of {_listed(LEAST)}; `max by (...)` of
{_listed(MOST)}.

**The ledger is exact, metrics are not.** Counters begin anew with the process. Bill teams by
`gateway usage` or `gateway export focus`, and use these for graphs and alerts. What a call will
count is there with 0 from when its limits let it in; a call that ends before the next scrape is
lost to `increase()` where it is the first of its team, model and endpoint in a process.

| question | query |
|---|---|
| pictures a minute, by model | `sum by (model) (rate(gateway_images_total[5m])) * 60` |
| share of requests that fail | `sum(rate(gateway_requests_total{{status="5xx"}}[5m])) / \
sum(rate(gateway_requests_total[5m]))` |
| the slow twentieth, by model | `histogram_quantile(0.95, \
sum by (le, model) (rate(gateway_request_duration_seconds_bucket[15m])))` |
| what the gateway adds | `histogram_quantile(0.95, \
sum by (le) (rate(gateway_overhead_seconds_bucket[15m])))` |
| dollars an hour, by team | `sum by (team) (rate(gateway_spend_usd_total[1h])) * 3600` |
| how full each budget is | `max by (owner, window) (gateway_budget_spent_usd) / \
max by (owner, window) (gateway_budget_limit_usd)` |
| 429s of an upstream | `sum by (upstream) \
(rate(gateway_upstream_requests_total{{status="429"}}[5m])) / \
sum by (upstream) (rate(gateway_upstream_requests_total[5m]))` |
| what the cache saved in the last 24 hours | `sum(increase(gateway_spend_avoided_usd_total[1d]))` |
| days until a model shuts down | `(gateway_model_shutdown_timestamp_seconds - time()) / 86400` |
"""


def _group(title: str, specs: tuple[Spec, ...]) -> str:
    return f"\n## {title}\n" + "".join(map(_entry, specs))


def _entry(spec: Spec) -> str:
    said = [spec.kind.name.lower()]
    if unit := unit_of(spec):
        said.append(unit)
    if spec.labels:
        said.append("by " + ", ".join(f"`{name}`" for name in spec.labels))
    lines = [f"\n### `{spec.name}`\n", f"{', '.join(said)}\n", f"{spec.help}\n"]
    if spec.kind is Kind.HISTOGRAM:
        lines.append(f"Buckets: {', '.join(f'{edge:g}' for edge in spec.buckets)}.\n")
    if spec.kind is Kind.GAUGE:
        lines.append(f"Of several workers: {MODES[spec.mode]}.\n")
    own = [name for name in spec.labels if f"{spec.name}.{name}" in LABELS]
    for name in own:
        label = label_of(spec, name)
        lines.append(f"`{name}`: {_said(label.help, label.values)}.\n")
    return "\n".join(lines)


def unit_of(spec: Spec) -> str:
    """In what a metric is told; empty where it counts things."""
    name = spec.name.removesuffix("_total")
    return next((unit for end, unit in UNITS.items() if name.endswith(end)), "")


def _labels() -> str:
    rows = [
        f"| `{name}` | {_said(label.help, label.values)} |\n"
        for name, label in sorted(LABELS.items())
        if "." not in name
    ]
    return (
        "\n## Labels\n\nWhat they say wherever the metric itself says nothing else.\n\n"
        "| label | values |\n|---|---|\n" + "".join(rows)
    )


def _said(help: str, values: tuple[str, ...]) -> str:
    listed = ", ".join(f"`{value}`" for value in values)
    return f"{listed} ({help})" if listed and help else listed or help
