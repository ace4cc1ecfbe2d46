"""Who may ask, and how often: keys, rates, and how many at a time."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError, AuthenticationError, BadRequestError, RateLimitError

from gateway.domain import keys
from gateway.domain.team import Key, Limits, Team
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from tests.running import (
    KEY,
    MODEL,
    OTHER_KEY,
    TODAY,
    GatewayUnderTest,
    Start,
    TestClock,
    run_gateway,
)
from tests.valkey import eventually, run_valkey

ASKED: dict[str, Any] = {
    "model": MODEL,
    "prompt": "A lighthouse",
    "quality": "low",
    "size": "1024x1024",
    "extra_headers": {"cache-control": "no-store"},
}
CI_KEY = "growth-ci-key-0123456789abcdef"
PEPPER = "a-pepper-of-the-tests-0123456789abcdef"


class LeapingClock(TestClock):
    """Seconds that stand still until they leap: what a limit says of its wait is exact, however
    long a call takes."""

    __test__ = False

    def __init__(self, now: datetime = TODAY) -> None:
        super().__init__(now)
        self._began = super().monotonic()
        self._leapt = 0.0

    def monotonic(self) -> float:
        return self._began + self._leapt

    def leap(self, seconds: float) -> None:
        self._leapt += seconds


@pytest.fixture
def clock() -> LeapingClock:
    return LeapingClock()


@pytest.fixture(autouse=True)
def quick(sandbox: SandboxServer) -> None:
    """Pictures that need no drawing."""
    sandbox.rules.add(Rule(prompt="A lighthouse", payload_bytes=400))


async def ask(gateway: GatewayUnderTest, key: str = KEY, **changes: Any) -> None:
    async with gateway.sdk(key) as sdk:
        await sdk.images.generate(**{**ASKED, **changes})


async def refused(
    gateway: GatewayUnderTest, key: str = KEY, retries: int = 0, **changes: Any
) -> APIStatusError:
    async with gateway.sdk(key, max_retries=retries) as sdk:
        with pytest.raises(APIStatusError) as raised:
            await sdk.images.generate(**{**ASKED, **changes})
    return raised.value


def said(error: APIStatusError) -> str:
    """The gateway's own words."""
    return error.message.removeprefix(f"Error code: {error.status_code} - ")


def limited(limits: dict[str, int], ci: dict[str, int] | None = None) -> dict[str, Any]:
    keys = [KEY, {"key": CI_KEY, "name": "ci", "limits": ci or {}}]
    return {"teams": {"growth": {"limits": limits, "keys": keys}}}


# Keys.


@pytest.mark.parametrize(
    ("secret", "words"),
    [
        (
            "sk-proj-0123456789abcdef9f2c",
            "This gateway does not know the key ...9f2c. Ask the owner of your team for one; a "
            "provider's own key does not work here.",
        ),
        (
            "short",
            "This gateway does not know the key. Ask the owner of your team for one; a provider's "
            "own key does not work here.",
        ),
        (
            keys.mint().secret[:-7] + "_abcdef",
            "The key ...cdef is not complete: its checksum does not fit. Copy it again, whole, or "
            "ask the owner of your team for another.",
        ),
    ],
    ids=["of a provider", "short", "mistyped"],
)
async def test_a_key_that_nobody_knows(gateway: GatewayUnderTest, secret: str, words: str) -> None:
    error = await refused(gateway, secret, retries=2)
    assert isinstance(error, AuthenticationError)
    assert (error.code, said(error)) == ("invalid_api_key", words)
    assert error.response.headers["x-should-retry"] == "false"
    [(receipt, _)] = await gateway.told.until(1)
    assert (receipt.team, receipt.reason) == ("", "auth_failed")
    assert len(gateway.sandbox.journal) == 0


async def test_no_key_at_all(gateway: GatewayUnderTest) -> None:
    async with httpx.AsyncClient(base_url=gateway.base_url, verify=False) as http:
        for headers in ({}, {"authorization": f"Basic {KEY}"}, {"api-key": ""}):
            answer = await http.post("/images/generations", json={}, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["message"] == (
                "No key came with this request. Send the key of your team as `Authorization: "
                "Bearer ...` (the SDKs read it from OPENAI_API_KEY)."
            )


async def test_a_stranger_is_refused_before_its_body_is_read(gateway: GatewayUnderTest) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(
        b"POST /v1/images/edits HTTP/1.1\r\nhost: x\r\nauthorization: Bearer nobody\r\n"
        b"content-type: multipart/form-data; boundary=x\r\ncontent-length: 100000000\r\n\r\n"
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
    writer.close()
    await writer.wait_closed()


async def test_declared_keys_expire_and_are_switched_off(start: Start, clock: TestClock) -> None:
    stale = {"key": CI_KEY, "name": "ci", "expires": datetime(2026, 11, 24, tzinfo=UTC).date()}
    off = {"key": "growth-old-key-0123456789abcdef", "disabled": True}
    teams = {"growth": {"keys": [KEY, stale, off]}, "design": {"disabled": True}}
    async with start({"teams": teams}) as gateway:
        await ask(gateway, CI_KEY)
        [row] = await gateway.usage()
        clock.advance(days=1, hours=12)
        error = await refused(gateway, CI_KEY)
        assert said(error) == (
            f"The key {row.key_id} of team growth expired on 2026-11-24 00:00 UTC. Ask the owner "
            "of your team for another."
        )
        for key, text in (
            ("growth-old-key-0123456789abcdef", "of team growth is disabled. Ask the owner of"),
            (OTHER_KEY, "Team design is disabled. Ask the gateway's operator."),
        ):
            error = await refused(gateway, key)
            assert (error.status_code, error.code) == (401, "invalid_api_key")
            assert text in said(error)
        await ask(gateway, KEY)


async def test_a_revoked_key_is_refused_within_five_seconds(
    start: Start, clock: LeapingClock
) -> None:
    async with start({"storage": {"pepper": PEPPER}}) as gateway:
        directory, minted = gateway.gateway.directory, keys.mint()
        error = await refused(gateway, minted.secret)
        assert said(error).startswith("This gateway does not know the key ...")
        await directory.create_team(Team("lab"))
        key = Key(minted.id, "lab", name="notebook", created=clock.now())
        await directory.create_key(key, keys.digest(PEPPER.encode(), minted.secret))
        clock.leap(1.0)
        await ask(gateway, minted.secret)
        await directory.revoke_key(minted.id, clock.now())
        clock.leap(5.0)
        error = await refused(gateway, minted.secret)
        assert said(error) == (
            f"The key {minted.id} of team lab was revoked. Ask the owner of your team for another."
        )
        assert (await gateway.usage())[0].key_id == minted.id


async def test_a_created_key_keeps_its_own_limits(start: Start, clock: TestClock) -> None:
    async with start({"storage": {"pepper": PEPPER}}) as gateway:
        directory, minted = gateway.gateway.directory, keys.mint()
        await directory.create_team(Team("lab", limits=Limits(images_per_minute=2)))
        key = Key(
            minted.id,
            "lab",
            limits=Limits(requests_per_minute=1),
            models=frozenset({MODEL}),
            expires=clock.now() + timedelta(days=1),
        )
        await directory.create_key(key, keys.digest(PEPPER.encode(), minted.secret))
        assert (await refused(gateway, minted.secret, model="gpt-image-2")).status_code == 403
        assert (await refused(gateway, minted.secret, n=3)).code == "limit_exceeded"
        await ask(gateway, minted.secret, n=2)
        error = await refused(gateway, minted.secret)
        assert said(error) == (
            f"Key {minted.id} of team lab is limited to 1 request a minute; try again in 60 s."
        )
        clock.advance(days=1)
        assert "expired on 2026-11-23 12:00 UTC" in said(await refused(gateway, minted.secret))


# Rates.


async def test_requests_a_minute(start: Start, clock: LeapingClock) -> None:
    async with start(limited({"requests_per_minute": 2})) as gateway:
        await ask(gateway)
        await ask(gateway)
        error = await refused(gateway)
        assert isinstance(error, RateLimitError)
        assert (error.code, error.type) == ("rate_limit_exceeded", "requests")
        assert said(error) == "Team growth is limited to 2 requests a minute; try again in 30 s."
        headers = error.response.headers
        assert headers["retry-after"] == "30"
        assert 25_000 < int(headers["retry-after-ms"]) <= 30_000
        assert "x-should-retry" not in headers
        await gateway.told.until(3)
        assert gateway.told.last.reason == "requests_per_minute"
        # The other team has a minute of its own, and this one's goes on.
        await ask(gateway, OTHER_KEY)
        clock.leap(30)
        await ask(gateway)
        assert (await refused(gateway)).status_code == 429
        assert len(gateway.sandbox.journal) == 4
        metrics = await gateway.metrics()
        rejected = 'gateway_quota_rejections_total{limit="requests_per_minute",team="growth"}'
        assert metrics[rejected] == 2


async def test_images_a_minute_count_n(start: Start, clock: LeapingClock) -> None:
    async with start(limited({"images_per_minute": 20})) as gateway:
        await ask(gateway, n=10)
        await ask(gateway, n=9)
        error = await refused(gateway, n=3)
        assert said(error) == "Team growth is limited to 20 images a minute; try again in 6 s."
        assert error.response.headers["retry-after"] == "6"
        # What fits may still pass: a refusal takes nothing.
        await ask(gateway, n=1)
        clock.leap(9)
        await ask(gateway, n=3)


async def test_more_images_than_the_limit_never_fit(start: Start) -> None:
    async with start(limited({"images_per_minute": 4})) as gateway:
        error = await refused(gateway, n=5, retries=2)
        assert isinstance(error, BadRequestError)
        assert (error.code, error.param) == ("limit_exceeded", "n")
        assert said(error) == (
            "Team growth is limited to 4 images a minute, and this request asks for 5. Ask for "
            "fewer pictures at once, or ask an administrator to raise the limit."
        )
        await gateway.told.until(1)
        assert len(gateway.told.requests) == 1
        await ask(gateway, n=4)


async def test_a_limit_of_a_key_and_one_of_its_team(start: Start, clock: LeapingClock) -> None:
    changes = limited({"requests_per_minute": 3}, ci={"requests_per_minute": 1})
    async with start(changes) as gateway:
        await ask(gateway, CI_KEY)
        error = await refused(gateway, CI_KEY)
        assert said(error) == (
            "Key ci of team growth is limited to 1 request a minute; try again in 60 s."
        )
        assert error.response.headers["retry-after"] == "60"
        assert "x-should-retry" not in error.response.headers
        # The key's refusal took nothing of the team's.
        await ask(gateway, KEY)
        await ask(gateway, KEY)
        assert said(await refused(gateway, KEY)).startswith("Team growth is limited to 3 requests")
        clock.leap(20)
        await ask(gateway, KEY)
        assert said(await refused(gateway, CI_KEY)).startswith("Key ci of team growth")


async def test_so_many_at_a_time(start: Start, sandbox: SandboxServer) -> None:
    gate = Gate()
    sandbox.rules.clear()
    sandbox.rules.add(Rule(payload_bytes=400, wait_for=gate))
    async with start(limited({"concurrent_requests": 2})) as gateway:
        running = [asyncio.create_task(ask(gateway)) for _ in range(2)]
        await gate.arrived(2)
        error = await refused(gateway)
        assert error.code == "rate_limit_exceeded"
        assert said(error) == ("Team growth is limited to 2 requests at a time; try again in 1 s.")
        assert error.response.headers["retry-after-ms"] == "1000"
        await gateway.told.until(1)
        assert gateway.told.last.reason == "concurrent_requests"
        # The SDK's own retry waits as long as it is told, and finds a free place.
        patient = asyncio.create_task(wait_patiently(gateway))
        await gateway.told.until(2)
        gate.set()
        await asyncio.gather(*running, patient)
        assert [receipt.status for receipt, _ in await gateway.told.until(5)].count(429) == 2
        assert len(sandbox.journal) == 3


async def wait_patiently(gateway: GatewayUnderTest) -> None:
    async with gateway.sdk(max_retries=2) as sdk:
        await sdk.images.generate(**ASKED)


async def test_a_place_is_given_back_however_a_call_ends(
    start: Start, sandbox: SandboxServer
) -> None:
    faults: list[dict[str, Any]] = [
        {"status": 400},
        {"status": 504},
        {"cut_after_bytes": 100},
        {"cut_before_headers": True},
        {"empty_data": True},
    ]
    sandbox.rules.clear()
    for fault in faults:
        sandbox.rules.add(Rule(times=1, payload_bytes=400, **fault))
    sandbox.rules.add(Rule(payload_bytes=400))
    changes = limited({"concurrent_requests": 1})
    changes["teams"]["growth"]["limits"]["max_cost_per_request"] = 0.01
    async with start(changes) as gateway:
        for _ in faults:
            assert (await refused(gateway)).code != "rate_limit_exceeded"
        assert (await refused(gateway, quality="high")).code == "max_cost_exceeded"
        await ask(gateway)


async def test_what_the_ledger_refuses_costs_no_rate(start: Start) -> None:
    changes = limited({"requests_per_minute": 1, "images_per_minute": 2})
    changes["teams"]["growth"]["budget"] = {"day": 0.01}
    async with start(changes) as gateway:
        assert (await refused(gateway, n=2)).code == "insufficient_quota"
        await ask(gateway)


async def test_a_hit_counts_as_a_request_and_not_as_a_picture(start: Start) -> None:
    changes = limited({"requests_per_minute": 2, "images_per_minute": 1})
    async with start(changes) as gateway:
        kept: dict[str, Any] = {"extra_headers": {}}
        await ask(gateway, **kept)
        await ask(gateway, **kept)
        error = await refused(gateway, **kept)
        assert said(error).startswith("Team growth is limited to 2 requests a minute")
        assert len(gateway.sandbox.journal) == 1


async def test_twenty_at_once_against_five_a_minute(start: Start) -> None:
    async with start(limited({"requests_per_minute": 5})) as gateway, gateway.http() as http:
        asked = {name: value for name, value in ASKED.items() if name != "extra_headers"}
        answers = await asyncio.gather(
            *(
                http.post("/images/generations", json={**asked, "user": str(number)})
                for number in range(20)
            )
        )
        statuses = [answer.status_code for answer in answers]
        assert (statuses.count(200), statuses.count(429)) == (5, 15)
        assert len(gateway.sandbox.journal) == 5


async def test_gateways_share_limits_through_redis_and_go_on_without_it(
    tmp_path: Path, sandbox: SandboxServer, clock: TestClock
) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    with run_valkey() as valkey:
        changes = limited({"requests_per_minute": 3})
        changes["storage"] = {"redis": valkey.url}
        async with (
            run_gateway(folders[0], sandbox, changes, clock) as one,
            run_gateway(folders[1], sandbox, changes, clock) as two,
        ):
            await ask(one)
            await ask(two)
            await ask(two)
            for gateway in (one, two):
                words = said(await refused(gateway))
                told = re.fullmatch(
                    r"Team growth is limited to 3 requests a minute; try again in (\d+) s\.", words
                )
                assert told, words
                assert 10 < int(told[1]) <= 20
            async with httpx.AsyncClient(base_url=one.origin, verify=False) as http:
                assert (await http.get("/readyz")).json() == {
                    "status": "ready",
                    "stores": {"ledger": "up", "directory": "up", "redis": "up"},
                    "degraded": {},
                }
                valkey.kill()
                # Each process keeps the limit by itself, and says so.
                await ask(one)
                await one.told.until(3)
                assert one.told.last.degraded
                ready = await http.get("/readyz")
                assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
            metrics = await one.metrics()
            assert metrics["gateway_gate_degraded"] == 1
            assert metrics['gateway_dependency_up{name="redis"}'] == 0
            valkey.restart()

            async def whole() -> bool:
                try:
                    await ask(two)
                except RateLimitError:
                    return False
                return not two.told.last.degraded

            await eventually(whole)
