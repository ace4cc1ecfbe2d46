"""What a response looks like: as JSON, and told in events (contract 3.4).

Not published and chosen here: the model writes one sentence, a picture shown to it counts as
``TOKENS_PER_SIGHT`` tokens of text, and a context of 1,024 tokens or more comes from its cache.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gateway.domain.call import Json
from gateway.sandbox.answer import Purchase
from gateway.sandbox.conversation import TOOL, Ask
from gateway.sandbox.rules import Rule, Unset
from gateway.sandbox.usage import REASONING, Tokens, svg_usage, text_tokens, tokens
from gateway.sandbox.validate import Order, blocked

TOKENS_PER_SIGHT = 765
MIN_CACHED_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished answer. ``body`` is the response, ``partials`` the partial images of each call in
    base64; ``usage`` and ``tool_usage`` are what is billed; ``images`` were made."""

    body: dict[str, Json]
    partials: tuple[tuple[str, ...], ...]
    usage: Json
    tool_usage: Json
    images: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class _Spoken:
    """What the model wrote: ``calls`` of its tool, then ``text`` (empty where it got no further).
    ``tokens`` include those of its reasoning."""

    calls: int
    text: str
    tokens: int
    reasoning: int
    cut: bool


def blank(ask: Ask, created: int, status: str) -> dict[str, Json]:
    """A response that has only begun."""
    said = ask.fields
    return {
        "id": f"resp_{secrets.token_hex(24)}",
        "object": "response",
        "created_at": created,
        "status": status,
        "background": ask.flag("background", False),
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": said.get("instructions"),
        "max_output_tokens": said.get("max_output_tokens"),
        "max_tool_calls": said.get("max_tool_calls"),
        "model": ask.model.id,
        "output": [],
        "parallel_tool_calls": ask.flag("parallel_tool_calls", True),
        "previous_response_id": said.get("previous_response_id"),
        "prompt_cache_key": said.get("prompt_cache_key"),
        "reasoning": {"effort": ask.effort, "summary": None},
        "safety_identifier": said.get("safety_identifier"),
        "service_tier": "default",
        "store": ask.flag("store", True),
        "temperature": said.get("temperature", 1.0),
        "text": said.get("text", {"format": {"type": "text"}, "verbosity": "medium"}),
        "tool_choice": said.get("tool_choice", "auto"),
        "tools": ask.tools,
        "top_logprobs": said.get("top_logprobs", 0),
        "top_p": said.get("top_p", 1.0),
        "truncation": said.get("truncation", "disabled"),
        "usage": None,
        "user": said.get("user"),
        "metadata": said.get("metadata", {}),
    }


def finish(
    ask: Ask, begun: Mapping[str, Json], rule: Rule, number: int, now: int, request_id: str
) -> Reply:
    """The answer. Takes the calling thread for as long as drawing its pictures lasts."""
    spoken = _spoken(ask, rule)
    refused = blocked(ask.prompt, request_id) if ask.order is not None else None
    output: list[Json] = []
    partials: list[tuple[str, ...]] = []
    used = Tokens(0, 0, 0)
    if ask.order is not None:
        order = replace(ask.order, n=spoken.calls, partial_images=ask.partial_images)
        purchase = Purchase(order, rule, number, now)
        one = tokens(order, 1, ask.partial_images)
        for call in range(spoken.calls):
            if refused is not None:
                output.append(_call(order, ask.action, None, refused.error))
                partials.append(())
                continue
            file = purchase.file(call).decode()
            output.append(_call(order, ask.action, file, None))
            partials.append(
                tuple(purchase.partial(call, part).decode() for part in range(ask.partial_images))
            )
            used = Tokens(
                used.text_in + one.text_in,
                used.image_in + one.image_in,
                used.image_out + one.image_out,
            )
    images = 0 if refused is not None else spoken.calls
    if spoken.text:
        output.append(_message(spoken.text))
    usage = _usage(ask, spoken) if isinstance(rule.usage, Unset) else rule.usage
    drawn: Json = used.as_json(True) if isinstance(rule.tool_usage, Unset) else rule.tool_usage
    body = {**begun, "output": [] if rule.empty_data else output, "completed_at": now}
    body |= _ending(spoken, rule)
    if not rule.no_tool_usage:
        body["tool_usage"] = {"image_gen": drawn, "web_search": {"num_requests": 0}}
    body |= rule.extra_fields
    body["usage"] = None if rule.no_usage else usage
    context = ask.context_tokens + _fresh(ask) + spoken.tokens
    return Reply(body, tuple(partials), usage, drawn, images, context)


def _spoken(ask: Ask, rule: Rule) -> _Spoken:
    """A failed response has said nothing, and called its tool only where a rule says so."""
    failed = rule.response_status == "failed"
    calls = 0 if ask.order is None or failed else 1
    if ask.order is not None and rule.data_count is not None:
        calls = rule.data_count
    if ask.max_tool_calls is not None:
        calls = min(calls, ask.max_tool_calls)
    reasoning = REASONING[ask.effort] if ask.effort is not None else 0
    said = f"Here it is: {ask.prompt[:80]}" if calls else f"You said: {ask.prompt[:80]}"
    called = reasoning + calls * text_tokens(ask.prompt)
    whole = called + text_tokens(said)
    limit = ask.max_output_tokens
    if failed:
        return _Spoken(calls, "", called, reasoning, cut=False)
    if limit is None or whole <= limit:
        return _Spoken(calls, said, whole, reasoning, cut=False)
    if called <= limit:
        return _Spoken(calls, "", limit, reasoning, cut=True)
    return _Spoken(0, "", limit, min(limit, reasoning), cut=True)


def _ending(spoken: _Spoken, rule: Rule) -> dict[str, Json]:
    status = rule.response_status or ("incomplete" if spoken.cut else "completed")
    ending: dict[str, Json] = {"status": status}
    if status == "failed":
        message = "The sandbox was told to fail."
        ending["error"] = {"code": rule.response_error, "message": message}
    if status == "incomplete":
        ending["incomplete_details"] = {"reason": "max_output_tokens"}
    return ending


def _fresh(ask: Ask) -> int:
    """Tokens of this turn's input."""
    return text_tokens(ask.text) + TOKENS_PER_SIGHT * ask.seen_pictures


def _usage(ask: Ask, spoken: _Spoken) -> dict[str, Json]:
    given = ask.context_tokens + _fresh(ask)
    cached = ask.context_tokens if ask.context_tokens >= MIN_CACHED_TOKENS else 0
    return {
        "input_tokens": given,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": spoken.tokens,
        "output_tokens_details": {"reasoning_tokens": spoken.reasoning},
        "total_tokens": given + spoken.tokens,
    }


def _call(order: Order, action: str, file: str | None, error: Json) -> dict[str, Json]:
    """An item of the output: one picture, or why there is none."""
    item: dict[str, Json] = {
        "id": f"ig_{secrets.token_hex(24)}",
        "type": f"{TOOL}_call",
        "status": "completed" if error is None else "failed",
        "action": action,
        "background": order.background,
        "output_format": order.output_format,
        "quality": order.quality,
        "result": file,
        "revised_prompt": order.prompt,
        "size": order.size,
    }
    if error is not None:
        item["error"] = error
    elif order.output_format == "svg" and file is not None:
        item["svg_usage"] = svg_usage(order, file)
    return item


def _message(text: str) -> dict[str, Json]:
    part: dict[str, Json] = {
        "type": "output_text",
        "annotations": [],
        "logprobs": [],
        "text": text,
    }
    return {
        "id": f"msg_{secrets.token_hex(24)}",
        "type": "message",
        "status": "completed",
        "content": [part],
        "role": "assistant",
    }
