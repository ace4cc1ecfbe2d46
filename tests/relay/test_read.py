"""Reading a request: what the SDKs send, what is refused and how, and that no cut matters."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import struct
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gateway.domain.call import (
    Call,
    Encoding,
    InputImage,
    Layout,
    Operation,
    Reference,
    Spot,
)
from gateway.domain.errors import BodyTooLarge, GatewayError, InvalidRequest, UnsupportedMedia
from gateway.relay.read import ReadRules, reader_for

RULES = ReadRules()
GENERATION, EDIT = Operation.GENERATION, Operation.EDIT
BOUNDARY = "b0undary"
FORM = f"multipart/form-data; boundary={BOUNDARY}"


def picture(kind: str = "PNG", size: tuple[int, int] = (8, 6), **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size).save(out, kind, **options)
    return out.getvalue()


PNG = picture()
JPEG = picture("JPEG", (16, 9))


def read(
    operation: Operation,
    body: bytes,
    content_type: str = "application/json",
    *,
    step: int = 0,
    rules: ReadRules = RULES,
    length: int | None = None,
) -> Call:
    reader = reader_for(operation, content_type, None, length, rules)
    for at in range(0, len(body), step or len(body) or 1):
        reader.feed(body[at : at + (step or len(body))])
    return reader.close()


def generation(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "p", **fields}).encode()


Field = tuple[str, str | bytes] | tuple[str, str | bytes, str] | tuple[str, str | bytes, str, str]


def form(*fields: Field) -> bytes:
    """A form of ``(name, content[, filename[, content type]])``."""
    body = b""
    for name, content, *more in fields:
        body += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"'.encode()
        if more:
            body += (
                f'; filename="{more[0]}"\r\nContent-Type: {(more[1:] or ["image/png"])[0]}'.encode()
            )
        body += b"\r\n\r\n" + (content.encode() if isinstance(content, str) else content) + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


BASE: tuple[Field, ...] = (("prompt", "p"), ("model", "m"))
IMAGE: Field = ("image", PNG, "a.png")


def url(data: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def edit(**fields: Any) -> bytes:
    return generation(**{"images": [{"image_url": url(PNG)}], **fields})


def refusal(operation: Operation, body: bytes, content_type: str, **options: Any) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        read(operation, body, content_type, **options)
    return caught.value


# What the SDK really sends.


def sent(endpoint: str, **arguments: Any) -> tuple[bytes, str]:
    """The body and content type that the installed SDK puts on the wire."""
    requests: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        request.read()
        requests.append(request)
        return httpx2.Response(200, json={"created": 1, "data": []})

    with httpx2.Client(transport=httpx2.MockTransport(answer)) as http:
        client = openai.OpenAI(api_key="sk-x", base_url="http://gateway/v1", http_client=http)
        getattr(client.images, endpoint)(**arguments)
    return requests[0].content, requests[0].headers["content-type"]


SDK_CALLS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "generate": (
        "generate",
        {"model": "gpt-image-2", "prompt": "ein Bär", "n": 2, "size": None, "quality": "low"},
        {"n": 2, "quality": "low"},
    ),
    "generate stream": (
        "generate",
        {"model": "gpt-image-2", "prompt": "a", "stream": True, "partial_images": 2},
        {"stream": True, "partial_images": 2},
    ),
    "generate extra": (
        "generate",
        {"model": "gpt-image-2", "prompt": "a", "extra_body": {"seed": 7}},
        {"unknown": frozenset({"seed"})},
    ),
    "edit one file": (
        "edit",
        {"model": "gpt-image-2", "prompt": "a", "image": ("bär.png", PNG), "n": 3},
        {"n": 3, "roles": ["image"]},
    ),
    "edit bytes": (
        "edit",
        {"model": "gpt-image-2", "prompt": "a", "image": PNG},
        {"roles": ["image"], "media": ["application/octet-stream"]},
    ),
    "edit list and mask": (
        "edit",
        {
            "model": "gpt-image-2",
            "prompt": "a",
            "image": [("a.png", PNG), ('b".jpg', JPEG)],
            "mask": ("m.png", PNG),
            "size": "1024x1024",
        },
        {"roles": ["image", "image", "mask"], "size": "1024x1024"},
    ),
    "edit stream": (
        "edit",
        {
            "model": "gpt-image-2",
            "prompt": "a",
            "image": [PNG],
            "stream": True,
            "partial_images": 1,
        },
        {"stream": True, "partial_images": 1, "roles": ["image"]},
    ),
    "edit nested": (
        "edit",
        {
            "model": "gpt-image-2.6-flare",
            "prompt": "a",
            "image": ("a.png", PNG),
            "output_format": "svg",
            "extra_body": {
                "svg": {"model": "gpt-5", "reasoning": {"effort": "low"}},
                "custom": {"a": [1, 2]},
            },
        },
        {
            "output_format": "svg",
            "unknown": frozenset({"custom"}),
            "parameters": {
                "prompt": "a",
                "output_format": "svg",
                "svg": {"model": "gpt-5", "reasoning": {"effort": "low"}},
                "custom": {"a": ["1", "2"]},
            },
        },
    ),
}


def sdk_call(name: str) -> tuple[Operation, bytes, str, dict[str, Any], dict[str, Any]]:
    endpoint, arguments, expected = SDK_CALLS[name]
    body, content_type = sent(endpoint, **arguments)
    return (EDIT if endpoint == "edit" else GENERATION), body, content_type, arguments, expected


def lies(body: bytes, call: Call, name: str) -> bytes:
    """What lies in the body where a field's value does."""
    return body[slice(*call.layout.fields[name].value)]


@pytest.mark.parametrize("name", SDK_CALLS)
def test_what_the_sdk_sends(name: str) -> None:
    operation, body, content_type, arguments, expected = sdk_call(name)
    call = read(operation, body, content_type)
    assert call.model == arguments["model"]
    assert call.model_said == call.model
    assert lies(body, call, "model").strip(b'"').decode() == call.model
    assert call.parameters["prompt"] == arguments["prompt"]
    assert call.prompt_bytes == len(arguments["prompt"].encode())
    assert call.body_bytes == len(body)
    assert call.content_type == content_type
    assert call.encoding is (Encoding.JSON if operation is GENERATION else Encoding.MULTIPART)
    assert "model" not in call.parameters
    assert None not in call.parameters.values()
    expected = dict(expected)
    assert [item.role for item in call.inputs] == expected.pop(
        "roles", ["image"] * len(call.inputs)
    )
    media = [item.media_type for item in call.inputs]
    assert media == expected.pop("media", media)
    for field, value in {"n": 1, "stream": False, "unknown": frozenset(), **expected}.items():
        assert getattr(call, field) == value, field


@pytest.mark.parametrize("name", SDK_CALLS)
def test_no_cut_matters_to_what_the_sdk_sends(name: str) -> None:
    operation, body, content_type, _, _ = sdk_call(name)
    whole = read(operation, body, content_type)
    for at in range(1, len(body)):
        reader = reader_for(operation, content_type, None, len(body), RULES)
        reader.feed(body[:at])
        reader.feed(body[at:])
        assert reader.close() == whole
    for step in (1, 2, 3, 7, 64):
        assert read(operation, body, content_type, step=step) == whole


@pytest.mark.parametrize("name", SDK_CALLS)
def test_what_the_sdk_sends_is_refused_when_it_is_cut(name: str) -> None:
    operation, body, content_type, _, _ = sdk_call(name)
    for at in range(len(body) - 2):
        error = refusal(operation, body[:at], content_type)
        assert error.code in ("invalid_multipart", "invalid_json")
        assert error.status == 400


def test_the_order_of_node() -> None:
    """The picture first, the prompt last (contract 2.2)."""
    body = form(IMAGE, ("stream", "true"), ("model", "gpt-image-2"), ("n", "2"), ("prompt", "é"))
    call = read(EDIT, body, FORM, step=5)
    assert (call.model, call.n, call.stream, call.prompt_bytes) == ("gpt-image-2", 2, True, 2)
    assert lies(body, call, "model") == b"gpt-image-2"
    assert call.inputs == (
        InputImage("image", hashlib.sha256(PNG).hexdigest(), len(PNG), "image/png", 8, 6),
    )


@given(
    order=st.permutations([*BASE, IMAGE, ("mask", PNG, "m.png"), ("n", "2"), ("size", "auto")]),
    cuts=st.lists(st.integers(1, 200), min_size=1, max_size=20),
)
def test_any_order_and_any_chunks(order: list[Field], cuts: list[int]) -> None:
    body = form(*order)
    reader = reader_for(EDIT, FORM, None, None, RULES)
    at = turn = 0
    while at < len(body):
        step = cuts[turn % len(cuts)]
        reader.feed(body[at : at + step])
        at += step
        turn += 1
    call = reader.close()
    assert call == read(EDIT, body, FORM)
    assert (call.n, call.size, call.model) == (2, "auto", "m")
    assert sorted(item.role for item in call.inputs) == ["image", "mask"]
    assert call.parameters == {"prompt": "p", "n": 2, "size": "auto"}


# JSON.


def test_defaults_and_nulls() -> None:
    nulls = dict.fromkeys(
        ["n", "size", "quality", "stream", "partial_images", "output_format", "frame_count", "svg"]
    )
    call = read(GENERATION, generation(**nulls))
    bare = read(GENERATION, generation())
    assert replace(call, layout=bare.layout, body_bytes=bare.body_bytes) == bare
    assert bare == Call(
        operation=GENERATION,
        encoding=Encoding.JSON,
        content_type="application/json",
        model="m",
        prompt_bytes=1,
        parameters={"prompt": "p"},
        body_bytes=len(generation()),
        model_said="m",
        layout=Layout(
            1,
            {
                "model": Spot(1, 10, 13, 13),
                "prompt": Spot(15, 25, 28, 28),
            },
        ),
    )


@pytest.mark.parametrize(
    ("written", "size", "raw"),
    [
        (b'"size" : "auto" ', "auto", b'"auto"'),
        (b'"size":null', "auto", b"null"),
        (rb'"si\u007ae":"\u0061uto"', "auto", rb'"\u0061uto"'),
        (b'"size":"1024x1024"', "1024x1024", b'"1024x1024"'),
    ],
)
def test_where_the_size_lies_in_json(written: bytes, size: str, raw: bytes) -> None:
    body = b'{"model":"m", ' + written + b',"prompt":"p"}'
    call = read(GENERATION, body)
    assert (call.size, lies(body, call, "size")) == (size, raw)
    assert list(call.layout.fields) == ["model", "size", "prompt"]


def test_an_escaped_model_has_its_raw_span() -> None:
    body = rb'{"prompt":"p", "model" : "gpt\u002dimage" }'
    call = read(GENERATION, body)
    assert (call.model, lies(body, call, "model")) == ("gpt-image", rb'"gpt\u002dimage"')


@pytest.mark.parametrize(("kind", "frames"), [("gif", 9), ("png", 1)])
def test_frames(kind: str, frames: int) -> None:
    assert read(GENERATION, generation(output_format=kind)).frame_count == frames
    assert read(GENERATION, generation(output_format="gif", frame_count=3)).frame_count == 3


def test_unknown_parameters_pass() -> None:
    call = read(GENERATION, generation(seed=1.5, image=[url(PNG)], loras=None, style="vivid"))
    assert call.unknown == {"seed", "image"}
    assert call.parameters["seed"] == 1.5
    assert call.parameters["image"] == [url(PNG)]


def test_a_long_unknown_string_is_kept_as_its_digest() -> None:
    long = "x" * 400_000
    call = read(GENERATION, generation(blob={"a": [long]}), step=65_536)
    digest = hashlib.sha256(long.encode()).hexdigest()
    assert call.parameters["blob"] == {"a": [{"sha256": digest, "bytes": 400_000}]}


@pytest.mark.parametrize("character", ["x", "é", "😀", '"'])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_the_longest_prompt(character: str, ascii_only: bool) -> None:
    fields = {"model": "m", "prompt": character * 32_000}
    body = json.dumps(fields, ensure_ascii=ascii_only).encode()
    assert read(GENERATION, body, step=65_536).parameters["prompt"] == character * 32_000
    fields["prompt"] += character
    body = json.dumps(fields, ensure_ascii=ascii_only).encode()
    assert refusal(GENERATION, body, "application/json").code == "prompt_too_long"
    as_form = form(("model", "m"), IMAGE, ("prompt", character * 32_000))
    assert len(str(read(EDIT, as_form, FORM).parameters["prompt"])) == 32_000


def test_json_edits() -> None:
    large = JPEG + b"\xff" * 400_000
    body = edit(
        images=[{"image_url": url(PNG)}, {"image_url": url(large, "image/jpeg"), "file_id": None}],
        mask={"image_url": url(PNG)},
        markup=None,
    )
    call = read(EDIT, body, step=10_000)
    assert [item.role for item in call.inputs] == ["image", "image", "mask"]
    assert [(item.width, item.height) for item in call.inputs] == [(8, 6), (16, 9), (8, 6)]
    assert [item.media_type for item in call.inputs] == ["image/png", "image/jpeg", "image/png"]
    assert call.inputs[0].size_bytes == len(PNG)
    assert 0 <= call.inputs[1].size_bytes - len(large) <= 2
    texts = [url(PNG), url(large, "image/jpeg"), url(PNG)]
    assert [item.digest for item in call.inputs] == [
        hashlib.sha256(text.encode()).hexdigest() for text in texts
    ]
    assert call.parameters == {"prompt": "p"}


def test_files_are_named_by_their_ids() -> None:
    body = edit(
        images=[{"image_url": url(PNG)}, {"file_id": "file-1", "detail": "high"}],
        mask={"file_id": "file-2", "image_url": None},
        markup={"file_id": "file-1"},
    )
    call = read(EDIT, body, step=7)
    assert call.references == (
        Reference("file", "file-1", "images[1].file_id"),
        Reference("file", "file-2", "mask.file_id"),
        Reference("file", "file-1", "markup.file_id"),
    )
    assert [item.role for item in call.inputs] == ["image", "image", "mask", "markup"]
    assert [item.size_bytes for item in call.inputs[1:]] == [0, 0, 0]
    assert call.inputs[1].digest == call.inputs[3].digest != call.inputs[2].digest
    # What stands beside an id is a part of the call, the id is not its text.
    assert call.parameters["images"] == [{}, {"detail": "high"}, {}, {}]


def test_slashes_may_be_escaped_in_a_data_url() -> None:
    for data in (PNG, PNG + b"\xff" * 500_000):
        body = edit(images=[{"image_url": url(data)}]).replace(b"/", b"\\/")
        (item,) = read(EDIT, body, step=9_999).inputs
        assert (item.width, item.height) == (8, 6)


def test_members_beside_an_address_are_part_of_the_call() -> None:
    body = edit(images=[{"image_url": url(PNG), "detail": "high"}])
    call = read(EDIT, body)
    assert call.parameters["images"] == [{"detail": "high"}]
    assert call.unknown == {"images"}


def test_sixteen_large_pictures_are_read() -> None:
    body = edit(images=[{"image_url": url(PNG + bytes(400_000))}] * 16)
    assert len(read(EDIT, body, step=65_536).inputs) == 16


def test_addresses_pass_only_where_they_are_allowed() -> None:
    body = edit(images=[{"image_url": "https://example.com/a.png"}])
    assert refusal(EDIT, body, "application/json").code == "image_url_not_allowed"
    (item,) = read(EDIT, body, rules=replace(RULES, image_urls_allowed=True)).inputs
    assert item.digest == hashlib.sha256(b"https://example.com/a.png").hexdigest()
    assert (item.size_bytes, item.media_type) == (0, "")


@pytest.mark.parametrize(
    "address",
    ["http://169.254.169.254/", "file:///etc/passwd", "gopher://x", "//x/a.png", "a.png", "",
     " https://x/a.png", "ftp://x", "https", "javascript:1", "http:" + "x" * 500_000],
)  # fmt: skip
def test_addresses_that_never_pass(address: str) -> None:
    body = edit(images=[{"image_url": address}])
    rules = replace(RULES, image_urls_allowed=True)
    error = refusal(EDIT, body, "application/json", rules=rules)
    assert (error.status, error.code) == (400, "image_url_not_allowed")
    assert error.param == "images[0].image_url"


# Refusals. The columns: body, code, param.

BAD_JSON: list[tuple[bytes, str]] = [
    (b"", "invalid_json"),
    (b"{", "invalid_json"),
    (b'{"model": "m", "prompt": "p"} x', "invalid_json"),
    (b"model=m", "invalid_json"),
    (b'{"model": "m", "prompt": "\xff"}', "invalid_json"),
    (b'{"model": "m", "prompt": "p", "n": NaN}', "invalid_json"),
    (b'{"model": "m", "prompt": "p", "x": Infinity}', "invalid_json"),
    (b'{"model": "m", "prompt": "p", "x": 1e400}', "invalid_json"),
    (b'{"model": "m", "prompt": "p", "n": ' + b"9" * 5000 + b"}", "invalid_json"),
    (b'{"model": "m", "prompt": "p\\ud800"}', "invalid_unicode"),
    (b'{"model": "m\\ud800", "prompt": "p"}', "invalid_unicode"),
    (b'{"model": "\\udc00m", "prompt": "p"}', "invalid_unicode"),
    (b'{"model": "m", "prompt": "p", "n": 1, "n": 10}', "duplicate_key"),
    (b'{"model": "m", "prompt": "p", "n": 1, "\\u006e": 10}', "duplicate_key"),
    (b'{"a": ' * 33 + b"1" + b"}" * 33, "json_too_deep"),
    (b"[" * 100_000, "json_too_deep"),
    (b"[]", "invalid_type"),
    (b'"text"', "invalid_type"),
    (b"null", "invalid_type"),
]


@pytest.mark.parametrize(("body", "code"), BAD_JSON)
@pytest.mark.parametrize("step", [0, 1000])
def test_bad_json(body: bytes, code: str, step: int) -> None:
    error = refusal(GENERATION, body, "application/json", step=step)
    assert (error.status, error.code) == (400, code)
    assert code == "invalid_type" or "byte" in error.message


BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"model": 1}, "invalid_type", "model"),
    ({"model": ["m"]}, "invalid_type", "model"),
    ({"model": "m" * 257}, "invalid_value", "model"),
    ({"model": "m" * 400_000}, "invalid_value", "model"),
    ({"model": "a\nb"}, "bad_header", "model"),
    ({"model": "a\r"}, "bad_header", "model"),
    ({"model": "a\x00"}, "bad_header", "model"),
    *(
        ({"model": f"a{mark}b"}, "invalid_value", "model")
        for mark in ("\x01", "\t", "\x0b", "\x0c", "\x0e", "\x1b", "\x1f", "\x7f", "\x80", "\x9f")
    ),
    ({"safety_identifier": "a\x00"}, "bad_header", "safety_identifier"),
    ({"size": "1024x1024\r\nx: y"}, "bad_header", "size"),
    ({"prompt": None}, "missing_required_parameter", "prompt"),
    ({"prompt": ""}, "missing_required_parameter", "prompt"),
    ({"prompt": ["p"]}, "invalid_type", "prompt"),
    ({"prompt": "x" * 100_000}, "prompt_too_long", "prompt"),
    ({"prompt": "x" * 1_000_000}, "prompt_too_long", "prompt"),
    ({"prompt": "a\x1bb"}, "invalid_prompt", "prompt"),
    ({"prompt": "a\x00b"}, "invalid_prompt", "prompt"),
    ({"n": "10"}, "invalid_type", "n"),
    ({"n": True}, "invalid_type", "n"),
    ({"n": 1.0}, "invalid_type", "n"),
    ({"n": 0}, "invalid_value", "n"),
    ({"n": 11}, "invalid_value", "n"),
    ({"n": -1}, "invalid_value", "n"),
    ({"n": 10**90}, "invalid_value", "n"),
    ({"size": 1024}, "invalid_type", "size"),
    ({"size": "x" * 400_000}, "invalid_type", "size"),
    ({"quality": {}}, "invalid_type", "quality"),
    ({"stream": "true"}, "invalid_type", "stream"),
    ({"stream": 1}, "invalid_type", "stream"),
    ({"partial_images": 4}, "invalid_value", "partial_images"),
    ({"partial_images": "1"}, "invalid_type", "partial_images"),
    ({"output_format": 1}, "invalid_type", "output_format"),
    ({"frame_count": 1}, "invalid_value", "frame_count"),
    ({"frame_count": 17}, "invalid_value", "frame_count"),
    ({"svg": "gpt-5"}, "invalid_type", "svg"),
    ({"svg": {"model": 5}}, "invalid_type", "svg.model"),
]


@pytest.mark.parametrize(("fields", "code", "param"), BAD_FIELDS)
def test_bad_fields(fields: dict[str, Any], code: str, param: str) -> None:
    for operation, body in ((GENERATION, generation(**fields)), (EDIT, edit(**fields))):
        error = refusal(operation, body, "application/json")
        assert isinstance(error, InvalidRequest)
        assert (error.status, error.code, error.param) == (400, code, param)
        assert param.partition(".")[0] in error.message
        assert len(error.message) < 400


GIF = picture("GIF")
BOMB = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">II", 50_000, 50_000) + bytes(40)
LONG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">II", 16_385, 1) + bytes(40)

BAD_FORMS: list[tuple[bytes, str, str | None]] = [
    (form(*BASE), "missing_required_parameter", "image"),
    (form(IMAGE, ("model", "m")), "missing_required_parameter", "prompt"),
    (form(*BASE, ("image", "text")), "invalid_type", "image"),
    (form(*BASE, IMAGE, ("mask", "")), "invalid_type", "mask"),
    (form(*BASE, IMAGE, ("n", "2", "n.txt")), "invalid_type", "n"),
    (form(*BASE, IMAGE, ("svg[model]", "2", "n.txt")), "invalid_type", "svg[model]"),
    (form(*BASE, IMAGE, ("n", "1"), ("n", "10")), "duplicate_parameter", "n"),
    (form(*BASE, IMAGE, ("model", "x")), "duplicate_parameter", "model"),
    (form(*BASE, IMAGE, ("model[]", "x")), "duplicate_parameter", "model[]"),
    (form(*BASE, IMAGE, ("svg", "x"), ("svg[model]", "x")), "duplicate_parameter", "svg[model]"),
    (form(*BASE, IMAGE, ("svg[model]", "x"), ("svg", "x")), "duplicate_parameter", "svg"),
    (form(*BASE, IMAGE, ("svg[model]", "a"), ("svg[model]", "b")), "duplicate_parameter",
     "svg[model]"),
    (form(*BASE, IMAGE, ("image[]", PNG, "b.png")), "duplicate_parameter", "image"),
    (form(*BASE, ("image[1]", PNG, "b.png"), ("image[0]", PNG, "a.png")), "invalid_value",
     "image[0]"),
    (form(*BASE, *[("image[]", PNG, "b.png")] * 17), "invalid_value", "image"),
    (form(*BASE, ("image", b"", "a.png")), "invalid_image", "image"),
    (form(*BASE, IMAGE, ("mask", b"", "")), "invalid_image", "mask"),
    (form(*BASE, ("image", GIF, "a.png")), "unsupported_file_mimetype", "image"),
    (form(*BASE, ("image[]", PNG, "a"), ("image[]", GIF, "b")), "unsupported_file_mimetype",
     "image[1]"),
    (form(*BASE, ("image", picture("BMP"), "a.png")), "unsupported_file_mimetype", "image"),
    (form(*BASE, ("image", picture("TIFF"), "a.png")), "unsupported_file_mimetype", "image"),
    (form(*BASE, ("image", b"<svg/>", "a.png")), "unsupported_file_mimetype", "image"),
    (form(*BASE, ("image", b"%PDF-1.4", "a.png")), "unsupported_file_mimetype", "image"),
    (form(*BASE, ("image", BOMB, "a.png")), "invalid_image", "image"),
    (form(*BASE, ("image", LONG, "a.png")), "invalid_image", "image"),
    (form(*BASE, IMAGE, ("n", "010")), "invalid_type", "n"),
    (form(*BASE, IMAGE, ("n", "1.0")), "invalid_type", "n"),
    (form(*BASE, IMAGE, ("n", " 1")), "invalid_type", "n"),
    (form(*BASE, IMAGE, ("n", "")), "invalid_type", "n"),
    (form(*BASE, IMAGE, ("n", "٣")), "invalid_type", "n"),
    (form(*BASE, IMAGE, ("n", "11")), "invalid_value", "n"),
    (form(*BASE, IMAGE, ("n[]", "1")), "invalid_type", "n"),
    (form(*BASE, IMAGE, ("n", "9" * 5000)), "invalid_type", "n"),
    (form(*BASE, IMAGE, ("stream", "True")), "invalid_type", "stream"),
    (form(*BASE, IMAGE, ("svg", "x")), "invalid_type", "svg"),
    (form(*BASE, IMAGE, ("user", "a\r\nb")), "bad_header", "user"),
    (form(*BASE, IMAGE, ("user", b"\xff")), "invalid_unicode", "user"),
    (form(IMAGE, ("prompt", "p"), ("model", "a\x00b")), "bad_header", "model"),
    (form(IMAGE, ("prompt", "p"), ("model", "a\x1bb")), "invalid_value", "model"),
    (form(IMAGE, ("prompt", "p"), ("model", b"a\xed\xa0\x80b")), "invalid_unicode", "model"),
    (form(*BASE, IMAGE, ("a" + "[b]" * 33, "x")), "invalid_multipart", ("a" + "[b]" * 33)[:64]),
    (form(IMAGE, ("model", "m"), ("prompt", "x" * 32_001)), "prompt_too_long", "prompt"),
    (form(IMAGE, ("model", "m"), ("prompt", "\x07")), "invalid_prompt", "prompt"),
    (form(*BASE, IMAGE)[:-8], "invalid_multipart", None),
    (b"", "invalid_multipart", None),
]  # fmt: skip


@pytest.mark.parametrize(("body", "code", "param"), BAD_FORMS)
@pytest.mark.parametrize("step", [0, 11])
def test_bad_forms(body: bytes, code: str, param: str | None, step: int) -> None:
    error = refusal(EDIT, body, FORM, step=step)
    assert (error.status, error.code, error.param) == (400, code, param)
    assert len(error.message) < 400


@pytest.mark.parametrize(
    "fields", [{"model": None}, {"model": ""}, {}], ids=["null", "empty", "left out"]
)
def test_a_model_may_be_named_elsewhere(fields: dict[str, Any]) -> None:
    said = {"prompt": "p", **fields}
    call = read(GENERATION, json.dumps(said).encode())
    assert (call.model, call.model_said) == ("", None)
    assert ("model" in call.layout.fields) is bool(fields)
    call = read(EDIT, form(IMAGE, ("prompt", "p")), FORM)
    assert (call.model, call.model_said) == ("", None)


def test_a_form_tells_where_its_parts_lie() -> None:
    body = form(("model", "m"), IMAGE, ("prompt", "p"), IMAGE)
    call = read(EDIT, body, FORM, step=3)
    wholes = [body[slice(*spot.whole)] for spot in call.layout.fields.values()]
    assert all(whole.startswith(b"--") for whole in wholes)
    assert all(whole.endswith(b"\r\n") for whole in wholes)
    assert body.startswith(wholes[0])
    assert call.layout.opening == 0
    assert body[: call.layout.fields["prompt"].whole.start].endswith(PNG + b"\r\n")
    assert [picture.role for picture in call.inputs] == ["image", "image"]
    for file in call.layout.files:
        assert (file.name, file.seen) == ("image", "image/png")
        head = body[slice(*file.head)]
        assert head.startswith(b"Content-Disposition")
        assert not head.endswith(b"\r\n")
        assert body[file.head.end :].startswith(b"\r\n\r\n" + PNG)


BAD_EDITS: list[tuple[dict[str, Any], int, str, str]] = [
    ({"images": None}, 400, "missing_required_parameter", "images"),
    ({"images": []}, 400, "missing_required_parameter", "images"),
    ({"images": "x"}, 400, "invalid_type", "images"),
    ({"images": ["data:,"]}, 400, "invalid_type", "images[0]"),
    ({"images": [{}]}, 400, "missing_required_parameter", "images[0].image_url"),
    ({"images": [{"image_url": 1}]}, 400, "invalid_type", "images[0].image_url"),
    ({"images": [{"file_id": 1}]}, 400, "invalid_type", "images[0].file_id"),
    ({"images": [{"file_id": ""}]}, 400, "invalid_type", "images[0].file_id"),
    ({"images": [{"file_id": "f", "image_url": url(PNG)}]}, 400, "invalid_value", "images[0]"),
    ({"images": [{"image_url": url(PNG), "File_Id": "f"}]}, 400, "unknown_parameter",
     "images.File_Id"),
    ({"input_image_mask": {"file_id": "f"}}, 400, "unknown_parameter", "input_image_mask.file_id"),
    ({"svg": {"x": [{"FILE_IDS": ["f"]}]}}, 400, "unknown_parameter", "svg.x.FILE_IDS"),
    ({"images": [{"image_url": url(PNG)}] * 17}, 400, "invalid_value", "images"),
    ({"mask": {"file_id": ["file-1"]}}, 400, "invalid_type", "mask.file_id"),
    ({"mask": "x"}, 400, "invalid_type", "mask"),
    ({"images": [{"image_url": "data:image/png,abc"}]}, 400, "invalid_image",
     "images[0].image_url"),
    ({"images": [{"image_url": "data:image/png;base64,"}]}, 400, "invalid_image",
     "images[0].image_url"),
    ({"images": [{"image_url": "data:image/png;base64,===="}]}, 400, "invalid_image",
     "images[0].image_url"),
    ({"images": [{"image_url": "data:image/png;base64,AAAA AAA"}]}, 400, "invalid_image",
     "images[0].image_url"),
    ({"images": [{"image_url": "data:image/png;base64,AAAA_-AA"}]}, 400, "invalid_image",
     "images[0].image_url"),
    ({"images": [{"image_url": "data:image/png;base64,AAAAA"}]}, 400, "invalid_image",
     "images[0].image_url"),
    ({"images": [{"image_url": url(bytes(600_000)) + " "}]}, 400, "invalid_image",
     "images[0].image_url"),
    ({"images": [{"image_url": url(bytes(600_000)) + "A"}]}, 400, "invalid_image",
     "images[0].image_url"),
    ({"images": [{"image_url": "data:" + "A" * 600_000}]}, 400, "invalid_image",
     "images[0].image_url"),
    ({"images": [{"image_url": url(GIF, "image/png")}]}, 400, "unsupported_file_mimetype",
     "images[0].image_url"),
    ({"images": [{"image_url": url(GIF + bytes(600_000))}]}, 400, "unsupported_file_mimetype",
     "images[0].image_url"),
    ({"markup": {"image_url": url(BOMB)}}, 400, "invalid_image", "markup.image_url"),
    ({"images": [{"image_url": url(bytes(3_000_000))}]}, 413, "request_too_large",
     "images[0].image_url"),
    ({"images": [{"image_url": url(bytes(1_000_003))}]}, 413, "request_too_large",
     "images[0].image_url"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "status", "code", "param"), BAD_EDITS)
def test_bad_edits(fields: dict[str, Any], status: int, code: str, param: str) -> None:
    rules = replace(RULES, max_file_bytes=1_000_000)
    error = refusal(EDIT, edit(**fields), "application/json", rules=rules, step=50_000)
    assert (error.status, error.code, error.param) == (status, code, param)


# The door: media, encodings, lengths.


@pytest.mark.parametrize(
    ("operation", "content_type"),
    [(GENERATION, FORM), (GENERATION, "text/plain"), (GENERATION, ""), (EDIT, "text/plain"),
     (EDIT, "multipart/mixed; boundary=x"), (EDIT, "application/x-www-form-urlencoded"),
     (EDIT, "application/jsonx"), (EDIT, "")],
)  # fmt: skip
def test_media_that_is_not_taken(operation: Operation, content_type: str) -> None:
    with pytest.raises(UnsupportedMedia) as caught:
        reader_for(operation, content_type, None, None, RULES)
    assert (caught.value.status, caught.value.code) == (415, "unsupported_media_type")


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "GZIP", "identity, gzip"])
def test_encodings_are_not_taken(encoding: str) -> None:
    with pytest.raises(UnsupportedMedia):
        reader_for(GENERATION, "application/json", encoding, None, RULES)


def test_media_that_is_taken() -> None:
    assert read(GENERATION, generation(), "Application/JSON; charset=utf-8").model == "m"
    assert read(EDIT, form(*BASE, IMAGE), FORM.replace("form-data", "Form-Data")).model == "m"
    reader_for(GENERATION, "application/json", "identity", 10, RULES)
    with pytest.raises(InvalidRequest, match="boundary"):
        reader_for(EDIT, "multipart/form-data", None, None, RULES)


@pytest.mark.parametrize(
    ("operation", "content_type", "limit"),
    [(GENERATION, "application/json", 4 << 20), (EDIT, "application/json", 200 << 20),
     (EDIT, FORM, 200 << 20)],
)  # fmt: skip
def test_a_length_over_the_limit_is_refused_at_once(
    operation: Operation, content_type: str, limit: int
) -> None:
    reader_for(operation, content_type, None, limit, RULES)
    with pytest.raises(BodyTooLarge) as caught:
        reader_for(operation, content_type, None, limit + 1, RULES)
    assert (caught.value.status, caught.value.close) == (413, True)


@pytest.mark.parametrize(
    ("operation", "body", "content_type"),
    [(GENERATION, generation(), "application/json"), (EDIT, edit(), "application/json"),
     (EDIT, form(*BASE, IMAGE), FORM)],
)  # fmt: skip
def test_a_body_that_grows_over_the_limit(
    operation: Operation, body: bytes, content_type: str
) -> None:
    size = len(body)
    fits = replace(RULES, max_json_bytes=size, max_form_bytes=size)
    assert read(operation, body, content_type, step=9, rules=fits).body_bytes == size
    small = replace(RULES, max_json_bytes=size - 1, max_form_bytes=size - 1)
    reader = reader_for(operation, content_type, None, None, small)
    reader.feed(body[:-1])
    with pytest.raises(BodyTooLarge) as caught:
        reader.feed(body[-1:])
    assert caught.value.close


def test_what_is_forwarded_without_being_understood() -> None:
    body = form(
        *BASE,
        ("image[0]", b"not a picture", "../../etc/x.png", "image/png"),
        ("image[1]", JPEG, "b.jpg", "image/jpeg; q=1"),
        ("reference", GIF, "r.gif", "image/gif"),
        ("loras[][name]", "a"),
        ("loras[][name]", "b"),
        ("output_compression", "max"),
        ("quality", "ultra"),
        ("seed", "7"),
    )
    call = read(EDIT, body, FORM)
    assert [item.role for item in call.inputs] == ["image", "image", "reference"]
    assert [item.width for item in call.inputs] == [0, 16, 8]
    assert call.inputs[1].media_type == "image/jpeg"
    assert call.unknown == {"reference", "loras[][name]", "seed"}
    assert call.parameters["loras[][name]"] == ["a", "b"]
    assert call.parameters["output_compression"] == "max"
    assert (call.quality, call.parameters["seed"]) == ("ultra", "7")


@settings(max_examples=300)
@given(st.binary(max_size=300), st.integers(1, 40))
def test_noise_only_raises_the_house_errors(noise: bytes, step: int) -> None:
    framed = form(*BASE, IMAGE)
    for operation, body, content_type in (
        (GENERATION, noise, "application/json"),
        (GENERATION, b'{"model":"m",' + noise, "application/json"),
        (EDIT, noise, FORM),
        (EDIT, framed[: 7 * len(noise)] + noise + framed[7 * len(noise) :], FORM),
    ):
        with contextlib.suppress(GatewayError):
            read(operation, body, content_type, step=step)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
NAMES = st.sampled_from(["model", "prompt", "n", "size", "stream", "svg", "images", "mask", "x"])


@settings(max_examples=300)
@given(st.dictionaries(NAMES, JSON_VALUES), st.sampled_from([GENERATION, EDIT]))
def test_any_document_is_a_call_or_a_refusal(fields: dict[str, Any], operation: Operation) -> None:
    with contextlib.suppress(InvalidRequest):
        call = read(operation, json.dumps(fields).encode())
        assert 1 <= call.n <= 10
        assert call.model == (fields.get("model") or "")


@pytest.mark.parametrize("name", ["N", "MODEL", "Prompt", "\u017fize", "Stream", "IMAGES"])
def test_a_name_that_differs_in_case_alone_is_refused(name: str) -> None:
    """Servers that match names in any case would serve another request than was priced."""
    with pytest.raises(InvalidRequest) as refused:
        read(GENERATION, generation(**{name: 10}))
    assert (refused.value.code, refused.value.param) == ("unknown_parameter", name)
    with pytest.raises(InvalidRequest) as refused:
        read(EDIT, form(*BASE, IMAGE, (name, "10")), FORM)
    assert refused.value.code == "unknown_parameter"


def test_a_charset_is_not_passed_on() -> None:
    assert read(GENERATION, generation(), "application/json; charset=utf-7").content_type == (
        "application/json"
    )
