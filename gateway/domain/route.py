"""From where: models, the upstreams behind them, and what is planned for one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum

WILDCARD = "*"
OTHER = "other"
"""The label of every model that no entry names."""


class Unpriced(StrEnum):
    """What to do with a model that has no price."""

    REFUSE = "refuse"
    ALLOW = "allow"


@dataclass(frozen=True, slots=True)
class Target:
    """An upstream and the model's name there."""

    upstream: str
    model: str


@dataclass(frozen=True, slots=True)
class Pin:
    """What a size and a quality that the client left open are rewritten to."""

    size: str
    quality: str


@dataclass(frozen=True, slots=True)
class Model:
    """A name that clients may ask for, and where it is served."""

    name: str
    target: Target
    unpriced: Unpriced = Unpriced.REFUSE
    strict: bool = False
    """Refuse here what OpenAI would refuse (``validate: strict``)."""
    cache_enabled: bool = True
    label: str = ""
    """For metrics: the configured name, or ``other`` behind the wildcard."""
    refuse_unknown: bool = False
    """Refuse parameters that the contract does not list, rather than hold the worst case."""
    pin: Pin | None = None
    """None: what is left open is held at the dearest choice."""


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every configured model, and the one entry that serves all other names, if any."""

    models: Mapping[str, Model] = field(default_factory=dict)
    wildcard: Model | None = None

    def find(self, name: str) -> Model | None:
        """The model behind a name, or None where no entry routes it."""
        known = self.models.get(name)
        if known is not None or self.wildcard is None or not name or name == WILDCARD:
            return known
        rule = self.wildcard
        return Model(
            name=name,
            target=Target(rule.target.upstream, name),
            unpriced=rule.unpriced,
            strict=rule.strict,
            cache_enabled=rule.cache_enabled,
            label=OTHER,
            refuse_unknown=rule.refuse_unknown,
            pin=rule.pin,
        )

    def nearest(self, name: str) -> Model | None:
        """The configured model whose name is most like an unknown one."""
        close = get_close_matches(name, list(self.models), n=1, cutoff=0.5)
        return self.models[close[0]] if close else None
