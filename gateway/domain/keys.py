"""The secrets that teams carry: how they are made, recognised and stored.

``igw_<env>_<id>_<secret>_<crc>``: the prefix is for secret scanners, the id is public and logged,
the checksum names a typo without a look-up. What is stored is an HMAC under the pepper: the
secret is random, so stretching would add nothing but load (reliability.md 5.2).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import zlib
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from gateway.domain.team import Key

PREFIX = "igw_"
MIN_SECRET_CHARS = 20

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_ID_CHARS = 10
_SECRET_CHARS = 32
_CRC_CHARS = 6
_PEPPER_ID_CHARS = 8


class Minted(NamedTuple):
    """A new key. ``secret`` is shown once and kept nowhere."""

    id: str
    secret: str


def mint(env: str = "live") -> Minted:
    """A new key of about 190 bits, from the system's random source."""
    key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_CHARS))
    body = "".join(secrets.choice(_ALPHABET) for _ in range(_SECRET_CHARS))
    head = f"{PREFIX}{env}_{key_id}_{body}"
    return Minted(key_id, f"{head}_{_checksum(head)}")


def is_mistyped(secret: str) -> bool:
    """Whether it looks like a key of ours whose checksum does not fit: only improves a text."""
    head, _, check = secret.rpartition("_")
    return secret.startswith(PREFIX) and not hmac.compare_digest(
        check.encode("utf-8", "surrogateescape"), _checksum(head).encode()
    )


def digest(pepper: bytes, secret: str) -> bytes:
    """What is stored and looked up in place of the secret: HMAC-SHA256 under the pepper."""
    keyed = _keyed(pepper).copy()
    keyed.update(secret.encode("utf-8", "surrogateescape"))
    return keyed.digest()


@lru_cache(maxsize=16)
def _keyed(pepper: bytes) -> hmac.HMAC:
    """HMAC under a pepper, before any text. ``hmac.digest`` would make it anew for each key, and
    give up the interpreter's lock meanwhile, for which every other thread waits."""
    return hmac.new(pepper, digestmod=hashlib.sha256)


@dataclass(frozen=True, slots=True)
class Peppers:
    """What secrets are hashed with: ``current``, and those before it, the newest first."""

    current: bytes = field(repr=False)
    old: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def oldest(self) -> bytes:
        """The one that outlives a rotation's first step: ids that are made from it stay."""
        return self.old[-1] if self.old else self.current

    def digests(self, secret: str) -> tuple[bytes, ...]:
        """A secret's digests, the current pepper's first."""
        first = digest(self.current, secret)
        return (first, *(digest(pepper, secret) for pepper in self.old)) if self.old else (first,)

    @property
    def ids(self) -> tuple[str, ...]:
        """Their public ids, the current pepper's first."""
        return tuple(pepper_id(pepper) for pepper in (self.current, *self.old))


def derived(peppers: Peppers, purpose: str) -> bytes:
    """A key of its own for ``purpose``, made from the oldest pepper, so that it stays through the
    first step of a rotation. No secret's digest is one: none begins with a NUL."""
    return hmac.digest(peppers.oldest, b"\0" + purpose.encode(), hashlib.sha256)


def pepper_id(pepper: bytes) -> str:
    """A pepper's public id, which tells nothing: what keys say they were hashed with."""
    return hashlib.sha256(b"pepper-id" + pepper).hexdigest()[:_PEPPER_ID_CHARS]


class PepperState(StrEnum):
    """Which pepper a key was hashed with."""

    CURRENT = "current"
    OLD = "old"
    """One that has to stay until the key is used."""
    LOST = "lost"
    """One that is not configured: nobody can call with the key."""


def pepper_state(key: Key, peppers: Peppers) -> PepperState:
    """A key that does not say its pepper is one of an earlier release, which knew only one."""
    current, *old = peppers.ids
    if key.declared or key.pepper == current or (not key.pepper and not old):
        return PepperState.CURRENT
    return PepperState.OLD if not key.pepper or key.pepper in old else PepperState.LOST


def declared_id(key_digest: bytes) -> str:
    """The public id of a key that the configuration declares: stable, and tells nothing."""
    number = int.from_bytes(key_digest[:8], "big")
    return _digits(number, _ID_ALPHABET, _ID_CHARS)


def tail(secret: str) -> str:
    """The last four characters of a long secret, for the text of a refusal."""
    return secret[-4:] if len(secret) >= MIN_SECRET_CHARS else ""


def _checksum(head: str) -> str:
    return _digits(zlib.crc32(head.encode("utf-8", "surrogateescape")), _ALPHABET, _CRC_CHARS)


def _digits(number: int, alphabet: str, count: int) -> str:
    digits = []
    for _ in range(count):
        number, digit = divmod(number, len(alphabet))
        digits.append(alphabet[digit])
    return "".join(reversed(digits))
