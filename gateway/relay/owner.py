"""What a client is told where the gateway owner's key or account is refused upstream.

That it is not the client's fault, which setting the operator has to look at, and when it is worth
another try."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gateway.domain.errors import UpstreamAccount
from gateway.relay.health import Why


def account_refused(upstream: str, status: int) -> UpstreamAccount:
    """An upstream has just refused the key that was sent."""
    why = {402: Why.BILLING, 403: Why.FORBIDDEN}.get(status, Why.AUTH)
    return UpstreamAccount(
        f"The upstream {upstream} refused this gateway's own account ({status}). Your key and "
        f"request are fine, and nothing was charged. {_to_do(why, (upstream,))}",
        reason="upstream_auth",
    )


def account_exhausted(upstream: str) -> UpstreamAccount:
    """An upstream has just said that the account has no money."""
    return _exhausted(f"the upstream {upstream}", (upstream,))


def account_rests(
    whose: str, upstreams: Iterable[str], reasons: Iterable[Why], wait_seconds: float
) -> UpstreamAccount:
    """Nothing was sent, for every key was refused a while ago. ``whose`` names who refused them.

    ``retry-after`` is when the next request goes out to see; it is no advice to an SDK, which
    would keep its caller for a minute to find the same."""
    names, found = tuple(dict.fromkeys(upstreams)), set(reasons)
    if found == {Why.BILLING}:
        return _exhausted(whose, names, wait_seconds)
    why = found.pop() if len(found) == 1 else Why.AUTH
    return UpstreamAccount(
        f"{whose[:1].upper()}{whose[1:]} refuses this gateway's own account. Your key and request "
        f"are fine, and nothing was charged. {_to_do(why, names)}{_when(wait_seconds)}",
        reason="upstream_auth",
        retry_after_seconds=wait_seconds or None,
    )


def rests(error: UpstreamAccount, wait_seconds: float) -> None:
    """Says when a key may be asked again; nothing where one may be asked now."""
    if wait_seconds > 0:
        error.retry_after_seconds = wait_seconds


def _exhausted(
    whose: str, upstreams: tuple[str, ...], wait_seconds: float = 0.0
) -> UpstreamAccount:
    return UpstreamAccount(
        f"This gateway's account at {whose} has run out of money or reached its limit. Your team's "
        "budget is fine, and nothing was charged. "
        f"{_to_do(Why.BILLING, upstreams)}{_when(wait_seconds)}",
        code="upstream_account_exhausted",
        reason="upstream_account_exhausted",
        retry_after_seconds=wait_seconds or None,
    )


def _when(wait_seconds: float) -> str:
    return f" It is tried again in {math.ceil(wait_seconds)} s." if wait_seconds else ""


def _to_do(why: Why, upstreams: tuple[str, ...]) -> str:
    settings = " and ".join(f"upstreams.{name}.api_keys" for name in upstreams)
    match why:
        case Why.BILLING:
            what = f"pay there, raise the limit, or put another account's key into {settings}"
        case Why.FORBIDDEN:
            what = f"let the key of {settings} use this model there, or put in one that may"
        case Why.AUTH:
            what = f"put a valid key into {settings}"
    return f"The gateway's operator has to {what}."
