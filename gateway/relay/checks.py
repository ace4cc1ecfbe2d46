"""`/v1/moderations` and `/v1/content_provenance_checks`: passed on as they come, free."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.relay.flights import Head
from gateway.relay.media import FORM_OVERHEAD_BYTES, FORM_TYPE, JSON_TYPE
from gateway.relay.passing import Errand, Passing, Place, Visit, place_of

MODERATION_BYTES = 8 * 1024 * 1024
"""Data URLs of pictures are among what is judged."""


@dataclass(frozen=True, slots=True)
class CheckRules:
    """``max_file_bytes`` is of the picture whose origin is asked for."""

    moderations: Place
    provenance: Place
    max_file_bytes: int


class Checks:
    """Answers for both; each public method is a handler of ``api/passed.py``."""

    def __init__(self, passing: Passing, rules: CheckRules) -> None:
        self.rules = rules
        self._passing = passing

    async def moderate(self, visit: Visit) -> Head:
        """``POST /moderations``: JSON."""
        place = self.rules.moderations
        return await self._check(visit, place, "/moderations", JSON_TYPE, MODERATION_BYTES)

    async def trace_origin(self, visit: Visit) -> Head:
        """``POST /content_provenance_checks``: a form with a ``file``."""
        limit = self.rules.max_file_bytes + FORM_OVERHEAD_BYTES
        place = self.rules.provenance
        return await self._check(visit, place, "/content_provenance_checks", FORM_TYPE, limit)

    async def _check(
        self, visit: Visit, place: Place, path: str, media: str, limit_bytes: int
    ) -> Head:
        upstream = place_of(place, f"/v1{path}")
        await self._passing.enter(visit)
        body = await self._passing.take_in(visit, media, limit_bytes)
        # A charset could make another reader see other names.
        declared = JSON_TYPE if media == JSON_TYPE else visit.headers["content-type"]
        errand = Errand("POST", path, upstream=upstream, body=body, content_type=declared)
        return self._passing.head(visit, await self._passing.send(visit, errand))
