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
class Listed:
    """A model of /v1/models. ``ends`` is the first day (UTC) on which it no longer exists."""

    id: str
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts(Listed):
    """A model that draws."""

    family: Family


def _table() -> Mapping[str, ModelFacts]:
    """Where a day of birth is not in a model's name, it is when the model was first seen.

    dall-e-2 and dall-e-3 are left out: they ended on 2026-05-12, before this sandbox was made,
    and a retired model is answered like one that never was.
    """
    one_ends, spring, autumn = date(2026, 12, 1), date(2026, 4, 21), date(2026, 9, 8)
    sixth = date(2026, 11, 5)
    rows = (
        ModelFacts("gpt-image-2.6-sunburst", sixth, family=Family.TWO_SIX),
        ModelFacts("gpt-image-2.6-flare", sixth, family=Family.TWO_SIX),
        ModelFacts("gpt-image-2.5-sunburst", autumn, family=Family.TWO_FIVE),
        ModelFacts("gpt-image-2.5-sunburst-2026-09-08", autumn, family=Family.TWO_FIVE),
        ModelFacts("gpt-image-2.5-flare", autumn, family=Family.TWO_FIVE),
        ModelFacts("gpt-image-2.5-flare-2026-09-08", autumn, family=Family.TWO_FIVE),
        ModelFacts("gpt-image-2", spring, family=Family.TWO),
        ModelFacts("gpt-image-2-2026-04-21", spring, family=Family.TWO),
        ModelFacts("gpt-image-1.5", date(2025, 12, 16), one_ends, family=Family.ONE),
        ModelFacts("gpt-image-1.5-2025-12-16", date(2025, 12, 16), one_ends, family=Family.ONE),
        ModelFacts("gpt-image-1-mini", date(2025, 10, 6), one_ends, family=Family.ONE),
        ModelFacts("chatgpt-image-latest", date(2025, 12, 16), one_ends, family=Family.ONE),
        ModelFacts("gpt-image-1", date(2025, 4, 23), date(2026, 10, 23), family=Family.ONE),
    )
    return MappingProxyType({row.id: row for row in rows})


MODELS = _table()


TEXT_MODELS = (
    Listed("gpt-6-astra", date(2026, 9, 8)),
    Listed("gpt-5.4-mini", date(2026, 3, 17)),
    Listed("gpt-5.4-nano", date(2026, 3, 17)),
    Listed("gpt-5", date(2025, 8, 7)),
    Listed("gpt-5-mini", date(2025, 8, 7)),
    Listed("gpt-4.1", date(2025, 4, 14)),
    Listed("gpt-4.1-mini", date(2025, 4, 14)),
    Listed("gpt-4o", date(2024, 5, 10)),
)
"""Those that can hold a conversation and call the image tool."""


def served(now: datetime) -> list[ModelFacts]:
    """Those that exist at ``now`` (aware)."""
    today = now.astimezone(UTC).date()
    return [row for row in MODELS.values() if row.ends is None or today < row.ends]


def find(name: str, now: datetime) -> ModelFacts | None:
    """The model of that name, if it exists at ``now``."""
    return next((row for row in served(now) if row.id == name), None)


def listed(now: datetime) -> list[Listed]:
    """All that exist at ``now``, of every kind."""
    return [*served(now), *TEXT_MODELS]
