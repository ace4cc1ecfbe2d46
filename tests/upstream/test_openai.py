from __future__ import annotations

import base64
import email
import email.policy
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.call import Call, Change, Edit, Encoding, Json, Layout, Operation, Span, Spot
from gateway.domain.route import Target
from gateway.ports import Provider
from gateway.relay.body import edited_length
from gateway.relay.read import ReadRules, reader_for
from gateway.upstream.openai import request

CALL = Call(
    operation=Operation.GENERATION,
    encoding=Encoding.JSON,
    content_type="application/json",
    model="team-art",
    prompt_bytes=5,
    parameters={},
    model_said="team-art",
    layout=Layout(1, {"model": Spot(1, 9, 19, 19)}),
)
SAME = Target("openai", "team-art")


def test_what_the_upstream_is_sent() -> None:
    provider: Provider = request
    made = provider(CALL, SAME)
    assert made.path == "/images/generations"
    assert made.headers == (
        ("content-type", "application/json"),
        ("accept", "application/json"),
        ("user-agent", "image-gateway/0.1"),
    )
    assert made.edits == ()


def test_a_stream_of_an_edit() -> None:
    form = "multipart/form-data; boundary=x"
    call = replace(
        CALL,
        operation=Operation.EDIT,
        stream=True,
        content_type=form,
        encoding=Encoding.MULTIPART,
    )
    made = request(call, SAME)
    assert made.path == "/images/edits"
    assert dict(made.headers) == {
        "content-type": form,
        "accept": "text/event-stream, application/json",
        "user-agent": "image-gateway/0.1",
    }


@pytest.mark.parametrize(
    ("encoding", "model", "content"),
    [
        (Encoding.JSON, "gpt-image-2.5-flare", b'"gpt-image-2.5-flare"'),
        (Encoding.JSON, 'a"b\\ü', b'"a\\"b\\\\\\u00fc"'),
        (Encoding.MULTIPART, 'a"b\\ü', 'a"b\\ü'.encode()),
    ],
)
def test_the_model_is_spliced(encoding: Encoding, model: str, content: bytes) -> None:
    made = request(replace(CALL, encoding=encoding), Target("openai", model))
    assert made.edits == (Edit(Span(9, 19), content),)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_model_is_itself_again_in_json(model: str) -> None:
    for edit in request(CALL, Target("openai", model)).edits:
        assert json.loads(edit.content) == model


# What is pinned: a few bytes, and everything else as it came.

BOUNDARY = "x-9'(z"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)


def read(body: bytes, content_type: str = "application/json") -> Call:
    operation = Operation.GENERATION if content_type == "application/json" else Operation.EDIT
    reader = reader_for(operation, content_type, None, len(body), ReadRules())
    reader.feed(body)
    return reader.close()


def sent(body: bytes, call: Call, target: Target) -> bytes:
    """The body that leaves, by the relay's own splice."""
    edits = sorted(request(call, target).edits, key=lambda edit: edit.span.start)
    made, at = b"", 0
    for span, content in edits:
        made += body[at : span.start] + content
        at = span.end
    made += body[at:]
    assert len(made) == edited_length(len(body), edits)
    return made


PINNED: dict[str, Json] = {"size": "1024x1024", "quality": "medium"}
FILLED_IN = tuple(Change(name, None, value) for name, value in PINNED.items())


@pytest.mark.parametrize(
    ("body", "leaves"),
    [
        (
            b'{"model":"art","prompt":"p"}',
            b'{"size":"1024x1024","quality":"medium","model":"real","prompt":"p"}',
        ),
        (
            b'{"prompt":"p", "model" : "art" }',
            b'{"size":"1024x1024","quality":"medium","prompt":"p", "model" : "real" }',
        ),
        (
            b'{ "size" : "auto" ,\n"quality":null,"model":"art","prompt":"p"}',
            b'{ "size" : "1024x1024" ,\n"quality":"medium","model":"real","prompt":"p"}',
        ),
        (
            b'{"model":"art","quality":"","prompt":"{\\"size\\":\\"auto\\"}"}',
            b'{"size":"1024x1024","model":"real","quality":"medium",'
            b'"prompt":"{\\"size\\":\\"auto\\"}"}',
        ),
    ],
)
def test_what_is_pinned_is_spliced_into_json(body: bytes, leaves: bytes) -> None:
    call = replace(read(body), changes=FILLED_IN)
    assert sent(body, call, Target("openai", "real")) == leaves
    assert read(leaves).parameters == {**call.parameters, **PINNED}


def test_only_what_is_pinned_is_touched() -> None:
    body = b'{"model":"art","size":"auto","prompt":"p"}'
    call = replace(read(body), changes=FILLED_IN[:1])
    assert sent(body, call, Target("o", "art")) == body.replace(b'"auto"', b'"1024x1024"')
    assert request(read(body), Target("o", "art")).edits == ()


def form(*fields: tuple[str, str], preamble: str = "") -> bytes:
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields
    ]
    image = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    ).encode() + PNG
    return preamble.encode() + b"".join(parts) + image + f"\r\n--{BOUNDARY}--\r\n".encode()


FORM = f'multipart/form-data; boundary="{BOUNDARY}"'


@pytest.mark.parametrize("preamble", ["", "a word before\r\n"])
@pytest.mark.parametrize(
    "fields",
    [
        (("model", "art"), ("prompt", "p")),
        (("prompt", "p"), ("size", "auto"), ("quality", "auto"), ("model", "art")),
        (("quality", ""), ("model", "art"), ("prompt", "p")),
        (("model", "art"), ("prompt", "p"), ("size", "auto")),
    ],
)
def test_what_is_pinned_is_spliced_into_a_form(
    fields: tuple[tuple[str, str], ...], preamble: str
) -> None:
    body = form(*fields, preamble=preamble)
    call = replace(read(body, FORM), changes=FILLED_IN)
    leaves = sent(body, call, Target("openai", "real"))
    again = read(leaves, FORM)
    assert (again.model, again.size, again.quality) == ("real", "1024x1024", "medium")
    assert again.parameters == {**call.parameters, **PINNED}
    assert again.inputs == call.inputs
    # Another reader of forms sees the same.
    text = f"Content-Type: {FORM}\r\n\r\n".encode() + leaves
    parts = email.message_from_bytes(text, policy=email.policy.HTTP).iter_parts()
    names = [part.get_param("name", header="content-disposition") for part in parts]
    assert sorted(map(str, names)) == ["image", "model", "prompt", "quality", "size"]


# A stream that the client did not ask for.

ALWAYS = Target("openai", "art", stream_always=True)


@pytest.mark.parametrize(
    ("body", "leaves"),
    [
        (b'{"model":"art","prompt":"p"}', b'{"stream":true,"model":"art","prompt":"p"}'),
        (b'{"prompt":"p","model" : "art"\n}', b'{"stream":true,"prompt":"p","model" : "art"\n}'),
        (
            b'{\n  "stream": false,\n  "model": "art",\n  "prompt": "p"\n}',
            b'{\n  "stream": true,\n  "model": "art",\n  "prompt": "p"\n}',
        ),
        (
            b'{"model":"art","prompt":"p","stream" :\tnull , "n": 1}',
            b'{"model":"art","prompt":"p","stream" :\ttrue , "n": 1}',
        ),
        (
            b'{"model":"art","prompt":"p","str\\u0065am":false}',
            b'{"model":"art","prompt":"p","str\\u0065am":true}',
        ),
        (
            b'{"model":"art","prompt":"\\"stream\\":false","partial_images":2}',
            b'{"stream":true,"model":"art","prompt":"\\"stream\\":false","partial_images":2}',
        ),
        (
            b'{"user":{"stream":false},"model":"art","prompt":"p"}',
            b'{"stream":true,"user":{"stream":false},"model":"art","prompt":"p"}',
        ),
    ],
)
def test_a_stream_is_spliced_into_json(body: bytes, leaves: bytes) -> None:
    call = read(body)
    assert sent(body, call, ALWAYS) == leaves
    assert read(leaves).stream
    assert "partial_images" not in read(leaves).parameters or b"partial_images" in body
    headers = dict(request(call, ALWAYS).headers)
    assert headers["accept"] == "text/event-stream, application/json"
    assert sent(body, call, replace(ALWAYS, stream_always=False)) == body


def test_all_that_is_spliced_stands_beside_each_other() -> None:
    body = b'{"model":"art","prompt":"p"}'
    call = replace(read(body), changes=FILLED_IN)
    assert sent(body, call, replace(ALWAYS, model="real")) == (
        b'{"size":"1024x1024","quality":"medium","stream":true,"model":"real","prompt":"p"}'
    )


@pytest.mark.parametrize(
    "more",
    [b'"n":2', b'"output_format":"gif"', b'"output_format":"svg"', b'"stream":true'],
    ids=["n", "gif", "svg", "stream"],
)
def test_what_has_no_other_form_is_left_alone(more: bytes) -> None:
    body = b'{"model":"art","prompt":"p",%b}' % more
    assert sent(body, read(body), ALWAYS) == body


@pytest.mark.parametrize(
    "fields",
    [
        (("model", "art"), ("prompt", "p")),
        (("prompt", "p"), ("stream", "false"), ("model", "art")),
        (("stream", "false"), ("n", "1"), ("model", "art"), ("prompt", "p")),
    ],
)
def test_a_stream_is_spliced_into_a_form(fields: tuple[tuple[str, str], ...]) -> None:
    body = form(*fields)
    call = read(body, FORM)
    leaves = sent(body, call, ALWAYS)
    again = read(leaves, FORM)
    assert again.stream
    assert again.parameters == {**call.parameters, "stream": True}
    assert again.inputs == call.inputs
    if any(name == "stream" for name, _ in fields):
        assert leaves == body.replace(b"\r\n\r\nfalse\r\n", b"\r\n\r\ntrue\r\n")
    else:
        head = b'Content-Disposition: form-data; name="stream"'
        assert leaves == b"--%b\r\n%b\r\n\r\ntrue\r\n" % (BOUNDARY.encode(), head) + body
