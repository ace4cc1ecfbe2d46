"""Every way a request can end badly, as one tree.

Each error knows whose fault it is, the HTTP status, OpenAI's ``type`` and ``code``, whether a
retry can help (``x-should-retry``, contract 4.4) and whether the upstream may have billed.

::

    GatewayError
    ├── ClientFault            the request is wrong; never billed, never worth a retry
    │   ├── InvalidRequest     400  (or the 4xx given)
    │   ├── BodyTooLarge       413
    │   ├── UnsupportedMedia   415
    │   ├── UploadStalled      408  the body stopped coming; never sent, so a retry is free
    │   ├── NotServed          404 / 405, no such route
    │   └── ClientGone         nobody left to answer; never sent
    ├── TeamFault              the team's key, permissions, limits or money
    │   ├── InvalidKey         401
    │   ├── ModelNotAllowed    403
    │   ├── ModelNotFound      404
    │   ├── NotOwned           404  no such file or response, or another team's
    │   ├── ModelRetired       404  its provider has stopped serving it
    │   ├── ResultNotFound     404  no such result, or another team's
    │   ├── ResultExpired      410  it was there, and is kept no longer
    │   ├── IdempotentResultExpired 410  the same, of the call that has the idempotency key
    │   ├── RateLimited        429  a retry helps after `retry_after_seconds`
    │   └── QuotaExceeded      429  `insufficient_quota`; no retry helps
    ├── UpstreamFault          the provider, or the way to it
    │   ├── UpstreamRefused    the provider's own status and body, passed on unchanged; not billed
    │   ├── UpstreamUnavailable 503  surely not billed (class N of money.md 8.1)
    │   ├── UpstreamAccount    503  the owner's key or account is refused; not billed
    │   ├── UpstreamUnanswered 502/504  what costs nothing was sent, and not answered to the end
    │   ├── UpstreamUnknown    502/504  something was sent and the outcome is unknown (class U)
    │   └── UpstreamBroken     502/504  a 200 was seen, then it broke (class B)
    └── GatewayFault           our own stores or limits
        ├── LedgerUnavailable  503
        ├── GateUnavailable    503  nothing was bought; a retry helps once the gate is back
        ├── Overloaded         503
        ├── StillRunning       504  the picture is being made; its result can be asked for
        └── Internal           500
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum


class Evidence(StrEnum):
    """Was it billed? The only question a failed upstream call leaves (money.md 8.1)."""

    NOT_BILLED = "not_billed"
    UNKNOWN = "unknown"
    BILLED = "billed"


class Fault(StrEnum):
    """Whose fault an error is: the label of the metric. Alerts stand on it."""

    CLIENT = "client"
    TEAM = "team"
    UPSTREAM = "upstream"
    GATEWAY = "gateway"
    NOBODY = "nobody"
    """It asks for patience: a process that ends, a provider's rate limit, a wait that is over."""


class GatewayError(Exception):
    """An error with an answer. ``str(error)`` is the message the client reads: no secrets in it.

    ``reason`` is the label of the metric and of the log line, from a closed list; ``upstream_rid``
    is the provider's name for the request, where it gave one. ``headers`` are the error's own: the
    provider's advice, the limit that refused. What is known of the request is not among them, for
    a store may raise one error to many who wait.
    """

    status: int = 500
    type: str = "server_error"
    code: str = "internal_error"
    reason: str = "internal"
    should_retry: bool | None = None
    """None: leave it to the SDK's own rule for the status."""
    evidence: Evidence = Evidence.NOT_BILLED
    fault: Fault = Fault.GATEWAY

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        status: int | None = None,
        reason: str | None = None,
        should_retry: bool | None = None,
        retry_after_seconds: float | None = None,
        close: bool = False,
        fault: Fault | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_seconds = retry_after_seconds
        self.close = close
        self.upstream_rid = ""
        self.headers: tuple[tuple[str, str], ...] = ()
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status
        if reason is not None:
            self.reason = reason
        if should_retry is not None:
            self.should_retry = should_retry
        if fault is not None:
            self.fault = fault

    @property
    def content(self) -> bytes:
        """The answer's body in OpenAI's shape (contract 4.1)."""
        described = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": described}, separators=(",", ":")).encode()


class ClientFault(GatewayError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"
    reason = "invalid_request"
    should_retry = False
    fault = Fault.CLIENT


class InvalidRequest(ClientFault):
    """The request breaks a rule that this gateway keeps. ``code`` says which."""


class BodyTooLarge(ClientFault):
    status = 413
    code = "request_too_large"
    reason = "body_too_large"


class UnsupportedMedia(ClientFault):
    status = 415
    code = "unsupported_media_type"
    reason = "unsupported_media"


class UploadStalled(ClientFault):
    """The body stopped coming on its way here: a network's fault as often as the client's."""

    status = 408
    code = "upload_stalled"
    reason = "upload_stalled"
    should_retry = True


class NotServed(ClientFault):
    status = 404
    code = "unknown_url"
    reason = "not_served"


class ClientGone(ClientFault):
    """The client left. Nothing can be answered; ``stage`` is the label of the metric."""

    status = 499
    code = "client_gone"
    reason = "client_gone"

    def __init__(self, stage: str) -> None:
        super().__init__(f"The client left ({stage}).")
        self.stage = stage


class TeamFault(GatewayError):
    status = 403
    type = "invalid_request_error"
    should_retry: bool | None = False
    fault = Fault.TEAM


class InvalidKey(TeamFault):
    status = 401
    code = "invalid_api_key"
    reason = "auth_failed"


class ModelNotAllowed(TeamFault):
    status = 403
    code = "model_not_allowed"
    reason = "model_denied"


class ModelNotFound(TeamFault):
    status = 404
    code = "model_not_found"
    reason = "model_not_found"


class NotOwned(TeamFault):
    """Nothing of this team's lives under this id at an upstream: what is unknown and what is
    another team's look the same."""

    status = 404
    code = "not_found"
    reason = "not_owned"


class ModelRetired(TeamFault):
    """Everybody who served the model here has stopped: nothing is sent."""

    status = 404
    code = "model_retired"
    reason = "model_retired"


class ResultNotFound(TeamFault):
    """Nothing is known under this request id, or not to this team: both look the same."""

    status = 404
    code = "result_not_found"
    reason = "result_not_found"


class ResultExpired(TeamFault):
    status = 410
    code = "result_expired"
    reason = "result_expired"


class IdempotentResultExpired(TeamFault):
    """The call was made and booked, and its answer is gone. It is never bought again under its
    key (money.md 8.4)."""

    status = 410
    code = "idempotent_result_expired"
    reason = "idempotent_result_expired"


class RateLimited(TeamFault):
    """Too many requests or images a minute, or too many at once. Nothing was taken."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"
    reason = "rate_limited"
    should_retry = None


class QuotaExceeded(TeamFault):
    """A hard budget has no room for the most this call could cost. Nothing was taken."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"
    reason = "insufficient_quota"


class UpstreamFault(GatewayError):
    status = 502
    type = "server_error"
    code = "upstream_error"
    reason = "upstream"
    fault = Fault.UPSTREAM


class UpstreamRefused(UpstreamFault):
    """The provider said no before any work: its status, body and retry advice, unchanged."""

    reason = "upstream_4xx"

    def __init__(
        self,
        status: int,
        content: bytes,
        *,
        code: str,
        headers: tuple[tuple[str, str], ...] = (),
        reason: str | None = None,
    ) -> None:
        super().__init__(
            f"The upstream answered {status}.",
            status=status,
            code=code,
            reason=reason,
            fault=_whose(status),
        )
        self._content = content
        self.headers = headers

    @property
    def content(self) -> bytes:
        return self._content

    def mask(self, masked: Callable[[bytes], bytes]) -> None:
        """Takes out of the provider's words what is not for the client."""
        self._content = masked(self._content)
        self.code = masked(self.code.encode()).decode()
        self.headers = tuple(
            (name, masked(value.encode()).decode()) for name, value in self.headers
        )


def _whose(status: int) -> Fault:
    """Of what a provider refuses with this status."""
    if status == 429:
        return Fault.NOBODY
    return Fault.UPSTREAM if status >= 500 else Fault.CLIENT


class UpstreamUnavailable(UpstreamFault):
    status = 503
    code = "upstream_unavailable"
    reason = "upstream_unavailable"


class UpstreamAccount(UpstreamFault):
    """The gateway owner's key or account was refused: never shown as the team's fault."""

    status = 503
    code = "upstream_account_refused"
    reason = "upstream_account"
    should_retry = False


class UpstreamUnanswered(UpstreamFault):
    """Something that costs nothing was sent, and no whole answer came. It may have been done."""

    code = "upstream_no_answer"
    reason = "upstream_no_answer"


class UpstreamUnknown(UpstreamFault):
    """Bytes were written and no answer proves what became of them. A retry could pay twice."""

    code = "upstream_outcome_unknown"
    reason = "upstream_unknown"
    should_retry = False
    evidence = Evidence.UNKNOWN


class UpstreamBroken(UpstreamFault):
    """A success was announced and then not delivered. It has probably been billed."""

    code = "upstream_bad_response"
    reason = "upstream_bad_response"
    should_retry = False
    evidence = Evidence.BILLED


class GatewayFault(GatewayError):
    status = 503


class LedgerUnavailable(GatewayFault):
    code = "ledger_unavailable"
    reason = "ledger_unavailable"


class GateUnavailable(GatewayFault):
    """Limits cannot be looked at, and the owner wants nothing let in without (``deny``)."""

    code = "gate_unavailable"
    reason = "gate_unavailable"
    should_retry = True


class Overloaded(GatewayFault):
    code = "overloaded"
    reason = "overloaded"


class StillRunning(GatewayFault):
    """The client is not to wait any longer, and the flight goes on: nothing is lost."""

    status = 504
    code = "still_running"
    reason = "still_running"
    should_retry = False
    fault = Fault.NOBODY


class Internal(GatewayFault):
    status = 500
    code = "internal_error"
    reason = "internal"
