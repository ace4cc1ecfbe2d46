"""A client that comes back finds its own flight: one purchase, one charge, one picture."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.domain.call import Call
from gateway.relay import doubts
from gateway.relay.arrival import Arrival, Draft
from gateway.relay.body import Spool
from gateway.relay.pipeline import Pipeline
from gateway.relay.read import ReadRules
from tests.flying import ASKED, COST, FRESH, GENERATIONS, PARTIAL, Fly, House, a_picture
from tests.raw import FORM, JSON, Field, RawClient, form, texts
from tests.running import KEY, OTHER_KEY

CI_KEY = "growth-ci-key-0123456789abcdef"
AGAIN = {"x-stainless-retry-count": "1"}
IMPATIENT_SECONDS = 1.0
HERE = Path(__file__).parent
TOOLS = HERE.parents[1] / ".tools"
NODE = shutil.which("node")
OPENAI_1 = TOOLS / "openai1" / "bin" / "python"


async def post(
    house: House, body: dict[str, Any], key: str = KEY, **headers: str
) -> httpx.Response:
    async with house.gateway.http(key) as http:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await http.post(GENERATIONS, json=body, headers=named)


def asking(
    house: House, body: dict[str, Any], key: str = KEY, **headers: str
) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(post(house, body, key, **headers))


@contextlib.asynccontextmanager
async def leaver(
    house: House, body: dict[str, Any] | None = None, *headers: str
) -> AsyncIterator[RawClient]:
    """A plain client that has asked, and waits."""
    content = json.dumps(body or ASKED).encode()
    async with RawClient.to(house.gateway.port, KEY) as client:
        await client.head(f"/v1{GENERATIONS}", (JSON, f"content-length: {len(content)}", *headers))
        await client.send(content)
        yield client


def reset(client: RawClient) -> None:
    """Ends a connection with RST, as a process that is killed does."""
    link: socket.socket = client.writer.get_extra_info("socket")
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.writer.transport.abort()


async def leave(house: House, body: dict[str, Any] | None = None, *headers: str) -> None:
    """A client asks and leaves; its flight goes on, and nobody waits for it."""
    flights = len(house.board.flights)
    async with leaver(house, body, *headers) as client:
        await house.watched_by(1, flights)
        client.writer.close()
        await house.watched_by(0, flights)


# SDKs whose patience is shorter than the picture takes


async def test_an_impatient_sdk_gets_the_picture_that_it_asked_for_first(house: House) -> None:
    gate = house.hold_back()
    async with house.gateway.sdk(max_retries=8, timeout=IMPATIENT_SECONDS) as sdk:
        asked = asyncio.ensure_future(
            sdk.images.with_raw_response.generate(**ASKED, extra_headers=FRESH)
        )
        await house.joins(1)
        gate.set()
        answer = await asked
    assert answer.headers["x-cache"] == "join"
    assert answer.headers["x-cost-usd"] == "0"
    assert answer.retries_taken >= 1
    again = await post(house, ASKED)
    assert (again.headers["x-cache"], again.content) == ("hit", answer.content)
    row = await house.settled(purchases=1, cached=2)
    assert (row.cost, row.avoided) == (COST, 2 * COST)
    receipts = {receipt.rid: receipt for receipt, _ in house.gateway.told.requests}
    joined = receipts[answer.headers["x-request-id"]]
    assert (joined.joined, joined.retried) == (house.board.flights[0], True)
    assert (joined.cost, joined.avoided) == (0, COST)


async def test_an_impatient_sdk_of_node(house: House) -> None:
    if NODE is None or not (TOOLS / "node" / "node_modules" / "openai").is_dir():
        pytest.skip("no Node.js, or no openai package: run tests/e2e/node/install.sh (needs npm)")
    said = await subprocess(
        house,
        [NODE, str(HERE / "node" / "patience.mjs")],
        NODE_TOOLS=str(TOOLS / "node"),
        TIMEOUT_MS=str(round(IMPATIENT_SECONDS * 1000)),
    )
    assert said["cache"] == "join"
    assert said["attempts"] >= 2
    await is_the_one_picture(house, said["b64"])


async def test_an_impatient_sdk_of_the_first_generation(house: House) -> None:
    if not OPENAI_1.exists():
        pytest.skip("no openai 1.x: run tests/e2e/openai1/install.sh (needs an index of packages)")
    said = await subprocess(
        house,
        [str(OPENAI_1), str(HERE / "openai1" / "impatient.py")],
        TIMEOUT_SECONDS=str(IMPATIENT_SECONDS),
    )
    assert said["version"].startswith("1.")
    assert said["cache"] == "join"
    assert said["attempts"] >= 2
    await is_the_one_picture(house, said["b64"])


async def subprocess(house: House, command: list[str], **environment: str) -> dict[str, Any]:
    """What an SDK got whose picture was made only after it had come back for it."""
    gate = house.hold_back()
    process = await asyncio.create_subprocess_exec(
        *command,
        env={
            "PATH": os.environ.get("PATH", ""),
            "OPENAI_BASE_URL": house.gateway.base_url,
            "OPENAI_API_KEY": KEY,
            "MODEL": str(ASKED["model"]),
            **environment,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    await house.joins(1)
    gate.set()
    async with asyncio.timeout(60):
        said, complaints = await process.communicate()
    assert process.returncode == 0, complaints.decode()
    found: dict[str, Any] = json.loads(said)
    return found


async def is_the_one_picture(house: House, b64: str) -> None:
    kept = await post(house, ASKED)
    assert (kept.headers["x-cache"], kept.json()["data"][0]["b64_json"]) == ("hit", b64)
    row = await house.settled(purchases=1, cached=2)
    assert row.cost == COST


async def test_an_impatient_edit_with_a_large_picture(house: House) -> None:
    picture = a_picture(1_700_000)
    assert len(picture) > 1_700_000
    gate = house.hold_back()
    async with house.gateway.sdk(max_retries=8, timeout=IMPATIENT_SECONDS) as sdk:
        asked = asyncio.ensure_future(
            sdk.images.with_raw_response.edit(
                image=("in.png", picture, "image/png"), **ASKED, extra_headers=FRESH
            )
        )
        await house.joins(1)
        gate.set()
        answer = await asked
    assert answer.headers["x-cache"] == "join"
    assert base64.b64decode(json.loads(answer.content)["data"][0]["b64_json"])
    await house.settled(purchases=1, cached=1)


async def test_a_retry_that_overtook_its_call_is_followed_by_it(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy gateway has not read the first call when its client has given up on it already."""
    read = Pipeline._taken_in

    async def slowly(
        self: Pipeline, arrival: Arrival, body: Spool, draft: Draft, rules: ReadRules
    ) -> Call:
        call = await read(self, arrival, body, draft, rules)
        if not arrival.retried:
            away = asyncio.Event()
            arrival.client.when_away(away.set)
            reading.set()
            await away.wait()
        return call

    monkeypatch.setattr(Pipeline, "_taken_in", slowly)
    reading, gate = asyncio.Event(), house.hold_back()
    async with leaver(house, ASKED, "cache-control: no-cache") as client:
        await reading.wait()
        again = asking(house, ASKED, **FRESH, **AGAIN)
        await gate.arrived()
        client.writer.close()
        await house.joins(1)
    gate.set()
    answer = await again
    assert answer.headers["x-cache"] == "miss"
    await house.settled(purchases=1)


async def test_an_impatient_stream(house: House) -> None:
    gate = house.hold_back()
    async with house.gateway.sdk(max_retries=8, timeout=IMPATIENT_SECONDS) as sdk:
        asked = asyncio.ensure_future(
            sdk.images.generate(**ASKED, stream=True, partial_images=2, extra_headers=FRESH)
        )
        await house.joins(1)
        gate.set()
        events = [event async for event in await asked]
    assert [event.type.rpartition(".")[2] for event in events] == [
        *("partial_image", "partial_image"),
        "completed",
    ]
    row = await house.settled(purchases=1, cached=1)
    assert row.cost == COST + 2 * PARTIAL


async def events(chunks: AsyncIterator[bytes], count: int) -> bytes:
    """What came until so many events were whole."""
    came = b""
    while came.count(b"\n\n") < count:
        came += await anext(chunks)
    return came


async def test_one_who_comes_late_to_a_stream_has_all_of_it(fly: Fly) -> None:
    """The partial pictures that were there before, then the rest: the very bytes of the first."""
    streamed = {**ASKED, "stream": True, "partial_images": 3}
    async with fly({"cache": {"enabled": False}}) as house, house.gateway.http() as http:
        gate = house.hold_back(wait_after=2)
        async with http.stream("POST", GENERATIONS, json=streamed) as first:
            assert first.headers["x-request-id"] == (await house.flying())[0]
            async with http.stream("POST", GENERATIONS, json=streamed, headers=AGAIN) as second:
                assert second.headers["x-cache"] == "join"
                came, late = first.aiter_bytes(), second.aiter_bytes()
                content, again = await events(came, 2), await events(late, 2)
                gate.set()
                content += b"".join([chunk async for chunk in came])
                again += b"".join([chunk async for chunk in late])
        assert again == content
        assert content.count(b"event: ") == 4
        assert "x-budget-remaining-usd" not in second.headers
        await house.settled(purchases=1, cached=1)


# Two live calls are two


async def test_two_live_calls_that_are_the_same_are_two(house: House) -> None:
    gate = house.hold_back()
    calls = [asking(house, ASKED, **FRESH) for _ in range(2)]
    await gate.arrived(2)
    gate.set()
    answers = await asyncio.gather(*calls)
    assert [answer.headers["x-cache"] for answer in answers] == ["miss", "miss"]
    assert house.board.joined == []
    await house.settled(purchases=2, cached=0)


async def test_two_that_gave_up_find_their_two_flights(house: House) -> None:
    gate = house.hold_back()
    async with house.gateway.sdk(max_retries=8, timeout=IMPATIENT_SECONDS) as sdk:
        calls = [
            asyncio.ensure_future(
                sdk.images.with_raw_response.generate(**ASKED, extra_headers=FRESH)
            )
            for _ in range(2)
        ]
        await gate.arrived(2)
        await house.board.until(lambda: len(set(house.board.joined)) == 2)
        gate.set()
        answers = await asyncio.gather(*calls)
    assert [answer.headers["x-cache"] for answer in answers] == ["join", "join"]
    assert (
        answers[0].headers["x-upstream-request-id"] != answers[1].headers["x-upstream-request-id"]
    )
    row = await house.settled(purchases=2, cached=2)
    assert row.cost == 2 * COST


# Plain clients, which do not say that they come again


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_plain_client_that_left_joins_what_it_left(house: House, how: str) -> None:
    gate = house.hold_back()
    async with leaver(house) as client:
        await house.watched_by(1)
        await gate.arrived()
        if how == "reset":
            reset(client)
        else:
            client.writer.close()
        await house.watched_by(0)
    again = asking(house, ASKED)
    await house.joins(1)
    gate.set()
    answer = await again
    assert (answer.status_code, answer.headers["x-cache"]) == (200, "join")
    await house.settled(purchases=1, cached=1)


async def test_a_client_that_hung_up_is_joined_and_answered_all_the_same(house: House) -> None:
    gate = house.hold_back()
    async with leaver(house) as client:
        await house.watched_by(1)
        client.writer.write_eof()
        await house.watched_by(0)
        again = asking(house, ASKED)
        await house.joins(1)
        gate.set()
        first, second = await client.answer(), await again
    assert (first.status, first.header("x-cache")) == (200, "miss")
    assert (second.headers["x-cache"], second.content) == ("join", first.body)
    await house.settled(purchases=1, cached=1)


@pytest.mark.parametrize(
    "who", ["no-cache", "no-store", "another key of the team", "another team", "another prompt"]
)
async def test_an_orphan_is_nobody_elses(fly: Fly, who: str) -> None:
    async with fly({"teams": {"growth": {"keys": [KEY, CI_KEY]}}}) as house:
        gate = house.hold_back()
        await leave(house)
        key = {"another key of the team": CI_KEY, "another team": OTHER_KEY}.get(who, KEY)
        said = {"cache-control": who} if who in ("no-cache", "no-store") else {}
        body = {**ASKED, "prompt": "A dune"} if who == "another prompt" else ASKED
        other = asking(house, body, key, **said)
        await gate.arrived(2)
        gate.set()
        answer = await other
        assert answer.headers["x-cache"] == "miss"
        assert house.board.joined == []
        await house.settled(purchases=2, cached=0)


@pytest.mark.parametrize("who", [CI_KEY, OTHER_KEY])
async def test_nor_is_a_flight_the_retry_of_another_key(fly: Fly, who: str) -> None:
    async with fly({"teams": {"growth": {"keys": [KEY, CI_KEY]}}}) as house:
        gate = house.hold_back()
        await leave(house)
        other = asking(house, ASKED, who, **AGAIN)
        await gate.arrived(2)
        gate.set()
        assert (await other).headers["x-cache"] == "miss"
        assert house.board.joined == []
        await house.settled(purchases=2, cached=0)


async def test_an_edit_of_a_plain_client_is_found_by_its_pictures(house: House) -> None:
    gate, path = house.hold_back(), "/v1/images/edits"
    picture, other = a_picture(5000), a_picture(5000)
    told = {name: str(value) for name, value in ASKED.items()}
    body = form(*texts(**told), Field("image", picture, "in.png"))
    async with RawClient.to(house.gateway.port, KEY) as client:
        await client.head(path, (FORM, f"content-length: {len(body)}"))
        await client.send(body)
        await house.watched_by(1)
        client.writer.close()
        await house.watched_by(0)
    async with (
        RawClient.to(house.gateway.port, KEY) as same,
        RawClient.to(house.gateway.port, KEY) as different,
    ):
        found = asyncio.create_task(same.post(path, body, (FORM,)))
        await house.joins(1)
        unlike = form(*texts(**told), Field("image", other, "in.png"))
        bought = asyncio.create_task(different.post(path, unlike, (FORM,)))
        await gate.arrived(2)
        gate.set()
        assert (await found).header("x-cache") == "join"
        assert (await bought).header("x-cache") == "miss"
    await house.settled(purchases=2, cached=1)


# What ended while nobody was there


async def test_what_landed_while_nobody_was_there_is_kept_for_who_comes_back(
    fly: Fly, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doubts, "RETRY_SECONDS", 0)
    async with fly({"cache": {"enabled": False}}) as house:
        gate = house.hold_back()
        await leave(house)
        gate.set()
        await house.over()
        kept = await post(house, ASKED, **AGAIN)
        assert (kept.status_code, kept.headers["x-cache"]) == (200, "join")
        await house.settled(purchases=1, cached=1)
        # It has been handed over: who asks now wants another picture.
        await house.watched_by(0)
        fresh = await post(house, ASKED, **AGAIN)
        assert fresh.headers["x-cache"] == "off"
        await house.settled(purchases=2, cached=1)


async def test_with_the_cache_on_a_retry_that_wants_a_fresh_one_buys_it_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doubts, "RETRY_SECONDS", 0)
    gate = house.hold_back()
    await leave(house, None, "cache-control: no-cache")
    gate.set()
    await house.over()
    for expected in ("join", "miss"):
        answer = await post(house, ASKED, **AGAIN, **FRESH)
        assert answer.headers["x-cache"] == expected
        await house.watched_by(0)
    await house.settled(purchases=2, cached=1)


async def test_an_sdk_that_gave_up_as_its_picture_came_gets_it(fly: Fly) -> None:
    """Its answer was written to a socket that it does not read any more, and then it asks again."""
    async with fly({"cache": {"enabled": False}}) as house:
        house.rule()
        late = await post(house, ASKED)
        assert (late.status_code, late.headers["x-cache"]) == (200, "off")
        again = await post(house, ASKED, **AGAIN)
        assert (again.headers["x-cache"], again.content) == ("join", late.content)
        # The end of a script looks the same, and another run of it wants another picture.
        another = await post(house, ASKED)
        assert another.headers["x-cache"] == "off"
        await house.settled(purchases=2, cached=1)


async def test_a_stream_that_landed_while_nobody_was_there(fly: Fly) -> None:
    streamed = {**ASKED, "stream": True, "partial_images": 2}
    async with fly({"cache": {"enabled": False}}) as house:
        gate = house.hold_back()
        await leave(house, streamed)
        gate.set()
        await house.over()
        kept = await post(house, streamed, **AGAIN)
        assert kept.headers["x-cache"] == "join"
        assert b"event: image_generation.completed" in kept.content
        await house.settled(purchases=1, cached=1)


async def test_what_was_refused_meanwhile_is_asked_for_again(house: House) -> None:
    gate = house.hold_back(status=400)
    await leave(house)
    gate.set()
    await house.over()
    house.rule()
    answer = await post(house, ASKED, **AGAIN)
    assert (answer.status_code, answer.headers["x-cache"]) == (200, "miss")
    assert house.board.joined == []
    await house.settled(purchases=1, cached=0)


async def test_what_may_have_been_bought_is_not_bought_again(house: House) -> None:
    gate = house.hold_back(status=504, billed=True)
    await leave(house)
    gate.set()
    await house.over()
    house.rule()
    answer = await post(house, ASKED, **AGAIN)
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-cache"] == "join"
    assert answer.status_code in (502, 504)
    assert house.purchases == 1
    assert house.board.flights[0] in answer.json()["error"]["message"]
    await house.gateway.gateway.flights.idle()
    [row] = await house.gateway.usage()
    assert (row.requests, row.unresolved) == (1, 1)
    assert await house.store.books.audit() == []


async def test_a_running_flight_that_is_refused_refuses_all_who_wait(house: House) -> None:
    gate = house.hold_back(status=400)
    first = asking(house, ASKED)
    await house.watched_by(1)
    again = asking(house, ASKED, **AGAIN)
    await house.watched_by(2)
    gate.set()
    answers = await asyncio.gather(first, again)
    assert [answer.status_code for answer in answers] == [400, 400]
    assert answers[0].content == answers[1].content
    await house.settled(purchases=0, cached=0)
