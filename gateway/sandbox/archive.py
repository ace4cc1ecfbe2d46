"""What the sandbox remembers of responses, for those who ask again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from gateway.domain.call import Json
from gateway.sandbox.forms import Stored


@dataclass(slots=True)
class StoredResponse:
    """A response as it is now. ``input`` are the items that it answers; ``context_tokens`` is
    what a next turn starts with; ``pictures`` are the ids of those it made or was made after.
    ``partials`` are the partial images of each, in base64."""

    body: dict[str, Json]
    input: list[Json]
    context_tokens: int = 0
    pictures: tuple[str, ...] = ()
    streamed: bool = False
    partials: tuple[tuple[str, ...], ...] = ()
    deleted: bool = False

    @property
    def status(self) -> str:
        return str(self.body["status"])


class Recall(NamedTuple):
    """What the caller's project has, by id: files, items of responses, responses."""

    file: Stored
    item: Callable[[str], dict[str, Json] | None]
    response: Callable[[str], StoredResponse | None]


def item_bytes(item: dict[str, Json]) -> int:
    """Its size: that of a picture, since texts are small."""
    result = item.get("result")
    return len(result) if isinstance(result, str) else 0


def response_bytes(stored: StoredResponse) -> int:
    output = stored.body.get("output")
    rows = output if isinstance(output, list) else []
    return sum(item_bytes(row) for row in rows if isinstance(row, dict))
