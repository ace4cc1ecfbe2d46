"""The bound before the call: what is pinned, what is refused, and what it learns from bills."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError
from PIL import Image

from gateway.domain.ledger import Balance, Line
from gateway.domain.quota import Limit, Scope, Unit, Window, period
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from gateway.stores.sqlite import SQLiteStore
from tests.running import ALIAS, MODEL, GatewayUnderTest, Start, run_gateway

ASKED: dict[str, Any] = {"model": MODEL, "prompt": "A lighthouse"}
EXPLICIT: dict[str, Any] = {**ASKED, "size": "1024x1024", "quality": "low"}
FRESH = {"cache-control": "no-cache"}
PIN = {"auto": "pin", "pin": {"size": "1024x1024", "quality": "medium"}}
TEXT = (12 + 32) * 5_000
"""The prompt's twelve bytes and the 32 tokens around them, at $5 a million."""
LOW, MEDIUM = 196 * 30_000, 439 * 30_000


@pytest.fixture(autouse=True)
def quick(sandbox: SandboxServer) -> None:
    """Pictures that need no drawing. The rules of a test that come later find only its prompts."""
    sandbox.rules.add(Rule(prompt="A lighthouse", payload_bytes=400))


def pinned(**more: Any) -> dict[str, Any]:
    return {"models": {MODEL: {**PIN, **more}, ALIAS: PIN}}


# auto: pin


async def test_what_is_left_open_is_pinned_announced_and_held_exactly(start: Start) -> None:
    async with start(pinned()) as gateway, gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.generate(**ASKED, size="auto")
        assert answer.headers["x-gateway-changed"] == "size=1024x1024, quality=medium"
        assert json.loads(answer.content)["quality"] == "medium"
        [record] = gateway.sandbox.journal
        sent = json.loads(record.body)
        assert sent == {**ASKED, "size": "1024x1024", "quality": "medium"}
        await gateway.told.until(1)
        assert gateway.told.last.bound == MEDIUM + TEXT
        assert gateway.told.last.flags == ()
        # Who says the same gets the same, out of the cache; nobody has changed his request.
        said = await sdk.images.with_raw_response.generate(**sent)
        assert (said.headers["x-cache"], said.headers.get("x-gateway-changed")) == ("hit", None)
        # And a hit says what was pinned.
        again = await sdk.images.with_raw_response.generate(**ASKED, quality="medium")
        assert again.headers["x-cache"] == "hit"
        assert again.headers["x-gateway-changed"] == "size=1024x1024"
        assert again.content == answer.content


async def test_what_is_said_is_never_touched(start: Start) -> None:
    async with start(pinned()) as gateway, gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.generate(
            **ASKED, size="1536x1024", quality="high"
        )
        assert "x-gateway-changed" not in answer.headers
        half = await sdk.images.with_raw_response.generate(**ASKED, quality="low")
        assert half.headers["x-gateway-changed"] == "size=1024x1024"
        first, second = gateway.sandbox.journal
        assert json.loads(first.body)["size"] == "1536x1024"
        assert json.loads(second.body) == {**ASKED, "quality": "low", "size": "1024x1024"}


async def test_a_pin_is_spliced_beside_an_alias_into_a_body_that_stays_as_it_came(
    start: Start,
) -> None:
    body = b'{ "prompt" : "A lighthouse \\u00e9", "size":null ,"model":"team-art", "n" : 1 }'
    async with start(pinned()) as gateway, gateway.http() as http:
        answer = await http.post(
            "/images/generations", content=body, headers={"content-type": "application/json"}
        )
        assert answer.headers["x-gateway-changed"] == "size=1024x1024, quality=medium"
        [record] = gateway.sandbox.journal
        spliced = body.replace(b"null", b'"1024x1024"').replace(b"team-art", MODEL.encode())
        spliced = spliced.replace(b"{", b'{"quality":"medium",', 1)
        assert record.body == spliced


@pytest.mark.parametrize("said", [{}, {"size": "auto"}, {"size": "auto", "quality": "auto"}])
async def test_an_edit_by_the_sdk_is_pinned_in_its_form(start: Start, said: dict[str, Any]) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    async with start(pinned()) as gateway, gateway.sdk() as sdk:
        asked: dict[str, Any] = {**ASKED, "model": ALIAS, **said}
        file = ("a.png", picture.getvalue(), "image/png")
        answer = await sdk.images.with_raw_response.edit(image=file, **asked)
        assert answer.headers["x-gateway-changed"] == "size=1024x1024, quality=medium"
        [record] = gateway.sandbox.journal
        assert record.fields == {
            **ASKED, "size": "1024x1024", "quality": "medium"
        }  # fmt: skip
        assert [file.size_bytes for file in record.files] == [len(picture.getvalue())]


async def test_a_stream_says_what_was_pinned(start: Start) -> None:
    async with start(pinned()) as gateway, gateway.http() as http:
        answer = await http.post("/images/generations", json={**ASKED, "stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-gateway-changed"] == "size=1024x1024, quality=medium"


async def test_without_a_pin_nothing_is_rewritten_and_the_dearest_is_held(
    gateway: GatewayUnderTest,
) -> None:
    async with gateway.sdk() as sdk:
        answer = await sdk.images.with_raw_response.generate(**ASKED)
    assert "x-gateway-changed" not in answer.headers
    assert json.loads(gateway.sandbox.journal[0].body) == ASKED
    await gateway.told.until(1)
    assert gateway.told.last.bound == 23_719 * 30_000 + TEXT


# What is not known


async def test_an_unknown_parameter_is_refused_before_anything_is_held(start: Start) -> None:
    changes = {"models": {MODEL: {"unknown_parameters": "refuse"}}}
    async with start(changes) as gateway, gateway.sdk() as sdk:
        with pytest.raises(BadRequestError) as raised:
            await sdk.images.generate(**EXPLICIT, extra_body={"turbo": True})
        assert (raised.value.code, raised.value.param) == ("unknown_parameter", "turbo")
        assert len(gateway.sandbox.journal) == 0
        await gateway.told.until(1)
        assert (gateway.told.last.bound, gateway.told.last.outcome) == (0, None)
        assert await gateway.usage() == []
        # What the contract lists is known.
        await sdk.images.generate(**EXPLICIT, user="me", extra_body={"complexity": "low"})


async def test_what_is_forwarded_is_held_at_the_worst_and_seen(gateway: GatewayUnderTest) -> None:
    gateway.sandbox.rules.clear()
    answered: Any = {"created": 1, "data": [{"b64_json": "aaaa"}], "usage": {
        "input_tokens": 3, "output_tokens": 196, "total_tokens": 199}}  # fmt: skip
    gateway.sandbox.rules.add(Rule(status=200, body=answered, billed=True))
    async with gateway.sdk() as sdk:
        await sdk.images.generate(**EXPLICIT, extra_body={"turbo": True})
    await gateway.told.until(1)
    assert gateway.told.last.bound == 23_719 * 30_000 + TEXT
    assert gateway.told.last.flags == ("soft",)
    metrics = await gateway.metrics()
    assert metrics[f'gateway_bound_soft_total{{model="{MODEL}"}}'] == 1


# What the bills say


def ratio(name: str) -> str:
    return f'gateway_bound_ratio_{name}{{model="{MODEL}"}}'


FACTOR = f'gateway_bound_factor{{model="{MODEL}",upstream="openai"}}'


async def balance(gateway: GatewayUnderTest) -> Balance:
    limit = Limit(Scope.TEAM, "growth", Unit.MONEY, Window.DAY, 10**12)
    line = Line(limit, period(Window.DAY, gateway.clock.now()))
    [found] = await gateway.gateway.ledger.balances([line])
    return found


async def held_next(gateway: GatewayUnderTest, model: str = MODEL) -> int:
    """What one more call holds while it runs, in nano-dollars."""
    gate, before = Gate(), len(gateway.told.requests)
    gateway.sandbox.rules.clear()
    gateway.sandbox.rules.add(Rule(times=1, wait_for=gate, payload_bytes=400))
    async with gateway.http() as http:
        asking = http.post("/images/generations", json={**EXPLICIT, "model": model}, headers=FRESH)
        answer = asyncio.ensure_future(asking)
        try:
            await gate.arrived()
            held = (await balance(gateway)).pending
        finally:
            gate.set()
        assert (await answer).status_code == 200
    await gateway.told.until(before + 1)
    assert gateway.told.last.bound == held
    return held


async def test_a_bill_within_the_bound_moves_the_ratio_alone(gateway: GatewayUnderTest) -> None:
    async with gateway.sdk() as sdk:
        await sdk.images.generate(**EXPLICIT)
        await sdk.images.generate(**EXPLICIT)  # A hit: nothing is measured.
    await gateway.told.until(2)
    metrics = await gateway.metrics()
    assert metrics[ratio("count")] == 1
    assert metrics[ratio("sum")] == pytest.approx((LOW + 15_000) / (LOW + TEXT))
    assert metrics[FACTOR] == 1
    assert await held_next(gateway) == LOW + TEXT


async def test_a_bill_over_the_bound_is_posted_counted_and_raises_the_next_bounds(
    start: Start, sandbox: SandboxServer, tmp_path: Path
) -> None:
    base = LOW + TEXT
    billed = base * 3 // 2
    assert billed % 5_000 == 0
    # One token of a picture and all else text: exactly half as much again as the bound.
    usage: Any = {"input_tokens": (billed - 30_000) // 5_000, "output_tokens": 1}
    async with start() as gateway, run_gateway(tmp_path, sandbox, {}) as second:
        assert await held_next(second) == base
        sandbox.rules.clear()
        sandbox.rules.add(Rule(times=1, payload_bytes=400, usage=usage))
        async with gateway.sdk() as sdk:
            answer = await sdk.images.with_raw_response.generate(**EXPLICIT, extra_headers=FRESH)
        assert answer.headers["x-cost-usd"] == "0.00915"
        await gateway.told.until(1)
        receipt = gateway.told.last
        assert (receipt.cost, receipt.bound, receipt.flags) == (billed, base, ("over_bound",))
        [row] = await gateway.usage()
        assert row.cost == billed + LOW + 15_000
        metrics = await gateway.metrics()
        under = "gateway_ledger_underestimate"
        assert metrics[f'{under}_total{{model="{MODEL}"}}'] == 1
        assert metrics[f'{under}_nanousd_total{{model="{MODEL}"}}'] == billed - base
        assert (metrics[FACTOR], metrics[ratio("sum")]) == (1.5, 1.5)
        assert metrics['gateway_bound_factor{model="other",upstream="openai"}'] == 1
        # The next call of this model, and of no other.
        assert await held_next(gateway) == billed
        assert await held_next(gateway, "gpt-image-2") == base
        assert await held_next(gateway, ALIAS) == billed
        # Another gateway on the same database, once it has looked again.
        await second.gateway.factors.refresh()
        assert await held_next(second) == billed
        assert (await second.metrics())[FACTOR] == 1.5
    # It outlives them; a person may take it back.
    async with start() as third:
        assert await held_next(third) == billed
        store = SQLiteStore.open(tmp_path / "data" / "gateway.db")
        assert await store.upkeep.reset_factor("openai", MODEL)
        await store.aclose()
        await third.gateway.factors.refresh()
        assert await held_next(third) == base


async def test_an_absurd_bill_raises_ten_times_and_one_that_cannot_be_true_not_at_all(
    gateway: GatewayUnderTest, sandbox: SandboxServer
) -> None:
    base = LOW + TEXT
    absurd: list[tuple[Any, int]] = [
        ({"input_tokens": -1, "output_tokens": 10**9}, 1),
        ({"input_tokens": 3, "output_tokens": 10**12}, 1),
        ({"input_tokens": 3, "output_tokens": 10**9}, 10),
    ]
    for usage, factor in absurd:
        sandbox.rules.clear()
        sandbox.rules.add(Rule(times=1, payload_bytes=400, usage=usage))
        async with gateway.sdk() as sdk:
            await sdk.images.generate(**EXPLICIT, extra_headers=FRESH)
        assert (await gateway.metrics())[FACTOR] == factor
        assert await held_next(gateway) == factor * base


async def test_a_prompt_of_two_bytes_with_words_around_it_is_within_its_bound(
    gateway: GatewayUnderTest, sandbox: SandboxServer
) -> None:
    usage: Any = {"input_tokens": 2 + 32, "output_tokens": 196}
    sandbox.rules.clear()
    sandbox.rules.add(Rule(payload_bytes=400, usage=usage))
    async with gateway.sdk() as sdk:
        await sdk.images.generate(**{**EXPLICIT, "prompt": "Hi"})
    await gateway.told.until(1)
    assert gateway.told.last.flags == ()
    assert gateway.told.last.cost == gateway.told.last.bound == LOW + 34 * 5_000


# Pictures that come


async def test_an_edit_of_1_x_is_held_by_the_real_size_of_its_pictures(start: Start) -> None:
    wide = io.BytesIO()
    Image.new("RGB", (1536, 1024)).save(wide, "JPEG", progressive=True)
    rows = [{
        "upstream": "openai",
        "model": MODEL,
        "usd_per_million_tokens": {"text_in": 5, "image_in": 8, "image_out": 32},
        "output_tokens": {"table": {"default": {"low": 272}}},
        "input_image_tokens": {"high_square": 4160, "high_other": 6240},
    }]  # fmt: skip
    async with start({"prices": {"rows": rows}}) as gateway, gateway.sdk() as sdk:
        await sdk.images.edit(**EXPLICIT, image=("a.jpg", wide.getvalue(), "image/jpeg"))
        await gateway.told.until(1)
        # 65 and 129 for each of two tiles.
        assert gateway.told.last.bound == 272 * 32_000 + TEXT + 323 * 8_000
