"""``validate: strict``: what OpenAI would refuse, named here before it is sent (contract 1.2, 2.1).

For models whose owner wants mistakes found at the door. What a rule does not know it lets pass:
a model of no known family is held to nothing but what holds for all of them.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.domain.call import Call, Encoding, InputImage, Json, Operation
from gateway.domain.errors import InvalidRequest
from gateway.domain.family import MORE_QUALITIES, Family, family_of
from gateway.domain.price import parse_size

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_MAX_MASK_BYTES = 4 << 20
_MAX_FRAME_MS = 655_350
_IMAGE_TYPES = frozenset({"image/png", "image/jpeg", "image/jpg", "image/webp"})
_RETIRED = frozenset({"response_format", "style"})
"""Only models that are gone took these (contract 1.2)."""


def validate_strict(call: Call, model: str | None = None) -> None:
    """Raises ``InvalidRequest`` for the first thing that OpenAI would refuse.

    ``model`` is the model that serves the call, where ``call.model`` is an alias of it.
    """
    name = model or call.model
    family = family_of(name)
    for check in _CHECKS:
        check(call)
    if family is not None:
        _check_family(call, name, family)


def _check_unknown(call: Call) -> None:
    refused = call.unknown | (call.parameters.keys() & _RETIRED)
    if call.operation is Operation.GENERATION:
        refused |= call.parameters.keys() & {"input_fidelity"}
    if refused:
        name = min(refused)
        raise _refusal(f"Unknown parameter: '{name}'.", name, "unknown_parameter")


def _check_choices(call: Call) -> None:
    for name, choices in (
        ("quality", MORE_QUALITIES),
        ("complexity", ("low", "medium", "high")),
        ("background", ("transparent", "opaque", "auto")),
        ("moderation", ("low", "auto")),
        ("output_format", ("png", "webp", "jpeg", "gif", "svg")),
        ("input_fidelity", ("high", "low")),
    ):
        _choose(name, call.parameters.get(name), choices)
    for name in ("safety_identifier", "user"):
        value = call.parameters.get(name, "")
        if not isinstance(value, str):
            raise _refusal(f"Invalid type for '{name}': expected a string.", name, "invalid_type")


def _check_size(call: Call) -> None:
    if call.size != "auto" and not parse_size(call.size):
        raise _refusal(
            f"Invalid size {call.size[:32]!r}: write 'auto' or WIDTHxHEIGHT like 1024x1024.",
            "size",
            "invalid_size",
        )


def _check_format(call: Call) -> None:
    kind = call.output_format
    given = call.parameters
    _number(call, "output_compression", 0, 100)
    if "output_compression" in given and kind not in ("webp", "jpeg"):
        raise _conflict("output_compression", "needs output_format webp or jpeg", kind)
    if given.get("background") == "transparent" and kind not in ("png", "webp"):
        raise _conflict(
            "background", "can be transparent only with output_format png or webp", kind
        )
    _number(call, "frame_duration_ms", 1, _MAX_FRAME_MS)
    for name in ("frame_count", "frame_duration_ms"):
        if name in given and kind != "gif":
            raise _conflict(name, "needs output_format gif", kind)
    if "svg" in given and kind != "svg":
        raise _conflict("svg", "needs output_format svg", kind)
    if kind in ("gif", "svg") and call.stream:
        raise _conflict("stream", "needs output_format png, webp or jpeg", kind)
    if kind in ("gif", "svg") and "partial_images" in given:
        raise _conflict("partial_images", "needs output_format png, webp or jpeg", kind)
    if kind == "gif" and any(picture.role == "mask" for picture in call.inputs):
        raise _conflict("mask", "needs output_format png, webp or jpeg", kind)
    if kind == "svg" and call.n != 1:
        raise _conflict("n", "must be 1", kind)
    svg = given.get("svg")
    reasoning = svg.get("reasoning") if isinstance(svg, dict) else None
    if reasoning is not None:
        effort = reasoning.get("effort") if isinstance(reasoning, dict) else reasoning
        _choose("svg.reasoning.effort", effort, _EFFORTS)


def _check_stream(call: Call) -> None:
    if call.partial_images and not call.stream:
        raise _refusal(
            "'partial_images' needs stream=true: only a stream can carry partial pictures.",
            "partial_images",
            "invalid_value",
        )


def _check_inputs(call: Call) -> None:
    counts = {"image": 0}
    first = next((picture for picture in call.inputs if picture.role == "image"), None)
    for picture in call.inputs:
        index = counts.get(picture.role, 0)
        counts[picture.role] = index + 1
        # An address has no type of its own: the upstream fetches it.
        if picture.media_type:
            _check_picture(call, picture, index)
        if picture.role != "image" and first is not None:
            _check_overlay(picture, first)
    if "mask" in counts and "markup" in counts:
        raise _refusal("'markup' cannot be combined with 'mask'.", "markup", "invalid_value")


def _check_picture(call: Call, picture: InputImage, index: int) -> None:
    images = sum(other.role == picture.role for other in call.inputs)
    many = images > 1 or (call.encoding is Encoding.JSON and picture.role == "image")
    param = f"{picture.role}[{index}]" if many else picture.role
    if picture.media_type not in _IMAGE_TYPES:
        raise _refusal(
            f"Invalid file '{param}': unsupported mimetype ('{picture.media_type[:64]}'). "
            "Supported file formats are 'image/jpeg', 'image/png', and 'image/webp'.",
            param,
            "unsupported_file_mimetype",
        )
    if not picture.width or not picture.height:
        raise _refusal(
            f"Invalid image '{param}': its first bytes are not those of a PNG, JPEG or WebP "
            "picture. Check that the file is whole.",
            param,
            "invalid_image",
        )


def _check_overlay(overlay: InputImage, first: InputImage) -> None:
    """A mask or a markup lies over the first image. A markup is compared by the upstream, since
    its size is that of the picture after its EXIF orientation."""
    role = overlay.role
    if role not in ("mask", "markup") or not overlay.media_type:
        return
    if overlay.media_type != "image/png":
        raise _refusal(
            f"'{role}' must be a PNG with transparent pixels, not {overlay.media_type[:64]}.",
            role,
            "unsupported_file_mimetype",
        )
    if role == "mask" and overlay.size_bytes > _MAX_MASK_BYTES:
        raise _refusal("The mask is larger than 4 MiB. Send a smaller one.", role, "invalid_image")
    sizes = (overlay.width, overlay.height), (first.width, first.height)
    if role == "mask" and first.width and sizes[0] != sizes[1]:
        raise _refusal(
            f"The mask is {overlay.width}x{overlay.height} and the first image "
            f"{first.width}x{first.height}: they must have the same size.",
            role,
            "invalid_image",
        )


_CHECKS: tuple[Callable[[Call], None], ...] = (
    _check_unknown,
    _check_choices,
    _check_size,
    _check_format,
    _check_stream,
    _check_inputs,
)


def _check_family(call: Call, model: str, family: Family) -> None:
    _choose("quality", call.parameters.get("quality"), family.qualities)
    fidelity = call.parameters.get("input_fidelity")
    if fidelity is not None and not family.fidelities:
        raise _refusal(
            f"{model} always works at high fidelity: leave 'input_fidelity' out.",
            "input_fidelity",
            "invalid_value",
        )
    _choose("input_fidelity", fidelity, family.fidelities)
    if not family.markup and any(picture.role == "markup" for picture in call.inputs):
        raise _refusal(f"{model} takes no 'markup'.", "markup", "unknown_parameter")
    pixels = parse_size(call.size)
    if pixels is None:
        return
    width, height = pixels
    why = family.size_problem(width, height)
    if why:
        nearest = family.nearest(width, height)
        raise _refusal(
            f"{width}x{height} is not served by {model}. Nearest: {nearest[0]}x{nearest[1]}. {why}",
            "size",
            "invalid_size",
        )


def _choose(name: str, value: Json, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        said = ", ".join(f"'{choice}'" for choice in choices)
        shown = repr(value[:64]) if isinstance(value, str) else "one that is no string"
        raise _refusal(
            f"Invalid value: {shown}. Supported values of '{name}' are: {said}.",
            name,
            "invalid_value",
        )


def _number(call: Call, name: str, low: int, high: int) -> None:
    value = call.parameters.get(name)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refusal(f"Invalid type for '{name}': expected an integer.", name, "invalid_type")
    if not low <= value <= high:
        raise _refusal(
            f"Invalid value for '{name}': send an integer from {low} to {high}.",
            name,
            "invalid_value",
        )


def _conflict(name: str, rule: str, output_format: str) -> InvalidRequest:
    return _refusal(
        f"'{name}' {rule}; this request asks for {output_format}.", name, "invalid_value"
    )


def _refusal(message: str, param: str, code: str) -> InvalidRequest:
    return InvalidRequest(message, code=code, param=param, reason="strict")
