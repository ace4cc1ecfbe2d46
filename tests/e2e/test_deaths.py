"""A process that dies at any moment of a call, and what its successor says to who comes back: the
money is on the books, and what was made and kept is handed out (row 76; money.md 6a, k1 to k5)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from tests.faults import KILLED, Place, Way
from tests.faulty_gateway import Child, Nursery
from tests.processes import Books, bill, wait_until
from tests.running import KEY, MODEL, config_of
from tests.valkey import Valkey, run_valkey

UNKNOWN, EXPIRED = (502, "upstream_outcome_unknown"), (410, "result_expired")
PICTURE = (200, "")


@dataclass(frozen=True)
class Death:
    """Where a process dies, and what is found then. ``state`` of the hold: P booked as it was, X
    at its bound. ``bought`` is how often the upstream was asked. ``result`` and ``replay`` are the
    answers to who asks for the result, and who sends the same Idempotency-Key again."""

    name: str
    place: Place
    way: Way
    state: str
    bought: int
    result: tuple[int, str]
    replay: tuple[int, str]


DEATHS = [
    Death("k1, held", ("ledger.reserve", 1), Way.KILL_AFTER, "X", 0, UNKNOWN, UNKNOWN),
    Death("k1, announced", ("upstream.send", 1), Way.KILL_BEFORE, "X", 0, UNKNOWN, UNKNOWN),
    Death("k2, running", ("upstream.send", 1), Way.KILL_AFTER, "X", 1, UNKNOWN, UNKNOWN),
    Death("k2, half of it", ("reply.chunk", 2), Way.KILL_AFTER, "X", 1, UNKNOWN, UNKNOWN),
    Death("k3, in hand", ("ledger.settle", 1), Way.KILL_BEFORE, "X", 1, UNKNOWN, UNKNOWN),
    Death("k4, settled", ("ledger.settle", 1), Way.KILL_AFTER, "P", 1, EXPIRED,
          (410, "idempotent_result_expired")),
    Death("k4, kept", ("cache.put", 1), Way.KILL_BEFORE, "P", 1, PICTURE, PICTURE),
    Death("k5, answered", ("", 0), Way.KILL_AFTER, "P", 1, PICTURE, PICTURE),
]  # fmt: skip


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with run_valkey() as running:
        yield running


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(headers=headers, timeout=30, verify=False) as client:
        yield client


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json().get("error", {}).get("code", "")


CASES = [
    *(pytest.param(death, False, id=f"{death.name}, alone") for death in DEATHS),
    *(
        pytest.param(death, True, id=f"{death.name}, with Redis")
        for death in DEATHS
        if death.name in ("k2, running", "k4, settled", "k4, kept")
    ),
]


@pytest.mark.parametrize(("death", "shared"), CASES)
async def test_what_a_dead_process_left_is_known_to_the_next(
    tmp_path: Path,
    sandbox: SandboxServer,
    valkey: Valkey,
    http: httpx.AsyncClient,
    death: Death,
    shared: bool,
) -> None:
    """With Redis the flight of the dead is on the board, and looks alive for some seconds."""
    sandbox.rules.add(Rule(payload_bytes=400))
    changes: dict[str, Any] = {
        "ledger": {"lease_seconds": 1.0, "sweep_seconds": 0.2},
        "storage": {"pepper": "pepper-0123456789abcdef-0123456789"},
    }
    if shared:
        changes["storage"]["redis"] = valkey.url
    config = config_of(tmp_path, sandbox.base_url, changes)
    database = tmp_path / "data" / "gateway.db"
    name = death.name.replace(" ", "-")
    asked = {"model": MODEL, "prompt": name, "quality": "low", "size": "1024x1024"}
    marked = {"idempotency-key": f"{name}-{shared}", "cache-control": "no-cache"}
    with Nursery() as nursery:

        async def begin(place: Place = ("", 0), way: Way = Way.KILL_BEFORE) -> Child:
            return await asyncio.to_thread(nursery.start, config, place, way)

        def url(child: Child, rest: str = "generations") -> str:
            return f"{child.base_url}/images/{rest}"

        first = await begin(death.place, death.way)
        answer: httpx.Response | None = None
        with suppress(httpx.TransportError):
            answer = await http.post(url(first), json=asked, headers=marked)
        if death.place == ("", 0):
            assert answer is not None
            assert answer.status_code == 200
            os.kill(first.pid, signal.SIGKILL)
            assert await asyncio.to_thread(first.wait) == -signal.SIGKILL
        else:
            assert await asyncio.to_thread(first.wait) == KILLED
        assert sandbox.journal.received == death.bought

        second = await begin()
        await asyncio.to_thread(
            wait_until, lambda: not Books.read(database).open, "every hold ended", 15
        )
        books = Books.read(database)
        books.check()
        [hold] = books.holds.values()
        assert hold.state == death.state
        if death.state == "P":
            assert hold.cost == sum(map(bill, sandbox.journal.billed))
        else:
            assert hold.cost == hold.bound

        async with asyncio.timeout(40):
            result = await http.get(url(second, f"results/{hold.rid}"))
            while result.status_code == 202:
                waiting = {"prefer": "wait=30"}
                result = await http.get(url(second, f"results/{hold.rid}"), headers=waiting)
        assert code_of(result) == death.result
        again = await http.post(url(second), json=asked, headers=marked)
        assert code_of(again) == death.replay
        if death.replay == PICTURE:
            assert again.headers["idempotent-replayed"] == "true"
            assert again.headers["x-cost-usd"] == "0"
            assert again.content == result.content
            assert answer is None or answer.content == again.content
        else:
            assert again.headers["x-should-retry"] == "false"
            assert hold.rid in result.json()["error"]["message"]
        assert sandbox.journal.received == death.bought, "nothing is bought again"
        assert Books.read(database).spent == hold.cost

        # Who asks without any mark may be told of it once, and then decides: it is bought anew.
        plain = [await http.post(url(second), json=asked) for _ in range(2)]
        assert code_of(plain[0]) in (PICTURE, death.result)
        assert code_of(plain[1]) == PICTURE
        # An answer is put into the cache behind its client's back: the second may come before.
        bought_anew = [one for one in plain if one.headers.get("x-cache") == "miss"]
        assert sandbox.journal.received == death.bought + len(bought_anew)

        # Somebody else's call goes as ever.
        other = await http.post(url(second), json={**asked, "prompt": f"{name}, another"})
        assert other.status_code == 200
        assert await asyncio.to_thread(second.end) == 0
