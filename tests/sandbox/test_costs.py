"""`GET /v1/organization/costs`: the sandbox's own bill, read with the real SDK."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import httpx
import pytest
from openai import AuthenticationError, BadRequestError, DefaultHttpxClient, OpenAI

from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from tests.clock import StillClock
from tests.sandbox.calls import FLARE, generate, png

DAY = int(datetime(2026, 11, 22, tzinfo=UTC).timestamp())
DAY_SECONDS = 86_400
MINI = "gpt-image-1-mini"


@pytest.fixture
def admin(server: SandboxServer) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=server.base_url,
        api_key="any",
        admin_api_key="sk-admin-of-a-test",
        max_retries=0,
        http_client=DefaultHttpxClient(verify=False, timeout=20),
    ) as client:
        yield client


def costs(admin: OpenAI, **asked: Any) -> dict[str | None, Decimal]:
    """What each line item cost, over all the buckets of one page."""
    page = admin.admin.organization.usage.costs(**{"start_time": DAY, **asked})
    found: dict[str | None, Decimal] = {}
    for bucket in page.data:
        for result in bucket.results:
            assert result.object == "organization.costs.result"
            assert result.amount is not None
            assert result.amount.currency == "usd"
            value = Decimal(str(result.amount.value))
            found[result.line_item] = found.get(result.line_item, Decimal()) + value
    return found


def draw(server: SandboxServer, http: httpx.Client, **fields: Any) -> None:
    server.rules.add(Rule(payload_bytes=100, times=1))
    assert generate(http, quality="low", size="1024x1024", **fields).status_code == 200


def test_by_line_item(server: SandboxServer, http: httpx.Client, admin: OpenAI) -> None:
    """`A lighthouse` is 3 tokens of text, a low picture 196 of 2.5 and 272 of 1-mini."""
    draw(server, http, n=2)
    draw(server, http)
    draw(server, http, model=MINI)
    edit = http.post(
        "/images/edits",
        data={"model": FLARE, "prompt": "A lighthouse", "quality": "low", "size": "1024x1024"},
        files={"image": ("a.png", png(), "image/png")},
    )
    assert edit.status_code == 200
    assert costs(admin, group_by=["line_item"]) == {
        f"{FLARE}, text input": Decimal(3 * 3) * 5 / 10**6,
        f"{FLARE}, image input": Decimal(1457) * 8 / 10**6,
        f"{FLARE}, image output": Decimal(4 * 196) * 30 / 10**6,
        f"{MINI}, text input": Decimal(3) * 2 / 10**6,
        f"{MINI}, image output": Decimal(272) * 8 / 10**6,
    }


def test_without_groups_it_is_one_sum(
    server: SandboxServer, http: httpx.Client, admin: OpenAI
) -> None:
    draw(server, http)
    assert costs(admin) == {None: Decimal("0.005895")}


def test_what_is_cut_or_spoilt_is_billed_and_what_is_refused_is_not(
    server: SandboxServer, http: httpx.Client, admin: OpenAI
) -> None:
    server.rules.add(Rule(times=1, cut_before_headers=True, path="/images/generations"))
    with pytest.raises(httpx.TransportError):
        draw(server, http)
    server.rules.clear()
    server.rules.add(Rule(times=1, status=429, path="/images/generations"))
    assert generate(http).status_code == 429
    server.rules.clear()
    server.rules.add(Rule(times=1, no_usage=True, path="/images/generations"))
    assert generate(http, quality="low", size="1024x1024").status_code == 200
    assert costs(admin) == {None: 2 * Decimal("0.005895")}


def test_a_day_a_bucket_and_pages(
    server: SandboxServer, http: httpx.Client, admin: OpenAI, clock: StillClock
) -> None:
    draw(server, http)
    clock.advance(2 * DAY_SECONDS)
    draw(server, http, n=2)
    seen, page_name = [], None
    for _ in range(3):
        more: dict[str, Any] = {} if page_name is None else {"page": page_name}
        page = admin.admin.organization.usage.costs(
            start_time=DAY, end_time=DAY + 3 * DAY_SECONDS, limit=1, **more
        )
        [bucket] = page.data
        assert bucket.end_time - bucket.start_time == DAY_SECONDS
        seen.append((bucket.start_time - DAY, len(bucket.results)))
        page_name = page.next_page
        assert page.has_more is (page_name is not None)
    assert seen == [(0, 1), (DAY_SECONDS, 0), (2 * DAY_SECONDS, 1)]
    assert page_name is None


def test_a_drift(server: SandboxServer, http: httpx.Client, admin: OpenAI) -> None:
    draw(server, http)
    server.rules.clear()
    server.rules.add(Rule(path="/organization/costs", times=1, drift_percent=2))
    assert costs(admin) == {None: Decimal("0.0060129")}
    assert costs(admin) == {None: Decimal("0.005895")}


def test_a_drift_by_the_control_endpoint(
    server: SandboxServer, http: httpx.Client, admin: OpenAI
) -> None:
    draw(server, http)
    rule = {"path": "/organization/costs", "drift_percent": -50}
    assert http.post(f"{server.origin}/sandbox/rules", json=rule).status_code == 201
    assert costs(admin) == {None: Decimal("0.0029475")}
    wrong = http.post(f"{server.origin}/sandbox/rules", json={"drift_percent": True})
    assert wrong.status_code == 400


def test_only_for_administrators(server: SandboxServer, http: httpx.Client) -> None:
    answer = http.get("/organization/costs", params={"start_time": DAY})
    assert answer.status_code == 401
    assert "api.usage.read" in answer.json()["error"]["message"]
    with (
        OpenAI(base_url=server.base_url, api_key="a", admin_api_key="sk-proj-1") as client,
        pytest.raises(AuthenticationError),
    ):
        costs(client)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"start_time": "yesterday"}, "start_time"),
        ({"end_time": 10**30}, "end_time"),
        ({"limit": 0}, "limit"),
        ({"limit": 181}, "limit"),
        ({"bucket_width": "1h"}, "bucket_width"),
        ({"group_by": ["model"]}, "group_by"),
        ({"page": "page_nonsense"}, "page"),
    ],
)
def test_what_it_refuses(admin: OpenAI, asked: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        costs(admin, **asked)
    assert refused.value.param == param


def test_start_time_is_needed(server: SandboxServer) -> None:
    answer = httpx.get(
        f"{server.base_url}/organization/costs",
        headers={"authorization": "Bearer sk-admin"},
        verify=False,
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "start_time"


def test_a_fault_on_request(server: SandboxServer, admin: OpenAI) -> None:
    server.rules.add(Rule(path="/organization/costs", times=1, status=503))
    with pytest.raises(Exception, match="overloaded"):
        costs(admin)
    assert costs(admin) == {}
