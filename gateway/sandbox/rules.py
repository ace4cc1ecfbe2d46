"""Scripted faults: what to do differently, for which requests, how often.

::

    rules.add(Rule(times=1, status=429, headers={"retry-after": "1"}))
    rules.add(Rule(prompt="cat", cut_after_bytes=1000))

The first rule that matches is the only one applied. A rule with ``status`` or ``redirect`` answers
before OpenAI's own checks, as an edge would; all others change the answer to a good request.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import NamedTuple, TypeAlias

from gateway.domain.call import Json
from gateway.sandbox.watch import Gate


class Unset(Enum):
    """``usage=None`` sends a null, which is not the same as leaving the usage alone."""

    UNSET = "unset"


class Drip(NamedTuple):
    """A body in pieces of ``size_bytes``, ``seconds`` apart."""

    size_bytes: int
    seconds: float


Body: TypeAlias = "bytes | Json"
"""Bytes are sent as they are, all else as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One fault. A field that is not set changes nothing; ``Rule()`` is no fault at all."""

    path: str | None = None
    """Matches the end of the path: ``/images/edits``, ``/responses/*`` (one segment a star)."""
    method: str | None = None
    model: str | None = None
    prompt: str | None = None
    """Matches a part of the prompt."""
    key: str | None = None
    """Matches the key, whole: what a revoked one meets."""
    times: int | None = None
    """How many requests it meets; None is every one."""

    status: int | None = None
    """Answers this status and nothing is billed. Without a ``body``: OpenAI's JSON error, or an
    edge's HTML page with ``cf-ray`` for 502, 504 and 520-524."""
    body: Body | Unset = Unset.UNSET
    content_type: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """Added to the answer's, or instead of those of the same name."""
    redirect: str | None = None
    """Answers 307 with this ``location``, or ``status`` if that is set."""
    billed: bool | None = None
    """Overrides whether the sandbox's own bill counts the request. None: not with ``status`` or
    ``redirect``, else yes (an answer that is cut or spoilt was still worked for)."""

    wait_for: Gate | None = None
    """Holds the request, before anything is billed or sent, until the gate is open."""
    wait_after: int | None = None
    """Holds a stream behind so many partial images (at most those asked for), and nothing else."""
    delay_seconds: float = 0
    """Before the headers."""
    cut_before_headers: bool = False
    cut_after_bytes: int | None = None
    """Closes the connection after so many bytes of the body."""
    drip: Drip | None = None
    gzip: bool = False
    """``content-encoding: gzip`` (JSON answers only)."""

    no_usage: bool = False
    usage: Json | Unset = Unset.UNSET
    """Sent and billed in place of the true usage."""
    tool_usage: Json | Unset = Unset.UNSET
    """As ``usage``, of a response's pictures: its ``tool_usage.image_gen``."""
    no_tool_usage: bool = False
    """Leaves ``tool_usage`` out of a response, as OpenAI says it may."""
    response_status: str | None = None
    """How a response ends instead of ``completed``: failed (without pictures, unless
    ``data_count`` says that some were made before) or incomplete."""
    response_error: str = "server_error"
    """The code of a failed response's error."""
    error_in_200: bool = False
    empty_data: bool = False
    empty_body: bool = False
    html_200: bool = False
    url_instead: bool = False
    """``data[].url`` in place of ``b64_json`` (JSON answers only)."""
    payload_bytes: int | None = None
    """Draws nothing: each ``b64_json`` is so many characters (rounded up to a multiple of 4)."""
    data_count: int | None = None
    """Delivers, and bills, so many pictures in place of ``n``; of a response, so many calls of
    its tool (at most ``max_tool_calls``) in place of one."""
    extra_fields: Mapping[str, Json] = field(default_factory=dict)
    """Merged into the JSON answer, or into each event, before ``usage``."""

    json_for_stream: bool = False
    done_marker: bool = False
    """``data: [DONE]`` at the end of a stream."""
    sse_error_after: int | None = None
    """So many partial images (at most those asked for), then an error event."""
    sse_cut_after: int | None = None
    """So many partial images (at most those asked for), then the connection is closed."""
    sse_no_completed: bool = False
    sse_garbage: bool = False
    """An event that is no JSON in place of the completed one."""

    drift_percent: float = 0
    """``/organization/costs`` says so much more than was billed, in percent; less, if negative."""

    @property
    def refuses(self) -> bool:
        """Whether it answers in place of the API."""
        return self.status is not None or self.redirect is not None

    @property
    def counts(self) -> bool:
        """Whether the request is on the sandbox's own bill."""
        return (not self.refuses) if self.billed is None else self.billed

    def matches(self, path: str, model: str, prompt: str, key: str = "", method: str = "") -> bool:
        return (
            (self.path is None or _ends(path, self.path))
            and (self.method is None or self.method == method)
            and (self.model is None or self.model == model)
            and (self.prompt is None or self.prompt in prompt)
            and (self.key is None or self.key == key)
        )


class Rules:
    """The rules of one sandbox, in the order they were added. Any thread may change them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._left: list[int | None] = []

    def add(self, rule: Rule) -> Rule:
        with self._lock:
            self._rules.append(rule)
            self._left.append(rule.times)
        return rule

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()
            self._left.clear()

    def __len__(self) -> int:
        """Those that can still meet a request."""
        with self._lock:
            return sum(left != 0 for left in self._left)

    def take(self, path: str, model: str, prompt: str, key: str = "", method: str = "") -> Rule:
        """The first rule that matches, one of its times used up; else the rule of no fault."""
        with self._lock:
            for place, rule in enumerate(self._rules):
                left = self._left[place]
                if left == 0 or not rule.matches(path, model, prompt, key, method):
                    continue
                if left is not None:
                    self._left[place] = left - 1
                return rule
        return Rule()


_INTEGERS = frozenset(
    {
        "times",
        "status",
        "cut_after_bytes",
        "payload_bytes",
        "data_count",
        "sse_error_after",
        "sse_cut_after",
    }
)
_TEXTS = frozenset(
    {
        "path",
        "method",
        "model",
        "prompt",
        "key",
        "content_type",
        "redirect",
        "response_status",
        "response_error",
    }
)
_MAPPINGS = frozenset({"headers", "extra_fields"})
_ANYTHING = frozenset({"body", "usage", "tool_usage"})


def rule_from_json(value: Json) -> Rule:
    """A rule as the control endpoint takes it: an object of the fields of ``Rule``, ``drip`` as
    ``[bytes, seconds]``. Raises ``ValueError`` that names the field. Gates are not for JSON."""
    if not isinstance(value, dict):
        raise ValueError("a rule is a JSON object")
    known = {one.name for one in fields(Rule)} - {"wait_for", "wait_after"}
    kept: dict[str, object] = {}
    for name, given in value.items():
        if name not in known:
            raise ValueError(f"{name!r} is not a field of a rule; they are {sorted(known)}")
        if name == "drip" and isinstance(given, list) and len(given) == 2:
            size, seconds = given
            if isinstance(size, int) and size > 0 and isinstance(seconds, (int, float)):
                kept[name] = Drip(size, seconds)
                continue
        if not _fits(name, given):
            raise ValueError(f"{given!r} is no value for {name!r}")
        kept[name] = given
    return Rule(**kept)  # type: ignore[arg-type]  # each was checked above, by name


def _ends(path: str, wanted: str) -> bool:
    if "*" not in wanted:
        return path.endswith(wanted)
    pattern = re.escape(wanted).replace(r"\*", "[^/]+")
    return re.search(f"{pattern}$", path) is not None


def _fits(name: str, given: Json) -> bool:
    if name in _ANYTHING:
        return True
    if name in _INTEGERS:
        return isinstance(given, int) and not isinstance(given, bool) and given >= 0
    if name in _TEXTS:
        return isinstance(given, str)
    if name == "headers":
        return isinstance(given, dict) and all(isinstance(text, str) for text in given.values())
    if name in _MAPPINGS:
        return isinstance(given, dict)
    if name in ("delay_seconds", "drift_percent"):
        if isinstance(given, bool) or not isinstance(given, (int, float)):
            return False
        return name == "drift_percent" or given >= 0
    return isinstance(given, bool) and name != "drip"
