"""An Idempotency-Key: one purchase and one charge, whatever becomes of the request under it.

The rows are those of the table in the README: what the books say of the key's first request
decides what the next one under it gets.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from gateway.relay.joining import KEEPING_SECONDS
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
    a_picture,
)
from tests.raw import FORM, Field, RawClient, form, texts
from tests.running import KEY, OTHER_KEY

CI_KEY = "growth-ci-key-0123456789abcdef"
ORDER = "order-1"
OFF = {"cache": {"enabled": False}}
REPEAT = {"relay": {"on_unknown": "repeat"}}
STREAMED = {**ASKED, "stream": True, "partial_images": 2}
OTHER = {**ASKED, "prompt": "A dune"}


async def order(
    house: House,
    body: dict[str, Any] = ASKED,
    key: str = KEY,
    *,
    under: str = ORDER,
    **headers: str,
) -> httpx.Response:
    async with house.gateway.http(key) as http:
        return await http.post(
            GENERATIONS, json=body, headers={"idempotency-key": under, **headers}
        )


def ordering(house: House, *args: Any, **named: Any) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(order(house, *args, **named))


def error_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    return answer.status_code, answer.json()["error"]["code"], answer.headers.get("x-should-retry")


REUSED = (422, "idempotency_key_reused", "false")
UNKNOWN = (502, "upstream_outcome_unknown", "false")


# It runs


async def test_who_asks_while_it_runs_joins_it(house: House) -> None:
    gate = house.hold_back()
    first = ordering(house)
    await house.watched_by(1)
    second = ordering(house)
    other = await order(house, OTHER)
    assert error_of(other) == REUSED
    gate.set()
    answers = await asyncio.gather(first, second)
    assert [answer.headers["x-cache"] for answer in answers] == ["miss", "join"]
    assert answers[0].content == answers[1].content
    assert "idempotent-replayed" not in answers[1].headers
    assert answers[1].headers["x-cost-usd"] == "0"
    await house.settled(purchases=1, cached=1)


async def test_twenty_at_once_are_one_purchase(fly: Fly) -> None:
    async with fly(OFF) as house, house.gateway.http() as http:
        answers = await asyncio.gather(
            *(
                http.post(GENERATIONS, json=ASKED, headers={"idempotency-key": ORDER})
                for _ in range(20)
            )
        )
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        paid = [answer for answer in answers if answer.headers["x-cost-usd"] != "0"]
        assert len(paid) == 1
        row = await house.settled(purchases=1, cached=19)
        assert (row.cost, row.avoided) == (COST, 19 * COST)


async def test_a_stream_that_runs_is_joined_as_a_stream(fly: Fly) -> None:
    async with fly(OFF) as house:
        gate = house.hold_back()
        first = ordering(house, STREAMED)
        await house.watched_by(1)
        second = ordering(house, STREAMED)
        await asyncio.sleep(0)
        gate.set()
        answers = await asyncio.gather(first, second)
        assert answers[0].content == answers[1].content
        assert answers[0].content.count(b"event: ") == 3
        row = await house.settled(purchases=1, cached=1)
        assert row.cost == COST + 2 * PARTIAL


# It was answered


@pytest.mark.parametrize("changes", [{}, OFF], ids=["cache", "no cache"])
@pytest.mark.parametrize("body", [ASKED, STREAMED], ids=["json", "stream"])
async def test_what_was_answered_is_answered_again(
    fly: Fly, changes: dict[str, Any], body: dict[str, Any]
) -> None:
    async with fly(changes) as house:
        first = await order(house, body)
        await house.over()
        for _ in range(3):
            again = await order(house, body, **FRESH)
            assert (again.status_code, again.headers["x-cache"]) == (200, "hit")
            assert again.headers["idempotent-replayed"] == "true"
            assert again.headers["x-cost-usd"] == "0"
            assert again.headers["content-type"] == first.headers["content-type"]
            assert again.headers["x-request-id"] != first.headers["x-request-id"]
            # Of a stream its end: the pictures before it were previews.
            assert first.content.endswith(again.content)
            assert len(again.content) > PICTURE_BYTES
        await house.settled(purchases=1, cached=3)


async def test_another_body_is_refused_even_where_the_cache_has_it(house: House) -> None:
    await order(house)
    bought = await order(house, OTHER, under="order-2")
    await house.over(2)
    for headers in ({}, FRESH):
        other = await order(house, OTHER, **headers)
        assert error_of(other) == REUSED
        assert other.json()["error"]["param"] == "Idempotency-Key"
    # And the cache is what answers where there is no key.
    async with house.gateway.http() as http:
        hit = await http.post(GENERATIONS, json=OTHER)
    assert (hit.headers["x-cache"], hit.content) == ("hit", bought.content)
    await house.settled(purchases=2, cached=1)


async def test_each_route_team_and_key_string_is_its_own(fly: Fly) -> None:
    async with fly({"teams": {"growth": {"keys": [KEY, CI_KEY]}}, **OFF}) as house:
        picture = a_picture(5000)
        told = {name: str(value) for name, value in ASKED.items()}
        body = form(*texts(**told), Field("image", picture, "in.png"))
        await order(house)
        async with RawClient.to(house.gateway.port, KEY) as client:
            edited = await client.post(
                "/v1/images/edits", body, (FORM, f"idempotency-key: {ORDER}")
            )
        assert (edited.status, edited.header("idempotent-replayed")) == (200, None)
        another = await order(house, ASKED, OTHER_KEY)
        assert another.headers.get("idempotent-replayed") is None
        # The key is the team's, whichever of its own keys asks.
        same = await order(house, ASKED, CI_KEY)
        assert same.headers["idempotent-replayed"] == "true"
        await house.settled(purchases=3, cached=1)


async def test_a_picture_is_replayed_in_the_form_that_is_asked_for(fly: Fly) -> None:
    async with fly(OFF) as house:
        first = await order(house)
        await house.over()
        streamed = await order(house, {**ASKED, "stream": True})
        assert streamed.status_code == 200
        assert streamed.headers["idempotent-replayed"] == "true"
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert first.json()["data"][0]["b64_json"].encode() in streamed.content
        await house.settled(purchases=1, cached=1)


async def test_several_pictures_have_no_form_as_events(fly: Fly) -> None:
    async with fly(OFF) as house:
        several = {**ASKED, "n": 2}
        await order(house, several)
        await house.over()
        answer = await order(house, {**several, "stream": True})
        assert answer.status_code in (400, 422)
        assert house.purchases == 1


async def test_a_replay_costs_a_request_of_the_rate_and_no_picture(fly: Fly) -> None:
    limits = {"requests_per_minute": 3, "images_per_minute": 1, "concurrent_requests": 1}
    async with fly({"teams": {"growth": {"limits": limits}}, **OFF}) as house:
        for _ in range(3):
            assert (await order(house)).status_code == 200
            await house.over()
        refused = await order(house)
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            429,
            "rate_limit_exceeded",
        )
        await house.settled(purchases=1, cached=2)


async def test_it_is_kept_for_a_day_and_then_gone_for_good(fly: Fly) -> None:
    async with fly(OFF) as house:
        await order(house)
        await house.over()
        house.gateway.clock.advance(hours=23, minutes=59)
        assert (await order(house)).headers["idempotent-replayed"] == "true"
        await house.settled(purchases=1, cached=1)


async def test_a_result_that_is_gone_is_never_made_again(fly: Fly) -> None:
    """The books remember the key for longer than this answer was kept."""
    async with fly({**OFF, "results": {"ttl": "10m", "idempotent_ttl": "1h"}}) as house:
        await order(house)
        await house.over()
        house.gateway.clock.advance(hours=2)
        # At once: what was settled so long ago is not on its way to where it is kept any more.
        async with asyncio.timeout(KEEPING_SECONDS / 2):
            gone = await order(house)
        assert error_of(gone) == (410, "idempotent_result_expired", "false")
        assert gone.headers["x-cost-usd"] == "0"
        await house.settled(purchases=1, cached=0)


# It was not


@pytest.mark.parametrize("status", [400, 500])
async def test_what_was_surely_not_bought_is_asked_for_again(fly: Fly, status: int) -> None:
    async with fly({**OFF, "relay": {"attempts": 1}}) as house:
        house.rule(status=status, times=1)
        refused = await order(house)
        assert refused.status_code >= 400
        await house.over()
        house.rule()
        other = await order(house, OTHER)
        assert error_of(other) == REUSED
        again = await order(house)
        assert (again.status_code, again.headers.get("idempotent-replayed")) == (200, None)
        await house.over(2)
        assert (await order(house)).headers["idempotent-replayed"] == "true"
        await house.settled(purchases=1, cached=1)


async def test_what_was_refused_at_the_door_keeps_nothing(fly: Fly) -> None:
    async with fly({"teams": {"growth": {"budget": {"day": 0.001}}}}) as house:
        for body in ({**ASKED, "size": "big"}, ASKED, OTHER):
            assert (await order(house, body)).status_code in (400, 429)
        assert (await order(house, ASKED, "no-such-key-0123456789")).status_code == 401
        await house.over(len(house.board.flights))
        await house.settled(purchases=0, cached=0)


# Nobody knows


async def test_an_unknown_outcome_is_told_again_and_not_bought_again(house: House) -> None:
    house.rule(status=504, billed=True)
    first = await order(house)
    assert first.headers["x-should-retry"] == "false"
    await house.over()
    house.rule()
    for _ in range(2):
        again = await order(house)
        assert error_of(again) == UNKNOWN
        assert house.board.flights[0] in again.json()["error"]["message"]
    assert error_of(await order(house, OTHER)) == REUSED
    assert house.purchases == 1
    await house.settled(purchases=1, cached=0, cost=BOUND)


async def test_where_configured_an_unknown_outcome_is_bought_again_once(fly: Fly) -> None:
    async with fly({**OFF, **REPEAT}) as house:
        house.rule(status=504, billed=True, times=1)
        await order(house)
        await house.over()
        house.rule()
        answers = await asyncio.gather(*(order(house) for _ in range(5)))
        assert {answer.status_code for answer in answers} == {200}
        await house.over(2)
        assert (await order(house)).headers["idempotent-replayed"] == "true"
        assert len({answer.content for answer in answers}) == 1
        row = await house.settled(purchases=2, cached=5, cost=BOUND + COST)
        assert row.unresolved == 1
