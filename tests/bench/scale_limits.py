"""What comes next where there are many replicas: calculated from what was measured of one or two.

A request takes so much of each thing that replicas share; so many replicas at so many requests a
second each need so much of it; the thing has so much. What is needed most of, against what there
is, is the next bottleneck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tests.bench.report import figure, rows
from tests.bench.scale import (
    ALONE,
    APART,
    BESIDE_LITTLE,
    BESIDE_MUCH,
    ONE,
    ONE_VALKEY,
    PAIR,
    SPREAD,
    WORKERS,
    WORKERS_SPREAD,
)
from tests.bench.study import Rise, Study, Table, rise_in_rounds

REPLICAS: Final = (100, 1_000)
REQUESTS_PER_SECOND: Final = 50.0
"""Of a replica: 1,000 in flight that take 20 s each."""
POSTGRES_CORES: Final = 16.0
VALKEY_CORES: Final = 1.0
MAX_CONNECTIONS: Final = 100.0
PATIENCE_SECONDS: Final = 3.0
WAL_MB_PER_SECOND: Final = 500.0
NETWORK_MB_PER_SECOND: Final = 1_250.0
"""10 Gbit/s."""
VALKEY_GB: Final = 64.0
RESULT_SECONDS: Final = 15 * 60
SCRAPE_EVERY_SECONDS: Final = 15.0
ALLOWED_RISE: Final = 0.15
GOALS: Final = (
    (WORKERS, ONE_VALKEY),
    (WORKERS_SPREAD, ONE_VALKEY),
    (PAIR, ALONE),
    (SPREAD, ALONE),
)
"""What may rise by no more than that."""
PICTURES: Final = ((WORKERS, ONE_VALKEY), (PAIR, ALONE))
"""The same with whole pictures."""
ABOUT: Final = {
    (APART, ALONE): "what a second one costs this machine, where nothing is shared",
    (BESIDE_LITTLE, ALONE): "what it costs to have the core in turns with anything",
    (BESIDE_MUCH, ALONE): "and with what uses the core's caches",
    (PAIR, APART): "what it costs that stores are shared",
    (WORKERS, ONE): "the cost of Valkey with it",
}
METHOD: Final = """Each round measures all of them one after the other, what is compared side by
side, every other round backwards. The rise is the median of the rounds' own ratios, so that what
slows a machine down for seconds is in both. Between brackets: where the true median is 19 times in
20, by the order of the ratios alone. Gateways and workers have one core together, generator, mock
and stores the other; where they have a core each, the second one is beside these. Instructions are
not counted: virtual machines like this one have no counter for them."""


@dataclass(frozen=True, slots=True)
class Need:
    """What so many replicas need of one thing: ``each`` a replica needs, ``has`` there is.
    ``why`` says how it was calculated; ``way_out`` what an operator does about it."""

    what: str
    each: float
    has: float
    why: str
    way_out: str

    def share(self, replicas: int) -> float:
        """Of what there is; above 1 it does not do."""
        return self.each * replicas / self.has

    @property
    def replicas(self) -> float:
        """How many it does for."""
        return self.has / self.each if self.each else float("inf")


def needs(study: Study) -> list[Need]:
    """Everything that replicas share, whatever of it was measured; the scarcest first."""
    busy, slow, alone = study.tables["busy"], study.tables["slow"], study.numbers
    per = REQUESTS_PER_SECOND
    found = []

    def note(what: str, each: float | None, has: float, why: str, way_out: str) -> None:
        if each is not None:
            found.append(Need(what, each, has, why, way_out))

    postgres_us = slow.get(ALONE, "postgres_us")
    note(
        "PostgreSQL: cores",
        _times(postgres_us, per / 1e6),
        POSTGRES_CORES,
        "CPU a request at 50 a second, where few calls share a commit",
        "a larger server; then a database for each group of teams",
    )
    note(
        "PostgreSQL: WAL, MB/s",
        _times(slow.get(ALONE, "postgres_wal_kb"), per / 1e3),
        WAL_MB_PER_SECOND,
        "WAL a request",
        "a faster disk for the WAL",
    )
    connections = busy.get(ALONE, "connections")
    note(
        "PostgreSQL: connections",
        connections,
        MAX_CONNECTIONS,
        "those of one process, against the default of max_connections",
        "max_connections, 10 MB of memory each; or a pooler by session",
    )
    row = alone.get("row_ms")
    note(
        "one team's row: writers that wait, s",
        _times(row, 1e-3),
        PATIENCE_SECONDS,
        "every replica has a call of the same team: each commit holds the team's row, the others"
        " wait their turn, and a call is refused that waits longer than this",
        "keys of several teams, or fewer and larger replicas",
    )
    note(
        "Valkey: its one thread",
        _times(slow.get(ALONE, "valkey_us"), per / 1e6),
        VALKEY_CORES,
        "CPU a request",
        "cache.redis apart from storage.redis; a larger core",
    )
    note(
        "Valkey: pictures, MB/s",
        _times(alone.get("picture_valkey_mb"), per),
        NETWORK_MB_PER_SECOND,
        "bytes sent to it for an answer of 2.7 MB",
        "cache.redis: a cluster of its own; or cache and results off",
    )
    kept = _times(alone.get("picture_mb"), per * RESULT_SECONDS / 1e3)
    note(
        "Valkey: results kept for 15 min, GB",
        kept,
        VALKEY_GB,
        "answers of 2.7 MB",
        "results.ttl; cache.redis: a cluster of its own",
    )
    note(
        "PostgreSQL: scrapes, cores",
        _times(alone.get("scrape_postgres_ms"), 1e-3 / SCRAPE_EVERY_SECONDS), POSTGRES_CORES,
        "each replica is scraped every 15 s, and looks into the books for it",
        "a longer interval of the scrape",
    )  # fmt: skip
    return sorted(found, key=lambda need: need.replicas)


def _times(value: float | None, factor: float) -> float | None:
    return value * factor if value is not None else None


def needs_text(study: Study) -> str:
    """The table, and what it comes to."""
    found = needs(study)
    if not found:
        return "Nothing was measured to calculate from."
    head = (
        "what replicas share", "there is", *(f"{count:,} replicas" for count in REPLICAS),
        "does for, replicas", "calculated from", "way out",
    )  # fmt: skip
    lines = [
        (
            need.what,
            figure(need.has),
            *(
                f"{figure(need.each * count)} ({figure(need.share(count) * 100)} %)"
                for count in REPLICAS
            ),
            f"{need.replicas:,.0f}",
            need.why,
            need.way_out,
        )
        for need in found
    ]
    first = [_first(found, count) for count in REPLICAS]
    return "\n\n".join((rows(head, lines), *first))


def _first(found: Sequence[Need], replicas: int) -> str:
    over = [need.what for need in found if need.share(replicas) > 1]
    if not over:
        return f"At {replicas:,} replicas: nothing; the nearest is {found[0].what}."
    return f"At {replicas:,} replicas: {'; then '.join(over)}."


def rises(
    study: Study, table: str = "busy", pairs: Sequence[tuple[str, str]] = (*GOALS, *ABOUT)
) -> Mapping[tuple[str, str], Rise | None]:
    """By what CPU a request is more: of each fleet over the one beside it."""
    found = study.tables.get(table, Table("", "", ()))
    return {pair: rise_in_rounds(found, "cpu_us", *pair) for pair in pairs}


def rises_text(study: Study) -> str:
    lines = [_line("1.5 KB", *pair, rise) for pair, rise in rises(study).items()]
    pictures = rises(study, "pictures", PICTURES)
    lines[len(GOALS) : len(GOALS)] = [_line("2.7 MB", *one, rise) for one, rise in pictures.items()]
    head = ("CPU a request", "answers of", "rise", f"at most {ALLOWED_RISE * 100:.0f} %")
    return rows(head, lines)


def _line(answers: str, above: str, below: str, rise: Rise | None) -> tuple[str, ...]:
    said = "not measured"
    if rise is not None:
        low, high = f"{rise.low * 100:+.0f}", f"{rise.high * 100:+.0f}"
        said = f"{rise.median * 100:+.0f} % ({low} to {high})"
    return (f"{above} / {below}", answers, said, ABOUT.get((above, below)) or _reached(rise))


def _reached(value: Rise | None) -> str:
    if value is None:
        return ""
    said = "reached" if value.median <= ALLOWED_RISE else "missed"
    return said if not value.low <= ALLOWED_RISE < value.high else f"{said}, within the noise"
