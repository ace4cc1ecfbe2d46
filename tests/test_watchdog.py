"""A loop that is blocked is told of, with the place in the code, once."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest

import gateway.watchdog
from gateway.watchdog import Watchdog
from tests.running import TestClock

SECRET = "sk-never-in-a-log"


class Told(logging.Handler):
    """Hears the log in whichever thread it speaks."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.heard = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.heard.set()

    def events(self, name: str) -> list[logging.LogRecord]:
        return [one for one in self.records if one.getMessage() == name]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    handler = Told()
    monkeypatch.setattr(gateway.watchdog.log, "handlers", [handler])
    monkeypatch.setattr(gateway.watchdog.log, "level", logging.DEBUG)
    return handler


def the_culprit(told: Told, secret: str) -> None:
    """Blocks until the watchdog has said so."""
    assert told.heard.wait(30), f"nobody heard of {len(secret)} characters"
    time.sleep(0.1)  # several looks of the thread later it has not said it again


def for_good(told: Told) -> None:
    until = time.monotonic() + 30
    while not told.events("the event loop is blocked for good"):
        assert time.monotonic() < until
        time.sleep(0.01)


async def test_a_block_is_told_once_with_its_place_and_no_value(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.watchdog, "STAMP_SECONDS", 0.02)
    monkeypatch.setattr(gateway.watchdog, "BLOCKED_SECONDS", 0.2)
    seen: list[float] = []
    news = asyncio.Event()

    def observe(seconds: float) -> None:
        seen.append(seconds)
        if seconds > 0.2:
            news.set()

    async with Watchdog(TestClock(), observe).watching():
        await asyncio.sleep(0)
        the_culprit(told, SECRET)
        async with asyncio.timeout(30):
            await news.wait()
    [record] = told.events("the event loop is blocked")
    assert any("the_culprit" in place for place in record.__dict__["stack"])
    assert record.__dict__["blocked_seconds"] > 0.2
    assert SECRET not in str(record.__dict__)
    assert told.events("the event loop goes on")
    assert max(seen) > 0.2
    assert record.levelno == logging.WARNING


async def test_a_block_beyond_all_patience_is_told_once_more(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.watchdog, "STAMP_SECONDS", 0.02)
    monkeypatch.setattr(gateway.watchdog, "BLOCKED_SECONDS", 0.1)
    monkeypatch.setattr(gateway.watchdog, "DEAD_SECONDS", 0.3)
    async with Watchdog(TestClock(), lambda seconds: None).watching():
        await asyncio.sleep(0)
        for_good(told)
    [record] = told.events("the event loop is blocked for good")
    assert record.levelno == logging.CRITICAL
    assert len(told.events("the event loop is blocked")) == 1


async def test_a_loop_that_runs_is_measured_and_not_told_of(told: Told) -> None:
    measured = asyncio.Event()
    async with Watchdog(TestClock(), lambda seconds: measured.set()).watching():
        async with asyncio.timeout(30):
            await measured.wait()
        watchers = [one for one in threading.enumerate() if one.name == "watchdog"]
        assert len(watchers) == 1
        assert watchers[0].daemon
    assert not watchers[0].is_alive()
    assert told.events("the event loop is blocked") == []
