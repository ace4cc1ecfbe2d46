"""What each kind of upstream stream becomes for both SDKs (contract 1.4, 4.7 and 4.8).

Every case is sent by an upstream that ends its body behind it, and read by the SDK of Python and by
that of Node: they see the same.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from openai import APIError, APIStatusError, AsyncOpenAI

from gateway.relay.body import KEEP_ALIVE, Spool
from gateway.sandbox.rules import Rule
from tests.e2e import test_node
from tests.e2e.test_streams import (
    ASKED,
    COMPLETED_EVENT,
    COST,
    PARTIAL_EVENT,
    USAGE,
    at,
    booked,
    event,
)
from tests.raw import JSON, RawClient
from tests.running import KEY, MODEL, GatewayUnderTest, Start
from tests.upstream.raw_server import Peer, raw_server

P, C = "image_generation.partial_image", "image_generation.completed"
EVENTS = "text/event-stream"
MEGABYTES = b"QUJD" * 2_500_000
"""Ten of them."""
NESTED = b'{"error":{"message":"No.","type":"server_error","param":null,"code":"boom"}}'
SECOND = event("completed", b'"second":true', b'"usage":' + USAGE)
SPLIT = b'data: {"type":"image_generation.completed",\ndata:  "b64_json":\ndata:"iVBORw0KGgoA"}\n\n'
WITHOUT_TYPE = b'event: image_generation.completed\ndata: {"b64_json":"iVBORw0KGgoA"}\n\n'
JSON_ANSWER = (
    b'{"created":7,"background":"opaque","data":[{"b64_json":"iVBORw0KGgoA","revised_prompt":"r"}],'
    b'"extra":{"a":[1]},"size":"1024x1024","usage":%b}' % USAGE
)


@dataclass(frozen=True)
class Case:
    """``body`` is what the upstream sends, ``kinds`` the types of the events that users see, and
    ``code`` and ``says`` the error that is raised behind them; ``passes`` what leaves the gateway,
    where it is not the body. ``unbilled``: the picture comes without its usage."""

    body: bytes
    kinds: Sequence[str] = (P, C)
    code: str | None = None
    says: str = ""
    passes: bytes | None = None
    n: int = 1
    cost: int | None = None
    unbilled: bool = False


BOTH = PARTIAL_EVENT + COMPLETED_EVENT
BROKEN = "upstream_bad_response"
CASES = {
    "plain": Case(BOTH),
    "done": Case(BOTH + b"data: [DONE]\n\n"),
    "done without its blank line": Case(BOTH + b"data: [DONE]\n", passes=BOTH),
    "behind done": Case(
        BOTH + b"data: [DONE]\n\n" + SECOND + b"{", passes=BOTH + b"data: [DONE]\n\n"
    ),
    "comments": Case(
        b": a\n\n:\n\n" + PARTIAL_EVENT + b": b\n: c\n\n" + COMPLETED_EVENT + b": d\n\n"
    ),
    "a comment inside an event": Case(PARTIAL_EVENT + b": a\n" + COMPLETED_EVENT),
    "retry alone": Case(
        b"retry: 1000\n\n" + PARTIAL_EVENT + b"retry: 9\n\n" + COMPLETED_EVENT,
        passes=b":etry: 1000\n\n" + PARTIAL_EVENT + b":etry: 9\n\n" + COMPLETED_EVENT,
    ),
    "retry in an event": Case(b"retry: 1000\n" + BOTH),
    "an id alone": Case(b"id: 1\n\n" + BOTH, passes=b":d: 1\n\n" + BOTH),
    "an id, then comments": Case(
        b"id: 1\n" + PARTIAL_EVENT + b": ping\n\n\n" + COMPLETED_EVENT + b": ping\n\n",
        passes=b":d: 1\n" + PARTIAL_EVENT + b": ping\n\n\n" + COMPLETED_EVENT + b": ping\n\n",
    ),
    "a name alone": Case(b"event: ping\n\n" + BOTH, passes=b":vent: ping\n\n" + BOTH),
    "empty data": Case(
        b"event: ping\ndata:\n\ndata\n\n" + BOTH, passes=b":vent: ping\n:ata:\n\n:ata\n\n" + BOTH
    ),
    "garbage between events": Case(b"\xff\xfe<html>\n\n" + BOTH, passes=b":?<html>\n\n" + BOTH),
    "crlf": Case(BOTH.replace(b"\n", b"\r\n")),
    "cr": Case(BOTH.replace(b"\n", b"\r")),
    "no event lines": Case(
        b"".join(line for line in BOTH.splitlines(keepends=True) if not line.startswith(b"event"))
    ),
    "no blanks behind the colons": Case(BOTH.replace(b": {", b":{").replace(b"event: ", b"event:")),
    "data in several lines": Case(SPLIT, (C,), unbilled=True),
    "a last event without its blank line": Case(
        PARTIAL_EVENT + COMPLETED_EVENT[:-1], passes=BOTH + b"\n"
    ),
    "a last event without a line end": Case(PARTIAL_EVENT + COMPLETED_EVENT[:-2], passes=BOTH),
    "an unknown event": Case(
        b'event: hint\ndata: {"type":"hint","deep":{"a":[null]}}\n\n' + BOTH, ("hint", P, C)
    ),
    "unknown fields": Case(b"extra: 1\n" + BOTH.replace(b'{"type"', b'{"more":{"a":1.50},"type"')),
    "two pictures": Case(
        PARTIAL_EVENT + COMPLETED_EVENT + PARTIAL_EVENT + SECOND, (P, C, P, C), n=2, cost=2 * COST
    ),
    "a picture more than was asked for": Case(BOTH + SECOND, passes=BOTH),
    "an error behind the picture": Case(BOTH + b"data: " + NESTED + b"\n\n", passes=BOTH),
    "a long line": Case(
        event("partial_image", picture=MEGABYTES) + event("completed", b'"usage":' + USAGE)
    ),
    "a long comment": Case(b": " + MEGABYTES + b"\n\n" + BOTH),
    "a nested error": Case(
        PARTIAL_EVENT + b"event: error\ndata: " + NESTED + b"\n\n", (P,), "boom"
    ),
    "an error without its name": Case(PARTIAL_EVENT + b"data: " + NESTED + b"\n\n", (P,), "boom"),
    "a flat error": Case(
        PARTIAL_EVENT + b'data: {"type":"error","code":"boom","message":"No."}\n\n',
        (P,),
        "boom",
        "No.",
    ),
    "a flat error by its name": Case(
        PARTIAL_EVENT + b'event: error\ndata: {"code":"boom","message":"No."}\n\n',
        (P,),
        "boom",
        "No.",
    ),
    "an error as a text": Case(
        PARTIAL_EVENT + b'data: {"error":"out of paint"}\n\n', (P,), "", "out of paint"
    ),
    "bad json": Case(PARTIAL_EVENT + b'data: {"type":\n\n' + COMPLETED_EVENT, (P,), BROKEN),
    "data that is no json": Case(PARTIAL_EVENT + b"data: ping\n\n" + COMPLETED_EVENT, (P,), BROKEN),
    "a long line that breaks": Case(
        PARTIAL_EVENT + b'data: {"b64_json":"' + MEGABYTES + b"\n\n", (P,), BROKEN
    ),
    "cut inside an event": Case(PARTIAL_EVENT + COMPLETED_EVENT[:60], (P,), BROKEN),
    "no completed": Case(PARTIAL_EVENT, (P,), BROKEN),
    "no completed, but done": Case(PARTIAL_EVENT + b"data: [DONE]\n\n", (P,), BROKEN),
    "nothing": Case(b"", (), BROKEN),
    "only comments": Case(b": a\n\n", (), BROKEN),
    "an error at once": Case(b"event: error\ndata: " + NESTED + b"\n\n", (), "boom"),
    "html": Case(b"<html>Bad Gateway</html>", (), BROKEN),
}
FREE = {"an error at once"}


def prompt_of(sdk: str, name: str) -> str:
    return f"{sdk}: [{name}]"


def script(gateway: GatewayUnderTest, name: str, body: bytes, kind: str = EVENTS) -> None:
    gateway.sandbox.rules.add(Rule(prompt=f"[{name}]", status=200, body=body, content_type=kind))


def cost_of(name: str, case: Case, bound: int) -> int:
    if case.cost is not None:
        return case.cost
    if case.unbilled or (case.code is not None and name not in FREE):
        return bound
    return COST if case.code is None else 0


async def python_sees(
    sdk: AsyncOpenAI, name: str, n: int = 1
) -> tuple[list[dict[str, Any]], APIError | None]:
    seen: list[dict[str, Any]] = []

    async def watch() -> None:
        asked = {**ASKED, "prompt": prompt_of("python", name), "n": n}
        async for one in await sdk.images.generate(stream=True, **asked):
            seen.append(json.loads(one.to_json()))

    try:
        await watch()
    except APIError as error:
        return seen, error
    return seen, None


@pytest.mark.parametrize("name", CASES)
async def test_what_python_sees(gateway: GatewayUnderTest, name: str) -> None:
    case = CASES[name]
    script(gateway, name, case.body)
    async with gateway.sdk(max_retries=2) as sdk:
        seen, error = await python_sees(sdk, name, case.n)
    assert [one["type"] for one in seen] == list(case.kinds)
    if case.code is None:
        assert error is None
    else:
        assert error is not None
        assert (error.code or "") == case.code
        assert case.says in error.message
        if not case.kinds:
            assert isinstance(error, APIStatusError)
    [(receipt, _)] = await gateway.told.until(1)
    assert len(gateway.sandbox.journal) == 1
    assert (await booked(gateway)).cost == cost_of(name, case, receipt.bound)


@pytest.mark.skipif(
    test_node.NODE is None or not (test_node.TOOLS / "node_modules" / "openai").is_dir(),
    reason="no Node.js, or no openai package: run tests/e2e/node/install.sh (needs npm)",
)
@pytest.mark.node
async def test_node_sees_the_same(gateway: GatewayUnderTest) -> None:
    orders = []
    for name, case in CASES.items():
        script(gateway, name, case.body)
        orders.append({"prompt": prompt_of("node", name), "stream": True, "n": case.n})
    said = await test_node.node(gateway, "fidelity.mjs", MODEL=MODEL, ORDERS=json.dumps(orders))
    async with gateway.sdk() as sdk:
        for name, case in CASES.items():
            seen = said[prompt_of("node", name)]
            assert [one["type"] for one in seen["events"]] == list(case.kinds), name
            assert seen["events"] == (await python_sees(sdk, name, case.n))[0], name
            ended = seen["ended"]
            if case.code is None:
                assert ended is None, name
            else:
                assert (ended["code"] or "") == case.code, name
                assert case.says in ended["message"], name
                assert ended["attempts"] == 1, name


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.code is None])
async def test_every_other_byte_passes_as_it_came(gateway: GatewayUnderTest, name: str) -> None:
    case = CASES[name]
    script(gateway, name, case.body)
    asked = {**ASKED, "prompt": f"[{name}]", "n": case.n, "stream": True}
    async with RawClient.to(gateway.port, KEY) as client:
        answer = await client.post("/v1/images/generations", json.dumps(asked).encode(), (JSON,))
        assert answer.status == 200
        assert answer.header("content-type") == "text/event-stream; charset=utf-8"
        passes = case.body if case.passes is None else case.passes
        if passes != answer.body:
            assert answer.body[:2000] == passes[:2000]
            assert answer.body_bytes == len(passes)
            raise AssertionError("they differ behind the beginning")
        # The body has ended, and the connection is as good as before.
        assert await client.is_open()


# The other form


async def test_json_becomes_one_completed_event_with_all_it_said(
    gateway: GatewayUnderTest,
) -> None:
    script(gateway, "json", JSON_ANSWER, "application/json")
    async with gateway.sdk() as sdk:
        [last], error = await python_sees(sdk, "json")
    assert error is None
    assert last == {
        "type": C,
        "b64_json": "iVBORw0KGgoA",
        "background": "opaque",
        "created_at": 7,
        "revised_prompt": "r",
        "extra": {"a": [1]},
        "size": "1024x1024",
        "usage": json.loads(USAGE),
    }


ANSWERS = {
    "plain": (BOTH, {"usage": json.loads(USAGE), "size": "1024x1024"}),
    "crlf": (BOTH.replace(b"\n", b"\r\n"), {"usage": json.loads(USAGE), "size": "1024x1024"}),
    "no blank line": (COMPLETED_EVENT[:-2], {"usage": json.loads(USAGE), "size": "1024x1024"}),
    "done": (BOTH + b"data: [DONE]\n\n", {"usage": json.loads(USAGE), "size": "1024x1024"}),
    "an id, and noise": (b"id: 1\nretry: 2\n\n: a\n\n\xff\n\n" + SPLIT, {}),
    "several lines": (SPLIT, {}),
    "no type": (WITHOUT_TYPE, {}),
    "more fields": (event("completed", b'"extra":{"a":[1]}'), {"extra": {"a": [1]}}),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_a_stream_becomes_one_answer_with_all_it_said(
    gateway: GatewayUnderTest, name: str
) -> None:
    body, said = ANSWERS[name]
    script(gateway, name, body)
    async with gateway.sdk() as sdk:
        raw = await sdk.images.with_raw_response.generate(**{**ASKED, "prompt": f"[{name}]"})
    assert json.loads(raw.content) == {"data": [{"b64_json": "iVBORw0KGgoA"}], **said}


NO_ANSWERS = {
    "error": (b"event: error\ndata: " + NESTED + b"\n\n", 502, "boom", False),
    "flat": (b'data: {"type":"error","code":"boom","message":"No."}\n\n', 502, "boom", False),
    "moderation": (
        b'data: {"error":{"message":"No.","code":"moderation_blocked"}}\n\n',
        400,
        "moderation_blocked",
        False,
    ),
    "behind a partial": (PARTIAL_EVENT + b"data: " + NESTED + b"\n\n", 502, "boom", True),
    "bad": (b"data: oops\n\n", 502, BROKEN, True),
    "none": (PARTIAL_EVENT, 502, BROKEN, True),
}


@pytest.mark.parametrize("name", NO_ANSWERS)
async def test_a_stream_that_is_no_answer_is_an_error(gateway: GatewayUnderTest, name: str) -> None:
    """200 with an error would be a silent success in both SDKs (contract 4.8)."""
    body, status, code, billed = NO_ANSWERS[name]
    script(gateway, name, body)
    async with gateway.sdk(max_retries=2) as sdk:
        with pytest.raises(APIStatusError) as raised:
            await sdk.images.generate(**{**ASKED, "prompt": f"[{name}]"})
    assert (raised.value.status_code, raised.value.code) == (status, code)
    assert len(gateway.sandbox.journal) == 1
    [(receipt, _)] = await gateway.told.until(1)
    assert (await booked(gateway)).cost == (receipt.bound if billed else 0)


# Keep-alives


async def test_both_sdks_pass_over_keep_alives(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing comes, comments do; they stand between two events, whatever those bring."""
    follow = Spool.follow
    monkeypatch.setattr(Spool, "follow", lambda self, *_: follow(self, 0.01))
    go_on = asyncio.Event()

    async def upstream(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\nid: 1\n")
        await peer.send(PARTIAL_EVENT + COMPLETED_EVENT[:50])
        await go_on.wait()
        await peer.send(COMPLETED_EVENT[50:])

    async with raw_server(upstream) as server, start(at(server.port)) as gateway:
        body = json.dumps({**ASKED, "stream": True}).encode()
        async with RawClient.to(gateway.port, KEY) as client:
            head = (JSON, f"content-length: {len(body)}")
            await client.head("/v1/images/generations", head)
            await client.send(body)
            for _ in range(5):
                await client.reader.readuntil(KEEP_ALIVE)
            go_on.set()
        await gateway.told.until(1)
        go_on.clear()
        async with gateway.sdk() as sdk:
            asked = {**ASKED, "prompt": "python"}
            stream = await sdk.images.generate(stream=True, **asked)
            assert (await anext(stream)).type == P
            asyncio.get_running_loop().call_later(0.1, go_on.set)
            assert [one.type async for one in stream] == [C]
        if test_node.NODE is not None and (test_node.TOOLS / "node_modules" / "openai").is_dir():
            go_on.clear()
            orders = json.dumps([{"prompt": "node", "stream": True, "n": 1}])
            asking = asyncio.create_task(
                test_node.node(gateway, "fidelity.mjs", MODEL=MODEL, ORDERS=orders)
            )
            while server.accepted < 3:  # noqa: ASYNC110 - the peer has no event to set
                await asyncio.sleep(0.01)
            asyncio.get_running_loop().call_later(0.1, go_on.set)
            seen = (await asking)["node"]
            assert ([one["type"] for one in seen["events"]], seen["ended"]) == ([P, C], None)
