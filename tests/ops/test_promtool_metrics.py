"""What Prometheus' own linter says of what a gateway tells, and whether it is in the table."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.telemetry.metrics import TABLE, label_of
from tests.processes import GatewayProcess, wait_until
from tests.running import ALIAS, KEY, MODEL, TestClock, config_of, run_gateway
from tests.sandbox.calls import png
from tests.valkey import Valkey, run_valkey

PICTURE = ("cat.png", png(), "image/png")


@pytest.fixture
def sandbox() -> Iterator[SandboxServer]:
    with SandboxServer(TestClock()) as running:
        running.rules.add(Rule(prompt="busy", status=429, times=1))
        running.rules.add(Rule(prompt="cut", cut_before_headers=True))
        running.rules.add(Rule(prompt="quick", payload_bytes=400))
        yield running


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with run_valkey() as server:
        yield server


def check(exposition: str) -> None:
    """`promtool check metrics` has nothing to say, every sample is of the table, and no label has
    a value that its list does not name."""
    promtool = shutil.which("promtool")
    if promtool is None:
        told = "promtool is not installed: `apt install prometheus` checks the metrics"
        if os.environ.get("CI_TOOLS") == "1":
            pytest.fail(told)
        pytest.skip(told)
    ended = subprocess.run(
        [promtool, "check", "metrics"], input=exposition, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    specs = {spec.name.removesuffix("_total"): spec for spec in TABLE}
    families = list(text_string_to_metric_families(exposition))
    # Of several workers only what has moved is told.
    assert {family.name for family in families} <= specs.keys()
    for family in families:
        spec = specs[family.name]
        assert family.documentation == spec.help
        for sample in family.samples:
            labels = {name: one for name, one in sample.labels.items() if name != "le"}
            assert labels.keys() == set(spec.labels), sample
            for name, value in labels.items():
                values = label_of(spec, name).values
                assert not values or value in values, sample


async def traffic(base_url: str) -> None:
    """One of each kind of request."""
    client = openai.DefaultAsyncHttpxClient(verify=False, timeout=30)
    async with (
        httpx.AsyncClient(verify=False, timeout=30) as http,
        openai.AsyncOpenAI(
            base_url=base_url, api_key=KEY, max_retries=0, http_client=client
        ) as sdk,
    ):
        asked = {"model": MODEL, "size": "1024x1024", "quality": "low"}
        for _ in range(2):
            await sdk.images.generate(prompt="quick", **asked)  # type: ignore[call-overload]
        await sdk.images.edit(model=ALIAS, image=PICTURE, prompt="quick", quality="low")
        events = await sdk.images.generate(  # type: ignore[call-overload]
            prompt="quick stream", stream=True, partial_images=1, **asked
        )
        assert [event.type async for event in events][-1] == "image_generation.completed"
        refusals: tuple[tuple[dict[str, str], dict[str, str], int], ...] = (
            ({"authorization": "Bearer nobody"}, {"prompt": "p", "model": MODEL}, 401),
            ({}, {"prompt": "p"}, 400),
            ({}, {"prompt": "p", "model": MODEL, "quality": "made-up"}, 400),
        )
        own = {"authorization": f"Bearer {KEY}"}
        for headers, body, status in refusals:
            url = f"{base_url}/images/generations"
            answer = await http.post(url, headers={**own, **headers}, json=body)
            assert answer.status_code == status, answer.text
        for prompt, status in (("cut", 502), ("busy", 429)):
            with pytest.raises(openai.APIStatusError) as refused:
                await sdk.images.generate(prompt=prompt, **asked)  # type: ignore[call-overload]
            assert refused.value.status_code == status


async def test_one_process(tmp_path: Path, sandbox: SandboxServer) -> None:
    models = {"dall-e-3": {"upstream": "openai"}}
    teams = {"growth": {"budget": {"day": 5}, "soft_budget": {"month": 50}}}
    async with run_gateway(tmp_path, sandbox, {"models": models, "teams": teams}) as gateway:
        await traffic(gateway.base_url)
        await gateway.put_away()
        async with httpx.AsyncClient(verify=False) as http:
            said = (await http.get(f"{gateway.origin}/metrics")).text
        found = await gateway.metrics()
    check(said)
    assert said.count("# TYPE ") == len(TABLE)
    sent = 'gateway_upstream_requests_total{status="%s",upstream="openai"}'
    assert [found[sent % status] for status in ("2xx", "4xx", "429", "none")] == [3, 1, 1, 1]
    assert found['gateway_upstream_first_byte_seconds_count{upstream="openai"}'] == 5
    for operation in ("reserve", "settle"):
        assert found[f'gateway_ledger_seconds_count{{operation="{operation}"}}'] == 6
    taken = found['gateway_request_bytes_total{endpoint="edit"}']
    passed_on = found['gateway_upstream_bytes_total{direction="sent",upstream="openai"}']
    assert len(PICTURE[1]) < taken < passed_on
    assert found['gateway_upstream_bytes_total{direction="received",upstream="openai"}'] > 4 * 400
    quality = f'gateway_image_qualities_total{{model="{MODEL}",quality="low"}}'
    assert found[quality] == 2


async def test_several_workers(tmp_path: Path, sandbox: SandboxServer, valkey: Valkey) -> None:
    changes = {
        "server": {"host": "127.0.0.1", "watch_seconds": 0, "workers": 2},
        "storage": {"redis": valkey.url},
    }
    config = config_of(tmp_path, sandbox.base_url, changes)
    with GatewayProcess(config) as process:
        await asyncio.to_thread(process.wait_ready)
        await asyncio.to_thread(
            wait_until, lambda: process.metrics()["gateway_workers"] == 2, "both serve", 60
        )
        await traffic(process.base_url)
        async with httpx.AsyncClient(verify=False) as http:
            for _ in range(3):
                answer = await http.get(
                    f"{process.base_url.removesuffix('/v1')}/metrics",
                    headers={"connection": "close"},
                )
                check(answer.text)
        process.terminate()
        assert await asyncio.to_thread(process.wait) == 0
