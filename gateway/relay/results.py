"""Answers that are kept by request id, for whoever comes back for them.

What was paid for stays reachable: by the retry of an SDK that has lost its answer, by a replay
under an Idempotency-Key, and by ``GET /v1/images/results/{request_id}``. Errors behind which money
may be gone are kept too, so that nobody has to buy a second time to learn of the first.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from gateway.domain.call import Operation
from gateway.domain.errors import InvalidRequest
from gateway.ports import Cache, Cached, CachedMeta, Form, Unreachable
from gateway.relay import headers, replay
from gateway.relay.chunks import nothing
from gateway.relay.flights import Shown
from gateway.relay.media import JSON_TYPE
from gateway.relay.meter import JsonMeter

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ResultPolicy:
    """How long answers are kept: ``ttl``, or ``idempotent_ttl`` under an Idempotency-Key."""

    ttl: timedelta = timedelta(minutes=15)
    idempotent_ttl: timedelta = timedelta(hours=24)
    max_entry_bytes: int = 256 * 1024 * 1024


class Results:
    """The kept answers; none where there is no ``store``."""

    def __init__(self, store: Cache | None, policy: ResultPolicy) -> None:
        self._store = store
        self._policy = policy

    @property
    def on(self) -> bool:
        return self._store is not None

    def takes(self, size_bytes: int) -> bool:
        return self._store is not None and size_bytes <= self._policy.max_entry_bytes

    async def keep(
        self, rid: str, meta: CachedMeta, chunks: AsyncIterator[bytes], *, idempotent: bool
    ) -> bool:
        """Keeps an answer of ``meta.team``; whether it did. A store that fails is no error of the
        call."""
        if self._store is None:
            return False
        key = _key(meta.team, rid)
        return await self._store.put(key, meta, chunks, self._seconds(idempotent))

    async def point(self, rid: str, to: str, team: str, now: datetime, *, idempotent: bool) -> None:
        """Lets the answer of one request be found by the id of another that joined it."""
        meta = CachedMeta(
            stored_at=now, cost=0, images=0, model_served="", upstream="", size_bytes=0,
            team=team, same_as=to,
        )  # fmt: skip
        if self._store is not None:
            await self._store.put(_key(team, rid), meta, nothing(), self._seconds(idempotent))

    async def find(self, rid: str, team: str) -> Cached | None:
        """The kept answer of a team's request, errors too. None for other teams'."""
        return (await self.locate(rid, team))[1]

    async def locate(self, rid: str, team: str) -> tuple[str, Cached | None]:
        """As ``find``, and the request under whose id the answer is, or will be, kept."""
        found = await self._get(rid, team)
        if found is not None and found.meta.same_as:
            return found.meta.same_as, await self._get(found.meta.same_as, team)
        return rid, found

    async def _get(self, rid: str, team: str) -> Cached | None:
        if self._store is None:
            return None
        return await self._store.get(_key(team, rid))

    async def is_gone(self, rid: str, team: str) -> bool:
        """Whether an answer that was not found is surely not there: a store that is away, or too
        busy to hand it out, finds nothing either."""
        if self._store is None:
            return True
        try:
            return not await self._store.holds(_key(team, rid))
        except (OSError, Unreachable):
            return False

    def kept_for(self, *, idempotent: bool) -> timedelta:
        return self._policy.idempotent_ttl if idempotent else self._policy.ttl

    def _seconds(self, idempotent: bool) -> float:
        return self.kept_for(idempotent=idempotent).total_seconds()


def shown(kept: Cached, *, stream: bool) -> Shown:
    """A kept answer, in the form that is asked for now.

    Raises ``InvalidRequest`` where it has no such form: several pictures as a stream, or a stream
    of several as JSON.
    """
    meta = kept.meta
    if meta.status != 200:
        own = (("content-type", JSON_TYPE), *meta.headers)
        return Shown(meta.status, own, (), meta.size_bytes, kept.chunks)
    if stream and meta.form is Form.JSON:
        if not meta.streamable:
            raise _other_form("as JSON, and it has no form as events")
        operation = Operation(meta.operation)
        return _events(meta, lambda: as_stream(operation, kept))
    if meta.form is Form.EVENTS:
        if not stream:
            raise _other_form("as a stream, and it has no form as JSON")
        return _events(meta, kept.chunks)
    return Shown(
        200, (("content-type", JSON_TYPE), *meta.headers), (), meta.size_bytes, kept.chunks
    )


def as_it_is(kept: Cached) -> Shown:
    """A kept answer in the form that it is kept in."""
    return shown(kept, stream=kept.meta.form is Form.EVENTS)


def _events(meta: CachedMeta, body: replay.Body) -> Shown:
    return Shown(200, (("content-type", headers.EVENTS), *meta.headers), (), None, body)


def _other_form(kept_as: str) -> InvalidRequest:
    return InvalidRequest(
        f"The answer to the first of these requests is kept {kept_as}. Ask for it as it was first "
        "asked for, or use a new Idempotency-Key to buy another picture.",
        status=422,
        code="idempotency_key_reused",
        param="stream",
        reason="idempotency_key_reused",
    )


async def as_stream(operation: Operation, cached: Cached) -> AsyncIterator[bytes]:
    """A kept JSON answer as its one completed event: a look for its small members, then a pass."""
    meter = JsonMeter(operation, cached.meta.upstream)
    async for chunk in cached.chunks():
        meter.feed(chunk)
    form = replay.completed_event(operation, meter.document())
    if form is None:
        raise RuntimeError("only what has the form of a stream is kept as streamable")
    async for piece in replay.pieces(form, cached.chunks()):
        yield piece


def _key(team: str, rid: str) -> str:
    """Another team's result is not even looked at: it is a miss like any other."""
    return f"{team}:{rid}"
