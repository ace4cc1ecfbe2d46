"""One tree of errors: drawn as it is, and each of them an answer in OpenAI's shape."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain import errors
from gateway.domain.errors import (
    BodyTooLarge,
    ClientFault,
    ClientGone,
    Evidence,
    GateUnavailable,
    GatewayError,
    GatewayFault,
    IdempotentResultExpired,
    Internal,
    InvalidKey,
    InvalidRequest,
    LedgerUnavailable,
    ModelNotAllowed,
    ModelNotFound,
    ModelRetired,
    NotOwned,
    NotServed,
    Overloaded,
    QuotaExceeded,
    RateLimited,
    ResultExpired,
    ResultNotFound,
    StillRunning,
    TeamFault,
    UnsupportedMedia,
    UploadStalled,
    UpstreamAccount,
    UpstreamBroken,
    UpstreamFault,
    UpstreamRefused,
    UpstreamUnanswered,
    UpstreamUnavailable,
    UpstreamUnknown,
)


def tree(root: type[GatewayError]) -> Iterator[tuple[type[GatewayError], str]]:
    """Every class and its parent's name."""
    for child in root.__subclasses__():
        yield child, root.__name__
        yield from tree(child)


def drawn() -> dict[str, str]:
    """Every name of the docstring's drawing and its parent."""
    found, parents = {}, {0: "GatewayError"}
    for line in (errors.__doc__ or "").splitlines():
        twig = re.match(r"    (?P<indent>[│ ]*)[├└]── (?P<name>\w+)", line)
        if twig:
            depth = len(twig["indent"]) // 4 + 1
            parents[depth] = twig["name"]
            found[twig["name"]] = parents[depth - 1]
    return found


def test_the_tree_is_drawn_as_it_is() -> None:
    assert drawn() == {child.__name__: parent for child, parent in tree(GatewayError)}


@pytest.mark.parametrize("name", sorted(drawn()))
def test_the_drawing_says_the_status(name: str) -> None:
    line = next(line for line in (errors.__doc__ or "").splitlines() if f"── {name} " in line)
    said = re.findall(r"\b[45]\d\d\b", line)
    found = getattr(errors, name)
    assert not said or str(found.status) in said


NOT_BILLED, UNKNOWN, BILLED = Evidence.NOT_BILLED, Evidence.UNKNOWN, Evidence.BILLED
INVALID = "invalid_request_error"


# status, type, code, may an SDK retry, was it billed
TABLE: list[tuple[type[GatewayError], int, str, str, bool | None, Evidence]] = [
    (InvalidRequest, 400, INVALID, "invalid_request", False, NOT_BILLED),
    (BodyTooLarge, 413, INVALID, "request_too_large", False, NOT_BILLED),
    (UnsupportedMedia, 415, INVALID, "unsupported_media_type", False, NOT_BILLED),
    (UploadStalled, 408, INVALID, "upload_stalled", True, NOT_BILLED),
    (NotServed, 404, INVALID, "unknown_url", False, NOT_BILLED),
    (ClientGone, 499, INVALID, "client_gone", False, NOT_BILLED),
    (InvalidKey, 401, INVALID, "invalid_api_key", False, NOT_BILLED),
    (ModelNotAllowed, 403, INVALID, "model_not_allowed", False, NOT_BILLED),
    (ModelNotFound, 404, INVALID, "model_not_found", False, NOT_BILLED),
    (ModelRetired, 404, INVALID, "model_retired", False, NOT_BILLED),
    (NotOwned, 404, INVALID, "not_found", False, NOT_BILLED),
    (ResultNotFound, 404, INVALID, "result_not_found", False, NOT_BILLED),
    (ResultExpired, 410, INVALID, "result_expired", False, NOT_BILLED),
    (IdempotentResultExpired, 410, INVALID, "idempotent_result_expired", False, NOT_BILLED),
    (RateLimited, 429, "requests", "rate_limit_exceeded", None, NOT_BILLED),
    (QuotaExceeded, 429, "insufficient_quota", "insufficient_quota", False, NOT_BILLED),
    (UpstreamUnavailable, 503, "server_error", "upstream_unavailable", None, NOT_BILLED),
    (UpstreamAccount, 503, "server_error", "upstream_account_refused", False, NOT_BILLED),
    (UpstreamUnanswered, 502, "server_error", "upstream_no_answer", None, NOT_BILLED),
    (UpstreamUnknown, 502, "server_error", "upstream_outcome_unknown", False, UNKNOWN),
    (UpstreamBroken, 502, "server_error", "upstream_bad_response", False, BILLED),
    (LedgerUnavailable, 503, "server_error", "ledger_unavailable", None, NOT_BILLED),
    (GateUnavailable, 503, "server_error", "gate_unavailable", True, NOT_BILLED),
    (Overloaded, 503, "server_error", "overloaded", None, NOT_BILLED),
    (StillRunning, 504, "server_error", "still_running", False, NOT_BILLED),
    (Internal, 500, "server_error", "internal_error", None, NOT_BILLED),
]
BRANCHES = {ClientFault, TeamFault, UpstreamFault, GatewayFault}


@pytest.mark.parametrize(("kind", "status", "type_", "code", "retry", "evidence"), TABLE)
def test_each_error_is_an_answer(
    kind: type[GatewayError],
    status: int,
    type_: str,
    code: str,
    retry: bool | None,
    evidence: Evidence,
) -> None:
    error = kind("What happened.")
    assert (error.status, error.should_retry, error.evidence) == (status, retry, evidence)
    answer = json.loads(error.content)
    assert list(answer) == ["error"]
    assert list(answer["error"]) == ["message", "type", "param", "code"]
    assert (answer["error"]["type"], answer["error"]["code"]) == (type_, code)
    assert answer["error"]["message"] == str(error) == error.message
    assert error.reason


def test_the_table_is_complete() -> None:
    leaves = {kind for kind, _ in tree(GatewayError)} - BRANCHES
    assert {row[0] for row in TABLE} | {UpstreamRefused} == leaves


def test_reasons_are_told_apart() -> None:
    reasons = [kind.reason for kind, _ in tree(GatewayError) if kind not in BRANCHES]
    assert len(reasons) == len(set(reasons))


def test_an_error_can_say_more_than_its_class() -> None:
    error = InvalidRequest(
        "No.",
        code="invalid_size",
        param="size",
        status=422,
        reason="size",
        should_retry=True,
        retry_after_seconds=2.5,
        close=True,
    )
    assert json.loads(error.content)["error"] == {
        "message": "No.",
        "type": INVALID,
        "param": "size",
        "code": "invalid_size",
    }
    assert (error.status, error.reason, error.should_retry) == (422, "size", True)
    assert (error.retry_after_seconds, error.close) == (2.5, True)
    # What one error says is not said by the next.
    plain = InvalidRequest("No.")
    assert (plain.status, plain.code, plain.should_retry) == (400, "invalid_request", False)


def test_a_client_that_left_says_where() -> None:
    assert ClientGone("upload").stage == "upload"


@given(st.text())
def test_any_message_is_one_line_of_ascii(message: str) -> None:
    content = InvalidRequest(message).content
    assert content.isascii()
    assert b"\n" not in content
    assert json.loads(content)["error"]["message"] == message


@given(st.binary(max_size=200))
def test_what_an_upstream_said_passes_byte_for_byte(content: bytes) -> None:
    refused = UpstreamRefused(400, content, code="moderation_blocked", headers=(("a", "b"),))
    assert refused.content is content
    assert (refused.status, refused.code, refused.headers) == (
        400,
        "moderation_blocked",
        (("a", "b"),),
    )
    assert refused.evidence is Evidence.NOT_BILLED
    assert refused.should_retry is None
