"""What lives at an upstream and belongs to a team here: files, responses, pictures of responses.

One upstream account is shared by all teams, and its ids are good for whoever has its key. So every
id has an owner here, and a call that names one goes to where it lives (contract 3.3, 3.4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from gateway.domain.call import Json
from gateway.domain.record import record


class OwnedKind(StrEnum):
    """What an id stands for."""

    FILE = "file"
    RESPONSE = "response"
    PICTURE = "picture"
    """An ``image_generation_call`` inside a response (``ig_...``)."""
    ITEM = "item"
    """Whatever else a response has put out: a message, a reasoning. The upstream knows it by its
    id as well."""


class Anchor(NamedTuple):
    """Where an id lives: a configured upstream, and which of its keys (``Credential.mark``) made
    it. Another key of that upstream stands in for one that is no longer configured: ids belong to
    the provider's project, not to a key."""

    upstream: str
    mark: str


@record
class Owned:
    """One id, its owner, and where it lives.

    ``expires`` None: until it is deleted. ``size_bytes`` is that of a file. ``detail`` is what is
    remembered beside it, small and JSON: of a file its object as the provider showed it, of a
    response how large its conversation has become (``{"context_tokens": 812, "pictures": 1}``), of
    what it has put out which one it was, and of an item the most tokens that it can have
    (``{"response": "resp_1", "context_tokens": 812}``).
    """

    id: str
    kind: OwnedKind
    team: str
    key_id: str
    anchor: Anchor
    created: datetime
    expires: datetime | None = None
    size_bytes: int = 0
    detail: Mapping[str, Json] = field(default_factory=dict)
