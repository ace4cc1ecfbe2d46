"""The secret at the door: read from the headers, never logged, never put in an error whole."""

from __future__ import annotations

from collections.abc import Mapping


def secret(headers: Mapping[str, str]) -> str | None:
    """The bearer token of a request, or else what its ``api-key`` says, as Azure's clients have
    it; None where there is neither. ``headers`` are lower-case."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return bearer or headers.get("api-key", "").strip() or None
