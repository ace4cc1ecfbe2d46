"""From where: models, the upstreams behind them, and what is planned for one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import StrEnum

from gateway.domain.compat import CompatRules

WILDCARD = "*"
OTHER = "other"
"""The label of every model that no entry names."""


class Unpriced(StrEnum):
    """What to do with a model that has no price."""

    REFUSE = "refuse"
    ALLOW = "allow"


@dataclass(frozen=True, slots=True)
class Target:
    """An upstream and the model's name there.

    Of several targets the lowest ``order`` comes first, and those of one order share by
    ``weight``. ``stream_always``: it is asked for events even where the client wants JSON
    (``upstream_stream: always``), so that no wall on silent answers cuts it. ``failures_billed``:
    its owner knows that a 500 or a 503 there may be on the bill (``bill_on_5xx: always``).
    """

    upstream: str
    model: str
    order: int = 0
    weight: int = 1
    stream_always: bool = False
    failures_billed: bool = False
    tool: str = ""
    """Of a response: the name there of the model behind its image tool."""


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
    others: tuple[Target, ...] = ()
    """Where else it is served, by order."""
    fallbacks: tuple[str, ...] = ()
    """Configured models to try, in this order, where no target of this one can be had."""
    compat: CompatRules | None = None
    """What is repaired of calls for it, where that is not what holds for all."""

    @property
    def targets(self) -> tuple[Target, ...]:
        """Where it is served; the first of them names it in fingerprints and in reports."""
        return (self.target, *self.others)


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
            target=replace(rule.target, model=name),
            unpriced=rule.unpriced,
            strict=rule.strict,
            cache_enabled=rule.cache_enabled,
            label=OTHER,
            refuse_unknown=rule.refuse_unknown,
            pin=rule.pin,
            others=tuple(replace(other, model=name) for other in rule.others),
            fallbacks=rule.fallbacks,
            compat=rule.compat,
        )

    def permitted(self, allowed: Callable[[str], bool]) -> list[Model]:
        """Every configured model whose name is ``allowed``, by name."""
        return [model for name, model in sorted(self.models.items()) if allowed(name)]

    def nearest(self, name: str, among: Iterable[str] | None = None) -> Model | None:
        """The configured model whose name is most like an unknown one; of some of them alone,
        where these are given."""
        names = list(self.models if among is None else among)
        close = get_close_matches(name, names, n=1, cutoff=0.5)
        return self.models[close[0]] if close else None
