"""The fingerprint: equal for one picture asked for in any way, different for any other."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from gateway.domain.call import Call, Encoding, InputImage, Operation
from gateway.domain.fingerprint import fingerprint
from gateway.relay.read import ReadRules, reader_for

TEXTS = st.text(max_size=12)
VALUES = st.recursive(
    st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
    | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
PARAMETERS = st.dictionaries(TEXTS, VALUES, max_size=6)
INPUTS = st.lists(
    st.builds(
        InputImage,
        role=st.sampled_from(["image", "mask", "markup"]),
        digest=st.sampled_from(["aa", "bb", "cc"]),
        size_bytes=st.just(1),
        media_type=st.just("image/png"),
    ),
    max_size=4,
)


def call(parameters: dict[str, Any], inputs: list[InputImage] | None = None) -> Call:
    return Call(
        operation=Operation.EDIT,
        encoding=Encoding.JSON,
        content_type="application/json",
        model="m",
        prompt_bytes=1,
        parameters=parameters,
        inputs=tuple(inputs or ()),
    )


def mark(asked: Call, scope: str = "s", model: str = "m", upstream: str = "u") -> str:
    return fingerprint(asked, scope=scope, model_served=model, upstream=upstream)


def same(a: object, b: object) -> bool:
    """Equal as JSON, where a whole float is its int and True is not 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


@given(PARAMETERS, INPUTS, st.data())
def test_the_order_of_keys_and_nulls_make_no_difference(
    parameters: dict[str, Any], inputs: list[InputImage], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(list(parameters)))
    shuffled = {name: parameters[name] for name in order}
    nulls: dict[str, Any] = {"a null": None}
    assert mark(call(parameters, inputs)) == mark(call(nulls | shuffled, inputs))


@given(PARAMETERS, INPUTS)
def test_how_it_is_delivered_makes_no_difference(
    parameters: dict[str, Any], inputs: list[InputImage]
) -> None:
    asked = call(parameters, inputs)
    delivered = call({**parameters, "stream": True, "partial_images": 3}, inputs)
    other = replace(
        delivered, encoding=Encoding.MULTIPART, content_type="x", model="alias", body_bytes=7
    )
    assert mark(asked) == mark(delivered) == mark(other)


@given(PARAMETERS, TEXTS, VALUES)
def test_any_other_parameter_makes_another(
    parameters: dict[str, Any], name: str, value: object
) -> None:
    changed = {**parameters, name: value}
    kept = {key: item for key, item in parameters.items() if item is not None}
    assume(not same(kept, {key: item for key, item in changed.items() if item is not None}))
    assert mark(call(parameters)) != mark(call(changed))


@given(INPUTS, INPUTS)
def test_other_pictures_make_another(a: list[InputImage], b: list[InputImage]) -> None:
    def seen(inputs: list[InputImage]) -> list[tuple[str, str]]:
        return sorted(((item.role, item.digest) for item in inputs), key=lambda item: item[0])

    assert (mark(call({}, a)) == mark(call({}, b))) == (seen(a) == seen(b))


@given(TEXTS, TEXTS, TEXTS, TEXTS, TEXTS, TEXTS)
def test_scope_model_and_upstream_are_apart(a: str, b: str, c: str, d: str, e: str, f: str) -> None:
    asked = call({"prompt": "p"})
    assert (mark(asked, a, b, c) == mark(asked, d, e, f)) == ((a, b, c) == (d, e, f))


def test_the_operation_is_a_part() -> None:
    asked = call({"prompt": "p"})
    assert mark(asked) != mark(replace(asked, operation=Operation.GENERATION))


def test_the_prompt_is_taken_to_the_letter_and_defaults_are_not_filled_in() -> None:
    asked = {"prompt": "a bear"}
    others: list[dict[str, Any]] = [
        {"prompt": "a bear "},
        {"prompt": "a  bear"},
        {"prompt": "A bear"},
        {"prompt": "a bear", "n": 1},
        {"prompt": "a bear", "size": "auto"},
    ]
    marks = {mark(call(parameters)) for parameters in [asked, *others]}
    assert len(marks) == 6


def test_whole_numbers() -> None:
    assert mark(call({"x": 2.0, "y": [1e2]})) == mark(call({"x": 2, "y": [100]}))
    marks = {mark(call({"x": value})) for value in (1, 1.5, True, "1", [1], {"1": 1}, -1)}
    assert len(marks) == 7


def test_it_does_not_change_with_the_version() -> None:
    """Kept answers outlive a release: whoever changes this empties every cache."""
    asked = call({"prompt": "bär", "n": 2}, [InputImage("image", "aa", 1, "image/png")])
    assert mark(asked) == "32f59383ec8991195b255a839acbbce319979d206f8616681094f8cb0232c2de"


def read(body: bytes, content_type: str) -> Call:
    reader = reader_for(Operation.EDIT, content_type, None, None, ReadRules())
    reader.feed(body)
    return reader.close()


def form(boundary: str, fields: list[tuple[str, str, bool]]) -> Call:
    body = ""
    for name, content, is_file in fields:
        body += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"'
        body += f'; filename="{boundary}.png"' if is_file else ""
        body += f"\r\n\r\n{content}\r\n"
    return read((body + f"--{boundary}--").encode(), f"multipart/form-data; boundary={boundary}")


@given(st.sampled_from(["b1", "other"]), st.data())
def test_the_same_form_in_another_order(boundary: str, data: st.DataObject) -> None:
    fields = [("model", "m", False), ("prompt", "p", False), ("n", "2", False),
              ("image", "AAA", True), ("mask", "BBB", True)]  # fmt: skip
    shuffled = data.draw(st.permutations(fields))
    assert mark(form(boundary, shuffled)) == mark(form("x", fields))


def test_the_spellings_of_image_are_one() -> None:
    def spelled(name: str, content: str = "AAA") -> str:
        fields = [("model", "m", False), ("prompt", "p", False), (name, content, True)]
        return mark(form("x", fields))

    assert spelled("image") == spelled("image[]") == spelled("image[0]")
    assert spelled("image") != spelled("image", "AAB")


def test_the_fields_of_a_form_are_those_of_json() -> None:
    fields = [("model", "m", False), ("prompt", "p", False), ("n", "2", False),
              ("stream", "true", False), ("svg[model]", "gpt-5", False),
              ("output_compression", "50", False), ("image", "AAA", True)]  # fmt: skip
    url = "data:image/png;base64,QUFB"
    document = {
        "svg": {"model": "gpt-5", "reasoning": None},
        "images": [{"image_url": url}],
        "output_compression": 50,
        "n": 2,
        "size": None,
        "model": "m",
        "prompt": "p",
    }
    as_json = read(json.dumps(document, indent=2).encode(), "application/json")
    as_form = form("x", fields)
    assert mark(replace(as_form, inputs=())) == mark(replace(as_json, inputs=()))
