"""Reading a response: what is filled in, what is refused, and which ids are found where."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.call import Call, Change, Json, Operation, Reference
from gateway.domain.errors import (
    BodyTooLarge,
    GatewayError,
    InvalidRequest,
    NotServed,
    UnsupportedMedia,
)
from gateway.domain.owned import Anchor, Owned, OwnedKind
from gateway.domain.route import Model, Target
from gateway.relay.plan_response import with_tool
from gateway.relay.read import ReadRules, ResponseRules
from gateway.relay.read_response import (
    KEEP_BYTES,
    KNOWN_OF_ITEM,
    KNOWN_OF_TOOL,
    READ_HERE,
    remembered,
    response_reader,
)
from gateway.relay.references import Resolved
from gateway.upstream import openai
from tests.clock import StillClock

RULES = ReadRules()
TOOL: dict[str, Json] = {"type": "image_generation"}
PNG = base64.b64encode(
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x40\0\0\0\x20\x08\x02\0\0\0" + b"\0" * 8
).decode()
_NAMES = KNOWN_OF_ITEM | KNOWN_OF_TOOL
_SAID = {"user", "message", "item_reference", "image_generation", "image_generation_call", "flex"}
URL = f"data:image/png;base64,{PNG}"


def read(rules: ReadRules = RULES, size: int = 1 << 20, **body: Any) -> Call:
    said = {"model": "text", "input": "a cat", "tools": [TOOL], **body}
    content = json.dumps({name: one for name, one in said.items() if one is not ...}).encode()
    reader = response_reader(
        Operation.RESPONSE, "application/json; charset=utf-8", None, len(content), rules
    )
    for start in range(0, len(content), size):
        reader.feed(content[start : start + size])
    return reader.close()


def refused(rules: ReadRules = RULES, **body: Any) -> tuple[str, str | None]:
    with pytest.raises(GatewayError) as error:
        read(rules, **body)
    assert error.value.status == 400
    return error.value.code, error.value.param


FILLED = (Change("max_output_tokens", None, 16_384), Change("max_tool_calls", None, 4))


def test_what_is_left_open_is_filled_in() -> None:
    call = read()
    assert call.changes == FILLED
    assert (call.n, call.size, call.quality, call.stream) == (4, "auto", "auto", False)
    assert call.asks is not None
    assert (call.asks.max_output_tokens, call.asks.max_tool_calls) == (16_384, 4)
    assert call.parameters["max_tool_calls"] == 4
    assert not call.asks.background
    assert call.asks.stored


def test_what_is_said_stays() -> None:
    call = read(max_output_tokens=100, max_tool_calls=2, background=True, store=False, stream=True)
    assert call.changes == ()
    assert call.asks is not None
    assert (call.asks.max_output_tokens, call.asks.max_tool_calls) == (100, 2)
    assert (call.asks.background, call.asks.stored, call.stream) == (True, False, True)


def test_text_alone_calls_no_tool() -> None:
    rules = ReadRules(responses=ResponseRules(without_image_tool=True))
    call = read(rules, tools=...)
    assert call.changes == FILLED[:1]
    assert call.asks is not None
    assert (call.asks.tool, call.asks.max_tool_calls, call.n) == (None, 0, 0)


@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
def test_pictures_are_no_text(cut: int) -> None:
    large = f"data:image/png;base64,{PNG[:40]}{'A' * 4 * KEEP_BYTES}"
    content = [
        {"type": "input_text", "text": "both"},
        {"type": "input_image", "image_url": URL},
        {"type": "input_image", "image_url": large},
    ]
    plain = read(input=[{"role": "user", "content": content[:1]}])
    call = read(size=cut, input=[{"role": "user", "content": content}])
    assert [one.role for one in call.inputs] == ["image", "image"]
    assert (call.inputs[0].width, call.inputs[0].height) == (64, 32)
    assert plain.asks is not None
    assert call.asks is not None
    assert 0 < call.asks.text_bytes - plain.asks.text_bytes < 120


IDS = [
    {"type": "message", "id": "msg_1", "role": "assistant", "content": []},
    {"type": "image_generation_call", "id": "ig_1", "result": "QUJD"},
    {"type": "item_reference", "id": "msg_2"},
    {"type": "reasoning", "id": "rs_1", "summary": []},
    {"type": "function_call_output", "call_id": "c", "output": [
        {"type": "input_image", "file_id": "file-1"},
    ]},
    {"role": "user", "content": [{"type": "input_image", "file_id": "file-2"}]},
]  # fmt: skip


def test_every_id_is_found_where_it_stands() -> None:
    mask: dict[str, Json] = {**TOOL, "input_image_mask": {"file_id": "file-3"}}
    call = read(input=IDS, previous_response_id="resp_1", tools=[{"type": "function"}, mask])
    assert call.references == (
        Reference("picture", "ig_1", "input[1].id"),
        Reference("item", "msg_2", "input[2].id"),
        Reference("item", "rs_1", "input[3].id"),
        Reference("file", "file-1", "input[4].output[0].file_id"),
        Reference("file", "file-2", "input[5].content[0].file_id"),
        Reference("file", "file-3", "tools[1].input_image_mask.file_id"),
        Reference("response", "resp_1", "previous_response_id"),
    )
    assert [(one.role, one.size_bytes) for one in call.inputs] == [
        ("image", 0),
        ("image", 0),
        ("mask", 0),
    ]
    assert call.asks is not None
    assert call.asks.context_pictures == 1


@pytest.mark.parametrize(
    ("item", "looked_up"),
    [
        ({"id": "msg_1"}, True),
        ({"id": "msg_1", "type": None}, True),
        ({"id": "msg_1", "role": None, "content": "a cat"}, True),
        ({"id": "msg_1", "role": "user"}, True),
        ({"id": "msg_1", "type": "item_reference", "role": "user", "content": "a cat"}, True),
        ({"id": "msg_1", "role": "user", "content": "a cat"}, False),
        ({"role": "user"}, False),
    ],
)
def test_an_item_that_does_not_say_all_that_it_is_is_a_reference(
    item: dict[str, Json], looked_up: bool
) -> None:
    expected = (Reference("item", "msg_1", "input[0].id"),) if looked_up else ()
    assert read(input=[item]).references == expected


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"tools": ...}, "image_tool_required", "tools"),
        ({"tools": []}, "image_tool_required", "tools"),
        ({"tools": [{"type": "function"}]}, "image_tool_required", "tools"),
        ({"tools": {}}, "invalid_type", "tools"),
        ({"tools": ["x"]}, "invalid_type", "tools[0]"),
        ({"tools": [TOOL, {"type": "web_search"}]}, "tool_not_priced", "tools[1].type"),
        ({"tools": [TOOL, {"type": "mcp"}]}, "tool_not_priced", "tools[1].type"),
        ({"tools": [TOOL, {}]}, "tool_not_priced", "tools[1].type"),
        ({"tools": [TOOL, TOOL]}, "invalid_value", "tools[1]"),
        ({"tools": [TOOL | {"n": 2}]}, "unknown_parameter", "tools[0].n"),
        ({"tools": [TOOL | {"Quality": "low"}]}, "unknown_parameter", "tools[0].Quality"),
        ({"tools": [TOOL | {"Size": None}]}, "unknown_parameter", "tools[0].Size"),
        ({"tools": [TOOL | {"svg": {"Model": "m"}}]}, "unknown_parameter", "tools[0].svg.Model"),
        (
            {"tools": [TOOL | {"input_image_mask": [{"file_id": "f"}]}]},
            "invalid_type",
            "tools[0].input_image_mask",
        ),
        (
            {"tools": [TOOL | {"input_image_mask": {"File_id": "f"}}]},
            "unknown_parameter",
            "tools[0].input_image_mask.File_id",
        ),
        (
            {"tools": [TOOL | {"like": [{"file_id": "f"}]}]},
            "unknown_parameter",
            "tools[0].like.file_id",
        ),
        ({"tools": [{"type": ["x"]}]}, "invalid_type", "tools[0].type"),
        ({"tools": [{"type": "x" * 2 * KEEP_BYTES}]}, "invalid_type", "tools[0].type"),
        ({"service_tier": {}}, "invalid_type", "service_tier"),
        ({"service_tier": ["flex"]}, "invalid_type", "service_tier"),
        ({"model": "text\0"}, "bad_header", "model"),
        ({"instructions": [{"file_id": "f"}]}, "invalid_type", "instructions"),
        ({"input": {"id": "msg_1"}}, "invalid_type", "input"),
        ({"input": ["a cat"]}, "invalid_type", "input[0]"),
        ({"input": [[{"id": "msg_1"}]]}, "invalid_type", "input[0]"),
        ({"input": [{"type": {}, "id": "a"}]}, "invalid_type", "input[0].type"),
        ({"input": [{"type": "x" * 2 * KEEP_BYTES}]}, "invalid_type", "input[0].type"),
        ({"input": [{"content": "a cat"}]}, "invalid_type", "input[0].id"),
        (
            {"input": [{"Type": "item_reference", "id": "msg_1"}]},
            "unknown_parameter",
            "input[0].Type",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "File_id": "f"}]}]},
            "unknown_parameter",
            "input[0].content[0].File_id",
        ),
        (
            {"input": [{"role": "user", "content": [{"\u212aind": 1, "Type": "input_file"}]}]},
            "unknown_parameter",
            "input[0].content[0].Type",
        ),
        (
            {"input": [{"role": "user", "content": [{"file_url": "http://10.0.0.1/x"}]}]},
            "input_not_priced",
            "input[0].content[0]",
        ),
        (
            {"input": [{"role": "user", "content": [{"image_url": {"url": "http://10.0.0.1"}}]}]},
            "invalid_type",
            "input[0].content[0].image_url",
        ),
        ({"tools": [TOOL | {"size": 3}]}, "invalid_type", "tools[0].size"),
        ({"tools": [TOOL | {"svg": 3}]}, "invalid_type", "tools[0].svg"),
        (
            {"tools": [TOOL | {"partial_images": 4}]},
            "invalid_value",
            "tools[0].partial_images",
        ),
        ({"max_output_tokens": 16_385}, "invalid_value", "max_output_tokens"),
        ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
        ({"max_tool_calls": 5}, "invalid_value", "max_tool_calls"),
        ({"max_tool_calls": "2"}, "invalid_type", "max_tool_calls"),
        ({"max_tool_calls": True}, "invalid_type", "max_tool_calls"),
        ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "unsupported_parameter", "prompt"),
        ({"service_tier": "priority"}, "unsupported_parameter", "service_tier"),
        ({"stream": "true"}, "invalid_type", "stream"),
        ({"store": 1}, "invalid_type", "store"),
        ({"previous_response_id": 7}, "invalid_type", "previous_response_id"),
        ({"model": ...}, "missing_required_parameter", "model"),
        ({"Tools": [TOOL]}, "unknown_parameter", "Tools"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            "input_not_priced",
            "input[0].content[0]",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": 3}]}]},
            "invalid_type",
            "input[0].content[0].file_id",
        ),
        (
            {"input": [{"role": "user", "content": [{"image_url": "https://example.com/a.png"}]}]},
            "image_url_not_allowed",
            "input[0].content[0].image_url",
        ),
        ({"input": [{"type": "reasoning"}]}, "invalid_type", "input[0].id"),
    ],
)
def test_what_cannot_be_bounded_is_refused(body: dict[str, Any], code: str, param: str) -> None:
    assert refused(**body) == (code, param)


def test_the_door_of_other_bodies() -> None:
    rules = ReadRules(max_form_bytes=100)
    with pytest.raises(BodyTooLarge):
        response_reader(Operation.RESPONSE, "application/json", None, 101, rules)
    with pytest.raises(UnsupportedMedia):
        response_reader(Operation.RESPONSE, "multipart/form-data", None, None, rules)
    with pytest.raises(UnsupportedMedia):
        response_reader(Operation.RESPONSE, "application/json", "gzip", None, rules)
    off = ReadRules(responses=ResponseRules(enabled=False))
    with pytest.raises(NotServed):
        response_reader(Operation.RESPONSE, "application/json", None, None, off)
    reader = response_reader(Operation.RESPONSE, "application/json", None, None, rules)
    with pytest.raises(BodyTooLarge):
        reader.feed(b" " * 101)


def test_what_is_remembered_counts() -> None:
    call = read(previous_response_id="resp_1", input=IDS[1:2])
    clock = StillClock()
    owned = Owned(
        *("resp_1", OwnedKind.RESPONSE, "growth", "key", Anchor("openai", ""), clock.now()),
        detail={"context_tokens": 812, "pictures": 2},
    )
    found = remembered(Resolved(call, owned.anchor, {"resp_1": owned}))
    assert found.call.asks is not None
    assert (found.call.asks.context_tokens, found.call.asks.context_pictures) == (812, 3)
    other = Resolved(read(), None, {})
    assert remembered(other) is other


def put_out(id: str, kind: OwnedKind = OwnedKind.ITEM, **detail: Json) -> Owned:
    at = StillClock().now()
    return Owned(id, kind, "growth", "key", Anchor("openai", ""), at, detail=detail)


@pytest.mark.parametrize(
    ("named", "tokens", "pictures"),
    [
        (["msg_1"], 100, 0),
        (["msg_1", "rs_1"], 100, 0),
        (["msg_1", "msg_2"], 107, 0),
        (["msg_1", "rs_1", "msg_1"], 200, 0),
        (["ig_1"], 0, 1),
        (["ig_1", "ig_1", "msg_2"], 7, 2),
    ],
)
def test_an_item_counts_as_what_it_is(named: list[str], tokens: int, pictures: int) -> None:
    rows = (
        put_out("msg_1", response="resp_1", context_tokens=100),
        put_out("rs_1", response="resp_1", context_tokens=100),
        put_out("msg_2", response="resp_2", context_tokens=7),
        put_out("ig_1", OwnedKind.PICTURE, response="resp_1"),
    )
    call = read(input=[{"type": "item_reference", "id": id} for id in named])
    found = remembered(Resolved(call, rows[0].anchor, {one.id: one for one in rows}))
    assert found.call.asks is not None
    assert (found.call.asks.context_tokens, found.call.asks.context_pictures) == (tokens, pictures)


def test_an_item_of_unknown_length_is_refused() -> None:
    row = put_out("msg_1", response="resp_1")
    call = read(input=[{"id": "msg_1"}])
    with pytest.raises(InvalidRequest) as error:
        remembered(Resolved(call, row.anchor, {"msg_1": row}))
    assert (error.value.code, error.value.param) == ("input_not_priced", "input[0].id")


TARGET = Target("openai", "text-1")


def drawing(name: str, upstream: str = "openai") -> Model:
    return Model("art", Target(upstream, name))


def test_the_model_of_the_tool_is_written_as_it_is_called_there() -> None:
    call = read(tools=[{"type": "function", "name": "f"}, TOOL | {"quality": "low"}])
    target = with_tool(TARGET, drawing("flare"), call)
    request = openai.request(call, target)
    (first, model, tools) = request.edits
    assert first.content == b'"max_output_tokens":16384,"max_tool_calls":4,'
    assert model.content == b'"text-1"'
    assert json.loads(tools.content) == [
        {"type": "function", "name": "f"},
        {"type": "image_generation", "quality": "low", "model": "flare"},
    ]


def test_a_tool_that_says_its_model_is_not_touched() -> None:
    call = read(tools=[TOOL | {"model": "flare"}], max_tool_calls=1, max_output_tokens=100)
    target = with_tool(Target("openai", "text"), drawing("flare"), call)
    assert openai.request(call, target).edits == ()


def test_what_cannot_be_written_anew_is_refused_with_the_name_to_send() -> None:
    mask = {"image_url": f"data:image/png;base64,{'A' * 4 * KEEP_BYTES}"}
    call = read(tools=[TOOL | {"model": "art", "input_image_mask": mask}])
    with pytest.raises(GatewayError, match="'flare'") as error:
        with_tool(TARGET, drawing("flare"), call)
    assert (error.value.code, error.value.param) == ("tool_not_rewritten", "tools[0].model")
    named = read(tools=[TOOL | {"model": "flare", "input_image_mask": mask}])
    assert with_tool(TARGET, drawing("flare"), named).tool == "flare"


def test_both_models_live_at_one_upstream() -> None:
    with pytest.raises(GatewayError) as error:
        with_tool(TARGET, drawing("flare", "elsewhere"), read())
    assert error.value.code == "tool_model_elsewhere"


@given(
    st.dictionaries(
        st.sampled_from(["input", "tools", "stream", "previous_response_id", "max_tool_calls"]),
        st.recursive(
            st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["type", "id", "content", "file_id", "image_url", "result"]),
                    inner
                    | st.sampled_from(["image_generation", "image_generation_call", "reasoning"]),
                    max_size=3,
                )
            ),
            max_leaves=8,
        ),
        max_size=4,
    )
)
def test_nothing_that_is_json_breaks_the_reader(body: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidRequest):
        call = read(**body)
        assert call.asks is not None
        assert 0 < call.asks.text_bytes <= call.body_bytes


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(), max_size=5)
    | st.just("x" * 2 * KEEP_BYTES)
    | st.sampled_from(sorted(_SAID)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(sorted(_NAMES)), inner, max_size=4)
    ),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.sampled_from(sorted(_NAMES)), ANYTHING, max_size=4)
DRAWING = OBJECTS.map(lambda members: {**members, **TOOL})


@given(
    body=st.dictionaries(st.sampled_from(sorted(READ_HERE)), ANYTHING, max_size=5),
    tools=st.just(...) | st.lists(DRAWING | OBJECTS, max_size=2),
    said=st.just(...) | st.lists(OBJECTS, max_size=3),
)
def test_whatever_a_member_holds_it_is_read_or_refused(
    body: dict[str, Any], tools: Any, said: Any
) -> None:
    if tools is not ...:
        body |= {"tools": tools}
    if said is not ...:
        body |= {"input": said}
    with contextlib.suppress(GatewayError):
        assert isinstance(read(**body), Call)
