"""Webhooks, against a receiver that checks what it gets."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gateway.notify import PAUSES_SECONDS, Webhooks, signature
from gateway.ports import Message
from gateway.reports.budgets import LEASE_SECONDS
from gateway.settings import load
from gateway.upstream.postbox import DEADLINE_SECONDS, WebPostbox
from tests.clock import StillClock
from tests.inbox import SECRET, inbox

AT = datetime(2026, 11, 22, 12, tzinfo=UTC)
NEWS = Message("msg_1", "budget.warning", AT, {"team": "growth", "spent_usd": "0.80"})


@asynccontextmanager
async def webhooks(
    url: str,
    *,
    secret: str | None = SECRET,
    pauses: Sequence[float] = (0, 0, 0),
    deadline_seconds: float = DEADLINE_SECONDS,
) -> AsyncIterator[tuple[Webhooks, list[str]]]:
    outcomes: list[str] = []
    postbox = WebPostbox(url, deadline_seconds=deadline_seconds)
    made = Webhooks(postbox, secret, StillClock(), counted=outcomes.append, pauses_seconds=pauses)
    try:
        yield made, outcomes
    finally:
        await made.aclose()


async def test_a_message_is_signed_as_the_standard_says() -> None:
    async with inbox() as box, webhooks(box.url) as (sender, outcomes):
        assert await sender.tell(NEWS)
        [post] = box.posts
        assert post.target == "/hooks/token-5f2c?to=ops"
        assert post.headers["host"] == f"127.0.0.1:{box.port}"
        assert post.headers["content-type"] == "application/json"
        assert post.headers["webhook-id"] == "msg_1"
        assert post.headers["webhook-timestamp"] == str(int(AT.timestamp()))
        assert post.is_signed
        assert json.loads(post.body) == {
            "type": "budget.warning",
            "timestamp": "2026-11-22T12:00:00+00:00",
            "data": {"team": "growth", "spent_usd": "0.80"},
        }
        assert outcomes == ["delivered"]


def test_the_vector_that_other_libraries_are_tested_with() -> None:
    """Standard Webhooks' own (``sign function works`` of its libraries)."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signed = signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


async def test_without_a_secret_nothing_is_signed() -> None:
    async with inbox() as box, webhooks(box.url, secret=None) as (sender, _):
        assert await sender.tell(NEWS)
        assert "webhook-signature" not in box.posts[0].headers


async def test_what_is_refused_twice_is_sent_a_third_time() -> None:
    async with inbox(500, 429, 200) as box, webhooks(box.url) as (sender, outcomes):
        assert await sender.tell(NEWS)
        assert len(box.posts) == 3
        assert {post.headers["webhook-id"] for post in box.posts} == {"msg_1"}
        assert len({post.body for post in box.posts}) == 1
        assert all(post.is_signed for post in box.posts)
        assert outcomes == ["delivered"]


async def test_a_redirect_is_not_followed(caplog: pytest.LogCaptureFixture) -> None:
    async with inbox() as other:
        moved = f"302\nlocation: {other.url}"
        async with inbox(moved) as box, webhooks(box.url) as (sender, outcomes):
            assert not await sender.tell(NEWS)
            assert (len(box.posts), len(other.posts)) == (4, 0)
            assert outcomes == ["failed"]
    [line] = caplog.records
    assert line.__dict__["error"] == "it answered 302"


async def test_a_receiver_that_hangs_is_given_up_and_asked_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with (
        inbox(None, None, 204) as box,
        webhooks(box.url, deadline_seconds=0.05) as (sender, outcomes),
    ):
        assert await sender.tell(NEWS)
        assert len(box.posts) == 3
        assert outcomes == ["delivered"]
    assert not caplog.records


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_receiver_that_is_away(scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of the address or the secret is logged; both may open a door."""
    caplog.set_level(logging.DEBUG)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"{scheme}://user:password-77@127.0.0.1:{port}/hooks/token-5f2c"
    async with webhooks(url) as (sender, outcomes):
        assert not await sender.tell(NEWS)
        assert outcomes == ["failed"]
    [line] = (record for record in caplog.records if record.name == "gateway.notify")
    assert line.__dict__["error"].startswith("connect: ")
    said = repr([record.__dict__ for record in caplog.records])
    assert not [word for word in ("token-5f2c", "password-77", SECRET) if word in said]


async def test_a_user_in_the_address_is_a_header() -> None:
    async with inbox() as box:
        url = box.url.replace("http://", "http://ops:p%40ss@")
        async with webhooks(url) as (sender, _):
            assert await sender.tell(NEWS)
        [post] = box.posts
        assert post.headers["authorization"] == f"Basic {base64.b64encode(b'ops:p@ss').decode()}"
        assert post.headers["host"] == f"127.0.0.1:{box.port}"


async def test_the_pause_before_another_try_grows() -> None:
    began = asyncio.get_running_loop().time()
    async with inbox(500) as box, webhooks(box.url, pauses=(0.02, 0.1)) as (sender, _):
        assert not await sender.tell(NEWS)
        assert len(box.posts) == 3
    assert asyncio.get_running_loop().time() - began >= 0.12


def test_who_claimed_a_mark_has_time_for_every_try() -> None:
    tries = len(PAUSES_SECONDS) + 1
    assert sum(PAUSES_SECONDS) + tries * DEADLINE_SECONDS < LEASE_SECONDS


@pytest.mark.parametrize("url", ["ftp://here/", "https://", "http://a..b/"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ValueError):
        WebPostbox(url)


def test_a_webhook_that_anybody_could_forge_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    for secret, warnings in (("null", 1), (SECRET, 0)):
        path.write_text(
            'upstreams: {sandbox: {kind: sandbox}}\nmodels: {"*": {upstream: sandbox}}\n'
            f"notify: {{webhook: 'https://hooks.example.com/token-5f2c', secret: {secret}}}\n"
        )
        found = [str(one) for one in load(path, {}).warnings if "notify.secret" in str(one)]
        assert len(found) == warnings
        assert "token-5f2c" not in "".join(found)
