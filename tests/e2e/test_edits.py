"""Edits through the front door: the SDK's forms and the JSON form arrive byte for byte, and the
gateway stays small however large they are."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import io
import json
import os
import re
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import httpx2
import openai
import pytest
from PIL import Image

from gateway.sandbox.journal import FilePart, Journal, Record
from gateway.sandbox.rules import Rule
from gateway.sandbox.server import SandboxServer
from gateway.sandbox.watch import Gate
from tests.processes import GatewayProcess
from tests.raw import BOUNDARY, FORM, JSON, Field, RawAnswer, RawClient, form, texts
from tests.running import (
    ALIAS,
    KEY,
    MODEL,
    OTHER_KEY,
    TODAY,
    GatewayUnderTest,
    Start,
    TestClock,
    config_of,
)

EDITS = "/v1/images/edits"
GENERATIONS = "/v1/images/generations"
MB = 1_000_000
Body: TypeAlias = Callable[[], bytes]


def png(size: tuple[int, int] = (64, 64), mode: str = "RGBA", shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, shade).save(out, "PNG")
    return out.getvalue()


def heavy_png(size_bytes: int) -> bytes:
    """A real picture of so many bytes: what an SDK would send from a camera, without the time
    that compressing noise takes. The bytes stand in a chunk of their own before the end."""
    plain = png()
    content = os.urandom(size_bytes - len(plain) - 12)
    chunk = b"prIv" + content
    end = plain.index(b"IEND") - 4
    extra = struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return plain[:end] + extra + plain[end:]


PICTURE = png(shade=1)
OTHER = png(shade=2)
MASK = png(shade=0)


def arrived(content: bytes, field: str, filename: str, kind: str = "image/png") -> FilePart:
    return FilePart(field, filename, kind, hashlib.sha256(content).hexdigest(), len(content))


def sent_by(client: list[bytes]) -> Callable[[httpx2.Request], Any]:
    """A hook of httpx that notes the body of every request, as it goes on the wire."""

    async def note(request: httpx2.Request) -> None:
        client.append(await request.aread())

    return note


@asynccontextmanager
async def noting_sdk(
    gateway: GatewayUnderTest,
) -> AsyncIterator[tuple[openai.AsyncOpenAI, list[bytes]]]:
    bodies: list[bytes] = []
    http = httpx2.AsyncClient(event_hooks={"request": [sent_by(bodies)]})
    async with gateway.sdk(http_client=http) as sdk:
        yield sdk, bodies


def only(journal: Journal) -> Record:
    [record] = journal
    return record


def with_model(body: bytes) -> bytes:
    """What the upstream must get for a form that names the alias once."""
    assert body.count(b"\r\n\r\n" + ALIAS.encode() + b"\r\n") == 1
    return body.replace(b"\r\n\r\n" + ALIAS.encode() + b"\r\n", f"\r\n\r\n{MODEL}\r\n".encode())


# What the SDK makes of its arguments


def as_path(folder: Path) -> Any:
    return folder / "ca t.png"


def as_open_file(folder: Path) -> Any:
    return (folder / "ca t.png").open("rb")


def as_tuple(folder: Path) -> Any:
    return ("../../etc/pass wd.png", PICTURE, "image/png")


def as_one_in_a_list(folder: Path) -> Any:
    return [("one.webp", PICTURE, "image/png")]


def as_two(folder: Path) -> Any:
    return [("b.png", OTHER, "image/png"), ("a.png", PICTURE, "image/png")]


def as_sixteen(folder: Path) -> Any:
    return [(f"{at}.png", png(shade=at), "image/png") for at in range(16, 0, -1)]


FORMS: tuple[tuple[Callable[[Path], Any], list[FilePart]], ...] = (
    (as_path, [arrived(PICTURE, "image", "ca t.png")]),
    (as_open_file, [arrived(PICTURE, "image", "ca t.png")]),
    (as_tuple, [arrived(PICTURE, "image", "../../etc/pass wd.png")]),
    (as_one_in_a_list, [arrived(PICTURE, "image[]", "one.webp")]),
    (as_two, [arrived(OTHER, "image[]", "b.png"), arrived(PICTURE, "image[]", "a.png")]),
    (
        as_sixteen,
        [arrived(png(shade=at), "image[]", f"{at}.png") for at in range(16, 0, -1)],
    ),
)


@pytest.mark.parametrize(
    ("image", "files"), FORMS, ids=lambda value: getattr(value, "__name__", "")
)
async def test_what_the_sdk_sends_arrives_byte_for_byte(
    gateway: GatewayUnderTest,
    tmp_path: Path,
    image: Callable[[Path], Any],
    files: list[FilePart],
) -> None:
    (tmp_path / "ca t.png").write_bytes(PICTURE)
    given = image(tmp_path)
    async with noting_sdk(gateway) as (sdk, sent):
        answer = await sdk.images.edit(
            model=ALIAS, image=given, prompt=f"Not {ALIAS}: äöü 🎈", quality="low"
        )
    if isinstance(given, io.IOBase):
        given.close()
    assert answer.data
    assert answer.data[0].b64_json
    record = only(gateway.sandbox.journal)
    assert list(record.files) == files
    assert record.body == with_model(sent[0])
    assert record.fields["prompt"] == f"Not {ALIAS}: äöü 🎈"
    assert record.header("content-length") == str(len(record.body))


@pytest.mark.parametrize("image", [PICTURE, io.BytesIO(PICTURE)], ids=["bytes", "BytesIO"])
async def test_a_file_without_a_type_is_for_the_upstream_to_refuse(
    start: Start, image: Any
) -> None:
    async with start({"compat": {"media_types": False}}) as gateway:
        async with gateway.sdk() as sdk:
            with pytest.raises(openai.BadRequestError) as refused:
                await sdk.images.edit(model=MODEL, image=image, prompt="p", quality="low")
        assert refused.value.code == "unsupported_file_mimetype"
        assert refused.value.param == "image"
        record = only(gateway.sandbox.journal)
        octets = arrived(PICTURE, "image", "upload", "application/octet-stream")
        assert list(record.files) == [octets]
        assert record.status == 400
        assert await gateway.usage() == []
        assert (await gateway.metrics())["gateway_ledger_open_holds"] == 0


@pytest.mark.parametrize("layer", ["mask", "markup"])
async def test_a_mask_or_a_markup_comes_along(gateway: GatewayUnderTest, layer: str) -> None:
    extra: dict[str, Any] = {layer: ("layer.png", MASK, "image/png")}
    async with noting_sdk(gateway) as (sdk, sent):
        await sdk.images.edit(
            model=ALIAS,
            image=[("a.png", PICTURE, "image/png"), ("b.png", OTHER, "image/png")],
            prompt="p",
            quality="low",
            **extra,
        )
    record = only(gateway.sandbox.journal)
    assert list(record.files) == [
        arrived(PICTURE, "image[]", "a.png"),
        arrived(OTHER, "image[]", "b.png"),
        arrived(MASK, layer, "layer.png"),
    ]
    assert record.body == with_model(sent[0])


AUTHOR = {
    "provider": "openai",
    "model": "gpt-6-astra",
    "valid_from": "2026-01-01",
    "source": "made up",
    "usd_per_million_tokens": {"text_in": 1, "text_out": 8},
    "max_output_tokens": 1000,
}


@pytest.mark.parametrize("way", ["svg", "extra_body"])
async def test_a_nested_object_arrives_as_the_sdk_flattens_it(start: Start, way: str) -> None:
    svg = {"model": "gpt-6-astra", "reasoning": {"effort": "low"}}
    given: dict[str, Any] = {"svg": svg} if way == "svg" else {"extra_body": {"svg": svg}}
    async with start({"prices": {"rows": [AUTHOR]}}) as gateway:
        async with noting_sdk(gateway) as (sdk, sent):
            await sdk.images.edit(
                model=ALIAS,
                image=("a.png", PICTURE, "image/png"),
                prompt="p",
                output_format="svg",
                **given,
            )
        record = only(gateway.sandbox.journal)
        assert b'name="svg[reasoning][effort]"' in record.body
        assert record.fields["svg"] == svg
        assert record.body == with_model(sent[0])


async def test_an_unknown_field_and_a_list_pass(gateway: GatewayUnderTest) -> None:
    """OpenAI refuses what it does not know, in its own words: they are not ours to say."""
    async with noting_sdk(gateway) as (sdk, sent):
        with pytest.raises(openai.BadRequestError) as refused:
            await sdk.images.edit(
                model=ALIAS,
                image=("a.png", PICTURE, "image/png"),
                prompt="p",
                extra_body={"custom": {"a": ["x", "y"]}},
            )
    assert refused.value.code == "unknown_parameter"
    assert only(gateway.sandbox.journal).body == with_model(sent[0])
    assert await gateway.usage() == []


async def test_an_edit_streams(gateway: GatewayUnderTest) -> None:
    async with gateway.sdk() as sdk:
        stream = await sdk.images.edit(
            model=MODEL,
            image=("a.png", PICTURE, "image/png"),
            prompt="p",
            quality="low",
            stream=True,
            partial_images=2,
        )
        kinds = [event.type async for event in stream]
    assert kinds == [
        "image_edit.partial_image",
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    [(receipt, _)] = await gateway.told.until(1)
    assert receipt.stream
    assert receipt.cost > 0
    [row] = await gateway.usage()
    assert (row.requests, row.images, row.cost) == (1, 1, receipt.cost)


async def test_the_json_form_with_data_urls(gateway: GatewayUnderTest) -> None:
    body = {
        "images": [{"image_url": data_url(PICTURE)}, {"image_url": data_url(OTHER)}],
        "mask": {"image_url": data_url(MASK)},
        "model": ALIAS,
        "prompt": "p",
        "quality": "low",
    }
    async with noting_sdk(gateway) as (sdk, sent):
        answer = await sdk.post("/images/edits", body=body, cast_to=openai.types.ImagesResponse)
    assert answer.data
    record = only(gateway.sandbox.journal)
    assert [(file.field, file.sha256) for file in record.files] == [
        ("images[0].image_url", hashlib.sha256(PICTURE).hexdigest()),
        ("images[1].image_url", hashlib.sha256(OTHER).hexdigest()),
        ("mask.image_url", hashlib.sha256(MASK).hexdigest()),
    ]
    assert record.body == sent[0].replace(f'"{ALIAS}"'.encode(), f'"{MODEL}"'.encode())


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# What no Python SDK sends


def image_part(content: bytes = PICTURE, name: str = "image", filename: str = "a.png") -> Field:
    return Field(name, content, filename)


@pytest.mark.parametrize(
    "fields",
    [
        [image_part(), *texts(n="1", model=ALIAS, quality="low", prompt="last")],
        [image_part(OTHER, "image[]"), *texts(model=ALIAS), image_part(PICTURE, "image[]", "b"),
         *texts(quality="low", prompt="p")],
        [*texts(prompt="p"), image_part(OTHER, "image[0]"), image_part(PICTURE, "image[1]"),
         *texts(quality="low", model=ALIAS)],
        [image_part(filename="b\\\"'%22;ä 文.png"), *texts(prompt="p", quality="low", model=ALIAS)],
    ],
    ids=["image first, prompt last", "mixed", "numbered", "a strange filename"],
)  # fmt: skip
@pytest.mark.parametrize("step", [0, 1, 7], ids=["whole", "by 1", "by 7"])
async def test_any_order_and_any_cut(
    gateway: GatewayUnderTest, fields: list[Field], step: int
) -> None:
    """With a length and without one; a chunk for each byte, too."""
    body = form(*fields)
    async with RawClient.to(gateway.port, KEY) as client:
        if step:
            pieces = (body[at : at + step] for at in range(0, len(body), step))
            answer = await client.post_chunked(EDITS, pieces, [FORM])
        else:
            answer = await client.post(EDITS, body, [FORM])
        assert await client.is_open()
    assert answer.status == 200, answer.body[:500]
    record = only(gateway.sandbox.journal)
    assert record.body == with_model(body)
    assert record.header("content-length") == str(len(record.body))
    assert record.header("transfer-encoding") is None
    assert [file.sha256 for file in record.files] == [
        hashlib.sha256(field.content).hexdigest() for field in fields if field.filename is not None
    ]


async def test_two_requests_on_one_connection_are_answered_in_order(
    gateway: GatewayUnderTest,
) -> None:
    body = form(*texts(prompt="p", model=ALIAS, quality="low"), image_part())
    async with RawClient.to(gateway.port, KEY) as client:
        for _ in range(2):
            await client.head(EDITS, [FORM, f"content-length: {len(body)}"])
            await client.send(body)
        answers = [await client.answer(), await client.answer()]
    assert [answer.header("x-cache") for answer in answers] == ["miss", "hit"]
    assert answers[0].body == answers[1].body


# The cache


async def edit(
    gateway: GatewayUnderTest, *fields: Field, boundary: str = BOUNDARY, key: str = KEY
) -> RawAnswer:
    kind = f"content-type: multipart/form-data; boundary={boundary}"
    async with RawClient.to(gateway.port, key) as client:
        answer = await client.post(EDITS, form(*fields, boundary=boundary), [kind])
    assert answer.status == 200, answer.body[:500]
    return answer


async def test_an_edit_is_bought_once(gateway: GatewayUnderTest) -> None:
    """Boundaries, names of files and the order of the fields decide nothing; pictures do."""
    order = texts(prompt="p", model=MODEL, quality="low", n="1")
    pictures = [image_part(PICTURE, "image[]"), image_part(OTHER, "image[]")]
    mask = Field("mask", MASK, "m.png")
    first = await edit(gateway, *order, *pictures, mask)
    assert first.header("x-cache") == "miss"

    renamed = [image_part(PICTURE, "image[]", "x"), image_part(OTHER, "image[]", "y")]
    same = [
        await edit(gateway, *order, *pictures, mask, boundary="another-one"),
        await edit(gateway, mask, *renamed, *reversed(order)),
        await edit(gateway, *texts(prompt="p", model=ALIAS, quality="low", n="1"), *pictures, mask),
    ]
    for answer in same:
        assert answer.header("x-cache") == "hit"
        assert answer.header("age") == "0"
        assert answer.header("x-cost-usd") == "0"
        assert answer.body == first.body

    other_mask = Field("mask", png(shade=9), "m.png")
    for others in (
        (*order, *pictures),
        (*order, *pictures, other_mask),
        (*order, *reversed(pictures), mask),
        (*order, pictures[0], mask),
        (*order[1:], *texts(prompt="q"), *pictures, mask),
    ):
        assert (await edit(gateway, *others)).header("x-cache") == "miss"
    assert gateway.sandbox.journal.billed_requests == 6
    rows = await gateway.usage()
    assert (sum(row.requests for row in rows), sum(row.cached_requests for row in rows)) == (9, 3)


async def test_a_kept_edit_is_the_teams_own(gateway: GatewayUnderTest) -> None:
    order = [*texts(prompt="p", model=MODEL, quality="low"), image_part()]
    assert (await edit(gateway, *order)).header("x-cache") == "miss"
    assert (await edit(gateway, *order, key=OTHER_KEY)).header("x-cache") == "miss"
    assert (await edit(gateway, *order)).header("x-cache") == "hit"
    assert (await edit(gateway, *order, key=OTHER_KEY)).header("x-cache") == "hit"


# Large ones


async def test_a_large_body_waits_in_a_file_without_a_name(
    start: Start, sandbox: SandboxServer, tmp_path: Path
) -> None:
    gate = Gate()
    sandbox.rules.add(Rule(wait_for=gate, payload_bytes=1000))
    body = form(*texts(prompt="p", model=ALIAS), image_part(heavy_png(3 * MB)))
    spools = tmp_path / "data/blobs/spool"
    async with start() as gateway, RawClient.to(gateway.port, KEY) as client:
        await client.head(EDITS, [FORM, f"content-length: {len(body)}"])
        await client.send(body)
        await gate.arrived()
        held = await gateway.metrics()
        assert held['gateway_inflight_bytes{where="disk"}'] == len(body)
        assert held['gateway_inflight_bytes{where="memory"}'] == 0
        assert open_files(spools) == 1
        assert list(spools.iterdir()) == []
        gate.set()
        assert (await client.answer()).status == 200
        await gateway.told.until(1)
        after = await gateway.metrics()
        assert after['gateway_inflight_bytes{where="disk"}'] == 0
        assert after['gateway_inflight_bytes{where="memory"}'] == 0
        assert open_files(spools) == 1, "it is kept for a moment: the next one writes over it"
        assert list(spools.iterdir()) == []
    assert open_files(spools) == 0
    record = only(sandbox.journal)
    sent = with_model(body)
    assert record.body_sha256 == hashlib.sha256(sent).hexdigest()


def open_files(folder: Path) -> int:
    """How many files of a folder this process has open, deleted ones too."""
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            count += str(descriptor.readlink()).startswith(f"{folder}/")
        except OSError:
            continue  # the descriptor of this very listing
    return count


# A gateway in a process of its own, whose memory can be looked at


def memory_peak(process: GatewayProcess) -> int:
    """The most that a process ever had in memory, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.fixture
def small_journal(clock: TestClock) -> Iterator[SandboxServer]:
    with SandboxServer(clock, journal=Journal(body_bytes=0)) as running:
        yield running


def subprocess_config(folder: Path, sandbox: SandboxServer, **changes: Any) -> Path:
    return config_of(
        folder, sandbox.base_url, {"server": {"host": "127.0.0.1", "port": 0}, **changes}
    )


async def at_once(
    config: Path, sandbox: SandboxServer, path: str, kind: str, bodies: Sequence[Body], size: int
) -> tuple[list[RawAnswer], int]:
    """Sends all, lets the sandbox answer when it has all, each with a picture of ``size`` bytes in
    base64. Returns the answers, and by how many bytes the gateway's memory grew meanwhile."""
    gate = Gate()
    async with AsyncExitStack() as stack:
        process = stack.enter_context(GatewayProcess(config)).wait_ready()
        clients = [await stack.enter_async_context(RawClient.to(process.port, KEY)) for _ in bodies]
        # One of each first, so that what is loaded once is not counted.
        warm = form(*texts(prompt="warm", model=MODEL, quality="low"), image_part())
        assert (await clients[0].post(EDITS, warm, [FORM])).status == 200
        asked = json.dumps({"model": MODEL, "prompt": "warm", "quality": "low"}).encode()
        assert (await clients[0].post(GENERATIONS, asked, [JSON])).status == 200
        sandbox.journal.clear()
        sandbox.rules.add(Rule(wait_for=gate, payload_bytes=size))
        before = memory_peak(process)
        flying = [
            asyncio.create_task(client.post(path, body(), [kind], keep=False))
            for client, body in zip(clients, bodies, strict=True)
        ]
        await gate.arrived(len(bodies))
        gate.set()
        answers = await asyncio.gather(*flying)
        grown = memory_peak(process) - before
    assert [answer.status for answer in answers] == [200] * len(bodies)
    return answers, grown


async def test_ten_edits_of_40_mb_at_once_do_not_grow_the_gateway(
    tmp_path: Path, small_journal: SandboxServer
) -> None:
    """Measured: 72 MB before, 9 to 12 more with 400 MB under way."""
    picture = heavy_png(40 * MB)

    def body(number: int) -> bytes:
        return form(*texts(prompt=f"p{number}", model=ALIAS), image_part(picture))

    bodies = [functools.partial(body, number) for number in range(10)]
    config = subprocess_config(tmp_path, small_journal)
    _, grown = await at_once(config, small_journal, EDITS, FORM, bodies, 1000)
    assert [list(record.files) for record in small_journal.journal] == [
        [arrived(picture, "image", "a.png")]
    ] * len(bodies)
    assert grown < 100 * MB


async def test_300_answers_of_2_7_mb_landing_at_once(
    tmp_path: Path, small_journal: SandboxServer
) -> None:
    """Measured: 72 MB before, 240 more with 810 MB under way. 134 of them are
    ``server.buffer_bytes``, 67 are ``cache.memory_bytes``."""
    size = 2_700_000

    def body(number: int) -> bytes:
        asked = {"model": MODEL, "prompt": f"number {number}", "quality": "low"}
        return json.dumps(asked).encode()

    bodies = [functools.partial(body, number) for number in range(300)]
    config = subprocess_config(tmp_path, small_journal)
    answers, grown = await at_once(config, small_journal, GENERATIONS, JSON, bodies, size)
    assert sorted(answer.sha256 for answer in answers) == sorted(
        answer_digest(record, size) for record in small_journal.journal
    )
    assert grown < 350 * MB


def answer_digest(record: Record, size: int) -> str:
    """Of what the sandbox answered: all alike but for the picture's serial number."""
    picture = f"iVBORw0KGgoA{record.number:08d}0000".ljust(size, "A")
    head = {"created": int(TODAY.timestamp()), "background": "opaque"}
    tail: Mapping[str, Any] = {
        "output_format": "png", "quality": "low", "size": "1024x1024", "usage": record.usage,
    }  # fmt: skip
    body = json.dumps({**head, "data": [{"b64_json": picture}], **tail}, separators=(",", ":"))
    return hashlib.sha256(body.encode()).hexdigest()
