"""What older clients send, mended; and what is left alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from gateway.domain.call import AnswerAs, Call, Change, Operation
from gateway.domain.compat import CHANGES, OFF, Compat, CompatRules, changed_names, merged
from gateway.domain.errors import InvalidRequest
from gateway.domain.fingerprint import fingerprint
from gateway.domain.route import Model, Target
from gateway.relay import headers
from gateway.relay.body import edited_length
from gateway.relay.compat import repaired, routed_name, served_size
from gateway.relay.read import ReadRules, reader_for
from gateway.upstream.openai import request
from tests.relay.test_read import PNG

FLARE = Model("flare", Target("openai", "gpt-image-2.5-flare"))
OLD = Model("old", Target("openai", "gpt-image-1.5"))
FUTURE = Model("future", Target("openai", "gpt-image-9"))
FLUX = Model("flux", Target("home", "flux-2"))
DALL_E = Model("dall-e-3", Target("azure", "dall-e-3"))
MODELS = {model.name: model for model in (FLARE, OLD, FUTURE, FLUX, DALL_E)}
BOUNDARY = "b0undary"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
WEBP = b"RIFF\x24\x00\x00\x00WEBPVP8L\x17\x00\x00\x00\x2f\x07\x40\x01\x00" + bytes(12)
JPEG = b"\xff\xd8\xff\xc0\x00\x11\x08\x00\x06\x00\x08" + bytes(20)


def read(body: bytes, content_type: str = "application/json") -> Call:
    operation = Operation.GENERATION if content_type == "application/json" else Operation.EDIT
    reader = reader_for(operation, content_type, None, len(body), ReadRules())
    reader.feed(body)
    return reader.close()


def body_of(**fields: Any) -> bytes:
    return json.dumps({"model": "flare", "prompt": "p", **fields}).encode()


def generation(**fields: Any) -> Call:
    return read(body_of(**fields))


def mended(
    call: Call, model: Model = FLARE, compat: Compat | None = None, *, hosting: bool = True
) -> Call:
    return repaired(call, model, compat or Compat(), hosting=hosting)


def sent(body: bytes, call: Call, model: Model = FLARE) -> bytes:
    """The body that leaves."""
    edits = sorted(request(call, model.target).edits, key=lambda edit: edit.span.start)
    made, at = b"", 0
    for span, content in edits:
        assert span.start >= at
        made += body[at : span.start] + content
        at = span.end
    made += body[at:]
    assert len(made) == edited_length(len(body), edits)
    return made


def said(call: Call) -> str:
    told = headers.of_changes(call, hosted=call.answer_as is AnswerAs.URL)
    return dict(told).get("x-gateway-changed", "")


# Fields.


@pytest.mark.parametrize(
    ("fields", "model", "announced", "leaves"),
    [
        ({}, FLARE, "", {}),
        ({"quality": "high", "size": "auto"}, FLARE, "", {"quality": "high", "size": "auto"}),
        ({"style": "vivid"}, FLARE, "style", {}),
        ({"style": None}, FLARE, "style", {}),
        ({"style": "vivid"}, FUTURE, "style", {}),
        ({"response_format": "b64_json"}, FLARE, "response_format", {}),
        ({"response_format": None}, FLARE, "response_format", {}),
        ({"response_format": "url"}, FLARE, "response_format=url->hosted", {}),
        ({"response_format": "xml"}, FLARE, "", {"response_format": "xml"}),
        ({"quality": "hd"}, FLARE, "quality=high", {"quality": "high"}),
        ({"quality": "standard"}, OLD, "quality=medium", {"quality": "medium"}),
        ({"quality": "ultra"}, FLARE, "", {"quality": "ultra"}),
        ({"size": "1792x1024"}, FLARE, "", {"size": "1792x1024"}),
        ({"size": "1792x1024"}, OLD, "size=1536x1024", {"size": "1536x1024"}),
        ({"size": "256x256"}, FLARE, "size=1024x1024", {"size": "1024x1024"}),
        ({"size": "256x256"}, FUTURE, "", {"size": "256x256"}),
        ({"size": "large"}, FLARE, "", {"size": "large"}),
        (
            {"quality": "hd", "style": "natural", "response_format": "url", "size": "512x512"},
            FLARE,
            "response_format=url->hosted, style, quality=high, size=1024x1024",
            {"quality": "high", "size": "1024x1024"},
        ),
        # Of another provider's model nothing is known.
        (
            {"quality": "hd", "style": "vivid", "response_format": "url", "size": "512x512"},
            FLUX,
            "",
            {"quality": "hd", "style": "vivid", "response_format": "url", "size": "512x512"},
        ),
        (
            {"quality": "hd", "style": "vivid", "response_format": "url"},
            DALL_E,
            "",
            {"quality": "hd", "style": "vivid", "response_format": "url"},
        ),
    ],
)
def test_fields(fields: dict[str, Any], model: Model, announced: str, leaves: Any) -> None:
    body = body_of(**fields, model=model.name)
    before = read(body)
    call = mended(before, model)
    assert said(call) == announced
    assert json.loads(sent(body, call, model)) == {
        "model": model.target.model,
        "prompt": "p",
        **leaves,
    }
    # What is priced and shared is what is sent.
    again = read(sent(body, call, model))
    assert (call.parameters, call.size, call.quality) == (
        again.parameters,
        again.size,
        again.quality,
    )
    assert set(changed_names(call)) <= set(CHANGES)
    if not announced:
        assert call is before


@pytest.mark.parametrize("switch", ["response_format", "style", "quality", "sizes"])
def test_a_switch_turns_off_its_own_repair(switch: str) -> None:
    asked = {"response_format": "url", "style": "vivid", "quality": "hd", "sizes": "256x256"}
    fields = {"size" if name == "sizes" else name: value for name, value in asked.items()}
    kept = "size" if switch == "sizes" else switch
    body = body_of(**fields)
    compat = merged(Compat(), CompatRules(**{switch: False}))  # type: ignore[arg-type]
    call = mended(read(body), compat=compat, hosting=switch != "response_format")
    document = json.loads(sent(body, call))
    assert document[kept] == asked[switch]
    assert len(call.changes) == 3
    assert kept not in {change.name for change in call.changes}


def test_a_url_is_handed_over_where_it_can_be() -> None:
    assert mended(generation(response_format="url")).answer_as is AnswerAs.URL
    assert mended(generation(response_format="b64_json")).answer_as is AnswerAs.B64
    streamed = mended(generation(response_format="url", stream=True), hosting=False)
    assert (streamed.answer_as, said(streamed)) == (AnswerAs.B64, "response_format")
    with pytest.raises(InvalidRequest) as refused:
        mended(generation(response_format="url"), hosting=False)
    assert (refused.value.param, refused.value.code) == ("response_format", "urls_not_available")
    assert "server.public_url" in refused.value.message
    off = merged(Compat(), OFF)
    assert mended(generation(response_format="url"), compat=off, hosting=False).changes == ()


@pytest.mark.parametrize("name", ["dall-e-2", "dall-e-3"])
def test_who_asks_for_dall_e_and_for_no_format_expects_urls(name: str) -> None:
    """LangChain's wrapper for Python reads nothing else, and never says so."""
    asked = generation(model=name)
    assert mended(asked).answer_as is AnswerAs.URL
    assert mended(asked, hosting=False).answer_as is AnswerAs.B64
    assert mended(generation(model=name, stream=True)).answer_as is AnswerAs.B64
    assert mended(generation(model=name, response_format="b64_json")).answer_as is AnswerAs.B64
    off = replace(Compat(), response_format=False)
    assert mended(asked, compat=off).answer_as is AnswerAs.B64


@pytest.mark.parametrize(
    ("size", "served"),
    [
        ((1024, 1792), "1024x1536"),
        ((1792, 1024), "1536x1024"),
        ((512, 512), "1024x1024"),
        # Half the way is the square root of 1.5, not 1.25.
        ((1254, 1024), "1024x1024"),
        ((1255, 1024), "1536x1024"),
        ((1, 99_999), "1024x1536"),
        ((1536, 1024), None),
    ],
)
def test_the_nearest_shape(size: tuple[int, int], served: str | None) -> None:
    assert served_size("gpt-image-1", *size) == served


# Names.


@pytest.mark.parametrize(
    ("asked", "compat", "name"),
    [
        ("flare", Compat(), "flare"),
        ("dall-e-2", Compat(aliases={"dall-e-2": "flare"}), "flare"),
        ("dall-e-2", Compat(), "dall-e-2"),
        # What is configured is what was meant.
        ("dall-e-3", Compat(aliases={"dall-e-3": "flare"}), "dall-e-3"),
        ("", Compat(default_model="flare"), "flare"),
        ("old", Compat(default_model="flare"), "old"),
    ],
)
def test_the_model_that_is_meant(asked: str, compat: Compat, name: str) -> None:
    assert routed_name(replace(generation(), model=asked), MODELS, compat) == name


@pytest.mark.parametrize("fields", [{}, {"model": None}, {"model": ""}])
def test_without_a_default_a_model_is_needed(fields: dict[str, Any]) -> None:
    call = read(json.dumps({"prompt": "p", **fields}).encode())
    with pytest.raises(InvalidRequest) as refused:
        routed_name(call, MODELS, Compat())
    assert (refused.value.code, refused.value.param) == ("missing_required_parameter", "model")


@pytest.mark.parametrize(
    ("body", "announced"),
    [
        (b'{"model":"flare","prompt":"p"}', ""),
        (b'{"model":"dall-e-2","prompt":"p"}', "model=flare"),
        (b'{"prompt":"p"}', "model=flare"),
        (b'{"model":null,"prompt":"p"}', "model=flare"),
        (b'{"prompt":"p","model":""}', "model=flare"),
    ],
)
def test_a_model_is_said_where_the_body_does_not(body: bytes, announced: str) -> None:
    call = mended(read(body))
    assert (call.model, said(call)) == ("flare", announced)
    assert json.loads(sent(body, call)) == {"model": "gpt-image-2.5-flare", "prompt": "p"}
    mark = {"scope": "s", "model_served": "gpt-image-2.5-flare", "upstream": "openai"}
    assert fingerprint(call, **mark) == fingerprint(generation(), **mark)


def test_a_path_names_the_model() -> None:
    """Azure: the path's word wins over the body's, and is the client's own."""
    body = b'{"prompt":"p"}'
    call = mended(replace(read(body), model="flare"))
    assert (said(call), json.loads(sent(body, call))["model"]) == ("", "gpt-image-2.5-flare")
    body = body_of(model="old")
    call = mended(replace(read(body), model="flare"))
    assert call.changes == (Change("model", "old", "flare"),)
    assert json.loads(sent(body, call))["model"] == "gpt-image-2.5-flare"


def test_only_safe_characters_are_said() -> None:
    model = Model("flare\u00e9\r", Target("openai", "gpt-image-2.5-flare"))
    assert said(mended(generation(), model)) == "model=flare??"


# Whose word counts.


@pytest.mark.parametrize(
    ("model", "key", "style", "sizes"),
    [
        (None, None, True, True),
        (CompatRules(style=False), None, False, True),
        (CompatRules(style=False), CompatRules(style=True), True, True),
        (OFF, None, False, False),
        (OFF, CompatRules(sizes=True), False, True),
        (CompatRules(style=True), OFF, False, False),
    ],
)
def test_the_keys_word_goes_before_the_models(
    model: CompatRules | None, key: CompatRules | None, style: bool, sizes: bool
) -> None:
    compat = merged(Compat(aliases={"a": "b"}, default_model="b"), model, key)
    assert (compat.style, compat.sizes) == (style, sizes)
    assert (compat.aliases == {}) is (OFF in (model, key))
    assert (compat.default_model == "") is (OFF in (model, key))


# Files.

Part = tuple[str, str, str | None, bytes]


def form(*files: Part, fields: Mapping[str, str] | None = None) -> bytes:
    """Files as (name, filename, content type, bytes), behind the fields."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in (fields or {"model": "flare", "prompt": "p"}).items()
    ]
    for name, filename, kind, content in files:
        head = f'Content-Disposition: form-data; name="{name}"; filename="{filename}"'
        head += f"\r\nContent-Type: {kind}" if kind is not None else ""
        parts.append(f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + content + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


OCTETS = "application/octet-stream"


@pytest.mark.parametrize(
    ("filename", "declared", "content", "named"),
    [
        ("upload", OCTETS, PNG, "upload.png"),
        ("a.png", OCTETS, PNG, "a.png"),
        ("a.bin", OCTETS, PNG, "a.png"),
        ("a.JPEG", OCTETS, JPEG, "a.JPEG"),
        ("a.png", OCTETS, JPEG, "a.jpg"),
        ("a.tmp", "Application/Octet-Stream; x=y", WEBP, "a.webp"),
        ("", None, PNG, "image.png"),
        ("my picture (1).png", None, PNG, "my picture (1).png"),
        ("Bild \u00e9.dat", OCTETS, PNG, "Bild \u00e9.png"),
        ('a%22b".png', OCTETS, PNG, "image.png"),
        ("a\\\\b", OCTETS, PNG, "image.png"),
    ],
)
def test_a_picture_gets_its_type_and_a_name_that_fits(
    filename: str, declared: str | None, content: bytes, named: str
) -> None:
    filename = filename.replace('"', '\\"')
    body = form(("image", filename, declared, content), ("mask", "m.png", "image/png", PNG))
    call = mended(read(body, FORM))
    again = read(sent(body, call), FORM)
    kind = {PNG: "image/png", JPEG: "image/jpeg", WEBP: "image/webp"}[content]
    assert (again.layout.files[0].filename, again.inputs[0].media_type) == (named, kind)
    assert again.inputs == call.inputs
    assert again.inputs[0].digest == read(body, FORM).inputs[0].digest
    assert (said(call), changed_names(call)) == (f"content_type={kind}", ("content_type",))


@pytest.mark.parametrize(
    ("parts", "model", "compat"),
    [
        ([("image", "a.png", "image/png", PNG)], FLARE, Compat()),
        ([("image", "a.png", "image/jpeg", PNG)], FLARE, Compat()),
        ([("image", "a.bin", OCTETS, b"no picture at all")], FLARE, Compat()),
        ([("image", "a.bin", OCTETS, PNG)], FLUX, Compat()),
        ([("image", "a.bin", OCTETS, PNG)], FLARE, Compat(media_types=False)),
        ([("image", "a.png", "image/png", PNG), ("other", "b", OCTETS, PNG)], FLARE, Compat()),
    ],
)
def test_what_is_left_alone(parts: list[Part], model: Model, compat: Compat) -> None:
    body = form(*parts, fields={"model": model.name, "prompt": "p"})
    before = read(body, FORM)
    call = mended(before, model, compat)
    assert call is before
    assert sent(body, call, model) == body.replace(model.name.encode(), model.target.model.encode())


REPEATED = [
    ("image", "a.png", "image/png", PNG),
    ("image", "b.webp", None, WEBP),
    ("image", "c.jpg", "image/jpeg", JPEG),
]


def test_repeated_pictures_are_a_list_where_that_is_configured() -> None:
    body = form(*REPEATED)
    call = mended(read(body, FORM), compat=Compat(repeated_images=True))
    again = read(sent(body, call), FORM)
    assert [file.name for file in again.layout.files] == ["image[]"] * 3
    assert [file.filename for file in again.layout.files] == ["a.png", "b.webp", "c.jpg"]
    assert again.inputs == call.inputs
    assert said(call) == "image=image[], content_type=image/webp"
    assert changed_names(call) == ("image", "content_type")
    # One picture is none that is repeated.
    one = read(form(REPEATED[0]), FORM)
    assert mended(one, compat=Compat(repeated_images=True)) is one


@pytest.mark.parametrize("model", [FLARE, FLUX])
def test_repeated_pictures_are_refused_in_openais_words(model: Model) -> None:
    with pytest.raises(InvalidRequest) as refused:
        mended(read(form(*REPEATED), FORM), model)
    assert refused.value.message == (
        "Duplicate parameter: 'image'. You provided multiple values for this parameter, whereas "
        "only one is allowed. If you are trying to provide a list of values, use the array syntax "
        "instead e.g. 'image[]=<value>'."
    )


def test_fields_of_a_form_are_cut_and_changed() -> None:
    fields = {
        "style": "vivid",
        "prompt": "p",
        "quality": "hd",
        "response_format": "b64_json",
        "model": "dall-e-2",
    }
    body = form(("image", "a", OCTETS, PNG), fields=fields)
    call = mended(read(body, FORM))
    again = read(sent(body, call), FORM)
    assert again.model_said == "gpt-image-2.5-flare"
    assert again.parameters == call.parameters == {"prompt": "p", "quality": "high"}
    assert list(again.layout.fields) == ["prompt", "quality", "model"]
    assert again.inputs == call.inputs
