"""The page of every error that a client can read, and of the headers.

Statuses, types, codes, retries and reasons are those of ``domain/errors.py`` and of each place in
the code that makes one of its errors. What to do about them is said here, for each code; one that
nothing is said of is an error, and so is a header.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from gateway.domain import errors
from gateway.domain.errors import (
    ClientFault,
    Evidence,
    GatewayError,
    GatewayFault,
    TeamFault,
    UpstreamFault,
)
from gateway.upstream.wire import Reason
from tests.reference.markdown import table

T = TypeVar("T")

PACKAGE = Path(__file__).parents[2] / "gateway"

_GROUPS: Mapping[type[GatewayError], str] = MappingProxyType(
    {
        ClientFault: "The request is wrong. Its sender mends it; sending it again as it is helps "
        "nobody.",
        TeamFault: "The key, what it may do, or what it may spend. The owner of the team asks the "
        "gateway's operator.",
        UpstreamFault: "The provider, or the way to it. The operator looks at the upstream; the "
        "message says whether money may have been spent.",
        GatewayFault: "The gateway's own limits and stores. The operator looks at the gateway.",
    }
)

SAID: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("BodyTooLarge", "request_too_large"): "The body, or one of its pictures, is over "
        "`server.max_json_bytes`, `max_form_bytes` or `max_file_bytes`. Send less.",
        ("ClientGone", "client_gone"): "The client left; nobody is answered. Only the log and the "
        "metrics have it.",
        ("InvalidRequest", "bad_framing"): "What came is not HTTP/1.1. Look at what stands between "
        "client and gateway.",
        ("InvalidRequest", "bad_header"): "A header, or a name in a form, has characters that it "
        "may not have.",
        ("InvalidRequest", "duplicate_key"): "A name stands twice in the JSON.",
        ("InvalidRequest", "duplicate_parameter"): "A parameter stands twice in the form.",
        ("InvalidRequest", "file_elsewhere"): "The file lives at another upstream than the model. "
        "Send the picture itself, or ask for a model that is served there.",
        ("InvalidRequest", "file_storage_exceeded"): "Your team's files are as large together as "
        "`files.max_total_bytes` allows. Delete some.",
        ("InvalidRequest", "idempotency_key_reused"): "The `Idempotency-Key` belongs to a request "
        "with another body, or another form of answer. Take a new one for each request.",
        ("InvalidRequest", "image_url_not_allowed"): "A picture is given by its address. Send it "
        "itself, or ask for `image_urls: passthrough`.",
        (
            "InvalidRequest",
            "image_tool_required",
        ): "A response without the tool `image_generation`. "
        "Add it to `tools`, or ask for `responses: {without_image_tool: allow}`.",
        ("InvalidRequest", "input_not_priced"): "A response with a document (`input_file`). Send "
        "its text, or its pages as pictures.",
        ("InvalidRequest", "invalid_idempotency_key"): "1 to 255 printable ASCII characters.",
        ("InvalidRequest", "invalid_image"): "An input picture is damaged, or larger than "
        "`server.max_pixels` and `max_side` allow.",
        (
            "InvalidRequest",
            "invalid_json",
        ): "The body is not JSON; the message says from which byte on.",
        ("InvalidRequest", "invalid_multipart"): "The form cannot be read.",
        ("InvalidRequest", "invalid_prompt"): "The prompt holds a control character.",
        ("InvalidRequest", "invalid_size"): "The model has no such size; the message names the "
        "nearest. Only with `validate: strict`.",
        (
            "InvalidRequest",
            "invalid_type",
        ): "A parameter is a text where a number is wanted, or the like.",
        ("InvalidRequest", "invalid_unicode"): "A text is not UTF-8, or has half a character.",
        (
            "InvalidRequest",
            "invalid_value",
        ): "A parameter may not be this; the message says what it may be.",
        ("InvalidRequest", "json_too_deep"): "The JSON is nested too deep.",
        ("InvalidRequest", "json_too_large"): "The JSON has too many values, or its texts that are "
        "no pictures are too long.",
        ("InvalidRequest", "limit_exceeded"): "It asks for more pictures than the limit allows in "
        "any minute. Ask for fewer at once, or for a higher limit.",
        ("InvalidRequest", "max_cost_exceeded"): "It could cost more than `max_cost_per_request`. "
        "Name a smaller size or quality.",
        ("InvalidRequest", "missing_required_parameter"): "`param` says which.",
        ("InvalidRequest", "mixed_upstreams"): "One request names files of two upstreams.",
        ("InvalidRequest", "model_not_priced"): "The operator adds a price, or says `unpriced: "
        "allow`.",
        ("InvalidRequest", "prompt_too_long"): "Shorten it.",
        (
            "InvalidRequest",
            "urls_not_available",
        ): "`response_format: url` where `server.public_url` is not set. Read `b64_json`.",
        ("InvalidRequest", "tool_model_elsewhere"): "The model of the image tool is not served by "
        "the upstream of the text model. Name one that is.",
        ("InvalidRequest", "tool_not_priced"): "A response with a tool that the provider runs and "
        "that is not `image_generation`. Take it out of `tools`.",
        ("InvalidRequest", "tool_not_rewritten"): "The model of the image tool has another name at "
        "its upstream, and the tools hold a picture. Send the name in the message, or the mask as "
        "a file's id.",
        (
            "InvalidRequest",
            "unsupported_parameter",
        ): "`conversation`, `prompt` and `service_tier` of "
        "a response: what they cost is not known here. The message says what to send.",
        ("InvalidRequest", "unknown_parameter"): "No such parameter, with `unknown_parameters: "
        "refuse` or `validate: strict`; or a name in brackets that is none.",
        ("InvalidRequest", "unsupported_file_mimetype"): "The file is no picture that is taken.",
        (
            "InvalidRequest",
            "user_required",
        ): "The team has `per_user.required`, and the request does "
        "not say whose it is. Send `safety_identifier`.",
        ("NotServed", "cors_refused"): "A browser asked whether a page of another origin may send "
        "this; `server.cors` says it may not.",
        ("NotServed", "endpoint_retired"): "OpenAI has retired `/v1/images/variations`. "
        "`/v1/images/edits` takes a picture and a prompt.",
        ("NotServed", "method_not_allowed"): "The path is right, the method is not.",
        ("NotServed", "picture_not_found"): "The url of a picture is not complete, or its time is "
        "over (`hosted.ttl`). Ask for the picture again.",
        ("NotServed", "range_not_satisfiable"): "The `Range` begins behind the picture's end.",
        ("NotServed", "unknown_url"): "No such path. Base urls end in `/v1`.",
        (
            "UploadStalled",
            "upload_stalled",
        ): "For a minute nothing came of a body that is only "
        "passed on. Nothing was sent; the connection ends. Send it again.",
        ("UnsupportedMedia", "unsupported_media_type"): "Send `application/json`, or a form where "
        "the route takes one, without a `Content-Encoding`.",
        ("IdempotentResultExpired", "idempotent_result_expired"): "The call of this key was "
        "answered and paid for, and its answer is kept no longer. Take a new key to buy another.",
        ("InvalidKey", "invalid_api_key"): "No key, an unknown one (a provider's own, perhaps), or "
        "one that is revoked, disabled or over. The message says which.",
        ("ModelNotAllowed", "model_not_allowed"): "Ask for another model, or for the right to this "
        "one.",
        ("ModelNotFound", "model_not_found"): "The message has the nearest name; `GET /v1/models` "
        "has yours.",
        ("ModelRetired", "model_retired"): "Its provider serves the model no more, on the day that "
        "the price list says (`shuts_down`). The message names what takes its place, where your "
        "team may use that.",
        ("NotOwned", "not_found"): "Your team has no file, response or picture of this id. That of "
        "another team looks the same.",
        ("QuotaExceeded", "insufficient_quota"): "A budget has no room for the most this could "
        "cost; nothing was taken. The message says whose, how much is left, when it is renewed, "
        "and what would be cheaper.",
        ("RateLimited", "rate_limit_exceeded"): "Requests or pictures a minute, or requests at "
        "once. Wait as long as it says.",
        ("ResultExpired", "result_expired"): "It was there, and is kept no longer (`results.ttl`).",
        ("ResultNotFound", "result_not_found"): "Your team has no such result.",
        ("UpstreamAccount", "upstream_account_exhausted"): "The operator's account there has no "
        "money: the message names the setting. Your budget is fine. A key that rests is tried "
        "again when `retry-after` says.",
        ("UpstreamAccount", "upstream_account_refused"): "The operator's key is refused there: "
        "the message names the setting. Your key is fine. A key that rests is tried again when "
        "`retry-after` says, or at once when another is put in its place.",
        ("UpstreamAccount", "upstream_off"): "The upstream has no key yet: the operator sets one.",
        ("UpstreamBroken", "overloaded"): "The picture was made, and there was no room to hold it: "
        "it is booked. The operator looks at `server.spool_bytes` and the disk.",
        ("UpstreamBroken", "upstream_bad_response"): "A success was announced, and no picture "
        "came. It was probably billed, and is booked.",
        ("UpstreamFault", "upstream_forbidden"): "Something in front of the upstream, a firewall "
        "perhaps, refused it.",
        ("UpstreamFault", "upstream_not_there"): "The upstream serves nothing at that address: its "
        "`base_url` is wrong. It usually ends in `/v1`.",
        ("UpstreamFault", "upstream_redirect"): "The upstream answers with a redirect: its "
        "`base_url` is wrong.",
        ("UpstreamUnanswered", "upstream_no_answer"): "A request that costs nothing (a file, a "
        "look-up, a check) was sent and not answered to the end. See what became of it.",
        ("UpstreamUnavailable", "upstream_tls"): "The upstream's certificate is not trusted. The "
        "operator looks at `verify` and the upstream.",
        ("UpstreamUnavailable", "upstream_unavailable"): "It cannot be reached, or rests after "
        "failures. Try again as it says.",
        (
            "UpstreamUnknown",
            "upstream_outcome_unknown",
        ): "It was sent, and nobody knows what became "
        "of it; its bound is booked. Ask for the result by the request id; sending it anew may buy "
        "it twice.",
        ("GateUnavailable", "gate_unavailable"): "Redis is away, and `storage.without_redis: deny` "
        "lets nothing in.",
        ("Internal", "internal_error"): "A mistake of the gateway's. The log has it under the "
        "request id.",
        ("LedgerUnavailable", "ledger_unavailable"): "The database is away: nothing is bought that "
        "cannot be booked.",
        (
            "Overloaded",
            "hosted_unavailable",
        ): "Where hosted pictures are kept is away; the picture is not lost.",
        (
            "Overloaded",
            "picture_not_hosted",
        ): "The picture is made and could not be put behind a "
        "url (a full disk, a Redis that is away). The message says how it is had without one.",
        ("Overloaded", "overloaded"): "No place for another request, connection or picture came "
        "free in time.",
        ("Overloaded", "results_unavailable"): "Where results are kept is away; the result is not "
        "lost.",
        ("Overloaded", "shutting_down"): "This process ends. Another one takes the request, or the "
        "next one; `x-should-retry: false` where its body was read and something may have been "
        "bought.",
        ("StillRunning", "still_running"): "`relay.max_wait_seconds` is over and the picture is "
        "being made: fetch it by the request id.",
    }
)
"""Class and code -> what it means and what to do."""

_DYNAMIC: Mapping[tuple[str, str], tuple[str, ...]] = MappingProxyType(
    {
        ("relay/read.py", "bad.code"): (
            "invalid_json", "duplicate_key", "json_too_deep", "json_too_large", "invalid_unicode",
        ),
        ("relay/files.py", "code"): (
            "duplicate_parameter", "invalid_type", "invalid_value", "missing_required_parameter",
            "unknown_parameter",
        ),
        ("relay/strict.py", "code"): (
            "invalid_image", "invalid_size", "invalid_type", "invalid_value", "unknown_parameter",
            "unsupported_file_mimetype",
        ),
    }
)  # fmt: skip
"""File and expression -> the codes that it can be."""

ANSWER_HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "x-request-id": "the name of the request: in the log, in the ledger, for its result",
        "x-upstream-request-id": "the provider's name for it, where it gave one",
        "x-cost-usd": "what was booked, exactly",
        "x-cost-basis": "by what: `usage`, `estimated`, `none`",
        "x-cost-bound-usd": "on a stream with partial pictures, in place of both: the most it can "
        "cost",
        "x-budget-remaining-usd": "what is left of the tightest hard budget",
        "x-budget-reset": "when that one begins anew, UTC",
        "x-ratelimit-limit-requests": "the tightest rate of requests",
        "x-ratelimit-remaining-requests": "what is left of it",
        "x-ratelimit-reset-requests": "in how long all of it is there again",
        "x-ratelimit-limit-images": "the tightest rate of pictures",
        "x-ratelimit-remaining-images": "what is left of it",
        "x-ratelimit-reset-images": "in how long all of it is there again",
        "x-cache": "`hit`, `miss`, `join` or `off`",
        "age": "of a kept answer, in seconds",
        "x-model-served": "what an alias stands for",
        "x-gateway-upstream": "where it was bought",
        "x-gateway-attempts": "how often upstreams were asked",
        "x-gateway-changed": "what was put in, or in place of what was asked: `size=...`, "
        "`model=...`, `tools[0].model=...` of a response's image tool; a name alone was left out: "
        "`style`",
        "sunset": "the day on which the model that was asked for ends, or the one of the image "
        "tool: the first of both, where that is within 30 days (RFC 8594)",
        "x-gateway-warning": "what the client should know of this answer: that the model ends, and "
        "what takes its place; that a picture could not be put behind a url",
        "x-should-retry": "`true` or `false`; both SDKs obey. Left out: the SDK's own rule for the "
        "status",
        "retry-after": "seconds; `retry-after-ms` beside it",
        "idempotent-replayed": "`true`: the answer that an earlier request with this "
        "`Idempotency-Key` got",
        "preference-applied": "`respond-async`: of a 202",
        "x-accel-buffering": "`no`, on streams: for nginx",
        "x-content-type-options": "`nosniff`, of pictures that are fetched by their urls, "
        "and of files",
    }
)
REQUEST_HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "authorization": "`Bearer` and the key of the team",
        "api-key": "the same without `Bearer`, as Azure's clients send it",
        "cache-control": "`no-cache`: another picture, and no joining of an abandoned call",
        "idempotency-key": "one purchase and one charge, for a day",
        "prefer": "`respond-async`: a 202 at once; of a result, `wait=30`",
        "x-gateway-async": "`true`: as `Prefer: respond-async`",
        "x-openwebui-user-id": "who the end user is, where the body does not say (`users.sources`)",
        "x-openwebui-user-email": "as `x-openwebui-user-id`",
        "x-stainless-retry-count": "SDKs say by it that they try again",
    }
)
_NO_HEADERS = frozenset({"x-gzip"})


@dataclass(slots=True)
class Case:
    """One code of one class, as it is made all over the code."""

    kind: type[GatewayError]
    code: str
    statuses: set[int] = field(default_factory=set)
    reasons: set[str] = field(default_factory=set)
    retries: set[bool | None] = field(default_factory=set)
    waits: set[bool] = field(default_factory=set)


def cases() -> list[Case]:
    """Every error that is made anywhere, by the order of the tree and by code."""
    found: dict[tuple[str, str], Case] = {}
    for file, node in _nodes():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            kind = getattr(errors, node.func.id, None)
            if isinstance(kind, type) and issubclass(kind, GatewayError):
                for code in _codes(file, node, kind):
                    case = found.setdefault((kind.__name__, code), Case(kind, code))
                    _add(case, node)
    tree = list(vars(errors).values())
    return sorted(found.values(), key=lambda case: (tree.index(case.kind), case.code))


def headers() -> frozenset[str]:
    """The names of our own headers, wherever the code writes one."""
    found: set[str] = set()
    for _, node in _nodes():
        value = node.value if isinstance(node, ast.Constant) else None
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        if isinstance(text, str) and re.fullmatch(r"x-[a-z][a-z-]*", text):
            units = ("requests", "images") if text.endswith("-") else ("",)
            found |= {text + unit for unit in units}
    return frozenset(found - _NO_HEADERS)


def page() -> str:
    parts = [_HEAD]
    every = cases()
    for group, words in _GROUPS.items():
        rows = [_row(case) for case in every if issubclass(case.kind, group)]
        parts.append(f"\n## {_titled(group)}\n\n{words}\n\n")
        parts.append(table(_COLUMNS, rows))
        if group is UpstreamFault:
            parts.append(f"\n{_PASSED_ON}")
    parts.append(f"\n## Reasons\n\n{_REASONS}")
    parts.append("\n## Headers of answers\n\n")
    parts.append(
        table(("header", ""), ((f"`{name}`", said) for name, said in ANSWER_HEADERS.items()))
    )
    parts.append("\n## Headers of requests\n\n")
    parts.append(
        table(("header", ""), ((f"`{name}`", said) for name, said in REQUEST_HEADERS.items()))
    )
    return "".join(parts)


_COLUMNS = ("`code`", "status, `type`", "`x-should-retry`", "billed", "reason", "what to do")

_HEAD = """\
# Errors

<!-- Written by `make docs` from gateway/domain/errors.py and every place that makes an error. -->

Each error has OpenAI's shape, so that SDKs raise their own exceptions for it:

```json
{"error": {"message": "...", "type": "insufficient_quota", "param": null,
           "code": "insufficient_quota"}}
```

- `code` is stable: write programs by it. `message` says who, what, how much and what next; its
  words may change. `param` names the parameter, where there is one.
- **`x-should-retry`**: with `false` an SDK does not try again, with `true` it does. *By status*
  leaves it to the SDK: 408, 409, 429 and 5xx are tried again. Where `retry-after` would be over 60
  s it is `false`: Node's SDK takes a longer one for none.
- **billed**: *no*: nothing was bought, and nothing is booked. *Perhaps*: nobody knows; the most it
  could cost is booked, and `gateway ledger unresolved` lists the call. *Probably*: a success was
  announced; what its usage says is booked, or the most it could cost.
- **reason** is the label of `gateway_requests_rejected_total`, and in the log.
- An error in the middle of a stream is an `event: error` with the same object; its status was sent
  long before.
"""

_PASSED_ON = """\
What an upstream refuses for what is asked (a 4xx, moderation too), and its own 500 or 503, is
passed on with its status, its body and its advice to retry, unchanged; but that the name of the
operator's account is masked. So its `code` may be any of the provider's: `moderation_blocked`,
`invalid_size`, ... Nothing of it was billed, unless `bill_on_5xx: always` says otherwise. Such
answers are labelled `upstream_4xx`, `upstream_429`, `upstream_5xx`, `upstream_200_error` or
`moderation`.
"""

_REASONS = f"""\
A reason that is *how it failed* is one of {", ".join(f"`{one.value}`" for one in Reason)}.
"""


def _titled(group: type[GatewayError]) -> str:
    return {
        ClientFault: "The request",
        TeamFault: "The team",
        UpstreamFault: "The upstream",
        GatewayFault: "The gateway",
    }[group]


def _row(case: Case) -> tuple[str, ...]:
    kind = case.kind
    said = SAID.get((kind.__name__, case.code))
    assert said, f"say what to do about {kind.__name__} {case.code} in {Path(__file__).name}"
    statuses = ", ".join(str(status) for status in sorted(case.statuses))
    retries = {None: "by status", True: "`true`", False: "`false`"}
    retry = " or ".join(retries[one] for one in (True, False, None) if one in case.retries)
    wait = "; `retry-after`" if True in case.waits else ""
    billed = {
        Evidence.NOT_BILLED: "no",
        Evidence.UNKNOWN: "perhaps",
        Evidence.BILLED: "probably",
    }[kind.evidence]
    reasons = ", ".join(sorted(case.reasons))
    return f"`{case.code}`", f"{statuses} `{kind.type}`", retry + wait, billed, reasons, said


@cache
def _nodes() -> tuple[tuple[str, ast.Call | ast.Constant], ...]:
    """File -> each call and each constant of it, in all that answers clients."""
    found: list[tuple[str, ast.Call | ast.Constant]] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE)
        if file.parts[0] not in ("sandbox", "cli"):
            found += [
                (str(file), node)
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call | ast.Constant)
            ]
    return tuple(found)


def _codes(file: str, call: ast.Call, kind: type[GatewayError]) -> tuple[str, ...]:
    given = _given(call, "code")
    if kind is errors.UpstreamRefused:
        return ()
    if given is None:
        return (kind.code,)
    if isinstance(given, ast.Constant):
        return (str(given.value),)
    expression = ast.unparse(given)
    assert (file, expression) in _DYNAMIC, f"{file}: say what code={expression} can be"
    return _DYNAMIC[file, expression]


def _add(case: Case, call: ast.Call) -> None:
    status, reason = _given(call, "status"), _given(call, "reason")
    retry, wait = _given(call, "should_retry"), _given(call, "retry_after_seconds")
    if case.code == "method_not_allowed":
        case.statuses.add(405)
    else:
        case.statuses |= _constants(status, int) or {case.kind.status}
    if reason is None:
        case.reasons.add(f"`{case.kind.reason}`")
    elif names := _constants(reason, str):
        case.reasons |= {f"`{name}`" for name in names}
    else:
        named = ast.unparse(reason) == "bad.code"
        case.reasons.add(f"`{case.code}`" if named else "*how it failed*")
    asked = _constants(retry, bool)
    case.retries.add(next(iter(asked)) if asked else case.kind.should_retry)
    case.waits.add(wait is not None)


def _given(call: ast.Call, name: str) -> ast.expr | None:
    return next((each.value for each in call.keywords if each.arg == name), None)


def _constants(node: ast.expr | None, kind: type[T]) -> set[T]:
    """Every constant of this kind that an expression can become."""
    nodes = ast.walk(node) if node is not None else ()
    return {
        each.value for each in nodes if isinstance(each, ast.Constant) and type(each.value) is kind
    }
