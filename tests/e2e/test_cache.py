"""The same request again is answered with the same picture, for nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, APIStatusError, AsyncOpenAI
from openai.types import ImageGenCompletedEvent

from gateway.domain.ledger import UsageRow
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from tests.running import (
    ALIAS,
    KEY,
    MODEL,
    OTHER_KEY,
    GatewayUnderTest,
    Start,
    TestClock,
    run_gateway,
)
from tests.valkey import Valkey, eventually, run_valkey

ASKED: dict[str, Any] = {
    "model": MODEL,
    "prompt": "A lighthouse",
    "quality": "low",
    "size": "1024x1024",
}
COST = 5_895_000
CI_KEY = "growth-ci-key-0123456789abcdef"


@pytest.fixture(autouse=True)
def quick(sandbox: SandboxServer) -> None:
    """Pictures that need no drawing; each is another one."""
    sandbox.rules.add(Rule(prompt="A", payload_bytes=400))


@dataclass
class Asker:
    """Sends the same request again and again, and says where each answer came from."""

    gateway: GatewayUnderTest
    key: str = KEY
    asked: dict[str, Any] = field(default_factory=lambda: dict(ASKED))
    headers: dict[str, str] = field(default_factory=dict)

    async def raw(self, control: str | None = None, **changes: Any) -> httpx.Response:
        headers = self.headers if control is None else {**self.headers, "cache-control": control}
        async with self.gateway.http(self.key, headers=headers) as http:
            answer = await http.post("/images/generations", json={**self.asked, **changes})
        assert answer.status_code == 200, answer.text
        return answer

    async def __call__(self, control: str | None = None, **changes: Any) -> str:
        return str((await self.raw(control, **changes)).headers["x-cache"])

    @property
    def bought(self) -> int:
        return self.gateway.sandbox.journal.billed_requests


async def growths_row(gateway: GatewayUnderTest) -> UsageRow:
    [row] = [row for row in await gateway.usage() if row.team == "growth"]
    return row


async def test_the_second_identical_request_costs_nothing(gateway: GatewayUnderTest) -> None:
    async with gateway.sdk() as sdk:
        first = await sdk.images.with_raw_response.generate(**ASKED)
        gateway.clock.advance(seconds=90)
        second = await sdk.images.with_raw_response.generate(**ASKED)
    assert first.headers["x-cache"] == "miss"
    assert first.headers["x-cost-usd"] == "0.005895"
    assert "age" not in first.headers
    assert second.headers["x-cache"] == "hit"
    assert second.headers["age"] == "90"
    assert second.headers["x-cost-usd"] == "0"
    assert second.headers["x-cost-basis"] == "none"
    assert second.headers["x-model-served"] == MODEL
    assert second.headers["x-request-id"] != first.headers["x-request-id"]
    assert second.content == first.content
    assert len(gateway.sandbox.journal) == 1
    [_, (receipt, _)] = await gateway.told.until(2)
    assert (receipt.cost, receipt.avoided, receipt.images) == (0, COST, 1)

    async def counted() -> bool:
        return (await growths_row(gateway)).requests == 2

    await eventually(counted)
    row = await growths_row(gateway)
    assert (row.requests, row.cached_requests, row.cost, row.avoided) == (2, 1, COST, COST)
    assert row.images == 2
    metrics = await gateway.metrics()
    assert metrics['gateway_cache_total{result="hit"}'] == 1
    assert metrics['gateway_cache_total{result="miss"}'] == 1
    where = f'{{endpoint="generation",model="{MODEL}",team="growth"}}'
    assert metrics[f"gateway_spend_avoided_usd_total{where}"] == 0.005895
    assert metrics[f"gateway_spend_usd_total{where}"] == 0.005895


async def test_two_live_requests_are_two_pictures(start: Start, sandbox: SandboxServer) -> None:
    """The AI SDK asks for n=2 as two identical calls at once: they are never joined."""
    gate = Gate()
    sandbox.rules.clear()
    sandbox.rules.add(Rule(payload_bytes=400, wait_for=gate))
    async with start() as gateway:
        ask = Asker(gateway)
        running = [asyncio.create_task(ask.raw()) for _ in range(2)]
        await gate.arrived(2)
        gate.set()
        first, second = await asyncio.gather(*running)
        assert first.content != second.content
        assert ask.bought == 2
        assert (await ask.raw()).content in (first.content, second.content)


async def test_a_hit_needs_no_budget(start: Start) -> None:
    async with start({"teams": {"growth": {"budget": {"day": 0.0062}}}}) as gateway:
        ask = Asker(gateway)
        assert await ask() == "miss"
        assert await ask() == "hit"
        async with gateway.sdk() as sdk:
            with pytest.raises(APIStatusError) as raised:
                await sdk.images.generate(**{**ASKED, "prompt": "A dune"})
        assert raised.value.code == "insufficient_quota"


async def test_the_way_a_request_is_written_makes_no_difference(
    gateway: GatewayUnderTest,
) -> None:
    ask = Asker(gateway, asked={**ASKED, "prompt": "A café \U0001f5fc", "n": 1})
    assert await ask() == "miss"
    spellings = [
        json.dumps({name: ask.asked[name] for name in reversed(ask.asked)}),
        json.dumps({**ask.asked, "background": None, "user": None, "stream": False}),
        json.dumps(ask.asked, indent=2, ensure_ascii=False),
        json.dumps({**ask.asked, "model": ALIAS}),
        json.dumps({**ask.asked, "partial_images": 2}),
    ]
    headers = {"content-type": "application/json; charset=utf-8"}
    async with gateway.http(headers=headers) as http:
        for body in spellings:
            answer = await http.post("/images/generations", content=body.encode())
            assert answer.headers["x-cache"] == "hit", body
    assert ask.bought == 1


OTHERS: list[dict[str, Any]] = [
    {"prompt": "A lighthouse "},
    {"prompt": "a lighthouse"},
    {"size": "1536x1024"},
    {"quality": "medium"},
    {"n": 2},
    {"model": "gpt-image-2.5-sunburst"},
    {"background": "opaque"},
    {"user": "somebody"},
    {"output_format": "webp"},
]


async def test_another_request_is_another_picture(gateway: GatewayUnderTest) -> None:
    ask = Asker(gateway)
    gateway.sandbox.rules.add(Rule(payload_bytes=400))
    assert await ask() == "miss"
    for change in OTHERS:
        assert await ask(**change) == "miss", change
    assert await ask() == "hit"
    for change in OTHERS:
        assert await ask(**change) == "hit", change
    assert ask.bought == 1 + len(OTHERS)


def scoped(scope: str) -> dict[str, Any]:
    return {
        "cache": {"scope": scope},
        "teams": {"growth": {"keys": [KEY, {"key": CI_KEY, "name": "ci"}]}},
    }


@pytest.mark.parametrize(
    ("scope", "same_team", "other_team"),
    [("team", "hit", "miss"), ("key", "miss", "miss"), ("organization", "hit", "hit")],
)
async def test_results_are_shared_as_far_as_the_operator_says(
    start: Start, scope: str, same_team: str, other_team: str
) -> None:
    async with start(scoped(scope)) as gateway:
        assert await Asker(gateway, KEY)() == "miss"
        assert await Asker(gateway, KEY)() == "hit"
        assert await Asker(gateway, CI_KEY)() == same_team
        assert await Asker(gateway, OTHER_KEY)() == other_team


async def test_no_cache_buys_another_picture_and_keeps_it(gateway: GatewayUnderTest) -> None:
    ask = Asker(gateway)
    first = await ask.raw()
    second = await ask.raw("no-cache")
    assert second.headers["x-cache"] == "miss"
    assert second.content != first.content
    third = await ask.raw()
    assert third.headers["x-cache"] == "hit"
    assert third.content == second.content
    assert ask.bought == 2


async def test_no_store_neither_looks_nor_keeps(gateway: GatewayUnderTest) -> None:
    ask = Asker(gateway)
    assert await ask("no-store") == "miss"
    assert await ask() == "miss"
    assert await ask("private, No-Store") == "miss"
    assert await ask() == "hit"
    assert ask.bought == 3


async def test_max_age_is_the_oldest_that_a_client_takes(gateway: GatewayUnderTest) -> None:
    ask = Asker(gateway)
    assert await ask() == "miss"
    gateway.clock.advance(seconds=60)
    assert await ask("max-age=60") == "hit"
    gateway.clock.advance(seconds=1)
    assert await ask("max-age=60") == "miss"
    assert await ask("max-age=60") == "hit"
    assert await ask("max-age=0") == "hit", "it was bought in this very second"
    gateway.clock.advance(hours=23)
    assert await ask("max-age=999999999") == "hit"


async def test_no_result_outlives_its_time(start: Start) -> None:
    async with start({"cache": {"ttl": "1h"}}) as gateway:
        ask = Asker(gateway)
        assert await ask() == "miss"
        gateway.clock.advance(minutes=60)
        assert await ask() == "hit"
        gateway.clock.advance(seconds=1)
        assert await ask() == "miss"


@pytest.mark.parametrize(
    "switch",
    [
        {"cache": {"enabled": False}},
        {"teams": {"growth": {"cache": {"enabled": False}}}},
        {"models": {MODEL: {"upstream": "openai", "cache": False}}},
    ],
    ids=["gateway", "team", "model"],
)
async def test_the_cache_can_be_switched_off(start: Start, switch: dict[str, Any]) -> None:
    async with start(switch) as gateway:
        ask = Asker(gateway)
        assert await ask() == "off"
        assert await ask() == "off"
        assert ask.bought == 2
        on = Asker(gateway, OTHER_KEY, {**ASKED, "model": ALIAS})
        expected = "off" if "cache" in switch else "hit"
        await on()
        assert await on() == expected


async def completed(sdk: AsyncOpenAI, **changes: Any) -> ImageGenCompletedEvent:
    """The last event of a stream."""
    stream = await sdk.images.generate(stream=True, **{**ASKED, **changes})
    events = [event async for event in stream]
    assert isinstance(events[-1], ImageGenCompletedEvent)
    return events[-1]


async def test_a_kept_picture_answers_a_stream(gateway: GatewayUnderTest) -> None:
    async with gateway.sdk() as sdk:
        whole = await sdk.images.generate(**ASKED)
        event = await completed(sdk, partial_images=3)
        raw = await sdk.images.with_raw_response.generate(stream=True, **ASKED)
    assert whole.data
    assert event.b64_json == whole.data[0].b64_json
    assert event.created_at == whole.created
    assert (event.size, event.quality, event.output_format) == ("1024x1024", "low", "png")
    assert whole.usage
    assert event.usage.output_tokens == whole.usage.output_tokens
    assert raw.headers["x-cache"] == "hit"
    assert raw.headers["x-cost-usd"] == "0"
    assert raw.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert len(gateway.sandbox.journal) == 1


async def test_a_streamed_picture_answers_for_json(gateway: GatewayUnderTest) -> None:
    async with gateway.sdk() as sdk:
        event = await completed(sdk, partial_images=2)
        answer = await sdk.images.with_raw_response.generate(**ASKED)
    whole = answer.parse()
    assert answer.headers["x-cache"] == "hit"
    assert whole.data
    assert whole.data[0].b64_json == event.b64_json
    assert (whole.created, whole.size, whole.quality) == (event.created_at, "1024x1024", "low")
    assert whole.usage
    # What it was bought for, its two partial pictures in.
    assert whole.usage.output_tokens == 396
    told = await gateway.told.until(2)
    assert told[-1][0].avoided == COST + 2 * 3_000_000


async def test_json_that_answered_a_stream_is_kept(
    gateway: GatewayUnderTest, sandbox: SandboxServer
) -> None:
    sandbox.rules.clear()
    sandbox.rules.add(Rule(payload_bytes=400, json_for_stream=True))
    async with gateway.sdk() as sdk:
        event = await completed(sdk)
        again = await completed(sdk)
    assert again == event
    assert (await Asker(gateway).raw()).headers["x-cache"] == "hit"
    assert len(sandbox.journal) == 1


async def test_several_pictures_have_no_form_as_a_stream(gateway: GatewayUnderTest) -> None:
    ask = Asker(gateway, asked={**ASKED, "n": 2})
    assert await ask() == "miss"
    assert await ask(stream=True) == "miss"
    assert await ask() == "hit"


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 400},
        {"status": 500},
        {"error_in_200": True},
        {"empty_data": True},
        {"cut_after_bytes": 500},
        {"html_200": True},
    ],
    ids=str,
)
async def test_errors_are_never_kept(
    gateway: GatewayUnderTest, fault: dict[str, Any], sandbox: SandboxServer
) -> None:
    sandbox.rules.clear()
    attempts = 2 if fault.get("status") == 500 else 1
    sandbox.rules.add(Rule(payload_bytes=400, times=attempts, **fault))
    sandbox.rules.add(Rule(payload_bytes=400))
    async with gateway.sdk() as sdk:
        with pytest.raises(APIStatusError):
            await sdk.images.generate(**ASKED)
    assert await Asker(gateway)() == "miss"
    assert await Asker(gateway)() == "hit"


@pytest.mark.parametrize(
    "fault",
    [{"sse_cut_after": 1}, {"sse_error_after": 1}, {"sse_no_completed": True}],
    ids=str,
)
async def test_streams_that_break_are_never_kept(
    gateway: GatewayUnderTest, fault: dict[str, Any], sandbox: SandboxServer
) -> None:
    sandbox.rules.clear()
    attempts = 2 if fault.get("status") == 500 else 1
    sandbox.rules.add(Rule(payload_bytes=400, times=attempts, **fault))
    sandbox.rules.add(Rule(payload_bytes=400))
    async with gateway.sdk() as sdk:
        with pytest.raises(APIError):
            await completed(sdk, partial_images=2)
    await gateway.told.until(1)
    assert await Asker(gateway)() == "miss"


async def test_what_has_no_price_is_never_kept(start: Start, sandbox: SandboxServer) -> None:
    sandbox.rules.clear()
    sandbox.rules.add(Rule(status=200, body={"data": [{"b64_json": "iVBORw0K"}]}))
    models = {"house-model": {"upstream": "openai", "unpriced": "allow"}}
    async with start({"models": models}) as gateway:
        ask = Asker(gateway, asked={"model": "house-model", "prompt": "A lighthouse"})
        answer = await ask.raw()
        assert answer.headers["x-cost-basis"] == "none"
        assert await ask() == "miss"


async def test_a_picture_booked_at_its_bound_is_kept_too(
    gateway: GatewayUnderTest, sandbox: SandboxServer
) -> None:
    sandbox.rules.clear()
    sandbox.rules.add(Rule(payload_bytes=400, no_usage=True))
    assert await Asker(gateway)() == "miss"
    assert await Asker(gateway)() == "hit"
    await gateway.told.until(2)
    assert gateway.told.last.avoided == 6_100_000


async def test_results_survive_a_restart(
    tmp_path: Path, sandbox: SandboxServer, clock: TestClock
) -> None:
    async with run_gateway(tmp_path, sandbox, {}, clock) as gateway:
        bought = await Asker(gateway).raw()
    clock.advance(minutes=5)
    async with run_gateway(tmp_path, sandbox, {}, clock) as gateway:
        kept = await Asker(gateway).raw()
        assert kept.headers["x-cache"] == "hit"
        assert kept.headers["age"] == "300"
        assert kept.content == bought.content
    assert len(sandbox.journal) == 1


async def test_a_large_picture_is_kept_on_disk_alone(start: Start, sandbox: SandboxServer) -> None:
    sandbox.rules.clear()
    sandbox.rules.add(Rule(payload_bytes=9_000_000))
    small = {"memory_bytes": "1MiB", "max_entry_bytes": "16MiB"}
    async with start({"cache": small, "server": {"buffer_bytes": "1MiB"}}) as gateway:
        first, second = await Asker(gateway).raw(), await Asker(gateway).raw()
        assert second.headers["x-cache"] == "hit"
        assert second.content == first.content
        async with gateway.sdk() as sdk:
            event = await completed(sdk)
        assert event.b64_json == first.json()["data"][0]["b64_json"]


async def test_what_is_larger_than_an_entry_may_be_is_not_kept(
    start: Start, sandbox: SandboxServer
) -> None:
    sandbox.rules.clear()
    sandbox.rules.add(Rule(payload_bytes=2_000_000))
    async with start({"cache": {"max_entry_bytes": "1MiB"}}) as gateway:
        assert await Asker(gateway)() == "miss"
        assert await Asker(gateway)() == "miss"


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with run_valkey() as server:
        yield server


async def test_gateways_share_results_through_redis(
    tmp_path: Path, sandbox: SandboxServer, clock: TestClock, valkey: Valkey
) -> None:
    changes = {"cache": {"redis": valkey.url, "scope": "organization"}}
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    async with (
        run_gateway(folders[0], sandbox, changes, clock) as one,
        run_gateway(folders[1], sandbox, changes, clock) as two,
    ):
        bought = await Asker(one).raw()
        assert bought.headers["x-cache"] == "miss"
        kept = await Asker(two).raw()
        assert kept.headers["x-cache"] == "hit"
        assert kept.content == bought.content
    assert len(sandbox.journal) == 1


async def test_without_its_redis_the_cache_misses_and_never_fails(
    start: Start, valkey: Valkey
) -> None:
    # Nothing is kept in the process, so that every look goes to Redis.
    changes = {"cache": {"redis": valkey.url, "memory_bytes": 1}}
    async with start(changes) as gateway:
        ask = Asker(gateway)
        assert await ask() == "miss"
        assert await ask() == "hit"
        valkey.kill()
        try:
            assert await ask() == "miss"
            async with gateway.sdk() as sdk:
                await completed(sdk)
            assert ask.bought == 3
            metrics = await gateway.metrics()
            assert metrics['gateway_cache_errors_total{operation="store"}'] > 0
        finally:
            valkey.restart()

        async def back() -> bool:
            return await ask() == "hit"

        await eventually(back)
