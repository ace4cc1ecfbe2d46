"""The secret at the door: read from the headers, never logged, never put in an error whole."""

from __future__ import annotations

from collections.abc import Mapping


def secret(headers: Mapping[str, str]) -> str | None:
    """The bearer token of a request; None where there is none. ``headers`` are lower-case."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
