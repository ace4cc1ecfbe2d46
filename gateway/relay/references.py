"""Whose an id is, and where it lives: what a request names that is at an upstream already.

One upstream account is all teams', and takes every id that it knows. So no id goes upstream before
it was found here, and then only to where it was made (contract 3.3, 3.4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import quote

from gateway.domain.call import Call, InputImage, Operation, Reference
from gateway.domain.errors import InvalidRequest, NotOwned
from gateway.domain.owned import Anchor, Owned, OwnedKind
from gateway.domain.team import Caller
from gateway.ports import Clock, Credential, Ownership
from gateway.relay.inputs import digest_of_file

MAX_SHOWN_CHARS = 64

_UNKNOWN = {
    OwnedKind.FILE: "No such File object: {id}",
    OwnedKind.RESPONSE: "Response with id '{id}' not found.",
    OwnedKind.PICTURE: "Item with id '{id}' not found.",
    OwnedKind.ITEM: "Item with id '{id}' not found. Only what a response has put out is known by "
    "its id. Send an item of its input as it is, or go on with previous_response_id.",
}
_MAY_BE: Mapping[str, frozenset[OwnedKind]] = {
    **{kind.value: frozenset({kind}) for kind in OwnedKind},
    OwnedKind.ITEM.value: frozenset({OwnedKind.ITEM, OwnedKind.PICTURE}),
}
"""What an id may turn out to be, by the kind as which it is named: a picture is an item too."""


_PLACES = {OwnedKind.FILE: "/files", OwnedKind.RESPONSE: Operation.RESPONSE.path}


NOBODYS: Mapping[str, Owned] = MappingProxyType({})
"""Of a call that names no id: one for all."""


class Resolved(NamedTuple):
    """A call whose ids are all its team's. ``anchor`` is where they live, None where it names
    none; ``owned`` is what is remembered of each, by id."""

    call: Call
    anchor: Anchor | None
    owned: Mapping[str, Owned]


class References:
    """Looks ids up. ``denied`` hears the kind of each that is another team's."""

    def __init__(
        self,
        ownership: Ownership,
        clock: Clock,
        denied: Callable[[OwnedKind], None] = lambda kind: None,
    ) -> None:
        self._ownership = ownership
        self._clock = clock
        self._denied = denied

    async def one(self, caller: Caller, kind: OwnedKind, id: str, param: str = "id") -> Owned:
        """What is known of this team's id. Raises ``NotOwned``, with the same words and after the
        same work for what is unknown and for what is another team's; ``LedgerUnavailable``."""
        found = await self._find(caller, (Reference(kind.value, id, param),))
        return found[id]

    async def resolve(self, caller: Caller, call: Call) -> Resolved:
        """Looks up all that a call names, at once, and fills in how large its files are.

        Raises ``NotOwned`` naming the place of the first id that is not this team's,
        ``InvalidRequest`` where they do not live at one upstream, ``LedgerUnavailable``.
        """
        if not call.references:
            return Resolved(call, None, NOBODYS)
        owned = await self._find(caller, call.references)
        anchor = _one_place(call.references, owned)
        sizes = {digest_of_file(one.id): max(1, one.size_bytes) for one in owned.values()}
        inputs = tuple(_sized(picture, sizes) for picture in call.inputs)
        return Resolved(replace(call, inputs=inputs), anchor, owned)

    async def _find(self, caller: Caller, references: Sequence[Reference]) -> dict[str, Owned]:
        team, now = caller.team.id, self._clock.now()
        found = await self._ownership.find(team, [one.id for one in references], now)
        for one in references:
            known = found.get(one.id)
            if known is None or known.kind not in _MAY_BE[one.kind]:
                if await self._ownership.others(team, [one.id], now):
                    self._denied(OwnedKind(one.kind))
                raise not_owned(OwnedKind(one.kind), one.id, one.param)
        return found


def not_owned(kind: OwnedKind, id: str, param: str = "id") -> NotOwned:
    """What OpenAI says of an id that it does not know."""
    return NotOwned(_UNKNOWN[kind].format(id=id[:MAX_SHOWN_CHARS]), param=param)


def path_of(kind: OwnedKind, id: str) -> str:
    """Where a file or a response is at its upstream."""
    return f"{_PLACES[kind]}/{quote(id, safe='')}"


def keys_at(credentials: Sequence[Credential], anchor: Anchor | None) -> Sequence[Credential]:
    """Which of an upstream's keys may be used for what lives at ``anchor``: the one that made it,
    or any where that one is no longer configured."""
    if anchor is None:
        return credentials
    own = [one for one in credentials if one.mark == anchor.mark]
    return own or credentials


def _one_place(references: Sequence[Reference], owned: Mapping[str, Owned]) -> Anchor:
    """Keys of one upstream may be of one project, so only the upstream has to be the same."""
    first = owned[references[0].id].anchor
    for one in references[1:]:
        anchor = owned[one.id].anchor
        if anchor.upstream != first.upstream:
            raise InvalidRequest(
                f"'{one.param}' lives at the upstream {anchor.upstream}, and "
                f"'{references[0].param}' at {first.upstream}: one request goes to one upstream. "
                "Upload them again, or send the pictures themselves.",
                code="mixed_upstreams",
                param=one.param,
                reason="invalid_param",
            )
    return first


def _sized(picture: InputImage, sizes: Mapping[str, int]) -> InputImage:
    size = sizes.get(picture.digest) if picture.size_bytes == 0 else None
    return picture if size is None else replace(picture, size_bytes=size)
