from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.call import Call, Edit, Encoding, Operation, Span
from gateway.domain.route import Target
from gateway.ports import Provider
from gateway.upstream.openai import request

CALL = Call(
    operation=Operation.GENERATION,
    encoding=Encoding.JSON,
    content_type="application/json",
    model="team-art",
    model_span=Span(10, 18),
    prompt_bytes=5,
    parameters={},
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
        (Encoding.JSON, "gpt-image-2.5-flare", b"gpt-image-2.5-flare"),
        (Encoding.JSON, 'a"b\\ü', b'a\\"b\\\\\\u00fc'),
        (Encoding.MULTIPART, 'a"b\\ü', 'a"b\\ü'.encode()),
    ],
)
def test_the_model_is_spliced(encoding: Encoding, model: str, content: bytes) -> None:
    made = request(replace(CALL, encoding=encoding), Target("openai", model))
    assert made.edits == (Edit(Span(10, 18), content),)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_model_is_itself_again_in_json(model: str) -> None:
    for edit in request(CALL, Target("openai", model)).edits:
        assert json.loads(b'"' + edit.content + b'"') == model
