"""What is repaired of requests that older clients send: the switches, and whose word counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from gateway.domain.call import Call

TOOL_MODEL = "tool_model"
"""The model of a response's image tool: no field of the body, but one of a tool in it."""
CHANGES = (
    *("model", "response_format", "style", "quality", "size", "content_type", "image"),
    *("max_output_tokens", "max_tool_calls", TOOL_MODEL),
)
"""The names of all that is ever changed: the labels of the metric."""
OTHER_CHANGE = "other"


@dataclass(frozen=True, slots=True)
class Compat:
    """What is repaired of one call.

    ``default_model`` is that of a request which names none, ``aliases`` lead names that no entry
    of ``models:`` has to configured ones. ``repeated_images``: parts of a form that are all called
    ``image`` are a list.
    """

    response_format: bool = True
    style: bool = True
    quality: bool = True
    sizes: bool = True
    media_types: bool = True
    repeated_images: bool = False
    default_model: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CompatRules:
    """What a model or a key says of it; None leaves it to who is asked next. An empty
    ``default_model`` is none."""

    response_format: bool | None = None
    style: bool | None = None
    quality: bool | None = None
    sizes: bool | None = None
    media_types: bool | None = None
    repeated_images: bool | None = None
    default_model: str | None = None
    aliases: Mapping[str, str] | None = None


OFF = CompatRules(
    response_format=False,
    style=False,
    quality=False,
    sizes=False,
    media_types=False,
    repeated_images=False,
    default_model="",
    aliases={},
)


def merged(base: Compat, *said: CompatRules | None) -> Compat:
    """``base`` with what is said over it, the last word first."""
    for rules in said:
        if rules is not None:
            words = {each.name: getattr(rules, each.name) for each in fields(rules)}
            base = replace(base, **{name: word for name, word in words.items() if word is not None})
    return base


def changed_names(call: Call) -> tuple[str, ...]:
    """The names of what was changed of a call, each once, of a closed list."""
    if not (call.changes or call.mends):
        return ()
    names = (change.name for change in call.changed)
    return tuple(dict.fromkeys(name if name in CHANGES else OTHER_CHANGE for name in names))
