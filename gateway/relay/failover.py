"""Was it billed? The table of money.md 8.1, read from an upstream's status and error body.

Only this table decides what a failed call owes, and whether another attempt could ever be right.
The answers a team sees follow from it: an error that is the owner's (a revoked key, an empty
account) never looks like the team's, and what may have been bought is never retried by an SDK.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any

from gateway.domain.errors import (
    Evidence,
    GatewayError,
    UpstreamAccount,
    UpstreamBroken,
    UpstreamFault,
    UpstreamRefused,
    UpstreamUnknown,
)
from gateway.relay.health import Why
from gateway.relay.owner import account_exhausted, account_refused

ERROR_BODY_BYTES = 256 * 1024
"""An error's body is read this far; what is longer is no API's error."""

BILLING_CODES = frozenset(
    {
        "insufficient_quota",
        "credit_balance_exhausted",
        "organization_spend_limit_exceeded",
        "project_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
        "billing_hard_limit_reached",
    }
)
UPSTREAM_RID_CHARS = 128
LEAST_WAIT_SECONDS = 0.05
"""The shortest wait that a client is told."""
EDGE_STATUSES = frozenset({408, 499, 502, 504, *range(520, 531)})
"""A proxy in front of the provider gave up waiting: the provider may have gone on."""


class Next(StrEnum):
    """Where a call may go after an attempt that failed."""

    OTHER_UPSTREAM_FIRST = "other_upstream_first"
    """The upstream is away, or failed by itself; it may be asked once more, at last."""
    OTHER_UPSTREAM_ONLY = "other_upstream_only"
    """Asking this one again would change nothing."""
    OTHER_HOST_ONLY = "other_host_only"
    """Nothing is sent to this one again: it cannot be trusted, or has no connection to spare."""
    OTHER_KEY_FIRST = "other_key_first"
    """This key has to be left alone; another of the same upstream is as good."""
    STOP = "stop"
    """It may have been bought, or is refused for what it asks."""


class Kind(StrEnum):
    """How an attempt failed: the ``class`` of ``gateway_upstream_errors_total``, a closed list."""

    DNS = "dns"
    CONNECT = "connect"
    CONNECT_TIMEOUT = "connect_timeout"
    TLS = "tls"
    POOL = "pool"
    WRITE = "write"
    WRITE_TIMEOUT = "write_timeout"
    DISCONNECT = "disconnect"
    READ_TIMEOUT = "read_timeout"
    PROTOCOL = "protocol"
    TRUNCATED = "truncated"
    BODY_TIMEOUT = "body_timeout"
    TOO_LARGE = "too_large"
    ENCODING = "encoding"
    EDGE = "edge"
    REDIRECT = "redirect"
    SSE = "sse"
    MODERATION = "moderation"
    CLIENT = "4xx"
    LIMITED = "429"
    SERVER = "5xx"
    AUTH = "auth"
    ACCOUNT = "account"
    IN_SUCCESS = "200_error"
    BAD_ANSWER = "bad_answer"


_KINDS = {
    **{kind.value: kind for kind in Kind},
    "upstream_unavailable": Kind.CONNECT,
    "upstream_unknown": Kind.DISCONNECT,
    "upstream_edge": Kind.EDGE,
    "upstream_redirect": Kind.REDIRECT,
    "upstream_not_there": Kind.EDGE,
    "upstream_sse": Kind.SSE,
    "upstream_4xx": Kind.CLIENT,
    "upstream_429": Kind.LIMITED,
    "upstream_5xx": Kind.SERVER,
    "upstream_auth": Kind.AUTH,
    "upstream_account_exhausted": Kind.ACCOUNT,
    "upstream_200_error": Kind.IN_SUCCESS,
    "upstream_bad_response": Kind.BAD_ANSWER,
}
"""An error's ``reason`` -> what it is counted as."""
UNREACHED = frozenset({Kind.DNS, Kind.CONNECT, Kind.CONNECT_TIMEOUT, Kind.TLS, Kind.POOL})
"""Surely nothing was sent."""


def kind_of(error: GatewayError) -> Kind | None:
    """What a failed attempt is counted as; None where the upstream has no part in it."""
    return _KINDS.get(error.reason)


def verdict(error: GatewayError) -> Next:
    """Where a call may go after this error, and only the proof that nothing was billed lets it go
    anywhere (money.md 8.1)::

        not sent (dns, connect, connect_timeout)         other upstream first
        500, 503 with the API's error                    other upstream first
        not sent (tls; pool: every connection is busy)   another host only
        404, 413; 403, 404, 405 without the API's error  another upstream only
        401, 402, 403, billing, 429                      other key first
        400, 422, moderation, every other 4xx, 3xx       stop
        sent and unknown, an edge's 5xx, after a 200     stop
        500, 503 where ``bill_on_5xx: always``           stop
    """
    kind = kind_of(error)
    if error.evidence is not Evidence.NOT_BILLED or kind is None:
        return Next.STOP
    if isinstance(error, UpstreamAccount):
        return Next.OTHER_KEY_FIRST
    if kind in (Kind.TLS, Kind.POOL):
        return Next.OTHER_HOST_ONLY
    if kind in UNREACHED or kind is Kind.SERVER:
        return Next.OTHER_UPSTREAM_FIRST
    if kind is Kind.LIMITED:
        return Next.OTHER_KEY_FIRST
    if kind is Kind.EDGE or (kind is Kind.CLIENT and error.status in (404, 413)):
        return Next.OTHER_UPSTREAM_ONLY
    return Next.STOP


_ACCOUNT = re.compile(rb"\b(org|proj)[-_][A-Za-z0-9]{6,}")
"""The owner's account, which rate limit texts name (contract 4.5)."""
NO_URL = "Invalid URL"
NOT_FOUND = "Not Found"
_NO_PATH = (NOT_FOUND, "Resource not found")
"""What servers say where they have no such path: frameworks, Azure's front door."""
_CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""A word for logs; what is more than that may be anybody's text."""
RETRY_HEADERS = ("retry-after", "retry-after-ms", "x-should-retry")


def refusal(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    upstream: str,
    *,
    failures_billed: bool = False,
    by_id: bool = False,
) -> GatewayError:
    """The error that an upstream's answer other than 200 amounts to.

    ``headers`` have lower-case names. The error's ``evidence`` says what the call owes; with
    ``failures_billed`` a failure of the API itself proves nothing. ``by_id``: it was asked for
    what it has made itself, so a 404 without words says that this is gone, not the path.
    """
    error = _api_error(body)
    if 300 <= status < 400:
        return UpstreamFault(
            f"The upstream {upstream} answered with a redirect, which is not followed. Nothing was "
            "bought. Ask the gateway's operator to correct its base_url.",
            code="upstream_redirect",
            reason="upstream_redirect",
            should_retry=False,
        )
    if status == 403 and error is None:
        return UpstreamFault(
            f"Something in front of the upstream {upstream} refused this request (403), perhaps a "
            "firewall. The upstream has not seen it, so nothing was charged. If that goes on, ask "
            "the gateway's operator.",
            code="upstream_forbidden",
            reason="upstream_edge",
            should_retry=False,
        )
    if _is_not_there(status, body, error, by_id=by_id):
        return UpstreamFault(
            f"The upstream {upstream} serves nothing at the address that this gateway asks "
            f"({status}). The upstream has not taken this request, so nothing was charged. The "
            f"gateway's operator has to correct upstreams.{upstream}.base_url, which usually ends "
            "in /v1 and names no endpoint.",
            code="upstream_not_there",
            reason="upstream_not_there",
            should_retry=False,
        )
    if status == 403 and error is not None and _is_moderation(error):
        return _passed_on(status, headers, body, error, "moderation")
    billing = 400 <= status < 500 and error is not None and _is_billing(error)
    if status in (401, 402, 403) and not billing:
        return account_refused(upstream, status)
    if billing:
        return account_exhausted(upstream)
    if status in EDGE_STATUSES or status >= 599 or (status >= 500 and error is None):
        return UpstreamUnknown(
            f"Something between this gateway and the upstream {upstream} gave up ({status}). The "
            "picture may have been made and paid for, so this is not retried for you.",
            status=504,
            reason="upstream_edge",
        )
    if status >= 500 and failures_billed:
        return UpstreamUnknown(
            f"The upstream {upstream} failed by itself ({status}), and such failures may be on its "
            "bill: money may have been spent. Sending it again may buy it twice.",
            reason="upstream_5xx",
        )
    if status >= 500:
        return _passed_on(status, headers, body, error, "upstream_5xx")
    if status >= 400:
        reason = "upstream_429" if status == 429 else "upstream_4xx"
        return _passed_on(status, headers, body, error, reason)
    return UpstreamBroken(
        f"The upstream {upstream} answered {status}, which is no answer to this call. It may have "
        "been paid for, so this is not retried for you.",
    )


def said_wait(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """The seconds that an upstream asks to wait for; None where it says none, or nothing that can
    be understood. A date, which counts from ``now``, is not without it."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return float(headers[name]) / unit
        except (KeyError, ValueError):
            continue
    if now is None or "retry-after" not in headers:
        return None
    try:
        until = parsedate_to_datetime(headers["retry-after"])
    except (ValueError, OverflowError, IndexError):
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return (until - now).total_seconds()


def error_in_success(error: object, upstream: str) -> GatewayError:
    """A 200 whose body is an error: mapped to the status it should have had; not billed."""
    described: Mapping[str, Any] = error if isinstance(error, dict) else {"message": error}
    kind, code = str(described.get("type")), str(described.get("code"))
    if _is_billing(described):
        return refusal(429, {}, _as_body(described), upstream)
    if kind in ("invalid_request_error", "image_generation_user_error") or code.startswith(
        ("moderation", "invalid", "content_policy", "unknown_parameter")
    ):
        status = 400
    elif code in ("rate_limit_exceeded", "slow_down"):
        status = 429
    else:
        status = 502
    refused = _passed_on(status, {}, _as_body(described), described, "upstream_200_error")
    if status == 502:
        refused.should_retry = False
    return refused


def _is_billing(error: Mapping[str, Any]) -> bool:
    """Whether the owner's account has no money. Its codes grow, their type stays (contract 4.2);
    `billing_hard_limit_reached` comes with a 400."""
    return error.get("type") == "insufficient_quota" or str(error.get("code")) in BILLING_CODES


def _is_moderation(error: Mapping[str, Any]) -> bool:
    """Whether an error is about what one request asks for."""
    about = str(error.get("code")).startswith(("moderation", "content_policy"))
    return about or error.get("type") == "image_generation_user_error"


def _is_not_there(
    status: int, body: bytes, error: Mapping[str, Any] | None, *, by_id: bool
) -> bool:
    """Whether nobody serves the path, as opposed to what is asked for there: a server's own page,
    a framework's word, or OpenAI's for a path it does not know."""
    if status not in (404, 405):
        return False
    by_id = by_id and status == 404
    if error is None:
        return not by_id and (_detail(body) or NOT_FOUND) in (NOT_FOUND, "Method Not Allowed")
    said = str(error.get("message"))
    no_path = (NO_URL,) if by_id else (NO_URL, *_NO_PATH)
    return error.get("code") in (None, "404") and said.startswith(no_path)


def _passed_on(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    error: Mapping[str, Any] | None,
    reason: str,
) -> UpstreamRefused:
    if error is None:
        body = _as_body({"message": _plain_message(status, body), "type": "upstream_error"})
        error = {}
    if error.get("code") != "moderation_blocked":
        body = _ACCOUNT.sub(rb"\1-***", body)
    kept = tuple((name, headers[name]) for name in RETRY_HEADERS if name in headers)
    code = error.get("code")
    if code == "moderation_blocked":
        reason = "moderation"
    refused = UpstreamRefused(
        status,
        body,
        code=code if isinstance(code, str) and _CODE.fullmatch(code) else f"http_{status}",
        headers=kept,
        reason=reason,
    )
    refused.should_retry = None
    return refused


def _api_error(body: bytes) -> Mapping[str, Any] | None:
    """The ``error`` object of an API's error body, or None for anything else."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    error = document.get("error")
    if isinstance(error, dict):
        return error
    return {"message": error} if isinstance(error, str) else None


def _plain_message(status: int, body: bytes) -> str:
    """What an upstream that does not speak OpenAI's errors had to say."""
    return _detail(body) or f"The upstream answered {status} without an error body."


def _detail(body: bytes) -> str:
    """Its ``detail``, mostly, or its ``message``; empty where it has neither."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(document, dict):
        return ""
    detail = document.get("detail", document.get("message"))
    if isinstance(detail, str):
        return detail[:1000]
    return "" if detail is None else json.dumps(detail)[:1000]


def _as_body(error: Mapping[str, Any]) -> bytes:
    shaped = {"message": "", "type": "server_error", "param": None, "code": None} | dict(error)
    return json.dumps({"error": shaped}, separators=(",", ":")).encode()


def why_refused(error: UpstreamAccount, status: int) -> Why:
    """Why an upstream refuses a key, by its error and its status."""
    if kind_of(error) is Kind.ACCOUNT or status == 402:
        return Why.BILLING
    return Why.FORBIDDEN if status == 403 else Why.AUTH
