"""More than there is room for: a short and fair queue, honest refusals, clean doors, and an end in
order (reliability.md 4.5, rows 75, 79 and 80)."""

from __future__ import annotations

import asyncio
import json
import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import InternalServerError

from gateway.sandbox.journal import Journal
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from tests.e2e.test_endings import connect, leave, metrics_of, read, request, send, soon
from tests.e2e.test_processes import Answered, check_against, configured, database
from tests.inbox import SECRET, inbox
from tests.processes import Books, GatewayProcess, wait_until
from tests.raw import FORM, JSON, RawClient
from tests.running import KEY, MODEL, OTHER_KEY, GatewayUnderTest, Start, TestClock

SMALL = Rule(payload_bytes=400)
MIB = 1024 * 1024


def asked(name: str) -> dict[str, Any]:
    return {"model": MODEL, "prompt": name, "quality": "low", "size": "1024x1024"}


async def waiting(gateway: GatewayUnderTest, count: int) -> None:
    """Until so many calls wait."""

    async def there() -> bool:
        return (await metrics_of(gateway))["gateway_queued_requests"] == count

    async with asyncio.timeout(30):
        while not await there():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_two_teams_share_four_places(start: Start) -> None:
    """Twenty requests at four places: sixteen wait, weights of three and one take turns."""
    gate = Gate()
    changes = {
        "server": {"max_in_flight": 4, "queue_seconds": 60},
        "teams": {"growth": {"weight": 3}},
        "cache": {"enabled": False},
    }
    async with start(changes) as gateway:
        gateway.sandbox.rules.add(Rule(prompt="first", wait_for=gate, payload_bytes=400))
        gateway.sandbox.rules.add(SMALL)
        async with gateway.http() as growth, gateway.http(OTHER_KEY) as design:
            path = "/images/generations"
            first = [
                asyncio.ensure_future(growth.post(path, json=asked(f"first {n}"))) for n in range(4)
            ]
            await gate.arrived(4)
            rest = [
                asyncio.ensure_future(team.post(path, json=asked(f"{name} {n}")))
                for n in range(8)
                for name, team in (("growth", growth), ("design", design))
            ]
            await waiting(gateway, 16)
            metrics = await metrics_of(gateway)
            assert metrics['gateway_inflight_upstream_requests{upstream="openai"}'] == 4
            assert len(gateway.sandbox.journal) == 4
            gate.set()
            answers = await asyncio.gather(*first, *rest)
            assert {answer.status_code for answer in answers} == {200}
        prompts = [str(record.fields["prompt"]) for record in gateway.sandbox.journal][4:]
        early = Counter(prompt.split()[0] for prompt in prompts[:8])
        assert early["growth"] in (5, 6, 7), prompts
        metrics = await metrics_of(gateway)
        assert metrics["gateway_queued_requests"] == 0
        assert metrics['gateway_inflight_upstream_requests{upstream="openai"}'] == 0
        assert metrics["gateway_queue_seconds_count"] == 20


async def test_beyond_the_queue_a_refusal_says_when_to_come_back(start: Start) -> None:
    gate = Gate()
    changes = {"upstreams": {"openai": {"max_in_flight": 1}}, "server": {"queue": 1}}
    async with start(changes) as gateway:
        gateway.sandbox.rules.add(Rule(prompt="first", wait_for=gate, payload_bytes=400))
        gateway.sandbox.rules.add(SMALL)
        async with gateway.http() as http, gateway.sdk() as sdk:
            first = asyncio.ensure_future(http.post("/images/generations", json=asked("first")))
            await gate.arrived()
            second = asyncio.ensure_future(http.post("/images/generations", json=asked("second")))
            await waiting(gateway, 1)
            with pytest.raises(InternalServerError) as caught:
                await sdk.images.generate(**asked("third"))
            assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
            headers = caught.value.response.headers
            assert 1 <= int(headers["retry-after"]) <= 60
            assert headers["x-should-retry"] == "true"
            assert headers["x-cost-usd"] == "0"
            gate.set()
            assert (await first).status_code == (await second).status_code == 200
        assert len(gateway.sandbox.journal) == 2


async def test_a_client_that_leaves_the_queue_buys_nothing(start: Start) -> None:
    gate = Gate()
    async with start({"server": {"max_in_flight": 1, "queue_seconds": 60}}) as gateway:
        gateway.sandbox.rules.add(Rule(prompt="first", wait_for=gate, payload_bytes=400))
        async with gateway.http() as http:
            first = asyncio.ensure_future(http.post("/images/generations", json=asked("first")))
            await gate.arrived()
            client = await connect(gateway.port)
            await send(client, request("json", "second"))
            await waiting(gateway, 1)
            leave(client, "reset")
            await waiting(gateway, 0)
            gate.set()
            assert (await first).status_code == 200
        await soon(lambda: len(gateway.told.requests) == 2, "both are told")
        gone = {delivery.gone: receipt for receipt, delivery in gateway.told.requests}
        assert set(gone) == {"", "queued"}
        assert gone["queued"].cost == 0
        assert len(gateway.sandbox.journal) == 1


@pytest.fixture
def sandbox_alone() -> Iterator[SandboxServer]:
    with SandboxServer(TestClock(), journal=Journal(records=100_000)) as running:
        yield running


def http_of(**headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        headers={"authorization": f"Bearer {KEY}", **headers},
        timeout=120,
        limits=httpx.Limits(max_connections=None),
        verify=False,
    )


async def test_a_drain_refuses_what_is_new_and_ends_what_runs(
    tmp_path: Path, sandbox_alone: SandboxServer
) -> None:
    """500 in flight at SIGTERM: 500 answered, no hold open, and meanwhile the doors say why."""
    config = configured(tmp_path, sandbox_alone, {})
    count, gate, answered = 500, Gate(), Answered()
    sandbox_alone.rules.add(Rule(wait_for=gate, payload_bytes=400))
    with GatewayProcess(config) as process:
        process.wait_ready()
        async with http_of() as http, http_of(connection="keep-alive") as idle:
            origin = process.base_url.removesuffix("/v1")
            assert (await idle.get(f"{process.base_url}/models")).status_code == 200
            calls = [
                asyncio.ensure_future(
                    answered.call(http, process.base_url, f"call-{number}", stream=number % 5 == 4)
                )
                for number in range(count)
            ]
            async with asyncio.timeout(60):
                await gate.arrived(count)
            process.terminate()
            await asyncio.to_thread(wait_until, process.drains, "it says that it drains")
            ready = await idle.get(f"{origin}/readyz")
            assert (ready.status_code, ready.json()["status"]) == (503, "draining")
            assert (await idle.get(f"{origin}/healthz")).status_code == 200

            # Before its body is read: it is announced and never comes.
            raw = await connect(process.port)
            head = request("json", "new").partition(b"\r\n\r\n")[0]
            await send(raw, head + b"\r\n\r\n")
            refused = await read(raw)
            raw.close()
            said, _, body = refused.partition(b"\r\n\r\n")
            lines = said.decode().lower().split("\r\n")
            assert lines[0].startswith("http/1.1 503")
            assert {"retry-after: 1", "x-should-retry: true", "connection: close"} <= set(lines)
            assert json.loads(body)["error"]["code"] == "shutting_down"

            # A retry may have something to find here; with nothing to find it is refused too.
            for headers in ({"x-stainless-retry-count": "1"}, {"idempotency-key": "k"}):
                answer = await http.post(
                    f"{process.base_url}/images/generations", json=asked("new"), headers=headers
                )
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "shutting_down"
                assert answer.headers["connection"] == "close"
            assert process.running
            gate.set()
            assert await asyncio.gather(*calls) == [200] * count
            # The idle connection is still open on this side, and keeps nothing from ending.
            assert await asyncio.to_thread(process.wait) == 0
        assert "Traceback" not in process.stderr
    books = Books.read(database(config))
    assert books.open == []
    assert len(books.of("P")) == count
    check_against(books, sandbox_alone, answered)


@pytest.mark.parametrize(
    ("path", "form"), [("generations", JSON), ("edits", FORM), ("estimate", FORM)]
)
async def test_an_upload_that_stalls_is_sent_elsewhere_at_once(
    start: Start, path: str, form: str
) -> None:
    async with start() as gateway, RawClient.to(gateway.port, KEY) as client:
        await client.head(f"/v1/images/{path}", (form, "content-length: 100000"))
        idle = asyncio.ensure_future(client.answer())
        await soon(lambda: bool(gateway.gateway.flights._until_draining), "it is being read")
        assert not idle.done()
        gateway.gateway.drain.begin()
        answer = await idle
        assert (answer.status, answer.error["code"]) == (503, "shutting_down")
        assert answer.header("x-should-retry") == "true"
        assert answer.header("connection") == "close"
        await gateway.gateway.drain.over()


async def test_a_retry_that_stalls_is_told_the_truth_when_it_is_given_up(
    tmp_path: Path, sandbox_alone: SandboxServer
) -> None:
    """Its first try may be here, so it is read on; nothing of it was sent when the time is up."""
    config = configured(
        tmp_path, sandbox_alone, {}, server={"host": "127.0.0.1", "drain_seconds": 0.5}
    )
    with GatewayProcess(config) as process:
        await asyncio.to_thread(process.wait_ready)
        async with RawClient.to(process.port, KEY) as client:
            await client.head(
                "/v1/images/generations",
                (JSON, "content-length: 1000", "x-stainless-retry-count: 1"),
            )
            await client.send(b'{"prompt": "')
            process.terminate()
            answer = await client.answer()
            assert (answer.status, answer.error["code"]) == (503, "shutting_down")
            assert answer.header("x-should-retry") == "true"
            assert "Nothing was bought" in answer.error["message"]
        assert await asyncio.to_thread(process.wait) == 0
        assert "Traceback" not in process.stderr
        assert "a request was given up at the end" in process.stderr
    assert Books.read(database(config)).open == []


async def test_news_is_sent_before_the_end(tmp_path: Path, sandbox_alone: SandboxServer) -> None:
    """A budget is used up by the last call, long before the watch would have looked again."""
    sandbox_alone.rules.add(SMALL)
    async with inbox() as box:
        config = configured(
            tmp_path,
            sandbox_alone,
            {},
            teams={"growth": {"budget": {"day": 0.05}}},
            notify={"webhook": box.url, "secret": SECRET, "budget_percent": 1},
        )
        with GatewayProcess(config) as process:
            await asyncio.to_thread(process.wait_ready)
            async with http_of() as http:
                url = f"{process.base_url}/images/generations"
                assert (await http.post(url, json=asked("the last one"))).status_code == 200
            assert box.posts == []
            process.terminate()
            assert await asyncio.to_thread(process.wait) == 0
        [post] = box.posts
        assert post.json["type"] == "budget.warning"
        assert post.is_signed


def limited(limit: int) -> Any:
    """To be called in the child: it and all that it starts have so many descriptors."""

    def set_limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    return set_limit


async def test_with_few_descriptors_the_doors_are_shut_and_the_ledger_works(
    tmp_path: Path, sandbox_alone: SandboxServer
) -> None:
    """128 descriptors and 300 clients: each is served, or is told in one clean answer that there
    is no room; nothing that was let in fails for want of a file."""
    config = configured(tmp_path, sandbox_alone, {})
    sandbox_alone.rules.add(Rule(payload_bytes=2 * MIB))
    with GatewayProcess(config, before=limited(128)) as process:
        process.wait_ready()
        metrics = process.metrics()
        assert metrics['gateway_fds{kind="limit"}'] == 128
        statuses: Counter[int] = Counter()
        answers: list[bytes] = []

        async def knock(number: int) -> None:
            raw = await connect(process.port)
            with suppress(OSError):
                body = json.dumps(asked(f"picture {number}")).encode()
                head = (
                    f"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
                    f"authorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
                    f"content-length: {len(body)}\r\n\r\n"
                )
                await send(raw, head.encode() + body)
            try:
                whole = await read(raw)
            except OSError:
                statuses[0] += 1
                return
            finally:
                raw.close()
            statuses[int(whole[9:12] or 0)] += 1
            answers.append(whole)

        for batch in range(10):
            await asyncio.gather(*(knock(30 * batch + number) for number in range(30)))
        assert statuses[200] >= 10, statuses
        assert statuses[503] > 0, statuses
        assert set(statuses) <= {200, 503, 0}, statuses
        # A reset is what a client sees that was pushed out by sixteen others: rare, and clean too.
        assert statuses[0] <= statuses[503]
        for whole in answers:
            if whole.startswith(b"HTTP/1.1 503"):
                head, _, body = whole.partition(b"\r\n\r\n")
                assert json.loads(body)["error"]["code"] == "overloaded"
                assert b"retry-after:" in head
                assert b"connection: close" in head
        after = await asyncio.to_thread(process.metrics)
        assert after["gateway_connections_refused_total"] >= statuses[503] - statuses[200]
        assert after["gateway_ledger_open_holds"] == 0
        process.terminate()
        assert await asyncio.to_thread(process.wait) == 0
        text = process.stderr
        assert "Too many open files" not in text
        assert "Traceback" not in text
    books = Books.read(database(config))
    books.check()
    assert len(books.of("P")) >= statuses[200]
    assert books.open == []


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


async def test_many_large_answers_stay_within_the_budget_of_memory(
    tmp_path: Path, sandbox_alone: SandboxServer
) -> None:
    """40 answers of 20 MB at once: 800 MB, of which 16 MiB may be in memory. All of them are held
    at the same time, since no client reads until the last one has come."""
    count, size, budget = 40, 20_000_000, 16 * MIB
    config = configured(
        tmp_path,
        sandbox_alone,
        {},
        server={"host": "127.0.0.1", "buffer_bytes": "16MiB", "watch_seconds": 0},
    )
    sandbox_alone.rules.add(Rule(prompt="large", payload_bytes=size))
    sandbox_alone.rules.add(SMALL)
    with GatewayProcess(config) as process:
        process.wait_ready()
        async with http_of() as http:
            url = f"{process.base_url}/images/generations"
            assert (await http.post(url, json=asked("warm"))).status_code == 200
        before = resident(process.pid)
        raws = [await connect(process.port, receive_buffer=16_384) for _ in range(count)]
        for number, raw in enumerate(raws):
            await send(raw, request("json", f"large {number}"))
        peak = before

        def all_held() -> bool:
            nonlocal peak
            peak = max(peak, resident(process.pid))
            return process.metrics()['gateway_inflight_bytes{where="disk"}'] >= 0.9 * count * size

        await asyncio.to_thread(wait_until, all_held, "all of them are held", 120)
        assert process.metrics()['gateway_inflight_bytes{where="memory"}'] <= budget
        for raw in raws:
            raw.close()
        await asyncio.to_thread(
            wait_until,
            lambda: process.metrics()['gateway_inflight_bytes{where="disk"}'] == 0,
            "all is given back",
            60,
        )
        assert peak - before < 4 * budget, (before // MIB, peak // MIB)
        process.terminate()
        assert await asyncio.to_thread(process.wait) == 0


async def test_a_full_spool_is_a_refusal_with_a_time(start: Start) -> None:
    """Requests may have half of the disk's room: a body that does not fit is refused, unread."""
    changes = {"server": {"buffer_bytes": 1000, "spool_bytes": "2MiB"}}
    async with start(changes) as gateway:
        gateway.sandbox.rules.add(SMALL)
        client = await connect(gateway.port)
        await send(client, request("edit", "too large for the room"))
        answer = await read(client, until=b"}}")
        client.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 5" in head
        assert json.loads(body)["error"]["code"] == "overloaded"
        assert len(gateway.sandbox.journal) == 0
        async with gateway.http() as http:
            small = await http.post("/images/generations", json=asked("small"))
        assert small.status_code == 200
