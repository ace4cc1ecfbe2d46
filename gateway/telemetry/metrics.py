"""Every metric of the gateway, in one table, and how a receipt moves them.

Labels come from closed sets only: never a key, a user, a prompt or a request id. Teams are labels
of counters, not of histograms, and beyond ``MAX_TEAMS`` they share the label ``other``.
"""

from __future__ import annotations

import operator
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from gateway.domain.call import Inquiry, Passage, Usage
from gateway.domain.compat import CHANGES, OTHER_CHANGE
from gateway.domain.errors import Fault
from gateway.domain.ledger import Balance, Basis, Line, Outcome
from gateway.domain.money import NANOS_PER_DOLLAR, Money
from gateway.domain.owned import OwnedKind
from gateway.domain.receipt import CacheResult, Delivery, Receipt

SECONDS = (0.1, 0.25, 0.5, 1, 2, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600)
SMALL_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
LAG_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
RATIOS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 2, 5)
MAX_TEAMS = 200
OTHER = "other"


Move: TypeAlias = Callable[[float], None]
"""Moves one series: raises a counter by so much, or adds a value to a histogram."""


class Kind(Enum):
    COUNTER = Counter
    GAUGE = Gauge
    HISTOGRAM = Histogram


Mode: TypeAlias = Literal["livesum", "livemax", "livemostrecent", "scraped"]


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric, as the reference lists it.

    ``mode`` says what a gauge of several workers is: the sum over those that live, for what each
    has of its own, or the most; what one of them saw last, for what they share; or ``scraped``,
    what the worker that is asked has just looked up itself.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = SECONDS
    mode: Mode = "livemostrecent"
    threads: bool = False
    """Whether other threads than the event loop's raise it too."""


@dataclass(frozen=True, slots=True)
class Label:
    """What a label says, and its values where they are a list of this gateway's own."""

    help: str
    values: tuple[str, ...] = ()


LABELS: Mapping[str, Label] = MappingProxyType({
    "team": Label(f"the team's name; `none` where nobody is known; `{OTHER}` for every team beyond "
                  f"the first {MAX_TEAMS} that a process saw"),
    "owner": Label(f"the team's name; of the first {MAX_TEAMS} teams alone"),
    "model": Label("the configured name; `none` where it is not known; "
                   f"`{OTHER}` behind the wildcard"),
    "to": Label("the configured name of the model that was asked instead"),
    "upstream": Label("the configured name"),
    "key": Label("the number of the upstream's key; `-` where it needs none"),
    "endpoint": Label("", ("generation", "edit", "response", "estimate", *Passage)),
    "cache": Label("", ("hit", "miss", "off", "join")),
    "result": Label("", ("hit", "miss", "off", "join")),
    "modality": Label("", ("text", "image", "cached_text", "cached_image")),
    "quality": Label("", ("low", "medium", "high", "xhigh", "max", "standard", "hd", "auto",
                          "none", OTHER)),
    "change": Label("", (*CHANGES, OTHER_CHANGE)),
    "limit": Label("what refused: `insufficient_quota` is a budget", (
        "requests_per_minute", "images_per_minute", "concurrent_requests", "insufficient_quota")),
    "scope": Label("", ("team",)),
    "window": Label("", ("day", "week", "month", "total")),
    "mark": Label("`budget` or `soft_budget`, and the percentage: `budget:80`"),
    "kind": Label("", ("open", "limit")),
    "gateway_cross_team_denied_total.kind": Label("", tuple(OwnedKind)),
    "where": Label("", ("memory", "disk")),
    "folder": Label("`database` with SQLite alone", ("database", "blobs", "settlements")),
    "stage": Label("", ("upload", "queued", "reserved", "upstream", "response", "stalled",
                        "broken")),
    "class": Label("how the attempt failed", (
        "dns", "connect", "connect_timeout", "tls", "pool", "write", "write_timeout", "disconnect",
        "read_timeout", "protocol", "truncated", "body_timeout", "too_large", "encoding", "edge",
        "redirect", "sse", "moderation", "4xx", "429", "5xx", "auth", "account", "200_error",
        "bad_answer")),
    "why": Label("", ("auth", "forbidden", "billing")),
    "name": Label("", ("ledger", "directory", "redis", "cache")),
    "version": Label("the release of the gateway"),
    "gateway_requests_total.status": Label("", ("2xx", "4xx", "5xx")),
    "gateway_upstream_requests_total.status": Label(
        "`none`: no answer came", ("2xx", "4xx", "429", "5xx", OTHER, "none")),
    "gateway_requests_rejected_total.reason": Label("the `reason` of [errors.md](errors.md)"),
    "fault": Label("`nobody`: a process that ends, a provider's rate limit, a wait that is over",
                   tuple(Fault)),
    "gateway_gate_errors_total.reason": Label("", (
        "timeout", "connection", "oom", "readonly", "loading", "cluster", "refused")),
    "gateway_flight_board_errors_total.reason": Label("", (
        "timeout", "connection", "oom", "readonly", "loading", "cluster", "refused")),
    "gateway_tokens_total.direction": Label("", ("in", "out")),
    "gateway_upstream_bytes_total.direction": Label("", ("sent", "received")),
    "gateway_ledger_seconds.operation": Label("", ("reserve", "reroute", "settle")),
    "gateway_cache_errors_total.operation": Label("", ("store",)),
    "gateway_results_errors_total.operation": Label("", ("store",)),
    "gateway_hosted_total.outcome": Label("", (
        "stored", "reused", "failed", "served", "not_found", "unavailable")),
    "gateway_hosted_errors_total.operation": Label("", ("store",)),
    "gateway_webhook_total.outcome": Label("", ("delivered", "failed")),
    "gateway_result_news_total.outcome": Label("", ("delivered", "abandoned")),
    "gateway_results_total.outcome": Label("", (
        "ready", "running", "gone", "unknown", "unknown_outcome", "failed")),
    "gateway_upstream_retries_total.outcome": Label("", ("answered", "failed", "no_budget")),
    "gateway_config_reloads_total.outcome": Label("", ("applied", "refused", "postponed")),
})  # fmt: skip
"""Label, or metric and label where it means something else of each, -> what it says."""


def label_of(spec: Spec, name: str) -> Label:
    """What a label of a metric says. Raises ``KeyError`` for one that is not described."""
    own = LABELS.get(f"{spec.name}.{name}")
    return LABELS[name] if own is None else own


GROUPS: Mapping[str, tuple[Spec, ...]] = MappingProxyType({
    "Requests": (
        Spec("gateway_requests_total", Kind.COUNTER,
             ("team", "model", "endpoint", "status", "cache"),
             "Requests answered, by class of status (2xx, 4xx, 5xx) and result of the cache."),
        Spec("gateway_requests_rejected_total", Kind.COUNTER, ("endpoint", "reason", "fault"),
             "Requests that were refused or failed, by reason and by whose fault it is."),
        Spec("gateway_quota_rejections_total", Kind.COUNTER, ("team", "limit"),
             "Requests refused by a limit or a budget of the team or of its key."),
        Spec("gateway_request_duration_seconds", Kind.HISTOGRAM, ("model", "endpoint"),
             "From the first byte of a request that was answered with 200 to the answer's last."),
        Spec("gateway_team_request_seconds_total", Kind.COUNTER, ("team", "model", "endpoint"),
             "Seconds that a team's answered requests took; over those of status 2xx: its mean."),
        Spec("gateway_first_image_seconds", Kind.HISTOGRAM, ("model", "endpoint"),
             "From the first byte sent upstream to a stream's first picture, partial or whole."),
        Spec("gateway_overhead_seconds", Kind.HISTOGRAM, ("endpoint",),
             "What the gateway itself added: duration less upstream, queue, and reading the body.",
             SMALL_SECONDS),
        Spec("gateway_images_total", Kind.COUNTER, ("team", "model", "endpoint", "cache"),
             "Pictures delivered."),
        Spec("gateway_image_qualities_total", Kind.COUNTER, ("model", "quality"),
             "Pictures bought, by the quality that was answered, or asked for; none where neither "
             "says one."),
        Spec("gateway_requests_changed_total", Kind.COUNTER, ("change",),
             "Requests that were sent on otherwise than they came, by what was changed: repairs "
             "(`compat`) and what was pinned."),
        Spec("gateway_request_bytes_total", Kind.COUNTER, ("endpoint",),
             "Bytes of bodies taken from clients."),
        Spec("gateway_response_bytes_total", Kind.COUNTER, ("endpoint",),
             "Bytes of answers sent to clients."),
        Spec("gateway_client_gone_total", Kind.COUNTER, ("stage",),
             "Clients that left, by stage: upload, queued, reserved, upstream, response, stalled, "
             "broken."),
        Spec("gateway_cross_team_denied_total", Kind.COUNTER, ("kind",),
             "Ids of another team's that a request named: file, response, picture. Each was "
             "answered as one that is unknown."),
        Spec("gateway_orphaned_results_total", Kind.COUNTER, (),
             "Pictures bought whose client had left; it may have come back for them."),
    ),
    "Places and queues": (
        Spec("gateway_inflight_requests", Kind.GAUGE, (), "Calls that are with an upstream now.",
             mode="livesum"),
        Spec("gateway_queued_requests", Kind.GAUGE, (), "Calls that wait for a place.",
             mode="livesum"),
        Spec("gateway_queue_seconds", Kind.HISTOGRAM, (),
             "What a call waited for a place in the process and at its upstream.", SMALL_SECONDS),
        Spec("gateway_inflight_bytes", Kind.GAUGE, ("where",),
             "Bytes of bodies and answers held now, in memory and in spool files.", mode="livesum"),
    ),
    "Money": (
        Spec("gateway_spend_usd_total", Kind.COUNTER, ("team", "model", "endpoint"),
             "Dollars booked. The ledger is exact; this is for dashboards."),
        Spec("gateway_spend_avoided_usd_total", Kind.COUNTER, ("team", "model", "endpoint"),
             "Dollars that answers from the cache, or of other requests, had cost when bought."),
        Spec("gateway_spend_estimated_usd_total", Kind.COUNTER, ("model",),
             "Dollars booked without a usage from the upstream."),
        Spec("gateway_tokens_total", Kind.COUNTER, ("team", "model", "direction", "modality"),
             "Tokens billed by the upstream."),
        Spec("gateway_usage_missing_total", Kind.COUNTER, ("model",),
             "Answers without a usage, booked at their bound."),
        Spec("gateway_usage_invalid_total", Kind.COUNTER, ("model",),
             "Answers whose usage cannot be true, booked at their bound."),
        Spec("gateway_unpriced_requests_total", Kind.COUNTER, ("model",),
             "Calls to models without a price, allowed by the operator."),
        Spec("gateway_prices_compiled_timestamp_seconds", Kind.GAUGE, (),
             "The day on which the price table was compiled, as a Unix time; absent where the file "
             "does not say.", mode="scraped"),
        Spec("gateway_model_shutdown_timestamp_seconds", Kind.GAUGE, ("model", "upstream"),
             "When the provider stops serving a configured model, as a Unix time; only where the "
             "price table knows it.", mode="scraped"),
    ),
    "Budgets": (
        Spec("gateway_budget_limit_usd", Kind.GAUGE, ("scope", "owner", "window"),
             "The hard budget of a team.", mode="scraped"),
        Spec("gateway_budget_soft_limit_usd", Kind.GAUGE, ("scope", "owner", "window"),
             "The soft budget of a team.", mode="scraped"),
        Spec("gateway_budget_spent_usd", Kind.GAUGE, ("scope", "owner", "window"),
             "What a team has spent in the running period, also where it has no budget.",
             mode="scraped"),
        Spec("gateway_budget_reserved_usd", Kind.GAUGE, ("scope", "owner", "window"),
             "What running calls hold of a budget in the running period.", mode="scraped"),
        Spec("gateway_budget_reset_timestamp_seconds", Kind.GAUGE, ("scope", "owner", "window"),
             "When the running period of a budget ends, as a Unix time.", mode="scraped"),
        Spec("gateway_budget_notices_total", Kind.COUNTER, ("team", "mark"),
             "Budgets of a team or its keys seen to be used up to a mark, hard or soft, in %."),
        Spec("gateway_webhook_total", Kind.COUNTER, ("outcome",),
             "Messages to the webhook: delivered, or failed after all tries; such are told again."),
    ),
    "Bounds": (
        Spec("gateway_bound_ratio", Kind.HISTOGRAM, ("model",),
             "What a call cost over its bound before any factor, by the model served.", RATIOS),
        Spec("gateway_bound_factor", Kind.GAUGE, ("upstream", "model"),
             "By what the bounds of a model served are raised; above 1 it was seen to cost more.",
             mode="scraped"),
        Spec("gateway_bound_soft_total", Kind.COUNTER, ("model",),
             "Calls whose bound may be passed: the provider does not publish enough to be sure."),
        Spec("gateway_ledger_underestimate_total", Kind.COUNTER, ("model",),
             "Calls that cost more than their bound."),
        Spec("gateway_ledger_underestimate_nanousd_total", Kind.COUNTER, ("model",),
             "Nano-dollars by which calls cost more than their bound."),
    ),
    "The ledger": (
        Spec("gateway_reserve_seconds", Kind.HISTOGRAM, (), "Plan, gate and ledger before a call.",
             SMALL_SECONDS),
        Spec("gateway_settle_seconds", Kind.HISTOGRAM, (), "The settlement after a call.",
             SMALL_SECONDS),
        Spec("gateway_ledger_seconds", Kind.HISTOGRAM, ("operation",),
             "One transaction of the ledger as a call waited for it, also where it failed.",
             SMALL_SECONDS),
        Spec("gateway_ledger_open_holds", Kind.GAUGE, (), "Reservations that have not ended.",
             mode="scraped"),
        Spec("gateway_ledger_oldest_hold_seconds", Kind.GAUGE, (),
             "Age of the open hold whose lease ends first; 0 where none is open.", mode="scraped"),
        Spec("gateway_ledger_unresolved_usd", Kind.GAUGE, (),
             "Dollars posted at the bound because the outcome is unknown.", mode="scraped"),
        Spec("gateway_ledger_unposted_total", Kind.COUNTER, (),
             "Answers that went out before the ledger had taken their settlement."),
        Spec("gateway_settlements_waiting", Kind.GAUGE, (),
             "Settlements that the ledger has not taken yet; they are tried for ever.",
             mode="livesum"),
        Spec("gateway_clock_skew_seconds", Kind.GAUGE, (),
             "By how much this machine's clock is ahead of the database's.", mode="scraped"),
    ),
    "Upstreams": (
        Spec("gateway_upstream_requests_total", Kind.COUNTER, ("upstream", "status"),
             "Calls sent to an upstream, by class of its answer; 429 is apart from 4xx. Each "
             "attempt counts, also one that another made good."),
        Spec("gateway_upstream_errors_total", Kind.COUNTER, ("upstream", "class"),
             "Attempts that an upstream refused or broke, also those that another one made good."),
        Spec("gateway_upstream_duration_seconds", Kind.HISTOGRAM, ("model", "endpoint", "upstream"),
             "From the first byte sent upstream to the last byte back, however it ended; all "
             "attempts of a call together, by the upstream asked last."),
        Spec("gateway_upstream_first_byte_seconds", Kind.HISTOGRAM, ("upstream",),
             "From the beginning of an attempt to the head of its answer, whatever that was; the "
             "first byte of a stream's pictures comes later."),
        Spec("gateway_upstream_bytes_total", Kind.COUNTER, ("upstream", "direction"),
             "Bytes of bodies sent to an upstream, and received from it."),
        Spec("gateway_inflight_upstream_requests", Kind.GAUGE, ("upstream",),
             "Calls that have a place at an upstream now.", mode="livesum"),
        Spec("gateway_upstream_pool_wait_seconds", Kind.HISTOGRAM, ("upstream",),
             "What a call waited for one of its upstream's connections to be free.", SMALL_SECONDS),
        Spec("gateway_upstream_circuit_state", Kind.GAUGE, ("upstream", "key"),
             "The breaker of an upstream's key: 0 closed, 1 half-open, 2 open.", mode="livemax"),
        Spec("gateway_upstream_key_disabled", Kind.GAUGE, ("upstream", "key", "why"),
             "1 while an upstream's key is left alone because it was refused: auth, billing, or "
             "forbidden (for a model). Keys are numbered by the order of the file at the start; "
             "one that came while running has the next number.",
             mode="livemax"),
        Spec("gateway_upstream_cooldowns_total", Kind.COUNTER, ("upstream",),
             "Times an upstream asked to be left alone by one of its keys (429)."),
        Spec("gateway_upstream_retries_total", Kind.COUNTER, ("upstream", "outcome"),
             "Times an upstream that had failed was asked again: answered or failed; or was not, "
             "because it has had its share: no_budget."),
        Spec("gateway_fallbacks_total", Kind.COUNTER, ("model", "to"),
             "Times a configured model was asked in place of another one."),
    ),
    "Cache and results": (
        Spec("gateway_cache_total", Kind.COUNTER, ("result",),
             "Looks into the cache: hit, miss, or off; or join, the answer of another request."),
        Spec("gateway_cache_bytes", Kind.GAUGE, ("where",),
             "Bytes of answers kept by this process: in memory, and on disk where it is the cache.",
             mode="livesum"),
        Spec("gateway_cache_errors_total", Kind.COUNTER, ("operation",),
             "Operations of the cache that failed; each was a miss."),
        Spec("gateway_results_total", Kind.COUNTER, ("outcome",),
             "Results asked for by request id: ready, running, gone, unknown, unknown_outcome (the "
             "call's, not the answer's), or failed."),
        Spec("gateway_results_bytes", Kind.GAUGE, ("where",),
             "Bytes of results kept by this process on disk, where they are there.",
             mode="livesum"),
        Spec("gateway_results_errors_total", Kind.COUNTER, ("operation",),
             "Operations of the store of results that failed; that result may be lost."),
        Spec("gateway_hosted_total", Kind.COUNTER, ("outcome",),
             "Pictures behind urls: stored; reused, of an answer whose pictures were already; "
             "failed, of an answer whose pictures could not be stored; and "
             "what their urls were answered with: served, not_found (forged or over, mostly), or "
             "unavailable."),
        Spec("gateway_hosted_bytes", Kind.GAUGE, ("where",),
             "Bytes of pictures behind urls kept by this process on disk, where they are there.",
             mode="livesum"),
        Spec("gateway_hosted_sent_bytes_total", Kind.COUNTER, (),
             "Bytes sent to those who fetched pictures by their urls."),
        Spec("gateway_hosted_errors_total", Kind.COUNTER, ("operation",),
             "Operations of the store of pictures behind urls that failed; that picture may be "
             "lost to its url."),
        Spec("gateway_result_news_total", Kind.COUNTER, ("outcome",),
             "Messages of asynchronous requests that are over: delivered, or abandoned."),
        Spec("gateway_result_news_waiting", Kind.GAUGE, (),
             "Such messages that the webhook has not taken yet.", mode="livesum"),
        Spec("gateway_flight_joins_total", Kind.COUNTER, ("endpoint",),
             "Requests answered by a flight that another request had launched."),
        Spec("gateway_flight_takeovers_total", Kind.COUNTER, (),
             "Purchases made again because the process that made the first one was gone "
             "(relay.on_unknown: repeat)."),
        Spec("gateway_flight_unjoined_retries_total", Kind.COUNTER, (),
             "Retries of an SDK that found no flight, and bought: some for the second time, where "
             "Redis was away."),
        Spec("gateway_flight_board_errors_total", Kind.COUNTER, ("reason",),
             "Commands that the shared board of flights did not serve, by reason."),
    ),
    "The shared gate": (
        Spec("gateway_gate_degraded", Kind.GAUGE, (),
             "1 while the shared gate is away, and storage.without_redis says what holds.",
             mode="livemax"),
        Spec("gateway_gate_seconds", Kind.HISTOGRAM, (),
             "What a request waited for the shared gate, or for it not to answer.", SMALL_SECONDS),
        Spec("gateway_gate_errors_total", Kind.COUNTER, ("reason",),
             "Commands that the shared gate did not serve, by reason."),
        Spec("gateway_gate_restarts_total", Kind.COUNTER, (),
             "Times the shared gate had forgotten what it counted, and limits began anew."),
    ),
    "Processes": (
        Spec("gateway_workers", Kind.GAUGE, (), "Processes that serve.", mode="livesum"),
        Spec("gateway_memory_bytes", Kind.GAUGE, (), "Resident memory of the processes that serve.",
             mode="livesum"),
        Spec("gateway_cpu_seconds_total", Kind.COUNTER, (),
             "Processor time of the processes that serve, and of those that did."),
        Spec("gateway_loop_lag_seconds", Kind.HISTOGRAM, (),
             "By how much the event loop was late for its watchdog, four times a second.",
             LAG_SECONDS),
        Spec("gateway_fds", Kind.GAUGE, ("kind",),
             "File descriptors: those that are open, and the limit of a process.",
             mode="livesum"),
        Spec("gateway_connections_refused_total", Kind.COUNTER, (),
             "Connections that were refused because server.max_connections were open."),
        Spec("gateway_disk_free_bytes", Kind.GAUGE, ("folder",),
             "Bytes that may still be written: beside the database (SQLite), the blobs, and the "
             "settlements that wait.", mode="scraped"),
        Spec("gateway_dependency_up", Kind.GAUGE, ("name",), "1 while a store answers.",
             mode="scraped"),
        Spec("gateway_config_reload_failed", Kind.GAUGE, (),
             "1 where the configuration could not be read again at the last try: nothing changed.",
             mode="livemax"),
        Spec("gateway_config_reloads_total", Kind.COUNTER, ("outcome",),
             "Times the configuration was read again while running."),
        Spec("gateway_spans_dropped_total", Kind.COUNTER, (),
             "Spans that the collector of traces did not take in time.", threads=True),
        Spec("gateway_metrics_label_overflow_total", Kind.COUNTER, (),
             "Times a team was counted as `other` because there are too many teams for labels."),
        Spec("gateway_build_info", Kind.GAUGE, ("version",), "Always 1.", mode="scraped"),
    ),
})  # fmt: skip
"""Every metric, by what an operator looks for."""

TABLE = tuple(spec for group in GROUPS.values() for spec in group)

_PASSAGES = frozenset(one.value for one in Passage)

_QUALITIES = frozenset(LABELS["quality"].values)

_DOUBTS: Mapping[str, str] = MappingProxyType({
    "no_usage": "gateway_usage_missing_total",
    "invalid_usage": "gateway_usage_invalid_total",
    "unpriced": "gateway_unpriced_requests_total",
    "over_bound": "gateway_ledger_underestimate_total",
    "soft": "gateway_bound_soft_total",
})  # fmt: skip
"""A receipt's flag -> what counts it."""

BUDGET_GAUGES = tuple(
    spec.name
    for spec in TABLE
    if spec.kind is Kind.GAUGE and spec.name.startswith("gateway_budget_")
)


class _Scraped(Collector):
    """A gauge that is known anew at each scrape, in no file: prometheus_client's own can neither
    forget a series nor stay out of the files where there are several workers."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._series: dict[tuple[str, ...], float] = {}
        self.clear()

    def set(self, value: float, labels: Mapping[str, str]) -> None:
        if labels.keys() != set(self._spec.labels):
            raise ValueError(f"{self._spec.name} has the labels {self._spec.labels}")
        self._series[tuple(labels[name] for name in self._spec.labels)] = value

    def clear(self) -> None:
        self._series = {} if self._spec.labels else {(): 0.0}

    def replace(self, series: Mapping[tuple[str, ...], float]) -> None:
        self._series = dict(series)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily(self._spec.name, self._spec.help, labels=self._spec.labels)
        for labels, value in self._series.items():
            family.add_metric(labels, value)
        yield family


class _Number:
    """What a series of a process alone is kept in: prometheus_client's own has a lock, for threads,
    and so takes four times as long. These are moved in the event loop's thread."""

    __slots__ = ("_of", "value")

    def __init__(self, of: Counter | Histogram) -> None:
        self._of = of
        self.value = 0.0

    def inc(self, amount: float) -> None:
        if amount < 0:
            raise ValueError(f"{self._of} never falls")
        self.value += amount

    def get(self) -> float:
        return self.value

    def get_exemplar(self) -> None:
        return None


class _Counter(Counter):
    """Rises in 0.1 us where prometheus_client's own takes 0.6."""

    _value: _Number

    def _metric_init(self) -> None:
        self._value = _Number(self)

    def move(self) -> Move:
        return self._value.inc


class _SharedCounter(Counter):
    """Of several workers, in their files; and one that any thread may raise. It takes two thirds
    of what prometheus_client's own does."""

    def inc(self, amount: float = 1, exemplar: dict[str, str] | None = None) -> None:
        if amount < 0:
            raise ValueError(f"{self} never falls")
        self._value.inc(amount)

    def move(self) -> Move:
        return self.inc


class _Histogram(Histogram):
    """Takes a value in 0.3 us where prometheus_client's own takes 2.9: it looks for the bucket in
    halves, and asks nothing that was answered when the series was made."""

    def _metric_init(self) -> None:
        self._sum = _Number(self)
        self._buckets = [_Number(self) for _ in self._upper_bounds]

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        # Time never runs backwards, whatever two clocks say.
        if amount < 0:
            amount = 0.0
        self._sum.value += amount
        self._buckets[bisect_left(self._upper_bounds, amount)].value += 1


class _SharedHistogram(Histogram):
    """Of several workers, in their files."""

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        if amount < 0:
            amount = 0.0
        self._sum.inc(amount)
        self._buckets[bisect_left(self._upper_bounds, amount)].inc(1)


class _Moves(dict[tuple[str, ...], Move]):
    """How the series of a kind are moved, by metric and by its labels' values in the order of the
    table. They are kept: to look one up takes prometheus_client longer than to move it."""

    def __init__(self, kind: Kind, move_of: Callable[[str, Sequence[str]], Move]) -> None:
        super().__init__()
        self._labels = {spec.name: spec.labels for spec in TABLE if spec.kind is kind}
        self._kind = kind
        self._move_of = move_of

    def __missing__(self, key: tuple[str, ...]) -> Move:
        name, *labels = key
        if name not in self._labels:
            raise TypeError(f"{name} is not a {self._kind.name.lower()}")
        return self.setdefault(key, self._move_of(name, labels))

    def named(self, name: str, labels: Mapping[str, str]) -> Move:
        """By the labels' names too, in any order. That key is longer, where there are labels, and
        never another's."""
        key = (name, *labels, *labels.values())
        known = self.get(key)
        if known is None:
            order = self._labels.get(name, ())
            if order and labels.keys() != set(order):
                raise ValueError(f"{name} has the labels {order}")
            known = self[key] = self[name, *(labels[one] for one in order)]
        return known


class Metrics:
    """The metrics of one process, in a registry of their own.

    Where the supervisor runs several workers, their values are in files that all of them read
    (prometheus_client's multiprocess mode), and any of them tells those of all. What is looked up
    at each scrape is in a plain registry of the worker that is asked.
    """

    def __init__(self, version: str, registry: CollectorRegistry | None = None) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry or CollectorRegistry()
        self.shared = bool(values.ValueClass._multiprocess)
        self._own = CollectorRegistry() if self.shared else self.registry
        self._watched: list[tuple[Gauge, Callable[[], float]]] = []
        self._followed: dict[Counter, tuple[Callable[[], float], float]] = {}
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, _Counter | _SharedCounter] = {}
        self._histograms: dict[str, Histogram] = {}
        self._add = _Moves(Kind.COUNTER, self._adder)
        self._observe = _Moves(Kind.HISTOGRAM, self._observer)
        self._scraped: dict[str, _Scraped] = {}
        for spec in TABLE:
            if spec.mode == "scraped":
                self._scraped[spec.name] = _Scraped(spec)
                self._own.register(self._scraped[spec.name])
                continue
            if spec.kind is Kind.HISTOGRAM:
                histogram = _SharedHistogram if self.shared else _Histogram
                self._histograms[spec.name] = histogram(
                    spec.name, spec.help, spec.labels, registry=self.registry, buckets=spec.buckets
                )
            elif spec.kind is Kind.GAUGE:
                self._gauges[spec.name] = Gauge(
                    spec.name,
                    spec.help,
                    spec.labels,
                    registry=self.registry,
                    multiprocess_mode=spec.mode,
                )
            else:
                counter = _SharedCounter if self.shared or spec.threads else _Counter
                self._counters[spec.name] = counter(
                    spec.name, spec.help, spec.labels, registry=self.registry
                )
        self._teams: set[str] = set()
        self._begun: set[tuple[str, ...]] = set()
        self.set("gateway_build_info", 1, version=version)

    def add(self, name: str, amount: float = 1, /, **labels: str) -> None:
        """Raises a counter."""
        self._add.named(name, labels)(amount)

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """Sets a gauge."""
        if name in self._scraped:
            self._scraped[name].set(value, labels)
        else:
            self._gauge(name, labels).set(value)

    def watch(self, name: str, look: Callable[[], float], /, **labels: str) -> None:
        """A gauge that is looked up whenever it is read; of several workers, by ``look``."""
        gauge = self._gauge(name, labels)
        if self.shared:
            self._watched.append((gauge, look))
        else:
            gauge.set_function(look)

    def follow(self, name: str, look: Callable[[], float], /) -> None:
        """A counter without labels that goes by what ``look`` says, a sum that only grows."""
        self._followed[self._counters[name]] = (look, 0.0)

    def replace(self, name: str, series: Mapping[tuple[str, ...], float], /) -> None:
        """Sets every series of a gauge that is looked up at each scrape: the values of its labels,
        in their order, and the gauge's. Those that are not given are forgotten."""
        self._scraped[name].replace(series)

    def look(self) -> None:
        """Writes down what is watched and followed, for whichever worker is asked next."""
        for gauge, look in self._watched:
            gauge.set(look())
        for counter, (look, known) in self._followed.items():
            now = max(known, look())
            counter.inc(now - known)
            self._followed[counter] = (look, now)

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Adds to a histogram."""
        self._observe.named(name, labels)(value)

    def adder(self, name: str, /, **labels: str) -> Move:
        """``add`` of one series, which is looked up now: for who moves it with every request."""
        return self._add.named(name, labels)

    def observer(self, name: str, /, **labels: str) -> Move:
        """``observe`` of one series, likewise."""
        return self._observe.named(name, labels)

    def _gauge(self, name: str, labels: Mapping[str, str]) -> Gauge:
        gauge = self._gauges.get(name)
        if gauge is None:
            raise TypeError(f"{name} is not a gauge")
        return gauge.labels(**labels) if labels else gauge

    def _adder(self, name: str, labels: Sequence[str]) -> Move:
        counter = self._counters[name]
        return (counter.labels(*labels) if labels else counter).move()

    def _observer(self, name: str, labels: Sequence[str]) -> Move:
        histogram = self._histograms[name]
        return (histogram.labels(*labels) if labels else histogram).observe

    def team(self, name: str) -> str:
        """A team's label: its name, ``other`` beyond the cap, or ``none``."""
        if not name:
            return "none"
        if name not in self._teams:
            if len(self._teams) >= MAX_TEAMS:
                self.add("gateway_metrics_label_overflow_total")
                return OTHER
            self._teams.add(name)
        return name

    def begun(self, receipt: Receipt) -> None:
        """A call is let in: what it will count is there with 0, seconds before it counts. To
        ``increase()`` a series that is born with its first value has grown by nothing."""
        key = (
            receipt.team,
            receipt.model_label,
            receipt.operation,
            receipt.cache,
            receipt.drawn_label,
        )
        if key in self._begun:
            return
        if receipt.team not in self._teams and len(self._teams) >= MAX_TEAMS:
            return  # What all of them share is there.
        self._begun.add(key)
        add, team, model = self._add, self.team(receipt.team), receipt.model_label or "none"
        endpoint, cache = receipt.operation, receipt.cache
        add["gateway_requests_total", team, model, endpoint, "2xx", cache](0)
        if endpoint in _PASSAGES:
            return
        for each in dict.fromkeys((model, receipt.drawn_label or model)):
            add["gateway_images_total", team, each, endpoint, cache](0)
            add["gateway_spend_usd_total", team, each, endpoint](0)
        add["gateway_team_request_seconds_total", team, model, endpoint](0)
        if cache is CacheResult.MISS:
            add["gateway_spend_avoided_usd_total", team, model, endpoint](0)

    def finished(self, receipt: Receipt, delivery: Delivery) -> None:
        """Counts one request, all at once, from what is known at its end."""
        add, team, model = self._add, receipt.team, receipt.model_label or "none"
        if team not in self._teams:
            team = self.team(team)
        endpoint, status = receipt.operation, receipt.status
        asked = endpoint == Inquiry.ESTIMATE
        # An estimate only says what a look into the cache would find: it is not one.
        cache = CacheResult.OFF if asked else receipt.cache
        add["gateway_requests_total", team, model, endpoint, f"{status // 100}xx", cache](1)
        add["gateway_request_bytes_total", endpoint](receipt.bytes_in)
        add["gateway_response_bytes_total", endpoint](delivery.bytes_out)
        if receipt.reason:
            self._count_failure(receipt, team)
        if delivery.gone:
            add["gateway_client_gone_total", delivery.gone](1)
            if receipt.outcome is Outcome.DELIVERED:
                add["gateway_orphaned_results_total",](1)
        if receipt.model_label and not asked:
            add["gateway_cache_total", cache](1)
        if status == 200:
            self._count_answer(receipt, delivery.seconds, team, model)
            if not asked and endpoint not in _PASSAGES:
                drawer = receipt.drawn_label or model
                add["gateway_images_total", team, drawer, endpoint, cache](receipt.images)
        if receipt.joined or cache is CacheResult.HIT:
            avoided = receipt.avoided / NANOS_PER_DOLLAR
            add["gateway_spend_avoided_usd_total", team, model, endpoint](avoided)
        elif receipt.outcome is not None:
            self._count_purchase(receipt, team, model)
        for change in receipt.changed:
            add["gateway_requests_changed_total", change](1)
        if cache is CacheResult.JOIN or receipt.took_over or receipt.retried:
            self._count_flight(receipt)

    def _count_answer(self, receipt: Receipt, seconds: float, team: str, model: str) -> None:
        endpoint, timings = receipt.operation, receipt.timings
        self._observe["gateway_request_duration_seconds", model, endpoint](seconds)
        self._add["gateway_team_request_seconds_total", team, model, endpoint](seconds)
        if receipt.cache is not CacheResult.JOIN:
            own = seconds - (timings.reading + timings.queueing + timings.upstream)
            self._observe["gateway_overhead_seconds", endpoint](own)

    def _count_flight(self, receipt: Receipt) -> None:
        if receipt.cache is CacheResult.JOIN:
            self._add["gateway_flight_joins_total", receipt.operation](1)
        if receipt.attempts and receipt.took_over:
            self._add["gateway_flight_takeovers_total",](1)
        elif receipt.attempts and receipt.retried:
            self._add["gateway_flight_unjoined_retries_total",](1)

    def _count_failure(self, receipt: Receipt, team: str) -> None:
        endpoint, reason, fault = receipt.operation, receipt.reason, receipt.fault or Fault.NOBODY
        self._add["gateway_requests_rejected_total", endpoint, reason, fault](1)
        own = receipt.outcome is None  # An upstream may use the same codes for its own limits.
        if own and receipt.code in ("insufficient_quota", "rate_limit_exceeded"):
            self._add["gateway_quota_rejections_total", team, reason](1)

    def _count_purchase(self, receipt: Receipt, team: str, model: str) -> None:
        add, observe, timings = self._add, self._observe, receipt.timings
        endpoint, upstream = receipt.operation, receipt.upstream
        observe["gateway_reserve_seconds",](timings.reserving)
        observe["gateway_settle_seconds",](timings.settling)
        if receipt.attempts:
            seconds = timings.upstream
            observe["gateway_upstream_duration_seconds", model, endpoint, upstream](seconds)
        if timings.first_image:
            observe["gateway_first_image_seconds", model, endpoint](timings.first_image)
        drawer, drawn = receipt.drawn_label or model, receipt.drawn
        own = receipt.cost if drawn is None else receipt.cost - drawn.cost
        add["gateway_spend_usd_total", team, model, endpoint](own / NANOS_PER_DOLLAR)
        tokens = _tokens(receipt.usage)
        if drawn is not None:
            if drawn.cost:
                its = drawn.cost / NANOS_PER_DOLLAR
                add["gateway_spend_usd_total", team, drawer, endpoint](its)
            of_drawer = _tokens(drawn.usage)
            self._count_tokens(of_drawer, team, drawer)
            tokens = tuple(map(operator.sub, tokens, of_drawer))
        self._count_tokens(tokens, team, model)
        if receipt.images:
            quality = receipt.quality or "none"
            quality = quality if quality in _QUALITIES else OTHER
            add["gateway_image_qualities_total", drawer, quality](receipt.images)
        if receipt.basis is Basis.ESTIMATED:
            add["gateway_spend_estimated_usd_total", model](receipt.cost / NANOS_PER_DOLLAR)
        for flag in receipt.flags:
            if flag in _DOUBTS:
                add[_DOUBTS[flag], model](1)
        if "over_bound" in receipt.flags:
            over = max(0, receipt.cost - receipt.bound)
            add["gateway_ledger_underestimate_nanousd_total", model](over)
        if not receipt.posted:
            add["gateway_ledger_unposted_total",](1)

    def _count_tokens(self, tokens: tuple[int, ...], team: str, model: str) -> None:
        for at, count in enumerate(tokens):
            if count:
                self._add["gateway_tokens_total", team, model, *_TOKENS[at]](count)

    def budgets(self, standing: Iterable[tuple[Line, Balance]]) -> None:
        """Sets the gauges of the teams' accounts; those that it is not given are forgotten, and so
        is a limit that was taken away."""
        for name in BUDGET_GAUGES:
            self._scraped[name].clear()
        owners: set[str] = set()
        for line, balance in standing:
            limit, ends = line.limit, line.period.ends
            owner = limit.owner
            if owner not in owners and len(owners) >= MAX_TEAMS:
                # A gauge of several teams would be the last one's.
                continue
            owners.add(owner)
            where = {
                "scope": limit.scope.value,
                "owner": owner,
                "window": limit.window.value,
            }
            if limit.amount is not None:
                self.set("gateway_budget_limit_usd", _dollars(limit.amount), **where)
            if limit.soft is not None:
                self.set("gateway_budget_soft_limit_usd", _dollars(limit.soft), **where)
            self.set("gateway_budget_spent_usd", _dollars(balance.posted), **where)
            if limit.amount is None and limit.soft is None:
                continue
            self.set("gateway_budget_reserved_usd", _dollars(balance.pending), **where)
            if ends is not None:
                self.set("gateway_budget_reset_timestamp_seconds", ends.timestamp(), **where)

    def dependencies(self, up: Mapping[str, bool]) -> None:
        for name, is_up in up.items():
            self.set("gateway_dependency_up", 1 if is_up else 0, name=name)

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        self.look()
        if not self.shared:
            return prometheus_client.generate_latest(self.registry)
        everyone = CollectorRegistry()
        everyone.register(_Workers())
        return prometheus_client.generate_latest(everyone) + prometheus_client.generate_latest(
            self._own
        )


class _Workers(Collector):
    """What all workers have in their files. One that begins makes a file and then its room: it is
    passed over until then, for the library would take it for a broken one."""

    def collect(self) -> Iterable[Metric]:
        files = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).glob("*.db")
        begun = [str(file) for file in files if _size(file)]
        merged: Iterable[Metric] = MultiProcessCollector.merge(begun)  # type: ignore[no-untyped-call]
        return merged


def _size(file: Path) -> int:
    """0 where it is gone, too: a dead worker's."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def status_class(status: int) -> str:
    """An upstream's answer as a label: 429 is apart from the other 4xx; 0 is none."""
    if status == 429:
        return "429"
    return {0: "none", 2: "2xx", 4: "4xx", 5: "5xx"}.get(status // 100, OTHER)


_TOKENS = (
    ("in", "text"),
    ("in", "image"),
    ("in", "cached_text"),
    ("in", "cached_image"),
    ("out", "text"),
    ("out", "image"),
)
"""Directions and modalities."""


def _tokens(usage: Usage) -> tuple[int, ...]:
    """In the order of ``_TOKENS``; what was cached is no other input."""
    return (
        usage.text_in - usage.cached_text_in,
        usage.image_in - usage.cached_image_in,
        usage.cached_text_in,
        usage.cached_image_in,
        usage.text_out,
        usage.image_out,
    )


def _dollars(nanousd: Money) -> float:
    return nanousd / NANOS_PER_DOLLAR
