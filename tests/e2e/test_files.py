"""Files, and what else is passed on, through the front door with the real SDK: each team's apart,
each id where it lives, and nothing of it costs."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types import FileObject
from PIL import Image

from gateway.domain.errors import LedgerUnavailable
from gateway.sandbox.journal import Record
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from gateway.stores.sqlite_ownership import SQLiteOwnership
from tests.running import KEY, MODEL, OTHER_KEY, GatewayUnderTest, Start, TestClock

FORM = "multipart/form-data; boundary=openai-12345"
ONE, TWO = "sk-upstream-number-one", "sk-upstream-number-two"
TWO_KEYS = {"upstreams": {"openai": {"api_keys": [ONE, TWO]}}}


def png(shade: int = 1, size: tuple[int, int] = (64, 64)) -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", size, shade).save(out, "PNG")
    return out.getvalue()


PICTURE = png()


async def uploaded(sdk: AsyncOpenAI, content: bytes = PICTURE, **options: Any) -> FileObject:
    return await sdk.files.create(
        file=("cat.png", content, "image/png"), purpose=options.pop("purpose", "vision"), **options
    )


def asked_of(sandbox: SandboxServer) -> list[str]:
    return [f"{one.method} {one.path}" for one in sandbox.journal]


def key_of(record: Record) -> str:
    return (record.header("authorization") or "").removeprefix("Bearer ")


def edit_of(*ids: str, **more: Any) -> dict[str, Any]:
    images = [{"file_id": id} for id in ids]
    return {"model": MODEL, "prompt": "a hat", "images": images, "quality": "low", **more}


async def edited(sdk: AsyncOpenAI, body: dict[str, Any]) -> dict[str, Any]:
    return await sdk.post("/images/edits", body=body, cast_to=dict[str, Any])


def form(*parts: tuple[str, str | None, bytes], boundary: str = "openai-12345") -> bytes:
    """Parts in this order: name, filename (None: a text), content."""
    lines = []
    for name, filename, content in parts:
        named = "" if filename is None else f'; filename="{filename}"'
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
        lines.append(head.encode() + content + b"\r\n")
    return b"".join(lines) + f"--{boundary}--\r\n".encode()


async def in_pieces(content: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def test_the_life_of_a_file(gateway: GatewayUnderTest, sandbox: SandboxServer) -> None:
    async with gateway.sdk() as sdk:
        made = await uploaded(sdk)
        assert (made.filename, made.purpose, made.bytes) == ("cat.png", "vision", len(PICTURE))
        shown = await sdk.files.retrieve(made.id)
        assert shown == made
        assert (await sdk.files.content(made.id)).content == PICTURE
        listed = await sdk.files.list()
        assert [(one.id, one.filename, one.bytes) for one in listed.data] == [
            (made.id, "cat.png", len(PICTURE))
        ]
        gone = await sdk.files.delete(made.id)
        assert (gone.id, gone.deleted) == (made.id, True)
        assert (await sdk.files.list()).data == []
        for ask in (sdk.files.retrieve, sdk.files.delete, sdk.files.content):
            with pytest.raises(openai.NotFoundError) as refused:
                await ask(made.id)
            assert refused.value.body == {
                "message": f"No such File object: {made.id}",
                "type": "invalid_request_error",
                "param": "id",
                "code": "not_found",
            }
    # The lists and the refusals are ours alone.
    path = f"/v1/files/{made.id}"
    assert asked_of(sandbox) == [
        "POST /v1/files", f"GET {path}", f"GET {path}/content", f"DELETE {path}"
    ]  # fmt: skip
    told = await gateway.told.until(9)
    assert {(one.operation, one.cost, one.team) for one, _ in told} == {("file", 0, "growth")}
    assert told[0][0].upstream == "openai"
    assert told[0][0].bytes_in > len(PICTURE)
    assert await gateway.usage() == []


async def test_what_the_answer_says(gateway: GatewayUnderTest) -> None:
    async with gateway.sdk() as sdk:
        raw = await sdk.files.with_raw_response.create(file=("a.txt", b"x"), purpose="user_data")
    assert raw.headers["x-request-id"].startswith("req_")
    assert raw.headers["x-gateway-upstream"] == "openai"
    assert raw.headers["x-gateway-attempts"] == "1"
    assert float(raw.headers["x-cost-usd"]) == 0
    assert raw.headers["content-type"] == "application/json"
    assert int(raw.headers["content-length"]) == len(raw.content)


async def test_teams_never_see_each_others_files(
    gateway: GatewayUnderTest, sandbox: SandboxServer
) -> None:
    async with gateway.sdk() as ours, gateway.http(OTHER_KEY) as theirs:
        made = await uploaded(ours)
        before = asked_of(sandbox)
        assert (await theirs.get("/files")).json()["data"] == []
        unknown = made.id[:-4] + "AAAA"
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            foreign = await theirs.request(method, f"/files/{made.id}{path}")
            nobody = await theirs.request(method, f"/files/{unknown}{path}")
            assert foreign.status_code == nobody.status_code == 404
            assert foreign.text.replace(made.id, unknown) == nobody.text
            assert foreign.headers.keys() == nobody.headers.keys()
        for param in ("images[0]", "mask", "markup"):
            body = edit_of(made.id)
            if param != "images[0]":
                body["images"] = [{"image_url": data_url(PICTURE)}]
                body[param] = {"file_id": made.id}
            foreign = await theirs.post("/images/edits", json=body)
            nobody = await theirs.post(
                "/images/edits", content=json.dumps(body).replace(made.id, unknown),
                headers={"content-type": "application/json"},
            )  # fmt: skip
            assert foreign.status_code == nobody.status_code == 404
            assert foreign.json()["error"]["param"] == f"{param}.file_id"
            assert foreign.text.replace(made.id, unknown) == nobody.text
            estimate = await theirs.post("/images/estimate", json=body)
            assert estimate.status_code == 404
        assert asked_of(sandbox) == before
        assert (await ours.files.retrieve(made.id)).id == made.id
    metrics = await gateway.metrics()
    assert metrics['gateway_cross_team_denied_total{kind="file"}'] == 9


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


async def test_a_list_in_pages(gateway: GatewayUnderTest, clock: TestClock) -> None:
    ids = []
    async with gateway.sdk() as sdk, gateway.sdk(OTHER_KEY) as other:
        for number, purpose in enumerate(("vision", "user_data", "vision")):
            ids.append((await uploaded(sdk, bytes([number]), purpose=purpose)).id)
            await uploaded(other)
            clock.advance(seconds=1)
        assert [one.id async for one in sdk.files.list()] == ids[::-1]
        assert [one.id async for one in sdk.files.list(order="asc", limit=1)] == ids
        page = await sdk.files.list(order="asc", limit=2)
        assert ([one.id for one in page.data], page.has_more) == (ids[:2], True)
        found = [one.id async for one in sdk.files.list(purpose="vision", order="asc")]
        assert found == [ids[0], ids[2]]
        assert (await sdk.files.list(after="file-nobody")).data == []
        for wrong in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}):
            with pytest.raises(openai.BadRequestError) as refused:
                await sdk.files.list(**wrong)
            assert refused.value.param == next(iter(wrong))


async def test_a_file_expires(gateway: GatewayUnderTest, clock: TestClock) -> None:
    async with gateway.sdk() as sdk:
        made = await uploaded(sdk, expires_after={"anchor": "created_at", "seconds": 3600})
        assert made.expires_at == made.created_at + 3600
        await uploaded(sdk, b"stays")
        assert len((await sdk.files.list()).data) == 2
        clock.advance(hours=1, seconds=1)
        assert len((await sdk.files.list()).data) == 1
        with pytest.raises(openai.NotFoundError):
            await sdk.files.retrieve(made.id)


@pytest.mark.parametrize(
    ("parts", "param", "code"),
    [
        ([("purpose", None, b"batch"), ("file", "a", b"x")], "purpose", "invalid_value"),
        ([("purpose", None, b"assistants"), ("file", "a", b"x")], "purpose", "invalid_value"),
        ([("file", "a", b"x")], "purpose", "missing_required_parameter"),
        ([("purpose", None, b"vision")], "file", "missing_required_parameter"),
        ([("purpose", None, b"vision"), ("file", None, b"x")], "file", "invalid_type"),
        ([("purpose", "p", b"vision"), ("file", "a", b"x")], "purpose", "invalid_type"),
        ([("purpose", None, b"vision")] * 2, "purpose", "duplicate_parameter"),
        ([("Purpose", None, b"batch")], "Purpose", "unknown_parameter"),
        (
            [("purpose", None, b"vision"), ("file", "a", b"x"),
             ("expires_after[seconds]", None, b"3600")],
            "expires_after[anchor]", "missing_required_parameter",
        ),
        (
            [("purpose", None, b"vision"), ("file", "a", b"x"),
             ("expires_after[anchor]", None, b"created_at"),
             ("expires_after[seconds]", None, b"60")],
            "expires_after[seconds]", "invalid_value",
        ),
    ],
)  # fmt: skip
async def test_what_is_no_upload(
    gateway: GatewayUnderTest,
    sandbox: SandboxServer,
    parts: list[tuple[str, str | None, bytes]],
    param: str,
    code: str,
) -> None:
    async with gateway.http() as http:
        answer = await http.post("/files", content=form(*parts), headers={"content-type": FORM})
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)
    assert asked_of(sandbox) == []


async def test_as_node_sends_it(gateway: GatewayUnderTest, sandbox: SandboxServer) -> None:
    """The file first, and chunked: its length is not known before its end (contract 3.3)."""
    content = os.urandom(300_000)
    body = form(("file", "big.bin", content), ("purpose", None, b"user_data"))
    async with gateway.http() as http, gateway.sdk() as sdk:
        answer = await http.post(
            "/files", content=in_pieces(body, 7001), headers={"content-type": FORM}
        )
        assert answer.status_code == 200, answer.text
        assert (await sdk.files.content(answer.json()["id"])).content == content
    [sent, _] = sandbox.journal
    assert sent.header("content-length") == str(len(body))


async def test_limits_of_size(start: Start, sandbox: SandboxServer) -> None:
    small = {"files": {"max_bytes": 10_000, "max_total_bytes": 15_000}}
    async with start(small) as gateway, gateway.sdk() as sdk, gateway.sdk(OTHER_KEY) as other:
        with pytest.raises(openai.APIStatusError) as refused:
            await uploaded(sdk, b"x" * 10_001)
        assert refused.value.status_code == 413
        assert asked_of(sandbox) == []
        first = await uploaded(sdk, b"x" * 10_000)
        with pytest.raises(openai.BadRequestError) as full:
            await uploaded(sdk, b"y" * 5_001)
        assert full.value.code == "file_storage_exceeded"
        await uploaded(other, b"y" * 10_000)
        await sdk.files.delete(first.id)
        await uploaded(sdk, b"y" * 5_001)


async def test_a_range_of_the_content(gateway: GatewayUnderTest) -> None:
    async with gateway.sdk() as sdk, gateway.http() as http:
        made = await uploaded(sdk)
        path = f"/files/{made.id}/content"
        part = await http.get(path, headers={"range": "bytes=4-9"})
        assert (part.status_code, part.content) == (206, PICTURE[4:10])
        assert part.headers["content-range"] == f"bytes 4-9/{len(PICTURE)}"
        assert part.headers["x-content-type-options"] == "nosniff"
        beyond = await http.get(path, headers={"range": f"bytes={len(PICTURE)}-"})
        assert beyond.status_code == 416


async def test_switched_off(start: Start, sandbox: SandboxServer) -> None:
    off = {name: {"enabled": False} for name in ("files", "moderations", "provenance")}
    async with start(off) as gateway, gateway.http() as http:
        for path in ("/files", "/files/file-1", "/files/file-1/content"):
            answer = await http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
        for path in ("/moderations", "/content_provenance_checks", "/files"):
            answer = await http.post(path, json={})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
    assert asked_of(sandbox) == []


async def test_at_the_door(start: Start, sandbox: SandboxServer) -> None:
    limited = {"teams": {"growth": {"limits": {"requests_per_minute": 1}}}}
    async with start(limited) as gateway:
        async with gateway.http("igw_nobody-knows-this-key") as stranger:
            assert (await stranger.get("/files")).status_code == 401
        async with gateway.http() as http:
            wrong = await http.put("/files", content=b"x")
            assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, POST")
            assert (await http.get("/files/")).status_code == 200
            late = await http.get("/files")
            assert late.status_code == 429
            assert late.json()["error"]["code"] == "rate_limit_exceeded"
        last = (await gateway.told.until(4))[-1][0]
        assert (last.operation, last.reason) == ("file", "requests_per_minute")


async def test_an_edit_of_files_goes_to_their_key(start: Start, sandbox: SandboxServer) -> None:
    """The sandbox, like OpenAI, knows a file by the project of its key alone."""
    async with start(TWO_KEYS) as gateway, gateway.sdk() as sdk:
        first = await uploaded(sdk)
        sandbox.rules.add(Rule(path="/files", method="POST", key=ONE, status=401, times=1))
        second = await uploaded(sdk, png(2))
        keys = [key_of(one) for one in sandbox.journal]
        assert keys == [ONE, ONE, TWO]
        for _ in range(3):
            answer = await edited(sdk, edit_of(second.id, prompt=f"hat {_}"))
            assert answer["data"][0]["b64_json"]
            assert key_of(list(sandbox.journal)[-1]) == TWO
        assert (await sdk.files.retrieve(second.id)).id == second.id
        assert key_of(list(sandbox.journal)[-1]) == TWO
        assert first.id != second.id


async def test_an_edit_of_files_is_priced_kept_and_sent_as_it_came(
    gateway: GatewayUnderTest, sandbox: SandboxServer
) -> None:
    async with gateway.sdk() as sdk, gateway.http() as http:
        cat, hat, mask = [await uploaded(sdk, png(shade)) for shade in (1, 2, 0)]
        body = edit_of(cat.id, hat.id, mask={"file_id": mask.id})
        estimate = (await http.post("/images/estimate", json=body)).json()
        answer = await http.post("/images/edits", json=body)
        assert answer.status_code == 200, answer.text
        assert estimate["bound_usd"] is not None
        assert json.loads(list(sandbox.journal)[-1].body or b"{}") == body
        plain = {**body, "images": [{"image_url": data_url(PICTURE)}], "mask": None}
        without = (await http.post("/images/estimate", json=plain)).json()
        assert float(estimate["bound_usd"]) > float(without["bound_usd"])
        again = await http.post("/images/edits", json=body)
        assert (answer.headers["x-cache"], again.headers["x-cache"]) == ("miss", "hit")
        other = await http.post("/images/edits", json={**body, "images": body["images"][:1]})
        assert other.headers["x-cache"] == "miss"
    [row] = await gateway.usage()
    assert (row.requests, row.team) == (3, "growth")


async def test_a_file_lives_at_one_upstream(
    start: Start, sandbox: SandboxServer, clock: TestClock
) -> None:
    with SandboxServer(clock) as elsewhere:
        two = {
            "upstreams": {
                "other": {
                    "kind": "openai", "base_url": elsewhere.base_url, "api_keys": [TWO],
                },
            },
            "files": {"upstream": "other"},
            "models": {
                MODEL: {"upstream": "openai"},
                "there": {"upstream": "other", "model": MODEL},
                "both": {"upstreams": ["openai", "other"], "model": MODEL},
            },
        }  # fmt: skip
        async with start(two) as gateway, gateway.sdk() as sdk:
            made = await uploaded(sdk)
            assert asked_of(elsewhere) == ["POST /v1/files"]
            with pytest.raises(openai.BadRequestError) as refused:
                await edited(sdk, edit_of(made.id))
            assert refused.value.code == "file_elsewhere"
            assert refused.value.param == "images[0].file_id"
            for name in ("there", "both", "both", "both"):
                await edited(sdk, edit_of(made.id, model=name, user=name))
            elsewhere.rules.add(Rule(path="/images/edits", status=500))
            with pytest.raises(openai.InternalServerError):
                await edited(sdk, edit_of(made.id, model="both", prompt="fails"))
            assert asked_of(sandbox) == []


@pytest.mark.parametrize(
    "body",
    [
        {"images": [{"file_id": "file-x", "image_url": "data:image/png;base64,AAAA"}]},
        {"images": [{"image_url": "data:", "File_ID": "file-x"}]},
        {"images": [{"file_id": 7}]},
        {"reference_images": [{"file_id": "file-x"}]},
        {"mask": {"file_id": ["file-x"]}},
        {"file_ids": ["file-x"]},
    ],
)
async def test_no_id_passes_unseen(
    gateway: GatewayUnderTest, sandbox: SandboxServer, body: dict[str, Any]
) -> None:
    whole = {"model": MODEL, "prompt": "x", "images": [{"image_url": data_url(PICTURE)}], **body}
    if "File_ID" in str(body):
        whole["images"][0]["image_url"] = data_url(PICTURE)
    async with gateway.http() as http:
        answer = await http.post("/images/edits", json=whole)
        assert answer.status_code == 400, answer.text
        hidden = form(
            ("model", None, MODEL.encode()), ("prompt", None, b"x"),
            ("image", "a.png", PICTURE), ("images[0][file_id]", None, b"file-x"),
        )  # fmt: skip
        answer = await http.post("/images/edits", content=hidden, headers={"content-type": FORM})
        assert answer.status_code == 400, answer.text
    assert asked_of(sandbox) == []


async def test_who_leaves_while_uploading_has_sent_nothing(
    gateway: GatewayUnderTest, sandbox: SandboxServer
) -> None:
    body = form(("purpose", None, b"vision"), ("file", "a.png", PICTURE))
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: {FORM}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body[:-30])
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    [(receipt, delivery)] = await gateway.told.until(1)
    assert (receipt.reason, delivery.gone) == ("client_gone", "upload")
    assert asked_of(sandbox) == []
    async with gateway.sdk() as sdk:
        assert (await sdk.files.list()).data == []


@pytest.mark.parametrize(
    ("rule", "status", "code"),
    [
        (Rule(status=401), 503, "upstream_account_refused"),
        (
            Rule(status=429, body={"error": {"message": "x", "type": "insufficient_quota",
                                             "code": "insufficient_quota", "param": None}}),
            503, "upstream_account_exhausted",
        ),
        (Rule(status=429, headers={"retry-after": "3"}), 429, None),
        (Rule(status=500), 500, None),
        (Rule(cut_after_bytes=0), 502, "upstream_no_answer"),
        (Rule(cut_after_bytes=20), 502, "upstream_no_answer"),
    ],
)  # fmt: skip
async def test_what_an_upstream_refuses(
    gateway: GatewayUnderTest, sandbox: SandboxServer, rule: Rule, status: int, code: str | None
) -> None:
    async with gateway.sdk() as sdk:
        sandbox.rules.add(rule)
        with pytest.raises(openai.APIStatusError) as refused:
            await uploaded(sdk)
        assert refused.value.status_code == status
        assert code is None or refused.value.code == code
        assert "bought" not in str(refused.value) or "Nothing was" in str(refused.value)
        assert "sk-upstream-secret" not in refused.value.response.text
        assert len(sandbox.journal) == 1
        assert (await sdk.files.list()).data == []
        if status == 502:
            assert refused.value.response.headers["x-should-retry"] == "false"
        if status == 429:
            assert refused.value.response.headers["retry-after"] == "3"
    assert (await gateway.told.until(2))[0][0].upstream == "openai"


@pytest.mark.parametrize(
    ("body", "gone"),
    [
        (b"", True),
        (b"<html>404 Not Found</html>", True),
        ({"detail": "Not Found"}, True),
        ({"error": "Not Found"}, True),
        ({"message": "No such File object: file-1", "code": 404}, True),
        ({"error": {"message": "Invalid URL (GET /files/file-1)", "code": None}}, False),
    ],
)
async def test_what_is_gone_at_an_upstream_of_few_words(
    gateway: GatewayUnderTest, sandbox: SandboxServer, body: Any, gone: bool
) -> None:
    """Its path was right when the file was made: a bare 404 is about the file. A path that is
    not served any more takes no row with it."""
    async with gateway.sdk() as sdk, gateway.http() as http:
        made = await uploaded(sdk)
        sandbox.rules.add(Rule(path="/files/*", status=404, body=body))
        for method, left in (("GET", 1), ("DELETE", 0 if gone else 1)):
            answer = await http.request(method, f"/files/{made.id}")
            assert answer.status_code == (404 if gone else 502)
            assert len((await sdk.files.list()).data) == left
            code = answer.json()["error"]["code"]
            assert (code == "upstream_not_there") == (not gone)


async def test_a_refused_key_gives_way_to_another(start: Start, sandbox: SandboxServer) -> None:
    async with start(TWO_KEYS) as gateway, gateway.sdk() as sdk:
        sandbox.rules.add(Rule(key=ONE, status=401))
        raw = await sdk.files.with_raw_response.create(file=("a", b"x"), purpose="vision")
        assert raw.headers["x-gateway-attempts"] == "2"
        assert [key_of(one) for one in sandbox.journal] == [ONE, TWO]
        # What belongs to a key is asked of that one alone.
        id = json.loads(raw.content)["id"]
        sandbox.rules.add(Rule(key=TWO, path="/files/*", status=401))
        with pytest.raises(openai.APIStatusError) as refused:
            await sdk.files.retrieve(id)
        assert refused.value.status_code == 503
        assert [key_of(one) for one in list(sandbox.journal)[2:]] == [TWO]


async def test_a_file_that_the_provider_has_lost(
    gateway: GatewayUnderTest, sandbox: SandboxServer
) -> None:
    async with gateway.sdk() as sdk:
        made = await uploaded(sdk)
        async with httpx.AsyncClient(
            base_url=sandbox.base_url,
            headers={"authorization": "Bearer sk-upstream-secret"},
            verify=False,
        ) as provider:
            assert (await provider.delete(f"/files/{made.id}")).status_code == 200
        with pytest.raises(openai.NotFoundError):
            await sdk.files.retrieve(made.id)
        assert len((await sdk.files.list()).data) == 1
        with pytest.raises(openai.NotFoundError):
            await sdk.files.delete(made.id)
        assert (await sdk.files.list()).data == []


async def test_a_file_whose_owner_cannot_be_written_down_is_not_kept(
    gateway: GatewayUnderTest, sandbox: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(self: SQLiteOwnership, owned: object) -> None:
        raise LedgerUnavailable("The disk is full.")

    async with gateway.sdk() as sdk:
        with monkeypatch.context() as patch:
            patch.setattr(SQLiteOwnership, "record", away)
            with pytest.raises(openai.InternalServerError) as refused:
                await uploaded(sdk)
        assert (refused.value.status_code, refused.value.code) == (503, "ledger_unavailable")
        [made, deleted] = sandbox.journal
        assert (made.method, deleted.method) == ("POST", "DELETE")
        assert (await uploaded(sdk)).id
        assert len((await sdk.files.list()).data) == 1


async def test_an_upload_is_finished_whoever_leaves(
    gateway: GatewayUnderTest, sandbox: SandboxServer
) -> None:
    gate = Gate()
    sandbox.rules.add(Rule(path="/files", method="POST", wait_for=gate))
    body = form(("purpose", None, b"vision"), ("file", "a.png", PICTURE))
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: {FORM}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
    await gate.arrived()
    writer.close()
    await writer.wait_closed()
    gate.set()
    await gateway.told.until(1)
    async with gateway.sdk() as sdk:
        assert len((await sdk.files.list()).data) == 1


async def test_moderations_pass(gateway: GatewayUnderTest, sandbox: SandboxServer) -> None:
    async with gateway.sdk() as sdk, gateway.http() as http:
        words = "a harbour"
        judged = await sdk.moderations.create(model="omni-moderation-latest", input=words)
        assert len(judged.results) == 1
        [sent] = sandbox.journal
        assert json.loads(sent.body)["input"] == words
        assert key_of(sent) == "sk-upstream-secret"
        form_instead = await http.post("/moderations", content=b"x", headers={"content-type": FORM})
        assert form_instead.status_code == 415
        huge = json.dumps({"input": "x" * (8 << 20)}).encode()
        large = await http.post(
            "/moderations", content=huge, headers={"content-type": "application/json"}
        )
        assert large.status_code == 413
        late = await http.post(
            "/moderations", content=in_pieces(huge, 1 << 20),
            headers={"content-type": "application/json"},
        )  # fmt: skip
        assert late.status_code == 413
        assert (await http.get("/moderations")).headers["allow"] == "POST"
        empty = await http.post("/moderations", headers={"content-type": "application/json"})
        assert empty.status_code == 400
    told = await gateway.told.until(6)
    assert {(one.operation, one.cost) for one, _ in told} == {("moderation", 0)}
    metrics = await gateway.metrics()
    counted = {name: value for name, value in metrics.items() if "moderation" in name}
    assert counted[
        'gateway_requests_total{cache="off",endpoint="moderation",model="none",status="2xx",'
        'team="growth"}'
    ] == 1  # fmt: skip
    assert not [name for name in counted if "images" in name or "spend" in name]
    assert await gateway.usage() == []


async def test_where_a_picture_is_from(gateway: GatewayUnderTest, sandbox: SandboxServer) -> None:
    body = form(("file", "a.png", PICTURE))
    async with gateway.http() as http:
        answer = await http.post(
            "/content_provenance_checks", content=body, headers={"content-type": FORM}
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["object"] == "content_provenance_check"
    [sent] = sandbox.journal
    assert sent.files[0].size_bytes == len(PICTURE)
    [(receipt, _)] = await gateway.told.until(1)
    assert receipt.operation == "provenance"


async def test_nothing_is_asked_while_the_store_is_away(
    gateway: GatewayUnderTest, sandbox: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway.sdk() as sdk:
        made = await uploaded(sdk)

        async def away(*_: object, **__: object) -> None:
            raise LedgerUnavailable("The database does not answer.")

        before = asked_of(sandbox)
        with monkeypatch.context() as patch:
            for name in ("find", "owned", "total_bytes"):
                patch.setattr(SQLiteOwnership, name, away)
            for ask in (
                sdk.files.retrieve(made.id), sdk.files.list(), uploaded(sdk),
                edited(sdk, edit_of(made.id)), sdk.files.delete(made.id),
            ):  # fmt: skip
                with pytest.raises(openai.InternalServerError) as refused:
                    await ask
                assert refused.value.status_code == 503
        assert asked_of(sandbox) == before
        assert (await sdk.files.retrieve(made.id)).id == made.id


async def test_a_download_that_is_cut_looks_cut(
    gateway: GatewayUnderTest, sandbox: SandboxServer
) -> None:
    async with gateway.sdk() as sdk, gateway.http() as http:
        made = await uploaded(sdk)
        sandbox.rules.add(Rule(path="/files/*/content", cut_after_bytes=10))
        with pytest.raises(httpx.RemoteProtocolError):
            await http.get(f"/files/{made.id}/content")
    _, (receipt, delivery) = await gateway.told.until(2)
    assert (receipt.status, delivery.gone) == (200, "broken")
