"""From a secret to the caller it stands for: keys of the file, then keys of the directory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from gateway.domain import keys
from gateway.domain.errors import InvalidKey
from gateway.domain.team import Caller, Key, Team
from gateway.ports import Clock, Directory

KNOWN_SECONDS = 5.0
"""How long a key that was found is believed: a revocation is effective everywhere by then."""
UNKNOWN_SECONDS = 1.0
MAX_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class _Remembered:
    found: tuple[Team, Key] | None
    until: float


class KeyRing:
    """Knows every key. Only digests are held; the look-up is by digest, so that its time tells
    nothing about the secret."""

    def __init__(
        self,
        pepper: bytes,
        declared: Mapping[bytes, tuple[Team, Key]],
        directory: Directory,
        clock: Clock,
    ) -> None:
        self._pepper = pepper
        self._declared = declared
        self._directory = directory
        self._clock = clock
        self._remembered: OrderedDict[bytes, _Remembered] = OrderedDict()

    async def identify(self, secret: str | None) -> Caller:
        """The caller behind a secret. Raises ``InvalidKey``, ``LedgerUnavailable``."""
        if not secret:
            raise InvalidKey(
                "No key came with this request. Send the key of your team as "
                "`Authorization: Bearer ...` (the SDKs read it from OPENAI_API_KEY)."
            )
        found = await self._find(keys.digest(self._pepper, secret))
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
        return Caller(team, key)

    async def _find(self, digest: bytes) -> tuple[Team, Key] | None:
        declared = self._declared.get(digest)
        if declared is not None:
            return declared
        now = self._clock.monotonic()
        remembered = self._remembered.get(digest)
        if remembered is not None and remembered.until > now:
            return remembered.found
        found = await self._directory.find_key(digest)
        seconds = UNKNOWN_SECONDS if found is None else KNOWN_SECONDS
        self._remembered[digest] = _Remembered(found, now + seconds)
        self._remembered.move_to_end(digest)
        while len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        return found


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
