"""The goals: what is divided by what, how far it must get, and how far it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.bench.cases import CASES
from tests.bench.results import Run
from tests.bench.variants import row

OURS: Final = "gateway"
"""As it ships."""
POLICY: Final = "gateway-policy"
"""With what the goals were set for: nothing is kept on disk but the books."""
TWO: Final = row(OURS, 2)
"""Where one worker may not open files for so many."""
KEPT: Final = " (as it ships: each answer kept on disk)"


@dataclass(frozen=True, slots=True)
class Goal:
    """``measure`` is None where something that it needs was not measured, or failed. ``more``: the
    more the better, so that the limits are the least that will do; else the most."""

    text: str
    goal: float
    stretch: float
    measure: Callable[[Run], float | None]
    more: bool = False
    instead: bool = False
    """Of what is measured where another goal's machine cannot be had; no row where it was not."""

    def reached(self, run: Run) -> str:
        """``stretch``, ``goal``, ``missed`` or ``not measured``."""
        value = self.measure(run)
        if value is None:
            return "not measured"
        for name, limit in (("stretch", self.stretch), ("goal", self.goal)):
            if value >= limit if self.more else value <= limit:
                return name
        return "missed"

    def limit(self, value: float) -> str:
        return f"{'≥' if self.more else '≤'} {value:g}"


def _ratio(
    metric: str, above: tuple[str, str], below: tuple[str, str]
) -> Callable[[Run], float | None]:
    return lambda run: run.ratio(metric, above, below)


def added_p50_ms(run: Run, target: str) -> float | None:
    """What a target adds to the median latency of S at 32 at once; at least a microsecond."""
    whole = run.median("s_c32", target, "p50_ms")
    mock = run.median("s_c32", "direct", "p50_ms")
    return max(whole - mock, 0.001) if whole is not None and mock is not None else None


def _added_p50(target: str) -> Callable[[Run], float | None]:
    def measure(run: Run) -> float | None:
        theirs, ours = added_p50_ms(run, "litellm"), added_p50_ms(run, target)
        return theirs / ours if theirs is not None and ours is not None else None

    return measure


def _both(
    text: str,
    goal: float,
    stretch: float,
    measure: Callable[[str], Callable[[Run], float | None]],
    *,
    more: bool = False,
) -> tuple[Goal, Goal]:
    """A goal, and the same of the gateway as it ships."""
    return (
        Goal(text, goal, stretch, measure(POLICY), more=more),
        Goal(text + KEPT, goal, stretch, measure(OURS), more=more),
    )


def _over_delay(case: str, target: str = OURS) -> Callable[[Run], float | None]:
    [delay_ms] = [one.delay_ms for one in CASES if one.name == case]

    def measure(run: Run) -> float | None:
        longest = run.median(case, target, "max_ms")
        return longest / delay_ms if longest is not None else None

    return measure


def _upload_growth(run: Run) -> float | None:
    """Flat is: less than one of the four pictures that are under way."""
    peak = run.median("upload_20mb_c4", OURS, "rss_peak_mb")
    idle = run.median("upload_20mb_c4", OURS, "rss_idle_mb")
    return peak - idle if peak is not None and idle is not None else None


def _landing(run: Run) -> float | None:
    return run.median("landing_300", OURS, "rss_kb_per_request")


def _in_flight(case: str, target: str = OURS) -> Callable[[Run], float | None]:
    return lambda run: run.median(case, target, "rss_kb_per_request")


GOALS: Final = (
    *_both(
        "CPU of an S request at c32, LiteLLM / ours", 60, 150,
        lambda ours: _ratio("cpu_us", ("s_c32", "litellm"), ("s_c32", ours)), more=True,
    ),
    *_both(
        "CPU of an S request at c32, Portkey / ours", 12, 40,
        lambda ours: _ratio("cpu_us", ("s_c32", "portkey"), ("s_c32", ours)), more=True,
    ),
    *_both(
        "CPU of an M request at c8, ours / nginx 64k", 1.6, 1.0,
        lambda ours: _ratio("cpu_us", ("m_c8", ours), ("m_c8", "nginx-64k")),
    ),
    *_both(
        "CPU of an M request at c8, LiteLLM / ours", 12, 20,
        lambda ours: _ratio("cpu_us", ("m_c8", "litellm"), ("m_c8", ours)), more=True,
    ),
    *_both(
        "CPU of an M request at c8, Portkey / ours", 28, 45,
        lambda ours: _ratio("cpu_us", ("m_c8", "portkey"), ("m_c8", ours)), more=True,
    ),
    *_both(
        "M throughput, ours / nginx 64k", 0.85, 1.0,
        lambda ours: _ratio("mb_per_second", ("m_c8", ours), ("m_c8", "nginx-64k")), more=True,
    ),
    Goal(
        "cached M from the memory, requests/s, ours / nginx sendfile", 1.2, 1.6,
        _ratio(
            "requests_per_second", ("hit_memory_c8", OURS), ("hit_memory_c8", "nginx-sendfile")
        ), more=True,
    ),
    Goal(
        "cached M from Valkey, requests/s, ours / nginx sendfile", 0.28, 0.5,
        _ratio(
            "requests_per_second", ("hit_redis_c8", "gateway-redis"),
            ("hit_redis_c8", "nginx-sendfile"),
        ), more=True,
    ),
    Goal("RSS of a request in flight at 2,000, KB", 20, 8, _in_flight("inflight_2000")),
    Goal(
        "RSS of a request in flight at 9,000 on one worker, KB", 20, 8,
        _in_flight("inflight_9000"),
    ),
    Goal(
        "RSS of a request in flight at 9,000 on two workers, growth of both, KB", 20, 8,
        _in_flight("inflight_9000", TWO), instead=True,
    ),
    Goal(
        "9,000 in flight on one worker, that come within 18 s, no error; longest latency / delay "
        "of the upstream (20 s)",
        1.15, 1.05, _over_delay("inflight_9000"),
    ),
    Goal(
        "9,000 in flight on two workers of one core, that come within 18 s, no error; longest "
        "latency / delay of the upstream (20 s)",
        1.15, 1.05, _over_delay("inflight_9000", TWO), instead=True,
    ),
    Goal("peak RSS of a request, 300 M bodies landing together, KB", 500, 64, _landing),
    Goal(
        "first event of a stream that begins after 1.5 s, ours / nginx unbuffered", 1.08, 1.02,
        _ratio("first_ms", ("e_paced", OURS), ("e_paced", "nginx")),
    ),
    Goal(
        "20 MB upload, CPU, ours / nginx unbuffered", 3.0, 1.2,
        _ratio("cpu_us", ("upload_20mb_c4", OURS), ("upload_20mb_c4", "nginx")),
    ),
    Goal("20 MB upload, four at once, growth of RSS, MB", 20, 20, _upload_growth),
    *_both("added p50 on S at c32, LiteLLM / ours", 15, 40, _added_p50, more=True),
)  # fmt: skip
