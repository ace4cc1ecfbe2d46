"""From a secret to the caller it stands for: keys of the file, then keys of the directory."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass

from gateway.domain import keys
from gateway.domain.errors import GatewayError, InvalidKey
from gateway.domain.team import Caller, Declared, Key, Team
from gateway.ports import Clock, Directory

log = logging.getLogger(__name__)

KNOWN_SECONDS = 5.0
"""How long a key that was found is believed: a revocation is effective everywhere by then."""
UNKNOWN_SECONDS = 1.0
MAX_REMEMBERED = 10_000
MOVE_AFTER_SECONDS = 10.0
"""How long after a change of the peppers no key is moved to the new one: other workers may not have
read of it yet, and would not know the key any more."""


@dataclass(frozen=True, slots=True)
class _Remembered:
    found: tuple[Team, Key] | None
    until: float


class KeyRing:
    """Knows every key. Only digests are held; the look-up is by digest, so that its time tells
    nothing about the secret.

    A key of the directory that is found under an old pepper is moved to the current one, so that
    the old one can be dropped some day. What the file declares may be replaced while it runs:
    ``declared`` is the one place that everybody reads it from.
    """

    def __init__(
        self, peppers: keys.Peppers, declared: Declared, directory: Directory, clock: Clock
    ) -> None:
        self._peppers = peppers
        self._declared = declared
        self._directory = directory
        self._clock = clock
        self._remembered: OrderedDict[bytes, _Remembered] = OrderedDict()
        self._callers: OrderedDict[str, Caller] = OrderedDict()
        self._move_from = clock.monotonic()

    @property
    def peppers(self) -> keys.Peppers:
        """What secrets are hashed with, as of now."""
        return self._peppers

    @property
    def declared(self) -> Declared:
        """The teams and keys of the file, as of now."""
        return self._declared

    def replace(self, peppers: keys.Peppers, declared: Declared) -> None:
        """From now on these are known."""
        if peppers != self._peppers:
            self._move_from = self._clock.monotonic() + MOVE_AFTER_SECONDS
        self._peppers = peppers
        self._declared = declared
        self._remembered.clear()
        self._callers.clear()

    async def identify(self, secret: str | None) -> Caller:
        """The caller behind a secret. Raises ``InvalidKey``, ``LedgerUnavailable``."""
        if not secret:
            raise InvalidKey(
                "No key came with this request. Send the key of your team as "
                "`Authorization: Bearer ...` (the SDKs read it from OPENAI_API_KEY)."
            )
        peppers = self._peppers
        digests = peppers.digests(secret)
        found = self._declared.keys.get(digests[0])
        if found is None:
            found = await self._find(peppers, digests)
        if found is None:
            raise InvalidKey(_unknown(secret))
        team, key = found
        whose = f"The key {key.id} of team {team.id}"
        if key.revoked is not None:
            raise InvalidKey(f"{whose} was revoked. Ask the owner of your team for another.")
        if team.disabled:
            raise InvalidKey(f"Team {team.id} is disabled. Ask the gateway's operator.")
        if key.disabled:
            raise InvalidKey(f"{whose} is disabled. Ask the owner of your team.")
        if key.expires is not None and key.expires <= self._clock.now():
            raise InvalidKey(
                f"{whose} expired on {key.expires:%Y-%m-%d %H:%M} UTC. "
                "Ask the owner of your team for another."
            )
        caller = self._callers.get(key.id)
        if caller is not None and caller.key is key and caller.team is team:
            return caller
        return self._caller(team, key)

    def _caller(self, team: Team, key: Key) -> Caller:
        """The same one for all calls of a key, until it is looked up anew: its accounts of
        money alone cost 130 us to work out, a tenth of all that a small call cost."""
        caller = self._callers[key.id] = Caller(team, key)
        while len(self._callers) > MAX_REMEMBERED:
            self._callers.popitem(last=False)
        return caller

    async def _find(
        self, peppers: keys.Peppers, digests: tuple[bytes, ...]
    ) -> tuple[Team, Key] | None:
        """A key of the directory, or why there is none: as it is remembered, or looked up."""
        current = digests[0]
        now = self._clock.monotonic()
        remembered = self._remembered.get(current)
        if remembered is not None and remembered.until > now:
            return remembered.found
        found = await self._look_up(peppers, digests)
        seconds = UNKNOWN_SECONDS if found is None else KNOWN_SECONDS
        if peppers is self._peppers:
            self._remembered[current] = _Remembered(found, now + seconds)
            self._remembered.move_to_end(current)
            while len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return found

    async def _look_up(
        self, peppers: keys.Peppers, digests: tuple[bytes, ...]
    ) -> tuple[Team, Key] | None:
        """The key in the directory, under whichever pepper it is."""
        # Between two questions another process may have moved it to where nobody looked in vain.
        again = digests[:1] if len(digests) > 1 else ()
        for digest in (*digests, *again):
            found = await self._directory.find_key(digest)
            if found is not None:
                await self._move(found[1], digest, digests[0], peppers.ids[0])
                return found
        return None

    async def _move(self, key: Key, digest: bytes, current: bytes, pepper: str) -> None:
        """To the current pepper, where it is not there yet. What fails is tried with its next
        call."""
        if digest == current and key.pepper == pepper:
            return
        if self._clock.monotonic() < self._move_from:
            return
        try:
            await self._directory.rehash_key(digest, current, pepper)
        except GatewayError as error:
            log.warning(
                "a key was not moved to the new pepper",
                extra={"key_id": key.id, "error": str(error)},
            )


def _unknown(secret: str) -> str:
    named = f" ...{tail}" if (tail := keys.tail(secret)) else ""
    if keys.is_mistyped(secret):
        return (
            f"The key{named} is not complete: its checksum does not fit. Copy it again, whole, or "
            "ask the owner of your team for another."
        )
    return (
        f"This gateway does not know the key{named}. Ask the owner of your team for one; a "
        "provider's own key does not work here."
    )
