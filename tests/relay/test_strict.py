"""``validate: strict`` refuses what OpenAI would, and nothing that it would take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.call import Call, Encoding, InputImage, Operation
from gateway.domain.errors import InvalidRequest
from gateway.relay.strict import validate_strict

PNG = InputImage("image", "d", 9, "image/png", 64, 64)
MASK = replace(PNG, role="mask")


def call(*inputs: InputImage, model: str = "gpt-image-2.5-flare", **parameters: Any) -> Call:
    typed = {
        name: value
        for name, value in parameters.items()
        if name in ("n", "size", "quality", "stream", "partial_images", "output_format")
    }
    return Call(
        operation=Operation.EDIT if inputs else Operation.GENERATION,
        encoding=Encoding.MULTIPART if inputs else Encoding.JSON,
        content_type="",
        model=model,
        prompt_bytes=1,
        parameters={"prompt": "p", **parameters},
        inputs=inputs,
        **typed,
    )


SVG: dict[str, Any] = {
    "output_format": "svg",
    "svg": {"model": "gpt-5", "reasoning": {"effort": "low"}},
}

TAKEN = [
    call(),
    call(size="auto", quality="xhigh", background="transparent", moderation="low", n=10),
    call(size="3840x2160"),
    call(size="2160x3840", model="gpt-image-2"),
    call(size="816x816", model="gpt-image-2.6-sunburst", complexity="high"),
    call(size="1536x1024", model="gpt-image-1.5", quality="high"),
    call(size="512x512", quality="max", model="someone-elses-model"),
    call(output_format="jpeg", output_compression=0),
    call(output_format="gif", frame_count=16, frame_duration_ms=100),
    call(**SVG),
    call(stream=True, partial_images=3),
    call(partial_images=0),
    call(user="u", safety_identifier="s"),
    call(PNG, MASK, input_fidelity="high", model="gpt-image-1.5"),
    call(PNG, PNG, replace(PNG, role="markup", size_bytes=9 << 20)),
    call(replace(PNG, media_type="", width=0, height=0)),
]


@pytest.mark.parametrize("good", TAKEN)
def test_taken(good: Call) -> None:
    validate_strict(good)


REFUSED = [
    (call(response_format="url"), "unknown_parameter", "response_format"),
    (call(style="vivid"), "unknown_parameter", "style"),
    (replace(call(seed=1), unknown=frozenset({"seed"})), "unknown_parameter", "seed"),
    (call(input_fidelity="high"), "unknown_parameter", "input_fidelity"),
    (call(quality="ultra"), "invalid_value", "quality"),
    (call(quality="standard"), "invalid_value", "quality"),
    (call(quality="max", model="gpt-image-2"), "invalid_value", "quality"),
    (call(quality="xhigh", model="gpt-image-1.5"), "invalid_value", "quality"),
    (call(complexity="max"), "invalid_value", "complexity"),
    (call(background="red"), "invalid_value", "background"),
    (call(background=["red"]), "invalid_value", "background"),
    (call(moderation="none"), "invalid_value", "moderation"),
    (call(output_format="bmp"), "invalid_value", "output_format"),
    (call(user=5), "invalid_type", "user"),
    (call(size="large", model="other"), "invalid_size", "size"),
    (call(size="0x1024"), "invalid_size", "size"),
    (call(size=""), "invalid_size", "size"),
    (call(size="512x512"), "invalid_size", "size"),
    (call(size="1000x1000"), "invalid_size", "size"),
    (call(size="3200x1024"), "invalid_size", "size"),
    (call(size="3856x2048"), "invalid_size", "size"),
    (call(size="3840x3840"), "invalid_size", "size"),
    (call(size="1024x1792", model="gpt-image-1.5"), "invalid_size", "size"),
    (call(output_compression=50), "invalid_value", "output_compression"),
    (call(output_format="webp", output_compression=101), "invalid_value", "output_compression"),
    (call(output_format="webp", output_compression="9"), "invalid_type", "output_compression"),
    (call(output_format="webp", output_compression=True), "invalid_type", "output_compression"),
    (call(output_format="jpeg", background="transparent"), "invalid_value", "background"),
    (call(partial_images=1), "invalid_value", "partial_images"),
    (call(frame_count=3), "invalid_value", "frame_count"),
    (call(output_format="gif", frame_duration_ms=10**6), "invalid_value", "frame_duration_ms"),
    (call(output_format="gif", stream=True), "invalid_value", "stream"),
    (call(output_format="gif", partial_images=0), "invalid_value", "partial_images"),
    (call(PNG, MASK, output_format="gif"), "invalid_value", "mask"),
    (call(svg={"model": "gpt-5"}), "invalid_value", "svg"),
    (call(n=2, **SVG), "invalid_value", "n"),
    (call(stream=True, **SVG), "invalid_value", "stream"),
    (call(output_format="svg", svg={"reasoning": {"effort": "all"}}), "invalid_value",
     "svg.reasoning.effort"),
    (call(replace(PNG, media_type="application/octet-stream")), "unsupported_file_mimetype",
     "image"),
    (call(PNG, replace(PNG, media_type="image/heic")), "unsupported_file_mimetype", "image[1]"),
    (call(replace(PNG, width=0, height=0)), "invalid_image", "image"),
    (call(PNG, replace(MASK, media_type="image/jpeg")), "unsupported_file_mimetype", "mask"),
    (call(PNG, replace(MASK, size_bytes=5 << 20)), "invalid_image", "mask"),
    (call(PNG, replace(MASK, width=32)), "invalid_image", "mask"),
    (call(PNG, MASK, replace(PNG, role="markup")), "invalid_value", "markup"),
    (call(PNG, replace(PNG, role="markup"), model="gpt-image-2"), "unknown_parameter", "markup"),
    (call(PNG, input_fidelity="high", model="gpt-image-2"), "invalid_value", "input_fidelity"),
    (call(PNG, input_fidelity="high", model="gpt-image-1-mini"), "invalid_value",
     "input_fidelity"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "code", "param"), REFUSED)
def test_refused(bad: Call, code: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate_strict(bad)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)


def test_the_texts_of_openai() -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate_strict(call(response_format="url"))
    assert caught.value.message == "Unknown parameter: 'response_format'."
    with pytest.raises(InvalidRequest) as caught:
        validate_strict(call(replace(PNG, media_type="application/octet-stream")))
    assert caught.value.message == (
        "Invalid file 'image': unsupported mimetype ('application/octet-stream'). Supported file "
        "formats are 'image/jpeg', 'image/png', and 'image/webp'."
    )


@pytest.mark.parametrize(
    ("size", "model", "nearest"),
    [
        ("512x512", "gpt-image-2.5-flare", "816x816"),
        ("1792x1024", "gpt-image-1.5", "1536x1024"),
        ("512x512", "gpt-image-1.5", "1024x1024"),
        ("1000x1000", "gpt-image-2", "992x992"),
    ],
)
def test_a_size_that_is_served_is_named(size: str, model: str, nearest: str) -> None:
    with pytest.raises(
        InvalidRequest, match=f"{size} is not served by {model}. Nearest: {nearest}"
    ):
        validate_strict(call(size=size, model=model))


@given(st.integers(1, 999_999), st.integers(1, 999_999))
def test_the_nearest_size_is_taken(width: int, height: int) -> None:
    try:
        validate_strict(call(size=f"{width}x{height}"))
    except InvalidRequest as refused:
        nearest = refused.message.partition("Nearest: ")[2].partition(".")[0]
        validate_strict(call(size=nearest))


def test_an_alias_is_judged_by_the_model_that_serves_it() -> None:
    aliased = call(size="512x512", model="team-art")
    validate_strict(aliased)
    with pytest.raises(InvalidRequest, match="gpt-image-2"):
        validate_strict(aliased, "gpt-image-2")
