"""News of asynchronous requests, posted to a receiver that is away at first."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import pytest

from gateway.notify import Webhooks
from gateway.ports import Message
from gateway.relay import news as module
from gateway.relay.news import Finished, ResultNews, message_of
from gateway.upstream.postbox import WebPostbox
from tests.clock import StillClock
from tests.inbox import SECRET, Inbox, inbox
from tests.running import TODAY
from tests.upstream.raw_server import raw_server
from tests.valkey import eventually

RID = "req_0123456789abcdef01234567"
DONE = Finished(
    RID,
    "growth",
    "generation",
    "team-art",
    200,
    "",
    2,
    52_680_001,
    TODAY,
    TODAY + timedelta(minutes=15),
)
BRIEF = (0.01, 0.02)


@dataclass
class Bench:
    news: ResultNews
    clock: StillClock
    outcomes: list[str]

    async def until_told(self, count: int = 1) -> list[str]:
        await eventually(lambda: len(self.outcomes) >= count)
        return self.outcomes


@asynccontextmanager
async def telling(url: str, deadline_seconds: float = 10) -> AsyncIterator[Bench]:
    clock, outcomes = StillClock(), list[str]()
    sender = Webhooks(
        WebPostbox(url, deadline_seconds=deadline_seconds), SECRET, clock, pauses_seconds=()
    )
    news = ResultNews(
        sender,
        clock,
        keep_trying_seconds=900,
        counted=outcomes.append,
        pauses_seconds=BRIEF,
    )
    try:
        yield Bench(news, clock, outcomes)
    finally:
        await news.aclose()


def abandoned(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == module.__name__]


async def test_the_message_is_signed_and_says_what_became_of_the_request() -> None:
    async with inbox() as box, telling(box.url) as bench:
        bench.news.tell(DONE)
        assert await bench.until_told() == ["delivered"]
        [post] = box.posts
        assert post.is_signed
        assert post.headers["webhook-id"] == "msg_0123456789abcdef01234567"
        assert post.json == {
            "type": "image.result.completed",
            "timestamp": "2026-11-22T12:00:00+00:00",
            "data": {
                "id": RID,
                "team": "growth",
                "operation": "generation",
                "model": "team-art",
                "status": 200,
                "code": None,
                "images": 2,
                "cost_usd": "0.052680001",
                "result_url": f"/v1/images/results/{RID}",
                "expires_at": "2026-11-22T12:15:00Z",
            },
        }
        await bench.news.drain(1)
        assert bench.news.waiting == 0


@pytest.mark.parametrize(
    ("status", "type_"),
    [(200, "completed"), (399, "completed"), (400, "failed"), (502, "failed")],
)
def test_an_error_is_another_event(status: int, type_: str) -> None:
    message = message_of(replace(DONE, status=status, code="x" if status >= 400 else "", images=0))
    assert message.type == f"image.result.{type_}"
    assert message.data["code"] == ("x" if status >= 400 else None)


async def test_a_receiver_that_is_down_at_first_hears_of_it_once_it_is_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    box = Inbox((500, 429, None, 204))
    async with telling(f"http://127.0.0.1:{port}/hooks/token-5f2c", 0.3) as bench:
        bench.news.tell(DONE)
        await eventually(lambda: len(caplog.records) >= 3)
        assert (bench.outcomes, bench.news.waiting) == ([], 1)
        async with raw_server(box.take, port=port) as server:
            box.port = server.port
            # The third gets no answer at all.
            posts = await box.until(4)
            assert await bench.until_told() == ["delivered"]
    assert {post.headers["webhook-id"] for post in posts} == {"msg_0123456789abcdef01234567"}
    assert len({post.body for post in posts}) == 1
    assert all(post.is_signed for post in posts)
    assert abandoned(caplog) == []
    assert "token-5f2c" not in repr([record.__dict__ for record in caplog.records])


@dataclass
class Deaf:
    """Takes nothing, until it does; ``stuck``: it does not even answer."""

    takes: bool = False
    stuck: asyncio.Event | None = None
    told: list[Message] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    closed: int = 0
    at_once: int = 0
    most_at_once: int = 0

    async def tell(self, message: Message) -> bool:
        self.told.append(message)
        self.news.set()
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.stuck is not None:
                await self.stuck.wait()
        finally:
            self.at_once -= 1
        return self.takes

    async def aclose(self) -> None:
        self.closed += 1

    async def until(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.told) < count:
                self.news.clear()
                await self.news.wait()


def news_of(deaf: Deaf, clock: StillClock, pauses: Sequence[float]) -> tuple[ResultNews, list[str]]:
    outcomes: list[str] = []
    return (
        ResultNews(
            deaf,
            clock,
            keep_trying_seconds=900,
            counted=outcomes.append,
            pauses_seconds=pauses,
        ),
        outcomes,
    )


async def test_it_is_given_up_when_the_result_is_over(caplog: pytest.LogCaptureFixture) -> None:
    deaf, clock = Deaf(), StillClock()
    news, outcomes = news_of(deaf, clock, (0.001,))
    news.tell(DONE)
    await deaf.until(5)
    clock.advance(899)
    await deaf.until(len(deaf.told) + 2)
    assert outcomes == []
    clock.advance(1)
    await eventually(lambda: bool(outcomes))
    assert (outcomes, news.waiting) == (["abandoned"], 0)
    [line] = abandoned(caplog)
    said = line.__dict__
    assert (line.levelname, said["request_id"], said["error"]) == (
        "ERROR",
        RID,
        "the result is over",
    )
    assert said["message_id"] == "msg_0123456789abcdef01234567"
    await news.aclose()
    assert deaf.closed == 1


@pytest.mark.parametrize("takes", [True, False])
async def test_the_end_of_the_gateway_is_one_more_try(
    takes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    deaf = Deaf()
    news, outcomes = news_of(deaf, StillClock(), (600.0,))
    news.tell(DONE)
    await deaf.until(1)
    deaf.takes = takes
    async with asyncio.timeout(30):
        await news.drain(30)
    assert (outcomes, len(deaf.told)) == (["delivered" if takes else "abandoned"], 2)
    assert len(abandoned(caplog)) == (0 if takes else 1)
    # What ends meanwhile is told too.
    news.tell(replace(DONE, rid=RID.replace("0", "f")))
    await news.drain(30)
    assert len(deaf.told) == 3
    await news.aclose()


async def test_what_is_stuck_at_the_end_is_abandoned_by_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    deaf = Deaf(stuck=asyncio.Event())
    news, outcomes = news_of(deaf, StillClock(), (600.0,))
    rids = [f"req_{number:024x}" for number in range(100)]
    for rid in rids:
        news.tell(replace(DONE, rid=rid))
    await deaf.until(module.TRIES_AT_ONCE)
    assert news.waiting == 100
    await news.drain(0.01)
    assert (news.waiting, deaf.most_at_once) == (0, module.TRIES_AT_ONCE)
    assert outcomes == ["abandoned"] * 100
    assert {line.__dict__["request_id"] for line in abandoned(caplog)} == set(rids)
    assert {line.__dict__["error"] for line in abandoned(caplog)} == {"the gateway ends"}


async def test_a_receiver_that_is_down_for_long_does_not_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 2)
    deaf = Deaf()
    news, outcomes = news_of(deaf, StillClock(), (600.0,))
    for number in range(3):
        news.tell(replace(DONE, rid=f"req_{number:024x}"))
    assert (outcomes, news.waiting) == (["abandoned"], 2)
    assert abandoned(caplog)[0].__dict__["request_id"] == f"req_{2:024x}"
    await news.aclose()
    assert outcomes == ["abandoned"] * 3
