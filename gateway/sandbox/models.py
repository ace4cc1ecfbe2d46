"""The models that the sandbox serves, and until when (contract 1.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from enum import StrEnum
from types import MappingProxyType

from gateway.domain.call import Json


class Family(StrEnum):
    """Models that take the same parameters and count tokens in the same way."""

    ONE = "gpt-image-1"
    TWO = "gpt-image-2"
    TWO_FIVE = "gpt-image-2.5"
    TWO_SIX = "gpt-image-2.6"

    @property
    def qualities(self) -> tuple[str, ...]:
        base = ("low", "medium", "high")
        return (*base, "xhigh", "max") if self in (Family.TWO_FIVE, Family.TWO_SIX) else base


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """``ends`` is the first day (UTC) on which the model no longer exists."""

    id: str
    family: Family
    born: date
    ends: date | None = None

    def as_json(self) -> dict[str, Json]:
        """A row of GET /v1/models (contract 3)."""
        created = datetime.combine(self.born, time(), UTC)
        return {
            "id": self.id,
            "object": "model",
            "created": int(created.timestamp()),
            "owned_by": "openai",
            "shutdown_date": self.ends.isoformat() if self.ends else None,
        }


def _table() -> Mapping[str, ModelFacts]:
    """Where a day of birth is not in a model's name, it is when the model was first seen.

    dall-e-2 and dall-e-3 are left out: they ended on 2026-05-12, before this sandbox was made,
    and a retired model is answered like one that never was.
    """
    one_ends, spring, autumn = date(2026, 12, 1), date(2026, 4, 21), date(2026, 9, 8)
    sixth = date(2026, 11, 5)
    rows = (
        ModelFacts("gpt-image-2.6-sunburst", Family.TWO_SIX, sixth),
        ModelFacts("gpt-image-2.6-flare", Family.TWO_SIX, sixth),
        ModelFacts("gpt-image-2.5-sunburst", Family.TWO_FIVE, autumn),
        ModelFacts("gpt-image-2.5-sunburst-2026-09-08", Family.TWO_FIVE, autumn),
        ModelFacts("gpt-image-2.5-flare", Family.TWO_FIVE, autumn),
        ModelFacts("gpt-image-2.5-flare-2026-09-08", Family.TWO_FIVE, autumn),
        ModelFacts("gpt-image-2", Family.TWO, spring),
        ModelFacts("gpt-image-2-2026-04-21", Family.TWO, spring),
        ModelFacts("gpt-image-1.5", Family.ONE, date(2025, 12, 16), one_ends),
        ModelFacts("gpt-image-1.5-2025-12-16", Family.ONE, date(2025, 12, 16), one_ends),
        ModelFacts("gpt-image-1-mini", Family.ONE, date(2025, 10, 6), one_ends),
        ModelFacts("chatgpt-image-latest", Family.ONE, date(2025, 12, 16), one_ends),
        ModelFacts("gpt-image-1", Family.ONE, date(2025, 4, 23), date(2026, 10, 23)),
    )
    return MappingProxyType({row.id: row for row in rows})


MODELS = _table()


def served(now: datetime) -> list[ModelFacts]:
    """Those that exist at ``now`` (aware)."""
    today = now.astimezone(UTC).date()
    return [row for row in MODELS.values() if row.ends is None or today < row.ends]


def find(name: str, now: datetime) -> ModelFacts | None:
    """The model of that name, if it exists at ``now``."""
    return next((row for row in served(now) if row.id == name), None)
