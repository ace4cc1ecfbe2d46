"""Reading the ``usage`` of an answer (contract 1.3): what OpenAI sends, what others leave out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gateway.domain.call import Operation, SvgUsage, Usage

MAX_TOKENS = 1_000_000_000


class InvalidUsage(ValueError):
    """A usage that cannot be true. Nothing of it is billed: the caller books what it can count,
    and raises an alarm. The message names the member, never its value's text."""


def read_usage(raw: object, svg_usage: object | None, operation: Operation) -> Usage | None:
    """The tokens of an answer, from its parsed ``usage`` and ``svg_usage`` members.

    None where there is no usage: ``raw`` is None, or has neither ``input_tokens`` nor
    ``output_tokens`` (SGLang counts ``prompt_tokens``, which are not what we pay).

    What is missing is read so that nothing is billed too low. Output without details is image
    tokens. Input without details is text for a generation, images for an edit. With one of the
    two details, the other is the rest. Cached tokens without details are text first: in every
    published list the discount on a text token is smaller than on an image token.

    Raises ``InvalidUsage`` for what is not a count of at most 10^9, details that do not add up,
    more cached than sent, and an answer without any output.
    """
    if raw is None:
        return None
    usage = _members(raw, "usage")
    totals = _totals(usage)
    if totals is None:
        return None
    tokens_in, tokens_out = totals
    details_in = _members(usage.get("input_tokens_details"), "input_tokens_details")
    details_out = _members(usage.get("output_tokens_details"), "output_tokens_details")
    plain_input_is_text = operation is Operation.GENERATION
    text_in, image_in = _split(details_in, tokens_in, plain_input_is_text, "input_tokens_details")
    text_out, image_out = _split(details_out, tokens_out, False, "output_tokens_details")
    cached_text_in, cached_image_in = _cached(usage, details_in, text_in)
    if cached_text_in > text_in or cached_image_in > image_in:
        raise InvalidUsage("more cached tokens than input tokens")
    svg = _svg(svg_usage)
    if tokens_out == 0 and svg is None:
        # A delivered picture has output: a relay that fills in zeros must not make it free.
        raise InvalidUsage("output_tokens is 0")
    return Usage(text_in, image_in, cached_text_in, cached_image_in, text_out, image_out, svg)


def read_text_usage(raw: object) -> Usage | None:
    """The tokens of a response's text model, from its parsed ``usage`` (contract 3.4): pictures
    that it reads are input like any other. None where there is none. Raises ``InvalidUsage``."""
    if raw is None:
        return None
    usage = _members(raw, "usage")
    totals = _totals(usage)
    if totals is None:
        return None
    tokens_in, tokens_out = totals
    details = _members(usage.get("input_tokens_details"), "input_tokens_details")
    cached = _count(details, "cached_tokens") or 0
    if cached > tokens_in:
        raise InvalidUsage("more cached tokens than input tokens")
    return Usage(text_in=tokens_in, cached_text_in=cached, text_out=tokens_out)


def read_tool_usage(raw: object, documents: Sequence[object], images: int) -> Usage | None:
    """The tokens of a response's pictures, from its parsed ``tool_usage`` and the ``svg_usage`` of
    each of its pictures. None where none were drawn, and where it does not say (it may leave it
    out). Raises ``InvalidUsage``, also for authors of SVG that are more than one model."""
    found = _members(_members(raw, "tool_usage").get("image_gen"), "tool_usage.image_gen")
    if images == 0 and not (_count(found, "input_tokens") or _count(found, "output_tokens")):
        return None
    authors = [one for one in (_svg(document) for document in documents) if one is not None]
    usage = read_usage(found or None, None, Operation.RESPONSE)
    if usage is None or not authors:
        return usage
    if len({one.model for one in authors}) > 1:
        raise InvalidUsage("svg_usage names more than one model")
    tokens_in = sum(one.input_tokens for one in authors)
    tokens_out = sum(one.output_tokens for one in authors)
    return replace(usage, svg=SvgUsage(authors[0].model, tokens_in, tokens_out))


def _totals(usage: Mapping[str, object]) -> tuple[int, int] | None:
    """All tokens in, and out; None where neither is said. Raises ``InvalidUsage``."""
    tokens_in, tokens_out = _count(usage, "input_tokens"), _count(usage, "output_tokens")
    if tokens_in is None and tokens_out is None:
        return None
    if tokens_in is None or tokens_out is None:
        raise InvalidUsage("usage has only one of input_tokens and output_tokens")
    total = _count(usage, "total_tokens")
    if total is not None and total != tokens_in + tokens_out:
        raise InvalidUsage("total_tokens is not input_tokens + output_tokens")
    return tokens_in, tokens_out


def _members(value: object, name: str) -> Mapping[str, object]:
    if value is None:
        return {}
    # A dict is seen at once; to ask whether it is a Mapping takes an ABC ten times as long.
    if not isinstance(value, dict | Mapping):
        raise InvalidUsage(f"{name} is not an object")
    return value


def _count(members: Mapping[str, object], name: str) -> int | None:
    """A count of tokens; None where it is absent or null."""
    value: Any = members.get(name)
    if value is None:
        return None
    if value.__class__ is not int or not 0 <= value <= MAX_TOKENS:
        raise InvalidUsage(f"{name} is not a count of tokens")
    count: int = value
    return count


def _split(
    details: Mapping[str, object], total: int, plain_is_text: bool, name: str
) -> tuple[int, int]:
    """Text and image tokens of ``total``."""
    text, image = _count(details, "text_tokens"), _count(details, "image_tokens")
    if text is None and image is None:
        return (total, 0) if plain_is_text else (0, total)
    if text is None:
        text = total - (image or 0)
    if image is None:
        image = total - text
    if text < 0 or image < 0 or text + image != total:
        raise InvalidUsage(f"{name} does not add up")
    return text, image


def _cached(
    usage: Mapping[str, object], details_in: Mapping[str, object], text_in: int
) -> tuple[int, int]:
    """Cached text and image tokens, from the three places where an upstream may say them."""
    details = _members(usage.get("cached_tokens_details"), "cached_tokens_details")
    if not details and "cached_tokens" not in usage and "cached_tokens" not in details_in:
        return 0, 0
    text = _count(details, "cached_text_tokens")
    image = _count(details, "cached_image_tokens")
    totals = {_count(usage, "cached_tokens"), _count(details_in, "cached_tokens")} - {None}
    if len(totals) > 1:
        raise InvalidUsage("two different cached_tokens")
    total = totals.pop() if totals else None
    if total is None:
        return text or 0, image or 0
    if text is None and image is None:
        text = min(total, text_in)
    if text is None:
        text = total - (image or 0)
    if image is None:
        image = total - text
    if text < 0 or image < 0 or text + image != total:
        raise InvalidUsage("cached_tokens_details does not add up")
    return text, image


def _svg(raw: object | None) -> SvgUsage | None:
    """The author's bill. ``reasoning_tokens`` are a part of its output, unless its total says
    that they came on top: then they are billed as output as well."""
    if raw is None:
        return None
    members = _members(raw, "svg_usage")
    model = members.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidUsage("svg_usage has no model")
    tokens_in, tokens_out = _count(members, "input_tokens"), _count(members, "output_tokens")
    if tokens_in is None or tokens_out is None:
        raise InvalidUsage("svg_usage has no input_tokens or no output_tokens")
    reasoning = _count(members, "reasoning_tokens") or 0
    total = _count(members, "total_tokens")
    if total is not None and total != tokens_in + tokens_out:
        if total != tokens_in + tokens_out + reasoning:
            raise InvalidUsage("svg_usage's total_tokens does not add up")
        tokens_out += reasoning
    if tokens_out == 0:
        raise InvalidUsage("svg_usage's output_tokens is 0")
    return SvgUsage(model, tokens_in, tokens_out)
