"""What a team has at an upstream, asked for again by its id: shown from there, or deleted.

The same for files and responses: an id is looked up first, goes only to where it lives, and one
that is gone there is unknown here too.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from gateway.domain.errors import NotOwned, UpstreamRefused
from gateway.domain.owned import Owned, OwnedKind
from gateway.ports import Ownership, Reply
from gateway.relay.flights import Head
from gateway.relay.passing import Errand, Passing, Visit
from gateway.relay.references import References, not_owned, path_of


class Forwarding:
    """The steps of a visit that names an id, on top of those of ``Passing``."""

    def __init__(self, passing: Passing, references: References, ownership: Ownership) -> None:
        self._passing = passing
        self._references = references
        self._ownership = ownership

    async def enter(self, visit: Visit, kind: OwnedKind) -> Owned:
        """What the visit's path names. Raises as ``Passing.enter`` and ``References.one`` do."""
        caller = await self._passing.enter(visit)
        return await self._references.one(caller, kind, visit.names[0])

    def arriving(self, visit: Visit) -> AsyncGenerator[bytes, None]:
        """The visit's body. Raises as ``Passing.arriving`` does."""
        return self._passing.arriving(visit)

    async def show(self, visit: Visit, owned: Owned, errand: Errand) -> Head:
        """The upstream's answer as ours. Raises ``NotOwned`` where it is not there any more."""
        return self._passing.head(visit, await self._send(visit, owned, errand))

    async def delete(self, visit: Visit, owned: Owned) -> Head:
        """At the upstream, and then here, whoever has left meanwhile. Where it is not there any
        more, its row goes too."""
        return await self._passing.to_the_end(visit, self._delete(visit, owned))

    async def _delete(self, visit: Visit, owned: Owned) -> Head:
        try:
            errand = Errand("DELETE", path_of(owned.kind, owned.id), owned.anchor)
            reply = await self._send(visit, owned, errand)
        except NotOwned:
            await self._ownership.disown(owned.team, owned.id)
            raise
        content = await self._passing.whole(visit, reply)
        await self._ownership.disown(owned.team, owned.id)
        return self._passing.answer(visit, content, reply)

    async def _send(self, visit: Visit, owned: Owned, errand: Errand) -> Reply:
        try:
            return await self._passing.send(visit, errand)
        except UpstreamRefused as error:
            if error.status != 404:
                raise
            raise not_owned(owned.kind, owned.id) from error
