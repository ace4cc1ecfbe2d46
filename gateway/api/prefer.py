"""What a client prefers (RFC 7240): not to wait at all, or for so long."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_WAIT_SECONDS = 60.0
"""Proxies and load balancers commonly give up at a minute of silence."""
_PREFERENCE = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*"?)+')


@dataclass(frozen=True, slots=True)
class Preferences:
    """``respond_async``: 202 at once, and the result later. ``wait_seconds`` is how long an answer
    may be waited for, at most ``MAX_WAIT_SECONDS``; None where nothing was said."""

    respond_async: bool = False
    wait_seconds: float | None = None


NO_WISHES = Preferences()
PREFERRING = frozenset(("prefer", "x-gateway-async"))
"""Who sends none of these prefers nothing."""
_ASKED = Preferences(respond_async=True)


def preferences(headers: Iterable[tuple[bytes, bytes]]) -> Preferences:
    """What ``Prefer`` says, of several the first, and ``x-gateway-async: true`` where a client
    cannot send that. Names of ``headers`` are lower-case; what is not understood is ignored."""
    said: dict[str, str] = {}
    asked = False
    for name, raw in headers:
        if name == b"x-gateway-async":
            asked = raw.decode("latin-1").strip().lower() == "true"
        elif name == b"prefer":
            for one in _PREFERENCE.findall(raw.decode("latin-1")):
                key, _, rest = one.partition(";")[0].partition("=")
                said.setdefault(key.strip().lower(), rest.strip().strip('"'))
    if not said:
        return _ASKED if asked else NO_WISHES
    wait = said.get("wait", "")
    known = re.fullmatch(r"[0-9]{1,9}", wait) is not None
    return Preferences(
        asked or "respond-async" in said,
        min(float(wait), MAX_WAIT_SECONDS) if known else None,
    )
