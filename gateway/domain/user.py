"""Who the end user of a call is, as its client says: a name that nothing here keeps.

What is kept and said is a keyed hash of it, so that two calls of one user can be told to belong
together, and nobody who reads the books or the log learns whose they are.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from gateway.domain.call import Json

USER_CHARS = 20


class UserSource(StrEnum):
    """Where a client may say who its end user is: two fields of a body (contract 1.1), and the
    headers that Open WebUI sends with ``ENABLE_FORWARD_USER_INFO_HEADERS``."""

    SAFETY_IDENTIFIER = "safety_identifier"
    USER = "user"
    OPEN_WEBUI_ID = "x-openwebui-user-id"
    OPEN_WEBUI_EMAIL = "x-openwebui-user-email"


USER_HEADERS = (UserSource.OPEN_WEBUI_ID, UserSource.OPEN_WEBUI_EMAIL)


@dataclass(frozen=True, slots=True)
class UserPolicy:
    """Where users are looked for, the first that says something wins; none: nobody has a user.
    ``record``: calls and log lines have the hash of theirs."""

    sources: tuple[UserSource, ...] = tuple(UserSource)
    record: bool = True


def said_user(
    sources: Sequence[UserSource], parameters: Mapping[str, Json], hints: Mapping[str, str]
) -> str:
    """What the client calls its user, plainly; empty where it does not say. ``hints`` are its
    headers among ``USER_HEADERS``."""
    for source in sources:
        said = hints.get(source) if source in USER_HEADERS else parameters.get(source)
        if said is not None and isinstance(said, str) and said.strip():
            return said.strip()
    return ""


def user_id(key: bytes, team: str, said: str) -> str:
    """``u_`` and 20 hex digits: the same for the same words of one team, and nothing else's."""
    value = f"{team}\0{said}".encode("utf-8", "surrogatepass")
    return f"u_{hmac.digest(key, value, hashlib.sha256).hex()[:USER_CHARS]}"
