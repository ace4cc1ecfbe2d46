"""What was bought is there by its request id: while it runs, when it is over, and until its time is
up; on another connection than it was asked for on, and without having waited on any."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from openai import APIError, APIStatusError

from gateway.ports import Cached
from gateway.relay.results import Results
from gateway.sandbox.rules import Drip, Rule
from tests.flying import (
    ASKED,
    BOUND,
    COST,
    FRESH,
    GENERATIONS,
    PARTIAL,
    PICTURE_BYTES,
    Fly,
    House,
)
from tests.inbox import SECRET, inbox
from tests.raw import JSON, RawClient
from tests.running import KEY, OTHER_KEY

RESULTS = "/images/results/"
NOBODYS = "req_0123456789abcdef01234567"
ASYNC = {"prefer": "respond-async"}
STREAMED = {**ASKED, "stream": True, "partial_images": 2}
SILENCE_SECONDS = 0.2


async def post(
    house: House,
    body: dict[str, Any] = ASKED,
    headers: dict[str, str] | None = None,
) -> httpx.Response:
    async with house.gateway.http() as http:
        return await http.post(GENERATIONS, json=body, headers=headers)


async def get(house: House, rid: str, key: str = KEY, **headers: str) -> httpx.Response:
    async with house.gateway.http(key) as http:
        return await http.get(f"{RESULTS}{rid}", headers=headers)


def error_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    return answer.status_code, answer.json()["error"]["code"], answer.headers.get("x-should-retry")


# Asked for by its id


async def test_a_result_while_it_runs_and_when_it_is_there(house: House) -> None:
    gate = house.hold_back()
    asking = asyncio.create_task(post(house))
    [rid] = await house.flying()
    running = await get(house, rid)
    assert running.status_code == 202
    document = running.json()
    assert document.pop("progress").keys() == {"partial_images", "seconds"}
    assert document == {
        "id": rid,
        "object": "image.result",
        "status": "in_progress",
        "created_at": round(house.gateway.clock.now().timestamp()),
        "operation": "generation",
        "model": ASKED["model"],
        "result_url": f"/v1{RESULTS}{rid}",
    }
    assert running.headers["location"] == f"/v1{RESULTS}{rid}"
    assert running.headers["retry-after"]
    waiting = asyncio.create_task(get(house, rid, prefer="wait=20"))
    gate.set()
    answer, waited = await asyncio.gather(asking, waiting)
    assert answer.headers["x-request-id"] == rid
    for found in (waited, await get(house, rid)):
        assert (found.status_code, found.content) == (200, answer.content)
        assert found.headers["content-type"] == "application/json"
        assert found.headers["cache-control"] == "no-store"
    await house.settled(purchases=1, cached=0)


async def test_the_partial_pictures_of_a_stream_are_counted(house: House) -> None:
    house.rule(drip=Drip(PICTURE_BYTES, 0.1))
    asking = asyncio.create_task(post(house, STREAMED))
    [rid] = await house.flying()
    await house.board.until(lambda: house.board.partials(rid) >= 1)
    running = await get(house, rid)
    if running.status_code == 202:
        assert running.json()["progress"]["partial_images"] >= 1
    streamed = await asking
    await house.over()
    found = await get(house, rid)
    assert found.status_code == 200
    picture = found.json()["data"][0]["b64_json"]
    assert picture.encode() in streamed.content
    row = await house.settled(purchases=1, cached=0)
    assert row.cost == COST + 2 * PARTIAL


async def test_a_result_is_its_teams_own(house: House) -> None:
    gate = house.hold_back()
    asking = asyncio.create_task(post(house))
    [rid] = await house.flying()
    for _ in range(2):
        nobodys = await get(house, NOBODYS, OTHER_KEY)
        theirs = await get(house, rid, OTHER_KEY)
        assert error_of(theirs)[0] == error_of(nobodys)[0] == 404
        assert theirs.text.replace(rid, NOBODYS) == nobodys.text
        assert (await get(house, "x", OTHER_KEY)).status_code == 404
        assert (await get(house, rid, "no-such-key-0123456789abcdef")).status_code == 401
        gate.set()
        await asking
        await house.over()
    await house.settled(purchases=1, cached=0)


async def test_one_who_joined_finds_it_by_an_id_of_its_own(house: House) -> None:
    gate = house.hold_back()
    first = asyncio.create_task(post(house))
    await house.watched_by(1)
    second = asyncio.create_task(post(house, headers={"x-stainless-retry-count": "1"}))
    await house.watched_by(2)
    gate.set()
    answers = await asyncio.gather(first, second)
    own = {answer.headers["x-request-id"] for answer in answers}
    assert len(own) == 2
    await house.over()
    for rid in own:
        assert (await get(house, rid)).content == answers[0].content
    await house.settled(purchases=1, cached=1)


async def test_an_error_is_a_result_too(house: House) -> None:
    house.rule(status=504, billed=True)
    answer = await post(house)
    await house.over()
    found = await get(house, answer.headers["x-request-id"])
    assert (found.status_code, found.content) == (answer.status_code, answer.content)
    assert found.headers["x-should-retry"] == "false"
    await house.settled(purchases=1, cached=0, cost=BOUND)


async def test_a_refusal_of_the_upstream_is_a_result_too(house: House) -> None:
    house.rule(status=400)
    answer = await post(house)
    await house.over()
    found = await get(house, answer.headers["x-request-id"])
    assert (found.status_code, found.content) == (400, answer.content)
    await house.settled(purchases=0, cached=0)


@pytest.mark.parametrize("keyed", [False, True])
async def test_its_time_has_an_end(fly: Fly, keyed: bool) -> None:
    async with fly({"results": {"ttl": "15m", "idempotent_ttl": "24h"}}) as house:
        headers = {"idempotency-key": "order-1"} if keyed else {}
        rid = (await post(house, headers=headers)).headers["x-request-id"]
        await house.over()
        house.gateway.clock.advance(**({"hours": 23} if keyed else {"minutes": 14}))
        assert (await get(house, rid)).status_code == 200
        house.gateway.clock.advance(hours=2)
        gone = await get(house, rid)
        assert error_of(gone)[0] == 410
        assert error_of(await get(house, rid, OTHER_KEY))[0] == 404
        await house.settled(purchases=1, cached=0)


@pytest.mark.parametrize("method", ["HEAD", "POST", "DELETE"])
async def test_results_are_only_fetched(house: House, method: str) -> None:
    async with house.gateway.http() as http:
        answer = await http.request(method, f"{RESULTS}{NOBODYS}")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")


@pytest.mark.parametrize(
    ("headers", "kept"),
    [({}, False), ({"idempotency-key": "order-1"}, True), (ASYNC, True)],
    ids=["plain", "with a key", "asynchronous"],
)
async def test_what_is_not_to_be_stored_is_not_kept(
    house: House, headers: dict[str, str], kept: bool
) -> None:
    answer = await post(house, headers={"cache-control": "no-store", **headers})
    await house.over()
    found = await get(house, answer.headers["x-request-id"], prefer="wait=20")
    assert found.status_code == (200 if kept else 410)
    await house.settled(purchases=1, cached=0)


@pytest.mark.parametrize("asked", ["by its id", "again"])
async def test_what_is_put_away_while_it_is_looked_for_is_found(
    fly: Fly, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """The first look comes too early, the second, at the flight, too late: it has ended."""
    async with fly({"cache": {"enabled": False}}) as house:
        gate = house.hold_back()
        asking = asyncio.create_task(post(house))
        [rid] = await house.flying()
        asking.cancel()
        await house.watched_by(0)
        gate.set()
        await house.over()
        house.gateway.clock.advance(seconds=60)
        locate, looks = Results.locate, 0

        async def too_early(results: Results, rid: str, team: str) -> tuple[str, Cached | None]:
            nonlocal looks
            looks += 1
            return (rid, None) if looks == 1 else await locate(results, rid, team)

        monkeypatch.setattr(Results, "locate", too_early)
        if asked == "again":
            found = await post(house, headers={"x-stainless-retry-count": "1"})
        else:
            found = await get(house, rid)
        assert (found.status_code, looks) == (200, 2 if asked == "again" else 3)
        assert found.json()["data"][0]["b64_json"]
        await house.settled(purchases=1, cached=int(asked == "again"))


# Not waited for


@pytest.mark.parametrize("headers", [ASYNC, {"x-gateway-async": "true"}])
async def test_who_does_not_wait_is_told_where_it_will_be(
    house: House, headers: dict[str, str]
) -> None:
    gate = house.hold_back()
    answer = await post(house, headers=headers)
    [rid] = house.board.flights
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1{RESULTS}{rid}"
    assert answer.headers["preference-applied"] == "respond-async"
    assert answer.headers["x-request-id"] == answer.json()["id"] == rid
    assert await house.gateway.gateway.ledger.open_holds() == 1
    gate.set()
    found = await get(house, rid, prefer="wait=20")
    assert found.json()["data"][0]["b64_json"]
    row = await house.settled(purchases=1, cached=0)
    assert row.cost == COST


async def test_what_is_refused_is_refused_at_once(fly: Fly) -> None:
    async with fly({"teams": {"growth": {"budget": {"day": 0.001}}}}) as house:
        poor = await post(house, headers=ASYNC)
        assert error_of(poor) == (429, "insufficient_quota", "false")
        wrong = await post(house, {**ASKED, "n": 0}, ASYNC)
        assert wrong.status_code == 400
        await house.over(len(house.board.flights))
        assert all(rid not in house.board for rid in house.board.flights)
        await house.settled(purchases=0, cached=0)


async def test_who_leaves_after_it_was_accepted_changes_nothing(house: House) -> None:
    gate = house.hold_back()
    content = json.dumps(ASKED).encode()
    async with RawClient.to(house.gateway.port, KEY) as client:
        answer = await client.post(f"/v1{GENERATIONS}", content, (JSON, "prefer: respond-async"))
    assert answer.status == 202
    gate.set()
    found = await get(house, str(answer.header("x-request-id")), prefer="wait=20")
    assert found.status_code == 200
    await house.settled(purchases=1, cached=0)


async def test_a_key_that_is_sent_twice_has_one_location(house: House) -> None:
    gate = house.hold_back()
    keyed = {**ASYNC, "idempotency-key": "order-1"}
    first, second = await post(house, headers=keyed), await post(house, headers=keyed)
    assert first.status_code == second.status_code == 202
    assert first.headers["location"] == second.headers["location"]
    assert second.headers["x-cache"] == "join"
    gate.set()
    rid = first.headers["location"].rpartition("/")[2]
    found = await get(house, rid, prefer="wait=20")
    await house.over()
    replayed = await post(house, headers=keyed)
    assert (replayed.status_code, replayed.content) == (200, found.content)
    assert replayed.headers["idempotent-replayed"] == "true"
    await house.settled(purchases=1, cached=1)


@pytest.mark.parametrize("failed", [False, True])
async def test_the_webhook_hears_of_the_end(fly: Fly, failed: bool) -> None:
    async with (
        inbox(500, 204) as box,
        fly({"results": {"webhook": box.url, "secret": SECRET}}) as house,
    ):
        gate = house.hold_back(**({"status": 400} if failed else {}))
        accepted = await post(house, headers=ASYNC)
        waited = asyncio.create_task(post(house, {**ASKED, "prompt": "A dune"}))
        await gate.arrived(2)
        assert box.posts == []
        gate.set()
        await waited
        posts = await box.until(2)
        # The first try was not taken; it is the same message, and nobody hears of who waited.
        assert len({one.headers["webhook-id"] for one in posts}) == 1
        assert all(one.is_signed for one in posts)
        said = posts[-1].json
        assert said["type"] == f"image.result.{'failed' if failed else 'completed'}"
        assert said["data"]["id"] == accepted.json()["id"]
        assert said["data"]["result_url"] == accepted.headers["location"]
        assert said["data"]["status"] == (400 if failed else 200)
        assert said["data"]["cost_usd"] == ("0" if failed else "0.005895")
        assert ASKED["prompt"] not in posts[-1].body.decode()
        assert len(posts) == 2
        await house.settled(purchases=0 if failed else 2, cached=0)


# A silence that is broken


def quiet(**changes: Any) -> dict[str, Any]:
    return {"relay": {"keep_alive_seconds": SILENCE_SECONDS, **changes}}


async def test_a_silent_stream_says_that_it_lives(fly: Fly) -> None:
    async with fly(quiet()) as house, house.gateway.http() as http:
        gate = house.hold_back()
        async with http.stream("POST", GENERATIONS, json=STREAMED) as stream:
            assert stream.status_code == 200
            assert stream.headers["x-request-id"] == house.board.flights[0]
            assert not gate.is_set()
            body = stream.aiter_bytes()
            first = await anext(body)
            assert first.startswith(b": keepalive")
            gate.set()
            rest = b"".join([chunk async for chunk in body])
        names = [line.rpartition(b".")[2] for line in rest.splitlines() if b"event: " in line]
        assert names == [b"partial_image", b"partial_image", b"completed"]
        await house.settled(purchases=1, cached=0)


async def test_json_behind_a_broken_silence_is_one_completed_event(fly: Fly) -> None:
    async with fly(quiet()) as house, house.gateway.sdk() as sdk:
        gate = house.hold_back(json_for_stream=True)
        stream = await sdk.images.generate(**ASKED, stream=True, extra_headers=FRESH)
        gate.set()
        [event] = [event async for event in stream]
        assert event.type == "image_generation.completed"
        assert event.b64_json
        row = await house.settled(purchases=1, cached=0)
        assert row.cost == COST


@pytest.mark.parametrize("fault", [{"status": 400}, {"status": 504, "billed": True}])
async def test_an_error_behind_a_broken_silence_is_an_event(
    fly: Fly, fault: dict[str, Any]
) -> None:
    async with fly(quiet(attempts=1)) as house, house.gateway.sdk(max_retries=2) as sdk:
        gate = house.hold_back(**fault)
        stream = await sdk.images.generate(**ASKED, stream=True, extra_headers=FRESH)
        gate.set()
        with pytest.raises(APIError) as raised:
            _ = [event async for event in stream]
        assert not isinstance(raised.value, APIStatusError)
        assert raised.value.message
        unknown = "billed" in fault
        await house.settled(purchases=int(unknown), cached=0, cost=BOUND if unknown else 0)
        assert house.purchases == 1


async def test_an_error_before_the_silence_was_broken_is_a_status(house: House) -> None:
    house.rule(status=429)
    answer = await post(house, STREAMED)
    assert answer.status_code >= 429
    assert answer.headers["content-type"] == "application/json"
    await house.settled(purchases=0, cached=0)


# A patience that has an end


async def test_who_may_not_wait_longer_is_told_where_to_ask(fly: Fly) -> None:
    async with fly({"relay": {"max_wait_seconds": 0.3}}) as house:
        gate = house.hold_back()
        async with house.gateway.sdk(max_retries=5) as sdk:
            with pytest.raises(APIStatusError) as raised:
                await sdk.images.generate(**ASKED)
        [(receipt, delivery)] = await told_of(house, gate)
        error = raised.value
        assert (error.status_code, error.code) == (504, "still_running")
        assert error.response.headers["x-should-retry"] == "false"
        [rid] = house.board.flights
        assert error.response.headers["x-request-id"] == rid == receipt.rid
        assert rid in error.message
        assert delivery.status == 504
        found = await get(house, rid, prefer="wait=20")
        assert found.status_code == 200
        row = await house.settled(purchases=1, cached=0)
        assert row.cost == COST


async def told_of(house: House, gate: Any) -> list[Any]:
    """The one request that came, once its flight was let go."""
    gate.set()
    return list(await house.gateway.told.until(1))


async def test_a_stream_waits_as_long_as_it_takes(fly: Fly) -> None:
    async with fly({"relay": {"max_wait_seconds": 0.1}}) as house:
        house.gateway.sandbox.rules.clear()
        house.gateway.sandbox.rules.add(Rule(payload_bytes=400, delay_seconds=0.3))
        answer = await post(house, STREAMED)
        assert answer.status_code == 200
        await house.settled(purchases=1, cached=0)
