"""The bill, against the numbers printed in the contract (5.2, 5.3)."""

from __future__ import annotations

import httpx
import pytest

from gateway.domain.call import Json
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from tests.sandbox.calls import generate, png

SUNBURST, OLD, MINI = "gpt-image-2.5-sunburst", "gpt-image-1.5", "gpt-image-1-mini"

OUTPUT_TOKENS = [
    (OLD, "low", "1024x1024", 272),
    (OLD, "low", "1024x1536", 408),
    (OLD, "low", "1536x1024", 400),
    (OLD, "medium", "1024x1024", 1056),
    (OLD, "medium", "1024x1536", 1584),
    (MINI, "medium", "1536x1024", 1568),
    (MINI, "high", "1024x1024", 4160),
    ("chatgpt-image-latest", "high", "1024x1536", 6240),
    ("gpt-image-1.5-2025-12-16", "high", "1536x1024", 6208),
    ("gpt-image-2", "low", "1024x1024", 196),
    ("gpt-image-2", "medium", "1024x1024", 1756),
    ("gpt-image-2", "high", "1024x1024", 7024),
    ("gpt-image-2-2026-04-21", "high", "1536x1024", 5488),
    ("gpt-image-2", "high", "2880x2880", 23719),
    (SUNBURST, "low", "1024x1024", 196),
    (SUNBURST, "medium", "1024x1024", 439),
    (SUNBURST, "high", "1024x1024", 1756),
    (SUNBURST, "xhigh", "1024x1024", 3122),
    (SUNBURST, "max", "1024x1024", 7024),
    (SUNBURST, "medium", "1024x1536", 343),
    (SUNBURST, "high", "1536x1024", 1372),
    (SUNBURST, "low", "1536x864", 120),
    (SUNBURST, "xhigh", "2048x2048", 6343),
    (SUNBURST, "high", "2560x1440", 1843),
    ("gpt-image-2.5-flare-2026-09-08", "xhigh", "3840x2160", 5930),
    (SUNBURST, "max", "2880x2880", 23719),
    ("gpt-image-2.6-flare", "low", "1024x1024", 1756),
    ("gpt-image-2.6-flare", "medium", "1024x1024", 1756),
    ("gpt-image-2.6-sunburst", "high", "1536x1024", 1372),
    ("gpt-image-2.6-sunburst", "max", "1024x1024", 7024),
]


@pytest.mark.parametrize(("model", "quality", "size", "tokens"), OUTPUT_TOKENS)
def test_output_tokens(
    server: SandboxServer, http: httpx.Client, model: str, quality: str, size: str, tokens: int
) -> None:
    server.rules.add(Rule(payload_bytes=100))
    answer = generate(http, model=model, quality=quality, size=size).json()
    assert answer["usage"]["output_tokens"] == tokens
    assert (answer["quality"], answer["size"]) == (quality, size)


def test_the_answer_is_written_as_openai_writes_it(http: httpx.Client) -> None:
    body = generate(http, prompt="A lighthouse at dusk", n=2, quality="high")
    assert body.headers["content-type"] == "application/json"
    answer = body.json()
    keys = ["created", "background", "data", "output_format", "quality", "size", "usage"]
    assert list(answer) == keys
    assert answer["created"] == 1795348800
    assert (answer["background"], answer["size"]) == ("opaque", "1024x1024")
    assert [list(item) for item in answer["data"]] == [["b64_json"], ["b64_json"]]
    assert answer["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 5},
        "output_tokens": 3512,
        "output_tokens_details": {"image_tokens": 3512, "text_tokens": 0},
        "total_tokens": 3517,
    }


def test_auto_is_resolved_to_medium(http: httpx.Client) -> None:
    answer = generate(http, quality="auto", size="auto", background="auto").json()
    assert (answer["quality"], answer["size"]) == ("medium", "1024x1024")
    assert answer["usage"]["output_tokens"] == 439


def test_text_is_counted_in_bytes(http: httpx.Client) -> None:
    tokens = {"a": 1, "abcd": 1, "abcde": 2, "üü": 1, "üüü": 2, "🐈🐈": 2}
    for prompt, counted in tokens.items():
        usage = generate(http, prompt=prompt, quality="low").json()["usage"]
        assert usage["input_tokens_details"]["text_tokens"] == counted


def test_mini_gives_no_output_details(http: httpx.Client) -> None:
    usage = generate(http, model=MINI, quality="low").json()["usage"]
    assert list(usage) == ["input_tokens", "input_tokens_details", "output_tokens", "total_tokens"]


@pytest.mark.parametrize(
    ("model", "fields", "tokens"),
    [
        ("gpt-image-2.5-flare", {}, 2914),
        ("gpt-image-2", {}, 2914),
        (OLD, {}, 2 * 581),
        (OLD, {"input_fidelity": "low"}, 2 * 581),
        (OLD, {"input_fidelity": "high"}, 2 * (581 + 4160)),
    ],
)
def test_input_pictures(
    http: httpx.Client, model: str, fields: dict[str, str], tokens: int
) -> None:
    files = [("image[]", ("a.png", png(1024, 1024), "image/png"))] * 2
    files.append(("mask", ("m.png", png(1024, 1024), "image/png")))
    asked = {"model": model, "prompt": "abcd", "quality": "low", **fields}
    usage = http.post("/images/edits", data=asked, files=files).json()["usage"]
    assert usage["input_tokens_details"] == {"image_tokens": tokens, "text_tokens": 1}
    assert usage["input_tokens"] == tokens + 1


def test_a_gif_costs_its_frames(http: httpx.Client) -> None:
    answer = generate(http, output_format="gif", frame_count=3, quality="low")
    assert answer.json()["usage"]["output_tokens"] == 588


def test_an_svg_has_two_bills(http: httpx.Client) -> None:
    svg: Json = {"model": "gpt-6-astra", "reasoning": {"effort": "low"}}
    answer = generate(http, output_format="svg", svg=svg, safety_identifier="me").json()
    keys = ["created", "background", "data", "output_format", "quality", "safety_identifier"]
    assert list(answer) == [*keys, "size", "svg_usage", "usage"]
    used = answer["svg_usage"]
    assert list(used) == [
        "input_tokens",
        "model",
        "output_tokens",
        "reasoning_tokens",
        "total_tokens",
    ]
    assert (used["model"], used["reasoning_tokens"]) == ("gpt-6-astra", 128)
    assert used["total_tokens"] == used["input_tokens"] + used["output_tokens"]
    assert answer["usage"]["output_tokens"] == 439


def test_the_journal_keeps_the_bill(server: SandboxServer, http: httpx.Client) -> None:
    answer = generate(http, n=2).json()
    generate(http, n=11)
    [record] = server.journal.billed
    assert record.usage == answer["usage"]
    assert record.images == 2
    assert record.billed_at == server.sandbox.clock.now()
    assert (server.journal.received, server.journal.billed_requests) == (2, 1)
    assert server.journal.billed_images == 2
