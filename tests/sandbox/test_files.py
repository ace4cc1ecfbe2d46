"""/v1/files and what is edited from it, with the real SDK."""

from __future__ import annotations

import re

import httpx
import pytest
from openai import BadRequestError, InternalServerError, NotFoundError, OpenAI
from openai.types import FilePurpose

from gateway.domain.call import Json
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.shelf import Shelf
from tests.clock import StillClock
from tests.sandbox.calls import FLARE, png


def test_a_file_lives_until_it_is_deleted(sdk: OpenAI) -> None:
    content = png()
    made = sdk.files.create(file=("cat.png", content, "image/png"), purpose="vision")
    assert re.fullmatch(r"file-[A-Za-z0-9]{22}", made.id)
    assert (made.object, made.filename, made.purpose) == ("file", "cat.png", "vision")
    assert (made.bytes, made.status, made.expires_at) == (len(content), "processed", None)
    assert sdk.files.retrieve(made.id) == made
    assert sdk.files.content(made.id).content == content
    assert sdk.files.list().data == [made]
    gone = sdk.files.delete(made.id)
    assert (gone.id, gone.deleted) == (made.id, True)
    for ask in (sdk.files.retrieve, sdk.files.delete, sdk.files.content):
        with pytest.raises(NotFoundError) as refused:
            ask(made.id)
        assert refused.value.message.endswith(f"No such File object: {made.id}")
        assert (refused.value.code, refused.value.param) == (None, "id")


def test_another_keys_file_is_no_file(server: SandboxServer, sdk: OpenAI) -> None:
    made = sdk.files.create(file=("a.png", png(), "image/png"), purpose="vision")
    with OpenAI(base_url=server.base_url, api_key="other", max_retries=0) as other:
        assert other.files.list().data == []
        with pytest.raises(NotFoundError):
            other.files.retrieve(made.id)
        with pytest.raises(NotFoundError):
            other.files.delete(made.id)
    assert sdk.files.retrieve(made.id).id == made.id


def test_a_list_in_pages(sdk: OpenAI) -> None:
    purposes: tuple[FilePurpose, ...] = ("vision", "user_data", "vision")
    ids = [
        sdk.files.create(file=(f"{n}.txt", b"x"), purpose=purpose).id
        for n, purpose in enumerate(purposes)
    ]
    assert [file.id for file in sdk.files.list()] == ids[::-1]
    assert [file.id for file in sdk.files.list(order="asc", limit=1)] == ids
    page = sdk.files.list(order="asc", limit=2)
    assert ([file.id for file in page.data], page.has_more) == (ids[:2], True)
    assert [file.id for file in sdk.files.list(purpose="vision", order="asc")] == [ids[0], ids[2]]
    with pytest.raises(NotFoundError):
        sdk.files.list(after="file-nobody")
    with pytest.raises(BadRequestError):
        sdk.files.list(limit=0)


def test_a_file_expires(sdk: OpenAI, clock: StillClock) -> None:
    made = sdk.files.create(
        file=("a.png", png()),
        purpose="vision",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert made.expires_at == made.created_at + 3600
    clock.advance(3599)
    assert sdk.files.retrieve(made.id) == made
    clock.advance(1)
    with pytest.raises(NotFoundError):
        sdk.files.retrieve(made.id)
    assert sdk.files.list().data == []


@pytest.mark.parametrize(
    ("range_", "status", "start", "end"),
    [
        ("bytes=0-9", 206, 0, 10),
        ("bytes=40-", 206, 40, 50),
        ("bytes=-5", 206, 45, 50),
        ("bytes=45-900", 206, 45, 50),
        ("bytes=50-", 416, 0, 0),
        ("lines=1-2", 200, 0, 50),
    ],
)
def test_a_part_of_a_file(
    sdk: OpenAI, http: httpx.Client, range_: str, status: int, start: int, end: int
) -> None:
    content = bytes(range(50))
    made = sdk.files.create(file=('a b"é.bin', content), purpose="user_data")
    answer = http.get(f"/files/{made.id}/content", headers={"range": range_})
    assert (answer.status_code, answer.content) == (status, content[start:end])
    assert answer.headers["accept-ranges"] == "bytes"
    if status == 206:
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/50"


@pytest.mark.parametrize(
    ("data", "files", "code", "param"),
    [
        ({"purpose": "vision"}, {"other": ("a", b"x")}, "unknown_parameter", "other"),
        ({}, {"file": ("a", b"x")}, "missing_required_parameter", "purpose"),
        ({"purpose": "fun"}, {"file": ("a", b"x")}, "invalid_value", "purpose"),
        ({"purpose": "vision", "n": "1"}, {"file": ("a", b"x")}, "unknown_parameter", "n"),
        (
            {"purpose": "vision", "expires_after[anchor]": "created_at"},
            {"file": ("a", b"x")},
            "missing_required_parameter",
            "expires_after.seconds",
        ),
        (
            {
                "purpose": "vision",
                "expires_after[anchor]": "created_at",
                "expires_after[seconds]": "60",
            },
            {"file": ("a", b"x")},
            "integer_below_min_value",
            "expires_after.seconds",
        ),
    ],
)
def test_uploads_that_are_refused(
    http: httpx.Client,
    data: dict[str, str],
    files: dict[str, tuple[str, bytes]],
    code: str,
    param: str,
) -> None:
    answer = http.post("/files", data=data, files=files)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)


def test_a_part_of_nothing(sdk: OpenAI, http: httpx.Client) -> None:
    made = sdk.files.create(file=("empty", b""), purpose="user_data")
    assert http.get(f"/files/{made.id}/content").status_code == 200
    part = http.get(f"/files/{made.id}/content", headers={"range": "bytes=0-"})
    assert (part.status_code, part.headers["content-range"]) == (416, "bytes */0")


def test_an_upload_is_a_form(http: httpx.Client) -> None:
    answer = http.post("/files", json={"purpose": "vision"})
    assert answer.json()["error"]["code"] == "unsupported_content_type"


def test_an_edit_of_stored_files(server: SandboxServer, sdk: OpenAI, http: httpx.Client) -> None:
    picture = sdk.files.create(file=("cat.png", png(80, 60)), purpose="vision")
    mask = sdk.files.create(file=("mask.png", png(80, 60)), purpose="vision")
    body: dict[str, Json] = {
        "model": FLARE,
        "prompt": "A hat",
        "images": [{"file_id": picture.id}],
        "mask": {"file_id": mask.id},
    }
    answer = http.post("/images/edits", json=body)
    assert answer.json()["usage"]["input_tokens_details"]["image_tokens"] == 1457
    assert [(file.field, file.filename) for file in server.journal[2].files] == [
        ("images[0].file_id", "cat.png"),
        ("mask.file_id", "mask.png"),
    ]
    refused = http.post("/images/edits", json=body, headers={"authorization": "Bearer other"})
    assert refused.status_code == 404
    error = refused.json()["error"]
    assert error["message"] == f"No such File object: {picture.id}"
    assert error["param"] == "images[0].file_id"
    text = sdk.files.create(file=("a.txt", b"hello"), purpose="user_data")
    body["images"] = [{"file_id": text.id}]
    refused = http.post("/images/edits", json=body)
    assert refused.json()["error"]["code"] == "unsupported_file_mimetype"


def test_faults_of_files(server: SandboxServer, sdk: OpenAI, http: httpx.Client) -> None:
    server.rules.add(Rule(path="/files", method="GET", status=500))
    server.rules.add(Rule(path="/files/*", times=1, method="DELETE", status=503))
    server.rules.add(Rule(path="/files/*/content", cut_after_bytes=10))
    server.rules.add(Rule(prompt="bad.png", times=1, cut_before_headers=True))
    with pytest.raises(InternalServerError):
        sdk.files.list()
    with pytest.raises(httpx.RemoteProtocolError):
        http.post("/files", data={"purpose": "vision"}, files={"file": ("bad.png", b"x")})
    made = sdk.files.create(file=("good.png", png()), purpose="vision")
    with pytest.raises(InternalServerError):
        sdk.files.delete(made.id)
    with pytest.raises(httpx.RemoteProtocolError):
        http.get(f"/files/{made.id}/content")
    assert sdk.files.delete(made.id).deleted


def test_two_keys_of_one_project_share_their_files(server: SandboxServer) -> None:
    def client(key: str) -> OpenAI:
        return OpenAI(base_url=server.base_url, api_key=key, max_retries=0)

    with client("red@1") as first, client("red@2") as second, client("blue@1") as other:
        made = first.files.create(file=("a.png", png()), purpose="vision")
        assert second.files.retrieve(made.id) == made
        with pytest.raises(NotFoundError):
            other.files.retrieve(made.id)


def test_what_is_on_a_shelf_is_bounded() -> None:
    shelf: Shelf[bytes] = Shelf(len, max_bytes=10)
    shelf.put("red", "a", b"12345")
    shelf.put("blue", "b", b"12345")
    shelf.put("red", "a", b"123456")
    assert (shelf.get("red", "a"), shelf.get("blue", "b")) == (b"123456", None)
    shelf.put("red", "c", b"1234")
    assert shelf.of("red") == [b"123456", b"1234"]
    assert shelf.take("red", "a") == b"123456"
    assert shelf.take("red", "a") is None
    assert (shelf.of("red"), len(shelf)) == ([b"1234"], 1)
