"""What is measured, case by case: what is asked, how many at once, of whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MB: Final = 1_000_000
PROXIES: Final = ("gateway", "nginx", "nginx-64k")
POLICY: Final = ("gateway", "gateway-policy", "nginx", "nginx-64k")
PEERS: Final = ("litellm", "portkey")


@dataclass(frozen=True, slots=True)
class Case:
    """``reply`` is one of ``bodies.reply``. In a round each target is asked by ``connections`` for
    the usual seconds, or, with ``once``, once by each of them; they begin spread over ``ramp_ms``.
    ``upload`` is the size of the picture of an edit, in bytes; zero: a generation. ``cached``: all
    ask for the same. ``delay_ms``, ``gather`` and the pieces are of the mock. ``peers`` are
    measured too where that is asked for. Of a ``long`` one a few rounds must do."""

    name: str
    about: str
    reply: str
    connections: int
    targets: tuple[str, ...] = PROXIES
    peers: bool = False
    upload: int = 0
    cached: bool = False
    tls: bool = False
    once: bool = False
    ramp_ms: int = 0
    delay_ms: int = 0
    gather: int = 0
    long: bool = False
    quick: bool = False

    @property
    def stream(self) -> bool:
        return self.reply in ("E", "T")


CASES: Final = (
    Case("s_c1", "1.5 KB JSON, one at a time", "S", 1, targets=POLICY, peers=True),
    Case(
        "s_c32", "1.5 KB JSON, 32 at once", "S", 32,
        targets=(*POLICY, "direct"), peers=True, quick=True,
    ),
    Case("m_c8", "2.7 MB JSON, 8 at once", "M", 8, targets=POLICY, peers=True, quick=True),
    Case("l_c8", "8 MB JSON, 8 at once", "L", 8, targets=POLICY),
    Case("e_c8", "stream of 4.8 MB, 8 at once", "E", 8),
    Case(
        "e_paced", "stream of 4.8 MB, 4 at once, answered after 1.5 s", "E", 4,
        ramp_ms=1_500, delay_ms=1_500,
    ),
    Case("t_c32", "tiny stream, 32 at once", "T", 32),
    Case(
        "upload_20mb_c4", "edit of a picture of 20 MB, 4 at once", "S", 4,
        upload=20 * MB, quick=True,
    ),
    Case(
        "hit_memory_c8", "2.7 MB from the memory, 8 at once", "M", 8,
        targets=("gateway", "nginx-sendfile"), cached=True, quick=True,
    ),
    Case(
        "hit_memory_s_c32", "1.5 KB from the memory, 32 at once", "S", 32,
        targets=("gateway", "nginx-sendfile"), cached=True,
    ),
    Case(
        "hit_disk_c8", "2.7 MB from the disk, 8 at once", "M", 8,
        targets=("gateway-disk", "nginx-sendfile"), cached=True,
    ),
    Case(
        "hit_redis_c8", "2.7 MB from Valkey, 8 at once", "M", 8,
        targets=("gateway-redis", "nginx-sendfile"), cached=True,
    ),
    Case("tls_s_c32", "1.5 KB JSON, upstream by TLS, 32 at once", "S", 32, tls=True),
    Case("tls_m_c8", "2.7 MB JSON, upstream by TLS, 8 at once", "M", 8, tls=True),
    Case(
        "postgres_s_c32", "1.5 KB JSON, books in PostgreSQL, 32 at once", "S", 32,
        targets=("gateway", "gateway-postgres"),
    ),
    Case(
        "inflight_2000", "2,000 in flight, answered after 10 s", "S", 2_000,
        targets=("gateway", "nginx"), once=True, ramp_ms=8_000, delay_ms=10_000,
        long=True, quick=True,
    ),
    Case(
        "inflight_4500", "4,500 in flight, answered after 20 s", "S", 4_500,
        targets=("gateway", "nginx"), once=True, ramp_ms=18_000, delay_ms=20_000, long=True,
    ),
    Case(
        "inflight_9000", "9,000 in flight, answered after 20 s", "S", 9_000,
        targets=("gateway", "nginx"), once=True, ramp_ms=18_000, delay_ms=20_000, long=True,
    ),
    Case(
        "landing_300", "300 bodies of 2.7 MB that land together", "M", 300,
        targets=("gateway", "nginx"), once=True, ramp_ms=1_000, gather=300, long=True,
    ),
)  # fmt: skip


def chosen(names: str | None, *, quick: bool) -> list[Case]:
    """By name, separated by commas; else all, or the quick ones. Raises ``ValueError`` for a name
    that there is not."""
    if not names:
        return [case for case in CASES if case.quick or not quick]
    known = {case.name: case for case in CASES}
    asked = names.replace(",", " ").split()
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ValueError(f"no case {unknown[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in asked]
