"""The configuration changes while requests run: all of it at once, or nothing (reliability.md 4.5,
rows 83 and 84)."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
import yaml

import gateway.reload
import gateway.swap
from gateway.filewatch import FileWatch, look, source
from gateway.reload import Reloaded, reload_when
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from gateway.settings import Settings, load
from tests.e2e.test_endings import soon
from tests.processes import GatewayProcess, wait_until
from tests.raw import JSON, RawClient
from tests.running import KEY, MODEL, GatewayUnderTest, Start, TestClock, config_of
from tests.upstream.raw_server import Peer, raw_server

SMALL = Rule(payload_bytes=400)
NEW_KEY = "growth-key-fedcba9876543210"


@pytest.fixture
def elsewhere() -> Iterator[SandboxServer]:
    """Another provider."""
    with SandboxServer(TestClock()) as running:
        running.rules.add(SMALL)
        yield running


def edit(config: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """At once: a gateway that watches the file never finds half of it."""
    document = yaml.safe_load(config.read_text())
    change(document)
    beside = config.with_name("gateway.yaml.new")
    beside.write_text(yaml.safe_dump(document))
    beside.replace(config)


async def again(
    gateway: GatewayUnderTest, change: Callable[[dict[str, Any]], object] = lambda one: None
) -> bool:
    """The file is changed and read again; whether it was taken over. What is not is a mistake."""
    edit(gateway.config, change)

    async def read() -> Settings:
        return load(gateway.config, {})

    ended = await gateway.gateway.reload(read)
    assert ended is not Reloaded.POSTPONED
    return ended is Reloaded.APPLIED


def asked(name: str, model: str = MODEL) -> dict[str, Any]:
    return {"model": model, "prompt": name, "quality": "low", "size": "1024x1024"}


async def buy(http: httpx.AsyncClient, name: str, model: str = MODEL) -> httpx.Response:
    return await http.post("/images/generations", json=asked(name, model))


async def test_an_upstream_is_changed_under_a_running_call(
    start: Start, elsewhere: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs ends where it began, what comes goes elsewhere, and the old one is closed then."""
    monkeypatch.setattr(gateway.swap, "RETIRE_SECONDS", 0)
    gate = Gate()
    async with start() as running, running.http() as http:
        running.sandbox.rules.add(Rule(prompt="making", wait_for=gate, payload_bytes=400))
        running.sandbox.rules.add(SMALL)
        call = asyncio.ensure_future(buy(http, "making"))
        await gate.arrived()
        port = int(running.sandbox.origin.rpartition(":")[2])
        assert open_to(port) > 0
        assert await again(
            running, lambda one: one["upstreams"]["openai"].update(base_url=elsewhere.base_url)
        )
        assert (await buy(http, "next")).status_code == 200
        assert [record.fields["prompt"] for record in elsewhere.journal] == ["next"]
        assert not call.done()
        gate.set()
        assert (await call).status_code == 200
        assert [record.fields["prompt"] for record in running.sandbox.journal] == ["making"]
        await soon(lambda: open_to(port) == 0, "the account that was replaced is closed")
        assert (await buy(http, "and on")).status_code == 200


async def test_what_an_upstream_says_late_is_not_held_against_the_one_in_its_place(
    start: Start, elsewhere: SandboxServer
) -> None:
    gate = Gate()
    async with start() as running, running.http() as http:
        running.sandbox.rules.add(Rule(prompt="refused", wait_for=gate, status=401))
        call = asyncio.ensure_future(buy(http, "refused"))
        await gate.arrived()
        assert await again(
            running, lambda one: one["upstreams"]["openai"].update(base_url=elsewhere.base_url)
        )
        gate.set()
        assert (await call).status_code == 503
        assert (await buy(http, "next")).status_code == 200
        assert disabled(await running.metrics()) == {}


async def test_the_only_key_is_refused_and_put_right(start: Start) -> None:
    """While it rests the answer says what to do and until when; a new one is used at once."""
    async with start() as running, running.http() as http:
        running.sandbox.rules.add(Rule(key="sk-upstream-secret", status=401))
        running.sandbox.rules.add(SMALL)
        for name in ("refused", "resting"):
            refused = await buy(http, name)
            assert refused.status_code == 503
            error = refused.json()["error"]
            assert error["code"] == "upstream_account_refused"
            assert "has to put a valid key into upstreams.openai.api_keys." in error["message"]
            assert refused.headers["x-should-retry"] == "false"
            assert 50 < int(refused.headers["retry-after"]) <= 60
        assert error["message"].endswith(
            f"It is tried again in {refused.headers['retry-after']} s."
        )
        passed = await http.post("/moderations", json={"input": "resting"})
        assert (passed.status_code, passed.headers["x-should-retry"]) == (503, "false")
        assert 50 < int(passed.headers["retry-after"]) <= 60
        assert [one.fields["prompt"] for one in running.sandbox.journal] == ["refused"]
        assert await again(
            running, lambda one: one["upstreams"]["openai"].update(api_keys=["sk-upstream-new"])
        )
        assert (await buy(http, "at once")).status_code == 200
        assert disabled(await running.metrics()) == {"1": 0.0}


async def test_a_price_table_that_was_compiled_anew(start: Start, tmp_path: Path) -> None:
    """Its age, and the models that shut down, are told as they are now."""
    compiled = "gateway_prices_compiled_timestamp_seconds"
    shutdown = 'gateway_model_shutdown_timestamp_seconds{model="old",upstream="openai"}'
    old = {"upstream": "openai", "model": "dall-e-3"}
    row = "{provider: openai, model: m, valid_from: 2026-01-01, source: s, per_image: 1}"
    rows = row.replace("per_image", "shuts_down: 2027-03-01, per_image")
    prices = tmp_path / "prices.yaml"

    def use(text: str) -> Callable[[dict[str, Any]], None]:
        def change(one: dict[str, Any]) -> None:
            prices.write_text(text)
            one["prices"] = {"file": str(prices)}
            one["models"] = {"old": {"upstream": "openai", "model": "m"}}

        return change

    async with start({"models": {"old": old}}) as running:
        found = await running.metrics()
        assert found[compiled] >= datetime(2026, 11, 22, tzinfo=UTC).timestamp()
        assert found[shutdown] == datetime(2026, 5, 12, tzinfo=UTC).timestamp()
        assert await again(running, use(f"compiled: 2026-12-24\nrows: [{rows}]"))
        found = await running.metrics()
        assert found[compiled] == datetime(2026, 12, 24, tzinfo=UTC).timestamp()
        assert found[shutdown] == datetime(2027, 3, 1, tzinfo=UTC).timestamp()
        assert await again(running, use(f"[{row}]"))
        assert not {compiled, shutdown} & (await running.metrics()).keys()


async def test_an_upstream_that_is_gone_worries_nobody(
    start: Start, elsewhere: SandboxServer
) -> None:
    more = {"kind": "openai", "base_url": elsewhere.base_url, "api_keys": ["sk-more"]}
    async with start() as running, running.http() as http:

        def add(one: dict[str, Any]) -> None:
            one["upstreams"]["more"] = more
            one["models"]["fresh"] = {"upstream": "more", "model": "gpt-image-2"}

        def remove(one: dict[str, Any]) -> None:
            del one["upstreams"]["more"], one["models"]["fresh"]

        assert await again(running, add)
        elsewhere.rules.clear()
        elsewhere.rules.add(Rule(times=1, status=401))
        elsewhere.rules.add(SMALL)
        assert (await buy(http, "refused", "fresh")).status_code == 503
        assert disabled(await running.metrics()) == {"1": 1.0}
        assert await again(running, remove)
        assert disabled(await running.metrics()) == {"1": 0.0}
        assert await again(running, add)
        assert (await buy(http, "again", "fresh")).status_code == 200


def disabled(metrics: Mapping[str, float]) -> dict[str, float]:
    """Whether keys are refused, by their numbers."""
    name = "gateway_upstream_key_disabled{"
    return {
        key.partition('key="')[2].partition('"')[0]: value
        for key, value in metrics.items()
        if key.startswith(name)
    }


@pytest.mark.parametrize("path", ["generations", "estimate"])
async def test_a_slow_upload_is_planned_with_what_holds_when_it_is_read(
    start: Start, elsewhere: SandboxServer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """The upstream that it would have gone to when it began is closed by then."""
    monkeypatch.setattr(gateway.swap, "RETIRE_SECONDS", 0)
    body = json.dumps(asked("slow")).encode()
    async with start() as running, running.http() as http, RawClient.to(running.port, KEY) as slow:
        running.sandbox.rules.add(SMALL)
        assert (await buy(http, "before")).status_code == 200
        port = int(running.sandbox.origin.rpartition(":")[2])
        await slow.head(f"/v1/images/{path}", (JSON, f"content-length: {len(body)}"))
        await slow.send(body[:10])
        await soon(lambda: bool(running.gateway.flights._until_draining), "it is being read")

        def move(one: dict[str, Any]) -> None:
            one["upstreams"]["other"] = {**one["upstreams"].pop("openai")}
            one["upstreams"]["other"]["base_url"] = elsewhere.base_url
            for model in one["models"].values():
                model["upstream"] = "other"

        assert await again(running, move)
        await soon(lambda: open_to(port) == 0, "the account that was replaced is closed")
        await slow.send(body[10:])
        answer = await slow.answer()
        assert answer.status == 200
        if path == "estimate":
            assert answer.json["upstream"] == "other"
        else:
            assert [record.fields["prompt"] for record in elsewhere.journal] == ["slow"]


def open_to(port: int) -> int:
    """Connections of this process to a port on this machine."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(line[2].endswith(f":{port:04X}") and line[3] == "01" for line in lines)


async def test_everything_that_may_change_does(start: Start, elsewhere: SandboxServer) -> None:
    async with start() as running, running.http() as http, running.sdk() as sdk:
        running.sandbox.rules.add(SMALL)
        first = await buy(http, "same")
        assert (await buy(http, "same")).headers["x-cache"] == "hit"

        def change(one: dict[str, Any]) -> None:
            one["upstreams"]["more"] = {
                "kind": "openai",
                "base_url": elsewhere.base_url,
                "api_keys": ["sk-more"],
            }
            one["models"]["fresh"] = {"upstream": "more", "model": "gpt-image-2"}
            del one["models"]["team-art"]
            one["cache"] = {"enabled": False}
            one["upstreams"]["openai"]["max_in_flight"] = 1

        assert await again(running, change)
        assert [model.id async for model in sdk.models.list()] == [
            "fresh",
            "gpt-image-2",
            MODEL,
        ]
        assert (await buy(http, "fresh", "fresh")).status_code == 200
        assert [record.fields["model"] for record in elsewhere.journal] == ["gpt-image-2"]
        answer = await buy(http, "same")
        assert answer.headers["x-cache"] == "off"
        estimate = await http.post("/images/estimate", json=asked("what", "fresh"))
        assert estimate.json()["upstream"] == "more"
        metrics = await running.metrics()
        assert metrics['gateway_inflight_upstream_requests{upstream="more"}'] == 0

        assert await again(running, lambda one: one.update(prices={"rows": [FLAT]}))
        assert (await buy(http, "same")).headers["x-cost-usd"] == "7"
        assert first.headers["x-cost-usd"] != "7"


async def test_how_requests_are_relayed_changes_too(start: Start) -> None:
    gate = Gate()
    async with start() as running, running.http() as http:
        running.sandbox.rules.add(Rule(prompt="slow", wait_for=gate, payload_bytes=400))
        running.sandbox.rules.add(Rule(prompt="refused", status=503))
        relay = {"max_wait_seconds": 0.05, "keep_alive_seconds": 0.05}
        assert await again(running, lambda one: one.update(relay=relay))
        waited = await buy(http, "slow json")
        assert (waited.status_code, waited.json()["error"]["code"]) == (504, "still_running")
        async with http.stream(
            "POST", "/images/generations", json={**asked("slow stream"), "stream": True}
        ) as answer:
            lines = answer.aiter_lines()
            assert await anext(lines) == ": keepalive"
            gate.set()
            assert [line async for line in lines]
        assert await again(running, lambda one: one.update(relay={"attempts": 1}))
        assert (await buy(http, "refused")).status_code == 503
        prompts = [record.fields["prompt"] for record in running.sandbox.journal]
        assert prompts.count("refused") == 1
        assert await again(running, lambda one: one.update(relay={"attempts": 2}))
        assert (await buy(http, "refused again")).status_code == 503
        prompts = [record.fields["prompt"] for record in running.sandbox.journal]
        assert prompts.count("refused again") == 2


HEARD = b'{"error": {"message": "heard it"}}'


async def test_a_ca_bundle_is_read_again(start: Start, tmp_path: Path) -> None:
    """An authority is replaced under the same name: connections trust the new one from then on."""
    old, new = trustme.CA(), trustme.CA()
    bundle = tmp_path / "ca.pem"
    old.cert_pem.write_to_path(str(bundle))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    new.issue_cert("127.0.0.1").configure_cert(context)

    async def refuse(peer: Peer) -> None:
        await peer.request()
        await peer.send(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(HEARD), HEARD)
        )

    async with raw_server(refuse, tls=context) as server:
        upstream = {"base_url": f"https://127.0.0.1:{server.port}/v1", "verify": str(bundle)}
        async with start({"upstreams": {"openai": upstream}}) as running, running.http() as http:
            answer = await buy(http, "not trusted")
            assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_tls")
            watch = FileWatch(load(running.config, {}).sources)
            new.cert_pem.write_to_path(str(bundle))
            assert watch.changed(look(watch.paths))
            assert await again(running)
            answer = await buy(http, "trusted")
            assert answer.status_code == 400
            assert "heard it" in answer.json()["error"]["message"]


FLAT = {
    "provider": "openai",
    "model": MODEL,
    "valid_from": "2026-10-01",
    "source": "a contract",
    "per_image": "7",
}


def without_a_price(one: dict[str, Any]) -> None:
    one["models"]["mystery"] = {"upstream": "openai"}


def broken_ca(one: dict[str, Any]) -> None:
    Path(one["ca"]).write_text("no certificate")
    one["upstreams"]["openai"] |= {"base_url": "https://h.test/v1", "verify": one.pop("ca")}


REFUSED: dict[str, Callable[[dict[str, Any]], object]] = {
    "a model without a price": without_a_price,
    "a CA bundle that is none": broken_ca,
    "a word that nobody knows": lambda one: one.update(nonsense=1),
}


@pytest.mark.parametrize("how", REFUSED)
async def test_with_one_mistake_nothing_changes(start: Start, tmp_path: Path, how: str) -> None:
    async with start() as running, running.http() as http:
        running.sandbox.rules.add(SMALL)
        whole = running.config.read_text()

        def change(one: dict[str, Any]) -> None:
            one["teams"]["growth"]["keys"] = [NEW_KEY]
            one["models"]["fresh"] = {"upstream": "openai", "model": "gpt-image-2"}
            one["cache"] = {"enabled": False}
            if how == "a CA bundle that is none":
                one["ca"] = str(tmp_path / "ca.pem")
            REFUSED[how](one)

        assert not await again(running, change)
        assert (await running.metrics())["gateway_config_reload_failed"] == 1
        assert (await buy(http, "as before")).headers["x-cache"] == "miss"
        assert (await buy(http, "as before")).headers["x-cache"] == "hit"
        fresh = await buy(http, "fresh", "fresh")
        assert fresh.status_code != 200
        async with running.http(NEW_KEY) as other:
            assert (await buy(other, "new key")).status_code == 401
        running.config.write_text(whole)
        assert await again(running)
        assert (await running.metrics())["gateway_config_reload_failed"] == 0


async def status(url: str, key: str, model: str = MODEL) -> int:
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}, verify=False) as http:
        return (await http.get(f"{url}/models/{model}")).status_code


def failed(gateway: GatewayProcess) -> float:
    return gateway.metrics()["gateway_config_reload_failed"]


async def test_files_are_watched(tmp_path: Path, sandbox: SandboxServer) -> None:
    """A ConfigMap that is swapped, a secret that is replaced or lost, a file that is half there."""
    mount = tmp_path / "mount"
    secrets = tmp_path / "secrets"
    for folder in (mount, secrets):
        folder.mkdir()
    secret = secrets / "growth"
    secret.write_text(KEY)
    source = config_of(
        tmp_path,
        sandbox.base_url,
        {
            "server": {"host": "127.0.0.1", "watch_seconds": 0.05},
            "storage": {"database": f"sqlite:///{tmp_path}/data/gateway.db"},
            "teams": {"growth": {"keys": [f"${{file:{secret}}}"]}},
        },
    )

    def publish(number: int) -> None:
        """As kubelet does it."""
        folder = mount / f"..{number}"
        folder.mkdir()
        (folder / "gateway.yaml").write_text(source.read_text())
        (mount / "..data_tmp").symlink_to(folder.name)
        os.rename(mount / "..data_tmp", mount / "..data")

    publish(1)
    (mount / "gateway.yaml").symlink_to("..data/gateway.yaml")
    config = mount / "gateway.yaml"

    async def until(true: Callable[[], bool], what: str) -> None:
        await asyncio.to_thread(wait_until, true, what)

    def applied(gateway: GatewayProcess) -> float:
        return gateway.metrics().get('gateway_config_reloads_total{outcome="applied"}', 0)

    with GatewayProcess(config) as process:
        process.wait_ready()
        url = process.base_url
        assert await status(url, KEY) == 200

        edit(source, lambda one: one["models"].update(fresh={"upstream": "openai", "model": MODEL}))
        publish(2)
        await until(lambda: applied(process) == 1, "the swapped folder is read")
        assert await status(url, KEY, "fresh") == 200

        other = secrets / "new"
        other.write_text(NEW_KEY)
        other.rename(secret)
        await until(lambda: applied(process) == 2, "the new secret is read")
        assert await status(url, KEY) == 401
        assert await status(url, NEW_KEY) == 200

        secret.rename(other)
        await until(lambda: failed(process) == 1, "the lost secret is told of")
        assert await status(url, NEW_KEY) == 200, "and the last one goes on"
        other.rename(secret)
        await until(lambda: failed(process) == 0, "it is back")

        whole = source.read_text()
        source.write_text(whole[: len(whole) // 2] + "\n  - [")
        publish(3)
        await until(lambda: failed(process) == 1, "half a file is refused")
        assert await status(url, NEW_KEY, "fresh") == 200
        in_place = mount / "..3" / "gateway.yaml"
        in_place.write_text(whole)
        await until(lambda: failed(process) == 0, "it is whole now")
        assert await status(url, NEW_KEY, "fresh") == 200
        assert NEW_KEY not in process.stderr
        process.terminate()
        assert await asyncio.to_thread(process.wait) == 0


async def test_what_only_the_database_kept_from_being_read_is_read_later(
    tmp_path: Path, sandbox: SandboxServer
) -> None:
    """The file is changed once, while nobody can write to the database."""
    database = tmp_path / "data" / "gateway.db"
    config = config_of(
        tmp_path,
        sandbox.base_url,
        {
            "server": {"host": "127.0.0.1", "watch_seconds": 0.05},
            "storage": {"database": f"sqlite:///{database}"},
            "teams": {"growth": {"keys": [KEY]}},
        },
    )

    def reloads(gateway: GatewayProcess, outcome: str) -> float:
        return gateway.metrics().get(f'gateway_config_reloads_total{{outcome="{outcome}"}}', 0)

    with GatewayProcess(config) as process:
        process.wait_ready()
        with closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            edit(config, lambda one: one["teams"]["growth"].update(keys=[KEY, NEW_KEY]))
            await asyncio.to_thread(
                wait_until, lambda: reloads(process, "postponed") > 0, "it cannot be taken over"
            )
            assert failed(process) == 1
            assert await status(process.base_url, KEY) == 200
            assert await status(process.base_url, NEW_KEY) == 401
        await asyncio.to_thread(
            wait_until, lambda: reloads(process, "applied") == 1, "it is taken over by itself"
        )
        assert failed(process) == 0
        assert await status(process.base_url, NEW_KEY) == 200
        assert reloads(process, "refused") == 0


class Readings:
    """Readings of a configuration that end as the test says, in turn; applied when it says nothing
    more."""

    def __init__(self, *ends: Reloaded) -> None:
        self.at: list[float] = []
        self._ends = list(ends)
        self._news = asyncio.Event()

    async def reload(self) -> Reloaded:
        self.at.append(asyncio.get_running_loop().time())
        self._news.set()
        return self._ends.pop(0) if self._ends else Reloaded.APPLIED

    async def until(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.at) < count:
                self._news.clear()
                await self._news.wait()


@asynccontextmanager
async def reading_again(
    readings: Readings, watch: FileWatch, watch_seconds: float
) -> AsyncIterator[asyncio.Event]:
    told = asyncio.Event()
    task = asyncio.create_task(reload_when(told, readings.reload, watch, watch_seconds))
    try:
        yield told
    finally:
        task.cancel()


async def test_what_passes_is_tried_again_with_growing_pauses() -> None:
    readings = Readings(*[Reloaded.POSTPONED] * 4)
    async with reading_again(readings, FileWatch([]), 0.05) as told:
        told.set()
        await readings.until(5)
    pauses = [after - before for before, after in pairwise(readings.at)]
    assert all(pause >= 0.05 * 2**number for number, pause in enumerate(pauses)), pauses


async def test_pauses_have_an_end_without_a_watch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.reload, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(gateway.reload, "MAX_PAUSE_SECONDS", 0.02)
    readings = Readings(*[Reloaded.POSTPONED] * 12)
    async with reading_again(readings, FileWatch([]), 0) as told:
        told.set()
        await readings.until(13)


async def test_a_mistake_is_not_tried_again_and_a_change_does_not_wait(tmp_path: Path) -> None:
    path, another = tmp_path / "gateway.yaml", tmp_path / "another.yaml"
    path.write_text("one")
    another.write_text("another")
    watch, readings = FileWatch([source(path)]), Readings(Reloaded.REFUSED)
    async with reading_again(readings, watch, 0.01) as told:
        told.set()
        await readings.until(1)
        another.replace(path)
        await readings.until(2)
    assert not watch.changed(look([path])), "the second reading was that of the change"
    postponed = Readings(Reloaded.POSTPONED)
    async with reading_again(postponed, watch, 0) as told:
        told.set()
        await postponed.until(1)
        told.set()
        await postponed.until(2)
    assert postponed.at[1] - postponed.at[0] < gateway.reload.PAUSE_SECONDS
