"""Was it billed? Every status and body that an upstream may answer with (money.md 8.1)."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.errors import (
    Evidence,
    GatewayError,
    InvalidRequest,
    Overloaded,
    UpstreamAccount,
    UpstreamBroken,
    UpstreamFault,
    UpstreamRefused,
    UpstreamUnavailable,
    UpstreamUnknown,
)
from gateway.relay.failover import (
    BILLING_CODES,
    Kind,
    Next,
    error_in_success,
    kind_of,
    refusal,
    said_wait,
    verdict,
)

N, U, B = Evidence.NOT_BILLED, Evidence.UNKNOWN, Evidence.BILLED
SECRET = "Incorrect API key provided: sk-proj-*********************************9f2c."


def said(**error: Any) -> bytes:
    return json.dumps({"error": {"message": "m", "type": "t", "param": None, **error}}).encode()


PLAIN = said(code="some_code")
HTML = b"<html><body>502 Bad Gateway</body></html>"
DETAIL = b'{"detail": [{"loc": ["body", "size"], "msg": "bad"}]}'


# status, body -> class, evidence, status for the client, may an SDK retry (None: its own rule)
TABLE: list[tuple[int, bytes, type[GatewayError], Evidence, int, bool | None, str]] = [
    # The request was refused: passed on, owes nothing, nobody else is asked.
    (400, PLAIN, UpstreamRefused, N, 400, None, "upstream_4xx"),
    (400, said(code="moderation_blocked"), UpstreamRefused, N, 400, None, "moderation"),
    (400, HTML, UpstreamRefused, N, 400, None, "upstream_4xx"),
    (404, said(code="model_not_found"), UpstreamRefused, N, 404, None, "upstream_4xx"),
    (404, DETAIL, UpstreamRefused, N, 404, None, "upstream_4xx"),
    (404, said(message="Invalid URL"), UpstreamFault, N, 502, False, "upstream_not_there"),
    (405, HTML, UpstreamFault, N, 502, False, "upstream_not_there"),
    (404, b'{"message": "no model m"}', UpstreamRefused, N, 404, None, "upstream_4xx"),
    (409, PLAIN, UpstreamRefused, N, 409, None, "upstream_4xx"),
    (413, HTML, UpstreamRefused, N, 413, None, "upstream_4xx"),
    (422, DETAIL, UpstreamRefused, N, 422, None, "upstream_4xx"),
    (429, said(code="rate_limit_exceeded"), UpstreamRefused, N, 429, None, "upstream_429"),
    (429, said(code="slow_down"), UpstreamRefused, N, 429, None, "upstream_429"),
    (429, b"", UpstreamRefused, N, 429, None, "upstream_429"),
    # The owner's own account: never shown as the team's fault.
    (401, said(message=SECRET), UpstreamAccount, N, 503, False, "upstream_auth"),
    (401, HTML, UpstreamAccount, N, 503, False, "upstream_auth"),
    (402, PLAIN, UpstreamAccount, N, 503, False, "upstream_auth"),
    (403, PLAIN, UpstreamAccount, N, 503, False, "upstream_auth"),
    (403, b'{"error": "no"}', UpstreamAccount, N, 503, False, "upstream_auth"),
    *(
        (
            *(status, said(code="insufficient_quota"), UpstreamAccount),
            *(N, 503, False, "upstream_account_exhausted"),
        )
        for status in (401, 402, 403)
    ),
    # A 403 about what is asked is the request's; one without the API's error is an edge's.
    *(
        (403, said(code=code), UpstreamRefused, N, 403, None, "moderation")
        for code in ("moderation_blocked", "moderation_failed", "content_policy_violation")
    ),
    (
        *(403, said(type="image_generation_user_error", code=None), UpstreamRefused),
        *(N, 403, None, "moderation"),
    ),
    *((403, body, UpstreamFault, N, 502, False, "upstream_edge") for body in (HTML, b"", DETAIL)),
    *(
        (429, said(code=code), UpstreamAccount, N, 503, False, "upstream_account_exhausted")
        for code in sorted(BILLING_CODES)
    ),
    (
        *(429, said(type="insufficient_quota", code=None), UpstreamAccount),
        *(N, 503, False, "upstream_account_exhausted"),
    ),
    (
        *(400, said(code="billing_hard_limit_reached"), UpstreamAccount),
        *(N, 503, False, "upstream_account_exhausted"),
    ),
    # The API itself says that it failed: not billed.
    (500, said(type="server_error"), UpstreamRefused, N, 500, None, "upstream_5xx"),
    (500, b'{"error": "it failed"}', UpstreamRefused, N, 500, None, "upstream_5xx"),
    (503, said(code="overloaded"), UpstreamRefused, N, 503, None, "upstream_5xx"),
    # Something between: the picture may have been made.
    (500, HTML, UpstreamUnknown, U, 504, False, "upstream_edge"),
    (500, b"", UpstreamUnknown, U, 504, False, "upstream_edge"),
    (500, b'{"detail": "x"}', UpstreamUnknown, U, 504, False, "upstream_edge"),
    (500, b'{"error": null}', UpstreamUnknown, U, 504, False, "upstream_edge"),
    (500, b'["error"]', UpstreamUnknown, U, 504, False, "upstream_edge"),
    (500, b"[" * 100_000, UpstreamUnknown, U, 504, False, "upstream_edge"),
    (503, HTML, UpstreamUnknown, U, 504, False, "upstream_edge"),
    *((status, PLAIN, UpstreamUnknown, U, 504, False, "upstream_edge") for status in (502, 504)),
    *(
        (status, body, UpstreamUnknown, U, 504, False, "upstream_edge")
        for status in (408, *range(520, 525), 530 - 1)
        for body in (PLAIN, HTML)
    ),
    # No answer to a POST for a picture.
    (301, b"", UpstreamFault, N, 502, False, "upstream_redirect"),
    (307, PLAIN, UpstreamFault, N, 502, False, "upstream_redirect"),
    (201, PLAIN, UpstreamBroken, B, 502, False, "upstream_bad_response"),
    (204, b"", UpstreamBroken, B, 502, False, "upstream_bad_response"),
]


@pytest.mark.parametrize(("status", "body", "kind", "evidence", "answered", "retry", "why"), TABLE)
def test_what_an_answer_proves(
    status: int,
    body: bytes,
    kind: type[GatewayError],
    evidence: Evidence,
    answered: int,
    retry: bool | None,
    why: str,
) -> None:
    error = refusal(status, {}, body, "openai")
    assert type(error) is kind
    assert (error.evidence, error.status) == (evidence, answered)
    assert (error.should_retry, error.reason) == (retry, why)
    assert json.loads(error.content)["error"]
    if evidence is not N:
        assert "may have been" in error.message or "no answer" in error.message


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422, 429, 500, 503])
@pytest.mark.parametrize("spaces", [b"", b"\n "])
def test_an_apis_own_error_passes_byte_for_byte(status: int, spaces: bytes) -> None:
    body = spaces + said(code="c", moderation_details={"categories": ["x"]}) + spaces
    error = refusal(status, {}, body, "openai")
    assert error.content == body
    assert error.code == "c"


@pytest.mark.parametrize("status", [500, 503])
def test_a_failure_that_may_be_billed_proves_nothing(status: int) -> None:
    error = refusal(status, {}, said(code="c"), "openai", failures_billed=True)
    assert type(error) is UpstreamUnknown
    assert (error.status, error.should_retry, error.evidence) == (502, False, U)
    assert (kind_of(error), verdict(error)) == (Kind.SERVER, Next.STOP)
    limited = refusal(429, {}, said(code="c"), "openai", failures_billed=True)
    assert limited.evidence is N


@pytest.mark.parametrize("status", [401, 402, 403])
@pytest.mark.parametrize("body", [said(message=SECRET, code="invalid_api_key"), SECRET.encode()])
def test_what_an_upstream_says_of_the_owners_key_never_passes(status: int, body: bytes) -> None:
    content = refusal(status, {}, body, "openai").content
    for secret in (b"sk-", b"9f2c", b"Incorrect API key", b"invalid_api_key"):
        assert secret not in content
    assert b"gateway's operator" in content
    assert b"nothing was charged" in content


@pytest.mark.parametrize(
    "error",
    [
        {"code": "insufficient_quota"},
        {"type": "insufficient_quota", "code": "a_new_one"},
        {"code": "organization_spend_limit_exceeded"},
    ],
)
def test_an_empty_account_is_not_the_teams_empty_budget(error: dict[str, str]) -> None:
    found = refusal(429, {"retry-after": "1"}, said(**error, message="org-123 is broke"), "openai")
    assert found.code == "upstream_account_exhausted"
    assert b"org-123" not in found.content
    assert b"insufficient_quota" not in found.content
    assert b"Your team's budget is fine" in found.content


def test_only_advice_on_retries_passes_with_a_refusal() -> None:
    error = refusal(
        429,
        {
            "retry-after": "7",
            "retry-after-ms": "6500",
            "x-should-retry": "false",
            "openai-organization": "org-123",
            "x-ratelimit-remaining-requests": "0",
            "set-cookie": "a=b",
        },
        said(code="rate_limit_exceeded"),
        "openai",
    )
    assert isinstance(error, UpstreamRefused)
    assert dict(error.headers) == {
        "retry-after": "7",
        "retry-after-ms": "6500",
        "x-should-retry": "false",
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The upstream answered 422 without an error body."),
        (HTML, "The upstream answered 422 without an error body."),
        (b'{"detail": "bad size"}', "bad size"),
        (b'{"detail": [1]}', "[1]"),
        (b'{"detail": "' + b"x" * 5000 + b'"}', "x" * 1000),
        (b'["detail"]', "The upstream answered 422 without an error body."),
    ],
)
def test_an_error_of_another_form_is_given_ours(body: bytes, message: str) -> None:
    error = refusal(422, {}, body, "openai")
    assert json.loads(error.content) == {
        "error": {"message": message, "type": "upstream_error", "param": None, "code": None}
    }
    assert error.code == "http_422"


@pytest.mark.parametrize(
    "code", [None, 7, ["x"], {"a": 1}, "", "two words", "line\nbreak", "é", "x" * 65]
)
def test_a_code_that_is_no_word_is_named_by_the_status(code: object) -> None:
    assert refusal(400, {}, said(code=code), "openai").code == "http_400"


# An error inside a 200


@pytest.mark.parametrize(
    ("error", "kind", "status", "retry", "reason"),
    [
        ({"code": "moderation_blocked"}, UpstreamRefused, 400, None, "moderation"),
        ({"code": "content_policy_violation"}, UpstreamRefused, 400, None, "upstream_200_error"),
        ({"code": "invalid_value"}, UpstreamRefused, 400, None, "upstream_200_error"),
        ({"code": "unknown_parameter"}, UpstreamRefused, 400, None, "upstream_200_error"),
        ({"type": "invalid_request_error"}, UpstreamRefused, 400, None, "upstream_200_error"),
        (
            *({"type": "image_generation_user_error"}, UpstreamRefused),
            *(400, None, "upstream_200_error"),
        ),
        ({"code": "rate_limit_exceeded"}, UpstreamRefused, 429, None, "upstream_200_error"),
        ({"code": "slow_down"}, UpstreamRefused, 429, None, "upstream_200_error"),
        (
            *({"code": "insufficient_quota"}, UpstreamAccount),
            *(503, False, "upstream_account_exhausted"),
        ),
        (
            *({"type": "insufficient_quota"}, UpstreamAccount),
            *(503, False, "upstream_account_exhausted"),
        ),
        ({"code": "InternalError"}, UpstreamRefused, 502, False, "upstream_200_error"),
        ({}, UpstreamRefused, 502, False, "upstream_200_error"),
        ("it failed", UpstreamRefused, 502, False, "upstream_200_error"),
        (["it", "failed"], UpstreamRefused, 502, False, "upstream_200_error"),
        ({"code": None, "type": 7}, UpstreamRefused, 502, False, "upstream_200_error"),
    ],
)
def test_an_error_in_a_200_gets_the_status_it_should_have_had(
    error: object, kind: type[GatewayError], status: int, retry: bool | None, reason: str
) -> None:
    found = error_in_success(error, "openai")
    assert type(found) is kind
    assert (found.status, found.should_retry, found.reason) == (status, retry, reason)
    assert found.evidence is N
    shaped = json.loads(found.content)["error"]
    assert set(shaped) >= {"message", "type", "param", "code"}
    if isinstance(error, dict) and kind is UpstreamRefused:
        assert shaped.items() >= error.items()


def test_what_an_error_in_a_200_says_is_kept() -> None:
    error = {"message": "No cats.", "code": "moderation_blocked", "moderation_details": {"a": 1}}
    assert json.loads(error_in_success(error, "openai").content) == {
        "error": {"message": "No cats.", "type": "server_error", "param": None}
        | {"code": "moderation_blocked", "moderation_details": {"a": 1}}
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(
    status=st.integers(201, 599),
    body=st.one_of(
        st.binary(max_size=60),
        json_values.map(lambda value: json.dumps(value).encode()),
        json_values.map(lambda value: json.dumps({"error": value}).encode()),
        json_values.map(lambda value: json.dumps({"detail": value}).encode()),
    ),
)
def test_no_answer_is_too_odd_to_judge(status: int, body: bytes) -> None:
    error = refusal(status, {}, body, "openai")
    assert 400 <= error.status < 600
    assert "error" in json.loads(error.content)
    # Whatever proves nothing is never retried.
    if error.evidence is not N:
        assert error.should_retry is False


@given(json_values)
def test_no_error_in_a_200_is_too_odd_to_judge(error: object) -> None:
    found = error_in_success(error, "openai")
    assert found.status in (400, 429, 502, 503)
    assert "error" in json.loads(found.content)


# Where a call may go next


def unreached(reason: str) -> GatewayError:
    return UpstreamUnavailable("It was not reached.", reason=reason)


NEXT: list[tuple[GatewayError, Next, Kind | None]] = [
    *((unreached(reason), Next.OTHER_UPSTREAM_FIRST, Kind(reason))
      for reason in ("dns", "connect", "connect_timeout")),
    (unreached("upstream_unavailable"), Next.OTHER_UPSTREAM_FIRST, Kind.CONNECT),
    (unreached("tls"), Next.OTHER_HOST_ONLY, Kind.TLS),
    (Overloaded("Every connection is busy.", reason="pool"), Next.OTHER_HOST_ONLY, Kind.POOL),
    (Overloaded("The disk is full."), Next.STOP, None),
    (refusal(401, {}, PLAIN, "up"), Next.OTHER_KEY_FIRST, Kind.AUTH),
    (refusal(402, {}, PLAIN, "up"), Next.OTHER_KEY_FIRST, Kind.AUTH),
    (refusal(403, {}, PLAIN, "up"), Next.OTHER_KEY_FIRST, Kind.AUTH),
    (refusal(403, {}, HTML, "up"), Next.OTHER_UPSTREAM_ONLY, Kind.EDGE),
    (refusal(403, {}, said(code="content_policy_violation"), "up"), Next.STOP, Kind.MODERATION),
    *((refusal(status, {}, said(code=code), "up"), Next.OTHER_KEY_FIRST, Kind.ACCOUNT)
      for code in sorted(BILLING_CODES) for status in (400, 429)),
    (refusal(429, {}, PLAIN, "up"), Next.OTHER_KEY_FIRST, Kind.LIMITED),
    (refusal(429, {}, HTML, "up"), Next.OTHER_KEY_FIRST, Kind.LIMITED),
    (refusal(404, {}, PLAIN, "up"), Next.OTHER_UPSTREAM_ONLY, Kind.CLIENT),
    (refusal(404, {}, HTML, "up"), Next.OTHER_UPSTREAM_ONLY, Kind.EDGE),
    (refusal(413, {}, HTML, "up"), Next.OTHER_UPSTREAM_ONLY, Kind.CLIENT),
    *((refusal(status, {}, PLAIN, "up"), Next.STOP, Kind.CLIENT)
      for status in (400, 405, 409, 415, 422, 451)),
    (refusal(400, {}, said(code="moderation_blocked"), "up"), Next.STOP, Kind.MODERATION),
    (refusal(404, {}, said(code="moderation_blocked"), "up"), Next.STOP, Kind.MODERATION),
    (refusal(307, {}, b"", "up"), Next.STOP, Kind.REDIRECT),
    (refusal(500, {}, PLAIN, "up"), Next.OTHER_UPSTREAM_FIRST, Kind.SERVER),
    (refusal(503, {}, PLAIN, "up"), Next.OTHER_UPSTREAM_FIRST, Kind.SERVER),
    (refusal(500, {}, said(code="moderation_blocked"), "up"), Next.STOP, Kind.MODERATION),
    *((refusal(status, {}, body, "up"), Next.STOP, Kind.EDGE)
      for status, body in ((500, HTML), (503, b""), (502, PLAIN), (504, PLAIN), (524, HTML))),
    *((UpstreamUnknown("It was sent.", reason=reason), Next.STOP, Kind(reason))
      for reason in ("write", "write_timeout", "disconnect", "read_timeout", "protocol")),
    *((UpstreamBroken("A 200.", reason=reason), Next.STOP, Kind(reason))
      for reason in ("truncated", "body_timeout", "too_large", "encoding")),
    (UpstreamBroken("A 200."), Next.STOP, Kind.BAD_ANSWER),
    (error_in_success({"code": "rate_limit_exceeded"}, "up"), Next.STOP, Kind.IN_SUCCESS),
    (InvalidRequest("No."), Next.STOP, None),
]  # fmt: skip


@pytest.mark.parametrize(("error", "then", "kind"), NEXT)
def test_where_a_call_may_go_next(error: GatewayError, then: Next, kind: Kind | None) -> None:
    assert (verdict(error), kind_of(error)) == (then, kind)


@given(st.integers(100, 599), st.sampled_from([PLAIN, HTML, b"", DETAIL]))
def test_what_may_have_been_bought_is_never_sent_again(status: int, body: bytes) -> None:
    error = refusal(status, {}, body, "up")
    if error.evidence is not N:
        assert verdict(error) is Next.STOP


NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "7", "retry-after-ms": "6500"}, 6.5),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Sun, 22 Nov 2026 12:00:30 GMT"}, 30.0),
        ({"retry-after": "Sun, 22 Nov 2026 12:00:30 -0000"}, 30.0),
        ({"retry-after": "Sun, 22 Nov 2026 11:59:00 GMT"}, -60.0),
        ({"retry-after": "Sun, 22 Nov 2026 12:00:30 GMT", "retry-after-ms": "soon"}, 30.0),
        ({"retry-after": "Sun, 99 Nov 2026 12:00:30 GMT"}, None),
        ({"retry-after": "Sun, 22 Nov 99999999999999999999 12:00:30 GMT"}, None),
    ],
)
def test_how_long_an_upstream_asks_to_wait(said: dict[str, str], seconds: float | None) -> None:
    assert said_wait(said, NOON) == seconds


def test_a_date_says_nothing_to_who_has_none() -> None:
    assert said_wait({"retry-after": "Sun, 22 Nov 2026 12:00:30 GMT"}) is None


@given(st.text(st.characters(max_codepoint=255)) | st.from_regex(
    r"\w{3}, \d{1,3} (Nov|\w+) \d{1,30} \d{1,9}(:\d{1,30})* ([+-]\d{1,30}|GMT)"))  # fmt: skip
def test_no_time_to_wait_is_too_odd(text: str) -> None:
    assert isinstance(said_wait({"retry-after": text}, NOON), float | None)
